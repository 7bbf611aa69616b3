"""The backward on the CPU at every number of tokens from 1 to 4096: the default beside exact and eager.

python -m benchmarks.cpu.batches [--head head.safetensors] [--hidden-size 256 1024] [--dtype bfloat16] [--rounds 9]

Of `linear_logps(...).backward()`: interleaved rounds in one process, medians, the forward not counted. `eager` is
torch's backward of log_softmax of all logits.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import fastdpo
from benchmarks import inputs
from benchmarks.peers import eager_logps

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PATHS = {
    "default": fastdpo.linear_logps,
    "exact": lambda *head: fastdpo.linear_logps(*head, backward="exact"),
    "eager": eager_logps,
}


def seconds(path: str, hidden, weight, labels) -> float:
    logps = PATHS[path](hidden, weight, labels)
    upstream = torch.ones_like(logps)
    begin = time.perf_counter()
    logps.backward(upstream)
    taken = time.perf_counter() - begin
    hidden.grad = weight.grad = None
    return taken


def measure(head: inputs.HeadInputs, count: int, rounds: int, dtype: torch.dtype) -> dict:
    some = inputs.repeated(head, count)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (some.hidden, some.weight))
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    for round_index in range(-1, rounds):
        for path, taken in times.items():
            found = seconds(path, hidden, weight, some.labels)
            if round_index >= 0:  # the first round warms up
                taken.append(found)
    medians = {path: statistics.median(taken) for path, taken in times.items()}
    row = {"tokens": count, **{f"{path} ms": 1e3 * taken for path, taken in medians.items()}}
    row["default / exact"] = medians["default"] / medians["exact"]
    row["default / eager"] = medians["default"] / medians["eager"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--hidden-size", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    loaded, rows = inputs.load(args.head), []
    for size in args.hidden_size:
        head = loaded if loaded.hidden.shape[1] == size else inputs.lifted(loaded, size)
        for count in args.tokens:
            rounds = max(3, min(args.rounds, args.rounds * 2**27 // (count * size * 1024)))
            rows.append({"H": size, **measure(head, count, rounds, getattr(torch, args.dtype)), "rounds": rounds})
            print(rows[-1], flush=True)
    notes = {"head": loaded.name, "V": loaded.weight.shape[0], "dtype": args.dtype}
    inputs.report(args.output, "One backward on the CPU, by number of tokens", rows, notes)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
