"""What a GPU does. Without one the same code runs on the CPU, with bf16 and FSDP2's offload."""
import json

import pytest
import torch
from safetensors.torch import load_file

import common
import sgpo
import tgpo
from conftest import read_jsonl, small_tokenizer, write_jsonl

PROMPTS = [[5, 6, 7]] * 3 + [[9, 8, 7, 6]] * 2 + [[k] for k in range(10, 40)]


def load_policy(model_dirs, **flags):
    return common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]), bf16=True, **flags))


def random_rollout(script):
    ids = torch.randint(5, 200, (2, 12), device=common.DEVICE)
    more = [[[5, 6, 7], [8]]] if script is sgpo else []
    return script.Rollout([[5, 6, 7], [8]], *more, ids, ids > 0, ids[:, 0] < 0, ["", ""])


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
    assert 0 < (logps - exact_logps).abs().mean() < 0.1
    logps.sum().backward()
    weights_on = "cpu" if flags.get("cpu_offload") else common.DEVICE.type
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32
        assert p.device.type == p.grad.device.type == weights_on


def test_bf16_kl_is_close_to_fp32(model_dirs):
    ro = random_rollout(sgpo)
    ro.sampled_from = [[30, 5, 6, 7], [31, 8]]
    kl = []
    for bf16 in (False, True):
        model = common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]), bf16=bf16))
        kl.append(sgpo.token_kl(model, ro, [0, 1], sgpo.Args(bf16=bf16)).detach())
    assert 0 < (kl[1] - kl[0]).abs().mean() < 0.1 * kl[0].mean()


def test_bf16_teacher_is_close_to_fp32(model_dirs):
    advice = []
    tokenizer = small_tokenizer()
    ro = random_rollout(tgpo)
    for bf16 in (False, True):
        args = tgpo.Args(teacher=str(model_dirs["llama"]), bf16=bf16, guidance="tgpo-topk")
        tgpo.check_args(args)
        teacher = tgpo.Teacher(args, tokenizer, tokenizer, [257])
        assert teacher.model.dtype == (torch.bfloat16 if bf16 else torch.float32)
        advice.append(teacher.read(ro, [0, 1]))
    assert 0 < (advice[0].logps - advice[1].logps).abs().mean() < 0.1
    assert (advice[0].labels == advice[1].labels).float().mean() > 0.8
    assert advice[1].top_ids.shape == (2, 12, 20)


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
        rows.append({"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": "==",
                     "strategy": f"Type: sum. Strategy: double. Steps: double {i}."})
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
    environment = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    run = train("grpo_baseline", "--steps", 1, "--bf16", True)
    metrics, = read_jsonl(run / "metrics.jsonl")
    config = json.loads((run / "config.json").read_text())
    assert metrics["updates"] == 1
    assert config["processes"] == 1
    assert config["device"] == (torch.cuda.get_device_name() if common.ON_GPU else "cpu")
