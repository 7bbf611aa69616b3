"""Is the routed gradient unbiased? Its mean over many seeds against the exact gradient, in standard errors.

python benchmarks/bench_bias.py --head head.safetensors [--seeds 200]
"""

from __future__ import annotations

import argparse

import inputs
import torch

import fastdpo
from fastdpo.routing import DEFAULT_TAU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=200)
    args = parser.parse_args()
    head = inputs.load(args.head)
    hidden, weight = head.hidden.float().requires_grad_(), head.weight.float().requires_grad_()
    dlogps = torch.where(torch.arange(len(head.labels)) < len(head.labels) // 2, 1.0, -1.0)

    def gradients(**options):
        logps = fastdpo.linear_logps(hidden, weight, head.labels, **options)
        return [g.double() for g in torch.autograd.grad((logps * dlogps).sum(), [hidden, weight])]

    exact = gradients(backward="exact")
    rows = []
    for tau in (1e-3, DEFAULT_TAU):
        total = [torch.zeros_like(g) for g in exact]
        squares = [torch.zeros_like(g) for g in exact]
        for seed in range(args.seeds):
            for sums, square, g, e in zip(total, squares, gradients(tau=tau, seed=seed), exact):
                sums += g
                square += (g - e) ** 2
        for name, sums, square, e in zip(("dhidden", "dweight"), total, squares, exact):
            off = sums / args.seeds - e
            variance = (square / args.seeds - off**2).clamp(min=0) * args.seeds / (args.seeds - 1)
            standard_error = (variance.sum() / args.seeds).sqrt()
            rows.append(
                {
                    "tau": str(tau),
                    "gradient": name,
                    "|mean - exact| / |exact|": (off.norm() / e.norm()).item(),
                    "standard error / |exact|": (standard_error / e.norm()).item(),
                    "in standard errors": (off.norm() / standard_error).item(),
                }
            )
    notes = {"head": head.name, "N": len(head.labels), "seeds": args.seeds, "unbiased": "about 1 standard error"}
    inputs.report(args.output, "Mean of the routed gradient over seeds", rows, notes)


if __name__ == "__main__":
    main()
