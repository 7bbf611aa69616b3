"""A head on a device mesh, scored by every rank of it with its own tokens, beside one process with everything."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from heads import relative_error

import fastdpo

H = 16
NAMES = ("weight", "bias", "lora_a", "lora_b")


@dataclass
class Case:
    """`head`: placements of weight, and of bias and B unless `others` says; R, or S for Shard(0)."""

    shape: tuple[int, ...]
    names: tuple[str, ...] | None
    head: str
    hidden: str = "plain"  # or the placements of a DTensor
    others: str | None = None  # placements of bias and B, or "plain"
    V: int = 301
    rows: tuple[int, ...] = (23,)  # of each group of ranks with tokens of its own, in the order of the mesh
    own: tuple[int, ...] = ()  # dimensions of the mesh whose ranks have their own tokens
    frozen: tuple[str, ...] = ()
    travels: bool | None = None
    turn: int | None = None  # rows of all ranks in a turn are this part of the vocabulary
    vocab_dimension: int | None = None
    dtype: torch.dtype = torch.float32
    options: dict = field(default_factory=lambda: {"backward": "exact"})


def tensors(case: Case):
    """fp64 values that every process makes alike: (hidden and labels of each group, the head)."""
    generator = torch.Generator().manual_seed(17)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype).double()

    head = (normal(case.V, H) * 0.3, normal(case.V), normal(3, H), normal(case.V, 3) * 0.3)
    groups = []
    for rows in case.rows:
        labels = torch.randint(case.V, (rows,), generator=generator)
        labels[torch.rand(rows, generator=generator) < 0.3] = -100
        groups.append((normal(rows, H), labels))
    return groups, head


def loss_of(stats, labels) -> torch.Tensor:
    """With another weight on every token, from what the token is: the same whichever rank scores it."""
    weights = 0.5 + (labels % 7)
    total = (stats.logps * weights).sum() + (0.3 * stats.lse * (labels % 5)).sum()
    return total if stats.entropy is None else total + (stats.entropy * weights).sum()


def placements(text: str):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [{"R": Replicate(), "S": Shard(0), "C": Shard(1), "P": Partial()}[x] for x in text]


def scored(rank: int, size: int, case: Case, engine: str | None = None) -> dict:
    """This rank's results; gradients as the whole tensors that the DTensors say they are."""
    from torch.distributed.tensor import distribute_tensor

    from fastdpo.distributed import travel

    mesh = dist.init_device_mesh("cpu", case.shape, mesh_dim_names=case.names)
    groups, head = tensors(case)
    place = mesh.get_coordinate()
    group = 0
    for i in case.own:
        group = group * case.shape[i] + place[i]
    saved = travel.cheaper, travel.TURN
    travelled = []
    if case.travels is not None:
        travel.cheaper = lambda *_: travelled.append(1) or case.travels
    travel.TURN = case.turn or saved[1]
    if engine:
        os.environ["FASTDPO_ENGINE"] = engine
    try:
        leaves = {}
        for name, x in zip(NAMES, head):
            where = case.head if name == "weight" or case.others is None else case.others
            where = "R" * len(case.shape) if name == "lora_a" and where != "plain" else where
            x = x.to(case.dtype)
            if where != "plain":
                x = distribute_tensor(x.clone(), mesh, placements(where))
            leaves[name] = x.detach().requires_grad_(name not in case.frozen)
        hidden, labels = groups[group if len(groups) > 1 else 0]
        hidden = hidden.to(case.dtype)
        if case.hidden != "plain":
            hidden = distribute_tensor(hidden, mesh, placements(case.hidden))
            labels = distribute_tensor(labels, mesh, placements(case.hidden))
        hidden = hidden.detach().requires_grad_("hidden" not in case.frozen)
        options = dict(case.options)
        if case.vocab_dimension is not None:
            options["vocab_group"] = mesh.get_group(case.vocab_dimension)
        lora = (leaves["lora_a"], leaves["lora_b"], 0.7)
        stats = fastdpo.linear_token_stats(
            hidden, leaves["weight"], labels, leaves["bias"], lora=lora, stats=("entropy", "is_top1", "lse"), **options
        )
        ids = labels.to_local() if case.hidden != "plain" else labels
        loss = loss_of(stats if case.options["backward"] == "exact" else stats._replace(entropy=None), ids)
        loss.backward()
    finally:
        travel.cheaper, travel.TURN = saved
        if engine:
            del os.environ["FASTDPO_ENGINE"]
    assert type(stats.logps) is torch.Tensor and stats.logps.shape == ids.shape
    assert case.travels is None or bool(travelled) == bool(case.own and "S" in case.head)
    found = {"logps": stats.logps.detach(), "entropy": stats.entropy.detach(), "is_top1": stats.is_top1, "labels": ids}
    found["group"] = group
    for name, leaf in {"hidden": hidden, **leaves}.items():
        gradient = leaf.grad
        if gradient is not None and hasattr(gradient, "full_tensor"):
            assert gradient.placements == leaf.placements and gradient.shape == leaf.shape, (name, gradient.placements)
            assert gradient.to_local().shape == leaf.to_local().shape
            gradient = gradient.full_tensor()
        found[name] = gradient
    return found


def check(case: Case, results: list[dict], tolerance: float = 2e-6) -> None:
    """Every rank's rows and whole gradients against one process's, of the sum of the groups' losses."""
    groups, head = tensors(case)
    leaves = dict(zip(NAMES, (x.requires_grad_(name not in case.frozen) for name, x in zip(NAMES, head))))
    options = dict(case.options) | {"backward": "exact"}
    options.pop("tau", None), options.pop("seed", None)
    logps, entropies, dhidden = [], [], []
    for hidden, labels in groups:
        hidden.requires_grad_("hidden" not in case.frozen)
        stats = fastdpo.linear_token_stats(
            hidden,
            leaves["weight"],
            labels,
            leaves["bias"],
            lora=(leaves["lora_a"], leaves["lora_b"], 0.7),
            stats=("entropy", "lse"),
            **options,
        )
        loss_of(stats if case.options["backward"] == "exact" else stats._replace(entropy=None), labels).backward()
        logps.append(stats.logps.detach())
        entropies.append(stats.entropy.detach())
        dhidden.append(hidden.grad)
    close = 5 * tolerance
    for found in results:
        group = found["group"] if len(groups) > 1 else 0
        if case.hidden == "plain" or "S" not in case.hidden:
            torch.testing.assert_close(found["logps"].double(), logps[group], rtol=close, atol=close)
            torch.testing.assert_close(found["entropy"].double(), entropies[group], rtol=close, atol=close)
        for name in ("hidden", *NAMES):
            expected = dhidden[group] if name == "hidden" else leaves[name].grad
            if expected is None:
                assert found[name] is None, name
            else:
                assert relative_error(found[name], expected) < tolerance, (name, relative_error(found[name], expected))
    if "S" in case.hidden:
        joined = torch.cat([found["logps"] for found in results])
        torch.testing.assert_close(joined.double(), logps[0], rtol=close, atol=close)
