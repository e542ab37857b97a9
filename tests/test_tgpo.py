"""tgpo.py: what the teacher reads, and update() of every method against tests/reference.py.

The student has 260 tokens, its teacher 264; the embeddings have 300 and 288 rows.
"""
import copy
import typing

import numpy as np
import pytest
import torch

import common
import grpo_baseline
import reference
import tgpo
from conftest import ENDOFTEXT, IM_END, small_model, small_tokenizer
from test_update import check_steps, error, example, record_steps, rollout_of

SHARED = 260
UNKNOWN = 299  # a token that only the student has
COEF = 3.0  # large, so that the small bonus of tgpo-adv counts


def student():
    return small_model(vocab=300)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> str:
    """Return the directory of a teacher that often wants to end, with either of two end tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    model = small_model("llama", 288, seed=5, tie_word_embeddings=False)
    model.lm_head.weight.data[[IM_END, ENDOFTEXT]] *= 2
    model.save_pretrained(folder)
    more_tokens = ("<a>", "<b>", "<c>", "<d>")
    small_tokenizer(more=more_tokens).save_pretrained(folder / "same_end")
    small_tokenizer(None, "<|endoftext|>", more_tokens).save_pretrained(folder / "other_end")
    return str(folder)


@pytest.fixture
def make_teacher(teacher_dir):
    """Return a function that loads the teacher for these flags; it returns the teacher and the flags."""
    def make(guidance: str = "tgpo", tokenizer: str = "same_end", student_ends=(IM_END,), **flags):
        settings = {"teacher": teacher_dir, "group_size": 3, "max_new_tokens": 6, "max_grad_norm": 1e9}
        args = tgpo.Args(guidance=guidance, bf16=False, **{**settings, **flags})
        tgpo.check_args(args)
        teacher_tokenizer = common.load_tokenizer(f"{teacher_dir}/{tokenizer}")
        return tgpo.Teacher(args, small_tokenizer(), teacher_tokenizer, list(student_ends)), args

    return make


def exact_teacher(teacher: tgpo.Teacher) -> reference.Teacher:
    model = copy.deepcopy(teacher.model).double()
    return reference.Teacher(model, SHARED, teacher.student_end, teacher.teacher_end, teacher.other_ends)


@pytest.fixture
def problems(make_teacher) -> list[reference.Problem]:
    """Return the example with a token that only the student has, and four that the teacher would write, too."""
    problems = example()
    problems[1].completions[0][0] = UNKNOWN
    teacher, _ = make_teacher()
    for problem in problems:
        logits = teacher.model(torch.tensor([problem.prompt])).logits[0, -1]
        problem.completions[1][0] = int(logits[:SHARED].argmax())
    return problems


def run_update(problems, teacher, args, coef=COEF, model=None):
    """Run update() with plain gradient descent; return its steps and its metrics."""
    model = model or student()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    steps = record_steps(model, optimizer)
    rewards = torch.tensor([p.rewards for p in problems], dtype=torch.float)
    A = tgpo.group_advantages(rewards, args.scale_rewards).flatten()
    torch.manual_seed(0)  # for tgpo-sampled
    metrics = tgpo.update(model, optimizer, rollout_of(tgpo, problems), A, teacher, coef, args)
    return steps, metrics


# ---------------------------------------------------------------- the methods

def test_the_methods_are_those_of_the_flag():
    choices = typing.get_args(typing.get_type_hints(tgpo.Args)["guidance"])
    assert set(choices) == set(tgpo.METHODS)


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

def test_labels_are_the_tokens_that_the_teacher_would_generate(make_teacher):
    """The first one follows the last prompt token."""
    teacher, _ = make_teacher()
    ro = rollout_of(tgpo, example())
    advice = teacher.read(ro, [1])
    written = ro.completions[1, ro.mask[1]].tolist()
    labels = []
    for t in range(len(written)):
        ids = torch.tensor([ro.prompts[1] + written[:t]])
        label = int(teacher.model(ids).logits[0, -1].argmax())
        labels.append(label if label < SHARED else -1)
    assert advice.labels[1, ro.mask[1]].tolist() == labels
    assert advice.agrees[1, ro.mask[1]].tolist() == (torch.tensor(labels) == torch.tensor(written)).tolist()


@pytest.mark.parametrize("budget, chunk", [(10 ** 6, 10 ** 6), (10 ** 6, 288 * 3), (1, 10 ** 6)])
def test_what_the_teacher_reads_equals_a_sample_alone(problems, make_teacher, monkeypatch, budget, chunk):
    monkeypatch.setattr(tgpo.Teacher, "MICROBATCH_TOKENS", budget)
    monkeypatch.setattr(common, "CHUNK_LOGITS", chunk)
    teacher, _ = make_teacher("tgpo-topk", topk=4)
    ro = rollout_of(tgpo, problems)
    advice = teacher.read(ro, [1, 3, 10])
    for i in (1, 3, 10):
        ids = ro.completions[i, ro.mask[i]]
        logits = reference.teacher_logits_of(exact_teacher(teacher), ro.prompts[i], ids.tolist(), 1.0)
        logps = logits[:, :SHARED].log_softmax(-1).float()
        known = ids < SHARED
        top = logps.topk(4)
        ours = advice.apply(lambda x: x[i, ro.mask[i]])
        assert torch.equal(ours.top_ids, top.indices)
        torch.testing.assert_close(ours.top_logits.softmax(-1), top.values.softmax(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.logps[known], logps[known, ids[known]], atol=1e-5, rtol=0)
    assert not advice.logps[[0, 2]].any()


def test_the_teachers_end_takes_the_place_of_the_students(make_teacher):
    teacher, _ = make_teacher(tokenizer="other_end")
    assert (teacher.student_end, teacher.teacher_end) == (IM_END, ENDOFTEXT)
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    ours = teacher.logits(hidden)
    plain = hidden @ teacher.model.lm_head.weight.T
    assert torch.equal(ours[:, IM_END], plain[:, ENDOFTEXT])
    assert torch.equal(ours[:, ENDOFTEXT], plain[:, IM_END])
    assert torch.equal(ours[:, :IM_END], plain[:, :IM_END])


def test_another_end_of_the_teacher_is_a_label_for_the_students_end(make_teacher):
    teacher, _ = make_teacher(tokenizer="other_end")
    assert teacher.other_ends == [ENDOFTEXT]
    assert teacher.as_student_id(torch.tensor([ENDOFTEXT, 5])).tolist() == [IM_END, 5]


def test_an_end_of_both_stays_what_it_is(make_teacher):
    teacher, _ = make_teacher(tokenizer="other_end", student_ends=[IM_END, ENDOFTEXT])
    assert teacher.teacher_end == teacher.student_end == IM_END
    assert teacher.other_ends == []


def test_labels_are_drawn_from_the_teacher(make_teacher):
    teacher, _ = make_teacher("tgpo-sampled")
    ro = rollout_of(tgpo, example())
    hidden = teacher.hidden(ro, [0])[:1]
    torch.manual_seed(0)
    labels = teacher.advice_on(hidden.repeat(20000, 1), torch.zeros(20000).long()).labels
    p = teacher.logits(hidden)[0].softmax(-1)
    frequency = labels[labels >= 0].bincount(minlength=SHARED) / 20000
    torch.testing.assert_close(frequency, p[:SHARED], atol=0.015, rtol=0)
    assert (labels < 0).float().mean().item() == pytest.approx(p[SHARED:].sum().item(), abs=0.015)


@pytest.mark.parametrize("guidance", ["tgpo", "reverse-kl"])
def test_an_offloaded_teacher_returns_to_cpu_memory(problems, make_teacher, monkeypatch, guidance):
    teacher, args = make_teacher(guidance, teacher_offload=True, teacher_device="cpu:0")
    devices = ["cpu"]
    used_on = set()
    move = teacher.model.to

    def to(device):
        devices.append(str(device))
        return move(device)

    monkeypatch.setattr(teacher.model, "to", to)
    teacher.model.base_model.register_forward_pre_hook(lambda *_: used_on.add(devices[-1]))
    run_update(problems, teacher, args)
    assert used_on == {"cpu:0"}
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
    ("tgpo", {"tokenizer": "other_end"}),
    ("reverse-kl", {"tokenizer": "other_end"}),
]


def drawn_labels(teacher: tgpo.Teacher, problems) -> dict[tuple, list[int]]:
    """Return the labels that update() draws for every completion."""
    ro = rollout_of(tgpo, problems)
    torch.manual_seed(0)
    advice = teacher.read(ro, list(range(12)))
    labels = {}
    for ids, mask, of_sample in zip(ro.completions, ro.mask, advice.labels):
        labels[tuple(ids[mask].tolist())] = of_sample[mask].tolist()
    return labels


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("guidance, flags", SETTINGS)
def test_gradient(guidance, flags, updates, problems, make_teacher, monkeypatch):
    """In the second update ratios, bonuses and RKL's advantages are those of the policy that sampled."""
    monkeypatch.setattr(common, "CHUNK_LOGITS", 4 * 300)
    teacher, args = make_teacher(guidance, updates_per_rollout=updates, **flags)
    labels = drawn_labels(teacher, problems) if guidance == "tgpo-sampled" else None
    steps, metrics = run_update(problems, teacher, args)
    check_steps(steps, metrics, reference.tgpo_loss, problems, args, exact_teacher(teacher), COEF, labels)


def test_every_setting_moves_the_gradient(problems, make_teacher):
    """Otherwise the comparison above would prove nothing about its method or flag."""
    gradients = []
    for guidance, flags in SETTINGS:
        steps, _ = run_update(problems, *make_teacher(guidance, **flags))
        gradient = steps[0][1]
        assert all(error(gradient, other) > 1e-4 for other in gradients), (guidance, flags)
        gradients.append(gradient)


@pytest.mark.parametrize("guidance", tgpo.METHODS)
def test_microbatches_change_nothing(problems, make_teacher, guidance):
    gradients = []
    for budget in (10 ** 6, 1):
        teacher, args = make_teacher(guidance, microbatch_tokens=budget)
        steps, _ = run_update(problems, teacher, args)
        gradients.append(steps[0][1])
        assert all(p.grad is None for p in teacher.model.parameters())
    assert error(*gradients) < 1e-5


def test_without_guidance_tgpo_is_grpo_bit_for_bit(problems, make_teacher):
    teacher, args = make_teacher("none")
    with_teacher, _ = run_update(problems, teacher, args)
    alone, _ = run_update(problems, None, args)
    model = student()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    grpo = record_steps(model, optimizer)
    rewards = torch.tensor([p.rewards for p in problems], dtype=torch.float)
    A = grpo_baseline.group_advantages(rewards).flatten()
    grpo_baseline.update(model, optimizer, rollout_of(grpo_baseline, problems), A, args)
    assert torch.equal(alone[0][1], grpo[0][1])
    assert torch.equal(with_teacher[0][1], grpo[0][1])


@pytest.mark.parametrize("coef, num_trained", [(COEF, 12), (0.0, 6)])
def test_groups_of_equal_rewards_train_until_the_coefficient_is_0(problems, make_teacher, monkeypatch, coef,
                                                                  num_trained):
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

def test_metrics(problems, make_teacher):
    teacher, args = make_teacher(microbatch_tokens=40)
    _, metrics = run_update(problems, teacher, args)
    nll, k1, mismatch, dropped = [], [], [], 0
    for problem in problems:
        for completion in problem.completions:
            logits = reference.teacher_logits_of(exact_teacher(teacher), problem.prompt, completion, 1.0)
            p = logits[:, :SHARED].log_softmax(-1)
            logits_of_student = reference.logits_of(student().double(), problem.prompt, completion, 1.0)
            q = logits_of_student[:, :SHARED].log_softmax(-1)
            for t, a in enumerate(completion):
                label = reference.label_of(exact_teacher(teacher), logits[t])
                mismatch.append(label != a)
                dropped += label >= SHARED
                if a < SHARED:
                    nll.append(-p[t, a].item())
                    k1.append((q[t, a] - p[t, a]).item())
    assert metrics["tgpo/teacher_nll"] == pytest.approx(np.mean(nll), abs=1e-5)
    assert metrics["tgpo/reverse_kl_k1"] == pytest.approx(np.mean(k1), abs=1e-5)
    assert metrics["tgpo/mismatch"] == pytest.approx(np.mean(mismatch))
    assert metrics["tgpo/dropped_labels"] == dropped > 0
    assert len(nll) == len(mismatch) - 1


def test_a_teacher_equal_to_the_student_has_nothing_to_teach(make_teacher):
    teacher, args = make_teacher("reverse-kl", reward_weight=0.0)
    model = copy.deepcopy(teacher.model).requires_grad_()
    steps, metrics = run_update(example(), teacher, args, model=model)
    assert metrics["tgpo/reverse_kl_k1"] == pytest.approx(0, abs=1e-6)
    assert metrics["tgpo/mismatch"] > 0
    assert steps[0][1].norm() < 1e-4


# ---------------------------------------------------------------- wrong pairs

@pytest.mark.parametrize("flags, message", [
    ({"topk": 261}, "--topk 261: student and teacher share 260 tokens"),
    ({"max_new_tokens": 4090}, "exceeds the context"),
])
def test_flags_that_do_not_fit_the_teacher_are_refused(make_teacher, teacher_dir, capsys, flags, message):
    _, args = make_teacher(**flags)
    teacher_tokenizer = common.load_tokenizer(f"{teacher_dir}/same_end")
    with pytest.raises(SystemExit):
        tgpo.check_teacher(args, small_tokenizer(), teacher_tokenizer, [{"problem": "1 + 1"}])
    assert message in capsys.readouterr().err


def test_a_prompt_that_the_teacher_cannot_read_is_refused(make_teacher, capsys):
    _, args = make_teacher()
    with pytest.raises(SystemExit):
        tgpo.check_teacher(args, small_tokenizer(more=("<a>",)), small_tokenizer(), [{"problem": "<a>"}])
    assert "it has no token 260, '<a>' to the student" in capsys.readouterr().err


def test_tokenizers_that_spell_an_id_differently_are_refused(capsys):
    tgpo.check_vocabulary(small_tokenizer(more=("<a>",)), small_tokenizer(), "t")
    with pytest.raises(SystemExit):
        tgpo.check_vocabulary(small_tokenizer(more=("<a>",)), small_tokenizer(more=("<b>",)), "t")
    assert "token 260 is '<a>' to the student and '<b>' to the teacher" in capsys.readouterr().err


def test_guidance_without_a_teacher_is_refused(capsys):
    with pytest.raises(SystemExit):
        tgpo.check_args(tgpo.Args())
    assert "--teacher is missing" in capsys.readouterr().err
