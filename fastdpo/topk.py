"""Distillation from the ids that a teacher found most likely, with their log-probs: top-k teachers, and servers that
send no more. The log-probs of a row's K ids come from one sweep of the student's head: linear_logps with labels [N, K].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distributed.handshake import announcing
from .divergence import check_kind
from .head import HeadOptions
from .logps import token_stats
from .tensors import plain, refuse_transforms
from .validation import FLOATS

if TYPE_CHECKING:
    from .typed import Group

TAILS = ("bucket", "renormalize")
# The teacher's log-probs are rounded, so that what they leave of 1 is known no better than this; TRL's bound too
LEAST_TAIL = 1e-7


def topk_divergence(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    topk_ids: Tensor,  # [..., K]
    topk_logps: Tensor,  # [..., K]
    bias: Tensor | None = None,  # [V]
    *,
    tail: str = "bucket",
    kind: str = "forward_kl",
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backward: str = "routed",
    tau: float | tuple[float, float] | None = None,
    seed: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_group: Group | None = None,
    check_labels: bool = False,
    accumulate_into: str | None = None,
) -> Tensor:
    """The divergence of every token's distribution from a teacher's that is known at K ids, without the logits.

    Equivalent to::

        p = logits(hidden, weight, bias, ...).log_softmax(-1).gather(-1, topk_ids)  # the student's, as in linear_logps
        r = topk_logps
        if tail == "bucket":  # all other ids are one more
            p, r = (torch.cat((x, (1 - x.exp().sum(-1, keepdim=True)).log()), -1) for x in (p, r))
        else:
            p, r = (x.log_softmax(-1) for x in (p, r))
        kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
        m = torch.logaddexp(p + log(1 - jsd_beta), r + log(jsd_beta))
        divergence = {
            "forward_kl": kl(r, p),
            "reverse_kl": kl(p, r),
            "jsd": jsd_beta * kl(r, m) + (1 - jsd_beta) * kl(p, m),
        }[kind]

    Args:
        hidden: ``[..., H]`` fp32, bf16 or fp16 last hidden states of the student, aligned with `topk_ids`.
        weight: ``[V, H]`` the student's lm_head.
        topk_ids: ``[..., K]`` int64 (or int32), different ones in a row. An entry of `ignore_index` (-100), or with a
            `topk_logps` of -inf, is padding: rows may have fewer ids, and one that has none is never read.
        topk_logps: ``[..., K]`` of any floating type: the teacher's log-probs of them over its whole vocabulary, at the
            temperature that the student's are compared at. No gradient goes to it.
        bias: ``[V]`` or None.
        tail: ``"bucket"``: the ids that are not listed are one more, with the probability that the others leave (TRL's
            ``loss_add_tail=True``); ``"renormalize"``: both distributions are those among the listed ids.
        kind: ``"forward_kl"``, KL(teacher || student); ``"reverse_kl"``, KL(student || teacher); ``"jsd"``, the
            generalised Jensen-Shannon divergence with the mixture ``(1 - jsd_beta) p + jsd_beta r``.
        jsd_beta: of ``"jsd"``, in [0, 1]; 0 is ``"forward_kl"`` and 1 ``"reverse_kl"``, as TRL's ``beta``.
        Everything else: as in `linear_logps`.

    Returns:
        fp32 (fp64 for fp64 inputs), nats, shaped like `topk_ids` without its last dimension; 0 where a row has no id,
        NaN where one is out of range.

    Raises:
        ValueError, TypeError: naming the argument and its value.

    Guarantees:
        As `linear_logps` with ``[..., K]`` labels. The student's tail is what its largest listed probability leaves, in
        full precision, less the others: of it 2**-23 at least, and 1e-38, where it has no gradient any more. The
        teacher's is at least 1e-7, below which rounded log-probs do not tell. Ids that are listed twice count twice.

    Source: top-k distillation as in TRL's ServerDistillationTrainer; generalised JSD, Agarwal et al., arXiv 2306.13649.
    """
    factors = lora if isinstance(lora, (tuple, list)) else ()
    refuse_transforms("fastdpo.topk_divergence", hidden, weight, bias, topk_logps, *factors)
    options = HeadOptions(
        ignore_index, logit_scale, softcap, temperature, backward, tau, seed, vocab_group, check_labels, accumulate_into
    )
    with announcing(options.vocab_group, hidden):
        kind, jsd_beta = check_kind(kind, jsd_beta)
        if tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {tail!r}")
        ids, given = _checked(hidden, topk_ids, topk_logps)
        ids = ids.masked_fill(given == -torch.inf, ignore_index)
    p = token_stats(hidden, weight, ids, bias=bias, lora=lora, options=options).logps
    counts = ids != ignore_index
    # Of an id out of range, or a NaN in hidden: it stays in its row, and out of the head's gradient.
    wrong = (p.detach().isnan() & counts).any(-1, keepdim=True)
    counts, nan = counts & ~wrong, torch.where(wrong[..., 0], torch.nan, 0.0).to(p.dtype)
    r = given.detach().to(p.dtype)
    p = p.masked_fill(~counts, 0.0)
    p, r, counts = (_bucketed if tail == "bucket" else _renormalized)(p, r, counts)
    terms = _terms(p.masked_fill(~counts, 0.0), r.masked_fill(~counts, 0.0), kind, jsd_beta)
    return terms.masked_fill(~counts, 0.0).sum(-1) + nan


def _checked(hidden, topk_ids, topk_logps) -> tuple[Tensor, Tensor]:
    ids, given = plain("topk_ids", topk_ids), plain("topk_logps", topk_logps)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"topk_ids must be int64 or int32 token ids; got {ids.dtype}")
    if given.dtype not in FLOATS:
        raise TypeError(f"topk_logps must be fp32, bf16, fp16 or fp64; got {given.dtype}")
    rows = hidden.shape[:-1] if isinstance(hidden, Tensor) else ids.shape[:-1]
    if ids.ndim < 1 or ids.shape[:-1] != rows or ids.shape[-1] == 0:
        raise ValueError(f"topk_ids must have K > 0 ids for each row of hidden, {(*rows, 'K')}; got {tuple(ids.shape)}")
    if given.shape != ids.shape:
        raise ValueError(f"topk_logps must be shaped like topk_ids, {tuple(ids.shape)}; got {tuple(given.shape)}")
    if given.device != ids.device:
        raise ValueError(f"topk_logps is on {given.device} but topk_ids is on {ids.device}")
    return ids, given


def _bucketed(p: Tensor, r: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With one more entry for all ids that are not listed, where any is."""
    largest = p.detach().masked_fill(~counts, -torch.inf).argmax(-1, keepdim=True)
    most = p.gather(-1, largest)
    others = p.exp().masked_fill(~counts | torch.zeros_like(counts).scatter_(-1, largest, True), 0.0)
    without = -torch.expm1(most)
    least = 2.0**-23 * without.detach() + torch.finfo(torch.float32).tiny
    p_tail = torch.maximum(without - others.sum(-1, keepdim=True), least).log()
    listed = r.masked_fill(~counts, -torch.inf).logsumexp(-1, keepdim=True)
    r_tail = torch.log(-torch.expm1(listed.clamp(max=-LEAST_TAIL)))
    any_id = counts.any(-1, keepdim=True)
    return torch.cat((p, p_tail), -1), torch.cat((r, r_tail), -1), torch.cat((counts, any_id), -1)


def _renormalized(p: Tensor, r: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    any_id = counts.any(-1, keepdim=True)

    def among(x: Tensor) -> Tensor:  # a row of -inf has no gradient
        return x - x.masked_fill(~counts & any_id, -torch.inf).logsumexp(-1, keepdim=True)

    return among(p), among(r), counts


def _terms(p: Tensor, r: Tensor, kind: str, beta: float) -> Tensor:
    def kl(a: Tensor, b: Tensor) -> Tensor:
        a = a.clamp(min=-200.0)  # 0 * -inf; exp(-200) is 0 in fp32
        return a.exp() * (a - b)

    if kind == "jsd":
        mixture = torch.logaddexp(p + math.log1p(-beta), r + math.log(beta))
        return beta * kl(r, mixture) + (1 - beta) * kl(p, mixture)
    return kl(r, p) if kind == "forward_kl" else kl(p, r)
