"""Autograd around the divergence of two heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...accumulate import destination, nothing_left
from ...autograd import Function, once_differentiable
from ...head import CheckedHead, HeadOptions, LogitTransform, LoRA, compute_dtype
from ...tensors import contiguous, in_rows, plain
from ..engines import divergence_engine
from ..problem import Gradients, Head, Needs, Rows
from .problem import DivergenceForward, DivergenceOutput, DivergenceUpstream, Heads

SAVED = ("lse", "ref_lse", "mean", "logps", "ref_logps", "entropy", "total", "bitmap", "most_pairs")


class Settings(NamedTuple):
    """What of a call is not a tensor."""

    kind: str
    beta: float
    labelled: bool
    stats: tuple[str, ...]
    options: HeadOptions  # of the student
    ref_transform: LogitTransform
    differentiable: bool
    lora_scale: float


class LinearDivergenceFunction(Function):
    """``apply(hidden, weight, bias, lora_a, lora_b, labels, ref_hidden, ref_weight, ref_bias, Settings)``, of checked
    tensors; returns the four of DivergenceOutput, flat.

    Saved besides the inputs, per row: up to seven numbers and, routed, one bit per block.
    """

    of = "fastdpo.linear_divergence"

    @staticmethod
    def forward(ctx, *arguments):
        ctx.set_materialize_grads(False)
        tensors, settings = arguments[:9], arguments[9]
        options = settings.options
        needs = Needs(*ctx.needs_input_grad[:5]) if settings.differentiable else Needs()
        routing = options.routing(needs.hidden or needs.lora_a, needs.weight or needs.bias or needs.lora_b)
        key = options.key(tensors[0].device)  # drawn without a gradient too: HeadOptions.key says why
        routing = routing._replace(seed=key) if routing.taus and key is not None else None
        dtypes = compute_dtype(*tensors[:2]), compute_dtype(*tensors[6:8])
        heads, rows = _problem(tensors, settings, dtypes)
        result = _run(heads, "forward", heads, rows, stats=frozenset(settings.stats), routing=routing, shards=None)
        outputs = [result.divergence]
        for name in DivergenceOutput._fields[1:]:
            outputs.append(getattr(result, name) if name in settings.stats else None)
        if True in needs:
            kept = [getattr(result, name) for name in SAVED]
            # copies of what is returned: the caller may change it in place
            kept = [x.clone() if any(x is y for y in outputs if y is not None) else x for x in kept]
            ctx.save_for_backward(*tensors, *kept)
            ctx.needs, ctx.settings, ctx.dtypes, ctx.weight_shape = needs, settings, dtypes, tensors[1].shape
            ctx.routing = None if routing is None else routing._replace(seed=None)
            ctx.accumulate_into = options.accumulate_into
        if outputs[3] is not None:
            ctx.mark_non_differentiable(outputs[3])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, ddivergence, dentropy, dlogps, _):
        upstream = [x for x in (ddivergence, dentropy, dlogps) if x is not None]
        if not upstream:
            return (None,) * 10
        kept = ctx.saved_tensors
        tensors, results = kept[:9], kept[9:]
        tensors = [None if x is None else plain(name, x) for name, x in zip(_NAMES, tensors)]
        if tensors[1].shape != ctx.weight_shape:
            raise RuntimeError(
                f"weight had shape {tuple(ctx.weight_shape)} in the forward and has {tuple(tensors[1].shape)} in "
                "the backward: keep a sharded head gathered until the backward is done"
            )
        place = destination(ctx, tensors[1]) if ctx.needs.weight else None
        heads, rows = _problem(tensors, ctx.settings, ctx.dtypes)
        # hooks on saved tensors may give back another layout
        saved = dict(zip(SAVED, (contiguous(x) for x in results)))
        routing = ctx.routing
        if dentropy is not None:  # the blocks' bounds say nothing about the entropy's gradient
            routing = None
        if routing is None:
            saved |= dict.fromkeys(("total", "bitmap", "most_pairs"))
        none = torch.zeros_like(saved["lse"])

        def coef(x: Tensor | None) -> Tensor | None:
            return None if x is None else contiguous(plain("an upstream gradient", x).to(none.dtype))

        of_divergence, of_logps = (none if x is None else coef(x) for x in (ddivergence, dlogps))
        coefs = DivergenceUpstream(of_divergence, of_logps, coef(dentropy))
        saved, sums = DivergenceForward(saved["lse"], **saved), Gradients(weight=place)
        grads = _run(heads, "backward", heads, rows, saved, coefs, routing, ctx.needs, sums)
        if grads.hidden is not None:
            grads.hidden = grads.hidden.view(tensors[0].shape)
        if place is not None:
            grads.weight = nothing_left(ctx.accumulate_into, tensors[1])
        return grads.hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b, *(None,) * 5


_NAMES = ("hidden", "weight", "bias", "lora A", "lora B", "labels", "ref_hidden", "ref_weight", "ref_bias")


def _run(heads: Heads, step: str, *arguments, **options):
    hidden = heads.student.hidden
    dtype = torch.promote_types(hidden.dtype, heads.teacher.hidden.dtype)
    engine = divergence_engine(hidden.device, dtype)
    with torch.autocast(hidden.device.type, enabled=False):  # the compute dtypes say it; the sums stay fp32
        return getattr(engine, step)(*arguments, **options)


def _problem(tensors, settings: Settings, dtypes) -> tuple[Heads, Rows]:
    """What an engine takes, laid out as problem.py says."""
    hidden, weight, bias, lora_a, lora_b, labels, ref_hidden, ref_weight, ref_bias = tensors
    lora = None if lora_a is None else LoRA(contiguous(lora_a), contiguous(lora_b), settings.lora_scale)
    transform = settings.options.transform
    student = Head(in_rows(hidden), in_rows(weight, apart=True), contiguous(bias), lora, transform, dtypes[0])
    ref_weight = in_rows(ref_weight, apart=True)
    teacher = Head(in_rows(ref_hidden), ref_weight, contiguous(ref_bias), None, settings.ref_transform, dtypes[1])
    heads = Heads(student, teacher, settings.kind, settings.beta, settings.labelled, "logps" in settings.stats)
    return heads, Rows(contiguous(labels), settings.options.ignore_index, 0, weight.shape[0])


def divergence(call: CheckedHead, teacher: CheckedHead, settings: Settings) -> DivergenceOutput:
    """Of checked tensors; each shaped like the labels."""
    apply = super(Function, LinearDivergenceFunction).apply  # torch's: the class's own checks again
    outputs = apply(*call.tensors, *teacher.tensors[:3], settings)
    return DivergenceOutput(*[None if x is None else x.view(call.shape) for x in outputs])
