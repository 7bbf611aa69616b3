// The preference losses on the CPU. A batch has at most some thousand rows: one thread, no workspace.
#include "preference.h"

#include <cmath>
#include <limits>

namespace fastdpo {
namespace {

template <class T>
T store(double x) {
  const double limit = std::numeric_limits<T>::max();
  return static_cast<T>(std::isfinite(x) && std::fabs(x) > limit ? std::copysign(limit, x) : x);
}

double length_of(const int64_t* lengths, int64_t i) {
  return lengths != nullptr && lengths[i] > 1 ? static_cast<double>(lengths[i]) : 1.0;
}

template <class T>
void run(const PreferenceArgs<T>& args) {
  using D = Dual<double, 4>;
  for (int64_t i = 0; i < args.batch_size; ++i) {
    const PreferenceInputs<double> in = {
        D::input(args.chosen[i], 0),
        D::input(args.rejected[i], 1),
        D::input(args.ref_chosen != nullptr ? args.ref_chosen[i] : 0, 2),
        D::input(args.ref_rejected != nullptr ? args.ref_rejected[i] : 0, 3),
        length_of(args.chosen_lengths, i),
        length_of(args.rejected_lengths, i),
    };
    D sum(0.0);
    for (int64_t l = 0; l < args.num_losses; ++l) {
      sum = sum + args.loss_weights[l] * preference_loss(args.losses_used[l], in, args.options);
    }
    args.losses[i] = store<T>(sum.value);
    for (int k = 0; k < 4; ++k) args.partials[k * args.batch_size + i] = store<T>(sum.tangent[k]);
  }
}

}  // namespace

void preference_loss_cpu(const PreferenceArgs<float>& args) { run(args); }
void preference_loss_cpu(const PreferenceArgs<double>& args) { run(args); }

}  // namespace fastdpo
