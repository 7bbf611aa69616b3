"""Peak memory of the head and the loss of one training step, per way to compute them: bytes by reading sources and
counting what is alive at once, held against the CPU measurements in benchmarks/results.

A step is the policy's and the reference's forward, the loss and the backward. What is there before it (hidden states,
head, those of the reference) are the inputs; `growth` is what comes on top at the highest point, the returned gradients
among it. Of a peak the highest of a few moments is taken, each a sum of what lives then.

On a GPU nothing of this was measured. There the peers' elementwise work is fused, and fastdpo is counted at the bound
that it guarantees, more than it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

MIB, GIB = 2**20, 2**30
FP32 = 4
TRL_TILE = (4096, 32768)  # tokens, columns


@dataclass(frozen=True)
class Batch:
    """One micro-batch of preference pairs. `rows` includes prompts, which some paths compute and others skip."""

    tokens: int  # of completions
    vocab: int
    hidden: int
    item: int = 2  # bytes of a hidden state's number, and of the head's
    rows: int | None = None  # None: no prompts
    pairs: int = 1
    frozen: bool = False  # the head takes no gradient
    reference: bool = True  # its head and hidden states are there too
    on_gpu: bool = True

    @property
    def all_rows(self) -> int:
        return self.tokens if self.rows is None else self.rows

    @property
    def dweight(self) -> float:
        return 0.0 if self.frozen else self.item * self.vocab * self.hidden

    @property
    def dhidden(self) -> float:
        return self.item * self.all_rows * self.hidden

    @property
    def inputs(self) -> float:
        return self.item * self.hidden * (self.vocab + self.all_rows) * (2 if self.reference else 1)


def _eager(b: Batch) -> float:
    """log_softmax, its gradient and gather's zeros, fp32; then dz and what it is multiplied into."""
    logits = b.all_rows * b.vocab
    return max(3 * FP32 * logits, b.item * logits + b.dweight + b.dhidden)


def _trl(b: Batch) -> float:
    """On a GPU two tiles in the inputs' type; on a CPU eight of fp32, torch's own. fp32 sums, then cast."""
    tile = min(b.tokens, TRL_TILE[0]) * min(b.vocab, TRL_TILE[1])
    held = (2 * b.item if b.on_gpu else 29 + b.item) * tile
    sums = FP32 * b.hidden * (b.tokens + (0 if b.frozen else b.vocab))
    cast = b.dweight + b.dhidden if b.item != FP32 else b.dhidden if b.all_rows > b.tokens else 0.0
    return held + sums + cast


def _liger(b: Batch) -> float:
    """The logits of one pair at a time, its own gradient of the head and the sum over pairs."""
    logits = b.all_rows / b.pairs * b.vocab
    kept = 0 if b.item == FP32 else b.item  # beside their copy in fp32
    first, then = (8.5, 2 * b.item) if b.on_gpu else (kept + (16 if b.reference else 12), kept + 12)
    return max(first * logits + b.dweight, then * logits + 2 * b.dweight + b.dhidden)


BASE, BASE_ALONE = (28, 22), 16  # MiB of a CPU's workspace at any size: head trained, frozen; no reference


def _fastdpo(most: float, of_half: float) -> Callable[[Batch], float]:
    """MiB of a CPU's workspace: `most` that grow with the hidden states, and `of_half` in types of two bytes. Fitted:
    the allocator's pages are among them, so they differ by 20 from machine to machine."""

    def growth(b: Batch) -> float:
        if b.on_gpu:
            workspace = 128 * MIB
        else:
            base = (BASE[b.frozen] if b.reference else BASE_ALONE) + (0 if b.item == FP32 else of_half)
            workspace = base * MIB + min(3 * FP32 * min(b.tokens, 8192) * b.hidden, most * MIB)
        return b.dweight + b.dhidden + workspace + 256 * b.tokens

    return growth


@dataclass(frozen=True)
class Path:
    growth: Callable[[Batch], float]
    why: str
    error: float  # of the peak, the largest against the CPU measurements: tests/costs/test_memory.py


PATHS = {
    "eager": Path(
        _eager,
        "12 bytes per logit: log-softmax, its gradient and gather's, fp32; 2 more where bf16 logits are held",
        0.02,
    ),
    "trl": Path(_trl, "tiles of 4096 x 32768 and sums of both gradients in fp32", 0.01),
    "liger": Path(_liger, "8.5 bytes per logit of one pair, compiled; 16 or 18 on a CPU", 0.04),
    "fastdpo exact": Path(_fastdpo(24, 12), "at most 128 MiB and 256 bytes per token", 0.13),
    "fastdpo routed": Path(_fastdpo(76, 0), "at most 128 MiB and 256 bytes per token", 0.13),
}


def peak(path: str, batch: Batch) -> float:
    """Bytes at the highest point, inputs and gradients among them."""
    return batch.inputs + PATHS[path].growth(batch)


def resized(batch: Batch, tokens: int) -> Batch:
    """The same share of prompts, pairs and head, of so many completion tokens."""
    rows = None if batch.rows is None else round(tokens * batch.rows / batch.tokens)
    return replace(batch, tokens=tokens, rows=rows)


def most_tokens(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that `fits`, where fewer always do; 0: not even one."""
    low, high = 0, 2**40
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def longest(path: str, batch: Batch, memory: float) -> int:
    """Most completion tokens whose peak is at most `memory` bytes, at this share of prompts and number of pairs."""
    return most_tokens(lambda tokens: peak(path, resized(batch, tokens)) <= memory)
