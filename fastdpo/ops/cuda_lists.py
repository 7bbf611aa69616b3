"""csrc/pair_lists.cu: the lists of triton_lists.py in three launches on the caller's stream."""

from __future__ import annotations

from functools import partial

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
    address = partial(native.address, device=bitmap.device.type)
    arguments = (
        address(bitmap, rows=True), bitmap.stride(0), *map(address, (coef, rows, count)),
        first_token, capacity, first_block, num_blocks, tile, tiles_per_round, lists.rounds, crossover,
        *map(address, (lists.running, lists.lengths, lists.first_tile, lists.round_block, lists.is_routed)),
        *map(address, (lists.tile_block, lists.tokens)),
    )  # fmt: skip
    finished = torch.empty(1, dtype=torch.int32, device=bitmap.device)
    if on_host:
        native.extension().host_pair_lists(*arguments, address(finished))
    else:
        native.launch("cuda_pair_lists", bitmap.device, *arguments, address(finished))
