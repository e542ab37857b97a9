"""Strategies: reading a strategist's answers, choosing the best, the endpoint, the file, what is trained."""
import itertools
import json
import re
import sys
import types
from types import SimpleNamespace

import pytest
import torch

import sgpo
from conftest import read_jsonl, small_model, small_tokenizer, write_jsonl

# ---- reading a strategist's answers

GOOD = "Problem type: sums.\nStrategy: doubling.\nSteps:\n1. Double it."
HEADINGS = "Problem type\nsums.\nStrategy\ndoubling.\nSteps\n1. Double it."
STRATEGIES = {
    "as asked": (GOOD, GOOD),
    "bold": ("**Problem type:** sums.\n**Strategy**: doubling.\n__Steps:__\n1. Double it.", GOOD),
    "headings": (re.sub("(?m)^(?=[PS])", "### ", GOOD), GOOD),
    "headings without colons": (re.sub("(?m)^(?=[PS])", "## ", HEADINGS), HEADINGS),
    "after thinking": (f"<think>Type: a\nStrategy: b\nSteps: c</think>\n\nSure!\n{GOOD}\n", GOOD),
    "numbered": (re.sub("(?m)^(?=[PS])", "1. ", GOOD), re.sub("(?m)^(?=[PS])", "1. ", GOOD)),
    "other case": (GOOD.upper(), GOOD.upper()),
    "thinking without an end": (f"<think>\n{GOOD}\nBut wait", None),
    "no type": ("Strategy: doubling.\nSteps:\n1. Double.", None),
    "no strategy": ("Problem type: sums.\nSteps:\n1. Double.", None),
    "no steps": ("Problem type: sums.\nStrategy: doubling.", None),
    "an empty part": ("Problem type: sums.\nStrategy: doubling.\nSteps:\n **", None),
    "the copied form": (sgpo.EXTRACTION_PROMPT, None),
    "a loop": ("type:\n" * 3000 + "strategy:\n" * 3000, None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("answer, strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_strategy_has_three_parts(answer, strategy):
    assert sgpo.parse_strategy(answer) == strategy


SCORES = {
    "as asked": ("Strategy 1: 0.75\nStrategy 2: 1\nStrategy 3: 0", [0.75, 1.0, 0.0]),
    "bold and thinking": ("<think>Strategy 1: 0.1</think>\n**Strategy 1:** 0.9\n- Strategy 2: .5 (fine)",
                          [0.9, 0.5]),
    "numbers alone": ("1: 0.2\n2: 0.3", [0.2, 0.3]),
    "a table": ("| Strategy | Score |\n|---|---|\n| 1 | 0.7 |\n| 2 | 0.4 |", [0.7, 0.4]),
    "a missing one": ("Strategy 2: 0.5", [None, 0.5]),
    "another scale": ("Strategy 1: 7\nStrategy 2: 8/10\nStrategy 3: 1.5", [None, None, None]),
    "no such strategy": ("Strategy 9: 0.9", [None]),
    "prose": ("All are fine.", [None, None]),
}


@pytest.mark.parametrize("answer, scores", SCORES.values(), ids=SCORES)
def test_scores(answer, scores):
    assert sgpo.parse_scores(answer, len(scores)) == scores


# ---- candidates

PROBLEM = {"id": "7", "problem": "What is 21 + 21?", "answer": "42", "solution": "It is \\boxed{42}."}


def args_of(model_dirs, **flags) -> sgpo.Args:
    return sgpo.Args(**{"model": str(model_dirs["qwen2"]), "max_new_tokens": 8, **flags})


@pytest.mark.parametrize("verdict, best, score", [
    ("Strategy 1: 0.3\nStrategy 2: 0.8\nStrategy 3: 0.5", 1, 0.8),
    ("3: 0.1", 2, 0.1),
    (None, 0, None),
])
def test_the_best_candidate_is_kept(verdict, best, score, model_dirs):
    answers = [GOOD.replace("doubling", f"way {k}") for k in range(3)]
    asked = []

    def ask(prompts: list[str], temperature: float) -> list:
        asked.extend(prompts)
        return answers if temperature else [verdict]

    args = args_of(model_dirs, strategy_candidates=3)
    result, = sgpo.extract([PROBLEM], ask, small_tokenizer(), args)
    assert result["strategy"] == answers[best]
    assert result["score"] == score
    assert [c["strategy"] for c in result["candidates"]] == answers
    assert all(PROBLEM["solution"] in prompt for prompt in asked[:3])
    assert f"Strategy 2:\n{answers[1]}" in asked[3]


@pytest.mark.parametrize("answer, reason", [
    (None, "no answer"),
    ("I cannot.", "not in three parts"),
    (GOOD + " It gives 42.", "gives the answer away"),
    (GOOD + " And so on." * 99, "too long"),
    (GOOD, None),
])
def test_why_a_candidate_is_rejected(answer, reason, model_dirs):
    candidate = sgpo.judge(answer, PROBLEM, small_tokenizer(), args_of(model_dirs))
    assert candidate.get("rejected") == reason


def test_a_number_that_the_problem_states_is_not_given_away(model_dirs):
    problem = {**PROBLEM, "problem": "What is 42 + 42 - 42?"}
    assert "rejected" not in sgpo.judge(GOOD + " Take 42.", problem, small_tokenizer(), args_of(model_dirs))


# ---- an endpoint

KEY = "sk-secret-0123456789"
URL = "http://localhost:8000/v1"
FLAGS = ("--warmup_frac 0 --steps 1 --prompts_per_step 4 --group_size 2 --guided_group_size 2 "
         "--max_new_tokens 4 --max_prompt_tokens 500 --strategy_candidates 4").split()


class Endpoint:
    """Stands in for the openai package and the server behind it.

    Of four candidates the first gives the answer away and the last has no three parts.
    """

    def __init__(self):
        self.requests = []
        self.fails = lambda prompt: False
        self.error = None            # raised instead of an answer
        self.content = "as usual"    # of an answer that fails
        self.finish_reason = "stop"
        self.counters = {}

    def OpenAI(self, **settings):
        self.settings = settings
        return SimpleNamespace(chat=SimpleNamespace(completions=self))

    def create(self, **request):
        self.requests.append(request)
        prompt = request["messages"][0]["content"]
        content = self.answer(prompt)
        finish_reason = "stop"
        if self.fails(prompt):
            if self.error:
                raise self.error
            content = self.content
            finish_reason = self.finish_reason
        message = SimpleNamespace(content=content)
        return SimpleNamespace(choices=[SimpleNamespace(finish_reason=finish_reason, message=message)])

    def answer(self, prompt: str) -> str:
        if prompt.startswith("Here are a problem, its answer"):
            return "Strategy 1: 0.5\nStrategy 2: 0.9"
        number = int(re.findall(r"What is (\d+) \+", prompt)[-1])
        count = next(self.counters.setdefault(prompt, itertools.count()))
        if count == 3:
            return "I cannot."
        leak = f" It gives {2 * number}." if count == 0 else ""
        return f"<think>Hm.</think>Problem type: sums.\nStrategy: way {count}.\nSteps:\n1. Double it.{leak}"


@pytest.fixture
def server(monkeypatch) -> Endpoint:
    server = Endpoint()
    module = types.ModuleType("openai")
    module.OpenAI = server.OpenAI
    monkeypatch.setitem(sys.modules, "openai", module)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return server


@pytest.fixture
def solved(tmp_path):
    rows = []
    for i in range(11, 19):
        rows.append({"problem": f"What is {i} + {i}?", "answer": str(2 * i),
                     "solution": f"It is \\boxed{{{2 * i}}}."})
    return write_jsonl(tmp_path / "solved.jsonl", rows)


@pytest.fixture
def sgpo_run(model_dirs, solved, tmp_path, run_script, capsys):
    """Return a function that runs sgpo.py on solved problems and returns what it prints."""
    def run(*argv, code: int = 0) -> str:
        given = ["--model", model_dirs["qwen2"], "--dataset", solved, "--out", tmp_path / "run", *FLAGS]
        assert run_script("sgpo", *given, *argv) == code
        screen = capsys.readouterr()
        assert code != 2 or screen.err.count("\n") == 1
        assert KEY not in screen.out + screen.err
        return screen.out + screen.err

    return run


ASK = ["--strategist", URL, "--strategist_model", "strong"]


def test_an_endpoint_extracts_and_training_follows(server, sgpo_run, tmp_path):
    screen = sgpo_run(*ASK)
    assert "found 0, to extract 8" in screen
    assert "8 of 8 problems done, 8 found" in screen
    assert "8 scored, 8 in [0.8, 1], 0 in [0.5, 0.8), 0 below" in screen
    assert "{'gives the answer away': 8, 'not in three parts': 8}" in screen
    assert server.settings["base_url"] == URL
    assert server.settings["api_key"] == KEY
    assert len(server.requests) == 8 * (4 + 1)
    for request in server.requests:
        is_scoring = "its answer" in request["messages"][0]["content"]
        assert request.keys() == {"model", "messages", "temperature"}
        assert request["model"] == "strong"
        assert request["temperature"] == (0.0 if is_scoring else 1.0)
    for row in read_jsonl(tmp_path / "run/strategies.jsonl"):
        assert row.keys() == {"id", "problem", "strategy", "score", "candidates"}
        assert row["strategy"] == "Problem type: sums.\nStrategy: way 2.\nSteps:\n1. Double it."
        assert row["score"] == 0.9
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert sum("guided" in sample for sample in samples) == 4 * 2


def test_only_extraction_and_further_request_arguments(server, sgpo_run, tmp_path):
    more = {"max_completion_tokens": 99, "temperature": 0.6}
    sgpo_run(*ASK, "--extract_only", "--strategist_args", json.dumps(more))
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()
    for request in server.requests:
        assert request["max_completion_tokens"] == 99
        assert request["temperature"] == 0.6


def test_a_dry_run_asks_nothing(server, sgpo_run, tmp_path):
    assert "found 0, to extract 8" in sgpo_run(*ASK, "--dry_run")
    assert server.requests == []
    assert not (tmp_path / "run").exists()


def test_problems_without_an_answer_are_trained_alone_and_asked_again(server, sgpo_run, tmp_path):
    server.fails = lambda prompt: "What is 1" in prompt and "2 +" in prompt
    server.error = TimeoutError("slow")
    sgpo_run(*ASK, "--extract_only")
    path = tmp_path / "run/strategies.jsonl"
    missing = [row["problem"] for row in read_jsonl(path) if row["strategy"] is None]
    assert missing == ["What is 12 + 12?"]
    server.fails = lambda prompt: False
    server.requests.clear()
    assert "found 7, to extract 1" in sgpo_run(*ASK, "--resume")
    assert len(server.requests) == 5
    assert all(sgpo.read_strategies(path).values())


def test_a_cut_line_is_asked_again(server, sgpo_run, tmp_path):
    sgpo_run(*ASK, "--extract_only")
    path = tmp_path / "run/strategies.jsonl"
    path.write_text(path.read_text()[:-30])  # killed in the middle of a line
    assert "found 7, to extract 1" in sgpo_run(*ASK, "--extract_only", "--resume")
    assert "found 8, to extract 0" in sgpo_run(*ASK, "--resume")
    assert len(read_jsonl(path)) == 8


@pytest.mark.parametrize("error, content, finish_reason, message", [
    (RuntimeError(f"401: bad key {KEY}"), "", "stop", "RuntimeError: 401: bad key ***"),
    (None, None, "stop", "--strategist_args '{\"max_completion_tokens\": 8192}'"),
    (None, GOOD, "length", "an answer is empty or cut off"),
    (ValueError("not JSON"), "", "stop", "no answer to 32 requests, last error: ValueError: not JSON")])
def test_nothing_but_failures_end_in_one_line(error, content, finish_reason, message, server, sgpo_run,
                                              tmp_path):
    server.fails = lambda prompt: True
    server.error = error
    server.content = content
    server.finish_reason = finish_reason
    line = sgpo_run(*ASK, code=2)
    assert f"error: --strategist {URL}: " in line
    assert message in line
    assert "Traceback" not in line


def test_an_endpoint_needs_the_package(sgpo_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install openai" in sgpo_run(*ASK, code=2)


# ---- a model on this machine

def test_the_policy_is_its_own_strategist(sgpo_run, tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", [{"problem": "What is 11 + 11?", "strategy": "Double."}])
    screen = sgpo_run("--strategies", path, "--strategist_max_new_tokens", 8)
    assert "7 of 7 problems done, 0 found" in screen  # a random model writes nonsense
    assert "7 of 8 problems have no strategy: they are trained by GRPO alone" in screen
    assert (tmp_path / "run/model").exists()


def test_a_strategist_that_finds_nothing_ends_the_run(sgpo_run):
    assert "none of the problems has a strategy" in sgpo_run("--strategist_max_new_tokens", 8, code=2)


def test_a_local_strategist_gives_up_on_what_is_too_long(model_dirs):
    args = args_of(model_dirs, strategist_max_new_tokens=40)
    tokenizer = small_tokenizer()
    model = small_model()
    model.generation_config.eos_token_id = list(range(128, 260))  # it ends soon
    answers = sgpo.local_strategist(model, tokenizer, args)(["long " * 900, "short", "other"], 0.0)
    assert answers[0] is None
    assert isinstance(answers[1], str)
    model.generation_config.eos_token_id = None
    assert sgpo.local_strategist(model, tokenizer, args)(["short"], 0.0) == [None]  # cut off


# ---- what is trained

def test_a_given_file_is_read_and_not_asked_about(server, sgpo_run, tmp_path):
    rows = [{"problem": f"What is {i} + {i}?", "strategy": f"Any text for {i}."} for i in (11, 12, 13)]
    nothing_found = {"problem": rows[0]["problem"], "strategy": None}
    path = write_jsonl(tmp_path / "mine.jsonl", [rows[0], nothing_found, *rows[1:]])
    path.write_text(path.read_text().rstrip())  # no line end behind the last row
    screen = sgpo_run("--strategies", path, "--strategist", "none", "--prompts_per_step", 8)
    assert "found 3, to extract 0" in screen
    assert "5 of 8 problems have no strategy: they are trained by GRPO alone" in screen
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    guided = {sample["problem"] for sample in samples if sample.get("guided")}
    assert guided == {row["problem"] for row in rows}
    assert len(samples) == 8 * 2 + 3 * 2
    sgpo_run(*ASK, "--strategies", path, "--extract_only", "--out", tmp_path / "more")
    strategies = sgpo.read_strategies(path)
    assert len(strategies) == 8
    assert strategies[rows[2]["problem"]] == "Any text for 13."


@pytest.mark.parametrize("line", [
    "[1]", '{"problem": "p"}x', '{"strategy": "s"}', '{"problem": "p", "strategy": 1}'])
def test_a_strategies_file_must_be_one(line, sgpo_run, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"problem": "p", "strategy": "s"}}\n{line}\n')
    assert f"error: {path}, line 2: " in sgpo_run("--strategies", path, code=2)


def test_a_strategy_that_is_too_long_costs_the_strategy_and_not_the_problem(sgpo_run, tmp_path):
    rows = [{"problem": f"{i}?", "answer": "1", "strategy": "s" * (900 if i == 2 else 9)} for i in range(4)]
    data = write_jsonl(tmp_path / "given.jsonl", rows)
    screen = sgpo_run("--dataset", data)
    assert "dropped 1 strategies that make the prompt too long; first: id 2" in screen
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert sum(sample["id"] == "2" for sample in samples) == 2
    assert sum(sample["id"] == "3" for sample in samples) == 4


def test_guided_samples_are_sampled_with_the_strategy_and_scored_without(train, monkeypatch):
    sampled = []
    scored = []

    def watched_generate(model, prompts, *rest):
        sampled.extend(prompts)
        return generate(model, prompts, *rest)

    def watched_update(model, optimizer, ro, *rest):
        scored.extend(ro.prompts)
        return update(model, optimizer, ro, *rest)

    generate = sgpo.generate_in_pieces
    update = sgpo.update
    monkeypatch.setattr(sgpo, "generate_in_pieces", watched_generate)
    monkeypatch.setattr(sgpo, "update", watched_update)
    train("sgpo", "--steps", 1)
    tokenizer = small_tokenizer()
    assert len(sampled) == 4 * 3 + 4 * 2
    assert sampled[:12] == scored[:12]
    for k in range(12, 20):
        problem = (k - 12) // 2
        assert scored[k] == scored[3 * problem]
        assert "Strategy:\nType: sum." in tokenizer.decode(sampled[k])
        assert "Type: sum." not in tokenizer.decode(scored[k])


def test_the_guided_evaluation_sees_the_strategy_and_the_other_does_not(monkeypatch):
    tokenizer = small_tokenizer()
    asked = []

    def rollout(model, tokenizer, prompts, temperature, args):
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        return SimpleNamespace(texts=["right" if len(asked) == 2 else "wrong"] * len(prompts))

    def reward(texts, problems):
        return torch.tensor([float(text == "right") for text in texts])

    monkeypatch.setattr(sgpo, "rollout", rollout)
    problems = [{"problem": "p", "strategy": "Double it."}, {"problem": "q", "strategy": "Halve it."}]
    metrics = sgpo.evaluate_both(None, tokenizer, problems, reward, sgpo.Args(eval_samples=1))
    unguided, guided = asked
    assert "Double" not in unguided[0]
    assert "Double it." in guided[0]
    assert "Halve it." in guided[1]
    assert metrics == {"eval/accuracy": 0.0, "eval/accuracy_guided": 1.0}
    problems[0].pop("strategy")
    assert "eval/accuracy_guided" not in sgpo.evaluate_both(None, tokenizer, problems, reward, sgpo.Args())
