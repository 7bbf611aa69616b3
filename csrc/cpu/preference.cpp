// The preference losses on the CPU: the lanes of preference_batch.h one after the other, in one thread.
#include <initializer_list>

#include "shared/preference_batch.h"

namespace fastdpo {
namespace {

struct HostMachine {
  template <class T>
  struct Local {
    T values[kLanes];
    T& operator[](int lane) { return values[lane]; }
  };

  template <class Function>
  void each(Function function) {
    for (int lane = 0; lane < kLanes; ++lane) function(lane);
  }

  bool is_first() const { return true; }

  // As a GPU's thread block adds: within warps of 32, then across them; each step adds neighbours at a distance.
  static double tree(double (&x)[kLanes]) {
    for (const int distance : {16, 8, 4, 2, 1, 128, 64, 32}) {
      for (int lane = 0; lane < kLanes; ++lane) {
        if ((lane & distance) == 0) x[lane] = x[lane | distance] = x[lane] + x[lane | distance];
      }
    }
    return x[0];
  }

  double sum(const Local<double>& x) {
    double values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = x.values[lane];
    return tree(values);
  }

  template <class T>
  double sum(const Local<T>& x, double T::*field) {
    double values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = x.values[lane].*field;
    return tree(values);
  }

  int64_t count(const Local<int64_t>& x, Local<int64_t>* before) {
    int64_t total = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      before->values[lane] = total;
      total += x.values[lane];
    }
    return total;
  }
};

template <class T>
void forward(const PreferenceBatch<T>& a, const PreferenceResults<T>& out) {
  HostMachine machine;
  for (int64_t pair = 0; pair < a.num_pairs; ++pair) walk_pair(a, pair, machine, out.sums + pair);
  finish_batch(a, machine, out);
}

template <class T>
void backward(const PreferenceBatch<T>& a, const PreferenceUpstream<T>& up) {
  HostMachine machine;
  for (int64_t pair = 0; pair < a.num_pairs; ++pair) spread_pair(a, up, pair, machine);
}

}  // namespace

void host_preference_forward(const PreferenceBatch<float>& a, const PreferenceResults<float>& out) { forward(a, out); }
void host_preference_forward(const PreferenceBatch<double>& a, const PreferenceResults<double>& out) { forward(a, out); }
void host_preference_backward(const PreferenceBatch<float>& a, const PreferenceUpstream<float>& up) { backward(a, up); }
void host_preference_backward(const PreferenceBatch<double>& a, const PreferenceUpstream<double>& up) { backward(a, up); }

}  // namespace fastdpo
