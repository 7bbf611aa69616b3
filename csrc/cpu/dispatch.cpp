// Chooses an instruction set once, and spreads rows over threads. Every output belongs to one row or one block, so
// results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/folds.h"
#include "cpu/parallel.h"
#include "shared/routing.h"
#include "shared/row_formulas.h"

namespace fastdpo {

#ifdef FASTDPO_HAVE_AVX512
namespace avx512 {
extern const CpuKernels kernels;
}
#endif
#ifdef FASTDPO_HAVE_AVX2
namespace avx2 {
extern const CpuKernels kernels;
}
#endif
namespace baseline {
extern const CpuKernels kernels;
}

namespace {

// What this processor can run, best first.
std::vector<const CpuKernels*> supported_kernels() {
  std::vector<const CpuKernels*> found;
#ifdef FASTDPO_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
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

bool use_isa(const char* name) {
  for (const CpuKernels* kernels : supported_kernels()) {
    if (std::strcmp(kernels->isa, name)) continue;
    chosen_kernels() = kernels;
    return true;
  }
  return false;
}

namespace {

// Rows per piece so that a piece is some tens of microseconds of work: less is not worth waking a thread for.
int64_t grain_for(int64_t elements_per_row) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(elements_per_row, 1)); }

}  // namespace

void fold(const FoldArgs& a, int num_threads) {
  parallel_for(a.tile.num_rows, grain_for(a.tile.num_cols), num_threads,
               [&](int64_t begin, int64_t end) { cpu_kernels().fold_rows(a, begin, end); });
}

void grad(const GradArgs& a, int num_threads) {
  parallel_for(a.tile.num_rows, grain_for(a.tile.num_cols), num_threads,
               [&](int64_t begin, int64_t end) { cpu_kernels().grad_rows(a, begin, end); });
}

int64_t routed_grad(const RoutedGradArgs& a, int num_threads) {
  const Tile& tile = a.grad.tile;
  const int64_t grain = grain_for(tile.num_cols);
  parallel_for(tile.num_rows, grain, num_threads,
               [&](int64_t begin, int64_t end) { cpu_kernels().routed_grad_rows(a, begin, end); });
  int64_t num_hidden = 0;
  if (a.dz_hidden) {
    const float* weight = a.row_weight + a.hidden_set * tile.num_rows;
    for (int64_t row = 0; row < tile.num_rows; ++row) {
      if (weight[row] == 0.0f) continue;
      const float* dz = tile.data + row * tile.stride;
      float* out = a.dz_hidden + num_hidden * tile.num_cols;
      for (int64_t i = 0; i < tile.num_cols; ++i) out[i] = dz[i] * weight[row];
      a.hidden_tokens[num_hidden++] = a.grad.tokens[row];
    }
  }
  const float* weight = a.row_weight + (a.weight_set >= 0 ? a.weight_set : a.hidden_set) * tile.num_rows;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    if (weight[row] == 1.0f) continue;
    float* dz = tile.data + row * tile.stride;
    for (int64_t i = 0; i < tile.num_cols; ++i) dz[i] = weight[row] == 0.0f ? 0.0f : dz[i] * weight[row];
  }
  return num_hidden;
}

void sum_blocks(const double* block_lse, int64_t num_rows, int64_t num_blocks, double* rest_lse, int num_threads) {
  parallel_for(num_rows, grain_for(num_blocks * 8), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double* values = block_lse + row * num_blocks;
      double block_max = -INFINITY, total = 0.0;
      for (int64_t i = 0; i < num_blocks; ++i) block_max = std::fmax(block_max, values[i]);
      const double m = block_max == -INFINITY ? 0.0 : block_max;
      for (int64_t i = 0; i < num_blocks; ++i) total += std::exp(values[i] - m);
      rest_lse[row] = m + std::log(total);
    }
  });
}

void finish(const FinishArgs& a, int num_threads) {
  parallel_for(a.num_rows, grain_for(64), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double label_logit = a.label_logit[row];
      const LabelLogp label = label_logp(a.rest_lse[row], 0.0, label_logit);
      a.logps[row] = static_cast<float>(label.logp);
      a.lse[row] = static_cast<float>(label.lse);
      if (!a.stats) continue;
      const RowStats& s = a.stats[row];
      const double log_sum = std::log(s.sum_exp);
      const LabelLogp exact = label_logp(s.max, log_sum, label_logit);
      if (a.entropy) a.entropy[row] = static_cast<float>(row_entropy(exact, log_sum, s.sum_exp_z / s.sum_exp));
      if (a.log_sum_sq_probs) {
        const double p = std::exp(exact.logp);
        const double scale = s.sum_exp == 0.0 ? 0.0 : std::exp(exact.rest_logp) / s.sum_exp;  // exp(z - max) -> p
        a.log_sum_sq_probs[row] = static_cast<float>(std::log(scale * scale * s.sum_exp_sq + p * p));
      }
      if (a.mean_logit) a.mean_logit[row] = static_cast<float>(s.sum_z / a.vocab_size);
      // argmax returns the first maximum: a tie counts only when the label comes first
      if (a.is_top1) a.is_top1[row] = label_logit > s.max_before && label_logit >= s.max_after;
    }
  });
}

void route(const RouteArgs& a, int num_threads) {
  parallel_for(a.num_rows, grain_for(a.num_blocks * 8), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) cpu_kernels().route_row(a, row);
  });
}

void count_pairs(const uint8_t* bitmap, int64_t bitmap_stride, const float* coef, int64_t num_tokens,
                 int64_t num_blocks, int64_t* counts, int num_threads) {
  std::memset(counts, 0, num_blocks * sizeof(int64_t));
  const int64_t bytes = (num_blocks + 7) / 8;
  parallel_for(bytes, grain_for(num_tokens), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = 0; token < num_tokens; ++token) {
      if (coef[token] == 0.0f) continue;
      for (int64_t byte = begin; byte < end; ++byte)
        for (unsigned bits = bitmap[token * bitmap_stride + byte]; bits; bits &= bits - 1)
          ++counts[byte * 8 + __builtin_ctz(bits)];
    }
  });
}

void fill_pairs(const uint8_t* bitmap, int64_t bitmap_stride, const float* coef, int64_t first_token,
                int64_t num_tokens, int64_t first_block, int64_t num_blocks, const int64_t* offsets, int32_t* tokens,
                int num_threads) {
  // offsets[num_blocks + 1]; ascending tokens inside a block, whatever the threads
  parallel_for(num_blocks, grain_for(num_tokens), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t byte = (first_block + block) >> 3;
      const int shift = (first_block + block) & 7;
      int32_t* out = tokens + offsets[block];
      for (int64_t token = first_token; token < first_token + num_tokens; ++token)
        if ((bitmap[token * bitmap_stride + byte] >> shift & 1) && coef[token] != 0.0f) *out++ = static_cast<int32_t>(token);
    }
  });
}

void gather_rows(float* dst, int64_t dst_stride, const void* src, DType type, int64_t src_stride,
                 const int32_t* tokens, const int64_t* rows, int64_t num_rows, int64_t num_cols, int num_threads) {
  const int64_t size = type == DType::kFloat32 ? 4 : 2;
  parallel_for(num_rows, grain_for(num_cols), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = tokens ? tokens[i] : i;
      const int64_t row = rows ? rows[token] : token;
      const char* source = static_cast<const char*>(src) + row * src_stride * size;
      cpu_kernels().load_row(dst + i * dst_stride, source, type, num_cols);
    }
  });
}

void scatter_add_rows(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, const int32_t* tokens,
                      const int64_t* rows, int64_t num_rows, int64_t num_cols, int num_threads) {
  parallel_for(num_rows, grain_for(num_cols), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {  // a token stands once in a list, so its row has one writer
      const int64_t token = tokens ? tokens[i] : i;
      cpu_kernels().add_row(dst + (rows ? rows[token] : token) * dst_stride, src + i * src_stride, num_cols);
    }
  });
}

}  // namespace fastdpo
