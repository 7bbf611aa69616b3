"""Groups of processes as arguments, and their one exchange: gathered in rank order, so that sums have the same bits on
every rank and in every run, which an all_reduce's need not."""

from __future__ import annotations

import torch
from torch import Tensor


def process_group(name: str, value):
    """The process group that `value` is or has; TypeError or ValueError naming the argument."""
    if torch.distributed.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(value, DeviceMesh):
            if value.ndim != 1:
                names = value.mesh_dim_names or ("tp",)
                raise ValueError(
                    f"{name} must be a one-dimensional mesh; got one of shape {tuple(value.mesh.shape)}, dimensions "
                    f"{value.mesh_dim_names}: pass one of them, such as mesh[{names[-1]!r}], or its get_group()"
                )
            value = value.get_group()
        another = torch.distributed.GroupMember.NON_GROUP_MEMBER  # what new_group returns to those that are not in it
        if isinstance(value, torch.distributed.ProcessGroup):
            if torch.distributed.get_rank(value) >= 0:
                return value
            another = value
        if value is another:
            raise ValueError(f"{name} must be a group that this process is a rank of; got {value!r}")
    raise TypeError(
        f"{name} must be a process group of torch.distributed or a one-dimensional DeviceMesh; got {value!r}"
    )


def gather(group, x: Tensor) -> Tensor:
    """[size, *x.shape], in rank order; shapes must be equal."""
    import torch.distributed as dist

    size, x = dist.get_world_size(group), x.contiguous()
    if size == 1 or not x.numel():
        return x[None].expand(size, *x.shape)
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)
