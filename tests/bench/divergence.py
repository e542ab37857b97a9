"""Measure how far a student and a teacher are apart, without training.

    python tests/bench/divergence.py --model Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-4B --dataset math500

All flags are those of tgpo.py, which runs here with --lr 0. Every step samples other problems, so the steps
give a mean of each metric and its standard error. One number without the error: `tgpo.py --lr 0 --steps 1`.
"""
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import tgpo  # noqa: E402

METRICS = ("tgpo/reverse_kl_k1", "tgpo/teacher_nll", "tgpo/mismatch", "entropy", "reward")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        still = ["--lr", "0", "--warmup_frac", "0", "--save_every", "0", "--eval_every", "0"]
        sys.argv = ["tgpo.py", "--steps", "8", *sys.argv[1:], *still, "--out", f"{folder}/run"]
        tgpo.main()
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if row["step"] > 0]
    for name in METRICS:
        values = [row[name] for row in steps if name in row]
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
            print(f"{name}: {statistics.mean(values):.4f} +- {error:.4f}")
