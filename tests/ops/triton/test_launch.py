"""The Triton engine beyond what the shared suite sees: its ranges, rounds and slabs, both sides of the crossover, what
it launches, and that nothing in it waits for the device.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from heads import peaked_head, relative_error, small_head

import fastdpo
from fastdpo.head import LogitTransform, LoRA, Routing
from fastdpo.ops import reference
from fastdpo.ops.problem import STATS, Forward, Head, Needs, Rows, Tokens, Upstream

if fastdpo.backends()["engines"]["triton"]["reason"]:
    pytest.skip(fastdpo.backends()["engines"]["triton"]["reason"], allow_module_level=True)

from fastdpo.ops.triton import backward as triton_gradients
from fastdpo.ops.triton import call as triton_call
from fastdpo.ops.triton import forward as triton_engine
from fastdpo.ops.triton import memory as triton_memory
from fastdpo.ops.triton import routed_products
from fastdpo.ops.triton.launch import Recorder, Target

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SEED = 2**63 + 12345


@pytest.fixture
def small_workspaces(monkeypatch):
    """A few tokens, blocks and pairs at a time, as a large problem has them."""
    sums = 128 * 48 * 4  # of 128 tokens
    sizes = {
        "FORWARD_HIDDEN": 1, "SUMS": sums, "HIDDEN": 1, "WORKSPACE": sums + 128 * 128 * 2 * 3, "LISTS": 4 * 128 * 6,
    }  # fmt: skip
    for name, size in sizes.items():
        monkeypatch.setattr(triton_memory, name, size)


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

    def run(self, coef, coef_entropy=None, needs=None, stats=STATS) -> tuple:
        needs = needs or Needs(*(x is not None for x in self.head.inputs))
        coef = coef.to(DEVICE)
        coef_entropy = None if coef_entropy is None else coef_entropy.to(DEVICE)
        mine = self.routing(True, needs) if coef_entropy is None else None
        saved = triton_engine.forward(self.head, self.rows, stats=frozenset(stats), routing=mine, shards=None)
        ours = triton_gradients.backward(self.head, self.rows, saved, Upstream(coef, coef_entropy), mine, needs)
        plain = self.routing(False, needs) if coef_entropy is None else None
        expected = reference.forward(self.oracle, self.tokens, stats=frozenset(stats), routing=plain)
        upstream = Upstream(*(None if c is None else c[self.keep].double() for c in (coef, coef_entropy)))
        grads = reference.backward(self.oracle, self.tokens, expected, upstream, plain, needs)
        return saved, expected, ours, grads

    def check(self, coef, coef_entropy=None, needs=None, tolerance=5e-6) -> None:
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
            rounding = 2 * relative_error(gradient.to(mine.dtype), gradient)
            assert relative_error(mine, gradient) < (tolerance if mine.dtype == torch.float32 else rounding), name


ROUTED = {"exact": None, "routed": (0.2, 0.05), "one tau": (0.1, 0.1), "smaller tau for dhidden": (0.02, 0.1)}


@pytest.mark.parametrize("how", ROUTED)
@pytest.mark.parametrize("crossover", [1.0, 0.0])
def test_many_ranges_rounds_and_slabs(small_workspaces, monkeypatch, how, crossover):
    """300 tokens in ranges of 128, 8 blocks in lists of a few, dweight in slabs summed over three chunks of tokens."""
    if ROUTED[how] is None and crossover == 0.0:
        pytest.skip("the exact backward has no crossover")
    monkeypatch.setattr(triton_gradients, "CROSSOVER", crossover)
    head = peaked_head(N=300, V=1000, H=48)
    head.bias = torch.randn(1000, dtype=torch.float64)
    head.lora = (torch.randn(4, 48).double() * 0.1, torch.randn(1000, 4).double() * 0.1, 0.7)
    head.labels[torch.rand(300) < 0.2] = -100
    case = Case(head, routed=ROUTED[how] if crossover else None, softcap=20.0)
    if crossover == 0.0:  # every call finds too many pairs: the exact gradient, from the routed call's launches
        needs = Needs(True, True, True, True, True)
        case.routed = ROUTED[how]
        mine = case.routing(True, needs)
        coef = torch.randn(300).to(DEVICE)
        saved = triton_engine.forward(case.head, case.rows, stats=frozenset(), routing=mine, shards=None)
        ours = triton_gradients.backward(case.head, case.rows, saved, Upstream(coef), mine, needs)
        expected = reference.forward(case.oracle, case.tokens)
        grads = reference.backward(
            case.oracle, case.tokens, expected, Upstream(coef[case.keep].double()), None, needs
        )  # fmt: skip
        for name, gradient in vars(grads).items():
            assert relative_error(getattr(ours, name), gradient) < 5e-6, name
        return
    case.check(torch.randn(300))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("crossover", [1.0, 0.0])
def test_ranges_that_chunks_do_not_divide(monkeypatch, crossover, trained):
    """Ranges of 384 tokens in chunks of 256, as large problems of some widths have them: 2560 in bf16, say."""
    row = 4 * 48
    sizes = {"SUMS": 384 * row, "HIDDEN": 256 * row, "WORKSPACE": (384 + 256) * row + 256 * 128 * 4 * 2}
    for name, size in sizes.items():
        monkeypatch.setattr(triton_memory, name, size)
    monkeypatch.setattr(triton_gradients, "CROSSOVER", crossover)
    case = Case(peaked_head(N=600, V=700, H=48))
    needs = Needs(True, trained, False, False, False)
    routing = None
    if crossover == 0.0:  # the exact path of a routed call
        case.routed = (0.1, 0.1)
        routing = case.routing(True, needs)
    saved = triton_engine.forward(case.head, case.rows, stats=frozenset(), routing=routing, shards=None)
    coef = torch.randn(600).to(DEVICE)
    ours = triton_gradients.backward(case.head, case.rows, saved, Upstream(coef), routing, needs)
    expected = reference.forward(case.oracle, case.tokens)
    upstream = Upstream(coef[case.keep].double())
    grads = reference.backward(case.oracle, case.tokens, expected, upstream, None, needs)
    assert relative_error(ours.hidden, grads.hidden) < 5e-6
    if trained:
        assert relative_error(ours.weight, grads.weight) < 5e-6


def test_the_workspace_is_spent_within_its_bound():
    """Of every width and length: what a sweep holds at once, and that a range is whole tiles of tokens."""
    for n, h, item in itertools.product([1, 300, 4096, 10_000, 1 << 20], [64, 2304, 2560, 4096, 8192, 16384], [2, 4]):
        row, sums = h * item, 4 * h
        size, fits = triton_memory.range_size(n, row, sums)
        assert size % 128 == 0 and size > 0
        sweeps = [(triton_memory.hidden_slab(size, row, item, sums, joint=False), size * sums, 0)]
        if fits:
            assert size >= n
            sweeps.append((triton_memory.hidden_slab(size, row, item, sums, joint=True), size * sums, 0))
            assert sweeps[-1][0][0] == size
        everything = -(-n // 128) * 128
        slab = triton_memory.weight_slab(everything, row, item, sums)
        sweeps.append((slab, 0, 128 * sums if slab[0] < everything else 0))
        for (tokens, blocks), held, per_block in sweeps:
            assert tokens % 128 == 0 and blocks >= 1
            used = held + tokens * row + blocks * (per_block + 128 * item * tokens)
            assert used <= max(triton_memory.WORKSPACE, held + 128 * row + per_block + 128 * item * 128)
            assert used <= 128 << 20


@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [48, 33])  # 33: rows that TMA cannot address
def test_types_and_alignments(monkeypatch, how, dtype, H):
    monkeypatch.setattr(triton_gradients, "CROSSOVER", 1.0)
    head = small_head(N=50, V=700, H=H, bias=True, masked=True)
    Case(head, dtype, ROUTED[how], scale=0.5, temperature=1.2).check(torch.randn(50))


@pytest.mark.parametrize("how", ["exact", "routed"])
def test_small_upstream_gradients_survive_fp16(monkeypatch, how):
    monkeypatch.setattr(triton_gradients, "CROSSOVER", 1.0)
    head = small_head(N=20, V=300)
    head.hidden *= 0.3
    Case(head, torch.float16, ROUTED[how]).check(torch.randn(20).abs() * 1e-4 + 1e-4)


@pytest.mark.parametrize("how", ["exact", "routed"])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_asked_for(monkeypatch, how, needs):
    monkeypatch.setattr(triton_gradients, "CROSSOVER", 1.0)
    head = small_head(N=40, V=700)
    Case(head, routed=ROUTED[how]).check(torch.randn(40), needs=Needs(*needs, False, False, False))


def test_entropy_gradient_of_rows_without_a_logp_gradient():
    head = small_head(N=40, V=700, bias=True, masked=True)
    coef = torch.randn(40)
    coef[::3] = 0
    Case(head, softcap=5.0).check(coef, torch.randn(40))


def test_weight_of_another_type():
    head = small_head(N=30, V=300)
    case = Case(head, torch.bfloat16, weight_dtype=torch.float32)
    saved, expected, ours, grads = case.run(torch.randn(30))
    torch.testing.assert_close(saved.logps.double(), expected.logps, rtol=1e-5, atol=5e-6)
    assert ours.weight.dtype == torch.float32 and ours.hidden.dtype == torch.bfloat16
    assert relative_error(ours.weight, grads.weight) < 5e-3


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_add_dhidden_in_order(monkeypatch, deterministic):
    """Whatever the groups of tokens that the programs have: 1, 2 or 4 of the 4 x 128. (A row's bits depend on its place
    in a product of the interpreter's, so there only equal groups give equal bits.)"""
    monkeypatch.setattr(triton_gradients, "CROSSOVER", 1.0)
    launches = []
    launch = routed_products.launch

    def spy(kernel, grid, *tile, **arguments):
        launches.append((kernel.__name__, grid))
        launch(kernel, grid, *tile, **arguments)

    monkeypatch.setattr(routed_products, "launch", spy)
    head, coef = peaked_head(N=400, V=1500), torch.randn(400)
    results, groups = [], set()
    for programs in (1, 2, 100, 100):
        launches.clear()
        monkeypatch.setattr(triton_call, "target_of", lambda device, programs=programs: Target(0, programs))
        *_, ours, expected = Case(head, routed=(0.1, 0.05)).run(coef)
        assert relative_error(ours.hidden, expected.hidden) < 5e-6
        results.append(ours.hidden)
        names = [name for name, _ in launches]
        assert "ordered_dhidden_kernel" in names and "routed_dhidden_kernel" not in names
        groups |= {grid[1] for name, grid in launches if name == "ordered_dhidden_kernel"}
    assert groups == {1, 2, 4} and results[2].equal(results[3])
    assert DEVICE == "cpu" or all(result.equal(results[0]) for result in results)


def test_ordered_dhidden_through_rounds_and_ranges(small_workspaces, monkeypatch, deterministic):
    monkeypatch.setattr(triton_gradients, "CROSSOVER", 1.0)
    Case(small_head(N=300, V=1500, lora=True, masked=True), torch.bfloat16, (0.1, 0.05)).check(torch.randn(300))


OPTIONS = {
    "exact": {},
    "routed": {"routed": True},
    "everything": {"routed": True, "extras": True, "stats": frozenset(STATS)},
    "entropy": {"extras": True, "entropy": True, "stats": frozenset(("entropy",))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_waits_for_the_device(options):
    """On tensors without values every read of one raises: sizes and branches come from shapes alone."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    extras = options.get("extras", False)
    N, V, H = 5000, 50000, 256
    head = Head(
        meta(N, H),
        meta(V, H),
        meta(V) if extras else None,
        LoRA(meta(8, H), meta(V, 8), 2.0) if extras else None,
        compute_dtype=torch.bfloat16,
    )
    rows = Rows(meta(N, dtype=torch.int64), -100, 0, V)
    key = Routing.of(2.0**-10, 2.0**-12, meta(dtype=torch.int64)) if options.get("routed") else None
    needs = Needs(True, True, extras, extras, extras)
    with Recorder(Target(90, 132)) as launches:
        saved = triton_engine.forward(head, rows, stats=options.get("stats", frozenset()), routing=key, shards=None)
        coef = meta(N, dtype=torch.float32)
        upstream = Upstream(coef, coef if options.get("entropy") else None)
        grads = triton_gradients.backward(head, rows, saved, upstream, key, needs)
    assert isinstance(saved, Forward) and grads.weight.shape == (V, H)
    names = {kernel.__name__ for kernel, *_ in launches}
    assert {"compact_kernel", "fold_kernel", "finish_kernel", "dz_kernel", "dweight_kernel", "dhidden_kernel"} <= names
    assert ("routed_dz_kernel" in names) == (key is not None)
