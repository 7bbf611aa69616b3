"""What the CPU engine multiplies: fp32 rows of hidden and slabs of weight, a bounded piece at a time; and which library
multiplies.

An operand is a view where the input already is fp32 and in place, otherwise a copy of at most TILE_BYTES.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ...routing import BLOCK
from ..native import EXTENSION
from ..problem import Head, Tokens

TILE_BYTES = 8 << 20  # one logits tile, one chunk of hidden, one slab of weight: about six such live at a time
# oneDNN compiles a kernel per shape, about a millisecond and 300 KiB each, and every thread keeps its own: row counts
# that vary are padded to a multiple of this, large ones by at most a quarter.
ROW_MULTIPLE = 32


def _find_onednn() -> bool:
    try:
        vendor_is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return vendor_is_amd and available and torch.backends.cpu.get_cpu_capability() == "AVX512"


# MKL keeps to AVX2 on AMD processors, where oneDNN (which torch ships too) uses AVX-512: 190 against 400 GFLOP/s on two
# cores of an AMD EPYC 9005, November 2026. On Intel, and wherever oneDNN is missing, `torch.mm` is the better choice.
USES_ONEDNN = _find_onednn()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T of fp32 matrices [n, k] and [m, k] in any layout -> [n, m], in fp32 throughout."""
    # A dispatch mode, such as torch's FlopCounterMode, knows mm and would pass over the oneDNN product.
    if USES_ONEDNN and _get_current_dispatch_mode() is None:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.T)


def padded_rows(count: int) -> int:
    """The row count to multiply when counts vary from call to call."""
    if not USES_ONEDNN:
        return count
    multiple = max(ROW_MULTIPLE, 1 << count.bit_length() >> 3)
    return -(-count // multiple) * multiple


class Operands:
    """fp32 pieces of one problem, with the low-rank head's second product; `threads` is how many a call may use."""

    def __init__(self, head: Head, tokens: Tokens):
        self.head, self.tokens, self.count = head, tokens, tokens.labels.shape[0]
        self.threads = torch.get_num_threads()
        self.hidden_size, self.vocab_size = head.hidden.shape[1], head.weight.shape[0]
        self.num_blocks = -(-self.vocab_size // BLOCK)
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

    def hidden(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """([stop - start, H] rows of the tokens, their low-rank products)."""
        if self.tokens.source_rows is not None:
            return self._gather(None, self.tokens.source_rows[start:stop], stop - start, stop - start)
        hidden = self.head.hidden[start:stop].to(self.head.compute_dtype).float()
        return hidden, None if self.lora_a is None else hidden @ self.lora_a.T

    def hidden_of(self, token_list: Tensor, padded: int) -> tuple[Tensor, Tensor | None]:
        """The same of the listed int32 tokens, [padded, H], zeros behind them."""
        return self._gather(token_list, self.tokens.source_rows, token_list.shape[0], padded)

    def _gather(
        self, token_list: Tensor | None, rows: Tensor | None, count: int, padded: int
    ) -> tuple[Tensor, Tensor | None]:
        source = self.head.hidden
        out = torch.empty(padded, self.hidden_size, dtype=torch.float32, device=source.device)
        EXTENSION.gather_rows(out=out[:count], source=source, tokens=token_list, rows=rows, num_threads=self.threads)
        out[count:] = 0
        hidden = self._fp32(out)
        return hidden, None if self.lora_a is None else hidden @ self.lora_a.T

    def weight(self, start: int, stop: int) -> Tensor:
        """[stop - start, H] rows of weight."""
        return self.head.weight[start:stop].to(self.head.compute_dtype).float()

    def products(self, hidden: Tensor, low_rank: Tensor | None, weight: Tensor, start: int) -> Tensor:
        """hidden @ weight.T, plus low_rank @ lora_b.T, for the slab of weight that starts at column `start`."""
        tile = matmul(hidden, weight)
        return tile if low_rank is None else tile.addmm_(low_rank, self.lora_b[start : start + weight.shape[0]].T)

    def tile(self, data: Tensor, start: int) -> dict:
        """The fields of csrc's Tile: products whose first column is `start`."""
        bias = None if self.bias is None else self.bias[start:]
        return {"data": data, "col_start": start, "bias": bias, "transform": self.head.transform}
