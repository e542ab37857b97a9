"""Kills and signals at random moments: does a run that is taken up again end as if nothing had happened?

    python tests/bench/kills.py [MOMENTS]      # so many kills and as many signals; 20

Each program first runs undisturbed. Then it is cut off, by kill -9 and by SIGINT or SIGTERM, at moments drawn
from all its length, and taken up again with --resume (eval_math.py: by the same command). Weights, samples
and metrics (all keys but times and memory), or generations and results, must be equal bit for bit.
"""
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import Child, read_jsonl, small_model, small_tokenizer, stripped, write_rows

PROGRAMS = ("sgpo", "tgpo", "grpo_baseline", "eval_math")
TRAINING = ("--steps 6 --prompts_per_step 3 --group_size 3 --lr 1e-3 --save_every 3 --warmup_frac 0.5 "
            "--warmup_lr 1e-3 --warmup_epochs 4 --warmup_batch_size 3 --eval_every 2 --eval_samples 2")
REWARD = """from common import grade
def even(response, row):
    return max(grade(response, row["answer"]), float(len(response) % 2 == 0))  # the grader counts, too
"""
EVALUATION = "--strategies own --k 12 --generation_batch_size 8".split()


def work(program: str, argv: list) -> int:
    sys.argv = [f"{program}.py", *map(str, argv)]
    importlib.import_module(program).main()
    return 0


def command(program: str, home: Path, out: Path) -> list:
    rows, argv = home / "rows.jsonl", ["--model", home / "model", "--max_new_tokens", 20, "--out", out]
    if program == "eval_math":
        return [*argv, "--benchmarks", rows, *EVALUATION]
    teacher = ["--teacher", home / "model"] if program == "tgpo" else []
    reward = f"{home}/reward.py:even"
    return [*argv, *teacher, *TRAINING.split(), "--dataset", rows, "--eval_dataset", rows, "--reward", reward]


def written(out: Path, program: str) -> list:
    """What must be equal."""
    if program == "eval_math":
        results = json.loads((out / "results.json").read_text())["results"]
        return [results, (out / "generations.jsonl").read_bytes()]
    files = ("model/model.safetensors", "warmup/model.safetensors", "samples.jsonl")
    return [stripped(read_jsonl(out / "metrics.jsonl")), *[(out / file).read_bytes() for file in files]]


def place(out: Path) -> str:
    """Where a run was cut off, by what it has written."""
    lines = {path.stem: path.read_bytes().count(b"\n") for path in out.glob("*.jsonl")}
    if "generations" in lines:
        return f"completion {lines['generations']}"
    if lines:
        evaluating = lines.get("samples", 0) // 9 == lines["metrics"]  # 9 per step, and step 0 has none
        return f"step {lines['metrics']}" + ", its evaluation or save" * evaluating
    return "first evaluation" if (out / "warmup").exists() else "warm-up" if out.exists() else "nothing yet"


def main() -> None:
    n, draw, home = int((sys.argv + ["20"])[1]), random.Random(0), Path(tempfile.mkdtemp())
    small_model().save_pretrained(home / "model")
    small_tokenizer().save_pretrained(home / "model")
    (home / "reward.py").write_text(REWARD)
    write_rows(home / "rows.jsonl", [
        {"problem": f"What is {i} + {i}?", "answer": f"{2 * i}", "solution": f"It is {2 * i}.".ljust(18),
         "strategy": f"Type: sum. Strategy: double {i}."} for i in range(12)])
    Child(int).ended()  # the server of forks has started
    whole, seconds = {}, {}
    for program in PROGRAMS:
        began, out = time.time(), home / program / "run"  # each alone: a warm-up is lent to its neighbours
        assert Child(work, program, command(program, home, out)).ended() == 0
        whole[program], seconds[program] = written(out, program), time.time() - began
    print(f"{'program':14}{'signal':9}{'at':>6} s{'exit':>6}  {'cut off in':32}equal afterwards", flush=True)
    kinds, equal = [SIGKILL] * n + ([SIGINT, SIGTERM] * n)[:n], 0
    for k, kind in enumerate(kinds):
        program, code, out = PROGRAMS[k // 2 % 4], 0, home / str(k) / "run"
        while code == 0:  # it may end before its moment
            shutil.rmtree(out, ignore_errors=True)
            moment = draw.uniform(0, seconds[program])
            child = Child(work, program, command(program, home, out))
            time.sleep(moment)
            with suppress(ProcessLookupError):
                os.kill(child.pid, kind)
            code = child.ended()
        where, resume = place(out), ["--resume"] * (out.exists() and program != "eval_math")
        again = Child(work, program, [*command(program, home, out), *resume]).ended()
        same = again == 0 and written(out, program) == whole[program]
        equal += same
        print(f"{program:14}{kind.name:9}{moment:6.2f} s{code:6}  {where:32}{'yes' if same else 'NO'}",
              flush=True)
    print(f"{equal} of {len(kinds)} equal")
    sys.exit(equal < len(kinds))


if __name__ == "__main__":
    main()
