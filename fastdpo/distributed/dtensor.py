"""DTensors as arguments: what a call computes with on this rank, and where its gradients go.

Two questions decide, per dimension of the mesh that the head lies on. Are the tokens (hidden, labels) the same on its
ranks, as in tensor parallelism, or each rank's own, as in data parallelism and FSDP? And how is the head placed there?

    head         same tokens                               each rank's own tokens
    Replicate    as it is, the gradient is complete        as it is, the gradient is summed over the ranks
    Shard(0)     a shard of the vocabulary: vocab_group    gathered, or the tokens travel (travel.py); the gradient
                                                           is summed over the ranks, each getting its rows
    others       refused                                   Shard, _StridedShard: gathered; Partial: refused

So a gradient is that of the sum of the ranks' losses. Whose tokens they are is said by `vocab_group=` (the group of
that dimension: the same), else by hidden where that is a DTensor (Replicate: the same; Shard: each rank's own, as in
sequence parallelism), else by the dimension's name. Where nothing says it, a Replicate dimension is taken to have the
same tokens, as DTensor itself takes a plain tensor beside one; a Shard is refused. What is plain beside a weight that
is a DTensor is whole on every rank. A plain head beside a hidden that is a DTensor takes the gradient of this rank's
rows, as in DDP before it averages. Results are plain tensors of the rows that this rank holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..head import HeadOptions
from ..tensors import plain

SAME = ("tp", "tensor", "tensor_parallel", "model", "model_parallel", "mp")  # names of dimensions with the same tokens
OWN = (  # and of those where each rank has its own
    *("dp", "data", "data_parallel", "ddp", "fsdp", "hsdp", "batch", "replicate", "shard", "dp_replicate", "dp_shard"),
    *("cp", "sp", "context", "context_parallel", "dp_cp", "dp_shard_cp"),
)


class Resolved(NamedTuple):
    """A call in plain tensors of this rank."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H], or this rank's rows with options.vocab_group
    labels: Tensor
    bias: Tensor | None
    lora: tuple | None
    options: HeadOptions


def any_dtensor(*tensors) -> bool:
    for x in tensors:
        if isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) and type(x).__name__ == "DTensor":
            return True
    return False


def plain_or_dtensor(name: str, x) -> Tensor:
    """A part of a head: as the door takes it."""
    return x if any_dtensor(x) else plain(name, x)


def local_rows(hidden, labels, name: str = "hidden") -> tuple[Tensor, Tensor]:
    """The rows of hidden and labels that this rank holds, plain; gradients return to hidden's placements.

    Raises TypeError or ValueError, by name, where they are placed otherwise than by rows, or differently."""
    if any_dtensor(labels):
        if any_dtensor(hidden) and labels.device_mesh == hidden.device_mesh:
            labels = labels.redistribute(placements=hidden.placements)
        elif any(labels.device_mesh.size(i) > 1 and not p.is_replicate() for i, p in enumerate(labels.placements)):
            raise ValueError(
                f"labels is a DTensor with placements {labels.placements}, but {name} is not on its mesh: pass both as "
                "DTensors of one mesh, or to_local() of both"
            )
        labels = labels.to_local()
    if any_dtensor(hidden):
        for placement in hidden.placements:
            if not placement.is_replicate() and not (
                type(placement).__name__ == "Shard" and placement.dim % hidden.ndim < hidden.ndim - 1
            ):
                raise _refusal(name, hidden, placement, "redistribute() it to Replicate or to Shard of its rows")
        hidden = hidden.to_local()
    return hidden, labels


def resolve(hidden, weight, labels, bias, lora, options: HeadOptions) -> tuple[Resolved, Plan | None]:
    """(the call in plain tensors; the plan of the head, where its weight is not whole in them: `apply` it).

    Raises TypeError or ValueError naming the argument, its placement and what to do.
    """
    rows, ids = local_rows(hidden, labels)
    a, b = (lora[0], lora[1]) if isinstance(lora, (tuple, list)) and len(lora) == 3 else (None, None)
    on_mesh = [x for x in (weight, bias, a, b) if any_dtensor(x)]
    if not on_mesh:
        return Resolved(rows, weight, ids, bias, lora, options), None
    plan = Plan.of(on_mesh[0].device_mesh, hidden, weight, options)
    return Resolved(rows, weight, ids, bias, lora, options), plan


class Plan(NamedTuple):
    """What becomes of a head on a mesh, per dimension."""

    mesh: object
    plain_weight: bool  # weight is no DTensor: bias and B that are none are laid out as it is
    target: tuple  # placements of weight, bias and B for the call
    gradient: tuple  # and of their gradients
    gradient_of_a: tuple
    split: int | None  # the dimension with a shard of the vocabulary each
    gathered: tuple[int, ...]  # those over which the head is gathered
    vocab_size: int  # of a weight that is a DTensor

    @staticmethod
    def of(mesh, hidden, weight, options: HeadOptions, travelling: int | None = None) -> Plan:
        """`travelling`: the dimension whose ranks' tokens are brought to every one of them."""
        if mesh.get_coordinate() is None:
            raise ValueError(f"weight lies on {mesh}, of which this process is no rank")
        replicate, partial, shard = _placements()
        whose = [_tokens(mesh, i, hidden, options.vocab_group) for i in range(mesh.ndim)]
        if travelling is not None:
            whose[travelling] = "same"
        target, gradient, of_a, split, gathered = [], [], [], [], []
        for i, tokens in enumerate(whose):
            summed = partial if tokens == "own" else replicate
            of_a.append(summed)
            placement = _placement(weight, mesh, i, options.vocab_group)
            if placement.is_replicate() or mesh.size(i) == 1:
                target.append(replicate)
                gradient.append(summed)
            elif tokens == "own" and type(placement).__name__ in ("Shard", "_StridedShard"):
                target.append(replicate)
                gradient.append(partial)
                gathered.append(i)
            elif type(placement).__name__ == "Shard" and placement.dim == 0:
                if tokens is None:
                    raise _ambiguous(weight, mesh, i)
                if i != travelling:
                    _check_same_rows(hidden, mesh, i)
                target.append(shard)
                gradient.append(shard)
                split.append(i)
            else:
                raise _refusal(
                    "weight", weight, placement, f"redistribute() it to Shard(0) or Replicate on {_named(mesh, i)}"
                )
        if len(split) > 1:
            names = " and ".join(_named(mesh, i) for i in split)
            raise ValueError(f"weight is split over {names}: one dimension may hold shards of the vocabulary")
        given = options.vocab_group
        if given is not None and not any(_same_ranks(given, mesh.get_group(i)) for i in split) and any_dtensor(weight):
            raise ValueError(
                f"vocab_group is given, but weight, a DTensor with placements {weight.placements} on {mesh}, is not "
                "split along the vocabulary over its ranks"
            )
        for i in split:
            if not _in_order(mesh, i):
                raise ValueError(f"the ranks of {_named(mesh, i)} of {mesh} are not in the order of their group")
        return Plan(
            mesh,
            not any_dtensor(weight),
            *(tuple(x) for x in (target, gradient, of_a)),
            split[0] if split else None,
            tuple(gathered),
            weight.shape[0],
        )

    def may_travel(self, weight) -> bool:
        """Whether the tokens can go to the head's shards instead: where one dimension alone splits it, along the
        vocabulary, with at least a row on every rank."""
        if len(self.gathered) != 1 or self.split is not None or self.plain_weight:
            return False
        i, placement = self.gathered[0], weight.placements[self.gathered[0]]
        ranks = self.mesh.size(i)
        whole_chunk = -(-weight.shape[0] // ranks)  # DTensor's shards, the last ones may be empty
        by_rows = type(placement).__name__ == "Shard" and placement.dim == 0
        return by_rows and _in_order(self.mesh, i) and whole_chunk * (ranks - 1) < weight.shape[0]

    def group(self, dimension: int):
        return self.mesh.get_group(dimension)

    def apply(self, call: Resolved) -> Resolved:
        """With this rank's part of the head in plain tensors, whose gradients return to the DTensors."""
        weight = call.weight if self.plain_weight else self._local("weight", call.weight)
        bias, lora, options = call.bias, call.lora, call.options
        if isinstance(bias, Tensor):
            bias = self._local("bias", bias)
        if isinstance(lora, (tuple, list)) and len(lora) == 3:
            lora = (self._local("lora A", lora[0]), self._local("lora B", lora[1]), lora[2])
        if self.split is not None and options.vocab_group is None:
            options = replace(options, vocab_group=self.group(self.split))
        return Resolved(call.hidden, weight, call.labels, bias, lora, options)

    def _local(self, name: str, x):
        from torch.distributed.tensor import DTensor

        if not isinstance(x, Tensor):
            return x
        replicate, *_ = _placements()
        if not self.plain_weight and name in ("bias", "lora B") and x.shape[:1] != (self.vocab_size,):
            raise ValueError(f"{name} must have the {self.vocab_size} rows of weight; got shape {tuple(x.shape)}")
        if not any_dtensor(x):
            if self.plain_weight:
                return x
            # whole on every rank; what is taken of it, its gradient is put back together
            x = DTensor.from_local(x, self.mesh, [replicate] * self.mesh.ndim, run_check=False)
        if x.device_mesh != self.mesh:
            raise ValueError(
                f"{name} lies on {x.device_mesh}, the rest of the head on {self.mesh}: pass all on one mesh"
            )
        for placement in x.placements:
            if placement.is_partial():
                raise _refusal(name, x, placement, "redistribute() it to Replicate")
        of_a = name == "lora A"
        target = [replicate] * self.mesh.ndim if of_a else self.target
        return x.redistribute(placements=target).to_local(grad_placements=self.gradient_of_a if of_a else self.gradient)


def _placements():
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Replicate(), Partial(), Shard(0)


def _placement(weight, mesh, dimension: int, group):
    """Of the weight; a plain one beside a DTensor is whole, or a shard of `vocab_group`."""
    replicate, _, shard = _placements()
    if any_dtensor(weight):
        return weight.placements[dimension]
    return shard if group is not None and _same_ranks(group, mesh.get_group(dimension)) else replicate


def _tokens(mesh, dimension: int, hidden, group) -> str | None:
    if group is not None and _same_ranks(group, mesh.get_group(dimension)):
        return "same"
    placement = _placement_of_hidden(hidden, mesh, dimension)
    if placement is not None:
        return "same" if placement.is_replicate() else "own"
    name = mesh.mesh_dim_names[dimension] if mesh.mesh_dim_names else None
    return "same" if name in SAME else "own" if name in OWN else None


def _placement_of_hidden(hidden, mesh, dimension: int):
    """None where hidden is plain, or on no dimension of these ranks."""
    if any_dtensor(hidden):
        for i, placement in enumerate(hidden.placements):
            if _same_ranks(hidden.device_mesh.get_group(i), mesh.get_group(dimension)):
                return placement
    return None


def _check_same_rows(hidden, mesh, dimension: int) -> None:
    placement = _placement_of_hidden(hidden, mesh, dimension)
    if placement is not None and not placement.is_replicate():
        raise _refusal(
            "hidden",
            hidden,
            placement,
            f"redistribute() it to Replicate on {_named(mesh, dimension)}, over which weight is split",
        )


def _same_ranks(a, b) -> bool:
    ranks_of = torch.distributed.get_process_group_ranks
    return a is b or ranks_of(a) == ranks_of(b)


def _in_order(mesh, dimension: int) -> bool:
    """Whether shards lie in the order of their group's ranks."""
    place = list(mesh.get_coordinate())
    place[dimension] = slice(None)
    ranks = torch.distributed.get_process_group_ranks(mesh.get_group(dimension))
    return mesh.mesh[tuple(place)].tolist() == ranks


def _named(mesh, dimension: int) -> str:
    return repr(mesh.mesh_dim_names[dimension]) if mesh.mesh_dim_names else f"mesh dimension {dimension}"


def _ambiguous(weight, mesh, dimension: int) -> TypeError:
    return TypeError(
        f"weight is a DTensor with placements {weight.placements} on {mesh}, and nothing says whether "
        f"{_named(mesh, dimension)} has the same tokens on its ranks (tensor parallel) or each rank's own: name the "
        f"dimension ({', '.join(map(repr, SAME[:2]))}, ... or {', '.join(map(repr, OWN[:2]))}, 'fsdp', ...), pass its "
        "group as vocab_group=, or pass hidden as a DTensor on it (Replicate or Shard)"
    )


def _refusal(name: str, x, placement, instead: str) -> TypeError:
    return TypeError(f"{name} is a DTensor placed {placement} ({tuple(x.placements)} on {x.device_mesh}): {instead}")
