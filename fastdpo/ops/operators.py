"""The head's forward and backward with autograd around them, twice: as an autograd Function, and as functional
torch.library operators, each one node of a compiled graph.

    fastdpo::linear_token_stats            one tensor per field of Forward
    fastdpo::linear_token_stats_backward   one tensor per field of Gradients, hidden's shaped like hidden

Neither can stand for the other. torch.compile cannot look into the engines' loops, so that a Function breaks its graph;
an operator takes no process group, hides the engine's own operations from dispatch modes such as FlopCounterMode, and
costs half as much time again: 345 us against 238, forward of 8 tokens on a Xeon, November 2026. What was not asked for
comes back from an operator with 0 elements.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .._ops import add_op_namespace_prefix
from ..accumulate import destination, nothing_left
from ..autograd import Function, no_second_derivative, once_differentiable, uncompiled
from ..distributed import handshake
from ..distributed.handshake import Agreed
from ..head import CheckedHead, HeadOptions, LogitTransform, LoRA, Routing, check_head, compute_dtype
from ..routing import num_blocks, set_bytes
from ..tensors import contiguous, in_rows, plain, refuse_transforms, traced
from ..validation import check_flag, check_names
from . import flops, several
from .agreement import agree
from .engines import engine_of
from .problem import FOLDED, STAT_DTYPES, STATS, Forward, Gradients, Head, Needs, Rows, TokenStats, Upstream


class LinearLogpsFunction(Function):
    """Autograd for `linear_token_stats`: ``apply(hidden [..., H], weight, bias, lora_a, lora_b, labels [...],
    HeadOptions, stats, differentiable, lora_scale)`` returns the tensors of TokenStats, flat, None where not asked for.
    `differentiable`: whether a gradient of them may be wanted. It checks what `linear_token_stats` checks.

    Saved besides the inputs, per row: logp, lse and, routed, one bit per block; of several labels, their logits too.
    """

    of = "fastdpo.linear_logps"

    @classmethod
    def apply(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None,
        labels: Tensor, options: HeadOptions, stats: tuple[str, ...], differentiable: bool, lora_scale: float = 1.0,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        if not isinstance(options, HeadOptions):
            raise TypeError(f"options must be HeadOptions; got {options!r}")
        arguments = (hidden, weight, bias, lora_a, lora_b, labels, options, stats, differentiable, lora_scale)
        run = cls._checked
        return uncompiled(run, *arguments) if torch.compiler.is_compiling() else run(*arguments)

    @classmethod
    def _checked(cls, hidden, weight, bias, lora_a, lora_b, labels, options, stats, differentiable, lora_scale):
        with handshake.announcing(options.vocab_group, hidden):
            stats, differentiable = check_names("stats", stats, STATS), check_flag("differentiable", differentiable)
            lora = None if lora_a is None and lora_b is None else (lora_a, lora_b, lora_scale)
            call = check_head(hidden, weight, labels, bias, lora, options)
        agreed = agree(call, options, stats, differentiable)
        return super().apply(*call.tensors, options, stats, differentiable, call.lora_scale, agreed)

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, lora_a, lora_b, labels, options, stats, differentiable, lora_scale=1.0, agreed=None
    ):
        ctx.set_materialize_grads(False)
        shards = None if agreed is None else agreed.shards
        needs = Needs(*ctx.needs_input_grad[:5]) if differentiable else Needs()
        tensors = (hidden, weight, bias, lora_a, lora_b, labels)
        key = options.key(hidden.device) if agreed is None else agreed.key
        key, scalars = prepare(options, needs, key, hidden, weight, lora_scale)
        if shards is not None:
            result = sharded_forward(tensors, key, scalars, stats, agreed)
        else:
            run = _forward_operator if _is_operator(tensors) else _forward
            result = run(tensors, key, scalars, stats)
        if True in needs:
            # copies: the caller may change in place what is returned
            logps, entropy = result.logps.clone(), None if result.entropy is None else result.entropy.clone()
            lse = result.lse.clone() if "lse" in stats else result.lse
            # ctx keeps tensors only through save_for_backward, which watches for in-place changes and cycles
            ctx.save_for_backward(*tensors, logps, lse, entropy, result.bitmap, result.most_pairs, result.selected)
            ctx.needs, ctx.scalars, ctx.shards, ctx.weight_shape = needs, scalars, shards, weight.shape
            ctx.accumulate_into = options.accumulate_into
        outputs = outputs_of(result, stats)
        ctx.mark_non_differentiable(*constants(outputs))  # a second call would undo a first
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        upstream = Upstreams.of(upstream)
        if upstream.first is None:
            return (None,) * 11
        shards = ctx.shards
        with handshake.announcing(None if shards is None else shards.group, upstream.first, "the backward"):
            saved = ctx.saved_tensors
            if saved[1].shape != ctx.weight_shape:  # its storage was released, as by ZeRO-3 after a gather
                raise RuntimeError(
                    f"weight had shape {tuple(ctx.weight_shape)} in the forward and has {tuple(saved[1].shape)} in "
                    "the backward: keep a sharded head gathered until the backward is done"
                )
            if shards is not None:
                upstream = Upstreams(*_plain(_UPSTREAM, upstream))
            place = destination(ctx, saved[1]) if ctx.needs.weight else None
        sums = Gradients(weight=place)
        if shards is not None:
            hidden, lora_a = saved[0], saved[3]
            if ctx.needs.hidden:
                sums.hidden = Gradients.place((saved[6].shape[0], hidden.shape[-1]), hidden)
            if ctx.needs.lora_a:
                sums.lora_a = Gradients.place(lora_a.shape, lora_a)
            upstream = Upstreams(*handshake.agree_upstream(shards, *upstream))
            with handshake.telling(shards.group):
                grads = backward(saved, upstream, ctx.scalars, ctx.needs, shards, sums)
                if grads.hidden is not None:
                    grads.hidden = shards.sum_of_rows(grads.hidden, hidden.dtype)
                if grads.lora_a is not None:
                    grads.lora_a = shards.sum(grads.lora_a).to(lora_a.dtype)
        else:
            run = _backward_operator if _is_operator(saved[:6]) else backward
            grads = run(saved, upstream, ctx.scalars, ctx.needs, sums=sums)
        if place is not None:
            grads.weight = nothing_left(ctx.accumulate_into, saved[1])
        return grads.hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b, *(None,) * 6


def sharded_forward(tensors, key: Tensor | None, scalars: Scalars, stats, agreed: Agreed) -> Forward:
    with handshake.telling(agreed.shards.group):
        result = _forward(tensors, key, scalars, stats, agreed.shards)
    return poisoned(result, agreed.poison)


def poisoned(result, poison: Tensor | None):
    """A forward's results, NaN where ranks were found to differ without a wait."""
    if poison is None:
        return result
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    wrong = {name: x + poison for name, x in values.items() if x is not None and x.is_floating_point()}
    return replace(result, **wrong)


def compiled(call: CheckedHead, options: HeadOptions, stats: tuple[str, ...], differentiable: bool) -> tuple:
    """What `LinearLogpsFunction` returns, by one operator of a compiled graph."""
    inputs = call.tensors[:5]
    needs = Needs(*[differentiable and x is not None and x.requires_grad for x in inputs])
    key, scalars = prepare(options, needs, options.key(inputs[0].device), *inputs[:2], call.lora_scale)
    result = _forward_operator(call.tensors, key, scalars, stats)
    return outputs_of(result, stats)


def outputs_of(result: Forward, stats) -> tuple[Tensor | None, ...]:
    """The fields of TokenStats; None where not asked for, as engines have it of all but lse."""
    return tuple(None if name == "lse" and name not in stats else getattr(result, name) for name in TokenStats._fields)


def constants(outputs: tuple[Tensor | None, ...]) -> list[Tensor]:
    """Those without a gradient."""
    return [x for name, x in zip(TokenStats._fields, outputs) if x is not None and name not in Upstreams._fields]


class Upstreams(NamedTuple):
    """The gradients that arrive, of what has one."""

    logps: Tensor | None
    entropy: Tensor | None
    lse: Tensor | None

    @staticmethod
    def of(outputs: tuple[Tensor | None, ...]) -> Upstreams:
        """Of one for each field of TokenStats."""
        return Upstreams(*[outputs[TokenStats._fields.index(name)] for name in Upstreams._fields])

    @property
    def first(self) -> Tensor | None:
        """Any of them."""
        return next((x for x in self if x is not None), None)


class Scalars(NamedTuple):
    """What of a call is not a tensor, as the operators take it."""

    lora_scale: float
    transform: LogitTransform
    ignore_index: int
    compute_dtype: torch.dtype
    taus: tuple[float, ...]  # and the sets: of Routing. Empty: every pair is computed
    hidden_set: int
    weight_set: int


def prepare(
    options: HeadOptions, needs: Needs, key: Tensor | None, hidden: Tensor, weight: Tensor, lora_scale: float
) -> tuple[Tensor | None, Scalars]:
    """(the draws' key, None where nothing is drawn; scalars). Routed where a gradient is needed, unless the options say
    otherwise."""
    routing = options.routing(needs.hidden or needs.lora_a, needs.weight or needs.bias or needs.lora_b)
    dtype = compute_dtype(hidden, weight)
    sets = routing.taus, routing.hidden_set, routing.weight_set  # torch 2.6 cannot trace a slice of a NamedTuple
    return key if routing.taus else None, Scalars(lora_scale, options.transform, options.ignore_index, dtype, *sets)


def _is_operator(tensors) -> bool:
    """Whether a call has to be one operator: where it is only traced, or where a dispatch mode is on that could not
    see into kernels; but never with a shard of the vocabulary, which talks to other processes."""
    seen = _get_current_dispatch_mode() is not None
    wanted = traced(*tensors) or (seen and engine_of(tensors[0]).name != "reference")
    if wanted:
        flops.register()
    return wanted


def _problem(tensors, key: Tensor | None, scalars: Scalars, shards=None) -> tuple[Head, Rows, Routing | None]:
    """What an engine takes, laid out as problem.py says."""
    hidden, weight, bias, lora_a, lora_b, labels = tensors
    lora = None if lora_a is None else LoRA(contiguous(lora_a), contiguous(lora_b), scalars.lora_scale)
    bias = None if bias is None else contiguous(bias)
    transform = LogitTransform(*scalars.transform)
    head = Head(in_rows(hidden), in_rows(weight, apart=True), bias, lora, transform, scalars.compute_dtype)
    vocabulary = (0, weight.shape[0]) if shards is None else (shards.vocab_start, shards.vocab_size)
    rows = Rows(contiguous(labels), scalars.ignore_index, *vocabulary)
    routing = Routing(scalars.taus, scalars.hidden_set, scalars.weight_set, key) if scalars.taus else None
    return head, rows, routing


def _forward(tensors, key: Tensor | None, scalars: Scalars, stats, shards=None) -> Forward:
    engine = engine_of(tensors[0])
    head, rows, routing = _problem(tensors, key, scalars, shards)
    shards = None if shards is None or shards.size == 1 else shards
    run = engine.forward if rows.labels.ndim == 1 else partial(several.forward, engine)
    with torch.autocast(head.hidden.device.type, enabled=False):  # compute_dtype says it; the sums stay fp32
        return run(head, rows, stats=frozenset(stats) & _FOLDED, routing=routing, shards=shards)


def backward(
    saved, upstream: Upstreams, scalars: Scalars, needs: Needs, shards=None, sums: Gradients | None = None
) -> Gradients:
    """`saved`: the inputs, and what the backward reads of the results; one of the upstream gradients at least. `sums`:
    of earlier calls, to which the head's gradients are added; it is the caller's no more."""
    # hooks on saved tensors, and callers of the operator, may give back another layout
    results = [x if x is None or x.is_contiguous() else contiguous(x) for x in saved[6:]]
    logps, lse, entropy, bitmap, most_pairs, selected = results
    tensors, (dlogps, dentropy, dlse) = _plain(_NAMES, saved[:6]), _plain(_UPSTREAM, upstream)
    engine = engine_of(tensors[0])
    head, rows, routing = _problem(tensors, None, scalars, shards)
    coef = torch.zeros_like(logps) if dlogps is None else contiguous(dlogps.to(logps.dtype))
    coef_entropy, coef_lse = (None if x is None else contiguous(x.to(logps.dtype)) for x in (dentropy, dlse))
    if bitmap is None or dentropy is not None:  # a block's share of the tail says nothing about the entropy's gradient
        routing = bitmap = most_pairs = None
    saved = Forward(logps, lse, entropy, bitmap=bitmap, most_pairs=most_pairs, selected=selected)
    run = engine.backward if rows.labels.ndim == 1 else partial(several.backward, engine)
    with torch.autocast(head.hidden.device.type, enabled=False):
        grads = run(head, rows, saved, Upstream(coef, coef_entropy, coef_lse), routing, needs, sums)
    if grads.hidden is not None:
        grads.hidden = grads.hidden.view(head.hidden.shape)
    return grads


_NAMES = ("hidden", "weight", "bias", "lora A", "lora B", "labels")
_UPSTREAM = ("an upstream gradient",) * 3
_FOLDED = frozenset(FOLDED)


def _plain(names: tuple[str, ...], tensors) -> list[Tensor | None]:
    """What an operator was given, or a backward after others had the tensors: a storage may have been released."""
    checked = []
    for name, x in zip(names, tensors):
        checked.append(None if x is None else plain(name, x))
    return checked


# The operators

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor labels"
_SAVED = "Tensor logps, Tensor lse, Tensor? entropy, Tensor? bitmap, Tensor? most_pairs, Tensor? selected"
# without a key, and then without a bitmap, nothing is routed
_SCALARS = (
    "float lora_scale, float[] transform, int ignore_index, ScalarType compute_dtype, float[] taus, int hidden_set, "
    "int weight_set"
)
_RESULTS = tuple(field.name for field in fields(Forward))


def _forward_operator(tensors, key: Tensor | None, scalars: Scalars, stats) -> Forward:
    # torch 2.6 cannot trace _asdict
    outputs = token_stats_op(*tensors, key, **dict(zip(Scalars._fields, scalars)), stats=sorted(stats))
    present = {"logps", "lse", *stats} | ({"bitmap", "most_pairs"} if key is not None else set())
    present |= {"selected"} if tensors[5].ndim == 2 else set()
    return Forward(*[x if name in present else None for name, x in zip(_RESULTS, outputs)])


def _backward_operator(saved, upstream: Upstreams, scalars: Scalars, needs: Needs, sums=None) -> Gradients:
    grads = token_stats_backward_op(*saved, *upstream, **dict(zip(Scalars._fields, scalars)), needs=list(needs))
    return Gradients(*[grad if need else None for grad, need in zip(grads, needs)]).added_to(sums)


def _check(tensors, scalars: Scalars) -> None:
    """As the door does, of an operator's tensors: whoever calls one comes by no other."""
    hidden, weight, bias, lora_a, lora_b, labels = tensors
    if labels.ndim not in (1, 2) or labels.shape[0] != math.prod(hidden.shape[:-1]):
        raise ValueError(f"labels must be the flat rows of hidden {tuple(hidden.shape)}; got {tuple(labels.shape)}")
    lora = None if lora_a is None and lora_b is None else (lora_a, lora_b, scalars.lora_scale)
    check_head(hidden, weight, labels.reshape(*hidden.shape[:-1], *labels.shape[1:]), bias, lora, HeadOptions())


def _dtypes(hidden: Tensor) -> dict[str, torch.dtype]:
    """Of each field of Forward."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtypes = {name: torch.bool if STAT_DTYPES[name] == torch.bool else dtype for name in FOLDED}
    pairs = {"bitmap": torch.uint8, "most_pairs": torch.int32}
    return {"logps": dtype, "lse": dtype, **dtypes, **pairs, "selected": dtype}


@torch.library.custom_op(
    add_op_namespace_prefix("linear_token_stats"),
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? key, *, {_SCALARS}, str[] stats) -> ({', '.join(['Tensor'] * len(_RESULTS))})",
)
def token_stats_op(*tensors, stats, **scalars):
    refuse_transforms("fastdpo.linear_logps", *tensors)
    key, scalars = tensors[6], Scalars(**scalars)
    _check(tensors[:6], scalars)
    if key is None:
        scalars = scalars._replace(taus=())
    result = _forward(_plain(_NAMES, tensors), key, scalars, stats)
    made = [(getattr(result, name), dtype) for name, dtype in _dtypes(tensors[0]).items()]
    return tuple(tensors[0].new_empty(0, dtype=dtype) if x is None else x for x, dtype in made)


@token_stats_op.register_fake
def _(hidden, weight, bias, lora_a, lora_b, labels, key, *, stats, taus, **scalars):
    rows = labels.shape[:1]
    shapes = dict.fromkeys(("logps", "lse", *stats), rows)
    if key is not None:
        bitmap = (*rows, len(taus) * set_bytes(num_blocks(weight.shape[0])))
        shapes |= {"bitmap": bitmap, "most_pairs": rows}
    if labels.ndim == 2:
        of_labels = ("logps", "selected", *(name for name in stats if name == "is_top1"))
        shapes |= dict.fromkeys(of_labels, labels.shape)
    return tuple(hidden.new_empty(shapes.get(name, (0,)), dtype=dtype) for name, dtype in _dtypes(hidden).items())


@torch.library.custom_op(
    add_op_namespace_prefix("linear_token_stats_backward"),
    mutates_args=(),
    schema=f"({_INPUTS}, {_SAVED}, Tensor? dlogps, Tensor? dentropy, Tensor? dlse, *, {_SCALARS}, bool[] needs)"
    f" -> ({', '.join(['Tensor'] * 5)})",
)
def token_stats_backward_op(*tensors, needs, **scalars):
    refuse_transforms("fastdpo.linear_logps", *tensors)
    _check(tensors[:6], Scalars(**scalars))
    grads = backward(tensors[:12], Upstreams(*tensors[12:]), Scalars(**scalars), Needs(*needs))
    made = zip((grads.hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b), tensors)
    return tuple(_absent(like, tensors[0]) if grad is None else grad for grad, like in made)


@token_stats_backward_op.register_fake
def _(*tensors, needs, **scalars):
    hidden = tensors[0]
    return tuple(x.new_empty(x.shape) if need else _absent(x, hidden) for x, need in zip(tensors, needs))


def _absent(like: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden.new_empty(0, dtype=hidden.dtype if like is None else like.dtype)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    outputs = dict(zip(_RESULTS, output))
    routed, stats, several_labels = inputs[6] is not None, keyword_only_inputs["stats"], inputs[5].ndim == 2
    ctx.set_materialize_grads(False)  # entropy without an upstream gradient keeps the backward routed
    ctx.save_for_backward(
        *inputs[:6],
        outputs["logps"],
        outputs["lse"],
        outputs["entropy"] if "entropy" in stats else None,
        *(outputs[name] if routed else None for name in ("bitmap", "most_pairs")),
        outputs["selected"] if several_labels else None,
    )
    ctx.scalars = {name: x for name, x in keyword_only_inputs.items() if name != "stats"}
    differentiable = {"logps", *stats} & set(Upstreams._fields)
    ctx.mark_non_differentiable(*(x for name, x in outputs.items() if name not in differentiable))


def _autograd_backward(ctx, dlogps, dlse, dentropy, *_):
    needs = list(ctx.needs_input_grad[:5])
    if dlogps is None and dentropy is None and dlse is None:
        return (None,) * 7
    grads = token_stats_backward_op(*ctx.saved_tensors, dlogps, dentropy, dlse, **ctx.scalars, needs=needs)
    return (*(grad if need else None for grad, need in zip(grads, needs)), None, None)


token_stats_op.register_autograd(_autograd_backward, setup_context=_setup_context)
token_stats_backward_op.register_autograd(no_second_derivative)
