"""Models: which are refused, how much context and memory they have, and the bf16 copy that samples."""
import json
import math
import shutil

import pytest
import torch
from transformers import AutoConfig

import common
import grpo_baseline
import tgpo
from conftest import small_model

MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
MODELS = {  # model type, and what it needs beside the settings of conftest.small_model
    "qwen2": {},
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "gpt_neox": {},
    "mixtral": MOE,
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
}
REFUSED = [  # model type, settings, and why it is refused
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}, "changes its logits after lm_head"),
    ("cohere", {"logit_scale": 0.0625}, "changes its logits after lm_head"),
    ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 32, **MOE}, "no hidden states and head"),
    ("gpt2", {"resid_pdrop": 0.5}, "computes something else in train mode"),
]
READS_PADDING = [  # model type and settings
    ("rwkv", {}),
    ("minimax", {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], **MOE}),
    ("recurrent_gemma", {"block_types": ["recurrent", "attention"], "attention_window_size": 8}),
]


def refusal(capsys, function, *args) -> str:
    """Call a function that must refuse; return its one line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


# ---- models that break our assumptions

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, settings, message", REFUSED)
def test_a_model_of_which_sampling_and_scoring_differ_is_refused(kind, settings, message, dtype, capsys):
    model = small_model(kind, **settings).to(dtype)
    error = refusal(capsys, common.check_model, model, "--model m")
    assert error.startswith("error: --model m: not supported, ")
    assert message in error


@pytest.mark.parametrize("kind, settings", READS_PADDING)
def test_a_model_that_reads_left_padding_is_refused(kind, settings, capsys):
    model = small_model(kind, **settings)
    assert "reads the padding on the left" in refusal(capsys, common.check_model, model, "--model m")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_other_models_are_accepted(kind, dtype):
    model = small_model(kind, **MODELS[kind]).to(dtype)
    common.check_model(model, "--model m")


@pytest.mark.parametrize("setting, value", [("num_beams", 3), ("cache_implementation", "quantized")])
def test_the_checkpoints_way_of_generating_does_not_matter(setting, value):
    model = small_model()
    setattr(model.generation_config, setting, value)
    common.check_model(model, "--model m")


def test_the_library_chooses_the_attention(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "attn_implementation": "eager"}))
    assert common.load_model(str(tmp_path)).config._attn_implementation == "sdpa"


def test_a_teacher_may_read_left_padding(tmp_path, capsys):
    """A teacher does not sample, and what it reads is padded on the right."""
    kind, settings = READS_PADDING[1]
    small_model(kind, **settings).save_pretrained(tmp_path)
    common.load_model(str(tmp_path), "--teacher")
    assert "reads the padding on the left" in refusal(capsys, common.load_model, str(tmp_path), "--model")


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_weights_that_are_not_finite_are_refused(bad, tmp_path, capsys):
    model = small_model()
    model.model.norm.weight.data[3] = float(bad)
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


DROPOUT = {
    "gpt2": {  # in modules
        "resid_pdrop": 0.5,
        "attn_pdrop": 0.5,
        "embd_pdrop": 0.5,
    },
    "opt": {  # in a function call
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_is_switched_off(kind, tmp_path):
    small_model(kind, **DROPOUT[kind]).save_pretrained(tmp_path)
    model = common.load_model(str(tmp_path))
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    model.train()
    assert torch.equal(model(ids).logits, expected)


# ---- context

PHI_3_5 = {
    "model_type": "phi3",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("saved_again", [False, True])
@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_longrope_is_used_below_the_original_length_only(name, saved_again, tmp_path, capsys):
    rope = {name: "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {**PHI_3_5, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = str(tmp_path)
    if saved_again:  # in the form of transformers 5
        AutoConfig.from_pretrained(path).save_pretrained(path)
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
def plan(monkeypatch):
    """Return a function that plans a run whose models have 1e9 parameters: its flags and its memory line.

    Training takes 16 GB, the sampling copy 2 GB, a teacher 2 GB, activations and logits nothing.
    """
    nothing = AutoConfig.for_model("llama", hidden_size=1, intermediate_size=1, num_hidden_layers=0,
                                   num_attention_heads=1)
    monkeypatch.setattr(common, "count_parameters", lambda name, flag: 10 ** 9)
    monkeypatch.setattr(common, "load_config", lambda name: nothing)
    monkeypatch.setattr(common, "kv_bytes", lambda config, bytes_per_number, tokens: 1)
    monkeypatch.setattr(common, "check_room", lambda host, disk, out: None)
    monkeypatch.setattr(common, "CHUNK_LOGITS", 0)

    def run(card: float = math.inf, script=grpo_baseline, **flags):
        args = script.Args(model="m", out="run", bf16=True, **flags)
        lines = common.choose_memory(args, card)
        return args, lines["memory"]

    return run


@pytest.mark.parametrize("card, checkpointing, offload", [
    (24.1e9, False, False),
    (23.9e9, True, True)])
def test_a_small_card_switches_checkpointing_and_offload_on(card, checkpointing, offload, plan):
    args, line = plan(card)
    assert args.activation_checkpointing == checkpointing
    assert args.cpu_offload == offload
    if not offload:
        assert line.startswith("18 GB a process: weights 4 GB, gradients 4 GB, Adam 8 GB, sampling copy 2 GB")
    assert ("--activation_checkpointing" in line) == checkpointing
    assert ("--cpu_offload" in line) == offload


@pytest.mark.parametrize("given, card", [(False, 1e9), (True, math.inf)])
def test_given_memory_flags_are_kept(given, card, plan):
    args, line = plan(card, activation_checkpointing=given, cpu_offload=given)
    assert args.activation_checkpointing is given
    assert args.cpu_offload is given


@pytest.mark.parametrize("card, flags, tokens", [
    (math.inf, {}, 16384),
    (80e9, {"cpu_offload": True}, 32768),
    (48e9, {"cpu_offload": True}, 16384),
    (20e9, {}, 16384),  # offload switches itself on
    (80e9, {"cpu_offload": True, "microbatch_tokens": 1000}, 1000),
    (80e9, {"microbatch_tokens": 70000}, 70000)])
def test_micro_batches_are_larger_with_offload_on_a_large_card(card, flags, tokens, plan):
    args, line = plan(card, **flags)
    assert args.microbatch_tokens == tokens


def test_fp32_gathers_twice_the_weights(plan, monkeypatch):
    args, line = plan(cpu_offload=True)
    assert "gathered weights 2 GB" in line
    args.bf16 = False
    assert common.card_parts(args)["gathered weights"] == 4e9
    args.cpu_offload = False
    assert "sampling copy" not in common.card_parts(args)  # one process samples from the weights themselves
    monkeypatch.setattr(common, "world_size", lambda: 2)
    assert common.card_parts(args)["sampling copy"] == 4e9


def test_activations_of_a_long_sample_and_of_the_whole_gradient_count(large_model, monkeypatch):
    monkeypatch.setattr(common, "check_room", lambda host, disk, out: None)
    path = large_model("Qwen2.5-1.5B")
    args = grpo_baseline.Args(model=path, out="run", bf16=True, microbatch_tokens=1024, max_new_tokens=8192)
    common.choose_memory(args, 60e9)  # one sample of 9,216 tokens takes 39 GB
    assert args.activation_checkpointing
    monkeypatch.setattr(common, "world_size", lambda: 8)
    path = large_model("Qwen2.5-7B")
    args = grpo_baseline.Args(model=path, out="run", bf16=True, microbatch_tokens=3072)
    lines = common.choose_memory(args, 80e9)
    assert "whole gradient 30.5 GB" in lines["memory"]
    assert args.activation_checkpointing


def test_offload_switches_checkpointing_on(plan):
    args, line = plan(cpu_offload=True)
    assert args.activation_checkpointing
    args, line = plan(cpu_offload=True, activation_checkpointing=False)
    assert not args.activation_checkpointing


def test_a_resumed_run_may_have_other_micro_batches(train):
    """A run that began with 16384 goes on with the same command; its config.json names the number it used."""
    run = train("grpo_baseline", "--steps", 1)
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["microbatch_tokens"] == 16384
    train("grpo_baseline", "--steps", 2, "--cpu_offload", "--resume")
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["microbatch_tokens"] == 32768
    again = train("grpo_baseline", "--steps", 3, "--microbatch_tokens", 150, "--resume")
    assert json.loads((again / "config.json").read_text())["flags"]["microbatch_tokens"] == 150


@pytest.mark.parametrize("device, needed", [(None, "20 GB"), ("cuda:1", "18 GB")])
def test_a_teacher_on_the_same_card_takes_memory(device, needed, plan):
    args, line = plan(script=tgpo, teacher="t", teacher_device=device)
    assert line.startswith(needed)


def test_processes_share_what_training_takes(plan, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 4)
    args, line = plan()
    assert line.startswith("10 GB a process: weights 1 GB, gradients 1 GB, Adam 2 GB, sampling copy 2 GB")
    assert "whole gradient 4 GB" in line


@pytest.mark.parametrize("card, processes, flags, fits", [
    (math.inf, 1, {}, True),
    (8.1e9, 1, {"cpu_offload": True}, True),
    (7.9e9, 1, {"cpu_offload": True}, False),
    (12.1e9, 4, {}, True),  # a quarter of 16 GB rests there, and as much again stays free
    (11.9e9, 4, {}, False),
    (12.4e9, 4, {"script": tgpo, "teacher": "t"}, False)])
def test_the_whole_gradient_stays_on_a_large_card(card, processes, flags, fits, plan, monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: processes)
    args, line = plan(card, **flags)
    args.cpu_offload = flags.get("cpu_offload", False)
    assert common.gradient_fits(args, card) == fits


@pytest.mark.parametrize("host, disk, message", [
    (1e18, 0, "--cpu_offload needs 1e+09 GB of host memory"),
    (0, 1e18, "checkpoints and model need 1e+09 GB of disk")])
def test_a_run_that_does_not_fit_into_host_memory_or_disk_is_refused(host, disk, message, tmp_path, capsys):
    out = str(tmp_path / "new" / "run")
    assert message in refusal(capsys, common.check_room, host, disk, out)
    common.check_room(0, 0, out)


def test_parameters_are_counted_from_the_config(model_dirs):
    model = small_model(tie_word_embeddings=True)
    counted = common.count_parameters(str(model_dirs["qwen2"]), "--model")
    assert counted == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind, tokens, cached", [
    ("qwen2", 10, 10 + 10),
    ("gemma3_text", 10, 4 + 10),  # its first layer keeps a window of 4
    ("gemma3_text", 3, 3 + 3)])
def test_bytes_of_the_kv_cache(kind, tokens, cached):
    model = small_model(kind, **MODELS[kind])
    numbers = 2 * cached * 2 * 8  # keys and values of two heads
    assert common.kv_bytes(model.config, 4, tokens) == 4 * numbers
    ids = torch.ones(1, tokens, dtype=torch.long)
    held = 0
    for layer in model(ids, use_cache=True).past_key_values.layers:
        held += layer.keys.nbytes + layer.values.nbytes
    assert held <= 4 * numbers
    assert common.kv_bytes(model.config, 2, tokens) == 2 * numbers


def test_sequences_that_fit(monkeypatch):
    config = small_model().config
    row = common.kv_bytes(config, 4, 10)
    monkeypatch.setattr(common, "CPU_CACHE_BYTES", 3.9 * row)
    assert common.sequences_that_fit(config, 4, 10, math.inf) == 3
    assert common.sequences_that_fit(config, 4, 100, math.inf) == 1
    assert common.sequences_that_fit(config, 4, 10, 10 * row) == 8  # a fifth stays free
    assert common.sequences_that_fit(config, 2, 10, 10 * row) == 16


def test_a_model_without_attention_fits():
    config = AutoConfig.for_model("mamba", vocab_size=260, hidden_size=16, num_hidden_layers=1)
    assert common.sequences_that_fit(config, 4, 10 ** 6, math.inf) > 1000


# Users' models as their published configurations have them: hidden size, size of the MLP, layers, heads,
# KV heads, size of a head, vocabulary, tied head, bias of the query, key and value projections
LARGE = {
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True, True),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, False),
    "Llama-3.1-8B": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False, False),
}
CARDS = [(24e9, 1), (48e9, 1), (80e9, 1), (141e9, 1), (80e9, 8)]  # bytes of a card, processes
EXPECTED = {  # by model: parameters, KV bytes a token
    "Qwen2.5-1.5B": (1_543_714_304, 28_672),
    "Qwen2.5-7B": (7_615_616_512, 57_344),
    "Qwen3-8B": (8_190_735_360, 147_456),
    "Llama-3.1-8B": (8_030_261_248, 131_072),
}


@pytest.fixture
def large_model(tmp_path):
    """Return a function that writes the config.json of one of the LARGE models and returns its directory."""
    def write(name: str) -> str:
        kind, hidden, mlp, layers, heads, kv_heads, head_size, vocabulary, tied, _ = LARGE[name]
        config = AutoConfig.for_model(
            kind, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_size,
            vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768)
        config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def parameters_by_hand(name: str) -> int:
    kind, hidden, mlp, layers, heads, kv_heads, head_size, vocabulary, tied, has_bias = LARGE[name]
    queries = heads * head_size
    keys = kv_heads * head_size
    attention = hidden * queries + 2 * hidden * keys + queries * hidden
    if has_bias:
        attention += queries + 2 * keys
    if kind == "qwen3":
        attention += 2 * head_size  # norms of queries and keys
    layer = attention + 3 * hidden * mlp + 2 * hidden
    embeddings = vocabulary * hidden * (1 if tied else 2)
    return layers * layer + embeddings + hidden


@pytest.mark.parametrize("name", LARGE)
def test_the_plan_of_large_models(name, large_model, monkeypatch):
    """Weights, rows at once and switches follow from config.json alone; against sums by hand."""
    parameters, kv_a_token = EXPECTED[name]
    assert parameters_by_hand(name) == parameters
    path = large_model(name)
    monkeypatch.setattr(common, "check_room", lambda host, disk, out: None)
    for card, processes in CARDS:
        monkeypatch.setattr(common, "world_size", lambda: processes)
        args = grpo_baseline.Args(model=path, out="run", bf16=True)
        lines = common.choose_memory(args, card)
        resident = 16 * parameters / processes + 2 * parameters
        logits = 16 * common.CHUNK_LOGITS
        assert args.cpu_offload == (resident + logits > 0.75 * card)
        while_sampling = 2 * parameters
        if not args.cpu_offload:
            while_sampling += 12 * parameters / processes  # gradients are freed after the step
        rows = int(0.8 * (card - while_sampling) / (kv_a_token * 3072))
        assert lines["sampling"].startswith(f"{min(rows, 192)} completions of up to 3072 tokens")
        assert f"{kv_a_token / 1e3:.3g} kB a token" in lines["sampling"]


# ---- the bf16 copy that samples

def dtypes(tensors) -> set:
    return {tensor.dtype for tensor in tensors}


def test_the_bf16_copy_leaves_the_model_alone():
    model = small_model(tie_word_embeddings=True)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    half = common.bf16_copy(model)
    assert dtypes(half.parameters()) == {torch.bfloat16}
    assert dtypes(half.buffers()) == {torch.float32}  # rotary frequencies keep their precision
    assert half.lm_head.weight is half.get_input_embeddings().weight
    assert not half.lm_head.weight.requires_grad
    torch.testing.assert_close(half(ids).logits.float(), before, atol=0.3, rtol=0.1)
    assert dtypes(model.parameters()) == {torch.float32}
    assert model.lm_head.weight.requires_grad
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_policy_has_fp32_weights_and_samples_in_bf16(bf16, dtype, model_dirs):
    path = str(model_dirs["qwen2"])
    args = grpo_baseline.Args(model=path, bf16=bf16)
    model = common.load_policy(args)
    model.train()
    assert dtypes(model.parameters()) == {torch.float32}
    with common.sampling_weights(model) as sampler:
        assert sampler.dtype == dtype
        assert not sampler.training
    assert model.training
