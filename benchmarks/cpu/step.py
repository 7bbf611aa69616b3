"""One DPO step on the CPU against every peer: interleaved rounds in one process, medians and ratios.

python -m benchmarks.cpu.step --head head.safetensors [--hidden-size 1024] [--dtype bfloat16] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks import inputs
from benchmarks.peers import OURS, PEERS, Problem, Unavailable


def make_problem(
    head: inputs.HeadInputs, sequence_length: int, prompt_share: float, dtype: torch.dtype = torch.float32
) -> Problem:
    count = head.hidden.shape[0] // sequence_length // 2 * 2
    hidden = head.hidden[: count * sequence_length].view(count, sequence_length, -1)
    labels = head.labels[: count * sequence_length].view(count, sequence_length).clone()
    labels[:, : int(sequence_length * prompt_share)] = -100
    g = torch.Generator().manual_seed(2)
    # The reference: the same model a few optimizer steps away.
    ref_hidden = hidden + 0.02 * hidden.std() * torch.randn(hidden.shape, generator=g)
    return Problem(
        hidden.to(dtype, copy=True).requires_grad_(),
        head.weight.to(dtype, copy=True).requires_grad_(),
        labels,
        ref_hidden.to(dtype),
        head.weight.to(dtype, copy=True),
    )


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--prompt-share", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=f"some of {list(PEERS)}")
    args = parser.parse_args()

    head = inputs.lifted(inputs.load(args.head), args.hidden_size)
    dtype = getattr(torch, args.dtype)
    problem = make_problem(head, args.sequence_length, args.prompt_share, dtype)
    few = inputs.HeadInputs(head.name, head.hidden[:256], head.weight, head.labels[:256])
    warm = make_problem(few, 64, args.prompt_share, dtype)
    completion = int((problem.labels != -100).sum())

    def two_gemms(p: Problem):
        rows = p.hidden[p.labels != -100].detach()
        for _ in range(2):
            torch.mm(rows, p.weight.detach().T)

    def two_products(p: Problem):
        """By oneDNN, which uses AVX-512 on AMD processors, where MKL does not."""
        rows = p.hidden[p.labels != -100].detach()
        for _ in range(2):
            torch.ops.mkldnn._linear_pointwise(rows, p.weight.detach(), None, "none", [], "")

    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    steps = {
        "two plain GEMMs (torch.mm)": two_gemms,
        **({"two plain GEMMs (oneDNN)": two_products} if has_onednn else {}),
        **{name: PEERS[name] for name in args.peers},
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    results, skipped = {}, {}
    for round_index in range(-1, args.rounds):  # the first round warms up
        for name, step in steps.items():
            if name in skipped:
                continue
            begin = time.perf_counter()
            try:
                results[name] = step(warm if round_index < 0 else problem)
            except Unavailable as reason:
                skipped[name] = str(reason)
                continue
            if round_index >= 0:
                times[name].append(time.perf_counter() - begin)
        print(f"round {max(round_index + 1, 0)} of {args.rounds}", flush=True)

    peers = [name for name in args.peers if name not in OURS and name not in skipped]
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    fastest = min((medians[name] for name in peers), default=None)
    exact = results.get("fastdpo exact")
    gemms = min(median for name, median in medians.items() if name.startswith("two plain GEMMs"))
    table = []
    for name, median in medians.items():
        result, error = results[name], {}
        for label, index in (("dhidden", 1), ("dweight", 2)):
            known = result is not None and exact is not None and name != "fastdpo exact"
            difference = (result[index] - exact[index]).norm() / exact[index].norm() if known else None
            error[f"{label} vs exact"] = None if difference is None else difference.item()
        table.append(
            {
                "step": name,
                "median s": median,
                "spread s": max(times[name]) - min(times[name]),
                "fastest peer / this": fastest / median if fastest else None,
                "this / two GEMMs": median / gemms,
                "loss": None if result is None else result[0].item(),
                **error,
            }
        )
    vocab_size = problem.weight.shape[0]
    notes = {
        "head": head.name,
        "completion tokens": completion,
        "prompt tokens": problem.labels.numel() - completion,
        "V": vocab_size,
        "H": args.hidden_size,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "skipped": skipped,
    }
    inputs.report(args.output, "One DPO step on the CPU: policy + reference forward, loss, backward", table, notes)


if __name__ == "__main__":
    main()
