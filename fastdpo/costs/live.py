"""How many tokens keep each block of a vocabulary, where no head is at hand: those of the trained head that the CPU
results are measured on, spread over a vocabulary of another size. `python -m tools.live` writes live.json.

    first   the head's ids are the first of the vocabulary, as those of the merges that a tokenizer learns first are:
            the same few blocks are kept by most tokens, and the rest by nobody
    same    stretched over the vocabulary: no block is kept by many tokens
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..routing import num_blocks

FILE = Path(__file__).with_name("live.json")


def spread(kept: Tensor, vocab_size: int, scaling: str) -> Tensor:
    """`kept` [blocks of a head] as [blocks of `vocab_size` columns]. A token's number of blocks stays, but under
    "first" for those that a smaller vocabulary does not have."""
    blocks = num_blocks(vocab_size)
    if scaling == "first":
        padded = torch.zeros(max(blocks, len(kept)), dtype=torch.float64, device="cpu")
        padded[: len(kept)] = kept
        return padded[:blocks]
    stretched = kept[(torch.arange(blocks, device="cpu") * len(kept) / blocks).long()]
    return stretched * (kept.sum() / stretched.sum())


def trained(num_tokens: int, vocab_size: int, tau: float, scaling: str = "same") -> Tensor:
    """[blocks] of `num_tokens` tokens, how many keep each at `tau`, one of the defaults.

    A vocabulary of few blocks cannot have a block kept by more than all tokens: it is cut there.
    """
    shares = json.loads(FILE.read_text())["kept"][f"{tau:g}"]
    kept = spread(torch.tensor(shares, dtype=torch.float64, device="cpu"), vocab_size, scaling)
    return kept.clamp(max=1.0) * num_tokens
