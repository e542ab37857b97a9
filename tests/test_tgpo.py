"""tgpo.py: what the teacher reads, and update() of every method against tests/reference.py.

The student has 260 tokens, its teacher 264; their embeddings have 300 and 288 rows.
"""
import copy
import typing

import numpy as np
import pytest
import torch
from pytest import approx

import common
import grpo_baseline
import reference
import tgpo
from conftest import ENDOFTEXT, IM_END, small_model, small_tokenizer
from test_update import check_steps, error, example, gradient_descent, rewards_of, rollout_of

SHARED = 260
UNKNOWN = 299  # a token that only the student has
COEF = 3.0  # large, so that the small bonus of tgpo-adv counts
MORE_TOKENS = ("<a>", "<b>", "<c>", "<d>")


def student():
    return small_model(vocab=300)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> str:
    """Return the directory of a teacher that often wants to end, with either of two end tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    model = small_model("llama", 288, seed=5, tie_word_embeddings=False)
    model.lm_head.weight.data[[IM_END, ENDOFTEXT]] *= 2
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_teacher(teacher_dir):
    """Return a function that loads the teacher; it returns the teacher and the flags of its run."""
    def make(guidance: str = "tgpo", end: int = IM_END, student_ends: tuple = (IM_END,), **flags):
        args = tgpo.Args(guidance=guidance, teacher=teacher_dir, bf16=False)
        settings = {"group_size": 3, "max_new_tokens": 6, "max_grad_norm": 1e9, "microbatch_tokens": 16384}
        settings |= flags
        for name, value in settings.items():
            setattr(args, name, value)
        tgpo.check_args(args)
        tokenizer = small_tokenizer(more=MORE_TOKENS)
        if end == ENDOFTEXT:
            tokenizer = small_tokenizer(None, "<|endoftext|>", MORE_TOKENS)
        return tgpo.Teacher(args, small_tokenizer(), tokenizer, list(student_ends)), args

    return make


def exact(teacher: tgpo.Teacher) -> reference.Teacher:
    model = copy.deepcopy(teacher.model).double()
    ends = teacher.student_end, teacher.teacher_end, teacher.other_ends
    return reference.Teacher(model, SHARED, *ends)


@pytest.fixture
def problems(make_teacher) -> list[reference.Problem]:
    """Return the example with a token that only the student has, and four that the teacher would write."""
    problems = example()
    problems[1].completions[0][0] = UNKNOWN
    teacher, _ = make_teacher()
    for problem in problems:
        prompt = torch.tensor([problem.prompt])
        logits = teacher.model(prompt).logits[0, -1, :SHARED]
        problem.completions[1][0] = int(logits.argmax())
    return problems


def run_update(problems, teacher, args, coef=COEF, model=None, script=tgpo):
    """Run update() with plain gradient descent; return its steps and its metrics."""
    model = model or student()
    optimizer, steps = gradient_descent(model)
    ro = rollout_of(script, problems)
    A = script.group_advantages(rewards_of(problems), args.scale_rewards).flatten()
    torch.manual_seed(0)  # for the labels of tgpo-sampled
    guidance = [teacher, coef] if script is tgpo else []
    metrics = script.update(model, optimizer, ro, A, *guidance, args)
    return steps, metrics


# ---------------------------------------------------------------- the methods

def test_the_methods_are_those_of_the_flag():
    types = typing.get_type_hints(tgpo.Args)
    assert set(typing.get_args(types["guidance"])) == set(tgpo.METHODS)


@pytest.mark.parametrize("guidance, coefficient, fall, reward_weight", [
    ("tgpo", 0.002, 1e-5, 1.0),
    ("tgpo-adv", 0.02, 1e-4, 1.0),
    ("rkl", 1.0, 0.0, 0.0),
    ("kdrl", 0.002, 0.0, 1.0),
    ("reverse-kl", 1.0, 0.0, 0.0),
])
def test_the_constants_are_the_papers(guidance, coefficient, fall, reward_weight):
    args = tgpo.Args(guidance=guidance, teacher="t")
    tgpo.check_args(args)
    assert args.coefficient == coefficient
    assert args.coefficient_fall == fall
    assert args.reward_weight == reward_weight


# ---------------------------------------------------------------- the teacher

def test_labels_are_the_tokens_that_the_teacher_would_generate(problems, make_teacher):
    """The first one follows the last prompt token."""
    teacher, _ = make_teacher()
    problem = problems[1]
    completion = problem.completions[1]
    advice = teacher.read(rollout_of(tgpo, problems), [4])
    for t, token in enumerate(completion):
        prefix = torch.tensor([problem.prompt + completion[:t]])
        label = int(teacher.model(prefix).logits[0, -1].argmax())
        assert advice.labels[4, t] == (label if label < SHARED else -1)
        assert advice.agrees[4, t] == (label == token)


@pytest.mark.parametrize("budget, chunk", [
    (10 ** 6, 10 ** 6),
    (10 ** 6, 3 * 288),
    (1, 10 ** 6),
])
def test_what_the_teacher_reads_is_that_of_a_sample_alone(budget, chunk, problems, make_teacher, monkeypatch):
    monkeypatch.setattr(tgpo.Teacher, "MICROBATCH_TOKENS", budget)
    monkeypatch.setattr(common, "CHUNK_LOGITS", chunk)
    teacher, args = make_teacher("tgpo-topk", topk=4)
    ro = rollout_of(tgpo, problems)
    advice = teacher.read(ro, [1, 3, 10])
    assert not advice.logps[[0, 2]].any()  # of samples that it has not read
    for i in (1, 3, 10):
        ids = ro.completions[i, ro.mask[i]]
        logits = reference.teacher_logits_of(exact(teacher), ro.prompts[i], ids.tolist(), args)
        top = logits[:, :SHARED].topk(4)
        logps = logits[:, :SHARED].log_softmax(-1)
        ours = advice.apply(lambda x: x[i, ro.mask[i]].double())
        known = ids < SHARED
        assert torch.equal(ours.top_ids, top.indices.double())
        torch.testing.assert_close(ours.top_logits, top.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.logps[known], logps[known, ids[known]], atol=1e-5, rtol=0)


def test_the_teachers_end_takes_the_place_of_the_students(make_teacher):
    teacher, _ = make_teacher(end=ENDOFTEXT)
    hidden = torch.eye(32)
    ours = teacher.logits(hidden)
    plain = hidden @ teacher.model.lm_head.weight.T
    assert torch.equal(ours[:, IM_END], plain[:, ENDOFTEXT])
    assert torch.equal(ours[:, ENDOFTEXT], plain[:, IM_END])
    assert torch.equal(ours[:, :IM_END], plain[:, :IM_END])


@pytest.mark.parametrize("student_ends, teacher_end, other_ends", [
    ([IM_END], ENDOFTEXT, [ENDOFTEXT]),
    ([IM_END, ENDOFTEXT], IM_END, []),  # it ends the student's completions, too, and stays what it is
])
def test_other_ends_are_labels_for_the_students_end(student_ends, teacher_end, other_ends, make_teacher):
    teacher, _ = make_teacher(end=ENDOFTEXT, student_ends=student_ends)
    assert teacher.teacher_end == teacher_end
    assert teacher.other_ends == other_ends
    labels = teacher.map_end_tokens(torch.tensor([5, *other_ends])).tolist()
    assert labels == [5] + [IM_END] * len(other_ends)


def test_labels_are_drawn_from_the_teacher(make_teacher):
    teacher, _ = make_teacher("tgpo-sampled")
    hidden = teacher.hidden(rollout_of(tgpo, example()), [0])[:1]
    p = teacher.logits(hidden).softmax(-1)[0]
    torch.manual_seed(0)
    ids = torch.zeros(20000, dtype=torch.long)
    labels = teacher.advice_on(hidden.expand(20000, -1), ids).labels
    for label in p[:SHARED].topk(3).indices:
        frequency = (labels == label).float().mean().item()
        assert frequency == approx(p[label].item(), abs=0.015)


@pytest.mark.parametrize("guidance, device_in_training", [
    ("tgpo", "cpu"),  # it has read everything before
    ("reverse-kl", "cpu:0"),
])
def test_an_offloaded_teacher_returns_to_cpu_memory(guidance, device_in_training, problems, make_teacher,
                                                    monkeypatch):
    teacher, args = make_teacher(guidance, teacher_offload=True, teacher_device="cpu:0")
    devices = ["cpu"]
    when_reading = set()
    when_training = set()

    def to(device) -> None:
        devices.append(str(device))

    monkeypatch.setattr(teacher.model, "to", to)
    teacher.model.base_model.register_forward_pre_hook(lambda *_: when_reading.add(devices[-1]))
    model = student()
    model.base_model.register_forward_pre_hook(lambda *_: when_training.add(devices[-1]))
    run_update(problems, teacher, args, model=model)
    assert when_reading == {"cpu:0"}
    assert when_training == {device_in_training}
    assert devices[-1] == "cpu"


# ---------------------------------------------------------------- the gradient is the paper's

SETTINGS = [
    *[(guidance, {}) for guidance in tgpo.METHODS],
    ("tgpo", {"loss_type": "grpo"}),
    ("kdrl", {"loss_type": "dr_grpo"}),
    ("tgpo", {"reward_weight": 0.0}),
    ("rkl", {"reward_weight": 0.5}),
    ("tgpo", {"entropy_bonus": 0.05}),
    ("tgpo-topk", {"topk": 3}),
    ("reverse-kl", {"topk": 5}),
    ("kdrl", {"temperature": 0.7}),
    ("tgpo", {"end": ENDOFTEXT}),
    ("reverse-kl", {"end": ENDOFTEXT}),
]


def drawn_labels(teacher: tgpo.Teacher, problems) -> dict[tuple, list[int]]:
    """Return the labels that update() draws for every completion."""
    torch.manual_seed(0)
    advice = teacher.read(rollout_of(tgpo, problems), list(range(12)))
    completions = [tuple(o) for p in problems for o in p.completions]
    return dict(zip(completions, advice.labels.tolist()))


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("guidance, flags", SETTINGS)
def test_gradient(guidance, flags, updates, problems, make_teacher, monkeypatch):
    """In the second update ratios, bonuses and RKL's advantages are those of the policy that sampled."""
    monkeypatch.setattr(common, "CHUNK_LOGITS", 4 * 300)
    teacher, args = make_teacher(guidance, updates_per_rollout=updates, **flags)
    labels = None
    if guidance == "tgpo-sampled":
        labels = drawn_labels(teacher, problems)
    steps, metrics = run_update(problems, teacher, args)
    inputs = problems, args, exact(teacher), COEF, labels
    check_steps(steps, metrics, reference.tgpo_loss, *inputs)


def test_every_setting_moves_the_gradient(problems, make_teacher):
    """Otherwise the comparison above would prove nothing about its method or flag."""
    gradients = []
    for guidance, flags in SETTINGS:
        steps, _ = run_update(problems, *make_teacher(guidance, **flags))
        errors = [error(steps[0].gradient, other) for other in gradients]
        assert min(errors, default=1) > 1e-4, (guidance, flags)
        gradients.append(steps[0].gradient)


@pytest.mark.parametrize("guidance", tgpo.METHODS)
def test_microbatches_change_nothing(guidance, problems, make_teacher):
    gradients = []
    for budget in (10 ** 6, 1):
        teacher, args = make_teacher(guidance, microbatch_tokens=budget)
        steps, _ = run_update(problems, teacher, args)
        gradients.append(steps[0].gradient)
    assert error(*gradients) < 1e-5


@pytest.mark.parametrize("has_teacher", [True, False])
def test_without_guidance_tgpo_is_grpo_bit_for_bit(has_teacher, problems, make_teacher):
    teacher, args = make_teacher("none")
    steps, _ = run_update(problems, teacher if has_teacher else None, args)
    grpo, _ = run_update(problems, None, args, script=grpo_baseline)
    assert torch.equal(steps[0].gradient, grpo[0].gradient)


@pytest.mark.parametrize("coef, num_trained", [(COEF, 12), (0.0, 6)])
def test_groups_of_equal_rewards_train_until_the_coefficient_is_0(coef, num_trained, problems, make_teacher,
                                                                  monkeypatch):
    scored = []
    original = tgpo.token_scores

    def token_scores(model, ro, idx, *more):
        scored.extend(idx)
        return original(model, ro, idx, *more)

    monkeypatch.setattr(tgpo, "token_scores", token_scores)
    run_update(problems, *make_teacher(), coef=coef)
    assert len(scored) == num_trained


def test_without_any_signal_the_optimizer_does_not_step(problems, make_teacher):
    for problem in problems:
        problem.rewards = [1, 1, 1]
    steps, metrics = run_update(problems, *make_teacher(), coef=0.0)
    assert steps == []
    assert metrics["updates"] == metrics["loss"] == 0


# ---------------------------------------------------------------- metrics by hand

@pytest.mark.parametrize("end", [IM_END, ENDOFTEXT])
def test_metrics(end, problems, make_teacher):
    teacher, args = make_teacher(end=end, microbatch_tokens=40)
    _, metrics = run_update(problems, teacher, args)
    exact_teacher = exact(teacher)
    nll = []
    k1 = []
    labels = []
    tokens = []
    for prompt, completion, _ in reference.samples_of(problems, [[0] * 3] * 4):
        theirs = reference.teacher_logits_of(exact_teacher, prompt, completion, args)
        ours = reference.logits_of(student(), prompt, completion, args)
        p = theirs[:, :SHARED].log_softmax(-1)
        q = ours[:, :SHARED].log_softmax(-1)
        tokens += completion
        for t, a in enumerate(completion):
            labels.append(reference.label_of(exact_teacher, theirs[t]))
            if a != UNKNOWN:
                nll.append(-p[t, a].item())
                k1.append((q - p)[t, a].item())
    num_dropped = sum(label >= SHARED for label in labels)
    assert metrics["tgpo/teacher_nll"] == approx(np.mean(nll), abs=1e-5)
    assert metrics["tgpo/reverse_kl_k1"] == approx(np.mean(k1), abs=1e-5)
    assert metrics["tgpo/mismatch"] == approx(np.mean(np.array(labels) != tokens))
    assert metrics["tgpo/dropped_labels"] == num_dropped > 0


def test_a_teacher_equal_to_the_student_has_nothing_to_teach(make_teacher):
    teacher, args = make_teacher("reverse-kl")
    model = copy.deepcopy(teacher.model).requires_grad_()
    steps, metrics = run_update(example(), teacher, args, model=model)
    assert metrics["tgpo/reverse_kl_k1"] == approx(0, abs=1e-6)
    assert metrics["tgpo/mismatch"] > 0
    assert steps[0].gradient.norm() < 1e-4
    assert all(p.grad is None for p in teacher.model.parameters())


# ---------------------------------------------------------------- wrong pairs

PLAIN = small_tokenizer()
HAS_A = small_tokenizer(more=("<a>",))
HAS_B = small_tokenizer(more=("<b>",))


@pytest.mark.parametrize("flags, problem, message", [
    ({"topk": 261}, "1 + 1", "--topk 261: student and teacher share 260 tokens"),
    ({"max_new_tokens": 4090}, "1 + 1", "exceeds the context of --teacher"),
    ({}, "<a>", "cannot read the prompts: it has no token 260, '<a>' to the student"),
])
def test_a_teacher_that_cannot_read_is_refused(flags, problem, message, make_teacher, capsys):
    _, args = make_teacher(**flags)
    with pytest.raises(SystemExit):
        tgpo.check_teacher(args, HAS_A, PLAIN, [{"problem": problem}])
    assert message in capsys.readouterr().err


def test_tokenizers_that_spell_an_id_differently_are_refused(capsys):
    tgpo.check_vocabulary(HAS_A, PLAIN, "t")
    with pytest.raises(SystemExit):
        tgpo.check_vocabulary(HAS_A, HAS_B, "t")
    assert "token 260 is '<a>' to the student and '<b>' to the teacher" in capsys.readouterr().err


def test_guidance_without_a_teacher_is_refused(capsys):
    with pytest.raises(SystemExit):
        tgpo.check_args(tgpo.Args())
    assert "--teacher is missing" in capsys.readouterr().err
