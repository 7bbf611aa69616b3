"""The stateless modules that Hugging Face's `kernels` exchanges: against transformers' loss, and what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from fastdpo import layers, linear_logps

B, T, H, V = 3, 7, 16, 100  # one block: the routed gradient is the exact one


def problem(dtype=torch.float64):
    hidden = torch.randn(B, T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (B, T))
    labels[0, :3] = -100
    labels[2] = -100
    return hidden, weight, labels, torch.randn(V, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("given", ["mean", "number", "tensor", "shifted", "no bias"])
def test_the_loss_is_transformers(given):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    hidden, weight, labels, bias = problem()
    bias = None if given == "no bias" else bias
    items = {"number": 11, "tensor": torch.tensor([11])}.get(given)
    options = {} if items is None else {"num_items_in_batch": items}
    if given == "shifted":
        options["shift_labels"] = labels.roll(2, 1)
    loss = layers.LinearCausalLMLoss()(hidden, weight, labels, bias, **options)
    logits = nn.functional.linear(hidden, weight, bias)
    if given == "tensor":
        options["num_items_in_batch"] = items.view(())
    expected = loss_utils.ForCausalLMLoss(logits.double(), labels, V, **options)
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0)  # their logits are fp32
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_another_ignore_index():
    hidden, weight, labels, bias = problem()
    other = labels.masked_fill(labels == -100, 5)
    kept = other.masked_fill(other == 5, -100)
    loss = layers.LinearCausalLMLoss()
    assert torch.equal(loss(hidden, weight, other, bias, ignore_index=5), loss(hidden, weight, kept, bias))


@pytest.mark.parametrize("shape", [(B, T), (B, 0), (0, T)])
def test_a_batch_without_labels_has_loss_zero(shape):
    hidden = torch.randn(*shape, H, requires_grad=True)
    loss = layers.LinearCausalLMLoss()(hidden, torch.randn(V, H), torch.full(shape, -100))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().sum() == 0


def test_logps_are_the_functions():
    hidden, weight, labels, bias = problem(torch.float32)
    assert torch.equal(layers.LinearLogps()(hidden, weight, labels, bias), linear_logps(hidden, weight, labels, bias))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, "labels or shift_labels"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be a finite number > 0; got 0"),
        ({"num_items_in_batch": torch.ones(2)}, r"num_items_in_batch must have one element; got shape \(2,\)"),
        ({"shift_labels": torch.zeros(B, T - 1).long()}, "labels"),
    ],
)
def test_what_is_refused_is_named(options, message):
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match=message):
        layers.LinearCausalLMLoss()(hidden, weight, **{"labels": labels, **options})


def test_they_are_pure_as_kernels_asks():
    classes = [x for x in vars(layers).values() if inspect.isclass(x) and x.__module__ == layers.__name__]
    assert len(classes) == 2
    for layer in classes:
        assert layer.__init__ is nn.Module.__init__
        added = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
        assert added <= {"can_torch_compile", "has_backward"}, added


def test_the_loss_is_one_graph():
    hidden, weight, labels, _ = problem(torch.float32)
    layer = layers.LinearCausalLMLoss()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight, labels), layer(hidden, weight, labels))
    compiled(hidden, weight, labels).backward()
    assert hidden.grad.abs().sum() > 0
