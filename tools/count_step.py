"""Counts of one DPO step's head on the Triton engine: operations in lm_head passes, bytes and launches per kernel, and
the floor that they set on a GPU's time.

python -m tools.count_step --head head.safetensors [--tokens 8192 --vocab 128256 --hidden-size 4096 --gpu H200]

Policy and reference forward, and the backward. Live pairs are those of the head's distributions, scaled to a larger
vocabulary as `tools/live.py` says. With --table, --dense or --rates instead the tables of docs/costs.md: expected times
of many shapes on every GPU, what dense products for a backward's heavy blocks would change, and the GPUs' rates.

No GPU is needed, and no time is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import inputs
from fastdpo.costs.gpus import GPUS, Gpu
from fastdpo.costs.kernels import Cost
from fastdpo.costs.steps import Shape, StepCost, dhidden_through_cache, step_cost
from fastdpo.head import taus
from tools import cost_tables
from tools.live import SCALINGS, live_pairs

COLUMNS = ["kernel", "passes", "GB", "L2 GB", "launches", "floor ms", "expected ms", "bound by"]


def rows_of(step: StepCost, shape: Shape, gpu: Gpu) -> list[list[str]]:
    def row(name: str, cost: Cost, floor: float, expected: float, bound: str = "") -> list[str]:
        counts = f"{cost.flops / shape.one_pass:.4f}", f"{cost.bytes / 1e9:.2f}", f"{cost.l2 / 1e9:.2f}"
        return [name, *counts, str(cost.launches), f"{floor * 1e3:.3f}", f"{expected * 1e3:.3f}", bound]

    rows = [row(name, x, x.floor(gpu), x.expected(gpu), x.bound(gpu)) for name, x in step.kernels.items()]
    others = Cost(launches=step.other_launches.total())
    rows.append(row("torch's own: " + ", ".join(step.other_launches), others, others.floor(gpu), others.expected(gpu)))
    rows.append(row("total", step.total(), step.floor(gpu), step.expected(gpu)))
    return rows


def _tables(args: argparse.Namespace) -> dict[str, list[str]]:
    """By name, those that are asked for: lines."""
    shapes = tuple(Shape(*x) for x in args.shape or ()) or cost_tables.SHAPES
    found = {}
    if args.table or args.dense or args.docs:
        head = inputs.load(args.head)
    if args.table or args.docs:
        found["table"] = list(cost_tables.step_tables(head, shapes, args.table or "same"))
    if args.docs:
        found["first"] = list(cost_tables.step_tables(head, shapes, "first"))
    if args.dense or args.docs:
        found["dense"] = list(cost_tables.dense_tables(head, shapes[:1] if args.docs else shapes))
    if args.rates or args.docs:
        found["rates"] = list(cost_tables.rate_tables())
    return found


def write_docs(path: Path, tables: dict[str, list[str]]) -> None:
    """Each table between its mark and the next end."""
    text = path.read_text()
    for name, lines in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = "\n".join([f"{before}<!-- {name} -->", *lines, f"<!-- end -->{rest.partition('<!-- end -->')[2]}"])
    path.write_text(text)


def main() -> None:
    from fastdpo.ops.triton.launch import Target

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument(
        "--gpu", choices=GPUS, default="H200", help="whose tiles are counted and whose rates make times"
    )
    parser.add_argument("--table", choices=SCALINGS, nargs="?", const="same", help="expected times of all shapes")
    parser.add_argument("--dense", action="store_true", help="what dense products for heavy blocks would change")
    parser.add_argument("--rates", action="store_true", help="the GPUs' rates and their sources")
    parser.add_argument("--docs", type=Path, help="write all three into this file, docs/costs.md")
    parser.add_argument("--shape", type=int, nargs=3, action="append", help="of these tables, instead of the usual")
    args = parser.parse_args()
    if tables := _tables(args):
        if args.docs:
            write_docs(args.docs, tables)
        else:
            print("\n".join(line for lines in tables.values() for line in lines))
        return
    head = inputs.load(args.head)
    shape = Shape(args.tokens, args.vocab, args.hidden_size)
    gpu = GPUS[args.gpu]
    target = Target(gpu.capability, gpu.multiprocessors)
    results = {}
    for frozen in (False, True):
        for backward, scaling in (*(("routed", scaling) for scaling in SCALINGS), ("exact", None)):
            tau = taus(None, not frozen)
            live = live_hidden = None
            title = f"{backward} backward, {'frozen' if frozen else 'trained'} head"
            if scaling is not None:
                live, live_hidden = (live_pairs(head, shape, t, scaling) for t in (min(tau), tau[0]))
                per_token = [f"{(x.sum() / shape.num_tokens).item():.1f}" for x in (live_hidden, live)]
                title += f", live blocks per token of {len(live)} ({scaling}): {per_token[0]} for dhidden"
                title += "" if frozen else f", {per_token[1]} for dweight"
            options = {"frozen": frozen, "backward": backward, "tau": None, "target": target, "cache": gpu.cache}
            step = step_cost(shape, live, live_hidden, **options)
            print(f"\n{title}\n(N, V, H) = {cost_tables.sizes(shape)}, bf16, {args.gpu}")
            for name, *numbers in [COLUMNS, *rows_of(step, shape, gpu)]:
                print(f"  {name[:50]:50}" + "".join(f"{x:>12}" for x in numbers))
            total, products = step.total(), 2 * shape.one_pass / gpu.flops
            floor, expected = step.floor(gpu) / products, step.expected(gpu) / products
            print(f"  over two plain products ({products * 1e3:.3f} ms): floor {floor:.3f}, expected {expected:.3f}")
            results[title] = {
                "passes": total.flops / shape.one_pass,
                "bytes": total.bytes,
                "launches": total.launches,
                "floor ms": step.floor(gpu) * 1e3,
                "floor over two products": floor,
                "expected over two products": expected,
                "kernels": {name: vars(cost) for name, cost in step.kernels.items()},
            }
    moved = dhidden_through_cache(shape, live_pairs(head, shape, taus(None, False)[0], "same"), target)
    print(
        "\nrouted dhidden, added up: " + ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in moved.items()),
        end=" ",
    )
    print(f"through the L2 cache; ordered over atomics {moved['ordered'] / moved['atomics']:.2f}")
    results["dhidden, bytes through the L2 cache"] = moved
    if args.output:
        shown = {"head": head.name, **{k: getattr(args, k) for k in ("tokens", "vocab", "hidden_size", "gpu")}}
        document = {"inputs": shown, "environment": inputs.environment(), "results": results}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
