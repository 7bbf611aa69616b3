// Keywords of a Python call -> the members of a struct, by the names in structs.h. The one way from a tensor to a
// pointer: type, device, layout, size and alignment are looked at here, by the tensor's own attributes, since the
// extension knows no torch. What is written (a pointer to non-const) overlaps neither itself nor another argument.
// That a tensor lies within its storage is torch's promise; only storage that was released is noticed.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "preference_structs.h"
#include "structs.h"
#include "torch_names.h"

namespace fastdpo {

class Arguments {
 public:
  Arguments(const char* function, const py::kwargs& given) : function_(function), given_(given), torch_(Torch::get()) {
    names_.reserve(32), memory_.reserve(32);
  }

  // Tensors are of that device, not of the CPU.
  void of_cuda(int device) { cuda_device_ = device; }

  template <class... T>
  void numbers(const char* names, T&... members) {
    each(names, [&](py::handle x, auto& member) { number(x, member); }, members...);
  }

  // That count or place something: sums, and products with small constants, fit 64 bits.
  template <class... T>
  void sizes(const char* names, T&... members) {
    each(names, [&](py::handle x, auto& member) {
      number(x, member);
      member = size(member);
    }, members...);
  }

  template <class... T>
  void arrays(int64_t count, const char* names, T*&... pointers) {
    each(names, [&](py::handle x, auto& pointer) { contiguous(required(x), pointer, count); }, pointers...);
  }

  template <class... T>
  void optional(int64_t count, const char* names, T*&... pointers) {
    each(names, [&](py::handle x, auto& pointer) { contiguous(x, pointer, count); }, pointers...);
  }

  template <class T>
  void vector(int64_t count, const char* name, T*& pointer, int64_t& size) {
    size = contiguous(required(take(name)), pointer, count);
  }

  template <class T>
  void optional_vector(const char* name, T*& pointer, int64_t& size) {
    size = contiguous(take(name), pointer, 0);
  }

  template <class T>
  void matrix(const char* name, T*& pointer, int64_t& stride, int64_t& num_rows, int64_t& num_cols) {
    const py::handle x = required(take(name));
    const py::object sizes = tuple_of(x, attribute(x, torch_.shape));
    if (PyTuple_GET_SIZE(sizes.ptr()) != 2) throw py::type_error(here() + " must have two dimensions");
    num_rows = size(item(sizes, 0)), num_cols = size(item(sizes, 1));
    in_rows(x, pointer, stride, num_rows, num_cols);
  }

  template <class T>
  void rows(const char* name, T*& pointer, int64_t& stride, int64_t num_rows, int64_t num_cols) {
    in_rows(required(take(name)), pointer, stride, num_rows, num_cols);
  }

  template <class T>
  void optional_rows(const char* name, T*& pointer, int64_t& stride, int64_t num_rows, int64_t num_cols) {
    in_rows(take(name), pointer, stride, num_rows, num_cols);
  }

  template <class T>
  void optional_matrix(const char* name, T*& pointer, int64_t& stride, int64_t& num_rows, int64_t& num_cols) {
    const bool given = !take(name).is_none();
    names_.pop_back();
    num_rows = num_cols = 0;
    given ? matrix(name, pointer, stride, num_rows, num_cols) : optional_rows(name, pointer, stride, 0, 0);
  }

  // Of any of three types, which is then that of every `void*` of the call.
  void dtype_of(const char* name, DType& dtype) {
    const py::handle x = take(name);
    const py::object type = x.is_none() ? torch_.float32 : attribute(x, torch_.dtype);
    names_.pop_back();  // to be taken as a tensor too
    dtype = type.is(torch_.bfloat16) ? DType::kBFloat16 : type.is(torch_.float16) ? DType::kFloat16 : DType::kFloat32;
    any_size_ = dtype == DType::kFloat32 ? 4 : 2;
    any_ = dtype == DType::kBFloat16 ? &torch_.bfloat16 : dtype == DType::kFloat16 ? &torch_.float16 : &torch_.float32;
  }

  template <class... T>
  void pairs(int64_t count, const char* names, T* (&... pointers)[2]) {
    each(names, [&](py::handle both, auto& sides) {
      for (int side = 0; side < 2; ++side) contiguous(of_pair(both, side), sides[side], count);
    }, pointers...);
  }

  template <class T>
  void pair_of_rows(const char* name, T* (&pointers)[2], int64_t& stride, int64_t num_rows, int64_t num_cols) {
    const py::handle both = take(name);
    int64_t strides[2] = {};
    for (int side : {0, 1}) in_rows(of_pair(both, side), pointers[side], strides[side], num_rows, num_cols, true);
    require(!pointers[0] == !pointers[1] && strides[0] == strides[1], "both sides must be given, with one stride");
    stride = strides[0];
  }

  void offsets(int64_t count, const char* name, const void*& pointer, bool& are_int32) {
    const py::handle x = take(name);
    are_int32 = !x.is_none() && attribute(x, torch_.dtype).is(torch_.int32);
    any_ = are_int32 ? &torch_.int32 : &torch_.int64;
    any_size_ = are_int32 ? 4 : 8;
    contiguous(x, pointer, count);
  }

  template <class... T>
  void tuple(const char* name, T&... members) {
    const py::object values = py::reinterpret_borrow<py::object>(take(name));
    if (!PyTuple_Check(values.ptr()) || PyTuple_GET_SIZE(values.ptr()) != sizeof...(T)) {
      throw py::type_error(here() + " must hold " + std::to_string(sizeof...(T)) + " numbers");
    }
    py::ssize_t i = 0;
    (number(PyTuple_GET_ITEM(values.ptr(), i++), members), ...);
  }

  // A DType by its number.
  void type_id(const char* name, DType& dtype) {
    int id = 0;
    kind(name, id, 3);
    dtype = static_cast<DType>(id);
  }

  // One of `count` kinds by its number.
  void kind(const char* name, int& id, int count) {
    number(take(name), id);
    known(id, count);
  }

  // [(id, weight), ...]
  void terms(const char* name, LossTerm (&terms)[kMaxTerms], int& count) {
    const py::sequence given = py::reinterpret_borrow<py::sequence>(take(name));
    count = 0;
    for (const py::handle term : given) {
      if (count == kMaxTerms) throw py::value_error(here() + " has too many losses");
      std::pair<int, double> read;
      number(term, read);
      const int id = known(read.first, static_cast<int>(std::size(kPreferenceLosses)));
      terms[count++] = {static_cast<PreferenceLoss>(id), read.second};
    }
  }

  // {name: number}, of every option, and the divergence's id
  void options(const char* name, PreferenceOptions& options) {
    const py::handle x = take(name);
    if (!PyDict_Check(x.ptr())) throw cannot_be(x);
    const py::dict given = py::reinterpret_borrow<py::dict>(x);
    const auto entry = [&](const char* key, auto& member) {
      if (!given.contains(key)) throw py::type_error(here() + " lacks " + key);
      number(given[key], member);
    };
    int divergence = 0;
    entry("divergence", divergence);
    options.divergence = static_cast<Divergence>(known(divergence, static_cast<int>(std::size(kDivergences))));
    for (const auto& field : kPreferenceOptionFields) entry(field.name, options.*(field.field));
    if (given.size() != std::size(kPreferenceOptionFields) + 1) throw py::type_error(here() + " has unknown entries");
  }

  // TypeError for fields that do not go together.
  void require(bool holds, const char* what) const {
    if (!holds) throw py::type_error(std::string(function_) + ": " + what);
  }

  // ValueError for numbers that a field points with, and that point outside of another.
  void require_value(bool holds, const char* what) const {
    if (!holds) throw py::value_error(std::string(function_) + ": " + what);
  }

  // These two may begin at one address.
  void may_share(const char* one, const char* other) { shared_ = {one, other}; }

  // TypeError for what no field has taken, ValueError for what would be written over.
  void done() const {
    for (const Memory& x : memory_) {
      if (!x.written) continue;
      for (const Memory& y : memory_) {
        if (&x == &y || x.end <= y.begin || y.end <= x.begin || (x.begin == y.begin && share(x.name, y.name))) continue;
        throw py::value_error(std::string(function_) + ": " + std::string(x.name) + " is written over " +
                              std::string(y.name));
      }
    }
    if (names_.size() == given_.size()) return;
    for (const auto& given : given_) {
      const auto name = given.first.cast<std::string>();
      if (std::find(names_.begin(), names_.end(), name) == names_.end()) {
        throw py::type_error(std::string(function_) + " has no field '" + name + "'");
      }
    }
  }

 private:
  struct Memory {
    std::string_view name;
    uintptr_t begin, end;
    bool written;
  };

  bool share(std::string_view one, std::string_view other) const {  // both sides of a packed batch are one array
    return one == other || (one == shared_.first && other == shared_.second) ||
           (other == shared_.first && one == shared_.second);
  }

  std::string here() const { return std::string(function_) + ": " + std::string(names_.back()); }

  // What a tensor answers; TypeError where it is none.
  py::object attribute(py::handle x, const py::object& name) const {
    return answer(x, PyObject_GetAttr(x.ptr(), name.ptr()));
  }
  py::object method(py::handle x, const py::object& name) const {
    return answer(x, PyObject_CallMethodNoArgs(x.ptr(), name.ptr()));
  }
  py::object answer(py::handle x, PyObject* found) const {
    if (found != nullptr) return py::reinterpret_steal<py::object>(found);
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
    throw cannot_be(x);
  }
  py::object tuple_of(py::handle x, const py::object& sizes) const {
    return PyTuple_Check(sizes.ptr()) ? sizes : throw cannot_be(x);
  }
  py::type_error cannot_be(py::handle x) const {
    const bool plain = x.is_none() || PyLong_Check(x.ptr()) || PyFloat_Check(x.ptr()) || PyUnicode_Check(x.ptr());
    const py::object shown = plain ? py::repr(x) : py::type::of(x).attr("__name__");  // torch prints no freed storage
    return py::type_error(here() + " cannot be " + (plain ? "" : "a ") + shown.cast<std::string>());
  }
  static int64_t item(const py::object& sizes, py::ssize_t i) { return integer(PyTuple_GET_ITEM(sizes.ptr(), i)); }
  static int64_t integer(py::handle x) {
    const int64_t value = PyLong_AsLongLong(x.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  int64_t size(int64_t x) const {
    if (x < 0 || x > kMostElements) throw py::value_error(here() + " cannot be of size " + std::to_string(x));
    return x;
  }
  int known(int id, int count) const {
    if (id < 0 || id >= count) throw py::value_error(here() + " knows no " + std::to_string(id));
    return id;
  }

  py::handle take(std::string_view name) {
    names_.push_back(name);
    const py::handle found = PyDict_GetItem(given_.ptr(), py::str(name.data(), name.size()).ptr());
    if (!found) throw py::type_error(here() + " is missing");
    return found;
  }

  // `function` of the value of each of "first, second" and its member.
  template <class Function, class... T>
  void each(const char* names, Function function, T&... members) {
    const auto one = [&](auto& member) {
      const size_t size = std::strcspn(names, ",");
      function(take({names, size}), member);
      names += names[size] ? size + std::strlen(", ") : size;
    };
    (one(members), ...);
  }

  py::handle required(py::handle x) const {
    if (x.is_none()) throw py::type_error(here() + " is None");
    return x;
  }

  template <class T>
  void number(py::handle x, T& member) const {
    try {
      if (std::is_same_v<T, bool> && !PyBool_Check(x.ptr())) throw py::cast_error();
      member = x.cast<T>();
    } catch (const py::cast_error&) {
      throw cannot_be(x);
    }
  }

  py::handle of_pair(py::handle both, int side) const {
    if (both.is_none()) return both;
    if (!PyTuple_Check(both.ptr()) || PyTuple_GET_SIZE(both.ptr()) != 2) throw py::type_error(here() + " must be two");
    return PyTuple_GET_ITEM(both.ptr(), side);
  }

  template <class T>
  const py::object& type_of() const {
    if constexpr (std::is_void_v<T>) return *any_;
    else if constexpr (std::is_same_v<T, float>) return torch_.float32;
    else if constexpr (std::is_same_v<T, double> || std::is_same_v<T, RowStats>) return torch_.float64;
    else if constexpr (std::is_same_v<T, int64_t>) return torch_.int64;
    else if constexpr (std::is_same_v<T, int32_t>) return torch_.int32;
    else return torch_.uint8;  // bits, flags, and the bytes of sums
  }
  // Bytes of an element, and of what an address is a multiple of.
  template <class T>
  int64_t size_of() const {
    if constexpr (std::is_void_v<T>) return any_size_;
    else if constexpr (std::is_same_v<T, RowStats>) return sizeof(double);
    else if constexpr (std::is_same_v<T, PairSums>) return 1;
    else return sizeof(T);
  }
  template <class T>
  uintptr_t alignment_of() const {
    if constexpr (std::is_void_v<T>) return any_size_;
    else return alignof(T);
  }

  template <class T>
  int64_t contiguous(py::handle x, T*& to, int64_t count) {
    using Element = std::remove_const_t<T>;
    if (x.is_none()) return 0;
    of_a_tensor(x);
    if (std::is_same_v<Element, RowStats>) count = product_of(count, kRowStatsSize);
    if (std::is_same_v<Element, PairSums>) count = product_of(count, sizeof(PairSums));
    const int64_t elements = integer(method(x, torch_.numel));
    const bool fits = elements >= count && method(x, torch_.is_contiguous).ptr() == Py_True;
    to = static_cast<T*>(pointer(x, type_of<Element>(), fits, elements == 0));
    keep<T>(to, elements);
    return elements;
  }

  // `flat_too`: one dimension is num_rows rows of one column.
  template <class T>
  void in_rows(py::handle x, T*& to, int64_t& stride, int64_t num_rows, int64_t num_cols, bool flat_too = false) {
    using Element = std::remove_const_t<T>;
    if (x.is_none()) return;
    of_a_tensor(x);
    const py::object sizes = tuple_of(x, attribute(x, torch_.shape)), strides = tuple_of(x, method(x, torch_.stride));
    const py::ssize_t dims = PyTuple_GET_SIZE(sizes.ptr());
    bool fits = dims == 2 || (dims == 1 && flat_too), empty = false;
    int64_t reach = 0;  // elements from the first to the last
    if (fits) {
      const int64_t rows = item(sizes, 0), cols = dims == 2 ? item(sizes, 1) : 1;
      stride = item(strides, 0);
      fits = rows >= num_rows && cols >= num_cols && (dims == 2 ? cols <= 1 || item(strides, 1) == 1 : stride == 1);
      empty = rows == 0 || cols == 0;
      if (empty) stride = 0;  // of any size: no address is made of it
      if (!std::is_const_v<T> && rows > 1 && stride < cols && !empty) {
        throw py::type_error(here() + ": its rows overlap, and are written");
      }
      if (fits && !empty) reach = (rows - 1) * stride + cols;
    }
    to = static_cast<T*>(pointer(x, type_of<Element>(), fits, empty));
    keep<T>(to, reach);
  }

  void of_a_tensor(py::handle x) const {
    if (!PyObject_TypeCheck(x.ptr(), reinterpret_cast<PyTypeObject*>(torch_.tensor.ptr()))) throw cannot_be(x);
  }

  template <class T>
  void keep(const void* pointer, int64_t elements) {
    using Element = std::remove_const_t<T>;
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    if (begin % alignment_of<Element>() != 0) {
      throw std::runtime_error(here() + ": its address is no multiple of an element's size; clone() has one that is");
    }
    if (elements > 0) memory_.push_back({names_.back(), begin, begin + elements * size_of<Element>(), !std::is_const_v<T>});
  }

  // RuntimeError for what would be misread there.
  void* pointer(py::handle x, const py::object& dtype, bool fits, bool empty) const {
    const py::object type = attribute(x, torch_.dtype);
    const bool same = type.is(dtype) || (dtype.is(torch_.uint8) && type.is(torch_.boolean));
    const auto found = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(method(x, torch_.data_ptr).ptr()));
    const bool on_device = attribute(x, cuda_device_ < 0 ? torch_.is_cpu : torch_.is_cuda).ptr() == Py_True &&
                           (cuda_device_ < 0 || x.attr("device").attr("index").cast<int>() == cuda_device_);
    if (same && on_device && fits && (found || empty) && method(x, torch_.is_neg).ptr() != Py_True) return found;
    const py::str text("{}: native code for {} would misread a tensor of type {}, {} on {}, shape {}, strides {}, as {}");
    throw std::runtime_error(text.format(here(), cuda_device_ < 0 ? "cpu" : "cuda", py::type::of(x).attr("__name__"),
                                         type, x.attr("device"), x.attr("shape"), x.attr("stride")(), dtype)
                                 .cast<std::string>());
  }

  const char* function_;
  const py::dict given_;
  int cuda_device_ = -1;
  const Torch& torch_;
  const py::object* any_ = nullptr;  // the type of `void*`
  int64_t any_size_ = 4;
  std::vector<std::string_view> names_;  // taken
  std::vector<Memory> memory_;           // and where they lie
  std::pair<std::string_view, std::string_view> shared_;
};

}  // namespace fastdpo
