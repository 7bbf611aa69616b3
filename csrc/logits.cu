// Logits -> log-probs and back, one block of threads per row. What a row computes is in logits_row.h; here are the
// reduction over a block and the launches. The logits are read once forward, read and written once backward.
#include <cuda_runtime.h>

#include <limits>

#include "logits.h"
#include "logits_row.h"

namespace fastdpo {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kBlocksPerMultiprocessor = 5;  // bounds registers at 48: loads in flight are what hides the memory's delay
constexpr int64_t kShortRow = kMaxThreads * kBatch;  // elements: with fewer, a large block has idle threads
constexpr int kThreadsOfShortRow = 128;

__device__ OnlineSum merge_warp(OnlineSum mine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    OnlineSum other;
    other.max = __shfl_xor_sync(0xffffffffu, mine.max, distance);
    other.sum = __shfl_xor_sync(0xffffffffu, mine.sum, distance);
    mine.merge(other);
  }
  return mine;
}

// The whole block's sum, in the first warp.
__device__ OnlineSum merge_block(OnlineSum mine) {
  __shared__ float max_of_warp[kMaxThreads / kWarp], sum_of_warp[kMaxThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  mine = merge_warp(mine);
  if (lane == 0) {
    max_of_warp[warp] = mine.max;
    sum_of_warp[warp] = mine.sum;
  }
  __syncthreads();  // every warp's pair is written before the first warp reads them
  if (warp != 0) return mine;
  OnlineSum of_lane;
  if (lane < static_cast<int>(blockDim.x) / kWarp) {
    of_lane.max = max_of_warp[lane];
    of_lane.sum = sum_of_warp[lane];
  }
  return merge_warp(of_lane);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor) logits_forward_kernel(const LogitsForwardArgs a) {
  const int64_t row = blockIdx.x;
  const float scale = row_scale(a.inv_temperature);
  const T* logits = row_of(static_cast<const T*>(a.logits), a.logits_stride, row);
  const OnlineSum mine = fold_row(logits, a.vocab_size, a.labels[row], scale, threadIdx.x, blockDim.x);
  const OnlineSum total = merge_block(mine);
  if (threadIdx.x == 0) finish_row(a, row, logits, total);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerMultiprocessor) logits_backward_kernel(const LogitsBackwardArgs a) {
  backward_row<T>(a, blockIdx.x, threadIdx.x, blockDim.x);
}

template <class Args>
int launch(void (*kernel)(Args), const Args& args, int device, void* stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;  // a grid's limit
  // This runtime is not torch's: it keeps a current device of its own.
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const int threads = args.vocab_size < kShortRow ? kThreadsOfShortRow : kMaxThreads;
  kernel<<<static_cast<unsigned>(args.num_rows), threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace

int launch_logits_forward(const LogitsForwardArgs& a, DType dtype, int device, void* stream) {
  switch (dtype) {
    case DType::kFloat32: return launch(logits_forward_kernel<float>, a, device, stream);
    case DType::kBFloat16: return launch(logits_forward_kernel<BFloat16>, a, device, stream);
    case DType::kFloat16: return launch(logits_forward_kernel<Float16>, a, device, stream);
  }
  return cudaErrorInvalidValue;
}

int launch_logits_backward(const LogitsBackwardArgs& a, DType dtype, int device, void* stream) {
  switch (dtype) {
    case DType::kFloat32: return launch(logits_backward_kernel<float>, a, device, stream);
    case DType::kBFloat16: return launch(logits_backward_kernel<BFloat16>, a, device, stream);
    case DType::kFloat16: return launch(logits_backward_kernel<Float16>, a, device, stream);
  }
  return cudaErrorInvalidValue;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace fastdpo
