"""What a GPU does. Without one the same code runs on the CPU, bf16 and FSDP2's offload included."""
import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import common
import sgpo
import tgpo
from conftest import read_jsonl, small_tokenizer, write_rows
from test_rollouts import Ends, ending, plain

PROMPTS = [[5, 6, 7]] * 3 + [[9, 8, 7, 6]] * 2 + [[k] for k in range(10, 40)]


def policy_of(model_dirs, **flags):
    return common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]), bf16=True, **flags))


def test_rollouts_are_those_of_one_plain_generate():
    model = ending().to(common.HOME)
    ours, theirs = common.generate(model, Ends(), PROMPTS, 60, 0.0, 1.0), plain(model, PROMPTS, 60)
    assert ours.device.type == common.HOME.type and torch.equal(ours, theirs[:, :ours.shape[1]])


def test_an_offloaded_model_samples_as_the_bf16_copy_of_a_plain_one(model_dirs):
    sampled = []
    for offload in (False, True):
        model = policy_of(model_dirs, cpu_offload=offload)
        torch.manual_seed(0)
        sampled.append(common.complete(model, small_tokenizer(), PROMPTS, 20, 1.0, 0.9, 100)[0])
    assert torch.equal(*sampled)


@pytest.mark.parametrize("flags", [{}, {"activation_checkpointing": True}, {"cpu_offload": True}], ids=str)
def test_bf16_logps_are_close_to_fp32_and_weights_stay_fp32(model_dirs, flags):
    exact = common.load_model(str(model_dirs["qwen2"]), dtype=torch.float32)
    model = policy_of(model_dirs, **flags).train()
    assert bool(common.shards(model)) == bool(flags.get("cpu_offload"))
    ids = torch.randint(5, 200, (2, 12), device=common.device_of(model))
    row = [[5, 6, 7], [8]], ids, torch.ones_like(ids).bool()
    with torch.autocast(common.HOME.type, torch.bfloat16):
        logps, _ = common.completion_logps(model, *row, 1.0)
    assert 0 < (logps - common.completion_logps(exact, *row, 1.0)[0]).abs().mean() < 0.1
    logps.sum().backward()
    rests = "cpu" if flags.get("cpu_offload") else common.HOME.type
    for p in model.parameters():
        assert p.dtype == p.grad.dtype == torch.float32 and p.device.type == p.grad.device.type == rests


WARM_UP = ["--warmup_frac", 0.5, "--warmup_epochs", 2, "--warmup_batch_size", 2]


@pytest.mark.parametrize("script, more", [
    ("grpo_baseline", WARM_UP), ("grpo_baseline", ["--cpu_offload", *WARM_UP]),
    ("sgpo", ["--activation_checkpointing"]), ("sgpo", ["--updates_per_rollout", 2]),
    ("sgpo", ["--cpu_offload", "--target", "all"]), ("tgpo", ["--teacher_offload"]),
    ("tgpo", ["--cpu_offload", "--updates_per_rollout", 2]), ("tgpo", ["--guidance", "reverse-kl"])])
def test_a_run_and_its_resume(script, more, model_dirs, tmp_path, run_script):
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"= {2 * i % 8};",
         "strategy": f"Type: sum. Strategy: double. Steps: double {i}."} for i in range(12)])
    (tmp_path / "reward.py").write_text("def even(text, row):\n    return float(len(text) % 2 == 0)\n")
    own = {"sgpo": ["--guided_group_size", 2], "tgpo": ["--teacher", model_dirs["qwen2"]]}.get(script, [])
    argv = ["--model", model_dirs["qwen2"], "--dataset", rows, "--eval_dataset", rows, "--eval_samples", 1,
            "--reward", f"{tmp_path}/reward.py:even", "--prompts_per_step", 3, "--group_size", 3, "--bf16",
            "--max_new_tokens", 8, "--warmup_frac", 0, "--out", tmp_path / "run", *own, *more]
    assert run_script(script, *argv, "--steps", 2) == 0
    assert run_script(script, *argv, "--steps", 3, "--resume") == 0
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3] and "eval/accuracy" in metrics[3]
    assert all(row["grad_norm"] > 0 and not row["nonfinite_updates"] and row["peak_memory_gb"] > 0
               for row in metrics[1:])
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert (tmp_path / "run" / "warmup").exists() == (WARM_UP[1] in more)


def test_a_teacher_in_bf16_is_close_to_one_in_fp32(model_dirs):
    """Its log-probs, labels and top tokens."""
    said, tokenizer = [], small_tokenizer()
    ids = torch.randint(5, 200, (2, 12), device=common.HOME)
    ro = tgpo.Rollout([[5, 6], [7]], ids, ids > 0, ids[:, 0] < 0, ["", ""])
    for bf16 in (False, True):
        args = tgpo.Args(teacher=str(model_dirs["llama"]), bf16=bf16, guidance="tgpo-topk")
        tgpo.check_args(args)
        said.append(tgpo.Teacher(args, tokenizer, tokenizer, [257]).advise(ro, [0, 1]))
    assert 0 < (said[0].logps - said[1].logps).abs().mean() < 0.1
    assert (said[0].labels == said[1].labels).float().mean() > 0.8 and said[1].top_ids.shape == (2, 12, 20)


def test_one_process_of_torchrun_on_a_card(model_dirs, rows_file, tmp_path, run_script, monkeypatch, capsys):
    """Where there is no card, a small one is made up: what torch.cuda says of it."""
    if made_up := not common.ON_GPU:
        for name, value in {"set_device": None, "get_device_name": "a card", "max_memory_allocated": 2e9,
                            "get_device_properties": SimpleNamespace(total_memory=1000)}.items():
            monkeypatch.setattr(torch.cuda, name, mock.Mock(return_value=value))
        monkeypatch.setattr(common, "ON_GPU", True)
        monkeypatch.setattr(common, "room_to_pin", lambda model: False)
    for name, value in {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    assert run_script("grpo_baseline", "--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward",
                      f"{rows_file.parent}/reward.py:even", "--prompts_per_step", 3, "--group_size", 3,
                      "--max_new_tokens", 8, "--steps", 1, "--out", tmp_path / "run") == 0
    row, = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["device"] == torch.cuda.get_device_name() and config["flags"]["bf16"] is True
    assert not made_up or torch.cuda.set_device.call_args == mock.call(0)
    assert row["updates"] == 1 and (row["peak_memory_gb"] == 2e9 / 2 ** 30) == made_up
    chosen = "the card has 1e-06 GB; --activation_checkpointing; --cpu_offload"
    assert (chosen in capsys.readouterr().out) == made_up


@pytest.mark.parametrize("limit, room", [(None, True), ("max", True), ("1000", False)])
def test_host_memory_is_pinned_where_there_is_room_for_it(limit, room, tmp_path, monkeypatch):
    """24 bytes per parameter within 0.8 of the machine's memory or of its container's."""
    monkeypatch.setattr(common, "Path", lambda _: tmp_path / "memory.max")
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
    assert common.room_to_pin(torch.nn.Linear(10, 10)) is room
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with torch.device("meta"):
        assert not common.room_to_pin(torch.nn.Linear(1, int(pages * 0.81 / 48)))
