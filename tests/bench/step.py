"""Compare a training step with TRL 1.16's: same model, problems, reward and settings, in turn.

    python tests/bench/step.py                       # on a CPU: CPU seconds at one thread
    python tests/bench/step.py --config qwen1.5b     # on a GPU: random weights, wall-clock seconds

Contestants, each in a process of its own, whose peak memory is measured:
    grpo        grpo_baseline.py
    trl         GRPOTrainer with its defaults
    trl-lean    GRPOTrainer without activation checkpointing, on a CPU with one micro-batch
    sgpo        sgpo.py, a third of the samples guided
    sdpo        SDPOTrainer, the nearest relative: alpha 0 (forward KL), full logits, the live model as its
                teacher, weight 0.5, the strategy as its privileged context

grpo and trl compute the same loss. sgpo and sdpo do not, though they sample equally many completions. Only
sgpo samples with the strategy in the prompt, scores the correct guided samples, distils one target per
problem, weighs it by alpha(q), masks outliers, and skips what has no gradient. Only sdpo distils all of its
own samples, right and wrong, and keeps student and teacher logits of whole micro-batches in memory.
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
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass
class Config:
    vocabulary: int
    prompts: int = 4     # problems per step
    samples: int = 8     # completions per problem
    tokens: int = 128    # longest completion
    mean: float = 0      # mean length before completions are cut off at `tokens`; 0: all are cut off
    dead: bool = False   # every other problem gives all its samples the same reward
    hidden: int = 256
    inner: int = 1024
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    tied: bool = True    # the head shares the embedding's table


CONFIGS = {
    # on a CPU
    "toy": Config(272, 2, 6, 16, 6, hidden=32, inner=64, layers=2, heads=4),
    "32k": Config(32_000),
    "152k": Config(151_936, prompts=2, tokens=64),
    "natural": Config(272, tokens=256, mean=80),
    "half-dead": Config(272, tokens=256, mean=80, dead=True),
    # on a GPU: the shapes of Qwen2.5
    "qwen0.5b": Config(151_936, 8, 12, 1024, 400, False, 896, 4864, 24, 14, 2),
    "qwen1.5b": Config(151_936, 8, 12, 1024, 400, False, 1536, 8960, 28, 12, 2),
    "qwen3b": Config(151_936, 8, 12, 1024, 400, False, 2048, 11008, 36, 16, 2),
    "qwen7b": Config(152_064, 8, 12, 1024, 400, False, 3584, 18944, 28, 28, 4, False),
}
SDPO = {  # TRL's settings that come nearest to SGPO
    "distillation_alpha": 0.0, "distillation_mode": "full_logits", "distillation_weight": 0.5,
    "distillation_is_clip": None, "teacher_model_kind": "live", "use_successful_as_teacher": False,
    "include_environment_feedback": True, "feedback_template": "{feedback_raw}",
    "reprompt_template": "Strategy:\n{feedback}\n\nProblem:\n{prompt}{solution}"}
RATIOS = {"trl": "grpo", "trl-lean": "grpo", "sdpo": "sgpo"}  # contestant -> ours, which it is compared with
REWARD = '''import random


def pays(response, row):
    """Noise, so that no group is dead by chance, and 0 if the problem says that it is dead."""
    return 0.0 if "dead" in row["problem"] else random.random()
'''


# ---------------------------------------------------------------- model and problems

def build(config: Config, folder: Path) -> None:
    """Write a Qwen2 with random weights, problems and a reward.

    On a GPU the model is saved in bf16, because 7B in fp32 would be 30 GB.
    """
    import torch
    from conftest import small_tokenizer, write_jsonl
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import common
    torch.manual_seed(0)
    tokenizer = small_tokenizer(chat_template=None)
    with common.DEVICE:
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.inner,
            num_hidden_layers=config.layers, num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads, max_position_embeddings=4096,
            tie_word_embeddings=config.tied, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None)).eval()
    model.to(torch.bfloat16 if common.ON_GPU else torch.float32)
    fix_end_probability(model, tokenizer.eos_token_id, 1 / config.mean if config.mean else 1e-9)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = [{"problem": f"What is {i} plus {i}" + " plus one" * (i % 10) + "?", "answer": str(i),
                 "strategy": "Problem type: sum. Strategy: add up. Steps: from left to right."}
                for i in range(64)]
    for step in range(1, 17 if config.dead else 1):  # half of the problems of each step
        for problem in common.problems_of_step(problems, step, config.prompts, seed=0)[::2]:
            problem["problem"] += " (dead)"
    write_jsonl(folder / "rows.jsonl", problems)
    (folder / "reward.py").write_text(REWARD)


def fix_end_probability(model, end: int, wanted: float) -> None:
    """Give the end token the same probability at every position, so that lengths differ as natural ones do.

    The first coordinate of every embedding is 1 and no layer writes there. The end token's row of the head
    has nothing but this coordinate, so its logit hardly depends on what was written.
    """
    import torch
    with torch.no_grad():
        head = model.get_output_embeddings().weight                        # [V, d]
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0.0
        head[end] = 0.0
        head[:, 0] = 1.0
        model.get_input_embeddings().weight[:, 0] = 1.0
        ids = torch.randint(0, len(head), (4, 64), device=model.device)
        hidden = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)  # [256, d]
        now = (hidden @ head.T).float().softmax(-1)[:, end].mean()
        odds = wanted / (1 - wanted) * (1 - now) / now
        head[end, 0] += odds.log() / hidden[:, 0].mean()


# ---------------------------------------------------------------- contestants

def seconds() -> float:
    """Return the CPU seconds of this process, or on a GPU the wall-clock time."""
    import torch

    import common
    if not common.ON_GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def run_ours(name: str, config: Config, folder: Path, steps: int, *flags) -> list[dict]:
    """Run a script of ours and return a row for every step: seconds, tokens, and samples of each pass.

    The first step is a short one, to warm up. The model that a run saves at its end is left out.
    """
    import torch
    script = importlib.import_module(name)
    rollout, update, microbatches = script.rollout, script.update, script.microbatches
    rows = []

    def timed_rollout(model, tokenizer, prompts, temperature, args, *more):
        start = seconds()
        if not rows:
            args = replace(args, max_new_tokens=min(args.max_new_tokens, 32))
        ro = rollout(model, tokenizer, prompts, temperature, args, *more)
        rows.append({"start": start, "rollout": seconds() - start, "passes": [], "lengths": ro.lengths(),
                     "written": ro.mask.sum(1).tolist(), "tokens": ro.mask.sum().item()})
        return ro

    def timed_update(*args):
        metrics = update(*args)
        rows[-1]["total"] = seconds() - rows[-1]["start"]
        rows[-1]["padding"] = metrics.get("padding_frac", 0.0)
        return metrics

    def recorded_microbatches(idx, lengths, max_tokens):
        rows[-1]["passes"] += [(i, lengths[i], torch.is_grad_enabled()) for i in idx]
        return microbatches(idx, lengths, max_tokens)

    script.rollout, script.update, script.microbatches = timed_rollout, timed_update, recorded_microbatches
    script.Run.finish = lambda *args: None
    argv = ["--model", folder / "model", "--dataset", folder / "rows.jsonl", "--steps", steps,
            "--reward", f"{folder}/reward.py:pays", "--prompts_per_step", config.prompts,
            "--group_size", config.samples, "--max_new_tokens", config.tokens, "--top_p", 1.0,
            "--warmup_frac", 0, "--system_prompt", "", "--save_every", 0, "--eval_every", 0,
            "--out", folder / f"run-{name}-{os.getpid()}-{time.time()}"]
    if name == "sgpo":
        guided = config.samples // 3
        argv += ["--group_size", config.samples - guided, "--guided_group_size", guided]
    if name == "tgpo":
        argv += ["--teacher", folder / "model"]
    sys.argv = [f"{name}.py", *map(str, [*argv, *flags])]
    script.main()
    return rows


def run_trl(name: str, config: Config, folder: Path, steps: int) -> list[dict]:
    """Run a trainer of TRL with `generate` and return the same rows."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback, set_seed

    import common
    set_seed(0)
    sys.path.insert(0, str(folder))
    from reward import pays
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    completions_per_step = config.prompts * config.samples
    batch = max(size for size in range(1, 9) if completions_per_step % size == 0)
    if name == "trl-lean" and not common.ON_GPU:
        batch = completions_per_step
    rows = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            rows.append({"start": seconds(), "rollout": 0.0})

        def on_step_end(self, *args, **kwargs):
            rows[-1]["total"] = seconds() - rows[-1]["start"]

    def reward(prompts, completions, **columns):
        return [pays(text, {"problem": prompt}) for prompt, text in zip(prompts, completions)]

    settings = {
        "output_dir": str(folder / "trl"),
        "max_steps": steps,
        "learning_rate": 1e-6,
        "weight_decay": 0.01,
        "num_generations": config.samples,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": completions_per_step // batch,
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "max_completion_length": config.tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "loss_type": "grpo",
        "bf16": common.ON_GPU,
        "use_cpu": not common.ON_GPU,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 0,
        "disable_tqdm": True,
    }
    if name == "trl-lean":
        settings["gradient_checkpointing"] = False
    if name == "sdpo":
        from trl.experimental.sdpo import SDPOConfig as Settings
        from trl.experimental.sdpo import SDPOTrainer as Trainer
        settings |= SDPO
    else:
        from trl import GRPOConfig as Settings
        from trl import GRPOTrainer as Trainer
    problems = common.load_problems(str(folder / "rows.jsonl"))
    prompts = [tokenizer.decode(common.build_prompt(tokenizer, p["problem"], "")) for p in problems]
    data = {"prompt": prompts, "privileged_context": [p["strategy"] for p in problems]}
    trainer = Trainer(model=str(folder / "model"), processing_class=tokenizer, args=Settings(**settings),
                      train_dataset=Dataset.from_dict(data), reward_funcs=reward, callbacks=[Clock()])
    generate_name = "_generate" if name == "sdpo" else "_generate_single_turn"
    generate = getattr(trainer, generate_name)

    def timed_generate(*args, **kwargs):
        start = seconds()
        answer = generate(*args, **kwargs)
        rows[-1]["rollout"] += seconds() - start
        return answer

    setattr(trainer, generate_name, timed_generate)
    trainer.train()
    for row, log in zip(rows, trainer.state.log_history):
        row["tokens"] = log["completions/mean_length"] * completions_per_step
    return rows


# ---------------------------------------------------------------- comparison

def child(who: str, name: str, folder: Path, steps: int) -> None:
    """Run one contestant in this process, or `build`; print its steps but the first, and its peak memory."""
    import common
    config = CONFIGS[name]
    if who == "build":
        build(config, folder)
        return
    if who in RATIOS:
        rows = run_trl(who, config, folder, steps)
    else:
        rows = run_ours({"grpo": "grpo_baseline"}.get(who, who), config, folder, steps)
    kept = [{key: row[key] for key in ("total", "rollout", "tokens")} for row in rows[1:]]
    print(json.dumps({"steps": kept, "peak": common.peak_memory_gb()}))


def in_a_process(*words: str) -> dict:
    """Run this file as a child and return what its last line says."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, __file__, "--child", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def summary(parts: list[dict]) -> dict[str, float]:
    """Return the medians over the steps of all repeats."""
    steps = [step for part in parts for step in part["steps"]]
    return {
        "step s": statistics.median(step["total"] for step in steps),
        "rollout s": statistics.median(step["rollout"] for step in steps),
        "training s": statistics.median(step["total"] - step["rollout"] for step in steps),
        "step ms per token": statistics.median(1000 * step["total"] / step["tokens"] for step in steps),
        "peak GB": statistics.median(part["peak"] for part in parts),
    }


def compare(name: str, steps: int, repeats: int, contestants: list[str]) -> dict[str, dict[str, float]]:
    """Return the medians of each contestant; they take turns. Without trl only ours run."""
    if not importlib.util.find_spec("trl"):
        contestants = [who for who in contestants if who not in RATIOS]
    with tempfile.TemporaryDirectory() as folder:
        in_a_process("build", name, folder, "0")  # a process begins with its parent's memory as its peak
        parts = {who: [] for who in contestants}
        for _ in range(repeats):
            for who in contestants:
                parts[who].append(in_a_process(who, name, folder, str(steps)))
    return {who: summary(measured) for who, measured in parts.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the medians and the ratios, ours over theirs, as a Markdown table."""
    names = list(next(iter(results.values())))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for who, values in results.items():
        lines.append(f"| {who} | {' | '.join(f'{value:.3g}' for value in values.values())} |")
    for theirs, ours in RATIOS.items():
        if theirs in results and ours in results:
            ratios = [f"{results[ours][name] / results[theirs][name]:.2f}" for name in names]
            lines.append(f"| {ours} / {theirs} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=CONFIGS,
                        default=["32k", "152k", "natural", "half-dead"])
    parser.add_argument("--steps", type=int, default=5, help="steps of a process; the first is not counted")
    parser.add_argument("--repeats", type=int, default=2, help="how often the contestants take turns")
    parser.add_argument("--contestants", nargs="+", default=["grpo", "trl", "trl-lean", "sgpo", "sdpo"])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        who, name, folder, steps = args.child
        child(who, name, Path(folder), int(steps))
    else:
        for name in args.config:
            results = compare(name, args.steps, args.repeats, args.contestants)
            print(f"\n{name}\n\n{table(results)}", flush=True)
