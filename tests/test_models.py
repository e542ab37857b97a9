"""Models: which are refused, how much context and memory they have, and the bf16 copy that samples."""
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import common
import grpo_baseline
import tgpo
from conftest import small_model

MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
HYBRID = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def refusal(capsys, function, *args) -> str:
    """Call a function that must refuse; return its one line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


# ---- models that break our assumptions

@pytest.mark.parametrize("kind, more, message", [
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}, "changes its logits after lm_head"),
    ("cohere", {"logit_scale": 0.0625}, "changes its logits after lm_head"),
    ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 32, **MOE}, "no hidden states and head"),
    ("gpt2", {"resid_pdrop": 0.5}, "computes something else in train mode")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_which_sampling_and_scoring_differ_is_refused(kind, more, message, dtype, capsys):
    model = small_model(kind, **more).to(dtype)
    error = refusal(capsys, common.check_model, model, "--model m")
    assert error.startswith("error: --model m: not supported, ")
    assert message in error


@pytest.mark.parametrize("kind, more", [
    ("qwen2", {}), ("llama", {}), ("qwen3", {}), ("mistral", {}), ("gemma3_text", {"head_dim": 8, **SLIDING}),
    ("phi3", {}), ("gpt_neox", {}), ("mixtral", MOE), ("falcon_h1", HYBRID)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_models_are_accepted(kind, more, dtype):
    common.check_model(small_model(kind, **more).to(dtype), "--model m")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad, tmp_path, capsys):
    model = small_model()
    model.model.norm.weight.data[3] = bad
    model.save_pretrained(tmp_path)
    assert "its weights are not finite" in refusal(capsys, common.load_model, str(tmp_path))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c"])
def test_a_path_that_is_no_directory_is_not_looked_up_on_the_hub(name, capsys):
    assert refusal(capsys, common.load_config, name) == f"error: --model {name}: no such directory\n"


def test_a_directory_without_usable_weights_is_refused(model_dirs, tmp_path, capsys):
    path = str(tmp_path)
    shutil.copy(model_dirs["qwen2"] / "config.json", tmp_path)
    assert "no causal language model can be loaded" in refusal(capsys, common.load_model, path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert "no causal language model can be made" in refusal(capsys, common.count_parameters, path, "")
    (tmp_path / "config.json").write_text("{")
    assert "no model can be loaded" in refusal(capsys, common.load_config, path)


@pytest.mark.parametrize("kind, more", [
    ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5})])
def test_dropout_is_switched_off(kind, more, tmp_path):
    """OPT has dropout in a function call, GPT-2 in modules."""
    small_model(kind, **more).save_pretrained(tmp_path)
    model = common.load_model(str(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


# ---- context

def test_longrope_is_used_below_the_original_length_only(tmp_path, capsys):
    config = {"model_type": "phi3", "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0,
              "max_position_embeddings": 256, "original_max_position_embeddings": 64,
              "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))  # as Phi-3.5 has it
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")  # as transformers 5 writes it
    for path in (str(tmp_path), str(tmp_path / "again")):
        assert common.context_length(path) == 64
        common.check_context(path, "--model", 40, 24)
        assert "the context of" in refusal(capsys, common.check_context, path, "--model", 41, 24)


def test_completions_must_fit_into_the_context(model_dirs, capsys):
    path = str(model_dirs["qwen2"])
    common.check_context(path, "--model", 96, 4000)
    error = refusal(capsys, common.check_context, path, "--model", 97, 4000)
    assert error.endswith(f"exceeds the context of --model {path}, 4096; use at most 3999\n")


# ---- memory

@pytest.fixture
def billion(monkeypatch):
    """Give every model 1e9 parameters: training takes 16 GB, the sampling copy 2 GB, a teacher 2 GB."""
    monkeypatch.setattr(common, "count_parameters", lambda name, flag: 10 ** 9)


@pytest.mark.parametrize("card, checkpointing, offload", [
    (144.1e9, False, False), (143.9e9, True, False), (24.1e9, True, False), (23.9e9, True, True)])
def test_a_small_card_switches_checkpointing_and_offload_on(card, checkpointing, offload, billion):
    args = grpo_baseline.Args(model="m")
    line = common.plan_memory(args, card)
    assert (args.activation_checkpointing, args.cpu_offload) == (checkpointing, offload)
    assert line.startswith("18 GB a process")
    assert ("--activation_checkpointing" in line, "--cpu_offload" in line) == (checkpointing, offload)


def test_given_memory_flags_are_kept(billion):
    args = grpo_baseline.Args(model="m", activation_checkpointing=False, cpu_offload=False)
    common.plan_memory(args, 1e9)
    assert (args.activation_checkpointing, args.cpu_offload) == (False, False)
    args = grpo_baseline.Args(model="m", activation_checkpointing=True, cpu_offload=True)
    common.plan_memory(args, float("inf"))
    assert (args.activation_checkpointing, args.cpu_offload) == (True, True)


@pytest.mark.parametrize("device, needed", [(None, "20 GB"), ("cuda:1", "18 GB")])
def test_a_teacher_on_the_same_card_takes_memory(device, needed, billion):
    args = tgpo.Args(model="m", teacher="t", teacher_device=device)
    assert common.plan_memory(args, 1e12).startswith(needed)


def test_processes_share_what_training_takes(billion, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 4)
    assert common.plan_memory(grpo_baseline.Args(model="m"), 1e12).startswith("6 GB")


def test_parameters_are_counted_from_the_config(model_dirs):
    model = small_model(tie_word_embeddings=True)
    counted = common.count_parameters(str(model_dirs["qwen2"]), "--model")
    assert counted == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind, more, tokens, cached", [  # two layers with 2 heads of 8 numbers for keys
    ("qwen2", {}, 10, 20), ("gemma3_text", {"head_dim": 8, **SLIDING}, 10, 10 + 4),
    ("gemma3_text", {"head_dim": 8, **SLIDING}, 3, 6)])
def test_bytes_of_the_kv_cache(kind, more, tokens, cached):
    model = small_model(kind, **more)
    assert common.kv_bytes(model, tokens) == 2 * cached * 2 * 8 * 4  # keys and values, fp32
    assert common.kv_bytes(model.bfloat16(), tokens) == 2 * cached * 2 * 8 * 2
    cache = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held <= common.kv_bytes(model, tokens)


def test_rows_that_fit(monkeypatch):
    model = small_model()
    monkeypatch.setattr(common, "CPU_CACHE_BYTES", 3.9 * common.kv_bytes(model, 10))
    assert common.rows_that_fit(model, 10) == 3
    assert common.rows_that_fit(model, 100) == 1


def test_a_model_without_attention_fits(monkeypatch):
    config = AutoConfig.for_model("mamba", vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert common.rows_that_fit(AutoModelForCausalLM.from_config(config), 10 ** 6) > 1000


# ---- the bf16 copy that samples

def test_the_bf16_copy_leaves_the_model_alone():
    model = small_model(tie_word_embeddings=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    half = common.bf16_copy(model)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in half.buffers()} == {torch.float32}  # rotary frequencies keep their precision
    assert half.lm_head.weight is half.get_input_embeddings().weight
    assert not any(p.requires_grad for p in half.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    ids = torch.tensor([[9, 8, 7, 6, 5]])
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_policy_has_fp32_weights_and_samples_in_bf16(bf16, dtype, model_dirs):
    args = grpo_baseline.Args(model=str(model_dirs["qwen2"]), bf16=bf16)
    model = common.load_policy(args).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with common.sampling_weights(model) as sampler:
        assert sampler.dtype == dtype
        assert not sampler.training
    assert model.training
