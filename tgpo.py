"""TGPO (Teacher-Guided Policy Optimization): GRPO plus the teacher's own next token at every prefix that the student visits.

What differs from grpo_baseline.py (formulas beside the functions; the paper is arXiv 2605.13230):
  1. A frozen teacher reads the student's rollouts, token ids as sampled, and says what IT would write next at every place.
  2. TGPO: loss + lambda_s x mean of -log pi(y* | s), y* the teacher's argmax, on all rollouts, right or wrong, end token included.
  3. lambda_s = max(0.002 - 1e-5 (s - 1), 0) at step s. No group without reward spread is idle while it is above 0.
  4. --guidance has the methods it is compared with: other labels, TGPO-Adv, RKL (OPD), KDRL, exact reverse KL, none (GRPO).
  5. Student and teacher are compared on the token ids that both tokenizers have; the teacher's end token means the student's.

    python tgpo.py                                                                          # the built-in demo: CPU, offline, minutes
    python tgpo.py --model Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-30B-A3B-Thinking-2507   # real problems
    python tgpo.py --model STUDENT --teacher TEACHER --measure_divergence 64 --out DIR      # how far apart are they?
"""
import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from common import (DEFAULT_DATASET, SYSTEM_PROMPT, Run, Watch, as_forward, batch_of_step, build_prompt, check_context, check_flags, clip_gradients,
                    completion_hidden, completion_mask, dealt, demo_recipe, device_of, everyones, gathered, generate, grader_counts, in_step,
                    load_model, load_policy, load_problems, load_reward, load_tokenizer, log_prob_and_entropy, microbatches, over_vocabulary, padded,
                    parse_args, peak_memory_gb, pick_device, printable, progress, refuse, rollout_weights, say_plan, say_table, score,
                    seed_everything, sft_warmup, shared_vocabulary, start_processes, stop_ids, summed, usable_rows, warmup_split, within_memory,
                    world, write_atomic)

# Letters: B problems of a step, G samples a problem, N rows (problems x samples), P prompt, C completion, V vocabulary.


# ---------------------------------------------------------------- flags

# guidance: (coefficient, its fall a step, reward weight), the paper's
GUIDANCE = {"tgpo": (0.002, 1e-5, 1.0), "tgpo-sampled": (0.002, 1e-5, 1.0), "tgpo-topk": (0.002, 1e-5, 1.0), "tgpo-adv": (0.02, 1e-4, 1.0),
            "tgpo-adv-matched": (0.02, 1e-4, 1.0), "rkl": (1.0, 0.0, 0.0), "kdrl": (0.002, 0.0, 1.0), "reverse-kl": (1.0, 0.0, 0.0),
            "none": (0.0, 0.0, 1.0)}
WITH_LABELS = ("tgpo", "tgpo-sampled", "tgpo-adv", "tgpo-adv-matched")          # of the teacher's next token
AS_LOSS = ("tgpo", "tgpo-sampled", "tgpo-topk", "kdrl", "reverse-kl")           # beside the policy loss; the others change its advantages


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
    warmup_frac: float = HfArg(default=0.0, help="share of the problems with a solution for the SFT warm-up, not for RL; 0: none, as in TGPO's paper")
    warmup_lr: float = HfArg(default=1e-5, help="its AdamW learning rate, at its highest")
    warmup_batch_size: int = HfArg(default=64, help="its solutions a step")
    warmup_epochs: int = HfArg(default=10, help="its epochs; the one with the lowest validation loss is kept")
    # rollouts
    steps: int = HfArg(default=300, help="training steps, one rollout batch each; 0: the SFT baseline")
    prompts_per_step: int = HfArg(default=16, help="problems a step")
    group_size: int = HfArg(default=8, help="samples a problem")
    max_new_tokens: int = HfArg(default=2048, help="longest completion, in tokens")
    max_prompt_tokens: int = HfArg(default=1024, help="rows with a longer prompt are dropped")
    temperature: float = HfArg(default=1.0, help="sampling temperature; also divides the logits of the loss")
    top_p: float = HfArg(default=1.0, help="nucleus sampling")
    fast_rollout: str = HfArg(default="auto", help="off: transformers' generate; auto: a faster loop for model types tested with it; on: also a CUDA graph")
    # objective
    clip_low: float = HfArg(default=0.2, help="ratio clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.2, help="ratio clipped above 1 + clip_high")
    loss_type: str = HfArg(default="dapo", help="grpo: mean over a row's tokens, then rows; dapo: over all tokens; dr_grpo: sum / (rows x max_new_tokens)")
    scale_rewards: str = HfArg(default="group", help="divide centred rewards by the std of the group, of the batch, or none")
    reward_weight: float = HfArg(default=None, help="times the advantage; 0: distillation without reward (default: 0 for rkl and reverse-kl, else 1)")
    entropy_bonus: float = HfArg(default=0.0, help="times the mean entropy, subtracted from the loss (the authors' code: 0.001)")
    # teacher
    teacher: str = HfArg(default=None, help="hub id or local directory; with the demo model: demo, or demo-same-style")
    guidance: str = HfArg(default="tgpo", help=", ".join(GUIDANCE))
    coefficient: float = HfArg(default=None, help="weight of the guidance at step 1 (default: the paper's for each guidance)")
    coefficient_fall: float = HfArg(default=None, help="what the weight loses a step, down to 0 (default: the paper's)")
    topk: int = HfArg(default=None, help="teacher's tokens compared by tgpo-topk (default 20) and by reverse-kl (default: all)")
    teacher_microbatch_tokens: int = HfArg(default=32768, help="padded tokens a forward pass of the teacher")
    teacher_device: str = HfArg(default=None, help="where the teacher computes, such as cuda:1 (default: with the student)")
    teacher_offload: bool = HfArg(default=False, help="keep the teacher in CPU memory while it is not reading")
    measure_divergence: int = HfArg(default=0, help="train nothing: measure student against teacher on so many rollouts, into --out's divergence.json")
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
    if args.guidance not in GUIDANCE:
        refuse(f"--guidance {args.guidance}: choose {', '.join(GUIDANCE)}")
    for flag, value in zip(("coefficient", "coefficient_fall", "reward_weight"), GUIDANCE[args.guidance]):
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.guidance == "tgpo-topk" and args.topk is None:
        args.topk = 20
    check_flags(args, dict(coefficient=0, coefficient_fall=0, reward_weight=0, entropy_bonus=0, teacher_microbatch_tokens=1, measure_divergence=0))
    if args.topk is not None:
        check_flags(args, dict(topk=1))
    try:
        torch.empty(0, device=args.teacher_device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"--teacher_device {args.teacher_device}: {str(error).splitlines()[0]}")
    if args.teacher_device and world() > 1:
        refuse("--teacher_device: with several processes each holds a part of the teacher on its own GPU; leave it out")
    if args.teacher is None and (args.guidance != "none" or args.measure_divergence):
        refuse("--teacher is missing: name a hub id or directory, or train without one with --guidance none")
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


def coefficient(step: int, start: float, fall: float) -> float:
    """lambda_s = max(start - fall (s - 1), 0) at the 1-based step s. The paper's 0.002 and 1e-5: above 0 at steps 1 to 200."""
    return max(round(start - fall * (step - 1), 12), 0.0)  # rounded: 0.002 - 200 x 1e-5 shall be 0


def chosen_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi(id | s). [m, V], [m] -> [m]; whatever is outside the vocabulary gives some finite number, to be masked."""
    return logits.gather(-1, ids.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0] - logits.logsumexp(-1)


def next_token(teacher_logits: Tensor, sampled: bool = False) -> Tensor:
    """y* = argmax_v pi_T(v | s); or y ~ pi_T(. | s), whose -log pi(y | s) is a one-sample forward KL up to pi_T's entropy. [m, V] -> [m]"""
    return teacher_logits.softmax(-1).multinomial(1)[:, 0] if sampled else argmax(teacher_logits)


def argmax(x: Tensor, block: int = 512) -> Tensor:
    """x.argmax(-1), the first of equals: the first block that holds the maximum, then the place in it. [m, V] -> [m]

    On a CPU a tenth of the time, because a maximum is found in vectors and its place one by one.
    """
    whole = x.shape[-1] // block * block
    tail = x[:, whole:]
    if not whole:
        return tail.argmax(-1)
    blocks, rows = x[:, :whole].unflatten(-1, (-1, block)), torch.arange(len(x), device=x.device)
    first = blocks.amax(-1).argmax(-1)
    best = first * block + blocks[rows, first].argmax(-1)
    if not tail.shape[-1]:
        return best
    late = whole + tail.argmax(-1)
    return torch.where(x[rows, late] > x[rows, best], late, best)


def chosen_logps_in_place(logits: Tensor, ids: Tensor, shared: int) -> Tensor:
    """`chosen_logps` over the first `shared` ids, with no second [m, V]: the logits become probabilities. [m, V], [m] -> [m]

    It is log p of the likeliest token, which no rounding makes 0, plus how far the id's logit is below that one's.
    """
    logits[:, shared:] = -math.inf
    pair = torch.stack([argmax(logits), ids.clamp(0, shared - 1)], -1)
    best, own = logits.gather(-1, pair).unbind(-1)
    return torch.softmax(logits, -1, out=logits).gather(-1, pair)[:, 0].log() + own - best


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """TGPO: -log pi(y* | s). [m, V], [m] -> [m], nats."""
    return -chosen_logps(logits, labels)


def topk_forward_kl(logits: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    """TGPO, top-k: sum over the teacher's top k of p~ (log p~ - log pi(v | s)), p~ renormalised on the k. [m, V], [m, k], [m, k] -> [m]

    `top_logits` are the teacher's logits or log-probs of `top_ids`: renormalising makes them the same.
    """
    p = top_logits.log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1).gather(-1, top_ids))).sum(-1)


def label_bonus(old_label_logps: Tensor, matched: Tensor | bool = True) -> Tensor:
    """TGPO-Adv: A'_it = A_i + c_s pi_old(y*_it | s); this is the pi_old, [n, C]. `matched` [n, C]: the variant "only where a = y*".

    It does not depend on the token sampled, so at rho = 1 it is a state baseline: its expected gradient is 0, and the authors'
    later code dropped it. Kept as an ablation; the variant does depend on it.
    """
    return old_label_logps.exp() * matched


def rkl_advantages(old_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """RKL (OPD): A_it = log pi_T(a) - log pi_old(a), the token's own k1, no return-to-go, no normalisation. [n, C] twice -> [n, C]"""
    return teacher_logps - old_logps


def k2(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KDRL: (log pi_T(a) - log pi(a))^2 / 2. [m] twice -> [m]. Its expected gradient is the reverse KL's.

    Of the two other estimators as a loss, k3 = r - 1 - log r with r = pi_T / pi would have the FORWARD KL's, and k1 = -log r none.
    """
    return (teacher_logps - logps).square() / 2


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(pi || pi_T) over the ids that are given: all shared ones, or the teacher's top k, both renormalised. [m, V] twice -> [m]"""
    plain, teacher = logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (plain.exp() * (plain - teacher)).sum(-1)


def policy_entropy(logits: Tensor) -> Tensor:
    """H(pi(. | s)) with its gradient, for the entropy bonus. [m, V] -> [m], nats"""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def divergences(logits: Tensor, teacher_logits: Tensor, ids: Tensor) -> Tensor:
    """What --measure_divergence reads off every token: [m, V] twice, [m] -> [m, 8].

    Columns: log pi(a), log pi_T(a), a is not pi_T's argmax, overlap of the top 1, 5 and 10 as a share, KL(pi_T || pi), KL(pi || pi_T).
    """
    ours, theirs = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    a, b = (x.topk(min(10, x.shape[-1])).indices for x in (ours, theirs))
    overlaps = [(a[:, :k, None] == b[:, None, :k]).any(-1).float().mean(-1) for k in (1, 5, 10)]
    at = ids[:, None]
    return torch.stack([ours.gather(-1, at)[:, 0], theirs.gather(-1, at)[:, 0], (b[:, 0] != ids).float(), *overlaps,
                        (theirs.exp() * (theirs - ours)).sum(-1), (ours.exp() * (ours - theirs)).sum(-1)], -1)


# ---------------------------------------------------------------- teacher

class Advice(NamedTuple):
    """What the teacher says of each token of the rollout: [N, C], or [m] for the tokens of a chunk."""
    labels: Tensor     # what it would write here, as a student's id; -1 where the student has no such token
    logps: Tensor      # log pi_T(a) of the student's token, over the shared ids
    agrees: Tensor     # True where its argmax is the student's token
    top_ids: Tensor    # [..., k] its likeliest shared ids (k is 0 where no method wants them)
    top_logits: Tensor  # [..., k] and their logits: every use renormalises on the k


@dataclass
class Teacher:
    """A frozen model that reads the student's token ids."""
    model: torch.nn.Module
    shared: int            # token ids below it mean the same to both
    end: int               # the token that the student ends with,
    own_end: int           # and the teacher: the same one where the student stops at the teacher's
    own_ends: list[int]    # all tokens that the teacher ends with and the student does not
    device: torch.device   # where it reads
    offload: bool = False  # in CPU memory when it does not

    @torch.no_grad()
    def hidden(self, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Tensor:
        """Its final hidden states at the student's places, [M, d], as `completion_hidden`. Ids that it has no embedding for become 0."""
        if self.offload:
            self.model.to(self.device)
        known = completions.where(completions < self.model.get_input_embeddings().weight.shape[0], 0)
        return as_forward(self.model, lambda: completion_hidden(self.model, prompts, known.to(self.device), mask.to(self.device)))

    def rest(self) -> None:
        if self.offload:
            self.model.to("cpu")

    def align(self, logits: Tensor) -> Tensor:
        """In place: where it ends with another token than the student, the two change columns. [m, V_T] -> [m, V_T]"""
        ends = [self.end, self.own_end]
        if self.end != self.own_end and max(ends) < logits.shape[-1]:
            logits[:, ends] = logits[:, ends[::-1]]
        return logits

    def read(self, logits: Tensor, ids: Tensor, topk: int, sampled: bool) -> Advice:
        """Its aligned logits [m, V_T], which are used up, and the student's tokens [m] -> advice.

        Labels come from the whole vocabulary, log-probs from the shared ids. Beside the forward pass it is the passes over the vocabulary that take
        time: here three, none of them a copy (tests/bench/teacher_pass.py).
        """
        shared, ends = logits[:, :self.shared], torch.tensor(self.own_ends, device=logits.device)
        best = next_token(logits)
        labels = next_token(logits, sampled=True) if sampled else best
        best, labels = (torch.where(torch.isin(y, ends), self.end, y) for y in (best, labels))
        top = shared.topk(topk)
        logps = chosen_logps_in_place(logits, ids, self.shared)  # the last to see the logits
        return Advice(torch.where(labels < self.shared, labels, -1), logps, best == ids, top.indices, top.values)

    @torch.no_grad()
    def advise(self, ro: Rollout, rows: list[int], args: Args) -> Advice:
        """One pass over the rollout's rows, in micro-batches of its own, never more than a chunk of logits at once."""
        device, k = ro.completions.device, (args.topk or 0) if args.guidance in ("tgpo-topk", "reverse-kl") else 0
        shape = ro.mask.shape
        advice = Advice(torch.full(shape, -1, device=device), torch.zeros(shape, device=device), torch.zeros(shape, device=device, dtype=torch.bool),
                        torch.zeros(*shape, k, device=device, dtype=torch.long), torch.zeros(*shape, k, device=device))
        lengths = ro.mask.sum(1).tolist()
        for some in in_step(microbatches([len(ro.prompts[i]) + lengths[i] for i in rows], args.teacher_microbatch_tokens)):
            batch = [rows[i] for i in some]
            width = max((lengths[i] for i in batch), default=1)
            mask, completions = ro.mask[batch, :width], ro.completions[batch, :width]
            hidden = self.hidden([ro.prompts[i] for i in batch], completions, mask)
            flat = over_vocabulary(lambda logits, ids: self.read(self.align(logits), ids, k, args.guidance == "tgpo-sampled"),
                                   self.model, [hidden], [completions[mask].to(self.device)], args.temperature)
            row, t = mask.nonzero(as_tuple=True)
            for to, values in zip(advice, flat, strict=True):
                to[torch.tensor(batch, device=device, dtype=torch.long)[row], t] = values.to(device)
        self.rest()
        return advice


def load_teacher(args: Args, tokenizer, own_tokenizer, shared: int, eos: list[int]) -> Teacher:
    """bf16 on a GPU, fp32 elsewhere; of several processes each holds a part. `eos`: what the student stops at."""
    device = torch.device(args.teacher_device or pick_device())
    if world() > 1:
        model = load_policy(args.teacher, "--teacher", trained=False, cpu_offload=args.teacher_offload)
    else:
        model = load_model(args.teacher, "--teacher", torch.bfloat16 if device.type == "cuda" else torch.float32,
                           "cpu" if args.teacher_offload else device).requires_grad_(False)
    end, own_end = tokenizer.eos_token_id, own_tokenizer.eos_token_id
    return Teacher(model, shared, end, end if own_end in eos else own_end, [i for i in stop_ids(model, own_tokenizer) if i not in eos],
                   device, args.teacher_offload and world() == 1)


# ---------------------------------------------------------------- update

def update(model, optimizer, ro: Rollout, advantages: Tensor, teacher: Teacher | None, coef: float, args: Args, watch: Watch) -> dict | None:
    """All optimizer steps of one rollout batch -> metrics; None if stopped before the first, with the weights untouched.

    Rows whose advantage is 0 are skipped while nothing else moves them (coef is 0): they add nothing to the gradient, but still
    count in the normaliser. The tgpo/ metrics are means over the tokens that are scored, as the entropy is.
    """
    guidance, advantages = args.guidance if coef else "none", advantages * args.reward_weight
    exact = guidance == "reverse-kl" and not args.topk  # the one method that wants all of the teacher's logits at the update
    device, G = ro.mask.device, args.group_size
    stats, norms, nonfinite = defaultdict(float), [], 0
    lengths = ro.mask.sum(1).tolist()
    live = {i for i in range(len(advantages)) if advantages[i] != 0 or guidance != "none" or args.entropy_bonus}
    advantages = advantages.to(device)
    advice = teacher.advise(ro, sorted(live), args) if teacher and not exact else ()
    taught = ro.mask  # [N, C] where the guidance has something to say: labels that the student lacks are dropped
    if guidance in WITH_LABELS:
        taught = ro.mask & (advice.labels >= 0)
    elif guidance in ("rkl", "kdrl"):
        taught = ro.mask & (ro.completions < teacher.shared)

    def per_token(logits: Tensor, ids: Tensor, *told: Tensor) -> tuple[Tensor, ...]:
        """Student's logits [m, V], tokens [m], the teacher's advice or hidden states -> [m] each: log pi(a), entropy, and with a
        teacher log pi(a) over the shared ids, the guidance's loss, the labels, log pi_T(a), agreement."""
        logps, entropy = log_prob_and_entropy(logits, ids)
        if args.entropy_bonus:
            entropy = policy_entropy(logits)
        if teacher is None:
            return logps, entropy
        shared, guide = logits[:, :teacher.shared], torch.zeros_like(logps)
        near = logps if shared.shape == logits.shape else chosen_logps(shared, ids)
        if exact:
            with torch.no_grad():
                teacher_logits = teacher.align(teacher.model.get_output_embeddings()(told[0]).float() / args.temperature).to(device)
            guide = reverse_kl(shared, teacher_logits[:, :teacher.shared])
            with torch.no_grad():
                told = teacher.read(teacher_logits, ids, 0, False)
        labels, teacher_logps, agrees, top_ids, top_logits = told
        if guidance in WITH_LABELS:
            guide = label_loss(shared, labels)
        elif guidance == "tgpo-topk":
            guide = topk_forward_kl(shared, top_ids, top_logits)
        elif guidance == "kdrl":
            guide = k2(near, teacher_logps)
        elif guidance == "reverse-kl" and not exact:
            guide = reverse_kl(shared.gather(-1, top_ids), top_logits)
        return logps, entropy, near, guide, labels, teacher_logps, agrees

    def scores_of(batch: list[int]) -> tuple[Tensor, ...]:
        width = max((lengths[i] for i in batch), default=1)
        mask = ro.mask[batch, :width]
        prompts, completions = [ro.prompts[i] for i in batch], ro.completions[batch, :width]
        told = [teacher.hidden(prompts, completions, mask)] if exact else [x[batch, :width][mask] for x in advice]

        def forward() -> tuple[Tensor, ...]:
            hidden = completion_hidden(model, prompts, completions, mask)
            return over_vocabulary(per_token, model, [hidden], [completions[mask], *told], args.temperature)

        return mask, *[torch.zeros(mask.shape, dtype=x.dtype, device=device).masked_scatter(mask, x) for x in as_forward(model, forward)]

    def cut(rows: list[int], stats: dict) -> list[list[int]]:
        """Micro-batches of rows of like length."""
        sizes = [len(ro.prompts[i]) + lengths[i] for i in rows]
        batches = [[rows[k] for k in batch] for batch in microbatches(sizes, args.microbatch_tokens)]
        stats["tokens"] += sum(sizes)
        stats["padded"] += sum(len(b) * max(len(ro.prompts[i]) + lengths[i] for i in b) for b in batches)
        return in_step(batches)

    old_scores = torch.zeros(3, *ro.mask.shape, device=device)  # log pi_old(a), that over the shared ids, and the guidance's loss
    if args.updates_per_rollout > 1:  # later updates are off-policy: remember what the sampling policy said
        with torch.no_grad():
            for batch in cut(sorted(live), stats):
                mask, logps, _, *more = scores_of(batch)
                for to, values in zip(old_scores, (logps, *more[:2])):
                    to[batch, :mask.shape[1]] = values

    def gradient_of(problems: list[int]) -> dict | None:
        """The gradient of the problems that one optimizer step is made on, accumulated -> sums for the metrics; None if told to stop."""
        part, rows = defaultdict(float), [q * G + j for q in problems for j in range(G)]
        n = summed({"rows": len(rows), "tokens": ro.mask[rows].sum().item(), "taught": taught[rows].sum().item()})
        weights, taught_weights = torch.zeros(2, len(ro.mask), device=device)
        weights[rows] = token_weights(ro.mask[rows], args.loss_type, args.max_new_tokens, n["rows"], n["tokens"])
        taught_weights[rows] = token_weights(taught[rows], args.loss_type, args.max_new_tokens, n["rows"], n["taught"])
        for batch in cut([i for i in rows if i in live], part):
            mask, logps, entropy, *more = scores_of(batch)
            width, A = mask.shape[1], advantages[batch]
            old, *old_more = [x.detach() for x in (logps, *more[:2])] if args.updates_per_rollout == 1 else old_scores[:, batch, :width]
            if teacher:
                near, guide, labels, teacher_logps, agrees = more
                ids, told = ro.completions[batch, :width], taught[batch, :width]
                if guidance in ("tgpo-adv", "tgpo-adv-matched"):
                    A = A[:, None] + coef * told * label_bonus(-old_more[1], labels == ids if guidance == "tgpo-adv-matched" else True)
                elif guidance == "rkl":
                    A = A[:, None] + coef * told * rkl_advantages(old_more[0], teacher_logps)
            loss, clipped = policy_loss(logps, old, A, mask, args.clip_low, args.clip_high)
            loss = (loss * weights[batch, None]).sum()
            if guidance in AS_LOSS:
                loss = loss + coef * (guide * told * taught_weights[batch, None]).sum()
            if args.entropy_bonus:
                loss = loss - args.entropy_bonus * (entropy * weights[batch, None]).sum()
            loss.backward()
            part["loss"] += loss.item()
            part["entropy"] += entropy.sum().item()
            part["clipped"] += clipped.sum().item()
            part["scored"] += mask.sum().item()
            if teacher:
                known = mask & (ids < teacher.shared)
                k1 = (old_more[0] - teacher_logps)[known]
                for name, value in (("known", known), ("dropped", mask & (labels < 0)), ("mismatch", mask & ~agrees), ("k1", k1), ("confident", k1 > 0),
                                    ("nll", -teacher_logps[known])):
                    part[name] += value.sum().item()
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
    if teacher:
        teacher.rest()
    stats = summed(stats)
    metrics = {"loss": stats["loss"] / args.updates_per_rollout, "grad_norm": sum(norms) / max(len(norms), 1), "updates": len(norms),
               "nonfinite_updates": nonfinite, "clip_ratio": stats["clipped"] / max(stats["scored"], 1),
               "padding_frac": 1 - stats["tokens"] / max(stats["padded"], 1)}
    if stats["scored"]:
        metrics["entropy"] = stats["entropy"] / stats["scored"]
    if teacher and stats["scored"]:
        known = max(stats["known"], 1)
        metrics |= {"tgpo/coef": coef, "tgpo/teacher_nll": stats["nll"] / known, "tgpo/reverse_kl_k1": stats["k1"] / known,
                    "tgpo/mismatch": stats["mismatch"] / stats["scored"], "tgpo/dropped_labels": int(stats["dropped"]),
                    "tgpo/student_more_confident": stats["confident"] / known}
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


# ---------------------------------------------------------------- divergence

@torch.no_grad()
def measure(model, teacher: Teacher, tokenizer, problems: list[dict], eos: list[int], args: Args) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rollouts of `problems`, which may repeat -> for each distinct problem its tokens [M, 8] (see `divergences`) and rollouts [n, 2] (length, truncated)."""
    seed_everything(args.seed, 2 ** 31 + 1)
    mine = list(dealt(problems))
    n = -(-len(mine) // args.eval_batch_size)  # calls
    problems, prompts, completions, truncated = [row for k in range(n) for row in mine[k::n]], [], [], []
    with rollout_weights(model) as fast:
        for k in range(n):
            some = [build_prompt(tokenizer, row["problem"], args.system_prompt) for row in mine[k::n]]
            ro = rollout(fast, tokenizer, some, eos, args, args.temperature)
            prompts += some
            completions += [ids[real].tolist() for ids, real in zip(ro.completions, ro.mask)]
            truncated += ro.truncated.tolist()

    def per_token(logits: Tensor, ids: Tensor, hidden: Tensor) -> tuple[Tensor]:
        teacher_logits = teacher.align(teacher.model.get_output_embeddings()(hidden).float() / args.temperature).to(logits.device)
        return divergences(logits[:, :teacher.shared], teacher_logits[:, :teacher.shared], ids.clamp(max=teacher.shared - 1)),

    tokens, rollouts = defaultdict(list), defaultdict(list)
    for batch in in_step(microbatches([len(p) + len(c) for p, c in zip(prompts, completions)], args.microbatch_tokens)):
        ids, mask = padded([completions[k] for k in batch], device_of(model))
        some = [prompts[k] for k in batch]
        told = teacher.hidden(some, ids, mask)
        table, = as_forward(model, lambda: over_vocabulary(per_token, model, [completion_hidden(model, some, ids, mask)], [ids[mask], told], args.temperature))
        for k, row in zip(batch, table.split(mask.sum(1).tolist())):
            known = torch.tensor(completions[k]) < teacher.shared
            tokens[problems[k]["id"]].append(row.cpu()[known].double().numpy())
            rollouts[problems[k]["id"]].append([len(completions[k]), float(truncated[k])])
    teacher.rest()
    merged = [defaultdict(list), defaultdict(list)]
    for parts in everyones((tokens, rollouts)):
        for to, part in zip(merged, parts):
            for name, found in part.items():
                to[name] += found
    return [np.concatenate(x) for x in merged[0].values()], [np.array(x) for x in merged[1].values()]


DIVERGENCE = {"teacher_nll": "teacher's -log p of a token", "reverse_kl_k1": "reverse KL, k1", "reverse_kl": "reverse KL, exact",
              "forward_kl": "forward KL, exact", "mismatch": "mismatch"}  # logged at every evaluation
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def token_measures(tokens: np.ndarray) -> dict[str, float]:
    """[M, 8] of `divergences` -> the measures of papers and metrics, means over tokens; log ratio = log pi(a) - log pi_T(a)."""
    ratio, mean = tokens[:, 0] - tokens[:, 1], tokens.mean(0)
    return {"teacher_perplexity": np.exp(-mean[1]), "teacher_nll": -mean[1], "reverse_kl_k1": ratio.mean(), "mismatch": mean[2],
            "top1_overlap": mean[3], "top5_overlap": mean[4], "top10_overlap": mean[5], "forward_kl": mean[6], "reverse_kl": mean[7],
            "student_more_confident": (ratio > 0).mean(), **{f"log_ratio_q{100 * q:02.0f}": x for q, x in zip(QUANTILES, np.quantile(ratio, QUANTILES))}}


def rollout_measures(rollouts: np.ndarray) -> dict[str, float]:
    """[n, 2] length and truncated -> mean and quartiles of the length, shares."""
    lengths, truncated = rollouts.T
    return {"mean_length": lengths.mean(), **{f"length_q{100 * q:02.0f}": x for q, x in zip(QUANTILES[1:-1], np.quantile(lengths, QUANTILES[1:-1]))},
            "truncated": truncated.mean(), "stopped": 1 - truncated.mean()}


def with_intervals(measures, parts: list[np.ndarray], seed: int, draws: int = 400) -> dict[str, dict[str, float]]:
    """Each measure of all rows together, with a 95% interval: the bootstrap draws whole problems, whose rows hang together."""
    rng, values = np.random.default_rng(seed), measures(np.concatenate(parts))
    drawn = [list(measures(np.concatenate([parts[i] for i in rng.integers(len(parts), size=len(parts))])).values()) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0).tolist()
    return {name: {"value": float(value), "low": a, "high": b} for (name, value), a, b in zip(values.items(), low, high)}


# ---------------------------------------------------------------- main

def main() -> None:
    start_processes()
    args = parse_args(Args, demo_recipe)
    check_args(args)
    reward = load_reward(args.reward)
    run = Run(args)
    tokenizer = load_tokenizer(args.model)
    own_tokenizer = load_tokenizer(args.teacher, "--teacher") if args.teacher else tokenizer
    shared = shared_vocabulary(tokenizer, own_tokenizer, args.teacher)
    if args.topk and args.topk > shared:
        refuse(f"--topk {args.topk}: student and teacher share {shared} tokens")

    def encode(row: dict) -> list[list[int]]:
        """Every prompt that is made of a row."""
        ids = build_prompt(tokenizer, row["problem"], args.system_prompt)
        if max(ids) >= shared:
            refuse(f"--teacher {args.teacher}: cannot read the prompts: it has no token {max(ids)}, {tokenizer.decode(max(ids))!r} to the student")
        return [ids]

    rows, eval_rows = load_problems(args)
    rows, longest = usable_rows(rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    if eval_rows:
        eval_rows, _ = usable_rows(eval_rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    check_context(args.model, longest, args.max_new_tokens)
    if args.teacher:
        check_context(args.teacher, longest, args.max_new_tokens, "--teacher")
    warmup_rows, rows = warmup_split(rows, tokenizer, reward, args)
    say_plan(args, run, rows, warmup_rows, f"{args.group_size}", args.prompts_per_step * args.group_size, longest)
    if args.dry_run:
        return
    model = load_policy(args.model, activation_checkpointing=args.activation_checkpointing, cpu_offload=args.cpu_offload)
    eos = stop_ids(model, tokenizer)
    teacher = load_teacher(args, tokenizer, own_tokenizer, shared, eos) if args.teacher else None
    run.create()
    sft_warmup(model, tokenizer, warmup_rows, run, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    finished = run.begin(model, optimizer)

    if args.measure_divergence:
        order = eval_rows or [rows[i] for i in batch_of_step(len(rows), 0, len(rows), args.seed)]
        some = [row for row in order for _ in range(args.group_size)][:args.measure_divergence]
        tokens, rollouts = measure(model, teacher, tokenizer, some, eos, args)
        report = {**with_intervals(token_measures, tokens, args.seed), **with_intervals(rollout_measures, rollouts, args.seed)}
        counts = {"problems": len(rollouts), "rollouts": len(some), "tokens": sum(map(len, tokens)), "shared_vocabulary": shared}
        write_atomic(run.dir / "divergence.json", json.dumps({**counts, "measures": report}, indent=2) + "\n")
        say_table([["divergence", "value", "95% interval"], *[[k, f"{x['value']:.4g}", f"{x['low']:.4g} to {x['high']:.4g}"] for k, x in report.items()]])
        print(f"{run.dir / 'divergence.json'}: {len(some)} rollouts of {len(rollouts)} problems")
        return

    def apart() -> dict:
        """Divergence on one rollout of each held-out problem."""
        if teacher is None or watch.agreed():
            return {}
        measures = token_measures(np.concatenate(measure(model, teacher, tokenizer, eval_rows, eos, args)[0]))
        return {f"eval/{name}": float(measures[name]) for name in DIVERGENCE}

    bar = progress(args.steps, finished, desc="training", unit="step")
    watch = Watch(bar)
    if eval_rows and not run.evaluations():
        if first := evaluate(model, tokenizer, eval_rows, eos, reward, args, watch):
            run.log("metrics", {"step": 0, **first, **apart()})

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
        coef = coefficient(step, args.coefficient, args.coefficient_fall)
        stats = update(model, optimizer, ro, advantages, teacher, coef, args, watch)
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
            metrics |= apart()
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
                   *[[names[k], f"{evals[0][k]:.3f}", f"{evals[-1][k]:.3f}"] for k in names if k in evals[0]],
                   *[[text, *[f"{e[f'eval/{k}']:.3f}" for e in (evals[0], evals[-1])]] for k, text in DIVERGENCE.items() if teacher]])
    print(f"model: {final}\nmetrics, samples, checkpoints: {run.dir}")


if __name__ == "__main__":
    main()
