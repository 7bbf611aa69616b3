// What crosses from Python for the preference losses of a batch, in structs.h's manner.
#pragma once

#include "shared/preference_loss.h"
#include "structs.h"

#define NAMED(...) #__VA_ARGS__, __VA_ARGS__

namespace fastdpo {

constexpr int kMaxTerms = 24;

struct LossTerm {
  PreferenceLoss loss;
  double weight;
};

// Sequence i of side 0 is the i-th chosen one, of side 1 the i-th rejected one. Padded: [num_pairs, num_tokens] per
// side. Packed (`offsets`): num_tokens in all, sequence s = side * num_pairs + i at [offsets[s], offsets[s + 1]).
// One log-prob per sequence is num_tokens == 1 without labels.
template <class T>
struct PreferenceBatch {
  const T* logps[2];
  const T* ref[2];               // or null: zeros, the loss is reference-free
  const T* kl[2];                // KL(reference || policy), like `logps`; or null
  const T* log_sum_sq_probs[2];  // per token, for WPO's weights; or null
  const int64_t* labels[2];      // or null: every token counts
  const int64_t* lengths[2];     // [num_pairs], where there are no labels; or null: 1
  const void* offsets;           // [2 num_pairs + 1]; or null: padded
  const double* kto_kl;          // or null: the option's number
  int64_t label_stride;          // between padded rows of labels; the other arrays are contiguous
  int64_t ignore_index;
  int64_t num_pairs, num_tokens;
  bool offsets_are_int32, ref_per_token, average, reward_per_token, reward_with_kl;
  double ld_alpha;    // of tokens past the shorter length; negative: none
  double sft_weight;  // of -sum(chosen) / sum(tokens) over the batch, which has no expression per pair
  LossTerm terms[kMaxTerms];
  int num_terms;
  PreferenceOptions options;

  int64_t side_size() const { return offsets ? num_tokens : product_of(num_pairs, num_tokens); }
  int64_t ref_size() const { return ref_per_token ? side_size() : num_pairs; }

  // What both ways read; the rest is the forward's alone.
  template <class In> void layout_fields(In& in) {
    in.sizes(NAMED(num_pairs, num_tokens));
    in.numbers(NAMED(ignore_index, ref_per_token, average, ld_alpha, sft_weight));
    in.offsets(2 * num_pairs + 1, NAMED(offsets), offsets_are_int32);
    in.pair_of_rows(NAMED(labels), label_stride, offsets ? num_tokens : num_pairs, offsets ? 1 : num_tokens);
    in.require(!offsets || !labels[0] || num_tokens <= 1 || label_stride == 1, "packed labels are side by side");
  }
  template <class In> void fields(In& in) {
    layout_fields(in);
    in.pairs(side_size(), NAMED(logps, kl, log_sum_sq_probs));
    in.require(side_size() == 0 || (logps[0] && logps[1]), "logps of both sides are needed");
    in.require(!log_sum_sq_probs[0] == !log_sum_sq_probs[1], "log_sum_sq_probs are of both sides");
    in.pairs(ref_size(), NAMED(ref));
    in.pairs(num_pairs, NAMED(lengths));
    in.optional(1, NAMED(kto_kl));
    in.numbers(NAMED(reward_per_token, reward_with_kl));
    in.terms(NAMED(terms), num_terms);
    in.options(NAMED(options));
  }
};

struct PairSums {
  double policy[2], ref[2], kl[2];  // as the loss reads them
  double plain_chosen;              // without weights, for sft
  double weight;                    // WPO's
  int64_t tokens[2];
};

constexpr int kPartials = kPreferenceInputs + 1;

template <class T>
struct PreferenceResults {
  PairSums* sums;     // [num_pairs] scratch
  int32_t* finished;  // [1] scratch of a GPU
  T* loss;            // [1]
  T* losses;          // [num_pairs], as the six below
  T* rewards[2];
  T* logps[2];
  double* partials;  // [kPartials, num_pairs]: d losses[i] / d (both of policy, ref and kl; the plain sums)
};

// From log-probs to the loss.
template <class T>
struct PreferenceForwardArgs {
  PreferenceBatch<T> batch;
  PreferenceResults<T> out;

  template <class In> void fields(In& in) {
    batch.fields(in);
    in.arrays(batch.num_pairs, "sums, losses", out.sums, out.losses);
    in.arrays(kPartials * batch.num_pairs, "partials", out.partials);
    in.arrays(1, "loss, finished", out.loss, out.finished);
    in.pairs(batch.num_pairs, "rewards, out_logps", out.rewards, out.logps);
    const bool both = out.rewards[0] && out.rewards[1] && out.logps[0] && out.logps[1];
    in.require(batch.num_pairs == 0 || (both && out.rewards[0] != out.rewards[1] && out.logps[0] != out.logps[1]),
               "results of both sides are needed");
  }
};

template <class T>
struct PreferenceUpstream {
  const double* partials;
  const PairSums* sums;
  const T* dloss;      // [1], or null as the three below
  const T* dlosses;    // [num_pairs]
  const T* dlogps[2];  // [num_pairs], of PreferenceResults::logps
  T* dtokens[2];       // like `logps`, or null as dref
  T* dref[2];          // like `ref`
  T* dkl[2];           // like `logps`
};

// And back.
template <class T>
struct PreferenceBackwardArgs {
  PreferenceBatch<T> batch;
  PreferenceUpstream<T> up;

  template <class In> void fields(In& in) {
    batch.layout_fields(in);
    in.arrays(batch.num_pairs, "sums", up.sums);
    in.arrays(kPartials * batch.num_pairs, "partials", up.partials);
    in.optional(1, "dloss", up.dloss);
    in.optional(batch.num_pairs, "dlosses", up.dlosses);
    in.pairs(batch.num_pairs, "dlogps", up.dlogps);
    in.pairs(batch.side_size(), "dtokens, dkl", up.dtokens, up.dkl);
    in.pairs(batch.ref_size(), "dref", up.dref);
    const auto apart = [](auto* const(&sides)[2]) { return !sides[0] || sides[0] != sides[1]; };
    in.require((batch.offsets || (apart(up.dtokens) && apart(up.dkl))) &&
                   ((batch.offsets && batch.ref_per_token) || apart(up.dref)),
               "gradients of both sides are in one place");
  }
};

}  // namespace fastdpo

#undef NAMED
