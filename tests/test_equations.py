"""Every equation against an independent float64 NumPy reference written from the paper; gradients against finite differences of it."""
import math

import numpy as np
import pytest
import torch

import grpo_baseline
import sgpo

SCRIPTS = [grpo_baseline, sgpo]
rng = np.random.default_rng(0)


def numeric_grad(f, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        grad[i] = (f(up) - f(down)) / (2 * h)
    return grad


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- Eq. 1: advantages

def reference_advantages(groups, scale, eps=1e-6):
    flat = [r for group in groups for r in group]
    out = []
    for group in groups:
        mean = sum(group) / len(group)
        values = {"group": group, "batch": flat, "none": None}[scale]
        std = 1.0
        if values is not None:
            m = sum(values) / len(values)
            std = math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1)) + eps
        out.append([0.0 if len(set(group)) == 1 else (r - mean) / std for r in group])
    return np.array(out)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    groups = [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0.25, 0.5, 0.75, 0.1]]
    ours = grpo_baseline.group_advantages(torch.tensor(groups, dtype=torch.float64), scale)
    np.testing.assert_allclose(ours, reference_advantages(groups, scale), atol=1e-12)
    if scale == "group":
        np.testing.assert_allclose(ours[0].mean(), 0, atol=1e-12)
        np.testing.assert_allclose(ours[0].std(), 1, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_constant_group_is_exactly_zero(scale):
    rewards = torch.tensor([[0.1] * 7, [0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1]])  # in fp32 the mean of seven 0.1 is not 0.1
    assert (rewards[0] - rewards[0].mean()).abs().max() > 0
    assert (grpo_baseline.group_advantages(rewards, scale)[0] == 0).all()
    assert (grpo_baseline.group_advantages(rewards, scale)[1] != 0).all()


def test_inputs_are_not_changed():
    rewards = torch.rand(3, 4)
    before = rewards.clone()
    flat = rewards.view(-1)
    grpo_baseline.group_advantages(rewards)
    sgpo.group_advantage_weight(rewards, 0.8)
    assert torch.equal(rewards, before) and torch.equal(flat, before.view(-1))


# ---- Eq. 1: clipped objective and its means

def reference_grpo(logps, old, A, lengths, loss_type, low, high, max_new):
    """The loss by loops, one sample and token at a time."""
    terms = []
    for i, n in enumerate(lengths):
        row = []
        for t in range(n):
            rho = math.exp(logps[i][t] - old[i][t])
            row.append(-min(rho * A[i], min(max(rho, 1 - low), 1 + high) * A[i]))
        terms.append(row)
    if loss_type == "grpo":
        return sum(sum(row) / len(row) for row in terms) / len(terms)
    if loss_type == "dapo":
        return sum(map(sum, terms)) / sum(map(len, terms))
    return sum(map(sum, terms)) / (len(terms) * max_new)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_policy_loss(loss_type):
    lengths, C = [3, 5, 1, 4], 5
    logps, old = rng.normal(-1, 0.4, (4, C)), rng.normal(-1, 0.4, (4, C))
    A = np.array([1.2, -0.7, 0.0, -1.5])
    mask = torch.arange(C) < torch.tensor(lengths)[:, None]
    x = torch.tensor(logps, requires_grad=True)

    def reference(z):
        return reference_grpo(z, old, A, lengths, loss_type, 0.2, 0.28, 7)

    per_token, clipped = grpo_baseline.policy_loss(x, torch.tensor(old), torch.tensor(A), mask, 0.2, 0.28)
    loss = (per_token * grpo_baseline.token_weights(mask, loss_type, 7)[:, None].double()).sum()
    assert abs(loss.item() - reference(logps)) < 1e-6
    loss.backward()
    np.testing.assert_allclose(x.grad, numeric_grad(reference, logps), atol=1e-6)
    ratios = np.exp(logps - old)
    by_hand = sum(ratios[i, t] > 1.28 and A[i] > 0 or ratios[i, t] < 0.8 and A[i] < 0 for i, n in enumerate(lengths) for t in range(n))
    assert by_hand > 0 and clipped.sum() == by_hand


def test_masked_overflow_leaves_the_gradient_finite():
    logps = torch.tensor([[-1.0, 900.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss, _ = grpo_baseline.policy_loss(logps, torch.zeros(1, 2), torch.tensor([1.0]), mask, 0.2, 0.28)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logps.grad).all() and logps.grad[0, 1] == 0


def test_fully_masked_row_is_no_division_by_zero():
    mask = torch.tensor([[False, False], [True, True]])
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        assert torch.isfinite(grpo_baseline.token_weights(mask, loss_type, 4)).all()
    assert torch.isfinite(grpo_baseline.token_weights(mask[:1], "dapo", 4)).all()


# ---- Eq. 3 and 5: per-token KL and its clipping

TEACHER, STUDENT = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]]), np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])


@pytest.mark.parametrize("kl", ["forward_kl", "reverse_kl"])
def test_kl_closed_form_direction_and_gradient(kl):
    def reference(student):
        p, q = softmax(TEACHER), softmax(student)
        a, b = (p, q) if kl == "forward_kl" else (q, p)
        return (a * (np.log(a) - np.log(b))).sum(-1)

    teacher, student = torch.tensor(TEACHER, requires_grad=True), torch.tensor(STUDENT, requires_grad=True)
    d = getattr(sgpo, kl)(teacher, student)
    np.testing.assert_allclose(d.detach(), reference(STUDENT), atol=1e-12)
    assert d[1].item() == pytest.approx(0, abs=1e-12)  # equal rows
    forward, backward = (sgpo.forward_kl(teacher, student)[0], sgpo.reverse_kl(teacher, student)[0])
    assert abs((forward - backward).item()) > 0.05  # the example tells the directions apart
    d.sum().backward()
    assert teacher.grad is None  # stop-gradient
    np.testing.assert_allclose(student.grad, numeric_grad(lambda s: reference(s).sum(), STUDENT), atol=1e-6)
    if kl == "forward_kl":  # d KL(p || softmax z) / dz = q - p
        np.testing.assert_allclose(student.grad, softmax(STUDENT) - softmax(TEACHER), atol=1e-12)


def test_clip_kl_masks_and_does_not_cap():
    d = torch.tensor([0.2, 1.0, 1.0001, 7.0], requires_grad=True)
    clipped = sgpo.clip_kl(d, 1.0)
    assert clipped.tolist() == pytest.approx([0.2, 1.0, 0.0, 0.0])
    clipped.sum().backward()
    assert d.grad.tolist() == [1, 1, 0, 0]
    assert torch.equal(sgpo.clip_kl(d, math.inf), d)


# ---- Eq. 4: target

def test_reachable_target_is_the_argmax_of_the_sum_not_of_the_mean():
    sums = torch.tensor([-4.0, -3.0, -9.0])
    lengths = torch.tensor([4.0, 2.0, 12.0])
    assert sgpo.reachable_target(sums) == 1 and (sums / lengths).argmax() == 2


# ---- Eq. 6: weight

@pytest.mark.parametrize("p_guided, p_auto, alpha", [
    (1.0, 0.0, 0.8),              # 0.5 x 1.1 / 0.1 = 5.5, bounded
    (0.5, 0.5, 0.5 * 0.1 / 0.6),  # no help beyond gamma
    (0.75, 0.5, 0.5 * 0.35 / 0.6),
    (0.25, 1.0, 0.0),             # harmful: 0.5 x -0.65 / 1.1 < 0
    (1.0, 1.0, 0.5 * 0.1 / 1.1),
    (0.5, 0.6, 0.0),
])
def test_adaptive_weight(p_guided, p_auto, alpha):
    ours = sgpo.adaptive_weight(torch.tensor([p_guided], dtype=torch.float64), torch.tensor([p_auto], dtype=torch.float64), 0.5, 0.1, 0.8)
    assert ours.item() == pytest.approx(alpha, abs=1e-12)


@pytest.mark.parametrize("rewards, alpha", [
    ([0, 0, 0, 0, 0, 0, 0, 0], 0.8),   # (1 - 1/9) / std = 2.67, bounded
    ([1, 1, 1, 1, 1, 1, 1, 1], 0.0),   # nothing to learn
    ([1, 1, 1, 1, 1, 1, 1, 0], None),
])
def test_group_advantage_weight(rewards, alpha):
    nine = np.array([*rewards, 1], dtype=float)
    if alpha is None:
        alpha = (1 - nine.mean()) / (nine.std(ddof=1) + 1e-6)
    assert sgpo.group_advantage_weight(torch.tensor([rewards], dtype=torch.float64), 0.8).item() == pytest.approx(alpha, abs=1e-9)


def test_guide_builds_candidates_and_weights():
    """Eq. 6 and the candidate sets on two problems, one without a strategy between them."""
    args = sgpo.Args(group_size=4, guided_group_size=2)
    problems = [{"strategy": "s"}, {}, {"strategy": "s"}, {"strategy": "s"}]
    auto = [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]
    guided = [[1, 1], [0, 0], [0, 1]]
    rewards = torch.tensor([r for g in auto for r in g] + [r for g in guided for r in g], dtype=torch.float32)
    guidance, metrics = sgpo.guide([[0]] * 22, rewards, problems, args)
    assert guidance.correct == [[16, 17], [], [], [21]]
    by_hand = [min(0.5 * (1 - 0.25 + 0.1) / 0.35, 0.8), 0, 0, 0]  # third: C is empty; last: 0.5 (0.5 - 0.75 + 0.1) < 0
    np.testing.assert_allclose(guidance.alpha, by_hand, atol=1e-6)
    assert metrics["sgpo/alpha"] == pytest.approx(0.8 / 3) and metrics["sgpo/p_auto"] == pytest.approx((0.25 + 0 + 0.75) / 3)
    assert metrics["sgpo/p_guided"] == pytest.approx(0.5) and metrics["sgpo/no_target_frac"] == pytest.approx(1 / 3)
    fixed, _ = sgpo.guide([[0]] * 22, rewards, problems, sgpo.Args(group_size=4, guided_group_size=2, weight="fixed"))
    assert fixed.alpha.tolist() == [1, 0, 0, 1]
