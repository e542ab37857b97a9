"""The demo's figures: scripts x seeds at the same sample budget, held-out accuracy before and after, how alpha follows p_auto, and for tgpo.py the divergence.

    python tests/bench/demo.py                                        # grpo_baseline and sgpo, seeds 0 1 2
    python tests/bench/demo.py --runs "sgpo --delta 1.0" "sgpo --distill sft"
    python tests/bench/demo.py --guidances none rkl kdrl tgpo         # tgpo.py under each, with both teachers
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
DIVERGENCE = {"eval/reverse_kl_k1": "reverse KL, k1", "eval/mismatch": "mismatch"}


def one(run: str, seed: int, folder: str) -> list[dict]:
    script, *flags = run.split()
    out = Path(folder) / f"{run.replace(' ', '_')}-{seed}"
    subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--seed", str(seed), "--out", str(out), *flags], check=True, capture_output=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["grpo_baseline", "sgpo"])
    parser.add_argument("--guidances", nargs="+", help="in place of --runs: tgpo.py under each guidance and teacher")
    parser.add_argument("--teachers", nargs="+", default=["demo", "demo-same-style"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    args = parser.parse_args()
    runs = [f"tgpo --teacher {teacher} --guidance {guidance}" for teacher in args.teachers for guidance in args.guidances] if args.guidances else args.runs
    os.environ["OMP_NUM_THREADS"] = "1"
    models = "common.demo_dir()" if not args.guidances else f"[common.demo_teacher_dir(name) for name in {args.teachers}]"
    subprocess.run([sys.executable, "-c", f"import common; {models}"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        jobs = {run: [pool.submit(one, run, seed, folder) for seed in args.seeds] for run in runs}
        for run, waiting in jobs.items():
            metrics = [job.result() for job in waiting]
            start, end = ([m[i]["eval/accuracy"] for m in metrics] for i in (0, -1))
            print(f"{run}: before {np.mean(start):.3f}, after {np.mean(end):.3f} ({', '.join(f'{x:.3f}' for x in end)}), "
                  f"with the strategy after {np.mean([m[-1]['eval/accuracy_guided'] for m in metrics]):.3f}, "
                  f"seconds a run {np.mean([sum(r.get('time/rollout_s', 0) + r.get('time/train_s', 0) for r in m) for m in metrics]):.0f}", flush=True)
            apart = [f"{text} {np.mean([m[0][k] for m in metrics]):.2f} -> {np.mean([m[-1][k] for m in metrics]):.2f}"
                     for k, text in DIVERGENCE.items() if k in metrics[0][0]]
            if apart:
                print(f"  {', '.join(apart)}", flush=True)
            for name, rows in zip(args.seeds, metrics):
                pairs = [(r["sgpo/p_auto"], r["sgpo/alpha"]) for r in rows if "sgpo/alpha" in r]
                if pairs:
                    tenths = [np.mean(part, axis=0) for part in np.array_split(pairs, 10)]
                    print(f"  seed {name}: correlation of alpha with p_auto {np.corrcoef(np.transpose(pairs))[0, 1]:.2f}; tenths of the run, p_auto "
                          f"{' '.join(f'{p:.2f}' for p, _ in tenths)}, alpha {' '.join(f'{a:.2f}' for _, a in tenths)}", flush=True)
