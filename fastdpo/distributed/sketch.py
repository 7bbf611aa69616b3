"""What a few numbers tell of a tensor that should be the same on every rank.

A sketch is 8 projections onto random signs, and the norm. Two of one tensor up to rounding differ by a small part of
the norm; of other data all 8 agree by chance with a probability below 1e-9. A checksum is of values and their places.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PROJECTIONS = 8
SKETCH = PROJECTIONS + 1
ROWS = 32  # of a matrix: spread over those that count
ROUNDING = 2.0**-4  # of the norm: of values that may be rounded to 8 bits, by other kernels, on every rank
SAME_CODE = 2.0**-10  # of values in fp32 that came from the same operations on the same numbers


@lru_cache(maxsize=32)
def _signs(count: int, which: int, device: torch.device) -> Tensor:
    """[PROJECTIONS, count] fp64 of 1 and -1, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(1 + which)
    bits = torch.randint(2, (PROJECTIONS, count), generator=generator, dtype=torch.int64, device="cpu")
    return (2.0 * bits.double() - 1.0).to(device)


def of_matrix(x: Tensor) -> Tensor:
    """[SKETCH] fp64 of [n, m]; what is not finite counts as 0."""
    x = x.detach().double().nan_to_num(0.0, 0.0, 0.0)
    projections = ((_signs(x.shape[0], 0, x.device) @ x) * _signs(x.shape[1], 1, x.device)).sum(1)
    return torch.cat((projections, x.norm()[None]))


def of_vector(x: Tensor) -> Tensor:
    """[SKETCH] fp64 of all of [n]."""
    return of_matrix(torch.nn.functional.pad(x.detach(), (0, -x.shape[0] % 64)).view(-1, 64))


def of_rows(x: Tensor, counts: Tensor) -> Tensor:
    """[SKETCH] fp64 of [..., H], from ROWS of the rows whose flat place in `counts` [n] is True; no other is read."""
    if counts.shape[0] == 0:
        return torch.zeros(SKETCH, dtype=torch.float64, device=x.device)
    before = counts.cumsum(0)
    wanted = 1 + torch.arange(ROWS, device=x.device) * before[-1] // ROWS
    rows = torch.searchsorted(before, wanted).clamp(max=counts.shape[0] - 1)
    x = x.detach() if x.ndim > 1 else x.detach()[None]
    picked = x[rows] if x.ndim == 2 else x[torch.unravel_index(rows, x.shape[:-1])]
    return of_matrix(picked.double().masked_fill(~counts[rows][:, None], 0.0))


def differ(sketches: Tensor, tolerance: float) -> Tensor:
    """[ranks] bool: whose of [ranks, SKETCH] is not that of the first; NaN differs from nothing."""
    gap = (sketches[:, :PROJECTIONS] - sketches[0, :PROJECTIONS]).abs().amax(1)
    return gap > tolerance * torch.maximum(sketches[:, PROJECTIONS], sketches[0, PROJECTIONS])


def checksum(x: Tensor) -> Tensor:
    """0-d int64 of integers [n] and their places, in wrapping arithmetic."""
    mixed = (x.long() + 1 + torch.arange(x.shape[0], device=x.device) * 0x9E3779B97F4A7C1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x5851F42D4C957F2D
    return (mixed ^ (mixed >> 32)).sum()
