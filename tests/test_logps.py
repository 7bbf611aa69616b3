"""Token level, every engine against the definition in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from heads import peaked_head, relative_error, small_head

import fastdpo

TRANSFORMS = {
    "plain": {},
    "scaled": {"logit_scale": 1.7, "temperature": 0.6},
    "capped": {"softcap": 4.0},
    "all": {"logit_scale": 0.8, "softcap": 5.0, "temperature": 1.3},
}
BACKWARDS = {
    "exact": {"backward": "exact"},
    "routed": {
        "tau": 0.0,
        "seed": 3,
    },  # every pair kept with weight 1: the routed path must equal the exact gradient
}


def run(head, dtype, dlogps, transform, **options):
    leaves = head.leaves(dtype)
    logps = fastdpo.linear_logps(
        leaves.hidden, leaves.weight, leaves.labels, leaves.bias, lora=leaves.lora, **transform, **options
    )
    logps.backward(dlogps.to(logps.dtype))
    return logps.detach(), {name: x.grad for name, x in leaves.tensors().items()}


def definition(head, dlogps, transform):
    leaves = head.leaves(torch.float64)
    logps = leaves.logps(**transform)
    logps.backward(dlogps.double())
    return logps.detach(), {name: x.grad for name, x in leaves.tensors().items()}


@pytest.mark.parametrize("how", BACKWARDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias,lora,masked", itertools.product([False, True], repeat=3))
def test_fp32_matches_definition(engine, how, transform, bias, lora, masked):
    head = small_head(bias=bias, lora=lora, masked=masked)
    dlogps = torch.randn(head.labels.shape)
    logps, grads = run(head, torch.float32, dlogps, TRANSFORMS[transform], **BACKWARDS[how])
    expected, expected_grads = definition(head.rounded(torch.float32), dlogps, TRANSFORMS[transform])
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=2e-6)
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 5e-6, name


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 127, 16), (9, 128, 33), (65, 129, 8), (130, 4097, 24)])
@pytest.mark.parametrize("how", BACKWARDS)
def test_ragged_shapes(engine, how, shape):
    head = small_head(*shape)
    dlogps = torch.randn(shape[0])
    logps, grads = run(head, torch.float32, dlogps, {}, **BACKWARDS[how])
    expected, expected_grads = definition(head.rounded(torch.float32), dlogps, {})
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=2e-6)
    for name, grad in grads.items():
        if shape[1] > 1:  # a vocabulary of one token has no gradient
            assert relative_error(grad, expected_grads[name]) < 5e-6, name
        else:
            assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", BACKWARDS)
def test_half_precision_rounds_only_the_result(engine, how, dtype):
    """Error at most twice that of rounding the fp64 result once to the type; thrice on tensor cores, where dz itself
    is an operand in the type."""
    times = 3 if engine == "triton" else 2
    head = small_head(bias=True, lora=True, masked=True)
    dlogps = torch.randn(head.labels.shape)
    logps, grads = run(head, dtype, dlogps, TRANSFORMS["all"], **BACKWARDS[how])
    expected, expected_grads = definition(head.rounded(dtype), dlogps, TRANSFORMS["all"])
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=2e-6)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        rounding = relative_error(expected_grads[name].to(dtype), expected_grads[name])
        assert relative_error(grad, expected_grads[name]) < times * rounding, name


def test_fp64_inputs_are_computed_in_fp64():
    head = small_head(bias=True, lora=True)
    dlogps = torch.randn(head.labels.shape, dtype=torch.float64)
    logps, grads = run(head, torch.float64, dlogps, TRANSFORMS["all"], backward="exact")
    expected, expected_grads = definition(head, dlogps, TRANSFORMS["all"])
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < 1e-12, name


def test_sequence_logp_of_bf16_inputs_within_a_thousandth_of_a_nat(engine):
    head = peaked_head(N=512).leaves(torch.bfloat16, False)
    ours = fastdpo.linear_logps(head.hidden, head.weight, head.labels).double().sum()
    expected = head.leaves(torch.float64, False).logps().sum()
    assert abs(ours - expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", BACKWARDS)
def test_gradient_of_a_confident_label(engine, how, dtype):
    """p = 0.9999: rounding p before `1 - p` would lose the whole gradient (Liger#1329, FLA#1231)."""
    V, H = 512, 32
    weight = torch.zeros(V, H, dtype=torch.float64)
    weight[7, 0] = 1.0
    weight[:, 1:] = torch.randn(V, H - 1, dtype=torch.float64) * 0.01
    hidden = torch.zeros(1, H, dtype=torch.float64)
    hidden[0, 0] = torch.log(torch.tensor(0.9999 / 0.0001 * (V - 1)))
    head = type(small_head())(hidden, weight, torch.tensor([7])).rounded(dtype)
    one = torch.ones(1)
    logps, grads = run(head, dtype, one, {}, **BACKWARDS[how])
    expected, expected_grads = definition(head, one, {})
    assert 0.99985 < expected.exp().item() < 0.99995
    assert abs(logps.item() / expected.item() - 1) < 1e-2
    got, wanted = grads["weight"][7, 0].item(), expected_grads["weight"][7, 0].item()
    assert abs(got / wanted - 1) < 1e-2
    assert relative_error(grads["hidden"], expected_grads["hidden"]) < 1e-2


SLICES = {
    "shifted": lambda x: x[:, :-1],  # what every trainer passes
    "strided H": lambda x: x[:, 1:, ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "every other": lambda x: x[::2, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
}


@pytest.mark.parametrize("how", BACKWARDS)
@pytest.mark.parametrize("case", SLICES)
def test_slices_of_hidden(engine, how, case):
    base = torch.randn(3, 9, 32, requires_grad=True)
    hidden = SLICES[case](base)
    weight = torch.randn(64, 300).T[:, : 2 * hidden.shape[-1] : 2].clone().requires_grad_()
    labels = torch.randint(0, 300, hidden.shape[:-1])
    labels[0, 1] = -100
    logps = fastdpo.linear_logps(hidden, weight, labels, **BACKWARDS[how])
    ours = torch.autograd.grad(logps.sum(), [base, weight])
    b, w = (x.detach().double().requires_grad_() for x in (base, weight))
    picked = (SLICES[case](b) @ w.T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(labels == -100, torch.zeros_like(picked), picked)
    assert logps.shape == labels.shape
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=2e-6)
    for grad, wanted in zip(ours, torch.autograd.grad(expected.sum(), [b, w])):
        assert relative_error(grad, wanted) < 5e-6


def test_labels_at_an_unaligned_address(engine):
    """flash-attention bedf8774: int64 labels loaded wrongly when not 16-byte aligned."""
    head = small_head(N=38)
    labels = head.labels[1:]
    logps = fastdpo.linear_logps(head.hidden[1:].float(), head.weight.float(), labels)
    head.hidden, head.labels = head.hidden[1:], labels
    torch.testing.assert_close(logps.double(), head.logps(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(fastdpo.linear_logps(head.hidden.float(), head.weight.float(), labels.int()), logps)


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_types(engine, pair):
    """bf16 hidden with an fp32 head, refused by Liger's DPO outside autocast."""
    head = small_head()
    hidden = head.hidden.to(pair[0]).requires_grad_()
    weight = head.weight.to(pair[1]).requires_grad_()
    logps = fastdpo.linear_logps(hidden, weight, head.labels, backward="exact")
    logps.sum().backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = (h @ w.T).log_softmax(-1).gather(-1, head.labels[:, None])[:, 0]
    expected.sum().backward()
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=2e-6)
    assert hidden.grad.dtype == pair[0] and weight.grad.dtype == pair[1]
    assert relative_error(hidden.grad, h.grad) < 5e-3 and relative_error(weight.grad, w.grad) < 5e-3


def test_autocast_multiplies_in_its_type_and_keeps_fp32_logits(engine):
    head = small_head()
    leaves = head.leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, backward="exact")
        logps.sum().backward()
    expected = head.rounded(torch.bfloat16)
    expected_logps = expected.logps()
    expected_logps.sum().backward()
    torch.testing.assert_close(logps.double(), expected_logps, rtol=1e-5, atol=2e-6)
    assert leaves.weight.grad.dtype == torch.float32
    tolerance = 4e-3 if engine == "triton" else 1e-5  # tensor cores take dz, too, in the type to multiply in
    assert relative_error(leaves.hidden.grad, expected.hidden.grad) < tolerance
    assert relative_error(leaves.weight.grad, expected.weight.grad) < tolerance


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("how", BACKWARDS)
def test_frozen_inputs_get_no_gradient(engine, how, frozen):
    head = small_head(masked=True).leaves(torch.float32)
    getattr(head, frozen).requires_grad_(False)
    fastdpo.linear_logps(head.hidden, head.weight, head.labels, **BACKWARDS[how]).sum().backward()
    assert getattr(head, frozen).grad is None
    other = "weight" if frozen == "hidden" else "hidden"
    _, expected = definition(head, torch.ones(head.labels.shape), {})
    assert relative_error(getattr(head, other).grad, expected[other]) < 5e-6


def test_no_grad_saves_nothing(engine):
    """needs_input_grad is True inside an autograd Function even under no_grad."""
    head = small_head().leaves(torch.float32)
    with torch.no_grad():
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels)
    assert not logps.requires_grad
    with torch.inference_mode():  # nothing will ever be differentiated: not even a key
        state = torch.get_rng_state()
        fastdpo.linear_logps(head.hidden, head.weight, head.labels)
        assert torch.equal(torch.get_rng_state(), state)


def test_upstream_gradients_are_per_token(engine):
    """Liger#968, #1298: every gradient multiplied by the first upstream element."""
    head = small_head(N=8)
    dlogps = torch.arange(8.0) - 3
    _, grads = run(head, torch.float32, dlogps, {}, backward="exact")
    _, expected = definition(head.rounded(torch.float32), dlogps, {})
    assert (grads["hidden"][3] == 0).all()
    assert relative_error(grads["hidden"], expected["hidden"]) < 5e-6


@pytest.mark.parametrize("how", BACKWARDS)
def test_retain_graph_and_inputs_untouched(engine, how):
    """Liger#272, #343, #1251: a gradient written over the caller's tensors, a second backward that differs."""
    head = small_head(masked=True).leaves(torch.float32)
    before = {name: x.detach().clone() for name, x in head.tensors().items()}
    logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, **BACKWARDS[how])
    first = torch.autograd.grad(logps.sum(), [head.hidden, head.weight], retain_graph=True)
    second = torch.autograd.grad(logps.sum(), [head.hidden, head.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(x, before[name]) for name, x in head.tensors().items())


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_returned_may_be_changed_in_place(engine, masked):
    head = small_head(masked=masked).leaves(torch.float32)

    def gradient(change):
        stats = fastdpo.linear_token_stats(head.hidden, head.weight, head.labels, stats=("entropy",), backward="exact")
        loss = sum(change(x) for x in (stats.logps, stats.entropy))
        return torch.autograd.grad(loss.sum(), head.hidden)[0]

    assert torch.equal(gradient(lambda x: x.mul_(3)), gradient(lambda x: x * 3))


@pytest.mark.parametrize("power", [1, 2])  # an upstream gradient that is a constant, and one that is not
def test_double_backward_raises(engine, power):
    head = small_head().leaves(torch.float32)
    logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, backward="exact")
    (grad,) = torch.autograd.grad((logps**power).sum(), head.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.pow(2).sum().backward()


def test_a_compiled_caller_gets_the_same(engine):
    """pytorch#132196, #120802: kernels that mutate give wrong results under torch.compile."""
    head = small_head(masked=True).leaves(torch.float32)

    def step(hidden, weight):
        logps = fastdpo.linear_logps(hidden * 2, weight, head.labels, backward="exact")
        logits = (hidden @ weight.T).tanh()
        return (logps * 1.5).sum() + fastdpo.selective_log_softmax(logits, head.labels).sum()

    eager = torch.autograd.grad(step(head.hidden, head.weight), [head.hidden, head.weight])
    compiled = torch.autograd.grad(torch.compile(step)(head.hidden, head.weight), [head.hidden, head.weight])
    for ours, expected in zip(compiled, eager):
        assert relative_error(ours, expected) < 1e-5


def test_a_head_released_before_the_backward_raises(engine):
    """ZeRO-3 empties a gathered parameter in place: a silent zero gradient otherwise."""
    head = small_head().leaves(torch.float32)
    head.weight.requires_grad_(False)
    logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels)
    head.weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"\(1000, 48\)"):
        logps.sum().backward()


@pytest.mark.parametrize("how", BACKWARDS)
def test_masked_rows_are_never_read(engine, how):
    """NaN in a masked row poisons the batch in Liger's DPO, which masks by multiplication."""
    head = small_head(N=10)
    labels = head.labels.clone()
    labels[[2, 5]] = -100
    leaves = head.leaves(torch.float32)
    with torch.no_grad():
        leaves.hidden[[2, 5]] = torch.nan
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, labels, **BACKWARDS[how])
    logps.sum().backward()
    assert (logps[[2, 5]] == 0).all() and (leaves.hidden.grad[[2, 5]] == 0).all()
    assert torch.isfinite(logps).all() and torch.isfinite(leaves.hidden.grad).all()
    assert torch.isfinite(leaves.weight.grad).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{"backward": "exact"}, {"tau": 1e-2, "seed": 0}])
def test_nan_stays_in_its_row(engine, how, poison):
    leaves = small_head(N=10).leaves(torch.float32)
    with torch.no_grad():
        leaves.hidden[4, 3] = poison
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, **how)
    logps.sum().backward()
    others = torch.arange(10) != 4
    assert not torch.isfinite(logps[4]) and torch.isfinite(logps[others]).all()
    assert not torch.isfinite(leaves.hidden.grad[4]).all() and torch.isfinite(leaves.hidden.grad[others]).all()


@pytest.mark.parametrize("label", [-1, 1000, 2**40, -(2**62)])
@pytest.mark.parametrize("how", BACKWARDS)
def test_out_of_range_label_is_nan_in_its_own_row(engine, how, label):
    """Liger's and FLA's fused linear cross entropies write out of bounds here."""
    leaves = small_head(N=10, V=1000).leaves(torch.float32)
    labels = leaves.labels.clone()
    labels[4] = label
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, labels, **BACKWARDS[how])
    logps.sum().backward()
    others = torch.arange(10) != 4
    assert torch.isnan(logps[4]) and torch.isfinite(logps[others]).all()
    assert torch.isnan(leaves.hidden.grad[4]).all() and torch.isfinite(leaves.hidden.grad[others]).all()
    assert torch.isfinite(leaves.weight.grad).all()


def test_check_labels_names_position_and_value():
    head = small_head(N=12, V=100).leaves(torch.float32)
    labels = head.labels.view(3, 4).clone()
    labels[1, 2] = 100
    with pytest.raises(ValueError, match=r"labels\[1, 2\] = 100"):
        fastdpo.linear_logps(head.hidden.view(3, 4, -1), head.weight, labels, check_labels=True)
    labels[1, 2] = -100
    fastdpo.linear_logps(head.hidden.view(3, 4, -1), head.weight, labels, check_labels=True)


@pytest.mark.parametrize("how", BACKWARDS)
@pytest.mark.parametrize("case", ["empty", "all ignored"])
def test_nothing_to_score_gives_zeros(engine, how, case):
    """0 / 0 when all rows are masked: unsloth#10892, Liger's DPO."""
    leaves = small_head(N=0 if case == "empty" else 6, bias=True, lora=True).leaves(torch.float32)
    labels = torch.full_like(leaves.labels, -100)
    stats = fastdpo.linear_token_stats(
        leaves.hidden, leaves.weight, labels, leaves.bias, lora=leaves.lora, **BACKWARDS[how]
    )
    (stats.logps.sum() + stats.entropy.sum()).backward()
    for value in stats:
        assert value.shape == labels.shape and (value == 0).all()
    for x in leaves.tensors().values():
        assert x.grad is not None and (x.grad == 0).all()


def test_very_negative_and_infinite_logits(engine):
    """NaN with many -inf logits (flash-attention#1930, SkyRL#2141); padded columns counted as exp(0) (verl#2656)."""
    head = small_head(N=6, V=300, bias=True)
    head.bias[:290] = -torch.inf
    head.bias[295:] = -1e30
    head.labels[:] = torch.randint(290, 295, (6,))
    leaves = head.leaves(torch.float32)
    logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, leaves.bias, backward="exact")
    logps.sum().backward()
    allowed = head.logits()[:, 290:295].log_softmax(-1)
    expected = allowed.gather(1, head.labels[:, None] - 290)[:, 0]
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(leaves.hidden.grad).all()
    assert (leaves.weight.grad[:290] == 0).all() and (leaves.bias.grad[295:] == 0).all()


def test_ignore_index_may_be_a_token_id(engine):
    head = small_head(N=9).leaves(torch.float32)
    head.labels[3] = 0
    logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, ignore_index=0)
    assert logps[3] == 0 and (logps[head.labels != 0] < 0).all()


def test_statistics_match_definition(engine):
    head = small_head(bias=True, masked=True, sharpness=2.0)
    keep = head.labels != -100
    top = head.logits(**TRANSFORMS["all"]).argmax(-1)
    head.labels[keep] = torch.where(torch.rand(keep.sum()) < 0.5, top[keep], head.labels[keep])
    leaves = head.leaves(torch.float32)
    stats = fastdpo.linear_token_stats(leaves.hidden, leaves.weight, leaves.labels, leaves.bias, **TRANSFORMS["all"])
    z = head.rounded(torch.float32).logits(**TRANSFORMS["all"]).detach()
    logp = z.log_softmax(-1)
    zero = torch.zeros(())
    close = {"rtol": 1e-5, "atol": 4e-6}
    torch.testing.assert_close(
        stats.entropy.double(), torch.where(keep, -(logp.exp() * logp).sum(-1), zero.double()), **close
    )
    torch.testing.assert_close(stats.mean_logit.double(), torch.where(keep, z.mean(-1), zero.double()), **close)
    expected = torch.where(keep, (2 * logp).logsumexp(-1), zero.double())
    torch.testing.assert_close(stats.log_sum_sq_probs.double(), expected, **close)
    assert torch.equal(stats.is_top1, (top == head.labels) & keep)
    assert not stats.mean_logit.requires_grad and not stats.log_sum_sq_probs.requires_grad


def test_top1_takes_the_first_of_equal_logits(engine):
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    stats = fastdpo.linear_token_stats(torch.ones(3, 1), weight, torch.tensor([1, 2, 0]), stats=("is_top1",))
    assert stats.is_top1.tolist() == [True, False, False]
    assert stats.entropy is None and stats.mean_logit is None and stats.log_sum_sq_probs is None


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_entropy_gradient(engine, transform):
    head = small_head(bias=True, masked=True)
    leaves, expected = head.leaves(torch.float32), head.rounded(torch.float32)
    dlogps, dentropy = torch.randn(2, *head.labels.shape)
    options = TRANSFORMS[transform]
    stats = fastdpo.linear_token_stats(
        leaves.hidden, leaves.weight, leaves.labels, leaves.bias, stats=("entropy",), **options
    )
    (stats.logps * dlogps + stats.entropy * dentropy).sum().backward()
    logp = expected.logits(**options).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1) * (head.labels != -100)
    (expected.logps(**options) * dlogps + entropy * dentropy).sum().backward()
    for name, x in leaves.tensors().items():
        assert relative_error(x.grad, expected.tensors()[name].grad) < 1e-5, name


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("options", [{"backward": "exact"}, {"tau": (1e-2, 3e-3), "seed": 11}], ids=["exact", "routed"])
def test_same_inputs_same_bits(engine, options):
    head = peaked_head(N=200).leaves(torch.float32)

    def run_once():
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, **options)
        return logps, *torch.autograd.grad(logps.sum(), [head.hidden, head.weight])

    first, second = run_once(), run_once()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_engines_agree_on_the_routed_gradient(monkeypatch):
    """Same seed, same kept pairs, same weights: the engines differ by rounding only."""
    if fastdpo.backends()["engines"]["cpu"]["reason"]:
        pytest.skip("one engine only")
    head = peaked_head(N=256, V=5000).leaves(torch.float32)
    results = {}
    for name in ("reference", "cpu"):
        monkeypatch.setenv("FASTDPO_ENGINE", name)
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, tau=(2e-2, 4e-3), seed=5)
        results[name] = torch.autograd.grad(logps.sum(), [head.hidden, head.weight])
    for ours, reference in zip(results["cpu"], results["reference"]):
        assert relative_error(ours, reference) < 1e-4


BAD_CALLS = {
    "hidden is not a tensor": (dict(hidden=[[1.0]]), TypeError, "hidden"),
    "labels float": (dict(labels=torch.zeros(6)), TypeError, "labels"),
    "hidden int": (dict(hidden=torch.zeros(6, 8, dtype=torch.int64)), TypeError, "hidden"),
    "H differs": (dict(weight=torch.zeros(20, 9)), ValueError, "H = 8"),
    "weight 1-d": (dict(weight=torch.zeros(8)), ValueError, "weight"),
    "weight empty": (dict(weight=torch.zeros(0, 8)), ValueError, "weight"),
    "labels shape": (dict(labels=torch.zeros(5, dtype=torch.int64)), ValueError, "labels"),
    "bias shape": (dict(bias=torch.zeros(19)), ValueError, "bias"),
    "other device": (dict(weight=torch.zeros(20, 8, device="meta")), ValueError, "meta"),
    "some fp64": (dict(hidden=torch.zeros(6, 8, dtype=torch.float64)), TypeError, "fp64"),
    "temperature 0": (dict(temperature=0.0), ValueError, "temperature"),
    "temperature NaN": (dict(temperature=float("nan")), ValueError, "temperature"),
    "softcap negative": (dict(softcap=-1.0), ValueError, "softcap"),
    "scale text": (dict(logit_scale="2"), TypeError, "logit_scale"),
    "backward": (dict(backward="fast"), ValueError, "fast"),
    "tau above one": (dict(tau=1.5), ValueError, "1.5"),
    "tau of three": (dict(tau=(0.1, 0.1, 0.1)), ValueError, "tau"),
    "tau text": (dict(tau="small"), TypeError, "small"),
    "tau with exact": (dict(tau=0.1, backward="exact"), ValueError, "tau"),
    "seed with exact": (dict(seed=1, backward="exact"), ValueError, "seed"),
    "seed negative": (dict(seed=-1), ValueError, "-1"),
    "seed float": (dict(seed=1.5), TypeError, "1.5"),
    "lora as a number": (dict(lora=3), ValueError, "lora must be .* got int"),
    "lora as a tensor": (dict(lora=torch.zeros(2, 8)), ValueError, "lora must be .* got Tensor"),
    "lora of two": (dict(lora=(torch.zeros(2, 8), torch.zeros(20, 2))), ValueError, "lora"),
    "lora shapes": (dict(lora=(torch.zeros(2, 8), torch.zeros(20, 3), 1.0)), ValueError, "lora"),
    "lora scale": (dict(lora=(torch.zeros(2, 8), torch.zeros(20, 2), "1")), TypeError, "scale"),
    "ignore_index": (dict(ignore_index=None), TypeError, "ignore_index"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    changes, error, text = BAD_CALLS[case]
    arguments = dict(hidden=torch.zeros(6, 8), weight=torch.zeros(20, 8), labels=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(error, match=text):
        fastdpo.linear_logps(**{**arguments, **changes})


def test_unknown_statistic_is_named():
    with pytest.raises(ValueError, match="perplexity"):
        fastdpo.linear_token_stats(
            torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(6, dtype=torch.int64), stats=("perplexity",)
        )


def test_unknown_engine_is_named(monkeypatch):
    monkeypatch.setenv("FASTDPO_ENGINE", "warp")
    with pytest.raises(ValueError, match="warp"):
        fastdpo.linear_logps(torch.zeros(6, 8), torch.zeros(20, 8), torch.zeros(6, dtype=torch.int64))
