"""What the kernels share: tuples of arguments, arithmetic of a logit and of its gradient, loads, the order of tiles."""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ... import routing

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
BLOCK = tl.constexpr(routing.BLOCK)
LOG2_BLOCK = tl.constexpr(routing.BLOCK.bit_length() - 1)
LOG2E = tl.constexpr(1.4426950408889634)
NO_MASS = tl.constexpr(3e38)  # a row's lse for which every p is 0, and every log p, as it is multiplied with 0, finite

# Arguments that differ from launch to launch of one step: a kernel is not compiled again for their value or alignment.
# Triton knows them by name, so none is in a tuple. A tuple that is not there is one of Nones, and none is in another:
# Triton 3.6 cannot compare a tuple with None, and loses the constants of an inner one.
VARYING = (
    *("all_blocks", "capacity", "chunk", "first_block", "first_token", "group_tiles", "ignore_index", "inner"),
    *("inner_stride", "is_first", "is_last", "last_block", "num_blocks", "num_rows", "outer_stride", "round"),
    *("rounds", "set_bytes", "share", "slab", "steps", "tiles_per_round", "token_tiles", "vocab_size", "vocab_start"),
)


class Form(NamedTuple):
    """What a kernel with a matrix product is compiled for."""

    COMPUTE: tl.constexpr  # the type to multiply in
    TMA: tl.constexpr  # operands are descriptors
    BM: tl.constexpr
    BN: tl.constexpr
    BK: tl.constexpr
    GROUP: tl.constexpr
    STAGES: tl.constexpr  # of its loop


class TokenList(NamedTuple):
    """The completion tokens of a call, in the order of their rows; how many there are stays on the device."""

    rows: Tensor | None = None  # [M] int32, row of token i
    labels: Tensor | None = None  # [M] int32, label of token i as a column of this shard; outside [0, V): on another
    token_of_row: Tensor | None = None  # [M] int32; -1: ignored, -2: label out of range
    count: Tensor | None = None  # [1] int32
    offsets: Tensor | None = None  # [M] int64, where token i's row of hidden begins, in units
    unit: tl.constexpr = tl.constexpr(1)  # elements: 16 bytes where rows are aligned, so that the compiler knows it


class TokenRange(NamedTuple):
    """Tokens [first_token, first_token + capacity), as kernels take them: how many of them exist is not known."""

    tokens: TokenList
    first_token: int
    capacity: int


class Transform(NamedTuple):
    """Of a product of hidden and weight to its logit."""

    scale: float
    softcap: float | None
    inv_temperature: float

    @staticmethod
    def of(transform) -> Transform:
        """Of head.LogitTransform."""
        return Transform(transform.scale, transform.softcap or None, 1.0 / transform.temperature)


class LowRank(NamedTuple):
    """What a low-rank head adds to the products of a range of tokens."""

    product: Tensor | None = None  # [capacity, pitch] fp32: lora_scale * hidden @ lora_a.T, zero from lora_rank on
    lora_a: Tensor | None = None  # [lora_rank, H]
    lora_b: Tensor | None = None  # [V, lora_rank]
    scale: float = 0.0
    lora_rank: int = 0
    pitch: tl.constexpr = tl.constexpr(0)


class Columns(NamedTuple):
    """What a tile of logits takes from its columns of the head, beside the tiles of weight."""

    bias: Tensor | None  # [V]
    V: int
    H: int
    weight_stride: int


class RowTerms(NamedTuple):
    """What dz takes from its row: the forward's results and the upstream gradients, [M] fp32 each."""

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    coef: Tensor
    coef_entropy: Tensor | None
    coef_lse: Tensor | None


class RowFactors(NamedTuple):
    """What a row's dz is made of: dz = p * (of_p + entropy_p + entropy_log_p * log p), and for `of_p` the label's."""

    active: tl.tensor  # has a gradient
    lse: tl.tensor  # NO_MASS where it has none
    others: tl.tensor  # 1 - p[label]
    of_p: tl.tensor
    label: tl.tensor
    entropy_log_p: tl.tensor
    entropy_p: tl.tensor


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest (Triton's interpreter truncates on its way to bf16)."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, compute: tl.constexpr):
    """acc + a @ b, both rounded to `compute`; fp32 in three TF32 products, which keep its accuracy."""
    a, b = rounded(a, compute), rounded(b, compute)
    if INTERPRET and compute == tl.bfloat16:  # the interpreter gets products of bf16 wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3" if compute == tl.float32 else "tf32")


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 to fp32's relative precision, by its series near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def squashed(product, transform):
    """hidden . weight + bias, or under a softcap the tanh of its share: a logit is this times `unit`."""
    if transform.softcap is None:
        return product
    else:
        t = tl.exp2(tl.abs(product) * (-2.0 * LOG2E / transform.softcap * tl.abs(transform.scale)))
        t = (1.0 - t) / (1.0 + t)
        sign = product.to(tl.uint32, bitcast=True) & 0x80000000
        return (t.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def unit(transform):
    """All scales in one number: each would be a multiplication per logit."""
    size = transform.scale
    if transform.softcap is not None:
        size = tl.where(size < 0, -transform.softcap, transform.softcap)
    return size * transform.inv_temperature


@triton.jit
def logit(product, transform):
    """The logit z of hidden . weight + bias."""
    return squashed(product, transform) * unit(transform)


@triton.jit
def times_slope(dz, x, transform):
    """dz times what is not the same for all logits in dz/dproduct, from `x` of squashed."""
    if transform.softcap is not None:
        dz *= tl.fma(-x, x, 1.0)
    return dz


@triton.jit
def rows_in_blocks(label, everywhere, first_column, BLOCKS: tl.constexpr):
    """How many rows have their label in each of BLOCKS blocks of columns, or are `everywhere`: 16 bits a block."""
    tl.static_assert(BLOCKS <= 2)
    block = (label - first_column) >> LOG2_BLOCK
    rows = block * 0
    for j in tl.static_range(BLOCKS):
        rows = tl.where(block == j, 1 << (16 * j), rows)
    return tl.sum(tl.where(everywhere, 0x10001, rows), 0)


@triton.jit
def is_plain(rows, block: tl.constexpr, first_column, V):
    """No row of rows_in_blocks needs a mask in this block, and all of its columns exist: for a whole program alike."""
    return (((rows >> (16 * block)) & 0xFFFF) == 0) & (first_column + (block + 1) * BLOCK <= V)


@triton.jit
def row_terms(row, exists, terms, transform, dz_scale):
    """RowFactors: all scales are in them."""
    c = tl.load(terms.coef + row, mask=exists, other=0.0)
    row_lse = tl.load(terms.lse + row, mask=exists, other=0.0)
    active, cx, ce, others_c = c != 0, c, c, c
    if terms.coef_lse is not None:
        cl = tl.load(terms.coef_lse + row, mask=exists, other=0.0)
        active, others_c = active | (cl != 0), c - cl  # d(lse) = p
    if terms.coef_entropy is not None:
        cx = tl.load(terms.coef_entropy + row, mask=exists, other=0.0)
        ce = cx * tl.load(terms.entropy + row, mask=exists, other=0.0)
        active = active | (cx != 0)
    scale = transform.scale * transform.inv_temperature
    if dz_scale is not None:
        scale *= tl.load(dz_scale)
    row_logp = tl.load(terms.logps + row, mask=exists, other=-1.0)
    others = -expm1(row_logp)  # before any rounding of p
    of_label = c * others
    if terms.coef_lse is not None:
        of_label = tl.fma(cl, exp(row_logp), of_label)
    row_lse = tl.where(active, row_lse, NO_MASS)
    return RowFactors(active, row_lse, others, -others_c * scale, of_label * scale, -cx * scale, -ce * scale)


@triton.jit
def log_probs(product, transform, lse):
    """(log p, x of squashed) of products. No probability is above 1, though these products, summed in another order
    than the forward's, can be above its `lse`: by 1e5 where logits are 1e12."""
    x = squashed(product, transform)
    return tl.minimum(tl.fma(x, unit(transform), -lse[:, None]), 0.0, tl.PropagateNan.ALL), x


@triton.jit
def dz_of(product, transform, of_row, label, column, V, is_plain, ENTROPY: tl.constexpr):
    """dz of a tile of products, fp32; `of_row` from row_terms."""
    if is_plain:
        dz = _dz(product, transform, of_row, label, column, V, ENTROPY, False)
    else:
        dz = _dz(product, transform, of_row, label, column, V, ENTROPY, True)
    return dz


@triton.jit
def _times(p, factor, transform):
    if transform.softcap is None:  # the factor of a log p of -inf is no number
        factor = tl.where(p == 0, 0.0, factor)
    return p * factor


@triton.jit
def _dz(product, transform, of_row, label, column, V, ENTROPY: tl.constexpr, MASKED: tl.constexpr):
    log_p, x = log_probs(product, transform, of_row.lse)
    p = exp(log_p)
    if ENTROPY:
        of_entropy = of_row.entropy_log_p[:, None]
        dz = _times(p, tl.fma(log_p, of_entropy, (of_row.of_p + of_row.entropy_p)[:, None]), transform)
        if MASKED:
            own = _times(p, tl.fma(log_p, of_entropy, of_row.entropy_p[:, None]), transform)
            dz = tl.where(column[None, :] == label[:, None], of_row.label[:, None] + own, dz)
    else:
        dz = p * of_row.of_p[:, None]
        if MASKED:
            dz = tl.where(column[None, :] == label[:, None], of_row.label[:, None], dz)
    dz = times_slope(dz, x, transform)
    if MASKED:
        dz = tl.where(of_row.active[:, None] & (column < V)[None, :], dz, 0.0)
    return dz


@triton.jit
def hidden_offset(tokens, token, exists):
    """Element offset of a token's row of hidden."""
    return tl.load(tokens.offsets + token, mask=exists, other=0) * tokens.unit


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(m, n) of a tile: GROUP tiles of tokens go through the vocabulary together, so that both operands stay in L2."""
    per_group = GROUP * tiles_n
    first = (index // per_group) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + (index % per_group) % size, (index % per_group) // size


@triton.jit
def tile_offsets(row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Element offsets of [row : row + ROWS, column : column + COLUMNS]: 64-bit only where the tile begins."""
    inner = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]
    return tl.cast(row, tl.int64) * stride + column + inner


@triton.jit
def within(row, column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    return (r < num_rows)[:, None] & (c < num_columns)[None, :]


@triton.jit
def load_tile(
    source, row, column, num_rows, num_columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """source[row : row + ROWS, column : column + COLUMNS], 0 outside: through a TMA descriptor or by pointers."""
    if TMA:
        return source.load([row, column])
    else:
        inside = within(row, column, num_rows, num_columns, ROWS, COLUMNS)
        return tl.load(source + tile_offsets(row, column, stride, ROWS, COLUMNS), mask=inside, other=0.0)


@triton.jit
def load_rows(source, offsets, listed, column, num_columns, COLUMNS: tl.constexpr):
    """Rows of `source` at element `offsets`, columns [column, column + COLUMNS): 0 where not `listed` or outside."""
    c = column + tl.arange(0, COLUMNS)
    return tl.load(source + offsets[:, None] + c[None, :], mask=listed[:, None] & (c < num_columns)[None, :], other=0.0)


@triton.jit
def tf32(x):
    """What of `x` TF32 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def start_products(
    head, low_rank, token, exists, column, compute: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """What the products of tokens and Columns start from, while they take no registers yet: the bias, and the low-rank
    head's part, whose lora_b is rounded as every operand and multiplied in fp32."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    c = column + tl.arange(0, COLUMNS)
    if head.bias is not None:
        acc += tl.load(head.bias + c, mask=c < head.V, other=0.0).to(tl.float32)[None, :]
    if low_rank.product is not None:
        DEPTH: tl.constexpr = 16
        # TF32 holds 11 bits: two of its numbers hold all but the last two of an fp32's 24, one all of a bf16's or
        # fp16's. One dot for all parts: in tensor memory each has an accumulator of its own.
        PARTS: tl.constexpr = 3 if compute == tl.float32 else 2
        for step in tl.range(0, low_rank.pitch // DEPTH * PARTS, num_stages=1):
            k = step // PARTS * DEPTH + tl.arange(0, DEPTH)
            a = tl.load(
                low_rank.product + token.to(tl.int64)[:, None] * low_rank.pitch + k[None, :],
                mask=exists[:, None],
                other=0.0,
            )
            inside = (c < head.V)[:, None] & (k < low_rank.lora_rank)[None, :]
            b = tl.load(
                low_rank.lora_b + c.to(tl.int64)[:, None] * low_rank.lora_rank + k[None, :], mask=inside, other=0.0
            )
            b = rounded(b, compute).to(tl.float32).T
            a = tl.where(step % PARTS == 1, a - tf32(a), tf32(a))
            if PARTS == 3:
                b = tl.where(step % PARTS == 2, b - tf32(b), tf32(b))
            acc = tl.dot(a, b, acc, input_precision="tf32")
    return acc


@triton.jit
def logit_products(hidden, weight, head, low_rank, row, exists, column, depth, capacity, pitch, form):
    """[BM, BN] fp32: gathered hidden [capacity, pitch] from `row` on, times columns of the head from `column` on."""
    acc = start_products(head, low_rank, row + tl.arange(0, form.BM), exists, column, form.COMPUTE, form.BM, form.BN)
    for k in range(0, depth, form.BK):
        a = load_tile(hidden, row, k, capacity, pitch, pitch, form.BM, form.BK, form.TMA)
        b = load_tile(weight, column, k, head.V, head.H, head.weight_stride, form.BN, form.BK, form.TMA)
        acc = dot(a, b.T, acc, form.COMPUTE)
    return acc


@triton.jit
def columns_of(x):
    """A tile as a tuple of its blocks, free where a thread holds their columns: one after the other saves registers."""
    if x.shape[1] > BLOCK:
        left, right = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))
        return columns_of(left) + columns_of(right)
    else:
        return (x,)


@triton.jit
def store_tile(target, x, row, column, num_rows, num_columns, stride):
    """target[row :, column :] = x inside of [num_rows, num_columns]."""
    COLUMNS: tl.constexpr = min(x.shape[1], BLOCK)
    parts = columns_of(x)
    for j in tl.static_range(x.shape[1] // COLUMNS):
        at = column + j * COLUMNS
        inside = within(row, at, num_rows, num_columns, x.shape[0], COLUMNS)
        where = tile_offsets(row, at, stride, x.shape[0], COLUMNS)
        tl.store(target + where, rounded(parts[j], target.dtype.element_ty), mask=inside)


@triton.jit
def num_tokens(tokens, first_token, capacity):
    """Tokens of [first_token, first_token + capacity) that exist: their count is known on the device only."""
    return tl.minimum(tl.maximum(tl.load(tokens.count) - first_token, 0), capacity)
