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
from collections.abc import Iterator

from benchmarks import inputs
from fastdpo.head import taus
from tools import cost_tables
from tools.cost_model import Shape, StepCost, dhidden_through_cache, step_cost
from tools.gpus import GPUS, Gpu
from tools.live import SCALINGS, live_pairs


def rows_of(step: StepCost, shape: Shape, gpu: Gpu) -> list[list[str]]:
    def row(name: str, flops: float, traffic: float, launches: int, floor: float) -> list[str]:
        return [name, f"{flops / shape.one_pass:.4f}", f"{traffic / 1e9:.2f}", str(launches), f"{floor * 1e3:.3f}"]

    rows = [row(name, one.flops, one.bytes, one.launches, one.floor(gpu)) for name, one in step.kernels.items()]
    launches = step.other_launches.total()
    rows.append(row("torch's own: " + ", ".join(step.other_launches), 0, 0, launches, launches * gpu.launch))
    total = step.total()
    rows.append(row("total", total.flops, total.bytes, total.launches, step.floor(gpu)))
    return rows


def _tables(args: argparse.Namespace) -> Iterator[str]:
    if args.rates:
        yield from cost_tables.rate_tables()
    if args.table or args.dense:
        head, shapes = inputs.load(args.head), cost_tables.SHAPES
        shapes = tuple(Shape(*x) for x in args.shape) if args.shape else shapes
        if args.table:
            yield from cost_tables.step_tables(head, shapes, args.table)
        if args.dense:
            yield from cost_tables.dense_tables(head, shapes)


def main() -> None:
    from fastdpo.ops.triton.launch import Target

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU whose tiles are counted")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="whose rates make the floor")
    parser.add_argument("--table", choices=SCALINGS, nargs="?", const="same", help="expected times of all shapes")
    parser.add_argument("--dense", action="store_true", help="what dense products for heavy blocks would change")
    parser.add_argument("--rates", action="store_true", help="the GPUs' rates and their sources")
    parser.add_argument("--shape", type=int, nargs=3, action="append", help="of these tables, instead of the usual")
    args = parser.parse_args()
    if args.table or args.dense or args.rates:
        print("\n".join(_tables(args)))
        return
    head = inputs.load(args.head)
    shape = Shape(args.tokens, args.vocab, args.hidden_size)
    target = Target(args.capability, args.multiprocessors)
    results = {}
    for frozen in (False, True):
        for backward, scaling in (("routed", "same"), ("routed", "split"), ("exact", None)):
            tau = taus(None, not frozen)
            live = live_hidden = None
            title = f"{backward} backward, {'frozen' if frozen else 'trained'} head"
            if scaling is not None:
                live, live_hidden = (live_pairs(head, shape, t, scaling) for t in (min(tau), tau[0]))
                per_token = [f"{(x.sum() / shape.num_tokens).item():.1f}" for x in (live_hidden, live)]
                title += f", live blocks per token of {len(live)} ({scaling}): {per_token[0]} for dhidden"
                title += "" if frozen else f", {per_token[1]} for dweight"
            step = step_cost(shape, live, live_hidden, frozen=frozen, backward=backward, tau=None, target=target)
            print(
                f"\n{title}\n(N, V, H) = ({args.tokens}, {args.vocab}, {args.hidden_size}), bf16, sm_{args.capability}"
            )
            gpu = GPUS[args.gpu]
            for row in [["kernel", "passes", "GB", "launches", "floor ms"], *rows_of(step, shape, gpu)]:
                print(f"  {row[0][:60]:60} {row[1]:>8} {row[2]:>9} {row[3]:>9} {row[4]:>9}")
            total, products = step.total(), 2 * shape.one_pass / gpu.flops
            print(f"  floor over two plain products ({products * 1e3:.3f} ms): {step.floor(gpu) / products:.3f}")
            results[title] = {
                "passes": total.flops / shape.one_pass,
                "bytes": total.bytes,
                "launches": total.launches,
                "floor ms": step.floor(gpu) * 1e3,
                "floor over two products": step.floor(gpu) / products,
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
        shown = {"head": head.name, **{k: v for k, v in vars(args).items() if k not in ("output", "head")}}
        document = {"inputs": shown, "environment": inputs.environment(), "results": results}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
