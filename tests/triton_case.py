"""One problem for the Triton engine and for the reference, and what both make of it. Needs Triton to import."""

from __future__ import annotations

import os

import torch
from heads import relative_error

from fastdpo.head import LogitTransform, LoRA, Routing
from fastdpo.ops import reference
from fastdpo.ops.problem import FOLDED, Head, Needs, Rows, Tokens, Upstream
from fastdpo.ops.triton.backward import backward
from fastdpo.ops.triton.forward import forward

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SEED = 2**63 + 12345
ROUTED = {"exact": None, "routed": (0.2, 0.05), "one tau": (0.1, 0.1), "smaller tau for dhidden": (0.02, 0.1)}


class Case:
    """One problem for both engines: the Triton engine by row, the reference in fp64 by token."""

    def __init__(self, head, dtype=torch.float32, routed=None, weight_dtype=None, **transform):
        transform = LogitTransform(**transform)
        self.labels, self.vocab_size = head.labels, head.weight.shape[0]
        leaves = head.leaves(dtype, False)
        if weight_dtype is not None:
            leaves.weight = head.weight.to(weight_dtype)
        self.dtype, self.routed = dtype, routed

        def build(x, compute):
            lora = x.lora and LoRA(x.lora[0].to(DEVICE), x.lora[1].to(DEVICE), x.lora[2])
            tensors = [None if t is None else t.to(DEVICE) for t in (x.hidden, x.weight, x.bias)]
            return Head(*tensors, lora, transform, compute)

        self.head = build(leaves, dtype)
        exact = head.rounded(dtype)
        self.keep = ((head.labels >= 0) & (head.labels < self.vocab_size)).nonzero()[:, 0].to(DEVICE)
        self.oracle = build(exact, torch.float64).replace(hidden=exact.hidden.to(DEVICE)[self.keep])
        self.tokens = Tokens(
            self.labels.to(DEVICE)[self.keep], self.keep, torch.arange(len(self.keep), device=DEVICE), len(self.labels)
        )
        self.rows = Rows(self.labels.to(DEVICE), -100, 0, self.vocab_size)

    def routing(self, as_tensor: bool, needs: Needs):
        if self.routed is None:
            return None
        taus = (self.routed[0] if needs.of_hidden else -1.0, self.routed[1] if needs.of_weight else -1.0)
        return Routing.of(*taus, torch.tensor(SEED - 2**64, device=DEVICE) if as_tensor else SEED)

    def run(self, coef, coef_entropy=None, needs=None, stats=FOLDED) -> tuple:
        needs = needs or Needs(*(x is not None for x in self.head.inputs))
        coef = coef.to(DEVICE)
        coef_entropy = None if coef_entropy is None else coef_entropy.to(DEVICE)
        mine = self.routing(True, needs) if coef_entropy is None else None
        saved = forward(self.head, self.rows, stats=frozenset(stats), routing=mine, shards=None)
        ours = backward(self.head, self.rows, saved, Upstream(coef, coef_entropy), mine, needs)
        plain = self.routing(False, needs) if coef_entropy is None else None
        expected = reference.forward(self.oracle, self.tokens, stats=frozenset(stats), routing=plain)
        upstream = Upstream(*(None if c is None else c[self.keep].double() for c in (coef, coef_entropy)))
        grads = reference.backward(self.oracle, self.tokens, expected, upstream, plain, needs)
        return saved, expected, ours, grads

    def check(self, coef, coef_entropy=None, needs=None, tolerance=5e-6, roundings=2) -> None:
        """Gradients in a narrower type: within so many of its own rounding errors."""
        saved, expected, ours, grads = self.run(coef, coef_entropy, needs)
        atol = 1e-6 * max(5.0, expected.lse.abs().max().item())  # what fp32 logits of that size can hold
        for name in ("logps", "lse", "entropy", "mean_logit", "log_sum_sq_probs"):
            mine = getattr(saved, name)[self.keep].double()
            torch.testing.assert_close(mine, getattr(expected, name), rtol=1e-5, atol=atol)
        assert torch.equal(saved.is_top1[self.keep], expected.is_top1)
        if saved.bitmap is not None:
            assert torch.equal(saved.bitmap[self.keep, : expected.bitmap.shape[1]], expected.bitmap)
        for name, gradient in vars(grads).items():
            mine = getattr(ours, name)
            assert (mine is None) == (gradient is None), name
            if gradient is None:
                continue
            rounding = roundings * relative_error(gradient.to(mine.dtype), gradient)
            assert relative_error(mine, gradient) < (tolerance if mine.dtype == torch.float32 else rounding), name
