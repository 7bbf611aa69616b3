// bf16 and fp16 as their bits, and their conversions: the hardware's on a GPU, the same rounding (to nearest, ties to
// even) in integers elsewhere. Functions are static: a translation unit compiled for AVX-512 keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastdpo {

struct alignas(2) BFloat16 {
  uint16_t bits;
};
struct alignas(2) Float16 {
  uint16_t bits;
};

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// `function` of a value of that type.
template <class Function>
static inline auto by_type(DType dtype, Function function) {
  if (dtype == DType::kBFloat16) return function(BFloat16{});
  if (dtype == DType::kFloat16) return function(Float16{});
  return function(float{});
}

FASTDPO_HD static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
FASTDPO_HD static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTDPO_HD static inline float to_float(float x) { return x; }
FASTDPO_HD static inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
FASTDPO_HD static inline float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // Inf, NaN
  const float value = float_of(magnitude << 13) * 0x1p112f;  // exponents differ by 112; this normalises subnormals too
  return sign ? -value : value;
#endif
}

FASTDPO_HD static inline void from_float(float x, float* out) { *out = x; }
FASTDPO_HD static inline void from_float(float x, BFloat16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bits_of(x);
  if (x != x) out->bits = 0x7fffu;
  else out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
FASTDPO_HD static inline void from_float(float x, Float16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  uint32_t bits;
  if (magnitude > 0x7f800000u) {
    bits = 0x7fffu;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to Inf
    bits = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the multiples of 2^-24 in the low bits
    bits = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    bits = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | bits);
#endif
}

}  // namespace fastdpo
