"""Peak memory of the exact full-vocabulary KL, forward and backward, at V = 151,936: flat in the number of
tokens.

    python tests/bench/kl_memory.py                # chunked, as sgpo.py does it
    python tests/bench/kl_memory.py --dense        # all logits at once, for comparison

Each size runs in a process of its own; what counts is the growth of its peak over the peak before the call.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
V, D = 151_936, 256


def measure(tokens: int, dense: bool) -> dict:
    import torch

    import common
    import sgpo
    head = torch.nn.Linear(D, V, bias=False)
    head.weight.grad = torch.zeros_like(head.weight)  # one fp32 [V, d] gradient is there in any case
    model = type("Model", (), {"get_output_embeddings": lambda self: head})()
    guided, plain = torch.randn(tokens, D), torch.randn(tokens, D, requires_grad=True)
    if dense:
        common.CHUNK = V * tokens

    def kl():
        d, = common.over_vocabulary(lambda *logits: (sgpo.forward_kl(*logits),), model, [guided, plain])
        (d * (d < 1e9)).mean().backward()

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    kl()
    return {"tokens": tokens, "peak_mb": round((resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss - before) / 1024), "seconds": round(time.perf_counter() - began, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--tokens", type=int)
    args = parser.parse_args()
    if args.tokens:
        print(json.dumps(measure(args.tokens, args.dense)))
    else:
        flag = ["--dense"] if args.dense else []
        rows = [json.loads(subprocess.run([sys.executable, __file__, "--tokens", str(n), *flag],
                                          capture_output=True, text=True, check=True).stdout) for n
                in (1024, 2048, 4096)]
        for row in rows:
            print(row)
        print(f"4,096 tokens take {rows[-1]['peak_mb'] / rows[0]['peak_mb']:.3f} x the memory of 1,024")
