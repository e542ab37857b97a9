"""TGPO (Teacher-Guided Policy Optimization): GRPO plus the teacher's next token at every student prefix.

What differs from grpo_baseline.py (formulas beside the functions; the paper is arXiv 2605.13230; defaults
are that paper's, so its GRPO row is `tgpo.py --guidance none`):
  1. A frozen teacher reads the student's samples and predicts the next token at each of their positions.
  2. Loss: + lambda_k x mean of -log pi(y* | s), y* the teacher's argmax, on right and wrong samples alike.
  3. lambda_k = max(0.002 - 1e-5 (k - 1), 0) at step k. While it is above 0, groups of equal rewards train.
  4. METHODS has what TGPO is compared with: other labels, TGPO-Adv, RKL (OPD), KDRL, reverse KL.
  5. Both distributions are restricted to the ids that both tokenizers have; end tokens are mapped.

    python tgpo.py                                     # the built-in demo: CPU, offline, a minute
    python tgpo.py --model Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-30B-A3B-Thinking-2507

Read grpo_baseline.py first, then `diff grpo_baseline.py tgpo.py`.
"""
import math
import time
from dataclasses import dataclass
from typing import Callable, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig

from common import (
    DEVICE,
    Fp32Head,
    Run,
    RunFlags,
    accumulate,
    build_prompt,
    check_context,
    choose_memory,
    clip_gradient,
    completion_hidden,
    end_token_id,
    flag,
    gather,
    generate_in_pieces,
    learning_rate,
    load_by_first_process,
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
    refuse,
    seed_everything,
    sft_warmup,
    shard,
    stop_ids,
    sum_over_processes,
    world_size,
)

# Letters: B problems of a step (b of them in this process), G samples per problem, N samples of this process
# (n of them in a micro-batch), C length of the longest completion, M completion tokens of a micro-batch
# (m of them in a chunk), d hidden size, V vocabulary.


# ---------------------------------------------------------------- flags

@dataclass
class Args(RunFlags):
    warmup_frac: float = flag(0.0, "random share of the solved problems that is used for SFT before RL, "
                                   "and not for RL", "[0, 1]")
    # rollout
    steps: int = flag(300, "training steps, each with one rollout; 0: only the SFT warm-up", "[0, inf)")
    prompts_per_step: int = flag(16, "problems per step", "[1, inf)")
    group_size: int = flag(8, "samples per problem", "[2, inf)")
    max_new_tokens: int = flag(2048, "maximum completion length in tokens", "[1, inf)")
    temperature: float = flag(1.0, "sampling temperature; also applied to the logits in the loss", "(0, inf)")
    top_p: float = flag(1.0, "sample only from the likeliest tokens that together have this probability",
                        "(0, 1]")
    # objective
    clip_low: float = flag(0.2, "clip the ratio pi/pi_old below 1 minus this", "[0, inf]")
    clip_high: float = flag(0.2, "clip the ratio pi/pi_old above 1 plus this", "[0, inf]")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag(
        "dapo", "grpo: mean over each completion, then over completions; dapo: mean over all tokens; "
                "dr_grpo: divide by max_new_tokens")
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group", "divide advantages by the std of the group's rewards, of all rewards, or by nothing "
                 "(as in Dr. GRPO)")
    entropy_bonus: float = flag(0.0, "weight of the entropy that is added to the objective", "[0, inf)")
    # teacher
    teacher: str = flag(None, "hub id or local directory of the teacher; with the demo model: demo, or "
                              "demo-same-style, which writes as the student does")
    guidance: Literal["tgpo", "tgpo-sampled", "tgpo-topk", "tgpo-adv", "tgpo-adv-matched", "rkl", "kdrl",
                      "reverse-kl", "none"] = flag(
        "tgpo", "what is learnt from the teacher. tgpo: its likeliest token; tgpo-sampled: a token drawn "
                "from it; tgpo-topk: forward KL on its k likeliest tokens; tgpo-adv, tgpo-adv-matched: a "
                "bonus on the advantage; rkl: its log-ratio as the advantage; kdrl: squared log-ratio; "
                "reverse-kl: exact reverse KL; none: nothing, which is GRPO")
    coefficient: float = flag(None, "weight of the guidance at step 1 (default: the paper's, 0.002 for tgpo)",
                              "[0, inf)")
    coefficient_fall: float = flag(None, "decrease of that weight per step, down to 0 (default: the paper's)",
                                   "[0, inf)")
    reward_weight: float = flag(None, "weight of the reward's advantage (default: the paper's)", "[0, inf)")
    topk: int = flag(None, "compare only the teacher's k likeliest tokens (default: 20 with tgpo-topk, all "
                           "tokens with reverse-kl)", "[1, inf)")
    teacher_device: str = flag(None, "device of the teacher, such as cuda:1 (default: that of the student)")
    teacher_offload: bool = flag(False, "keep the teacher in CPU memory while it is not reading")
    # update
    lr: float = flag(1e-6, "learning rate of AdamW", "[0, inf)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag("constant", "learning rate after its warm-up")
    lr_warmup_steps: int = flag(0, "steps over which the learning rate rises to --lr", "[0, inf)")
    weight_decay: float = flag(0.01, "weight decay of AdamW", "[0, inf)")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm", "(0, inf)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout, each on a slice of it", "[1, inf)")


def check_args(args: Args) -> None:
    """Fill in the method's constants from the paper, and refuse values that do not fit together."""
    method = METHODS[args.guidance]
    if args.coefficient is None:
        args.coefficient = method.coefficient
    if args.coefficient_fall is None:
        args.coefficient_fall = method.fall
    if args.reward_weight is None:
        args.reward_weight = method.reward_weight
    if args.guidance == "tgpo-topk" and args.topk is None:
        args.topk = 20
    if args.teacher is None and args.guidance != "none":
        refuse("--teacher is missing: name a hub id or directory, or train without one with --guidance none")
    if args.teacher_device and world_size() > 1:
        refuse("--teacher_device: with several processes each holds a part of the teacher; leave it out")
    try:
        torch.empty(0, device=args.teacher_device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"--teacher_device {args.teacher_device}: {str(error).splitlines()[0]}")


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


def coefficient(step: int, start: float, fall: float) -> float:
    """Return lambda_k = max(start - fall (k - 1), 0) at step k = 1, 2, ... The paper's is 0 from 201 on."""
    return max(round(start - fall * (step - 1), 12), 0.0)  # rounded, because 0.9 - 3 * 0.3 is 1e-16


def chosen_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log pi(id), [m], from logits [m, V]. Ids outside are clamped; their values are masked later."""
    inside = ids.clamp(0, logits.shape[-1] - 1)
    return logits.gather(-1, inside[:, None])[:, 0] - logits.logsumexp(-1)


def label_loss(label_logps: Tensor) -> Tensor:
    """Return TGPO's -log pi(y* | s), [m], y* the teacher's argmax.

    If y is drawn from the teacher instead, this is a one-sample forward KL, up to the teacher's entropy.
    """
    return -label_logps


def topk_forward_kl(logits: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    """Return sum_v p(v) (log p(v) - log pi(v)) over the teacher's top k tokens, [m].

    logits are the student's [m, V]; top_ids and top_logits the teacher's [m, k]; p is renormalised on the k.
    """
    log_p = top_logits.log_softmax(-1)                                     # [m, k]
    log_pi = logits.log_softmax(-1).gather(-1, top_ids)                    # [m, k]
    return (log_p.exp() * (log_p - log_pi)).sum(-1)


def label_bonus(old_label_logps: Tensor) -> Tensor:
    """Return TGPO-Adv's bonus pi_old(y* | s), [n, C]: A'_it = A_i + c_k pi_old(y*_it).

    The bonus does not depend on the sampled token, so at rho = 1 it is a state baseline: its expected
    gradient is 0. The authors' later code dropped it. The variant tgpo-adv-matched depends on the token.
    """
    return old_label_logps.exp()


def rkl_advantages(old_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return RKL's (OPD's) A_it = log pi_T(a) - log pi_old(a), [n, C]. Later tokens do not enter."""
    return teacher_logps - old_logps


def k2(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """Return KDRL's (log pi_T(a) - log pi(a))^2 / 2, [m]. Its expected gradient is that of the reverse KL.

    As a loss, k3 = r - 1 - log r with r = pi_T / pi would follow the gradient of the FORWARD KL, and
    k1 = -log r would have an expected gradient of 0.
    """
    return (teacher_logps - logps).square() / 2


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(pi || pi_T) over the given ids, all shared ones or the teacher's top k, [m]."""
    log_pi = logits.log_softmax(-1)
    log_p = teacher_logits.detach().log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_p)).sum(-1)


def entropy_with_gradient(logits: Tensor) -> Tensor:
    """Return H(pi(. | s)) in nats for the entropy bonus, [m], from logits [m, V]."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


@dataclass
class Advice:
    """What the teacher says about every token of a rollout, [N, C] each."""
    labels: Tensor      # the teacher's token (argmax, or drawn) as a student's id; -1 if the student lacks it
    logps: Tensor       # log pi_T(a) of the student's token, over the shared ids
    agrees: Tensor      # True if the teacher's argmax is the student's token
    top_ids: Tensor     # [N, C, k] the teacher's likeliest shared ids; k is 0 without --topk
    top_logits: Tensor  # [N, C, k] and their logits

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Advice":
        """Return the advice with a function applied to every tensor, for example a selection."""
        return Advice(**{name: function(tensor) for name, tensor in vars(self).items()})


@dataclass
class Scores:
    """What the student says about every completion token, [n, C] each, 0 after the end token."""
    logps: Tensor         # log pi(a) over the full vocabulary
    entropy: Tensor       # in nats
    shared_logps: Tensor  # log pi(a) over the ids that both tokenizers have
    label_logps: Tensor   # log pi(y*) over these ids
    guide_loss: Tensor    # the method's loss; 0 if it has none

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Scores":
        return Scores(**{name: function(tensor) for name, tensor in vars(self).items()})


@dataclass
class Chunk:
    """What a method's loss may use, for m tokens."""
    logits: Tensor          # [m, V] the student's, of the ids that both tokenizers have
    logps: Tensor           # [m] log pi(a) over these ids
    label_logps: Tensor     # [m] log pi(y*)
    advice: Advice          # [m]
    teacher_logits: Tensor | None  # [m, V], only if the method compares full distributions


@dataclass(frozen=True)
class Method:
    """A way to learn from the teacher. The constants are the paper's."""
    coefficient: float      # weight at step 1
    fall: float             # decrease of the weight per step
    reward_weight: float    # weight of the reward's advantage
    loss: Callable[[Chunk], Tensor] | None = None   # [m], added to the policy loss
    bonus: Callable[[Scores, Advice, Tensor], Tensor] | None = None  # [n, C], added to the advantage
    uses_labels: bool = False    # tokens whose label the student's tokenizer lacks are left out
    uses_logps: bool = False     # tokens that the teacher's tokenizer lacks are left out
    draws_labels: bool = False   # the label is drawn from the teacher, not its argmax
    compares_all: bool = False   # without --topk the loss needs the teacher's logits of all shared ids


def reverse_kl_of(c: Chunk) -> Tensor:
    """Return the reverse KL over the full shared vocabulary, or over the teacher's top k with --topk."""
    if c.teacher_logits is not None:
        return reverse_kl(c.logits, c.teacher_logits)
    return reverse_kl(c.logits.gather(-1, c.advice.top_ids), c.advice.top_logits)


def matched_label_bonus(old: Scores, advice: Advice, ids: Tensor) -> Tensor:
    """Return TGPO-Adv's bonus only where the sampled token is the label, [n, C]."""
    return label_bonus(old.label_logps) * (advice.labels == ids)


def label_loss_of(c: Chunk) -> Tensor:
    """Return TGPO's loss."""
    return label_loss(c.label_logps)


METHODS = {  # name: Method(coefficient, fall, reward weight, ...)
    "tgpo": Method(0.002, 1e-5, 1.0, loss=label_loss_of, uses_labels=True),
    "tgpo-sampled": Method(0.002, 1e-5, 1.0, loss=label_loss_of, uses_labels=True, draws_labels=True),
    "tgpo-topk": Method(0.002, 1e-5, 1.0,
                        loss=lambda c: topk_forward_kl(c.logits, c.advice.top_ids, c.advice.top_logits)),
    "tgpo-adv": Method(0.02, 1e-4, 1.0, uses_labels=True,
                       bonus=lambda old, advice, ids: label_bonus(old.label_logps)),
    "tgpo-adv-matched": Method(0.02, 1e-4, 1.0, uses_labels=True, bonus=matched_label_bonus),
    "rkl": Method(1.0, 0.0, 0.0, uses_logps=True,
                  bonus=lambda old, advice, ids: rkl_advantages(old.shared_logps, advice.logps)),
    "kdrl": Method(0.002, 0.0, 1.0, uses_logps=True, loss=lambda c: k2(c.logps, c.advice.logps)),
    "reverse-kl": Method(1.0, 0.0, 0.0, loss=reverse_kl_of, compares_all=True),
    "none": Method(0.0, 0.0, 1.0),
}


# ---------------------------------------------------------------- teacher

class Teacher:
    """A frozen model that reads the student's token ids: in bf16 with --bf16, sharded over the processes."""
    MICROBATCH_TOKENS = 32768

    def __init__(self, args: Args, tokenizer, teacher_tokenizer, student_ends: list[int]):
        self.args = args
        self.device = torch.device(args.teacher_device or DEVICE)
        self.offloads = args.teacher_offload and world_size() == 1
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        if world_size() > 1:
            self.model = load_by_first_process(args.teacher, "--teacher", dtype)
            shard(self.model, bf16=False, cpu_offload=args.teacher_offload)
        else:
            stored_on = "cpu" if args.teacher_offload else self.device
            self.model = load_model(args.teacher, "--teacher", dtype, stored_on)
        self.num_shared = min(len(tokenizer), len(teacher_tokenizer))  # ids below mean the same to both
        self.student_end = end_token_id(tokenizer)
        self.teacher_end = end_token_id(teacher_tokenizer)
        if self.teacher_end in student_ends:  # it ends the student's completions as well
            self.teacher_end = self.student_end
        self.other_ends = [i for i in stop_ids(self.model, teacher_tokenizer) if i not in student_ends]

    @torch.no_grad()
    def hidden(self, ro: Rollout, idx: list[int]) -> Tensor:
        """Return the final hidden states [M, d] at the positions that predict the student's tokens.

        Token ids that the teacher does not have are replaced by 0.
        """
        if self.offloads:
            self.model.to(self.device)
        prompts, completions, mask = ro.select(idx)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        known = torch.where(completions < vocabulary, completions, 0)
        return completion_hidden(self.model, prompts, known.to(self.device), mask.to(self.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the teacher's logits [m, V] from hidden states; those of the two end tokens are swapped."""
        logits = Fp32Head(self.model)(hidden) / self.args.temperature
        ends = [self.student_end, self.teacher_end]
        swapped = [self.teacher_end, self.student_end]
        if self.student_end != self.teacher_end and max(ends) < logits.shape[-1]:
            logits[:, ends] = logits[:, swapped]
        return logits

    def advice_on(self, hidden: Tensor, ids: Tensor) -> Advice:
        """Return the advice on the student's tokens [m] from the teacher's hidden states [m, d]."""
        logits = self.logits(hidden)                                       # [m, V]
        shared_logits = logits[:, :self.num_shared]
        best = logits.argmax(-1)                                           # [m]
        labels = best
        if METHODS[self.args.guidance].draws_labels:
            labels = logits.softmax(-1).multinomial(1)[:, 0]
        best = self.map_end_tokens(best)
        labels = self.map_end_tokens(labels)
        top = shared_logits.topk(self.args.topk or 0)
        return Advice(
            labels=torch.where(labels < self.num_shared, labels, -1),
            logps=chosen_logps(shared_logits, ids),
            agrees=best == ids,
            top_ids=top.indices,
            top_logits=top.values,
        )

    def map_end_tokens(self, ids: Tensor) -> Tensor:
        """Replace the teacher's other end tokens by the student's end token."""
        other_ends = torch.tensor(self.other_ends, device=ids.device)
        return torch.where(torch.isin(ids, other_ends), self.student_end, ids)

    @torch.no_grad()
    def read(self, ro: Rollout, samples: list[int]) -> Advice | None:
        """Return the teacher's advice on these samples of a rollout, [N, C]; other samples get zeros."""
        advice = None
        for idx in microbatches(samples, ro.lengths(), self.MICROBATCH_TOKENS):
            mask = ro.mask[idx]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                hidden = self.hidden(ro, idx)                              # [M, d]
                ids = ro.completions[idx][mask].to(self.device)            # [M]
                size = Fp32Head(self.model).tokens_per_chunk
                chunks = [self.advice_on(h, i) for h, i in zip(hidden.split(size), ids.split(size))]
            sample, t = mask.nonzero(as_tuple=True)
            sample = torch.tensor(idx, device=mask.device, dtype=torch.long)[sample]
            if advice is None:  # zeros for all samples, [N, C] and [N, C, k]
                advice = chunks[0].apply(lambda x: x.new_zeros(*ro.mask.shape, *x.shape[1:]).to(mask.device))
            for name, tensor in vars(advice).items():
                values = torch.cat([getattr(chunk, name) for chunk in chunks])
                tensor[sample, t] = values.to(mask.device)
        self.offload()
        return advice

    def offload(self) -> None:
        """Move the teacher back to CPU memory if --teacher_offload is set."""
        if self.offloads:
            self.model.to("cpu")


def check_vocabulary(tokenizer, teacher_tokenizer, name: str) -> None:
    """Refuse a teacher whose tokenizer spells a shared id differently, before any weight is loaded.

    The lengths of the tokenizers are compared, because embedding tables are padded to arbitrary widths.
    """
    shared = list(range(min(len(tokenizer), len(teacher_tokenizer))))
    student_tokens = tokenizer.convert_ids_to_tokens(shared)
    teacher_tokens = teacher_tokenizer.convert_ids_to_tokens(shared)
    for i, (ours, theirs) in enumerate(zip(student_tokens, teacher_tokens)):
        if ours != theirs:
            refuse(f"--teacher {name}: its tokenizer is not the student's: token {i} is {ours!r} to the "
                   f"student and {theirs!r} to the teacher")


def check_teacher(args: Args, tokenizer, teacher_tokenizer, problems: list[dict]) -> None:
    """Refuse a teacher that cannot read the prompts, or whose context is too short."""
    num_shared = min(len(tokenizer), len(teacher_tokenizer))
    if args.topk and args.topk > num_shared:
        refuse(f"--topk {args.topk}: student and teacher share {num_shared} tokens")
    prompts = [build_prompt(tokenizer, problem["problem"], args.system_prompt) for problem in problems]
    unknown = [i for prompt in prompts for i in prompt if i >= num_shared]
    if unknown:
        refuse(f"--teacher {args.teacher}: cannot read the prompts: it has no token {unknown[0]}, "
               f"{tokenizer.decode(unknown[0])!r} to the student")
    check_context(args.teacher, "--teacher", max(map(len, prompts)), args.max_new_tokens)


# ---------------------------------------------------------------- log-probs

def logp_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log pi(id) and the entropy in nats (without gradient), [m] each, from logits [m, V]."""
    log_norm = logits.logsumexp(-1)                                        # [m]
    logps = logits.gather(-1, ids[:, None])[:, 0] - log_norm
    with torch.no_grad():
        probs = (logits - log_norm[:, None]).exp()                         # [m, V]
        entropy = log_norm - (probs * logits).sum(-1)
    return logps, entropy


def token_scores(model, ro: Rollout, idx: list[int], teacher: Teacher | None, advice: Advice | None,
                 method: Method, args: Args) -> Scores:
    """Return the student's scores of every completion token.

    The transformer runs in bf16 under autocast on fp32 weights; logits and what follows are fp32. Logits of
    all tokens would need M x V floats, so they are made for a chunk of tokens at a time and computed again
    in the backward pass. They cover the full vocabulary even if --top_p truncates sampling.
    """
    prompts, completions, mask = ro.select(idx)
    compares_all = method.compares_all and not args.topk

    def of_chunk(head: Fp32Head, hidden: Tensor, ids: Tensor, advice: Advice | None,
                 teacher_hidden: Tensor | None) -> Scores:
        logits = head(hidden) / args.temperature                           # [m, V]
        logps, entropy = logp_and_entropy(logits, ids)
        if args.entropy_bonus:
            entropy = entropy_with_gradient(logits)
        nothing = torch.zeros_like(logps)
        if advice is None:
            return Scores(logps, entropy, logps, nothing, nothing)
        shared_logits = logits[:, :teacher.num_shared]
        shared_logps = chosen_logps(shared_logits, ids)
        label_logps = chosen_logps(shared_logits, advice.labels)
        if method.loss is None:
            return Scores(logps, entropy, shared_logps, label_logps, nothing)
        teacher_logits = None
        if compares_all:
            with torch.no_grad():
                teacher_logits = teacher.logits(teacher_hidden)[:, :teacher.num_shared].to(logits.device)
        chunk = Chunk(shared_logits, shared_logps, label_logps, advice, teacher_logits)
        return Scores(logps, entropy, shared_logps, label_logps, method.loss(chunk))

    chunks = []
    batch_advice = None if advice is None else advice.apply(lambda x: x[idx][mask])  # [M]
    with torch.autocast(mask.device.type, torch.bfloat16, enabled=args.bf16):
        teacher_hidden = teacher.hidden(ro, idx) if compares_all else None  # [M, d]
        hidden = completion_hidden(model, prompts, completions, mask)      # [M, d]
        head = Fp32Head(model)
        targets = completions[mask]                                        # [M]
        size = head.tokens_per_chunk
        for start in range(0, max(len(hidden), 1), size):  # an empty micro-batch is one empty chunk
            part = slice(start, start + size)
            chunk_advice = None if batch_advice is None else batch_advice.apply(lambda x: x[part])
            chunk_teacher_hidden = teacher_hidden[part] if compares_all else None
            chunks.append(checkpoint(of_chunk, head, hidden[part], targets[part], chunk_advice,
                                     chunk_teacher_hidden, use_reentrant=False, preserve_rng_state=False))
    scores = {}
    for name in vars(chunks[0]):
        values = torch.cat([getattr(chunk, name) for chunk in chunks])     # [M]
        scores[name] = values.new_zeros(mask.shape).masked_scatter(mask, values)
    return Scores(**scores)


# ---------------------------------------------------------------- update

def divergence(scores: Scores, advice: Advice, ids: Tensor, mask: Tensor,
               teacher: Teacher) -> dict[str, float]:
    """Return how far student and teacher are apart at these tokens [n, C], as sums over the tokens.

    known: tokens that both have; teacher_nll: -log pi_T(a); k1: log pi(a) - log pi_T(a); mismatch: the
    teacher's argmax is another token; dropped: the teacher's label is no token of the student.
    """
    known = mask & (ids < teacher.num_shared)
    return {
        "known": known.sum().item(),
        "teacher_nll": -advice.logps[known].sum().item(),
        "k1": (scores.shared_logps - advice.logps)[known].sum().item(),
        "mismatch": (mask & ~advice.agrees).sum().item(),
        "dropped": (mask & (advice.labels < 0)).sum().item(),
    }


def tokens_with_advice(method: Method, ro: Rollout, advice: Advice | None, teacher: Teacher | None) -> Tensor:
    """Return True for every completion token on which the method has the teacher's advice, [N, C]."""
    mask = ro.mask
    if method.uses_labels:
        mask = mask & (advice.labels >= 0)
    if method.uses_logps:
        mask = mask & (ro.completions < teacher.num_shared)
    return mask


@torch.no_grad()
def scores_before_update(model, ro: Rollout, samples: list[int], teacher: Teacher | None,
                         advice: Advice | None, args: Args) -> Scores:
    """Return the scores of pi_old for every completion token, [N, C], 0 for all other samples."""
    zeros = torch.zeros(ro.mask.shape, device=ro.mask.device)
    old = Scores(zeros, zeros, zeros, zeros, zeros).apply(Tensor.clone)
    for idx in microbatches(samples, ro.lengths(), args.microbatch_tokens):
        scores = token_scores(model, ro, idx, teacher, advice, METHODS["none"], args)  # needs no guide_loss
        for name, values in vars(scores).items():
            getattr(old, name)[idx] = values
    return old


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
    if sums["known"]:
        metrics["tgpo/teacher_nll"] = sums["teacher_nll"] / sums["known"]
        metrics["tgpo/reverse_kl_k1"] = sums["k1"] / sums["known"]
        metrics["tgpo/mismatch"] = sums["mismatch"] / sums["tokens"]
        metrics["tgpo/dropped_labels"] = int(sums["dropped"])
    return metrics


def update(model, optimizer, ro: Rollout, advantages: Tensor, teacher: Teacher | None, coef: float,
           args: Args) -> dict[str, float]:
    """Run the optimizer steps of one rollout and return the metrics. Advantages are [b G], one per sample.

    Skip samples with advantage 0 if there is neither guidance (its weight `coef` is 0) nor an entropy bonus.
    They have no gradient, but they count in the loss denominator.
    """
    method = METHODS[args.guidance] if coef else METHODS["none"]
    advantages = advantages * args.reward_weight
    lengths = ro.lengths()
    num_problems = len(advantages) // args.group_size                      # b
    has_gradient = (advantages != 0).tolist()
    if method.loss or method.bonus or args.entropy_bonus:
        has_gradient = [True] * len(advantages)
    advantages = advantages.to(ro.mask.device)
    with_gradient = [i for i, is_nonzero in enumerate(has_gradient) if is_nonzero]
    advice = teacher.read(ro, with_gradient) if teacher else None  # without guidance only for the metrics
    advised_mask = tokens_with_advice(method, ro, advice, teacher)         # [N, C]
    old_scores = None  # with one update per rollout pi_old equals pi and need not be computed
    if args.updates_per_rollout > 1:
        old_scores = scores_before_update(model, ro, with_gradient, teacher, advice, args)
    names = ("loss", "entropy", "clipped", "tokens", "sampler_gap", "real_tokens", "padded_tokens",
             "known", "teacher_nll", "k1", "mismatch", "dropped")
    sums = dict.fromkeys(names, 0.0)
    grad_norms = []
    model.train()  # for activation checkpointing; there is no dropout
    # Update k always uses the k-th slice of the step's problems, no matter how many processes there are.
    for problem_idx in np.array_split(np.arange(num_problems), args.updates_per_rollout):
        idx_of_step = [q * args.group_size + j for q in problem_idx for j in range(args.group_size)]
        num_samples, num_tokens, num_advised = sum_over_processes(
            len(idx_of_step), ro.mask[idx_of_step].sum(), advised_mask[idx_of_step].sum())
        weights = token_weights(ro.mask, args.loss_type, args.max_new_tokens, num_samples, num_tokens)  # [N]
        advised_weights = token_weights(advised_mask, args.loss_type, args.max_new_tokens, num_samples,
                                        num_advised)

        # 1. GRPO + guidance: accumulate the gradient over micro-batches
        trained = [i for i in idx_of_step if has_gradient[i]]
        # All processes run equally many micro-batches, so the last ones may be empty.
        for idx in accumulate(model, microbatches(trained, lengths, args.microbatch_tokens)):
            mask = ro.mask[idx]                                            # [n, C]
            ids = ro.completions[idx]                                      # [n, C]
            scores = token_scores(model, ro, idx, teacher, advice, method, args)
            if old_scores is None:
                old = scores.apply(Tensor.detach)
            else:
                old = old_scores.apply(lambda x: x[idx])
            batch_advice = None if advice is None else advice.apply(lambda x: x[idx])  # [n, C]
            A = advantages[idx]                                            # [n]
            if method.bonus:
                A = A[:, None] + coef * advised_mask[idx] * method.bonus(old, batch_advice, ids)  # [n, C]
            loss_per_token, clipped = policy_loss(scores.logps, old.logps, A, mask, args.clip_low,
                                                  args.clip_high)
            loss_per_token = loss_per_token - args.entropy_bonus * scores.entropy
            loss = (loss_per_token * weights[idx, None]).sum()
            if method.loss:
                guide_loss = scores.guide_loss * advised_mask[idx]
                loss = loss + coef * (guide_loss * advised_weights[idx, None]).sum()
            loss.backward()
            if teacher:
                for name, value in divergence(old, batch_advice, ids, mask, teacher).items():
                    sums[name] += value
            sums["loss"] += loss.item()
            sums["entropy"] += scores.entropy.sum().item()
            sums["clipped"] += clipped.sum().item()
            sums["tokens"] += mask.sum().item()
            sampler_gap = (old.logps - ro.sampler_logps[idx]).abs()        # [n, C]
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
    if teacher:
        teacher.offload()
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
    check_args(args)
    run = Run(args)                                   # checks the directory, writes nothing yet
    reward = load_reward(args.reward)
    tokenizer = load_tokenizer(args.model)
    if args.teacher:
        teacher_tokenizer = load_tokenizer(args.teacher, "--teacher")
        check_vocabulary(tokenizer, teacher_tokenizer, args.teacher)
    data = load_data(args, tokenizer, reward)
    if args.teacher:
        check_teacher(args, tokenizer, teacher_tokenizer, data.train + data.warmup + data.held_out)
    memory = choose_memory(args)                      # may switch on checkpointing and offload
    run.print_plan(data, memory, f"{args.group_size}")
    if args.dry_run:
        return
    model = load_policy(args)                         # fp32 weights, sharded under torchrun
    teacher = None
    if args.teacher:
        teacher = Teacher(args, tokenizer, teacher_tokenizer, stop_ids(model, tokenizer))
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
        coef = coefficient(step, args.coefficient, args.coefficient_fall)
        metrics = update(model, optimizer, ro, advantages, teacher, coef, args)
        train_end = time.perf_counter()

        # ---- log, evaluate, save
        metrics |= rollout_metrics(ro, groups)
        metrics["tgpo/coef"] = coef
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
