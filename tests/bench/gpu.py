"""Measure what only a GPU can answer: the README's figures for hardware and speed, in one command.

    python tests/bench/gpu.py                        # without a GPU: all of it at toy shapes, in two minutes
    python tests/bench/gpu.py --minutes 9 --only sgpo trl

Each part runs in a process of its own with a time limit, the most valuable part first. It leaves one line in
OUT/results.jsonl and its output in OUT/PART.log. If a part fails, its message is kept and the next part runs.
The same command repeats only what is missing. At the end it prints the tables in Markdown. The models are
Qwen2's with random weights at Qwen2.5's shapes (step.py).
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
import common  # noqa: E402
import sgpo  # noqa: E402
import step  # noqa: E402

TOY = not common.ON_GPU
GB = 2 ** 30
CARDS = {  # bf16 FLOP/s without sparsity, bytes/s of the memory: data sheets
    "H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.04e12), "B200": (2250e12, 8.0e12), "cpu": (1e11, 2e10)}
Rows = Iterator[tuple[str, dict]]  # the title of a table and one of its rows


# ---------------------------------------------------------------- measuring

def measure(function: Callable) -> tuple[float, float]:
    """Return the seconds of a call, and the GPU memory in GB that the call added at its peak (0 on a CPU)."""
    before = 0
    if common.ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    function()
    if not common.ON_GPU:
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / GB


def config_name(size: str) -> str:
    return "toy" if TOY else f"qwen{size}"


def folder_of(size: str, out: Path) -> Path:
    """Return the folder of a model, built once, in another process whose peak memory does not count."""
    folder = out / f"model-{config_name(size)}"
    if not (folder / "reward.py").exists():  # it is written last
        folder.mkdir(parents=True, exist_ok=True)
        step.in_a_process("build", config_name(size), str(folder), "0")
    return folder


def least_work(config: step.Config, row: dict, num_auto: int) -> tuple[float, float]:
    """Return the FLOPs of a step's update and the bytes of its rollout that nobody can do without.

    A forward pass counts once and one with a gradient three times; a distilled sample (from num_auto on) is
    also read with the strategy. Padding and recomputation do not count. Decoding reads the bf16 weights once
    for every token of the longest sample, and every sample's keys and values.
    """
    kv_size = config.kv_heads * config.hidden // config.heads
    layer = config.hidden * (2 * config.hidden + 2 * kv_size + 3 * config.inner)
    body = config.layers * layer
    head = config.vocabulary * config.hidden
    flops = 0.0
    for i, length, has_gradient in row["passes"]:
        attention = 2 * config.layers * config.hidden * length ** 2
        forward = 2 * body * length + attention + 2 * head * row["written"][i]
        passes = 1
        if has_gradient:
            passes = 4 if i >= num_auto else 3
        flops += passes * forward
    cache = 0.0
    for length, written in zip(row["lengths"], row["written"]):
        cache += 2 * 2 * config.layers * kv_size * written * (length - written / 2)
    return flops, max(row["written"]) * 2 * (body + head) + cache


# ---------------------------------------------------------------- parts: each yields (table, row) after row

def tests(out: Path) -> Rows:
    """Run tests/test_gpu.py."""
    selected = ["-k", "offload"] if TOY else []
    done = subprocess.run([sys.executable, "-m", "pytest", ROOT / "tests" / "test_gpu.py", *selected],
                          capture_output=True, text=True)
    print(done.stdout)
    last = done.stdout.strip().splitlines()[-1].strip("= ")
    yield "Tests", {"file": "tests/test_gpu.py", "result": last}
    if done.returncode:
        raise AssertionError(last)


def one_step(script: str, size: str, *flags, out: Path) -> Rows:
    """Measure the second of two steps: time, memory, and the shares of what the card could do."""
    config = step.CONFIGS[config_name(size)]
    row = step.run_ours(script, config, folder_of(size, out), 2, *flags)[1]
    num_auto = config.samples - config.samples // 3 if script == "sgpo" else config.samples
    work, read = least_work(config, row, config.prompts * num_auto)
    card = torch.cuda.get_device_name() if common.ON_GPU else "cpu"
    flops, bandwidth = next((peaks for name, peaks in CARDS.items() if name in card), CARDS["cpu"])
    training = row["total"] - row["rollout"]
    yield "A step", {
        "step": " ".join(map(str, [script, size, *flags])), "peak GB": common.peak_memory_gb(),
        "tokens": row["tokens"], "rollout s": row["rollout"], "training s": training,
        "tokens/s": row["tokens"] / row["total"], "padding": f"{row['padding']:.1%}",
        "rollout, of the memory's speed": f"{read / bandwidth / row['rollout']:.1%}",
        "training, of the card's FLOP/s": f"{work / training / flops:.1%}"}


def against_trl(size: str, out: Path) -> Rows:
    """Compare steps with TRL's."""
    steps, repeats = (2, 1) if TOY else (3, 2)
    results = step.compare(config_name(size), steps, repeats, ["grpo", "trl", "sgpo", "sdpo"])
    for who, values in results.items():
        ours = step.RATIOS.get(who, who)
        ratio = f"{results[ours]['step s'] / values['step s']:.2f}"
        yield "Against TRL", {"who": f"{who}, {size}", **values, "ours / this": ratio}
    if "trl" not in results:
        raise ImportError("trl is not installed, so ours ran alone")


def head(out: Path) -> Rows:
    """Compute the exact KL over the vocabulary in chunks: memory is flat in the tokens."""
    vocabulary, hidden_size = (2000, 32) if TOY else (151_936, 1536)
    linear = torch.nn.Linear(hidden_size, vocabulary, bias=False, device=common.DEVICE)
    linear.weight.grad = torch.zeros_like(linear.weight)  # as in training
    output_head = common.Fp32Head(SimpleNamespace(get_output_embeddings=lambda: linear))

    def kl(guided_hidden, hidden):
        return sgpo.forward_kl(output_head(guided_hidden), output_head(hidden))

    def forward_and_backward() -> None:
        with torch.autocast(common.DEVICE.type, torch.bfloat16, enabled=common.ON_GPU):
            size = output_head.tokens_per_chunk
            chunks = [checkpoint(kl, *pair, use_reentrant=False)
                      for pair in zip(guided_hidden.split(size), hidden.split(size))]
        torch.cat(chunks).sum().backward()

    for num_tokens in (32, 64) if TOY else (1024, 4096, 16384):
        hidden = torch.randn(num_tokens, hidden_size, device=common.DEVICE, requires_grad=True)
        guided_hidden = torch.randn(num_tokens, hidden_size, device=common.DEVICE)
        forward_and_backward()  # warms up
        seconds, added = measure(forward_and_backward)
        yield f"Exact KL over {vocabulary:,} tokens", {
            "tokens": num_tokens, "ms": 1000 * seconds, "added GB": added,
            "two dense logits GB": 8 * num_tokens * vocabulary / GB}


def real_model(out: Path) -> Rows:
    """Train SmolLM2-135M-Instruct (tests/bench/real.py): held-out accuracy before and after, and the time."""
    folder, file = out / "real", out / "real.jsonl"
    bench = ROOT / "tests" / "bench"
    subprocess.run([sys.executable, bench / "real.py", folder], check=True)
    rows = ["grpo_baseline", "sgpo", "tgpo --coefficient 0.5 --coefficient_fall 0.02 --lr 2e-4"]
    subprocess.run([sys.executable, bench / "ablations.py", "--real", folder, "--file", file, "--seeds", "0",
                    "--only", *rows], check=True)
    for text in file.read_text().splitlines():
        run = json.loads(text)
        first, last = run["metrics"][0], run["metrics"][-1]
        yield "SmolLM2-135M, 24 steps of 72 samples", {
            "run": run["run"], "before": first["eval/accuracy"], "after": last["eval/accuracy"],
            "seconds": run["seconds"], "tokens/s": last["tokens_per_s"], "peak GB": last["peak_memory_gb"]}


LARGE = ("--microbatch_tokens", 65_536)
PARTS = {  # the most valuable first: what it runs, and how many seconds it may take
    "tests": (tests, 240),
    "real": (real_model, 420),
    "sgpo-0.5b": (partial(one_step, "sgpo", "0.5b"), 150),
    "sgpo-1.5b": (partial(one_step, "sgpo", "1.5b"), 180),
    "tgpo-1.5b": (partial(one_step, "tgpo", "1.5b"), 180),
    "trl-1.5b": (partial(against_trl, "1.5b"), 520),
    "sgpo-7b": (partial(one_step, "sgpo", "7b", *LARGE), 480),
    "tgpo-7b": (partial(one_step, "tgpo", "7b", *LARGE), 480),
    "head": (head, 60),
    "sgpo-3b": (partial(one_step, "sgpo", "3b"), 210),
    "trl-0.5b": (partial(against_trl, "0.5b"), 400),
}
TOY_PARTS = ("tests", "sgpo-0.5b", "tgpo-1.5b", "trl-1.5b", "head")  # the others are the same there


# ---------------------------------------------------------------- the command

def attempt(part: str, limit: float, out: Path) -> dict:
    """Run a part in a process of its own and return its line."""
    rows_file, log_file = out / f"{part}.rows", out / f"{part}.log"
    rows_file.write_text("")
    start = time.time()
    command = [sys.executable, __file__, "--part", part, "--out", out]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log_file.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment,
                                   start_new_session=True)
        try:
            code = process.wait(limit)
            message = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, message = None, f"cut off after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # the part and what it has started
            process.wait()
    line = {"part": part, "ok": code == 0, "seconds": round(time.time() - start, 1),
            "rows": [json.loads(text) for text in rows_file.read_text().splitlines()]}
    if code != 0:
        log_lines = log_file.read_text(errors="replace").strip().splitlines()
        line["message"] = f"{message}: {log_lines[-1] if log_lines else 'no output'}"
    return line


def finished_parts(out: Path) -> dict[str, dict]:
    """Return the latest line of each part; a line that is ok stays."""
    path = out / "results.jsonl"
    found = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["ok"] or not found.get(line["part"], {}).get("ok"):
            found[line["part"]] = line
    return found


def cell(value) -> str:
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3g}"
    return value if isinstance(value, str) else f"{value:,.0f}"


def markdown(lines: list[dict]) -> str:
    """Return all rows of these parts as Markdown tables, one per title."""
    tables = {}
    for line in lines:
        for entry in line["rows"]:
            tables.setdefault(entry["table"], []).append(entry["row"])
    text = []
    for title, rows in tables.items():
        text += [f"**{title}**", "", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
        text += [f"| {' | '.join(map(cell, row.values()))} |" for row in rows]
        text.append("")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", default=[""], help=f"parts that begin so, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / ("gpu-toy" if TOY else "gpu"))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        for table, row in PARTS[args.part][0](out=args.out):
            common.append_jsonl(args.out / f"{args.part}.rows", [{"table": table, "row": row}])
        return
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part.startswith(tuple(args.only))]
    if TOY:
        parts = [part for part in parts if part in TOY_PARTS]
    before = finished_parts(args.out)
    for part in parts:
        limit = PARTS[part][1]
        left = 60 * args.minutes - (time.time() - start)
        if before.get(part, {}).get("ok") or left < limit:
            continue
        line = attempt(part, limit, args.out)
        common.append_jsonl(args.out / "results.jsonl", [line])
        print(f"{part}: {'done' if line['ok'] else line['message']} ({line['seconds']} s)", flush=True)
    found = finished_parts(args.out)
    about = common.versions()
    print(f"\n{about['device']}, {about['versions']}, commit {about['commit']}\n")
    print(markdown([found[part] for part in parts if part in found]))
    missing = [part for part in parts if not found.get(part, {}).get("ok")]
    print(f"Missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    main()
