"""Rows of logits that nobody has computed, and how torch's views and copies move them.

z[:, :-1].reshape(-1, V)    a view or a copy as that of the row numbers is: they have the strides of the logits, over V
"""

from __future__ import annotations

import functools
import math
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .source import Source
from .tensor import Cell, Lazy, Unserved, serve_if

WHOLE = slice(None)
VIEWS = (
    "reshape", "view", "flatten", "chunk", "split", "unbind", "index_select", "unsqueeze", "contiguous", "float",
    "detach", "to",
)  # fmt: skip
MOVES = {"_getitem", "_iter", *(f"_{name}" for name in VIEWS)}  # values are not looked at


@dataclass(eq=False, repr=False)
class LogitsCell(Cell):
    """`source.values` of `rows`, with the factors by which it has been multiplied in place meanwhile."""

    source: Source
    rows: Tensor  # [...], int64: which rows of the source's hidden
    distinct: bool  # no row twice
    detached: bool
    what = "the logits themselves"
    # (the places [...] of `rows` that changed, bool on the CPU; the steps to their view; the method and its argument)
    changes: list[tuple] = field(default_factory=list, init=False)
    scaled: dict[tuple[int, ...], Source | None] = field(default_factory=dict, init=False)  # by the changes applied

    def compute(self) -> Tensor:
        with torch.inference_mode(self.source.inference), torch.set_grad_enabled(not self.detached):
            values = self.source.values(self.rows)
            for _, steps, method, argument in self.changes:
                getattr(functools.reduce(lambda view, step: step(view), steps, values), method)(argument)
            return values

    def source_of(self, at: Tensor) -> Source | None:
        """What gives these places now, None where it is not the same for all."""
        if not self.changes:
            return self.source
        applied = []
        for number, (changed, *_) in enumerate(self.changes):
            inside = changed[at]
            if inside.all():
                applied.append(number)
            elif inside.any():
                return None
        key = tuple(applied)
        if key not in self.scaled:
            self.scaled[key], factors = None, [factor_of(*self.changes[number][2:]) for number in key]
            with suppress(Unserved):
                self.scaled[key] = functools.reduce(Source.times, factors, self.source)
        return self.scaled[key]


def factor_of(method: str, argument: float) -> float:
    """What mul_ or div_ by `argument` multiplies by."""
    return argument if method == "mul_" else 1 / argument


@dataclass(eq=False, repr=False)
class LazyRows(Lazy):
    """Some rows ``[..., V]`` of a `Source`."""

    cell: LogitsCell
    rows: Tensor  # [...], int64: which rows of the source's hidden; strides and storage are those of the logits, over V
    at: Tensor  # [...], int64 on the CPU: which places of the cell
    detached: bool
    many: bool = False  # one of several views that one call returned: torch lets nobody change those in place
    blind: bool = False  # made without grad mode: with it, torch takes gradients to this view and no further
    lineage: tuple[object, ...] = ()  # marks of the views whose rows these are among, the last one its own

    def __post_init__(self):
        super().__post_init__()
        self.lineage = (*self.lineage, object())

    @classmethod
    def of(cls, source: Source, rows: Tensor, detached: bool, distinct: bool = True, lineage=()) -> LazyRows:
        """A tensor of its own."""
        at = torch.arange(rows.numel(), device="cpu").view(rows.shape)
        return cls(LogitsCell(source, rows, distinct, detached), rows, at, detached, lineage=lineage)

    @property
    def source(self) -> Source | None:
        """None where there is none: rows that were changed in place and others, or gradients that do not reach it."""
        return None if self.blind and torch.is_grad_enabled() else self.cell.source_of(self.at)

    @property
    def power(self) -> float | None:
        return self.source.power

    @property
    def lazy(self) -> bool:
        """Whether nothing has been computed, and nothing stands in the way of computing without logits."""
        return self.made is None and self.source is not None

    def call(self, method, function, args, kwargs):
        if self.made is None and self.source is None and method.__name__ not in MOVES:
            method = _no
        return super().call(method, function, args, kwargs)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.cell.source.width)) if self.made is None else self.made.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def meta(self) -> Tensor:
        width, dtype = self.cell.source.width, self.cell.source.dtype
        strides = (*(width * stride for stride in self.rows.stride()), 1)
        return torch.empty_strided(self.shape, strides, dtype=dtype, device="meta")

    @property
    def device(self) -> torch.device:
        return self.rows.device if self.made is None else self.made.device

    @property
    def requires_grad(self) -> bool:
        if self.made is not None:
            return self.made.requires_grad
        return self.cell.source.requires_grad and not self.detached

    def watch(self, operation: str) -> None:
        self.cell.source.held.watch(operation)

    # Views and copies: the same rows in another order or shape, or fewer

    def _moved(self, step, on_rows=None, many: bool = False, detached: bool = False, distinct: bool = True):
        """`step` of the logits, which is `on_rows` of row numbers: a view of the same memory where torch makes one."""
        on_rows = on_rows or step
        rows = on_rows(self.rows)
        if rows.untyped_storage()._cdata != self.rows.untyped_storage()._cdata:
            serve_if(self.source is not None)
            detached = self.detached or not torch.is_grad_enabled()
            return self.of(self.source, rows, detached, self.cell.distinct and distinct, self.lineage)
        blind = not detached and (self.blind or (self.requires_grad and not torch.is_grad_enabled()))
        at, detached, many = on_rows(self.at), detached or self.detached, many or self.many
        return type(self)(self.cell, rows, at, detached, many, blind, self.lineage, parent=self, step=step)

    def _copy(self, source: Source | None = None) -> LazyRows:
        detached = self.detached or not torch.is_grad_enabled()
        lineage = self.lineage if source is None else ()
        return self.of(source or self.source, self.rows.clone(), detached, self.cell.distinct, lineage)

    def _last(self, dim) -> bool:
        return type(dim) is int and dim in (-1, self.ndim - 1)

    def _row_dim(self, dim) -> int:
        """Which dimension of the rows it is: not the last one of the logits."""
        dim = dim + self.ndim if type(dim) is int and dim < 0 else dim
        serve_if(type(dim) is int and 0 <= dim < self.ndim - 1)
        return dim

    def _getitem(self, index):
        index = index if isinstance(index, tuple) else (index,)
        serve_if(all(map(_is_index, index)) and sum(x is Ellipsis for x in index) <= 1)
        missing = self.ndim - sum(x.ndim if _is_mask(x) else x is not None and x is not Ellipsis for x in index)
        if not any(x is Ellipsis for x in index):
            index = (*index, Ellipsis)
        spread = [y for x in index for y in ((WHOLE,) * missing if x is Ellipsis else (x,))]
        serve_if(missing >= 0 and isinstance(spread[-1], slice) and spread[-1] == WHOLE)
        distinct = not any(isinstance(x, (Tensor, list)) and not _is_mask(x) for x in spread)
        return self._moved(lambda z: z[index], lambda rows: rows[tuple(spread[:-1])], distinct=distinct)

    def _reshape(self, *shape, name="reshape"):
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        serve_if(len(shape) >= 2 and all(type(x) is int for x in shape))
        *leading, last = shape
        fits = last == self.shape[-1] or (last == -1 and math.prod(leading) == self.rows.numel() > 0)
        width = self.shape[-1]
        serve_if(fits and min(leading) >= -1 and width > 0)
        return self._moved(lambda z: getattr(z, name)(*leading, width), lambda rows: getattr(rows, name)(leading))

    def _view(self, *shape):
        return self._reshape(*shape, name="view")

    def _flatten(self, start_dim: int = 0, end_dim: int = -1):
        start, end = self._row_dim(start_dim), self._row_dim(end_dim)
        return self._moved(lambda x: x.flatten(start, end))

    def _chunk(self, chunks: int, dim: int = 0):
        return self._parts(dim, "chunk", chunks)

    def _split(self, split_size, dim: int = 0):
        return self._parts(dim, "split", tuple(split_size) if isinstance(split_size, list) else split_size)

    def _unbind(self, dim: int = 0):
        return self._parts(dim, "unbind")

    def _parts(self, dim: int, name: str, *sizes):
        dim = self._row_dim(dim)
        numbers = range(len(getattr(self.rows, name)(*sizes, dim)))
        return tuple(self._moved(lambda x, i=i: getattr(x, name)(*sizes, dim)[i], many=True) for i in numbers)

    def _iter(self):
        return iter(self._unbind())

    def _index_select(self, dim: int, index: Tensor):
        dim = self._row_dim(dim)
        return self._moved(lambda x: x.index_select(dim, index), distinct=False)

    def _unsqueeze(self, dim: int):
        serve_if(type(dim) is int and 0 <= dim < self.ndim)
        return self._moved(lambda x: x.unsqueeze(dim))

    def _contiguous(self):
        return self if self.rows.is_contiguous() else self._moved(lambda x: x.contiguous())

    def _float(self):
        serve_if(self.dtype == torch.float32)
        return self

    def _clone(self, *, memory_format=torch.preserve_format):
        serve_if(memory_format == torch.preserve_format)
        return self._copy()

    def _detach(self):
        return self._moved(lambda z: z.detach(), lambda rows: rows.view(rows.shape), detached=True)

    def _to(self, *args, non_blocking: bool = False, **kwargs):
        wanted = [*args, *kwargs.values()]
        while wanted and wanted[-1] is False:  # non_blocking and copy
            wanted.pop()
        # A cast to the type that the logits are lazy in, or that the model would have made them in, changes nothing
        types = (self.dtype, self.cell.source.model_dtype)
        serve_if(all(x in types if isinstance(x, torch.dtype) else _is_device(x, self.device) for x in wanted))
        return self


def _no(*_, **__):
    raise Unserved


def _is_mask(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _is_index(x) -> bool:
    """Whether it counts for one dimension, or as a mask for its own."""
    if isinstance(x, list):
        return all(type(y) is int for y in x) and len(x) > 0
    return x is None or x is Ellipsis or isinstance(x, (slice, Tensor)) or type(x) is int


def _is_device(x, device: torch.device) -> bool:
    return isinstance(x, (str, int, torch.device)) and type(x) is not bool and torch.empty(0, device=x).device == device
