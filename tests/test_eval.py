"""eval_math.py: statistics by hand, whole evaluations, going on, strategies, comparisons, refusals."""
import itertools
import json
import os
import signal
import sys

import pytest
import torch

import common
import eval_math
from conftest import Child, read_jsonl, small_tokenizer, whole_run_for_real, write_rows
from eval_math import bootstrap_interval, majority, pass_at_k, vote


# ---- statistics

def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(200_000, 1, 1000) == pytest.approx(0.005)  # no overflow


def test_majority_and_votes():
    assert majority(["1", "2", "2", "1"]) == 0  # a tie goes to the first to appear
    assert majority(["3", "2", "1", "2"]) == 1
    assert majority([None, None, None, "5", None]) == 3 and majority([None]) is None  # no box, no vote
    same = [" \\dfrac{1}{2}. ", "$\\tfrac{1}{2}$", "\\left\\frac{1} {2}\\right", "\\frac{1}{2}"]
    assert {vote(answer) for answer in same} == {"\\frac{1}{2}"}
    assert vote("42\\,000") == "42000" and vote(None) is None and vote("1.5") != vote("15")


def test_bootstrap_interval():
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    interval = bootstrap_interval([0, 1] * 50)  # the mean's standard error is 0.05
    assert interval == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.011)
    skewed = bootstrap_interval([1] + [0] * 9)  # binomial(10, 0.1): P(<= 2) = 0.930, P(<= 3) = 0.987
    assert skewed == pytest.approx((0, 0.3))
    many = [x * x for x in range(40)]
    assert bootstrap_interval(many, 1) == bootstrap_interval(many, 1) != bootstrap_interval(many, 2)


# ---- whole evaluations

def problems(n: int, word: str = "What") -> list[dict]:
    return [{"problem": f"{word} is {i} + {i}?", "answer": str(2 * i)} for i in range(n)]


@pytest.fixture
def evaluate(run_script, model_dirs, tmp_path):
    """Run eval_math on the small model -> exit code."""
    def run(benchmarks, out="out", *more) -> int:
        return run_script("eval_math", "--model", model_dirs["qwen2"], "--benchmarks", benchmarks,
                          "--system_prompt", "", "--max_new_tokens", 12, "--temperature", 1,
                          "--out", tmp_path / out, *more)
    return run


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "sums.jsonl", problems(6) + problems(1, "Now tell me, what"))


def script(monkeypatch, completions: list[str]) -> list[list[str]]:
    """Let `generate` give these completions, in turn -> the prompts it gets, as text."""
    tokenizer, seen, queue = small_tokenizer(), [], list(completions)

    def generate(model, own, prompts, limit, *rest):
        seen.append([tokenizer.decode(prompt) for prompt in prompts])
        ids = [(tokenizer(queue.pop(0)).input_ids + [tokenizer.eos_token_id])[:limit] for _ in prompts]
        return torch.tensor([i + [tokenizer.pad_token_id] * (limit - len(i)) for i in ids])

    monkeypatch.setattr(common, "generate", generate)
    return seen


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())["results"]


def test_every_number_by_hand(evaluate, tmp_path, monkeypatch, capsys):
    """Of four problems, one with a gold that the grader cannot read; their ids repeat."""
    rows = problems(3) + [{"problem": "What is it?", "answer": "\\frac{1}"}]
    script(monkeypatch, ["\\boxed{0}", "\\boxed{0}", "no idea", "\\boxed{7}",  # 2 of 4, majority right
                         "\\boxed{3}", "\\boxed{2}", "\\boxed{3}", "too long to end it",  # 1 of 4, wrong
                         "none", "none", "none", "none", *["\\boxed{\\frac{1}}"] * 4])  # no vote; none right
    data = write_rows(tmp_path / "sums.jsonl", [{**row, "id": "same"} for row in rows])
    assert evaluate(data, "out", "--generation_batch_size", 5, "--max_new_tokens", 18) == 0
    result = results(tmp_path / "out")["sums.jsonl"]
    assert (result["k"], result["problems"], result["avg@k"]) == (4, 4, (0.5 + 0.25 + 0 + 0) / 4)
    assert result["avg@k_interval"] == pytest.approx((0, 0.4), abs=0.05)
    assert result["pass@k"] == pytest.approx({"1": 0.1875, "2": (5 / 6 + 1 / 2) / 4, "4": 2 / 4})
    assert (result["maj@k"], result["no_box"], result["truncated"]) == (1 / 4, 6 / 16, 1 / 16)
    assert result["mean_length"] == (6 * 10 + 8 + 18 + 4 * 5 + 4 * 17) / 16  # 18 is the limit
    assert result["per_problem"]["1"] == {"avg@k": 0.25, "pass@k": 1, "maj@k": 0, "mean_length": 12}
    found = read_jsonl(tmp_path / "out" / "generations.jsonl")
    assert [(g["id"], g["sample"]) for g in found] == [(str(i), j) for i in range(4) for j in range(4)]
    assert found[3] == {"benchmark": "sums.jsonl", "id": "0", "sample": 3, "correct": False, "answer": "7",
                        "tokens": 10, "truncated": False, "batch": [0, 5], "completion": "\\boxed{7}"}
    assert found[7]["truncated"] and found[7]["completion"] == "too long to end it"
    assert found[7]["answer"] is None and found[12]["answer"] == "\\frac{1}" and not found[12]["correct"]
    said = capsys.readouterr()
    assert said.err == ""  # no bar where there is no terminal
    assert "0.188 @4" in said.out and "0.333 @2  0.500 @4" in said.out and "ids repeat" in said.out
    assert "cannot read 1 of 4 golds" in said.out and "first: id 3\n" in said.out


def test_settings_reach_the_sampler_and_prompts_are_the_trainings(evaluate, file, monkeypatch):
    calls, true = [], common.generate
    monkeypatch.setattr(common, "generate", lambda *args: calls.append(args[2:6]) or true(*args))
    assert evaluate(file, "out", "--k", 3, "--top_p", 0.7, "--temperature", 0.9, "--generation_batch_size", 6,
                    "--system_prompt", "Think.") == 0
    prompts, *settings = calls[0]
    assert settings == [12, 0.9, 0.7] and [len(call[0]) for call in calls] == [6, 6, 6, 3]
    long, short = (common.build_prompt(small_tokenizer(), f"{text} 0 + 0?", "Think.")
                   for text in ("Now tell me, what is", "What is"))
    assert prompts == [long] * 3 + [short] * 3  # the longest first, a problem's samples side by side


def test_draws_depend_on_seed_benchmark_and_batch_and_on_nothing_else(evaluate, file, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", problems(1, "Now tell me, what"))  # the file's longest
    hints = write_rows(tmp_path / "s.jsonl", [{**row, "strategy": "Double it."} for row in problems(7)])
    settings = ["--k", 4, "--generation_batch_size", 2]
    assert evaluate(file, "alone", *settings) == 0 and evaluate(other, "other", *settings, "--seed", 1) == 0
    assert evaluate(f"{other},{file}", "both", *settings, "--strategies", hints) == 0
    alone, one, both = (read_jsonl(tmp_path / x / "generations.jsonl") for x in ("alone", "other", "both"))
    assert [row for row in both if row["benchmark"] == "sums.jsonl"] == alone
    assert len({row["completion"] for row in both[:4] + one + alone[:4]}) == 12  # all of the same prompt


# ---- known names

HUB = {  # hub id: config, split, a row with the columns it has there
    "HuggingFaceH4/MATH-500": (None, "test", {"problem": "p", "solution": "\\boxed{9}", "answer": "7"}),
    "math-ai/amc23": (None, "test", {"id": 0, "question": "p", "answer": "7", "url": "u"}),
    "HuggingFaceH4/aime_2024": (None, "train", {"id": 60, "problem": "p", "solution": "s", "answer": "7"}),
    "math-ai/aime25": (None, "test", {"problem": "p", "answer": "7", "id": "0"}),
    "math-ai/minervamath": (None, "test", {"question": "p", "answer": "7"}),
    "Hothan/OlympiadBench": ("OE_TO_maths_en_COMP", "train", {
        "id": 1606, "question": "p", "solution": ["s"], "final_answer": ["7"], "context": None})}


def test_known_names_load_their_hub_data_sets(evaluate, tmp_path, monkeypatch):
    import datasets

    def load_dataset(hub_id, config, split):
        assert (config, split) == HUB[hub_id][:2]
        return datasets.Dataset.from_list([HUB[hub_id][2]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    seen = script(monkeypatch, ["\\boxed{7}"] * 108)
    ks = dict(math500=4, amc23=32, aime24=32, aime25=32, minerva=4, olympiadbench=4)
    assert evaluate(",".join(ks)) == 0
    found = results(tmp_path / "out")
    assert {name: r["k"] for name, r in found.items()} == ks
    assert all(r["avg@k"] == 1 for r in found.values()) and [*found["amc23"]["pass@k"]][-2:] == ["16", "32"]
    prompt = small_tokenizer().decode(common.build_prompt(small_tokenizer(), "p", ""))
    assert {text for batch in seen for text in batch} == {prompt}


def test_the_demo_and_its_flags(run_script, model_dirs, tmp_path, monkeypatch):
    four, demo = "math500,olympiadbench,amc23,aime24", ("demo", "own", 24, "", 0.95)
    for argv, wanted in (([], demo), (["--model", "runs/a/model", "--benchmarks", "demo"], demo),
                         (["--benchmarks", "amc23", "--top_p", "1"], ("amc23", None, 24, "", 1)),
                         (["--model", "x/y"], (four, None, 4096, common.SYSTEM_PROMPT, 0.95))):
        monkeypatch.setattr(sys, "argv", ["eval_math.py", *argv])
        args = common.parse_args(eval_math.Args, eval_math.recipe)
        names = ("benchmarks", "strategies", "max_new_tokens", "system_prompt", "top_p")
        assert tuple(getattr(args, name) for name in names) == wanted
    seen = script(monkeypatch, ["none"] * 100 + ["\\boxed{1}"] * 100)
    assert run_script("eval_math", "--model", model_dirs["qwen2"], "--benchmarks", "demo", "--k", 1,
                      "--max_new_tokens", 20, "--out", tmp_path / "out") == 0
    found = {name: (r["problems"], r["no_box"]) for name, r in results(tmp_path / "out").items()}
    assert found == {"demo": (100, 1), "demo guided": (100, 0)}
    assert [all("Strategy:\nType: " in x for x in batch) for batch in seen] == [False, False, True, True]


# ---- going on

def killed_in_its_third_write(argv: list):
    true = eval_math.write_jsonl

    def write(path, rows):
        true(path, rows if rows[0]["batch"][0] < 8 else rows[:1])
        if rows[0]["batch"][0] == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    eval_math.write_jsonl = write
    whole_run_for_real("eval_math", argv)


def test_resumed_from_anywhere_equals_uninterrupted(evaluate, file, tmp_path):
    hints = write_rows(tmp_path / "s.jsonl", [{"id": str(i), "strategy": "Double it."} for i in range(3)])
    settings = ["--k", 3, "--generation_batch_size", 4, "--strategies", hints]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert evaluate(file, "whole", *settings) == 0
    child = Child(killed_in_its_third_write, [whole / "config.json", "--out", broken])
    assert child.ended() == -signal.SIGKILL and not (broken / "results.json").exists()
    text, killed = ((out / "generations.jsonl").read_bytes() for out in (whole, broken))
    assert (text.count(b"\n"), killed.count(b"\n")) == (30, 9)
    for kept in (len(killed), 0, len(text) // 3, len(text)):  # the third is in the middle of a line
        (broken / "generations.jsonl").write_bytes(text[:kept])
        assert evaluate(file, "broken", *settings) == 0
        assert (broken / "generations.jsonl").read_bytes() == text and results(broken) == results(whole)
        (broken / "results.json").unlink()


@pytest.mark.parametrize("code, size", [(130, 4), (2, 3)])
def test_finished_batches_are_kept(code, size, evaluate, file, tmp_path, monkeypatch, capsys):
    """By a stop, and where memory runs out: there a smaller batch may go on."""
    sizes, true = [], common.generate

    def generate(model, tokenizer, prompts, *rest):
        sizes.append(len(prompts))
        if len(sizes) == 3 and code == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        common.Stop.asked = len(sizes) == 3
        return true(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(common, "generate", generate)
    assert evaluate(file, "out", "--k", 2, "--generation_batch_size", 4) == code
    said = capsys.readouterr()
    if code == 130:
        goes_on = f"8 of 14 completions; the same command with --out {tmp_path / 'out'} goes on\n"
        assert said.out.endswith(goes_on) and said.err == ""
    else:
        assert "out of memory" in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()
    assert evaluate(file, "out", "--k", 2, "--generation_batch_size", size) == 0
    assert sizes == [4, 4, 4, *([4, 2] if size == 4 else [3, 3])]
    assert "8 of them are there already" in capsys.readouterr().out


def test_two_evaluations_at_once(evaluate, file, tmp_path, capsys, monkeypatch):
    codes, true = [], common.generate
    monkeypatch.setattr(common, "generate", lambda *args: codes.append(evaluate(file)) or true(*args))
    assert evaluate(file) == 0 and codes == [2]
    assert "another evaluation is writing there" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "out" / "generations.jsonl")) == 28


# ---- strategies

@pytest.mark.parametrize("key", ["problem", "id", "own"])
def test_strategies(key, evaluate, tmp_path, monkeypatch, capsys):
    rows = [{**row, "id": f"n{i}"} for i, row in enumerate(problems(3))]
    helped = [{**row, "strategy": f"Own {row['id']}."} for row in rows[1:]]
    data = write_rows(tmp_path / "sums.jsonl", rows[:1] + helped if key == "own" else rows)
    hints = write_rows(tmp_path / "s.jsonl", [
        *({"strategy": row["strategy"], key: row.get(key)} for row in helped),
        {"problem": "Not in there", "strategy": "Useless."},
        {**rows[0], "strategy": None, "candidates": []}])  # sgpo.py found none
    with open(hints, "a") as cut_by_a_kill:
        cut_by_a_kill.write('{"problem": "What is 0 + 0?", "strat')
    alone, guided = [0, 1, 2, 1, 1, 1], [2, 2, 4, "none"]  # right: 1/2, 1/2, 0 and 1, 1/2
    seen = script(monkeypatch, [f"\\boxed{{{x}}}" for x in alone + guided])
    assert evaluate(data, "out", "--k", 2, "--strategies", "own" if key == "own" else hints) == 0
    alone, guided = results(tmp_path / "out").values()
    assert (alone["avg@k"], guided["avg@k"], guided["problems"]) == (pytest.approx(1 / 3), 0.75, 2)
    assert (guided["strategy adds"], guided["strategy adds_interval"]) == (0.5, [0.5, 0.5])
    with_first = ["Strategy:\nOwn n1.\n\nProblem:\nWhat is 1 + 1?" in text for text in seen[1]]
    assert with_first == [True, True, False, False] and "Strategy" not in "".join(seen[0])
    assert "the strategy adds +0.500 [+0.500, +0.500]" in capsys.readouterr().out


# ---- comparisons

def result_of(evaluate, tmp_path, monkeypatch, out: str, alone: str, guided: str, *more, hint="Add.") -> str:
    """An evaluation whose samples are right where there is a 1: "10 11" is the first of two, then both."""
    rows = [{**row, "strategy": hint} for row in problems(len(alone.split()))]
    script(monkeypatch, [f"\\boxed{{{2 * i if right == '1' else 9}}}" for way in (alone, guided)
                         for i, samples in enumerate(way.split()) for right in samples])
    assert evaluate(write_rows(tmp_path / "sums.jsonl", rows), out, "--strategies", "own", "--k",
                    len(alone.split()[0]), *more) == 0
    return str(tmp_path / out)


def test_compare_by_hand(evaluate, run_script, tmp_path, monkeypatch, capsys):
    a = result_of(evaluate, tmp_path, monkeypatch, "a", "00 10 11 01", "10 10 01 10", "--top_p", 0.9)
    b = result_of(evaluate, tmp_path, monkeypatch, "b", "10 10 11 11", "11 11 11 11", "--top_p", 0.8)
    capsys.readouterr()
    assert run_script("eval_math", "--compare", a, b) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == [f"A: {a}", f"B: {b}", "top_p: 0.9 in A, 0.8 in B", "A B B - A 95% interval"]
    assert {*lines} > {  # differences 1/2, 0, 0, 1/2: resampled, 1/16 of their means are 0 and 1/16 are 1/2
        "sums.jsonl avg@2 0.500 0.750 +0.250 [+0.000, +0.500]",
        "sums.jsonl pass@2 0.750 1.000 +0.250 [+0.000, +0.750]",
        "sums.jsonl maj@2 0.500 1.000 +0.500 [+0.000, +1.000]",  # a tie goes to the first answer, 9
        "sums.jsonl mean_length 10.000 10.000 +0.000 [+0.000, +0.000]",
        "sums.jsonl guided avg@2 0.500 1.000 +0.500 [+0.500, +0.500]",  # 1/2 more everywhere
        "sums.jsonl guided strategy adds 0.000 0.250 +0.250 [+0.000, +0.500]"}
    assert run_script("eval_math", "--compare", b, a) == 0
    assert "avg@2 0.750 0.500 -0.250 [-0.500, " in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_compared(evaluate, run_script, tmp_path, monkeypatch, capsys):
    a, *others = (result_of(evaluate, tmp_path, monkeypatch, *way) for way in (
        ("a", "00 10", "10 10"), ("other k", "0 1", "1 1"), ("other problems", "00 10 11", "10 10 10")))
    others.append(result_of(evaluate, tmp_path, monkeypatch, "hints", "00 10", "10 10", hint="Double it."))
    script(monkeypatch, ["none"] * 12)
    (tmp_path / "sums.jsonl").rename(tmp_path / "b.jsonl")
    assert evaluate(tmp_path / "b.jsonl", "b") == 0
    (tmp_path / "results.json").write_text("[1]")
    for folders, said in (([a], "two results directories, not 1"), ([a, tmp_path], "a finished evaluation"),
                          ([a, "missing"], "a finished evaluation"), ([a, tmp_path / "b"], "no benchmark is"),
                          *(([a, other], "strategies or --k in sums.jsonl") for other in others)):
        assert said in refused(capsys, run_script, "eval_math", "--compare", *folders)


# ---- refusals

def refused(capsys, run, *argv) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_same_directory_again(evaluate, file, tmp_path, model_dirs, run_script, monkeypatch, capsys):
    assert evaluate(file) == 0
    table = capsys.readouterr().out.splitlines()[2:4]
    out, weights = tmp_path / "out", model_dirs["qwen2"] / "model.safetensors"
    assert run_script("eval_math", out / "config.json", "--out", tmp_path / "again") == 0
    assert results(tmp_path / "again") == results(out)  # a config.json repeats its evaluation
    monkeypatch.setattr(eval_math, "load_model", None)  # no more is sampled
    before, stamp = {path: path.read_bytes() for path in out.iterdir()}, weights.stat()
    assert "(seed: 0 there, 1 now)" in refused(capsys, evaluate, file, "out", "--seed", 1)
    assert "holds no results of ours" in refused(capsys, evaluate, file, ".")
    os.utime(weights, (1, 1))  # trained on, and saved in the same place
    assert "strategies or weights" in refused(capsys, evaluate, file)
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert evaluate(file) == 0 and capsys.readouterr().out.splitlines()[-2:] == table
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    write_rows(file, problems(5))
    assert "results of other problems" in refused(capsys, evaluate, file)
    (out / "config.json").write_text(json.dumps({"script": "sgpo", "flags": {"lr": 1e-6}}))
    assert "script: 'sgpo' there, 'eval_math' now" in refused(capsys, evaluate, file)
