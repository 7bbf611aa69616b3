// RowStats from a block of logits to a token's statistics: with its member and its output in structs.h, all that one
// more statistic is on the CPU. Folding is compiled once per instruction set, finishing once.
#pragma once

#include <cmath>

#include "shared/row_formulas.h"
#include "structs.h"

namespace fastdpo {

#ifdef FASTDPO_ISA
namespace FASTDPO_ISA {

// Every logit of a block of `cols`, the label's too.
inline void add_logits(RowStats& row, const float* z, int64_t cols) {
  float total = 0.0f;
  if (cols == kBlock) {
    Vec t{};
    for (int64_t i = 0; i < kBlock; i += kLanes) t += load(z + i);
    total = sum(t);
  } else {
    for (int64_t i = 0; i < cols; ++i) total += z[i];
  }
  row.sum_z += total;
}

// The same block with -inf in the place of the label, `label` columns from its start or outside of it, and its largest.
inline void add_maxima(RowStats& row, const float* z, int64_t cols, int64_t label, float block_max) {
  if (label >= 0 && label < cols) {
    for (int64_t i = 0; i < cols; ++i) {
      double& side = i < label ? row.max_before : row.max_after;
      side = std::fmax(side, static_cast<double>(z[i]));
    }
  } else {
    double& side = label > 0 ? row.max_before : row.max_after;
    side = std::fmax(side, static_cast<double>(block_max));
  }
}

// And its sums of e = exp(z - block_max), of e (z - block_max) and of e^2.
inline void add_sums(RowStats& row, float block_max, float block_sum, float sum_z, float squares) {
  if (block_sum == 0.0f) return;  // every logit is -inf
  const double m = std::fmax(row.max, static_cast<double>(block_max));
  const double old_scale = row.sum_exp == 0.0 ? 0.0 : std::exp(row.max - m);
  const double new_scale = std::exp(block_max - m);
  const double old_shift = row.sum_exp == 0.0 ? 0.0 : row.max - m;
  row.sum_exp_z = old_scale * (row.sum_exp_z + row.sum_exp * old_shift) +
                  new_scale * (static_cast<double>(sum_z) + static_cast<double>(block_sum) * (block_max - m));
  row.sum_exp_sq = old_scale * old_scale * row.sum_exp_sq + new_scale * new_scale * squares;
  row.sum_exp = old_scale * row.sum_exp + new_scale * block_sum;
  row.max = m;
}

}  // namespace FASTDPO_ISA
#else

inline void finish_stats(const FinishArgs& a, int64_t row) {
  const RowStats& s = a.stats[row];
  const double label_logit = a.label_logit[row], log_sum = std::log(s.sum_exp);
  const LabelLogp label = label_logp(s.max, log_sum, label_logit);
  if (a.entropy) a.entropy[row] = static_cast<float>(row_entropy(label, log_sum, s.sum_exp_z / s.sum_exp));
  if (a.log_sum_sq_probs) {
    const double p = std::exp(label.logp);
    const double scale = s.sum_exp == 0.0 ? 0.0 : std::exp(label.rest_logp) / s.sum_exp;  // exp(z - max) -> p
    a.log_sum_sq_probs[row] = static_cast<float>(std::log(scale * scale * s.sum_exp_sq + p * p));
  }
  if (a.mean_logit) a.mean_logit[row] = static_cast<float>(s.sum_z / a.vocab_size);
  // argmax returns the first maximum: a tie counts only when the label comes first
  if (a.is_top1) a.is_top1[row] = label_logit > s.max_before && label_logit >= s.max_after;
}

#endif
}  // namespace fastdpo
