"""Token level: log p(label) of every completion token from hidden states and the lm_head, without the logits.

    z[t, v] = hidden[t] . weight[v]      logp[t] = z[t, label] - log sum_v exp z[t, v]
    dz[t, v] = coef[t] * (1[v = label] - p[t, v])     dhidden = dz @ weight     dweight = dz.T @ hidden

The routed backward computes only the (token, block) pairs that routing.py keeps. The logits, [N, V], never exist.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import apply, once_differentiable
from .distributed import VocabShards
from .ops import engine_for
from .ops.problem import STATS, Forward, Head, Needs, Tokens, Upstream
from .routing import Routing, parse_tau
from .validation import HeadOptions, check_head, lora_scale


class TokenStats(NamedTuple):
    """Per token, shaped like `labels`, 0 (False) where ignored; a statistic that was not asked for is None."""

    logps: Tensor  # fp32, nats
    entropy: Tensor | None  # fp32, nats; differentiable
    mean_logit: Tensor | None  # fp32, mean of z over the vocabulary
    is_top1: Tensor | None  # bool, label == argmax z (first maximum, as torch.argmax)
    log_sum_sq_probs: Tensor | None  # fp32, log sum_v p[v]^2


def linear_logps(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backward: str = "routed",
    tau: float | tuple[float, float] | None = None,
    seed: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_group=None,
    check_labels: bool = False,
) -> Tensor:
    """Log-probability of each label under the language-model head, without materialising the logits.

    Equivalent to::

        z = torch.nn.functional.linear(hidden.float(), weight.float(), bias) * logit_scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        logps = (z / temperature).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        logps = logps.masked_fill(labels == ignore_index, 0.0)

    Args:
        hidden: ``[..., H]`` fp32, bf16 or fp16 last hidden states, already aligned with `labels` (shift before).
        weight: ``[V, H]`` the lm_head; may be of another floating type than `hidden`.
        labels: ``[...]`` int64 (or int32) token ids; rows equal to `ignore_index` are never read.
        bias: ``[V]`` or None.
        ignore_index: the label that marks prompt and padding.
        logit_scale: multiplies the logits (Cohere, Granite's 1 / logits_scaling, ...).
        softcap: ``c`` of ``c * tanh(z / c)``, applied after `logit_scale` (Gemma 2), or None.
        temperature: divides the logits last.
        backward: ``"routed"`` recomputes only the blocks of 128 columns that carry probability, with importance
            weights, so that the gradient is unbiased; ``"exact"`` recomputes all.
        tau: mass below which a block is sampled instead of always computed, in [0, 1]: one number, or two as
            ``(dhidden, dweight)``. None: the library's default.
        seed: key of the routed backward's draws, in [0, 2**64); None draws one from torch's generator, so
            ``torch.manual_seed`` and activation checkpointing repeat it.
        lora: ``(A [r, H], B [V, r], s)``: a low-rank update of the head, ``weight + s * B @ A``, never formed.
        vocab_group: a torch.distributed process group over which `weight` (and `bias`, and ``B``) are split along the
            vocabulary in rank order; `hidden` and `labels` are the same on every rank.
        check_labels: raise on an out-of-range label instead of returning NaN in its row (waits for the device).

    Returns:
        fp32 (fp64 for fp64 inputs), shaped like `labels`; 0 where ignored.

    Raises:
        ValueError, TypeError: naming the argument and its value.

    Guarantees:
        Logits are never rounded below fp32 before the log-sum-exp; all sums are fp32 or wider; gradients are rounded
        once. On the CPU results are bitwise repeatable for one seed. Out-of-range labels give NaN in their own row of
        the result and of `hidden`'s gradient and add nothing to the other gradients. Gradients are computed only for
        tensors that require them.

    Source: DPO's per-token log-probabilities, Rafailov et al., arXiv 2305.18290; the routed backward is DESIGN's.
    """
    options = HeadOptions(
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        backward=backward,
        tau=tau,
        seed=seed,
        lora_scale=lora_scale(lora),
        vocab_group=vocab_group,
        check_labels=check_labels,
    )
    return _token_stats(hidden, weight, labels, bias, lora, options, ()).logps


def linear_token_stats(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    *,
    stats: tuple[str, ...] = STATS,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    backward: str = "routed",
    tau: float | tuple[float, float] | None = None,
    seed: int | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    vocab_group=None,
    check_labels: bool = False,
) -> TokenStats:
    """`linear_logps` and, in the same read of the logits, what trainers log about each token's distribution.

    Equivalent to::

        logp = z.log_softmax(-1)                            # z, the logits, as in linear_logps
        entropy = -(logp.exp() * logp).sum(-1)
        mean_logit = z.mean(-1)
        is_top1 = z.argmax(-1) == labels
        log_sum_sq_probs = (2 * logp).logsumexp(-1)

    Args:
        stats: which of ``"entropy"``, ``"mean_logit"``, ``"is_top1"``, ``"log_sum_sq_probs"`` to compute.
        Everything else: as in `linear_logps`.

    Returns:
        TokenStats, each tensor shaped like `labels`, 0 or False where ignored; None for what `stats` leaves out.

    Raises:
        ValueError, TypeError: naming the argument and its value.

    Guarantees:
        As `linear_logps`. `logps` and `entropy` are differentiable (an upstream gradient of `entropy` takes the exact
        backward); the others are not.

    Source: mean of log sum p^2 is WPO's weight, Zhou et al., arXiv 2406.11827, eq. 2.
    """
    if isinstance(stats, str) or not all(name in STATS for name in stats):
        raise ValueError(f"stats must be a collection of names among {STATS}; got {stats!r}")
    options = HeadOptions(
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        backward=backward,
        tau=tau,
        seed=seed,
        lora_scale=lora_scale(lora),
        vocab_group=vocab_group,
        check_labels=check_labels,
    )
    return _token_stats(hidden, weight, labels, bias, lora, options, tuple(stats))


def _token_stats(hidden, weight, labels, bias, lora, options: HeadOptions, stats: tuple[str, ...]) -> TokenStats:
    lora_a, lora_b = (None, None) if lora is None else lora[:2]
    check_head(hidden, weight, labels, bias, lora_a, lora_b, options)
    # Inside an autograd Function grad mode is off and needs_input_grad is True even under no_grad: look here.
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias, lora_a, lora_b)
    )
    outputs = apply(
        LinearLogpsFunction, hidden, weight, bias, lora_a, lora_b, labels.reshape(-1), options, stats, differentiable
    )
    return TokenStats(*(None if x is None else x.view(labels.shape) for x in outputs))


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would multiply in: the autocast type, or the common type of both."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class LinearLogpsFunction(torch.autograd.Function):
    """Autograd for `linear_token_stats`: ``apply(hidden [..., H], weight, bias, lora_a, lora_b, labels [N],
    HeadOptions, stats, differentiable)`` returns the five tensors of TokenStats, flat, None where not asked for.

    Saved besides the inputs: per completion token its label, row, logp, lse and one bit per block.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, labels, options, stats, differentiable):
        ctx.set_materialize_grads(False)
        shards = VocabShards.of(options.vocab_group, weight)
        flat_hidden, source_rows = _as_rows(hidden)
        tokens, invalid = _completion_tokens(labels, options.ignore_index, shards, source_rows)
        needs = Needs(*(differentiable and need for need in ctx.needs_input_grad[:5]))
        routing = None
        if needs and options.backward == "routed":
            tau_hidden, tau_weight = parse_tau(options.tau)
            seed = options.seed if options.seed is not None else shards.common_seed(_draw_seed())
            routing = Routing(tau_hidden if needs.of_hidden else -1.0, tau_weight if needs.of_weight else -1.0, seed)
        head = Head(
            flat_hidden,
            weight if weight.stride(-1) == 1 else weight.contiguous(),
            bias,
            lora_a,
            lora_b,
            options.lora_scale,
            options.logit_scale,
            options.softcap or 0.0,
            options.temperature,
            _compute_dtype(hidden, weight),
            shards.first_block,
        )
        engine = engine_for(hidden.device, hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # compute_dtype says it; the sums stay fp32
            result = engine.forward(
                head,
                tokens,
                stats=frozenset(stats),
                routing=routing,
                shards=shards if shards.size > 1 else None,
            )
        if needs:
            ctx.save_for_backward(
                head.hidden, head.weight, bias, lora_a, lora_b, tokens.labels, tokens.rows, tokens.source_rows, invalid,
                result.logps, result.lse, result.entropy, result.bitmap,
            )  # fmt: skip
            ctx.head, ctx.routing, ctx.needs, ctx.shards = _without_tensors(head), routing, needs, shards
            ctx.hidden_shape, ctx.weight_shape = hidden.shape, weight.shape

        outputs = {
            name: None if values is None else _spread(values, tokens, invalid, labels.shape[0])
            for name in ("logps", *STATS)
            for values in (getattr(result, name),)
        }
        constants = (outputs[name] for name in ("mean_logit", "is_top1", "log_sum_sq_probs"))
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))  # a second call would undo a first
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps, dentropy, *_):
        hidden, weight, bias, lora_a, lora_b, labels, rows, source_rows, invalid, *saved = ctx.saved_tensors
        logps, lse, entropy, bitmap = saved
        needs, routing = ctx.needs, ctx.routing
        if dlogps is None and dentropy is None:
            return (None,) * 9
        if weight.shape != ctx.weight_shape:  # its storage was released, as by ZeRO-3 after a gather
            raise RuntimeError(
                f"weight had shape {tuple(ctx.weight_shape)} in the forward and has {tuple(weight.shape)} in the "
                "backward: keep a sharded head gathered until the backward is done"
            )
        head = ctx.head.replace(hidden=hidden, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b)
        tokens = Tokens(labels, rows, source_rows, ctx.hidden_shape[:-1].numel())

        def compact(upstream: Tensor | None) -> Tensor | None:
            if upstream is None:
                return None
            upstream = upstream.to(logps.dtype)
            return (upstream if rows is None else upstream[rows]).contiguous()

        upstream = Upstream(compact(dlogps), compact(dentropy))
        if upstream.coef is None:
            upstream = Upstream(torch.zeros_like(logps), upstream.coef_entropy)
        saved = Forward(logps, lse, entropy=entropy, bitmap=bitmap)
        if upstream.coef_entropy is not None:
            routing = None
        if routing is None:
            tokens, saved, upstream = _with_gradient(tokens, saved, upstream)
        engine = engine_for(hidden.device, hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            grads = engine.backward(head, tokens, saved, upstream, routing, needs)
        ctx.shards.reduce(grads)
        if invalid is not None and grads.hidden is not None:
            grads.hidden[invalid] = torch.nan
        dhidden = None if grads.hidden is None else grads.hidden.view(ctx.hidden_shape)
        return dhidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b, None, None, None, None


def _draw_seed() -> int:
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


def _without_tensors(head: Head) -> Head:
    # ctx keeps tensors only through save_for_backward, which watches for in-place changes and reference cycles
    return head.replace(hidden=None, weight=None, bias=None, lora_a=None, lora_b=None)


def _as_rows(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """([*, H] with contiguous rows, row of it per flat row of `hidden` or None when they are the same).

    The usual slice ``hidden[:, :-1]`` has no flat view, but its rows lie at whole multiples of one stride: address
    them there instead of copying.
    """
    size = hidden.shape[-1]
    if hidden.ndim <= 2 or hidden.is_contiguous():
        return hidden.reshape(-1, size).contiguous(), None
    step = hidden.stride(-2)
    aligned = hidden.stride(-1) == 1 and step >= size and all(stride % step == 0 for stride in hidden.stride()[:-1])
    if not aligned or hidden.numel() == 0:
        return hidden.reshape(-1, size), None
    rows = torch.zeros((), dtype=torch.int64, device=hidden.device)
    last = 0
    for length, stride in zip(hidden.shape[:-1], hidden.stride()[:-1]):
        rows = rows[..., None] + torch.arange(length, device=hidden.device) * (stride // step)
        last += (length - 1) * (stride // step)
    return hidden.as_strided((last + 1, size), (step, 1)), rows.reshape(-1)


def _completion_tokens(
    labels: Tensor, ignore_index: int, shards: VocabShards, source_rows: Tensor | None
) -> tuple[Tokens, Tensor | None]:
    """(tokens to score, rows whose label is out of range or None)."""
    ignored = labels == ignore_index
    out_of_range = ((labels < 0) | (labels >= shards.vocab_size)) & ~ignored
    invalid = out_of_range.nonzero()[:, 0] if out_of_range.any() else None
    skipped = ignored | out_of_range
    rows = (~skipped).nonzero()[:, 0] if skipped.any() else None
    kept = labels if rows is None else labels[rows]
    if source_rows is None:
        source_rows = rows
    elif rows is not None:
        source_rows = source_rows[rows]
    return Tokens(kept.long() - shards.vocab_start, rows, source_rows, labels.shape[0]), invalid


def _with_gradient(tokens: Tokens, saved: Forward, upstream: Upstream) -> tuple[Tokens, Forward, Upstream]:
    """Only the tokens with an upstream gradient: the exact backward of the others is zero."""
    active = upstream.coef != 0
    if upstream.coef_entropy is not None:
        active |= upstream.coef_entropy != 0
    if active.all():
        return tokens, saved, upstream
    keep = active.nonzero()[:, 0]

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[keep]

    def pick_rows(rows: Tensor | None) -> Tensor:
        return keep if rows is None else rows[keep]

    return (
        Tokens(tokens.labels[keep], pick_rows(tokens.rows), pick_rows(tokens.source_rows), tokens.num_rows),
        Forward(saved.logps[keep], saved.lse[keep], entropy=pick(saved.entropy)),
        Upstream(upstream.coef[keep], pick(upstream.coef_entropy)),
    )


def _spread(values: Tensor, tokens: Tokens, invalid: Tensor | None, count: int) -> Tensor:
    """Per-token values -> per row of hidden: 0 where ignored, NaN (False) where the label is out of range."""
    if tokens.rows is None and invalid is None:
        return values
    out = values.new_zeros(count)
    out[tokens.rows] = values
    if invalid is not None and values.is_floating_point():
        out[invalid] = torch.nan
    return out
