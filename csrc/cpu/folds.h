// The vectorised loops over logits tiles, one table per instruction set; `cpu_kernels()` picks at run time.
#pragma once

#include <vector>

#include "structs.h"

namespace fastdpo {

struct CpuKernels {
  const char* isa;
  // Rows [begin, end) of a tile.
  void (*fold_rows)(const FoldArgs&, int64_t begin, int64_t end);
  void (*grad_rows)(const GradArgs&, int64_t begin, int64_t end);
  void (*routed_grad_rows)(const RoutedGradArgs&, int64_t begin, int64_t end);
  // dst[:num_cols] += src, and float copies of half types.
  void (*add_row)(float* dst, const float* src, int64_t num_cols);
  void (*load_row)(float* dst, const void* src, DType type, int64_t num_cols);
  void (*route_row)(const RouteArgs&, int64_t row);
};

const CpuKernels& cpu_kernels();
std::vector<const char*> supported_isas();
bool use_isa(const char* name);  // for tests of every instruction set on one machine; not while a call runs

void fold(const FoldArgs&, int num_threads);
// [num_rows, num_blocks] -> [num_rows] log-sum-exp
void sum_blocks(const double* block_lse, int64_t num_rows, int64_t num_blocks, double* rest_lse, int num_threads);
void finish(const FinishArgs&, int num_threads);
void route(const RouteArgs&, int num_threads);
void grad(const GradArgs&, int num_threads);
int64_t routed_grad(const RoutedGradArgs&, int num_threads);  // the number of rows of dz_hidden

// Per-block token lists from the bitmap. Tokens with coef == 0 have no gradient and are left out.
void count_pairs(const uint8_t* bitmap, int64_t bitmap_stride, const float* coef, int64_t num_tokens,
                 int64_t num_blocks, int64_t* counts, int num_threads);
void fill_pairs(const uint8_t* bitmap, int64_t bitmap_stride, const float* coef, int64_t first_token,
                int64_t num_tokens, int64_t first_block, int64_t num_blocks, const int64_t* offsets, int32_t* tokens,
                int num_threads);

// dst[i] = float(src[row(i)]) and dst[row(i)] += src[i], with row(i) = rows[tokens[i]]; either list may be null (identity).
void gather_rows(float* dst, int64_t dst_stride, const void* src, DType type, int64_t src_stride,
                 const int32_t* tokens, const int64_t* rows, int64_t num_rows, int64_t num_cols, int num_threads);
void scatter_add_rows(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, const int32_t* tokens,
                      const int64_t* rows, int64_t num_rows, int64_t num_cols, int num_threads);

}  // namespace fastdpo
