"""The routing rule: its generator, its probabilities, its cost, and the gradients it gives."""

from __future__ import annotations

import pytest
import torch
from heads import peaked_head, relative_error, small_head

import fastdpo
from fastdpo import routing


def test_philox_known_answers():
    """Random123's published vectors for Philox4x32-10, zero and all-ones counter and key."""
    zero = routing.philox(0, torch.tensor(0), torch.tensor(0))
    assert [hex(x) for x in zero.tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_uniforms_are_uniform_and_independent_of_tiling():
    tokens, blocks = torch.arange(300), torch.arange(1002)
    u = routing.pair_uniforms(123456789012345, tokens, blocks)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    histogram = torch.histc(u, 64, 0, 1) / u.numel() * 64
    assert (histogram - 1).abs().max() < 0.1
    assert torch.equal(u[17:20, 5:9], routing.pair_uniforms(123456789012345, tokens[17:20], blocks[5:9]))
    for other in (routing.pair_uniforms(123456789012346, tokens, blocks), u.roll(1, 0), u.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_bits_round_trip():
    kept = torch.rand(9, 21) < 0.3
    assert torch.equal(routing.unpack_bits(routing.pack_bits(kept), 21), kept)


def test_rule():
    mass = torch.tensor([[0.5, 0.01, 0.001, float("nan"), 0.0]])
    labels = torch.tensor([4 * routing.BLOCK + 3])
    u = torch.tensor([[0.99, 0.99, 0.05, 0.5, 0.5]])
    kept = routing.kept_pairs(mass, labels, 0.01, u)
    assert kept.tolist() == [[True, True, True, True, True]]  # heavy, at tau, lucky, NaN, label
    assert routing.importance_weights(mass, labels, 0.01, u)[0, [0, 1, 4]].tolist() == [1.0, 1.0, 1.0]
    assert routing.importance_weights(mass, labels, 0.01, u)[0, 2].item() == pytest.approx(10.0)
    unlucky = routing.kept_pairs(mass, labels, 0.01, torch.full_like(u, 0.99))
    assert unlucky.tolist() == [[True, True, False, True, True]]


def test_smaller_tau_keeps_a_superset():
    mass, labels, u = torch.rand(50, 40) ** 6, torch.randint(0, 40 * 128, (50,)), torch.rand(50, 40)
    small, large = (routing.kept_pairs(mass, labels, tau, u) for tau in (1e-3, 1e-2))
    assert (small | ~large).all()


def masses(head):
    p = head.leaves(torch.float64, False).logits().softmax(-1)
    return torch.nn.functional.pad(p, (0, -p.shape[1] % 128)).view(p.shape[0], -1, 128).sum(-1)


def kept_by_engine(head, tau, seed):
    """The bitmap an engine saves, through the engine interface."""
    from fastdpo.ops import engine_for
    from fastdpo.ops.problem import Head, Rows

    leaves = head.leaves(torch.float32, False)
    problem = Head(leaves.hidden, leaves.weight, leaves.bias, None, None, 1.0, 1.0, 0.0, 1.0, torch.float32)
    rows = Rows(leaves.labels, -100, 0, leaves.weight.shape[0])
    key = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)
    result = engine_for(leaves.hidden.device, torch.float32).forward(
        problem, rows, stats=frozenset(), routing=routing.Routing(tau, tau, key), shards=None
    )
    return routing.unpack_bits(result.bitmap, routing.num_blocks(leaves.weight.shape[0]))


@pytest.mark.parametrize("kind", ["peaked", "random", "one-hot"])
def test_engine_keeps_what_the_rule_says(engine, kind):
    head = peaked_head(N=60, V=5000) if kind == "peaked" else small_head(N=60, V=5000)
    if kind == "one-hot":
        head.hidden *= 1e3
    tau, seed = 5e-3, 2**63 + 17
    mass = masses(head).float()
    uniforms = routing.pair_uniforms(seed, torch.arange(60), torch.arange(mass.shape[1]))
    expected = routing.kept_pairs(mass, head.labels, tau, uniforms)
    kept = kept_by_engine(head, tau, seed)
    undecided = (mass - tau * uniforms).abs() < 1e-4 * mass  # rounding decides
    assert (kept == expected)[~undecided].all() and undecided.float().mean() < 1e-2


@pytest.mark.parametrize("kind,sharpness", [("peaked", 1.0), ("flat", 0.05), ("random", 1.0)])
def test_expected_pairs_per_token_are_bounded(engine, kind, sharpness):
    head = peaked_head(N=64, V=32768) if kind == "peaked" else small_head(N=64, V=32768, sharpness=sharpness)
    for tau in (1e-1, 2e-2):
        counts = torch.stack([kept_by_engine(head, tau, seed).sum(1).double() for seed in range(3)])
        standard_error = counts.std() / counts.numel() ** 0.5
        assert counts.mean() <= 1 / tau + 1 + 3 * standard_error


@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_routed_gradient_is_unbiased(engine, kind, monkeypatch):
    """Mean over 200 seeds (50 in Triton's interpreter) as near the exact gradient as its standard error says."""
    seeds = 50 if engine == "triton" and not torch.cuda.is_available() else 200
    if engine == "triton":  # or a flat head's gradient is computed exactly
        from fastdpo.ops import triton_gradients

        monkeypatch.setattr(triton_gradients, "CROSSOVER", 1.0)
    head = peaked_head(N=32, V=2048, H=16) if kind == "peaked" else small_head(32, 2048, 16, sharpness=0.05)
    leaves = head.leaves(torch.float32)
    dlogps = torch.randn(leaves.labels.shape)
    inputs = [leaves.hidden, leaves.weight]
    tau = (0.2, 0.1)  # above the mass of most blocks, so that sampling matters on both heads

    def gradients(**options):
        logps = fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, **options)
        return [g.flatten().double() for g in torch.autograd.grad((logps * dlogps).sum(), inputs)]

    exact = gradients(backward="exact")
    directions = [torch.randn(64, g.numel(), dtype=torch.float64) for g in exact]
    directions = [torch.cat([d, g[None]]) for d, g in zip(directions, exact)]  # and the gradient's own
    samples: list[list[torch.Tensor]] = [[], []]
    for seed in range(seeds):
        for store, g, d in zip(samples, gradients(tau=tau, seed=seed), directions):
            store.append(d @ g)
    for store, g, d in zip(samples, exact, directions):
        values, expected = torch.stack(store), d @ g
        rounding = 1e-6 * d.norm(dim=1) * g.norm()  # fp32 gradients: where sampling noise is smaller than that
        error = (values.mean(0) - expected) / (values.std(0) / seeds**0.5 + rounding)
        assert values.std(0).min() > 0  # something was sampled
        # The mean square is about 1, and above 2 once in 30 draws: few pairs make most of the noise that 65 directions
        # share. A bias of two standard errors would make it 5.
        assert error.pow(2).mean() < 4.0 and error.abs().max() < 6.0


def test_error_shrinks_with_tau_and_stays_below_bf16_eager(engine):
    head = peaked_head(N=256, V=8192, H=64).rounded(torch.bfloat16)
    head.logps().sum().backward()
    exact = {name: x.grad for name, x in head.tensors().items()}

    eager = head.leaves(torch.bfloat16)
    logits = eager.hidden @ eager.weight.T
    logits.float().log_softmax(-1).gather(1, head.labels[:, None]).sum().backward()
    errors = {}
    for tau in (1e-1, 1e-2, None):
        leaves = head.leaves(torch.float32)
        fastdpo.linear_logps(leaves.hidden, leaves.weight, leaves.labels, tau=tau, seed=1).sum().backward()
        errors[tau] = [relative_error(x.grad, exact[name]) for name, x in leaves.tensors().items()]
    assert all(a > b > c for a, b, c in zip(*errors.values()))
    for ours, (name, x) in zip(errors[None], eager.tensors().items()):
        assert ours <= relative_error(x.grad, exact[name])


def test_routed_backward_repeats_bit_for_bit_and_seed_none_follows_torch(engine):
    head = peaked_head(N=64, V=4096).leaves(torch.float32)

    def gradients(**options):
        logps = fastdpo.linear_logps(head.hidden, head.weight, head.labels, tau=0.05, **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), [head.hidden, head.weight])])

    assert torch.equal(gradients(seed=4), gradients(seed=4))
    assert not torch.equal(gradients(seed=4), gradients(seed=5))
    torch.manual_seed(0)
    first = gradients()
    second = gradients()
    torch.manual_seed(0)
    assert torch.equal(first, gradients()) and not torch.equal(first, second)


def test_activation_checkpointing_repeats_the_draws(engine):
    from torch.utils.checkpoint import checkpoint

    head = peaked_head(N=64, V=4096).leaves(torch.float32)

    def loss(hidden, weight):
        return fastdpo.linear_logps(hidden, weight, head.labels, tau=0.05).sum()

    torch.manual_seed(3)
    plain = torch.autograd.grad(loss(head.hidden, head.weight), [head.hidden, head.weight])
    torch.manual_seed(3)
    again = checkpoint(loss, head.hidden, head.weight, use_reentrant=False)
    again = torch.autograd.grad(again, [head.hidden, head.weight])
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
