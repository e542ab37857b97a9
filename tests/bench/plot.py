"""Curves of finished runs, with their spread over seeds: one picture, readable on a light and a dark page.

    python tests/bench/plot.py runs/a runs/b --keys reward sgpo/alpha --out curves.png
    python tests/bench/plot.py ablations.jsonl --only tgpo "tgpo --guidance rkl" --keys tgpo/mismatch

RUN is a run directory, or a file of ablations.py; runs that differ by their seed alone become one curve. The
pictures of the README:

    python tests/bench/plot.py ablations.jsonl --only grpo_baseline hpt luffy sgpo \\
        --keys reward sgpo/alpha sgpo/p_auto --out tests/bench/sgpo.png
    python tests/bench/plot.py ablations.jsonl --only tgpo "tgpo --guidance "{rkl,none,reverse-kl} \\
        --keys reward tgpo/mismatch tgpo/reverse_kl_k1 --out tests/bench/tgpo.png
"""
import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

GREY = "#808080"  # of all lines and letters: it can be read on white and on black
COLOURS = ["#e0602c", "#3a86d8", "#2ca05a", "#b05cc6", "#c79a1e", "#17a2a8", "#d6478f", "#7a7a7a"]


def load(places: list[str]) -> dict[str, list[list[dict]]]:
    """name -> the metrics of each seed."""
    found = defaultdict(list)
    for place in map(Path, places):
        if place.is_file():
            for line in map(json.loads, place.read_text().splitlines()):
                found[line["run"]].append(line["metrics"])
            continue
        config = json.loads((place / "config.json").read_text())
        flags = {k: v for k, v in config["flags"].items() if k in ("guidance", "distill", "delta", "teacher")}
        metrics = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        found[" ".join([config["script"], *(f"{k}={v}" for k, v in flags.items())])].append(metrics)
    return found


def curve(runs: list[list[dict]], key: str, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps, mean and standard deviation over seeds of a running mean over `width` steps."""
    each = [{row["step"]: row[key] for row in metrics if key in row} for metrics in runs]
    steps = sorted(set.intersection(*map(set, each)))
    if not steps:
        return None
    width = min(width, len(steps))
    values = np.array([[one[step] for step in steps] for one in each], float)
    values = np.array([np.convolve(row, np.ones(width) / width, "valid") for row in values])
    return np.array(steps[width - 1:]), values.mean(0), values.std(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--only", nargs="+", help="of a file of ablations.py, these rows")
    parser.add_argument("--keys", nargs="+", default=["reward"], help="metrics, a panel each")
    parser.add_argument("--smooth", type=int, default=5, help="steps of the running mean")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    found = load(args.runs)
    plt.rcParams.update({name: GREY for name in (
        "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")} | {"font.size": 9})
    figure, panels = plt.subplots(1, len(args.keys), figsize=(4 * len(args.keys), 3.3),
                                  squeeze=False, layout="constrained")
    for panel, key in zip(panels[0], args.keys):
        for colour, name in zip(COLOURS * 9, args.only or found):
            line = curve(found[name], key, args.smooth)
            if line is not None:
                steps, mean, spread = line
                panel.plot(steps, mean, color=colour, label=name)
                panel.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)
        panel.set(title=key, xlabel="step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=GREY, alpha=0.2)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", frameon=False,
                  ncols=min(4, len(args.only or found)))
    figure.savefig(args.out, dpi=110, transparent=True)
    print(args.out)
