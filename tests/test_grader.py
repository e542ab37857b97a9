"""The grader: the rules of grade's docstring as cases, hostile input, the worker's life and death, leaks."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import extract_answer, gives_away, gold_is_gradable, grade, grade_batch, grader_counts

HERE = Path(common.__file__).resolve().parent

# An answer, two tildes, a gold; pairs apart by two semicolons. These are right ...
RIGHT = r"""
3 ~~ 3 \text{ more} ;; 5 \text{ mL at STP} ~~ 5 ;; 30 \text{ boys and girls} ~~ 30 ;; 18 \text{ more} ~~ 18
\emptyset ~~ \varnothing ;; 62.5\% ~~ 62.5 \text{ percent} ;; 2\text{ and }3 ~~ 2,3 ;; 2:00 ~~ 2:00
5\% ~~ 0.05 ;; 62.5\% ~~ 62.5 ;; 0.625 ~~ 62.5\% ;; \dfrac{5}{8} ~~ 62.5\% ;; 42 000 ~~ 42000 ;; 90° ~~ 90
42,000 ~~ 42000 ;; \varnothing ~~ \emptyset ;; 62.5 \text{ percent} ~~ 62.5\% ;; 62.5 ~~ 62.5\% ;; YES ~~ Yes
62.5\% ~~ \frac58 ;; 4.5\cdot10^{33} ~~ 4.5e33 ;; 45 \times 10^{32} ~~ 4.5e33 ;; x > 2 ~~ (2,\infty)
-2 \le x \le 7 ~~ x \in [-2,7] ;; x = 3 or x = 5 ~~ 3, 5 ;; 3 \text{ and } 5 ~~ 3,5 ;; x=3, x=5 ~~ 3,5
x \in \{3, 5\} ~~ 3,5 ;; -\frac{1}{2} ~~ \frac{-1}{2} ;; \frac{1}{-2} ~~ -\frac12 ;; \$32,348 ~~ \$32,\!348
864 ~~ 864 \mbox{ inches}^2 ;; 15 \text{ cm²} ~~ 15\mbox{ cm}^2 ;; 18.90 \text{ dollars} ~~ \$18.90
32348 ~~ \$32,\!348 ;; 5.4 ~~ 5.4 \text{ cents} ;; 90\degree ~~ 90^\circ ;; \angle ABC = 90^\circ ~~ 90^\circ
No. ~~ No ;; 3:30 \text{ PM} ~~ 3:30 \text{ p.m.} ;; 3{:}30 ~~ 3:30 ;; \pi/2 ~~ \frac{\pi}{2} ;; 3+4 ~~ 7
0.5\pi ~~ \frac{\pi}{2} ;; \frac{1}{\tan x} ~~ \cot x ;; \ln(9) ~~ 2 \ln 3 ;; 2x+3 = y ~~ y = 2x+3 ;; b ~~ B
\frac{1}{2}+\frac{1}{3} ~~ \frac56 ;; (3,\infty)\cup(-\infty,2) ~~ (-\infty, 2) \cup (3, \infty) ;; {42} ~~ 42
\mathbb{R} \setminus \{-3\} ~~ (-\infty,-3) \cup (-3,\infty) ;; 2x+3 ~~ y = 2x+3 ;; x^2+1 ~~ f(x)=x^2+1
10x-14y+22z+8=0 ~~ 5x - 7y + 11z + 4 = 0 ;; 5x+11z = 7y-4 ~~ 5x - 7y + 11z + 4 = 0 ;; (b+2)(a+5) ~~ (a+5)(b+2)
ab+2a+5b+10 ~~ (a+5)(b+2) ;; \frac{11}{20}+\frac{9a}{20} ~~ \frac{11+9a}{20} ;; 3, 4 ~~ ['3', '4']
\sqrt{2} ~~ sqrt(2) ;; \sqrt2 ~~ sqrt(2) ;; 2x^2 ~~ 2*x**2 ;; 2x^{2} ~~ 2*x**2 ;; x^{-1} ~~ x**-1
42 ~~ \[42\] ;; 1 \pm \sqrt{19} ~~ 1-\sqrt{19}, 1+\sqrt{19} ;; -2, 1+\sqrt5, 1-\sqrt5 ~~ \{1\pm\sqrt{5},-2\}
1 + \sqrt{19} \text{ and } 1 - \sqrt{19} ~~ 1 \pm \sqrt{19} ;; 1+\sqrt{5},1-\sqrt{5},-2 ~~ \{1\pm\sqrt{5},-2\}
(52)_8 ~~ 52_8 ;; \textbf{B} ~~ B ;; \text{(B) } 36 ~~ B ;; 3, \frac{1}{2} ~~ \frac12,3 ;; \sqrt[3]{8} ~~ 2
(1,2),(3,4) ~~ (3,4),(1,2) ;; 2^{1/2} ~~ \sqrt2 ;; n=19 ~~ 19 ;; A = \pi r^2 = 9\pi ~~ 9\pi ;; 50\% ~~ 0.5
\text{x-axis} ~~ x-axis ;; 48 \text{ km/h} ~~ 48 \text{ kilometers per hour} ;; 12\,\text{cm} ~~ 12
48 \text{ kph} ~~ 48 \text{ km/h} ;; 10\text{ m/s}^2 ~~ 10 ;; 3 \text{ hours} ~~ 3 ;; 50\% ~~ \frac12
0 \le x < 1 ~~ [0,1) ;; \lfloor 7/2 \rfloor ~~ 3 ;; e^{2x} ~~ (e^x)^2 ;; q - p ~~ -p+q ;; -(p-q) ~~ q-p
a_1 + a_2 ~~ a_2+a_1 ;; 6.72 \times 10^{-5} ~~ .0000672 ;; 1,\!234 ~~ 1234 ;; \sqrt{x^2+1} ~~ (x^2+1)^{1/2}
\frac{\sqrt{21}}{5} ~~ \frac{1}{5}\sqrt{21} ;; (x,y) = (1,2) ~~ (1,2) ;; \boxed{5} ~~ 5 ;; (1,\!000) ~~ 1000
0.333333... ~~ 0.333333... ;; 100 \text{ sq. ft.} ~~ 100 \text{ ft}^2 ;; \frac{3}{4} \text{ cup} ~~ \frac34
\frac{-35}{9} ~~ -\frac{35}{9} ;; \frac{20000}{\pi} ~~ 20000/\pi ;; \sin^2 x + \cos^2 x ~~ 1 ;; €5 ~~ 5
60 \text{ minutes} ~~ 60 \text{ min} ;; x \in (2,\infty) ~~ x>2 ;; £5 ~~ 5 ;; 35 percent ~~ 35\% ;; C) ~~ C
\mathbf{k} = 19 ~~ 19 ;; \angle A = 30^\circ ~~ 30 ;; x = -4 \text{ or } x = 9 ~~ -4, 9 ;; x=-4,\ 9 ~~ -4,9
\left(8,-1,\frac{10}{2}\right) ~~ (8,-1,5) ;; \sqrt{9 \cdot 5} ~~ 3\sqrt5 ;; 3 \cdot \sqrt{5} ~~ 3\sqrt5
-4 + 9 \pi ~~ 9\pi-4 ;; 7+3\mathrm{i} ~~ 7+3i ;; 7 + 3 \cdot i ~~ 7+3i ;; 7+3\imath ~~ 7+3i ;; |{-3}| ~~ 3
p(x) = x^2-3x-4 ~~ x^2-3x-4 ;; 4x+y-7=0 ~~ y=-4x+7 ;; \text{1203}_4 ~~ 1203_4 ;; \textbf{(C) }12 ~~ C
\text{Evelyn.} ~~ \text{Evelyn} ;; \left(\frac{1}{2}\right)^3 ~~ \frac18 ;; \arccos(0) ~~ \pi/2 ;; `42` ~~ 42
\frac{x^2-1}{x-1} ~~ x+1 ;; \binom{n}{2} ~~ \frac{n(n-1)}{2} ;; \approx 3.14 ~~ 3.14 ;; (1,2) ~~ (a,b)=(1,2)
\text{None} ~~ \text{none} ;; 10\,\mathrm{m/s} ~~ 10 ;; 9.8\ \mathrm{m/s^2} ~~ 9.8 ;; **42** ~~ 42
3.0\times10^{8}\ \mathrm{m\,s^{-1}} ~~ 3e8 ;; \frac{3}{4}\text{ of the cake} ~~ \frac34 ;; 42\\ ~~ 42
42 \square ~~ 42 ;; \bf{42} ~~ 42 ;; \Large 42 ~~ 42 ;; E_2, E_1 ~~ E_{1}, E_{2} ;; \rho_0 ~~ \rho_{0}
L_\odot ~~ L_{\odot} ;; \arcsin\frac{10}{13} ~~ np.arcsin(10/13) ;; \omega\hbar(v+0.5) ~~ \hbar\omega(v+1/2)
t \in (0,4] ~~ t(0,4] ;; \sin^{-1}(10/13) ~~ \arcsin(10/13) ;; \frac{m_{p} c^2}{2} ~~ 0.5 m_p c^{2}
"""

# ... and these are wrong.
WRONG = r"""
42_{10} ~~ 42_5 ;; 1:10 ~~ 3:30 ;; 3,5,5 ~~ 3,5 ;; 0.35\% ~~ 0.35 ;; aB^2 ~~ Ab^2 ;; 52_{10} ~~ 52_8
x=5 ~~ x=6 ;; 4.5 \times 10^{32} ~~ 4.5e33 ;; (4,2) ~~ (2,4) ;; [1, 3] ~~ [1, 2] ;; \rho_1 ~~ \rho_{0}
0.62 ~~ 62.5\% ;; \{2,4\} ~~ (2,4) ;; 3:30 \text{ AM} ~~ 3:30 \text{ PM} ;; 1/2^{99} ~~ 1/2^{98} ;; y=5 ~~ x=5
25_8 ~~ 52_8 ;; 0.35\% ~~ 35\% ;; 3500\% ~~ 35\% ;; \frac{22}{7} ~~ \pi ;; 6.708203932499369 ~~ 3\sqrt5
x < 2 ~~ x > 2 ;; x \ge 2 ~~ x > 2 ;; (2,\infty] ~~ [2,\infty) ;; \text{No} ~~ \text{Yes} ;; (A) ~~ \text{(B)}
\text{yes or no} ~~ yes ;; \text{odd} ~~ \text{even} ;; \text{A or B} ~~ B ;; A, B ~~ B ;; \frac{\pi}{2} ~~ 90
48 \text{ mph} ~~ 48 \text{ km/h} ;; 15 \text{ cm} ~~ 15 \text{ m} ;; 15 \text{ cm} ~~ 15 \text{ cm}^2
y = 2x - 3 ~~ y = 2x+3 ;; 2x+3=0 ~~ y=2x+3 ;; 0=0 ~~ y=2x+3 ;; x=x ~~ y = 2x+3 ;; 2,2,3 ~~ 2,3 ;; 3 ~~ 3,5
1+\sqrt{19} ~~ 1 \pm \sqrt{19} ;; 1 \pm \sqrt{17} ~~ 1 \pm \sqrt{19} ;; 2^{100} ~~ 2^{100}+1 ;; 2k+1 ~~ 2k
\sin x ~~ \cos x ;; \tan x ~~ \cot x ;; e^{2x} ~~ e^{x^2} ;; 1-i ~~ 1+i ;; \sqrt{-4} ~~ -2i ;; 3i ~~ 3
\sqrt{2} ~~ 2 ;; \text{Tuesday or Thursday} ~~ Tuesday ;; \text{not Tuesday} ~~ Tuesday ;; x ~~ y ;; 42x ~~ 42
\emptyset ~~ 0 ;; (-\infty, 2) \cup [3, \infty) ~~ (-\infty, 2) \cup (3, \infty) ;; (-\infty,3] ~~ (-\infty,3)
\mathbb{R} ~~ (0,\infty) ;; \infty ~~ -\infty ;; (8,-1) ~~ (8,-1,5) ;; 20000/\pi^2 ~~ \frac{20000}{\pi}
\frac{1}{2^{999}} ~~ 0 ;; x+41=42 ~~ 42 ;; \text{None} ~~ 42 ;; \ldots ~~ 42 ;; \int_0^{42} 1 dx ~~ 42
\lim_{x\to 42} x ~~ 42 ;; \max(41,42) ~~ 42 ;; 9^{9^{9^{9}}} ~~ 42 ;; x=41, x=42 ~~ 42 ;; 12,345,67 ~~ 1234567
f(x) = x^2+2 ~~ f(x) = x^2+1 ;; 1.234.567 ~~ 1234567 ;; -4 < x < 9 ~~ -4,9 ;; 9 ~~ -4,9 ;; 8,-1,5 ~~ (8,5,-1)
(8,-1,5,0) ~~ (8,-1,5) ;; (-6,\frac13] ~~ [-6,\frac13) ;; (-\infty,-3) ~~ (-\infty,-3) \cup (-3, \infty)
(-\infty,3) \cup (3,\infty) ~~ (-\infty,-3) \cup (-3, \infty) ;; 9 - 4\pi ~~ 9\pi-4 ;; \sqrt{58} ~~ 7+3i
x^2-3x ~~ x^2-3x-4 ;; y^2-3y-4 ~~ x^2-3x-4 ;; 9 ~~ \begin{pmatrix} 2 & 7 \\ 1 & 8 \end{pmatrix} ;; x+1 ~~ x-1
y < -4x+7 ~~ y=-4x+7 ;; y \neq -4x+7 ~~ y=-4x+7 ;; 1203 ~~ 1203_4 ;; \text{Evelyn and Carla} ~~ \text{Evelyn}
\text{Evelyn, Carla} ~~ \text{Evelyn} ;; \text{parabola} ~~ \text{ellipse} ;; \text{(B), (C)} ~~ \text{(B)}
\text{B?} ~~ C ;; 2^{98} ~~ 2^{99} ;; \log_2 3 ~~ \log_3 2 ;; 5 \text{ feet} ~~ 5 \text{ meters}
30 \text{ if } x>0 ~~ 30 ;; 30 \leq x \leq 31 ~~ 30 ;; 30-31 ~~ 30 ;; 30\to31 ~~ 30 ;; 30\cdot a ~~ 30
5\text{, 6} ~~ 5 ;; 5\text{ or six} ~~ 5 ;; 5\text{ at least} ~~ 5 ;; 5\text{ is false} ~~ 5
9 ~~ 9\text{ or more}
\text{either 30 or 31} ~~ 30 ;; a=30,b=31 ~~ 30 ;; \text{gold} ~~ 30 ;; 30=x=31 ~~ 30 ;; E_1 ~~ E_{1}, E_{2}
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ~~ ")) for line in table.strip().splitlines() for pair in line.split(" ;; ")]


def boxed(answer: str) -> str:
    return f"Adding up, we get\n\\[\\boxed{{{answer}}}\\]"


@pytest.mark.parametrize("answer, gold", pairs(RIGHT))
def test_right(answer, gold):
    assert grade(boxed(answer), gold) == 1.0


@pytest.mark.parametrize("answer, gold", pairs(WRONG))
def test_wrong(answer, gold):
    assert grade(boxed(answer), gold) == 0.0


@pytest.mark.parametrize("response, expected", [
    (r"so \boxed{42}.", "42"), (r"\boxed {42}", "42"), (r"\boxed{18}, no: \boxed{-18}", "-18"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"), (r"<think>\boxed{1}</think> it is 2", None),
    (r"</think>\boxed{1}</think>\boxed{2}<think>\boxed{3}", "3"), (r"\boxed{41} and \boxed{4", "41"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{3} } }", "3"),
    (r"\boxed{x = \boxed{5}}", "x = {5}"), (r"{ { \boxed{3}", "3"), (r"\boxed{}", ""), ("it is 42", None),
    (r"\boxed 5", None), (r"\fbox{5}", None), ("", None), (r"\boxed{7}" + "x" * 30_000, None)])
def test_extract(response, expected):
    assert extract_answer(response) == expected


def test_extraction_is_linear():
    start = time.monotonic()
    for text in ("\\boxed{" * 200_000, "\\boxed{1}" * 100_000, "{" * 1_000_000, "\\boxed" + " " * 1_000_000):
        extract_answer(text)
    assert time.monotonic() - start < 2


def shared(name: str) -> list[dict]:
    """Rows of a file in <repo>/../shared; the test is skipped where there is none."""
    path = HERE.parent / "shared" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_public_sample_and_golds_of_benchmarks():
    rows = shared("grader_sample.jsonl")
    assert [row for row in rows if bool(grade(row["response"], row["gold"])) != row["expected"]] == []
    golds = [row["answer"] for name in ("math500", "amc23", "aime24") for row in shared(f"data/{name}.jsonl")]
    assert [gold for gold in golds if not gold_is_gradable(gold) or not grade(boxed(gold), gold)] == []
    others = [(a, g) for a, g in zip(golds, golds[1:]) if a.split("=")[-1] != g.split("=")[-1]]
    assert [pair for pair in others if grade(boxed(pair[0]), pair[1])] == []


# ---- hostile and odd input

GOLDS = ["30", r"\frac{1}{2}", "x^2+1", r"(2,\infty)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "1,2",
         r"\lfloor x \rfloor"]
HOSTILE = [
    "9^{9^{9^{9}}}", "9**9**9**9", "((((90!)!)!)!)", "100000000!", "3" + "!" * 300, "(" * 99 + "3" + ")" * 99,
    r"\sqrt{" * 150 + "2" + "}" * 150, r"\sqrt" * 190 + "2", "9" * 900, r"\frac{1}{1+" * 99 + "1" + "}" * 99,
    "9" * 1_000_000, "30\0", "\u202e03", "3\u200b0", "𝟛𝟘", "\ud800", "29=30", "=".join(["30"] * 300) + "=31",
    "eval(\"open('M','w')\")", "(lambda: open('M','w'))()", r"\text{__import__('os').system('touch M')}",
    r"\sum_{k=1}^{10^9} k", r"\int_0^1 x^{x^x} dx", "2^" * 400, ",".join(map(str, range(200))), "30 or 31",
    "x^" + "-" * 900 + "1", "," * 900, "=" * 900, "$" * 500, "1" + r"\%" * 400, r"\lfloor 9^{9^{9^9}}\rfloor",
    "(a+b+c+d+f+g+h)^{999}", r"\sin(10^{1000})", "|" * 200, "[" * 400, r"\pm" * 300, "\\" * 901, "1e99999999",
    "1e-9999", r"\begin{pmatrix}" * 40, r"\sqrt[10^{400}]{2}", r"\log_0 0", "1_" * 300 + "2",
    "<".join("x" * 300), r"(1,2)\cup" * 100 + "(3,4)", r"\gcd(9^{99999}, 3)"]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for gold in GOLDS:
        start = time.monotonic()
        assert grade(boxed(answer), gold) == 0.0
        assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("response", [None, 5, b"\\boxed{1}", ["\\boxed{1}"], {}, "", "\\boxed{" * 20_000])
def test_odd_responses(response):
    assert grade(response, "1") == grade(response, response) == 0.0


@pytest.mark.parametrize("gold", [
    "", "   ", "proof", "Not found", r"\frac{1}{", "}{", "+", r"\frac", "1/0", None, 5, [],
    "9" * 5000, "$$", "=", "x=", r"\left("])
def test_an_unparsable_gold_never_scores(gold):
    grader_counts()
    assert not gold_is_gradable(gold) and grade(boxed(str(gold)), gold) == 0.0
    assert grader_counts()["unparsable_gold"] == 1


def test_counts_are_reset_by_reading():
    grader_counts()
    assert grade_batch([boxed("1"), boxed("2"), "1", boxed("1")], ["1", "1", "1", ""]) == [1.0, 0.0, 0.0, 0.0]
    counts = {"right": 1, "wrong": 1, "no_box": 1, "timeouts": 0, "crashes": 0, "unparsable_gold": 1}
    assert grader_counts() == counts and grader_counts() == dict.fromkeys(counts, 0)


@settings(max_examples=40, deadline=None)
@given(st.text(r"\{}[]()0123456789.,+-*/^_=<>|!%$:; xyie'", max_size=40), st.sampled_from(GOLDS))
def test_any_latex_like_text(answer, gold):
    assert grade(boxed(answer), gold) in (0.0, 1.0) and gives_away(answer, gold) in (True, False)


# ---- the worker

ASK = (boxed(r"\lfloor 7/2 \rfloor"), "3")  # only Math-Verify knows floor
STUCK = (boxed(r"\lfloor 9^{99999999} \rfloor"), r"\lfloor 9^{99999998} \rfloor")


def graded_afresh(question: tuple[str, str]) -> str:
    """The outcome by the worker, not from the cache."""
    common._ask_worker.cache_clear()
    grader_counts()
    grade(*question)
    return max(grader_counts().items(), key=lambda item: item[1])[0]


def soon_dead(pid: int) -> bool:
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_stuck_worker_ends_in_time_and_the_callers_alarm_is_left_alone():
    fired = []
    old = signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        for question, outcome in ((ASK, "right"), (STUCK, "timeouts"), (ASK, "right")):
            start = time.monotonic()
            assert graded_afresh(question) == outcome and time.monotonic() - start < 5
        assert 80 < signal.getitimer(signal.ITIMER_REAL)[0] < 100 and not fired
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_killed_worker_is_replaced():
    assert graded_afresh(ASK) == "right"
    common._worker.kill()
    assert soon_dead(common._worker.pid)
    assert graded_afresh(ASK) == "right"  # killed while idle: nothing is lost
    threading.Timer(0.5, common._worker.kill).start()
    assert graded_afresh(STUCK) == "crashes"  # killed at work: one verdict
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    threading.Timer(0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        graded_afresh(STUCK)
    assert graded_afresh(ASK) == "right"


def test_the_worker_loads_no_torch_and_outlives_a_stop():
    assert graded_afresh(ASK) == "right"
    worker = common._worker
    for stop in (signal.SIGINT, signal.SIGTERM):  # both go to all processes of a group
        worker.send_signal(stop)
    assert "torch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert graded_afresh(ASK) == "right" and common._worker is worker


def test_any_thread_may_grade():
    common._ask_worker.cache_clear()
    answers = [boxed(f"\\lfloor {n}/3 \\rfloor") for n in range(12)]
    with ThreadPoolExecutor(12) as threads:
        rewards = list(threads.map(grade, answers, [str(n // 3 + n % 2) for n in range(12)]))
    assert rewards == [1.0, 0.0] * 6


def test_a_script_without_a_main_guard_its_fork_and_no_orphan_after_sigkill(tmp_path):
    """In a folder with a module that must not be imported from there; the fork has a worker of its own."""
    (tmp_path / "sympy.py").write_text("raise SystemExit('imported from the current directory')")
    (tmp_path / "user.py").write_text(textwrap.dedent(f"""
        import os, sys, time
        sys.path[0] = {str(HERE)!r}
        import common
        open("runs", "a").write("x")
        right = lambda: common._ask_worker.cache_clear() or common.grade{ASK!r} == 1.0
        assert right()
        mine, pid = common._worker.pid, os.fork()
        ok = right() and (common._worker.pid == mine) == (pid > 0)
        if pid == 0:
            os._exit(not ok)
        print(ok and os.waitpid(pid, 0)[1] == 0, mine, flush=True)
        time.sleep(60)
        """))
    parent = subprocess.Popen([sys.executable, "user.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": ""})
    ok, pid = parent.stdout.readline().split()
    assert ok == "True" and Path(f"/proc/{pid}").exists() and (tmp_path / "runs").read_text() == "x"
    parent.kill()
    assert soon_dead(int(pid))
    parent.communicate()


# ---- does a strategy give the answer away?

LEAKS = r"""
so x = 42 ~~ 42 ;; The answer is $42$. ~~ 42 ;; Answer: 42. ~~ 42 ;; Final result - 42. ~~ 42 ;; It is B ~~ B
about 42\,000 ~~ 42000 ;; 42,000 coins ~~ 42000 ;; Then 0.5 remains ~~ \frac12 ;; 50 percent of it ~~ 0.5
It becomes $\dfrac{3}{4}$ ~~ 0.75 ;; get 1/2 ~~ \frac{1}{2} ;; \(a+b=17\) ~~ 17 ;; and so x is 3. ~~ 3
so x = \sqrt{2} ~~ \sqrt{2} ;; we find 2x + 3 ~~ 2x+3 ;; $y = 2x+3$ ~~ 2x+3 ;; expand $(x+1)^2$ ~~ x^2+2x+1
$x=3$ or $x=5$ ~~ 3, 5 ;; the interval $(2, 5]$ ~~ (2,5] ;; $4.5\times10^{33}$ ~~ 4.5e33 ;; \boxed{12} ~~ 12
the day is Tuesday ~~ \text{Tuesday} ;; It is on Tuesday ~~ Tuesday ;; call it "Even", say ~~ \text{even}
so 12\text{ cm} ~~ 12 ;; angle of $\frac{\pi}{4}$ ~~ \frac{\pi}{4} ;; the result is 0. ~~ 0 ;; choose (B) ~~ B
"""
NO_LEAKS = r"""
Steps: 1. Set up. 2. Solve. 3. Check. ~~ 2 ;; Step 1: Do. Step 2: Do. ~~ 1 ;; Combine steps 1 and 2. ~~ 2
Use the result of step 2 to finish. ~~ 2 ;; **1.** Do ~~ 1 ;; To get the result: 1. Set up. 2. Solve. ~~ 1
Complete the square of $x^2 + bx$ ~~ 2 ;; Sum of a_1 and a_2 ~~ 2 ;; Consider two cases. ~~ 2 ;; Use 3*4 ~~ 3
take the 2nd derivative ~~ 2 ;; 142 or 420 or 4.2 ~~ 42 ;; Write 2x + 3 = 7 ~~ 3 ;; Use $x^{12}$ ~~ 12
a triangle ~~ A ;; There is no formula ~~ \text{No} ;; the subsets of $n$ ~~ n ;; only 3 of them ~~ 3, 5
Set $f'(x)=0$. ~~ 0 ;; Let $n=1$ at first. ~~ 1 ;; Factor $x^2-1=(x-1)(x+1)$. ~~ 1 ;; A 3-digit number ~~ 3
Reduce modulo 10 for the digit ~~ 10 ;; $\sin^2 x+\cos^2 x=1$. ~~ 1 ;; Divide by 2 and take the root ~~ 2
"""


@pytest.mark.parametrize("text, gold, leaks", [(*pair, True) for pair in pairs(LEAKS)]
                         + [(*pair, False) for pair in pairs(NO_LEAKS)])
def test_gives_away(text, gold, leaks):
    assert gives_away(text, gold) == leaks


def test_what_the_problem_states_is_no_leak_unless_it_is_said_to_come_out():
    assert not gives_away("Divide by 15.", "15", "Solve 15x = 225")
    assert gives_away("Divide, so x is 15.", "15", "Solve 15x = 225")
