// Logits -> log-probs and back, one block of threads per row, or several where rows are too few to fill the GPU. What a
// row computes is in logits_row.h; here are the reduction over a block and the launches. The logits are read once
// forward, read and written once backward.
#include <cuda_runtime.h>

#include <limits>

#include "cuda/logits.h"
#include "shared/logits_row.h"

namespace fastdpo {
namespace {

constexpr int kWarp = 32;
constexpr int kThreadsOfShortRow = 128;  // a large block would have idle threads

template <bool kEntropy>
__device__ OnlineSum<kEntropy> merge_warp(OnlineSum<kEntropy> mine, float scale) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    OnlineSum<kEntropy> other;
    other.max = __shfl_xor_sync(0xffffffffu, mine.max, distance);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, distance);
    if (kEntropy) other.sum_d = __shfl_xor_sync(0xffffffffu, mine.sum_d, distance);
    mine.merge(other, scale);
  }
  return mine;
}

// The whole block's sum, in the first warp.
template <bool kEntropy>
__device__ OnlineSum<kEntropy> merge_block(OnlineSum<kEntropy> mine, float scale) {
  __shared__ float of_warp[kPartialFloats][kMaxThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  mine = merge_warp(mine, scale);
  if (lane == 0) {
    of_warp[0][warp] = mine.max;
    of_warp[1][warp] = mine.sum;
    if (kEntropy) of_warp[2][warp] = mine.sum_d;
  }
  __syncthreads();  // every warp's sums are written before the first warp reads them
  if (warp != 0) return mine;
  OnlineSum<kEntropy> of_lane;
  if (lane < static_cast<int>(blockDim.x) / kWarp) {
    of_lane.max = of_warp[0][lane];
    of_lane.sum = of_warp[1][lane];
    if (kEntropy) of_lane.sum_d = of_warp[2][lane];
  }
  return merge_warp(of_lane, scale);
}

// gridDim.y blocks walk a row together.
__device__ Column lane_of_row() { return blockIdx.y * blockDim.x + threadIdx.x; }
__device__ Column lanes_of_row() { return gridDim.y * blockDim.x; }

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    logits_forward_kernel(const LogitsForwardArgs a) {
  const int64_t row = blockIdx.x;
  const T* logits = row_of(static_cast<const T*>(a.logits), a.logits_stride, row);
  const auto mine = forward_row<kEntropy>(a, row, logits, lane_of_row(), lanes_of_row());
  const auto total = merge_block(mine, row_scale(a.inv_temperature));
  if (threadIdx.x != 0) return;
  if (a.splits == 1) finish_row(a, row, logits, total);
  else store_partial(a, row, blockIdx.y, total);
}

// The second launch where rows are split, one warp per row: no atomics, so the order of the sum is always the same.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kWarp) logits_finish_kernel(const LogitsForwardArgs a) {
  const int64_t row = blockIdx.x;
  const float scale = row_scale(a.inv_temperature);
  OnlineSum<kEntropy> mine;
  for (int64_t split = threadIdx.x; split < a.splits; split += kWarp) {
    mine.merge(load_partial<kEntropy>(a, row, split), scale);
  }
  const auto total = merge_warp(mine, scale);
  if (threadIdx.x == 0) finish_row(a, row, row_of(static_cast<const T*>(a.logits), a.logits_stride, row), total);
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor)
    logits_backward_kernel(const LogitsBackwardArgs a) {
  backward_row<kEntropy, T>(a, blockIdx.x, lane_of_row(), lanes_of_row());
}

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int device, void* stream) {
  if (args.num_rows == 0) return cudaSuccess;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // of a grid's blocks, and of a row's columns
  if (args.num_rows > kMost || args.vocab_size > kMost) return cudaErrorInvalidValue;
  // This runtime is not torch's: it keeps a current device of its own.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(args.num_rows), static_cast<unsigned>(args.splits));
  const int threads = args.vocab_size < kShortRow ? kThreadsOfShortRow : kMaxThreads;
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

template <class T, bool kEntropy>
int launch_forward(const LogitsForwardArgs& a, int device, void* stream) {
  const int error = launch(logits_forward_kernel<T, kEntropy>, a, device, stream);
  if (error != cudaSuccess || a.splits == 1 || a.num_rows == 0) return error;
  logits_finish_kernel<T, kEntropy><<<a.num_rows, kWarp, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
}

}  // namespace

int launch_logits_forward(const LogitsForwardArgs& a, int device, void* stream) {
  return by_type(a.dtype, [&](auto x) {
    using T = decltype(x);
    return a.entropy ? launch_forward<T, true>(a, device, stream) : launch_forward<T, false>(a, device, stream);
  });
}

int launch_logits_backward(const LogitsBackwardArgs& a, int device, void* stream) {
  return by_type(a.dtype, [&](auto x) {
    using T = decltype(x);
    const auto kernel = a.coef_entropy ? logits_backward_kernel<T, true> : logits_backward_kernel<T, false>;
    return launch(kernel, a, device, stream);
  });
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastdpo
