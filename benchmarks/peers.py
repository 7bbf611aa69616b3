"""Every way to do one DPO step on the head, behind one signature: `step(problem)` -> (loss, dhidden, dweight).

A step is the policy's and the reference's log-probabilities, the sigmoid DPO loss and the backward into `hidden` and
`weight`. A peer that cannot run here raises `Unavailable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BETA = 0.1


class Unavailable(RuntimeError):
    pass


@dataclass
class Problem:
    hidden: Tensor  # [2B, T, H], requires grad; chosen sequences first
    weight: Tensor  # [V, H], requires grad (unless frozen)
    labels: Tensor  # [2B, T], -100 on the prompt
    ref_hidden: Tensor
    ref_weight: Tensor

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        self.hidden.grad = self.weight.grad = None
        loss.backward()
        return loss.detach(), self.hidden.grad, self.weight.grad


def _dpo(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """[2B] sequence log-probs of policy and reference -> the mean sigmoid loss."""
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


# Token level: (hidden [N, H], weight [V, H], labels [N], none of them ignored) -> log-probabilities [N]


def eager_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The model's own way: all logits, log_softmax, gather."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def trl_logps(hidden: Tensor, weight: Tensor, labels: Tensor, outputs: tuple[str, ...] = ()) -> Tensor:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(f"trl >= 1.15 is not installed ({error})") from error
    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0]


def cce_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if hidden.device.type != "cuda":
        raise Unavailable("cut-cross-entropy's kernels need a GPU")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"cut-cross-entropy is not installed ({error})") from error
    return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce")


def liger_scaled_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if hidden.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("Liger's scaled cross entropy has kernels for Hopper only")
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
    except ImportError as error:  # CuTe DSL is imported at the first call
        raise Unavailable(f"liger-kernel >= 0.8.5 and nvidia-cutlass-dsl are not installed ({error})") from error


def torch_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    return -fused(hidden, weight, labels, reduction="none")


def fastdpo_logps(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    import fastdpo

    return fastdpo.linear_logps(hidden, weight, labels, **options)


# From logits [N, V] and labels [N] to log-probabilities [N]


def torch_selective(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def trl_selective(logits: Tensor, labels: Tensor) -> Tensor:
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError as error:
        raise Unavailable(f"trl is not installed ({error})") from error
    return selective_log_softmax(logits, labels)


def liger_selective(logits: Tensor, labels: Tensor) -> Tensor:
    """Writes the gradient over a copy of the logits in the forward: over the caller's own otherwise."""
    if logits.device.type != "cuda":
        raise Unavailable("Liger's cross entropy needs a GPU")
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    return -LigerCrossEntropyLoss(reduction="none")(logits.clone(), labels)


# One DPO step


def _step(p: Problem, token_logps: Callable, ref_logps: Callable | None = None, compact: bool = True):
    """`compact`: completion rows only."""
    mask = p.labels != -100
    everything = bool(mask.all())

    def sequence_logps(hidden, weight, token_logps):
        if compact and not everything:
            logps = token_logps(hidden[mask], weight, p.labels[mask])
            logps = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        else:
            logps = token_logps(hidden.flatten(0, 1), weight, p.labels.clamp(min=0).flatten()).view(mask.shape)
        return (logps * mask).sum(-1)

    with torch.no_grad():
        ref = sequence_logps(p.ref_hidden, p.ref_weight, ref_logps or token_logps)
    return p.gradients(_dpo(sequence_logps(p.hidden, p.weight, token_logps), ref))


def eager(p: Problem):
    return _step(p, eager_logps, compact=False)


def trl_compacted(p: Problem):
    """TRL's chunked function at its best: completion rows only, no statistics."""
    return _step(p, trl_logps)


def trl_trainer(p: Problem):
    """As TRL's DPOTrainer calls it on a CPU: every row, and the statistics it logs."""
    statistics = ("entropy", "mean_logits", "is_top1")
    return _step(p, partial(trl_logps, outputs=statistics), trl_logps, compact=False)


def cce(p: Problem):
    return _step(p, cce_logps)


def liger_scaled(p: Problem):
    return _step(p, liger_scaled_logps)


def torch_fused(p: Problem):
    return _step(p, torch_logps)


def liger(p: Problem):
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed ({error})") from error
    loss_fn = LigerFusedLinearDPOLoss(beta=BETA, compiled=False, use_ref_model=True, average_log_prob=False)
    loss, *_ = loss_fn(p.weight, p.hidden, p.labels, ref_input=p.ref_hidden, ref_weight=p.ref_weight)
    return p.gradients(loss)


def _fastdpo(p: Problem, **options):
    import fastdpo

    out = fastdpo.linear_dpo_loss(
        p.hidden, p.weight, p.labels, ref_hidden=p.ref_hidden, ref_weight=p.ref_weight, beta=BETA, **options
    )
    return p.gradients(out.loss)


def fastdpo_routed(p: Problem):
    return _fastdpo(p)


def fastdpo_exact(p: Problem):
    return _fastdpo(p, backward="exact")


PEERS: dict[str, Callable] = {
    "eager": eager,
    "trl compacted": trl_compacted,
    "trl as its trainer": trl_trainer,
    "liger": liger,
    "liger scaled ce": liger_scaled,
    "cce": cce,
    "torch linear_cross_entropy": torch_fused,
    "fastdpo exact": fastdpo_exact,
    "fastdpo routed": fastdpo_routed,
}
TOKEN_LOGPS: dict[str, Callable] = {
    "eager": eager_logps,
    "trl": trl_logps,
    "liger scaled ce": liger_scaled_logps,
    "cce": cce_logps,
    "torch linear_cross_entropy": torch_logps,
    "fastdpo": fastdpo_logps,
}
SELECTIVE_LOGPS: dict[str, Callable] = {"torch": torch_selective, "trl": trl_selective, "liger": liger_selective}
OURS = ("fastdpo exact", "fastdpo routed")
