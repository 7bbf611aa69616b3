"""seq_group: ranks that each hold some tokens of every sequence give what one process with all of them gives."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from heads import relative_error

import fastdpo

B, H, V, IGNORE = 3, 8, 300, -100
CASES = {
    "sigmoid": ({}, "ref_hidden"),
    "simpo": ({"loss_type": "simpo", "beta": 2.0}, None),
    "sft, orpo": ({"loss_type": ["sft", "orpo"], "loss_weights": [0.7, 2.0]}, None),
    "ipo": ({"loss_type": "ipo", "beta": 0.4}, "per token"),
    "aot": ({"loss_type": "aot"}, "per sequence"),
    "kto": ({"loss_type": "kto", "kto_kl": torch.tensor([0.3])}, "ref_hidden"),
    "LD": ({"ld_alpha": 0.3}, "per token"),
    "WPO": ({"use_weighting": True}, "per sequence"),
    "average": ({"average_log_prob": True, "loss_type": ["hinge", "sft"], "beta": 0.5}, "ref_hidden"),
    "all": (
        {"ld_alpha": 0.0, "use_weighting": True, "average_log_prob": True, "loss_type": ["sigmoid", "sft"]},
        "per token",
    ),
    "TDPO": ({"loss_type": ["tdpo1", "tdpo2", "sft"], "tdpo_alpha": 0.7, "beta": 0.5}, "ref_hidden"),
    "TDPO, LD, WPO": ({"loss_type": "tdpo1", "ld_alpha": 0.3, "use_weighting": True}, "ref_hidden"),
    "LD, zero": ({"ld_alpha": 0.0}, "per sequence"),
}
LAYOUTS = ("contiguous", "zigzag", "striped", "anyhow")
UPSTREAM = torch.tensor([0.5, -1.0, 2.0])


def whole_batch(layout: str, size: int, packed: bool, seed: int = 0):
    """(tensors of all tokens, 2B sequences of them, what each rank holds of each: positions, in the order it has)."""
    generator = torch.Generator().manual_seed(seed)
    unit = 2 * size if layout == "zigzag" else 1
    longest = {2: 12, 3: 12, 4: 16}[size]
    lengths = [longest] * (2 * B)
    if packed:
        lengths = [unit * int(torch.randint(0, 1 + longest // unit, (), generator=generator)) for _ in lengths]
        lengths[0], lengths[1], lengths[B] = longest, 0, longest - unit  # one without a token
    parts = [[None] * (2 * B) for _ in range(size)]
    shares = None
    for s, length in enumerate(lengths):
        if layout == "zigzag":
            chunks = torch.arange(length).view(2 * size, -1)
            held = [torch.cat([chunks[r], chunks[2 * size - 1 - r]]) for r in range(size)]
        elif layout == "striped":
            held = [torch.arange(length)[r::size] for r in range(size)]
        else:
            if shares is None or packed:  # uneven; of three ranks and more, the second has none
                cuts = torch.randint(0, length + 1, (size - 1,), generator=generator).sort().values.tolist()
                shares = [b - a for a, b in itertools.pairwise([0, *cuts, length])]
                if size > 2:
                    shares[0], shares[1] = shares[0] + shares[1], 0
            order = torch.arange(length) if layout == "contiguous" else torch.randperm(length, generator=generator)
            held = list(order.split(shares))
        for r in range(size):
            parts[r][s] = held[r]
    total = sum(lengths)
    labels = torch.randint(0, V, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.35] = IGNORE
    labels[total - lengths[-1] :] = IGNORE  # all of the last is prompt
    draw = {"generator": generator, "dtype": torch.float32}
    tensors = {
        "hidden": torch.randn(total, H, **draw),
        "weight": torch.randn(V, H, **draw) / 2,
        "bias": torch.randn(V, **draw),
        "labels": labels,
        "ref_hidden": torch.randn(total, H, **draw),
        "per token": -torch.rand(total, **draw) - 3,
        "per sequence": -10 * torch.rand(2 * B, **draw) - 3,
    }
    return tensors, lengths, parts


def arguments(tensors, lengths, held, case: str, packed: bool, dtype: torch.dtype) -> dict:
    """Of a call on the tokens that are `held`, of each sequence; a leaf for each gradient."""
    starts = [0, *itertools.accumulate(lengths)]
    rows = torch.cat([start + positions for start, positions in zip(starts, held)])
    shape = (-1,) if packed else (2 * B, len(held[0]))

    def local(name):
        x = tensors[name][rows]
        return x.reshape(*shape, *x.shape[1:]) if not packed else x

    options, reference = CASES[case]
    given = {name: tensors[name].to(dtype, copy=True).requires_grad_() for name in ("weight", "bias")}
    given["hidden"] = local("hidden").to(dtype).requires_grad_()
    given["labels"] = local("labels")
    if reference == "ref_hidden":
        given["ref_hidden"] = local("ref_hidden").to(dtype)
    elif reference == "per token":
        given["ref_logps"] = local("per token").to(dtype).requires_grad_()
    elif reference == "per sequence":
        given["ref_logps"] = tensors["per sequence"].to(dtype, copy=True).requires_grad_()
    if packed:
        given["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(len(x) for x in held)])
    return given | options


def run(given: dict, **options) -> tuple[list, dict]:
    """(the result, gradients of all that takes one) of an upstream gradient that is the same on every rank."""
    out = fastdpo.linear_dpo_loss(**given, **options)
    upstream = UPSTREAM.to(out.loss.dtype)
    (out.loss + (out.losses + 0.1 * out.chosen_logps - 0.2 * out.rejected_logps) @ upstream).backward()
    grads = {name: x.grad for name, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    return [x.detach() for x in out], grads


def _tokens(rank, size, layout, packed, case, group=None, **options):
    tensors, lengths, parts = whole_batch(layout, size, packed)
    given = arguments(tensors, lengths, parts[rank], case, packed, torch.float32)
    if "ld_alpha" in given and layout != "contiguous":
        places = torch.cat(parts[rank]) if packed else torch.stack(parts[rank])
        given["seq_positions"] = "zigzag" if layout == "zigzag" else places.int() if rank else places
    return run(given, **{"backward": "exact", "seq_group": group or dist.group.WORLD, **options})


def _all_cases(rank, size, layout, packed):
    return {case: _tokens(rank, size, layout, packed, case) for case in CASES}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_parts_of_sequences_equal_whole_ones(size, layout, packed, ranks, monkeypatch):
    found = ranks(size)(_all_cases, layout, packed)
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    tensors, lengths, parts = whole_batch(layout, size, packed)
    for case in CASES:
        check_case(case, [x[case] for x in found], tensors, lengths, parts, packed)


def check_case(case, found, tensors, lengths, parts, packed, factor: float = 1.0):
    everything = [torch.arange(length) for length in lengths]
    given = arguments(tensors, lengths, everything, case, packed, torch.float64)
    result, grads = run(given, backward="exact")
    for out, local in found:
        for ours, others, expected in zip(out, found[0][0], result):
            assert torch.equal(ours, others), case  # bit for bit
            assert relative_error(ours, expected) < 2e-6, case
        assert local.keys() == grads.keys()
    assert all(x.abs().max() > 0 for x in grads.values()), case  # of zeros the comparison would be easy
    for name, expected in grads.items():
        per_token = name == "hidden" or (name == "ref_logps" and CASES[case][1] == "per token")
        if not per_token:
            total = sum(local[name].double() for _, local in found)
            assert relative_error(total, factor * expected) < 2e-6, (case, name)
            continue
        starts, flat = [0, *itertools.accumulate(lengths)], expected.reshape(sum(lengths), -1)
        for (_, local), held in zip(found, parts):
            rows = torch.cat([start + positions for start, positions in zip(starts, held)])
            part = local[name].double().reshape(len(rows), flat.shape[1]) - factor * flat[rows]
            assert part.norm() < 2e-6 * factor * flat.norm(), (case, name)


def _options(rank, size, options):
    return _tokens(rank, size, "zigzag", False, "LD", **options)


@pytest.mark.parametrize(
    "options,factor",
    [({"seq_grads": "mean"}, 2.0), ({"backward": "routed", "tau": 0.0}, 1.0)],
    ids=["mean", "routed, every pair"],
)
def test_gradients_times_the_size_and_routed_ones(options, factor, ranks, monkeypatch):
    found = ranks(2)(_options, options)
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    check_case("LD", found, *whole_batch("zigzag", 2, False), False, factor)


def _draws(rank, size, seed):
    torch.manual_seed(5)  # the same on every rank
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 16, H, generator=generator).requires_grad_()
    weight = torch.randn(2000, H, generator=generator) / 3
    labels = torch.randint(0, 2000, (2, 16), generator=generator)
    options = {"backward": "routed", "tau": 0.5, "seed": seed}
    fastdpo.linear_dpo_loss(hidden, weight, labels, seq_group=dist.group.WORLD, **options).loss.backward()
    alone = hidden.detach().requires_grad_()
    fastdpo.linear_logps(alone, weight, labels, **options).sum().backward()
    return hidden.grad


@pytest.mark.parametrize("seed", [None, 2**64 - 1])
def test_tokens_of_two_ranks_do_not_share_draws(seed, ranks):
    """Both have the same tokens here, under the same indices."""
    first, second = ranks(2)(_draws, seed)
    assert relative_error(first, second) > 1e-2
    assert torch.equal(first, ranks(2)(_draws, seed)[0])


def _meshed(rank, size):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh["cp"], mesh["tp"].get_group()
    tensors, lengths, parts = whole_batch("zigzag", 2, True)
    rows = slice(0, 128) if tp.rank() == 0 else slice(128, None)
    tensors |= {"weight": tensors["weight"][rows], "bias": tensors["bias"][rows]}
    found = {}
    for case in ("LD", "average", "TDPO"):
        given = arguments(tensors, lengths, parts[cp.get_local_rank()], case, True, torch.float32)
        if case == "LD":
            given["seq_positions"] = "zigzag"
        found[case] = run(given, backward="exact", seq_group=cp, vocab_group=tp)
    with pytest.raises(ValueError, match=r"seq_group must be a one-dimensional mesh; got one of shape \(2, 2\)"):
        fastdpo.linear_dpo_loss(**given, seq_group=mesh)
    return found


def test_beside_shards_of_the_vocabulary(ranks, monkeypatch):
    found = ranks(4)(_meshed)
    monkeypatch.setenv("FASTDPO_ENGINE", "reference")
    tensors, lengths, parts = whole_batch("zigzag", 2, True)
    for case in ("LD", "average", "TDPO"):
        joined = []
        for first, second in (found[:2], found[2:]):  # ranks of one part: shards 0 and 1
            (out, grads), (other, others) = first[case], second[case]
            assert all(torch.equal(a, b) for a, b in zip(out, other))
            assert relative_error(others["hidden"], grads["hidden"]) < 1e-6
            shards = {name: torch.cat([grads[name], others[name]]) for name in ("weight", "bias")}
            joined.append((out, grads | shards))
        check_case(case, joined, tensors, lengths, parts, True)


COUNTS = {"simpo": 2, "tdpo2": 6}  # of the tensors that a loss reads


def _preference(rank, size, parts, lengths, options):
    """`parts`: [size, 6, B] of each rank."""
    leaves = [x.clone().requires_grad_() for x in parts[rank][: COUNTS.get(options["loss_type"], 4)]]
    lengths = None if options["loss_type"] == "sigmoid" else [x.int() for x in lengths[rank]]
    given = dict(zip(("chosen_lengths", "rejected_lengths"), lengths or ()))
    given |= dict(zip(("chosen_kl", "rejected_kl"), leaves[4:]))
    out = fastdpo.preference_loss(*leaves[:4], **given, **options, seq_group=dist.group.WORLD)
    (out.loss + out.losses @ UPSTREAM).backward()
    return [x.detach() for x in out], [x.grad for x in leaves]


@pytest.mark.parametrize("seq_grads", ["sum", "mean"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo", "ipo", "aot", "tdpo2"])
def test_preference_loss_of_parts_of_sums(loss_type, seq_grads, ranks):
    """Of all eight tensors; a whole reference stands on one rank."""
    parts, lengths = -torch.rand(3, 6, B), torch.randint(0, 9, (3, 2, B))
    parts[1:, 2:4], lengths[1] = 0.0, 0
    options = {"loss_type": loss_type, "beta": 0.7}
    found = ranks(3)(_preference, parts, lengths, {**options, "seq_grads": seq_grads})
    leaves = [x.requires_grad_() for x in parts.double().sum(0)[: COUNTS.get(loss_type, 4)].unbind()]
    needed = {} if loss_type == "sigmoid" else dict(zip(("chosen_lengths", "rejected_lengths"), lengths.sum(0)))
    needed |= dict(zip(("chosen_kl", "rejected_kl"), leaves[4:]))
    expected = fastdpo.preference_loss(*leaves[:4], **needed, **options)
    (expected.loss + expected.losses @ UPSTREAM.double()).backward()
    for out, grads in found:
        assert all(torch.equal(a, b) for a, b in zip(out, found[0][0]))
        assert all(relative_error(a, b) < 2e-6 for a, b in zip(out, expected))
        for grad, leaf in zip(grads, leaves):
            if loss_type == "tdpo2" and leaf is leaves[4]:
                assert not leaf.grad.any() and not grad.any()
                continue
            assert relative_error(grad, leaf.grad * (3 if seq_grads == "mean" else 1)) < 2e-6


def _empty(rank, size):
    weight, group, found = torch.randn(V, H).requires_grad_(), dist.group.WORLD, []
    offsets = torch.zeros(2 * B + 1, dtype=torch.int32)
    for shape, options in (
        ((0, 4), {}),
        ((0, 0), {"ld_alpha": 0.5, "seq_positions": "zigzag"}),
        ((2 * B, 0), {"ld_alpha": 0.5}),
        ((2 * B, 2), {"ld_alpha": 0.5, "seq_positions": torch.zeros(2 * B, 2, dtype=torch.int64)}),
        ((0,), {"cu_seqlens": offsets, "loss_type": ["sft", "orpo"]}),
        ((0,), {"cu_seqlens": offsets[:1], "ld_alpha": 0.5, "loss_type": "aot", "ref_logps": torch.zeros(0)}),
    ):
        hidden, weight.grad = torch.full((*shape, H), torch.nan, requires_grad=True), None
        labels = torch.full(shape, IGNORE)
        out = fastdpo.linear_dpo_loss(hidden, weight, labels, seq_group=group, check_labels=True, **options)
        out.loss.backward()
        assert hidden.grad.count_nonzero() == 0 and weight.grad.count_nonzero() == 0
        assert out.chosen_logps.count_nonzero() == 0
        found.append([x.detach() for x in out])
    return found


def test_nothing_to_score(ranks):
    first, second = ranks(2)(_empty)
    for mine, others in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(mine, others))
        assert mine[0].isfinite() and (len(mine[1]) or mine[0] == 0)


def _compiled(rank, size):
    tensors, lengths, parts = whole_batch("contiguous", size, False)
    group = dist.group.WORLD

    @torch.compile(backend="eager")
    def step(given):
        return fastdpo.linear_dpo_loss(**given, seq_group=group, backward="exact").loss * 2

    losses = []
    for call in (step, step.__wrapped__ if hasattr(step, "__wrapped__") else step._torchdynamo_orig_callable):
        given = arguments(tensors, lengths, parts[rank], "LD", False, torch.float32)
        loss = call(given)
        loss.backward()
        losses.append((loss.detach(), given["hidden"].grad))
    return losses


def test_torch_compile_breaks_its_graph_there_and_goes_on(ranks):
    for (loss, grad), (expected, expected_grad) in ranks(2)(_compiled):
        assert torch.equal(loss, expected) and torch.equal(grad, expected_grad)
