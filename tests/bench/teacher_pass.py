"""The teacher's pass over a rollout at V = 151,936: its time against a plain no-grad forward of the same tokens, and its peak memory at two lengths.

    python tests/bench/teacher_pass.py                 # tgpo's labels, every id shared
    python tests/bench/teacher_pass.py --shared 151665  # a teacher whose last ids the student does not have

Plain is the model's own call on as many rows at a time, all logits made and nothing read off them. The two take turns; the ratio is of medians of
processor time, which a busy machine blurs less than the clock. Memory (Linux) is the resident peak of a call over what was
resident before.
"""
import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
V, ROWS, PROMPT = 151_936, 8, 16


def setting(width: int, tokens: int, shared: int):
    """-> teacher, rollout of `tokens` completion tokens in ROWS rows, args."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import tgpo
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, num_attention_heads=8,
                                         num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True)).eval().requires_grad_(False)
    completions = torch.randint(V, (ROWS, tokens // ROWS))
    mask = torch.ones_like(completions, dtype=torch.bool)
    ro = tgpo.Rollout([torch.randint(V, (PROMPT,)).tolist() for _ in range(ROWS)], completions, mask, ~mask[:, 0], [""] * ROWS)
    teacher = tgpo.Teacher(model, shared, 1, 1, [], torch.device("cpu"))
    return teacher, ro, tgpo.Args(model="m", teacher="t", teacher_microbatch_tokens=ROWS * (PROMPT + tokens // ROWS))


def ratio(width: int, tokens: int, shared: int, rounds: int) -> dict:
    import torch
    teacher, ro, args = setting(width, tokens, shared)
    ids = torch.cat([torch.tensor(ro.prompts), ro.completions], 1)

    @torch.no_grad()
    def plain():
        return teacher.model(input_ids=ids, logits_to_keep=ro.completions.shape[1] + 1).logits[:, :-1]

    def timed(call) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    def advise():
        return teacher.advise(ro, range(ROWS), args)

    timed(plain), timed(advise)
    times = [(timed(plain), timed(advise)) for _ in range(rounds)]
    a, b = (median(x) for x in zip(*times))
    return {"width": width, "tokens": tokens, "plain_s": round(a, 3), "advise_s": round(b, 3), "ratio": round(b / a, 2)}


def memory(width: int, tokens: int, shared: int) -> dict:
    teacher, ro, args = setting(width, tokens, shared)

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    teacher.advise(ro, [0], args)  # what is made once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    teacher.advise(ro, range(ROWS), args)
    return {"tokens": tokens, "peak_mb": round((status("VmHWM") - before) / 1024)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=int, default=V)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--memory", type=int, help="print the memory of a pass over so many tokens alone")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.width, args.memory, args.shared)))
    else:
        print(ratio(args.width, args.tokens, args.shared, args.rounds), flush=True)
        rows = [json.loads(subprocess.run([sys.executable, __file__, "--memory", str(n), "--width", str(args.width), "--shared", str(args.shared)],
                                          capture_output=True, text=True, check=True).stdout) for n in (1024, 4096)]
        print(*rows, f"4,096 tokens take {rows[1]['peak_mb'] / rows[0]['peak_mb']:.3f} x the memory of 1,024", sep="\n")
