"""Test the grader: its rules as a table of cases, hostile answers, the worker process, the leak check."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import common
from common import extract_answer, extract_gold, gold_is_gradable, grade, grader_counts
from sgpo import gives_away

HERE = Path(__file__).parent
SHARED = Path(__file__).parents[2] / "shared"  # public data that a checkout need not have
CASES = [line.split("\t") for line in (HERE / "grader_cases.tsv").read_text().splitlines()]
FLOOR = r"\lfloor 7/2 \rfloor"  # 3, which only Math-Verify can tell
STUCK = r"\lfloor 9^{99999999} \rfloor"
STUCK_GOLD = r"\lfloor 9^{99999998} \rfloor"


def boxed(answer: str) -> str:
    return f"Adding up, we get\n\\[\\boxed{{{answer}}}\\]"


def read_shared(name: str) -> list[dict]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def fresh_cache():
    common._ask_worker.cache_clear()
    common._can_be_graded.cache_clear()


@pytest.mark.parametrize("kind, answer, gold", CASES)
def test_case(kind, answer, gold):
    assert grade(boxed(answer), gold) == float(kind == "right")


@pytest.mark.parametrize("name", ["math500", "amc23", "aime24"])
def test_every_gold_of_a_benchmark_is_its_own_answer(name):
    golds = [row["answer"] for row in read_shared(f"data/{name}.jsonl")]
    assert [gold for gold in golds if grade(boxed(gold), gold) == 0.0] == []


def test_public_sample():
    rows = read_shared("grader_sample.jsonl")
    misjudged = [row for row in rows if grade(row["response"], row["gold"]) != float(row["expected"])]
    assert misjudged == []


# ---- extraction


@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{42}.", "42"),
    (r"\boxed {42}", "42"),
    (r"\boxed{18}, no: \boxed{-18}", "-18"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    (r"<think>\boxed{1}</think> it is 2", None),
    (r"</think>\boxed{1}</think>\boxed{2}<think>\boxed{3}", "3"),
    (r"\boxed{41} and \boxed{4", "41"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{3} } }", "3"),
    (r"\boxed{x = \boxed{5}}", "x = {5}"),
    (r"{ { \boxed{3}", "3"),
    (r"\boxed{}", ""),
    ("it is 42", None),
    (r"\boxed 5", None),
    (r"\fbox{5}", None),
    ("", None),
    (r"\boxed{7}" + "x" * 30_000, None)])
def test_extract_answer(response, expected):
    assert extract_answer(response) == expected


@pytest.mark.parametrize("solution, expected", [
    (r"so $\boxed{2}$", "2"),
    (r"so $\boxed 2$.", "2"),
    (r"so $\boxed2$", "2"),
    (r"so $\boxed -1.5$.", "-1.5"),
    (r"\boxed 1, so \boxed{3}", "3"),
    (r"\boxed{unclosed", None),
    ("it is 2", None)])
def test_extract_gold(solution, expected):
    assert extract_gold(solution) == expected


@pytest.mark.parametrize("text", [
    "\\boxed{" * 200_000, "\\boxed{1}" * 100_000, "{" * 1_000_000, "\\boxed" + " " * 1_000_000])
def test_extraction_takes_linear_time(text):
    start = time.monotonic()
    extract_gold(text)
    assert time.monotonic() - start < 1


# ---- hostile and odd input

HOSTILE = [
    "9^{9^{9^{9}}}", "9**9**9**9", "((((90!)!)!)!)", "100000000!", "(" * 99 + "3" + ")" * 99,
    "9" * 1_000_000,
    r"\sqrt{" * 150 + "2" + "}" * 150, r"\frac{1}{1+" * 99 + "1" + "}" * 99, "30\0", "\ud800", "29=30",
    "=".join(["30"] * 300) + "=31", "eval(\"open('M','w')\")", r"\text{__import__('os').system('touch M')}",
    r"\sum_{k=1}^{10^9} k", r"\sum_{k=1}^{10^9}k=30", r"\int_0^1 x^{x^x} dx", "2^" * 400, "30 or 31",
    ",".join(map(str, range(200))), "1" + r"\%" * 400, "(a+b+c+d+f+g+h)^{999}", r"\sin(10^{1000})", "[" * 400,
    "1e99999999", r"\begin{pmatrix}" * 40, r"\sqrt[10^{400}]{2}", r"\log_0 0", r"\gcd(9^{99999}, 3)",
    r"0.\overline{" + "3" * 900 + "}", "5" + r"\text{ million}" * 60, "(A)" * 300, "x=1," * 200,
    r"\{x\mid " * 90,
    r"\Gamma(10^{9})", "30" + r"\text{cm}, 30\text{mm}" * 50]


@pytest.mark.parametrize("gold", ["30", r"\frac{1}{2}", "x^2+1", r"(2,\infty)", "1,2", r"5 \text{ km/h}"])
@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answer_is_wrong_within_five_seconds(answer, gold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert grade(boxed(answer), gold) == 0.0
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []  # nothing was evaluated as Python


@pytest.mark.parametrize("response", [None, 5, b"\\boxed{1}", ["\\boxed{1}"], {}, "", "\\boxed{" * 20_000])
def test_odd_response_scores_zero(response):
    assert grade(response, "1") == 0.0


@pytest.mark.parametrize("gold", [
    "", "   ", "proof", "Not found", r"\frac{1}{", "}{", "+", r"\frac", "1/0", None, 5, [], "9" * 5000, "$$",
    "=", "x=", r"\left("])
def test_unparsable_gold_never_scores(gold):
    before = Counter(grader_counts)
    assert not gold_is_gradable(gold)
    assert grade(boxed(str(gold)), gold) == 0.0
    assert grader_counts - before == {"unparsable_gold": 1}


@pytest.mark.parametrize("response, gold, outcome", [
    (boxed("1"), "1", "right"), (boxed("2"), "1", "wrong"), ("1", "1", "no_box"),
    (boxed("1"), "", "unparsable_gold"),
    (boxed(STUCK), STUCK_GOLD, "timeouts")])
def test_outcome_is_counted(response, gold, outcome):
    before = Counter(grader_counts)
    grade(response, gold)
    assert grader_counts - before == {outcome: 1}


# ---- the worker process


def test_timeout_is_not_cached(fresh_cache, monkeypatch):
    monkeypatch.setattr(common, "WORKER_SECONDS", 1e-6)
    assert grade(boxed(FLOOR), "3") == 0.0
    monkeypatch.undo()
    assert grade(boxed(FLOOR), "3") == 1.0


def test_alarm_of_the_caller_is_left_alone(fresh_cache):
    signal.setitimer(signal.ITIMER_REAL, 100)
    grade(boxed(FLOOR), "3")
    assert 90 < signal.setitimer(signal.ITIMER_REAL, 0)[0] < 100


def test_killed_worker_is_replaced(fresh_cache):
    grade(boxed(FLOOR), "3")
    common._worker.kill()
    common._worker.wait()
    common._ask_worker.cache_clear()
    assert grade(boxed(FLOOR), "3") == 1.0


def test_worker_killed_at_work_costs_one_verdict(fresh_cache):
    grade(boxed(FLOOR), "3")
    before = Counter(grader_counts)
    threading.Timer(0.5, common._worker.kill).start()
    grade(boxed(STUCK), STUCK_GOLD)
    assert grader_counts - before == {"crashes": 1}


def test_worker_outlives_ctrl_c_and_loads_no_torch(fresh_cache):
    grade(boxed(FLOOR), "3")
    worker = common._worker
    worker.send_signal(signal.SIGINT)
    common._ask_worker.cache_clear()
    grade(boxed(FLOOR), "3")
    assert common._worker is worker
    assert "torch" not in Path(f"/proc/{worker.pid}/maps").read_text()


def test_any_thread_may_grade(fresh_cache):
    answers = [boxed(rf"\lfloor {n}/3 \rfloor") for n in range(12)]
    golds = [str(n // 3 + n % 2) for n in range(12)]  # every second one is wrong
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(grade, answers, golds)) == [1.0, 0.0] * 6


FORKING = """
import os, sys
sys.path[0] = sys.argv[1]
import common
right = lambda: common._ask_worker.cache_clear() or common.grade(sys.argv[2], "3") == 1.0
assert right()
parents_worker, pid = common._worker.pid, os.fork()
assert right()
assert (common._worker.pid == parents_worker) == (pid > 0)
if pid > 0:
    assert os.waitpid(pid, 0)[1] == 0
    print(parents_worker)
"""


def test_fork_has_its_own_worker_and_no_worker_outlives_its_parent(tmp_path):
    (tmp_path / "sympy.py").write_text("raise SystemExit('imported from the current directory')")
    (tmp_path / "user.py").write_text(FORKING)
    command = [sys.executable, "user.py", str(Path(common.__file__).parent), boxed(FLOOR)]
    environment = {**os.environ, "PYTHONPATH": ""}
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    stat = Path(f"/proc/{int(output.stdout)}/stat")
    for _ in range(100):
        if not stat.exists() or ") Z " in stat.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the worker is still running")


# ---- does a strategy give the answer away?

LEAKS = [
    "The answer is ${}$.", "Subtract: this leaves exactly ${}$ to report.",
    "1. Add.\n2. Simplify to get ${}$.",
    "Divide.\nHence the value is ${}$.", r"Finally, \boxed{{{}}}.",
    "Adding gives {}, as required.\nThen stop."]


@pytest.mark.parametrize("answer", ["4", "-7", "42", r"\frac{3}{4}", r"11\sqrt{2}", "(1,-2)", "52_8"])
@pytest.mark.parametrize("sentence", LEAKS)
def test_leak_is_found(sentence, answer):
    assert gives_away(sentence.format(answer), answer, "Find the number of pairs.")


@pytest.mark.parametrize("strategy, answer", [
    ("Step 1: Set up.\nStep 2: Solve.\nStep 4: Check.", "4"),
    ("1. Set up.\n2. Solve.\n3. Combine.", "3"),
    ("Split it in 2 parts, then combine steps 1 and 2.", "2"),
    ("Add up.\nReduce mod 7.", "7"),
    ("Complete the square of $x^2+bx$.", "2"),
    ("Consider 142, 420 and 4.2.", "42"),
    ("Use $x^{12}$ and $12y$.", "12"),
    ("Set the derivative $f'(x)=0$ and solve.", "0"),
    ("Draw a triangle.", "A")])
def test_harmless_strategy_passes(strategy, answer):
    assert not gives_away(strategy, answer)


def test_number_of_the_problem_is_no_leak():
    assert not gives_away("Divide both sides by 15 first.\nThen add.", "15", "Solve 15 + 3x = 225.")


def test_longer_number_in_the_problem_does_not_hide_a_leak():
    assert gives_away("Count them.\nThere must be 42 left.", "42", "There are 1420 coins.")
