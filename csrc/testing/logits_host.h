// For tests alone: the kernels of cuda/logits.cu with the `lanes` threads of a block taken one after the other.
#pragma once

#include "shared/logits_row.h"

namespace fastdpo {

template <class T, bool kEntropy>
void host_forward(const LogitsForwardArgs& a, int64_t lanes) {
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
void host_backward(const LogitsBackwardArgs& a, int64_t lanes) {
  lanes *= a.splits;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    for (int64_t lane = 0; lane < lanes; ++lane) backward_row<kEntropy, T>(a, row, lane, lanes);
  }
}

inline void host_logits_forward(const LogitsForwardArgs& a, int64_t lanes) {
  by_type(a.dtype, [&](auto x) {
    using T = decltype(x);
    a.entropy ? host_forward<T, true>(a, lanes) : host_forward<T, false>(a, lanes);
  });
}

inline void host_logits_backward(const LogitsBackwardArgs& a, int64_t lanes) {
  by_type(a.dtype, [&](auto x) {
    using T = decltype(x);
    a.coef_entropy ? host_backward<T, true>(a, lanes) : host_backward<T, false>(a, lanes);
  });
}

}  // namespace fastdpo
