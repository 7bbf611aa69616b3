// Every preference loss, once: an expression on dual numbers, so value and gradient come from the same line.
//   a, b = chosen, rejected log-ratio to the reference        s = f-divergence score of a log-ratio
//   d = s_w - s_l        x = beta d        S = sigmoid        n = completion tokens        e = label smoothing
//   k_w, k_l = KL(reference || policy) of chosen, rejected, summed over the completion
// The losses that need the whole batch are not here: `sft` is finished in preference_batch.h, and those that match rows
// by rank are torch's.
#pragma once

#include "shared/dual.h"

namespace fastdpo {

enum class Divergence : int { kReverseKl, kForwardKl, kJs, kAlpha };

struct NamedDivergence {
  const char* name;
  Divergence id;
};

constexpr NamedDivergence kDivergences[] = {
    {"reverse_kl", Divergence::kReverseKl},
    {"forward_kl", Divergence::kForwardKl},
    {"js_divergence", Divergence::kJs},
    {"alpha_divergence", Divergence::kAlpha},
};

enum class PreferenceLoss : int {
#define LOSS(name, ...) name,
#include "shared/preference_losses.h"
#undef LOSS
};

struct NamedLoss {
  const char* name;
  PreferenceLoss id;
};

constexpr NamedLoss kPreferenceLosses[] = {
#define LOSS(name, ...) {#name, PreferenceLoss::name},
#include "shared/preference_losses.h"
#undef LOSS
};

// What else the expressions read, and the order in which Python hands it over.
#define FASTDPO_PREFERENCE_OPTIONS(OPTION)                                                                   \
  OPTION(beta) OPTION(label_smoothing) OPTION(f_alpha_divergence_coef) OPTION(discopop_tau) OPTION(simpo_gamma) \
  OPTION(dpop_lambda) OPTION(slic_delta) OPTION(kto_kl) OPTION(desirable_weight) OPTION(undesirable_weight) \
  OPTION(tdpo_alpha)

struct PreferenceOptions {
  Divergence divergence;
#define OPTION(name) double name;
  FASTDPO_PREFERENCE_OPTIONS(OPTION)
#undef OPTION
};

struct OptionField {
  const char* name;
  double PreferenceOptions::*field;
};

constexpr OptionField kPreferenceOptionFields[] = {
#define OPTION(name) {#name, &PreferenceOptions::name},
    FASTDPO_PREFERENCE_OPTIONS(OPTION)
#undef OPTION
};

// Exponents stop here, as TRL's do: e^80 is still a finite float, and so is its product with a coefficient.
constexpr double kMaxExponent = 80.0;
// A mean log-prob of 0 says only that p rounds to 1, where the log-odds have a pole: it counts as that of the largest
// probability below 1 that fp32 holds, 1 - 2^-24. So does all above -2^-126, where their slope would leave fp32.
constexpr double kCertainLogp = -5.9604644775390625e-08;
constexpr double kMaxMeanLogp = -1.1754943508222875e-38;

constexpr int kPreferenceInputs = 6;  // that have a gradient
template <class T>
using PreferenceDual = Dual<T, kPreferenceInputs>;

template <class T>
struct PreferenceInputs {
  PreferenceDual<T> chosen;
  PreferenceDual<T> rejected;
  PreferenceDual<T> ref_chosen;
  PreferenceDual<T> ref_rejected;
  PreferenceDual<T> chosen_kl;
  PreferenceDual<T> rejected_kl;
  T chosen_length;  // at least 1
  T rejected_length;
};

// f'(t) at log t, f-DPO (arXiv 2309.16240).
template <class T>
FASTDPO_HD PreferenceDual<T> divergence_score(const PreferenceDual<T>& logratio, const PreferenceOptions& options) {
  switch (options.divergence) {
    case Divergence::kForwardKl:  // 1 - 1 / t
      return -expm1(clamp_max(-logratio, T(kMaxExponent)));
    case Divergence::kJs:  // log(2 t / (t + 1))
      return T(0.6931471805599453) + log_sigmoid(logratio);
    case Divergence::kAlpha: {  // (t^(alpha - 1) - 1) / (alpha - 1), which tends to log t at alpha = 1
      const T power = T(options.f_alpha_divergence_coef - 1.0);
      if (power == T(0)) return logratio;
      return expm1(clamp_max(power * logratio, T(kMaxExponent))) / power;
    }
    case Divergence::kReverseKl:
      break;
  }
  return logratio;
}

// -(1 - e) log S(x) - e log S(-x): the labels are right with probability 1 - e.
template <class T>
FASTDPO_HD PreferenceDual<T> smoothed_log_loss(const PreferenceDual<T>& x, T smoothing) {
  // 0 * log S(-inf) would be NaN.
  if (smoothing == T(0)) return -log_sigmoid(x);
  return (smoothing - T(1)) * log_sigmoid(x) - smoothing * log_sigmoid(-x);
}

template <class T>
FASTDPO_HD PreferenceDual<T> log_odds(const PreferenceDual<T>& mean_logp) {
  const bool certain = mean_logp.value > T(kMaxMeanLogp);
  const PreferenceDual<T> x = chain(mean_logp, certain ? T(kCertainLogp) : mean_logp.value, T(1));
  return x - log1mexp(x);
}

template <class T>
FASTDPO_HD PreferenceDual<T> preference_loss(PreferenceLoss loss, const PreferenceInputs<T>& in,
                                      const PreferenceOptions& options) {
  using D = PreferenceDual<T>;
  const T beta = T(options.beta);
  const T e = T(options.label_smoothing);
  const T n_w = in.chosen_length;
  const T n_l = in.rejected_length;
  const D a = in.chosen - in.ref_chosen;
  const D b = in.rejected - in.ref_rejected;
  const D s_w = divergence_score(a, options);
  const D s_l = divergence_score(b, options);
  const D x = beta * (s_w - s_l);
  const D k_w = in.chosen_kl;
  const D k_l = in.rejected_kl;
  switch (loss) {
#define LOSS(name, ...)      \
  case PreferenceLoss::name: \
    return __VA_ARGS__;
#include "shared/preference_losses.h"
#undef LOSS
  }
  return D(T(0));
}

}  // namespace fastdpo
