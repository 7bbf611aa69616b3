"""A student's and a teacher's head, and their divergence as it is defined, in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastdpo

KINDS = (("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2))


@dataclass
class TwoHeads:
    """Arguments of linear_divergence, and what of them takes a gradient."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    ref_bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    options: dict = field(default_factory=dict)  # of the logits

    @property
    def leaves(self) -> list[Tensor]:
        factors = () if self.lora is None else self.lora[:2]
        return [x for x in (self.hidden, self.weight, self.bias, *factors) if x is not None and x.requires_grad]

    def to(self, dtype: torch.dtype) -> TwoHeads:
        def cast(x):
            if isinstance(x, Tensor) and x.is_floating_point():
                return x.detach().to(dtype).requires_grad_(x.requires_grad)
            return tuple(map(cast, x)) if isinstance(x, tuple) else x

        return TwoHeads(**{name: cast(x) for name, x in vars(self).items()})

    def __call__(self, mask: bool = False, **options):
        labels = self.labels != -100 if mask else self.labels
        return fastdpo.linear_divergence(
            self.hidden,
            self.weight,
            self.ref_hidden,
            self.ref_weight,
            labels,
            self.bias,
            self.ref_bias,
            lora=self.lora,
            **self.options,
            **options,
        )


def two_heads(shape=(3, 7), V=300, H=24, H_ref=16, *, alike=0.0, full=False, dtype=torch.float32) -> TwoHeads:
    """`alike`: how much of the teacher's logits is the student's; `full`: with everything a head may have."""
    hidden, weight = torch.randn(*shape, H), torch.randn(V, H) * 0.5
    ref_hidden, ref_weight = torch.randn(*shape, H_ref), torch.randn(V, H_ref) * 0.5
    if alike:
        shared = min(H, H_ref)
        ref_hidden[..., :shared] = hidden[..., :shared] + (1 - alike) * ref_hidden[..., :shared]
        ref_weight[:, :shared] = weight[:, :shared] + (1 - alike) * ref_weight[:, :shared]
    labels = torch.randint(0, V, shape)
    if labels.numel() > 4:
        labels.view(-1)[torch.randperm(labels.numel())[: labels.numel() // 4]] = -100
    found = TwoHeads(hidden, weight, ref_hidden, ref_weight, labels)
    if full:
        found.bias, found.ref_bias = torch.randn(V), torch.randn(V)
        found.lora = (torch.randn(4, H) * 0.3, torch.randn(V, 4) * 0.3, 0.5)
        found.options = {
            "logit_scale": 1.3,
            "softcap": 6.0,
            "ref_logit_scale": 0.8,
            "ref_softcap": 4.0,
            "temperature": 0.7,
        }
    for x in (found.hidden, found.weight, found.bias, *(found.lora or ())[:2]):
        if x is not None:
            x.requires_grad_()
    return found.to(dtype)


def eager(heads: TwoHeads, kind: str, beta: float = 0.5) -> fastdpo.DivergenceOutput:
    """By its definition, from logits; in the heads' precision."""

    def log_softmax(hidden, weight, bias, lora, scale, softcap):
        z = hidden @ weight.T
        if lora is not None:
            z = z + lora[2] * (hidden @ lora[0].T) @ lora[1].T
        z = (z if bias is None else z + bias) * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return (z / heads.options.get("temperature", 1.0)).log_softmax(-1)

    def option(name, default=None):
        return heads.options.get(name, default)

    transform = option("logit_scale", 1.0), option("softcap")
    p = log_softmax(heads.hidden, heads.weight, heads.bias, heads.lora, *transform)
    transform = option("ref_logit_scale", 1.0), option("ref_softcap")
    r = log_softmax(heads.ref_hidden, heads.ref_weight, heads.ref_bias, None, *transform)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind == "forward_kl":
        divergence = kl(r, p)
    elif kind == "reverse_kl":
        divergence = kl(p, r)
    else:
        m = torch.logaddexp(p + math.log(1 - beta), r + math.log(beta))
        divergence = beta * kl(r, m) + (1 - beta) * kl(p, m)
    ignored, index = heads.labels == -100, heads.labels.clamp(min=0)[..., None]
    found = (divergence, -(p.exp() * p).sum(-1), p.gather(-1, index)[..., 0], r.gather(-1, index)[..., 0])
    return fastdpo.DivergenceOutput(*(x.masked_fill(ignored, 0.0) for x in found))


def relative_error(given: Tensor, expected: Tensor) -> float:
    return ((given.double() - expected).norm() / expected.norm()).item()
