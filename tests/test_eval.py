"""eval_math.py: statistics by hand, whole evaluations, resuming, strategies, comparisons, refusals."""
import itertools
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import eval_math
from conftest import IM_END, PAD, as_samples, read_jsonl, small_tokenizer, write_jsonl
from eval_math import bootstrap_interval, majority, pass_at_k, vote

TOKENIZER = small_tokenizer()


# ---- statistics

def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    for n, c, k in itertools.product(range(1, 7), repeat=3):
        if max(c, k) > n:
            continue
        samples = [True] * c + [False] * (n - c)
        subsets = [any(subset) for subset in itertools.combinations(samples, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets))
    assert pass_at_k(4, 0, 2) == 0


@pytest.mark.parametrize("votes, winner", [
    (["1", "2", "2", "1"], 0),  # a tie goes to the first
    (["3", "2", "1", "2"], 1),
    ([None, None, None, "5", None], 3),
    ([None, None], None),
])
def test_majority(votes, winner):
    assert majority(votes) == winner


@pytest.mark.parametrize("answer, expected", [
    (" \\dfrac{1}{2}. ", "\\frac{1}{2}"),
    ("$\\tfrac{1}{2}$", "\\frac{1}{2}"),
    ("\\left\\frac{1} {2}\\right", "\\frac{1}{2}"),
    ("42\\,000", "42000"),
    ("1.5", "1.5"),
    (None, None),
])
def test_vote(answer, expected):
    assert vote(answer) == expected


@pytest.mark.parametrize("values, interval, tolerance", [
    ([0.25] * 7, (0.25, 0.25), 0),
    ([0, 1] * 50, (0.402, 0.598), 0.011),  # 1.96 standard errors of 0.05
    ([1] + [0] * 9, (0, 0.3), 1e-9),       # binomial(10, 0.1): P(<= 2) is 0.930, P(<= 3) is 0.987
])
def test_bootstrap_interval(values, interval, tolerance):
    assert bootstrap_interval(values) == pytest.approx(interval, abs=tolerance)


def test_the_bootstrap_depends_on_the_seed_alone():
    first, again, other = (bootstrap_interval(range(40), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


# ---- whole evaluations

def sums(n: int, word: str = "What") -> list[dict]:
    return [{"problem": f"{word} is {i} + {i}?", "answer": str(2 * i)} for i in range(n)]


def with_strategies(n: int, strategy: str = "Double it.") -> list[dict]:
    return [{**row, "strategy": strategy} for row in sums(n)]


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "sums.jsonl", sums(6) + sums(1, "Now tell me, what"))


@pytest.fixture
def evaluate(run_script, model_dirs, tmp_path):
    """Return a function that evaluates the small model and returns the directory."""
    def run(benchmarks, *more, out: str = "out", code: int = 0):
        argv = ["--model", model_dirs["qwen2"], "--benchmarks", benchmarks, "--system_prompt", "",
                "--max_new_tokens", 12, "--temperature", 1, "--out", tmp_path / out, *more]
        assert run_script("eval_math", *argv) == code
        return tmp_path / out

    return run


@pytest.fixture
def refused(evaluate, capsys):
    """Return a function that checks that an evaluation is refused in one line, and returns the line."""
    def check(*arguments, **more) -> str:
        capsys.readouterr()
        evaluate(*arguments, **more, code=2)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return check


@pytest.fixture
def fake_samples(monkeypatch):
    """Return a function that lets the sampler give these completions; it returns the prompts to come."""
    def fake(completions: list[str]) -> list[str]:
        remaining = iter(completions)
        seen = []

        def generate(model, prompts, config, max_rows):
            rows = []
            for prompt in prompts:
                seen.append(TOKENIZER.decode(prompt))
                ids = TOKENIZER(next(remaining)).input_ids + [IM_END]
                ids += [PAD] * config.max_new_tokens
                rows.append(ids[:config.max_new_tokens])
            return as_samples(torch.tensor(rows))

        monkeypatch.setattr(eval_math, "generate_in_pieces", generate)
        return seen

    return fake


@pytest.fixture
def calls(monkeypatch):
    """Return a list that fills with the sampler's (prompts, config, max_rows)."""
    seen = []
    generate = common.generate_in_pieces

    def record(model, *arguments):
        seen.append(arguments)
        return generate(model, *arguments)

    monkeypatch.setattr(eval_math, "generate_in_pieces", record)
    return seen


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())["results"]


def generations(out) -> list[dict]:
    return read_jsonl(out / "generations.jsonl")


BOXES = ["\\boxed{7}", "no idea", "\\boxed{0}", "\\boxed{0}",           # 2 of 4, majority correct
         "\\boxed{3}", "\\boxed{2}", "\\boxed{3}", "too long to end it",  # 1 of 4, majority wrong
         "none", "none", "none", "none",                                # no vote
         *["\\boxed{\\frac{1}}"] * 4]                                   # a gold that cannot be read


@pytest.fixture
def by_hand(evaluate, fake_samples, tmp_path):
    """Return the directory of an evaluation of four problems whose ids repeat."""
    rows = sums(3) + [{"problem": "What is it?", "answer": "\\frac{1}"}]
    rows = [{**row, "id": "same"} for row in rows]
    fake_samples(BOXES)
    data = write_jsonl(tmp_path / "sums.jsonl", rows)
    return evaluate(data, "--generation_batch_size", 5, "--max_new_tokens", 18)


def test_every_number_by_hand(by_hand):
    result = results(by_hand)["sums.jsonl"]
    assert result.pop("avg@k_interval") == pytest.approx((0, 0.4), abs=0.05)
    assert result.pop("per_problem")["1"] == {"avg@k": 0.25, "pass@k": 1, "maj@k": 0, "mean_length": 12}
    passed = {"1": 3 / 16, "2": (5 / 6 + 1 / 2) / 4, "4": 2 / 4}
    assert result.pop("pass@k") == pytest.approx(passed)
    for name in ("pass@k", "maj@k", "mean_length"):
        low, high = result.pop(f"{name}_interval")
        assert low < result.get(name, 0.5) < high
    assert result == {"problems": 4, "k": 4, "avg@k": 3 / 16, "maj@k": 1 / 4, "no_box": 6 / 16,
                      "truncated": 1 / 16, "mean_length": (6 * 10 + 8 + 18 + 4 * 5 + 4 * 17) / 16}


def test_generations(by_hand):
    rows = generations(by_hand)
    assert [(row["id"], row["sample"]) for row in rows] == [(str(i), j) for i in range(4) for j in range(4)]
    assert rows[0] == {"benchmark": "sums.jsonl", "id": "0", "sample": 0, "correct": False, "answer": "7",
                       "tokens": 10, "truncated": False, "batch": [0, 5], "completion": "\\boxed{7}"}
    assert rows[7] == {**rows[6], "sample": 3, "answer": None, "tokens": 18, "truncated": True,
                       "batch": [5, 10], "completion": "too long to end it"}
    assert rows[12]["answer"] == "\\frac{1}"
    assert rows[12]["correct"] is False


def test_what_is_printed(capsys, by_hand):
    printed = capsys.readouterr()
    assert printed.err == ""  # no bar without a terminal
    for text in ("sums.jsonl: ids repeat", "cannot read 1 of 4 gold answers", "first: id 3\n",
                 "sums.jsonl: 5 of 16, accuracy 0.400\n", "sums.jsonl: 16 of 16, accuracy 0.188\n",
                 " 0.188 @4 ", " 0.333 @2  0.500 @4 "):
        assert text in printed.out


def test_pass_at_k_has_k_itself(evaluate, fake_samples, file):
    fake_samples(["none"] * 21)
    out = evaluate(file, "--k", 3)
    assert list(results(out)["sums.jsonl"]["pass@k"]) == ["1", "2", "3"]


def test_the_text_ends_at_the_first_end_token(evaluate, monkeypatch, tmp_path):
    ids = TOKENIZER("\\boxed{0}").input_ids + [IM_END] + TOKENIZER("\\boxed{1}").input_ids
    monkeypatch.setattr(eval_math, "generate_in_pieces", lambda *arguments: as_samples(torch.tensor([ids])))
    row, = generations(evaluate(write_jsonl(tmp_path / "one.jsonl", sums(1)), "--k", 1))
    assert row["completion"] == "\\boxed{0}"
    assert row["tokens"] == 10


def test_settings_reach_the_sampler(evaluate, file, calls):
    evaluate(file, "--k", 3, "--top_p", 0.7, "--temperature", 0.9, "--generation_batch_size", 6,
             "--system_prompt", "Think.")
    prompts, config, max_rows = calls[0]
    assert config.do_sample is True
    assert config.temperature == 0.9
    assert config.top_p == 0.7
    assert config.top_k == 0
    assert config.max_new_tokens == 12
    assert max_rows == 6
    assert config.eos_token_id == [IM_END]
    assert [len(call[0]) for call in calls] == [6, 6, 6, 3]
    longest = common.build_prompt(TOKENIZER, "Now tell me, what is 0 + 0?", "Think.")
    first = common.build_prompt(TOKENIZER, "What is 0 + 0?", "Think.")
    assert prompts == [longest] * 3 + [first] * 3


def test_greedy_decoding(evaluate, file, calls, refused):
    assert "add --k 1" in refused(file, "--temperature", 0)
    evaluate(file, "--temperature", 0, "--k", 1)
    assert calls[0][1].do_sample is False


def test_samples_depend_on_seed_benchmark_and_batch_alone(evaluate, file, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", sums(1, "Now tell me, what"))  # the file's longest problem
    strategies = write_jsonl(tmp_path / "s.jsonl", with_strategies(7))
    settings = ["--k", 4, "--generation_batch_size", 2]
    alone = generations(evaluate(file, *settings, out="alone"))
    seed = generations(evaluate(other, *settings, "--seed", 1, out="seed"))
    both = generations(evaluate(f"{other},{file}", *settings, "--strategies", strategies, out="both"))
    assert [row for row in both if row["benchmark"] == "sums.jsonl"] == alone
    same_prompt = alone[:4] + both[:4] + seed  # other batches, other benchmark, other seed
    assert len({row["completion"] for row in same_prompt}) == 12


# ---- known names

HUB = {  # name: hub id, config, split, samples per problem
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 4),
    "amc23": ("math-ai/amc23", None, "test", 32),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", 32),
    "aime25": ("math-ai/aime25", None, "test", 32),
    "minerva": ("math-ai/minervamath", None, "test", 4),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", 4),
}


def test_known_names_load_their_hub_data_sets(evaluate, fake_samples, monkeypatch):
    asked = []

    def load_dataset(*place, split):
        asked.append((*place, split))
        return [{"question": "p", "answer": "7"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    seen = fake_samples(["\\boxed{7}"] * 108)
    found = results(evaluate(",".join(HUB)))
    assert [(*place, found[name]["k"]) for name, place in zip(found, asked)] == list(HUB.values())
    assert {numbers["avg@k"] for numbers in found.values()} == {1}
    assert set(seen) == {TOKENIZER.decode(common.build_prompt(TOKENIZER, "p", ""))}


# ---- the demo

DEMO = ("demo", "own", 24, "", 0.95)
FOUR = "math500,olympiadbench,amc23,aime24"


@pytest.mark.parametrize("argv, expected", [
    ([], DEMO),
    (["--model", "runs/a/model", "--benchmarks", "demo"], DEMO),
    (["--benchmarks", "amc23", "--top_p", "1"], ("amc23", None, 24, "", 1)),
    (["--model", "x/y"], (FOUR, None, 4096, common.SYSTEM_PROMPT, 0.95)),
])
def test_flags_of_the_demo(argv, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval_math.py", *argv])
    args = common.parse_args(eval_math.Args)
    assert (args.benchmarks, args.strategies, args.max_new_tokens, args.system_prompt, args.top_p) == expected


def test_the_demo(run_script, tmp_path):
    assert run_script("eval_math", "--k", 1, "--out", tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert [numbers["problems"] for numbers in found.values()] == [100, 100]
    assert found["demo"]["avg@k"] < 0.3
    assert found["demo guided"]["avg@k"] > 0.9


# ---- resuming

@pytest.fixture
def whole(evaluate, file, tmp_path):
    """Return settings and directory of an evaluation, with a guided part, that nothing interrupted."""
    strategies = write_jsonl(tmp_path / "s.jsonl", with_strategies(3))
    settings = [file, "--k", 3, "--generation_batch_size", 4, "--strategies", strategies]
    return settings, evaluate(*settings, out="whole")


def test_resumed_from_any_point_equals_uninterrupted(whole, evaluate, tmp_path):
    settings, folder = whole
    text = (folder / "generations.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 21 + 9
    ends = [0, len(text), len(text) // 3]  # the third is in the middle of a line
    ends += [sum(map(len, lines[:n])) for n in (5, 8, 23)]
    for end in ends:
        broken = shutil.copytree(folder, tmp_path / f"broken {end}")
        (broken / "results.json").unlink()
        (broken / "generations.jsonl").write_bytes(text[:end])
        evaluate(*settings, out=broken.name)
        assert (broken / "generations.jsonl").read_bytes() == text
        assert results(broken) == results(folder)


@pytest.mark.parametrize("error, code, size, sizes", [
    (KeyboardInterrupt(), 130, 4, [4, 4, 4, 4, 2]),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, 3, [4, 4, 4, 3, 3]),  # a smaller batch may follow
])
def test_finished_batches_are_kept(error, code, size, sizes, evaluate, file, calls, monkeypatch, capsys):
    record = eval_math.generate_in_pieces

    def fail_once(*arguments):
        tokens = record(*arguments)
        if len(calls) == 3:
            raise error
        return tokens

    monkeypatch.setattr(eval_math, "generate_in_pieces", fail_once)
    out = evaluate(file, "--k", 2, "--generation_batch_size", 4, code=code)
    assert f"the same command with --out {out} resumes it" in capsys.readouterr().out
    assert not (out / "results.json").exists()
    evaluate(file, "--k", 2, "--generation_batch_size", size)
    assert "14 completions, 8 of them are in" in capsys.readouterr().out
    assert [len(prompts) for prompts, *_ in calls] == sizes


def test_two_evaluations_at_the_same_time(evaluate, file, refused, monkeypatch):
    errors = []
    generate = common.generate_in_pieces

    def another_comes(*arguments):
        errors.append(refused(file))
        return generate(*arguments)

    monkeypatch.setattr(eval_math, "generate_in_pieces", another_comes)
    assert len(generations(evaluate(file))) == 28
    assert "another evaluation is writing there" in errors[0]


# ---- strategies

@pytest.mark.parametrize("source", ["file", "own"])
def test_strategies(source, evaluate, fake_samples, tmp_path, capsys):
    rows = sums(3)
    helped = [{**row, "strategy": f"Strategy of {row['answer']}."} for row in rows[1:]]
    if source == "own":
        rows[1:] = helped
    data = write_jsonl(tmp_path / "sums.jsonl", rows)
    none_found = {**rows[0], "strategy": None, "candidates": []}
    unknown = {"problem": "Not in the benchmark", "strategy": "Useless."}
    strategies = write_jsonl(tmp_path / "s.jsonl", [*helped, unknown, none_found])
    with open(strategies, "a") as cut_off:
        cut_off.write('{"problem": "What is 0 + 0?", "strat')
    unguided_answers = [0, 1, 2, 1, 1, 1]  # accuracy 1/2, 1/2, 0
    guided_answers = [2, 2, 4, "none"]     # accuracy 1, 1/2
    seen = fake_samples([f"\\boxed{{{answer}}}" for answer in unguided_answers + guided_answers])
    out = evaluate(data, "--k", 2, "--strategies", "own" if source == "own" else strategies)
    alone, with_strategy = results(out).values()
    assert alone["avg@k"] == pytest.approx(1 / 3)
    assert with_strategy["problems"] == 2
    assert with_strategy["avg@k"] == 0.75
    assert with_strategy["strategy adds"] == 0.5
    assert with_strategy["strategy adds_interval"] == [0.5, 0.5]
    assert "Strategy" not in "".join(seen[:6])
    for prompt, answer in zip(seen[6:], (2, 2, 4, 4)):
        assert f"Strategy:\nStrategy of {answer}.\n\nProblem:\nWhat is {answer // 2}" in prompt
    assert "the strategy adds +0.500 [+0.500, +0.500]" in capsys.readouterr().out


@pytest.mark.parametrize("row, message", [
    (None, "no such file"),
    ({"problem": "Not in the benchmark", "strategy": "Useless."},
     "no strategy for any problem of the benchmarks"),
    ({"strategy": "Whose?"}, 's.jsonl, line 1: must be a JSON object with "problem" and "strategy"'),
])
def test_strategies_that_are_refused(row, message, file, tmp_path, refused):
    path = tmp_path / "s.jsonl"
    if row:
        write_jsonl(path, [row])
    assert message in refused(file, "--strategies", path)
    assert not (tmp_path / "out").exists()


# ---- comparisons

@pytest.fixture
def result_of(evaluate, fake_samples, tmp_path):
    """Return a function that makes an evaluation whose samples are correct where there is a 1.

    "10 11": one of two samples of the first problem, both of the second.
    """
    def make(out: str, unguided: str, guided: str, *more, strategy="Add.", name="sums.jsonl"):
        boxes = []
        for verdicts in (unguided, guided):
            for i, samples in enumerate(verdicts.split()):
                boxes += [f"\\boxed{{{2 * i if verdict == '1' else 9}}}" for verdict in samples]
        fake_samples(boxes)
        first, *others = unguided.split()
        path = write_jsonl(tmp_path / name, with_strategies(1 + len(others), strategy))
        return evaluate(path, "--strategies", "own", "--k", len(first), *more, out=out)

    return make


def test_compare_by_hand(result_of, evaluate, capsys):
    a = result_of("a", "00 10 11 01", "10 10 01 10", "--top_p", 0.9)
    b = result_of("b", "10 10 11 11", "11 11 11 11", "--top_p", 0.8)
    capsys.readouterr()
    evaluate("", "--compare", a, b)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [f"A: {a}", f"B: {b}", "top_p: 0.9 in A, 0.8 in B", "A B B - A 95% interval"]
    for line in (  # differences 1/2, 0, 0, 1/2: of the resampled means 1/16 are 0 and 1/16 are 1/2
            "sums.jsonl avg@2 0.500 0.750 +0.250 [+0.000, +0.500]",
            "sums.jsonl pass@2 0.750 1.000 +0.250 [+0.000, +0.750]",
            "sums.jsonl maj@2 0.500 1.000 +0.500 [+0.000, +1.000]",  # a tie goes to the first answer, 9
            "sums.jsonl mean_length 10.000 10.000 +0.000 [+0.000, +0.000]",
            "sums.jsonl guided avg@2 0.500 1.000 +0.500 [+0.500, +0.500]",
            "sums.jsonl guided strategy adds 0.000 0.250 +0.250 [+0.000, +0.500]"):
        assert line in lines
    evaluate("", "--compare", b, a)
    assert "avg@2 0.750 0.500 -0.250 [-0.500, " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("other, changes, message", [
    (("0 1", "1 1"), {}, "strategies or --k of sums.jsonl\n"),
    (("00 10 11", "10 10 10"), {}, "problems, answers, strategies or --k of sums.jsonl\n"),
    (("00 10", "10 10"), {"strategy": "Double it."}, "strategies or --k of sums.jsonl guided\n"),
    (("00 10", "10 10"), {"name": "b.jsonl"}, "no benchmark is in both")])
def test_evaluations_that_cannot_be_compared(other, changes, message, result_of, refused):
    a = result_of("a", "00 10", "10 10")
    b = result_of("b", *other, **changes)
    assert message in refused("", "--compare", a, b)


def test_directories_that_cannot_be_compared(tmp_path, refused):
    (tmp_path / "results.json").write_text("[1]")
    assert "two results directories, not 1" in refused("", "--compare", tmp_path)
    assert "no results.json of a finished" in refused("", "--compare", tmp_path, tmp_path)
    assert "no results.json of a finished" in refused("", "--compare", tmp_path / "missing", tmp_path)


# ---- the same directory again, and refusals

def test_the_same_directory_again(evaluate, file, monkeypatch, capsys):
    out = evaluate(file)
    table = capsys.readouterr().out.splitlines()[-3:-1]
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(eval_math, "load_model", None)  # nothing more is sampled
    evaluate(file)
    assert capsys.readouterr().out.splitlines()[-2:] == table
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_config_repeats_its_evaluation(evaluate, file, tmp_path, run_script):
    out = evaluate(file)
    assert run_script("eval_math", out / "config.json", "--out", tmp_path / "again") == 0
    assert results(tmp_path / "again") == results(out)


def test_a_directory_of_something_else(evaluate, file, tmp_path, model_dirs, refused):
    model = shutil.copytree(model_dirs["qwen2"], tmp_path / "model")
    evaluate(file, "--model", model)
    assert "evaluation: seed was 0 and is 1; choose" in refused(file, "--model", model, "--seed", 1)
    assert "holds no evaluation" in refused(file, out="model")
    assert "holds no evaluation" in refused(file, out="sums.jsonl")
    os.utime(model / "model.safetensors", (1, 1))  # trained again and saved in the same place
    assert "evaluation: weights was" in refused(file, "--model", model)
    write_jsonl(file, sums(5))
    assert "evaluation: sums.jsonl was" in refused(file, "--model", model)


@pytest.mark.parametrize("benchmarks, message", [
    ("amc32", "'amc32': neither a file nor one of math500"),
    ("", "'': neither a file"),
    ("a.jsonl,b/a.jsonl", "there already is a a.jsonl"),
])
def test_benchmarks_that_are_refused(benchmarks, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", sums(1))
    assert message in refused(benchmarks)
    assert not (tmp_path / "out").exists()


def test_completions_longer_than_the_context(file, refused):
    assert "--max_new_tokens" in refused(file, "--max_new_tokens", 4096)


def test_several_processes(file, monkeypatch, refused):
    monkeypatch.setattr(eval_math, "world_size", lambda: 2)
    assert "one process" in refused(file)
