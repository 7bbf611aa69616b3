// Which pairs the backward computes, shared by CPU and GPU code; the derivation and the readable oracle are
// fastdpo/routing.py. q is an integer, a fraction of 2^32, so that its running sum does not see tiles, chunks or shards.
// The draw comes from Philox4x32-10 (Salmon et al., SC'11), counter = token, key = seed.
#pragma once

#include <cmath>
#include <cstdint>

#include "shared/host_device.h"

namespace fastdpo {

struct Philox4 {
  uint32_t word[4];
};

FASTDPO_HD static inline Philox4 philox(uint64_t seed, uint64_t token) {
  uint32_t c0 = static_cast<uint32_t>(token), c1 = static_cast<uint32_t>(token >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr uint64_t kOne = uint64_t{1} << 32;  // probability 1: the pair is kept surely

// q of a block that does not hold the label. Written so that a NaN share is kept: a poisoned row shows up in its
// gradient instead of vanishing from it. At least 1 where there is anything to compute.
FASTDPO_HD static inline uint64_t pair_odds(float share, float tau) {
  if (!(share < tau)) return kOne;
  if (share == 0.0f) return 0;
  const float q = share / tau * 4294967296.0f;
  return q >= 1.0f ? static_cast<uint64_t>(q) : 1;  // 1 of NaN too: -inf / inf
}

// The same for a pair of the larger set, given that it is in there: P(in the smaller set, of the larger `second_tau`).
FASTDPO_HD static inline uint64_t second_pair_odds(float share, float tau, float second_tau) {
  return pair_odds(share < tau ? tau : share, second_tau);
}

// Whether the running sum, which stood at `sum`, takes a point in these odds: sure, or a carry of 32 bits.
FASTDPO_HD static inline bool take(uint32_t& sum, uint64_t odds) {
  if (odds == kOne) return true;
  const uint32_t before = sum;
  sum += static_cast<uint32_t>(odds);
  return sum < before;
}

// 1 / q of a pair that was kept: its odds were at least 1, whatever is left of the share where it is computed again.
FASTDPO_HD static inline float pair_weight(uint64_t odds) {
  return 4294967296.0f / static_cast<float>(odds == 0 ? 1 : odds);
}

}  // namespace fastdpo
