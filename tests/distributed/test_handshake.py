"""Ranks that are given different things, or fail: every rank raises the same, by name, and the group stays usable."""

from __future__ import annotations

import datetime
import os
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist

import fastdpo
from fastdpo.distributed import handshake

N, H, V = 24, 16, 300


def _given(rank: int, size: int) -> dict:
    """A good call: the same on every rank but for its shard."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = -100
    rows = torch.tensor_split(torch.arange(V), [130 + 40 * i for i in range(size - 1)])[rank]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight, bias = normal(N, H), normal(V, H)[rows], normal(V)[rows]
    lora = (normal(3, H).requires_grad_(), normal(V, 3)[rows].requires_grad_(), 0.5)
    head = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": labels, "bias": bias}
    return head | {"lora": lora, "seed": 7, "tau": 0.1, "stats": ("entropy",), "vocab_group": dist.group.WORLD}


def _call(given: dict):
    return fastdpo.linear_token_stats(**given)


@contextmanager
def _engine(name: str):
    os.environ["FASTDPO_ENGINE"] = name
    try:
        yield
    finally:
        del os.environ["FASTDPO_ENGINE"]


def _shorter(g):
    return {"hidden": g["hidden"][:-1], "labels": g["labels"][:-1]}


def _narrower(g):
    a, b, s = g["lora"]
    return {"hidden": g["hidden"][:, :8], "weight": g["weight"][:, :8], "lora": (a[:, :8], b, s)}


def _changed(x, **at):
    x = x.detach().clone()
    x[at["row"]] = at["to"]
    return x


# What rank 1 is given instead, and what every rank then says, with the values of both.
MISMATCHES = {
    "rows": (_shorter, r"the rows of hidden: rank 0 has 24, rank 1 has 23"),
    "H": (_narrower, r"the last dimension of hidden: rank 0 has 16, rank 1 has 8"),
    "mask": (lambda g: {"labels": _changed(g["labels"], row=1, to=-100)}, r"not ignored: rank 0 has 19, rank 1 has 18"),
    "labels": (lambda g: {"labels": g["labels"].roll(5)}, r"labels, whose ids or order differ: rank 0 has checksum"),
    "ignore_index": (lambda g: {"ignore_index": -7}, r"ignore_index: rank 0 has -100, rank 1 has -7"),
    "dtype": (lambda g: {"hidden": g["hidden"].bfloat16()}, r"hidden's dtype: .*float32, rank 1 has torch.bfloat16"),
    "weight's": (
        lambda g: {"weight": g["weight"].half()},
        r"weight's dtype: rank 0 has torch.float32, rank 1 .*float16",
    ),
    "bias": (lambda g: {"bias": None}, r"bias's dtype: rank 0 has torch.float32, rank 1 has None"),
    "lora": (lambda g: {"lora": None}, r"lora A's dtype: .*rank 1 has None.*lora's rank: rank 0 has 3, rank 1 has -1"),
    "rank": (
        lambda g: {"lora": (g["lora"][0][:2], g["lora"][1][:, :2], 0.5)},
        r"lora's rank: rank 0 has 3, rank 1 has 2",
    ),
    "scale": (lambda g: {"lora": (*g["lora"][:2], 0.25)}, r"lora's scale: rank 0 has 0.5, rank 1 has 0.25"),
    "lora A": (
        lambda g: {"lora": (g["lora"][0].flip(0), *g["lora"][1:])},
        r"lora A, whose values differ: rank 0 has norm",
    ),
    "logit_scale": (lambda g: {"logit_scale": 2.0}, r"logit_scale: rank 0 has 1.0, rank 1 has 2.0"),
    "softcap": (lambda g: {"softcap": 30.0}, r"softcap: rank 0 has None, rank 1 has 30.0"),
    "temperature": (lambda g: {"temperature": 0.5}, r"temperature: rank 0 has 1.0, rank 1 has 0.5"),
    "backward": (
        lambda g: {"backward": "exact", "tau": None, "seed": None},
        r"backward: rank 0 has routed, rank 1 has exact",
    ),
    "tau": (lambda g: {"tau": (0.1, 0.2)}, r"tau of dweight: rank 0 has 0.1, rank 1 has 0.2"),
    "seed": (lambda g: {"seed": 2**64 - 1}, rf"seed: rank 0 has 7, rank 1 has {2**64 - 1}"),
    "no seed": (lambda g: {"seed": None}, r"whether seed is given: rank 0 has True, rank 1 has False"),
    "stats": (lambda g: {"stats": ("is_top1",)}, r"stats: rank 0 has \['entropy'\], rank 1 has \['is_top1'\]"),
    "frozen": (
        lambda g: {"weight": g["weight"].detach()},
        r"want a gradient: rank 0 has \['hidden', 'weight', 'lora A', .*, rank 1 has \['hidden', 'lora A', 'lora B'\]",
    ),
    "autocast": (
        lambda g: torch.autocast("cpu", torch.bfloat16),
        r"autocast's .* dtype: .*float32, rank 1 has torch.bfloat16",
    ),
    "engine": (lambda g: _engine("reference"), r"the engine: rank 0 has \w+, rank 1 has reference"),
    "check_labels": (lambda g: {"check_labels": True}, r"check_labels: rank 0 has False, rank 1 has True"),
    "hidden": (
        lambda g: {"hidden": torch.randn(N, H).requires_grad_()},
        r"hidden, whose values differ: rank 0 has norm",
    ),
    "order": (lambda g: {"hidden": g["hidden"].roll(1, 0)}, r"hidden, whose values differ"),
    # refused on rank 1 alone, before it could exchange anything
    "refused": (
        lambda g: {"labels": g["labels"].float()},
        r"refused by rank 1: TypeError: labels must be int64 or int32",
    ),
    "no rows": (
        lambda g: {"weight": g["weight"][:0]},
        r"refused by rank 1: ValueError: weight must have at least one row",
    ),
}


def _mismatched(rank, size, first):
    """The error of each mismatch, and whether the group then still gives what it gave before."""
    given, told = _given(rank, size), {}
    expected = None if first else _call(given).logps.detach()
    for name, (change, _) in MISMATCHES.items():
        changed = change(given) if rank == 1 else {}
        options, around = (changed, nullcontext()) if isinstance(changed, dict) else ({}, changed)
        try:
            with around:
                _call(given | options)
            told[name] = "nothing was raised"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
        ours = _call(given).logps.detach()
        expected = ours if expected is None else expected
        assert torch.equal(ours, expected), name
    return told


@pytest.mark.parametrize("first", [True, False], ids=["the first call", "after good calls"])
def test_every_mismatch_is_the_same_named_error_on_every_rank(ranks, first):
    import re

    told = ranks(2)(_mismatched, first)
    assert told[0] == told[1]
    for name, (_, message) in MISMATCHES.items():
        assert re.match(rf"ValueError: vocab_group: .*{message}", told[0][name]), (name, told[0][name])


def _error_of(function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _backwards(rank, size):
    given, told = _given(rank, size), {}
    stats = _call(given)
    scale = torch.tensor(2.0 if rank == 1 else 1.0)
    told["scaled"] = _error_of((stats.logps.sum() * scale).backward, retain_graph=True)
    told["entropy"] = _error_of(
        (stats.logps if rank else stats.logps + stats.entropy).sum().backward, retain_graph=True
    )
    once = torch.autograd.grad(stats.logps.sum(), given["weight"], retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(stats.logps.sum(), given["weight"])[0])
    stats = _call(given)
    if rank == 1:
        with torch.no_grad():
            given["weight"] += 1.0
    told["in place"] = _error_of(stats.logps.sum().backward)
    if rank == 1:
        with torch.no_grad():
            given["weight"] -= 1.0
    told["both refuse"] = _error_of(_call, given | {"labels": given["labels"].float()})
    # before the door: what the loss checks itself
    pairs = {"hidden": given["hidden"].detach().view(2, 12, H), "labels": given["labels"].view(2, 12)}
    if rank == 1:
        pairs = {name: x.view(1, 24, *x.shape[2:]) for name, x in pairs.items()}
    told["layout"] = _error_of(fastdpo.linear_dpo_loss, weight=given["weight"], vocab_group=dist.group.WORLD, **pairs)
    out_of_range = given | {"labels": given["labels"] + 1000, "check_labels": True}
    told["out of range"] = _error_of(_call, out_of_range)
    tensors = (*(given[name] for name in ("hidden", "weight", "bias")), *given["lora"][:2], given["labels"])
    options = fastdpo.head.HeadOptions(vocab_group=dist.group.WORLD)
    told["function"] = _error_of(
        fastdpo.LinearLogpsFunction.apply, *tensors, options, ("x",) if rank else (), True, 0.5
    )
    by_function = fastdpo.LinearLogpsFunction.apply(*tensors, options, (), True, 0.5)[0]
    assert torch.equal(by_function, _call(given).logps)
    return told


def test_backwards_and_refusals_are_the_same_error_on_every_rank(ranks):
    zero, one = ranks(2)(_backwards)
    for name in ("scaled", "entropy", "in place", "layout", "function", "both refuse", "out of range"):
        assert zero[name] == one[name], name
    assert "the upstream gradient of logps, whose values differ: rank 0 has norm" in zero["scaled"]
    assert "what has an upstream gradient: rank 0 has logps and entropy, rank 1 has logps" in zero["entropy"]
    assert "refused by rank 1: RuntimeError: one of the variables needed" in zero["in place"]
    assert zero["both refuse"].startswith("TypeError: labels must be int64")  # each rank's own
    assert "refused by rank 1: ValueError: hidden must hold as many rejected sequences" in zero["layout"]
    assert zero["out of range"].startswith("ValueError: labels[") and f"[0, {V})" in zero["out of range"]
    assert "refused by rank 1: ValueError: stats must be a collection" in zero["function"]


def _rounded(rank, size):
    """What is no mismatch: other rounding, other rows where labels are ignored, NaN, another layout or label width."""
    given = _given(rank, size)
    with torch.no_grad():
        given["hidden"][3] = torch.nan
        if rank == 1:
            given["hidden"].copy_(given["hidden"].bfloat16())
            given["hidden"][::5] = torch.randn(5, H)
            given["labels"] = given["labels"].int()
    given["hidden"] = given["hidden"].detach().t().contiguous().t().requires_grad_(True)
    stats = _call(given)
    stats.logps.sum().backward()
    empty = _call(given | {"hidden": given["hidden"][:0], "labels": given["labels"][:0]})
    assert empty.logps.shape == (0,)
    return stats.logps.detach(), given["hidden"].grad


def test_rounding_and_ignored_rows_are_no_mismatch_and_ranks_take_the_same_steps(ranks):
    (zero, dzero), (one, done) = ranks(2)(_rounded)
    assert zero[3].isnan() and torch.isfinite(zero[[0, 1, 2, *range(4, N)]]).all()
    assert torch.equal(zero.nan_to_num(9.0), one.nan_to_num(9.0)) and torch.equal(
        dzero.nan_to_num(9.0), done.nan_to_num(9.0)
    )


def _on_a_device(rank, size):
    """As on a GPU, where the host does not wait for what it has seen before."""
    handshake._waits, waits = (lambda device: False), handshake._waits
    given, told = _given(rank, size), {}
    try:
        told["new"] = _error_of(_call, given | ({"softcap": 3.0} if rank else {}))
        good = [_call(given | {"seed": seed}).logps.detach() for seed in (1, 1, 2)]
        assert len(handshake._known[dist.group.WORLD]) == 1 and torch.equal(good[0], good[1])
        for name, change in {
            "labels": {"labels": given["labels"].roll(5)},
            "hidden": {"hidden": given["hidden"].roll(1, 0)},
            "seed": {"seed": 8},
        }.items():
            stats = _call(given | (change if rank else {}))
            gradient = torch.autograd.grad(stats.logps.sum(), given["weight"])[0]
            told[name] = [
                stats.logps.isnan().all().item(),
                stats.entropy.isnan().all().item(),
                gradient.isnan().any().item(),
            ]
        stats = _call(given)
        gradient = torch.autograd.grad((stats.logps * (1.0 + rank)).sum(), given["weight"], retain_graph=True)[0]
        told["coef"] = [stats.logps.isnan().any().item(), False, gradient.isnan().any().item()]
        assert torch.isfinite(torch.autograd.grad(stats.logps.sum(), given["weight"])[0]).all()
    finally:
        handshake._waits = waits
    return told


def test_on_a_device_what_is_known_is_not_waited_for_and_mismatches_are_nan(ranks):
    zero, one = ranks(2)(_on_a_device)
    assert zero == one and "softcap: rank 0 has None, rank 1 has 3.0" in zero["new"]
    assert zero["labels"] == zero["hidden"] == zero["seed"] == [True, True, True]
    assert zero["coef"] == [False, False, True]


def _counted(rank, size):
    """Exchanges of a forward, and the draws of ranks that have generators of their own."""
    given, counts, gather = _given(rank, size), {}, dist.all_gather
    for seed in (7, None):
        sizes = counts[seed] = []
        dist.all_gather = lambda out, x, group=None, sizes=sizes: (sizes.append(x.numel()), gather(out, x, group=group))
        try:
            stats = _call(given | {"seed": seed})
        finally:
            dist.all_gather = gather
        stats.logps.sum().backward()
    compiled = torch.compile(lambda g: _call(g).logps * 2.0, backend="eager")(given)
    assert torch.equal(compiled, 2.0 * _call(given).logps)
    return counts, given["hidden"].grad


def test_one_exchange_of_one_size_comes_before_those_that_data_sizes(ranks):
    (counts, gradient), (others, theirs) = ranks(2)(_counted)
    assert counts == others and counts[7] == counts[None] and counts[7][0] > 100
    assert torch.equal(gradient, theirs)  # drawn by rank 0


def _fails(rank, size, where):
    group = dist.new_group(timeout=datetime.timedelta(seconds=4))
    given = _given(rank, size) | {"vocab_group": group}
    from fastdpo import logps
    from fastdpo.ops import operators

    if rank == 1:
        if where == "before":
            raise KeyError("the trainer's own")

        def no_memory(*args, **kwargs):
            raise MemoryError("16 GiB of logits")

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt("Ctrl-C")

        if where == "checking":
            logps.check_head = interrupted
        else:
            operators._problem = no_memory if where == "within" else interrupted
    start = time.monotonic()
    try:
        _call(given)
    finally:
        assert time.monotonic() - start < 45.0


@pytest.mark.parametrize("where", ["before", "within", "checking", "interrupted"])
def test_a_rank_that_fails_makes_the_others_fail_within_the_time_out(ranks, where):
    errors = ranks(2).errors(_fails, where)
    ranks(2).stop()  # out of step
    if where == "before":
        assert errors[1].kind == "KeyError" and errors[0].kind == "RuntimeError"
        assert "not every rank came to this call of fastdpo within the group's time-out" in str(errors[0])
    elif where == "within":
        assert errors[1].kind == "MemoryError"
        assert "did not finish this call: rank 1 failed with MemoryError: 16 GiB of logits" in str(errors[0])
    else:
        assert errors[1].kind == "KeyboardInterrupt"
        assert "rank 1 failed with KeyboardInterrupt: Ctrl-C" in str(errors[0])


def _meshes(rank, size):
    mesh = dist.init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    given = _given(rank, size)
    same = torch.equal(_call(given | {"vocab_group": mesh}).logps, _call(given).logps)
    two = dist.init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    same &= torch.equal(_call(given | {"vocab_group": two["tp"]}).logps, _call(given).logps)
    return same, _error_of(_call, given | {"vocab_group": two})


def test_a_mesh_of_one_dimension_is_its_group(ranks):
    for same, error in ranks(2)(_meshes):
        assert same
        assert error.startswith("ValueError: vocab_group must be a one-dimensional mesh; got one of shape")
        assert error.endswith("pass one of them, such as mesh['tp'], or its get_group()")
