"""What the scripts share: flags, rows, prompts, models, run directories, the built-in demo and the math grader.

Nothing here knows any algorithm: advantages, losses and their equations stand in the scripts.
Letters used throughout: N rows (problems x samples), P prompt, C completion, T = P + C, V vocabulary, M completion tokens.
"""
from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache
from multiprocessing import Pipe
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Callable, Iterator, Mapping, NoReturn, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, HfArgumentParser,
                          Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, StoppingCriteria, get_cosine_schedule_with_warmup)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process
hf_logging.disable_progress_bar()


# ---------------------------------------------------------------- refusals and text on the screen

def refuse(message: str, alone: bool = False) -> NoReturn:
    """Every input that is not accepted ends here: one line on stderr, exit code 2, no traceback.

    Of several processes, which all come here with the same message, the first says it; `alone`: only this one comes here.
    """
    if rank() == 0 or alone:
        print("error: " + printable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(2)


def printable(text: str) -> str:
    """Model and data text made safe for a terminal: control, bidi and other invisible characters are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


# ---------------------------------------------------------------- processes

def start_processes() -> None:
    """Join the processes that torchrun has started. Without torchrun this is the only one, and there is no group."""
    Watch.reset()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # No time limit of its own: ranks wait long for each other's rollouts, and torchrun ends all when one dies.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
        if rank():
            sys.stdout = open(os.devnull, "w")  # the first one speaks for all
        sys.excepthook = _one_message


def _one_message(kind, error, traceback) -> None:
    """Uncaught error of one of several processes. When another has died, each lost connection would print a traceback of its own."""
    if isinstance(error, RuntimeError) and re.search("(?i)gloo|nccl|connection|peer", str(error)):
        if rank() == 0:
            print("error: another process has died; its own message says why. Go on from the last checkpoint with --resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def dealt(items):
    """This process's share of a list or tensor: every world()-th item, so that equal shares stay equal however they are cut later."""
    return items[rank()::world()]


def everyones(value: Any) -> list:
    """The value of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gathered(share: Tensor) -> Tensor:
    """The inverse of `dealt`: the rows [b, ...] that each process has -> all rows [B, ...], on the CPU."""
    shares = everyones(share.cpu())
    if len(shares) == 1:
        return shares[0]
    rows = share.new_empty(sum(map(len, shares)), *share.shape[1:], device="cpu")
    for r, part in enumerate(shares):
        rows[r::len(shares)] = part
    return rows


def summed(counts: Mapping[str, float]) -> defaultdict:
    """Counts of all processes, added."""
    totals = defaultdict(float)
    for part in everyones(dict(counts)):
        for name, value in part.items():
            totals[name] += value
    return totals


def in_step(batches: list[list[int]]) -> list[list[int]]:
    """As many micro-batches as the process that has most of them: FSDP2's gathering wants all to do as many passes. An empty one costs one token."""
    return batches + [[]] * (max(everyones(len(batches))) - len(batches))


def from_first(value: Any) -> Any:
    """The first process's value, in all."""
    return everyones(value)[0]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def progress(total: int, initial: int = 0, **more) -> tqdm:
    """A bar on the first process's terminal."""
    return tqdm(total=total, initial=initial, disable=None if rank() == 0 else True, **more)


# ---------------------------------------------------------------- flags

class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(f"{message} (--help lists the flags)")


def parse_args(args_class: type, recipe: Callable[[Any], dict] = lambda args: {}) -> Any:
    """The command line (or a leading .json/.yaml file of flags, which the line's own flags override) as `args_class`.

    `recipe(args)` may replace defaults of flags that the user did not set: the demo brings its own.
    """
    argv = sys.argv[1:]
    parser = _Parser(args_class, description=sys.modules[args_class.__module__].__doc__, allow_abbrev=False)
    fields = {f.name: f for f in dataclasses.fields(args_class)}
    chosen = {}
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        chosen = _read_flag_file(argv.pop(0), fields)

    def parse(defaults: dict) -> Any:
        parser.set_defaults(**defaults)
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0].replace("-", "_"), fields, n=1)
            refuse(f"unknown flag {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else "; --help lists the flags"))
        return args_class(**vars(namespace))

    args = parse(chosen)
    own = recipe(args)
    return parse({**own, **chosen}) if own else args


def _read_flag_file(path: str, fields: dict) -> dict:
    try:
        text = Path(path).read_text()
        if path.endswith(".json"):
            chosen = json.loads(text)
        else:
            import yaml
            chosen = yaml.safe_load(text)
    except Exception as error:  # yaml and json have exceptions of their own
        refuse(f"{path}: cannot read flags from it ({error})")
    if not isinstance(chosen, dict):
        refuse(f"{path}: must hold one mapping of flag names to values")
    for name, value in chosen.items():
        if name not in fields:
            refuse(f"{path}: unknown flag {name!r}; --help lists the flags")
        kind = getattr(fields[name].type, "__origin__", fields[name].type)  # list[str] -> list
        accepted = (int, float, str) if kind in (int, float) else kind  # text too (YAML reads 1e-6 as such): the parser converts it
        if value is not None and (isinstance(value, bool) != (kind is bool) or not isinstance(value, accepted)):
            refuse(f"{path}: {name} must be of type {kind.__name__}, not {value!r}")
    return chosen


def check_flags(args: Any, at_least: dict[str, float]) -> None:
    """Refuse a flag below its least value, and a flag that is not a number where one is needed."""
    for name, least in at_least.items():
        if not getattr(args, name) >= least:
            refuse(f"--{name} is {getattr(args, name)}; it must be at least {least}")


# ---------------------------------------------------------------- rows

DEFAULT_DATASET = "Elliott/Openr1-Math-46k-8192"
BENCHMARKS = {  # name: hub id, config, split; any other id: its default config, split "train". `to_row` knows the columns
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),                        # problem, answer
    "amc23": ("math-ai/amc23", None, "test"),                                   # question, answer
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),                       # problem, answer
    "aime25": ("math-ai/aime25", None, "test"),                                 # problem, answer
    "minerva": ("math-ai/minervamath", None, "test"),                           # question, answer
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),  # context + question, final_answer
}


def load_rows(source: str) -> list[dict]:
    """Rows {"problem", "answer", "solution"?, "strategy"?, "id"} from a .jsonl or .parquet file, a benchmark's name or a hub data set.

    Layouts: ours, LUFFY, DAPO, OpenR1/NuminaMath, MATH, GSM8K, OlympiadBench (see `to_row`). A bad row ends the program
    with the file and line named.
    """
    rows = []
    for place, raw in _raw_rows(source):
        try:
            row = to_row(raw)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            refuse(f"{place}: {error.args[0] if isinstance(error, ValueError) and error.args else 'layout not recognised: ' + repr(error)}")
        row.setdefault("id", str(len(rows)))
        rows.append(row)
    if not rows:
        refuse(f"{source}: no rows in it")
    return rows


def _raw_rows(source: str) -> Iterator[tuple[str, dict]]:
    if source.endswith((".jsonl", ".json", ".parquet")) or os.path.exists(source):
        if not os.path.isfile(source):
            refuse(f"{source}: no such file")
        if source.endswith(".parquet"):
            import pyarrow.parquet
            try:
                table = pyarrow.parquet.read_table(source)
            except Exception as error:
                refuse(f"{source}: not a readable parquet file ({error})")
            yield from ((f"{source}, row {i}", raw) for i, raw in enumerate(table.to_pylist(), 1))
            return
        try:
            with open(source, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            yield f"{source}, line {number}", json.loads(line)
                        except (json.JSONDecodeError, RecursionError) as error:
                            refuse(f"{source}, line {number}: not JSON ({error})")
        except (OSError, UnicodeDecodeError) as error:
            refuse(f"{source}: cannot be read as UTF-8 JSON lines ({error})")
        return
    import datasets  # only here: a local file must do without it
    hub_id, config, split = BENCHMARKS.get(source) or next((e for e in BENCHMARKS.values() if e[0] == source), (source, None, "train"))
    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # the hub client raises a dozen kinds; all mean that there is no data
        refuse(f"{hub_id}: neither a local file nor loadable from the hub ({type(error).__name__}: {error})")
    yield from ((f"{source}, row {i}", raw) for i, raw in enumerate(table, 1))


_DAPO_WRAPPER = re.compile(r"^Solve the following math problem step by step\. The last line.*?\n\n(.*?)\n\nRemember to put your answer"
                           r".*$", re.DOTALL)


def to_row(raw: dict) -> dict:
    """One row of any known layout in ours. Raises ValueError saying what is missing."""
    if not isinstance(raw, dict):
        raise ValueError("a row must be a JSON object")
    problem, answer, solution = raw.get("problem", raw.get("question")), raw.get("answer"), raw.get("solution")
    if isinstance(raw.get("prompt"), list):  # LUFFY and DAPO: chat messages, gold in reward_model
        problem = [m["content"] for m in raw["prompt"] if m["role"] == "user"][-1]
        problem = _DAPO_WRAPPER.sub(r"\1", problem)
        answer = (raw.get("reward_model") or {}).get("ground_truth")
        if raw.get("target"):  # LUFFY: the strong model's response
            solution = raw["target"][0]["content"]
    elif "final_answer" in raw:  # OlympiadBench
        problem = "\n".join(filter(None, [raw.get("context"), problem]))
        answer, solution = (raw["final_answer"] or [None])[0], (raw.get("solution") or [None])[0]
    elif isinstance(answer, str) and "\n#### " in answer:  # GSM8K: the answer field holds the solution
        solution, answer = answer.rsplit("\n#### ", 1)
    if answer is None and isinstance(solution, str):  # MATH: the gold is the solution's box
        answer = extract_answer(solution)
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    row = {"problem": problem, "answer": answer}
    for name, value in row.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'row has no "{name}": give it as a non-empty string')
    for name, value in (("solution", solution), ("strategy", raw.get("strategy"))):
        if value is not None and value != "":
            if not isinstance(value, str):
                raise ValueError(f'"{name}" must be a string')
            row[name] = value
    if raw.get("id") is not None:
        row["id"] = str(raw["id"])
    return row


def usable_rows(rows: list[dict], encode: Callable[[dict], list[list[int]]], max_prompt_tokens: int, check_gold: bool) -> tuple[list[dict], int]:
    """The rows that can be trained on and their longest prompt; the other rows are counted on the screen with the reason.

    `encode(row)` gives every prompt that the script will make of the row. With `check_gold` a gold that the grader cannot
    parse is a data error (it could never be rewarded).
    """
    kept, long, bad, longest = [], [], [], 0
    for row in rows:
        tokens = max(map(len, encode(row)))
        if check_gold and not gold_is_gradable(row["answer"]):
            bad.append(row)
        elif tokens > max_prompt_tokens:
            long.append(row)
        else:
            kept.append(row)
            longest = max(longest, tokens)
    for dropped, why in ((bad, "an answer that the grader cannot parse"), (long, f"a prompt over {max_prompt_tokens} tokens")):
        if dropped:
            print(f"dropped {len(dropped)} of {len(rows)} rows with {why}, first: id {printable(dropped[0]['id'])}")
    if not kept:
        refuse(f"none of the {len(rows)} rows is usable: {len(bad)} answers not parsable, {len(long)} prompts over "
               f"--max_prompt_tokens {max_prompt_tokens}")
    return kept, longest


def load_problems(args: Any) -> tuple[list[dict], list[dict]]:
    """Rows to train on and held-out rows (maybe none): from --dataset and --eval_dataset, or the demo's own.

    Of a larger data set --max_rows are drawn by the seed, as SGPO's paper draws 8.5K of 46K.
    """
    if args.model == "demo" and args.dataset is None:
        train, held_out = demo_rows()
    else:
        train, held_out = load_rows(args.dataset or DEFAULT_DATASET), []
    if 0 < args.max_rows < len(train):
        drawn = np.random.default_rng([args.seed, 2 ** 31]).choice(len(train), args.max_rows, replace=False)
        print(f"{args.max_rows} of {len(train)} rows, drawn by --seed {args.seed} (--max_rows)")
        train = [train[i] for i in sorted(drawn)]
    return train, load_rows(args.eval_dataset) if args.eval_dataset else held_out


def batch_of_step(n_rows: int, step: int, size: int, seed: int) -> list[int]:
    """Row indices of a step (0-based): epochs of seeded permutations laid end to end, cut into batches.

    A pure function of (seed, step): the step number is the whole data cursor, so a resumed run cannot be off by one.
    """
    wanted = range(step * size, (step + 1) * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n_rows) for epoch in range(wanted[0] // n_rows, wanted[-1] // n_rows + 1)}
    return [int(orders[k // n_rows][k % n_rows]) for k in wanted]


def seed_everything(*key: int) -> None:
    """Seed every RNG from (seed, step), differently in each process: nothing of their state has to be saved for an exact resume."""
    seed = int(np.random.SeedSequence(key, spawn_key=(rank(),) if rank() else ()).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------- prompts

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."


def build_prompt(tokenizer, problem: str, system_prompt: str = SYSTEM_PROMPT, strategy: str | None = None) -> list[int]:
    """Token ids of a prompt, up to where the model's answer begins; a strategy is put before the problem.

    Through the tokenizer's chat template. A tokenizer without one (a base model's) gets plain text: the system prompt, the
    problem and "Solution:", separated by blank lines.
    """
    user = problem if strategy is None else f"Strategy:\n{strategy}\n\nProblem:\n{problem}"
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(filter(None, [system_prompt, user, "Solution:"]))).input_ids
    messages = [{"role": "user", "content": user}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # some templates (Gemma's) refuse the system role
        text = tokenizer.apply_chat_template([{"role": "user", "content": "\n\n".join(filter(None, [system_prompt, user]))}],
                                             tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template has written them


# ---------------------------------------------------------------- models

GPU_CHUNK, CPU_CHUNK = 2 ** 26, 2 ** 23  # logits a chunk: 256 MiB in fp32; 32 MiB, what a CPU's cache nearly holds
VOCABULARY_CHUNK = GPU_CHUNK if torch.cuda.is_available() else CPU_CHUNK
READ_ONLY_CHUNKS = 1 if torch.cuda.is_available() else 4  # without a gradient a CPU keeps less of a chunk, and a larger one is quicker
BATCH_COST = 256 if torch.cuda.is_available() else 32  # what a micro-batch costs whatever is in it, in tokens


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_path(name: str, flag: str = "--model") -> str:
    """Hub id or directory to load from: the name itself, but for the built-in models, which are made at their first use."""
    if flag == "--teacher" and name in DEMO_TEACHERS:
        return str(demo_teacher_dir(name))
    return str(demo_dir()) if flag == "--model" and name == "demo" else name


def load_tokenizer(name: str, flag: str = "--model"):
    """The tokenizer of a hub id or local directory; a pad token is chosen where there is none."""
    path = model_path(name, flag)
    if not os.path.isdir(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        refuse(f"{flag} {name}: no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not tokenizer("1 + 1 = 2").input_ids:  # a directory without one can give an empty shell
            raise ValueError("it has no vocabulary")
    except Exception as error:  # which of a dozen kinds depends on the missing file
        refuse(f"{flag} {name}: no tokenizer can be loaded from it ({str(error).strip().splitlines()[0]}); save one beside the weights")
    if tokenizer.eos_token_id is None:
        refuse(f"{flag} {name}: its tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks go by position, never by id
    return tokenizer


def shared_vocabulary(tokenizer, other, name: str) -> int:
    """How many ids two tokenizers share: the smaller length. Refused where one of them spells different strings.

    Embedding tables are padded to widths that say nothing, so the tokenizers' lengths count. Reads no weight.
    """
    shared = min(len(tokenizer), len(other))
    ours, theirs = (t.convert_ids_to_tokens(list(range(shared))) for t in (tokenizer, other))
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            refuse(f"--teacher {name}: its tokenizer is not the student's: token {i} is {a!r} to the student and {b!r} to the teacher")
    return shared


def load_model(name: str, flag: str = "--model", dtype: torch.dtype = torch.float32, device=None):
    """The causal LM of a hub id or local directory, on the picked device, for reading and sampling; `load_policy` is for training.

    Dropout is off: the policy that is scored must be the policy that was sampled.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path(name, flag), dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        refuse(f"{flag} {name}: no causal language model can be loaded from it ({str(error).strip().splitlines()[0]})", alone=True)
    model.to(device or pick_device())
    _without_dropout(model)
    _check_head(model, name, flag)
    return model.eval()


def _without_dropout(model) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def load_policy(name: str, flag: str = "--model", trained: bool = True, activation_checkpointing: bool = False, cpu_offload: bool = False):
    """The model of a hub id or local directory, spread over all processes by FSDP2.

    Trained in fp32 shards, because these are the optimizer's masters: at lr 1e-6 a bf16 weight rounds almost every update away. On CUDA it computes in
    bf16 and adds gradients up in fp32. With `cpu_offload` shards, gradients and optimizer stay in CPU memory. One process on a CPU needs none of
    this and gets the plain model. Read-only models (`trained` False) are bf16 on CUDA. The first process reads the weights and hands them out.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu and not trained else torch.float32
    plain = load_model(name, flag, dtype, "cpu") if rank() == 0 else None
    start = [(k, tuple(p.shape), p.flatten()[:64].tolist()) for k, p in plain.named_parameters()] if plain else None
    model = _sharded(plain, name, flag, dtype, cpu_offload) if dist.is_initialized() or on_gpu else plain
    model.fingerprint = from_first(start and hashlib.sha256(repr(start).encode()).hexdigest())  # tells whether two runs start from the same weights
    if activation_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model.requires_grad_(trained).eval()


def _sharded(plain, name: str, flag: str, dtype: torch.dtype, cpu_offload: bool):
    if not dist.is_initialized():  # one process, one GPU: FSDP2 still wants a group
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    device = pick_device()
    config = AutoConfig.from_pretrained(model_path(name, flag))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    _without_dropout(model)
    settings = {"mesh": init_device_mesh(device.type, (world(),)), "reshard_after_forward": world() > 1 or cpu_offload}
    if device.type == "cuda":
        settings |= {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
        if cpu_offload:
            settings |= {"offload_policy": CPUOffloadPolicy()}
    for layer in _layers(model):
        fully_shard(layer, **settings)
    fully_shard(model, **{**settings, "reshard_after_forward": False})  # embedding and head: used at both ends of a pass
    for module in _shards(model):
        module.set_gradient_divide_factor(1.0)  # our normalisers are global already: gradients are added, not averaged
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu" if cpu_offload and device.type == "cuda" else device)
    set_model_state_dict(model, plain.state_dict() if plain else {}, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    buffers = from_first({k: v.cpu() for k, v in plain.named_buffers()} if plain else None)
    for path, buffer in buffers.items():
        owner, _, leaf = path.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=leaf not in model.get_submodule(owner)._non_persistent_buffers_set)
    model.generation_config = from_first(plain.generation_config if plain else None)
    model.as_forward = lambda fn: fn()
    register_fsdp_forward_method(model, "as_forward")
    return model


def _layers(model) -> torch.nn.ModuleList:
    """The stack of decoder layers, where most of the weights are."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=lambda m: sum(p.numel() for p in m.parameters()))


def _shards(model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def device_of(model) -> torch.device:
    """Where a model computes; its shards may rest in CPU memory."""
    return pick_device() if isinstance(model, FSDPModule) else model.device


def as_forward(model, fn: Callable[[], Any]) -> Any:
    """fn() as one forward pass of a sharded model, so that FSDP2 gathers what it uses and reduces its gradients. A plain model just calls it."""
    return model.as_forward(fn) if isinstance(model, FSDPModule) else fn()


def within_memory(accumulate: Callable[[], Any], optimizer, args: Any) -> Any:
    """accumulate() and, should the GPU's memory not do, once more with half of --microbatch_tokens, which stays so."""
    try:
        return accumulate()
    except torch.OutOfMemoryError:
        if world() > 1:  # the others are in the middle of a pass
            refuse(f"out of GPU memory with --microbatch_tokens {args.microbatch_tokens}: lower it and --resume", alone=True)
    optimizer.zero_grad()
    torch.cuda.empty_cache()
    args.microbatch_tokens //= 2
    print(f"out of GPU memory: going on with --microbatch_tokens {args.microbatch_tokens}")
    try:
        return accumulate()
    except torch.OutOfMemoryError:
        refuse(f"out of GPU memory with --microbatch_tokens {args.microbatch_tokens}, half of what was asked for: --resume with "
               "--activation_checkpointing, --cpu_offload or a smaller --max_new_tokens")


@contextmanager
def rollout_weights(model) -> Iterator[torch.nn.Module]:
    """The whole model for `generate`, as it is now, in the precision in which it computes (bf16 on CUDA: half the bytes to read a token).

    A plain module without FSDP2's hooks on the gathered weights, so that processes may write different numbers of tokens.
    """
    if not isinstance(model, FSDPModule):
        yield model
        return
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    for module in _shards(model):
        module.unshard()
    whole.load_state_dict({k: v.detach() for k, v in model.named_parameters(remove_duplicate=False)} | {
        k: v for k, v in model.named_buffers() if k in whole.state_dict()}, assign=True)
    for path, buffer in model.named_buffers():
        owner, _, leaf = path.rpartition(".")
        setattr(whole.get_submodule(owner), leaf, buffer)
    whole.generation_config = model.generation_config
    try:
        yield whole.requires_grad_(False).eval()
    finally:
        for module in _shards(model):
            module.reshard()


def whole_state(model) -> dict[str, Tensor]:
    """All weights, in the first process's CPU memory; {} in the others."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def clip_gradients(model, max_norm: float) -> float:
    """Scale the gradient to at most this norm -> its norm before, over all processes."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _check_head(model, name: str, flag: str = "--model") -> None:
    """We compute logits as hidden states x lm_head, in chunks: refuse a model that does something more (a soft cap, a scale)."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
        refuse(f"{flag} {name}: {type(model).__name__} changes its logits after lm_head, which these scripts do not support", alone=True)


def context_length(model_name: str, flag: str = "--model") -> int:
    """Positions that the model has, from its config alone."""
    config = AutoConfig.from_pretrained(model_path(model_name, flag)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def check_context(model_name: str, longest_prompt: int, max_new_tokens: int, flag: str = "--model") -> None:
    """Refuse completions that would run past the model's positions."""
    context = context_length(model_name, flag)
    if longest_prompt + max_new_tokens > context:
        refuse(f"--max_new_tokens {max_new_tokens} plus the longest prompt ({longest_prompt} tokens) exceeds the {flag[2:]}'s context of "
               f"{context}; use at most --max_new_tokens {max(context - longest_prompt, 0)}")


def memory_needs(config, samples: int, prompt: int, completion: int, microbatch_tokens: int, on_gpu: bool, processes: int = 1,
                 activation_checkpointing: bool = False, cpu_offload: bool = False, teacher=None) -> dict[str, float]:
    """Bytes that one process takes for a step, from the configs alone; `peak` on the device where it computes, `host` what rests in CPU memory.

    `samples` completions of `completion` tokens are written at once behind prompts of at most `prompt`. Fitted to measured peaks on CPUs (README).
    """
    def parameters(config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())

    text, total, size = config.get_text_config(), parameters(config), 2 if on_gpu else 4  # bytes of a computed number
    d, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    f, head = getattr(text, "intermediate_size", None) or 4 * d, getattr(text, "head_dim", None) or d // text.num_attention_heads
    q, kv = head * text.num_attention_heads, head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    layer = size * (6 * d + 2 * q + 2 * kv + 4 * f) + 4 * d * on_gpu  # what backward wants of a token and layer
    tokens = max(min(microbatch_tokens, samples * (prompt + completion)), prompt + completion)
    chunk = 4 * min(GPU_CHUNK if on_gpu else CPU_CHUNK, tokens * vocabulary)
    share = total / processes
    needs = {"weights, gradients, Adam": 16 * share, "weights gathered for rollouts": 2 * total * on_gpu,
             "key-value cache": 1.4 * samples * (prompt + completion) * 2 * layers * kv * size, "logits of a rollout": samples * vocabulary * 24,
             "activations": tokens * (layers * size * d + 3 * layer if activation_checkpointing else (layers + 1.5) * layer),
             "vocabulary head": 4 * chunk + (2 * size + 2) * vocabulary * d,
             "teacher": 2 * (2 - on_gpu) * parameters(teacher) / processes if teacher else 0.0, "host": 0.0, "base": 0.39e9}
    if on_gpu:  # what FSDP2 has gathered at once: embedding, head, two layers, and their gradients
        needs["activations"] += 4 * (total - vocabulary * d) / layers * 2 + 4 * vocabulary * d
    if cpu_offload:
        needs |= {"host": needs["weights, gradients, Adam"], "weights, gradients, Adam": 0.0}
    resting = needs["weights, gradients, Adam"] + needs["teacher"] + needs["base"]
    gradients = 0 if cpu_offload else 4 * share  # there are none yet in a rollout
    rollout = needs["weights gathered for rollouts"] + needs["key-value cache"] + needs["logits of a rollout"] - gradients
    return needs | {"peak": resting + max(rollout, needs["activations"] + needs["vocabulary head"]),
                    "least": resting + max(rollout - needs["key-value cache"] * (1 - 1 / samples), needs["activations"] + needs["vocabulary head"])}


def memory_here() -> tuple[float, float]:
    """Bytes of this process's GPU (0 without one) and of CPU memory that is free, as far as a container lets us."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if torch.cuda.is_available() else 0.0
    free = float(re.search(r"MemAvailable: +([0-9]+)", Path("/proc/meminfo").read_text())[1]) * 1024 if os.path.exists("/proc/meminfo") else float("inf")
    limit = Path("/sys/fs/cgroup/memory.max")
    return gpu, min(free, float(limit.read_text()) if limit.exists() and limit.read_text().strip().isdigit() else free)


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"


def fit_memory(args: Any, samples: int, longest_prompt: int, gpu: float | None = None, host: float | None = None) -> str:
    """Before any weight is loaded: switch --activation_checkpointing and --cpu_offload on where they are left open and memory asks for them -> the
    plan's line, or a refusal that says what would fit. `gpu` and `host`: bytes that are there, this machine's if not given."""
    here = from_first(memory_here())
    gpu, host = here[0] if gpu is None else gpu, here[1] if host is None else host
    config, teacher = AutoConfig.from_pretrained(model_path(args.model)), None
    if getattr(args, "teacher", None) and not args.teacher_device:
        teacher = AutoConfig.from_pretrained(model_path(args.teacher, "--teacher"))

    def needs(processes: int = world(), microbatch_tokens: int = args.microbatch_tokens, **way: bool) -> dict[str, float]:
        return memory_needs(config, -(-samples // processes), longest_prompt, args.max_new_tokens, microbatch_tokens, gpu > 0, processes,
                            teacher=teacher, **way)

    def fits(**chosen) -> bool:
        need, beside = needs(**chosen), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return need["least"] <= 0.95 * gpu and need["host"] * beside <= host if gpu else need["least"] * beside <= host

    flags = {"cpu_offload": args.cpu_offload if gpu else False, "activation_checkpointing": args.activation_checkpointing}
    choices = [[False, True] if value is None else [value] for value in flags.values()]
    ways = [dict(zip(flags, values)) for values in itertools.product(*choices)]  # the cheapest first
    way = next((way for way in ways if fits(**way)), ways[-1])
    need = needs(**way)
    parts = ", ".join(f"{gigabytes(need[name])} {name}" for name in list(need)[:7] if need[name])
    line = (f"{gigabytes(need['peak'])} a process" + f" and {gigabytes(need['host'])} of host memory" * bool(need["host"]) + f" at most ({parts}); here: "
            + f"{gigabytes(gpu)} GPU, " * bool(gpu) + f"{gigabytes(host)} host")
    if not fits(**way):
        fewer = [f"--microbatch_tokens {n}" for n in (args.microbatch_tokens // 2 ** k for k in range(1, 15)) if n >= 256 and fits(microbatch_tokens=n, **way)]
        more = [f"torchrun --nproc-per-node {n}" for n in (2, 4, 8, 16, 32, 64) if gpu and n > world() and fits(processes=n, **way)]
        advice = " or ".join(fewer[:1] + more[:1] + [f"--{flag}" for flag, value in flags.items() if value is False and gpu])
        line = f"--model {args.model} needs {line}; {'try ' + advice if advice else 'take a smaller model, --max_new_tokens or a larger machine'}"
        return f"DOES NOT FIT: {line}" if args.dry_run else refuse(line)
    for flag, value in way.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
            line += f"; --{flag}" * value
    return line


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion. Qwen2.5-Instruct has two, and one of them is also its pad."""
    ids = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config):
        more = getattr(config, "eos_token_id", None)
        ids += more if isinstance(more, (list, tuple)) else [more]
    return sorted({i for i in ids if i is not None})


# ---------------------------------------------------------------- rollouts

LOOP_MODELS = ("llama", "qwen2", "qwen3")  # model types whose tokens our decode loop writes as transformers' generate does (tests)
FAST_MODELS: tuple[str, ...] = ()  # those whose CUDA graph a GPU has confirmed, too
_rows_at_once, _warned = sys.maxsize, set()  # as many rows as memory has been seen to hold; what has been said already


@torch.no_grad()
def generate(model, prompts: list[list[int]], eos: list[int], pad: int, max_new_tokens: int, temperature: float, top_p: float,
             watch: StoppingCriteria | None = None, fast_rollout: str = "auto") -> Tensor:
    """A completion for each prompt, all sampled at once -> ids [N, C], `pad` behind their ends, on the model's device.

    `fast_rollout`: "off" is transformers' generate; "auto", for model types known to be the same by it, a decode loop that reads equal prompts once
    and leaves ended rows out; "on" that loop for any model, with a CUDA graph. Its draws are made beforehand, one for each row and place, so that a row's
    tokens do not depend on which others are written beside it. Temperature and nucleus are as given, the checkpoint's own generation_config has no
    part. Out of memory, half the rows are written at a time. eval mode: in train mode activation checkpointing drops the cache.
    """
    global _rows_at_once
    looped = fast_rollout == "on" or fast_rollout == "auto" and model.config.model_type in LOOP_MODELS
    training, parts = model.training, []
    draws = torch.rand(len(prompts), max_new_tokens if looped else 0, device=model.device)
    model.eval()
    try:
        while (first := sum(map(len, parts))) < len(prompts) and not (parts and getattr(watch, "stopped", False)):
            rows, part = slice(first, first + min(_rows_at_once, len(prompts))), None
            try:
                part = (_write(model, prompts[rows], draws[rows], eos, pad, temperature, top_p, watch, _is_fast(model, fast_rollout)) if looped else
                        _generate(model, prompts[rows], eos, pad, max_new_tokens, temperature, top_p, watch))
            except torch.OutOfMemoryError:
                if len(prompts[rows]) == 1:
                    refuse(f"out of memory with a single completion: lower --max_new_tokens {max_new_tokens}", alone=True)
            if part is None:  # outside of `except`, whose traceback holds the tensors that were too many
                torch.cuda.empty_cache()
                _rows_at_once = len(prompts[rows]) // 2
                print(f"warning: out of memory with {len(prompts[rows])} completions at once, going on with {_rows_at_once}", file=sys.stderr)
            else:
                parts.append(part)
    finally:
        model.train(training)
    width = max(part.shape[1] for part in parts)
    out = torch.full((len(prompts), width), pad, device=model.device)
    for part, first in zip(parts, itertools.accumulate(map(len, parts), initial=0)):
        out[first:first + len(part), :part.shape[1]] = part
    return out


def _generate(model, prompts: list[list[int]], eos: list[int], pad: int, max_new_tokens: int, temperature: float, top_p: float, watch) -> Tensor:
    """transformers' generate, with every sampling setting explicit: what is left open it fills from the checkpoint's own generation_config
    (Qwen2.5-Instruct's has top_k 20 and a repetition penalty), so that is put aside."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=0, repetition_penalty=1.0,
                              num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, use_cache=True)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[watch] if watch is not None else None)[:, width:]
    finally:
        model.generation_config = own


def _write(model, prompts: list[list[int]], draws: Tensor, eos: list[int], pad: int, temperature: float, top_p: float, watch, fast: bool) -> Tensor:
    """The decode loop, for rows that fit into memory; `draws` [n, C] uniform in [0, 1)."""
    out, ends = torch.full(draws.shape, pad, device=draws.device), torch.tensor(eos, device=draws.device)
    decoder = _Decoder(model, prompts, draws.shape[1], fast)
    rows = torch.arange(len(prompts), device=draws.device)  # those still in the batch
    ended = torch.zeros_like(rows, dtype=torch.bool)
    logits = decoder.begin()
    for t in range(draws.shape[1]):
        tokens = sample(logits, draws[rows, t], temperature, top_p)
        out[rows, t] = tokens.where(~ended, pad)
        ended |= torch.isin(tokens, ends)
        live = (~ended).nonzero()[:, 0]
        if not len(live) or watch is not None and watch(out[rows, :t + 1], logits).any() or t + 1 == draws.shape[1]:
            break
        if len(live) <= decoder.PAYS * len(rows):  # a row that has ended costs as much as one that has not
            decoder.keep(live)
            rows, ended, tokens = rows[live], ended[live], tokens[live]
        logits = decoder.next(tokens)
    return out[:, :t + 1]


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """[n, V] logits, [n] uniform draws -> [n] ids by the inverse of the distribution function; at temperature 0 the likeliest.

    Nucleus: the likeliest tokens, in order, as long as those before them hold less than top_p. A few rows at a time, since this is done in float64: in
    fp32 the unlikely half of a large vocabulary would be lost between two steps of the sum.
    """
    if not temperature:
        return logits.argmax(-1)
    picked = []
    for some, draw in zip(*(x.split(max(VOCABULARY_CHUNK // (8 * logits.shape[1]), 1)) for x in (logits, draws))):
        p, ids = (some.float() / temperature).softmax(-1), None
        if top_p < 1:
            likeliest = p.topk(min(1024, p.shape[1]))
            p, ids = likeliest if (likeliest.values.sum(1) >= top_p).all() else p.sort(descending=True)
        total = p.cumsum(1, dtype=torch.float64)
        if top_p < 1:
            p = p * (total - p < top_p)
            total = p.cumsum(1, dtype=torch.float64)
        index = torch.searchsorted(total, draw[:, None] * total[:, -1:], right=True).clamp_(max=p.shape[1] - 1)
        picked.append((index if ids is None else ids.gather(1, index))[:, 0])
    return torch.cat(picked)


class _Decoder:
    """The forward passes of a rollout. Equal prompts are read once. `fast`: each token's pass is a CUDA graph over a cache of fixed size."""

    def __init__(self, model, prompts: list[list[int]], max_new_tokens: int, fast: bool):
        self.model, self.fast, self.replay, self.PAYS = model, fast, None, 0.5 if fast else 0.9
        distinct = {tuple(prompt): k for k, prompt in reversed(list(enumerate(prompts)))}
        order = {prompt: k for k, prompt in enumerate(distinct)}
        self.rows = torch.tensor([order[tuple(prompt)] for prompt in prompts], device=model.device)  # which of the distinct prompts each row has
        self.length = max(map(len, distinct))  # of the cache, with the padding on the left
        self.ids = torch.tensor([[0] * (self.length - len(p)) + list(p) for p in distinct], device=model.device)
        self.starts = torch.tensor([self.length - len(p) for p in distinct], device=model.device)
        self.padded = bool((self.starts > 0).any())
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [_Layer(self.length + max_new_tokens) if type(layer) is DynamicLayer else layer for layer in self.cache.layers]

    def _pass(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """ids [n, t] -> logits [n, V] of what follows the last."""
        out = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True)
        return self.model.get_output_embeddings()(out.last_hidden_state[:, -1])

    def _mask(self, length: int) -> Tensor | None:
        """[n, length] True where there is a token and no padding."""
        return torch.arange(length, device=self.starts.device) >= self.starts[:, None] if self.padded else None

    def begin(self) -> Tensor:
        """Read the prompts -> logits [N, V]."""
        places = torch.arange(self.length, device=self.starts.device) - self.starts[:, None]
        logits = self._pass(self.ids, self._mask(self.length), places.clamp(min=0))[self.rows]
        self.keep(self.rows)
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; one may come several times."""
        self.cache.batch_select_indices(rows)
        self.starts, self.replay = self.starts[rows], None

    def next(self, tokens: Tensor) -> Tensor:
        """The tokens [n] that the rows have chosen -> logits [n, V]."""
        self.length += 1
        positions = (self.length - 1 - self.starts)[:, None]
        if self.fast:
            try:
                return self._fast_next(tokens, positions)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warn_once(f"--fast_rollout: {str(error).splitlines()[0]}; going on without")
                self.fast = False
                for layer in self.cache.layers:
                    layer.at = None
        return self._pass(tokens[:, None], self._mask(self.length), positions)

    def _fast_next(self, tokens: Tensor, positions: Tensor) -> Tensor:
        at = self.length - 1
        if self.replay is None or at == self.here.shape[-1]:  # other rows, or no room left: a new graph
            self.tokens, self.positions, self.at = tokens[:, None].clone(), positions.clone(), torch.tensor([at], device=tokens.device)
            room = {layer.fix(at, self.at) for layer in self.cache.layers}.pop()
            self.here = (torch.arange(room, device=tokens.device) >= self.starts[:, None])[:, None, None]
            self.here[..., at + 1:] = False
            self.replay = _captured(lambda: self._pass(self.tokens, self.here, self.positions))
        self.tokens.copy_(tokens[:, None])
        self.positions.copy_(positions)
        self.at.fill_(at)
        self.here[..., at] = True
        return self.replay()


class _Layer(DynamicLayer):
    """A layer's keys and values [n, heads, T, d], written into room made beforehand: `cat` would copy all of them at every token."""
    ROOM, room, at = 256, None, None  # tokens by which it grows; [n, heads, >= T, d] twice; where to write, if the whole room is read

    def __init__(self, most: int):
        super().__init__()
        self.most, self.is_initialized = most, True

    def get_seq_length(self) -> int:
        return 0 if self.room is None else self.keys.shape[2]

    def _enlarge(self, length: int, states: Sequence[Tensor]) -> None:
        old, size = self.get_seq_length(), min(-(-length // self.ROOM) * self.ROOM, self.most)
        self.room = [x.new_zeros(*x.shape[:2], size, x.shape[3]) for x in states]
        if old:
            self.room[0][:, :, :old], self.room[1][:, :, :old] = self.keys, self.values

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.at is not None:
            for room, new in zip(self.room, (keys, values)):
                room.index_copy_(2, self.at, new)
            return tuple(self.room)
        old = self.get_seq_length()
        length = old + keys.shape[2]
        if self.room is None or length > self.room[0].shape[2]:
            self._enlarge(length, (keys, values))
        for room, new in zip(self.room, (keys, values)):
            room[:, :, old:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values

    def fix(self, length: int, at: Tensor) -> int:
        """From now on write at `at` and read the whole room, which holds `length` tokens -> the room."""
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        if length == self.room[0].shape[2]:
            self._enlarge(length + 1, self.room)
        self.at = at
        return self.room[0].shape[2]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.room = [room[indices] for room in self.room]
        length = self.keys.shape[2]
        self.keys, self.values = (room[:, :, :length] for room in self.room)


def _captured(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of forward(), which reads and writes the same tensors every time -> its replay. Without a GPU forward itself."""
    if not torch.cuda.is_available():
        return forward
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up in a first pass
        forward()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward()
    return lambda: (graph.replay(), logits)[1]


def _is_fast(model, fast_rollout: str) -> bool:
    """Is a CUDA graph to be tried with this model?"""
    if fast_rollout == "off" or fast_rollout == "auto" and model.config.model_type not in FAST_MODELS:
        return False
    reason = "needs a GPU" if model.device.type != "cuda" else ""
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        reason = f"{model.config.model_type} has layers without full attention"
    if reason:
        warn_once(f"--fast_rollout: {reason}; going on without")
    return not reason


def warn_once(message: str) -> None:
    if message not in _warned and rank() == 0:
        print(f"warning: {message}", file=sys.stderr)
    _warned.add(message)


# ---------------------------------------------------------------- log-probs in training

def completion_mask(completions: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """[N, C] ids -> mask [N, C], True up to and including the FIRST end token, and truncated [N], True where there is none.

    By position, not by `ids != pad`: where pad is also an end token that would drop the stop token from the loss.
    """
    is_end = torch.isin(completions, torch.tensor(eos, device=completions.device))
    ends_before = is_end.cumsum(1) - is_end.long()
    return ends_before == 0, ~is_end.any(1)


def microbatches(lengths: Sequence[int], budget: int, per_batch: int | None = None) -> list[list[int]]:
    """Indices sorted by length and cut so that (longest in the cut) x (rows in it) <= budget tokens; a longer row stands alone.

    Of all such cuts the one of the least cost, that is padded tokens plus `per_batch` for every batch: what a pass costs whatever is in it, in tokens.
    """
    per_batch = BATCH_COST if per_batch is None else per_batch
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best = [(0, 0)]  # of the first k rows: the least cost, and where the last batch begins
    for k in range(1, len(order) + 1):
        begins = itertools.takewhile(lambda j: j == k - 1 or lengths[order[j]] * (k - j) <= budget, range(k - 1, -1, -1))
        best.append(min((best[j][0] + lengths[order[j]] * (k - j) + per_batch, j) for j in begins))
    batches, k = [], len(order)
    while k:
        batches.insert(0, order[best[k][1]:k])
        k = best[k][1]
    return batches


def padded(completions: Sequence[list[int]], device) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids [n, C], 0 behind their ends, and mask [n, C]."""
    width = max(map(len, completions), default=1)
    ids = torch.tensor([c + [0] * (width - len(c)) for c in completions], device=device, dtype=torch.long).view(-1, width)
    return ids, torch.arange(width, device=device) < torch.tensor([len(c) for c in completions], device=device)[:, None]


def completion_hidden(model, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states [M, d] at the positions that predict each real completion token, row by row (M = mask.sum()).

    Rows are laid out prompt + completion, padded on the RIGHT only: causal attention never looks there, so no attention mask is
    needed and sdpa takes its fast path. Token t of the completion is predicted at position P + t - 1.
    """
    lengths, device = mask.sum(1).tolist(), device_of(model)
    rows = [p + c[:n] for p, c, n in zip(prompts, completions.tolist(), lengths, strict=True)]
    width = max(map(len, rows), default=2) - 1  # the last token predicts nothing
    ids = torch.tensor([(r + [0] * width)[:width] for r in rows or [[]]], device=device)  # no row: one token, of which nothing is returned
    row, t = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(p) for p in prompts], device=device, dtype=torch.long)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[row, starts[row] + t - 1]


def over_vocabulary(fn: Callable[..., tuple[Tensor, ...]], model, hiddens: Sequence[Tensor], per_token: Sequence[Tensor] = (),
                    temperature: float = 1.0) -> tuple[Tensor, ...]:
    """fn(*logits, *per_token) -> tensors [m], applied to chunks of tokens so that no [M, V] tensor ever exists.

    `hiddens` are [M, d] each, their fp32 logits [m, V] are divided by the sampling temperature. The logits are computed again
    in backward, so memory is flat in M. Gradients go to hiddens and head, not to `per_token` or what `fn` brings along.
    """
    head = model.get_output_embeddings()
    size = max(VOCABULARY_CHUNK * (1 if torch.is_grad_enabled() else READ_ONLY_CHUNKS) // head.weight.shape[0], 1)
    return _OverVocabulary.apply(fn, temperature, size, len(hiddens), head.weight, head.bias, *hiddens, *per_token)


class _OverVocabulary(torch.autograd.Function):
    """The chunks of `over_vocabulary`. All of them add to one fp32 gradient of the head in place; autograd would make one each."""

    @staticmethod
    def chunks(temperature: float, size: int, n: int, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[tuple[list, list, list]]:
        """-> hidden states, their logits, what else fn takes; of `size` tokens at a time."""
        for parts in zip(*[x.split(size) for x in tensors], strict=True):
            yield parts[:n], [torch.nn.functional.linear(h, weight, bias).float().div_(temperature) for h in parts[:n]], parts[n:]

    @staticmethod
    def forward(ctx, fn, temperature, size, n, weight, bias, *tensors):
        ctx.fn, ctx.temperature, ctx.size, ctx.n = fn, temperature, size, n
        ctx.save_for_backward(weight, bias, *tensors)
        ctx.set_materialize_grads(False)
        out = [fn(*logits, *rest) for _, logits, rest in _OverVocabulary.chunks(temperature, size, n, weight, bias, tensors)]
        out = tuple(torch.cat(parts) for parts in zip(*out, strict=True))
        ctx.mark_non_differentiable(*[x for x in out if not x.is_floating_point()])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        weight, bias, *tensors = ctx.saved_tensors
        wanted, size = ctx.needs_input_grad, ctx.size
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wanted[4] else None
        of_bias = torch.zeros_like(bias) if wanted[5] else None
        of_hiddens = [torch.zeros_like(h) if wanted[6 + i] else None for i, h in enumerate(tensors[:ctx.n])]
        for k, (hiddens, logits, rest) in enumerate(_OverVocabulary.chunks(ctx.temperature, size, ctx.n, weight, bias, tensors)):
            with torch.enable_grad():
                out = ctx.fn(*[x.requires_grad_() for x in logits], *rest)
                out, upstream = zip(*[(x, g[k * size:(k + 1) * size]) for x, g in zip(out, grads) if g is not None and x.requires_grad])
            of_logits = torch.autograd.grad(out, logits, upstream, allow_unused=True)
            del out
            for hidden, d, to in zip(hiddens, of_logits, of_hiddens):
                if d is not None:
                    d = d.div_(ctx.temperature).to(hidden.dtype)
                    if to is not None:
                        torch.mm(d, weight, out=to[k * size:(k + 1) * size])
                    if of_weight is not None and of_weight.dtype == d.dtype:
                        of_weight.addmm_(d.T, hidden)
                    elif of_weight is not None:
                        of_weight += d.T @ hidden
                    if of_bias is not None:
                        of_bias += d.sum(0)
        return None, None, None, None, None if of_weight is None else of_weight.to(weight.dtype), of_bias, *of_hiddens, *[None] * (len(tensors) - ctx.n)


def log_prob_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[m, V], [m] -> log pi(id) [m] and the policy's entropy [m] (nats, no gradient)."""
    log_norm = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = log_norm - ((logits - log_norm[:, None]).exp() * logits).sum(-1)
    return logits.gather(-1, ids[:, None])[:, 0] - log_norm, entropy


def completion_logps(model, prompts: list[list[int]], completions: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy [n, C] of every real completion token, 0 where the mask is False."""

    def forward() -> tuple[Tensor, Tensor]:
        hidden = completion_hidden(model, prompts, completions, mask)
        return over_vocabulary(log_prob_and_entropy, model, [hidden], [completions[mask]], temperature)

    flat = as_forward(model, forward)
    return tuple(torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x) for x in flat)


# ---------------------------------------------------------------- SFT warm-up

def solution_ids(tokenizer, row: dict) -> list[int]:
    """A solution as a completion. The end token belongs to it: it is taught too."""
    return tokenizer(row["solution"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]


def warmup_split(rows: list[dict], tokenizer, reward: Callable[[str, dict], float] | None, args: Any) -> tuple[list[dict], list[dict]]:
    """--warmup_frac of the rows that have a solution, drawn by the seed, for the SFT warm-up, and the rows of all other problems for RL.

    Only what RL would reward is taught: no solution that is longer than --max_new_tokens (who learns to write that much never gets to the end)
    or that the reward calls wrong.
    """
    solved = [i for i, row in enumerate(rows) if "solution" in row]
    wanted, taken, left_out = round(args.warmup_frac * len(solved)), [], Counter()
    order = np.random.default_rng([args.seed, 2 ** 31 + 1]).permutation(solved).astype(int).tolist()
    while order and len(taken) < wanted:
        drawn, order = order[:wanted - len(taken)], order[wanted - len(taken):]
        short = [i for i in drawn if len(solution_ids(tokenizer, rows[i])) <= args.max_new_tokens]
        right = from_first(score(reward, [rows[i]["solution"] for i in short], [rows[i] for i in short]) >= 0.5 if short and rank() == 0 else short)
        taken += [i for i, x in zip(short, right) if x]
        left_out["longer than --max_new_tokens"] += len(drawn) - len(short)
        left_out["wrong to the reward"] += len(short) - int(sum(right))
    grader_counts()  # belongs to no step
    taken = taken if len(taken) > 1 else []  # the least is one row to learn from and one to validate with
    if len(taken) < wanted:
        print(f"warm-up: {len(taken)} problems where {wanted} were wanted; solutions left out: "
              + (", ".join(f"{n} {why}" for why, n in left_out.items() if n) or "none, but it takes two"))
    problems = {rows[i]["problem"] for i in taken}
    rest = [row for row in rows if row["problem"] not in problems]
    if not rest and args.steps:
        refuse(f"--warmup_frac {args.warmup_frac} leaves no problem for RL: lower it, or give --steps 0 for the SFT baseline")
    return [rows[i] for i in sorted(taken)], rest


def sft_warmup(model, tokenizer, rows: list[dict], run: Run, args: Any) -> None:
    """SFT before RL, as in SGPO's paper: the weights with the lowest validation loss are left in the model and in <run>/warmup/.

    AdamW; --warmup_lr is reached linearly over the first tenth of the steps and falls to 0 on a cosine; the loss is the mean over all response
    tokens of a batch. A random tenth of the rows validates after each epoch. A run beside this one that has had the very same warm-up (rows,
    start, seed, flags) lends its result, so that methods are compared from the same weights. A killed warm-up goes on after its last whole epoch.
    """
    if not rows or run.checkpoints():
        return
    prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt) for row in rows]
    completions = [solution_ids(tokenizer, row) for row in rows]
    settings = {name: getattr(args, name) for name in ("seed", "warmup_lr", "warmup_batch_size", "warmup_epochs", "weight_decay", "max_grad_norm")}
    key = hashlib.sha256(repr((prompts, completions, settings, model.fingerprint)).encode()).hexdigest()
    final, best, unfinished = run.dir / "warmup", run.dir / "warmup.best", run.dir / "warmup.state"
    lender = from_first(next((f.parent for f in sorted(run.dir.parent.glob("*/warmup/warmup.json")) if key in f.read_text()), None))
    if lender:
        load_weights(lender, model)
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"warm-up: the weights of {lender}, which had the same one")
        return
    order = np.random.default_rng([args.seed, 2 ** 31 + 2]).permutation(len(rows))
    held_out, train = np.split(order, [max(1, round(len(rows) / 10))])
    per_epoch, device = -(-len(train) // args.warmup_batch_size), device_of(model)

    def loss_of(chosen: Sequence[int], learn: bool) -> float:
        """Mean -log pi of the response tokens of the rows, its gradient accumulated over micro-batches where `learn`."""
        tokens, mine, value = sum(len(completions[i]) for i in chosen), dealt(chosen), 0.0
        for some in in_step(microbatches([len(prompts[i]) + len(completions[i]) for i in mine], args.microbatch_tokens)):
            batch = [mine[k] for k in some]
            ids, mask = padded([completions[i] for i in batch], device)
            with torch.set_grad_enabled(learn):
                loss = -completion_logps(model, [prompts[i] for i in batch], ids, mask, 1.0)[0].sum() / tokens
            if learn:
                loss.backward()
            value += loss.item()
        return sum(everyones(value))

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.warmup_lr, weight_decay=args.weight_decay, fused=True)
    steps = per_epoch * args.warmup_epochs
    shape = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps).lr_lambdas[0]  # a function of the step alone
    losses = []
    if unfinished.exists():
        state = load_state(unfinished, model, optimizer, losses="", key="")
        if state["key"] != key:
            refuse(f"{unfinished} is a warm-up on other rows, weights or flags: remove it, or train into another --out")
        losses = json.loads(state["losses"])
    losses = losses or [{"epoch": 0, "validation": loss_of(held_out, False)}]
    bar = progress(steps, per_epoch * (len(losses) - 1), desc="warm-up", unit="step")
    watch = Watch(bar)
    for epoch in range(len(losses), args.warmup_epochs + 1):
        model.train()
        shuffled, seen = train[np.random.default_rng([args.seed, 2 ** 31 + 2, epoch]).permutation(len(train))], 0.0
        for k, batch in enumerate(np.array_split(shuffled, per_epoch)):
            for group in optimizer.param_groups:
                group["lr"] = args.warmup_lr * shape((epoch - 1) * per_epoch + k)
            seen += loss_of(batch, True) / per_epoch
            clip_gradients(model, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if watch.agreed():
                bar.close()
                run.stop(f"in epoch {epoch} of the warm-up")
        model.eval()
        losses.append({"epoch": epoch, "train": seen, "validation": loss_of(held_out, False)})
        bar.set_postfix_str(f"loss {seen:.3f}, validation {losses[-1]['validation']:.3f}")
        if losses[-1] == min(losses[1:], key=lambda x: x["validation"]):
            save_pretrained(model, tokenizer, best)
        save_state(unfinished, model, optimizer, losses=json.dumps(losses), key=key)
    bar.close()
    chosen = min(losses[1:], key=lambda x: x["validation"])
    load_weights(best, model)
    if rank() == 0:
        write_atomic(best / "warmup.json", json.dumps({"key": key, "problems": len(rows), "kept": chosen["epoch"], "losses": losses}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        best.rename(final)
        shutil.rmtree(unfinished)
    barrier()
    print(f"warm-up: {len(rows)} problems, validation loss {losses[0]['validation']:.3f} -> {chosen['validation']:.3f} "
          f"(epoch {chosen['epoch']} of {args.warmup_epochs}) -> {final}")


# ---------------------------------------------------------------- rewards

def load_reward(spec: str | None) -> Callable[[str, dict], float] | None:
    """`--reward FILE.py:function` -> that function of (response, row); None -> None, the math grader."""
    if spec is None:
        return None
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        refuse(f"--reward {spec}: write it as FILE.py:function, with a file that exists")
    module_spec = importlib.util.spec_from_file_location("custom_reward", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        refuse(f"--reward {spec}: {type(error).__name__}: {error}")


def score(reward: Callable[[str, dict], float] | None, texts: list[str], rows: list[dict]) -> Tensor:
    """Rewards [N] on the CPU: the custom reward's, or the math grader's 1.0 / 0.0. At least 0.5 counts as correct."""
    if reward is None:
        return torch.tensor(grade_batch(texts, [row["answer"] for row in rows]))
    values = []
    for text, row in zip(texts, rows, strict=True):
        try:
            values.append(float(reward(text, row)))
        except Exception as error:
            refuse(f"--reward failed on row {row['id']}: {type(error).__name__}: {error}", alone=True)
        if not np.isfinite(values[-1]):
            refuse(f"--reward gave {values[-1]} on row {row['id']}; it must be finite", alone=True)
    return torch.tensor(values)


# ---------------------------------------------------------------- asking another model

class Unanswered(Exception):
    """The endpoint cannot be used: no retry would help, or all have failed."""


def whole_lines(path: Path) -> None:
    """Before more is appended to a JSONL file: a last line that a kill has cut short is taken off, one that only lacks its end gets it."""
    if path.exists() and (tail := path.read_bytes().rpartition(b"\n")[2]):
        with open(path, "r+b") as file:
            try:
                json.loads(tail)
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            except ValueError:
                file.truncate(path.stat().st_size - len(tail))


class NoAnswer(str):
    """In the place of an answer: why there is none."""


CUT_OFF = NoAnswer("cut off at --strategist_max_new_tokens")


def is_url(name: str | None) -> bool:
    return bool(name) and name.lower().startswith(("http://", "https://"))


class Endpoint:
    """An OpenAI-compatible chat endpoint, for many threads at once.

    What may pass (429, 5xx, a dropped connection, a time-out, an answer that is not one) is tried again with growing pauses. A prompt that it
    refuses, or that alone finds no answer, costs only itself; a key or model that it does not know, or nothing but refusals, ends the program.
    Every answer is kept in `journal` at once, so that a killed run asks nothing twice.
    """
    TRIES, PAUSE, REFUSALS = 6, 1.0, 16  # PAUSE: seconds, doubled at each try

    def __init__(self, url: str, model: str, max_tokens: int, threads: int, journal: Path, watch: Watch):
        # Without a key of its own the client would send the user's Hugging Face token to whatever server this is.
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
        if not (self.key.isascii() and self.key.isprintable()):
            refuse("OPENAI_API_KEY: holds characters that no key has; set it again")
        self.client = InferenceClient(base_url=url, api_key=self.key, timeout=600)
        self.url, self.model, self.max_tokens, self.threads, self.journal = url, model, max_tokens, threads, journal
        self.watch, self.lock = watch, threading.Lock()
        self.answers, self.answered, self.refused, self.silent = {}, 0, 0, 0  # silent: failures since the last answer
        whole_lines(journal)
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
            entry = json.loads(line)
            self.answers[entry["request"]] = NoAnswer(entry["none"]) if "none" in entry else entry["answer"]

    def ask(self, prompts: Sequence[str], temperature: float) -> list[str]:
        """An answer, maybe a NoAnswer, to each prompt, one after the other; equal prompts are separate questions."""
        return [self._answer(prompt, nth, temperature) for nth, prompt in enumerate(prompts)]

    def _answer(self, prompt: str, nth: int, temperature: float) -> str:
        request = hashlib.sha256(repr((self.model, self.max_tokens, temperature, nth, prompt)).encode()).hexdigest()[:24]
        if request in self.answers:
            return self.answers[request]
        for attempt in range(self.TRIES):
            try:
                choice = self.client.chat_completion([{"role": "user", "content": prompt}], model=self.model, max_tokens=self.max_tokens,
                                                     temperature=temperature).choices[0]
                answer = CUT_OFF if choice.finish_reason == "length" else choice.message.content or ""
                break
            except Exception as error:  # the client's HTTP errors, its transport's, and whatever a malformed answer leads to
                response = getattr(error, "response", None)
                status, why = getattr(response, "status_code", None), self._without_key(error)
                if status in (400, 413, 422):  # this prompt's fault, unless it is all prompts'
                    self.refused += 1
                    if self.refused < self.REFUSALS or self.answered:
                        return NoAnswer("refused by the strategist")
                if isinstance(error, OfflineModeIsEnabled) or status is not None and status < 500 and status not in (408, 409, 425, 429):
                    raise Unanswered(f"{self.url} refuses: {why}")
                wait = self.PAUSE * 2 ** attempt * random.uniform(0.8, 1.2)
                try:
                    wait = max(wait, min(float(response.headers["Retry-After"]), 60))
                except (AttributeError, KeyError, ValueError):
                    pass
                if attempt + 1 < self.TRIES:
                    time.sleep(wait)
        else:
            self.silent += 1
            if self.answered and self.silent < self.REFUSALS:
                return NoAnswer(f"no answer in {self.TRIES} tries")
            raise Unanswered(f"{self.url} has not answered in {self.TRIES} tries: {why}")
        with self.lock:
            self.answers[request], self.answered, self.silent = answer, self.answered + 1, 0
            with open(self.journal, "a", encoding="utf-8") as file:
                file.write(json.dumps({"request": request, "none" if isinstance(answer, NoAnswer) else "answer": answer}) + "\n")
        return answer

    def each(self, work: Callable[[list], list], items: Sequence) -> Iterator:
        """work([item]) of every item, in threads -> results in the order in which they come; the first exception is raised here.

        Daemon threads: a request that hangs does not keep a stopped program alive.
        """
        todo, done, over = SimpleQueue(), SimpleQueue(), threading.Event()
        for item in items:
            todo.put(item)

        def worker() -> None:
            try:
                while not over.is_set():
                    done.put((work([todo.get_nowait()])[0], None))
            except Empty:
                pass
            except Exception as error:
                done.put((None, error))

        for _ in range(min(self.threads, len(items))):
            threading.Thread(target=worker, daemon=True).start()
        try:
            left = len(items)
            while left and not self.watch.stopped:
                try:
                    result, error = done.get(timeout=0.1)
                except Empty:
                    continue
                if error:
                    raise error
                left -= 1
                yield result
            if left:
                return
        finally:
            over.set()
        self.journal.unlink(missing_ok=True)  # all is in the results

    def _without_key(self, error: Exception) -> str:
        """Servers repeat the key they refuse: it belongs in no message."""
        text = f"{type(error).__name__}: {re.sub(r'For more information check: .*', '', str(error)).strip() or 'no message'}"
        return text.replace(self.key, "***") if self.key != "none" else text


class LocalChat:
    """A model on this machine, asked as an Endpoint is: many prompts at once, as many together as `BATCH_TOKENS` of prompt and answer allow."""
    ROWS, BATCH_TOKENS = 32, 2 ** 18

    def __init__(self, model, tokenizer, max_tokens: int, context: int, seed: int, watch: Watch):
        self.model, self.tokenizer, self.max_tokens, self.room, self.seed, self.watch = model, tokenizer, max_tokens, context - max_tokens, seed, watch
        self.eos = stop_ids(model, tokenizer)
        if self.room <= 0:
            refuse(f"--strategist_max_new_tokens {max_tokens} leaves no room for a prompt in the strategist's context of {context} tokens: lower it")

    def ask(self, prompts: Sequence[str], temperature: float) -> list[str]:
        """An answer, maybe a NoAnswer, to each prompt."""
        ids = [build_prompt(self.tokenizer, prompt, "") for prompt in prompts]
        answers = [NoAnswer("too long for the strategist")] * len(prompts)
        for batch in microbatches([len(i) + self.max_tokens for i in ids], self.BATCH_TOKENS, per_batch=self.BATCH_TOKENS):  # as few as can be
            batch = [k for k in batch if len(ids[k]) <= self.room]
            if batch and not self.watch.stopped:
                self.watch.rolling_out()
                out = generate(self.model, [ids[k] for k in batch], self.eos, self.tokenizer.pad_token_id, self.max_tokens, temperature, 0.95, self.watch)
                mask, truncated = completion_mask(out, self.eos)
                for k, completion, real, cut in zip(batch, out, mask, truncated):
                    answers[k] = CUT_OFF if cut else self.tokenizer.decode(completion[real], skip_special_tokens=True)
        return answers

    def each(self, work: Callable[[list], list], items: Sequence) -> Iterator:
        """work(some items) for all of them -> results one by one."""
        for first in range(0, len(items), self.ROWS * world()):
            seed_everything(self.seed, 2 ** 31 + 3, first)
            results = everyones(work(dealt(items[first:first + self.ROWS * world()])))
            if self.watch.agreed():  # in the middle of an answer
                return
            yield from (result for share in results for result in share)


# ---------------------------------------------------------------- run directory

class Run:
    """`--out`: config.json, metrics.jsonl, samples.jsonl, checkpoints/step_N.pt, model/.

    A directory that holds another configuration, or anything that is not a run, is refused. Resuming drops the rows of both
    logs that the checkpoint has not seen, so they end up as if the run had never stopped.
    """
    MAY_DIFFER = {"out", "resume", "steps", "save_every", "keep_checkpoints", "dry_run", "extract_only", "strategist", "strategist_model", "strategist_threads",
                  "cpu_offload", "activation_checkpointing", "microbatch_tokens", "fast_rollout"}
    MAX_NONFINITE, nonfinite = 5, 0

    def __init__(self, args: Any):
        """Check `--out` and write nothing yet: what is refused later must leave no trace."""
        script = Path(sys.argv[0]).stem
        if args.out is None:
            if args.resume:
                refuse("--resume needs --out, the directory of the run to go on with")
            args.out = from_first(f"runs/{script}-{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        self.dir, self.keep = Path(args.out), args.keep_checkpoints
        self.config = {"script": script, "flags": dataclasses.asdict(args), "command": [Path(sys.argv[0]).name, *sys.argv[1:]], **versions()}
        try:
            self._check(args)
        except OSError as error:
            refuse(f"--out {self.dir}: cannot be used ({error.strerror or error})")

    def _check(self, args: Any) -> None:
        path = self.dir / "config.json"
        if path.exists():
            try:
                old = json.loads(path.read_text())
                old = {"script": old["script"], **old["flags"]}
            except (ValueError, KeyError, TypeError):
                refuse(f"--out {self.dir}: its config.json is not one of ours; choose another directory")
            new = {"script": self.config["script"], **self.config["flags"]}
            differ = [f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted({*old, *new} - self.MAY_DIFFER) if old.get(k) != new.get(k)]
            if differ:
                refuse(f"--out {self.dir} holds a run with another configuration ({'; '.join(differ)}); choose another directory")
            if not args.resume:
                refuse(f"--out {self.dir} holds this run already; add --resume to go on with it, or choose another directory")
        elif self.dir.exists() and any(self.dir.iterdir()):  # raises NotADirectoryError on a file
            refuse(f"--out {self.dir} is not empty and holds no run of ours; choose another directory")
        elif args.resume:
            refuse(f"--resume: there is no run in --out {self.dir}")
        nearest = next(p for p in (self.dir, *self.dir.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK | os.X_OK) or not nearest.is_dir():
            refuse(f"--out {self.dir}: no permission to write in {nearest}")

    def create(self) -> None:
        """Make the directory, unless it is a resumed run's."""
        barrier()  # nobody looks any more whether it is there
        if rank() == 0:
            (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            if not (self.dir / "config.json").exists():
                write_atomic(self.dir / "config.json", json.dumps(self.config, indent=2) + "\n")
        barrier()

    def checkpoints(self) -> list[Path]:
        return sorted((self.dir / "checkpoints").glob("step_*"))

    def begin(self, model, optimizer) -> int:
        """Load the newest checkpoint of a resumed run -> number of finished steps."""
        step, found = 0, self.checkpoints()
        if found:
            step = load_state(found[-1], model, optimizer, step=0)["step"]
        for name in ("metrics", "samples") if rank() == 0 else ():  # what the checkpoint has not seen is done again
            path = self.dir / f"{name}.jsonl"
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                        if found and line.endswith("}\n") and json.loads(line)["step"] <= step]
                write_atomic(path, "".join(kept))
        barrier()
        return step

    def log(self, name: str, *rows: dict) -> None:
        """Append rows to `name` ("metrics" or "samples")."""
        if rank() == 0:
            path = self.dir / f"{name}.jsonl"
            with writing(path, path), open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def check_finite(self, metrics: dict) -> None:
        """An update with a gradient that is not finite is skipped; a row of steps with nothing else ends the run."""
        self.nonfinite = self.nonfinite + 1 if metrics["nonfinite_updates"] and not metrics["updates"] else 0
        if self.nonfinite == self.MAX_NONFINITE:
            refuse(f"the gradient was not finite in {self.nonfinite} steps one after the other, the last step {metrics['step']}; the weights of before are "
                   f"in {self.dir / 'checkpoints'}: lower --lr or look at the last samples of {self.dir / 'samples.jsonl'}")

    def evaluations(self) -> list[dict]:
        """The rows of metrics.jsonl with a held-out evaluation, first to last."""
        path = self.dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if "eval/accuracy" in row]

    def save_checkpoint(self, step: int, model, optimizer) -> None:
        """State after `step` finished steps. RNGs and data order are functions of (seed, step): the step stands for them."""
        if (folder := self.dir / "checkpoints" / f"step_{step:06d}").exists():
            return
        save_state(folder, model, optimizer, step=step)
        for old in self.checkpoints()[:-self.keep] if rank() == 0 else ():
            shutil.rmtree(old)

    def save_model(self, model, tokenizer) -> Path:
        """model/: what `AutoModelForCausalLM.from_pretrained` loads; swapped in whole."""
        return save_pretrained(model, tokenizer, self.dir / "model")

    def stop(self, what: str) -> NoReturn:
        print(f"stopped {what}; go on with --resume --out {self.dir}")
        raise SystemExit(130)


def write_atomic(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _state(model, optimizer, more: dict) -> dict:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer), **more}


@contextmanager
def writing(final: Path, unfinished: Path) -> Iterator[None]:
    """A full disk or the like ends the program with one line. Everything is written beside its place first, so nothing is lost, and taken away again."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, dcp.api.CheckpointException) as error:  # each library has its own
        free = shutil.disk_usage(final.parent).free
        if unfinished != final:
            shutil.rmtree(unfinished, ignore_errors=True)
        why = re.search(r"No space left on device|File too large|Permission denied|Read-only file system", str(error))
        refuse(f"{final}: cannot be written ({why[0] if why else str(error).strip().splitlines()[-1]}; {free / 1e6:,.1f} MB were free); what was saved before "
               "is whole: make room and go on with --resume", alone=True)


def save_state(final: Path, model, optimizer, **more: Any) -> None:
    """A folder of torch's distributed checkpoint, whole or not at all; each process writes its shards, and any number of them can read it."""
    unfinished = final.with_name("unfinished.tmp")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
    barrier()
    with writing(final, unfinished):
        dcp.save(_state(model, optimizer, more), checkpoint_id=unfinished, no_dist=not dist.is_initialized())
        if rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
    barrier()


def load_state(folder: Path, model, optimizer, **more: Any) -> dict:
    """Put a folder of `save_state` into model and optimizer -> what else was saved under the names of `more`."""
    state = _state(model, optimizer, more)
    dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return state


def load_weights(folder: Path, model) -> None:
    """The weights of a Hugging Face directory, into a model that is there already."""
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict() if rank() == 0 else {}
    set_model_state_dict(model, saved, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized()))


def save_pretrained(model, tokenizer, final: Path) -> Path:
    """A Hugging Face directory of both, swapped in whole."""
    unfinished = final.with_name(final.name + ".tmp")
    weights = whole_state(model)
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(model, FSDPModule):
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(model.config)
            whole.load_state_dict(weights, assign=True)
            whole.tie_weights()
            whole.generation_config, model = model.generation_config, whole
        with writing(final, unfinished):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
    barrier()
    return final


def versions() -> dict:
    """Package versions, device and commit, for config.json."""
    commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "math-verify")},
            "device": device, "processes": world(), "commit": commit.stdout.strip() or None}


def peak_memory_gb() -> float:
    """Peak memory since the start, of the process that has most: of its GPU where there is one, else its own."""
    if torch.cuda.is_available():
        return max(everyones(torch.cuda.max_memory_allocated() / 2 ** 30))
    return max(everyones(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)))


class Watch(StoppingCriteria):
    """Ctrl-C or SIGTERM ends the step in hand at the next token or micro-batch; a second one ends the program at once.

    As a stopping criterion it also shows how many tokens a rollout has written so far.
    """
    _told = False  # of the program: what one part of a run is told, the next must know

    def __init__(self, bar):
        self.bar = bar
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._on_signal)

    @staticmethod
    def reset() -> None:
        Watch._told = False

    @property
    def stopped(self) -> bool:
        return Watch._told

    def _on_signal(self, kind, frame) -> None:
        if self.stopped:
            raise SystemExit(130)
        Watch._told = True
        self.bar.write("stopping: what is done will be saved (once more to stop without)")

    def agreed(self) -> bool:
        """Has any process been told to stop? All of them ask at the same places."""
        Watch._told = any(everyones(self.stopped))
        return self.stopped

    def rolling_out(self) -> None:
        self.tokens = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.tokens += len(input_ids)
        if input_ids.shape[1] % 16 == 0:
            self.bar.set_postfix_str(f"{self.tokens} tokens sampled")
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)


def say_plan(args: Any, run: Run, rows: list[dict], warmup_rows: list[dict], samples: str, n_samples: int, longest_prompt: int, **more: str) -> None:
    """What the run will do and what it will take, before it costs anything. `samples`: those of a problem, in words; `n_samples`: those of a step."""
    steps = -(-len(warmup_rows) * 9 // 10 // args.warmup_batch_size)
    lines = {"warm-up": f"SFT on {len(warmup_rows)} problems, {args.warmup_epochs} epochs of {steps} steps" if warmup_rows else "none", **more,
             "training": f"{len(rows)} problems; {args.steps} steps of {args.prompts_per_step} x {samples} samples, at most "
                         f"{n_samples * args.max_new_tokens:,} tokens a step; {args.steps * args.prompts_per_step / max(len(rows), 1):.2g} epochs"}
    if getattr(args, "extract_only", False):
        lines = more
    else:
        lines["memory"] = fit_memory(args, n_samples, longest_prompt)
        if args.dry_run and not torch.cuda.is_available():
            lines["on one GPU"] = fit_memory(copy.copy(args), n_samples, longest_prompt, gpu=80e9, host=256e9)
    lines["run"] = str(run.dir)
    print("plan")
    say_table([[name, printable(text)] for name, text in lines.items()])


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """A small table on the screen, columns aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


# ---------------------------------------------------------------- the built-in demo

DEMO_CHOICES = (("+2", "-2"), ("+3", "*2"), ("+1", "-1"), ("+5", "+9"), ("-4", "+6"), ("+7", "-8"))  # the binary choices of a solution
DEMO_KINDS = {"A": "011010", "B": "100101", "C": "001100", "D": "110011", "E": "010101", "F": "101010", "G": "000111", "H": "111000"}
DEMO_WARMUP_STEPS = 220
# What the demo changes where the user set no flag of his own: a tiny model wants larger steps and shorter everything.
DEMO_RECIPE = {"lr": 1e-4, "steps": 50, "prompts_per_step": 16, "max_new_tokens": 36, "system_prompt": "", "eval_every": 50,
               "eval_samples": 2, "microbatch_tokens": 8192, "teacher": "demo", "warmup_frac": 0.0}
# The same for tgpo.py: the lr at which the teacher's labels are learnt in a minute or two, and what was best for each guidance; the paper's where none is given.
DEMO_TGPO = {"lr": 3e-4, "steps": 60}
DEMO_GUIDANCE = {"tgpo": {"coefficient": 0.5, "coefficient_fall": 0.0075}}
# The demo's teachers: what each writes where the student writes "=" and ";".
DEMO_TEACHERS = {"demo": ">.", "demo-same-style": "=;"}
DEMO_TEACHER_STEPS = 200


def demo_recipe(args: Any) -> dict:
    """Defaults for the flags that `args` has, when its model is the demo's."""
    if args.model != "demo":
        return {}
    own = {**DEMO_TGPO, **DEMO_GUIDANCE.get(args.guidance, {})} if hasattr(args, "guidance") else {}
    return {k: v for k, v in {**DEMO_RECIPE, **own}.items() if hasattr(args, k)}


def demo_solution(choices: str, value: int, style: str = "=;") -> tuple[str, int]:
    """The chain of steps that its choices make of a number, written out, and its result. `style`: the two signs between."""
    steps = []
    for pair, choice in zip(DEMO_CHOICES, choices, strict=True):
        op, n = pair[int(choice)][0], int(pair[int(choice)][1:])
        result = {"+": value + n, "-": value - n, "*": value * n}[op]
        steps.append(f"{value}{op}{n}{style[0]}{result}")
        value = result
    return style[1].join(steps) + f"{style[1]}\\boxed{{{value}}}", value


def demo_strategy(kind: str, choices: str) -> str:
    """The choices named, in the paper's three parts."""
    return f"Type: {kind}. Strategy: chain. Steps: {', '.join(pair[int(c)] for pair, c in zip(DEMO_CHOICES, choices, strict=True))}."


def demo_rows() -> tuple[list[dict], list[dict]]:
    """All problems of the demo, a kind and a number each: (training, held-out). Only the kind tells the right choices."""
    pairs = [(kind, number) for kind in DEMO_KINDS for number in range(20, 58)]
    rows = []
    for i in np.random.default_rng(0).permutation(len(pairs)):
        kind, number = pairs[i]
        text, value = demo_solution(DEMO_KINDS[kind], number)
        rows.append({"id": f"{kind}{number}", "problem": f"{kind} {number}", "answer": str(value), "solution": text,
                     "strategy": demo_strategy(kind, DEMO_KINDS[kind])})
    return rows[:-100], rows[-100:]


def demo_tokenizer() -> Qwen2Tokenizer:
    """A token for each character, number, operation and fixed word of the demo, and no more; with a chat template. Other characters are left out.

    What the warm start never teaches as output rises when RL lowers wrong choices, and a run can drown in it: so no token for every byte.
    """
    special, characters = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"], [*"0123456789", *DEMO_KINDS, *"+-*=>;.,}", "\u0120"]  # the last: a space
    tokenizer = Qwen2Tokenizer({token: i for i, token in enumerate([*special, *characters])}, unk_token="<pad>", pad_token="<pad>", eos_token="<end>",
                               additional_special_tokens=special[2:])
    tokenizer.add_tokens([*map(str, range(10, 150)), *(op for pair in DEMO_CHOICES for op in pair), "\\boxed{", "Strategy:\n", "\n\nProblem:\n",
                          "Type: ", "Strategy: chain.", "Steps: "])
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return tokenizer


def warm_start(folder: Path, tokenizer, batch: Callable[[], Iterator[tuple[list[int], list[int], int]]], steps: int, what: str,
               lr: float = 3e-3, start: Path | None = None) -> None:
    """A tiny Qwen2 (or the model in `start`) trained by SFT on what `batch()` gives: prompts, completions, where in each the loss begins."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, initializer_range=0.06, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None)) if start is None else Qwen2ForCausalLM.from_pretrained(start)
    model.to(pick_device())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    print(f"building the demo {what} once, a minute or two on two cores -> {folder}")
    for _ in tqdm(range(steps), desc=f"demo {what}", disable=None):
        prompts, completions, starts = zip(*batch())
        width = max(map(len, completions))
        ids = torch.tensor([c + [0] * (width - len(c)) for c in completions], device=model.device)
        places = torch.arange(width, device=model.device)
        mask = places < torch.tensor([[len(c)] for c in completions], device=model.device)
        taught = mask & (places >= torch.tensor([[start] for start in starts], device=model.device))
        logps, _ = completion_logps(model, prompts, ids, mask, 1.0)
        loss = -(logps * taught).sum() / taught.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_demo(folder: Path) -> None:
    """Warm-start a tiny Qwen2 by SFT: it follows a strategy when given one and seldom finds the right one alone.

    Half of the examples carry a strategy and follow it. The others carry none, and make each choice rightly with a
    probability of 0.5 to 0.65 fixed by (kind, choice): something for RL to start from, no more. A fifth of these change to the
    demo teacher's style on the way, and only what follows is taught: so the student can read that style, and never begins it.
    """
    rng = np.random.default_rng(0)
    lean = {(kind, i): rng.uniform(0.5, 0.65) for kind in DEMO_KINDS for i in range(len(DEMO_CHOICES))}
    tokenizer, (train, _) = demo_tokenizer(), demo_rows()

    def sample(i: int) -> tuple[list[int], list[int], int]:
        row = train[i]
        kind, number = row["problem"].split()
        if rng.random() < 0.5:  # any strategy with any kind: it is to be followed, not looked up
            choices = "".join(rng.choice(["0", "1"], len(DEMO_CHOICES)))
            strategy = demo_strategy(kind, choices)
        else:
            choices = "".join(c if rng.random() < lean[kind, j] else str(1 - int(c)) for j, c in enumerate(DEMO_KINDS[kind]))
            strategy = None
        prompt = build_prompt(tokenizer, row["problem"], "", strategy)
        own, other = (tokenizer(demo_solution(choices, int(number), style)[0]).input_ids + [tokenizer.eos_token_id]
                      for style in (DEMO_TEACHERS["demo-same-style"], DEMO_TEACHERS["demo"]))
        if strategy is None and rng.random() < 0.2:
            change = int(rng.choice([i for i, (a, b) in enumerate(zip(own, other)) if a != b]))
            return prompt, own[:change] + other[change:], change + 1
        return prompt, own, 0

    warm_start(folder, tokenizer, lambda: map(sample, rng.choice(len(train), 64)), DEMO_WARMUP_STEPS, "model")


def build_demo_teacher(folder: Path, style: str) -> None:
    """A teacher for the demo: it goes on with ANY prefix that the student may write, rightly from there on and in its own style.

    The student's text, whose choices are right or wrong by chance, is cut at a random token; the loss is on the rest alone. So the
    teacher solves the problems and knows the right choice after the student's own words, but would never write its signs. It begins
    as the student, which can calculate already.
    """
    rng = np.random.default_rng(1)
    tokenizer, (train, _) = demo_tokenizer(), demo_rows()
    ops = [tokenizer(op).input_ids[0] for pair in DEMO_CHOICES for op in pair]

    def sample(i: int) -> tuple[list[int], list[int], int]:
        kind, number = train[i]["problem"].split()
        right, choices = DEMO_KINDS[kind], "".join(rng.choice(["0", "1"], len(DEMO_CHOICES)))
        students = tokenizer(demo_solution(choices, int(number))[0]).input_ids
        cut = int(rng.integers(len(students) + 1)) if rng.random() < 0.8 else 0
        made = sum(token in ops for token in students[:cut])  # choices that the student has made
        choices = choices[:made] + right[made:]
        students, own = (tokenizer(demo_solution(choices, int(number), s)[0]).input_ids + [tokenizer.eos_token_id] for s in ("=;", style))
        mixed, slips = rng.choice([0.0, 0.5]), rng.choice([0.0, 0.1])  # a student on its way to the teacher's style mixes both, and slips
        prefix = [b if rng.random() < mixed else a for a, b in zip(students[:cut], own)]
        prefix = [int(rng.integers(len(tokenizer))) if rng.random() < slips else a for a in prefix]
        return build_prompt(tokenizer, train[i]["problem"], ""), prefix + own[cut:], cut

    warm_start(folder, tokenizer, lambda: map(sample, rng.choice(len(train), 64)), DEMO_TEACHER_STEPS, "teacher", 1e-3, demo_dir())


def _built_once(name: str, recipe: Any, build: Callable[[Path], None]) -> Path:
    """Directory of a built-in model, built at the first call and kept in the user's cache under a name made of its recipe."""
    makers = (build_demo, build_demo_teacher, warm_start, demo_solution, demo_strategy, demo_rows, demo_tokenizer, build_prompt)
    source = "".join(map(inspect.getsource, makers)) + repr((recipe, DEMO_CHOICES, DEMO_KINDS, DEMO_TEACHERS))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgpo-tgpo"
    final = cache / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    if not final.exists():
        unfinished = cache / f"unfinished-{name}-{os.getpid()}"
        build(unfinished)
        try:
            unfinished.rename(final)
        except OSError:  # another process built it meanwhile
            shutil.rmtree(unfinished, ignore_errors=True)
    return final


def demo_dir() -> Path:
    """Directory of the demo's student."""
    return _built_once("demo", DEMO_WARMUP_STEPS, build_demo)


def demo_teacher_dir(name: str) -> Path:
    """Directory of one of DEMO_TEACHERS."""
    style = DEMO_TEACHERS[name]
    return _built_once(f"{name}-teacher", (style, DEMO_TEACHER_STEPS), lambda folder: build_demo_teacher(folder, style))


# ---------------------------------------------------------------- the math grader

# Every answer, in training and in evaluation, is judged by `grade`; its docstring states what counts as right. What is accepted
# although wrong gets learnt, so whatever is not understood is wrong, and every rule is general.
_counts, _lock = Counter(), threading.Lock()
MAX_TAIL, MAX_ANSWER, VERDICT_SECONDS = 20_000, 1_000, 4.7  # characters, characters, seconds of worker time for one verdict
WORKERS = max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # each is 70 to 200 MB


# ---- extraction
def extract_answer(response: str) -> str | None:
    r"""The text of the last complete top-level \boxed{..} after the last </think>, or None. One linear pass over the last 20,000 characters.
    `\boxed 5` and `\fbox{5}` are no boxes, nor is an unclosed one; a box inside the box is decoration: `\boxed{x = \boxed{5}}` gives `x = {5}`."""
    last, opened = None, []                                 # opened: for each open brace, where its box's text starts, or None
    text = response[max(response.rfind("</think>"), 0):][-MAX_TAIL:]
    for m in re.finditer(r"(\\boxed\s*)?\{|\}|\\.", text, re.S):
        if m[0] == "}" and opened:
            if (start := opened.pop()) is not None:
                last = text[start:m.start()]                # an outer box closes after its inner ones: the last to close is top-level
        elif m[0].endswith("{") and m[0] != r"\{":
            opened.append(m.end() if m[1] else None)
    return None if last is None else re.sub(r"\\boxed\s*(?=\{)", "", last).strip()


# ---- normalisation: one spelling for what means the same
_UNICODE = {ord(char): tex for char, tex in {
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^{\circ}", "≤": r"\leq ", "≥": r"\geq ",
    "≠": r"\neq ", "∪": r"\cup ", "∈": "=", "∅": r"\emptyset ", "±": r"\pm ", "√": r"\sqrt ", "≈": r"\approx ", "²": "^{2}", "³": "^{3}",
    "θ": r"\theta ", "ℝ": r"\mathbb{R}", "’": "'", "\u00a0": " ", "\u202f": " ", "\u2009": " "}.items()}
_NAMED = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|pi"
_REWRITES = [(re.compile(pattern.replace("END", "(?![a-zA-Z])")), new) for pattern, new in [
    (r"\{\\rm\s+([^{}]*)\}", r"\\text{\1}"), (r"\\imathEND", "i"), (r"\\inEND", "="),
    (r"\^?\s*\{?\s*\\text\s*\{(?:st|nd|rd|th)\}\s*\}?|(?<=[0-9])(?:st|nd|rd|th)END", ""),
    (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)END\s*\.?|\\(?:(?:display|text)style|bf|rm|[lL]arge|LARGE|square|underline)END|\\color\s*\{[a-z]+\}", ""),
    (r"\\[dtc]fracEND", r"\\frac"), (r"\\(begin|end)\{(?:[bpB]?matrix|array)\}(?:\{[clr| ]*\})?", r"\\\1{pmatrix}"), (r"\\bigcupEND", r"\\cup "),
    (r"\\(?:text(?:bf|it|rm|sf|tt|normal)|[mh]box|math(?:rm|bf|it|sf)|operatorname\*?|boldsymbol)\s*(?=\{)", r"\\text"),
    (rf"\\text\s*\{{\s*({_NAMED})\s*\}}", r"\\\1 "), (r"\\text\s*\{\s*([ie])\s*\}", r"\1"), (r"\\\\\s*\[[0-9.]+[a-z]+\]|\\crEND", r"\\\\"),
    (r"(?<=[0-9])(?:,\\!|\{,\}|\{\\,\}|\\[,;:! ]|~)\s*(?=[0-9]{3}(?![0-9]))", ""), (r"\{([,:])\}", r"\1"),         # 42\,000  1{,}234  10,\!080
    (r"(?<!\\)\\(?:[,;:! ]|q?quadEND|thinspaceEND|hspace\{[^{}]*\})|~|\s+", " "),                                  # but not the \\ of a matrix
    (r"\\(?:times|cdot|ast)END", "*"), (r"\*\*", "^"), (r"\\divEND", "/"), (r"\\ltEND", "<"), (r"\\gtEND", ">"), (r"\\[lr]vertEND", "|"),
    (r"\\(?:leqslant|leqq|leq|le)END|<=|=<", r"\\leq "), (r"\\(?:geqslant|geqq|geq|ge)END|>=", r"\\geq "), (r"\\neqEND|\\neEND|!=", r"\\neq "),
    (r"\\(?:varnothing|emptyset)END|\\\{\s*\\\}", r"\\emptyset "), (r"\\lbraceEND", r"\\{"), (r"\\rbraceEND", r"\\}"), (r"\\degreeEND", r"^{\\circ}"),
    (r"\\langleEND", "("), (r"\\rangleEND", ")"), (r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"), (r"(?<![a-zA-Z])\\?(?:infty|oo)END", r"\\infty "),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circEND)|\\text\s*\{\s*(?:degrees?|deg\.?)\s*\}|(?<=[0-9] )degrees?END", r"^{\\circ}"),
    (r"\\text\s*\{\s*(?:percent|percentage|pct)\s*\}|(?<=[0-9] )percentEND|\\?%", r"\\% "),
    (rf"(?<![\\a-zA-Z])({_NAMED})END(?=[ (^/*+)-]|$)", r"\\\1 "), (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),         # Python's sqrt(2)
    (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|,?\s*(?<![\\a-zA-Z])(?:and|or)END|\\(?:lor|vee)END", ","),
    (r"\\text\s*\{([^{}a-zA-Z]*)\}", r"\1"), (r"^\\text\s*\{([^{}]*,[^{}]*)\}$", r"\1"),                            # \text{42}  \text{A, C}
    (r"^\s*([-+]?)\s*\\?\$\s*(?=[-0-9.])(.*)$", r"\1\2\\text{dollars}"), (r"\\?\$|[€£]|\\poundsEND", ""),           # $7.25 is 7.25 dollars
    (r"^\s*([a-zA-Z]?)\s*\\approxEND", r"\1="), (r"(?<=.)\s*\\approxEND.*$", ""),                                  # 2\pi \approx 6.28 is 2\pi
    (r"^\s*[a-z]?\s*=(?=\s*\\\{)|^\s*=", ""), (r"^\[\s*('.*')\s*\]$", lambda m: m[1].replace("'", "")),            # Python's ['3', '4']
]]
_WRAPPERS = [(re.compile(pattern, re.S), new) for pattern, new in [
    (r"(?<!\\)[.,]$|\\\\$", ""), (r"^(\$\$?|\*\*|[\"'`])((?:(?!\1).)+)\1$", r"\2"), (r"^\\\(((?:(?!\\\().)+)\\\)$", r"\1"),
    (r"^\\\[((?:(?!\\\[).)+)\\\]$", r"\1"), (r"^\\boxed\s*(?=\{)", "")]]
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.S)
_OPEN, _CLOSE = {"(", "[", "{", r"\{", r"\begin"}, {")", "]", "}", r"\}", r"\end"}


@lru_cache(8192)
def _normalise(text: str) -> str:
    s = text.translate(_UNICODE)
    for pattern, new in _WRAPPERS * 2 + _REWRITES + _WRAPPERS:
        s = pattern.sub(new, s.strip())
    if not re.search(r"[(\[]|\\\{", s):                     # 1,234 and 1 234, but inside brackets a comma always separates
        s = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9,])", lambda m: re.sub("[, ]", "", m[0]), s)
    return s


def _split(s: str, *separators: str) -> list[str]:
    """Split at separators outside all brackets. Brackets need not match in kind: [0,1) is an interval."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(s):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _encloses(s: str) -> bool:
    """Does the bracket that opens s close at its end?"""
    depths = list(itertools.accumulate((token in _OPEN) - (token in _CLOSE) for token in _TOKEN.findall(s)))
    return len(depths) > 1 and depths[-1] == 0 and min(depths[:-1]) > 0


def _key(s: str) -> str:
    return re.sub(r"(?<![0-9]) | (?![0-9])", "", s)         # blanks mean nothing, except in "4 2"


# ---- structure: split at top level, compare the parts. `ask` is the slow path, for what only Math-Verify can tell
_NAME = re.compile(r"\\?[A-Za-z]+'*(?:_\{?\w+\}?)?(?:\([^()=]*\))?|\\text\s*\{[^{}]*\}|\\angle\s*[A-Z]+|\([A-Za-z, ]+\)|\|[a-zA-Z]\|")


def _same(a: str, g: str, ask) -> bool:
    """Is the normalised answer a the normalised gold g?"""
    a, g = _bare(a), _bare(g)
    if _key(a) == _key(g):
        return True
    if re.search(r"<|>|\\[lgn]eq", a + g):                  # 1 < x \leq 2 is (1,2] is x \in (1,2]
        return ask(*(re.sub(r"^[a-z] *= *", "", s) for s in (a, g)))
    items_a, items_g = _items(a), _items(g)
    if len(items_a) > 1 or len(items_g) > 1 or r"\setminus" in a + g:
        rest, whole = list(items_g), r"\cup" in a + g or r"\setminus" in a + g          # (-\infty,0) \cup [0,3) is (-\infty,3)
        for item in items_a if len(items_a) == len(items_g) > 1 and (r"\cup" in a) == (r"\cup" in g) else ():
            match = next((i for i, other in enumerate(rest) if _same(item, other, ask)), None)
            if match is None:
                break
            rest.pop(match)
        return not rest or (whole and ask(a, g))
    a, g = _bare(items_a[0]), _bare(items_g[0])
    sides_a, sides_g = _split(a, "="), _split(g, "=")
    if len(sides_g) > 1:
        if len(sides_a) == 1:                               # gold x = 5: the answer may leave the name out
            return bool(_NAME.fullmatch(sides_g[0])) and _same(a, sides_g[-1], ask)
        if _key(sides_a[0]) == _key(sides_g[0]) and _NAME.fullmatch(sides_g[0]):
            return all(_same(side, sides_g[-1], ask) for side in sides_a[1:])
        return len(sides_a) == len(sides_g) == 2 and ask(a, g)         # y = 2x+3, 2x+3 = y, 2y-4x = 6
    if len(sides_a) > 1:                                    # gold 5: the answer may put the name of what was asked before it
        letter = r"(?<![\\a-zA-Z])[a-zA-Z]|\\(?!frac|sqrt|pi|infty|log|ln|sin|cos|tan)[a-z]+"      # x = 5, x^2+y^2 = 5, but not 41 = 42 or x+41 = 42
        names = [side for side in sides_a[:-1] if not side[:1].isdigit() and all(re.search(letter, term) for term in _split(side, "+", "-"))]
        return all(side in names or _same(side, g, ask) for side in sides_a[:-1]) and _same(sides_a[-1], g, ask)
    parts_a, parts_g = (_split(s[1:-1], ",", ";") if s[:1] in ("(", "[") and _encloses(s) else [s] for s in (a, g))
    if len(parts_a) > 1 or len(parts_g) > 1:                # tuples and intervals
        return len(parts_a) == len(parts_g) and a[0] + a[-1] == g[0] + g[-1] and all(_same(x, y, ask) for x, y in zip(parts_a, parts_g))
    return _same_leaf(a, g, ask)


def _items(s: str) -> list[str]:
    """The members of a list, a set or a union; none has an order."""
    while s.startswith(r"\{") and s.endswith(r"\}") and _encloses(s):
        s = s[2:-2].strip()
    items = [item for item in _split(s, ",", ";", r"\cup") if item]
    for i, item in enumerate(items):
        if re.search(r"\\(?:pm|mp)(?![a-z])", item) and not _encloses(item):
            items[i:i + 1] = [item.replace(r"\pm", "+").replace(r"\mp", "-"), item.replace(r"\pm", "-").replace(r"\mp", "+")]
    return [re.sub(r"^\+\s*", "", item) for item in items] or [""]


def _bare(s: str) -> str:
    """Without brackets around a single thing; but (B) stays a choice."""
    while re.fullmatch(r"\((?![A-Za-z]\)).*\)|\[.*\]|\{.*\}", s) and _encloses(s) and len(_split(s[1:-1], ",", ";")) == 1:
        s = s[1:-1].strip()
    return s


# ---- leaves: choices, units, words, numbers
_UNITS = dict(pair.split("=") for pair in (
    "meter=m metre=m centimeter=cm millimeter=mm kilometer=km inch=in inche=in foot=ft feet=ft yard=yd mile=mi gram=g kilogram=kg"
    " pound=lb ounce=oz dollar=usd second=s sec=s minute=min hour=h hr=h liter=l kph=km/h kmph=km/h mph=mi/h circ=deg sq=square cu=cubic").split())
_BARE_UNITS = "degrees|dollars?|usd|cents?|[ckm]m|in|inch(?:es)?|feet|ft|yd|mi|miles?|meters?|kg|lbs?|hours?|minutes?|seconds?|days?|years?|am|pm"
_TAIL = re.compile(                                         # a unit at the end: in \text{..}, or bare if it is well known
    r"\s*(\^\{\\circ\}|\\%|\\text\s*\{(?:[a-zA-Z .,/()^{-]|(?<=[a-zA-Z^{-])[1-3]\}?)*\}(?:\s*\^\s*\{?-?[1-3]\}?)?"
    rf"|(?<=[0-9)}} ])(?i:{_BARE_UNITS})(?:\s*\^\s*\{{?[1-3]\}}?)?)\.?\s*$")
_HEDGE = re.compile(r"\b(?:not|maybe|perhaps|possibly|probably|wrong|incorrect|guess|n?either|about|approx\w*|roughly|nearly|almost|if|unless)\b")
_BASE = re.compile(r"\(?([0-9][0-9A-Za-z]*)\)?_\{?(?:\\text\s*\{)?([0-9a-z]+)\}*")
_CHOICE = re.compile(r"(?:\\text\s*\{)?\s*(?:(?:option|choice|answer)\s*)?(?:\(([A-Z])\)|([A-Z])[).:]?)\s*\}?\s*[-0-9./\\{} ]*", re.I)      # (B) 36


def _same_leaf(a: str, g: str, ask) -> bool:
    choice_a, choice_g = ((m[1] or m[2]).upper() if (m := _CHOICE.fullmatch(s)) else "" for s in (a, g))
    if choice_a and choice_g and (len(g) == 1 or "(" in g or "text" in g):
        return choice_a == choice_g
    (a, unit_a), (g, unit_g) = _split_unit(a), _split_unit(g)
    if (unit_a - {"%"}) and (unit_g - {"%"}) and (unit_a ^ unit_g) - {"%"}:        # the unit is optional, but cm is not m, and AM is not PM
        return False
    bases = [_BASE.fullmatch(s) for s in (a, g)]
    if any(bases):                                          # 52_8 is neither 52_{10} nor 42
        return all(bases) and bases[0].groups() == bases[1].groups()
    if ":" in a or ":" in g:                                # ratios and times of day
        return re.sub(r"\s", "", a) == re.sub(r"\s", "", g)
    if _words(a) or _words(g):
        return _words(a) == _words(g) or _key(a).casefold() == _key(g).casefold()
    value_a, value_g = _number(a), _number(g)
    percent_a, percent_g = "%" in unit_a, "%" in unit_g
    if value_a is None or value_g is None:
        return percent_a == percent_g and (_key(a) == _key(g) or ask(_bare(a), _bare(g)))
    # One side alone has a percent sign: it means 1/100, or was left out on the other side (but a gold below 1 is a proportion: 0.35% is not 0.35).
    bare, percent = (value_g, value_a) if percent_a else (value_a, value_g)
    if percent_a == percent_g:
        return value_a == value_g
    return bare == percent / 100 or (bare == percent and not (percent_a and abs(bare) < 1))


@lru_cache(8192)
def _number(s: str) -> Fraction | None:
    r"""The exact value of a plain number: 1.5, -3/4, \frac34, 2\frac14, 2 1/4, 4.5e33, 4.5*10^{33}, 10^{-5}, 0.1\overline{6}. None for all else."""
    s, mantissa, fraction = _key(s), r"([0-9]+\.?[0-9]*|\.[0-9]+)", r"\\frac(?:\{([^{}]*)\}|([0-9]))(?:\{([^{}]*)\}| ?([0-9]))"
    if s[:1] in ("-", "+"):
        value = _number(s[1:]) if s[1:2] not in ("-", "+") else None
        return -value if value is not None and s[0] == "-" else value
    if m := re.fullmatch(rf"{mantissa}(?:(?:[eE]|\*10\^)\{{?([-+]?[0-9]{{1,4}})\}}?)?", re.sub(r"^10\^", "1*10^", s)):
        return Fraction(m[1]) * Fraction(10) ** int(m[2] or 0)
    if m := re.fullmatch(r"([0-9]*)\.([0-9]*)\\overline\{([0-9]{1,50})\}", s):
        return Fraction(f"{m[1] or 0}.{m[2] or 0}") + Fraction(int(m[3]), 10 ** len(m[2]) * (10 ** len(m[3]) - 1))
    m = re.fullmatch(rf"([0-9]*) ?{fraction}", s) or re.fullmatch(rf"(?:([0-9]+) (?=[0-9]+/))?{mantissa}()/{mantissa}()", s)
    top, bottom = (_number(m[2] or m[3]), _number(m[4] or m[5])) if m else (None, None)
    return int(m[1] or 0) + top / bottom if top is not None and bottom else None


def _words(s: str) -> str:
    r"""What to compare if this is text: \text{..}, or a bare word (products have fewer letters in a row). "" for formulas."""
    is_text = r"\begin" not in s and re.search(r"\\text\s*\{[^}]*[a-zA-Z]|(?<![\\a-zA-Z])[A-Za-z]{4}|^(?i:yes|no|am|pm|odd)$", s)
    return re.sub(r"\\text|[\s{}().,'\"]", "", s).casefold() if is_text else ""


def _split_unit(s: str) -> tuple[str, set[str]]:
    """The quantity and the words of its unit, m/s^2 as {m, s2}."""
    text = ""
    while (m := _TAIL.search(s)) and re.search(r"[0-9]|\\(?:pi|frac|sqrt)", s[:m.start()]) and not _HEDGE.search(m[1]) \
            and not re.search(r"[-+*/^=(,]\s*$|\\(?:sin|cos|tan)", s[:m.start()]):
        s, text = s[:m.start()], f"{m[1]} {text}"
    words = re.findall(r"([a-z]+|%)[ ^]*-?([1-3]?)", re.sub(r"\\text|[{}.]|\bper\b", "", text.lower()))
    unit = " ".join((_UNITS.get(word) or _UNITS.get(word.rstrip("s")) or word.rstrip("s") or word) + power for word, power in words).replace("/", " ")
    unit = re.sub(r"square (\w+)", r"\g<1>2", re.sub(r"cubic (\w+)", r"\g<1>3", unit))
    return s.strip(), set(unit.split())


# ---- Math-Verify, in worker processes
_COMMANDS = set("alpha beta gamma delta theta lambda mu sigma phi omega Delta frac sqrt pi infty sin cos tan cot sec csc arcsin arccos arctan "
                "log ln exp leq geq neq cup setminus emptyset begin end circ binom lfloor rfloor lceil rceil".split())


def _worth_asking(a: str, g: str) -> bool:
    """Sympy can be kept busy for ever by sizes, towers and operators. An honest attempt at this gold needs no more of them than the gold has."""
    costly = ("=", r"\^\s*\{[^}]*\^|\^\{?(?:[0-9]+|[a-z])\}?\s*\^", r"\^\s*\{?-?[0-9]{3}", r"[0-9]{4}\s*!|[)\]}!]\s*!", r"\\binom.*[0-9]{4}",
              "[0-9]{21}", r"(?<![\\a-zA-Z])[A-Za-z]{4}", r"(?:[(\[{][^)\]}]*){7}", ".{400}")
    commands_a, commands_g = (set(re.findall(r"\\([a-zA-Z]+)", s)) for s in (a, g))
    return (re.fullmatch(r"[\sA-Za-z0-9\\{}()\[\]|+\-*/^_=<>.,!&']*", a) is not None and not re.search("(?<![_0-9])[0-9]+ +[0-9]", a)
            and commands_a <= _COMMANDS | commands_g and not any(re.search(pattern, a) and not re.search(pattern, g) for pattern in costly))


def _worker_main(fd: int):
    """A worker: its source runs in a fresh interpreter (python -c), without torch and without the user's script. Text is only ever parsed as LaTeX:
    Math-Verify's other extraction, for plain expressions, ends in sympy's parse_expr, that is in eval."""
    import faulthandler, functools, logging, os, re, resource, signal
    from fractions import Fraction
    from multiprocessing.connection import Connection
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig
    from math_verify import parser, verify
    from sympy import FiniteSet, I, Union, nan, zoo
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is the parent's business
    resource.setrlimit(resource.RLIMIT_DATA, (200 * 2**20,) * 2)
    as_latex = [parser.LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"))]
    parser.latex2sympy = functools.partial(                 # parser.parse has no option for this: tell A from a
        parser.latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))

    @functools.lru_cache(1000)
    def read(text):
        """[expression] or []. Decimals are made exact; mixed numbers, degrees, negative exponents, i and lists of inequalities are what they mean."""
        text = re.sub(r"[0-9]+\.[0-9]*|\.[0-9]+", lambda m: "(\\frac{%d}{%d})" % Fraction(m[0]).as_integer_ratio(), text)
        text = re.sub(r"(?<![0-9.^_])([0-9]+)\s*(\\frac\s*(?:\{[0-9]+\}|[0-9])\s*(?:\{[0-9]+\}|[0-9]))", r"(\1+\2)", text)
        text = re.sub(r"\^ *(-\w+)", r"^{\1}", re.sub(r"([0-9]+)\^\{\\circ\}", r"(\1\\frac{\\pi}{180})", text))
        found = parser.parse(f"${text}$", as_latex, fallback_mode="no_fallback", parsing_timeout=2, raise_on_error=True)
        found = [x.subs({s: I for s in x.free_symbols if s.name == "i"}) if "i" in text else x for x in found]
        found = [Union(*(r.as_set() for r in x.args)) if isinstance(x, FiniteSet) and all(r.is_Relational for r in x.args) else x for x in found]
        return [] if any(x.has(nan, zoo) for x in found) else found

    pipe, null = Connection(fd), open(os.devnull, "w")
    try:
        verify(read("x^2"), read("2x"))                     # the first parse builds tables: on a busy machine no answer's time does for it
    except Exception:
        pass
    pipe.send("ready")
    while True:
        try:
            gold, answer = pipe.recv()
        except (EOFError, OSError):                         # the parent is gone
            return
        faulthandler.dump_traceback_later(8, exit=True, file=null)     # a C thread: ends even what no signal interrupts, should the parent be gone
        try:
            golds, answers = read(gold), read(gold if answer is None else answer)
            alike = golds and answers and isinstance(golds[0], FiniteSet) == isinstance(answers[0], FiniteSet)        # {2,4} is not (2,4)
            reply = bool(alike) and (answer is None or verify(golds, answers, float_rounding=15, numeric_precision=50,
                                                              allow_set_relation_comp=True, timeout_seconds=2, raise_on_error=True))
        except parser.TimeoutException:
            reply = "timeout"
        except MemoryError:
            os._exit(1)                                     # the parent starts a clean one
        except Exception:
            reply = False                                   # not readable or not comparable
        faulthandler.cancel_dump_traceback_later()
        pipe.send(reply)


def _new_worker() -> subprocess.Popen:
    pipe, theirs = Pipe()
    code = f"{inspect.getsource(_worker_main)}\n_worker_main({theirs.fileno()})"       # spawn would run the user's script again
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}             # import nothing from here; the same verdict every time
    worker = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env)
    worker.pipe, worker.ready = pipe, False
    theirs.close()
    return worker


_free, _idle = threading.Semaphore(WORKERS), []             # a worker is started when needed, and ends when its pipe closes, at the latest with us
os.register_at_fork(after_in_child=_idle.clear)             # a forked child starts its own


def _ask_worker(gold: str, answer: str | None, seconds: float):
    """One question to a free worker: is the answer right, or if it is None, can the gold be read? A late worker is killed and replaced."""
    with _free:
        with _lock:
            worker = _idle.pop() if _idle else None
        try:
            if worker is None or worker.poll() is not None:      # not started, or died while idle
                worker = _new_worker()
            worker.pipe.send((gold, answer))
            worker.ready = worker.ready or (worker.pipe.poll(120) and worker.pipe.recv())      # seconds to start are not the answer's fault
            if not worker.pipe.poll(seconds):
                raise TimeoutError
            reply = worker.pipe.recv()
        except BaseException as error:                      # Ctrl-C too: a reply left unread would answer the next question
            if worker:
                worker.kill()
            _idle.extend([_new_worker()] if isinstance(error, TimeoutError) else [])
            raise
        _idle.append(worker)
        return reply


# ---- verdicts
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")     # a reader would see another answer


@lru_cache(8192)
def _readable(s: str) -> bool:
    """Can every part be read? Words, choices and numbers here, the rest in a worker."""
    s = re.sub(r"^(?:\\\{|[(\[{])(.*?)(?:\\\}|[)\]}])$", r"\1", s).strip() if _encloses(s) else s
    parts = _split(s, ",", ";", ":", "=", "<", ">", r"\leq", r"\geq", r"\cup")
    if len(parts) > 1:
        return all(map(_readable, parts))
    s = _split_unit(s)[0]
    plain = _words(s) or _CHOICE.fullmatch(s) or _BASE.fullmatch(s) or s in (r"\infty", r"-\infty", r"\emptyset", r"\ldots", r"\dots")
    return s != "" and bool(plain or _number(s) is not None or _ask_worker(s, None, VERDICT_SECONDS) is True)


def gold_is_gradable(gold: str) -> bool:
    """Can this gold answer be read? If not, the row is a data error and no answer to it scores. Plain golds take microseconds, others a worker."""
    try:
        return isinstance(gold, str) and len(gold) <= MAX_ANSWER and _readable(_normalise(gold))
    except Exception:
        return False


@lru_cache(16_384)
def _outcome(answer: str, gold: str) -> str:
    """The cache: the rollouts of a problem repeat each other's answers, hostile ones included."""
    def ask(a: str, g: str) -> bool:
        reply = _worth_asking(a, g) and _ask_worker(g, a, max(0.1, end - time.monotonic()))
        if reply == "timeout":
            raise TimeoutError
        return reply
    end = time.monotonic() + VERDICT_SECONDS
    try:
        return "right" if _same(answer, gold, ask) else "wrong"
    except TimeoutError:
        return "timeouts"


def grade(response: str, gold: str) -> float:
    r"""1.0 if the answer in the response is the gold answer, else 0.0. Never raises, takes at most 5 s, works in any thread.

    The answer is the last complete \boxed{..} after the last </think>; no box, no reward. It is right if it denotes the same object as the gold:
    - numbers are compared exactly: 0.5 is \frac12 and 4.5e33 is 4.5 \times 10^{33}, but 0.333 is not \frac13 and 3.14 is not \pi;
    - expressions are the same if Math-Verify finds them equal, factored or not; letters are case-sensitive; i is the imaginary unit;
    - lists and sets have no order but must be complete, with nothing added; tuples, intervals and matrices have order, brackets and shape;
      x > 2 is (2,\infty), but (2,4) is not \{2,4\}; equations may be turned round or scaled; x = 5 is 5, but 41 = 42 is nothing;
    - a unit or currency may be left out on either side, but two must agree; a percent sign may be left out, or mean 1/100;
    - numerals in a base need the same digits and base; words and choice letters are compared without case, full stops and brackets.
    Whatever cannot be read, takes too long or is too big is wrong, and so is every answer to a gold that cannot be read.
    """
    try:
        answer = extract_answer(response) if isinstance(response, str) else None
        outcome = "no_box" if answer is None else "wrong"
        if not gold_is_gradable(gold):
            outcome = "unparsable_gold"
        elif answer and len(answer) <= MAX_ANSWER and not _INVISIBLE.search(answer):
            outcome = _outcome(_normalise(answer), _normalise(gold))
    except Exception:
        outcome = "crashes"
    with _lock:
        _counts[outcome] += 1
    return float(outcome == "right")


def grade_batch(responses: list[str], golds: list[str]) -> list[float]:
    """`grade` for a whole step's rollouts, the workers side by side."""
    with ThreadPoolExecutor(WORKERS) as threads:
        return list(threads.map(grade, responses, golds))


def grader_counts() -> dict[str, int]:
    """Outcomes since the last call. Log them each step: many timeouts or crashes mean that rewards are being lost."""
    with _lock:
        return {key: _counts.pop(key, 0) for key in ("right", "wrong", "no_box", "timeouts", "crashes", "unparsable_gold")}


# ---- does a text give the answer away?
_SPELLED = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = ("half|halves third quarter|fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth "
             "seventeenth eighteenth nineteenth twentieth").split()     # of denominators, from 2
_FRACTION = r"[0-9]*\\[dtc]?frac\s*(?:\{[^{}]*\}|[0-9])\s*(?:\{[^{}]*\}|[0-9])"
_NUMERAL = re.compile(
    rf"-?{_FRACTION}|(?<![\w.])-?(?:[0-9]+\s[0-9]+/[0-9]+|(?:[0-9]{{1,3}}(?:(?:,\\!\s*|,|\\,|\{{,\}})[0-9]{{3}})+|[0-9]+)(?:\.[0-9]+)?(?:\s?/\s?[0-9]+)?"
    rf"|\.[0-9]+)(?:\s?\\?%|\s?percent\b|(?=(?i:{_BARE_UNITS})\b))?(?!(?!(?i:{_BARE_UNITS})\b)\w|\.[0-9])")
_NUMBERING = re.compile(r"(?:(?:^|[.;:!?,)\n>*-])\s*\(?|\b(?:steps?|parts?|cases?|points?|items?)\s+(?:[0-9]+\s*(?:,|and|to|-)\s*)*)$", re.I)
_SAID = r"\b(?:equals?|is|are|be|answer|result|solution|total|gets?|gives?|giving|yields?|obtains?|namely)\b"
_ANSWERING = re.compile(rf"(?:=|\\approx|{_SAID})[\s:$(*-]*$", re.I)
_CONCLUDING = re.compile(r"\b(?:answer|result|solution|total|so|hence|thus|therefore|gets?|gives?|giving|yields?|obtains?|conclude)\b[^.;\n]{0,30}$", re.I)


def _spelled(n: int) -> str:
    """A pattern for 0 <= n < 1000 in English words."""
    if n < 20:
        return _SPELLED[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"[- ]{_SPELLED[n % 10]}" if n % 10 else "")
    return f"(?:an?|{_SPELLED[n // 100]}) hundred" + (f"(?: and)? {_spelled(n % 100)}" if n % 100 else "")


def _stands_for_itself(text: str, m: re.Match) -> bool:
    """Is this numeral a quantity of its own? Not the number of a step, an exponent, an index, a term of a longer expression, the 3 of 3-digit."""
    before, after = text[:m.start()], text[m.end():]
    if re.match(r"\s*(?:[\^+*/×·(]|\\(?!text|%|,|\))[a-zA-Z]|-\s?[0-9a-zA-Z])|[ ]?[a-zA-Z](?![a-zA-Z])|\}", after):
        return False
    if re.search(r"(?:[\^_+*/×·]|\\(?:times|cdot|div|pm)|[\^_]\{|\\(?:sqrt|binom|frac)\S*\{|\w\()\s*$"
                 r"|\b(?:modulo|mod|base|degree|order|level)\s+$", before, re.I):
        return False
    if _ANSWERING.search(before):
        return True
    step = len(m[0]) < 3 and (_NUMBERING.search(before) and re.match(r"\s*[.):](?![0-9])", after)
                              or re.search(r"\b(?:steps?|parts?|cases?)\s+(?:\S+\s+(?:and|to)\s+)?$", before, re.I))
    return not (step or re.search(r"-\s*$", before))


def _is_said(text: str, m: re.Match) -> bool:
    """Does the text say that something is this, and no more?"""
    return bool(_ANSWERING.search(text[:m.start()]) and re.match(r"\s*\$?\s*(?:[.,;!)]|$)", text[m.end():]))


def _formula_tokens(s: str) -> list[tuple[str, int, int]]:
    """(token, start, end) of what a formula is made of, however it is set: braces, blanks and multiplication signs mean nothing, \\frac{a}{b} is a/b."""
    found = [(m[0].lstrip("\\"), m.start(), m.end()) for m in re.finditer(r"\\?[A-Za-z]+|[0-9]+(?:\.[0-9]+)?|[^\s{}()\\$*]", s)]
    return [token for token in found if token[0] not in ("left", "right", "cdot", "times", "text", "mathrm", "displaystyle")]


def gives_away(text: str, gold: str, problem: str = "") -> bool:
    r"""Does this text hold the gold answer: in digits, as fraction, percentage or LaTeX, in words, or as a formula that `grade` equates with it?

    Numbers that only count steps, exponents, indices, coefficients are no answers. Nor is what the problem states itself, and nor are 0, 1 and -1,
    which stand in every identity, unless the text says that they come out. A guard, not a proof: a strategist can paraphrase.
    """
    text = re.sub(r"[\u200b-\u200f\u2060\ufeff]", "", text.translate({ord("−"): "-", ord("–"): "-", 0xa0: " ", 0x202f: " "}))
    text = re.sub(r"\\[()]|(?<!\\)\\[\[\]]|\$\$", "$", text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=[0-9.\\])", "-", re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°", " degrees", text))
    gold = re.sub(r"^\$+|\$+$", "", gold.strip())
    whole = _bare(_normalise(gold))
    items, bare = _items(whole), _split_unit(whole)[0]
    value, choice = _number(bare), _CHOICE.fullmatch(bare)
    small = value is not None and abs(value) <= 1 and value.denominator == 1

    short = r"[\s\w.,%\\-]{0,9}" if value is not None else r"[\s0-9.]*"         # numerals are looked at below, with what stands around them
    for m in () if choice else re.finditer(r"\$([^$]+)\$|\\boxed\s*\{", text):
        sides = {m[1], *_split(m[1], "=", r"\approx")} if m[1] else {extract_answer(text[m.start():]) or ""}
        if (not small or not m[1] or _CONCLUDING.search(text[:m.start()])) and any(
                grade(f"\\boxed{{{side}}}", gold) for side in sides if not m[1] or not re.fullmatch(short, side)):
            return True
    if len(items) > 1 and all(gives_away(text, item, problem) for item in items):  # a list is given away where all of it is
        return True

    if value is not None:
        given = set(map(Fraction, re.findall(r"[0-9]+(?:\.[0-9]+)?", problem)))
        cue = _CONCLUDING if small else _ANSWERING if value in given else re.compile("")
        for m in _NUMERAL.finditer(text):
            if grade(f"\\boxed{{{m[0]}}}", gold) and _stands_for_itself(text, m) and cue.search(text[:m.start()]):
                return True
        sign, size = "(?:minus|negative) " if value < 0 else "", abs(value)
        if size.denominator == 1 and size < 1000:
            words = _spelled(int(size))
        elif 1 < size.denominator <= 20 and size.numerator < 100:
            words = f"{'an?|' if size.numerator == 1 else ''}{_spelled(size.numerator)}"
            words = rf"(?:{words})[- ](?:{_ORDINALS[size.denominator - 2]})s?"
        else:
            return False
        common = size.denominator == 1 and size <= 10 and not sign               # "one of the two cases" says nothing
        return any(not common or _is_said(text, m) for m in re.finditer(rf"(?<![\w-]){sign}{words}(?![\w-])", text, re.I))

    if choice:                                                                   # "A" is also an article
        letter = choice[1] or choice[2]
        return re.search(rf"\({letter}\)|\b(?i:option|choice|answer)(?i:\s+is|:)?\s+\(?{letter}\b", text) is not None
    if words := _words(bare):
        plain = re.escape(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", bare).strip())
        said = plain.lower() in problem.lower() or len(words) < 4
        return any(not said or _is_said(text, m) for m in re.finditer(rf"(?<!\w){plain}(?!\w)", text, re.I))
    # a formula, in another dress: its tokens one after the other, and no operator that carries it on
    fractions = lambda s: re.sub(r"\\[dtc]?frac\s*(\{[^{}]*\}|[0-9])\s*(\{[^{}]*\}|[0-9])", r"\1/\2", s.translate(_UNICODE))
    wanted, tokens = [t for t, _, _ in _formula_tokens(fractions(bare))], _formula_tokens(fractions(text))
    for k in range(len(tokens) - len(wanted) + 1):
        if wanted and [t for t, _, _ in tokens[k:k + len(wanted)]] == wanted:
            before, after = tokens[k - 1][0] if k else "", tokens[k + len(wanted)][0] if k + len(wanted) < len(tokens) else ""
            if len(wanted) > 1 and before not in tuple("+-^/_") and after not in tuple("+-^/_"):
                return True
    single = re.finditer(rf"(?<![\w\\^_])\\?{re.escape(wanted[0])}(?![\w^_])", text) if len(wanted) == 1 else ()
    return any(_is_said(text, m) for m in single)
