"""The arithmetic of the benches, by hand."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import ablations  # noqa: E402
import gpu  # noqa: E402
import step  # noqa: E402


def test_least_work():
    """One layer, d 4, inner 8, two heads that share a key head of 2; a sample of 3 + 2 tokens, V 10."""
    config = step.Config(vocabulary=10, hidden=4, inner=8, layers=1, heads=2, kv_heads=1)
    passes = [(0, 5, True), (0, 5, False)]
    row = {"passes": passes, "lengths": [5], "written": [2]}
    query_and_output = 2 * 4 * 4
    key_and_value = 2 * 4 * 2
    mlp = 3 * 4 * 8
    body = query_and_output + key_and_value + mlp
    head = 4 * 10
    attention = 2 * 4 * 5 * 5
    forward = 2 * body * 5 + attention + 2 * head * 2
    cache = 2 * 2 * 2 * 2 * (3 + 1)
    flops, read = gpu.least_work(config, row, num_auto=1)
    assert flops == (3 + 1) * forward
    assert read == 2 * 2 * (body + head) + cache
    assert gpu.least_work(config, row, num_auto=0)[0] == (4 + 1) * forward


def test_table_of_ablations():
    def run(rewards: str, after: float) -> list[dict]:
        steps = [{"reward": float(reward)} for reward in rewards]
        return [{"eval/accuracy": 0.1}, *steps, {"eval/accuracy": after}]

    runs = {
        ("sgpo", 0): run("000011", 0.7),
        ("sgpo", 1): run("000011", 0.9),
        ("tgpo", 0): run("000000", 0.1),
    }
    _, _, sgpo, tgpo = ablations.table(["sgpo", "tgpo", "never run"], runs).splitlines()
    # half of the best is 0.4, which the mean of steps 2 to 6 is the first to reach
    assert sgpo == "| `sgpo` | 0.100 | 0.800 +- 0.100 | 0.700 0.900 | 6 | 0.333 +- 0.000 |"
    assert tgpo == "| `tgpo` | 0.100 | 0.100 +- 0.000 | 0.100 | never | 0.000 +- 0.000 |"
