"""What SGPO and TGPO add to a GRPO step, on the model of step.py's "natural" or on --config's.

    python tests/bench/methods.py

SGPO: whole steps of 8 + 4 guided samples against GRPO's of 12, each script in a process of its own, in turn. TGPO: updates on the same rollouts with
and without a teacher as large as the student; what it takes more is given in passes of the teacher without gradient over the same rows.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from step import CPU, CUDA, build, in_a_process, machine, ours, peak, seconds, summary  # sets the path, too


def updates(config, folder: Path, repeats: int) -> dict:
    """Seconds of TGPO's update with the teacher and without it (which is GRPO's), and of the teacher's passes alone."""
    import torch

    import common
    import tgpo
    sys.argv = ["tgpo.py"]
    args = tgpo.Args(model=str(folder / "model"), teacher=str(folder / "model"), prompts_per_step=config.prompts, group_size=config.samples, max_new_tokens=config.tokens)
    tgpo.check_args(args)
    tokenizer = common.load_tokenizer(args.model)
    model = common.load_policy(args.model)
    eos, optimizer = common.stop_ids(model, tokenizer), torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    teacher = tgpo.load_teacher(args, tokenizer, tokenizer, len(tokenizer), eos)
    watch = type("Watch", (), {"agreed": lambda self: False})()
    prompts = [common.build_prompt(tokenizer, row["problem"], "") for row in common.load_rows(str(folder / "rows.jsonl"))[:config.prompts] for _ in range(config.samples)]
    with common.rollout_weights(model) as fast:
        ro = tgpo.rollout(fast, tokenizer, prompts, eos, args, 1.0)
    advantages = torch.randn(len(prompts))  # every row has a gradient with and without the teacher

    def timed(work) -> float:
        began = seconds()
        work()
        return seconds() - began

    rows = []
    for _ in range(repeats + 1):
        args.guidance = "none"
        row = {"grpo": timed(lambda: tgpo.update(model, optimizer, ro, advantages, None, 0.0, args, watch))}
        args.guidance = "tgpo"
        row["tgpo"] = timed(lambda: tgpo.update(model, optimizer, ro, advantages, teacher, 0.002, args, watch))
        row["forward"] = timed(lambda: teacher.advise(ro, list(range(len(prompts))), args))
        rows.append(row | {"forwards": (row["tgpo"] - row["grpo"]) / row["forward"]})
    return {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="natural", help=f"of {', '.join([*CPU, *CUDA])}")
    parser.add_argument("--steps", type=int, default=6, help="a process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="how often the scripts take turns")
    parser.add_argument("--out", default="bench-methods.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        script, name, folder, steps = args.child
        config, folder = {**CPU, **CUDA}[name], Path(folder)
        if script == "tgpo":
            result = updates(config, folder, int(steps))
        else:
            sizes = ["--group_size", 8, "--guided_group_size", 4] if script == "sgpo" else ["--group_size", 12]
            result = {"steps": ours(config, folder, int(steps), script, sizes)[1:], "peak": peak()}
        print(json.dumps(result))
        return
    import common
    parts = {"grpo_baseline": [], "sgpo": [], "tgpo": []}
    with tempfile.TemporaryDirectory() as folder:
        build({**CPU, **CUDA}[args.config], Path(folder))
        for _ in range(args.repeats):
            for script, found in parts.items():
                found.append(in_a_process(script, args.config, folder, str(args.steps), file=__file__))
    grpo, sgpo = summary(parts["grpo_baseline"]), summary(parts["sgpo"])
    tgpo = {key: statistics.median(part[key] for part in parts["tgpo"]) for key in parts["tgpo"][0]}
    common.say_table([["", "s a step", "rollout", "train", "tokens", "peak MB"], *[
        [name, *(f"{r[k]:.2f}" for k in ("total", "rollout", "train")), f"{r['real']:.0f}", f"{r['peak'] / 1e6:.0f}"] for name, r in (("GRPO, 12 samples", grpo), ("SGPO, 8 + 4", sgpo))]])
    print(f"SGPO / GRPO: {sgpo['total'] / grpo['total']:.3f} a step, {sgpo['total per real token'] / grpo['total per real token']:.3f} a token, "
          f"memory {sgpo['peak'] / grpo['peak']:.3f}")
    print(f"TGPO's update {tgpo['tgpo']:.2f} s, GRPO's {tgpo['grpo']:.2f} s, the teacher's passes {tgpo['forward']:.2f} s: GRPO's plus {tgpo['forwards']:.2f} of those")
    Path(args.out).write_text(json.dumps({"machine": machine(), "config": args.config, "grpo": grpo, "sgpo": sgpo, "tgpo": tgpo}, indent=2) + "\n")


if __name__ == "__main__":
    main()
