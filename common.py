"""What the three training scripts and eval_math.py share: model and data utilities, and the math grader.

No equation stands here. Advantages, losses, log-probs and the training loop are in the scripts.

Each section can be read alone:
    refusals and processes | flags | problems | prompts and tokenizers | models | generation |
    hidden states and micro-batches | SFT warm-up | rewards | run directory | the math grader

Letters: N samples, C completion length, M completion tokens of a micro-batch, d hidden size, V vocabulary.
"""
import copy
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter, OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, NoReturn, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
    set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser,
    LogitsProcessor, StoppingCriteria, set_seed)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of a single process


# ---------------------------------------------------------------- refusals and processes

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKEND = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"


def refuse(message: str, from_any_process: bool = False) -> NoReturn:
    """Print one line on stderr and exit with code 2. Every input that is not accepted ends here.

    The processes of a torchrun usually refuse together, so only the first one prints the line.
    """
    if rank() == 0 or from_any_process:
        one_line = " ".join(str(message).split())
        print(f"error: {printable(one_line)}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text: str) -> str:
    """Escape control, bidi and invisible characters, so that model text cannot control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def program(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's main(): join torchrun's processes; end out-of-memory and Ctrl-C with one line."""
    @functools.wraps(main)
    def wrapped() -> None:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        join_processes()
        try:
            main()
        except (torch.OutOfMemoryError, MemoryError):
            # We never retry: an error in the middle of a backward pass leaves FSDP2 broken.
            refuse("out of memory: lower --microbatch_tokens (training) or --generation_batch_size "
                   "(sampling), or add --activation_checkpointing or --cpu_offload, and --resume the run",
                   from_any_process=True)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130)
    return wrapped


def join_processes() -> None:
    """Join the other processes if torchrun started this one."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A day's timeout: ranks may wait long for each other's rollouts. If one dies, torchrun stops the others.
    dist.init_process_group(BACKEND, timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def my_share(items):
    """Return this process's share of a list or tensor of problems: every world_size-th item."""
    return items[rank()::world_size()]


def from_all_processes(value: Any) -> list:
    """Return the values of all processes, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_process(compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns in the first process, in every process.

    Verdicts with a time limit may differ between processes, so one process decides for all.
    """
    value = [compute() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(value, src=0)
    return value[0]


def gather(share: Tensor) -> Tensor:
    """Return the rows [B, ...] of all processes, on the CPU, from this process's [b, ...].

    This undoes `my_share`. Every process must hold the same number of rows.
    """
    shares = from_all_processes(share.cpu())
    return torch.stack(shares, dim=1).flatten(0, 1)


def sum_over_processes(*numbers: float) -> list[float]:
    """Return each number summed over all processes."""
    values = from_all_processes([float(x) for x in numbers])
    return [sum(column) for column in zip(*values)]


def random_generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """Return random numbers for one purpose: a function of (seed, purpose) alone."""
    words = [zlib.crc32(str(word).encode()) for word in purpose]
    return np.random.default_rng([seed, *words])


def seed_everything(seed: int, *purpose: int | str) -> None:
    """Seed torch, numpy and random from (seed, purpose, rank).

    Training calls this at every step, so no generator state has to be saved for an exact resume.
    """
    set_seed(int(random_generator(seed, *purpose, rank()).integers(2 ** 32)))


# ---------------------------------------------------------------- flags

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
DEFAULT_DATASET = "Elliott/Openr1-Math-46k-8192"

# The built-in demo: models and problems are files, made by tests/demo/build.py. A tiny model needs larger
# steps and shorter everything, so these values replace the defaults of flags that the user did not give.
DEMO_FOLDER = Path(__file__).resolve().parent / "tests" / "demo"
DEMO_MODELS = {"--model demo": "student", "--teacher demo": "teacher",
               "--teacher demo-same-style": "teacher_same_style"}
DEMO_FLAGS = {
    "system_prompt": "",
    "steps": 50,
    "prompts_per_step": 16,
    "max_new_tokens": 24,
    "lr": 1.4e-4,
    "delta": 5.0,
    "teacher": "demo",
    "warmup_frac": 0.0,
    "eval_every": 0,
    "eval_samples": 2,
    "microbatch_tokens": 8192,
}
# The teacher's words make large gradients at first. Clipped early, they leave Adam's second moment small.
DEMO_TGPO_FLAGS = {"steps": 60, "lr": 3e-4, "max_grad_norm": 0.05}
DEMO_LABEL_FLAGS = {"coefficient": 0.5, "coefficient_fall": 0.0075}
DEMO_LABEL_METHODS = ("tgpo", "tgpo-sampled", "tgpo-topk")


def demo_flags(args_class: type, method: str) -> dict[str, Any]:
    """Return the demo's values for the flags that `args_class` has."""
    names = {field.name for field in dataclasses.fields(args_class)}
    values = dict(DEMO_FLAGS)
    if "guidance" in names:
        values |= DEMO_TGPO_FLAGS
    if method in DEMO_LABEL_METHODS:
        values |= DEMO_LABEL_FLAGS
    return {name: value for name, value in values.items() if name in names}


def flag(default: Any, help: str, interval: str | None = None) -> Any:
    """Declare a field of Args: its default, its line in --help and, for a number, its interval: "(0, 1]"."""
    metadata = {"help": help.replace("%", "%%")}
    if interval:
        metadata["metavar"] = interval
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class RunFlags:
    """The flags that belong to no algorithm: model, data, run directory, warm-up, evaluation, memory."""
    model: str = flag("demo", "hub id or local directory of the model to train; demo: a tiny built-in model")
    dataset: str = flag(None, "problems to train on: a .jsonl or .parquet file, or a hub id, also "
                              f"ID:CONFIG:SPLIT (default: the demo's own, else {DEFAULT_DATASET})")
    eval_dataset: str = flag(None, "held-out problems, in the same layouts (the demo has its own)")
    max_rows: int = flag(8500, "problems drawn at random from a larger data set; 0: use all", "[0, inf)")
    max_prompt_tokens: int = flag(1024, "drop problems whose prompt is longer than this", "[1, inf)")
    system_prompt: str = flag(SYSTEM_PROMPT, "system message of every prompt; empty for none")
    reward: str = flag(None, "FILE.py:function that scores (response, row) (default: the math grader)")
    out: str = flag(None, "run directory (default: a new one under runs/)")
    resume: bool = flag(False, "resume the run in --out from its latest checkpoint")
    dry_run: bool = flag(False, "print the plan and stop")
    seed: int = flag(0, "seed of all random numbers", "[0, inf)")
    # SFT warm-up
    warmup_frac: float = flag(0.33, "random share of the solved problems that is used for SFT before RL, "
                                    "and not for RL", "[0, 1]")
    warmup_lr: float = flag(1e-5, "highest learning rate of the SFT warm-up", "[0, inf)")
    warmup_batch_size: int = flag(64, "solutions per step of the SFT warm-up", "[1, inf)")
    warmup_epochs: int = flag(10, "epochs of the SFT warm-up; the best one is kept", "[1, inf)")
    warmup_from: str = flag(None, "reuse this warm-up: the warmup/ folder of a run with the same --seed")
    # memory
    lora_rank: int = flag(0, "train LoRA adapters of this rank on all linear layers; 0: train all weights",
                          "[0, inf)")
    microbatch_tokens: int = flag(None, "padded tokens in one forward and backward pass; lower it if memory "
                                        "runs out, the gradient does not change (default: 16384, or 32768 "
                                        "with --cpu_offload on a card of 64 GB or more)", "[1, inf)")
    generation_batch_size: int = flag(192, "most completions that are sampled at the same time", "[1, inf)")
    activation_checkpointing: bool = flag(None, "recompute activations in the backward pass "
                                                "(default: if the card is small)")
    cpu_offload: bool = flag(None, "keep weights and optimizer in CPU memory "
                                   "(default: if the card is too small)")
    bf16: bool = flag(None, "compute in bf16 on fp32 weights (default: on a GPU)")
    # evaluation and saving
    eval_every: int = flag(50, "steps between evaluations; 0: only before and after training", "[0, inf)")
    eval_samples: int = flag(4, "samples per held-out problem", "[1, inf)")
    eval_temperature: float = flag(0.6, "sampling temperature of the evaluation; 0: greedy", "[0, inf)")
    save_every: int = flag(50, "steps between checkpoints; 0: only the last", "[0, inf)")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "send metrics to this dashboard")

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = ON_GPU


class FlagParser(HfArgumentParser):
    """transformers' parser of dataclasses; its errors become one line."""

    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help lists the flags)")


def parse_args(args_class: type) -> Any:
    """Return the command line as an `args_class`.

    A JSON file of flags, for example a run's config.json, may come first. Flags after the file override
    it. The demo's model and problems change some defaults.
    """
    argv = sys.argv[1:]
    if argv and argv[0].endswith(".json"):
        argv = flags_of_file(argv[0]) + argv[1:]
    description = sys.modules[args_class.__module__].__doc__.split("\n\n")[0]
    parser = FlagParser(args_class, description=description, allow_abbrev=False)
    without_help = [word for word in argv if word not in ("-h", "--help")]  # --help shows the demo's defaults
    given, unknown = parser.parse_known_args(without_help)
    if "demo" in (given.model, getattr(given, "benchmarks", None)):
        parser.set_defaults(**demo_flags(args_class, getattr(given, "guidance", "none")))
    args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flags: {' '.join(unknown)}")
    for field in dataclasses.fields(args):
        check_interval(field.name, getattr(args, field.name), field.metadata.get("metavar"))
    return args


def flags_of_file(path: str) -> list[str]:
    """Return the flags of a JSON file as words of a command line, so that the parser checks both alike."""
    try:
        flags = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(flags.get("flags"), dict):  # a run's config.json
            flags = flags["flags"]
            flags.pop("out", None)
            flags.pop("resume", None)
        return [f"--{name}={value}" for name, value in flags.items() if value is not None]
    except (OSError, ValueError, AttributeError) as error:
        refuse(f"{path}: cannot read flags from it; it must be a JSON object of names and values ({error})")


def check_interval(name: str, value: Any, interval: str | None) -> None:
    """Refuse a number outside its interval, which is written as in "(0, 1]"."""
    if interval is None or value is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        refuse(f"--{name} is {value}; it must be in {interval}")


# ---------------------------------------------------------------- problems

BENCHMARKS = {  # name: hub id, config, split
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "amc23": ("math-ai/amc23", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
}
# Instructions that a data set puts round the problem. Ours is the system prompt.
DAPO_WRAPPER = re.compile(r"^Solve the following math problem step by step\. The last line.*?\n\n(.*?)\n\n"
                          r"Remember to put your answer.*$", re.DOTALL)
VERL_WRAPPER = re.compile(r"^(.*?)\s*Let's think step by step and output the final answer "
                          r"(?:after \"####\"|within \\boxed\{\})\.\s*$", re.DOTALL)


def read_jsonl(path: str | Path, skip_unfinished: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield ("FILE, line N", object) for every line of a JSONL file.

    `skip_unfinished`: leave out a last line that a kill cut off in the middle.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            location = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if skip_unfinished and not line.endswith(b"\n"):
                    return
                refuse(f"{location}: not JSON, or not UTF-8 ({first_line(error)})")
            yield location, value


def write_atomic(path: Path, text: str) -> None:
    """Write a file atomically: a crash leaves the old version intact."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def append_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """Append rows to a JSONL file. A number that is not finite becomes null, because JSON has no NaN."""
    finite_rows = json.loads(json.dumps(rows), parse_constant=lambda name: None)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in finite_rows)


def load_problems(source: str) -> list[dict]:
    """Return the problems of a file, a benchmark or a hub data set, with equal problems merged into one.

    Each problem is {"problem", "answer", "solution"?, "strategy"?, "id", and the row's other columns}. An
    unusable row of a file ends the program with its line. Users cannot edit a hub data set, so its
    unusable rows are dropped and counted.
    """
    is_file = source.endswith((".jsonl", ".json", ".parquet")) or os.path.isfile(source)
    if os.path.isdir(source) and source not in BENCHMARKS:
        refuse(f"{source}: this is a folder; name a file in it")
    raw_rows = read_file(source) if is_file else read_hub(source)
    problems = {}
    num_rows = 0
    unusable = []
    for location, raw in raw_rows:
        num_rows += 1
        try:
            problem = to_problem(raw)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"layout not recognised: {error!r}"
            if is_file:
                refuse(f"{location}: {reason}")
            unusable.append(f"{location}: {reason}")
            continue
        problem.setdefault("id", str(num_rows - 1))
        problems.setdefault(problem["problem"].strip(), problem)
    if unusable:
        first = printable(unusable[0])
        print(f"dropped {len(unusable)} of {num_rows} rows that cannot be used; first: {first}")
    if not problems:
        refuse(f"{source}: no row in it can be used")
    num_usable = num_rows - len(unusable)
    if len(problems) < num_usable:
        print(f"{source}: {num_usable} rows are {len(problems)} different problems; each is used once")
    return list(problems.values())


def read_file(path: str) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for every row of a .jsonl, .json or .parquet file."""
    if not os.path.isfile(path):
        refuse(f"{path}: no such file; name a .jsonl or .parquet file or a data set of the Hugging Face Hub")
    if path.endswith(".parquet"):
        import pyarrow.parquet  # imported here: a JSONL file must do without
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            refuse(f"{path}: not a readable parquet file ({first_line(error)})")
    elif path.endswith(".json") and Path(path).read_text("utf-8-sig", "replace").lstrip()[:1] == "[":
        try:
            rows = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            refuse(f"{path}: not a JSON array ({first_line(error)})")
    else:
        yield from read_jsonl(path)
        return
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def read_hub(source: str) -> Iterator[tuple[str, Any]]:
    """Yield (location, row) for every row of a benchmark or a hub data set, ID[:CONFIG[:SPLIT]]."""
    known = {entry[0]: entry for entry in BENCHMARKS.values()} | BENCHMARKS
    hub_id, config, split = known.get(source, (source, None, "train"))
    if ":" in source:
        hub_id, config, split = (source.split(":") + ["train"])[:3]
    try:
        import datasets  # imported here: a JSONL file must do without
        table = datasets.load_dataset(hub_id, config or None, split=split or "train")
    except Exception as error:  # the library raises errors of many kinds
        # The library's whole message: for a set with several configs it lists their names.
        refuse(f"{source}: not a local file, and it could not be loaded from the Hugging Face Hub; write "
               f"config and split as ID:CONFIG:SPLIT ({type(error).__name__}: {error})")
    for number, row in enumerate(table, 1):
        yield f"{source}, row {number}", row


def to_problem(raw: Any) -> dict:
    """Return a row of any known layout as {"problem", "answer", "solution"?, "strategy"?, "id"?, ...}.

    Layouts: ours, LUFFY, DAPO, veRL, OpenR1/NuminaMath, MATH, GSM8K, OlympiadBench, DeepMath. The row's other
    columns are kept for a reward function of the user. Raise ValueError if the row cannot be used.
    """
    if not isinstance(raw, dict):
        raise ValueError("a row must be a JSON object")
    problem = raw.get("problem") or raw.get("question")
    answer = raw.get("answer")
    solution = raw.get("solution")
    if isinstance(raw.get("prompt"), list):  # LUFFY, DAPO, veRL: chat messages, gold in reward_model
        user_messages = [m["content"] for m in raw["prompt"] if m["role"] == "user"]
        problem = VERL_WRAPPER.sub(r"\1", DAPO_WRAPPER.sub(r"\1", user_messages[-1]))
        answer = (raw.get("reward_model") or {}).get("ground_truth")
        target = raw.get("target")  # LUFFY: the strong model's response; a task of the user: what they like
        if isinstance(target, list) and target:
            solution = target[0]["content"]
    elif "final_answer" in raw:  # OlympiadBench: lists of one; DeepMath: strings
        context = raw.get("context")
        problem = problem if is_missing(context) else f"{context}\n{problem}"
        answer = only_element(raw["final_answer"])
        solution = only_element(solution)
    elif isinstance(answer, str) and "\n#### " in answer:  # GSM8K: the answer field holds the solution
        solution, answer = answer.rsplit("\n#### ", 1)
    answer = only_element(answer)
    if is_missing(answer) and isinstance(solution, str):  # MATH: the gold is the solution's box
        answer = extract_gold(solution)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and not is_missing(answer):
        answer = str(answer)
    fields = {"problem": problem, "answer": answer, "solution": solution, "strategy": raw.get("strategy")}
    known = {name: value for name, value in fields.items() if not is_missing(value)}
    for name, value in known.items():
        check_text(name, value)
    for name in ("problem", "answer"):
        if not known.get(name, "").strip():
            raise ValueError(f'row has no "{name}": give it as a non-empty string')
    others = {name: value for name, value in raw.items() if name not in fields}
    row = {**others, **known}
    if is_missing(row.get("id")):
        row.pop("id", None)
    else:
        row["id"] = str(row["id"])
    return row


def is_missing(value: Any) -> bool:
    """Return True if a value stands for nothing: None, an empty text or pandas' NaN."""
    return value is None or value == "" or value != value


def only_element(value: Any) -> Any:
    """Return the element of a list of one, None of an empty list; other values as they are."""
    if isinstance(value, list) and len(value) == 1:
        return value[0]
    return None if value == [] else value


def check_text(name: str, value: Any) -> None:
    """Raise ValueError unless a field is a text that can be encoded."""
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string')
    value.encode()  # half a character (a lone surrogate) raises UnicodeEncodeError, a ValueError


@dataclass
class Data:
    train: list[dict]      # problems for RL
    warmup: list[dict]     # problems for the SFT warm-up, all with a solution that is taught
    held_out: list[dict]   # problems of --eval_dataset, or of the demo; may be empty
    summary: str           # one line for the plan
    fingerprint: str       # hash of all problems: a data file that has changed is noticed at --resume


def fingerprint_of(problems: list[dict]) -> str:
    """Return a hash of the problems' texts."""
    fields = ("problem", "answer", "solution", "strategy")
    texts = [[problem.get(field) for field in fields] for problem in problems]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def load_data(args: RunFlags, tokenizer, reward: "Reward") -> Data:
    """Load --dataset and --eval_dataset, drop and count unusable problems, and split off the SFT warm-up.

    From a larger data set --max_rows problems are drawn with the seed, as SGPO's paper draws 8.5K of 46K.
    """
    train, held_out = load_sources(args)
    held_out_texts = {p["problem"].strip() for p in held_out}
    train = keep(train, lambda p: p["problem"].strip() not in held_out_texts, "also in --eval_dataset")
    if 0 < args.max_rows < len(train):
        print(f"drew {args.max_rows} of {len(train)} problems with --seed {args.seed} (--max_rows)")
        drawn = random_generator(args.seed, "rows").choice(len(train), args.max_rows, replace=False)
        train = [train[i] for i in sorted(drawn)]

    def prompt_length(problem: dict) -> int:
        return len(build_prompt(tokenizer, problem["problem"], args.system_prompt))

    def is_short(problem: dict) -> bool:
        return prompt_length(problem) <= args.max_prompt_tokens

    too_long = f"prompts are longer than --max_prompt_tokens {args.max_prompt_tokens}"
    train = keep(train, is_short, too_long)
    held_out = keep(held_out, is_short, too_long)
    if args.reward is None:
        train = keep(train, lambda p: gold_is_gradable(p["answer"]), "answers cannot be read by the grader")
    if not train:
        refuse(f"{args.dataset or DEFAULT_DATASET}: none of its problems can be used")
    longest = max(prompt_length(p) for p in train + held_out)
    check_context(args.model, "--model", longest, args.max_new_tokens)
    return split_warmup(train, held_out, tokenizer, reward, args)


def load_sources(args: RunFlags) -> tuple[list[dict], list[dict]]:
    """Return the problems of --dataset and of --eval_dataset."""
    train_source = args.dataset or DEFAULT_DATASET
    eval_source = args.eval_dataset
    if args.model == "demo" and args.dataset is None:
        train_source = str(DEMO_FOLDER / "train.jsonl")
        eval_source = eval_source or str(DEMO_FOLDER / "held_out.jsonl")
    train = load_problems(train_source)
    held_out = load_problems(eval_source) if eval_source else []
    return train, held_out


def keep(problems: list[dict], is_good: Callable[[dict], bool], why_not: str) -> list[dict]:
    """Return the problems that are good, and print how many are not. The first process decides for all."""
    def judge() -> list[bool]:
        bar = tqdm(problems, "checking problems", delay=2, leave=False, disable=None)
        return [is_good(problem) for problem in bar]

    verdicts = from_first_process(judge)
    bad = [problem for problem, good in zip(problems, verdicts) if not good]
    if bad:
        first = printable(bad[0]["id"])
        print(f"dropped {len(bad)} of {len(problems)} problems: {why_not}; first: id {first}")
    return [problem for problem, good in zip(problems, verdicts) if good]


def split_warmup(problems: list[dict], held_out: list[dict], tokenizer, reward: "Reward",
                 args: RunFlags) -> Data:
    """Split the problems into those of the SFT warm-up and those of RL.

    A random --warmup_frac of ALL problems with a solution belongs to the warm-up, whatever their length. To
    take the short ones first would leave RL with the problems whose solutions exceed --max_new_tokens. Of
    this share, teach only solutions that fit --max_new_tokens and score as correct; longer ones would teach
    the model to run past the limit.
    """
    solved = [i for i, problem in enumerate(problems) if "solution" in problem]
    share_size = round(args.warmup_frac * len(solved))
    order = random_generator(args.seed, "warm-up problems").permutation(len(solved))
    share = {solved[i] for i in order[:share_size]}

    def is_taught(problem: dict) -> bool:
        prompt = build_prompt(tokenizer, problem["problem"], args.system_prompt)
        if len(solution_ids(tokenizer, problem["solution"], prompt)) > args.max_new_tokens:
            return False
        return reward([problem["solution"]], [problem])[0] >= 0.5

    warmup = [problems[i] for i in sorted(share)]
    warmup = keep(warmup, is_taught, "the warm-up does not teach solutions that exceed --max_new_tokens "
                                     "or that the reward scores as wrong")
    if len(warmup) == 1:  # it needs a problem to train on and one to validate on
        warmup = []
    train = [problem for i, problem in enumerate(problems) if i not in share]
    summary = f"{len(train)} problems for RL"
    if share:
        summary += f"; a random {len(share)} for the SFT warm-up, {len(warmup)} of them are taught"
    summary += f"; an answer ends with {tokenizer.convert_ids_to_tokens(end_token_id(tokenizer))}"
    if args.steps and not train:
        refuse(f"--warmup_frac {args.warmup_frac} leaves no problem for RL: lower it, or give --steps 0")
    return Data(train, warmup, held_out, summary, fingerprint_of(train + warmup + held_out))


def problems_of_step(problems: list[dict], step: int, count: int, seed: int) -> list[dict]:
    """Return the problems of a step (1-based): seeded permutations laid end to end, cut into batches.

    The result depends on (seed, step) alone, so a checkpoint needs no data-loader state.
    """
    chosen = []
    for position in range((step - 1) * count, step * count):
        epoch, index = divmod(position, len(problems))
        chosen.append(problems[epoch_order(len(problems), epoch, seed)[index]])
    return chosen


@lru_cache(2)
def epoch_order(num_problems: int, epoch: int, seed: int) -> list[int]:
    return random_generator(seed, "epoch", epoch).permutation(num_problems).tolist()


# ---------------------------------------------------------------- prompts and tokenizers

def build_prompt(tokenizer, problem: str, system_prompt: str = SYSTEM_PROMPT,
                 strategy: str | None = None) -> list[int]:
    """Return the token ids of a prompt, up to where the model's answer begins.

    A strategy is put before the problem. The text goes through the tokenizer's chat template. A tokenizer
    without a template (of a base model) gets plain text: system prompt, problem and "Solution:".
    """
    user = problem if strategy is None else f"Strategy:\n{strategy}\n\nProblem:\n{problem}"
    if tokenizer.chat_template:
        text = render_chat(tokenizer, user, system_prompt)
        return tokenizer(text, add_special_tokens=False).input_ids
    parts = [system_prompt, user, "Solution:"]
    ids = tokenizer("\n\n".join(part for part in parts if part)).input_ids
    while ids[-1] in tokenizer.all_special_ids:  # some tokenizers append an end token to every text
        ids.pop()
    return ids


def render_chat(tokenizer, user: str, system_prompt: str) -> str:
    """Return the prompt's text by the chat template.

    Templates without a system role either raise (Gemma) or leave the system prompt out silently (Phi-3
    of April 2024). Both get one user message that holds the system prompt, too.
    """
    messages = [{"role": "user", "content": user}]
    if system_prompt:
        try:
            text = apply_template(tokenizer, [{"role": "system", "content": system_prompt}, *messages])
            if system_prompt.strip() in text and user.strip() in text:
                return text
        except Exception:  # jinja's errors, and whatever a template raises
            pass
        messages = [{"role": "user", "content": f"{system_prompt}\n\n{user}"}]
    try:
        text = apply_template(tokenizer, messages)
    except Exception as error:
        refuse(f"the tokenizer's chat template cannot write a prompt ({first_line(error)}); set another one")
    if user.strip() not in text:
        refuse("the tokenizer's chat template leaves the problem out of the prompt; set another one")
    return text


def apply_template(tokenizer, messages: list[dict], add_generation_prompt: bool = True) -> str:
    # Llama 3's template writes today's date: a prompt must not change at midnight.
    fixed_date = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
    template = fixed_date + tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                         add_generation_prompt=add_generation_prompt)


def end_token_id(tokenizer) -> int:
    """Return the token that ends an assistant turn: the chat template's own, else the tokenizer's EOS.

    They differ in base models that carry a chat template: Qwen2.5's template closes a turn with <|im_end|>,
    its tokenizer's EOS is <|endoftext|>. We render a conversation and look at what follows the answer.
    """
    answer = "1 + 1 = 2"
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": answer}]
    try:
        text = apply_template(tokenizer, messages, add_generation_prompt=False)
    except Exception:  # the template wants another form of conversation
        return tokenizer.eos_token_id
    before, _, after = text.rpartition(answer)
    ids = tokenizer(after.lstrip(), add_special_tokens=False).input_ids[:1]
    special_ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    opens_a_turn = before.rstrip().endswith(tokenizer.decode(ids))  # the template always adds a next turn
    if not ids or ids[0] not in special_ids or opens_a_turn:
        return tokenizer.eos_token_id
    return ids[0]


def stop_ids(model, tokenizer) -> list[int]:
    """Return every token id that ends a completion. Qwen2.5-Instruct has two, and one of them is its pad."""
    ids = {tokenizer.eos_token_id, end_token_id(tokenizer)}
    for config in (model.generation_config, model.config):
        more = getattr(config, "eos_token_id", None)
        ids.update(more if isinstance(more, (list, tuple)) else [more])
    return sorted(ids - {None})


def solution_ids(tokenizer, solution: str, prompt: list[int]) -> list[int]:
    """Return the token ids of a solution as a completion of its prompt, with the end token.

    If the prompt's template has opened the thinking, the solution's own opening tag is left out.
    """
    prompt_end = tokenizer.decode(prompt[-32:]).rstrip()
    if prompt_end.endswith("<think>"):
        solution = solution.lstrip().removeprefix("<think>").lstrip("\n")
    return tokenizer(solution, add_special_tokens=False).input_ids + [end_token_id(tokenizer)]


def model_path(name: str, flag_name: str) -> str:
    """Return the directory or hub id to load from; "demo" names a model of the built-in demo."""
    if f"{flag_name} {name}" in DEMO_MODELS:
        return str(DEMO_FOLDER / DEMO_MODELS[f"{flag_name} {name}"])
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not os.path.isdir(name):
        refuse(f"{flag_name} {name}: no such directory")
    return name


def load_tokenizer(name: str, flag_name: str = "--model"):
    """Load the tokenizer of a hub id or a local directory."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name, flag_name))
    except Exception as error:  # the library raises errors of many kinds
        refuse(f"{flag_name} {name}: no tokenizer can be loaded from it ({first_line(error)})")
    if not tokenizer("1 + 1 = 2").input_ids:  # a directory without a tokenizer can give an empty one
        refuse(f"{flag_name} {name}: its tokenizer has no vocabulary; save one beside the weights")
    if tokenizer.eos_token_id is None:
        refuse(f"{flag_name} {name}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    return tokenizer


# ---------------------------------------------------------------- models

def load_config(name: str, flag_name: str = "--model"):
    """Load a model's configuration with dropout switched off."""
    try:
        config = AutoConfig.from_pretrained(model_path(name, flag_name))
    except Exception as error:
        refuse(f"{flag_name} {name}: no model can be loaded from it ({first_line(error)})")
    text_config = config.get_text_config()
    for key, value in list(vars(text_config).items()):
        if "drop" in key and isinstance(value, float):
            setattr(text_config, key, 0.0)
    config._attn_implementation = None  # the library's choice: sdpa, or eager if the model has no sdpa
    return config


@lru_cache(4)
def context_length(name: str, flag_name: str = "--model") -> int:
    """Return how many positions a model has.

    Longrope's rotary factors change for a whole batch as soon as one sequence passes the original length, so
    a sample's log-probs would depend on its batch. We stay below.
    """
    config = load_config(name, flag_name).get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        original = rope.get("original_max_position_embeddings")
        return original or config.original_max_position_embeddings
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_context(name: str, flag_name: str, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse completions that could run past the model's positions."""
    context = context_length(name, flag_name)
    if longest_prompt + max_new_tokens > context:
        refuse(f"--max_new_tokens {max_new_tokens} plus the longest prompt ({longest_prompt} tokens) exceeds "
               f"the context of {flag_name} {name}, {context}; use at most "
               f"{max(context - longest_prompt, 0)}")


def load_model(name: str, flag_name: str = "--model", dtype: torch.dtype | None = None, device: Any = None):
    """Load a causal language model for scoring or sampling, in bf16 on a GPU, without gradients."""
    device = torch.device(device or DEVICE)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = load_config(name, flag_name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path(name, flag_name), config=config, dtype=dtype)
    except Exception as error:
        refuse(f"{flag_name} {name}: no causal language model can be loaded from it ({first_line(error)})",
               from_any_process=True)
    model.requires_grad_(False)
    model.to(device)
    check_model(model, f"{flag_name} {name}", samples=flag_name != "--teacher")
    return model


@torch.no_grad()
def check_model(model, name: str, samples: bool = True) -> None:
    """Refuse models that would sample from another policy than the one we score and train.

    We score through the hidden states, in train mode, and sample through the logits, in eval mode, with
    prompts padded on the left. Soft-capping, dropout inside a module, or a layer that reads the padding would
    make the two differ.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=model.device)[None] % vocabulary
    try:
        model.train()
        train_logits = model(input_ids=ids).logits.float()
        model.eval()
        logits = model(input_ids=ids).logits.float()
        hidden = model.base_model(input_ids=ids).last_hidden_state
        our_logits = model.get_output_embeddings()(hidden).float()
        padding_error = error_of_padding(model, ids) if samples else 0.0
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        refuse(f"{name}: not supported, {type(model).__name__} gives no hidden states and head as usual "
               f"({first_line(error)})")
    if not logits.isfinite().all():
        refuse(f"{name}: its weights are not finite", from_any_process=True)
    tolerance = 1e-3 if model.dtype == torch.float32 else 3e-2  # bf16 sums need not be the same twice
    if our_logits.shape != logits.shape or not torch.allclose(our_logits, logits, tolerance, tolerance):
        refuse(f"{name}: not supported, {type(model).__name__} changes its logits after lm_head")
    if not torch.allclose(train_logits, logits, tolerance, tolerance):
        refuse(f"{name}: not supported, {type(model).__name__} computes something else in train mode")
    most_padding_error = 0.1 if model.dtype == torch.float32 else 0.5
    if padding_error > most_padding_error:
        refuse(f"{name}: not supported, {type(model).__name__} reads the padding on the left of a prompt")


def error_of_padding(model, ids: Tensor) -> float:
    """Return how far padding on the left of a prompt moves a logit, in standard deviations of the logits.

    `generate` writes three tokens after the padded prompt; a plain pass reads them without the padding.
    """
    mask = F.pad(torch.ones_like(ids), (2, 0))
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0,
                              output_logits=True, return_dict_in_generate=True)
    saved_config = model.generation_config
    model.generation_config = GenerationConfig()  # as in generate_in_pieces
    try:
        sampled = model.generate(F.pad(ids, (2, 0)), attention_mask=mask, generation_config=config,
                                 synced_gpus=False)
    finally:
        model.generation_config = saved_config
    sampler_logits = torch.stack(sampled.logits, 1)  # [1, tokens written, V]
    written = sampler_logits.shape[1]
    logits = model(input_ids=sampled.sequences[:, 2:-1]).logits[:, -written:]
    error = (sampler_logits - logits).abs().max() / logits.std()
    return error.item()


def load_by_first_process(name: str, flag_name: str = "--model", dtype: torch.dtype | None = None):
    """Load a model in the first process only, so that host memory holds the model once.

    The other processes get a copy without weights, which `shard` fills. If the first process refuses the
    model, all processes end.
    """
    model = None
    copy_for_others = None
    try:
        if rank() == 0:
            model = load_model(name, flag_name, dtype, "cpu")
            copy_for_others = without_weights(model)
    finally:  # the others wait for this broadcast even if the model is refused
        received = from_first_process(lambda: copy_for_others)
    if received is None:
        raise SystemExit(2)
    return received if model is None else model


def without_weights(model):
    """Return a copy of the model with its buffers, in which every parameter repeats a single 0."""
    memo = {}
    for p in model.parameters():
        zero = torch.zeros((), dtype=p.dtype)
        memo[id(p)] = torch.nn.Parameter(zero.expand(p.shape), p.requires_grad)
    return copy.deepcopy(model, memo)


def load_policy(args: RunFlags):
    """Load the model to train, with fp32 weights: at lr 1e-6 a bf16 weight would round updates away (T9).

    Several processes share one model with FSDP2, which also serves a single process with --cpu_offload.
    """
    if args.lora_rank:
        return load_lora_policy(args)
    is_sharded = dist.is_initialized() or bool(args.cpu_offload)
    load = load_by_first_process if is_sharded else load_model
    model = load(args.model, dtype=torch.float32)
    model.requires_grad_()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    model.samples_from_bf16_copy = args.bf16 and not is_sharded
    if is_sharded:
        shard(model, args.bf16, args.cpu_offload)
        model.reduces_gradient_once = all(from_all_processes(gradient_fits(args)))
    return model


LORA_ALPHA = 32  # "LoRA Without Regret" (Thinking Machines, 2025); adapters want 10 times the learning rate


def load_lora_policy(args: RunFlags):
    """Load the model to train with LoRA: frozen weights, in bf16 on a GPU, and fp32 adapters (package peft).

    Samples are drawn through the adapters. Checkpoints hold the adapters only; model/ is saved merged.
    """
    if importlib.util.find_spec("peft") is None:
        refuse(f"--lora_rank {args.lora_rank} needs a package: pip install peft")
    if dist.is_initialized() or args.cpu_offload:
        refuse("--lora_rank runs in one process and without --cpu_offload: its frozen weights take 2 bytes a "
               "parameter")
    import peft
    model = load_model(args.model)
    config = peft.LoraConfig(r=args.lora_rank, lora_alpha=LORA_ALPHA, target_modules="all-linear")
    torch.manual_seed(args.seed)  # the adapters' start is random
    model = peft.inject_adapter_in_model(config, model)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def adapters(model) -> dict[str, Tensor]:
    """Return the weights of the LoRA adapters; empty for a model without."""
    return {name: weight for name, weight in model.state_dict().items() if ".lora_" in name}


def merged_weights(model) -> dict[str, Tensor]:
    """Return the model's weights under their plain names, with LoRA adapters added to them."""
    weights = {}
    for name, weight in model.state_dict().items():
        if ".lora_" not in name:
            weights[name.replace(".base_layer", "")] = weight
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight
            delta = module.get_delta_weight("default")
            weights[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return weights


def shard(model, bf16: bool, cpu_offload: bool) -> None:
    """Spread a model that the first process has loaded over all processes (FSDP2).

    Gradients are summed over ranks, not averaged, because the loss is already divided by the global number
    of samples.
    """
    if not dist.is_initialized():  # FSDP2 needs a group even for a single process
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    options = {"mesh": init_device_mesh(DEVICE.type, (world_size(),))}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    decoder_layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    for layer in decoder_layers:
        broadcast_weights(layer)
        fully_shard(layer, **options)
    broadcast_weights(model)
    # Embedding and head stay gathered between the forward and the backward pass: both ends use them.
    fully_shard(model, reshard_after_forward=False, **options)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.run_as_forward = lambda function: function()
    register_fsdp_forward_method(model, "run_as_forward")


def broadcast_weights(module: torch.nn.Module) -> None:
    """Copy the weights that are not sharded yet from the first process to the others."""
    for p in module.parameters():
        if isinstance(p, DTensor):
            continue
        if rank() == 0:
            p.data = p.data.to(DEVICE)
        else:
            p.data = torch.empty(p.shape, dtype=p.dtype, device=DEVICE)
        dist.broadcast(p.data, src=0)


def sharded_modules(model) -> list[FSDPModule]:
    """Return the modules that FSDP2 gathers one by one; none in a plain model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def as_forward(model, function: Callable[[], Any]) -> Any:
    """Return function(), run as a forward pass of the model, so that FSDP2 gathers the weights it uses."""
    return model.run_as_forward(function) if isinstance(model, FSDPModule) else function()


def device_of(model) -> torch.device:
    """Return the device on which a model computes; with --cpu_offload its weights are stored elsewhere."""
    return DEVICE if isinstance(model, FSDPModule) else model.device


def card_bytes() -> float:
    """Return the memory of the GPU; no limit without one."""
    return torch.cuda.get_device_properties(0).total_memory if ON_GPU else math.inf


ONLY_IN_SAMPLING = ("sampling copy", "gathered weights")
ONLY_IN_TRAINING = ("gradients", "whole gradient", "logits of a chunk")


def bytes_of_sampling_weight(args: RunFlags) -> int:
    """Return the bytes of one number in the weights that sample, and in their KV cache."""
    in_bf16 = ON_GPU if args.lora_rank else args.bf16
    return 2 if in_bf16 else 4


def total_without(parts: dict[str, float], names: Sequence[str]) -> float:
    """Return the bytes of all parts but these."""
    return sum(size for name, size in parts.items() if name not in names)


def card_parts(args: RunFlags) -> dict[str, float]:
    """Return the bytes of everything that a process keeps on its card, by name.

    A parameter takes 16 bytes: 4 for the weight, 4 for its gradient, 8 for Adam, divided among the processes.
    With --cpu_offload they are in host memory, and the card holds the gathered weights while it samples.
    """
    num_parameters = count_parameters(args.model, "--model")
    sampling_weights_size = bytes_of_sampling_weight(args) * num_parameters
    if args.lora_rank:
        parts = {"frozen weights": sampling_weights_size, "adapters": 16 * count_adapter_parameters(args)}
    elif args.cpu_offload:
        parts = {"gathered weights": sampling_weights_size}
    else:
        share = num_parameters / world_size()
        parts = {"weights": 4 * share, "gradients": 4 * share, "Adam": 8 * share}
        if args.bf16 or world_size() > 1:
            parts["sampling copy"] = sampling_weights_size
    if getattr(args, "teacher", None) and args.teacher_device in (None, "cuda", "cuda:0"):
        teacher_size = count_parameters(args.teacher, "--teacher") * (2 if args.bf16 else 4)
        parts["teacher"] = teacher_size / world_size()
    parts["logits of a chunk"] = 16 * CHUNK_LOGITS  # in fp32, with their gradient and two copies
    return parts


def activation_bytes(args: RunFlags) -> float:
    """Estimate what the backward pass of one micro-batch needs from its forward pass.

    A layer keeps some 8 vectors of the hidden size and 7 of the MLP's size per token in bf16, in fp32 6 and 5
    (fitted to a 135M Llama). With activation checkpointing this holds for one layer at a time, and every
    layer keeps its fp32 input.
    """
    config = load_config(args.model).get_text_config()
    hidden = getattr(config, "hidden_size", None)
    if hidden is None:
        return 0.0
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    one_layer = 4 * (6 * hidden + 5 * mlp)
    if args.bf16:
        one_layer = 2 * (8 * hidden + 7 * mlp)
    per_token = config.num_hidden_layers * one_layer
    if args.activation_checkpointing:
        per_token = config.num_hidden_layers * 4 * hidden + one_layer
    longest_sample = args.max_prompt_tokens + args.max_new_tokens  # it may stand alone in a micro-batch
    return per_token * max(args.microbatch_tokens, longest_sample)


def gradient_fits(args: RunFlags, card: float | None = None) -> bool:
    """Return True if every process can keep the gradient of all weights: 4 bytes a parameter.

    It may take half of what is left of the card; activations need the rest.
    """
    card = card or card_bytes()
    free = card - total_without(card_parts(args), ONLY_IN_SAMPLING)
    return 4 * count_parameters(args.model, "--model") <= free / 2


def choose_memory(args: RunFlags, card: float | None = None) -> dict[str, str]:
    """Fill in the memory flags that were not given, and return two lines of the plan: memory and sampling.

    CPU offload and activation checkpointing are switched on if the card is too small. With offload all
    weights are transferred for every micro-batch, so these are larger if the card has room. A run that host
    memory or disk cannot hold is refused before anything is loaded.
    """
    card = card or card_bytes()
    if args.cpu_offload is None:
        args.cpu_offload = not args.lora_rank and sum(card_parts(args).values()) > 0.75 * card
    if args.microbatch_tokens is None:
        args.microbatch_tokens = 32768 if args.cpu_offload and card >= 64e9 else 16384
    num_parameters = count_parameters(args.model, "--model")
    parts = card_parts(args)
    if (args.cpu_offload or world_size() > 1) and gradient_fits(args, card):
        parts["whole gradient"] = 4 * num_parameters
    if args.activation_checkpointing is None:
        needed = total_without(parts, ONLY_IN_SAMPLING) + activation_bytes(args)
        args.activation_checkpointing = args.cpu_offload or needed > 0.8 * card
    host = 16 * num_parameters if args.cpu_offload else 0
    checkpoint_size = 0 if args.lora_rank else 12 * num_parameters  # adapters are small
    num_checkpoints = Run.CHECKPOINTS_KEPT + 1 if args.save_every else 1  # one more while it is written
    disk = num_checkpoints * checkpoint_size + 4 * num_parameters
    if not getattr(args, "extract_only", False):
        check_room(host, disk, args.out)
    line = f"{gigabytes(sum(parts.values()))} a process: "
    line += ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    line += f"; activations up to {gigabytes(activation_bytes(args))} (estimated)"
    if card < math.inf:
        line += f"; the card has {gigabytes(card)}"
    if host:
        line += f"; host memory {gigabytes(host)}"
    line += f"; disk {gigabytes(disk)}"
    for name in ("activation_checkpointing", "cpu_offload"):
        if getattr(args, name):
            line += f"; --{name}"
    return {"memory": line, "sampling": sampling_plan(args, parts, card)}


def sampling_plan(args: RunFlags, parts: dict[str, float], card: float) -> str:
    """Return the plan's line about the KV cache and how many completions are sampled at the same time."""
    config = load_config(args.model)
    bytes_per_number = bytes_of_sampling_weight(args)
    longest = args.max_prompt_tokens + args.max_new_tokens
    free = card - total_without(parts, ONLY_IN_TRAINING)
    fitting = sequences_that_fit(config, bytes_per_number, longest, free)
    rows = min(fitting, args.generation_batch_size)
    cache = kv_bytes(config, bytes_per_number, longest)
    return (f"{rows} completions of up to {longest} tokens at the same time; "
            f"KV cache {gigabytes(rows * cache)}, {cache / longest / 1e3:.3g} kB a token")


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def check_room(host: float, disk: float, out: str) -> None:
    """Refuse a run that needs more bytes of host memory or disk than there are."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if host > memory:
        refuse(f"--cpu_offload needs {gigabytes(host)} of host memory, and this machine has "
               f"{gigabytes(memory)}: use --lora_rank, more cards or a smaller model")
    written = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())  # by a resumed run
    existing = next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if disk > free + written:
        refuse(f"--out {out}: checkpoints and model need {gigabytes(disk)} of disk, "
               f"and {gigabytes(free)} are free there")


def count_parameters(name: str, flag_name: str) -> int:
    """Return a model's number of parameters, from its configuration alone."""
    return sum(p.numel() for p in model_without_memory(name, flag_name).parameters())


def count_adapter_parameters(args: RunFlags) -> int:
    """Count the parameters of --lora_rank's adapters: rank x (inputs + outputs) of layers but the head."""
    model = model_without_memory(args.model, "--model")
    linear = [module for module in model.modules()
              if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()]
    return args.lora_rank * sum(layer.in_features + layer.out_features for layer in linear)


def model_without_memory(name: str, flag_name: str):
    """Return a model on the meta device: the shapes of its weights, and no numbers."""
    config = load_config(name, flag_name)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        refuse(f"{flag_name} {name}: no causal language model can be made from its config "
               f"({first_line(error)})")


# ---------------------------------------------------------------- generation

GENERATION_SHARE = 0.8      # of the card's free memory that the KV cache may fill
CPU_CACHE_BYTES = 4 * 2 ** 30
PREFILL_TOKENS = 2 ** 16    # prompt tokens of one forward pass


@dataclass
class Samples:
    """Completions, and what the sampler knows of every token, [N, C] each, valid up to the first end."""
    ids: Tensor        # token ids, padded with an end token
    logps: Tensor      # log pi(token) by the weights that sample, before top-p
    kept_mass: Tensor  # the probability of all tokens that top-p keeps


@torch.no_grad()
def generate_in_pieces(model, prompts: list[list[int]], config: GenerationConfig,
                       max_sequences: int) -> Samples:
    """Return one completion per prompt.

    Run `model.generate` on as many prompts at the same time as memory allows, at most `max_sequences`.

    Three traps are avoided here. `generate` fills fields that a GenerationConfig leaves open from the
    checkpoint's own (for Qwen2.5-Instruct: top_k 20, repetition_penalty 1.05), so an empty config replaces it
    during the call. In train mode, activation checkpointing drops the KV cache without an error, so we sample
    in eval mode. And fp32 weights would be cast to bf16 again at every token, so we sample from a bf16 copy.
    """
    longest = max(map(len, prompts), default=1) + config.max_new_tokens
    with sampling_weights(model) as sampler:
        free = card_bytes()
        if device_of(model).type == "cuda":
            free -= torch.cuda.memory_allocated()
        fitting = sequences_that_fit(sampler.config, sampler.dtype.itemsize, longest, free)
        batch_size = min(max_sequences, fitting)
        saved_config = sampler.generation_config
        sampler.generation_config = GenerationConfig()
        bar = tqdm(total=len(prompts), desc="sampling", unit="completion", leave=False,
                   disable=True if rank() else None)
        try:
            parts = [generate_batch(sampler, prompts[first:first + batch_size], config, bar)
                     for first in range(0, len(prompts), batch_size)]
        finally:
            bar.close()
            sampler.generation_config = saved_config
    device = device_of(model)
    return Samples(
        ids=joined([part.ids for part in parts], config.pad_token_id, device).long(),
        logps=joined([part.logps for part in parts], 0.0, device),
        kept_mass=joined([part.kept_mass for part in parts], 0.0, device),
    )


def joined(parts: list[Tensor], value: float, device) -> Tensor:
    """Return the rows of all parts [n, C], padded on the right to the widest."""
    width = max((part.shape[1] for part in parts), default=0)
    padded = [F.pad(part, (0, width - part.shape[1]), value=value) for part in parts]
    return torch.cat(padded) if padded else torch.zeros(0, 0, device=device)


def generate_batch(model, prompts: list[list[int]], config: GenerationConfig, bar: tqdm) -> Samples:
    """Return the completions of one batch, from several calls of `model.generate`.

    A call ends when a tenth of its rows have ended. Finished rows leave the batch, and the next call starts
    from the KV cache of the others, so that a batch does not wait for its longest row. On natural lengths
    this writes 2.4 to 3.8 times the tokens per second of a single call.
    """
    end_ids = torch.tensor(config.eos_token_id, device=device_of(model))
    ids, mask = left_pad(prompts, config.pad_token_id, device_of(model))
    prompt_width = ids.shape[1]
    config = copy.copy(config)
    top_p = config.top_p if config.do_sample else 1.0
    temperature = config.temperature if config.do_sample else 1.0
    config.top_p = 1.0  # NucleusFilter does it
    cache = DynamicCache(config=model.config)
    if not has_plain_cache(cache):
        nucleus = NucleusFilter(top_p, temperature)
        ids = model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=False,
                             logits_processor=[nucleus])
        bar.update(len(prompts))
        return Samples(ids[:, prompt_width:], nucleus.logps(ids), nucleus.kept_mass())
    read_prompts(model, prompts, ids, mask, cache, config)
    size = (len(prompts), config.max_new_tokens)
    completions = torch.full(size, config.pad_token_id, device=ids.device)
    logps = torch.zeros(size, device=ids.device)
    kept_mass = torch.zeros(size, device=ids.device)
    active = torch.arange(len(prompts), device=ids.device)  # rows that have not ended
    written = 0
    while len(active) and written < completions.shape[1]:
        config.max_new_tokens = completions.shape[1] - written
        enough_ended = EnoughEnded(end_ids, max(len(active) // 10, 1))
        nucleus = NucleusFilter(top_p, temperature)
        ids = model.generate(ids, attention_mask=mask, cache=cache, generation_config=config,
                             logits_processor=[nucleus], stopping_criteria=[enough_ended], synced_gpus=False)
        new = ids[:, prompt_width + written:]
        columns = slice(written, written + new.shape[1])
        completions[active, columns] = new
        logps[active, columns] = nucleus.logps(ids)
        kept_mass[active, columns] = nucleus.kept_mass()
        written += new.shape[1]
        unfinished = (~torch.isin(new, end_ids).any(1)).nonzero()[:, 0]
        bar.update(len(active) - len(unfinished))
        mask = F.pad(mask, (0, new.shape[1]), value=1)[unfinished]
        ids = ids[unfinished]
        active = active[unfinished]
        if len(active):
            cache.batch_select_indices(unfinished)
    return Samples(completions[:, :written], logps[:, :written], kept_mass[:, :written])


def read_prompts(model, prompts: list[list[int]], ids: Tensor, mask: Tensor, cache: DynamicCache,
                 config: GenerationConfig) -> None:
    """Fill the KV cache with all but the last token of every prompt; equal prompts are read once."""
    if ids.shape[1] == 1:
        return
    position_of = {}  # prompt -> its position among the distinct prompts
    distinct = []     # one row of each distinct prompt
    for row, prompt in enumerate(map(tuple, prompts)):
        if prompt not in position_of:
            position_of[prompt] = len(distinct)
            distinct.append(row)
    one_token = copy.copy(config)
    one_token.max_new_tokens = 1  # `generate` must write a token; we throw it away
    one_token.prefill_chunk_size = max(PREFILL_TOKENS // len(distinct), 1)
    model.generate(ids[distinct, :-1], attention_mask=mask[distinct, :-1], cache=cache,
                   generation_config=one_token, synced_gpus=False)
    positions = [position_of[tuple(prompt)] for prompt in prompts]
    cache.batch_select_indices(torch.tensor(positions, device=ids.device))


def left_pad(prompts: list[list[int]], pad_id: int, device) -> tuple[Tensor, Tensor]:
    """Return token ids [n, P] with padding on the left, and the attention mask [n, P]."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def has_plain_cache(cache: DynamicCache) -> bool:
    """Return True if every layer keeps keys and values only, so that rows can leave the batch.

    Recurrent layers keep a state beside them that `batch_select_indices` does not move (Falcon-H1).
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


class EnoughEnded(StoppingCriteria):
    """End a call of `generate` once `enough` of its rows have ended."""

    def __init__(self, end_ids: Tensor, enough: int):
        self.end_ids = end_ids
        self.enough = enough
        self.ended = False

    def __call__(self, ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.ended = torch.isin(ids[:, -1], self.end_ids) | self.ended
        return (self.ended.sum() >= self.enough).expand(len(ids))


class NucleusFilter(LogitsProcessor):
    """Filter by top-p as transformers does, without sorting the vocabulary. Record log-probs and kept mass.

    The 1,024 likeliest tokens nearly always hold more than top_p. At V = 152k and 32 rows on a CPU the sort
    takes 3.3 s a token, more than the model. transformers applies the temperature after us.
    """
    LIKELIEST = 1024

    def __init__(self, top_p: float, temperature: float):
        self.top_p = top_p
        self.temperature = temperature
        self.log_probs = None        # [n, V] of the token that is being sampled
        self.sampled_logps = []      # [n] of each token before it
        self.kept = []               # [n] of each token

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.note_last_token(ids)
        self.log_probs = (scores.float() / self.temperature).log_softmax(-1)
        if self.top_p == 1:
            self.kept.append(torch.ones(len(ids), device=ids.device))
            return scores
        probs = self.log_probs.exp()                                         # [n, V]
        top = probs.topk(min(self.LIKELIEST, probs.shape[1]))
        if not (top.values.sum(1) >= self.top_p).all():
            top = probs.sort(descending=True)
        values, indices = top
        mass_before = values.cumsum(1, dtype=torch.float64) - values
        is_cut = mass_before >= self.top_p
        self.kept.append(values.masked_fill(is_cut, 0.0).sum(1))
        kept_scores = scores.gather(1, indices).masked_fill(is_cut, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(1, indices, kept_scores)

    def note_last_token(self, ids: Tensor) -> None:
        if self.log_probs is not None:
            self.sampled_logps.append(self.log_probs.gather(1, ids[:, -1:])[:, 0])

    def logps(self, ids: Tensor) -> Tensor:
        """Return the log-probs [n, C] of the C tokens that were sampled, given all token ids at the end."""
        self.note_last_token(ids)
        return torch.stack(self.sampled_logps, 1)

    def kept_mass(self) -> Tensor:
        """Return the kept mass [n, C] of these tokens."""
        return torch.stack(self.kept, 1)


def kv_bytes(config, bytes_per_number: int, tokens: int) -> int:
    """Return the bytes of keys and values that one sequence of so many tokens takes."""
    config = config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", None)
    if num_heads is None:  # a model without attention has no such cache
        return 1
    kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    window = getattr(config, "sliding_window", None) or tokens
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = sum(kind == "sliding_attention" for kind in layer_types)
    cached_tokens = (len(layer_types) - sliding) * tokens + sliding * min(window, tokens)
    return 2 * cached_tokens * kv_heads * head_dim * bytes_per_number


def sequences_that_fit(config, bytes_per_number: int, tokens: int, free: float) -> int:
    """Return how many sequences of so many tokens are sampled at once, in so many free bytes of the card."""
    budget = GENERATION_SHARE * free if free < math.inf else CPU_CACHE_BYTES
    return max(int(budget // kv_bytes(config, bytes_per_number, tokens)), 1)


@contextmanager
def sampling_weights(model) -> Iterator[torch.nn.Module]:
    """Yield the model to sample from, in eval mode.

    A plain model with --bf16 is copied to bf16. A sharded model is gathered once, so that processes may write
    different numbers of tokens. FSDP2's hooks would run in every layer at every token, so they are removed
    while the model samples. Any other model is used as it is.
    """
    was_training = model.training
    modules = sharded_modules(model)
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    model.eval()
    try:
        for module in modules:
            module.unshard()
            module._forward_pre_hooks = OrderedDict()
            module._forward_hooks = OrderedDict()
        yield bf16_copy(model) if getattr(model, "samples_from_bf16_copy", False) else model
    finally:
        for module, (pre_hooks, forward_hooks) in zip(modules, hooks):
            module._forward_pre_hooks = pre_hooks
            module._forward_hooks = forward_hooks
            module.reshard()
        model.train(was_training)


def bf16_copy(model):
    """Return a copy of the model in bf16. Buffers, such as the rotary frequencies, keep their precision."""
    memo = {id(p): torch.nn.Parameter(p.detach().bfloat16(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


# ---------------------------------------------------------------- hidden states and micro-batches

PASS_COST = 256 if ON_GPU else 32  # fixed cost of one forward and backward pass, in tokens
CHUNK_LOGITS = 2 ** 26 if ON_GPU else 2 ** 23  # logits in memory at the same time


def microbatches(idx: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split samples into micro-batches of similar length, each of at most `max_tokens` padded tokens.

    `lengths` holds the length of every sample. A sample longer than `max_tokens` gets a micro-batch of its
    own. A new micro-batch also begins when padding would cost more than another pass. Every process gets the
    same number of micro-batches, because FSDP2 needs the same number of passes everywhere. Some may be empty.
    """
    batches = []
    padding = 0
    for i in sorted(idx, key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        padding += longest - lengths[i]
        is_full = not batches or longest * (len(batches[-1]) + 1) > max_tokens
        if is_full or padding > PASS_COST:
            batches.append([])
            padding = 0
        batches[-1].append(i)
    most = max(from_all_processes(len(batches)))
    return batches + [[] for _ in range(most - len(batches))]


def accumulate(model, batches: list[list[int]]) -> Iterator[list[int]]:
    """Yield the micro-batches of one optimizer step. Sharded models sum their gradient once, at the last one.

    FSDP2 would otherwise sum the gradient over the processes, and with --cpu_offload transfer it, after
    every micro-batch.
    """
    reduces_once = getattr(model, "reduces_gradient_once", False)
    for number, idx in enumerate(batches, 1):
        if reduces_once:
            model.set_requires_gradient_sync(number == len(batches))
        yield idx


def completion_hidden(model, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Tensor:
    """Return the final hidden states [M, d] at the positions that predict the M completion tokens.

    Sequences are prompt + completion, padded on the RIGHT, where causal attention never looks, so no
    attention mask is needed. Token t of a completion is predicted at position len(prompt) + t - 1.
    """
    device = device_of(model)
    lengths = mask.sum(1).tolist()
    sequences = [p + c[:n] for p, c, n in zip(prompts, completions.tolist(), lengths, strict=True)]
    if not sequences:  # this process has no sample left, but FSDP2 needs its forward pass
        sequences = [[0, 0]]
    width = max(map(len, sequences)) - 1  # the last token predicts nothing
    ids = [(sequence + [0] * width)[:width] for sequence in sequences]
    ids = torch.tensor(ids, device=device)                                               # [n, T]
    row, t = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(p) for p in prompts], device=device, dtype=torch.long)

    def forward() -> Tensor:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state      # [n, T, d]
        return hidden[row, starts[row] + t - 1]                                          # [M, d]

    return as_forward(model, forward)


class Fp32Head:
    """The output head of a model: hidden states [m, d] -> logits [m, V], accumulated and kept in fp32.

    Under autocast its inputs are bf16. A bf16 matmul that is cast afterwards causes 60% of the log-probs'
    error and changes the argmax, which is TGPO's label, at 2.4% of tokens (measured on a 135M model).
    """

    def __init__(self, model):
        head = model.get_output_embeddings()
        self.weight = head.weight                                                        # [V, d]
        if self.weight.requires_grad:
            # FSDP2 gathers bf16 weights. In fp32 the gradients of many chunks add up without rounding.
            self.weight = self.weight.float()
        self.bias = None if head.bias is None else head.bias.float()
        self.tokens_per_chunk = max(CHUNK_LOGITS // len(self.weight), 1)  # so that no [M, V] tensor exists

    def __call__(self, hidden: Tensor) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            logits = Bf16MatmulFp32.apply(hidden.bfloat16(), self.weight.bfloat16())
        else:
            logits = hidden.float() @ self.weight.float().T
        return logits if self.bias is None else logits + self.bias


class Bf16MatmulFp32(torch.autograd.Function):
    """hidden @ weight.T with bf16 inputs and an fp32 result: torch.mm(out_dtype=) has no gradient."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            try:
                return torch.mm(hidden, weight.T, out_dtype=torch.float32)
            except NotImplementedError:  # only CUDA has this kernel
                return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, grad_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad_logits = grad_logits.bfloat16()
        grad_hidden = grad_logits @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_logits.T @ hidden if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight


def clip_gradient(model, max_norm: float) -> float:
    """Clip the gradient to a norm and return the norm that it had, over all processes."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.item()


def learning_rate(step: int, peak: float, schedule: str, warmup_steps: int, steps: int) -> float:
    """Return the learning rate of a 1-based step: linear warm-up, then constant, linear or cosine decay."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (steps + 1 - warmup_steps)  # below 1: the last step still learns
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak


# ---------------------------------------------------------------- SFT warm-up

def sft_warmup(model, tokenizer, problems: list[dict], run: "Run", args: RunFlags) -> None:
    """Train the model by SFT on its warm-up problems before RL, and keep the best epoch in <run>/warmup.

    As in SGPO's paper: a random tenth of the problems validates, the learning rate rises linearly for a tenth
    of the steps and falls on a cosine. A killed warm-up begins again, a finished one is loaded.
    """
    finished = Path(args.warmup_from) if args.warmup_from else run.folder / "warmup"
    if run.checkpoints() or not (problems or args.warmup_from):
        return
    if finished.is_dir():
        load_weights(model, finished)
        print(f"warm-up: loaded {finished}")
        return
    prompts = [build_prompt(tokenizer, p["problem"], args.system_prompt) for p in problems]
    solutions = [solution_ids(tokenizer, p["solution"], prompt) for p, prompt in zip(problems, prompts)]
    order = random_generator(args.seed, "warm-up").permutation(len(problems)).tolist()
    num_validation = max(1, round(len(problems) / 10))
    validation, train = order[:num_validation], order[num_validation:]
    steps_per_epoch = math.ceil(len(train) / args.warmup_batch_size)
    steps = steps_per_epoch * args.warmup_epochs
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad),
                                  weight_decay=args.weight_decay, fused=True)
    best = math.inf
    step = 0
    print(f"warm-up: SFT on {len(train)} solutions, {args.warmup_epochs} epochs of {steps_per_epoch} steps")
    for epoch in range(1, args.warmup_epochs + 1):
        shuffled = random_generator(args.seed, "warm-up epoch", epoch).permutation(train).tolist()
        train_loss = 0.0
        for idx in tqdm(np.array_split(shuffled, steps_per_epoch), f"epoch {epoch}", leave=False,
                        disable=True if rank() else None):
            step += 1
            lr = learning_rate(step, args.warmup_lr, "cosine", round(steps / 10), steps)
            optimizer.param_groups[0]["lr"] = lr
            model.train()
            train_loss += sft_pass(model, prompts, solutions, idx.tolist(), args) / steps_per_epoch
            if math.isfinite(clip_gradient(model, args.max_grad_norm)):
                optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            loss = sft_pass(model, prompts, solutions, validation, args)
        print(f"warm-up: epoch {epoch} of {args.warmup_epochs}, loss {train_loss:.3f}, validation {loss:.3f}")
        if loss < best:
            best = loss
            save_model(model, tokenizer, run.folder / "warmup.best")
    if best == math.inf:
        refuse("the validation loss of the SFT warm-up is not finite: lower --warmup_lr")
    load_weights(model, run.folder / "warmup.best")
    if rank() == 0:
        (run.folder / "warmup.best").rename(finished)  # from here on the warm-up counts as finished
    barrier()


def sft_pass(model, prompts: list, solutions: list, idx: list[int], args: RunFlags) -> float:
    """Return the mean -log pi of the solutions' tokens; if gradients are on, accumulate the gradient, too."""
    num_tokens = sum(len(solutions[i]) for i in idx)
    lengths = [len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions)]
    loss_sum = 0.0
    for batch in accumulate(model, microbatches(my_share(idx), lengths, args.microbatch_tokens)):
        completions, mask = right_pad([solutions[i] for i in batch], device_of(model))
        with torch.autocast(mask.device.type, torch.bfloat16, enabled=args.bf16):
            hidden = completion_hidden(model, [prompts[i] for i in batch], completions, mask)
            loss = solution_loss(model, hidden, completions[mask]) / num_tokens
        if torch.is_grad_enabled():
            loss.backward()
        loss_sum += loss.item()
    return sum_over_processes(loss_sum)[0]


def solution_loss(model, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log pi over target tokens [M] from their hidden states [M, d], chunk by chunk."""
    head = Fp32Head(model)
    size = head.tokens_per_chunk

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    loss = hidden.sum() * 0.0  # a process without samples needs a gradient, too
    for h, ids in zip(hidden.split(size), targets.split(size)):
        loss = loss + checkpoint(chunk_loss, h, ids, use_reentrant=False, preserve_rng_state=False)
    return loss


def right_pad(sequences: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Return token ids [n, C], 0 behind their ends, and the mask of the real ones [n, C]."""
    width = max(map(len, sequences), default=1)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.long)
    mask = torch.arange(width) < lengths[:, None]
    ids[mask] = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
    return ids.to(device), mask.to(device)


# ---------------------------------------------------------------- rewards

Reward = Callable[[list[str], list[dict]], Tensor]  # responses, problems -> rewards [N]; >= 0.5 is correct


def load_reward(spec: str | None) -> Reward:
    """Return the function that scores responses: the math grader, or a user's FILE.py:function.

    The user's function is called as function(response, row) -> float, with all columns of the data row. An
    error in it ends with its own traceback, which is what its author needs.
    """
    if spec is None:
        return lambda texts, problems: torch.tensor(
            [grade(text, problem["answer"]) for text, problem in zip(texts, problems, strict=True)])
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        refuse(f"--reward {spec}: write it as FILE.py:function, with a file that exists")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        refuse(f"--reward {spec}: {path} has no function {name}")

    def reward(texts: list[str], problems: list[dict]) -> Tensor:
        values = []
        for text, problem in zip(texts, problems, strict=True):
            value = float(function(text, dict(problem)))
            if not math.isfinite(value):
                refuse(f"--reward {spec} returned {value} for the problem with id {problem['id']}; it must "
                       "return a finite number", from_any_process=True)
            values.append(value)
        return torch.tensor(values)

    return reward


# ---------------------------------------------------------------- run directory

class Run:
    """The run directory --out: config.json, metrics.jsonl, samples.jsonl, checkpoints/ and model/.

    A script calls `print_plan`, `create`, `resume`, then `log` and `save`, and `finish`.
    """
    # Flags that may differ when a run is resumed: they change no gradient. Another generation_batch_size
    # draws other random numbers, which are as good.
    MAY_DIFFER = ("out", "resume", "dry_run", "steps", "save_every", "report_to", "cpu_offload",
                  "activation_checkpointing", "microbatch_tokens", "generation_batch_size", "extract_only",
                  "strategist", "strategist_model", "strategist_args")
    CHECKPOINTS_KEPT = 2
    SHOWN = {  # metrics on the screen
        "reward": "reward {:.3f}",
        "eval/accuracy": "held-out {:.3f}",
        "eval/accuracy_guided": "held-out with strategy {:.3f}",
        "entropy": "entropy {:.2f}",
        "sgpo/alpha": "alpha {:.2f}",
        "tgpo/reverse_kl_k1": "k1 {:.2f}",
        "grad_norm": "grad {:.2g}",
        "completions/mean_length": "{:.0f} tokens",
        "completions/clipped_ratio": "cut off {:.2f}",
        "tokens_per_s": "{:.0f} tokens/s",
    }

    def __init__(self, args: RunFlags):
        """Check --out. Nothing is written yet, so an input that is refused later leaves no directory."""
        if args.resume and args.out is None:
            refuse("--resume needs --out, the directory of the run to resume")
        slices = world_size() * args.updates_per_rollout
        if args.prompts_per_step % slices:
            refuse(f"--prompts_per_step {args.prompts_per_step} must be a multiple of processes x "
                   f"--updates_per_rollout, {slices}")
        script = Path(sys.argv[0]).stem
        if args.out is None:
            name = f"{script}-{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            args.out = from_first_process(lambda: f"runs/{name}")
        if args.warmup_from and not Path(args.warmup_from, "config.json").is_file():
            refuse(f"--warmup_from {args.warmup_from}: no model there; name the warmup/ folder of a run")
        if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
            refuse(f"--report_to {args.report_to} needs a package: pip install {args.report_to}")
        self.args = args
        self.folder = Path(args.out)
        self.config = {"script": script, "flags": dataclasses.asdict(args)}
        check_directory(self.folder, self.config, args.resume)
        self.stop_requested = False
        self.timeouts_logged = grader_counts["timeouts"]

    def print_plan(self, data: Data, memory: dict[str, str], samples_per_problem: str, **more: str) -> None:
        """Print what the run will do and take, before it costs anything."""
        args = self.args
        epochs = args.steps * args.prompts_per_step / max(len(data.train), 1)
        batch = f"{args.prompts_per_step} problems x {samples_per_problem} samples"
        lines = {
            "data": data.summary,
            **more,
            "training": f"{args.steps} steps of {batch}, {epochs:.2g} epochs",
            **memory,
            "run": args.out,
        }
        print("plan")
        for name, text in lines.items():
            print(f"  {name + ':':12s}{printable(text)}")

    def create(self, data: Data) -> None:
        """Make the directory, lock it against other runs and write config.json."""
        self.config["flags"] = dataclasses.asdict(self.args)
        self.config |= {"problems": data.fingerprint, "command": sys.argv, **versions()}
        check_directory(self.folder, self.config, self.args.resume)
        barrier()  # no process still looks at the directory
        problem = from_first_process(self.make_directory)
        if problem:
            refuse(f"--out {self.folder}: {problem}")

    def make_directory(self) -> str | None:
        """Make and lock the directory and write config.json. Return the reason if that fails, else None."""
        try:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"cannot be made ({error.strerror})"
        self.lock = lock_file(self.folder / "lock")
        if self.lock is None:
            return "another run is writing there"
        write_atomic(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        return None

    def resume(self, model, optimizer) -> int:
        """Load the latest checkpoint, if there is one, and return its step; 0 for a new run.

        Log rows after that step are dropped, so that the logs match an uninterrupted run. From here
        on Ctrl-C and SIGTERM end the run after the current step.
        """
        step = self.latest_step()
        fill_adam_state(optimizer)
        if self.checkpoints():
            load_checkpoint(self.checkpoints()[-1], model, optimizer)
        if rank() == 0:
            for name in ("samples.jsonl", "metrics.jsonl"):
                truncate_log(self.folder / name, step if step > 0 else -1)
        barrier()
        self.send_metrics = dashboard(self.args.report_to, self.folder, self.config)
        self.bar = tqdm(total=self.args.steps, initial=step, desc="training", unit="step",
                        disable=True if rank() else None)
        self.first_step, self.start_time = step, time.time()
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.on_signal)
        return step

    def on_signal(self, kind: int, frame) -> None:
        if self.stop_requested:
            os._exit(130)
        self.stop_requested = True
        patience = "" if world_size() == 1 else " torchrun waits for --shutdown-timeout, 30 s by default."
        print("\nStopping after this step; progress will be saved. Press Ctrl-C again to quit immediately."
              + patience, file=sys.stderr, flush=True)

    def log(self, step: int, metrics: dict[str, float], problems: Sequence[dict] = (), rewards: Sequence = (),
            texts: Sequence[str] = ()) -> None:
        """Append a row to metrics.jsonl and this process's samples to samples.jsonl; print one line.

        Adds two metrics of the machine: peak_memory_gb and grader/timeouts since the last row.
        """
        timeouts = grader_counts["timeouts"] - self.timeouts_logged
        self.timeouts_logged += timeouts
        machine = {"peak_memory_gb": peak_memory_gb(), "grader/timeouts": sum_over_processes(timeouts)[0]}
        row = {"step": step, **metrics, **machine}
        samples = []
        for problem, reward, text in zip(problems, rewards, texts):
            about = {name: problem[name] for name in ("id", "problem", "answer", "guided") if name in problem}
            samples.append({"step": step, **about, "reward": float(reward), "completion": text})
        samples = [sample for share in from_all_processes(samples) for sample in share]
        if rank() > 0:
            return
        append_jsonl(self.folder / "samples.jsonl", samples)
        append_jsonl(self.folder / "metrics.jsonl", [row])
        self.send_metrics(step, row)
        self.bar.update(step - self.bar.n)
        self.print(self.one_line(step, metrics))
        if metrics.get("completions/clipped_ratio") == 1:
            self.print("every completion was cut off: raise --max_new_tokens, or nothing can be learnt")
        if samples and step == 1:
            first = samples[0]
            self.print(f"a sample, reward {first['reward']:g}\n  problem: {first['problem'][:500]}\n"
                       f"  answer: {first['answer']}\n  completion: {first['completion'][:2000]}")

    def one_line(self, step: int, metrics: dict[str, float]) -> str:
        """Return a step's line for the screen: the metrics that tell most, and the time left."""
        parts = [text.format(metrics[name]) for name, text in self.SHOWN.items() if name in metrics]
        if step > self.first_step:
            seconds_per_step = (time.time() - self.start_time) / (step - self.first_step)
            parts.append(f"{tqdm.format_interval(seconds_per_step * (self.args.steps - step))} left")
        return f"step {step}/{self.args.steps}: " + ", ".join(parts)

    def print(self, text: str) -> None:
        """Print above the progress bar, with model text escaped."""
        tqdm.write(printable(text))
        sys.stdout.flush()

    def should_stop(self) -> bool:
        """Return True if any process was asked to stop. All processes call this at the same place."""
        return any(from_all_processes(self.stop_requested))

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return sorted((self.folder / "checkpoints").glob("step_??????"))

    def latest_step(self) -> int:
        """Return the step of the latest checkpoint; 0 if nothing has been trained."""
        checkpoints = self.checkpoints()
        return int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0

    def save(self, step: int, model, optimizer) -> None:
        """Save a checkpoint. Random numbers and data order are functions of (seed, step), and not in it."""
        folder = self.folder / "checkpoints" / f"step_{step:06d}"
        if not folder.exists():
            save_checkpoint(folder, model, optimizer)
        if rank() == 0:
            for old in self.checkpoints()[:-self.CHECKPOINTS_KEPT]:
                shutil.rmtree(old)
        barrier()

    def finish(self, step: int, model, tokenizer, optimizer) -> None:
        """Save the last checkpoint and the model; a run that was stopped says how to resume it."""
        self.save(step, model, optimizer)
        self.bar.close()
        if rank() == 0:
            self.lock.close()
        if step < self.args.steps:
            print(f"stopped after step {step} of {self.args.steps}; continue with "
                  f"{self.folder}/config.json --resume --out {self.folder}")
            raise SystemExit(130)
        save_model(model, tokenizer, self.folder / "model")
        print(f"model: {self.folder / 'model'}; metrics, samples and checkpoints: {self.folder}")


def check_directory(folder: Path, config: dict, resume: bool) -> None:
    """Refuse a run directory that holds something else than this run.

    A new run needs an empty directory or none. A resumed run needs a config.json with the same script, flags
    and problems; flags in Run.MAY_DIFFER may change.
    """
    if not resume:
        try:
            taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        except OSError as error:
            refuse(f"--out {folder}: cannot be read ({error.strerror})")
        if taken:
            refuse(f"--out {folder} exists and is not empty; add --resume to continue its run, or choose "
                   "another directory")
        return
    try:
        old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        before = {"script": old["script"], **old["flags"], "problems": old["problems"]}
    except (OSError, ValueError, KeyError, TypeError):
        refuse(f"--resume: there is no run in --out {folder}, or its config.json is damaged")
    problems = config.get("problems", before["problems"])  # not known yet at the first check
    now = {"script": config["script"], **config["flags"], "problems": problems}
    differing = []
    for name in sorted({*before, *now} - {*Run.MAY_DIFFER}):
        if before.get(name) != now.get(name):
            differing.append(f"{name} was {before.get(name)!r} and is {now.get(name)!r}")
    if differing:
        refuse(f"--resume: the run in --out {folder} has another configuration: {'; '.join(differing)}")


def lock_file(path: Path):
    """Hold a file for the life of this process and return it; return None if another process holds it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return file


def truncate_log(path: Path, last_step: int) -> None:
    """Keep the rows of a log up to a step. Drop a last line that a kill cut off."""
    if not path.exists():
        return
    lines = []
    for location, row in read_jsonl(path, skip_unfinished=True):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            refuse(f"{location}: not a row with a step; delete the line and resume again")
        if row["step"] <= last_step:
            lines.append(json.dumps(row) + "\n")
    write_atomic(path, "".join(lines))


def dashboard(name: str, folder: Path, config: dict) -> Callable[[int, dict], None]:
    """Return a function (step, metrics) that sends metrics to the dashboard of --report_to."""
    if name == "none" or rank() > 0:
        return lambda step, metrics: None
    if name == "wandb":
        import wandb
        id_file = folder / "wandb_id"  # a resumed run continues its curves
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        wandb.init(project="sgpo-tgpo", name=folder.name, id=id_file.read_text(), resume="allow", dir=folder,
                   config=config)
        return lambda step, metrics: wandb.log(metrics, step=step)
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(folder / "tensorboard")

    def send(step: int, metrics: dict) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write in, and rename it in the end, so that `final` is there whole or not at all."""
    unfinished = final.with_name(final.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    yield unfinished
    barrier()
    if rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    barrier()


def fill_adam_state(optimizer) -> None:
    """Give every parameter the state that AdamW would give it at its first gradient.

    Then a parameter that never gets a gradient (an unused vision tower) is saved and loaded like the others.
    For an optimizer that has not stepped, torch would fill in a state of its own, with a step counter of 1.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p in optimizer.state:
                continue
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}


def training_state(model, optimizer) -> dict[str, dict]:
    """Return what a checkpoint holds: the weights, with LoRA those of the adapters only, and Adam's state."""
    weights = adapters(model) or get_model_state_dict(model)
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_checkpoint(final: Path, model, optimizer) -> None:
    """Save model and optimizer with torch's distributed checkpoint; any number of processes can read it."""
    state = training_state(model, optimizer)
    with whole_folder(final) as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_checkpoint(folder: Path, model, optimizer) -> None:
    """Load a checkpoint into model and optimizer."""
    state = training_state(model, optimizer)
    try:
        dcp.FileSystemReader(folder).read_metadata()  # without this dcp.load prints a traceback of its own
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:  # the libraries raise errors of many kinds
        refuse(f"{folder}: cannot be read ({first_line(error)}); remove it to resume from the one before")
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not adapters(model)))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_weights(model, folder: Path) -> None:
    """Load the weights of a warm-up, a Hugging Face directory, into an existing model."""
    adapter_weights = adapters(model)
    expected = adapter_weights or model.state_dict()
    weights = {}
    problem = None
    if rank() == 0:
        try:
            if adapter_weights:
                weights = load_file(folder / "adapters.safetensors")
            else:
                weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
            if shapes(weights) != shapes(expected):
                problem = ("its weights do not fit this model; name the warmup/ folder of a run with the "
                           "same --model and --lora_rank")
        except Exception as error:  # the libraries raise errors of many kinds
            problem = f"no warm-up can be loaded from it ({first_line(error)})"
    problem = from_first_process(lambda: problem)
    if problem:
        refuse(f"{folder}: {problem}")
    options = StateDictOptions(full_state_dict=True, strict=not adapter_weights,
                               broadcast_from_rank0=dist.is_initialized())
    set_model_state_dict(model, weights, options=options)


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of every weight by its name."""
    return {name: weight.shape for name, weight in weights.items()}


def save_model(model, tokenizer, final: Path) -> None:
    """Save model and tokenizer as a Hugging Face directory, which transformers and vLLM load as it is."""
    if sharded_modules(model):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
    else:
        weights = merged_weights(model)
    # Gathering makes a tied head a second tensor. We put the embedding's tensor in its place, so that
    # transformers writes one.
    first_name = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = weights[first_name.setdefault(id(p), name)]
    are_finite = all(weight.isfinite().all() for weight in weights.values())
    if not all(from_all_processes(are_finite)):
        refuse(f"{final}: the weights are not finite, so they are not saved; lower --lr")
    with whole_folder(final) as folder:
        if rank() == 0:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            adapter_weights = adapters(model)
            if adapter_weights:
                save_file(adapter_weights, folder / "adapters.safetensors")


def versions() -> dict[str, Any]:
    """Return package versions, device and commit for config.json."""
    here = Path(__file__).parent
    # Run in a shell, so that a machine without git gives an empty commit instead of an error.
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=here, capture_output=True, text=True)
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "math-verify")}
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    return {"versions": packages, "device": device, "processes": world_size(), "commit": git.stdout.strip()}


def peak_memory_gb() -> float:
    """Return the peak memory so far, of the process that has most: its GPU's, or the host's without a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = torch.cuda.max_memory_allocated() if ON_GPU else host
    return max(from_all_processes(peak)) / 2 ** 30


# ---------------------------------------------------------------- the math grader

# Answers that the grader cannot read count as wrong, because a wrong answer that is accepted is reinforced.
MAX_TAIL = 20_000  # characters at the end of a response in which we look for the box
MAX_ANSWER = 1_000  # characters of an answer
WORKER_SECONDS = 2  # for one question to the worker

# Outcomes since the program began: right, wrong, no_box, timeouts, crashes, unparsable_gold.
# Nobody resets it; take the difference of two copies.
grader_counts: Counter = Counter()


def extract_answer(response: str) -> str | None:
    r"""Return the text of the last complete top-level \boxed{..} after the last </think>, or None."""
    text = response[max(response.rfind("</think>"), 0):][-MAX_TAIL:]
    answer = None
    box_starts = []  # for each open brace: where the text of its box begins, or None
    for token in re.finditer(r"(\\boxed\s*)?\{|\}|\\.", text, re.DOTALL):
        if token[1] or token[0] == "{":
            box_starts.append(token.end() if token[1] else None)
        elif token[0] == "}" and box_starts:
            start = box_starts.pop()
            if start is not None:  # an outer box closes after its inner boxes, so it wins
                answer = text[start:token.start()]
    return None if answer is None else re.sub(r"\\boxed\s*(?=\{)", "", answer).strip()


def extract_gold(solution: str) -> str | None:
    r"""Return the answer of a reference solution, which may also end in `\boxed 2` or `\boxed2`."""
    bare = re.findall(r"\\boxed\s*(-?[0-9](?:[0-9.,/]*[0-9])?|[a-zA-Z])(?![a-zA-Z])", solution[-MAX_TAIL:])
    answer = extract_answer(solution)
    return bare[-1] if bare and answer is None else answer


# ---- one spelling for what means the same


def _repeating_decimal(found: re.Match) -> str:
    r"""Return 0.1\overline{6} as \frac{15}{90}."""
    whole, fixed, period = found.groups()
    digits = (whole or "0") + fixed
    top = int(digits + period) - int(digits)
    bottom = 10 ** len(fixed) * (10 ** len(period) - 1)
    return rf"\frac{{{top}}}{{{bottom}}}"


def _degree_factors(found: re.Match) -> str:
    r"""Inside trigonometric functions a degree is the factor \pi/180. Elsewhere the sign is dropped."""
    return re.sub(rf"([0-9.]+|[a-z]|\([^()]*\)) ?{_DEGREE}", r"(\\frac{\1\\pi}{180})", found[0])


def _join_thousands(found: re.Match) -> str:
    """Join 1,234 and 1 234 if the text has no bracket: (1,234) is a point."""
    return re.sub("(?<=[0-9])[, ](?=[0-9]{3}(?![0-9]))", "", found[0])


_DEGREE = r"(?:\^ ?(?:\{ ?\\circ ?\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])|\\text\{ ?degrees? ?\})"
_UNICODE = str.maketrans({
    "−": "-", "×": "*", "·": "*", "π": r"\pi ", "°": r"^\circ ", "²": "^2", "³": "^3",
    "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∪": r"\cup ", "∈": r"\in "})

# Applied in this order. END marks the end of a command's name. In the examples `->` shows before and after.
_REWRITES = [
    (r"(?<!\\)\\[()\[\]]|\\?\$|[€£]|\\poundsEND|\\boxed(?=\s*\{)", ""),  # \$5 -> 5, \(x\) -> x
    (r"^\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\s*$", r"\1"),  # {\text{(C)} 12} -> \text{(C)} 12
    (r"^\s*(?:\*\*|\['|[`\"'])(.*?)(?:\*\*|'\]|[`\"'])\s*$", r"\1"),  # **42** -> 42, ['3', '4']
    (r"', '", ", "),  # 3', '4 -> 3, 4
    (r"\\(?:left|right|middle|[bB]ig+[lrm]?|displaystyle|[lL]arge|bf|square|underline)END\.?", ""),  # \left(
    (r"\\color\{\w+\}", ""),  # \color{red}42 -> 42
    (r"\\langleEND", "("),  # \langle 1,2 -> (1,2
    (r"\\rangleEND", ")"),  # 1,2\rangle -> 1,2)
    (r"\\(?:text[a-z]+|[mh]box|math(?:rm|bf|it)|operatorname|boldsymbol)\s*\{|\{\\rm ", r"\\text{"),
    (r"_\{\s*\\text\s*\{(\w+)\}\s*\}|_\{?\\(?!text)([a-z]+)\}?", r"_{\1\2}"),  # L_{\odot} -> L_{odot}
    (r"(?<![a-zA-Z\\])E_", r"\\Xi_"),  # E_1 -> \Xi_1, because E is read as 2.718..
    (r"(?<=[0-9])(?:,\\!|\{,\}|\{\\,\}|\\[,;:! ]|~)\s*(?=[0-9]{3}(?![0-9]))", ""),  # 42\,000 -> 42000
    (r"(?<!\\)\\[,;:! ]|\\q?quadEND|~|\s+", " "),  # 5\quad cm -> 5 cm
    (r",? ?\\text\{ ?(?:and|or) ?\}|,? ?(?<![\\a-zA-Z])(?:and|or)END|;", ","),  # 3 or 5 -> 3, 5
    (r"\\text\{ ?([ie]|[^{}a-zA-Z]*) ?\}|\\(i)math", r"\1\2"),  # \text{2, 3} -> 2, 3
    (r"\\(le|ge)qslantEND", r"\\\1"),  # \geqslant -> \ge
    (r"\\neqEND", r"\\ne"),  # \neq -> \ne
    (r"\\[dtc]fracEND", r"\\frac"),  # \dfrac -> \frac
    (r"\\frac ?([0-9a-z])", r"\\frac{\1}"),  # \frac12 -> \frac{1}2
    (r"(\\frac\{[^{}]*\}) ?([0-9a-z])", r"\1{\2}"),  # \frac{1}2 -> \frac{1}{2}
    (r"\\sqrt ?([0-9a-z])", r"\\sqrt{\1}"),  # \sqrt2 -> \sqrt{2}
    (r"(?:\^|\*\*) ?(-?[0-9]+)", r"^{\1}"),  # x**2, x^2 -> x^{2}
    (r"\\pmod ?([0-9a-z])", r"\\pmod{\1}"),  # \pmod 7 -> \pmod{7}
    (r"(?<![\\a-zA-Z])(?:np\.|math\.)?((?:arc)?(?:sin|cos|tan)|log|ln|exp|pi)(?=[ (^/*+),-]|$)", r"\\\1"),
    (r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),  # sqrt(2) -> \sqrt{2}
    (r"\\varnothingEND|\\\{\s*\\\}", r"\\emptyset"),  # \{\} -> \emptyset
    (r"(\.[0-9]*)\(([0-9]+)\)", r"\1\\overline{\2}"),  # 0.1(6) -> 0.1\overline{6}
    (r"\\dot ?\{?([0-9])\}?([0-9]*)\\dot ?\{?([0-9])\}?", r"\\overline{\1\2\3}"),  # 0.\dot{2}\dot{7}
    (r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{?([0-9]+)\}?", _repeating_decimal),  # 0.\bar3
    (r"^.*\\(?:sin|cos|tan|cot|sec|csc)END.*$", _degree_factors),  # \sin 10^\circ -> \sin(\frac{10\pi}{180})
    (_DEGREE + r"|(?<=[0-9] )degreesEND", ""),  # 30^\circ -> 30
    (r"\\text\{ ?percent ?\}|(?<=[0-9] )percentEND|\\?%", r"\\%"),  # 5 percent -> 5\%
    (r"\\frac\{(\\text\{[^{}]*\})\}\{(\\text\{[^{}]*\}(?:\^\{[0-9]\})?)\}", r"\1/\2"),  # \frac{km}{h} -> km/h
    (r"/ ?\((\\text\{[^()]*)\)", r"/\1"),  # J/(mol K) -> J/mol K
    (r"\bkphEND|\bkmhEND", "km/h"),  # 48 kph -> 48 km/h
    (r"\bmphEND", "mi/h"),  # 50 mph -> 50 mi/h
    (r" ?\bsquaredEND", "^{2}"),  # meters per second squared -> meters per second^{2}
    (r"\b([ap])\.m\b\.?", r"\1m"),  # p.m. -> pm
    (r"^ ?[a-z]? ?\\(?:approx|in)END|^ ?[a-z](?=\([^()]*\]$)|^ ?=", ""),  # x \in (0,4] -> (0,4]
    (r"\\approxEND.*|[.,\\ ]+$", ""),  # 2\pi \approx 6.28. -> 2\pi
    (r"\\\\ ?(?=\\end)", ""),  # 2 \\ \end{pmatrix} -> 2 \end{pmatrix}
    (r"^\(?([0-9][0-9A-Z]*)\)?_\{?(?:\\text\{)?([0-9]+)\}*$", r"\\text{\1 base \2}"),  # 52_8, as words
    (r"(?<!ratio )\b([0-9]+ ?\{?:\}? ?[0-9]+)", r"\\text{ratio \1}"),  # 3:2 and 3:30, compared as words
    (r"^[^(\[{]*$", _join_thousands),  # 1,234 -> 1234
    (r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", ""),  # x + 1 -> x+1, but 4 2 is not 42
    (r",", ", "),  # (2,345) -> (2, 345), which Math-Verify would take for one number
    (r"^\\\{[a-zA-Z](?:\\in\\mathbb ?\{?R\}?)?(?:\\mid|\\vert|\||:) ?(.*)\\\}$", r"\1"),  # \{x:x>2\}
    (r"(?<=[0-9}])(\\text\{[^{}]*\})(?=, .*\1$)", ""),  # 3\text{cm}, 4\text{cm} -> 3, 4\text{cm}
    (r"^[({\[]([^(){}\[\],]*)[)}\]]$", r"\1"),  # (42), {42} -> 42
]
_COMPILED = [(re.compile(pattern.replace("END", "(?![a-zA-Z])")), new) for pattern, new in _REWRITES]


@lru_cache(8192)
def normalise_answer(text: str) -> str:
    """Return the answer in the one spelling in which answers are compared."""
    text = text.translate(_UNICODE)
    for pattern, new in _COMPILED:
        text = pattern.sub(new, text)
    return text


def _number(text: str) -> Fraction | None:
    r"""Return the exact value of a plain number such as -3/4, 2\frac{1}{4}, 4.5e33; else None."""
    text = re.sub(r"\\frac\{([0-9.]+)\}\{([0-9.]+)\}", r" \1/\2", text)
    sign, whole, top = r"([-+]?) ?", r"(?:([0-9]+) (?=.*/))?", r"([0-9.]+)"
    bottom_or_exponent = r"(?:/([0-9.]+)|[eE]\+?(-?[0-9]{1,4}))?"
    form = re.fullmatch(sign + whole + top + bottom_or_exponent, text)
    if not form:
        return None
    try:
        value = Fraction(form[3]) / Fraction(form[4] or 1)
        value = value * Fraction(10) ** int(form[5] or 0)
        value = value + int(form[2] or 0)
    except (ValueError, ZeroDivisionError):  # 1.2.3, 1/0
        return None
    return -value if form[1] == "-" else value


def _words(text: str) -> str:
    r"""Return what to compare if the answer is text, \text{..} or a bare word; "" for formulas."""
    is_text = re.search(r"\\text\s*\{[^}]*[a-zA-Z]|(?<![\\a-zA-Z{_])[A-Za-z]{4}", text)
    if not is_text and not re.fullmatch(r"(?i:yes|no|odd|[a-d])", text):
        return ""
    return re.sub(r"\\text|[\s{}()'\"]|[.,](?! ?[0-9])", "", text).casefold()


# ---- units: factors, names, exponents

_UNIT_NAMES = """
    m meter metre; km kilometer kilometre; cm centimeter centimetre; mm millimeter millimetre; mi mile
    ft foot feet; in inch; yd yard; g gram; kg kilogram; mg milligram; lb pound; oz ounce; l liter litre
    ml milliliter millilitre; gal gallon; qt quart; pt pint; s sec second; min minute; h hr hour; wk week
    d day; yr year; usd dollar; cent; n newton; j joule; w watt; v volt; a amp ampere; pa pascal; hz hertz
    k kelvin; mol mole; ha hectare; rad radian; acre; month; unit
""".strip().replace("\n", ";")
_UNIT_NAME = {name: group.split()[0] for group in _UNIT_NAMES.split(";") for name in group.split()}
_MAGNITUDE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_POWER = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

# In \text{..} any words are a unit except for a hedge. Bare, only names that nobody takes for variables.
_HEDGE = r"(?! ?,|[^}]*\b(?:not|maybe|wrong|if|or|is|than|at (?:least|most))\b)"
_EXPONENT = r"(?:\^\{-?[1-3]\})?"
_TEXT_UNIT = rf"\\text\{{{_HEDGE}(?:[a-zA-Z .,/()*-]|\^\{{-?[1-3]\}})+\}}{_EXPONENT}"
_BARE_NAMES = [name + "(?:s|es)?" for name in [*_UNIT_NAME, *_MAGNITUDE] if len(name) > 2]
_BARE_NAME = f"(?:{'|'.join(_BARE_NAMES)}|[ckm]m|in|ft|kg){_EXPONENT}"
_BARE_UNIT = rf"(?:{_BARE_NAME}|m(?=/s))(?:(?:/| per | ){_BARE_NAME}|/(?:[a-z]|min){_EXPONENT})*"
_TEXT_UNITS = rf"(?:{_TEXT_UNIT}(?:/|\*|\\cdot|\\times)?)+(?<![/*])"
_UNIT = re.compile(rf"(?<=[0-9}})i!])(?:\\%| ?{_TEXT_UNITS}| ?{_BARE_UNIT})+$")  # behind a quantity


def _split_unit(text: str) -> tuple[str, int, dict[str, int]]:
    """Return quantity, magnitude and unit: `5 million km/h` is 5, 10^6 and {km: 1, h: -1}."""
    found = _UNIT.search(text)
    if not found:
        return text, 1, {}
    unit = re.sub(r"\\[a-z]+|\b(?:of|the|and)\b", " ", found[0].lower())
    magnitude, sign, power = 1, 1, 1
    name = ""
    exponents = Counter()
    for word in re.findall(r"/|\\?%|-?[1-3]|[a-z]+", unit):
        if word in _MAGNITUDE:
            magnitude = magnitude * _MAGNITUDE[word]
        elif word in ("/", "per"):
            sign = -1  # every name that follows is in the denominator
        elif word in _POWER:
            power = _POWER[word]
        elif word[-1].isdigit():
            exponents[name] += sign * (int(word) - 1)
        else:
            name = _unit_name(word)
            exponents[name] += sign * power
            power = 1
    if exponents["unit"] == 1:  # `5 units` is 5, but `5 square units` is an area
        exponents["unit"] = 0
    exponents = {name: exponent for name, exponent in exponents.items() if exponent}
    return normalise_answer(text[:found.start()]), magnitude, exponents


def _unit_name(word: str) -> str:
    """Return the one name of a unit: hours -> h, boxes -> box."""
    for name in (word, word.removesuffix("s"), word.removesuffix("es")):
        if name in _UNIT_NAME:
            return _UNIT_NAME[name]
    return re.sub("(?<=[xh])es$|(?<=[^s])s$", "", word)


# ---- option letters, named values, chains

_OPTION = re.compile(
    r"(?i:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?[: ]*)?"
    r"(?:\(([A-J])\)|([A-J])(?:[.)]|$))"
    r"(?!\([A-J]\)|[,=^_+*/<>]|\\cup|\\cap|\\cdot|\\times|\\text\{(?:or|and))(.*)")
_NAME = r"\\?[a-zA-Z]+(?:_\{?\w+\}?)?"
_NOT_A_NAME = r"frac|sqrt|pi|infty|log|ln|exp|sin|cos|tan|cot|sec|csc|binom|cdot|times|div|pm|circ"
_TASK = re.compile(r"\\(?:sum|prod|int|lim|max|min|gcd|det)")
_VARIABLE = re.compile(rf"(?<![\\a-zA-Z])[a-zA-Z]|\\(?!(?:{_NOT_A_NAME})(?![a-z]))[a-zA-Z]+")


def _split_option(text: str) -> tuple[str, str]:
    r"""Return letter and text of a multiple-choice answer: `\text{(E)}\sqrt{2}` is E and \sqrt{2}."""
    unwrapped = re.sub(r"^\\text\{ ?([^{}]*)\}", r"\1", text)
    found = _OPTION.fullmatch(unwrapped)
    if not found:
        return "", text
    return found[1] or found[2], normalise_answer(found[3])


def _named_values(text: str) -> tuple[list[str], list[str]]:
    """Return names and values of `y=3, x=2`, sorted by name; two empty lists for all else."""
    items = re.split(rf", (?={_NAME}=)", text)
    found = [re.fullmatch(rf"({_NAME})=([^=]+)", item) for item in items]
    if len(found) < 2 or None in found:
        return [], []
    pairs = sorted(item.groups() for item in found)
    return [name for name, value in pairs], [value for name, value in pairs]


def _drop_names(answer: str, gold: str) -> tuple[str, str]:
    """Return both without names that only label values.

    x=2, y=3 is (2, 3); x_1=1, x_2=3 is the list 1, 3; 5 and x=5, or x=6 and x=5, are two values.
    """
    names, values = _named_values(answer)
    gold_names, gold_values = _named_values(gold)
    variables = {name.split("_")[0] for name in names + gold_names}
    if not variables:
        name, _, value = answer.rpartition("=")
        gold_name, _, gold_value = gold.rpartition("=")
        is_label = re.fullmatch(rf"{_NAME}(?:\([a-zA-Z]\))?", gold_name)
        if is_label and name in ("", gold_name):
            return normalise_answer(value), normalise_answer(gold_value)
        return answer, gold
    if len(variables) > 1 and names and gold_names and names != gold_names:
        return answer, gold
    lists = [", ".join(values) or answer, ", ".join(gold_values) or gold]
    if len(variables) > 1 or "(" in (answer[0], gold[0]):
        lists = [f"({items})" if items[0] != "(" else items for items in lists]
    return lists[0], lists[1]


def _chain_values(text: str) -> list[str]:
    """Return the members of A=3+4+5=12 that have a value: 12 and 3+4+5. All must equal the gold answer."""
    *members, last = re.split(r"=(?![^{}]*\})", text)
    values = [normalise_answer(last)]
    for member in members:
        is_name = all(_VARIABLE.search(term) for term in re.split("[-+]", member))
        if not is_name or _TASK.search(member):
            values.append(normalise_answer(member))
    return values


# ---- Math-Verify, in a process of its own

# LaTeX is parsed there; model text is never evaluated as Python. SIGALRM has no handler, so the kernel
# ends the worker whatever it computes. Stops of the program (Ctrl-C) are the parent's business.
_WORKER = r'''
import json, logging, re, resource, signal, sys
sys.path[:] = filter(None, sys.path)  # import nothing from the current directory
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
signal.alarm(60)  # for the imports
from fractions import Fraction
from functools import lru_cache
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy
from math_verify import grader, verify
from sympy import Expr, FiniteSet, Function, I, Intersection, Rational, S, Union, zeta
from sympy.logic.boolalg import Boolean
logging.disable()

def is_exact(a, b):
    """Check once more what Math-Verify calls equal: it chops differences and factors below 1e-50."""
    if not isinstance(a, Expr) or not isinstance(b, Expr):  # the elements of a matrix come one by one
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    point = {symbol: Rational(7 + n, 5) for n, symbol in enumerate(symbols)}
    a, b = a.subs(point).doit(), b.subs(point).doit()
    difference = a - b
    if difference.is_Rational:
        return difference == 0
    if not difference.is_number:
        return True
    distance = abs(a.evalf(1500) - b.evalf(1500))
    return bool(distance < Rational(10) ** -1400)

def exact_decimal(number):  # 0.25 -> (\\frac{1}{4})
    return "(\\frac{%d}{%d})" % Fraction(number[0]).as_integer_ratio()

def solution_set(relations):
    """x >= 0, x != 1 are both true; x < 1, x > 2 can only mean either."""
    sets = [relation.as_set() for relation in relations]
    both = Intersection(*sets)
    return Union(*sets) if both is S.EmptySet else both

@lru_cache(1000)
def read(text):
    text = re.sub(r"[0-9]*\.[0-9]+(?:e-?[0-9]{1,4})?|[0-9]+e-?[0-9]{1,4}", exact_decimal, text)
    conversion = ConversionConfig(lowercase_symbols=False)
    normalization = NormalizationConfig(malformed_operators=True, boxed="none")
    found = latex2sympy(text, is_real=True, conversion_config=conversion, normalization_config=normalization)
    found = found.subs({symbol: I for symbol in found.free_symbols if symbol.name == "i"})
    found = found.replace(Function(r"\zeta"), zeta)
    if isinstance(found, FiniteSet) and len(found.free_symbols) == 1:
        relations = [item for item in found.args if isinstance(item, Boolean)]
        if len(relations) == len(found.args) and not all(item.is_Equality for item in relations):
            return solution_set(relations)
    return found

def same(gold, answer):
    gold, answer = read(gold), read(answer)
    if isinstance(gold, FiniteSet) != isinstance(answer, FiniteSet):  # \{2,4\} is not (2,4)
        return False
    return verify(gold, answer, float_rounding=15, numeric_precision=50,
                  allow_set_relation_comp=True, timeout_seconds=None)

numeric_eq = grader.sympy_numeric_eq
symbolic_eq = grader.sympy_symbolic_eq
grader.sympy_numeric_eq = lambda a, b, *digits: numeric_eq(a, b, *digits) and is_exact(a, b)
grader.sympy_symbolic_eq = lambda a, b: symbolic_eq(a, b) and is_exact(a, b)
read("x^2")  # the first parse builds tables, which must not count as an answer's time
resource.setrlimit(resource.RLIMIT_DATA, (2 ** 28, 2 ** 28))
for line in sys.stdin:  # ends when the parent ends
    seconds, gold, answer = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        verdict = same(gold, answer)
    except MemoryError:
        raise
    except Exception:
        verdict = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("right" if verdict else "wrong", flush=True)
'''
_worker = None
_worker_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_worker=None, _worker_lock=threading.Lock()))


@lru_cache(16_384)
def _ask_worker(gold: str, answer: str) -> bool:
    """Return Math-Verify's verdict, or raise TimeoutError or ChildProcessError.

    Verdicts are cached, because the rollouts of a problem repeat each other's answers. An exception is not.
    """
    global _worker
    with _worker_lock:
        if _worker is None or _worker.poll() is not None:
            environment = {**os.environ, "PYTHONHASHSEED": "0"}  # the same verdict every time
            _worker = subprocess.Popen([sys.executable, "-c", _WORKER], env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        worker = _worker
        verdict = ""
        try:
            print(json.dumps([WORKER_SECONDS, gold, answer]), file=worker.stdin, flush=True)
            verdict = worker.stdout.readline().strip()
        finally:
            if not verdict:  # after Ctrl-C, too: an unread reply would answer the next question
                worker.kill()
                _worker = None
    if verdict:
        return verdict == "right"
    if worker.wait() == -signal.SIGALRM:
        raise TimeoutError("Math-Verify took too long")
    raise ChildProcessError("the grader's worker has died")


# ---- the verdict

_SUSPECT = [re.compile(pattern) for pattern in (  # an honest answer has these only if the gold answer does
    r"\^\{[^}]*\^|\^\{-?[0-9]{5}|[0-9]{5}!|[)}!]!|\\binom.*[0-9]{4}|[0-9]{40}",  # gigantic numbers
    r"(?:[(\[{][^)\]}]*){12}",  # deep nesting
    _TASK.pattern,  # a task instead of its answer
    r"(?:^|, )([^,]+), (?:.*, )?\1(?:, |$)")]  # the same item twice


def _same(answer: str, gold: str) -> bool:
    """Compare two normalised answers: options, names and chains first, then their values."""
    if answer == gold:
        return True
    letter, answer = _split_option(answer)
    gold_letter, gold = _split_option(gold)
    if letter and gold_letter:
        texts_agree = not answer or not gold or _same(answer, gold)
        return letter == gold_letter and texts_agree
    answer, gold = _drop_names(answer or letter, gold or gold_letter)
    values = [answer]
    if "=" in answer and "=" not in gold:
        values = _chain_values(answer)
    for suspect in _SUSPECT:
        if suspect.search(values[0]) and not suspect.search(gold):
            return False
    return len(values) <= 3 and all(_same_value(value, gold) for value in values)  # 3 bounds the time


def _same_value(answer: str, gold: str) -> bool:
    """Compare two values: units, exact numbers and words here, all else with Math-Verify."""
    answer, magnitude, unit = _split_unit(answer)
    gold, gold_magnitude, gold_unit = _split_unit(gold)
    value = _number(answer)
    gold_value = _number(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    if value is not None and gold_value is not None:
        value = value * magnitude
        gold_value = gold_value * gold_magnitude
        percent = (r"\%" in unit) - (r"\%" in gold_unit)  # a sign on one side means 1/100, or was left out
        sign_left_out = value == gold_value and (percent < 1 or abs(value) >= 1)
        return sign_left_out or value == gold_value * Fraction(100) ** percent
    if magnitude != gold_magnitude:
        answer = rf"({answer})\cdot{magnitude}"
        gold = rf"({gold})\cdot{gold_magnitude}"
    if answer == gold or _words(answer) or _words(gold):
        return answer == gold or _words(answer) == _words(gold)
    return _ask_worker(gold, answer)


@lru_cache(8192)
def _can_be_graded(gold: str) -> bool:
    if len(gold) > MAX_ANSWER or gold.strip().casefold() in ("proof", "not found", "notfound", "nan"):
        return False
    letter, text = _split_option(normalise_answer(gold))
    text = _split_unit(text)[0]
    if letter or _number(text) is not None or _words(text) or _ask_worker(text, text):
        return True
    has_letter = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", text)  # \mathbb{Z}/2\mathbb{Z} can be compared as text
    dangling = re.search(r"[-+*/^_=<>&|(\[{\\]$|^[*/^_=<>)\]}]", text)
    return bool(has_letter and not dangling and text.count("{") == text.count("}"))


def gold_is_gradable(gold: str) -> bool:
    """Return True if the gold answer can be read. If not, the row is a data error and no answer scores."""
    try:
        return _can_be_graded(gold)
    except Exception:
        return False


def grade(response: str, gold: str) -> float:
    r"""Return 1.0 if the answer in the response is the gold answer, else 0.0. Never raise; take at most 5 s.

    The answer is the last complete \boxed{..} after the last </think>. It is right if it is the same object:
    - numbers are compared exactly: 0.5 is \frac12, 0.\overline{3} is \frac13, but 0.333 is not \frac13;
    - expressions are the same if Math-Verify finds them equal; letters are case-sensitive; i is imaginary;
    - lists and sets have no order but must be complete; tuples, intervals and matrices have order, brackets
      and shape; x > 2 and \{x \mid x > 2\} are (2,\infty), but (2,4) is not \{2,4\};
    - equations may be turned round or scaled; x = 5 is 5; x = 2, y = 3 is (2,3); a chain 3+4+5 = 12 is 12 if
      it is true, so 41 = 42 is nothing;
    - a unit may be left out on either side, but two must agree; a percent sign may too, or means 1/100;
      5 million is 5000000; a degree counts inside \sin, \cos, \tan and is left out elsewhere;
    - an option is its letter, its text, or both;
    - numerals in a base need the same digits and base; words are compared without case and full stops.
    Whatever cannot be read or takes too long is wrong, and so is every answer to a gold that cannot be read.
    """
    try:
        outcome = _outcome(response, gold)
    except TimeoutError:
        outcome = "timeouts"
    except Exception:
        outcome = "crashes"
    grader_counts[outcome] += 1
    return float(outcome == "right")


def _outcome(response: str, gold: str) -> str:
    if not isinstance(gold, str) or not _can_be_graded(gold):
        return "unparsable_gold"
    answer = extract_answer(response) if isinstance(response, str) else None
    if answer is None:
        return "no_box"
    if not 0 < len(answer) <= MAX_ANSWER:
        return "wrong"
    is_same = _same(normalise_answer(answer), normalise_answer(gold))
    return "right" if is_same else "wrong"
