"""The update as a whole: its gradient equals the paper's loss written out on full logits, however it is cut up and whatever is skipped."""
import copy

import pytest
import torch
from torch.nn.functional import log_softmax

import common
import grpo_baseline
import sgpo
from conftest import small_model

B, G1, G2 = 4, 3, 2
PLAIN = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1], [2, 2, 9, 1]]  # prompts of the four problems
GUIDED = [[70, 71, 72, *p] for p in PLAIN]
LENGTHS = [3, 5, 1, 4, 4, 2, 6, 6, 6, 2, 3, 4] + [4, 2, 3, 5, 1, 6, 3, 4]  # 12 autonomous rows, 8 guided
REWARDS = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1] + [1, 1, 1, 0, 1, 1, 0, 0.0])
PROBLEM = [q for q in range(B) for _ in range(G1)] + [q for q in range(B) for _ in range(G2)]


class NoWatch:
    stopped = False

    def agreed(self):
        return self.stopped


class Recorder(torch.optim.SGD):
    """Keeps the gradients of every step and changes no weight."""

    def __init__(self, params):
        super().__init__(params, lr=0.0)
        self.grads = []

    def step(self, closure=None):
        self.grads.append(torch.cat([p.grad.flatten().clone() for g in self.param_groups for p in g["params"]]))


def batch(rows: int, width: int = 6):
    torch.manual_seed(0)
    completions = torch.randint(10, 250, (rows, width))
    mask = torch.arange(width) < torch.tensor(LENGTHS[:rows])[:, None]
    return completions, mask


def rollout_of(rows: int, width: int = 6) -> grpo_baseline.Rollout:
    completions, mask = batch(rows, width)
    return grpo_baseline.Rollout([PLAIN[q] for q in PROBLEM[:rows]], completions, mask, ~mask.any(1), [""] * rows)


def grpo_grad(budget=10 ** 6, width=6, model=None, advantages=None, **flags):
    args = grpo_baseline.Args(prompts_per_step=B, group_size=G1, microbatch_tokens=budget, max_new_tokens=6, **{"max_grad_norm": 1e9, **flags})
    model = model or small_model()
    optimizer = Recorder(model.parameters())
    if advantages is None:
        advantages = grpo_baseline.group_advantages(REWARDS[:12].view(B, G1), args.scale_rewards).flatten()
    metrics = grpo_baseline.update(model, optimizer, rollout_of(12, width), advantages, args, NoWatch())
    return optimizer.grads, metrics


def sgpo_grad(budget=10 ** 6, model=None, rewards=REWARDS, **flags):
    args = sgpo.Args(prompts_per_step=B, group_size=G1, guided_group_size=G2, microbatch_tokens=budget, max_new_tokens=6, **{"max_grad_norm": 1e9, **flags})
    model = model or small_model()
    optimizer = Recorder(model.parameters())
    ro = rollout_of(20)
    advantages = sgpo.group_advantages(rewards[:12].view(B, G1)).flatten() * args.autonomous_grpo
    prompts = [PLAIN[q] for q in PROBLEM[:12]] + [GUIDED[q] for q in PROBLEM[12:]]
    guidance, _ = sgpo.guide(prompts, rewards, [{"strategy": "s"}] * B, args)
    metrics = sgpo.update(model, optimizer, ro, advantages, guidance, args, NoWatch())
    return optimizer.grads, metrics


def reference_loss(model, rows, loss_type="grpo", distill="forward_kl", target="reachable", delta=1.0, weight="adaptive", autonomous=True):
    """The paper's Eq. 1 to 7, a row and a problem at a time, in float64, on the full logits of one row."""
    completions, _ = batch(rows)

    def all_logps(prompt, i):
        ids = completions[i, :LENGTHS[i]].tolist()
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        return log_softmax(logits, -1), torch.tensor(ids)

    def logps(i):
        full, ids = all_logps(PLAIN[PROBLEM[i]], i)
        return full[range(len(ids)), ids]

    loss = 0.0
    for q in range(B):
        group = REWARDS[q * G1:(q + 1) * G1].double()
        if group.std() > 0 and autonomous:
            for i in range(q * G1, (q + 1) * G1):
                A = (REWARDS[i] - group.mean()) / (group.std() + 1e-6)
                per_token = -A * (logps(i) - logps(i).detach()).exp()
                loss = loss + per_token.sum() / {"grpo": LENGTHS[i] * B * G1, "dapo": sum(LENGTHS[:12]), "dr_grpo": B * G1 * 6}[loss_type]
        if rows == 12:
            continue
        C = [12 + q * G2 + j for j in range(G2) if REWARDS[12 + q * G2 + j] == 1]
        if not C:
            continue
        p_auto, p_guided = group.mean().item(), len(C) / G2
        alpha = 1.0 if weight == "fixed" else min(max(0.5 * (p_guided - p_auto + 0.1) / (p_auto + 0.1), 0), 0.8)
        if target == "reachable":
            C = [max(C, key=lambda i: logps(i).sum().item())]
        for i in C:
            student, teacher = all_logps(PLAIN[q], i)[0], all_logps(GUIDED[q], i)[0].detach()
            if distill == "sft":
                d = -logps(i)
            elif distill == "forward_kl":
                d = (teacher.exp() * (teacher - student)).sum(-1)
            else:
                d = (student.exp() * (student - teacher)).sum(-1)
            keep = torch.ones_like(d) if distill == "sft" else (d <= delta).double()
            loss = loss + alpha / B * (keep * d).sum() / LENGTHS[i] / len(C)
    return loss


def reference_grad(**setting):
    model = small_model().double()
    loss = reference_loss(model, **setting)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).float()


def close(a, b, tol=1e-6):
    assert a.abs().max() > 1e-3  # there is something to compare
    assert ((a - b).norm() / b.norm()).item() < tol


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_grpo_gradient_is_the_papers(loss_type):
    grads, metrics = grpo_grad(model=small_model().double(), loss_type=loss_type)
    loss, reference = reference_grad(rows=12, loss_type=loss_type)
    close(grads[0].float(), reference)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("flags, setting", [
    ({}, {}),
    (dict(delta=0.05), dict(delta=0.05)),
    (dict(delta=float("inf")), dict(delta=float("inf"))),
    (dict(target="all"), dict(target="all")),
    (dict(target="all", delta=float("inf")), dict(target="all", delta=float("inf"))),
    (dict(weight="fixed"), dict(weight="fixed")),
    (dict(distill="reverse_kl"), dict(distill="reverse_kl")),
    (dict(distill="sft"), dict(distill="sft")),
    (dict(autonomous_grpo=False), dict(autonomous=False)),
    (dict(loss_type="dapo"), dict(loss_type="dapo")),
])
def test_sgpo_gradient_is_the_papers(flags, setting):
    grads, metrics = sgpo_grad(model=small_model().double(), **flags)
    loss, reference = reference_grad(rows=20, **setting)
    close(grads[0].float(), reference)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)


def test_every_ablation_moves_the_gradient():
    """Else a flag that does nothing would pass above by accident."""
    settings = [{}, dict(delta=0.05), dict(delta=float("inf")), dict(target="all"), dict(weight="fixed"), dict(distill="reverse_kl"),
                dict(distill="sft"), dict(autonomous_grpo=False), dict(weight="group_advantage"), dict(loss_type="dapo")]
    grads = [sgpo_grad(alpha_max=10.0, **s)[0][0] for s in settings]  # or the bound hides the difference of the weights
    for i in range(len(grads)):
        for j in range(i):
            assert (grads[i] - grads[j]).norm() / grads[j].norm() > 1e-4, (settings[i], settings[j])


@pytest.mark.parametrize("make", [grpo_grad, sgpo_grad])
def test_microbatches_change_nothing(make):
    grads = [make(budget=budget)[0][0] for budget in (10 ** 6, 60, 1)]  # 1, several, one a row
    close(grads[1], grads[0])
    close(grads[2], grads[0])


def test_padding_changes_nothing():
    completions, mask = batch(12)
    wide = torch.cat([completions, torch.full_like(completions, 257)], 1)
    ro = rollout_of(12)
    ro.completions, ro.mask = wide, torch.cat([mask, torch.zeros_like(mask)], 1)
    before = copy.deepcopy(ro)
    args = grpo_baseline.Args(prompts_per_step=B, group_size=G1, max_new_tokens=6, max_grad_norm=1e9)
    model = small_model()
    optimizer = Recorder(model.parameters())
    advantages = grpo_baseline.group_advantages(REWARDS[:12].view(B, G1)).flatten()
    grpo_baseline.update(model, optimizer, ro, advantages, args, NoWatch())
    close(optimizer.grads[0], grpo_grad()[0][0])
    assert torch.equal(ro.completions, before.completions) and torch.equal(ro.mask, before.mask)


def test_rows_without_signal_are_skipped_and_still_count(monkeypatch):
    """Dead groups cost no forward pass, and the gradient is that of a tiny advantage in their place."""
    scored = []
    true_logps = grpo_baseline.completion_logps
    monkeypatch.setattr(grpo_baseline, "completion_logps", lambda *a: scored.append(len(a[1])) or true_logps(*a))
    dead, _ = grpo_grad()
    assert sum(scored) == 6  # problems 1 and 2 have constant rewards
    advantages = grpo_baseline.group_advantages(REWARDS[:12].view(B, G1)).flatten()
    advantages[3:9] = 1e-12
    close(dead[0], grpo_grad(advantages=advantages)[0][0])


def test_sgpo_scores_candidates_only_where_there_is_a_choice(monkeypatch):
    forwards = []
    true_hidden = common.completion_hidden
    monkeypatch.setattr(common, "completion_hidden", lambda *a: forwards.append(("logps", len(a[1]))) or true_hidden(*a))
    monkeypatch.setattr(sgpo, "completion_hidden", lambda *a: forwards.append(("kl", len(a[1]))) or true_hidden(*a))
    sgpo_grad()
    # 6 live autonomous rows; 2 candidates of problem 0 (problem 1 has one, problem 2 has alpha 0.05 and 2, problem 3 none); 3 targets, two passes
    assert forwards == [("logps", 6), ("logps", 4), ("kl", 3), ("kl", 3)]


@pytest.mark.parametrize("make", [grpo_grad, sgpo_grad])
def test_all_dead_skips_the_optimizer(make):
    flags = dict(advantages=torch.zeros(12)) if make is grpo_grad else dict(rewards=torch.ones(20), weight="group_advantage")
    grads, metrics = make(**flags)
    assert grads == [] and metrics["updates"] == 0 and metrics["grad_norm"] == 0 and metrics["loss"] == 0


def test_without_distillation_sgpo_is_grpo():
    rewards = REWARDS.clone()
    rewards[12:] = 0
    assert torch.equal(sgpo_grad(rewards=rewards)[0][0], grpo_grad()[0][0])


# ---- several updates a rollout batch

def test_several_updates_are_off_policy_after_the_first():
    """Real old log-probs: ratio exactly where it was sampled first (T = 0.7), elsewhere after the weights moved; shares by problem."""
    args = grpo_baseline.Args(prompts_per_step=B, group_size=G1, updates_per_rollout=2, temperature=0.7, max_new_tokens=6)
    model = small_model()
    ratios = []
    true_loss = grpo_baseline.policy_loss

    def spy(logps, old, advantages, mask, *clip):
        ratios.append(((logps - old).exp()[mask].detach(), advantages))
        return true_loss(logps, old, advantages, mask, *clip)

    grpo_baseline.policy_loss, optimizer = spy, torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        advantages = grpo_baseline.group_advantages(REWARDS[:12].view(B, G1)).flatten()
        metrics = grpo_baseline.update(model, optimizer, rollout_of(12), advantages, args, NoWatch())
    finally:
        grpo_baseline.policy_loss = true_loss
    assert metrics["updates"] == 2 and len(ratios) == 2
    assert (ratios[0][0] - 1).abs().max() < 1e-5 and (ratios[1][0] - 1).abs().max() > 1e-3
    assert sorted(ratios[0][1].tolist()) == sorted(advantages[:3].tolist())
    assert sorted(ratios[1][1].tolist()) == sorted(advantages[9:].tolist())


def test_first_of_two_updates_has_the_normaliser_of_its_own_share():
    full, _ = grpo_grad()
    halves, _ = grpo_grad(updates_per_rollout=2)  # the recorder moves no weight, so both are on-policy
    close((halves[0] + halves[1]) / 2, full[0], tol=1e-5)


# ---- metrics by hand (T16), stopping, groups (T17), master weights (T9)

def test_metrics_by_hand():
    model = small_model()
    _, metrics = grpo_grad(budget=30, model=model)
    completions, mask = batch(12)
    live = [0, 1, 2, 9, 10, 11]
    with torch.no_grad():
        entropies = [-(p.exp() * p).sum(-1) for i in live for p in [log_softmax(model(torch.tensor(
            [PLAIN[PROBLEM[i]] + completions[i, :LENGTHS[i]].tolist()])).logits[0, len(PLAIN[PROBLEM[i]]) - 1:-1], -1)]]
    assert metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(grpo_grad()[0][0].norm().item(), rel=1e-5)  # before clipping, of all micro-batches
    assert metrics["clip_ratio"] == 0
    assert grpo_grad(budget=1)[1]["padding_frac"] == 0 and 0 < grpo_grad()[1]["padding_frac"] < 1


def test_kl_metrics_by_hand():
    model = small_model().double()
    _, metrics = sgpo_grad(model=model, target="all", delta=0.05, weight="fixed")
    completions, _ = batch(20)
    d = []
    for i in (12, 13, 14, 16, 17):
        ids, q = completions[i, :LENGTHS[i]].tolist(), PROBLEM[i]
        t, s = (log_softmax(model(torch.tensor([p + ids])).logits[0, len(p) - 1:-1], -1).detach() for p in (GUIDED[q], PLAIN[q]))
        d.append((t.exp() * (t - s)).sum(-1))
    d = torch.cat(d)
    assert metrics["sgpo/kl"] == pytest.approx(d.mean().item(), abs=1e-6)
    assert 0 < metrics["sgpo/kl_clipped_frac"] == pytest.approx((d > 0.05).double().mean().item())


def test_gradient_is_clipped_to_the_norm():
    grads, metrics = grpo_grad(max_grad_norm=0.01)
    assert grads[0].norm().item() == pytest.approx(0.01, rel=1e-3) and metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("make", [grpo_grad, sgpo_grad])
def test_a_stop_before_the_first_optimizer_step_leaves_the_weights(make, monkeypatch):
    monkeypatch.setattr(NoWatch, "stopped", True)
    model = small_model()
    grads, metrics = make(model=model)
    assert metrics is None and grads == [] and all(p.grad is None for p in model.parameters())


def test_advantages_stay_with_their_rows_when_problems_are_shuffled():
    """Problems in another order: the same gradient, although sorting by length has mixed the rows."""
    order = [2, 0, 3, 1]
    rows = [q * G1 + j for q in order for j in range(G1)]
    ro = rollout_of(12)
    shuffled = grpo_baseline.Rollout([ro.prompts[i] for i in rows], ro.completions[rows], ro.mask[rows], ro.truncated[rows], [""] * 12)
    args = grpo_baseline.Args(prompts_per_step=B, group_size=G1, max_new_tokens=6, microbatch_tokens=40, max_grad_norm=1e9)
    model = small_model()
    optimizer = Recorder(model.parameters())
    advantages = grpo_baseline.group_advantages(REWARDS[rows].view(B, G1)).flatten()
    grpo_baseline.update(model, optimizer, shuffled, advantages, args, NoWatch())
    close(optimizer.grads[0], grpo_grad()[0][0])


def test_master_weights_move_at_the_papers_learning_rate(model_dirs):
    model = common.load_model(str(model_dirs["qwen2"]))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    for _ in range(10):
        model(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = [(p != b).float().mean().item() for (name, p), b in zip(model.named_parameters(), before) if "mlp" in name]
    assert min(layers) > 0.95


def test_activation_checkpointing_changes_nothing():
    model = small_model()
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    close(sgpo_grad(model=model, activation_checkpointing=True)[0][0], sgpo_grad()[0][0])
    assert not model.training
