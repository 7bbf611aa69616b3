"""How many tokens keep each block of a vocabulary, from a trained head's distributions.

A head of another size is scaled to a vocabulary in one of three ways; in the first two a token has as many live blocks
as on the head:

    first   the head's ids are the first of the vocabulary, as those of the merges that a tokenizer learns first are:
            the same few blocks are kept by most tokens, and the rest by nobody
    same    stretched over the vocabulary: no block is kept by many tokens
    split   every column of the head becomes several, of equal probability: candidates then lie in more blocks than a
            trained model's do, so this is an upper bound of the pairs
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import inputs
from fastdpo.routing import BLOCK, ONE, keep, num_blocks, odds
from tools.cost_model import Shape

SCALINGS = ("first", "same", "split")


def live_pairs(head: inputs.HeadInputs, shape: Shape, tau: float, scaling: str, seed: int = 0) -> Tensor:
    """[num_blocks] tokens out of shape.num_tokens that keep each block, drawn by the rule of fastdpo/routing.py."""
    blocks, head_size = num_blocks(shape.vocab_size), head.weight.shape[0]
    width = shape.vocab_size / head_size if scaling == "split" else 1.0
    block_of = (torch.arange(head_size) * width).long() // BLOCK
    weight = head.weight.float()
    g = torch.Generator().manual_seed(seed)
    counts = torch.zeros(int(block_of[-1]) + 1, dtype=torch.float64)
    for hidden, labels in zip(head.hidden.float().split(512), head.labels.split(512)):
        tail = (hidden @ weight.T).scatter(1, labels[:, None], -torch.inf).softmax(-1)
        share = torch.zeros(len(tail), len(counts)).index_add_(1, block_of, tail)
        own = torch.zeros_like(share, dtype=torch.bool).scatter_(1, block_of[labels][:, None], True)
        counts += keep(odds(share, own, tau), torch.randint(ONE, (len(share),), generator=g)).sum(0)
    counts *= shape.num_tokens / len(head.labels)
    if scaling == "first":
        padded = torch.zeros(max(blocks, len(counts)), dtype=torch.float64)
        padded[: len(counts)] = counts
        return padded[:blocks]
    stretched = counts[(torch.arange(blocks) * len(counts) / blocks).long()]
    return stretched * (counts.sum() / stretched.sum())
