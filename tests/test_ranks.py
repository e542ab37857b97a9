"""Several processes: what they compute together is what one computes alone.

Rollouts are forced where results are compared: only sampling may differ.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
import grpo_baseline
import sgpo
import tgpo
from conftest import (ROOT, Child, read_jsonl, same_runs, small_model, small_tokenizer, stripped,
                      whole_run_for_real, write_rows)
from test_update import B, COMPLETIONS, G1, G2, GUIDED, LENGTHS, PLAIN, PROBLEM, REWARDS

HOME = {"grpo_baseline": grpo_baseline, "sgpo": sgpo, "tgpo": tgpo}


def joined(work, args):
    common.join_processes()
    return (work(*args),)


def in_processes(n: int, work, *args, said=os.devnull) -> list:
    """work(*args) in n processes that torchrun might have started -> what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [Child(joined, work, args, said=said, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(n)]
    answers = [child.ended() for child in children]
    assert all(isinstance(answer, tuple) for answer in answers), (answers, said)
    return [answer for answer, in answers]


# ---- gradients

def update_of(script: str, flags: dict):
    """One update with this process's share of test_update's rollout -> gradients of its steps, metrics.
    float64."""
    module, model, grads = HOME[script], small_model().double(), []
    model = common.shard(model, bf16=False) if common.dist.is_initialized() else model
    mine = list(common.my_share(range(B)))
    rows = [q * G1 + j for q in mine for j in range(G1)]
    n_auto = len(rows)
    if script == "sgpo":
        rows += [B * G1 + q * G2 + j for q in mine for j in range(G2)]
    settings = {"guided_group_size": G2} if script == "sgpo" else {}
    args = module.Args(prompts_per_step=B, group_size=G1, max_new_tokens=6, max_grad_norm=1e9, **settings,
                       **flags)
    mask = torch.arange(6) < torch.tensor(LENGTHS)[rows][:, None]
    prompts = [PLAIN[PROBLEM[i]] for i in rows]
    ro = module.Rollout(prompts, COMPLETIONS[rows], mask, ~mask.any(1), [""] * len(rows))
    advantages = common.my_share(module.group_advantages(REWARDS[:B * G1].view(B, G1))).flatten()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def keep(*_) -> None:
        whole = (g.full_tensor() if hasattr(g := p.grad, "full_tensor") else g for p in model.parameters())
        grads.append(torch.cat([g.flatten().clone() for g in whole]))

    optimizer.register_step_pre_hook(keep)
    if script == "sgpo":
        guided = prompts[:n_auto] + [GUIDED[PROBLEM[i]] for i in rows[n_auto:]]
        guidance, more = sgpo.guide(guided, REWARDS[rows], [{"strategy": "s"}] * len(mine), args)
        return grads, sgpo.update(model, optimizer, ro, advantages, guidance, args) | more
    if script == "tgpo":
        args.teacher, tokenizer = "teacher", small_tokenizer()
        tgpo.check_args(args)
        with mock.patch.object(tgpo, "load_model",
                               lambda *_: small_model(seed=5).double().requires_grad_(False)):
            teacher = tgpo.Teacher(args, tokenizer, tokenizer, [257])
        return grads, tgpo.update(model, optimizer, ro, advantages, teacher, 0.5, args)
    return grads, grpo_baseline.update(model, optimizer, ro, advantages, args)


SETTINGS = [
    ("grpo_baseline", {}), ("grpo_baseline", {"loss_type": "dapo", "updates_per_rollout": 2}),
    ("grpo_baseline", {"loss_type": "dr_grpo", "microbatch_tokens": 12}), ("sgpo", {"delta": 2.0}),
    ("sgpo", {"microbatch_tokens": 12, "updates_per_rollout": 2}),
    ("sgpo", {"target": "all", "distill": "reverse_kl"}), ("sgpo", {"distill": "sft"}),
    ("tgpo", {"guidance": "tgpo"}), ("tgpo", {"guidance": "reverse-kl"}),
    ("tgpo", {"guidance": "kdrl", "microbatch_tokens": 12, "updates_per_rollout": 2})]


def all_updates() -> list:
    return [update_of(*setting) for setting in SETTINGS]


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_and_metrics_do_not_depend_on_the_number_of_processes(n):
    alone = all_updates()
    for theirs in in_processes(n, all_updates):
        for setting, (grads, metrics), (our_grads, ours) in zip(SETTINGS, theirs, alone, strict=True):
            assert len(grads) == len(our_grads) == setting[1].get("updates_per_rollout", 1)
            for a, b in zip(grads, our_grads):
                assert b.abs().max() > 1e-3 and ((a - b).norm() / b.norm()).item() < 1e-6, setting
            for name in ours.keys() - {"padding_frac"}:
                assert metrics[name] == pytest.approx(ours[name], abs=1e-5), (name, setting)


def bf16_update(flags: dict):
    """One process, sharded, computing in bf16 over gloo: what a GPU does."""
    shard = common.shard
    with mock.patch.object(common, "shard", lambda model, bf16: shard(model.float(), True)):
        (gradient,), metrics = update_of("sgpo", flags)
    return gradient, metrics


def test_a_sharded_model_computes_in_bf16_on_fp32_weights():
    (exact,), _ = update_of("sgpo", {"delta": 2.0})
    (gradient, metrics), = in_processes(1, bf16_update, {"delta": 2.0})
    assert gradient.dtype == torch.float32 and metrics["updates"] == 1
    assert 1e-5 < ((gradient - exact).norm() / exact.norm()).item() < 0.1


# ---- whole runs

def forced(model, tokenizer, prompts, max_new_tokens, *_):
    """Completions that depend only on the prompt and on how often it has come before in this call."""
    seen, rows = {}, []
    for prompt in prompts:
        k = seen[tuple(prompt)] = seen.get(tuple(prompt), 0) + 1
        draw = torch.Generator().manual_seed(zlib.crc32(repr((prompt, k)).encode()))
        length = int(torch.randint(1, max_new_tokens, (1,), generator=draw))
        row = torch.randint(0, 250, (max_new_tokens,), generator=draw)
        row[length:] = 257
        rows.append(row)
    return torch.stack(rows)


def whole_run(script: str, argv: list) -> int:
    common.generate = forced
    return whole_run_for_real(script, argv)


def assert_same_run(a, b):
    one, two = (stripped(read_jsonl(run / "metrics.jsonl")) for run in (a, b))
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for x, y in zip(one, two):
        for name in x.keys() - {"padding_frac"}:
            assert y[name] == pytest.approx(x[name], abs=1e-5), (name, x["step"])
    key = lambda s: (s["step"], s.get("guided", False), s["id"], s["completion"])
    assert sorted(map(key, read_jsonl(a / "samples.jsonl"))
                  ) == sorted(map(key, read_jsonl(b / "samples.jsonl")))
    weights = [load_file(run / "model" / "model.safetensors") for run in (a, b)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=0)


@pytest.fixture
def argv(argv_of, rows_file):
    """Four problems a step: for three processes to share."""
    def of(script: str, *more) -> list:
        own = ["--coefficient", 0.1] if script == "tgpo" else []
        return argv_of(script, "--prompts_per_step", 4, "--microbatch_tokens", 150, "--lr", 1e-4,
                       "--eval_dataset", rows_file, "--eval_samples", 1, "--eval_every", 1, *own, *more)
    return of


@pytest.mark.parametrize("script", HOME)
def test_several_processes_train_as_one_and_resume_as_any_number(script, argv, tmp_path):
    for steps, n, more in ((4, 1, []), (2, 3, []), (3, 1, ["--resume"]), (4, 2, ["--resume"])):
        out = tmp_path / ("one" if steps == 4 and n == 1 else "mixed")
        argv_now = argv(script, "--steps", steps, *more, "--out", out)
        assert in_processes(n, whole_run, script, argv_now) == [0] * n
        assert json.loads((out / "config.json").read_text())["processes"] == n
    assert_same_run(tmp_path / "one", tmp_path / "mixed")
    ids = torch.tensor([[1, 2, 3]])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / out / "model") for out in ("one", "mixed")]
    assert type(models[1]).__name__ == "Qwen2ForCausalLM"
    torch.testing.assert_close(*[model(ids).logits for model in models], atol=1e-4, rtol=1e-4)


def test_a_sharded_model_alone_is_the_plain_one(argv, tmp_path):
    """One process in a group: sharded by FSDP2, sampled from for real, bit for bit."""
    argv = [*argv("grpo_baseline", "--steps", 2), "--out"]
    assert in_processes(1, whole_run_for_real, "grpo_baseline", [*argv, tmp_path / "sharded"]) == [0]
    assert Child(whole_run_for_real, "grpo_baseline", [*argv, tmp_path / "plain"]).ended() == 0
    same_runs(tmp_path / "plain", tmp_path / "sharded")


def sampled(r: int | None = None):
    """Greedy tokens, of prompts and in numbers that differ between the processes; random numbers."""
    model = small_model() if r is not None else common.shard(small_model(), bf16=False)
    r = common.rank() if r is None else r
    prompts = [[5, 6, 7][:r + 1], [9, 8, 7, 6]][:2 - r]
    ids = common.complete(model, small_tokenizer(), prompts, 5 + 6 * r, 0.0, 1.0, 100)[0]
    common.seed_everything(3, "step", 4)
    return ids.tolist(), torch.rand(3).tolist()


def test_each_process_samples_from_the_whole_model_at_its_own_pace_with_draws_of_its_own():
    (ids, drawn), (other_ids, other_drawn) = in_processes(2, sampled)
    assert [ids, other_ids] == [sampled(0)[0], sampled(1)[0]]
    assert drawn == sampled(0)[1] != other_drawn  # the first draws as one alone


def dealt_and_gathered(numbers):
    for n in numbers:
        x = torch.arange(2 * n).view(n, 2)
        share = common.my_share(x)
        assert torch.equal(common.all_shares(share), x) and common.total(len(share), 1) == [n, 3]
        assert len(common.microbatches(range(len(share)), [9] * n, 1)) == -(-n // 3)


def test_dealing_and_gathering():
    in_processes(3, dealt_and_gathered, [2, 5, 7])


def test_from_raw_rows_with_a_warm_up(model_dirs, tmp_path):
    """A process without a held-out row waits for nobody."""
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"It is \\boxed{{{2 * i}}}."}
            for i in range(12)]
    data, run = write_rows(tmp_path / "raw.jsonl", rows), tmp_path / "run"
    one = write_rows(tmp_path / "one.jsonl", rows[:1])
    argv = ["--model", model_dirs["qwen2"], "--dataset", data, "--eval_dataset", one, "--eval_samples", 1,
            "--steps", 1, "--prompts_per_step", 2, "--group_size", 2, "--guided_group_size", 2,
            "--max_new_tokens", 30, "--warmup_epochs", 2, "--strategy_candidates", 2,
            "--strategist_max_new_tokens", 8, "--out", run]
    assert in_processes(2, whole_run_for_real, "sgpo", argv, said=tmp_path / "said") == [0, 0]
    said = (tmp_path / "said").read_text()
    assert said.count("plan") == 1 and said.count("model: ") == 1
    assert "strategies found" in said and "warm-up: 4 problems" in said
    assert len(read_jsonl(run / "strategies.jsonl")) == 8
    assert (run / "warmup" / "model.safetensors").exists() and (run / "model" / "model.safetensors").exists()
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1] and all(m["eval/accuracy"] in (0, 1) for m in metrics)
    assert len(read_jsonl(run / "samples.jsonl")) == 4


# ---- torchrun

def rank_of(pid: int) -> int | None:
    found = re.search(rb"\0RANK=(\d)", open(f"/proc/{pid}/environ", "rb").read())
    return int(found[1]) if found else None


def test_when_a_process_dies_all_end_and_one_says_so(argv_of, tmp_path):
    argv = argv_of("grpo_baseline", "--steps", 10 ** 6, "--save_every", 2, "--out", tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         str(ROOT / "grpo_baseline.py"), *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    while not any((tmp_path / "run" / "checkpoints").glob("step_??????")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)],
                              capture_output=True, text=True).stdout.split()
    os.kill(next(int(pid) for pid in children if rank_of(int(pid)) == 1), signal.SIGKILL)
    began = time.time()
    said, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and time.time() - began < 60
    assert "Signal 9 (SIGKILL)" in errors and errors.count("error: another process has died") <= 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0], errors
    whole = sorted((tmp_path / "run" / "checkpoints").glob("step_??????"))[-1]
    assert (whole / ".metadata").exists() and (whole / "about.json").exists()


def test_refusals_are_said_once(argv_of, tmp_path):
    out = tmp_path / "run"
    argv = argv_of("grpo_baseline", "--prompts_per_step", 1, "--out", out)
    assert in_processes(2, whole_run_for_real, "grpo_baseline", argv, said=tmp_path / "said") == [2, 2]
    said = "error: --prompts_per_step 1 is too few for 2 processes: raise it\n"
    assert (tmp_path / "said.err").read_text() == said
    argv = ["--benchmarks", "demo", "--out", out]
    assert in_processes(2, whole_run_for_real, "eval_math", argv, said=tmp_path / "eval") == [2, 2]
    assert (tmp_path / "eval.err").read_text().count("error: eval_math.py is one process") == 1
    assert not out.exists()
