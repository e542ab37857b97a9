"""Draw curves of finished runs with their spread over seeds, readable on a light and on a dark page.

    python tests/bench/plot.py runs/a runs/b --keys reward sgpo/alpha --out curves.png
    python tests/bench/plot.py ablations.jsonl --only tgpo "tgpo --guidance rkl" --keys tgpo/mismatch
    python tests/bench/plot.py ablations.jsonl --readme            # the two pictures of the README

A RUN is a run directory, or a file of ablations.py, in which all seeds of a row become one curve.
"""
import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
SGPO_ROWS = ["grpo_baseline", "hpt", "luffy", "sgpo"]
SGPO_KEYS = ["reward", "sgpo/alpha", "sgpo/kl"]
TGPO_ROWS = ["tgpo", "tgpo --guidance rkl", "tgpo --guidance none", "tgpo --guidance kdrl"]
TGPO_KEYS = ["reward", "tgpo/mismatch", "tgpo/reverse_kl_k1"]
SMOOTH = 5        # steps of the running mean
GREY = "#808080"  # of all lines and letters: it can be read on white and on black
COLOURS = "#e0602c #3a86d8 #2ca05a #b05cc6 #c79a1e #17a2a8 #d6478f #7a7a7a".split()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load(paths: list[Path]) -> dict[str, list[list[dict]]]:
    """Return name -> the metrics of each seed."""
    runs = defaultdict(list)
    for path in paths:
        if path.is_dir():
            runs[path.name].append(read_jsonl(path / "metrics.jsonl"))
            continue
        for line in read_jsonl(path):
            runs[line["run"]].append(line["metrics"])
    return runs


def curve(runs: list[list[dict]], key: str) -> tuple | None:
    """Return steps, mean and standard deviation over seeds of a metric's running mean, or None."""
    if not runs:
        return None
    by_seed = []
    for metrics in runs:
        by_seed.append({row["step"]: row[key] for row in metrics if row.get(key) is not None})
    steps = sorted(set.intersection(*map(set, by_seed)))
    if not steps:
        return None
    width = min(SMOOTH, len(steps))
    values = [[seed[step] for step in steps] for seed in by_seed]
    window = np.ones(width) / width
    smooth = np.array([np.convolve(row, window, "valid") for row in values])
    last_steps = np.array(steps[width - 1:])  # of each window
    return last_steps, smooth.mean(0), smooth.std(0)


def draw(runs: dict[str, list[list[dict]]], names: list[str], keys: list[str], out: Path) -> None:
    """Draw one panel per metric and save the picture."""
    for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        plt.rcParams[name] = GREY
    plt.rcParams["font.size"] = 9
    size = (4 * len(keys), 3.3)
    figure, panels = plt.subplots(1, len(keys), figsize=size, squeeze=False, layout="constrained")
    for panel, key in zip(panels[0], keys):
        for i, name in enumerate(names):
            points = curve(runs[name], key)
            if points is None:
                continue
            steps, mean, spread = points
            colour = COLOURS[i % len(COLOURS)]
            panel.plot(steps, mean, color=colour, label=name)
            panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        panel.set(title=key, xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=GREY, alpha=0.2)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=min(4, len(names)))
    figure.savefig(out, dpi=110, transparent=True)
    print(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--only", nargs="+", help="rows of a file of ablations.py (default: all)")
    parser.add_argument("--keys", nargs="+", default=["reward"], help="metrics, one panel each")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    parser.add_argument("--readme", action="store_true", help="draw sgpo.png and tgpo.png beside this file")
    args = parser.parse_args()
    loaded = load(args.runs)
    if args.readme:
        draw(loaded, SGPO_ROWS, SGPO_KEYS, HERE / "sgpo.png")
        draw(loaded, TGPO_ROWS, TGPO_KEYS, HERE / "tgpo.png")
    else:
        draw(loaded, args.only or list(loaded), args.keys, args.out)
