"""The Triton engine's single logits and their gradients, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreter_problem
from ops.test_entries import columns_of, head_of

from fastdpo.ops import entries as plain
from fastdpo.ops.problem import Gradients

pytestmark = pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_logits_and_gradients(lora, strided):
    from fastdpo.ops.triton import entries

    hidden = torch.randn(2, 4, 10)[:, :3] if strided else None
    head, columns, dz = head_of(lora, hidden), columns_of(), torch.randn(6, 4)
    torch.testing.assert_close(entries.logits(head, columns), plain.logits(head, columns), rtol=1e-5, atol=1e-5)
    shapes = [(6, 10), *(x.shape for x in head.inputs[1:] if x is not None)]
    given, expected = (Gradients(*[torch.ones(shape) for shape in shapes]) for _ in range(2))
    entries.backward(head, columns, dz, given)
    plain.backward(head, columns, dz, expected)
    for name, x in vars(expected).items():
        if x is not None:
            torch.testing.assert_close(getattr(given, name), x, rtol=1e-5, atol=1e-5)
