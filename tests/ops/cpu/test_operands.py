"""The tiles that the CPU engine multiplies, of factors in any layout and type, by csrc's every instruction set."""

from __future__ import annotations

import pytest
import torch
from heads import relative_error, small_head

from fastdpo.head import LoRA
from fastdpo.ops import native
from fastdpo.ops.cpu import library, operands
from fastdpo.ops.cpu.operands import Operands, Space, Tile
from fastdpo.ops.problem import Head, Tokens

C = native.EXTENSION
if C is None:
    pytest.skip(f"no native extension here: {native.REASON}", allow_module_level=True)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=C.supported_isas())
def isa(request):
    before = C.isa()
    assert C.use_isa(request.param)
    yield request.param
    C.use_isa(before)


def rows_of(count: int, columns: int, dtype: torch.dtype, apart: int) -> torch.Tensor:
    return torch.randn(count, columns + apart).to(dtype)[:, :columns]


def pairs(vocab_size: int, lists: list[list[int]], first_block: int = 0) -> Tile:
    """Of the tokens of each block."""
    tokens = torch.tensor([token for tokens in lists for token in tokens], dtype=torch.int32)
    offsets = torch.tensor([0, *(len(tokens) for tokens in lists)]).cumsum(0)
    blocks = torch.arange(first_block, first_block + len(lists), dtype=torch.int32)
    data = Space().take(len(tokens), 128).fill_(torch.nan)
    return Tile(data, first_block, len(lists), vocab_size, 0, blocks, offsets, tokens)


LISTS = [[0, 3, 7, 8, 30], [], list(range(31)), [5]]


@pytest.mark.parametrize("columns", [1, 15, 37, 256, 300, 517])
@pytest.mark.parametrize("dtype", [*FLOATS, "csrc's bf16", "a library's bf16"], ids=str)
def test_products_and_both_sums_of_listed_rows(isa, monkeypatch, dtype, columns):
    """Whatever depth is left over, whatever lies between rows, with rows in another order than tokens."""
    own, by_library = dtype == "csrc's bf16", dtype == "a library's bf16"
    if by_library and not library.has_bf16():
        pytest.skip("this torch has no such MKL")
    monkeypatch.setattr(library, "OWN_BF16", own)
    monkeypatch.setattr(library, "USES_BF16", by_library)
    dtype = torch.bfloat16 if own or by_library else dtype
    vocab_size, count, rows = 3 * 128 + 77, 31, torch.randperm(40)[:31]
    hidden, weight = rows_of(40, columns, dtype, 3), rows_of(vocab_size, columns, dtype, 5)
    head = Head(hidden, weight, compute_dtype=dtype)
    ops = Operands(head, Tokens(torch.zeros(count, dtype=torch.int64), rows, rows, 40))
    tile = ops.multiply(pairs(vocab_size, LISTS), None, 0)
    assert ops.weight_factor(tile)["product"] == (2 if by_library else 0)
    x, y = hidden[rows].double(), weight.double()
    row, dhidden, dweight = 0, torch.zeros_like(x), torch.zeros_like(y)
    for block, tokens in enumerate(LISTS):
        of_block = slice(128 * block, min(128 * block + 128, vocab_size))
        for token in tokens:
            dz = tile.data[row, : of_block.stop - of_block.start]
            expected = x[token] @ y[of_block].T
            torch.testing.assert_close(dz.double(), expected, rtol=1e-5, atol=1e-6 * columns)
            dz = dz.bfloat16() if by_library else dz
            dhidden[token] += dz.double() @ y[of_block]
            dweight[of_block] += dz.double()[:, None] * x[token]
            row += 1
    out = Space().take(count, columns).zero_()
    threads = {"num_threads": 2}
    C.add_to_tokens(**tile.fields, row_weight=None, **ops.weight_factor(tile), out=out, out_first=0, **threads)
    assert relative_error(out, dhidden) < 1e-6
    for fresh, kind in ((False, torch.float32), (True, torch.float32), (True, dtype)):
        out = torch.full((vocab_size, columns), torch.nan if fresh else 0.0, dtype=kind)
        bias = torch.zeros(vocab_size)
        fields = {**tile.fields, **ops.hidden_factor(tile), "factor_first": 0, "out_first": 0, **threads}
        C.add_to_columns(**fields, out=out, fresh=fresh, bias=bias)
        assert relative_error(out, dweight) < max(1e-6, torch.finfo(kind).eps)


@pytest.mark.parametrize("together", [1, 3, 9])
def test_blocks_side_by_side(isa, together):
    """Tiles of one block and of several, of more tokens than one strip, from any token and column on."""
    hidden, weight = torch.randn(700, 70), torch.randn(9 * 128 + 5, 70)
    ops = Operands(Head(hidden, weight), Tokens(torch.zeros(700, dtype=torch.int64), None, None, 700))
    tile = ops.dense(11, 677, 1, together, len(weight), Space())
    ops.multiply(tile, None, 11)
    last = min(128 + 128 * together, len(weight))
    found = tile.data[:, : last - 128]
    torch.testing.assert_close(found, hidden[11:677] @ weight[128:last].T, rtol=1e-5, atol=1e-4)
    dhidden, dweight = torch.zeros(700, 70), torch.zeros_like(weight)
    fields = {**tile.fields, "num_threads": 2}
    C.add_to_tokens(**fields, row_weight=None, **ops.weight_factor(tile), out=dhidden, out_first=0)
    assert relative_error(dhidden[11:677], found.double() @ weight[128:last].double()) < 1e-6
    assert not dhidden[:11].any() and not dhidden[677:].any()
    C.add_to_columns(
        **fields, **ops.hidden_factor(tile), factor_first=0, out=dweight, out_first=0, fresh=False, bias=None
    )
    assert relative_error(dweight[128:last], found.T.double() @ hidden[11:677].double()) < 1e-6
    assert not dweight[:128].any() and not dweight[last:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_does_not_see_its_neighbours(isa, monkeypatch, dtype):
    """Bit for bit: which other rows a call has, and how they fall into strips, changes nothing."""
    monkeypatch.setattr(library, "OWN_BF16", True)
    monkeypatch.setattr(library, "USES_BF16", False)
    head = Head(torch.randn(64, 600).to(dtype), torch.randn(128, 600).to(dtype), compute_dtype=dtype)
    ops = Operands(head, Tokens(torch.zeros(64, dtype=torch.int64), None, None, 64))
    whole = ops.multiply(pairs(128, [list(range(64))]), None, 0).data.clone()
    for tokens in ([3], [3, 4, 60], list(range(2, 40)), list(range(0, 64, 5))):
        assert torch.equal(ops.multiply(pairs(128, [tokens]), None, 0).data, whole[tokens])


@pytest.mark.parametrize("rounded", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_operands_are_rounded_as_autocast_would(isa, monkeypatch, stored, rounded):
    monkeypatch.setattr(library, "OWN_BF16", True)
    monkeypatch.setattr(library, "USES_BF16", False)
    # finite: infinity times the zeros beside it would make every product NaN
    values = torch.tensor([[1 + 2**-9, 3e-5, 60001.0, -1e-7, 2.0, -3.3, 1 + 2**-8 + 2**-12, 0.1] * 5]).to(stored)
    head = Head(values, torch.eye(40).to(stored), compute_dtype=rounded)
    ops = Operands(head, Tokens(torch.zeros(1, dtype=torch.int64), None, None, 1))
    found = ops.multiply(pairs(40, [[0]]), None, 0).data[:, :40]
    expected = values.to(rounded).float()
    assert expected.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [3, 5, 200])
def test_a_low_rank_head_by_csrc_and_by_a_library(monkeypatch, dtype, count, own):
    monkeypatch.setattr(library, "OWN_BF16", own)
    monkeypatch.setattr(library, "USES_BF16", False)
    leaves = small_head(N=count, V=300, H=16, lora=True).leaves(dtype, False)
    head = Head(leaves.hidden, leaves.weight, None, LoRA(*leaves.lora), compute_dtype=dtype)
    rows = torch.randperm(count)
    ops = Operands(head, Tokens(leaves.labels[rows], rows, rows, count))
    low_rank, hidden = ops.low_rank(1, count), ops.hidden_rows(1, count)
    assert (hidden is None) == (4 <= count - 1 < 96 or (own and dtype == torch.bfloat16))
    a, b, scale = leaves.lora
    x = leaves.hidden[rows[1:]].double()
    torch.testing.assert_close(low_rank.double(), scale * x @ a.double().T, rtol=1e-5, atol=1e-5)
    tile = ops.products(1, count, 128, 300, hidden, low_rank)
    expected = x @ (leaves.weight.double() + scale * b.double() @ a.double()).T
    torch.testing.assert_close(tile.data[:, :172].double(), expected[:, 128:], rtol=1e-5, atol=1e-4)


def test_pieces_stay_within_their_bytes():
    head = Head(torch.zeros(1, 1000), torch.zeros(5000, 1000))
    ops = Operands(head, Tokens(torch.zeros(1, dtype=torch.int64), None, None, 1))
    assert ops.num_blocks == 40
    for rows in (1, 77, 4096):
        cols = ops.slab_cols(rows)
        assert cols % 128 == 0 and (cols == 128 or 4 * cols * max(rows, 1000) <= operands.TILE_BYTES)
    assert ops.chunk_rows() * 4000 <= operands.TILE_BYTES and ops.chunk_rows(1 << 22) <= 2


def test_one_piece_takes_what_another_had():
    space = Space()
    first = space.take(5, 128)
    assert space.take(3, 128).data_ptr() == first.data_ptr() and first.stride() == (144, 1)
    assert space.take(50, 128).shape == (50, 128)
