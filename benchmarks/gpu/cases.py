"""What the GPU suite measures at one shape: contenders in groups, each beside the floor of its operations and bytes.

Nothing of ours runs while a group is put together: what fails does so as a contender, and takes no other along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.timing import elapsed, kernel_times
from benchmarks.inputs import HeadInputs, lifted, load, synthetic_head
from benchmarks.peers import BETA, PEERS, SELECTIVE_LOGPS, TOKEN_LOGPS, Problem
from fastdpo.costs.gpus import Gpu
from fastdpo.costs.steps import STEP, Shape, StepCost, step_cost
from fastdpo.ops.triton import special

STEP_PEERS = [name for name in PEERS if name not in ("trl as its trainer", "fastdpo exact", "fastdpo routed")]
GROUPS = ("forward", "backward", "step", "frozen step", "loss", "logits")
GRADIENT_LIMITS = {"exact": 0.01, "routed": 0.1}  # roundings to bf16; and the noise of the pairs that are drawn


@dataclass
class Case:
    """A group of contenders. `unit` is the contender that the others are set against."""

    unit: str
    contenders: dict[str, Callable[[], object]]
    floors: dict[str, Callable[[], StepCost]] = field(default_factory=dict)

    def is_ours(self, name: str) -> bool:
        return name in self.floors or name.startswith("fastdpo")


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

    @functools.cached_property
    def live(self) -> tuple[Tensor, Tensor]:
        """Tokens that keep each block: for the gradient of the hidden states, and for that of the head."""
        return tuple(self._live(tau) for tau in _taus())

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
            of_hidden, of_weight = self.live
            live = (of_hidden if frozen else of_weight, of_hidden)
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
            "fastdpo": partial(self._cost, "exact", ("reference",)),
            "fastdpo, for a routed backward": partial(self._cost, "routed", ("forward",), True),
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
                logps = functools.cache(partial(fastdpo.linear_logps, hidden, weight, self.labels, backward=backward))
                contenders[name] = lambda logps=logps, wanted=wanted: torch.autograd.grad(
                    logps(), wanted, self.coef, retain_graph=True
                )
                floors[name] = partial(self._cost, backward, ("backward",), frozen)
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
        floors = {
            f"fastdpo {backward}": partial(self._cost, backward, STEP, frozen) for backward in ("routed", "exact")
        }
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
        saved = functools.cache(lambda: fastdpo.selective_log_softmax(logits, labels))
        contenders["fastdpo, backward"] = lambda: torch.autograd.grad(saved(), logits, coef, retain_graph=True)
        for name, run in functions.items():
            contenders[f"{name}, both"] = lambda run=run: torch.autograd.grad(run(logits, labels), logits, coef)
        pair = functools.cache(lambda: fastdpo.selective_log_softmax(logits, labels, return_entropy=True))
        contenders["fastdpo with entropy, forward"] = lambda: fastdpo.selective_log_softmax(
            plain, labels, return_entropy=True
        )
        contenders["fastdpo with entropy, backward"] = lambda: torch.autograd.grad(
            pair(), logits, (coef, coef), retain_graph=True
        )
        few, few_labels = plain[:8], labels[:8]  # too few to fill a GPU with a block of threads each
        contenders["copy of 8 rows"] = lambda: target[:8].copy_(few)
        contenders["fastdpo, forward of 8 rows"] = lambda: fastdpo.selective_log_softmax(few, few_labels)
        return Case("copy", contenders)

    # Errors

    def errors(self, backward: str, tokens: int = 512) -> dict[str, tuple[float, float]]:
        """What: (error, limit), of log-probabilities and gradients against fp64 with the same inputs."""
        import fastdpo

        inputs = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
        logps = fastdpo.linear_logps(*inputs, self.labels, backward=backward, seed=1 if backward == "routed" else None)
        hidden, weight = torch.autograd.grad(logps, inputs, self.coef)
        wide, largest, off, length = self.weight.double(), 0.0, 0.0, 0.0
        sums = torch.zeros_like(wide)
        for begin in range(0, self.shape.num_tokens, tokens):
            part = slice(begin, begin + tokens)
            x, labels, coef = self.hidden[part].double(), self.labels[part, None], self.coef[part, None].double()
            z = (x @ wide.T).log_softmax(-1)
            error = (logps[part].double() - z.gather(1, labels)[:, 0]).abs().amax().item()
            largest = error if not error <= largest else largest  # NaN stays
            dz = z.exp_().mul_(-coef).scatter_add_(1, labels, coef)
            exact = dz @ wide
            off += (hidden[part].double() - exact).square().sum().item()
            length += exact.square().sum().item()
            sums.addmm_(dz.T, x)
        limit = GRADIENT_LIMITS[backward]
        of_weight = (sums.sub_(weight.double()).norm(), sums.add_(weight.double()).norm())
        return {
            f"{backward}, log-probabilities, nats": (largest, 1e-2),
            f"{backward}, dhidden, relative": ((off / length) ** 0.5, limit),
            f"{backward}, dweight, relative": ((of_weight[0] / of_weight[1]).item(), limit),
        }

    # One step's kernels

    def kernels(self, backward: str, gpu: Gpu | None) -> list[dict]:
        """Every kernel of a step: measured beside its floor, where the GPU's rates are known."""
        cost = self._cost(backward, STEP)
        problem = self._problem(False)
        run = PEERS[f"fastdpo {backward}"]
        measured = kernel_times(partial(_step, run, problem)) if self.device == "cuda" else {}
        traced = bool(measured)
        for kernel in special.KERNELS.values():  # in the place of the fold that is counted
            if f"{kernel}_fold_kernel" in measured:
                measured["fold_kernel"] = measured.pop(f"{kernel}_fold_kernel")
        rows = []
        for name, one in cost.kernels.items():
            took = measured.pop(f"{name}_kernel", None)
            rows.append({
                "kernel": name, "passes": one.flops / self.shape.one_pass, "GB": one.bytes / 1e9,
                **({"floor ms": one.floor(gpu) * 1e3} if gpu else {}), "ms": took and took[0],
                "launches": took[1] if took else one.launches,
            })  # fmt: skip
        if self.device == "cuda" and not traced:
            whole = elapsed(partial(_step, run, problem), self.device)
            rows.append({"kernel": "the whole step: the profiler's trace is empty", "ms": whole, "launches": 0})
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
