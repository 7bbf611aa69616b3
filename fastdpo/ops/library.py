"""The head's forward and backward as functional torch.library operators: one node of a compiled graph each.

    fastdpo::linear_token_stats            one tensor per field of Forward
    fastdpo::linear_token_stats_backward   one tensor per field of Gradients, hidden's shaped like hidden

What was not asked for comes back with 0 elements. A call whose tensors hold their data reaches the engine without
the operators, so that a dispatch mode such as torch's FlopCounterMode sees the engine's own operations.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..autograd import NO_SECOND_DERIVATIVE, traced
from ..routing import Routing, bitmap_bytes, num_blocks
from ..tensors import plain
from . import engine_for, engine_name, flops
from .layout import contiguous, laid_out
from .problem import Forward, Gradients, Head, Needs, Rows, Upstream

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor labels, Tensor? seed"
_SAVED = "Tensor logps, Tensor lse, Tensor? entropy, Tensor? bitmap"
# a negative tau: that gradient is not wanted; without a seed nothing is routed
_SCALARS = (
    "float lora_scale, float logit_scale, float softcap, float temperature, int ignore_index, "
    "ScalarType compute_dtype, float tau_hidden, float tau_weight"
)
_RESULTS = tuple(field.name for field in fields(Forward))
_GRADIENTS = tuple(field.name for field in fields(Gradients))


def forward(head: Head, rows: Rows, *, stats: frozenset[str], routing: Routing | None, shards=None) -> Forward:
    """The engine's forward, without autograd; `shards` when `weight` is one of several."""
    if _as_operator(head, rows):
        return token_stats(head, rows, routing, stats)
    return _forward(head, rows, routing, stats, shards)


def backward(
    head: Head,
    rows: Rows,
    saved: Forward,
    dlogps: Tensor | None,  # [M]
    dentropy: Tensor | None,  # [M]; one of them at least
    routing: Routing | None,
    needs: Needs,
) -> Gradients:
    """The engine's backward; the gradient of hidden is shaped like hidden."""
    if not _as_operator(head, rows):
        return _backward(head, rows, saved, dlogps, dentropy, routing, needs)
    inputs, scalars = _flatten(head, rows, routing)
    saved = (saved.logps, saved.lse, saved.entropy, saved.bitmap)
    flags = [getattr(needs, name) for name in _GRADIENTS]
    grads = token_stats_backward_op(*inputs, *saved, dlogps, dentropy, **scalars, needs=flags)
    return Gradients(*(grad if flag else None for grad, flag in zip(grads, flags)))


def token_stats(head: Head, rows: Rows, routing: Routing | None, stats: frozenset[str]) -> Forward:
    """The forward as one operator, with autograd; `logps` and `entropy` are differentiable."""
    inputs, scalars = _flatten(head, rows, routing)
    # An argument, so that a graph which torch.compile has stored fits whichever engine and version meets it.
    width = 0 if routing is None else bitmap_bytes(rows.labels.shape[0], num_blocks(head.weight.shape[0]), routing)
    outputs = token_stats_op(*inputs, **scalars, stats=sorted(stats), bitmap_bytes=width)
    present = {"logps", "lse", *stats} | ({"bitmap"} if routing is not None else set())
    return Forward(*(x if name in present else None for name, x in zip(_RESULTS, outputs)))


def _forward(head: Head, rows: Rows, routing: Routing | None, stats: frozenset[str], shards=None) -> Forward:
    engine = engine_for(head.hidden.device, head.hidden.dtype)
    head, rows = laid_out(head, rows)
    with torch.autocast(head.hidden.device.type, enabled=False):  # compute_dtype says it; the sums stay fp32
        return engine.forward(head, rows, stats=stats, routing=routing, shards=shards)


def _backward(
    head: Head,
    rows: Rows,
    saved: Forward,
    dlogps: Tensor | None,
    dentropy: Tensor | None,
    routing: Routing | None,
    needs: Needs,
) -> Gradients:
    def of_rows(upstream: Tensor | None) -> Tensor | None:
        return None if upstream is None else contiguous(plain("an upstream gradient", upstream).to(saved.logps.dtype))

    head, rows = laid_out(head, rows)
    upstream = Upstream(torch.zeros_like(saved.logps) if dlogps is None else of_rows(dlogps), of_rows(dentropy))
    if dentropy is not None:  # blocks are kept by their mass, which says nothing about the entropy's gradient
        routing = None
    logps, lse, entropy, bitmap = map(contiguous, (saved.logps, saved.lse, saved.entropy, saved.bitmap))
    saved = Forward(logps, lse, entropy=entropy, bitmap=None if routing is None else bitmap)
    engine = engine_for(head.hidden.device, head.hidden.dtype)
    with torch.autocast(head.hidden.device.type, enabled=False):
        grads = engine.backward(head, rows, saved, upstream, routing, needs)
    if grads.hidden is not None:
        grads.hidden = grads.hidden.view(head.hidden.shape)
    return grads


def _as_operator(head: Head, rows: Rows) -> bool:
    """Whether a call has to be one operator: where it is only traced, or where a dispatch mode is on that could not
    see into Triton's kernels; but never with a shard of the vocabulary, which talks to other processes."""
    if rows.vocab_size != head.weight.shape[0]:
        return False
    wanted = traced(head.hidden, head.weight, head.bias, head.lora_a, head.lora_b, rows.labels) or (
        _get_current_dispatch_mode() is not None and engine_name(head.hidden.device, head.hidden.dtype) == "triton"
    )
    if wanted:
        flops.register()
    return wanted


def _flatten(head: Head, rows: Rows, routing: Routing | None) -> tuple[tuple, dict]:
    """The operators' first arguments: (tensors, scalars)."""
    seed, tau_hidden, tau_weight = None, -1.0, -1.0
    if routing is not None:
        seed, tau_hidden, tau_weight = routing.seed, routing.tau_hidden, routing.tau_weight
    scalars = {
        "lora_scale": float(head.lora_scale),
        "logit_scale": float(head.logit_scale),
        "softcap": float(head.softcap),
        "temperature": float(head.temperature),
        "ignore_index": rows.ignore_index,
        "compute_dtype": head.compute_dtype,
        "tau_hidden": tau_hidden,
        "tau_weight": tau_weight,
    }
    return (head.hidden, head.weight, head.bias, head.lora_a, head.lora_b, rows.labels, seed), scalars


def _unflatten(
    hidden, weight, bias, lora_a, lora_b, labels, seed, *, ignore_index, tau_hidden, tau_weight, **scalars
) -> tuple[Head, Rows, Routing | None]:
    head = Head(hidden, weight, bias, lora_a, lora_b, **scalars)
    rows = Rows(labels, ignore_index, 0, weight.shape[0])
    return head, rows, None if seed is None else Routing(tau_hidden, tau_weight, seed)


def _dtypes(hidden: Tensor) -> dict[str, torch.dtype]:
    """Of each field of Forward."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return dict.fromkeys(_RESULTS, dtype) | {"is_top1": torch.bool, "bitmap": torch.uint8}


@torch.library.custom_op(
    "fastdpo::linear_token_stats",
    mutates_args=(),
    schema=f"({_INPUTS}, *, {_SCALARS}, str[] stats, SymInt bitmap_bytes) -> ({', '.join(['Tensor'] * 7)})",
)
def token_stats_op(*inputs, stats, bitmap_bytes, **scalars):
    head, rows, routing = _unflatten(*inputs, **scalars)
    result = _forward(head, rows, routing, frozenset(stats))
    outputs = {name: getattr(result, name) for name in _RESULTS}
    if routing is not None and result.bitmap.shape[1] < bitmap_bytes:  # an engine that keeps one set of pairs
        outputs["bitmap"] = pad(result.bitmap, (0, bitmap_bytes - result.bitmap.shape[1]))
    return tuple(
        head.hidden.new_empty(0, dtype=dtype) if outputs[name] is None else outputs[name]
        for name, dtype in _dtypes(head.hidden).items()
    )


@token_stats_op.register_fake
def _(hidden, weight, bias, lora_a, lora_b, labels, seed, *, stats, bitmap_bytes, **scalars):
    shapes = dict.fromkeys(("logps", "lse", *stats), labels.shape)
    if seed is not None:
        shapes["bitmap"] = (labels.shape[0], bitmap_bytes)
    return tuple(hidden.new_empty(shapes.get(name, (0,)), dtype=dtype) for name, dtype in _dtypes(hidden).items())


@torch.library.custom_op(
    "fastdpo::linear_token_stats_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SAVED}, Tensor? dlogps, Tensor? dentropy, *, {_SCALARS}, bool[] needs)"
    f" -> ({', '.join(['Tensor'] * 5)})",
)
def token_stats_backward_op(*tensors, needs, **scalars):
    inputs, (logps, lse, entropy, bitmap, dlogps, dentropy) = tensors[:7], tensors[7:]
    head, rows, routing = _unflatten(*inputs, **scalars)
    saved = Forward(logps, lse, entropy=entropy, bitmap=bitmap)
    grads = _backward(head, rows, saved, dlogps, dentropy, routing, Needs(*needs))
    return tuple(
        head.hidden.new_empty(0, dtype=_gradient_dtype(like, head.hidden)) if grad is None else grad
        for grad, like in zip((getattr(grads, name) for name in _GRADIENTS), inputs)
    )


@token_stats_backward_op.register_fake
def _(*tensors, needs, **scalars):
    hidden = tensors[0]
    return tuple(
        hidden.new_empty(like.shape if need else (0,), dtype=_gradient_dtype(like, hidden))
        for like, need in zip(tensors, needs)
    )


def _gradient_dtype(like: Tensor | None, hidden: Tensor) -> torch.dtype:
    return hidden.dtype if like is None else like.dtype


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    outputs = dict(zip(_RESULTS, output))
    routed, with_entropy = inputs[6] is not None, "entropy" in keyword_only_inputs["stats"]
    ctx.set_materialize_grads(False)  # entropy without an upstream gradient keeps the backward routed
    ctx.save_for_backward(
        *inputs,
        outputs["logps"],
        outputs["lse"],
        outputs["entropy"] if with_entropy else None,
        outputs["bitmap"] if routed else None,
    )
    ctx.scalars = {name: x for name, x in keyword_only_inputs.items() if name not in ("stats", "bitmap_bytes")}
    differentiable = ("logps", "entropy") if with_entropy else ("logps",)
    ctx.mark_non_differentiable(*(x for name, x in outputs.items() if name not in differentiable))


def _autograd_backward(ctx, dlogps, dlse, dentropy, *_):
    needs = list(ctx.needs_input_grad[:5])
    if dlogps is None and dentropy is None:
        return (None,) * 7
    grads = token_stats_backward_op(*ctx.saved_tensors, dlogps, dentropy, **ctx.scalars, needs=needs)
    return (*(grad if need else None for grad, need in zip(grads, needs)), None, None)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(NO_SECOND_DERIVATIVE)


token_stats_op.register_autograd(_autograd_backward, setup_context=_setup_context)
token_stats_backward_op.register_autograd(_no_second_derivative)
