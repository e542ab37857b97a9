"""Flags, rows of every known layout, prompts, the demo's data. test_strange.py has what is refused."""
import json
import sys

import numpy as np
import pytest

import common
import grpo_baseline
import sgpo
import tgpo
from conftest import SHARED, small_tokenizer, write_rows

BOXED = "So it is $\\boxed{\\frac{1}{2}}$."
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer.\n\nWhat is 1?\n\nSecond paragraph.\n\nRemember to put your answer on its own line.")
LAYOUTS = {"ours": ({"problem": "p", "answer": "1", "strategy": "s", "solution": "t", "id": 7},
                    {"problem": "p", "answer": "1", "strategy": "s", "solution": "t", "id": "7"}),
           "LUFFY": ({"prompt": [{"role": "system", "content": "sys"}, {"role": "user", "content": "p"}],
                      "target": [{"role": "assistant", "content": "<think>r</think> t"}],
                      "reward_model": {"ground_truth": "1"}},
                     {"problem": "p", "answer": "1", "solution": "<think>r</think> t"}),
           "DAPO": ({"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "34"}},
                    {"problem": "What is 1?\n\nSecond paragraph.", "answer": "34"}),
           "OpenR1": ({"problem": "p", "solution": "t", "answer": "1", "problem_type": "Algebra",
                       "uuid": "u"}, {"problem": "p", "answer": "1", "solution": "t"}),
           "NuminaMath": ({"problem": "p", "solution": BOXED, "source": "amc"},
                          {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
           "MATH": ({"problem": "p", "solution": BOXED, "level": "Level 1", "type": "Algebra"},
                    {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
           "GSM8K": ({"question": "p", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
                     {"problem": "p", "answer": "7", "solution": "3 + 4 = <<3+4=7>>7"}),
           "OlympiadBench": ({"question": "p", "context": "c", "final_answer": ["$2$"], "solution": ["t"]},
                             {"problem": "c\np", "answer": "$2$", "solution": "t"}),
           "no context": ({"question": "p", "context": None, "final_answer": ["2"], "solution": []},
                          {"problem": "p", "answer": "2"}),
           "empty answer": ({"problem": "p", "solution": BOXED, "answer": ""},
                            {"problem": "p", "answer": "\\frac{1}{2}", "solution": BOXED}),
           "number as answer": ({"question": "p", "answer": 12}, {"problem": "p", "answer": "12"}),}


# ---- rows

@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    raw, row = LAYOUTS[name]
    assert common.to_row(raw) == row


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files(tmp_path, ending):
    raws = [raw for raw, _ in LAYOUTS.values() if "problem" in raw]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":  # with a byte order mark, blank lines and no end of the last line
        path.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in raws))
    else:
        import datasets
        columns = ("problem", "answer", "solution")
        datasets.Dataset.from_list([{k: r.get(k) for k in columns} for r in raws]).to_parquet(path)
    rows = common.load_rows(str(path))
    assert [r["problem"] for r in rows] == ["p"] * 5 and rows[2]["answer"] == "\\frac{1}{2}"
    assert len({r["id"] for r in rows}) == 5


def test_hub_data_sets(monkeypatch):
    """Id, config and split as in the table; the hub itself is stood in for."""
    import datasets
    calls, raw = [], LAYOUTS["LUFFY"][0]

    def load(*where, **how):
        calls.append((where, how))
        return datasets.Dataset.from_list([raw, raw])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = common.load_rows("Elliott/Openr1-Math-46k-8192")
    assert len(rows) == 2 and rows[0]["solution"] == "<think>r</think> t"
    common.load_rows("math500")
    assert calls == [(("Elliott/Openr1-Math-46k-8192", None), {"split": "train"}),
                     (("HuggingFaceH4/MATH-500", None), {"split": "test"})]


def test_rows_that_cannot_be_used_are_dropped_and_counted(tmp_path, model_dirs, capsys):
    rows = [{"problem": "p" * n, "answer": a} for n, a in [(5, "1"), (500, "2"), (5, "\\frac{")]]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    args = sgpo.Args(model=str(model_dirs["qwen2"]), dataset=data, eval_dataset=data, max_prompt_tokens=400)
    train, held_out = common.load_problems(args, small_tokenizer())
    said = capsys.readouterr().out
    assert [r["id"] for r in train] == ["0"]
    assert [r["id"] for r in held_out] == ["0", "2"]  # what cannot be graded counts there, as wrong
    assert "dropped 1 of 2 rows with an answer that the grader cannot read, first: id 2" in said
    assert said.count("dropped 1 of 3 rows with a prompt over --max_prompt_tokens 400, first: id 1") == 2
    args.max_rows, args.reward = 2, "own.py:f"
    assert len(common.load_problems(args, small_tokenizer())[0]) <= 2
    assert "2 of 3 rows, drawn by --seed 0" in capsys.readouterr().out


def test_problem_order_is_a_function_of_seed_and_step():
    rows = [{"id": i} for i in range(10)]
    seen = [row["id"] for step in range(1, 8) for row in common.batch_of_step(rows, step, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert [row["id"] for row in common.batch_of_step(rows, 6, 4, seed=3)] == seen[20:24]
    assert len(common.batch_of_step(rows[:3], 1, 8, seed=0)) == 8


@pytest.mark.parametrize("name, n", [("math500", 500), ("amc23", 40), ("aime24", 30)])
def test_real_problems(name, n):
    path = SHARED / "data" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("optional data folder not there")
    assert len(common.load_rows(str(path))) == n


def test_a_row_without_an_answer_is_refused_in_a_file_and_never_right_on_the_hub(monkeypatch, capsys):
    proof = {"problem": "p", "solution": "Clearly.", "answer": None}
    with pytest.raises(ValueError, match='no "answer"'):
        common.to_row(proof)
    assert not common.gold_is_gradable(common.to_row(proof, from_hub=True)["answer"])
    strange = [("row 1", {"problem": "p", "expected_answer": "1"})]
    monkeypatch.setattr(common, "raw_rows", lambda source: strange)
    with pytest.raises(SystemExit):
        common.load_rows("some/set")
    assert 'error: some/set: no row has an "answer"' in capsys.readouterr().err


def test_model_text_is_escaped_on_the_screen():
    assert common.printable("a\x1b[31m\u202eb\nc é") == "a\\x1b[31m\\u202eb\nc é"


# ---- prompts

def test_prompts_through_the_chat_template_and_without_one():
    chat, base = small_tokenizer(), small_tokenizer(chat=False)
    plain = chat.decode(common.build_prompt(chat, "1+1?", "Think."))
    assert plain == ("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
                     "<|im_start|>assistant\n")
    guided = chat.decode(common.build_prompt(chat, "1+1?", "", "Type: sum."))
    assert guided == ("<|im_start|>user\nStrategy:\nType: sum.\n\nProblem:\n1+1?<|im_end|>\n"
                      "<|im_start|>assistant\n")
    assert base.decode(common.build_prompt(base, "1+1?", "Think.")) == "Think.\n\n1+1?\n\nSolution:"
    chat.chat_template = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
                          "{% endif %}[{{ messages[0]['content'] }}]")
    assert chat.decode(common.build_prompt(chat, "1+1?", "Think.")) == "[Think.\n\n1+1?]"


def test_a_template_that_writes_the_date_gets_a_fixed_one():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    assert tokenizer.decode(common.build_prompt(tokenizer, "p", "")) == "26 Jul 2024 p"


@pytest.mark.parametrize("lead", ["", "\n", "  ", "\n  "])
def test_a_template_is_otherwise_as_it_is_and_the_default_of_several(lead):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = lead + tokenizer.chat_template
    wanted = tokenizer.apply_chat_template([{"role": "user", "content": "p"}], return_dict=False,
                                           add_generation_prompt=True)
    assert common.build_prompt(tokenizer, "p", "") == wanted
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 1 }}"}
    assert common.build_prompt(tokenizer, "p", "") == wanted


def test_a_tokenizer_gets_a_pad_token_and_must_have_an_end_token(tmp_path, capsys):
    tokenizer = small_tokenizer(pad=None)
    tokenizer.save_pretrained(tmp_path)
    assert common.load_tokenizer(str(tmp_path)).pad_token == tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path))
    assert "has no end token" in capsys.readouterr().err
    tokenizer.chat_template = {"rag": tokenizer.chat_template}
    tokenizer.save_pretrained(tmp_path / "named")
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(tmp_path / "named"))
    assert "no tokenizer can be loaded from it" in capsys.readouterr().err


# ---- flags

def test_flag_files_and_spellings(model_dirs, rows_file, tmp_path, run_script):
    flags = {"model": str(model_dirs["qwen2"]), "dataset": str(rows_file), "steps": 1, "prompts_per_step": 2,
             "group_size": 2, "lr": 1e-3}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    assert run_script("grpo_baseline", tmp_path / "flags.json", "--max-new-tokens", 4, "--lr=0.5", "--out",
                      tmp_path / "run") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["flags"]
    assert config["max_new_tokens"] == 4 and config["lr"] == 0.5 and config["group_size"] == 2


def test_every_flag_has_a_help_line_in_a_group(run_script, capsys):
    assert run_script("sgpo", "--help") == 0
    said = capsys.readouterr().out
    for group in ("model, data and run directory:", "SFT warm-up:",
                  "memory, evaluation and saving:", "algorithm:"):
        assert group in said
    assert "(default: None)" not in said and "(default: 1e-06)" in said and "python sgpo.py --model" in said


def test_the_papers_constants_and_the_demos_own(monkeypatch):
    def args_of(module, *argv):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
        return common.parse_args(module.Args)

    args = args_of(sgpo, "--model", "Qwen/Qwen2.5-7B-Instruct")
    assert (args.lr, args.delta, args.alpha0, args.gamma, args.alpha_max) == (1e-6, 1.0, 0.5, 0.1, 0.8)
    assert (args.clip_low, args.clip_high, args.temperature, args.top_p) == (0.2, 0.28, 1.0, 0.95)
    assert (args.group_size, args.guided_group_size, args.warmup_frac, args.warmup_lr) == (8, 4, 0.33, 1e-5)
    args = args_of(tgpo, "--model", "m", "--teacher", "t")
    assert (args.clip_low, args.clip_high, args.top_p, args.loss_type, args.warmup_frac) == (0.2, 0.2, 1.0,
            "dapo", 0)
    assert args_of(grpo_baseline, "--model", "m").group_size == 12
    args = args_of(sgpo, "--lr", "0.5")
    assert args.lr == 0.5 and (args.steps, args.delta) == (common.DEMO_RECIPE["steps"], 5.0)


# ---- the demo

def test_demo_problems_are_consistent(tmp_path):
    train, held_out = common.demo_rows()
    assert not {r["id"] for r in train} & {r["id"] for r in held_out}
    assert {r["problem"][0] for r in train} == {r["problem"][0] for r in held_out}  # no kind is unseen
    tokenizer = common.demo_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    common.Qwen2Config().save_pretrained(tmp_path)  # beside it the loader takes it for a Qwen2 tokenizer
    loaded = common.load_tokenizer(str(tmp_path))
    assert (len(loaded), loaded.pad_token, loaded.eos_token) == (len(tokenizer), "<pad>", "<end>")
    for row in train + held_out:
        assert common.grade(row["solution"], row["answer"]) == 1.0 and row["answer"] not in row["strategy"]
        for text in (row["problem"], row["solution"], row["strategy"]):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text and loaded(text).input_ids == ids
    # what the demo has no token for is left out
    assert loaded.decode(loaded("né 3+2∑\n").input_ids) == " 3+2"


def test_the_demo_builds_runs_and_ends_with_its_table(tmp_path, run_script, capsys, monkeypatch):
    """The plumbing of `python sgpo.py`, with a warm start too short to learn anything."""
    monkeypatch.setattr(common, "DEMO_STEPS", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny = ["--eval_samples", 1, "--prompts_per_step", 2, "--group_size", 2, "--max_new_tokens", 12]
    assert run_script("sgpo", "--steps", 2, *tiny, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    table = [line.split() for line in said.splitlines()[-6:-3]]
    assert "building a model of the demo once" in said and table[0] == ["held-out", "before", "after"]
    assert table[1][0] == "accuracy" and table[2][:2] == ["accuracy", "guided"]
    assert said.splitlines()[-1].endswith("python tests/bench/ablations.py")
    assert len(list((tmp_path / "cache").rglob("model.safetensors"))) == 1
    assert not list((tmp_path / "cache").rglob("unfinished*"))
    assert run_script("grpo_baseline", "--steps", 0, *tiny, "--out", tmp_path / "again") == 0
    said = capsys.readouterr().out
    assert "building" not in said and "guided" not in said  # from the cache; the baseline knows no strategy
    seeds, true = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: seeds.append(seed) or true(seed))
    monkeypatch.setattr(common, "DEMO_SEED", 1)
    other = common.load_model(str(common.demo_dir())).state_dict()
    mine = common.load_model(str(tmp_path / "again" / "model")).state_dict()
    assert 1 in seeds and max((mine[name] - other[name]).abs().max() for name in mine) > 0.05
