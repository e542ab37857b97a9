"""The memory plan: what it chooses, what it refuses, and that its estimate is near what a step takes."""
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

import common
import grpo_baseline
import tgpo
from conftest import ROOT, small_tokenizer

sys.path.insert(0, str(ROOT / "tests" / "bench"))
import memory as bench  # noqa: E402

SHAPES = {  # Qwen2.5's
    "0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936),
    "3B": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064)}


@pytest.fixture
def shape(tmp_path):
    """A directory of config and tokenizer, without a weight."""
    def make(name: str) -> Path:
        Qwen2Config(**SHAPES[name], max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path / name)
        small_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name
    return make


@pytest.mark.parametrize("name, gpu, chosen", [
    ("0.5B", 80e9, (False, False)), ("1.5B", 140e9, (False, False)), ("1.5B", 80e9, (False, True)), ("3B", 80e9, (False, True)), ("7B", 80e9, (True, True)), ("7B", 188e9, (False, True))])
def test_what_memory_asks_for_is_switched_on(name, gpu, chosen, shape):
    """(cpu_offload, activation_checkpointing), where the user has left them open; checkpointing is the cheaper one."""
    args = grpo_baseline.Args(model=str(shape(name)))
    line = common.fit_memory(args, 192, 1024, gpu=gpu, host=300e9)
    assert (args.cpu_offload, args.activation_checkpointing) == chosen, line
    assert [f"--{flag}" in line for flag in ("cpu_offload", "activation_checkpointing")] == list(chosen)


def test_parameters_are_counted_once(shape):
    """7.62 billion parameters at 16 bytes; a tied head of the smaller ones counts once."""
    needs = {name: common.memory_needs(Qwen2Config(**SHAPES[name]), 192, 1024, 2048, 16384, on_gpu=True) for name in SHAPES}
    assert needs["7B"]["weights, gradients, Adam"] == pytest.approx(121.8e9, rel=0.01) and needs["1.5B"]["weights, gradients, Adam"] == pytest.approx(24.7e9, rel=0.01)
    eight = common.memory_needs(Qwen2Config(**SHAPES["7B"]), 24, 1024, 2048, 16384, on_gpu=True, processes=8)
    assert eight["weights, gradients, Adam"] == pytest.approx(121.8e9 / 8, rel=0.01) and eight["weights gathered for rollouts"] == needs["7B"]["weights gathered for rollouts"]
    offloaded = common.memory_needs(Qwen2Config(**SHAPES["7B"]), 192, 1024, 2048, 16384, on_gpu=True, cpu_offload=True)
    assert offloaded["host"] == needs["7B"]["weights, gradients, Adam"] and offloaded["peak"] < needs["7B"]["peak"] - 100e9


def test_a_choice_of_the_users_is_kept_and_what_cannot_fit_is_refused_with_what_would(shape, capsys):
    args = grpo_baseline.Args(model=str(shape("7B")), cpu_offload=False)
    with pytest.raises(SystemExit) as stop:
        common.fit_memory(args, 192, 1024, gpu=80e9, host=300e9)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "122 GB weights, gradients, Adam" in err and "--cpu_offload" in err and "torchrun --nproc-per-node" in err
    args = grpo_baseline.Args(model=str(shape("1.5B")), activation_checkpointing=False, cpu_offload=False)
    with pytest.raises(SystemExit):
        common.fit_memory(args, 192, 1024, gpu=60e9, host=300e9)
    assert "--microbatch_tokens" in capsys.readouterr().err
    args = tgpo.Args(model=str(shape("0.5B")), teacher=str(shape("7B")))
    assert "15.2 GB teacher" in common.fit_memory(args, 128, 1024, gpu=80e9, host=300e9)


def test_a_dry_run_of_7b_says_its_plan_without_a_weight(shape, rows_file, tmp_path, run_script, capsys):
    assert run_script("grpo_baseline", "--model", shape("7B"), "--dataset", rows_file, "--out", tmp_path / "run", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "7B needs" in said  # on this CPU, unless it is a large one
    on_gpu = next(line for line in said.splitlines() if line.strip().startswith("on one GPU"))
    assert "122 GB of host memory" in on_gpu and "here: 80 GB GPU, 256 GB host; --cpu_offload; --activation_checkpointing" in on_gpu
    assert not (tmp_path / "run").exists()


def test_too_large_a_model_is_refused_before_a_weight_is_read(shape, rows_file, tmp_path, run_script, capsys):
    assert run_script("grpo_baseline", "--model", shape("7B"), "--dataset", rows_file, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "7B needs" in err and not (tmp_path / "run").exists()


def test_the_estimate_is_near_the_peak(tmp_path):
    """Others: python tests/bench/memory.py."""
    estimate, peak = bench.measured("small", tmp_path)
    assert estimate == pytest.approx(peak, rel=0.15)
