"""The cost model's tables, as docs/costs.md holds them: `python -m tools.count_step --table` and `--dense`."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.inputs import HeadInputs
from fastdpo.costs.gpus import GPUS, SOURCES, Gpu
from fastdpo.costs.kernels import OVERLAPPED, Epilogue
from fastdpo.costs.peers import ALGORITHMS
from fastdpo.costs.steps import Shape, StepCost, step_cost
from fastdpo.head import taus
from tools import dense
from tools.live import live_pairs

SHAPES = (
    Shape(8192, 131072, 4096),
    Shape(8192, 128256, 4096),
    Shape(8192, 128256, 8192),
    Shape(4096, 151936, 2048),
    Shape(4096, 151936, 896),
    Shape(2048, 32000, 2048),
)
# The fold's epilogue, and how many programs share the head's tile.
FOLDS: dict[str, tuple[Epilogue | None, int]] = {
    "plain": (None, 1),
    "overlapped": (OVERLAPPED, 1),
    "multicast": (OVERLAPPED, 2),
}


def markdown(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def sizes(shape: Shape) -> str:
    return f"({shape.num_tokens}, {shape.vocab_size}, {shape.hidden_size})"


def folds_of(gpu: Gpu) -> dict[str, tuple[Epilogue | None, int]]:
    """An epilogue beside the products needs the asynchronous ones of Hopper and data-centre Blackwell."""
    return FOLDS if gpu.capability in (90, 100) else {"plain": FOLDS["plain"]}


def costs(shape: Shape, live, live_hidden, gpu: Gpu, fold: str, **options) -> StepCost:
    from fastdpo.ops.triton.launch import Target

    epilogue, multicast = FOLDS[fold]
    return step_cost(
        shape, live, live_hidden, cache=gpu.cache, fold=epilogue, multicast=multicast,
        tau=None, target=Target(gpu.capability, gpu.multiprocessors), **options,
    )  # fmt: skip


def step_rows(head: HeadInputs, shape: Shape, scaling: str, frozen: bool = False) -> list[list[str]]:
    """A row per GPU: forward over one plain product; step, and each peer's, over two."""
    tau = taus(None, not frozen)
    live, live_hidden = (live_pairs(head, shape, t, scaling) for t in (min(tau), tau[0]))
    rows = []
    for name, gpu in GPUS.items():
        one = shape.one_pass / gpu.flops
        forwards, steps, floor = [], [], 0.0
        for fold in FOLDS:
            if fold not in folds_of(gpu):
                forwards.append("")
                steps.append("")
                continue
            alone = costs(shape, None, None, gpu, fold, frozen=True, backward="exact", parts=("reference",))
            step = costs(shape, live, live_hidden, gpu, fold, frozen=frozen, backward="routed")
            forwards.append(f"{alone.expected(gpu) / one:.2f}")
            steps.append(f"{step.expected(gpu) / (2 * one):.2f}")
            floor = step.floor(gpu) / (2 * one)
        peers = [f"{peer.step(shape, gpu) / (2 * one):.2f}" for peer in ALGORITHMS.values()]
        rows.append([name, f"{2e3 * one:.2f}", *forwards, f"{floor:.2f}", *steps, *peers])
    return rows


def step_tables(head: HeadInputs, shapes: tuple[Shape, ...], scaling: str) -> Iterator[str]:
    header = ["", "two products, ms", *(f"forward {fold}" for fold in FOLDS), "floor"]
    header += [*(f"step {fold}" for fold in FOLDS), *ALGORITHMS]
    for shape in shapes:
        yield f"\n**{sizes(shape)}**\n"
        yield from markdown(header, step_rows(head, shape, scaling))


def dense_tables(head: HeadInputs, shapes: tuple[Shape, ...]) -> Iterator[str]:
    for shape in shapes:
        for scaling in ("first", "same"):
            for frozen in (False, True):
                live = live_pairs(head, shape, min(taus(None, not frozen)), scaling)
                pairs, kind = live.sum().item() / shape.num_tokens, "frozen head" if frozen else "trained head"
                yield f"\n**{sizes(shape)}, {kind}, {scaling}: {pairs:.1f} of {len(live)} blocks per token**\n"
                rows = dense.rows(shape, live, GPUS, frozen=frozen)
                yield from markdown(["backward", "dense blocks", "their pairs", *GPUS], rows)


def rate_tables() -> Iterator[str]:
    def number(value: float) -> str:
        unit = next((unit for unit in (12, 9, 6) if value >= 10**unit), None)
        return f"{value:g}" if unit is None else f"{value / 10**unit:.4g}e{unit}"

    fields = list(next(iter(SOURCES.values())))
    own = [field for field in fields if len({source[field] for source in SOURCES.values()}) > 1]
    rows = [[name, *(number(getattr(gpu, field)) for field in fields), number(gpu.clock)] for name, gpu in GPUS.items()]
    yield from markdown(["", *fields, "clock under load"], rows)
    yield ""
    yield from markdown(
        ["", "figure", "source"], [[name, field, SOURCES[name][field]] for name in GPUS for field in own]
    )
