"""Strange inputs, damaged files, runs that meet: one line and exit code 2, or the work is done anyhow."""
import os
import resource
import shutil
import signal
import sys

import pytest

import common
import tgpo
from conftest import Child, read_jsonl, small_model, small_tokenizer, write_rows
from test_ranks import whole_run_for_real
from test_runs import same_runs

TRAINING = ("--model model --dataset rows.jsonl --reward reward.py:even --prompts_per_step 3 --group_size 3 "
            "--max_new_tokens 8 --steps 1 --out run").split()
EVALUATION = "--model model --benchmarks sums.jsonl,other.jsonl --max_new_tokens 8 --k 2 --out run".split()
NINES = "9" * 5000

# ---- what is refused: input -> what is said

BAD_LINES = {  # the third of a file of rows
    '{"answer": "1"}': 'row has no "problem"', '{"problem": "p"}': 'row has no "answer"',
    '{"problem": "p", "answer": " "}': 'row has no "answer"', '{"problem": 3, "answer": "1"}': "row has no",
    "[1]": "a row must be a JSON object", '{"prompt": [], "reward_model": {}}': "layout not recognised",
    '{"problem": "p", "answer": "1", "strategy": 5}': '"strategy" must be a string',
    "{broken": "not JSON (Expecting property name enclosed in double quotes, column 2)",
    "[" * 100_000: "not JSON", '{"problem": "p", "answer": %s}' % NINES: "not JSON (Exceeds the limit (4300",
    b'{"problem": "\xff", "answer": "1"}': "not JSON ('utf-8' codec can't decode byte 0xff",
    '{"problem": "\\ud800", "answer": "1"}': "holds half a character"}
FLAG_FILES = {
    '{"steps": 2.5}': "2.5", "steps: many": "--steps", "steps: [1, 2]": "2", '{"steps": true}': "True",
    '{"stepz": 1}': "did you mean --steps", "[1]": "cannot read flags", "{": "cannot read flags",
    "null": "cannot read flags", '{"seed": %s}' % NINES: "cannot read flags",
    '{"system_prompt": "\\ud800"}': "UTF-8", '{"resume": true}': "--resume needs --out",
    '{"out": "old", "resume": true, "lr": 0.5}': "lr: 1e-06 there, 0.5 now"}
REWARDS = {  # what the function gives
    "1 / 0": "ZeroDivisionError", "exit()": "SystemExit", "1e300": "not from -1e6 to 1e6",
    "10 ** 400": "Overf", "float('nan')": "not from -1e6 to 1e6", "'x'": "ValueError", "None": "TypeError",
    "(_ for _ in ()).throw(KeyboardInterrupt)": "KeyboardInterrupt",
    "globals().setdefault('n', iter('1' * 33)) and float(next(n))": "StopIteration"}
FLAGS = {  # of sgpo.py
    "--group_size 1": "--group_size is 1; it must be in [2, inf)", "--guided_group_size 0": "is 0",
    "--stepz 3": "did you mean --steps", "--nonsense": "unknown flag --nonsense", "--steps many": "--steps",
    "--temperature 0": "in (0, inf)", "--top_p 1.5": "in (0, 1]", "--loss_type ppo": "--loss_type",
    "--distill magic": "--distill", "--gamma 0": "--gamma", "--lr nan": "--lr is nan",
    "--delta -1": "--delta", "--lr inf": "--lr is inf", "--temperature inf": "is inf",
    "--eval_temperature inf": "is inf", "--warmup_lr inf": "is inf", "--gamma inf": "is inf",
    "--clip_high 1e300": "is 1e+300: too large", f"--steps 1{'0' * 300}": "too large",
    "--warmup_frac 1.5": "in [0, 1]", "--updates_per_rollout 9": "--updates_per_rollout 9",
    "--max_new_tokens 5000": "exceeds the context of", "--system_prompt \udcff": "not UTF-8",
    "--no_cpu_offload": "did you mean --cpu_offload", "--dataset missing.jsonl": "no such file",
    "--dataset .": ".: no such file", "--dataset empty": "no rows",
    "--dataset broken.parquet": "not a readable parquet file", "--dataset plain.jsonl": "--distill none",
    "--dataset solved.jsonl --strategist none": "none of the 5",
    "--dataset . --resume": "no run in --out run", "--dataset nobody/nothing": "not to be had from the hub",
    "--model nobody/nothing": "couldn't connect",
    "--dataset solved.jsonl --warmup_frac 1": "1.0 leaves no problem for RL", "--model bare": "no tokenizer",
    "--model ./missing": "no such directory", "--model nans": "its weights are not finite",
    "--model demo": "/proc/nowhere/sgpo-tgpo: the demo cannot be built there (No such file or directory)",
    "--model half": "no causal language model can be loaded", "--model t5": "no causal language model can be",
    "--max_prompt_tokens 3": "none of its rows can",
    "--reward missing.py:f": "--reward missing.py:f", "--reward reward.py:odd": "no attribute 'odd'",
    "--out foreign": "holds no results", "--out foreign/thesis.tex": "cannot be used",
    "--out /proc/x": "cannot", "--out config": "its config.json is not one of ours",
    "--out old": "script: 'grpo_baseline' there",
    "--strategist http://x/v1": "name its model with --strategist_model",
    "--strategy_candidates 0": "[1, inf)", "--strategist_model m": "http(s)://HOST:PORT/v1",
    "--strategies .": "a directory", "--strategist http://me:key@x/v1 --strategist_model m": "OPENAI_API_KEY",
    "--strategies 1.jsonl": "line 1",
    "--strategist http://x/v1?key=abc --strategist_model m": "OPENAI_API_KEY",
    "--strategies a/b": "no such fol", "--strategies foreign/thesis.tex": "thesis.tex, line 2",
    "--strategies 5.jsonl": "holds half a character",
    "--dataset solved.jsonl --warmup_frac 0 --strategies /proc/s.jsonl": "/proc/s.jsonl.lock: cannot be used"}
EVAL_FLAGS = {
    "--benchmarks math501": "math501: neither a file nor one of math500, amc23, aime24, aime25, minerva,",
    "--benchmarks ,": "empty", "--benchmarks missing.jsonl": "missing.jsonl: no such file", "--k few": "--k",
    "--benchmarks sums.jsonl,./sums.jsonl": "there is a sums.jsonl",
    "--k 0": "--k is 0; it must be in [1, inf)", "--temperature 0": "add --k 1", "--top_p 0": "--top_p",
    "--temperature -1": "--temp", "--seed -1": "--seed", "--temperature inf": "--temperature",
    "--generation_batch_size 0": "is 0", "--max_new_tokens 0": "--max_", "--max_new_tokens 4090": "exceeds",
    "--model ./missing": "no such directory", "--model nans": "not finite",
    "--model half": "no causal language model can be loaded",
    "--strategies own": "no problem of the benchmarks", "--strategies missing.jsonl": "no such file",
    "--strategies 0.jsonl": "line 1: a row must have a", "--strategies 1.jsonl": "a row must have",
    "--strategies 2.jsonl": '"problem" or "id"', "--strategies 3.jsonl": "no problem of",
    "--strategies 4.jsonl": "several benchmarks have the id 0",
    "--strategies 5.jsonl": "holds half a character", "--benchmarks math500": "not to be had from the hub"}
STRATEGIES = [{"problem": "What is 0 + 0?"}, [1], {"strategy": "s"}, {"problem": "q", "strategy": "s"},
              {"id": "0", "strategy": "s"}, {"problem": "What is 0 + 0?", "strategy": "\ud83d"}]  # 0.jsonl ..
FLAG_NAMES = [f"flags{k}.{'json' if text[0] in '[{n' else 'yaml'}" for k, text in enumerate(FLAG_FILES)]
LINES = [f"bad{k}.jsonl, line 3: {said}" for k, said in enumerate(BAD_LINES.values())]
REFUSED = [*[("sgpo", *flags) for flags in FLAGS.items()],
           *[("eval_math", *flags) for flags in EVAL_FLAGS.items()],
           *[("grpo_baseline", f"--dataset {said.split(',')[0]}", said) for said in LINES],
           *[("eval_math", f"--benchmarks {said.split(',')[0]}", said) for said in LINES],
           *[("grpo_baseline", *flags) for flags in zip(FLAG_NAMES, FLAG_FILES.values())],
           *[("grpo_baseline", f"--eval_dataset rows.jsonl --reward reward{k}.py:f", said)
             for k, said in enumerate(REWARDS.values())]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with all of the files named above."""
    place = tmp_path_factory.mktemp("place")

    def write(name: str, text) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    for name in ("model", "bare", "nans"):
        model = small_model()
        model.model.norm.weight.data *= float("nan") if name == "nans" else 1.0
        model.save_pretrained(place / name)
        if name != "bare":
            small_tokenizer().save_pretrained(place / name)
    shutil.copytree(place / "model", place / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    rows = [{"problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    write_rows(place / "rows.jsonl", [{**row, "strategy": "Type: sum. Strategy: double."} for row in rows])
    write_rows(place / "solved.jsonl", [{**row, "solution": "ok"} for row in rows])
    for name in ("plain", "sums", "other"):
        write_rows(place / f"{name}.jsonl", rows)
    for k, row in enumerate(STRATEGIES):
        write_rows(place / f"{k}.jsonl", [row])
    for k, line in enumerate(BAD_LINES):
        line = line if isinstance(line, bytes) else line.encode()
        write(f"bad{k}.jsonl", b'{"problem": "p", "answer": "1"}\n\n' + line + b"\n")
    for k, (name, text) in enumerate(zip(FLAG_NAMES, FLAG_FILES)):
        write(name, "\ufeff" * (k % 2) + text)  # a byte order mark is no matter
    for k, body in enumerate(REWARDS):
        write(f"reward{k}.py", f"def f(response, row):\n    return {body}\n")
    even = "def even(response, row):\n    row.clear()\n    return float(len(response) % 2 == 0)\n"
    write("reward.py", even)
    write("foreign/thesis.tex", '{"problem": "p", "strategy": "s"}\nprecious\n')
    write("config/config.json", '{"model_type": "qwen2"}')
    small_tokenizer().save_pretrained(place / "t5")
    write("t5/config.json", '{"model_type": "t5"}')
    write("broken.parquet", "no")
    write("empty", "\n")
    return place


OLD = ["--save_every", 1, "--steps", 2]  # the flags of a run that is there: old


@pytest.fixture
def go(place, run_script, monkeypatch):
    """Run a script in `place` on its usual flags and more -> its exit code."""
    def run(script: str, *flags) -> int:
        usual = EVALUATION if script == "eval_math" else TRAINING
        return run_script(script, *([*flags, *usual[:-2]] if flags[0] in FLAG_NAMES else [*usual, *flags]))
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    if not (place / "old").exists():
        assert run("grpo_baseline", "--out", "old", *OLD) == 0
    return run


@pytest.mark.parametrize("script, flags, said", REFUSED, ids=lambda x: x[:40])
def test_refused_in_one_line_and_nothing_is_left(script, flags, said, go, place, capsys):
    def there() -> dict:
        return {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file() and "__pyc" not in str(p)}

    before = there()
    code, after, error = go(script, *flags.split()), there(), capsys.readouterr().err
    shutil.rmtree(place / "run", ignore_errors=True)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert after == before


# ---- what is taken

TAKEN = [("grpo_baseline", "--dataset bom.jsonl"), ("sgpo", "--dataset plain.jsonl --strategies cut.jsonl"),
         ("eval_math", "--strategies cut.jsonl --benchmarks bom.jsonl"), ("sgpo", "--delta inf"),
         ("grpo_baseline", "--activation_checkpointing false --cpu_offload false --bf16 false")]


@pytest.mark.parametrize("script, flags", TAKEN)
def test_taken(script, flags, go, place, tmp_path):
    """A byte order mark, a last line that a kill has cut; flags as the README has them."""
    (place / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (place / "plain.jsonl").read_bytes())
    (place / "cut.jsonl").write_text('{"problem": "What is 1 + 1?", "strategy": "Add."}\n{"problem": "What')
    assert go(script, *flags.split(), "--out", tmp_path / "run") == 0


def speechless(kind: str, *argv) -> int:
    """A run whose screen takes no letter beyond ASCII, or nothing."""
    sys.stdout.reconfigure(encoding="ascii", errors="strict")
    if kind == "closed":
        there, here = os.pipe()
        os.close(there)
        sys.stdout = open(here, "w")
    return whole_run_for_real("grpo_baseline", argv)


@pytest.mark.parametrize("kind, code", [("ascii", 0), ("closed", 1)])
def test_a_screen_that_takes_no_text(kind, code, go, place, tmp_path):
    argv = [*TRAINING, "--out", tmp_path / "caf\u00e9"]
    assert Child(speechless, kind, *argv, said=tmp_path / "said").ended() == code
    assert (tmp_path / "said.err").read_text() == ""
    assert (tmp_path / "caf\u00e9" / "model").exists() == (not code)


# ---- runs that meet, and what is left of others

def copy_of_old(place, tmp_path):
    return shutil.copytree(place / "old", tmp_path / "run")


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_living_run_is_left_alone(more, go, place, tmp_path, capsys):
    run = copy_of_old(place, tmp_path) if more else tmp_path / "run"
    run.mkdir(exist_ok=True)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"}
    with common.lock(run / "lock", "taken"):
        assert go("grpo_baseline", *OLD, "--out", run, *more) == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"} == before


def test_a_run_that_came_and_went_meanwhile(go, tmp_path, capsys, monkeypatch):
    flags, said = [*OLD, "--out", tmp_path / "run"], common.Run.plan
    monkeypatch.setattr(common.Run, "plan", lambda *a, **k: (
        monkeypatch.setattr(common.Run, "plan", said), go("grpo_baseline", *flags), said(*a, **k)))
    assert go("grpo_baseline", *flags) == 2
    assert "holds this run already" in capsys.readouterr().err
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_what_has_done_nothing_may_begin_anew_with_other_flags(go, place, tmp_path):
    run = copy_of_old(place, tmp_path)
    for path in (run / "model", run / "checkpoints"):
        shutil.rmtree(path)
    (run / "samples.jsonl").unlink()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.5}\n')  # as far as it came
    assert go("grpo_baseline", *OLD, "--out", run, "--lr", 0.5) == 0
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2]


DAMAGE = {"cut": lambda folder: [f.write_bytes(f.read_bytes()[:2000]) for f in folder.glob("*.distcp")],
          "without metadata": lambda folder: (folder / ".metadata").unlink(),
          "noise": lambda folder: (folder / ".metadata").write_bytes(b"noise"),
          "without about.json": lambda folder: (folder / "about.json").unlink(),
          "another about.json": lambda folder: (folder / "about.json").write_text("[1]"),
          "a file": lambda folder: (shutil.rmtree(folder), folder.write_text(""))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_the_one_before_goes_on(damage, go, place, tmp_path, capfd,
                                                                 caplog):
    run, whole = copy_of_old(place, tmp_path), place / "whole"
    if not whole.exists():
        assert go("grpo_baseline", *OLD, "--steps", 3, "--out", whole) == 0
    DAMAGE[damage](run / "checkpoints" / "step_000002")
    capfd.readouterr()
    assert go("grpo_baseline", *OLD, "--steps", 3, "--out", run, "--resume") == 0
    said = capfd.readouterr()
    assert "step_000002 cannot be read" in said.out and said.err == ""
    assert not [record for record in caplog.records if record.exc_info]  # nor does torch say more
    same_runs(run, whole)


@pytest.mark.parametrize("file, content, said", [
    ("metrics.jsonl", b"\xff\n", "metrics.jsonl, line 1: not JSON"),
    ("config.json", b"\xff", "its config.json is not one of ours"),
    ("warmup.state/about.json", b"{}", "warmup.state: cannot be used (damaged, FileNotFoundError: remove")])
def test_damaged_files_of_a_run(file, content, said, go, place, tmp_path, capsys):
    run, flags = tmp_path / "run", ["--dataset", "solved.jsonl", "--warmup_frac", 0.5, "--warmup_epochs", 1]
    assert go("grpo_baseline", *flags, "--out", run) == 0
    if "warmup" in file:
        for path in (run / "checkpoints", run / "warmup"):
            shutil.rmtree(path)
        (run / "warmup.state").mkdir()
    (run / file).write_bytes(content)
    capsys.readouterr()
    assert go("grpo_baseline", *flags, "--out", run, "--resume") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# ---- disks, weights, the hub

def on_a_small_disk(*argv) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # a write beyond fails as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    return whole_run_for_real("grpo_baseline", argv)


def test_a_full_disk_is_one_line_and_loses_nothing(go, place, tmp_path):
    argv, run = [*TRAINING, *OLD, "--out", tmp_path / "run"], tmp_path / "run"
    assert Child(on_a_small_disk, *argv, said=tmp_path / "said").ended() == 2
    err = (tmp_path / "said.err").read_text()
    assert err.count("\n") == 1 and "cannot be written" in err and "make room" in err
    assert not (run / "model").exists() and not list((run / "checkpoints").iterdir())
    assert go("grpo_baseline", *OLD, "--out", run, "--resume") == 0
    with pytest.raises(OSError) as full:
        common.write_jsonl("/dev/full", [{}])
    assert full.value.filename == "/dev/full"


def test_weights_that_are_not_finite_are_saved_nowhere(tmp_path, capsys):
    model = small_model()
    model.lm_head.weight.data[0] = float("nan")
    for save, what in ((common.save_pretrained, small_tokenizer()), (common.save_state, None)):
        with pytest.raises(SystemExit):
            save(*(model, what, tmp_path / "new") if what else (tmp_path / "new", model, what))
        assert "not finite" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: calls.append(1) or 1 / 0)
    common.look_for_hub.cache_clear()
    with pytest.raises(SystemExit):
        common.load_tokenizer("./missing")
    assert not calls  # a path is no hub id
    for _ in range(2):
        assert common.model_path("some/model") == "some/model"
    assert len(calls) == 1 and common.huggingface_hub.constants.HF_HUB_OFFLINE
    assert "cannot be reached (division by zero): only its cache" in capsys.readouterr().out


def test_a_divergence_reads_as_many_problems_as_it_can(go, tmp_path, monkeypatch):
    seen, true = [], tgpo.rollout
    monkeypatch.setattr(tgpo, "rollout", lambda *a: seen.extend(map(tuple, a[2])) or true(*a))
    assert go("tgpo", "--teacher", "model", "--measure_divergence", 8, "--out", tmp_path / "run") == 0
    assert len(seen) == len(set(seen)) == 8
