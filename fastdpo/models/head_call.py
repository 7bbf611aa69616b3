"""One call of a model, seen from its lm_head.

hidden [..., T, H]      what the head is given; the module itself runs on one position of it
answer [..., 1, V]      known numbers in place of its logits, so that what the model does to logits is measured in every
                        call and nothing seen before is trusted: a configuration, a hook or a forward that changed shows
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from ..head import HeadOptions, LogitTransform
from ..ops.problem import IDENTITY, TokenStats
from .lm_head import applied_head, autocast, autocast_type, transformed

# The numbers, after the logits' scale, reach this far: smaller ones do not show a softcap of 30 (Gemma, xLSTM)
ANSWER = 60.0
# Largest disagreement with what the model makes of one number, relative to it, by type: a scale, a division, a tanh and
# a product are four roundings
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-7}


class HeadCall:
    """What one call gave its head, and under which modes. `head` None: a plain call, whose logits are its own."""

    def __init__(self, head: nn.Module | None, transform: LogitTransform = IDENTITY):
        self.head = head
        self.transform = transform  # the expected one
        self.hidden: Tensor | None = None
        self.version: int | None = None
        self.grad_mode = True
        self.autocast: torch.dtype | None = None
        self.numbers: Tensor | None = None  # [V], the answer at every position
        self.shape = torch.Size()  # [..., 1, V], the answer's

    def take(self, hidden: Tensor) -> Tensor:
        if self.hidden is not None:
            raise NotImplementedError("fastdpo=True with a model that calls its lm_head twice in one forward")
        self.hidden, self.grad_mode = hidden, torch.is_grad_enabled()
        self.version = _writes(hidden)
        self.autocast = autocast_type(hidden)
        return hidden[..., :1, :]

    def give(self, logits) -> Tensor:
        # An odd factor runs through all residues, neighbours far apart: a mask, a bias per id and a permutation show
        steps = (torch.arange(logits.shape[-1], device=logits.device) * 40503 + 32768) % 65536 - 32768
        reach = min(ANSWER / self.transform.scale, 3e4)  # fp16 ends at 65504
        self.numbers, self.shape = (steps * (reach / 32768)).to(logits.dtype), logits.shape
        return self.numbers.expand(self.shape).clone()  # models change their logits in place

    def shows(self, logits: Tensor, transform: LogitTransform) -> Tensor:
        """Whether the model made `logits` of the numbers by `transform`; 0-d, bool."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        expected, found = transformed(self.numbers.to(wide), transform), logits.detach().to(wide)
        allowed = self.tolerance(logits, TOLERANCE) * (expected.abs() + 0.1 * ANSWER)
        return ((found - expected).abs() <= allowed).all()

    def tolerance(self, logits: Tensor, table: dict[torch.dtype, float]) -> float:
        types = (self.hidden.dtype, self.numbers.dtype, self.autocast, logits.dtype)
        return max(table.get(x, 0.0) for x in types)

    def token_stats(
        self, labels: Tensor, transform: LogitTransform, options: HeadOptions, stats: tuple[str, ...]
    ) -> TokenStats:
        """Shaped like `labels`, under the autocast of the head, which may be inside of the model's forward."""
        if _writes(self.hidden) != self.version:
            raise NotImplementedError("a model that changes in place what it has given its lm_head")
        with autocast(self.hidden, self.autocast):
            return applied_head(self.head, self.hidden).token_stats(labels, transform, options, stats)


def _writes(hidden: Tensor) -> int | None:
    return None if torch.compiler.is_dynamo_compiling() or hidden.is_inference() else hidden._version


PLAIN = HeadCall(None)


class _State(threading.local):
    call: HeadCall | None = None


class _Traced:
    call: HeadCall | None = None


# Calls belong to threads. Dynamo cannot read a threading.local; what it traces writes to another place, which a graph
# leaves as it was: a graph that breaks inside `calling` leaves it to the interpreter.
_STATE, _TRACED = _State(), _Traced()


@torch._disable_dynamo  # torch.compiler.disable would import torch._dynamo with fastdpo
def _of_this_thread() -> HeadCall | None:
    return _STATE.call


def _current() -> HeadCall | None:
    if not torch.compiler.is_dynamo_compiling():
        return _STATE.call
    return _of_this_thread() if _TRACED.call is None else _TRACED.call


def calling(call: HeadCall, function, *args, **kwargs):
    """``function(*args, **kwargs)``, during which `call` is what this thread is doing."""
    state = _TRACED if torch.compiler.is_dynamo_compiling() else _STATE
    outer = state.call
    state.call = call
    try:
        return function(*args, **kwargs)
    finally:
        state.call = outer


class _Given:
    """A forward pre-hook of the lm_head, the last: FSDP's casts what the head is given."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        call = _current()
        if call is None or module is not call.head:  # PEFT may have put the one that was patched inside another
            return None
        if len(args) != 1 or kwargs:
            raise NotImplementedError(f"an lm_head called with more than hidden: {len(args)} arguments, {kwargs}")
        return (call.take(args[0]),), kwargs


class _Answered:
    """A forward hook of the lm_head, the first: what other hooks make of its logits is what the model makes of them."""

    def __call__(self, module: nn.Module, args: tuple, logits):
        call = _current()
        return None if call is None or module is not call.head else call.give(logits)


_PLACING = threading.Lock()
# A module's hooks, ours among them, and whether ours is the last
_PLACES = (("_forward_pre_hooks", _Given, True), ("_forward_hooks", _Answered, False))


def place_hooks(head: nn.Module) -> None:
    """Puts both hooks where they belong; in place for good, since registering one cannot be compiled."""
    before, after = list(head._forward_pre_hooks.values()), list(head._forward_hooks.values())
    if before and after and isinstance(before[-1], _Given) and isinstance(after[0], _Answered):
        return
    with _PLACING:
        for name, kind, last in _PLACES:
            hooks = getattr(head, name)
            key = next((key for key, hook in hooks.items() if isinstance(hook, kind)), None)
            if key is None and kind is _Given:
                key = head.register_forward_pre_hook(_Given(), with_kwargs=True).id
            elif key is None:
                key = head.register_forward_hook(_Answered()).id
            hooks.move_to_end(key, last=last)  # and never out: another thread may be running them


def other_hooks(head: nn.Module) -> list:
    return [hook for hook in head._forward_hooks.values() if not isinstance(hook, _Answered)]


def remove_hooks(model: nn.Module) -> None:
    for module in model.modules():  # PEFT's modules_to_save has copies
        for name, kind, _ in _PLACES:
            for key in [key for key, hook in getattr(module, name).items() if isinstance(hook, kind)]:
                del getattr(module, name)[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
