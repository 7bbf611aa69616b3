// The divergence of a student's distribution p from a teacher's r, from the sums of a block of the vocabulary;
// fastdpo/ops/divergence/problem.py has the formulas and where they come from.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastdpo {

enum class DivergenceKind : int { kForwardKL, kReverseKL, kJSD };

constexpr float kLeastDifference = 0x1p-10f;  // EPS, nats

// One block of one token, the label's id left out. u: log ratio of the two distributions inside the block. Of JSD's
// second sweep, whose lse are known: u = log(p / m), and mean_r is what the block adds to the divergence.
struct BlockDivergence {
  double lse, ref_lse;  // of either head's logits in the block
  float mean_p, var_p;  // of u under p
  float mean_r, var_r;  // and under r
  float entropy;        // of p inside the block
  float unused;
};
constexpr int64_t kBlockDivergenceSize = sizeof(BlockDivergence) / sizeof(double);

// At most what sum of |dz| a block has: its probabilities, and its second moments of what dz has beside p.
template <class T>
static inline T divergence_bound(DivergenceKind kind, T p, T r, T square_p, T square_r) {
  const T eps = static_cast<T>(kLeastDifference) * static_cast<T>(kLeastDifference);
  if (kind != DivergenceKind::kForwardKL) return std::sqrt(p * (square_p + eps * p));
  const T mass = p + r, bound = std::sqrt(mass * (square_p + square_r + eps * mass)) * static_cast<T>(0.5);
  return mass < bound ? mass : bound;
}

static inline double weighted_term(double p, double x) { return p == 0.0 ? 0.0 : p * x; }

}  // namespace fastdpo
