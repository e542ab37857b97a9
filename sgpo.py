"""SGPO (Strategy-Guided Policy Optimization): GRPO plus distillation from strategy-guided samples.

What differs from grpo_baseline.py (equation numbers are those of the paper, arXiv 2606.24064; Eq. 1 is GRPO):
  1. A second, guided group of samples sees a short strategy before the problem. GRPO skips this group.
  2. Target (Eq. 4): of the correct guided samples, the one that is likeliest WITHOUT the strategy.
  3. Loss (Eq. 3, 5): on the target, forward KL from guided to unguided distribution, outlier tokens masked.
  4. Weight (Eq. 6, 7): alpha(q) is large if the strategy helps and the model alone fails.
  5. Strategies are extracted from solutions before training (App. B, C; last section of this file).

    python sgpo.py                                      # the built-in demo: CPU, offline, a minute
    python sgpo.py --model Qwen/Qwen2.5-7B-Instruct     # real problems: strategies, SFT warm-up, RL

Read grpo_baseline.py first, then `diff grpo_baseline.py sgpo.py`.
"""
import json
import math
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Literal

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
    append_jsonl,
    build_prompt,
    choose_memory,
    clip_gradient,
    completion_hidden,
    context_length,
    flag,
    from_all_processes,
    from_first_process,
    gather,
    generate_in_pieces,
    learning_rate,
    load_data,
    load_model,
    load_policy,
    load_reward,
    load_tokenizer,
    microbatches,
    my_share,
    parse_args,
    problems_of_step,
    program,
    rank,
    read_jsonl,
    refuse,
    seed_everything,
    sft_warmup,
    stop_ids,
    sum_over_processes,
    world_size,
    write_atomic,
)

# Letters: B problems of a step (b of them in this process), G samples per problem, N samples of this process
# (n of them in a micro-batch), C length of the longest completion, M completion tokens of a micro-batch
# (m of them in a chunk), d hidden size, V vocabulary.
# q: a problem, s: its strategy. Of the N samples the b G autonomous ones come first, then the guided ones.


# ---------------------------------------------------------------- flags

@dataclass
class Args(RunFlags):
    # rollout
    steps: int = flag(400, "training steps, each with one rollout; 0: only the SFT warm-up", "[0, inf)")
    prompts_per_step: int = flag(16, "problems per step", "[1, inf)")
    group_size: int = flag(8, "samples per problem without the strategy", "[2, inf)")
    guided_group_size: int = flag(4, "samples per problem with the strategy in the prompt", "[1, inf)")
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
    autonomous_grpo: bool = flag(True, "also train on the samples without the strategy, with GRPO")
    # strategy distillation
    distill: Literal["forward_kl", "reverse_kl", "sft", "none"] = flag(
        "forward_kl", "loss that pulls the unguided distribution to the guided one; sft: learn the target's "
                      "tokens; none: no strategies, which is GRPO")
    target: Literal["reachable", "all"] = flag(
        "reachable", "distil the correct guided sample that is likeliest without the strategy, or all")
    delta: float = flag(1.0, "leave out tokens whose KL is above this, in nats; inf: keep all; not used by "
                             "sft", "[0, inf]")
    weight: Literal["adaptive", "fixed", "group_advantage"] = flag(
        "adaptive", "weight of a problem's distillation. adaptive: from its pass rates with and without "
                    "strategy; fixed: --fixed_alpha; group_advantage: the target's advantage among the "
                    "unguided samples")
    alpha0: float = flag(0.5, "scale of the adaptive weight", "[0, inf)")
    gamma: float = flag(0.1, "smoothing of the pass rates in the adaptive weight", "(0, inf)")
    alpha_max: float = flag(0.8, "largest weight", "[0, inf)")
    fixed_alpha: float = flag(1.0, "the weight if --weight is fixed", "[0, inf)")
    # update
    lr: float = flag(1e-6, "learning rate of AdamW", "[0, inf)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag("constant", "learning rate after its warm-up")
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises to --lr", "[0, inf)")
    weight_decay: float = flag(0.01, "weight decay of AdamW", "[0, inf)")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm", "(0, inf)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout, each on a slice of it", "[1, inf)")
    # strategies
    strategies: str = flag(None, "JSONL file of strategies, read if it exists; new ones are appended "
                                 "(default: strategies.jsonl in --out)")
    strategist: str = flag(None, "model that extracts strategies from solutions: hub id, directory, URL of "
                                 "an OpenAI-compatible endpoint, or none (default: the model itself)")
    strategist_model: str = flag(None, "name of the endpoint's model; the endpoint's key is read from "
                                       "OPENAI_API_KEY")
    strategist_args: str = flag("{}", "JSON object of more arguments for the endpoint's requests, such as "
                                      "{\"max_completion_tokens\": 4096}")
    strategist_max_new_tokens: int = flag(2048, "longest answer of a local strategist, in tokens", "[1, inf)")
    strategy_candidates: int = flag(5, "candidates per solution, of which the best is kept", "[1, inf)")
    extract_only: bool = flag(False, "stop when the strategies are extracted")


# ---------------------------------------------------------------- rollout

@dataclass
class Rollout:
    prompts: list[list[int]]  # N prompts WITHOUT the strategy, under which every sample is scored
    sampling_prompts: list[list[int]]  # N prompts to sample from: those of guided samples hold the strategy
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


def rollout(model, tokenizer, prompts: list[list[int]], temperature: float, args: Args,
            sampling_prompts: list[list[int]] | None = None) -> Rollout:
    """Sample one completion for every prompt with transformers' `generate`.

    `sampling_prompts`: the prompts to sample from, if not those under which the samples are scored.
    """
    sampling_prompts = sampling_prompts or prompts
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
    sampled = generate_in_pieces(model, sampling_prompts, config, args.generation_batch_size)
    completions = sampled.ids                                                             # [N, C]
    is_end = torch.isin(completions, torch.tensor(end_ids, device=completions.device))    # [N, C]
    ends_before = is_end.cumsum(1) - is_end.long()                                        # [N, C]
    mask = ends_before == 0  # up to and including the first end token
    written = mask & ~is_end
    texts = [tokenizer.decode(ids[kept]) for ids, kept in zip(completions, written)]
    truncated = ~is_end.any(1)
    return Rollout(prompts, sampling_prompts, completions, mask, truncated, texts, sampled.logps,
                   sampled.kept_mass)


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


def forward_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Return d = KL(stopgrad pi(. | q, s, o_<t) || pi(. | q, o_<t)) in nats (Eq. 3), [m], from logits [m, V].

    Gradients are stopped at the guided LOGITS, because both sides use the same weights, lm_head included.
    """
    guided = guided_logits.detach().log_softmax(-1)
    unguided = logits.log_softmax(-1)
    return (guided.exp() * (guided - unguided)).sum(-1)


def reverse_kl(logits: Tensor, guided_logits: Tensor) -> Tensor:
    """Return KL(pi(. | q, o_<t) || stopgrad pi(. | q, s, o_<t)) in nats, [m]: an ablation of Eq. 3."""
    guided = guided_logits.detach().log_softmax(-1)
    unguided = logits.log_softmax(-1)
    return (unguided.exp() * (unguided - guided)).sum(-1)


def clip_kl(d: Tensor, delta: float) -> Tensor:
    """Return 1[d <= delta] d (Eq. 5). Outliers are masked, and count in the denominator |o+|.

    A cap min(d, delta) would have the same gradient, because a capped token has none, but another value.
    """
    return torch.where(d <= delta, d, 0.0)


def reachable_target(sum_logps: Tensor) -> int:
    """Return argmax_g sum_t log pi(g_t | q, g_<t) over the correct guided samples (Eq. 4), as an index.

    The log-probs are those WITHOUT the strategy. Summing rather than averaging also favours shorter targets.
    """
    return int(sum_logps.argmax())


def adaptive_weight(p_guided: Tensor, p_auto: Tensor, alpha0: float, gamma: float,
                    alpha_max: float) -> Tensor:
    """Return alpha(q) = clip(alpha0 (p_guided - p_auto + gamma) / (p_auto + gamma), 0, alpha_max), Eq. 6.

    p_guided and p_auto are the pass rates of the two groups, [b] each.
    """
    gain = (p_guided - p_auto + gamma) / (p_auto + gamma)
    return (alpha0 * gain).clamp(0, alpha_max)


def group_advantage_weight(rewards: Tensor, alpha_max: float) -> Tensor:
    """Return a correct target's advantage among the autonomous rewards [b, G], clipped: ablation of Eq. 6.

    The target's reward is assumed to be 1, as with the math grader.
    """
    target_reward = torch.ones_like(rewards[:, :1])
    advantages = group_advantages(torch.cat([rewards, target_reward], 1))
    return advantages[:, -1].clamp(0, alpha_max)


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


def token_kl(model, ro: Rollout, idx: list[int], args: Args) -> Tensor:
    """Return d_t (Eq. 3) of every completion token, [n, C], 0 after the end token.

    The guided and the unguided prompt are followed by the same completion, so its tokens line up.
    """
    prompts, completions, mask = ro.select(idx)
    guided_prompts = [ro.sampling_prompts[i] for i in idx]

    def of_chunk(head: Fp32Head, guided_hidden: Tensor, hidden: Tensor) -> Tensor:
        guided_logits = head(guided_hidden) / args.temperature             # [m, V]
        logits = head(hidden) / args.temperature                           # [m, V]
        if args.distill == "reverse_kl":
            return reverse_kl(logits, guided_logits)
        return forward_kl(guided_logits, logits)

    chunks = []
    with torch.autocast(mask.device.type, torch.bfloat16, enabled=args.bf16):
        with torch.no_grad():
            guided_hidden = completion_hidden(model, guided_prompts, completions, mask)  # [M, d]
        hidden = completion_hidden(model, prompts, completions, mask)      # [M, d]
        head = Fp32Head(model)
        size = head.tokens_per_chunk
        for guided, h in zip(guided_hidden.split(size), hidden.split(size)):
            chunks.append(checkpoint(of_chunk, head, guided, h, use_reentrant=False,
                                     preserve_rng_state=False))
    d = torch.cat(chunks)                                                  # [M]
    return d.new_zeros(mask.shape).masked_scatter(mask, d)


# ---------------------------------------------------------------- what to distil

@dataclass
class Distillation:
    correct: list[list[int]]  # for each of b problems: its correct guided samples
    alpha: Tensor             # [b] weight alpha(q) of its distillation; 0 if no guided sample is correct


def weigh_problems(rewards: Tensor, with_strategy: list[int], num_problems: int,
                   args: Args) -> tuple[Distillation, dict[str, float]]:
    """Return the correct guided samples and the weight of every problem, and the metrics of both.

    `rewards` [N] are those of all samples: the autonomous ones come first, then the guided ones of the
    problems `with_strategy`. A reward of 0.5 or more is correct. Problems without a strategy are left out of
    the metrics.
    """
    num_auto = num_problems * args.group_size
    groups = rewards[:num_auto].view(num_problems, args.group_size)        # [b, G]
    correct = [[] for _ in range(num_problems)]
    has_strategy = torch.zeros(num_problems, dtype=torch.bool)
    for k, q in enumerate(with_strategy):
        has_strategy[q] = True
        first = num_auto + k * args.guided_group_size
        guided_samples = range(first, first + args.guided_group_size)
        correct[q] = [i for i in guided_samples if rewards[i] >= 0.5]
    num_correct = torch.tensor([len(samples) for samples in correct])
    p_guided = num_correct / args.guided_group_size                        # [b]
    p_auto = (groups >= 0.5).float().mean(1)                               # [b]
    if args.weight == "adaptive":
        alpha = adaptive_weight(p_guided, p_auto, args.alpha0, args.gamma, args.alpha_max)
    elif args.weight == "group_advantage":
        alpha = group_advantage_weight(groups, args.alpha_max)
    else:
        alpha = torch.full((num_problems,), args.fixed_alpha)
    alpha = torch.where(num_correct > 0, alpha, 0.0)
    values = {
        "sgpo/alpha": alpha,
        "sgpo/p_auto": p_auto,
        "sgpo/p_guided": p_guided,
        "sgpo/no_target_frac": (num_correct == 0).float(),
    }
    sums = [value[has_strategy].sum() for value in values.values()]
    num_guided, *totals = sum_over_processes(has_strategy.sum(), *sums)
    if num_guided == 0:
        return Distillation(correct, alpha), {}
    metrics = {name: total / num_guided for name, total in zip(values, totals)}
    return Distillation(correct, alpha), metrics


def choose_targets(model, ro: Rollout, distillation: Distillation, problem_idx: list[int],
                   args: Args) -> dict[int, list[int]]:
    """Return the samples to distil for each problem with alpha > 0: the reachable one, or all correct."""
    correct = {q: distillation.correct[q] for q in problem_idx if distillation.alpha[q] > 0}
    if args.target == "all":
        return correct
    rivals = []  # a problem with a single correct sample needs no scoring
    for samples in correct.values():
        if len(samples) > 1:
            rivals += samples
    sum_logps = torch.zeros(len(ro.mask))                                  # [N]
    with torch.no_grad():
        for idx in microbatches(rivals, ro.lengths(), args.microbatch_tokens):
            logps, entropy = token_logps(model, ro, idx, args)
            sum_logps[idx] = logps.sum(1).cpu()
    targets = {}
    for q, samples in correct.items():
        targets[q] = [samples[reachable_target(sum_logps[samples])]]
    return targets


# ---------------------------------------------------------------- update

@torch.no_grad()
def logps_before_update(model, ro: Rollout, samples: list[int], args: Args) -> Tensor:
    """Return log pi_old of every completion token of these samples, [N, C], 0 for all other samples."""
    old_logps = torch.zeros(ro.mask.shape, device=ro.mask.device)
    for idx in microbatches(samples, ro.lengths(), args.microbatch_tokens):
        logps, entropy = token_logps(model, ro, idx, args)
        old_logps[idx] = logps
    return old_logps


def distil(model, ro: Rollout, distillation: Distillation, problem_idx: list[int],
           sums: dict[str, float], args: Args) -> list[int]:
    """Accumulate the gradient of alpha(q) L_KD(q), averaged over the update's problems; return the targets.

    L_KD is the mean over a target's tokens of the clipped KL (Eq. 2, 5). `sums` collects the metrics.
    """
    num_problems = sum_over_processes(len(problem_idx))[0]
    targets = choose_targets(model, ro, distillation, problem_idx, args)
    completion_lengths = ro.mask.sum(1).tolist()
    weights = torch.zeros(len(ro.mask), device=ro.mask.device)             # [N] of every token of a target
    for q, samples in targets.items():
        for i in samples:
            weights[i] = distillation.alpha[q] / (num_problems * len(samples) * completion_lengths[i])
    distilled = [i for samples in targets.values() for i in samples]
    guided_lengths = [len(prompt) + length for prompt, length in zip(ro.sampling_prompts, completion_lengths)]
    delta = math.inf if args.distill == "sft" else args.delta  # --delta is for a KL
    for idx in accumulate(model, microbatches(distilled, guided_lengths, args.microbatch_tokens)):
        if args.distill == "sft":
            logps, entropy = token_logps(model, ro, idx, args)
            d = -logps                                                     # [n, C]
        else:
            d = token_kl(model, ro, idx, args)                             # [n, C]
        loss = (clip_kl(d, delta) * weights[idx, None]).sum()
        loss.backward()
        sums["loss"] += loss.item()
        sums["kl"] += d.sum().item()
        sums["kl_clipped"] += (d > delta).sum().item()
        sums["kl_tokens"] += ro.mask[idx].sum().item()
    return distilled


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
    if sums["kl_tokens"]:
        metrics["sgpo/kl"] = sums["kl"] / sums["kl_tokens"]
        metrics["sgpo/kl_clipped_frac"] = sums["kl_clipped"] / sums["kl_tokens"]
    return metrics


def update(model, optimizer, ro: Rollout, advantages: Tensor, distillation: Distillation,
           args: Args) -> dict[str, float]:
    """Run the optimizer steps of one rollout and return the metrics. Advantages are [b G], one per sample.

    Skip samples with advantage 0. They have no gradient, but they count in the loss denominator. Skip
    problems with alpha 0, too. Every sample is scored under the prompt WITHOUT the strategy.
    """
    lengths = ro.lengths()
    num_problems = len(advantages) // args.group_size                      # b
    has_gradient = (advantages != 0).tolist()
    advantages = advantages.to(ro.mask.device)
    with_gradient = [i for i, is_nonzero in enumerate(has_gradient) if is_nonzero]
    old_logps = None  # with one update per rollout pi_old equals pi and need not be computed
    if args.updates_per_rollout > 1:
        old_logps = logps_before_update(model, ro, with_gradient, args)
    names = ("loss", "entropy", "clipped", "tokens", "sampler_gap", "real_tokens", "padded_tokens",
             "kl", "kl_clipped", "kl_tokens")
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

        # 2. SGPO: add the gradient of alpha(q) L_KD(q), averaged over the problems (Eq. 7)
        distilled = distil(model, ro, distillation, problem_idx.tolist(), sums, args)

        # 3. clip the gradient and step, unless no sample of any process has a gradient
        if sum_over_processes(len(trained) + len(distilled))[0] > 0:
            grad_norm = clip_gradient(model, args.max_grad_norm)
            grad_norms.append(grad_norm)
            if math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
    model.eval()
    return update_metrics(sums, grad_norms)


# ---------------------------------------------------------------- main

def evaluate(model, tokenizer, problems: list[dict], reward, args: Args,
             guided: bool = False) -> dict[str, float]:
    """Return the share of correct answers to the held-out problems, with --eval_samples for each."""
    if not problems:
        return {}
    seed_everything(args.seed, "evaluation")  # every evaluation draws the same random numbers
    repeated = [problem for problem in my_share(problems) for _ in range(args.eval_samples)]
    prompts = []
    for problem in repeated:
        strategy = problem["strategy"] if guided else None
        prompts.append(build_prompt(tokenizer, problem["problem"], args.system_prompt, strategy))
    ro = rollout(model, tokenizer, prompts, args.eval_temperature, args)
    correct = reward(ro.texts, repeated) >= 0.5
    num_correct, num_samples = sum_over_processes(correct.sum(), len(repeated))
    name = "eval/accuracy_guided" if guided else "eval/accuracy"
    return {name: num_correct / num_samples}


def evaluate_both(model, tokenizer, problems: list[dict], reward, args: Args) -> dict[str, float]:
    """Return held-out accuracy without the strategy and, if every problem has one, with the strategy."""
    metrics = evaluate(model, tokenizer, problems, reward, args)
    if all("strategy" in problem for problem in problems):
        metrics |= evaluate(model, tokenizer, problems, reward, args, guided=True)
    return metrics


def positions_with_strategy(problems: list[dict], args: Args) -> list[int]:
    """Return the positions of the problems that get guided samples."""
    if args.distill == "none":
        return []
    return [q for q, problem in enumerate(problems) if "strategy" in problem]


def rollout_metrics(ro: Rollout, groups: Tensor, num_auto: int) -> dict[str, float]:
    """Return the metrics of a step's autonomous samples, whose rewards are `groups` [B, G]."""
    mask, truncated = ro.mask[:num_auto], ro.truncated[:num_auto]
    kept_mass = ro.kept_mass[:num_auto][mask]
    num_tokens, num_truncated, mass = sum_over_processes(mask.sum(), truncated.sum(), kept_mass.sum())
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
    check_strategist(args)
    run = Run(args)                                   # checks the directory, writes nothing yet
    reward = load_reward(args.reward)
    tokenizer = load_tokenizer(args.model)
    data = load_data(args, tokenizer, reward)
    path = Path(args.strategies or run.folder / "strategies.jsonl")
    attach_strategies(data.train, data.held_out, path, tokenizer, args)
    missing = problems_to_extract(data.train, args)
    if run.latest_step() > 0:                         # a resumed run keeps the strategies it began with
        missing = []
    check_strategies(data.train, missing, args)
    found = sum("strategy" in problem for problem in data.train)
    memory = choose_memory(args)                      # may switch on checkpointing and offload
    run.print_plan(data, memory, f"({args.group_size} + {args.guided_group_size} guided)",
                   strategies=f"found {found}, to extract {len(missing)}, in {path}")
    if args.dry_run:
        return
    model = None
    if not (args.extract_only and args.strategist):
        model = load_policy(args)                     # fp32 weights, sharded under torchrun
    run.create(data)
    if missing:
        extract_strategies(missing, model, tokenizer, path, args)
        attach_strategies(data.train, [], path, tokenizer, args)
        check_strategies(data.train, [], args)
    if args.extract_only:
        return
    sft_warmup(model, tokenizer, data.warmup, run, args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    start = run.resume(model, optimizer)              # 0 for a new run
    step = start                                      # if no step is left to run
    if start == 0 and data.held_out:
        run.log(0, evaluate_both(model, tokenizer, data.held_out, reward, args))

    for step in range(start + 1, args.steps + 1):
        # ---- sample problems
        seed_everything(args.seed, "step", step)
        problems = my_share(problems_of_step(data.train, step, args.prompts_per_step, args.seed))  # b of B
        repeated = [problem for problem in problems for _ in range(args.group_size)]               # b G
        num_auto = len(repeated)
        with_strategy = positions_with_strategy(problems, args)
        guided = [{**problems[q], "guided": True}
                  for q in with_strategy for _ in range(args.guided_group_size)]
        repeated += guided                                                                         # N
        prompts = [build_prompt(tokenizer, problem["problem"], args.system_prompt) for problem in repeated]
        guided_prompts = [build_prompt(tokenizer, problem["problem"], args.system_prompt, problem["strategy"])
                          for problem in guided]
        sampling_prompts = prompts[:num_auto] + guided_prompts                                     # N

        # ---- rollout
        rollout_start = time.perf_counter()
        ro = rollout(model, tokenizer, prompts, args.temperature, args, sampling_prompts)
        rollout_end = time.perf_counter()

        # ---- rewards and advantages
        rewards = reward(ro.texts, repeated)                                          # [N]
        groups = gather(rewards[:num_auto].view(len(problems), args.group_size))      # [B, G], all processes
        advantages = group_advantages(groups, args.scale_rewards)                     # [B, G]
        advantages = my_share(advantages).flatten()                                   # [b G]
        if not args.autonomous_grpo:
            advantages = torch.zeros_like(advantages)
        distillation, guided_metrics = weigh_problems(rewards, with_strategy, len(problems), args)

        # ---- update
        train_start = time.perf_counter()
        lr = learning_rate(step, args.lr, args.lr_schedule, args.lr_warmup_steps, args.steps)
        optimizer.param_groups[0]["lr"] = lr
        metrics = update(model, optimizer, ro, advantages, distillation, args)
        train_end = time.perf_counter()

        # ---- log, evaluate, save
        metrics |= rollout_metrics(ro, groups, num_auto)
        metrics |= guided_metrics
        metrics |= {
            "lr": lr,
            "time/rollout_s": rollout_end - rollout_start,
            "time/grade_s": train_start - rollout_end,
            "time/train_s": train_end - train_start,
            "tokens_per_s": sum_over_processes(ro.mask.sum())[0] / (train_end - rollout_start),
        }
        is_due = args.eval_every and step % args.eval_every == 0
        if is_due or step == args.steps:
            metrics |= evaluate_both(model, tokenizer, data.held_out, reward, args)
        run.log(step, metrics, repeated, rewards.tolist(), ro.texts)
        if args.save_every and step % args.save_every == 0:
            run.save(step, model, optimizer)
        if run.should_stop():
            break
    run.finish(step, model, tokenizer, optimizer)


# ---------------------------------------------------------------- strategies (App. B, C)

EXTRACTION_PROMPT = """\
Here are a problem and a full solution. Write down the strategy behind the solution, so that somebody who
never sees the solution can find it alone.

Answer in three parts with exactly these labels, and write nothing before or after them:
Problem type: the kind of problem, as precisely as the subject's own terms allow.
Strategy: the principle, theorem or technique that cracks it, and what in the problem calls for it.
Steps:
1. what to do first
2. what to do next, and so on, in the order of the work

Say what to do and never what comes out of it: no calculation, no intermediate value, and above all not the
answer. A step is one move of thought, not one line of algebra; it should hold for a sibling of this problem
and still tell the reader what to do. At most 200 words.

Problem:
{problem}

Solution:
{solution}"""

SCORING_PROMPT = """\
Here are a problem, its answer, and {n} strategies that are meant to help somebody solve it without seeing the
answer. Give each strategy one score from 0 (useless) to 1 (perfect), weighing four questions:
- Problem type: is it right, and specific rather than the name of a whole subject?
- Strategy: does it fit this problem, is it specific, and is it more than the obvious?
- Steps: are they at the right level of detail, neither empty advice nor the calculation retold?
- Secrecy: is there nothing of the calculation or the answer in it? One that lets the answer slip deserves 0.

Write one line for each strategy and nothing else, in this form:
Strategy 1: 0.75

Problem:
{problem}

Answer:
{answer}

{strategies}"""

COPIED_FORM = "the kind of problem, as precisely as"  # an answer with these words copied the form
PROBLEMS_AT_ONCE = 32   # per process, between two writes of the strategies file
REQUESTS_AT_ONCE = 16   # to an endpoint
ENDPOINT_RETRIES = 5
ENDPOINT_TIMEOUT = 600  # seconds

Ask = Callable[[list[str], float], list[str | None]]  # prompts, temperature -> answers; None: no answer


def check_strategist(args: Args) -> None:
    """Refuse an endpoint that cannot be asked, before anything is loaded."""
    is_url = is_endpoint(args)
    if is_url and re.search("[@?#]", args.strategist):
        refuse("--strategist: take the key or password out of the address and put it into the environment "
               "variable OPENAI_API_KEY")
    if is_url and not args.strategist_model:
        refuse(f"--strategist {args.strategist} is an endpoint: name its model with --strategist_model")
    if args.strategist_model and not is_url:
        refuse(f"--strategist_model {args.strategist_model} belongs to an endpoint: give its address, "
               "http(s)://HOST:PORT/v1, as --strategist")
    try:
        is_object = isinstance(json.loads(args.strategist_args), dict)
    except ValueError:
        is_object = False
    if not is_object:
        refuse(f"--strategist_args {args.strategist_args}: it must be a JSON object")
    if is_url:
        try:
            import openai  # noqa: F401
        except ImportError:
            refuse("--strategist: an endpoint needs the openai package: pip install openai")
    if args.strategies and Path(args.strategies).is_dir():
        refuse(f"--strategies {args.strategies}: this is a folder; name a file in it")
    if args.strategies and not Path(args.strategies).absolute().parent.is_dir():
        refuse(f"--strategies {args.strategies}: there is no such folder")


def is_endpoint(args: Args) -> bool:
    return (args.strategist or "").startswith(("http://", "https://"))


def attach_strategies(train: list[dict], held_out: list[dict], path: Path, tokenizer, args: Args) -> None:
    """Attach the file's strategies to the training problems, and drop those that make a prompt too long."""
    strategies = from_first_process(lambda: read_strategies(path))  # no other one writes it
    for problem in train:
        strategy = strategies.get(problem["problem"])
        if strategy and "strategy" not in problem:
            problem["strategy"] = strategy
    too_long = []
    for problem in train + held_out:
        if "strategy" in problem and not guided_prompt_fits(problem, problem["strategy"], tokenizer, args):
            del problem["strategy"]
            too_long.append(problem["id"])
    if too_long:
        print(f"dropped {len(too_long)} strategies that make the prompt too long; first: id {too_long[0]}")


def problems_to_extract(train: list[dict], args: Args) -> list[dict]:
    """Return the problems with a solution but no strategy, also those whose extraction failed before."""
    if args.distill == "none" or args.strategist == "none" or not (args.steps or args.extract_only):
        return []
    return [problem for problem in train if "solution" in problem and "strategy" not in problem]


def check_strategies(train: list[dict], missing: list[dict], args: Args) -> None:
    """Refuse if no problem has or will get a strategy. Print how many problems are trained by GRPO alone."""
    if args.distill == "none" or not args.steps:
        return
    without = sum("strategy" not in problem for problem in train) - len(missing)
    if without == len(train):
        refuse("none of the problems has a strategy: add strategies or solutions to the rows, name a "
               "stronger --strategist or a file with --strategies, or train without strategies "
               "(--distill none)")
    if without:
        print(f"{without} of {len(train)} problems have no strategy: they are trained by GRPO alone")


def read_strategies(path: Path) -> dict[str, str | None]:
    """Return problem -> strategy of a strategies file; None if the extraction found none."""
    strategies = {}
    if not path.exists():
        return strategies
    for place, row in read_jsonl(path, skip_unfinished=True):
        row = row if isinstance(row, dict) else {}
        strategy = row.get("strategy")
        if not isinstance(row.get("problem"), str) or not isinstance(strategy, str | None):
            refuse(f'{place}: must be a JSON object with "problem" and "strategy"')
        if strategy:
            strategies[row["problem"]] = strategy
        else:
            strategies.setdefault(row["problem"], None)
    return strategies


def guided_prompt_fits(problem: dict, strategy: str, tokenizer, args: Args) -> bool:
    """Return True if the prompt with the strategy is within --max_prompt_tokens and the context."""
    prompt = build_prompt(tokenizer, problem["problem"], args.system_prompt, strategy)
    limit = min(args.max_prompt_tokens, context_length(args.model) - args.max_new_tokens)
    return len(prompt) <= limit


def extract_strategies(problems: list[dict], model, tokenizer, path: Path, args: Args) -> None:
    """Extract a strategy for each of these problems and append them to the file, batch by batch."""
    ask = endpoint(args) if is_endpoint(args) else local_strategist(model, tokenizer, args)
    if rank() == 0 and path.exists():  # a kill may have cut off its last line: do not append to half a line
        rows = [row for place, row in read_jsonl(path, skip_unfinished=True)]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    results = []
    size = PROBLEMS_AT_ONCE * world_size()
    for first in range(0, len(problems), size):
        batch = problems[first:first + size]
        seed_everything(args.seed, "strategies", first)
        if is_endpoint(args):
            new = from_first_process(lambda: extract(batch, ask, tokenizer, args))
        else:
            shares = from_all_processes(extract(my_share(batch), ask, tokenizer, args))
            new = [result for share in shares for result in share]
        if rank() == 0:
            append_jsonl(path, new)
        results += new
        found = sum(result["strategy"] is not None for result in results)
        print(f"strategies: {len(results)} of {len(problems)} problems done, {found} found")
    print_quality(results)


def extract(problems: list[dict], ask: Ask, tokenizer, args: Args) -> list[dict]:
    """Return, for each problem, the best-scored candidate strategy (or None) together with all candidates."""
    n = args.strategy_candidates
    prompts = [EXTRACTION_PROMPT.format(problem=problem["problem"], solution=problem["solution"])
               for problem in problems for _ in range(n)]
    answers = ask(prompts, 1.0)
    results = []
    for k, problem in enumerate(problems):
        candidates = [judge(answer, problem, tokenizer, args) for answer in answers[k * n:(k + 1) * n]]
        results.append({"id": problem["id"], "problem": problem["problem"], "strategy": None, "score": None,
                        "candidates": candidates})
    to_score = [k for k, result in enumerate(results) if accepted(result)]
    verdicts = ask([scoring_prompt(problems[k], accepted(results[k])) for k in to_score], 0.0)
    for k, verdict in zip(to_score, verdicts):
        rivals = accepted(results[k])
        for candidate, score in zip(rivals, parse_scores(verdict or "", len(rivals))):
            candidate["score"] = score
        best = max(rivals, key=lambda candidate: candidate["score"] or 0.0)
        results[k] |= {"strategy": best["strategy"], "score": best["score"]}
    return results


def accepted(result: dict) -> list[dict]:
    """Return a result's candidates that are not rejected."""
    return [candidate for candidate in result["candidates"] if "rejected" not in candidate]


def judge(answer: str | None, problem: dict, tokenizer, args: Args) -> dict:
    """Return a candidate: its strategy, and why it is rejected if it is."""
    if answer is None:
        return {"strategy": None, "rejected": "no answer"}
    strategy = parse_strategy(answer)
    candidate = {"strategy": strategy}
    if strategy is None:
        candidate["rejected"] = "not in three parts"
    elif gives_away(strategy, problem["answer"], problem["problem"]):
        candidate["rejected"] = "gives the answer away"
    elif not guided_prompt_fits(problem, strategy, tokenizer, args):
        candidate["rejected"] = "too long"
    return candidate


# Words after which a strategy states a value: "the answer is exactly 4", "this leaves 4", "x = 4".
ANNOUNCEMENT = re.compile(
    r"\b(?:answers?|results?|is|are|be|equals?|becomes?|leav(?:es?|ing)|gets?|gives?|yields?|obtains?|finds?|"
    r"remains?|boxed)(?: (?:exactly|only|just|be|to|the|value))*[ :(]*$|= *$", re.IGNORECASE)
# What a digit may number or count without giving anything away: "Step 4:", "4. Check", "2 parts", "mod 7".
NUMBERED = re.compile(
    r"(?:^|\n|\b(?:steps?|parts?|cases?|mod(?:ulo)?|base|by|into|in|of|power|and|degree)) *$", re.IGNORECASE)
COUNTED = re.compile(
    r" *(?:[a-z]+ )?(?:steps?|parts?|cases?|times|sides|equations?|variables?)\b", re.IGNORECASE)


def plain_text(text: str) -> str:
    r"""Return a text without LaTeX's markup: `$\frac{3}{4}$` becomes 3/4, 42{,}000 becomes 42000."""
    text = re.sub(r"\\[dt]?frac *\{([^{}]*)\} *\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"(?<=[0-9])(?:,|\{,\}|,\\!|\\,)(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\\boxed", " boxed ", text)
    text = re.sub(r"\\(?:text|mathrm|left|right|displaystyle|[()\[\],;!])|[${}*]", "", text)
    return text.replace("=", " = ")


def gives_away(strategy: str, answer: str, problem: str = "") -> bool:
    """Return True if the strategy contains the answer as a whole number, word or formula.

    A single digit or letter, or an answer that the problem contains as well, must be announced ("the answer
    is", "this leaves"). In the last line a digit is the answer unless it numbers or counts something.
    """
    core = plain_text(answer).strip()
    text = plain_text(strategy)
    whole = re.compile(rf"(?<![\w.^/+-]){re.escape(core)}(?![\w^/]|\.[0-9])", re.IGNORECASE)
    is_short = len(core) == 1 or core in ("-1", "yes", "no")
    is_common = core in ("0", "1", "-1")  # stands in equations of every kind
    in_problem = whole.search(plain_text(problem)) is not None
    last_line = text.rstrip().rfind("\n")
    for found in whole.finditer(text):
        before = text[:found.start()]
        after = text[found.end():]
        if is_short and (NUMBERED.search(before) or COUNTED.match(after)):
            continue
        if is_common and before.endswith("= "):
            continue
        if ANNOUNCEMENT.search(before):
            return True
        stands_at_the_end = found.start() > last_line and not is_common and core.isdigit()
        if not in_problem and (not is_short or stands_at_the_end):
            return True
    return False


def scoring_prompt(problem: dict, candidates: list[dict]) -> str:
    """Return the prompt that asks for a score of every candidate."""
    listed = [f"Strategy {k}:\n{candidate['strategy']}" for k, candidate in enumerate(candidates, 1)]
    return SCORING_PROMPT.format(n=len(candidates), problem=problem["problem"], answer=problem["answer"],
                                 strategies="\n\n".join(listed))


def without_thinking(answer: str) -> str:
    """Return the text after the thinking; empty if the thinking never ends."""
    text = answer.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def parse_strategy(answer: str) -> str | None:
    """Return the strategy in an answer, or None if one of its three parts is missing or empty."""
    text = without_thinking(answer).replace("**", "").replace("__", "")
    text = re.sub(r"^[#*> ]+", "", text, flags=re.MULTILINE)
    label = r"^(?:[0-9][.)] )?(?:problem )?(type|strategy|steps)(?: \(.*\))? *(?::|$)"
    labels = list(re.finditer(label, text, re.IGNORECASE | re.MULTILINE))
    names = [found[1].lower() for found in labels]
    first = next((k for k in range(len(names)) if names[k:k + 3] == ["type", "strategy", "steps"]), None)
    if first is None:
        return None
    kind, strategy, steps = labels[first:first + 3]
    parts = [text[kind.end():strategy.start()], text[strategy.end():steps.start()], text[steps.end():]]
    if COPIED_FORM in text or not all(re.search(r"\w", part) for part in parts):
        return None
    return text[kind.start():].strip()


def parse_scores(answer: str, n: int) -> list[float | None]:
    """Return the score of each of n strategies, None if the answer has no score from 0 to 1 for it."""
    text = without_thinking(answer).replace("*", "")
    lines = re.findall(r"^\W*(?:strategy )?([0-9]+)\W*?[:=|] *([01](?:\.[0-9]+)?|\.[0-9]+)(?![0-9./])", text,
                       re.MULTILINE | re.IGNORECASE)
    scores = {int(number): float(score) for number, score in lines if float(score) <= 1}
    return [scores.get(k) for k in range(1, n + 1)]


def endpoint(args: Args) -> Ask:
    """Return a function that asks the model behind an OpenAI-compatible address.

    The openai package retries by itself. A prompt without an answer costs only its candidate. If no prompt of
    a batch gets an answer, the program ends with the last error. A batch with fewer prompts than a
    problem has candidates asks for scores. It may fail without ending the program.
    """
    import openai
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
    client = openai.OpenAI(base_url=args.strategist, api_key=key, max_retries=ENDPOINT_RETRIES,
                           timeout=ENDPOINT_TIMEOUT)
    errors = []

    def ask_one(prompt: str, temperature: float) -> str | None:
        request = {"model": args.strategist_model, "messages": [{"role": "user", "content": prompt}],
                   "temperature": temperature, **json.loads(args.strategist_args)}
        try:
            choice = client.chat.completions.create(**request).choices[0]
        except Exception as error:  # the package's own kinds, and whatever a server's odd answer causes
            errors.append(f"{type(error).__name__}: {error}")
            return None
        if choice.finish_reason == "length" or not choice.message.content:
            errors.append("an answer is empty or cut off; a model that thinks first needs a larger limit, as "
                          "in --strategist_args '{\"max_completion_tokens\": 8192}'")
            return None
        return choice.message.content

    def ask(prompts: list[str], temperature: float) -> list[str | None]:
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            answers = list(pool.map(lambda prompt: ask_one(prompt, temperature), prompts))
        if len(prompts) >= args.strategy_candidates and all(answer is None for answer in answers):
            reason = errors[-1]
            if key != "none":
                reason = reason.replace(key, "***")  # servers repeat the key they refuse
            refuse(f"--strategist {args.strategist}: no answer to {len(prompts)} requests, last error: "
                   f"{reason}. The strategies found so far are saved. --resume asks for the rest; "
                   "--strategist none trains without them")
        return answers

    return ask


def local_strategist(model, tokenizer, args: Args) -> Ask:
    """Return a function that asks a model on this machine: --strategist, or the policy itself."""
    name, flag_name = args.model, "--model"
    if args.strategist:
        name, flag_name = args.strategist, "--strategist"
        tokenizer = load_tokenizer(name, flag_name)
        model = load_model(name, flag_name)
    longest_prompt = context_length(name, flag_name) - args.strategist_max_new_tokens

    def ask(prompts: list[str], temperature: float) -> list[str | None]:
        all_ids = [build_prompt(tokenizer, prompt, "") for prompt in prompts]
        fitting = [k for k, ids in enumerate(all_ids) if len(ids) <= longest_prompt]
        asked = replace(args, max_new_tokens=args.strategist_max_new_tokens)
        ro = rollout(model, tokenizer, [all_ids[k] for k in fitting], temperature, asked)
        answers = [None] * len(prompts)
        for k, text, truncated in zip(fitting, ro.texts, ro.truncated.tolist()):
            answers[k] = None if truncated else text
        return answers

    return ask


def print_quality(results: list[dict]) -> None:
    """Print the bands of the best scores and the reasons for rejections.

    The paper (App. C) has 39.4% in [0.8, 1], 54.4% in [0.5, 0.8) and 6.2% below.
    """
    scores = [result["score"] for result in results if result["score"] is not None]
    high = sum(score >= 0.8 for score in scores)
    low = sum(score < 0.5 for score in scores)
    reasons = Counter(candidate["rejected"] for result in results for candidate in result["candidates"]
                      if "rejected" in candidate)
    print(f"strategies: {len(scores)} scored, {high} in [0.8, 1], {len(scores) - high - low} in [0.5, 0.8), "
          f"{low} below")
    print(f"strategies: rejected candidates: {dict(reasons.most_common()) or 'none'}")


if __name__ == "__main__":
    main()
