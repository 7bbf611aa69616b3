// The products of picked rows in a processor's units for bf16, by a library's product: rows are gathered, what is
// multiplied is rounded to bf16, sums are fp32. In the manner of products.h, for pieces of the same tiles.
#pragma once

#include <algorithm>

#include "cpu/products.h"

namespace fastdpo {
namespace FASTDPO_ISA {
namespace {

constexpr int64_t kRows = 256;  // of a product whose results are then added to rows that lie apart

constexpr int64_t kRowsSize = sizeof(Workspace::rows) / sizeof(BFloat16);
static_assert(kRows <= kBf16Rows, "dz of a product");
static_assert(sizeof(Workspace::sums) >= kBlock * kBf16Columns * sizeof(float), "sums of a block's columns");
static_assert(sizeof(Workspace::panels) >= kRows * kBf16Columns * sizeof(float), "products to be added");

// Rows [begin, end) of a list, their `count` columns from `start` on, side by side.
void gather(const TokenFactor& factor, const TileRows& rows, int64_t begin, int64_t end, int64_t start, int64_t count,
            BFloat16* to) {
  for (int64_t row = begin; row < end; ++row, to += count) {
    if (row + kAhead < end) prefetch(factor.of(rows.token(row + kAhead), start), count * sizeof(BFloat16));
    std::memcpy(to, factor.of(rows.token(row), start), count * sizeof(BFloat16));
  }
}

void bf16_products(const ProductsArgs& a, int64_t j, int64_t begin, int64_t end, Workspace& ws) {
  const TileRows rows = a.tile.part(j, 1);
  const int64_t size = a.weight.num_cols, most = kRowsSize / (end - begin);
  for (int64_t start = 0, depth; start < size || start == 0; start += depth) {
    depth = std::min(most, size - start);
    gather(a.hidden, rows, begin, end, start, depth, ws.rows);
    bf16_gemm({ws.rows, depth, false}, {a.weight.at(rows.column, start), a.weight.stride, false},
              {rows.data + begin * a.tile.stride, a.tile.stride, start > 0}, end - begin, rows.width, depth);
    if (depth == 0) break;
  }
  if (a.low_rank.data) add_products<1>(a.low_rank, a.lora_b, rows, a.tile.stride, begin, end, true, ws);
}

// Columns [col, col + kBf16Columns) of what tokens [begin, end) get from every block.
void bf16_add_to_tokens(const AddToTokensArgs& a, int64_t col, int64_t begin, int64_t end, Workspace& ws) {
  const int64_t width = std::min(kBf16Columns, a.factor.num_cols - col);
  float* products = ws.panels;
  for (int64_t j = 0; j < a.tile.num_blocks; ++j) {
    const TileRows rows = a.tile.part(j, 1);
    int64_t row = std::lower_bound(rows.tokens, rows.tokens + rows.count, begin) - rows.tokens;
    const int64_t last = std::lower_bound(rows.tokens, rows.tokens + rows.count, end) - rows.tokens;
    while (row < last) {
      float* out[kRows];
      int64_t size = 0;
      for (; row < last && size < kRows; ++row) {
        if (a.row_weight && a.row_weight[rows.offset + row] == 0.0f) continue;
        pair_up(ws.rounded_dz + size * kBlock, rows.data + row * a.tile.stride, rows.width);
        out[size++] = a.out + (rows.token(row) - a.out_first) * a.out_stride + col;
      }
      if (size == 0) continue;
      bf16_gemm({ws.rounded_dz, kBlock, false}, {a.factor.at(rows.column, col), a.factor.stride, true},
                {products, width, false}, size, width, rows.width);
      for (int64_t r = 0; r < size; ++r)
        for (int64_t i = 0; i < width; ++i) out[r][i] += products[r * width + i];
    }
  }
}

// Columns [col, col + kBf16Columns) of what the rows of part j get from all its tokens.
void bf16_add_to_columns(const AddToColumnsArgs& a, int64_t j, int64_t col, Workspace& ws) {
  const TileRows rows = a.tile.part(j, 1);
  const int64_t width = std::min(kBf16Columns, a.factor.num_cols - col);
  if (rows.count == 0 || !a.out) {  // nothing to multiply
    for (int64_t i = 0; i < width; i += kBlock) add_to_columns(a, j, col + i, ws);
    return;
  }
  const int64_t first = (rows.column - a.out_first) * a.out_stride + col;
  const bool direct = a.out_type == DType::kFloat32 && fits_a_library(a.out_stride, rows.width, width);
  float* to = direct ? static_cast<float*>(a.out) + first : ws.sums;
  for (int64_t start = 0; start < rows.count; start += kBf16Rows) {
    const int64_t end = std::min(start + kBf16Rows, rows.count);
    gather(a.factor, rows, start, end, col, width, ws.rows);
    for (int64_t row = start; row < end; ++row)
      pair_up(ws.rounded_dz + (row - start) * kBlock, rows.data + row * a.tile.stride, rows.width);
    bf16_gemm({ws.rounded_dz, kBlock, true}, {ws.rows, width, true},
              {to, direct ? a.out_stride : width, start > 0 || (direct && !a.fresh)}, rows.width, width, end - start);
    if (!a.bias || col > 0) continue;
    float sum[kBlock] = {};
    for (int64_t row = start; row < end; ++row)
      for (int64_t i = 0; i < rows.width; ++i) sum[i] += rows.data[row * a.tile.stride + i];
    for (int64_t i = 0; i < rows.width; ++i) a.bias[rows.column + i] += sum[i];
  }
  if (direct) return;
  by_type(a.out_type, [&](auto x) {
    auto* out = static_cast<decltype(x)*>(a.out) + first;
    for (int64_t i = 0; i < rows.width; ++i) add_rounded(out + i * a.out_stride, to + i * width, width, a.fresh);
  });
}

// By whichever.
void any_products(const ProductsArgs& a, int64_t j, int64_t begin, int64_t end, Workspace& ws) {
  constexpr decltype(&bf16_products) by[] = {products<1>, products<2>, bf16_products};
  by[static_cast<int>(a.product)](a, j, begin, end, ws);
}
void any_add_to_tokens(const AddToTokensArgs& a, int64_t col, int64_t begin, int64_t end, Workspace& ws) {
  (a.product == Product::kBf16Library ? bf16_add_to_tokens : add_to_tokens)(a, col, begin, end, ws);
}
void any_add_to_columns(const AddToColumnsArgs& a, int64_t j, int64_t col, Workspace& ws) {
  (a.product == Product::kBf16Library ? bf16_add_to_columns : add_to_columns)(a, j, col, ws);
}

}  // namespace
}  // namespace FASTDPO_ISA
}  // namespace fastdpo
