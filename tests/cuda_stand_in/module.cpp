// The functions of csrc/cuda for tensors in the CPU's memory. The kernels are a library of their own: pybind11 has
// thread-local memory too, which is not a block's to fill.
#include "cuda/bindings.h"

namespace stand_in {
void seed(unsigned value);
}

PYBIND11_MODULE(cuda_on_cpu, m) {
  fastdpo::Torch::get();
  fastdpo::def_cuda_kernels(m, true);
  m.def("seed", &stand_in::seed);
}
