"""Several processes: what they compute together is what one computes alone. Rollouts are forced where results are compared: only sampling may differ."""
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
from conftest import ROOT, Child, read_jsonl, small_model, small_tokenizer, stripped, write_rows
from test_update import B, G1, G2, GUIDED, PLAIN, PROBLEM, REWARDS, NoWatch, Recorder, batch

HOME = {"grpo_baseline": grpo_baseline, "sgpo": sgpo, "tgpo": tgpo}


def joined(work, args):
    common.start_processes()
    return (work(*args),)


def in_processes(n: int, work, *args, said=os.devnull) -> list:
    """work(*args) in n processes that torchrun might have started -> what each returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [Child(joined, work, args, said=said, **env, RANK=str(r), LOCAL_RANK=str(r)) for r in range(n)]
    answers = [child.ended() for child in children]
    assert all(isinstance(answer, tuple) for answer in answers), (answers, said)
    return [answer for answer, in answers]


class WholeRecorder(Recorder):
    def step(self, closure=None):
        whole = (g.full_tensor() if hasattr(g := p.grad, "full_tensor") else g for group in self.param_groups for p in group["params"])
        self.grads.append(torch.cat([g.flatten().clone() for g in whole]))


# ---- gradients

def update_of(script: str, folder, flags: dict):
    """One update with this process's share of the fixed rollout of test_update -> gradients of its steps, metrics. Weights are float64."""
    load, shard = common.load_model, common._sharded
    double = lambda name, flag, dtype, device: load(name, flag, torch.float64, device)
    with mock.patch.multiple(common, load_model=double, _sharded=lambda plain, name, flag, dtype, offload: shard(plain, name, flag, torch.float64, offload)), \
            mock.patch.object(tgpo, "load_model", double):
        return _update_of(script, folder, flags)


def _update_of(script, folder, flags):
    model = common.load_policy(str(folder))
    mine = list(common.dealt(range(B)))
    auto = [q * G1 + j for q in mine for j in range(G1)]
    guided = [B * G1 + q * G2 + j for q in mine for j in range(G2)] if script == "sgpo" else []
    completions, mask = batch(20)
    rows = auto + guided
    module = HOME[script]
    args = module.Args(prompts_per_step=B, group_size=G1, max_new_tokens=6, max_grad_norm=1e9, **flags, **({"guided_group_size": G2} if guided else {}))
    ro = module.Rollout([PLAIN[PROBLEM[i]] for i in rows], completions[rows], mask[rows], ~mask[rows].any(1), [""] * len(rows))
    advantages = common.dealt(module.group_advantages(REWARDS[:B * G1].view(B, G1))).flatten()
    optimizer = WholeRecorder(model.parameters())
    if script == "sgpo":
        prompts = [PLAIN[PROBLEM[i]] for i in auto] + [GUIDED[PROBLEM[i]] for i in guided]
        guidance, more = sgpo.guide(prompts, REWARDS[rows], [{"strategy": "s"}] * len(mine), args)
        metrics = sgpo.update(model, optimizer, ro, advantages, guidance, args, NoWatch()) | more
    elif script == "tgpo":
        args.teacher = str(folder) + "-teacher"
        tgpo.check_args(args)
        tokenizer = small_tokenizer()
        teacher = tgpo.load_teacher(args, tokenizer, tokenizer, 272, [257])
        metrics = tgpo.update(model, optimizer, ro, advantages, teacher, 0.5, args, NoWatch())
    else:
        metrics = grpo_baseline.update(model, optimizer, ro, advantages, args, NoWatch())
    return optimizer.grads, metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "model"
    for where, seed in ((path, 0), (f"{path}-teacher", 5)):
        small_model(seed=seed, tie_word_embeddings=True).save_pretrained(where)
        small_tokenizer().save_pretrained(where)
    return path


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("script, flags", [
    ("grpo_baseline", {}), ("grpo_baseline", {"loss_type": "dapo", "updates_per_rollout": 2}), ("grpo_baseline", {"loss_type": "dr_grpo", "microbatch_tokens": 12}),
    ("sgpo", {}), ("sgpo", {"microbatch_tokens": 12, "updates_per_rollout": 2}), ("sgpo", {"target": "all", "distill": "reverse_kl"}), ("sgpo", {"distill": "sft"}),
    ("tgpo", {"guidance": "tgpo"}), ("tgpo", {"guidance": "kdrl", "microbatch_tokens": 12, "updates_per_rollout": 2}), ("tgpo", {"guidance": "reverse-kl"}),
])
def test_gradients_and_metrics_do_not_depend_on_the_number_of_processes(script, flags, n, folder):
    alone, metrics = update_of(script, folder, flags)
    assert len(alone) == flags.get("updates_per_rollout", 1) and all(g.abs().max() > 1e-3 for g in alone)
    for grads, theirs in in_processes(n, update_of, script, folder, flags):
        assert len(grads) == len(alone)
        for a, b in zip(grads, alone):
            assert ((a - b).norm() / b.norm()).item() < 1e-6
        for name, value in metrics.items():
            if name != "padding_frac":
                assert theirs[name] == pytest.approx(value, abs=1e-5), name


# ---- whole runs

def forced(model, prompts, eos, pad, max_new_tokens, *_):
    """Completions that depend on the prompt and on how often it has come before in this call, on nothing else."""
    seen, rows = {}, []
    for prompt in prompts:
        k = seen[tuple(prompt)] = seen.get(tuple(prompt), 0) + 1
        draw = torch.Generator().manual_seed(zlib.crc32(repr((prompt, k)).encode()))
        length = int(torch.randint(1, max_new_tokens, (1,), generator=draw))
        row = torch.randint(0, 250, (max_new_tokens,), generator=draw)
        row[length:] = eos[0]
        rows.append(row)
    return torch.stack(rows)


def whole_run(script: str, argv: list) -> int:
    HOME[script].generate = common.generate = forced
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        HOME[script].main()
    except SystemExit as stop:
        return stop.code
    return 0


def assert_same_run(a, b, digits=1e-5):
    one, two = (stripped(read_jsonl(run / "metrics.jsonl")) for run in (a, b))
    assert len(one) == len(two)
    for x, y in zip(one, two):
        assert x.keys() == y.keys()
        for name in x:
            assert name == "padding_frac" or y[name] == pytest.approx(x[name], abs=digits), (name, x["step"])
    key = lambda s: (s["step"], s.get("guided", False), s["id"], s["completion"])
    assert sorted(map(key, read_jsonl(a / "samples.jsonl"))) == sorted(map(key, read_jsonl(b / "samples.jsonl")))
    weights = [load_file(run / "model" / "model.safetensors") for run in (a, b)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=digits, rtol=0)


def argv_of(script, folder, rows_file, *more):
    guided = {"sgpo": ["--guided_group_size", 2], "tgpo": ["--teacher", f"{folder}-teacher", "--coefficient", 0.1]}.get(script, [])
    return ["--model", folder, "--dataset", rows_file, "--eval_dataset", rows_file, "--eval_samples", 1, "--eval_every", 1, "--reward", f"{rows_file.parent}/reward.py:even",
            "--prompts_per_step", 4, "--group_size", 3, "--max_new_tokens", 8, "--lr", 1e-4, "--system_prompt", "", "--microbatch_tokens", 150, *guided, *more]


@pytest.mark.parametrize("script", HOME)
def test_two_processes_train_as_one_and_resume_as_any_number(script, folder, rows_file, tmp_path):
    argv = argv_of(script, folder, rows_file)
    for n, out in ((1, "one"), (2, "two")):
        assert in_processes(n, whole_run, script, [*argv, "--steps", 4, "--out", tmp_path / out]) == [0] * n
    assert_same_run(tmp_path / "one", tmp_path / "two")
    config = json.loads((tmp_path / "two" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    ids = torch.tensor([[1, 2, 3]])
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / out / "model")(ids).logits for out in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    for more, n in ((["--steps", 2], 2), (["--steps", 3, "--resume"], 1), (["--steps", 4, "--resume"], 3)):  # step 4: 3 processes share 4 problems
        assert in_processes(n, whole_run, script, [*argv, *more, "--out", tmp_path / "mixed"]) == [0] * n
    assert_same_run(tmp_path / "one", tmp_path / "mixed")


def test_a_sharded_model_alone_is_the_plain_one(folder, rows_file, tmp_path):
    """One process in a group: sharded by FSDP2, sampled from for real, bit for bit."""
    argv = [*argv_of("grpo_baseline", folder, rows_file), "--steps", 2]
    assert in_processes(1, whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "sharded"]) == [0]
    assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "plain"]).ended() == 0
    assert (tmp_path / "sharded" / "samples.jsonl").read_bytes() == (tmp_path / "plain" / "samples.jsonl").read_bytes()
    assert_same_run(tmp_path / "plain", tmp_path / "sharded", digits=0)


def whole_run_for_real(script, argv):
    sys.argv = [f"{script}.py", *map(str, argv)]
    HOME[script].main()
    return 0


def greedy(folder):
    """Prompts and numbers of tokens that differ between the processes."""
    model, r = common.load_policy(str(folder)), common.rank()
    prompts = [[5, 6, 7][:r + 1], [9, 8, 7, 6]][:2 - r]
    with common.rollout_weights(model) as fast:
        assert not any("FSDP" in type(m).__name__ for m in fast.modules())
        return prompts, common.generate(fast, prompts, [271], 270, 5 + 6 * r, 0.0, 1.0)


def test_each_process_samples_from_the_whole_model(folder):
    plain = common.load_model(str(folder))
    for r, (prompts, tokens) in enumerate(in_processes(2, greedy, folder)):
        assert torch.equal(tokens, common.generate(plain, prompts, [271], 270, 5 + 6 * r, 0.0, 1.0))


def drawn(_):
    common.seed_everything(3, 4)
    return torch.rand(3).tolist()


def test_processes_draw_differently_and_the_first_as_one_alone():
    a, b = in_processes(2, drawn, None)
    assert a != b and a == drawn(None)


def dealt_and_gathered(n):
    x = torch.arange(2 * n).view(n, 2)
    share = common.dealt(x)
    assert torch.equal(common.gathered(share), x) and common.summed({"a": len(share)})["a"] == n
    return len(common.in_step([[1]] * len(share)))


@pytest.mark.parametrize("items", [2, 5, 7])
def test_dealing_and_gathering(items):
    assert in_processes(3, dealt_and_gathered, items) == [-(-items // 3)] * 3


# ---- torchrun

def torchrun(n, script, *argv, **more):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone", str(ROOT / f"{script}.py"), *map(str, argv)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **more)


def test_torchrun_from_raw_rows_with_a_warm_up(folder, tmp_path):
    rows = write_rows(tmp_path / "raw.jsonl", [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"It is \\boxed{{{2 * i}}}."} for i in range(12)])
    process = torchrun(2, "sgpo", "--model", folder, "--dataset", rows, "--eval_dataset", rows, "--eval_samples", 1, "--steps", 1, "--prompts_per_step", 2, "--group_size", 2,
                       "--guided_group_size", 2, "--max_new_tokens", 30, "--warmup_epochs", 2, "--strategy_candidates", 2, "--strategist_max_new_tokens", 8,
                       "--out", tmp_path / "run")
    said, errors = process.communicate(timeout=180)
    assert process.returncode == 0, said + errors
    assert said.count("plan") == 1 and said.count("model: ") == 1 and "strategies found" in said and "warm-up: 4 problems" in said
    assert len(read_jsonl(tmp_path / "run" / "strategies.jsonl")) == 8
    assert (tmp_path / "run" / "warmup" / "model.safetensors").exists() and (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert [m["step"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1] and len(read_jsonl(tmp_path / "run" / "samples.jsonl")) == 4


def test_when_a_process_dies_all_end_and_one_says_so(folder, rows_file, tmp_path):
    process = torchrun(2, "grpo_baseline", *argv_of("grpo_baseline", folder, rows_file, "--steps", 10 ** 6, "--save_every", 2, "--out", tmp_path / "run"))
    for _ in range(1200):
        if any((tmp_path / "run" / "checkpoints").glob("step_*")):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    children = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()]
    ranks = {int(re.search(rb"\0RANK=(\d)", open(f"/proc/{pid}/environ", "rb").read())[1]): pid for pid in children if b"\0RANK=" in open(f"/proc/{pid}/environ", "rb").read()}
    os.kill(ranks[1], signal.SIGKILL)
    began = time.time()
    said, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 45
    assert "Signal 9 (SIGKILL)" in errors and errors.count("error: another process has died") <= 1
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0], errors
    whole = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    assert (whole / ".metadata").exists()


def test_refusals_are_said_once(folder, rows_file, tmp_path):
    process = torchrun(2, "grpo_baseline", *argv_of("grpo_baseline", folder, rows_file, "--top_p", 7))
    said, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("error: ") == 1 and "exitcode  : 2" in errors
