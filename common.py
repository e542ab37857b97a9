"""What the scripts share: flags, rows, prompts, models, run directories, the built-in demo and the math grader.

Nothing here knows any algorithm: advantages, losses and their equations stand in the scripts.
Letters used throughout: N rows (problems x samples), P prompt, C completion, T = P + C, V vocabulary, M completion tokens.
"""
from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Callable, Iterator, NoReturn, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, StoppingCriteria)
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


# ---------------------------------------------------------------- refusals and text on the screen

def refuse(message: str) -> NoReturn:
    """Every input that is not accepted ends here: one line on stderr, exit code 2, no traceback."""
    print("error: " + printable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(2)


def printable(text: str) -> str:
    """Model and data text made safe for a terminal: control, bidi and other invisible characters are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


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
    """Rows to train on and held-out rows (maybe none): from --dataset and --eval_dataset, or the demo's own."""
    if args.model == "demo" and args.dataset is None:
        train, held_out = demo_rows()
    else:
        train, held_out = load_rows(args.dataset or DEFAULT_DATASET), []
    return train, load_rows(args.eval_dataset) if args.eval_dataset else held_out


def batch_of_step(n_rows: int, step: int, size: int, seed: int) -> list[int]:
    """Row indices of a step (0-based): epochs of seeded permutations laid end to end, cut into batches.

    A pure function of (seed, step): the step number is the whole data cursor, so a resumed run cannot be off by one.
    """
    wanted = range(step * size, (step + 1) * size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n_rows) for epoch in range(wanted[0] // n_rows, wanted[-1] // n_rows + 1)}
    return [int(orders[k // n_rows][k % n_rows]) for k in wanted]


def seed_everything(*key: int) -> None:
    """Seed every RNG from (seed, step): nothing of their state has to be saved for an exact resume."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
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


def load_model(name: str, activation_checkpointing: bool = False, flag: str = "--model", dtype: torch.dtype = torch.float32, device=None):
    """The causal LM of a hub id or local directory, on the picked device.

    In fp32 where it is trained, because these are the optimizer's masters: at lr 1e-6 a bf16 weight rounds almost every update
    away. Dropout is off: the policy that is scored must be the policy that was sampled.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path(name, flag), dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        refuse(f"{flag} {name}: no causal language model can be loaded from it ({str(error).strip().splitlines()[0]})")
    model.to(device or pick_device())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    if activation_checkpointing:
        # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    model.eval()
    _check_head(model, name, flag)
    return model


def _check_head(model, name: str, flag: str = "--model") -> None:
    """We compute logits as hidden states x lm_head, in chunks: refuse a model that does something more (a soft cap, a scale)."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        theirs = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3):
        refuse(f"{flag} {name}: {type(model).__name__} changes its logits after lm_head, which these scripts do not support")


def check_context(model_name: str, longest_prompt: int, max_new_tokens: int, flag: str = "--model") -> None:
    """Refuse completions that would run past the model's positions. Reads the config only."""
    config = AutoConfig.from_pretrained(model_path(model_name, flag)).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context and longest_prompt + max_new_tokens > context:
        refuse(f"--max_new_tokens {max_new_tokens} plus the longest prompt ({longest_prompt} tokens) exceeds the {flag[2:]}'s context of "
               f"{context}; use at most --max_new_tokens {max(context - longest_prompt, 0)}")


def stop_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion. Qwen2.5-Instruct has two, and one of them is also its pad."""
    ids = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config):
        more = getattr(config, "eos_token_id", None)
        ids += more if isinstance(more, (list, tuple)) else [more]
    return sorted({i for i in ids if i is not None})


def rollout_copy(model):
    """The model to generate with: on CUDA a bf16 copy (half the bytes to read a token, no autocast), else the model itself."""
    if model.device.type != "cuda":
        return model
    fast = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, attn_implementation="sdpa").to(model.device)
    fast.generation_config = model.generation_config
    return fast.requires_grad_(False).eval()


@torch.no_grad()
def sync_rollout_copy(fast, model) -> None:
    """Copy the training weights into the rollout copy, rounding to its dtype."""
    if fast is not model:
        for to, source in zip(fast.state_dict().values(), model.state_dict().values(), strict=True):
            to.copy_(source)


@torch.no_grad()
def generate(model, prompts: list[list[int]], eos: list[int], pad: int, max_new_tokens: int, temperature: float, top_p: float,
             watch: StoppingCriteria | None = None) -> Tensor:
    """One `generate` call for all prompts, left-padded -> completion ids [N, C] as sampled, on the model's device.

    Every sampling setting is explicit. `generate` fills what is left open from the checkpoint's own generation_config
    (Qwen2.5-Instruct's has top_k 20 and a repetition penalty), so that is put aside for the call. eval mode: in train mode
    with activation checkpointing `generate` drops its cache and forgets the context.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(do_sample=temperature > 0, temperature=temperature or 1.0, top_p=top_p, top_k=0, repetition_penalty=1.0,
                              num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, use_cache=True)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    own, training = model.generation_config, model.training
    try:
        model.generation_config = GenerationConfig()
        model.eval()
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config,
                             stopping_criteria=[watch] if watch is not None else None)
    finally:
        model.generation_config = own
        model.train(training)
    return out[:, width:]


def completion_mask(completions: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """[N, C] ids -> mask [N, C], True up to and including the FIRST end token, and truncated [N], True where there is none.

    By position, not by `ids != pad`: where pad is also an end token that would drop the stop token from the loss.
    """
    is_end = torch.isin(completions, torch.tensor(eos, device=completions.device))
    ends_before = is_end.cumsum(1) - is_end.long()
    return ends_before == 0, ~is_end.any(1)


def microbatches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut so that (longest in the cut) x (rows in it) <= budget tokens; a longer row stands alone."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def autocast(device: torch.device):
    """bf16 mixed precision on CUDA, plain fp32 elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")


def completion_hidden(model, prompts: list[list[int]], completions: Tensor, mask: Tensor) -> Tensor:
    """Final hidden states [M, d] at the positions that predict each real completion token, row by row (M = mask.sum()).

    Rows are laid out prompt + completion, padded on the RIGHT only: causal attention never looks there, so no attention mask is
    needed and sdpa takes its fast path. Token t of the completion is predicted at position P + t - 1.
    """
    lengths = mask.sum(1).tolist()
    rows = [p + c[:n] for p, c, n in zip(prompts, completions.tolist(), lengths, strict=True)]
    width = max(map(len, rows)) - 1  # the last token predicts nothing
    ids = torch.tensor([(r + [0] * width)[:width] for r in rows], device=model.device)
    row, t = mask.nonzero(as_tuple=True)
    starts = torch.tensor([len(p) for p in prompts], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[row, starts[row] + t - 1]


VOCABULARY_CHUNK = 2 ** 26  # logits a chunk: 256 MiB in fp32


def over_vocabulary(fn: Callable[..., tuple[Tensor, ...]], model, hiddens: Sequence[Tensor], per_token: Sequence[Tensor] = (),
                    temperature: float = 1.0) -> tuple[Tensor, ...]:
    """fn(*logits, *per_token) -> tensors [m], applied to chunks of tokens so that no [M, V] tensor ever exists.

    `hiddens` are [M, d] each, their fp32 logits [m, V] are divided by the sampling temperature. The logits are computed again
    in backward, so memory is flat in M.
    """
    head = model.get_output_embeddings()

    def chunk_of(*tensors: Tensor) -> tuple[Tensor, ...]:
        states, rest = tensors[:len(hiddens)], tensors[len(hiddens):]
        return fn(*[head(h).float().div_(temperature) for h in states], *rest)

    size = max(VOCABULARY_CHUNK // head.weight.shape[0], 1)
    out = [checkpoint(chunk_of, *chunk, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else chunk_of(*chunk)
           for chunk in zip(*[x.split(size) for x in (*hiddens, *per_token)], strict=True)]
    return tuple(torch.cat(parts) for parts in zip(*out, strict=True))


def log_prob_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[m, V], [m] -> log pi(id) [m] and the policy's entropy [m] (nats, no gradient)."""
    log_norm = logits.logsumexp(-1)
    with torch.no_grad():
        entropy = log_norm - ((logits - log_norm[:, None]).exp() * logits).sum(-1)
    return logits.gather(-1, ids[:, None])[:, 0] - log_norm, entropy


def completion_logps(model, prompts: list[list[int]], completions: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log pi(token) and entropy [n, C] of every real completion token, 0 where the mask is False."""
    hidden = completion_hidden(model, prompts, completions, mask)
    flat = over_vocabulary(log_prob_and_entropy, model, [hidden], [completions[mask]], temperature)
    return tuple(torch.zeros(mask.shape, device=x.device).masked_scatter(mask, x) for x in flat)


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
            refuse(f"--reward failed on row {row['id']}: {type(error).__name__}: {error}")
        if not np.isfinite(values[-1]):
            refuse(f"--reward gave {values[-1]} on row {row['id']}; it must be finite")
    return torch.tensor(values)


# ---------------------------------------------------------------- run directory

class Run:
    """`--out`: config.json, metrics.jsonl, samples.jsonl, checkpoints/step_N.pt, model/.

    A directory that holds another configuration, or anything that is not a run, is refused. Resuming drops the rows of both
    logs that the checkpoint has not seen, so they end up as if the run had never stopped.
    """
    MAY_DIFFER = {"out", "resume", "steps", "save_every", "keep_checkpoints"}

    def __init__(self, args: Any):
        """Check `--out` and write nothing yet: what is refused later must leave no trace."""
        script = Path(sys.argv[0]).stem
        if args.out is None:
            if args.resume:
                refuse("--resume needs --out, the directory of the run to go on with")
            args.out = f"runs/{script}-{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
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

    def begin(self, model, optimizer) -> int:
        """Make the directory, or load the newest checkpoint of a resumed run -> number of finished steps."""
        (self.dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not (self.dir / "config.json").exists():
            write_atomic(self.dir / "config.json", json.dumps(self.config, indent=2) + "\n")
        step, found = 0, sorted((self.dir / "checkpoints").glob("step_*.pt"))
        if found:
            state = torch.load(found[-1], map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
        for name in ("metrics", "samples"):  # what the checkpoint has not seen is done again
            path = self.dir / f"{name}.jsonl"
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                        if found and line.endswith("}\n") and json.loads(line)["step"] <= step]
                write_atomic(path, "".join(kept))
        return step

    def log(self, name: str, *rows: dict) -> None:
        """Append rows to `name` ("metrics" or "samples")."""
        with open(self.dir / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def evaluations(self) -> list[dict]:
        """The rows of metrics.jsonl with a held-out evaluation, first to last."""
        path = self.dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if "eval/accuracy" in row]

    def save_checkpoint(self, step: int, model, optimizer) -> None:
        """State after `step` finished steps. RNGs and data order are functions of (seed, step): the step stands for them."""
        folder = self.dir / "checkpoints"
        unfinished = folder / "unfinished.tmp"
        with open(unfinished, "wb") as file:
            torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder / f"step_{step:06d}.pt")
        for old in sorted(folder.glob("step_*.pt"))[:-self.keep]:
            old.unlink()

    def save_model(self, model, tokenizer) -> Path:
        """model/: what `AutoModelForCausalLM.from_pretrained` loads; swapped in whole."""
        unfinished, final = self.dir / "model.tmp", self.dir / "model"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        return final


def write_atomic(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def versions() -> dict:
    """Package versions, device and commit, for config.json."""
    commit = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "math-verify")},
            "device": device, "commit": commit.stdout.strip() or None}


def peak_memory_gb() -> float:
    """Peak memory since the start: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


class Watch(StoppingCriteria):
    """Ctrl-C or SIGTERM ends the step in hand at the next token or micro-batch; a second one ends the program at once.

    As a stopping criterion it also shows how many tokens a rollout has written so far.
    """

    def __init__(self, bar):
        self.bar, self.stopped = bar, False
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self._on_signal)

    def _on_signal(self, kind, frame) -> None:
        if self.stopped:
            raise SystemExit(130)
        self.stopped = True
        self.bar.write("stopping: saving a checkpoint (once more to stop without)")

    def rolling_out(self, rows: int) -> None:
        self.rows, self.tokens = rows, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.tokens += self.rows
        if self.tokens // self.rows % 16 == 0:
            self.bar.set_postfix_str(f"{self.tokens} tokens sampled")
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)


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
DEMO_RECIPE = {"lr": 1e-4, "steps": 100, "prompts_per_step": 16, "max_new_tokens": 48, "system_prompt": "", "eval_every": 50,
               "eval_samples": 2, "microbatch_tokens": 8192, "delta": 5.0, "teacher": "demo"}
# The demo's teachers: what each writes where the student writes "=" and ";".
DEMO_TEACHERS = {"demo": ">.", "demo-same-style": "=;"}
DEMO_TEACHER_STEPS = 200


def demo_recipe(args: Any) -> dict:
    """Defaults for the flags that `args` has, when its model is the demo's."""
    if args.model != "demo":
        return {}
    return {k: v for k, v in DEMO_RECIPE.items() if hasattr(args, k)}


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


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one for each number and operation of the demo; with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    special = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", additional_special_tokens=special[2:])
    fast.add_tokens([*map(str, range(10, 150)), *(op for pair in DEMO_CHOICES for op in pair), "\\boxed{", "Strategy:\n", "\n\nProblem:\n",
                     "Type: ", "Strategy: chain.", "Steps: "])
    fast.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    return fast


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
    from tqdm import tqdm
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
    probability of 0.5 to 0.65 fixed by (kind, choice): something for RL to start from, no more.
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
        return prompt, tokenizer(demo_solution(choices, int(number))[0]).input_ids + [tokenizer.eos_token_id], 0

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
    source = "".join(map(inspect.getsource, makers)) + repr((recipe, DEMO_CHOICES, DEMO_KINDS))
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
    depths = list(accumulate((token in _OPEN) - (token in _CLOSE) for token in _TOKEN.findall(s)))
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
