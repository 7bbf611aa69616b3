"""Token level: log p(label) of every completion token from hidden states and the lm_head, without the logits.

    z[t, v] = hidden[t] . weight[v]      logp[t] = z[t, label] - log sum_v exp z[t, v]
    dz[t, v] = coef[t] * (1[v = label] - p[t, v])     dhidden = dz @ weight     dweight = dz.T @ hidden

The routed backward computes only the (token, block) pairs that routing.py keeps. The logits, [N, V], never exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .autograd import Function, uncompiled
from .distributed import travel
from .distributed.dtensor import any_dtensor, resolve
from .distributed.handshake import announcing
from .head import CheckedHead, HeadOptions, check_head
from .ops.agreement import agree
from .ops.operators import LinearLogpsFunction, compiled
from .ops.problem import OF_LABELS, STATS, TokenStats
from .tensors import refuse_transforms
from .validation import check_names

if TYPE_CHECKING:
    from .typed import Group


def linear_logps(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...] or [..., K]
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
    vocab_group: Group | None = None,
    check_labels: bool = False,
    accumulate_into: str | None = None,
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
        labels: ``[...]`` int64 (or int32) token ids; rows equal to `ignore_index` are never read. Or ``[..., K]``,
            several ids of each row's distribution, which the same one read of the head serves: `ignore_index` may stand
            in single places, an id more than once in a row, and a row is not read where all of it is ignored.
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
        vocab_group: a torch.distributed process group, or a one-dimensional DeviceMesh, over which `weight` (and
            `bias`, and ``B``) are split along the vocabulary in rank order; `hidden` and `labels` are the same on every
            rank. Every rank gets all of the gradient of `hidden`, summed over the group already: a sum in a backward
            before it, as of Megatron's `copy_to_tensor_model_parallel_region`, would make it size times too large.
        check_labels: raise on an out-of-range label instead of returning NaN in its row (waits for the device).
        accumulate_into: ``"grad"`` or ``"main_grad"``: the backward adds the gradient of `weight`, a leaf, to this
            attribute of it in place, tile by tile, without a second ``[V, H]``; see fastdpo/accumulate.py.

    Returns:
        fp32 (fp64 for fp64 inputs), shaped like `labels`; 0 where ignored.

    DTensors: `hidden`, `labels`, `weight`, `bias` and `lora` may be. A weight that is ``Shard(0)`` is a shard of the
    vocabulary where its mesh dimension's ranks have the same tokens (tensor parallelism), without `vocab_group`; where
    each has its own (FSDP), the head is gathered for the call or, if fewer bytes move so, the tokens are brought to its
    shards. fastdpo/distributed/dtensor.py has the rules and what says whose tokens they are. Gradients arrive as
    DTensors of the sum of the ranks' losses; the result is plain, of this rank's rows.

    Raises:
        ValueError, TypeError: naming the argument and its value. With `vocab_group`, what the ranks were given is
            compared before anything else is exchanged, and so are the upstream gradients in the backward: a mismatch,
            or an argument that one rank refuses, is the same ValueError on every rank. (On a GPU the host waits for
            that where it has not seen a call of these shapes and options; in a known one a mismatch of the data gives
            NaN.)
        RuntimeError: a rank did not come, or failed in the middle, within the group's time-out; with its cause.

    Guarantees:
        Logits are never rounded below fp32 before the log-sum-exp; all sums are fp32 or wider; gradients are rounded
        once. Tensors may have any strides; one that does not keep its values in strided memory (quantized, sparse,
        nested, subclasses with operations of their own) is refused. On the CPU results are bitwise repeatable
        for one seed. A token's log-prob has the same bits whatever other tokens are in the call, as where training must
        match inference: on a GPU always, on the CPU under ``torch.use_deterministic_algorithms(True)``, where otherwise
        the last bits depend on how many there are (fp64 inputs, and the reference engine, do not promise it).
        Out-of-range labels give NaN in their own row of the result and of `hidden`'s gradient and add nothing to the
        other gradients; of K labels, NaN in their own place of the result. With K > 1 a weight in a half type has its
        gradient's rows of the labels rounded twice (the others, and all other gradients, once), a call takes some 40
        bytes more for each label, a head that is sharded over ranks with tokens of their own is always gathered, and
        what is sampled is the tail of a row's likeliest label. Gradients are computed only for tensors that require
        them. Without `check_labels` and `vocab_group` a call is one operator to torch.compile, and nothing waits for a
        GPU on the way to its engine.

    Source: DPO's per-token log-probabilities, Rafailov et al., arXiv 2305.18290; routed: fastdpo/routing.py.
    """
    options = HeadOptions(
        ignore_index, logit_scale, softcap, temperature, backward, tau, seed, vocab_group, check_labels, accumulate_into
    )
    return token_stats(hidden, weight, labels, bias=bias, lora=lora, options=options).logps


def linear_token_stats(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...] or [..., K]
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
    vocab_group: Group | None = None,
    check_labels: bool = False,
    accumulate_into: str | None = None,
) -> TokenStats:
    """`linear_logps` and, in the same read of the logits, what trainers log about each token's distribution.

    Equivalent to::

        logp = z.log_softmax(-1)                            # z, the logits, as in linear_logps
        entropy = -(logp.exp() * logp).sum(-1)
        mean_logit = z.mean(-1)
        is_top1 = z.argmax(-1) == labels
        log_sum_sq_probs = (2 * logp).logsumexp(-1)
        lse = z.logsumexp(-1)

    Args:
        stats: which fields of TokenStats to compute beside `logps`, by name; all by default.
        Everything else: as in `linear_logps`.

    Returns:
        TokenStats, each tensor shaped like `labels`, 0 or False where ignored; None for what `stats` leaves out. With
        labels ``[..., K]``, `logps` and `is_top1` are of each label (labels that tie within rounding: one of them), and
        the others, of a row's distribution, ``[...]``: 0 where all its labels are ignored, NaN where the rest is out of
        range.

    Raises:
        ValueError, TypeError: naming the argument and its value.

    Guarantees:
        As `linear_logps`. `logps`, `entropy` and `lse` are differentiable (an upstream gradient of `entropy` takes the
        exact backward; one of `lse`, as of a z-loss, is routed too); the others are not. An `entropy` that leaves a
        compiled function counts as having an upstream gradient: detach one that is only logged.

    Source: mean of log sum p^2 is WPO's weight, Zhou et al., arXiv 2406.11827, eq. 2.
    """
    stats = check_names("stats", stats, STATS)
    options = HeadOptions(
        ignore_index, logit_scale, softcap, temperature, backward, tau, seed, vocab_group, check_labels, accumulate_into
    )
    return token_stats(hidden, weight, labels, bias=bias, lora=lora, options=options, stats=stats)


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    options: HeadOptions,
    stats: tuple[str, ...] = (),
    function: type[LinearLogpsFunction] = LinearLogpsFunction,
) -> TokenStats:
    """The one door: what `linear_token_stats` computes, of tensors that are checked here and options that are.

    `function`: where a trainer's head needs care in the backward.
    """
    factors = lora if isinstance(lora, (tuple, list)) else ()
    refuse_transforms(function.of, hidden, weight, bias, *factors)
    if options.vocab_group is not None or any_dtensor(hidden, weight, labels, bias, *factors):
        arguments = (hidden, weight, labels, bias, lora, options, stats, function)
        return uncompiled(_of_ranks, *arguments) if torch.compiler.is_compiling() else _of_ranks(*arguments)
    call = check_head(hidden, weight, labels, bias, lora, options)
    differentiable = _differentiable(call)
    if not torch.compiler.is_compiling():
        outputs = _applied(function, call, options, stats, differentiable)
    elif options.accumulate_into is None:
        outputs = compiled(call, options, stats, differentiable)
    else:  # an operator returns gradients
        outputs = uncompiled(_applied, function, call, options, stats, differentiable)
    return _shaped(call, outputs)


def _of_ranks(hidden, weight, labels, bias, lora, options: HeadOptions, stats, function) -> TokenStats:
    """A call that other processes may take part in."""
    with announcing(options.vocab_group, hidden):
        given, plan = resolve(hidden, weight, labels, bias, lora, options)
    if plan is not None:
        if plan.may_travel(weight) and given.labels.ndim < given.hidden.ndim:
            stats_of_rows = travel.token_stats(given, plan, hidden, stats)
            if stats_of_rows is not None:
                return stats_of_rows
        given = plan.apply(given)
    options = given.options
    with announcing(options.vocab_group, given.hidden):
        call = check_head(given.hidden, given.weight, given.labels, given.bias, given.lora, options)
    differentiable = _differentiable(call)
    agreed = agree(call, options, stats, differentiable)
    return _shaped(call, _applied(function, call, options, stats, differentiable, agreed))


def _differentiable(call: CheckedHead) -> bool:
    # Inside an autograd Function grad mode is off and needs_input_grad is True even under no_grad: look here.
    differentiable = False
    if torch.is_grad_enabled():
        for x in call.tensors:
            differentiable = differentiable or (x is not None and x.requires_grad)
    return differentiable


def _applied(function, call: CheckedHead, options: HeadOptions, stats, differentiable: bool, agreed=None):
    apply = super(Function, function).apply  # torch's: the class's own checks again
    return apply(*call.tensors, options, stats, differentiable, call.lora_scale, agreed)


def _shaped(call: CheckedHead, outputs) -> TokenStats:
    rows, shaped = call.tensors[0].shape[:-1], []
    for name, x in zip(TokenStats._fields, outputs):
        shaped.append(None if x is None else x.view(call.shape if name in OF_LABELS else rows))
    return TokenStats(*shaped)
