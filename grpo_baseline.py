"""GRPO (Group Relative Policy Optimization): the baseline that sgpo.py and tgpo.py are measured against.

For every problem the model writes a group of solutions, and a verifier gives each a reward. The advantage of
a solution is its reward relative to its group's mean. A clipped policy gradient makes the tokens of solutions
with a positive advantage likelier. There is no value network and no KL to a reference model.

    python grpo_baseline.py                                        # the built-in demo: CPU, offline, a minute
    python grpo_baseline.py --model Qwen/Qwen2.5-1.5B-Instruct     # real problems

Papers: DeepSeekMath (arXiv 2402.03300); DAPO (2503.14476) for unequal clipping bounds and --loss_type dapo;
Dr. GRPO (2503.20783) is --loss_type dr_grpo --scale_rewards none. Read `main` first, then `update`.
"""
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from common import (
    Fp32Head,
    Run,
    RunFlags,
    accumulate,
    build_prompt,
    choose_memory,
    clip_gradient,
    completion_hidden,
    flag,
    gather,
    generate_in_pieces,
    learning_rate,
    load_data,
    load_policy,
    load_reward,
    load_tokenizer,
    microbatches,
    my_share,
    parse_args,
    problems_of_step,
    program,
    seed_everything,
    sft_warmup,
    stop_ids,
    sum_over_processes,
)

# Letters: B problems of a step (b of them in this process), G samples per problem, N samples of this process
# (n of them in a micro-batch), C length of the longest completion, M completion tokens of a micro-batch
# (m of them in a chunk), d hidden size, V vocabulary.


# ---------------------------------------------------------------- flags

@dataclass
class Args(RunFlags):
    # rollout
    steps: int = flag(400, "training steps, each with one rollout; 0: only the SFT warm-up", "[0, inf)")
    prompts_per_step: int = flag(16, "problems per step", "[1, inf)")
    group_size: int = flag(12, "samples per problem (12 equals the 8 + 4 of SGPO)", "[2, inf)")
    max_new_tokens: int = flag(2048, "maximum completion length in tokens", "[1, inf)")
    temperature: float = flag(1.0, "sampling temperature; also applied to the logits in the loss", "(0, inf)")
    top_p: float = flag(0.95, "sample only from the likeliest tokens that together have this probability",
                        "(0, 1]")
    # objective
    clip_low: float = flag(0.2, "clip the ratio pi/pi_old below 1 minus this", "[0, inf]")
    clip_high: float = flag(0.28, "clip the ratio pi/pi_old above 1 plus this", "[0, inf]")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag(
        "grpo", "grpo: mean over each completion, then over completions; dapo: mean over all tokens; "
                "dr_grpo: divide by max_new_tokens")
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group", "divide advantages by the std of the group's rewards, of all rewards, or by nothing "
                 "(as in Dr. GRPO)")
    # update
    lr: float = flag(1e-6, "learning rate of AdamW", "[0, inf)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag("constant", "learning rate after its warm-up")
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises to --lr", "[0, inf)")
    weight_decay: float = flag(0.01, "weight decay of AdamW", "[0, inf)")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm", "(0, inf)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout, each on a slice of it", "[1, inf)")


# ---------------------------------------------------------------- rollout

@dataclass
class Rollout:
    prompts: list[list[int]]  # N prompts, unpadded
    completions: Tensor       # [N, C] token ids as sampled, never decoded and tokenized again
    mask: Tensor              # [N, C] True up to and including the first end token
    truncated: Tensor         # [N] True if no end token was sampled
    texts: list[str]          # N completions as text, without end tokens
    sampler_logps: Tensor     # [N, C] log pi(token) as the sampler computed it, in bf16 on a GPU
    kept_mass: Tensor         # [N, C] the probability of all tokens that --top_p kept

    def select(self, idx: list[int]) -> tuple[list[list[int]], Tensor, Tensor]:
        """Return prompts, completions and mask of some samples."""
        return [self.prompts[i] for i in idx], self.completions[idx], self.mask[idx]

    def lengths(self) -> list[int]:
        """Return the number of tokens of every sample, prompt and completion together."""
        completion_lengths = self.mask.sum(1).tolist()
        return [len(prompt) + length for prompt, length in zip(self.prompts, completion_lengths)]


def rollout(model, tokenizer, prompts: list[list[int]], temperature: float, args: Args) -> Rollout:
    """Sample one completion for every prompt with transformers' `generate`."""
    end_ids = stop_ids(model, tokenizer)
    config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_p=args.top_p,
        top_k=0,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],  # any id works, because the mask goes by position
    )
    sampled = generate_in_pieces(model, prompts, config, args.generation_batch_size)
    completions = sampled.ids                                                             # [N, C]
    is_end = torch.isin(completions, torch.tensor(end_ids, device=completions.device))    # [N, C]
    ends_before = is_end.cumsum(1) - is_end.long()                                        # [N, C]
    mask = ends_before == 0  # up to and including the first end token
    written = mask & ~is_end
    texts = [tokenizer.decode(ids[kept]) for ids, kept in zip(completions, written)]
    truncated = ~is_end.any(1)
    return Rollout(prompts, completions, mask, truncated, texts, sampled.logps, sampled.kept_mass)


# ---------------------------------------------------------------- objective

def group_advantages(rewards: Tensor, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """Return A_i = (R_i - mean of its group) / (std + eps), from rewards [B, G]; std has ddof = 1.

    A group of equal rewards gives exactly 0. In fp32 its std need not be 0, and dividing by it would turn
    rounding errors into advantages.
    """
    centred = rewards - rewards.mean(1, keepdim=True)                      # [B, G]
    if scale == "group":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std() + eps)
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)           # [B, 1]
    return torch.where(all_equal, 0.0, centred)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_low: float,
                clip_high: float) -> tuple[Tensor, Tensor]:
    """Return -min(rho A, clip(rho, 1 - low, 1 + high) A) per token, and where it is clipped, [n, C] each.

    rho is the ratio pi / pi_old. Advantages are [n], or [n, C] if every token has its own.

    "Why is my ratio 1 and my loss 0?" On the first update after a rollout pi is pi_old, so rho is 1 and the
    loss of every token is -A. The advantages of a group sum to 0, so the loss is 0 with --loss_type grpo.
    With the other two it only says which completions are longer. The gradient is -A grad log pi all the same.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]        # [n, C] or [n, 1]
    # We mask before `exp`: an overflow at a padding position would turn the whole gradient into NaN.
    rho = torch.where(mask, logps - old_logps, 0.0).exp()                  # [n, C]
    clipped_rho = rho.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(rho * A, clipped_rho * A)
    too_high = (rho > 1 + clip_high) & (A > 0)
    too_low = (rho < 1 - clip_low) & (A < 0)
    return loss * mask, (too_high | too_low) & mask


def token_weights(mask: Tensor, loss_type: str, max_new_tokens: int, num_samples: float,
                  num_tokens: float) -> Tensor:
    """Return the weight of every token in the loss, one value per completion, [N].

    grpo: 1 / (num_samples |o_i|), a mean over each completion's tokens, then over completions.
    dapo: 1 / num_tokens. dr_grpo: 1 / (num_samples max_new_tokens). Both numbers count the whole optimizer
    step, over all processes, so micro-batches add up to the loss of the full batch. Samples without a
    gradient count, too.
    """
    lengths = mask.sum(1).float()                                          # [N]
    if loss_type == "grpo":
        return 1 / (num_samples * lengths.clamp(min=1))
    if loss_type == "dapo":
        return torch.ones_like(lengths) / max(num_tokens, 1)
    return torch.ones_like(lengths) / (num_samples * max_new_tokens)


# ---------------------------------------------------------------- log-probs

def logp_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log pi(id) and the entropy in nats (without gradient), [m] each, from logits [m, V]."""
    log_norm = logits.logsumexp(-1)                                        # [m]
    logps = logits.gather(-1, ids[:, None])[:, 0] - log_norm
    with torch.no_grad():
        probs = (logits - log_norm[:, None]).exp()                         # [m, V]
        entropy = log_norm - (probs * logits).sum(-1)
    return logps, entropy


def token_logps(model, ro: Rollout, idx: list[int], args: Args) -> tuple[Tensor, Tensor]:
    """Return log pi(token) and the entropy of every completion token, [n, C] each, 0 after the end token.

    The transformer runs in bf16 under autocast on fp32 weights; logits and what follows are fp32. Logits of
    all tokens would need M x V floats, so they are made for a chunk of tokens at a time and computed again
    in the backward pass. They cover the full vocabulary even if --top_p truncates sampling.
    """
    prompts, completions, mask = ro.select(idx)

    def of_chunk(head: Fp32Head, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden) / args.temperature                           # [m, V]
        return logp_and_entropy(logits, ids)

    chunks = []
    with torch.autocast(mask.device.type, torch.bfloat16, enabled=args.bf16):
        hidden = completion_hidden(model, prompts, completions, mask)      # [M, d]
        head = Fp32Head(model)
        size = head.tokens_per_chunk
        for h, ids in zip(hidden.split(size), completions[mask].split(size)):
            chunks.append(checkpoint(of_chunk, head, h, ids, use_reentrant=False, preserve_rng_state=False))
    logps, entropy = zip(*chunks)
    logps = torch.cat(logps)                                               # [M]
    entropy = torch.cat(entropy)                                           # [M]
    zeros = logps.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, logps), zeros.masked_scatter(mask, entropy)


# ---------------------------------------------------------------- update

@torch.no_grad()
def logps_before_update(model, ro: Rollout, samples: list[int], args: Args) -> Tensor:
    """Return log pi_old of every completion token of these samples, [N, C], 0 for all other samples."""
    old_logps = torch.zeros(ro.mask.shape, device=ro.mask.device)
    for idx in microbatches(samples, ro.lengths(), args.microbatch_tokens):
        logps, entropy = token_logps(model, ro, idx, args)
        old_logps[idx] = logps
    return old_logps


def update_metrics(sums: dict[str, float], grad_norms: list[float]) -> dict[str, float]:
    """Return the metrics of a rollout's optimizer steps, from sums over all their micro-batches.

    Entropy and clip ratio are means over the samples that were trained on. `grad_norms` has one norm a step.
    """
    totals = sum_over_processes(*sums.values())
    sums = dict(zip(sums, totals))
    finite_norms = [norm for norm in grad_norms if math.isfinite(norm)]
    metrics = {
        "loss": sums["loss"] / max(len(grad_norms), 1),
        "grad_norm": sum(finite_norms) / max(len(finite_norms), 1),
        "updates": len(finite_norms),
        "skipped_updates": len(grad_norms) - len(finite_norms),
    }
    if sums["tokens"]:
        metrics["entropy"] = sums["entropy"] / sums["tokens"]
        metrics["clip_ratio"] = sums["clipped"] / sums["tokens"]
        metrics["padding_frac"] = 1 - sums["real_tokens"] / sums["padded_tokens"]
        metrics["sampling/sampling_logp_difference/mean"] = sums["sampler_gap"] / sums["tokens"]
    return metrics


def update(model, optimizer, ro: Rollout, advantages: Tensor, args: Args) -> dict[str, float]:
    """Run the optimizer steps of one rollout and return the metrics. Advantages are [b G], one per sample.

    Skip samples with advantage 0. They have no gradient, but they count in the loss denominator.
    """
    lengths = ro.lengths()
    num_problems = len(advantages) // args.group_size                      # b
    has_gradient = (advantages != 0).tolist()
    advantages = advantages.to(ro.mask.device)
    with_gradient = [i for i, is_nonzero in enumerate(has_gradient) if is_nonzero]
    old_logps = None  # with one update per rollout pi_old equals pi and need not be computed
    if args.updates_per_rollout > 1:
        old_logps = logps_before_update(model, ro, with_gradient, args)
    names = ("loss", "entropy", "clipped", "tokens", "sampler_gap", "real_tokens", "padded_tokens")
    sums = dict.fromkeys(names, 0.0)
    grad_norms = []
    model.train()  # for activation checkpointing; there is no dropout
    # Update k always uses the k-th slice of the step's problems, no matter how many processes there are.
    for problem_idx in np.array_split(np.arange(num_problems), args.updates_per_rollout):
        idx_of_step = [q * args.group_size + j for q in problem_idx for j in range(args.group_size)]
        num_samples, num_tokens = sum_over_processes(len(idx_of_step), ro.mask[idx_of_step].sum())
        weights = token_weights(ro.mask, args.loss_type, args.max_new_tokens, num_samples, num_tokens)  # [N]

        # 1. GRPO: accumulate the gradient over micro-batches
        trained = [i for i in idx_of_step if has_gradient[i]]
        # All processes run equally many micro-batches, so the last ones may be empty.
        for idx in accumulate(model, microbatches(trained, lengths, args.microbatch_tokens)):
            mask = ro.mask[idx]                                            # [n, C]
            logps, entropy = token_logps(model, ro, idx, args)             # [n, C]
            old = logps.detach() if old_logps is None else old_logps[idx]
            A = advantages[idx]                                            # [n]
            loss_per_token, clipped = policy_loss(logps, old, A, mask, args.clip_low, args.clip_high)
            loss = (loss_per_token * weights[idx, None]).sum()
            loss.backward()
            sums["loss"] += loss.item()
            sums["entropy"] += entropy.sum().item()
            sums["clipped"] += clipped.sum().item()
            sums["tokens"] += mask.sum().item()
            sampler_gap = (old - ro.sampler_logps[idx]).abs()              # [n, C]
            sums["sampler_gap"] += sampler_gap[mask].sum().item()
            sums["real_tokens"] += sum(lengths[i] for i in idx)
            sums["padded_tokens"] += len(idx) * max((lengths[i] for i in idx), default=0)

        # 2. clip the gradient and step, unless no sample of any process has a gradient
        if sum_over_processes(len(trained))[0] > 0:
            grad_norm = clip_gradient(model, args.max_grad_norm)
            grad_norms.append(grad_norm)
            if math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return update_metrics(sums, grad_norms)


# ---------------------------------------------------------------- main

def evaluate(model, tokenizer, problems: list[dict], reward, args: Args) -> dict[str, float]:
    """Return the share of correct answers to the held-out problems, with --eval_samples for each."""
    if not problems:
        return {}
    seed_everything(args.seed, "evaluation")  # every evaluation draws the same random numbers
    repeated = [problem for problem in my_share(problems) for _ in range(args.eval_samples)]
    prompts = [build_prompt(tokenizer, problem["problem"], args.system_prompt) for problem in repeated]
    ro = rollout(model, tokenizer, prompts, args.eval_temperature, args)
    correct = reward(ro.texts, repeated) >= 0.5
    num_correct, num_samples = sum_over_processes(correct.sum(), len(repeated))
    return {"eval/accuracy": num_correct / num_samples}


def rollout_metrics(ro: Rollout, groups: Tensor) -> dict[str, float]:
    """Return the metrics of a step's samples, whose rewards are `groups` [B, G]."""
    kept_mass = ro.kept_mass[ro.mask]
    num_tokens, num_truncated, mass = sum_over_processes(ro.mask.sum(), ro.truncated.sum(), kept_mass.sum())
    all_equal = (groups == groups[:, :1]).all(1)                           # [B]
    return {
        "reward": groups.mean().item(),
        "reward_std": groups.std(1).mean().item(),
        "frac_reward_zero_std": all_equal.float().mean().item(),
        "completions/mean_length": num_tokens / groups.numel(),
        "completions/clipped_ratio": num_truncated / groups.numel(),
        "sampling/top_p_mass": mass / num_tokens,
    }


@program
def main() -> None:
    args = parse_args(Args)
    run = Run(args)                                   # checks the directory, writes nothing yet
    reward = load_reward(args.reward)
    tokenizer = load_tokenizer(args.model)
    data = load_data(args, tokenizer, reward)
    memory = choose_memory(args)                      # may switch on checkpointing and offload
    run.print_plan(data, memory, f"{args.group_size}")
    if args.dry_run:
        return
    model = load_policy(args)                         # fp32 weights, sharded under torchrun
    run.create(data)
    sft_warmup(model, tokenizer, data.warmup, run, args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    start = run.resume(model, optimizer)              # 0 for a new run
    step = start                                      # if no step is left to run
    if start == 0 and data.held_out:
        run.log(0, evaluate(model, tokenizer, data.held_out, reward, args))

    for step in range(start + 1, args.steps + 1):
        # ---- sample problems
        seed_everything(args.seed, "step", step)
        problems = my_share(problems_of_step(data.train, step, args.prompts_per_step, args.seed))  # b of B
        repeated = [problem for problem in problems for _ in range(args.group_size)]               # b G
        prompts = [build_prompt(tokenizer, problem["problem"], args.system_prompt) for problem in repeated]

        # ---- rollout
        rollout_start = time.perf_counter()
        ro = rollout(model, tokenizer, prompts, args.temperature, args)
        rollout_end = time.perf_counter()

        # ---- rewards and advantages
        rewards = reward(ro.texts, repeated)                                          # [N]
        groups = gather(rewards.view(len(problems), args.group_size))                 # [B, G], all processes
        advantages = group_advantages(groups, args.scale_rewards)                     # [B, G]
        advantages = my_share(advantages).flatten()                                   # [b G]

        # ---- update
        train_start = time.perf_counter()
        lr = learning_rate(step, args.lr, args.lr_schedule, args.lr_warmup_steps, args.steps)
        optimizer.param_groups[0]["lr"] = lr
        metrics = update(model, optimizer, ro, advantages, args)
        train_end = time.perf_counter()

        # ---- log, evaluate, save
        metrics |= rollout_metrics(ro, groups)
        metrics |= {
            "lr": lr,
            "time/rollout_s": rollout_end - rollout_start,
            "time/grade_s": train_start - rollout_end,
            "time/train_s": train_end - train_start,
            "tokens_per_s": sum_over_processes(ro.mask.sum())[0] / (train_end - rollout_start),
        }
        is_due = args.eval_every and step % args.eval_every == 0
        if is_due or step == args.steps:
            metrics |= evaluate(model, tokenizer, data.held_out, reward, args)
        run.log(step, metrics, repeated, rewards.tolist(), ro.texts)
        if args.save_every and step % args.save_every == 0:
            run.save(step, model, optimizer)
        if run.should_stop():
            break
    run.finish(step, model, tokenizer, optimizer)


if __name__ == "__main__":
    main()
