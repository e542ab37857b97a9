"""tgpo.py: every guidance against float64 NumPy, the update against the paper's loss on full logits, vocabularies, divergence, the demo."""
import functools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import tgpo
from conftest import read_jsonl, small_model, small_tokenizer, stripped, write_rows
from test_equations import numeric_grad, reference_grpo, softmax
from test_run import FAST, refused
from test_sequences import Successor
from test_update import B, G1, LENGTHS, PLAIN, PROBLEM, REWARDS, NoWatch, Recorder, batch, close, grpo_grad, rollout_of

rng = np.random.default_rng(0)
TRAINED = [g for g in tgpo.GUIDANCE if g != "none"]
SHARED = 260  # ids both tokenizers have, of the student's 272 and the teacher's 288
STUDENT, TEACHER = rng.normal(0, 1.5, (6, 7)), rng.normal(0, 1.5, (6, 7))
IDS, LABELS = np.array([0, 3, 6, 2, 2, 5]), np.array([1, 3, 0, 2, 4, 4])


def log_softmax(x):
    return np.log(softmax(x))


def at(x, ids):
    return np.array([row[i] for row, i in zip(x, ids)])


# ---- equations

def test_schedule():
    s = [tgpo.coefficient(step, 0.002, 1e-5) for step in range(1, 301)]
    np.testing.assert_allclose(s, [max(0.002 - 1e-5 * k, 0) for k in range(300)], atol=1e-11)
    assert s[0] == 0.002 and s[199] == pytest.approx(1e-5) and s[200] == 0 and set(s[200:]) == {0.0}
    adv = [tgpo.coefficient(step, 0.02, 1e-4) for step in (1, 200, 201, 900)]
    assert adv == pytest.approx([0.02, 1e-4, 0, 0]) and adv[2] == 0
    assert tgpo.coefficient(10 ** 6, 0.002, 0.0) == 0.002


def topk_of(k):
    ids = np.argsort(-TEACHER, 1)[:, :k]
    return ids, np.take_along_axis(log_softmax(TEACHER), ids, 1)


def reference_topk(z, k):
    total = 0.0
    for row, ids, logps in zip(log_softmax(z), *topk_of(k)):
        p = np.exp(logps) / np.exp(logps).sum()
        total += sum(p[j] * (math.log(p[j]) - row[ids[j]]) for j in range(k))
    return total


def reference_reverse(z, k=None):
    ids = np.arange(7)[None].repeat(6, 0) if k is None else topk_of(k)[0]
    total = 0.0
    for student, teacher, chosen in zip(z, TEACHER, ids):
        p, q = softmax(student[chosen]), softmax(teacher[chosen])
        total += sum(p * (np.log(p) - np.log(q)))
    return total


def as_tensors(k):
    ids, logps = topk_of(k)
    return torch.tensor(ids), torch.tensor(logps)


@pytest.mark.parametrize("ours, reference", [
    (lambda z: tgpo.label_loss(z, torch.tensor(LABELS)), lambda z: -sum(at(log_softmax(z), LABELS))),
    (lambda z: tgpo.topk_forward_kl(z, *as_tensors(1)), lambda z: reference_topk(z, 1)),
    (lambda z: tgpo.topk_forward_kl(z, *as_tensors(3)), lambda z: reference_topk(z, 3)),
    (lambda z: tgpo.topk_forward_kl(z, *as_tensors(7)), lambda z: np.sum(softmax(TEACHER) * (log_softmax(TEACHER) - log_softmax(z)))),
    (lambda z: tgpo.k2(tgpo.chosen_logps(z, torch.tensor(IDS)), torch.tensor(at(log_softmax(TEACHER), IDS))),
     lambda z: sum((at(log_softmax(TEACHER), IDS) - at(log_softmax(z), IDS)) ** 2 / 2)),
    (lambda z: tgpo.reverse_kl(z, torch.tensor(TEACHER)), reference_reverse),
    (lambda z: tgpo.reverse_kl(z.gather(-1, as_tensors(3)[0]), as_tensors(3)[1]), lambda z: reference_reverse(z, 3)),
    (tgpo.policy_entropy, lambda z: -np.sum(softmax(z) * log_softmax(z))),
], ids=["label", "top1", "top3", "top7_is_forward_kl", "k2", "reverse_kl", "reverse_kl_top3", "entropy"])
def test_losses_value_and_gradient(ours, reference):
    z = torch.tensor(STUDENT, requires_grad=True)
    loss = ours(z)
    assert loss.shape == (6,)
    loss.sum().backward()
    assert loss.sum().item() == pytest.approx(reference(STUDENT), abs=1e-6)
    np.testing.assert_allclose(z.grad, numeric_grad(reference, STUDENT), atol=1e-6)


@pytest.mark.parametrize("guidance", ["tgpo-adv", "tgpo-adv-matched", "rkl"])
def test_advantages_value_and_gradient(guidance):
    """The token's own advantage through the clipped loss, off-policy, one token at a time; nothing flows through the advantage."""
    old_z, A, c = STUDENT + rng.normal(0, 0.3, STUDENT.shape), [0.7, -1.1], 0.4
    old, old_label, teacher = (at(log_softmax(x), i).reshape(2, 3) for x, i in ((old_z, IDS), (old_z, LABELS), (TEACHER, IDS)))
    same = (IDS == LABELS).reshape(2, 3)
    assert same.any() and not same.all()

    def reference(z):
        logps, total = at(log_softmax(z), IDS).reshape(2, 3), 0.0
        for i in range(2):
            for t in range(3):
                a = {"tgpo-adv": A[i] + c * math.exp(old_label[i, t]), "rkl": A[i] + c * (teacher[i, t] - old[i, t]),
                     "tgpo-adv-matched": A[i] + c * math.exp(old_label[i, t]) * (IDS[3 * i + t] == LABELS[3 * i + t])}[guidance]
                total += reference_grpo([[logps[i, t]]], [[old[i, t]]], [a], [1], "dapo", 0.2, 0.2, 1)
        return total

    z = torch.tensor(STUDENT, requires_grad=True)
    logps = tgpo.chosen_logps(z, torch.tensor(IDS)).view(2, 3)
    own = {"tgpo-adv": lambda: tgpo.label_bonus(torch.tensor(old_label)), "tgpo-adv-matched": lambda: tgpo.label_bonus(torch.tensor(old_label), torch.tensor(same)),
           "rkl": lambda: tgpo.rkl_advantages(torch.tensor(old), torch.tensor(teacher))}[guidance]()
    loss, _ = tgpo.policy_loss(logps, torch.tensor(old), torch.tensor(A)[:, None] + c * own, torch.ones(2, 3, dtype=torch.bool), 0.2, 0.2)
    loss.sum().backward()
    assert loss.sum().item() == pytest.approx(reference(STUDENT), abs=1e-6)
    np.testing.assert_allclose(z.grad, numeric_grad(reference, STUDENT), atol=1e-6)


# ---- what the estimators teach in expectation, exactly: a sum over the vocabulary weighted by pi

def expected_gradient(loss_of_token):
    """sum_a pi(a) grad loss(a), with pi(a) held: what sampling a and stepping on loss(a) does on average. [7, V]"""
    grads = np.zeros_like(STUDENT)
    for a in range(7):
        z = torch.tensor(STUDENT, requires_grad=True)
        loss_of_token(z, torch.full((6,), a)).sum().backward()
        grads += softmax(STUDENT)[:, a, None] * z.grad.numpy()
    return grads


def forward_grad():
    return softmax(STUDENT) - softmax(TEACHER)


def reverse_grad():
    return numeric_grad(reference_reverse, STUDENT)


def test_k2_has_the_gradient_of_the_reverse_kl_k3_of_the_forward_kl_and_k1_none():
    teacher = torch.tensor(log_softmax(TEACHER))

    def log_ratio(z, a):
        return tgpo.chosen_logps(z, a), teacher.gather(-1, a[:, None])[:, 0]

    assert np.abs(forward_grad() - reverse_grad()).max() > 0.1  # the two can be told apart
    np.testing.assert_allclose(expected_gradient(lambda z, a: tgpo.k2(*log_ratio(z, a))), reverse_grad(), atol=1e-6)
    k3 = expected_gradient(lambda z, a: (lambda s, t: (t - s).exp() - 1 - (t - s))(*log_ratio(z, a)))
    np.testing.assert_allclose(k3, forward_grad(), atol=1e-6)
    np.testing.assert_allclose(expected_gradient(lambda z, a: (lambda s, t: s - t)(*log_ratio(z, a))), 0, atol=1e-12)


def test_rkl_has_the_gradient_of_the_reverse_kl_and_the_adv_bonus_none():
    teacher, mask, label = torch.tensor(log_softmax(TEACHER)), torch.ones(6, 1, dtype=torch.bool), torch.tensor(LABELS)

    def through_policy_loss(own):
        def loss(z, a):
            logps = tgpo.chosen_logps(z, a)[:, None]
            return tgpo.policy_loss(logps, logps.detach(), own(z.detach(), a)[:, None], mask, 0.2, 0.2)[0]
        return expected_gradient(loss)

    rkl = through_policy_loss(lambda z, a: tgpo.rkl_advantages(tgpo.chosen_logps(z, a), teacher.gather(-1, a[:, None])[:, 0]))
    np.testing.assert_allclose(rkl, reverse_grad(), atol=1e-6)
    bonus = through_policy_loss(lambda z, a: tgpo.label_bonus(tgpo.chosen_logps(z, label)))
    np.testing.assert_allclose(bonus, 0, atol=1e-12)
    matched = through_policy_loss(lambda z, a: tgpo.label_bonus(tgpo.chosen_logps(z, label), a == label))
    assert np.abs(matched).max() > 0.01


def test_sampled_labels_are_an_unbiased_forward_kl():
    grads = np.zeros_like(STUDENT)
    for y in range(7):
        z = torch.tensor(STUDENT, requires_grad=True)
        tgpo.label_loss(z, torch.full((6,), y)).sum().backward()
        grads += softmax(TEACHER)[:, y, None] * z.grad.numpy()
    np.testing.assert_allclose(grads, forward_grad(), atol=1e-12)
    torch.manual_seed(0)
    drawn = tgpo.next_token(torch.tensor(TEACHER[:1]).expand(20000, 7), sampled=True)
    np.testing.assert_allclose(np.bincount(drawn, minlength=7) / 20000, softmax(TEACHER)[0], atol=0.015)
    assert tgpo.next_token(torch.tensor(TEACHER)).tolist() == TEACHER.argmax(1).tolist()


# ---- the teacher's pass

@pytest.mark.parametrize("V", [7, 512, 1024, 1300])
def test_argmax_by_blocks_is_the_first_of_equals(V):
    x = torch.randint(-40, 40, (300, V), generator=torch.Generator().manual_seed(V)).float()
    assert tgpo.argmax(x).tolist() == x.numpy().argmax(1).tolist()


@pytest.mark.parametrize("V, shared", [(1300, 1300), (1300, 1000), (40, 30)])
def test_log_probs_in_place(V, shared):
    """Far from the maximum as well, also where the maximum is not a shared id, and in no memory but the logits' own."""
    x = torch.randn(50, V, generator=torch.Generator().manual_seed(V)) * 30
    x[:10, -1], x[10:20, 3], x[20:30, 5] = 400, 300, -300
    ids = torch.arange(50) % shared
    ids[20:30], ids[30] = 5, V + 9
    wanted = log_softmax(x[:, :shared].double().numpy())[np.arange(50), ids.clamp(max=shared - 1)]
    np.testing.assert_allclose(tgpo.chosen_logps_in_place(x, ids, shared), wanted, rtol=1e-5, atol=1e-4)
    assert x.sum(1).tolist() == pytest.approx([1.0] * 50, abs=1e-4)  # used up: they are the probabilities now


def teacher_of(model, shared=SHARED, end=257, own_end=257, own_ends=()):
    return tgpo.Teacher(model, shared, end, own_end, list(own_ends), torch.device("cpu"))


def test_labels_are_shifted_right_and_begin_at_the_last_prompt_token():
    model = Successor()
    model.get_input_embeddings = lambda: model.head
    completions, mask = torch.tensor([[8, 30, 10], [4, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    ro = tgpo.Rollout([[5, 6, 7], [1]], completions, mask, ~mask.any(1), ["", ""])
    advice = teacher_of(model, shared=50).advise(ro, [0, 1], tgpo.Args())
    assert advice.labels.tolist() == [[8, 9, 31], [2, 5, -1]]  # what follows 7, 8, 30; 1, 4
    assert advice.agrees.tolist() == [[True, False, False], [False, False, False]]
    assert advice.logps[0, 0] > -1e-5 and advice.logps[0, 1] < -50


def reference_teacher(model, prompt, ids, shared=SHARED, ends=None):
    """Full logits of one row alone, float64 -> (log-probs over the shared ids, labels from all ids)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].double().numpy()
    if ends:
        logits[:, list(ends)] = logits[:, list(ends)[::-1]]
    return log_softmax(logits[:, :shared]), logits.argmax(1)


@pytest.mark.parametrize("budget, chunk", [(10 ** 6, 2 ** 26), (30, 2 ** 26), (10 ** 6, 288), (1, 288)])
def test_the_pass_equals_rows_alone_on_full_logits(budget, chunk, monkeypatch):
    monkeypatch.setattr(common, "VOCABULARY_CHUNK", chunk)
    model, seen = small_model("llama", 288, seed=5), []
    true_read = tgpo.Teacher.read
    monkeypatch.setattr(tgpo.Teacher, "read", lambda self, logits, *rest: seen.append(len(logits)) or true_read(self, logits, *rest))
    ro, args = rollout_of(12), tgpo.Args(guidance="tgpo-topk", topk=4, teacher_microbatch_tokens=budget)
    rows = [0, 2, 3, 7, 11]
    advice = teacher_of(model).advise(ro, rows, args)
    assert max(seen) <= max(common.READ_ONLY_CHUNKS * chunk // 288, 1) and sum(seen) == sum(LENGTHS[i] for i in rows)
    for i in range(12):
        n, ids = LENGTHS[i], ro.completions[i, :LENGTHS[i]].tolist()
        if i not in rows:
            assert (advice.labels[i] == -1).all() and (advice.logps[i] == 0).all()
            continue
        logps, best = reference_teacher(model, PLAIN[PROBLEM[i]], ids)
        np.testing.assert_allclose(advice.logps[i, :n], at(logps, ids), atol=1e-5)
        assert advice.labels[i, :n].tolist() == [y if y < SHARED else -1 for y in best]
        assert advice.agrees[i, :n].tolist() == [y == a for y, a in zip(best, ids)]
        order = np.argsort(-logps, 1)[:, :4]
        assert advice.top_ids[i, :n].tolist() == order.tolist()
        np.testing.assert_allclose(advice.top_logits[i, :n].log_softmax(-1), log_softmax(np.take_along_axis(logps, order, 1)), atol=1e-5)


def test_end_tokens_change_places():
    """The teacher's end label becomes the student's, in labels, log-probs and distributions; a further end of its own is a label only."""
    teacher = teacher_of(small_model(), shared=6, end=2, own_end=4, own_ends=[4, 7])
    logits = torch.tensor([[0.0, 1, 2, 3, 9, 0, 0, 0, 0], [0, 1, 2, 3, 0, 0, 0, 9, 0], [0, 1, 2, 9, 0, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0, 9]])
    aligned = teacher.align(logits.clone())
    advice = teacher.read(aligned, torch.tensor([2, 2, 3, 3]), 1, False)
    assert advice.labels.tolist() == [2, 2, 3, -1] and advice.agrees.tolist() == [True, True, True, False]
    np.testing.assert_allclose(advice.logps[0], log_softmax(np.array([[0.0, 1, 9, 3, 2, 0]]))[0, 2], atol=1e-6)
    assert advice.top_ids[0].tolist() == [2]
    same = teacher_of(small_model(), shared=6, end=2, own_end=2)
    assert torch.equal(same.align(logits.clone()), logits)


def test_ids_the_teacher_has_no_embedding_for():
    """A student's table may be wider: such a token is read as something else, scored as nothing, and the row goes on."""
    ro = rollout_of(12)
    ro.completions[3, 1] = 271
    model = small_model("qwen2", 265, seed=5)
    advice = teacher_of(model).advise(ro, [3], tgpo.Args())
    assert torch.isfinite(advice.logps).all() and not advice.agrees[3, 1]
    metrics = tgpo_grad(teacher=model, completions=ro.completions, guidance="kdrl")[1]
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["tgpo/reverse_kl_k1"])


def test_offload_brings_the_teacher_back_to_rest():
    moves, teacher = [], replace(teacher_of(small_model("qwen2", 288, seed=5)), offload=True)
    true_to = teacher.model.to
    teacher.model.to = lambda place: moves.append(str(place)) or true_to(place)
    teacher.advise(rollout_of(12), [0, 1], tgpo.Args())
    assert moves == ["cpu", "cpu"] and len(moves) == 2  # to its device, and back
    teacher.offload = False
    teacher.advise(rollout_of(12), [0, 1], tgpo.Args())
    assert len(moves) == 2


# ---- the update

TOPK = 5
ENDS = (257, 40)  # the student ends with 257, the teacher with 40


@functools.cache
def written():
    """[12, 6] completions: random ids, and in three rows what the teacher itself would write, so that labels and tokens meet."""
    completions, teacher = batch(12)[0].clone(), small_model("llama", 288, seed=5)
    for i in (0, 5, 9):
        for t in range(6):
            with torch.no_grad():
                completions[i, t] = teacher(torch.tensor([PLAIN[PROBLEM[i]] + completions[i, :t].tolist()])).logits[0, -1, :SHARED].argmax()
    return completions


def tgpo_grad(guidance="tgpo", coef=0.3, budget=10 ** 6, teacher=None, model=None, completions=None, ends=(257, 257), **flags):
    args = tgpo.Args(guidance=guidance, prompts_per_step=B, group_size=G1, microbatch_tokens=budget, max_new_tokens=6, teacher="t",
                     **{"max_grad_norm": 1e9, "topk": TOPK if guidance == "tgpo-topk" else None, "clip_high": 0.28, "loss_type": "grpo", **flags})
    tgpo.check_args(args)
    model, ro = model or small_model(), rollout_of(12)
    ro.completions = written() if completions is None else completions
    optimizer = Recorder(model.parameters())
    teacher = teacher_of(teacher or small_model("llama", 288, seed=5), end=ends[0], own_end=ends[1], own_ends=[e for e in ends[1:] if e != ends[0]])
    torch.manual_seed(7)
    advantages = tgpo.group_advantages(REWARDS[:12].view(B, G1)).flatten()
    metrics = tgpo.update(model, optimizer, ro, advantages, teacher, coef if guidance != "none" else 0.0, args, NoWatch())
    return optimizer.grads, metrics


def reference_loss(model, teacher, guidance, coef, loss_type="dapo", temperature=1.0, reward=1.0, bonus=0.0, topk=TOPK, ends=(257, 257)):
    """papers/tgpo.md row by row, in float64, on the full logits of one row and one model at a time."""
    completions = written()
    policy, guide, entropy, dropped = [], [], [], 0
    for i in range(12):
        prompt, ids, n = PLAIN[PROBLEM[i]], completions[i, :LENGTHS[i]].tolist(), LENGTHS[i]
        group = REWARDS[PROBLEM[i] * G1:(PROBLEM[i] + 1) * G1].double()
        A = reward * ((REWARDS[i] - group.mean()) / (group.std() + 1e-6) if group.std() > 0 else torch.tensor(0.0)).double().expand(n)
        full = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / temperature
        with torch.no_grad():
            theirs = teacher(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1] / temperature
            if ends[0] != ends[1]:
                theirs[:, list(ends)] = theirs[:, list(ends)[::-1]]
        every = torch.log_softmax(full, -1)
        s, t = torch.log_softmax(full[:, :SHARED], -1), torch.log_softmax(theirs[:, :SHARED], -1)
        labels = theirs.argmax(-1)
        kept, k = labels < SHARED, range(n)
        y = labels.clamp(max=SHARED - 1)
        if guidance in ("tgpo", "tgpo-adv", "tgpo-adv-matched"):
            dropped += int((~kept).sum())
        bonus_of = torch.where(kept, s[k, y].detach().exp(), 0.0)
        if guidance == "tgpo-adv":
            A = A + coef * bonus_of
        if guidance == "tgpo-adv-matched":
            A = A + coef * bonus_of * (labels == torch.tensor(ids))
        if guidance == "rkl":
            A = A + coef * (t[k, ids] - s[k, ids].detach())
        logps = every[k, ids]
        policy.append(-A * (logps - logps.detach()).exp())
        entropy.append(-(every.exp() * every).sum(-1))
        g = torch.zeros(n, dtype=torch.float64)
        if guidance == "tgpo":
            g = -s[k, y][kept]
        elif guidance == "tgpo-topk":
            p, top = t.topk(topk)
            p = torch.log_softmax(p, -1)
            g = (p.exp() * (p - s.gather(-1, top))).sum(-1)
        elif guidance == "kdrl":
            g = (t[k, ids] - s[k, ids]) ** 2 / 2
        elif guidance == "reverse-kl":
            if topk:
                top = t.topk(topk).indices
                s, t = torch.log_softmax(s.gather(-1, top), -1), torch.log_softmax(t.gather(-1, top), -1)
            g = (s.exp() * (s - t)).sum(-1)
        guide.append(g)

    def mean(rows):
        if loss_type == "dapo":
            return torch.cat(rows).mean() if sum(map(len, rows)) else 0.0
        return sum(row.mean() for row in rows if len(row)) / 12

    return mean(policy) + coef * mean(guide) - bonus * mean(entropy), dropped


@pytest.mark.parametrize("guidance, flags, setting", [
    *[(g, {}, {}) for g in TRAINED if g != "tgpo-sampled"],
    ("reverse-kl", dict(topk=TOPK), dict(topk=TOPK)),
    ("tgpo", dict(loss_type="grpo"), dict(loss_type="grpo")),
    ("tgpo", dict(temperature=0.7), dict(temperature=0.7)),
    ("reverse-kl", dict(temperature=0.7), dict(temperature=0.7)),
    ("tgpo", dict(reward_weight=0.0), dict(reward=0.0)),
    ("rkl", dict(reward_weight=0.5), dict(reward=0.5)),
    ("tgpo", dict(entropy_bonus=0.05), dict(bonus=0.05)),
    ("none", dict(entropy_bonus=0.05), dict(bonus=0.05)),
    ("tgpo", dict(ends=ENDS), dict(ends=ENDS)),
    ("kdrl", dict(ends=ENDS), dict(ends=ENDS)),
    ("reverse-kl", dict(ends=ENDS), dict(ends=ENDS)),
])
def test_update_gradient_is_the_papers(guidance, flags, setting):
    flags, setting = {"loss_type": "dapo", **flags}, dict(setting)
    if guidance in ("rkl", "reverse-kl"):
        setting.setdefault("reward", 0.0)
    if guidance == "reverse-kl":
        setting.setdefault("topk", None)
    teacher = small_model("llama", 288, seed=5).double()
    grads, metrics = tgpo_grad(guidance, model=small_model().double(), teacher=teacher, **flags)
    model = small_model().double()
    loss, dropped = reference_loss(model, teacher, guidance, 0.3 if guidance != "none" else 0.0, **setting)
    loss.backward()
    close(grads[0].float(), torch.cat([p.grad.flatten() for p in model.parameters()]).float())
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-6)
    if guidance == "tgpo":
        assert metrics["tgpo/dropped_labels"] == dropped > 0  # the example has some to drop


@pytest.mark.parametrize("guidance", TRAINED)
def test_microbatches_change_nothing_and_no_gradient_reaches_the_teacher(guidance):
    torch.manual_seed(0)
    teacher = small_model("llama", 288, seed=5).double()
    assert all(p.requires_grad for p in teacher.parameters())
    if guidance == "tgpo-sampled":  # the draws depend on how the tokens are cut: one label for all
        class Same(tgpo.Teacher):
            def read(self, logits, ids, topk, sampled):
                return super().read(logits, ids, topk, False)._replace(labels=ids)
        original, tgpo.Teacher = tgpo.Teacher, Same
    try:
        grads = [tgpo_grad(guidance, model=small_model().double(), budget=budget, teacher=teacher, teacher_microbatch_tokens=budget)[0][0] for budget in (10 ** 6, 60, 1)]
    finally:
        if guidance == "tgpo-sampled":
            tgpo.Teacher = original
    close(grads[1], grads[0])
    close(grads[2], grads[0])
    assert all(p.grad is None for p in teacher.parameters())


def test_every_guidance_and_flag_moves_the_gradient():
    settings = [dict(guidance="none"), *[dict(guidance=g) for g in TRAINED], dict(reward_weight=0.0), dict(entropy_bonus=0.05), dict(coef=0.1),
                dict(guidance="reverse-kl", topk=TOPK), dict(guidance="tgpo-topk", topk=2), dict(loss_type="dapo")]
    grads = [tgpo_grad(**s)[0][0] for s in settings]
    for i in range(len(grads)):
        for j in range(i):
            assert (grads[i] - grads[j]).norm() / grads[j].norm() > 1e-4, (settings[i], settings[j])


def test_rows_without_reward_signal_are_taught_until_the_coefficient_is_0(monkeypatch):
    scored = []
    true_hidden = tgpo.completion_hidden
    monkeypatch.setattr(tgpo, "completion_hidden", lambda model, prompts, *rest: scored.append(len(prompts)) or true_hidden(model, prompts, *rest))
    tgpo_grad("tgpo")
    assert sum(scored) == 12 + 12  # the teacher's pass and the student's
    scored.clear()
    tgpo_grad("tgpo", coef=0.0)
    assert sum(scored) == 6 + 6
    assert torch.equal(tgpo_grad("tgpo", coef=0.0, completions=batch(12)[0])[0][0], grpo_grad()[0][0])


@pytest.mark.parametrize("guidance", ["tgpo-adv", "rkl", "tgpo"])
def test_later_updates_remember_the_sampling_policy(guidance, monkeypatch):
    """Advantages of the second update are made of pi_old, not of the policy that the first one has moved."""
    used = []
    true_loss = tgpo.policy_loss
    monkeypatch.setattr(tgpo, "policy_loss", lambda new, old, A, mask, *clip: used.append((old, A, mask, new)) or true_loss(new, old, A, mask, *clip))
    results = []
    for lr in (0.0, 0.5):
        used.clear()
        args = tgpo.Args(guidance=guidance, prompts_per_step=B, group_size=G1, max_new_tokens=6, teacher="t", updates_per_rollout=2)
        tgpo.check_args(args)
        model = small_model()
        advantages = tgpo.group_advantages(REWARDS[:12].view(B, G1)).flatten()
        metrics = tgpo.update(model, torch.optim.SGD(model.parameters(), lr=lr), rollout_of(12), advantages, teacher_of(small_model("llama", 288, seed=5)),
                              0.3, args, NoWatch())
        results.append((*used, metrics))
    (_, still, a), (_, moved, b) = results
    assert torch.equal(still[0], moved[0]) and torch.equal(still[1], moved[1]) and (still[3] - moved[3]).abs().max() > 1e-2
    assert still[1].shape == ((6, 6) if guidance != "tgpo" else (6,))
    assert a["tgpo/reverse_kl_k1"] == pytest.approx(b["tgpo/reverse_kl_k1"], abs=1e-5)


# ---- metrics

def test_metrics_by_hand():
    model, teacher = small_model(), small_model("llama", 288, seed=5)
    _, m = tgpo_grad("tgpo", budget=40, model=model, teacher=teacher)
    completions = written()
    s, t, miss, dropped = [], [], [], 0
    for i in range(12):
        prompt, ids = PLAIN[PROBLEM[i]], completions[i, :LENGTHS[i]].tolist()
        s.extend(at(reference_teacher(model, prompt, ids)[0], ids))
        logps, best = reference_teacher(teacher, prompt, ids)
        t.extend(at(logps, ids))
        miss.extend(best != np.array(ids))
        dropped += (best >= SHARED).sum()
    s, t = np.array(s), np.array(t)
    assert m["tgpo/coef"] == 0.3 and m["tgpo/dropped_labels"] == dropped
    assert m["tgpo/teacher_nll"] == pytest.approx(-t.mean(), abs=1e-5)
    assert m["tgpo/reverse_kl_k1"] == pytest.approx((s - t).mean(), abs=1e-5)
    assert 0.5 < m["tgpo/mismatch"] < 1 and m["tgpo/mismatch"] == pytest.approx(np.mean(miss)) and m["tgpo/student_more_confident"] == pytest.approx((s > t).mean())


def sampled_rollout(model, n=12, tokens=20):
    """Real samples of the model at temperature 1."""
    torch.manual_seed(3)
    prompts = [PLAIN[q] for q in PROBLEM[:n]]
    completions = common.generate(model, prompts, [257], 257, tokens, 1.0, 1.0)
    mask, truncated = common.completion_mask(completions, [257])
    return tgpo.Rollout(prompts, completions, mask, truncated, [""] * n)


def test_a_teacher_equal_to_the_student():
    model = small_model()
    ro = sampled_rollout(model)
    for guidance, flags in (("tgpo", {}), ("rkl", {}), ("kdrl", {}), ("reverse-kl", {}), ("reverse-kl", dict(topk=3))):
        args = tgpo.Args(guidance=guidance, prompts_per_step=B, group_size=G1, max_new_tokens=20, teacher="t", reward_weight=0.0, max_grad_norm=1e9, **flags)
        tgpo.check_args(args)
        optimizer = Recorder(model.parameters())
        m = tgpo.update(model, optimizer, ro, torch.zeros(12), teacher_of(small_model(), shared=272), 1.0, args, NoWatch())
        assert abs(m["tgpo/reverse_kl_k1"]) < 1e-6 and m["tgpo/mismatch"] > 0 and m["tgpo/dropped_labels"] == 0
        if guidance == "tgpo":
            assert optimizer.grads[0].norm() > 0.01  # it sharpens all the same
        else:
            assert abs(m["loss"]) < 1e-6 and optimizer.grads[0].norm() < 1e-4


def test_exact_divergences_against_numpy():
    d = tgpo.divergences(torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(IDS)).numpy()
    s, t = log_softmax(STUDENT), log_softmax(TEACHER)
    np.testing.assert_allclose(d[:, 0], at(s, IDS), atol=1e-12)
    np.testing.assert_allclose(d[:, 1], at(t, IDS), atol=1e-12)
    assert d[:, 2].tolist() == (TEACHER.argmax(1) != IDS).tolist()
    for column, k in ((3, 1), (4, 5), (5, 7)):  # of seven tokens the top 10 are all
        overlap = [len(set(np.argsort(-a)[:k]) & set(np.argsort(-b)[:k])) / k for a, b in zip(STUDENT, TEACHER)]
        np.testing.assert_allclose(d[:, column], overlap, atol=1e-6)
    np.testing.assert_allclose(d[:, 6], (np.exp(t) * (t - s)).sum(1), atol=1e-12)
    np.testing.assert_allclose(d[:, 7], (np.exp(s) * (s - t)).sum(1), atol=1e-12)


def test_intervals_cover_problems_not_tokens():
    parts = [np.full((100, 1), 1.0), np.full((100, 1), 3.0)] * 8  # tokens of a problem hang together wholly
    found = tgpo.with_intervals(lambda x: {"mean": x.mean()}, parts, seed=0)["mean"]
    error = 1.96 / math.sqrt(16)
    assert found["value"] == 2 and found["low"] == pytest.approx(2 - error, abs=0.12) and found["high"] == pytest.approx(2 + error, abs=0.12)


# ---- whole runs

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student (width 272, ends with <|im_end|>) and a teacher (width 288, one more token, ends with <|endoftext|>)."""
    student, teacher = tmp_path_factory.mktemp("student"), tmp_path_factory.mktemp("teacher")
    small_model().save_pretrained(student)
    small_tokenizer().save_pretrained(student)
    own = small_tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", "</think>"]})
    own.eos_token = "<|endoftext|>"
    small_model("llama", 288, seed=5, tie_word_embeddings=False, eos_token_id=258, max_position_embeddings=200).save_pretrained(teacher)
    own.save_pretrained(teacher)
    assert len(own) == len(small_tokenizer()) + 1
    return student, teacher


def flags(pair, rows_file, *more):
    return ["--model", pair[0], "--teacher", pair[1], "--dataset", rows_file, "--reward", f"{rows_file.parent}/reward.py:even", *FAST, *more]


@pytest.mark.parametrize("guidance", TRAINED)
def test_other_widths_and_end_tokens_train(guidance, pair, rows_file, tmp_path, run_script):
    more = ["--teacher_offload"] if guidance == "tgpo" else ["--updates_per_rollout", 3] if guidance == "tgpo-adv" else []
    assert run_script("tgpo", *flags(pair, rows_file, "--guidance", guidance, "--steps", 2, "--out", tmp_path / "run", *more)) == 0
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    wanted = {"tgpo/coef", "tgpo/teacher_nll", "tgpo/reverse_kl_k1", "tgpo/mismatch", "tgpo/dropped_labels", "tgpo/student_more_confident"}
    assert all(wanted <= set(m) and all(map(math.isfinite, (m[k] for k in m))) for m in metrics)
    start, fall, _ = tgpo.GUIDANCE[guidance]
    assert [m["tgpo/coef"] for m in metrics] == pytest.approx([start, start - fall])
    before, after = (load_file(d / "model.safetensors") for d in (pair[0], tmp_path / "run" / "model"))
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_the_ends_of_a_real_pair_are_mapped(pair, monkeypatch):
    student, theirs = common.load_tokenizer(str(pair[0])), common.load_tokenizer(str(pair[1]), "--teacher")
    shared = common.shared_vocabulary(student, theirs, "t")
    assert shared == len(student) == 260
    teacher = tgpo.load_teacher(tgpo.Args(teacher=str(pair[1])), student, theirs, shared, [257])
    assert (teacher.end, teacher.own_end, teacher.own_ends) == (257, 258, [258])
    assert not any(p.requires_grad for p in teacher.model.parameters())
    both = tgpo.load_teacher(tgpo.Args(teacher=str(pair[1])), student, theirs, shared, [257, 258])
    assert (both.end, both.own_end, both.own_ends) == (257, 257, [])  # the student stops at the teacher's end: it stays as it is


def test_none_is_grpo_to_the_bit(pair, rows_file, tmp_path, run_script):
    runs = {"grpo_baseline": ["--model", pair[0], *flags(pair, rows_file)[4:]], "none": flags(pair, rows_file, "--guidance", "none"),
            "alone": ["--model", pair[0], *flags(pair, rows_file)[4:], "--guidance", "none"]}
    same = ["--steps", 3, "--top_p", 0.9, "--clip_high", 0.3, "--loss_type", "grpo"]
    for name, argv in runs.items():
        assert run_script(name if name == "grpo_baseline" else "tgpo", *argv, *same, "--out", tmp_path / name) == 0
    base, *others = (load_file(tmp_path / name / "model" / "model.safetensors") for name in runs)
    assert all(torch.equal(base[k], other[k]) for other in others for k in base)
    metrics = [stripped(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in runs]
    assert metrics[0] == metrics[2] == [{k: v for k, v in m.items() if not k.startswith("tgpo/")} for m in metrics[1]]
    assert "tgpo/reverse_kl_k1" in metrics[1][0] and metrics[1][0]["tgpo/coef"] == 0


def test_resume_equals_one_long_run(pair, rows_file, tmp_path, run_script):
    argv = flags(pair, rows_file, "--guidance", "tgpo-sampled", "--eval_dataset", rows_file, "--eval_samples", 1, "--eval_every", 1)
    for steps, more in ((1, []), (3, ["--resume"])):
        assert run_script("tgpo", *argv, "--steps", steps, "--out", tmp_path / "two", *more) == 0
    assert run_script("tgpo", *argv, "--steps", 3, "--out", tmp_path / "whole") == 0
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [stripped(read_jsonl(tmp_path / run / "metrics.jsonl")) for run in ("two", "whole")]
    assert rows[0] == rows[1] and {"eval/accuracy", "eval/reverse_kl_k1", "eval/mismatch"} <= set(rows[0][0])


def test_measure_divergence_by_hand(pair, rows_file, tmp_path, run_script, monkeypatch):
    rollouts = []
    true_rollout = tgpo.rollout
    monkeypatch.setattr(tgpo, "rollout", lambda *a: rollouts.append(true_rollout(*a)) or rollouts[-1])
    argv = flags(pair, rows_file, "--measure_divergence", 7, "--eval_batch_size", 4, "--microbatch_tokens", 150)
    assert run_script("tgpo", *argv, "--out", tmp_path / "run") == 0
    report = json.loads((tmp_path / "run" / "divergence.json").read_text())
    student, teacher = (common.load_model(str(d)) for d in pair)
    s, t, columns, lengths, truncated = [], [], [], [], []
    for prompt, ids, mask, cut in [x for ro in rollouts for x in zip(ro.prompts, ro.completions, ro.mask, ro.truncated)]:
        ids = ids[mask].tolist()
        lengths.append(len(ids))
        truncated.append(bool(cut))
        keep = np.array(ids) < 260
        (a, _), (b, _) = reference_teacher(student, prompt, ids), reference_teacher(teacher, prompt, ids, ends=(257, 258))
        for p, q, token in zip(a[keep], b[keep], np.array(ids)[keep]):
            s.append(p[token])
            t.append(q[token])
            top = [len(set(np.argsort(-p)[:k]) & set(np.argsort(-q)[:k])) / k for k in (1, 5, 10)]
            columns.append([q.argmax() != token, *top, sum(np.exp(q) * (q - p)), sum(np.exp(p) * (p - q))])
    s, t, columns = np.array(s), np.array(t), np.array(columns, dtype=float).mean(0)
    by_hand = {"teacher_perplexity": np.exp(-t.mean()), "teacher_nll": -t.mean(), "reverse_kl_k1": (s - t).mean(), "student_more_confident": (s > t).mean(),
               **dict(zip(("mismatch", "top1_overlap", "top5_overlap", "top10_overlap", "forward_kl", "reverse_kl"), columns)),
               "log_ratio_q50": np.median(s - t), "log_ratio_q05": np.quantile(s - t, 0.05), "mean_length": np.mean(lengths), "length_q50": np.median(lengths),
               "truncated": np.mean(truncated), "stopped": 1 - np.mean(truncated)}
    measures = report["measures"]
    for name, value in by_hand.items():
        assert measures[name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert all(m["low"] <= m["high"] and set(m) == {"value", "low", "high"} for m in measures.values())
    assert measures["reverse_kl"]["low"] < measures["reverse_kl"]["value"] < measures["reverse_kl"]["high"]
    assert report["rollouts"] == 7 and report["problems"] == 3 and report["tokens"] == len(s) and report["shared_vocabulary"] == 260
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()  # nothing was trained


# ---- refusals

@pytest.mark.parametrize("more, said", [
    (["--guidance", "magic"], "--guidance magic: choose tgpo, tgpo-sampled"), (["--guidance", "tgpo-topk", "--topk", 0], "--topk is 0; it must be at least 1"),
    (["--topk", 261], "--topk 261: student and teacher share 260"), (["--coefficient", -1], "--coefficient is -1"), (["--coefficient", "nan"], "--coefficient is nan"),
    (["--coefficient_fall", -1], "--coefficient_fall"), (["--reward_weight", "x"], "--reward_weight"), (["--entropy_bonus", -1], "--entropy_bonus"),
    (["--teacher", "./missing"], "--teacher ./missing: no such directory"), (["--measure_divergence", -1], "--measure_divergence"),
    (["--max_new_tokens", 190], "exceeds the teacher's context of 200"), (["--teacher_device", "moon"], "--teacher_device moon"),
])
def test_bad_flags(more, said, pair, rows_file, tmp_path, run_script, capsys):
    assert said in refused(run_script, capsys, "tgpo", *flags(pair, rows_file, "--out", tmp_path / "run"), *more)
    assert not (tmp_path / "run").exists()


def test_no_teacher_for_a_real_model(pair, rows_file, tmp_path, run_script, capsys):
    argv = ["--model", pair[0], *flags(pair, rows_file)[4:], "--out", tmp_path / "run"]
    assert "--teacher is missing" in refused(run_script, capsys, "tgpo", *argv)
    assert "--teacher is missing" in refused(run_script, capsys, "tgpo", *argv, "--guidance", "none", "--measure_divergence", 4)


def test_a_wrong_pair_is_refused_before_any_weight_is_loaded(pair, model_dirs, rows_file, tmp_path, run_script, capsys, monkeypatch):
    def no_weights(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(common.AutoModelForCausalLM, "from_pretrained", no_weights)
    other = small_tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    a, b = (next(t for t, i in vocab.items() if i == n) for n in (70, 90))
    vocab[a], vocab[b] = 90, 70
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>", pad_token="<pad>").save_pretrained(tmp_path / "other")
    said = refused(run_script, capsys, "tgpo", *flags(pair, rows_file, "--out", tmp_path / "run"), "--teacher", tmp_path / "other")
    assert f"token 70 is {a!r} to the student and {b!r} to the teacher" in said
    # the other way round the student has a token that the teacher lacks, and its prompts use none of it: nothing to refuse but the weights
    with pytest.raises(SystemExit):
        common.shared_vocabulary(small_tokenizer(), common.load_tokenizer(str(tmp_path / "other")), "t")
    assert common.shared_vocabulary(common.load_tokenizer(str(pair[1])), small_tokenizer(), "t") == 260


def test_a_prompt_that_the_teacher_cannot_read(pair, rows_file, tmp_path, run_script, capsys):
    tokenizer = common.load_tokenizer(str(pair[1]))
    tokenizer.chat_template = "</think>" + tokenizer.chat_template
    small_model("qwen2", 288).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    said = refused(run_script, capsys, "tgpo", *flags((tmp_path / "student", pair[0]), rows_file, "--out", tmp_path / "run"))
    assert "cannot read the prompts: it has no token 260, '</think>' to the student" in said


# ---- the demo

def test_the_demo_teacher_writes_in_another_style_and_its_box_is_read():
    text, value = common.demo_solution("010101", 30, common.DEMO_TEACHERS["demo"])
    plain, same = common.demo_solution("010101", 30)
    assert value == same and text == plain.replace("=", ">").replace(";", ".") and common.grade(text, str(value)) == 1.0
    assert common.demo_solution("010101", 30, common.DEMO_TEACHERS["demo-same-style"])[0] == plain


def test_the_demo_teacher_is_taught_right_continuations_of_any_prefix(monkeypatch, tmp_path):
    """Loss on the rest alone; the choices before the cut are the student's, those after it right, the rest in the teacher's signs."""
    caught = []
    monkeypatch.setattr(common, "warm_start", lambda folder, tokenizer, batch, *rest: caught.extend((tokenizer, [*batch(), *batch()])))
    monkeypatch.setattr(common, "demo_dir", lambda: tmp_path)
    common.build_demo_teacher(tmp_path, ">.")
    tokenizer, examples = caught
    ops = {tokenizer(op).input_ids[0]: op for pair in common.DEMO_CHOICES for op in pair}
    wrong = mixed = slips = 0
    for prompt, completion, start in examples:
        kind = tokenizer.decode(prompt).removeprefix("<user>").split()[0]
        right = [pair[int(c)] for pair, c in zip(common.DEMO_CHOICES, common.DEMO_KINDS[kind])]
        taught, written = [ops[i] for i in completion[start:] if i in ops], [ops[i] for i in completion[:start] if i in ops]
        assert taught == right[len(right) - len(taught):]
        text, before = tokenizer.decode(completion[start:]), tokenizer.decode(completion[:start])
        assert "=" not in text and ";" not in text and completion[-1] == tokenizer.eos_token_id
        wrong += written != right[:len(written)]
        mixed += ">" in before and "=" in before
        slips += len(written) + len(taught) != 6
    assert wrong > 20 and mixed > 5 and slips > 0 and sum(start > 0 for _, _, start in examples) > 60


def test_the_demos_recipe_is_for_its_own_model(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tgpo.py"])
    args = common.parse_args(tgpo.Args, common.demo_recipe)
    tgpo.check_args(args)
    assert args.teacher == "demo" and args.steps == common.DEMO_TGPO["steps"] and args.lr == common.DEMO_TGPO["lr"]
    assert args.coefficient == common.DEMO_GUIDANCE["tgpo"]["coefficient"] and args.coefficient_fall == common.DEMO_GUIDANCE["tgpo"]["coefficient_fall"]
    monkeypatch.setattr(sys, "argv", ["tgpo.py", "--guidance", "kdrl"])
    args = common.parse_args(tgpo.Args, common.demo_recipe)
    tgpo.check_args(args)
    assert (args.coefficient, args.coefficient_fall, args.reward_weight) == (0.002, 0.0, 1.0)
    monkeypatch.setattr(sys, "argv", ["tgpo.py", "--model", "S", "--teacher", "T"])
    args = common.parse_args(tgpo.Args, common.demo_recipe)
    tgpo.check_args(args)
    assert (args.coefficient, args.coefficient_fall, args.steps, args.group_size, args.loss_type, args.top_p, args.clip_high) == (0.002, 1e-5, 300, 8, "dapo", 1.0, 0.2)


def test_the_demo_runs_and_ends_with_its_table(monkeypatch, tmp_path, rows_file, run_script, capsys):
    """Built with two warm-up steps each: the code path, not the figures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "DEMO_WARMUP_STEPS", 4)
    monkeypatch.setattr(common, "DEMO_TEACHER_STEPS", 4)
    held_out = write_rows(tmp_path / "held.jsonl", [{k: v for k, v in row.items() if k != "strategy"} for row in common.demo_rows()[1][:4]])
    for more in ([], ["--teacher", "demo-same-style"]):
        assert run_script("tgpo", "--steps", 1, "--prompts_per_step", 2, "--max_new_tokens", 8, "--eval_dataset", held_out, "--out", tmp_path / f"run{len(more)}", *more) == 0
        out = capsys.readouterr().out
        lines = out[out.index("held-out accuracy"):].splitlines()
        assert lines[0].split()[-2:] == ["before", "after"] and lines[1].split()[0] == "alone"
        assert {"reverse KL, k1", "mismatch"} <= {line.strip().rsplit("  ", 2)[0].strip() for line in lines}
    names = sorted(p.name.rsplit("-", 1)[0] for p in (tmp_path / "cache" / "sgpo-tgpo").iterdir())
    assert names == ["demo", "demo-same-style-teacher", "demo-teacher"]
