"""csrc/pair_lists.cu: the lists of triton_lists.py in three launches on the caller's stream."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .triton_launch import NativeKernel, Recorder

_ARGUMENTS = ("bitmap", "first_token", "capacity", "first_block", "num_blocks", "running", "tokens")
KERNELS = tuple(NativeKernel(f"list_{name}_kernel", *_ARGUMENTS) for name in ("count", "plan", "fill"))


def available(device: torch.device) -> bool:
    if Recorder.active is not None:
        return Recorder.active.native
    return device.type == "cuda" and native.cuda_problem(torch.cuda.get_device_capability(device)) is None


def fill(
    lists, bitmap: Tensor, coef: Tensor, rows: Tensor, count: Tensor, first_token: int, capacity: int,
    first_block: int, num_blocks: int, tile: int, tiles_per_round: int, crossover: float, on_host: bool = False,
) -> None:  # fmt: skip
    """Fills a `triton_lists.Lists`; `on_host`, for tests: by the same functions, on tensors of the CPU."""
    if Recorder.active is not None:
        arguments = (bitmap, first_token, capacity, first_block, num_blocks, lists.running, lists.tokens)
        Recorder.active.launches.extend((kernel, (), arguments, {}, 0, 0) for kernel in KERNELS)
        return
    arguments = (
        bitmap.data_ptr(), bitmap.stride(0), coef.data_ptr(), rows.data_ptr(), count.data_ptr(),
        first_token, capacity, first_block, num_blocks, tile, tiles_per_round, lists.rounds, crossover,
        *(x.data_ptr() for x in (lists.running, lists.lengths, lists.first_tile, lists.round_block, lists.is_routed)),
        lists.tile_block.data_ptr(), lists.tokens.data_ptr(),
    )  # fmt: skip
    finished = torch.empty(1, dtype=torch.int32, device=bitmap.device)
    if on_host:
        native.extension().host_pair_lists(*arguments, finished.data_ptr())
    else:
        native.launch("cuda_pair_lists", bitmap.device, *arguments, finished.data_ptr())
