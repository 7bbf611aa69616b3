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

// At most what sum of |dz| a block has: its probabilities, and the second moments of what dz has beside p or r.
static inline float divergence_bound(DivergenceKind kind, float p, float r, float square) {
  const float eps = kLeastDifference * kLeastDifference;
  if (kind != DivergenceKind::kForwardKL) return std::sqrt(p * (square + eps * p));
  const float mass = p + r, bound = std::sqrt(mass * (square + eps * mass)) * 0.5f;
  return mass < bound ? mass : bound;
}

}  // namespace fastdpo
