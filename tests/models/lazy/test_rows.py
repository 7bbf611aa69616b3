"""Views and copies of lazy logits, and what is read of them in ways that need the logits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lazy_models import B, Model, T, V, inputs, picked, same_as_torch

from fastdpo.integrations import lazy_logits
from fastdpo.models.lazy.logits import LazyLogits

OTHERS = {
    "floor": lambda z, y: (torch.div(z, 2, rounding_mode="floor"), (z // 1).detach(), z.div(3, rounding_mode="trunc")),
    "abs": lambda z, y: (abs(z), -z, +z, z % 1, z**2, 1 / (z + 10), 2 - z),
    "the argmax of then": lambda z, y: ((z.argmax(-1), z.mul_(-1))[0].float(), z.argmax(-1).float()),
    "hits of then": lambda z, y: ((z.argmax(-1), z.neg_())[0] == y,),
    "argmax changed": lambda z, y: changed_argmax(z),
    "the factor of then": lambda z, y: ((z * 2, z.zero_())[0], (z + 1, z.zero_())[0]),
    "log-probs of then": lambda z, y: (lambda logp: (z.zero_(), logp.gather(-1, y[..., None]))[1:])(z.log_softmax(-1)),
    "detached": lambda z, y: (z.detach().mul_(1.0) * 2, picked(z.detach(), y)),
    "requires_grad_": lambda z, y: (z.detach().requires_grad_() * 2,),
    "a view without gradients": lambda z, y: without_gradients(z, y),
    "casts": lambda z, y: (z.double(), z.to(torch.float64), z.half(), z.long(), z.to(torch.zeros(1).double())),
    "copy asked for": lambda z, y: (z.to(torch.float32, copy=True).zero_(), z.to("cpu").mul_(2), z),
    "a dtype asked for": lambda z, y: (F.log_softmax(z, -1, dtype=torch.float64), z.sum(-1, dtype=torch.float64)),
    "reshaped otherwise": lambda z, y: (z.reshape(2, -1), z.view(B, -1), z.reshape(-1), z.flatten(-3, -2), z.flatten()),
    "one row's": lambda z, y: (torch.stack(list(z[0, 0])), z[1, 2][3], z[-1, -1].log_softmax(-1)),
    "out of its memory": lambda z, y: (torch.tanh(z, out=torch.empty(0)) if not z.requires_grad else torch.tanh(z),),
}  # fmt: skip


def changed_argmax(z):
    top = z.argmax(-1)
    part = top[:, 1:]
    top[:, :3] = 7
    return top, part, top == torch.full((B, T), 7), part != torch.full((B, T - 1), 7)


def without_gradients(z, y):
    with torch.no_grad():
        part = z[:, 1:]
        scaled = z * 2
    return picked(part, y[:, 1:]), part.mean(-1), scaled.mean(-1), picked(scaled, y), part.softmax(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("read", OTHERS)
def test_read_otherwise(read, grad):
    same_as_torch(OTHERS[read], grad=grad)


@pytest.mark.parametrize("change", [
    lambda z: z.div_(0.7), lambda z: z[:, :-1].div_(0.7), lambda z: z.view(-1, V).mul_(2),
], ids=["all", "a part", "flat"])  # fmt: skip
def test_a_temperature_in_place_needs_no_logits(change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_as_torch(
            lambda z, y: (change(z), picked(z[:, 1:-1], y[:, 1:-1]), z[:, :-1].mean(-1), z[:, -1:].mean(-1))[1:]
        )


@pytest.mark.parametrize("backend", ["eager"])
def test_compiled(backend):
    model, (hidden, labels) = Model(), inputs()
    expected = picked(torch.tanh(model(hidden) / 2)[:, 1:] * 2 / 0.7, labels[:, 1:])

    def forward(hidden):
        logits = torch.tanh(model(hidden) / 2) * 2
        part = logits[:, 1:]
        part /= 0.7
        return part, logits[0]

    with lazy_logits(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            logits, first = torch.compile(forward, backend=backend)(hidden)
    assert isinstance(logits, LazyLogits) and isinstance(first, LazyLogits)
    torch.testing.assert_close(picked(logits, labels[:, 1:]), expected, rtol=1e-4, atol=1e-5)
