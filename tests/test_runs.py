"""Whole runs: what they write, resume bit for bit, kills and signals at any moment, refusals, the scripts'
text."""
import ast
import difflib
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import grpo_baseline
import sgpo
from conftest import ROOT, SHARED, Child, read_jsonl, small_tokenizer, stripped, write_rows
from test_ranks import whole_run_for_real

SCRIPTS = ("sgpo", "grpo_baseline")


def argv_of(script: str, model_dirs, rows_file, *more) -> list:
    guided = ["--guided_group_size", 2] if script == "sgpo" else []
    return ["--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward",
            f"{rows_file.parent}/reward.py:even", "--prompts_per_step", 3, "--group_size", 3,
            "--max_new_tokens", 8, "--lr", 1e-3, "--system_prompt", "Think.", *guided, *more]


def same_runs(a: Path, b: Path) -> None:
    """Weights, metrics with all their keys, samples: bit for bit."""
    assert stripped(read_jsonl(a / "metrics.jsonl")) == stripped(read_jsonl(b / "metrics.jsonl"))
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    one, two = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(one[k], two[k]) for k in one)


# ---- what a run writes

def test_tensorboard_has_the_metrics_config_and_samples(model_dirs, rows_file, tmp_path, run_script):
    """Read back from its event files; what a resumed run does again takes the place of what was there."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--eval_dataset", rows_file, "--eval_every", 2,
                   "--report_to", "tensorboard", "--out", out)
    assert run_script("grpo_baseline", *argv, "--steps", 3, "--save_every", 2) == 0
    for path in (out / "checkpoints" / "step_000003", out / "model"):
        shutil.rmtree(path)
    assert run_script("grpo_baseline", *argv, "--steps", 3, "--save_every", 2, "--resume") == 0
    board = events.EventAccumulator(str(out / "tensorboard"), {events.SCALARS: 0, events.TENSORS: 0}).Reload()
    metrics = read_jsonl(out / "metrics.jsonl")
    for key in {key for row in metrics for key in row} - {"step"}:
        shown = [(event.step, event.value) for event in board.Scalars(key)]
        assert shown == [(row["step"], pytest.approx(row[key], rel=1e-5)) for row in metrics if key in row]
    texts = {tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode()
             for tag in board.Tags()["tensors"]}
    assert '"lr": 0.001' in texts["config/text_summary"]
    first = read_jsonl(out / "samples.jsonl")[0]
    sample = texts["samples/0/text_summary"].replace("\n    ", "\n")
    assert json.loads(sample) == first and all(line[:4] == "    " for line in
                                               texts["samples/0/text_summary"].splitlines())  # a code block


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_dashboards_by_the_calls_they_share(name, model_dirs, rows_file, tmp_path, run_script, capsys,
                                                  monkeypatch):
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 1, "--report_to", name)
    if not importlib.util.find_spec(name):
        assert run_script("grpo_baseline", *argv, "--out", tmp_path / "none") == 2
        assert f"pip install {name}" in capsys.readouterr().err and not (tmp_path / "none").exists()
    client, calls = types.ModuleType(name), []
    client.__spec__ = importlib.machinery.ModuleSpec(name, None)
    client.init = lambda project, name, config, resume, **own: calls.append((name, config, resume, own))
    client.log = lambda metrics, step: calls.append((step, metrics))
    client.Table = lambda dataframe: dataframe
    monkeypatch.setitem(sys.modules, name, client)
    assert run_script("grpo_baseline", *argv, "--out", tmp_path / "run") == 0
    (run, config, resume, _), (step, metrics) = calls
    row, = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert (run, resume, step) == ("run", "allow", 1) and config["flags"]["lr"] == 1e-3
    assert len(metrics.pop("samples")) == 9 and metrics == {k: v for k, v in row.items() if k != "step"}


def test_the_line_beside_the_bar_tells_what_is_known():
    run = object.__new__(common.Run)
    run.accuracy = None
    run.metrics = {"step": 3, "reward": 0.254, "sgpo/alpha": 0.8, "tokens_per_s": 1234.5, "lr": 1e-6}
    assert run.line() == "reward 0.25, alpha 0.80, 1234/s"
    run.accuracy = 0.5
    run.metrics = {"step": 4, "reward": 0.0, "entropy": 0.1, "completions/mean_length": 7.6}
    assert run.line() == "reward 0.00, held-out 0.50, entropy 0.10, 8 tokens"


@pytest.mark.parametrize("shape, wanted", [
    ("constant", [.5, 1, 1, 1]), ("linear", [.5, 1, 2 / 3, 1 / 3]), ("cosine", [.5, 1, .75, .25])])
def test_the_learning_rate_follows_its_schedule(shape, wanted, model_dirs, rows_file, tmp_path, run_script):
    """Two steps of warm-up; no step is wasted on a rate of 0; the same after a resume."""
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--lr_schedule", shape, "--lr_warmup_steps", 2,
                   "--steps", 4, "--out", tmp_path / "run", "--save_every", 2)
    assert run_script("grpo_baseline", *argv) == 0
    for path in (tmp_path / "run" / "checkpoints" / "step_000004", tmp_path / "run" / "model"):
        shutil.rmtree(path)
    assert run_script("grpo_baseline", *argv, "--resume") == 0
    rates = [row["lr"] / 1e-3 for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_real_problems_run_through_and_the_model_loads(kind, model_dirs, tmp_path, run_script):
    path = SHARED / "data" / "math500.jsonl"
    rows = [{"problem": f"Find $x$ if $x - {i} = 1$.", "answer": str(i + 1)} for i in range(12)]
    rows = common.load_rows(str(path))[:12] if path.exists() else rows
    for row in rows[:5]:
        row["strategy"] = "Problem type: algebra. Strategy: isolate x. Steps: 1. Write it. 2. Solve it."
    data, out = write_rows(tmp_path / "math.jsonl", rows), tmp_path / "run"
    assert run_script("sgpo", "--model", model_dirs[kind], "--dataset", data, "--eval_dataset", data,
                      "--steps", 2, "--prompts_per_step", 4, "--group_size", 2, "--guided_group_size", 2,
                      "--max_new_tokens", 12, "--max_prompt_tokens", 2000, "--eval_samples", 1, "--out",
                      out) == 0
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length",
            "completions/clipped_ratio", "clip_ratio", "grad_norm", "lr", "loss", "time/rollout_s",
            "time/train_s", "tokens_per_s", "peak_memory_gb", "grader/timeouts"} <= set(metrics[1])
    assert "eval/accuracy" in metrics[0] and "eval/accuracy" in metrics[2]
    samples = read_jsonl(out / "samples.jsonl")
    assert {"step", "id", "problem", "answer", "reward",
            "completion"} == set(samples[0]) and len(samples) >= 16
    ids = torch.tensor([[1, 2, 3]])
    loaded, ours = AutoModelForCausalLM.from_pretrained(out / "model"), common.load_model(str(out / "model"))
    torch.testing.assert_close(loaded(ids).logits, ours(ids).logits)
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == small_tokenizer().chat_template


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_changes_the_model_and_metrics_agree_with_samples(
    script, model_dirs, rows_file, tmp_path, run_script):
    out = tmp_path / "run"
    assert run_script(script, *argv_of(script, model_dirs, rows_file, "--steps", 3, "--out", out)) == 0
    before, after = (load_file(d / "model.safetensors") for d in (model_dirs["qwen2"], out / "model"))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    samples = read_jsonl(out / "samples.jsonl")
    for m in read_jsonl(out / "metrics.jsonl"):
        rewards = [s["reward"] for s in samples if s["step"] == m["step"] and not s.get("guided")]
        groups = torch.tensor(rewards).view(3, 3)
        assert m["reward"] == pytest.approx(groups.mean().item())
        assert m["reward_std"] == pytest.approx(groups.std(1).mean().item())
        assert m["frac_reward_zero_std"] == pytest.approx((groups.std(1) == 0).float().mean().item())
    assert all(s["problem"] == f"What is {s['id']} + {s['id']}?" for s in samples)
    if script == "sgpo":
        assert "sgpo/alpha" in m and len([s for s in samples if s["step"] == 1 and s.get("guided")]) == 6
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["lr"] == 1e-3 and config["versions"]["torch"] == torch.__version__


def test_sgpo_without_distillation_is_grpo_to_the_bit(model_dirs, rows_file, tmp_path, run_script):
    for script, more in (("sgpo", ["--distill", "none"]), ("grpo_baseline", [])):
        argv = argv_of(script, model_dirs, rows_file, "--steps", 3, "--out", tmp_path / script, *more)
        assert run_script(script, *argv) == 0
    same_runs(tmp_path / "sgpo", tmp_path / "grpo_baseline")


def test_strategies_on_some_rows_only(model_dirs, rows_file, tmp_path, run_script):
    rows = read_jsonl(rows_file)
    for row in rows[3:]:
        del row["strategy"]
    write_rows(rows_file, rows)
    argv = argv_of("sgpo", model_dirs, rows_file, "--steps", 4, "--out", tmp_path / "run")
    assert run_script("sgpo", *argv) == 0
    guided = {s["id"] for s in read_jsonl(tmp_path / "run" / "samples.jsonl") if s.get("guided")}
    assert guided == {"0", "1", "2"}


def test_guided_rows_are_sampled_behind_the_strategy_and_scored_without(model_dirs, rows_file, tmp_path,
        run_script, monkeypatch):
    seen, true = {}, sgpo.update

    def watched(model, optimizer, ro, advantages, guidance, args):
        seen.update(scored=ro.prompts, sampled=guidance.prompts)
        return true(model, optimizer, ro, advantages, guidance, args)

    monkeypatch.setattr(sgpo, "update", watched)
    assert run_script("sgpo", * argv_of("sgpo", model_dirs, rows_file, "--steps", 1, "--out",
                                        tmp_path / "run")) == 0
    sampled, scored = ([small_tokenizer().decode(p) for p in seen[name]] for name in ("sampled", "scored"))
    assert len(sampled) == 15 and not any("Strategy" in p for p in sampled[:9] + scored)
    assert all("Strategy:\nType: sum." in p for p in sampled[9:]) and sampled[:9] == scored[:9]
    for k, q in enumerate([0, 0, 1, 1, 2, 2]):  # guided rows belong to their problem
        assert scored[9 + k] == scored[3 * q]


# ---- resume

def test_resume_with_more_steps_equals_one_long_run(model_dirs, rows_file, tmp_path, run_script):
    argv = argv_of("grpo_baseline", model_dirs, rows_file)
    for steps, out, more in ((2, "two", []), (4, "two", ["--resume"]), (4, "four", [])):
        assert run_script("grpo_baseline", *argv, "--steps", steps, "--out", tmp_path / out, *more) == 0
    same_runs(tmp_path / "two", tmp_path / "four")


def test_a_checkpoint_before_the_first_optimizer_step_changes_nothing(
    model_dirs, rows_file, tmp_path, run_script):
    """All groups were dead so far: AdamW has no state, and torch would make one up by a step of its own."""
    late = tmp_path / "late.py"
    late.write_text("n = 0\ndef f(response, row):\n    global n\n    n += 1\n"
                    "    return float(n > 9 and len(response) % 2)\n")
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--save_every", 1, "--reward", f"{late}:f")
    assert run_script("grpo_baseline", *argv, "--steps", 1, "--out", tmp_path / "run") == 0
    first, = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["updates"] == 0 and "padding_frac" not in first  # nothing was trained on
    late.write_text("def f(response, row):\n    return float(len(response) % 2)\n")  # as it is from step 2 on
    assert run_script("grpo_baseline", *argv, "--steps", 2, "--out", tmp_path / "run", "--resume") == 0
    late.write_text("n = 0\ndef f(response, row):\n    global n\n    n += 1\n"
                    "    return float(n > 9 and len(response) % 2)\n")
    assert run_script("grpo_baseline", *argv, "--steps", 2, "--out", tmp_path / "whole") == 0
    assert read_jsonl(tmp_path / "whole" / "metrics.jsonl")[1]["updates"] == 1
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_config_json_as_a_flag_file_repeats_the_run(model_dirs, rows_file, tmp_path, run_script):
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 2)
    assert run_script("grpo_baseline", *argv, "--out", tmp_path / "a") == 0
    assert run_script("grpo_baseline", tmp_path / "a" / "config.json", "--out", tmp_path / "b") == 0
    same_runs(tmp_path / "a", tmp_path / "b")


# ---- kills

def test_twenty_kills_at_any_moment_change_nothing(model_dirs, rows_file, tmp_path):
    argv = argv_of("sgpo", model_dirs, rows_file, "--steps", 12, "--save_every", 1, "--eval_dataset",
                   rows_file, "--eval_every", 3, "--eval_samples", 1)
    Child(int).ended()  # the server of forks has started
    began = time.time()
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", tmp_path / "whole"]).ended() == 0
    whole, draw, kills, reached, broken = time.time() - began, random.Random(0), 0, set(), tmp_path / "broken"
    while kills < 20:
        if (broken / "model").exists():  # it came to its end: begin anew
            shutil.rmtree(broken)
        again = ["--resume"] if common.has_begun(broken) else []
        child = Child(whole_run_for_real, "sgpo", [*argv, "--out", broken, *again], said=tmp_path / "said")
        time.sleep(draw.uniform(0.1, 0.5 * whole))
        child.process.kill()
        kills += child.ended() == -9
        reached |= {p.name for p in broken.glob("checkpoints/*")}
        if (broken / "checkpoints" / "step_000010").exists():  # nearly through: make it young again
            for step in range(5, 13):
                shutil.rmtree(broken / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
    again = ["--resume"] if common.has_begun(broken) else []
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", broken, *again]).ended() == 0
    assert len(reached) > 5, reached  # the kills came all along the way
    same_runs(tmp_path / "whole", broken)


def broken_at_step_5(moment, argv, out):
    """A run that kills itself at step 5, at one of the worst moments."""
    place, name = {"in the write": (dcp, "save"), "before the rename": (Path, "rename"),
                   "while an old one is removed": (shutil, "rmtree"),
                   "in the log": (common.Run, "log")}[moment]
    true = getattr(place, name)

    def deadly(*args, **kwargs):
        in_time = (out / "checkpoints" / "step_000004").exists()
        if not in_time or moment == "while an old one is removed" and not str(
            args[0]).endswith("step_000003"):
            return true(*args, **kwargs)
        if moment == "in the write":
            true(*args, **kwargs)
            for file in (out / "checkpoints" / "step_000005.tmp").iterdir():
                file.write_bytes(file.read_bytes()[:100])
        if moment == "while an old one is removed":
            next(args[0].iterdir()).unlink()
        if moment == "in the log":
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 5, "rew')
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, deadly)
    return whole_run_for_real("grpo_baseline", [*argv, "--out", out])


@pytest.mark.parametrize("moment", ["in the write", "before the rename",
                         "while an old one is removed", "in the log"])
def test_a_kill_in_the_middle_of_saving(moment, model_dirs, rows_file, tmp_path):
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 8, "--save_every", 1)
    assert Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "whole"]).ended() == 0
    assert Child(broken_at_step_5, moment, argv, tmp_path / "broken").ended() == -9
    again = Child(whole_run_for_real, "grpo_baseline", [*argv, "--out", tmp_path / "broken", "--resume"])
    assert again.ended() == 0
    same_runs(tmp_path / "whole", tmp_path / "broken")


# ---- signals

def told(kind, moment, at, argv, out):
    """A run that gets a signal in step `at`, or in the evaluation before it; it must end within 10 s."""
    place, name = {"rollout": (common.Progress, "__call__"), "update": (sgpo, "policy_loss"),
                   "save": (dcp, "save"), "evaluation": (sgpo, "held_out_accuracy")}[moment]
    true, began = getattr(place, name), []

    def wrapped(*args, **kwargs):
        rows = read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        if not began and len([row for row in rows if row["step"]]) + 1 == at:
            began.append(time.time())
            os.kill(os.getpid(), kind)
        return true(*args, **kwargs)

    setattr(place, name, wrapped)
    try:
        return whole_run_for_real("sgpo", [*argv, "--out", out])
    finally:
        assert time.time() - began[0] < 10


@pytest.mark.parametrize("moment, kind",
                         [("rollout", signal.SIGTERM), ("update", signal.SIGINT), ("save", signal.SIGTERM),
                          ("evaluation", signal.SIGINT), ("evaluation", signal.SIGTERM)])
def test_a_signal_is_obeyed_soon_and_leaves_a_checkpoint(kind, moment, model_dirs, rows_file, tmp_path):
    argv = argv_of("sgpo", model_dirs, rows_file, "--save_every", 2 if moment == "save" else 0,
                   "--eval_dataset", rows_file, "--eval_samples", 1, "--eval_every", 2, "--max_new_tokens",
                   40, "--steps", 4)
    run, whole = tmp_path / "run", tmp_path / "whole"
    at = 2 if moment == "evaluation" else 3
    assert Child(told, kind, moment, at, argv, run, said=tmp_path / "said").ended() == 130
    step = {"update": 3}.get(moment, 2)  # a step that has its rollout is finished
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    said, err = (tmp_path / "said").read_text(), (tmp_path / "said.err").read_text()
    assert f"stopped after step {step} of 4; go on with --resume" in said and "Traceback" not in err
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", run, "--resume"]).ended() == 0
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", whole]).ended() == 0
    same_runs(run, whole)  # an evaluation that the stop cut off is made up for


def test_stops_at_the_ends_and_a_kill_in_an_evaluation_that_is_made_up_for(model_dirs, rows_file, tmp_path):
    argv = argv_of("sgpo", model_dirs, rows_file, "--eval_samples", 1, "--eval_every", 2, "--steps", 2)
    held_out = [*argv, "--eval_dataset", rows_file]
    run, whole, last = tmp_path / "run", tmp_path / "whole", tmp_path / "last"
    assert Child(whole_run_for_real, "sgpo", [*held_out, "--out", whole]).ended() == 0
    assert Child(told, signal.SIGINT, "evaluation", 1, held_out, run).ended() == 130  # before the first step
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000000"]
    resumed = [*held_out, "--resume"]
    assert Child(told, signal.SIGINT, "evaluation", 2, resumed, run).ended() == 130  # after the last one
    assert Child(told, signal.SIGKILL, "evaluation", 3, resumed, run).ended() == -9
    assert Child(whole_run_for_real, "sgpo", [*resumed, "--out", run]).ended() == 0
    same_runs(run, whole)
    assert Child(told, signal.SIGINT, "update", 2, argv, last).ended() == 0  # the last step
    assert (last / "model").exists()


def test_a_run_that_was_stopped_before_it_had_done_anything_can_be_resumed_or_begun_anew(
    model_dirs, rows_file, tmp_path, run_script):
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 1, "--out", tmp_path / "run")
    assert run_script("grpo_baseline", *argv) == 0
    for more in (["--resume"], []):
        for path in (tmp_path / "run").iterdir():
            if path.name not in ("config.json", "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run_script("grpo_baseline", *argv, *more) == 0
    assert (tmp_path / "run" / "model").exists()


def told_twice(argv):
    """A run that is interrupted twice in its first rollout."""
    true = common.Progress.__call__

    def wrapped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return true(*args, **kwargs)

    common.Progress.__call__ = wrapped
    return whole_run_for_real("grpo_baseline", argv)


def test_a_second_signal_ends_at_once(model_dirs, rows_file, tmp_path):
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 2, "--out", tmp_path / "run")
    assert Child(told_twice, argv, said=tmp_path / "said").ended() == 130
    lines = (tmp_path / "said.err").read_text().split("\n")
    assert lines == ["", "stopping: what is done will be saved (once more: at once)", "stopped", ""]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def interrupted(seconds_in, argv):
    """A run that is interrupted before it has begun to train."""
    true = common.load_problems
    common.load_problems = grpo_baseline.load_problems = lambda *a: os.kill(
        os.getpid(), signal.SIGINT) or true(*a)
    return whole_run_for_real("grpo_baseline", argv)


def test_a_stop_before_training_is_one_line_and_leaves_nothing(model_dirs, rows_file, tmp_path):
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--out", tmp_path / "run")
    assert Child(interrupted, 0, argv, said=tmp_path / "said").ended() == 130
    assert (tmp_path / "said.err").read_text() == "stopped\n" and not (tmp_path / "run").exists()


# ---- disks, numbers, memory

@pytest.mark.parametrize("times, code", [(1, 0), (5, 2)])
def test_gradients_that_are_not_finite(times, code, model_dirs, rows_file,
                                       tmp_path, run_script, capsys, monkeypatch):
    """They are skipped and counted; five steps in a row with nothing else end the run."""
    true, calls = grpo_baseline.policy_loss, []

    def broken(*args):
        loss, clipped = true(*args)
        calls.append(1)
        return loss * (float("nan") if len(calls) <= times else 1.0), clipped

    monkeypatch.setattr(grpo_baseline, "policy_loss", broken)
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 9, "--out", tmp_path / "run")
    assert run_script("grpo_baseline", *argv) == code
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(m["nonfinite_updates"] for m in metrics) == times
    if code:
        err = capsys.readouterr().err
        assert err.count(
            "\n") == 1 and "not finite in 5 steps in a row" in err and "earlier weights" not in err
        assert not any(m["updates"] for m in metrics)


def test_out_of_memory_is_one_line_and_nothing_is_retried(model_dirs, rows_file, tmp_path, run_script, capsys,
                                                          monkeypatch):
    """After an error in a backward pass gradients may hang where no optimizer sees them: the run ends."""
    calls = []

    def short(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", short)
    argv = argv_of("grpo_baseline", model_dirs, rows_file, "--steps", 2, "--out", tmp_path / "run")
    assert run_script("grpo_baseline", *argv) == 2
    err = capsys.readouterr().err
    assert len(calls) == 1 and err.count(
        "\n") == 1 and "lower --microbatch_tokens" in err and "--cpu_offload" in err


def test_memory_rule(monkeypatch, tmp_path):
    """16 bytes a parameter for what training holds, 2 for the copy that samples; the user's word stands."""
    def chosen(card: float, **flags) -> tuple[bool, bool]:
        args = sgpo.Args(model="demo", **flags)
        common.choose_memory(args, card)
        return args.activation_checkpointing, args.cpu_offload

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(common, "DEMO_STEPS", 2)
    need = 18 * sum(p.numel() for p in common.AutoModelForCausalLM.from_config(
        common.AutoConfig.from_pretrained(common.demo_dir())).parameters())
    assert chosen(5 * need) == (False, False) and chosen(3 * need) == (True, False)
    assert chosen(1.1 * need) == (True, True) and chosen(1.1 * need, cpu_offload=False) == (True, False)


# ---- the scripts' common text

def blocks(script: str) -> dict[str, str]:
    source = (ROOT / f"{script}.py").read_text()
    named = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, named)}


SAME = {"Rollout", "rollout", "group_advantages", "policy_loss", "token_weights"}


@pytest.mark.parametrize("script", ["sgpo", "tgpo"])
def test_what_the_scripts_share_is_word_for_word_the_same(script):
    ours, base = blocks(script), blocks("grpo_baseline")
    assert all(ours[name] == base[name] for name in SAME)
    assert set(base) - SAME == {"Args", "check_args", "score_rows",
               "update", "main"}  # these hold the algorithm
    assert [name for name in ours if name in base] == list(base)


@pytest.mark.parametrize("script", ["sgpo", "tgpo"])
def test_the_diff_takes_little_away(script):
    """What the paper adds may be long; what it changes of GRPO's own lines is not."""
    a, b = ((ROOT / f"{name}.py").read_text().splitlines() for name in ("grpo_baseline", script))
    start = next(i for i, line in enumerate(a) if line.startswith("# Letters: "))
    removed = [line for line in difflib.ndiff(a[start:], b) if line.startswith("- ")]
    assert len(removed) <= 25, "\n".join(removed)
