"""The pieces that the CPU engine multiplies."""

from __future__ import annotations

import pytest
import torch
from heads import small_head

from fastdpo.head import LoRA
from fastdpo.ops import native
from fastdpo.ops.cpu import operands
from fastdpo.ops.cpu.operands import Operands, matmul
from fastdpo.ops.problem import Head, Tokens

if not native.available():
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)


@pytest.mark.parametrize("onednn", [False, True])
def test_products_in_any_layout(monkeypatch, onednn):
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(operands, "USES_ONEDNN", onednn)
    a, b = torch.randn(7, 40)[:, ::2], torch.randn(20, 11).T
    torch.testing.assert_close(matmul(a, b), (a.double() @ b.double().T).float())


def test_products_of_few_shapes(monkeypatch):
    monkeypatch.setattr(operands, "USES_ONEDNN", True)
    padded = {count: operands.padded_rows(count) for count in range(1, 1025)}
    assert len(set(padded.values())) <= 16
    assert all(count <= rows < count + max(32, count / 4 + 1) for count, rows in padded.items())
    monkeypatch.setattr(operands, "USES_ONEDNN", False)
    assert operands.padded_rows(77) == 77


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_listed_tokens(dtype, threads):
    leaves = small_head(N=12, V=300, H=16, lora=True).leaves(dtype, False)
    head = Head(leaves.hidden, leaves.weight, None, LoRA(*leaves.lora), compute_dtype=dtype)
    rows = torch.tensor([11, 3, 5, 7])
    ops = Operands(head, Tokens(leaves.labels[rows], rows, rows, 12))
    ops.threads = threads
    hidden, low_rank = ops.hidden_of(torch.tensor([2, 0], dtype=torch.int32), 5)
    assert torch.equal(hidden[:2], leaves.hidden[[5, 11]].float()) and (hidden[2:] == 0).all()
    torch.testing.assert_close(low_rank, hidden @ (leaves.lora[0].float() * leaves.lora[2]).T)
    assert torch.equal(ops.hidden(1, 3)[0], leaves.hidden[[3, 5]].float())


def test_pieces_stay_within_their_bytes():
    head = Head(torch.zeros(1, 1000), torch.zeros(5000, 1000))
    ops = Operands(head, Tokens(torch.zeros(1, dtype=torch.int64), None, None, 1))
    assert ops.num_blocks == 40
    for rows in (1, 77, 4096):
        cols = ops.slab_cols(rows)
        assert cols % 128 == 0 and (cols == 128 or 4 * cols * max(rows, 1000) <= operands.TILE_BYTES)
    assert ops.chunk_rows() * 4000 <= operands.TILE_BYTES and ops.chunk_rows(1 << 22) <= 2
