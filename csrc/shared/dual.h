// Forward-mode dual numbers: a value and its K partial derivatives, carried through one expression together, so
// that a gradient is never written down and cannot drift from its value. Usable in CUDA kernels as it stands.
#pragma once

#include <math.h>

#include "shared/host_device.h"

namespace fastdpo {

template <class T, int K>
struct Dual {
  T value;
  T tangent[K];

  FASTDPO_HD Dual(T constant = T(0)) : value(constant) {
    for (int k = 0; k < K; ++k) tangent[k] = T(0);
  }

  // The k-th input: derivative 1 with respect to itself.
  FASTDPO_HD static Dual input(T value, int k) {
    Dual x(value);
    x.tangent[k] = T(1);
    return x;
  }
};

// f(x) given f's value and slope at x.
template <class T, int K>
FASTDPO_HD Dual<T, K> chain(const Dual<T, K>& x, T value, T slope) {
  Dual<T, K> y(value);
  for (int k = 0; k < K; ++k) y.tangent[k] = slope * x.tangent[k];
  return y;
}

template <class T, int K>
FASTDPO_HD Dual<T, K> operator+(const Dual<T, K>& x, const Dual<T, K>& y) {
  Dual<T, K> z(x.value + y.value);
  for (int k = 0; k < K; ++k) z.tangent[k] = x.tangent[k] + y.tangent[k];
  return z;
}

template <class T, int K>
FASTDPO_HD Dual<T, K> operator-(const Dual<T, K>& x, const Dual<T, K>& y) {
  Dual<T, K> z(x.value - y.value);
  for (int k = 0; k < K; ++k) z.tangent[k] = x.tangent[k] - y.tangent[k];
  return z;
}

template <class T, int K>
FASTDPO_HD Dual<T, K> operator*(const Dual<T, K>& x, const Dual<T, K>& y) {
  Dual<T, K> z(x.value * y.value);
  for (int k = 0; k < K; ++k) z.tangent[k] = x.value * y.tangent[k] + y.value * x.tangent[k];
  return z;
}

// The scalar operand is not deduced from, so `beta * x` and `x - 1` accept any arithmetic type.
template <class T>
struct Undeduced {
  using type = T;
};
template <class T>
using Scalar = typename Undeduced<T>::type;

template <class T, int K>
FASTDPO_HD Dual<T, K> operator+(const Dual<T, K>& x, Scalar<T> c) {
  return chain(x, x.value + c, T(1));
}
template <class T, int K>
FASTDPO_HD Dual<T, K> operator+(Scalar<T> c, const Dual<T, K>& x) {
  return x + c;
}
template <class T, int K>
FASTDPO_HD Dual<T, K> operator-(const Dual<T, K>& x, Scalar<T> c) {
  return chain(x, x.value - c, T(1));
}
template <class T, int K>
FASTDPO_HD Dual<T, K> operator-(Scalar<T> c, const Dual<T, K>& x) {
  return chain(x, c - x.value, T(-1));
}
template <class T, int K>
FASTDPO_HD Dual<T, K> operator-(const Dual<T, K>& x) {
  return chain(x, -x.value, T(-1));
}
template <class T, int K>
FASTDPO_HD Dual<T, K> operator*(Scalar<T> c, const Dual<T, K>& x) {
  return chain(x, c * x.value, c);
}
template <class T, int K>
FASTDPO_HD Dual<T, K> operator/(const Dual<T, K>& x, Scalar<T> c) {
  return chain(x, x.value / c, T(1) / c);
}

// 1 / (1 + e^-x) without overflow: the exponent is never positive.
template <class T>
FASTDPO_CALL T sigmoid_value(T x) {
  const T e = ::exp(x < T(0) ? x : -x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}

template <class T, int K>
FASTDPO_HD Dual<T, K> sigmoid(const Dual<T, K>& x) {
  // 1 - sigmoid(x) is sigmoid(-x): subtracting would lose it for large x.
  const T p = sigmoid_value(x.value);
  return chain(x, p, p * sigmoid_value(-x.value));
}

template <class T>
FASTDPO_CALL T log_sigmoid_value(T x) {
  return x < T(0) ? x - ::log1p(::exp(x)) : -::log1p(::exp(-x));
}

template <class T, int K>
FASTDPO_HD Dual<T, K> log_sigmoid(const Dual<T, K>& x) {
  return chain(x, log_sigmoid_value(x.value), sigmoid_value(-x.value));
}

template <class T>
FASTDPO_CALL T exp_value(T x) {
  return ::exp(x);
}

template <class T, int K>
FASTDPO_HD Dual<T, K> exp(const Dual<T, K>& x) {
  const T e = exp_value(x.value);
  return chain(x, e, e);
}

template <class T>
FASTDPO_CALL T expm1_value(T x) {
  return ::expm1(x);
}

template <class T, int K>
FASTDPO_HD Dual<T, K> expm1(const Dual<T, K>& x) {
  return chain(x, expm1_value(x.value), exp_value(x.value));
}

template <class T, int K>
FASTDPO_HD Dual<T, K> square(const Dual<T, K>& x) {
  return chain(x, x.value * x.value, T(2) * x.value);
}

// log(1 - e^x) for x < 0. Near 0 expm1 keeps the digits, far below log1p does; they meet at -log 2.
template <class T>
FASTDPO_CALL T log1mexp_value(T x) {
  return x > T(-0.6931471805599453) ? ::log(-::expm1(x)) : ::log1p(-::exp(x));
}

template <class T, int K>
FASTDPO_HD Dual<T, K> log1mexp(const Dual<T, K>& x) {
  return chain(x, log1mexp_value(x.value), exp_value(x.value) / expm1_value(x.value));
}

// Constants outside the bound, and the input inside; a NaN fails the comparison and stays.
template <class T, int K>
FASTDPO_HD Dual<T, K> clamp_max(const Dual<T, K>& x, Scalar<T> bound) {
  return x.value > bound ? Dual<T, K>(bound) : x;
}

template <class T, int K>
FASTDPO_HD Dual<T, K> relu(const Dual<T, K>& x) {
  return x.value <= T(0) ? Dual<T, K>(T(0)) : x;
}

}  // namespace fastdpo
