"""What the CPU engine multiplies: fp32 rows of hidden and slabs of weight, a bounded piece at a time.

An operand is a view where the input already is fp32 and in place, otherwise a copy of at most TILE_BYTES.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...routing import BLOCK
from ..native import address, extension
from ..problem import Head, Tokens
from .gemm import matmul

TILE_BYTES = 8 << 20  # one logits tile, one chunk of hidden, one slab of weight: about six such live at a time
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/structs.h, DType


class Operands:
    """fp32 pieces of one problem, with the low-rank head's second product; `threads` is how many a call may use."""

    def __init__(self, head: Head, tokens: Tokens):
        self.head, self.tokens = head, tokens
        self.native = extension()
        self.threads = torch.get_num_threads()
        self.hidden_size, self.vocab_size = head.hidden.shape[1], head.weight.shape[0]
        self.lora_a = self.lora_b = None
        if head.lora is not None:
            self.lora_a, self.lora_b = self._fp32(head.lora.a) * head.lora.scale, self._fp32(head.lora.b)
        self.bias = None if head.bias is None else head.bias.float().contiguous()

    def serial(self) -> Operands:
        """The same pieces for one of several threads."""
        other = copy.copy(self)
        other.threads = 1
        return other

    def _fp32(self, x: Tensor) -> Tensor:
        return x.to(self.head.compute_dtype).float()

    def chunk_rows(self, bytes_per_token: int = 0) -> int:
        """Tokens per chunk such that hidden, and `bytes_per_token` beside it, stay within TILE_BYTES each."""
        return max(1, min(4096, TILE_BYTES // (4 * self.hidden_size), TILE_BYTES // max(bytes_per_token, 1)))

    def slab_cols(self, num_rows: int) -> int:
        """Vocabulary columns per tile, a multiple of BLOCK."""
        cols = min(TILE_BYTES // (4 * num_rows), TILE_BYTES // (4 * self.hidden_size))
        return max(BLOCK, min(cols, 16384) // BLOCK * BLOCK)

    def hidden(self, start: int, stop: int) -> Tensor:
        """[stop - start, H] rows of the tokens."""
        if self.tokens.source_rows is None:
            return self._fp32(self.head.hidden[start:stop])
        return self._gather(None, self.tokens.source_rows[start:stop], stop - start, stop - start)

    def hidden_of(self, token_list: Tensor, padded: int) -> Tensor:
        """[padded, H] rows of the listed int32 tokens, zeros behind them."""
        return self._gather(token_list, self.tokens.source_rows, token_list.shape[0], padded)

    def _gather(self, token_list: Tensor | None, rows: Tensor | None, count: int, padded: int) -> Tensor:
        source = self.head.hidden
        out = torch.empty(padded, self.hidden_size, dtype=torch.float32, device=source.device)
        self.native.gather_rows(
            address(out),
            self.hidden_size,
            address(source, rows=True),
            DTYPES[source.dtype],
            source.stride(0),
            address(token_list, torch.int32),
            address(rows, torch.int64),
            count,
            self.hidden_size,
            self.threads,
        )
        out[count:] = 0
        return self._fp32(out)

    def weight(self, start: int, stop: int) -> Tensor:
        """[stop - start, H] rows of weight."""
        return self._fp32(self.head.weight[start:stop])

    def rank(self, hidden: Tensor) -> Tensor | None:
        """lora_scale * hidden @ lora_a.T, [n, r]."""
        return None if self.lora_a is None else hidden @ self.lora_a.T

    def products(self, hidden: Tensor, rank: Tensor | None, weight: Tensor, start: int) -> Tensor:
        """hidden @ weight.T, plus rank @ lora_b.T, for the slab of weight that starts at column `start`."""
        tile = matmul(hidden, weight)
        return tile if rank is None else tile.addmm_(rank, self.lora_b[start : start + weight.shape[0]].T)

    def tile(self, data: Tensor, num_rows: int, start: int):
        """The native view of a tile of products whose first column is `start`."""
        head = self.head
        return self.native.Tile(
            address(data, torch.float32, rows=True),
            data.stride(0),
            num_rows,
            data.shape[1],
            start,
            address(None if self.bias is None else self.bias[start:], torch.float32),
            head.transform.scale,
            head.transform.softcap,
            1.0 / head.transform.temperature,
        )
