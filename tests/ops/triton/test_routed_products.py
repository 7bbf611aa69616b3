"""dhidden of listed pairs, added in order where torch is to be deterministic."""

from __future__ import annotations

import pytest
import torch
from heads import peaked_head, relative_error, small_head
from triton_case import DEVICE, Case

from fastdpo.ops.triton import backward, routed_products
from fastdpo.ops.triton import call as triton_call
from fastdpo.ops.triton.launch import Target


@pytest.mark.slow
def test_deterministic_algorithms_add_dhidden_in_order(monkeypatch, deterministic):
    """Whatever the groups of tokens that the programs have: 1, 2 or 4 of the 4 x 128. (A row's bits depend on its place
    in a product of the interpreter's, so there only equal groups give equal bits.)"""
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    launches = []
    launch = routed_products.launch

    def spy(kernel, grid, *tile, **arguments):
        launches.append((kernel.__name__, grid))
        launch(kernel, grid, *tile, **arguments)

    monkeypatch.setattr(routed_products, "launch", spy)
    head, coef = peaked_head(N=400, V=1500), torch.randn(400)
    results, groups = [], set()
    for programs in (1, 2, 100, 100):
        launches.clear()
        monkeypatch.setattr(triton_call, "target_of", lambda device, programs=programs: Target(0, programs))
        *_, ours, expected = Case(head, routed=(0.1, 0.05)).run(coef)
        assert relative_error(ours.hidden, expected.hidden) < 5e-6
        results.append(ours.hidden)
        names = [name for name, _ in launches]
        assert "ordered_dhidden_kernel" in names and "routed_dhidden_kernel" not in names
        groups |= {grid[1] for name, grid in launches if name == "ordered_dhidden_kernel"}
    assert groups == {1, 2, 4} and results[2].equal(results[3])
    assert DEVICE == "cpu" or all(result.equal(results[0]) for result in results)


def test_ordered_dhidden_through_rounds_and_ranges(small_workspaces, monkeypatch, deterministic):
    monkeypatch.setattr(backward, "CROSSOVER", 1.0)
    Case(small_head(N=300, V=1500, lora=True, masked=True), torch.bfloat16, (0.1, 0.05)).check(torch.randn(300))
