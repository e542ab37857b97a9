"""Two processes, joined as torchrun joins them, compute what one computes.

Completions are made up where results are compared, because only sampling may differ.
"""
import dataclasses
import multiprocessing
import os
import socket
import sys
import traceback
from collections import Counter
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig

import common
import grpo_baseline
import tgpo
from conftest import (
    IM_END, ROOT, as_samples, read_jsonl, run_main, small_model, small_tokenizer, without_times, write_jsonl)

# Children fork from a server that has imported the scripts and computed nothing, so they start fast.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sgpo", "tgpo", "grpo_baseline"])


def in_two_processes(work, *args, screen=os.devnull) -> list:
    """Return what work(*args) returns in each of two processes; what they print goes to a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the server looks for the scripts there
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = FORKS.Queue()
    processes = [FORKS.Process(target=joined, args=(rank, port, results, str(screen), work, args))
                 for rank in range(2)]
    for process in processes:
        process.start()
    try:
        values = dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for value in values.values():
        assert not str(value).startswith("Traceback"), value
    return [values[0], values[1]]


def joined(rank: int, port: int, results, screen: str, work, args) -> None:
    """Join the other process, and put what work(*args) returns or raises into the queue."""
    sys.stdout = sys.stderr = open(screen, "a")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    try:
        common.join_processes()
        results.put((rank, work(*args)))
    except BaseException:
        results.put((rank, traceback.format_exc()))


# ---- whole runs

def made_up(model, prompts, config, max_rows) -> common.Samples:
    """Stand in for generate_in_pieces: completions depend on the prompt and how often the call has it."""
    seen = Counter()
    rows = []
    for prompt in prompts:
        seen[str(prompt)] += 1
        numbers = common.random_generator(0, str(prompt), seen[str(prompt)])
        row = numbers.integers(0, 250, config.max_new_tokens)
        row[numbers.integers(1, config.max_new_tokens):] = IM_END
        rows.append(row)
    return as_samples(torch.tensor(np.stack(rows)))


def run_with_made_up_completions(script: str, argv: list) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{script}.generate_in_pieces", made_up)
        patch.setattr(sys, "argv", sys.argv)
        return run_main(script, *argv)


FLAGS = {
    "grpo_baseline": ["--updates_per_rollout", 2, "--loss_type", "dapo"],
    "sgpo": ["--delta", 5],
    "tgpo": ["--updates_per_rollout", 2, "--coefficient", 0.1],
}


@pytest.mark.parametrize("script", FLAGS)
def test_two_processes_train_as_one_and_resume_as_any_number(script, argv_of, tmp_path):
    held_out = [{"problem": f"What is {i} - {i}?", "answer": "0"} for i in range(3)]
    argv = argv_of(script, *FLAGS[script], "--microbatch_tokens", 150, "--lr", 1e-4, "--eval_every", 1,
                   "--eval_dataset", write_jsonl(tmp_path / "held_out.jsonl", held_out))
    whole = tmp_path / "whole"
    mixed = tmp_path / "mixed"
    assert run_with_made_up_completions(script, [*argv, "--steps", 3, "--out", whole]) == 0
    argv += ["--out", mixed, "--steps"]
    assert run_with_made_up_completions(script, [*argv, 1]) == 0
    assert in_two_processes(run_with_made_up_completions, script, [*argv, 2, "--resume"]) == [0, 0]
    assert run_with_made_up_completions(script, [*argv, 3, "--resume"]) == 0

    for row, reference in zip(comparable_metrics(mixed), comparable_metrics(whole), strict=True):
        assert row == pytest.approx(reference, rel=1e-4, abs=1e-5)
    assert sorted_samples(mixed) == sorted_samples(whole)
    weights = load_file(whole / "model/model.safetensors")
    for name, weight in load_file(mixed / "model/model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0)


def comparable_metrics(run) -> list[dict]:
    """Return the metrics that do not depend on the number of processes."""
    rows = without_times(read_jsonl(run / "metrics.jsonl"))
    for row in rows:
        row.pop("padding_frac", None)
    return rows


def sorted_samples(run) -> list[str]:
    """Return the lines of samples.jsonl in an order that does not depend on the number of processes."""
    return sorted((run / "samples.jsonl").read_text().splitlines())


def test_raw_rows_strategies_and_a_warm_up(model_dirs, tmp_path, run_script, capsys):
    rows = []
    for i in range(12):
        solution = f"It is \\boxed{{{2 * i}}}."
        rows.append({"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": solution})
    for row in rows[:6]:
        row["strategy"] = "Double."
    data = write_jsonl(tmp_path / "raw.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"problem": "What is 99 - 1?", "answer": "98"}])
    flags = ("--eval_samples 1 --prompts_per_step 2 --group_size 2 --guided_group_size 2 --max_new_tokens 30 "
             "--warmup_frac 0.5 --warmup_lr 0.001 --warmup_epochs 2 --strategy_candidates 2 "
             "--strategist_max_new_tokens 8")
    argv = ["--model", model_dirs["qwen2"], "--dataset", data, "--eval_dataset", held_out, *flags.split()]
    screen = tmp_path / "screen"
    run = tmp_path / "two"
    argv_now = [*argv, "--out", run, "--steps", 1]
    codes = in_two_processes(run_main, "sgpo", *argv_now, screen=screen)
    assert codes == [0, 0], screen.read_text()
    assert run_script("sgpo", *argv, "--out", tmp_path / "one", "--steps", 0) == 0

    extracted = len(read_jsonl(run / "strategies.jsonl"))
    assert 0 < extracted < 6
    assert screen.read_text().count(f"strategies: {extracted} of {extracted} problems done, 0 found") == 1
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 1]
    assert losses_of_warmup(screen.read_text()) == losses_of_warmup(capsys.readouterr().out)
    alone = load_file(tmp_path / "one/warmup/model.safetensors")
    for name, weight in load_file(run / "warmup/model.safetensors").items():
        torch.testing.assert_close(weight, alone[name], atol=1e-5, rtol=0)


def losses_of_warmup(screen: str) -> list[str]:
    """Return the printed lines with an epoch's losses. Adam's weights would not show a doubled gradient."""
    return [line for line in screen.splitlines() if line.startswith("warm-up: epoch")]


def test_a_refusal_is_printed_once(argv_of, tmp_path):
    argv = argv_of("grpo_baseline", "--prompts_per_step", 3, "--out", tmp_path / "run")
    screen = tmp_path / "screen"
    assert in_two_processes(run_main, "grpo_baseline", *argv, screen=screen) == [2, 2]
    assert screen.read_text().splitlines() == [
        "error: --prompts_per_step 3 must be a multiple of processes x --updates_per_rollout, 2"]


# ---- parts

PROMPTS = [[[5, 6, 7]], [[9, 8, 7, 6], [5, 6]]]  # of each process


def parts(model_folder, rows_file, folder) -> dict:
    """Return what one of two processes gets from the functions of common.py."""
    rank = common.rank()
    table = torch.arange(12).view(6, 2)
    share = common.my_share(table)
    if rank == 1:  # its grader takes too long for some answers
        common.gold_is_gradable = lambda gold: gold != "4"
    args = grpo_baseline.Args(model=str(model_folder), dataset=str(rows_file))
    tokenizer = small_tokenizer()
    data = common.load_data(args, tokenizer, None)
    model = common.load_policy(args)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=5 + 4 * rank, eos_token_id=[IM_END],
                              pad_token_id=IM_END)
    completions = common.generate_in_pieces(model, PROMPTS[rank], greedy, 10).ids
    common.save_model(model, tokenizer, folder / "model")
    common.seed_everything(0, "step", 1)
    return {
        "share": share.tolist(),
        "gathered": common.gather(share).tolist(),
        "sums": common.sum_over_processes(1, rank),
        "kept": [problem["id"] for problem in data.train],
        "is_sharded": len(common.sharded_modules(model)) > 2,
        "num_batches": len(common.microbatches([0, 1, 2][rank:], [9, 9, 9], 9)),
        "completions": completions.tolist(),
        "draw": float(torch.rand(1)),
        "embedding": get_model_state_dict(model)["lm_head.weight"].full_tensor().tolist(),
    }


@pytest.fixture(scope="module")
def ranks(model_dirs, rows_file, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("parts")
    values = in_two_processes(parts, model_dirs["qwen2"], rows_file, folder)
    return [{**value, "folder": folder / "model"} for value in values]


def test_gather_is_the_inverse_of_my_share(ranks):
    assert ranks[1]["share"] == [[2, 3], [6, 7], [10, 11]]
    for rank in ranks:
        assert rank["gathered"] == torch.arange(12).view(6, 2).tolist()
        assert rank["sums"] == [2, 1]


def test_the_first_process_decides_which_problems_are_kept(ranks):
    assert ranks[0]["kept"] == ranks[1]["kept"]
    assert len(ranks[0]["kept"]) == 8


def test_processes_have_equally_many_micro_batches(ranks):
    assert [rank["num_batches"] for rank in ranks] == [3, 3]


def test_each_process_samples_at_its_own_pace_with_its_own_random_numbers(ranks):
    model = small_model(tie_word_embeddings=True)
    for number, rank in enumerate(ranks):
        greedy = GenerationConfig(do_sample=False, max_new_tokens=5 + 4 * number, eos_token_id=[IM_END],
                                  pad_token_id=IM_END)
        alone = common.generate_in_pieces(model, PROMPTS[number], greedy, 10).ids
        assert rank["is_sharded"]
        assert rank["completions"] == alone.tolist()
    assert ranks[0]["draw"] != ranks[1]["draw"]


def test_a_sharded_tied_model_is_saved_once_and_loads(ranks, model_dirs):
    saved = ranks[0]["folder"] / "model.safetensors"
    original = model_dirs["qwen2"] / "model.safetensors"
    assert abs(saved.stat().st_size - original.stat().st_size) < 500
    loaded = AutoModelForCausalLM.from_pretrained(saved.parent)
    assert loaded.lm_head.weight.tolist() == ranks[0]["embedding"]
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, small_model(tie_word_embeddings=True)(ids).logits)


# ---- one reduction of the gradient

SEQUENCES = [([5, 6, 7], [8, 9, 10, 11]), ([9, 8], [7, 6]), ([1, 2, 3, 4, 5], [6]), ([4, 3], [9, 9, 9])]
BATCHES = {  # of each process
    "both": [[[0], [1], []], [[2], [], [3]]],
    "one": [[[0], [1], [2, 3]], [[], [], []]],
}


def accumulated_gradient(model, batches: list[list[int]], bf16: bool) -> dict:
    """Return the gradient of all weights, and which passes began with a part of it reduced."""
    began_reduced = []
    for idx in common.accumulate(model, batches):
        began_reduced.append(any(p.grad is not None for p in model.parameters()))
        solutions, mask = common.right_pad([SEQUENCES[i][1] for i in idx], "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = common.completion_hidden(model, [SEQUENCES[i][0] for i in idx], solutions, mask)
            loss = common.solution_loss(model, hidden, solutions[mask])
        loss.backward()
    return {"began_reduced": began_reduced, "gradient": whole_gradient(model)}


def whole_gradient(model) -> dict[str, np.ndarray]:
    """Return the gradient of every weight, gathered from all processes, and forget it."""
    gradient = {}
    for name, p in model.named_parameters():
        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        gradient[name] = whole.numpy()  # a tensor in a queue would need its process
        p.grad = None
    return gradient


def with_and_without_deferral(model_folder, bf16: bool, cpu_offload: bool) -> list[dict]:
    args = grpo_baseline.Args(model=str(model_folder), bf16=bf16, cpu_offload=cpu_offload)
    model = common.load_policy(args)
    model.train()
    assert model.reduces_gradient_once
    results = {}
    for name, batches in BATCHES.items():
        for reduces_once in (True, False):
            model.reduces_gradient_once = reduces_once
            model.set_requires_gradient_sync(True)
            mine = batches[common.rank()]
            results[name, reduces_once] = accumulated_gradient(model, mine, bf16)
    return results


@pytest.mark.parametrize("bf16, cpu_offload", [(False, False), (True, False), (True, True)])
def test_the_gradient_is_reduced_once(bf16, cpu_offload, model_dirs):
    for results in in_two_processes(with_and_without_deferral, model_dirs["qwen2"], bf16, cpu_offload):
        for name in BATCHES:
            assert results[name, True]["began_reduced"] == [False, False, False]
            assert results[name, False]["began_reduced"] == [False, True, True]
            for weight, gradient in results[name, True]["gradient"].items():
                each_pass = results[name, False]["gradient"][weight]
                if name == "one":
                    assert np.array_equal(gradient, each_pass)
                # Two processes add in another order: (a1 + a2) + (b1 + b2), not (a1 + b1) + (a2 + b2).
                np.testing.assert_allclose(gradient, each_pass, atol=1e-5, rtol=1e-5)


def test_a_gradient_reduced_once_is_the_sum_of_what_the_processes_compute_alone(model_dirs):
    alone = []
    for batches in BATCHES["both"]:
        model = common.load_model(str(model_dirs["llama"]), dtype=torch.float32)
        model.requires_grad_().train()
        alone.append(accumulated_gradient(model, batches, bf16=False)["gradient"])
    for results in in_two_processes(with_and_without_deferral, model_dirs["llama"], False, False):
        for weight, gradient in results["both", True]["gradient"].items():
            assert np.array_equal(gradient, alone[0][weight] + alone[1][weight])


# ---- sampling from a sharded model

def sampled(model, number: int) -> list:
    """Return greedy and random completions of process `number`, whose length differs between processes."""
    completions = []
    for do_sample in (False, True):
        torch.manual_seed(number)
        config = GenerationConfig(do_sample=do_sample, temperature=1.0, top_p=0.9, top_k=0,
                                  max_new_tokens=5 + 4 * number, eos_token_id=[IM_END], pad_token_id=IM_END)
        completions.append(common.generate_in_pieces(model, PROMPTS[number], config, 10).ids.tolist())
    return completions


def hooks_of(model) -> list[list]:
    """Return the forward hooks of every sharded module."""
    return [[*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
            for module in common.sharded_modules(model)]


def sampled_and_trained(model_folder, bf16: bool) -> list:
    """Sample before, after and between training passes, with an error inside; return the completions."""
    args = grpo_baseline.Args(model=str(model_folder), bf16=bf16)
    batches = BATCHES["both"][common.rank()]
    trained_only = accumulated_gradient(common.load_policy(args), batches, bf16)["gradient"]
    model = common.load_policy(args)
    completions = sampled(model, common.rank())
    hooks = hooks_of(model)
    gradient = accumulated_gradient(model, batches, bf16)["gradient"]
    completions_after = sampled(model, common.rank())
    with pytest.raises(KeyError), common.sampling_weights(model):
        without_hooks = hooks_of(model)
        raise KeyError
    gradient_after = accumulated_gradient(model, batches, bf16)["gradient"]
    assert len(hooks) == 3
    assert all(len(of_module) == 2 for of_module in hooks)
    assert without_hooks == [[], [], []]
    assert hooks_of(model) == hooks
    assert completions_after == completions
    for name, expected in trained_only.items():
        assert np.array_equal(gradient[name], expected)
        assert np.array_equal(gradient_after[name], expected)
    return completions


@pytest.mark.parametrize("bf16", [False, True])
def test_a_sharded_model_samples_like_a_plain_one_and_trains_afterwards(bf16, model_dirs):
    results = in_two_processes(sampled_and_trained, model_dirs["qwen2"], bf16)
    plain = common.load_policy(grpo_baseline.Args(model=str(model_dirs["qwen2"]), bf16=bf16))
    assert results == [sampled(plain, 0), sampled(plain, 1)]


# ---- loading by the first process

@pytest.fixture(scope="module", params=["tied", "untied"])
def loadable(request, tmp_path_factory):
    """Return a folder with a small model, whose generation config has end tokens of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    model = small_model("qwen2", tie_word_embeddings=request.param == "tied")
    model.generation_config.eos_token_id = [3, 4]
    model.save_pretrained(folder)
    return folder


def without_a_file(load):
    """Return what load() returns, in the second process without access to the weights' file."""
    with pytest.MonkeyPatch.context() as patch:
        if common.rank() == 1:
            patch.setattr(common.AutoModelForCausalLM, "from_pretrained", None)
        return load()


def described(model) -> dict:
    """Return what a model must have in common with the one in its file."""
    weights = {}
    for name, weight in get_model_state_dict(model).items():
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights[name] = whole.float().tolist()
    return {
        "weights": weights,
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "parameters": [(name, str(p.dtype), p.requires_grad) for name, p in model.named_parameters()],
        "is_tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "attention": model.config._attn_implementation,
        "training": model.training,
    }


def policy_and_teacher(folder, cpu_offload: bool) -> tuple[dict, dict, dict]:
    """Return what a policy and a teacher are, and the policy's gradient."""
    args = tgpo.Args(model=str(folder), teacher=str(folder), bf16=False, cpu_offload=cpu_offload)
    model = without_a_file(lambda: common.load_policy(args))
    bf16 = dataclasses.replace(args, bf16=True)
    teacher = without_a_file(lambda: tgpo.Teacher(bf16, small_tokenizer(), small_tokenizer(), []))
    policy = described(model)
    gradient = accumulated_gradient(model, BATCHES["both"][common.rank()], bf16=False)["gradient"]
    return policy, described(teacher.model), gradient


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_the_first_process_loads_for_all(loadable, cpu_offload):
    results = in_two_processes(policy_and_teacher, loadable, cpu_offload)
    file_teacher = described(common.load_model(str(loadable), dtype=torch.bfloat16))
    alone = []
    for batches in BATCHES["both"]:
        model = common.load_policy(grpo_baseline.Args(model=str(loadable), bf16=False))
        file_policy = described(model)
        alone.append(accumulated_gradient(model, batches, bf16=False)["gradient"])
    assert file_policy["generation_config"]["eos_token_id"] == [3, 4]
    for policy, teacher, gradient in results:
        assert policy == file_policy
        assert teacher == file_teacher
        for name, of_weight in gradient.items():
            np.testing.assert_allclose(of_weight, alone[0][name] + alone[1][name], atol=1e-5, rtol=1e-5)


def code_of_loading(folder) -> int:
    with pytest.raises(SystemExit) as stop:
        without_a_file(lambda: common.load_policy(grpo_baseline.Args(model=str(folder))))
    return stop.value.code


@pytest.mark.parametrize("fault, message", [
    ("no weights", "no causal language model can be loaded"),
    ("not finite", "its weights are not finite"),
    ("logits are scaled", "changes its logits after lm_head")])
def test_a_model_that_the_first_process_refuses_ends_all(fault, message, tmp_path):
    model = small_model()
    if fault == "logits are scaled":
        model = small_model("cohere", logit_scale=0.0625)
    if fault == "not finite":
        model.model.norm.weight.data[3] = torch.nan
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    if fault == "no weights":
        (folder / "model.safetensors").unlink()
    screen = tmp_path / "screen"
    assert in_two_processes(code_of_loading, folder, screen=screen) == [2, 2]
    errors = [line for line in screen.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
