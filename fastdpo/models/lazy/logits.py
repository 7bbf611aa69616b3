"""Logits that are computed only if somebody reads them.

slices, masks, scale, softcap, temperature      followed, on row numbers (rows.py) and one `Source` (source.py)
log_softmax(-1).gather(-1, y), cross_entropy    linear_logps: [B, T, V] never exists
anything that is not known here                 the logits themselves, with a warning, and from then on they are real
                                                (tensor.py): slower, never another result
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...head import HeadOptions
from ...ops.problem import TokenStats
from .rows import VIEWS, WHOLE, LazyRows, factor_of
from .tensor import Cell, Lazy, serves

IGNORED = HeadOptions.ignore_index


@dataclass(eq=False, repr=False)
class LazyLogits(LazyRows):
    """The logits ``[..., V]`` of some rows of a `Source`, or a multiple of their log-softmax."""

    # Scale, softcap, temperature

    def _times(self, factor):
        source = self.source.times(factor) if _is_factor(factor) else None
        return NotImplemented if source is None else self._copy(source)

    def _over(self, divisor, *, rounding_mode=None):
        if not _is_factor(divisor) or rounding_mode is not None or not _is_factor(1 / divisor):
            return NotImplemented
        return self._times(1 / divisor)

    def _times_(self, factor, method: str = "mul_"):
        if not _is_factor(factor) or not _is_factor(factor_of(method, factor)) or self.many:
            return NotImplemented
        # A change that takes no part in the gradients, of logits that have some
        apart = self.cell.source.requires_grad and (self.detached or not torch.is_grad_enabled())
        if apart or self.source.times(factor_of(method, factor)) is None:
            return NotImplemented
        changed = torch.zeros(self.cell.rows.shape, dtype=torch.bool, device="cpu").view(-1)
        changed[self.at] = True
        view, steps = self, []
        while view.parent is not None:
            view, steps = view.parent, [view.step, *steps]
        self.cell.changes.append((changed, steps, method, factor))
        return self

    def _over_(self, divisor, *, rounding_mode=None):
        return NotImplemented if rounding_mode is not None else self._times_(divisor, "div_")

    def _tanh(self):
        source = self.source.tanh()
        return NotImplemented if source is None else self._copy(source)

    # What trainers want of logits

    def _log_softmax(self, dim=None, dtype=None, *, _stacklevel: int = 3):
        if not self._last(dim) or dtype not in (None, self.dtype) or self.power is not None or self.source.bent:
            return NotImplemented
        return self._copy(replace(self.source, power=1.0))

    def _gather(self, dim: int, index: Tensor):
        if self.power is None or not self._last(dim) or index.shape != (*self.rows.shape, 1):
            return NotImplemented
        labels = self.labels(index[..., 0])
        return NotImplemented if labels is None else self.power * self.logps(labels)[..., None]

    def labels(self, labels: Tensor, ignored: Tensor | None = None) -> Tensor | None:
        """`labels` with those `ignored` as IGNORED, None where torch refuses them: where finding out does not wait for
        the device. Elsewhere those out of range give NaN."""
        if labels.dtype != torch.int64:
            return None
        labels = labels.to(self.device)
        outside = (labels < 0) | (labels >= self.shape[-1])
        if ignored is not None:
            outside, labels = outside & ~ignored, labels.masked_fill(ignored, IGNORED)
        if self.device.type == "cpu":
            return None if outside.any() else labels
        return labels.masked_fill(outside, self.shape[-1])

    def _cross_entropy(
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
        if unknown or self.ndim != 2 or target.shape != self.rows.shape or self.power is not None or self.source.bent:
            return NotImplemented
        ignored = target.to(self.device) == ignore_index
        labels = self.labels(target, ignored)
        if labels is None or reduction not in ("none", "mean", "sum"):
            return NotImplemented
        losses = -self.token_stats(labels).logps
        if reduction == "none":
            return losses
        return losses.sum() / (~ignored).sum() if reduction == "mean" else losses.sum()

    def _logsumexp(self, dim, keepdim: bool = False):
        if not self._last(dim) or keepdim is not False or self.source.bent or self.power not in (None, 2.0):
            return NotImplemented
        if self.power == 2.0:
            return self._statistic("log_sum_sq_probs")
        first = self._quietly(self.source.column(slice(1)).values, self.rows)[..., 0]
        return first - self.token_stats(torch.zeros_like(self.rows)).logps  # z - log p, of any one label

    def _means(self) -> Tensor | None:
        """Each row's mean logit, None where there is no way to them but the logits."""
        if self.power is not None or self.source.bent:
            return None
        if not self.source.transform.softcap:  # linear in the head: the mean column's logit
            return self._quietly(self.source.column(None).values, self.rows)[..., 0]
        return None if self.requires_grad and torch.is_grad_enabled() else self._statistic("mean_logit")

    def _mean(self, dim=None):
        means = self._means() if dim is None or self._last(dim) else None
        return NotImplemented if means is None else means.mean() if dim is None else means

    def _sum(self, dim=None):
        means = self._means() if dim is None or self._last(dim) else None
        return NotImplemented if means is None else (means.sum() if dim is None else means) * self.shape[-1]

    def _nansum(self, dim=None):
        means = self._means() if dim is None else None
        if means is None or (self.device.type == "cpu" and means.isnan().any()):  # which of a row's logits is one?
            return NotImplemented
        return means.sum() * self.shape[-1]

    def _argmax(self, dim=None, keepdim: bool = False):
        if not self._last(dim) or keepdim is not False or self.power is not None:
            return NotImplemented
        with torch.no_grad():
            logits = self._copy()  # as they are now
        return LazyArgmax(ArgmaxCell(logits), logits)

    def entropy(self) -> Tensor:
        """[...], in nats."""
        return self._statistic("entropy")

    def logps(self, labels: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """log p(labels), fp32, shaped like them; 0 where `row_mask` is 0 or the label is -100."""
        if row_mask is not None:
            labels = labels.masked_fill(row_mask == 0, IGNORED)
        if not self.lazy:
            return self.token_stats(labels).logps
        stats = tuple(sorted(self.source.wanted)) if row_mask is None else ()
        return self.token_stats(labels, stats, remember=row_mask is None).logps

    def token_stats(self, labels: Tensor, stats: tuple[str, ...] = (), remember: bool = False) -> TokenStats:
        """Shaped like `labels`. Labels go to the rows and not rows of hidden, [..., H], to labels, a copy."""
        if not self.lazy:
            return _real_stats(self.tensor("log-probs"), labels)
        if self.source.bent:
            raise NotImplementedError("log-probs of tanh(logits) without a factor")
        if labels.shape != self.rows.shape:
            raise ValueError(f"labels must have shape {tuple(self.rows.shape)}; got {tuple(labels.shape)}")
        source, labels = self.source, labels.to(self.device)
        if not self.cell.distinct:  # maybe two labels for one row: rows of their own
            rows, flat = self.rows.reshape(-1), labels.reshape(-1)
            computed = self._quietly(lambda: source.of_rows(rows).token_stats(flat, stats))
            return TokenStats(*(None if x is None else x.view(labels.shape) for x in computed))
        spread = self.rows.new_full((len(source.applied.hidden),), IGNORED)
        spread = spread.index_put((self.rows.reshape(-1),), labels.reshape(-1))
        computed = self._quietly(source.token_stats, spread, stats)
        if remember:
            source.computed, source.computed_by, source.computed_for = computed, self.lineage[-1], spread
        return TokenStats(*(None if x is None else x[self.rows] for x in computed))

    def _statistic(self, name: str, labels: Tensor | None = None) -> Tensor:
        """One statistic of every row: from the pass that gave the log-probs, where that one saw these rows."""
        if not self.lazy:
            labels = torch.zeros(self.shape[:-1], dtype=torch.int64, device=self.device) if labels is None else labels
            return getattr(self.token_stats(labels), name)
        source, value = self.source, None
        source.wanted.add(name)
        if source.computed is not None and source.computed_by in self.lineage:
            if labels is None or torch.equal(source.computed_for[self.rows], labels):
                value = getattr(source.computed, name)
        if value is None:
            labels = torch.zeros_like(self.rows) if labels is None else labels
            return getattr(self.token_stats(labels, (name,)), name)
        return value[self.rows].detach() if self.detached or not torch.is_grad_enabled() else value[self.rows]

    def _quietly(self, function, *args):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return self.source.held.reads(function(*args))


serves(
    LazyLogits,
    **{name: f"_{name}" for name in (
        *VIEWS, "clone", "tanh", "log_softmax", "gather", "cross_entropy", "logsumexp", "mean", "sum", "nansum",
        "argmax",
    )},
    **{"__getitem__": "_getitem", "__iter__": "_iter", "mul": "_times", "__mul__": "_times", "__rmul__": "_times"},
    **{"div": "_over", "__truediv__": "_over", "mul_": "_times_", "__imul__": "_times_"},
    **{"div_": "_over_", "__itruediv__": "_over_"},
)  # fmt: skip


def _real_stats(logits: Tensor, labels: Tensor) -> TokenStats:
    ignored = labels == IGNORED
    logp = logits.log_softmax(-1)
    picked = logp.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
    entropy, top = -(logp.exp() * logp).sum(-1), logits.argmax(-1) == labels
    stats = picked, entropy, logits.detach().mean(-1), top, (2 * logp.detach()).logsumexp(-1)
    return TokenStats(*(x.masked_fill(ignored, 0) for x in stats))


@dataclass(eq=False, repr=False)
class ArgmaxCell(Cell):
    logits: LazyLogits
    what = "the logits themselves"

    def compute(self) -> Tensor:
        return self.logits.cell.compute().argmax(-1)


@dataclass(eq=False, repr=False)
class LazyArgmax(Lazy):
    """``logits.argmax(-1)``: compared with labels it is `is_top1`, and otherwise the tensor."""

    cell: ArgmaxCell
    logits: LazyLogits  # nobody else's, so that nobody changes them

    requires_grad = False

    def meta(self) -> Tensor:
        rows = self.logits.rows
        return torch.empty_strided(rows.shape, rows.stride(), dtype=torch.int64, device="meta")

    @property
    def device(self) -> torch.device:
        return self.logits.device if self.made is None else self.made.device

    def _getitem(self, index):
        where = index if isinstance(index, tuple) else (index,)
        where = where if any(x is Ellipsis for x in where) else (*where, Ellipsis)
        logits = self.logits._getitem((*where, WHOLE))
        if logits is NotImplemented:
            return NotImplemented
        if logits.cell is not self.logits.cell:
            return LazyArgmax(ArgmaxCell(logits), logits)
        return LazyArgmax(self.cell, logits, parent=self, step=lambda argmax: argmax[index])

    def _eq(self, labels):
        known = isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == self.shape
        if not known or labels.device != self.device:
            return NotImplemented
        outside = (labels < 0) | (labels >= self.logits.shape[-1])
        return self.logits._statistic("is_top1", labels.masked_fill(outside, IGNORED))

    def _ne(self, labels):
        hits = self._eq(labels)
        return hits if hits is NotImplemented else torch.logical_not(hits)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.eq, Tensor.eq, Tensor.__eq__) and len(args) == 2 and not isinstance(args[0], LazyArgmax):
            args = args[::-1]  # labels == argmax
        return super().__torch_function__(func, types, args, kwargs)


serves(LazyArgmax, __getitem__="_getitem", eq="_eq", __eq__="_eq", ne="_ne", __ne__="_ne")


def _is_factor(x) -> bool:
    """Finite, not 0, and no Fraction, which torch refuses."""
    real = isinstance(x, numbers.Integral) or (isinstance(x, numbers.Real) and not isinstance(x, numbers.Rational))
    return real and not isinstance(x, bool) and math.isfinite(x) and x != 0
