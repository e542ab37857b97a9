"""tests/bench/gpu.py at toy shapes: nothing in it shall wait for a GPU to be found wrong."""
import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import common
from conftest import Child, read_jsonl

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import gpu  # noqa: E402

pytestmark = pytest.mark.skipif(common.ON_GPU, reason="there the command has real shapes")
SAME_AS_ANOTHER = {  # at toy shapes
    "trl-0.5b", "sgpo-3b", "tgpo-3b", "tgpo-0.5b", "sgpo-1.5b", "tgpo-1.5b", "sgpo-7b"}


def command(parts: dict, *flags) -> None:
    """The command with these parts, in a process that has imported all it needs."""
    gpu.PARTS, common.DEMO_STEPS = parts, 2
    gpu.step.in_a_process = in_this_process
    sys.argv = ["gpu.py", *map(str, flags)]
    gpu.main()


def in_this_process(who: str, name: str, folder: str, steps: str) -> dict:
    """A contestant of step.py without the seconds of a start."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        gpu.step.child(who, name, Path(folder), int(steps))
    return json.loads(said.getvalue().splitlines()[-1])


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """The rows of the cells under each title."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {title.strip("*"): [row.strip("| ").split(" | ") for row in rows]
            for (title, *_), rows in zip(blocks, blocks[1:]) if title.startswith("**")}


def test_every_part_leaves_its_rows_and_the_tables_have_no_hole(tmp_path):
    parts = {part: how for part, how in gpu.PARTS.items() if part not in SAME_AS_ANOTHER}
    child = Child(command, parts, "--out", tmp_path, said=tmp_path / "said", XDG_CACHE_HOME=str(tmp_path))
    assert child.ended(240) == 0
    lines = {line["part"]: line for line in read_jsonl(tmp_path / "results.jsonl")}
    failed = {part: line["message"] for part, line in lines.items() if not line["ok"]}
    assert list(lines) == list(parts) and all(line["rows"] for line in lines.values())
    assert set(failed) <= {"trl-1.5b"}, failed
    assert all("trl is not installed" in why for why in failed.values()), failed
    text = (tmp_path / "said").read_text()
    tables = tables_of(text)
    assert len(tables) == 10 and "torch 2" in text and text.count("\nMissing: ") == 1
    for title, (head, rule, *rows) in tables.items():
        assert rows and set(rule) == {"---"} and len(rule) == len(head), title
        assert all(len(row) == len(head) and not {"", "nan", "None"} & set(row) for row in rows), title
    shares = [float(row[-3].strip("%")) for row in tables["A step"][2:]]
    assert all(0 < share < 100 for share in shares)  # of the roofline


def good():
    yield "Table", {"a": 1, "b": 2.5}


def half():
    yield from good()
    raise ValueError("first line\nsecond")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def slow():
    yield from good()
    time.sleep(60)


def no_memory():
    common.program(lambda: exec("raise torch.OutOfMemoryError", {"torch": torch}))()
    yield


def test_a_part_that_fails_leaves_its_message_and_the_same_command_goes_on(tmp_path):
    parts = {run.__name__: (run, limit) for run, limit in
             ((half, 60), (killed, 60), (slow, 1), (no_memory, 60), (good, 60))}
    assert Child(command, parts, "--out", tmp_path, said=tmp_path / "said").ended() == 0
    lines = {line["part"]: line for line in read_jsonl(tmp_path / "results.jsonl")}
    assert list(lines) == list(parts) and lines["good"]["ok"]
    for part, why in {"half": "ValueError: first line", "killed": "killed by signal 9",
                      "slow": "cut off after 1 s", "no_memory": "error: out of memory"}.items():
        assert not lines[part]["ok"] and why in lines[part]["message"], part
        assert len(lines[part]["rows"]) == (part in ("half", "slow"))
    text = (tmp_path / "said").read_text()
    assert tables_of(text)["Table"][2:] == [["1", "2.5"]] * 3
    assert "\nMissing: half (" in text and "good" not in text.split("Missing: ")[1]

    parts |= {"half": (good, 60), "slow": (good, 60), "new": (good, 60), "long": (good, 200)}
    again = Child(command, parts, "--out", tmp_path, "--minutes", 1.02, said=tmp_path / "again")
    assert again.ended() == 0
    tried = [line["part"] for line in read_jsonl(tmp_path / "results.jsonl")][len(lines):]
    assert tried[:2] == ["new", "long"] and set(tried[2:]) == {"half", "killed", "slow", "no_memory"}
    missing = (tmp_path / "again").read_text().split("Missing: ")[1]
    assert missing.startswith("killed (") and "half" not in missing and "no_memory (" in missing


def on_a_card(out: Path) -> list:
    """A step where all that torch.cuda is asked is made up; the models are made in bf16."""
    gpu.OUT = out
    card = {"synchronize": None, "reset_peak_memory_stats": None, "empty_cache": None, "memory_allocated": 0,
            "max_memory_allocated": 5 * 2 ** 30, "get_device_name": "NVIDIA H100 80GB HBM3",
            "get_device_properties": SimpleNamespace(total_memory=800_000)}
    with mock.patch.multiple(torch.cuda, **{name: mock.Mock(return_value=x) for name, x in card.items()}), \
            mock.patch.multiple(common, ON_GPU=True, room_to_pin=lambda model: False):
        found, peaks = [*gpu.one_step("tgpo", "7b"), *gpu.head()], gpu.peaks()
    return [json.dumps(found), peaks]


def test_a_step_on_a_card_that_is_made_up(tmp_path):
    found, peaks = Child(on_a_card, tmp_path, said=tmp_path / "said").ended()
    (_, row), *more = json.loads(found)
    assert peaks == (989e12, 3.35e12) and len(more) == 3
    assert row["GPU GB"] == 5 and row["MFU"] == "0.0%" and all(head["takes GB"] == 5 for _, head in more)
    said = (tmp_path / "said").read_text()
    assert "the card has 0.0008 GB; --activation_checkpointing; --cpu_offload" in said


def test_least_work_by_hand():
    """One layer, d 4, inner 8, two heads that share a key head of 2; a row of 3 + 2 tokens, V 10."""
    config = gpu.step.Config(vocabulary=10, hidden=4, inner=8, layers=1, heads=2, kv=1)
    row = {"passes": [(0, 5, True), (0, 5, False)], "lengths": [5], "written": [2]}
    weights = 4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 8  # q and o, k and v, the three of the MLP
    forward = 2 * weights * 5 + 2 * 4 * 5 * 5 + 2 * 40 * 2
    flops, read = gpu.least_work(config, row, 1)
    assert flops == 4 * forward and gpu.least_work(config, row, 0)[0] == 5 * forward
    assert read == 2 * 2 * (weights + 40) + 2 * 2 * 2 * 2 * (3 + 1)


def test_an_unknown_part_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "nothing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--only nothing: there are tests, demo, sgpo-0.5b" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_the_end_is_as_likely_everywhere(tied, tmp_path):
    """So that lengths are natural: as if each were drawn with one chance at every token."""
    gpu.step.build(gpu.step.Config(2000, mean=50, hidden=512, layers=8, tied=tied), tmp_path)
    model = common.load_model(str(tmp_path / "model"))
    ids = torch.randint(0, 2000, (4, 200), device=model.device)
    chance = model(ids).logits.softmax(-1)[..., model.config.eos_token_id].flatten().float()
    assert 1 / chance.mean().item() == pytest.approx(50, rel=0.1)
    assert 0.8 / 50 < chance.quantile(0.05) and chance.quantile(0.95) < 1.2 / 50
