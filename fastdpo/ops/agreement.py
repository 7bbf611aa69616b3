"""What of a call its ranks must be given alike: a new option of a head is compared by a line here."""

from __future__ import annotations

from dataclasses import dataclass

from ..distributed import handshake
from ..distributed.handshake import Agreed
from ..head import CheckedHead, HeadOptions, check_labels, compute_dtype
from .engines import engine_of

INPUTS = ("hidden", "weight", "bias", "lora A", "lora B")


@dataclass(frozen=True)
class Teacher:
    """A second head beside a call's, and how the two are compared."""

    call: CheckedHead
    fields: dict[str, object]


NO_TEACHER = {
    "kind": None,
    "jsd_beta": None,
    "labels_or_mask": None,
    "the last dimension of ref_hidden": 0,
    **{f"{name}'s dtype": None for name in handshake.TEACHER},
    "ref_logit_scale": None,
    "ref_softcap": None,
}


def agree(
    call: CheckedHead, options: HeadOptions, stats, differentiable: bool, teacher: Teacher | None = None
) -> Agreed | None:
    """What the ranks of `vocab_group` agree on before the call's first exchange of a size that data decides; ValueError
    on every one of them unless they do."""
    if options.vocab_group is None:
        return None
    hidden, _, _, lora_a, _, labels = call.tensors
    told = described(call, options, stats, differentiable, options.key(hidden.device))
    if teacher is not None:
        told.fields.update(teacher.fields)
        inputs = teacher.call.tensors
        told.fields["the last dimension of ref_hidden"] = inputs[0].shape[-1]
        dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        told.fields.update({f"{name}'s dtype": dtype for name, dtype in zip(handshake.TEACHER, dtypes)})
    ref_hidden = None if teacher is None else teacher.call.tensors[0]
    agreed = handshake.agree(options.vocab_group, told, hidden, labels, lora_a, ref_hidden)
    if options.check_labels:
        check_labels(labels.view(call.shape), options, agreed.shards.vocab_size)
    return agreed


def described(call: CheckedHead, options: HeadOptions, stats, differentiable: bool, draw, rows: int | None = None):
    """The call as its ranks compare it; `rows`: this rank's number of tokens, where tokens are each rank's own."""
    hidden, weight, _, lora_a, _, labels = call.tensors
    tau = options.tau if isinstance(options.tau, tuple) else (options.tau, options.tau)
    dtypes = [None if x is None else x.dtype for x in call.tensors[:5]]
    fields = {
        "tokens": "the same on every rank" if rows is None else "each rank's own",
        "labels of a row": 0 if labels.ndim == 1 else labels.shape[1],
        "the rows of hidden": labels.shape[0] if rows is None else 0,
        "the last dimension of hidden": hidden.shape[-1],
        **{f"{name}'s dtype": dtype for name, dtype in zip(INPUTS, dtypes)},
        "lora's rank": -1 if lora_a is None else lora_a.shape[0],
        "lora's scale": call.lora_scale,
        **{name: getattr(options, name) for name in ("ignore_index", "logit_scale", "softcap", "temperature")},
        "backward": options.backward,
        "tau of dhidden": tau[0],
        "tau of dweight": tau[1],
        "whether seed is given": options.seed is not None,
        "check_labels": options.check_labels,
        "stats": stats,
        "the inputs that want a gradient": [
            name for name, x in zip(INPUTS, call.tensors[:5]) if differentiable and x is not None and x.requires_grad
        ],
        "autocast's or the products' dtype": compute_dtype(hidden, weight),
        "the engine": engine_of(hidden).name,
        **NO_TEACHER,
    }
    return handshake.Call(fields, options.seed, draw, weight.shape[0], rows or 0)
