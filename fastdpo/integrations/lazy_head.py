"""An lm_head that answers with lazy logits, for trainers that take ``model(...).logits``.

logits = lm_head(hidden)     held as (hidden, weight), until lazy.py sees what is wanted of them
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..logps import TokenStats, linear_token_stats
from ..validation import HeadOptions
from .lazy import IGNORED, LazyLogits
from .lm_head import applied_head

OPTIONS = ("backward", "tau", "seed")
# Wrappers that split the head, or run it where its result cannot come back as an object
SPLITTING = ("FullyShardedDataParallel", "FSDPModule", "DataParallel")


@contextmanager
def lazy_logits(*models, **options) -> Iterator[None]:
    """While it lasts, what the `lm_head` of `models` returns is a `LazyLogits`: trainers' code stays as it is.

    ::

        with lazy_logits(model):
            logits = model(input_ids).logits                # no logits yet
        logps = get_batch_logps(logits, labels)             # log_softmax, gather: linear_logps

    Args:
        models: language models of transformers, also inside PEFT, DDP or torch.compile; torchtune's decoders, with
            tied embeddings, too; or the head itself, an ``nn.Linear``.
        backward, tau, seed: as in `fastdpo.linear_logps`.

    Raises:
        TypeError, ValueError: naming the option, or the model that has no lm_head.
        NotImplementedError: a head that is split (FSDP, ZeRO-3, DataParallel), quantised, or adapted by something else
            than LoRA, DoRA, ``modules_to_save`` and trainable tokens.

    Guarantees:
        Scale, softcap and temperature that the model or the trainer applies to its logits are followed, and the grad
        mode, autocast and adapter of the moment the head was called. Reading logits in a way that is not known here
        computes them, with a warning that names the operation. Logits count as fp32 whatever the model's type.
    """
    check_options("lazy_logits", options)
    installed = []
    try:
        for head in dict.fromkeys(_output_layer(model) for model in models):
            previous = head.__dict__.get("forward")
            if isinstance(previous, _LazyHead):  # by an enclosing call of the same trainer
                continue
            if head not in _LAZY_HEADS:
                _LAZY_HEADS[head] = _LazyHead(head)
            lazy = _LAZY_HEADS[head]
            lazy.options = options
            installed.append((head, previous))
            head.forward = lazy
        yield
    finally:
        for head, previous in installed:
            del head.forward
            if previous is not None:
                head.forward = previous


def check_options(function: str, options: dict) -> None:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"{function} takes {', '.join(OPTIONS)}; got {name}={options[name]!r}")
    HeadOptions(**options)


def _splits(module) -> bool:
    return any(kind.__name__ in SPLITTING for kind in type(module).__mro__)


def _named(module, name: str) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in type(module).__mro__)


def _output_layer(model) -> nn.Module:
    given = type(model).__name__
    while isinstance(model, nn.Module):
        if _splits(model):
            raise NotImplementedError(f"lazy logits of a {type(model).__name__}, which splits or copies the lm_head")
        if "_orig_mod" in model._modules:  # torch.compile
            model = model._modules["_orig_mod"]
        elif hasattr(type(model), "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif "module" in model._modules and not hasattr(model, "get_output_embeddings"):  # DDP
            model = model._modules["module"]
        else:
            break
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else model
    if _named(head, "torchtune.modules.transformer.TransformerDecoder"):
        head = head.output
        if _named(head, "torchtune.modules.tied_linear.TiedLinear"):
            return head.linear  # a module that is called with hidden and the embeddings' weight
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    base = getattr(base, "original_module", base)  # PEFT's modules_to_save
    if not isinstance(base, nn.Linear):
        raise TypeError(f"model must have a linear lm_head as its output embeddings; {given} has {type(base).__name__}")
    if type(base).forward is not nn.Linear.forward:
        raise NotImplementedError(f"an lm_head of type {type(base).__module__}.{type(base).__name__}")
    if _splits(head) or hasattr(base.weight, "ds_id"):
        raise NotImplementedError("lazy logits of an lm_head that FSDP or DeepSpeed ZeRO-3 splits")
    return head


class _LazyHead:
    """The head's `forward` meanwhile. One object per head, so that torch.compile sees the same one every step."""

    def __init__(self, head: nn.Module):
        self.head = weakref.ref(head)
        self.options: dict = {}
        self.wanted: set[str] = set()  # statistics that were asked for: from then on computed with the log-probs

    @torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo with fastdpo
    def __call__(self, hidden: Tensor, *args, **kwargs) -> LazyLogits:
        head, bias, lora = self.head(), None, None
        if len(args) == 1 and not kwargs and _named(head, "torchtune.modules.tied_linear.Linear"):
            weight = args[0]
        elif args or kwargs:
            raise NotImplementedError(f"an lm_head called with more than hidden: {args}, {kwargs}")
        else:
            hidden, weight, bias, lora = applied_head(head, hidden)
        a, b, scale = lora or (None, None, 1.0)
        grad = torch.is_grad_enabled()

        def hold(x: Tensor | None) -> Tensor | None:
            # A view and not the parameter: DDP looks from the outputs' grad_fn for parameters that take part
            return None if x is None else x.view_as(x) if grad else x.detach()

        device = weight.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        flat = hold(hidden.to(weight.device).reshape(-1, hidden.shape[-1]))
        source = Source(flat, hold(weight), hold(bias), hold(a), hold(b), scale, autocast, self)
        return LazyLogits(source, torch.arange(len(flat), device=flat.device).view(hidden.shape[:-1]))


_LAZY_HEADS: weakref.WeakKeyDictionary[nn.Module, _LazyHead] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Source:
    """One call of the head, as it would have been computed then: what all views of its logits share.

    A dataclass with its tensors in the open, because DDP searches the model's outputs for them.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    autocast: torch.dtype | None
    head: _LazyHead
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bent: bool = False  # tanh has been applied; the factor that makes a softcap of it is still to come
    computed: TokenStats | None = field(default=None, init=False)  # [N], on the rows of `computed_by`
    computed_by: LazyLogits | None = field(default=None, init=False)
    computed_for: Tensor | None = field(default=None, init=False)  # [N], the labels

    @property
    def requires_grad(self) -> bool:
        tensors = (self.hidden, self.weight, self.bias, self.lora_a, self.lora_b)
        return any(x is not None and x.requires_grad for x in tensors)

    def _autocast(self):
        return torch.autocast(self.weight.device.type, self.autocast, enabled=self.autocast is not None)

    def token_stats(self, labels: Tensor, stats: tuple[str, ...]) -> TokenStats:
        """[N] each; rows with an ignored label are not computed."""
        lora = None if self.lora_a is None else (self.lora_a, self.lora_b, self.lora_scale)
        with self._autocast():
            return linear_token_stats(
                self.hidden,
                self.weight,
                labels,
                self.bias,
                stats=stats,
                ignore_index=IGNORED,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                temperature=self.temperature,
                lora=lora,
                **self.head.options,
            )

    def logits(self, rows: Tensor) -> Tensor:
        """[..., V] in fp32 for rows [...]."""
        hidden = self.hidden[rows]
        with self._autocast():
            logits = F.linear(hidden, self.weight, self.bias)
            if self.lora_a is not None:
                logits = logits + self.lora_scale * F.linear(F.linear(hidden, self.lora_a), self.lora_b)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (torch.tanh(logits) if self.bent else logits) / self.temperature

    def column(self, index: slice | None) -> Source:
        """The same head with these columns only; None: one column, the mean of all."""

        def cut(x: Tensor | None) -> Tensor | None:
            if x is None or index is not None:
                return None if x is None else x[index]
            return x.mean(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

        return replace(self, weight=cut(self.weight), bias=cut(self.bias), lora_b=cut(self.lora_b))

    def times(self, factor: float) -> Source | None:
        """With logits `factor` times as large, None where that is no longer scale, softcap, temperature."""
        if self.softcap is None and not self.bent:
            return replace(self, logit_scale=self.logit_scale * factor)
        if factor <= 0:
            return None
        if self.bent:
            return replace(self, logit_scale=self.logit_scale * factor, softcap=factor, bent=False)
        return replace(self, temperature=self.temperature / factor)

    def tanh(self) -> Source | None:
        return None if self.bent or self.softcap is not None else replace(self, bent=True)
