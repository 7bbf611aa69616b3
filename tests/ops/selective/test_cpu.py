"""Given logits on the CPU: a few rows at a time, in every type, against the reference."""

from __future__ import annotations

import pytest
import torch

from fastdpo.ops import native, reference
from fastdpo.ops.selective import cpu

if not native.available():
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 300 * 3, cpu.CHUNK_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy", [False, True])
def test_chunks_of_any_size_give_the_definition(monkeypatch, dtype, chunk_bytes, entropy):
    monkeypatch.setattr(cpu, "CHUNK_BYTES", chunk_bytes)
    logits, labels = torch.randn(8, 301, dtype=dtype)[:, 1:], torch.randint(0, 300, (8,))
    coef, coef_entropy = torch.randn(2, 8)
    coef_entropy = coef_entropy if entropy else None
    results = cpu.forward(logits, labels, 0.7, entropy)
    expected = reference.logits_forward(logits.double(), labels, 0.7, entropy)
    for ours, exact in zip(results, expected):
        if exact is not None:
            torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)
    out, exact = torch.empty_like(logits), torch.empty(8, 300, dtype=torch.float64)
    cpu.backward(logits, labels, *results[:2], coef, 0.7, out, results[2], coef_entropy)
    upstream = (coef.double(), 0.7, exact, expected[2], None if coef_entropy is None else coef_entropy.double())
    reference.logits_backward(logits.double(), labels, *expected[:2], *upstream)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
