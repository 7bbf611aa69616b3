"""Whether the engines that can run here compute what they should: log-probs and gradients of a small head against fp64.

The definition is torch's own log_softmax and autograd in fp64, on the very values that an engine is given. What the
routed backward draws has none: there the reference engine in fp64 follows the same draws.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..divergence import linear_divergence
from ..logps import linear_logps
from ..ops.engines import ENGINES, backends
from ..preference import preference_loss
from ..selective import selective_log_softmax

N, V, H = 48, 4000, 64  # a ragged last block
TAU = 0.25  # of a head so small that at the default every block would be kept
# Relative to the largest log-prob, or to the gradient's norm. Gradients are rounded to the inputs' type once.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-5, 2.0**-7)}


@dataclass
class Check:
    """One operation on one engine; `errors` and their `limits` by what was compared."""

    operation: str
    engine: str
    inputs: str
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    failed: str | None = None  # what it raised

    @property
    def passed(self) -> bool:
        # a NaN is not below its limit
        return self.failed is None and all(self.errors[name] <= limit for name, limit in self.limits.items())


@dataclass
class Problem:
    """Of a head with a trained model's kind of logits: one likely id, over a tail. fp64 values that `dtype` holds."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    dlogps: Tensor

    @staticmethod
    def of(dtype: torch.dtype) -> Problem:
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(V, H, generator=g) / H**0.5
        likely = torch.randint(0, V, (N,), generator=g)
        hidden = 10 * weight[likely] + torch.randn(N, H, generator=g)
        labels = torch.where(torch.arange(N) % 3 > 0, likely, torch.randint(0, V, (N,), generator=g))
        labels[::7] = -100
        dlogps = torch.randn(N, generator=g)
        return Problem(hidden.to(dtype).double(), weight.to(dtype).double(), labels, dlogps.double())

    def run(self, logps_of: Callable, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """(logps, dhidden, dweight) on the CPU, fp64."""
        hidden, weight = (x.to(device, dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight))
        logps = logps_of(hidden, weight, self.labels.to(device))
        logps.backward(self.dlogps.to(device, logps.dtype))
        return tuple(x.detach().cpu().double() for x in (logps, hidden.grad, weight.grad))


def definition(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = (hidden @ weight.T).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return logps.masked_fill(labels == -100, 0.0)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def _worst(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _reason(error: Exception) -> str:
    """Its type and its first line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


@contextmanager
def forced(engine: str) -> Iterator[None]:
    before = os.environ.get("FASTDPO_ENGINE")
    os.environ["FASTDPO_ENGINE"] = engine
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTDPO_ENGINE"]
        else:
            os.environ["FASTDPO_ENGINE"] = before


def _types(engine: str, device: str) -> tuple[torch.dtype, ...]:
    interpreted = engine == "triton" and device == "cpu"  # which has no bf16
    return (torch.float32,) if interpreted else (torch.float32, torch.bfloat16)


def _of_head(engine: str, dtype: torch.dtype, device: str, backward: str) -> Check:
    check = Check(f"linear_logps, {backward}", engine, f"{device}, {str(dtype).removeprefix('torch.')}")
    options = {"backward": backward} | ({"tau": TAU, "seed": 1} if backward == "routed" else {})

    def logps_of(hidden, weight, labels):
        return linear_logps(hidden, weight, labels, **options)

    try:
        problem = Problem.of(dtype)
        expected = problem.run(definition if backward == "exact" else logps_of, torch.float64, "cpu")
        with forced(engine):
            found = problem.run(logps_of, dtype, device)
    except Exception as error:  # whatever it is, the others are checked too
        check.failed = _reason(error)
        return check
    of_logps, of_gradients = LIMITS[dtype]
    check.errors = {"logps": _worst(found[0], expected[0])}
    check.errors |= {name: _apart(x, y) for name, x, y in zip(("dhidden", "dweight"), found[1:], expected[1:])}
    check.limits = {"logps": of_logps, "dhidden": of_gradients, "dweight": of_gradients}
    return check


def _of_operation(name: str, device: str, run: Callable[[torch.dtype, str], tuple[Tensor, Tensor]]) -> Check:
    """`run` gives (value, gradient) of inputs in a type on a device; fp64 on the CPU is its own definition."""
    check = Check(name, "as it is chosen", f"{device}, float32")
    try:
        found, expected = run(torch.float32, device), run(torch.float64, "cpu")
    except Exception as error:
        check.failed = _reason(error)
        return check
    check.errors = {"value": _apart(found[0], expected[0]), "gradient": _apart(found[1], expected[1])}
    check.limits = {"value": LIMITS[torch.float32][0], "gradient": LIMITS[torch.float32][1]}
    return check


def _selective(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    problem = Problem.of(torch.float32)
    logits = (problem.hidden @ problem.weight.T).float().to(device, dtype).requires_grad_()
    labels = problem.labels.clamp(min=0).to(device)
    if dtype == torch.float64:
        logps = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    else:
        logps = selective_log_softmax(logits, labels)
    logps.backward(problem.dlogps.to(device, logps.dtype))
    return logps, logits.grad


def _preference(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    logps = (10 * torch.randn(4, 64, generator=g)).to(device, dtype).requires_grad_()
    if dtype == torch.float64:
        losses = -torch.nn.functional.logsigmoid(0.1 * ((logps[0] - logps[2]) - (logps[1] - logps[3])))
    else:
        losses = preference_loss(*logps, beta=0.1).losses
    losses.sum().backward()
    return losses, logps.grad


def _divergence(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    problem = Problem.of(torch.float32)
    g = torch.Generator().manual_seed(3)
    ref_hidden = (problem.hidden.float() + 0.3 * torch.randn(N, H, generator=g)).to(device, dtype)
    weight, labels = problem.weight.to(device, dtype), problem.labels.to(device)
    hidden = problem.hidden.to(device, dtype, copy=True).requires_grad_()
    if dtype == torch.float64:
        logp, ref_logp = (hidden @ weight.T).log_softmax(-1), (ref_hidden @ weight.T).log_softmax(-1)
        values = (ref_logp.exp() * (ref_logp - logp)).sum(1).masked_fill(labels == -100, 0.0)
    else:
        values = linear_divergence(hidden, weight, ref_hidden, weight, labels, backward="exact").divergence
    values.sum().backward()
    return values, hidden.grad


OPERATIONS = {
    "selective_log_softmax": _selective,
    "preference_loss, sigmoid": _preference,
    "linear_divergence, exact": _divergence,
}


def checks() -> list[Check]:
    """Of every engine that can run here, and of the operations that start from something else than a head."""
    on_gpu, found = torch.cuda.is_available(), []
    for engine in ENGINES:
        if not backends()["engines"][engine]["available"]:
            continue
        device = "cuda" if engine == "triton" and on_gpu else "cpu"
        for dtype in _types(engine, device):
            found += [_of_head(engine, dtype, device, backward) for backward in ("exact", "routed")]
    devices = ("cpu", "cuda") if on_gpu else ("cpu",)
    found += [_of_operation(name, device, run) for name, run in OPERATIONS.items() for device in devices]
    return found
