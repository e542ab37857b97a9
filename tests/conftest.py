"""Fixtures: small models with tokenizers of their own, a place for optional real problems, and in-process
runs of the scripts."""
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # optional; tests that want it skip
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start; small models' threads would wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_after():
    """No test sees what another left: handlers of signals, an order to stop, the grader's counts, a group."""
    import common
    common.grader_counts()
    common.Stop.asked = common.Stop.can_wait = False
    common.Progress.bar = None
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)
    if common.dist.is_initialized():
        common.dist.destroy_process_group()


def small_tokenizer(chat: bool = True, pad: str | None = "<pad>"):
    """Byte tokenizer of its own, unlike the demo's: other special tokens, other ids, other template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<pad>"]
    vocab = {t: i for i, t in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()) + special)}
    raw = Tokenizer(models.BPE(vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token=pad)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]})
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


def small_model(kind: str = "qwen2", vocab: int = 272, seed: int = 0, **more):
    """A two-layer model whose embedding table is wider than its tokenizer, as Qwen2.5's is."""
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.3, eos_token_id=257,
        pad_token_id=None, bos_token_id=None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**settings, **more})).eval()


class Successor(torch.nn.Module):
    """A model that puts all its mass on (id + 1) mod V."""

    def __init__(self, V: int = 50):
        super().__init__()
        self.head, self.V = torch.nn.Linear(V, V, bias=False), V
        self.head.weight.data = 100 * torch.eye(V)
        self.base_model, self.device = self.forward, torch.device("cpu")
        self.get_input_embeddings = self.get_output_embeddings = lambda: self.head

    def forward(self, input_ids, **_):
        hidden = torch.nn.functional.one_hot((input_ids + 1) % self.V, self.V).float()
        return type("Output", (), {"last_hidden_state": hidden})


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    """Hugging Face directories of a small Qwen2 (tied head) and a small Llama (untied), each with a
    tokenizer."""
    made = {}
    for kind, tied in (("qwen2", True), ("llama", False)):
        made[kind] = tmp_path_factory.mktemp(kind)
        small_model(kind, tie_word_embeddings=tied).save_pretrained(made[kind])
        small_tokenizer().save_pretrained(made[kind])
    return made


def whole_run_for_real(script: str, argv: list) -> int:
    """A script's main() in this process with the given command line -> its exit code."""
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        __import__(script).main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def run_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # given back at the end
    return lambda script, *argv: whole_run_for_real(script, argv)


@pytest.fixture(scope="session")
def argv_of(model_dirs, rows_file):
    """The command line of a short run, --out aside."""
    own = {"sgpo": ["--guided_group_size", 2], "tgpo": ["--teacher", model_dirs["llama"]]}

    def argv(script: str, *more) -> list:
        return ["--model", model_dirs["qwen2"], "--dataset", rows_file, "--reward",
                f"{rows_file.parent}/reward.py:even", "--prompts_per_step", 3, "--group_size", 3,
                "--max_new_tokens", 8, "--lr", 1e-3, "--system_prompt", "Think.", *own.get(script, []), *more]
    return argv


@pytest.fixture
def train(argv_of, tmp_path, run_script):
    """A short run in tmp_path / out, in this process -> that directory."""
    def run(script: str, *more, out: str = "run", code: int = 0) -> Path:
        assert run_script(script, *argv_of(script, *more), "--out", tmp_path / out) == code
        return tmp_path / out
    return run


# Children fork from a server that has imported what they need and computed nothing: a fork of this process
# would inherit threads' locks without their threads.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["sgpo", "tgpo", "grpo_baseline", "eval_math"])


def _start_forks() -> None:
    """The server looks for what it preloads in PYTHONPATH only, and starts once."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), before)))
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    os.environ |= {"PYTHONPATH": before} if before else {}


def _work(work, args, env, said, answer) -> None:
    os.environ |= env
    for fd, name in ((1, said), (2, said if said == os.devnull else f"{said}.err")):
        with open(name, "a") as file:
            os.dup2(file.fileno(), fd)
    code = 1
    try:
        code = work(*args)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    answer.send_bytes(pickle.dumps(code))  # by value: torch would send shared memory, which ends with us
    os._exit(code if isinstance(code, int) else 0)


class Child:
    """work(*args) in a process of its own; what it prints goes to the file `said`, and its errors to that
    name + .err."""

    def __init__(self, work, *args, said=os.devnull, **env):
        _start_forks()
        self.answer, there = _FORKS.Pipe(duplex=False)
        self.process = _FORKS.Process(target=_work, args=(work, args, env, str(said), there))
        self.process.start()
        there.close()
        self.pid = self.process.pid

    def ended(self, seconds: float = 90):
        """What work returned, or minus the signal that ended it."""
        try:
            if not self.answer.poll(seconds):
                raise AssertionError("it did not end")
            value = pickle.loads(self.answer.recv_bytes())
        except EOFError:
            value = None
        finally:
            self.process.join(10)
            self.process.kill()
        return self.process.exitcode if value is None else value


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """Eight toy problems with strategies; a reward file that pays for even lengths, so that groups differ."""
    folder = tmp_path_factory.mktemp("rows")
    even = "def even(response, row):\n    return float(len(response) % 2 == 0)\n"
    (folder / "reward.py").write_text(even)
    return write_rows(folder / "rows.jsonl", [
        {"problem": f"What is {i} + {i}?", "answer": str(2 * i),
         "strategy": f"Type: sum. Strategy: double. Steps: double {i}."} for i in range(8)])


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stripped(rows: list[dict]) -> list[dict]:
    """Metrics without what may differ between two equal runs: times and memory."""
    machine = ("tokens_per_s", "peak_memory_gb")
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k not in machine} for row in rows]


def same_weights(a: Path, b: Path) -> bool:
    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    return all(torch.equal(one[k], two[k]) for k in one)


def same_runs(a: Path, b: Path) -> None:
    """Weights, metrics with all their keys, samples: bit for bit."""
    assert stripped(read_jsonl(a / "metrics.jsonl")) == stripped(read_jsonl(b / "metrics.jsonl"))
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert same_weights(a / "model", b / "model")


def undo(run: Path, step: int) -> None:
    """As if a finished run had been killed before it saved `step`, its last."""
    for path in (run / "checkpoints" / f"step_{step:06d}", run / "model"):
        shutil.rmtree(path)
