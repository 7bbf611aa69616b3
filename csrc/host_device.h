// FASTDPO_HD marks what runs on both machines: CUDA kernels call it, and so do the CPU and the tests without a GPU.
#pragma once

#ifdef __CUDACC__
#define FASTDPO_HD __host__ __device__
#else
#define FASTDPO_HD
#endif
