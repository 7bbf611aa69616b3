"""Dense products, by whichever library, and how many rows they are for."""

from __future__ import annotations

import pytest
import torch

from fastdpo.ops.cpu import library


@pytest.fixture(params=[False, True], ids=["torch.mm", "oneDNN"])
def either(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(library, "USES_ONEDNN", request.param)


def test_products_in_any_layout(either):
    a, b = torch.randn(7, 40)[:, ::2], torch.randn(20, 11).T
    expected = a.double() @ b.double().T
    for out in (torch.full((7, 11), torch.nan), torch.full((7, 30), torch.nan)[:, 3:14]):
        library.matmul(a, b, out)
        torch.testing.assert_close(out, expected.float())
        library.add_matmul(a, b, out)
        torch.testing.assert_close(out, 2 * expected.float())


def test_few_rows_are_left_to_csrc():
    assert [rows for rows in range(200) if not library.takes(rows)] == list(range(4, 96))
