"""Results in order, on threads of one core each, whatever happens in a piece."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from fastdpo.ops.cpu.workers import in_order


def test_results_come_in_order_from_single_core_threads():
    before = torch.get_num_threads()
    seen = list(in_order(lambda i: (i, threading.get_ident(), torch.get_num_threads()), ((i,) for i in range(50)), 3))
    assert [i for i, _, _ in seen] == list(range(50))
    assert threading.get_ident() not in {ident for _, ident, _ in seen}
    assert {cores for _, _, cores in seen} == {1}
    assert torch.get_num_threads() == before


def test_an_error_reaches_the_caller_and_the_pool_survives():
    def piece(i):
        if i == 5:
            raise ValueError("piece 5")
        return i

    with pytest.raises(ValueError, match="piece 5"):
        list(in_order(piece, ((i,) for i in range(20)), 2))
    assert list(in_order(lambda i: i, ((i,) for i in range(5)), 2)) == list(range(5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_threads_of_its_own():
    list(in_order(lambda i: i, ((i,) for i in range(4)), 2))
    child = os.fork()
    if child == 0:
        ok = list(in_order(lambda i: i, ((i,) for i in range(4)), 2)) == list(range(4))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_flop_counter_sees_every_product():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(8, 8)
    with FlopCounterMode(display=False) as counter:
        list(in_order(lambda i: x @ x, ((i,) for i in range(4)), 2))
    assert counter.get_total_flops() == 4 * 2 * 8**3
