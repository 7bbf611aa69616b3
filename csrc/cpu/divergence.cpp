// A token's divergence and routing from the sums of its blocks. Compiled once: little of the time is spent here.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/folds.h"
#include "cpu/parallel.h"
#include "shared/row_formulas.h"

namespace fastdpo {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

const BlockDivergence* blocks_of_row(const DivergenceFinishArgs& a, int64_t row) {
  return reinterpret_cast<const BlockDivergence*>(a.blocks + row * a.blocks_stride);
}

template <class Function>
void each_row(const DivergenceFinishArgs& a, Function function) {
  const int64_t grain = std::max<int64_t>(1, 512 / std::max<int64_t>(a.num_blocks, 1));
  parallel_for(a.num_rows, grain, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) function(row);
  });
}

LabelLogp of_label(const DivergenceFinishArgs& a, int64_t row, double BlockDivergence::*lse, float label_logit) {
  const BlockDivergence* blocks = blocks_of_row(a, row);
  double top = kNone, total = 0.0;
  for (int64_t i = 0; i < a.num_blocks; ++i) top = std::fmax(top, blocks[i].*lse);
  const double m = top == kNone ? 0.0 : top;
  for (int64_t i = 0; i < a.num_blocks; ++i) total += std::exp(blocks[i].*lse - m);
  return label_logp(m + std::log(total), 0.0, label_logit);
}

// What a block, or the label, adds to the KL divergence of `a` from `b`, whose mean log ratio inside of it is `inside`.
double kl(double log_a, double log_b, double inside) { return weighted_term(std::exp(log_a), log_a - log_b + inside); }

void finish_row(const DivergenceFinishArgs& a, int64_t row) {
  const BlockDivergence* blocks = blocks_of_row(a, row);
  const auto kind = static_cast<DivergenceKind>(a.kind);
  const double lse = a.lse[row], ref_lse = a.ref_lse[row], logp = a.logps[row], ref_logp = a.ref_logps[row];
  double divergence = 0.0, mean = 0.0;
  if (kind == DivergenceKind::kForwardKL) {
    divergence = kl(ref_logp, logp, 0.0);
    for (int64_t i = 0; i < a.num_blocks; ++i)
      divergence += kl(blocks[i].ref_lse - ref_lse, blocks[i].lse - lse, -blocks[i].mean_r);
  } else if (kind == DivergenceKind::kReverseKL) {
    divergence = kl(logp, ref_logp, 0.0);
    for (int64_t i = 0; i < a.num_blocks; ++i)
      divergence += kl(blocks[i].lse - lse, blocks[i].ref_lse - ref_lse, blocks[i].mean_p);
    mean = divergence;
  } else {
    const double p = std::exp(logp), r = std::exp(ref_logp), log_m = std::log((1 - a.beta) * p + a.beta * r);
    mean = weighted_term(p, logp - log_m);
    divergence = (1 - a.beta) * mean + a.beta * weighted_term(r, ref_logp - log_m);
    for (int64_t i = 0; i < a.num_blocks; ++i) {
      mean += weighted_term(std::exp(blocks[i].lse - lse), blocks[i].mean_p);
      divergence += blocks[i].mean_r;
    }
  }
  if (a.divergence) a.divergence[row] = static_cast<float>(divergence);
  if (a.mean) a.mean[row] = static_cast<float>(mean);
  if (a.entropy) {
    double entropy = -weighted_term(std::exp(logp), logp);
    for (int64_t i = 0; i < a.num_blocks; ++i) {
      const double log_p = blocks[i].lse - lse;
      entropy += weighted_term(std::exp(log_p), blocks[i].entropy - log_p);
    }
    a.entropy[row] = static_cast<float>(entropy);
  }
  if (!a.total) return;
  double* bound = a.log_share + row * a.log_share_stride;
  double total = 0.0;
  for (int64_t i = 0; i < a.num_blocks; ++i) {
    const BlockDivergence& b = blocks[i];
    const double log_p = b.lse - lse, log_r = b.ref_lse - ref_lse, p = std::exp(log_p), r = std::exp(log_r);
    const double outside = kind == DivergenceKind::kJSD ? -mean : log_p - log_r - mean;
    const double square_p = weighted_term(p, b.var_p + (b.mean_p + outside) * (b.mean_p + outside));
    const double square_r = weighted_term(r, b.var_r + (b.mean_r + outside) * (b.mean_r + outside));
    bound[i] = divergence_bound(kind, p, r, square_p, square_r);
    total += bound[i];
  }
  a.total[row] = static_cast<float>(total);
  const double log_rest = std::log(-std::expm1(logp));
  for (int64_t i = 0; i < a.num_blocks; ++i) {
    double share = total == 0.0 ? kNone : std::log(bound[i] / total);
    if (a.routes_logps && !(share >= blocks[i].lse - lse - log_rest)) share = blocks[i].lse - lse - log_rest;
    bound[i] = share;
  }
}

}  // namespace

void divergence_lse(const DivergenceFinishArgs& a) {
  each_row(a, [&](int64_t row) {
    const LabelLogp p = of_label(a, row, &BlockDivergence::lse, a.label_logit[row]);
    const LabelLogp r = of_label(a, row, &BlockDivergence::ref_lse, a.ref_label_logit[row]);
    a.lse[row] = p.lse, a.ref_lse[row] = r.lse, a.logps[row] = p.logp, a.ref_logps[row] = r.logp;
  });
}

void divergence_finish(const DivergenceFinishArgs& a) {
  each_row(a, [&](int64_t row) { finish_row(a, row); });
}

}  // namespace fastdpo
