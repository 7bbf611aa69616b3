// What a tensor is asked of by arguments.h.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdpo {

namespace py = pybind11;

// torch's types, and the names of what a tensor is asked; made once and never freed: the interpreter may be gone before.
struct Torch {
  py::module_ torch = py::module_::import("torch");
  py::object tensor = torch.attr("Tensor");
  py::object float32 = torch.attr("float32"), float64 = torch.attr("float64"), bfloat16 = torch.attr("bfloat16"),
             float16 = torch.attr("float16"), int64 = torch.attr("int64"), int32 = torch.attr("int32"),
             uint8 = torch.attr("uint8"), boolean = torch.attr("bool");
  py::object dtype = name("dtype"), shape = name("shape"), is_cpu = name("is_cpu"), is_cuda = name("is_cuda"),
             data_ptr = name("data_ptr"), is_contiguous = name("is_contiguous"), is_neg = name("is_neg"),
             numel = name("numel"), stride = name("stride");

  static py::object name(const char* text) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(text));
  }
  static const Torch& get() {
    static const Torch* torch = new Torch();
    return *torch;
  }
};

}  // namespace fastdpo
