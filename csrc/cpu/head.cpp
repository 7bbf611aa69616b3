// The head's products and the kept pairs' gradients, in pieces for the threads. A sum is one piece's, in a fixed order.
#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/folds.h"
#include "cpu/parallel.h"

namespace fastdpo {
namespace {

constexpr int64_t kPiece = kBf16Rows;  // rows of a part of a tile, whose columns are packed for each piece

Workspace& workspace() {
  static thread_local const std::unique_ptr<Workspace> own(new Workspace);
  return *own;
}

// `function(j, begin, end)` over pieces of the rows of every part of a tile.
template <class Function>
void pieces_of(const BlockTile& tile, int64_t together, int num_threads, Function function) {
  struct Piece {
    int64_t j, begin, end;
  };
  std::vector<Piece> pieces;
  for (int64_t j = 0; j < tile.parts(together); ++j) {
    const int64_t count = tile.part(j, together).count, parts = (count + kPiece - 1) / kPiece;
    for (int64_t part = 0; part < parts; ++part) pieces.push_back({j, count * part / parts, count * (part + 1) / parts});
  }
  parallel_for(static_cast<int64_t>(pieces.size()), 1, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) function(pieces[i].j, pieces[i].begin, pieces[i].end);
  });
}

// Leaves dz times the weight of either gradient: in the tile the columns', in dz_hidden the tokens', where they differ.
void weigh(const RoutedGradArgs& a) {
  const Tile& tile = a.grad.tile;
  const float* in_place = a.weight_set >= 0 ? a.columns_weight : a.hidden_weight;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    float* dz = tile.data + row * tile.stride;
    if (a.dz_hidden && a.hidden_weight[row] != 0.0f) {
      float* out = a.dz_hidden + row * a.dz_hidden_stride;
      for (int64_t i = 0; i < tile.num_cols; ++i) out[i] = dz[i] * a.hidden_weight[row];
    }
    const float weight = in_place[row];
    if (weight == 1.0f) continue;
    for (int64_t i = 0; i < tile.num_cols; ++i) dz[i] = weight == 0.0f ? 0.0f : dz[i] * weight;
  }
}

// Columns of a hidden state that are taken together.
int64_t columns_together(Product product) {
  if (product != Product::kBf16Library) return kBlock;
  require_bf16_product();
  return kBf16Columns;
}

}  // namespace

void products(const ProductsArgs& a) {
  if (a.product == Product::kBf16Library) require_bf16_product();
  pieces_of(a.tile, kTogether, a.num_threads, [&](int64_t j, int64_t begin, int64_t end) {
    cpu_kernels().products(a, j, begin, end, workspace());
  });
}

void routed_grad(const RoutedGradArgs& a) {
  pieces_of(a.blocks, 1, a.grad.num_threads, [&](int64_t j, int64_t begin, int64_t end) {
    const RoutedGradArgs part = a.part(j, begin, end);
    cpu_kernels().routed_grad_rows(part, 0, end - begin);
    weigh(part);
  });
}

void routed_divergence_grad(const RoutedDivergenceGradArgs& a) {
  pieces_of(a.routed.blocks, 1, a.routed.grad.num_threads, [&](int64_t j, int64_t begin, int64_t end) {
    const RoutedDivergenceGradArgs part = a.part(j, begin, end);
    cpu_kernels().routed_divergence_grad_rows(part, 0, end - begin);
    weigh(part.routed);
  });
}

void add_to_tokens(const AddToTokensArgs& a) {
  const int64_t group = columns_together(a.product), groups = (a.factor.num_cols + group - 1) / group;
  if (groups == 0) return;
  const int64_t most = std::max<int64_t>(1, a.num_tokens / 64);
  const int64_t wanted = (2 * int64_t{a.num_threads} + groups - 1) / groups;
  const int64_t parts = std::min(most, std::max<int64_t>(1, wanted));
  parallel_for(groups * parts, 1, a.num_threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t part = i / groups, begin = a.num_tokens * part / parts, end = a.num_tokens * (part + 1) / parts;
      cpu_kernels().add_to_tokens(a, i % groups * group, a.out_first + begin, a.out_first + end, workspace());
    }
  });
}

void add_to_columns(const AddToColumnsArgs& a) {
  const int64_t group = columns_together(a.product), groups = a.out ? (a.factor.num_cols + group - 1) / group : 1;
  parallel_for(a.tile.parts(kTogether) * groups, 1, a.num_threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      cpu_kernels().add_to_columns(a, i / groups, i % groups * group, workspace());
  });
}

}  // namespace fastdpo
