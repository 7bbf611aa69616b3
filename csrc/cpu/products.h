// Matrix products of tokens and the vocabulary, of factors whose rows lie anywhere and have any type: 128 columns of the
// vocabulary, or of a hidden state, at a time. Sums are fp32, of kDepth slots each and then of those, in an order that
// hangs on nothing but the depth: not on the other rows of a call, nor on the number of threads.
//
// The inner loop holds kStrip rows by kPanel columns of sums in registers. Its columns come from a packed panel, its rows
// from a strip of copies: rows a power of two apart would otherwise fight for the same lines of the first-level cache.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/folds.h"
#include "cpu/slots.h"

namespace fastdpo {
namespace FASTDPO_ISA {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kStrip = 12;  // 24 of 32 registers hold sums
#else
constexpr int kStrip = 6;  // 12 of 16
#endif
constexpr int64_t kPanel = 2 * kLanes;

// c[r][0 : kPanel] = or += sum over slots k of a(r, k) * b[k * kPanel : (k + 1) * kPanel]. a(r, k) lies at
// a[r * kStripStride + k], or with kAcross, which is dz read by columns, at a[k * kStrip + r].
template <int kRows, bool kAcross, int kTerms>
void multiply_panel(const float* a, const float* b, int64_t depth, float* const* c, int64_t col, bool add) {
  for (int r = 0; r < kRows; ++r) {  // they will be here when the sums are
    __builtin_prefetch(c[r] + col, 1);
    __builtin_prefetch(c[r] + col + kPanel - 1, 1);
  }
  Vec sums[kRows][2] = {};
  constexpr int64_t row = kAcross ? 1 : kStripStride, step = kAcross ? kStrip : 1;
  for (int64_t k = 0; k < depth; ++k, a += step, b += kPanel) {
    __builtin_prefetch(b + 8 * kPanel);
    __builtin_prefetch(b + 8 * kPanel + kLanes);
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat_slot(a + r * row);
      sums[r][0] = multiply_add<kTerms>(sums[r][0], x, b0);
      sums[r][1] = multiply_add<kTerms>(sums[r][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    float* out = c[r] + col;
    store(out, add ? load(out) + sums[r][0] : sums[r][0]);
    store(out + kLanes, add ? load(out + kLanes) + sums[r][1] : sums[r][1]);
  }
}

using MultiplyPanel = void (*)(const float*, const float*, int64_t, float* const*, int64_t, bool);

template <bool kAcross, int kTerms, int... I>
inline MultiplyPanel multiply_rows(int rows, std::integer_sequence<int, I...>) {
  static constexpr MultiplyPanel table[] = {multiply_panel<I + 1, kAcross, kTerms>...};
  return table[rows - 1];
}
// For `rows` in 1 ... kStrip.
template <bool kAcross, int kTerms>
inline MultiplyPanel multiply_rows(int64_t rows) {
  return multiply_rows<kAcross, kTerms>(static_cast<int>(rows), std::make_integer_sequence<int, kStrip>());
}

// How many of `left` rows come next: as many in every strip, as far as may be.
inline int64_t strip_of(int64_t left) {
  const int64_t strips = (left + kStrip - 1) / kStrip;
  return (left + strips - 1) / strips;
}

template <int kTerms>
inline int64_t slots_of(int64_t terms) { return (terms + kTerms - 1) / kTerms; }

// [count rows of a factor, `terms` of each] -> panels [ceil(count / kPanel)][slots][kPanel], zeros for rows past `count`.
template <int kTerms>
inline void pack_across(const Factor& factor, int64_t first, int64_t count, int64_t start, int64_t terms, float* panels,
                        float* scratch) {
  const int64_t depth = slots_of<kTerms>(terms), whole = (depth + kLanes - 1) / kLanes * kLanes;
  const bool direct = is_plain<kTerms>(factor) && whole * kTerms == terms;
  for (int64_t group = 0; group < (count + kPanel - 1) / kPanel * kPanel; group += kLanes) {
    const char* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      float* copy = scratch + i * kStripStride;
      rows[i] = reinterpret_cast<const char*>(copy);
      if (group + i >= count) {
        std::memset(copy, 0, whole * sizeof(float));
      } else if (direct) {
        rows[i] = static_cast<const char*>(factor.at(first + group + i, start));
      } else {
        to_slots<kTerms>(copy, factor.at(first + group + i, start), factor, terms);
        std::memset(copy + depth, 0, (whole - depth) * sizeof(float));
      }
    }
    float* out = panels + group / kPanel * depth * kPanel + group % kPanel;
    for (int64_t k = 0; k < depth; k += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) std::memcpy(block + i, rows[i] + k * sizeof(float), sizeof(Vec));
      transpose(block);
      const int64_t last = std::min<int64_t>(kLanes, depth - k);
      for (int64_t i = 0; i < last; ++i) store(out + (k + i) * kPanel, block[i]);
    }
  }
}

// Into the second-level cache while something else is done: rows that a list picks are no stream that the processor
// would foresee.
constexpr int64_t kAhead = 8;
inline void prefetch(const void* from, int64_t bytes) {
  const char* line = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
}

template <DType kRounded, class T, class RowAt>
void pack_rows_as(RowAt row_at, int64_t depth, int64_t count, float* panels) {
  const int64_t whole = count / kPanel * kPanel;
  for (int64_t k = 0; k < depth; ++k) {
    if (k + kAhead < depth) prefetch(row_at(k + kAhead), count * sizeof(T));
    const T* from = reinterpret_cast<const T*>(row_at(k));
    float* out = panels + k * kPanel;
    for (int64_t col = 0; col < whole; col += kPanel, out += depth * kPanel) {
      store(out, rounded<kRounded>(load_floats(from + col)));
      store(out + kLanes, rounded<kRounded>(load_floats(from + col + kLanes)));
    }
    for (int64_t i = 0; whole < count && i < kPanel; ++i)
      out[i] = whole + i < count ? rounded<kRounded>(to_float(from[whole + i])) : 0.0f;
  }
}

// Rows of `count` columns, of which the k-th lies at `row_at(k)` -> panels [ceil(count / kPanel)][depth][kPanel].
template <class RowAt>
void pack_rows(const Factor& factor, RowAt row_at, int64_t depth, int64_t count, float* panels) {
  by_type(factor.dtype, [&](auto x) {
    using T = decltype(x);
    if (factor.rounded == factor.dtype || factor.rounded == DType::kFloat32)
      return pack_rows_as<DType::kFloat32, T>(row_at, depth, count, panels);
    if (factor.rounded == DType::kBFloat16) return pack_rows_as<DType::kBFloat16, T>(row_at, depth, count, panels);
    return pack_rows_as<DType::kFloat16, T>(row_at, depth, count, panels);
  });
}

// Rows of a strip times packed columns, into rows `c` of which the first `width` columns exist.
template <bool kAcross, int kTerms>
inline void multiply_strip(int64_t rows, const float* a, const float* panels, int64_t terms, float** c, int64_t width,
                           bool add) {
  const MultiplyPanel multiply = multiply_rows<kAcross, kTerms>(rows);
  const int64_t depth = slots_of<kTerms>(terms);
  int64_t col = 0;
  for (; col + kPanel <= width; col += kPanel, panels += depth * kPanel) multiply(a, panels, depth, c, col, add);
  if (col == width) return;
  alignas(64) float rest[kStrip * kPanel];
  float* of_rest[kStrip];
  for (int64_t r = 0; r < rows; ++r) of_rest[r] = rest + r * kPanel;
  multiply(a, panels, depth, of_rest, 0, false);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; col + i < width; ++i) c[r][col + i] = add ? c[r][col + i] + of_rest[r][i] : of_rest[r][i];
}

// Adds the products of rows [begin, end) with the factor's columns of theirs to the tile, or begins with them.
template <int kTerms>
void add_products(const TokenFactor& tokens, const Factor& columns, const TileRows& rows, int64_t stride, int64_t begin,
                  int64_t end, bool add, Workspace& ws) {
  for (int64_t start = 0; start < columns.num_cols; start += kDepth * kTerms) {
    const int64_t depth = std::min(kDepth * kTerms, columns.num_cols - start);
    pack_across<kTerms>(columns, rows.column, rows.width, start, depth, ws.panels, ws.strip);
    for (int64_t row = begin, size; row < end; row += size) {
      size = strip_of(end - row);
      float* out[kStrip];
      for (int64_t r = 0; r < size; ++r) {
        to_slots<kTerms>(ws.strip + r * kStripStride, tokens.of(rows.token(row + r), start), tokens, depth);
        out[r] = rows.data + (row + r) * stride;
      }
      for (int64_t next = row + size; next < std::min(end, row + size + kStrip); ++next)
        prefetch(tokens.of(rows.token(next), start), depth * tokens.size());
      multiply_strip<false, kTerms>(size, ws.strip, ws.panels, depth, out, rows.width, add || start > 0);
    }
  }
}

template <int kTerms>
void products(const ProductsArgs& a, int64_t j, int64_t begin, int64_t end, Workspace& ws) {
  const TileRows rows = a.tile.part(j, kTogether);
  add_products<kTerms>(a.hidden, a.weight, rows, a.tile.stride, begin, end, false, ws);
  if (a.low_rank.data) add_products<1>(a.low_rank, a.lora_b, rows, a.tile.stride, begin, end, true, ws);
}

// Columns [col, col + kBlock) of what tokens [begin, end) get from every block.
void add_to_tokens(const AddToTokensArgs& a, int64_t col, int64_t begin, int64_t end, Workspace& ws) {
  const int64_t width = std::min(kBlock, a.factor.num_cols - col);
  for (int64_t j = 0; j < a.tile.parts(kTogether); ++j) {
    const TileRows rows = a.tile.part(j, kTogether);
    int64_t row = std::max<int64_t>(0, begin - rows.first_token), last = std::min(rows.count, end - rows.first_token);
    if (rows.tokens) {
      row = std::lower_bound(rows.tokens, rows.tokens + rows.count, begin) - rows.tokens;
      last = std::lower_bound(rows.tokens, rows.tokens + rows.count, end) - rows.tokens;
    }
    if (row >= last) continue;
    const int64_t depth = rows.width;
    pack_rows(a.factor, [&](int64_t k) { return a.factor.at(rows.column + k, col); }, depth, width, ws.panels);
    while (row < last) {
      float* out[kStrip];
      int64_t size = 0;
      for (; row < last && size < kStrip; ++row) {
        if (a.row_weight && a.row_weight[rows.offset + row] == 0.0f) continue;
        convert_as<DType::kFloat32>(ws.strip + size * kStripStride, rows.data + row * a.tile.stride, depth);
        out[size++] = a.out + (rows.token(row) - a.out_first) * a.out_stride + col;
      }
      for (int64_t next = row; next < std::min(last, row + kStrip); ++next)
        prefetch(rows.data + next * a.tile.stride, depth * sizeof(float));
      if (size > 0) multiply_strip<false, 1>(size, ws.strip, ws.panels, depth, out, width, true);
    }
  }
}

template <class T>
inline void add_rounded(T* to, const float* from, int64_t count, bool fresh) {
  for (int64_t i = 0; i < count; ++i) from_float(fresh ? from[i] : to_float(to[i]) + from[i], to + i);
}

// [depth, count columns of dz] -> strips of kStrip columns, each [depth][kStrip], kAcrossStride apart.
constexpr int64_t kAcrossStride = kDepth * kStrip + 16;
inline void pack_strips(const float* dz, int64_t stride, int64_t depth, int64_t count, float* strips) {
  constexpr int64_t kVectors = (kStrip + kLanes - 1) / kLanes;
  for (int64_t k = 0; k < depth; ++k, dz += stride) {
    if (k + kAhead < depth) prefetch(dz + kAhead * stride, count * sizeof(float));
    float* out = strips + k * kStrip;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= count; i += kStrip, out += kAcrossStride)  // the next row writes over what is too much
      for (int64_t v = 0; v < kVectors; ++v) store(out + v * kLanes, load(dz + i + v * kLanes));
    for (; i < count; i += kStrip, out += kAcrossStride)
      for (int64_t r = 0; r < kStrip && i + r < count; ++r) out[r] = dz[i + r];
  }
}

// Columns [col, col + kBlock) of what the rows of part j get from all its tokens.
void add_to_columns(const AddToColumnsArgs& a, int64_t j, int64_t col, Workspace& ws) {
  constexpr int64_t kStride = kBlock + 16;
  const TileRows rows = a.tile.part(j, kTogether);
  const int64_t width = a.out ? std::min(kBlock, a.factor.num_cols - col) : 0;
  // One look at the sums is one at `out`, where that takes fp32; of several all but the last are at a copy.
  const bool direct = a.out_type == DType::kFloat32 && rows.count <= kDepth, sums = a.bias && col == 0;
  const auto out_row = [&](int64_t i) { return (rows.column - a.out_first + i) * a.out_stride + col; };
  if (rows.count == 0) {
    if (a.fresh && width > 0) {
      const int64_t size = a.out_type == DType::kFloat32 ? 4 : 2;
      for (int64_t i = 0; i < rows.width; ++i) std::memset(static_cast<char*>(a.out) + out_row(i) * size, 0, width * size);
    }
    return;
  }
  for (int64_t start = 0; start < rows.count; start += kDepth) {
    const int64_t depth = std::min(kDepth, rows.count - start);
    const float* dz = rows.data + start * a.tile.stride;
    pack_rows(a.factor, [&](int64_t k) { return a.factor.of(rows.token(start + k), col); }, depth, width, ws.panels);
    for (int64_t block = 0; block < rows.width; block += kBlock) {
      const int64_t count = std::min(kBlock, rows.width - block);
      if (width > 0) pack_strips(dz + block, a.tile.stride, depth, count, ws.dz);
      const float* strip = ws.dz;
      for (int64_t i = 0; width > 0 && i < count; i += kStrip, strip += kAcrossStride) {
        const int64_t size = std::min<int64_t>(kStrip, count - i);
        float* out[kStrip];
        for (int64_t r = 0; r < size; ++r)
          out[r] = direct ? static_cast<float*>(a.out) + out_row(block + i + r) : ws.sums + (block + i + r) * kStride;
        multiply_strip<true, 1>(size, strip, ws.panels, depth, out, width, start > 0 || (direct && !a.fresh));
      }
      if (!sums) continue;
      float sum[kBlock] = {};
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t i = 0; i < count; ++i) sum[i] += dz[k * a.tile.stride + block + i];
      for (int64_t i = 0; i < count; ++i) a.bias[rows.column + block + i] += sum[i];
    }
  }
  if (direct || width == 0) return;
  by_type(a.out_type, [&](auto x) {
    auto* out = static_cast<decltype(x)*>(a.out);
    for (int64_t i = 0; i < rows.width; ++i) add_rounded(out + out_row(i), ws.sums + i * kStride, width, a.fresh);
  });
}

}  // namespace
}  // namespace FASTDPO_ISA
}  // namespace fastdpo
