"""What the head's part of a step sends between GPUs, holds and computes, for four ways to lay out head and tokens.

python -m tools.wire [--tokens 8192] [--nvlink 450e9] [--network 50e9] [--efficiency 0.8] [--docs docs/distributed.md]

    gather       FSDP2: the head's shards are gathered on every rank, forward and backward; its gradient is scattered
    ring         the shards come by one after the other, and their gradients go back to their owners
    tokens       the shards stay; all ranks' tokens come to them, and their gradients go back
    vocabulary   `vocab_group=` over the GPUs of a node, which hold the same tokens; FSDP2 over nodes

A step is the policy's forward and backward and the reference's forward, each with a head of its own to send. Bytes are
those that one GPU receives; what it sends is as much. Nothing is measured: `SOURCES` says where the rates come from.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from fastdpo.costs.gpus import GPUS
from tools.cost_tables import markdown
from tools.count_step import write_docs

BF16, FP32 = 2, 4
MODELS = {"8B": (128256, 4096), "70B": (128256, 8192), "400B": (202048, 16384), "256k": (256000, 16384)}
SIZES, TOKENS = (8, 64, 256, 1024), (2048, 8192, 32768)


@dataclass(frozen=True)
class Cluster:
    """Rates of one GPU per second and direction."""

    node: int = 8  # GPUs
    nvlink: float = 450e9  # bytes to the other GPUs of its node
    network: float = 50e9  # bytes to other nodes
    efficiency: float = 0.8  # of both, that a collective of large tensors reaches
    latency: float = 20e-6  # seconds, of a transfer that has to end before the next begins
    flops: float = GPUS["H100"].flops

    def seconds(self, total: float, gpus: int, rounds: int, adapters: int | None = None) -> float:
        """Until each of `gpus` has received the `total` bytes of all but its own part, in `rounds`. What crosses nodes
        comes once into each, over all of its adapters or over so many, and on inside while the next comes."""
        node = min(gpus, self.node)
        inside = total * (gpus - 1) / gpus / self.nvlink if node > 1 else 0.0
        outside = total * (1 - node / gpus) / (adapters or node) / self.network
        return max(inside, outside) / self.efficiency + rounds * self.latency


SOURCES = {
    "nvlink": "data sheet: H100 SXM, 900e9 in both directions together",
    "network": "data sheet: DGX H100, one 400 Gbit/s adapter per GPU",
    "efficiency": "estimated",
    "latency": "estimated",
    "flops": "fastdpo/costs/gpus.py",
}


@dataclass(frozen=True)
class Step:
    """`tokens`: completion tokens of each GPU, all of them rows."""

    gpus: int
    tokens: int
    vocab: int
    hidden: int
    gradient: int = FP32  # bytes of an element of dweight while it is reduced: FSDP2's reduce_dtype
    backward: float = 0.5  # passes over the head of the policy's backward: 3 exact, about this routed (docs/costs.md)
    visit: int = 65536  # tokens of all ranks that are gathered at a time where tokens visit

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    def products(self, cluster: Cluster) -> float:
        """Seconds; the same in every layout."""
        return (2 + self.backward) * 2 * self.tokens * self.head / cluster.flops


@dataclass(frozen=True)
class Layout:
    bytes: float  # received by one GPU
    seconds: float  # on the wire
    memory: float  # bytes of one GPU beyond its shards of head and gradient, its own tokens' rows and their gradient


def gather(step: Step, cluster: Cluster) -> Layout:
    """Three gathers of the head and one scatter of its gradient, which is first whole in the head's type."""
    size = step.head * (3 * BF16 + step.gradient)
    received = size * (step.gpus - 1) / step.gpus
    rounds = 4 if step.gpus > 1 else 0
    return Layout(received, cluster.seconds(size, step.gpus, rounds), step.head * (2 * BF16 + step.gradient))


def ring(step: Step, cluster: Cluster, adapters: int | None = None) -> Layout:
    """As many bytes as `gather`; two shards and two gradients at a time. Broadcasts from each owner use all of a node's
    adapters, as does a ring for each GPU of a node; one ring over all GPUs uses one."""
    size = step.head * (3 * BF16 + step.gradient)
    seconds = cluster.seconds(size, step.gpus, 3 * (step.gpus - 1), adapters)
    memory = 2 * step.head * (BF16 + step.gradient) / step.gpus
    return Layout(size * (step.gpus - 1) / step.gpus, seconds, memory)


def tokens(step: Step, cluster: Cluster) -> Layout:
    """Rows of hidden gathered for two forwards and a backward, rows of dhidden in fp32 summed on their owner; per token
    and shard a label's logit and a log-sum-exp come back in two forwards; per token lse and coef go out."""
    total = step.gpus * step.tokens
    size = total * (step.hidden * (3 * BF16 + FP32) + 2 * (FP32 + FP32) + (FP32 + FP32))
    visits = -(-total // step.visit)
    memory = min(total, step.visit) * step.hidden * (BF16 + FP32)
    return Layout(size * (step.gpus - 1) / step.gpus, cluster.seconds(size, step.gpus, 6 * visits), memory)


def vocabulary(step: Step, cluster: Cluster, dhidden: str = "by rows") -> Layout:
    """`vocab_group=` over a node's GPUs, whose `tokens` each make one batch of all: their rows are gathered before, as
    in sequence parallelism. `dhidden`: how it is summed, a key of `DHIDDEN`. The shards are gathered over nodes."""
    node = min(step.gpus, cluster.node)
    rows = node * step.tokens
    received, held = DHIDDEN[dhidden](node)
    inside = 2 * BF16 * (node - 1) * step.tokens * step.hidden + received * rows * step.hidden
    inside += (sent_per_token(node, sets=2) + sent_per_token(node, sets=0)) * rows
    seconds = inside / cluster.nvlink / cluster.efficiency + 12 * cluster.latency
    whole = Layout(inside, seconds, rows * step.hidden * (BF16 + held))
    if step.gpus == node:
        return whole
    shard = replace(step, gpus=step.gpus // node, vocab=step.vocab / node)
    over = gather(shard, replace(cluster, node=1))
    return Layout(whole.bytes + over.bytes, whole.seconds + over.seconds, whole.memory + over.memory)


LAYOUTS = {"gather": gather, "ring": ring, "tokens": tokens, "vocabulary": vocabulary}

# How dhidden is summed over `size` ranks: bytes received, and bytes held, per element of all rows.
DHIDDEN = {
    # every rank's rows in fp32 to all, which add them in rank order: it holds the parts, and the parts stacked
    "gather": lambda size: ((size - 1) * FP32, 2 * size * FP32),
    # VocabShards.sum_of_rows, the same bits for less: each rank adds its part of the rows in rank order, and the sums
    # are gathered in bf16
    "by rows": lambda size: ((size - 1) / size * (FP32 + BF16), 2 * FP32 + BF16),
    "all_reduce": lambda size: (2 * (size - 1) / size * FP32, FP32),  # in an order of NCCL's choice
    "reduce_scatter": lambda size: ((size - 1) / size * FP32, FP32),  # sequence parallelism needs no more
}


def sent_per_token(size: int, *, sets: int, stats: bool = False, engine: str = "triton") -> int:
    """Bytes that a rank receives in a forward of fastdpo with `vocab_group`, per completion token on the CPU, per row
    on a GPU, whose host does not know which rows count. `sets` of pairs: 0 in an exact or gradient-free call, 1, or 2
    with a `tau` of dhidden's own."""
    if engine == "triton":  # the label's logit; five sums in fp32, two of them for is_top1: with or without statistics
        scalars = FP32 + 6 * FP32
    else:  # rest_lse, and RowStats where statistics are asked for, are fp64 on the CPU
        scalars = FP32 + 8 + 7 * 8 * stats
    return (size - 1) * (scalars + 8 * sets)


def wins(step: Step, cluster: Cluster) -> str:
    """The least time on the wire among layouts that keep each GPU's own tokens; the smaller memory where it is equal
    within a tenth."""
    found = {name: LAYOUTS[name](step, cluster) for name in ("gather", "ring", "tokens")}
    least = min(x.seconds for x in found.values())
    close = {name: x for name, x in found.items() if x.seconds <= 1.1 * least}
    return min(close, key=lambda name: close[name].memory)


def _cell(layout: Layout) -> str:
    return f"{layout.bytes / 1e9:.1f} / {layout.seconds * 1e3:.0f} / {layout.memory / 1e9:.1f}"


def layout_table(cluster: Cluster) -> list[str]:
    header = ["model", "GPUs", "tokens", "products, ms", *LAYOUTS, "least of three"]
    rows = []
    for name, sizes in MODELS.items():
        for gpus in SIZES:
            for count in TOKENS:
                step = Step(gpus, count, *sizes)
                cells = [_cell(layout(step, cluster)) for layout in LAYOUTS.values()]
                cells += [wins(step, cluster)]
                rows.append([name, str(gpus), str(count), f"{step.products(cluster) * 1e3:.0f}", *cells])
    return list(markdown(header, rows))


def ring_table(cluster: Cluster) -> list[str]:
    header = ["model", "GPUs", "GB", "one adapter of a node, ms", "all of them, ms"]
    header += [f"products of {count} tokens, ms" for count in TOKENS]
    rows = []
    for name, sizes in MODELS.items():
        for gpus in SIZES:
            step = Step(gpus, TOKENS[0], *sizes)
            found = ring(step, cluster, adapters=1), ring(step, cluster)
            products = (replace(step, tokens=count).products(cluster) for count in TOKENS)
            times = [f"{1e3 * x:.0f}" for x in (*(layout.seconds for layout in found), *products)]
            rows.append([name, str(gpus), f"{found[0].bytes / 1e9:.1f}", *times])
    return list(markdown(header, rows))


PHASES = {  # bytes of an element of the head that come, and passes that hide them
    "forward": (BF16, 1.0),
    "routed backward": (BF16 + FP32, Step.backward),
    "exact backward": (BF16 + FP32, 3.0),
}


def hiding_tokens(cluster: Cluster, gpus: int, phase: str) -> float:
    """Completion tokens per GPU from which the head's transfers pass behind the products, of any V and H."""
    size, passes = PHASES[phase]
    return cluster.seconds(size, gpus, 0) * cluster.flops / (2 * passes)


def hiding_table(cluster: Cluster) -> list[str]:
    rows = [[str(n), *(f"{hiding_tokens(cluster, n, phase):.0f}" for phase in PHASES)] for n in SIZES]
    return list(markdown(["GPUs", *PHASES], rows))


def dhidden_table(cluster: Cluster, rows: int = 8192, hidden: int = 8192) -> list[str]:
    """Bytes received and held in the sum over a `vocab_group`; beside them those per token of a forward."""
    header = ["ranks", *DHIDDEN, "a forward without routing", "routed, two sets"]
    table = []
    for size in (2, 4, 8):
        cells = [f"{a * rows * hidden / 1e9:.2f} / {b * rows * hidden / 1e9:.2f}" for a, b in
                 (of(size) for of in DHIDDEN.values())]  # fmt: skip
        cells += [f"{sent_per_token(size, sets=sets) * rows / 1e9:.4f}" for sets in (0, 2)]
        table.append([str(size), *cells])
    return list(markdown(header, table))


def rate_table(cluster: Cluster) -> list[str]:
    rows = [[name, f"{getattr(cluster, name):.3g}", source] for name, source in SOURCES.items()]
    return list(markdown(["of one GPU", "", "source"], rows))


def tables(cluster: Cluster) -> dict[str, list[str]]:
    return {
        "rates": rate_table(cluster),
        "layouts": layout_table(cluster),
        "rings": ring_table(cluster),
        "hiding": hiding_table(cluster),
        "dhidden": dhidden_table(cluster),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SOURCES:
        parser.add_argument(f"--{name}", type=float, default=getattr(Cluster, name))
    parser.add_argument("--docs", type=Path, help="write the tables into this file, docs/distributed.md")
    args = vars(parser.parse_args())
    page = args.pop("docs")
    found = tables(Cluster(**args))
    if page:
        write_docs(page, found)
    else:
        print("\n\n".join("\n".join(lines) for lines in found.values()))


if __name__ == "__main__":
    main()
