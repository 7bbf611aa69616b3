"""One head as the Triton kernels take it: addresses, tiles, compacted tokens."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...routing import BLOCK, num_blocks
from ..problem import Forward, Head, Rows, Upstream
from .fold import compact_kernel, gather_kernel, rank_kernel
from .launch import DTYPES, are_aligned, descriptor, launch, precision, target_of, tile

COMPACT = 2048  # rows of one program


class Tokens:
    """The completion tokens of a call; how many there are stays on the device."""

    def __init__(self, labels: Tensor):
        def ints(n: int) -> Tensor:
            return torch.empty(n, dtype=torch.int32, device=labels.device)

        m = labels.shape[0]
        self.rows, self.labels, self.position, self.count = ints(m), ints(m), ints(m), ints(1)


class Operands:
    def __init__(self, head: Head, rows: Rows):
        self.head, self.rows = head, rows
        self.device = head.hidden.device
        self.target = target_of(self.device)
        self.num_rows = rows.labels.shape[0]
        self.vocab_size, self.hidden_size = head.weight.shape
        self.num_blocks = num_blocks(self.vocab_size)
        self.hidden = _three_dimensional(head.hidden)
        _, self.weight, self.bias, self.lora_a, self.lora_b = head.inputs
        self.rank_size = 0 if head.lora is None else head.lora.a.shape[0]
        self.rank_pitch = 0 if head.lora is None else max(16, triton.next_power_of_2(self.rank_size))
        self.item_size = head.compute_dtype.itemsize
        self.pitch = triton.cdiv(self.hidden_size * self.item_size, 16) * 16 // self.item_size
        self.aligned = are_aligned(self.hidden, self.weight)
        self.converts = any(x.dtype != head.compute_dtype for x in (self.hidden, self.weight))
        self.precision = precision(head.compute_dtype)
        self.compute = DTYPES[head.compute_dtype]

    # What the kernels take beside pointers

    @property
    def strides(self) -> tuple[int, int, int]:
        """(inner, outer_stride, inner_stride) of hidden's rows."""
        return self.hidden.shape[1], self.hidden.stride(0), self.hidden.stride(1)

    @property
    def transform(self) -> tuple[float, float, float]:
        transform = self.head.transform
        return transform.scale, transform.softcap, 1.0 / transform.temperature

    @property
    def variant(self) -> dict:
        """The constants that every kernel which recomputes logits is compiled for."""
        return {
            "COMPUTE": self.compute,
            "SOFTCAP": self.head.transform.softcap != 0,
            "R": self.rank_pitch,
            "PRECISION": self.precision,
        }

    def tile(self, kernel: str, out_columns: int | None = None, *, low_rank: bool = False, entropy: bool = False):
        """`low_rank`: a product with the few columns of a low-rank head, made in fp32; `entropy`: dz of both."""
        if low_rank:
            kind = "low_rank"
        elif not self.aligned:
            kind = "unaligned"
        elif self.head.compute_dtype == torch.float32:
            kind = "fp32"
        else:
            recomputes = kernel in ("fold", "dz")
            narrow = (
                self.converts or entropy or (recomputes and (self.rank_size > 0 or self.head.transform.softcap != 0))
            )
            kind = "narrow" if narrow else "half"
        return tile(kernel, self.target, kind, out_columns)

    def tma(self, *tensors: Tensor) -> bool:
        return self.target.has_tma and are_aligned(*tensors)

    # Work before the first product

    def compact(self, results: Forward | None = None, upstream: Upstream | None = None) -> Tokens:
        """The tokens of the call, or of the rows with an upstream gradient; other rows of `results` are filled."""
        tokens, rows = Tokens(self.rows.labels), self.rows
        names = ("logps", "lse", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
        launch(
            compact_kernel, (triton.cdiv(self.num_rows, COMPACT),),
            rows.labels, getattr(upstream, "coef", None), getattr(upstream, "coef_entropy", None),
            tokens.rows, tokens.labels, tokens.position, tokens.count,
            *(None if results is None else getattr(results, name) for name in names),
            self.num_rows, rows.ignore_index, rows.vocab_start, rows.vocab_size, B=COMPACT, warps=8,
        )  # fmt: skip
        return tokens

    def gather(self, tokens: Tokens, first: int, capacity: int, flag: Tensor | None = None, wanted: int = 0) -> Tensor:
        """[capacity, pitch]: hidden of tokens from `first`, contiguous, in the type to multiply in; else zeros."""
        out = torch.empty(capacity, self.pitch, dtype=self.head.compute_dtype, device=self.device)
        launch(
            gather_kernel, (triton.cdiv(capacity, 16), triton.cdiv(self.pitch, 256)),
            self.hidden, tokens.rows, tokens.count, out, flag, first, capacity, *self.strides,
            self.hidden_size, self.pitch, wanted=wanted, BM=16, BK=256,
        )  # fmt: skip
        return out

    def rank(self, gathered: Tensor) -> Tensor | None:
        """[capacity, R] fp32: lora_scale * hidden @ lora_a.T."""
        if self.lora_a is None:
            return None
        capacity = gathered.shape[0]
        out = torch.empty(capacity, self.rank_pitch, dtype=torch.float32, device=self.device)
        shape = self.tile("rank")
        launch(
            rank_kernel, (triton.cdiv(capacity, shape.m),),
            gathered, self.lora_a, out, capacity, self.pitch, self.hidden_size, self.rank_size, self.head.lora.scale,
            BM=shape.m, BK=shape.k, R=self.rank_pitch, PRECISION=self.precision, warps=shape.warps, stages=shape.stages,
        )  # fmt: skip
        return out


def _three_dimensional(hidden: Tensor) -> Tensor:
    """[outer, inner, H]: a view where one exists, as of the usual slice hidden[:, :-1]."""
    if hidden.ndim == 3:
        return hidden
    if hidden.ndim < 3:
        return hidden.reshape(1, -1, hidden.shape[-1])
    return hidden.reshape(-1, *hidden.shape[-2:])


def operands(use_tma: bool, *tensors_and_boxes: tuple[Tensor, int, int]) -> list:
    """Each (tensor, rows, columns) as a TMA descriptor of such boxes, or as itself."""
    return [descriptor(x, r, c) if use_tma else x for x, r, c in tensors_and_boxes]


__all__ = ["BLOCK", "Operands", "Tokens", "operands"]
