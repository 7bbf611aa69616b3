"""The head's gradient added in place to `grad` or `main_grad`: what autograd would have made of it, without a copy."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head

import fastdpo

HOW = {"exact": {"backward": "exact"}, "routed": {"seed": 5, "tau": 0.05}, "every pair": {"seed": 5, "tau": 0.0}}


def _head(dtype=torch.float32, **sizes):
    head = small_head(N=300, bias=True, lora=True, masked=True, **sizes).leaves(dtype)
    return head, torch.randn(300)


def _backward(head, upstream, **options):
    logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, head.bias, lora=head.lora, **options)
    (logps * upstream).sum().backward()


def _gradients(head):
    found = {name: x.grad for name, x in head.tensors().items()}
    for x in head.tensors().values():
        x.grad = None
    return found


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("into, dtype", [("grad", torch.float32), ("main_grad", torch.float32),
                                         ("main_grad", torch.float64)])  # fmt: skip
def test_what_is_there_and_the_gradient_of_each_backward_add_up(engine, how, into, dtype):
    head, upstream = _head()
    _backward(head, upstream, **HOW[how])
    alone = _gradients(head)
    before = torch.randn(head.weight.shape)
    setattr(head.weight, into, before.to(dtype, copy=True))
    place = getattr(head.weight, into).data_ptr()
    for _ in range(2):
        _backward(head, upstream, accumulate_into=into, **HOW[how])
    found = getattr(head.weight, into)
    assert found.data_ptr() == place and found.dtype == dtype
    assert relative_error(found, before + 2 * alone["weight"]) < 1e-6
    assert into == "grad" or head.weight.grad is None
    for name in ("hidden", "bias", "lora_a", "lora_b"):
        assert torch.equal(head.tensors()[name].grad, 2 * alone[name]), name


def test_bf16_gradients_are_not_rounded_on_their_way_to_fp32_sums(engine):
    if engine == "triton":
        pytest.skip("the interpreter's bf16 products are wrong")
    head, upstream = _head(torch.bfloat16)
    _backward(head, upstream, backward="exact")
    rounded = _gradients(head)["weight"]
    head.weight.main_grad = torch.zeros(head.weight.shape)
    _backward(head, upstream, backward="exact", accumulate_into="main_grad")
    assert torch.equal(head.weight.main_grad.bfloat16(), rounded)
    assert not torch.equal(head.weight.main_grad, rounded.float())


def test_the_first_gradient_is_returned_hooks_run_and_other_uses_count():
    head, upstream = _head()
    _backward(head, upstream, backward="exact")
    alone = _gradients(head)["weight"]
    calls = []
    head.weight.register_post_accumulate_grad_hook(lambda x: calls.append(x.grad.clone()))
    for _ in range(2):
        logps = fastdpo.linear_logps(
            head.hidden, head.weight, head.labels, head.bias, lora=head.lora, backward="exact", accumulate_into="grad"
        )
        ((logps * upstream).sum() + head.weight.sum()).backward()  # a tied embedding's gradient
    assert len(calls) == 2
    assert relative_error(calls[0], alone + 1) < 1e-6 and relative_error(calls[1], 2 * (alone + 1)) < 1e-6


@pytest.mark.parametrize("into", ["grad", "main_grad"])
def test_autograd_grad_returns_the_gradient_and_leaves_what_is_kept(into):
    head, upstream = _head()
    _backward(head, upstream, backward="exact")
    alone = _gradients(head)["weight"]
    setattr(head.weight, into, torch.ones(head.weight.shape))
    logps = fastdpo.linear_logps(
        head.hidden, head.weight, head.labels, head.bias, lora=head.lora, backward="exact", accumulate_into=into
    )
    (found,) = torch.autograd.grad((logps * upstream).sum(), head.weight, retain_graph=True)
    assert torch.equal(found, alone) and (getattr(head.weight, into) == 1).all()
    torch.autograd.backward((logps * upstream).sum(), inputs=[head.hidden], retain_graph=True)
    assert (getattr(head.weight, into) == 1).all()
    torch.autograd.backward((logps * upstream).sum(), inputs=[head.weight])
    assert relative_error(getattr(head.weight, into), alone + 1) < 1e-6


def test_what_cannot_be_added_to_is_refused():
    head, _ = _head()

    def score(weight, into):
        return fastdpo.linear_logps(head.hidden, weight, head.labels, accumulate_into=into)

    for into in ("main", True, 1):
        with pytest.raises(ValueError, match="accumulate_into must be"):
            score(head.weight, into)
    with pytest.raises(ValueError, match=r"a leaf.*Mul"):
        score(head.weight * 1, "grad")
    with pytest.raises(ValueError, match=r"weight\.main_grad; this weight has none"):
        score(head.weight, "main_grad")
    for place in (torch.zeros(3), torch.zeros(48, 1000).T, torch.zeros(1000, 48).to_sparse()):
        head.weight.main_grad = place
        with pytest.raises(ValueError, match=r"needs weight\.main_grad contiguous and like weight"):
            score(head.weight, "main_grad")
    assert score(head.weight.detach() * 1, "main_grad").requires_grad  # without a gradient there is none to add
    transposed = head.weight.detach().T.contiguous().T.requires_grad_()
    with pytest.raises(ValueError, match=r"accumulate_into='grad' needs a contiguous weight"):
        score(transposed, "grad")  # before its first gradient, which the second could not be added to
    transposed.grad = torch.zeros(1000, 48)
    score(transposed, "grad").sum().backward()
    assert transposed.grad.any()
    head.weight.main_grad = torch.zeros(1000, 48)
    logps = score(head.weight, "main_grad")
    head.weight.main_grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"needs weight\.main_grad contiguous"):
        logps.sum().backward()


def test_a_compiled_call_and_a_loss_add_as_well():
    head, upstream = _head()
    _backward(head, upstream, backward="exact")
    alone = _gradients(head)["weight"]
    head.weight.main_grad = torch.zeros(head.weight.shape)

    @torch.compile(backend="eager")
    def loss(hidden, weight):
        logps = fastdpo.linear_logps(
            hidden, weight, head.labels, head.bias, lora=head.lora, backward="exact", accumulate_into="main_grad"
        )
        return (logps * upstream).sum()

    loss(head.hidden, head.weight).backward()
    assert torch.equal(head.weight.main_grad, alone) and head.weight.grad is None
    labels = head.labels[:298].view(2, 149)
    hidden = head.hidden.detach()[:298].view(2, 149, -1)
    out = fastdpo.linear_dpo_loss(hidden, head.weight, labels, backward="exact", accumulate_into="main_grad")
    out.loss.backward()
    found = head.weight.main_grad - alone
    plain = head.weight.detach().clone().requires_grad_()
    fastdpo.linear_dpo_loss(hidden, plain, labels, backward="exact").loss.backward()
    assert relative_error(found, plain.grad) < 1e-5
