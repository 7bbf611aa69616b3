"""The head's forward and backward as functional torch.library operators: one node of a compiled graph each.

    fastdpo::linear_token_stats            one tensor per field of Forward
    fastdpo::linear_token_stats_backward   one tensor per field of Gradients, hidden's shaped like hidden

What was not asked for comes back with 0 elements. A call whose tensors hold their data reaches the engine without
the operators, so that a dispatch mode such as torch's FlopCounterMode sees the engine's own operations.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..autograd import NO_SECOND_DERIVATIVE, refuse_transforms, traced
from ..routing import Routing, num_blocks
from ..tensors import plain
from . import flops
from .engines import engine_for, engine_name
from .layout import contiguous, laid_out
from .problem import Forward, Gradients, Head, LogitTransform, LoRA, Needs, Rows, Upstream

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor labels"
_SAVED = "Tensor logps, Tensor lse, Tensor? entropy, Tensor? bitmap, Tensor? most_pairs"
# a negative tau: that gradient is not wanted; without a seed, and then without a bitmap, nothing is routed
_SCALARS = (
    "float lora_scale, float[] transform, int ignore_index, ScalarType compute_dtype, float tau_hidden, "
    "float tau_weight"
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
    saved = (saved.logps, saved.lse, saved.entropy, saved.bitmap, saved.most_pairs)
    flags = [getattr(needs, name) for name in _GRADIENTS]
    grads = token_stats_backward_op(*inputs, *saved, dlogps, dentropy, **scalars, needs=flags)
    return Gradients(*(grad if flag else None for grad, flag in zip(grads, flags)))


def token_stats(head: Head, rows: Rows, routing: Routing | None, stats: frozenset[str]) -> Forward:
    """The forward as one operator, with autograd; `logps` and `entropy` are differentiable."""
    inputs, scalars = _flatten(head, rows, routing)
    outputs = token_stats_op(*inputs, None if routing is None else routing.seed, **scalars, stats=sorted(stats))
    present = {"logps", "lse", *stats} | ({"bitmap", "most_pairs"} if routing is not None else set())
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
    if dentropy is not None:  # a block's share of the tail says nothing about the entropy's gradient
        routing = None
    logps, lse, entropy = map(contiguous, (saved.logps, saved.lse, saved.entropy))
    pairs = (None, None) if routing is None else map(contiguous, (saved.bitmap, saved.most_pairs))
    saved = Forward(logps, lse, entropy, None, None, None, *pairs)
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
    wanted = traced(*head.inputs, rows.labels) or (
        _get_current_dispatch_mode() is not None and engine_name(head.hidden.device, head.hidden.dtype) == "triton"
    )
    if wanted:
        flops.register()
    return wanted


def _flatten(head: Head, rows: Rows, routing: Routing | None) -> tuple[tuple, dict]:
    """The operators' first arguments: (tensors, scalars)."""
    tau_hidden, tau_weight = (-1.0, -1.0) if routing is None else (routing.tau_hidden, routing.tau_weight)
    scalars = {
        "lora_scale": 1.0 if head.lora is None else head.lora.scale,
        "transform": list(head.transform),
        "ignore_index": rows.ignore_index,
        "compute_dtype": head.compute_dtype,
        "tau_hidden": tau_hidden,
        "tau_weight": tau_weight,
    }
    return (*head.inputs, rows.labels), scalars


def _unflatten(
    hidden, weight, bias, lora_a, lora_b, labels, *,
    lora_scale, transform, ignore_index, compute_dtype, tau_hidden, tau_weight,
) -> tuple[Head, Rows, Routing]:  # fmt: skip
    lora = None if lora_a is None else LoRA(lora_a, lora_b, lora_scale)
    head = Head(hidden, weight, bias, lora, LogitTransform(*transform), compute_dtype)
    rows = Rows(labels, ignore_index, 0, weight.shape[0])
    return head, rows, Routing(tau_hidden, tau_weight)


def _dtypes(hidden: Tensor) -> dict[str, torch.dtype]:
    """Of each field of Forward."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return dict.fromkeys(_RESULTS, dtype) | {"is_top1": torch.bool, "bitmap": torch.uint8, "most_pairs": torch.int32}


@torch.library.custom_op(
    "fastdpo::linear_token_stats",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? seed, *, {_SCALARS}, str[] stats) -> ({', '.join(['Tensor'] * len(_RESULTS))})",
)
def token_stats_op(*inputs, stats, **scalars):
    refuse_transforms("fastdpo.linear_logps", *inputs)
    *inputs, seed = inputs
    head, rows, routing = _unflatten(*inputs, **scalars)
    result = _forward(head, rows, None if seed is None else replace(routing, seed=seed), frozenset(stats))
    outputs = {name: getattr(result, name) for name in _RESULTS}
    return tuple(
        head.hidden.new_empty(0, dtype=dtype) if outputs[name] is None else outputs[name]
        for name, dtype in _dtypes(head.hidden).items()
    )


@token_stats_op.register_fake
def _(hidden, weight, bias, lora_a, lora_b, labels, seed, *, stats, tau_hidden, tau_weight, **scalars):
    shapes = dict.fromkeys(("logps", "lse", *stats), labels.shape)
    if seed is not None:
        width = Routing(tau_hidden, tau_weight).bitmap_bytes(num_blocks(weight.shape[0]))
        shapes |= {"bitmap": (labels.shape[0], width), "most_pairs": labels.shape}
    return tuple(hidden.new_empty(shapes.get(name, (0,)), dtype=dtype) for name, dtype in _dtypes(hidden).items())


@torch.library.custom_op(
    "fastdpo::linear_token_stats_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SAVED}, Tensor? dlogps, Tensor? dentropy, *, {_SCALARS}, bool[] needs)"
    f" -> ({', '.join(['Tensor'] * 5)})",
)
def token_stats_backward_op(*tensors, needs, **scalars):
    refuse_transforms("fastdpo.linear_logps", *tensors)
    inputs, (logps, lse, entropy, bitmap, most_pairs, dlogps, dentropy) = tensors[:6], tensors[6:]
    head, rows, routing = _unflatten(*inputs, **scalars)
    saved = Forward(logps, lse, entropy=entropy, bitmap=bitmap, most_pairs=most_pairs)
    routing = None if bitmap is None else routing
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
        *inputs[:6],
        outputs["logps"],
        outputs["lse"],
        outputs["entropy"] if with_entropy else None,
        *(outputs[name] if routed else None for name in ("bitmap", "most_pairs")),
    )
    ctx.scalars = {name: x for name, x in keyword_only_inputs.items() if name != "stats"}
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
