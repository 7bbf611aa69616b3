"""Counts of one DPO step's head on the Triton engine: operations in lm_head passes, bytes and launches per kernel, and
the floor that they set on a GPU's time.

python -m tools.count_step --head head.safetensors [--tokens 8192 --vocab 128256 --hidden-size 4096 --gpu H200]

Policy and reference forward, and the backward. Live pairs are those of the head's distributions, scaled to a larger
vocabulary in one of two ways:

    same    a token has as many live blocks as on the head, among more blocks
    split   every column of the head becomes several, of equal probability: candidates then lie in more blocks than a
            trained model's do, so this is an upper bound

No GPU is needed, and no time is measured.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from benchmarks import inputs
from fastdpo.head import taus
from fastdpo.routing import BLOCK, ONE, keep, num_blocks, odds
from tools.cost_model import GPUS, Gpu, Shape, StepCost, dhidden_through_cache, step_cost


def live_pairs(head: inputs.HeadInputs, shape: Shape, tau: float, scaling: str, seed: int = 0) -> Tensor:
    """[num_blocks] tokens out of shape.num_tokens that keep each block, drawn by the rule of fastdpo/routing.py."""
    blocks, head_size = num_blocks(shape.vocab_size), head.weight.shape[0]
    width = shape.vocab_size / head_size if scaling == "split" else 1.0
    block_of = (torch.arange(head_size) * width).long() // BLOCK
    weight = head.weight.float()
    g = torch.Generator().manual_seed(seed)
    counts = torch.zeros(int(block_of[-1]) + 1, dtype=torch.float64)
    for hidden, labels in zip(head.hidden.float().split(512), head.labels.split(512)):
        tail = (hidden @ weight.T).scatter(1, labels[:, None], -torch.inf).softmax(-1)
        share = torch.zeros(len(tail), len(counts)).index_add_(1, block_of, tail)
        own = torch.zeros_like(share, dtype=torch.bool).scatter_(1, block_of[labels][:, None], True)
        counts += keep(odds(share, own, tau), torch.randint(ONE, (len(share),), generator=g)).sum(0)
    stretched = counts[(torch.arange(blocks) * len(counts) / blocks).long()]
    return stretched * (counts.sum() / stretched.sum()) * (shape.num_tokens / len(head.labels))


def rows_of(step: StepCost, shape: Shape, gpu: Gpu) -> list[list[str]]:
    def row(name: str, flops: float, traffic: float, launches: int, floor: float) -> list[str]:
        return [name, f"{flops / shape.one_pass:.4f}", f"{traffic / 1e9:.2f}", str(launches), f"{floor * 1e3:.3f}"]

    rows = [row(name, one.flops, one.bytes, one.launches, one.floor(gpu)) for name, one in step.kernels.items()]
    launches = step.other_launches.total()
    rows.append(row("torch's own: " + ", ".join(step.other_launches), 0, 0, launches, launches * gpu.launch))
    total = step.total()
    rows.append(row("total", total.flops, total.bytes, total.launches, step.floor(gpu)))
    return rows


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
    args = parser.parse_args()
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
