"""Single logits and their gradients, against the whole products."""

from __future__ import annotations

import pytest
import torch

from fastdpo.head import LogitTransform, LoRA
from fastdpo.ops import entries
from fastdpo.ops.problem import Gradients, Head

TRANSFORM = LogitTransform(1.3, 4.0, 0.7)


def head_of(lora: bool, hidden=None) -> Head:
    hidden = torch.randn(6, 10) if hidden is None else hidden
    low_rank = LoRA(torch.randn(3, 10), torch.randn(50, 3), 0.5) if lora else None
    return Head(hidden, torch.randn(50, 10), torch.randn(50), low_rank, TRANSFORM)


def products(head: Head):
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    y = hidden @ head.weight.T + head.bias
    return y if head.lora is None else y + head.lora.scale * (hidden @ head.lora.a.T) @ head.lora.b.T


def columns_of():
    columns = torch.randint(0, 50, (6, 4))
    columns[0, 1], columns[3] = -1, -1
    columns[2, 1] = columns[2, 0]  # one id twice
    return columns


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_logits(monkeypatch, lora, few):
    monkeypatch.setattr(entries, "ROWS_BYTES", 4 * 10 * 3 if few else entries.ROWS_BYTES)
    head, columns = head_of(lora), columns_of()
    y = products(head) * 1.3
    expected = (4 * torch.tanh(y / 4) / 0.7).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -torch.inf)
    torch.testing.assert_close(entries.logits(head, columns), expected)


def test_rows_of_a_slice_are_found():
    hidden = torch.randn(2, 4, 10)
    sliced, columns = head_of(False, hidden[:, :3]), columns_of()
    plain = sliced.replace(hidden=hidden[:, :3].reshape(6, 10))
    torch.testing.assert_close(entries.logits(sliced, columns), entries.logits(plain, columns))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_gradients(monkeypatch, lora, few):
    monkeypatch.setattr(entries, "ROWS_BYTES", 4 * 10 * 3 if few else entries.ROWS_BYTES)
    head, columns, dz = head_of(lora), columns_of(), torch.randn(6, 4)
    inputs = [x for x in head.inputs if x is not None]
    leaves = [x.clone().requires_grad_() for x in inputs]
    low_rank = LoRA(*leaves[3:], 0.5) if lora else None
    y = products(Head(*leaves[:3], low_rank, TRANSFORM)).gather(1, columns.clamp(min=0))
    expected = torch.autograd.grad(y, leaves, dz.masked_fill(columns < 0, 0.0))
    grads = Gradients(*[torch.ones_like(x) for x in inputs])
    entries.backward(head, columns, dz, grads)
    for name, x in zip(("hidden", "weight", "bias", "lora_a", "lora_b"), expected):
        torch.testing.assert_close(getattr(grads, name), x + 1, rtol=1e-5, atol=1e-5)


def test_no_entry_adds_nothing():
    head = head_of(False)
    grads = Gradients(torch.zeros(6, 10), torch.zeros(50, 10))
    entries.backward(head, torch.full((6, 4), -1), torch.full((6, 4), torch.nan), grads)
    assert (grads.hidden == 0).all() and (grads.weight == 0).all()
    assert (entries.logits(head, torch.full((6, 4), -1)) == -torch.inf).all()
