"""What the blocks of docs/distributed.md find on each of two processes, and what is seen to after they ran.

Each function returns the names that a block finds; `run` executes it and returns what is to be the same, or not, on the
ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from doc_contexts import H, V, batch, given, tiny_model


def _mesh(name: str, size: int):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size,), mesh_dim_names=(name,))


def _pairs(rank: int) -> dict:
    """This rank's own pairs."""
    ids, mask, labels = batch()
    ids = (ids + 5 * rank) % V
    return {"ids": ids, "mask": mask, "labels": ids.masked_fill(labels == -100, -100)}


def data_parallel(rank: int, size: int) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    return {"DistributedDataParallel": DistributedDataParallel} | _pairs(rank)


def fsdp(rank: int, size: int) -> dict:
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh("fsdp", size)
    return {"fully_shard": lambda module: fully_shard(module, mesh=mesh)} | _pairs(rank)


def never_gathered(rank: int, size: int) -> dict:
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(V, H) * 0.2)
    names = {"distribute_tensor": distribute_tensor, "Shard": Shard, "lm_head_weight": weight}
    return names | {"mesh": {"fsdp": _mesh("fsdp", size)}} | _pairs(rank)


def tensor_parallel(rank: int, size: int) -> dict:
    shard = torch.nn.Parameter(tiny_model().lm_head.weight.detach().tensor_split(size)[rank].clone())
    torch.manual_seed(4)
    return {"shard": shard, "group": dist.group.WORLD, "hidden": torch.randn(4, 8, H), "ref_logps": torch.zeros(4)}


def context_parallel(rank: int, size: int) -> dict:
    torch.manual_seed(5)
    hidden, labels = torch.randn(4, 8, H), batch()[2]
    parts = {"hidden": hidden.chunk(size, 1)[rank], "labels": labels.chunk(size, 1)[rank], "ref_logps": torch.zeros(4)}
    return {"mesh": {"cp": _mesh("cp", size)}} | parts


class _OfRank:
    """A schedule of which a rank takes the step that is its own: the first the inputs', the last the target's."""

    def __init__(self, make, first: bool, last: bool):
        self.make, self.first, self.last, self.losses = make, first, last, []

    def __call__(self, *args, **kwargs):
        self.schedule = self.make(*args, **kwargs)
        return self

    def step(self, *inputs, **given):
        if (inputs and self.first) or (given and self.last):
            self.schedule.step(*inputs, losses=self.losses, **given)


def pipeline(rank: int, size: int) -> dict:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    import fastdpo
    from fastdpo.microbatches import interleave, paired

    model = tiny_model()
    body = torch.nn.Sequential(model.model.embed_tokens) if rank == 0 else torch.nn.Sequential(model.lm_head)
    stage = PipelineStage(body, rank, size, torch.device("cpu"))
    ids, _, labels = batch()

    def loss(logits, labels, ref_logps):
        logps = fastdpo.selective_log_softmax(logits, labels).sum(-1)
        return fastdpo.preference_loss(*logps.chunk(2), *ref_logps.chunk(2)).loss

    schedule = _OfRank(Schedule1F1B, rank == 0, rank == size - 1)
    names = {"Schedule1F1B": schedule, "interleave": interleave, "paired": paired, "loss": loss, "stage": stage}
    return names | {
        "chunks": 2,
        "B": 2,
        "ids": ids,
        "labels": labels,
        "ref_logps": torch.zeros(4),
        "schedule": schedule,
    }


def run(rank: int, size: int, prepare: str, code, source: str) -> dict[str, torch.Tensor]:
    """Executes a block; returns its losses and, as one number each, the gradients of the model's parameters."""
    space = given() | globals()[prepare](rank, size)
    exec(compile(code, source, "exec"), space)
    seen: dict[str, torch.Tensor] = {}
    if prepare == "pipeline":
        return {"losses": torch.stack(space["schedule"].losses).detach()} if rank == size - 1 else {}
    out = space.get("out")
    if out is None:  # the model is sharded: what follows in a script
        logps = space["model"](space["ids"], labels=space["labels"], fastdpo=True).logps.sum(-1)
        out = space["fastdpo"].preference_loss(*logps.chunk(2))
    seen["loss"] = out.loss.detach()
    if prepare in ("data_parallel", "fsdp"):
        out.loss.backward()
        head = next(parameter for name, parameter in space["model"].named_parameters() if "lm_head" in name)
        gradient = head.grad.full_tensor() if hasattr(head.grad, "full_tensor") else head.grad
        seen["gradient of the head"] = gradient
    if prepare == "never_gathered":
        seen["gradient of the head"] = space["weight"].grad.full_tensor()
    return seen
