"""The figure: true reward against KL to the reference, of every method, beta, seed and look along the way."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean, stdev

from .evaluate import at_equal_kl
from .settings import DPO, METHODS, RL, RL_TRUE, SFT

LOOKS = {  # color, marker
    DPO: ("#1b7f4b", "o"),
    RL: ("#c44e52", "s"),
    RL_TRUE: ("#dd8b2f", "D"),
    SFT: ("#4c72b0", "^"),
}
NAMES = {
    DPO: "DPO",
    RL: "reward model, then RL",
    RL_TRUE: "RL with the true reward",
    SFT: "Preferred-FT (SFT on the chosen)",
}


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def ends(runs: list[dict]) -> dict[float | None, list[dict]]:
    """Where the runs of each beta ended."""
    found: dict[float | None, list[dict]] = {}
    for run in runs:
        found.setdefault(run["beta"], []).append(run["points"][-1])
    return found


def draw(record: dict, output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    figure, (axis, gaps) = pyplot.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2))
    best, start = record["ceiling"], record["reference"]["reward"]
    line = [(0.0, start), *sorted((point["kl"], point["reward"]) for point in best)]
    axis.plot(*zip(*line), color="black", lw=1.2, ls="--", label="best possible at this KL")
    edge, beyond = 1.1 * max(record["at equal KL"]["levels"]), 0
    for method in METHODS:
        runs = [run for run in record["runs"] if run["method"] == method]
        color, marker = LOOKS[method]
        along = [(point["kl"], point["reward"]) for run in runs for point in run["points"]]
        axis.plot(*zip(*along), marker, color=color, ms=4, alpha=0.4, mew=0, ls="")
        means = sorted(
            (fmean(p["kl"] for p in points), fmean(p["reward"] for p in points), points)
            for points in ends(runs).values()
        )
        kl, reward = [mean[0] for mean in means], [mean[1] for mean in means]
        beyond += sum(mean > edge for mean in kl)
        between = [kl[0] + (kl[-1] - kl[0]) * i / 400 for i in range(401)]
        curve = at_equal_kl([{"kl": x, "reward": y} for x, y in zip(kl, reward)], between[1:-1])
        axis.plot(between[1:-1], curve, color=color, lw=1.4)
        axis.errorbar(
            kl, reward, [spread([p["reward"] for p in points]) for *_, points in means],
            [spread([p["kl"] for p in points]) for *_, points in means],
            color=color, marker=marker, ms=6, ls="", elinewidth=1, capsize=2, label=NAMES[method],
        )  # fmt: skip
    axis.plot([0], [start], "*", color="black", ms=11, label="reference (SFT)", ls="")
    seen = [p["reward"] for run in record["runs"] for p in run["points"] if p["kl"] <= edge] + [y for _, y in line]
    room = 0.06 * (max(seen) - min(seen))
    axis.set(xlim=(-0.03 * edge, edge), ylim=(min(seen) - room, max(seen) + room), ylabel="true reward")
    axis.set_xlabel("KL(policy || reference) of a completion, nats" + f"; {beyond} ends lie beyond" * (beyond > 0))
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3)
    seeds = len({run["seed"] for run in record["runs"]})
    axis.set_title(f"ends of training: mean and deviation of seeds ({seeds}); faint: along the way", fontsize=9)

    compared = record["at equal KL"]
    possible = dict(zip(compared["levels"], compared["ceiling"]))
    for shift, method in enumerate(METHODS):
        color, marker = LOOKS[method]
        kl, shares = [], []
        for row in compared["rows"]:
            best = possible[row["kl"]]
            if row["method"] == method and best is not None and None not in row["rewards"]:
                kl.append(row["kl"] * 1.02 ** (shift - 1.5))  # bars beside one another
                shares.append([100 * (reward - start) / (best - start) for reward in row["rewards"]])
        means, bars = [fmean(share) for share in shares], [spread(share) for share in shares]
        gaps.errorbar(kl, means, bars, color=color, marker=marker, ms=5, lw=1.2, capsize=2)
    shown = [level for level, best in possible.items() if best is not None]
    gaps.axhline(100, color="black", lw=1.2, ls="--")
    gaps.set(xscale="log", xlabel="KL, nats", ylabel="% of the best possible gain in reward")
    gaps.set_title("at equal KL: mean and deviation of the seeds", fontsize=9)
    gaps.set_xticks(shown, [f"{level:g}" for level in shown])
    gaps.minorticks_off()
    gaps.grid(alpha=0.3)
    env = record["environment"]
    processes = "one process" if env["threads"] == 1 else f"{env['threads']} processes"
    footer = f"{env['cpu']}, {processes} of one thread, torch {env['versions']['torch']}, {env['date']}"
    figure.text(0.5, 0.005, footer, ha="center", fontsize=7, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(128).save(output, optimize=True)
