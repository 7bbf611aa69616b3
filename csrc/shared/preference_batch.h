// From per-token log-probs to the preference loss of a batch and back. cuda/preference.cu does each way in one launch,
// cpu/preference.cpp lane by lane; both from the functions here. All sums are fp64.
//
//   walk_pair      kLanes lanes, each with a stretch of the tokens of both sequences -> the pair's PairSums
//   finish_batch   kLanes lanes, each with every kLanes-th pair: PairSums -> losses, rewards, partial derivatives
//   spread_pair    upstream gradients -> one coefficient per token
//
// A Machine runs the lanes: `each` calls a function with every lane, `Local` is a value of each, and `sum` adds them up
// in one fixed tree, so that results depend neither on the machine nor on a launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "preference_structs.h"

namespace fastdpo {

constexpr int kLanes = 256;
// A finite result beyond T's range is stored as T's largest finite value.
template <class T>
FASTDPO_HD inline T saturated(double x) {
  const double limit = sizeof(T) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308;
  return static_cast<T>(x > limit && x != INFINITY ? limit : x < -limit && x != -INFINITY ? -limit : x);
}

struct Span {
  int64_t begin, end;
};

// Offsets that a caller cannot have checked: clamped into the array, and never decreasing.
template <class T>
FASTDPO_HD inline int64_t offset_up_to(const PreferenceBatch<T>& a, int64_t last) {
  int64_t largest = 0;
  for (int64_t s = 0; s <= last; ++s) {
    const int64_t x = a.offsets_are_int32 ? static_cast<const int32_t*>(a.offsets)[s]
                                          : static_cast<const int64_t*>(a.offsets)[s];
    largest = x > largest ? x : largest;
  }
  return largest < a.num_tokens ? largest : a.num_tokens;
}

// Where a side's pointers hold the sequence.
template <class T>
FASTDPO_HD inline Span sequence_span(const PreferenceBatch<T>& a, int side, int64_t pair) {
  if (a.offsets == nullptr) return {pair * a.num_tokens, (pair + 1) * a.num_tokens};
  const int64_t s = side * a.num_pairs + pair;
  return {offset_up_to(a, s), offset_up_to(a, s + 1)};
}

// A lane's stretch of it.
FASTDPO_HD inline Span stretch(Span whole, int lane) {
  const int64_t size = (whole.end - whole.begin + kLanes - 1) / kLanes;
  const int64_t begin = whole.begin + lane * size, end = begin + size;
  return {begin < whole.end ? begin : whole.end, end < whole.end ? end : whole.end};
}

template <class T>
FASTDPO_HD inline bool counts(const PreferenceBatch<T>& a, int side, int64_t pair, int64_t at) {
  if (a.labels[side] == nullptr) return true;
  const int64_t place = a.offsets != nullptr ? at : at + pair * (a.label_stride - a.num_tokens);
  return a.labels[side][place] != a.ignore_index;
}

template <class T>
FASTDPO_HD inline int64_t count_tokens(const PreferenceBatch<T>& a, int side, int64_t pair, Span mine) {
  int64_t tokens = 0;
  for (int64_t at = mine.begin; at < mine.end; ++at) tokens += counts(a, side, pair, at);
  return tokens;
}

// What the loss reads of a sequence is sum_t scale * (t is within the shared length ? 1 : alpha) * logps[t].
template <class T>
FASTDPO_HD inline double token_scale(const PreferenceBatch<T>& a, int64_t tokens) {
  return a.average && tokens > 1 ? 1.0 / static_cast<double>(tokens) : 1.0;
}

struct LaneSums {
  double policy, ref, kl, plain, agreement;
};

// A lane's part of the sums of a side; `before` completion tokens of the sequence lie left of its stretch.
template <class T>
FASTDPO_HD inline LaneSums sum_tokens(const PreferenceBatch<T>& a, int side, int64_t pair, Span mine, int64_t before,
                                      int64_t shared) {
  LaneSums sums = {};
  for (int64_t at = mine.begin; at < mine.end; ++at) {
    if (!counts(a, side, pair, at)) continue;
    const double logp = a.logps[side][at];
    ++before;
    sums.plain += logp;
    if (a.log_sum_sq_probs[side] != nullptr) sums.agreement += logp - a.log_sum_sq_probs[side][at];
    const double weight = a.ld_alpha < 0.0 || before <= shared ? 1.0 : a.ld_alpha;
    if (weight == 0.0) continue;  // a tail that is left out must not bring its NaN along
    sums.policy += weight * logp;
    if (a.ref_per_token && a.ref[side] != nullptr) sums.ref += weight * a.ref[side][at];
    if (a.kl[side] != nullptr) sums.kl += weight * a.kl[side][at];
  }
  return sums;
}

template <class Machine, class T>
using Local = typename Machine::template Local<T>;

// How many completion tokens each side has, and how many of them lie left of a lane's stretch.
template <class Machine>
struct PairTokens {
  int64_t tokens[2], shared;
  Local<Machine, int64_t> before[2];
};

template <class T, class Machine>
FASTDPO_HD inline void count_pair(const PreferenceBatch<T>& a, int64_t pair, const Span (&whole)[2], Machine& machine,
                                  PairTokens<Machine>* n) {
  FASTDPO_UNROLL
  for (int side = 0; side < 2; ++side) {
    if (a.labels[side] == nullptr) {
      n->tokens[side] = a.lengths[side] != nullptr ? a.lengths[side][pair] : 1;
      machine.each([&](int lane) { n->before[side][lane] = 0; });
    } else {
      Local<Machine, int64_t> mine;
      machine.each([&](int lane) { mine[lane] = count_tokens(a, side, pair, stretch(whole[side], lane)); });
      n->tokens[side] = machine.count(mine, &n->before[side]);
    }
  }
  n->shared = n->tokens[0] < n->tokens[1] ? n->tokens[0] : n->tokens[1];
}

template <class T, class Machine>
FASTDPO_HD inline void walk_pair(const PreferenceBatch<T>& a, int64_t pair, Machine& machine, PairSums* out) {
  const Span whole[2] = {sequence_span(a, 0, pair), sequence_span(a, 1, pair)};
  PairTokens<Machine> n = {};
  count_pair(a, pair, whole, machine, &n);
  PairSums sums = {};
  double agreement = 0.0;  // of both sides: mean(logp - log sum p^2), since WPO's weights multiply
  FASTDPO_UNROLL
  for (int side = 0; side < 2; ++side) {
    Local<Machine, LaneSums> part;
    machine.each([&](int lane) {
      part[lane] = sum_tokens(a, side, pair, stretch(whole[side], lane), n.before[side][lane], n.shared);
    });
    const double scale = token_scale(a, n.tokens[side]);
    sums.tokens[side] = n.tokens[side];
    sums.policy[side] = scale * machine.sum(part, &LaneSums::policy);
    if (a.ref[side] != nullptr) {
      sums.ref[side] = a.ref_per_token ? scale * machine.sum(part, &LaneSums::ref) : static_cast<double>(a.ref[side][pair]);
    }
    if (a.kl[side] != nullptr) sums.kl[side] = scale * machine.sum(part, &LaneSums::kl);
    if (side == 0 && a.sft_weight != 0.0) sums.plain_chosen = machine.sum(part, &LaneSums::plain);
    if (a.log_sum_sq_probs[side] != nullptr) {
      const double tokens = n.tokens[side] > 1 ? static_cast<double>(n.tokens[side]) : 1.0;
      agreement += machine.sum(part, &LaneSums::agreement) / tokens;
    }
  }
  sums.weight = ::exp(agreement);
  if (machine.is_first()) *out = sums;
}

// The losses of one pair, whose rows share the term `sft`; `per_plain` is its derivative by any row's plain sum.
template <class T>
FASTDPO_HD inline void finish_pair(const PreferenceBatch<T>& a, int64_t i, const PreferenceOptions& options, double sft,
                                   double per_plain, const PreferenceResults<T>& out) {
  using D = PreferenceDual<double>;
  const PairSums& sums = out.sums[i];
  double lengths[2];
  FASTDPO_UNROLL
  for (int side = 0; side < 2; ++side) lengths[side] = sums.tokens[side] > 1 ? static_cast<double>(sums.tokens[side]) : 1.0;
  const PreferenceInputs<double> in = {
      D::input(sums.policy[0], 0), D::input(sums.policy[1], 1), D::input(sums.ref[0], 2), D::input(sums.ref[1], 3),
      D::input(sums.kl[0], 4),     D::input(sums.kl[1], 5),     lengths[0],               lengths[1]};
  D loss(sft);
  for (int term = 0; term < a.num_terms; ++term) {
    loss = loss + a.terms[term].weight * preference_loss(a.terms[term].loss, in, options);
  }
  const double weight = a.log_sum_sq_probs[0] != nullptr ? sums.weight : 1.0;
  out.losses[i] = saturated<T>(weight * loss.value);
  for (int k = 0; k < kPreferenceInputs; ++k) out.partials[k * a.num_pairs + i] = weight * loss.tangent[k];
  out.partials[kPreferenceInputs * a.num_pairs + i] = weight * per_plain;
  FASTDPO_UNROLL
  for (int side = 0; side < 2; ++side) {
    const double logp = sums.policy[side], ratio = logp - sums.ref[side] + (a.reward_with_kl ? sums.kl[side] : 0.0);
    out.rewards[side][i] = static_cast<T>(options.beta * (a.reward_per_token ? logp / lengths[side] : ratio));
    out.logps[side][i] = saturated<T>(logp);
  }
}

// Every pair's losses, and their mean.
template <class T, class Machine>
FASTDPO_HD inline void finish_batch(const PreferenceBatch<T>& a, Machine& machine, const PreferenceResults<T>& out) {
  double sft = 0.0, per_plain = 0.0;
  if (a.sft_weight != 0.0) {
    Local<Machine, double> logps;
    Local<Machine, int64_t> tokens, before;
    machine.each([&](int lane) {
      logps[lane] = 0.0;
      tokens[lane] = 0;
      for (int64_t i = lane; i < a.num_pairs; i += kLanes) {
        logps[lane] += out.sums[i].plain_chosen;
        tokens[lane] += out.sums[i].tokens[0];
      }
    });
    const int64_t all = machine.count(tokens, &before);
    per_plain = -a.sft_weight / static_cast<double>(all > 1 ? all : 1);
    sft = per_plain * machine.sum(logps);
  }
  PreferenceOptions options = a.options;
  if (a.kto_kl != nullptr) options.kto_kl = *a.kto_kl;
  Local<Machine, double> total;
  machine.each([&](int lane) {
    total[lane] = 0.0;
    for (int64_t i = lane; i < a.num_pairs; i += kLanes) {
      finish_pair(a, i, options, sft, per_plain, out);
      total[lane] += out.losses[i];
    }
  });
  const double sum = machine.sum(total);
  if (machine.is_first()) *out.loss = saturated<T>(sum / static_cast<double>(a.num_pairs));
}

// dL / d losses[i], from both outputs it enters.
template <class T>
FASTDPO_HD inline double loss_gradient(const PreferenceBatch<T>& a, const PreferenceUpstream<T>& up, int64_t i) {
  const double of_mean = up.dloss != nullptr ? *up.dloss / static_cast<double>(a.num_pairs) : 0.0;
  return of_mean + (up.dlosses != nullptr ? static_cast<double>(up.dlosses[i]) : 0.0);
}

// 0 * Inf is no gradient: where nothing asks for a loss, its derivative does not matter.
FASTDPO_HD inline double times(double upstream, double partial) { return upstream == 0.0 ? 0.0 : upstream * partial; }

template <class T, class Machine>
FASTDPO_HD inline void spread_pair(const PreferenceBatch<T>& a, const PreferenceUpstream<T>& up, int64_t pair,
                                   Machine& machine) {
  const Span whole[2] = {sequence_span(a, 0, pair), sequence_span(a, 1, pair)};
  PairTokens<Machine> n = {};
  if (a.ld_alpha >= 0.0) {
    count_pair(a, pair, whole, machine, &n);
  } else {
    FASTDPO_UNROLL
    for (int side = 0; side < 2; ++side) n.tokens[side] = up.sums[pair].tokens[side];
  }
  double plain = 0.0;  // the same for every chosen token of the batch
  if (a.sft_weight != 0.0) {
    Local<Machine, double> part;
    machine.each([&](int lane) {
      part[lane] = 0.0;
      for (int64_t i = lane; i < a.num_pairs; i += kLanes) {
        part[lane] += times(loss_gradient(a, up, i), up.partials[kPreferenceInputs * a.num_pairs + i]);
      }
    });
    plain = machine.sum(part);
  }
  const double dloss = loss_gradient(a, up, pair);
  FASTDPO_UNROLL
  for (int side = 0; side < 2; ++side) {
    double policy = times(dloss, up.partials[side * a.num_pairs + pair]);
    const double ref = times(dloss, up.partials[(2 + side) * a.num_pairs + pair]);
    const double kl = times(dloss, up.partials[(4 + side) * a.num_pairs + pair]);
    if (up.dlogps[side] != nullptr) policy += up.dlogps[side][pair];
    const double scale = token_scale(a, n.tokens[side]), sft = side == 0 ? plain : 0.0;
    T *dtokens = up.dtokens[side], *dref = up.dref[side], *dkl = up.dkl[side];
    machine.each([&](int lane) {
      const bool any = dtokens != nullptr || dkl != nullptr || (dref != nullptr && a.ref_per_token);
      const Span mine = any ? stretch(whole[side], lane) : Span{0, 0};
      int64_t place = a.ld_alpha >= 0.0 ? n.before[side][lane] : 0;
      for (int64_t at = mine.begin; at < mine.end; ++at) {
        const bool counted = counts(a, side, pair, at);
        place += counted;
        const double weight = a.ld_alpha < 0.0 || place <= n.shared ? scale : scale * a.ld_alpha;
        if (dtokens != nullptr) dtokens[at] = saturated<T>(counted ? times(weight, policy) + sft : 0.0);
        if (dref != nullptr && a.ref_per_token) dref[at] = saturated<T>(counted ? times(weight, ref) : 0.0);
        if (dkl != nullptr) dkl[at] = saturated<T>(counted ? times(weight, kl) : 0.0);
      }
      if (dref != nullptr && !a.ref_per_token && lane == 0) dref[pair] = saturated<T>(ref);
      // Rows of a packed array that no sequence has, before the first and after the last, have no gradient.
      if (a.offsets == nullptr) return;
      const bool is_first = side == 0 && pair == 0, is_last = side == 1 && pair == a.num_pairs - 1;
      const Span gaps[2] = {{0, is_first ? whole[side].begin : 0}, {whole[side].end, is_last ? a.num_tokens : 0}};
      for (const Span& gap : gaps) {
        for (int64_t at = gap.begin + lane; at < gap.end; at += kLanes) {
          if (dtokens != nullptr) dtokens[at] = T(0);
          if (dref != nullptr && a.ref_per_token) dref[at] = T(0);
          if (dkl != nullptr) dkl[at] = T(0);
        }
      }
    });
  }
}

void host_preference_forward(const PreferenceBatch<float>&, const PreferenceResults<float>&);
void host_preference_forward(const PreferenceBatch<double>&, const PreferenceResults<double>&);
void host_preference_backward(const PreferenceBatch<float>&, const PreferenceUpstream<float>&);
void host_preference_backward(const PreferenceBatch<double>&, const PreferenceUpstream<double>&);

#ifdef FASTDPO_HAVE_CUDA
// Return the cudaError of the launch, 0 for none. Nothing is allocated and nothing waits.
int launch_preference_forward(const PreferenceBatch<float>&, const PreferenceResults<float>&, int device, void* stream);
int launch_preference_backward(const PreferenceBatch<float>&, const PreferenceUpstream<float>&, int device, void* stream);
#endif

}  // namespace fastdpo
