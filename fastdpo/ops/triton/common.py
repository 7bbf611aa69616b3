"""What the Triton kernels share: arithmetic of one logit, loads of operands, the order of tiles."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
BLOCK = tl.constexpr(128)  # routing.BLOCK
LOG2E = tl.constexpr(1.4426950408889634)

# Arguments that differ from launch to launch of one step: a kernel is not compiled again for their value or alignment.
VARYING = (
    "all_blocks", "capacity", "first_block", "first_column", "first_token", "group_tiles", "ignore_index",
    "last_column", "num_blocks", "num_rows", "round", "rounds", "set_bytes", "sum_tile", "summed_columns",
    "tiles_per_round", "token_tiles", "vocab_size", "vocab_start",
)  # fmt: skip


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in `dtype`, to the nearest (Triton's interpreter truncates on its way to bf16)."""
    if INTERPRET and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def operand(x, compute: tl.constexpr):
    """An operand of tl.dot: rounded to the type to multiply in (whose bf16 products the interpreter gets wrong)."""
    x = rounded(x, compute)
    return x.to(tl.float32) if INTERPRET and compute == tl.bfloat16 else x


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to fp32's relative precision: 2 atanh(x / (2 + x)) by its series where x is small."""
    s = x / (2.0 + x)
    q = s * s
    series = 2.0 * s * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q / 11)))))
    return tl.where(x < 0.5, series, tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 to fp32's relative precision, by its series near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1.0)


@triton.jit
def logit(product, logit_scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """The logit z of hidden . weight + bias."""
    y = product * logit_scale
    if SOFTCAP:
        t = tl.exp2(tl.abs(y) * (-2.0 * LOG2E / softcap))
        t = (1.0 - t) / (1.0 + t)
        y = softcap * tl.where(y < 0, -t, t)
    return y * inv_temperature


@triton.jit
def logit_slope(z, logit_scale, softcap, inv_temperature, SOFTCAP: tl.constexpr):
    """dz/dproduct, from z."""
    slope = logit_scale * inv_temperature
    if SOFTCAP:
        t = z * (1.0 / (softcap * inv_temperature))
        slope *= 1.0 - t * t
    return slope


@triton.jit
def label_logp(rest_lse, label_logit):
    """log p(label) = -log(1 + exp(rest - label)), which keeps its relative precision near 0."""
    d = rest_lse - label_logit
    return tl.where(d > 20.0, -d - tl.exp(-d), -log1p(tl.exp(tl.where(d > 20.0, 0.0, d))))


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Element offset of row `row` of hidden [outer, inner, H] with the caller's strides."""
    row = row.to(tl.int64)
    return (row // inner) * outer_stride + (row % inner) * inner_stride


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
    source, row, column, num_rows, num_columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
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
def start_products(bias, column, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What a tile's products start from: its columns' bias."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    if bias is not None:
        c = column + tl.arange(0, COLUMNS)
        acc += tl.load(bias + c, mask=c < num_columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def tf32(x):
    """What of `x` TF32 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def add_low_rank(
    acc, rank, lora_b, rank_rows, listed, column, num_columns, rank_size, compute: tl.constexpr,
    R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """acc + rank @ lora_b.T: rank [*, R] fp32 rows, lora_b [V, rank_size] rounded as every operand; fp32 products.

    Before the sums over H begin `acc` takes no registers yet.
    """
    DEPTH: tl.constexpr = 16
    # TF32 holds 11 bits: two of its numbers hold all but the last two of an fp32's 24, one all of a bf16's or fp16's.
    # One dot for all parts: in tensor memory each has an accumulator of its own.
    PARTS: tl.constexpr = 3 if compute == tl.float32 else 2
    c = column + tl.arange(0, COLUMNS)
    for step in tl.range(0, R // DEPTH * PARTS, num_stages=1):
        k = step // PARTS * DEPTH + tl.arange(0, DEPTH)
        a = tl.load(rank + rank_rows.to(tl.int64)[:, None] * R + k[None, :], mask=listed[:, None], other=0.0)
        inside = (c < num_columns)[:, None] & (k < rank_size)[None, :]
        b = tl.load(lora_b + c.to(tl.int64)[:, None] * rank_size + k[None, :], mask=inside, other=0.0)
        b = rounded(b, compute).to(tl.float32).T
        a = tl.where(step % PARTS == 1, a - tf32(a), tf32(a))
        if PARTS == 3:
            b = tl.where(step % PARTS == 2, b - tf32(b), tf32(b))
        acc = tl.dot(a, b, acc, input_precision="tf32")
    return acc


@triton.jit
def halves(x):
    """The left and right columns of a tile; free where a thread holds both."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_tile(target, x, row, column, num_rows, num_columns, stride):
    """target[row :, column :] = x inside of [num_rows, num_columns], a block of columns at a time to save registers."""
    COLUMNS: tl.constexpr = x.shape[1]
    if COLUMNS > BLOCK:
        left, right = halves(x)
        store_tile(target, left, row, column, num_rows, num_columns, stride)
        store_tile(target, right, row, column + COLUMNS // 2, num_rows, num_columns, stride)
    else:
        inside = within(row, column, num_rows, num_columns, x.shape[0], COLUMNS)
        where = tile_offsets(row, column, stride, x.shape[0], COLUMNS)
        tl.store(target + where, rounded(x, target.dtype.element_ty), mask=inside)


@triton.jit
def num_tokens(count, first_token, capacity):
    """Tokens of [first_token, first_token + capacity) that exist: `count` is known on the device only."""
    return tl.minimum(tl.maximum(tl.load(count) - first_token, 0), capacity)
