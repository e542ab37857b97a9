"""GRPO (Group Relative Policy Optimization): the baseline that sgpo.py and tgpo.py are measured against.

For every problem the model writes a group of solutions; a verifier gives each a reward; a solution's advantage is how much
better it did than its group; tokens of better solutions are made likelier by a clipped policy gradient (Eq. 1).
No value network, no KL to a reference model.

    python grpo_baseline.py                                          # the built-in demo: CPU, offline, minutes
    python grpo_baseline.py --model Qwen/Qwen2.5-1.5B-Instruct       # real problems

Papers: DeepSeekMath (arXiv 2402.03300); unequal clipping bounds and loss_type dapo: DAPO (2503.14476); dr_grpo: 2503.20783.
"""
import math
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from common import (DEFAULT_DATASET, SYSTEM_PROMPT, Run, Watch, batch_of_step, build_prompt, check_context, check_flags, clip_gradients,
                    completion_logps, completion_mask, dealt, demo_recipe, everyones, gathered, generate, grader_counts, in_step, load_policy,
                    load_problems, load_reward, load_tokenizer, microbatches, parse_args, peak_memory_gb, printable, progress, refuse,
                    rollout_weights, say_plan, say_table, score, seed_everything, sft_warmup, start_processes, stop_ids, summed, usable_rows,
                    warmup_split, within_memory)

# Letters: B problems of a step, G samples a problem, N rows (problems x samples), P prompt, C completion, V vocabulary.


# ---------------------------------------------------------------- flags

@dataclass
class Args:
    model: str = HfArg(default="demo", help="hub id or local directory; demo: the built-in tiny model")
    dataset: str = HfArg(default=None, help=f"JSONL, parquet or hub data set of problems (default: the demo's own, else {DEFAULT_DATASET})")
    eval_dataset: str = HfArg(default=None, help="held-out problems, same layouts (the demo has its own)")
    out: str = HfArg(default=None, help="run directory (default: a new one under runs/)")
    resume: bool = HfArg(default=False, help="go on with the run in --out from its newest checkpoint")
    max_rows: int = HfArg(default=8500, help="rows drawn from a larger data set, by the seed; 0: all")
    dry_run: bool = HfArg(default=False, help="print the plan and stop")
    seed: int = HfArg(default=0, help="seed of everything: problem order and sampling")
    reward: str = HfArg(default=None, help="own reward, FILE.py:function of (response, row); default: the math grader")
    system_prompt: str = HfArg(default=SYSTEM_PROMPT, help="system message; empty for none")
    # SFT warm-up
    warmup_frac: float = HfArg(default=0.33, help="share of the problems with a solution that are for the SFT warm-up, not for RL; 0: none")
    warmup_lr: float = HfArg(default=1e-5, help="its AdamW learning rate, at its highest")
    warmup_batch_size: int = HfArg(default=64, help="its solutions a step")
    warmup_epochs: int = HfArg(default=10, help="its epochs; the one with the lowest validation loss is kept")
    # rollouts
    steps: int = HfArg(default=400, help="training steps, one rollout batch each; 0: the SFT baseline")
    prompts_per_step: int = HfArg(default=16, help="problems a step")
    group_size: int = HfArg(default=12, help="samples a problem; as many as SGPO's 8 + 4")
    max_new_tokens: int = HfArg(default=2048, help="longest completion, in tokens")
    max_prompt_tokens: int = HfArg(default=1024, help="rows with a longer prompt are dropped")
    temperature: float = HfArg(default=1.0, help="sampling temperature; also divides the logits of the loss")
    top_p: float = HfArg(default=0.95, help="nucleus sampling")
    fast_rollout: str = HfArg(default="auto", help="off: transformers' generate; auto: a faster loop for model types tested with it; on: also a CUDA graph")
    # objective
    clip_low: float = HfArg(default=0.2, help="ratio clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.28, help="ratio clipped above 1 + clip_high")
    loss_type: str = HfArg(default="grpo", help="grpo: mean over a row's tokens, then rows; dapo: over all tokens; dr_grpo: sum / (rows x max_new_tokens)")
    scale_rewards: str = HfArg(default="group", help="divide centred rewards by the std of the group, of the batch, or none")
    # update
    lr: float = HfArg(default=1e-6, help="AdamW learning rate, constant after the warm-up")
    lr_warmup_steps: int = HfArg(default=0, help="steps of linear learning rate warm-up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradient norm clipped to this")
    updates_per_rollout: int = HfArg(default=1, help="optimizer steps a rollout batch, each on its share of the problems")
    microbatch_tokens: int = HfArg(default=16384, help="padded tokens a forward pass; lower it when memory is short")
    activation_checkpointing: bool = HfArg(default=None, help="recompute activations in backward: less memory, a third more time (default: if memory asks)")
    cpu_offload: bool = HfArg(default=None, help="weights, gradients and optimizer rest in CPU memory: slower (default: if the GPU is too small without)")
    # evaluation and saving
    eval_every: int = HfArg(default=50, help="steps between held-out evaluations; 0: only first and last")
    eval_samples: int = HfArg(default=4, help="samples a held-out problem")
    eval_batch_size: int = HfArg(default=192, help="completions sampled at once in an evaluation")
    eval_temperature: float = HfArg(default=0.6, help="sampling temperature of the evaluation (the paper's)")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0: only the last")
    keep_checkpoints: int = HfArg(default=2, help="newest checkpoints kept")


def check_args(args: Args) -> None:
    check_flags(args, dict(steps=0, prompts_per_step=1, group_size=2, max_new_tokens=1, max_prompt_tokens=1, clip_low=0, clip_high=0, lr=0,
                           lr_warmup_steps=0, weight_decay=0, max_grad_norm=0, updates_per_rollout=1, microbatch_tokens=1, eval_every=0,
                           eval_samples=1, eval_batch_size=1, eval_temperature=0, save_every=0, keep_checkpoints=1, seed=0,
                           max_rows=0, warmup_frac=0, warmup_lr=0, warmup_batch_size=1, warmup_epochs=1))
    if args.warmup_frac > 1:
        refuse(f"--warmup_frac is {args.warmup_frac}; it is a share, from 0 to 1")
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        refuse(f"--temperature must be above 0 and --top_p in (0, 1], not {args.temperature} and {args.top_p}")
    if args.loss_type not in ("grpo", "dapo", "dr_grpo"):
        refuse(f"--loss_type {args.loss_type}: choose grpo, dapo or dr_grpo")
    if args.scale_rewards not in ("group", "batch", "none"):
        refuse(f"--scale_rewards {args.scale_rewards}: choose group, batch or none")
    if args.fast_rollout not in ("auto", "on", "off"):
        refuse(f"--fast_rollout {args.fast_rollout}: choose auto, on or off")
    if args.updates_per_rollout > args.prompts_per_step:
        refuse(f"--updates_per_rollout {args.updates_per_rollout} needs at least as many --prompts_per_step, not {args.prompts_per_step}")


# ---------------------------------------------------------------- rollout

@dataclass
class Rollout:
    prompts: list[list[int]]  # N prompts as they were sampled from, unpadded
    completions: Tensor       # [N, C] token ids as sampled, never decoded and tokenised again
    mask: Tensor              # [N, C] True up to and including the first end token
    truncated: Tensor         # [N] True where no end token came
    texts: list[str]          # N


def rollout(model, tokenizer, prompts: list[list[int]], eos: list[int], args: Args, temperature: float, watch=None) -> Rollout:
    """Sample one completion for every prompt, all in one call."""
    if watch is not None:
        watch.rolling_out()
    completions = generate(model, prompts, eos, tokenizer.pad_token_id, args.max_new_tokens, temperature, args.top_p, watch, args.fast_rollout)
    mask, truncated = completion_mask(completions, eos)
    texts = tokenizer.batch_decode([ids[m] for ids, m in zip(completions, mask)], skip_special_tokens=True)
    return Rollout(prompts, completions, mask, truncated, texts)


# ---------------------------------------------------------------- objective

def group_advantages(rewards: Tensor, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """Eq. 1, A_i = (R_i - mean of its group) / (std + eps). [B, G] -> [B, G]; std with ddof = 1.

    A group whose rewards are all equal gives exactly 0: in fp32 its std need not be 0, and dividing by it would make noise.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std() + eps)
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(constant, 0.0, centred)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Eq. 1, -min(rho A, clip(rho, 1 - low, 1 + high) A) of every token, rho = pi / pi_old; and where clipping cut it off.

    logps, old_logps, mask [n, C], advantages [n], or [n, C] one a token -> loss, clipped [n, C]. Masked before exp: an overflow in a padded place
    would make the gradient NaN. "Why is my ratio 1 and my loss 0?" On the first update after a rollout rho = 1 whatever the
    weights, and advantages sum to 0 in a group: the value says nothing, the gradient is A grad log pi all the same.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    rho = torch.where(mask, logps - old_logps, 0.0).exp()
    clipped = (rho > 1 + clip_high) & (A > 0) | (rho < 1 - clip_low) & (A < 0)
    loss = -torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return loss * mask, clipped & mask


def token_weights(mask: Tensor, loss_type: str, max_new_tokens: int, rows: float | None = None, tokens: float | None = None) -> Tensor:
    """Eq. 1, the means: what each row's tokens weigh in the loss, [n]; made once for the whole update, before it is cut into micro-batches.

    grpo: 1 / (N |o_i|), dapo: 1 / (all tokens), dr_grpo: 1 / (N max_new_tokens). Rows without signal count in N. `rows` and `tokens` are those of
    all processes, where the mask has one's share.
    """
    lengths = mask.sum(1).float()
    rows, tokens = rows or len(mask), tokens or lengths.sum()
    if loss_type == "grpo":
        return 1 / (rows * lengths.clamp(min=1))
    if loss_type == "dapo":
        return torch.ones_like(lengths) / max(tokens, 1)
    return torch.ones_like(lengths) / (rows * max_new_tokens)


# ---------------------------------------------------------------- update

def update(model, optimizer, ro: Rollout, advantages: Tensor, args: Args, watch: Watch) -> dict | None:
    """All optimizer steps of one rollout batch -> metrics; None if stopped before the first, with the weights untouched.

    Rows whose advantage is 0 are skipped: they add nothing to the gradient, but still count in the normaliser.
    """
    device, G = ro.mask.device, args.group_size
    stats, norms, nonfinite = defaultdict(float), [], 0
    lengths = ro.mask.sum(1).tolist()
    live = {i for i in range(len(advantages)) if advantages[i] != 0}
    advantages = advantages.to(device)

    def logps_of(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        width = max((lengths[i] for i in batch), default=1)
        mask = ro.mask[batch, :width]
        logps, entropy = completion_logps(model, [ro.prompts[i] for i in batch], ro.completions[batch, :width], mask, args.temperature)
        return logps, entropy, mask

    def cut(rows: list[int], stats: dict) -> list[list[int]]:
        """Micro-batches of rows of like length."""
        sizes = [len(ro.prompts[i]) + lengths[i] for i in rows]
        batches = [[rows[k] for k in batch] for batch in microbatches(sizes, args.microbatch_tokens)]
        stats["tokens"] += sum(sizes)
        stats["padded"] += sum(len(b) * max(len(ro.prompts[i]) + lengths[i] for i in b) for b in batches)
        return in_step(batches)

    old_logps = torch.zeros(ro.mask.shape, device=device)
    if args.updates_per_rollout > 1:  # later updates are off-policy: remember what the sampling policy said
        with torch.no_grad():
            for batch in cut(sorted(live), stats):
                logps, _, mask = logps_of(batch)
                old_logps[batch, :mask.shape[1]] = logps

    def gradient_of(problems: list[int]) -> dict | None:
        """The gradient of the problems that one optimizer step is made on, accumulated -> sums for the metrics; None if told to stop."""
        part, rows = defaultdict(float), [q * G + j for q in problems for j in range(G)]
        n = summed({"rows": len(rows), "tokens": ro.mask[rows].sum().item()})
        weights = torch.zeros(len(ro.mask), device=device)
        weights[rows] = token_weights(ro.mask[rows], args.loss_type, args.max_new_tokens, n["rows"], n["tokens"])
        for batch in cut([i for i in rows if i in live], part):
            logps, entropy, mask = logps_of(batch)
            old = logps.detach() if args.updates_per_rollout == 1 else old_logps[batch, :mask.shape[1]]
            loss, clipped = policy_loss(logps, old, advantages[batch], mask, args.clip_low, args.clip_high)
            loss = (loss * weights[batch, None]).sum()
            loss.backward()
            part["loss"] += loss.item()
            part["entropy"] += entropy.sum().item()
            part["clipped"] += clipped.sum().item()
            part["scored"] += mask.sum().item()
            if watch.agreed() and not norms:
                return None
        return part

    model.train()  # for activation checkpointing; there is no dropout
    mine = list(dealt(range(args.prompts_per_step)))  # which of the step's problems these are
    for share in np.array_split(np.arange(args.prompts_per_step), args.updates_per_rollout):
        part = within_memory(lambda: gradient_of([q for q, k in enumerate(mine) if k in share]), optimizer, args)
        if part is None:
            optimizer.zero_grad()
            return None
        for name, value in part.items():
            stats[name] += value
        if any(p.grad is not None for p in model.parameters()):
            norm = clip_gradients(model, args.max_grad_norm)
            if math.isfinite(norm):
                optimizer.step()
                norms.append(norm)
            else:
                nonfinite += 1
            optimizer.zero_grad()
    model.eval()
    stats = summed(stats)
    metrics = {"loss": stats["loss"] / args.updates_per_rollout, "grad_norm": sum(norms) / max(len(norms), 1), "updates": len(norms),
               "nonfinite_updates": nonfinite, "clip_ratio": stats["clipped"] / max(stats["scored"], 1),
               "padding_frac": 1 - stats["tokens"] / max(stats["padded"], 1)}
    if stats["scored"]:
        metrics["entropy"] = stats["entropy"] / stats["scored"]
    return metrics


# ---------------------------------------------------------------- evaluation

def evaluate(model, tokenizer, rows: list[dict], eos: list[int], reward, args: Args, watch: Watch) -> dict:
    """Held-out accuracy: sampled, mean over --eval_samples; also with the strategy in the prompt, where every row has one. {} if told to stop."""
    metrics, mine = {}, [row for row in dealt(rows) for _ in range(args.eval_samples)]
    n = -(-len(mine) // args.eval_batch_size)  # calls
    ways = {"eval/accuracy": False, "eval/accuracy_guided": True} if all("strategy" in row for row in rows) else {"eval/accuracy": False}
    for name, guided in ways.items():
        seed_everything(args.seed, 2 ** 31)  # the same draws at every evaluation
        correct = []
        with rollout_weights(model) as fast:
            for batch in [mine[k::n] for k in range(n)]:
                prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt, row["strategy"] if guided else None) for row in batch]
                if not watch.stopped:
                    ro = rollout(fast, tokenizer, prompts, eos, args, args.eval_temperature, watch)
                    correct += (score(reward, ro.texts, batch) >= 0.5).tolist()
        if watch.agreed():
            return {}
        metrics[name] = float(np.mean(sum(everyones(correct), [])))
    return metrics


# ---------------------------------------------------------------- main

def main() -> None:
    start_processes()
    args = parse_args(Args, demo_recipe)
    check_args(args)
    reward = load_reward(args.reward)
    run = Run(args)
    tokenizer = load_tokenizer(args.model)

    def encode(row: dict) -> list[list[int]]:
        """Every prompt that is made of a row."""
        return [build_prompt(tokenizer, row["problem"], args.system_prompt)]

    rows, eval_rows = load_problems(args)
    rows, longest = usable_rows(rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    if eval_rows:
        eval_rows, _ = usable_rows(eval_rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    check_context(args.model, longest, args.max_new_tokens)
    warmup_rows, rows = warmup_split(rows, tokenizer, reward, args)
    say_plan(args, run, rows, warmup_rows, f"{args.group_size}", args.prompts_per_step * args.group_size, longest)
    if args.dry_run:
        return
    model = load_policy(args.model, activation_checkpointing=args.activation_checkpointing, cpu_offload=args.cpu_offload)
    eos = stop_ids(model, tokenizer)
    run.create()
    sft_warmup(model, tokenizer, warmup_rows, run, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    finished = run.begin(model, optimizer)
    bar = progress(args.steps, finished, desc="training", unit="step")
    watch = Watch(bar)
    if eval_rows and not run.evaluations():
        if first := evaluate(model, tokenizer, eval_rows, eos, reward, args, watch):
            run.log("metrics", {"step": 0, **first})

    while finished < args.steps and not watch.agreed():
        # ---- sample problems
        step, began = finished + 1, time.perf_counter()
        seed_everything(args.seed, step)
        problems = dealt([rows[i] for i in batch_of_step(len(rows), step - 1, args.prompts_per_step, args.seed)])  # b of the B of all processes
        samples = [row for row in problems for _ in range(args.group_size)]  # N rows, a problem's side by side: [b, G] flattened
        lr = args.lr * min(1.0, step / max(args.lr_warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- rollout
        prompts = [encode(row)[0] for row in samples]
        with rollout_weights(model) as fast:
            ro = rollout(fast, tokenizer, prompts, eos, args, args.temperature, watch)
        if watch.agreed():
            break
        sampled = time.perf_counter()

        # ---- rewards and advantages
        rewards = score(reward, ro.texts, samples)
        groups = gathered(rewards.view(len(problems), args.group_size))
        advantages = dealt(group_advantages(groups, args.scale_rewards)).flatten()
        graded = time.perf_counter()

        # ---- update
        stats = update(model, optimizer, ro, advantages, args, watch)
        if stats is None:
            break
        finished = step

        # ---- log and save
        now, lengths = time.perf_counter(), gathered(ro.mask.sum(1).view(len(problems), -1)).float()
        written, ends = summed({"": ro.mask.sum().item()})[""], gathered(ro.truncated.view(len(problems), -1)).float()
        metrics = {"step": step, "reward": groups.mean().item(), "reward_std": groups.std(1).mean().item(),
                   "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
                   "completions/mean_length": lengths.mean().item(), "completions/clipped_ratio": ends.mean().item(), **stats,
                   "lr": lr, "time/rollout_s": sampled - began, "time/grade_s": graded - sampled, "time/train_s": now - graded,
                   "tokens_per_s": written / (now - began), "peak_memory_gb": peak_memory_gb(),
                   **{f"grader/{outcome}": count for outcome, count in summed(grader_counts()).items()}}
        if eval_rows and (step == args.steps or args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(model, tokenizer, eval_rows, eos, reward, args, watch)
        run.log("samples", *sum(everyones([{"step": step, "id": row["id"], "reward": r, "completion": text}
                             for row, r, text in zip(samples, rewards.tolist(), ro.texts)]), []))
        run.log("metrics", metrics)
        run.check_finite(metrics)
        if args.save_every and step % args.save_every == 0:
            run.save_checkpoint(step, model, optimizer)
        if step == 1 or "eval/accuracy" in metrics:
            bar.write(f"step {step}, reward {rewards[0]:g}: {printable(ro.texts[0])[:2000]}")
        if ends.all():
            bar.write(f"step {step}: every completion ran into --max_new_tokens {args.max_new_tokens}; nothing can be learnt from that, raise it")
        bar.set_description(f"reward {metrics['reward']:.2f}")
        bar.update()
    bar.close()

    run.save_checkpoint(finished, model, optimizer)
    if finished < args.steps:
        run.stop(f"after step {finished} of {args.steps}")
    final = run.save_model(model, tokenizer)
    if evals := run.evaluations():
        names = {"eval/accuracy": "alone", "eval/accuracy_guided": "with the strategy"}
        say_table([["held-out accuracy", "before", "after"],
                   *[[names[k], f"{evals[0][k]:.3f}", f"{evals[-1][k]:.3f}"] for k in names if k in evals[0]]])
    print(f"model: {final}\nmetrics, samples, checkpoints: {run.dir}")


if __name__ == "__main__":
    main()
