"""The forks in tests/forks: each applies to the baseline as it is, trains, and computes what its paper says.

The references are written from the papers, in float64, a row at a time. They see a whole step: main() runs
with forced completions, so groups, gates and added rows are compared as well as losses.
"""
import importlib
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.functional import log_softmax

import common
from conftest import ROOT, read_jsonl, small_model, small_tokenizer, write_rows
from test_ranks import in_processes

METRIC = {"gspo": "gspo/ratio_moved", "luffy": "luffy/solution_prob", "hpt": "hpt/sft_frac"}
EACH = pytest.mark.parametrize("name", METRIC)
TOOLS = [tool for tool in ("git", "patch") if shutil.which(tool)]
pytestmark = pytest.mark.skipif(not TOOLS, reason="needs git or patch")
MAX, TOKENIZER = 6, small_tokenizer()
# Problems, the samples written to each, its solution. A "+" earns the reward; MAX tokens cut three texts off.
WRITTEN = {"one is right": (["ab", "cdefghi", "fg+h"], "so +"), "none": (["qq", "rst", "u"], "ok+"),
           "two are": (["v+", "w+xyzuv", "yy"], "its plus is cut off: +"), "all": (["i+", "jk+", "+l"], "m+")}
SEED = 2  # takes the problems in this order:
ORDER = [row["problem"] for row in common.batch_of_step([{"problem": p} for p in WRITTEN], 1, 4, SEED)]


def applied(name: str, folder: Path, tool: str) -> Path:
    """The baseline with a diff in it, as folder/name.py."""
    file, diff = folder / "grpo_baseline.py", str(ROOT / "tests" / "forks" / f"{name}.diff")
    shutil.copy(ROOT / "grpo_baseline.py", file)
    command = ["git", "apply", diff] if tool == "git" else ["patch", "-s", "-p1", "-F0", "-i", diff]
    nowhere = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # a repository above is not meant
    subprocess.run(command, cwd=folder, env=nowhere, check=True)
    return file.rename(folder / f"{name}.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All forks, rows and rewards."""
    path = tmp_path_factory.mktemp("forks")
    for name in METRIC:
        applied(name, path, TOOLS[0])
    (path / "reward.py").write_text("def plus(response, row): return float('+' in response)\n"
                                    "def even(response, row): return float(len(response) % 2 == 0)\n")
    write_rows(path / "rows.jsonl", [{"problem": problem, "answer": "1", "solution": solution}
                                     for problem, (_, solution) in WRITTEN.items()])
    return path


def argv_of(folder: Path, model: Path, **flags) -> list[str]:
    flags = {"model": model, "dataset": folder / "rows.jsonl", "reward": f"{folder / 'reward.py'}:plus",
             "prompts_per_step": 4, "group_size": 3, "max_new_tokens": MAX, "system_prompt": "", "lr": 0.01,
             "warmup_frac": 0, "microbatch_tokens": 60, "max_grad_norm": 1e9, "seed": SEED, **flags}
    return [f"--{flag}={value}" for flag, value in flags.items()]


# ---- the diffs

@EACH
def test_a_fork_is_small_says_why_and_applies(name, folder, tmp_path):
    text = (ROOT / "tests" / "forks" / f"{name}.diff").read_text()
    header, body = text.split("--- a/grpo_baseline.py\n")
    changed = [line for line in body.splitlines()[1:] if line[0] in "+-"]
    assert len(changed) <= 80 and max(map(len, changed)) <= 1 + 110
    assert "(arXiv " in header and max(map(len, header.splitlines())) <= 110
    for tool in TOOLS:
        assert applied(name, tmp_path, tool).read_text() == (folder / f"{name}.py").read_text()


@EACH
def test_a_fork_trains(name, folder, model_dirs, tmp_path, run_script, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    argv = argv_of(folder, model_dirs["qwen2"], reward=f"{folder / 'reward.py'}:even", steps=3)
    assert run_script(name, *argv, "--out", tmp_path / "run") == 0
    steps = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-3:]
    assert [metrics["step"] for metrics in steps] == [1, 2, 3]
    for metrics in steps:
        assert all(map(math.isfinite, metrics.values())) and METRIC[name] in metrics
        assert metrics["updates"] > 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("name", ["luffy", "hpt"])
def test_a_row_without_a_solution_is_refused(name, folder, model_dirs, tmp_path, run_script, monkeypatch,
                                             capsys):
    monkeypatch.syspath_prepend(folder)
    rows = write_rows(tmp_path / "rows.jsonl", [{"problem": "p", "answer": "1", "id": "seven"}])
    assert run_script(name, "--model", model_dirs["qwen2"], "--dataset", rows, "--out", tmp_path / "run") == 2
    assert "1 rows have no solution" in (said := capsys.readouterr().err) and "id seven" in said
    assert not (tmp_path / "run").exists()


# ---- what they compute

def encoded(text: str) -> list[int]:
    return (TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id])[:MAX]


def prompt_of(problem: str) -> list[int]:
    return common.build_prompt(TOKENIZER, problem, "")


def forced(model, tokenizer, prompts, *_):
    """The samples of WRITTEN, in their order."""
    problems, seen, rows = {tuple(prompt_of(problem)): problem for problem in WRITTEN}, Counter(), []
    for problem in (problems[tuple(prompt)] for prompt in prompts):
        ids = encoded(WRITTEN[problem][0][seen[problem]])
        seen[problem] += 1
        rows.append(ids + [TOKENIZER.pad_token_id] * (MAX - len(ids)))
    return torch.tensor(rows)


def step_of(name: str, folder: Path, argv: list[str], out: Path) -> tuple[list, dict]:
    """One step of a fork's main(), in float64 -> (weights before, gradient) of each update, metrics."""
    sys.path.insert(0, str(folder))
    fork, model, updates = importlib.import_module(name), small_model().double(), []
    model = common.shard(model, bf16=False) if common.dist.is_initialized() else model

    def flat(tensors) -> torch.Tensor:
        whole = (x.full_tensor() if hasattr(x, "full_tensor") else x for x in tensors)
        return torch.cat([x.detach().flatten() for x in whole])

    def keep(model, *rest):
        updates.append((flat(model.parameters()), flat(p.grad for p in model.parameters())))
        return common.optimizer_step(model, *rest)

    argv = [f"{name}.py", *argv, "--steps=1", f"--out={out}"]
    with mock.patch.object(common, "generate", forced), mock.patch.object(sys, "argv", argv), \
            mock.patch.multiple(fork, load_policy=lambda args: model, optimizer_step=keep):
        fork.main()
    return updates, read_jsonl(out / "metrics.jsonl")[-1]


def graded(problem: str) -> tuple[list, list[int], list[float], float]:
    """Samples, solution, their rewards."""
    samples, solution = [encoded(text) for text in WRITTEN[problem][0]], encoded(WRITTEN[problem][1])
    *rewards, of_solution = [float("+" in TOKENIZER.decode(ids)) for ids in (*samples, solution)]
    return samples, solution, rewards, of_solution


# Each reference gives a loss and the numbers whose mean is the fork's metric.

def gspo(problems, logps, log_rho, clip_low=3e-4, clip_high=4e-4, **_):
    loss, moved = 0.0, []
    for problem in problems:
        samples, _, R, _ = graded(problem)
        mean, std = sum(R) / 3, torch.tensor(R).double().std()
        for ids, r in zip(samples, R):
            A, s = (r - mean) / (std + 1e-6), (log_rho(problem, ids).sum() / len(ids)).exp()  # Eq. 6, 7
            loss = loss - torch.min(s * A, s.clamp(1 - clip_low, 1 + clip_high) * A)  # Eq. 5
            moved += [abs(s.item() - 1)] * len(ids) * (A != 0)
    return loss / (3 * len(problems)), moved


def luffy(problems, logps, log_rho, shaping=0.1, **_):
    loss, shown = 0.0, []
    for problem in problems:
        samples, solution, R, of_solution = graded(problem)
        mean = (sum(R) + of_solution) / 4  # Eq. 2
        for ids, r in zip(samples, R):
            loss = loss - (r - mean) * log_rho(problem, ids).exp().sum()
        p = logps(problem, solution).exp()
        loss = loss - (of_solution - mean) * (p / (p + shaping)).sum()  # Eq. 5
        shown += p.tolist() * (of_solution != mean)
    return loss / (4 * len(problems) * MAX), shown


def hpt(problems, logps, log_rho, gate=0, sft_weight=1.0, **_):
    rl, sft, taught, by_sft = 0.0, 0.0, 0, []
    for problem in problems:
        samples, solution, R, _ = graded(problem)
        by_sft.append(sum(R) <= gate)  # Eq. 8, 10
        if by_sft[-1]:
            sft, taught = sft - logps(problem, solution).sum(), taught + len(solution)  # Eq. 12
            continue
        for ids, r in zip(samples, R):
            rl = rl - (r - sum(R) / 3) * log_rho(problem, ids).exp().sum()  # Eq. 11
    return rl / (3 * len(problems) * MAX) + sft_weight * sft / max(taught, 1), by_sft  # Eq. 13


TWO = {"updates_per_rollout": 2}  # the second is off-policy
NEAR = {**TWO, "lr": 5e-4}  # ratios within 0.9 and 1.04, on both sides of both clips
CASES = [(gspo, {}), (gspo, NEAR), (gspo, {**NEAR, "clip_low": 0.05, "clip_high": 0.05}),
         (luffy, {}), (luffy, {**TWO, "shaping": 0.5}), (hpt, {}), (hpt, {"gate": 2}), (hpt, {"gate": -1}),
         (hpt, {**TWO, "gate": 1, "sft_weight": 0.3})]


@pytest.mark.parametrize("reference, flags", CASES)
def test_loss_and_gradient_are_the_papers(reference, flags, folder, model_dirs, tmp_path):
    flags = {"updates_per_rollout": 1, **flags}
    argv = argv_of(folder, model_dirs["qwen2"], **flags)
    updates, metrics = step_of(reference.__name__, folder, argv, tmp_path / "run")
    n, old, model, losses, shown = len(updates), small_model().double(), small_model().double(), [], []
    assert n == metrics["updates"] == flags["updates_per_rollout"]

    def logps(problem: str, ids: list[int], of=model):
        prompt = prompt_of(problem)
        logits = of(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
        return log_softmax(logits, -1)[range(len(ids)), ids]

    def log_rho(problem: str, ids: list[int]):
        return logps(problem, ids) - logps(problem, ids, old).detach()

    for k, (weights, gradient) in enumerate(updates):
        torch.nn.utils.vector_to_parameters(weights, model.parameters())
        loss, numbers = reference(ORDER[k * 4 // n:(k + 1) * 4 // n], logps, log_rho, **flags)
        losses, shown = [*losses, loss.item()], [*shown, *numbers]
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert (gradient - exact).norm() < 1e-6 * exact.norm() and exact.abs().max() > 1e-3
    assert metrics["loss"] == pytest.approx(sum(losses) / n, abs=1e-6)
    assert metrics[METRIC[reference.__name__]] == pytest.approx(sum(shown) / len(shown), abs=1e-6)


@pytest.mark.parametrize("name, flags", [("gspo", TWO), ("luffy", {}), ("hpt", {"gate": 1})])
def test_two_processes_compute_the_same(name, flags, folder, model_dirs, tmp_path):
    argv = argv_of(folder, model_dirs["qwen2"], **flags)
    alone, metrics = step_of(name, folder, argv, tmp_path / "one")
    for updates, theirs in in_processes(2, step_of, name, folder, argv, tmp_path / "two"):
        for (_, ours), (_, gradient) in zip(alone, updates, strict=True):
            assert (gradient - ours).norm() < 1e-6 * ours.norm()
        assert all(theirs[key] == pytest.approx(metrics[key], abs=1e-5) for key in ("loss", METRIC[name]))
