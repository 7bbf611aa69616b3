"""Autograd around the divergence of two heads, twice as in ../operators.py: an autograd Function, and functional
torch.library operators for compiled graphs.

    fastdpo::linear_divergence            one tensor per field of DivergenceForward, 0 elements where there is none
    fastdpo::linear_divergence_backward   one tensor per field of Gradients, hidden's shaped like hidden
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from ..._ops import add_op_namespace_prefix
from ...accumulate import destination, nothing_left
from ...autograd import Function, no_second_derivative, once_differentiable, uncompiled
from ...distributed import handshake
from ...distributed.handshake import Agreed
from ...head import CheckedHead, HeadOptions, LogitTransform, LoRA, Routing, check_head, compute_dtype
from ...routing import num_blocks, set_bytes
from ...tensors import contiguous, in_rows, plain, refuse_transforms, traced
from ..engines import divergence_engine
from ..operators import poisoned
from ..problem import Gradients, Head, Needs, Rows
from .problem import DivergenceForward, DivergenceOutput, DivergenceUpstream, Heads

FIELDS = tuple(field.name for field in fields(DivergenceForward))
SAVED = FIELDS[1:]  # what a backward reads
ROUTED = ("total", "bitmap", "most_pairs")


class Scalars(NamedTuple):
    """What of a call is not a tensor, as the operators take it."""

    kind: str
    beta: float
    labelled: bool
    stats: tuple[str, ...]  # of DIVERGENCE_STATS, sorted
    lora_scale: float
    transform: LogitTransform
    ref_transform: LogitTransform
    ignore_index: int
    compute_dtype: torch.dtype
    ref_compute_dtype: torch.dtype
    taus: tuple[float, ...]  # and the sets: of Routing. Empty: every pair is computed
    hidden_set: int
    weight_set: int

    @property
    def present(self) -> frozenset[str]:
        """The fields of DivergenceForward that there are."""
        names = {"divergence", "lse", "ref_lse", *(("entropy",) if "entropy" in self.stats else ())}
        names |= set() if self.kind == "forward_kl" else {"mean"}
        names |= {"logps", "ref_logps"} if self.labelled else set()
        return frozenset(names | set(ROUTED if self.taus else ()))


class Options(NamedTuple):
    """What of a call its caller says, beside the two checked heads."""

    kind: str
    beta: float
    labelled: bool
    stats: tuple[str, ...]
    head: HeadOptions  # of the student
    ref_transform: LogitTransform
    differentiable: bool
    lora_scale: float


def _prepare(options: Options, needs: Needs, tensors) -> tuple[Tensor | None, Scalars]:
    """(the draws' key, None where nothing is drawn; scalars)."""
    head = options.head
    routing = head.routing(needs.hidden or needs.lora_a, needs.weight or needs.bias or needs.lora_b)
    key = head.key(tensors[0].device)  # drawn without a gradient too: HeadOptions.key says why
    routing = routing if key is not None else Routing((), -1, -1)
    return key if routing.taus else None, Scalars(
        options.kind,
        options.beta,
        options.labelled,
        tuple(sorted(options.stats)),
        options.lora_scale,
        head.transform,
        options.ref_transform,
        head.ignore_index,
        compute_dtype(*tensors[:2]),
        compute_dtype(*tensors[6:8]),
        *routing[:3],
    )


class LinearDivergenceFunction(Function):
    """``apply(hidden, weight, bias, lora_a, lora_b, labels, ref_hidden, ref_weight, ref_bias, Options, Agreed or
    None)``, of checked tensors; returns the four of DivergenceOutput, flat.

    Saved besides the inputs, per row: up to seven numbers and, routed, one bit per block.
    """

    of = "fastdpo.linear_divergence"

    @staticmethod
    def forward(ctx, *arguments):
        ctx.set_materialize_grads(False)
        tensors, options, agreed = arguments[:9], arguments[9], arguments[10]
        needs = Needs(*ctx.needs_input_grad[:5]) if options.differentiable else Needs()
        key, scalars = _prepare(options, needs, tensors)
        shards = None if agreed is None else agreed.shards
        if shards is not None:
            key = agreed.key if scalars.taus else None
            with handshake.telling(shards.group):
                result = forward(tensors, key, scalars, shards)
            result = poisoned(result, agreed.poison)
        else:
            result = (_forward_operator if traced(*tensors) else forward)(tensors, key, scalars)
        outputs = _outputs(result, scalars)
        if True in needs:
            # copies of what is returned: the caller may change it in place
            kept = [getattr(result, name) for name in SAVED]
            kept = [x.clone() if any(x is y for y in outputs if y is not None) else x for x in kept]
            ctx.save_for_backward(*tensors, *kept)
            ctx.needs, ctx.scalars, ctx.shards, ctx.weight_shape = needs, scalars, shards, tensors[1].shape
            ctx.accumulate_into = options.head.accumulate_into
        if outputs[3] is not None:
            ctx.mark_non_differentiable(outputs[3])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, ddivergence, dentropy, dlogps, _):
        upstream = (ddivergence, dentropy, dlogps)
        given, shards = next((x for x in upstream if x is not None), None), ctx.shards
        if given is None:
            return (None,) * 11
        with handshake.announcing(None if shards is None else shards.group, given, "the backward"):
            saved = ctx.saved_tensors
            if saved[1].shape != ctx.weight_shape:  # its storage was released, as by ZeRO-3 after a gather
                raise RuntimeError(
                    f"weight had shape {tuple(ctx.weight_shape)} in the forward and has {tuple(saved[1].shape)} in "
                    "the backward: keep a sharded head gathered until the backward is done"
                )
            place = destination(ctx, saved[1]) if ctx.needs.weight else None
            if shards is not None:
                upstream = [None if x is None else plain("an upstream gradient", x) for x in upstream]
        sums = Gradients(weight=place)
        if shards is None:
            run = _backward_operator if traced(*saved[:9]) else backward
            grads = run(saved, upstream, ctx.scalars, ctx.needs, sums)
        else:
            hidden, lora_a = saved[0], saved[3]
            if ctx.needs.hidden:
                sums.hidden = Gradients.place((saved[5].shape[0], hidden.shape[-1]), hidden)
            if ctx.needs.lora_a:
                sums.lora_a = Gradients.place(lora_a.shape, lora_a)
            dlogps, dentropy, _, ddivergence = handshake.agree_upstream(
                shards, upstream[2], upstream[1], None, upstream[0]
            )
            with handshake.telling(shards.group):
                grads = backward(saved, (ddivergence, dentropy, dlogps), ctx.scalars, ctx.needs, sums, shards)
                if grads.hidden is not None:
                    grads.hidden = shards.sum_of_rows(grads.hidden, hidden.dtype)
                if grads.lora_a is not None:
                    grads.lora_a = shards.sum(grads.lora_a).to(lora_a.dtype)
        if place is not None:
            grads.weight = nothing_left(ctx.accumulate_into, saved[1])
        return grads.hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b, *(None,) * 6


def divergence(
    call: CheckedHead,
    teacher: CheckedHead,
    options: Options,
    function: type[LinearDivergenceFunction] = LinearDivergenceFunction,
    agreed: Agreed | None = None,
) -> DivergenceOutput:
    """Of checked tensors; each shaped like the labels. `agreed`: of ranks, outside of a compiled graph."""
    tensors = (*call.tensors, *teacher.tensors[:3])
    apply = super(Function, function).apply  # torch's: the class's own checks again
    if not torch.compiler.is_compiling():
        outputs = apply(*tensors, options, agreed)
    elif options.head.accumulate_into is not None:  # an operator returns gradients
        outputs = uncompiled(apply, *tensors, options, None)
    else:
        needs = Needs(*[options.differentiable and x is not None and x.requires_grad for x in tensors[:5]])
        key, scalars = _prepare(options, needs, tensors)
        outputs = _outputs(_forward_operator(tensors, key, scalars), scalars)
    return DivergenceOutput(*[None if x is None else x.view(call.shape) for x in outputs])


def _outputs(result: DivergenceForward, scalars: Scalars) -> tuple:
    return (
        result.divergence,
        *(getattr(result, name) if name in scalars.stats else None for name in DivergenceOutput._fields[1:]),
    )


def _run(heads: Heads, step: str, *arguments, **options):
    hidden = heads.student.hidden
    dtype = torch.promote_types(hidden.dtype, heads.teacher.hidden.dtype)
    engine = divergence_engine(hidden.device, dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # the compute dtypes say it; the sums stay fp32
        return getattr(engine, step)(heads, *arguments, **options)


def _problem(tensors, scalars: Scalars, shards=None) -> tuple[Heads, Rows]:
    """What an engine takes, laid out as problem.py says."""
    hidden, weight, bias, lora_a, lora_b, labels, ref_hidden, ref_weight, ref_bias = tensors
    lora = None if lora_a is None else LoRA(contiguous(lora_a), contiguous(lora_b), scalars.lora_scale)

    def head(hidden, weight, bias, lora, transform, dtype) -> Head:
        transform = LogitTransform(*transform)
        return Head(in_rows(hidden), in_rows(weight, apart=True), contiguous(bias), lora, transform, dtype)

    student = head(hidden, weight, bias, lora, scalars.transform, scalars.compute_dtype)
    teacher = head(ref_hidden, ref_weight, ref_bias, None, scalars.ref_transform, scalars.ref_compute_dtype)
    heads = Heads(student, teacher, scalars.kind, scalars.beta, scalars.labelled, "logps" in scalars.stats)
    vocabulary = (0, weight.shape[0]) if shards is None else (shards.vocab_start, shards.vocab_size)
    return heads, Rows(contiguous(labels), scalars.ignore_index, *vocabulary)


def forward(tensors, key: Tensor | None, scalars: Scalars, shards=None) -> DivergenceForward:
    heads, rows = _problem(tensors, scalars, shards)
    shards = None if shards is None or shards.size == 1 else shards
    routing = Routing(scalars.taus, scalars.hidden_set, scalars.weight_set, key) if scalars.taus else None
    return _run(heads, "forward", rows, stats=frozenset(scalars.stats), routing=routing, shards=shards)


def backward(saved, upstream, scalars: Scalars, needs: Needs, sums: Gradients | None = None, shards=None) -> Gradients:
    """`saved`: the inputs, and what the backward reads of the results; `upstream` of divergence, entropy and logps, one
    of them at least."""
    tensors = [None if x is None else plain(name, x) for name, x in zip(_NAMES, saved)]
    # hooks on saved tensors, and callers of the operator, may give back another layout
    results = dict(zip(SAVED, (contiguous(x) for x in saved[9:])))
    heads, rows = _problem(tensors, scalars, shards)
    like = results["lse"]
    coefs = [None if x is None else plain("an upstream gradient", x).to(like.dtype) for x in upstream]
    of_divergence, of_entropy, of_logps = (contiguous(x) for x in coefs)
    routing = Routing(scalars.taus, scalars.hidden_set, scalars.weight_set) if scalars.taus else None
    if of_entropy is not None:  # a block's bound says nothing about the entropy's gradient
        routing = None
    if routing is None:
        results |= dict.fromkeys(ROUTED)
    none = torch.zeros_like(like)
    of_divergence, of_logps = (none if x is None else x for x in (of_divergence, of_logps))
    results = DivergenceForward(like, **results)
    given = DivergenceUpstream(of_divergence, of_logps, of_entropy)
    grads = _run(heads, "backward", rows, results, given, routing, needs, sums)
    if grads.hidden is not None:
        grads.hidden = grads.hidden.view(tensors[0].shape)
    return grads


_NAMES = ("hidden", "weight", "bias", "lora A", "lora B", "labels", "ref_hidden", "ref_weight", "ref_bias")

# The operators

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor labels, "
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"
)
_SCALARS = (
    "str kind, float beta, bool labelled, str[] stats, float lora_scale, float[] transform, float[] ref_transform, "
    "int ignore_index, ScalarType compute_dtype, ScalarType ref_compute_dtype, float[] taus, int hidden_set, "
    "int weight_set"
)


def _check(tensors, scalars: Scalars) -> None:
    """As the door does, of an operator's tensors: whoever calls one comes by no other."""
    hidden, weight, bias, lora_a, lora_b, labels, ref_hidden, ref_weight, ref_bias = tensors
    if labels.ndim != 1 or labels.shape[0] != hidden.shape[:-1].numel():
        raise ValueError(f"labels must be the flat rows of hidden {tuple(hidden.shape)}; got {tuple(labels.shape)}")
    lora = None if lora_a is None and lora_b is None else (lora_a, lora_b, scalars.lora_scale)
    labels = labels.reshape(hidden.shape[:-1])
    check_head(hidden, weight, labels, bias, lora, HeadOptions())
    check_head(ref_hidden, ref_weight, labels, ref_bias, None, HeadOptions(), prefix="ref_")
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(f"weight has V = {weight.shape[0]} but ref_weight has V = {ref_weight.shape[0]}")


def _forward_operator(tensors, key: Tensor | None, scalars: Scalars) -> DivergenceForward:
    # torch 2.6 cannot trace _asdict
    found = dict(zip(FIELDS, divergence_op(*tensors, key, **dict(zip(Scalars._fields, scalars)))))
    present = scalars.present
    return DivergenceForward(**{name: x if name in present else None for name, x in found.items()})


def _backward_operator(saved, upstream, scalars: Scalars, needs: Needs, sums=None) -> Gradients:
    grads = divergence_backward_op(*saved, *upstream, **dict(zip(Scalars._fields, scalars)), needs=list(needs))
    return Gradients(*[grad if need else None for grad, need in zip(grads, needs)]).added_to(sums)


def _dtype(name: str, hidden: Tensor) -> torch.dtype:
    of = {"bitmap": torch.uint8, "most_pairs": torch.int32}
    return of.get(name, torch.float64 if hidden.dtype == torch.float64 else torch.float32)


@torch.library.custom_op(
    add_op_namespace_prefix("linear_divergence"),
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? key, *, {_SCALARS}) -> ({', '.join(['Tensor'] * len(FIELDS))})",
)
def divergence_op(*tensors, **scalars):
    refuse_transforms(LinearDivergenceFunction.of, *tensors)
    key, scalars = tensors[9], Scalars(**scalars)
    _check(tensors[:9], scalars)
    if key is None:
        scalars = scalars._replace(taus=())
    result = forward([None if x is None else plain(n, x) for n, x in zip(_NAMES, tensors)], key, scalars)
    made = [(name, getattr(result, name)) for name in FIELDS]
    return tuple(tensors[0].new_empty(0, dtype=_dtype(n, tensors[0])) if x is None else x for n, x in made)


@divergence_op.register_fake
def _(*tensors, **scalars):
    hidden, weight, rows, key, scalars = tensors[0], tensors[1], tensors[5].shape[0], tensors[9], Scalars(**scalars)
    scalars = scalars if key is not None else scalars._replace(taus=())
    shapes = dict.fromkeys(scalars.present, (rows,))
    if scalars.taus:
        shapes["bitmap"] = (rows, len(scalars.taus) * set_bytes(num_blocks(weight.shape[0])))
    return tuple(hidden.new_empty(shapes.get(name, (0,)), dtype=_dtype(name, hidden)) for name in FIELDS)


_SAVED_FIELDS = ", ".join(f"Tensor{'' if 'lse' in name else '?'} saved_{name}" for name in SAVED)


@torch.library.custom_op(
    add_op_namespace_prefix("linear_divergence_backward"),
    mutates_args=(),
    schema=f"({_INPUTS}, {_SAVED_FIELDS}, Tensor? ddivergence, Tensor? dentropy, Tensor? dlogps, *, {_SCALARS}, "
    f"bool[] needs) -> ({', '.join(['Tensor'] * 5)})",
)
def divergence_backward_op(*tensors, needs, **scalars):
    refuse_transforms(LinearDivergenceFunction.of, *tensors)
    scalars = Scalars(**scalars)
    _check(tensors[:9], scalars)
    grads = backward(tensors[:-3], tensors[-3:], scalars, Needs(*needs))
    made = zip((grads.hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b), tensors)
    return tuple(_absent(like, tensors[0]) if grad is None else grad for grad, like in made)


@divergence_backward_op.register_fake
def _(*tensors, needs, **scalars):
    return tuple(x.new_empty(x.shape) if need else _absent(x, tensors[0]) for x, need in zip(tensors, needs))


def _absent(like: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden.new_empty(0, dtype=hidden.dtype if like is None else like.dtype)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    scalars, found = Scalars(**keyword_only_inputs), dict(zip(FIELDS, output))
    present = (scalars if inputs[9] is not None else scalars._replace(taus=())).present
    ctx.set_materialize_grads(False)  # entropy without an upstream gradient keeps the backward routed
    ctx.save_for_backward(*inputs[:9], *(found[name] if name in present else None for name in SAVED))
    ctx.scalars = {**keyword_only_inputs, "taus": keyword_only_inputs["taus"] if inputs[9] is not None else []}
    differentiable = {"divergence", *scalars.stats} - {"ref_logps"}
    ctx.mark_non_differentiable(*(x for name, x in found.items() if name not in differentiable))


def _autograd_backward(ctx, *upstream):
    upstream = dict(zip(FIELDS, upstream))
    given = [upstream[name] for name in ("divergence", "entropy", "logps")]
    if all(x is None for x in given):
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:5])
    grads = divergence_backward_op(*ctx.saved_tensors, *given, **ctx.scalars, needs=needs)
    return (*(grad if need else None for grad, need in zip(grads, needs)), *(None,) * 5)


divergence_op.register_autograd(_autograd_backward, setup_context=_setup_context)
divergence_backward_op.register_autograd(no_second_derivative)
