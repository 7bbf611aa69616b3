// Keywords of a Python call -> the members of a struct, by the names in structs.h. The one way from a tensor to a pointer:
// type, device and layout are looked at here, by the tensor's own attributes, since the extension knows no torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "structs.h"

namespace fastdpo {

namespace py = pybind11;

// torch's types by what they are here; made once, when the first call has tensors.
struct TorchTypes {
  py::object float32, float64, bfloat16, float16, int64, int32, uint8, boolean;
  TorchTypes() {
    const py::module_ torch = py::module_::import("torch");
    float32 = torch.attr("float32"), float64 = torch.attr("float64");
    bfloat16 = torch.attr("bfloat16"), float16 = torch.attr("float16");
    int64 = torch.attr("int64"), int32 = torch.attr("int32");
    uint8 = torch.attr("uint8"), boolean = torch.attr("bool");
  }
  static const TorchTypes& get() {
    static const TorchTypes* types = new TorchTypes();  // never freed: the interpreter may be gone before
    return *types;
  }
};

class Arguments {
 public:
  // Of a function for CPU tensors, or for those of a CUDA device.
  Arguments(const char* function, const py::kwargs& given, int cuda_device = -1)
      : function_(function), given_(given), cuda_device_(cuda_device), types_(TorchTypes::get()) {}

  template <class T>
  void operator()(const char* name, T& member, int64_t count = 0) {
    if constexpr (std::is_pointer_v<T>) {
      member = static_cast<T>(required(name, contiguous<T>(take(name), name, count)));
    } else {
      number(name, take(name), member);
    }
  }

  template <class T>
  void optional(const char* name, T*& pointer, int64_t count = 0) {
    pointer = static_cast<T*>(contiguous<T*>(take(name), name, count));
  }

  template <class T>
  void rows(const char* name, T*& pointer, int64_t& stride, int64_t least = 0) {
    pointer = static_cast<T*>(required(name, in_rows<T*>(take(name), name, &stride, least)));
  }

  template <class T>
  void optional_rows(const char* name, T*& pointer, int64_t& stride) {
    pointer = static_cast<T*>(in_rows<T*>(take(name), name, &stride, 0));
  }

  template <class T>
  void matrix(const char* name, T*& pointer, int64_t& stride, int64_t& num_rows, int64_t& num_cols) {
    rows(name, pointer, stride);
    shape(name, num_rows, num_cols);
  }

  template <class T>
  void any_rows(const char* name, T*& pointer, int64_t& stride, DType& dtype) {
    const py::handle x = take(name);
    const py::object type = py::getattr(x, "dtype", py::none());
    dtype = type.is(types_.bfloat16) ? DType::kBFloat16 : type.is(types_.float16) ? DType::kFloat16 : DType::kFloat32;
    const py::object& wanted =
        dtype == DType::kBFloat16 ? types_.bfloat16 : dtype == DType::kFloat16 ? types_.float16 : types_.float32;
    pointer = required(name, address(x, name, wanted, true, &stride, 0));
  }

  template <class T>
  void any_matrix(const char* name, T*& pointer, int64_t& stride, int64_t& num_rows, int64_t& num_cols, DType& dtype) {
    any_rows(name, pointer, stride, dtype);
    shape(name, num_rows, num_cols);
  }

  // Of the type of another one.
  template <class T>
  void same_rows(const char* name, T*& pointer, int64_t& stride, DType dtype) {
    DType mine;
    any_rows(name, pointer, stride, mine);
    if (mine != dtype) throw py::type_error(where(name) + " must have the type of its inputs");
  }

  template <class T>
  void pair(const char* name, T* (&pointers)[2], int64_t count = 0) {
    const py::handle both = take(name);
    for (int side = 0; side < 2; ++side) {
      pointers[side] = static_cast<T*>(contiguous<T*>(of_pair(both, side, name), name, count));
    }
  }

  template <class T>
  void pair_of_rows(const char* name, T* (&pointers)[2], int64_t& stride) {
    const py::handle both = take(name);
    stride = 0;
    for (int side = 0; side < 2; ++side) {
      pointers[side] = static_cast<T*>(in_rows<T*>(of_pair(both, side, name), name, &stride, 0));
    }
  }

  void offsets(const char* name, const void*& pointer, bool& are_int32) {
    const py::handle x = take(name);
    const py::object type = py::getattr(x, "dtype", py::none());
    are_int32 = type.is(types_.int32);
    pointer = address(x, name, are_int32 ? types_.int32 : types_.int64, false, nullptr, 0);
  }

  template <class... T>
  void tuple(const char* name, T&... members) {
    const py::handle x = take(name);
    if (!PySequence_Check(x.ptr()) || py::len(x) != sizeof...(T)) {
      throw py::type_error(where(name) + " must hold " + std::to_string(sizeof...(T)) + " numbers");
    }
    py::ssize_t i = 0;
    const py::sequence values = py::reinterpret_borrow<py::sequence>(x);
    (number(name, py::object(values[i++]), members), ...);
  }

  // [(id, weight), ...]
  void terms(const char* name, LossTerm (&terms)[kMaxTerms], int& count) {
    const py::sequence given = py::reinterpret_borrow<py::sequence>(take(name));
    if (py::len(given) > kMaxTerms) throw py::value_error(where(name) + " has too many losses");
    count = 0;
    for (const py::handle term : given) {
      const auto [id, weight] = term.cast<std::pair<int, double>>();
      terms[count++] = {static_cast<PreferenceLoss>(id), weight};
    }
  }

  // {name: number}, of every option, and the divergence's id
  void options(const char* name, PreferenceOptions& options) {
    const py::dict given = py::reinterpret_borrow<py::dict>(take(name));
    options.divergence = static_cast<Divergence>(entry(given, name, "divergence").cast<int>());
    for (const auto& field : kPreferenceOptionFields) options.*(field.field) = entry(given, name, field.name).cast<double>();
    if (given.size() != std::size(kPreferenceOptionFields) + 1) throw py::type_error(where(name) + " has unknown entries");
  }

  // TypeError for what no field has taken.
  void done() const {
    if (names_.size() == given_.size()) return;
    for (const auto& item : given_) {
      const std::string name = item.first.cast<std::string>();
      if (std::none_of(names_.begin(), names_.end(), [&](const char* taken) { return name == taken; })) {
        throw py::type_error(std::string(function_) + " has no field '" + name + "'");
      }
    }
  }

 private:
  std::string where(const char* name) const { return std::string(function_) + ": " + name; }

  py::handle take(const char* name) {
    PyObject* found = PyDict_GetItemString(given_.ptr(), name);
    if (found == nullptr) throw py::type_error(where(name) + " is missing");
    names_.push_back(name);
    last_ = found;
    return found;
  }

  py::handle entry(const py::dict& given, const char* name, const char* key) const {
    PyObject* found = PyDict_GetItemString(given.ptr(), key);
    if (found == nullptr) throw py::type_error(where(name) + " lacks " + key);
    return found;
  }

  template <class T>
  void number(const char* name, py::handle x, T& member) const {
    try {
      member = x.cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(where(name) + " cannot be " + py::repr(x).cast<std::string>());
    }
  }

  py::handle of_pair(py::handle both, int side, const char* name) const {
    if (both.is_none()) return both;
    if (!PyTuple_Check(both.ptr()) || PyTuple_GET_SIZE(both.ptr()) != 2) throw py::type_error(where(name) + " must be two");
    return PyTuple_GET_ITEM(both.ptr(), side);
  }

  // Of the tensor that was taken last.
  void shape(const char* name, int64_t& num_rows, int64_t& num_cols) const {
    const py::object sizes = last_.attr("shape");
    if (py::len(sizes) != 2) throw py::type_error(where(name) + " must have two dimensions");
    num_rows = sizes[py::int_(0)].cast<int64_t>();
    num_cols = sizes[py::int_(1)].cast<int64_t>();
  }

  void* required(const char* name, void* pointer) const {
    if (pointer == nullptr && last_.is_none()) throw py::type_error(where(name) + " is None");
    return pointer;
  }

  template <class Pointer>
  const py::object& type() const {
    using T = std::remove_const_t<std::remove_pointer_t<Pointer>>;
    if constexpr (std::is_same_v<T, float>) return types_.float32;
    if constexpr (std::is_same_v<T, double> || std::is_same_v<T, RowStats>) return types_.float64;
    if constexpr (std::is_same_v<T, int64_t>) return types_.int64;
    if constexpr (std::is_same_v<T, int32_t>) return types_.int32;
    return types_.uint8;  // bytes: bits, flags, sums
  }

  template <class Pointer>
  void* contiguous(py::handle x, const char* name, int64_t count) const {
    using T = std::remove_const_t<std::remove_pointer_t<Pointer>>;
    if constexpr (std::is_same_v<T, RowStats>) count *= kRowStatsSize;
    if constexpr (std::is_same_v<T, PairSums>) count *= static_cast<int64_t>(sizeof(PairSums));
    return address(x, name, type<Pointer>(), false, nullptr, count);
  }

  template <class Pointer>
  void* in_rows(py::handle x, const char* name, int64_t* stride, int64_t least) const {
    return address(x, name, type<Pointer>(), true, stride, least);
  }

  // `least`: elements that there must be; with `rows`, rows.
  void* address(py::handle x, const char* name, const py::object& dtype, bool rows, int64_t* stride, int64_t least) const {
    if (x.is_none()) return nullptr;
    const auto pointer = x.attr("data_ptr")().cast<std::uintptr_t>();
    const py::object type = x.attr("dtype");
    bool right = type.is(dtype) || (dtype.is(types_.uint8) && type.is(types_.boolean));
    right = right && (cuda_device_ < 0 ? x.attr("is_cpu").cast<bool>() : on_cuda(x));
    bool in_place = x.attr("is_contiguous")().cast<bool>();
    int64_t have = 0;
    if (rows) {
      const py::tuple sizes = x.attr("shape"), strides = x.attr("stride")();
      const py::size_t dims = sizes.size();
      const bool unit = dims > 0 && (strides[dims - 1].cast<int64_t>() == 1 || sizes[dims - 1].cast<int64_t>() == 1);
      in_place = dims > 0 && dims <= 2 && (in_place || unit);
      have = dims > 0 ? sizes[0].cast<int64_t>() : 0;
      if (dims == 2) *stride = strides[0].cast<int64_t>();
    }
    const int64_t elements = pointer == 0 || (!rows && least) ? x.attr("numel")().cast<int64_t>() : 1;
    right = right && in_place && !x.attr("is_neg")().cast<bool>() && (pointer != 0 || elements == 0);
    if (!right || (rows ? have : elements) < least) misread(x, name, pointer, dtype, least);
    return reinterpret_cast<void*>(pointer);
  }

  bool on_cuda(py::handle x) const {
    return x.attr("is_cuda").cast<bool>() && x.attr("device").attr("index").cast<int>() == cuda_device_;
  }

  [[noreturn]] void misread(py::handle x, const char* name, std::uintptr_t pointer, const py::object& dtype, int64_t least) const {
    const py::object shape = py::reinterpret_steal<py::object>(PySequence_Tuple(x.attr("shape").ptr()));
    throw std::runtime_error(
        py::str("{}: native code for {} would misread a tensor of type {}, {} on {}, shape {}, strides {}, at {:#x} as {} of {}")
            .format(where(name), cuda_device_ < 0 ? "cpu" : "cuda", py::type::of(x).attr("__name__"), x.attr("dtype"),
                    x.attr("device"), shape, x.attr("stride")(), pointer, dtype, least)
            .cast<std::string>());
  }

  const char* function_;
  py::dict given_;
  int cuda_device_;
  const TorchTypes& types_;
  py::handle last_;
  std::vector<const char*> names_;  // taken
};

}  // namespace fastdpo
