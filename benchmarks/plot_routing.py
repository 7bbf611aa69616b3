"""How the routed backward works, in one picture: which blocks of which tokens it computes.

python benchmarks/plot_routing.py --head head.safetensors --masses benchmarks/results/2026-11-head-masses.json
python benchmarks/plot_routing.py                       draw it again from the committed masses

Rows are tokens, columns the vocabulary's blocks of 128: computed because they hold the label or at least `tau` of the
token's probability, sampled (computed, and weighted by tau / mass), or never computed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import inputs
import matplotlib
import torch
from torch import Tensor

from fastdpo.routing import BLOCK, DEFAULT_TAU, kept_pairs, pair_uniforms

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

RESULTS = Path(__file__).parent / "results"
KINDS = (("never computed", "#edf0f3"), ("sampled, weight tau / mass", "#dd8b2f"), ("always computed", "#1b7f4b"))
STEPS = 8  # of log2(mass) per unit in the file


def masses_of(head: inputs.HeadInputs, count: int) -> dict:
    """Masses of `count` tokens spread over the file, as round(-8 * log2(mass)): to 5%, in a small file."""
    rows = torch.linspace(0, len(head.labels) - 1, count).long()
    p = (head.hidden[rows].float() @ head.weight.float().T).softmax(-1)
    mass = torch.nn.functional.pad(p, (0, -p.shape[1] % BLOCK)).view(count, -1, BLOCK).sum(-1)
    return {
        "head": head.name,
        "V": head.weight.shape[0],
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "labels": head.labels[rows].tolist(),
        "-8 log2(mass)": (-STEPS * mass.clamp(min=2.0**-30).log2()).round().int().tolist(),
    }


def kinds_of(mass: Tensor, labels: Tensor, tau: float, seed: int) -> Tensor:
    """[N, K] of 0 never computed, 1 sampled, 2 always computed, by the rule that the kernels follow."""
    uniforms = pair_uniforms(seed, torch.arange(mass.shape[0]), torch.arange(mass.shape[1]))
    sure = kept_pairs(mass, labels, tau, torch.ones_like(mass))
    return kept_pairs(mass, labels, tau, uniforms).int() + sure.int()


def draw(record: dict, output: Path, seed: int) -> None:
    mass, labels = 2.0 ** (-torch.tensor(record["-8 log2(mass)"]) / STEPS), torch.tensor(record["labels"])
    tau = DEFAULT_TAU[0]
    kinds = kinds_of(mass, labels, tau, seed)
    figure, axis = plt.subplots(figsize=(9, 3.2))
    axis.imshow(kinds, cmap=ListedColormap([color for _, color in KINDS]), aspect="auto", interpolation="nearest")
    shares = [(kinds == kind).float().mean().item() for kind in range(3)]
    handles = [Patch(color=color, label=f"{name}: {share:.1%}") for (name, color), share in zip(KINDS, shares)]
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
    parser.add_argument("--head", help="safetensors file whose masses are written to --masses first")
    parser.add_argument("--masses", type=Path, default=RESULTS / "2026-11-head-masses.json")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "plots" / "routing.png")
    args = parser.parse_args()
    if args.head:
        args.masses.write_text(json.dumps(masses_of(inputs.load(args.head), args.tokens)) + "\n")
    draw(json.loads(args.masses.read_text()), args.output, args.seed)
    print(args.output)


if __name__ == "__main__":
    main()
