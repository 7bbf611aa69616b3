// FASTDPO_HD marks what runs on both machines: CUDA kernels call it, and so do the CPU and the tests without a GPU.
#pragma once

#ifdef __CUDACC__
#define FASTDPO_HD __host__ __device__
#define FASTDPO_CALL __host__ __device__ __noinline__  // too large to be copied to every place that uses it
#else
#define FASTDPO_HD
#define FASTDPO_CALL
#endif

// Before a loop whose counter indexes an array: on a GPU that must end up in registers.
#ifdef __CUDA_ARCH__
#define FASTDPO_UNROLL _Pragma("unroll")
#else
#define FASTDPO_UNROLL
#endif
