"""Bias and noise of skipping: the routed backward over `tau`, Cut Cross-Entropy's filter over its threshold.

python -m benchmarks.cpu.bias --head head.safetensors [--seeds 64]

Bias: how far the mean of a path's gradient over seeds is from the exact gradient (fp64). That of the routed backward is
known to within its standard error, noise / sqrt(seeds); the filter draws nothing, and its bias is its error. Noise:
the standard deviation of one seed's gradient. All relative to the exact gradient's norm. Share: of the pairs of a token
and 128 columns, those computed in the backward; the filter needs the logits of all pairs again before it drops any.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import fastdpo
from benchmarks import inputs
from benchmarks.cpu.accuracy import relative, truth
from benchmarks.cpu.cce_filter import DEFAULT_EPS, TILE, cce_filter_logps
from fastdpo.head import DEFAULT_TAU, FROZEN_HEAD_TAU
from fastdpo.routing import ONE, odds

TAUS = (2.0**-4, 2.0**-6, 2.0**-8, FROZEN_HEAD_TAU, DEFAULT_TAU, 2.0**-12)
EPSILONS = (2.0**-6, 2.0**-8, 2.0**-10, DEFAULT_EPS, 2.0**-14)
GRADIENTS = ("dhidden", "dweight")


def shares(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[float, float]:
    """Of every tau: the expected share of pairs that the routed backward computes."""
    kept = dict.fromkeys(TAUS, 0.0)
    for h, y in zip(hidden.split(512), labels.split(512)):
        share = inputs.shares(h, weight, y)
        for tau in TAUS:
            kept[tau] += (odds(*share, tau).sum() / ONE / (len(labels) * share[0].shape[1])).item()
    return kept


def moments(draw, exact: list[Tensor], seeds: int) -> dict[str, float]:
    """Of both gradients: bias, its standard error and noise. `draw(seed)` gives one seed's."""
    total = [torch.zeros_like(e) for e in exact]
    squares = [0.0, 0.0]
    for seed in range(seeds):
        for i, g in enumerate(draw(seed)):
            total[i] += g
            squares[i] += (g - exact[i]).square().sum().item()
    row = {}
    for name, mean, square, e in zip(GRADIENTS, (t / seeds for t in total), squares, exact):
        off = (mean - e).norm().item()
        noise = (max(square / seeds - off**2, 0.0) * seeds / (seeds - 1)) ** 0.5 / e.norm().item()
        row |= {f"{name} bias": relative(mean, e), f"{name} standard error": noise / seeds**0.5, f"{name} noise": noise}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    head = inputs.load(args.head)
    count = min(args.tokens, len(head.labels)) // TILE * TILE
    hidden, weight, labels = head.hidden[:count].float(), head.weight.float(), head.labels[:count]
    coef = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)  # chosen up, rejected down
    exact = list(truth(hidden, weight, labels, coef)[1:])
    share = shares(hidden, weight, labels)
    hidden.requires_grad_(), weight.requires_grad_()

    def gradients(logps: Tensor) -> list[Tensor]:
        return [g.double() for g in torch.autograd.grad(logps, (hidden, weight), coef)]

    rows = []
    for tau in TAUS:
        found = moments(
            lambda seed, tau=tau: gradients(fastdpo.linear_logps(hidden, weight, labels, tau=tau, seed=seed)),
            exact,
            args.seeds,
        )
        rows.append({"path": "routed", "threshold": tau, "share": share[tau], **found})
        print(rows[-1], flush=True)
    for eps in EPSILONS:
        live = []
        errors = gradients(cce_filter_logps(hidden, weight, labels, eps, live))
        row = {"path": "filter", "threshold": eps, "share": live[0]}
        for name, g, e in zip(GRADIENTS, errors, exact):
            row |= {f"{name} bias": relative(g, e), f"{name} standard error": 0.0, f"{name} noise": 0.0}
        rows.append(row)
        print(rows[-1], flush=True)
    notes = {
        "head": head.name,
        "N": count,
        "V": weight.shape[0],
        "H": weight.shape[1],
        "inputs": "float32",
        "seeds": args.seeds,
        "default tau": [DEFAULT_TAU, FROZEN_HEAD_TAU],
        "default filter": DEFAULT_EPS,
        "filter": f"tiles of {TILE} tokens by {TILE} columns, the columns sorted by mean logit as the package does",
    }
    inputs.report(args.output, "Bias and noise of the routed backward and of Cut Cross-Entropy's filter", rows, notes)


if __name__ == "__main__":
    main()
