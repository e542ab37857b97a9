"""What runs of days meet: kills at any moment, signals, full disks, gradients that are not finite, memory that does not do."""
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import common
import grpo_baseline
import sgpo
from conftest import Child, read_jsonl, stripped
from test_ranks import whole_run_for_real
from test_update import close, grpo_grad


@pytest.fixture
def argv(model_dirs, rows_file):
    return ["--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward", f"{rows_file.parent}/reward.py:even", "--prompts_per_step", 3, "--group_size", 3,
            "--guided_group_size", 2, "--max_new_tokens", 8, "--lr", 1e-3, "--system_prompt", "", "--steps", 12, "--save_every", 1]


def same_runs(a: Path, b: Path) -> None:
    assert stripped(read_jsonl(a / "metrics.jsonl")) == stripped(read_jsonl(b / "metrics.jsonl"))
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    one, two = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(one[k], two[k]) for k in one)


# ---- kills

def test_twenty_kills_at_any_moment_change_nothing(argv, tmp_path):
    Child(int).ended()  # the server of forks has started
    began = time.time()
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", tmp_path / "whole"]).ended() == 0
    whole, draw, kills, reached = time.time() - began, random.Random(0), 0, set()
    while kills < 20:
        again = ["--resume"] if (tmp_path / "broken" / "config.json").exists() else []
        shutil.rmtree(tmp_path / "broken" / "model", ignore_errors=True)
        child = Child(whole_run_for_real, "sgpo", [*argv, "--out", tmp_path / "broken", *again])
        time.sleep(draw.uniform(0.1, 0.6 * whole))
        child.process.kill()
        kills += child.ended() == -9
        reached |= {p.name for p in (tmp_path / "broken").glob("checkpoints/*")}
        if (tmp_path / "broken" / "metrics.jsonl").exists() and len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()) > 10:
            for step in range(8, 13):  # nearly through: take its last checkpoints away, and it is young again
                shutil.rmtree(tmp_path / "broken" / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", tmp_path / "broken", "--resume"]).ended() == 0
    assert len(reached) > 5, reached  # the kills came all along the way
    same_runs(tmp_path / "whole", tmp_path / "broken")


def broken_at_step_5(moment, argv, out):
    """A run that kills itself at step 5, at one of the worst moments."""
    place, name = {"in the write": (dcp, "save"), "before the rename": (Path, "rename"), "while an old one is removed": (shutil, "rmtree"),
                   "in the log": (common.Run, "log")}[moment]
    true = getattr(place, name)

    def deadly(*args, **kwargs):
        if not (out / "checkpoints" / "step_000004").exists() or moment == "while an old one is removed" and "step_" not in str(args[0]):
            return true(*args, **kwargs)
        if moment == "in the write":
            true(*args, **kwargs)
            for file in (out / "checkpoints" / "unfinished.tmp").iterdir():
                file.write_bytes(file.read_bytes()[:100])
        if moment == "while an old one is removed":
            next(args[0].iterdir()).unlink()
        if moment == "in the log":
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 5, "rew')
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, deadly)
    return whole_run_for_real("grpo_baseline", [*argv, "--out", out])


@pytest.mark.parametrize("moment", ["in the write", "before the rename", "while an old one is removed", "in the log"])
def test_a_kill_in_the_middle_of_saving(moment, argv, tmp_path):
    """The newest whole checkpoint is what goes on."""
    argv = [x for x in argv if x not in ("--guided_group_size", 2)]
    assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "whole"]).ended() == 0
    assert Child(broken_at_step_5, moment, argv, tmp_path / "broken").ended() == -9
    assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "broken", "--resume"]).ended() == 0
    same_runs(tmp_path / "whole", tmp_path / "broken")


# ---- signals

def told(kind, moment, argv, out):
    """A run that gets a signal in the middle of step 3 (evaluation: of step 2) and must end within 10 s."""
    place, name = {"rollout": (common.Watch, "__call__"), "update": (sgpo, "policy_loss"), "save": (dcp, "save"), "evaluation": (sgpo, "evaluate")}[moment]
    true, began = getattr(place, name), []

    def wrapped(*args, **kwargs):
        metrics = out / "metrics.jsonl"
        step = len([r for r in read_jsonl(metrics) if r["step"]]) + 1 if metrics.exists() else 1
        if not began and (step == 3 or moment == "evaluation" and step == 2 or moment == "save"):
            began.append(time.time())
            os.kill(os.getpid(), kind)
        return true(*args, **kwargs)

    setattr(place, name, wrapped)
    try:
        return whole_run_for_real("sgpo", [*argv, "--out", out])
    finally:
        assert time.time() - began[0] < 10


@pytest.mark.parametrize("moment", ["rollout", "update", "save", "evaluation"])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_obeyed_soon_and_leaves_a_checkpoint(kind, moment, argv, rows_file, tmp_path):
    argv = [*argv, "--save_every", 0, "--eval_dataset", rows_file, "--eval_samples", 1, "--eval_every", 2, "--max_new_tokens", 40, "--steps", 4]
    more = ["--save_every", 2] if moment == "save" else []
    assert Child(told, kind, moment, [*argv, *more], tmp_path / "run", said=tmp_path / "said").ended() == 130
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]
    said, err = (tmp_path / "said").read_text(), (tmp_path / "said.err").read_text()
    assert "stopped after step 2 of 4; go on with --resume" in said + err and "Traceback" not in err
    assert Child(whole_run_for_real, "sgpo", [*argv, *more, "--out", tmp_path / "run", "--resume"]).ended() == 0
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", tmp_path / "whole"]).ended() == 0
    if moment == "evaluation":  # that of step 2 was dropped, all else is the same
        without = [{k: v for k, v in row.items() if not k.startswith("eval/") or row["step"] != 2} for row in stripped(read_jsonl(tmp_path / "whole" / "metrics.jsonl"))]
        assert stripped(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == without
    else:
        same_runs(tmp_path / "whole", tmp_path / "run")


# ---- a full disk

def on_a_small_disk(argv, out):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # a write beyond this fails as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return whole_run_for_real("grpo_baseline", [*argv, "--out", out])


def test_a_file_that_cannot_grow(argv, tmp_path):
    argv = [x for x in argv if x not in ("--guided_group_size", 2)]
    assert Child(on_a_small_disk, argv, tmp_path / "run", said=tmp_path / "said").ended() == 2
    err = (tmp_path / "said.err").read_text()
    assert err.count("\n") == 1 and "checkpoints/step_000001: cannot be written" in err and "make room and go on with --resume" in err
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "run", "--resume"]).ended() == 0


def test_a_disk_that_fills_up_loses_nothing(argv, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        argv = [x for x in argv if x not in ("--guided_group_size", 2)] + ["--save_every", 2, "--keep_checkpoints", 9]
        assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", disk / "run"], said=tmp_path / "said").ended() == 2
        err = (tmp_path / "said.err").read_text()
        assert err.count("\n") == 1 and re.search(r"cannot be written .* MB were free", err) and not list(disk.rglob("*.tmp"))
        kept = sorted((disk / "run" / "checkpoints").glob("step_*"))
        assert len(kept) >= 1 and all((folder / ".metadata").exists() for folder in kept)
        shutil.move(disk / "run", tmp_path / "run")
        assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "run", "--resume"]).ended() == 0
        assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "whole"]).ended() == 0
        same_runs(tmp_path / "whole", tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", disk])


# ---- numbers that are none

def test_an_update_that_is_not_finite_is_skipped_and_counted(monkeypatch):
    true = grpo_baseline.policy_loss
    calls = []
    monkeypatch.setattr(grpo_baseline, "policy_loss", lambda *args: calls.append(1) or [x * (float("nan") if len(calls) == 1 and i == 0 else 1)
                                                                                        for i, x in enumerate(true(*args))])
    grads, metrics = grpo_grad(updates_per_rollout=2)
    assert len(grads) == 1 and metrics["nonfinite_updates"] == 1 and metrics["updates"] == 1 and metrics["grad_norm"] > 0  # the second step is taken, with a clean slate
    monkeypatch.undo()
    clean, _ = grpo_grad(updates_per_rollout=2)
    close(grads[0], clean[1])


def test_five_such_steps_in_a_row_end_the_run(argv, tmp_path, run_script, capsys, monkeypatch):
    argv = [x for x in argv if x not in ("--guided_group_size", 2)]
    true = grpo_baseline.policy_loss
    monkeypatch.setattr(grpo_baseline, "policy_loss", lambda *args: [x * (float("inf") if i == 0 else 1) for i, x in enumerate(true(*args))])
    assert run_script("grpo_baseline", *argv, "--out", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not finite in 5 steps one after the other" in err
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["nonfinite_updates"] for row in rows) == 5 and not any(row["updates"] for row in rows)


# ---- memory that does not do

def test_out_of_memory_halves_the_budget_once(monkeypatch, capsys):
    clean, _ = grpo_grad(budget=20)
    true, calls = grpo_baseline.completion_logps, []

    def short(*args):
        calls.append(len(args[1]))
        if len(calls) == 2:  # with a part of the gradient there already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(*args)

    monkeypatch.setattr(grpo_baseline, "completion_logps", short)
    grads, metrics = grpo_grad(budget=20)
    close(grads[0], clean[0])
    assert "going on with --microbatch_tokens 10" in capsys.readouterr().out and max(calls[2:]) < max(calls[:2])
    monkeypatch.setattr(grpo_baseline, "completion_logps", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(SystemExit):
        grpo_grad(budget=20)
    assert "--activation_checkpointing" in capsys.readouterr().err
