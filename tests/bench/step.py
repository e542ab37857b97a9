"""A step of grpo_baseline.py against one of TRL's GRPOTrainer: same model, problems, reward and settings, in
turn.

    python tests/bench/step.py                      # on a CPU: CPU seconds at one thread
    python tests/bench/step.py --config qwen1.5b    # on CUDA: random weights, wall seconds

Each contestant runs in a process of its own, whose peak memory counts. `trl` has TRL's defaults, `trl lean`
its better settings (no activation checkpointing, micro-batches as large as ours). Without trl the project is
alone.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass
class Config:
    vocabulary: int
    prompts: int = 4     # problems a step
    samples: int = 8     # completions a problem
    tokens: int = 128    # longest completion
    mean: float = 0      # mean length before it is cut off at `tokens`; 0: all as long as that
    dead: bool = False   # every other problem pays all its samples alike
    hidden: int = 256
    inner: int = 1024
    layers: int = 4
    heads: int = 8
    kv: int = 2
    tied: bool = True    # does the head share the embedding's table?


CONFIGS = {"32k": Config(32_000), "152k": Config(151_936, prompts=2, tokens=64),
           "natural": Config(272, tokens=256, mean=80),
           "half dead": Config(272, tokens=256, mean=80, dead=True)}
# Qwen2.5's shapes
ON_CUDA = {"qwen0.5b": Config(151_936, 8, 12, 1024, 400, False, 896, 4864, 24, 14, 2),
           "qwen1.5b": Config(151_936, 8, 12, 1024, 400, False, 1536, 8960, 28, 12, 2),
           "qwen3b": Config(151_936, 8, 12, 1024, 400, False, 2048, 11008, 36, 16, 2),
           "qwen7b": Config(152_064, 8, 12, 1024, 400, False, 3584, 18944, 28, 28, 4, False)}
TOYS = {"toy": Config(272, 2, 3, 16, 6, False, 32, 64, 2, 4, 2),
        "toy, untied": Config(272, 2, 3, 16, 6, False, 32, 64, 2, 4, 2, False)}
ALL = CONFIGS | ON_CUDA | TOYS
REWARD = '''import random
def pays(response, row):
    """Noise, so that no group is dead by chance; nothing where the problem says so."""
    return 0.0 if "dead" in row["problem"] else random.random()
'''


def build(config: Config, folder: Path) -> None:
    """A Qwen2 of random weights whose chance to end is the same at every token; problems and reward beside
    it. On a GPU it is saved in bf16: 7B in fp32 would be 30 GB.

    The first coordinate of every embedding is large and the same, no layer writes there, and the end token's
    row of the head has nothing else: so its logit is about the same everywhere, whatever was written.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import common
    from conftest import small_tokenizer, write_rows
    torch.manual_seed(0)
    tokenizer = small_tokenizer(chat=False)
    end = tokenizer.eos_token_id
    with common.HOME:
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.inner,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv,
            max_position_embeddings=4096, tie_word_embeddings=config.tied, eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None)).eval()
    model.to(torch.bfloat16 if common.ON_GPU else torch.float32)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
        head[end] = 0.0
        model.get_input_embeddings().weight[:, 0] = head[:, 0] = 1.0
        ids = torch.randint(0, config.vocabulary, (4, 64), device=model.device)
        hidden = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
        now = (hidden @ head.T).float().log_softmax(-1)[:, end].exp().mean().item()
        wanted = 1 / config.mean if config.mean else 1e-9
        head[end, 0] += torch.tensor(wanted / (1 - wanted) * (1 - now) / now).log() / hidden[:, 0].mean()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = "one two three four five six seven eight nine ten".split()
    drawn = [i for step in range(1, 17) for i in common.batch_of_step(list(range(64)), step, 4, seed=0)]
    dead = drawn[::2] if config.dead else []  # half of the problems of each step
    write_rows(folder / "rows.jsonl", [
        {"problem": f"What is {i} plus {' plus '.join(words[:1 + i % 10])}?" + " (dead)" * (i in dead),
         "answer": str(i), "strategy": "Problem type: sum. Strategy: add up. Steps: from left to right."}
        for i in range(64)])
    (folder / "reward.py").write_text(REWARD)


def seconds() -> float:
    """CPU seconds of this process, or on CUDA wall time."""
    import torch

    import common
    if not common.ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ours(config: Config, folder: Path, steps: int, script="grpo_baseline", flags=(),
         watch=lambda what: nullcontext()) -> list[dict]:
    """Run a script, but for what it saves at its end -> a row for every step: seconds, tokens, passes.

    The first step is a short one, to warm up. `watch("rollout")` and `watch("update")` are entered around the
    others'.
    """
    import torch
    script, rows = importlib.import_module(script), []
    rollout, update, microbatches = script.rollout, script.update, script.microbatches

    def timed_rollout(*rest):
        *rest, args = rest
        args = args if rows else replace(args, max_new_tokens=min(args.max_new_tokens, 32))
        with watch("rollout") if rows else nullcontext():
            began = seconds()
            ro = rollout(*rest, args)
            rows.append({"began": began, "rollout": seconds() - began, "passes": [],
                         "written": ro.mask.sum(1).tolist(), "lengths": ro.lengths()})
        return ro

    def timed_update(*args):
        with watch("update") if rows[1:] else nullcontext():
            began = seconds()
            metrics = update(*args)
            rows[-1] |= {"total": seconds() - rows[-1].pop("began"), "train": seconds() - began,
                         "real": sum(rows[-1]["lengths"]), "padding": metrics.get("padding_frac", 0.0)}
        return metrics

    def seen_microbatches(chosen, lengths, *more):
        rows[-1]["passes"] += [(i, lengths[i], torch.is_grad_enabled()) for i in chosen]
        return microbatches(chosen, lengths, *more)

    script.rollout, script.update, script.microbatches = timed_rollout, timed_update, seen_microbatches
    script.Run.finish = lambda self: None
    sys.argv = [f"{script.__name__}.py", *map(str, (
        "--model", folder / "model", "--dataset", folder / "rows.jsonl", "--reward",
        f"{folder}/reward.py:pays", "--steps", steps, "--prompts_per_step", config.prompts, "--group_size",
        config.samples, "--max_new_tokens", config.tokens, "--top_p", 1.0, "--warmup_frac", 0,
        "--system_prompt", "", "--save_every", 0, "--eval_every", 0, "--out",
        folder / f"run-{os.getpid()}-{time.time()}", *flags))]
    script.main()
    return rows


def theirs(config: Config, folder: Path, steps: int, lean: bool) -> list[dict]:
    """TRL with `generate` -> the same rows."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    import common
    set_seed(0)
    sys.path.insert(0, str(folder))
    from reward import pays
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    problems = common.load_rows(str(folder / "rows.jsonl"))
    prompts = [tokenizer.decode(common.build_prompt(tokenizer, row["problem"], "")) for row in problems]
    rows, N, on_gpu = [], config.prompts * config.samples, common.ON_GPU
    batch = min(N, 8) if on_gpu or not lean else N

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            rows.append({"began": seconds(), "rollout": 0.0, "real": 0})

        def on_step_end(self, *args, **kwargs):
            rows[-1]["total"] = seconds() - rows[-1].pop("began")
            rows[-1]["train"] = rows[-1]["total"] - rows[-1]["rollout"]

    class Timed(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            began = seconds()
            out = super()._generate_single_turn(*args, **kwargs)
            rows[-1]["rollout"] += seconds() - began
            return out

        def _compute_loss(self, model, inputs):
            rows[-1]["real"] += (inputs["completion_mask"].sum() + inputs["prompt_mask"].sum()).item()
            return super()._compute_loss(model, inputs)

    def reward(prompts, completions, **_):
        return [pays(c, {"problem": p}) for p, c in zip(prompts, completions)]

    settings = GRPOConfig(
        output_dir=str(folder / "trl"), max_steps=steps, learning_rate=1e-6, num_generations=config.samples,
        per_device_train_batch_size=batch, gradient_accumulation_steps=N // batch, beta=0.0, epsilon=0.2,
        epsilon_high=0.28, max_completion_length=config.tokens, temperature=1.0, top_p=1.0, loss_type="grpo",
        weight_decay=0.01, bf16=on_gpu, use_cpu=not on_gpu, report_to=[], save_strategy="no", seed=0,
        disable_tqdm=True, **({"gradient_checkpointing": False} if lean else {}))
    Timed(model=str(folder / "model"), processing_class=tokenizer, callbacks=[Clock()], args=settings,
          train_dataset=Dataset.from_dict({"prompt": prompts}), reward_funcs=reward).train()
    return rows


def child(who: str, name: str, folder: Path, steps: int) -> None:
    """One contestant, in this process: its steps but the first, and its peak, as the last line of stdout.

    Or `build`: the model, which takes memory, too.
    """
    import common
    config = ALL[name]
    if who == "build":
        build(config, folder)
        return print("{}")
    rows = ours(config, folder, steps) if who == "ours" else theirs(config, folder, steps, who == "trl lean")
    rows = [{key: row[key] for key in ("rollout", "train", "total", "real")} for row in rows[1:]]
    print(json.dumps({"steps": rows, "peak": common.peak_memory_gb() * 2 ** 30}))


def in_a_process(*call: str) -> dict:
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, __file__, "--child", *call],
                          capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "died without a word").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def summary(parts: list[dict]) -> dict:
    """Medians over the steps of all repeats."""
    steps = [{**step, **{f"{k}, a token": step[k] / step["real"] for k in ("total", "train")}}
             for part in parts for step in part["steps"]]
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]} | {
        "peak": statistics.median(part["peak"] for part in parts)}


def compare(name: str, steps: int, repeats: int, contestants: list[str]) -> dict[str, dict]:
    """The medians of each contestant; they take turns. Without trl only ours."""
    contestants = contestants if importlib.util.find_spec("trl") else ["ours"]
    with tempfile.TemporaryDirectory() as folder:
        in_a_process("build", name, folder, "0")  # a process begins with its parent's memory as its peak
        parts = {who: [] for who in contestants}
        for _ in range(repeats):
            for who in contestants:
                parts[who].append(in_a_process(who, name, folder, str(steps)))
    return {who: summary(some) for who, some in parts.items()}


def main() -> None:
    import common
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="*", help=f"of {', '.join(ALL)}; default: the device's")
    parser.add_argument("--steps", type=int, default=5, help="a process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="how often the contestants take turns")
    parser.add_argument("--contestants", nargs="*", default=["ours", "trl", "trl lean"])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, name, folder, steps = args.child
        return child(who, name, Path(folder), int(steps))
    keys = ("total", "rollout", "train", "total, a token", "train, a token", "peak")
    for name in args.config or (["qwen0.5b", "qwen1.5b"] if common.ON_GPU else CONFIGS):
        found = compare(name, args.steps, args.repeats, args.contestants)
        print(f"\n{name}")
        common.say_table([["", "s a step", "rollout", "train", "tokens", "peak MB"], *[
            [who, *(f"{r[k]:.2f}" for k in keys[:3]), f"{r['real']:.0f}", f"{r['peak'] / 1e6:.0f}"]
            for who, r in found.items()]])
        common.say_table([["ours / ...", *keys], *[
            [who, *(f"{found['ours'][k] / r[k]:.2f}" for k in keys)] for who, r in found.items()]])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
