"""An lm_head that answers with lazy logits, for trainers that take ``model(...).logits``.

logits = lm_head(hidden)     held as (hidden, weight), until lazy.py sees what is wanted of them
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..head import HeadOptions
from ..logps import TokenStats, linear_token_stats
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
        computes them, with a warning that names the operation; from then on they are real, and what is changed in
        place stays changed. Logits count as fp32 whatever the model's type. Reading them after hidden or the head's
        weights were changed raises RuntimeError (on a GPU, where the change went past torch's version counters, as
        through ``.data``: NaN). Calls from other threads, and of copies of the model, have logits as before.
    """
    check_options("lazy_logits", options)
    hooks = [_installed(head) for head in dict.fromkeys(_output_layer(model) for model in models)]
    before = _ACTIVE.__dict__.get("options", {})
    _ACTIVE.options = {**before, **dict.fromkeys(hooks, options)}
    try:
        yield
    finally:
        _ACTIVE.options = before
        for hook in hooks:
            _remove(hook)


_ACTIVE = threading.local()  # .options: of the hooks that are in force for this thread
_LOCK = threading.Lock()


def _installed(head: nn.Module) -> _LazyHead:
    with _LOCK:
        hook = _LAZY_HEADS.setdefault(head, _LazyHead(head))
        if hook.users == 0:
            hook.previous = head.__dict__.get("forward")
            head.forward = hook
        hook.users += 1
    return hook


def _remove(hook: _LazyHead) -> None:
    head = hook.head()
    with _LOCK:
        hook.users -= 1
        if hook.users == 0 and head is not None and head.__dict__.get("forward") is hook:
            del head.forward
            if hook.previous is not None:
                head.forward = hook.previous
        if hook.users == 0:
            hook.previous = None


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
    own = head.__dict__.get("forward")
    replaced = getattr(own, "__func__", None) is not type(head).forward and not hasattr(head, "_hf_hook")
    if own is not None and replaced and not isinstance(own, _LazyHead):
        raise NotImplementedError(f"an lm_head whose forward has been replaced, by {own!r}")
    return head


class _LazyHead:
    """The head's `forward` meanwhile. One object per head, so that torch.compile sees the same one every step."""

    def __init__(self, head: nn.Module):
        self.head = weakref.ref(head)
        self.users = 0
        self.previous = None  # the head's own `forward`, where it is not its class's
        self.wanted: set[str] = set()  # statistics that were asked for: from then on computed with the log-probs

    @torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo with fastdpo
    def __call__(self, hidden: Tensor, *args, **kwargs) -> LazyLogits | Tensor:
        head, bias, lora = self.head(), None, None
        options = _ACTIVE.__dict__.get("options", {}).get(self)
        if options is None:  # another thread's, or left over in a copy
            return (self.previous or type(head).forward.__get__(head))(hidden, *args, **kwargs)
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
        flat = hidden.to(weight.device).reshape(-1, hidden.shape[-1])
        flat = flat.clone() if flat.is_inference() else hold(flat)  # inference tensors have no version to watch
        tensors = (flat, hold(weight), hold(bias), hold(a), hold(b))
        source = Source(*tensors, scale, autocast, torch.is_inference_mode_enabled(), self, options, Held(*tensors))
        rows = torch.arange(len(flat), device=flat.device).view(hidden.shape[:-1])
        return LazyLogits.of(source, rows, detached=not grad)

    def __reduce__(self):
        """Of a copy of the head, which has its own weights: its class's forward, or what it had of its own."""
        if self.previous is not None:
            return _same, (self.previous,)
        return getattr, (self.head(), "forward")  # of the class: a copy is made before it has attributes


def _same(value):
    return value


_LAZY_HEADS: weakref.WeakKeyDictionary[nn.Module, _LazyHead] = weakref.WeakKeyDictionary()


class Held:
    """Whether the tensors of a head's call are what they were, and which gradients have been taken of them.

    Version counters tell what torch's saved tensors are told. Writing through ``.data``, as PEFT's merging and some
    optimizers do, goes past them; one element of each row tells.
    """

    NAMES = ("hidden", "weight", "bias", "lora_A", "lora_B")

    def __init__(self, *tensors: Tensor | None):
        self.tensors = {name: x for name, x in zip(self.NAMES, tensors) if x is not None}
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
    """Values that one call of the head gives, as it would have computed them then: what all their views share.

    A dataclass with its tensors in the open, because DDP searches the model's outputs for them.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    autocast: torch.dtype | None
    inference: bool
    head: _LazyHead
    options: dict
    held: Held
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bent: bool = False  # tanh has been applied; the factor that makes a softcap of it is still to come
    power: float | None = None  # so many times the log-softmax of all that
    computed: TokenStats | None = field(default=None, init=False)  # [N], on the rows of `computed_by`
    computed_by: object | None = field(default=None, init=False)  # the mark of a view
    computed_for: Tensor | None = field(default=None, init=False)  # [N], the labels

    @property
    def width(self) -> int:
        return len(self.weight)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.hidden.dtype)

    @property
    def model_dtype(self) -> torch.dtype:
        """What the model would have made its logits in."""
        return self.autocast or torch.promote_types(self.hidden.dtype, self.weight.dtype)

    @property
    def requires_grad(self) -> bool:
        tensors = (self.hidden, self.weight, self.bias, self.lora_a, self.lora_b)
        return any(x is not None and x.requires_grad for x in tensors)

    def _autocast(self):
        return torch.autocast(self.weight.device.type, self.autocast, enabled=self.autocast is not None)

    def token_stats(self, labels: Tensor, stats: tuple[str, ...]) -> TokenStats:
        """[N] each; rows with an ignored label are not computed."""
        lora = None if self.lora_a is None else (self.lora_a, self.lora_b, self.lora_scale)
        valid = self.held.valid()
        with self._autocast():
            computed = linear_token_stats(
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
                **self.options,
            )
        if isinstance(valid, float):
            return computed
        return TokenStats(*(x if x is None or x.dtype == torch.bool else x * valid for x in computed))

    def values(self, rows: Tensor) -> Tensor:
        """[..., V] in fp32 for rows [...]."""
        valid = self.held.valid()
        hidden = self.hidden[rows]
        with self._autocast():
            logits = F.linear(hidden, self.weight, self.bias)
            if self.lora_a is not None:
                logits = logits + self.lora_scale * F.linear(F.linear(hidden, self.lora_a), self.lora_b)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scale = self.logit_scale * valid
        if isinstance(scale, Tensor) or scale != 1.0:
            logits = logits * scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = torch.tanh(logits) if self.bent else logits
        logits = logits / self.temperature if self.temperature != 1.0 else logits
        return logits if self.power is None else self.power * logits.log_softmax(-1)

    def of_rows(self, rows: Tensor) -> Source:
        """With a copy of these rows of hidden."""
        self.held.valid()
        return replace(self, hidden=self.hidden[rows])

    def column(self, index: slice | None) -> Source:
        """The same head with these columns only; None: one column, the mean of all."""
        self.held.valid()

        def cut(x: Tensor | None) -> Tensor | None:
            if x is None or index is not None:
                return None if x is None else x[index]
            return x.mean(0, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

        return replace(self, weight=cut(self.weight), bias=cut(self.bias), lora_b=cut(self.lora_b))

    def times(self, factor: float) -> Source | None:
        """With values `factor` times as large, None where that is no longer scale, softcap, temperature."""
        if self.power is not None:
            return replace(self, power=self.power * factor)
        if self.softcap is None and not self.bent:
            return replace(self, logit_scale=self.logit_scale * factor)
        if factor <= 0:
            return None
        if self.bent:
            return replace(self, logit_scale=self.logit_scale * factor, softcap=factor, bent=False)
        return replace(self, temperature=self.temperature / factor)

    def tanh(self) -> Source | None:
        plain = self.power is None and self.softcap is None and not self.bent
        return replace(self, bent=True) if plain else None
