"""eval_math.py: its statistics by hand, whole evaluations with scripted and real completions, resume, refusals, comparisons."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import common
import eval_math
from conftest import ROOT, read_jsonl, small_tokenizer, write_rows
from eval_math import BENCHMARKS, bootstrap_interval, majority, paired_difference, pass_at_k, vote


# ---- statistics

def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(32, 1, 8) == pytest.approx(0.25) and pass_at_k(200_000, 1, 1000) == pytest.approx(0.005)  # no overflow


def test_majority():
    assert majority(["1", "2", "2", "1"]) == 0  # a tie goes to the first to appear
    assert majority(["3", "2", "1", "2"]) == 1
    assert majority([None, None, None, "5", None]) == 3  # no box, no vote
    assert majority([None, None]) is None


def test_votes_are_equal_where_only_notation_differs():
    assert vote(" \\dfrac{1}{2}. ") == vote("$\\frac12$".replace("12", "{1}{2}")) == vote("\\left\\frac{1} {2}\\right") == "\\frac{1}{2}"
    assert vote("42\\,000") == "42000" and vote(None) is None and vote("1.5") != vote("15")


def test_bootstrap_interval():
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    low, high = bootstrap_interval([0, 1] * 50)  # the mean's standard error is 0.05
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.011) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.011)
    assert bootstrap_interval([1] + [0] * 9) == pytest.approx((0, 0.3))  # binomial(10, 0.1): P(<= 2) = 0.930, P(<= 3) = 0.987
    values = np.random.default_rng(5).random(40)
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1) != bootstrap_interval(values, 2)


def test_paired_difference():
    """Differences 0.5, 0, 0, 0.5: their resampled mean is binomial(4, 1/2) / 8, 1/16 of it at either end."""
    assert paired_difference([0, 0.5, 1, 0.5], [0.5, 0.5, 1, 1]) == pytest.approx((0.25, 0, 0.5))
    assert paired_difference([0.1, 0.9, 0.5], [0.3, 1.1, 0.7]) == pytest.approx((0.2, 0.2, 0.2))  # how hard the problems are cancels out


# ---- whole evaluations

def problems(n: int, word: str = "What") -> list[dict]:
    return [{"problem": f"{word} is {i} + {i}?", "answer": str(2 * i)} for i in range(n)]


@pytest.fixture
def evaluate(run_script, model_dirs, tmp_path):
    """Run eval_math on the small model -> exit code."""
    def run(benchmarks, out="out", *more) -> int:
        return run_script("eval_math", "--model", model_dirs["qwen2"], "--benchmarks", benchmarks, "--out", tmp_path / out,
                          "--system_prompt", "", "--max_new_tokens", 12, "--temperature", 1, *more)
    return run


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "sums.jsonl", problems(6) + problems(1, "Now tell me, what"))


@pytest.fixture
def by_length(monkeypatch):
    """The small model never solves anything: let the length of its gibberish decide what is right and what the answer is."""
    monkeypatch.setattr(eval_math, "grade_batch", lambda texts, golds: [float(len(text) % 3 == 0) for text in texts])
    monkeypatch.setattr(eval_math, "extract_answer", lambda text: None if len(text) % 5 == 0 else str(len(text) % 4))


def script(monkeypatch, completions: list[str]) -> list[list[str]]:
    """Let `generate` give these completions, in turn; "" at the end of one stands for the end token -> prompts as it saw them."""
    tokenizer, seen, queue = small_tokenizer(), [], list(completions)

    def generate(model, prompts, eos, pad, max_new_tokens, *rest):
        seen.append([tokenizer.decode(p) for p in prompts])
        ids = [tokenizer(queue.pop(0)).input_ids for _ in prompts]
        ids = [i + [tokenizer.eos_token_id] if len(i) < max_new_tokens else i[:max_new_tokens] for i in ids]
        return torch.tensor([i + [pad] * (max_new_tokens - len(i)) for i in ids])

    monkeypatch.setattr(eval_math, "generate", generate)
    return seen


def outcome(out) -> dict:
    return json.loads((out / "results.json").read_text())


def test_every_number_by_hand(evaluate, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "sums.jsonl", problems(3))
    script(monkeypatch, ["\\boxed{0}", "\\boxed{0}", "no idea", "\\boxed{7}",             # 2 of 4 right, majority right
                         "\\boxed{3}", "\\boxed{2}", "\\boxed{3}", "too long to end it",  # 1 of 4 right, majority wrong
                         "none", "none", "none", "none"])                                 # nobody votes
    assert evaluate(data, "out", "--batch_size", 5) == 0
    result = outcome(tmp_path / "out")["results"]["sums.jsonl"]
    assert result["k"] == 4 and result["problems"] == 3
    assert result["avg@k"] == pytest.approx((0.5 + 0.25 + 0) / 3)
    assert result["pass@k"] == pytest.approx({"1": 0.25, "2": (5 / 6 + 1 / 2 + 0) / 3, "4": 2 / 3})
    assert result["maj@k"] == pytest.approx(1 / 3)
    assert result["no_box"] == pytest.approx(6 / 12) and result["truncated"] == pytest.approx(1 / 12)
    assert result["mean_length"] == pytest.approx((6 * 10 + 8 + 12 + 4 * 5) / 12)  # \boxed{0} and its end token are 10 tokens; 12 is the limit
    assert result["avg@k_interval"] == pytest.approx((0, 0.5), abs=0.01)
    assert result["per_problem"]["1"] == {"avg@k": 0.25, "pass@k": 1, "maj@k": 0, "mean_length": 10.5}
    generations = read_jsonl(tmp_path / "out" / "generations.jsonl")
    assert [(g["id"], g["sample"]) for g in generations] == [(str(i), s) for i in range(3) for s in range(4)]
    assert generations[3] == {"benchmark": "sums.jsonl", "guided": False, "id": "0", "sample": 3, "correct": False, "answer": "7", "tokens": 10,
                              "truncated": False, "batch": [0, 5], "completion": "\\boxed{7}"}
    assert generations[7]["truncated"] and generations[7]["completion"] == "too long to " and generations[7]["answer"] is None
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar where there is no terminal
    assert "0.250 @4" in captured.out and "0.444 @2  0.667 @4" in captured.out


def test_a_second_call_shows_the_results_and_samples_nothing(evaluate, file, tmp_path, monkeypatch, capsys):
    assert evaluate(file) == 0
    before, shown = (tmp_path / "out" / "results.json").read_bytes(), capsys.readouterr().out
    monkeypatch.setattr(eval_math, "load_model", None)
    assert evaluate(file) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before and shown.splitlines()[2] in capsys.readouterr().out


def test_settings_reach_the_sampler_and_prompts_are_the_trainings(evaluate, file, tmp_path, monkeypatch):
    calls, true_generate = [], eval_math.generate
    monkeypatch.setattr(eval_math, "generate", lambda *a: calls.append(a[1:-1]) or true_generate(*a))
    assert evaluate(file, "out", "--k", 3, "--top_p", 0.7, "--temperature", 0.9, "--batch_size", 6, "--system_prompt", "Think.") == 0
    prompts, eos, pad, limit, temperature, top_p = calls[0]
    assert (limit, temperature, top_p, eos) == (12, 0.9, 0.7, [257]) and [len(c[0]) for c in calls] == [6, 6, 6, 3]
    tokenizer = small_tokenizer()
    long, short = (common.build_prompt(tokenizer, p, "Think.") for p in ("Now tell me, what is 0 + 0?", "What is 0 + 0?"))
    assert prompts == [long] * 3 + [short] * 3  # the longest first, a problem's samples side by side


def test_a_benchmark_does_not_depend_on_the_others(evaluate, file, tmp_path, by_length):
    other = write_rows(tmp_path / "other.jsonl", problems(3, "Which"))
    assert evaluate(file, "alone", "--k", 2) == 0 and evaluate(f"{other},{file}", "both", "--k", 2) == 0
    alone, both = (outcome(tmp_path / out)["results"] for out in ("alone", "both"))
    assert both["sums.jsonl"] == alone["sums.jsonl"] and set(both) == {"sums.jsonl", "other.jsonl"}


def test_seeds_and_batches_draw_differently(evaluate, file, tmp_path):
    for seed in (0, 1):
        assert evaluate(file, f"seed{seed}", "--seed", seed, "--batch_size", 2, "--k", 2) == 0
    a, b = ([g["completion"] for g in read_jsonl(tmp_path / f"seed{seed}" / "generations.jsonl")] for seed in (0, 1))
    assert len(set(a)) == 14 and not set(a) & set(b)
    one = write_rows(tmp_path / "one.jsonl", problems(1))  # the same prompt in every batch
    assert evaluate(one, "one", "--batch_size", 2, "--k", 12) == 0
    assert len({g["completion"] for g in read_jsonl(tmp_path / "one" / "generations.jsonl")}) == 12


def test_golds_that_cannot_be_graded_are_left_out(evaluate, file, tmp_path, monkeypatch, capsys):
    for module in (common, eval_math):
        monkeypatch.setattr(module, "gold_is_gradable", lambda gold: gold != "4")
    assert evaluate(file) == 0
    assert outcome(tmp_path / "out")["results"]["sums.jsonl"]["problems"] == 6
    assert "dropped 1 of 7 rows with an answer that the grader cannot parse, first: id 2" in capsys.readouterr().out


def test_repeated_ids(evaluate, tmp_path):
    data = write_rows(tmp_path / "twice.jsonl", [{**row, "id": "same"} for row in problems(3)])
    assert evaluate(data, "out", "--k", 2) == 0
    assert list(outcome(tmp_path / "out")["results"]["twice.jsonl"]["per_problem"]) == ["0", "1", "2"]


# ---- the hub

HUB_ROWS = {  # columns as on the hub
    "HuggingFaceH4/MATH-500": {"problem": "p", "solution": "So $\\boxed{9}$.", "answer": "7", "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
    "math-ai/amc23": {"id": 0, "question": "p", "answer": "7", "url": "u"},
    "HuggingFaceH4/aime_2024": {"id": 60, "problem": "p", "solution": "s", "answer": "7", "url": "u", "year": "2024"},
    "math-ai/aime25": {"problem": "p", "answer": "7", "id": "0"},
    "math-ai/minervamath": {"question": "p", "answer": "7"},
    "Hothan/OlympiadBench": {"id": 1606, "question": "p", "solution": ["s"], "final_answer": ["7"], "context": None, "image_1": None, "modality": "Text-only",
                             "difficulty": "Competition", "is_multiple_answer": False, "unit": None, "answer_type": "Numerical", "error": None},
}


def test_known_names_load_their_hub_data_sets(evaluate, tmp_path, monkeypatch):
    import datasets
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or datasets.Dataset.from_list([HUB_ROWS[a[0]]]))
    seen = script(monkeypatch, ["\\boxed{7}"] * 108)
    assert evaluate(",".join(BENCHMARKS)) == 0
    assert calls == [(("HuggingFaceH4/MATH-500", None), {"split": "test"}), (("math-ai/amc23", None), {"split": "test"}),
                     (("HuggingFaceH4/aime_2024", None), {"split": "train"}), (("math-ai/aime25", None), {"split": "test"}),
                     (("math-ai/minervamath", None), {"split": "test"}), (("Hothan/OlympiadBench", "OE_TO_maths_en_COMP"), {"split": "train"})]
    results = outcome(tmp_path / "out")["results"]
    assert {name: r["k"] for name, r in results.items()} == {"math500": 4, "amc23": 32, "aime24": 32, "aime25": 32, "minerva": 4, "olympiadbench": 4}
    assert all(r["avg@k"] == 1 for r in results.values()) and list(results["amc23"]["pass@k"]) == ["1", "2", "4", "8", "16", "32"]
    assert {prompt for batch in seen for prompt in batch} == {small_tokenizer().decode(common.build_prompt(small_tokenizer(), "p", ""))}


def test_a_hub_that_is_not_reached(evaluate, monkeypatch, tmp_path, capsys):
    import datasets

    def down(*args, **kwargs):
        raise ConnectionError("no route")
    monkeypatch.setattr(datasets, "load_dataset", down)
    assert "math-ai/amc23: neither a local file nor loadable" in refused(evaluate, capsys, "amc23")


# ---- resume

def test_resumed_from_anywhere_equals_uninterrupted(evaluate, file, tmp_path, by_length):
    strategies = write_rows(tmp_path / "s.jsonl", [{"id": str(i), "strategy": "Double it."} for i in range(3)])
    settings = ["--k", 3, "--batch_size", 4, "--strategies", strategies]
    assert evaluate(file, "whole", *settings) == 0
    whole = (tmp_path / "whole" / "generations.jsonl").read_bytes()
    assert len(whole.splitlines()) == 21 + 9
    for kept in (0, 40, len(whole) // 3, whole.index(b"\n", 2 * len(whole) // 3) + 1, len(whole)):  # within a line, within a batch, at the end
        shutil.copytree(tmp_path / "whole", tmp_path / "broken", dirs_exist_ok=True)
        (tmp_path / "broken" / "results.json").unlink()
        (tmp_path / "broken" / "generations.jsonl").write_bytes(whole[:kept])
        assert evaluate(file, "broken", *settings) == 0
        assert (tmp_path / "broken" / "generations.jsonl").read_bytes() == whole
        assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")


def test_finished_batches_are_not_sampled_again(evaluate, file, tmp_path, monkeypatch, capsys):
    calls, true_generate = [], eval_math.generate

    def generate(model, prompts, *rest):
        if len(calls) == 2:
            calls.append(0)
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return true_generate(model, prompts, *rest)

    monkeypatch.setattr(eval_math, "generate", generate)
    assert evaluate(file, "out", "--k", 2, "--batch_size", 4) == 130
    assert capsys.readouterr().err == f"stopped; the same command with --out {tmp_path / 'out'} goes on\n"
    assert not (tmp_path / "out" / "results.json").exists() and len(read_jsonl(tmp_path / "out" / "generations.jsonl")) == 8
    assert evaluate(file, "out", "--k", 2, "--batch_size", 4) == 0
    assert calls == [4, 4, 0, 4, 2] and "8 of them are there already" in capsys.readouterr().out


def test_killed_and_resumed_equals_uninterrupted(evaluate, file, tmp_path, model_dirs):
    settings = ["--k", 6, "--batch_size", 2, "--max_new_tokens", 24]
    argv = [sys.executable, ROOT / "eval_math.py", "--model", model_dirs["qwen2"], "--benchmarks", file, "--out", tmp_path / "broken",
            "--system_prompt", "", "--temperature", 1, *settings]
    killed = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    path = tmp_path / "broken" / "generations.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 6:
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 6 <= path.read_bytes().count(b"\n") < 42 and not (tmp_path / "broken" / "results.json").exists()
    with open(path, "a") as generations:
        generations.write('{"benchmark": "sums.js')  # a line cut in half
    assert evaluate(file, "broken", *settings) == 0 and evaluate(file, "whole", *settings) == 0
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    a, b = ((tmp_path / out / "generations.jsonl").read_text().splitlines() for out in ("broken", "whole"))
    assert len(a) == len(b) == 42 and set(a) == set(b)


# ---- memory

def short_of_memory(monkeypatch, most: int) -> list[int]:
    sizes, write = [], common._write

    def short(model, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(model, prompts, *rest)

    monkeypatch.setattr(common, "_write", short)
    monkeypatch.setattr(common, "_rows_at_once", sys.maxsize)
    return sizes


def test_out_of_memory_halves_the_batch_and_changes_nothing_else(evaluate, file, tmp_path, monkeypatch, capsys):
    assert evaluate(file, "whole", "--k", 3, "--batch_size", 16, "--temperature", 1) == 0
    sizes = short_of_memory(monkeypatch, 4)
    capsys.readouterr()
    assert evaluate(file, "out", "--k", 3, "--batch_size", 16, "--temperature", 1) == 0
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 1]  # what does not fit is not tried again
    assert capsys.readouterr().err.splitlines()[1] == "warning: out of memory with 8 completions at once, going on with 4"
    assert (tmp_path / "out" / "generations.jsonl").read_bytes() == (tmp_path / "whole" / "generations.jsonl").read_bytes()


def test_out_of_memory_with_one_completion(evaluate, file, monkeypatch, capsys):
    short_of_memory(monkeypatch, 0)
    assert evaluate(file, "out", "--batch_size", 1) == 2
    assert "out of memory with a single completion" in capsys.readouterr().err


# ---- strategies

@pytest.mark.parametrize("key", ["problem", "id", "own"])
def test_strategies(key, evaluate, tmp_path, monkeypatch, capsys):
    rows = [{**row, "id": f"n{i}", "strategy": f"Own {i}."} if key == "own" and i else {**row, "id": f"n{i}"} for i, row in enumerate(problems(3))]
    data = write_rows(tmp_path / "sums.jsonl", rows)
    lines = [{key: rows[i].get(key), "strategy": f"Own {i}."} for i in (1, 2)] + [{"problem": "Not in there", "strategy": "Useless."}]
    seen = script(monkeypatch, ["\\boxed{0}", "\\boxed{1}", "\\boxed{2}", "\\boxed{1}", "\\boxed{1}", "\\boxed{1}",  # alone: 1/2, 1/2, 0
                                "\\boxed{2}", "\\boxed{2}", "\\boxed{4}", "none"])                                   # guided: 1, 1/2 of the latter two
    source = "own" if key == "own" else write_rows(tmp_path / "strategies.jsonl", lines)
    assert evaluate(data, "out", "--k", 2, "--strategies", source) == 0
    result = outcome(tmp_path / "out")["results"]["sums.jsonl"]
    assert result["avg@k"] == pytest.approx(1 / 3) and result["guided"]["avg@k"] == pytest.approx(0.75) and result["guided"]["problems"] == 2
    assert result["strategy_gain"] == {"difference": 0.5, "interval": [0.5, 0.5], "problems": 2}
    assert "Strategy" not in "".join(seen[0])
    assert ["Strategy:\nOwn 1.\n\nProblem:\nWhat is 1 + 1?" in p for p in seen[1]] == [True, True, False, False]
    assert "the strategy adds +0.500 [+0.500, +0.500] on the 2 problems that have one" in capsys.readouterr().out


def test_strategies_leave_the_unguided_numbers_alone(evaluate, file, tmp_path, by_length):
    strategies = write_rows(tmp_path / "s.jsonl", [{"id": str(i), "strategy": "Double it."} for i in range(7)])
    assert evaluate(file, "alone", "--k", 2) == 0 and evaluate(file, "guided", "--k", 2, "--strategies", strategies) == 0
    alone, guided = (outcome(tmp_path / out)["results"]["sums.jsonl"] for out in ("alone", "guided"))
    assert {key: guided[key] for key in alone} == alone and guided["guided"]["per_problem"] != alone["per_problem"]


def test_flags_of_the_demo_and_of_real_models(monkeypatch):
    for argv, wanted in (([], ("demo", "own", 36, "", 0.6, 0.95)), (["--benchmarks", "amc23", "--top_p", "1"], ("amc23", None, 36, "", 0.6, 1)),
                         (["--model", "x/y"], ("math500,olympiadbench,amc23,aime24", None, 4096, common.SYSTEM_PROMPT, 0.6, 0.95)),
                         (["--model", "runs/a/model", "--benchmarks", "demo"], ("demo", "own", 36, "", 0.6, 0.95))):
        monkeypatch.setattr(sys, "argv", ["eval_math.py", *argv])
        args = common.parse_args(eval_math.Args, eval_math.recipe)
        assert (args.benchmarks, args.strategies, args.max_new_tokens, args.system_prompt, args.temperature, args.top_p) == wanted


def test_the_demo_problems_with_their_strategies(run_script, model_dirs, tmp_path, monkeypatch):
    seen = script(monkeypatch, ["none"] * 100 + ["\\boxed{1}"] * 100)
    assert run_script("eval_math", "--model", model_dirs["qwen2"], "--benchmarks", "demo", "--k", 1, "--out", tmp_path / "out", "--max_new_tokens", 20) == 0
    result = outcome(tmp_path / "out")["results"]["demo"]
    assert result["problems"] == result["guided"]["problems"] == 100 and (result["no_box"], result["guided"]["no_box"]) == (1, 0)
    assert [all("Strategy:\nType: " in p for p in batch) for batch in seen] == [False, False, True, True]


# ---- compare

def two_results(evaluate, tmp_path, monkeypatch) -> list[str]:
    """a: 0, 1/2, 1, 1/2 of two samples right, with strategies 1/2 everywhere; b: 1/2, 1/2, 1, 1 and 1 everywhere."""
    data = write_rows(tmp_path / "sums.jsonl", [{**row, "strategy": "Double it."} for row in problems(4)])
    for out, alone, guided in (("a", "00 10 11 01", "10 10 01 10"), ("b", "10 10 11 11", "11 11 11 11")):
        script(monkeypatch, [f"\\boxed{{{2 * i if right == '1' else 9}}}" for way in (alone, guided) for i, pair in enumerate(way.split()) for right in pair])
        assert evaluate(data, out, "--k", 2, "--strategies", "own", "--top_p", 0.9 if out == "a" else 0.8) == 0
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_compare_by_hand(evaluate, run_script, tmp_path, monkeypatch, capsys):
    directories = two_results(evaluate, tmp_path, monkeypatch)
    capsys.readouterr()
    monkeypatch.setattr(eval_math, "load_model", None)
    assert run_script("eval_math", "--compare", *directories) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:3] == [f"A: {directories[0]}", f"B: {directories[1]}", "top_p: 0.9 in A, 0.8 in B"]
    assert lines[3] == "benchmark A B B - A 95% interval"
    assert "sums.jsonl avg@2 0.500 0.750 +0.250 [+0.000, +0.500]" in lines
    assert "sums.jsonl pass@2 0.750 1.000 +0.250 [+0.000, +0.750]" in lines
    assert "sums.jsonl maj@2 0.500 1.000 +0.500 [+0.000, +1.000]" in lines  # a tie in a's last goes to the first answer, 9
    assert "sums.jsonl tokens 10 10 +0 [+0, +0]" in lines
    assert "sums.jsonl guided avg@2 0.500 1.000 +0.500 [+0.500, +0.500]" in lines
    assert "sums.jsonl strategy adds 0.000 0.250 +0.250 [+0.000, +0.500]" in lines
    assert run_script("eval_math", "--compare", *reversed(directories)) == 0
    assert "sums.jsonl avg@2 0.750 0.500 -0.250 [-0.500, +0.000]" in " ".join(capsys.readouterr().out.split()).replace("-0.000", "+0.000")


def test_what_cannot_be_compared(evaluate, run_script, tmp_path, monkeypatch, capsys):
    def refused_compare(*directories) -> str:
        return refused(lambda *a: run_script("eval_math", "--compare", *a), capsys, *directories)

    a, b = two_results(evaluate, tmp_path, monkeypatch)
    rows = read_jsonl(tmp_path / "sums.jsonl")
    assert "two results directories, not 1" in refused_compare(a)
    assert "no results.json in it" in refused_compare(a, tmp_path)
    for out, benchmark, change, k in (("k", "sums.jsonl", {}, 1), ("other", "other.jsonl", {}, 2), ("changed", "sums.jsonl", {"answer": "9"}, 2)):
        data = write_rows(tmp_path / benchmark, [{**row, **change} for row in rows])
        script(monkeypatch, ["none"] * 8)
        assert evaluate(data, out, "--k", k) == 0
    assert "2 samples a problem" in refused_compare(a, tmp_path / "k")
    assert "not the same benchmarks, sums.jsonl in" in refused_compare(a, tmp_path / "other")
    assert "other problems, answers or strategies" in refused_compare(a, tmp_path / "changed")
    (tmp_path / "k" / "results.json").write_text("[1]")
    assert "not one of an evaluation" in refused_compare(a, tmp_path / "k")


# ---- refusals

def refused(run, capsys, *argv) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("flags, said", [
    (["--benchmarks", "math501"], "math501: not known; known are math500, amc23, aime24, aime25, minerva, olympiadbench, demo"), (["--benchmarks", ","], "empty"),
    (["--benchmarks", "missing.jsonl"], "missing.jsonl: no such file"), (["--k", 0], "--k is 0; it must be at least 1"), (["--k", "few"], "--k"),
    (["--temperature", 0], "add --k 1"), (["--temperature", -1], "--temperature"), (["--temperature", "inf"], "--temperature"), (["--top_p", 0], "--top_p"),
    (["--batch_size", 0], "--batch_size"), (["--max_new_tokens", 0], "--max_new_tokens"), (["--max_new_tokens", 4090], "exceeds the model's context of 4096"),
    (["--strategies", "own"], "no row of the benchmarks has one"), (["--strategies", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--model", "./missing"], "no such directory"), (["--stepz", 1], "unknown flag --stepz"), (["--seed", -1], "--seed"),
])
def test_bad_flags(flags, said, evaluate, file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert said in refused(evaluate, capsys, file, "out", *flags)
    assert set(tmp_path.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("text, said", [("\n", "rows.jsonl: no rows in it"), ('{"problem": "p", "answer": "1"}\n{"problem": "p"}', 'rows.jsonl, line 2: row has no "answer"'),
                                        ("{broken", "rows.jsonl, line 1: not JSON")])
def test_bad_rows(text, said, evaluate, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(text)
    assert said in refused(evaluate, capsys, tmp_path / "rows.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, said", [({"problem": "What is 0 + 0?"}, 's.jsonl, line 1: row has no "strategy"'), ([1], 'row has no "strategy"'),
                                       ({"strategy": "s"}, 'neither "problem" nor "id"'), ({"problem": "another", "strategy": "s"}, "no row of it names a problem"),
                                       ({"id": "0", "strategy": "s"}, "id 0 is in sums.jsonl and other.jsonl")])
def test_bad_strategies(row, said, evaluate, file, tmp_path, capsys):
    other = write_rows(tmp_path / "other.jsonl", problems(2, "Which"))
    assert said in refused(evaluate, capsys, f"{file},{other}", "out", "--strategies", write_rows(tmp_path / "s.jsonl", [row]))


def test_two_files_of_one_name_and_golds_all_unusable(evaluate, file, tmp_path, capsys, monkeypatch):
    (tmp_path / "b").mkdir()
    shutil.copy(file, tmp_path / "b" / file.name)
    assert "there is a sums.jsonl already" in refused(evaluate, capsys, f"{file},{tmp_path}/b/sums.jsonl")
    monkeypatch.setattr(eval_math, "gold_is_gradable", lambda gold: False)
    assert "sums.jsonl: the grader can parse none of its 7 answers" in refused(evaluate, capsys, file)


def test_results_of_another_configuration(evaluate, file, tmp_path, model_dirs, capsys):
    assert evaluate(file, "out", "--k", 2) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "another configuration (seed: 0 there, 1 now)" in refused(evaluate, capsys, file, "out", "--k", 2, "--seed", 1)
    assert "k: 2 there, 3 now" in refused(evaluate, capsys, file, "out", "--k", 3)
    write_rows(file, problems(5))
    assert "problems of sums.jsonl:" in refused(evaluate, capsys, file, "out", "--k", 2)
    write_rows(file, problems(6) + problems(1, "Now tell me, what"))
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    weights = model_dirs["qwen2"] / "model.safetensors"
    stamp = weights.stat()
    try:
        os.utime(weights, (1, 1))  # trained on, and saved in the same place
        assert "model files:" in refused(evaluate, capsys, file, "out", "--k", 2)
    finally:
        os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert evaluate(file, "out", "--k", 2) == 0


def test_directories_that_are_not_ours(evaluate, file, tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    assert "holds no evaluation" in refused(evaluate, capsys, file, "thesis")
    assert "cannot be used" in refused(evaluate, capsys, file, "thesis/thesis.tex")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "config.json").write_text(json.dumps({"script": "sgpo", "flags": {"lr": 1e-6}}))
    assert "script: 'sgpo' there, 'eval_math' now" in refused(evaluate, capsys, file, "training")
    (tmp_path / "training" / "config.json").write_text("{}")
    assert "not one of an evaluation" in refused(evaluate, capsys, file, "training")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


def test_two_evaluations_at_once(evaluate, file, tmp_path, capsys, monkeypatch):
    true_generate = eval_math.generate
    monkeypatch.setattr(eval_math, "generate", lambda *a: print(evaluate(file)) or true_generate(*a))
    assert evaluate(file) == 0
    captured = capsys.readouterr()
    assert "another evaluation is writing there" in captured.err and len(read_jsonl(tmp_path / "out" / "generations.jsonl")) == 28
