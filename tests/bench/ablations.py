"""Run the papers' ablations on the demo or a real model: one JSON line per run, a Markdown table at the end.

    python tests/bench/ablations.py                                            # all rows, seeds 0 1 2
    python tests/bench/ablations.py --seeds 3 4                                # two more seeds
    python tests/bench/ablations.py --only sgpo "sgpo --delta inf"             # these rows
    python tests/bench/ablations.py --only grpo_baseline luffy hpt gspo cispo  # the forks, too
    python tests/bench/ablations.py --real DIR --file real.jsonl               # on DIR of tests/bench/real.py

A run whose line is in --file is not repeated, so the same command continues after a stop.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FORKS = sorted(path.stem for path in (ROOT / "tests" / "forks").glob("*.diff"))
SGPO_ROWS = [
    "grpo_baseline",
    *FORKS,
    "sgpo",
    "sgpo --distill none",
    "sgpo --no_autonomous_grpo",
    "sgpo --target all --delta inf",
    "sgpo --delta inf",
    "sgpo --target all",
    "sgpo --weight fixed",
    "sgpo --weight group_advantage",
    "sgpo --distill reverse_kl",
    "sgpo --distill sft",
]
TGPO_ROWS = [
    "tgpo",
    "tgpo --guidance tgpo-sampled",
    "tgpo --guidance tgpo-topk",
    "tgpo --guidance tgpo-adv",
    "tgpo --guidance tgpo-adv-matched",
    "tgpo --guidance rkl",
    "tgpo --guidance kdrl",
    "tgpo --guidance reverse-kl",
    "tgpo --guidance none",
    "tgpo --teacher demo-same-style",
    "tgpo --teacher demo-same-style --guidance rkl",
]
# On the real model 24 steps have to do what the papers do in 400 and 300, so TGPO's weight and learning rate
# are larger.
REAL_SGPO_ROWS = [
    "grpo_baseline",
    "luffy",
    "hpt",
    "sgpo",
    "sgpo --no_autonomous_grpo",
    "sgpo --delta 1",
    "sgpo --target all",
    "sgpo --weight fixed",
    "sgpo --distill sft",
    "sgpo --lora_rank 32 --lr 5e-4",
]
REAL_TGPO_ROWS = [
    "tgpo --coefficient 0.5 --coefficient_fall 0.02 --lr 2e-4",
    "tgpo --guidance rkl --lr 2e-4",
    "tgpo --guidance none --lr 2e-4",
    "tgpo --guidance kdrl --lr 2e-4",
    "tgpo --guidance reverse-kl --lr 2e-4",
    "tgpo --guidance rkl",
]
REAL_FLAGS = [
    "--warmup_frac", "0", "--system_prompt", "Prices.", "--max_new_tokens", "32", "--steps", "24",
    "--prompts_per_step", "12", "--lr", "5e-5", "--lr_warmup_steps", "2", "--lr_schedule", "linear",
    "--max_grad_norm", "0.1", "--bf16", "--microbatch_tokens", "4096", "--save_every", "0",
    "--eval_every", "0", "--eval_samples", "4", "--eval_temperature", "1",
]
REAL_FLAGS_OF = {  # 72 samples a step in every row
    "sgpo": ["--group_size", "4", "--guided_group_size", "2", "--delta", "6"],
    "luffy": ["--group_size", "5"],  # and the given solution
}


def real_flags(script: str, folder: Path) -> list[str]:
    """Return the flags with which a script trains the model of tests/bench/real.py in this folder."""
    flags = ["--model", folder / "warm" / "model", "--dataset", folder / "train.jsonl",
             "--eval_dataset", folder / "held_out.jsonl", *REAL_FLAGS]
    if script == "tgpo":
        flags += ["--teacher", folder / "teacher" / "model"]
    return flags + REAL_FLAGS_OF.get(script, ["--group_size", "6"])


def train(row: str, seed: int, file: Path, real: Path | None, keep: Path | None) -> None:
    """Make one run on one thread and append its line: row, seed, seconds and all of its metrics."""
    script, *flags = row.split()
    if real:
        flags = real_flags(script, real) + flags
    with tempfile.TemporaryDirectory() as folder:
        path = ROOT / f"{script}.py"
        if script in FORKS:
            path = Path(folder, f"{script}.py")
            diff = ROOT / "tests" / "forks" / f"{script}.diff"
            subprocess.run(["patch", "-s", "-o", path, ROOT / "grpo_baseline.py", diff], check=True)
        out = Path(keep or folder, f"{row.replace(' ', '_')}.{seed}")
        shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
        command = [sys.executable, path, *flags, "--seed", str(seed), "--out", out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = round(time.time() - start)
        if done.returncode:
            raise RuntimeError(f"{row}, seed {seed}: {done.stderr}")
        lines = Path(out, "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    with file.open("a") as out:
        out.write(json.dumps({"run": row, "seed": seed, "seconds": seconds, "metrics": metrics}) + "\n")
    print(f"{row}, seed {seed}: {metrics[-1]['eval/accuracy']:.3f} in {seconds} s", flush=True)


def finished_runs(file: Path) -> dict[tuple[str, int], list[dict]]:
    """Return (row, seed) -> metrics of all runs in a file."""
    lines = file.read_text().splitlines() if file.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(run["run"], run["seed"]): run["metrics"] for run in runs}


def table(rows: list[str], runs: dict[tuple[str, int], list[dict]]) -> str:
    """Return a Markdown table of these rows: means over seeds, +- their standard deviation.

    Speed is the step at which the mean reward of five steps reaches half of the best row's final accuracy.
    """
    by_row = {}
    for row, seed in sorted(runs):
        by_row.setdefault(row, []).append(runs[row, seed])
    by_row = {row: by_row[row] for row in rows if row in by_row}
    final = {row: [run[-1]["eval/accuracy"] for run in metrics] for row, metrics in by_row.items()}
    half = max((np.mean(accuracies) for accuracies in final.values()), default=0) / 2
    lines = ["| run | before | after | each seed | steps to half of the best | mean reward |",
             "|---|---|---|---|---|---|"]
    for row, metrics in by_row.items():
        before = np.mean([run[0]["eval/accuracy"] for run in metrics])
        rewards = np.array([[step["reward"] for step in run if "reward" in step] for run in metrics])
        smooth = np.convolve(rewards.mean(0), np.ones(5) / 5, "valid")  # its first value belongs to step 5
        reached = np.flatnonzero(smooth >= half)
        cells = [
            f"`{row}`",
            f"{before:.3f}",
            f"{np.mean(final[row]):.3f} +- {np.std(final[row]):.3f}",
            " ".join(f"{accuracy:.3f}" for accuracy in final[row]),
            str(reached[0] + 5) if len(reached) else "never",
            f"{rewards.mean():.3f} +- {rewards.mean(1).std():.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="rows, as in the table (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--file", type=Path, default=Path("ablations.jsonl"))
    parser.add_argument("--real", type=Path, help="train the model of tests/bench/real.py in this folder")
    parser.add_argument("--keep", type=Path, help="keep the run directories in this folder")
    args = parser.parse_args()
    tables = [REAL_SGPO_ROWS, REAL_TGPO_ROWS] if args.real else [SGPO_ROWS, TGPO_ROWS]
    rows = args.only or [row for table_rows in tables for row in table_rows]
    done = finished_runs(args.file)
    jobs = [(row, seed) for seed in args.seeds for row in rows if (row, seed) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job, args.file, args.real, args.keep), jobs))
    for table_rows in tables:
        print("\n" + table(table_rows, finished_runs(args.file)))
