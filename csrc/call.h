// A call from Python with the fields of a struct as keywords.
#pragma once

#include "arguments.h"

namespace fastdpo {

template <class Args, class Call>
auto run(const char* name, const py::kwargs& given, Call call, int cuda_device = -1) {
  Args a = {};
  Arguments in(name, given, cuda_device);
  a.fields(in);
  in.done();
  const py::gil_scoped_release nogil;
  return call(a);
}

}  // namespace fastdpo
