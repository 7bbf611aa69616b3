"""The CPU engine's forward, in tiles and chunks of every size, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from heads import small_head

from fastdpo.head import LogitTransform, Routing
from fastdpo.ops import native, reference
from fastdpo.ops.cpu import operands
from fastdpo.ops.cpu.forward import forward
from fastdpo.ops.problem import FOLDED, Head, Tokens

if not native.available():
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)

TRANSFORM = LogitTransform(1.3, 6.0, 0.9)


def problem(dtype=torch.float32):
    torch.manual_seed(torch.initial_seed())  # the same one every time
    leaves = small_head(N=37, V=1500, H=24, bias=True).leaves(torch.float32, False)
    tensors = [x.to(dtype) for x in (leaves.hidden, leaves.weight, leaves.bias)]
    return Head(*tensors, None, TRANSFORM, dtype), Tokens(leaves.labels, None, None, 37)


@pytest.mark.parametrize("tile_bytes", [1, 1 << 13, 1 << 16, operands.TILE_BYTES])
def test_pieces_of_any_size_give_the_definition(monkeypatch, tile_bytes):
    monkeypatch.setattr(operands, "TILE_BYTES", tile_bytes)
    result = forward(*problem(), stats=frozenset(FOLDED))
    expected = reference.forward(*problem(torch.float64), stats=frozenset(FOLDED))
    assert torch.equal(result.is_top1, expected.is_top1)
    for name in ("logps", "lse", *FOLDED):
        x = getattr(result, name)
        if name != "is_top1":
            torch.testing.assert_close(x.double(), getattr(expected, name), rtol=2e-6, atol=2e-6, msg=name)


def test_only_what_is_asked_for():
    result = forward(*problem(), stats=frozenset(["mean_logit"]))
    assert result.mean_logit is not None and result.bitmap is None
    assert result.entropy is result.is_top1 is result.log_sum_sq_probs is result.most_pairs is None


@pytest.mark.parametrize("taus", [(0.02, 0.02), (0.05, 0.01)], ids=str)
def test_bits_do_not_depend_on_threads_or_chunks(monkeypatch, taus):
    routing, before = Routing.of(*taus, 2**64 - 3), torch.get_num_threads()
    results = []
    for threads, tile_bytes in ((1, operands.TILE_BYTES), (2, operands.TILE_BYTES), (2, 24 * 8 * 12)):
        monkeypatch.setattr(operands, "TILE_BYTES", tile_bytes)
        torch.set_num_threads(threads)
        results.append(forward(*problem(), routing=routing))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0].bitmap, other.bitmap) and torch.equal(results[0].most_pairs, other.most_pairs)
    assert torch.equal(results[0].logps, results[1].logps)
