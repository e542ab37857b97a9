"""From solutions to strategies: what is asked and accepted, and what a strategist may do meanwhile."""
import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import common
import sgpo
from conftest import Child, read_jsonl, small_model, small_tokenizer, whole_run_for_real, write_rows

# ---- reading a strategist's answers

GOOD = "Problem type: sums.\nStrategy: doubling.\nSteps:\n1. Double it."
WORDY = GOOD.replace("Steps", "Steps (in order)")
SHORT = "Type: A. Strategy: chain. Steps: +2, -2."
TITLES = "Problem type\nsums.\nStrategy\ndoubling.\nSteps\n1. Take 2**3 or 2**4."


@pytest.mark.parametrize("answer, strategy", [
    (GOOD, GOOD), (WORDY, WORDY), (SHORT, SHORT), (f"<think>{SHORT}</think>\n\nSure!\n{GOOD}\n", GOOD),
    ("**Problem type:** sums.\n__Strategy:__ doubling.\n### Steps:\n1. Double it.", GOOD),
    (re.sub("(?m)^(?=[PS])", "### ", TITLES), TITLES), (f"<think>\n{GOOD}\nBut wait", None), ("", None),
    ("Problem type: sums.\nSteps:\n1. Double.", None), ("Strategy: doubling.\nSteps:\n1. Double.", None),
    ("Problem type: sums.\nStrategy: doubling.", None), ("Problem type:\nStrategy:\nSteps:\n", None),
    ("Problem type: sums.\nStrategy: doubling.\nSteps:\n **", None), (sgpo.EXTRACTION_PROMPT, None),
    ("type: " * 5000 + "strategy: " * 5000, None)])
def test_a_strategy_has_three_parts(answer, strategy):
    assert sgpo.parse_strategy(answer) == strategy


@pytest.mark.parametrize("answer, scores", [
    ("Strategy 1: 0.75\nStrategy 2: 1\nStrategy 3: 0", [0.75, 1.0, 0.0]), ("All are fine.", [None, None]),
    ("1: 0.2\n2. 0.3\n3) 0.4", [0.2, 0.3, 0.4]), ("<think>Strategy 1: 0.5", [None]), ("1.0", [None]),
    ("<think>Strategy 1: 0.1</think>\n**Strategy 1:** 0.9\n- Strategy 2: .5 (fine)", [0.9, 0.5]),
    ("`Strategy 1`: `0.5`.\nStrategy 2 \u2013 0.6.\nScore 3: 1.0.", [0.5, 0.6, 1.0]),
    ("| Strategy | Score |\n|---|---|\n| 1 | 0.7 |\n| 2 | 0.4 |", [0.7, 0.4]), ("Strategy 9: 0.9", [None]),
    ("Strategy 1: 7\nStrategy 2: 8/10\nStrategy 3: 1.5", [None] * 3), ("Strategy 2: 0.5", [None, 0.5, None]),
    ("Strategy 1: 0.8/1\nStrategy 2: 1/10", [0.8, None])])
def test_scores(answer, scores):
    assert sgpo.parse_scores(answer, len(scores)) == scores


@pytest.mark.parametrize("verdict, best, score", [
    ("Strategy 1: 0.3\nStrategy 2: 0.8\nStrategy 3: 0.5", 1, 0.8), ("3: 0.1", 2, 0.1), ("Hm.", 0, None)])
def test_the_best_candidate_is_kept(verdict, best, score):
    said = [GOOD.replace("doubling", f"way {k}") for k in range(3)]
    row = {"id": "7", "problem": "What is 2 + 2?", "answer": "4", "solution": "Twice two."}
    found, = sgpo.extract([row], lambda prompts, temperature: said if len(prompts) == 3 else [verdict],
                          lambda *_: True, sgpo.Args(strategy_candidates=3))
    assert (found["strategy"], found["score"]) == (said[best], score)


def test_what_the_problem_states_does_not_leak():
    said, row = GOOD.replace("Double it", "Divide by 12"), {"problem": "What is 144 / 12?", "answer": "12"}
    assert sgpo.judge(said, row, lambda *_: True) == {"strategy": said}
    row["problem"] = "What is the root of 144?"
    assert sgpo.judge(said, row, lambda *_: True) == {"strategy": said, "rejected": "gives the answer away"}


# ---- an endpoint

KEY = "sk-secret-0123456789"
JUDGE = sgpo.SCORING_PROMPT.split("{")[0]


def answer_to(prompt: str, nth: int) -> str:
    """Of five candidates the first tells the answer, the second is too long, the third is no strategy."""
    number = int(re.findall(r"What is (\d+) \+", prompt)[-1])
    if prompt.startswith(JUDGE):
        ways = range(1, prompt.count(", way ") + 1)
        return "\n".join(f"Strategy {k}: 0.{7 if k % 2 == number % 2 else 5}" for k in ways)
    more = {0: f", which makes {2 * number}", 1: " and so on" * 60}.get(nth, "")
    strategy = f"Problem type: sums.\nStrategy: doubling, way {nth}.\nSteps:\n1. Double it{more}."
    return f"<think>It is {2 * number}.</think>" + ("I cannot." if nth == 2 else strategy)


class Server:
    """An OpenAI-style chat endpoint on loopback.

    `mishap(n, prompt)` is what the n-th request gets instead of an answer: a status, a body in bytes, what is
    other in the choice, or "drop".
    """

    def __init__(self, mishap=lambda n, prompt: None, delay=0.0, knows=("max_tokens", "temperature")):
        self.requests, self.answered, self.asked, self.busy, self.busiest = 0, Counter(), set(), 0, 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize, log_message = "HTTP/1.1", -1, lambda *_: None

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt, key = body.pop("messages")[0]["content"], self.headers["Authorization"]
                with lock:
                    server.requests, server.busy = server.requests + 1, server.busy + 1
                    kind, server.busiest = mishap(server.requests, prompt), max(server.busy, server.busiest)
                    server.asked.add((self.path, key, prompt.startswith(JUDGE), *sorted(body.items())))
                    nth = server.answered[prompt]
                    server.answered[prompt] += kind is None
                time.sleep(delay)
                with lock:
                    server.busy -= 1
                self.close_connection = kind == "drop"
                if kind == "drop":
                    return
                strange = next((name for name in body if name not in ("model", *knows)), None)
                status = 400 if strange else kind if isinstance(kind, int) else 200
                choice = {"finish_reason": "stop", "message": {"content": answer_to(prompt, nth)}}
                choice |= kind if isinstance(kind, dict) else {}
                said = {"choices": [choice]} if status == 200 else {
                    "error": {"message": f"bad key {key}", "param": strange or "max_tokens",
                              "code": "unsupported_parameter" if strange else "invalid_value"}}
                said = kind if isinstance(kind, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if said[:1] == b"<" else "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # the other side was killed
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.socket.close()


@pytest.fixture
def flags(model_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("openai._base_client"), "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    raw = write_rows(tmp_path / "raw.jsonl", [
        {"problem": f"What is {i} + {i}?", "answer": f"{2 * i}", "solution": f"It is \\boxed{{{2 * i}}}."}
        for i in range(11, 19)])
    return ["--model", model_dirs["qwen2"], "--dataset", raw, "--out", tmp_path / "run", "--warmup_frac", 0,
            "--steps", 1, "--prompts_per_step", 2, "--group_size", 2, "--guided_group_size", 2,
            "--max_new_tokens", 4, "--max_prompt_tokens", 500]


@pytest.fixture
def extract(flags, run_script, capsys, tmp_path):
    """Ask a server for strategies -> what was said. An error is one line, and the key is nowhere."""
    def run(server, *more, code=0, threads=4, only=True) -> str:
        assert run_script("sgpo", *flags, "--strategist", server.url, "--strategist_model", "strong", *more,
                          "--strategist_threads", threads, *["--extract_only"] * only) == code
        said = capsys.readouterr()
        errors = said.err.splitlines()
        assert code != 2 or len(errors) == 1 and errors[0].startswith("error: "), errors
        files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
        assert KEY not in said.out + said.err and not any(KEY.encode() in file for file in files)
        return said.out + "".join(errors)
    return run


def strategies_of(path) -> dict:
    return {row["problem"]: row["strategy"] for row in read_jsonl(path)}


def test_an_endpoint_extracts_and_training_follows(extract, tmp_path, monkeypatch):
    with Server(delay=0.01) as server:
        said = extract(server, only=False)
    assert server.answered.total() == 8 * 6 and server.busiest == 4
    assert server.asked == {("/v1/chat/completions", f"Bearer {KEY}", judge, ("max_tokens", 2048),
                             ("model", "strong"), ("temperature", 1.0 - judge)) for judge in (False, True)}
    found = read_jsonl(tmp_path / "run" / "strategies.jsonl")
    for row in found:
        bad, (one, two) = row["candidates"][:3], row["candidates"][3:]
        assert [c["rejected"] for c in bad] == ["gives the answer away", "too long", "not in three parts"]
        assert "which makes" in bad[0]["strategy"] and bad[2]["answer"].endswith("cannot.")
        best = one if int(row["problem"][8:10]) % 2 else two
        assert row["strategy"] == best["strategy"] and f", way {3 + (best is two)}.\n" in row["strategy"]
        assert {one["score"], two["score"]} == {0.5, 0.7} and row["score"] == 0.7
        assert row["strategist"] == "strong"
    assert len(found) == 8 and "8 of 8" in said and "0.0% in [0.8, 1], 100.0% in [0.5, 0.8)" in said
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert sum(metrics[f"grader/{x}"] for x in ("right", "wrong", "no_box")) == 8  # none of the leak check's
    assert sum("guided" in sample for sample in read_jsonl(tmp_path / "run" / "samples.jsonl")) == 4


def test_what_a_model_does_not_take_is_left_out(extract, tmp_path):
    with Server(knows=["max_completion_tokens"]) as server:
        assert "8 of 8" in extract(server, threads=1)
    assert server.requests == 6 * 8 + 2
    names = [sorted(name for name, _ in asked[3:]) for asked in server.asked]
    assert ["max_completion_tokens", "model"] in names and ["max_tokens", "model", "temperature"] in names


def test_what_may_pass_is_tried_again(extract, tmp_path):
    kinds = ["drop", 429, 500, 503, 408]
    with Server(lambda n, prompt: kinds[n // 2 % 5] if n % 2 else None) as server:
        extract(server, threads=1)
    assert server.answered.total() == 48 and server.requests == 96
    assert all(strategies_of(tmp_path / "run" / "strategies.jsonl").values())
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("kind, reason, tries, again", [
    (400, "refused by the strategist", 1, False), (422, "refused by the strategist", 1, False),
    (500, "no answer", 6, True), ({"finish_reason": "length"}, "cut off at --strategist_max_new", 1, False),
    ({"finish_reason": "length", "message": {"content": None}}, "cut off at --strategist_max_new", 1, False)])
def test_a_prompt_without_an_answer_costs_its_row_only(kind, reason, tries, again, extract, tmp_path):
    with Server(lambda n, prompt: kind if re.search("What is 1[2468]", prompt) else None) as server:
        said = extract(server, threads=1)  # 20 failures, but not in a row
    assert "4 of 8" in said and f"20 {reason}" in said and server.requests == 4 * 6 + 20 * tries
    found = strategies_of(tmp_path / "run" / "strategies.jsonl")
    assert [found[problem] is None for problem in found] == [False, True] * 4
    with Server() as server:  # one that fell silent may know better now
        extract(server, "--resume")
    assert server.requests == 4 * 6 * again
    assert all(strategies_of(tmp_path / "run" / "strategies.jsonl").values()) == again


@pytest.mark.parametrize("status, after, most", [
    (401, 20, 21), (403, 20, 21), (404, 20, 21), (400, 0, 16), (422, 0, 16), (500, 0, 6)])
def test_a_refused_key_or_nothing_but_failures_end_the_program(status, after, most, extract, tmp_path):
    with Server(lambda n, prompt: status if n > after else None, delay=0.01) as server:
        said = extract(server, code=2, threads=1, only=False)
        assert server.requests <= most + 1  # another may be on its way
    assert f"error: --strategist {server.url}: " in said and str(status) in said and "bad key Bearer" in said
    found = tmp_path / "run" / "strategies.jsonl"
    assert after == 0 or sum(map(bool, strategies_of(found).values())) == after // 6  # what is done is kept
    assert found.exists() == (status != 500)  # and where nothing was done there is no directory


def test_nonsense_costs_the_candidate(extract, tmp_path):
    contents = [{"type": "text", "text": GOOD}], {"text": GOOD}, 7, "half \ud83d", None
    nonsense = [b"<html>busy</html>", b'{"choices": [{"mess', b'{"choices": []}', b"{}", b"[]", b"null", b"",
                {"message": None}, *({"message": {"content": x}} for x in contents)]
    with Server(lambda n, prompt: nonsense[n - 1] if n <= len(nonsense) else None) as server:
        extract(server, "--max_rows", 1, "--strategy_candidates", len(nonsense) + 5, threads=1)
    row, = read_jsonl(tmp_path / "run" / "strategies.jsonl")
    assert [c.get("rejected") for c in row["candidates"]].count("no answer") == len(nonsense)
    assert row["strategy"] and row["score"] == 0.7
    with Server(lambda n, prompt: nonsense[1] if prompt.startswith(JUDGE) else None) as server:  # a verdict
        extract(server, "--max_rows", 1, "--out", tmp_path / "other")
    row, = read_jsonl(tmp_path / "other" / "strategies.jsonl")
    assert row["strategy"] and row["score"] is None


def test_an_endpoint_that_cannot_be_reached_or_is_slow(extract, tmp_path, monkeypatch):
    with Server(delay=0.5) as server:
        said = extract(server, "--strategist_timeout", 0.02, code=2)
    assert "APITimeoutError" in said and server.url in said
    monkeypatch.setattr(common.Endpoint, "PATIENCE", 0.2)
    with Server(delay=0.5) as server:
        said = extract(server, "--max_rows", 1, "--strategy_candidates", 1, "--out", tmp_path / "slow")
    assert f"no answer of {server.url} for 0.2 s" in said and "for 0.4 s" in said  # one line after another
    said = extract(server, code=2)
    assert "APIConnectionError" in said and server.url in said
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in extract(server, code=2)


@pytest.mark.parametrize("key, sent", [
    (f" {KEY}\n", f"Bearer {KEY}"), ("", "Bearer none"), ("cl\u00e9", None)])
def test_the_key_and_no_other_token_is_sent(key, sent, extract, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Server() as server:
        said = extract(server, "--max_rows", 1, code=0 if sent else 2)
    assert {asked[1] for asked in server.asked} == {sent} - {None}
    assert ("OPENAI_API_KEY" in said) == (sent is None) and "cl\u00e9" not in said and "\\xe9" not in said


def test_killed_and_stopped_and_resumed_it_asks_for_the_rest(extract, flags, tmp_path):
    file = tmp_path / "run" / "strategies.jsonl"
    with Server(delay=0.02) as server:
        argv = [*flags, "--strategist", server.url, "--strategist_model", "strong", "--strategist_threads", 2]
        run = Child(whole_run_for_real, "sgpo", argv, OPENAI_API_KEY=KEY)
        while run.process.is_alive() and server.requests < 20:
            time.sleep(0.005)
        run.process.kill()
        assert run.ended() == -9
    killed = file.read_bytes()
    file.write_bytes(killed + b'{"id": "7", "probl')  # a kill may cut a line
    with Server(lambda n, prompt: os.kill(os.getpid(), signal.SIGTERM) if n == 14 else None, 0.02) as server:
        said = extract(server, "--resume", code=130, threads=2)
    assert "stopped extracting strategies; go on with --resume" in said
    stopped = file.read_bytes()
    with Server() as server:
        extract(server, "--resume", only=False)
    assert stopped.startswith(killed) and 0 < killed.count(b"\n") < stopped.count(b"\n") < 8
    assert file.read_bytes().startswith(stopped) and server.requests == 6 * (8 - stopped.count(b"\n"))
    assert len(strategies_of(file)) == len(read_jsonl(file)) == 8


# ---- files of strategies

def test_a_given_file_is_used_as_it_is_and_by_one_run_alone(extract, flags, tmp_path, run_script, capsys):
    rows = [{"problem": f"What is {i} + {i}?", "strategy": f"Any text for {i}."} for i in (11, 12, 13)]
    rows += [{"problem": "What is 14 + 14?", "strategy": None}]  # nothing was found
    other = {"problem": "What is 15 + 15?", "strategy": None, "strategist": "weak"}  # is to be asked again
    file = write_rows(tmp_path / "mine.jsonl", [other, *rows])
    file.write_text(file.read_text().strip())  # no line end at the end
    with Server() as server:
        with open(f"{file}.lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            assert "another run is writing it" in extract(server, "--strategies", file, code=2)
        extract(server, "--strategies", file)
    found = strategies_of(file)
    assert server.requests == 4 * 6 and len(found) == 8 and found[other["problem"]]
    assert [found[row["problem"]] for row in rows] == [row["strategy"] for row in rows]
    flags += ["--strategist", "none", "--strategies", file, "--out", tmp_path / "other"]
    assert run_script("sgpo", *flags) == 0
    said = capsys.readouterr().out
    assert "7 there, 0 to extract" in said and "1 of 8 problems have no strategy" in said


def test_too_long_a_strategy_costs_the_strategy_and_not_the_row(flags, tmp_path, run_script, capsys):
    rows = [{"problem": f"{i}?", "answer": "1", "strategy": "s" * (900 if i == 2 else 9)} for i in range(4)]
    data = write_rows(tmp_path / "given.jsonl", rows)
    assert run_script("sgpo", *flags, "--dataset", data, "--prompts_per_step", 4) == 0
    said = capsys.readouterr().out
    assert "dropped 1 strategies: with them the prompt is too long, first: id 2" in said
    assert "1 of 4 problems have no strategy" in said and "3 there, 0 to extract" in said
    samples = read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert Counter(sample["id"] for sample in samples) == {"0": 4, "1": 4, "2": 2, "3": 4}


def test_a_dry_run_says_the_plan_and_does_nothing(extract, tmp_path, monkeypatch):
    monkeypatch.setattr(sgpo, "load_policy", None)
    with Server() as server:
        said = extract(server, "--dry_run", "--warmup_frac", 0.5, "--max_new_tokens", 60, only=False)
    assert not (tmp_path / "run").exists() and server.requests == 0 and "SFT on 4 problems" in said
    assert f"0 there, 4 to extract -> {tmp_path / 'run' / 'strategies.jsonl'}" in said
    assert "4 problems; 1 steps of 2 x (2 + 2 guided) samples" in said
    said = extract(server, "--dry_run", "--steps", 0, only=False)
    assert "0 there, 0 to extract" in said  # the SFT baseline needs none


# ---- a model on this machine

def test_what_is_too_long_for_a_local_strategist(model_dirs, capsys):
    args = sgpo.Args(strategist=str(model_dirs["llama"]), strategist_max_new_tokens=4)
    asked = common.LocalStrategist(None, None, args).ask(["long " * 820, "short"], 0.0)
    assert asked == ["too long for the strategist", common.CUT_OFF]
    args.strategist_max_new_tokens = 4096
    with pytest.raises(SystemExit):
        common.LocalStrategist(None, None, args)
    assert "leaves no room for a prompt" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scholar(tmp_path_factory):
    """A model that knows strategies and scores of the demo by heart; fixed text is a token."""
    rows, tokenizer, lessons = common.demo_rows()[0][:4], small_tokenizer(), []
    fixed = re.split(r"\{\w+\}", sgpo.EXTRACTION_PROMPT + sgpo.SCORING_PROMPT)
    tokenizer.add_tokens([text for text in fixed if len(text) > 3])
    tokenizer.add_tokens(["Type: ", "Strategy: chain.", "Steps: ", "\n\nStrategy "])
    for row in rows:
        def ask(prompts, temperature):
            lessons.append((prompts[0], row["strategy"] if temperature else "Strategy 1: 0.9"))
            return [row["strategy"]] * len(prompts)
        sgpo.extract([row], ask, lambda *_: True, sgpo.Args(strategy_candidates=2))
    prompts = [common.build_prompt(tokenizer, prompt, "") for prompt, _ in lessons]
    answers = [tokenizer(said).input_ids + [tokenizer.eos_token_id] for _, said in lessons]
    ids, mask = common.padded(answers, "cpu")
    model = small_model(vocab=len(tokenizer), hidden_size=64, intermediate_size=128, initializer_range=0.05)
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.tensor(9.0)
    while loss > 0.01:
        loss = -common.completion_logps(model, prompts, ids, mask, 1.0)[0].sum() / mask.sum()
        loss.backward()
        common.optimizer_step(model, optimizer, 1.0)
    folder = tmp_path_factory.mktemp("scholar")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, rows


@pytest.mark.parametrize("own", [True, False])
def test_from_a_luffy_file_to_a_trained_model(own, scholar, model_dirs, tmp_path, run_script, capsys):
    """The model as its own strategist, or another one on this machine; then a warm-up and RL."""
    (folder, rows), out = scholar, tmp_path / "run"
    data = write_rows(tmp_path / "luffy.jsonl", [
        {"data_source": "x", "reward_model": {"ground_truth": row["answer"], "style": "rule"},
         "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": row["problem"]}],
         "target": [{"role": "assistant", "content": row["solution"]}]} for row in rows])
    who = ["--model", folder] if own else ["--model", model_dirs["qwen2"], "--strategist", folder]
    assert run_script("sgpo", *who, "--dataset", data, "--strategist_max_new_tokens", 60, "--group_size", 2,
                      "--strategy_candidates", 2, "--warmup_frac", 0.5, "--warmup_epochs", 1, "--steps", 1,
                      "--prompts_per_step", 2, "--max_new_tokens", 90, "--out", out) == 0
    said, found = capsys.readouterr().out, read_jsonl(out / "strategies.jsonl")
    assert len(found) == 2 and "2 of 2" in said and "SFT on 2 problems" in said  # these need no strategy
    truth = {row["problem"]: row["strategy"] for row in rows}
    for row in found:
        assert (row["strategy"], row["score"], row["strategist"]) == (truth[row["problem"]], 0.9, str(folder))
    samples = read_jsonl(out / "samples.jsonl")
    assert {s["problem"] for s in samples if "guided" in s} == {row["problem"] for row in found}
    assert (out / "warmup" / "model.safetensors").exists() and (out / "model" / "model.safetensors").exists()
