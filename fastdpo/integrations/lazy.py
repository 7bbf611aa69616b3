"""Logits that are computed only if somebody reads them.

slices, masks, scale, softcap, temperature      followed, on row numbers and one `Source` (lazy_head.py)
log_softmax(-1).gather(-1, y), cross_entropy    linear_logps: [B, T, V] never exists
anything that is not known here                 the logits themselves, with a warning: slower, never another result
"""

from __future__ import annotations

import functools
import inspect
import numbers
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..logps import TokenStats

if TYPE_CHECKING:
    from .lazy_head import Source

IGNORED = -100
KNOWN = set()  # names of the tensor methods and torch functions that are served without logits


def known(method):
    """A tensor method; where it returns NotImplemented, the same method of the logits themselves answers."""
    name = method.__name__
    KNOWN.add(name)

    @functools.wraps(method)
    def serve(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if result is not NotImplemented:
            return result
        function = torch.nn.functional.cross_entropy if name == "cross_entropy" else getattr(Tensor, name)
        return function(self.tensor(name), *args, **kwargs)

    return serve


@dataclass(eq=False)
class LazyLogits:
    """The logits ``[..., V]`` of some rows of a `Source`, or `power` times their log-softmax."""

    source: Source
    rows: Tensor  # [...], int64: which rows of the source's hidden
    parents: tuple = ()  # the views that this one is a part of
    distinct: bool = True  # no row twice
    power: float | None = None
    detached: bool = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, self.source.weight.shape[0]))

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.rows.ndim + 1

    ndim = property(dim)
    dtype = property(lambda self: torch.promote_types(torch.float32, self.source.hidden.dtype))
    device = property(lambda self: self.rows.device)
    requires_grad = property(lambda self: self.source.requires_grad and not self.detached)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    # Views: the same rows in another order or shape, or fewer

    def _view(self, rows: Tensor, distinct: bool = True, **changes) -> LazyLogits:
        return replace(self, rows=rows, parents=(*self.parents, self), distinct=self.distinct and distinct, **changes)

    def _last(self, dim) -> bool:
        return dim in (-1, self.ndim - 1)

    @known
    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        missing = self.ndim - sum(x.ndim if _is_mask(x) else x is not None and x is not Ellipsis for x in index)
        if not any(x is Ellipsis for x in index):
            index = (*index, Ellipsis)
        spread = [y for x in index for y in ((slice(None),) * missing if x is Ellipsis else (x,))]
        if not isinstance(spread[-1], slice) or spread[-1] != slice(None):
            return NotImplemented
        distinct = all(x is None or isinstance(x, (slice, int)) or _is_mask(x) for x in spread)
        return self._view(self.rows[tuple(spread[:-1])], distinct)

    @known
    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if len(shape) < 2 or (shape[-1] != self.shape[-1] and (shape[-1] != -1 or -1 in shape[:-1])):
            return NotImplemented
        return self._view(self.rows.reshape(shape[:-1]))

    view = reshape

    @known
    def flatten(self, start_dim: int = 0, end_dim: int = -1):
        return (
            NotImplemented if self._last(end_dim) else self._view(self.rows.flatten(start_dim, self._row_dim(end_dim)))
        )

    def _row_dim(self, dim: int) -> int:
        return dim if dim >= 0 else dim + 1

    @known
    def chunk(self, chunks: int, dim: int = 0):
        parts = () if self._last(dim) else self.rows.chunk(chunks, self._row_dim(dim))
        return tuple(self._view(rows) for rows in parts) or NotImplemented

    @known
    def split(self, split_size, dim: int = 0):
        parts = () if self._last(dim) else self.rows.split(split_size, self._row_dim(dim))
        return tuple(self._view(rows) for rows in parts) or NotImplemented

    @known
    def index_select(self, dim: int, index: Tensor):
        if self._last(dim):
            return NotImplemented
        return self._view(self.rows.index_select(self._row_dim(dim), index), distinct=False)

    @known
    def unsqueeze(self, dim: int):
        return self._view(self.rows.unsqueeze(dim)) if 0 <= dim < self.ndim else NotImplemented

    @known
    def contiguous(self, **_):
        return self

    @known
    def float(self):
        return self

    @known
    def clone(self, **_):
        return self._view(self.rows)

    @known
    def detach(self):
        return self._view(self.rows, detached=True)

    @known
    def to(self, *args, **kwargs):
        wanted = [x for x in (*args, *kwargs.values()) if not isinstance(x, (bool, torch.memory_format))]
        served = [x.is_floating_point if isinstance(x, torch.dtype) else _is_device(x, self.device) for x in wanted]
        return self if all(served) else NotImplemented  # logits are fp32 here whatever floating type is asked for

    # Scale, softcap, temperature

    def _scaled(self, factor):
        if not isinstance(factor, numbers.Real) or isinstance(factor, bool) or factor == 0:
            return NotImplemented
        if self.power is not None:
            return self._view(self.rows, power=self.power * factor)
        source = self.source.times(factor)
        return NotImplemented if source is None else replace(self, source=source, parents=())

    @known
    def __mul__(self, other):
        return self._scaled(other)

    @known
    def __truediv__(self, other):
        return self._scaled(1 / other) if isinstance(other, numbers.Real) and other else NotImplemented

    __rmul__ = mul = __mul__
    div = __truediv__

    def div_(self, divisor):
        changed = self / divisor
        if not isinstance(changed, LazyLogits):
            raise NotImplementedError(f"lazy logits changed in place by {divisor!r}, which is not a number")
        self.__dict__.update(changed.__dict__)
        return self

    def mul_(self, factor):
        return self.div_(1 / factor)

    __itruediv__, __imul__ = div_, mul_

    @known
    def tanh(self):
        source = self.source.tanh() if self.power is None else None
        return NotImplemented if source is None else replace(self, source=source, parents=())

    # What trainers want of logits

    @known
    def log_softmax(self, dim=None, _stacklevel=3, dtype=None):
        if not self._last(dim) or self.power is not None or self.source.bent:
            return NotImplemented
        return self._view(self.rows, power=1.0)

    @known
    def gather(self, dim: int, index: Tensor):
        if self.power is None or not self._last(dim) or index.shape != (*self.rows.shape, 1):
            return NotImplemented
        return self.power * self.logps(index[..., 0])[..., None]

    @known
    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = IGNORED,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        unknown = weight is not None or label_smoothing or (size_average, reduce) != (None, None)
        if unknown or self.ndim != 2 or target.is_floating_point() or self.power is not None or self.source.bent:
            return NotImplemented
        ignored = target.to(self.device) == ignore_index
        losses = -self.token_stats(target.to(self.device).masked_fill(ignored, IGNORED)).logps
        if reduction == "none":
            return losses
        return losses.sum() / (~ignored).sum() if reduction == "mean" else losses.sum()

    @known
    def logsumexp(self, dim, keepdim: bool = False):
        if not self._last(dim) or keepdim or self.source.bent or self.power not in (None, 2.0):
            return NotImplemented
        if self.power == 2.0:
            return self._statistic("log_sum_sq_probs")
        first = self._quietly(self.source.column(slice(1)).logits, self.rows)[..., 0]
        return first - self.token_stats(torch.zeros_like(self.rows)).logps  # z - log p, of any one label

    def _means(self) -> Tensor | None:
        """Each row's mean logit, None where there is no way to them but the logits."""
        if self.power is not None or self.source.bent:
            return None
        if self.source.softcap is None:  # linear in the head: the mean column's logit
            return self._quietly(self.source.column(None).logits, self.rows)[..., 0]
        return None if self.requires_grad and torch.is_grad_enabled() else self._statistic("mean_logit")

    @known
    def mean(self, dim=None, **kwargs):
        means = self._means() if not kwargs and (dim is None or self._last(dim)) else None
        return NotImplemented if means is None else means.mean() if dim is None else means

    @known
    def sum(self, dim=None, **kwargs):
        means = self._means() if not kwargs and (dim is None or self._last(dim)) else None
        if means is None:
            return NotImplemented
        return (means.sum() if dim is None else means) * self.shape[-1]

    @known
    def nansum(self, dim=None, **kwargs):
        means = self._means() if not kwargs and dim is None else None
        return NotImplemented if means is None else means.nansum() * self.shape[-1]

    @known
    def argmax(self, dim=None, keepdim: bool = False):
        return LazyArgmax(self) if self._last(dim) and not keepdim and self.power is None else NotImplemented

    def entropy(self) -> Tensor:
        """[...], in nats."""
        return self._statistic("entropy")

    def logps(self, labels: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """log p(labels), fp32, shaped like them; 0 where `row_mask` is 0 or the label is -100."""
        if row_mask is not None:
            labels = labels.masked_fill(row_mask == 0, IGNORED)
        stats = tuple(sorted(self.source.head.wanted)) if row_mask is None else ()
        return self.token_stats(labels, stats, remember=row_mask is None).logps

    def token_stats(self, labels: Tensor, stats: tuple[str, ...] = (), remember: bool = False) -> TokenStats:
        """Shaped like `labels`. Labels go to the rows and not rows of hidden, [..., H], to labels, a copy."""
        if self.source.bent:
            raise NotImplementedError("log-probs of tanh(logits) without a factor")
        if labels.shape != self.rows.shape:
            raise ValueError(f"labels must have shape {tuple(self.rows.shape)}; got {tuple(labels.shape)}")
        source, labels = self.source, labels.to(self.device)
        if not self.distinct:  # maybe two labels for one row: rows of their own
            source = replace(source, hidden=source.hidden[self.rows.reshape(-1)])
            computed = self._quietly(source.token_stats, labels.reshape(-1), stats)
            return TokenStats(*(None if x is None else x.view(labels.shape) for x in computed))
        spread = self.rows.new_full((len(source.hidden),), IGNORED)
        spread = spread.index_put((self.rows.reshape(-1),), labels.reshape(-1))
        computed = self._quietly(source.token_stats, spread, stats)
        if remember:
            source.computed, source.computed_by, source.computed_for = computed, self, spread
        return TokenStats(*(None if x is None else x[self.rows] for x in computed))

    def _statistic(self, name: str, labels: Tensor | None = None) -> Tensor:
        """One statistic of every row: from the pass that gave the log-probs, where that one saw these rows."""
        source, value = self.source, None
        source.head.wanted.add(name)
        if source.computed is not None and any(source.computed_by is view for view in (*self.parents, self)):
            if labels is None or torch.equal(source.computed_for[self.rows], labels):
                value = getattr(source.computed, name)
        if value is None:
            labels = torch.zeros_like(self.rows) if labels is None else labels
            return getattr(self.token_stats(labels, (name,)), name)
        return value[self.rows].detach() if self.detached or not torch.is_grad_enabled() else value[self.rows]

    # Everything else

    def _quietly(self, function, *args):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return function(*args)

    def tensor(self, operation: str) -> Tensor:
        """The logits themselves, fp32, with a warning that `operation` needs them."""
        warnings.warn(f"{operation} needs the logits themselves, {tuple(self.shape)}: computed", stacklevel=3)
        logits = self._quietly(self.source.logits, self.rows)
        return logits if self.power is None else self.power * logits.log_softmax(-1)

    def __getattr__(self, name: str):
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"LazyLogits has no attribute {name!r}")
        return getattr(self.tensor(name), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if not args and isinstance(kwargs.get("input"), LazyLogits):
            args = (kwargs.pop("input"),)
        if name in KNOWN and isinstance(args[0], LazyLogits):
            return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*_real(tuple(args), name), **{key: _real(value, name) for key, value in kwargs.items()})


def _operator(name: str):
    return lambda self, *others: getattr(self.tensor(name), name)(*others)


for _name in ("add", "radd", "sub", "rsub", "rtruediv", "neg", "pow", "matmul", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))
LazyLogits.__hash__ = object.__hash__
KNOWN |= {"mul", "div", "view"}


class LazyArgmax:
    """``logits.argmax(-1)``: compared with labels it is `is_top1`, and otherwise the tensor."""

    def __init__(self, logits: LazyLogits):
        self.logits = logits
        self.shape = logits.rows.shape

    def __getitem__(self, index):
        return LazyArgmax(self.logits[index])

    def __eq__(self, labels):
        if not isinstance(labels, Tensor) or labels.shape != self.shape:
            return self.tensor("argmax") == labels
        return self.logits._statistic("is_top1", labels.to(self.logits.device))

    def __ne__(self, labels):
        return torch.logical_not(self == labels)

    __hash__ = object.__hash__

    def tensor(self, operation: str) -> Tensor:
        return self.logits.tensor(operation).argmax(-1)

    def __getattr__(self, name: str):
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"LazyArgmax has no attribute {name!r}")
        return getattr(self.tensor(name), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.eq, Tensor.eq, Tensor.__eq__) and len(args) == 2:
            ours, labels = args if isinstance(args[0], LazyArgmax) else args[::-1]
            return ours == labels
        name = getattr(func, "__name__", "")
        return func(*_real(tuple(args), name), **{key: _real(value, name) for key, value in (kwargs or {}).items()})


def _real(value, operation: str):
    if isinstance(value, (list, tuple)):
        return type(value)([_real(x, operation) for x in value])
    return value.tensor(operation) if isinstance(value, (LazyLogits, LazyArgmax)) else value


def _is_mask(x) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _is_device(x, device: torch.device) -> bool:
    return isinstance(x, (str, int, torch.device)) and torch.device(x) == device


def lazy_aware(original, ours):
    """`original`, a function of logits and more, that is ``ours(logits, arguments)`` for `LazyLogits`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        logits = next(iter(given.arguments.values()))
        return ours(logits, given.arguments) if isinstance(logits, LazyLogits) else original(*args, **kwargs)

    function.fastdpo_original = original
    return function
