"""SGPO (Strategy-Guided Policy Optimization): GRPO plus token-level distillation from the model's own strategy-guided samples.

What differs from grpo_baseline.py (equation numbers are the paper's, arXiv 2606.24064):
  1. A second, guided group of samples has a short strategy put before the problem in its prompt; GRPO (Eq. 1) ignores it.
  2. Target (Eq. 4): of the correct guided samples, the one that the model finds likeliest WITHOUT the strategy.
  3. Loss (Eq. 3, 5): on that target, forward KL from the guided to the unguided distribution, outlier tokens masked.
  4. Weight (Eq. 6, 7): alpha(q) is large where the strategy helps and the model alone fails, 0 where it does not help.
  5. Before training, a strong model turns solutions into strategies (App. B, C): five candidates, scored, the best kept.

    python sgpo.py                                      # the built-in demo: CPU, offline, minutes
    python sgpo.py --model Qwen/Qwen2.5-7B-Instruct     # real problems: strategies, SFT warm-up, RL
"""
import fcntl
import json
import math
import os
import re
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

from common import (DEFAULT_DATASET, SYSTEM_PROMPT, Endpoint, LocalChat, NoAnswer, Run, Unanswered, Watch, as_forward, batch_of_step, build_prompt,
                    check_context, check_flags, clip_gradients, completion_hidden, completion_logps, completion_mask, context_length, dealt,
                    demo_recipe, everyones, gathered, generate, gives_away, grader_counts, in_step, is_url, load_policy, load_problems, load_reward,
                    load_tokenizer, microbatches, over_vocabulary, parse_args, peak_memory_gb, printable, progress, rank, refuse, rollout_weights,
                    say_plan, say_table, score, seed_everything, sft_warmup, start_processes, stop_ids, summed, usable_rows, warmup_split,
                    within_memory, whole_lines)

# Letters: B problems of a step, G samples a problem, N rows (problems x samples), P prompt, C completion, V vocabulary.


# ---------------------------------------------------------------- flags

@dataclass
class Args:
    model: str = HfArg(default="demo", help="hub id or local directory; demo: the built-in tiny model")
    dataset: str = HfArg(default=None, help=f"JSONL, parquet or hub data set of problems (default: the demo's own, else {DEFAULT_DATASET})")
    eval_dataset: str = HfArg(default=None, help="held-out problems, same layouts (the demo has its own)")
    out: str = HfArg(default=None, help="run directory (default: a new one under runs/)")
    resume: bool = HfArg(default=False, help="go on with the run in --out from its newest checkpoint")
    max_rows: int = HfArg(default=8500, help="rows drawn from a larger data set, by the seed; 0: all")
    dry_run: bool = HfArg(default=False, help="print the plan and stop")
    seed: int = HfArg(default=0, help="seed of everything: problem order and sampling")
    reward: str = HfArg(default=None, help="own reward, FILE.py:function of (response, row); default: the math grader")
    system_prompt: str = HfArg(default=SYSTEM_PROMPT, help="system message; empty for none")
    # SFT warm-up
    warmup_frac: float = HfArg(default=0.33, help="share of the problems with a solution that are for the SFT warm-up, not for RL; 0: none")
    warmup_lr: float = HfArg(default=1e-5, help="its AdamW learning rate, at its highest")
    warmup_batch_size: int = HfArg(default=64, help="its solutions a step")
    warmup_epochs: int = HfArg(default=10, help="its epochs; the one with the lowest validation loss is kept")
    # strategies
    strategies: str = HfArg(default=None, help="JSONL file of strategies, read if there and filled with those extracted (default: strategies.jsonl in --out)")
    strategist: str = HfArg(default=None, help="who extracts them: hub id, directory, URL of an OpenAI-style endpoint, none (default: the model itself)")
    strategist_model: str = HfArg(default=None, help="the model to ask for at the endpoint; its key is read from OPENAI_API_KEY")
    strategist_max_new_tokens: int = HfArg(default=2048, help="longest answer of the strategist, in tokens; more for one that thinks first")
    strategist_threads: int = HfArg(default=16, help="requests to the endpoint at the same time")
    strategy_candidates: int = HfArg(default=5, help="candidates a solution, of which the best is kept")
    extract_only: bool = HfArg(default=False, help="stop once the strategies are extracted")
    # rollouts
    steps: int = HfArg(default=400, help="training steps, one rollout batch each; 0: the SFT baseline")
    prompts_per_step: int = HfArg(default=16, help="problems a step")
    group_size: int = HfArg(default=8, help="samples a problem without the strategy, G1")
    guided_group_size: int = HfArg(default=4, help="samples a problem with the strategy, G2")
    max_new_tokens: int = HfArg(default=2048, help="longest completion, in tokens")
    max_prompt_tokens: int = HfArg(default=1024, help="rows with a longer prompt are dropped")
    temperature: float = HfArg(default=1.0, help="sampling temperature; also divides the logits of the loss")
    top_p: float = HfArg(default=0.95, help="nucleus sampling")
    fast_rollout: str = HfArg(default="auto", help="off: transformers' generate; auto: a faster loop for model types tested with it; on: also a CUDA graph")
    # objective
    clip_low: float = HfArg(default=0.2, help="ratio clipped below 1 - clip_low")
    clip_high: float = HfArg(default=0.28, help="ratio clipped above 1 + clip_high")
    loss_type: str = HfArg(default="grpo", help="grpo: mean over a row's tokens, then rows; dapo: over all tokens; dr_grpo: sum / (rows x max_new_tokens)")
    scale_rewards: str = HfArg(default="group", help="divide centred rewards by the std of the group, of the batch, or none")
    autonomous_grpo: bool = HfArg(default=True, help="ablation: --no_autonomous_grpo leaves the distillation alone")
    # strategy distillation
    distill: str = HfArg(default="forward_kl", help="forward_kl; ablations: reverse_kl, sft (plain SFT on the target), none (no guided samples)")
    target: str = HfArg(default="reachable", help="reachable (Eq. 4); ablation: all (average over all correct guided samples, Eq. 2)")
    delta: float = HfArg(default=1.0, help="tokens with a KL above this are masked (Eq. 5); inf: none; with --target all: no proximal constraint")
    weight: str = HfArg(default="adaptive", help="alpha(q): adaptive (Eq. 6); ablations: fixed, group_advantage")
    alpha0: float = HfArg(default=0.5, help="Eq. 6, scale")
    gamma: float = HfArg(default=0.1, help="Eq. 6, smoothing of the pass rates")
    alpha_max: float = HfArg(default=0.8, help="Eq. 6, upper bound")
    fixed_alpha: float = HfArg(default=1.0, help="alpha of --weight fixed")
    # update
    lr: float = HfArg(default=1e-6, help="AdamW learning rate, constant after the warm-up")
    lr_warmup_steps: int = HfArg(default=0, help="steps of linear learning rate warm-up")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradient norm clipped to this")
    updates_per_rollout: int = HfArg(default=1, help="optimizer steps a rollout batch, each on its share of the problems")
    microbatch_tokens: int = HfArg(default=16384, help="padded tokens a forward pass; lower it when memory is short")
    activation_checkpointing: bool = HfArg(default=None, help="recompute activations in backward: less memory, a third more time (default: if memory asks)")
    cpu_offload: bool = HfArg(default=None, help="weights, gradients and optimizer rest in CPU memory: slower (default: if the GPU is too small without)")
    # evaluation and saving
    eval_every: int = HfArg(default=50, help="steps between held-out evaluations; 0: only first and last")
    eval_samples: int = HfArg(default=4, help="samples a held-out problem")
    eval_batch_size: int = HfArg(default=192, help="completions sampled at once in an evaluation")
    eval_temperature: float = HfArg(default=0.6, help="sampling temperature of the evaluation (the paper's)")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0: only the last")
    keep_checkpoints: int = HfArg(default=2, help="newest checkpoints kept")


def check_args(args: Args) -> None:
    check_flags(args, dict(steps=0, prompts_per_step=1, group_size=2, max_new_tokens=1, max_prompt_tokens=1, clip_low=0, clip_high=0, lr=0,
                           lr_warmup_steps=0, weight_decay=0, max_grad_norm=0, updates_per_rollout=1, microbatch_tokens=1, eval_every=0,
                           eval_samples=1, eval_batch_size=1, eval_temperature=0, save_every=0, keep_checkpoints=1, seed=0,
                           max_rows=0, warmup_frac=0, warmup_lr=0, warmup_batch_size=1, warmup_epochs=1))
    if args.warmup_frac > 1:
        refuse(f"--warmup_frac is {args.warmup_frac}; it is a share, from 0 to 1")
    check_flags(args, dict(guided_group_size=1, delta=0, alpha0=0, alpha_max=0, fixed_alpha=0, strategist_max_new_tokens=1, strategist_threads=1,
                           strategy_candidates=1))
    if is_url(args.strategist):
        if re.search("[@?#]", args.strategist):
            refuse("--strategist: take the key or password out of the address and put it into the environment variable OPENAI_API_KEY")
        if not args.strategist_model:
            refuse(f"--strategist {args.strategist} is an endpoint: name the model to ask there with --strategist_model")
    elif args.strategist_model:
        refuse(f"--strategist_model {args.strategist_model} is asked at an endpoint: give its address, http(s)://HOST:PORT/v1, as --strategist")
    folder = Path(args.strategies or ".").absolute().parent
    if not folder.is_dir() and folder != Path(args.out or ".").absolute():
        refuse(f"--strategies {args.strategies}: there is no such folder to put it in")
    if not args.temperature > 0 or not 0 < args.top_p <= 1:
        refuse(f"--temperature must be above 0 and --top_p in (0, 1], not {args.temperature} and {args.top_p}")
    if args.loss_type not in ("grpo", "dapo", "dr_grpo"):
        refuse(f"--loss_type {args.loss_type}: choose grpo, dapo or dr_grpo")
    if args.scale_rewards not in ("group", "batch", "none"):
        refuse(f"--scale_rewards {args.scale_rewards}: choose group, batch or none")
    if args.fast_rollout not in ("auto", "on", "off"):
        refuse(f"--fast_rollout {args.fast_rollout}: choose auto, on or off")
    for flag, choices in (("distill", ("forward_kl", "reverse_kl", "sft", "none")), ("target", ("reachable", "all")),
                          ("weight", ("adaptive", "fixed", "group_advantage"))):
        if getattr(args, flag) not in choices:
            refuse(f"--{flag} {getattr(args, flag)}: choose {', '.join(choices)}")
    if not args.gamma > 0:
        refuse(f"--gamma is {args.gamma}; it must be above 0, or a problem that is never solved alone divides by 0")
    if args.updates_per_rollout > args.prompts_per_step:
        refuse(f"--updates_per_rollout {args.updates_per_rollout} needs at least as many --prompts_per_step, not {args.prompts_per_step}")


# ---------------------------------------------------------------- strategies

EXTRACTION_PROMPT = """\
Here are a problem and a full solution. Write down the strategy behind the solution, so that somebody who never sees the solution can find it alone.

Answer in three parts with exactly these labels, and write nothing before or after them:
Problem type: the kind of problem, as precisely as the subject's own terms allow.
Strategy: the principle, theorem or technique that cracks it, and what in the problem calls for it.
Steps:
1. what to do first
2. what to do next, and so on, in the order of the work

Say what to do and never what comes out of it: no calculation, no intermediate value, and above all not the answer. A step is one move of thought, not
one line of algebra; it should hold for a sibling of this problem and still tell the reader what to do. At most 200 words.

Problem:
{problem}

Solution:
{solution}"""

SCORING_PROMPT = """\
Here are a problem, its answer, and {n} strategies that are meant to help somebody solve it without seeing the answer. Give each strategy one score
from 0 (useless) to 1 (perfect), weighing four questions:
- Problem type: is it right, and specific rather than the name of a whole subject?
- Strategy: does it fit this problem, is it specific, and is it more than the obvious?
- Steps: are they at the right height, neither empty advice nor the calculation retold?
- Secrecy: is there nothing of the calculation or the answer in it? A strategy that lets the answer slip deserves 0.

Write one line for each strategy and nothing else, in this form:
Strategy 1: 0.75

Problem:
{problem}

Answer:
{answer}

{strategies}"""


def said_after_thinking(answer: str) -> str:
    """An answer without what was thought before it; nothing where the thought never ended."""
    answer = answer.rpartition("</think>")[2]
    return "" if "<think>" in answer else answer


def parse_strategy(answer: str) -> str | None:
    """The strategy in a strategist's answer; None where one of the three parts is missing or empty, or the prompt's own form came back."""
    text = re.sub(r"^#+ *", "", re.sub(r"(?<![\w*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2", said_after_thinking(answer)), flags=re.M)
    starts, at = [], 0
    for label in (r"(?:\bproblem +)?\btype", r"\bstrategy", r"\bsteps"):
        found = re.compile(rf"{label} *(?:\([^()\n]*\) *)?(?::|(?<=\w)\n)", re.I).search(text, at)
        if found is None:
            return None
        starts.append(found)
        at = found.end()
    ends = [starts[1].start(), starts[2].start(), len(text)]
    parts = [text[found.end():end] for found, end in zip(starts, ends)]
    echoed = any(line in text for line in EXTRACTION_PROMPT.splitlines() if line.startswith(("Problem type:", "Strategy:")))
    return text[starts[0].start():].strip() if all(re.search(r"\w", part) for part in parts) and not echoed else None


def parse_scores(answer: str, n: int) -> list[float | None]:
    """The score of each of n strategies, None where there is none from 0 to 1."""
    label = r"^\W*(?:strategy|candidate|score)?\W*([0-9]+)`?\W*?(?::|\||[=.)\u2013\u2014-]\s)[\s*`|]*"
    number = r"([01]?\.[0-9]+|[01])(?![0-9]|\.[0-9]|\s*/\s*(?!1(?![0-9])))"
    found = re.findall(label + number, said_after_thinking(answer), re.M | re.I)
    scores = {int(k): float(x) for k, x in found if float(x) <= 1}
    return [scores.get(k + 1) for k in range(n)]


def extract(rows: list[dict], ask, fits, args: Args) -> list[dict]:
    """App. B, C: for each row with a solution the best of several candidate strategies, or None, with all candidates and their scores.

    `ask(prompts, temperature)` gives the strategist's answers; `fits(row, strategy)` says whether the guided prompt is short enough.
    """
    n = args.strategy_candidates
    answers = iter(ask([EXTRACTION_PROMPT.format(problem=row["problem"], solution=row["solution"]) for row in rows for _ in range(n)], 1.0))
    drafts = [[judge(next(answers), row, fits) for _ in range(n)] for row in rows]
    good = [[c for c in candidates if "rejected" not in c] for candidates in drafts]
    verdicts = iter(ask([SCORING_PROMPT.format(n=len(cs), problem=row["problem"], answer=row["answer"],
                                               strategies="\n\n".join(f"Strategy {k}:\n{c['strategy']}" for k, c in enumerate(cs, 1)))
                         for row, cs in zip(rows, good) if cs], 0.0))
    results = []
    for row, candidates, cs in zip(rows, drafts, good):
        for c, value in zip(cs, parse_scores(next(verdicts), len(cs)) if cs else []):
            c["score"] = value
        best = max(cs, key=lambda c: -1 if c["score"] is None else c["score"], default={"strategy": None, "score": None})
        results.append({"id": row["id"], "problem": row["problem"], **best, "candidates": candidates})
    return results


def judge(answer: str, row: dict, fits) -> dict:
    """A candidate: its strategy, and why it is rejected if it is."""
    if isinstance(answer, NoAnswer):
        return {"rejected": str(answer)}
    strategy = parse_strategy(answer)
    if strategy is None:
        return {"rejected": "not in three parts", "answer": answer[-2000:]}
    if gives_away(strategy, row["answer"], row["problem"]):
        return {"strategy": strategy, "rejected": "gives the answer away"}
    if not fits(row, strategy):
        return {"strategy": strategy, "rejected": "too long"}
    return {"strategy": strategy}


def read_strategies(path: Path) -> dict[str, dict]:
    """problem -> its line of the file; "strategy" is null where the extraction found none. A last line that a kill has cut is left out."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"--strategies {path}: cannot be read as text ({type(error).__name__})")
    for number, line in enumerate(lines, 1):
        if line:
            try:
                entry = json.loads(line)
                if not isinstance(entry["strategy"], str | None):
                    raise TypeError
                found[entry["problem"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                if not (isinstance(error, ValueError) and number == len(lines) and line.startswith('{"id": ')):
                    refuse(f"{path}, line {number}: must be a JSON object with \"problem\" and \"strategy\"")
    return found


def strategist_of(args: Args) -> str:
    """Who is asked, as the file of strategies names it."""
    return args.strategist_model or args.strategist or args.model


def adopt_strategies(rows: list[dict], path: Path) -> dict[str, dict]:
    """Give rows without a strategy theirs from the file -> what the file holds."""
    found = read_strategies(path)
    for row in rows:
        if "strategy" not in row and found.get(row["problem"], {}).get("strategy"):
            row["strategy"] = found[row["problem"]]["strategy"]
    return found


def worth_another_try(entry: dict, args: Args) -> bool:
    """Is this line of the file, without a strategy, another strategist's, or one of an endpoint that fell silent?"""
    silent = any(c.get("rejected", "").startswith("no answer") for c in entry.get("candidates", ()))
    return entry["strategy"] is None and (silent or entry.get("strategist", strategist_of(args)) != strategist_of(args))


def longest_prompt(args: Args) -> int:
    """In tokens: what --max_prompt_tokens and the model's context allow."""
    return min(args.max_prompt_tokens, context_length(args.model) - args.max_new_tokens)


def drop_long_strategies(rows: list[dict], encode, args: Args) -> None:
    """A strategy that makes the prompt too long goes; its problem stays. `encode(row)` gives the prompts without and with it."""
    long = [row for row in rows if "strategy" in row and len(encode(row)[1]) > longest_prompt(args)]
    for row in long:
        del row["strategy"]
    if long:
        print(f"dropped the strategies of {len(long)} of {len(rows)} rows: with them the prompt is over {longest_prompt(args)} tokens, "
              f"first: id {printable(long[0]['id'])}")


def add_strategies(rows: list[dict], model, tokenizer, own_tokenizer, path: Path, run: Run, args: Args) -> None:
    """Extract a strategy for each of these rows, which have a solution, into the file: one by one, as they come."""
    limit, lock = longest_prompt(args), threading.Lock()
    bar = progress(len(rows), desc="strategies", unit="problem")
    watch, kept = Watch(bar), 0

    def fits(row: dict, strategy: str) -> bool:
        with lock:  # a tokenizer is not for several threads at once
            return len(build_prompt(tokenizer, row["problem"], args.system_prompt, strategy)) <= limit

    def results():
        if is_url(args.strategist):
            if rank() == 0:  # one process has threads enough
                strategist = Endpoint(args.strategist, args.strategist_model, args.strategist_max_new_tokens, args.strategist_threads,
                                      path.with_name(path.name + ".answers"), watch)
                yield from strategist.each(lambda some: extract(some, strategist.ask, fits, args), rows)
            return
        name, flag = (args.strategist, "--strategist") if args.strategist else (args.model, "--model")
        with rollout_weights(load_policy(name, flag, trained=False) if args.strategist else model) as fast:
            strategist = LocalChat(fast, own_tokenizer, args.strategist_max_new_tokens, context_length(name, flag), args.seed, watch)
            yield from strategist.each(lambda some: extract(some, strategist.ask, fits, args), rows)

    with open(path if rank() == 0 else os.devnull, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if rank() == 0:
                refuse(f"--strategies {path}: another run is writing it; wait for that, or name another file", alone=True)
        if rank() == 0:
            whole_lines(path)
        try:
            for result in results():
                file.write(json.dumps({**result, "strategist": strategist_of(args)}) + "\n")
                file.flush()
                kept += result["strategy"] is not None
                bar.set_postfix_str(f"{kept} found")
                bar.update()
        except Unanswered as error:
            bar.close()
            refuse(f"--strategist {error}; {path} keeps what is done, --resume --out {run.dir} goes on from there")
    bar.close()
    if watch.agreed():
        run.stop("extracting strategies")
    say_quality([entry for entry in read_strategies(path).values() if "candidates" in entry])


def say_quality(results: list[dict]) -> None:
    """Bands of the best candidates' scores (App. C: 39.4% in [0.8, 1], 54.4% in [0.5, 0.8), 6.2% below), and why others were rejected."""
    scores = [r["score"] for r in results if r["score"] is not None]
    why = Counter(c["rejected"] for r in results for c in r["candidates"] if "rejected" in c)
    bands = [f"{sum(low <= x < high for x in scores) / max(len(scores), 1):.1%}" for low, high in ((0.8, 2), (0.5, 0.8), (0, 0.5))]
    say_table([["strategies found", f"{sum(r['strategy'] is not None for r in results)} of {len(results)}"],
               ["scores", f"{bands[0]} in [0.8, 1], {bands[1]} in [0.5, 0.8), {bands[2]} below ({len(scores)} scored)"],
               ["candidates rejected", ", ".join(f"{n} {reason}" for reason, n in why.most_common()) or "none"]])


# ---------------------------------------------------------------- rollout

@dataclass
class Rollout:
    prompts: list[list[int]]  # N prompts as they were sampled from, unpadded
    completions: Tensor       # [N, C] token ids as sampled, never decoded and tokenised again
    mask: Tensor              # [N, C] True up to and including the first end token
    truncated: Tensor         # [N] True where no end token came
    texts: list[str]          # N


def rollout(model, tokenizer, prompts: list[list[int]], eos: list[int], args: Args, temperature: float, watch=None) -> Rollout:
    """Sample one completion for every prompt, all in one call."""
    if watch is not None:
        watch.rolling_out()
    completions = generate(model, prompts, eos, tokenizer.pad_token_id, args.max_new_tokens, temperature, args.top_p, watch, args.fast_rollout)
    mask, truncated = completion_mask(completions, eos)
    texts = tokenizer.batch_decode([ids[m] for ids, m in zip(completions, mask)], skip_special_tokens=True)
    return Rollout(prompts, completions, mask, truncated, texts)


# ---------------------------------------------------------------- objective

def group_advantages(rewards: Tensor, scale: str = "group", eps: float = 1e-6) -> Tensor:
    """Eq. 1, A_i = (R_i - mean of its group) / (std + eps). [B, G] -> [B, G]; std with ddof = 1.

    A group whose rewards are all equal gives exactly 0: in fp32 its std need not be 0, and dividing by it would make noise.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std() + eps)
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(constant, 0.0, centred)


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Eq. 1, -min(rho A, clip(rho, 1 - low, 1 + high) A) of every token, rho = pi / pi_old; and where clipping cut it off.

    logps, old_logps, mask [n, C], advantages [n], or [n, C] one a token -> loss, clipped [n, C]. Masked before exp: an overflow in a padded place
    would make the gradient NaN. "Why is my ratio 1 and my loss 0?" On the first update after a rollout rho = 1 whatever the
    weights, and advantages sum to 0 in a group: the value says nothing, the gradient is A grad log pi all the same.
    """
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    rho = torch.where(mask, logps - old_logps, 0.0).exp()
    clipped = (rho > 1 + clip_high) & (A > 0) | (rho < 1 - clip_low) & (A < 0)
    loss = -torch.min(rho * A, rho.clamp(1 - clip_low, 1 + clip_high) * A)
    return loss * mask, clipped & mask


def token_weights(mask: Tensor, loss_type: str, max_new_tokens: int, rows: float | None = None, tokens: float | None = None) -> Tensor:
    """Eq. 1, the means: what each row's tokens weigh in the loss, [n]; made once for the whole update, before it is cut into micro-batches.

    grpo: 1 / (N |o_i|), dapo: 1 / (all tokens), dr_grpo: 1 / (N max_new_tokens). Rows without signal count in N. `rows` and `tokens` are those of
    all processes, where the mask has one's share.
    """
    lengths = mask.sum(1).float()
    rows, tokens = rows or len(mask), tokens or lengths.sum()
    if loss_type == "grpo":
        return 1 / (rows * lengths.clamp(min=1))
    if loss_type == "dapo":
        return torch.ones_like(lengths) / max(tokens, 1)
    return torch.ones_like(lengths) / (rows * max_new_tokens)


def forward_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Eq. 3: d = KL( stopgrad pi(. | q, s, o_<t) || pi(. | q, o_<t) ) over the whole vocabulary. [m, V] twice -> [m], nats.

    The stop-gradient is on the logits: both sides share their weights, lm_head included.
    """
    guided, plain = guided_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (guided.exp() * (guided - plain)).sum(-1)


def reverse_kl(guided_logits: Tensor, logits: Tensor) -> Tensor:
    """Ablation of Eq. 3: KL( pi(. | q, o_<t) || stopgrad pi(. | q, s, o_<t) )."""
    guided, plain = guided_logits.detach().log_softmax(-1), logits.log_softmax(-1)
    return (plain.exp() * (plain - guided)).sum(-1)


def clip_kl(d: Tensor, delta: float) -> Tensor:
    """Eq. 5: 1[d <= delta] d. Outliers are masked, not capped; the mean over the target's tokens keeps its denominator |o+|."""
    return torch.where(d <= delta, d, 0.0)


def reachable_target(sum_logps: Tensor) -> int:
    """Eq. 4: argmax over the correct guided samples of sum_t log pi(g_t | q, g_<t), scored WITHOUT the strategy. [|C|] -> index.

    A sum, not a mean: it also favours the shorter target.
    """
    return int(sum_logps.argmax())


def adaptive_weight(p_guided: Tensor, p_auto: Tensor, alpha0: float, gamma: float, alpha_max: float) -> Tensor:
    """Eq. 6: alpha(q) = clip(alpha0 (p_guided - p_auto + gamma) / (p_auto + gamma), 0, alpha_max), from the groups' pass rates. [B] -> [B]"""
    return (alpha0 * (p_guided - p_auto + gamma) / (p_auto + gamma)).clamp(0, alpha_max)


def group_advantage_weight(rewards: Tensor, alpha_max: float) -> Tensor:
    """Ablation of Eq. 6: clip(advantage of o+ in the group of the autonomous samples and o+ (reward 1), 0, alpha_max). [B, G1] -> [B]"""
    return group_advantages(torch.cat([rewards, torch.ones_like(rewards[:, :1])], 1))[:, -1].clamp(0, alpha_max)


# ---------------------------------------------------------------- guidance

@dataclass
class Guidance:
    prompts: list[list[int]]  # N prompts as they were sampled from: guided rows' hold the strategy
    correct: list[list[int]]  # B lists of rows: a problem's correct guided samples, C
    alpha: Tensor             # [B] alpha(q), 0 where C is empty


def guide(prompts: list[list[int]], rewards: Tensor, problems: list[dict], args: Args) -> tuple[Guidance, dict]:
    """Candidates and weight of every problem, from the rewards [N] of both groups: B x G1 autonomous rows, then the guided ones."""
    B, correct = len(problems), [[] for _ in problems]
    groups, guided = rewards[:B * args.group_size].view(B, -1), rewards[B * args.group_size:].view(-1, args.guided_group_size)
    helped = [q for q, row in enumerate(problems) if "strategy" in row][:len(guided)]
    p_auto, p_guided = (groups >= 0.5).float().mean(1), torch.zeros(B)
    for k, q in enumerate(helped):
        first = B * args.group_size + k * args.guided_group_size
        correct[q] = [first + j for j in range(args.guided_group_size) if guided[k, j] >= 0.5]
        p_guided[q] = len(correct[q]) / args.guided_group_size
    if args.weight == "adaptive":
        alpha = adaptive_weight(p_guided, p_auto, args.alpha0, args.gamma, args.alpha_max)
    elif args.weight == "group_advantage":
        alpha = group_advantage_weight(groups, args.alpha_max)
    else:
        alpha = torch.full((B,), args.fixed_alpha)
    alpha = torch.where(torch.tensor([bool(C) for C in correct]), alpha, 0.0)
    of_all = gathered(torch.stack([torch.tensor([float(q in helped) for q in range(B)]), alpha, p_auto, p_guided,
                                   torch.tensor([float(not C) for C in correct])], 1))
    names = ("sgpo/alpha", "sgpo/p_auto", "sgpo/p_guided", "sgpo/no_target_frac")
    metrics = dict(zip(names, of_all[of_all[:, 0] == 1, 1:].mean(0).tolist())) if of_all[:, 0].any() else {}
    return Guidance(prompts, correct, alpha), metrics


# ---------------------------------------------------------------- update


def update(model, optimizer, ro: Rollout, advantages: Tensor, guidance: Guidance, args: Args, watch: Watch) -> dict | None:
    """All optimizer steps of one rollout batch -> metrics; None if stopped before the first, with the weights untouched.

    Rows whose advantage is 0 are skipped: they add nothing to the gradient, but still count in the normaliser. So are problems
    whose alpha is 0. Every row is scored under `ro.prompts`, the prompt without the strategy.
    """
    device, G = ro.mask.device, args.group_size
    stats, norms, nonfinite = defaultdict(float), [], 0
    lengths = ro.mask.sum(1).tolist()
    live = {i for i in range(len(advantages)) if advantages[i] != 0}
    advantages = advantages.to(device)
    delta = float("inf") if args.distill == "sft" else args.delta  # -log pi is no KL: nothing to clip

    def logps_of(batch: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        width = max((lengths[i] for i in batch), default=1)
        mask = ro.mask[batch, :width]
        logps, entropy = completion_logps(model, [ro.prompts[i] for i in batch], ro.completions[batch, :width], mask, args.temperature)
        return logps, entropy, mask

    def distances_of(batch: list[int]) -> tuple[Tensor, Tensor]:
        """d_t [n, C] of Eq. 3, or -log pi for the SFT ablation: guided and unguided prompts differ in length, o+ aligns them."""
        if args.distill == "sft":
            logps, _, mask = logps_of(batch)
            return -logps, mask
        width = max((lengths[i] for i in batch), default=1)
        mask, completions = ro.mask[batch, :width], ro.completions[batch, :width]
        kl = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}[args.distill]
        with torch.no_grad():
            guided = as_forward(model, lambda: completion_hidden(model, [guidance.prompts[i] for i in batch], completions, mask))

        def forward() -> Tensor:
            plain = completion_hidden(model, [ro.prompts[i] for i in batch], completions, mask)
            return over_vocabulary(lambda *logits: (kl(*logits),), model, [guided, plain], temperature=args.temperature)[0]

        return torch.zeros(mask.shape, device=device).masked_scatter(mask, as_forward(model, forward)), mask

    def cut(rows: list[int], stats: dict) -> list[list[int]]:
        """Micro-batches of rows of like length."""
        sizes = [len(ro.prompts[i]) + lengths[i] for i in rows]
        batches = [[rows[k] for k in batch] for batch in microbatches(sizes, args.microbatch_tokens)]
        stats["tokens"] += sum(sizes)
        stats["padded"] += sum(len(b) * max(len(ro.prompts[i]) + lengths[i] for i in b) for b in batches)
        return in_step(batches)

    old_logps = torch.zeros(ro.mask.shape, device=device)
    if args.updates_per_rollout > 1:  # later updates are off-policy: remember what the sampling policy said
        with torch.no_grad():
            for batch in cut(sorted(live), stats):
                logps, _, mask = logps_of(batch)
                old_logps[batch, :mask.shape[1]] = logps

    def gradient_of(problems: list[int]) -> dict | None:
        """The gradient of the problems that one optimizer step is made on, accumulated -> sums for the metrics; None if told to stop."""
        part, rows = defaultdict(float), [q * G + j for q in problems for j in range(G)]
        n = summed({"rows": len(rows), "tokens": ro.mask[rows].sum().item(), "problems": len(problems)})
        weights = torch.zeros(len(ro.mask), device=device)
        weights[rows] = token_weights(ro.mask[rows], args.loss_type, args.max_new_tokens, n["rows"], n["tokens"])
        for batch in cut([i for i in rows if i in live], part):
            logps, entropy, mask = logps_of(batch)
            old = logps.detach() if args.updates_per_rollout == 1 else old_logps[batch, :mask.shape[1]]
            loss, clipped = policy_loss(logps, old, advantages[batch], mask, args.clip_low, args.clip_high)
            loss = (loss * weights[batch, None]).sum()
            loss.backward()
            part["loss"] += loss.item()
            part["entropy"] += entropy.sum().item()
            part["clipped"] += clipped.sum().item()
            part["scored"] += mask.sum().item()
            if watch.agreed() and not norms:
                return None

        # Eq. 7: + alpha(q) L_KD(q), averaged over the problems of the update
        taught = {q: guidance.correct[q] for q in problems if guidance.alpha[q] > 0}
        if args.target == "reachable":
            sums = {}
            with torch.no_grad():
                for batch in cut([i for C in taught.values() if len(C) > 1 for i in C], part):
                    sums |= zip(batch, logps_of(batch)[0].sum(1).tolist())
            taught = {q: [C[reachable_target(torch.tensor([sums[i] for i in C]))]] if len(C) > 1 else C for q, C in taught.items()}
        kd_weights = torch.zeros(len(ro.mask), device=device)
        for q, targets in taught.items():
            for i in targets:
                kd_weights[i] = guidance.alpha[q] / (n["problems"] * len(targets) * lengths[i])
        for batch in cut([i for targets in taught.values() for i in targets], part):
            d, mask = distances_of(batch)
            loss = (clip_kl(d, delta) * kd_weights[batch, None]).sum()
            loss.backward()
            part["loss"] += loss.item()
            part["kl"] += d.sum().item()
            part["kl_clipped"] += (d > delta).sum().item()
            part["kl_tokens"] += mask.sum().item()
            if watch.agreed() and not norms:
                return None
        return part

    model.train()  # for activation checkpointing; there is no dropout
    mine = list(dealt(range(args.prompts_per_step)))  # which of the step's problems these are
    for share in np.array_split(np.arange(args.prompts_per_step), args.updates_per_rollout):
        part = within_memory(lambda: gradient_of([q for q, k in enumerate(mine) if k in share]), optimizer, args)
        if part is None:
            optimizer.zero_grad()
            return None
        for name, value in part.items():
            stats[name] += value
        if any(p.grad is not None for p in model.parameters()):
            norm = clip_gradients(model, args.max_grad_norm)
            if math.isfinite(norm):
                optimizer.step()
                norms.append(norm)
            else:
                nonfinite += 1
            optimizer.zero_grad()
    model.eval()
    stats = summed(stats)
    metrics = {"loss": stats["loss"] / args.updates_per_rollout, "grad_norm": sum(norms) / max(len(norms), 1), "updates": len(norms),
               "nonfinite_updates": nonfinite, "clip_ratio": stats["clipped"] / max(stats["scored"], 1),
               "padding_frac": 1 - stats["tokens"] / max(stats["padded"], 1)}
    if stats["scored"]:
        metrics["entropy"] = stats["entropy"] / stats["scored"]
    if stats["kl_tokens"]:
        metrics |= {"sgpo/kl": stats["kl"] / stats["kl_tokens"], "sgpo/kl_clipped_frac": stats["kl_clipped"] / stats["kl_tokens"]}
    return metrics


# ---------------------------------------------------------------- evaluation

def evaluate(model, tokenizer, rows: list[dict], eos: list[int], reward, args: Args, watch: Watch) -> dict:
    """Held-out accuracy: sampled, mean over --eval_samples; also with the strategy in the prompt, where every row has one. {} if told to stop."""
    metrics, mine = {}, [row for row in dealt(rows) for _ in range(args.eval_samples)]
    n = -(-len(mine) // args.eval_batch_size)  # calls
    ways = {"eval/accuracy": False, "eval/accuracy_guided": True} if all("strategy" in row for row in rows) else {"eval/accuracy": False}
    for name, guided in ways.items():
        seed_everything(args.seed, 2 ** 31)  # the same draws at every evaluation
        correct = []
        with rollout_weights(model) as fast:
            for batch in [mine[k::n] for k in range(n)]:
                prompts = [build_prompt(tokenizer, row["problem"], args.system_prompt, row["strategy"] if guided else None) for row in batch]
                if not watch.stopped:
                    ro = rollout(fast, tokenizer, prompts, eos, args, args.eval_temperature, watch)
                    correct += (score(reward, ro.texts, batch) >= 0.5).tolist()
        if watch.agreed():
            return {}
        metrics[name] = float(np.mean(sum(everyones(correct), [])))
    return metrics


# ---------------------------------------------------------------- main

def main() -> None:
    start_processes()
    args = parse_args(Args, demo_recipe)
    check_args(args)
    reward = load_reward(args.reward)
    run = Run(args)
    tokenizer = load_tokenizer(args.model)
    local = args.strategist not in (None, "none") and not is_url(args.strategist)
    own_tokenizer = load_tokenizer(args.strategist, "--strategist") if local else tokenizer  # the strategist's

    def encode(row: dict) -> list[list[int]]:
        """Every prompt that is made of a row: without the strategy and, where it has one, with it."""
        return [build_prompt(tokenizer, row["problem"], args.system_prompt, s) for s in (None, row.get("strategy")) if s or s is None]

    rows, eval_rows = load_problems(args)
    strategies_path = Path(args.strategies or run.dir / "strategies.jsonl")
    extracting = args.distill != "none" and bool(args.steps or args.extract_only)
    known = adopt_strategies(rows, strategies_path) if extracting else {}
    drop_long_strategies([*rows, *eval_rows], encode, args)
    rows, longest = usable_rows(rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    if eval_rows:
        eval_rows, _ = usable_rows(eval_rows, encode, args.max_prompt_tokens, check_gold=reward is None)
    check_context(args.model, longest, args.max_new_tokens)
    warmup_rows, rows = warmup_split(rows, tokenizer, reward, args)
    asked = {problem for problem, entry in known.items() if not worth_another_try(entry, args)}
    unread = {row["problem"]: row for row in rows if "solution" in row and "strategy" not in row and row["problem"] not in asked}
    unread = list(unread.values()) if extracting and args.strategist != "none" else []
    helped = sum("strategy" in row for row in rows)
    if extracting and not helped and not unread and not known:
        refuse(f"none of the {len(rows)} problems has a strategy, or a solution to extract one from: add \"strategy\" or \"solution\" to the rows of "
               "--dataset, name a file of --strategies, or train without with --distill none")
    n_guided = args.guided_group_size * (args.distill != "none")
    say_plan(args, run, rows, warmup_rows, f"({args.group_size} + {n_guided} guided)", args.prompts_per_step * (args.group_size + n_guided), longest,
             strategies=f"{helped} there, {len(unread)} to be extracted"
             + f" by {args.strategist or args.model}, {args.strategy_candidates} candidates each -> {strategies_path}" * bool(unread))
    if args.dry_run:
        return
    model = None
    if not args.extract_only or unread and args.strategist is None:
        model = load_policy(args.model, activation_checkpointing=args.activation_checkpointing, cpu_offload=args.cpu_offload)
    run.create()
    if unread:
        add_strategies(unread, model, tokenizer, own_tokenizer, strategies_path, run, args)
        adopt_strategies(rows, strategies_path)
        grader_counts()  # what was asked about strategies belongs to no step
        helped = sum("strategy" in row for row in rows)
    if args.extract_only:
        return
    eos = stop_ids(model, tokenizer)
    if extracting and helped < len(rows):
        print(f"{len(rows) - helped} of {len(rows)} problems have no strategy: they train by GRPO alone" + (
            "" if helped else f"; nothing is left of SGPO, try a stronger --strategist ({strategies_path} says why candidates were rejected)"))
    sft_warmup(model, tokenizer, warmup_rows, run, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    finished = run.begin(model, optimizer)
    bar = progress(args.steps, finished, desc="training", unit="step")
    watch = Watch(bar)
    if eval_rows and not run.evaluations():
        if first := evaluate(model, tokenizer, eval_rows, eos, reward, args, watch):
            run.log("metrics", {"step": 0, **first})

    while finished < args.steps and not watch.agreed():
        # ---- sample problems
        step, began = finished + 1, time.perf_counter()
        seed_everything(args.seed, step)
        problems = dealt([rows[i] for i in batch_of_step(len(rows), step - 1, args.prompts_per_step, args.seed)])  # b of the B of all processes
        samples = [row for row in problems for _ in range(args.group_size)]  # N rows, a problem's side by side: [b, G] flattened
        n_auto = len(samples)
        if args.distill != "none":
            samples += [row for row in problems if "strategy" in row for _ in range(args.guided_group_size)]
        lr = args.lr * min(1.0, step / max(args.lr_warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # ---- rollout
        prompts = [encode(row)[i >= n_auto] for i, row in enumerate(samples)]
        with rollout_weights(model) as fast:
            ro = rollout(fast, tokenizer, prompts, eos, args, args.temperature, watch)
        if watch.agreed():
            break
        sampled = time.perf_counter()

        # ---- rewards and advantages
        rewards = score(reward, ro.texts, samples)
        groups = gathered(rewards[:n_auto].view(len(problems), args.group_size))
        advantages = dealt(group_advantages(groups, args.scale_rewards)).flatten() * args.autonomous_grpo
        guidance, guided_stats = guide(prompts, rewards, problems, args)
        ro = replace(ro, prompts=[encode(row)[0] for row in samples])  # from here on every row is scored without the strategy
        graded = time.perf_counter()

        # ---- update
        stats = update(model, optimizer, ro, advantages, guidance, args, watch)
        if stats is None:
            break
        finished = step

        # ---- log and save
        now, lengths = time.perf_counter(), gathered(ro.mask[:n_auto].sum(1).view(len(problems), -1)).float()
        written, ends = summed({"": ro.mask.sum().item()})[""], gathered(ro.truncated[:n_auto].view(len(problems), -1)).float()
        metrics = {"step": step, "reward": groups.mean().item(), "reward_std": groups.std(1).mean().item(),
                   "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
                   "completions/mean_length": lengths.mean().item(), "completions/clipped_ratio": ends.mean().item(), **stats, **guided_stats,
                   "lr": lr, "time/rollout_s": sampled - began, "time/grade_s": graded - sampled, "time/train_s": now - graded,
                   "tokens_per_s": written / (now - began), "peak_memory_gb": peak_memory_gb(),
                   **{f"grader/{outcome}": count for outcome, count in summed(grader_counts()).items()}}
        if eval_rows and (step == args.steps or args.eval_every and step % args.eval_every == 0):
            metrics |= evaluate(model, tokenizer, eval_rows, eos, reward, args, watch)
        run.log("samples", *sum(everyones([{"step": step, "id": row["id"], "reward": r, "guided": i >= n_auto, "completion": text}
                             for i, (row, r, text) in enumerate(zip(samples, rewards.tolist(), ro.texts))]), []))
        run.log("metrics", metrics)
        run.check_finite(metrics)
        if args.save_every and step % args.save_every == 0:
            run.save_checkpoint(step, model, optimizer)
        if step == 1 or "eval/accuracy" in metrics:
            bar.write(f"step {step}, reward {rewards[0]:g}: {printable(ro.texts[0])[:2000]}")
        if ends.all():
            bar.write(f"step {step}: every completion ran into --max_new_tokens {args.max_new_tokens}; nothing can be learnt from that, raise it")
        bar.set_description(f"reward {metrics['reward']:.2f}")
        bar.update()
    bar.close()

    run.save_checkpoint(finished, model, optimizer)
    if finished < args.steps:
        run.stop(f"after step {finished} of {args.steps}")
    final = run.save_model(model, tokenizer)
    if evals := run.evaluations():
        names = {"eval/accuracy": "alone", "eval/accuracy_guided": "with the strategy"}
        say_table([["held-out accuracy", "before", "after"],
                   *[[names[k], f"{evals[0][k]:.3f}", f"{evals[-1][k]:.3f}"] for k in names if k in evals[0]]])
    print(f"model: {final}\nmetrics, samples, checkpoints: {run.dir}")


if __name__ == "__main__":
    main()
