"""Random problems for the properties: drawn by hypothesis, their numbers by a generator with a drawn seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from heads import SmallHead
from hypothesis import strategies as st
from torch import Tensor

import fastdpo

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
EPS = torch.finfo(torch.float32).eps
MINUTES = float(os.environ.get("FASTDPO_PROPERTIES_MINUTES", 0))
ENGINES = ("cpu", "reference", *(["triton"] if MINUTES else []))  # in its interpreter a second for a call


@contextmanager
def computed_by(engine: str, deterministic: bool = False) -> Iterator[None]:
    given, before = os.environ.get("FASTDPO_ENGINE"), torch.are_deterministic_algorithms_enabled()
    os.environ["FASTDPO_ENGINE"] = engine
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        os.environ.pop("FASTDPO_ENGINE")
        if given is not None:
            os.environ["FASTDPO_ENGINE"] = given


@dataclass(frozen=True)
class Problem:
    """`head` holds fp64 values that `dtype` represents."""

    head: SmallHead
    dtype: torch.dtype
    transform: dict
    backward: dict
    coef: Tensor
    seed: int

    def __repr__(self) -> str:
        head, kinds = self.head, [name for name in ("bias", "lora") if getattr(self.head, name) is not None]
        (n, hidden_size), vocab_size = head.hidden.shape, len(head.weight)
        shape = f"N={n}, V={vocab_size}, H={hidden_size}, ignored={int((head.labels == -100).sum())}"
        return f"Problem({shape}, {self.dtype}, {kinds}, {self.transform}, {self.backward}, seed={self.seed})"

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(repr(self))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def but(self, **changes) -> Problem:
        """With another head: fields of SmallHead, or of this."""
        of_head = {name: changes.pop(name) for name in list(changes) if hasattr(self.head, name)}
        return replace(self, head=replace(self.head, **of_head), **changes)

    def rows(self, rows: Tensor) -> Problem:
        return self.but(hidden=self.head.hidden[rows], labels=self.head.labels[rows], coef=self.coef[rows])

    def run(self, **options) -> tuple[Tensor, dict[str, Tensor]]:
        """(logps, gradients by name)"""
        leaves = self.head.leaves(self.dtype)
        options = {**self.transform, **self.backward, **options}
        logps = fastdpo.linear_logps(
            leaves.hidden, leaves.weight, leaves.labels, leaves.bias, lora=leaves.lora, **options
        )
        return logps.detach(), gradients(logps, self.coef, leaves.tensors())

    def definition(self) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = self.head.leaves(torch.float64)
        logps = leaves.logps(**self.transform)
        return logps.detach(), gradients(logps, self.coef, leaves.tensors())

    def bounds(self) -> tuple[float, dict[str, float]]:
        """What fp32 sums and one rounding of a gradient may be off by: of log-probs, and the norm of gradients, by that
        of their sums without signs."""
        head, scale = self.head, abs(self.transform.get("logit_scale", 1)) / self.transform.get("temperature", 1)
        positive = SmallHead(*(None if x is None else x.abs() for x in (head.hidden, head.weight)), head.labels)
        if head.bias is not None:
            positive.bias = torch.where(head.bias.isfinite(), head.bias, 0.0).abs()
        if head.lora is not None:
            positive.lora = (head.lora[0].abs(), head.lora[1].abs(), abs(head.lora[2]))
        largest = positive.logits().max().item() if head.hidden.numel() else 0.0
        terms = 8 + 2 * head.hidden.shape[1] ** 0.5
        of_logits = EPS * terms * (1 + scale * largest)
        dz = self.coef.double().abs()[:, None] * (head.labels[:, None] != -100)
        p = torch.nan_to_num(head.logits(**self.transform).softmax(-1))
        own = torch.nn.functional.one_hot(head.labels.clamp(min=0), len(head.weight))
        dz = dz * (own - p).abs() * scale
        sums = {"hidden": dz @ positive.weight, "weight": dz.T @ positive.hidden, "bias": dz.sum(0)}
        if head.lora is not None:
            a, b, s = positive.lora
            sums["hidden"] = sums["hidden"] + s * dz @ b @ a
            sums["lora_a"] = s * (dz @ b).T @ positive.hidden
            sums["lora_b"] = s * dz.T @ (positive.hidden @ a.T)
        tiny = torch.finfo(self.dtype).smallest_normal * max(x.numel() for x in sums.values()) ** 0.5
        relative = 4 * of_logits + 1.5 * torch.finfo(self.dtype).eps
        return of_logits, {name: relative * x.norm().item() + tiny for name, x in sums.items()}


def gradients(result: Tensor, upstream: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(result, list(tensors.values()), upstream.to(result.dtype))
    return dict(zip(tensors, found))


def assert_close(problem: Problem, ours, expected, times: float = 1.0) -> None:
    """Both (logps, gradients) of the problem, of either precision; `times` the bounds."""
    of_logps, of_grads = problem.bounds()
    assert ours[0].isfinite().all()
    difference = (ours[0].double() - expected[0].double()).abs()
    assert (difference <= times * of_logps * 2).all(), f"logps: {difference.max()} of {of_logps}"
    for name, grad in ours[1].items():
        off = (grad.double() - expected[1][name].double()).norm().item()
        assert off <= times * of_grads[name], f"{name}: {off} of {of_grads[name]}"


def assert_equal(ours, expected) -> None:
    assert torch.equal(ours[0], expected[0]), "logps"
    for name, grad in ours[1].items():
        assert torch.equal(grad, expected[1][name]), name


def assert_times(ours: Tensor, grad: Tensor, factor: float) -> None:
    """ours == grad * factor, a power of two, to the last bit where no factor of it is below the normal numbers."""
    normal = grad.abs() > 1e-30
    assert torch.equal(ours[normal], (grad * factor)[normal])
    assert (ours[~normal].abs() <= 2e-30 * factor).all()


SEEDS = st.integers(0, 2**31 - 1)
TRANSFORMS = st.fixed_dictionaries(
    {},
    optional={
        "logit_scale": st.sampled_from([0.5, -1.3, 1.7]),
        "softcap": st.sampled_from([4.0, 30.0]),
        "temperature": st.sampled_from([0.6, 2.0]),
    },
)
EXACT = {"backward": "exact"}
EVERY_PAIR = {"backward": "routed", "tau": 0.0, "seed": 1}


@st.composite
def problems(draw, dtypes=DTYPES, transforms=TRANSFORMS, backwards=(EXACT, EVERY_PAIR), least=0, masks=True) -> Problem:
    n = draw(st.integers(least, 9) | st.sampled_from([33, 95, 97, 130]))
    vocab_size = draw(st.integers(1, 9) | st.sampled_from([127, 128, 129, 257, 700]))
    hidden_size = draw(st.integers(1, 9) | st.sampled_from([16, 33, 260]))
    bias, lora, seed = draw(st.booleans()), draw(st.booleans()), draw(SEEDS)
    sharpness = draw(st.sampled_from([0.0, 1.0, 8.0])) / hidden_size**0.5
    ignored = draw(st.sampled_from([0.0, 0.4, 1.0])) if masks else 0.0
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=chance)

    labels = torch.randint(vocab_size, (n,), generator=chance)
    labels[torch.rand(n, generator=chance) < ignored] = -100
    head = SmallHead(
        normal(n, hidden_size) * sharpness,
        normal(vocab_size, hidden_size),
        labels,
        normal(vocab_size) if bias else None,
        (normal(3, hidden_size) * 0.3, normal(vocab_size, 3) * 0.3, 0.7) if lora else None,
    )
    dtype = draw(st.sampled_from(dtypes))
    coef = torch.randn(n, generator=chance)
    return Problem(
        head.rounded(dtype).leaves(torch.float64, False),
        dtype,
        draw(transforms),
        draw(st.sampled_from(backwards)),
        coef,
        seed,
    )
