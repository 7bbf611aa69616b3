"""An lm_head that answers with lazy logits, for trainers that take ``model(...).logits``.

logits = lm_head(hidden)     held as (hidden, weight), until logits.py sees what is wanted of them
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..lm_head import AppliedHead, applied_head, autocast_type, refuse_forward
from ..options import TRAINER_OPTIONS, head_options
from ..wrappers import is_dtensor
from .logits import LazyLogits
from .source import Held, Source

if TYPE_CHECKING:
    from ...typed import TrainerOptions, Unpack

# Wrappers that split the head, or run it where its result cannot come back as an object. Gathering it for a deferred
# read is for all ranks to do, and reading is a rank's own affair: one that reads alone would wait for ever
SPLITTING = ("FullyShardedDataParallel", "FSDPModule", "DataParallel")


@contextmanager
def lazy_logits(*models: nn.Module, **options: Unpack[TrainerOptions]) -> Iterator[None]:
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
        NotImplementedError: a head that is quantised, or adapted by something else than LoRA, DoRA,
            ``modules_to_save`` and trainable tokens; or that is split (FSDP, ZeRO-3, tensor parallelism, DataParallel):
            what is read later needs the head gathered once more, by all ranks, and a rank may read alone, to log, say.
            `patch_model` serves these.

    Guarantees:
        Scale, softcap and temperature that the model or the trainer applies to its logits are followed, and the grad
        mode, autocast and adapter of the moment the head was called. Reading logits in a way that is not known here
        computes them, with a warning that names the operation; from then on they are real, and what is changed in
        place stays changed. Logits count as fp32 whatever the model's type. Reading them after hidden or the head's
        weights were changed raises RuntimeError (on a GPU, where the change went past torch's version counters, as
        through ``.data``: NaN). Calls from other threads, and of copies of the model, have logits as before.
    """
    given = head_options("lazy_logits", options, TRAINER_OPTIONS)
    heads = list(dict.fromkeys(_output_layer(model) for model in models))
    before, hooks, user = _ACTIVE.__dict__.get("options", {}), [], object()
    try:
        for head in heads:
            _install(head, hooks, user)
        _ACTIVE.options = {**before, **dict.fromkeys(hooks, given)}
        yield
    finally:
        _ACTIVE.options = before
        for hook in hooks:
            _remove(hook, user)


_ACTIVE = threading.local()  # .options: of the hooks that are in force for this thread
_LOCK = threading.Lock()


def _install(head: nn.Module, hooks: list[_LazyHead], user: object) -> None:
    """Adds the head's hook to `hooks`. Wherever this is interrupted, `_remove` of what is in there takes it back."""
    with _LOCK:
        hook = _LAZY_HEADS.setdefault(head, _LazyHead(head))
        hooks.append(hook)
        hook.users.add(user)
        if len(hook.users) == 1:
            hook.previous = head.__dict__.get("forward")
            head.__dict__["forward"] = hook


def _remove(hook: _LazyHead, user: object) -> None:
    head = hook.head()
    with _LOCK:
        hook.users.discard(user)
        if not hook.users and head is not None and head.__dict__.get("forward") is hook:
            if hook.previous is None:
                del head.__dict__["forward"]
            else:
                head.__dict__["forward"] = hook.previous
        if not hook.users:
            hook.previous = None


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
    if _splits(head) or is_dtensor(base.weight) or hasattr(base.weight, "ds_id"):
        raise NotImplementedError("lazy logits of an lm_head that FSDP, DeepSpeed ZeRO-3 or tensor parallelism splits")
    refuse_forward(base, nn.Linear)
    refuse_forward(head, type(head))
    return head


class _LazyHead:
    """The head's `forward` meanwhile. One object per head, so that torch.compile sees the same one every step."""

    def __init__(self, head: nn.Module):
        self.head = weakref.ref(head)
        self.users: set[object] = set()
        self.previous = None  # the head's own `forward`, where it is not its class's
        self.wanted: set[str] = set()  # statistics that were asked for: from then on computed with the log-probs

    @torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo with fastdpo
    def __call__(self, hidden: Tensor, *args, **kwargs) -> LazyLogits | Tensor:
        head, grad = self.head(), torch.is_grad_enabled()
        options = _ACTIVE.__dict__.get("options", {}).get(self)
        if options is None:  # another thread's, or left over in a copy
            return (self.previous or type(head).forward.__get__(head))(hidden, *args, **kwargs)
        if len(args) == 1 and not kwargs and _named(head, "torchtune.modules.tied_linear.Linear"):
            applied = AppliedHead(hidden, args[0], None, None)
        elif args or kwargs:
            raise NotImplementedError(f"an lm_head called with more than hidden: {args}, {kwargs}")
        else:
            applied = applied_head(head, hidden)

        def hold(x: Tensor) -> Tensor:
            # A view and not the parameter: DDP looks from the outputs' grad_fn for parameters that take part
            return x.view_as(x) if grad else x.detach()

        flat = applied.hidden.to(applied.weight.device).reshape(-1, applied.hidden.shape[-1])
        flat = flat.clone() if flat.is_inference() else flat  # inference tensors have no version to watch
        applied = applied._replace(hidden=flat).map(hold)
        inference = torch.is_inference_mode_enabled()
        source = Source(applied, options, autocast_type(flat), inference, self.wanted, Held(applied))
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
