"""Every equation and its gradient against a float64 reference written from the papers."""
import copy
import math

import numpy as np
import pytest
import torch

import grpo_baseline
import sgpo
import tgpo

in_every_script = pytest.mark.parametrize("script", [grpo_baseline, sgpo, tgpo])  # a copy in each


def float64(x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def numeric_grad(f, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    steps = h * np.eye(x.size).reshape(-1, *x.shape)
    return np.array([(f(x + step) - f(x - step)) / (2 * h) for step in steps]).reshape(x.shape)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- GRPO: advantages

def reference_advantages(groups, scale) -> list[list[float]]:
    out = []
    for group in groups:
        over = {"group": group, "batch": sum(groups, [])}.get(scale)
        std = 1.0 if over is None else np.std(over, ddof=1) + 1e-6
        out.append([0.0 if len(set(group)) == 1 else (r - np.mean(group)) / std for r in group])
    return out


@in_every_script
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(script, scale):
    groups = [[1, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [0.25, 0.5, 0.75, 0.1]]
    ours = script.group_advantages(float64(groups), scale)
    np.testing.assert_allclose(ours, reference_advantages(groups, scale), atol=1e-12)
    rewards = torch.tensor([[0.1] * 7, [0.1, 0.9] + [0.1] * 5])  # in fp32 the mean of seven 0.1 is not 0.1
    assert (rewards[0] - rewards[0].mean()).abs().max() > 0
    constant, other = script.group_advantages(rewards, scale)
    assert (constant == 0).all() and (other != 0).all()


# ---- GRPO: clipped objective and its means

def reference_loss(logps, old, A, lengths, loss_type) -> float:
    """The loss by loops, one sample and token at a time; clipping to [0.8, 1.28], at most 7 tokens."""
    terms = []
    for i, n in enumerate(lengths):
        rho = [math.exp(logps[i][t] - old[i][t]) for t in range(n)]
        terms.append([-min(r * A[i], min(max(r, 0.8), 1.28) * A[i]) for r in rho])
    if loss_type == "grpo":
        return sum(sum(row) / len(row) for row in terms) / len(terms)
    return sum(map(sum, terms)) / (sum(lengths) if loss_type == "dapo" else len(terms) * 7)


@in_every_script
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_policy_loss(script, loss_type):
    lengths, C, A, rng = [3, 5, 1, 4], 5, np.array([1.2, -0.7, 0.0, -1.5]), np.random.default_rng(0)
    logps, old = rng.normal(-1, 0.4, (4, C)), rng.normal(-1, 0.4, (4, C))
    mask, x = torch.arange(C) < torch.tensor(lengths)[:, None], torch.tensor(logps, requires_grad=True)
    per_token, clipped = script.policy_loss(x, float64(old), float64(A), mask, 0.2, 0.28)
    weights = script.token_weights(mask, loss_type, 7)
    loss = (per_token * weights[:, None].double()).sum()
    assert loss.item() == pytest.approx(reference_loss(logps, old, A, lengths, loss_type), abs=1e-6)
    loss.backward()
    by_hand = numeric_grad(lambda z: reference_loss(z, old, A, lengths, loss_type), logps)
    np.testing.assert_allclose(x.grad, by_hand, atol=1e-6)
    rho, real = np.exp(logps - old), mask.numpy()
    outside = real & ((rho > 1.28) & (A[:, None] > 0) | (rho < 0.8) & (A[:, None] < 0))
    assert outside.any() and (clipped.numpy() == outside).all()
    each, _ = script.policy_loss(x, float64(old), float64(A)[:, None].expand(4, C), mask, 0.2, 0.28)
    assert torch.equal(each, per_token)  # an advantage for every token
    share = script.token_weights(mask[:2], loss_type, 7, rows=4, tokens=sum(lengths))
    assert torch.equal(share, weights[:2])  # a process that has two of the four rows


@in_every_script
def test_what_is_masked_does_no_harm(script):
    logps, mask = torch.tensor([[-1.0, 900.0]], requires_grad=True), torch.tensor([[True, False]])
    loss, _ = script.policy_loss(logps, torch.zeros(1, 2), torch.ones(1), mask, 0.2, 0.28)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logps.grad).all() and logps.grad[0, 1] == 0
    for loss_type in ("grpo", "dapo", "dr_grpo"):  # a row without a token
        for mask in ([[False, False]], [[False, False], [True, True]]):
            assert torch.isfinite(script.token_weights(torch.tensor(mask), loss_type, 4)).all()


# ---- SGPO, Eq. 3 and 5: KL of a token and its clipping

@pytest.mark.parametrize("kl", ["forward_kl", "reverse_kl"])
def test_kl_and_its_gradient(kl):
    guided, plain = np.array([[[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]])

    def reference(logits, kl=kl):
        p, q = softmax(guided), softmax(logits)
        a, b = (p, q) if kl == "forward_kl" else (q, p)
        return (a * (np.log(a) - np.log(b))).sum(-1)

    there, back = reference(plain, "forward_kl"), reference(plain, "reverse_kl")
    assert abs(there - back)[0] > 0.05  # the example tells the directions apart
    x, y = torch.tensor(guided, requires_grad=True), torch.tensor(plain, requires_grad=True)
    d = getattr(sgpo, kl)(x, y)
    np.testing.assert_allclose(d.detach(), reference(plain), atol=1e-12)
    assert d[1].item() == pytest.approx(0, abs=1e-12)  # equal rows
    d.sum().backward()
    assert x.grad is None  # stop-gradient
    np.testing.assert_allclose(y.grad, numeric_grad(lambda z: reference(z).sum(), plain), atol=1e-6)
    if kl == "forward_kl":  # d KL(p || softmax z) / dz = q - p
        np.testing.assert_allclose(y.grad, softmax(plain) - softmax(guided), atol=1e-12)


def test_clip_kl_masks_and_does_not_cap():
    d = torch.tensor([0.2, 1.0, 1.0001, 7.0], requires_grad=True)
    clipped = sgpo.clip_kl(d, 1.0)
    assert clipped.tolist() == pytest.approx([0.2, 1.0, 0.0, 0.0])
    clipped.sum().backward()
    assert d.grad.tolist() == [1, 1, 0, 0]
    assert torch.equal(sgpo.clip_kl(d, math.inf), d)


# ---- SGPO, Eq. 4 and 6: target and weight

def test_reachable_target_is_the_argmax_of_the_sum_not_of_the_mean():
    sums, lengths = torch.tensor([-4.0, -3.0, -9.0]), torch.tensor([4.0, 2.0, 12.0])
    assert sgpo.reachable_target(sums) == 1 and (sums / lengths).argmax() == 2


def test_adaptive_weight():
    for p_guided, p_auto, alpha in [(1.0, 0.0, 0.8),              # 0.5 x 1.1 / 0.1 = 5.5, bounded
                                    (0.5, 0.5, 0.5 * 0.1 / 0.6),  # no help beyond gamma
                                    (0.75, 0.5, 0.5 * 0.35 / 0.6),
                                    (0.25, 1.0, 0.0),             # harmful: 0.5 x -0.65 / 1.1 < 0
                                    (1.0, 1.0, 0.5 * 0.1 / 1.1),
                                    (0.5, 0.6, 0.0)]:
        ours = sgpo.adaptive_weight(float64([p_guided]), float64([p_auto]), 0.5, 0.1, 0.8)
        assert ours.item() == pytest.approx(alpha, abs=1e-12)


def test_group_advantage_weight():
    inside = (1 - 8 / 9) / (np.std([1] * 7 + [0] + [1], ddof=1) + 1e-6)  # o+ is the ninth
    ours = sgpo.group_advantage_weight(float64([[0] * 8, [1] * 8, [1] * 7 + [0]]), 0.8)
    np.testing.assert_allclose(ours, [0.8, 0, inside], atol=1e-9)  # 8/9 / std = 2.67, bounded


def test_guide_builds_candidates_and_weights():
    """Four problems, the second without a strategy; 16 autonomous rows, then two guided ones a strategy."""
    problems, prompts = [{"strategy": "s"}, {}] + [{"strategy": "s"}] * 2, [[i] for i in range(22)]
    auto, guided = [1, 0, 0, 0] + [0, 0, 1, 1] + [0, 0, 0, 0] + [1, 1, 1, 0], [1, 0.5] + [0, 0.4] + [0, 1]
    rewards = torch.tensor(auto + guided)

    def guide(n=22, **flags):
        args = sgpo.Args(group_size=4, guided_group_size=2, **flags)
        return sgpo.guide(prompts[:n], rewards[:n], problems, args)

    guidance, metrics = guide()
    assert guidance.correct == [[16, 17], [], [], [21]] and guidance.prompts == prompts
    # first: 0.5 (1 - 0.25 + 0.1) / 0.35, bounded; last: 0.5 - 0.75 + 0.1 < 0
    assert guidance.alpha.tolist() == pytest.approx([0.8, 0, 0, 0])
    by_hand = {"alpha": 0.8 / 3, "p_auto": (0.25 + 0 + 0.75) / 3, "p_guided": 0.5, "no_target_frac": 1 / 3}
    assert metrics == pytest.approx({f"sgpo/{name}": x for name, x in by_hand.items()})
    assert guide(weight="fixed", fixed_alpha=0.7)[0].alpha.tolist() == pytest.approx([0.7, 0, 0, 0.7])
    last = 0.2 / (np.std([1, 1, 1, 0, 1], ddof=1) + 1e-6)
    assert guide(weight="group_advantage")[0].alpha.tolist() == pytest.approx([0.8, 0, 0, last])
    guidance, metrics = guide(16, distill="none")  # none was guided
    assert guidance.correct == [[]] * 4 and guidance.alpha.tolist() == [0] * 4 and metrics == {}


def test_nothing_is_changed_in_place():
    a, b, A, mask = torch.rand(3, 4), torch.rand(3, 4), torch.rand(3), torch.rand(3, 4) > 0.3
    calls = [(sgpo.adaptive_weight, A, A * 2, 0.5, 0.1, 0.8), (sgpo.group_advantage_weight, a, 0.8),
             (sgpo.forward_kl, a, b), (sgpo.reverse_kl, a, b), (sgpo.clip_kl, a, 0.5)]
    for script in (grpo_baseline, sgpo, tgpo):
        calls += [(script.group_advantages, a, scale) for scale in ("group", "batch", "none")]
        calls += [(script.policy_loss, a, b, A, mask, 0.2, 0.28), (script.token_weights, mask, "grpo", 5)]
    for function, *inputs in calls:
        before = copy.deepcopy(inputs)
        function(*inputs)
        for x, y in zip(inputs, before):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y
