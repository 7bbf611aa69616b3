"""csrc/shared/preference_batch.h as torch operators: from log-probs to the preference loss in one call, and back.

`logps` is per token, [2B, T] or packed [N], the B chosen sequences first; or per sequence, [B] of the chosen ones with
`rejected` [B] beside it. One dtype: fp32, on the CPU fp64 too.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..._ops import add_op_namespace_prefix
from ...autograd import once_differentiable
from ...losses import PreferenceOptions, check_sequences
from ...tensors import contiguous, in_rows, refuse_transforms, traced
from .. import native
from .reference import BatchInputs, batch_losses_ref

# Read once: torch.compile cannot look into the extension.
AVAILABLE = native.available()
LOSS_IDS: dict[str, int] = native.EXTENSION.PREFERENCE_LOSSES if AVAILABLE else {}
DIVERGENCE_IDS: dict[str, int] = native.EXTENSION.DIVERGENCES if AVAILABLE else {}
OPTION_ORDER: list[str] = native.EXTENSION.PREFERENCE_OPTIONS if AVAILABLE else []
SUMS_BYTES: int = native.EXTENSION.PAIR_SUMS_BYTES if AVAILABLE else 0
PARTIALS: int = native.EXTENSION.PAIR_PARTIALS if AVAILABLE else 0


def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the losses of tensors of this device and type are not computed here; None when they are."""
    if os.environ.get("FASTDPO_ENGINE") == "reference":
        return "FASTDPO_ENGINE"
    if not AVAILABLE:
        return f"the native extension is missing ({native.REASON})"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"not for {device.type}"
    if dtype != torch.float32:
        return "fp64 on a GPU"
    return native.cuda_problem(torch.cuda.get_device_capability(device) if torch.cuda.is_initialized() else None)


# torch.compiler.assume_constant_result's mark, since torch.compile cannot look into the extension; calling it would
# import torch._dynamo, and Triton with it, whenever fastdpo is imported.
problem._dynamo_marked_constant = True


class Spec(NamedTuple):
    """What is not a tensor, as the operators take it: ids of losses, and numbers in the order of the struct."""

    loss_ids: list[int]
    loss_weights: list[float]
    divergence: int
    options: list[float]
    ignore_index: int
    average: bool
    reward_per_token: bool
    reward_with_kl: bool
    ld_alpha: float  # negative: none
    sft_weight: float

    @staticmethod
    def of(options: PreferenceOptions, given: BatchInputs) -> Spec:
        loss_ids, loss_weights, numbers, sft_weight = [], [], [], 0.0
        for name, weight in zip(options.loss_type, options.loss_weights):
            if name == "sft":
                sft_weight += weight
            else:
                loss_ids.append(LOSS_IDS[name])
                loss_weights.append(weight)
        for name in OPTION_ORDER:
            number = getattr(options, name)
            numbers.append(0.0 if isinstance(number, Tensor) else number)  # kto_kl may be a tensor
        return Spec(
            loss_ids,
            loss_weights,
            DIVERGENCE_IDS[options.f_divergence_type],
            numbers,
            given.ignore_index,
            given.average,
            options.all_are("per_token_reward"),
            options.all_are("kl"),
            -1.0 if given.ld_alpha is None else given.ld_alpha,
            sft_weight,
        )


def batch_losses(options: PreferenceOptions, given: BatchInputs) -> tuple[Tensor, ...]:
    """(loss [], losses, rewards of chosen and rejected, their log-probs, all [B]).

    By the templates, one call each way; by the reference where they cannot run, for losses without one (those that
    match rows by rank need a sort), for a `ref` wider than the log-probs, and where sums cross ranks on the way.
    """
    logps, ref, kto_kl = given.logps, given.ref, None
    served = given.over is None and (ref is None or torch.promote_types(ref.dtype, logps.dtype) == logps.dtype)
    for name in options.loss_type:
        served = served and (name in LOSS_IDS or name == "sft")
    if not served or problem(logps.device, logps.dtype) is not None:
        return batch_losses_ref(options, given)
    if ref is not None and ref.dtype != logps.dtype:
        ref = ref.to(logps.dtype)
    if isinstance(options.kto_kl, Tensor):
        kto_kl = options.kto_kl.to(logps.device, torch.float64)
    return _BatchLosses.apply(
        Spec.of(options, given), logps, given.rejected, ref, given.ref_rejected, given.kl, given.kl_rejected,
        given.labels, given.cu_seqlens, given.chosen_lengths, given.rejected_lengths, given.log_sum_sq_probs, kto_kl,
    )  # fmt: skip


class _BatchLosses(torch.autograd.Function):
    """``apply(Spec, the operator's tensors)`` returns its first six results; once differentiable.

    The one autograd of both operators: torch.compile follows it and finds them inside. Outside of a graph it calls what
    they call: 46 us; over the operators 75, and 151 where an operator has the autograd (B = 4, Xeon, November 2026).
    """

    of = "fastdpo.preference_loss"

    @staticmethod
    def forward(ctx, spec, *tensors):
        ctx.set_materialize_grads(False)
        run = preference_forward_op if traced(*tensors) else _forward
        *results, partials, sums = run(*tensors, *spec)
        ctx.spec = spec
        ctx.save_for_backward(partials, sums, *tensors[:8])
        ctx.mark_non_differentiable(*results[2:4])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dlosses, _, __, dchosen, drejected):
        upstream, wanted, spec = (dloss, dlosses, dchosen, drejected), list(ctx.needs_input_grad[1:7]), ctx.spec
        if all(x is None for x in upstream):
            return (None,) * 13
        tensors = (*ctx.saved_tensors, *upstream)
        run = preference_backward_op if traced(*tensors) else _backward
        made = iter(run(*tensors, wanted, spec.ignore_index, spec.average, spec.ld_alpha, spec.sft_weight))
        return (None, *[next(made) if want else None for want in wanted], *[None] * 6)


class PreferenceLossFunction:
    """The losses as an autograd Function: ``apply(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths,
    rejected_lengths, PreferenceOptions, chosen_kl, rejected_kl) -> losses [B]``; what the losses do not need may be
    None. It checks what `preference_loss` checks, and computes what that computes.

    Not a subclass of one, whose `apply` torch.compile passes by: the checks would be left out there.
    """

    @staticmethod
    def apply(
        chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None,
        chosen_lengths: Tensor | None, rejected_lengths: Tensor | None, options: PreferenceOptions,
        chosen_kl: Tensor | None = None, rejected_kl: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        refuse_transforms("fastdpo.preference_loss", chosen, rejected, ref_chosen, ref_rejected, chosen_kl, rejected_kl)
        if not isinstance(options, PreferenceOptions):
            raise TypeError(f"options must be PreferenceOptions; got {options!r}")
        tensors = (
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, chosen_kl, rejected_kl,
        )  # fmt: skip
        return batch_losses(options, BatchInputs(*check_sequences(options, *tensors)))[1]


def _num_pairs(logps: Tensor, rejected: Tensor | None, cu_seqlens: Tensor | None) -> int:
    if rejected is not None:
        return logps.shape[0]
    return (logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2


class _Layout:
    """Where both sides of what comes as one tensor, or as two, lie in it."""

    def __init__(self, logps: Tensor, rejected: Tensor | None, ref: Tensor | None, cu_seqlens: Tensor | None):
        self.num_pairs = _num_pairs(logps, rejected, cu_seqlens)
        self.by_sequence, self.packed = rejected is not None, cu_seqlens is not None
        self.ref_per_token = ref is not None and not self.by_sequence and ref.shape == logps.shape
        self.num_tokens = 1 if self.by_sequence else logps.shape[0] if self.packed else logps.shape[1]

    def sides(self, x: Tensor | None, other: Tensor | None = None, per_token: bool = True):
        if x is None or self.by_sequence:
            return None if x is None and other is None else (x, other)
        return (x, x) if self.packed and per_token else (x[: self.num_pairs], x[self.num_pairs :])

    def run(
        self, name: str, like: Tensor, labels, cu_seqlens, ignore_index, average, ld_alpha, sft_weight, **fields
    ) -> None:
        """Of the layout_fields of csrc/preference_structs.h, and `fields`."""
        fields.update(
            num_pairs=self.num_pairs,
            num_tokens=self.num_tokens,
            labels=self.sides(labels),
            offsets=cu_seqlens,
            ignore_index=ignore_index,
            ref_per_token=self.ref_per_token,
            average=average,
            ld_alpha=ld_alpha,
            sft_weight=sft_weight,
        )
        if like.is_cpu:
            getattr(native.EXTENSION, f"host_{name}")(is_double=like.dtype == torch.float64, **fields)
        else:
            native.launch(f"cuda_{name}", like.device, **fields)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    laid_out = []
    for x in tensors:
        laid_out.append(None if x is None else contiguous(x))
    return laid_out


def _forward(
    logps, rejected, ref, ref_rejected, kl, kl_rejected, labels, cu_seqlens, chosen_lengths, rejected_lengths,
    log_sum_sq_probs, kto_kl, *spec,
):  # fmt: skip
    """What the operator returns, of tensors in any layout."""
    logps, rejected, ref, ref_rejected, kl, kl_rejected = _contiguous(
        logps, rejected, ref, ref_rejected, kl, kl_rejected
    )
    log_sum_sq_probs, chosen_lengths, rejected_lengths, cu_seqlens = _contiguous(
        log_sum_sq_probs, chosen_lengths, rejected_lengths, cu_seqlens
    )
    labels, spec = None if labels is None else in_rows(labels.long()), Spec(*spec)
    layout = _Layout(logps, rejected, ref, cu_seqlens)
    out = loss, losses, *sides, partials, sums = _results(logps, layout.num_pairs)
    if not layout.num_pairs:
        loss.zero_()
        return out
    lengths = (chosen_lengths, rejected_lengths)
    reading = (spec.ignore_index, spec.average, spec.ld_alpha, spec.sft_weight)
    layout.run(
        "preference_forward",
        logps,
        labels,
        cu_seqlens,
        *reading,
        logps=layout.sides(logps, rejected),
        ref=layout.sides(ref, ref_rejected, layout.ref_per_token),
        kl=layout.sides(kl, kl_rejected),
        log_sum_sq_probs=layout.sides(log_sum_sq_probs),
        lengths=lengths,
        kto_kl=kto_kl,
        reward_per_token=spec.reward_per_token,
        reward_with_kl=spec.reward_with_kl,
        terms=list(zip(spec.loss_ids, spec.loss_weights)),
        options=dict(zip(OPTION_ORDER, spec.options), divergence=spec.divergence),
        sums=sums,
        finished=torch.empty(1, dtype=torch.int32, device=logps.device),
        loss=loss,
        losses=losses,
        rewards=(sides[0], sides[1]),
        out_logps=(sides[2], sides[3]),
        partials=partials,
    )
    return out


def _results(logps: Tensor, num_pairs: int) -> tuple[Tensor, ...]:
    new = logps.new_empty
    partials, sums = new(PARTIALS, num_pairs, dtype=torch.float64), new(num_pairs, SUMS_BYTES, dtype=torch.uint8)
    return new(()), new(num_pairs), new(num_pairs), new(num_pairs), new(num_pairs), new(num_pairs), partials, sums


def _backward(
    partials, sums, logps, rejected, ref, ref_rejected, kl, kl_rejected, labels, cu_seqlens, dloss, dlosses, dchosen,
    drejected, wanted, ignore_index, average, ld_alpha, sft_weight,
):  # fmt: skip
    """Of _GRADED, whose values are not read, the gradients that are wanted."""
    partials, sums, dloss, dlosses, dchosen, drejected, cu_seqlens = _contiguous(
        partials, sums, dloss, dlosses, dchosen, drejected, cu_seqlens
    )
    labels = None if labels is None else in_rows(labels.long())
    layout = _Layout(logps, rejected, ref, cu_seqlens)
    make = torch.empty if layout.num_pairs else torch.zeros
    out = [
        None if not want else make(x.shape, dtype=x.dtype, device=x.device)
        for x, want in zip((logps, rejected, ref, ref_rejected, kl, kl_rejected), wanted)
    ]
    if layout.num_pairs:
        of_logps, of_rejected, of_ref, of_ref_rejected, of_kl, of_kl_rejected = out
        layout.run(
            "preference_backward",
            logps,
            labels,
            cu_seqlens,
            ignore_index,
            average,
            ld_alpha,
            sft_weight,
            partials=partials,
            sums=sums,
            dloss=dloss,
            dlosses=dlosses,
            dlogps=(dchosen, drejected),
            dtokens=layout.sides(of_logps, of_rejected),
            dref=layout.sides(of_ref, of_ref_rejected, layout.ref_per_token),
            dkl=layout.sides(of_kl, of_kl_rejected),
        )
    return [x for x in out if x is not None]


# The operators, for graphs, in which no door has checked what native code reads.

_GRADED = "logps rejected ref ref_rejected kl kl_rejected"  # what may have a gradient
_INPUTS = f"{_GRADED} labels cu_seqlens"
_FORWARD = f"{_INPUTS} chosen_lengths rejected_lengths log_sum_sq_probs kto_kl".split()
_BACKWARD = f"partials sums {_INPUTS} dloss dlosses dchosen drejected".split()
_ALWAYS = ("logps", "partials", "sums")
_READING = "int ignore_index, bool average"


def _schema(names: list[str]) -> str:
    return ", ".join(f"Tensor {name}" if name in _ALWAYS else f"Tensor? {name}" for name in names)


def _check(given: dict[str, Tensor | None]) -> None:
    """What native code trusts: it reads addresses, whatever lies there."""
    logps, rejected, labels, cu_seqlens = (given[name] for name in ("logps", "rejected", "labels", "cu_seqlens"))
    if cu_seqlens is not None and (
        cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] % 2 == 0
    ):
        raise ValueError(f"cu_seqlens must be 2B + 1 offsets; got {cu_seqlens.dtype}, {tuple(cu_seqlens.shape)}")
    dims = 1 if rejected is not None or cu_seqlens is not None else 2
    if logps.dtype not in (torch.float32, torch.float64) or logps.ndim != dims or (dims == 2 and len(logps) % 2):
        raise ValueError(f"logps must be fp32 or fp64 with {dims} dimensions; got {logps.dtype}, {tuple(logps.shape)}")
    num_pairs, tokens = _num_pairs(logps, rejected, cu_seqlens), tuple(logps.shape)
    pairs, sequences = (num_pairs,), (2 * num_pairs,)
    # as many packed tokens as sequences: only the column is one number per sequence
    per_sequence = pairs if rejected is not None else sequences if cu_seqlens is None else (*sequences, 1)
    of_labels = torch.int32 if labels is not None and labels.dtype == torch.int32 else torch.int64
    allowed = {
        "rejected": (logps.dtype, tokens),
        "ref": (logps.dtype, per_sequence, tokens),
        "ref_rejected": (logps.dtype, pairs),
        "kl": (logps.dtype, tokens),
        "kl_rejected": (logps.dtype, pairs),
        "labels": (of_labels, tokens),
        "chosen_lengths": (torch.int64, pairs),
        "rejected_lengths": (torch.int64, pairs),
        "log_sum_sq_probs": (logps.dtype, tokens),
        "kto_kl": (torch.float64, ()),
        "partials": (torch.float64, (PARTIALS, num_pairs)),
        "sums": (torch.uint8, (num_pairs, SUMS_BYTES)),
        "dloss": (logps.dtype, ()),
        "dlosses": (logps.dtype, pairs),
        "dchosen": (logps.dtype, pairs),
        "drejected": (logps.dtype, pairs),
    }
    for name, x in given.items():
        if x is None or name in ("logps", "cu_seqlens"):
            continue
        dtype, *shapes = allowed[name]
        if x.dtype != dtype or tuple(x.shape) not in shapes or x.device != logps.device:
            raise ValueError(
                f"{name} must be {dtype} of shape {' or '.join(map(str, shapes))} on {logps.device}; got {x.dtype}, "
                f"{tuple(x.shape)} on {x.device}"
            )


@torch.library.custom_op(
    add_op_namespace_prefix("preference_forward"),
    mutates_args=(),
    schema=f"({_schema(_FORWARD)}, int[] loss_ids, float[] loss_weights, int divergence, float[] options, {_READING}, "
    f"bool reward_per_token, bool reward_with_kl, float ld_alpha, float sft_weight) -> ({', '.join(['Tensor'] * 8)})",
)
def preference_forward_op(*arguments):
    """(loss [], losses, rewards of chosen and rejected, their log-probs, all [B]; partials [7, B]; sums of a pair). A
    `ref` is like `logps`, or per sequence: [2B] of padded tokens, [2B, 1] of packed ones."""
    refuse_transforms("fastdpo.preference_loss", *arguments[:6])
    _check(dict(zip(_FORWARD, arguments)))
    return _forward(*arguments)


@preference_forward_op.register_fake
def _(logps, rejected, ref, ref_rejected, kl, kl_rejected, labels, cu_seqlens, *_):
    return _results(logps, _num_pairs(logps, rejected, cu_seqlens))


@torch.library.custom_op(
    add_op_namespace_prefix("preference_backward"),
    mutates_args=(),
    schema=f"({_schema(_BACKWARD)}, bool[] wanted, {_READING}, float ld_alpha, float sft_weight) -> Tensor[]",
)
def preference_backward_op(*arguments):
    """Of _GRADED, whose values are not read, the gradients that are wanted."""
    refuse_transforms("fastdpo.preference_loss", *arguments[10:14])
    _check(dict(zip(_BACKWARD, arguments)))
    return _backward(*arguments)


@preference_backward_op.register_fake
def _(partials, sums, *others):
    graded, wanted = others[:6], others[12]
    return [x.new_empty(x.shape) for x, want in zip(graded, wanted) if want]
