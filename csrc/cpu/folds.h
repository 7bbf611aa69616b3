// The vectorised loops over logits tiles, one table per instruction set; `cpu_kernels()` picks at run time.
#pragma once

#include <vector>

#include "divergence_structs.h"
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
  // Two heads' tiles together.
  void (*divergence_fold_rows)(const DivergenceFoldArgs&, int64_t begin, int64_t end);
  void (*divergence_grad_rows)(const DivergenceGradArgs&, int64_t begin, int64_t end);
  void (*routed_divergence_grad_rows)(const RoutedDivergenceGradArgs&, int64_t begin, int64_t end);
};

const CpuKernels& cpu_kernels();
std::vector<const char*> supported_isas();
bool use_isa(const char* name);  // for tests of every instruction set on one machine; not while a call runs

void fold(const FoldArgs&);
void sum_blocks(const SumBlocksArgs&);
void finish(const FinishArgs&);
void route(const RouteArgs&);
void grad(const GradArgs&);
int64_t routed_grad(const RoutedGradArgs&);  // the number of rows of dz_hidden
void count_pairs(const CountPairsArgs&);
void fill_pairs(const FillPairsArgs&);
void gather_rows(const GatherArgs&);
void scatter_add_rows(const ScatterArgs&);
void divergence_fold(const DivergenceFoldArgs&);
void divergence_grad(const DivergenceGradArgs&);
int64_t routed_divergence_grad(const RoutedDivergenceGradArgs&);

}  // namespace fastdpo
