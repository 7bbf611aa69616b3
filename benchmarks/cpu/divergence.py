"""The divergence of a student from a teacher on the CPU: time, error and memory of every path, on a trained head.

python -m benchmarks.cpu.divergence --head head.safetensors [--hidden-size 512] [--rounds 3]

The teacher is the head as it is; the student one of three: "perturbed" (noise of 0.3 standard deviations on hidden and
weight), "nearly equal" (0.01) and "smaller" (the best projection to 160 of its 256 dimensions, raised to 3/4 of H).
A step is the forward, the mean over tokens and the backward into the student's hidden and weight: medians of
interleaved rounds in one process. Errors are against fp64 on the same inputs, of the gradient: of `sure` tokens, whose
teacher gives an id more than 0.99, and of the token that is off most. Memory: the most beyond inputs and results, in a
process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

import fastdpo
from benchmarks import inputs
from benchmarks.cpu.memory import bytes_of
from benchmarks.cpu.resident import growth, in_child
from benchmarks.peers import Unavailable, imported

PAIRS = ("perturbed", "nearly equal", "smaller")
KINDS = {0.0: "forward_kl", 1.0: "reverse_kl"}  # of beta; "jsd" between


class TwoHeads(NamedTuple):
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor

    def leaves(self) -> TwoHeads:
        return self._replace(hidden=self.hidden.clone().requires_grad_(), weight=self.weight.clone().requires_grad_())


def two_heads(head: inputs.HeadInputs, pair: str, num_tokens: int, hidden_size: int) -> TwoHeads:
    g = torch.Generator().manual_seed(3)

    def noisy(x: Tensor, by: float) -> Tensor:
        return x + by * x.std() * torch.randn(x.shape, generator=g)

    hidden, weight = head.hidden[:num_tokens].float(), head.weight.float()
    teacher = inputs.lifted(inputs.HeadInputs("", hidden, weight, head.labels[:num_tokens]), hidden_size)
    if pair == "smaller":
        _, _, directions = torch.linalg.svd(weight[:8192], full_matrices=False)
        kept = directions[:160].T
        student = inputs.lifted(
            inputs.HeadInputs("", hidden @ kept, weight @ kept, teacher.labels), hidden_size * 3 // 4
        )
    else:
        by = {"perturbed": 0.3, "nearly equal": 0.01}[pair]
        student = inputs.lifted(
            inputs.HeadInputs("", noisy(hidden, by), noisy(weight, by), teacher.labels), hidden_size
        )
    return TwoHeads(student.hidden, student.weight, teacher.hidden, teacher.weight)


def divergence(z: Tensor, w: Tensor, beta: float) -> Tensor:
    p, r = z.log_softmax(-1), w.log_softmax(-1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if beta in KINDS:
        return kl(p, r) if beta else kl(r, p)
    m = torch.logsumexp(torch.stack((p + torch.tensor(1 - beta).log(), r + torch.tensor(beta).log())), 0)
    return beta * kl(r, m) + (1 - beta) * kl(p, m)


def eager(h: TwoHeads, beta: float) -> Tensor:
    return divergence(h.hidden @ h.weight.T, h.ref_hidden @ h.ref_weight.T, beta)


def bf16_logits(h: TwoHeads, beta: float) -> Tensor:
    """What a bf16 model gives: products of fp32 precision, logits rounded to bf16."""
    return divergence(*((x @ y.T).bfloat16().float() for x, y in (h[:2], h[2:])), beta)


def trl(h: TwoHeads, beta: float) -> Tensor:
    function = imported("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", "trl")
    return function.apply(h.hidden, h.weight, None, h.ref_hidden, h.ref_weight, None, beta, 1.0)[0]


def liger(h: TwoHeads, beta: float) -> Tensor:
    """Its loss is a mean already, whose gradient it takes in the forward."""
    loss = imported("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", "liger-kernel")
    labels = torch.zeros(h.hidden.shape[0], dtype=torch.int64)
    made = loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    return made(h.hidden, h.weight, h.ref_hidden, h.ref_weight, labels)


def ours(h: TwoHeads, beta: float, **options) -> Tensor:
    mask = torch.ones(h.hidden.shape[0], dtype=torch.bool)
    kind = KINDS.get(beta, "jsd")
    if kind == "jsd":
        options["jsd_beta"] = beta
    return fastdpo.linear_divergence(*h, mask, kind=kind, **options).divergence


PATHS: dict[str, Callable] = {
    "eager": eager,
    "bf16 logits": bf16_logits,
    "trl": trl,
    "liger": liger,
    "fastdpo exact": lambda h, beta: ours(h, beta, backward="exact"),
    "fastdpo routed": lambda h, beta: ours(h, beta, seed=1),
}


def step(run: Callable, h: TwoHeads, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    h = h.leaves()
    values = run(h, beta)
    return values.detach(), *torch.autograd.grad(values.mean(), h[:2])


def relative(x: Tensor, e: Tensor) -> float:
    return ((x - e).norm() / e.norm()).item()


def truth(h: TwoHeads, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergence, dhidden, dweight, largest probability of the teacher's), in pieces of tokens."""
    h = TwoHeads(*(x.double() for x in h))
    values, dhidden, largest, dweight = [], [], [], torch.zeros_like(h.weight)
    for hidden, ref_hidden in zip(h.hidden.split(128), h.ref_hidden.split(128)):
        piece = h._replace(hidden=hidden, ref_hidden=ref_hidden).leaves()
        value = eager(piece, beta)
        a, b = torch.autograd.grad(value.sum() / h.hidden.shape[0], piece[:2])
        values.append(value.detach()), dhidden.append(a)
        dweight += b
        largest.append((ref_hidden @ h.ref_weight.T).softmax(-1).amax(-1))
    return torch.cat(values), torch.cat(dhidden), dweight, torch.cat(largest)


def errors(found, true) -> dict:
    values, dhidden, dweight = (x.double() for x in found)
    sure, off = true[3] > 0.99, (dhidden - true[1]).norm(dim=1) / true[1].norm(dim=1)
    whole = values.ndim > 0
    return {
        "divergence": relative(values, true[0]) if whole else relative(values, true[0].mean()),
        "dhidden": relative(dhidden, true[1]),
        "dhidden, sure": relative(dhidden[sure], true[1][sure]) if sure.any() else None,
        "dhidden, worst token": off.max().item(),
        "dweight": relative(dweight, true[2]),
    }


def memory(path: str, args) -> float | None:
    """MiB beyond the inputs and what the step returns; in a process of its own."""
    command = ["-m", "benchmarks.cpu.divergence", "--one", path, "--tokens", args.tokens]
    return in_child(*command, "--hidden-size", args.hidden_size, *(["--head", args.head] if args.head else []))[0]


def one(path: str, args) -> None:
    h = two_heads(inputs.load(args.head), "perturbed", args.tokens, args.hidden_size)
    few = TwoHeads(*(x[:64] if x.shape[0] == args.tokens else x for x in h))
    found = [step(PATHS[path], few, 0.0)]
    print(growth(lambda: found.append(step(PATHS[path], h, 0.0))) - 2 * bytes_of(*h[:2]))  # copied, and returned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help=f"some of {PAIRS}")
    parser.add_argument("--paths", nargs="+", default=list(PATHS), help=f"some of {list(PATHS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one, args)
    head, rows, left_out = inputs.load(args.head), [], {}
    for pair in args.pairs:
        h = two_heads(head, pair, args.tokens, args.hidden_size)
        for beta in args.betas:
            true = truth(h, beta)
            times, found = {name: [] for name in args.paths}, {}
            for round_index in range(args.rounds + 1):  # the first warms up
                for name in args.paths:
                    if name in left_out:
                        continue
                    begin = time.perf_counter()
                    try:
                        found[name] = step(PATHS[name], h, beta)
                    except (Unavailable, RuntimeError) as error:
                        left_out[name] = str(error).splitlines()[0]
                        continue
                    if round_index:
                        times[name].append(time.perf_counter() - begin)
            begin = [time.perf_counter()]
            for _ in range(3):
                torch.mm(h.hidden, h.weight.T), torch.mm(h.ref_hidden, h.ref_weight.T)
                begin.append(time.perf_counter())
            both = statistics.median(b - a for a, b in pairwise(begin))
            for name, seconds in times.items():
                if seconds:
                    median = statistics.median(seconds)
                    row = {"pair": pair, "divergence of": KINDS.get(beta, f"jsd, {beta:g}"), "path": name}
                    row |= {"median s": median, "spread s": max(seconds) - min(seconds)}
                    rows.append({**row, "this / one GEMM of each head": median / both, **errors(found[name], true)})
                    print(rows[-1], flush=True)
    used = {name: memory(name, args) for name in args.paths if name not in left_out}
    notes = {"head": head.name, "N": args.tokens, "V": head.weight.shape[0], "H": args.hidden_size, "dtype": "float32"}
    notes |= {"rounds": args.rounds, "memory, MiB": used, "left out": left_out}
    inputs.report(args.output, "The divergence of two heads: forward, mean, backward", rows, notes)


if __name__ == "__main__":
    main()
