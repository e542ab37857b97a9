"""Every equation of the scripts by hand, with its gradient; what its estimators teach on average.

test_update.py and test_tgpo.py compare whole updates with tests/reference.py.
"""
import inspect
import math

import pytest
import torch
from pytest import approx
from torch import Tensor

import sgpo
import tgpo
from grpo_baseline import group_advantages, logp_and_entropy, policy_loss, token_weights

LOSS_TYPES = pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient_of(loss, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    loss(x).sum().backward()
    return x.grad


def is_close(ours: Tensor, exact: Tensor) -> bool:
    return torch.allclose(ours, exact, atol=1e-6, rtol=0)


@pytest.fixture(autouse=True)
def nothing_is_changed_in_place():
    """Check that no function has changed the tensors of this file, which are its inputs."""
    before = {}
    for name, value in globals().items():
        if torch.is_tensor(value):
            before[name] = value.clone()
    yield
    for name, value in before.items():
        assert torch.equal(globals()[name], value), name


@pytest.mark.parametrize("script", [sgpo, tgpo])
@pytest.mark.parametrize("function", [group_advantages, policy_loss, token_weights, logp_and_entropy])
def test_the_scripts_share_these_word_for_word(script, function):
    copied = getattr(script, function.__name__)
    assert inspect.getsource(copied) == inspect.getsource(function)


# ---------------------------------------------------------------- GRPO

REWARDS = float64([[1, 0, 0, 0], [1, 1, 0, 0]])
SEVEN_TENTHS = torch.tensor([[0.1] * 7])


@pytest.mark.parametrize("scale, std", [
    ("group", 1 / 2),
    ("batch", (15 / 8 / 7) ** 0.5),  # of all eight rewards
    ("none", 1),
])
def test_advantages(scale, std):
    A = group_advantages(REWARDS, scale)[0]
    assert (A * std).tolist() == approx([0.75, -0.25, -0.25, -0.25], abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_have_advantage_exactly_0(scale):
    assert SEVEN_TENTHS.mean() != SEVEN_TENTHS[0, 0]  # in fp32 the mean of seven 0.1 is not 0.1
    assert not group_advantages(SEVEN_TENTHS, scale).any()


# Two samples with A = 1 and A = -2. The last token of the second is padding, where `exp` would overflow.
LOG_RATIOS = float64([
    [math.log(0.5), 0.0, math.log(1.4)],
    [math.log(0.5), 0.0, 900.0],
])
MASK = torch.tensor([
    [True, True, True],
    [True, True, False],
])
OLD_LOGPS = torch.zeros(2, 3)
ADVANTAGES = float64([1.0, -2.0])


def test_policy_loss():
    loss, clipped = policy_loss(LOG_RATIOS, OLD_LOGPS, ADVANTAGES, MASK, 0.2, 0.28)
    assert loss[0].tolist() == approx([-0.5, -1.0, -1.28])
    assert loss[1].tolist() == approx([1.6, 2.0, 0.0])
    assert clipped[0].tolist() == [False, False, True]
    assert clipped[1].tolist() == [True, False, False]


def test_gradient_of_policy_loss():
    """It is -rho A, and 0 if the token is clipped or masked."""
    def loss(log_ratios: Tensor) -> Tensor:
        return policy_loss(log_ratios, OLD_LOGPS, ADVANTAGES, MASK, 0.2, 0.28)[0]

    gradient = gradient_of(loss, LOG_RATIOS)
    assert gradient[0].tolist() == approx([-0.5, -1.0, 0.0])
    assert gradient[1].tolist() == approx([0.0, 2.0, 0.0])


@pytest.mark.parametrize("loss_type, first, second", [
    ("grpo", 1 / 12, 1 / 8),  # 4 samples, of 3 and 2 tokens
    ("dapo", 1 / 10, 1 / 10),
    ("dr_grpo", 1 / 32, 1 / 32),
])
def test_token_weights(loss_type, first, second):
    """Two of an update's four samples, which have 10 tokens together and could have 8 each."""
    weights = token_weights(MASK, loss_type, 8, num_samples=4, num_tokens=10)
    assert weights.tolist() == approx([first, second])


@LOSS_TYPES
def test_token_weights_are_finite_without_any_token(loss_type):
    nothing = torch.zeros(1, 2)
    assert token_weights(nothing, loss_type, 8, 1, 0).isfinite().all()


# ---------------------------------------------------------------- SGPO

# Distributions over three tokens at two positions; at the second the two are equal.
P = float64([
    [0.8, 0.1, 0.1],
    [0.2, 0.2, 0.6],
])
Q = float64([
    [0.25, 0.25, 0.5],
    [0.2, 0.2, 0.6],
])
P_LOGITS = P.log() + 3.0  # logits are no log-probs
Q_LOGITS = Q.log() - 2.0
KL_P_Q = (P * (P / Q).log()).sum(1)
KL_Q_P = (Q * (Q / P).log()).sum(1)
H_P = -(P * P.log()).sum(1)


def test_log_probs_and_entropy():
    ids = torch.tensor([0, 2])
    logps, entropy = logp_and_entropy(P_LOGITS, ids)
    assert is_close(logps.exp(), float64([0.8, 0.6]))
    assert is_close(entropy, H_P)
    gradient = gradient_of(lambda z: logp_and_entropy(z, ids)[0], P_LOGITS)
    assert gradient[0].tolist() == approx([0.2, -0.1, -0.1])  # one-hot minus P


def test_the_direction_of_the_kl():
    forward = sgpo.forward_kl(P_LOGITS, Q_LOGITS)
    reverse = sgpo.reverse_kl(Q_LOGITS, P_LOGITS)
    assert KL_P_Q.tolist() == approx([0.678, 0.0], abs=1e-3)
    assert KL_Q_P.tolist() == approx([0.743, 0.0], abs=1e-3)
    assert is_close(forward, KL_P_Q)
    assert is_close(reverse, KL_Q_P)


def test_gradient_of_the_forward_kl():
    gradient = gradient_of(lambda z: sgpo.forward_kl(P_LOGITS, z), Q_LOGITS)
    assert is_close(gradient, Q - P)


@pytest.mark.parametrize("kl", [
    sgpo.forward_kl,
    lambda guided_logits, logits: sgpo.reverse_kl(logits, guided_logits),
])
def test_the_guided_side_has_no_gradient_through_a_shared_head(kl):
    """The guided hidden states are P, the others Q."""
    head = torch.eye(3, dtype=torch.float64)
    both = gradient_of(lambda W: kl(P @ W, Q @ W), head)
    unguided_only = gradient_of(lambda W: kl(P @ head, Q @ W), head)
    assert torch.equal(both, unguided_only)


def test_clip_kl_masks_and_does_not_cap():
    d = float64([1.0, 1.0001])
    gradient = gradient_of(lambda x: sgpo.clip_kl(x, 1.0), d)
    assert sgpo.clip_kl(d, 1.0).tolist() == [1.0, 0.0]
    assert gradient.tolist() == [1.0, 0.0]
    assert torch.equal(sgpo.clip_kl(d, math.inf), d)


def test_reachable_target_is_the_argmax_of_the_sum_not_of_the_mean():
    sums = torch.tensor([-4.0, -3.0, -9.0])
    lengths = torch.tensor([4.0, 2.0, 12.0])
    assert sgpo.reachable_target(sums) == 1
    assert (sums / lengths).argmax() == 2


@pytest.mark.parametrize("p_guided, p_auto, alpha", [
    (1.0, 0.0, 0.8),           # 0.5 x 1.1 / 0.1 = 5.5, bounded by alpha_max
    (0.7, 0.4, 0.4),           # 0.5 x 0.4 / 0.5
    (0.4, 0.4, 0.1),           # no gain: gamma alone
    (0.2, 0.9, 0.0),           # 0.5 x -0.6 / 1 is negative
])
def test_adaptive_weight(p_guided, p_auto, alpha):
    ours = sgpo.adaptive_weight(float64(p_guided), float64(p_auto), 0.5, 0.1, 0.8)
    assert ours.item() == approx(alpha)


@pytest.mark.parametrize("rewards, alpha", [
    ([1, 1, 0], 0.5),          # with the target's 1: mean 3/4, std 1/2
    ([0, 0, 0], 0.8),          # 3/2, bounded by alpha_max
    ([1, 1, 1], 0.0),
])
def test_group_advantage_weight(rewards, alpha):
    ours = sgpo.group_advantage_weight(float64([rewards]), 0.8)
    assert ours.item() == approx(alpha, abs=1e-5)


@pytest.mark.parametrize("flags, alpha", [
    ({}, [0.8, 0, 0, 0]),      # 0.5 (1 - 0.25 + 0.1) / 0.35, bounded; the last: 0.5 - 0.75 + 0.1 is negative
    ({"weight": "fixed", "fixed_alpha": 0.7}, [0.7, 0, 0, 0.7]),
    ({"weight": "group_advantage"}, [0.8, 0, 0, 0.2 / 0.2 ** 0.5]),
])
def test_weigh_problems(flags, alpha):
    """Problem 1 has no strategy. A reward of 0.5 is correct, 0.4 is not."""
    rewards = torch.tensor([
        1, 0, 0, 0,
        0, 0, 1, 1,
        0, 0, 0, 0,
        1, 1, 1, 0,
        1, 0.5,      # guided, of problem 0
        0, 0.4,      # of problem 2
        0, 1,        # of problem 3
    ])
    args = sgpo.Args(group_size=4, guided_group_size=2, **flags)
    guidance, metrics = sgpo.weigh_problems(rewards, [0, 2, 3], 4, args)
    assert guidance.correct == [[16, 17], [], [], [21]]
    assert guidance.alpha.tolist() == approx(alpha, abs=1e-5)
    assert metrics["sgpo/alpha"] == approx(sum(alpha) / 3, abs=1e-5)
    assert metrics["sgpo/p_auto"] == approx((0.25 + 0 + 0.75) / 3)
    assert metrics["sgpo/p_guided"] == approx(0.5)
    assert metrics["sgpo/no_target_frac"] == approx(1 / 3)


# ---------------------------------------------------------------- TGPO: the teacher is P, the student Q

def test_topk_forward_kl():
    """The teacher is renormalised on its top two tokens, 8/9 and 1/9; the student is not."""
    p = float64([8 / 9, 1 / 9])
    by_hand = p * (p / 0.25).log()
    top_ids = torch.tensor([[0, 1]])
    ours = tgpo.topk_forward_kl(Q_LOGITS[:1], top_ids, P_LOGITS[:1, :2])
    assert ours.item() == approx(by_hand.sum().item())


def test_reverse_kl_of_tgpo():
    assert is_close(tgpo.reverse_kl(Q_LOGITS, P_LOGITS), KL_Q_P)
    by_teacher = gradient_of(lambda z: tgpo.reverse_kl(Q_LOGITS + 0 * z, z), P_LOGITS)
    assert not by_teacher.any()


def test_entropy_with_gradient():
    assert is_close(tgpo.entropy_with_gradient(P_LOGITS), H_P)


def test_log_probs_of_ids_outside_are_finite():
    outside = torch.tensor([-1, 9])
    assert tgpo.chosen_logps(Q_LOGITS, outside).isfinite().all()


def test_the_schedule_of_the_coefficient():
    values = [tgpo.coefficient(step, 0.002, 1e-5) for step in range(1, 301)]
    assert values[:3] == approx([0.002, 0.00199, 0.00198])
    assert values[199] == approx(1e-5)
    assert set(values[200:]) == {0.0}
    assert tgpo.coefficient(4, 0.9, 0.3) == 0.0  # though 0.9 - 3 * 0.3 is 1e-16


FORWARD_GRADIENT = Q - P
REVERSE_GRADIENT = gradient_of(lambda z: sgpo.reverse_kl(z, P_LOGITS), Q_LOGITS)
NO_GRADIENT = torch.zeros_like(P)


def expected_gradient(loss, drawn_from: Tensor) -> Tensor:
    """Return the gradient of loss(log pi(a), log pi_T(a)) by the student's logits, averaged over tokens a."""
    total = torch.zeros_like(P)
    for a in range(3):
        ids = torch.tensor([a, a])
        teacher_logps = P.log()[:, a]

        def of_logits(z: Tensor) -> Tensor:
            return loss(tgpo.chosen_logps(z, ids), teacher_logps)

        gradient = gradient_of(of_logits, Q_LOGITS)
        total += drawn_from[:, a, None] * gradient
    return total


def k1(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    return logps - teacher_logps


def k3(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    log_ratio = teacher_logps - logps
    return log_ratio.exp() - 1 - log_ratio


def label_loss(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    return tgpo.label_loss(logps)


def on_policy_loss(logps: Tensor, A: Tensor) -> Tensor:
    """Return the policy loss at rho = 1 of two samples of one token."""
    logps = logps[:, None]
    loss, _ = policy_loss(logps, logps.detach(), A, MASK[:, :1], 0.2, 0.2)
    return loss


def rkl(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    return on_policy_loss(logps, tgpo.rkl_advantages(logps.detach(), teacher_logps))


def label_bonus(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    old_label_logps = tgpo.chosen_logps(Q_LOGITS, P.argmax(1))
    return on_policy_loss(logps, tgpo.label_bonus(old_label_logps))


@pytest.mark.parametrize("estimator, drawn_from, expected", [
    (tgpo.k2, Q, REVERSE_GRADIENT),
    (k3, Q, FORWARD_GRADIENT),
    (k1, Q, NO_GRADIENT),
    (rkl, Q, REVERSE_GRADIENT),
    (label_bonus, Q, NO_GRADIENT),
    (label_loss, P, FORWARD_GRADIENT),  # labels drawn from the teacher
])
def test_expected_gradients_of_estimators(estimator, drawn_from, expected):
    assert is_close(expected_gradient(estimator, drawn_from), expected)


def test_forward_and_reverse_gradients_differ():
    assert (FORWARD_GRADIENT - REVERSE_GRADIENT).abs().max() > 0.05
