// The kernels of cuda/logits.cu with the lanes of a block taken one after the other.
#include "cuda/logits.h"
#include "shared/logits_row.h"

namespace fastdpo {
namespace {

template <class T, bool kEntropy>
void forward(const LogitsForwardArgs& a, int64_t lanes) {
  const float scale = row_scale(a.inv_temperature);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const T* logits = row_of(static_cast<const T*>(a.logits), a.logits_stride, row);
    OnlineSum<kEntropy> total;
    for (int64_t split = 0; split < a.splits; ++split) {
      OnlineSum<kEntropy> part;
      for (int64_t lane = split * lanes; lane < (split + 1) * lanes; ++lane) {
        part.merge(forward_row<kEntropy>(a, row, logits, lane, a.splits * lanes), scale);
      }
      if (a.splits > 1) {
        store_partial(a, row, split, part);
        part = load_partial<kEntropy>(a, row, split);
      }
      total.merge(part, scale);
    }
    finish_row(a, row, logits, total);
  }
}

template <class T, bool kEntropy>
void backward(const LogitsBackwardArgs& a, int64_t lanes) {
  lanes *= a.splits;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    for (int64_t lane = 0; lane < lanes; ++lane) backward_row<kEntropy, T>(a, row, lane, lanes);
  }
}

template <class T>
void forward_as(const LogitsForwardArgs& a, int64_t lanes) {
  a.entropy ? forward<T, true>(a, lanes) : forward<T, false>(a, lanes);
}
template <class T>
void backward_as(const LogitsBackwardArgs& a, int64_t lanes) {
  a.coef_entropy ? backward<T, true>(a, lanes) : backward<T, false>(a, lanes);
}

}  // namespace

int64_t logits_splits(int64_t num_rows, int64_t vocab_size, int64_t num_multiprocessors) {
  return splits_of_row(num_rows, vocab_size, num_multiprocessors);
}

void host_logits_forward(const LogitsForwardArgs& a, int64_t lanes) {
  switch (a.dtype) {
    case DType::kFloat32: return forward_as<float>(a, lanes);
    case DType::kBFloat16: return forward_as<BFloat16>(a, lanes);
    case DType::kFloat16: return forward_as<Float16>(a, lanes);
  }
}

void host_logits_backward(const LogitsBackwardArgs& a, int64_t lanes) {
  switch (a.dtype) {
    case DType::kFloat32: return backward_as<float>(a, lanes);
    case DType::kBFloat16: return backward_as<BFloat16>(a, lanes);
    case DType::kFloat16: return backward_as<Float16>(a, lanes);
  }
}

}  // namespace fastdpo
