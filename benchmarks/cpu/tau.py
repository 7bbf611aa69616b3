"""What `tau` buys and costs: pairs per token, GEMM passes and gradient error against fp64, beside bf16 eager logits.

python -m benchmarks.cpu.tau --head head.safetensors [--seeds 3]
"""

from __future__ import annotations

import argparse
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastdpo
from benchmarks import inputs
from fastdpo.head import DEFAULT_TAU, FROZEN_HEAD_TAU
from fastdpo.routing import ONE, odds

TAUS = (2.0**-6, 2.0**-7, 2.0**-8, 2.0**-9, 2.0**-10, 2.0**-11, (2.0**-9, 2.0**-11))


def name_of(tau: float | tuple[float, float]) -> str:
    numbers = ", ".join(f"2^{math.log2(t):.0f}" for t in (tau if isinstance(tau, tuple) else (tau,)))
    return f"routed, tau {numbers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    head = inputs.load(args.head)
    labels = head.labels
    dlogps = torch.where(torch.arange(len(labels)) < len(labels) // 2, 1.0, -1.0)  # chosen up, rejected down

    def gradients(hidden, weight, logps_of):
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        passes = []
        for frozen in (True, False):
            weight.requires_grad_(not frozen)
            hidden.grad = None
            with FlopCounterMode(display=False) as counter:
                logps = logps_of(hidden, weight)
                logps.backward(dlogps.to(logps.dtype))
                with torch.no_grad():  # the reference model's forward
                    logps_of(hidden, weight)
            passes.append(counter.get_total_flops() / (2 * hidden.shape[0] * weight.numel()))
        return hidden.grad.double(), weight.grad.double(), *passes

    def ours(**options):
        return lambda hidden, weight: fastdpo.linear_logps(hidden, weight, labels, **options)

    def eager(hidden, weight):
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]

    exact = gradients(head.hidden.double(), head.weight.double(), ours(backward="exact"))

    def errors(result):
        return {
            f"{name} error": ((x - e).norm() / e.norm()).item()
            for name, x, e in zip(("dhidden", "dweight"), result, exact)
        }

    low = head.hidden.bfloat16(), head.weight.bfloat16()
    rows = []
    for name, inputs_, logps_of in (
        ("eager bf16 logits", low, eager),
        ("fastdpo exact, bf16 inputs", low, ours(backward="exact")),
    ):
        result = gradients(*inputs_, logps_of)
        rows.append({"path": name, "pairs per token": None, "passes": result[3], "frozen": result[2], **errors(result)})
    parts = [
        inputs.shares(h.float(), head.weight.float(), y) for h, y in zip(head.hidden.split(512), labels.split(512))
    ]
    share, own = (torch.cat(part) for part in zip(*parts))
    for tau in TAUS:
        smallest = min(tau) if isinstance(tau, tuple) else tau
        results = [
            gradients(head.hidden.float(), head.weight.float(), ours(tau=tau, seed=seed)) for seed in range(args.seeds)
        ]
        every = [errors(result) for result in results]
        rows.append(
            {
                "path": name_of(tau),
                "pairs per token": (odds(share, own, smallest).sum(1) / ONE).mean().item(),
                "passes": sum(result[3] for result in results) / len(results),
                "frozen": sum(result[2] for result in results) / len(results),
                **{key: sum(e[key] for e in every) / len(every) for key in every[0]},
            }
        )
    notes = {
        "head": head.name,
        "N": len(labels),
        "V": head.weight.shape[0],
        "H": head.weight.shape[1],
        "blocks": share.shape[1],
        "seeds": args.seeds,
        "defaults": [name_of(DEFAULT_TAU), name_of(FROZEN_HEAD_TAU)],
        "passes": "lm_head GEMMs of policy and reference forward and backward; frozen: the head takes no gradient",
        "error": "relative L2 against fp64",
    }
    inputs.report(args.output, "Routed backward against tau", rows, notes)


if __name__ == "__main__":
    main()
