// Vectors of kLanes floats (compiler vector extensions, so x86 and Arm share the code) and the functions the folds
// need on them. NaN passes through exp and max; exp(-inf) is exactly 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// Operand order matters: a comparison with NaN is false, so the NaN in `a` is kept.
inline Vec max(Vec a, Vec b) { return a < b ? b : a; }

template <class Op>
inline float reduce(Vec v, Op op) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)  // a tree: short chains, and the same order every time
    for (int i = 0; i < width; ++i) lane[i] = op(lane[i], lane[i + width]);
  return lane[0];
}
inline float sum(Vec v) {
  return reduce(v, [](float a, float b) { return a + b; });
}
inline float max(Vec v) {
  return reduce(v, [](float a, float b) { return a < b || b != b ? b : a; });
}

// exp for x <= 88, about 1 ulp: 2^n * P(r), r = x - n ln2, with ln2 in two pieces (Cody and Waite).
inline Vec exp(Vec x) {
  const Vec shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = x < splat(-87.33f) ? splat(-87.33f) : (x > splat(88.37f) ? splat(88.37f) : x);
  const Vec biased = clamped * splat(1.44269504f) + shift;
  const Vec n = biased - shift;
  const Vec r = (clamped - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  IVec bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits = (bits << 23) + 0x3f800000;  // the low bits of `biased` hold n
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < splat(-87.33f) ? Vec{} : p * power;
}

}  // namespace FASTDPO_ISA
}  // namespace fastdpo
