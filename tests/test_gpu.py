"""What only a GPU shows: bf16 autocast over fp32 masters, and the bf16 rollout copy. The copy itself is also tested without one."""
import copy

import pytest
import torch

import common
from conftest import read_jsonl, small_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_the_rollout_copy_takes_the_new_weights_and_leaves_the_masters():
    model = small_model()
    fast = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    masters = [p.clone() for p in model.parameters()]
    common.sync_rollout_copy(fast, model)
    assert all(torch.equal(f, m.bfloat16()) for f, m in zip(fast.parameters(), model.parameters(), strict=True))
    assert all(p.dtype == torch.float32 and torch.equal(p, m) for p, m in zip(model.parameters(), masters))


@needs_gpu
def test_bf16_logps_are_close_to_fp32():
    model = small_model().cuda()
    completions = torch.randint(10, 250, (4, 30), device="cuda")
    mask = torch.ones_like(completions, dtype=torch.bool)
    prompts = [[5, 6, 7]] * 4
    exact, _ = common.completion_logps(model, prompts, completions, mask, 1.0)
    with common.autocast(model.device):
        mixed, _ = common.completion_logps(model, prompts, completions, mask, 1.0)
    assert mixed.dtype == torch.float32 and (mixed - exact).abs().mean() < 0.1


@needs_gpu
@pytest.mark.parametrize("script", ["sgpo", "grpo_baseline"])
@pytest.mark.parametrize("more", [[], ["--activation_checkpointing"], ["--updates_per_rollout", 2]])
def test_a_run_on_the_gpu(script, more, model_dirs, rows_file, tmp_path, run_script):
    out = tmp_path / "run"
    assert run_script(script, "--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward", f"{rows_file.parent}/reward.py:even", "--steps", 3,
                      "--prompts_per_step", 3, "--group_size", 4, "--max_new_tokens", 8, "--lr", 1e-3, "--out", out, *more) == 0
    assert all(torch.isfinite(torch.tensor([m["loss"], m["grad_norm"]])).all() for m in read_jsonl(out / "metrics.jsonl"))
    assert torch.load(next((out / "checkpoints").glob("*.pt")), weights_only=True)["model"]["model.norm.weight"].dtype == torch.float32
