"""Show what SGPO distils: a page with targets of a run, each token shaded by d_t of Eq. 3 (paper: Fig. 5).

    python tests/bench/show_tokens.py runs/sgpo --model demo     # before training: the run's first model
    python tests/bench/show_tokens.py runs/sgpo                  # after training: what is left

Tokens above delta, which Eq. 5 leaves out, are framed. Hovering shows the likeliest tokens with and without
the strategy.
"""
import argparse
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import sgpo  # noqa: E402

HEAD = """<!doctype html><meta charset=utf-8><title>SGPO: what is distilled</title>
<style>body {max-width: 60em; margin: 2em auto; font: 16px/1.8 monospace; background: #fff; color: #222}
pre {white-space: pre-wrap} .out {outline: 2px solid #36c}</style>
"""


@dataclass
class Target:
    title: str
    tokens: list[str]
    d: list[float]      # nats, one per token
    hover: list[str]    # what hovering shows, one per token


@torch.no_grad()
def read_target(model, tokenizer, problem: dict, text: str, args: sgpo.Args) -> Target:
    """Return d_t of a completion and the likeliest tokens with and without the strategy."""
    ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    logits = {}
    for name, strategy in (("with", problem["strategy"]), ("without", None)):
        prompt = common.build_prompt(tokenizer, problem["problem"], args.system_prompt, strategy)
        all_logits = model(torch.tensor([prompt + ids])).logits[0].float() / args.temperature
        logits[name] = all_logits[len(prompt) - 1:-1]                      # [T, V]
    hover = [""] * len(ids)
    for name, values in logits.items():
        top = values.softmax(-1).topk(5)
        for t in range(len(ids)):
            hover[t] += f"\n{name} the strategy:"
            for p, i in zip(top.values[t].tolist(), top.indices[t].tolist()):
                hover[t] += f"\n{p:.3f} {tokenizer.decode(i)!r}"
    title = f"{problem['problem']} ({problem['strategy']})"
    d = sgpo.forward_kl(logits["with"], logits["without"]).tolist()
    return Target(title, [tokenizer.decode(i) for i in ids], d, hover)


def find_targets(run: Path, args: sgpo.Args, tokenizer, count: int) -> list[tuple[dict, str]]:
    """Return problems with a strategy and a correct guided completion of each, the last ones of the run."""
    problems, _ = common.load_sources(args)
    sgpo.attach_strategies(problems, Path(args.strategies or run / "strategies.jsonl"), tokenizer, args)
    by_id = {problem["id"]: problem for problem in problems if "strategy" in problem}
    found = {}
    samples = [sample for _, sample in common.read_jsonl(run / "samples.jsonl")]
    for sample in reversed(samples):
        is_target = sample.get("guided") and sample["reward"] >= 0.5 and sample["id"] in by_id
        if is_target and len(found) < count:
            found.setdefault(sample["id"], sample["completion"])
    return [(by_id[i], text) for i, text in found.items()]


def page(targets: list[Target], delta: float) -> str:
    """Return a self-contained page; all text in it is escaped."""
    parts = [HEAD, "<p>Darker: a larger KL from the guided to the unguided distribution. "
                   f"Framed: above delta = {delta:g}, left out of the loss. Hover for the likeliest tokens."]
    for target in targets:
        parts.append(f"<h3>{html.escape(target.title)}</h3><pre>")
        for token, d, likely in zip(target.tokens, target.d, target.hover, strict=True):
            framed = " class=out" if d > delta else ""
            shade = f"rgba(224, 96, 44, {min(max(d, 0) / 2, 1):.3f})"
            hover = html.escape(f"d = {d:.4f}{likely}")
            style = f'style="background: {shade}" title="{hover}"'
            parts.append(f"<span{framed} {style}>{html.escape(token)}</span>")
        parts.append("</pre>")
    return "".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--n", type=int, default=8, help="targets, each of another problem")
    parser.add_argument("--model", help="whose distributions (default: the run's own model, after training)")
    parser.add_argument("--out", type=Path, default=Path("tokens.html"))
    options = parser.parse_args()
    flags = json.loads((options.run / "config.json").read_text())["flags"]
    args = sgpo.Args(**flags)
    name = options.model or str(options.run / "model")
    tokenizer = common.load_tokenizer(name)
    model = common.load_model(name, "--model", torch.float32, "cpu")
    targets = [read_target(model, tokenizer, problem, text, args)
               for problem, text in find_targets(options.run, args, tokenizer, options.n)]
    options.out.write_text(page(targets, args.delta))
    print(f"{len(targets)} targets: {options.out}")
