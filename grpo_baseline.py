"""GRPO (Group Relative Policy Optimization): the baseline that sgpo.py and tgpo.py are measured against.

For every problem the model writes a group of solutions; a verifier gives each a reward; a solution's
advantage is how much better it did than its group; tokens of better solutions are made likelier by a clipped
policy gradient. No value network, no KL to a reference model.

    python grpo_baseline.py                                        # the built-in demo: CPU, offline, minutes
    python grpo_baseline.py --model Qwen/Qwen2.5-1.5B-Instruct     # real problems

Papers: DeepSeekMath (arXiv 2402.03300); unequal clipping bounds and loss_type dapo: DAPO (2503.14476);
dr_grpo: 2503.20783.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common import (
    Run, RunFlags, Sums, all_shares, batch_of_step, build_prompt, complete, completion_logps, flag,
    held_out_accuracy, load_policy, load_problems, load_reward, load_tokenizer, microbatches, my_share,
    optimizer_step, parse_args, program, refuse, sft_warmup, total, warmup_split)

# Letters: B problems of a step (b of them this process's), G samples per problem, N rows (problems x samples;
# n some of them), C tokens of the longest completion, m tokens of a chunk, V vocabulary. q: a problem, i: a
# row.


# ---------------------------------------------------------------- flags

@dataclass
class Args(RunFlags):
    """algorithm"""
    # rollouts
    steps: int = flag(400, "training steps, one rollout batch each; 0: the SFT baseline", "[0, inf)")
    prompts_per_step: int = flag(16, "problems per step", "[1, inf)")
    group_size: int = flag(12, "samples per problem; equals SGPO's 8 + 4", "[2, inf)")
    max_new_tokens: int = flag(2048, "longest completion, in tokens", "[1, inf)")
    temperature: float = flag(1.0, "sampling temperature; also divides the logits of the loss", "(0, inf)")
    top_p: float = flag(0.95, "nucleus sampling", "(0, 1]")
    # objective
    clip_low: float = flag(0.2, "ratio clipped below 1 - clip_low", "[0, inf]")
    clip_high: float = flag(0.28, "ratio clipped above 1 + clip_high", "[0, inf]")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag("grpo", "mean over rows, tokens, or token limits")
    scale_rewards: Literal["group", "batch", "none"] = flag("group", "whose std divides the rewards")
    # update
    lr: float = flag(1e-6, "AdamW learning rate", "[0, inf)")
    lr_schedule: Literal["constant", "linear", "cosine"] = flag("constant", "how it falls after its warm-up")
    lr_warmup_steps: int = flag(0, "steps of linear learning rate warm-up", "[0, inf)")
    weight_decay: float = flag(0.01, "AdamW weight decay", "[0, inf)")
    max_grad_norm: float = flag(1.0, "gradient norm clipped to this", "(0, inf)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout, each on its share", "[1, inf)")


def check_args(args: Args) -> None:
    """Checks that involve more than one flag."""
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


# ---------------------------------------------------------------- update

def score_rows(model, ro: Rollout, batch: list[int], args: Args) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy [n, C] of some rows, in bf16 on a GPU; fp32 from the logits on."""
    with torch.autocast(ro.mask.device.type, torch.bfloat16, enabled=args.bf16):
        return completion_logps(model, *ro.rows(batch), args.temperature)


def update(model, optimizer, ro: Rollout, advantages: Tensor, args: Args) -> dict[str, float]:
    """All optimizer steps of one rollout batch, whose rows have these advantages [N] -> metrics.

    Rows whose advantage is 0 are skipped. They contribute no gradient but still count in the normaliser.
    """
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
        n_rows, n_tokens = total(len(rows), ro.mask[rows].sum())
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
        norms.append(optimizer_step(model, optimizer, args.max_grad_norm))
    model.eval()
    sums = sums.of_all()
    metrics = sums.metrics(norms)
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
    run.plan(train, warmup, str(args.group_size))
    if args.dry_run:
        return
    model = load_policy(args)
    run.create()
    sft_warmup(model, tokenizer, warmup, run, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)

    def prompt(row: dict) -> list[int]:
        return build_prompt(tokenizer, row["problem"], args.system_prompt)

    def evaluate() -> dict[str, float]:
        return held_out_accuracy(model, tokenizer, held_out, reward, args)

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
        metrics = update(model, optimizer, ro, advantages, args)

        # ---- log and save
        run.log(step, rows, ro, rewards, metrics)
        run.evaluate_and_save()
    run.finish()


if __name__ == "__main__":
    main()
