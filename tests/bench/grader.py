"""Verdicts a second of the grader on real golds, each against itself and against its neighbour's, boxed in a sentence.

    python tests/bench/grader.py ../shared/data/math500.jsonl ../shared/data/amc23.jsonl ../shared/data/aime24.jsonl
"""
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

if __name__ == "__main__":
    golds = [json.loads(line)["answer"] for path in sys.argv[1:] for line in open(path)]
    common.grade("\\boxed{\\lfloor 7/2 \\rfloor}", "3")  # starts the worker
    began = time.perf_counter()
    readable = sum(map(common.gold_is_gradable, golds))
    print(f"{readable} of {len(golds)} golds gradable, checked in {time.perf_counter() - began:.1f} s")
    pairs = [(gold, other) for i, gold in enumerate(golds) for other in (gold, golds[i - 1])]
    seconds = []
    for answer, gold in pairs:
        began = time.perf_counter()
        common.grade(f"So the answer is $\\boxed{{{answer}}}$.", gold)
        seconds.append(time.perf_counter() - began)
    print(f"{len(pairs) / sum(seconds):.0f} verdicts/s, slowest {max(seconds):.2f} s, outcomes {common.grader_counts()}")
    worker = Path(f"/proc/{common._idle[-1].pid}/status")
    if worker.exists():
        print(f"a worker's peak memory: {int(worker.read_text().split('VmHWM:')[1].split()[0]) / 1024:.0f} MB, at most {common.WORKERS} of them")
