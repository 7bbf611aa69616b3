"""One call as the kernels take it: addresses, what tiles of logits need, and the form that a kernel is launched in."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...routing import BLOCK
from ..problem import Head, Rows
from .common import Columns, Form, TokenRange, Transform
from .launch import SHORT, Tile, are_aligned, target_of, tile

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Call:
    teacher: Call | None = None  # of a call of two heads

    def __init__(self, head: Head, rows: Rows):
        self.head, self.rows = head, rows
        self.device, self.dtype = head.hidden.device, head.compute_dtype
        self.target = target_of(self.device)
        self.num_rows = rows.labels.shape[0]
        self.vocab_size, self.hidden_size = head.weight.shape
        self.num_blocks = triton.cdiv(self.vocab_size, BLOCK)
        hidden = head.hidden
        if hidden.ndim != 3:  # a view where one exists, as of the usual slice hidden[:, :-1]
            hidden = (
                hidden.reshape(-1, *hidden.shape[-2:]) if hidden.ndim > 3 else hidden.reshape(1, -1, *hidden.shape[-1:])
            )
        self.hidden = hidden  # [outer, inner, H]
        self.unit = tl.constexpr(16 // hidden.element_size() if are_aligned(hidden) else 1)
        _, self.weight, self.bias, self.lora_a, self.lora_b = head.inputs
        self.lora_rank = 0 if head.lora is None else self.lora_a.shape[0]
        self.low_rank_pitch = 0 if head.lora is None else max(16, triton.next_power_of_2(self.lora_rank))
        self.item_size = self.dtype.itemsize
        self.pitch = triton.cdiv(self.hidden_size * self.item_size, 16) * 16 // self.item_size  # of gathered rows
        self.columns = Columns(self.bias, self.vocab_size, self.hidden_size, self.weight.stride(0))
        self.compute = DTYPES[self.dtype]
        self.transform = Transform.of(head.transform)
        recomputing = "narrow" if self.lora_rank or self.transform.softcap is not None else "half"
        if not are_aligned(hidden, self.weight):
            self.kind = self.recomputing_kind = "unaligned"
        elif self.dtype == torch.float32:
            self.kind = self.recomputing_kind = "fp32"
        elif hidden.dtype != self.dtype or self.weight.dtype != self.dtype:
            self.kind = self.recomputing_kind = "narrow"
        else:
            short = recomputing == "half" and self.hidden_size <= SHORT
            self.kind, self.recomputing_kind = "half", "short" if short else recomputing

    @functools.cached_property
    def pair_tile(self) -> int:
        """Listed pairs of a work tile."""
        return self.tile("routed_dz").m

    def tile(self, kernel: str, out_columns: int | None = None, kind: str | None = None) -> Tile:
        """`kind`: another than that of the call's operands."""
        own = self.recomputing_kind if kernel in ("fold", "dz", "routed_dz") else self.kind
        return tile(kernel, self.target, kind or own, out_columns)

    def token_rows(self, tokens: TokenRange) -> tuple[Tile, tuple[int]]:
        """(tile, grid) of a kernel that goes along the blocks of these tokens."""
        shape = self.tile("finish", max(8, self.num_blocks))
        return shape, (triton.cdiv(min(tokens.capacity, self.num_rows - tokens.first_token), shape.m),)

    def grid(self, shape: Tile, most: int = 1 << 30) -> tuple[int]:
        """Of a persistent kernel, whose programs are no form of it."""
        return (min(self.target.programs * shape.per_sm, most),)

    def form(self, shape: Tile, *operands: tuple[Tensor, int, int], compute=None) -> tuple:
        """(Form of a kernel with a product, its operands): each (tensor, rows, columns) as a TMA descriptor of such
        boxes where the machine has them and every tensor allows it. `compute`: another type than the call's."""
        taken, *_ = zip(*operands) if operands else ((),)
        tma = bool(operands) and self.target.has_tma and compute is None and are_aligned(*taken)
        if tma:
            taken = []
            for x, rows, columns in operands:
                taken.append(TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns]))
        numbers = (compute or self.compute, tma, shape.m, shape.n, shape.k, shape.group, shape.stages)
        return _form(*numbers), *taken


@functools.cache
def _form(*numbers) -> Form:
    """The same constants as the same objects: Triton then finds what it has compiled without comparing them."""
    return Form(*map(tl.constexpr, numbers))
