"""From solutions to strategies: what is asked, what is accepted, what leaks, and what a server may do meanwhile."""
import fcntl
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import sgpo
from conftest import ROOT, read_jsonl, small_model, small_tokenizer, write_rows

KEY = "sk-secret-0123456789"
JUDGE = sgpo.SCORING_PROMPT.split("{")[0]
GOOD = "Problem type: sums.\nStrategy: doubling.\nSteps:\n1. Read the number.\n2. Double it."


# ---- reading the strategist's answers

@pytest.mark.parametrize("answer, strategy", [
    (GOOD, GOOD),
    (f"<think>Problem type: a\nStrategy: b\nSteps: c</think>\n\nSure!\n{GOOD}\n", GOOD),
    ("**Problem type:** sums.\n\n**Strategy:** doubling.\n\n### Steps:\n1. Double.", "Problem type: sums.\n\nStrategy: doubling.\n\nSteps:\n1. Double."),
    ("Type: A. Strategy: chain. Steps: +2, -2.", "Type: A. Strategy: chain. Steps: +2, -2."),
    ("Problem type: sums.\nSteps:\n1. Double.", None), ("Strategy: doubling.\nSteps:\n1. Double.", None), ("Problem type: sums.\nStrategy: doubling.", None),
    ("Problem type: sums.\nStrategy: doubling.\nSteps (in order):\n1. Double.", "Problem type: sums.\nStrategy: doubling.\nSteps (in order):\n1. Double."),
    ("### Problem type\nsums.\n### Strategy\ndoubling.\n### Steps\n1. Take 2**3 or 2**4.", "Problem type\nsums.\nStrategy\ndoubling.\nSteps\n1. Take 2**3 or 2**4."),
    (f"<think>\n{GOOD}\nBut wait", None), (sgpo.EXTRACTION_PROMPT, None), ("type: " * 5000 + "strategy: " * 5000, None),
    ("Problem type:\nStrategy:\nSteps:\n", None), ("Problem type: sums.\nStrategy: doubling.\nSteps:\n **", None), ("", None),
])
def test_a_strategy_has_three_parts(answer, strategy):
    assert sgpo.parse_strategy(answer) == strategy


@pytest.mark.parametrize("answer, n, scores", [
    ("Strategy 1: 0.75\nStrategy 2: 1\nStrategy 3: 0", 3, [0.75, 1.0, 0.0]),
    ("<think>Strategy 1: 0.1</think>\n**Strategy 1:** 0.9\n- Strategy 2: .5 (fine)", 2, [0.9, 0.5]),
    ("1: 0.2\n2. 0.3\n3) 0.4", 3, [0.2, 0.3, 0.4]), ("<think>Strategy 1: 0.5", 1, [None]), ("`Strategy 1`: `0.5`.\nStrategy 2 \u2013 0.6.\nScore 3: 1.0.", 3, [0.5, 0.6, 1.0]),
    ("| Strategy | Score |\n|---|---|\n| 1 | 0.7 |\n| 2 | 0.4 |", 2, [0.7, 0.4]),
    ("Strategy 2: 0.5", 3, [None, 0.5, None]), ("Strategy 1: 7\nStrategy 2: 8/10\nStrategy 3: 1.5", 3, [None, None, None]),
    ("Strategy 1: 0.8/1\nStrategy 2: 1/10", 2, [0.8, None]), ("They are all fine.", 2, [None, None]), ("Strategy 9: 0.9", 1, [None]), ("1.0", 1, [None]),
])
def test_scores(answer, n, scores):
    assert sgpo.parse_scores(answer, n) == scores


# ---- leaks

LEAKS = r"""
Multiply, which gives 42.  ~~  42  ;;  so x = 42  ~~  42  ;;  The answer is $42$.  ~~  42  ;;  Answer: 42.  ~~  42  ;;  Final result - 42.  ~~  42
about 42\,000  ~~  42000  ;;  42,000 coins  ~~  42000  ;;  obtain forty-two  ~~  42  ;;  Forty two in all  ~~  42  ;;  one hundred and five ways  ~~  105
Then 0.5 remains  ~~  \frac12  ;;  get \frac{1}{2}  ~~  0.5  ;;  get 1/2  ~~  \frac{1}{2}  ;;  it is 50%  ~~  \frac12  ;;  50 percent of it  ~~  0.5
one half of it  ~~  \frac{1}{2}  ;;  two thirds remain  ~~  2/3  ;;  It becomes $\dfrac{3}{4}$  ~~  0.75  ;;  $\frac{6}{8}$  ~~  \frac34
-3 is it  ~~  -3  ;;  negative three  ~~  -3  ;;  Divide by 7  ~~  7  ;;  the result is seven.  ~~  7  ;;  the answer is two.  ~~  2  ;;  \boxed{12}  ~~  12
Count the $2^{3}$ subsets  ~~  8  ;;  so x = \sqrt{2}  ~~  \sqrt{2}  ;;  we find 2x + 3  ~~  2x+3  ;;  $y = 2x+3$  ~~  2x+3  ;;  expand $(x+1)^2$  ~~  x^2+2x+1
$x=3$ or $x=5$  ~~  3, 5  ;;  roots 3 and 5  ~~  3,5  ;;  the interval (2,5] holds  ~~  (2,5]  ;;  the interval $(2, 5]$  ~~  (2,5]
the day is Tuesday  ~~  \text{Tuesday}  ;;  on tuesday, add  ~~  \text{Tuesday}  ;;  the answer is No.  ~~  \text{No}  ;;  choose (B)  ~~  \text{B}
The answer is B  ~~  B  ;;  an angle of $\frac{\pi}{4}$  ~~  \frac{\pi}{4}  ;;  62.5%  ~~  62.5\%  ;;  $4.5 \times 10^{33}$ erg  ~~  4.5e33
12 cm  ~~  12 \text{ cm}  ;;  so 12\text{ cm}  ~~  12  ;;  −3 with a typographic minus  ~~  -3  ;;  4​2 with an invisible space  ~~  42  ;;  x is \(42\)  ~~  $42$
"""
NO_LEAKS = r"""
Steps: 1. Set up. 2. Solve. 3. Check.  ~~  2  ;;  Steps:\n1. Set up.\n2. Solve it.\n3) Check  ~~  3  ;;  Step 1: Do. Step 2: Do.  ~~  1
Use the result of step 2 to finish.  ~~  2  ;;  Combine steps 1 and 2.  ~~  2  ;;  Combine steps 1 and 2.  ~~  1  ;;  (1) First. (2) Second.  ~~  2
**Steps:**\n**1.** Do  ~~  1  ;;  first, 1) do, 2) check  ~~  2  ;;  Steps: 1. Expand\n 2. Collect  ~~  1  ;;  - 1. Expand  ~~  1
Complete the square of $x^2 + bx$.  ~~  2  ;;  Sum over a_1 and a_2  ~~  2  ;;  one of the two cases  ~~  2  ;;  Consider two cases.  ~~  2
A 3-digit number  ~~  3  ;;  take the 2nd derivative  ~~  2  ;;  142 or 420 or 4.2  ~~  42  ;;  Write 2x + 3 = 7  ~~  3  ;;  Write 2x + 3 = 7  ~~  2
Use 3*4  ~~  3  ;;  Count to 10.  ~~  0  ;;  a triangle  ~~  A  ;;  A strategy  ~~  A  ;;  There is no solution formula  ~~  \text{No}
even numbers are paired  ~~  \text{odd}  ;;  the number of subsets of $n$  ~~  n  ;;  half of them  ~~  \frac13  ;;  only 3 of them  ~~  3, 5
"""


def pairs(table: str) -> list[tuple[str, str]]:
    return [tuple(x.strip().replace("\\n", "\n") if i == 0 and "\\neq" not in x else x.strip() for i, x in enumerate(pair.split("~~")))
            for line in table.strip().splitlines() for pair in line.split("  ;;  ")]


@pytest.mark.parametrize("text, gold", pairs(LEAKS))
def test_an_answer_in_any_spelling_is_a_leak(text, gold):
    assert common.gives_away(text, gold)


@pytest.mark.parametrize("text, gold", pairs(NO_LEAKS))
def test_numbers_that_count_steps_are_none(text, gold):
    assert not common.gives_away(text, gold)


def test_numbers_of_the_problem_are_no_leak_unless_something_is_said_to_equal_them():
    assert common.gives_away("Divide by 3.", "3", "Solve 5x = 15") and not common.gives_away("Divide by 3.", "3", "Solve 3x = 9")
    assert common.gives_away("Divide, so x is 3.", "3", "Solve 3x = 9")


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="0123456789.,/%$\\{}()[]= -+^_abcxyzéπ½\n", max_size=60), st.text(alphabet="0123456789.,/%$\\{}()= -+^abxπ", min_size=1, max_size=20))
def test_the_leak_check_never_raises(text, gold):
    assert common.gives_away(text, gold) in (True, False)


# ---- a server

def answer_to(prompt: str, nth: int = 5) -> str:
    """What a strategist would say: of five candidates the first gives the answer away, the second is endless; the judge likes later ones better."""
    if prompt.startswith(JUDGE):
        n = prompt.count("\n\nStrategy ")
        return "\n".join(f"Strategy {k}: 0.{k + 4}" for k in range(1, n + 1))
    number = re.findall(r"What is (\d+) \+", prompt)[-1]
    last = {0: f"which makes {2 * int(number)}", 1: "and so on " * 60}.get(nth, "")
    return f"<think>It is {2 * int(number)}.</think>Problem type: sum of {number}.\nStrategy: doubling.\nSteps:\n1. Double it{' ' * bool(last)}{last}."


class Server:
    """An OpenAI-compatible chat endpoint on loopback; `mishap(n)` says what goes wrong with the n-th request, `cursed` and `endless` with some prompts."""

    def __init__(self, mishap=lambda n: None, delay=0.0, cursed="\0", endless="\0", retry_after="0"):
        self.requests, self.answered, self.keys, self.busy, self.busiest, lock = 0, Counter(), set(), 0, 0, threading.Lock()
        self.temperatures = set()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def reply(self, status, body, **headers):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests += 1
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                    kind = mishap(server.requests)
                    server.keys.add(self.headers["Authorization"])
                    server.paths = self.path
                time.sleep(delay)
                with lock:
                    server.busy -= 1
                if kind == "drop":
                    self.close_connection = True
                    return self.connection.close()
                if kind == "malformed":
                    return self.reply(200, b'{"choices": [{"mess')
                if kind == "empty":
                    return self.reply(200, b'{"choices": []}')
                if kind == 429:
                    return self.reply(429, b'{"error": "slow down"}', Retry_After=retry_after)
                if isinstance(kind, int):
                    return self.reply(kind, json.dumps({"error": f"bad key {self.headers['Authorization']}"}).encode())
                prompt = body["messages"][0]["content"]
                if cursed in prompt:
                    return self.reply(500, b"{}")
                assert body["model"] == "strong" and body["max_tokens"] == 2048 and len(body["messages"]) == 1
                with lock:
                    nth = server.answered[prompt]
                    server.answered[prompt] += 1
                    server.temperatures.add((prompt.startswith(JUDGE), body["temperature"]))
                self.reply(200, json.dumps({"choices": [{"index": 0, "finish_reason": "length" if endless in prompt else "stop",
                                                         "message": {"role": "assistant", "content": answer_to(prompt, nth)}}],
                                            "created": 0, "id": "x", "model": "strong", "system_fingerprint": "", "usage": {
                                                "completion_tokens": 1, "prompt_tokens": 1, "total_tokens": 2}}).encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def raw_file(tmp_path):
    return write_rows(tmp_path / "raw.jsonl", [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "solution": f"Twice {i} is \\boxed{{{2 * i}}}."} for i in range(11, 23)])


@pytest.fixture
def command(model_dirs, raw_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(common.Endpoint, "PAUSE", 0.01)
    return ["--model", model_dirs["qwen2"], "--dataset", raw_file, "--out", tmp_path / "run", "--warmup_frac", 0, "--strategist_model", "strong", "--steps", 1,
            "--prompts_per_step", 2, "--group_size", 2, "--guided_group_size", 2, "--max_new_tokens", 4, "--max_prompt_tokens", 500]


def strategies_of(path) -> dict:
    return {row["problem"]: row["strategy"] for row in read_jsonl(path)}


def nothing_asked_twice(server, rows: int, more: int = 0) -> None:
    """Five candidates and one verdict for each problem, however often the run was stopped."""
    asked = Counter()
    for prompt, n in server.answered.items():
        asked["verdict" if prompt.startswith(JUDGE) else "candidate"] += n
    assert 5 * rows <= asked["candidate"] <= 5 * rows + more and rows <= asked["verdict"] <= rows + more, asked


def test_an_endpoint_extracts_and_training_follows(command, tmp_path, run_script, capsys):
    with Server(delay=0.02) as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategist_threads", 4) == 0
    said = capsys.readouterr()
    assert server.busiest == 4 and server.paths == "/v1/chat/completions" and server.keys == {f"Bearer {KEY}"}
    nothing_asked_twice(server, 12)
    found = read_jsonl(tmp_path / "run" / "strategies.jsonl")
    assert len(found) == 12 and not list((tmp_path / "run").glob("*.answers"))
    for row in found:
        assert row["strategy"].startswith("Problem type: sum of") and "</think>" not in row["strategy"]
        assert [c.get("score", c.get("rejected")) for c in row["candidates"]] == ["gives the answer away", "too long", 0.5, 0.6, 0.7] and row["score"] == 0.7
        assert "which makes" in row["candidates"][0]["strategy"] and "and so on" in row["candidates"][1]["strategy"] and row["strategist"] == "strong"
    assert server.temperatures == {(False, 1.0), (True, 0.0)}
    assert "12 of 12" in said.out and "0.0% in [0.8, 1], 100.0% in [0.5, 0.8)" in said.out and "12 gives the answer away, 12 too long" in said.out
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert sum(metrics[f"grader/{x}"] for x in ("right", "wrong", "no_box")) == 8  # this step's samples and no more: none of the leak check's
    assert sum(s["guided"] for s in read_jsonl(tmp_path / "run" / "samples.jsonl")) == 4
    for path in (tmp_path / "run").rglob("*"):  # the key is nowhere
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in said.out + said.err


def test_what_may_pass_is_tried_again(command, tmp_path, run_script):
    kinds = ["drop", "malformed", 429, 500, "empty", 503, None]
    with Server(mishap=lambda n: kinds[n // 2 % 7] if n % 2 else None) as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategist_threads", 1, "--extract_only") == 0
    nothing_asked_twice(server, 12)
    assert server.requests > 100 and all(strategies_of(tmp_path / "run" / "strategies.jsonl").values())
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_ends_the_program_and_stays_secret(status, command, tmp_path, run_script, capsys):
    with Server(mishap=lambda n: status if n > 20 else None) as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategist_threads", 2) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(status) in err and KEY not in err and server.requests < 26
    assert all(path.is_dir() or KEY.encode() not in path.read_bytes() for path in (tmp_path / "run").rglob("*"))
    with Server() as healthy:  # nothing is lost: what was answered is not asked again
        assert run_script("sgpo", *command[:5], tmp_path / "other", *command[6:], "--strategist", healthy.url, "--extract_only",
                          "--strategies", tmp_path / "run" / "strategies.jsonl") == 0
    healthy.answered.update(server.answered)
    nothing_asked_twice(healthy, 12)


def test_a_prompt_that_the_endpoint_refuses_costs_its_row_only(command, tmp_path, run_script, capsys):
    with Server(mishap=lambda n: 400 if n <= 5 else None) as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategist_threads", 1, "--extract_only") == 0
    found = strategies_of(tmp_path / "run" / "strategies.jsonl")
    assert sum(s is None for s in found.values()) == 1 and "5 refused by the strategist" in capsys.readouterr().out


def test_an_endpoint_that_refuses_every_prompt_ends_the_program(command, tmp_path, run_script, capsys):
    with Server(mishap=lambda n: 422) as server:
        assert run_script("sgpo", *command, "--strategist", server.url) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "refuses" in err and "422" in err and server.requests < 40


def test_a_prompt_without_an_answer_costs_its_row_only(command, tmp_path, run_script, capsys):
    with Server(cursed="What is 14 +", endless="What is 15 +", delay=0.01) as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategist_threads", 4, "--extract_only") == 0
    found = strategies_of(tmp_path / "run" / "strategies.jsonl")
    assert [problem for problem, s in found.items() if s is None] and {problem for problem, s in found.items() if s is None} == {"What is 14 + 14?", "What is 15 + 15?"}
    said = capsys.readouterr().out
    with Server() as server:  # it may know better now
        assert run_script("sgpo", *command, "--strategist", server.url, "--extract_only", "--resume") == 0
    nothing_asked_twice(server, 1)
    assert strategies_of(tmp_path / "run" / "strategies.jsonl")["What is 14 + 14?"]
    assert "5 no answer in 6 tries" in said and "5 cut off at --strategist_max_new_tokens" in said


def test_a_key_is_stripped_and_must_be_one(command, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    with Server() as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--extract_only") == 0
        assert server.keys == {f"Bearer {KEY}"}
        monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
        assert run_script("sgpo", *command, "--strategist", server.url, "--out", tmp_path / "other") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "OPENAI_API_KEY" in err and "schl" not in err


def test_killed_and_resumed_asks_nothing_twice(command, tmp_path):
    with Server(delay=0.05) as server:
        argv = [sys.executable, str(ROOT / "sgpo.py"), *map(str, command), "--strategist", server.url, "--strategist_threads", "2"]
        for kind, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
            seen = server.requests
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            while server.requests < seen + 21 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(kind)
            said = process.communicate(timeout=60)[0]
            assert process.returncode == code and KEY not in said, said
            assert code == -9 or "stopped extracting strategies; go on with --resume" in said
            argv += ["--resume"] if "--resume" not in argv else []
        file = tmp_path / "run" / "strategies.jsonl"
        with open(file, "a") as cut:
            cut.write('{"id": "7", "probl')
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
    nothing_asked_twice(server, 12, more=4)  # two in flight at each stop
    assert len(read_jsonl(file)) == 12 and (tmp_path / "run" / "model").exists()


def test_an_endpoint_that_cannot_be_reached(command, tmp_path, run_script, capsys):
    with Server() as server:
        pass
    assert run_script("sgpo", *command, "--strategist", server.url) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith(f"error: --strategist {server.url} has not answered in 6 tries")
    with Server() as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategist_model", "strong", "--out", tmp_path / "other", "--extract_only") == 0


def test_without_a_key_no_other_token_is_sent(command, tmp_path, run_script, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    with Server() as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--extract_only") == 0
    assert server.keys == {"Bearer none"}


def test_the_journal_knows_its_questions_and_survives_a_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Endpoint, "PAUSE", 0.01)
    prompt = sgpo.EXTRACTION_PROMPT.format(problem="What is 11 + 11?", solution="22")

    def ask(url, model="strong", max_tokens=2048, temperature=1.0):
        endpoint = common.Endpoint(url, model, max_tokens, 1, tmp_path / "journal", common.Watch(common.progress(1)))
        return endpoint.ask([prompt, prompt], temperature)

    with Server() as server:
        first = ask(server.url)
        with open(tmp_path / "journal", "a") as file:
            file.write('{"request": "cut')
        assert ask(server.url) == first and server.requests == 2
        ask(server.url, temperature=0.0)
        assert server.requests == 4 and ask(server.url) == first
        for other in ({"model": "weak"}, {"max_tokens": 1}):  # this server refuses both, so they were asked
            with pytest.raises(common.Unanswered):
                ask(server.url, **other)
    assert len(read_jsonl(tmp_path / "journal")) == 4


def test_a_server_that_says_when_is_asked_then(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(common.time, "sleep", waits.append)
    with Server(mishap=lambda n: 429 if n < 4 else None, retry_after="7") as server:
        common.Endpoint(server.url, "strong", 2048, 1, tmp_path / "journal", common.Watch(common.progress(1))).ask(["What is 11 + 11?"], 1.0)
    assert waits.count(7.0) == 3


# ---- files of strategies

def test_a_given_file_is_used_as_it_is(command, tmp_path, run_script, capsys):
    given_file = tmp_path / "mine.jsonl"
    rows = [{"problem": f"What is {i} + {i}?", "strategy": f"Any text for {i}."} for i in range(11, 16)] + [{"problem": "What is 16 + 16?", "strategy": None}]
    given_file.write_text("\n".join(map(json.dumps, rows)))  # no line end at the end
    with Server() as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategies", given_file, "--extract_only") == 0
    nothing_asked_twice(server, 6)
    assert strategies_of(given_file) == {**{r["problem"]: r["strategy"] for r in rows}, **{f"What is {i} + {i}?": f"Problem type: sum of {i}.\nStrategy: doubling.\n"
                                         "Steps:\n1. Double it." for i in range(17, 23)}}
    capsys.readouterr()
    assert run_script("sgpo", *command, "--strategist", "none", "--strategist_model", "", "--strategies", given_file, "--out", tmp_path / "plain") == 0
    assert "1 of 12 problems have no strategy" in capsys.readouterr().out


def test_refusals(command, tmp_path, run_script, capsys):
    (tmp_path / "thesis.jsonl").write_text('{"problem": "p", "strategy": "s"}\nprecious')
    plain, own = write_rows(tmp_path / "plain.jsonl", [{"problem": "p", "answer": "1"}] * 3), ["--strategist_model", ""]
    for flags, said in ((["--strategist", "http://x/v1", *own], "--strategist_model"), (["--strategist", "http://me:key@x/v1"], "OPENAI_API_KEY"),
                        (["--strategist", "http://x/v1?key=abc"], "OPENAI_API_KEY"), (["--strategist", "host:8000"], "http(s)://HOST:PORT/v1"),
                        (["--strategies", tmp_path, *own], "cannot be read as text"), (["--strategies", "nowhere/s.jsonl", *own], "no such folder"),
                        (["--strategies", tmp_path / "thesis.jsonl", *own], "thesis.jsonl, line 2"),
                        (["--strategist", "./missing", *own], "--strategist ./missing: no such directory"), (["--strategy_candidates", 0], "--strategy_candidates"),
                        (["--dataset", plain, *own], "or a solution to extract one from"), (["--strategist", "none", *own], "or a solution to extract one from")):
        assert run_script("sgpo", *command, *flags) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and said in err and not (tmp_path / "run").exists(), err
    assert (tmp_path / "thesis.jsonl").read_text().endswith("precious")


def test_another_strategist_is_asked_where_one_found_nothing(command, tmp_path, run_script):
    rows = [{"id": str(i), "problem": f"What is {i} + {i}?", "strategy": None, "strategist": "strong" if i < 14 else "weak"} for i in range(11, 23)]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    with Server() as server:
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategies", file, "--extract_only") == 0
    nothing_asked_twice(server, 9)
    assert sum(s is not None for s in strategies_of(file).values()) == 9


def test_two_runs_do_not_write_one_file(command, tmp_path, run_script, capsys):
    with Server() as server, open(tmp_path / "mine.jsonl", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_script("sgpo", *command, "--strategist", server.url, "--strategies", tmp_path / "mine.jsonl") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another run is writing it" in err and server.requests == 0


def test_a_strategy_that_is_too_long_costs_the_strategy_and_not_the_row(command, tmp_path, run_script, capsys):
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i), "strategy": "s" * (900 if i == 12 else 9)} for i in range(11, 15)]
    data = write_rows(tmp_path / "given.jsonl", rows)
    assert run_script("sgpo", *command, "--dataset", data, "--strategist_model", "", "--prompts_per_step", 4) == 0
    said = capsys.readouterr().out
    assert "dropped the strategies of 1 of 4 rows" in said and "1 of 4 problems have no strategy" in said
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert len({s["id"] for s in samples}) == 4 and len({s["id"] for s in samples if s["guided"]}) == 3


def test_no_steps_need_no_strategies(command, tmp_path, run_script):
    assert run_script("sgpo", *command, "--strategist_model", "", "--steps", 0, "--warmup_frac", 0.5, "--warmup_epochs", 1, "--max_new_tokens", 60) == 0
    assert (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "strategies.jsonl").exists()


def test_what_the_problem_states_does_not_leak():
    row = {"problem": "Solve 3x = 9", "answer": "3"}
    assert "rejected" not in sgpo.judge(GOOD.replace("Double it", "Divide by 3"), row, lambda *_: True)
    assert sgpo.judge(GOOD.replace("Double it", "Divide by 3"), {**row, "problem": "Solve 5x = 15"}, lambda *_: True)["rejected"] == "gives the answer away"


def test_an_order_to_stop_is_not_forgotten_between_two_parts_of_a_run():
    first = common.Watch(common.progress(1))
    os.kill(os.getpid(), signal.SIGTERM)
    assert first.agreed() and common.Watch(common.progress(1)).agreed()
    common.Watch.reset()
    assert not first.agreed()


# ---- a model on this machine

@pytest.fixture(scope="module")
def strategist(tmp_path_factory):
    """A model that has learnt by heart what to answer to the extraction and scoring prompts of the demo's first problems; fixed text is a token each."""
    rows = common.demo_rows()[0][:6]
    tokenizer = small_tokenizer()
    fixed = [part for prompt in (sgpo.EXTRACTION_PROMPT, sgpo.SCORING_PROMPT) for part in re.split(r"\{\w+\}", prompt) if len(part) > 3]
    tokenizer.add_tokens([*fixed, "Type: ", "Strategy: chain.", "Steps: ", "\n\nStrategy "])
    lessons = []
    for row in rows:
        asked = []
        sgpo.extract([row], lambda prompts, temperature: asked.append(prompts[0]) or [row["strategy"]] * len(prompts), lambda *_: True,
                     sgpo.Args(strategy_candidates=2))
        lessons += [(asked[0], row["strategy"]), (asked[1], "Strategy 1: 0.9")]
    prompts = [common.build_prompt(tokenizer, prompt, "") for prompt, _ in lessons]
    ids, mask = common.padded([tokenizer(answer).input_ids + [tokenizer.eos_token_id] for _, answer in lessons], "cpu")
    model = small_model(vocab=len(tokenizer), hidden_size=64, intermediate_size=128, initializer_range=0.05, tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(300):
        loss = -common.completion_logps(model, prompts, ids, mask, 1.0)[0].sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 5e-3:
            break
    assert loss < 0.02
    folder = tmp_path_factory.mktemp("strategist")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, rows


def test_from_raw_rows_to_a_trained_model_in_one_command(strategist, tmp_path, run_script, capsys, monkeypatch):
    """The demo's problems without their strategies, a strategist on this machine, a warm-up, RL."""
    folder, rows = strategist
    monkeypatch.setattr(common, "DEMO_WARMUP_STEPS", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw = write_rows(tmp_path / "raw.jsonl", [{k: row[k] for k in ("problem", "answer", "solution", "id")} for row in rows])
    out = tmp_path / "run"
    assert run_script("sgpo", "--dataset", raw, "--strategist", folder, "--strategist_max_new_tokens", 60, "--strategy_candidates", 2, "--warmup_frac", 0.33,
                      "--warmup_epochs", 2, "--steps", 2, "--prompts_per_step", 2, "--group_size", 2, "--max_new_tokens", 40, "--out", out) == 0
    said = capsys.readouterr().out
    found = read_jsonl(out / "strategies.jsonl")
    assert len(found) == 4 and "4 of 4" in said  # the two problems of the warm-up need no strategy
    truth = {row["problem"]: row["strategy"] for row in rows}
    assert all(row["strategy"] == truth[row["problem"]] and row["score"] == 0.9 for row in found)
    samples = read_jsonl(out / "samples.jsonl")
    assert any(s["guided"] for s in samples) and {s["id"] for s in samples} <= {row["id"] for row in found}
    assert (out / "model" / "model.safetensors").exists() and (out / "warmup" / "model.safetensors").exists()


def test_a_luffy_file_goes_through_with_the_model_as_its_own_strategist(strategist, tmp_path, run_script, capsys):
    folder, _ = strategist
    rows = [{"prompt": [{"role": "system", "content": "sys"}, {"role": "user", "content": f"Find ${i} + {i}$."}], "data_source": "x",
             "target": [{"role": "assistant", "content": f"<think>\nHm. {i}, twice.\n</think>\n\nIt is $\\boxed{{{2 * i}}}$."}],
             "reward_model": {"ground_truth": str(2 * i) if i != 50 else "\\frac{", "style": "rule"}} for i in range(200)]
    rows[60]["prompt"][1]["content"] += " long" * 1000
    data, out = write_rows(tmp_path / "luffy.jsonl", rows), tmp_path / "run"
    assert run_script("sgpo", "--model", folder, "--dataset", data, "--steps", 2, "--max_rows", 150, "--max_new_tokens", 80, "--strategist_max_new_tokens", 40,
                      "--warmup_epochs", 1, "--prompts_per_step", 4, "--out", out) == 0
    said = capsys.readouterr().out
    assert "150 of 200 rows, drawn by --seed 0" in said and re.search(r"SFT on (48|49|50) problems", said) and "strategies found" in said
    assert (out / "model" / "model.safetensors").exists() and len(read_jsonl(out / "metrics.jsonl")) == 2


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "openai", "accelerate"))), reason="needs transformers[serving]")
def test_a_real_server(strategist, model_dirs, tmp_path, run_script, monkeypatch):
    """`transformers serve`, with the model that has learnt its answers by heart."""
    folder, rows = strategist
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    monkeypatch.setattr(common.Endpoint, "PAUSE", 2.0)  # six tries are two minutes: it may start slowly
    raw = write_rows(tmp_path / "raw.jsonl", [{k: row[k] for k in ("problem", "answer", "solution", "id")} for row in rows])
    try:
        assert run_script("sgpo", "--model", model_dirs["qwen2"], "--dataset", raw, "--strategist", f"http://127.0.0.1:{port}/v1", "--strategist_model", folder,
                          "--strategy_candidates", 2, "--strategist_threads", 2, "--warmup_frac", 0, "--extract_only", "--out", tmp_path / "run") == 0
    finally:
        server.kill()
        server.wait()
    assert strategies_of(tmp_path / "run" / "strategies.jsonl") == {row["problem"]: row["strategy"] for row in rows}


# ---- the plan

def test_a_dry_run_says_the_plan_and_does_nothing(command, tmp_path, run_script, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_model", None)
    monkeypatch.setattr(sgpo, "load_policy", None)
    before = set(tmp_path.rglob("*"))
    assert run_script("sgpo", *command, "--strategist", "http://127.0.0.1:9/v1", "--dry_run", "--warmup_frac", 0.5, "--max_new_tokens", 60) == 0
    said = capsys.readouterr().out
    assert set(tmp_path.rglob("*")) == before
    assert "SFT on 6 problems, 10 epochs of 1 steps" in said and "0 there, 6 to be extracted by http://127.0.0.1:9/v1, 5 candidates each" in said
    assert "6 problems; 1 steps of 2 x (2 + 2 guided) samples, at most 480 tokens a step; 0.33 epochs" in said and "on one GPU" in said
