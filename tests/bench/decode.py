"""Tokens a second of each rollout path, and how near it comes to the machine's memory bandwidth.

    python tests/bench/decode.py [--config 152k]

`plain` is transformers' generate with the same settings. The roofline reads all weights once and every row's keys and values once a token, at the bandwidth
that a copy of 256 MB (CUDA: 4 GB) reaches here. The fast path needs CUDA.
"""
import argparse
import json
import statistics
import tempfile
from pathlib import Path

from step import CPU, CUDA, build, machine, seconds  # sets the path, too


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    import torch
    x = torch.zeros(2 ** (32 if torch.cuda.is_available() else 28), dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    y, times = torch.zeros_like(x), []
    for _ in range(5):
        began = seconds()
        y.copy_(x)
        times.append(seconds() - began)
    return 2 * len(x) / statistics.median(times)


def plain(model, prompts: list[list[int]], eos: list[int], pad: int, tokens: int):
    import torch
    from transformers import GenerationConfig
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=pad)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, width:]


def main() -> None:
    import torch

    import common
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="*", help=f"of {', '.join([*CPU, *CUDA])}; default: all of the device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="bench-decode.json")
    args = parser.parse_args()
    on_gpu, report = torch.cuda.is_available(), {"machine": machine(), "bandwidth": bandwidth(), "configs": {}}
    print(f"bandwidth {report['bandwidth'] / 1e9:.1f} GB/s")
    for name in args.config or (["qwen1.5b", "qwen7b"] if on_gpu else ["natural", "32k", "152k"]):
        config = {**CPU, **CUDA}[name]
        with tempfile.TemporaryDirectory() as folder:
            build(config, Path(folder))
            tokenizer = common.load_tokenizer(str(Path(folder) / "model"))
            model = common.load_model(str(Path(folder) / "model"), dtype=torch.bfloat16 if on_gpu else torch.float32)
            rows = common.load_rows(str(Path(folder) / "rows.jsonl"))[:config.prompts]
        eos, pad = common.stop_ids(model, tokenizer), tokenizer.pad_token_id
        prompts = [common.build_prompt(tokenizer, row["problem"], "") for row in rows for _ in range(config.samples)]
        paths = {"plain": lambda: plain(model, prompts, eos, pad, config.tokens),
                 "default": lambda: common.generate(model, prompts, eos, pad, config.tokens, 1.0, 1.0)}
        if on_gpu:
            paths["fast"] = lambda: common.generate(model, prompts, eos, pad, config.tokens, 1.0, 1.0, None, "on")
        runs = {path: [] for path in paths}
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        per_token = 2 * config.layers * config.kv * (config.hidden // config.heads) * model.dtype.itemsize  # bytes of keys and values
        for repeat in range(args.repeats + 1):
            for path, write in paths.items():
                torch.manual_seed(repeat)
                began = seconds()
                lengths = common.completion_mask(write(), eos)[0].sum(1)
                took = seconds() - began
                places = torch.arange(int(lengths.max()), device=lengths.device)
                alive = lengths[:, None] > places  # [N, C]
                read = weights * len(places) + per_token * (alive * (torch.tensor([len(p) for p in prompts], device=lengths.device)[:, None] + places)).sum().item()
                if repeat:
                    runs[path].append((lengths.sum().item() / took, read / report["bandwidth"] / took))
        found = report["configs"][name] = {path: {"tokens/s": statistics.median(a for a, _ in some), "roofline": statistics.median(b for _, b in some)} for path, some in runs.items()}
        print(f"\n{name}: {len(prompts)} rows, up to {config.tokens} tokens")
        common.say_table([["path", "tokens/s", "of the roofline", "x plain"], *[
            [path, f"{x['tokens/s']:.0f}", f"{x['roofline']:.1%}", f"{x['tokens/s'] / found['plain']['tokens/s']:.2f}"] for path, x in found.items()]])
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
