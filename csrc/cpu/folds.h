// The vectorised loops over logits tiles, one table per instruction set; `cpu_kernels()` picks at run time.
#pragma once

#include <string>
#include <vector>

#include "divergence_structs.h"
#include "structs.h"

namespace fastdpo {

constexpr int64_t kDepth = 256;  // terms of a sum that are multiplied between two looks at the sums in memory
constexpr int64_t kTogether = 4;  // blocks of a tile that share a reading of the other factor
constexpr int64_t kStripStride = kTogether * kBlock + 16;  // of the rows of a strip, whose depth is at most that
static_assert(kDepth <= kTogether * kBlock, "a strip has room for so many terms");

// Of products by a library in bf16: the most rows of a piece, and columns of a hidden state taken together.
constexpr int64_t kBf16Rows = 512, kBf16Columns = 512;

// What one thread works in, kept for its next piece: 1 MiB, and of products by a library in bf16 as much. No memory is read
// as two types.
struct Workspace {
  alignas(64) float panels[kTogether * kBlock * kDepth];
  alignas(64) float strip[16 * kStripStride];
  alignas(64) float dz[kDepth * (kBlock + 64)];
  alignas(64) float sums[kTogether * kBlock * (kBlock + 16)];
  alignas(64) BFloat16 rows[kBf16Rows * kBf16Columns];
  alignas(64) BFloat16 rounded_dz[kBf16Rows * kBlock];
};

struct CpuKernels {
  const char* isa;
  // Rows [begin, end) of a tile.
  void (*fold_rows)(const FoldArgs&, int64_t begin, int64_t end);
  void (*grad_rows)(const GradArgs&, int64_t begin, int64_t end);
  void (*routed_grad_rows)(const RoutedGradArgs&, int64_t begin, int64_t end);
  void (*route_row)(const RouteArgs&, int64_t row);
  // Two heads' tiles together.
  void (*divergence_fold_rows)(const DivergenceFoldArgs&, int64_t begin, int64_t end);
  void (*divergence_grad_rows)(const DivergenceGradArgs&, int64_t begin, int64_t end);
  void (*routed_divergence_grad_rows)(const RoutedDivergenceGradArgs&, int64_t begin, int64_t end);
  // Rows [begin, end) of the tile's j-th part; columns [col, col + kBlock) of tokens, or of rows of the j-th part; of
  // a library's [col, col + kBf16Columns).
  void (*products)(const ProductsArgs&, int64_t j, int64_t begin, int64_t end, Workspace&);
  void (*add_to_tokens)(const AddToTokensArgs&, int64_t col, int64_t begin, int64_t end, Workspace&);
  void (*add_to_columns)(const AddToColumnsArgs&, int64_t j, int64_t col, Workspace&);
};

const CpuKernels& cpu_kernels();
std::vector<const char*> supported_isas();
bool use_isa(const std::string& name);  // for tests of every instruction set on one machine; not while a call runs

void fold(const FoldArgs&);
void sum_blocks(const SumBlocksArgs&);
void finish(const FinishArgs&);
void route(const RouteArgs&);
void grad(const GradArgs&);
void routed_grad(const RoutedGradArgs&);
void count_pairs(const CountPairsArgs&);
void fill_pairs(const FillPairsArgs&);
void use_huge_pages(const MemoryArgs&);
bool load_bf16_product(const std::string& path);
void require_bf16_product();  // or std::runtime_error
void bf16_gemm(Bf16Rows a, Bf16Rows b, Bf16Sums out, int64_t n, int64_t m, int64_t k);
void bf16_product(const Bf16ProductArgs&);
void products(const ProductsArgs&);
void add_to_tokens(const AddToTokensArgs&);
void add_to_columns(const AddToColumnsArgs&);
void divergence_fold(const DivergenceFoldArgs&);
void divergence_grad(const DivergenceGradArgs&);
void routed_divergence_grad(const RoutedDivergenceGradArgs&);

}  // namespace fastdpo
