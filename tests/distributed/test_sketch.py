"""What tells data apart: rounding does not, other data does; a checksum sees values and places."""

from __future__ import annotations

import pytest
import torch

from fastdpo.distributed import sketch

ALL = torch.ones(500, dtype=torch.bool)


def _differ(a, b, tolerance=sketch.ROUNDING, counts=ALL) -> bool:
    both = torch.stack([sketch.of_rows(x, counts) for x in (a, b)])
    return bool(sketch.differ(both, tolerance)[1])


@pytest.mark.parametrize("trial", range(20))
def test_rounding_is_no_difference_and_other_data_is(trial):
    x = torch.randn(500, 64) * torch.randn(64).exp()
    assert not _differ(x, x.bfloat16().float())
    assert not _differ(x.bfloat16(), x + 2**-9 * x.abs() * torch.randn(500, 64).sign())
    assert _differ(x, torch.randn(500, 64) * x.norm() / 500**0.5 / 8)
    assert _differ(x, x.roll(1, 0)) and _differ(x, 1.2 * x) and _differ(x, -x) and _differ(x, torch.zeros_like(x))
    assert not _differ(torch.zeros_like(x), torch.zeros_like(x))


def test_only_rows_that_count_are_read_and_what_is_not_finite_decides_nothing():
    x, counts = torch.randn(500, 8), torch.rand(500) < 0.1
    other = torch.where(counts[:, None], x, torch.nan)
    assert not _differ(x, other, counts=counts) and _differ(x, other.nan_to_num(7.0), counts=ALL)
    x[:, 0] = torch.inf
    other = x.clone()
    other[3] = torch.nan
    assert not _differ(x, x.clone()) and not _differ(x, other)
    assert not _differ(x, -x, counts=torch.zeros(500, dtype=torch.bool))  # none counts
    rows = sketch.of_rows(x.view(5, 100, 8)[:, ::2], ALL[:250])  # as shaped and strided as it comes
    assert torch.equal(rows, sketch.of_rows(x.view(5, 100, 8)[:, ::2].reshape(250, 8), ALL[:250]))
    assert sketch.of_rows(x[:0], ALL[:0]).tolist() == [0.0] * sketch.SKETCH


def test_vectors_are_compared_to_a_thousandth():
    x = torch.rand(777)

    def pair(other) -> bool:
        return bool(sketch.differ(torch.stack([sketch.of_vector(v) for v in (x, other)]), sketch.SAME_CODE)[1])

    assert not pair(x * (1 + 1e-6)) and pair(x * 1.01) and pair(x.flip(0)) and pair(2 * x)


def test_a_checksum_sees_every_value_and_its_place():
    x = torch.randint(0, 50000, (300,))
    seen = {int(sketch.checksum(x)), int(sketch.checksum(x.flip(0))), int(sketch.checksum(x + 1))}
    for i in range(300):
        other = x.clone()
        other[i] = -100
        seen.add(int(sketch.checksum(other)))
    swapped = x.clone()
    swapped[[3, 200]] = x[[200, 3]]
    assert len(seen | {int(sketch.checksum(swapped))}) == 304
    assert sketch.checksum(x.int()) == sketch.checksum(x)
