"""Token level, two heads: how far a student's distribution over the vocabulary is from a teacher's, without either
one's logits. Distillation, and what else needs the reference's whole distribution (TDPO, exact KL penalties).

The formulas, and which (token, block) pairs a routed backward keeps: fastdpo/ops/divergence/problem.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .autograd import eager
from .distributed.handshake import announcing
from .head import CheckedHead, HeadOptions, check_head
from .ops.agreement import Teacher, agree
from .ops.divergence.operators import LinearDivergenceFunction, Options, divergence
from .ops.divergence.problem import DIVERGENCE_STATS, DIVERGENCE_TAU, KINDS, DivergenceOutput
from .ops.engines import divergence_engine
from .tensors import plain, refuse_transforms
from .validation import check_integer, check_names, check_number

if TYPE_CHECKING:
    from .typed import Group


def linear_divergence(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    ref_hidden: Tensor,  # [..., H_ref]
    ref_weight: Tensor,  # [V, H_ref]
    labels_or_mask: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    *,
    kind: str = "forward_kl",
    jsd_beta: float = 0.5,
    stats: tuple[str, ...] = (),
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ref_logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | str | None = None,
    backward: str = "routed",
    tau: float | tuple[float, float] | None = None,
    seed: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_group: Group | None = None,
    check_labels: bool = False,
    accumulate_into: str | None = None,
) -> DivergenceOutput:
    """The divergence of every token's next-token distribution from a frozen teacher's, without the logits of either.

    Equivalent to::

        p = logits(hidden, weight, bias, ...).log_softmax(-1)  # the student's, as in linear_logps
        r = logits(ref_hidden, ref_weight, ref_bias, ...).log_softmax(-1)
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
        m = torch.logaddexp(p + log(1 - jsd_beta), r + log(jsd_beta))
        divergence = {
            "forward_kl": kl(r, p),
            "reverse_kl": kl(p, r),
            "jsd": jsd_beta * kl(r, m) + (1 - jsd_beta) * kl(p, m),
        }[kind]

    Args:
        hidden: ``[..., H]`` fp32, bf16 or fp16 last hidden states of the student, aligned with `labels_or_mask`.
        weight: ``[V, H]`` the student's lm_head.
        ref_hidden: ``[..., H_ref]`` the teacher's hidden states of the same tokens; H_ref may differ from H.
        ref_weight: ``[V, H_ref]`` the teacher's lm_head. Nothing of the teacher's gets a gradient.
        labels_or_mask: ``[...]`` int64 (or int32) token ids, where rows equal to `ignore_index` are never read; or a
            bool mask, True where a row counts. Divergence and entropy do not depend on the ids, but for rounding:
            with them the gradient of a sure token keeps its relative precision.
        bias, ref_bias: ``[V]`` or None.
        kind: ``"forward_kl"``, KL(teacher || student); ``"reverse_kl"``, KL(student || teacher); ``"jsd"``, the
            generalised Jensen-Shannon divergence with the mixture ``(1 - jsd_beta) p + jsd_beta r``.
        jsd_beta: of ``"jsd"``, in [0, 1]; 0 is ``"forward_kl"`` and 1 ``"reverse_kl"``, as TRL's ``beta``.
        stats: what else of the same read of the logits: ``"entropy"`` of the student, ``"logps"`` and ``"ref_logps"``,
            the label's log-prob of student and teacher, for which `labels_or_mask` has to be labels.
        logit_scale, softcap: of the student's logits, as in `linear_logps`; ref_logit_scale, ref_softcap: of the
            teacher's.
        temperature: divides both heads' logits; the divergence is not multiplied by its square.
        vocab_size: how many ids both heads have, where they have rows for padding too: the first so many are compared,
            and the rest belongs to neither distribution. ``"common"``: as many as the smaller head has. None: the
            heads have the same number of rows, or the call is refused.
        backward, tau, seed, lora, ignore_index, check_labels, accumulate_into: as in `linear_logps`, of the student.
            `tau`: a block's share of the sum of ``|dz|``, and of the tail where ``"logps"`` is asked for, below which
            it is sampled; None: 2**-9, with ``"logps"`` that of `linear_logps`.
        vocab_group: as in `linear_logps`: both heads are split alike, by rows, and hidden states and labels are the
            same on every rank; not with the Triton engine yet.

    Returns:
        DivergenceOutput(divergence, entropy, logps, ref_logps), fp32 (fp64 for fp64 inputs), nats, shaped like
        `labels_or_mask`; 0 where ignored, None for what `stats` leaves out. `divergence`, `entropy` (which takes the
        exact backward) and `logps` are differentiable.

    Raises:
        ValueError, TypeError: naming the argument and its value.
        NotImplementedError: for `vocab_group` with the Triton engine.

    Guarantees:
        As `linear_logps`. The forward reads each head once for the KL divergences and twice for ``"jsd"``. A token
        whose teacher gives an id probability where the student has none at all (a logit of -inf) has an infinite
        ``"forward_kl"``. The routed gradient is unbiased, and its error relative to a token's own gradient, also where
        student and teacher nearly agree: fastdpo/ops/divergence/problem.py.

    Source: generalised JSD, Agarwal et al., arXiv 2306.13649, eq. 1, with the ends and the mixture of
        TRL's `beta`; routed: fastdpo/routing.py.
    """
    arguments = (hidden, weight, ref_hidden, ref_weight, labels_or_mask, bias, ref_bias, lora)
    kind, jsd_beta = check_kind(kind, jsd_beta)
    stats = check_names("stats", stats, DIVERGENCE_STATS)
    options = HeadOptions(
        ignore_index, logit_scale, softcap, temperature, backward, tau, seed, vocab_group, check_labels, accumulate_into
    )
    ref_options = HeadOptions(logit_scale=ref_logit_scale, softcap=ref_softcap, temperature=temperature)
    settings = (kind, jsd_beta, stats, options, ref_options.transform)
    return token_divergence(arguments, vocab_size, settings)


def check_kind(kind, jsd_beta) -> tuple[str, float]:
    """(kind, jsd_beta), the ends of the generalised JSD by their own names."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if type(jsd_beta) is not float or jsd_beta != 0.5:
        jsd_beta = check_number("jsd_beta", jsd_beta, 0)
        if jsd_beta > 1:
            raise ValueError(f"jsd_beta must lie in [0, 1]; got {jsd_beta}")
        if kind != "jsd":
            raise ValueError(f"jsd_beta belongs to kind='jsd'; got {jsd_beta} with {kind!r}")
    return (KINDS[int(jsd_beta)] if kind == "jsd" and jsd_beta in (0.0, 1.0) else kind), jsd_beta


def token_divergence(arguments, vocab_size, settings, function=LinearDivergenceFunction) -> DivergenceOutput:
    """The one door: the tensors of `linear_divergence` are checked here, what else it takes is.

    `function`: where a trainer's head needs care in the backward.
    """
    lora = arguments[7]
    factors = lora if isinstance(lora, (tuple, list)) else ()
    refuse_transforms(function.of, *arguments[:7], *factors)
    kind, beta, stats, options, ref_transform = settings
    if options.tau is None and options.backward == "routed" and "logps" not in stats:
        options = replace(options, tau=DIVERGENCE_TAU)
    if options.vocab_group is not None:
        return eager(_of_ranks, arguments, vocab_size, settings, options, function)
    call, teacher, options = _checked(arguments, vocab_size, (kind, beta, stats, options, ref_transform))
    return divergence(call, teacher, options, function)


def reference_divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    *,
    options: HeadOptions,
    stats: tuple[str, ...],
) -> DivergenceOutput:
    """KL(reference || policy) of two heads with the same options, which are checked."""
    arguments = (hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, lora)
    return token_divergence(arguments, None, ("forward_kl", 0.5, stats, options, options.transform))


def _of_ranks(arguments, vocab_size, settings, head: HeadOptions, function) -> DivergenceOutput:
    """A call whose heads are both split over the ranks of a group."""
    kind, beta, stats, _, ref_transform = settings
    with announcing(head.vocab_group, arguments[0]):
        if vocab_size is not None:
            raise ValueError(f"vocab_size is of whole heads: cut them before they are split; got {vocab_size!r}")
        call, teacher, options = _checked(arguments, None, (kind, beta, stats, head, ref_transform))
        device, dtype = call.tensors[0].device, call.tensors[0].dtype
        if divergence_engine(device, dtype).name == "triton":
            raise NotImplementedError(
                "vocab_group: the Triton engine's divergence does not serve heads split over ranks"
            )
    fields = {
        "kind": options.kind,
        "jsd_beta": beta,
        "labels_or_mask": "labels" if options.labelled else "a mask",
        "ref_logit_scale": ref_transform.scale,
        "ref_softcap": ref_transform.softcap,
    }
    agreed = agree(call, head, stats, options.differentiable, Teacher(teacher, fields))
    return divergence(call, teacher, options, function, agreed)


def _checked(arguments, vocab_size, settings) -> tuple[CheckedHead, CheckedHead, Options]:
    hidden, weight, ref_hidden, ref_weight, labels_or_mask, bias, ref_bias, lora = arguments
    kind, beta, stats, options, ref_transform = settings
    labels, labelled = _labels(labels_or_mask, hidden, options, stats)
    heads = (weight, bias, lora), (ref_weight, ref_bias, None)
    (weight, bias, lora), (ref_weight, ref_bias, _) = _common(heads, vocab_size)
    call = check_head(hidden, weight, labels, bias, lora, options)
    plain_teacher = [None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)]
    ref_hidden, ref_weight, ref_bias = plain_teacher
    teacher = check_head(ref_hidden, ref_weight, labels, ref_bias, None, HeadOptions(), prefix="ref_")
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden is on {ref_hidden.device} but hidden is on {hidden.device}")
    if (ref_hidden.dtype is torch.float64) != (hidden.dtype is torch.float64):
        raise TypeError(
            "fp64 is for checking: hidden and ref_hidden must both be fp64 or neither; got "
            f"{hidden.dtype} and {ref_hidden.dtype}"
        )
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in call.tensors)
    options = Options(kind, beta, labelled, stats, options, ref_transform, differentiable, call.lora_scale)
    return call, teacher, options


def _labels(labels_or_mask, hidden, options: HeadOptions, stats) -> tuple[Tensor, bool]:
    """(labels, whether they are ids: of a mask they are 0 where a row counts)."""
    given = plain("labels_or_mask", labels_or_mask)
    rows = plain("hidden", hidden).shape[:-1]
    if given.shape != rows:
        shapes = f"{tuple(rows)}; got {tuple(given.shape)}"
        raise ValueError(f"labels_or_mask must have one entry for each row of hidden, {shapes}")
    if given.dtype != torch.bool:
        return given, True
    without = [name for name in stats if name in ("logps", "ref_logps")]
    if without:
        raise ValueError(f"stats {without} are of labels; labels_or_mask is a mask")
    if options.ignore_index == 0:
        return torch.where(given, 1, 0), False
    return torch.where(given, 0, options.ignore_index), False


def _common(heads, vocab_size) -> list:
    """The (weight, bias, lora) of both heads, of the ids that both have."""
    for name, (weight, *_) in zip(("weight", "ref_weight"), heads):
        if plain(name, weight).ndim != 2:
            raise ValueError(f"{name} must be [V, H]; got shape {tuple(weight.shape)}")
    rows = [weight.shape[0] for weight, *_ in heads]
    if vocab_size is None:
        if rows[0] != rows[1]:
            raise ValueError(
                f"weight has V = {rows[0]} but ref_weight has V = {rows[1]}: if the ids that both have mean the same "
                "tokens and the rest is padding, say so by vocab_size='common', or how many they are"
            )
        return list(heads)
    if vocab_size == "common":
        vocab_size = min(rows)
    elif isinstance(vocab_size, str):
        raise ValueError(f"vocab_size must be None, an int or 'common'; got {vocab_size!r}")
    vocab_size = check_integer("vocab_size", vocab_size, 1)
    if vocab_size > min(rows):
        raise ValueError(f"vocab_size must be at most the heads' {rows[0]} and {rows[1]} rows; got {vocab_size}")
    found = []
    for (weight, bias, lora), count in zip(heads, rows):
        if count != vocab_size:
            weight = weight[:vocab_size]
            if isinstance(bias, Tensor) and bias.shape == (count,):
                bias = bias[:vocab_size]
            if isinstance(lora, (tuple, list)) and len(lora) == 3 and isinstance(lora[1], Tensor):
                lora = (lora[0], lora[1][:vocab_size], lora[2])
        found.append((weight, bias, lora))
    return found
