"""What the scripts share: flags, rows, prompts, models, rollouts, log-probs, run directory, demo, grader.

Advantages, losses and their equations stand in the scripts.
Letters: N rows (problems x samples), P prompt, C completion, T = P + C, V vocabulary, M completion tokens,
d hidden size.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, NoReturn, Sequence

import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser,
    LogitsProcessor, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, StoppingCriteria, get_scheduler,
    set_seed)
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process


# ---------------------------------------------------------------- programs: how they begin, stop and refuse

def refuse(message: str, any_rank: bool = False) -> NoReturn:
    """Every input that is not accepted ends here: one line on stderr, exit code 2, no traceback.

    Where all processes come here the first one says it. `any_rank`: whichever comes here says it.
    """
    if rank() == 0 or any_rank:
        print("error: " + printable(" ".join(str(message).split())), file=sys.stderr)
    if Run.new and not has_begun(Run.new):  # what has done nothing leaves nothing
        shutil.rmtree(Run.new)
    raise SystemExit(2)


def printable(text: str) -> str:
    """Model and data text made safe for a terminal: control, bidi and invisible characters are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """A small table on the screen, columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(printable(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Decorator of every main(): joins torchrun's processes; an end is one line, not a traceback."""
    @functools.wraps(main)
    def started() -> None:
        Stop.asked = Stop.can_wait = False
        Run.new = None
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, Stop.on_signal)
        if hasattr(sys.stdout, "reconfigure"):
            # ASCII terminals get escapes, and a log its lines as they are said.
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        join_processes()
        try:
            main()
        except (torch.OutOfMemoryError, MemoryError):  # never retried: FSDP2 is broken after half a backward
            refuse("out of memory: lower --microbatch_tokens (training) or --generation_batch_size "
                   "(sampling), or add --activation_checkpointing or --cpu_offload (for a teacher: "
                   "--teacher_device or --teacher_offload), and go on", any_rank=True)
        except BrokenPipeError:  # python sgpo.py | head
            os._exit(1)
        except (OSError, RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:
            full = re.search("No space left|File too large|Read-only file system", str(error))
            name = getattr(error, "filename", None) or "--out"
            if full:
                refuse(f"{name}: cannot be written ({full[0]}); what was saved before is whole: make room "
                       "and go on from it", any_rank=True)
            if isinstance(error, OSError) and error.filename:
                refuse(f"{name}: cannot be used ({error.strerror})", any_rank=True)
            if world() > 1 and re.search("(?i)gloo|nccl|connection|peer", str(error)):
                refuse("another process has died; its own message says why. --resume goes on")
            raise
    return started


class Stop:
    """Ctrl-C and SIGTERM: long work saves what it has and ends; all else, or a second one, ends at once."""
    asked = False     # of this process
    can_wait = False  # is something under way that would save what it has?

    @staticmethod
    def on_signal(kind, frame) -> None:
        if Stop.asked or not Stop.can_wait:
            print("stopped", file=sys.stderr, flush=True)
            os._exit(130)
        Stop.asked = True
        soon = "; torchrun kills after its --shutdown_timeout, 30 s" if "WORLD_SIZE" in os.environ else ""
        print(f"\nstopping: what is done will be saved (once more: at once){soon}", file=sys.stderr)


def stop_asked() -> bool:
    """Has any process been asked to stop? All of them call this at the same places."""
    Stop.asked = any(of_all_processes(Stop.asked))
    return Stop.asked


def long_work(total: int, what: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar, on the first process's terminal. From here on a stop waits for what is to be saved."""
    Stop.can_wait = True
    hidden = True if rank() else None  # None: only where there is no terminal
    Progress.bar = tqdm(total=total, initial=done, desc=what, unit=unit, disable=hidden)
    return Progress.bar


# ---------------------------------------------------------------- device and processes

ON_GPU = torch.cuda.is_available()
HOME = torch.device("cuda" if ON_GPU else "cpu")  # where models compute
BACKEND = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"  # how processes talk


def join_processes() -> None:
    """Join the processes that torchrun has started, if it has."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # No time limit of its own: they wait long for each other's rollouts, and torchrun ends all when one dies.
    dist.init_process_group(BACKEND, timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")  # the first one speaks for all


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def my_share(items):
    """This process's share of a list or tensor of problems: every world()-th. All of it where it is alone."""
    return items[rank()::world()]


def of_all_processes(value: Any) -> list:
    """The value that each process has, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def all_shares(share: Tensor) -> Tensor:
    """The inverse of `my_share`: the rows [b, ...] that each process has -> all rows [B, ...], on the CPU."""
    shares = of_all_processes(share.cpu())
    rows = shares[0].new_empty(sum(map(len, shares)), *share.shape[1:])
    for r, part in enumerate(shares):
        rows[r::len(shares)] = part
    return rows


def total(*numbers: float) -> list[float]:
    """Numbers added up over all processes."""
    return [sum(values) for values in zip(*of_all_processes([float(x) for x in numbers]))]


class Sums(Counter):
    """What metrics are made of: sums over micro-batches and, by `of_all`, over processes."""

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self[name] += value.item() if isinstance(value, Tensor) else value

    def of_all(self) -> Sums:
        whole = Sums()
        for sums in of_all_processes(dict(self)):
            whole.update(sums)
        return whole

    def metrics(self, norms: list[float | None]) -> dict[str, float]:
        """An update's metrics by TRL's names. `norms`: what each `optimizer_step` gave.

        Of these sums: loss, entropy, clipped and scored (tokens) are the script's, tokens and padded
        those of `microbatches`.
        """
        taken = [norm for norm in norms if norm is not None and np.isfinite(norm)]
        metrics = {"loss": self["loss"] / len(norms), "grad_norm": sum(taken) / max(len(taken), 1),
                   "updates": len(taken), "nonfinite_updates": len(norms) - norms.count(None) - len(taken),
                   "clip_ratio": self["clipped"] / max(self["scored"], 1)}
        if self["padded"]:  # something was trained on
            metrics["padding_frac"] = 1 - self["tokens"] / self["padded"]
        if self["scored"]:
            metrics["entropy"] = self["entropy"] / self["scored"]
        return metrics


def generator(seed: int, *what: int | str) -> np.random.Generator:
    """Random numbers for one purpose: a function of (seed, what for) alone."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in what)])


def seed_everything(seed: int, *what: int | str) -> None:
    """Seed torch, numpy and random from (seed, what for, rank).

    Training does so at each step, so no generator's state has to be saved for an exact resume.
    """
    set_seed(int(generator(seed, *what, rank()).integers(2 ** 32)))


# ---------------------------------------------------------------- flags

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
DEFAULT_DATASET = "Elliott/Openr1-Math-46k-8192"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character


def flag(default: Any, help: str, values: str | None = None) -> Any:
    """A field of Args: default, line in --help and, for a number, its interval, such as "(0, 1]"."""
    shown = {"help": help, "metavar": values} if values else {"help": help}
    return dataclasses.field(default=default, metadata=shown)


@dataclass
class DataFlags:
    """model, data and run directory"""
    model: str = flag("demo", "hub id or local directory; demo: tiny, built in, with flags of its own")
    dataset: str = flag(None, f"JSONL, parquet or hub data set (default: the demo's, else {DEFAULT_DATASET})")
    eval_dataset: str = flag(None, "held-out problems, same layouts (the demo has its own)")
    max_rows: int = flag(8500, "rows drawn from a larger data set, by the seed; 0: all", "[0, inf)")
    max_prompt_tokens: int = flag(1024, "rows with a longer prompt are dropped", "[1, inf)")
    system_prompt: str = flag(SYSTEM_PROMPT, "system message; empty for none")
    reward: str = flag(None, "FILE.py:function of (response, row) (default: the math grader)")
    out: str = flag(None, "run directory (default: a new one under runs/)")
    resume: bool = flag(False, "go on with the run in --out from its newest checkpoint")
    dry_run: bool = flag(False, "print the plan and stop")
    seed: int = flag(0, "seed of all random numbers", "[0, inf)")


@dataclass
class WarmupFlags(DataFlags):
    """SFT warm-up"""
    warmup_frac: float = flag(0.33, "share of the problems with solutions that it takes from RL", "[0, 1]")
    warmup_lr: float = flag(1e-5, "AdamW learning rate at its highest", "[0, inf)")
    warmup_batch_size: int = flag(64, "solutions per step", "[1, inf)")
    warmup_epochs: int = flag(10, "epochs; the one with the lowest validation loss is kept", "[1, inf)")


@dataclass
class RunFlags(WarmupFlags):
    """memory, evaluation and saving"""
    microbatch_tokens: int = flag(16384, "padded tokens per training pass; changes no gradient", "[1, inf)")
    generation_batch_size: int = flag(192, "completions written at once", "[1, inf)")
    activation_checkpointing: bool = flag(None, "recompute activations (default: if the card is small)")
    cpu_offload: bool = flag(None, "weights and optimizer in CPU memory (default: if the card is too small)")
    bf16: bool = flag(None, "compute in bf16 on fp32 weights (default: on a GPU)")
    eval_every: int = flag(50, "steps between held-out evaluations; 0: only first and last", "[0, inf)")
    eval_samples: int = flag(4, "samples per held-out problem", "[1, inf)")
    eval_temperature: float = flag(0.6, "sampling temperature of the evaluation (the papers')", "[0, inf)")
    save_every: int = flag(50, "steps between checkpoints; 0: only the last", "[0, inf)")
    keep_checkpoints: int = flag(2, "newest checkpoints kept", "[1, inf)")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = flag("none", "dashboard for the metrics")

    def __post_init__(self) -> None:
        self.bf16 = ON_GPU if self.bf16 is None else self.bf16


@dataclass
class StrategistFlags(RunFlags):
    """strategist"""
    strategist: str = flag(None, "hub id, directory, URL of a chat endpoint, or none (default: --model)")
    strategist_model: str = flag(None, "the endpoint's model; its key is read from OPENAI_API_KEY")
    strategist_max_new_tokens: int = flag(2048, "longest answer; more for one that thinks first", "[1, inf)")
    strategist_threads: int = flag(16, "requests to the endpoint at the same time", "[1, inf)")
    strategist_timeout: float = flag(600, "seconds to wait for an answer of the endpoint", "(0, inf)")


class _Help(argparse.RawDescriptionHelpFormatter):
    """A flag's name as its field has it, what it takes, and a default that its help does not tell."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=42, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name.strip("-")]
        takes = ",".join(action.choices) if action.choices else action.metavar or action.dest.upper()
        return ", ".join(names) + (f" {takes}" if action.nargs not in (0, "?") else "")

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default is False or action.default in (None, "", argparse.SUPPRESS)
        if silent or "default:" in action.help:
            return action.help
        return f"{action.help} (default: {str(action.default).replace('%', '%%')})"


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help lists the flags)")


def parse_args(args_class: type, recipe: Callable[[Any], dict] | None = None) -> Any:
    """The command line as `args_class`; a .json or .yaml file of flags, or a run's config.json, may come
    first.

    `recipe(args)` may give other defaults for flags that the user did not set; the demo brings its own.
    """
    argv, about = sys.argv[1:], sys.modules[args_class.__module__].__doc__
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = _flags_in_file(argv[0]) + argv[1:]
    if LONE_SURROGATE.search(" ".join(argv)):  # Python's stand-in for what it could not read
        refuse("the command line, or the file of flags, holds characters that are not UTF-8")
    usage = f"python {Path(sys.argv[0]).name} [FLAGS.json] [--flag value ...]"
    parser = _Parser(_help_groups(args_class), usage=usage, description=about, formatter_class=_Help,
                     allow_abbrev=False)

    def parse() -> Any:
        found, unknown = parser.parse_known_args(argv)
        if unknown:
            name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
            near = difflib.get_close_matches(name, vars(found), n=1)
            refuse(f"unknown flag {unknown[0]}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
        return args_class(**vars(found))

    parser.set_defaults(**(recipe or demo_recipe)(parse()))
    args = parse()
    for field in dataclasses.fields(args):
        value, interval = getattr(args, field.name), field.metadata.get("metavar")
        if interval and value is not None:
            low, high = map(float, interval[1:-1].split(","))
            at_end = value == low and interval[0] == "[" or value == high and interval[-1] == "]"
            if not (low < value < high or at_end):
                refuse(f"--{field.name} is {value}; it must be in {interval}")
            if 1e18 < value < float("inf"):  # beyond what a tensor, a clock or a division takes
                refuse(f"--{field.name} is {float(value):g}: too large")
    return args


def _help_groups(args_class: type) -> list[type]:
    """A dataclass for each class that `args_class` is made of, which HfArgumentParser shows as a group."""
    hints, fields, groups = typing.get_type_hints(args_class), list(dataclasses.fields(args_class)), []
    for part in reversed(args_class.__mro__[:-1]):
        own = [(f.name, hints[f.name], dataclasses.field(default=f.default, metadata=f.metadata))
               for f in fields if f.name in part.__annotations__]
        fields = [f for f in fields if f.name not in part.__annotations__]
        groups.append(dataclasses.make_dataclass(part.__name__, own))
        groups[-1]._argument_group_name = part.__doc__
    return groups


def _flags_in_file(path: str) -> list[str]:
    """The flags of a file as a command line would have them: the parser checks both alike."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith(".json"):
            flags = json.loads(text)
        else:
            import yaml
            flags = yaml.safe_load(text)
        if isinstance(flags.get("flags"), dict):  # a run's config.json
            flags = {name: value for name, value in flags["flags"].items() if name not in ("out", "resume")}
        flags = {name: value for name, value in flags.items() if value is not None}
    except Exception as error:  # yaml and json have exceptions of their own
        refuse(f"{path}: cannot read flags from it; it must map names to values ({error})")
    argv = []
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return argv


# ---------------------------------------------------------------- rows

BENCHMARKS = {  # name: hub id, config, split; another hub id has its default config and split "train"
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
}
NO_ANSWER = "notfound"  # NuminaMath's word
DAPO_WRAPPER = re.compile(r"^Solve the following math problem step by step\. The last line.*?\n\n(.*?)\n\n"
                          r"Remember to put your answer.*$", re.DOTALL)


def read_jsonl(path: str | Path, cut_by_kill: bool = False) -> Iterator[tuple[str, Any]]:
    """(place, object) of every line. `cut_by_kill`: a last line without its end is left out, not refused."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                value = json.loads(text) if text else None
            except (ValueError, RecursionError) as error:  # also not UTF-8, thousands of digits, too deep
                if cut_by_kill and not line.endswith(b"\n"):
                    return
                where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
                refuse(f"{place}: not JSON ({getattr(error, 'msg', error)}{where})")
            if "\\ud" in text.lower() and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
                refuse(f"{place}: holds half a character (a lone surrogate), which no tokenizer takes")
            if text:
                yield place, value


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Add rows to the end of a file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        error.filename = path  # a full disk does not name it
        raise


def rewrite_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """A file of these rows and no others, there whole or as it was."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def load_rows(source: str) -> list[dict]:
    """Rows {"problem", "answer", "solution"?, "strategy"?, "id"} of a file, a benchmark or a hub data set.

    A bad row ends the program with the file and line named.
    """
    rows = []
    for place, raw in raw_rows(source):
        try:
            row = to_row(raw, from_hub=not os.path.isfile(source))
        except ValueError as error:
            refuse(f"{place}: {error}")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            refuse(f"{place}: layout not recognised: {error!r}")
        row.setdefault("id", str(len(rows)))
        rows.append(row)
    if all(row["answer"] == NO_ANSWER for row in rows):
        refuse(f"{source}: " + ('no row has an "answer"' if rows else "no rows in it"))
    return rows


def raw_rows(source: str) -> Iterator[tuple[str, Any]]:
    """(place, row) as they are written."""
    is_file = source.endswith((".jsonl", ".json", ".parquet")) or os.path.exists(source)
    if is_file and not os.path.isfile(source):
        refuse(f"{source}: no such file; name a .jsonl or .parquet file or a data set of the hub")
    if is_file and not source.endswith(".parquet"):
        yield from read_jsonl(source)
        return
    known = {place[0]: place for place in BENCHMARKS.values()} | BENCHMARKS
    hub_id, config, split = known.get(source, (source, None, "train"))
    try:  # imported only here: a JSONL file must do without them
        if is_file:
            import pyarrow.parquet
            table = pyarrow.parquet.read_table(source).to_pylist()
        else:
            look_for_hub()
            import datasets  # only now: it copies what it is told of the hub
            table = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # of a dozen kinds; all mean that there is no data
        what = "not a readable parquet file" if is_file else "no local file, and not to be had from the hub"
        refuse(f"{source}: {what} ({type(error).__name__}: {first_line(error)})")
    yield from ((f"{source}, row {i}", raw) for i, raw in enumerate(table, 1))


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


def to_row(raw: dict, from_hub: bool = False) -> dict:
    """One row of any known layout: ours, LUFFY, DAPO, OpenR1/NuminaMath, MATH, GSM8K, OlympiadBench.

    A row without an answer is an error in a file; on the hub nobody can mend it, so it cannot be right.
    """
    if not isinstance(raw, dict):
        raise ValueError("a row must be a JSON object")
    problem, answer = raw.get("problem", raw.get("question")), raw.get("answer")
    solution = raw.get("solution")
    if isinstance(raw.get("prompt"), list):  # LUFFY and DAPO: chat messages, gold in reward_model
        problem = [m["content"] for m in raw["prompt"] if m["role"] == "user"][-1]
        problem = DAPO_WRAPPER.sub(r"\1", problem)
        answer = (raw.get("reward_model") or {}).get("ground_truth")
        if raw.get("target"):  # LUFFY: the strong model's response
            solution = raw["target"][0]["content"]
    elif "final_answer" in raw:  # OlympiadBench
        problem = "\n".join(filter(None, [raw.get("context"), problem]))
        answer, solution = (raw["final_answer"] or [None])[0], (raw.get("solution") or [None])[0]
    elif isinstance(answer, str) and "\n#### " in answer:  # GSM8K: the answer field holds the solution
        solution, answer = answer.rsplit("\n#### ", 1)
    if answer in (None, "") and isinstance(solution, str):  # MATH: the gold is the solution's box
        answer = extract_answer(solution)
    if answer in (None, "") and from_hub:
        answer = NO_ANSWER
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    row = {"problem": problem, "answer": answer, "solution": solution, "strategy": raw.get("strategy")}
    for name, value in row.items():
        if name in ("problem", "answer") and not (isinstance(value, str) and value.strip()):
            raise ValueError(f'row has no "{name}": give it as a non-empty string')
        if value is not None and not isinstance(value, str):
            raise ValueError(f'"{name}" must be a string')
    row = {name: value for name, value in row.items() if value}
    return row if raw.get("id") is None else {**row, "id": str(raw["id"])}


def load_problems(args: Any, tokenizer) -> tuple[list[dict], list[dict]]:
    """Rows to train on and held-out rows (maybe none): of --dataset and --eval_dataset, or the demo's own.

    Of a larger data set --max_rows are drawn by the seed, as SGPO's paper draws 8.5K of 46K. Rows with too
    long a prompt, and training rows whose gold the grader cannot read, are dropped and counted.
    """
    demo = args.model == "demo" and args.dataset is None
    train, held_out = demo_rows() if demo else (load_rows(args.dataset or DEFAULT_DATASET), [])
    if 0 < args.max_rows < len(train):
        print(f"{args.max_rows} of {len(train)} rows, drawn by --seed {args.seed} (--max_rows)")
        drawn = generator(args.seed, "rows").choice(len(train), args.max_rows, replace=False)
        train = [train[i] for i in sorted(drawn)]
    if args.eval_dataset:
        held_out = load_rows(args.eval_dataset)

    def tokens(row: dict) -> int:
        return len(build_prompt(tokenizer, row["problem"], args.system_prompt))

    def keep(rows: list[dict], good: Callable[[dict], bool], why: str) -> list[dict]:
        bar = tqdm(rows, "checking rows", delay=2, leave=False, disable=None if rank() == 0 else True)
        marks = [good(row) for row in bar]
        if not all(marks):
            first = printable(rows[marks.index(False)]["id"])
            print(f"dropped {marks.count(False)} of {len(rows)} rows with {why}, first: id {first}")
        return [row for row, mark in zip(rows, marks) if mark]

    def short(row: dict) -> bool:
        return tokens(row) <= args.max_prompt_tokens

    why = f"a prompt over --max_prompt_tokens {args.max_prompt_tokens}"
    train, held_out = keep(train, short, why), keep(held_out, short, why)
    if args.reward is None:
        why = "an answer that the grader cannot read"
        train = keep(train, lambda row: gold_is_gradable(row["answer"]), why)
    if not train:
        refuse(f"{args.dataset or DEFAULT_DATASET}: none of its rows can be used")
    check_context(args.model, "--model", max(map(tokens, train + held_out)), args.max_new_tokens)
    return train, held_out


def batch_of_step(rows: list[dict], step: int, size: int, seed: int) -> list[dict]:
    """The rows of a step (1-based): epochs of seeded permutations laid end to end, cut into batches.

    A pure function of (seed, step): the step is the whole data cursor, so a resumed run cannot be off by one.
    """
    places = range((step - 1) * size, step * size)
    epochs = {place // len(rows) for place in places}
    orders = {epoch: generator(seed, "epoch", epoch).permutation(len(rows)) for epoch in epochs}
    return [rows[orders[place // len(rows)][place % len(rows)]] for place in places]


# ---------------------------------------------------------------- prompts

def build_prompt(tokenizer, problem: str, system_prompt: str = SYSTEM_PROMPT,
                 strategy: str | None = None) -> list[int]:
    """Token ids of a prompt, up to where the model's answer begins; a strategy is put before the problem.

    Through the tokenizer's chat template. A tokenizer without one (a base model's) gets plain text: system
    prompt, problem and "Solution:", separated by blank lines.
    """
    user = problem if strategy is None else f"Strategy:\n{strategy}\n\nProblem:\n{problem}"
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(filter(None, [system_prompt, user, "Solution:"]))).input_ids
    messages = [{"role": "user", "content": user}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    # Llama 3's template writes today's date: a prompt must not change at midnight.
    template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n" + tokenizer.get_chat_template()
    how = {"add_generation_prompt": True, "chat_template": template, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception:  # some templates (Gemma's) refuse the system role
        one = {"role": "user", "content": "\n\n".join(filter(None, [system_prompt, user]))}
        return tokenizer.apply_chat_template([one], **how)


# ---------------------------------------------------------------- models

def model_path(name: str, flag: str = "--model") -> str:
    """Hub id or directory to load from: the name, but for the demo's models, made at their first use."""
    if flag == "--teacher" and name in DEMO_TEACHERS:
        return str(demo_teacher_dir(name))
    if flag == "--model" and name == "demo":
        return str(demo_dir())
    if not os.path.isdir(name):
        look_for_hub()
    return name


@functools.cache
def look_for_hub() -> None:
    """Where the hub cannot be reached only its cache is asked: else each file is tried for half a minute."""
    hub = huggingface_hub.constants
    try:
        if not hub.HF_HUB_OFFLINE:
            huggingface_hub.get_session().head(hub.ENDPOINT, timeout=8)
    except Exception as error:  # of the client, which changes
        print(f"{hub.ENDPOINT} cannot be reached ({first_line(error)}): only its cache is looked through")
        hub.HF_HUB_OFFLINE = True


def load_tokenizer(name: str, flag: str = "--model"):
    """The tokenizer of a hub id or local directory; a pad token is chosen where there is none."""
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        refuse(f"{flag} {name}: no such directory")
    path = model_path(name, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not tokenizer("1 + 1 = 2").input_ids:  # a directory without one can give an empty shell
            raise ValueError("it has no vocabulary: save one beside the weights")
        if tokenizer.chat_template:
            tokenizer.get_chat_template()  # of several, one must be the default
    except Exception as error:  # which of a dozen kinds depends on what is missing
        refuse(f"{flag} {name}: no tokenizer can be loaded from it ({first_line(error)})")
    if tokenizer.eos_token_id is None:
        refuse(f"{flag} {name}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by position, never by id
    return tokenizer


def context_length(name: str, flag: str = "--model") -> int:
    """Positions that the model has, from its config alone."""
    config = AutoConfig.from_pretrained(model_path(name, flag)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_context(name: str, flag: str, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse completions that would run past the model's positions."""
    context = context_length(name, flag)
    if longest_prompt + max_new_tokens > context:
        refuse(f"--max_new_tokens {max_new_tokens} plus the longest prompt ({longest_prompt} tokens) exceeds "
               f"the context of {flag} {name}, {context}; use at most {max(context - longest_prompt, 0)}")


@torch.no_grad()
def load_model(name: str, flag: str = "--model", dtype: torch.dtype | None = None, device: Any = None):
    """The causal LM of a hub id or directory, to read or sample, in bf16 on a GPU; without dropout.

    Refused where logits are not hidden states x lm_head, or train mode does not compute what eval mode does:
    the policy that is scored must be the one that was sampled.
    """
    device = torch.device(device or HOME)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        config = AutoConfig.from_pretrained(model_path(name, flag))
        for key, value in list(vars(config.get_text_config()).items()):
            if "drop" in key and isinstance(value, float):
                setattr(config.get_text_config(), key, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            model_path(name, flag), config=config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        why = first_line(error)
        refuse(f"{flag} {name}: no causal language model can be loaded from it ({why})", any_rank=True)
    model.to(device)
    inputs = {"input_ids": torch.arange(8, device=model.device)[None] % config.get_text_config().vocab_size}
    training, sampling = (model.train(mode)(**inputs).logits.float() for mode in (True, False))
    ours = model.get_output_embeddings()(model.base_model(**inputs).last_hidden_state).float()
    if not sampling.isfinite().all():
        refuse(f"{flag} {name}: its weights are not finite", any_rank=True)
    near = 1e-3 if dtype == torch.float32 else 3e-2  # bf16 sums need not be the same twice
    if not torch.allclose(ours, sampling, rtol=near, atol=near):
        refuse(f"{flag} {name}: not supported, {type(model).__name__} changes its logits after lm_head")
    if not torch.allclose(training, sampling, rtol=near, atol=near):
        refuse(f"{flag} {name}: not supported, {type(model).__name__} computes otherwise in train mode")
    return model.requires_grad_(False)


def load_policy(args: Any):
    """The model to train, with fp32 weights: at lr 1e-6 a bf16 weight rounds almost every update away.

    Several processes share one by FSDP2, which also serves a process alone with --cpu_offload.
    """
    sharded = dist.is_initialized() or args.cpu_offload
    model = load_model(args.model, dtype=torch.float32, device="cpu" if sharded else None)
    model.fingerprint = repr([p.flatten()[:64].tolist() for p in model.parameters()])  # of the start
    model.requires_grad_()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    model.samples_in_bf16 = args.bf16 and not sharded  # FSDP2 has bf16 weights of its own
    return shard(model, args.bf16, args.cpu_offload) if sharded else model


def shard(model, bf16: bool, cpu_offload: bool = False):
    """Spread a model that every process has loaded over all of them (FSDP2); `bf16`: it computes in that.

    Gradients are added up in fp32, not averaged: our normalisers count the rows of all processes.
    """
    if not dist.is_initialized():  # one process: FSDP2 still wants a group
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    how = {"mesh": init_device_mesh(HOME.type, (world(),))}
    if bf16:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if cpu_offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=ON_GPU and room_to_pin(model))
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters())):
        fully_shard(layer, **how)
    fully_shard(model, reshard_after_forward=False, **how)  # embedding and head: used at both ends of a pass
    for module in shards(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.as_forward = lambda fn: fn()
    register_fsdp_forward_method(model, "as_forward")
    return model


def room_to_pin(model) -> bool:
    """Is there host memory for weights and gradients that are pinned, which is faster?

    Pinned memory comes in powers of two: with Adam up to 24 bytes a parameter in place of 16. The processes
    of this machine together hold the model once.
    """
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    limit = limit.read_text().strip() if limit.exists() else "max"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = memory if limit == "max" else min(memory, int(limit))
    return 24 * sum(p.numel() for p in model.parameters()) < 0.8 * memory


def shards(model) -> list[FSDPModule]:
    """The parts that FSDP2 gathers one by one; none in a plain model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def as_forward(model, fn: Callable[[], Any]) -> Any:
    """fn(), in a sharded model as one forward pass of it, so that FSDP2 gathers what fn uses."""
    return model.as_forward(fn) if isinstance(model, FSDPModule) else fn()


def device_of(model) -> torch.device:
    """Where a model computes; its shards may rest in CPU memory."""
    return HOME if shards(model) else model.device


@contextmanager
def rollout_weights(model) -> Iterator[torch.nn.Module]:
    """The whole model for `generate`, as it is now; with --bf16 in half the bytes to read for every token.

    A sharded model is gathered once, so that processes may write different numbers of tokens.
    """
    parts = shards(model)
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    try:
        yield bf16_copy(model) if getattr(model, "samples_in_bf16", False) else model
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model)


def bf16_copy(model):
    """A copy for sampling. Buffers, such as the positions' frequencies, keep their precision."""
    halves = {id(p): torch.nn.Parameter(p.detach().bfloat16(), False) for p in model.parameters()}
    return copy.deepcopy(model, halves)


def optimizer_step(model, optimizer, max_grad_norm: float) -> float | None:
    """Clip the gradient and step -> its norm before, None without one. One not finite is thrown away."""
    if all(p.grad is None for p in model.parameters()):
        return None
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if np.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def choose_memory(args: Any, card: float | None = None) -> str:
    """Switch --activation_checkpointing and --cpu_offload on where they are left open and the card is small.

    A process needs 16 bytes per parameter for fp32 weights, gradients and Adam, shared with the others, and 2
    for the bf16 copy that samples; 2 for a teacher's on the same card, shared. Above an eighth of the card
    activations are computed again in backward; above three quarters all but copy and teacher rests in CPU
    memory. -> the plan's line
    """
    def parameters(name: str, flag: str) -> int:
        try:
            config = AutoConfig.from_pretrained(model_path(name, flag))
            with torch.device("meta"):
                return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        except Exception as error:
            refuse(f"{flag} {name}: no causal language model can be loaded from it ({first_line(error)})")

    if card is None:
        card = torch.cuda.get_device_properties(0).total_memory if ON_GPU else float("inf")
    own, teachers = parameters(args.model, "--model"), 0
    if getattr(args, "teacher", None) and args.teacher_device in (None, "cuda", "cuda:0"):
        teachers = parameters(args.teacher, "--teacher")
    need = 16 * own / world() + 2 * own + 2 * teachers / world()
    if args.activation_checkpointing is None:
        args.activation_checkpointing = need > card / 8
    if args.cpu_offload is None:
        args.cpu_offload = need > 0.75 * card
    line = f"{need / 1e9:.3g} GB per process for {own / 1e6:,.4g}M weights, gradients, Adam, bf16 copy"
    line += f", the teacher's {teachers / 1e6:,.4g}M" if teachers else ""
    line += f"; the card has {card / 1e9:.3g} GB" if card < float("inf") else ""
    chosen = [f"; --{name}" for name in ("activation_checkpointing", "cpu_offload") if getattr(args, name)]
    return line + "".join(chosen)


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion. Qwen2.5-Instruct has two, and one of them is also its pad."""
    ids = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config):
        more = getattr(config, "eos_token_id", None)
        ids += more if isinstance(more, (list, tuple)) else [more]
    return sorted({i for i in ids if i is not None})


# ---------------------------------------------------------------- rollouts

@torch.no_grad()
def generate(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature: float,
             top_p: float, at_once: int = sys.maxsize) -> Tensor:
    """A completion for each prompt, `at_once` at a time -> ids [N, C], pad behind their ends.

    The number that draws each row's token at each place is made beforehand, so that a row's tokens do not
    depend on which others are written beside it. The checkpoint's own generation_config has no part in it. In
    eval mode: in train mode activation checkpointing drops the cache. A stop ends it early.
    """
    draws = torch.rand(len(prompts), max_new_tokens, device=model.device)
    eos, pad, parts, Progress.tokens = stop_ids(model, tokenizer), tokenizer.pad_token_id, [], 0
    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # what a call leaves open is filled from here
    try:
        for first in range(0, len(prompts), at_once):
            rows = slice(first, first + at_once)
            if not (parts and Stop.asked):
                parts.append(in_pieces(model, prompts[rows], draws[rows], eos, pad, temperature, top_p))
    finally:
        model.train(training)
        model.generation_config = own
    width = max((part.shape[1] for part in parts), default=0)
    out = torch.full((len(prompts), width), pad, device=model.device)
    for k, part in enumerate(parts):
        out[k * at_once:k * at_once + len(part), :part.shape[1]] = part
    return out


def in_pieces(model, prompts: list[list[int]], draws: Tensor, eos: list[int], pad: int, temperature: float,
              top_p: float) -> Tensor:
    """transformers' generate, called in pieces -> ids [n, C].

    A call ends when a tenth of its rows have ended. These leave, and the next call goes on with the cache of
    the others: a batch does not wait for its longest row. Equal prompts are read once.
    """
    width, C, device = max(map(len, prompts)), draws.shape[1], draws.device
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache, ends = DynamicCache(config=model.config.get_text_config()), torch.tensor(eos, device=device)

    def call(ids: Tensor, mask: Tensor, tokens: int, enough: int, draws: Tensor, cache) -> Tensor:
        config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=pad)
        return model.generate(ids, attention_mask=mask, cache=cache, generation_config=config,
                              logits_processor=[Sampler(draws, width, temperature, top_p)],
                              stopping_criteria=[Progress(ends, enough)], synced_gpus=False)

    if not all(hasattr(layer, "batch_select_indices") for layer in cache.layers):  # linear attention
        return call(ids, mask, C, len(prompts), draws, None)[:, width:]
    distinct = {tuple(prompt): row for row, prompt in enumerate(prompts)}
    if width > 1:  # read all but the last token of each distinct prompt, and give each of its rows a copy
        some, place = list(distinct.values()), {prompt: k for k, prompt in enumerate(distinct)}
        call(ids[some, :-1], mask[some, :-1], 1, 0, draws[some], cache)
        cache.batch_select_indices(torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device))
    out, rows = torch.full(draws.shape, pad, device=device), torch.arange(len(prompts), device=device)
    written = 0
    while True:
        ids = call(ids, mask, C - written, max(len(rows) // 10, 1), draws[rows], cache)
        new = ids[:, width + written:]
        out[rows, written:written + new.shape[1]] = new
        written += new.shape[1]
        live = (~torch.isin(new, ends).any(1)).nonzero()[:, 0]
        if not len(live) or written == C or Stop.asked:
            return out[:, :written]
        mask = torch.nn.functional.pad(mask, (0, new.shape[1]), value=1)[live]
        ids, rows = ids[live], rows[live]
        cache.batch_select_indices(live)


class Progress(StoppingCriteria):
    """Ends a call of generate once `enough` rows have ended, or for a stop; counts tokens on the bar."""
    tokens, bar = 0, None

    def __init__(self, ends: Tensor, enough: int):
        self.ends, self.enough, self.ended = ends, enough, False

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.ended = torch.isin(ids[:, -1], self.ends) | self.ended
        Progress.tokens += len(ids)
        if self.bar is not None and ids.shape[1] % 16 == 0:
            self.bar.set_postfix_str(f"{Progress.tokens} tokens written")
        return (self.ended.sum() >= self.enough).expand(len(ids)) | Stop.asked


class Sampler(LogitsProcessor):
    """Picks each row's next token with a number drawn beforehand, and leaves generate no other to choose."""

    def __init__(self, draws: Tensor, width: int, temperature: float, top_p: float):
        self.draws, self.width = draws, width  # [n, C] uniform in [0, 1); where completions begin
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        tokens = sample(scores, self.draws[:, ids.shape[1] - self.width], self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """[n, V] logits, [n] uniform draws -> [n] ids, by the inverse distribution function; the best if T is 0.

    Nucleus: the likeliest tokens, in order, as long as those before them hold less than top_p. Sums are
    float64: in fp32 the unlikely half of a large vocabulary would be lost between two steps of the sum.
    """
    if not temperature:
        return logits.argmax(-1)
    p, ids = (logits.float() / temperature).softmax(-1), None
    if top_p < 1:
        likeliest = p.topk(min(1024, p.shape[1]))  # nearly always enough, and no sort
        p, ids = likeliest if (likeliest.values.sum(1) >= top_p).all() else p.sort(descending=True)
        p = p * (p.cumsum(1, dtype=torch.float64) - p < top_p)
    sums = p.cumsum(1, dtype=torch.float64)
    index = torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True).clamp_(max=p.shape[1] - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]


def completion_mask(completions: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """[N, C] ids -> mask [N, C], True through the FIRST end token; truncated [N], where none came.

    By position, not by `ids != pad`: where pad is also an end token, the loss would lack the stop token.
    """
    is_end = torch.isin(completions, torch.tensor(eos, device=completions.device))
    ends_before = is_end.cumsum(1) - is_end.long()
    return ends_before == 0, ~is_end.any(1)


def complete(model, tokenizer, prompts: list[list[int]], max_new_tokens: int, temperature: float,
             top_p: float, at_once: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """A completion for each prompt -> ids [N, C], mask [N, C], truncated [N], N texts."""
    with rollout_weights(model) as sampler:
        ids = generate(sampler, tokenizer, prompts, max_new_tokens, temperature, top_p, at_once)
    mask, truncated = completion_mask(ids, stop_ids(model, tokenizer))
    written = [row[real] for row, real in zip(ids, mask)]
    return ids, mask, truncated, tokenizer.batch_decode(written, skip_special_tokens=True)


# ---------------------------------------------------------------- log-probs in training

PASS_COST = 256 if ON_GPU else 32  # what a pass costs whatever is in it, in tokens


def microbatches(rows: Sequence[int], lengths: Sequence[int], budget: int,
                 sums: Sums | None = None) -> list[list[int]]:
    """Rows by length, cut where a batch has more padded tokens than `budget` or more padding than PASS_COST.

    `lengths` are those of every row there is; a row over the budget stands alone. All processes get as many
    batches, maybe empty ones: FSDP2 wants as many passes of each. `sums` counts real and padded tokens.
    """
    batches, padding = [], 0
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        padding += longest - lengths[row]
        if not batches or longest * (len(batches[-1]) + 1) > budget or padding > PASS_COST:
            batches.append([])
            padding = 0
        batches[-1].append(row)
    if sums is not None:
        sums.add(tokens=sum(lengths[i] for i in rows), padded=sum(lengths[b[0]] * len(b) for b in batches))
    return batches + [[]] * (max(of_all_processes(len(batches))) - len(batches))


def padded(completions: Sequence[list[int]], device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids [n, C], 0 behind their ends, and mask [n, C]."""
    width = max(map(len, completions), default=1)
    ids = torch.tensor([c + [0] * (width - len(c)) for c in completions], device=device, dtype=torch.long)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    return ids.view(-1, width), torch.arange(width, device=device) < lengths[:, None]


def completion_hidden(model, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states [M, d] at the positions that predict the M real completion tokens, row by row.

    Rows are prompt + completion, padded on the RIGHT only, where causal attention never looks: without a mask
    sdpa takes its fast path. Token t of the completion is predicted at position P + t - 1.
    """
    lengths, device = mask.sum(1).tolist(), device_of(model)
    rows = [p + c[:n] for p, c, n in zip(prompts, completions.tolist(), lengths, strict=True)]
    width = max(map(len, rows), default=2) - 1  # the last token predicts nothing
    ids = torch.tensor([(r + [0] * width)[:width] for r in rows or [[]]], device=device)
    row, t = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(p) for p in prompts], device=device, dtype=torch.long)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[row, starts[row] + t - 1]


CHUNK = 2 ** 26 if ON_GPU else 2 ** 23  # logits at once: 256 MiB in fp32, or 32 MiB, a CPU's cache


def over_vocabulary(fn: Callable[..., tuple[Tensor, ...]], model, hiddens: Sequence[Tensor],
                    extra: Sequence[Tensor] = (), temperature: float = 1.0) -> tuple[Tensor, ...]:
    """fn(*logits, *extra) -> tensors [m], by chunks of m tokens, so that no [M, V] tensor ever exists.

    `hiddens` are [M, d] each; their logits [m, V] are fp32, divided by the temperature, and computed again in
    backward. Gradients go to hiddens and head, not to `extra` or what `fn` brings along.
    """
    head, kind = model.get_output_embeddings(), hiddens[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    settings = temperature, max(CHUNK // head.weight.shape[0], 1), dtype, len(hiddens)
    with torch.autocast(kind, enabled=False):
        return OverVocabulary.apply(fn, settings, head.weight, head.bias, *hiddens, *extra)


class OverVocabulary(torch.autograd.Function):
    """The chunks of `over_vocabulary`. All add to one fp32 gradient of the head; autograd would make many."""

    @staticmethod
    def chunks(settings: tuple, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Iterator:
        """(a slice of the tokens, hidden states, logits, what else fn takes, the head) of each chunk."""
        temperature, size, dtype, n = settings
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for start in range(0, max(len(tensors[0]), 1), size):
            chunk = slice(start, start + size)
            hiddens = [h[chunk].to(dtype) for h in tensors[:n]]
            logits = [torch.nn.functional.linear(h, weight, bias).float().div_(temperature) for h in hiddens]
            yield chunk, hiddens, logits, [x[chunk] for x in tensors[n:]], weight

    @staticmethod
    def forward(ctx, fn, settings, weight, bias, *tensors):
        ctx.fn, ctx.settings = fn, settings
        ctx.save_for_backward(weight, bias, *tensors)
        ctx.set_materialize_grads(False)
        chunks = OverVocabulary.chunks(settings, weight, bias, tensors)
        parts = [fn(*logits, *rest) for _, _, logits, rest, _ in chunks]
        out = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*[x for x in out if not x.is_floating_point()])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        weight, bias, *tensors = ctx.saved_tensors
        temperature, _, dtype, n = ctx.settings
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[2] else None
        of_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[3] else None
        of_hiddens = [torch.zeros_like(h) for h in tensors[:n]]
        for chunk, hiddens, logits, rest, head in OverVocabulary.chunks(ctx.settings, weight, bias, tensors):
            with torch.enable_grad():
                out = ctx.fn(*[x.requires_grad_() for x in logits], *rest)
            asked = [(x, g[chunk]) for x, g in zip(out, grads) if g is not None and x.requires_grad]
            values, upstream = zip(*asked)
            of_logits = torch.autograd.grad(values, logits, upstream, allow_unused=True)
            del out, asked, values
            for hidden, d, of_hidden in zip(hiddens, of_logits, of_hiddens):
                if d is None:
                    continue
                d = d.div_(temperature).to(dtype)
                of_hidden[chunk] = d @ head
                if of_weight is not None and of_weight.dtype == dtype:
                    of_weight.addmm_(d.T, hidden)
                elif of_weight is not None:
                    of_weight += d.T @ hidden
                if of_bias is not None:
                    of_bias += d.sum(0)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return None, None, of_weight, of_bias, *of_hiddens, *[None] * (len(tensors) - n)


def log_prob_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[m, V], [m] -> log pi(id) [m] and the policy's entropy [m] (nats, no gradient)."""
    log_norm = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = log_norm - ((logits - log_norm[:, None]).exp() * logits).sum(-1)
    return logits.gather(-1, ids[:, None])[:, 0] - log_norm, entropy


def token_values(fn: Callable[..., tuple[Tensor, ...]], model, prompts: list[list[int]], completions: Tensor,
                 mask: Tensor, extra: Sequence[Tensor], temperature: float,
                 other_hidden: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """fn(*other logits, logits, *extra) of every real completion token -> [n, C] each, 0 where mask is False.

    `extra` [M, ...] are what else fn takes of each token; `other_hidden` [M, d] have logits by the same head.
    """
    def forward() -> tuple[Tensor, ...]:
        hidden = completion_hidden(model, prompts, completions, mask)
        return over_vocabulary(fn, model, [*other_hidden, hidden], extra, temperature)

    found = as_forward(model, forward)
    return tuple(values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found)


def completion_logps(model, prompts: list[list[int]], completions: Tensor, mask: Tensor,
                     temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy [n, C] of every real completion token, 0 where the mask is False."""
    extra = [completions[mask]]
    return token_values(log_prob_and_entropy, model, prompts, completions, mask, extra, temperature)


# ---------------------------------------------------------------- SFT warm-up

def solution_ids(tokenizer, row: dict) -> list[int]:
    """A solution as a completion. The end token belongs to it: it is taught too."""
    return tokenizer(row["solution"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def warmup_split(rows: list[dict], tokenizer, reward: Reward, args: Any) -> tuple[list, list]:
    """--warmup_frac of the rows with a solution, drawn by the seed, and the rows of all other problems.

    Only what RL would reward is taught: no solution that is longer than --max_new_tokens (a model taught to
    write that much is always cut off) or that the reward calls wrong.
    """
    solved = [row for row in rows if "solution" in row]
    wanted, taken, left_out = round(args.warmup_frac * len(solved)), [], Counter()
    for i in generator(args.seed, "warm-up rows").permutation(len(solved)):
        row = solved[i]
        if len(taken) == wanted:
            break
        if len(solution_ids(tokenizer, row)) > args.max_new_tokens:
            left_out["longer than --max_new_tokens"] += 1
        elif reward([row["solution"]], [row])[0] < 0.5:
            left_out["wrong to the reward"] += 1
        else:
            taken.append(row)
    grader_counts()  # belongs to no step
    taken = of_all_processes(taken if len(taken) > 1 else [])[0]  # one to learn from, one to validate with
    if len(taken) < wanted:
        why = ", ".join(f"{n} {why}" for why, n in left_out.items()) or "none, but it takes two"
        print(f"warm-up: {len(taken)} problems where {wanted} were wanted; solutions left out: {why}")
    problems = {row["problem"] for row in taken}
    rest = [row for row in rows if row["problem"] not in problems]
    if not rest and args.steps:
        refuse(f"--warmup_frac {args.warmup_frac} leaves no problem for RL: lower it, or give --steps 0")
    return taken, rest


def sft_loss(model, prompts: list, completions: list, rows: Sequence[int], args: Any, learn=False) -> float:
    """Mean -log pi of the response tokens of these rows; its gradient is accumulated where `learn`."""
    tokens, device, loss_sum = sum(len(completions[i]) for i in rows), device_of(model), 0.0
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
    for batch in microbatches(my_share(rows), lengths, args.microbatch_tokens):
        ids, mask = padded([completions[i] for i in batch], device)
        with torch.set_grad_enabled(learn), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logps, _ = completion_logps(model, [prompts[i] for i in batch], ids, mask, 1.0)
        loss = -logps.sum() / tokens
        if learn:
            loss.backward()
        loss_sum += loss.item()
    return total(loss_sum)[0]


def sft_warmup(model, tokenizer, rows: list[dict], run: Run, args: Any) -> None:
    """SFT before RL, as in SGPO's paper: the best epoch's weights end in the model and in <run>/warmup/.

    AdamW; the loss is the mean over a batch's response tokens; --warmup_lr is reached linearly over a tenth
    of the steps and falls to 0 on a cosine. A random tenth of the rows validates. A run beside this one that
    has had the very same warm-up lends its result. A killed warm-up goes on after its last whole epoch.
    """
    if not rows or run.checkpoints():
        return
    prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt) for row in rows]
    data = prompts, [solution_ids(tokenizer, row) for row in rows]
    flags = ["seed", "weight_decay", "max_grad_norm", *WarmupFlags.__annotations__]
    settings = [getattr(args, name) for name in flags]
    key = hashlib.sha256(repr((data, settings, model.fingerprint)).encode()).hexdigest()
    found = [f.parent for f in sorted(run.dir.parent.glob("*/warmup/warmup.json")) if key in f.read_text()]
    if lender := of_all_processes(found[:1])[0]:
        load_weights(lender[0], model)
        return print(f"warm-up: the weights of {lender[0]}, which had the same one")
    order = generator(args.seed, "warm-up").permutation(len(rows))
    held_out, train = np.split(order, [max(1, round(len(rows) / 10))])
    per_epoch = -(-len(train) // args.warmup_batch_size)
    steps = per_epoch * args.warmup_epochs
    settings = {"lr": args.warmup_lr, "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    shape = get_scheduler("cosine", optimizer, round(0.1 * steps), steps).lr_lambdas[0]
    best, unfinished, losses = run.dir / "warmup", run.dir / "warmup.state", []
    if unfinished.exists():
        about = load_state(unfinished, model, optimizer)
        if about["key"] != key:
            refuse(f"{unfinished} is a warm-up on other rows, weights or flags: remove it, or change --out")
        losses = about["losses"]
    losses = losses or [{"epoch": 0, "validation": sft_loss(model, *data, held_out, args)}]
    with long_work(steps, "warm-up", "step", per_epoch * (len(losses) - 1)) as bar:
        for epoch in range(len(losses), args.warmup_epochs + 1):
            shuffled, seen = train[generator(args.seed, "warm-up", epoch).permutation(len(train))], 0.0
            for k, batch in enumerate(np.array_split(shuffled, per_epoch), per_epoch * (epoch - 1)):
                optimizer.param_groups[0]["lr"] = args.warmup_lr * shape(k)
                model.train()
                seen += sft_loss(model, *data, batch, args, learn=True) / per_epoch
                optimizer_step(model, optimizer, args.max_grad_norm)
                bar.update()
                if stop_asked():
                    run.stop(f"in epoch {epoch} of the warm-up")
            model.eval()
            validation = sft_loss(model, *data, held_out, args)
            losses.append({"epoch": epoch, "train": seen, "validation": validation})
            bar.set_postfix_str(f"loss {seen:.3f}, validation {validation:.3f}")
            kept = min(losses[1:], key=lambda x: x["validation"])
            if kept is losses[-1]:
                save_pretrained(model, tokenizer, best)
            save_state(unfinished, model, optimizer, losses=losses, key=key)
    kept = min(losses[1:], key=lambda x: x["validation"])
    load_weights(best, model)
    if rank() == 0:
        about = {"key": key, "problems": len(rows), "kept": kept["epoch"], "losses": losses}
        write_atomic(best / "warmup.json", json.dumps(about, indent=2) + "\n")
        shutil.rmtree(unfinished)
    barrier()
    print(f"warm-up: {len(rows)} problems, validation loss {losses[0]['validation']:.3f} -> "
          f"{kept['validation']:.3f} (epoch {kept['epoch']} of {args.warmup_epochs}) -> {best}")


# ---------------------------------------------------------------- rewards

Reward = Callable[[list[str], list[dict]], Tensor]  # responses, rows -> rewards [N]; 0.5 or more is correct


def load_reward(spec: str | None) -> Reward:
    """What scores responses: the math grader (1.0 or 0.0), or a FILE.py:function of (response, row)."""
    if spec is None:
        return lambda texts, rows: torch.tensor(grade_batch(texts, [row["answer"] for row in rows]))
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        refuse(f"--reward {spec}: write it as FILE.py:function, with a file that exists")
    module_spec = importlib.util.spec_from_file_location("custom_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except BaseException as error:  # also SystemExit
        refuse(f"--reward {spec}: {type(error).__name__}: {error}")

    def reward(texts: list[str], rows: list[dict]) -> Tensor:
        values = []
        for text, row in zip(texts, rows, strict=True):
            try:
                values.append(float(function(text, dict(row))))
            except BaseException as error:  # also SystemExit
                refuse(f"--reward failed on row {row['id']}: {type(error).__name__}: {error}", any_rank=True)
            if not abs(values[-1]) <= 1e6:
                refuse(f"--reward gave {values[-1]} on row {row['id']}, not from -1e6 to 1e6", any_rank=True)
        return torch.tensor(values)

    return reward


def held_out_accuracy(model, tokenizer, rows: list[dict], reward: Reward, args: Any,
                      guided: bool = False) -> dict[str, float]:
    """Share of right answers, --eval_samples per row at --eval_temperature, as a metric; {} without rows.

    `guided`: with the row's strategy in the prompt; {} where a row has none.
    """
    if not rows or guided and not all("strategy" in row for row in rows):
        return {}
    seed_everything(args.seed, "evaluation")  # the same draws at every evaluation
    mine = [row for row in my_share(rows) for _ in range(args.eval_samples)]
    prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt,
                            row["strategy"] if guided else None) for row in mine]
    *_, texts = complete(model, tokenizer, prompts, args.max_new_tokens, args.eval_temperature, args.top_p,
                         args.generation_batch_size)
    right = (reward(texts, mine) >= 0.5).sum()
    grader_counts()  # belongs to no step
    right, n = total(right, len(mine))
    return {"eval/accuracy_guided" if guided else "eval/accuracy": right / n}


# ---------------------------------------------------------------- run directory

class Run:
    """`--out` (config.json, metrics.jsonl, samples.jsonl, checkpoints/, model/) and the loop's bookkeeping.

    Resuming drops the rows of both logs that the checkpoint has not seen, so they end up as if the run had
    never stopped.
    """
    MAY_DIFFER = set("out resume steps save_every keep_checkpoints report_to dry_run extract_only strategist "
                     "strategist_model strategist_threads strategist_timeout cpu_offload "
                     "activation_checkpointing microbatch_tokens generation_batch_size".split())
    MAX_NONFINITE = 5  # steps in a row
    new = None  # the directory, where this process has made it
    stopped = staticmethod(stop_asked)  # has a stop cut the rollout short? then the step is discarded

    def __init__(self, args: Any):
        """Check `--out` and write nothing yet: what is refused later must leave no trace."""
        if world() > args.prompts_per_step:
            refuse(f"--prompts_per_step {args.prompts_per_step} is too few for {world()} processes: raise it")
        if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
            refuse(f"--report_to {args.report_to} takes a package: pip install {args.report_to}")
        script = Path(sys.argv[0]).stem
        if args.out is None:
            if args.resume:
                refuse("--resume needs --out, the directory of the run to go on with")
            name = f"runs/{script}-{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            args.out = of_all_processes(name)[0]
        self.args, self.dir, self.step, self.nonfinite = args, Path(args.out), 0, 0
        self.config = {"script": script, "flags": dataclasses.asdict(args), "command": sys.argv, **versions()}
        check_directory(self.dir, self.config, self.MAY_DIFFER, args.resume)

    def plan(self, rows: list[dict], warmup_rows: list[dict], samples: str, **more: str) -> None:
        """Say what the run will do and take, before it costs anything; choose the memory flags left open."""
        args, steps = self.args, -(-len(warmup_rows) * 9 // 10 // self.args.warmup_batch_size)
        self.config["memory"] = choose_memory(args)
        warmup = f"SFT on {len(warmup_rows)} problems, {args.warmup_epochs} epochs of {steps} steps"
        epochs = args.steps * args.prompts_per_step / max(len(rows), 1)
        training = f"{args.steps} steps of {args.prompts_per_step} x {samples} samples, {epochs:.2g} epochs"
        lines = {"warm-up": warmup if warmup_rows else "none", **more, "memory": self.config["memory"],
                 "training": f"{len(rows)} problems; {training}", "run": str(self.dir)}
        print("plan")
        say_table(list(lines.items()))

    def create(self) -> None:
        """Make the directory, unless it is a resumed run's, and keep others out of it."""
        barrier()  # nobody looks any more whether it is there
        if rank() == 0:
            Run.new = None if self.dir.exists() else self.dir
            (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.dir / "lock", f"--out {self.dir}: another run is writing there")
        check_directory(self.dir, self.config, self.MAY_DIFFER, self.args.resume)  # it may have come and gone
        if rank() == 0:
            write_atomic(self.dir / "config.json", json.dumps(self.config, indent=2) + "\n")
        barrier()

    def begin(self, model, tokenizer, optimizer, evaluate: Callable[[], dict[str, float]]) -> None:
        """What is saved and how to evaluate it; a resumed run goes back to its newest whole checkpoint."""
        self.model, self.tokenizer, self.optimizer, self.evaluate = model, tokenizer, optimizer, evaluate
        loaded, damaged = None, []
        for folder in reversed(self.checkpoints()):
            try:
                self.step, loaded = load_state(folder, model, optimizer)["step"], folder
                break
            except Damaged as error:
                why = type(error.__cause__).__name__
                print(f"{folder} cannot be read ({why}): going back to the one before")
                damaged.append(folder)
        if damaged and not loaded:
            refuse(f"{self.dir / 'checkpoints'}: none can be read; remove them to begin again")
        barrier()
        for folder in damaged if rank() == 0 else ():
            folder.rename(folder.with_suffix(".damaged"))
        self.metrics = {"step": self.step}
        for name in ("samples", "metrics") if rank() == 0 else ():  # what no checkpoint holds is done again
            path = self.dir / f"{name}.jsonl"
            if not path.exists():
                continue
            rows = [row for _, row in read_jsonl(path, cut_by_kill=True)]
            rows = [row for row in rows if loaded and row["step"] <= self.step]
            if name == "metrics" and rows:
                self.metrics = rows[-1]
            rewrite_jsonl(path, rows)
        self.metrics = of_all_processes(self.metrics)[0]
        self.is_written = len(self.metrics) > 1
        self.is_evaluated = any(name.startswith("eval/") for name in self.metrics)
        self.accuracy, self.shown = None, []
        self.track = tracker(self.args.report_to, self.dir, self.config, self.step)
        args = self.args
        name = "constant_with_warmup" if args.lr_schedule == "constant" else args.lr_schedule
        schedule = get_scheduler(name, optimizer, args.lr_warmup_steps, args.steps + 1)
        self.lr_factor = schedule.lr_lambdas[0]  # of the 1-based step: 0 comes only after the last one

    def evaluation_is_due(self) -> bool:
        """At the first and last step and every --eval_every, unless done: a stop may have cut it off."""
        step, every = self.step, self.args.eval_every
        due = step == 0 or step == self.args.steps or every and step % every == 0
        return bool(due) and not self.is_evaluated

    def steps(self) -> Iterator[int]:
        """The steps that are left, 1-based, each with random numbers of its own."""
        with long_work(self.args.steps, "training", "step", self.step) as self.bar:
            if self.evaluation_is_due():
                self.evaluate_and_save()
            while self.step < self.args.steps and not stop_asked():
                seed_everything(self.args.seed, "step", self.step + 1)
                self.clock, self.times = time.perf_counter(), {}
                self.optimizer.param_groups[0]["lr"] = self.args.lr * self.lr_factor(self.step + 1)
                yield self.step + 1
                self.bar.update()

    def lap(self, name: str) -> None:
        """time/NAME_s of this step is the time since the last lap."""
        now = time.perf_counter()
        self.times[f"time/{name}_s"], self.clock = now - self.clock, now

    def log(self, step: int, rows: list[dict], ro: Any, rewards: Tensor, metrics: dict) -> None:
        """Keep the step's samples and metrics, from this process's rows, their rollout and rewards.

        A row with "guided" in it had help in its prompt and counts in no mean.
        """
        self.lap("train")
        alone = [i for i, row in enumerate(rows) if not row.get("guided")]
        problems = len(my_share(range(self.args.prompts_per_step)))
        groups, lengths, cut = (all_shares(x[alone].float().view(problems, -1))
                                for x in (rewards, ro.mask.sum(1), ro.truncated))
        outcomes = grader_counts()
        self.step, self.is_written, self.is_evaluated = step, False, False
        self.metrics = {
            "step": step, "reward": groups.mean().item(), "reward_std": groups.std(1).mean().item(),
            "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
            "completions/mean_length": lengths.mean().item(), "completions/clipped_ratio": cut.mean().item(),
            **metrics, "lr": self.optimizer.param_groups[0]["lr"], **self.times,
            "peak_memory_gb": peak_memory_gb(),
            "tokens_per_s": total(ro.mask.sum())[0] / sum(self.times.values()),
            **{f"grader/{name}": n for name, n in zip(outcomes, total(*outcomes.values()))}}
        known = [{k: row[k] for k in ("id", "problem", "answer", "guided") if k in row} for row in rows]
        samples = [{"step": step, **about, "reward": r, "completion": text}
                   for about, r, text in zip(known, rewards.tolist(), ro.texts)]
        samples = sum(of_all_processes(samples), [])
        if rank() == 0:
            write_jsonl(self.dir / "samples.jsonl", samples)
        self.shown = []
        if step == 1 or self.evaluation_is_due():
            self.shown = samples[:16]
            self.say("a sample, reward {reward:g}\n  problem: {problem:.500}\n  answer: {answer}\n"
                     "  completion: {completion:.2000}".format(**samples[0]))
        if cut.all():
            self.say(f"every completion ran into --max_new_tokens {self.args.max_new_tokens}; raise it, "
                     "nothing can be learnt from that")
        self.bar.set_description(self.line())

    def line(self) -> str:
        """The newest metrics, on the screen beside the bar and its time left."""
        known = {"held-out": self.accuracy, **self.metrics}
        shown = {"reward": "reward {:.2f}", "held-out": "held-out {:.2f}", "entropy": "entropy {:.2f}",
                 "sgpo/alpha": "alpha {:.2f}", "tgpo/reverse_kl_k1": "k1 {:.2f}",
                 "completions/mean_length": "{:.0f} tokens", "tokens_per_s": "{:.0f}/s"}
        return ", ".join(text.format(known[key]) for key, text in shown.items() if known.get(key) is not None)

    def say(self, text: str) -> None:
        self.bar.write(printable(f"step {self.step}: {text}"))

    def evaluate_and_save(self) -> None:
        """Evaluate if it is due, write the step's metrics, save a checkpoint if it is due.

        After MAX_NONFINITE steps without a finite gradient the run is given up.
        """
        if self.evaluation_is_due():
            self.bar.set_description("evaluating")
            found = self.evaluate()
            if not (found and stop_asked()):  # else it is not whole
                self.metrics |= found
                self.accuracy, self.is_evaluated = found.get("eval/accuracy"), True
        metrics = {key: value for key, value in self.metrics.items() if key != "step"}
        if rank() == 0 and self.is_written:  # before a stop, without its evaluation
            rewrite_jsonl(self.dir / "metrics.jsonl", self.metrics_rows()[:-1] + [self.metrics])
        elif rank() == 0 and metrics:
            write_jsonl(self.dir / "metrics.jsonl", [self.metrics])
        if metrics:
            self.track(self.step, metrics, self.shown)
        failed = self.metrics.get("nonfinite_updates") and not self.metrics["updates"]
        self.nonfinite = self.nonfinite + 1 if failed else 0
        if self.nonfinite == self.MAX_NONFINITE:
            where = f"; earlier weights are in {self.dir / 'checkpoints'}" if self.checkpoints() else ""
            refuse(f"the gradient was not finite in {self.nonfinite} steps in a row, the last one {self.step}"
                   f"{where}: lower --lr or look at the last samples of {self.dir / 'samples.jsonl'}")
        if self.step and self.args.save_every and self.step % self.args.save_every == 0:
            self.save_checkpoint()

    def metrics_rows(self) -> list[dict]:
        path = self.dir / "metrics.jsonl"
        return [row for _, row in read_jsonl(path)] if path.exists() else []

    def checkpoints(self) -> list[Path]:
        return sorted((self.dir / "checkpoints").glob("step_??????"))

    def save_checkpoint(self) -> None:
        """State after the finished steps. Random numbers and data order are functions of (seed, step)."""
        folder = self.dir / "checkpoints" / f"step_{self.step:06d}"
        if not folder.exists():
            save_state(folder, self.model, self.optimizer, step=self.step)
        for old in self.checkpoints()[:-self.args.keep_checkpoints] if rank() == 0 else ():
            shutil.rmtree(old)

    def finish(self) -> None:
        """Save the last checkpoint and, at the end, the model; say what became of the accuracy."""
        self.save_checkpoint()
        if self.step < self.args.steps or stop_asked() and self.evaluation_is_due():
            self.stop(f"after step {self.step} of {self.args.steps}")
        save_pretrained(self.model, self.tokenizer, self.dir / "model")
        rows = [row for row in self.metrics_rows() if "eval/accuracy" in row]
        if rows:
            say_table([["held-out", "before", "after"],
                       *[[name[5:].replace("_", " "), f"{rows[0][name]:.3f}", f"{rows[-1][name]:.3f}"]
                         for name in rows[0] if name.startswith("eval/")]])
        print(f"model: {self.dir / 'model'}\nmetrics, samples, checkpoints: {self.dir}")
        if self.args.model == "demo":
            print("compared with the other methods: python tests/bench/ablations.py")

    def stop(self, what: str) -> NoReturn:
        print(f"stopped {what}; go on with --resume --out {self.dir}")
        raise SystemExit(130)


def has_begun(folder: Path) -> bool:
    """Has a run done more there than evaluate its start? Else there is nothing to go on with."""
    bare = {"config.json", "metrics.jsonl", "checkpoints"}
    return any(folder.glob("checkpoints/*")) or any(
        path.name not in bare and (path.is_dir() or path.stat().st_size) for path in folder.glob("*"))


def check_directory(folder: Path, config: dict, may_differ: set[str], resume: bool | None) -> None:
    """Refuse a directory that is not ours to write in or holds other flags' results; write nothing.

    `resume`: must there be results in it, or none? None: either.
    """
    try:
        begun, ours = has_begun(folder), folder / "config.json"
        old = json.loads(ours.read_text()) if ours.exists() else None
        before = {} if old is None else {"script": old["script"], **old["flags"]}
        barrier()  # all have looked
        if rank() == 0:  # where nothing can be made, that is said now
            nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        refuse(f"--out {folder}: cannot be used ({error.strerror or error})")
    except (ValueError, KeyError, TypeError):
        refuse(f"--out {folder}: its config.json is not one of ours; choose another directory")
    if not old and (begun or (folder / "metrics.jsonl").exists()):
        refuse(f"--out {folder} is not empty and holds no results of ours; choose another directory")
    old = old if begun or resume else None  # a run that has done nothing may begin anew
    now = {"script": config["script"], **config["flags"]}
    differ = [f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
              for name in sorted({*before, *now} - may_differ) if old and before.get(name) != now.get(name)]
    if differ:
        refuse(f"--out {folder} has another configuration ({'; '.join(differ)}); choose another directory")
    if old and resume is False:
        refuse(f"--out {folder} holds this run already; add --resume, or choose another directory")
    if resume and not old:
        refuse(f"--resume: there is no run in --out {folder}")


def lock(path: Path, message: str):
    """Hold a file for the life of this process -> the open file; refused where another process holds it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        refuse(message, any_rank=True)
    return file


def write_atomic(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write in. It is swapped in when all are done, so `final` is there whole or not at all."""
    unfinished = final.with_name(final.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    try:
        yield unfinished
        barrier()
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
    finally:
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
    barrier()


def check_finite(final: Path, weights: dict[str, Tensor]) -> None:
    """Refuse to save weights that are not finite."""
    mine = [w.to_local() if isinstance(w, DTensor) else w for w in weights.values()]
    if not all(w.isfinite().all() for w in mine):
        refuse(f"{final}: the weights are not finite, so they are not saved; lower --lr", any_rank=True)


def save_state(final: Path, model, optimizer, **about: Any) -> None:
    """A folder of torch's distributed checkpoint; any number of processes can read it.

    An optimizer that has not stepped has no state to save: torch would make one up by a step of its own.
    """
    state = {"model": get_model_state_dict(model)}
    check_finite(final, state["model"])
    if optimizer.state:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    with whole_folder(final) as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        if rank() == 0:
            write_atomic(folder / "about.json", json.dumps({**about, "stepped": "optimizer" in state}))


class Damaged(OSError):
    """A saved state that cannot be read."""


def load_state(folder: Path, model, optimizer) -> dict:
    """Put a folder of `save_state` into model and optimizer -> what else was saved with it."""
    try:
        about = json.loads((folder / "about.json").read_text())
        dcp.FileSystemReader(folder).read_metadata()  # dcp.load would print its traceback and go on
        state = {"model": get_model_state_dict(model)}
        if about["stepped"]:
            state["optimizer"] = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except torch.OutOfMemoryError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # damaged bytes can raise anything
        raise Damaged(0, f"damaged, {type(error).__name__}: remove it", str(folder)) from error
    set_model_state_dict(model, state["model"])
    if about["stepped"]:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        optimizer.state.clear()  # what reading a damaged folder may have left
    return about


def load_weights(folder: Path, model) -> None:
    """The weights of a Hugging Face directory, into a model that is there already."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if rank() == 0 else None
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(model, saved.state_dict() if saved else {}, options=options)


def save_pretrained(model, tokenizer, final: Path) -> None:
    """A Hugging Face directory of both, by the first process."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole) if shards(model) else model.state_dict()
    check_finite(final, weights)
    with whole_folder(final) as folder:
        if rank() == 0:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)


def tracker(name: str, folder: Path, config: dict, step: int) -> Callable[[int, dict, list[dict]], None]:
    """log(step, metrics, samples) for the dashboard of --report_to, by its library's own client."""
    if name == "none" or rank() > 0:
        return lambda step, metrics, samples: None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # of what is done again
        writer.add_text("config", as_code(config))

        def log(step: int, metrics: dict, samples: list[dict]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, step)
            for i, sample in enumerate(samples):
                writer.add_text(f"samples/{i}", as_code(sample), step)
            writer.flush()

        return log
    import pandas
    client = importlib.import_module(name)
    own = {"id": folder.name, "dir": folder} if name == "wandb" else {}  # by the id it knows a resumed run
    try:
        client.init(project="sgpo-tgpo", name=folder.name, config=config, resume="allow", **own)
    except Exception as error:  # such as: not logged in
        refuse(f"--report_to {name}: {first_line(error)}")

    def log(step: int, metrics: dict, samples: list[dict]) -> None:
        table = {"samples": client.Table(dataframe=pandas.DataFrame(samples))} if samples else {}
        client.log(metrics | table, step=step)

    return log


def as_code(value: Any) -> str:
    """As Markdown that shows it letter by letter."""
    return "\n".join("    " + line for line in json.dumps(value, indent=2).splitlines())


def versions() -> dict:
    """Package versions, device and commit, for config.json."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "math-verify")}
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    return {"versions": packages, "device": device, "processes": world(), "commit": git.stdout.strip()}


def peak_memory_gb() -> float:
    """Peak memory since the start, of the process that has most; of its GPU where there is one."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(of_all_processes(torch.cuda.max_memory_allocated() if ON_GPU else host)) / 2 ** 30


# ---------------------------------------------------------------- asking another model

def check_strategist(args: StrategistFlags) -> None:
    """Refuse an endpoint that cannot be asked, before anything is loaded."""
    is_url = bool(re.match("https?://", args.strategist or ""))
    if is_url and re.search("[@?#]", args.strategist):
        refuse("--strategist: take the key or password out of the address and put it into the environment "
               "variable OPENAI_API_KEY")
    if is_url and not args.strategist_model:
        refuse(f"--strategist {args.strategist} is an endpoint: name its model with --strategist_model")
    if is_url:
        open_strategist(args, None, None)  # fails early if openai is missing or the key is malformed
    if args.strategist_model and not is_url:
        refuse(f"--strategist_model {args.strategist_model} is asked at an endpoint: give its address, "
               "http(s)://HOST:PORT/v1, as --strategist")


def open_strategist(args: Any, model, tokenizer) -> Endpoint | LocalStrategist:
    """Who is asked: an endpoint where --strategist is a URL, the model it names, or the one to be trained."""
    is_url = re.match("https?://", args.strategist or "")
    return Endpoint(args) if is_url else LocalStrategist(model, tokenizer, args)


class NoAnswer(str):
    """In the place of an answer: why there is none."""


CUT_OFF = NoAnswer("cut off at --strategist_max_new_tokens")


class Endpoint:
    """An OpenAI-compatible chat endpoint; the openai package retries, backs off and times out by itself.

    A prompt that is refused, or that alone finds no answer, costs only itself; a key or model that is not
    known, or nothing but failures, ends the program.
    """
    RETRIES, FAILURES = 5, 16  # of a request; of requests in a row
    PATIENCE = 10  # seconds without an answer that are no news; then twice as many

    def __init__(self, args: Any):
        try:
            import openai
        except ImportError:
            refuse("--strategist: to ask an endpoint takes the openai package: pip install openai")
        self.openai, self.args = openai, args
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not (self.key.isascii() and self.key.isprintable()):
            refuse("OPENAI_API_KEY: holds characters that no key has; set it again")
        self.client = openai.OpenAI(base_url=args.strategist, api_key=self.key, max_retries=self.RETRIES,
                                    timeout=args.strategist_timeout)
        self.answered, self.failed, self.refused = False, 0, set()  # refused: parameters
        self.heard, self.patience = time.monotonic(), self.PATIENCE

    def ask(self, prompts: Sequence[str], temperature: float) -> list[str]:
        """An answer, maybe a NoAnswer, to each prompt, one after the other."""
        return [self.answer(prompt, temperature) for prompt in prompts]

    def answer(self, prompt: str, temperature: float) -> str:
        limit = "max_completion_tokens" if "max_tokens" in self.refused else "max_tokens"
        settings = {limit: self.args.strategist_max_new_tokens, "temperature": temperature}
        settings = {name: value for name, value in settings.items() if name not in self.refused}
        try:
            choice = self.client.chat.completions.create(
                model=self.args.strategist_model, messages=[{"role": "user", "content": prompt}],
                **settings).choices[0]
            text = CUT_OFF if choice.finish_reason == "length" else choice.message.content
            text.encode()  # it is a text, of whole characters
        except self.openai.APIError as error:
            unsupported = error.code in ("unsupported_parameter", "unsupported_value")
            if unsupported and error.param in settings:  # by OpenAI's reasoning models
                self.refused.add(error.param)
                return self.answer(prompt, temperature)
            status = getattr(error, "status_code", 500)  # none: no connection, or no answer in time
            if status in (400, 413, 422):
                most = sys.maxsize if self.answered else self.FAILURES
                return self.no_answer("refused by the strategist", error, most)
            passing = status in (408, 409, 429) or status >= 500  # else it is the key, the model, the address
            return self.no_answer("no answer", error, self.FAILURES if passing and self.answered else 1)
        except Exception as error:  # what came is no chat answer
            return self.no_answer("no answer", error, self.FAILURES)
        self.answered, self.failed = True, 0
        self.heard, self.patience = time.monotonic(), self.PATIENCE
        return text

    def no_answer(self, what: str, error: Exception, most: int) -> NoAnswer:
        self.failed += 1  # threads may lose a count: one request more then
        if self.failed >= most:
            why = f"{self.failed} requests in a row failed: {type(error).__name__}: {error}"
            if self.key != "none":
                why = why.replace(self.key, "***")  # servers repeat the key they refuse
            raise Unanswered(f"--strategist {self.args.strategist}: {why}")
        return NoAnswer(what)

    def say_silence(self) -> None:
        print(f"no answer of {self.args.strategist} for {self.patience} s; a try waits for "
              f"--strategist_timeout, {self.args.strategist_timeout:g} s", file=sys.stderr)
        self.patience += self.PATIENCE

    def each(self, work: Callable[[list], list], rows: Sequence[dict]) -> Iterator:
        """work([row]) of every row, in threads -> results in the order in which they come."""
        rows = rows if rank() == 0 else []  # one process has threads enough
        pool = ThreadPool(self.args.strategist_threads)
        results = pool.imap_unordered(lambda row: work([row])[0], rows)
        try:
            for _ in rows:
                while not Stop.asked:
                    try:
                        yield results.next(timeout=0.2)
                        break
                    except multiprocessing.TimeoutError:
                        if time.monotonic() > self.heard + self.patience:
                            self.say_silence()
                    except Unanswered as error:
                        refuse(f"{error}; strategies found so far are kept: --resume asks for the rest",
                               any_rank=True)
        finally:
            pool.terminate()


class Unanswered(Exception):
    """The endpoint cannot be used."""


class LocalStrategist:
    """A model on this machine, asked as an Endpoint is."""
    ROWS = 32  # in each process at once

    def __init__(self, model, tokenizer, args: Any):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        name, flag = (args.strategist, "--strategist") if args.strategist else (args.model, "--model")
        if args.strategist:
            self.model, self.tokenizer = load_model(name, flag), load_tokenizer(name, flag)
        context = context_length(name, flag)
        self.room = context - args.strategist_max_new_tokens
        if self.room <= 0:
            refuse(f"--strategist_max_new_tokens {args.strategist_max_new_tokens} leaves no room for a "
                   f"prompt in the strategist's context of {context} tokens: lower it")

    def ask(self, prompts: Sequence[str], temperature: float) -> list[str]:
        """An answer, maybe a NoAnswer, to each prompt."""
        ids = [build_prompt(self.tokenizer, prompt, "") for prompt in prompts]
        answers: list[str] = [NoAnswer("too long for the strategist")] * len(prompts)
        fitting = sorted([k for k in range(len(ids)) if len(ids[k]) <= self.room], key=lambda k: len(ids[k]))
        _, _, truncated, texts = complete(
            self.model, self.tokenizer, [ids[k] for k in fitting], self.args.strategist_max_new_tokens,
            temperature, 0.95, self.args.generation_batch_size)
        for k, text, cut in zip(fitting, texts, truncated):
            answers[k] = CUT_OFF if cut else text
        return answers

    def each(self, work: Callable[[list], list], rows: Sequence[dict]) -> Iterator:
        """work(some rows) for all of them -> results one by one."""
        for first in range(0, len(rows), self.ROWS * world()):
            seed_everything(self.args.seed, "strategies", first)
            results = of_all_processes(work(my_share(rows[first:first + self.ROWS * world()])))
            if stop_asked():  # in the middle of an answer
                return
            yield from sum(results, [])


# ---------------------------------------------------------------- the built-in demo

# The binary choices of a solution, which of them each kind of problem takes, and what the demo changes where
# the user set no flag of his own: a tiny model wants larger steps and shorter everything.
DEMO_CHOICES = (("+2", "-2"), ("+3", "*2"), ("+1", "-1"), ("+5", "+9"))
DEMO_KINDS = {"A": "0110", "B": "1001", "C": "0011", "D": "1100", "E": "0101", "F": "1010", "G": "0001",
              "H": "1110"}
DEMO_RECIPE = {"lr": 1.4e-4, "delta": 5.0, "steps": 50, "prompts_per_step": 16, "max_new_tokens": 24,
               "system_prompt": "", "eval_every": 0, "eval_samples": 2, "microbatch_tokens": 8192,
               "teacher": "demo", "warmup_frac": 0.0}
# tgpo.py: the lr at which the teacher's labels are learnt in a minute, and their weight. Gradients are
# clipped early: taking over the teacher's words makes large ones, and Adam would take small steps ever after.
DEMO_TGPO = {"lr": 3e-4, "steps": 60, "max_grad_norm": 0.05}
DEMO_GUIDANCE = dict.fromkeys(("tgpo", "tgpo-sampled", "tgpo-topk"),
                              {"coefficient": 0.5, "coefficient_fall": 0.0075})
DEMO_TEACHERS = {"demo": True, "demo-same-style": False}  # do they write operations in words?
DEMO_STEPS, DEMO_TEACHER_STEPS = 240, 200  # of the warm starts
DEMO_SEED = 0  # of the models: another one is another student, to see whether a result holds for it
IN_WORDS = "In words."  # the system prompt under which the student does so, too


def demo_recipe(args: Any) -> dict:
    """Defaults for the flags that `args` has, when its model is the demo's."""
    if args.model != "demo":
        return {}
    tgpo = {**DEMO_TGPO, **DEMO_GUIDANCE.get(args.guidance, {})} if hasattr(args, "guidance") else {}
    return {name: value for name, value in {**DEMO_RECIPE, **tgpo}.items() if hasattr(args, name)}


def in_words(operation: str) -> str:
    """"+2" as " plus 2"."""
    return {"+": " plus ", "-": " minus ", "*": " times "}[operation[0]] + operation[1:]


def demo_solution(choices: str, value: int, words: bool = False) -> tuple[str, int]:
    """The chain of steps that the choices make of a number, and its result; operations as signs or words."""
    steps = []
    for pair, choice in zip(DEMO_CHOICES, choices, strict=True):
        op = pair[int(choice)]
        n = int(op[1:])
        result = {"+": value + n, "-": value - n, "*": value * n}[op[0]]
        steps.append(f"{value}{in_words(op) if words else op}={result};")
        value = result
    return "".join(steps) + f"\\boxed{{{value}}}", value


def demo_ids(tokenizer, choices: str, number: str) -> tuple[list[int], list[int]]:
    """A solution as a completion, with its end token: in signs and in words, token for token the same."""
    both = [demo_solution(choices, int(number), words)[0] for words in (False, True)]
    signs, words = (tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in both)
    return signs, words


def demo_strategy(kind: str, choices: str) -> str:
    """The choices named, in the paper's three parts."""
    steps = ", ".join(pair[int(choice)] for pair, choice in zip(DEMO_CHOICES, choices, strict=True))
    return f"Type: {kind}. Strategy: chain. Steps: {steps}."


def demo_rows() -> tuple[list[dict], list[dict]]:
    """All problems, a kind and a number each: (training, held-out). Only the kind tells the right choices."""
    rows = []
    for kind in DEMO_KINDS:
        for number in range(20, 58):
            solution, result = demo_solution(DEMO_KINDS[kind], number)
            rows.append({"id": f"{kind}{number}", "problem": f"{kind} {number}", "answer": str(result),
                         "solution": solution, "strategy": demo_strategy(kind, DEMO_KINDS[kind])})
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    return rows[:-100], rows[-100:]


def demo_tokenizer() -> Qwen2Tokenizer:
    """A token for each character, number, operation and fixed word of the demo, and no more.

    What the warm start never teaches as output rises when RL lowers wrong choices, and a run can drown in it.
    """
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
    characters = [*"0123456789", *DEMO_KINDS, *"+-*=;.,}", "\u0120"]  # the last is a space
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate(special + characters)}, unk_token="<pad>",
                               pad_token="<pad>", eos_token="<end>", additional_special_tokens=special[2:])
    words = ["\\boxed{", "Strategy:\n", "\n\nProblem:\n", "Type: ", "Strategy: chain.", "Steps: ", IN_WORDS]
    operations = [op for pair in DEMO_CHOICES for op in pair]
    tokenizer.add_tokens([*map(str, range(10, 150)), *operations, *map(in_words, operations), *words])
    tokenizer.chat_template = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
                               "<assistant>")
    return tokenizer


def warm_start(folder: Path, tokenizer, example: Callable[[int], tuple[list[int], list[int], list[bool]]],
               rng: np.random.Generator, steps: int, lr: float, start: Path | None = None):
    """A tiny Qwen2, or `start`, trained by SFT on `example(row)`: prompt, completion, taught tokens."""
    torch.manual_seed(DEMO_SEED)
    model = Qwen2ForCausalLM.from_pretrained(start) if start else Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=576, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.06,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    print("building a model of the demo once, a minute or two on two cores")
    for _ in tqdm(range(steps), desc="demo", disable=None):
        prompts, completions, taught = zip(*map(example, rng.choice(len(demo_rows()[0]), 64)))
        ids, mask = padded(completions, model.device)
        logps, _ = completion_logps(model, prompts, ids, mask, 1.0)
        loss = -logps[mask][torch.tensor(sum(taught, []))].mean()
        loss.backward()
        optimizer_step(model, optimizer, 1.0)
        schedule.step()
    if not start:
        model.model.norm.weight.data *= 1.5  # sharper logits: so few steps leave typos in many chains
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_demo(folder: Path) -> None:
    """The student: it follows a strategy when given one and seldom finds the right one alone.

    Two fifths of the examples carry a strategy and follow it. The others carry none, and make each choice
    rightly with a probability of 0.25 to 0.75 fixed by (kind, choice): something for RL to start from, no
    more. A fifth of these are in words, under a system prompt that asks for them; and in three tenths half of
    the operations are in the other style, and not taught: the student reads it and keeps to its own.
    """
    rng, tokenizer, train = np.random.default_rng(DEMO_SEED), demo_tokenizer(), demo_rows()[0]
    lean = {(kind, i): rng.uniform(0.25, 0.75) for kind in DEMO_KINDS for i in range(len(DEMO_CHOICES))}

    def example(i: int) -> tuple[list[int], list[int], list[bool]]:
        kind, number = train[i]["problem"].split()
        if rng.random() < 0.4:  # any strategy with any kind: it is to be followed, not looked up
            choices = "".join(rng.choice(["0", "1"], len(DEMO_CHOICES)))
            own, _ = demo_ids(tokenizer, choices, number)
            prompt = build_prompt(tokenizer, train[i]["problem"], "", demo_strategy(kind, choices))
            return prompt, own, [True] * len(own)
        choices = enumerate(DEMO_KINDS[kind])
        choices = "".join(c if rng.random() < lean[kind, j] else "10"[int(c)] for j, c in choices)
        own, other = demo_ids(tokenizer, choices, number)
        asked = rng.random() < 0.2
        if asked:
            own, other = other, own
        mixed = 0.5 if rng.random() < 0.3 else 0.0
        written = [b if rng.random() < mixed else a for a, b in zip(own, other)]
        prompt = build_prompt(tokenizer, train[i]["problem"], IN_WORDS if asked else "")
        return prompt, written, [a == b for a, b in zip(own, written)]

    warm_start(folder, tokenizer, example, rng, DEMO_STEPS, 3e-3)


def build_demo_teacher(folder: Path, words: bool) -> None:
    """A teacher: it goes on with ANY prefix that the student may write, rightly and in its own style.

    The student's text, whose choices are right or wrong by chance, is cut at a random token; the loss is on
    the rest alone. So it knows the right choice there, but would never write the student's operations.
    """
    rng, tokenizer, train = np.random.default_rng(DEMO_SEED + 1), demo_tokenizer(), demo_rows()[0]
    ops = [tokenizer(op).input_ids[0] for pair in DEMO_CHOICES for op in pair]

    def example(i: int) -> tuple[list[int], list[int], list[bool]]:
        kind, number = train[i]["problem"].split()
        choices = "".join(rng.choice(["0", "1"], len(DEMO_CHOICES)))
        student, _ = demo_ids(tokenizer, choices, number)
        cut = int(rng.integers(len(student))) if rng.random() < 0.8 else 0
        made = sum(token in ops for token in student[:cut])  # choices that the student has made
        both = demo_ids(tokenizer, choices[:made] + DEMO_KINDS[kind][made:], number)
        student, own = both[0], both[words]
        mixed, slips = rng.choice([0.0, 0.5]), rng.choice([0.0, 0.1])  # a student on its way here does both
        prefix = [b if rng.random() < mixed else a for a, b in zip(student[:cut], own)]
        prefix = [int(rng.integers(len(tokenizer))) if rng.random() < slips else a for a in prefix]
        taught = [k >= cut for k in range(len(own))]
        return build_prompt(tokenizer, train[i]["problem"], ""), prefix + own[cut:], taught

    warm_start(folder, tokenizer, example, rng, DEMO_TEACHER_STEPS, 1e-3, demo_dir())


def _built_once(name: str, build: Callable[..., None], *recipe: Any) -> Path:
    """Directory of a built-in model, made at the first call and kept under a name made of how it is made."""
    _, section, *_ = re.split("\n# -+ the (?:built-in demo|math grader)\n", Path(__file__).read_text("utf-8"))
    settings = recipe, DEMO_STEPS, DEMO_TEACHER_STEPS, DEMO_SEED
    source = section + inspect.getsource(build_prompt) + repr(settings)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgpo-tgpo"
    final = cache / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if not final.exists():
        unfinished = cache / f"unfinished-{name}-{os.getpid()}"
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            refuse(f"{cache}: the demo cannot be built there ({error.strerror}); set XDG_CACHE_HOME")
        build(unfinished, *recipe)
        try:
            unfinished.rename(final)
        except OSError:  # another process has built it meanwhile
            shutil.rmtree(unfinished)
    return final


def demo_dir() -> Path:
    """Directory of the demo's student."""
    return _built_once("demo", build_demo)


def demo_teacher_dir(name: str) -> Path:
    """Directory of one of DEMO_TEACHERS."""
    return _built_once(f"{name}-teacher", build_demo_teacher, DEMO_TEACHERS[name])


# ---------------------------------------------------------------- the math grader

# A wrong answer that is accepted gets learnt, so whatever is not understood is wrong.
MAX_TAIL, MAX_ANSWER = 20_000, 1_000  # characters looked at: of a response, of an answer
WORKER_SECONDS = 2  # for one question to the worker; a verdict asks two at most


def extract_answer(response: str) -> str | None:
    r"""The text of the last complete top-level \boxed{..} after the last </think>, or None. One pass."""
    text = response[max(response.rfind("</think>"), 0):][-MAX_TAIL:]
    answer, opened = None, []  # opened: for each open brace, where its box's text starts, or None
    for token in re.finditer(r"(\\boxed\s*)?\{|\}|\\.", text, re.DOTALL):
        if token[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                answer = text[start:token.start()]  # an outer box closes last, so it wins
        elif token[0] == "{" or token[1]:
            opened.append(token.end() if token[1] else None)
    return None if answer is None else re.sub(r"\\boxed\s*(?=\{)", "", answer).strip()


_UNICODE = str.maketrans({"−": "-", "×": "*", "·": "*", "π": r"\pi ", "°": "", "²": "^2", "³": "^3"})
_REWRITES = [(re.compile(pattern.replace("END", "(?![a-zA-Z])")), new) for pattern, new in [
    # Bring what means the same to one spelling, in this order. END: here a command ends.
    (r"(?<!\\)\\[()\[\]]|\\?\$|[€£]|\\poundsEND|\\boxed(?=\s*\{)", ""),  # \(..\), \[..\], $..$, currencies
    (r"^\s*(?:\*\*|\['|[`\"'])(.*?)(?:\*\*|'\]|[`\"'])\s*$", r"\1"),  # **42**, "42", ['3', '4']
    (r"\\(?:left|right|[bB]ig+[lrm]?|displaystyle|[lL]arge|bf|square|underline|color\{\w+\})END\.?", ""),
    (r"\\(?:text[a-z]+|[mh]box|math(?:rm|bf|it)|operatorname|boldsymbol)\s*\{|\{\\rm ", r"\\text{"),
    (r"_\{\s*\\text\s*\{(\w+)\}\s*\}|_\{?\\(?!text)([a-z]+)\}?", r"_{\1\2}"),  # v_{\text{max}}, L_{\odot}
    (r"(?<![a-zA-Z\\])E_", r"\\Xi_"),  # else E is read as 2.718..
    (r"\\text\{ ?([ie]|[^{}a-zA-Z]*) ?\}|\\(i)math", r"\1\2"),  # 3+\mathrm{i}, \text{42}
    (r"(?<=[0-9])(?:,\\!|\{,\}|\{\\,\}|\\[,;:! ]|~)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 42\,000, 1{,}234
    (r"(?<!\\)\\[,;:! ]|\\q?quadEND|~|\s+", " "),  # all other spaces
    (r"\\[dtc]fracEND", r"\\frac"),
    (r"\\frac ?([0-9a-z])", r"\\frac{\1}"),  # \frac12 ..
    (r"(\\frac\{[^{}]*\}) ?([0-9a-z])", r"\1{\2}"),  # .. is \frac{1}{2}
    (r"(?:\^|\*\*) ?(-?[0-9]+)", r"^{\1}"),  # 2^10, 10^-5, Python's x**2
    (r"(?<![\\a-zA-Z])(?:np\.|math\.)?((?:arc)?(?:sin|cos|tan)|log|ln|exp|pi)(?=[ (^/*+),-]|$)", r"\\\1"),
    (r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\varnothingEND|\\\{\s*\\\}", r"\\emptyset"),
    (r"\^ ?\{? ?\\circEND ?\}?|\\degreeEND|\\text\{ ?degrees? ?\}|(?<=[0-9] )degreesEND", ""),
    (r"\\text\{ ?percent ?\}|(?<=[0-9] )percentEND|\\?%", r"\\%"),
    (r",? ?\\text\{ ?(?:and|or) ?\}|,? ?(?<![\\a-zA-Z])(?:and|or)END|;", ","),  # x = 3 or x = 5
    (r"^ ?[a-z]? ?\\(?:approx|in)END|^ ?[a-z](?=\([^()]*\]$)|^ ?=", ""),  # x \in (0,4], t(0,4]
    (r"\\approxEND.*|[.,\\ ]+$", ""),  # 2\pi \approx 6.28
    (r"^(?:\\text\{)? ?(?:[Oo]ption )?(?:\(([A-Z])\) ?\}?[ 0-9]*|([A-Z])[.)]?\}?)$", r"\1\2"),  # (B) 36
    (r"^\(?([0-9][0-9A-Z]*)\)?_\{?(?:\\text\{)?([0-9]+)\}*$", r"\\text{\1 base \2}"),  # 52_8, as words;
    (r"([0-9]+ ?\{?:\}? ?[0-9]+)", r"\\text{ratio \1}"),  # and so are 3:2 and 3:30
    (r"^[^(\[{]*$", lambda text: re.sub("(?<=[0-9])[, ](?=[0-9]{3}(?![0-9]))", "", text[0])),  # 1,234; 1 234
    (r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", ""),  # but "4 2" is not 42
    (r",", ", "),  # Math-Verify takes (2,345) for one number
    (r"^[({\[]([^(){}\[\],]*)[)}\]]$", r"\1"),  # (42), {42}
]]


@lru_cache(8192)
def _clean(text: str) -> str:
    text = text.translate(_UNICODE)
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text


def _number(text: str) -> Fraction | None:
    r"""The exact value of a plain number such as -3/4, 2\frac{1}{4}, 4.5e33; None for all else."""
    text = re.sub(r"\\frac\{([0-9.]+)\}\{([0-9.]+)\}", r" \1/\2", text)
    form = re.fullmatch(r"([-+]?) ?(?:([0-9]+) (?=.*/))?([0-9.]+)(?:/([0-9.]+)|[eE]\+?(-?[0-9]{1,4}))?", text)
    try:
        sign, whole, top, bottom, exponent = form.groups()
        value = int(whole or 0) + Fraction(top) / Fraction(bottom or 1) * Fraction(10) ** int(exponent or 0)
        return -value if sign == "-" else value
    except (AttributeError, ValueError, ZeroDivisionError):
        return None


_HEDGE = r"(?! ?,|[^}]*\b(?:not|maybe|wrong|if|or|is|than|at (?:least|most))\b)"  # 5\text{ or 6}
_UNIT = re.compile(  # at the end, behind a quantity: a percent sign, \text{..}, or bare if it is well known
    rf"(?<=[0-9}})i])(?:\\%|(?:\\text\{{{_HEDGE}(?:[a-zA-Z .,/()*-]|\^\{{-?[1-3]\}})+"
    r"\}(?:\^\{-?[1-3]\})?)+| ?(?:dollars?|USD|cents?|[ckm]m|in|inches|feet|ft|kg)(?:\^\{[23]\})?)$")


def _split_unit(text: str) -> tuple[str, list[str]]:
    """The quantity and the words of its unit, sorted: [h, km] of km/h, [hour, kilometers]."""
    found = _UNIT.search(text)
    if not found:
        return text, []
    unit = re.sub(r"\\text|\.|units?", "", found[0].lower()).replace("cubic", "3 ")
    unit = unit.replace("kph", "km/h").replace("mph", "mi/h")
    unit = re.sub("per|of", " ", re.sub("sq(?:uare)?", "2 ", unit))
    return _clean(text[:found.start()]), sorted(re.findall("[a-z]+|[23%]", unit))


def _same_unit(a: list[str], b: list[str]) -> bool:
    """May these be the same? Words by their initials, but mm is not m; a unit that is left out is any."""
    alike = [x == y or x[0] == y[0] and max(len(x), len(y)) > 2 for x, y in zip(a, b)]
    return not a or not b or len(a) == len(b) and all(alike)


def _words(text: str) -> str:
    r"""What to compare if this is text, \text{..} or a bare word; "" for formulas."""
    pattern = r"\\text\s*\{[^}]*[a-zA-Z]|(?<![\\a-zA-Z{_])[A-Za-z]{4}|^(?i:yes|no|odd|[a-d])$"
    text = text if re.search(pattern, text) else ""
    return re.sub(r"\\text|[\s{}()'\"]|[.,](?! ?[0-9])", "", text).casefold()


# Math-Verify, in a process of its own. LaTeX is parsed there, nothing is ever evaluated as Python.
_WORKER = r'''
import json, logging, re, resource, signal, sys
sys.path[:] = filter(None, sys.path)  # import nothing from the current directory
for stop in (signal.SIGINT, signal.SIGTERM):
    signal.signal(stop, signal.SIG_IGN)  # the parent's business
signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: the kernel ends this process, whatever it does
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
signal.alarm(60)  # for the imports
from fractions import Fraction
from functools import lru_cache
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from math_verify import verify
from sympy import FiniteSet, I, Union
logging.disable()

@lru_cache(1000)
def read(text):
    text = re.sub(r"[0-9]*\.[0-9]+(?:e-?[0-9]{1,4})?|[0-9]+e-?[0-9]{1,4}",  # decimals are exact
                  lambda number: "(\\frac{%d}{%d})" % Fraction(number[0]).as_integer_ratio(), text)
    found = latex2sympy(text, is_real=True, conversion_config=ConversionConfig(lowercase_symbols=False),
                        normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"))
    found = found.subs({symbol: I for symbol in found.free_symbols if symbol.name == "i"})
    if isinstance(found, FiniteSet) and all(x.is_Relational and not x.is_Equality for x in found.args):
        found = Union(*(x.as_set() for x in found.args))  # x < 2 or x > 3
    return found

read("x^2")  # the first parse builds tables, and no answer's time does for it
resource.setrlimit(resource.RLIMIT_DATA, (2 ** 28, 2 ** 28))
for line in sys.stdin:  # it ends with the parent
    seconds, gold, answer = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        gold, answer = read(gold), read(answer)
        same = isinstance(gold, FiniteSet) == isinstance(answer, FiniteSet)  # \{2,4\} is not (2,4)
        same = same and verify(gold, answer, float_rounding=15, numeric_precision=50,
                               allow_set_relation_comp=True, timeout_seconds=None)
    except MemoryError:
        raise
    except Exception:
        same = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("right" if same else "wrong", flush=True)
'''
_worker, _lock, _counts = None, threading.Lock(), Counter()
os.register_at_fork(after_in_child=lambda: globals().update(_worker=None, _lock=threading.Lock()))


@lru_cache(16_384)
def _ask_worker(gold: str, answer: str) -> str:
    """The worker's verdict; it is started when needed. Cached: rollouts repeat each other's answers."""
    global _worker
    with _lock:
        if _worker is None or _worker.poll() is not None:
            environment = {**os.environ, "PYTHONHASHSEED": "0"}  # the same verdict every time
            _worker = subprocess.Popen([sys.executable, "-c", _WORKER], env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        worker, verdict = _worker, ""
        try:
            print(json.dumps([WORKER_SECONDS, gold, answer]), file=worker.stdin, flush=True)
            verdict = worker.stdout.readline().strip()
        finally:
            if not verdict:  # after Ctrl-C too: a reply left unread would answer the next question
                worker.kill()
                _worker = None
    if not verdict and worker.wait() != -signal.SIGALRM:
        raise ChildProcessError("the grader's worker has died")
    return verdict or "timeouts"


_NAME = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]|\\(?!frac|sqrt|pi|infty|log|ln|sin|cos|tan)[a-z]+")
_SUSPECT = [re.compile(pattern) for pattern in (  # what an honest answer has only where the gold has it too:
    r"\^\{[^}]*\^|\^\{-?[0-9]{3}|[0-9]{4}!|[)}!]!|[0-9]{22}|\\binom.*[0-9]{4}|(?:[(\[{][^)\]}]*){8}",  # size,
    r"\\(?:sum|prod|int|lim|max|min|gcd|det)",  # a task,
    r"(?:^|, )([^,]+), (?:.*, )?\1(?:, |$)")]  # something twice in a list


def _outcome(answer: str, gold: str) -> str:
    """The outcome for a cleaned answer. Most need no Math-Verify."""
    if "=" in answer and "=" not in gold:  # x = 5 is 5; x = 3, x = 5 is 3, 5; 41 = 42 is nothing
        *names, answer = re.sub(r", [a-z](?:_\{?[0-9]\}?)?=", ", ", answer).split("=")
        answer = _clean(answer)
        for name in names:
            is_name = all(_NAME.search(term) for term in re.split("[-+]", name))
            if not is_name and (_number(name) is None or _number(name) != _number(answer)):
                return "wrong"
    (answer, unit), (gold, gold_unit) = _split_unit(answer), _split_unit(gold)
    value, gold_value = _number(answer), _number(gold)
    if not _same_unit(unit, gold_unit):
        same = False
    elif value is not None and gold_value is not None:
        percent = (unit == ["%"]) - (gold_unit == ["%"])  # one sign alone means 1/100, or was left out
        left_out = value == gold_value and (percent < 1 or abs(value) >= 1)
        same = left_out or value == gold_value * Fraction(100) ** percent
    elif answer == gold or _words(answer) or _words(gold):
        same = answer == gold or _words(answer) == _words(gold)
    elif any(pattern.search(answer) and not pattern.search(gold) for pattern in _SUSPECT):
        same = False
    else:
        return _ask_worker(gold, answer)
    return "right" if same else "wrong"


def gold_is_gradable(gold: str) -> bool:
    """Can this gold answer be read? If not, the row is a data error and no answer to it scores."""
    try:
        if gold.strip().casefold() in ("proof", "not found", NO_ANSWER):  # there is none
            return False
        gold = _split_unit(_clean(gold))[0] if len(gold) <= MAX_ANSWER else ""
        return bool(_number(gold) is not None or _words(gold) or _ask_worker(gold, gold) == "right")
    except Exception:
        return False


def grade(response: str, gold: str) -> float:
    r"""1.0 if the answer in the response is the gold answer, else 0.0. Never raises, takes at most 5 s.

    The answer is the last complete \boxed{..} after the last </think>. It is right if it is the same object:
    - numbers are compared exactly: 0.5 is \frac12, 4.5e33 is 4.5 \times 10^{33}, but 0.333 is not \frac13;
    - expressions are the same if Math-Verify finds them equal; letters are case-sensitive; i is imaginary;
    - lists and sets have no order but must be complete; tuples, intervals and matrices have order, brackets
      and shape; x > 2 is (2,\infty), but (2,4) is not \{2,4\};
    - equations may be turned round or scaled; x = 5 is 5, but 41 = 42 is nothing;
    - a unit may be left out on either side, but two must agree; a percent sign may too, or means 1/100;
    - numerals in a base need the same digits and base; words are compared without case and full stops.
    Whatever cannot be read or takes too long is wrong, and so is every answer to a gold that cannot be read.
    """
    try:
        answer = extract_answer(response) if isinstance(response, str) else None
        if not gold_is_gradable(gold):
            outcome = "unparsable_gold"
        elif answer is None:
            outcome = "no_box"
        else:
            outcome = _outcome(_clean(answer), _clean(gold)) if 0 < len(answer) <= MAX_ANSWER else "wrong"
    except Exception:
        outcome = "crashes"
    _counts[outcome] += 1
    return float(outcome == "right")


def grade_batch(responses: list[str], golds: list[str]) -> list[float]:
    return [grade(response, gold) for response, gold in zip(responses, golds, strict=True)]


def grader_counts() -> dict[str, int]:
    """Outcomes since the last call. Many timeouts or crashes mean that rewards are being lost."""
    return {outcome: _counts.pop(outcome, 0)
            for outcome in ("right", "wrong", "no_box", "timeouts", "crashes", "unparsable_gold")}


_PIECES = [re.compile(pattern) for pattern in (  # what may name an answer: a number on its own,
    r"(?<![\w.^{/*\\+-])(-?(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|[0-9]{1,3}(?:(?:,|\\,|\{,\})[0-9]{3})+|"
    r"[0-9]*\.?[0-9]+)(?: ?/ ?[0-9]+)?(?: ?\\?%| percent)?)(?![\w^*/]|[.,][0-9]|-[a-z]| ?\\(?!text)[a-z])",
    r"(?:\$|\\[(\[]|=)([^$=]+?)(?=\$|\\[)\]]|=)",  # a formula or its side, what follows a verb, a quotation,
    r"(?:=|\b(?:is|are|equals?|find|gets?|gives?|yields?|obtain|choose|answer:)(?= )) *([^.;,:\n$]+)",
    r"\"(.+?)\"", r"([a-zA-Z]\w*)\W*$")]  # and the last word
_SAID = re.compile(r"\b(?:answer|result|so|hence|thus|therefore|gets?|gives?|obtains?)\b[^.;\n]{0,30}$", re.I)


def gives_away(text: str, gold: str, problem: str = "") -> bool:
    """Does a strategy hold the gold answer? A digit or a given number only if "it comes out"."""
    text = text.translate(_UNICODE).replace(r"\boxed{", r"\boxed{ ")
    common = _clean(gold) in ("0", "1", "-1")  # they stand in every identity
    items = [] if re.search(r"[(\[]", gold) else _clean(gold).split(", ")
    if len(items) > 1 and all(gives_away(text, item, problem) for item in items):
        return True
    for found in (found for pattern in _PIECES for found in pattern.finditer(text)):
        piece, before, after = found[1].strip(), text[:found.start(1)], text[found.end(1):]
        if re.search(r"\b(?:steps?|parts?|cases?|and|mod|modulo|base) $", before) or (
                re.search(r"(?:^|[.:;)\n]) *\**\(?$", before) and re.match(r"[.):]+[ *]*[A-Z]", after)):
            continue  # the number of a step
        weak = common or re.fullmatch(r"-?[0-9]|[a-zA-Z]", piece) or piece in problem
        said = re.match(r"[\s$)}*]*(?:[.,;!]|and|or|$)", after) and (
            _SAID.search(before) or (not common and re.search(r"(?:=|\bis) ?\$?$", before)))
        if (said or not weak) and grade(f"\\boxed{{{piece}}}", gold):
            return True
    return False
