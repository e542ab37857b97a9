"""Whole runs: real model directories and problems, resume bit for bit, stops, refusals, and the scripts' common text."""
import ast
import difflib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import sgpo
from conftest import ROOT, SHARED, read_jsonl, small_model, small_tokenizer, stripped, write_rows

FAST = ["--prompts_per_step", 3, "--group_size", 3, "--max_new_tokens", 8, "--lr", 1e-3, "--system_prompt", "Think."]


def fast(script: str, model_dirs, rows_file, *more) -> list:
    guided = ["--guided_group_size", 2] if script == "sgpo" else []
    return ["--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward", f"{rows_file.parent}/reward.py:even", *FAST, *guided, *more]


# ---- real input

@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_real_problems_run_through_and_the_model_loads(kind, model_dirs, tmp_path, run_script):
    path = SHARED / "data" / "math500.jsonl"
    rows = common.load_rows(str(path))[:12] if path.exists() else [{"problem": f"Find $x$ if $x - {i} = 1$.", "answer": str(i + 1)} for i in range(12)]
    for row in rows[:5]:
        row["strategy"] = "Problem type: algebra. Strategy: isolate the unknown. Steps: 1. Write the equation. 2. Solve it. 3. Check."
    data, out = write_rows(tmp_path / "math.jsonl", rows), tmp_path / "run"
    assert run_script("sgpo", "--model", model_dirs[kind], "--dataset", data, "--eval_dataset", data, "--steps", 2, "--prompts_per_step", 4, "--group_size", 2,
                      "--guided_group_size", 2, "--max_new_tokens", 12, "--max_prompt_tokens", 2000, "--eval_samples", 1, "--out", out) == 0
    metrics = read_jsonl(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2]
    wanted = {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "clip_ratio", "grad_norm", "lr", "loss",
              "time/rollout_s", "time/train_s", "tokens_per_s", "padding_frac", "peak_memory_gb", "grader/timeouts"}
    assert wanted <= set(metrics[1]) and "eval/accuracy" in metrics[0] and "eval/accuracy" in metrics[2]
    samples = read_jsonl(out / "samples.jsonl")
    assert {"step", "id", "reward", "guided", "completion"} == set(samples[0]) and len(samples) >= 16
    ids = torch.tensor([[1, 2, 3]])
    loaded, trained = AutoModelForCausalLM.from_pretrained(out / "model"), common.load_model(str(out / "model"))
    torch.testing.assert_close(loaded(ids).logits, trained(ids).logits)
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == small_tokenizer().chat_template


@pytest.mark.parametrize("script", ["sgpo", "grpo_baseline"])
def test_training_changes_the_model_and_metrics_agree_with_the_samples(script, model_dirs, rows_file, tmp_path, run_script):
    out = tmp_path / "run"
    assert run_script(script, *fast(script, model_dirs, rows_file, "--steps", 3, "--out", out)) == 0
    before, after = load_file(model_dirs["qwen2"] / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before)
    samples = read_jsonl(out / "samples.jsonl")
    for m in read_jsonl(out / "metrics.jsonl"):
        rewards = [s["reward"] for s in samples if s["step"] == m["step"] and not s.get("guided")]
        assert len(rewards) == 9 and m["reward"] == pytest.approx(sum(rewards) / 9)
        groups = torch.tensor(rewards).view(3, 3)
        assert m["reward_std"] == pytest.approx(groups.std(1).mean().item())
        assert m["frac_reward_zero_std"] == pytest.approx((groups.std(1) == 0).float().mean().item())
        assert all(common.to_row(r)["answer"] == str(2 * int(s["id"])) for s in samples for r in [read_jsonl(rows_file)[int(s["id"])]])
    if script == "sgpo":
        assert "sgpo/alpha" in m and len([s for s in samples if s["step"] == 1 and s["guided"]]) == 6
    config = json.loads((out / "config.json").read_text())
    assert config["flags"]["lr"] == 1e-3 and config["versions"]["torch"] == torch.__version__


def test_sgpo_without_distillation_is_grpo_to_the_bit(model_dirs, rows_file, tmp_path, run_script):
    weights = []
    for script, more in (("sgpo", ["--distill", "none"]), ("grpo_baseline", [])):
        assert run_script(script, *fast(script, model_dirs, rows_file, "--steps", 3, "--out", tmp_path / script, *more)) == 0
        weights.append(load_file(tmp_path / script / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_strategies_on_some_rows_only(model_dirs, rows_file, tmp_path, run_script, capsys):
    rows = read_jsonl(rows_file)
    for row in rows[3:]:
        del row["strategy"]
    write_rows(rows_file, rows)
    assert run_script("sgpo", *fast("sgpo", model_dirs, rows_file, "--steps", 4, "--out", tmp_path / "run")) == 0
    assert "5 of 8 problems have no strategy: they train by GRPO alone" in capsys.readouterr().out
    guided = {s["id"] for s in read_jsonl(tmp_path / "run" / "samples.jsonl") if s["guided"]}
    assert guided == {"0", "1", "2"}


def test_guided_rows_are_sampled_behind_the_strategy_and_scored_without(model_dirs, rows_file, tmp_path, run_script, monkeypatch):
    seen = {}
    true_update, true_generate = sgpo.update, sgpo.generate
    monkeypatch.setattr(sgpo, "update", lambda m, o, ro, a, g, *rest: seen.update(ro=ro, guidance=g) or true_update(m, o, ro, a, g, *rest))
    monkeypatch.setattr(sgpo, "generate", lambda m, prompts, *rest: seen.update(sampled=prompts) or true_generate(m, prompts, *rest))
    assert run_script("sgpo", *fast("sgpo", model_dirs, rows_file, "--steps", 1, "--out", tmp_path / "run")) == 0
    tokenizer = small_tokenizer()
    sampled, scored = ([tokenizer.decode(p) for p in prompts] for prompts in (seen["sampled"], seen["ro"].prompts))
    assert seen["guidance"].prompts == seen["sampled"] and len(sampled) == 15
    assert not any("Strategy" in p for p in sampled[:9]) and all("Strategy:\nType: sum." in p for p in sampled[9:])
    assert sampled[:9] == scored[:9] and not any("Strategy" in p for p in scored)
    for k, q in enumerate([0, 0, 1, 1, 2, 2]):  # guided rows belong to their problem
        assert scored[9 + k] == scored[3 * q]


# ---- resume

def spawn(script: str, *argv) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and any(r["step"] >= step for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines(keepends=False)[:-1])):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    raise AssertionError("no progress")


@pytest.mark.parametrize("script, kind", [("sgpo", signal.SIGKILL), ("grpo_baseline", signal.SIGKILL), ("sgpo", signal.SIGINT)])
def test_killed_and_resumed_equals_uninterrupted(script, kind, model_dirs, rows_file, tmp_path):
    """Parameters, metrics, samples and problems, bit for bit; evaluations in between must not disturb the draws."""
    argv = fast(script, model_dirs, rows_file, "--steps", 18, "--save_every", 3, "--eval_every", 4, "--eval_dataset", rows_file, "--eval_samples", 1)
    whole = spawn(script, *argv, "--out", tmp_path / "whole")
    broken = spawn(script, *argv, "--out", tmp_path / "broken")
    wait_for_step(tmp_path / "broken", 5, broken)
    broken.send_signal(kind)
    output = broken.communicate(timeout=60)[0]
    if kind == signal.SIGINT:
        assert broken.returncode == 130 and "go on with --resume" in output and "Traceback" not in output
        (tmp_path / "broken" / "checkpoints" / "unfinished.tmp").mkdir()
        (tmp_path / "broken" / "checkpoints" / "unfinished.tmp" / "__0_0.distcp").write_bytes(b"half a checkpoint")
    else:
        with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "rew')  # a line cut in half
    again = spawn(script, *argv, "--out", tmp_path / "broken", "--resume")
    assert again.wait(timeout=120) == 0 and whole.wait(timeout=120) == 0, again.stdout.read()
    assert len(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) == 19
    assert stripped(read_jsonl(tmp_path / "whole" / "metrics.jsonl")) == stripped(read_jsonl(tmp_path / "broken" / "metrics.jsonl"))
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "broken" / "samples.jsonl").read_bytes()
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(list((tmp_path / "broken" / "checkpoints").glob("step_*"))) == 2


def test_resume_with_more_steps_equals_one_long_run(model_dirs, rows_file, tmp_path, run_script):
    argv = fast("grpo_baseline", model_dirs, rows_file)
    for steps, more in ((2, []), (4, ["--resume"])):
        assert run_script("grpo_baseline", *argv, "--steps", steps, "--out", tmp_path / "two", *more) == 0
    assert run_script("grpo_baseline", *argv, "--steps", 4, "--out", tmp_path / "four") == 0
    a, b = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("two", "four"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert stripped(read_jsonl(tmp_path / "two" / "metrics.jsonl")) == stripped(read_jsonl(tmp_path / "four" / "metrics.jsonl"))


# ---- refusals

def refused(run_script, capsys, script, *argv) -> str:
    assert run_script(script, *argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("flags, said", [
    (["--group_size", 1], "--group_size is 1"), (["--guided_group_size", 0], "--guided_group_size"), (["--stepz", 3], "did you mean --steps"),
    (["--nonsense"], "unknown flag --nonsense"), (["--steps", "many"], "--steps"), (["--temperature", 0], "--temperature"), (["--top_p", 1.5], "--top_p"),
    (["--loss_type", "ppo"], "choose grpo, dapo or dr_grpo"), (["--distill", "magic"], "--distill magic: choose"), (["--gamma", 0], "--gamma"),
    (["--lr", "nan"], "--lr is nan"), (["--updates_per_rollout", 9], "--updates_per_rollout 9"), (["--max_new_tokens", 5000], "exceeds the model's context of 4096"),
    (["--dataset", "missing.jsonl"], "missing.jsonl: no such file"), (["--model", "./missing"], "no such directory"), (["--resume"], "--resume needs --out"),
    (["--reward", "missing.py:f"], "--reward missing.py:f"), (["--delta", -1], "--delta"), (["--max_prompt_tokens", 3], "none of the 8 rows is usable"),
])
def test_bad_flags(flags, said, model_dirs, rows_file, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    out = [] if flags == ["--resume"] else ["--out", tmp_path / "run"]
    assert said in refused(run_script, capsys, "sgpo", *fast("sgpo", model_dirs, rows_file), *out, *flags)
    assert {p for p in tmp_path.rglob("*") if "__pycache__" not in str(p)} == before  # nothing half-written


def test_bad_data_and_models(model_dirs, rows_file, tmp_path, run_script, capsys):
    empty, bare = tmp_path / "empty.jsonl", tmp_path / "bare"
    empty.write_text("\n")
    small_model().save_pretrained(bare)
    argv = fast("sgpo", model_dirs, rows_file, "--out", tmp_path / "run")
    assert "no rows" in refused(run_script, capsys, "sgpo", *argv, "--dataset", empty)
    assert "no tokenizer can be loaded" in refused(run_script, capsys, "sgpo", *argv, "--model", bare)
    rows = [{k: v for k, v in row.items() if k != "strategy"} for row in read_jsonl(rows_file)]
    assert "--distill none" in refused(run_script, capsys, "sgpo", *argv, "--dataset", write_rows(tmp_path / "plain.jsonl", rows))
    (tmp_path / "crash.py").write_text("def f(response, row):\n    return 1 / 0\n")
    assert "ZeroDivisionError" in refused(run_script, capsys, "sgpo", *argv, "--reward", f"{tmp_path}/crash.py:f")


def test_foreign_and_other_run_directories(model_dirs, rows_file, tmp_path, run_script, capsys):
    out, foreign = tmp_path / "run", tmp_path / "foreign"
    argv = fast("grpo_baseline", model_dirs, rows_file, "--steps", 1)
    assert run_script("grpo_baseline", *argv, "--out", out) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert "add --resume" in refused(run_script, capsys, "grpo_baseline", *argv, "--out", out)
    assert "lr: 0.001 there, 0.5 now" in refused(run_script, capsys, "grpo_baseline", *argv, "--out", out, "--lr", 0.5, "--resume")
    assert "script: 'grpo_baseline' there" in refused(run_script, capsys, "sgpo", *fast("sgpo", model_dirs, rows_file), "--out", out, "--resume")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    assert "holds no run" in refused(run_script, capsys, "grpo_baseline", *argv, "--out", foreign)
    assert "cannot be used" in refused(run_script, capsys, "grpo_baseline", *argv, "--out", foreign / "thesis.tex")
    assert "no run in" in refused(run_script, capsys, "grpo_baseline", *argv, "--out", tmp_path / "new", "--resume")
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_out(model_dirs, rows_file, tmp_path, run_script, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "no permission" in refused(run_script, capsys, "sgpo", *fast("sgpo", model_dirs, rows_file), "--out", tmp_path / "locked" / "run")


def test_flag_files_and_spellings(model_dirs, rows_file, tmp_path, run_script, capsys):
    flags = {"model": str(model_dirs["qwen2"]), "dataset": str(rows_file), "steps": 1, "prompts_per_step": 2, "group_size": 2, "lr": 1e-3}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert run_script("grpo_baseline", tmp_path / "flags.json", "--max-new-tokens", 4, "--lr=0.5", "--out", tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert config["max_new_tokens"] == 4 and config["lr"] == 0.5 and config["group_size"] == 2
    (tmp_path / "flags.yaml").write_text("steps: many\n")
    assert "--steps: invalid int value" in refused(run_script, capsys, "grpo_baseline", tmp_path / "flags.yaml")
    (tmp_path / "flags.yaml").write_text("steps: [1, 2]\n")
    assert "steps must be of type int" in refused(run_script, capsys, "grpo_baseline", tmp_path / "flags.yaml")
    (tmp_path / "flags.json").write_text('{"stepz": 1}')
    assert "unknown flag 'stepz'" in refused(run_script, capsys, "grpo_baseline", tmp_path / "flags.json")


def test_every_completion_truncated_is_said(model_dirs, rows_file, tmp_path, run_script, capsys):
    run_script("grpo_baseline", *fast("grpo_baseline", model_dirs, rows_file, "--steps", 1, "--max_new_tokens", 1, "--out", tmp_path / "run"))
    captured = capsys.readouterr()
    assert "every completion ran into --max_new_tokens 1" in captured.out + captured.err


# ---- the demo's recipe, and the scripts' common text

def test_the_demo_brings_its_recipe_only_for_flags_not_set(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sgpo.py", "--lr", "0.5"])
    args = common.parse_args(sgpo.Args, common.demo_recipe)
    assert args.lr == 0.5 and args.steps == common.DEMO_RECIPE["steps"] and args.delta == 1.0
    monkeypatch.setattr(sys, "argv", ["sgpo.py", "--model", "Qwen/Qwen2.5-7B-Instruct"])
    args = common.parse_args(sgpo.Args, common.demo_recipe)  # the paper's
    assert (args.lr, args.delta, args.alpha0, args.gamma, args.alpha_max, args.clip_low, args.clip_high) == (1e-6, 1.0, 0.5, 0.1, 0.8, 0.2, 0.28)
    assert (args.temperature, args.top_p, args.group_size, args.guided_group_size) == (1.0, 0.95, 8, 4)


def test_demo_problems_are_consistent(tmp_path):
    train, held_out = common.demo_rows()
    assert not {r["id"] for r in train} & {r["id"] for r in held_out}
    assert {r["problem"][0] for r in train} == {r["problem"][0] for r in held_out}  # no kind is unseen
    for row in train + held_out:
        assert common.grade(row["solution"], row["answer"]) == 1.0
        assert row["answer"] not in row["strategy"]
    tokenizer = common.demo_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    common.Qwen2Config().save_pretrained(tmp_path)  # beside it the loader takes it for a Qwen2 tokenizer
    loaded = common.load_tokenizer(str(tmp_path))
    assert len(loaded) == len(tokenizer) and loaded.pad_token == "<pad>" and loaded.eos_token == "<end>"
    for row in train + held_out:
        for text in (row["problem"], row["solution"], row["strategy"]):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text and loaded(text).input_ids == ids
        assert common.build_prompt(loaded, row["problem"], "", row["strategy"]) == common.build_prompt(tokenizer, row["problem"], "", row["strategy"])
    assert loaded.decode(loaded("né 3+2∑\n").input_ids) == " 3+2"  # what the demo has no token for is left out


def blocks(script: str) -> dict[str, str]:
    source = (ROOT / f"{script}.py").read_text()
    return {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


COMMON = {"Rollout", "rollout", "group_advantages", "policy_loss", "token_weights", "evaluate"}
SAME = {"sgpo": COMMON, "tgpo": COMMON}


@pytest.mark.parametrize("script", SAME)
def test_shared_functions_are_word_for_word_the_same(script):
    ours, base = blocks(script), blocks("grpo_baseline")
    for name in SAME[script]:
        assert ours[name] == base[name], f"{name} differs between grpo_baseline.py and {script}.py"
    assert {n for n in base if n not in SAME[script]} == {"Args", "check_args", "update", "main"}  # these hold the algorithm
    order = [n for n in ours if n in base]
    assert order == list(base)


@pytest.mark.parametrize("script", SAME)
def test_the_diff_takes_little_away(script):
    """What the paper adds may be long; what it changes of GRPO's own lines is not."""
    a, b = ((ROOT / f"{name}.py").read_text().splitlines() for name in ("grpo_baseline", script))
    start = a.index("# Letters: B problems of a step, G samples a problem, N rows (problems x samples), P prompt, C completion, V vocabulary.")
    removed = [line for line in difflib.ndiff(a[start:], b) if line.startswith("- ")]
    assert len(removed) <= 25, "\n".join(removed)


@pytest.mark.parametrize("script", ["sgpo", "grpo_baseline"])
def test_the_demo_builds_runs_and_ends_with_its_table(script, tmp_path, run_script, capsys, monkeypatch):
    """The plumbing of `python sgpo.py`, with a warm-up too short to learn anything."""
    monkeypatch.setattr(common, "DEMO_WARMUP_STEPS", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = ["--eval_samples", 1, "--prompts_per_step", 2, "--group_size", 2, "--max_new_tokens", 12]
    assert run_script(script, "--steps", 2, *tiny, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "building the demo model once" in said
    table = [line.split() for line in said.splitlines()[-5:]]
    assert table[0] == ["held-out", "accuracy", "before", "after"] and table[1][0] == "alone" and table[2][:3] == ["with", "the", "strategy"]
    assert len(list((tmp_path / "cache").rglob("model.safetensors"))) == 1 and not list((tmp_path / "cache").rglob("unfinished*"))
    assert run_script(script, "--steps", 0, *tiny, "--out", tmp_path / "again") == 0
    assert "building" not in capsys.readouterr().out  # from the cache
