"""Small heads in fp64, their definition through torch's own autograd, and how to compare with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SmallHead:
    """fp64 values of one problem; `.to(dtype)` gives leaves of another type."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None

    def leaves(self, dtype, requires_grad=True) -> SmallHead:
        def leaf(x):
            return None if x is None else x.detach().to(dtype).clone().requires_grad_(requires_grad)

        lora = None if self.lora is None else (leaf(self.lora[0]), leaf(self.lora[1]), self.lora[2])
        return SmallHead(leaf(self.hidden), leaf(self.weight), self.labels, leaf(self.bias), lora)

    def rounded(self, dtype) -> SmallHead:
        """fp64 leaves holding the values that `dtype` can represent: the oracle's inputs for that type."""
        return self.leaves(dtype, False).leaves(torch.float64)

    def tensors(self) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        if self.lora is not None:
            named.update(lora_a=self.lora[0], lora_b=self.lora[1])
        return {name: x for name, x in named.items() if x is not None}

    def logits(self, *, logit_scale=1.0, softcap=None, temperature=1.0) -> Tensor:
        z = self.hidden @ self.weight.T
        if self.lora is not None:
            z = z + self.lora[2] * (self.hidden @ self.lora[0].T) @ self.lora[1].T
        if self.bias is not None:
            z = z + self.bias
        z = z * logit_scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return z / temperature

    def logps(self, **transform) -> Tensor:
        """The definition, through torch's own log_softmax and autograd."""
        logps = self.logits(**transform).log_softmax(-1)
        picked = logps.gather(-1, self.labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(self.labels == -100, torch.zeros_like(picked), picked)


def small_head(N=37, V=1000, H=48, *, bias=False, lora=False, masked=False, sharpness=1.0) -> SmallHead:
    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    labels = torch.randint(0, V, (N,))
    if masked:
        labels[torch.rand(N) < 0.4] = -100
    return SmallHead(
        normal(N, H) * sharpness,
        normal(V, H) * 0.3,
        labels,
        normal(V) if bias else None,
        (normal(4, H) * 0.3, normal(V, 4) * 0.3, 0.7) if lora else None,
    )


def peaked_head(N=512, V=8192, H=64) -> SmallHead:
    """Distributions as a trained model's: a few Zipf-distributed candidates hold nearly all probability."""
    zipf = 1.0 / torch.arange(1, V + 1).double()
    weight = torch.randn(V, H, dtype=torch.float64) / H**0.5
    weight[:, 0] = (zipf.log() - zipf.log().mean()) / 8
    candidates = torch.multinomial(zipf, N * 6, True).view(N, 6)
    strength = 14.0 * (0.55 + 0.45 * torch.rand(N, 6)).double() * 0.93 ** torch.arange(6)
    hidden = torch.einsum("nk,nkh->nh", strength, weight[candidates])
    hidden[:, 0] = 4.0 + torch.rand(N).double()
    labels = torch.multinomial((hidden @ weight.T).softmax(-1), 1)[:, 0]
    return SmallHead(hidden, weight, labels)


def shares(head: SmallHead, **transform) -> tuple[Tensor, Tensor]:
    """Of the blocks of 128 columns in each token's tail: ([N, K] fp64 shares, [N, K] bool: holds the label)."""
    z = head.leaves(torch.float64, False).logits(**transform)
    rest = z.scatter(1, head.labels[:, None], -torch.inf)
    rest = torch.nn.functional.pad(rest, (0, -z.shape[1] % 128), value=-torch.inf)
    share = rest.softmax(1).view(len(z), -1, 128).sum(2)
    return share, (head.labels[:, None] // 128) == torch.arange(share.shape[1], device=z.device)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected|| in fp64; inf when anything is not finite."""
    difference = (value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return difference.item() if torch.isfinite(difference) else float("inf")
