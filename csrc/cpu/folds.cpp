// Folds over fp32 tiles of logits. Compiled once per instruction set (FASTDPO_ISA); a block of 128 logits is
// transformed into a local buffer, so it is read from memory once and never written back by the forward.
#include "cpu/folds.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd.h"
#include "cpu/row_stats.h"
#include "shared/half.h"
#include "shared/routing.h"
#include "shared/row_formulas.h"

namespace fastdpo {
namespace FASTDPO_ISA {
namespace {

// softcap * tanh(y / softcap) and its derivative. With e = exp(-2|x|): tanh|x| = (1 - e) / (1 + e), and
// 1 - tanh^2 = 4e / (1 + e)^2, which does not cancel where tanh saturates.
struct Capped {
  Vec value, slope;
};
inline Capped softcapped(Vec y, float softcap) {
  const Vec x = y * splat(1.0f / softcap);
  const Vec e = exp(splat(-2.0f) * (x < Vec{} ? -x : x));
  const Vec inverse = splat(1.0f) / (splat(1.0f) + e);
  const Vec t = (splat(1.0f) - e) * inverse;
  return {splat(softcap) * (x < Vec{} ? -t : t), splat(4.0f) * e * inverse * inverse};
}

// Raw products of one block -> z, padded to kBlock with -inf; optionally dz/d(product).
template <bool kSoftcap, bool kSlope>
inline void transform_block(const float* raw, const float* bias, const LogitTransform& t, int64_t cols, float* z,
                            float* slope) {
  alignas(64) float padded[kBlock], padded_bias[kBlock];
  if (cols < kBlock) {  // the ragged end of the vocabulary: pad the inputs, then overwrite the pads' logits
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, raw, cols * sizeof(float));
    raw = padded;
    if (bias) {
      std::memset(padded_bias, 0, sizeof padded_bias);
      std::memcpy(padded_bias, bias, cols * sizeof(float));
      bias = padded_bias;
    }
  }
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    Vec y = load(raw + i);
    if (bias) y += load(bias + i);
    if (kSoftcap) {
      const Capped capped = softcapped(y * splat(t.scale), t.softcap);
      store(z + i, capped.value * splat(t.inv_temperature));
      if (kSlope) store(slope + i, capped.slope * splat(t.scale * t.inv_temperature));
    } else {
      store(z + i, y * splat(t.scale * t.inv_temperature));
    }
  }
  for (int64_t i = cols; i < kBlock; ++i) z[i] = -kInf;
}

template <bool kSoftcap, bool kStats>
void fold_rows_as(const FoldArgs& a, int64_t begin, int64_t end) {
  const Tile& tile = a.tile;
  alignas(64) float z[kBlock], maxima[kLanes] = {}, sums[kLanes] = {};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = columns_past(a.labels[row], tile.col_start);  // may lie outside this tile
    double* block_lse = a.block_lse + row * a.block_lse_stride;
    int waiting = 0;  // blocks whose sums have no logarithm yet: kLanes of them cost what one does
    for (int64_t col = 0; col < tile.num_cols; col += kBlock) {
      const int64_t cols = std::min(kBlock, tile.num_cols - col);
      transform_block<kSoftcap, false>(tile.data + row * tile.stride + col, tile.bias ? tile.bias + col : nullptr,
                                       tile.transform, cols, z, nullptr);
      if (kStats) add_logits(a.stats[row], z, cols);
      const int64_t in_block = columns_past(label, col);
      if (in_block >= 0 && in_block < cols) {
        a.label_logit[row] = z[in_block];
        z[in_block] = -kInf;
      }
      Vec m = splat(-kInf);
      for (int64_t i = 0; i < kBlock; i += kLanes) m = max(m, load(z + i));
      float block_max = max(m);
      if (kStats) add_maxima(a.stats[row], z, cols, in_block, block_max);
      if (block_max == -kInf) block_max = 0.0f;  // -inf - -inf is NaN; and `max` may have passed over NaNs
      Vec s{}, sum_z{}, squares{};
      for (int64_t i = 0; i < kBlock; i += kLanes) {
        const Vec d = load(z + i) - splat(block_max), e = exp(d);
        s += e;
        if (!kStats) continue;
        sum_z += e == Vec{} ? Vec{} : e * d;  // 0 * -inf
        squares += e * e;
      }
      const float block_sum = sum(s);
      if (kStats) add_sums(a.stats[row], block_max, block_sum, sum(sum_z), sum(squares));
      maxima[waiting] = block_max, sums[waiting++] = block_sum;
      if (waiting < kLanes && col + kBlock < tile.num_cols) continue;
      const Vec logs = log(load(sums));
      for (int i = 0; i < waiting; ++i) *block_lse++ = static_cast<double>(maxima[i]) + logs[i];
      waiting = 0;
    }
  }
}

void fold_rows(const FoldArgs& a, int64_t begin, int64_t end) {
  if (a.tile.transform.softcap != 0.0f)
    a.stats ? fold_rows_as<true, true>(a, begin, end) : fold_rows_as<true, false>(a, begin, end);
  else
    a.stats ? fold_rows_as<false, true>(a, begin, end) : fold_rows_as<false, false>(a, begin, end);
}

// z of one block -> dz/d(product) * coef terms, into dz; returns the block's mass.
template <bool kSoftcap>
inline float grad_block(const GradArgs& a, int64_t row, int64_t token, int64_t col, int64_t cols, float* dz) {
  const Tile& tile = a.tile;
  alignas(64) float z[kBlock], slope[kBlock];
  transform_block<kSoftcap, true>(tile.data + row * tile.stride + col, tile.bias ? tile.bias + col : nullptr,
                                  tile.transform, cols, z, slope);
  const float constant_slope = tile.transform.scale * tile.transform.inv_temperature;
  const float coef_lse = a.coef_lse ? a.coef_lse[token] : 0.0f;
  const Vec lse = splat(a.lse[token]), coef = splat(a.coef[token] - coef_lse);  // d(lse) = p
  const Vec coef_entropy = splat(a.coef_entropy ? a.coef_entropy[token] : 0.0f);
  const Vec entropy = splat(a.entropy ? a.entropy[token] : 0.0f);
  const int64_t label = columns_past(a.labels[token], tile.col_start + col);
  const bool has_label = label >= 0 && label < cols;
  Vec mass{};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    // At most 0, though the forward's logits may have been another product's, whose last bits are many nats at 1e12.
    const Vec logp = min(load(z + i) - lse, Vec{});
    const Vec p = exp(logp);
    mass += p;
    const Vec g = a.coef_entropy ? other_grad(p, max(logp, splat(kLeastLogP)), coef, entropy, coef_entropy)
                                 : other_grad(p, coef);
    store(dz + i, kSoftcap ? g * load(slope + i) : g * splat(constant_slope));
  }
  if (has_label) {
    const float own = label_grad(a.logps[token], a.coef[token], entropy[0], coef_entropy[0]);
    dz[label] = (a.coef_lse ? own + coef_lse * expf(a.logps[token]) : own) *
                (kSoftcap ? slope[label] : constant_slope);
  }
  return sum(mass);
}

template <bool kSoftcap>
void grad_rows_as(const GradArgs& a, int64_t begin, int64_t end) {
  alignas(64) float dz[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = a.tokens ? a.tokens[row] : row;
    for (int64_t col = 0; col < a.tile.num_cols; col += kBlock) {
      const int64_t cols = std::min(kBlock, a.tile.num_cols - col);
      grad_block<kSoftcap>(a, row, token, col, cols, dz);
      std::memcpy(a.tile.data + row * a.tile.stride + col, dz, cols * sizeof(float));
    }
  }
}

void grad_rows(const GradArgs& a, int64_t begin, int64_t end) {
  a.tile.transform.softcap != 0.0f ? grad_rows_as<true>(a, begin, end) : grad_rows_as<false>(a, begin, end);
}

// What dz of a pair of this share is multiplied by for either gradient; `own`: the block holds the label.
inline void weigh_row(const RoutedGradArgs& a, int64_t row, int64_t token, bool own, float share) {
  const int64_t block = a.grad.tile.col_start / kBlock;
  float weight = 1.0f, second = 1.0f;
  if (!own) {
    weight = pair_weight(pair_odds(share, a.tau));
    if (a.second_bits) second = weight * pair_weight(second_pair_odds(share, a.tau, a.second_tau));
  }
  if (a.second_bits && !(a.second_bits[token * a.bitmap_stride + (block >> 3)] >> (block & 7) & 1)) second = 0.0f;
  const float weights[] = {weight, second};
  if (a.hidden_set >= 0) a.hidden_weight[row] = weights[a.hidden_set];
  if (a.weight_set >= 0) a.columns_weight[row] = weights[a.weight_set];
}

// Leaves the unweighted dz in the tile.
void routed_grad_rows(const RoutedGradArgs& a, int64_t begin, int64_t end) {
  const Tile& tile = a.grad.tile;
  alignas(64) float dz[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = a.grad.tokens[row];
    const float mass = tile.transform.softcap != 0.0f
                           ? grad_block<true>(a.grad, row, token, 0, tile.num_cols, dz)
                           : grad_block<false>(a.grad, row, token, 0, tile.num_cols, dz);
    const int64_t label = columns_past(a.grad.labels[token], tile.col_start);
    weigh_row(a, row, token, label >= 0 && label < tile.num_cols, mass / -std::expm1(a.grad.logps[token]));
    std::memcpy(tile.data + row * tile.stride, dz, tile.num_cols * sizeof(float));
  }
}

void route_row(const RouteArgs& a, int64_t row) {
  const double* block_lse = a.block_lse + row * a.stride;
  const bool two_sets = a.second_tau >= 0.0f;
  uint8_t* bits = a.bitmap + row * a.bitmap_stride;
  uint8_t* second_bits = bits + a.set_bytes;
  std::fill_n(bits, two_sets ? 2 * a.set_bytes : a.set_bytes, uint8_t{0});
  const double rest_lse = a.rest_lse[row];
  const int64_t label_block = a.labels[row] >= 0 ? a.labels[row] / kBlock : -1;
  const Philox4 draw = philox(a.seed, a.first_row + row);
  uint32_t start[2] = {draw.word[0], draw.word[1]};
  if (a.before) {
    for (int set = 0; set < 2; ++set) start[set] += static_cast<uint32_t>(a.before[set * a.num_rows + row]);
  }
  uint32_t sum[2] = {start[0], start[1]};
  uint64_t total = 0;
  alignas(64) float log_share[kBlock], share[kBlock];
  for (int64_t first = 0; first < a.num_blocks; first += kBlock) {
    const int64_t count = std::min(kBlock, a.num_blocks - first);
    for (int64_t i = 0; i < kBlock; ++i)
      log_share[i] = i < count ? static_cast<float>(block_lse[first + i] - rest_lse) : -kInf;
    for (int64_t i = 0; i < kBlock; i += kLanes) store(share + i, exp(load(log_share + i)));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = first + i;
      const uint64_t odds = block == label_block ? kOne : pair_odds(share[i], a.tau);
      total += odds;
      if (!take(sum[0], odds)) continue;
      bits[block >> 3] |= static_cast<uint8_t>(1 << (block & 7));
      if (!two_sets) continue;
      if (take(sum[1], block == label_block ? kOne : second_pair_odds(share[i], a.tau, a.second_tau)))
        second_bits[block >> 3] |= static_cast<uint8_t>(1 << (block & 7));
    }
  }
  a.most_pairs[row] = static_cast<int32_t>((total + kOne - 1) >> 32);
  if (a.sums) {
    for (int set = 0; set < 2; ++set) a.sums[set * a.num_rows + row] = static_cast<uint32_t>(sum[set] - start[set]);
  }
}

}  // namespace
}  // namespace FASTDPO_ISA
}  // namespace fastdpo

#include "cpu/bf16_pairs.h"
#include "cpu/divergence_folds.h"

namespace fastdpo {
namespace FASTDPO_ISA {

extern const CpuKernels kernels;
#define FASTDPO_STRING_OF(x) #x
#define FASTDPO_STRING(x) FASTDPO_STRING_OF(x)
const CpuKernels kernels = {FASTDPO_STRING(FASTDPO_ISA),
                            fold_rows,
                            grad_rows,
                            routed_grad_rows,
                            route_row,
                            divergence_fold_rows,
                            divergence_grad_rows,
                            routed_divergence_grad_rows,
                            any_products,
                            any_add_to_tokens,
                            any_add_to_columns};

}  // namespace FASTDPO_ISA
}  // namespace fastdpo
