"""One problem of two heads for the Triton engine and for the reference, and what both make of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from heads import relative_error
from triton_case import DEVICE, SEED

from fastdpo.head import LogitTransform, LoRA, Routing
from fastdpo.ops.divergence import by_token, reference
from fastdpo.ops.divergence.problem import KINDS, DivergenceEngine, DivergenceUpstream, Heads
from fastdpo.ops.problem import Head, Needs, Rows
from fastdpo.ops.triton.divergence.backward import backward
from fastdpo.ops.triton.divergence.forward import forward

__all__ = ["KINDS", "ORACLE", "STATS", "Case", "strided"]
STATS = frozenset(("entropy", "logps", "ref_logps"))
ORACLE = by_token.by_row(DivergenceEngine("reference", reference.forward, reference.backward))


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, rows of an odd distance apart."""
    return torch.cat((x, x.new_full((x.shape[0], 3), torch.nan)), 1)[:, :-3]


class Case:
    """A student of a hidden size of its own beside a teacher that it resembles by `likeness`."""

    def __init__(
        self,
        kind="forward_kl",
        *,
        N=40,
        V=700,
        H=24,
        ref_H=40,
        beta=0.3,
        dtype=torch.float32,
        ref_dtype=None,
        likeness=0.5,
        size=3.0,
        labelled=True,
        bias=False,
        rank=0,
        routed=None,
        stats=STATS,
        transform=None,
        ref_transform=None,
        layout=lambda x: x,
    ):
        self.kind, self.routed, self.dtype = kind, routed, dtype
        self.stats = stats if labelled else stats & {"entropy"}
        ref_dtype = ref_dtype or dtype
        teacher = torch.randn(N, ref_H), torch.randn(V, ref_H) * (size / ref_H**0.5)
        k = min(H, ref_H)
        student = torch.randn(N, H), torch.randn(V, H) * (size / H**0.5)
        for mine, other in zip(student, teacher):
            mine[:, :k] += likeness * (other[:, :k] - mine[:, :k])
        self.labels = torch.randint(0, V, (N,))
        sure = slice(0, N, 4)  # rows whose label stands out for both
        for hidden, weight in (student, teacher):
            hidden[sure] = weight[self.labels[sure]] * (12 / weight[self.labels[sure]].norm(dim=1, keepdim=True))
        self.labels[1::5] = -100
        for hidden, _ in (student, teacher):
            hidden[1::5] = torch.nan  # masked rows are never read
        if not labelled:
            self.labels = torch.where(self.labels == -100, -100, 0)

        def head(hidden, weight, dtype, rank, transform):
            hidden, weight = layout(hidden.to(DEVICE, dtype)), layout(weight.to(DEVICE, dtype))
            added = torch.randn(V).to(DEVICE, dtype) if bias else None
            lora = None
            if rank:
                A, B = (torch.randn(*size) * 0.2 for size in ((rank, hidden.shape[1]), (V, rank)))
                lora = LoRA(A.to(DEVICE, dtype), B.to(DEVICE, dtype), 0.7)
            return Head(hidden, weight, added, lora, transform or LogitTransform(), dtype)

        student = head(*student, dtype, rank, transform)
        teacher = head(*teacher, ref_dtype, 0, ref_transform or transform)
        self.heads = Heads(student, teacher, kind, beta, labelled, "logps" in self.stats)
        self.rows = Rows(self.labels.to(DEVICE), -100, 0, V)

    @property
    def exact_heads(self) -> Heads:
        def doubled(head: Head) -> Head:
            tensors = [None if x is None else x.double() for x in head.inputs]
            lora = None if head.lora is None else LoRA(*tensors[3:], head.lora.scale)
            return Head(*tensors[:3], lora, head.transform, torch.float64)

        return self.heads.replace(student=doubled(self.heads.student), teacher=doubled(self.heads.teacher))

    def routing(self, needs: Needs):
        if self.routed is None:
            return None
        taus = (self.routed[0] if needs.of_hidden else -1.0, self.routed[1] if needs.of_weight else -1.0)
        return Routing.of(*taus, torch.tensor(SEED - 2**64, device=DEVICE))

    def forward(self, routing="own"):
        """(ours, the reference's)."""
        options = {"stats": self.stats, "routing": self.routing(self.needs) if routing == "own" else routing}
        ours = forward(self.heads, self.rows, **options)
        return ours, ORACLE.forward(self.exact_heads, self.rows, **options)

    def check_forward(self) -> None:
        ours, expected = self.forward()
        for name in ("lse", "ref_lse", "logps", "ref_logps", "entropy", "divergence", "mean", "total"):
            mine, value = getattr(ours, name), getattr(expected, name)
            assert (mine is None) == (value is None), name
            if mine is not None:
                atol = 1e-6 * max(5.0, expected.ref_lse.abs().max().item(), expected.lse.abs().max().item())
                torch.testing.assert_close(
                    mine.double(), value, rtol=1e-5, atol=atol, msg=lambda x, n=name: f"{n}: {x}"
                )
        if self.routed:
            different = (ours.bitmap.int() != expected.bitmap.int()).sum().item()
            assert different <= 1 + 0.01 * expected.bitmap.numel(), different  # rounding moves borders a little
            assert (ours.most_pairs - expected.most_pairs).abs().max() <= 1

    def upstream(self, *, entropy=False, without=()) -> DivergenceUpstream:
        """Random, 0 in the rows `without`."""

        def coef(wanted: bool):
            x = torch.randn(len(self.labels)) * wanted
            x[list(without)] = 0
            return x.to(DEVICE)

        return DivergenceUpstream(coef(True), coef(self.heads.labelled), coef(True) if entropy else None)

    def gradients(self, upstream, needs=None, sums=None):
        """(ours, the reference's) with the pairs that we kept."""
        needs = needs or self.needs
        routing = None if upstream.coef_entropy is not None else self.routing(needs)
        saved, expected = self.forward(routing)
        if routing is not None:
            expected = replace(expected, bitmap=saved.bitmap)
        ours = backward(self.heads, self.rows, saved, upstream, routing, needs, sums)
        doubled = (None if x is None else x.double() for x in vars(upstream).values())
        oracle = ORACLE.backward(self.exact_heads, self.rows, expected, DivergenceUpstream(*doubled), routing, needs)
        return ours, oracle

    @property
    def needs(self) -> Needs:
        return Needs(*(x is not None for x in self.heads.student.inputs))

    def check(self, upstream=None, needs=None, tolerance=5e-6, roundings=2) -> None:
        ours, expected = self.gradients(upstream or self.upstream(), needs)
        for name, gradient in vars(expected).items():
            mine = getattr(ours, name)
            assert (mine is None) == (gradient is None), name
            if gradient is not None:
                rounding = roundings * relative_error(gradient.to(mine.dtype), gradient)
                error = relative_error(mine, gradient)
                assert error < (tolerance if mine.dtype == torch.float32 else rounding), f"{name}: {error}"
