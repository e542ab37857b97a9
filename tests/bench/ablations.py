"""The papers' ablations on the demo, over seeds: one JSON line a finished run, a Markdown table at the end.

    python tests/bench/ablations.py                                       # all rows, seeds 0 1 2
    python tests/bench/ablations.py --seeds 3 4                           # two seeds more
    python tests/bench/ablations.py --only sgpo "sgpo --delta inf"        # these rows
    python tests/bench/ablations.py --only grpo_baseline luffy hpt gspo   # with the forks of tests/forks

Runs whose line is in --file are not done again, so the same command goes on after a stop.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FORKS = sorted(path.stem for path in (ROOT / "tests" / "forks").glob("*.diff"))
SGPO = ["grpo_baseline", *FORKS, "sgpo", *(f"sgpo {flags}" for flags in (
    "--distill none", "--no_autonomous_grpo", "--target all --delta inf", "--delta inf", "--target all",
    "--weight fixed", "--weight group_advantage", "--distill reverse_kl", "--distill sft"))]
TGPO = ["tgpo", *(f"tgpo --guidance {name}" for name in (
    "tgpo-sampled", "tgpo-topk", "tgpo-adv", "tgpo-adv-matched", "rkl", "kdrl", "reverse-kl", "none")),
    "tgpo --teacher demo-same-style", "tgpo --teacher demo-same-style --guidance rkl"]


def train(run: str, seed: int, file: Path) -> None:
    """One run on one thread; its line: run, seed, seconds of the wall and all of its metrics."""
    script, *flags = run.split()
    with tempfile.TemporaryDirectory() as folder:
        path, flags = ROOT / f"{script}.py", [*flags, "--seed", str(seed), "--out", f"{folder}/run"]
        if script in FORKS:
            path, diff = Path(folder, f"{script}.py"), ROOT / "tests" / "forks" / f"{script}.diff"
            subprocess.run(["patch", "-s", "-o", path, ROOT / "grpo_baseline.py", diff], check=True)
        begun, settings = time.time(), {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, path, *flags], check=True, capture_output=True,
                       env={**os.environ, **settings})
        seconds = time.time() - begun
        metrics = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    line = {"run": run, "seed": seed, "seconds": round(seconds), "metrics": metrics}
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")
    print(f"{run}, seed {seed}: {metrics[-1]['eval/accuracy']:.3f} in {seconds:.0f} s", flush=True)


def finished(file: Path) -> dict[tuple[str, int], dict]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(line["run"], line["seed"]): line for line in lines}


def table(rows: list[str], runs: dict[tuple[str, int], dict]) -> str:
    """Means over seeds, +- their standard deviation; the best of these rows sets the mark for all of them."""
    found = {row: [runs[key]["metrics"] for key in sorted(runs) if key[0] == row] for row in rows}
    found = {row: metrics for row, metrics in found.items() if metrics}
    after = {row: [m[-1]["eval/accuracy"] for m in metrics] for row, metrics in found.items()}
    half = max(map(np.mean, after.values()), default=0) / 2
    lines = ["| run | before | after | each seed | steps to half of the best | mean reward |",
             "|" + "---|" * 6]
    for row, metrics in found.items():
        before = np.mean([m[0]["eval/accuracy"] for m in metrics])
        curves = [[step["reward"] for step in m if "reward" in step] for m in metrics]
        smooth = np.convolve(np.mean(curves, 0), np.ones(5) / 5, "valid")  # its first value ends at step 5
        reached = np.flatnonzero(smooth >= half)
        each, area = " ".join(f"{x:.3f}" for x in after[row]), np.mean(curves, 1)
        lines.append(f"| `{row}` | {before:.3f} | {np.mean(after[row]):.3f} +- {np.std(after[row]):.3f} "
                     f"| {each} | {reached[0] + 5 if len(reached) else 'never'} "
                     f"| {area.mean():.3f} +- {area.std():.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=SGPO + TGPO, help="rows, as the table names them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--file", type=Path, default=Path("ablations.jsonl"))
    args = parser.parse_args()
    build = "import common; common.demo_dir(); [*map(common.demo_teacher_dir, common.DEMO_TEACHERS)]"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)  # once, not in each run's seconds
    done = finished(args.file)
    jobs = [(run, seed) for seed in args.seeds for run in args.only if (run, seed) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: train(*job, args.file), jobs))
    for rows in (SGPO, TGPO):
        print("\n" + table(rows, finished(args.file)))
