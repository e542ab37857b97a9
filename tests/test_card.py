"""The scripts on an emulated card (emulated_card.py), which refuses to mix tensors of host and card.

Every run has a process of its own, because the emulation changes torch for the whole process.
"""
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, read_jsonl

backends = pytest.importorskip("torch.utils.backend_registration")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(backends, "_setup_privateuseone_for_python_backend"),
    reason="there is a real card, or this torch cannot emulate one")

# What a card refuses and accepts, and whether a model is on the card what it is on the host.
PROBES = """
import json, sys
import numpy
import torch
import emulated_card
emulated_card.install()
from transformers import AutoModelForCausalLM

def put(target, index, values):
    target[index] = values

host = torch.arange(1.0, 4.0)
card = host.to("card")
probes = {
    "addition": lambda: card + host,
    "scalar of the card": lambda: host * card.sum(),
    "numpy": lambda: card.numpy(),
    "asarray": lambda: numpy.asarray(card),
    "index on the card": lambda: host[torch.tensor([1], device="card")],
    "values on the host": lambda: put(card.clone(), [0, 1], host[:2]),
    "values on the card": lambda: put(host.clone(), [0, 1], card[:2]),
    "stack": lambda: torch.stack([card[0], host[0]]),
    "autocast": lambda: torch.autocast("card", torch.bfloat16)(torch.matmul)(card, host),
    "index on the host": lambda: card[torch.tensor([1])],
    "scalar of the host": lambda: card * host[0],
    "copy": lambda: (card.clone().copy_(host), host.clone().copy_(card)),
    "item": lambda: float(card.sum()),
}
found = {}
for name, probe in probes.items():
    try:
        probe()
    except emulated_card.Mixed as error:
        found[name] = str(error)

plain = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).to("card")
ids = torch.arange(8)[None]
frequencies = model.model.rotary_emb.inv_freq
found["device"] = str(frequencies.device)
found["same frequencies"] = torch.equal(frequencies.cpu(), plain.model.rotary_emb.inv_freq)
found["same logits"] = torch.allclose(model(ids.to("card")).logits.cpu(), plain(ids).logits, atol=1e-4)
found["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
print(json.dumps(found))
"""
REFUSED = ["addition", "scalar of the card", "numpy", "asarray", "index on the card", "values on the host",
           "values on the card", "stack", "autocast"]


def run_python(*argv) -> subprocess.CompletedProcess:
    """Run Python in tests/ and show the end of its stderr, which names operation and line, if it fails."""
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def found(model_dirs) -> dict:
    return json.loads(run_python("-c", PROBES, model_dirs["qwen2"]).stdout)


def test_the_card_refuses_what_cuda_refuses_and_nothing_else(found):
    refused = [name for name, message in found.items() if isinstance(message, str) and name != "device"]
    assert refused == REFUSED
    assert "aten::add takes" in found["addition"]
    assert "aten::index takes" in found["index on the card"]
    assert "numpy" in found["numpy"]


def test_a_model_on_the_card_is_the_same_model(found):
    assert found["device"] == "card:0"
    assert found["same frequencies"]
    assert found["same logits"]
    assert found["tied"]


@pytest.mark.parametrize("script, flags", [
    ("grpo_baseline", ["--updates_per_rollout", 2]),
    ("sgpo", []),
    ("tgpo", []),
    ("grpo_baseline", ["--lora_rank", 4]),
], ids=str)
def test_a_run_and_its_resume_mix_no_devices(script, flags, argv_of, tmp_path):
    if "--lora_rank" in flags and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    argv = argv_of(script, *flags, "--max_new_tokens", 4, "--steps", 2, "--out", tmp_path / "run")
    run_python("emulated_card.py", script, *argv, "then", "--steps", 3, "--resume")
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:
        assert row["grad_norm"] > 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["device"] == "emulated"
    assert config["flags"]["bf16"] is True
