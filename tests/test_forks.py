"""The forks in tests/forks: each applies to the baseline as it is, trains, and computes what its paper says.

The references are written from the papers, in float64, a completion at a time. They see a whole step of
main() with known completions, so groups, gates and added solutions are compared as well as losses.
"""
import copy
import importlib
import math
import shutil
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import common
from conftest import ROOT, as_samples, read_jsonl, run_main, small_model, small_tokenizer, write_jsonl

METRICS = {
    "gspo": "gspo/ratio_moved",
    "cispo": "cispo/saved_frac",
    "luffy": "luffy/solution_prob",
    "hpt": "hpt/sft_frac",
}
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
    reward = "def plus(response, row):\n    return float('+' in response)\n"
    (path / "reward.py").write_text(reward)
    rows = []
    for problem, (_, solution) in WRITTEN.items():
        rows.append({"problem": problem, "answer": "1", "solution": solution})
    write_jsonl(path / "rows.jsonl", rows)
    return path


@pytest.fixture
def run_fork(folder, model_dirs, tmp_path, monkeypatch):
    """Return a function that runs a fork and returns its metrics."""
    monkeypatch.syspath_prepend(folder)

    def run(name: str, **more) -> list[dict]:
        flags = {
            "model": model_dirs["qwen2"],
            "dataset": folder / "rows.jsonl",
            "reward": f"{folder}/reward.py:plus",
            "out": tmp_path / "run",
            "steps": 1,
            "prompts_per_step": 4,
            "group_size": 3,
            "max_new_tokens": LONGEST,
            "lr": 0.01,
            "system_prompt": "",
            "warmup_frac": 0,
            "microbatch_tokens": 60,
            "max_grad_norm": 1e9,
            "seed": SEED,
        }
        flags |= more
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
    prompt = prompt_of(problem)
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1:-1]     # [T, V]
    return logits.log_softmax(-1)[range(len(completion)), completion]                     # [T]


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
        samples = completions[:3]
        mean = statistics.mean(rewards[:3])
        std = statistics.stdev(rewards[:3])
        for completion, reward in zip(samples, rewards):
            yield problem, completion, (reward - mean) / (std + 1e-6)


def gspo(model, old_model, problems: list[str], clip_low=3e-4, clip_high=4e-4):
    loss = 0.0
    moved = []
    for problem, completion, A in samples_of(problems):
        s = log_ratios(model, old_model, problem, completion).mean().exp()                # Eq. 7
        clipped = s.clamp(1 - clip_low, 1 + clip_high)
        loss = loss - torch.minimum(s * A, clipped * A)                                   # Eq. 5
        if A:
            moved += [abs(s.item() - 1)] * len(completion)
    return loss / (3 * len(problems)), moved


def cispo(model, old_model, problems: list[str], clip_low=math.inf, clip_high=4.0):
    loss = 0.0
    saved = []
    num_tokens = 0
    for problem, completion, A in samples_of(problems):
        rho = log_ratios(model, old_model, problem, completion).exp().detach()
        weight = rho.clamp(1 - clip_low, 1 + clip_high)                                   # Eq. 5
        loss = loss - (weight * A * logps_of(model, problem, completion)).sum()           # Eq. 4
        dropped_by_grpo = rho > 1.28 if A > 0 else rho < 0.8
        if A:
            saved += dropped_by_grpo.tolist()
        num_tokens += len(completion)
    return loss / num_tokens, saved


def luffy(model, old_model, problems: list[str], shaping=0.1):
    loss = 0.0
    solution_probs = []
    for problem in problems:
        (*samples, solution), rewards = graded(problem)
        mean = sum(rewards) / 4                                                           # Eq. 2
        for completion, reward in zip(samples, rewards):
            rho = log_ratios(model, old_model, problem, completion).exp()
            loss = loss - (reward - mean) * rho.sum()
        p = logps_of(model, problem, solution).exp()
        loss = loss - (rewards[3] - mean) * (p / (p + shaping)).sum()                     # Eq. 5
        if rewards[3] != mean:
            solution_probs += p.tolist()
    return loss / (4 * len(problems) * LONGEST), solution_probs


def hpt(model, old_model, problems: list[str], gate=0, sft_weight=1.0):
    rl = 0.0
    sft = 0.0
    num_taught = 0
    by_sft = []
    for problem in problems:
        (*samples, solution), rewards = graded(problem)
        by_sft.append(sum(rewards[:3]) <= gate)                                           # Eq. 8, 10
        if by_sft[-1]:
            sft = sft - logps_of(model, problem, solution).sum()                          # Eq. 12
            num_taught += len(solution)
            continue
        mean = sum(rewards[:3]) / 3
        for completion, reward in zip(samples, rewards):
            rho = log_ratios(model, old_model, problem, completion).exp()
            rl = rl - (reward - mean) * rho.sum()                                         # Eq. 11
    rl = rl / (3 * len(problems) * LONGEST)
    sft = sft / max(num_taught, 1)
    return rl + sft_weight * sft, by_sft                                                  # Eq. 13


CASES = [  # method, updates per rollout, learning rate, constants of the method
    (gspo, 2, 5e-4, {}),
    (gspo, 2, 5e-4, {"clip_low": 0.01, "clip_high": 0.005}),
    (cispo, 2, 0.05, {}),
    (cispo, 2, 0.01, {"clip_low": 0.1, "clip_high": 0.05}),
    (luffy, 1, 0.01, {}),
    (luffy, 2, 0.01, {"shaping": 0.5}),
    (hpt, 1, 0.01, {}),
    (hpt, 1, 0.01, {"gate": 2}),
    (hpt, 1, 0.01, {"gate": -1}),
    (hpt, 2, 0.01, {"gate": 1, "sft_weight": 0.3}),
]


@pytest.mark.parametrize("method, num_updates, lr, constants", CASES)
def test_loss_gradient_and_metric_are_the_papers(method, num_updates, lr, constants, run_fork, monkeypatch):
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
        return as_samples(ids)

    def record(model, max_norm):
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        updates.append((copy.deepcopy(model).double(), gradient))
        return common.clip_gradient(model, max_norm)

    monkeypatch.setattr(fork, "generate_in_pieces", written)
    monkeypatch.setattr(fork, "clip_gradient", record)
    group_size = 4 if method is luffy else 3
    metrics, = run_fork(name, group_size=group_size, updates_per_rollout=num_updates, lr=lr, **constants)
    assert len(updates) == num_updates
    old_model = small_model(tie_word_embeddings=True).double()
    losses = []
    numbers = []
    slices = [ORDER] if num_updates == 1 else [ORDER[:2], ORDER[2:]]
    for (model, gradient), problems in zip(updates, slices):
        loss, more = method(model, old_model, problems, **constants)
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        assert (gradient - exact).norm() < 1e-4 * exact.norm()
        losses.append(loss.item())
        numbers += more
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert metrics[METRICS[name]] == pytest.approx(sum(numbers) / len(numbers), abs=1e-5)
