"""What one call of a head gives, and whether it still would: what all views of lazy logits share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...divergence import token_divergence
from ...head import HeadOptions, LogitTransform
from ...ops.problem import IDENTITY, TokenStats
from ..lm_head import AppliedHead, autocast
from .tensor import serve_if


class Held:
    """Whether the tensors of a head's call are what they were, and which gradients have been taken of them.

    Version counters tell what torch's saved tensors are told. Writing through ``.data``, as PEFT's merging and some
    optimizers do, goes past them; one element of each row tells.
    """

    NAMES = ("hidden", "weight", "bias", "lora_A", "lora_B")

    def __init__(self, head: AppliedHead):
        self.tensors = {name: x for name, x in zip(self.NAMES, head.tensors) if x is not None}
        self.before = {name: (_version(x), _sample(x)) for name, x in self.tensors.items()}
        self.read, self.watched = False, ""

    def valid(self) -> float | Tensor:
        """1, or NaN where the device alone knows that something has changed.

        Raises:
            RuntimeError: something has changed.
        """
        valid = 1.0
        for name, x in self.tensors.items():
            version, sample = self.before[name]
            if _version(x) != version:
                self._refuse(name)
            now = _sample(x)
            if x.device.type != "cpu":
                valid = valid * torch.where((now == sample).all(), 1.0, torch.nan)
            elif not torch.equal(now, sample):
                self._refuse(name)
        return valid

    def _refuse(self, name: str):
        raise RuntimeError(
            f"{name} of the lm_head has been changed since the forward whose logits are read only now: read them, or "
            "the log-probs, before optimizer.step(), load_state_dict, merging adapters and other changes"
        )

    def reads(self, values):
        """`values`, made of these tensors and not of the logits."""
        tensors = (values,) if isinstance(values, Tensor) else values
        if any(x is not None and x.requires_grad for x in tensors):
            self.read = True
            self._bypassed()
        return values

    def watch(self, operation: str) -> None:
        self.watched = operation
        self._bypassed()

    def _bypassed(self) -> None:
        if self.read and self.watched:
            raise RuntimeError(
                f"{self.watched} of logits of which something was read that was computed without them, so that not all "
                f"of their gradient passes there: call {self.watched} before anything is read"
            )


def _version(x: Tensor) -> tuple[int, int]:
    return 0 if x.is_inference() else x._version, x.untyped_storage().nbytes()


def _sample(x: Tensor) -> Tensor:
    """The bits of some elements of each row, from columns that move along; all of a vector's."""
    x = x.detach().view(-1, x.shape[-1]) if x.ndim > 1 else x.detach()[:, None]
    rows, columns = x.shape
    row = torch.arange(rows, device=x.device)[:, None]
    column = torch.arange(min(columns, 1 + SAMPLED // max(rows, 1)), device=x.device)
    return x[row, (row + column) % max(columns, 1)].view(_BITS[x.element_size()])


SAMPLED = 4096  # elements that are compared at least, all where there are fewer: nothing beside a pass over the head
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Source:
    """Values that one call of the head gives, as it would have computed them then.

    A dataclass with its tensors in the open, because DDP searches the model's outputs for them.
    """

    applied: AppliedHead  # hidden [N, H]
    options: HeadOptions
    autocast: torch.dtype | None
    inference: bool
    wanted: set[str]  # statistics that were asked for of this head: from then on computed with the log-probs
    held: Held
    transform: LogitTransform = IDENTITY
    bent: bool = False  # tanh has been applied; the factor that makes a softcap of it is still to come
    power: float | None = None  # so many times the log-softmax of all that
    computed: TokenStats | None = field(default=None, init=False)  # [N], on the rows of `computed_by`
    computed_by: object | None = field(default=None, init=False)  # the mark of a view
    computed_for: Tensor | None = field(default=None, init=False)  # [N], the labels

    @property
    def width(self) -> int:
        return len(self.applied.weight)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.applied.hidden.dtype)

    @property
    def model_dtype(self) -> torch.dtype:
        """What the model would have made its logits in."""
        return self.autocast or torch.promote_types(self.applied.hidden.dtype, self.applied.weight.dtype)

    @property
    def requires_grad(self) -> bool:
        return any(x is not None and x.requires_grad for x in self.applied.tensors)

    def token_stats(self, labels: Tensor, stats: tuple[str, ...]) -> TokenStats:
        """[N] each; rows with an ignored label are not computed."""
        valid = self.held.valid()
        with autocast(self.applied.weight, self.autocast):
            computed = self.applied.token_stats(labels, self.transform, self.options, stats)
        if isinstance(valid, float):
            return computed
        return TokenStats(*(x if x is None or x.dtype == torch.bool else x * valid for x in computed))

    def divergence(
        self, teacher: Source, ref_hidden: Tensor, counted: Tensor, kind: str, beta: float, vocab_size
    ) -> Tensor:
        """[N], from what `teacher` gives for `ref_hidden` [N, H_ref]; 0 where not `counted` [N]."""
        valid = self.held.valid() * teacher.held.valid()
        (hidden, weight, bias, lora), (_, ref_weight, ref_bias, _) = self.applied, teacher.applied
        scale, softcap, temperature = _at_temperature_1(self.transform)
        options = replace(self.options, logit_scale=scale, softcap=softcap or None, temperature=temperature)
        tensors = (hidden, weight, ref_hidden, ref_weight, counted, bias, ref_bias, lora)
        with autocast(weight, self.autocast):
            settings = (kind, beta, (), options, _at_temperature_1(teacher.transform))
            computed = token_divergence(tensors, vocab_size, settings).divergence
        return computed if isinstance(valid, float) else computed * valid

    def values(self, rows: Tensor) -> Tensor:
        """[..., V] in fp32 for rows [...]."""
        valid = self.held.valid()
        hidden, weight, bias, lora = self.applied
        hidden = hidden[rows]
        with autocast(weight, self.autocast):
            logits = F.linear(hidden, weight, bias)
            if lora is not None:
                logits = logits + lora.scale * F.linear(F.linear(hidden, lora.a), lora.b)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = self.transform.applied(logits if isinstance(valid, float) else logits * valid)
        logits = torch.tanh(logits) if self.bent else logits
        return logits if self.power is None else self.power * logits.log_softmax(-1)

    def of_rows(self, rows: Tensor) -> Source:
        """With a copy of these rows of hidden."""
        self.held.valid()
        return replace(self, applied=self.applied._replace(hidden=self.applied.hidden[rows]))

    def column(self, index: slice | None) -> Source:
        """The same head with these columns only; None: one column, the mean of all."""
        self.held.valid()

        def cut(x: Tensor | None) -> Tensor | None:
            if x is None or index is not None:
                return None if x is None else x[index]
            return x.mean(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

        hidden, weight, bias, lora = self.applied
        lora = None if lora is None else lora._replace(b=cut(lora.b))
        return replace(self, applied=AppliedHead(hidden, cut(weight), cut(bias), lora))

    def times(self, factor: float) -> Source:
        """With values `factor` times as large. Raises Unserved where that is no longer scale, softcap, temperature."""
        scale, softcap, temperature = self.transform
        if self.power is not None:
            return replace(self, power=self.power * factor)
        if not softcap and not self.bent:
            return replace(self, transform=LogitTransform(scale * factor))
        serve_if(factor > 0)
        if self.bent:
            return replace(self, transform=LogitTransform(scale * factor, factor), bent=False)
        return replace(self, transform=LogitTransform(scale, softcap, temperature / factor))

    def tanh(self) -> Source:
        serve_if(self.power is None and not self.transform.softcap and not self.bent)
        return replace(self, bent=True)


def _at_temperature_1(transform: LogitTransform) -> LogitTransform:
    """The same: c tanh(s x / c) / T = (c / T) tanh((s / T) x / (c / T))."""
    scale, softcap, temperature = transform
    return LogitTransform(scale / temperature, softcap / temperature)
