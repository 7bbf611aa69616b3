"""The head as operators of torch.library: opcheck, torch.compile without a graph break, tracing, nothing that waits."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from heads import peaked_head, relative_error, small_head
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastdpo
from fastdpo.head import HeadOptions
from fastdpo.ops import operators as library
from fastdpo.ops.problem import STATS, Forward, Gradients

SCALARS = {
    "lora_scale": 0.7,
    "transform": [1.2, 5.0, 0.8],
    "ignore_index": -100,
    "compute_dtype": torch.float32,
    "taus": [0.02, 0.05],
    "hidden_set": 1,
    "weight_set": 0,
}
OPERANDS = {"plain": {}, "bias, lora, masked": {"bias": True, "lora": True, "masked": True}}
HOW = {"exact": {"backward": "exact"}, "routed": {"tau": (0.05, 0.02), "seed": 2**63 + 9}}


def operator_inputs(case: str, seed: int | None, requires_grad=True) -> list[torch.Tensor | None]:
    head = small_head(N=12, V=300, H=16, **OPERANDS[case]).leaves(torch.float32)
    lora_a, lora_b = (None, None) if head.lora is None else head.lora[:2]
    tensors = [head.hidden.detach().view(3, 4, 16), head.weight, head.bias, lora_a, lora_b]
    tensors = [None if x is None else x.detach().requires_grad_(requires_grad) for x in tensors]
    return [*tensors, head.labels, None if seed is None else torch.tensor(seed)]


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("stats", [[], ["entropy"], list(STATS)], ids=len)
@pytest.mark.parametrize("seed", [None, -5], ids=["exact", "routed"])
@pytest.mark.parametrize("case", OPERANDS)
def test_opcheck_of_the_forward(engine, case, seed, stats):
    opcheck(library.token_stats_op, operator_inputs(case, seed), {**SCALARS, "stats": stats})


UPSTREAM = ("logps", "entropy", "lse", "all")
NEEDS = ([1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 0, 0, 1])
BACKWARDS = [  # each of both once; each with each nightly
    pytest.param(needs, upstream, marks=[] if all(needs) or upstream == "all" else pytest.mark.slow)
    for needs in NEEDS
    for upstream in UPSTREAM
]


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("needs, upstream", BACKWARDS, ids=str)
@pytest.mark.parametrize("seed", [None, -5], ids=["exact", "routed"])
def test_opcheck_of_the_backward(engine, seed, needs, upstream):
    inputs = operator_inputs("bias, lora, masked", seed, False)
    logps, lse, entropy, *_, bitmap, most_pairs, _ = library.token_stats_op(*inputs, **SCALARS, stats=["entropy"])
    dlogps, dentropy, dlse = (torch.randn(12) if upstream in (x, "all") else None for x in ("logps", "entropy", "lse"))
    pairs = (None, None) if seed is None else (bitmap, most_pairs)
    saved = (logps, lse, entropy, *pairs, None, dlogps, dentropy, dlse)
    opcheck(library.token_stats_backward_op, (*inputs[:6], *saved), {**SCALARS, "needs": [bool(x) for x in needs]})


def compare(function, batches, backend="aot_eager"):
    """Compiled without a graph break: values and gradients are eager's for every batch."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for batch in batches:
        leaves = [x for x in batch if isinstance(x, torch.Tensor) and x.requires_grad]
        ours, expected = compiled(*batch), function(*batch)
        torch.testing.assert_close(ours, expected)
        results = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))
        assert all(relative_error(a, b) < 1e-5 for a, b in results)


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", OPERANDS)
def test_linear_logps_compiles(engine, case, how):
    def step(hidden, weight, bias, a, b, labels):
        lora = None if a is None else (a, b, 0.7)
        logps = fastdpo.linear_logps(2 * hidden, weight, labels, bias, lora=lora, softcap=4.0, **HOW[how])
        return (logps * 1.5).sum()

    def batch(n):
        head = small_head(N=n, V=700, **OPERANDS[case]).leaves(torch.float32)
        return head.hidden, head.weight, head.bias, *(head.lora or (None, None))[:2], head.labels

    compare(step, [batch(n) for n in (11, 30, 47)])


@pytest.mark.parametrize("how", HOW)
def test_statistics_compile(engine, how):
    def step(hidden, weight, labels):
        stats = fastdpo.linear_token_stats(hidden[:, :-1], weight, labels[:, 1:], **HOW[how])
        assert stats.entropy.requires_grad and not stats.mean_logit.requires_grad
        constants = stats.mean_logit + stats.log_sum_sq_probs + stats.is_top1
        return (stats.logps * constants).sum() + 0.3 * stats.entropy.sum()

    def batch(n):
        return torch.randn(2, n, 24, requires_grad=True), torch.randn(300, 24, requires_grad=True), labels(2, n)

    compare(step, [batch(5), batch(9)])


def labels(*shape) -> torch.Tensor:
    """Half of them ignored."""
    return torch.randint(0, 300, shape).masked_fill_(torch.rand(shape) < 0.5, -100)


def dpo_batch(layout: str, pairs: int, length: int):
    """(hidden, weight, labels, ref_hidden, cu_seqlens or None)."""
    shape = (2 * pairs, length) if layout == "padded" else (2 * pairs * length,)
    cu_seqlens = None if layout == "padded" else torch.arange(2 * pairs + 1) * length
    hidden, weight = torch.randn(*shape, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    return hidden, weight, labels(*shape), torch.randn(*shape, 16), cu_seqlens


DPO = [
    ("padded", "ref_hidden", "routed"),
    ("padded", "ref_logps", "exact"),
    ("packed", "ref_hidden", "exact"),
    ("packed", "ref_logps", "routed"),
]


@pytest.mark.slow_in_the_interpreter
@pytest.mark.parametrize("layout,reference,how", DPO)
def test_dpo_compiles(engine, layout, reference, how):
    options = {"ld_alpha": 0.5, "use_weighting": True, "loss_type": ["sigmoid", "sft"], **HOW[how]}

    def step(hidden, weight, labels, ref_hidden, cu_seqlens):
        ref = {reference: ref_hidden if reference == "ref_hidden" else ref_hidden.sum(-1)}
        return fastdpo.linear_dpo_loss(hidden, weight, labels, cu_seqlens=cu_seqlens, **ref, **options).loss

    compare(step, [dpo_batch(layout, pairs, 6) for pairs in (2, 3, 5)])


LOSS_OPTIONS = {"exo_pair": {"label_smoothing": 0.1}, "kto": {"kto_kl": torch.tensor(0.4)}}


@pytest.mark.parametrize("names", [["aot", "aot_unpaired", "exo_pair", "ipo"], ["kto"], ["simpo", "orpo"]], ids=str)
def test_other_losses_compile(engine, names):
    options = {name: value for loss in names for name, value in LOSS_OPTIONS.get(loss, {}).items()}

    def step(hidden, weight, labels, *_):
        return fastdpo.linear_dpo_loss(
            hidden, weight, labels, loss_type=names, beta=0.3, backward="exact", **options
        ).loss

    compare(step, [dpo_batch("padded", 3, 6)])


def test_the_module_compiles_with_inductor(engine):
    module = fastdpo.LinearDPOLoss(0.3, **HOW["routed"])
    compare(lambda *batch: module(*batch[:3], ref_hidden=batch[3]).loss, [dpo_batch("padded", 2, 6)], "inductor")


@pytest.mark.parametrize("columns", [(), (3,)], ids=["one column", "several"])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_selective_log_softmax_compiles(engine, columns, return_entropy):
    def step(logits, index):
        out = fastdpo.selective_log_softmax(logits.tanh(), index, temperature=0.7, return_entropy=return_entropy)
        return (out[0] * out[1]).sum() if return_entropy else (out * 1.5).sum()

    compare(step, [(torch.randn(2, n, 50, requires_grad=True), torch.randint(0, 50, (2, n, *columns))) for n in (3, 5)])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_draws_follow_manual_seed(backend):
    head = peaked_head(N=64, V=4096).leaves(torch.float32)
    torch._dynamo.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def step(hidden, weight):
        return fastdpo.linear_logps(hidden, weight, head.labels, tau=0.05).sum()

    def gradients():
        return torch.autograd.grad(step(head.hidden, head.weight), [head.hidden, head.weight])

    torch.manual_seed(0)
    first, second = gradients(), gradients()
    torch.manual_seed(0)
    again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, second))


def test_seed_may_change_from_call_to_call():
    head = peaked_head(N=32, V=2048).leaves(torch.float32)

    def step(hidden, weight, seed):
        return fastdpo.linear_logps(hidden, weight, head.labels, tau=0.05, seed=seed).sum()

    compare(step, [(head.hidden, head.weight, seed) for seed in (0, 1, 2, 2**62)])


def test_autocast_and_no_grad_compile():
    head = small_head(N=9, V=300).leaves(torch.float32)

    def step(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16):
            logps = fastdpo.linear_logps(hidden, weight, head.labels, backward="exact")
            with torch.no_grad():
                assert not fastdpo.linear_logps(hidden, weight, head.labels).requires_grad
        return logps.sum()

    compare(step, [(head.hidden, head.weight)])


@pytest.mark.parametrize("power", [1, 2])
def test_the_operator_is_once_differentiable(engine, power):
    inputs = operator_inputs("plain", -5)
    logps, *_ = library.token_stats_op(*inputs, **SCALARS, stats=[])
    (grad,) = torch.autograd.grad((logps**power).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


# Every public function that starts from hidden states or logits, on 2B sequences of T rows.
CALLS = {
    "routed": lambda h, w, y, *_: fastdpo.linear_logps(h, w, y).sum(),
    "given seed": lambda h, w, y, *_: fastdpo.linear_logps(h, w, y, seed=2**64 - 1).sum(),
    "exact": lambda h, w, y, *_: fastdpo.linear_logps(h[:, 1:], w, y[:, 1:], backward="exact").sum(),
    "statistics": lambda h, w, y, *_: sum(x.sum() for x in fastdpo.linear_token_stats(h, w, y)),
    "padded": lambda h, w, y, ref, _: (
        fastdpo.linear_dpo_loss(
            h, w, y, ref_hidden=ref, loss_type=["sigmoid", "sft"], ld_alpha=0.5, use_weighting=True
        ).loss
    ),
    "ranked": lambda h, w, y, *_: fastdpo.linear_dpo_loss(h, w, y, loss_type=["aot", "aot_unpaired"]).loss,
    "packed": lambda h, w, y, ref, offsets: (
        fastdpo.linear_dpo_loss(
            h.flatten(0, 1), w, y.flatten(), ref_hidden=ref.flatten(0, 1), cu_seqlens=offsets, ld_alpha=0.5
        ).loss
    ),
    "selective": lambda h, w, y, *_: fastdpo.selective_log_softmax(h @ w.T, y).sum(),
}


def call_inputs(device="cpu") -> list[torch.Tensor]:
    """hidden, weight, labels, ref_hidden, cu_seqlens."""
    shape = (4, 6)
    hidden, weight, ref_hidden = (torch.randn(*n, 16, device=device) for n in (shape, (300,), shape))
    labels = torch.randint(0, 300, shape, device=device)
    labels[:, :2] = -100
    return [hidden, weight, labels, ref_hidden, torch.arange(5, device=device) * 6]


def with_gradients(call: str, hidden, weight, *others):
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = CALLS[call](*leaves, *others)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors(call):
    """Reading a value of a fake tensor raises."""
    with FakeTensorMode():
        inputs = call_inputs()
        loss, *grads = with_gradients(call, *inputs)
    assert loss.shape == () and loss.dtype == torch.float32
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in inputs[:2]]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("call", CALLS)
def test_make_fx(call, mode):
    inputs = call_inputs()

    def run(function):
        torch.manual_seed(0)
        return function(*(x.detach().clone() for x in inputs))

    graph = run(make_fx(partial(with_gradients, call), tracing_mode=mode))
    targets = {str(node.target) for node in graph.graph.nodes}
    operator = "selective_log_softmax" if call == "selective" else "linear_token_stats"
    assert {f"fastdpo.{operator}.default", f"fastdpo.{operator}_backward.default"} <= targets
    for ours, expected in zip(run(graph), run(partial(with_gradients, call))):
        torch.testing.assert_close(ours, expected)


class Zeros:
    """An engine by row that computes nothing."""

    @staticmethod
    def forward(head, rows, *, stats, routing, shards):
        bitmap = None if routing is None else rows.labels.new_zeros(*rows.labels.shape, 1, dtype=torch.uint8)
        return Forward(
            **{name: torch.zeros_like(rows.labels, dtype=torch.float32) for name in ("logps", "lse", *stats)},
            bitmap=bitmap,
        )

    @staticmethod
    def backward(head, rows, saved, upstream, routing, needs):
        assert upstream.coef.is_contiguous() and (routing is None) == (saved.bitmap is None)
        return Gradients(torch.zeros_like(head.hidden.flatten(0, -2)), torch.zeros_like(head.weight))


@pytest.mark.parametrize("call", CALLS)
def test_nothing_waits_between_the_call_and_the_engine(monkeypatch, call):
    """A tensor without data raises where one of a GPU would wait: at item(), nonzero(), indexing with a mask."""
    monkeypatch.setattr(library, "engine_of", lambda hidden: Zeros)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # neither knows this device
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    loss, *grads = with_gradients(call, *call_inputs("meta"))
    assert [x.device.type for x in (loss, *grads)] == ["meta"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("call", CALLS)
def test_nothing_waits_on_a_gpu(call):
    inputs = call_inputs("cuda")
    with_gradients(call, *inputs)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(call, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


N, V, H = 12, 40, 8
# What the exported Function is given for what it should be, and what the door says of it.
WRONG = {
    "more labels than rows": ({"labels": torch.zeros(18, dtype=torch.int64)}, ValueError, "labels must be shaped like"),
    "labels of floats": ({"labels": torch.zeros(N)}, TypeError, "labels must be int64 or int32"),
    "int8 weight": ({"weight": torch.zeros(V, H, dtype=torch.int8)}, TypeError, "weight must be fp32"),
    "another H": ({"weight": torch.zeros(V, 2 * H)}, ValueError, f"hidden has H = {H} but weight has H = {2 * H}"),
    "a short bias": ({"bias": torch.zeros(V - 1)}, ValueError, "bias must have shape"),
    "half a LoRA": ({"lora_a": torch.zeros(2, H)}, TypeError, "lora's B must be a torch.Tensor"),
    "LoRA of two ranks": ({"lora_a": torch.zeros(2, H), "lora_b": torch.zeros(V, 3)}, ValueError, "lora must be"),
    "another device": (
        {"weight": torch.zeros(V, H, device="meta")},
        ValueError,
        "weight is on meta but hidden is on cpu",
    ),
    "one double": ({"hidden": torch.zeros(N, H, dtype=torch.float64)}, TypeError, "fp64 is for checking"),
    "options as a dict": ({"options": {}}, TypeError, "options must be HeadOptions"),
    "an unknown statistic": ({"stats": ("variance",)}, ValueError, "stats must be a collection of names"),
    "a number for a flag": ({"differentiable": 1}, TypeError, "differentiable must be True or False"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_exported_function_checks_what_the_door_checks(engine, wrong):
    given, error, says = WRONG[wrong]
    call = {
        "hidden": torch.zeros(N, H), "weight": torch.zeros(V, H), "bias": None, "lora_a": None, "lora_b": None,
        "labels": torch.zeros(N, dtype=torch.int64), "options": HeadOptions(), "stats": (), "differentiable": True,
    }  # fmt: skip
    fastdpo.LinearLogpsFunction.apply(*call.values())
    with pytest.raises(error, match=says):
        fastdpo.LinearLogpsFunction.apply(*(call | given).values())


def test_the_exported_function_in_a_compiled_one():
    """torch.compile passes by its `apply`; the operators inside check what that would have."""
    torch._dynamo.reset()
    head, options = small_head(N=N, V=V, H=H).leaves(torch.float32), HeadOptions(tau=0.05, seed=1)

    def loss(hidden, weight, labels):
        return fastdpo.LinearLogpsFunction.apply(hidden, weight, None, None, None, labels, options, (), True)[0].sum()

    compiled = torch.compile(loss, backend="aot_eager")
    expected = torch.autograd.grad(loss(head.hidden, head.weight, head.labels), [head.hidden, head.weight])
    found = torch.autograd.grad(compiled(head.hidden, head.weight, head.labels), [head.hidden, head.weight])
    torch.testing.assert_close(found, expected)
    with pytest.raises(Exception, match="labels must be"):
        compiled(head.hidden, head.weight, head.labels.repeat(2))


def test_operators_check_their_tensors():
    inputs = operator_inputs("plain", None, False)
    library.token_stats_op(*inputs, **SCALARS, stats=[])
    for place, wrong in ((5, inputs[5].repeat(2)), (1, inputs[1].char()), (1, torch.zeros(300, 15))):
        with pytest.raises((ValueError, TypeError), match=r"labels must|weight must|hidden has H"):
            library.token_stats_op(*inputs[:place], wrong, *inputs[place + 1 :], **SCALARS, stats=[])
