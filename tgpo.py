"""TGPO (Teacher-Guided Policy Optimization): GRPO plus the teacher's next token wherever the student goes.

What differs from grpo_baseline.py (formulas beside the functions; the paper is arXiv 2605.13230):
  1. A frozen teacher reads the student's rollouts, token ids as sampled, and says what IT would write there.
  2. TGPO: loss + lambda_k x mean of -log pi(y* | s), y* the teacher's argmax, on right and wrong rollouts.
  3. lambda_k = max(0.002 - 1e-5 (k - 1), 0) at step k. Groups of equal rewards train too while it is above 0.
  4. --guidance has the methods it is compared with: other labels, TGPO-Adv, RKL (OPD), KDRL, reverse KL.
  5. Student and teacher are compared on the ids that both tokenizers have; their end tokens mean the same.

    python tgpo.py                                     # the built-in demo: CPU, offline, minutes
    python tgpo.py --model Qwen/Qwen2.5-Math-1.5B --teacher Qwen/Qwen3-30B-A3B-Thinking-2507
    python tgpo.py --model STUDENT --teacher TEACHER --measure_divergence 64 --out DIR    # how far apart?
"""
import json
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common import (
    HOME, Run, RunFlags, Sums, all_shares, as_forward, batch_of_step, build_prompt, check_context, complete,
    completion_hidden, flag, held_out_accuracy, load_model, load_policy, load_problems, load_reward,
    load_tokenizer, log_prob_and_entropy, microbatches, my_share, optimizer_step, over_vocabulary,
    parse_args, program, rank, refuse, say_table, seed_everything, sft_warmup, shard, stop_ids,
    token_values, total, warmup_split, world, write_atomic)

# Letters: B problems of a step (b of them this process's), G samples per problem, N rows (problems x samples;
# n some of them), C tokens of the longest completion, m tokens of a chunk, V vocabulary. q: a problem, i: a
# row.


# ---------------------------------------------------------------- flags

GUIDANCE = {  # the paper's coefficient, its fall per step and the reward's weight
    "tgpo": (0.002, 1e-5, 1.0), "tgpo-sampled": (0.002, 1e-5, 1.0), "tgpo-topk": (0.002, 1e-5, 1.0),
    "tgpo-adv": (0.02, 1e-4, 1.0), "tgpo-adv-matched": (0.02, 1e-4, 1.0), "rkl": (1.0, 0.0, 0.0),
    "kdrl": (0.002, 0.0, 1.0), "reverse-kl": (1.0, 0.0, 0.0), "none": (0.0, 0.0, 1.0)}
WITH_LABELS = ("tgpo", "tgpo-sampled", "tgpo-adv", "tgpo-adv-matched")  # of the teacher's next token
AS_LOSS = ("tgpo", "tgpo-sampled", "tgpo-topk", "kdrl", "reverse-kl")   # beside the policy loss


@dataclass
class Args(RunFlags):
    """algorithm"""
    warmup_frac: float = flag(0.0, "share of the problems for the warm-up; TGPO's paper has none", "[0, 1]")
    # rollouts
    steps: int = flag(300, "training steps, one rollout batch each; 0: the warm-up alone", "[0, inf)")
    prompts_per_step: int = flag(16, "problems per step", "[1, inf)")
    group_size: int = flag(8, "samples per problem", "[2, inf)")
    max_new_tokens: int = flag(2048, "longest completion, in tokens", "[1, inf)")
    temperature: float = flag(1.0, "sampling temperature; also divides the logits of the loss", "(0, inf)")
    top_p: float = flag(1.0, "nucleus sampling", "(0, 1]")
    # objective
    clip_low: float = flag(0.2, "ratio clipped below 1 - clip_low", "[0, inf]")
    clip_high: float = flag(0.2, "ratio clipped above 1 + clip_high", "[0, inf]")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag("dapo", "mean over rows, tokens, or token limits")
    scale_rewards: Literal["group", "batch", "none"] = flag("group", "whose std divides the rewards")
    entropy_bonus: float = flag(0.0, "times the mean entropy, subtracted (the authors: 0.001)", "[0, inf)")
    # guidance
    teacher: str = flag(None, "hub id or local directory; with the demo model: demo, or demo-same-style")
    guidance: Literal[tuple(GUIDANCE)] = flag("tgpo", "what is learnt from the teacher")
    coefficient: float = flag(None, "weight of the guidance at step 1 (default: the paper's)", "[0, inf)")
    coefficient_fall: float = flag(None, "what it loses per step, to 0 (default: the paper's)", "[0, inf)")
    reward_weight: float = flag(None, "of the advantage (default: 0 for rkl, reverse-kl, else 1)", "[0, inf)")
    topk: int = flag(None, "tokens compared (default: 20 by tgpo-topk, all by reverse-kl)", "[1, inf)")
    teacher_microbatch_tokens: int = flag(32768, "padded tokens per pass of the teacher", "[1, inf)")
    teacher_device: str = flag(None, "where it computes, such as cuda:1 (default: with the student)")
    teacher_offload: bool = flag(False, "keep it in CPU memory while it is not reading")
    measure_divergence: int = flag(0, "no RL: compare the two on so many rollouts", "[0, inf)")
    # update
    lr: float = flag(1e-6, "AdamW learning rate", "[0, inf)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag("constant", "how it falls after its warm-up")
    lr_warmup_steps: int = flag(0, "steps of linear learning rate warm-up", "[0, inf)")
    weight_decay: float = flag(0.01, "AdamW weight decay", "[0, inf)")
    max_grad_norm: float = flag(1.0, "gradient norm clipped to this", "(0, inf)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout, each on its share", "[1, inf)")


def check_args(args: Args) -> None:
    """Checks that involve more than one flag, and the paper's constants of each guidance."""
    for name, value in zip(("coefficient", "coefficient_fall", "reward_weight"), GUIDANCE[args.guidance]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.guidance == "tgpo-topk" and args.topk is None:
        args.topk = 20
    try:
        torch.empty(0, device=args.teacher_device)
    except (RuntimeError, AssertionError) as error:
        refuse(f"--teacher_device {args.teacher_device}: {str(error).splitlines()[0]}")
    if args.teacher_device and world() > 1:
        refuse("--teacher_device: several processes each have a part of the teacher; leave it out")
    if args.measure_divergence == 1:
        refuse("--measure_divergence 1 has no standard error: ask for 2 or more")
    if args.teacher is None and (args.guidance != "none" or args.measure_divergence):
        refuse("--teacher is missing: name a hub id or directory, or train without one with --guidance none")
    if args.updates_per_rollout > args.prompts_per_step:
        refuse(f"--updates_per_rollout {args.updates_per_rollout} exceeds --prompts_per_step")


# ---------------------------------------------------------------- rollout

@dataclass
class Rollout:
    prompts: list[list[int]]  # N prompts, unpadded
    completions: Tensor       # [N, C] token ids as sampled, never decoded and tokenised again
    mask: Tensor              # [N, C] True up to and including the first end token
    truncated: Tensor         # [N] True where no end token came
    texts: list[str]          # N

    def rows(self, chosen: list[int]) -> tuple[list[list[int]], Tensor, Tensor]:
        """Prompts, completions and mask of some rows."""
        return [self.prompts[i] for i in chosen], self.completions[chosen], self.mask[chosen]

    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and completion."""
        return [len(prompt) + n for prompt, n in zip(self.prompts, self.mask.sum(1).tolist())]


def rollout(model, tokenizer, prompts: list[list[int]], args: Args) -> Rollout:
    """Sample one completion for every prompt, with transformers' generate."""
    return Rollout(prompts, *complete(model, tokenizer, prompts, args.max_new_tokens, args.temperature,
                                      args.top_p, args.generation_batch_size))


# ---------------------------------------------------------------- objective

def group_advantages(rewards: Tensor, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean of its group) / (std + eps). [B, G] -> [B, G]; std with ddof = 1.

    A group whose rewards are all equal gives exactly 0: in fp32 its std need not be 0, and dividing by it
    would make noise.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std() + eps)
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(constant, 0.0, centred)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_low: float,
                clip_high: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) of every token, rho = pi / pi_old; and where it is clipped.

    logps, old_logps, mask [n, C], advantages [n], or [n, C] one per token -> loss, clipped [n, C]. Masked
    before exp: an overflow in a padded place would make the gradient NaN. "Why is my ratio 1 and my loss 0?"
    On the first update after a rollout rho is 1 and advantages sum to 0 in a group, so the value tells you
    nothing; the gradient is still A grad log pi.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    rho = torch.where(mask, logps - old_logps, 0.0).exp()
    clipped = ((rho > 1 + clip_high) & (A > 0)) | ((rho < 1 - clip_low) & (A < 0))
    loss = -torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return loss * mask, clipped & mask


def token_weights(mask: Tensor, loss_type: str, max_new_tokens: int, rows: float | None = None,
                  tokens: float | None = None) -> Tensor:
    """What each row's tokens weigh in the loss, [n]; made once for the update, before it is cut into batches.

    grpo: 1 / (N |o_i|), a mean over each row's tokens, then over rows; dapo: 1 / (all tokens); dr_grpo:
    1 / (N max_new_tokens). Rows without signal count in N. `rows`, `tokens`: those of the whole update, in
    all processes, where they are not the mask's.
    """
    lengths = mask.sum(1).float()
    rows, tokens = rows or len(mask), tokens or lengths.sum()
    if loss_type == "grpo":
        return 1 / (rows * lengths.clamp(min=1))
    if loss_type == "dapo":
        return torch.ones_like(lengths) / max(tokens, 1)
    return torch.ones_like(lengths) / (rows * max_new_tokens)


def coefficient(step: int, start: float, fall: float) -> float:
    """lambda_k = max(start - fall (k - 1), 0) at the 1-based step k; the paper's is 0 after step 200."""
    return max(round(start - fall * (step - 1), 12), 0.0)  # rounded: 0.002 - 200 x 1e-5 shall be 0


def chosen_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi(id | s). [m, V], [m] -> [m]; an id outside gives some finite number, to be masked."""
    return logits.gather(-1, ids.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0] - logits.logsumexp(-1)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """TGPO: -log pi(y* | s). [m, V], [m] -> [m], nats.

    With y ~ pi_T(. | s) instead of the argmax it is a one-sample forward KL, up to the teacher's entropy.
    """
    return -chosen_logps(logits, labels)


def topk_forward_kl(logits: Tensor, top_ids: Tensor, top_logits: Tensor) -> Tensor:
    """TGPO, top-k: sum over the teacher's top k of p~ (log p~ - log pi(v | s)). [m, V], [m, k] twice -> [m]

    p~ is renormalised on the k. `top_logits` are the teacher's logits or log-probs of `top_ids`:
    renormalising makes them the same.
    """
    p = top_logits.log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1).gather(-1, top_ids))).sum(-1)


def label_bonus(old_label_logps: Tensor, matched: Tensor | bool = True) -> Tensor:
    """TGPO-Adv: A'_it = A_i + c_k pi_old(y*_it | s); this is the pi_old, [n, C]. `matched`: only where a =
    y*.

    It does not depend on the token sampled, so at rho = 1 it is a state baseline: its expected gradient is 0,
    and the authors' later code dropped it. Kept as an ablation; the matched variant does depend on it.
    """
    return old_label_logps.exp() * matched


def rkl_advantages(old_logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """RKL (OPD): A_it = log pi_T(a) - log pi_old(a). [n, C] twice -> [n, C]. Token-local: no return-to-go."""
    return teacher_logps - old_logps


def k2(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KDRL: (log pi_T(a) - log pi(a))^2 / 2. [m] twice -> [m]. Its expected gradient is the reverse KL's.

    As a loss k3 = r - 1 - log r with r = pi_T / pi would have the FORWARD KL's, and k1 = -log r none.
    """
    return (teacher_logps - logps).square() / 2


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(pi || pi_T) over the ids given, all shared ones or the teacher's top k. [m, V] twice -> [m]"""
    plain, teacher = logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    return (plain.exp() * (plain - teacher)).sum(-1)


def policy_entropy(logits: Tensor) -> Tensor:
    """H(pi(. | s)) with its gradient, for the entropy bonus. [m, V] -> [m], nats"""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


# ---------------------------------------------------------------- teacher

@dataclass
class Advice:
    """What the teacher says of each token of a rollout, [N, C]."""
    labels: Tensor      # what it would write here, as a student's id; -1 where the student has no such token
    logps: Tensor       # log pi_T(a) of the student's token, over the shared ids
    agrees: Tensor      # True where its argmax is the student's token
    top_ids: Tensor     # [N, C, k] its likeliest shared ids; k is 0 where no method wants them
    top_logits: Tensor  # [N, C, k]

    def rows(self, batch: list[int]) -> "Advice":
        """The advice of some rows, [n, C]."""
        return Advice(*[x[batch] for x in vars(self).values()])


class Teacher:
    """A frozen model that reads the student's token ids: in bf16 with --bf16, sharded over processes."""

    def __init__(self, args: Args, tokenizer, teacher_tokenizer, student_ends: list[int]):
        self.device = torch.device(args.teacher_device or HOME)
        self.args, self.offload = args, args.teacher_offload and world() == 1
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        rests = "cpu" if args.teacher_offload or world() > 1 else self.device
        self.model = load_model(args.teacher, "--teacher", dtype, rests)
        if world() > 1:
            self.model = shard(self.model, False, args.teacher_offload)
        self.shared = min(len(tokenizer), len(teacher_tokenizer))  # token ids below it mean the same to both
        self.student_end, self.teacher_end = tokenizer.eos_token_id, teacher_tokenizer.eos_token_id
        if self.teacher_end in student_ends:
            self.teacher_end = self.student_end  # the student stops at it, too
        self.other_ends = [i for i in stop_ids(self.model, teacher_tokenizer) if i not in student_ends]

    @torch.no_grad()
    def hidden(self, ro: Rollout, batch: list[int]) -> Tensor:
        """Its final hidden states at the student's places, [m, d]. Ids without an embedding become 0."""
        if self.offload:
            self.model.to(self.device)
        prompts, completions, mask = ro.rows(batch)
        width = self.model.get_input_embeddings().weight.shape[0]
        known, mask = completions.where(completions < width, 0).to(self.device), mask.to(self.device)
        return as_forward(self.model, lambda: completion_hidden(self.model, prompts, known, mask))

    def align(self, logits: Tensor) -> Tensor:
        """Swap the columns of student's and teacher's end token, if they differ. In place, [m, V_T]"""
        ends = [self.student_end, self.teacher_end]
        if self.student_end != self.teacher_end and max(ends) < logits.shape[-1]:
            logits[:, ends] = logits[:, ends[::-1]]
        return logits

    def read(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """Its logits [m, V_T] and the student's tokens [m] -> the fields of Advice."""
        logits = self.align(logits)
        shared, ends = logits[:, :self.shared], torch.tensor(self.other_ends, device=logits.device)
        best = logits.argmax(-1)
        labels = logits.softmax(-1).multinomial(1)[:, 0] if self.args.guidance == "tgpo-sampled" else best
        best, labels = (torch.where(torch.isin(y, ends), self.student_end, y) for y in (best, labels))
        top = shared.topk(self.args.topk or 0)
        labels = torch.where(labels < self.shared, labels, -1)
        return labels, chosen_logps(shared, ids), best == ids, top.indices, top.values

    @torch.no_grad()
    def advise(self, ro: Rollout, rows: list[int]) -> Advice:
        """One pass over these rows of the rollout, in micro-batches of its own."""
        advice = None
        for batch in microbatches(rows, ro.lengths(), self.args.teacher_microbatch_tokens):
            mask, hidden = ro.mask[batch], self.hidden(ro, batch)
            ids = ro.completions[batch][mask].to(self.device)
            found = over_vocabulary(self.read, self.model, [hidden], [ids], self.args.temperature)
            if advice is None:
                advice = Advice(*[x.new_zeros(*ro.mask.shape, *x.shape[1:]).to(mask.device) for x in found])
            row, t = mask.nonzero(as_tuple=True)
            for to, values in zip(vars(advice).values(), found, strict=True):
                to[torch.tensor(batch, device=mask.device, dtype=torch.long)[row], t] = values.to(mask.device)
        self.rest()
        return advice

    def rest(self) -> None:
        """Back to CPU memory, with --teacher_offload."""
        if self.offload:
            self.model.to("cpu")


def check_vocabulary(tokenizer, teacher_tokenizer, name: str) -> None:
    """Refuse a teacher whose tokenizer spells a shared id differently. Reads no weight.

    Embedding tables are padded to widths that say nothing, so the tokenizers' lengths count.
    """
    shared = list(range(min(len(tokenizer), len(teacher_tokenizer))))
    spellings = zip(tokenizer.convert_ids_to_tokens(shared), teacher_tokenizer.convert_ids_to_tokens(shared))
    for i, (ours, theirs) in enumerate(spellings):
        if ours != theirs:
            refuse(f"--teacher {name}: its tokenizer is not the student's: token {i} is {ours!r} to the "
                   f"student and {theirs!r} to the teacher")


def check_teacher(args: Args, tokenizer, teacher_tokenizer, rows: list[dict]) -> None:
    """Refuse a teacher that cannot read the prompts, or not so far."""
    if args.teacher is None:
        return
    shared = min(len(tokenizer), len(teacher_tokenizer))
    if args.topk and args.topk > shared:
        refuse(f"--topk {args.topk}: student and teacher share {shared} tokens")
    prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt) for row in rows]
    unknown = [i for prompt in prompts for i in prompt if i >= shared]
    if unknown:
        refuse(f"--teacher {args.teacher}: cannot read the prompts: it has no token {unknown[0]}, "
               f"{tokenizer.decode(unknown[0])!r} to the student")
    check_context(args.teacher, "--teacher", max(map(len, prompts)), args.max_new_tokens)


# ---------------------------------------------------------------- update

def score_rows(model, ro: Rollout, batch: list[int], teacher: Teacher | None, advice: Advice | None,
               guidance: str, args: Args) -> tuple[Tensor, ...]:
    """Of each token of some rows, [n, C]: log pi(a), entropy, log pi(a) over the shared ids, guidance's loss.

    In bf16 on a GPU; logits and what comes after them are fp32.
    """
    prompts, completions, mask = ro.rows(batch)
    exact = guidance == "reverse-kl" and not args.topk  # the only one that wants all of the teacher's logits
    extra = []
    if exact:
        extra = [teacher.hidden(ro, batch)]
    elif teacher:
        extra = [x[mask] for x in vars(advice.rows(batch)).values()]

    def values(logits: Tensor, ids: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        logps, entropy = log_prob_and_entropy(logits, ids)
        entropy = policy_entropy(logits) if args.entropy_bonus else entropy
        if teacher is None:
            return logps, entropy, logps, torch.zeros_like(logps)
        shared = logits[:, :teacher.shared]
        shared_logps, guide_loss = chosen_logps(shared, ids), torch.zeros_like(logps)
        if exact:
            with torch.no_grad():
                theirs = teacher.model.get_output_embeddings()(extra[0]).float() / args.temperature
                theirs = teacher.align(theirs)[:, :teacher.shared].to(logits.device)
            return logps, entropy, shared_logps, reverse_kl(shared, theirs)
        labels, teacher_logps, _, top_ids, top_logits = extra
        if guidance in WITH_LABELS:
            guide_loss = label_loss(shared, labels)
        elif guidance == "tgpo-topk":
            guide_loss = topk_forward_kl(shared, top_ids, top_logits)
        elif guidance == "kdrl":
            guide_loss = k2(shared_logps, teacher_logps)
        elif guidance == "reverse-kl":
            guide_loss = reverse_kl(shared.gather(-1, top_ids), top_logits)
        return logps, entropy, shared_logps, guide_loss

    with torch.autocast(ro.mask.device.type, torch.bfloat16, enabled=args.bf16):
        extra = [completions[mask], *extra]
        return token_values(values, model, prompts, completions, mask, extra, args.temperature)


def token_bonus(old_shared_logps: Tensor, old_guide_loss: Tensor, ids: Tensor, advice: Advice,
                guidance: str) -> Tensor | float:
    """What the methods that put the teacher's word into the advantage add to it, [n, C]."""
    if guidance == "rkl":
        return rkl_advantages(old_shared_logps, advice.logps)
    if guidance in ("tgpo-adv", "tgpo-adv-matched"):  # their guidance's loss is label_loss, -log pi(y*)
        return label_bonus(-old_guide_loss, advice.labels == ids if guidance == "tgpo-adv-matched" else True)
    return 0.0


def divergence_sums(shared_logps: Tensor, ids: Tensor, mask: Tensor, advice: Advice,
                    shared: int) -> dict[str, Tensor]:
    """How far apart the two are at the tokens [n, C], as sums over each row [n]: what training logs."""
    known = mask & (ids < shared)
    nll, k1 = (torch.where(known, x, 0.0) for x in (-advice.logps, shared_logps - advice.logps))
    return {"known": known.sum(1), "nll": nll.sum(1), "k1": k1.sum(1), "confident": (k1 > 0).sum(1),
            "mismatch": (mask & ~advice.agrees).sum(1), "dropped": (mask & (advice.labels < 0)).sum(1)}


def update(model, optimizer, ro: Rollout, advantages: Tensor, teacher: Teacher | None, coef: float,
           args: Args) -> dict[str, float]:
    """All optimizer steps of one rollout batch, whose rows have these advantages [N] -> metrics.

    Rows whose advantage is 0 are skipped while nothing else moves them (coef is 0). They contribute no
    gradient but still count in the normaliser.
    """
    guidance, advantages = args.guidance if coef else "none", advantages * args.reward_weight
    lengths, sums, norms = ro.lengths(), Sums(), []
    live = {i for i, A in enumerate(advantages.tolist()) if A or guidance != "none" or args.entropy_bonus}
    advantages = advantages.to(ro.mask.device)
    advice = teacher.advise(ro, live) if teacher else None
    taught = ro.mask  # [N, C] where the guidance has something to say: labels the student lacks are dropped
    if guidance in WITH_LABELS:
        taught = ro.mask & (advice.labels >= 0)
    elif guidance in ("rkl", "kdrl"):
        taught = ro.mask & (ro.completions < teacher.shared)
    old_scores = None  # one update: pi_old is pi. Both are over all of V, whatever --top_p
    if args.updates_per_rollout > 1:
        old_scores = torch.zeros(4, *ro.mask.shape, device=ro.mask.device)
        with torch.no_grad():
            for batch in microbatches(live, lengths, args.microbatch_tokens):
                scores = score_rows(model, ro, batch, teacher, advice, guidance, args)
                old_scores[:, batch] = torch.stack(scores)

    model.train()  # for activation checkpointing; there is no dropout
    # An update takes the same places of the step's batch, however many processes share it.
    for places in np.array_split(np.arange(args.prompts_per_step), args.updates_per_rollout):
        problems = [q for q, place in enumerate(my_share(range(args.prompts_per_step))) if place in places]
        rows = [q * args.group_size + j for q in problems for j in range(args.group_size)]
        n_rows, n_tokens, n_taught = total(len(rows), ro.mask[rows].sum(), taught[rows].sum())
        weights = token_weights(ro.mask, args.loss_type, args.max_new_tokens, n_rows, n_tokens)
        taught_weights = token_weights(taught, args.loss_type, args.max_new_tokens, n_rows, n_taught)
        for batch in microbatches([i for i in rows if i in live], lengths, args.microbatch_tokens, sums):
            mask, ids = ro.mask[batch], ro.completions[batch]
            scores = score_rows(model, ro, batch, teacher, advice, guidance, args)
            logps, entropy, shared_logps, guide_loss = scores
            olds = [x.detach() for x in scores] if old_scores is None else old_scores[:, batch]
            old, _, old_shared_logps, old_guide_loss = olds
            A = advantages[batch]
            if advice is not None:
                said = advice.rows(batch)
                bonus = token_bonus(old_shared_logps, old_guide_loss, ids, said, guidance)
                A = A[:, None] + coef * taught[batch] * bonus
                apart = divergence_sums(old_shared_logps, ids, mask, said, teacher.shared)
                sums.add(**{name: x.sum() for name, x in apart.items()})
            token_loss, clipped = policy_loss(logps, old, A, mask, args.clip_low, args.clip_high)
            token_loss = token_loss - args.entropy_bonus * entropy
            loss = (token_loss * weights[batch, None]).sum()
            if guidance in AS_LOSS:
                loss = loss + coef * (guide_loss * taught[batch] * taught_weights[batch, None]).sum()
            loss.backward()
            sums.add(loss=loss, entropy=entropy.sum(), clipped=clipped.sum(), scored=mask.sum())
        norms.append(optimizer_step(model, optimizer, args.max_grad_norm))
    model.eval()
    if teacher:
        teacher.rest()
    sums = sums.of_all()
    metrics = sums.metrics(norms)
    if teacher and sums["scored"]:
        known = max(sums["known"], 1)
        metrics |= {"tgpo/coef": coef, "tgpo/teacher_nll": sums["nll"] / known,
                    "tgpo/reverse_kl_k1": sums["k1"] / known,
                    "tgpo/student_more_confident": sums["confident"] / known,
                    "tgpo/mismatch": sums["mismatch"] / sums["scored"],
                    "tgpo/dropped_labels": int(sums["dropped"])}
    return metrics


# ---------------------------------------------------------------- divergence

@torch.no_grad()
def measure(model, tokenizer, teacher: Teacher, prompts: list[list[int]], args: Args) -> dict[str, dict]:
    """What training logs of the two, and the exact reverse KL: means over rollouts, with standard errors."""
    seed_everything(args.seed, "divergence")
    ro, found = rollout(model, tokenizer, prompts, args), torch.zeros(len(prompts), 7)
    advice = teacher.advise(ro, list(range(len(prompts))))
    exact = replace(args, topk=None)
    for batch in microbatches(range(len(prompts)), ro.lengths(), args.microbatch_tokens):
        mask, n = ro.mask[batch], ro.mask[batch].sum(1)
        _, _, shared_logps, reverse = score_rows(model, ro, batch, teacher, advice, "reverse-kl", exact)
        s = divergence_sums(shared_logps, ro.completions[batch], mask, advice.rows(batch), teacher.shared)
        known = s["known"].clamp(min=1)
        found[batch] = torch.stack([s["nll"] / known, s["k1"] / known, reverse.sum(1) / n, s["mismatch"] / n,
                                    s["confident"] / known, n, ro.truncated[batch]], 1).cpu().float()
    teacher.rest()
    found = all_shares(found)
    names = "teacher_nll reverse_kl_k1 reverse_kl mismatch student_more_confident length truncated".split()
    pairs = zip(found.mean(0).tolist(), (found.std(0) / len(found) ** 0.5).tolist())
    return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in zip(names, pairs)}


def say_divergence(report: dict[str, dict], run: Run) -> None:
    if rank() == 0:
        write_atomic(run.dir / "divergence.json", json.dumps(report, indent=2) + "\n")
    rows = [[name, *[f"{x:.4g}" for x in values.values()]] for name, values in report.items()]
    say_table([["divergence", "mean", "standard error"], *rows])


# ---------------------------------------------------------------- main

@program
def main() -> None:
    args = parse_args(Args)
    check_args(args)
    reward = load_reward(args.reward)
    run = Run(args)
    tokenizer = load_tokenizer(args.model)
    teacher_tokenizer = load_tokenizer(args.teacher, "--teacher") if args.teacher else tokenizer
    check_vocabulary(tokenizer, teacher_tokenizer, args.teacher)
    train, held_out = load_problems(args, tokenizer)
    check_teacher(args, tokenizer, teacher_tokenizer, train + held_out)
    warmup, train = warmup_split(train, tokenizer, reward, args)
    run.plan(train, warmup, str(args.group_size))
    if args.dry_run:
        return
    model = load_policy(args)
    ends = stop_ids(model, tokenizer)
    teacher = Teacher(args, tokenizer, teacher_tokenizer, ends) if args.teacher else None
    run.create()
    sft_warmup(model, tokenizer, warmup, run, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)

    def prompt(row: dict) -> list[int]:
        return build_prompt(tokenizer, row["problem"], args.system_prompt)

    def evaluate() -> dict[str, float]:
        return held_out_accuracy(model, tokenizer, held_out, reward, args)

    if args.measure_divergence:
        some = my_share(((held_out or train) * args.measure_divergence)[:args.measure_divergence])
        report = measure(model, tokenizer, teacher, [prompt(row) for row in some], args)
        return run.stop("measuring the divergence") if run.stopped() else say_divergence(report, run)

    run.begin(model, tokenizer, optimizer, evaluate)
    for step in run.steps():
        # ---- sample problems
        problems = my_share(batch_of_step(train, step, args.prompts_per_step, args.seed))  # b of B
        rows = [row for row in problems for _ in range(args.group_size)]  # N, a problem's side by side

        # ---- rollout
        ro = rollout(model, tokenizer, [prompt(row) for row in rows], args)
        run.lap("rollout")
        if run.stopped():  # the rollout was cut short, so this step is discarded
            break

        # ---- rewards and advantages
        rewards = reward(ro.texts, rows)  # [N]
        groups = all_shares(rewards.view(len(problems), args.group_size))  # [B, G], of all processes
        advantages = my_share(group_advantages(groups, args.scale_rewards)).flatten()  # [N]
        run.lap("grade")

        # ---- update
        coef = coefficient(step, args.coefficient, args.coefficient_fall)
        metrics = update(model, optimizer, ro, advantages, teacher, coef, args)

        # ---- log and save
        run.log(step, rows, ro, rewards, metrics)
        run.evaluate_and_save()
    run.finish()


if __name__ == "__main__":
    main()
