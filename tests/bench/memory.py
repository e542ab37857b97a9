"""The plan's estimate of a step's memory against the measured peak, each model in a process of its own.

    python tests/bench/memory.py
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHAPES = {  # hidden, layers, vocabulary; samples a step, completion tokens, micro-batch tokens, checkpointing
    "many weights": (1024, 8, 32000, 8, 32, 512, False), "long rows": (256, 6, 1000, 16, 512, 8192, False), "large vocabulary": (256, 4, 151936, 16, 64, 2048, False),
    "checkpointing": (512, 8, 1000, 16, 512, 8192, True), "many samples": (256, 8, 1000, 192, 256, 2048, False), "small": (512, 3, 1000, 16, 96, 8192, False)}


def measured(name: str, folder: Path, script: str = "grpo_baseline") -> tuple[float, float]:
    """Estimate and measured peak of two steps, bytes: Adam's moments come with the first."""
    import transformers
    import common
    from conftest import small_model, small_tokenizer, write_rows
    hidden, layers, vocabulary, samples, completion, microbatch, checkpointing = SHAPES[name]
    model = folder / name.replace(" ", "_")
    weights = small_model(vocab=vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
                          num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.02)
    weights.get_input_embeddings().weight.data[:, 0] = 1.0  # every token's but the end token's, so that no row ends early: the estimate is for the worst
    weights.get_input_embeddings().weight.data[small_tokenizer().eos_token_id, 0] = -1.0
    weights.save_pretrained(model)
    small_tokenizer().save_pretrained(model)
    rows = write_rows(folder / "rows.jsonl", [{"problem": f"What is {i}?", "answer": str(i), "strategy": "Double."} for i in range(8)])
    (folder / "reward.py").write_text("import random\ndef noise(response, row):\n    return random.random()\n")
    guided = ["--guided_group_size", "2"] if script == "sgpo" else []
    out = folder / f"run-{model.name}"
    subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--model", str(model), "--dataset", str(rows), "--reward", f"{folder}/reward.py:noise", "--steps", "2",
                    "--prompts_per_step", "2", "--group_size", str(samples // 2), *guided, "--max_new_tokens", str(completion), "--system_prompt", "", "--lr", "1e-6",
                    "--microbatch_tokens", str(microbatch), "--activation_checkpointing", str(checkpointing), "--out", str(out)], check=True, capture_output=True)
    peak = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["peak_memory_gb"] * 2 ** 30
    config, prompt = transformers.AutoConfig.from_pretrained(model), len(common.build_prompt(small_tokenizer(), "What is 1?", ""))
    return common.memory_needs(config, samples, prompt, completion, microbatch, on_gpu=False, activation_checkpointing=checkpointing)["peak"], peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--script", default="grpo_baseline")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in SHAPES:
            estimate, peak = measured(name, Path(folder), args.script)
            print(f"{name:18} estimated {estimate / 1e9:6.2f} GB, measured {peak / 1e9:6.2f} GB, ratio {estimate / peak:.2f}", flush=True)
