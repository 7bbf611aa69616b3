"""Token level: log p(label) of every completion token from hidden states and the lm_head, without the logits.

    z[t, v] = hidden[t] . weight[v]      logp[t] = z[t, label] - log sum_v exp z[t, v]
    dz[t, v] = coef[t] * (1[v = label] - p[t, v])     dhidden = dz @ weight     dweight = dz.T @ hidden

The routed backward computes only the (token, block) pairs that routing.py keeps. The logits, [N, V], never exist.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import Function, apply, once_differentiable, refuse_transforms
from .distributed import VocabShards
from .ops import operators as library
from .ops.problem import STATS, Forward, Head, LogitTransform, LoRA, Needs, Rows
from .routing import Routing, parse_tau
from .validation import HeadOptions, check_head, check_names, lora_scale


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
        backward: ``"routed"`` recomputes the blocks of 128 columns that carry a token's gradient and a weighted sample
            of the others, so that the gradient is unbiased; ``"exact"`` recomputes all.
        tau: the share of a token's tail (its distribution over all ids but the label) below which a block is sampled
            instead of always computed, in [0, 1]: one number, or two as ``(dhidden, dweight)``. None: 2**-10, or 2**-9
            where the head takes no gradient.
        seed: key of the routed backward's draws, in [0, 2**64); None draws one from torch's generator of the device
            in every call but under ``torch.inference_mode``, so that ``torch.manual_seed`` and activation checkpointing
            of either kind repeat it.
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
        once. Tensors may have any strides; one that does not keep its values in strided memory (DTensor, quantized,
        sparse, nested, subclasses with operations of their own) is refused. On the CPU results are bitwise repeatable
        for one seed. Out-of-range labels give NaN in their own row of the result and of `hidden`'s gradient and add
        nothing to the other gradients. Gradients are computed only for tensors that require them. Without
        `check_labels` and `vocab_group` a call is one operator to torch.compile, and nothing waits for a GPU on the way
        to its engine.

    Source: DPO's per-token log-probabilities, Rafailov et al., arXiv 2305.18290; routed: fastdpo/routing.py.
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
        backward); the others are not. An `entropy` that leaves a compiled function counts as having an upstream
        gradient: detach one that is only logged.

    Source: mean of log sum p^2 is WPO's weight, Zhou et al., arXiv 2406.11827, eq. 2.
    """
    stats = check_names("stats", stats, STATS)
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
    return _token_stats(hidden, weight, labels, bias, lora, options, stats)


def _token_stats(hidden, weight, labels, bias, lora, options: HeadOptions, stats: tuple[str, ...]) -> TokenStats:
    lora_a, lora_b = (None, None) if lora is None else lora[:2]
    refuse_transforms("fastdpo.linear_logps", hidden, weight, bias, lora_a, lora_b)
    hidden, weight, labels, bias, lora_a, lora_b = check_head(hidden, weight, labels, bias, lora_a, lora_b, options)
    inputs = (hidden, weight, bias, lora_a, lora_b)
    # Inside an autograd Function grad mode is off and needs_input_grad is True even under no_grad: look here.
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    flat_labels = labels.reshape(-1)
    if torch.compiler.is_compiling() and options.vocab_group is None:
        needs = Needs(*(differentiable and x is not None and x.requires_grad for x in inputs))
        problem = _problem(*inputs, flat_labels, options, needs, VocabShards.of(None, weight))
        outputs = _outputs(library.token_stats(*problem, frozenset(stats)))
    else:
        outputs = apply(LinearLogpsFunction, *inputs, flat_labels, options, stats, differentiable)
    return TokenStats(*(None if x is None else x.view(labels.shape) for x in outputs))


def _problem(
    hidden, weight, bias, lora_a, lora_b, labels, options: HeadOptions, needs: Needs, shards: VocabShards
) -> tuple[Head, Rows, Routing | None]:
    """What an engine takes; routed when a gradient is needed, unless the options say otherwise."""
    routing, seed = None, _seed(options, hidden.device)
    if needs and options.backward == "routed":
        tau_hidden, tau_weight = parse_tau(options.tau, needs.of_weight)
        seed = shards.common_seed(seed)
        routing = Routing(tau_hidden if needs.of_hidden else -1.0, tau_weight if needs.of_weight else -1.0, seed)
    head = Head(
        hidden,
        weight,
        bias,
        None if lora_a is None else LoRA(lora_a, lora_b, options.lora_scale),
        LogitTransform(options.logit_scale, options.softcap or 0.0, options.temperature),
        _compute_dtype(hidden, weight),
    )
    return head, Rows(labels, options.ignore_index, shards.vocab_start, shards.vocab_size), routing


def _seed(options: HeadOptions, device: torch.device) -> Tensor | None:
    """The key's 64 bits as a 0-d int64 on the device.

    A key is drawn without grad mode too: the first pass of reentrant checkpointing has none, and what it does not draw
    never advances the generator, which the recomputation sets back; every step would repeat the first one's key.
    """
    if options.backward == "exact":
        return None
    if options.seed is not None:
        seed = options.seed
        return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return None
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def _outputs(result: Forward) -> tuple[Tensor | None, ...]:
    """In the order of TokenStats."""
    return result.logps, result.entropy, result.mean_logit, result.is_top1, result.log_sum_sq_probs


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What F.linear would multiply in: the autocast type, or the common type of both."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class LinearLogpsFunction(Function):
    """Autograd for `linear_token_stats`: ``apply(hidden [..., H], weight, bias, lora_a, lora_b, labels [N],
    HeadOptions, stats, differentiable)`` returns the five tensors of TokenStats, flat, None where not asked for.

    Saved besides the inputs, per row: logp, lse and, routed, one bit per block.
    """

    of = "fastdpo.linear_logps"

    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, labels, options, stats, differentiable):
        ctx.set_materialize_grads(False)
        shards = VocabShards.of(options.vocab_group, weight)
        needs = Needs(*(differentiable and need for need in ctx.needs_input_grad[:5]))
        inputs = (hidden, weight, bias, lora_a, lora_b)
        head, rows, routing = _problem(*inputs, labels, options, needs, shards)
        group = shards if shards.size > 1 else None
        result = library.forward(head, rows, stats=frozenset(stats), routing=routing, shards=group)
        if needs:
            # copies: the caller may change in place what is returned
            logps, entropy = (None if x is None else x.clone() for x in (result.logps, result.entropy))
            ctx.save_for_backward(*inputs, labels, logps, result.lse, entropy, result.bitmap, result.most_pairs)
            ctx.needs, ctx.shards, ctx.weight_shape = needs, shards, weight.shape
            # ctx keeps tensors only through save_for_backward, which watches for in-place changes and cycles
            ctx.head = head.replace(hidden=None, weight=None, bias=None, lora=None)
            ctx.lora_scale = None if head.lora is None else head.lora.scale
            ctx.rows = replace(rows, labels=None)
            ctx.routing = None if routing is None else replace(routing, seed=None)
        constants = (result.mean_logit, result.is_top1, result.log_sum_sq_probs)
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))  # a second call would undo a first
        return _outputs(result)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogps, dentropy, *_):
        if dlogps is None and dentropy is None:
            return (None,) * 9
        hidden, weight, bias, lora_a, lora_b, labels, *saved = ctx.saved_tensors
        if weight.shape != ctx.weight_shape:  # its storage was released, as by ZeRO-3 after a gather
            raise RuntimeError(
                f"weight had shape {tuple(ctx.weight_shape)} in the forward and has {tuple(weight.shape)} in the "
                "backward: keep a sharded head gathered until the backward is done"
            )
        lora = None if lora_a is None else LoRA(lora_a, lora_b, ctx.lora_scale)
        head = ctx.head.replace(hidden=hidden, weight=weight, bias=bias, lora=lora)
        rows = replace(ctx.rows, labels=labels)
        logps, lse, entropy, bitmap, most_pairs = saved
        saved = Forward(logps, lse, entropy=entropy, bitmap=bitmap, most_pairs=most_pairs)
        grads = library.backward(head, rows, saved, dlogps, dentropy, ctx.routing, ctx.needs)
        ctx.shards.reduce(grads)
        return grads.hidden, grads.weight, grads.bias, grads.lora_a, grads.lora_b, None, None, None, None
