"""Every way to do one DPO step on the head, behind one signature: `step(problem)` -> (loss, dhidden, dweight).

A step is the policy's and the reference's log-probabilities, the sigmoid DPO loss and the backward into `hidden` and
`weight`. A peer that cannot run here raises `Unavailable` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def eager(p: Problem):
    """The model's own way: all logits, log_softmax, gather."""
    mask = p.labels != -100

    def sequence_logps(hidden, weight):
        logps = (hidden @ weight.T).float().log_softmax(-1)
        return (logps.gather(-1, p.labels.clamp(min=0)[..., None])[..., 0] * mask).sum(-1)

    with torch.no_grad():
        ref = sequence_logps(p.ref_hidden, p.ref_weight)
    return p.gradients(_dpo(sequence_logps(p.hidden, p.weight), ref))


def _trl(p: Problem, compact: bool, outputs: tuple[str, ...]):
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable(f"trl >= 1.15 is not installed ({error})") from error
    mask = p.labels != -100

    def sequence_logps(hidden, weight, outputs):
        rows = hidden[mask] if compact else hidden.reshape(-1, hidden.shape[-1])
        labels = p.labels[mask] if compact else p.labels.clamp(min=0).reshape(-1)
        logps = ChunkedLogProbFunction.apply(rows, weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0]
        if compact:
            logps = logps.new_zeros(mask.shape).masked_scatter(mask, logps)
        return (logps.view(mask.shape) * mask).sum(-1)

    with torch.no_grad():
        ref = sequence_logps(p.ref_hidden, p.ref_weight, ())
    return p.gradients(_dpo(sequence_logps(p.hidden, p.weight, outputs), ref))


def trl_compacted(p: Problem):
    """TRL's chunked function at its best: completion rows only, no statistics."""
    return _trl(p, True, ())


def trl_trainer(p: Problem):
    """As TRL's DPOTrainer calls it on a CPU: every row, and the statistics it logs."""
    return _trl(p, False, ("entropy", "mean_logits", "is_top1"))


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
    "fastdpo exact": fastdpo_exact,
    "fastdpo routed": fastdpo_routed,
}
OURS = ("fastdpo exact", "fastdpo routed")
