"""What a GPU does. Without one the same code runs on the CPU, with bf16 and FSDP2's offload."""
import json

import pytest
import torch
from safetensors.torch import load_file

import common
import sgpo
import tgpo
from conftest import read_jsonl, small_tokenizer, write_jsonl

PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 8, 7, 6], *([k] for k in range(10, 40))]


def load_policy(model_dirs, **flags):
    return common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]), bf16=True, **flags))


def random_rollout(script):
    prompts = [[5, 6, 7], [8]]
    ids = torch.randint(5, 200, (2, 12), device=common.DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)
    fields = {
        "prompts": prompts,
        "completions": ids,
        "mask": mask,
        "truncated": ~mask[:, 0],
        "texts": ["", ""],
        "sampler_logps": torch.zeros(ids.shape, device=ids.device),
        "kept_mass": torch.ones(ids.shape, device=ids.device),
    }
    if script is sgpo:
        fields["sampling_prompts"] = [[30, 5, 6, 7], [31, 8]]  # guided prompts
    return script.Rollout(**fields)


def test_offloaded_model_samples_as_the_bf16_copy_of_a_plain_one(model_dirs):
    sampled = []
    for offload in (False, True):
        model = load_policy(model_dirs, cpu_offload=offload)
        torch.manual_seed(0)
        args = sgpo.Args(max_new_tokens=20, top_p=0.9)
        sampled.append(sgpo.rollout(model, small_tokenizer(), PROMPTS, 1.0, args).completions)
    assert sampled[0].device.type == common.DEVICE.type
    assert torch.equal(*sampled)


@pytest.mark.parametrize("flags", [{}, {"activation_checkpointing": True}, {"cpu_offload": True}], ids=str)
def test_bf16_logps_are_close_to_fp32_and_weights_stay_fp32(model_dirs, flags):
    exact = common.load_model(str(model_dirs["qwen2"]), dtype=torch.float32)
    model = load_policy(model_dirs, **flags).train()
    ro = random_rollout(sgpo)
    logps, _ = sgpo.token_logps(model, ro, [0, 1], sgpo.Args(bf16=True))
    exact_logps, _ = sgpo.token_logps(exact, ro, [0, 1], sgpo.Args(bf16=False))
    error = (logps - exact_logps).abs().mean()
    assert 0 < error < 0.1
    logps.sum().backward()
    weights_on = "cpu" if flags.get("cpu_offload") else common.DEVICE.type
    for p in model.parameters():
        assert p.dtype == torch.float32
        assert p.grad.dtype == torch.float32
        assert p.device.type == weights_on


def test_bf16_kl_is_close_to_fp32(model_dirs):
    ro = random_rollout(sgpo)
    kl = []
    for bf16 in (False, True):
        model = common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]), bf16=bf16))
        kl.append(sgpo.token_kl(model, ro, [0, 1], sgpo.Args(bf16=bf16)).detach())
    error = (kl[1] - kl[0]).abs().mean()
    assert 0 < error < 0.1 * kl[0].mean()


def test_bf16_teacher_is_close_to_fp32(model_dirs):
    advice = []
    tokenizer = small_tokenizer()
    ro = random_rollout(tgpo)
    for bf16 in (False, True):
        args = tgpo.Args(teacher=str(model_dirs["llama"]), bf16=bf16, guidance="tgpo-topk")
        tgpo.check_args(args)
        teacher = tgpo.Teacher(args, tokenizer, tokenizer, [257])
        dtype = torch.bfloat16 if bf16 else torch.float32
        assert teacher.model.dtype == dtype
        advice.append(teacher.read(ro, [0, 1]))
    exact, rounded = advice
    error = (exact.logps - rounded.logps).abs().mean()
    assert 0 < error < 0.1
    same_label = exact.labels == rounded.labels
    assert same_label.float().mean() > 0.8
    assert rounded.top_ids.shape == (2, 12, 20)


@pytest.mark.parametrize("script, flags", [
    ("grpo_baseline", "--warmup_frac 0.5 --warmup_epochs 2 --activation_checkpointing"),
    ("grpo_baseline", "--warmup_frac 0.5 --warmup_epochs 2 --cpu_offload"),
    ("sgpo", "--updates_per_rollout 2"),
    ("sgpo", "--cpu_offload --target all"),
    ("tgpo", "--teacher_offload"),
    ("tgpo", "--cpu_offload --guidance reverse-kl"),
])
def test_bf16_run_and_its_resume(script, flags, train, tmp_path):
    rows = []
    for i in range(12):
        strategy = f"Type: sum. Strategy: double. Steps: double {i}."
        row = {"problem": f"{i} + {i}?", "answer": "1", "solution": "==", "strategy": strategy}
        rows.append(row)
    dataset = write_jsonl(tmp_path / "rows.jsonl", rows[2:])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[:2])
    words = f"--dataset {dataset} --eval_dataset {held_out} --eval_samples 1 --bf16 --warmup_frac 0 {flags}"
    train(script, *words.split(), "--steps", 1)
    run = train(script, *words.split(), "--steps", 2, "--resume")
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    for row in metrics[1:]:
        assert row["grad_norm"] > 0
        assert row["skipped_updates"] == 0
        assert row["peak_memory_gb"] > 0
    weights = load_file(run / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert (run / "warmup").exists() == ("--warmup_epochs" in flags)


def test_one_process_of_torchrun(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    run = train("grpo_baseline", "--steps", 1, "--bf16", True)
    metrics, = read_jsonl(run / "metrics.jsonl")
    config = json.loads((run / "config.json").read_text())
    assert metrics["updates"] == 1
    assert config["processes"] == 1
    device = torch.cuda.get_device_name() if common.ON_GPU else "cpu"
    assert config["device"] == device
