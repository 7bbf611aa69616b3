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
from .tensor import Cell, Lazy, serve_if, serves

IGNORED = HeadOptions.ignore_index


@dataclass(eq=False, repr=False)
class LazyLogits(LazyRows):
    """The logits ``[..., V]`` of some rows of a `Source`, or a multiple of their log-softmax."""

    @property
    def plain(self) -> bool:
        """Logits, whose softcap is known."""
        return self.power is None and not self.source.bent

    # Scale, softcap, temperature

    def _times(self, factor):
        serve_if(_is_factor(factor))
        return self._copy(self.source.times(factor))

    def _over(self, divisor, *, rounding_mode=None):
        serve_if(_is_factor(divisor) and rounding_mode is None)
        return self._times(1 / divisor)

    def _times_(self, factor, method: str = "mul_"):
        serve_if(_is_factor(factor) and _is_factor(factor_of(method, factor)) and not self.many)
        # A change that takes no part in the gradients, of logits that have some
        apart = self.cell.source.requires_grad and (self.detached or not torch.is_grad_enabled())
        serve_if(not apart)
        self.source.times(factor_of(method, factor))  # where that is served
        changed = torch.zeros(self.cell.rows.shape, dtype=torch.bool, device="cpu").view(-1)
        changed[self.at] = True
        view, steps = self, []
        while view.parent is not None:
            view, steps = view.parent, [view.step, *steps]
        self.cell.changes.append((changed, steps, method, factor))
        return self

    def _over_(self, divisor, *, rounding_mode=None):
        serve_if(rounding_mode is None)
        return self._times_(divisor, "div_")

    def _tanh(self):
        return self._copy(self.source.tanh())

    # What trainers want of logits

    def _log_softmax(self, dim=None, dtype=None, *, _stacklevel: int = 3):
        serve_if(self._last(dim) and dtype in (None, self.dtype) and self.plain)
        return self._copy(replace(self.source, power=1.0))

    def _gather(self, dim: int, index: Tensor):
        serve_if(self.power is not None and self._last(dim) and index.shape == (*self.rows.shape, 1))
        return self.power * self.logps(self.labels(index[..., 0]))[..., None]

    def labels(self, labels: Tensor, ignored: Tensor | None = None) -> Tensor:
        """`labels` with those `ignored` as IGNORED. What torch refuses is not served where finding out does not wait
        for the device; elsewhere labels out of range give NaN."""
        serve_if(labels.dtype == torch.int64)
        labels = labels.to(self.device)
        outside = (labels < 0) | (labels >= self.shape[-1])
        if ignored is not None:
            outside, labels = outside & ~ignored, labels.masked_fill(ignored, IGNORED)
        serve_if(self.device.type != "cpu" or not outside.any())
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
        known = weight is None and not label_smoothing and (size_average, reduce) == (None, None)
        serve_if(known and reduction in ("none", "mean", "sum"))
        serve_if(self.ndim == 2 and target.shape == self.rows.shape and self.plain)
        ignored = target.to(self.device) == ignore_index
        losses = -self.token_stats(self.labels(target, ignored)).logps
        if reduction == "none":
            return losses
        return losses.sum() / (~ignored).sum() if reduction == "mean" else losses.sum()

    def _logsumexp(self, dim, keepdim: bool = False):
        serve_if(self._last(dim) and keepdim is False and not self.source.bent and self.power in (None, 2.0))
        if self.power == 2.0:
            return self._statistic("log_sum_sq_probs")
        first = self._quietly(self.source.column(slice(1)).values, self.rows)[..., 0]
        return first - self.token_stats(torch.zeros_like(self.rows)).logps  # z - log p, of any one label

    def _means(self, dim) -> Tensor:
        """Each row's mean logit."""
        serve_if((dim is None or self._last(dim)) and self.plain)
        if not self.source.transform.softcap:  # linear in the head: the mean column's logit
            return self._quietly(self.source.column(None).values, self.rows)[..., 0]
        serve_if(not (self.requires_grad and torch.is_grad_enabled()))
        return self._statistic("mean_logit")

    def _mean(self, dim=None):
        means = self._means(dim)
        return means.mean() if dim is None else means

    def _sum(self, dim=None):
        means = self._means(dim)
        return (means.sum() if dim is None else means) * self.shape[-1]

    def _nansum(self, dim=None):
        serve_if(dim is None)
        means = self._means(dim)
        serve_if(self.device.type != "cpu" or not means.isnan().any())  # which of a row's logits is one?
        return means.sum() * self.shape[-1]

    def _argmax(self, dim=None, keepdim: bool = False):
        serve_if(self._last(dim) and keepdim is False and self.power is None)
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

    def divergence(self, teacher: LazyLogits, counted: Tensor, kind: str, beta: float, vocab_size) -> Tensor:
        """[...], fp32, `fastdpo.linear_divergence` of both heads' logits or log-probs; 0 where not `counted`.

        Raises Unserved where the logits themselves are needed; also for those of a teacher who would get a gradient.
        """
        serve_if(self.lazy and teacher.lazy and self.cell.distinct)
        serve_if(self.rows.shape == teacher.rows.shape == counted.shape and self.device == teacher.device)
        serve_if(not (teacher.requires_grad and torch.is_grad_enabled()))
        ours, theirs = self.source, teacher.source
        serve_if(not (ours.bent or theirs.bent) and ours.power == theirs.power and ours.power in (None, 1.0))
        serve_if(ours.autocast == theirs.autocast and theirs.applied.lora is None)
        rows = self.rows.reshape(-1)
        # the rows of both in the order of the student's, whose hidden and its gradient stay where they are
        spread = rows.new_zeros(len(ours.applied.hidden), dtype=torch.bool)
        spread = spread.index_put((rows,), counted.to(self.device).reshape(-1))
        ref_hidden = theirs.applied.hidden[teacher.rows.reshape(-1)]
        ref_hidden = ref_hidden.new_zeros(len(spread), ref_hidden.shape[1]).index_put((rows,), ref_hidden)
        return self._quietly(ours.divergence, theirs, ref_hidden, spread, kind, beta, vocab_size)[self.rows]

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
        if logits.cell is not self.logits.cell:
            return LazyArgmax(ArgmaxCell(logits), logits)
        return LazyArgmax(self.cell, logits, parent=self, step=lambda argmax: argmax[index])

    def _eq(self, labels):
        serve_if(isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == self.shape)
        serve_if(labels.device == self.device)
        outside = (labels < 0) | (labels >= self.logits.shape[-1])
        return self.logits._statistic("is_top1", labels.masked_fill(outside, IGNORED))

    def _ne(self, labels):
        return torch.logical_not(self._eq(labels))

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
