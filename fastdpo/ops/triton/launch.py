"""How kernels are launched, on what, and with which tiles: the one table of tile shapes is here."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from ...routing import BLOCK
from .special import release

# Major version -> (whose tiles, bytes of shared memory that they need). sm_110 has no product that Triton would use but
# sm_80's.
_FAMILIES = {8: (80, 163 << 10), 9: (90, 227 << 10), 10: (100, 227 << 10), 11: (80, 163 << 10), 12: (120, 99 << 10)}
_MEMORY = {86: 99 << 10, 89: 99 << 10}  # with less than their family


@dataclass(frozen=True)
class Target:
    """The machine that a call runs on."""

    capability: int  # 80, 86, 90, ...; 0: Triton's interpreter
    programs: int  # of a persistent kernel: one per multiprocessor
    memory: int | None = None  # bytes of shared memory that a program can have; None: as the family's first cards

    @functools.cached_property
    def has_tma(self) -> bool:
        return self.capability >= 90 or self.capability == 0

    @functools.cached_property
    def tiles(self) -> int:
        """Whose tiles fit: those of the family, where a program has the shared memory for them. sm_120's need least, of
        memory and of what a compiler may know."""
        if self.capability == 0:
            return 0
        family, memory = _FAMILIES.get(self.capability // 10, (120, 0))
        available = _MEMORY.get(self.capability, memory) if self.memory is None else self.memory
        return family if available >= memory else 120


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix product: rows by columns, `k` deep in every step of the loop."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8  # tiles of tokens that go through the other dimension together
    per_sm: int = 1  # programs of a persistent kernel on one multiprocessor


# What every kernel is compiled with: Triton's defaults change, and what is checked ahead of time is what runs.
OPTIONS = {"enable_fp_fusion": True}
# Triton's interpreter, which knows one program at a time, of whichever thread
_TURN = threading.Lock() if triton.knobs.runtime.interpret else contextlib.nullcontext()


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target(0, 3)
    properties = torch.cuda.get_device_properties(device)
    memory = getattr(properties, "shared_memory_per_block_optin", None)  # torch 2.6 does not say
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count, memory)


def on_device(device: torch.device):
    """Makes `device` the current one, where Triton launches."""
    real = device.type == "cuda" and Recorder.active is None
    return torch.cuda.device(device) if real else contextlib.nullcontext()


class Recorder:
    """Inside `with Recorder(target) as launches`, kernels are listed with their arguments instead of run.

    The tools that compile kernels ahead of time and count what a step costs see through it exactly what the engine
    launches.
    """

    active: Recorder | None = None

    def __init__(self, target: Target):
        self.target = target
        self.launches: list[tuple] = []

    def __enter__(self) -> list[tuple]:
        Recorder.active = self
        return self.launches

    def __exit__(self, *_):
        Recorder.active = None


def target_of(device: torch.device) -> Target:
    return Recorder.active.target if Recorder.active is not None else _target(device)


def launch(kernel, grid: tuple[int, ...], tile: Tile | None = None, *, warps: int = 4, **arguments) -> None:
    """kernel[grid](**arguments), with the tile's warps and stages; an empty grid launches nothing."""
    if 0 in grid:
        return
    warps, stages = (warps, 2) if tile is None else (tile.warps, tile.stages)
    if Recorder.active is not None:
        Recorder.active.launches.append((kernel, grid, arguments, warps, stages))
        return
    with _TURN:
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, **OPTIONS)


def are_aligned(*tensors: Tensor) -> bool:
    """Rows that TMA and copies of 16 bytes can address."""
    for x in tensors:
        if x.data_ptr() % 16 or x.stride(-1) != 1:
            return False
        for stride in x.stride()[:-1]:
            if stride * x.element_size() % 16:
                return False
    return True


_RELEASE = release(triton.__version__)
TUNED = Path(__file__).with_name("tuned.json")


@functools.cache
def tuned() -> dict[tuple[str, str, int], Tile]:
    """By kernel, kind and capability: what benchmarks.gpu.tune found to be the fastest with this release of Triton."""
    found = {}
    for index, one in enumerate(json.loads(TUNED.read_text())):
        try:
            key, shape = (one["kernel"], one["kind"], one["capability"]), Tile(**one["tile"])
            powers = [x & (x - 1) == 0 < x for x in (shape.m, shape.n, shape.k, shape.warps)]
            whole_blocks = shape.n % BLOCK == 0 or key[0] not in OF_LOGITS
            positive = min(shape.stages, shape.group, shape.per_sm) >= 1
            if key[0] not in _TILES or not (all(powers) and positive and whole_blocks):
                raise ValueError(f"no kernel {key[0]!r}, or no tile of one: {shape}")
            if release(one["triton"]) == _RELEASE:
                found[key] = shape
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{TUNED.name}, entry {index}: {error!r}") from error
    return found


def _since(kernel: str, kind: str, architecture: int) -> Tile | None:
    """Another tile than the table's where newer releases of Triton need it."""
    for first in sorted(_SINCE, reverse=True):
        if first <= _RELEASE and (kernel, kind, architecture) in _SINCE[first]:
            return _SINCE[first][kernel, kind, architecture]
    return None


def tile(kernel: str, target: Target, kind: str, out_columns: int | None = None) -> Tile:
    """The tile of a kernel for operands of a kind, no wider than its output: the measured one, or that of the table.

    Chosen by ahead-of-time compilation: no spills, most tensor-core work per byte of shared memory. `make kernels`
    prints what they use.
    """
    if target.tiles == 0:
        shape = _INTERPRETED[kernel]
    else:
        asked = kind
        while kind not in _TILES[kernel]:
            kind = _LIKE[kind]
        architecture = target.tiles if target.tiles in _TILES[kernel][kind] else 80
        shape = _since(kernel, kind, architecture) or _TILES[kernel][kind][architecture]
        shape = tuned().get((kernel, asked, target.capability), shape)
    if out_columns is not None:
        shape = replace(shape, n=min(shape.n, max(16, triton.next_power_of_2(out_columns))))
    return shape


# Kinds of operands: "half"; "short", the same with an H of at most SHORT, where a tile's epilogue weighs as much as its
# products, so that two programs of a multiprocessor take turns; "narrow", with something beside that takes registers or
# shared memory (operands stored wider than they are multiplied in, a low-rank head, a softcap); "fp32"; "low_rank", the
# few columns of such a head in fp32; "crowded", the exact kernel of such a head with operands in fp32, and its dweight
# of odd vocabularies in long batches; "unaligned", that is rows that can only be read one element at a time. A kernel
# without tiles of its own for a kind uses those of another kind, and an architecture those of sm_80.
SHORT = 1024
# Kernels whose tiles are logits: of whole blocks of the vocabulary, as what they store is by block.
OF_LOGITS = {"fold", "dz", "routed_dz", "divergence_fold", "divergence_dz", "divergence_routed_dz"}
_LIKE = {"low_rank": "fp32", "fp32": "half", "narrow": "half", "short": "half", "unaligned": "half"}
_TILES: dict[str, dict[str, dict[int, Tile]]] = {
    "fold": {
        "half": {
            80: Tile(128, 128, 32, 4, 4, per_sm=2),
            90: Tile(128, 256, 64, 8, 3),
            100: Tile(128, 256, 64, 8, 4),
        },
        "short": {
            80: Tile(128, 128, 32, 4, 4, per_sm=2),
            90: Tile(128, 128, 64, 4, 3, per_sm=2),
            100: Tile(128, 128, 64, 4, 3, per_sm=2),
        },
        "narrow": {80: Tile(128, 128, 32, 8, 4), 90: Tile(128, 128, 64, 8, 4)},
        "fp32": {80: Tile(64, 128, 32, 8, 3), 90: Tile(128, 128, 32, 8, 3), 100: Tile(128, 128, 32, 8, 3)},
        "unaligned": {80: Tile(64, 128, 16, 8, 2)},
    },
    "dz": {
        "half": {
            80: Tile(128, 128, 32, 8, 4),
            90: Tile(128, 256, 64, 8, 4),
            100: Tile(128, 256, 64, 8, 4),
            120: Tile(128, 128, 64, 8, 3),
        },
        "narrow": {80: Tile(64, 128, 64, 8, 3), 90: Tile(128, 128, 64, 8, 4)},
        "fp32": {80: Tile(64, 128, 32, 8, 3), 90: Tile(128, 128, 32, 8, 3), 100: Tile(128, 128, 32, 8, 3)},
        "crowded": {80: Tile(64, 128, 16, 8, 3), 120: Tile(32, 128, 32, 8, 2)},
        "unaligned": {80: Tile(64, 128, 16, 8, 2)},
    },
    "dhidden": {
        "half": {80: Tile(128, 128, 32, 8, 4), 90: Tile(128, 256, 64, 8, 3), 100: Tile(128, 128, 64, 8, 4)},
        "narrow": {80: Tile(128, 128, 32, 8, 3), 90: Tile(128, 128, 64, 8, 4)},
        "fp32": {80: Tile(64, 128, 32, 8, 2), 90: Tile(128, 128, 32, 8, 2), 100: Tile(128, 128, 32, 8, 2)},
        "crowded": {80: Tile(64, 64, 32, 8, 2), 90: Tile(128, 64, 32, 8, 2), 120: Tile(32, 64, 32, 8, 2)},
        "unaligned": {80: Tile(64, 64, 16, 8, 2)},
    },
    "dweight": {
        "half": {
            80: Tile(64, 256, 32, 8, 3),
            90: Tile(128, 256, 64, 8, 4),
            100: Tile(128, 128, 64, 8, 4),
            120: Tile(128, 128, 32, 8, 3),
        },
        "narrow": {
            80: Tile(64, 128, 32, 8, 3),
            90: Tile(128, 128, 64, 8, 4),
            100: Tile(128, 128, 64, 8, 4),
            120: Tile(64, 128, 32, 8, 3),
        },
        "fp32": {80: Tile(128, 128, 16, 8, 3), 90: Tile(128, 128, 32, 8, 2), 100: Tile(128, 128, 32, 8, 2)},
        "crowded": {80: Tile(64, 64, 32, 8, 2), 90: Tile(128, 64, 32, 8, 2)},
        "unaligned": {80: Tile(64, 64, 16, 8, 2)},
    },
    # Both heads' products of a tile side by side. "routed": more is left of a block; "jsd": its second sweep.
    "divergence_fold": {
        "half": {80: Tile(64, 128, 64, 8, 3), 90: Tile(128, 128, 64, 8, 4), 100: Tile(128, 128, 64, 8, 4)},
        "narrow": {80: Tile(64, 128, 64, 8, 3), 90: Tile(128, 128, 64, 8, 4)},
        "routed": {80: Tile(64, 128, 64, 8, 3), 90: Tile(128, 128, 64, 8, 4)},
        "jsd": {80: Tile(64, 128, 64, 8, 3)},
        "fp32": {80: Tile(64, 128, 32, 8, 3)},
        "unaligned": {80: Tile(64, 128, 16, 8, 2)},
    },
    "divergence_dz": {
        "half": {80: Tile(64, 128, 64, 8, 3), 90: Tile(128, 128, 64, 8, 4), 100: Tile(128, 128, 64, 8, 4)},
        "narrow": {80: Tile(64, 128, 64, 8, 3), 100: Tile(64, 128, 64, 8, 3)},
        "fp32": {80: Tile(32, 128, 32, 8, 3), 120: Tile(32, 128, 16, 8, 3)},
        "unaligned": {80: Tile(32, 128, 32, 8, 2)},
    },
    "divergence_routed_dz": {
        "half": {80: Tile(64, 128, 64, 8, 3)},
        "fp32": {80: Tile(64, 128, 32, 8, 3)},
        "unaligned": {80: Tile(64, 128, 16, 8, 2)},
    },
    "lora_a": {"half": {80: Tile(16, 64, 32, 4, 3)}},
    "low_rank": {"half": {80: Tile(64, 16, 32, 8, 3), 90: Tile(64, 16, 32, 4, 3)}},
    # Rows of partial sums: m tokens by n blocks at a time.
    "finish": {"half": {80: Tile(1, 2048, 0, 4, 2), 90: Tile(1, 1024, 0, 4, 2), 100: Tile(1, 512, 0, 4, 2)}},
    # The routed kernels: m pairs of one block of 128 columns.
    "routed_dz": {
        "half": {
            80: Tile(64, 128, 64, 4, 4, per_sm=2),
            90: Tile(128, 128, 64, 4, 3, per_sm=2),
            100: Tile(64, 128, 64, 4, 4, per_sm=2),
            120: Tile(64, 128, 64, 4, 3, per_sm=2),
        },
        "narrow": {80: Tile(64, 128, 32, 4, 4, per_sm=2), 120: Tile(64, 128, 32, 8, 2)},
        "fp32": {
            80: Tile(64, 128, 32, 8, 3),
            90: Tile(64, 128, 32, 4, 2, per_sm=2),
        },
        "unaligned": {80: Tile(64, 128, 16, 8, 2)},
    },
    "routed_dhidden": {
        "half": {
            80: Tile(64, 128, 128, 4, 2, per_sm=2),
            90: Tile(128, 128, 128, 4, 1, per_sm=2),
            100: Tile(64, 128, 128, 4, 1, per_sm=3),
            120: Tile(64, 128, 128, 8, 1, per_sm=2),
        },
        "fp32": {80: Tile(64, 64, 32, 4, 3, per_sm=2)},
        "low_rank": {80: Tile(64, 16, 128, 4, 1, per_sm=2)},
        "unaligned": {80: Tile(64, 16, 128, 4, 1, per_sm=2)},
    },
    # m: pairs at a time, of one block of 128 columns and of one program's tokens.
    "ordered_dhidden": {
        "half": {80: Tile(32, 64, 128, 4, 1, per_sm=2)},
        "fp32": {80: Tile(32, 32, 128, 4, 1, per_sm=2)},
        "low_rank": {80: Tile(32, 16, 128, 4, 1, per_sm=2)},
        "unaligned": {80: Tile(32, 16, 128, 4, 1, per_sm=2)},
    },
    "routed_dweight": {
        "half": {80: Tile(128, 128, 32, 8, 4), 90: Tile(128, 128, 64, 4, 3), 100: Tile(128, 128, 64, 4, 3)},
        "narrow": {80: Tile(128, 128, 32, 8, 4), 90: Tile(128, 128, 64, 4, 3), 100: Tile(128, 128, 64, 8, 3)},
        "fp32": {80: Tile(128, 64, 32, 8, 2)},
        "unaligned": {80: Tile(128, 64, 32, 8, 2)},
    },
}
# From these releases of Triton on, whose code for the tiles above spills in the loop (compiled, not measured).
_SINCE: dict[tuple[int, int], dict[tuple[str, str, int], Tile]] = {
    (3, 9): {
        ("dhidden", "half", 80): Tile(64, 128, 64, 8, 3),
        ("dhidden", "narrow", 80): Tile(64, 128, 32, 8, 3),
        ("routed_dhidden", "half", 80): Tile(64, 128, 128, 8, 2),
        ("divergence_dz", "narrow", 100): Tile(64, 128, 32, 8, 3),
    },
}
_INTERPRETED = {
    "fold": Tile(128, 256, 64, 4, 1, group=2),
    "dz": Tile(128, 256, 64, 4, 1, group=2),
    "dhidden": Tile(64, 64, 128, 4, 1, group=2),
    "dweight": Tile(512, 64, 64, 4, 1, group=2),
    "divergence_fold": Tile(128, 256, 64, 4, 1, group=2),
    "divergence_dz": Tile(128, 256, 64, 4, 1, group=2),
    "divergence_routed_dz": Tile(128, 128, 64, 4, 1),
    "lora_a": Tile(16, 64, 64, 4, 1),
    "low_rank": Tile(64, 16, 64, 4, 1),
    "finish": Tile(64, 1024, 0, 4, 2),
    "routed_dz": Tile(128, 128, 64, 4, 1),
    "routed_dhidden": Tile(64, 64, 128, 4, 1),
    "ordered_dhidden": Tile(32, 64, 128, 4, 1),
    "routed_dweight": Tile(128, 64, 64, 4, 1),
}
