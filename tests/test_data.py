"""Flags, and data rows: what is recognised, merged, dropped, split and refused."""
import dataclasses
import importlib
import json
import sys
from types import SimpleNamespace

import pytest

import common
import grpo_baseline
import sgpo
import tgpo
from conftest import ROOT, SHARED, read_jsonl, small_tokenizer, write_jsonl

WITH_INSTRUCTION = "What is 1? Let's think step by step and output the final answer after \"####\"."
LAYOUTS = read_jsonl(ROOT / "tests" / "layouts.jsonl")  # rows, and what must be read from them


def chat(text: str | None, gold: str, **more) -> dict:
    """Return a row whose problem is a chat message, as LUFFY, DAPO and veRL write it."""
    message = {"role": "user", "content": text}
    return {"prompt": [message], "reward_model": {"ground_truth": gold}, **more}


def sums(count: int) -> list[dict]:
    rows = []
    for i in range(count):
        rows.append({"problem": f"What is {i} + {i}?", "answer": str(2 * i)})
    return rows


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

@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case["layout"])
def test_layouts(case):
    row = common.to_problem(case["row"])
    for name in ("problem", "answer", "solution", "strategy", "id"):
        assert row.get(name) == case["expected"].get(name)


def test_a_custom_reward_gets_all_columns(tmp_path):
    (tmp_path / "own.py").write_text("def f(text, row):\n    return sum(row['nums']) == row['target']\n")
    reward = common.load_reward(f"{tmp_path}/own.py:f")
    task = {"nums": [1, 2], "target": 3}
    for row in ({"problem": "p", "answer": "1"}, chat("p", "1")):
        problem = common.to_problem(row | task)
        assert reward(["text"], [problem]) == 1.0


def test_a_problem_may_be_in_either_column():
    row = common.to_problem({"problem": None, "question": "q", "answer": "1"})
    assert row["problem"] == "q"


REWARD_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Score:
    value: float

def f(text, row):
    return Score(0.5).value
"""


@pytest.mark.parametrize("name", ["own.py", "own.txt"])
def test_a_custom_reward_may_be_any_python_file(name, tmp_path):
    (tmp_path / name).write_text(REWARD_FILE)
    reward = common.load_reward(f"{tmp_path}/{name}:f")
    assert reward(["text"], [{"problem": "p", "answer": "1"}]) == 0.5


# ---- files

ROWS = [{"problem": "p", "answer": "1", "id": "a"},
        {"problem": "q", "answer": "2", "id": "b"}]
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
    assert common.load_problems(str(tmp_path / name)) == ROWS


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet
    path = str(tmp_path / "rows.parquet")
    with_solution = chat("p", "1", target=[{"content": "t"}])
    without = chat("q", "2", target=[])
    table = pyarrow.Table.from_pylist([with_solution, without])
    pyarrow.parquet.write_table(table, path)
    first, second = common.load_problems(path)
    assert first["solution"] == "t"
    assert "solution" not in second
    assert second["problem"] == "q"
    assert second["id"] == "1"


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
    rows = sums(30)
    copies = [row | {"problem": row["problem"] + "\n"} for row in rows]
    path = write_jsonl(tmp_path / "rows.jsonl", rows + copies * 31)
    problems = common.load_problems(str(path))
    assert [problem["problem"] for problem in problems] == [row["problem"] for row in rows]
    assert "960 rows are 30 different problems" in capsys.readouterr().out


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


def test_a_folder_does_not_hide_a_benchmark_of_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "math500").mkdir()
    common.load_problems("math500")
    assert hub.calls == [("HuggingFaceH4/MATH-500", None, "test")]


def test_a_hub_set_with_several_configs_names_them(hub, capsys):
    error = refusal(capsys, common.load_problems, "openai/gsm8k")
    assert "['main', 'socratic']" in error
    assert "ID:CONFIG:SPLIT" in error


def test_unusable_rows_of_a_hub_set_are_dropped_and_counted(hub, capsys):
    hub.rows = [
        {"problem": " ", "answer": "1"},
        {"problem": "p", "answer": ["1", "2"]},
        {"problem": "p", "solution": "so \\boxed 2"},
        chat(None, "1"),
        {"text": "p"},
    ]
    problem, = common.load_problems("some/set")
    assert problem["answer"] == "2"
    assert problem["id"] == "2"
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


def ids(problems: list[dict]) -> list[str]:
    return [problem["id"] for problem in problems]


def test_problems_of_eval_dataset_leave_training(load, capsys):
    train = [*sums(3), chat(WITH_INSTRUCTION, "1")]
    held_out = [{"problem": "What is 1?\n", "answer": "1"}]
    data = load(train, held_out)
    assert ids(data.train) == ["0", "1", "2"]
    assert len(data.held_out) == 1
    assert "dropped 1 of 4 problems: also in --eval_dataset; first: id 3" in capsys.readouterr().out
    assert "none of its problems can be used" in refusal(capsys, load, sums(3), sums(3))


def test_too_long_prompts_are_dropped_and_counted(load, capsys):
    long = {"problem": "p" * 500, "answer": "1"}
    also_long = {"problem": "q" * 500, "answer": "1"}
    data = load([*sums(3), long], [also_long], max_prompt_tokens=400)
    assert ids(data.train) == ["0", "1", "2"]
    assert data.held_out == []
    printed = capsys.readouterr().out
    assert "dropped 1 of 4 problems: prompts are longer than --max_prompt_tokens 400; first: id 3" in printed
    assert "dropped 1 of 1 problems" in printed


UNREADABLE = [{"problem": "p", "answer": "\\frac{"},
              {"problem": "q", "answer": "nan"}]


def test_golds_that_the_grader_cannot_read_are_dropped_from_training_only(load, capsys):
    data = load([*sums(2), *UNREADABLE], [{"problem": "r", "answer": "\\frac{"}])
    assert ids(data.train) == ["0", "1"]
    assert len(data.held_out) == 1
    assert "dropped 2 of 4 problems: answers cannot be read by the grader" in capsys.readouterr().out


def test_a_custom_reward_may_have_golds_of_its_own(load, tmp_path):
    (tmp_path / "own.py").write_text("def f(text, row):\n    return 0\n")
    data = load(UNREADABLE, reward=f"{tmp_path}/own.py:f")
    assert len(data.train) == 2


def test_max_rows_are_drawn_with_the_seed(load, capsys):
    rows = sums(40)
    drawn = load(rows, max_rows=10).train
    assert len(drawn) == 10
    assert drawn == load(rows, max_rows=10).train
    assert drawn != load(rows, max_rows=10, seed=1).train
    assert "drew 10 of 40 problems with --seed 0" in capsys.readouterr().out
    assert len(load(rows, max_rows=0).train) == 40


def test_the_first_process_decides(monkeypatch):
    monkeypatch.setattr(common, "from_first_process", lambda compute: [True, False])
    problems = [{"id": "0"}, {"id": "1"}]
    assert common.keep(problems, lambda problem: True, "time-out") == problems[:1]


def test_the_fingerprint_notices_another_answer(load):
    rows = sums(3)
    before = load(rows).fingerprint
    assert load(rows).fingerprint == before
    rows[1]["answer"] = "7"
    assert load(rows).fingerprint != before


# ---- the share of the SFT warm-up

def solved(count: int, solution: str = "\\boxed{1}") -> list[dict]:
    rows = sums(count)
    for row in rows:
        row |= {"problem": solution[:4] + row["problem"], "answer": "1", "solution": solution}
    return rows


def test_the_warmup_draws_from_all_solved_problems_and_teaches_the_short_ones(load):
    rows = solved(100) + solved(200, "long " * 20 + "\\boxed{1}")
    data = load(rows, warmup_frac=0.33, max_new_tokens=20)
    short_in_rl = [problem for problem in data.train if problem["solution"] == "\\boxed{1}"]
    assert len(data.train) == 201
    assert 55 < len(short_in_rl) < 80
    assert len(data.warmup) == 100 - len(short_in_rl)
    assert {problem["solution"] for problem in data.warmup} == {"\\boxed{1}"}
    assert not {*ids(data.train)} & {*ids(data.warmup)}
    assert f"a random 99 for the SFT warm-up, {len(data.warmup)} of them are taught" in data.summary


def test_an_end_token_must_fit_into_max_new_tokens(load):
    rows = solved(20)
    assert len(load(rows, warmup_frac=0.5, max_new_tokens=10).warmup) == 10
    assert len(load(rows, warmup_frac=0.5, max_new_tokens=9).warmup) == 0


# ---- problems of a step

def test_problems_of_a_step_are_a_function_of_seed_and_step():
    problems = list(range(10))
    steps = [common.problems_of_step(problems, step, 4, seed=3) for step in range(1, 6)]
    order = sum(steps, [])
    assert sorted(order[:10]) == problems
    assert sorted(order[10:]) == problems
    assert order[:10] != order[10:]
    assert common.problems_of_step(problems, 4, 4, seed=3) == steps[3]
    assert common.problems_of_step(problems, 4, 4, seed=4) != steps[3]


def test_a_step_may_need_more_problems_than_there_are():
    chosen = common.problems_of_step([0, 1, 2], 1, 7, seed=0)
    assert sorted(chosen[:6]) == [0, 0, 1, 1, 2, 2]


# ---- flags

@pytest.fixture
def parse(monkeypatch):
    """Return a function that parses a command line for a script."""
    def run(*argv, script=grpo_baseline):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        return common.parse_args(script.Args)

    return run


def test_spellings(parse):
    args = parse(*"--model m --max-new-tokens 4 --lr=0.5 --bf16 false --dry_run".split())
    assert args.max_new_tokens == 4
    assert args.lr == 0.5
    assert args.bf16 is False
    assert args.dry_run is True


def test_flags_from_a_json_file_and_behind_it(parse, tmp_path):
    flags = {"model": "m", "lr": 1e-3, "group-size": 5, "bf16": True, "eval_dataset": None}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    args = parse(tmp_path / "flags.json", "--lr", 0.5, "--system_prompt", "")
    assert args.lr == 0.5
    assert args.group_size == 5
    assert args.bf16 is True
    assert args.eval_dataset is None
    assert args.system_prompt == ""


def test_the_config_of_a_run_gives_its_flags_but_not_its_directory(parse, tmp_path):
    flags = "--model m --out run --resume --steps 3".split()
    before = parse(*flags, "--system_prompt", "two\nlines")
    config = {"script": "grpo_baseline", "flags": dataclasses.asdict(before)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = parse(tmp_path / "config.json")
    assert args.out is None
    assert args.resume is False
    assert dataclasses.replace(args, out="run", resume=True) == before


@pytest.mark.parametrize("flags, message", [
    ("--temperature 0", "--temperature is 0.0; it must be in (0, inf)"),
    ("--top_p 1.5", "in (0, 1]"),
    ("--lr nan", "--lr is nan"),
    ("--lr inf", "--lr is inf"),
    ("--step 3", "--step"),
    ('{"steps": 2.5}', "--steps"),
    ('{"steps": true}', "--steps"),
    ('{"stepz": 1}', "--stepz")])
def test_bad_flags_are_refused(flags, message, parse, tmp_path, capsys):
    if flags.startswith("{"):
        (tmp_path / "flags.json").write_text(flags)
        flags = f"{tmp_path}/flags.json"
    assert message in refusal(capsys, parse, *flags.split())


def test_the_demo_brings_defaults_that_do_not_override_flags(parse):
    args = parse("--lr", 0.5, script=sgpo)
    assert args.lr == 0.5
    assert args.steps == common.DEMO_FLAGS["steps"]
    assert args.delta == common.DEMO_FLAGS["delta"]
    args = parse("--guidance=rkl", "--steps", 3, script=tgpo)
    assert args.steps == 3
    assert args.max_grad_norm == common.DEMO_TGPO_FLAGS["max_grad_norm"]
    assert parse("--model=m", script=sgpo).delta == 1.0


PAPER = {  # the constants of the two papers
    sgpo: {
        "lr": 1e-6,
        "group_size": 8,
        "guided_group_size": 4,
        "temperature": 1.0,
        "top_p": 0.95,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "delta": 1.0,
        "alpha0": 0.5,
        "gamma": 0.1,
        "alpha_max": 0.8,
        "warmup_frac": 0.33,
        "warmup_lr": 1e-5,
    },
    tgpo: {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "top_p": 1.0,
        "loss_type": "dapo",
        "warmup_frac": 0.0,
    },
}


@pytest.mark.parametrize("script", PAPER, ids=lambda script: script.__name__)
def test_the_papers_constants(script, parse):
    args = parse("--model", "m", script=script)
    for name, value in PAPER[script].items():
        assert getattr(args, name) == value, name


@pytest.mark.parametrize("script", ["grpo_baseline", "sgpo", "tgpo", "eval_math"])
def test_every_flag_has_a_line_of_help(script, run_script, capsys):
    module = importlib.import_module(script)
    for field in dataclasses.fields(module.Args):
        assert field.metadata.get("help"), field.name
    assert run_script(script, "--help") == 0
    printed = capsys.readouterr().out
    assert "--max_new_tokens" in printed
    assert "%%" not in printed
