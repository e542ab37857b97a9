"""Runs of the three scripts: what they write, exact resume, kills and signals, refusals."""
import fcntl
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import grpo_baseline
from conftest import (
    CHAT_TEMPLATE, ROOT, assert_same_runs, read_jsonl, same_weights, small_model, write_jsonl)

SCRIPTS = ["grpo_baseline", "sgpo", "tgpo"]
METRICS = {
    "step", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length",
    "completions/clipped_ratio", "entropy", "clip_ratio", "grad_norm", "lr", "loss", "time/rollout_s",
    "time/train_s", "tokens_per_s", "padding_frac", "peak_memory_gb", "grader/timeouts"}
OWN_METRICS = {
    "grpo_baseline": set(),
    "sgpo": {"sgpo/alpha", "sgpo/p_auto", "sgpo/p_guided", "sgpo/kl", "sgpo/kl_clipped_frac",
             "sgpo/no_target_frac"},
    "tgpo": {"tgpo/coef", "tgpo/teacher_nll", "tgpo/reverse_kl_k1", "tgpo/mismatch", "tgpo/dropped_labels"},
}


# ---- what a run writes

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_metrics_samples_and_a_trained_model(script, model_dirs, rows_file, train, capsys):
    demo = ROOT / "tests/demo/train.jsonl"
    run = train(script, "--steps", 2, "--dataset", demo, "--warmup_frac", 0, "--eval_dataset", rows_file,
                "--eval_samples", 1)
    start, *rows = read_jsonl(run / "metrics.jsonl")
    samples = read_jsonl(run / "samples.jsonl")
    assert start["step"] == 0
    assert 0 <= start["eval/accuracy"] <= 1
    assert ("eval/accuracy_guided" in start) == (script == "sgpo")
    assert [row["step"] for row in rows] == [1, 2]
    assert "eval/accuracy" in rows[1]
    for row in rows:
        assert row.keys() >= METRICS | OWN_METRICS[script]
        own = [s for s in samples if s["step"] == row["step"] and not s.get("guided")]
        rewards = torch.tensor([s["reward"] for s in own]).view(4, 3)
        assert row["reward"] == pytest.approx(rewards.mean().item())
        assert row["reward_std"] == pytest.approx(rewards.std(1).mean().item())
        assert row["frac_reward_zero_std"] == (rewards.std(1) == 0).float().mean().item()
        assert row["completions/mean_length"] <= 8
    assert {"id", "problem", "answer", "completion"} < own[0].keys()
    assert not same_weights(model_dirs["qwen2"], run / "model")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 0/2", "step 1/2", "step 2/2"]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_the_model_is_saved_once_and_loads_in_transformers(kind, model_dirs, train):
    run = train("grpo_baseline", "--steps", 1, "--model", model_dirs[kind])
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == CHAT_TEMPLATE
    size = (model_dirs[kind] / "model.safetensors").stat().st_size
    assert abs((run / "model/model.safetensors").stat().st_size - size) < 500  # a tied head is one tensor
    trained = small_model(kind, tie_word_embeddings=kind == "qwen2")
    optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
    common.fill_adam_state(optimizer)
    common.load_checkpoint(run / "checkpoints/step_000001", trained, optimizer)
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, trained(ids).logits)


def test_a_machine_may_lack_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert common.versions()["commit"] == ""


def test_the_learning_rate_follows_its_schedule(train):
    run = train("grpo_baseline", "--lr_schedule", "linear", "--lr_warmup_steps", 2, "--steps", 4)
    rates = [row["lr"] for row in read_jsonl(run / "metrics.jsonl")]
    assert rates == pytest.approx([0.5e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_tensorboard_gets_the_metrics(train):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train("grpo_baseline", "--steps", 2, "--report_to", "tensorboard")
    board = events.EventAccumulator(str(run / "tensorboard")).Reload()
    for name in METRICS - {"step"}:
        sent = [event.value for event in board.Scalars(name)]
        assert sent == pytest.approx([row[name] for row in read_jsonl(run / "metrics.jsonl")], rel=1e-5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_plan_and_leaves_nothing(script, train, capsys):
    assert not train(script, "--dry_run").exists()
    assert "steps of 4 problems x " in capsys.readouterr().out


def test_a_config_file_repeats_a_run(train, tmp_path, run_script):
    first = train("sgpo", "--steps", 2)
    assert run_script("sgpo", first / "config.json", "--out", tmp_path / "again") == 0
    assert_same_runs(first, tmp_path / "again")


def test_weights_that_are_not_finite_are_not_saved(train, capsys):
    run = train("grpo_baseline", "--steps", 1, "--lr", 1e39, code=2)
    assert "the weights are not finite" in capsys.readouterr().err
    assert not (run / "model").exists()


# ---- resume

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_the_uninterrupted_one(script, train):
    whole = train(script, "--steps", 4, out="whole")
    run = train(script, "--steps", 2, "--save_every", 1)
    leave_traces_of_a_kill(run)
    train(script, "--steps", 4, "--save_every", 1, "--resume")
    assert_same_runs(run, whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000003", "step_000004"]


@pytest.mark.parametrize("damaged, reason", [
    ('{"step": 1, "rewa', "not JSON"),
    ("{}", "not a row with a step"),
])
def test_a_damaged_log_is_refused_with_its_line(damaged, reason, train, capsys):
    run = train("grpo_baseline", "--steps", 2, "--save_every", 1)
    log = run / "metrics.jsonl"
    first, second = log.read_text().splitlines()
    log.write_text(f"{first}\n{damaged}\n{second}\n")
    train("grpo_baseline", "--steps", 3, "--save_every", 1, "--resume", code=2)
    error = capsys.readouterr().err
    assert f"metrics.jsonl, line 2: {reason}" in error
    assert log.read_text().splitlines()[2] == second


def test_logs_hold_no_nan(tmp_path):
    row = {"step": 1, "loss": math.nan, "inner": {"x": [math.inf, 0.5]}}
    common.append_jsonl(tmp_path / "log.jsonl", [row])
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": null, "inner": {"x": [null, 0.5]}}\n'


def leave_traces_of_a_kill(run) -> None:
    """Leave what a kill in step 4 leaves: rows behind the last checkpoint, half a line, half a checkpoint."""
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 3, "completion": "lost"}\n{"step": 3, "compl')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward": 1.0}\n{"st')
    shutil.copytree(run / "checkpoints/step_000002", run / "checkpoints/step_000004.tmp")
    (run / "checkpoints/step_000004.tmp/.metadata").unlink()


@pytest.mark.parametrize("dead_steps", [0, 1])
def test_a_parameter_without_a_gradient_resumes_exactly(dead_steps, rows_file, tmp_path, train, monkeypatch):
    """Also if the checkpoint was written before the first optimizer step, because all groups were dead."""
    def with_unused_parameter(args):
        model = common.load_policy(args)
        model.model.unused = torch.nn.Parameter(torch.ones(3))
        return model

    problems = common.load_problems(str(rows_file))
    dead = [p["id"] for p in common.problems_of_step(problems, 1, 4 * dead_steps, 0)]
    reward = tmp_path / "reward.py"
    reward.write_text(f"def f(text, row):\n    return float(row['id'] not in {dead} and len(text) % 2)\n")
    monkeypatch.setattr(grpo_baseline, "load_policy", with_unused_parameter)
    flags = ["--reward", f"{reward}:f"]
    whole = train("grpo_baseline", *flags, "--steps", 2, out="whole")
    run = train("grpo_baseline", *flags, "--steps", 1)
    train("grpo_baseline", *flags, "--steps", 2, "--resume")
    assert_same_runs(run, whole)
    assert [row["updates"] for row in read_jsonl(run / "metrics.jsonl")] == [1 - dead_steps, 1]


def test_a_killed_run_resumes_exactly(argv_of, train, tmp_path):
    flags = ["--steps", 40, "--save_every", 2]
    killed = tmp_path / "killed"
    command = [sys.executable, ROOT / "sgpo.py", *argv_of("sgpo", *flags), "--out", killed]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    while not (killed / "checkpoints/step_000002").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    steps = (killed / "metrics.jsonl").read_bytes().count(b"\n")
    assert 2 <= steps < 40
    flags = ["--steps", steps + 2, "--save_every", 2]
    train("sgpo", *flags, "--resume", out="killed")
    assert_same_runs(killed, train("sgpo", *flags))


def test_ctrl_c_ends_the_run_after_its_step(train, tmp_path, capsys):
    button = tmp_path / "button"
    reward = tmp_path / "reward.py"
    reward.write_text(f"""
import os, pathlib, signal
def even(text, row):
    button = pathlib.Path({str(button)!r})
    if button.exists():
        button.unlink()
        os.kill(os.getpid(), signal.SIGINT)
    return float(len(text) % 2 == 0)
""")
    flags = ["--reward", f"{reward}:even", "--steps", 3, "--save_every", 0]
    whole = train("grpo_baseline", *flags, out="whole")
    capsys.readouterr()
    button.touch()
    run = train("grpo_baseline", *flags, code=130)
    screen = capsys.readouterr()
    assert "Stopping after this step" in screen.err
    assert f"stopped after step 1 of 3; continue with {run}/config.json --resume --out {run}" in screen.out
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000001"]
    train("grpo_baseline", *flags, "--resume")
    assert_same_runs(run, whole)


# ---- refusals

@pytest.fixture
def refused(run_script, capfd):
    """Return a function that checks that a command line is refused in one line, and returns the line."""
    def refuse(script: str, *argv) -> str:
        capfd.readouterr()
        assert run_script(script, *argv) == 2
        line = capfd.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line

    return refuse


FILES = {
    "cut.jsonl": '{"problem": "1 + 1", "answer": "2"}\n{"problem": "2',
    "answerless.jsonl": '{"problem": "1 + 1", "answer": "2"}\n{"problem": "2 + 2"}\n',
    "plain.jsonl": '{"problem": "1 + 1", "answer": "2"}\n',
    "solved.jsonl": '{"problem": "1 + 1", "answer": "2", "solution": "\\\\boxed{2}"}\n' * 3,
    "flags.json": "[1]",
    "reward.py": "",
}
URL = "http://localhost:1/v1"
REFUSALS = [
    ("grpo_baseline", "--learning_rate 1", "--learning_rate"),
    ("grpo_baseline", "--steps ten", "invalid int value: 'ten'"),
    ("grpo_baseline", "--loss_type ppo", "invalid choice: 'ppo'"),
    ("grpo_baseline", "--lr -1", "--lr is -1.0; it must be in [0, inf)"),
    ("grpo_baseline", "--top_p nan", "--top_p is nan; it must be in (0, 1]"),
    ("grpo_baseline", "--group_size 1", "--group_size is 1; it must be in [2, inf)"),
    ("grpo_baseline", "--dataset nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("grpo_baseline", "--dataset cut.jsonl", "cut.jsonl, line 2: not JSON"),
    ("grpo_baseline", "--dataset answerless.jsonl", 'answerless.jsonl, line 2: row has no "answer"'),
    ("grpo_baseline", "--model ./nowhere", "--model ./nowhere: no such directory"),
    ("grpo_baseline", "--max_new_tokens 5000", "exceeds the context of --model"),
    ("grpo_baseline", "--max_prompt_tokens 1", "none of its problems can be used"),
    ("grpo_baseline", "--out .", "exists and is not empty; add --resume"),
    ("grpo_baseline", "--out plain.jsonl/run", "--out plain.jsonl/run: cannot be "),
    ("grpo_baseline", "--resume", "there is no run in --out new"),
    ("grpo_baseline", "--updates_per_rollout 3", "--prompts_per_step 4 must be a multiple of"),
    ("grpo_baseline", "--reward nowhere.py:f", "write it as FILE.py:function, with a file that exists"),
    ("grpo_baseline", "--reward reward.py:f", "reward.py has no function f"),
    ("grpo_baseline", "--report_to wandb", "pip install wandb"),
    ("grpo_baseline", "--warmup_from .", "--warmup_from .: no model there"),
    ("grpo_baseline", "--dataset solved.jsonl --warmup_frac 1", "leaves no problem for RL"),
    ("sgpo", f"--strategist {URL}", "name its model with --strategist_model"),
    ("sgpo", "--strategist http://me:secret@host/v1", "environment variable OPENAI_API_KEY"),
    ("sgpo", "--strategist_model strong", "belongs to an endpoint"),
    ("sgpo", "--strategist_args [1]", "--strategist_args [1]: it must be a JSON object"),
    ("sgpo", "--strategist_args {", "--strategist_args {: it must be a JSON object"),
    ("sgpo", "--strategies nowhere/s.jsonl", "--strategies nowhere/s.jsonl: there is no such folder"),
    ("sgpo", "--strategies .", "--strategies .: this is a folder"),
    ("sgpo", "--dataset plain.jsonl", "none of the problems has a strategy"),
    ("tgpo", "--teacher ./nowhere", "--teacher ./nowhere: no such directory"),
    ("tgpo", "--teacher_device abacus", "--teacher_device abacus"),
    ("tgpo", "--topk 1000", "student and teacher share 260 tokens"),
]


@pytest.mark.parametrize("script, flags, message", REFUSALS)
def test_refused_in_one_line_with_nothing_left_behind(script, flags, message, argv_of, tmp_path, refused,
                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    line = refused(script, *argv_of(script), "--out", "new", *flags.split())
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} == FILES.keys()


def test_resume_needs_a_directory(argv_of, refused):
    assert "--resume needs --out" in refused("grpo_baseline", *argv_of("grpo_baseline", "--resume"))


def test_tgpo_needs_a_teacher(model_dirs, refused):
    assert "--teacher is missing" in refused("tgpo", "--model", model_dirs["qwen2"])


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_a_flag_file_must_be_an_object(text, tmp_path, refused):
    path = tmp_path / "flags.json"
    if text:
        path.write_text(text)
    assert f"{path}: cannot read flags from it" in refused("grpo_baseline", path)


def test_a_run_directory_belongs_to_one_run(argv_of, train, tmp_path, rows_file, refused):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, data)
    argv = argv_of("grpo_baseline", "--dataset", data, "--steps", 1)
    run = train("grpo_baseline", "--dataset", data, "--steps", 1)
    argv += ["--out", run]
    before = (run / "metrics.jsonl").read_bytes()
    assert "exists and is not empty" in refused("grpo_baseline", *argv)
    line = refused("grpo_baseline", *argv, "--resume", "--lr", 2e-3, "--seed", 1)
    assert "lr was 0.001 and is 0.002; seed was 0 and is 1\n" in line
    assert "script was 'grpo_baseline' and is 'sgpo'" in refused("sgpo", *argv, "--resume")
    with open(run / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing there" in refused("grpo_baseline", *argv, "--resume")
    write_jsonl(data, read_jsonl(data)[1:])
    assert "problems was " in refused("grpo_baseline", *argv, "--resume")
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name, size", [("__0_0.distcp", 1000), (".metadata", 100)])
def test_a_damaged_checkpoint_is_named(name, size, train, argv_of, refused):
    run = train("grpo_baseline", "--steps", 1)
    file = run / "checkpoints/step_000001" / name
    file.write_bytes(file.read_bytes()[:size])
    line = refused("grpo_baseline", *argv_of("grpo_baseline", "--steps", 2, "--resume"), "--out", run)
    assert f"{file.parent}: cannot be read" in line


def test_an_error_in_a_users_reward_keeps_its_traceback(train, tmp_path):
    (tmp_path / "reward.py").write_text("def broken(text, row):\n    return 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        train("grpo_baseline", "--reward", f"{tmp_path}/reward.py:broken")


def test_a_reward_must_be_finite(argv_of, tmp_path, refused):
    (tmp_path / "reward.py").write_text("def infinite(text, row):\n    return float('inf')\n")
    argv = argv_of("grpo_baseline", "--reward", f"{tmp_path}/reward.py:infinite", "--out", tmp_path / "run")
    assert "returned inf for the problem with id" in refused("grpo_baseline", *argv)
