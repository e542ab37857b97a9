"""Flags, and data rows: what is recognised, merged, dropped, split and refused."""
import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

import common
import eval_math
import grpo_baseline
import sgpo
import tgpo
from conftest import SHARED, small_tokenizer, write_jsonl

BOXED = "So it is $\\boxed{\\frac{1}{2}}$."
NAN = float("nan")
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer.\n\nWhat is 1?\n\nSecond paragraph.\n\nRemember to put your answer on its own line.")
VERL = "What is 1? Let's think step by step and output the final answer"


def chat(text: str, gold, **more) -> dict:
    """Return a row whose problem is a chat message, as LUFFY, DAPO and veRL write it."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": text}]
    return {"prompt": messages, "reward_model": {"ground_truth": gold}, **more}


LAYOUTS = {  # name: row, and what must be read from it
    "ours": ({"problem": "p", "answer": "1", "strategy": "s", "solution": "t", "id": 7},
             {"problem": "p", "answer": "1", "strategy": "s", "solution": "t", "id": "7"}),
    "LUFFY": (chat("p", "1", target=[{"role": "assistant", "content": "<think>r</think> t"}]),
              {"problem": "p", "answer": "1", "solution": "<think>r</think> t"}),
    "DAPO": (chat(DAPO, "34"), {"problem": "What is 1?\n\nSecond paragraph.", "answer": "34"}),
    "veRL GSM8K": (chat(VERL + ' after "####".', "1"), {"problem": "What is 1?", "answer": "1"}),
    "veRL MATH": (chat(VERL + " within \\boxed{}.\n", "1"), {"problem": "What is 1?", "answer": "1"}),
    "OpenR1": ({"problem": "p", "solution": "t", "answer": "1", "uuid": "u"},
               {"problem": "p", "answer": "1", "solution": "t"}),
    "MATH": ({"problem": "p", "solution": BOXED, "level": "Level 1"},
             {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
    "MATH, no braces": ({"problem": "p", "solution": "So $\\boxed 2$."},
                        {"problem": "p", "answer": "2", "solution": "So $\\boxed 2$."}),
    "MATH, no space": ({"problem": "p", "solution": "\\boxed-35"},
                       {"problem": "p", "answer": "-35", "solution": "\\boxed-35"}),
    "GSM8K": ({"question": "p", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
              {"problem": "p", "answer": "7", "solution": "3 + 4 = <<3+4=7>>7"}),
    "OlympiadBench": ({"question": "p", "context": "c", "final_answer": ["$2$"], "solution": ["t"]},
                      {"problem": "c\np", "answer": "$2$", "solution": "t"}),
    "no context": ({"question": "p", "context": None, "final_answer": ["2"], "solution": []},
                   {"problem": "p", "answer": "2"}),
    "DeepMath": ({"question": "p", "final_answer": "12"}, {"problem": "p", "answer": "12"}),
    "DeepMath, solved": ({"question": "p", "final_answer": "-12", "solution": "long"},
                         {"problem": "p", "answer": "-12", "solution": "long"}),
    "number as answer": ({"question": "p", "answer": 12}, {"problem": "p", "answer": "12"}),
    "empty answer": ({"problem": "p", "solution": BOXED, "answer": ""},
                     {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
    "pandas": ({"problem": "p", "answer": "1", "solution": NAN, "strategy": NAN, "id": NAN},
               {"problem": "p", "answer": "1"}),
    "no context, pandas": ({"question": "p", "context": NAN, "final_answer": ["2"]},
                           {"problem": "p", "answer": "2"}),
}


def refusal(capsys, function, *args) -> str:
    """Call a function that must refuse its input; return its one line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


# ---- rows

@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    raw, expected = LAYOUTS[name]
    row = common.to_problem(raw)
    fields = ("problem", "answer", "solution", "strategy", "id")
    assert {name: row[name] for name in fields if name in row} == expected


def test_a_custom_reward_gets_all_columns(tmp_path):
    (tmp_path / "own.py").write_text("def f(text, row):\n    return sum(row['nums']) == row['target']\n")
    problem = common.to_problem({"problem": "p", "answer": "1", "nums": [1, 2], "target": 3})
    wrapped = common.to_problem(chat("p", "1", nums=[1, 2], target=4))
    reward = common.load_reward(f"{tmp_path}/own.py:f")
    assert reward(["a", "b"], [problem, wrapped]).tolist() == [1.0, 0.0]


# ---- files

ROWS = [{"problem": "p", "answer": "1"}, {"problem": "q", "answer": "2", "id": "x"}]
JSONL = "\n\n".join(json.dumps(row) for row in ROWS)  # blank lines, and no end of the last line
FILES = {
    "rows.jsonl": JSONL.encode(),
    "bom.jsonl": JSONL.encode("utf-8-sig"),
    "lines.json": JSONL.encode(),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": json.dumps(ROWS, indent=2).encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", FILES)
def test_text_files_need_no_datasets_package(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / name).write_bytes(FILES[name])
    assert common.load_problems(str(tmp_path / name)) == [{**ROWS[0], "id": "0"}, ROWS[1]]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = [chat("p", "1", target=[{"content": "t"}]), chat("q", "2", target=[])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = common.load_problems(str(tmp_path / "rows.parquet"))
    assert (first["problem"], first["answer"], first["solution"]) == ("p", "1", "t")
    assert (second["problem"], second["answer"], second["id"]) == ("q", "2", "1")


BAD_LINES = {  # the third line of a file
    '{"answer": "1"}': 'row has no "problem"',
    '{"problem": " ", "answer": "1"}': 'row has no "problem"',
    '{"problem": "p"}': 'row has no "answer"',
    '{"problem": "p", "answer": NaN}': 'row has no "answer"',
    '{"problem": "p", "solution": "no box"}': 'row has no "answer"',
    '{"problem": "p", "answer": ["1", "2"]}': '"answer" must be a string',
    '{"problem": "p", "answer": true}': '"answer" must be a string',
    '{"problem": 3, "answer": "1"}': '"problem" must be a string',
    '{"problem": "p", "answer": "1", "strategy": 5}': '"strategy" must be a string',
    '{"prompt": [], "reward_model": {}}': "layout not recognised",
    "[1]": "a row must be a JSON object",
    "{broken": "not JSON",
    "[" * 100_000: "not JSON",
    '{"problem": "p", "answer": %s}' % ("9" * 5000): "not JSON",
    '{"problem": "\\ud800", "answer": "1"}': "surrogates not allowed",
    b'{"problem": "\xff", "answer": "1"}': "not UTF-8",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_bad_line_is_refused_with_its_number(line, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    line_bytes = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"problem": "p", "answer": "1"}\n\n' + line_bytes + b"\n")
    error = refusal(capsys, common.load_problems, str(path))
    assert f"{path}, line 3: " in error
    assert BAD_LINES[line] in error


@pytest.mark.parametrize("name, content, message", [
    ("missing.jsonl", None, "no such file"),
    ("empty.jsonl", b"\n", "no row in it can be used"),
    ("cut.json", b'[{"problem": "p"', "cut.json: not a JSON array"),
    ("latin.json", b'[{"problem": "\xe9"}]', "latin.json: not a JSON array"),
    ("array.json", b'[{"problem": "p", "answer": "1"},\n {"problem": "q"}]', "array.json, row 2: row has no"),
    ("broken.parquet", b"no", "not a readable parquet file")])
def test_a_bad_file_is_refused(name, content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refusal(capsys, common.load_problems, str(tmp_path / name))


@pytest.mark.parametrize("name, count", [("math500", 500), ("amc23", 40), ("aime24", 30)])
def test_real_problems(name, count):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the optional data folder is not there")
    assert len(common.load_problems(str(path))) == count


def test_equal_problems_are_merged_and_counted(tmp_path, capsys):
    copies = [{"problem": f"What is {i % 3}?" + "\n" * (i % 2), "answer": "1"} for i in range(96)]
    problems = common.load_problems(str(write_jsonl(tmp_path / "rows.jsonl", copies)))
    assert [problem["id"] for problem in problems] == ["0", "1", "2"]
    assert "96 rows are 3 different problems" in capsys.readouterr().out


def test_model_text_cannot_control_the_terminal():
    assert common.printable("a\x1b[31m\u202eb\nc é") == "a\\x1b[31m\\u202eb\nc é"


# ---- hub data sets

@pytest.fixture
def hub(monkeypatch):
    """Put a made-up `datasets` package in place; return its rows and the calls of load_dataset."""
    package = SimpleNamespace(rows=[chat("p", "1")], calls=[])

    def load_dataset(hub_id, config, split):
        package.calls.append((hub_id, config, split))
        if hub_id == "openai/gsm8k" and config is None:
            raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")
        return package.rows

    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return package


@pytest.mark.parametrize("source, expected", [
    ("Elliott/Openr1-Math-46k-8192", ("Elliott/Openr1-Math-46k-8192", None, "train")),
    ("math500", ("HuggingFaceH4/MATH-500", None, "test")),
    ("math-ai/amc23", ("math-ai/amc23", None, "test")),
    ("olympiadbench", ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train")),
    ("openai/gsm8k:main", ("openai/gsm8k", "main", "train")),
    ("openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
    ("some/set::validation", ("some/set", None, "validation"))])
def test_id_config_and_split(source, expected, hub):
    assert common.load_problems(source)[0]["problem"] == "p"
    assert hub.calls == [expected]


def test_a_hub_set_with_several_configs_names_them(hub, capsys):
    error = refusal(capsys, common.load_problems, "openai/gsm8k")
    assert "['main', 'socratic']" in error
    assert "ID:CONFIG:SPLIT" in error


def test_unusable_rows_of_a_hub_set_are_dropped_and_counted(hub, capsys):
    hub.rows = [{"problem": " ", "answer": "1"}, {"problem": "p", "answer": ["1", "2"]},
                {"problem": "p", "solution": "so \\boxed 2"}, chat(None, "1"), {"text": "p"}]
    problem, = common.load_problems("some/set")
    assert (problem["answer"], problem["id"]) == ("2", "2")
    assert 'dropped 4 of 5 rows that cannot be used; first: some/set, row 1: row has no "problem"' in \
        capsys.readouterr().out


# ---- what a run trains on

@pytest.fixture
def load(model_dirs, tmp_path):
    """Return a function that loads rows as a run with some flags would."""
    def run(rows: list[dict], eval_rows: list[dict] = (), **flags):
        args = grpo_baseline.Args(model=str(model_dirs["qwen2"]), **flags)
        args.dataset = str(write_jsonl(tmp_path / "train.jsonl", rows))
        args.eval_dataset = str(write_jsonl(tmp_path / "eval.jsonl", eval_rows)) if eval_rows else None
        return common.load_data(args, small_tokenizer(), common.load_reward(args.reward))

    return run


def sums(count: int) -> list[dict]:
    return [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


def ids(problems: list[dict]) -> list[str]:
    return [problem["id"] for problem in problems]


def test_problems_of_eval_dataset_leave_training(load, capsys):
    data = load([*sums(3), chat(VERL + ' after "####".', "1")], [{"problem": "What is 1?\n", "answer": "1"}])
    assert ids(data.train) == ["0", "1", "2"]
    assert len(data.held_out) == 1
    assert "dropped 1 of 4 problems: also in --eval_dataset; first: id 3" in capsys.readouterr().out
    assert "none of its problems can be used" in refusal(capsys, load, sums(3), sums(3))


def test_too_long_prompts_are_dropped_and_counted(load, capsys):
    rows = [*sums(2), {"problem": "p" * 500, "answer": "1"}]
    data = load(rows, [{"problem": "q", "answer": "1"}, {"problem": "q" * 500, "answer": "1"}],
                max_prompt_tokens=400)
    assert ids(data.train) == ["0", "1"]
    assert ids(data.held_out) == ["0"]
    printed = capsys.readouterr().out
    assert "dropped 1 of 3 problems: prompts are longer than --max_prompt_tokens 400; first: id 2" in printed
    assert "dropped 1 of 2 problems" in printed


def test_golds_that_the_grader_cannot_read_are_dropped_from_training_only(load, capsys):
    unreadable = [{"problem": "p", "answer": "\\frac{"}, {"problem": "q", "answer": "nan"}]
    data = load([*sums(2), *unreadable], [{"problem": "r", "answer": "\\frac{"}])
    assert ids(data.train) == ["0", "1"]
    assert len(data.held_out) == 1
    assert "dropped 2 of 4 problems: answers cannot be read by the grader" in capsys.readouterr().out


def test_a_custom_reward_may_have_golds_of_its_own(load, tmp_path):
    (tmp_path / "own.py").write_text("def f(text, row):\n    return 0\n")
    data = load([{"problem": "p", "answer": "\\frac{"}], reward=f"{tmp_path}/own.py:f")
    assert len(data.train) == 1


def test_max_rows_are_drawn_with_the_seed(load, capsys):
    drawn = ids(load(sums(40), max_rows=10).train)
    assert len(set(drawn)) == 10
    assert drawn != ids(load(sums(40), max_rows=10, seed=1).train)
    assert drawn == ids(load(sums(40), max_rows=10).train)
    assert "drew 10 of 40 problems with --seed 0" in capsys.readouterr().out
    assert len(load(sums(40), max_rows=0).train) == 40


def test_the_first_process_decides(monkeypatch):
    monkeypatch.setattr(common, "from_first_process", lambda compute: [True, False])
    problems = [{"id": "0"}, {"id": "1"}]
    assert common.keep(problems, lambda problem: True, "time-out") == problems[:1]


def test_the_fingerprint_notices_another_answer(load):
    rows = sums(3)
    before = load(rows).fingerprint()
    assert load(rows).fingerprint() == before
    rows[1]["answer"] = "7"
    assert load(rows).fingerprint() != before


# ---- the share of the SFT warm-up

def solved(count: int, *solutions: str) -> list[dict]:
    """Return problems with the answer 1 and, in turn, these solutions."""
    rows = [{"problem": f"p{i}", "answer": "1"} for i in range(count)]
    for i, row in enumerate(rows):
        row["solution"] = solutions[i % len(solutions)]
    return rows


def test_the_warmup_draws_from_all_solved_problems_and_teaches_the_short_ones(load):
    short, long = "\\boxed{1}", "long " * 20 + "\\boxed{1}"
    data = load(solved(300, short, long, long), warmup_frac=0.33, max_new_tokens=20)
    num_short = sum(problem["solution"] == short for problem in data.train)
    assert len(data.train) == 201  # not only solved problems that are too long are left for RL
    assert 55 < num_short < 80
    assert len(data.warmup) == 100 - num_short
    assert {problem["solution"] for problem in data.warmup} == {short}
    assert not {*ids(data.train)} & {*ids(data.warmup)}
    assert f"a random 99 for the SFT warm-up, {len(data.warmup)} of them are taught" in data.summary


def test_the_warmup_does_not_teach_wrong_solutions(load, capsys):
    data = load([*solved(20, "\\boxed{1}", "\\boxed{2}"), *sums(5)], warmup_frac=0.5)
    assert {problem["solution"] for problem in data.warmup} == {"\\boxed{1}"}
    assert len(data.train) == 15
    assert "the warm-up does not teach" in capsys.readouterr().out


def test_an_end_token_must_fit_into_max_new_tokens(load):
    rows = solved(20, "\\boxed{1}")
    assert len(load(rows, warmup_frac=0.5, max_new_tokens=10).warmup) == 10
    assert len(load(rows, warmup_frac=0.5, max_new_tokens=9).warmup) == 0


def test_the_share_is_drawn_with_the_seed(load):
    rows = solved(40, "\\boxed{1}")
    warmup = ids(load(rows).warmup)
    assert warmup == ids(load(rows).warmup)
    assert warmup != ids(load(rows, seed=1).warmup)


def test_a_warmup_that_takes_all_problems_is_refused(load, capsys):
    rows = solved(4, "\\boxed{1}")
    assert "leaves no problem for RL" in refusal(capsys, lambda: load(rows, warmup_frac=1.0))
    assert len(load(rows, warmup_frac=1.0, steps=0).warmup) == 4


# ---- problems of a step

def test_problems_of_a_step_are_a_function_of_seed_and_step():
    problems = [{"id": i} for i in range(10)]
    order = [p["id"] for step in range(1, 8) for p in common.problems_of_step(problems, step, 4, seed=3)]
    assert sorted(order[:10]) == list(range(10))
    assert sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert [p["id"] for p in common.problems_of_step(problems, 6, 4, seed=3)] == order[20:24]
    assert [p["id"] for p in common.problems_of_step(problems, 1, 4, seed=4)] != order[:4]
    assert len(common.problems_of_step(problems[:3], 1, 8, seed=0)) == 8


# ---- flags

@pytest.fixture
def parse(monkeypatch):
    """Return a function that parses a command line for a script."""
    def run(*argv, script=grpo_baseline, **defaults):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        return common.parse_args(script.Args, defaults)

    return run


def test_spellings(parse):
    args = parse("--model", "m", "--max-new-tokens", 4, "--lr=0.5", "--bf16", "false", "--dry_run")
    assert (args.max_new_tokens, args.lr, args.bf16, args.dry_run) == (4, 0.5, False, True)


def test_flags_from_a_json_file_and_behind_it(parse, tmp_path):
    flags = {"model": "m", "lr": 1e-3, "group-size": 5, "bf16": True, "eval_dataset": None}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    args = parse(tmp_path / "flags.json", "--lr", 0.5, "--system_prompt", "")
    assert (args.model, args.lr, args.group_size, args.bf16) == ("m", 0.5, 5, True)
    assert (args.eval_dataset, args.system_prompt) == (None, "")


def test_the_config_of_a_run_gives_its_flags_but_not_its_directory(parse, tmp_path):
    before = parse("--model", "m", "--system_prompt=-- two\nlines", "--out", "run", "--resume", "--steps", 3)
    config = {"script": "grpo_baseline", "flags": dataclasses.asdict(before)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = parse(tmp_path / "config.json")
    assert (args.out, args.resume) == (None, False)
    assert dataclasses.replace(args, out="run", resume=True) == before


@pytest.mark.parametrize("flags, message", [
    ("--temperature 0", "--temperature is 0.0; it must be in (0, inf)"),
    ("--group_size 1", "--group_size is 1; it must be in [2, inf)"),
    ("--top_p 1.5", "in (0, 1]"),
    ("--lr nan", "--lr is nan"),
    ("--lr inf", "--lr is inf"),
    ("--steps 2.5", "--steps"),
    ("--loss_type ppo", "--loss_type"),
    ("--step 3", "--step"),
    ("missing.json", "missing.json: cannot read flags")])
def test_bad_flags_are_refused(flags, message, parse, capsys):
    assert message in refusal(capsys, parse, *flags.split())


@pytest.mark.parametrize("content", ["[1]", "{", "null", '{"steps": 2.5}', '{"steps": true}', '{"stepz": 1}'])
def test_bad_flag_files_are_refused(content, parse, tmp_path, capsys):
    (tmp_path / "flags.json").write_text(content)
    refusal(capsys, parse, tmp_path / "flags.json")


def test_the_demo_brings_defaults_that_do_not_override_flags(parse):
    args = parse("--lr", 0.5, script=sgpo)
    assert (args.lr, args.steps, args.delta) == (0.5, common.DEMO_FLAGS["steps"], common.DEMO_FLAGS["delta"])
    args = parse("--guidance=rkl", "--steps", 3, script=tgpo)
    assert (args.steps, args.max_grad_norm) == (3, common.DEMO_TGPO_FLAGS["max_grad_norm"])
    assert parse("--model=m", script=sgpo).delta == 1.0


def test_defaults_of_a_fork_replace_those_of_the_class_only(parse):
    assert parse("--model", "m", lr=0.25).lr == 0.25
    assert parse("--model", "m", "--lr", 0.5, lr=0.25).lr == 0.5


def test_the_papers_constants(parse):
    args = parse("--model", "m", script=sgpo)
    assert (args.lr, args.delta, args.alpha0, args.gamma, args.alpha_max) == (1e-6, 1.0, 0.5, 0.1, 0.8)
    assert (args.clip_low, args.clip_high, args.temperature, args.top_p) == (0.2, 0.28, 1.0, 0.95)
    assert (args.group_size, args.guided_group_size, args.warmup_frac, args.warmup_lr) == (8, 4, 0.33, 1e-5)
    args = parse("--model", "m", "--teacher", "t", script=tgpo)
    assert (args.clip_low, args.clip_high, args.top_p, args.loss_type) == (0.2, 0.2, 1.0, "dapo")
    assert args.warmup_frac == 0


@pytest.mark.parametrize("script", [grpo_baseline, sgpo, tgpo, eval_math], ids=lambda script: script.__name__)
def test_every_flag_has_a_line_of_help(script, run_script, capsys):
    for field in dataclasses.fields(script.Args):
        assert field.metadata.get("help"), field.name
    assert run_script(script.__name__, "--help") == 0
    printed = capsys.readouterr().out
    assert "--max_new_tokens" in printed
    assert "%%" not in printed
