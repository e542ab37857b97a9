"""--lora_rank: adapters are trained, saved and resumed alone, and model/ is saved merged."""
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

import common
import grpo_baseline
from conftest import assert_same_runs, same_weights, write_jsonl

pytest.importorskip("peft")
LORA = ["--lora_rank", 4, "--lr", 0.01]


def lora_args(model_dirs, **flags) -> grpo_baseline.Args:
    return grpo_baseline.Args(model=str(model_dirs["qwen2"]), lora_rank=4, bf16=False, **flags)


def test_only_the_adapters_of_linear_layers_are_trained(model_dirs):
    model = common.load_lora_policy(lora_args(model_dirs))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(common.adapters(model))
    assert len(trained) == 2 * 2 * 7  # A and B of seven linear layers in two decoder layers
    assert not any("lm_head" in name for name in trained)


def test_frozen_weights_are_bf16_and_adapters_fp32(model_dirs, monkeypatch):
    load = common.load_model
    monkeypatch.setattr(common, "load_model", lambda name: load(name, dtype=torch.bfloat16))
    model = common.load_lora_policy(lora_args(model_dirs))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_saved_model_computes_what_the_adapters_compute(model_dirs, tmp_path):
    model = common.load_lora_policy(lora_args(model_dirs))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    tokenizer = common.load_tokenizer(str(model_dirs["qwen2"]))
    common.save_model(model, tokenizer, tmp_path / "model")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(model_dirs["qwen2"], dtype=torch.float32)
    ids = torch.arange(20)[None]
    assert torch.allclose(saved(ids).logits, model(ids).logits, atol=1e-4)
    assert not torch.allclose(saved(ids).logits, plain(ids).logits, atol=1e-2)


@pytest.mark.parametrize("script", ["grpo_baseline", "sgpo", "tgpo"])
def test_resume_is_exact_and_checkpoints_hold_the_adapters_only(script, train, model_dirs):
    whole = train(script, *LORA, "--steps", 3, "--save_every", 1, out="whole")
    parts = train(script, *LORA, "--steps", 1, out="parts")
    train(script, *LORA, "--steps", 3, "--resume", out="parts")
    assert_same_runs(whole, parts)
    metadata = FileSystemReader(whole / "checkpoints" / "step_000003").read_metadata()
    weights = [name for name in metadata.state_dict_metadata if name.startswith("model.")]
    assert weights
    assert all(".lora_" in name for name in weights)
    assert not same_weights(whole / "model", model_dirs["qwen2"])


def test_a_warm_up_trains_adapters_that_rl_continues(train, tmp_path, model_dirs):
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"= {2 * i % 8};"}
            for i in range(8)]
    data = write_jsonl(tmp_path / "solved.jsonl", rows)
    flags = [*LORA, "--dataset", data, "--warmup_frac", 1, "--warmup_lr", 0.01, "--warmup_epochs", 2]
    (tmp_path / "any.py").write_text("def one(response, row):\n    return 1.0\n")
    run = train("grpo_baseline", *flags, "--steps", 0, "--reward", f"{tmp_path}/any.py:one")
    assert same_weights(run / "warmup", run / "model")
    assert not same_weights(run / "model", model_dirs["qwen2"])


def test_offload_is_refused(model_dirs, capsys):
    with pytest.raises(SystemExit):
        common.load_lora_policy(lora_args(model_dirs, cpu_offload=True))
    assert capsys.readouterr().err.count("\n") == 1


def test_the_memory_rule_counts_frozen_weights_and_adapters(model_dirs, monkeypatch):
    args = lora_args(model_dirs)
    parameters = common.count_parameters(args.model, "--model")
    args.out = "."
    adapters = common.count_adapter_parameters(args)
    model = common.load_lora_policy(args)
    assert adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(common, "CHUNK_LOGITS", 0)
    card = 2.5 * parameters + 22 * adapters  # 16 + 2 bytes a parameter would not fit
    common.choose_memory(args, card)
    assert args.cpu_offload is False
