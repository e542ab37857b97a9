"""GRPO, SGPO and TGPO as their papers write them: in float64, one problem, sample and token at a time.

Nothing here is shared with the scripts, except that `args` has the names of their flags. The functions that
end in `_loss` return the loss of one whole update. `loss_and_gradient` differentiates it on a float64 copy of
the model, through the full logits of every sequence alone.
"""
import copy
import statistics
from dataclasses import dataclass, field
from typing import Iterator

import torch
from torch import Tensor


@dataclass
class Problem:
    prompt: list[int]                    # q
    completions: list[list[int]]         # o_i ~ pi(. | q), each with its end token
    rewards: list[float]                 # R(o_i)
    guided_prompt: list[int] = field(default_factory=list)             # q and its strategy s
    guided_completions: list[list[int]] = field(default_factory=list)  # g_j ~ pi(. | q, s)
    guided_rewards: list[float] = field(default_factory=list)          # R(g_j)


@dataclass
class Teacher:
    model: torch.nn.Module
    num_shared: int                      # ids below mean the same to student and teacher
    student_end: int
    teacher_end: int
    other_ends: list[int]


def loss_and_gradient(method_loss, model, old_model, *inputs) -> tuple[float, Tensor]:
    """Return the loss of an update and its gradient as one vector; old_model sampled the completions."""
    model = copy.deepcopy(model).double()
    old_model = copy.deepcopy(old_model).double()
    loss = method_loss(model, old_model, *inputs)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    gradient = torch.cat([part.flatten() for part in parts])
    return loss.item(), gradient


def logits_of(model, prompt: list[int], completion: list[int], args) -> Tensor:
    """Return the logits that predict the tokens of the completion, [T, V]: those at the position before."""
    ids = torch.tensor([prompt + completion])
    logits = model(ids).logits[0]
    first = len(prompt) - 1
    return logits[first:-1] / args.temperature


def log_probs(model, prompt: list[int], completion: list[int], args) -> Tensor:
    """Return log pi(. | prompt, completion_<t) for every t, [T, V]."""
    return logits_of(model, prompt, completion, args).log_softmax(-1)


# ---------------------------------------------------------------- GRPO (SGPO's Eq. 1)

def advantages(problems: list[Problem], scale: str) -> list[list[float]]:
    """Return A_i = (R_i - mean) / (std + 1e-6) for every problem of a step; std has ddof = 1."""
    rewards_of_step = [reward for problem in problems for reward in problem.rewards]
    result = []
    for problem in problems:
        mean = statistics.mean(problem.rewards)
        divisor = 1.0
        if scale == "group":
            divisor = statistics.stdev(problem.rewards) + 1e-6
        if scale == "batch":
            divisor = statistics.stdev(rewards_of_step) + 1e-6
        A = [(reward - mean) / divisor for reward in problem.rewards]
        result.append(A)
    return result


def samples_of(problems: list[Problem], A: list[list[float]]) -> Iterator[tuple]:
    """Yield the prompt, the completion and the advantage of every sample."""
    for problem, A_of_group in zip(problems, A):
        for completion, A_i in zip(problem.completions, A_of_group):
            yield problem.prompt, completion, A_i


def clipped_loss(log_ratio: Tensor, A: float, args) -> Tensor:
    """Return -min(rho A, clip(rho, 1 - low, 1 + high) A) of one token."""
    rho = log_ratio.exp()
    clipped_rho = rho.clamp(1 - args.clip_low, 1 + args.clip_high)
    return -torch.minimum(rho * A, clipped_rho * A)


def mean_loss(losses: list[list[Tensor]], args) -> Tensor:
    """Return the loss of the update from the losses of every sample's tokens."""
    sums = [sum(tokens) for tokens in losses]
    lengths = [len(tokens) for tokens in losses]
    if args.loss_type == "dapo":
        return sum(sums) / sum(lengths)
    if args.loss_type == "grpo":
        means = [total / max(n, 1) for total, n in zip(sums, lengths)]
        return sum(means) / len(means)
    return sum(sums) / (len(sums) * args.max_new_tokens)


def grpo_loss(model, old_model, problems: list[Problem], A: list[list[float]], args) -> Tensor:
    losses = []
    for prompt, completion, A_i in samples_of(problems, A):
        new = log_probs(model, prompt, completion, args)
        old = log_probs(old_model, prompt, completion, args).detach()
        tokens = []
        for t, a in enumerate(completion):
            log_ratio = new[t, a] - old[t, a]
            tokens.append(clipped_loss(log_ratio, A_i, args))
        losses.append(tokens)
    return mean_loss(losses, args)


# ---------------------------------------------------------------- SGPO

def sum_logp(model, prompt: list[int], completion: list[int], args) -> float:
    logps = log_probs(model, prompt, completion, args)
    return sum(logps[t, a].item() for t, a in enumerate(completion))


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def distillation_loss(model, problem: Problem, target: list[int], args) -> Tensor:
    """Return L_KD of one target (Eq. 3 and 5)."""
    unguided = log_probs(model, problem.prompt, target, args)
    guided = log_probs(model, problem.guided_prompt, target, args).detach()
    total = 0 * unguided.sum()
    for t, a in enumerate(target):
        if args.distill == "sft":
            total = total - unguided[t, a]
            continue
        if args.distill == "forward_kl":
            d = kl(guided[t], unguided[t])
        else:
            d = kl(unguided[t], guided[t])
        if d <= args.delta:
            total = total + d
    return total / len(target)


def alpha(problem: Problem, num_correct: int, args) -> float:
    """Return the weight of a problem's distillation (Eq. 6), or that of an ablation."""
    if args.weight == "fixed":
        return args.fixed_alpha
    if args.weight == "group_advantage":
        rewards = [*problem.rewards, 1.0]  # and the target's
        std = statistics.stdev(rewards) + 1e-6
        weight = (1.0 - statistics.mean(rewards)) / std
    else:
        p_auto = sum(problem.rewards) / len(problem.rewards)
        p_guided = num_correct / len(problem.guided_rewards)
        gain = p_guided - p_auto + args.gamma
        weight = args.alpha0 * gain / (p_auto + args.gamma)
    return min(max(weight, 0.0), args.alpha_max)


def sgpo_loss(model, old_model, problems: list[Problem], A: list[list[float]], args) -> Tensor:
    loss = grpo_loss(model, old_model, problems, A, args)
    loss = loss * float(args.autonomous_grpo)
    for problem in problems:
        guided = zip(problem.guided_completions, problem.guided_rewards)
        correct = [g for g, reward in guided if reward == 1]                       # the set C
        if not correct:
            continue
        scores = [sum_logp(model, problem.prompt, g, args) for g in correct]
        targets = [correct[scores.index(max(scores))]]                             # Eq. 4
        if args.target == "all":
            targets = correct                                                      # Eq. 2
        weight = alpha(problem, len(correct), args)
        for target in targets:
            mean = distillation_loss(model, problem, target, args) / len(targets)
            loss = loss + weight * mean / len(problems)                            # Eq. 7
    return loss


# ---------------------------------------------------------------- TGPO and the methods it is compared with

def teacher_logits_of(teacher: Teacher, prompt: list[int], completion: list[int], args) -> Tensor:
    """Return the teacher's logits with its end token in the place of the student's, [T, V]."""
    vocabulary = teacher.model.config.vocab_size
    known = [a if a < vocabulary else 0 for a in completion]
    logits = logits_of(teacher.model, prompt, known, args).detach()
    order = list(range(vocabulary))
    order[teacher.student_end] = teacher.teacher_end
    order[teacher.teacher_end] = teacher.student_end
    return logits[:, order]


def label_of(teacher: Teacher, logits: Tensor) -> int:
    """Return y* = argmax_v pi_T(v | s) as the student's token."""
    y = int(logits.argmax())
    return teacher.student_end if y in teacher.other_ends else y


@dataclass
class Token:
    """A sampled token a with the log-distributions over the shared ids: q, q_old and the teacher's p."""
    a: int
    y: int                               # the teacher's label
    q: Tensor
    q_old: Tensor
    p: Tensor

    @property
    def is_known(self) -> bool:
        return self.a < len(self.p)

    @property
    def has_label(self) -> bool:
        return 0 <= self.y < len(self.p)


def bonus(token: Token, guidance: str) -> float:
    """Return what the guidance adds to the token's advantage, without its coefficient."""
    if guidance == "rkl" and token.is_known:
        return token.p[token.a] - token.q_old[token.a]
    is_label = token.y == token.a or guidance == "tgpo-adv"
    if guidance in ("tgpo-adv", "tgpo-adv-matched") and token.has_label and is_label:
        return token.q_old[token.y].exp()
    return 0.0


def guide_losses(token: Token, guidance: str, topk: int | None) -> list[Tensor]:
    """Return the guidance's loss of a token, without its coefficient; nothing if the mean leaves it out."""
    q, p = token.q, token.p
    top = p.topk(topk or len(p)).indices
    p_top = p[top].log_softmax(-1)
    if guidance in ("tgpo", "tgpo-sampled") and token.has_label:
        return [-q[token.y]]
    if guidance == "tgpo-topk":
        return [kl(p_top, q[top])]
    if guidance == "kdrl" and token.is_known:
        return [(p[token.a] - q[token.a]) ** 2 / 2]
    if guidance == "reverse-kl":
        return [kl(q[top].log_softmax(-1), p_top)]
    return []


def tgpo_loss(model, old_model, problems: list[Problem], A: list[list[float]], args, teacher: Teacher,
              coef: float, drawn_labels: dict | None = None) -> Tensor:
    """Return the loss of an update by --guidance; drawn_labels: completion -> labels of tgpo-sampled."""
    policy = []
    guide = []
    for prompt, completion, A_i in samples_of(problems, A):
        new = logits_of(model, prompt, completion, args)
        old = logits_of(old_model, prompt, completion, args).detach()
        their = teacher_logits_of(teacher, prompt, completion, args)
        labels = [label_of(teacher, logits) for logits in their]
        if drawn_labels:
            labels = drawn_labels[tuple(completion)]
        q, q_old, p = (logits[:, :teacher.num_shared].log_softmax(-1) for logits in (new, old, their))
        new = new.log_softmax(-1)
        old = old.log_softmax(-1)
        policy.append([])
        guide.append([])
        for t, a in enumerate(completion):
            token = Token(a, labels[t], q[t], q_old[t], p[t])
            A_t = args.reward_weight * A_i + coef * bonus(token, args.guidance)
            entropy = -(new[t].exp() * new[t]).sum()
            loss = clipped_loss(new[t, a] - old[t, a], A_t, args)
            policy[-1].append(loss - args.entropy_bonus * entropy)
            guide[-1] += guide_losses(token, args.guidance, args.topk)
    loss = mean_loss(policy, args)
    if any(guide):
        loss = loss + coef * mean_loss(guide, args)
    return loss
