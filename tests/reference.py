"""GRPO, SGPO and TGPO as their papers write them: in float64, one problem, one sample and one token at a time.

Nothing here is shared with the scripts, except that `args` has the names of their flags. The functions that
end in `_loss` return the loss of one whole update. `loss_and_gradient` differentiates it on a float64 copy of
the model, through the full logits of every sequence alone.
"""
import copy
import statistics
from dataclasses import dataclass, field

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
    student_end: int = 0
    teacher_end: int = 0
    other_ends: list[int] = field(default_factory=list)


def loss_and_gradient(method_loss, model, old_model, *inputs) -> tuple[float, Tensor]:
    """Return the loss of an update and its gradient as one vector; old_model sampled the completions."""
    model = copy.deepcopy(model).double()
    old_model = copy.deepcopy(old_model).double()
    loss = method_loss(model, old_model, *inputs)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def logits_of(model, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """Return the logits that predict the tokens of the completion, [T, V]: those at the position before."""
    logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1:-1].double() / temperature


def log_probs(model, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """Return log pi(. | prompt, completion_<t) for every t, [T, V]."""
    return logits_of(model, prompt, completion, temperature).log_softmax(-1)


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
        result.append([(reward - mean) / divisor for reward in problem.rewards])
    return result


def clipped_loss(log_ratio: Tensor, A: float, args) -> Tensor:
    """Return -min(rho A, clip(rho, 1 - low, 1 + high) A) of one token."""
    rho = log_ratio.exp()
    clipped_rho = rho.clamp(1 - args.clip_low, 1 + args.clip_high)
    return -torch.minimum(rho * A, clipped_rho * A)


def mean_loss(losses: list[list[Tensor]], args) -> Tensor:
    """Return the loss of the update from the losses of every sample's tokens."""
    sums = [sum(tokens) for tokens in losses]
    lengths = [len(tokens) for tokens in losses]
    if args.loss_type == "grpo":
        means = [total / max(length, 1) for total, length in zip(sums, lengths)]
        return sum(means) / len(losses)
    if args.loss_type == "dapo":
        return sum(sums) / sum(lengths)
    return sum(sums) / (len(losses) * args.max_new_tokens)


def grpo_loss(model, old_model, problems: list[Problem], A: list[list[float]], args) -> Tensor:
    losses = []
    for problem, A_of_group in zip(problems, A):
        for completion, A_i in zip(problem.completions, A_of_group):
            new = log_probs(model, problem.prompt, completion, args.temperature)
            old = log_probs(old_model, problem.prompt, completion, args.temperature).detach()
            tokens = []
            for t, a in enumerate(completion):
                tokens.append(clipped_loss(new[t, a] - old[t, a], A_i, args))
            losses.append(tokens)
    return mean_loss(losses, args)


# ---------------------------------------------------------------- SGPO

def sum_logp(model, prompt: list[int], completion: list[int], temperature: float) -> float:
    logps = log_probs(model, prompt, completion, temperature)
    return sum(logps[t, a].item() for t, a in enumerate(completion))


def distillation_loss(model, problem: Problem, target: list[int], args) -> Tensor:
    """Return L_KD of one target (Eq. 3 and 5)."""
    unguided = log_probs(model, problem.prompt, target, args.temperature)
    guided = log_probs(model, problem.guided_prompt, target, args.temperature).detach()
    total = unguided.sum() * 0
    for t, a in enumerate(target):
        if args.distill == "sft":
            total = total - unguided[t, a]
            continue
        p, q = guided[t], unguided[t]
        if args.distill == "reverse_kl":
            p, q = q, p
        d = (p.exp() * (p - q)).sum()
        if d <= args.delta:
            total = total + d
    return total / len(target)


def alpha(problem: Problem, num_correct: int, args) -> float:
    """Return the weight of a problem's distillation (Eq. 6), or that of an ablation."""
    rewards = problem.rewards
    if args.weight == "fixed":
        return args.fixed_alpha
    if args.weight == "group_advantage":
        with_target = [*rewards, 1.0]
        weight = (1.0 - statistics.mean(with_target)) / (statistics.stdev(with_target) + 1e-6)
    else:
        p_auto = sum(reward >= 0.5 for reward in rewards) / len(rewards)
        p_guided = num_correct / len(problem.guided_rewards)
        weight = args.alpha0 * (p_guided - p_auto + args.gamma) / (p_auto + args.gamma)
    return min(max(weight, 0.0), args.alpha_max)


def sgpo_loss(model, old_model, problems: list[Problem], A: list[list[float]], args) -> Tensor:
    loss = grpo_loss(model, old_model, problems, A, args) * float(args.autonomous_grpo)
    for problem in problems:
        guided = zip(problem.guided_completions, problem.guided_rewards)
        targets = [g for g, reward in guided if reward >= 0.5]                     # the set C
        if not targets or args.distill == "none":
            continue
        weight = alpha(problem, len(targets), args)
        if args.target == "reachable":                                             # Eq. 4
            targets = [max(targets, key=lambda g: sum_logp(model, problem.prompt, g, args.temperature))]
        for target in targets:                                                     # Eq. 2 if there are more
            mean = distillation_loss(model, problem, target, args) / len(targets)
            loss = loss + weight * mean / len(problems)                            # Eq. 7
    return loss


# ---------------------------------------------------------------- TGPO and the methods it is compared with

def teacher_logits_of(teacher: Teacher, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """Return the teacher's logits with its end token in the place of the student's, [T, V]."""
    vocabulary = teacher.model.config.vocab_size
    read = [a if a < vocabulary else 0 for a in completion]  # it has no such token
    with torch.no_grad():
        logits = logits_of(teacher.model, prompt, read, temperature)
    order = list(range(vocabulary))
    order[teacher.student_end] = teacher.teacher_end
    order[teacher.teacher_end] = teacher.student_end
    return logits[:, order]


def label_of(teacher: Teacher, logits: Tensor) -> int:
    """Return y* = argmax_v pi_T(v | s) as the student's token."""
    y = int(logits.argmax())
    return teacher.student_end if y in teacher.other_ends else y


def advantage(guidance: str, A: float, coef: float, a: int, y: int | None, old: Tensor,
              p: Tensor | None) -> float:
    """Return the advantage of a token a; y is None if the student lacks the label, p if the teacher lacks a."""
    if guidance == "tgpo-adv" and y is not None:
        return A + coef * old[y].exp()
    if guidance == "tgpo-adv-matched" and y == a:
        return A + coef * old[y].exp()
    if guidance == "rkl" and p is not None:
        return A + coef * (p[a] - old[a])
    return A


def guide_losses(guidance: str, a: int, y: int | None, q: Tensor, p: Tensor, is_known: bool,
                 topk: int | None) -> list[Tensor]:
    """Return the guidance's loss of one token, or nothing if the token is left out of the mean.

    q and p are the student's and the teacher's log-distributions over the shared ids.
    """
    k = topk or len(p)
    top = p.topk(k).indices
    p_top = p[top].log_softmax(-1)
    if guidance in ("tgpo", "tgpo-sampled"):
        return [] if y is None else [-q[y]]
    if guidance == "tgpo-topk":
        return [(p_top.exp() * (p_top - q[top])).sum()]
    if guidance == "kdrl":
        return [(p[a] - q[a]) ** 2 / 2] if is_known else []
    if guidance == "reverse-kl":
        q_top = q[top].log_softmax(-1)
        return [(q_top.exp() * (q_top - p_top)).sum()]
    return []


def tgpo_loss(model, old_model, problems: list[Problem], A: list[list[float]], args, teacher: Teacher,
              coef: float, drawn_labels: dict | None = None) -> Tensor:
    """Return the loss of an update by --guidance; drawn_labels: completion -> labels of tgpo-sampled."""
    policy = []
    guide = []
    shared = teacher.num_shared
    for problem, A_of_group in zip(problems, A):
        for completion, A_i in zip(problem.completions, A_of_group):
            new_logits = logits_of(model, problem.prompt, completion, args.temperature)
            old_logits = logits_of(old_model, problem.prompt, completion, args.temperature).detach()
            their_logits = teacher_logits_of(teacher, problem.prompt, completion, args.temperature)
            policy.append([])
            guide.append([])
            for t, a in enumerate(completion):
                new = new_logits[t].log_softmax(-1)
                old = old_logits[t].log_softmax(-1)
                q = new_logits[t, :shared].log_softmax(-1)
                q_old = old_logits[t, :shared].log_softmax(-1)
                p = their_logits[t, :shared].log_softmax(-1)
                y = label_of(teacher, their_logits[t])
                if drawn_labels:
                    y = drawn_labels[tuple(completion)][t]
                y = y if 0 <= y < shared else None
                is_known = a < shared
                A_t = advantage(args.guidance, args.reward_weight * A_i, coef, a, y, q_old,
                                p if is_known else None)
                entropy = -(new.exp() * new).sum()
                loss = clipped_loss(new[a] - old[a], A_t, args)
                policy[-1].append(loss - args.entropy_bonus * entropy)
                guide[-1] += guide_losses(args.guidance, a, y, q, p, is_known, args.topk)
    loss = mean_loss(policy, args)
    if any(guide):
        loss = loss + coef * mean_loss(guide, args)
    return loss
