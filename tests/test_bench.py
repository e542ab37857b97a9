"""The arithmetic of the benches, by hand."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import ablations  # noqa: E402
import gpu  # noqa: E402
import step  # noqa: E402


def test_least_work():
    """One layer, d 4, inner 8, two heads that share a key head of 2; a sample of 3 + 2 tokens, V 10."""
    config = step.Config(vocabulary=10, hidden=4, inner=8, layers=1, heads=2, kv_heads=1)
    row = {"passes": [(0, 5, True), (0, 5, False)], "lengths": [5], "written": [2]}
    weights = 4 * 4 * 2 + 4 * 2 * 2 + 3 * 4 * 8  # q and o, k and v, three of the MLP
    forward = 2 * weights * 5 + 2 * 4 * 5 * 5 + 2 * 40 * 2
    cache = 2 * 2 * 2 * 2 * (3 + 1)
    assert gpu.least_work(config, row, num_auto=1) == (4 * forward, 2 * 2 * (weights + 40) + cache)
    assert gpu.least_work(config, row, num_auto=0)[0] == 5 * forward


def test_table_of_ablations():
    def run(rewards: list[float], after: float) -> list[dict]:
        return [{"eval/accuracy": 0.1}, *({"reward": reward} for reward in rewards), {"eval/accuracy": after}]

    runs = {("sgpo", 0): run([0, 0, 0, 0, 1, 1], 0.7), ("sgpo", 1): run([0, 0, 0, 0, 1, 1], 0.9),
            ("grpo_baseline", 0): run([0, 0, 0, 0, 0, 0], 0.1)}
    _, _, sgpo, grpo = ablations.table(["sgpo", "grpo_baseline", "never run"], runs).splitlines()
    # half of the best is 0.4: the mean of steps 2 to 6 is the first that reaches it
    assert sgpo == "| `sgpo` | 0.100 | 0.800 +- 0.100 | 0.700 0.900 | 6 | 0.333 +- 0.000 |"
    assert grpo == "| `grpo_baseline` | 0.100 | 0.100 +- 0.000 | 0.100 | never | 0.000 +- 0.000 |"


def test_ratios_of_step():
    steps = [{"total": 2.0, "rollout": 0.5, "tokens": 10}, {"total": 4.0, "rollout": 0.5, "tokens": 10}]
    ours = step.summary([{"steps": steps, "peak": 1.0}])
    assert ours["training s"] == pytest.approx(2.5)
    theirs = {name: 2 * value for name, value in ours.items()}
    assert step.table({"grpo": ours, "trl": theirs}).splitlines()[-1] == "| grpo / trl |" + " 0.50 |" * 5
