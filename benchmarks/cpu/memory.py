"""Peak resident memory of one policy forward and backward beyond inputs and returned gradients, per peer; or the
largest context that fits.

python -m benchmarks.cpu.memory [--tokens 4096 --vocab 131072 --hidden-size 64 --frozen --dtype float32]
python -m benchmarks.cpu.memory --tokens 1024 4096 16384 65536 --vocab 32768 --frozen     memory against context
python -m benchmarks.cpu.memory --fits 2 --vocab 131072 --hidden-size 256     most tokens whose step fits in 2 GiB

Each measurement is a process of its own: growth of the resident set over its value with the inputs in place, less
what `backward` returned. What has to fit is everything: inputs, the head, both gradients and the growth. Linux only.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks import inputs
from benchmarks.cpu.resident import growth, in_child
from benchmarks.peers import TOKEN_LOGPS

PATHS = ("fastdpo routed", "fastdpo exact", "trl", "torch linear_cross_entropy", "liger", "eager")
DPO = ("liger",)  # gives no log-probs: a loss of one pair of sequences, with a frozen copy of the head as reference
GIB = 1024


def step_of(path: str):
    """(hidden, weight, labels) -> the loss."""
    if path in DPO:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss_fn = LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False)
        return lambda h, w, y: loss_fn(w, h.unflatten(0, (2, -1)), y.unflatten(0, (2, -1)))[0]
    name, _, backward = path.partition(" ") if path.startswith("fastdpo") else (path, "", "")
    logps_of = partial(TOKEN_LOGPS[name], **({"backward": backward} if backward else {}))
    return lambda h, w, y: logps_of(h, w, y).sum()


def bytes_of(*tensors) -> float:
    """MiB."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None) / 2**20


def measure(args) -> float:
    """MiB, in this process: beyond inputs and returned gradients; with --fits, of everything."""
    torch.manual_seed(0)
    dtype, (tokens,) = getattr(torch, args.dtype), args.tokens
    if args.head:
        head = inputs.repeated(inputs.lifted(inputs.load(args.head), args.hidden_size), tokens)
        hidden, weight, labels = head.hidden.to(dtype), head.weight.to(dtype), head.labels
        del head
    else:
        hidden = torch.randn(tokens, args.hidden_size, dtype=dtype)
        weight = torch.randn(args.vocab, args.hidden_size, dtype=dtype)
        labels = torch.randint(0, args.vocab, (tokens,))
    hidden.requires_grad_()
    weight.requires_grad_(not args.frozen)
    step = step_of(args.path)
    small = hidden[:64].detach().requires_grad_()  # loads what is loaded once
    step(small, weight.detach()[:512].requires_grad_(not args.frozen), labels[:64] % 512).backward()
    given = bytes_of(hidden, weight, labels)
    room = args.fits[0] * GIB - given if args.fits else None
    grown = growth(lambda: step(hidden, weight, labels).backward(), room)
    return given + grown if args.fits else grown - bytes_of(hidden.grad, weight.grad)


def in_process(args, path: str, tokens: int, fits: float | None = None) -> tuple[float | None, str | None]:
    options = {"--tokens": tokens, "--vocab": args.vocab, "--hidden-size": args.hidden_size, "--dtype": args.dtype}
    options |= {"--path": path} | ({"--fits": fits} if fits else {}) | ({"--head": args.head} if args.head else {})
    return in_child(
        "-m", "benchmarks.cpu.memory", *(x for pair in options.items() for x in pair), *["--frozen"] * args.frozen
    )


def against_tokens(args) -> list[dict]:
    rows = []
    for tokens in args.tokens:
        logits = tokens * args.vocab * 4 / 2**20
        for path in args.paths:
            row = {"path": path, "N": tokens, "MiB": None, "failed": None, "logits alone, fp32 MiB": logits}
            rows.append(row)
            if path in ("eager", "liger") and 3 * logits > args.limit * GIB:
                row["failed"] = f"not tried: its logits need more than {args.limit:g} GiB"
            else:
                row["MiB"], row["failed"] = in_process(args, path, tokens)
    return rows


def largest(args, path: str, gib: float) -> dict:
    """Doubles the number of tokens while the step fits, then halves the gap (of its logarithm) three times."""
    row = {"path": path, "GiB": gib, "most tokens": 0, "MiB then": None, "at least": False}
    fits, fails, tokens = 0, None, 256
    while fails is None or fails / max(fits, 1) > 1.1:
        used, _ = in_process(args, path, tokens, gib)
        if used is not None and used <= gib * GIB:
            fits, row["most tokens"], row["MiB then"] = tokens, tokens, used
        else:
            fails = tokens
        if fits >= args.most or (fits == 0 and tokens <= 2):
            row["at least"] = fits >= args.most
            break
        following = 2 * tokens if fails is None else tokens // 2 if fits == 0 else round((fits * fails) ** 0.5)
        tokens = min(following // 2 * 2, args.most)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser, default="random numbers, whose distributions are as sharp as H is large")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--fits", type=float, nargs="+", help="GiB: find the most tokens that fit in each of these")
    parser.add_argument("--most", type=int, default=65536, help="with --fits: try no more tokens than these")
    parser.add_argument("--limit", type=float, default=8, help="GiB: logits that take a third of it are not tried")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--frozen", action="store_true", help="the head takes no gradient")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--paths", nargs="*", choices=PATHS, default=list(PATHS))
    parser.add_argument("--path", choices=PATHS, help="measure this one in this process and print MiB")
    args = parser.parse_args()
    if args.head:
        args.vocab, smallest = inputs.load(args.head).weight.shape
        args.hidden_size = max(args.hidden_size, smallest)
    if args.path:
        print(measure(args))
        return
    notes = {
        "inputs": Path(args.head).name if args.head else "random",
        "V": args.vocab,
        "H": args.hidden_size,
        "dtype": args.dtype,
        "head": "frozen" if args.frozen else "trained",
    }
    if args.fits:
        rows = []
        for path in args.paths:
            row = {"at least": False}
            for gib in sorted(args.fits):  # what fits in less fits in more
                row = {**row, "GiB": gib} if row["at least"] else largest(args, path, gib)
                rows.append(row)
                print(row, flush=True)
        inputs.report(args.output, "Most completion tokens whose forward and backward fit in memory", rows, notes)
    else:
        notes["fastdpo's bound, MiB"] = "128 + N * 256 / 2**20"
        inputs.report(
            args.output, "Peak resident memory beyond inputs and returned gradients", against_tokens(args), notes
        )


if __name__ == "__main__":
    main()
