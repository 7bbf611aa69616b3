"""The layouts that problem.py promises to engines, made from what callers have: copied only where they differ.

Strides of 0 (expand), steps, permuted dimensions and the negative bit (of views such as ``x.conj().imag``) end here.
"""

from __future__ import annotations

from torch import Tensor

from .problem import Head, Rows


def contiguous(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.clone() if x._is_zerotensor() else x.resolve_neg().contiguous()


def in_rows(x: Tensor, *, apart: bool = False) -> Tensor:
    """`x` with unit stride along its last dimension; with `apart`, [n, m] whose rows do not overlap either."""
    x = x.resolve_neg()
    if x.stride(-1) != 1:
        x = x.contiguous()
        if x.stride(-1) != 1:  # one column, whose stride `contiguous` leaves as it was
            x = x.as_strided(x.shape, (*x.stride()[:-1], 1))
    return x.contiguous() if apart and x.shape[0] > 1 and x.stride(0) < x.shape[1] else x


def laid_out(head: Head, rows: Rows) -> tuple[Head, Rows]:
    """The same problem as its types in problem.py describe it."""
    head = head.replace(
        hidden=in_rows(head.hidden),
        weight=in_rows(head.weight, apart=True),
        bias=contiguous(head.bias),
        lora=head.lora and head.lora._replace(a=contiguous(head.lora.a), b=contiguous(head.lora.b)),
    )
    return head, rows.replace(labels=contiguous(rows.labels))
