"""What the GPU suite measures at one shape: contenders in groups, each beside the floor of its operations and bytes.

Runs as a process of its own (`worker`), so that a crash on the GPU ends one shape and not the suite.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.timing import interleaved, kernel_times, launches_of
from benchmarks.inputs import HeadInputs, lifted, load, synthetic_head
from benchmarks.peers import BETA, PEERS, SELECTIVE_LOGPS, TOKEN_LOGPS, Problem
from fastdpo.ops.triton import special
from tools.cost_model import STEP, Shape, StepCost, step_cost
from tools.gpus import Gpu

STEP_PEERS = [name for name in PEERS if name not in ("trl as its trainer", "fastdpo exact", "fastdpo routed")]
LAUNCHES = ("step", "frozen step", "loss")  # groups of which every contender's launches are counted
GROUPS = ("forward", "backward", "step", "frozen step", "loss", "logits")


@dataclass
class Case:
    """A group of contenders. `unit` is the contender that the others are set against."""

    unit: str
    contenders: dict[str, Callable[[], object]]
    floors: dict[str, StepCost] = field(default_factory=dict)


class ShapeCases:
    def __init__(self, shape: Shape, device: str, target, head: str | None = None):
        self.shape, self.device, self.target = shape, device, target
        n, v, h, dtype = shape.num_tokens, shape.vocab_size, shape.hidden_size, shape.dtype
        inputs = self._head(head)
        self.inputs_name = inputs.name
        self.hidden = inputs.hidden.to(device, dtype)
        self.weight = inputs.weight.to(device, dtype)
        self.labels = inputs.labels.to(device)
        assert self.hidden.shape == (n, h) and self.weight.shape == (v, h), "the head has another shape"
        g = torch.Generator(device).manual_seed(1)
        noise = torch.randn(self.hidden.shape, generator=g, device=device, dtype=dtype)
        self.ref_hidden = self.hidden + 0.02 * self.hidden.std() * noise
        self.coef = torch.randn(n, generator=g, device=device) / n
        self.live_hidden, self.live = (self._live(tau) for tau in _taus())

    def _head(self, path: str | None) -> HeadInputs:
        n, v, h = self.shape.num_tokens, self.shape.vocab_size, self.shape.hidden_size
        if path is None:
            return synthetic_head(n, v, h, device=self.device)
        inputs = lifted(load(path), h)
        times = -(-n // len(inputs.labels))
        return HeadInputs(
            inputs.name, inputs.hidden.repeat(times, 1)[:n], inputs.weight, inputs.labels.repeat(times)[:n]
        )

    def _live(self, tau: float) -> Tensor:
        """[num_blocks] tokens that keep each block, as the engine decides."""
        from fastdpo.head import Routing
        from fastdpo.ops.problem import Head, Rows
        from fastdpo.ops.triton import forward as triton_engine
        from fastdpo.routing import num_blocks, unpack_bits

        head = Head(self.hidden, self.weight, compute_dtype=self.shape.dtype)
        rows = Rows(self.labels, -100, 0, self.shape.vocab_size)
        seed = torch.zeros((), dtype=torch.int64, device=self.device)
        saved = triton_engine.forward(head, rows, stats=frozenset(), routing=Routing.of(tau, tau, seed), shards=None)
        return unpack_bits(saved.bitmap, num_blocks(self.shape.vocab_size)).sum(0).cpu()

    def case(self, group: str) -> Case:
        return getattr(self, "_" + group.replace(" ", "_"))()

    def _cost(self, backward: str, parts: tuple[str, ...], frozen: bool = False) -> StepCost:
        live = (None, None)
        if backward == "routed":
            live = (self.live_hidden if frozen else self.live, self.live_hidden)
        return step_cost(self.shape, *live, frozen=frozen, backward=backward, tau=None, target=self.target, parts=parts)

    # Groups

    def _products(self, count: int) -> Callable[[], object]:
        out = torch.empty(self.shape.num_tokens, self.shape.vocab_size, device=self.device, dtype=self.shape.dtype)

        def run():
            for _ in range(count):
                torch.mm(self.hidden, self.weight.T, out=out)

        return run

    def _forward(self) -> Case:
        import fastdpo

        def forward(logps):
            @torch.no_grad()
            def run():
                return logps(self.hidden, self.weight, self.labels)

            return run

        trained = self.hidden.detach().requires_grad_()
        contenders = {"torch.mm": self._products(1), "fastdpo": forward(TOKEN_LOGPS["fastdpo"])}
        contenders["fastdpo, for a routed backward"] = lambda: fastdpo.linear_logps(
            trained, self.weight, self.labels
        ).detach()
        contenders |= {name: forward(run) for name, run in TOKEN_LOGPS.items() if name != "fastdpo"}
        floors = {
            "fastdpo": self._cost("exact", ("reference",)),
            "fastdpo, for a routed backward": self._cost("routed", ("forward",), True),
        }
        return Case("torch.mm", contenders, floors)

    def _backward(self) -> Case:
        import fastdpo

        contenders, floors = {"two torch.mm": self._products(2)}, {}
        for frozen in (False, True):
            hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(not frozen)
            wanted = (hidden,) if frozen else (hidden, weight)
            for backward in ("exact", "routed"):
                name = backward + (", frozen head" if frozen else "")
                logps = fastdpo.linear_logps(hidden, weight, self.labels, backward=backward)
                contenders[name] = lambda logps=logps, wanted=wanted: torch.autograd.grad(
                    logps, wanted, self.coef, retain_graph=True
                )
                floors[name] = self._cost(backward, ("backward",), frozen)
        return Case("two torch.mm", contenders, floors)

    def _problem(self, frozen: bool) -> Problem:
        n = self.shape.num_tokens
        length = 512 if n % 1024 == 0 else n // 2

        def sequences(x: Tensor) -> Tensor:
            return x.view(-1, length, *x.shape[1:])

        hidden, weight = sequences(self.hidden).detach().requires_grad_(), self.weight.detach()
        trained = weight.clone().requires_grad_(not frozen)
        return Problem(hidden, trained, sequences(self.labels), sequences(self.ref_hidden), weight)

    def _step(self, frozen: bool = False) -> Case:
        problem = self._problem(frozen)
        names = ["fastdpo routed", "fastdpo exact", *STEP_PEERS]
        contenders = {"two torch.mm": self._products(2)}
        contenders |= {name: partial(_step, PEERS[name], problem) for name in names}
        floors = {f"fastdpo {backward}": self._cost(backward, STEP, frozen) for backward in ("routed", "exact")}
        return Case("two torch.mm", contenders, floors)

    def _frozen_step(self) -> Case:
        return self._step(frozen=True)

    def _loss(self) -> Case:
        """64 sequences' log-probabilities, per sequence or per token, to the loss and back."""
        import fastdpo

        pairs, tokens = 32, 512
        logps = [torch.randn(pairs, device=self.device) - 100 for _ in range(4)]
        trained = [x.requires_grad_() for x in logps[:2]]
        per_token, ref = (-torch.rand(2 * pairs, tokens, device=self.device) for _ in range(2))
        per_token.requires_grad_()
        labels = torch.zeros(2 * pairs, tokens, dtype=torch.int64, device=self.device)

        def ours():
            return torch.autograd.grad(fastdpo.preference_loss(*logps, beta=BETA).loss, trained)

        def from_tokens():
            return torch.autograd.grad(token_loss(per_token, labels, ref, BETA), per_token)

        def plain():
            margin = logps[0] - logps[1] - (logps[2] - logps[3])
            return torch.autograd.grad(-torch.nn.functional.logsigmoid(BETA * margin).mean(), trained)

        return Case("plain torch", {"plain torch": plain, "fastdpo": ours, "fastdpo, from tokens": from_tokens})

    def _logits(self) -> Case:
        """Given logits to log-probabilities and back, beside copies: of half of them, which moves as many bytes as a
        forward reads, and of all, as many as a backward reads and writes."""
        import fastdpo

        n, v = min(self.shape.num_tokens, 4096), self.shape.vocab_size
        logits = torch.randn(n, v, device=self.device, dtype=self.shape.dtype).requires_grad_()
        labels, coef, plain = self.labels[:n], self.coef[:n], logits.detach()
        target = torch.empty_like(plain)
        functions = {"fastdpo": fastdpo.selective_log_softmax, **SELECTIVE_LOGPS}
        contenders = {
            "copy": lambda: target.copy_(plain),
            "copy of half": lambda: target[: n // 2].copy_(plain[: n // 2]),
        }
        for name, run in functions.items():
            contenders[f"{name}, forward"] = lambda run=run: run(plain, labels)
        saved = fastdpo.selective_log_softmax(logits, labels)
        contenders["fastdpo, backward"] = lambda: torch.autograd.grad(saved, logits, coef, retain_graph=True)
        for name, run in functions.items():
            contenders[f"{name}, both"] = lambda run=run: torch.autograd.grad(run(logits, labels), logits, coef)
        pair = fastdpo.selective_log_softmax(logits, labels, return_entropy=True)
        contenders["fastdpo with entropy, forward"] = lambda: fastdpo.selective_log_softmax(
            plain, labels, return_entropy=True
        )
        contenders["fastdpo with entropy, backward"] = lambda: torch.autograd.grad(
            pair, logits, (coef, coef), retain_graph=True
        )
        few, few_labels = plain[:8], labels[:8]  # too few to fill a GPU with a block of threads each
        contenders["copy of 8 rows"] = lambda: target[:8].copy_(few)
        contenders["fastdpo, forward of 8 rows"] = lambda: fastdpo.selective_log_softmax(few, few_labels)
        return Case("copy", contenders)

    # One step's kernels

    def kernels(self, backward: str, gpu: Gpu) -> list[dict]:
        """Every kernel of a step: measured beside its floor."""
        cost = self._cost(backward, STEP)
        problem = self._problem(False)
        run = PEERS[f"fastdpo {backward}"]
        measured = kernel_times(partial(_step, run, problem)) if self.device == "cuda" else {}
        for kernel in special.KERNELS.values():  # in the place of the fold that is counted
            if f"{kernel}_fold_kernel" in measured:
                measured["fold_kernel"] = measured.pop(f"{kernel}_fold_kernel")
        rows = []
        for name, one in cost.kernels.items():
            took = measured.pop(f"{name}_kernel", None)
            rows.append({
                "kernel": name, "passes": one.flops / self.shape.one_pass, "GB": one.bytes / 1e9,
                "floor ms": one.floor(gpu) * 1e3, "ms": took and took[0], "launches": took[1] if took else one.launches,
            })  # fmt: skip
        others = [sum(x) for x in zip(*measured.values())] or [None, cost.other_launches.total()]
        rows.append({"kernel": "torch's own", "ms": others[0], "launches": others[1]})
        return rows


def token_loss(logps: Tensor, labels: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """What `linear_dpo_loss` does once it has the log-probabilities, [2B, T]."""
    from fastdpo.losses import PreferenceOptions
    from fastdpo.ops.preference.reference import BatchInputs
    from fastdpo.ops.preference.templates import batch_losses

    return batch_losses(PreferenceOptions(beta), BatchInputs(logps, ref=ref_logps, labels=labels))[0]


def _step(run: Callable, problem: Problem) -> tuple:
    """Leaves no gradient behind: memory is counted from a clean state."""
    result = run(problem)
    problem.hidden.grad = problem.weight.grad = None
    return result


def _taus() -> tuple[float, float]:
    from fastdpo.head import taus

    tau = taus(None)
    return tau[0], min(tau)


def worker(argv: list[str]) -> int:
    """Measures one shape and prints one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", type=int, nargs=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--groups", nargs="*", default=GROUPS)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rates", type=float, nargs=2, default=(785e12, 4.3e12))
    parser.add_argument("--kernels", action="store_true", help="profile a step of each kind")
    parser.add_argument("--head")
    args = parser.parse_args(argv)
    from fastdpo.ops.triton.launch import Target

    target, gpu = Target(90, 132), Gpu(*args.rates)
    if args.device == "cuda":
        from fastdpo.ops.triton.launch import target_of

        target = target_of(torch.device("cuda"))
    torch.manual_seed(0)
    shape = Shape(*args.shape, getattr(torch, args.dtype))
    cases = ShapeCases(shape, args.device, target, args.head)
    record = {
        "N": shape.num_tokens, "V": shape.vocab_size, "H": shape.hidden_size, "dtype": args.dtype,
        "head": cases.inputs_name,
        "live blocks per token": [
            round(x.sum().item() / shape.num_tokens, 2) for x in (cases.live_hidden, cases.live)
        ],
        "groups": {}, "left out": {},
    }  # fmt: skip
    for group in args.groups:
        case = cases.case(group)
        timings, left_out = interleaved(
            case.contenders, args.device, rounds=args.rounds, seconds=args.seconds / len(args.groups)
        )
        rows = []
        for name, timing in timings.items():
            cost = case.floors.get(name)
            rows.append({
                "name": name, **timing.row(), "over unit": timing.median / timings[case.unit].median,
                "floor ms": cost and cost.floor(gpu) * 1e3, "launches counted": cost and cost.total().launches,
                "launches": launches_of(case.contenders[name], args.device) if group in LAUNCHES else None,
                "passes": cost and cost.total().flops / shape.one_pass,
            })  # fmt: skip
        if group == "loss" and args.device == "cuda":
            found = kernel_times(case.contenders["fastdpo, from tokens"])
            record["loss kernels"] = {name: took for name, took in found.items() if "preference" in name}
        record["groups"][group] = {"unit": case.unit, "rows": rows}
        record["left out"].update(left_out)
        del case
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if args.kernels:
        record["kernels"] = {backward: cases.kernels(backward, gpu) for backward in ("routed", "exact")}
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1:]))
