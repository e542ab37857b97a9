"""Measure a model on math benchmarks by the papers' protocol: several samples per problem, averaged.

Prompts, sampling and grading are those of training. An evaluation that was stopped or killed resumes when the
same command is given again, and ends with the same numbers.

    python eval_math.py                                             # the built-in demo model, before training
    python eval_math.py --model runs/a/model --benchmarks math500,amc23,my.jsonl --out evals/a
    python eval_math.py --compare evals/a evals/b

Papers: SGPO (arXiv 2606.24064) for the protocol; unbiased pass@k: 2107.03374; majority vote: 2203.11171.
Read `evaluate` first, then `summarize`.
"""
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from common import (
    BENCHMARKS,
    DEMO_FOLDER,
    SYSTEM_PROMPT,
    append_jsonl,
    build_prompt,
    check_context,
    extract_answer,
    flag,
    generate_in_pieces,
    gold_is_gradable,
    grade,
    grader_counts,
    load_model,
    load_problems,
    load_tokenizer,
    lock_file,
    parse_args,
    printable,
    program,
    random_generator,
    read_jsonl,
    refuse,
    seed_everything,
    stop_ids,
    versions,
    world_size,
    write_atomic,
)

# Letters: k samples per problem, c of them correct; n samples of a batch, C length of the longest completion.


# ---------------------------------------------------------------- flags

@dataclass
class Args:
    model: str = flag("demo", "hub id or local directory of the model; demo: a tiny built-in model")
    benchmarks: str = flag(None, f"{', '.join(BENCHMARKS)}, demo, or .jsonl and .parquet files, separated by "
                                 "commas (default: demo for the demo model, else SGPO's four)")
    k: int = flag(None, "samples per problem (default: 32 for AMC and AIME as in the papers, else 4)",
                  "[1, inf)")
    out: str = flag(None, "results directory, new or to resume (default: a new one under runs/)")
    strategies: str = flag(None, "also sample with a strategy in the prompt: a JSONL file of problem "
                                 "and strategy; own: the strategies of the benchmark's own rows")
    compare: list[str] = flag(None, "compare two results directories, A and B, and stop")
    temperature: float = flag(0.6, "sampling temperature (the papers'); 0: greedy, with --k 1", "[0, inf)")
    top_p: float = flag(0.95, "sample from the likeliest tokens that hold this probability (SGPO's; TGPO "
                              "evaluates at 1)", "(0, 1]")
    max_new_tokens: int = flag(4096, "maximum completion length in tokens; raise it if many are truncated "
                                     "(the papers: 32K)", "[1, inf)")
    generation_batch_size: int = flag(64, "completions that are sampled and graded together; lower it if "
                                          "memory runs out", "[1, inf)")
    system_prompt: str = flag(SYSTEM_PROMPT, "system message of every prompt; empty for none")
    seed: int = flag(0, "seed of sampling and bootstrap", "[0, inf)")

    def __post_init__(self) -> None:
        if self.benchmarks is None:
            self.benchmarks = "demo" if self.model == "demo" else "math500,olympiadbench,amc23,aime24"
        if self.strategies is None and self.benchmarks == "demo":
            self.strategies = "own"


# ---------------------------------------------------------------- benchmarks

# A part is a benchmark ("amc23") or the same benchmark with strategies in the prompts ("amc23 guided").
Parts = dict[str, list[dict]]
PAPERS_K = {"amc23": 32, "aime24": 32, "aime25": 32}


def load_parts(args: Args, tokenizer) -> Parts:
    """Return everything to sample: each problem of each part k times, side by side, longest prompts first."""
    benchmarks = {}
    for source in dict.fromkeys(args.benchmarks.split(",")):
        name = Path(source).name
        if name in benchmarks:
            refuse(f"--benchmarks {source}: there already is a {name}; give the file another name")
        benchmarks[name] = load_benchmark(source, name)
    if args.strategies:
        attach_strategies(args.strategies, sum(benchmarks.values(), []))
    parts = {}
    for name, problems in benchmarks.items():
        k = args.k or PAPERS_K.get(name, 4)
        alone = [{**problem, "strategy": None} for problem in problems]
        guided = [problem for problem in problems if args.strategies and problem.get("strategy")]
        print(printable(f"{name}: {len(problems)} problems x {k} samples, {len(guided)} also guided"))
        parts[name] = to_samples(alone, k, tokenizer, args)
        if guided:
            parts[f"{name} guided"] = to_samples(guided, k, tokenizer, args)
    longest = max(len(sample["prompt"]) for samples in parts.values() for sample in samples)
    check_context(args.model, "--model", longest, args.max_new_tokens)
    return parts


def load_benchmark(source: str, name: str) -> list[dict]:
    """Return the problems of a benchmark, each with an id of its own.

    Problems whose gold answer the grader cannot read stay: they are in the papers' denominators, too.
    """
    is_file = source.endswith((".jsonl", ".json", ".parquet")) or os.path.isfile(source)
    if source == "demo":
        source = str(DEMO_FOLDER / "held_out.jsonl")
    elif not is_file and source not in BENCHMARKS:
        refuse(f"--benchmarks {source!r}: neither a file nor one of {', '.join(BENCHMARKS)}, demo")
    problems = load_problems(source)
    if len({problem["id"] for problem in problems}) < len(problems):
        print(printable(f"{name}: ids repeat, so its problems are numbered instead"))
        problems = [{**problem, "id": str(i)} for i, problem in enumerate(problems)]
    unreadable = [problem["id"] for problem in problems if not gold_is_gradable(problem["answer"])]
    if unreadable:
        print(printable(f"{name}: the grader cannot read {len(unreadable)} of {len(problems)} gold answers; "
                        f"no answer to these problems is correct; first: id {unreadable[0]}"))
    return problems


def to_samples(problems: list[dict], k: int, tokenizer, args: Args) -> list[dict]:
    """Return each problem k times, with its prompt."""
    for problem in problems:
        text, strategy = problem["problem"], problem["strategy"]
        problem["prompt"] = build_prompt(tokenizer, text, args.system_prompt, strategy)
    longest_first = sorted(problems, key=lambda problem: -len(problem["prompt"]))
    return [{**problem, "sample": j} for problem in longest_first for j in range(k)]


def attach_strategies(source: str, problems: list[dict]) -> None:
    """Set problem["strategy"] from a file; own: keep the strategies that the problems have.

    The file may be the strategies.jsonl of sgpo.py, also of a run that is still writing it.
    """
    if source != "own":
        if not os.path.isfile(source):
            refuse(f"--strategies {source}: no such file")
        strategies = {}
        for place, row in read_jsonl(source, skip_unfinished=True):
            row = row if isinstance(row, dict) else {}
            text, strategy = row.get("problem"), row.get("strategy")
            if not isinstance(text, str) or not isinstance(strategy, str | None):
                refuse(f'{place}: must be a JSON object with "problem" and "strategy"')
            strategies[text.strip()] = strategy
        for problem in problems:
            problem["strategy"] = strategies.get(problem["problem"].strip())
    if not any(problem.get("strategy") for problem in problems):
        refuse(f"--strategies {source}: it has no strategy for any problem of the benchmarks")


# ---------------------------------------------------------------- sampling

def sample_batch(model, tokenizer, title: str, start: int, samples: list[dict], args: Args) -> list[dict]:
    """Sample and grade one completion for each of these samples, of which the first is number `start`.

    The batch has a seed of its own, so its completions depend neither on the other benchmarks nor on where
    an evaluation was resumed.
    """
    seed_everything(args.seed, title, start)
    end_ids = stop_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=args.temperature > 0,
        temperature=args.temperature or 1.0,
        top_p=args.top_p,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],  # any id works, because the mask goes by position
    )
    prompts = [sample["prompt"] for sample in samples]
    sampled = generate_in_pieces(model, prompts, config, args.generation_batch_size)
    completions = sampled.ids                                                             # [n, C]
    is_end = torch.isin(completions, torch.tensor(end_ids, device=completions.device))    # [n, C]
    ends_before = is_end.cumsum(1) - is_end.long()                                        # [n, C]
    mask = ends_before == 0  # up to and including the first end token
    written = mask & ~is_end
    rows = []
    for i, sample in enumerate(samples):
        text = tokenizer.decode(completions[i, written[i]])
        rows.append({
            "benchmark": title,
            "id": sample["id"],
            "sample": sample["sample"],
            "correct": grade(text, sample["answer"]) >= 0.5,
            "answer": extract_answer(text),
            "tokens": mask[i].sum().item(),
            "truncated": not is_end[i].any(),
            "batch": [start, start + len(samples)],
            "completion": text,
        })
    return rows


def sample_rest(model, tokenizer, parts: Parts, path: Path, args: Args) -> Parts:
    """Sample what is not in the file yet, batch by batch, and return the completions of each part."""
    done = finished_batches(path)
    total = sum(len(samples) for samples in parts.values())
    num_done = sum(len(rows) for rows in done.values())
    print(f"{total} completions, {num_done} of them are in {path}; if the evaluation stops, the same command "
          f"with --out {args.out} resumes it")
    with tqdm(total=total, initial=num_done, unit="completion", disable=None) as bar:
        for title, samples in parts.items():
            for start in range(len(done[title]), len(samples), args.generation_batch_size):
                batch = samples[start:start + args.generation_batch_size]
                rows = sample_batch(model, tokenizer, title, start, batch, args)
                append_jsonl(path, rows)
                done[title] += rows
                accuracy = mean(done[title], "correct")
                progress = f"{title}: {len(done[title])} of {len(samples)}, accuracy {accuracy:.3f}"
                bar.update(len(rows))
                bar.set_description(printable(progress))
                if bar.disable:  # no terminal
                    print(printable(progress))
    return done


def finished_batches(path: Path) -> Parts:
    """Return the completions of each part in the file, and remove a batch that a kill cut off from it."""
    batches = defaultdict(list)
    if path.exists():
        for _, row in read_jsonl(path, skip_unfinished=True):
            batches[(row["benchmark"], *row["batch"])].append(row)
    done = defaultdict(list)
    for (title, start, end), rows in batches.items():
        if len(rows) == end - start:
            done[title] += rows
    kept = [json.dumps(row) + "\n" for rows in done.values() for row in rows]
    write_atomic(path, "".join(kept))
    return done


# ---------------------------------------------------------------- statistics

def mean(rows: Sequence[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of P(at least one of k samples is correct), c of n samples being correct.

    1 - C(n - c, k) / C(n, k)
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(answer: str | None) -> str | None:
    """Return an answer without spaces and common differences of spelling; 0.5 and 1/2 stay two votes."""
    if answer is None:
        return None
    text = re.sub(r"\\[dt]frac", r"\\frac", answer)
    return re.sub(r"\\left|\\right|\\[!,]|[$\s]", "", text).rstrip(".")


def majority(votes: Sequence[str | None]) -> int | None:
    """Return the index of the first sample with the commonest vote. A tie goes to the vote seen first.

    None does not vote; without any vote there is no majority.
    """
    counts = Counter(v for v in votes if v is not None)
    if not counts:
        return None
    return votes.index(max(counts, key=counts.get))


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95% interval of the mean of one value per problem.

    Problems are drawn with replacement, 10,000 times; the interval holds the middle 95% of the means.
    """
    draws = random_generator(seed, "bootstrap").integers(len(values), size=(10_000, len(values)))
    means = np.asarray(values, dtype=float)[draws].mean(1)  # [10000]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------- results

def summarize(rows: list[dict], unguided: dict | None, seed: int) -> dict:
    """Return the statistics of one part, over all its problems and per problem.

    `unguided`: the statistics of the same benchmark without strategies, if this part has strategies.
    """
    samples_of = defaultdict(list)
    for row in rows:
        samples_of[row["id"]].append(row)
    k = len(rows) // len(samples_of)
    per_problem = {}
    for name, samples in samples_of.items():
        winner = majority([vote(sample["answer"]) for sample in samples])
        numbers = {
            "avg@k": mean(samples, "correct"),
            "pass@k": float(any(sample["correct"] for sample in samples)),
            "mean_length": mean(samples, "tokens"),
            "maj@k": float(winner is not None and samples[winner]["correct"]),
        }
        if unguided:
            numbers["strategy adds"] = numbers["avg@k"] - unguided["per_problem"][name]["avg@k"]
        per_problem[name] = numbers
    results = {"problems": len(per_problem), "k": k, "truncated": mean(rows, "truncated"),
               "no_box": float(np.mean([row["answer"] is None for row in rows]))}
    measures = list(numbers)  # the same for every problem
    for measure in measures:
        values = [of_problem[measure] for of_problem in per_problem.values()]
        results[measure] = float(np.mean(values))
        results[f"{measure}_interval"] = bootstrap_interval(values, seed)
    num_correct = [sum(sample["correct"] for sample in samples) for samples in samples_of.values()]
    sizes = {k, *(2 ** i for i in range(k.bit_length()))}
    results["pass@k"] = {str(size): float(np.mean([pass_at_k(k, c, size) for c in num_correct]))
                         for size in sorted(sizes)}
    return {**results, "per_problem": per_problem}


def print_results(results: dict[str, dict]) -> None:
    table = [["", "problems", "avg@k", "95% interval", "maj@k", "pass@k", "tokens", "truncated", "no box"]]
    for title, r in results.items():
        low, high = r["avg@k_interval"]
        passed = [f"{value:.3f} @{size}" for size, value in r["pass@k"].items() if size != "1"]
        table.append([title, str(r["problems"]), f"{r['avg@k']:.3f} @{r['k']}", f"[{low:.3f}, {high:.3f}]",
                      f"{r['maj@k']:.3f}", "  ".join(passed), f"{r['mean_length']:.0f}",
                      f"{r['truncated']:.3f}", f"{r['no_box']:.3f}"])
    print_table(table)
    for title, r in results.items():
        if "strategy adds" in r:
            low, high = r["strategy adds_interval"]
            added = r["strategy adds"]
            print(printable(f"{title}: the strategy adds {added:+.3f} [{low:+.3f}, {high:+.3f}]"))


def print_table(table: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print(printable("  ".join(cells).rstrip()))


# ---------------------------------------------------------------- comparison

def compare(folders: list[str]) -> None:
    """Print two results side by side, and B - A over the same problems with its 95% interval."""
    if len(folders) != 2:
        refuse(f"--compare takes two results directories, not {len(folders)}")
    a, b = (read_results(folder) for folder in folders)
    titles = [title for title in a["results"] if title in b["results"]]
    if not titles:
        refuse(f"--compare: no benchmark is in both; A has {', '.join(a['results'])}, "
               f"B has {', '.join(b['results'])}")
    table = [["", "", "A", "B", "B - A", "95% interval"]]
    for title in titles:
        if a["inputs"][title] != b["inputs"][title]:
            refuse(f"--compare: A and B differ in problems, answers, strategies or --k of {title}")
        table += compare_part(title, a["results"][title], b["results"][title])
    print(printable(f"A: {folders[0]}\nB: {folders[1]}"))
    for name, value in a["flags"].items():
        other = b["flags"].get(name)
        if name != "out" and value != other:
            print(printable(f"{name}: {value!r} in A, {other!r} in B"))
    print_table(table)


def read_results(folder: str) -> dict:
    """Return the results.json of a finished evaluation."""
    try:
        found = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        return {name: found[name] for name in ("results", "flags", "inputs")}
    except (OSError, ValueError, KeyError, TypeError):
        refuse(f"{folder}: there is no results.json of a finished evaluation")


def compare_part(title: str, a: dict, b: dict) -> list[list[str]]:
    """Return the table's rows of one part. Differences per problem cancel how hard the problems are."""
    names = list(a["per_problem"])
    table = []
    for measure in a["per_problem"][names[0]]:
        x = np.array([a["per_problem"][name][measure] for name in names])
        y = np.array([b["per_problem"][name][measure] for name in names])
        low, high = bootstrap_interval(y - x)
        table.append([title, measure.replace("@k", f"@{a['k']}"), f"{x.mean():.3f}", f"{y.mean():.3f}",
                      f"{np.mean(y - x):+.3f}", f"[{low:+.3f}, {high:+.3f}]"])
    return table


# ---------------------------------------------------------------- results directory

# Another batch size draws other random numbers, which are as good: memory may have run out.
MAY_DIFFER = {"out", "generation_batch_size"}


def fingerprints(args: Args, parts: Parts) -> dict[str, str]:
    """Return hashes of what may change under the same name: a local model's files, and every part."""
    statuses = [(path.name, path.stat()) for path in sorted(Path(args.model).glob("*"))]
    contents = {"weights": [[name, status.st_size, status.st_mtime_ns] for name, status in statuses]}
    for title, samples in parts.items():
        contents[title] = sorted([s["id"], s["problem"], s["answer"], s["strategy"]] for s in samples)
    return {name: hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
            for name, content in contents.items()}


def check_directory(out: Path, config: dict) -> None:
    """Refuse a directory that is not empty and holds something else than this evaluation or a part of it."""
    try:
        if not out.exists() or not any(out.iterdir()):
            return
        old = json.loads((out / "config.json").read_text(encoding="utf-8"))
        before = {**old["flags"], **old["inputs"]}
    except (OSError, ValueError, KeyError, TypeError):
        refuse(f"--out {out} is not empty and holds no evaluation; choose another directory")
    now = {**config["flags"], **config["inputs"]}
    differing = [f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
                 for name in sorted({*before, *now} - MAY_DIFFER) if before.get(name) != now.get(name)]
    if differing:
        refuse(f"--out {out} holds another evaluation: {'; '.join(differing)}; choose another directory")


def open_directory(out: Path, config: dict):
    """Make the directory, lock it against other evaluations and write config.json; return the lock."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {out}: cannot be made ({error.strerror})")
    lock = lock_file(out / "lock")
    if lock is None:
        refuse(f"--out {out}: another evaluation is writing there")
    write_atomic(out / "config.json", json.dumps(config, indent=2) + "\n")
    return lock


# ---------------------------------------------------------------- main

def evaluate(args: Args) -> None:
    """Sample, grade and count; write results.json and print its table."""
    tokenizer = load_tokenizer(args.model)
    parts = load_parts(args, tokenizer)
    if args.out is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        args.out = f"runs/eval_math-{Path(args.model).name}-{now}-{os.getpid()}"
    out = Path(args.out)
    config = {"script": "eval_math", "flags": dataclasses.asdict(args), "inputs": fingerprints(args, parts),
              "command": sys.argv, **versions()}
    check_directory(out, config)
    if (out / "results.json").exists():
        print(f"{out} is complete")
        print_results(read_results(args.out)["results"])
        return
    model = load_model(args.model)

    # ---- from here on something is written
    counts_before = grader_counts.copy()
    with open_directory(out, config):
        completions = sample_rest(model, tokenizer, parts, out / "generations.jsonl", args)
        results = {}
        for title in parts:
            unguided = results.get(title.removesuffix(" guided"))
            results[title] = summarize(completions[title], unguided, args.seed)
        write_atomic(out / "results.json", json.dumps({**config, "results": results}, indent=2) + "\n")
    counts = grader_counts - counts_before
    given_up = counts["timeouts"] + counts["crashes"]
    if given_up:
        print(f"warning: the grader gave up on {given_up} answers, which count as wrong")
    print_results(results)
    print(f"results and generations: {out}")


@program
def main() -> None:
    args = parse_args(Args)
    if world_size() > 1:
        refuse("eval_math.py is one process: start it without torchrun, for example a benchmark on each GPU")
    if args.compare:
        compare(args.compare)
        return
    if args.temperature == 0 and args.k != 1:
        refuse("--temperature 0 is greedy, so all samples of a problem are equal: add --k 1")
    evaluate(args)


if __name__ == "__main__":
    main()
