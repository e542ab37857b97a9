"""SFT warm-up: a plain loop's losses and weights, the best are kept, who shares them, which rows it takes."""
import json
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import common
import grpo_baseline
from conftest import Child, read_jsonl, small_model, small_tokenizer, write_rows

ROWS = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "id": str(i), "strategy": f"Double {i}.",
         "solution": f"Twice {i}{'!' * (i % 7)} is \\boxed{{{2 * i}}}."} for i in range(30)]
NOISE = [{**row, "solution": bytes(np.random.default_rng(i).integers(97, 123, 20).tolist()).decode()}
         for i, row in enumerate(ROWS[:12])]  # it can be learnt by heart and not be predicted


def args_of(**flags) -> grpo_baseline.Args:
    return grpo_baseline.Args(**{"system_prompt": "Think.", "max_new_tokens": 64, "warmup_lr": 1e-3,
                                 "warmup_batch_size": 5, "warmup_epochs": 3, **flags})


def warm_up(folder, model, rows, args):
    folder.mkdir(parents=True)
    model.fingerprint = repr(model.lm_head.weight[0].tolist())
    common.sft_warmup(model, small_tokenizer(), rows, SimpleNamespace(dir=folder, checkpoints=list), args)
    return model.state_dict()


def plain_loop(rows, args):
    """SFT as anybody would write it, a row at a time in float64 -> losses and weights after each epoch."""
    model, tokenizer, step = small_model().double(), small_tokenizer(), 0
    order = common.generator(args.seed, "warm-up").permutation(len(rows))
    held_out, train = order[:len(rows) // 10], order[len(rows) // 10:]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    steps = args.warmup_epochs * (per_epoch := int(np.ceil(len(train) / args.warmup_batch_size)))
    rise = round(0.1 * steps)

    def mean_loss(chosen):
        losses = []
        for row in (rows[i] for i in chosen):
            prompt = common.build_prompt(tokenizer, row["problem"], args.system_prompt)
            response = tokenizer(row["solution"]).input_ids + [tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
            losses.append(cross_entropy(logits, torch.tensor(response), reduction="none"))
        return torch.cat(losses).mean()

    yield {"epoch": 0, "validation": mean_loss(held_out).item()}, None
    for epoch in range(1, args.warmup_epochs + 1):
        order, seen = common.generator(args.seed, "warm-up", epoch).permutation(len(train)), 0.0
        for batch in np.array_split(train[order], per_epoch):
            fall = 0.5 * (1 + np.cos(np.pi * (step - rise) / (steps - rise)))
            optimizer.param_groups[0]["lr"] = args.warmup_lr * (step / rise if step < rise else fall)
            loss = mean_loss(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seen, step = seen + loss.item() / per_epoch, step + 1
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        yield {"epoch": epoch, "train": seen, "validation": mean_loss(held_out).item()}, weights


@pytest.mark.parametrize("rows, kept, flags", [
    (ROWS, 3, {"microbatch_tokens": 150}), (ROWS, 3, {"weight_decay": 0.5, "max_grad_norm": 0.1}),
    (NOISE, 3, {"warmup_lr": 0.02, "warmup_epochs": 6})])  # not the last
def test_losses_and_weights_are_a_plain_loops_and_the_best_are_kept(rows, kept, flags, tmp_path):
    args = args_of(**flags)
    weights = warm_up(tmp_path / "run", small_model().double(), rows, args)
    losses, states = zip(*plain_loop(rows, args))
    about = json.loads((tmp_path / "run" / "warmup" / "warmup.json").read_text())
    assert about["losses"] == [pytest.approx(x, abs=2e-6) for x in losses]
    assert about["kept"] == kept == 1 + int(np.argmin([x["validation"] for x in losses[1:]]))
    for found in (weights, load_file(tmp_path / "run" / "warmup" / "model.safetensors")):
        for name in found:
            torch.testing.assert_close(found[name].double(), states[kept][name], atol=2e-6, rtol=0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["warmup"]


def test_a_warm_up_is_lent_only_to_its_equal(tmp_path, capsys):
    def lent(name, rows=ROWS[:8], weights=0, **flags) -> bool:
        now = warm_up(tmp_path / name, small_model(seed=weights), rows, args_of(warmup_epochs=1, **flags))
        first = load_file(tmp_path / "first" / "warmup" / "model.safetensors")
        said = "which had the same one" in capsys.readouterr().out
        return said and all(torch.equal(now[key], weight) for key, weight in first.items())

    assert not lent("first") and lent("equal")
    others = ({"rows": ROWS[1:9]}, {"weights": 1}, {"seed": 1}, {"warmup_lr": 2e-3}, {"warmup_batch_size": 4},
              {"weight_decay": 0.5}, {"max_grad_norm": 0.1}, {"system_prompt": "Go."})
    assert not any(lent(f"other {k}", **other) for k, other in enumerate(others))


def test_the_split(capsys):
    def split(rows, reward=common.load_reward(None), **flags):
        taken, rest = common.warmup_split(rows, small_tokenizer(), reward, args_of(**flags))
        assert not {row["problem"] for row in taken} & {row["problem"] for row in rest}
        assert not any(common.grader_counts().values())  # they belong to no step
        return [row["id"] for row in taken], [row["id"] for row in rest], capsys.readouterr().out

    rows = [*ROWS, {"problem": "No solution here", "answer": "1", "id": "x"}]
    taken, rest, said = split(rows, warmup_frac=0.33)
    assert len(taken) == 10 and sorted(taken + rest) == sorted(row["id"] for row in rows) and said == ""
    assert taken == split(rows, warmup_frac=0.33)[0] != split(rows, warmup_frac=0.33, seed=1)[0]
    assert len(split(ROWS, warmup_frac=1.0, steps=0)[0]) == 30 and split(rows, warmup_frac=0.0)[0] == []
    room = len(ROWS[8]["solution"]) + 1  # a byte is a token, and the end token is one
    short = sorted(row["id"] for row in ROWS if len(row["solution"]) < room)
    taken, _, said = split(rows, warmup_frac=0.9, max_new_tokens=room)
    assert sorted(taken) == short and f"{len(short)} problems where 27 were wanted; solutions left" in said
    taken, rest, said = split(ROWS[:1], warmup_frac=1.0)  # one row cannot validate itself
    assert not taken and rest == ["0"] and "0 problems where 1 were wanted; solutions left out: none" in said
    twice = [{**row, "answer": "-1"} for row in ROWS] + [{**row, "id": f"right {row['id']}"} for row in ROWS]
    taken, rest, _ = split(twice, warmup_frac=0.3)
    assert len(taken) == 18 and all("right" in name for name in taken) and len(rest) == 24
    wrong = lambda texts, rows: torch.tensor([float(row["answer"] == "-1") for row in rows])
    taken, _, said = split(twice, wrong, warmup_frac=0.9, steps=0)
    assert len(taken) == 30 and "30 problems where 54 were wanted; solutions left out: 30 wrong" in said


@pytest.fixture
def flags(tmp_path, model_dirs):
    return ["--model", model_dirs["qwen2"], "--dataset", write_rows(tmp_path / "solved.jsonl", ROWS),
            "--prompts_per_step", 2, "--group_size", 2, "--max_new_tokens", 40, "--warmup_lr", 1e-3,
            "--warmup_batch_size", 9, "--warmup_epochs", 3]


def test_three_scripts_start_from_one_warm_up_and_train_on_other_rows(flags, tmp_path, run_script, capsys):
    args, reward = args_of(warmup_frac=0.33, max_new_tokens=40), common.load_reward(None)
    taught = {row["id"] for row in common.warmup_split(ROWS, small_tokenizer(), reward, args)[0]}
    for script in ("sgpo", "grpo_baseline", "tgpo"):
        out, more = tmp_path / "runs" / script, ["--guidance", "none"] * (script == "tgpo")
        assert run_script(script, *flags, *more, "--warmup_frac", 0.33, "--steps", 6, "--out", out) == 0
        assert ("warm-up: the weights of" in capsys.readouterr().out) == (script != "sgpo")
        assert (out / "warmup").exists() == (script == "sgpo")
        trained = {sample["id"] for sample in read_jsonl(out / "samples.jsonl")}
        assert len(trained) == 12 and not trained & taught


def baseline(*argv) -> int:
    sys.argv = ["grpo_baseline.py", *map(str, argv)]
    grpo_baseline.main()
    return 0


def test_the_sft_baseline_killed_and_stopped_goes_on_to_the_same_weights(flags, model_dirs, tmp_path):
    flags += ["--steps", 0, "--warmup_frac", 1, "--warmup_epochs", 12, "--out"]
    whole, broken, said = tmp_path / "a" / "whole", tmp_path / "b" / "broken", tmp_path / "said"
    assert Child(baseline, *flags, whole).ended() == 0
    state, seen, now = broken / "warmup.state", 0, 0
    for more, stop, code in (([], "kill", -9), (["--resume"], "terminate", 130)):
        run = Child(baseline, *flags, broken, *more, said=said)
        while run.process.is_alive() and now == seen:
            with suppress(FileNotFoundError):
                now = state.stat().st_mtime_ns
            time.sleep(0.002)
        seen = now
        getattr(run.process, stop)()
        assert run.ended() == code
    assert "of the warm-up; go on with --resume" in said.read_text()
    assert Child(baseline, *flags, broken, "--resume").ended() == 0
    assert {path.name for path in whole.iterdir()} == {path.name for path in broken.iterdir()}
    for file in ("warmup/model.safetensors", "warmup/warmup.json", "model/model.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    start, warm, final = (load_file(folder / "model.safetensors")["model.norm.weight"] for folder in (
        model_dirs["qwen2"], whole / "warmup", whole / "model"))
    assert torch.equal(warm, final) and not torch.equal(warm, start)  # no steps: the warm-up is all
