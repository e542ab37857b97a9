"""SGPO (Strategy-Guided Policy Optimization): GRPO plus distillation from strategy-guided samples.

What differs from grpo_baseline.py (equation numbers are the paper's, arXiv 2606.24064; its Eq. 1 is GRPO):
  1. A second, guided group of samples has a short strategy before the problem in its prompt; GRPO ignores it.
  2. Target (Eq. 4): of the correct guided samples, the one the model finds likeliest WITHOUT the strategy.
  3. Loss (Eq. 3, 5): on that target, forward KL from guided to unguided distribution, outlier tokens masked.
  4. Weight (Eq. 6, 7): alpha(q) is large where the strategy helps and the model alone fails.
  5. Before training, a strong model turns solutions into strategies (App. B, C), the last section here.

    python sgpo.py                                      # the built-in demo: CPU, offline, minutes
    python sgpo.py --model Qwen/Qwen2.5-7B-Instruct     # real problems: strategies, SFT warm-up, RL
"""
import re
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common import (
    NoAnswer, Run, StrategistFlags, Sums, all_shares, as_forward, batch_of_step, build_prompt,
    check_strategist, complete, completion_hidden, completion_logps, context_length, flag, gives_away,
    grader_counts, held_out_accuracy, load_policy, load_problems, load_reward, load_tokenizer, lock,
    long_work, microbatches, my_share, open_strategist, optimizer_step, parse_args, program, rank, read_jsonl,
    refuse, rewrite_jsonl, say_table, sft_warmup, token_values, total, warmup_split, write_jsonl)

# Letters: B problems of a step (b of them this process's), G samples per problem, N rows (problems x samples;
# n some of them), C tokens of the longest completion, m tokens of a chunk, V vocabulary. q: a problem, i: a
# row.


# ---------------------------------------------------------------- flags

@dataclass
class Args(StrategistFlags):
    """algorithm"""
    # rollouts
    steps: int = flag(400, "training steps, one rollout batch each; 0: the SFT baseline", "[0, inf)")
    prompts_per_step: int = flag(16, "problems per step", "[1, inf)")
    group_size: int = flag(8, "samples per problem without the strategy, G1", "[2, inf)")
    guided_group_size: int = flag(4, "samples per problem with the strategy, G2", "[1, inf)")
    max_new_tokens: int = flag(2048, "longest completion, in tokens", "[1, inf)")
    temperature: float = flag(1.0, "sampling temperature; also divides the logits of the loss", "(0, inf)")
    top_p: float = flag(0.95, "nucleus sampling", "(0, 1]")
    # objective
    clip_low: float = flag(0.2, "ratio clipped below 1 - clip_low", "[0, inf]")
    clip_high: float = flag(0.28, "ratio clipped above 1 + clip_high", "[0, inf]")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag("grpo", "mean over rows, tokens, or token limits")
    scale_rewards: Literal["group", "batch", "none"] = flag("group", "whose std divides the rewards")
    autonomous_grpo: bool = flag(True, "ablation: --no_autonomous_grpo trains by distillation only")
    # strategy distillation
    distill: Literal["forward_kl", "reverse_kl", "sft", "none"] = flag("forward_kl", "Eq. 3; ablations")
    target: Literal["reachable", "all"] = flag("reachable", "Eq. 4; ablation: all of C (Eq. 2)")
    delta: float = flag(1.0, "tokens with a KL above this are masked (Eq. 5); inf: none", "[0, inf]")
    weight: Literal["adaptive", "fixed", "group_advantage"] = flag("adaptive", "alpha(q) by Eq. 6; ablations")
    alpha0: float = flag(0.5, "Eq. 6, scale", "[0, inf)")
    gamma: float = flag(0.1, "Eq. 6, smoothing of the pass rates", "(0, inf)")
    alpha_max: float = flag(0.8, "Eq. 6, upper bound", "[0, inf)")
    fixed_alpha: float = flag(1.0, "alpha of --weight fixed", "[0, inf)")
    # update
    lr: float = flag(1e-6, "AdamW learning rate", "[0, inf)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag("constant", "how it falls after its warm-up")
    lr_warmup_steps: int = flag(0, "steps of linear learning rate warm-up", "[0, inf)")
    weight_decay: float = flag(0.01, "AdamW weight decay", "[0, inf)")
    max_grad_norm: float = flag(1.0, "gradient norm clipped to this", "(0, inf)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout, each on its share", "[1, inf)")
    # strategies
    strategies: str = flag(None, "JSONL file, read if it exists; new ones are appended (default: in --out)")
    strategy_candidates: int = flag(5, "candidates per solution, of which the best is kept", "[1, inf)")
    extract_only: bool = flag(False, "stop once the strategies are extracted")


def check_args(args: Args) -> None:
    """Checks that involve more than one flag."""
    if args.updates_per_rollout > args.prompts_per_step:
        refuse(f"--updates_per_rollout {args.updates_per_rollout} exceeds --prompts_per_step")
    check_strategist(args)
    folder = Path(args.strategies or ".").absolute().parent
    if not folder.is_dir() and folder != Path(args.out or ".").absolute():
        refuse(f"--strategies {args.strategies}: there is no such folder to put it in")


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


def forward_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Eq. 3: d = KL( stopgrad pi(. | q, s, o_<t) || pi(. | q, o_<t) ), in nats. [m, V] twice -> [m]

    The stop-gradient is on the logits: both sides share their weights, lm_head included.
    """
    guided, plain = guided_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (guided.exp() * (guided - plain)).sum(-1)


def reverse_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Ablation of Eq. 3: KL( pi(. | q, o_<t) || stopgrad pi(. | q, s, o_<t) )."""
    guided, plain = guided_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (plain.exp() * (plain - guided)).sum(-1)


def clip_kl(d: Tensor, delta: float) -> Tensor:
    """Eq. 5: 1[d <= delta] d. Outliers are masked, not capped; the mean keeps its denominator |o+|."""
    return torch.where(d <= delta, d, 0.0)


def reachable_target(sum_logps: Tensor) -> int:
    """Eq. 4: argmax over C of sum_t log pi(g_t | q, g_<t), scored WITHOUT the strategy. [|C|] -> index.

    A sum, not a mean: it also favours the shorter target.
    """
    return int(sum_logps.argmax())


def adaptive_weight(p_guided: Tensor, p_auto: Tensor, alpha0: float, gamma: float,
                    alpha_max: float) -> Tensor:
    """Eq. 6: alpha(q) = clip(alpha0 (p_guided - p_auto + gamma) / (p_auto + gamma), 0, alpha_max).

    From the pass rates of the two groups. [B] twice -> [B]
    """
    return (alpha0 * (p_guided - p_auto + gamma) / (p_auto + gamma)).clamp(0, alpha_max)


def group_advantage_weight(rewards: Tensor, alpha_max: float) -> Tensor:
    """Ablation of Eq. 6: o+'s advantage among the autonomous samples, in [0, alpha_max]. [B, G1] -> [B]"""
    with_target = torch.cat([rewards, torch.ones_like(rewards[:, :1])], 1)
    return group_advantages(with_target)[:, -1].clamp(0, alpha_max)


# ---------------------------------------------------------------- guidance

@dataclass
class Guidance:
    prompts: list[list[int]]  # N prompts as they were sampled from: guided rows' hold the strategy
    correct: list[list[int]]  # each problem's correct guided samples (the paper's C), as rows
    alpha: Tensor             # [b] alpha(q), 0 where there are none


def guide(prompts: list[list[int]], rewards: Tensor, problems: list[dict],
          args: Args) -> tuple[Guidance, dict[str, float]]:
    """Correct guided samples and weight of each of b problems, from the rewards [N] of both groups.

    N is b x G1 autonomous rows, then G2 guided ones for each problem with a strategy, as main laid them out.
    Problems without a strategy are left out of the metrics. A reward of 0.5 or more is correct.
    """
    b, G1, G2 = len(problems), args.group_size, args.guided_group_size
    groups, next_row = rewards[:b * G1].view(b, G1), b * G1
    has_strategy = torch.tensor([args.distill != "none" and "strategy" in row for row in problems])
    correct = [[] for _ in problems]
    for q in has_strategy.nonzero()[:, 0].tolist():
        correct[q] = [i for i in range(next_row, next_row + G2) if rewards[i] >= 0.5]
        next_row += G2
    p_auto = (groups >= 0.5).float().mean(1)
    p_guided = torch.tensor([len(rows) / G2 for rows in correct])
    if args.weight == "adaptive":
        alpha = adaptive_weight(p_guided, p_auto, args.alpha0, args.gamma, args.alpha_max)
    elif args.weight == "group_advantage":
        alpha = group_advantage_weight(groups, args.alpha_max)
    else:
        alpha = torch.full((b,), args.fixed_alpha)
    no_target = torch.tensor([not rows for rows in correct])
    alpha = torch.where(no_target, 0.0, alpha)
    shown = {"sgpo/alpha": alpha, "sgpo/p_auto": p_auto, "sgpo/p_guided": p_guided,
             "sgpo/no_target_frac": no_target}
    n, *sums = total(has_strategy.sum(), *(x[has_strategy].sum() for x in shown.values()))
    metrics = {name: x / n for name, x in zip(shown, sums)} if n else {}
    return Guidance(prompts, correct, alpha), metrics


# ---------------------------------------------------------------- update

def score_rows(model, ro: Rollout, batch: list[int], args: Args) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy [n, C] of some rows, in bf16 on a GPU; fp32 from the logits on."""
    with torch.autocast(ro.mask.device.type, torch.bfloat16, enabled=args.bf16):
        return completion_logps(model, *ro.rows(batch), args.temperature)


def choose_targets(model, ro: Rollout, correct: dict[int, list[int]], args: Args) -> dict[int, list[int]]:
    """The rows to distil of each problem: one correct guided sample (Eq. 4), or all of them (Eq. 2)."""
    if args.target == "all":
        return correct
    sum_logps = {}
    rivals = [i for rows in correct.values() if len(rows) > 1 for i in rows]  # a lone one needs no score
    with torch.no_grad():
        for batch in microbatches(rivals, ro.lengths(), args.microbatch_tokens):
            logps, _ = score_rows(model, ro, batch, args)
            sum_logps.update(zip(batch, logps.sum(1).tolist()))
    chosen = {}
    for q, rows in correct.items():
        scores = torch.tensor([sum_logps.get(i, 0.0) for i in rows])
        chosen[q] = [rows[reachable_target(scores)]]
    return chosen


def distances(model, ro: Rollout, guided: Rollout, batch: list[int], args: Args) -> Tensor:
    """d_t [n, C] of Eq. 3, or -log pi (SFT). Both prompts end in the same completion, so tokens line up."""
    if args.distill == "sft":
        return -score_rows(model, ro, batch, args)[0]
    kl, device = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[args.distill], ro.mask.device.type

    def values(guided_logits: Tensor, logits: Tensor) -> tuple[Tensor]:
        return (kl(guided_logits, logits),)

    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=args.bf16):
        guided_hidden = as_forward(model, lambda: completion_hidden(model, *guided.rows(batch)))
    with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
        return token_values(values, model, *ro.rows(batch), extra=[], temperature=args.temperature,
                            other_hidden=[guided_hidden])[0]


def update(model, optimizer, ro: Rollout, advantages: Tensor, guidance: Guidance,
           args: Args) -> dict[str, float]:
    """All optimizer steps of one rollout batch, whose autonomous rows have these advantages -> metrics.

    Rows whose advantage is 0 are skipped. They contribute no gradient but still count in the normaliser.
    Problems whose alpha is 0 skip the distillation. Every row is scored under `ro.prompts`, without the
    strategy.
    """
    guided = replace(ro, prompts=guidance.prompts)
    guided_lengths = guided.lengths()  # the longer side: distillation's micro-batches are cut by it
    delta = float("inf") if args.distill == "sft" else args.delta  # -log pi is no KL: nothing to clip
    lengths, sums, norms = ro.lengths(), Sums(), []
    live = {i for i, A in enumerate(advantages.tolist()) if A != 0}
    advantages = advantages.to(ro.mask.device)
    old_logps = None  # one update: pi_old is pi. Both are over all of V, whatever --top_p
    if args.updates_per_rollout > 1:
        old_logps = torch.zeros(ro.mask.shape, device=ro.mask.device)
        with torch.no_grad():
            for batch in microbatches(live, lengths, args.microbatch_tokens):
                old_logps[batch] = score_rows(model, ro, batch, args)[0]

    model.train()  # for activation checkpointing; there is no dropout
    # An update takes the same places of the step's batch, however many processes share it.
    for places in np.array_split(np.arange(args.prompts_per_step), args.updates_per_rollout):
        problems = [q for q, place in enumerate(my_share(range(args.prompts_per_step))) if place in places]
        rows = [q * args.group_size + j for q in problems for j in range(args.group_size)]
        n_rows, n_tokens, n_problems = total(len(rows), ro.mask[rows].sum(), len(problems))
        weights = token_weights(ro.mask, args.loss_type, args.max_new_tokens, n_rows, n_tokens)
        for batch in microbatches([i for i in rows if i in live], lengths, args.microbatch_tokens, sums):
            mask = ro.mask[batch]
            logps, entropy = score_rows(model, ro, batch, args)
            old = logps.detach() if old_logps is None else old_logps[batch]
            A = advantages[batch]
            token_loss, clipped = policy_loss(logps, old, A, mask, args.clip_low, args.clip_high)
            loss = (token_loss * weights[batch, None]).sum()
            loss.backward()
            sums.add(loss=loss, entropy=entropy.sum(), clipped=clipped.sum(), scored=mask.sum())

        # Eq. 7: + alpha(q) L_KD(q), averaged over the problems of the update
        correct = {q: guidance.correct[q] for q in problems if guidance.alpha[q] > 0}
        targets = choose_targets(model, ro, correct, args)
        kd_weights = torch.zeros(len(ro.mask), device=ro.mask.device)
        for q, chosen in targets.items():
            for i in chosen:
                kd_weights[i] = guidance.alpha[q] / (n_problems * len(chosen) * ro.mask[i].sum())
        for batch in microbatches(sum(targets.values(), []), guided_lengths, args.microbatch_tokens, sums):
            d = distances(model, ro, guided, batch, args)
            loss = (clip_kl(d, delta) * kd_weights[batch, None]).sum()
            loss.backward()
            sums.add(loss=loss, kl=d.sum(), kl_clipped=(d > delta).sum(), kl_tokens=ro.mask[batch].sum())
        norms.append(optimizer_step(model, optimizer, args.max_grad_norm))
    model.eval()
    sums = sums.of_all()
    metrics = sums.metrics(norms)
    if sums["kl_tokens"]:
        metrics["sgpo/kl"] = sums["kl"] / sums["kl_tokens"]
        metrics["sgpo/kl_clipped_frac"] = sums["kl_clipped"] / sums["kl_tokens"]
    return metrics


# ---------------------------------------------------------------- main

@program
def main() -> None:
    args = parse_args(Args)
    check_args(args)
    reward = load_reward(args.reward)
    run = Run(args)
    tokenizer = load_tokenizer(args.model)
    train, held_out = load_problems(args, tokenizer)
    warmup, train = warmup_split(train, tokenizer, reward, args)
    path, fits = Path(args.strategies or run.dir / "strategies.jsonl"), guided_prompt_fits(tokenizer, args)
    waiting = adopt_strategies(train, held_out, path, fits, args)
    there = sum("strategy" in row for row in train)
    run.plan(train, warmup, f"({args.group_size} + {args.guided_group_size} guided)",
                 strategies=f"{there} there, {len(waiting)} to extract -> {path}")
    if args.dry_run:
        return
    model = None if args.extract_only and args.strategist else load_policy(args)
    run.create()
    if waiting:
        add_strategies(waiting, model, tokenizer, path, fits, run, args)
        adopt_strategies(train, [], path, fits, args)  # the new ones
    if args.extract_only:
        return
    sft_warmup(model, tokenizer, warmup, run, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)

    def prompt(row: dict, strategy: str | None = None) -> list[int]:
        return build_prompt(tokenizer, row["problem"], args.system_prompt, strategy)

    def evaluate() -> dict[str, float]:
        alone = held_out_accuracy(model, tokenizer, held_out, reward, args)
        return alone | held_out_accuracy(model, tokenizer, held_out, reward, args, guided=True)

    run.begin(model, tokenizer, optimizer, evaluate)
    for step in run.steps():
        # ---- sample problems
        problems = my_share(batch_of_step(train, step, args.prompts_per_step, args.seed))  # b of B
        rows = [row for row in problems for _ in range(args.group_size)]  # N, a problem's side by side
        n_auto = len(rows)
        if args.distill != "none":  # then the guided ones, in the order in which `guide` takes them
            rows += [{**row, "guided": True} for row in problems if "strategy" in row
                     for _ in range(args.guided_group_size)]

        # ---- rollout
        sampled_prompts = [prompt(row, row["strategy"] if "guided" in row else None) for row in rows]
        ro = rollout(model, tokenizer, sampled_prompts, args)
        run.lap("rollout")
        if run.stopped():  # the rollout was cut short, so this step is discarded
            break

        # ---- rewards and advantages
        rewards = reward(ro.texts, rows)  # [N]
        groups = all_shares(rewards[:n_auto].view(len(problems), args.group_size))  # [B, G], of all processes
        advantages = my_share(group_advantages(groups, args.scale_rewards)).flatten()  # [n_auto]
        if not args.autonomous_grpo:
            advantages = torch.zeros_like(advantages)
        guidance, guided_metrics = guide(sampled_prompts, rewards, problems, args)
        ro = replace(ro, prompts=[prompt(row) for row in rows])  # from here on all is scored without
        run.lap("grade")

        # ---- update
        metrics = update(model, optimizer, ro, advantages, guidance, args) | guided_metrics

        # ---- log and save
        run.log(step, rows, ro, rewards, metrics)
        run.evaluate_and_save()
    run.finish()


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


def said_after_thinking(answer: str) -> str:
    """Strip the <think> part; empty if it never closes."""
    answer = answer.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def parse_strategy(answer: str) -> str | None:
    """The strategy in an answer; None where a part is missing or the prompt's own form came back."""
    bold = r"(?<![\w*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?!\w)"
    text = re.sub(r"^#+ *", "", re.sub(bold, r"\2", said_after_thinking(answer)), flags=re.M)
    labels, at = [], 0
    for label in (r"(?:\bproblem +)?\btype", r"\bstrategy", r"\bsteps"):
        found = re.compile(rf"{label} *(?:\([^()\n]*\) *)?(?::|(?<=\w)\n)", re.I).search(text, at)
        if found is None:
            return None
        labels.append(found)
        at = found.end()
    ends = [labels[1].start(), labels[2].start(), len(text)]
    if not all(re.search(r"\w", text[label.end():end]) for label, end in zip(labels, ends)):
        return None
    form = re.findall("^(?:Problem type|Strategy):.*$", EXTRACTION_PROMPT, re.M)
    return None if any(line in text for line in form) else text[labels[0].start():].strip()


def parse_scores(answer: str, n: int) -> list[float | None]:
    """The score of each of n strategies, None where there is none from 0 to 1."""
    label = r"^\W*(?:strategy|candidate|score)?\W*([0-9]+)`?\W*?(?::|\||[=.)\u2013\u2014-]\s)[\s*`|]*"
    number = r"([01]?\.[0-9]+|[01])(?![0-9]|\.[0-9]|\s*/\s*(?!1(?![0-9])))"
    found = re.findall(label + number, said_after_thinking(answer), re.M | re.I)
    scores = {int(k): float(x) for k, x in found if float(x) <= 1}
    return [scores.get(k + 1) for k in range(n)]


def extract(rows: list[dict], ask, fits, args: Args) -> list[dict]:
    """For each row with its solution the best of several candidate strategies, or None, and all of them.

    `ask(prompts, temperature)` gives answers; `fits(row, strategy)`: is the guided prompt short enough?
    """
    n = args.strategy_candidates
    prompts = [EXTRACTION_PROMPT.format(problem=row["problem"], solution=row["solution"])
               for row in rows for _ in range(n)]
    answers, drafts = ask(prompts, 1.0), []
    for k, row in enumerate(rows):
        drafts.append([judge(answer, row, fits) for answer in answers[k * n:(k + 1) * n]])
    good = [[c for c in candidates if "rejected" not in c] for candidates in drafts]
    rated = [k for k, rivals in enumerate(good) if rivals]
    verdicts = ask([scoring_prompt(rows[k], good[k]) for k in rated], 0.0)
    for k, verdict in zip(rated, verdicts):
        for candidate, score in zip(good[k], parse_scores(verdict, len(good[k]))):
            candidate["score"] = score
    results = []
    for row, candidates, rivals in zip(rows, drafts, good):
        best = max(rivals, key=lambda c: c["score"] or 0, default={"strategy": None, "score": None})
        results.append({"id": row["id"], "problem": row["problem"], **best, "candidates": candidates,
                        "strategist": strategist_of(args)})
    return results


def scoring_prompt(row: dict, rivals: list[dict]) -> str:
    """What asks for a score of each of these candidates."""
    listed = "\n\n".join(f"Strategy {k}:\n{c['strategy']}" for k, c in enumerate(rivals, 1))
    return SCORING_PROMPT.format(n=len(rivals), problem=row["problem"], answer=row["answer"],
                                 strategies=listed)


def judge(answer: str, row: dict, fits) -> dict:
    """A candidate: its strategy, and why it is rejected if it is."""
    if isinstance(answer, NoAnswer):
        return {"rejected": str(answer)}
    strategy = parse_strategy(answer)
    if strategy is None:
        return {"rejected": "not in three parts", "answer": answer[-2000:]}
    if gives_away(strategy, row["answer"], row["problem"]):
        return {"strategy": strategy, "rejected": "gives the answer away"}
    return {"strategy": strategy} if fits(row, strategy) else {"strategy": strategy, "rejected": "too long"}


def strategist_of(args: Args) -> str:
    """Who is asked, as the file of strategies names it."""
    return args.strategist_model or args.strategist or args.model


def read_strategies(path: Path) -> dict[str, dict]:
    """problem -> its line of the file; "strategy" is null where the extraction found none."""
    found = {}
    for place, entry in read_jsonl(path, cut_by_kill=True) if path.exists() else ():
        entry = entry if isinstance(entry, dict) else {}
        if not isinstance(entry.get("problem"), str) or not isinstance(entry.get("strategy", 0), str | None):
            refuse(f'{place}: must be a JSON object with "problem" and "strategy"')
        found[entry["problem"]] = entry
    return found


def guided_prompt_fits(tokenizer, args: Args):
    """A function of (row, strategy): is the prompt with it within --max_prompt_tokens and the context?"""
    limit = min(args.max_prompt_tokens, context_length(args.model) - args.max_new_tokens)
    one_by_one = threading.Lock()  # a tokenizer is not for several threads at once

    def fits(row: dict, strategy: str) -> bool:
        with one_by_one:
            return len(build_prompt(tokenizer, row["problem"], args.system_prompt, strategy)) <= limit

    return fits


def adopt_strategies(train: list[dict], held_out: list[dict], path: Path, fits, args: Args) -> list[dict]:
    """Give rows the strategies of the file, take too long ones away -> the rows that wait for extraction.

    A row for which an extraction found nothing is tried again with another strategist, or where an endpoint
    fell silent.
    """
    extracting = args.distill != "none" and (args.steps or args.extract_only)
    found, me = read_strategies(path) if extracting else {}, strategist_of(args)
    for row in train:
        if "strategy" not in row and found.get(row["problem"], {}).get("strategy"):
            row["strategy"] = found[row["problem"]]["strategy"]
    long = [row for row in [*train, *held_out] if "strategy" in row and not fits(row, row["strategy"])]
    for row in long:
        del row["strategy"]
    if long:
        print(f"dropped {len(long)} strategies: with them the prompt is too long, first: id {long[0]['id']}")
    if not extracting:
        return []

    def settled(entry: dict) -> bool:
        silent = any(c.get("rejected") == "no answer" for c in entry.get("candidates", ()))
        return entry["strategy"] is not None or not silent and entry.get("strategist", me) == me

    waiting = {row["problem"]: row for row in train if "solution" in row and "strategy" not in row}
    waiting = [row for problem, row in waiting.items() if problem not in found or not settled(found[problem])]
    waiting = [] if args.strategist == "none" else waiting
    if not found and not waiting and not any("strategy" in row for row in train):
        refuse(f"none of the {len(train)} problems has a strategy or a solution: add one to the rows, name a "
               "file of --strategies, or train without by --distill none")
    missing = sum("strategy" not in row for row in train)
    if missing and not waiting:
        print(f"{missing} of {len(train)} problems have no strategy: they train by GRPO alone")
    return waiting


def add_strategies(waiting: list[dict], model, tokenizer, path: Path, fits, run: Run, args: Args) -> None:
    """Extract a strategy for each of these rows into the file, row by row as they come."""
    strategist = open_strategist(args, model, tokenizer)
    results = strategist.each(lambda rows: extract(rows, strategist.ask, fits, args), waiting)
    kept = 0
    with long_work(len(waiting), "strategies", "problem") as bar:
        if rank() == 0:
            run.writes = lock(Path(f"{path}.lock"), f"--strategies {path}: another run is writing it")
            rewrite_jsonl(path, list(read_strategies(path).values()))  # without a line that a kill has cut
        for result in results:
            if rank() == 0:
                write_jsonl(path, [result])
            kept += result["strategy"] is not None
            bar.set_postfix_str(f"{kept} found")
            bar.update()
    if run.stopped():
        run.stop("extracting strategies")
    grader_counts()  # reset: the leak check's verdicts belong to no step
    say_quality([entry for entry in read_strategies(path).values() if "candidates" in entry])


def say_quality(results: list[dict]) -> None:
    """Bands of the best scores (App. C: 39.4% in [0.8, 1], 54.4% in [0.5, 0.8), 6.2% below), rejections."""
    scores = [r["score"] for r in results if r["score"] is not None]
    why = Counter(c["rejected"] for r in results for c in r["candidates"] if "rejected" in c)
    shares = [sum(low <= x < high for x in scores) / max(len(scores), 1) for low, high in
              ((0.8, 2), (0.5, 0.8), (0, 0.5))]
    bands = "{:.1%} in [0.8, 1], {:.1%} in [0.5, 0.8), {:.1%} below".format(*shares)
    rejected = ", ".join(f"{n} {reason}" for reason, n in why.most_common()) or "none"
    say_table([["strategies found", f"{sum(r['strategy'] is not None for r in results)} of {len(results)}"],
               ["scores", f"{bands} ({len(scores)} scored)"], ["candidates rejected", rejected]])


if __name__ == "__main__":
    main()
