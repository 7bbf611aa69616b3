// The kernels of logits.cu with the lanes of a block taken one after the other.
#include "logits.h"
#include "logits_row.h"

namespace fastdpo {
namespace {

template <class T>
void forward(const LogitsForwardArgs& a, int64_t lanes) {
  const float scale = row_scale(a.inv_temperature);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const T* logits = row_of(static_cast<const T*>(a.logits), a.logits_stride, row);
    OnlineSum total;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      total.merge(fold_row(logits, a.vocab_size, a.labels[row], scale, lane, lanes));
    }
    finish_row(a, row, logits, total);
  }
}

template <class T>
void backward(const LogitsBackwardArgs& a, int64_t lanes) {
  for (int64_t row = 0; row < a.num_rows; ++row) {
    for (int64_t lane = 0; lane < lanes; ++lane) backward_row<T>(a, row, lane, lanes);
  }
}

}  // namespace

void host_logits_forward(const LogitsForwardArgs& a, DType dtype, int64_t lanes) {
  switch (dtype) {
    case DType::kFloat32: return forward<float>(a, lanes);
    case DType::kBFloat16: return forward<BFloat16>(a, lanes);
    case DType::kFloat16: return forward<Float16>(a, lanes);
  }
}

void host_logits_backward(const LogitsBackwardArgs& a, DType dtype, int64_t lanes) {
  switch (dtype) {
    case DType::kFloat32: return backward<float>(a, lanes);
    case DType::kBFloat16: return backward<BFloat16>(a, lanes);
    case DType::kFloat16: return backward<Float16>(a, lanes);
  }
}

}  // namespace fastdpo
