"""The demo's figures: scripts x seeds at the same sample budget, held-out accuracy before and after.

    python tests/bench/demo.py                                        # grpo_baseline and sgpo, seeds 0 1 2
    python tests/bench/demo.py --runs "sgpo --delta 5" "tgpo --guidance rkl"
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def one(run: str, seed: int, folder: str) -> list[dict]:
    """A run's metrics, one thread."""
    script, *flags = run.split()
    out = Path(folder) / f"{run.replace(' ', '_')}-{seed}"
    command = [sys.executable, str(ROOT / f"{script}.py"), "--seed", str(seed), "--out", str(out), *flags]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["grpo_baseline", "sgpo"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    args = parser.parse_args()
    build = "import common; common.demo_dir()" + "; common.demo_teacher_dir('demo')" * ("tgpo"
            in str(args.runs))
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        jobs = {run: [pool.submit(one, run, seed, folder) for seed in args.seeds] for run in args.runs}
        for run, waiting in jobs.items():
            metrics = [job.result() for job in waiting]
            before, after = ([m[i]["eval/accuracy"] for m in metrics] for i in (0, -1))
            seconds = [sum(sum(v for k, v in row.items() if k.startswith("time/"))
                           for row in m) for m in metrics]
            each = ", ".join(f"{x:.3f}" for x in after)
            print(f"{run}: {np.mean(before):.3f} -> {np.mean(after):.3f} ({each}), "
                  f"{np.mean(seconds):.0f} s a run", flush=True)
            for key in ("sgpo/p_auto", "sgpo/p_guided", "sgpo/alpha", "tgpo/reverse_kl_k1", "tgpo/mismatch"):
                rows = [[row[key] for row in m if key in row] for m in metrics]
                if all(rows):
                    tenths = np.mean([[np.mean(part) for part in np.array_split(row, 10)]
                                     for row in rows], axis=0)
                    print(f"  {key}, in tenths of the run: {' '.join(f'{x:.2f}' for x in tenths)}",
                          flush=True)
