// Every preference loss, once: an expression on dual numbers, so value and gradient come from the same line.
//   a, b = chosen, rejected log-ratio to the reference        s = f-divergence score of a log-ratio
//   d = s_w - s_l        S = sigmoid        n = completion tokens        e = label smoothing
// What has no expression per preference pair is not here: `sft`, and `aot*`, which match the rows of a batch by rank.
#pragma once

#include "shared/dual.h"

namespace fastdpo {

// A new loss is its name here and its case in `preference_loss`; a new option is its name here. Python finds both by name.
#define FASTDPO_PREFERENCE_LOSSES(X)                                                                  \
  X(sigmoid) X(robust) X(ipo) X(hinge) X(exo_pair) X(nca_pair) X(bco_pair) X(sppo_hard) X(apo_zero)   \
  X(apo_down) X(discopop) X(sigmoid_norm) X(simpo) X(cpo) X(orpo) X(kto) X(dpop) X(slic)
#define FASTDPO_DIVERGENCES(X) X(reverse_kl) X(forward_kl) X(js_divergence) X(alpha_divergence)
#define FASTDPO_PREFERENCE_OPTIONS(X)                                                                 \
  X(beta) X(label_smoothing) X(f_alpha_divergence_coef) X(discopop_tau) X(simpo_gamma) X(dpop_lambda) \
  X(slic_delta) X(kto_kl) X(desirable_weight) X(undesirable_weight)

#define FASTDPO_ID(name) name,
#define FASTDPO_NAME(name) #name,
#define FASTDPO_NUMBER(name) double name;
#define FASTDPO_FIELD(name) &PreferenceOptions::name,

enum class PreferenceLoss : int { FASTDPO_PREFERENCE_LOSSES(FASTDPO_ID) };
enum class Divergence : int { FASTDPO_DIVERGENCES(FASTDPO_ID) };
struct PreferenceOptions {
  FASTDPO_PREFERENCE_OPTIONS(FASTDPO_NUMBER)
  Divergence divergence;
};

// By id, and the options in the order of the struct, in which Python hands them over.
constexpr const char* kPreferenceLosses[] = {FASTDPO_PREFERENCE_LOSSES(FASTDPO_NAME)};
constexpr const char* kDivergences[] = {FASTDPO_DIVERGENCES(FASTDPO_NAME)};
constexpr const char* kPreferenceOptions[] = {FASTDPO_PREFERENCE_OPTIONS(FASTDPO_NAME)};
constexpr double PreferenceOptions::*kPreferenceOptionFields[] = {FASTDPO_PREFERENCE_OPTIONS(FASTDPO_FIELD)};

// Exponents stop here, as TRL's do: e^80 is still a finite float, and so is its product with a coefficient.
constexpr double kMaxExponent = 80.0;
// A mean log-prob of 0 says only that p rounds to 1, where the log-odds have a pole: it counts as that of the largest
// probability below 1 that fp32 holds, 1 - 2^-24. So does all above -2^-126, where their slope would leave fp32.
constexpr double kCertainLogp = -5.9604644775390625e-08;
constexpr double kMaxMeanLogp = -1.1754943508222875e-38;

template <class T>
struct PreferenceInputs {
  Dual<T, 4> chosen;
  Dual<T, 4> rejected;
  Dual<T, 4> ref_chosen;
  Dual<T, 4> ref_rejected;
  T chosen_length;  // at least 1
  T rejected_length;
};

// f'(t) at log t, f-DPO (arXiv 2309.16240).
template <class T>
FASTDPO_HD Dual<T, 4> divergence_score(const Dual<T, 4>& logratio, const PreferenceOptions& options) {
  switch (options.divergence) {
    case Divergence::forward_kl:  // 1 - 1 / t
      return -expm1(clamp_max(-logratio, T(kMaxExponent)));
    case Divergence::js_divergence:  // log(2 t / (t + 1))
      return T(0.6931471805599453) + log_sigmoid(logratio);
    case Divergence::alpha_divergence: {  // (t^(alpha - 1) - 1) / (alpha - 1), which tends to log t at alpha = 1
      const T power = T(options.f_alpha_divergence_coef - 1.0);
      if (power == T(0)) return logratio;
      return expm1(clamp_max(power * logratio, T(kMaxExponent))) / power;
    }
    case Divergence::reverse_kl:
      break;
  }
  return logratio;
}

// -(1 - e) log S(x) - e log S(-x): the labels are right with probability 1 - e.
template <class T>
FASTDPO_HD Dual<T, 4> smoothed_log_loss(const Dual<T, 4>& x, T smoothing) {
  // 0 * log S(-inf) would be NaN.
  if (smoothing == T(0)) return -log_sigmoid(x);
  return (smoothing - T(1)) * log_sigmoid(x) - smoothing * log_sigmoid(-x);
}

template <class T>
FASTDPO_HD Dual<T, 4> log_odds(const Dual<T, 4>& mean_logp) {
  const bool certain = mean_logp.value > T(kMaxMeanLogp);
  const Dual<T, 4> x = chain(mean_logp, certain ? T(kCertainLogp) : mean_logp.value, T(1));
  return x - log1mexp(x);
}

template <class T>
FASTDPO_HD Dual<T, 4> preference_loss(PreferenceLoss loss, const PreferenceInputs<T>& in,
                                      const PreferenceOptions& options) {
  using D = Dual<T, 4>;
  const T beta = T(options.beta);
  const T e = T(options.label_smoothing);
  const T n_w = in.chosen_length;
  const T n_l = in.rejected_length;
  const D a = in.chosen - in.ref_chosen;
  const D b = in.rejected - in.ref_rejected;
  const D s_w = divergence_score(a, options);
  const D s_l = divergence_score(b, options);
  const D x = beta * (s_w - s_l);

  switch (loss) {
    // -log S(beta d). DPO, arXiv 2305.18290 eq. 7; smoothed: conservative DPO, ericmitchell.ai/cdpo.pdf eq. 3
    case PreferenceLoss::sigmoid:
      return smoothed_log_loss(x, e);

    // [-(1 - e) log S(beta d) + e log S(-beta d)] / (1 - 2e). Robust DPO, arXiv 2403.00409
    case PreferenceLoss::robust:
      if (e == T(0)) return -log_sigmoid(x);
      return ((e - T(1)) * log_sigmoid(x) + e * log_sigmoid(-x)) / (T(1) - T(2) * e);

    // (s_w / n_w - s_l / n_l - 1 / (2 beta))^2. IPO, arXiv 2310.12036 eq. 17, per token
    case PreferenceLoss::ipo:
      return square(s_w / n_w - s_l / n_l - T(0.5) / beta);

    // relu(1 - beta d). RSO, arXiv 2309.06657
    case PreferenceLoss::hinge:
      return relu(T(1) - x);

    // S(beta d) [log S(beta d) - log(1 - e)] + S(-beta d) [log S(-beta d) - log e]. EXO, arXiv 2402.00856 eq. 16
    case PreferenceLoss::exo_pair:
      return sigmoid(x) * (log_sigmoid(x) - ::log1p(-e)) + sigmoid(-x) * (log_sigmoid(-x) - ::log(e));

    // -log S(beta a) - log S(-beta a) / 2 - log S(-beta b) / 2. NCA, arXiv 2402.05369
    case PreferenceLoss::nca_pair:
      return T(-0.5) * (log_sigmoid(-beta * a) + log_sigmoid(-beta * b)) - log_sigmoid(beta * a);

    // -log S(beta a) - log S(-beta b). BCO without the running shift, arXiv 2404.04656
    case PreferenceLoss::bco_pair:
      return -log_sigmoid(beta * a) - log_sigmoid(-beta * b);

    // (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2. SPPO with hard labels, arXiv 2405.00675 eq. 4.7
    case PreferenceLoss::sppo_hard:
      return square(a - T(0.5) / beta) + square(b + T(0.5) / beta);

    // 1 - S(beta a) + S(beta b). APO-zero, arXiv 2408.06266 eq. 7
    case PreferenceLoss::apo_zero:
      return sigmoid(-beta * a) + sigmoid(beta * b);

    // S(beta a) + 1 - S(beta (a - b)). APO-down, arXiv 2408.06266 eq. 8
    case PreferenceLoss::apo_down:
      return sigmoid(beta * a) + sigmoid(-beta * (a - b));

    // -log S(x) (1 - m) + e^-x m with x = beta d, m = S(x / tau). DiscoPOP, arXiv 2406.08414 eq. 5
    case PreferenceLoss::discopop: {
      // e^-x and m overflow and vanish together: their exponents are added before either exists.
      const D z = x / T(options.discopop_tau);
      return exp(clamp_max(log_sigmoid(z) - x, T(kMaxExponent))) - log_sigmoid(x) * sigmoid(-z);
    }

    // -log S(beta (s_w / n_w - s_l / n_l)). Length-normalised DPO, arXiv 2411.15124
    case PreferenceLoss::sigmoid_norm:
      return -log_sigmoid(beta * (s_w / n_w - s_l / n_l));

    // -log S(beta (chosen / n_w - rejected / n_l) - gamma), smoothed. SimPO, arXiv 2405.14734 eq. 6
    case PreferenceLoss::simpo:
      return smoothed_log_loss(beta * (in.chosen / n_w - in.rejected / n_l) - T(options.simpo_gamma), e);

    // -log S(beta (chosen - rejected)), smoothed. CPO's preference term, arXiv 2401.08417 eq. 3
    case PreferenceLoss::cpo:
      return smoothed_log_loss(beta * (in.chosen - in.rejected), e);

    // -beta log S(log odds_w - log odds_l), odds = p / (1 - p), p = e^(logp / n). ORPO's odds-ratio term, arXiv
    // 2403.07691 eqs. 4 and 7; its lambda is `beta`, as in TRL
    case PreferenceLoss::orpo:
      return -beta * log_sigmoid(log_odds(in.chosen / n_w) - log_odds(in.rejected / n_l));

    // [lambda_D (1 - S(beta (a - KL))) + lambda_U (1 - S(beta (KL - b)))] / 2: the mean over the two sequences, as
    // KTO averages over sequences. arXiv 2402.01306
    case PreferenceLoss::kto: {
      const T kl = T(options.kto_kl);
      return T(0.5 * options.desirable_weight) * sigmoid(-beta * (a - kl)) +
             T(0.5 * options.undesirable_weight) * sigmoid(beta * (b - kl));
    }

    // -log S(beta (a - b - lambda relu(-a))). DPO-positive, arXiv 2402.13228
    case PreferenceLoss::dpop:
      return -log_sigmoid(beta * (a - b - T(options.dpop_lambda) * relu(-a)));

    // relu(delta - beta (chosen - rejected)). SLiC-HF's rank loss, arXiv 2305.10425, where beta is 1
    case PreferenceLoss::slic:
      return relu(T(options.slic_delta) - beta * (in.chosen - in.rejected));
  }
  return D(T(0));
}

}  // namespace fastdpo
