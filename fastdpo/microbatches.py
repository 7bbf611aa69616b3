"""Microbatches of preference pairs: rows in an order that consecutive pieces of the batch cannot pair wrongly.

torch.distributed.pipelining cuts a batch along its first dimension. A piece of `[2B, ...]`, the B chosen rows first, is
chosen rows alone, of which a loss would take the first half for chosen and the second for rejected, without an error.

    rows = interleave(torch.arange(2 * B), chunks)
    schedule = ScheduleGPipe(stage, chunks, loss_fn=paired(loss))        # loss(output, labels=, ref_logps=)
    schedule.step(interleave(ids, chunks))                               # on the first rank
    schedule.step(target=rows, loss_kwargs={"labels": labels, "ref_logps": ref_logps})     # on the last one
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .validation import check_integer

Batch = TypeVar("Batch")


def interleave(batch: Batch, chunks: int) -> Batch:
    """Reorders the rows of every tensor so that each of `chunks` pieces is chosen rows and then their rejected rows.

    Equivalent, for one tensor, to::

        chosen, rejected = (half.chunk(chunks) for half in x.chunk(2))
        torch.cat([piece for pair in zip(chosen, rejected) for piece in pair])

    Args:
        batch: ``[2B, ...]`` of any type, the B chosen rows first and the B rejected rows after them; or tuples, lists
            and dicts of such tensors and None.
        chunks: the number of microbatches, of which B must be a multiple: a schedule takes the mean of the
            microbatches' losses, which is the batch's where they are equally large.

    Returns:
        Like `batch`, differentiable. ``torch.chunk``, ``torch.tensor_split`` and schedules of
        torch.distributed.pipelining cut it into batches for `linear_dpo_loss` and `preference_loss`.

    Raises:
        ValueError, TypeError: naming what is no tensor of 2B rows or no number of chunks of B pairs.
    """
    return _reordered(batch, chunks, lambda chunks: (2, chunks))


def restore(batch: Batch, chunks: int) -> Batch:
    """The inverse of `interleave`, for what a schedule returns: the chosen rows first, the rejected rows after them."""
    return _reordered(batch, chunks, lambda chunks: (chunks, 2))


def _reordered(batch, chunks: int, groups):
    """`groups`: how the rows' order is nested outside of the pairs of one piece; the two levels change places."""
    chunks = check_integer("chunks", chunks, 1)

    def reorder(x):
        if x is None:
            return None
        if not isinstance(x, Tensor):
            raise TypeError(f"batch must hold tensors of 2B rows, or None; got {type(x).__name__}")
        if x.ndim == 0 or x.shape[0] % (2 * chunks):
            raise ValueError(
                f"batch must hold 2B rows, with B a multiple of {chunks} chunks; got a tensor of shape {tuple(x.shape)}"
            )
        pairs = x.shape[0] // (2 * chunks)
        return x.unflatten(0, (*groups(chunks), pairs)).transpose(0, 1).flatten(0, 2)

    return tree_map(reorder, batch)


def paired(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pipeline schedule's `loss_fn`, which looks up the rows of its microbatch and refuses one of other than pairs.

    Args:
        loss: called as ``loss(output, **batch)`` with the last stage's output of the microbatch and its rows of every
            tensor of the step's `loss_kwargs`; returns the mean over the microbatch's pairs. What it reads of the
            model must be parameters of the last stage's module: a schedule divides those gradients by the number of
            microbatches, and no others.

    Returns:
        ``loss_fn(output, rows, **batch)``. `rows`, the step's target, is ``interleave(torch.arange(2 * B), chunks)``,
        on the CPU if nothing is to wait; `batch`, the step's `loss_kwargs`, are tensors ``[2B, ...]`` (labels and
        reference log-probs, say) or None, in their first order: chosen rows, then rejected rows.

    Raises:
        ValueError, TypeError: `batch` of other than 2B rows; `rows` of a microbatch that are not as many rejected rows
            as chosen ones, of the same pairs in the same order, or not as many as the output's.

    Guarantees:
        A step whose target was cut in another order than `interleave`'s raises, by name. What the first stage was given
        is out of sight: it must be interleaved as well.
    """

    @functools.wraps(loss)
    def of_rows(output, rows, **batch):
        count = _count(batch)
        _check_rows(rows, count, output)
        return loss(output, **{name: None if x is None else x[rows] for name, x in batch.items()})

    return of_rows


def _count(batch: dict) -> int:
    """2B, of tensors that agree on it."""
    counts = {}
    for name, x in batch.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.ndim == 0:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"loss_kwargs[{name!r}] must be a tensor of 2B rows; got {got}")
        counts[name] = x.shape[0]
    if len(set(counts.values())) != 1 or next(iter(counts.values())) % 2:
        raise ValueError(f"loss_kwargs must be tensors of 2B rows, the whole batch's; got rows {counts}")
    return next(iter(counts.values()))


def _check_rows(rows, count: int, output) -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
        got = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"target must be the row numbers, interleave(torch.arange({count}), chunks); got {got}")
    found, pairs = rows.tolist(), len(rows) // 2
    chosen, rejected = found[:pairs], found[pairs:]
    if rejected != [row + count // 2 for row in chosen] or not all(0 <= row < count // 2 for row in chosen):
        raise ValueError(
            f"a microbatch must hold the rejected rows of its chosen rows: it has the rows {found} of {count}, "
            f"of which those below {count // 2} are chosen; cut target, and the model's inputs, in interleave's order"
        )
    if isinstance(output, Tensor) and output.shape[:1] != rows.shape:
        raise ValueError(f"the output of the last stage must have {len(found)} rows; got shape {tuple(output.shape)}")
