"""Accuracy of a checkpoint on math benchmarks by the papers' protocol: several samples a problem, averaged (avg@k).

Prompts, sampling and grading are the training scripts' own functions. Every completion is kept in generations.jsonl; an
evaluation that was stopped or killed goes on where it was when the same command is given again, with the same numbers.

    python eval_math.py                                                    # the built-in demo model, before training
    python eval_math.py --model runs/a/model --benchmarks math500,amc23,my.jsonl --out evals/a
    python eval_math.py --model runs/a/model --benchmarks my.jsonl --strategies my.jsonl --out evals/a-guided
    python eval_math.py --compare evals/a evals/b

Papers: SGPO (arXiv 2606.24064) for the protocol; unbiased pass@k: arXiv 2107.03374; majority vote (maj@k): 2203.11171.
"""
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import sys
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import StoppingCriteria
from transformers.hf_argparser import HfArg

import common
from common import (BENCHMARKS, SYSTEM_PROMPT, build_prompt, check_context, check_flags, completion_mask, demo_recipe, demo_rows,
                    extract_answer, generate, gold_is_gradable, grade_batch, grader_counts, load_model, load_rows, load_tokenizer, parse_args,
                    pick_device, printable, refuse, say_table, seed_everything, stop_ids, usable_rows, versions, write_atomic)


# ---------------------------------------------------------------- flags

@dataclass
class Args:
    model: str = HfArg(default="demo", help="hub id or local directory; demo: the built-in tiny model")
    benchmarks: str = HfArg(default=None, help="known names and .jsonl or .parquet files, by commas (default: demo with the demo, else SGPO's four)")
    k: int = HfArg(default=None, help="samples a problem (default: the papers' for known names, 4 for files)")
    out: str = HfArg(default=None, help="results directory (default: a new one under runs/); with results of the same command in it: go on")
    strategies: str = HfArg(default=None, help="JSONL of problem (or id) and strategy, own for the rows' own: evaluate under guidance too")
    compare: list[str] = HfArg(default=None, help="two results directories, shown side by side with the paired difference; no model is loaded")
    temperature: float = HfArg(default=0.6, help="sampling temperature (the papers'); 0: greedy, with --k 1")
    top_p: float = HfArg(default=0.95, help="nucleus sampling (SGPO's; TGPO evaluates at 1)")
    # The papers' 32K is for long reasoning: a batch is sampled until its longest row ends, so one endless row would hold all the
    # others back eight times longer. Look at the truncated share before trusting a lower limit; --max_new_tokens 32768 is the papers'.
    max_new_tokens: int = HfArg(default=4096, help="longest completion, in tokens; raise it where the truncated share is not near 0")
    batch_size: int = HfArg(default=64, help="completions sampled at once; fewer by itself when memory runs out")
    seed: int = HfArg(default=0, help="seed of sampling and bootstrap")
    system_prompt: str = HfArg(default=SYSTEM_PROMPT, help="system message; empty for none")


def recipe(args: Args) -> dict:
    """Defaults that depend on other flags: which benchmarks, and the demo's settings for its model or its problems."""
    benchmarks = args.benchmarks or ("demo" if args.model == "demo" else "math500,olympiadbench,amc23,aime24")
    own = {"benchmarks": benchmarks}
    if "demo" in (args.model, benchmarks):
        own |= demo_recipe(dataclasses.replace(args, model="demo"))
    return {**own, "strategies": "own"} if benchmarks == "demo" else own


def check_args(args: Args) -> None:
    check_flags(args, dict(temperature=0, max_new_tokens=1, batch_size=1, seed=0, **({} if args.k is None else {"k": 1})))
    if not 0 < args.top_p <= 1 or not math.isfinite(args.temperature):
        refuse(f"--top_p must be in (0, 1] and --temperature finite, not {args.top_p} and {args.temperature}")
    if args.temperature == 0 and args.k != 1:
        refuse("--temperature 0 is greedy, all samples of a problem are the same: add --k 1")


# ---------------------------------------------------------------- benchmarks

PAPERS_K = {"math500": 4, "amc23": 32, "aime24": 32, "aime25": 32, "minerva": 4, "olympiadbench": 4}  # samples a problem; else 4


@dataclass
class Part:
    """One benchmark, alone or under guidance: what is sampled, in which order."""
    name: str
    guided: bool
    k: int
    rows: list[dict]
    prompts: list[list[int]]  # of every row

    def tasks(self) -> list[tuple[int, int]]:
        """(row, sample) of every completion. Longest prompts first: little padding, and memory runs out early or not at all."""
        order = sorted(range(len(self.rows)), key=lambda i: (-len(self.prompts[i]), i))
        return [(i, sample) for i in order for sample in range(self.k)]

    def digest(self) -> str:
        """Changes with any problem, answer or strategy."""
        content = [[row["id"], row["problem"], row["answer"], row["strategy"] if self.guided else None] for row in self.rows]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_parts(args: Args, tokenizer) -> list[Part]:
    """The rows of every benchmark asked for, with the strategies that --strategies has for them."""
    benchmarks, ks = {}, {}
    for source in dict.fromkeys(filter(None, args.benchmarks.split(","))):
        if source not in (*BENCHMARKS, "demo") and not source.endswith((".jsonl", ".json", ".parquet")) and not os.path.isfile(source):
            refuse(f"--benchmarks {source}: not known; known are {', '.join(BENCHMARKS)}, demo and paths of .jsonl or .parquet files")
        name = Path(source).name
        if name in benchmarks:
            refuse(f"--benchmarks {source}: there is a {name} already; give the file another name")
        rows = demo_rows()[1] if source == "demo" else load_rows(source)
        if len({row["id"] for row in rows}) < len(rows):
            print(f"{printable(name)}: ids repeat, so its rows are numbered instead")
            rows = [{**row, "id": str(i)} for i, row in enumerate(rows)]
        if not any(gold_is_gradable(row["answer"]) for row in rows):
            refuse(f"{name}: the grader can parse none of its {len(rows)} answers")
        benchmarks[name], ks[name] = rows, args.k or PAPERS_K.get(source, 4)
    if not benchmarks:
        refuse("--benchmarks is empty")
    assign_strategies(args.strategies, benchmarks)

    def encode(row: dict) -> list[list[int]]:
        """The row's prompt, and the one under guidance if it has a strategy."""
        return [build_prompt(tokenizer, row["problem"], args.system_prompt, s) for s in ([None, row["strategy"]] if "strategy" in row else [None])]

    parts, longest = [], 0
    for name, rows in benchmarks.items():
        guided = sum("strategy" in row for row in rows)
        print(f"{printable(name)}: {len(rows)} problems x {ks[name]} samples" + f", {guided} problems also with a strategy" * (guided > 0))
        rows, tokens = usable_rows(rows, encode, sys.maxsize, check_gold=True)  # no prompt is too long but for check_context
        longest = max(longest, tokens)
        parts.append(Part(name, False, ks[name], rows, [encode(row)[0] for row in rows]))
        if rows := [row for row in rows if "strategy" in row]:
            parts.append(Part(name, True, ks[name], rows, [encode(row)[1] for row in rows]))
    check_context(args.model, longest, args.max_new_tokens)
    return parts


def assign_strategies(source: str | None, benchmarks: dict[str, list[dict]]) -> None:
    """Leave in row["strategy"] what the row is to be guided by. A file's rows name theirs by the problem's text, else by its id."""
    rows = [(name, row) for name, some in benchmarks.items() for row in some]
    by_problem, by_id = defaultdict(list), defaultdict(dict)
    for name, row in rows:
        if source != "own":
            row.pop("strategy", None)
        by_problem[row["problem"].strip()].append(row)
        by_id[row["id"]][name] = row
    for place, raw in common._raw_rows(source) if source and source != "own" else ():
        problem, strategy = (raw.get("problem", raw.get("question")), raw.get("strategy")) if isinstance(raw, dict) else (None, None)
        if isinstance(raw, dict) and "candidates" in raw and strategy is None:  # sgpo.py's extraction found none
            continue
        if not isinstance(strategy, str) or not strategy.strip():
            refuse(f'{place}: row has no "strategy": give it as a non-empty string')
        if isinstance(problem, str):
            found = by_problem.get(problem.strip(), [])
        elif raw.get("id") is not None:
            homes = by_id.get(str(raw["id"]), {})
            if len(homes) > 1:
                refuse(f"{place}: id {raw['id']} is in {' and '.join(homes)}; name the problem by its text instead")
            found = homes.values()
        else:
            refuse(f'{place}: row has neither "problem" nor "id"')
        for row in found:
            row["strategy"] = strategy
    if source and not any("strategy" in row for _, row in rows):
        why = "no row of the benchmarks has one" if source == "own" else "no row of it names a problem of the benchmarks"
        refuse(f"--strategies {source}: {why}")


# ---------------------------------------------------------------- results directory

def label(name: str, guided: bool) -> str:
    return name + " guided" * guided


def configuration(args: Args, parts: list[Part]) -> dict:
    """What decides the numbers. The problems count by content and a local model by its files: both are often written anew under the same name."""
    weights = [] if args.model == "demo" else [f for f in sorted(Path(args.model).glob("*")) if f.suffix in (".safetensors", ".bin")]
    stamps = repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights])
    return {**{k: v for k, v in dataclasses.asdict(args).items() if k not in ("out", "compare")},
            "model files": hashlib.sha256(stamps.encode()).hexdigest()[:16] if weights else None,
            **{f"problems of {label(part.name, part.guided)}": part.digest() for part in parts}}


def check_out(out: Path, config: dict) -> None:
    """Refuse a directory that is not ours to write in; write nothing."""
    try:
        if (out / "config.json").exists():
            try:
                old = json.loads((out / "config.json").read_text())
                old, new = {"script": old["script"], **old["flags"]}, {"script": "eval_math", **config}
            except (ValueError, KeyError, TypeError):
                refuse(f"--out {out}: its config.json is not one of an evaluation; choose another directory")
            differ = [f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            if differ:
                refuse(f"--out {out} holds results of another configuration ({'; '.join(differ)}); choose another directory")
        elif out.exists() and any(out.iterdir()):  # raises NotADirectoryError on a file
            refuse(f"--out {out} is not empty and holds no evaluation; choose another directory")
        nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK | os.X_OK) or not nearest.is_dir():
            refuse(f"--out {out}: no permission to write in {nearest}")
    except OSError as error:
        refuse(f"--out {out}: cannot be used ({error.strerror or error})")


def finished_batches(path: Path) -> dict[str, list[dict]]:
    """Generations by part, without their texts. The last batch, or line, that a kill left unfinished is cut off the file: it is sampled again."""
    done, batch, end, position = defaultdict(list), [], 0, 0
    with open(path, "rb") as lines:
        for line in lines:
            position += len(line)
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                row = None
            if row is None:
                break
            batch.append({k: v for k, v in row.items() if k != "completion"})
            if len(batch) == row["batch"][1] - row["batch"][0]:
                done[label(row["benchmark"], row["guided"])] += batch
                batch, end = [], position
    os.truncate(path, end)
    return done


# ---------------------------------------------------------------- sampling

class Progress(StoppingCriteria):
    """The bar: completions, tokens/s, accuracy so far and time left. As a stopping criterion it moves while a batch is sampled, too."""

    def __init__(self, total: int, initial: int):
        self.bar = tqdm(total=total, initial=initial, desc="eval", unit="completion", smoothing=0, disable=None)
        self.began, self.tokens = time.perf_counter(), 0

    def start_batch(self, part: Part, generations: list[dict]) -> None:
        self.sampled = 0
        accuracy = f", accuracy {np.mean([g['correct'] for g in generations]):.3f}" if generations else ""
        self.state = label(part.name, part.guided) + accuracy

    def show(self, tokens: int) -> None:
        self.bar.set_postfix_str(f"{self.state}, {tokens / (time.perf_counter() - self.began):.0f} tokens/s")

    def __call__(self, input_ids, scores, **kwargs):
        self.sampled += len(input_ids)
        if input_ids.shape[1] % 16 == 0:
            self.show(self.tokens + self.sampled)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def sample_part(model, tokenizer, eos: list[int], part: Part, generations: list[dict], file, progress: Progress, args: Args) -> None:
    """Sample and grade what `generations` lacks, batch by batch; each batch is appended to it and to the file.

    A batch draws from a seed of its own, (seed, part, first task), so that it comes out the same wherever a run was resumed, and whatever
    other benchmarks there are, and also where memory does not hold it whole.
    """
    tasks = part.tasks()
    while len(generations) < len(tasks):
        start = len(generations)
        batch = tasks[start:start + args.batch_size]
        progress.start_batch(part, generations)
        seed_everything(args.seed, zlib.crc32(label(part.name, part.guided).encode()), start)
        completions = generate(model, [part.prompts[i] for i, _ in batch], eos, tokenizer.pad_token_id, args.max_new_tokens,
                               args.temperature, args.top_p, progress)
        mask, truncated = completion_mask(completions, eos)
        texts = tokenizer.batch_decode([ids[m] for ids, m in zip(completions, mask)], skip_special_tokens=True)
        grades = grade_batch(texts, [part.rows[i]["answer"] for i, _ in batch])
        lengths = mask.sum(1).tolist()
        new = [{"benchmark": part.name, "guided": part.guided, "id": part.rows[i]["id"], "sample": sample, "correct": grade >= 0.5,
                "answer": extract_answer(text), "tokens": length, "truncated": cut, "batch": [start, start + len(batch)], "completion": text}
               for (i, sample), text, grade, length, cut in zip(batch, texts, grades, lengths, truncated.tolist(), strict=True)]
        file.write("".join(json.dumps(row) + "\n" for row in new))
        file.flush()
        for row in new:
            del row["completion"]
        generations += new
        progress.tokens += sum(lengths)
        progress.bar.update(len(new))
        progress.show(progress.tokens)


# ---------------------------------------------------------------- statistics

def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, from c right ones among n >= k: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(answer: str | None) -> str | None:
    """What two answers must share to be one in a vote: the string without spaces and the commonest notations of the same thing.

    Cheaper and stricter than the grader, and blind to the gold: 0.5 and 1/2 are two candidates.
    """
    if answer is None:
        return None
    for old, new in (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("$", "")):
        answer = answer.replace(old, new)
    return "".join(answer.split()).rstrip(".")


def majority(votes: Sequence[str | None]) -> int | None:
    """Index of the first sample that gave the commonest vote; ties go to the vote that appeared first. None does not vote; no votes: None."""
    counts = Counter(v for v in votes if v is not None)
    return votes.index(max(counts, key=counts.get)) if counts else None


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95% percentile interval of the mean of one value a problem, over problems drawn anew with replacement."""
    values = np.asarray(values, dtype=float)
    means = values[np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of b - a over the same problems, and its 95% bootstrap interval: how hard the problems are cancels out."""
    difference = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    return float(difference.mean()), *bootstrap_interval(difference, seed)


# ---------------------------------------------------------------- report

def summarize(part: Part, generations: list[dict], seed: int) -> dict:
    """The numbers of one part, and per problem what --compare needs."""
    samples = defaultdict(list)
    for g in generations:
        samples[g["id"]].append(g)
    problems, right = {}, []
    for row in part.rows:
        mine = samples[row["id"]]
        winner = majority([vote(g["answer"]) for g in mine])
        right.append(sum(g["correct"] for g in mine))
        problems[row["id"]] = {"avg@k": right[-1] / part.k, "pass@k": float(right[-1] > 0),
                               "maj@k": float(winner is not None and mine[winner]["correct"]),
                               "mean_length": float(np.mean([g["tokens"] for g in mine]))}
    mean = {measure: float(np.mean([p[measure] for p in problems.values()])) for measure in ("avg@k", "maj@k", "mean_length")}
    return {"problems": len(problems), "k": part.k, **mean, "avg@k_interval": bootstrap_interval([p["avg@k"] for p in problems.values()], seed),
            "pass@k": {str(2 ** i): float(np.mean([pass_at_k(part.k, c, 2 ** i) for c in right])) for i in range(part.k.bit_length())},
            "truncated": float(np.mean([g["truncated"] for g in generations])), "no_box": float(np.mean([g["answer"] is None for g in generations])),
            "per_problem": problems}


def gains(result: dict) -> dict[str, float]:
    """What the strategy adds to the average, per problem that has one."""
    alone, guided = result["per_problem"], result["guided"]["per_problem"]
    return {key: guided[key]["avg@k"] - alone[key]["avg@k"] for key in guided}


def report(parts: list[Part], done: dict[str, list[dict]], seed: int) -> dict:
    """All numbers: {benchmark: {..., "guided": {...}, "strategy_gain": {...}}}."""
    results = {}
    for part in parts:
        numbers = summarize(part, done[label(part.name, part.guided)], seed)
        if not part.guided:
            results[part.name] = numbers
            continue
        results[part.name]["guided"] = numbers
        gain = list(gains(results[part.name]).values())
        results[part.name]["strategy_gain"] = {"difference": float(np.mean(gain)), "interval": bootstrap_interval(gain, seed), "problems": len(gain)}
    return results


def show(results: dict) -> None:
    table = [["benchmark", "problems", "avg@k", "95% interval", "maj@k", "pass@k", "tokens", "truncated", "no box"]]
    for name, result in results.items():
        for guided, r in ((False, result), (True, result.get("guided"))):
            if r:
                low, high = r["avg@k_interval"]
                table.append([label(name, guided), str(r["problems"]), f"{r['avg@k']:.3f} @{r['k']}", f"[{low:.3f}, {high:.3f}]", f"{r['maj@k']:.3f}",
                              "  ".join(f"{v:.3f} @{k}" for k, v in r["pass@k"].items() if k != "1") or "-", f"{r['mean_length']:.0f}",
                              f"{r['truncated']:.3f}", f"{r['no_box']:.3f}"])
    say_table([[printable(cell) for cell in row] for row in table])
    for name, result in results.items():
        if gain := result.get("strategy_gain"):
            low, high = gain["interval"]
            print(f"{printable(name)}: the strategy adds {gain['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
                  f"on the {gain['problems']} problems that have one")


def compare(directories: list[str]) -> None:
    """Two results side by side: B - A over the same problems with its 95% interval; where both have it, also under guidance."""
    if len(directories) != 2:
        refuse(f"--compare takes two results directories, not {len(directories)}")
    configs, results = [], []
    for directory in directories:
        try:
            found = json.loads((Path(directory) / "results.json").read_text())
            configs.append(found["flags"])
            results.append(found["results"])
        except OSError:
            refuse(f"--compare {directory}: no results.json in it; an unfinished evaluation goes on when its command is given again")
        except (ValueError, KeyError, TypeError):
            refuse(f"--compare {directory}: its results.json is not one of an evaluation")
    if results[0].keys() != results[1].keys():
        refuse(f"--compare: not the same benchmarks, {', '.join(results[0])} in {directories[0]}, {', '.join(results[1])} in {directories[1]}")
    table = [["benchmark", "", "A", "B", "B - A", "95% interval"]]

    def add(title: str, measure: str, a: Sequence[float], b: Sequence[float]) -> None:
        digits = 0 if measure == "tokens" else 3
        difference, low, high = paired_difference(a, b)
        table.append([title, measure, f"{np.mean(a):.{digits}f}", f"{np.mean(b):.{digits}f}", f"{difference:+.{digits}f}",
                      f"[{low:+.{digits}f}, {high:+.{digits}f}]"])

    for name in results[0]:
        ways = [False, True] if all("guided" in r[name] for r in results) else [False]
        for guided in ways:
            title = label(name, guided)
            pair = [r[name]["guided"] if guided else r[name] for r in results]
            k, other_k = (x["k"] for x in pair)
            if k != other_k:
                refuse(f"--compare: {title} has {k} samples a problem in {directories[0]}, {other_k} in {directories[1]}; use the same --k")
            if configs[0][f"problems of {title}"] != configs[1][f"problems of {title}"]:
                refuse(f"--compare: {title} has other problems, answers or strategies in {directories[0]} than in {directories[1]}")
            for measure, shown in (("avg@k", "avg@{k}"), ("pass@k", "pass@{k}"), ("maj@k", "maj@{k}"), ("mean_length", "tokens")):
                add(title, shown.format(k=k), *[[r["per_problem"][key][measure] for key in pair[0]["per_problem"]] for r in pair])
        if True in ways:
            per_problem = [gains(r[name]) for r in results]
            add(name, "strategy adds", *[[g[key] for key in per_problem[0]] for g in per_problem])
    for letter, directory in zip("AB", directories):
        print(f"{letter}: {printable(directory)}")
    for key in dataclasses.fields(Args):
        if configs[0].get(key.name) != configs[1].get(key.name):
            print(f"{key.name}: {printable(repr(configs[0].get(key.name)))} in A, {printable(repr(configs[1].get(key.name)))} in B")
    say_table([[printable(cell) for cell in row] for row in table])


# ---------------------------------------------------------------- main

def evaluate(args: Args) -> None:
    check_args(args)
    tokenizer = load_tokenizer(args.model)
    parts = load_parts(args, tokenizer)
    args.out = args.out or f"runs/eval_math-{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    out, config = Path(args.out), configuration(args, parts)
    check_out(out, config)
    if (out / "results.json").exists():
        print(f"{out} is complete")
        return show(json.loads((out / "results.json").read_text())["results"])
    # nothing is trained here: no fp32 masters on CUDA
    model = load_model(args.model, dtype=torch.bfloat16 if pick_device().type == "cuda" else torch.float32)
    eos = stop_ids(model, tokenizer)

    # ---- from here on something is written
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "generations.jsonl", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"--out {out}: another evaluation is writing there")
        about = {"script": "eval_math", "flags": config, **versions()}
        if not (out / "config.json").exists():
            write_atomic(out / "config.json", json.dumps({**about, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}, indent=2) + "\n")
        done = finished_batches(out / "generations.jsonl")
        total, there = sum(len(part.rows) * part.k for part in parts), sum(map(len, done.values()))
        print(f"{total} completions -> {out}" + f"; {there} of them are there already" * (there > 0))
        progress = Progress(total, there)
        try:
            for part in parts:
                sample_part(model, tokenizer, eos, part, done[label(part.name, part.guided)], file, progress, args)
        finally:
            progress.bar.close()
    counts = grader_counts()
    if counts["timeouts"] or counts["crashes"]:
        print(f"warning: the grader gave up on {counts['timeouts']} answers in time and on {counts['crashes']} in a crash; they count as wrong")
    results = report(parts, done, args.seed)
    write_atomic(out / "results.json", json.dumps({"results": results, **about}, indent=2) + "\n")
    show(results)
    print(f"results and generations: {out}")


def main() -> None:
    args = parse_args(Args, recipe)
    try:
        if args.compare:
            compare(args.compare)
        else:
            evaluate(args)
    except KeyboardInterrupt:
        print("stopped" + (f"; the same command with --out {args.out} goes on" if args.out and not args.compare else ""), file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    main()
