"""Peak resident memory of one policy forward and backward beyond inputs and returned gradients, per peer.

python benchmarks/bench_memory.py [--tokens 4096 --vocab 131072 --hidden-size 64 --frozen --dtype float32]
python benchmarks/bench_memory.py --tokens 1024 4096 16384 65536 --vocab 32768 --frozen     memory against context

Each measurement is a process of its own: growth of the resident set over its value with the inputs in place, less
what `backward` returned. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time

import inputs
import torch

PATHS = ("fastdpo routed", "fastdpo exact", "trl", "eager")


def logps_of(path: str):
    if path == "eager":
        return lambda h, w, y: (h @ w.T).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    if path == "trl":
        from trl.kernels import ChunkedLogProbFunction

        return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0]
    import fastdpo

    return lambda h, w, y: fastdpo.linear_logps(h, w, y, backward=path.split()[1])


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def measure(args) -> float:
    """MiB, in this process."""
    torch.manual_seed(0)
    dtype, (tokens,) = getattr(torch, args.dtype), args.tokens
    hidden = torch.randn(tokens, args.hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(args.vocab, args.hidden_size, dtype=dtype, requires_grad=not args.frozen)
    labels = torch.randint(0, args.vocab, (tokens,))
    logps = logps_of(args.path)
    small = hidden[:64].detach().requires_grad_()  # loads what is loaded once
    logps(small, weight.detach()[:512].requires_grad_(not args.frozen), labels[:64] % 512).sum().backward()
    base = peak = resident()
    running = True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    logps(hidden, weight, labels).sum().backward()
    running = False
    watcher.join()
    returned = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight) if x.grad is not None)
    return (peak - base - returned) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--limit", type=float, default=8, help="GiB: logits that take a third of it are not tried")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--path", choices=PATHS, help="measure this one in this process and print MiB")
    args = parser.parse_args()
    if args.path:
        print(measure(args))
        return
    rows = []
    for tokens in args.tokens:
        logits = tokens * args.vocab * 4 / 2**20
        for path in PATHS:
            row = {"path": path, "N": tokens, "MiB": None, "failed": None, "logits alone, fp32 MiB": logits}
            rows.append(row)
            if path == "eager" and 3 * logits > args.limit * 1024:
                row["failed"] = f"not tried: its logits need more than {args.limit:g} GiB"
                continue
            shape = [
                "--tokens",
                tokens,
                "--vocab",
                args.vocab,
                "--hidden-size",
                args.hidden_size,
                "--dtype",
                args.dtype,
            ]
            command = [sys.executable, __file__, *map(str, shape), *["--frozen"] * args.frozen, "--path", path]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                row["failed"] = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            else:
                row["MiB"] = float(done.stdout)
    notes = {
        "V": args.vocab,
        "H": args.hidden_size,
        "dtype": args.dtype,
        "head": "frozen" if args.frozen else "trained",
        "fastdpo's bound, MiB": "128 + N * 256 / 2**20",
    }
    inputs.report(args.output, "Peak resident memory beyond inputs and returned gradients", rows, notes)


if __name__ == "__main__":
    main()
