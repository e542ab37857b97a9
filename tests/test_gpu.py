"""What only a GPU can show; skipped without one."""
import pytest
import torch

import common
import sgpo
from conftest import read_jsonl
from test_rollouts import Ends, ending, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_rollouts_are_those_of_one_plain_generate():
    model, prompts = ending().cuda(), [[5, 6, 7]] * 3 + [[9, 8, 7, 6]] * 2 + [[k] for k in range(10, 40)]
    ours = common.generate(model, Ends(), prompts, 60, 0.0, 1.0)
    assert torch.equal(ours.cpu(), plain(model.cpu(), prompts, 60)[:, :ours.shape[1]])


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_bf16_logps_are_close_to_fp32_and_weights_stay_fp32(model_dirs, cpu_offload):
    exact = common.load_model(str(model_dirs["qwen2"]), dtype=torch.float32)
    model = common.load_policy(sgpo.Args(model=str(model_dirs["qwen2"]), cpu_offload=cpu_offload))
    ids = torch.randint(5, 200, (2, 12), device="cuda")
    row = [[5, 6, 7], [8]], ids, torch.ones_like(ids).bool()
    with torch.autocast("cuda", torch.bfloat16):
        logps, _ = common.completion_logps(model, *row, 1.0)
    assert (logps - common.completion_logps(exact, *row, 1.0)[0]).abs().mean() < 0.1
    logps.sum().backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p
                                                     in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("script", ["sgpo", "grpo_baseline"])
@pytest.mark.parametrize("more", [[], ["--activation_checkpointing"], ["--cpu_offload"],
                                  ["--updates_per_rollout", 2]])
def test_a_run_on_the_gpu_and_its_resume(script, more, model_dirs, rows_file, tmp_path, run_script):
    argv = ["--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward",
            f"{rows_file.parent}/reward.py:even", "--prompts_per_step", 3, "--group_size", 3,
            "--max_new_tokens", 8, "--out", tmp_path / "run", *more]
    assert run_script(script, *argv, "--steps", 2) == 0
    assert run_script(script, *argv, "--steps", 3, "--resume") == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["peak_memory_gb"] > 0 for row in rows)
    assert {p.dtype for p in common.load_model(str(tmp_path / "run"
                                                   / "model")).parameters()} == {torch.bfloat16}
