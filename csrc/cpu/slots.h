// What is multiplied, in slots of four bytes. One holds kTerms terms of a sum: one in fp32, or a pair in bf16, the first
// lower, which a processor may have units for.
#pragma once

#include <utility>

#include "cpu/simd.h"
#include "head_structs.h"
#include "shared/half.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace fastdpo {
namespace FASTDPO_ISA {
namespace {

typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));

inline BitVec bits_of(Vec x) {
  BitVec bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline Vec floats_of(BitVec bits) {
  Vec x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline BitVec load_bits(const void* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, BitVec);
}

inline Vec load_floats(const float* p) { return load(p); }
inline Vec load_floats(const BFloat16* p) { return floats_of(load_bits(p) << 16); }
inline Vec load_floats(const Float16* p) {  // as half.h does
  const BitVec half = load_bits(p), magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
  const BitVec finite = bits_of(floats_of(magnitude << 13) * splat(0x1p112f));
  const BitVec special = ((magnitude & 0x3ff) << 13) | 0x7f800000;
  return floats_of((magnitude >= 0x7c00 ? special : finite) | sign);
}

template <DType kRounded>
inline float rounded(float x) {
  if (kRounded == DType::kFloat32) return x;
  if (kRounded == DType::kBFloat16) {
    BFloat16 half;
    from_float(x, &half);
    return to_float(half);
  }
  Float16 half;
  from_float(x, &half);
  return to_float(half);
}
template <DType kRounded>
inline Vec rounded(Vec x) {
  if (kRounded == DType::kFloat32) return x;
  if (kRounded == DType::kBFloat16) {
    const BitVec bits = bits_of(x), nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return x == x ? floats_of(nearest) : x + x;  // quiet, so that its upper half is NaN too
  }
  for (int i = 0; i < kLanes; ++i) x[i] = rounded<DType::kFloat16>(x[i]);
  return x;
}

template <DType kRounded, class T>
void convert_as(float* to, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, rounded<kRounded>(load_floats(from + i)));
  for (; i < count; ++i) to[i] = rounded<kRounded>(to_float(from[i]));
}

// `count` elements of a factor from `from` on, as fp32.
inline void convert(float* to, const void* from, const Factor& factor, int64_t count) {
  by_type(factor.dtype, [&](auto x) {
    const auto* source = static_cast<const decltype(x)*>(from);
    if (factor.rounded == factor.dtype || factor.rounded == DType::kFloat32)
      return convert_as<DType::kFloat32>(to, source, count);
    if (factor.rounded == DType::kBFloat16) return convert_as<DType::kBFloat16>(to, source, count);
    return convert_as<DType::kFloat16>(to, source, count);
  });
}

// As it lies in memory.
template <int kTerms>
inline bool is_plain(const Factor& factor) {
  if (kTerms == 2) return factor.dtype == DType::kBFloat16;
  return factor.dtype == DType::kFloat32 && factor.rounded == DType::kFloat32;
}

// Rounded to bf16, which is the upper half of the bits.
inline BitVec upper_halves(const BFloat16* p) { return load_bits(p) << 16; }
template <class T>
inline BitVec upper_halves(const T* p) {
  return bits_of(rounded<DType::kBFloat16>(load_floats(p)));
}
template <class T>
inline uint32_t pair_of(T first, T second) {
  BFloat16 halves[2];
  from_float(to_float(first), halves);
  from_float(to_float(second), halves + 1);
  return halves[0].bits | static_cast<uint32_t>(halves[1].bits) << 16;
}

// `count` terms as slots; of a last pair the second may be 0.
template <class T>
void pair_up(void* to, const T* from, int64_t count) {
  auto* out = static_cast<char*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const HalfVec half = __builtin_convertvector(upper_halves(from + i) >> 16, HalfVec);
    std::memcpy(out + i * 2, &half, sizeof half);
  }
  for (; i < count; i += 2) {
    const uint32_t pair = pair_of(from[i], i + 1 < count ? from[i + 1] : T{});
    std::memcpy(out + i * 2, &pair, sizeof pair);
  }
}
template <int kTerms>
inline void to_slots(float* to, const void* from, const Factor& factor, int64_t count) {
  if (kTerms == 1) return convert(to, from, factor, count);
  by_type(factor.dtype, [&](auto x) { pair_up(to, static_cast<const decltype(x)*>(from), count); });
}

// sums + x * y, of slots.
template <int kTerms>
inline Vec multiply_add(Vec sums, Vec x, Vec y) {
  if constexpr (kTerms == 1) return sums + x * y;
#ifdef __AVX512BF16__
  __m512bh pairs[2];
  std::memcpy(pairs, &x, sizeof x);
  std::memcpy(pairs + 1, &y, sizeof y);
  return _mm512_dpbf16_ps(sums, pairs[0], pairs[1]);
#else
  sums += floats_of(bits_of(x) & 0xffff0000u) * floats_of(bits_of(y) & 0xffff0000u);
  return sums + floats_of(bits_of(x) << 16) * floats_of(bits_of(y) << 16);
#endif
}
inline Vec splat_slot(const float* p) {  // whatever its bits say
  uint32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return floats_of(bits - BitVec{});
}

// Two vectors' first halves, or their second ones, by turns.
template <int... I>
inline Vec interleaved(Vec a, Vec b, int first, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return first ? __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + I % 2 * kLanes)...)
               : __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...);
#else
  const IVec low = {(I / 2 + I % 2 * kLanes)...}, high = {(kLanes / 2 + I / 2 + I % 2 * kLanes)...};
  return first ? __builtin_shuffle(a, b, high) : __builtin_shuffle(a, b, low);
#endif
}

// Each pass turns an element's place, row and column as one number, left by a bit; log2(kLanes) of them transpose.
inline void transpose(Vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  for (int pass = 1; pass < kLanes; pass *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleaved(rows[i], rows[i + kLanes / 2], 0, lanes);
      next[2 * i + 1] = interleaved(rows[i], rows[i + kLanes / 2], 1, lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace
}  // namespace FASTDPO_ISA
}  // namespace fastdpo
