"""What SGPO distils, as a page: targets of a run, each token shaded by d_t of Eq. 3 (the paper's Figure 5).

    python tests/bench/show_tokens.py runs/sgpo --n 8 --model demo        # before training: the run's start
    python tests/bench/show_tokens.py runs/sgpo --n 8                     # after it: what is left

Tokens above delta, which Eq. 5 leaves out, are framed. Hovering shows the five likeliest tokens with and
without the strategy.
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


@dataclass
class Target:
    title: str
    tokens: list[str]
    d: list[float]      # nats, one per token
    likely: list[str]   # what hovering shows, one per token


@torch.no_grad()
def look(model, tokenizer, title: str, plain: list[int], guided: list[int], ids: list[int],
         temperature: float) -> Target:
    """d_t of a completion `ids` after the prompt without and with the strategy, and the likeliest tokens."""
    logits = [model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].float() / temperature
              for prompt in (guided, plain)]
    best = []
    for name, z in zip(("with", "without"), logits):
        p, top = z.softmax(-1).topk(5)
        best.append([])
        for values, ids_of_five in zip(p.tolist(), top.tolist()):
            five = [f"{x:.3f} {tokenizer.decode(i)!r}" for x, i in zip(values, ids_of_five)]
            best[-1].append("\n".join([f"{name} the strategy:", *five]))
    return Target(title, [tokenizer.decode(i) for i in ids], sgpo.forward_kl(*logits).tolist(),
                  ["\n".join(both) for both in zip(*best)])


HEAD = """<!doctype html><meta charset=utf-8><title>SGPO: what is distilled</title>
<style>body {max-width: 60em; margin: 2em auto; font: 16px/1.8 monospace; background: #fff; color: #222}
pre {white-space: pre-wrap} .out {outline: 2px solid #36c}</style>
"""


def page(targets: list[Target], delta: float) -> str:
    """A self-contained page; all text in it is escaped."""
    parts = [HEAD, "<p>Darker: a larger KL from the guided to the unguided distribution. "
             f"Framed: above delta = {delta:g}, left out of the loss. Hover for the likeliest tokens."]
    for target in targets:
        parts.append(f"<h3>{html.escape(target.title)}</h3><pre>")
        for token, d, likely in zip(target.tokens, target.d, target.likely, strict=True):
            out, shade = " class=out" if d > delta else "", min(d / 2, 1)
            hover, token = html.escape(f"d = {d:.4f}\n{likely}"), html.escape(token)
            look = f'style="background: rgba(224, 96, 44, {shade:.3f})" title="{hover}"'
            parts.append(f"<span{out} {look}>{token}</span>")
        parts.append("</pre>")
    return "".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--n", type=int, default=8, help="targets, of as many problems; the last ones")
    parser.add_argument("--model", help="whose distributions (default: the run's own, after training)")
    parser.add_argument("--out", default="tokens.html")
    options = parser.parse_args()
    args = sgpo.Args(**json.loads((options.run / "config.json").read_text())["flags"])
    name = options.model or str(options.run / "model")
    tokenizer = common.load_tokenizer(name)
    model = common.load_model(name, "--model", torch.float32, "cpu")
    train, _ = common.load_problems(args, tokenizer)
    path = Path(args.strategies or options.run / "strategies.jsonl")
    sgpo.adopt_strategies(train, [], path, sgpo.guided_prompt_fits(tokenizer, args), args)
    rows, found = {row["id"]: row for row in train}, {}
    for _, sample in reversed(list(common.read_jsonl(options.run / "samples.jsonl"))):
        row = rows.get(sample["id"], {})
        if len(found) < options.n and sample.get("guided") and sample["reward"] >= 0.5 and "strategy" in row:
            found.setdefault(row["id"], (row, sample["completion"]))
    targets = []
    for row, text in found.values():
        prompts = [common.build_prompt(tokenizer, row["problem"], args.system_prompt, strategy)
                   for strategy in (None, row["strategy"])]
        ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        title = f"{row['problem']} ({row['strategy']})"
        targets.append(look(model, tokenizer, title, *prompts, ids, args.temperature))
    Path(options.out).write_text(page(targets, args.delta))
    print(f"{len(targets)} targets: {options.out}")
