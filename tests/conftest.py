"""Fixtures: small models with a tokenizer of their own, toy problems, runs of the scripts in this process."""
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # optional data; tests that want it skip without
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # threads of small models wait for each other
torch.set_num_threads(1)

import common  # noqa: E402  the scripts lie in ROOT


@pytest.fixture(autouse=True)
def same_afterwards():
    """Restore what a run of a script changes in this process: signal handlers and the process group."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
IM_START, IM_END, ENDOFTEXT, PAD = 256, 257, 258, 259


def small_tokenizer(chat_template: str | None = CHAT_TEMPLATE, eos: str = "<|im_end|>", more: tuple = ()):
    """Return a byte tokenizer with Qwen's special tokens: ids 0 to 255 are bytes, then IM_START to PAD.

    `more`: further special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<pad>", *more]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + special
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token="<pad>")
    others = [token for token in special if token not in (eos, "<pad>")]
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    tokenizer.chat_template = chat_template
    return tokenizer


def small_model(kind: str = "qwen2", vocab: int = 272, seed: int = 0, **more):
    """Return a two-layer model whose embedding table is wider than its tokenizer, as Qwen2.5's is."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # wide distributions: samples and log-probs differ clearly
        "eos_token_id": IM_END,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(kind, **{**settings, **more})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    """Return directories of a small Qwen2 (tied head) and a small Llama (untied), each with a tokenizer."""
    folders = {}
    for kind, tied in (("qwen2", True), ("llama", False)):
        folders[kind] = tmp_path_factory.mktemp(kind)
        small_model(kind, tie_word_embeddings=tied).save_pretrained(folders[kind])
        small_tokenizer().save_pretrained(folders[kind])
    return folders


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """Return eight toy problems with strategies; beside them reward.py:even pays for texts of even length."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "reward.py").write_text("def even(response, row):\n    return float(len(response) % 2 == 0)\n")
    rows = []
    for i in range(8):
        rows.append({"problem": f"What is {i} + {i}?", "answer": str(2 * i),
                     "strategy": f"Type: sum. Strategy: double. Steps: double {i}."})
    return write_jsonl(folder / "rows.jsonl", rows)


def as_samples(ids: torch.Tensor) -> common.Samples:
    """Return made-up token ids [N, C] as generate_in_pieces returns them."""
    return common.Samples(ids, logps=torch.zeros(ids.shape), kept_mass=torch.ones(ids.shape))


def run_main(script: str, *argv) -> int:
    """Run a script's main() in this process with a command line; return its exit code."""
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        __import__(script).main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def run_script(monkeypatch):
    """Return run_main, with sys.argv restored afterwards."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    return run_main


@pytest.fixture(scope="session")
def argv_of(model_dirs, rows_file):
    """Return a function that gives the command line of a short run, without --out."""
    own = {"sgpo": ["--guided_group_size", 2], "tgpo": ["--teacher", model_dirs["llama"]]}

    def argv(script: str, *more) -> list:
        return ["--model", model_dirs["qwen2"], "--dataset", rows_file,
                "--reward", f"{rows_file.parent}/reward.py:even", "--prompts_per_step", 4, "--group_size", 3,
                "--max_new_tokens", 8, "--lr", 1e-3, "--system_prompt", "Think.", *own.get(script, []), *more]

    return argv


@pytest.fixture
def train(argv_of, tmp_path, run_script):
    """Return a function that makes a short run in this process and returns its directory."""
    def run(script: str, *more, out: str = "run", code: int = 0) -> Path:
        assert run_script(script, *argv_of(script, *more), "--out", tmp_path / out) == code
        return tmp_path / out

    return run


def without_times(rows: list[dict]) -> list[dict]:
    """Return metrics without what may differ between two equal runs: times and memory."""
    def is_equal_in_equal_runs(name: str) -> bool:
        return not name.startswith("time/") and name not in ("tokens_per_s", "peak_memory_gb")

    return [{name: value for name, value in row.items() if is_equal_in_equal_runs(name)} for row in rows]


def same_weights(a: Path, b: Path) -> bool:
    """Return True if two model directories hold the same weights, bit for bit."""
    from safetensors.torch import load_file
    first = load_file(a / "model.safetensors")
    second = load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_runs(a: Path, b: Path) -> None:
    """Check that two runs have the same metrics, samples and weights, bit for bit."""
    assert without_times(read_jsonl(a / "metrics.jsonl")) == without_times(read_jsonl(b / "metrics.jsonl"))
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert same_weights(a / "model", b / "model")
