"""Cut Cross-Entropy: `linear_cross_entropy` as `linear_logps`, and its log-sum-exp from the same."""

from __future__ import annotations

import torch

import fastdpo

SHAPES = {"shape": "NVD"}
COMPARISONS: tuple[str, ...] = ()


def patch(options: dict) -> None:
    import cut_cross_entropy
    from cut_cross_entropy import cce_lse_forward

    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps=None, impl=None
    ):
        if shift:
            e, targets = e[..., :-1, :], targets[..., 1:]
        losses = -fastdpo.linear_logps(e, c, targets, ignore_index=ignore_index, softcap=softcap, **options)
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()

    def cce_lse_forward_kernel(e, c, softcap=None):
        logit = e.float() @ c[0].float()
        if softcap is not None:
            logit = softcap * torch.tanh(logit / softcap)
        labels = torch.zeros(len(e), dtype=torch.int64)
        return logit - fastdpo.linear_logps(e, c, labels, softcap=softcap, **options)

    cut_cross_entropy.linear_cross_entropy = linear_cross_entropy
    cce_lse_forward.cce_lse_forward_kernel = cce_lse_forward_kernel
