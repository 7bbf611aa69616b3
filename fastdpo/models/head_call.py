"""One call of a model, seen from its lm_head.

hidden [..., T, H]      what the head is given, scored there and then: in a head's own forward its parameters are
                        gathered. The module itself runs on one position
answer [..., 1, V]      known numbers in place of its logits, so that what the model does to logits is measured in every
                        call and nothing seen before is trusted: a configuration, a hook or a forward that changed shows
handed [..., T]         the log-probs in place of the answer, to FSDP's and ZeRO-3's hooks, which hang the gathering
                        before the backward on what a module returns
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..head import LogitTransform
from ..ops.problem import IDENTITY, TokenStats
from .lm_head import AppliedHead, applied_head, autocast_type
from .wrappers import gathers, is_dtensor, local, origin, placed_like, scored_module

# The numbers, after the logits' scale, reach this far: smaller ones do not show a softcap of 30 (Gemma, xLSTM)
ANSWER = 60.0
# Largest disagreement with what the model makes of one number, relative to it, by type: a scale, a division, a tanh and
# a product are four roundings
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-7}


class HeadCall:
    """What one call gave its head, under which modes, and its `stats`: ``score(applied, transform)``, None without one.

    `head` None: a plain call, whose logits are its own.
    """

    def __init__(
        self,
        head: nn.Module | None,
        transform: LogitTransform = IDENTITY,
        score: Callable[[AppliedHead, LogitTransform], TokenStats] | None = None,
    ):
        self.head = head
        self.scored = None if head is None else scored_module(head)
        self.transform = transform  # the expected one
        self.score = score
        self.stats: TokenStats | None = None
        self.hidden: Tensor | None = None
        self.grad_mode = True
        self.autocast: torch.dtype | None = None
        self.numbers: Tensor | None = None  # [V], the answer at every position
        self.shape = torch.Size()  # [..., 1, V], the answer's
        self.part: Tensor | None = None  # [..., 1, V of this rank], of an answer that is a DTensor
        self.held = None  # the answer, while a wrapper has what it was handed

    def take(self, hidden: Tensor) -> Tensor:
        if self.hidden is not None:
            raise NotImplementedError("fastdpo=True with a model that calls its lm_head twice in one forward")
        self.hidden, self.grad_mode = hidden, torch.is_grad_enabled()
        self.autocast = autocast_type(hidden)
        if self.score is not None:
            with _outside_of_checkpoints():
                self.stats = self.score(applied_head(self.scored, hidden), self.transform)
        return hidden[..., :1, :]

    def give(self, logits: Tensor) -> Tensor:
        # An odd factor runs through all residues, neighbours far apart: a mask, a bias per id and a permutation show
        steps = (torch.arange(logits.shape[-1], device=logits.device) * 40503 + 32768) % 65536 - 32768
        reach = min(ANSWER / self.transform.scale, 3e4)  # fp16 ends at 65504
        self.numbers, self.shape = (steps * (reach / 32768)).to(logits.dtype), logits.shape
        answer = placed_like(logits, self.numbers.expand(self.shape).clone())  # models change their logits in place
        self.part = local(answer).clone() if is_dtensor(answer) else None
        return answer

    def hand(self, answer) -> tuple[Tensor, ...]:
        """What takes gradients, none of it a view, which could be written to past the hooks."""
        self.held = answer
        self.stats = self.stats and TokenStats(*(x.clone() if _takes_gradient(x) else x for x in self.stats))
        return tuple(filter(_takes_gradient, self.stats or ()))

    def take_back(self, returned: tuple[Tensor, ...]):
        """The answer, and the log-probs that hang on the hooks: ZeRO-3's are in what it has returned, FSDP's in what it
        was handed, which its output_dtype would round."""
        new = iter(returned)
        for name, old in zip(TokenStats._fields, self.stats or ()):
            back = next(new) if _takes_gradient(old) else old
            if back is not old and back.dtype == old.dtype:
                self.stats = self.stats._replace(**{name: back})
        answer, self.held = self.held, None
        return answer

    def shows(self, logits: Tensor, transform: LogitTransform) -> Tensor:
        """Whether the model made `logits` of the numbers by `transform`; 0-d, bool."""
        numbers = self.numbers if logits.shape == self.shape else self.part
        if is_dtensor(logits):
            numbers, logits = local(placed_like(logits, self.numbers.expand(self.shape))), local(logits)
        wide = torch.promote_types(logits.dtype, torch.float32)
        expected, found = transform.applied(numbers.to(wide)), logits.detach().to(wide)
        allowed = self.tolerance(logits, TOLERANCE) * (expected.abs() + 0.1 * ANSWER)
        return ((found - expected).abs() <= allowed).all()

    def tolerance(self, logits: Tensor, table: dict[torch.dtype, float]) -> float:
        types = (self.hidden.dtype, self.numbers.dtype, self.autocast, logits.dtype)
        return max(table.get(x, 0.0) for x in types)


def _takes_gradient(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def _outside_of_checkpoints():
    """A checkpoint around the head would run it again for what scoring has saved, and not in a call: it is kept."""
    if torch.compiler.is_dynamo_compiling():
        return nullcontext()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or not origin(hooks[0]).startswith("torch.utils.checkpoint."):
        return nullcontext()

    def kept(saved: tuple[Tensor, int]) -> Tensor:
        x, version = saved
        if x._version != version:
            raise RuntimeError("one of the tensors that the lm_head's log-probs need has been changed in place")
        return x

    return saved_tensors_hooks(lambda x: (x, x._version), kept)


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
    try:
        state.call = call
        return function(*args, **kwargs)
    finally:
        state.call = outer


class _Hook:
    def __call__(self, module: nn.Module, args: tuple, output):
        call = _current()
        if call is None or (module is not call.scored and module is not call.head):
            return None  # PEFT may have put the one that was patched inside another
        return self.of(call, output)


class _Given:
    """A forward pre-hook of the lm_head, the last: FSDP's gathers, and casts what the head is given."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        call = _current()
        if call is None or module is not call.scored:
            return None
        if len(args) != 1 or kwargs:
            raise NotImplementedError(f"an lm_head called with more than hidden: {len(args)} arguments, {kwargs}")
        return (call.take(args[0]),), kwargs


class _Answered(_Hook):
    """The first of the forward hooks: what others make of its logits is what the model makes of them."""

    def of(self, call: HeadCall, output):
        return call.give(output)


class _Handed(_Hook):
    """Before the hooks of wrappers."""

    def of(self, call: HeadCall, output):
        return call.hand(output)


class _TakenBack(_Hook):
    """After the hooks of wrappers."""

    def of(self, call: HeadCall, output):
        return call.take_back(output)


_PLACING = threading.Lock()
_KINDS = (_Given, _Answered, _Handed, _TakenBack)


def place_hooks(head: nn.Module) -> None:
    """Puts hooks where they belong; in place for good, since registering one cannot be compiled."""
    scored = scored_module(head)
    _put(scored, "_forward_pre_hooks", [*_others(scored._forward_pre_hooks), _Given])
    after = _others(scored._forward_hooks)
    if scored is not head:  # inside of FSDP1's
        _put(scored, "_forward_hooks", [_Answered, *after, _Handed])
        _put(head, "_forward_hooks", [_TakenBack, *_others(head._forward_hooks)])
        return
    wrappers = [i for i, hook in enumerate(after) if gathers(hook)]
    if wrappers:
        first, end = wrappers[0], wrappers[-1] + 1
        after = [*after[:first], _Handed, *after[first:end], _TakenBack, *after[end:]]
    _put(scored, "_forward_hooks", [_Answered, *after])


def _others(hooks: dict) -> list:
    return [hook for hook in hooks.values() if not isinstance(hook, _KINDS)]


def _put(module: nn.Module, name: str, order: list) -> None:
    """Hooks in this order, kinds of ours among them."""
    hooks = getattr(module, name)
    now = [type(hook) if isinstance(hook, _KINDS) else hook for hook in hooks.values()]
    if len(now) == len(order) and all(a is b for a, b in zip(now, order)):
        return
    with _PLACING:
        keys = {type(hook): key for key, hook in hooks.items() if isinstance(hook, _KINDS)}
        for hook in order:
            key = keys.get(hook) if hook in _KINDS else next(key for key, x in hooks.items() if x is hook)
            if key is None and hook is _Given:
                key = module.register_forward_pre_hook(_Given(), with_kwargs=True).id
            elif key is None:
                key = module.register_forward_hook(hook()).id
            hooks.move_to_end(key)  # and never out: another thread may be running them


def other_hooks(head: nn.Module) -> list:
    """Neither ours nor a wrapper's."""
    modules = dict.fromkeys((head, scored_module(head)))
    return [hook for module in modules for hook in _others(module._forward_hooks) if not gathers(hook)]


def remove_hooks(model: nn.Module) -> None:
    for module in model.modules():  # PEFT's modules_to_save has copies
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _KINDS)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
