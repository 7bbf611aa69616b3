"""The pictures of the README, from the committed results.

python -m benchmarks.report.plots [--results DIR] [--output DIR]

A picture whose results are missing is left out. GPU results have gpu.py.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from examples.frontier.plot import draw as plot_frontier

RESULTS = Path(__file__).parents[1] / "results"
OURS, OTHERS, DROPPED = "#1b7f4b", "#9aa5b1", "#c44e52"
COLORS = {"exact": "black", "routed": OURS, "dropped": DROPPED, "trl bf16": "#dd8b2f"}


def where_and_when(record: dict) -> str:
    env = record["environment"]
    names = ("torch", "trl", "liger_kernel")
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in names if name in env["versions"])
    return f"{env['cpu']}, {env['threads']} threads, {versions}, {env['date']}"


def finish(figure, record: dict, output: Path) -> None:
    figure.text(0.5, 0.005, where_and_when(record), ha="center", fontsize=7, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(output, optimize=True)  # a third of the size


def color_of(name: str) -> str:
    return OURS if name.startswith("fastdpo") else OTHERS


def plot_step(record: dict, output: Path) -> None:
    """Seconds of one DPO step on the head, against the peers."""
    rows = sorted(record["rows"], key=lambda row: -row["median s"])
    figure, axis = plt.subplots(figsize=(7, 3.2))
    bars = axis.barh(
        [row["step"] for row in rows], [row["median s"] for row in rows], xerr=[row["spread s"] / 2 for row in rows],
        color=[color_of(row["step"]) for row in rows], error_kw={"lw": 0.8},
    )  # fmt: skip
    axis.bar_label(bars, [f"{row['median s']:.2f} s" for row in rows], padding=14, fontsize=8)
    axis.margins(x=0.22)
    axis.set_xlabel("seconds, one DPO step on the head")
    notes = record["notes"]
    axis.set_title(
        f"{notes['completion tokens']} completion tokens, V = {notes['V']}, H = {notes['H']}, {notes['dtype']}",
        fontsize=9,
    )
    finish(figure, record, output)


AXES = {
    "tokens": "completion tokens",
    "vocab": "V",
    "hidden": "H",
    "prompt_share": "share of prompt tokens",
}
LINES = {  # one look per path, in every panel
    "eager": ("#c44e52", "-"),
    "trl compacted": ("#dd8b2f", "-"),
    "liger": ("#8172b3", "-"),
    "torch linear_cross_entropy": ("#4c72b0", "-"),
    "fastdpo exact": (OURS, "--"),
    "fastdpo routed": (OURS, "-"),
}


def plot_sweep(record: dict, output: Path) -> None:
    """Seconds and MiB of one DPO step along each axis."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.2), sharex="col")
    for column, (axis, title) in zip(axes.T, AXES.items()):
        rows = [row for row in record["rows"] if row["along"] == axis]
        values = list(dict.fromkeys(row[axis] for row in rows))
        for panel, key in zip(column, ("seconds", "MiB")):
            for path, (color, style) in LINES.items():
                found = [(row[axis], row[key]) for row in rows if row["path"] == path and row[key] is not None]
                if found:
                    panel.plot(*zip(*found), "o", ls=style, color=color, ms=3, lw=1.4, label=path)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
            if axis != "prompt_share":
                panel.set_xscale("log")
            panel.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
            panel.minorticks_off()
        column[1].set_xlabel(title, fontsize=9)
    axes[0, 0].set_ylabel("seconds", fontsize=9)
    axes[1, 0].set_ylabel("MiB beyond inputs and gradients", fontsize=9)
    axes[0, 0].legend(fontsize=6)
    finish(figure, record, output)


def plot_batches(record: dict, output: Path) -> None:
    """Milliseconds of one backward against the number of tokens."""
    sizes = list(dict.fromkeys(row["H"] for row in record["rows"]))
    looks = {"eager": (DROPPED, "-"), "exact": (OURS, "--"), "default": (OURS, "-")}
    figure, axes = plt.subplots(1, len(sizes), figsize=(4.5 * len(sizes), 3), squeeze=False)
    for axis, size in zip(axes[0], sizes):
        rows = [row for row in record["rows"] if row["H"] == size]
        for path, (color, style) in looks.items():
            label = path if path == "eager" else f"fastdpo, {path}"
            values = [row[f"{path} ms"] for row in rows]
            axis.plot([row["tokens"] for row in rows], values, "o", ls=style, color=color, ms=3, lw=1.4, label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="one backward, ms")
        axis.set_title(f"V = {record['notes']['V']}, H = {size}, {record['notes']['dtype']}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    finish(figure, record, output)


def plot_accuracy(record: dict, output: Path) -> None:
    """Errors against fp64 with bf16 inputs."""
    rows = [row for row in record["rows"] if row["inputs"] == "bfloat16"]
    figures = [
        ("sequence log-prob, nats", "sequence log-prob, nats"),
        ("dhidden", "gradient of hidden, relative"),
        ("dweight", "gradient of the head, relative"),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), sharey=True)
    for axis, (key, title) in zip(axes, figures):
        values = [math.nan if row[key] is None else row[key] for row in rows]
        bars = axis.barh([row["path"] for row in rows], values, color=[color_of(row["path"]) for row in rows])
        axis.bar_label(bars, ["" if math.isnan(x) else f"{x:.1e}" for x in values], padding=3, fontsize=7)
        axis.set(xscale="log", xlim=(1e-5 if "nats" in key else 1e-4, 30 * max(x for x in values if x == x)))
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(
        f"error against fp64, bf16 inputs, {record['notes']['N']} tokens, V = {record['notes']['V']}", fontsize=9
    )
    finish(figure, record, output)


def plot_bias(record: dict, output: Path) -> None:
    """What skipping costs: bias and noise of both gradients against the share of pairs computed."""
    seeds = record["notes"]["seeds"]
    found = {path: [row for row in record["rows"] if row["path"] == path] for path in ("routed", "filter")}
    series = [
        ("filter", "bias", "s-", DROPPED, "cce's filter, by threshold: bias, the same in every step"),
        ("routed", "noise", "o-", OURS, "fastdpo routed, by tau: noise of one step"),
        ("routed", "bias", "o:", OURS, f"fastdpo routed: off exact, mean of {seeds} steps"),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for axis, gradient in zip(axes, ("dhidden", "dweight")):
        for path, key, style, color, label in series:
            rows, offset = found[path], (3, 4) if path == "filter" else (-15, -9)
            shares, values = [100 * row["share"] for row in rows], [row[f"{gradient} {key}"] for row in rows]
            axis.plot(shares, values, style, color=color, ms=4, lw=1.2, label=label)
            for row, share, value in zip(rows, shares, values):
                if (path, key) != ("routed", "bias"):
                    power = f"$2^{{{math.log2(row['threshold']):.0f}}}$"
                    axis.annotate(power, (share, value), offset, textcoords="offset points", fontsize=7, color=color)
        axis.set(xscale="log", yscale="log", xlabel="pairs of token and 128 columns computed, %")
        axis.margins(0.12)
        axis.set_xticks([4, 8, 16, 32], ["4", "8", "16", "32"])
        axis.minorticks_off()
        axis.set_title(f"{gradient}, relative to the exact gradient", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower left")
    finish(figure, record, output)


def plot_training(record: dict, output: Path) -> None:
    """Loss, margin, entropy while training, and where the parameters end: mean over seeds, and their range."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.7))
    runs = record["runs"]
    paths = list(dict.fromkeys(run["path"] for run in runs))
    window = 20
    for axis, name in zip(axes, ("loss", "margin", "entropy")):
        for width, path in zip((4.0, 2.8, 1.8, 0.8), paths):  # the curves lie on one another
            curves = [
                [sum(run[name][max(0, i - window) : i + 1]) / (min(i, window) + 1) for i in range(len(run[name]))]
                for run in runs
                if run["path"] == path
            ]
            steps = range(1, len(curves[0]) + 1)
            mean = [sum(values) / len(values) for values in zip(*curves)]
            axis.plot(steps, mean, color=COLORS[path], lw=width, label=path)
            if path == paths[0]:
                low, high = ([f(values) for values in zip(*curves)] for f in (min, max))
                axis.fill_between(steps, low, high, color=COLORS[path], alpha=0.1, label="its seeds' range")
        axis.set_title(f"{name}, mean of {window} steps", fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axes[2].legend(fontsize=7)
    far = {path: [run["distance"] for run in runs if run["path"] == path and "distance" in run] for path in paths}
    far = {path: values for path, values in far.items() if values}
    travelled = sum(run["travelled"] for run in runs) / len(runs)
    axes[3].bar(list(far), [sum(v) / len(v) for v in far.values()], color=[COLORS[path] for path in far])
    axes[3].set_title(f"distance to the exact run's\nparameters ({travelled:.1f} travelled)", fontsize=9)
    axes[3].tick_params(axis="x", labelsize=8)
    finish(figure, record, output)


PLOTS = {
    "2026-11-cpu-step.json": ("step.png", plot_step),
    "2026-11-cpu-sweep.json": ("sweep.png", plot_sweep),
    "2026-11-cpu-batches.json": ("batches.png", plot_batches),
    "2026-11-cpu-accuracy.json": ("accuracy.png", plot_accuracy),
    "2026-11-cpu-bias.json": ("bias.png", plot_bias),
    "2026-11-training.json": ("training.png", plot_training),
    "2026-11-cpu-frontier.json": ("frontier.png", plot_frontier),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=RESULTS / "plots")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for source, (name, plot) in PLOTS.items():
        if (args.results / source).exists():
            plot(json.loads((args.results / source).read_text()), args.output / name)
            print(args.output / name)


if __name__ == "__main__":
    main()
