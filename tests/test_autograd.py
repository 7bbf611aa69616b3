"""What autograd may not ask of fastdpo is refused by name: torch.func's transforms, forward mode, batched backwards."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import fastdpo
from fastdpo.losses import PreferenceOptions
from fastdpo.ops.preference import templates as preference_native

B, T, H, V = 2, 3, 8, 40

# What a user calls, of one tensor, and the name the error says.
CALLS = {
    "linear_logps": lambda x, _: fastdpo.linear_logps(x, WEIGHT, LABELS).sum(),
    "linear_token_stats": lambda x, _: fastdpo.linear_token_stats(x, WEIGHT, LABELS).entropy.sum(),
    "linear_dpo_loss": lambda x, loss_type: fastdpo.linear_dpo_loss(x, WEIGHT, LABELS, loss_type=loss_type).loss,
    "LinearDPOLoss": lambda x, loss_type: fastdpo.LinearDPOLoss(0.2, loss_type)(x, WEIGHT, LABELS).loss,
    "preference_loss": lambda x, loss_type: (
        fastdpo.preference_loss(x.sum((1, 2)), torch.zeros(2 * B), loss_type=loss_type).loss
    ),
    "selective_log_softmax": lambda x, _: fastdpo.selective_log_softmax(x, LABELS % H).sum(),
}
SAYS = {"linear_token_stats": "linear_logps", "LinearDPOLoss": "linear_dpo_loss"}
WEIGHT = torch.randn(V, H)
LABELS = torch.randint(0, V, (2 * B, T))


def dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


def batched_backward(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, torch.ones(3), is_grads_batched=True)


HOW = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "vmap over nothing of ours": lambda f, x: torch.func.vmap(lambda _: f(x))(torch.ones(2)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "functional_call inside grad": lambda f, x: torch.func.grad(
        lambda p: torch.func.functional_call(Shift(f), {"shift": p}, (x,))
    )(torch.zeros(1)),
    "dual level": dual,
    "vectorized jacobian": lambda f, x: jacobian(f, x, vectorize=True),
    "forward-mode jacobian": lambda f, x: jacobian(f, x, strategy="forward-mode", vectorize=True),
    "batched backward": batched_backward,
}


class Shift(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f, self.shift = f, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.f(x + self.shift)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
@pytest.mark.parametrize("call", CALLS)
def test_refused_by_name(call, loss_type, how):
    if loss_type == "aot" and "loss" not in call.lower():
        pytest.skip("has no loss")
    says = SAYS.get(call, call)
    if how in ("batched backward", "vectorized jacobian") and "dpo" in call.lower():
        says = "preference_loss"  # whose backward comes first
    with pytest.raises(RuntimeError, match=rf"^fastdpo\.{says} .*(torch\.func|forward_ad).*backward\(\)"):
        HOW[how](lambda x: CALLS[call](x, loss_type), torch.randn(2 * B, T, H))


@pytest.mark.parametrize("how", ["grad", "vmap", "jvp", "jacfwd", "dual level"])
@pytest.mark.parametrize("order", ["transform of a compiled function", "compiled transform", "compiled before"])
@pytest.mark.parametrize("call", CALLS)
def test_refused_when_compiled(call, order, how):
    """torch.library's operators have a tangent of zero, without a word."""
    torch._dynamo.reset()
    x = torch.randn(2 * B, T, H)

    def f(x):
        return CALLS[call](x, "sigmoid")

    compiled = torch.compile(f, backend="aot_eager")
    if order == "compiled before":
        compiled(x)
    with pytest.raises(RuntimeError, match=r"fastdpo\.\w+ .*(torch\.func|forward_ad)"):
        if order == "compiled transform":
            torch.compile(lambda x: HOW[how](f, x), backend="aot_eager")(x)
        else:
            HOW[how](compiled, x)


def test_classes_refuse_too():
    if not preference_native.AVAILABLE:
        pytest.skip("this installation has no native extension")
    options, rejected = PreferenceOptions(), torch.zeros(3)

    def losses(chosen):
        return fastdpo.PreferenceLossFunction.apply(chosen, rejected, None, None, None, None, options).sum()

    for how in ("grad", "dual level"):
        with pytest.raises(RuntimeError, match=r"^fastdpo\.preference_loss "):
            HOW[how](losses, torch.randn(3))


@pytest.mark.parametrize("call", CALLS)
def test_plain_tensors_inside_a_dual_level_are_served(call):
    x = torch.randn(2 * B, T, H, requires_grad=True)
    (expected,) = torch.autograd.grad(CALLS[call](x, "sigmoid"), x)
    with forward_ad.dual_level():
        loss = CALLS[call](x, "sigmoid")
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_functional_call_outside_a_transform_is_served():
    x, shift = torch.randn(2 * B, T, H), torch.full((1,), 0.5, requires_grad=True)
    module = Shift(lambda x: CALLS["linear_logps"](x, None))
    loss = torch.func.functional_call(module, {"shift": shift}, (x,))
    torch.testing.assert_close(loss, CALLS["linear_logps"](x + 0.5, None))
    loss.backward()
    assert shift.grad.isfinite().all() and module.shift.grad is None
