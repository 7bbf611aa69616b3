// Four log-probs per preference pair -> the weighted sum of some losses and its four partial derivatives.
#pragma once

#include <cstdint>

#include "preference_loss.h"

namespace fastdpo {

template <class T>
struct PreferenceArgs {
  const T* chosen;  // [B], as every array but `partials`
  const T* rejected;
  const T* ref_chosen;  // or null: zeros, the loss is reference-free
  const T* ref_rejected;
  const int64_t* chosen_lengths;  // completion tokens; or null where no loss needs them; less than 1 counts as 1
  const int64_t* rejected_lengths;
  T* losses;
  T* partials;  // [4, B]: d losses[i] / d (chosen, rejected, ref_chosen, ref_rejected)[i]
  int64_t batch_size;
  const PreferenceLoss* losses_used;  // [num_losses]
  const double* loss_weights;         // [num_losses]
  int64_t num_losses;
  PreferenceOptions options;
};

// Computed in double whatever T. A finite result beyond T's range is stored as T's largest finite value.
void preference_loss_cpu(const PreferenceArgs<float>& args);
void preference_loss_cpu(const PreferenceArgs<double>& args);

}  // namespace fastdpo
