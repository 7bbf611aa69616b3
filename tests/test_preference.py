"""preference_loss: against the fp64 oracle, at the extremes, and its contract."""

import math

import pytest
import torch
from preference_cases import CASES, UPSTREAM, B, grads_of, inputs_of, names_of, oracle

from fastdpo.losses import LOSSES, PreferenceOptions
from fastdpo.preference import PreferenceLossFunction, preference_loss


@pytest.mark.parametrize("name", CASES)
def test_native_equals_oracle_fp64(name, native):
    case = CASES[name]
    for scale, seed in ((1.0, 1), (60.0, 2)):
        tensors, lengths = inputs_of(case, scale=scale, seed=seed)
        expected = oracle(tensors, lengths, **case)
        out = preference_loss(*tensors, **case, **lengths)
        torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=1e-12)
        expected_grads = grads_of(expected, tensors, UPSTREAM)
        for grad, expected_grad in zip(grads_of(out.losses, tensors, UPSTREAM), expected_grads):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounded_once(name, dtype, loss_engine):
    """Losses are fp32 whatever comes in, and within one rounding of fp64 on the same numbers."""
    case = CASES[name]
    tensors, lengths = inputs_of(case, dtype, scale=20.0, seed=5)
    out = preference_loss(*tensors, **case, **lengths)
    assert {x.dtype for x in out} == {torch.float32}
    expected = oracle([t.detach() for t in tensors], lengths, **case)
    # a list with ranked losses or sft is a sum of fp32 parts
    torch.testing.assert_close(out.losses.double(), expected, rtol=2.5e-7, atol=1e-7)
    assert out.loss.double().item() == pytest.approx(expected.mean().item(), rel=2.5e-7, abs=1e-7)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected_grads = grads_of(oracle(wide, lengths, **case), wide, UPSTREAM)
    eps = torch.finfo(dtype).eps
    for grad, expected_grad in zip(grads_of(out.losses, tensors, UPSTREAM.float()), expected_grads):
        assert grad.dtype == dtype
        limit = torch.finfo(dtype).max
        torch.testing.assert_close(grad.double(), expected_grad.clamp(-limit, limit), rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    case = CASES[name]
    tensors, lengths = inputs_of(case, scale=2.0, seed=11)

    def losses_and_loss(*tensors):
        out = preference_loss(*tensors, **case, **lengths)
        return out.losses, out.loss

    assert torch.autograd.gradcheck(losses_and_loss, tensors, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_extreme_margins_stay_finite(name, dtype, loss_engine):
    case = CASES[name]
    grid = torch.tensor([-1e4, -300.0, -80.0, -1.0, 0.0, 1.0, 80.0, 300.0, 1e4], dtype=dtype)
    chosen, rejected = (x.reshape(-1).clone() for x in torch.meshgrid(grid, grid, indexing="ij"))
    refs = [torch.zeros_like(chosen), torch.full_like(chosen, 0.5)]
    tensors = [chosen, rejected] + refs[: len(inputs_of(case)[0]) - 2]
    tensors = [x.requires_grad_() for x in tensors]
    lengths = {side: torch.ones(len(chosen), dtype=torch.int64) for side in ("chosen_lengths", "rejected_lengths")}
    out = preference_loss(*tensors, **case, **lengths)
    assert out.losses.isfinite().all() and out.loss.isfinite()
    for grad in grads_of(out.losses, tensors, torch.ones_like(out.losses)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if "sft" not in names_of(CASES[name])])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_in_its_row(name, side, loss_engine):
    case = CASES[name]
    tensors, lengths = inputs_of(case, requires_grad=False)
    tensors[side][2] = math.nan
    tensors = [x.requires_grad_() for x in tensors]
    out = preference_loss(*tensors, **case, **lengths)
    rows = out.losses.isnan().nonzero()[:, 0].tolist()
    if "aot_unpaired" in names_of(case) and side == 1:
        # the row that is matched with the NaN's rank also has it
        assert 1 <= len(rows) <= 2
    else:
        assert rows == [2]
    for grad in grads_of(out.losses, tensors[:2], torch.ones_like(out.losses)):
        assert grad[[0, 1, 3, 4, 5, 6]].isnan().sum() <= len(rows) - 1 + (
            any(LOSSES[loss].ranked for loss in names_of(case))
        )


def test_sft_without_tokens_is_zero(loss_engine):
    """0 / 0 when everything is masked."""
    x = torch.zeros(3, requires_grad=True)
    out = preference_loss(x, torch.zeros(3), loss_type="sft", chosen_lengths=torch.zeros(3, dtype=torch.int64))
    out.loss.backward()
    assert out.loss == 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "orpo"])
def test_empty_completion_divides_by_one(name, loss_engine):
    x = torch.tensor([0.0, -4.0], requires_grad=True)
    lengths = torch.tensor([0, 2])
    out = preference_loss(x, x.detach(), loss_type=name, chosen_lengths=lengths, rejected_lengths=lengths)
    out.loss.backward()
    assert out.losses.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name, loss_engine):
    case = CASES[name]
    count = len(inputs_of(case)[0])
    tensors = [torch.zeros(0, requires_grad=True) for _ in range(count)]
    lengths = {k: torch.zeros(0, dtype=torch.int64) for k in ("chosen_lengths", "rejected_lengths")}
    out = preference_loss(*tensors, **case, **lengths)
    assert out.loss == 0 and out.losses.shape == (0,) and out.chosen_rewards.shape == (0,)
    out.loss.backward()
    assert tensors[0].grad.shape == (0,)


def test_aot_losses_stay_with_their_row(loss_engine):
    """Permuting the rows permutes `losses`, and a row's loss follows its own policy margin."""
    for name in ("aot", "aot_unpaired"):
        tensors, _ = inputs_of(CASES[name], requires_grad=False)
        losses = preference_loss(*tensors, loss_type=name).losses
        order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(preference_loss(*(x[order] for x in tensors), loss_type=name).losses, losses[order])
        # with every reference margin (rejected ratio) the same, the rank decides nothing
        flat = [tensors[0], tensors[1] * 0, tensors[2] * 0, tensors[3] * 0]
        torch.testing.assert_close(preference_loss(*flat, loss_type=name).losses, preference_loss(*flat).losses)


@pytest.mark.parametrize("name", ["sigmoid", "mpo", "ranked and rowwise"])
def test_loss_and_losses_together(name, loss_engine):
    case = CASES[name]
    tensors, lengths = inputs_of(case)
    out = preference_loss(*tensors, **case, **lengths)
    together = grads_of(2.0 * out.loss + (out.losses * UPSTREAM).sum(), tensors, None)
    out = preference_loss(*tensors, **case, **lengths)
    separate = grads_of(out.losses, tensors, UPSTREAM + 2.0 / B)
    for a, b in zip(together, separate):
        torch.testing.assert_close(a, b)


def test_each_row_has_its_own_upstream(loss_engine):
    """Not the first one's: a zero there must not silence the others."""
    tensors, _ = inputs_of(CASES["sigmoid"])
    out = preference_loss(*tensors)
    grad = grads_of(out.losses, tensors, UPSTREAM)[0]
    unit = grads_of(preference_loss(*tensors).losses, tensors, torch.ones_like(UPSTREAM))[0]
    torch.testing.assert_close(grad, UPSTREAM * unit)


def test_backward_twice_is_the_same(loss_engine):
    tensors, _ = inputs_of(CASES["sigmoid"])
    out = preference_loss(*tensors)
    first = torch.autograd.grad(out.loss, tensors, retain_graph=True)
    second = torch.autograd.grad(out.loss, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_what_requires_grad(loss_engine):
    tensors, _ = inputs_of(CASES["sigmoid"], requires_grad=False)
    tensors[1].requires_grad_()
    out = preference_loss(*tensors)
    out.loss.backward()
    assert tensors[1].grad is not None and tensors[0].grad is None
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    with torch.no_grad():
        assert not preference_loss(*tensors).loss.requires_grad


def test_double_backward_raises(native):
    for upstream in (torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        x = torch.zeros(2, requires_grad=True)
        out = preference_loss(x, torch.zeros(2))
        (grad,) = torch.autograd.grad(out.loss, x, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="once differentiable"):
            grad.pow(2).sum().backward()


def test_function_class(native):
    tensors, _ = inputs_of(CASES["sigmoid"])
    losses = PreferenceLossFunction.apply(*tensors, None, None, PreferenceOptions())
    torch.testing.assert_close(losses, preference_loss(*tensors).losses)


def test_noncontiguous_and_mixed_dtypes(loss_engine):
    grid = torch.randn(4, 2 * B, dtype=torch.float64)[:, ::2]
    mixed = [grid[0].float(), grid[1].half(), grid[2].bfloat16(), grid[3].float()]
    out = preference_loss(*mixed)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.losses, preference_loss(*(x.double() for x in mixed)).losses.float())
    assert preference_loss(grid[0], *mixed[1:]).loss.dtype == torch.float64
    torch.testing.assert_close(preference_loss(*grid).losses, preference_loss(*grid.clone()).losses)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["sigmoid", "aot"]])
@pytest.mark.parametrize("by_class", [False, True])
def test_compiles_without_graph_break(by_class, loss_type, loss_engine):
    tensors, _ = inputs_of(CASES["sigmoid"], torch.float32)

    def step(*tensors):
        if by_class:
            return PreferenceLossFunction.apply(*tensors, None, None, PreferenceOptions(loss_type=loss_type)).mean()
        return preference_loss(*tensors, loss_type=loss_type).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, step(*tensors))
    expected = torch.autograd.grad(step(*tensors), tensors)
    for grad, expected_grad in zip(torch.autograd.grad(compiled, tensors), expected):
        torch.testing.assert_close(grad, expected_grad)


def test_rewards():
    tensors, lengths = inputs_of(CASES["sigmoid"], requires_grad=False)
    chosen, rejected, ref_chosen, ref_rejected = tensors
    out = preference_loss(*tensors, beta=0.3)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (chosen - ref_chosen))
    torch.testing.assert_close(out.rejected_rewards, 0.3 * (rejected - ref_rejected))
    out = preference_loss(chosen, rejected, beta=0.3)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * chosen)
    n_w = lengths["chosen_lengths"].clamp(min=1)
    for names in ("simpo", "orpo", ["sft", "simpo"]):
        out = preference_loss(chosen, rejected, beta=0.3, loss_type=names, **lengths)
        torch.testing.assert_close(out.chosen_rewards, 0.3 * chosen / n_w)
    out = preference_loss(*tensors, beta=0.3, loss_type="sigmoid_norm", **lengths)
    torch.testing.assert_close(out.chosen_rewards, 0.3 * (chosen - ref_chosen))
