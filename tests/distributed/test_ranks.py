"""The ranks that the other tests of this folder run on."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def _summed(rank, size, x):
    total = x + rank
    dist.all_reduce(total)
    return total, os.getpid()


def _fails_on_one(rank, size):
    if rank == 1:
        raise ValueError("rank 1 alone")
    return rank


def _dies(rank, size):
    if rank == 0:
        os._exit(3)
    dist.barrier()


def test_ranks_share_a_group_and_nothing_else(ranks):
    results = ranks(2)(_summed, torch.ones(3))
    assert [total.tolist() for total, _ in results] == [[3.0] * 3] * 2
    assert len({pid for _, pid in results} | {os.getpid()}) == 3


def test_what_a_rank_raises_or_dies_of_is_told_and_the_next_function_has_a_group_of_its_own(ranks):
    errors = ranks(2).errors(_fails_on_one)
    assert errors[0] is None and (errors[1].kind, str(errors[1])) == ("ValueError", "rank 1 alone")
    errors = ranks(2).errors(_dies)
    assert errors[0].kind == "RankLost" and "exit code 3" in str(errors[0]) and errors[1] is not None
    assert ranks(2)(_summed, torch.zeros(1))[0][0].item() == 1.0
