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
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import grpo_baseline
import sgpo
import tgpo
from conftest import (ROOT, SHARED, Child, read_jsonl, same_runs, same_weights, small_tokenizer, undo,
                      whole_run_for_real, write_rows)

# ---- what a run writes

def test_tensorboard_has_the_metrics_config_and_samples(rows_file, train):
    """Read back from its event files; what a resumed run does again takes the place of what was there."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--eval_dataset", rows_file, "--eval_every", 2, "--report_to", "tensorboard", "--steps", 3,
             "--save_every", 2]
    undo(train("grpo_baseline", *flags), 3)
    out = train("grpo_baseline", *flags, "--resume")
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
def test_other_dashboards_by_the_calls_they_share(name, tmp_path, train, capsys, monkeypatch):
    argv = ["grpo_baseline", "--steps", 1, "--report_to", name]
    if not importlib.util.find_spec(name):
        assert not train(*argv, out="none", code=2).exists()
        assert f"pip install {name}" in capsys.readouterr().err
    client, calls = types.ModuleType(name), []
    client.__spec__ = importlib.machinery.ModuleSpec(name, None)
    client.init = lambda project, name, config, resume, **own: calls.append((name, config, resume, own))
    client.log = lambda metrics, step: calls.append((step, metrics))
    client.Table = lambda dataframe: dataframe
    monkeypatch.setitem(sys.modules, name, client)
    train(*argv)
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
def test_the_learning_rate_follows_its_schedule(shape, wanted, train):
    """Two steps of warm-up; no step is wasted on a rate of 0; the same after a resume."""
    flags = ["--lr_schedule", shape, "--lr_warmup_steps", 2, "--steps", 4, "--save_every", 2]
    undo(train("grpo_baseline", *flags), 4)
    run = train("grpo_baseline", *flags, "--resume")
    rates = [row["lr"] / 1e-3 for row in read_jsonl(run / "metrics.jsonl")]
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


@pytest.mark.parametrize("script", ["sgpo", "grpo_baseline"])
def test_training_changes_the_model_and_metrics_agree_with_samples(script, model_dirs, train):
    out = train(script, "--steps", 3)
    assert not same_weights(model_dirs["qwen2"], out / "model")
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


def test_sgpo_without_distillation_is_grpo_to_the_bit(train):
    same_runs(train("sgpo", "--steps", 3, "--distill", "none", out="sgpo"),
              train("grpo_baseline", "--steps", 3, out="grpo"))


def test_strategies_on_some_rows_only(rows_file, tmp_path, train):
    rows = read_jsonl(rows_file)
    for row in rows[3:]:
        del row["strategy"]
    run = train("sgpo", "--dataset", write_rows(tmp_path / "some.jsonl", rows), "--steps", 4)
    assert {s["id"] for s in read_jsonl(run / "samples.jsonl") if s.get("guided")} == {"0", "1", "2"}


def test_guided_rows_are_sampled_behind_the_strategy_and_scored_without(train, monkeypatch):
    seen, true = {}, sgpo.update

    def watched(model, optimizer, ro, advantages, guidance, args):
        seen.update(scored=ro.prompts, sampled=guidance.prompts)
        return true(model, optimizer, ro, advantages, guidance, args)

    monkeypatch.setattr(sgpo, "update", watched)
    train("sgpo", "--steps", 1)
    sampled, scored = ([small_tokenizer().decode(p) for p in seen[name]] for name in ("sampled", "scored"))
    assert len(sampled) == 15 and not any("Strategy" in p for p in sampled[:9] + scored)
    assert all("Strategy:\nType: sum." in p for p in sampled[9:]) and sampled[:9] == scored[:9]
    for k, q in enumerate([0, 0, 1, 1, 2, 2]):  # guided rows belong to their problem
        assert scored[9 + k] == scored[3 * q]


# ---- resume

def test_resume_with_more_steps_and_a_config_json_as_a_flag_file_repeat_a_run(train, tmp_path, run_script):
    train("grpo_baseline", "--steps", 2, out="two")
    whole = train("grpo_baseline", "--steps", 4, out="whole")
    same_runs(train("grpo_baseline", "--steps", 4, "--resume", out="two"), whole)
    assert run_script("grpo_baseline", whole / "config.json", "--out", tmp_path / "again") == 0
    same_runs(tmp_path / "again", whole)


def test_a_checkpoint_before_the_first_optimizer_step_changes_nothing(tmp_path, train):
    """All groups were dead so far: AdamW has no state, and torch would make one up by a step of its own."""
    file = tmp_path / "late.py"
    late = ("n = 0\ndef f(response, row):\n    global n\n    n += 1\n"
            "    return float(n > 9 and len(response) % 2)\n")
    argv = ["grpo_baseline", "--save_every", 1, "--reward", f"{file}:f", "--steps"]
    file.write_text(late)
    first, = read_jsonl(train(*argv, 1) / "metrics.jsonl")
    assert first["updates"] == 0 and "padding_frac" not in first  # nothing was trained on
    file.write_text(late.replace("n > 9 and ", ""))  # as it is from step 2 on
    run = train(*argv, 2, "--resume")
    file.write_text(late)
    whole = train(*argv, 2, out="whole")
    assert read_jsonl(whole / "metrics.jsonl")[1]["updates"] == 1
    same_runs(run, whole)


# ---- kills

def test_twenty_kills_at_any_moment_change_nothing(argv_of, rows_file, tmp_path):
    argv = argv_of("sgpo", "--steps", 8, "--save_every", 1, "--eval_dataset", rows_file, "--eval_every", 3,
                   "--eval_samples", 1)
    Child(int).ended()  # the server of forks has started
    began = time.time()
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", tmp_path / "whole"]).ended() == 0
    whole, draw, kills, reached, broken = time.time() - began, random.Random(0), 0, set(), tmp_path / "broken"
    while kills < 20 or len(reached) < 6:  # the kills come all along the way
        if (broken / "model").exists():  # it came to its end: begin anew
            shutil.rmtree(broken)
        again = ["--resume"] if common.has_begun(broken) else []
        child = Child(whole_run_for_real, "sgpo", [*argv, "--out", broken, *again], said=tmp_path / "said")
        time.sleep(draw.uniform(0.1, 0.5 * whole))
        whole *= 1.03  # the machine may have become slower
        child.process.kill()
        kills += child.ended() == -9
        reached |= {p.name for p in broken.glob("checkpoints/*")}
        if (broken / "checkpoints" / "step_000007").exists():  # nearly through: make it young again
            for step in range(3, 9):
                shutil.rmtree(broken / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
    again = ["--resume"] if common.has_begun(broken) else []
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", broken, *again]).ended() == 0
    same_runs(tmp_path / "whole", broken)


@pytest.fixture(scope="module")
def whole(argv_of, rows_file, tmp_path_factory):
    """A run that nothing disturbed, and its command line."""
    argv = argv_of("sgpo", "--steps", 4, "--max_new_tokens", 40, "--eval_dataset", rows_file,
                   "--eval_samples", 1, "--eval_every", 2)
    run = tmp_path_factory.mktemp("whole") / "run"
    assert Child(whole_run_for_real, "sgpo", [*argv, "--out", run]).ended() == 0
    return run, argv


def resumed_equals(whole, run, *more):
    whole, argv = whole
    assert Child(whole_run_for_real, "sgpo", [*argv, *more, "--out", run, "--resume"]).ended() == 0
    same_runs(run, whole)


def broken_in_step_3(moment, argv, out):
    """A run that kills itself at one of the worst moments."""
    place, name = {"in the write": (dcp, "save"), "before the rename": (Path, "rename"),
                   "while an old one is removed": (shutil, "rmtree"),
                   "in the log": (common.Run, "log")}[moment]
    true = getattr(place, name)

    def deadly(*args, **kwargs):
        in_time = (out / "checkpoints" / "step_000002").exists()
        if not in_time or moment == "while an old one is removed" and not str(
            args[0]).endswith("step_000001"):
            return true(*args, **kwargs)
        if moment == "in the write":
            true(*args, **kwargs)
            for file in (out / "checkpoints" / "step_000003.tmp").iterdir():
                file.write_bytes(file.read_bytes()[:100])
        if moment == "while an old one is removed":
            next(args[0].iterdir()).unlink()
        if moment == "in the log":
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 3, "rew')
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, deadly)
    return whole_run_for_real("sgpo", [*argv, "--out", out])


@pytest.mark.parametrize("moment", ["in the write", "before the rename",
                                    "while an old one is removed", "in the log"])
def test_a_kill_in_the_middle_of_saving(moment, whole, tmp_path):
    argv = [*whole[1], "--save_every", 1]
    assert Child(broken_in_step_3, moment, argv, tmp_path / "run").ended() == -9
    resumed_equals(whole, tmp_path / "run", "--save_every", 1)


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


@pytest.mark.parametrize("moment, kind, at, step", [  # a step that has its rollout is finished
    ("rollout", signal.SIGTERM, 3, 2), ("update", signal.SIGINT, 3, 3), ("save", signal.SIGTERM, 3, 2),
    ("evaluation", signal.SIGTERM, 2, 2)])
def test_a_signal_is_obeyed_soon_and_leaves_a_checkpoint(moment, kind, at, step, whole, tmp_path):
    more, run = ["--save_every", 2 if moment == "save" else 0], tmp_path / "run"
    assert Child(told, kind, moment, at, [*whole[1], *more], run, said=tmp_path / "said").ended() == 130
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{step:06d}"]
    said, err = (tmp_path / "said").read_text(), (tmp_path / "said.err").read_text()
    assert f"stopped after step {step} of 4; go on with --resume" in said and "Traceback" not in err
    resumed_equals(whole, run, *more)  # an evaluation that the stop cut off is made up for


@pytest.mark.parametrize("processes", [None, "2"])
def test_a_stop_says_how_long_torchrun_waits(processes, monkeypatch, capsys):
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    common.Stop.can_wait = True
    common.Stop.on_signal(signal.SIGTERM, None)
    said = capsys.readouterr().err
    assert "what is done will be saved" in said and ("--shutdown_timeout" in said) == bool(processes)


def test_stops_at_the_ends_and_a_kill_in_an_evaluation_that_is_made_up_for(whole, argv_of, tmp_path):
    run, last, argv = tmp_path / "run", tmp_path / "last", whole[1]
    assert Child(told, signal.SIGINT, "evaluation", 1, argv, run).ended() == 130  # before the first step
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000000"]
    resumed = [*argv, "--resume"]
    assert Child(told, signal.SIGINT, "evaluation", 4, resumed, run).ended() == 130  # after the last one
    assert Child(told, signal.SIGKILL, "evaluation", 5, resumed, run).ended() == -9
    resumed_equals(whole, run)
    assert Child(told, signal.SIGINT, "update", 2, argv_of("sgpo", "--steps", 2), last).ended() == 0
    assert (last / "model").exists()  # it was the last step


def test_a_run_that_was_stopped_before_it_had_done_anything_can_be_resumed_or_begun_anew(train):
    run = train("grpo_baseline", "--steps", 1)
    for more in (["--resume"], []):
        for path in run.iterdir():
            if path.name not in ("config.json", "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        train("grpo_baseline", "--steps", 1, *more)
    assert (run / "model").exists()


def interrupted(moment, argv):
    """A run that is interrupted whenever it has written a token, or loads its data."""
    place, name = {"rollout": (common.Progress, "__call__"), "data": (grpo_baseline, "load_problems")}[moment]
    true = getattr(place, name)

    def wrapped(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return true(*args, **kwargs)

    setattr(place, name, wrapped)
    return whole_run_for_real("grpo_baseline", argv)


@pytest.mark.parametrize("moment, lines", [
    ("rollout", "\nstopping: what is done will be saved (once more: at once)\nstopped\n"),
    ("data", "stopped\n")])
def test_a_second_signal_and_one_before_training_end_at_once(moment, lines, argv_of, tmp_path):
    argv = argv_of("grpo_baseline", "--steps", 2, "--out", tmp_path / "run")
    assert Child(interrupted, moment, argv, said=tmp_path / "said").ended() == 130
    assert (tmp_path / "said.err").read_text() == lines
    assert (tmp_path / "run").exists() == (moment == "rollout")
    assert not list(tmp_path.glob("run/checkpoints/*"))


# ---- disks, numbers, memory

@pytest.mark.parametrize("times, code", [(1, 0), (5, 2)])
def test_gradients_that_are_not_finite(times, code, train, capsys, monkeypatch):
    """They are skipped and counted; five steps in a row with nothing else end the run."""
    true, calls = grpo_baseline.policy_loss, []

    def broken(*args):
        loss, clipped = true(*args)
        calls.append(1)
        return loss * (float("nan") if len(calls) <= times else 1.0), clipped

    monkeypatch.setattr(grpo_baseline, "policy_loss", broken)
    metrics = read_jsonl(train("grpo_baseline", "--steps", 9, code=code) / "metrics.jsonl")
    assert sum(m["nonfinite_updates"] for m in metrics) == times
    if code:
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "not finite in 5 steps in a row" in err
        assert "earlier weights" not in err
        assert not any(m["updates"] for m in metrics)


def test_out_of_memory_is_one_line_and_nothing_is_retried(train, capsys, monkeypatch):
    """After an error in a backward pass gradients may hang where no optimizer sees them: the run ends."""
    calls = []

    def short(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", short)
    train("grpo_baseline", "--steps", 2, code=2)
    err = capsys.readouterr().err
    assert len(calls) == 1 and err.count("\n") == 1
    assert "lower --microbatch_tokens" in err and "--cpu_offload" in err


def test_memory_rule(model_dirs):
    """16 bytes per parameter for what training holds, 2 for the copy that samples; the user's word stands."""
    def chosen(card: float, **flags) -> tuple[bool, bool]:
        args = sgpo.Args(model=str(model_dirs["qwen2"]), **flags)
        common.choose_memory(args, card)
        return args.activation_checkpointing, args.cpu_offload

    need = 18 * sum(p.numel() for p in common.load_model(str(model_dirs["qwen2"])).parameters())
    assert chosen(9 * need) == (False, False) and chosen(7 * need) == chosen(3 * need) == (True, False)
    assert chosen(1.1 * need) == (True, True) and chosen(1.1 * need, cpu_offload=False) == (True, False)
    more = 2 * sum(p.numel() for p in common.load_model(str(model_dirs["llama"])).parameters())
    for device, offloads in ((None, True), ("cuda:0", True), ("cuda:1", False)):  # a teacher beside it counts
        models = {"model": str(model_dirs["qwen2"]), "teacher": str(model_dirs["llama"])}
        args = tgpo.Args(**models, teacher_device=device)
        said = common.choose_memory(args, (need + more / 2) / 0.75)
        assert args.cpu_offload == offloads and ("the teacher's" in said) == offloads


# ---- the scripts' common text

def blocks(script: str) -> dict[str, str]:
    source = (ROOT / f"{script}.py").read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


SAME = {"Rollout", "rollout", "group_advantages", "policy_loss", "token_weights"}
OWN = {"Args", "check_args", "score_rows", "update", "main"}  # these hold the algorithm


@pytest.mark.parametrize("script", ["sgpo", "tgpo"])
def test_the_scripts_share_blocks_word_for_word_and_their_diff_takes_little_away(script):
    """What the paper adds may be long; what it changes of GRPO's own lines is not."""
    ours, base = blocks(script), blocks("grpo_baseline")
    assert all(ours[name] == base[name] for name in SAME) and set(base) - SAME == OWN
    assert [name for name in ours if name in base] == list(base)
    a, b = ((ROOT / f"{name}.py").read_text().splitlines() for name in ("grpo_baseline", script))
    start = next(i for i, line in enumerate(a) if line.startswith("# Letters: "))
    removed = [line for line in difflib.ndiff(a[start:], b) if line.startswith("- ")]
    assert len(removed) <= 25, "\n".join(removed)
