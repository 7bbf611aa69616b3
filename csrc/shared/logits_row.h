// What one row of given logits computes: log p(label) and its gradient, each in one walk over the row.
//
//   z = x * inv_temperature      logp = -softplus(lse_{v != label} z[v] - z[label])
//   dx[v] = inv_temperature * (coef * ((v == label) - p[v]) - coef_entropy * p[v] * (log p[v] + entropy))
//
// `lane` of `lanes` walkers takes every lanes-th vector of 16 bytes: threads of one or several blocks in cuda/logits.cu,
// which the tests compile for the CPU too: they run every line of this file without a GPU.
#pragma once

#include <cassert>
#include <cstdint>
#include <math.h>

#include "shared/half.h"
#include "shared/host_device.h"
#include "structs.h"
#include "shared/row_formulas.h"

namespace fastdpo {

constexpr int kVectorBytes = 16;
constexpr int kBatch = 16;  // elements that a lane of the forward has in flight: 2 vectors of a half type, 4 of fp32
constexpr int kMaxThreads = 256;  // of a block of cuda/logits.cu; and of its blocks on a multiprocessor:
constexpr int kBlocksPerMultiprocessor = 5;  // bounds registers at 48: loads in flight hide the memory's delay
constexpr int64_t kShortRow = kMaxThreads * kBatch;  // elements: one batch for each thread
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.69314718055994531;

// Blocks that share a row, `splits` of both structs: as many as run at once, no more than have a batch for each thread.
inline int64_t logits_splits(int64_t num_rows, int64_t vocab_size, int num_multiprocessors) {
  const int64_t wanted = int64_t{num_multiprocessors} * kBlocksPerMultiprocessor / (num_rows > 0 ? num_rows : 1);
  const int64_t most = vocab_size / kShortRow;
  return wanted < 2 || most < 2 ? 1 : wanted < most ? wanted : most;
}

FASTDPO_HD inline float row_scale(float inv_temperature) { return inv_temperature * kLog2E; }

// 2^x within 2 ulp; results below the smallest normal number are 0 on a GPU.
FASTDPO_HD inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / sizeof(T);
  T element[kSize];
};

template <class T>
FASTDPO_HD inline void unpack(const Vector<T>& v, float* x) {
  for (int k = 0; k < Vector<T>::kSize; ++k) x[k] = to_float(v.element[k]);
}
// Two to a register, without taking the halves out first.
FASTDPO_HD inline void unpack(const Vector<BFloat16>& v, float* x) {
  uint32_t words[kVectorBytes / 4];
  memcpy(words, &v, sizeof words);
  for (int i = 0; i < kVectorBytes / 4; ++i) {
    x[2 * i] = float_of(words[i] << 16);
    x[2 * i + 1] = float_of(words[i] & 0xffff0000u);
  }
}

// Every logit is read once and every gradient is written once: neither should push anything out of a cache.
template <class T>
FASTDPO_HD inline Vector<T> load_vector(const T* address) {
  Vector<T> v;
#ifdef __CUDA_ARCH__
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
  memcpy(&v, &bits, sizeof v);
#else
  assert(reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0);  // a GPU would stop here
  memcpy(&v, address, sizeof v);
#endif
  return v;
}
template <class T>
FASTDPO_HD inline void store_vector(T* address, const Vector<T>& v) {
#ifdef __CUDA_ARCH__
  uint4 bits;
  memcpy(&bits, &v, sizeof bits);
  __stcs(reinterpret_cast<uint4*>(address), bits);
#else
  assert(reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0);
  memcpy(address, &v, sizeof v);
#endif
}

// A place inside a row, which has fewer than 2^31 elements (the launches see to that): half the registers of 64 bits.
using Column = int32_t;

// A row as a head up to the first 16-byte boundary, whole vectors, and a tail.
struct RowSplit {
  Column head;     // elements
  Column vectors;  // from element `head` on
  Column tail;     // index of the first element after them
};

template <class T>
FASTDPO_HD inline RowSplit split_row(const T* row, Column size) {
  const auto past = static_cast<Column>(reinterpret_cast<uintptr_t>(row) % kVectorBytes);
  Column head = (kVectorBytes - past) % kVectorBytes / static_cast<Column>(sizeof(T));
  if (head > size) head = size;
  const Column vectors = (size - head) / Vector<T>::kSize;
  return {head, vectors, head + vectors * Vector<T>::kSize};
}

// sum 2^d over what was added, d = scale * (x - max) in fp32 (scale: log2(e) / temperature); with kEntropy sum 2^d * d
// too. Subtracting before scaling is right for any finite logits, also where scale * x overflows. -inf adds exactly 0,
// also where nothing else was added; NaN and +inf end in NaN sums.
template <bool kEntropy>
struct OnlineSum {
  float max = -INFINITY;
  float sum = 0.0f;
  float sum_d = 0.0f;

  template <int K>
  FASTDPO_HD void add(const float (&x)[K], float scale) {
    float top = max;
    for (int k = 0; k < K; ++k) top = fmaxf(top, x[k]);
    rescale(top, scale);
    const float shift = finite(top);
    float added = 0.0f, added_d = 0.0f;
    for (int k = 0; k < K; ++k) {
      const float d = (x[k] - shift) * scale, e = exp2_fast(d);
      added += e;
      if (kEntropy) added_d = fmaf(e, fmaxf(d, kLeastLogP), added_d);
    }
    sum += added;
    sum_d += added_d;
  }

  FASTDPO_HD void merge(OnlineSum other, float scale) {
    const float top = fmaxf(max, other.max);
    rescale(top, scale);
    other.rescale(top, scale);
    sum += other.sum;
    sum_d += other.sum_d;
  }

 private:
  FASTDPO_HD void rescale(float top, float scale) {
    const float d = (max - finite(top)) * scale, factor = exp2_fast(d);
    if (kEntropy) sum_d = factor * fmaf(sum, fmaxf(d, kLeastLogP), sum_d);
    sum *= factor;
    max = top;
  }
  // -inf - -inf is NaN
  FASTDPO_HD static float finite(float max) { return max == -INFINITY ? 0.0f : max; }
};

template <class T>
FASTDPO_HD inline T* row_of(T* first, int64_t stride, int64_t row) {
  return first + row * stride;  // 64-bit: rows reach past 2^31 elements
}

// -inf in the place of the label, if these K columns have it: one comparison for most of a row.
template <int K>
FASTDPO_HD inline void leave_out(Column label, Column first, float* x) {
  if (static_cast<uint32_t>(label - first) >= K) return;
  const int place = label - first;
  for (int k = 0; k < K; ++k) x[k] = k == place ? -INFINITY : x[k];
}

// A lane's share of the sum over every logit but the label's. A row that is left out is not read.
template <bool kEntropy, class T>
FASTDPO_HD inline OnlineSum<kEntropy> fold_row(const T* row, Column size, Column label, float scale, Column lane,
                                               Column lanes) {
  constexpr int kSize = Vector<T>::kSize, kVectors = kBatch / kSize;
  OnlineSum<kEntropy> total;
  if (label == kLeftOut) return total;
  const RowSplit split = split_row(row, size);
  Column v = lane;
  for (; v + (kVectors - 1) * lanes < split.vectors; v += kVectors * lanes) {
    Vector<T> loaded[kVectors];  // all loads are issued before the first is waited for
    for (int i = 0; i < kVectors; ++i) loaded[i] = load_vector(row + split.head + (v + i * lanes) * kSize);
    float x[kBatch];
    for (int i = 0; i < kVectors; ++i) {
      unpack(loaded[i], x + i * kSize);
      leave_out<kSize>(label, split.head + (v + i * lanes) * kSize, x + i * kSize);
    }
    total.add(x, scale);
  }
  for (; v < split.vectors; v += lanes) {
    const Column first = split.head + v * kSize;
    float x[kSize];
    unpack(load_vector(row + first), x);
    leave_out<kSize>(label, first, x);
    total.add(x, scale);
  }
  const auto add_one = [&](Column i) {
    float x[1] = {i == label ? -INFINITY : to_float(row[i])};
    total.add(x, scale);
  };
  for (Column i = lane; i < split.head; i += lanes) add_one(i);
  for (Column i = split.tail + lane; i < size; i += lanes) add_one(i);
  return total;
}

template <bool kEntropy, class T>
FASTDPO_HD inline OnlineSum<kEntropy> forward_row(const LogitsForwardArgs& a, int64_t row, const T* logits, Column lane,
                                                  Column lanes) {
  return fold_row<kEntropy>(logits, static_cast<Column>(a.vocab_size), static_cast<Column>(a.labels[row]),
                            row_scale(a.inv_temperature), lane, lanes);
}

// After the lanes' sums are merged; of nothing for a row that is left out. In double: `max` and the label's logit may
// be large and close.
template <bool kEntropy, class T>
FASTDPO_HD inline void finish_row(const LogitsForwardArgs& a, int64_t row, const T* logits,
                                  const OnlineSum<kEntropy>& total) {
  const int64_t label = a.labels[row];
  LabelLogp result = {};
  double entropy = 0.0;
  if (label >= a.vocab_size) {  // callers leave such rows out
    result = {NAN, NAN, NAN};
    entropy = NAN;
  } else if (label != kLeftOut) {
    const double z = a.inv_temperature, log_sum = log(static_cast<double>(total.sum));
    result = label_logp(total.max * z, log_sum, label < 0 ? -INFINITY : to_float(logits[label]) * z);
    if (kEntropy) entropy = row_entropy(result, log_sum, total.sum_d * kLn2 / total.sum);
  }
  a.logps[row] = static_cast<float>(result.logp);
  a.lse[row] = static_cast<float>(result.lse);
  if (kEntropy) a.entropy[row] = static_cast<float>(entropy);
}

// One of `splits` parts of a row, when there are too few rows to fill a GPU.
template <bool kEntropy>
FASTDPO_HD inline void store_partial(const LogitsForwardArgs& a, int64_t row, int64_t split,
                                     const OnlineSum<kEntropy>& part) {
  float* out = a.partials + (row * a.splits + split) * kPartialFloats;
  out[0] = part.max;
  out[1] = part.sum;
  if (kEntropy) out[2] = part.sum_d;
}
template <bool kEntropy>
FASTDPO_HD inline OnlineSum<kEntropy> load_partial(const LogitsForwardArgs& a, int64_t row, int64_t split) {
  const float* in = a.partials + (row * a.splits + split) * kPartialFloats;
  OnlineSum<kEntropy> part;
  part.max = in[0];
  part.sum = in[1];
  if (kEntropy) part.sum_d = in[2];
  return part;
}

// What a gradient of the row needs to know besides its logits. Both coefs hold the factor inv_temperature.
template <bool kEntropy>
struct RowGrad {
  float inv_temperature, lse, logp, coef, entropy, coef_entropy;

  FASTDPO_HD float other(float x) const {
    const float log_p = fmaf(x, inv_temperature, -lse);
    const float p = exp2_fast(log_p * kLog2E);
    return kEntropy ? other_grad(p, fmaxf(log_p, kLeastLogP), coef, entropy, coef_entropy) : other_grad(p, coef);
  }
  FASTDPO_HD float label() const { return label_grad(logp, coef, entropy, coef_entropy); }
};

// A lane's share of a row of zeros.
template <class T>
FASTDPO_HD inline void zero_row(T* out, Column size, Column lane, Column lanes) {
  const RowSplit split = split_row(out, size);
  const Vector<T> zeros = {};
  for (Column v = lane; v < split.vectors; v += lanes) store_vector(out + split.head + v * Vector<T>::kSize, zeros);
  for (Column i = lane; i < split.head; i += lanes) out[i] = zeros.element[0];
  for (Column i = split.tail + lane; i < size; i += lanes) out[i] = zeros.element[0];
}

// A lane's share of the row's gradient into `out`, which may be `row`: an element is written by the lane that read it.
// Vectors are used where both rows have the same alignment.
template <bool kEntropy, class T>
FASTDPO_HD inline void grad_row(const T* row, T* out, Column size, Column label, const RowGrad<kEntropy>& grad,
                                Column lane, Column lanes) {
  constexpr int kSize = Vector<T>::kSize, kVectors = 2;  // four of fp32 spill on sm_100
  const bool same_alignment = (reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(out)) % kVectorBytes == 0;
  const RowSplit split = same_alignment ? split_row(out, size) : RowSplit{size, 0, size};
  const float label_grad = grad.label();
  const auto gradient = [&](T x) {
    T result;
    from_float(grad.other(to_float(x)), &result);
    return result;
  };
  const auto store_gradients = [&](Column first, Vector<T> x) {
    for (int k = 0; k < kSize; ++k) x.element[k] = gradient(x.element[k]);
    store_vector(out + first, x);
    // Over what this lane has just written: one comparison for most of a row.
    if (static_cast<uint32_t>(label - first) < kSize) from_float(label_grad, out + label);
  };
  Column v = lane;
  for (; v + (kVectors - 1) * lanes < split.vectors; v += kVectors * lanes) {
    Vector<T> loaded[kVectors];
    for (int i = 0; i < kVectors; ++i) loaded[i] = load_vector(row + split.head + (v + i * lanes) * kSize);
    for (int i = 0; i < kVectors; ++i) store_gradients(split.head + (v + i * lanes) * kSize, loaded[i]);
  }
  for (; v < split.vectors; v += lanes) {
    const Column first = split.head + v * kSize;
    store_gradients(first, load_vector(row + first));
  }
  const auto store_one = [&](Column i) {
    if (i == label) from_float(label_grad, out + i);
    else out[i] = gradient(row[i]);
  };
  for (Column i = lane; i < split.head; i += lanes) store_one(i);
  for (Column i = split.tail + lane; i < size; i += lanes) store_one(i);
}

// A row whose coefs are 0 gets zeros, whatever its logits; they are not read.
template <bool kEntropy, class T>
FASTDPO_HD inline void backward_row(const LogitsBackwardArgs& a, int64_t row, Column lane, Column lanes) {
  T* out = row_of(static_cast<T*>(a.dlogits), a.dlogits_stride, row);
  const auto size = static_cast<Column>(a.vocab_size);
  RowGrad<kEntropy> grad = {a.inv_temperature, a.lse[row], a.logps[row], a.coef[row] * a.inv_temperature, 0.0f, 0.0f};
  if (kEntropy) {
    grad.entropy = a.entropy[row];
    grad.coef_entropy = a.coef_entropy[row] * a.inv_temperature;
  }
  if (grad.coef == 0.0f && grad.coef_entropy == 0.0f) {
    zero_row(out, size, lane, lanes);
  } else {
    const T* logits = row_of(static_cast<const T*>(a.logits), a.logits_stride, row);
    grad_row(logits, out, size, static_cast<Column>(a.labels[row]), grad, lane, lanes);
  }
}

}  // namespace fastdpo
