"""csrc/shared/preference_batch.h as torch operators: from log-probs to the preference loss in one call, and back.

`logps` is per token, [2B, T] or packed [N], the B chosen sequences first; or per sequence, [B] of the chosen ones with
`rejected` [B] beside it. One dtype: fp32, on the CPU fp64 too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...autograd import NO_SECOND_DERIVATIVE
from ...losses import PreferenceOptions
from ...tensors import contiguous, in_rows, refuse_transforms
from .. import native

# Read once: torch.compile cannot look into the extension. One built from an older csrc may lack the losses.
_extension = native.EXTENSION
AVAILABLE = hasattr(_extension, "PreferenceBatch")
LOSS_IDS: dict[str, int] = _extension.PREFERENCE_LOSSES if AVAILABLE else {}
DIVERGENCE_IDS: dict[str, int] = _extension.DIVERGENCES if AVAILABLE else {}
OPTION_ORDER: list[str] = _extension.PREFERENCE_OPTIONS if AVAILABLE else []
SUMS_BYTES: int = _extension.PAIR_SUMS_BYTES if AVAILABLE else 0


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


@dataclass(frozen=True)
class Spec:
    """What is not a tensor, as the operators take it: ids of losses, and numbers in the order of the struct."""

    loss_ids: list[int]
    loss_weights: list[float]
    divergence: int
    options: list[float]
    ignore_index: int
    average: bool
    reward_per_token: bool
    ld_alpha: float  # negative: none
    sft_weight: float

    @staticmethod
    def of(
        options: PreferenceOptions, *, ignore_index: int = -100, average: bool = False, ld_alpha: float | None = None
    ) -> Spec:
        numbers = [getattr(options, name) for name in OPTION_ORDER]
        return Spec(
            [LOSS_IDS[name] for name in options.loss_type if name != "sft"],
            [float(weight) for name, weight in options.terms if name != "sft"],
            DIVERGENCE_IDS[options.f_divergence_type],
            [0.0 if isinstance(x, Tensor) else float(x) for x in numbers],  # kto_kl may be a tensor
            ignore_index,
            average,
            options.per_token_reward,
            -1.0 if ld_alpha is None else float(ld_alpha),
            float(sum(weight for name, weight in options.terms if name == "sft")),
        )

    def arguments(self) -> tuple:
        """In the order of the operator's."""
        return (
            self.loss_ids, self.loss_weights, self.divergence, self.options, self.ignore_index, self.average,
            self.reward_per_token, self.ld_alpha, self.sft_weight,
        )  # fmt: skip


def _num_pairs(logps: Tensor, rejected: Tensor | None, cu_seqlens: Tensor | None) -> int:
    if rejected is not None:
        return logps.shape[0]
    return (logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2


class _Layout:
    """The addresses of both sides of what comes as one tensor or as two."""

    def __init__(self, logps: Tensor, rejected: Tensor | None, cu_seqlens: Tensor | None):
        self.num_pairs = _num_pairs(logps, rejected, cu_seqlens)
        self.by_sequence, self.packed = rejected is not None, cu_seqlens is not None
        self.num_tokens = 1 if self.by_sequence else logps.shape[0] if self.packed else logps.shape[1]
        self.dtype, self.device = logps.dtype, logps.device.type

    def at(self, x: Tensor | None, dtype: torch.dtype | None = None, rows: bool = False) -> int:
        """The address of `x`, of the log-probs' type unless another is named."""
        return native.address(x, dtype or self.dtype, device=self.device, rows=rows)

    def sides(self, x: Tensor | None, other: Tensor | None = None, per_token: bool = True) -> tuple[int, int]:
        if self.by_sequence:
            return self.at(x), self.at(other)
        return self._halves(x, self.at(x), per_token)

    def labels(self, x: Tensor | None) -> tuple[int, int]:
        return self._halves(x, self.at(x, torch.int64, rows=not self.packed))

    def _halves(self, x: Tensor | None, address: int, per_token: bool = True) -> tuple[int, int]:
        if x is None or (self.packed and per_token):
            return address, address
        return address, address + self.num_pairs * x.stride(0) * x.element_size()


def _run(name: str, device: torch.device, *arguments) -> None:
    if device.type == "cpu":
        getattr(_extension, f"host_{name}")(*arguments)
    else:
        native.launch(f"cuda_{name}", device, *arguments)


def _batch(
    layout: _Layout, is_double, logps, ref, log_sum_sq_probs, labels, lengths, cu_seqlens, kto_kl, ref_per_token,
    loss_ids, loss_weights, divergence, options, ignore_index, average, reward_per_token, ld_alpha, sft_weight,
):  # fmt: skip
    return _extension.PreferenceBatch(
        is_double, logps, ref, log_sum_sq_probs, layout.labels(labels), lengths,
        layout.at(cu_seqlens, None if cu_seqlens is None else cu_seqlens.dtype),
        cu_seqlens is not None and cu_seqlens.dtype == torch.int32, layout.at(kto_kl, torch.float64),
        0 if labels is None or layout.packed else labels.stride(0), ignore_index, layout.num_pairs, layout.num_tokens,
        ref_per_token, average, reward_per_token, ld_alpha, sft_weight, list(loss_ids), list(loss_weights), divergence,
        list(options),
    )  # fmt: skip


def _check(layout: _Layout, logps: Tensor, **others: Tensor | None) -> None:
    """What native code trusts: it reads addresses, whatever lies there."""
    pairs, sequences, tokens = (layout.num_pairs,), (2 * layout.num_pairs,), tuple(logps.shape)
    # as many packed tokens as sequences: only the column is one number per sequence
    per_sequence = (pairs,) if layout.by_sequence else ((*sequences, 1) if layout.packed else sequences, tokens)
    allowed = {
        "rejected": (logps.dtype, (tokens,)),
        "ref": (logps.dtype, per_sequence),
        "ref_rejected": (logps.dtype, (pairs,)),
        "labels": (torch.int64, (tokens,)),
        "chosen_lengths": (torch.int64, (pairs,)),
        "rejected_lengths": (torch.int64, (pairs,)),
        "log_sum_sq_probs": (logps.dtype, (tokens,)),
        "kto_kl": (torch.float64, ((),)),
        "partials": (torch.float64, ((5, layout.num_pairs),)),
        "sums": (torch.uint8, ((layout.num_pairs, SUMS_BYTES),)),
        "dloss": (logps.dtype, ((),)),
        "dlosses": (logps.dtype, (pairs,)),
        "dchosen": (logps.dtype, (pairs,)),
        "drejected": (logps.dtype, (pairs,)),
    }
    dims = 1 if layout.by_sequence or layout.packed else 2
    if logps.dtype not in (torch.float32, torch.float64) or logps.ndim != dims or (dims == 2 and len(logps) % 2):
        raise ValueError(f"logps must be fp32 or fp64 with {dims} dimensions; got {logps.dtype}, {tuple(logps.shape)}")
    for name, x in others.items():
        dtype, shapes = allowed[name]
        if x is not None and (x.dtype != dtype or tuple(x.shape) not in shapes or x.device != logps.device):
            raise ValueError(
                f"{name} must be {dtype} of shape {' or '.join(map(str, shapes))} on {logps.device}; got {x.dtype}, "
                f"{tuple(x.shape)} on {x.device}"
            )


def _rows(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else in_rows(labels.long())


def _offsets(cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    if cu_seqlens is None:
        return None
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(f"cu_seqlens must be 2B + 1 offsets; got {cu_seqlens.dtype}, {tuple(cu_seqlens.shape)}")
    return contiguous(cu_seqlens.to(device))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [contiguous(x) for x in tensors]


@torch.library.custom_op("fastdpo::preference_forward", mutates_args=())
def preference_forward_op(
    logps: Tensor,
    rejected: Tensor | None,
    ref: Tensor | None,  # like `logps`, or per sequence: [2B] of padded tokens, [2B, 1] of packed ones
    ref_rejected: Tensor | None,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    log_sum_sq_probs: Tensor | None,
    kto_kl: Tensor | None,  # [] fp64
    loss_ids: Sequence[int],
    loss_weights: Sequence[float],
    divergence: int,
    options: Sequence[float],
    ignore_index: int,
    average: bool,
    reward_per_token: bool,
    ld_alpha: float,
    sft_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], losses, rewards of chosen and rejected, their log-probs, all [B]; partials [5, B]; sums of a pair)."""
    refuse_transforms("fastdpo.preference_loss", logps, rejected, ref, ref_rejected)
    spec = (
        loss_ids, loss_weights, divergence, options, ignore_index, average, reward_per_token, ld_alpha, sft_weight,
    )  # fmt: skip
    logps, rejected, ref, ref_rejected, log_sum_sq_probs = _contiguous(
        logps, rejected, ref, ref_rejected, log_sum_sq_probs
    )
    chosen_lengths, rejected_lengths = _contiguous(chosen_lengths, rejected_lengths)
    labels, cu_seqlens = _rows(labels), _offsets(cu_seqlens, logps.device)
    layout = _Layout(logps, rejected, cu_seqlens)
    _check(
        layout, logps, rejected=rejected, ref=ref, ref_rejected=ref_rejected, labels=labels,
        chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, log_sum_sq_probs=log_sum_sq_probs,
        kto_kl=kto_kl,
    )  # fmt: skip
    ref_per_token = ref is not None and not layout.by_sequence and ref.shape == logps.shape
    lengths = tuple(layout.at(x, torch.int64) for x in (chosen_lengths, rejected_lengths))
    batch = _batch(
        layout, logps.dtype == torch.float64, layout.sides(logps, rejected),
        layout.sides(ref, ref_rejected, ref_per_token), layout.sides(log_sum_sq_probs), labels, lengths, cu_seqlens,
        kto_kl, ref_per_token, *spec,
    )  # fmt: skip
    out = _results(logps, layout.num_pairs)
    loss, losses, *sides, partials, sums = out
    if not layout.num_pairs:
        loss.zero_()
        return out
    finished = torch.empty(1, dtype=torch.int32, device=logps.device)
    addresses = [layout.at(x) for x in sides]
    _run(
        "preference_forward", logps.device, batch, layout.at(sums, torch.uint8), layout.at(finished, torch.int32),
        layout.at(loss), layout.at(losses), addresses[:2], addresses[2:], layout.at(partials, torch.float64),
    )  # fmt: skip
    return out


def _results(logps: Tensor, num_pairs: int) -> tuple[Tensor, ...]:
    return (
        logps.new_empty(()),
        *(logps.new_empty(num_pairs) for _ in range(5)),
        logps.new_empty(5, num_pairs, dtype=torch.float64),
        logps.new_empty(num_pairs, SUMS_BYTES, dtype=torch.uint8),
    )


@preference_forward_op.register_fake
def _(logps, rejected, ref, ref_rejected, labels, cu_seqlens, *_):
    return _results(logps, _num_pairs(logps, rejected, cu_seqlens))


@torch.library.custom_op("fastdpo::preference_backward", mutates_args=())
def preference_backward_op(
    partials: Tensor,
    sums: Tensor,
    logps: Tensor,  # whose values are not read, as those of the three below
    rejected: Tensor | None,
    ref: Tensor | None,
    ref_rejected: Tensor | None,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    dloss: Tensor | None,
    dlosses: Tensor | None,
    dchosen: Tensor | None,
    drejected: Tensor | None,
    wanted: Sequence[bool],
    ignore_index: int,
    average: bool,
    ld_alpha: float,
    sft_weight: float,
) -> list[Tensor]:
    """Of logps, rejected, ref and ref_rejected, the gradients that are wanted."""
    refuse_transforms("fastdpo.preference_loss", dloss, dlosses, dchosen, drejected)
    labels, cu_seqlens = _rows(labels), _offsets(cu_seqlens, logps.device)
    partials, sums, dloss, dlosses, dchosen, drejected = _contiguous(partials, sums, dloss, dlosses, dchosen, drejected)
    layout = _Layout(logps, rejected, cu_seqlens)
    _check(
        layout, logps, rejected=rejected, ref=ref, ref_rejected=ref_rejected, labels=labels, partials=partials,
        sums=sums, dloss=dloss, dlosses=dlosses, dchosen=dchosen, drejected=drejected,
    )  # fmt: skip
    ref_per_token = ref is not None and not layout.by_sequence and ref.shape == logps.shape
    batch = _batch(
        layout, logps.dtype == torch.float64, (0, 0), (0, 0), (0, 0), labels, (0, 0), cu_seqlens, None,
        ref_per_token, [], [], 0, [0.0] * len(OPTION_ORDER), ignore_index, average, False, ld_alpha, sft_weight,
    )  # fmt: skip
    make = torch.empty if layout.num_pairs else torch.zeros
    out = [
        None if not want else make(x.shape, dtype=x.dtype, device=x.device)
        for x, want in zip((logps, rejected, ref, ref_rejected), wanted)
    ]
    if not layout.num_pairs:
        return [x for x in out if x is not None]
    of_logps, of_rejected, of_ref, of_ref_rejected = out
    address = [layout.at(x) for x in (dloss, dlosses, dchosen, drejected)]
    _run(
        "preference_backward", logps.device, batch, layout.at(partials, torch.float64), layout.at(sums, torch.uint8),
        *address[:2], address[2:],
        layout.sides(of_logps, of_rejected), layout.sides(of_ref, of_ref_rejected, ref_per_token),
    )  # fmt: skip
    return [x for x in out if x is not None]


@preference_backward_op.register_fake
def _(partials, sums, logps, rejected, ref, ref_rejected, labels, cu_seqlens, dloss, dlosses, dchosen, drejected,
      wanted, *_):  # fmt: skip
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x, want in zip((logps, rejected, ref, ref_rejected), wanted)
        if want
    ]


_SPEC = ("ignore_index", "average", "ld_alpha", "sft_weight")  # what the backward reads of `Spec`


def _setup_context(ctx, inputs, output):
    tensors, spec = inputs[:10], Spec(*inputs[10:])
    *results, partials, sums = output
    ctx.spec = [getattr(spec, name) for name in _SPEC]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(partials, sums, *tensors[:6])
    ctx.mark_non_differentiable(*results[2:4], partials, sums)


def _backward(ctx, dloss, dlosses, _, __, dchosen, drejected, *___):
    upstream, wanted = (dloss, dlosses, dchosen, drejected), list(ctx.needs_input_grad[:4])
    gradients = iter(())
    if any(x is not None for x in upstream):
        gradients = iter(preference_backward_op(*ctx.saved_tensors, *upstream, wanted, *ctx.spec))
    return (*(next(gradients, None) if want else None for want in wanted), *[None] * 15)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(NO_SECOND_DERIVATIVE)


preference_forward_op.register_autograd(_backward, setup_context=_setup_context)
preference_backward_op.register_autograd(_no_second_derivative)
