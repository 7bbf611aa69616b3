// Vectors of kLanes floats (compiler vector extensions, so x86 and Arm share the code) and the functions the folds
// need on them. NaN passes through exp and max; exp(-inf) is exactly 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace fastdpo {
namespace FASTDPO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));

constexpr float kInf = __builtin_huge_valf();

inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Operand order matters: a comparison with NaN is false, so the NaN in `a` is kept; x86 gives its second operand then.
// A mask of all lanes costs nothing, and keeps GCC 12 from warning of its own header.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)b, (__m512)a); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)b, (__m256)a); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)b, (__m256)a); }
#else
inline Vec max(Vec a, Vec b) { return a < b ? b : a; }
inline Vec min(Vec a, Vec b) { return a > b ? b : a; }
#endif

// Lane i of the result is lane i ^ kWidth.
template <int kWidth, int... I>
inline Vec swapped(Vec v, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (I ^ kWidth)...);
#else
  return __builtin_shuffle(v, IVec{(I ^ kWidth)...});
#endif
}
// A tree: short chains, and the same order every time.
template <int kWidth = kLanes / 2, class Op>
inline float reduce(Vec v, Op op) {
  if constexpr (kWidth == 0) return v[0];
  else return reduce<kWidth / 2>(op(v, swapped<kWidth>(v, std::make_integer_sequence<int, kLanes>())), op);
}
inline float sum(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}
inline float max(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return ((a < b) | (b != b)) ? b : a; });
}

// exp, about 1 ulp, 0 below the normal numbers: 2^n * P(r), r = x - n ln2, with ln2 in two pieces (Cody and Waite; Cephes'
// polynomial). What the arithmetic makes of an x too small is thrown away. AVX-512 multiplies by 2^n itself.
inline Vec exp(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
#ifndef __AVX512F__
  x = min(x, splat(88.37f));
#endif
  const Vec biased = x * splat(1.44269504f) + shift;
  const Vec n = biased - shift;
  const Vec r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
#ifdef __AVX512F__
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);  // or NaN
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  IVec bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits = (bits << 23) + 0x3f800000;  // the low bits of `biased` hold n
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < splat(-87.33f) ? Vec{} : p * power;
#endif
}

// log, about 1 ulp for normal x (Cephes): e ln2 + log(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)). 0 is -inf, below NaN.
inline Vec log(Vec x) {
  IVec bits;
  std::memcpy(&bits, &x, sizeof bits);
  IVec exponent = ((bits >> 23) & 0xff) - 126;
  bits = (bits & 0x007fffff) | 0x3f000000;
  Vec f;
  std::memcpy(&f, &bits, sizeof f);  // in [0.5, 1)
  const IVec low = f < splat(0.707106781f);
  exponent += low;  // -1 where it is
  f = low ? f + f - splat(1.0f) : f - splat(1.0f);
  const Vec e = __builtin_convertvector(exponent, Vec), square = f * f;
  Vec p = splat(7.0376836292e-2f);
  p = p * f - splat(1.1514610310e-1f);
  p = p * f + splat(1.1676998740e-1f);
  p = p * f - splat(1.2420140846e-1f);
  p = p * f + splat(1.4249322787e-1f);
  p = p * f - splat(1.6668057665e-1f);
  p = p * f + splat(2.0000714765e-1f);
  p = p * f - splat(2.4999993993e-1f);
  p = p * f + splat(3.3333331174e-1f);
  Vec y = p * f * square - splat(2.12194440e-4f) * e - splat(0.5f) * square;
  y = f + y + splat(0.693359375f) * e;
  const Vec nan = splat(__builtin_nanf(""));
  return x > Vec{} ? (x == splat(kInf) ? x : y) : (x == Vec{} ? splat(-kInf) : nan);
}

}  // namespace FASTDPO_ISA
}  // namespace fastdpo
