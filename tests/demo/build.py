#!/usr/bin/env python3
"""Build the demo: its problems, a tiny student that RL can improve, and two teachers.

    python tests/demo/build.py                                # write the files next to this script, seed 0
    python tests/demo/build.py --seed 1 --out runs/demo1      # other models, the same problems

A problem is a letter and a number, such as `E 30`. The solution is a chain of four operations:
`30+2=32;32*2=64;64+1=65;65+9=74;\\boxed{74}`. At each step there are two operations to choose from. Only the
letter tells which one is right, and the strategy of a problem names all four right ones.

1. student/             follows a strategy if the prompt has one, and seldom finds the right choices alone
2. teacher/             knows the right choices, but writes operations in words: `30 plus 2=32;`
3. teacher_same_style/  knows the right choices and writes like the student

The files are part of the repository, because the same seed on another machine gives slightly different
weights, and then different results. Building takes some minutes on one CPU core.
"""
import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from common import build_prompt  # noqa: E402  the prompts must be those of RL, token for token

OPERATIONS = [("+2", "-2"), ("+3", "*2"), ("+1", "-1"), ("+5", "+9")]  # the two choices at each step
SIGNS = [operation for pair in OPERATIONS for operation in pair]
KINDS = {  # for each letter the right choice at each step
    "A": "0110",
    "B": "1001",
    "C": "0011",
    "D": "1100",
    "E": "0101",
    "F": "1010",
    "G": "0001",
    "H": "1110",
}
NUMBERS = range(20, 58)  # every result stays below 150, so that it is a single token
HELD_OUT = 100
IN_WORDS = "In words."  # the system prompt under which the student writes operations in words
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>", "<system>"]
IGNORE = -100  # the label of a token that is read and not taught

BATCH_SIZE = 64
STUDENT_STEPS, STUDENT_LR = 240, 3e-3
TEACHER_STEPS, TEACHER_LR = 200, 1e-3

Rng = np.random.Generator
Leanings = dict[str, np.ndarray]       # for each kind how often each choice is right, see draw_leanings
Example = tuple[list[int], list[int]]  # token ids of prompt and completion, and their labels


# ---------------------------------------------------------------- problems

def in_words(operation: str) -> str:
    """Return "+2" as " plus 2"."""
    sign, number = operation[0], operation[1:]
    name = {"+": "plus", "-": "minus", "*": "times"}[sign]
    return f" {name} {number}"


def calculate(operation: str, value: int) -> int:
    """Return the result of an operation, such as "*2", on a value."""
    sign, number = operation[0], int(operation[1:])
    if sign == "+":
        return value + number
    if sign == "-":
        return value - number
    return value * number


def chosen_operations(choices: str) -> list[str]:
    """Return the operations that the choices stand for: "0110" is +2, *2, -1, +5."""
    return [pair[int(choice)] for pair, choice in zip(OPERATIONS, choices)]


def solve(choices: str, number: int, words: bool = False) -> tuple[str, int]:
    """Return the solution that makes these choices, and its result. Operations are signs or words."""
    text = ""
    value = number
    for operation in chosen_operations(choices):
        result = calculate(operation, value)
        written = in_words(operation) if words else operation
        text += f"{value}{written}={result};"
        value = result
    return text + f"\\boxed{{{value}}}", value


def describe(kind: str, choices: str) -> str:
    """Return the strategy that names these choices, in the three parts of SGPO's strategies."""
    steps = ", ".join(chosen_operations(choices))
    return f"Type: {kind}. Strategy: chain. Steps: {steps}."


def make_problems() -> tuple[list[dict], list[dict]]:
    """Return training and held-out problems. They do not depend on --seed, so builds can be compared."""
    problems = []
    for kind, choices in KINDS.items():
        for number in NUMBERS:
            solution, result = solve(choices, number)
            problem = {
                "id": f"{kind}{number}",
                "problem": f"{kind} {number}",
                "answer": str(result),
                "solution": solution,
                "strategy": describe(kind, choices),
            }
            problems.append(problem)
    order = np.random.default_rng(0).permutation(len(problems))
    shuffled = [problems[i] for i in order]
    return shuffled[:-HELD_OUT], shuffled[-HELD_OUT:]


# ---------------------------------------------------------------- tokenizer

def make_tokenizer() -> Qwen2Tokenizer:
    """Build a tokenizer with one token for each character, number, operation and fixed phrase of the demo.

    It has no other tokens on purpose. RL lowers the wrong choices, and what they lose goes to other tokens.
    A token that SFT never taught as output could take over, and the run would end in noise.
    An operation is a single token in both styles, so a solution in words is as long as one in signs.
    """
    characters = [*"0123456789", *KINDS, *"+-*=;.,}", "\u0120"]  # \u0120 is how byte-level BPE spells a space
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    tokenizer = Qwen2Tokenizer(
        vocabulary,
        unk_token="<pad>",
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL[2:],
    )
    words = [in_words(operation) for operation in SIGNS]
    numbers = [str(n) for n in range(10, 150)]
    phrases = ["\\boxed{", "Strategy:\n", "\n\nProblem:\n", "Type: ", "Strategy: chain.", "Steps: ", IN_WORDS]
    tokenizer.add_tokens(numbers + SIGNS + words + phrases)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "<assistant>"
    )
    return tokenizer


# ---------------------------------------------------------------- what the models are taught

def any_choices(rng: Rng) -> str:
    """Return four choices, each of them right or wrong by chance."""
    return "".join(rng.choice(["0", "1"], len(OPERATIONS)))


def encode(tokenizer: Qwen2Tokenizer, choices: str, number: str) -> tuple[list[int], list[int]]:
    """Return a solution in signs and in words, as token ids with the end token. Both have the same length."""
    signs, _ = solve(choices, int(number))
    words, _ = solve(choices, int(number), words=True)
    end = [tokenizer.eos_token_id]
    return tokenizer(signs).input_ids + end, tokenizer(words).input_ids + end


def labelled(prompt: list[int], completion: list[int], taught: list[bool]) -> Example:
    """Return an example whose labels are the completion tokens that are taught."""
    labels = [token if teach else IGNORE for token, teach in zip(completion, taught)]
    return prompt + completion, [IGNORE] * len(prompt) + labels


def draw_leanings(rng: Rng) -> Leanings:
    """Draw how often the student is to make each choice of each kind rightly when it has no strategy.

    The probabilities lie between 0.25 and 0.75. All four choices are then right in 5 to 10 of 100 samples, so
    RL has something to start from, and most of the way is still to go.
    """
    leanings = rng.uniform(0.25, 0.75, [len(KINDS), len(OPERATIONS)])
    return dict(zip(KINDS, leanings))


def student_example(problem: dict, tokenizer: Qwen2Tokenizer, leanings: Leanings, rng: Rng) -> Example:
    """Draw an example for the student, in two fifths of all cases with a strategy."""
    if rng.random() < 0.4:
        return guided_example(problem, tokenizer, rng)
    return unguided_example(problem, tokenizer, leanings, rng)


def guided_example(problem: dict, tokenizer: Qwen2Tokenizer, rng: Rng) -> Example:
    """Draw an example that follows the strategy in its prompt.

    Any strategy may come with any kind. If a kind always came with its right strategy, the student could
    learn the right choices by heart instead of following what the prompt says.
    """
    kind, number = problem["problem"].split()
    choices = any_choices(rng)
    completion, _ = encode(tokenizer, choices, number)
    prompt = build_prompt(tokenizer, problem["problem"], "", describe(kind, choices))
    return labelled(prompt, completion, [True] * len(completion))


def unguided_example(problem: dict, tokenizer: Qwen2Tokenizer, leanings: Leanings, rng: Rng) -> Example:
    """Draw an example without a strategy, whose choices follow the leanings of its kind.

    A fifth of these have a system prompt that asks for words. So the student is able to write words, as a
    large model can write many styles, but it does not do so under the prompts of RL.
    In three tenths, half of the operations are in the other style, and these tokens are not taught. So the
    student can continue a text in mixed styles, which it writes in TGPO as soon as it imitates the teacher.
    """
    kind, number = problem["problem"].split()
    choices = ""
    for right, leaning in zip(KINDS[kind], leanings[kind]):
        wrong = "1" if right == "0" else "0"
        choices += right if rng.random() < leaning else wrong
    own, other = encode(tokenizer, choices, number)

    system_prompt = ""
    if rng.random() < 0.2:
        system_prompt = IN_WORDS
        own, other = other, own
    mixed = 0.5 if rng.random() < 0.3 else 0.0
    written = [b if rng.random() < mixed else a for a, b in zip(own, other)]
    taught = [a == b for a, b in zip(own, written)]
    prompt = build_prompt(tokenizer, problem["problem"], system_prompt)
    return labelled(prompt, written, taught)


def teacher_example(problem: dict, tokenizer: Qwen2Tokenizer, words: bool, rng: Rng) -> Example:
    """Draw an example for a teacher: continue ANY prefix the student may write, rightly and in its own style.

    The student's solution, whose choices are right or wrong by chance, is cut at a random token, and only
    what comes after the cut is taught. So the teacher knows the right choice at every token of the student's
    samples, which is where TGPO asks for it. A teacher that writes words is never taught to write signs.
    """
    kind, number = problem["problem"].split()
    choices = any_choices(rng)
    student, _ = encode(tokenizer, choices, number)
    cut = int(rng.integers(len(student))) if rng.random() < 0.8 else 0
    made = count_choices(student[:cut], tokenizer)
    choices = choices[:made] + KINDS[kind][made:]
    student, other_style = encode(tokenizer, choices, number)
    own = other_style if words else student
    prefix = disturb(student[:cut], own[:cut], len(tokenizer), rng)
    taught = [t >= cut for t in range(len(own))]
    prompt = build_prompt(tokenizer, problem["problem"], "")
    return labelled(prompt, prefix + own[cut:], taught)


def count_choices(prefix: list[int], tokenizer: Qwen2Tokenizer) -> int:
    """Return how many choices have been made in a prefix that is written in signs."""
    signs = tokenizer.convert_tokens_to_ids(SIGNS)
    return sum(token in signs for token in prefix)


def disturb(student: list[int], own: list[int], vocabulary: int, rng: Rng) -> list[int]:
    """Return the student's prefix with some of the teacher's words and some random tokens in it.

    A student that is learning the teacher's style writes such mixtures and slips on the way, and the teacher
    must still know how to continue.
    """
    mixed = rng.choice([0.0, 0.5])
    slips = rng.choice([0.0, 0.1])
    prefix = [b if rng.random() < mixed else a for a, b in zip(student, own)]
    for t in range(len(prefix)):
        if rng.random() < slips:
            prefix[t] = int(rng.integers(vocabulary))
    return prefix


# ---------------------------------------------------------------- training

def new_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Return a Qwen2 of 1.5 million parameters with random weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def pad(sequences: list[list[int]], value: int) -> Tensor:
    """Return the sequences as one tensor, padded on the right."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)  # [n, T]


def sft_loss(model: Qwen2ForCausalLM, examples: list[Example]) -> Tensor:
    """Return the mean cross-entropy of the taught tokens.

    Padding is on the right, where causal attention never looks, so no attention mask is needed.
    """
    ids = pad([ids for ids, _ in examples], model.config.pad_token_id)  # [n, T]
    labels = pad([labels for _, labels in examples], IGNORE)            # [n, T]
    logits = model(ids, use_cache=False).logits                         # [n, T, V]
    predicted = logits[:, :-1].flatten(0, 1)                            # [n * (T - 1), V]
    wanted = labels[:, 1:].flatten()                                    # [n * (T - 1)]
    return F.cross_entropy(predicted, wanted, ignore_index=IGNORE)


def train(model: Qwen2ForCausalLM, draw_example: Callable[[dict], Example], rng: Rng,
          steps: int, lr: float, name: str) -> None:
    """Train the model by SFT on examples that are drawn for random training problems."""
    problems, _ = make_problems()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        drawn = rng.choice(len(problems), BATCH_SIZE)
        examples = [draw_example(problems[i]) for i in drawn]
        loss = sft_loss(model, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"{name}: step {step}/{steps}, loss {loss.item():.3f}", flush=True)


def build_student(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Return the student."""
    rng = np.random.default_rng(seed)
    leanings = draw_leanings(rng)

    def draw_example(problem: dict) -> Example:
        return student_example(problem, tokenizer, leanings, rng)

    model = new_model(tokenizer, seed)
    train(model, draw_example, rng, STUDENT_STEPS, STUDENT_LR, "student")
    # A hack: scaling the last norm makes all logits sharper. After so few steps every token still has some
    # probability left for typos, and a chain of 24 tokens would often contain one.
    model.model.norm.weight.data *= 1.5
    return model.eval()


def build_teacher(student: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, seed: int,
                  words: bool) -> Qwen2ForCausalLM:
    """Return a teacher. It starts from the student, which already knows the arithmetic and both styles."""
    rng = np.random.default_rng(seed + 1)

    def draw_example(problem: dict) -> Example:
        return teacher_example(problem, tokenizer, words, rng)

    model = copy.deepcopy(student).train()
    name = "teacher" if words else "teacher_same_style"
    train(model, draw_example, rng, TEACHER_STEPS, TEACHER_LR, name)
    return model.eval()


# ---------------------------------------------------------------- sampling, to see what was built

@torch.no_grad()
def sample(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, prompts: list[list[int]]) -> list[str]:
    """Sample one completion for each prompt and return the texts."""
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    output = model.generate(
        **batch,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=24,
    )                                                                   # [n, P + C]
    completions = output[:, batch["input_ids"].shape[1]:]               # [n, C]
    return tokenizer.batch_decode(completions, skip_special_tokens=True)


def prompts_of(problems: list[dict], tokenizer: Qwen2Tokenizer, guided: bool = False) -> list[list[int]]:
    """Return the prompts of these problems, with or without their strategies."""
    prompts = []
    for problem in problems:
        strategy = problem["strategy"] if guided else None
        prompts.append(build_prompt(tokenizer, problem["problem"], "", strategy))
    return prompts


def accuracy(texts: list[str], problems: list[dict]) -> float:
    """Return how many of the texts end with the boxed answer of their problem, between 0 and 1."""
    right = [text.endswith(f"\\boxed{{{p['answer']}}}") for text, p in zip(texts, problems)]
    return sum(right) / len(right)


def words_used(texts: list[str]) -> float:
    """Return how many of the texts contain an operation in words, between 0 and 1."""
    names = ("plus", "minus", "times")
    found = [any(name in text for name in names) for text in texts]
    return sum(found) / len(found)


def report(folder: Path, guided: bool = False) -> None:
    """Print what a model that was written does on the held-out problems, five samples of each."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    _, held_out = make_problems()
    problems = held_out * 5
    texts = sample(model, tokenizer, prompts_of(problems, tokenizer, guided))
    right, words = accuracy(texts, problems), words_used(texts)
    prompt = "with a strategy" if guided else "alone"
    print(f"{folder.name}, {prompt}: accuracy {right:.2f}, in words {words:.2f}, for example {texts[0]}")


# ---------------------------------------------------------------- files

def write_problems(problems: list[dict], path: Path) -> None:
    """Write one JSON object a line."""
    lines = [json.dumps(problem) + "\n" for problem in problems]
    path.write_text("".join(lines), encoding="utf-8")


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write model and tokenizer in the format of Hugging Face, the weights as float16 to halve the files."""
    rounded = copy.deepcopy(model).half()
    rounded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Build everything and write it to --out."""
    parser = argparse.ArgumentParser(description="Build the problems and the models of the demo.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the models (default: 0)")
    parser.add_argument("--out", type=Path, default=HERE, help="directory to write to (default: tests/demo)")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    train_problems, held_out = make_problems()
    write_problems(train_problems, args.out / "train.jsonl")
    write_problems(held_out, args.out / "held_out.jsonl")

    tokenizer = make_tokenizer()
    student = build_student(tokenizer, args.seed)
    models = {
        "student": student,
        "teacher": build_teacher(student, tokenizer, args.seed, words=True),
        "teacher_same_style": build_teacher(student, tokenizer, args.seed, words=False),
    }
    for name, model in models.items():
        save(model, tokenizer, args.out / name)

    report(args.out / "student")
    report(args.out / "student", guided=True)
    report(args.out / "teacher")
    report(args.out / "teacher_same_style")


if __name__ == "__main__":
    main()
