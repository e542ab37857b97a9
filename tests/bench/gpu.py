"""All that only a GPU can answer, in one command: figures for the README's hardware and speed tables.

    python tests/bench/gpu.py                     # without a GPU: all of it at toy shapes, in two minutes
    python tests/bench/gpu.py --minutes 9 --only sgpo trl-1.5b

Each part runs in a process of its own with a time limit, the most valuable first, leaves a line in
OUT/results.jsonl, and says the rest in OUT/PART.log. One that fails leaves its message and the next one runs;
the same command goes on with what is missing. At the end come the tables in Markdown, and what is missing.

The models are Qwen2's of random weights at Qwen2.5's shapes. Their end token has the same chance at every
place (step.build), so that lengths differ as natural ones do.
"""
import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]
import common  # noqa: E402
import sgpo  # noqa: E402
import step  # noqa: E402

TOY, GB = not common.ON_GPU, 2 ** 30
OUT = ROOT / "runs" / ("gpu-toy" if TOY else "gpu")
CARDS = {  # bf16 FLOP/s without sparsity, bytes/s of the memory: data sheets
    "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.04e12), "B200": (2250e12, 8.0e12)}


# ---------------------------------------------------------------- what is measured with

def now() -> float:
    if common.ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def host_peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def measured(fn, repeats: int = 1) -> tuple[float, float]:
    """Seconds of a call of fn; GB by which it raised the memory at its peak, the GPU's where there is one."""
    if common.ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # Linux: the peak so far is what there is now
            Path("/proc/self/clear_refs").write_text("5")
    before, began = torch.cuda.memory_allocated() / GB if common.ON_GPU else host_peak(), now()
    for _ in range(repeats):
        fn()
    return (now() - began) / repeats, common.peak_memory_gb() - before


def peaks() -> tuple[float, float]:
    """FLOP/s and bytes/s: the card's data sheet, or what a product and a copy reach on another device."""
    name = torch.cuda.get_device_name() if common.ON_GPU else "cpu"
    for card, known in CARDS.items():
        if card in name:
            return known
    x = torch.randn(1024, 1024, device=common.HOME, dtype=torch.bfloat16 if common.ON_GPU else torch.float32)
    y = x.repeat(8, 8)
    return 2 * 1024 ** 3 / measured(lambda: x @ x, 5)[0], 2 * y.nbytes / measured(y.clone, 5)[0]


def config_of(size: str) -> step.Config:
    return step.ALL[("toy, untied" if size == "7b" else "toy") if TOY else f"qwen{size}"]


def model_of(size: str) -> Path:
    """A folder with its model, made once, problems and a reward."""
    folder = OUT / f"model-{size}"
    if not (folder / "reward.py").exists():  # which is written last
        folder.mkdir(parents=True, exist_ok=True)
        step.build(config_of(size), folder)
        if common.ON_GPU:  # what it took to make it does not count
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return folder


def least_work(config: step.Config, row: dict, n_auto: int) -> tuple[float, float]:
    """FLOPs of a step's update and bytes of its rollout that no implementation can do without.

    A pass forward counts once, one with a gradient thrice, and a distilled row is read twice; padding and
    what checkpointing computes again do not count. Decoding reads the weights in bf16 once for each token of
    the longest row, and each row's keys and values.
    """
    kv, flops = config.kv * config.hidden // config.heads, 0.0
    body = config.layers * config.hidden * (2 * config.hidden + 2 * kv + 3 * config.inner)
    head, cache = config.vocabulary * config.hidden, 0.0
    for i, length, learns in row["passes"]:
        attention = 2 * config.layers * config.hidden * length ** 2
        forward = 2 * body * length + attention + 2 * head * row["written"][i]
        flops += forward * (1 if not learns else 4 if i >= n_auto else 3)
    for length, n in zip(row["lengths"], row["written"]):
        cache += 2 * 2 * config.layers * kv * n * (length - n / 2)
    return flops, max(row["written"]) * 2 * (body + head) + cache


# ---------------------------------------------------------------- parts: each gives (table, row) after row

def tests():
    """tests/test_gpu.py."""
    import pytest
    found = {"passed": [], "failed": [], "skipped": []}
    watch = SimpleNamespace(pytest_runtest_logreport=lambda report: found[report.outcome].append(
        report.nodeid) if report.when == "call" or report.outcome != "passed" else None)
    began = time.time()
    which = ["-k", "one_plain_generate"] if TOY else []
    pytest.main([str(ROOT / "tests" / "test_gpu.py"), "-q", "-p", "no:cacheprovider", *which], [watch])
    yield "Tests", {"tests": "tests/test_gpu.py", **{name: len(ids) for name, ids in found.items()},
                    "seconds": time.time() - began}
    if found["failed"] or not found["passed"]:
        raise AssertionError("failed: " + (", ".join(found["failed"]) or "no test ran"))


def demo():
    """`python sgpo.py`."""
    small = "--steps 1 --prompts_per_step 2 --group_size 2 --guided_group_size 1 --eval_samples 1".split()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["sgpo.py", "--out", f"{folder}/run", *(small if TOY else [])]
        began = now()
        sgpo.main()
        rows = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    before, after = (rows[i]["eval/accuracy"] for i in (0, -1))
    yield "Demo", {"script": "sgpo.py", "steps": rows[-1]["step"], "before": before, "after": after,
                   "seconds": now() - began, "peak GB": rows[-1]["peak_memory_gb"]}


def a_step(script: str, size: str, *more, **how) -> tuple[dict, int]:
    """The second of two steps of a script, as step.ours has it; how many of its rows are not guided."""
    config, samples, folder = config_of(size), config_of(size).samples, model_of(size)
    flags = ["--teacher", folder / "model"]
    if script == "sgpo":  # 8 + 4 where the others have 12
        samples, flags = samples * 2 // 3, ["--guided_group_size", samples // 3]
    flags += ["--group_size", samples, *more]
    return step.ours(config, folder, 2, script, flags, **how)[1], config.prompts * samples


def one_step(script: str, size: str, *more):
    """Time, memory, and the shares of what the card could do."""
    (flops, bandwidth), config = peaks(), config_of(size)
    row, n_auto = a_step(script, size, *more)
    work, read = least_work(config, row, n_auto)
    tokens = sum(row["written"])
    yield "A step", {
        "step": " ".join(map(str, (script, size, *more))), "GPU GB": common.peak_memory_gb(),
        "host GB": host_peak(), "tokens": tokens, "rollout s": row["rollout"], "train s": row["train"],
        "tokens/s": tokens / row["total"], "decoding tokens/s": tokens / row["rollout"],
        "of its roofline": f"{read / bandwidth / row['rollout']:.1%}",
        "MFU": f"{work / row['train'] / flops:.1%}", "padding": f"{row['padding']:.1%}"}


def profile():
    """What takes most of a rollout of 128 tokens and its SGPO update, at 1.5B."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    activities, found = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * common.ON_GPU, {}

    @contextlib.contextmanager
    def watch(what: str):
        with torch.profiler.profile(activities=activities) as found[what]:
            yield

    a_step("sgpo", "1.5b", "--max_new_tokens", 16 if TOY else 128, watch=watch)
    for what, seen in found.items():
        times = {e.key: e.self_device_time_total if common.ON_GPU else e.self_cpu_time_total
                 for e in seen.key_averages() if not e.is_user_annotation
                 and e.device_type == (DeviceType.CUDA if common.ON_GPU else DeviceType.CPU)}
        for name in sorted(times, key=times.get, reverse=True)[:10]:
            yield f"Profile, {what}", {"kernel": name.replace("|", "/")[:70], "ms": times[name] / 1000,
                                       "share": f"{times[name] / sum(times.values()):.1%}"}


def trl(size: str):
    """A step of GRPO against TRL's with HF generate, in turn."""
    name, steps, repeats = ("toy", 2, 1) if TOY else (f"qwen{size}", 3, 2)
    found = step.compare(name, steps, repeats, ["ours", "trl"])
    for who, r in found.items():
        ratio = found["ours"]["total"] / r["total"]
        yield "GRPO against TRL", {
            "who": f"{who}, {size}", "step s": r["total"], "rollout s": r["rollout"], "train s": r["train"],
            "tokens": r["real"], "peak GB": r["peak"] / GB, "ours / this": ratio}
    if len(found) == 1:
        raise ImportError("trl is not installed, so ours ran alone")


def pieces():
    """96 rollouts: in pieces, by one plain call, with a static cache, by generate_batch."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    folder, config, new = model_of("1.5b"), config_of("1.5b"), 16 if TOY else 2048
    tokenizer, model = common.load_tokenizer(f"{folder}/model"), common.load_model(f"{folder}/model")
    rows = common.load_rows(f"{folder}/rows.jsonl")[:config.prompts]
    prompts = [common.build_prompt(tokenizer, r["problem"], "") for r in rows for _ in range(config.samples)]
    ends, width = common.stop_ids(model, tokenizer), max(map(len, prompts))
    settings = partial(GenerationConfig, do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=ends,
                       pad_token_id=tokenizer.pad_token_id)

    def plain(**more):
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=common.HOME)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=common.HOME)
        return model.generate(ids, attention_mask=mask, generation_config=settings(**more))[:, width:]

    def batch():
        room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64) if TOY else None
        answers = model.generate_batch(prompts, settings(), continuous_batching_config=room).values()
        return common.padded([answer.generated_tokens for answer in answers], common.HOME)[0]

    def ours(new: int = new):
        return common.generate(model, tokenizer, prompts, new, 1.0, 1.0)

    static, failed = partial(plain, cache_implementation="static"), []
    ours(8)  # warms up
    for way, run in {"in pieces": ours, "one plain call": plain, "static cache, with its compilation": static,
                     "static cache": static, "generate_batch": batch}.items():
        written = []
        try:
            seconds, grown = measured(lambda: written.append(run()))
        except Exception as error:  # the others may work
            failed.append(f"{way}: {type(error).__name__}: {common.first_line(error)}")
            continue
        tokens = int(common.completion_mask(written[0], ends)[0].sum())
        yield f"Rollouts of {len(prompts)} rows, at most {new} tokens", {
            "way": way, "tokens": tokens, "seconds": seconds, "tokens/s": tokens / seconds, "takes GB": grown}
    if failed:
        raise RuntimeError("; ".join(failed))


@torch.no_grad()
def cache():
    """A token more of 96 rows in all layers: the cache's copies; attention by heads that share keys."""
    from transformers import DynamicCache
    config, kind = config_of("1.5b"), torch.bfloat16 if common.ON_GPU else torch.float32
    n, layers, size = config.prompts * config.samples, range(config.layers), config.hidden // config.heads
    zeros, attend = partial(torch.zeros, device=common.HOME), torch.nn.functional.scaled_dot_product_attention
    for length in (8, 16) if TOY else (1024, 2048):
        keys, new, query = (zeros(n, heads, tokens, size, dtype=kind) for heads, tokens in
                            ((config.kv, length), (config.kv, 1), (config.heads, 1)))
        mask, filled = zeros(n, 1, 1, length, dtype=torch.bool).logical_not(), DynamicCache()
        for layer in layers:
            filled.update(keys, keys, layer)

        def masked() -> None:  # as transformers does where some row is padded
            for _ in layers:
                wide = keys.repeat_interleave(config.heads // config.kv, 1)
                attend(query, wide, wide, attn_mask=mask)

        ways = {"copies ms": lambda: [filled.update(new, new, layer) for layer in layers],
                "masked attention ms": masked,
                "plain attention ms": lambda: [attend(query, keys, keys, enable_gqa=True) for _ in layers]}
        yield f"A token more of {n} rows", {"tokens before": length} | {
            way: 1000 * min(measured(run)[0] for _ in range(4)) for way, run in ways.items()}


def head_of(vocabulary: int, hidden: int):
    """A vocabulary head in the place of a model; its gradient is there, as in training."""
    head = torch.nn.Linear(hidden, vocabulary, bias=False, device=common.HOME)
    head.weight.grad = torch.zeros_like(head.weight)
    return SimpleNamespace(get_output_embeddings=lambda: head)


def head():
    """Log-probs and entropy, forward and backward, by chunks of several sizes."""
    tokens, vocabulary, hidden = (64, 2000, 32) if TOY else (8192, 151_936, 1536)
    model, ids = head_of(vocabulary, hidden), torch.randint(0, vocabulary, (tokens,), device=common.HOME)
    x = torch.randn(tokens, hidden, device=common.HOME, requires_grad=True)

    def run() -> None:
        with torch.autocast(common.HOME.type, torch.bfloat16, enabled=common.ON_GPU):
            logps, _ = common.over_vocabulary(common.log_prob_and_entropy, model, [x], [ids])
        logps.sum().backward()

    run()
    for power in (13, 15, 17) if TOY else range(24, 30):
        with mock.patch.object(common, "CHUNK", 2 ** power):
            seconds, grown = measured(run, 3)
        yield f"The vocabulary head, {tokens} tokens x {vocabulary:,}", {
            "CHUNK": f"2^{power}", "tokens a chunk": max(2 ** power // vocabulary, 1), "ms": 1000 * seconds,
            "takes GB": grown}


def kl():
    """The exact KL of two distributions, forward and backward: flat in the number of tokens."""
    tokens, hidden = ((32, 64), 8) if TOY else ((1024, 4096, 16384), 1536)
    if sys.platform == "linux":  # malloc shall give back at once what is freed, else the peak grows
        ctypes.CDLL(None).mallopt(-3, 2 ** 20)  # M_MMAP_THRESHOLD
    model = head_of(151_936, hidden)
    for n in tokens:
        guided, plain = (torch.randn(n, hidden, device=common.HOME, requires_grad=i > 0) for i in (0, 1))

        def run() -> None:
            d, = common.over_vocabulary(lambda *logits: (sgpo.forward_kl(*logits),), model, [guided, plain])
            sgpo.clip_kl(d, 1.0).mean().backward()

        seconds, grown = measured(run)
        yield "Exact KL over 151,936 tokens", {
            "tokens": n, "seconds": seconds, "takes GB": grown, "two dense [M, V] GB": 8 * n * 151_936 / GB}


SIZES = {"0.5b": (120, ()), "1.5b": (150, ()), "3b": (210, ()), "7b": (480, ("--microbatch_tokens", 65_536))}
PARTS = {  # most valuable first: what it runs, and the seconds that it may take on a GPU
    "tests": (tests, 240), "demo": (demo, 300),
    **{f"{script}-{size}": (partial(one_step, script, size, *more), limit)
       for size, (limit, more) in SIZES.items() for script in ("sgpo", "tgpo")},
    "plain-1.5b": (partial(one_step, "sgpo", "1.5b", "--activation_checkpointing", False,
                           "--microbatch_tokens", 8192), 150),
    "profile": (profile, 120), "trl-0.5b": (partial(trl, "0.5b"), 400),
    "trl-1.5b": (partial(trl, "1.5b"), 520), "pieces": (pieces, 400), "cache": (cache, 60),
    "head": (head, 60), "kl": (kl, 60)}


# ---------------------------------------------------------------- the command

def work(part: str, out: Path) -> None:
    """A part, in this process: its rows to PART.rows, a line each, and all it says to PART.log."""
    os.setsid()
    globals()["OUT"] = out
    with open(OUT / f"{part}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if TOY:
        torch.set_num_threads(1)
    with open(OUT / f"{part}.rows", "w", buffering=1) as lines:
        lines.write(json.dumps({"about": common.versions()}) + "\n")
        try:
            for table, row in PARTS[part][0]():
                lines.write(json.dumps({"table": table, "row": row}) + "\n")
            lines.write(json.dumps({"done": True}) + "\n")
        except SystemExit:  # a refusal has said why
            pass
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {common.first_line(error)}", file=sys.stderr)
    sys.stdout.flush()
    os._exit(0)


def attempt(part: str, seconds: float) -> dict:
    """Run a part in a process of its own -> its line."""
    began, rows, log = time.time(), OUT / f"{part}.rows", OUT / f"{part}.log"
    for path in (rows, log):
        path.write_text("")
    # A fork has imported all there is to import; CUDA wants a fresh process.
    process = multiprocessing.get_context("fork" if TOY else "spawn").Process(target=work, args=(part, OUT))
    process.start()
    try:
        process.join(seconds)
        cut = process.is_alive()
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started
        process.join()
    said = [line for _, line in common.read_jsonl(rows, cut_by_kill=True)]
    line = {"part": part, "ok": {"done": True} in said, "seconds": round(time.time() - began, 1),
            "about": said[0]["about"] if said else None, "rows": [s for s in said if "row" in s]}
    if not line["ok"]:
        words = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        line["message"] = words[-1]
        if process.exitcode:
            line["message"] = f"cut off after {seconds:.0f} s" if cut else \
                f"killed by signal {-process.exitcode}, as where the host has no memory left; {words[-1]}"
    return line


def read() -> dict[str, dict]:
    """The newest line of each part; one that is whole stays."""
    path, found = OUT / "results.jsonl", {}
    for _, line in common.read_jsonl(path, cut_by_kill=True) if path.exists() else ():
        if line["ok"] or not found.get(line["part"], {}).get("ok"):
            found[line["part"]] = line
    return found


def markdown(parts: list[str]) -> str:
    """The tables, what they were measured on, and what is missing."""
    found = read()
    lines, tables, config = [found[part] for part in parts if part in found], {}, config_of("1.5b")
    for row in (row for line in lines for row in line["rows"]):
        tables.setdefault(row["table"], []).append(row["row"])

    def cell(x) -> str:
        return x if isinstance(x, str) else f"{x:,.3g}" if isinstance(x, float) and x < 100 else f"{x:,.0f}"

    def row_of(cells) -> str:
        return f"| {' | '.join(cells)} |"

    name = "{device}, torch {versions[torch]}, transformers {versions[transformers]}, commit {commit:.10}"
    about = sorted({name.format(**line["about"]) for line in lines if line["about"]})
    shapes = "toy shapes" if TOY else "Qwen2.5's shapes"
    text = [f"Measured by `python tests/bench/gpu.py` on {'; on '.join(about)}. Random weights at {shapes}, "
            f"{config.prompts} problems x {config.samples} completions of {config.mean} tokens on average, "
            f"{config.tokens} at most."]
    for title, rows in tables.items():
        text += ["", f"**{title}**", "", row_of(rows[0]), row_of("---" for _ in rows[0])]
        text += [row_of(map(cell, row.values())) for row in rows]
    missing = [f"{part} ({found[part]['message'] if part in found else 'not tried yet'})" for part in parts
               if not found.get(part, {}).get("ok")]
    return "\n".join([*text, "", f"Missing: {', '.join(missing) or 'nothing'}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[""],
                        help=f"parts that begin so, of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=OUT, help="results, logs and models (default: in runs/)")
    args, began = parser.parse_args(), time.time()
    globals()["OUT"] = args.out
    OUT.mkdir(parents=True, exist_ok=True)
    parts, found = [part for part in PARTS if part.startswith(tuple(args.only))], read()
    if not parts:
        common.refuse(f"--only {' '.join(args.only)}: there are {', '.join(PARTS)}")
    for part in sorted(parts, key=lambda part: part in found):  # what has failed before comes last
        if found.get(part, {}).get("ok"):
            continue
        limit, there = min(PARTS[part][1], 60 if TOY else 520), 60 * args.minutes - (time.time() - began)
        if there < limit:
            print(f"{part}: may take {limit} s, but {there:.0f} are left", flush=True)
            continue
        line = attempt(part, limit)
        with open(OUT / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{part}: {'done' if line['ok'] else line['message']} ({line['seconds']} s)", flush=True)
    print("\n" + markdown(parts))


if __name__ == "__main__":
    main()
