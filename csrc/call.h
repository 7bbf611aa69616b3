// A call from Python with the fields of a struct as keywords.
#pragma once

#include "arguments.h"

namespace fastdpo {

template <class Args, class Call>
auto run(Arguments& in, Call call) {
  Args a = {};
  a.fields(in);
  in.done();
  const py::gil_scoped_release nogil;
  return call(a);
}

}  // namespace fastdpo
