// Which pairs the backward computes (DESIGN, section 3), shared by CPU and GPU code; the readable oracle is
// fastdpo/routing.py. Uniforms come from Philox4x32-10 (Salmon et al., SC'11), counter = (token, block / 4),
// key = seed, word block % 4: a pair's draw depends on nothing else, so it does not see tile shapes.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastdpo {

struct Philox4 {
  uint32_t word[4];
};

FASTDPO_HD static inline Philox4 philox(uint64_t seed, uint64_t token, uint32_t group) {
  uint32_t c0 = static_cast<uint32_t>(token), c1 = static_cast<uint32_t>(token >> 32), c2 = group, c3 = 0;
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

// Uniform in the open interval (0, 1), 24 bits.
FASTDPO_HD static inline float uniform_of(uint32_t word) {
  return (static_cast<float>(word >> 8) + 0.5f) * (1.0f / 16777216.0f);
}

FASTDPO_HD static inline float pair_uniform(uint64_t seed, uint64_t token, uint64_t block) {
  return uniform_of(philox(seed, token, static_cast<uint32_t>(block >> 2)).word[block & 3]);
}

// Kept surely from tau on, with probability mass / tau below. Written so that a NaN mass is kept: a poisoned row
// shows up in its gradient instead of vanishing from it.
FASTDPO_HD static inline bool keep_pair(float mass, float tau, float uniform) { return !(mass < tau * uniform); }

// 1 / P(kept), or 0 for a pair outside the set.
FASTDPO_HD static inline float pair_weight(float mass, float tau, float uniform) {
  if (!keep_pair(mass, tau, uniform)) return 0.0f;
  return mass < tau ? tau / mass : 1.0f;
}

}  // namespace fastdpo
