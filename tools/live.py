"""How many tokens keep each block of a vocabulary, from a trained head's distributions.

python -m tools.live --head head.safetensors     writes fastdpo/costs/live.json, for where no head is at hand

A head of another size is scaled to a vocabulary as `fastdpo/costs/live.py` says (first, same), where a token has as
many live blocks as on the head, or

    split   every column of the head becomes several, of equal probability: candidates then lie in more blocks than a
            trained model's do, so this is an upper bound of the pairs
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from benchmarks import inputs
from fastdpo.costs.live import FILE, spread
from fastdpo.costs.steps import Shape
from fastdpo.head import DEFAULT_TAU, FROZEN_HEAD_TAU
from fastdpo.routing import BLOCK, ONE, keep, odds

SCALINGS = ("first", "same", "split")


def counts_of(head: inputs.HeadInputs, tau: float, width: float = 1.0, seed: int = 0) -> Tensor:
    """[blocks] of the head's tokens, how many keep each, drawn by the rule of fastdpo/routing.py; `width`: columns that
    one of the head becomes."""
    head_size = head.weight.shape[0]
    block_of = (torch.arange(head_size) * width).long() // BLOCK
    weight = head.weight.float()
    g = torch.Generator().manual_seed(seed)
    counts = torch.zeros(int(block_of[-1]) + 1, dtype=torch.float64)
    for hidden, labels in zip(head.hidden.float().split(512), head.labels.split(512)):
        tail = (hidden @ weight.T).scatter(1, labels[:, None], -torch.inf).softmax(-1)
        share = torch.zeros(len(tail), len(counts)).index_add_(1, block_of, tail)
        own = torch.zeros_like(share, dtype=torch.bool).scatter_(1, block_of[labels][:, None], True)
        counts += keep(odds(share, own, tau), torch.randint(ONE, (len(share),), generator=g)).sum(0)
    return counts


def live_pairs(head: inputs.HeadInputs, shape: Shape, tau: float, scaling: str, seed: int = 0) -> Tensor:
    """[num_blocks] tokens out of shape.num_tokens that keep each block."""
    width = shape.vocab_size / head.weight.shape[0] if scaling == "split" else 1.0
    counts = counts_of(head, tau, width, seed) * (shape.num_tokens / len(head.labels))
    return spread(counts, shape.vocab_size, scaling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", required=True, help="safetensors file with hidden, weight and labels")
    head = inputs.load(parser.parse_args().head)
    count = len(head.labels)
    kept = {f"{tau:g}": (counts_of(head, tau) / count).tolist() for tau in (DEFAULT_TAU, FROZEN_HEAD_TAU)}
    kept = {tau: [round(share, 5) for share in shares] for tau, shares in kept.items()}
    FILE.write_text(json.dumps({"head": head.name, "tokens": count, "V": len(head.weight), "kept": kept}) + "\n")
    print(f"{FILE}: " + ", ".join(f"{sum(x):.1f} blocks per token at {tau}" for tau, x in kept.items()))


if __name__ == "__main__":
    main()
