"""What only a GPU shows: bf16 computing over fp32 masters, offloaded shards, rollouts from bf16 weights."""
import pytest
import torch
import torch.distributed.checkpoint as dcp

import common
from conftest import read_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_bf16_logps_are_close_to_fp32_and_masters_stay_fp32(model_dirs, cpu_offload):
    model, exact = common.load_policy(str(model_dirs["qwen2"]), cpu_offload=cpu_offload), common.load_model(str(model_dirs["qwen2"]))
    completions = torch.randint(10, 250, (4, 30))
    mask = torch.ones_like(completions, dtype=torch.bool)
    prompts = [[5, 6, 7]] * 4
    expected, _ = common.completion_logps(exact, prompts, completions, mask, 1.0)
    mixed, _ = common.completion_logps(model, prompts, completions, mask, 1.0)
    assert mixed.dtype == torch.float32 and (mixed.cpu() - expected).abs().mean() < 0.1
    mixed.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu" if cpu_offload else "cuda"}
    with common.rollout_weights(model) as fast:
        assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
        assert common.generate(fast, prompts, [257], 270, 5, 0.0, 1.0).shape[0] == 4


@pytest.mark.parametrize("script", ["sgpo", "grpo_baseline"])
@pytest.mark.parametrize("more", [[], ["--activation_checkpointing"], ["--cpu_offload"], ["--updates_per_rollout", 2]])
def test_a_run_on_the_gpu(script, more, model_dirs, rows_file, tmp_path, run_script):
    out = tmp_path / "run"
    assert run_script(script, "--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward", f"{rows_file.parent}/reward.py:even", "--steps", 3,
                      "--prompts_per_step", 3, "--group_size", 4, "--max_new_tokens", 8, "--lr", 1e-3, "--out", out, *more) == 0
    assert all(torch.isfinite(torch.tensor([m["loss"], m["grad_norm"]])).all() for m in read_jsonl(out / "metrics.jsonl"))
    saved = dcp.FileSystemReader(next((out / "checkpoints").glob("step_*"))).read_metadata().state_dict_metadata
    assert all(entry.properties.dtype == torch.float32 for name, entry in saved.items() if name.endswith("norm.weight"))
