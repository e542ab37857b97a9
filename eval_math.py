"""Accuracy of a checkpoint on math benchmarks by the papers' protocol: several samples per problem, averaged.

Prompts, sampling and grading are those of training. An evaluation that was stopped or killed goes on when its
command is given again, with the same numbers.

    python eval_math.py                                             # the built-in demo model, before training
    python eval_math.py --model runs/a/model --benchmarks math500,amc23,my.jsonl --out evals/a
    python eval_math.py --compare evals/a evals/b

Papers: SGPO (arXiv 2606.24064) for the protocol; unbiased pass@k: 2107.03374; majority vote: 2203.11171.
"""
import hashlib
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np

from common import (
    BENCHMARKS, SYSTEM_PROMPT, build_prompt, check_context, check_directory, complete, demo_recipe, demo_rows,
    extract_answer, flag, generator, gold_is_gradable, grade_batch, grader_counts, load_model, load_rows,
    load_tokenizer, lock, long_work, parse_args, printable, program, read_jsonl, refuse, rewrite_jsonl,
    say_table, seed_everything, stop_asked, versions, world, write_atomic, write_jsonl)


# ---------------------------------------------------------------- flags

@dataclass
class Args:
    """evaluation"""
    model: str = flag("demo", "hub id or local directory; demo: the built-in tiny model")
    benchmarks: str = flag(None, "names, .jsonl or .parquet files, by commas (default: demo, or SGPO's four)")
    k: int = flag(None, "samples per problem (default: the papers' for known names, 4 for files)", "[1, inf)")
    out: str = flag(None, "results directory, new or to go on with (default: a new one under runs/)")
    strategies: str = flag(None, "with these too: JSONL of problem (or id) and strategy; own: the rows' own")
    compare: list[str] = flag(None, "two results directories, shown side by side")
    temperature: float = flag(0.6, "sampling temperature (the papers'); 0: greedy, with --k 1", "[0, inf)")
    top_p: float = flag(0.95, "nucleus sampling (SGPO's; TGPO evaluates at 1)", "(0, 1]")
    max_new_tokens: int = flag(4096, "longest completion; more if many are cut off (papers: 32K)", "[1, inf)")
    generation_batch_size: int = flag(64, "completions written at once; fewer when memory is short",
                                      "[1, inf)")
    seed: int = flag(0, "seed of sampling and bootstrap", "[0, inf)")
    system_prompt: str = flag(SYSTEM_PROMPT, "system message; empty for none")


def recipe(args: Args) -> dict:
    """Defaults that depend on other flags: benchmarks, and the demo's settings for its model or problems."""
    usual = "demo" if args.model == "demo" else "math500,olympiadbench,amc23,aime24"
    own = {"benchmarks": args.benchmarks or usual}
    if "demo" in (args.model, own["benchmarks"]):
        own |= demo_recipe(replace(args, model="demo"))
    return {**own, "strategies": "own"} if own["benchmarks"] == "demo" else own


# ---------------------------------------------------------------- benchmarks

Parts = dict[str, list[dict]]  # a benchmark, alone or "NAME guided" -> its rows or its completions
PAPERS_K = {"amc23": 32, "aime24": 32, "aime25": 32}  # samples per problem; else 4


def load_parts(args: Args, tokenizer) -> Parts:
    """All that is to be sampled: each row k times, side by side, the longest prompts first."""
    benchmarks, parts = {}, {}
    for source in dict.fromkeys(filter(None, args.benchmarks.split(","))):
        name = Path(source).name
        if name in benchmarks:
            refuse(f"--benchmarks {source}: there is a {name} already; give the file another name")
        benchmarks[name] = load_benchmark(source, name)
    if not benchmarks:
        refuse("--benchmarks is empty")
    assign_strategies(args.strategies, sum(benchmarks.values(), []))
    for name, rows in benchmarks.items():
        k, guided = args.k or PAPERS_K.get(name, 4), [row for row in rows if row["strategy"]]
        print(f"{name}: {len(rows)} problems x {k} samples, {len(guided)} of them also with a strategy")
        for title, some in ((name, [{**row, "strategy": None} for row in rows]), (f"{name} guided", guided)):
            for row in some:
                row["prompt"] = build_prompt(tokenizer, row["problem"], args.system_prompt, row["strategy"])
            some.sort(key=lambda row: -len(row["prompt"]))
            if some:
                parts[title] = [{**row, "sample": j} for row in some for j in range(k)]
    longest = max(len(row["prompt"]) for rows in parts.values() for row in rows)
    check_context(args.model, "--model", longest, args.max_new_tokens)
    return parts


def load_benchmark(source: str, name: str) -> list[dict]:
    """All its rows: those whose answer the grader cannot read are in the papers' denominators, too."""
    is_file = source.endswith((".jsonl", ".json", ".parquet")) or os.path.isfile(source)
    if not is_file and source not in (*BENCHMARKS, "demo"):
        refuse(f"--benchmarks {source}: neither a file nor one of {', '.join(BENCHMARKS)}, demo")
    rows = demo_rows()[1] if source == "demo" else load_rows(source)
    if len({row["id"] for row in rows}) < len(rows):
        print(f"{name}: ids repeat, so its rows are numbered instead")
        rows = [{**row, "id": str(i)} for i, row in enumerate(rows)]
    unreadable = [row["id"] for row in rows if not gold_is_gradable(row["answer"])]
    if unreadable:
        print(f"{name}: the grader cannot read {len(unreadable)} of {len(rows)} golds; no answer to them is "
              f"right, first: id {printable(unreadable[0])}")
    return rows


def assign_strategies(source: str | None, rows: list[dict]) -> None:
    """row["strategy"] becomes what guides the row, or None. A file names problems by text, else by id."""
    named, is_file = defaultdict(list), source not in (None, "own")
    for row in rows:
        row["strategy"] = row.get("strategy") if source == "own" else None
        named["problem", row["problem"].strip()].append(row)
        named["id", row["id"]].append(row)
    if is_file and not os.path.isfile(source):
        refuse(f"--strategies {source}: no such file")
    for place, line in read_jsonl(source, cut_by_kill=True) if is_file else ():
        line = line if isinstance(line, dict) else {}
        problem, strategy = line.get("problem", line.get("question")), line.get("strategy")
        if strategy is None and "candidates" in line:  # sgpo.py's extraction found none
            continue
        key = ("id", str(line.get("id"))) if problem is None else ("problem", str(problem).strip())
        if not isinstance(strategy, str) or not strategy.strip() or key == ("id", "None"):
            refuse(f'{place}: a row must have a "strategy", and a "problem" or "id"')
        if problem is None and len(named[key]) > 1:
            refuse(f"{place}: several benchmarks have the {' '.join(key)}; give the problem's text instead")
        for row in named[key]:
            row["strategy"] = strategy
    if source and not any(row["strategy"] for row in rows):
        refuse(f"--strategies {source}: no problem of the benchmarks has one there")


# ---------------------------------------------------------------- sampling

def sample_batch(model, tokenizer, title: str, start: int, rows: list[dict], args: Args) -> list[dict]:
    """A graded completion for each of these rows, of which the first is number `start` of its part.

    The seed is the batch's own, whatever other benchmarks there are and wherever an evaluation was resumed.
    """
    seed_everything(args.seed, title, start)
    prompts = [row["prompt"] for row in rows]
    _, mask, truncated, texts = complete(model, tokenizer, prompts, args.max_new_tokens, args.temperature,
                                         args.top_p, args.generation_batch_size)
    grades = grade_batch(texts, [row["answer"] for row in rows])
    found = zip(rows, texts, grades, mask.sum(1).tolist(), truncated.tolist(), strict=True)
    return [{"benchmark": title, "id": row["id"], "sample": row["sample"], "correct": grade >= 0.5,
             "answer": extract_answer(text), "tokens": n, "truncated": cut,
             "batch": [start, start + len(rows)], "completion": text} for row, text, grade, n, cut in found]


def sample_rest(model, tokenizer, parts: Parts, path: Path, args: Args) -> Parts:
    """Sample what is not in the file yet, batch by batch -> the completions of each part."""
    done = finished_batches(path)
    total, n_done = sum(map(len, parts.values())), sum(map(len, done.values()))
    print(f"{total} completions -> {path}" + f"; {n_done} of them are there already" * bool(n_done))
    with long_work(total, "evaluation", "completion", n_done) as bar:
        for title, rows in parts.items():
            while len(done[title]) < len(rows) and not stop_asked():
                start = len(done[title])
                some = rows[start:start + args.generation_batch_size]
                batch = sample_batch(model, tokenizer, title, start, some, args)
                if stop_asked():  # it is not whole
                    break
                write_jsonl(path, batch)
                done[title] += batch
                bar.set_description(f"{title}, accuracy {mean(done[title], 'correct'):.3f}")
                bar.update(len(batch))
    n_done = sum(map(len, done.values()))
    if n_done < total:
        print(f"stopped after {n_done} of {total} completions; the same command with --out {args.out} "
              "goes on")
        raise SystemExit(130)
    return done


def finished_batches(path: Path) -> Parts:
    """The completions of each part in the file. A batch that a kill has cut is taken out of it."""
    batches, done = defaultdict(list), defaultdict(list)
    for _, row in read_jsonl(path, cut_by_kill=True) if path.exists() else ():
        batches[(row["benchmark"], *row["batch"])].append(row)
    for (title, start, end), rows in batches.items():
        done[title] += rows if len(rows) == end - start else []
    rewrite_jsonl(path, sum(done.values(), []))
    return done


# ---------------------------------------------------------------- statistics

def mean(rows: Iterable[dict], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(answer: str | None) -> str | None:
    """What equal votes share: the text without spaces and the commonest other spellings; 0.5 is not 1/2."""
    if answer is None:
        return None
    return re.sub(r"\\left|\\right|\\[!,]|[$\s]", "", re.sub(r"\\[dt]frac", r"\\frac", answer)).rstrip(".")


def majority(votes: Sequence[str | None]) -> int | None:
    """Index of the first sample with the commonest vote; of several, the first seen. None does not vote."""
    counts = Counter(v for v in votes if v is not None)
    return votes.index(max(counts, key=counts.get)) if counts else None


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of one value per problem, over problems drawn with replacement."""
    draws = generator(seed, "bootstrap").integers(len(values), size=(10_000, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=float)[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


# ---------------------------------------------------------------- report

def summarize(done: list[dict], alone: dict | None, seed: int) -> dict:
    """The numbers of one part, in all and per problem. `alone`: those without the strategy, if it has one."""
    samples, problems = defaultdict(list), {}
    for row in done:
        samples[row["id"]].append(row)
    k, right = len(done) // len(samples), [sum(row["correct"] for row in rows) for rows in samples.values()]
    for (name, rows), c in zip(samples.items(), right):
        winner = majority([vote(row["answer"]) for row in rows])
        problems[name] = {"avg@k": c / k, "pass@k": float(c > 0), "mean_length": mean(rows, "tokens"),
                          "maj@k": float(winner is not None and rows[winner]["correct"])}
        if alone:
            problems[name]["strategy adds"] = c / k - alone["per_problem"][name]["avg@k"]
    numbers = {"problems": len(problems), "k": k, "truncated": mean(done, "truncated"),
               "no_box": float(np.mean([row["answer"] is None for row in done]))}
    for measure in next(iter(problems.values())):
        numbers[measure] = mean(problems.values(), measure)
        numbers[f"{measure}_interval"] = bootstrap_interval([p[measure] for p in problems.values()], seed)
    powers = [2 ** i for i in range(k.bit_length())]
    numbers["pass@k"] = {str(n): float(np.mean([pass_at_k(k, c, n) for c in right])) for n in powers}
    return {**numbers, "per_problem": problems}


def show(results: dict) -> None:
    table = [["", "problems", "avg@k", "95% interval", "maj@k", "pass@k", "tokens", "truncated", "no box"]]
    for title, r in results.items():
        low, high = r["avg@k_interval"]
        passed = "  ".join(f"{v:.3f} @{k}" for k, v in r["pass@k"].items() if k != "1")
        table.append([title, str(r["problems"]), f"{r['avg@k']:.3f} @{r['k']}", f"[{low:.3f}, {high:.3f}]",
                      f"{r['maj@k']:.3f}", passed, f"{r['mean_length']:.0f}", f"{r['truncated']:.3f}",
                      f"{r['no_box']:.3f}"])
    say_table(table)
    for title, r in results.items():
        if "strategy adds" in r:
            low, high = r["strategy adds_interval"]
            print(f"{title}: the strategy adds {r['strategy adds']:+.3f} [{low:+.3f}, {high:+.3f}]")


def compare(folders: list[str]) -> None:
    """Two results side by side: B - A over the same problems with its 95% interval."""
    if len(folders) != 2:
        refuse(f"--compare takes two results directories, not {len(folders)}")
    try:
        both = [json.loads((Path(folder) / "results.json").read_text()) for folder in folders]
        (a, flags_a, of_a), (b, flags_b, of_b) = [(x["results"], x["flags"], x["inputs"]) for x in both]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"--compare: both must hold the results.json of a finished evaluation ({error!r})")
    if not {*a} & {*b}:
        refuse(f"--compare: no benchmark is in both, {', '.join(a)} in A, {', '.join(b)} in B")
    table = [["", "", "A", "B", "B - A", "95% interval"]]
    for title in [title for title in a if title in b]:
        if of_a[title] != of_b[title]:
            refuse(f"--compare: A and B have other problems, answers, strategies or --k in {title}")
        problems = a[title]["per_problem"]
        for measure in next(iter(problems.values())):
            x, y = (np.array([r[title]["per_problem"][name][measure] for name in problems]) for r in (a, b))
            low, high = bootstrap_interval(y - x)  # how hard the problems are cancels out
            table.append([title, measure.replace("@k", f"@{a[title]['k']}"), f"{x.mean():.3f}",
                          f"{y.mean():.3f}", f"{np.mean(y - x):+.3f}", f"[{low:+.3f}, {high:+.3f}]"])
    print(f"A: {folders[0]}\nB: {folders[1]}")
    for name in sorted({*flags_a} - {"out"}):
        if flags_a[name] != flags_b.get(name):
            print(f"{name}: {flags_a[name]!r} in A, {flags_b.get(name)!r} in B")
    say_table(table)


# ---------------------------------------------------------------- main

def fingerprints(args: Args, parts: Parts) -> dict[str, str]:
    """A local model by its files and problems by their content: both change under the same name."""
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(Path(args.model).glob("*"))]
    found = {"model": files}
    for title, rows in parts.items():
        found[title] = sorted([row["id"], row["problem"], row["answer"], row["strategy"]] for row in rows)
    return {name: hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16] for name, x in found.items()}


def evaluate(args: Args) -> None:
    if world() > 1:
        refuse("eval_math.py is one process: start it without torchrun, a benchmark on each GPU")
    if args.temperature == 0 and args.k != 1:
        refuse("--temperature 0 is greedy, all samples of a problem are the same: add --k 1")
    tokenizer = load_tokenizer(args.model)
    parts = load_parts(args, tokenizer)
    if args.out is None:
        now = time.strftime("%Y%m%d-%H%M%S")
        args.out = f"runs/eval_math-{Path(args.model).name}-{now}-{os.getpid()}"
    out, path = Path(args.out), Path(args.out) / "generations.jsonl"
    config = {"script": "eval_math", "flags": asdict(args), "inputs": fingerprints(args, parts),
              "command": sys.argv, **versions()}
    # another batch_size draws other random numbers, as good as those: memory may have run out
    check_directory(out, config, {"out", "compare", "generation_batch_size"}, resume=None)
    if path.exists() and json.loads((out / "config.json").read_text()).get("inputs") != config["inputs"]:
        refuse(f"--out {out} has results of other problems, strategies or weights; choose another directory")
    if (out / "results.json").exists():
        print(f"{out} is complete")
        return show(json.loads((out / "results.json").read_text())["results"])
    model = load_model(args.model)

    # ---- from here on something is written
    out.mkdir(parents=True, exist_ok=True)
    with lock(out / "lock", f"--out {out}: another evaluation is writing there"):
        write_atomic(out / "config.json", json.dumps(config, indent=2) + "\n")
        done, results = sample_rest(model, tokenizer, parts, path, args), {}
    outcomes = grader_counts()
    if lost := outcomes["timeouts"] + outcomes["crashes"]:
        print(f"warning: the grader gave up on {lost} answers, which count as wrong")
    for title in parts:
        alone = results.get(title.removesuffix(" guided")) if title.endswith(" guided") else None
        results[title] = summarize(done[title], alone, args.seed)
    write_atomic(out / "results.json", json.dumps({**config, "results": results}, indent=2) + "\n")
    show(results)
    print(f"results and generations: {out}")


@program
def main() -> None:
    args = parse_args(Args, recipe)
    if args.compare:
        compare(args.compare)
    else:
        evaluate(args)


if __name__ == "__main__":
    main()
