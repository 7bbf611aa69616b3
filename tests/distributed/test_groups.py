"""What a group may be given as, and what it exchanges."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastdpo.distributed.groups import gather, process_group


@pytest.mark.parametrize("value", ["nccl", 0, None])
def test_what_is_no_group_is_refused_by_name(value):
    with pytest.raises(TypeError, match=f"^some_group must be a process group .* DeviceMesh; got {value!r}$"):
        process_group("some_group", value)


def _groups(rank, size):
    mesh = dist.init_device_mesh("cpu", (size,))
    groups = [dist.new_group([member]) for member in range(2)]
    mine, other = groups[rank], groups[1 - rank]
    assert process_group("g", dist.group.WORLD) is dist.group.WORLD
    assert dist.get_process_group_ranks(process_group("g", mesh)) == list(range(size))
    assert process_group("g", mine) is mine
    with pytest.raises(ValueError, match=r"^g must be a group that this process is a rank of"):
        process_group("g", other)
    with pytest.raises(ValueError, match=r"^g must be a one-dimensional mesh; .*\(1, 2\).* such as mesh\['b'\]"):
        process_group("g", dist.init_device_mesh("cpu", (1, size), mesh_dim_names=("a", "b")))
    x = torch.arange(6.0).view(2, 3).T + 10 * rank  # not contiguous
    return gather(dist.group.WORLD, x), gather(mine, x), gather(dist.group.WORLD, x[:0])


def test_ranks(ranks):
    for rank, (found, alone, empty) in enumerate(ranks(2)(_groups)):
        expected = torch.stack([torch.arange(6.0).view(2, 3).T + 10 * other for other in range(2)])
        assert torch.equal(found, expected) and torch.equal(alone, expected[rank : rank + 1])
        assert empty.shape == (2, 0, 2)
