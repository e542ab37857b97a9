"""An update as a whole: its gradient is the paper's, however it is cut up and whatever is skipped."""
import html
import importlib
import math
import re

import pytest
import torch
from torch.nn.functional import log_softmax

import common
import grpo_baseline
import sgpo
from conftest import ROOT, small_model, small_tokenizer

B, G1, G2 = 4, 3, 2
PLAIN = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1], [2, 2, 9, 1]]  # prompts of the four problems
GUIDED = [[70, 71, 72, *prompt] for prompt in PLAIN]
PROBLEM = [q for G in (G1, G2) for q in range(B) for _ in range(G)]  # of 12 autonomous and 8 guided rows
LENGTHS = [3, 5, 1, 4, 4, 2, 6, 6, 6, 2, 3, 4] + [4, 2, 3, 5, 1, 6, 3, 4]
REWARDS = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1] + [1, 1, 1, 0, 1, 1, 0, 0.0])
COMPLETIONS = torch.randint(10, 250, (20, 6), generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("script", [grpo_baseline, sgpo])


def rollout(script, rows, width: int):
    ids = torch.nn.functional.pad(COMPLETIONS[rows], (0, width - 6), value=257)
    mask = torch.arange(width) < torch.tensor(LENGTHS)[rows][:, None]
    return script.Rollout([PLAIN[PROBLEM[i]] for i in rows], ids, mask, None, None)


def update(script, model=None, optimizer=None, rows=None, width=6, rewards=REWARDS, **flags):
    """One update by these rows -> the gradient of each step, metrics. By default no weight moves."""
    model, grads = model or small_model().double(), []
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    rows = rows or list(range(12 if script is grpo_baseline or flags.get("distill") == "none" else 20))
    own = {"guided_group_size": G2, "delta": 2.0} if script is sgpo else {}
    args = script.Args(**{"prompts_per_step": B, "group_size": G1, "max_new_tokens": 6, "max_grad_norm": 1e9,
                          "microbatch_tokens": 10 ** 6, "bf16": False, **own, **flags})
    optimizer.register_step_pre_hook(
        lambda *_: grads.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    ro, guidance = rollout(script, rows, width), []
    advantages = script.group_advantages(rewards[rows[:12]].view(B, G1)).flatten()
    if script is sgpo:
        prompts = [(PLAIN if i < 12 else GUIDED)[PROBLEM[i]] for i in rows]
        guidance = [sgpo.guide(prompts, rewards[rows], [{"strategy": "s"}] * B, args)[0]]
        advantages = advantages * args.autonomous_grpo
    metrics = script.update(model, optimizer, ro, advantages, *guidance, args)
    same = rollout(script, rows, width)
    assert torch.equal(ro.completions, same.completions) and torch.equal(ro.mask, same.mask)
    assert not model.training
    return grads, metrics


def all_logps(model, prompt, i, T=1.0):
    """log pi [n, V] at the tokens of a completion, from the full logits of its row alone."""
    ids = COMPLETIONS[i, :LENGTHS[i]].tolist()
    return log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / T, -1)


def reference(script, loss_type="grpo", distill="forward_kl", target="reachable", delta=2.0, alpha_max=0.8,
              weight="adaptive", autonomous_grpo=True, temperature=1.0):
    """Gradient and loss of the paper's Eq. 1 to 7 in float64, a problem and a row at a time."""
    model, loss = small_model().double(), 0.0

    def logps(i):
        full = all_logps(model, PLAIN[PROBLEM[i]], i, temperature)
        return full[range(LENGTHS[i]), COMPLETIONS[i, :LENGTHS[i]]]

    for q in range(B):
        group = REWARDS[q * G1:(q + 1) * G1].double()
        if group.std() > 0 and autonomous_grpo:
            for i in range(q * G1, (q + 1) * G1):
                A = (REWARDS[i] - group.mean()) / (group.std() + 1e-6)
                N = {"grpo": LENGTHS[i] * B * G1, "dapo": sum(LENGTHS[:12]), "dr_grpo": B * G1 * 6}[loss_type]
                loss = loss - A * (logps(i) - logps(i).detach()).exp().sum() / N
        C = [i for i in range(12 + q * G2, 12 + (q + 1) * G2) if REWARDS[i] == 1]
        if not C or script is grpo_baseline or distill == "none":
            continue
        p_auto, p_guided, four = group.mean(), len(C) / G2, torch.cat([group, torch.ones(1)])
        alpha = {"adaptive": 0.5 * (p_guided - p_auto + 0.1) / (p_auto + 0.1), "fixed": torch.ones(()),
                 "group_advantage": (1 - four.mean()) / (four.std() + 1e-6)}[weight]
        alpha = alpha if weight == "fixed" else alpha.clamp(0, alpha_max)
        if target == "reachable":
            C = [max(C, key=lambda i: logps(i).sum().item())]
        for i in C:
            student = all_logps(model, PLAIN[q], i, temperature)
            teacher = all_logps(model, GUIDED[q], i, temperature).detach()
            a, b = (teacher, student) if distill == "forward_kl" else (student, teacher)
            d = (a.exp() * (a - b)).sum(-1)
            d = -logps(i) if distill == "sft" else d[d <= delta]
            loss = loss + alpha / B * d.sum() / LENGTHS[i] / len(C)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss.item()


def error(ours, exact) -> float:
    assert exact.abs().max() > 1e-3  # there is something to compare
    return ((ours - exact).norm() / exact.norm()).item()


# ---- the gradient

SETTINGS = [(grpo_baseline, flags) for flags in (
    {}, dict(loss_type="dapo"), dict(loss_type="dr_grpo"), dict(temperature=0.7))]
SETTINGS += [(sgpo, flags) for flags in (
    {}, dict(delta=0.5), dict(delta=math.inf), dict(target="all"), dict(target="all", delta=math.inf),
    dict(alpha_max=9.0), dict(weight="fixed"), dict(weight="group_advantage", alpha_max=9.0),
    dict(distill="reverse_kl"), dict(distill="sft"), dict(autonomous_grpo=False), dict(loss_type="dapo"),
    dict(temperature=0.7))]


@pytest.mark.parametrize("script, flags", SETTINGS)
def test_gradient_is_the_papers(script, flags):
    (grad,), metrics = update(script, **flags)
    exact, loss = reference(script, **flags)
    assert error(grad, exact) < 1e-6 and metrics["loss"] == pytest.approx(loss, abs=1e-6)


def test_every_setting_moves_the_gradient():
    """Else a flag that does nothing would pass above by accident."""
    grads = [update(script, **flags)[0][0] for script, flags in SETTINGS]
    for i, grad in enumerate(grads):
        assert all(error(grad, other) > 1e-4 for other in grads[:i]), SETTINGS[i]


@BOTH
def test_microbatches_padding_and_order_change_nothing(script):
    (whole,), metrics = update(script)
    rows = [q * G + j + at for G, at in ((G1, 0), (G2, 12)) for q in (2, 0, 3, 1) for j in range(G)]
    rows = rows[:12] if script is grpo_baseline else rows
    for change in (dict(microbatch_tokens=60), dict(microbatch_tokens=1), dict(width=12), dict(rows=rows),
                   dict(rows=rows, microbatch_tokens=40)):  # sorting by length mixes the rows
        assert error(update(script, **change)[0][0], whole) < 1e-6
    assert update(script, microbatch_tokens=1)[1]["padding_frac"] == 0 < metrics["padding_frac"] < 1


def test_activation_checkpointing_changes_nothing(model_dirs):
    grads, passes = [], []
    for on in (False, True):
        args = sgpo.Args(model=str(model_dirs["qwen2"]), activation_checkpointing=on)
        model = common.load_policy(args).cpu().double()
        model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(on))
        grads += update(sgpo, model)[0]
    assert torch.equal(*grads) and passes.count(True) > passes.count(False)  # the second time in backward


def test_without_distillation_sgpo_is_grpo():
    (grad,), _ = update(grpo_baseline)
    silent = torch.cat([REWARDS[:12], torch.zeros(8)])  # no guided sample is right
    for flags in (dict(rewards=silent), dict(distill="none"), dict(weight="fixed", fixed_alpha=0.0)):
        assert torch.equal(update(sgpo, **flags)[0][0], grad)


# ---- passes, steps and metrics

@pytest.mark.parametrize("script, rows_of_passes", [
    (grpo_baseline, [6]),  # problems 1 and 2 have one reward each: their rows only count
    # two candidates each of problems 0 and 2 (1 has one, 3 none); then three targets, on both sides
    (sgpo, [6, 4, 3, 3])])
def test_only_what_moves_the_gradient_is_scored(script, rows_of_passes):
    model, seen = small_model(), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(len(named["input_ids"])), with_kwargs=True)
    update(script, model)
    assert seen == rows_of_passes


@BOTH
def test_without_any_signal_the_optimizer_is_left_alone(script):
    flags = dict(weight="group_advantage") if script is sgpo else {}
    grads, metrics = update(script, rewards=torch.ones(20), updates_per_rollout=2, **flags)
    assert grads == [] and metrics["updates"] == metrics["grad_norm"] == metrics["loss"] == 0


@pytest.mark.parametrize("bf16", [False, True])
@BOTH
def test_several_updates_are_off_policy_after_the_first(script, bf16, monkeypatch):
    ratios, told, true_loss = [], [], script.policy_loss

    def spy(logps, old, A, mask, *clip):
        ratios.append((logps - old).exp()[mask].detach())
        told.append(A.item())
        return true_loss(logps, old, A, mask, *clip)

    monkeypatch.setattr(script, "policy_loss", spy)
    model, A = small_model(), script.group_advantages(REWARDS[:12].view(B, G1))
    _, metrics = update(script, model, torch.optim.SGD(model.parameters(), lr=0.05), updates_per_rollout=2,
                        temperature=0.7, bf16=bf16, microbatch_tokens=1)  # a row at a time
    assert metrics["updates"] == 2 and (torch.cat(ratios[:3]) - 1).abs().max() < 1e-5
    assert sorted(told[:3]) == sorted(A[0].tolist()) and sorted(told[3:]) == sorted(A[3].tolist())
    clipped = sum((rho > 1.28 if A > 0 else rho < 0.8).sum().item() for rho, A in zip(ratios, told))
    assert 0 < metrics["clip_ratio"] == pytest.approx(clipped / sum(map(len, ratios)))


@pytest.mark.parametrize("script, loss_type", [
    (grpo_baseline, "grpo"), (grpo_baseline, "dapo"), (sgpo, "grpo")])
def test_an_update_has_the_normaliser_of_its_own_share(script, loss_type):
    (whole,), _ = update(script, loss_type=loss_type)
    first, second = update(script, loss_type=loss_type, updates_per_rollout=2)[0]  # both are on-policy
    share = sum(LENGTHS[:6]) / sum(LENGTHS[:12]) if loss_type == "dapo" else 0.5
    assert error(share * first + (1 - share) * second, whole) < 1e-6


def test_metrics_by_hand():
    (grad,), metrics = update(grpo_baseline, microbatch_tokens=30)
    model = small_model().double()
    live = [all_logps(model, PLAIN[PROBLEM[i]], i) for i in (0, 1, 2, 9, 10, 11)]
    entropy = torch.cat([-(p.exp() * p).sum(-1) for p in live]).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-5) and metrics["clip_ratio"] == 0
    assert metrics["grad_norm"] == pytest.approx(grad.norm().item()) and metrics["updates"] == 1
    (clipped,), metrics = update(grpo_baseline, max_grad_norm=0.01)
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(grad.norm().item())  # before clipping


def test_kl_metrics_by_hand():
    _, metrics = update(sgpo, target="all", delta=1.0, weight="fixed")
    model, d = small_model().double(), []
    for i in (12, 13, 14, 16, 17):
        t, s = all_logps(model, GUIDED[PROBLEM[i]], i), all_logps(model, PLAIN[PROBLEM[i]], i)
        d += (t.exp() * (t - s)).sum(-1).tolist()
    assert metrics["sgpo/kl"] == pytest.approx(sum(d) / len(d), abs=1e-6)
    assert metrics["sgpo/kl_clipped_frac"] == pytest.approx(sum(x > 1.0 for x in d) / len(d))


# ---- precision

def test_weights_move_at_the_papers_learning_rate(model_dirs):
    model = common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]))).cpu()
    weights = [p for name, p in model.named_parameters() if "mlp" in name]
    before = [p.detach().clone() for p in weights]
    update(sgpo, model, torch.optim.AdamW(model.parameters(), lr=1e-6), bf16=True)
    assert min((p != b).float().mean() for p, b in zip(weights, before)) > 0.95


@pytest.mark.parametrize("script, flags", [(grpo_baseline, {})] + [
    (sgpo, dict(delta=math.inf, distill=kind)) for kind in ("forward_kl", "reverse_kl", "sft")])
def test_bf16_is_close_to_fp32(script, flags, monkeypatch):
    seen = set()
    for module, name in ((common, "log_prob_and_entropy"), (sgpo, "forward_kl"), (sgpo, "reverse_kl")):
        monkeypatch.setattr(module, name, lambda *xs, true=getattr(module, name): seen.update(
            (x.dtype, bool((x == x.bfloat16()).all())) for x in xs if x.is_floating_point()) or true(*xs))
    model = small_model(initializer_range=0.1)
    (exact,), _ = update(script, model, **flags)
    seen.clear()
    (grad,), metrics = update(script, model, bf16=True, **flags)
    assert 1e-3 < error(grad, exact) < 3e-2 and all(map(math.isfinite, metrics.values()))
    assert seen == {(torch.float32, True)}  # the loss is given fp32 logits, which came out of bf16
    assert {p.dtype for p in model.parameters()} == {grad.dtype} == {torch.float32}


def test_the_heads_gradient_is_added_up_in_fp32_under_bf16(monkeypatch):
    monkeypatch.setattr(common, "CHUNK", 272)  # a token at a time: a sum in bf16 would soon stop growing
    grads = []
    for M in (1, 1000):
        model, hidden, ids = small_model(), torch.linspace(-1, 1, 32).repeat(M, 1), torch.full((M,), 7)
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = common.over_vocabulary(common.log_prob_and_entropy, model, [hidden], [ids])
        logps.sum().backward()
        grads.append(model.lm_head.weight.grad / M)
    assert grads[0].dtype == torch.float32 and error(grads[1], grads[0]) < 1e-5


def test_show_tokens_escapes_and_shows_the_loss(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    show = importlib.import_module("show_tokens")
    evil = '<script>"&\''
    model, tokenizer = small_model(), small_tokenizer()
    plain, guided, ids = ([tokenizer(text).input_ids for text in ("q", "hint q", evil)])
    target = show.look(model, tokenizer, evil, plain, guided, ids, 0.7)
    told, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
    hidden = [common.completion_hidden(model, [prompt], told, mask) for prompt in (guided, plain)]
    d = sgpo.forward_kl(*(model.lm_head(h).float() / 0.7 for h in hidden))
    assert torch.allclose(torch.tensor(target.d), d, atol=1e-5) and d.max() > 1e-3
    text = show.page([target], delta=2.5)
    assert "<script>" not in text and text.count("<span") == len(ids)
    assert 0 < text.count("class=out") == (d > 2.5).sum() < len(ids) and f"d = {d[0]:.4f}" in text
    assert [html.unescape(part) for part in re.findall('">([^<]*)</span>', text)] == list(evil)
