// The Python functions of the CUDA kernels: each on the stream of a device, given as integers; returns CUDA's error.
#pragma once

#include "call.h"
#include "cuda/logits.h"
#include "shared/preference_batch.h"

namespace fastdpo {

// `on_cpu`: in the tests, whose stand-in for CUDA has the CPU's memory.
inline void def_cuda_kernels(py::module_& m, bool on_cpu = false) {
  const auto def = [&](const char* name, auto args, auto call) {
    using Args = decltype(args);
    m.def(name, [=](const py::kwargs& given) {
      Arguments in(name, given);
      int device = 0;
      std::uintptr_t stream = 0;
      in.numbers("device, stream", device, stream);
      if (!on_cpu) in.of_cuda(device);
      return run<Args>(in, [&](const Args& a) { return call(a, device, reinterpret_cast<void*>(stream)); });
    });
  };
  m.def("cuda_error_text", &cuda_error_text);
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("cuda_driver_version", &cuda_driver_version);
  def("cuda_logits_forward", LogitsForwardArgs{}, &launch_logits_forward);
  def("cuda_logits_backward", LogitsBackwardArgs{}, &launch_logits_backward);
  def("cuda_preference_forward", PreferenceForwardArgs<float>{}, [](const auto& a, int device, void* stream) {
    return launch_preference_forward(a.batch, a.out, device, stream);
  });
  def("cuda_preference_backward", PreferenceBackwardArgs<float>{}, [](const auto& a, int device, void* stream) {
    return launch_preference_backward(a.batch, a.up, device, stream);
  });
}

}  // namespace fastdpo
