"""Prompts, chat templates and end tokens: what the model reads, and where a completion ends."""
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import common
import grpo_baseline
from conftest import CHAT_TEMPLATE, ENDOFTEXT, IM_END, as_samples, small_model, small_tokenizer

# Templates of the field, shortened
NO_SYSTEM_RAISES = (  # Gemma 2
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ messages[0]['content'] }}]")
NO_SYSTEM_SILENT = (  # Phi-3 of April 2024
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}<|end|>\n"
    "{% elif m['role'] == 'assistant' %}<|assistant|>\n{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
LAST_MESSAGE_ONLY = "[{{ messages[-1]['content'] }}]"
SYSTEM_ONLY = "[{{ messages[0]['content'] if messages[0]['role'] == 'system' }}]"
OPENS_THINKING = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")  # R1-Distill


def prompt_text(tokenizer, *args) -> str:
    return tokenizer.decode(common.build_prompt(tokenizer, *args))


# ---- prompts

def test_a_prompt_through_the_chat_template():
    assert prompt_text(small_tokenizer(), "1+1?", "Think.") == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_a_strategy_stands_before_the_problem():
    assert prompt_text(small_tokenizer(), "1+1?", "", "Add.") == (
        "<|im_start|>user\nStrategy:\nAdd.\n\nProblem:\n1+1?<|im_end|>\n<|im_start|>assistant\n")


def test_a_base_model_without_a_template_gets_plain_text():
    assert prompt_text(small_tokenizer(None), "1+1?", "Think.") == "Think.\n\n1+1?\n\nSolution:"
    assert prompt_text(small_tokenizer(None), "1+1?", "") == "1+1?\n\nSolution:"


@pytest.mark.parametrize("template, expected", [
    (NO_SYSTEM_RAISES, "[Think.\n\n1+1?]"),
    (NO_SYSTEM_SILENT, "<|user|>\nThink.\n\n1+1?<|end|>\n<|assistant|>\n"),
    (LAST_MESSAGE_ONLY, "[Think.\n\n1+1?]")])
def test_a_template_without_a_system_role_gets_one_message(template, expected):
    assert prompt_text(small_tokenizer(template), "1+1?", "Think.") == expected


@pytest.mark.parametrize("template, message", [
    (SYSTEM_ONLY, "leaves the problem out of the prompt"),
    ("{{ raise_exception('tools only') }}", "cannot write a prompt (tools only)"),
    ("{% if %}", "cannot write a prompt"),
    ({"rag": CHAT_TEMPLATE}, "cannot write a prompt")])
def test_a_template_that_cannot_show_the_problem_is_refused(template, message, capsys):
    with pytest.raises(SystemExit):
        common.build_prompt(small_tokenizer(template), "1+1?", "Think.")
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_template_that_writes_the_date_gets_a_fixed_one():
    tokenizer = small_tokenizer("{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}")
    assert prompt_text(tokenizer, "p", "") == "26 Jul 2024 p"


@pytest.mark.parametrize("lead", ["", "\n", "  ", "\n  "])
def test_nothing_else_of_the_template_changes(lead):
    tokenizer = small_tokenizer(lead + CHAT_TEMPLATE)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "p"}], tokenize=False,
                                             add_generation_prompt=True)
    assert prompt_text(tokenizer, "p", "") == expected
    tokenizer.chat_template = {"default": lead + CHAT_TEMPLATE, "tool_use": "{{ 1 }}"}
    assert prompt_text(tokenizer, "p", "") == expected


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("appended", ["<|im_end|>", "<|endoftext|>", "<|im_end|> <|endoftext|>"])
def test_an_end_token_that_the_tokenizer_appends_is_dropped(appended, template):
    tokenizer = small_tokenizer(template)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in appended.split()]
    expected = common.build_prompt(tokenizer, "p", "")
    solution = common.solution_ids(tokenizer, "s", expected)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {appended}", special_tokens=special)
    assert tokenizer("p").input_ids[1:] == [token_id for _, token_id in special]
    assert common.build_prompt(tokenizer, "p", "") == expected
    assert common.solution_ids(tokenizer, "s", expected) == solution


# ---- end tokens

PLAIN_TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
OPENS_THE_NEXT_TURN = ("{% for m in messages %}{{ '<|im_start|>' if m['role'] == 'assistant' else '' }}"
                       "{{ m['content'] }}{% endfor %}<|im_start|>")
ONE_MESSAGE = "{% if messages|length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages }}"


@pytest.mark.parametrize("template, eos, expected", [
    (CHAT_TEMPLATE, "<|im_end|>", IM_END),
    (CHAT_TEMPLATE, "<|endoftext|>", IM_END),  # a Qwen2.5 base model
    (CHAT_TEMPLATE.replace("<|im_end|>", " <|endoftext|>"), "<|im_end|>", ENDOFTEXT),
    (None, "<|endoftext|>", ENDOFTEXT),
    (PLAIN_TURNS, "<|endoftext|>", ENDOFTEXT),
    (OPENS_THE_NEXT_TURN, "<|endoftext|>", ENDOFTEXT),
    (ONE_MESSAGE, "<|endoftext|>", ENDOFTEXT)])
def test_the_end_token_is_the_one_that_closes_the_templates_turn(template, eos, expected):
    tokenizer = small_tokenizer(template, eos)
    prompt = common.build_prompt(tokenizer, "p", "")
    assert common.end_token_id(tokenizer) == expected
    assert common.solution_ids(tokenizer, "ab", prompt) == [*tokenizer("ab").input_ids, expected]


@pytest.mark.parametrize("of_config, of_generation_config, expected", [
    (None, None, [IM_END, ENDOFTEXT]),
    (7, [8, IM_END], [7, 8, IM_END, ENDOFTEXT]),
    ([7, 8], 9, [7, 8, 9, IM_END, ENDOFTEXT])])
def test_stop_ids_of_tokenizer_template_and_both_configs(of_config, of_generation_config, expected):
    model = small_model()
    model.config.eos_token_id = of_config
    model.generation_config.eos_token_id = of_generation_config
    assert common.stop_ids(model, small_tokenizer(eos="<|endoftext|>")) == expected


def test_a_tokenizer_must_have_an_end_token(tmp_path, capsys):
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path))
    assert "has no end token; set eos_token" in capsys.readouterr().err


def test_a_directory_without_a_tokenizer_is_refused(tmp_path, capsys):
    small_model().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path))
    assert "tokenizer" in capsys.readouterr().err


# ---- thinking

@pytest.mark.parametrize("template, solution, expected", [
    (OPENS_THINKING, "<think>\nhm</think> 5", "hm</think> 5"),
    (OPENS_THINKING, "\n<think>hm</think> 5", "hm</think> 5"),
    (OPENS_THINKING, "no tag <think>", "no tag <think>"),
    (OPENS_THINKING.replace("<think>\n", "<think>\n\n"), "<think>\nhm</think> 5", "hm</think> 5"),
    (CHAT_TEMPLATE, "<think>\nhm</think> 5", "<think>\nhm</think> 5")])
@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
def test_a_thinking_that_the_template_opens_is_not_opened_again(template, solution, expected, special):
    tokenizer = small_tokenizer(template, more=special)
    ids = common.solution_ids(tokenizer, solution, common.build_prompt(tokenizer, "p", ""))
    assert tokenizer.decode(ids) == expected + "<|im_end|>"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_thinking_tags_that_are_special_tokens_are_graded(end, monkeypatch):
    tokenizer = small_tokenizer(more=("<think>", "</think>"))
    model = small_model()
    model.generation_config.eos_token_id = [IM_END, ENDOFTEXT]
    text = "<think>\\boxed{5}?</think> I give up."
    completion = torch.tensor([tokenizer(text + end + "<pad><pad>", add_special_tokens=False).input_ids])
    monkeypatch.setattr(grpo_baseline, "generate_in_pieces", lambda *args: as_samples(completion))
    ro = grpo_baseline.rollout(model, tokenizer, [[1]], 1.0, grpo_baseline.Args())
    assert ro.texts == [text]
    assert common.grade(ro.texts[0], "5") == 0.0
