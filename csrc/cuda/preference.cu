// The preference loss of a batch and its gradient, one launch each: a thread block per preference pair walks the tokens
// of both sequences; forward, the block that is done last evaluates every pair's losses. What is computed is in
// preference_batch.h; here are the lanes of a thread block, and the launches.
#include <cuda_runtime.h>

#include <cub/block/block_scan.cuh>
#include <limits>

#include "shared/preference_batch.h"

namespace fastdpo {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kLanes / kWarp;
using Scan = cub::BlockScan<int64_t, kLanes>;

struct Scratch {
  double of_warp[kWarps];
  typename Scan::TempStorage scan;
};

struct BlockMachine {
  Scratch& scratch;

  template <class T>
  struct Local {
    T value;
    __device__ T& operator[](int) { return value; }
  };

  template <class Function>
  __device__ void each(Function function) {
    function(static_cast<int>(threadIdx.x));
  }

  __device__ bool is_first() const { return threadIdx.x == 0; }

  // The same for every thread; in the order of HostMachine::tree.
  __device__ double total(double x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % kWarp == 0) scratch.of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    double y[kWarps];
    for (int warp = 0; warp < kWarps; ++warp) y[warp] = scratch.of_warp[warp];
    for (int distance = kWarps / 2; distance > 0; distance /= 2) {
      for (int warp = 0; warp < distance; ++warp) y[warp] += y[warp + distance];
    }
    return y[0];
  }

  __device__ double sum(const Local<double>& x) { return total(x.value); }

  template <class T>
  __device__ double sum(const Local<T>& x, double T::*field) {
    return total(x.value.*field);
  }

  __device__ int64_t count(const Local<int64_t>& x, Local<int64_t>* before) {
    int64_t all;
    __syncthreads();  // the scratch of the last scan has been read
    Scan(scratch.scan).ExclusiveSum(x.value, before->value, all);
    return all;
  }
};

__global__ void __launch_bounds__(kLanes, 1) preference_forward_kernel(const PreferenceBatch<float> a, const PreferenceResults<float> out) {
  __shared__ Scratch scratch;
  __shared__ bool is_last;
  BlockMachine machine = {scratch};
  walk_pair(a, blockIdx.x, machine, out.sums + blockIdx.x);
  if (threadIdx.x == 0) {
    __threadfence();  // the sums are seen before this block counts as done
    is_last = atomicAdd(out.finished, 1) == static_cast<int32_t>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) finish_batch(a, machine, out);
}

__global__ void __launch_bounds__(kLanes, 1) preference_backward_kernel(const PreferenceBatch<float> a, const PreferenceUpstream<float> up) {
  __shared__ Scratch scratch;
  BlockMachine machine = {scratch};
  spread_pair(a, up, blockIdx.x, machine);
}

int cannot_launch(int64_t num_pairs, int device) {
  if (num_pairs > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;  // a grid's limit
  return cudaSetDevice(device);  // this runtime is not torch's: it keeps a current device of its own
}

}  // namespace

int launch_preference_forward(const PreferenceBatch<float>& a, const PreferenceResults<float>& out, int device, void* stream) {
  if (a.num_pairs == 0) return cudaSuccess;
  if (const int error = cannot_launch(a.num_pairs, device)) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  if (const cudaError_t error = cudaMemsetAsync(out.finished, 0, sizeof(int32_t), on)) return error;
  preference_forward_kernel<<<static_cast<unsigned>(a.num_pairs), kLanes, 0, on>>>(a, out);
  return cudaGetLastError();
}

int launch_preference_backward(const PreferenceBatch<float>& a, const PreferenceUpstream<float>& up, int device, void* stream) {
  if (a.num_pairs == 0) return cudaSuccess;
  if (const int error = cannot_launch(a.num_pairs, device)) return error;
  preference_backward_kernel<<<static_cast<unsigned>(a.num_pairs), kLanes, 0, static_cast<cudaStream_t>(stream)>>>(a, up);
  return cudaGetLastError();
}

}  // namespace fastdpo
