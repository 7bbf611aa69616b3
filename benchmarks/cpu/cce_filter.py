"""Cut Cross-Entropy's filter in plain torch and fp32 (arXiv 2411.09009): its kernels need a GPU and 16-bit inputs."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128  # tokens, and columns: one of the sizes its autotuner tries
DEFAULT_EPS = 2.0**-12  # of bf16 inputs: their epsilon / 32


class _CceFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, eps, live, sort):
        logits = hidden.float() @ weight.float().T
        order = logits.mean(0).argsort() if sort else None
        logps = logits.log_softmax(-1)
        ctx.save_for_backward(hidden, weight, labels, logps, order)
        ctx.eps, ctx.live = eps, live
        return logps.gather(1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx, coef):
        hidden, weight, labels, logps, order = ctx.saved_tensors
        step = -logps.exp()
        step[torch.arange(len(labels)), labels] += 1.0
        if order is not None:
            step, weight = step[:, order], weight[order]
        tiles = step.view(-1, TILE, step.shape[1] // TILE, TILE)
        kept = tiles.abs().amax((1, 3), keepdim=True) >= ctx.eps
        if ctx.live is not None:
            ctx.live.append(kept.float().mean().item())
        dz = torch.where(kept, tiles, 0.0).view_as(step) * coef[:, None]
        dhidden, dweight = (dz @ weight.float()).to(hidden), (dz.T @ hidden.float()).to(weight)
        if order is not None:
            dweight = torch.empty_like(dweight).index_copy_(0, order, dweight)
        return dhidden, dweight, None, None, None, None


def cce_filter_logps(
    hidden: Tensor,  # [N, H], N a multiple of 128
    weight: Tensor,  # [V, H], V a multiple of 128
    labels: Tensor,  # [N]
    eps: float = DEFAULT_EPS,
    live: list[float] | None = None,
    sort: bool = True,
) -> Tensor:
    """[N] log-probs whose backward drops each tile in which no `p - onehot` reaches `eps`.

    Tiles are of columns sorted by their mean logit, as the package sorts them, or with `sort=False` as they stand.
    The share of tiles that are computed is appended to `live` by the backward.
    """
    return _CceFilter.apply(hidden, weight, labels, eps, live, sort)
