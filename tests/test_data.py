"""Rows of every known layout, and what is said of the ones that are not."""
import json

import pytest

import common
from conftest import SHARED, small_tokenizer

BOXED = "So it is $\\boxed{\\frac{1}{2}}$."
LAYOUTS = {
    "ours": ({"problem": "p", "answer": "1", "strategy": "s", "solution": "t", "id": 7},
             {"problem": "p", "answer": "1", "strategy": "s", "solution": "t", "id": "7"}),
    "LUFFY": ({"prompt": [{"role": "system", "content": "sys"}, {"role": "user", "content": "p"}], "target": [{"role": "assistant", "content": "<think>r</think> t"}],
               "reward_model": {"ground_truth": "1", "style": "rule"}}, {"problem": "p", "answer": "1", "solution": "<think>r</think> t"}),
    "DAPO": ({"prompt": [{"role": "user", "content": "Solve the following math problem step by step. The last line of your response should be of the form "
                          "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1?\n\nSecond paragraph.\n\n"
                          "Remember to put your answer on its own line after \"Answer:\"."}], "reward_model": {"ground_truth": "34"}},
             {"problem": "What is 1?\n\nSecond paragraph.", "answer": "34"}),
    "OpenR1": ({"problem": "p", "solution": "t", "answer": "1", "problem_type": "Algebra", "uuid": "u"}, {"problem": "p", "answer": "1", "solution": "t"}),
    "NuminaMath": ({"problem": "p", "solution": BOXED, "source": "amc"}, {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
    "MATH": ({"problem": "p", "solution": BOXED, "level": "Level 1", "type": "Algebra"}, {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
    "GSM8K": ({"question": "p", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}, {"problem": "p", "answer": "7", "solution": "3 + 4 = <<3+4=7>>7"}),
    "OlympiadBench": ({"question": "p", "context": "c", "final_answer": ["$2$"], "solution": ["t"]}, {"problem": "c\np", "answer": "$2$", "solution": "t"}),
    "OlympiadBench without context": ({"question": "p", "context": None, "final_answer": ["2"], "solution": []}, {"problem": "p", "answer": "2"}),
    "number as answer": ({"question": "p", "answer": 12}, {"problem": "p", "answer": "12"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    raw, row = LAYOUTS[name]
    assert common.to_row(raw) == row


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files(tmp_path, ending):
    raws = [raw for raw, _ in LAYOUTS.values() if "problem" in raw]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("\n\n".join(json.dumps(r) for r in raws))
    else:
        import datasets
        datasets.Dataset.from_list([{k: r.get(k) for k in ("problem", "answer", "solution")} for r in raws]).to_parquet(path)
    rows = common.load_rows(str(path))
    assert [r["problem"] for r in rows] == ["p"] * 4 and rows[2]["answer"] == "\\frac{1}{2}" and len({r["id"] for r in rows}) == 4


def test_hub_data_set(monkeypatch):
    """The hub path: id, config and split as in the table, layout recognised; the hub itself is stood in for."""
    import datasets
    calls = []
    raw = LAYOUTS["LUFFY"][0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or datasets.Dataset.from_list([raw, raw]))
    rows = common.load_rows("Elliott/Openr1-Math-46k-8192")
    assert len(rows) == 2 and rows[0]["solution"] == "<think>r</think> t" and calls == [(("Elliott/Openr1-Math-46k-8192", None), {"split": "train"})]


@pytest.mark.parametrize("line, said", [
    ('{"answer": "1"}', 'no "problem"'), ('{"problem": "p"}', 'no "answer"'), ('{"problem": "p", "answer": " "}', 'no "answer"'), ("{broken", "not JSON"),
    ("[1]", "JSON object"), ('{"problem": 3, "answer": "1"}', 'no "problem"'), ('{"prompt": [], "reward_model": {}}', "layout"),
    ('{"problem": "p", "answer": "1", "strategy": 5}', '"strategy"'), ("[" * 100000, "not JSON")])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, capsys, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n\n' + line + "\n")
    with pytest.raises(SystemExit) as stop:
        common.load_rows(str(path))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and f"{path}, line 3" in err and said in err


def test_unusable_rows_are_dropped_and_counted(capsys):
    tokenizer = small_tokenizer()
    rows = [{"id": str(i), "problem": "p" * n, "answer": a} for i, (n, a) in enumerate([(5, "1"), (500, "2"), (5, "\\frac{")])]
    kept, longest = common.usable_rows(rows, lambda row: [tokenizer(row["problem"]).input_ids], 100, check_gold=True)
    said = capsys.readouterr().out
    assert [r["id"] for r in kept] == ["0"] and longest == 5
    assert "dropped 1 of 3 rows with an answer that the grader cannot parse, first: id 2" in said and "over 100 tokens, first: id 1" in said
    with pytest.raises(SystemExit):
        common.usable_rows(rows[1:], lambda row: [tokenizer(row["problem"]).input_ids], 100, check_gold=True)


def test_model_text_is_escaped_on_the_screen():
    assert common.printable("a\x1b[31m\u202eb\nc é") == "a\\x1b[31m\\u202eb\nc é"


@pytest.mark.parametrize("name", ["math500", "amc23", "aime24"])
def test_real_problems(name):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("optional data folder not there")
    rows = common.load_rows(str(path))
    assert len(rows) == {"math500": 500, "amc23": 40, "aime24": 30}[name]
    assert all(common.gold_is_gradable(row["answer"]) for row in rows)
