"""The SFT warm-up: its loss and steps against a plain loop, what is kept, who shares it, and that its rows do not come back."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import common
import grpo_baseline
from conftest import ROOT, read_jsonl, small_model, small_tokenizer, write_rows

ROWS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"Twice {i}{'!' * (i % 7)} is \\boxed{{{2 * i}}}.", "id": str(i)} for i in range(30)]


def args_of(**flags) -> grpo_baseline.Args:
    return grpo_baseline.Args(**{"system_prompt": "Think.", "max_new_tokens": 64, "warmup_lr": 1e-3, "warmup_batch_size": 5, "warmup_epochs": 3, **flags})


class FakeRun:
    def __init__(self, folder):
        self.dir = folder
        folder.mkdir(parents=True)

    def checkpoints(self):
        return []


def plain_loop(rows, args):
    """SFT as anybody would write it: a row at a time, the library's own loss, float64 -> weights and losses after each epoch."""
    model, tokenizer = small_model().double(), small_tokenizer()
    order = np.random.default_rng([args.seed, 2 ** 31 + 2]).permutation(len(rows))
    held_out, train = order[:max(1, round(len(rows) / 10))], order[max(1, round(len(rows) / 10)):]
    per_epoch = -(-len(train) // args.warmup_batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.warmup_lr, weight_decay=args.weight_decay)
    rise = round(0.1 * per_epoch * args.warmup_epochs)

    def nll(i):
        prompt = common.build_prompt(tokenizer, rows[i]["problem"], args.system_prompt)
        response = tokenizer(rows[i]["solution"]).input_ids + [tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
        return cross_entropy(logits, torch.tensor(response), reduction="sum"), len(response)

    def mean_of(chosen):
        sums, counts = zip(*[nll(i) for i in chosen])
        return sum(sums) / sum(counts)

    values, states, trained, step = [mean_of(held_out).item()], [], [], 0
    for epoch in range(1, args.warmup_epochs + 1):
        shuffled = train[np.random.default_rng([args.seed, 2 ** 31 + 2, epoch]).permutation(len(train))]
        trained.append(0.0)
        for batch in np.array_split(shuffled, per_epoch):
            share = step / max(rise, 1) if step < rise else 0.5 * (1 + np.cos(np.pi * (step - rise) / (per_epoch * args.warmup_epochs - rise)))
            optimizer.param_groups[0]["lr"] = args.warmup_lr * share
            loss = mean_of(batch)
            trained[-1] += loss.item() / per_epoch
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        values.append(mean_of(held_out).item())
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    return states, values, trained


@pytest.mark.parametrize("budget", [150, 10 ** 6])
def test_losses_and_weights_are_a_plain_loops(budget, tmp_path):
    args = args_of(microbatch_tokens=budget)
    model = small_model().double()
    model.fingerprint = ""
    common.sft_warmup(model, small_tokenizer(), ROWS, FakeRun(tmp_path / "run"), args)
    states, values, trained = plain_loop(ROWS, args)
    kept = json.loads((tmp_path / "run" / "warmup" / "warmup.json").read_text())
    assert [x["validation"] for x in kept["losses"]] == pytest.approx(values, abs=1e-6) and values[-1] < values[0] - 0.1
    assert [x["train"] for x in kept["losses"][1:]] == pytest.approx(trained, abs=1e-6)
    best = int(np.argmin(values[1:]))
    assert kept["kept"] == best + 1
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), states[best][name], atol=1e-5, rtol=1e-5)


def test_the_best_epoch_is_kept_and_not_the_last(tmp_path):
    """Noise can be learnt by heart and not be predicted."""
    args = args_of(warmup_lr=0.02, warmup_epochs=6, weight_decay=0.0)
    rows = [{**row, "solution": bytes(np.random.default_rng(i).integers(97, 123, 20).tolist()).decode()} for i, row in enumerate(ROWS[:12])]
    model = small_model()
    model.fingerprint = ""
    common.sft_warmup(model, small_tokenizer(), rows, FakeRun(tmp_path / "run"), args)
    kept = json.loads((tmp_path / "run" / "warmup" / "warmup.json").read_text())
    validation = [x["validation"] for x in kept["losses"]][1:]
    assert kept["kept"] == int(np.argmin(validation)) + 1 < 6
    saved = load_file(tmp_path / "run" / "warmup" / "model.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items() if k in saved)
    held_out = np.random.default_rng([0, 2 ** 31 + 2]).permutation(12)[:1]
    prompt, response = common.build_prompt(small_tokenizer(), rows[held_out[0]]["problem"], "Think."), common.solution_ids(small_tokenizer(), rows[held_out[0]])
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
    assert cross_entropy(logits, torch.tensor(response)).item() == pytest.approx(min(validation), abs=1e-5)


@pytest.mark.parametrize("change", [None, "rows", "seed", "weights", "warmup_lr"])
def test_a_warm_up_is_lent_only_to_its_equal(change, tmp_path, capsys):
    def run(name, rows=ROWS[:8], weights=0, **flags):
        model = small_model(seed=weights)
        model.fingerprint = str(weights)
        common.sft_warmup(model, small_tokenizer(), rows, FakeRun(tmp_path / name), args_of(warmup_epochs=1, **flags))
        return "which had the same one" in capsys.readouterr().out

    assert not run("first")
    assert run("second", **{None: {}, "rows": {"rows": ROWS[1:9]}, "seed": {"seed": 1}, "weights": {"weights": 1}, "warmup_lr": {"warmup_lr": 2e-3}}[change]) == (change is None)


def test_the_split(capsys):
    tokenizer = small_tokenizer()
    rows = ROWS + [{"problem": "No solution here", "answer": "1", "id": "x"}]
    taken, rest = common.warmup_split(rows, tokenizer, None, args_of(warmup_frac=0.33))
    assert len(taken) == 10 and len(rest) == 21 and not {r["id"] for r in taken} & {r["id"] for r in rest}
    assert taken != common.warmup_split(rows, tokenizer, None, args_of(warmup_frac=0.33, seed=1))[0]
    assert common.warmup_split(rows, tokenizer, None, args_of(warmup_frac=0.0)) == ([], rows) and capsys.readouterr().out == ""
    taken, rest = common.warmup_split(rows, tokenizer, None, args_of(warmup_frac=0.9, max_new_tokens=len(tokenizer(ROWS[1]["solution"]).input_ids) + 1))
    assert {len(r["solution"]) for r in taken} <= {len(r["solution"]) for r in (ROWS[0], ROWS[1], ROWS[7])} and 2 <= len(taken) < 27
    assert f"warm-up: {len(taken)} problems where 27 were wanted" in capsys.readouterr().out
    assert common.warmup_split(rows[:1] + rows[-1:], tokenizer, None, args_of(warmup_frac=1.0)) == ([], rows[:1] + rows[-1:])  # one row cannot validate itself
    assert "0 problems where 1 were wanted; solutions left out: none, but it takes two" in capsys.readouterr().out


def test_what_is_taught_is_right_and_no_problem_is_in_both(capsys):
    rows = [{**row, "answer": "-1"} if i % 3 == 0 else row for i, row in enumerate(ROWS)]
    rows += [{**row, "id": f"again {row['id']}"} for row in ROWS]  # the same problems once more
    taken, rest = common.warmup_split(rows, small_tokenizer(), None, args_of(warmup_frac=0.5))
    assert len(taken) == 30 and len(rest) > 10 and all(row["answer"] != "-1" for row in taken) and not {r["problem"] for r in taken} & {r["problem"] for r in rest}
    assert not any(common.grader_counts().values())
    again = lambda text, row: row["id"].startswith("again")
    assert all(row["id"].startswith("again") for row in common.warmup_split(rows, small_tokenizer(), again, args_of(warmup_frac=0.3))[0])
    assert len(common.warmup_split(rows, small_tokenizer(), again, args_of(warmup_frac=0.9, steps=0))[0]) == 30
    assert "30 problems where 54 were wanted; solutions left out: 30 wrong to the reward" in capsys.readouterr().out


@pytest.fixture
def solved(tmp_path, model_dirs):
    (tmp_path / "reward.py").write_text("def even(response, row):\n    return float(len(response) % 2 == 0 or response == row.get('solution'))\n")
    data = write_rows(tmp_path / "solved.jsonl", [{**row, "strategy": f"Type: sum. Strategy: double. Steps: double {row['id']}."} for row in ROWS])
    return ["--model", model_dirs["qwen2"], "--dataset", data, "--reward", f"{tmp_path}/reward.py:even", "--prompts_per_step", 2, "--group_size", 2, "--lr", 1e-3,
            "--max_new_tokens", 40, "--warmup_lr", 1e-3, "--warmup_batch_size", 4, "--warmup_epochs", 3]


def test_three_scripts_start_from_the_same_warm_up_and_train_on_other_rows(solved, model_dirs, tmp_path, run_script, capsys):
    for script, more in (("sgpo", []), ("grpo_baseline", []), ("tgpo", ["--warmup_frac", 0.33, "--guidance", "none"])):
        assert run_script(script, *solved, *more, "--steps", 2, "--out", tmp_path / "runs" / script) == 0
        assert ("warm-up: the weights of" in capsys.readouterr().out) == (script != "sgpo")
    assert not any((tmp_path / "runs" / script / "warmup").exists() for script in ("grpo_baseline", "tgpo"))
    tokenizer = small_tokenizer()
    taken, rest = common.warmup_split(common.load_rows(str(tmp_path / "solved.jsonl")), tokenizer, None, args_of(warmup_frac=0.33, max_new_tokens=40))
    for script in ("sgpo", "grpo_baseline", "tgpo"):
        assert {s["id"] for s in read_jsonl(tmp_path / "runs" / script / "samples.jsonl")} <= {r["id"] for r in rest}
    assert run_script("grpo_baseline", *solved, "--steps", 0, "--seed", 1, "--out", tmp_path / "runs" / "other") == 0  # another seed, other rows
    assert (tmp_path / "runs" / "other" / "warmup").exists()


def test_no_steps_is_the_sft_baseline(solved, model_dirs, tmp_path, run_script):
    assert run_script("grpo_baseline", *solved, "--steps", 0, "--warmup_frac", 1, "--out", tmp_path / "sft") == 0
    start, warm, final = (load_file(folder / "model.safetensors") for folder in (model_dirs["qwen2"], tmp_path / "sft" / "warmup", tmp_path / "sft" / "model"))
    assert all(torch.equal(warm[k], final[k]) for k in warm) and not all(torch.equal(warm[k], start[k]) for k in warm)


def test_a_stopped_warm_up_goes_on_to_the_same_weights(solved, tmp_path, run_script):
    flags = ["--steps", 1, "--warmup_epochs", 30]
    assert run_script("grpo_baseline", *solved, *flags, "--out", tmp_path / "a" / "whole") == 0
    argv = [sys.executable, str(ROOT / "grpo_baseline.py"), *map(str, solved), *map(str, flags), "--out", str(tmp_path / "b" / "broken")]
    state = tmp_path / "b" / "broken" / "warmup.state"
    for kind in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.002)
        process.send_signal(kind)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == (-9 if kind == signal.SIGKILL else 130), said
        argv += ["--resume"] if "--resume" not in argv else []
    assert "of the warm-up; go on with --resume" in said and "Traceback" not in said
    assert subprocess.run(argv, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    a, b = (load_file(tmp_path / run / "warmup" / "model.safetensors") for run in ("a/whole", "b/broken"))
    assert all(torch.equal(a[k], b[k]) for k in a) and not state.exists() and not (tmp_path / "b" / "broken" / "warmup.best").exists()
    assert json.loads((tmp_path / "a/whole/warmup/warmup.json").read_text()) == json.loads((tmp_path / "b/broken/warmup/warmup.json").read_text())


@pytest.mark.parametrize("flags, said", [(["--warmup_frac", 1.5], "--warmup_frac is 1.5"), (["--warmup_frac", -1], "--warmup_frac"), (["--warmup_frac", 1], "leaves no problem for RL"),
                                         (["--warmup_epochs", 0], "--warmup_epochs"), (["--warmup_batch_size", 0], "--warmup_batch_size"), (["--max_rows", -1], "--max_rows")])
def test_refusals(flags, said, solved, tmp_path, run_script, capsys):
    assert run_script("grpo_baseline", *solved, "--out", tmp_path / "run", *flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and not (tmp_path / "run").exists()
