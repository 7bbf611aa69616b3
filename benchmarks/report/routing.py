"""How the routed backward works, in one picture: which blocks of which tokens it computes.

python -m benchmarks.report.routing --head head.safetensors --shares benchmarks/results/2026-11-head-shares.json
python -m benchmarks.report.routing                       draw it again from the committed shares

Rows are tokens, columns the vocabulary's blocks of 128: computed because they hold the label or at least `tau` of the
token's tail, sampled (computed, and weighted by tau / share), or never computed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import matplotlib
import torch

from benchmarks import inputs
from fastdpo.commands.picture import KINDS
from fastdpo.commands.study import kinds_of
from fastdpo.head import DEFAULT_TAU
from fastdpo.routing import own_block

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

RESULTS = Path(__file__).parents[1] / "results"
STEPS = 8  # of log2(share) per unit in the file


def shares_of(head: inputs.HeadInputs, count: int) -> dict:
    """Shares of `count` tokens spread over the file, as round(-8 * log2(share)): to 5%, in a small file."""
    rows = torch.linspace(0, len(head.labels) - 1, count).long()
    share, _ = inputs.shares(head.hidden[rows].float(), head.weight.float(), head.labels[rows])
    return {
        "head": head.name,
        "V": head.weight.shape[0],
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "labels": head.labels[rows].tolist(),
        "-8 log2(share)": (-STEPS * share.clamp(min=2.0**-30).log2()).round().int().tolist(),
    }


def draw(record: dict, output: Path, seed: int) -> None:
    share, labels = 2.0 ** (-torch.tensor(record["-8 log2(share)"]) / STEPS), torch.tensor(record["labels"])
    tau = DEFAULT_TAU
    kinds = kinds_of(share, own_block(labels, share.shape[1]), tau, seed)
    figure, axis = plt.subplots(figsize=(9, 3.2))
    axis.imshow(
        kinds, cmap=ListedColormap([color for _, color in KINDS.values()]), aspect="auto", interpolation="nearest"
    )
    parts = [(kinds == kind).float().mean().item() for kind in range(3)]
    handles = [Patch(color=color, label=f"{name}: {part:.1%}") for (name, color), part in zip(KINDS.values(), parts)]
    axis.legend(
        handles=handles[::-1], loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, fontsize=8, frameon=False
    )
    axis.set_xlabel("block of 128 vocabulary columns, frequent tokens first", fontsize=8)
    axis.set_ylabel("completion token", fontsize=8)
    axis.tick_params(labelsize=7)
    where = f"{record['head']}, V = {record['V']}, tau = {tau:.3g}, torch {record['torch']}, {record['date']}"
    figure.text(0.5, 0.005, where, ha="center", fontsize=7, color="gray")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", help="safetensors file whose shares are written to --shares first")
    parser.add_argument("--shares", type=Path, default=RESULTS / "2026-11-head-shares.json")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "plots" / "routing.png")
    args = parser.parse_args()
    if args.head:
        args.shares.write_text(json.dumps(shares_of(inputs.load(args.head), args.tokens)) + "\n")
    draw(json.loads(args.shares.read_text()), args.output, args.seed)
    print(args.output)


if __name__ == "__main__":
    main()
