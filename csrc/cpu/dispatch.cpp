// Chooses an instruction set once, and spreads rows over threads. Every output belongs to one row or one block, so
// results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/folds.h"
#include "cpu/parallel.h"
#include "cpu/row_stats.h"

namespace fastdpo {

// Of folds.cpp, as far as the compiler knows them.
namespace avx512_bf16 { extern const CpuKernels kernels; }
namespace avx512 { extern const CpuKernels kernels; }
namespace avx2 { extern const CpuKernels kernels; }
namespace baseline { extern const CpuKernels kernels; }

namespace {

// What this processor can run, best first.
std::vector<const CpuKernels*> supported_kernels() {
  std::vector<const CpuKernels*> found;
#ifdef FASTDPO_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
#ifdef FASTDPO_HAVE_AVX512_BF16
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernels);
#endif
    found.push_back(&avx512::kernels);
  }
#endif
#ifdef FASTDPO_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

const CpuKernels*& chosen_kernels() {
  static const CpuKernels* chosen = supported_kernels().front();
  return chosen;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *chosen_kernels(); }

std::vector<const char*> supported_isas() {
  std::vector<const char*> names;
  for (const CpuKernels* kernels : supported_kernels()) names.push_back(kernels->isa);
  return names;
}

bool use_isa(const std::string& name) {
  for (const CpuKernels* kernels : supported_kernels()) {
    if (name != kernels->isa) continue;
    chosen_kernels() = kernels;
    return true;
  }
  return false;
}

namespace {

// `function(begin, end)` over rows, in pieces of some tens of microseconds: less is not worth waking a thread for.
template <class Function>
void pieces(int64_t num_rows, int64_t elements_per_row, int num_threads, Function function) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(elements_per_row, 1));
  parallel_for(num_rows, grain, num_threads, function);
}

template <class Function>
void each_row(int64_t num_rows, int64_t elements_per_row, int num_threads, Function function) {
  pieces(num_rows, elements_per_row, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

}  // namespace

void fold(const FoldArgs& a) {
  pieces(a.tile.num_rows, a.tile.num_cols, a.num_threads,
         [&](int64_t begin, int64_t end) { cpu_kernels().fold_rows(a, begin, end); });
}

void grad(const GradArgs& a) {
  pieces(a.tile.num_rows, a.tile.num_cols, a.num_threads,
         [&](int64_t begin, int64_t end) { cpu_kernels().grad_rows(a, begin, end); });
}

void divergence_grad(const DivergenceGradArgs& a) {
  const Tile& tile = a.grad.tile;
  pieces(tile.num_rows, 2 * tile.num_cols, a.grad.num_threads,
         [&](int64_t begin, int64_t end) { cpu_kernels().divergence_grad_rows(a, begin, end); });
}

void divergence_fold(const DivergenceFoldArgs& a) {
  pieces(a.tile.num_rows, 2 * a.tile.num_cols, a.num_threads,
         [&](int64_t begin, int64_t end) { cpu_kernels().divergence_fold_rows(a, begin, end); });
}

void sum_blocks(const SumBlocksArgs& a) {
  each_row(a.num_rows, a.num_blocks * 8, a.num_threads, [&](int64_t row) {
    const double* values = a.block_lse + row * a.stride;
    double block_max = -INFINITY, total = 0.0;
    for (int64_t i = 0; i < a.num_blocks; ++i) block_max = std::fmax(block_max, values[i]);
    const double m = block_max == -INFINITY ? 0.0 : block_max;
    for (int64_t i = 0; i < a.num_blocks; ++i) total += std::exp(values[i] - m);
    a.rest_lse[row] = m + std::log(total);
  });
}

void finish(const FinishArgs& a) {
  each_row(a.num_rows, 64, a.num_threads, [&](int64_t row) {
    const LabelLogp label = label_logp(a.rest_lse[row], 0.0, a.label_logit[row]);
    a.logps[row] = static_cast<float>(label.logp);
    a.lse[row] = static_cast<float>(label.lse);
    if (a.stats) finish_stats(a, row);
  });
}

void route(const RouteArgs& a) {
  each_row(a.num_rows, a.num_blocks * 8, a.num_threads, [&](int64_t row) { cpu_kernels().route_row(a, row); });
}

void count_pairs(const CountPairsArgs& a) {
  const PairSet& set = a.set;
  std::fill_n(a.counts, set.num_blocks, int64_t{0});
  const int64_t first = set.first_block / 8, bytes = bytes_of(set.first_block + set.num_blocks) - first;
  pieces(bytes, set.last_token - set.first_token, set.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = set.first_token; token < set.last_token; ++token) {
      if (set.coef[token] == 0.0f) continue;
      for (int64_t byte = first + begin; byte < first + end; ++byte)
        for (unsigned bits = set.bitmap[token * set.bitmap_stride + byte]; bits; bits &= bits - 1) {
          const int64_t block = byte * 8 + __builtin_ctz(bits) - set.first_block;
          if (block >= 0 && block < set.num_blocks) ++a.counts[block];
        }
    }
  });
}

void fill_pairs(const FillPairsArgs& a) {
  const PairSet& set = a.set;
  each_row(set.num_blocks, set.last_token - set.first_token, set.num_threads, [&](int64_t i) {
    const int64_t block = set.first_block + i;
    int32_t *out = a.tokens + a.offsets[i], *const end = a.tokens + a.offsets[i + 1];
    for (int64_t token = set.first_token; token < set.last_token; ++token) {
      const bool kept = set.bitmap[token * set.bitmap_stride + (block >> 3)] >> (block & 7) & 1;
      if (!kept || set.coef[token] == 0.0f) continue;
      if (out == end) throw std::invalid_argument("fill_pairs: a block has more tokens than its offsets say");
      *out++ = static_cast<int32_t>(token);
    }
    if (out != end) throw std::invalid_argument("fill_pairs: a block has fewer tokens than its offsets say");
  });
}

}  // namespace fastdpo
