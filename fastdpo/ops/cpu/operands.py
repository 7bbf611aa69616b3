"""What the CPU engine multiplies: rows of hidden and weight, a tile of logits at a time.

csrc/cpu/products.h reads rows of any type where they lie, picked by a list or not. For a library an operand is a view
where the input already is fp32 and in place, otherwise a copy of at most TILE_BYTES.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...routing import BLOCK, num_blocks
from ..native import EXTENSION
from ..problem import Head, Tokens
from . import library

TILE_BYTES = 8 << 20  # one tile of logits or of dz, one copy of an operand: about five such live at a time
CPU = torch.device("cpu")  # not the default device, which is the caller's
FLOAT32, BF16, BF16_LIBRARY = range(3)  # csrc's Product
_ROUNDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc's DType


class Tile(NamedTuple):
    """Products of rows with blocks of the vocabulary, and then dz: csrc's BlockTile. Without lists every block has all
    rows, side by side; with them a row is of one block and one token."""

    data: Tensor  # [rows, blocks * BLOCK], or [rows, BLOCK]
    first_block: int
    num_blocks: int
    vocab_size: int
    first_token: int = 0
    blocks: Tensor | None = None  # [num_blocks] int32
    offsets: Tensor | None = None  # [num_blocks + 1] int64
    tokens: Tensor | None = None  # [rows] int32
    operands: tuple[Tensor, Tensor] | None = None  # (hidden, weight) where a library adds products, fp32 or bf16

    @property
    def fields(self) -> dict:
        """csrc's."""
        return {name: x for name, x in zip(self._fields, self) if name != "operands"}

    @property
    def first_column(self) -> int:
        return self.first_block * BLOCK


def allocate(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that nothing was written to; large ones in large pages where the system has them."""
    x = torch.empty(rows, columns, dtype=dtype, device=CPU)
    if dtype in _ROUNDED:
        EXTENSION.use_huge_pages(data=x)
    return x


class Space:
    """Memory that pieces of work take one after the other: the system would clear fresh pages for each."""

    def __init__(self, apart: int = 16):
        """`apart`: floats between rows. Rows a power of two apart would fight for the same lines of a cache; a
        library lays out what it reads anew, and may want it whole."""
        self.flat: Tensor | None = None
        self.apart = apart

    def take(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of fp32. It is the next one's too."""
        stride = columns + self.apart
        if self.flat is None or self.flat.numel() < rows * stride:
            self.flat = allocate(rows, stride).view(-1)
        return self.flat.as_strided((rows, columns), (stride, 1))


class Operands:
    """One problem's head and tokens; `threads` is how many a call may use."""

    def __init__(self, head: Head, tokens: Tokens):
        self.head, self.tokens, self.count = head, tokens, tokens.labels.shape[0]
        self.threads = torch.get_num_threads()
        self.hidden_size, self.vocab_size = head.hidden.shape[1], head.weight.shape[0]
        self.num_blocks = num_blocks(self.vocab_size)
        self.rounded = _ROUNDED[head.compute_dtype]
        # A library's sums hang on how many rows it is given; csrc's, by which a token has the same bits in every batch,
        # on nothing but their length. That takes 1.0 to 1.2 of the time, of a single token 1.5 to 1.8 in fp32 (Intel
        # Xeon with AVX-512, H of 1024 and 2048, November 2026); in a library's units for bf16, more.
        self.batch_invariant = torch.are_deterministic_algorithms_enabled()
        # What a library multiplies, and whether it can multiply pairs where the factors lie; or csrc.
        of_bf16 = head.compute_dtype == torch.bfloat16
        self.in_bf16 = library.USES_BF16 and of_bf16 and not self.batch_invariant
        self.pairs_in_bf16 = self.in_bf16 and library.takes_bf16_rows(head.hidden, head.weight)
        self.own_bf16 = library.OWN_BF16 and of_bf16
        self.lora_a = self.lora_b = None
        if head.lora is not None:
            self.lora_a, self.lora_b = (x.to(head.compute_dtype).float() for x in (head.lora.a, head.lora.b))
        self.bias = None if head.bias is None else head.bias.float().contiguous()
        self.of_tile, self.of_dz = Space(), Space()
        self.of_hidden, self.of_weight = Space(apart=0), Space(apart=0)

    def chunk_rows(self, bytes_per_token: int = 0) -> int:
        """Tokens per chunk such that hidden, and `bytes_per_token` beside it, stay within TILE_BYTES each."""
        return max(1, min(4096, TILE_BYTES // (4 * self.hidden_size), TILE_BYTES // max(bytes_per_token, 1)))

    def slab_cols(self, num_rows: int) -> int:
        """Vocabulary columns per tile, a multiple of BLOCK."""
        cols = min(TILE_BYTES // (4 * num_rows), TILE_BYTES // (4 * self.hidden_size), 16384)
        # Those blocks that csrc adds to a token's dhidden at once: the same ones, however many rows a tile has, up to
        # the 4096 of chunk_rows.
        unit = EXTENSION.BLOCKS_TOGETHER * BLOCK if self.batch_invariant else BLOCK
        unit = unit if cols >= unit else BLOCK
        return max(BLOCK, cols // unit * unit)

    def by_library(self, rows: int) -> bool:
        """Whether a library multiplies tiles of so many tokens."""
        return not self.batch_invariant and library.takes(rows, self.in_bf16, self.own_bf16)

    def hidden_rows(self, start: int, stop: int) -> Tensor | None:
        """[stop - start, H] for a library, fp32 or where it multiplies them bf16; None where csrc multiplies."""
        if not self.by_library(stop - start):
            return None
        rows = self.tokens.source_rows
        if rows is None:
            return self._for_library(self.head.hidden[start:stop], self.of_hidden)
        return self._for_library(self.head.hidden[rows[start:stop]], self.of_hidden)

    def weight_rows(self, first: int, last: int) -> Tensor:
        return self._for_library(self.head.weight[first:last], self.of_weight)

    def _for_library(self, x: Tensor, space: Space) -> Tensor:
        x = x.to(self.head.compute_dtype)
        return x if x.dtype == torch.float32 or self.in_bf16 else space.take(*x.shape).copy_(x)

    def dense(self, start: int, stop: int, first_block: int, blocks: int, vocab_size: int, space: Space) -> Tile:
        return Tile(space.take(stop - start, blocks * BLOCK), first_block, blocks, vocab_size, start)

    def hidden_factor(self, tile: Tile) -> dict:
        """csrc's fields of a factor of all tokens, to be multiplied with that tile."""
        return {"source_rows": self.tokens.source_rows, **self._factor(self.head.hidden, tile)}

    def weight_factor(self, tile: Tile) -> dict:
        return self._factor(self.head.weight, tile)

    def _factor(self, factor: Tensor, tile: Tile) -> dict:
        return {"factor": factor, "rounded": self.rounded, "product": self._product(tile, FLOAT32)}

    def _product(self, tile: Tile, own: int) -> int:
        """By a library in bf16 if it can, otherwise `own`."""
        return BF16_LIBRARY if self.pairs_in_bf16 and tile.blocks is not None else own

    def low_rank(self, start: int, stop: int) -> Tensor | None:
        """[stop - start, r] what lora_b is multiplied with, of the tokens from `start` on."""
        if self.lora_a is None:
            return None
        rank, space, size = self.lora_a.shape[0], Space(), 4096
        out = allocate(stop - start, rank)
        for first in range(start, stop, size):
            tile = self.dense(first, min(first + size, stop), 0, num_blocks(rank), rank, space)
            self._multiply(tile, self.lora_a, None, first)
            rows = out[first - start : first - start + size]
            torch.mul(tile.data[:, :rank], self.head.lora.scale, out=rows)
        return out

    def multiply(self, tile: Tile, low_rank: Tensor | None, low_rank_first: int) -> Tile:
        """Fills the tile with the head's products; `low_rank` is of the tokens from `low_rank_first` on."""
        self._multiply(tile, self.head.weight, low_rank, low_rank_first)
        return tile

    def _multiply(self, tile: Tile, weight: Tensor, low_rank: Tensor | None, low_rank_first: int) -> None:
        EXTENSION.products(
            **tile.fields,
            weight=weight,
            hidden=self.head.hidden,
            source_rows=self.tokens.source_rows,
            rounded=self.rounded,
            product=self._product(tile, BF16 if self.own_bf16 else FLOAT32),
            low_rank=low_rank,
            low_rank_first=low_rank_first,
            lora_b=None if low_rank is None else self.lora_b,
            rank=0 if low_rank is None else low_rank.shape[1],
            num_threads=self.threads,
        )

    def products(
        self,
        start: int,
        stop: int,
        first: int,
        last: int,
        hidden: Tensor | None,
        low_rank: Tensor | None,
        space: Space | None = None,
    ) -> Tile:
        """Of tokens [start, stop) and columns [first, last); `hidden`, by hidden_rows, and `low_rank` are theirs."""
        blocks = num_blocks(last - first)
        tile = self.dense(start, stop, first // BLOCK, blocks, self.vocab_size, space or self.of_tile)
        if hidden is None:
            return self.multiply(tile, low_rank, start)
        weight, out = self.weight_rows(first, last), tile.data[:, : last - first]
        library.matmul(hidden, weight, out)
        if low_rank is not None:
            library.add_matmul(low_rank, self.lora_b[first:last], out)
        return tile._replace(operands=(hidden, weight)) if library.adds(stop - start, self.in_bf16) else tile

    def columns(self, tile: Tile) -> dict:
        """The fields of csrc's Tile: such columns as the vocabulary has."""
        first = tile.first_column
        bias = None if self.bias is None else self.bias[first:]
        data = tile.data[:, : self.vocab_size - first]
        return {"data": data, "col_start": first, "bias": bias, "transform": self.head.transform}
