"""The demo's files: its problems, what its three models do, and what build.py teaches them."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parent / "demo"
sys.path.insert(0, str(DEMO))
import build  # noqa: E402

TRAIN = [json.loads(line) for line in (DEMO / "train.jsonl").open(encoding="utf-8")]
HELD_OUT = [json.loads(line) for line in (DEMO / "held_out.jsonl").open(encoding="utf-8")]
WORDS = [build.in_words(operation) for operation in build.SIGNS]


def load(name):
    model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(DEMO / name)


def samples(name, guided=False):
    torch.manual_seed(0)
    model, tokenizer = load(name)
    prompts = build.prompts_of(HELD_OUT, tokenizer, guided)
    return build.sample(model, tokenizer, prompts)


def test_problems_lead_to_their_answers_and_the_held_out_ones_are_new():
    assert build.make_problems() == (TRAIN, HELD_OUT)
    for problem in TRAIN + HELD_OUT:
        value = int(problem["problem"].split()[1])
        steps = problem["strategy"].split("Steps: ")[1].removesuffix(".")
        chain = ""
        for step in steps.split(", "):
            result = eval(f"{value}{step}")
            chain += f"{value}{step}={result};"
            value = result
        assert problem["solution"] == chain + f"\\boxed{{{value}}}"
        assert problem["answer"] == str(value)
        assert problem["answer"] not in problem["strategy"]
    trained = {problem["problem"] for problem in TRAIN}
    held_out = {problem["problem"] for problem in HELD_OUT}
    assert not trained & held_out
    assert {text[0] for text in trained} == {text[0] for text in held_out}  # no kind is new


@pytest.mark.parametrize("name", ["student", "teacher", "teacher_same_style"])
def test_a_model_loads_with_its_tokenizer(name):
    model, tokenizer = load(name)
    assert model.config.vocab_size == len(tokenizer)
    for settings in (tokenizer, model.config, model.generation_config):
        assert settings.pad_token_id == 0
        assert settings.eos_token_id == 1
    for problem in HELD_OUT:
        for field in ("problem", "solution", "strategy"):
            ids = tokenizer(problem[field]).input_ids
            assert tokenizer.decode(ids) == problem[field]
    prompt = build.build_prompt(tokenizer, "E 30", "")
    assert tokenizer.decode(prompt) == "<user>E 30<assistant>"


def test_the_student_follows_a_strategy_and_seldom_finds_it_alone():
    alone = samples("student")
    guided = samples("student", guided=True)
    assert 0.0 < build.accuracy(alone, HELD_OUT) < 0.25
    assert build.accuracy(guided, HELD_OUT) > 0.95
    assert build.words_used(alone + guided) == 0.0


@pytest.mark.parametrize("name, words", [("teacher", 1.0), ("teacher_same_style", 0.0)])
def test_a_teacher_is_right_in_its_own_style(name, words):
    texts = samples(name)
    assert build.accuracy(texts, HELD_OUT) > 0.85
    assert build.words_used(texts) == words


TOKENIZER = build.make_tokenizer()


def draw(seed, words=True):
    """Return an example for the student and one for a teacher, for each of 100 problems."""
    rng = np.random.default_rng(seed)
    leanings = build.draw_leanings(rng)
    student = [build.student_example(problem, TOKENIZER, leanings, rng) for problem in TRAIN[:100]]
    teacher = [build.teacher_example(problem, TOKENIZER, words, rng) for problem in TRAIN[:100]]
    return student, teacher


def taught_operations(labels):
    """Return the operations that are taught, in either style."""
    texts = [TOKENIZER.decode([token]) for token in labels if token != build.IGNORE]
    return [text for text in texts if text in build.SIGNS + WORDS]


def test_examples_depend_on_the_seed_alone():
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize("words", [True, False])
def test_a_teacher_is_taught_right_continuations_in_its_own_style(words):
    cuts = set()
    for problem, (ids, labels) in zip(TRAIN, draw(0, words)[1]):
        right = build.chosen_operations(build.KINDS[problem["problem"][0]])
        if words:
            right = [build.in_words(operation) for operation in right]
        first = labels.index(next(token for token in labels if token != build.IGNORE))
        assert labels[first:] == ids[first:]
        taught = taught_operations(labels)
        assert taught == right[len(right) - len(taught):]
        cuts.add(len(taught))
    assert cuts == {0, 1, 2, 3, 4}


def test_the_student_is_taught_the_style_its_prompt_asks_for_and_reads_both():
    unlike = 0
    for ids, labels in draw(0)[0]:
        in_words = TOKENIZER.decode(ids).startswith("<system>In words.")
        taught = taught_operations(labels)
        assert set(taught) <= set(WORDS if in_words else build.SIGNS)
        unlike += len(taught) < 4  # the others are in the other style
    assert unlike > 5
