// What a row computes once its sums are known, and the gradient of one logit: the same lines in the CUDA kernels
// (logits_row.h) and in the CPU's folds, there on vectors of floats.
//
//   logp = -softplus(rest - z[label]), rest = log sum exp of the other logits        entropy = -sum p log p
//   dz[v] = coef * ((v == label) - p[v]) - coef_entropy * p[v] * (log p[v] + entropy)
//
// Functions are static: a translation unit compiled for AVX-512 keeps its own copy.
#pragma once

#include <math.h>

#include "shared/host_device.h"

namespace fastdpo {

// Stands for log p where p is 0 in fp32 and log p may be -inf: 0 * -inf is NaN.
constexpr float kLeastLogP = -200.0f;

struct LabelLogp {
  double logp;       // log p(label)
  double rest_logp;  // log(1 - p(label))
  double lse;
};

// From the other logits' maximum and log sum exp(z - max), and the label's own logit; -inf for a row without a label.
// Differences are taken first, and log(1 + e^x) on the side that does not overflow: log p keeps its relative precision
// near 0, whatever the logits' magnitude.
FASTDPO_HD static inline LabelLogp label_logp(double max, double log_sum, double label_logit) {
  const double x = (max - label_logit) + log_sum, small = ::log1p(::exp(-::fabs(x)));
  if (x > 0.0) return {-x - small, -small, max + log_sum + small};
  return {-small, x - small, label_logit + small};
}

FASTDPO_HD static inline double p_log_p(double logp) { return logp == -INFINITY ? 0.0 : ::exp(logp) * logp; }

// -sum p log p: of label or not, and then among the others; mean_d is their mean of z - max, weighted by exp(z - max).
FASTDPO_HD static inline double row_entropy(const LabelLogp& label, double log_sum, double mean_d) {
  const double others = label.rest_logp == -INFINITY ? 0.0 : ::exp(label.rest_logp) * (log_sum - mean_d);
  return others - p_log_p(label.rest_logp) - p_log_p(label.logp);
}

// dz of a logit that is not the label's; V is a float or a vector of them. log_p is at least kLeastLogP.
template <class V>
FASTDPO_HD static inline V other_grad(V p, V coef) {
  return -coef * p;
}
template <class V>
FASTDPO_HD static inline V other_grad(V p, V log_p, V coef, V entropy, V coef_entropy) {
  return -p * (coef + coef_entropy * (log_p + entropy));
}

// The label's; 1 - p from logp, in full precision: p rounds to 1 for confident tokens.
FASTDPO_HD static inline float label_grad(float logp, float coef, float entropy, float coef_entropy) {
  return coef * -expm1f(logp) - coef_entropy * expf(logp) * (fmaxf(logp, kLeastLogP) + entropy);
}

}  // namespace fastdpo
