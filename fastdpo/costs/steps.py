"""Operations, bytes and launches of every kernel of a step, from the launches the Triton engine makes and the number
of live pairs. Nothing runs: the engine's launches are recorded on tensors without storage.

A *pass* is 2 N V H operations, one lm_head product. `kernels.py` says what a kernel of given sizes costs, and what
is assumed; this file takes the sizes from the launches. With a GPU's rates (`gpus.py`) the counts become a floor, the
time in which no kernel is faster than its operations and its bytes of memory allow, and an expected time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import kernels
from .gpus import Gpu
from .kernels import BLOCK, Cost, Epilogue, Tile


@dataclass
class Shape:
    """One micro-batch: `num_tokens` completion tokens, all of them rows."""

    num_tokens: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def one_pass(self) -> float:
        return 2.0 * self.num_tokens * self.vocab_size * self.hidden_size


@dataclass
class StepCost:
    kernels: dict[str, Cost] = field(default_factory=dict)
    other_launches: Counter = field(default_factory=Counter)  # torch's own

    def total(self) -> Cost:
        whole = Cost(launches=sum(self.other_launches.values()))
        for cost in self.kernels.values():
            whole += cost
        return whole

    def floor(self, gpu: Gpu) -> float:
        """Seconds: kernels run one after the other."""
        return sum(cost.floor(gpu) for cost in self.kernels.values()) + self.other_launches.total() * gpu.launch

    def expected(self, gpu: Gpu) -> float:
        return sum(cost.expected(gpu) for cost in self.kernels.values()) + self.other_launches.total() * gpu.launch


class _CountTorch(torch.utils._python_dispatch.TorchDispatchMode):
    """Operations of torch that launch a kernel: everything but views and empty tensors."""

    FREE = (
        "empty", "new_empty", "view", "_unsafe_view", "as_strided", "reshape", "alias", "detach", "slice", "select",
        "t.", "transpose", "permute", "unsqueeze", "squeeze", "expand", "unbind", "split", "is_same_size", "sym_",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1] + "."
        if not any(name.startswith(free) for free in self.FREE):
            self.calls[name[:-1]] += 1
        return func(*args, **(kwargs or {}))


STEP = ("forward", "backward", "reference")


def record(shape: Shape, *, frozen: bool, backward: str, tau, target, parts: tuple[str, ...] = STEP):
    """(launches of Triton kernels, Counter of torch's) of these parts: policy forward, its backward, reference forward.

    `backward` is "exact", "routed", or "none" for a forward without gradients.
    """
    import fastdpo
    from fastdpo.head import Routing, taus
    from fastdpo.ops.problem import Head, Needs, Rows, Upstream
    from fastdpo.ops.triton import backward as triton_backward
    from fastdpo.ops.triton import forward as triton_engine
    from fastdpo.ops.triton import special
    from fastdpo.ops.triton.launch import Recorder

    def meta(*size, dtype=shape.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    assert fastdpo.__version__
    n, v, h = shape.num_tokens, shape.vocab_size, shape.hidden_size
    head = Head(meta(n, h), meta(v, h), compute_dtype=shape.dtype)
    rows = Rows(meta(n, dtype=torch.int64), -100, 0, v)
    routing = None
    if backward == "routed":
        tau_hidden, tau_weight = taus(tau, not frozen)
        routing = Routing.of(tau_hidden, -1.0 if frozen else tau_weight, meta(dtype=torch.int64))
    launches, torch_calls = [], Counter()
    saved = None
    for part in STEP if "backward" in parts else parts:
        with special.forced(None), Recorder(target) as recorded, _CountTorch() as counted:
            if part == "forward":
                saved = triton_engine.forward(head, rows, stats=frozenset(), routing=routing, shards=None)
            elif part == "backward":
                upstream = Upstream(meta(n, dtype=torch.float32))
                needs = Needs(True, not frozen, False, False, False)
                triton_backward.backward(head, rows, saved, upstream, routing, needs)
            else:
                triton_engine.forward(head, rows, stats=frozenset(), routing=None, shards=None)
        if part in parts:
            launches += recorded
            torch_calls += counted.calls
    return launches, torch_calls


def step_cost(
    shape: Shape,
    live: Tensor | None,
    live_hidden: Tensor | None,
    *,
    cache: float = Gpu.cache,
    fold: Epilogue | None = None,
    multicast: int = 1,
    **options,
) -> StepCost:
    """`live` [num_blocks]: how many of the tokens keep each block at the smaller tau, and at dhidden's; None: exact.
    `cache`: kernels.py; `fold`: another epilogue than the plain one's, and `multicast` of its tile. The rest:
    `record`."""
    epilogues = kernels.epilogues(options["target"].capability)
    if fold is not None:
        epilogues["fold"] = fold
    launches, torch_calls = record(shape, **options)
    launches = list(_bound(launches))
    sweeps_of_hidden = {}  # lists by whether they are dhidden's alone: then the larger tau's pairs are in them
    for name, bound in launches:
        if "lengths" in bound and "out" in bound:
            lists = id(bound["lengths"])
            sweeps_of_hidden[lists] = sweeps_of_hidden.get(lists, True) and name.endswith("_dhidden")
    step = StepCost(other_launches=torch_calls)
    for name, bound in launches:
        alone = "lengths" in bound and sweeps_of_hidden.get(id(bound["lengths"]), False)
        call = _Launch(bound, shape, live_hidden if alone else live, options["target"].programs, cache, multicast)
        cost = Cost() if call.is_later_round else _COSTS[name](call, epilogues)
        cost.launches = 1
        step.kernels.setdefault(name, Cost())
        step.kernels[name] += cost
    return step


def _bound(launches: list[tuple]):
    """(kernel, its arguments by name, tuples' members among them) of every launch, with the tokens its lists are of."""
    tokens_of = {}
    for kernel, grid, arguments, *_ in launches:
        bound = dict(arguments, grid=grid)
        for name in ("form", "head", "lists", "kept"):
            if name in arguments:
                bound |= {key: getattr(x, "value", x) for key, x in arguments[name]._asdict().items()}
        if "lengths" in bound:
            tokens_of.setdefault(id(bound["lengths"]), bound.get("capacity"))  # they are made first
            bound["of_range"] = tokens_of[id(bound["lengths"])]
        yield kernel.__name__.removesuffix("_kernel"), bound


@dataclass(frozen=True)
class _Launch:
    """The sizes in a launch's arguments."""

    arguments: dict
    shape: Shape
    live: Tensor | None
    multiprocessors: int
    cache: float
    multicast: int

    def __getitem__(self, name: str):
        return self.arguments[name]

    @property
    def is_later_round(self) -> bool:
        """Of the routed kernels: the first stands for all."""
        return self.arguments.get("round", 0) != 0

    @property
    def tokens(self) -> int:
        """Of the launch's range, those that there are."""
        return max(0, min(self.shape.num_tokens - self["first_token"], self["capacity"]))

    @property
    def item(self) -> int:
        return self.shape.dtype.itemsize

    def tile(self, m: str = "BM", form=None) -> Tile:
        a = self.arguments if form is None else {key: getattr(x, "value", x) for key, x in form._asdict().items()}
        per_sm = self["grid"][0] // self.multiprocessors if len(self["grid"]) == 1 else 1
        return Tile(a.get(m, a["BM"]), a["BN"], a["BK"], a["GROUP"], max(1, per_sm))

    @property
    def common(self) -> tuple[int, int]:
        return self.multiprocessors, self.item

    @property
    def listed(self) -> int:
        """Tokens that the list covers."""
        a = self.arguments
        capacity = BLOCK * a["running"].shape[0] if "running" in a else a["of_range"]
        return max(1, min(self.shape.num_tokens - a.get("first_token", 0), capacity))

    @property
    def lengths(self) -> Tensor:
        """Pairs per block of the tokens in range, if they are spread evenly."""
        a = self.arguments
        blocks = a["running"].shape[1] if "running" in a else a["lengths"].shape[0]
        share = self.listed / self.shape.num_tokens
        return (self.live[a["first_block"] : a["first_block"] + blocks].double() * share).ceil()


def _fold(a: _Launch, epilogues: dict[str, Epilogue]) -> Cost:
    tile = a.tile()._replace(multicast=a.multicast)
    if epilogues["fold"].overlaps:  # hopper.py's tile
        tile = tile._replace(m=128, n=256, per_sm=1)
    return kernels.fold(a.tokens, a["V"], a["H"], tile, *a.common, epilogues["fold"])


def _exact(a: _Launch, epilogues: dict[str, Epilogue]) -> Cost:
    """Its steps, unless the pairs of a routed call are few; and rows of dhidden."""
    whole, outputs, H = Cost(), a["outputs"], a["H"]
    if outputs.hidden is not None:
        moved = a["capacity"] * H * (4 + a.item)
        whole.plus(bytes=moved, l2=moved)
    if a["flag"] is not None and a.live is not None:
        return whole
    chunks, width = -(-a.tokens // a["chunk"]), a["slab"] * BLOCK
    last_column = min(a["last_block"] * BLOCK, a["V"])
    for first in range(a["first_block"] * BLOCK, last_column, width):
        columns = min(width, last_column - first)
        for chunk in range(chunks):
            tokens = min(a["chunk"], a.tokens - chunk * a["chunk"])
            sizes, common = (tokens, columns, H), a.common
            whole += kernels.dz(*sizes, a.tile(form=a["dz_form"]), *common, epilogues["dz"])
            if outputs.hidden_sums is not None:
                whole += kernels.dhidden(*sizes, a.tile(form=a["hidden_form"]), *common, epilogues["dhidden"])
            if outputs.weight is not None:
                last = chunk == chunks - 1
                partial = 4 * ((chunk > 0) + (not last))
                tile, epilogue = a.tile(form=a["weight_form"]), epilogues["dweight"]
                whole += kernels.dweight(*sizes, tile, *common, epilogue, partial=partial, last=last)
    return whole


def _pairs(a: _Launch, m: str = "BM") -> tuple:
    return a.lengths, a.listed, a["H"], a.tile(m), *a.common


def _routed(name: str, m: str = "BM"):
    return lambda a, epilogues: getattr(kernels, name)(*_pairs(a, m), epilogues[name], a.cache)


def _ordered_dhidden(a: _Launch, epilogues: dict[str, Epilogue]) -> Cost:
    return kernels.ordered_dhidden(*_pairs(a), epilogues["routed_dhidden"], a.cache, groups=a["grid"][1])


def _moves(size):
    """A kernel that only moves so many bytes, all of them through the cache."""
    return lambda a, _: Cost(bytes=float(size(a)), l2=float(size(a)))


_COSTS = {
    "fold": _fold,
    "exact": _exact,
    "routed_dz": _routed("routed_dz"),
    "routed_dhidden": _routed("routed_dhidden", "TILE"),
    "ordered_dhidden": _ordered_dhidden,
    "routed_dweight": _routed("routed_dweight"),
    "compact": _moves(lambda a: 30 * a.shape.num_tokens + 2 * a.item * a["capacity"] * a["pitch"]),
    "gather": _moves(lambda a: 2 * a.item * a["capacity"] * a["pitch"]),
    "finish": _moves(lambda a: a.tokens * (4 * a["num_blocks"] * (1 + (a["draw"].seed is not None)) + 20)),
    "list": _moves(lambda a: 2 * (a["capacity"] * a["stride"] + 4 * a["running"].numel())),
}


def dhidden_through_cache(shape: Shape, live_hidden: Tensor, target) -> dict[str, float]:
    """Bytes that adding up the routed dhidden moves between the L2 cache and the multiprocessors, with atomics and in
    order. Where rows of fp32 sums stay in the L2 cache this, not memory, is what bounds the two kernels."""
    moved = {}
    before = torch.are_deterministic_algorithms_enabled()
    for name, kernel in (("atomics", "routed_dhidden"), ("ordered", "ordered_dhidden")):
        torch.use_deterministic_algorithms(kernel == "ordered_dhidden")
        options = {"frozen": True, "backward": "routed", "tau": None, "target": target, "parts": ("backward",)}
        moved[name] = step_cost(shape, live_hidden, live_hidden, **options).kernels[kernel].l2
        torch.use_deterministic_algorithms(before)
    return moved
