"""A head whose logits are lazy, and what is read of them beside what is read of logits."""

from __future__ import annotations

import torch
from torch import nn

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.logits import LazyArgmax, LazyLogits

V, H, B, T = 300, 16, 4, 6


class Model(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.head = nn.Linear(H, V, bias=bias)

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden):
        return self.head(hidden)


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, H, generator=generator), torch.randint(V, (B, T), generator=generator)


def picked(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def lazily(model, hidden, **options):
    with lazy_logits(model, backward="exact", **options):
        logits = model(hidden)
    assert isinstance(logits, LazyLogits)
    return logits


def same_as_torch(read, dtype=torch.float32, grad=True):
    """`read` of logits and labels gives the same values and gradients of lazy logits."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    results = []
    for lazy in (True, False):
        hidden, labels = inputs()
        hidden = hidden.to(dtype).requires_grad_(grad)
        model.zero_grad()
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            logits = lazily(model, hidden) if lazy else model(hidden).float()
        values = read(logits, labels)
        values = [x.tensor("test") if isinstance(x, (LazyLogits, LazyArgmax)) else x for x in values]
        wanted = [x.square().sum() for x in values if x.requires_grad]
        if wanted:
            sum(wanted).backward()
        results.append([*values, hidden.grad, *(x.grad for x in model.parameters())])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert type(mine) is type(other) and mine.requires_grad == other.requires_grad
            bound = tolerance * max(1.0, other.double().abs().max().item())
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=bound)
