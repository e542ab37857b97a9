"""The forks in tests/forks: each applies to the baseline as it is, trains, and computes what its paper says.

The references are written from the papers, in float64, a completion at a time. They see a whole step of
main() with known completions, so groups, gates and added solutions are compared as well as losses.
"""
import copy
import importlib
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import common
import reference
from conftest import ROOT, read_jsonl, run_main, small_model, small_tokenizer, write_jsonl

METRICS = {"gspo": "gspo/ratio_moved", "cispo": "cispo/saved_frac", "luffy": "luffy/solution_prob",
           "hpt": "hpt/sft_frac"}
TOKENIZER = small_tokenizer()
LONGEST = 6
# Problems, three samples of each, its solution. A "+" is correct; LONGEST tokens cut three texts off.
WRITTEN = {
    "one is right": (["ab", "cdefghi", "fg+h"], "so +"),
    "none": (["qq", "rst", "u"], "ok+"),
    "two are": (["v+", "w+xyzuv", "yy"], "its plus is cut off: +"),
    "all": (["i+", "jk+", "+l"], "m+"),
}
SEED = 5  # takes the problems in this order:
ORDER = [row["problem"] for row in common.problems_of_step([{"problem": p} for p in WRITTEN], 1, 4, SEED)]

pytestmark = pytest.mark.skipif(shutil.which("patch") is None, reason="needs patch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with the patched scripts, their problems and a reward."""
    path = tmp_path_factory.mktemp("forks")
    for name in METRICS:
        diff = ROOT / "tests" / "forks" / f"{name}.diff"
        command = ["patch", "-s", "-F0", "-o", path / f"{name}.py", ROOT / "grpo_baseline.py", diff]
        subprocess.run(command, check=True)
    (path / "reward.py").write_text("def plus(response, row):\n    return float('+' in response)\n\n"
                                    "def even(response, row):\n    return float(len(response) % 2 == 0)\n")
    write_jsonl(path / "rows.jsonl", [{"problem": problem, "answer": "1", "solution": solution}
                                      for problem, (_, solution) in WRITTEN.items()])
    return path


@pytest.fixture
def run_fork(folder, model_dirs, tmp_path, monkeypatch):
    """Return a function that runs a fork and returns its metrics."""
    monkeypatch.syspath_prepend(folder)

    def run(name: str, **flags) -> list[dict]:
        flags = {"model": model_dirs["qwen2"], "dataset": folder / "rows.jsonl", "out": tmp_path / "run",
                 "reward": f"{folder}/reward.py:plus", "prompts_per_step": 4, "group_size": 3, "lr": 0.01,
                 "max_new_tokens": LONGEST, "system_prompt": "", "warmup_frac": 0, "microbatch_tokens": 60,
                 "max_grad_norm": 1e9, "seed": SEED, "steps": 1, **flags}
        assert run_main(name, *[f"--{flag}={value}" for flag, value in flags.items()]) == 0
        return read_jsonl(tmp_path / "run" / "metrics.jsonl")

    return run


@pytest.mark.parametrize("name", METRICS)
def test_a_fork_is_small_and_says_what_it_is(name):
    text = (ROOT / "tests" / "forks" / f"{name}.diff").read_text()
    header, body = text.split("--- a/grpo_baseline.py\n")
    changed = [line for line in body.splitlines()[1:] if line[0] in "+-"]
    assert len(changed) <= 80
    assert "arXiv" in header.splitlines()[0]
    assert METRICS[name] in header
    assert max(map(len, text.splitlines())) <= 1 + 110


@pytest.mark.parametrize("name", METRICS)
def test_a_fork_trains(name, folder, run_fork):
    metrics = run_fork(name, steps=2, reward=f"{folder}/reward.py:even", group_size=4)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert METRICS[name] in row
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", ["luffy", "hpt"])
def test_a_problem_without_a_solution_is_refused(name, folder, model_dirs, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(folder)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "p", "answer": "1", "id": "seven"}])
    assert run_main(name, "--model", model_dirs["qwen2"], "--dataset", rows, "--out", tmp_path / "run") == 2
    assert "1 problems have no solution" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- references: the loss of an update, and the numbers whose mean is the fork's metric

def encoded(text: str) -> list[int]:
    return (TOKENIZER(text).input_ids + [TOKENIZER.eos_token_id])[:LONGEST]


def prompt_of(problem: str) -> list[int]:
    return common.build_prompt(TOKENIZER, problem, "")


def logps_of(model, problem: str, completion: list[int]) -> torch.Tensor:
    log_probs = reference.log_probs(model, prompt_of(problem), completion, 1.0)
    return log_probs[range(len(completion)), completion]                                  # [T]


def log_ratios(model, old_model, problem: str, completion: list[int]) -> torch.Tensor:
    return logps_of(model, problem, completion) - logps_of(old_model, problem, completion).detach()


def graded(problem: str) -> tuple[list[list[int]], list[float]]:
    """Return samples and solution of a problem, and their rewards."""
    samples, solution = WRITTEN[problem]
    completions = [encoded(text) for text in [*samples, solution]]
    return completions, [float("+" in TOKENIZER.decode(completion)) for completion in completions]


def samples_of(problems: list[str]):
    """Yield problem, completion and GRPO's advantage of every sample."""
    for problem in problems:
        completions, rewards = graded(problem)
        group = reference.Problem(prompt_of(problem), completions[:3], rewards[:3])
        A, = reference.advantages([group], "group")
        yield from zip([problem] * 3, completions, A)


def gspo(model, old_model, problems: list[str], clip_low=3e-4, clip_high=4e-4):
    loss, moved = 0.0, []
    for problem, completion, A in samples_of(problems):
        s = log_ratios(model, old_model, problem, completion).mean().exp()                # Eq. 7
        loss = loss - torch.minimum(s * A, s.clamp(1 - clip_low, 1 + clip_high) * A)      # Eq. 5
        moved += [abs(s.item() - 1)] * len(completion) if A else []
    return loss / (3 * len(problems)), moved


def cispo(model, old_model, problems: list[str], clip_low=math.inf, clip_high=4.0):
    loss, saved, num_tokens = 0.0, [], 0
    for problem, completion, A in samples_of(problems):
        rho = log_ratios(model, old_model, problem, completion).exp().detach()
        weight = rho.clamp(1 - clip_low, 1 + clip_high)                                   # Eq. 5
        loss = loss - (weight * A * logps_of(model, problem, completion)).sum()           # Eq. 4
        dropped_by_grpo = rho > 1.28 if A > 0 else rho < 0.8
        saved += dropped_by_grpo.tolist() if A else []
        num_tokens += len(completion)
    return loss / num_tokens, saved


def luffy(model, old_model, problems: list[str], shaping=0.1):
    loss, solution_probs = 0.0, []
    for problem in problems:
        (*samples, solution), rewards = graded(problem)
        mean = sum(rewards) / 4                                                           # Eq. 2
        for completion, reward in zip(samples, rewards):
            loss = loss - (reward - mean) * log_ratios(model, old_model, problem, completion).exp().sum()
        p = logps_of(model, problem, solution).exp()
        loss = loss - (rewards[3] - mean) * (p / (p + shaping)).sum()                     # Eq. 5
        solution_probs += p.tolist() if rewards[3] != mean else []
    return loss / (4 * len(problems) * LONGEST), solution_probs


def hpt(model, old_model, problems: list[str], gate=0, sft_weight=1.0):
    rl, sft, num_taught, by_sft = 0.0, 0.0, 0, []
    for problem in problems:
        (*samples, solution), rewards = graded(problem)
        by_sft.append(sum(rewards[:3]) <= gate)                                           # Eq. 8, 10
        if by_sft[-1]:
            sft = sft - logps_of(model, problem, solution).sum()                          # Eq. 12
            num_taught += len(solution)
            continue
        mean = sum(rewards[:3]) / 3
        for completion, reward in zip(samples, rewards):
            rl = rl - (reward - mean) * log_ratios(model, old_model, problem, completion).exp().sum()  # Eq. 11
    return rl / (3 * len(problems) * LONGEST) + sft_weight * sft / max(num_taught, 1), by_sft  # Eq. 13


NEAR = {"updates_per_rollout": 2, "lr": 5e-4}  # the second update's ratios are on both sides of the bounds
CASES = [
    (gspo, NEAR, {}),
    (gspo, NEAR, {"clip_low": 0.01, "clip_high": 0.005}),
    (cispo, {"updates_per_rollout": 2, "lr": 0.05}, {}),
    (cispo, {"updates_per_rollout": 2}, {"clip_low": 0.1, "clip_high": 0.05}),
    (luffy, {}, {}),
    (luffy, {"updates_per_rollout": 2}, {"shaping": 0.5}),
    (hpt, {}, {}),
    (hpt, {}, {"gate": 2}),
    (hpt, {}, {"gate": -1}),
    (hpt, {"updates_per_rollout": 2}, {"gate": 1, "sft_weight": 0.3}),
]


@pytest.mark.parametrize("method, how, constants", CASES)
def test_loss_gradient_and_metric_are_the_papers(method, how, constants, run_fork, monkeypatch):
    name = method.__name__
    fork = importlib.import_module(name)
    taken = Counter()
    updates = []

    def written(model, prompts, *_):
        """Return the samples of WRITTEN in their order."""
        problem_of = {tuple(prompt_of(problem)): problem for problem in WRITTEN}
        ids = torch.full((len(prompts), LONGEST), TOKENIZER.eos_token_id)
        for row, prompt in zip(ids, prompts):
            problem = problem_of[tuple(prompt)]
            completion = encoded(WRITTEN[problem][0][taken[problem]])
            taken[problem] += 1
            row[:len(completion)] = torch.tensor(completion)
        return ids

    def record(model, max_norm):
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        updates.append((copy.deepcopy(model).double(), gradient))
        return common.clip_gradient(model, max_norm)

    monkeypatch.setattr(fork, "generate_in_pieces", written)
    monkeypatch.setattr(fork, "clip_gradient", record)
    group_size = 4 if method is luffy else 3
    metrics, = run_fork(name, group_size=group_size, **how, **constants)
    assert len(updates) == how.get("updates_per_rollout", 1)
    old_model = small_model(tie_word_embeddings=True).double()
    losses, numbers = [], []
    for k, (model, gradient) in enumerate(updates):
        problems = ORDER[k * 4 // len(updates):(k + 1) * 4 // len(updates)]
        loss, more = method(model, old_model, problems, **constants)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert (gradient - exact).norm() < 1e-4 * exact.norm()
        losses.append(loss.item())
        numbers += more
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert metrics[METRICS[name]] == pytest.approx(sum(numbers) / len(numbers), abs=1e-5)
