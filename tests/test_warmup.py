"""The SFT warm-up: losses and weights of a plain loop, the best epoch, reuse, the split."""
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import grpo_baseline
from conftest import (
    IM_END, assert_same_runs, read_jsonl, run_main, same_weights, small_model, small_tokenizer,
    write_jsonl)


def solved(i: int) -> dict:
    """Return a problem with its solution; the lengths of solutions differ."""
    return {
        "id": str(i),
        "problem": f"What is {i} + {i}?",
        "answer": str(2 * i),
        "solution": f"Twice {i}{'!' * (i % 7)} is \\boxed{{{2 * i}}}.",
        "strategy": f"Double {i}.",
    }


ROWS = [solved(i) for i in range(24)]


@pytest.fixture(scope="module")
def argv(model_dirs, tmp_path_factory) -> list:
    """Return the command line of the SFT baseline, without --out: a warm-up and no step of RL."""
    data = write_jsonl(tmp_path_factory.mktemp("solved") / "solved.jsonl", ROWS)
    flags = ("--steps 0 --warmup_frac 1 --warmup_lr 0.002 --warmup_epochs 3 --warmup_batch_size 5 "
             "--max_grad_norm 0.5 --max_new_tokens 40 --system_prompt Think. "
             "--prompts_per_step 4 --group_size 2")
    return ["--model", model_dirs["qwen2"], "--dataset", data, *flags.split()]


@pytest.fixture(scope="module")
def baseline(argv, tmp_path_factory):
    """Return a finished run of the SFT baseline."""
    out = tmp_path_factory.mktemp("baseline") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        assert run_main("grpo_baseline", *argv, "--out", out) == 0
    return out


# ---- what is learnt

def plain_loss(model, rows: list[dict]) -> torch.Tensor:
    """Return the mean -log pi of the solutions' tokens, computed one row at a time."""
    tokenizer = small_tokenizer()
    losses = []
    for row in rows:
        prompt = common.build_prompt(tokenizer, row["problem"], "Think.")
        solution = tokenizer(row["solution"]).input_ids + [IM_END]
        logits = model(torch.tensor([prompt + solution])).logits[0, len(prompt) - 1:-1]
        losses.append(F.cross_entropy(logits, torch.tensor(solution), reduction="none"))
    return torch.cat(losses).mean()


def plain_warm_up(rows: list[dict], peak: float, epochs: int):
    """Train as anybody would write it, in float64; yield training loss, validation loss and weights."""
    model = small_model(tie_word_embeddings=True).double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    order = common.random_generator(0, "warm-up").permutation(len(rows))
    num_validation = round(len(rows) / 10)
    validation = [rows[i] for i in order[:num_validation]]
    train = order[num_validation:]
    steps_per_epoch = -(-len(train) // 5)
    steps = epochs * steps_per_epoch
    rising = round(steps / 10)
    step = 0
    for epoch in range(1, epochs + 1):
        shuffled = common.random_generator(0, "warm-up epoch", epoch).permutation(train)
        losses = []
        for batch in np.array_split(shuffled, steps_per_epoch):
            step += 1
            progress = (step - rising) / (steps + 1 - rising)
            factor = step / rising if step <= rising else (1 + np.cos(np.pi * progress)) / 2
            optimizer.param_groups[0]["lr"] = peak * factor
            loss = plain_loss(model, [rows[i] for i in batch])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        yield np.mean(losses), plain_loss(model, validation).item(), weights


# Random letters can be learnt by heart but not predicted, so the validation loss rises again.
LETTERS = np.random.default_rng(0).integers(97, 123, (12, 20))
NOISE = [{**row, "solution": bytes(text.tolist()).decode()} for row, text in zip(ROWS, LETTERS)]


@pytest.mark.parametrize("rows, peak, epochs, kept", [
    (ROWS, 2e-3, 3, 3),
    (NOISE, 0.02, 6, 4),
])
def test_losses_and_weights_are_those_of_a_plain_loop(rows, peak, epochs, kept, argv, tmp_path, run_script,
                                                      capsys):
    (tmp_path / "reward.py").write_text("def right(text, row):\n    return 1\n")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = (f"--reward {tmp_path}/reward.py:right --warmup_lr {peak} --warmup_epochs {epochs} "
             f"--microbatch_tokens 150 --dataset {data} --out {tmp_path}/run")
    assert run_script("grpo_baseline", *argv, *flags.split()) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation" in line]
    plain = list(plain_warm_up(rows, peak, epochs))
    assert len(lines) == epochs
    for number, line in enumerate(lines, 1):
        train, validation, weights = plain[number - 1]
        assert line == f"warm-up: epoch {number} of {epochs}, loss {train:.3f}, validation {validation:.3f}"
    assert kept == 1 + np.argmin([validation for train, validation, weights in plain])
    best = plain[kept - 1][2]
    for name, weight in load_file(tmp_path / "run/warmup/model.safetensors").items():
        torch.testing.assert_close(weight.double(), best[name], atol=1e-4, rtol=0)


def test_without_steps_the_model_is_the_sft_baseline(baseline, model_dirs):
    assert same_weights(baseline / "warmup", baseline / "model")
    assert not same_weights(model_dirs["qwen2"], baseline / "model")
    assert not (baseline / "warmup.best").exists()


def test_the_end_token_is_taught():
    tokenizer = small_tokenizer()
    assert common.solution_ids(tokenizer, "Four.", [1])[-1] == IM_END
    assert common.solution_ids(tokenizer, "Four.", [1])[:-1] == tokenizer("Four.").input_ids


def test_an_opened_thinking_is_not_opened_twice():
    tokenizer = small_tokenizer()
    prompt = tokenizer("Go.<think>\n").input_ids
    assert tokenizer.decode(common.solution_ids(tokenizer, "<think>\nHm.", prompt)[:-1]) == "Hm."


# ---- reuse

@pytest.mark.parametrize("is_finished, line", [
    (True, "warm-up: loaded "),
    (False, "warm-up: epoch 1 of 3"),
])
def test_a_finished_warm_up_is_reused_and_a_killed_one_begins_again(is_finished, line, argv, baseline,
                                                                    tmp_path, run_script, capsys):
    run = tmp_path / "run"
    shutil.copytree(baseline, run)
    shutil.rmtree(run / "checkpoints/step_000000")
    shutil.rmtree(run / "model")
    if not is_finished:  # killed while it saved the weights of a better epoch
        (run / "warmup").rename(run / "warmup.best")
        (run / "warmup.best.tmp").mkdir()
    assert run_script("grpo_baseline", *argv, "--out", run, "--resume") == 0
    assert line in capsys.readouterr().out
    assert same_weights(run / "model", baseline / "model")
    assert [path.name for path in run.glob("warmup*")] == ["warmup"]


def test_another_run_can_start_from_a_warm_up(argv, tmp_path, run_script):
    """Its run is the same from there on, because both split the problems with the seed."""
    argv = [*argv, "--warmup_frac", 0.33, "--steps", 2, "--out"]
    first = tmp_path / "first"
    second = tmp_path / "second"
    assert run_script("grpo_baseline", *argv, first) == 0
    assert run_script("grpo_baseline", *argv, second, "--warmup_from", first / "warmup") == 0
    assert_same_runs(first, second)
    assert not (second / "warmup").exists()


@pytest.mark.parametrize("other, reason", [
    ({"kind": "qwen2", "num_hidden_layers": 1, "layer_types": None}, "its weights do not fit this model"),
    ({"kind": "llama"}, "its weights do not fit this model"),
    (None, "no warm-up can be loaded from it"),
])
def test_a_warm_up_of_another_model_is_refused(other, reason, tmp_path, capsys):
    small_model(**(other or {})).save_pretrained(tmp_path)
    if other is None:
        (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stop:
        common.load_weights(small_model(), tmp_path)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


# ---- the split

def split(rows: list[dict], **flags) -> tuple[list[str], list[str], str]:
    """Return the ids of the problems that are taught, those of RL, and the line of the plan."""
    args = grpo_baseline.Args(warmup_frac=0.33, **{"max_new_tokens": 64, **flags})
    data = common.split_warmup(rows, [], small_tokenizer(), common.load_reward(None), args)
    return [p["id"] for p in data.warmup], [p["id"] for p in data.train], data.summary


def test_the_split_is_a_random_share_that_depends_on_the_seed():
    rows = [*ROWS, {"problem": "Without a solution.", "answer": "1", "id": "unsolved"}]
    warmup, train, summary = split(rows)
    assert len(warmup) == 8
    assert sorted(warmup + train) == sorted(row["id"] for row in rows)
    assert summary.startswith("17 problems for RL; a random 8 for the SFT warm-up, 8 of them are taught")
    assert split(rows)[0] == warmup
    assert split(rows, seed=1)[0] != warmup


def test_the_share_is_drawn_before_long_and_wrong_solutions_leave_it(capsys):
    """RL must not be left with just the problems whose solutions are too long."""
    rows = [solved(i) for i in range(24)]
    for row in rows[::4]:
        row["answer"] = "-1"
    share, train, summary = split(ROWS)
    taught, train_too, summary = split(rows, max_new_tokens=28)
    assert train_too == train
    fits = [row["id"] for row in rows if len(row["solution"]) + 1 <= 28]  # a byte is a token
    right = [row["id"] for row in rows if row["answer"] != "-1"]
    assert taught == [i for i in share if i in fits and i in right]
    assert 0 < len(taught) < len(share)
    assert f"dropped {8 - len(taught)} of 8 problems: the warm-up does not teach" in capsys.readouterr().out


def test_three_scripts_train_on_the_same_other_problems(argv, tmp_path, run_script):
    own = {"tgpo": ["--guidance", "none"]}
    flags = "--warmup_frac 0.33 --steps 4 --warmup_epochs 1".split()
    trained = {}
    for script in ("grpo_baseline", "sgpo", "tgpo"):
        run = tmp_path / script
        assert run_script(script, *argv, *flags, *own.get(script, []), "--out", run) == 0
        trained[script] = {sample["id"] for sample in read_jsonl(run / "samples.jsonl")}
        assert trained[script] == trained["grpo_baseline"]
        assert same_weights(run / "warmup", tmp_path / "grpo_baseline/warmup")
    assert len(trained["sgpo"]) == 16
