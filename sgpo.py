"""SGPO (Strategy-Guided Policy Optimization): GRPO plus token-level distillation from the model's own strategy-guided samples.

What differs from grpo_baseline.py (equation numbers are the paper's, arXiv 2606.24064):
  1. A second, guided group of samples has a short strategy put before the problem in its prompt; GRPO (Eq. 1) ignores it.
  2. Target (Eq. 4): of the correct guided samples, the one that the model finds likeliest WITHOUT the strategy.
  3. Loss (Eq. 3, 5): on that target, forward KL from the guided to the unguided distribution, outlier tokens masked.
  4. Weight (Eq. 6, 7): alpha(q) is large where the strategy helps and the model alone fails, 0 where it does not help.

    python sgpo.py                                                       # the built-in demo: CPU, offline, minutes
    python sgpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset rows.jsonl   # rows with "problem", "answer", "strategy"
"""
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from common import (DEFAULT_DATASET, SYSTEM_PROMPT, Run, Watch, autocast, batch_of_step, build_prompt, check_context, check_flags,
                    completion_hidden, completion_logps, completion_mask, demo_recipe, generate, grader_counts, load_model, load_problems,
                    load_reward, load_tokenizer, microbatches, over_vocabulary, parse_args, peak_memory_gb, printable, refuse, rollout_copy, say_table,
                    score, seed_everything, stop_ids, sync_rollout_copy, usable_rows)

# Letters: B problems of a step, G samples a problem, N rows (problems x samples), P prompt, C completion, V vocabulary.


# ---------------------------------------------------------------- flags

@dataclass
class Args:
    model: str = HfArg(default="demo", help="hub id or local directory; demo: the built-in tiny model")
    dataset: str = HfArg(default=None, help=f"JSONL, parquet or hub data set of problems (default: the demo's own, else {DEFAULT_DATASET})")
    eval_dataset: str = HfArg(default=None, help="held-out problems, same layouts (the demo has its own)")
    out: str = HfArg(default=None, help="run directory (default: a new one under runs/)")
    resume: bool = HfArg(default=False, help="go on with the run in --out from its newest checkpoint")
    seed: int = HfArg(default=0, help="seed of everything: problem order and sampling")
    reward: str = HfArg(default=None, help="own reward, FILE.py:function of (response, row); default: the math grader")
    system_prompt: str = HfArg(default=SYSTEM_PROMPT, help="system message; empty for none")
    # rollouts
    steps: int = HfArg(default=400, help="training steps, one rollout batch each")
    prompts_per_step: int = HfArg(default=16, help="problems a step")
    group_size: int = HfArg(default=8, help="samples a problem without the strategy, G1")
    guided_group_size: int = HfArg(default=4, help="samples a problem with the strategy, G2")
    max_new_tokens: int = HfArg(default=2048, help="longest completion, in tokens")
    max_prompt_tokens: int = HfArg(default=1024, help="rows with a longer prompt are dropped")
    temperature: float = HfArg(default=1.0, help="sampling temperature; also divides the logits of the loss")
    top_p: float = HfArg(default=0.95, help="nucleus sampling")
    # objective
    clip_low: float = HfArg(default=0.2, help="ratio clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.28, help="ratio clipped above 1 + clip_high")
    loss_type: str = HfArg(default="grpo", help="grpo: mean over a row's tokens, then rows; dapo: over all tokens; dr_grpo: sum / (rows x max_new_tokens)")
    scale_rewards: str = HfArg(default="group", help="divide centred rewards by the std of the group, of the batch, or none")
    autonomous_grpo: bool = HfArg(default=True, help="ablation: --no_autonomous_grpo leaves the distillation alone")
    # strategy distillation
    distill: str = HfArg(default="forward_kl", help="forward_kl; ablations: reverse_kl, sft (plain SFT on the target), none (no guided samples)")
    target: str = HfArg(default="reachable", help="reachable (Eq. 4); ablation: all (average over all correct guided samples, Eq. 2)")
    delta: float = HfArg(default=1.0, help="tokens with a KL above this are masked (Eq. 5); inf: none; with --target all: no proximal constraint")
    weight: str = HfArg(default="adaptive", help="alpha(q): adaptive (Eq. 6); ablations: fixed, group_advantage")
    alpha0: float = HfArg(default=0.5, help="Eq. 6, scale")
    gamma: float = HfArg(default=0.1, help="Eq. 6, smoothing of the pass rates")
    alpha_max: float = HfArg(default=0.8, help="Eq. 6, upper bound")
    fixed_alpha: float = HfArg(default=1.0, help="alpha of --weight fixed")
    # update
    lr: float = HfArg(default=1e-6, help="AdamW learning rate, constant after the warm-up")
    lr_warmup_steps: int = HfArg(default=0, help="steps of linear learning rate warm-up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradient norm clipped to this")
    updates_per_rollout: int = HfArg(default=1, help="optimizer steps a rollout batch, each on its share of the problems")
    microbatch_tokens: int = HfArg(default=16384, help="padded tokens a forward pass; lower it when memory is short")
    activation_checkpointing: bool = HfArg(default=False, help="recompute activations in backward: less memory, a third more time")
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
                           eval_samples=1, eval_batch_size=1, eval_temperature=0, save_every=0, keep_checkpoints=1, seed=0))
    check_flags(args, dict(guided_group_size=1, delta=0, alpha0=0, alpha_max=0, fixed_alpha=0))
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        refuse(f"--temperature must be above 0 and --top_p in (0, 1], not {args.temperature} and {args.top_p}")
    if args.loss_type not in ("grpo", "dapo", "dr_grpo"):
        refuse(f"--loss_type {args.loss_type}: choose grpo, dapo or dr_grpo")
    if args.scale_rewards not in ("group", "batch", "none"):
        refuse(f"--scale_rewards {args.scale_rewards}: choose group, batch or none")
    for flag, choices in (("distill", ("forward_kl", "reverse_kl", "sft", "none")), ("target", ("reachable", "all")),
                          ("weight", ("adaptive", "fixed", "group_advantage"))):
        if getattr(args, flag) not in choices:
            refuse(f"--{flag} {getattr(args, flag)}: choose {', '.join(choices)}")
    if not args.gamma > 0:
        refuse(f"--gamma is {args.gamma}; it must be above 0, or a problem that is never solved alone divides by 0")
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
        watch.rolling_out(len(prompts))
    completions = generate(model, prompts, eos, tokenizer.pad_token_id, args.max_new_tokens, temperature, args.top_p, watch)
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
    A = advantages.reshape(len(mask), -1)
    rho = torch.where(mask, logps - old_logps, 0.0).exp()
    clipped = (rho > 1 + clip_high) & (A > 0) | (rho < 1 - clip_low) & (A < 0)
    loss = -torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return loss * mask, clipped & mask


def token_weights(mask: Tensor, loss_type: str, max_new_tokens: int) -> Tensor:
    """Eq. 1, the means: what each row's tokens weigh in the loss, [N]; made once for the whole update, before it is cut into micro-batches.

    grpo: 1 / (N |o_i|), dapo: 1 / (all tokens), dr_grpo: 1 / (N max_new_tokens). Rows without signal count in N.
    """
    lengths = mask.sum(1).float()
    if loss_type == "grpo":
        return 1 / (len(mask) * lengths.clamp(min=1))
    if loss_type == "dapo":
        return torch.ones_like(lengths) / lengths.sum().clamp(min=1)
    return torch.ones_like(lengths) / (len(mask) * max_new_tokens)


def forward_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Eq. 3: d = KL( stopgrad pi(. | q, s, o_<t) || pi(. | q, o_<t) ) over the whole vocabulary. [m, V] twice -> [m], nats.

    The stop-gradient is on the logits: both sides share their weights, lm_head included.
    """
    guided, plain = guided_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (guided.exp() * (guided - plain)).sum(-1)


def reverse_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Ablation of Eq. 3: KL( pi(. | q, o_<t) || stopgrad pi(. | q, s, o_<t) )."""
    guided, plain = guided_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (plain.exp() * (plain - guided)).sum(-1)


def clip_kl(d: Tensor, delta: float) -> Tensor:
    """Eq. 5: 1[d <= delta] d. Outliers are masked, not capped; the mean over the target's tokens keeps its denominator |o+|."""
    return torch.where(d <= delta, d, 0.0)


def reachable_target(sum_logps: Tensor) -> int:
    """Eq. 4: argmax over the correct guided samples of sum_t log pi(g_t | q, g_<t), scored WITHOUT the strategy. [|C|] -> index.

    A sum, not a mean: it also favours the shorter target.
    """
    return int(sum_logps.argmax())


def adaptive_weight(p_guided: Tensor, p_auto: Tensor, alpha0: float, gamma: float, alpha_max: float) -> Tensor:
    """Eq. 6: alpha(q) = clip(alpha0 (p_guided - p_auto + gamma) / (p_auto + gamma), 0, alpha_max), from the groups' pass rates. [B] -> [B]"""
    return (alpha0 * (p_guided - p_auto + gamma) / (p_auto + gamma)).clamp(0, alpha_max)


def group_advantage_weight(rewards: Tensor, alpha_max: float) -> Tensor:
    """Ablation of Eq. 6: clip(advantage of o+ in the group of the autonomous samples and o+ (reward 1), 0, alpha_max). [B, G1] -> [B]"""
    return group_advantages(torch.cat([rewards, torch.ones_like(rewards[:, :1])], 1))[:, -1].clamp(0, alpha_max)


# ---------------------------------------------------------------- guidance

@dataclass
class Guidance:
    prompts: list[list[int]]  # N prompts as they were sampled from: guided rows' hold the strategy
    correct: list[list[int]]  # B lists of rows: a problem's correct guided samples, C
    alpha: Tensor             # [B] alpha(q), 0 where C is empty


def guide(prompts: list[list[int]], rewards: Tensor, problems: list[dict], args: Args) -> tuple[Guidance, dict]:
    """Candidates and weight of every problem, from the rewards [N] of both groups: B x G1 autonomous rows, then the guided ones."""
    B, correct = len(problems), [[] for _ in problems]
    groups, guided = rewards[:B * args.group_size].view(B, -1), rewards[B * args.group_size:].view(-1, args.guided_group_size)
    helped = [q for q, row in enumerate(problems) if "strategy" in row][:len(guided)]
    p_auto, p_guided = (groups >= 0.5).float().mean(1), torch.zeros(B)
    for k, q in enumerate(helped):
        first = B * args.group_size + k * args.guided_group_size
        correct[q] = [first + j for j in range(args.guided_group_size) if guided[k, j] >= 0.5]
        p_guided[q] = len(correct[q]) / args.guided_group_size
    if args.weight == "adaptive":
        alpha = adaptive_weight(p_guided, p_auto, args.alpha0, args.gamma, args.alpha_max)
    elif args.weight == "group_advantage":
        alpha = group_advantage_weight(groups, args.alpha_max)
    else:
        alpha = torch.full((B,), args.fixed_alpha)
    alpha = torch.where(torch.tensor([bool(C) for C in correct]), alpha, 0.0)
    metrics = {} if not helped else {
        "sgpo/alpha": alpha[helped].mean().item(), "sgpo/p_auto": p_auto[helped].mean().item(), "sgpo/p_guided": p_guided[helped].mean().item(),
        "sgpo/no_target_frac": sum(not correct[q] for q in helped) / len(helped)}
    return Guidance(prompts, correct, alpha), metrics


# ---------------------------------------------------------------- update


def update(model, optimizer, ro: Rollout, advantages: Tensor, guidance: Guidance, args: Args, watch: Watch) -> dict | None:
    """All optimizer steps of one rollout batch -> metrics; None if stopped before the first, with the weights untouched.

    Rows whose advantage is 0 are skipped: they add nothing to the gradient, but still count in the normaliser. So are problems
    whose alpha is 0. Every row is scored under `ro.prompts`, the prompt without the strategy.
    """
    N, device = len(advantages), model.device
    stats, done = defaultdict(float), 0
    lengths = ro.mask.sum(1).tolist()
    delta = float("inf") if args.distill == "sft" else args.delta  # -log pi is no KL: nothing to clip
    live = [i for i in range(N) if advantages[i] != 0]
    advantages = advantages.to(device)

    def logps_of(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        width = max(lengths[i] for i in batch)
        mask = ro.mask[batch, :width]
        with autocast(device):
            logps, entropy = completion_logps(model, [ro.prompts[i] for i in batch], ro.completions[batch, :width], mask, args.temperature)
        return logps, entropy, mask

    def distances_of(batch: list[int]) -> tuple[Tensor, Tensor]:
        """d_t [n, C] of Eq. 3, or -log pi for the SFT ablation: guided and unguided prompts differ in length, o+ aligns them."""
        width = max(lengths[i] for i in batch)
        mask, completions = ro.mask[batch, :width], ro.completions[batch, :width]
        if args.distill == "sft":
            return -logps_of(batch)[0], mask
        kl = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[args.distill]
        with autocast(device):
            with torch.no_grad():
                guided = completion_hidden(model, [guidance.prompts[i] for i in batch], completions, mask)
            plain = completion_hidden(model, [ro.prompts[i] for i in batch], completions, mask)
            d, = over_vocabulary(lambda *logits: (kl(*logits),), model, [guided, plain], temperature=args.temperature)
        return torch.zeros(mask.shape, device=device).masked_scatter(mask, d), mask

    def cut(rows: list[int]) -> list[list[int]]:
        sizes = [len(ro.prompts[i]) + lengths[i] for i in rows]
        batches = [[rows[k] for k in batch] for batch in microbatches(sizes, args.microbatch_tokens)]
        stats["tokens"] += sum(sizes)
        stats["padded"] += sum(len(b) * max(len(ro.prompts[i]) + lengths[i] for i in b) for b in batches)
        return batches

    old_logps = torch.zeros(ro.mask.shape, device=device)
    if args.updates_per_rollout > 1:  # later updates are off-policy: remember what the sampling policy said
        with torch.no_grad():
            for batch in cut(live):
                logps, _, mask = logps_of(batch)
                old_logps[batch, :mask.shape[1]] = logps

    model.train(args.activation_checkpointing)  # checkpointing works in train mode only; there is no dropout
    for share in torch.arange(N).view(args.prompts_per_step, -1).tensor_split(args.updates_per_rollout):
        rows = share.flatten().tolist()
        weights = torch.zeros(N, device=device)
        weights[rows] = token_weights(ro.mask[rows], args.loss_type, args.max_new_tokens)
        for batch in cut(sorted(set(rows) & set(live))):
            logps, entropy, mask = logps_of(batch)
            old = logps.detach() if args.updates_per_rollout == 1 else old_logps[batch, :mask.shape[1]]
            loss, clipped = policy_loss(logps, old, advantages[batch], mask, args.clip_low, args.clip_high)
            loss = (loss * weights[batch, None]).sum()
            loss.backward()
            stats["loss"] += loss.item()
            stats["entropy"] += entropy.sum().item()
            stats["clipped"] += clipped.sum().item()
            stats["scored"] += mask.sum().item()
            if watch.stopped and not done:
                optimizer.zero_grad()
                return None

        # Eq. 7: + alpha(q) L_KD(q), averaged over the problems of the update
        problems = (share[:, 0] // args.group_size).tolist()
        taught = {q: guidance.correct[q] for q in problems if guidance.alpha[q] > 0}
        if args.target == "reachable":
            sums = {}
            with torch.no_grad():
                for batch in cut([i for C in taught.values() if len(C) > 1 for i in C]):
                    sums |= zip(batch, logps_of(batch)[0].sum(1).tolist())
            taught = {q: [C[reachable_target(torch.tensor([sums[i] for i in C]))]] if len(C) > 1 else C for q, C in taught.items()}
        kd_weights = torch.zeros(len(ro.mask), device=device)
        for q, targets in taught.items():
            for i in targets:
                kd_weights[i] = guidance.alpha[q] / (len(problems) * len(targets) * lengths[i])
        for batch in cut([i for targets in taught.values() for i in targets]):
            d, mask = distances_of(batch)
            loss = (clip_kl(d, delta) * kd_weights[batch, None]).sum()
            loss.backward()
            stats["loss"] += loss.item()
            stats["kl"] += d.sum().item()
            stats["kl_clipped"] += (d > delta).sum().item()
            stats["kl_tokens"] += mask.sum().item()
            if watch.stopped and not done:
                optimizer.zero_grad()
                return None
        if any(p.grad is not None for p in model.parameters()):
            stats["grad_norm"] += torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    model.eval()
    metrics = {"loss": stats["loss"] / args.updates_per_rollout, "grad_norm": stats["grad_norm"] / max(done, 1), "updates": done,
               "clip_ratio": stats["clipped"] / max(stats["scored"], 1), "padding_frac": 1 - stats["tokens"] / max(stats["padded"], 1)}
    if stats["kl_tokens"]:
        metrics |= {"sgpo/kl": stats["kl"] / stats["kl_tokens"], "sgpo/kl_clipped_frac": stats["kl_clipped"] / stats["kl_tokens"]}
    if stats["scored"]:
        metrics["entropy"] = stats["entropy"] / stats["scored"]
    return metrics


# ---------------------------------------------------------------- evaluation

def evaluate(model, tokenizer, rows: list[dict], eos: list[int], reward, args: Args) -> dict:
    """Held-out accuracy: sampled, mean over --eval_samples; also with the strategy in the prompt, where every row has one."""
    metrics = {}
    ways = {"eval/accuracy": False, "eval/accuracy_guided": True} if all("strategy" in row for row in rows) else {"eval/accuracy": False}
    for name, guided in ways.items():
        seed_everything(args.seed, 2 ** 31)  # the same draws at every evaluation
        todo = [row for row in rows for _ in range(args.eval_samples)]
        correct = []
        for some in np.array_split(np.arange(len(todo)), -(-len(todo) // args.eval_batch_size)):
            batch = [todo[i] for i in some]
            prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt, row["strategy"] if guided else None) for row in batch]
            ro = rollout(model, tokenizer, prompts, eos, args, args.eval_temperature)
            correct += (score(reward, ro.texts, batch) >= 0.5).tolist()
        metrics[name] = float(np.mean(correct))
    return metrics


# ---------------------------------------------------------------- main

def main() -> None:
    args = parse_args(Args, demo_recipe)
    check_args(args)
    reward = load_reward(args.reward)
    run = Run(args)
    tokenizer = load_tokenizer(args.model)

    def encode(row: dict) -> list[list[int]]:
        """Every prompt that is made of a row: without the strategy and, where it has one, with it."""
        return [build_prompt(tokenizer, row["problem"], args.system_prompt, s) for s in (None, row.get("strategy")) if s or s is None]

    rows, eval_rows = load_problems(args)
    rows, longest = usable_rows(rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    if eval_rows:
        eval_rows, _ = usable_rows(eval_rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    helped = sum("strategy" in row for row in rows)
    if not helped and args.distill != "none":
        refuse(f"none of the {len(rows)} rows has a strategy: add a \"strategy\" field to the rows of --dataset (problem type, strategy, ordered "
               "steps; see README), or train without with --distill none")
    if helped < len(rows):
        print(f"{len(rows) - helped} of {len(rows)} rows have no strategy: they train by GRPO alone")
    check_context(args.model, longest, args.max_new_tokens)
    model = load_model(args.model, args.activation_checkpointing)
    eos = stop_ids(model, tokenizer)
    fast = rollout_copy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    finished = run.begin(model, optimizer)
    print(f"{len(rows)} problems, {args.prompts_per_step} a step x ({args.group_size} + {args.guided_group_size * (args.distill != 'none')} guided) "
          f"samples, {args.steps} steps -> {run.dir}")
    bar = tqdm(total=args.steps, initial=finished, desc="training", unit="step", disable=None)
    watch = Watch(bar)
    if eval_rows and not run.evaluations():
        sync_rollout_copy(fast, model)
        run.log("metrics", {"step": 0, **evaluate(fast, tokenizer, eval_rows, eos, reward, args)})

    while finished < args.steps and not watch.stopped:
        # ---- sample problems
        step, began = finished + 1, time.perf_counter()
        seed_everything(args.seed, step)
        problems = [rows[i] for i in batch_of_step(len(rows), step - 1, args.prompts_per_step, args.seed)]
        samples = [row for row in problems for _ in range(args.group_size)]  # N rows, a problem's side by side: [B, G] flattened
        n_auto = len(samples)
        if args.distill != "none":
            samples += [row for row in problems if "strategy" in row for _ in range(args.guided_group_size)]
        lr = args.lr * min(1.0, step / max(args.lr_warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- rollout
        sync_rollout_copy(fast, model)
        prompts = [encode(row)[i >= n_auto] for i, row in enumerate(samples)]
        ro = rollout(fast, tokenizer, prompts, eos, args, args.temperature, watch)
        if watch.stopped:
            break
        sampled = time.perf_counter()

        # ---- rewards and advantages
        rewards = score(reward, ro.texts, samples)
        groups = rewards[:n_auto].view(args.prompts_per_step, args.group_size)
        advantages = group_advantages(groups, args.scale_rewards).flatten() * args.autonomous_grpo
        guidance, guided_stats = guide(prompts, rewards, problems, args)
        ro = replace(ro, prompts=[encode(row)[0] for row in samples])  # from here on every row is scored without the strategy
        graded = time.perf_counter()

        # ---- update
        stats = update(model, optimizer, ro, advantages, guidance, args, watch)
        if stats is None:
            break
        finished = step

        # ---- log and save
        now, lengths = time.perf_counter(), ro.mask.sum(1).float()
        metrics = {"step": step, "reward": groups.mean().item(), "reward_std": groups.std(1).mean().item(),
                   "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
                   "completions/mean_length": lengths[:n_auto].mean().item(),
                   "completions/clipped_ratio": ro.truncated[:n_auto].float().mean().item(), **stats, **guided_stats,
                   "lr": lr, "time/rollout_s": sampled - began, "time/grade_s": graded - sampled, "time/train_s": now - graded,
                   "tokens_per_s": lengths.sum().item() / (now - began), "peak_memory_gb": peak_memory_gb(),
                   **{f"grader/{outcome}": count for outcome, count in grader_counts().items()}}
        if eval_rows and (step == args.steps or args.eval_every and step % args.eval_every == 0):
            sync_rollout_copy(fast, model)
            metrics |= evaluate(fast, tokenizer, eval_rows, eos, reward, args)
        run.log("samples", *[{"step": step, "id": row["id"], "reward": r, "guided": i >= n_auto, "completion": text}
                             for i, (row, r, text) in enumerate(zip(samples, rewards.tolist(), ro.texts))])
        run.log("metrics", metrics)
        if args.save_every and step % args.save_every == 0:
            run.save_checkpoint(step, model, optimizer)
        if step == 1 or "eval/accuracy" in metrics:
            bar.write(f"step {step}, reward {rewards[0]:g}: {printable(ro.texts[0])[:2000]}")
        if ro.truncated.all():
            bar.write(f"step {step}: every completion ran into --max_new_tokens {args.max_new_tokens}; nothing can be learnt from that, raise it")
        bar.set_description(f"reward {metrics['reward']:.2f}")
        bar.update()
    bar.close()

    run.save_checkpoint(finished, model, optimizer)
    if finished < args.steps:
        print(f"stopped after step {finished} of {args.steps}; go on with --resume --out {run.dir}")
        raise SystemExit(130)
    final = run.save_model(model, tokenizer)
    if evals := run.evaluations():
        names = {"eval/accuracy": "alone", "eval/accuracy_guided": "with the strategy"}
        say_table([["held-out accuracy", "before", "after"],
                   *[[names[k], f"{evals[0][k]:.3f}", f"{evals[-1][k]:.3f}"] for k in names if k in evals[0]]])
    print(f"model: {final}\nmetrics, samples, checkpoints: {run.dir}")


if __name__ == "__main__":
    main()
