"""Operations, bytes and launches of every kernel of a step, from the launches the Triton engine makes and the number
of live pairs. Nothing runs: the engine's launches are recorded on tensors without storage.

A *pass* is 2 N V H operations, one lm_head product. Tiles count whole: padding is paid for. Bytes are those that come
from or go to device memory: of rows that are used again and again, as many as the L2 cache does not hold. A GPU's rates
turn the counts into a floor: the time in which no kernel is faster than its operations or its bytes allow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 128
CACHE = 40e6  # bytes of rows that stay in the L2 cache beside what streams through it; H100 has 50 MB, H200 60 MB


def _missed(used: float, distinct: float) -> float:
    """Bytes from memory of `used` bytes in rows of `distinct` bytes altogether, used in no particular order."""
    return min(distinct, used) + max(0.0, used - distinct) * max(0.0, 1 - CACHE / distinct)


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


@dataclass(frozen=True)
class Gpu:
    """What a machine reaches on its best day: measured on it, not its data sheet."""

    flops: float  # per second, of a large plain bf16 product
    bandwidth: float  # bytes per second, read and written, of a large copy
    launch: float = 2e-6  # seconds between two kernels that do nothing


# Where none is at hand to measure. H100 and H200: published times of plain products (42 ms for three of
# 8192 x 4096 x 151936; 770 to 800 TFLOP/s), copies at 90% of the data sheet; A100: 80% and 85% of its data sheet.
GPUS = {"A100": Gpu(250e12, 1.70e12), "H100": Gpu(728e12, 3.0e12), "H200": Gpu(785e12, 4.3e12)}


@dataclass
class Cost:
    flops: float = 0.0  # of matrix products
    bytes: float = 0.0
    launches: int = 0

    def floor(self, gpu: Gpu) -> float:
        """Seconds."""
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth) + self.launches * gpu.launch

    def __iadd__(self, other: Cost) -> Cost:
        self.flops += other.flops
        self.bytes += other.bytes
        self.launches += other.launches
        return self


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


def step_cost(shape: Shape, live: Tensor | None, live_hidden: Tensor | None, **options) -> StepCost:
    """`live` [num_blocks]: how many of the tokens keep each block at the smaller tau, and at dhidden's; None: exact."""
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
        cost = _COSTS[name](bound, shape, live_hidden if alone else live)
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
            tokens_of.setdefault(id(bound["lengths"]), bound.get("capacity"))  # the plan comes first
            bound["of_range"] = tokens_of[id(bound["lengths"])]
        yield kernel.__name__.removesuffix("_kernel"), bound


def _tokens(a: dict, shape: Shape) -> int:
    return max(0, min(shape.num_tokens - a["first_token"], a["capacity"]))


def _padded(n: float, tile: int) -> float:
    return -(-n // tile) * tile


def _does_nothing(a: dict, live: Tensor | None) -> bool:
    """An exact kernel of a routed call whose pairs are few."""
    return a["flag"] is not None and live is not None


def _fold(a, shape, live):
    m, n = _padded(_tokens(a, shape), a["BM"]), _padded(a["V"], a["BN"])
    item = shape.dtype.itemsize
    groups = -(-m // (a["BM"] * a["GROUP"]))
    # per group of token tiles the head is read once; the tokens stay in the cache
    traffic = item * (groups * a["V"] * a["H"] + m * a["H"]) + 4 * m * a["num_blocks"]
    return Cost(2.0 * m * n * a["H"], traffic)


def _dz(a, shape, live):
    if _does_nothing(a, live):
        return Cost()
    m, columns = _padded(_tokens(a, shape), a["BM"]), _padded(a["last_column"] - a["first_column"], a["BN"])
    item = shape.dtype.itemsize
    return Cost(2.0 * m * columns * a["H"], item * (columns * a["H"] + m * a["H"] + m * columns))


def _dhidden(a, shape, live):
    if _does_nothing(a, live):
        return Cost()
    n, columns = _tokens(a, shape), a["last_column"] - a["first_column"]
    m, h, item = _padded(n, a["BM"]), _padded(a["H"], a["BN"]), shape.dtype.itemsize
    return Cost(2.0 * m * columns * h, item * (m * columns + columns * h) + 8 * n * a["H"])


def _dweight(a, shape, live):
    if _does_nothing(a, live):
        return Cost()
    n, m = _padded(_tokens(a, shape), a["BK"]), _padded(a["last_column"] - a["first_column"], a["BM"])
    item, sums = shape.dtype.itemsize, 4 * ((a["summed_columns"] > 0) + (not a["LAST"]))
    return Cost(
        2.0 * m * n * _padded(a["H"], a["BN"]), item * n * (m + a["H"]) + (item * a["LAST"] + sums) * m * a["H"]
    )


def _lengths(a, shape, live, first_token, capacity, blocks) -> Tensor:
    """Pairs per block of the tokens in range, if they are spread evenly."""
    share = max(0, min(shape.num_tokens - first_token, capacity)) / shape.num_tokens
    return (live[a["first_block"] : a["first_block"] + blocks].double() * share).ceil()


def _routed(a, shape, live) -> tuple[Tensor, Tensor, float]:
    """(pairs, padded pairs) per block and tiles of this launch's list; the first round stands for all of them."""
    blocks = a["running"].shape[1] if "running" in a else a["lengths"].shape[0]
    lengths = _lengths(a, shape, live, a["first_token"], a.get("capacity", shape.num_tokens), blocks)
    return lengths, (lengths / a.get("TILE", a["BM"])).ceil() * a.get("TILE", a["BM"]), a["round"] == 0


def _range(a: dict, shape: Shape) -> int:
    """Tokens that the list covers."""
    return max(1, min(shape.num_tokens - a.get("first_token", 0), _capacity(a)))


def _routed_dz(a, shape, live):
    lengths, padded, first = _routed(a | {"capacity": _capacity(a)}, shape, live)
    if not first:
        return Cost()
    pairs, item = padded.sum().item(), shape.dtype.itemsize
    touched = (lengths > 0).sum().item() * BLOCK * a["H"]
    rows = _missed(item * lengths.sum().item() * a["H"], item * _range(a, shape) * a["H"])
    return Cost(2.0 * pairs * BLOCK * a["H"], rows + item * (touched + pairs * BLOCK))


def _capacity(a: dict) -> int:
    """Tokens of the range that a list covers."""
    return BLOCK * a["running"].shape[0] if "running" in a else a["of_range"]


def _routed_dhidden(a, shape, live):
    first_token = a.get("first_token", 0)
    lengths, padded, first = _routed(a | {"capacity": _capacity(a), "first_token": first_token}, shape, live)
    if not first:
        return Cost()
    pairs, item = padded.sum().item(), shape.dtype.itemsize
    touched = (lengths > 0).sum().item() * BLOCK * a["H"]
    # rows are added in memory: read and written
    added = _missed(8 * lengths.sum().item() * a["H"], 8 * _range(a, shape) * a["H"])
    return Cost(2.0 * pairs * BLOCK * _padded(a["H"], a["BN"]), item * (pairs * BLOCK + touched) + added)


def _ordered_dhidden(a, shape, live):
    lengths, _, first = _routed(a | {"capacity": _capacity(a), "first_token": 0}, shape, live)
    if not first:
        return Cost()
    item, columns = shape.dtype.itemsize, _padded(a["H"], a["BN"])
    touched = (lengths > 0).sum().item() * BLOCK * a["H"]
    added = _missed(8 * lengths.sum().item() * a["H"], 8 * _range(a, shape) * a["H"])
    pairs = (_ordered_shares(a, lengths) / a["BM"]).ceil().sum().item() * a["BM"]
    return Cost(2.0 * pairs * BLOCK * columns, item * (lengths.sum().item() * BLOCK + touched) + added)


def _ordered_shares(a: dict, lengths: Tensor) -> Tensor:
    """[groups, blocks] pairs."""
    groups = a["grid"][1]
    return torch.poisson((lengths / groups).expand(groups, -1), generator=torch.Generator().manual_seed(0))


def dhidden_through_cache(shape: Shape, live_hidden: Tensor, target) -> dict[str, float]:
    """Bytes that adding up the routed dhidden moves between the L2 cache and the multiprocessors, with atomics and in
    order, whose adding counts as a read and a write both ways.

    Where rows of fp32 sums stay in the L2 cache this, not memory, is what bounds the two kernels.
    """
    moved = {}
    before = torch.are_deterministic_algorithms_enabled()
    for name, ordered in (("atomics", False), ("ordered", True)):
        torch.use_deterministic_algorithms(ordered)
        launches, _ = record(shape, frozen=True, backward="routed", tau=None, target=target, parts=("backward",))
        torch.use_deterministic_algorithms(before)
        moved[name] = 0.0
        for kernel, a in _bound(launches):
            if kernel not in ("routed_dhidden", "ordered_dhidden"):
                continue
            lengths, padded, first = _routed(a | {"capacity": _capacity(a), "first_token": 0}, shape, live_hidden)
            if first:
                parts, item, pairs = -(-a["H"] // a["BN"]), shape.dtype.itemsize, lengths.sum().item()
                reads_of_blocks = padded.sum().item() / a.get("TILE", a["BM"])
                if ordered:  # a program reads its part of a block once, if it has pairs there
                    reads_of_blocks = (_ordered_shares(a, lengths) > 0).sum().item()
                operands = parts * item * BLOCK * (pairs + reads_of_blocks * a["BN"])
                moved[name] += operands + 8 * pairs * a["H"]
    return moved


def _routed_dweight(a, shape, live):
    lengths, _, first = _routed(a | {"capacity": _capacity(a)}, shape, live)
    if not first:
        return Cost()
    item = shape.dtype.itemsize
    depth = ((lengths / a["BK"]).ceil() * a["BK"]).sum().item()
    columns = _padded(a["H"], a["BN"])
    written = a["lengths"].shape[0] * BLOCK * a["H"]
    rows = _missed(item * depth * columns, item * _range(a, shape) * a["H"])
    return Cost(2.0 * depth * BLOCK * columns, rows + item * (depth * BLOCK + written))


def _fill(a, shape, live):
    """The first round stands for all of them, as in the kernels that read its lists."""
    read = a["capacity"] * a["stride"] + 4 * a["running"].numel()
    return Cost(0.0, float(read)) if a["round"] == 0 else Cost()


def _rows(bytes_per_row):
    def cost(a, shape, live):
        return Cost() if a.get("flag") is not None and live is not None else Cost(0.0, float(bytes_per_row(a, shape)))

    return cost


_COSTS = {
    "fold": _fold,
    "dz": _dz,
    "dhidden": _dhidden,
    "dweight": _dweight,
    "routed_dz": _routed_dz,
    "routed_dhidden": _routed_dhidden,
    "ordered_dhidden": _ordered_dhidden,
    "routed_dweight": _routed_dweight,
    "compact": _rows(lambda a, s: 30 * s.num_tokens),
    "gather": _rows(lambda a, s: 2 * s.dtype.itemsize * a["capacity"] * a["pitch"]),
    "low_rank": _rows(lambda a, s: a["capacity"] * (s.dtype.itemsize * a["pitch"] + 4 * a["R"])),
    "finish": _rows(lambda a, s: min(a["capacity"], s.num_tokens) * (4 * a["num_blocks"] + 20)),
    "route": _rows(lambda a, s: min(a["capacity"], s.num_tokens) * (4 * a["num_blocks"] + a["bitmap_stride"] + 8)),
    "count": _rows(lambda a, s: a["capacity"] * a["stride"] + 4 * a["counts"].numel()),
    "plan": _rows(lambda a, s: 4 * a["running"].numel()),
    "fill": _fill,
    "spread": _rows(lambda a, s: a["capacity"] * a["H"] * (4 + s.dtype.itemsize)),
}
