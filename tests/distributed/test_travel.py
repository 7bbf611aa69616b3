"""A head whose shards stay where they are while the tokens of all ranks come to them."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
from heads import relative_error
from mesh_cases import Case, check, placements, scored, tensors

import fastdpo
from fastdpo.distributed import travel
from fastdpo.ops.problem import Needs

ROUTED = {"backward": "routed", "tau": 0.0, "seed": 2**64 - 3}  # every pair, drawn turn by turn
FSDP = Case((2,), ("fsdp",), "S", rows=(23, 11), own=(0,), travels=True)


def _as(**changes) -> Case:
    return dataclasses.replace(FSDP, **changes)


TWO = {
    "one turn": _as(turn=1),
    "turns of few rows, another number on each rank": _as(turn=60),
    "turns of one row": _as(turn=301),
    "routed": _as(turn=60, options=ROUTED),
    "a rank without rows": _as(rows=(0, 40)),
    "no row anywhere": _as(rows=(0, 0)),
    "bias and B whole": _as(others="R"),
    "bias and B plain": _as(others="plain"),
    "frozen weight": _as(frozen=("weight",)),
    "only hidden": _as(frozen=("weight", "bias", "lora_a", "lora_b")),
    "only the head": _as(frozen=("hidden",), turn=60),
    "hidden a DTensor": _as(hidden="S", rows=(23,)),
    "sequence parallel": Case((2,), ("tp",), "S", hidden="S", rows=(24,), own=(0,), travels=True),
    "bf16": _as(dtype=torch.bfloat16, turn=60),
}
FOUR = {
    "uneven": Case((4,), ("dp",), "S", V=301, rows=(23, 11, 2, 40), own=(0,), travels=True, turn=20),
    "hybrid": Case((2, 2), ("dp_replicate", "dp_shard"), "RS", rows=(23, 11, 1, 40), own=(0, 1), travels=True),
}


@pytest.mark.parametrize("name", TWO)
def test_on_two_ranks(ranks, name):
    case = TWO[name]
    check(case, ranks(2)(scored, case), 2e-6 if case.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("name", FOUR)
def test_on_four_ranks(ranks, name):
    check(FOUR[name], ranks(4)(scored, FOUR[name]))


@pytest.mark.parametrize("how", [{"backward": "exact"}, ROUTED], ids=["exact", "routed"])
def test_by_every_engine(engine, ranks, how):
    case = _as(options=how, rows=(6, 9), V=200, turn=40)
    check(case, ranks(2)(scored, case, engine), 5e-6)


def _drawn(rank, size, seeds, next_turn=None):
    """Gradients of sampled blocks: the same tokens in all of 20 turns and on both ranks, counted from 0 in each."""
    from torch.distributed.tensor import distribute_tensor

    os.environ["FASTDPO_ENGINE"] = "reference"  # the engine that never computes every pair instead
    before = travel.cheaper, travel.TURN, travel._NEXT_TURN
    travel.cheaper, travel.TURN = (lambda *_: True), 320
    travel._NEXT_TURN = before[2] if next_turn is None else next_turn
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    groups, (weight, *_) = tensors(Case((2,), (), "", V=1300, rows=(40, 40)))
    hidden, labels = groups[0][0][:2].float().repeat(20, 1), torch.full((40,), 7)
    found = []
    for seed in seeds:
        leaf = distribute_tensor(weight.float(), mesh, placements("S")).requires_grad_()
        torch.manual_seed(rank)
        fastdpo.linear_logps(hidden, leaf, labels, tau=0.6, seed=seed).sum().backward()
        found.append(leaf.grad.full_tensor())
    del os.environ["FASTDPO_ENGINE"]
    travel.cheaper, travel.TURN, travel._NEXT_TURN = before
    exact = weight.float().requires_grad_()
    fastdpo.linear_logps(hidden, exact, labels, backward="exact").sum().backward()
    return found, 2 * exact.grad


def test_turns_draw_independently_and_ranks_draw_alike(ranks):
    (found, exact), (others, _) = ranks(2)(_drawn, [*range(8), 3, None])
    assert all(torch.equal(x, y) for x, y in zip(found, others))
    assert torch.equal(found[3], found[8])
    errors = [relative_error(x, exact) for x in found[:8]]
    alike = [relative_error(x, exact) for x in ranks(2)(_drawn, range(8), 0)[0][0]]
    mean = relative_error(torch.stack(found[:8]).mean(0), exact)
    assert min(errors) > 1e-3 and mean < 0.6 * sum(errors) / 8  # unbiased, and
    assert sum(errors) < 0.5 * sum(alike)  # 20 draws of a token are not one


def test_what_travels_is_decided_by_bytes():
    hidden, weight = torch.zeros(1, 64), torch.zeros(1, 64)
    everything, frozen = Needs(True, True), Needs(True, False)
    assert travel.cheaper(600, 1000, hidden, weight, everything) and not travel.cheaper(
        700, 1000, hidden, weight, everything
    )
    assert travel.cheaper(333, 1000, hidden, weight, frozen) and not travel.cheaper(334, 1000, hidden, weight, frozen)
    assert travel.cheaper(1000, 1000, hidden, weight, Needs()) and not travel.cheaper(
        1001, 1000, hidden, weight, Needs()
    )
    assert travel.cheaper(1333, 1000, hidden.bfloat16(), weight, everything)
    large = torch.empty(1, 8192, dtype=torch.bfloat16, device="meta")
    assert travel.cheaper(10**7, 262144, large, large, everything)  # 4 GiB are gathered by nobody


def _refused(rank, size):
    from torch.distributed.tensor import distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    groups, (weight, *_) = tensors(Case((2,), (), "", rows=(24, 11)))
    hidden, labels = groups[rank][0].float(), groups[rank][1]
    weight = distribute_tensor(weight.float(), mesh, placements("S")).requires_grad_()
    told = {}
    calls = {
        "softcap": {"softcap": 3.0} if rank else {},
        "dtype": {"labels": labels.float()} if rank else {},
        "out of range": {"labels": labels + 1000 * rank, "check_labels": True},
        "of a shard": {"labels": labels.clamp(min=290), "check_labels": True},  # fine: of the whole vocabulary
    }
    for name, changes in calls.items():
        try:
            stats = fastdpo.linear_token_stats(**({"hidden": hidden, "weight": weight, "labels": labels} | changes))
            told[name] = "served"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    try:
        (stats.logps.sum() if rank else stats.entropy.sum()).backward()
    except ValueError as error:
        told["upstream"] = str(error)
    return told


def test_ranks_that_disagree_say_so(ranks):
    zero, one = ranks(2)(_refused)
    assert zero == one
    assert "softcap: rank 0 has None, rank 1 has 3.0" in zero["softcap"]
    assert zero["dtype"].startswith("ValueError: vocab_group: refused by rank 1: TypeError: labels must be int64")
    assert "refused by rank 1: ValueError: labels[" in zero["out of range"] and "[0, 301)" in zero["out of range"]
    assert zero["of a shard"] == "served"
    assert "what has an upstream gradient: rank 0 has entropy, rank 1 has logps" in zero["upstream"]


def _grown(rank, size, vocab_size, hidden_size, rows):
    """MiB that a step grows the process by, beyond its shard: (at its peak, by the gradients it returns)."""
    from torch.distributed.tensor import DTensor, Shard

    from benchmarks.cpu.resident import growth

    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))

    def step(vocab_size, rows):
        torch.manual_seed(5)
        weight = torch.randn(vocab_size // 2, hidden_size)
        weight = DTensor.from_local(weight, mesh, [Shard(0)], run_check=False).requires_grad_()
        hidden = torch.randn(rows, hidden_size, requires_grad=True)
        labels = torch.randint(vocab_size, (rows,))
        return lambda: fastdpo.linear_logps(hidden, weight, labels).sum().backward()

    step(512, 64)()  # loads what is loaded once
    run = step(vocab_size, rows)
    dist.barrier()
    return growth(run)


def test_no_rank_ever_holds_the_head(ranks):
    """At V = 131072, H = 512 in fp32, of which this rank's half and its gradient are 128 MiB each."""
    whole = 131072 * 512 * 4 / 2**20
    # 3 turns of 2048 rows of each rank: their gradients are added up
    grown = ranks(2)(_grown, 131072, 512, 4500)
    assert max(grown) < whole - 1, grown
