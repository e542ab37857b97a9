"""tgpo.py: losses and whole updates against float64 references, other vocabularies, the demo."""
import functools
import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch

import common
import tgpo
from conftest import (Successor, read_jsonl, same_runs, same_weights, small_model, small_tokenizer, stripped,
                      write_rows)

TRAINED = [g for g in tgpo.GUIDANCE if g != "none"]


# ---- equations, on the logits of six tokens

STUDENT, TEACHER = torch.tensor(np.random.default_rng(0).normal(0, 1.5, (2, 6, 7)))
A, Y = torch.tensor([[0, 3, 6, 2, 2, 5], [1, 3, 0, 2, 4, 4]])
TOP = TEACHER.argsort(1, descending=True)


def p_of(z, ids=None):
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return p if ids is None else p[range(6), ids]


def kl(p, q):
    return (p_of(p) * (p_of(p) / p_of(q)).log()).sum(1)


def top_kl(z, k):
    p = p_of(TEACHER.gather(1, TOP[:, :k]))
    return (p * (p / p_of(z).gather(1, TOP[:, :k])).log()).sum(1)


def grad(loss):
    z = STUDENT.clone().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def test_schedule():
    s = [tgpo.coefficient(step, 0.002, 1e-5) for step in range(1, 301)]
    assert s == pytest.approx([max(0.002 - 1e-5 * k, 0) for k in range(300)], abs=1e-11)
    assert s[199] > 0 and set(s[200:]) == {0.0}
    assert tgpo.coefficient(10 ** 6, 0.002, 0.0) == 0.002


@pytest.mark.parametrize("ours, reference", [
    (lambda z: tgpo.label_loss(z, Y), lambda z: -p_of(z, Y).log()),
    (lambda z: tgpo.k2(tgpo.chosen_logps(z, A), tgpo.chosen_logps(TEACHER, A)),
     lambda z: (p_of(TEACHER, A) / p_of(z, A)).log() ** 2 / 2),
    *[(lambda z, k=k: tgpo.topk_forward_kl(z, TOP[:, :k], TEACHER.gather(1, TOP[:, :k])),
       lambda z, k=k: top_kl(z, k) if k < 7 else kl(TEACHER, z)) for k in (1, 3, 7)],
    (lambda z: tgpo.reverse_kl(z, TEACHER), lambda z: kl(z, TEACHER)),
    (tgpo.policy_entropy, lambda z: -(p_of(z) * p_of(z).log()).sum(1))])
def test_losses_value_and_gradient(ours, reference):
    torch.testing.assert_close(ours(STUDENT), reference(STUDENT))
    torch.testing.assert_close(grad(ours), grad(reference))
    h = 1e-6 * torch.eye(7, dtype=torch.float64)[A]  # and the gradient is the slope
    torch.testing.assert_close(grad(ours)[range(6), A], (ours(STUDENT + h) - ours(STUDENT - h)) / 2e-6)


def test_what_the_estimators_teach_on_average():
    """Exactly: the gradient of every token's loss, weighted by the probability of drawing it."""
    forward, reverse, label = grad(lambda z: kl(TEACHER, z)), grad(lambda z: kl(z, TEACHER)), p_of(STUDENT, Y)
    assert (forward - reverse).abs().max() > 0.1  # the two can be told apart

    def average(loss, drawn_from=STUDENT):
        def of(a):
            return grad(lambda z: loss(tgpo.chosen_logps(z, a), tgpo.chosen_logps(TEACHER, a), a))
        return sum(p_of(drawn_from, a)[:, None] * of(a) for a in torch.arange(7).repeat(6, 1).T)

    def as_advantage(bonus):
        def loss(s, t, a):
            old, own, mask = s.detach(), bonus(s.detach(), t, a), torch.ones(6, 1).bool()
            return tgpo.policy_loss(s[:, None], old[:, None], own[:, None], mask, 0.2, 0.2)[0]
        return average(loss)

    for ours, wanted in [
            (average(lambda s, t, a: tgpo.k2(s, t)), reverse),
            (average(lambda s, t, a: (t - s).exp() - 1 - (t - s)), forward),  # k3
            (average(lambda s, t, a: s - t), 0 * reverse),  # k1
            (average(lambda s, t, a: -s, TEACHER), forward),  # labels drawn from the teacher
            (as_advantage(lambda s, t, a: tgpo.rkl_advantages(s, t)), reverse),
            (as_advantage(lambda s, t, a: tgpo.label_bonus(label.log())), 0 * reverse),
            (as_advantage(lambda s, t, a: tgpo.label_bonus(label.log(), a == Y)),
             label[:, None] ** 2 * (p_of(STUDENT) - torch.eye(7)[Y]))]:
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-9)
    torch.manual_seed(0)
    teacher = teacher_of(None, args_of("tgpo-sampled"), shared=7)
    drawn = teacher.read(TEACHER[:1].repeat(20000, 1), torch.zeros(20000, dtype=torch.long))[0]
    torch.testing.assert_close(drawn.bincount() / 20000, p_of(TEACHER)[0].float(), rtol=0, atol=0.015)


# ---- an example: four problems, three rows each; the student has 300 ids, its teacher 288, both share 260

B, G, C, SHARED, SAME_END = 4, 3, 6, 260, (257, 257)
PROMPTS = [p for p in ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1], [2, 2, 9, 1]) for _ in range(G)]
LENGTHS = [3, 5, 1, 4, 4, 2, 6, 6, 6, 2, 3, 4]
REWARDS = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1.0]])
MASK = torch.arange(C) < torch.tensor(LENGTHS)[:, None]


def models():
    return small_model(vocab=300).double(), small_model("llama", 288, seed=5).double()


def logits_of(model, prompt, ids, temperature=1.0, ends=SAME_END):
    """All logits of a row alone, `ends` exchanged; an id without an embedding is read as 0."""
    V = model.config.vocab_size
    read = torch.tensor([[i if i < V else 0 for i in prompt + ids]])
    columns = [{ends[0]: ends[1], ends[1]: ends[0]}.get(i, i) for i in range(V)]
    return model(read).logits[0, len(prompt) - 1:-1].double()[:, columns] / temperature


@functools.cache
def rollout():
    """Three rows are the teacher's own words; one token is an end, one only the student has."""
    ids, teacher = torch.tensor(np.random.default_rng(0).integers(10, 250, (12, C))), models()[1]
    for i, t in [(i, t) for i in (0, 5, 9) for t in range(C)]:
        ids[i, t] = logits_of(teacher, PROMPTS[i], ids[i, :t + 1].tolist())[-1, :SHARED].argmax()
    ids[[3, 6, 7], [1, 5, 2]] = torch.tensor([299, 257, ids[0, 0]])
    return tgpo.Rollout(PROMPTS, ids, MASK, ~MASK.any(1), [""] * 12)


def row(i):
    return PROMPTS[i], rollout().completions[i, :LENGTHS[i]].tolist()


def args_of(guidance="tgpo", **flags):
    args = tgpo.Args(**dict(guidance=guidance, teacher="t", prompts_per_step=B, group_size=G,
                            max_new_tokens=C, max_grad_norm=1e9, bf16=False) | flags)
    tgpo.check_args(args)
    return args


def teacher_of(model, args, shared=SHARED, ends=SAME_END, other_ends=()):
    teacher = object.__new__(tgpo.Teacher)
    vars(teacher).update(model=model, args=args, shared=shared, student_end=ends[0], teacher_end=ends[1],
                         other_ends=list(other_ends), offload=False, device=torch.device("cpu"))
    return teacher


def updated(guidance="tgpo", coef=0.3, lr=0.0, ends=SAME_END, teacher=None, rewards=REWARDS, **flags):
    """-> the gradient of each step of plain descent, metrics"""
    (model, own), args, grads = models(), args_of(guidance, **flags), []
    teacher = teacher or teacher_of(own, args, ends=ends)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    optimizer.register_step_pre_hook(
        lambda *_: grads.append(torch.cat([p.grad.flatten() for p in model.parameters()])))
    advantages = tgpo.group_advantages(rewards).flatten()
    metrics = tgpo.update(model, optimizer, rollout(), advantages, teacher, coef, args)
    assert all(p.requires_grad and p.grad is None for p in teacher.model.parameters())
    return grads, metrics


# ---- the teacher's pass

def test_labels_are_shifted_right_and_begin_at_the_last_prompt_token():
    ids, mask = torch.tensor([[8, 30, 10], [4, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    ro = tgpo.Rollout([[5, 6, 7], [1]], ids, mask, ~mask.any(1), ["", ""])
    advice = teacher_of(Successor(), args_of(), shared=50).advise(ro, [0, 1])
    assert advice.labels[mask].tolist() == [8, 9, 31, 2, 5]  # what follows 7, 8, 30; 1, 4
    assert advice.agrees[mask].tolist() == [True, False, False, False, False]
    assert advice.logps[0, 0] > -1e-5 and advice.logps[0, 1] < -50


@pytest.mark.parametrize("budget, chunk", [(10 ** 6, 2 ** 26), (30, 2 ** 26), (10 ** 6, 288), (1, 288)])
def test_the_pass_equals_rows_alone_on_full_logits(budget, chunk, monkeypatch):
    """Also where another process has one batch more to read."""
    read, cut, passes, seen, some = tgpo.Teacher.read, tgpo.microbatches, [], [], [0, 2, 3, 7, 11]
    monkeypatch.setattr(common, "CHUNK", chunk)
    monkeypatch.setattr(tgpo, "microbatches", lambda *a: [*cut(*a), []])
    monkeypatch.setattr(tgpo.Teacher, "read", lambda *a: seen.append(len(a[1])) or read(*a))
    model, args = models()[1], args_of("tgpo-topk", topk=4, teacher_microbatch_tokens=budget)
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    advice = teacher_of(model, args).advise(rollout(), some)
    assert (len(passes) == len(some) + 1) == (budget == 1)
    assert max(seen) <= max(chunk // 288, 1) and sum(seen) == MASK[some].sum()
    assert torch.isfinite(advice.logps).all() and not advice.logps[[1, 4, 5, 6, 8, 9, 10]].any()
    for i in some:
        logits, ids, n = logits_of(model, *row(i)).detach(), torch.tensor(row(i)[1]), LENGTHS[i]
        logps, best, k = logits[:, :SHARED].log_softmax(1), logits.argmax(1), (ids < SHARED).nonzero()[:, 0]
        torch.testing.assert_close(advice.logps[i, k].double(), logps[k, ids[k]], rtol=0, atol=1e-5)
        assert torch.equal(advice.labels[i, :n], best.where(best < SHARED, -1))
        assert torch.equal(advice.agrees[i, :n], best == ids)
        wanted, order = logps.topk(4)
        assert torch.equal(advice.top_ids[i, :n], order)
        ours = advice.top_logits[i, :n].double()
        torch.testing.assert_close(ours.softmax(1), wanted.softmax(1), rtol=0, atol=1e-5)


def test_end_tokens_change_places():
    """The teacher's end is the student's in labels, log-probs and distributions; a further end in labels."""
    teacher = teacher_of(None, args_of("tgpo-topk", topk=1), shared=6, ends=(2, 4), other_ends=[4, 7])
    logits = torch.tensor([[0, 1, 2, 3, 0, 0, 0, 0, 0.0]]).repeat(4, 1)
    logits[range(4), [4, 7, 3, 8]] = 9
    labels, logps, agrees, top_ids, _ = teacher.read(logits.clone(), torch.tensor([2, 2, 3, 3]))
    assert labels.tolist() == [2, 2, 3, -1] and agrees.tolist() == [True, True, True, False]
    wanted = torch.tensor([0.0, 1, 9, 3, 2, 0]).log_softmax(0)[2].item()
    assert top_ids[0] == 2 and logps[0].item() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(teacher_of(None, args_of(), ends=(2, 2)).align(logits.clone()), logits)


@pytest.mark.parametrize("guidance", ["tgpo", "reverse-kl"])
def test_offload_returns_to_rest(guidance, monkeypatch):
    """It is on its device whenever it reads, and in CPU memory after the update."""
    (_, model), places, read_at = models(), ["cpu"], set()
    teacher, to = teacher_of(model, args_of(guidance)), model.to
    teacher.offload, teacher.device = True, torch.device("cpu", 0)
    monkeypatch.setattr(model, "to", lambda place: places.append(str(place)) or to(place))
    model.base_model.register_forward_pre_hook(lambda *_: read_at.add(places[-1]))
    updated(guidance, teacher=teacher)
    assert read_at == {"cpu:0"} and places[-1] == "cpu"


# ---- the update

def reference_loss(model, old, teacher, some, args, coef, ends):
    """The paper's methods in float64 on full logits, a row and a model at a time -> loss, labels dropped."""
    policy, guide, entropy, dropped, guidance = [], [], [], 0, args.guidance
    for i in some:
        (prompt, ids), group = row(i), REWARDS[i // G].double()
        k, a = range(len(ids)), torch.tensor(ids)
        A = args.reward_weight * (group[i % G] - group.mean()) / (group.std() + 1e-6) * torch.ones(len(ids))
        new = logits_of(model, prompt, ids, args.temperature)
        with torch.no_grad():
            before = logits_of(old, prompt, ids, args.temperature)
            theirs = logits_of(teacher, prompt, ids, args.temperature, ends)
        s, b, t = (x[:, :SHARED].log_softmax(1) for x in (new, before, theirs))
        new, before = new.log_softmax(1), before.log_softmax(1)
        labels = theirs.topk(2).indices[:, int(guidance == "tgpo-sampled")]  # the tests draw the second best
        y, x, has, known = labels.clamp(max=SHARED - 1), a.clamp(max=SHARED - 1), labels < SHARED, a < SHARED
        if guidance.startswith("tgpo-adv"):
            A = A + coef * b[k, y].exp() * has * (labels == a if guidance == "tgpo-adv-matched" else 1)
        if guidance == "rkl":
            A = A + coef * (t[k, x] - b[k, x]) * known
        rho = (new[k, a] - before[k, a]).exp()
        policy.append(-torch.min(rho * A, rho.clamp(1 - args.clip_low, 1 + args.clip_high) * A))
        entropy.append(-(new.exp() * new).sum(1))
        best = t.topk(args.topk or SHARED).indices
        s_top, t_top = (z.gather(1, best).log_softmax(1) for z in (s, t))
        guide.append({"tgpo": -s[k, y][has], "tgpo-sampled": -s[k, y][has],
                      "tgpo-topk": (t_top.exp() * (t_top - s.gather(1, best))).sum(1),
                      "kdrl": (t[k, x] - s[k, x])[known] ** 2 / 2,
                      "reverse-kl": (s_top.exp() * (s_top - t_top)).sum(1)}.get(guidance, torch.zeros(1)))
        dropped += int((~has).sum())

    def mean(parts):
        if args.loss_type == "dapo":
            return torch.cat(parts).mean()
        return sum(x.mean() if args.loss_type == "grpo" else x.sum() / C for x in parts) / len(parts)

    return mean(policy) + coef * mean(guide) - args.entropy_bonus * mean(entropy), dropped


def same(a, b, tolerance=1e-6):
    return (a - b).norm() <= tolerance * b.norm()


SEEN = {}  # first gradients of the settings so far


@pytest.mark.parametrize("guidance, flags", [
    *[(g, {}) for g in tgpo.GUIDANCE], ("tgpo-topk", dict(topk=2)), ("reverse-kl", dict(topk=5)),
    ("tgpo", dict(loss_type="grpo")), ("kdrl", dict(loss_type="dr_grpo")), ("tgpo", dict(reward_weight=0.0)),
    ("rkl", dict(reward_weight=0.5)), ("tgpo", dict(entropy_bonus=0.05)), ("none", dict(entropy_bonus=0.05)),
    ("tgpo", dict(coef=0.1)), *[(g, dict(temperature=0.7)) for g in ("tgpo", "kdrl", "reverse-kl")],
    *[(g, dict(teacher_end=True)) for g in ("tgpo", "kdrl", "reverse-kl")],
    *[(g, dict(updates_per_rollout=2, lr=0.3, clip_high=0.28))
      for g in ("none", "tgpo", "tgpo-adv", "rkl", "kdrl")],
    ("tgpo-adv-matched", dict(updates_per_rollout=3, lr=0.3, loss_type="grpo"))])
def test_update_gradient_is_the_papers(guidance, flags, monkeypatch):
    """Later updates, too: ratios, clipping and advantages are made of the policy that sampled."""
    monkeypatch.setattr(torch.Tensor, "multinomial", lambda p, n: p.topk(2).indices[:, 1:])
    name, flags = " ".join([guidance, *map(str, flags.items())]), dict(flags)
    coef, lr = flags.pop("coef", 0.3), flags.pop("lr", 0.0)
    ends = (257, row(0)[1][0]) if flags.pop("teacher_end", False) else SAME_END
    grads, metrics = updated(guidance, coef, lr, ends, **flags)
    (model, teacher), (old, _), args, losses, dropped = models(), models(), args_of(guidance, **flags), [], 0
    rows = np.arange(B * G).reshape(B, G)
    for some, ours in zip(np.array_split(rows, args.updates_per_rollout), grads, strict=True):
        loss, without = reference_loss(model, old, teacher, some.flatten(), args, coef, ends)
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        assert same(ours, torch.cat([g.flatten() for g in gradient]), 1e-5)
        for p, g in zip(model.parameters(), gradient):
            p.data -= lr * g
        losses, dropped = [*losses, loss.item()], dropped + without
    assert metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["tgpo/dropped_labels"] == dropped > 0 and (metrics["clip_ratio"] > 0) == (lr > 0)
    if not lr:  # every guidance and flag matters
        assert not [other for other, gradient in SEEN.items() if same(grads[0], gradient, 1e-4)]
        SEEN[name] = grads[0]
    for n in (60, 1) if name in tgpo.GUIDANCE else ():  # micro-batches change nothing
        assert same(updated(guidance, microbatch_tokens=n, teacher_microbatch_tokens=n)[0][0], grads[0])


def test_rows_without_reward_signal_are_taught_until_the_coefficient_is_0(monkeypatch):
    score, hidden, rows = tgpo.score_rows, tgpo.Teacher.hidden, Counter()
    monkeypatch.setattr(tgpo, "score_rows", lambda *a: rows.update(student=len(a[2])) or score(*a))
    monkeypatch.setattr(tgpo.Teacher, "hidden", lambda *a: rows.update(teacher=len(a[2])) or hidden(*a))
    updated()
    assert rows == {"teacher": 12, "student": 12}
    updated(coef=0.0)
    assert rows == {"teacher": 12 + 6, "student": 12 + 6}
    grads, metrics = updated(coef=0.0, rewards=torch.ones(B, G))
    assert grads == [] and metrics["updates"] == metrics["loss"] == 0


# ---- metrics

def by_hand(model, teacher, prompt, ids, ends=SAME_END):
    """Of a row's shared tokens -log pi_T(a), k1 and its sign; of all of them mismatch, reverse KL, label."""
    with torch.no_grad():
        s, t = logits_of(model, prompt, ids), logits_of(teacher, prompt, ids, ends=ends)
    best, a = t.argmax(1), torch.tensor(ids)
    s, t, k = s[:, :SHARED].log_softmax(1), t[:, :SHARED].log_softmax(1), (a < SHARED).nonzero()[:, 0]
    k1 = (s - t)[k, a[k]]
    return -t[k, a[k]], k1, (k1 > 0).double(), (best != a).double(), (s.exp() * (s - t)).sum(1), best


def test_metrics_by_hand():
    rows = [by_hand(*models(), *row(i)) for i in range(12)]
    nll, k1, confident, missed, _, best = map(torch.cat, zip(*rows))
    assert len(k1) == len(best) - 1 and 0.5 < missed.mean() < 1  # one token is the student's alone
    wanted = dict(teacher_nll=nll.mean(), reverse_kl_k1=k1.mean(), student_more_confident=confident.mean(),
                  mismatch=missed.mean(), dropped_labels=(best >= SHARED).sum(), coef=0.3)
    found = {k[5:]: v for k, v in updated(microbatch_tokens=40)[1].items() if k.startswith("tgpo/")}
    assert found == pytest.approx({k: float(v) for k, v in wanted.items()}, abs=1e-5)


@pytest.mark.parametrize("guidance, topk", [*[(g, None) for g in ("tgpo", "rkl", "kdrl", "reverse-kl")],
                                            ("reverse-kl", 3)])
def test_a_teacher_equal_to_the_student(guidance, topk):
    """It has nothing more to teach; but its labels sharpen all the same."""
    flags = dict(reward_weight=0.0, topk=topk)
    grads, m = updated(guidance, 1.0, teacher=teacher_of(models()[0], args_of(guidance, **flags)), **flags)
    assert abs(m["tgpo/reverse_kl_k1"]) < 1e-6 and m["tgpo/mismatch"] > 0
    assert (grads[0].norm() < 1e-4) == (abs(m["loss"]) < 1e-6) == (guidance != "tgpo")


# ---- whole runs

@pytest.fixture(scope="module")
def pair(tmp_path_factory, model_dirs):
    """A student, 272 wide, ends with <|im_end|>; a teacher, 288, with <|endoftext|>, and has a token more."""
    folder, own = tmp_path_factory.mktemp("teacher"), small_tokenizer()
    small_model("llama", 288, seed=5, eos_token_id=258, max_position_embeddings=200).save_pretrained(folder)
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>", "</think>"]})
    own.eos_token = "<|endoftext|>"
    own.save_pretrained(folder)
    return model_dirs["qwen2"], folder


@pytest.fixture
def run(pair, argv_of, tmp_path, run_script):
    """Run tgpo.py on the pair -> the directory it writes to, tmp_path / out."""
    def started(*more, out="run", teacher=pair[1], code=0):
        own = ["--teacher", teacher] if teacher else []
        argv = argv_of("grpo_baseline", *own, "--steps", 2, "--out", tmp_path / out, *more)
        assert run_script("tgpo", *argv) == code
        return tmp_path / out
    return started


@pytest.mark.parametrize("guidance", TRAINED)
def test_other_widths_and_end_tokens_train(guidance, pair, run):
    more = {"tgpo": ["--teacher_offload"], "tgpo-adv": ["--updates_per_rollout", 3]}
    out = run("--guidance", guidance, *more.get(guidance, []))
    metrics, (start, fall, _) = read_jsonl(out / "metrics.jsonl"), tgpo.GUIDANCE[guidance]
    assert all(np.isfinite(value) for m in metrics for value in m.values())
    assert [m["tgpo/coef"] for m in metrics] == pytest.approx([start, start - fall])
    assert not same_weights(pair[0], out / "model")


@pytest.mark.parametrize("ends, teacher_end, others", [([257], 258, [258]), ([257, 258], 257, [])])
def test_the_ends_of_a_real_pair(ends, teacher_end, others, pair):
    """Where the student stops at the teacher's end, too, that stays what it is."""
    tokenizers = (common.load_tokenizer(str(folder)) for folder in pair)
    teacher = tgpo.Teacher(args_of(teacher=str(pair[1])), *tokenizers, ends)
    assert (teacher.shared, teacher.student_end, teacher.teacher_end) == (260, 257, teacher_end)
    assert teacher.other_ends == others
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_none_is_grpo_to_the_bit(run, train):
    flags = ["--top_p", 0.9, "--clip_high", 0.3, "--loss_type", "grpo", "--warmup_frac", 0]
    grpo, none = train("grpo_baseline", *flags, "--steps", 2, out="grpo"), ["--guidance", "none"]
    same_runs(grpo, run(*flags, *none, "--topk", 999, teacher=None, out="alone"))
    measured = run(*flags, *none, out="none")
    base, metrics = (stripped(read_jsonl(out / "metrics.jsonl")) for out in (grpo, measured))
    assert base == [{k: v for k, v in m.items() if not k.startswith("tgpo/")} for m in metrics]
    assert same_weights(grpo / "model", measured / "model") and metrics[0]["tgpo/coef"] == 0


def test_resume_equals_one_long_run(rows_file, run):
    flags = ["--guidance", "tgpo-sampled", "--eval_dataset", rows_file, "--eval_every", 1]
    run(*flags, "--steps", 1, out="two")
    whole = run(*flags, out="whole")
    same_runs(run(*flags, "--resume", out="two"), whole)
    metrics = read_jsonl(whole / "metrics.jsonl")
    assert len(metrics) == 3 and all("eval/accuracy" in m for m in metrics)


def test_measured_divergence_by_hand(pair, run, monkeypatch):
    """One rollout ends early, one has a token that the teacher would write."""
    models, ends = [common.load_model(str(folder)).cpu() for folder in pair], (257, 258)
    sampled, ros = tgpo.rollout, []

    def rollout(*a):
        ros.append(ro := sampled(*a))
        ro.completions[0, 3], ro.mask[0, 4:], ro.truncated[0] = 257, False, False
        ro.completions[1, 0] = by_hand(*models, ro.prompts[1], [0], ends)[-1].item()
        return ro

    monkeypatch.setattr(tgpo, "rollout", rollout)
    flags = ["--measure_divergence", 11, "--microbatch_tokens", 150, "--guidance", "reverse-kl", "--topk", 3]
    out, _ = run(*flags), run(*flags, out="again")
    assert torch.equal(ros[0].completions, ros[1].completions)  # --seed decides
    ro, found = ros[0], []
    for prompt, ids, mask, truncated in zip(ro.prompts, ro.completions, ro.mask, ro.truncated):
        *row, _ = by_hand(*models, prompt, ids[mask].tolist(), ends)
        found.append([*[x.mean() for x in row], mask.sum(), truncated])
    report = json.loads((out / "divergence.json").read_text())
    names = "teacher_nll reverse_kl_k1 student_more_confident mismatch reverse_kl length truncated".split()
    for name, values in zip(names, torch.tensor(found).T, strict=True):
        wanted = {"mean": values.mean().item(), "standard_error": values.std().item() / 11 ** 0.5}
        assert report[name] == pytest.approx(wanted, abs=1e-4) and wanted["standard_error"] > 0, name
    assert len(found) == 11 and not (out / "model").exists()  # nothing was trained


# ---- refusals

@pytest.fixture
def refused(run, capsys):
    def said(*more, **where):
        assert not run(*more, code=2, **where).exists()
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error
    return said


@pytest.mark.parametrize("said, flags", [
    ("--guidance: invalid choice: 'magic'", "--guidance magic"), ("--topk is 0; it must be", "--topk 0"),
    ("--topk 261: student and teacher share 260 tokens", "--topk 261"), ("'x'", "--reward_weight x"),
    ("--coefficient is -1", "--coefficient -1"), ("--coefficient is nan", "--coefficient nan"),
    ("--coefficient_fall is -1", "--coefficient_fall -1"), ("--entropy_bonus is -1", "--entropy_bonus -1"),
    ("--measure_divergence is -1", "--measure_divergence -1"), ("for 2 or", "--measure_divergence 1"),
    ("200", "--max_new_tokens 180"),
    ("--updates_per_rollout 4", "--updates_per_rollout 4"), ("moon", "--teacher_device moon"),
    ("--teacher ./missing: no such directory", "--teacher ./missing")])
def test_bad_flags(said, flags, refused):
    assert said in refused(*flags.split())


def test_a_wrong_pair_is_refused_before_any_weight_is_loaded(pair, tmp_path, refused, monkeypatch):
    other, mine, theirs = tmp_path / "other", *(common.load_tokenizer(str(folder)) for folder in pair)
    small_model(vocab=288).save_pretrained(other)
    monkeypatch.setattr(common.AutoModelForCausalLM, "from_pretrained", None)
    assert "--teacher is missing" in refused(teacher=None)
    assert "--teacher is missing" in refused("--guidance", "none", "--measure_divergence", 4, teacher=None)
    tgpo.check_vocabulary(theirs, mine, "t")  # the student may have more tokens
    theirs.chat_template = "</think>" + theirs.chat_template
    theirs.save_pretrained(other)  # but not in a prompt
    said = "cannot read the prompts: it has no token 260, '</think>' to the student"
    assert said in refused("--model", other, teacher=pair[0])
    state, names = json.loads((other / "tokenizer.json").read_text()), mine.convert_ids_to_tokens(range(99))
    state["model"]["vocab"] |= {names[70]: 90, names[90]: 70}
    (other / "tokenizer.json").write_text(json.dumps(state))
    said = f"token 70 is {names[70]!r} to the student and {names[90]!r} to the teacher"
    assert said in refused(teacher=other)


# ---- the demo

SIGNS = [op for pair in common.DEMO_CHOICES for op in pair]
WORDS = [common.in_words(op) for op in SIGNS]


def lessons(monkeypatch, build, *args):
    """Prompt, tokens and which of them are taught, of 200 examples for a model of the demo."""
    caught = []
    monkeypatch.setattr(common, "warm_start", lambda *recipe: caught.extend(recipe[1:3]))
    monkeypatch.setattr(common, "demo_dir", lambda: None)
    build(None, *args)
    tokenizer, example = caught
    for prompt, completion, taught in map(example, range(200)):
        tokens = tokenizer.convert_ids_to_tokens(completion)
        assert len(taught) == len(tokens) and tokens[-1] == "<end>" and taught[-1]
        yield tokenizer.decode(prompt), [token.replace("\u0120", " ") for token in tokens], taught


@pytest.mark.parametrize("words", [True, False])
def test_the_demo_teacher_is_taught_right_continuations_of_any_prefix(monkeypatch, words):
    """Before the cut the student's choices; after it, where the loss is, right ones in its own style."""
    (plain, value), styled = common.demo_solution("0101", 30), common.demo_solution("0101", 30, words=True)
    assert plain.startswith("30+2=32;32*2=64;") and styled[0].startswith("30 plus 2=32;32 times 2=64;")
    assert styled[1] == value and common.grade(styled[0], str(value)) == 1.0  # the box is read
    cuts = []
    for prompt, tokens, taught in lessons(monkeypatch, common.build_demo_teacher, words):
        choices = common.DEMO_KINDS[prompt.removeprefix("<user>")[0]]
        right = [(SIGNS, WORDS)[words][2 * i + int(c)] for i, c in enumerate(choices)]
        cut = taught.index(True)
        own, after = ([t for t in part if t in SIGNS + WORDS] for part in (tokens[:cut], tokens[cut:]))
        assert all(taught[cut:]) and after == right[4 - len(after):]
        cuts.append([cut > 0, len(own + after) != 4, own != right[:len(own)], any(t in WORDS for t in own)])
    assert all(np.sum(cuts, 0) > [120, 0, 60, 20 * words])  # any prefix; slips; wrong choices; both styles


def test_the_demo_student_reads_the_other_style_and_keeps_to_its_own(monkeypatch):
    seen = Counter()
    for prompt, tokens, taught in lessons(monkeypatch, common.build_demo):
        asked, guided = prompt.startswith("<system>In words.<user>"), "Strategy:" in prompt
        own = WORDS if asked else SIGNS
        ops = [(token, is_taught) for token, is_taught in zip(tokens, taught) if token in SIGNS + WORDS]
        assert len(ops) == 4 and all((token in own) == is_taught for token, is_taught in ops)
        assert sum(taught) == len(tokens) - sum(not is_taught for _, is_taught in ops)
        if guided:
            assert all(token in prompt and is_taught for token, is_taught in ops) and not asked
        seen.update(asked=asked, guided=guided, mixed=not all(taught))
    assert all(n > 10 for n in seen.values()), seen


def test_the_demos_recipe_is_for_its_own_model(monkeypatch):
    def parsed(*argv):
        monkeypatch.setattr(sys, "argv", ["tgpo.py", *argv])
        args = common.parse_args(tgpo.Args)
        tgpo.check_args(args)
        return vars(args).items()

    best = common.DEMO_TGPO | common.DEMO_GUIDANCE["tgpo"] | {"teacher": "demo"}
    paper = dict(coefficient=0.002, coefficient_fall=1e-5, reward_weight=1.0, steps=300, group_size=8,
                 lr=1e-6, weight_decay=0.01, max_grad_norm=1.0, loss_type="dapo", top_p=1.0, temperature=1.0,
                 clip_low=0.2, clip_high=0.2, entropy_bonus=0.0, warmup_frac=0.0)
    assert parsed() >= best.items() and parsed("--model", "S", "--teacher", "T") >= paper.items()
    kdrl = dict(coefficient=0.002, coefficient_fall=0.0, reward_weight=1.0)
    assert parsed("--guidance", "kdrl") >= kdrl.items() and ("topk", 20) in parsed("--guidance", "tgpo-topk")


def test_the_demo_runs_and_ends_with_its_table(monkeypatch, tmp_path, run_script, capsys):
    """Models of two warm-up steps: the way, not the figures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(common, "DEMO_STEPS", 2)
    monkeypatch.setattr(common, "DEMO_TEACHER_STEPS", 2)
    held_out = write_rows(tmp_path / "held.jsonl", common.demo_rows()[1][:4])
    flags = ["--steps", 1, "--prompts_per_step", 2, "--max_new_tokens", 8, "--out", tmp_path / "run"]
    for more in (["--teacher", "demo-same-style", "--dry_run"], []):
        assert run_script("tgpo", *flags, "--eval_dataset", held_out, *more) == 0
    table = capsys.readouterr().out.split("held-out ")[-1].splitlines()
    assert table[0].split() == ["before", "after"] and table[1].split()[0] == "accuracy"
    built = {folder.name.rsplit("-", 1)[0] for folder in (tmp_path / "cache" / "sgpo-tgpo").iterdir()}
    assert built == {"demo", "demo-same-style-teacher", "demo-teacher"}
