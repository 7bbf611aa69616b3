"""How far every path is from fp64: log-probs of sequences and tokens, gradients, and gradients of confident tokens.

python -m benchmarks.cpu.accuracy --head head.safetensors [--output benchmarks/results/2026-11-cpu-accuracy.json]

Truth is fp64 on the very inputs that a path gets (rounded to its type). Error of a gradient: relative L2; of a
sequence's log-prob: the largest over the sequences, in nats. Gradients of confident tokens: those of their rows
of `hidden`, by p(label); of the worst token: the largest error of a row against that row. The seed of routed rows is
fixed: their errors are noise, whose mean is zero (bench_bias.py); those of other rows are the same in every step.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.cpu.cce_filter import cce_filter_logps
from benchmarks.peers import TOKEN_LOGPS, Unavailable, imported

SEQUENCE = 512
CONFIDENT = ((0.0, 0.5), (0.5, 0.9), (0.9, 0.99), (0.99, 1.0))


def paths() -> dict:
    ours = TOKEN_LOGPS["fastdpo"]
    found = {f"{name}": run for name, run in TOKEN_LOGPS.items() if name != "fastdpo"}
    found["cce's filter, in fp32"] = cce_filter_logps
    found["fastdpo exact"] = lambda *x: ours(*x, backward="exact")
    found["fastdpo routed"] = lambda *x: ours(*x, seed=0)
    return found


def measure(run, hidden: Tensor, weight: Tensor, labels: Tensor, coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = run(hidden, weight, labels)
    dhidden, dweight = torch.autograd.grad(logps, (hidden, weight), coef.to(logps.dtype))
    return logps.detach().double(), dhidden.double(), dweight.double()


def liger_sequences(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """[N / SEQUENCE] log-probs. Gradients are of its loss alone, for coefficients of its own."""
    loss_class = imported("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss", "liger-kernel")
    sequences = hidden.unflatten(0, (-1, SEQUENCE)), labels.unflatten(0, (-1, SEQUENCE))
    _, (chosen, rejected, *_) = loss_class(compiled=False, use_ref_model=False)(weight, *sequences)
    return torch.cat([chosen, rejected]).double()


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In pieces of tokens: fp64 logits of all would take a gigabyte."""
    hidden, weight = hidden.double(), weight.double()
    logps, dhidden, dweight = [], [], torch.zeros_like(weight)
    for h, y, c in zip(hidden.split(SEQUENCE), labels.split(SEQUENCE), coef.double().split(SEQUENCE)):
        logp = (h @ weight.T).log_softmax(-1)
        logps.append(logp.gather(1, y[:, None])[:, 0])
        dz = -logp.exp() * c[:, None]
        # 1 - p without cancellation: the sum of the others
        dz[torch.arange(len(y)), y] = 0.0
        dz[torch.arange(len(y)), y] = -dz.sum(1)
        dhidden.append(dz @ weight)
        dweight += dz.T @ h
    return torch.cat(logps), torch.cat(dhidden), dweight


def relative(x: Tensor, e: Tensor) -> float:
    return ((x - e).norm() / e.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    inputs.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"], help="of the inputs")
    args = parser.parse_args()
    head = inputs.load(args.head)
    count = min(args.tokens, len(head.labels)) // SEQUENCE * SEQUENCE
    labels = head.labels[:count]
    coef = torch.where(torch.arange(count) < count // 2, 1.0, -1.0)  # chosen up, rejected down
    rows, left_out = [], {}
    for dtype in (getattr(torch, name) for name in args.types):
        hidden, weight = head.hidden[:count].to(dtype), head.weight.to(dtype)
        logps, dhidden, dweight = truth(hidden, weight, labels, coef)
        p = logps.exp()
        for name, run in paths().items():
            try:
                mine = measure(run, hidden, weight, labels, coef)
            except Unavailable as error:
                left_out[name] = str(error)
                continue
            except (RuntimeError, TypeError, NotImplementedError) as error:
                left_out[f"{name}, {dtype}"] = str(error).splitlines()[0]
                continue
            off = mine[0] - logps
            row = {
                "path": name,
                "inputs": str(dtype).removeprefix("torch."),
                "sequence log-prob, nats": off.view(-1, SEQUENCE).sum(1).abs().max().item(),
                "token log-prob, rms nats": off.square().mean().sqrt().item(),
                "dhidden": relative(mine[1], dhidden),
                "dhidden, worst token": ((mine[1] - dhidden).norm(dim=1) / dhidden.norm(dim=1)).max().item(),
                "dweight": relative(mine[2], dweight),
            }
            for low, high in CONFIDENT:
                here = (p >= low) & (p < high)
                row[f"dhidden, p(label) {low} to {high}"] = relative(mine[1][here], dhidden[here])
            rows.append(row)
            print(row, flush=True)
        try:
            off = liger_sequences(hidden, weight, labels) - logps.view(-1, SEQUENCE).sum(1)
            rows.append({**dict.fromkeys(rows[0]), "path": "liger", "inputs": rows[-1]["inputs"]})
            rows[-1]["sequence log-prob, nats"] = off.abs().max().item()
        except Unavailable as error:
            left_out["liger"] = str(error)
    notes = {"head": head.name, "N": count, "V": head.weight.shape[0], "H": head.weight.shape[1], "left out": left_out}
    inputs.report(args.output, "Errors against fp64", rows, notes)


if __name__ == "__main__":
    main()
