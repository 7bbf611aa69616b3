// The only file that knows Python. Pointers arrive as integers (tensor.data_ptr(), 0 for none); the callers in
// fastdpo/ops keep the tensors alive and have checked shapes and types. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu/folds.h"
#include "cuda/logits.h"
#include "cpu/parallel.h"
#include "shared/preference_batch.h"

namespace py = pybind11;
using fastdpo::DType;
using Address = std::uintptr_t;

namespace {

template <class T>
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

struct PyTile {
  fastdpo::Tile tile;
};

PyTile make_tile(Address data, int64_t stride, int64_t num_rows, int64_t num_cols, int64_t col_start, Address bias,
                 float scale, float softcap, float inv_temperature) {
  return {{ptr<float>(data), stride, num_rows, num_cols, col_start, ptr<const float>(bias),
           {scale, softcap, inv_temperature}}};
}

fastdpo::GradArgs grad_args(const PyTile& tile, Address tokens, Address labels, Address lse, Address logps,
                            Address coef, Address entropy, Address coef_entropy) {
  return {tile.tile,
          ptr<const int32_t>(tokens),
          ptr<const int64_t>(labels),
          ptr<const float>(lse),
          ptr<const float>(logps),
          ptr<const float>(coef),
          ptr<const float>(entropy),
          ptr<const float>(coef_entropy)};
}

// The fields of the struct in order, then the type, then what `call` takes besides: a device and a stream, or lanes.
template <class Result, class... Extra>
void def_logits_forward(py::module_& m, const char* name,
                        Result (*call)(const fastdpo::LogitsForwardArgs&, DType, Extra...)) {
  m.def(
      name,
      [call](Address logits, int64_t logits_stride, int64_t num_rows, int64_t vocab_size, Address labels,
             Address logps, Address lse, Address entropy, float inv_temperature, int64_t splits, Address partials,
             int dtype, Extra... extra) {
        return call(fastdpo::LogitsForwardArgs{ptr<const void>(logits), logits_stride, num_rows, vocab_size,
                                               ptr<const int64_t>(labels), ptr<float>(logps), ptr<float>(lse),
                                               ptr<float>(entropy), inv_temperature, splits, ptr<float>(partials)},
                    static_cast<DType>(dtype), extra...);
      },
      py::call_guard<py::gil_scoped_release>());
}

template <class Result, class... Extra>
void def_logits_backward(py::module_& m, const char* name,
                         Result (*call)(const fastdpo::LogitsBackwardArgs&, DType, Extra...)) {
  m.def(
      name,
      [call](Address logits, int64_t logits_stride, int64_t num_rows, int64_t vocab_size, Address labels,
             Address logps, Address lse, Address coef, Address entropy, Address coef_entropy, Address dlogits,
             int64_t dlogits_stride, float inv_temperature, int64_t splits, int dtype, Extra... extra) {
        return call(fastdpo::LogitsBackwardArgs{ptr<const void>(logits), logits_stride, num_rows, vocab_size,
                                                ptr<const int64_t>(labels), ptr<const float>(logps),
                                                ptr<const float>(lse), ptr<const float>(coef),
                                                ptr<const float>(entropy), ptr<const float>(coef_entropy),
                                                ptr<void>(dlogits), dlogits_stride, inv_temperature, splits},
                    static_cast<DType>(dtype), extra...);
      },
      py::call_guard<py::gil_scoped_release>());
}

#ifdef FASTDPO_HAVE_CUDA
// A stream comes as an integer too.
int launch_logits_forward(const fastdpo::LogitsForwardArgs& a, DType dtype, int device, Address stream) {
  return fastdpo::launch_logits_forward(a, dtype, device, ptr<void>(stream));
}
int launch_logits_backward(const fastdpo::LogitsBackwardArgs& a, DType dtype, int device, Address stream) {
  return fastdpo::launch_logits_backward(a, dtype, device, ptr<void>(stream));
}
#endif

// One of the two, by `is_double`.
struct PyPreferenceBatch {
  bool is_double;
  fastdpo::PreferenceBatch<float> as_float;
  fastdpo::PreferenceBatch<double> as_double;
};

using Pair = std::array<Address, 2>;  // of the chosen side and the rejected one

template <class T>
void set_pair(T* (&to)[2], const Pair& from) {
  for (int side = 0; side < 2; ++side) to[side] = ptr<T>(from[side]);
}

template <class T>
void fill_batch(fastdpo::PreferenceBatch<T>& a, const Pair& logps, const Pair& ref, const Pair& log_sum_sq_probs,
                const Pair& labels, const Pair& lengths, Address offsets, bool offsets_are_int32, Address kto_kl,
                int64_t label_stride, int64_t ignore_index, int64_t num_pairs, int64_t num_tokens, bool ref_per_token,
                bool average, bool reward_per_token, double ld_alpha, double sft_weight,
                const std::vector<int>& loss_ids, const std::vector<double>& loss_weights, int divergence,
                const std::vector<double>& options) {
  if (loss_ids.size() != loss_weights.size() || loss_ids.size() > fastdpo::kMaxTerms ||
      options.size() != std::size(fastdpo::kPreferenceOptionFields)) {
    throw std::invalid_argument("PreferenceBatch: wrong number of losses, weights or options");
  }
  set_pair(a.logps, logps);
  set_pair(a.ref, ref);
  set_pair(a.log_sum_sq_probs, log_sum_sq_probs);
  set_pair(a.labels, labels);
  set_pair(a.lengths, lengths);
  a.offsets = ptr<const void>(offsets);
  a.offsets_are_int32 = offsets_are_int32;
  a.kto_kl = ptr<const double>(kto_kl);
  a.label_stride = label_stride;
  a.ignore_index = ignore_index;
  a.num_pairs = num_pairs;
  a.num_tokens = num_tokens;
  a.ref_per_token = ref_per_token;
  a.average = average;
  a.reward_per_token = reward_per_token;
  a.ld_alpha = ld_alpha;
  a.sft_weight = sft_weight;
  a.num_terms = static_cast<int>(loss_ids.size());
  for (int i = 0; i < a.num_terms; ++i) {
    a.terms[i] = {static_cast<fastdpo::PreferenceLoss>(loss_ids[i]), loss_weights[i]};
  }
  a.options.divergence = static_cast<fastdpo::Divergence>(divergence);
  for (size_t i = 0; i < options.size(); ++i) {
    a.options.*(fastdpo::kPreferenceOptionFields[i].field) = options[i];
  }
}

template <class... Args>
PyPreferenceBatch make_batch(bool is_double, const Args&... args) {
  PyPreferenceBatch batch = {is_double, {}, {}};
  is_double ? fill_batch(batch.as_double, args...) : fill_batch(batch.as_float, args...);
  return batch;
}

template <class T>
fastdpo::PreferenceResults<T> preference_results(Address sums, Address finished, Address loss, Address losses,
                                                 const Pair& rewards, const Pair& logps, Address partials) {
  fastdpo::PreferenceResults<T> out = {ptr<fastdpo::PairSums>(sums), ptr<int32_t>(finished), ptr<T>(loss),
                                       ptr<T>(losses), {}, {}, ptr<double>(partials)};
  set_pair(out.rewards, rewards);
  set_pair(out.logps, logps);
  return out;
}

template <class T>
fastdpo::PreferenceUpstream<T> preference_upstream(Address partials, Address sums, Address dloss, Address dlosses,
                                                   const Pair& dlogps, const Pair& dtokens, const Pair& dref) {
  fastdpo::PreferenceUpstream<T> up = {ptr<const double>(partials), ptr<const fastdpo::PairSums>(sums),
                                       ptr<const T>(dloss), ptr<const T>(dlosses), {}, {}, {}};
  set_pair(up.dlogps, dlogps);
  set_pair(up.dtokens, dtokens);
  set_pair(up.dref, dref);
  return up;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastdpo's native kernels; see csrc/launch.h for what each argument means";
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.attr("BLOCK") = fastdpo::kBlock;
  m.attr("ROW_STATS_BYTES") = sizeof(fastdpo::RowStats);
  m.def("isa", [] { return fastdpo::cpu_kernels().isa; });
  m.def("supported_isas", &fastdpo::supported_isas);
  m.def("use_isa", &fastdpo::use_isa);
  m.def("parallel_backend", &fastdpo::parallel_backend);

  py::class_<PyTile>(m, "Tile").def(py::init(&make_tile), py::arg("data"), py::arg("stride"), py::arg("num_rows"),
                                    py::arg("num_cols"), py::arg("col_start"), py::arg("bias"), py::arg("scale"),
                                    py::arg("softcap"), py::arg("inv_temperature"));

  m.def(
      "init_stats",
      [](Address stats, int64_t num_rows) {
        const double inf = std::numeric_limits<double>::infinity();
        for (int64_t i = 0; i < num_rows; ++i) ptr<fastdpo::RowStats>(stats)[i] = {-inf, 0, 0, 0, 0, -inf, -inf};
      },
      nogil);

  m.def(
      "fold",
      [](const PyTile& tile, Address labels, Address block_lse, int64_t block_lse_stride, Address label_logit,
         Address stats, int num_threads) {
        fastdpo::fold({tile.tile, ptr<const int64_t>(labels), ptr<double>(block_lse), block_lse_stride,
                       ptr<float>(label_logit), ptr<fastdpo::RowStats>(stats)},
                      num_threads);
      },
      nogil);

  m.def(
      "sum_blocks",
      [](Address block_lse, int64_t num_rows, int64_t num_blocks, Address rest_lse, int num_threads) {
        fastdpo::sum_blocks(ptr<const double>(block_lse), num_rows, num_blocks, ptr<double>(rest_lse), num_threads);
      },
      nogil);

  m.def(
      "finish",
      [](int64_t num_rows, int64_t vocab_size, Address rest_lse, Address label_logit, Address stats, Address logps,
         Address lse, Address entropy, Address mean_logit, Address is_top1, Address log_sum_sq_probs,
         int num_threads) {
        fastdpo::finish({num_rows, vocab_size, ptr<const double>(rest_lse), ptr<const float>(label_logit),
                         ptr<const fastdpo::RowStats>(stats), ptr<float>(logps), ptr<float>(lse), ptr<float>(entropy),
                         ptr<float>(mean_logit), ptr<uint8_t>(is_top1), ptr<float>(log_sum_sq_probs)},
                        num_threads);
      },
      nogil);

  m.def(
      "route",
      [](int64_t num_rows, int64_t num_blocks, int64_t first_row, Address block_lse, Address rest_lse, Address labels,
         float tau, float second_tau, uint64_t seed, Address before, Address sums, Address bitmap,
         int64_t bitmap_stride, int64_t set_bytes, Address most_pairs, int num_threads) {
        fastdpo::route({num_rows, num_blocks, first_row, ptr<const double>(block_lse), ptr<const double>(rest_lse),
                        ptr<const int64_t>(labels), tau, second_tau, seed, ptr<const int64_t>(before),
                        ptr<int64_t>(sums), ptr<uint8_t>(bitmap), bitmap_stride, set_bytes, ptr<int32_t>(most_pairs)},
                       num_threads);
      },
      py::kw_only(), py::arg("num_rows"), py::arg("num_blocks"), py::arg("first_row"), py::arg("block_lse"),
      py::arg("rest_lse"), py::arg("labels"), py::arg("tau"), py::arg("second_tau"), py::arg("seed"),
      py::arg("before"), py::arg("sums"), py::arg("bitmap"), py::arg("bitmap_stride"), py::arg("set_bytes"),
      py::arg("most_pairs"), py::arg("num_threads"), nogil);

  m.def(
      "grad",
      [](const PyTile& tile, Address labels, Address lse, Address logps, Address coef, Address entropy,
         Address coef_entropy, int num_threads) {
        fastdpo::grad(grad_args(tile, 0, labels, lse, logps, coef, entropy, coef_entropy), num_threads);
      },
      nogil);

  m.def(
      "routed_grad",
      [](const PyTile& tile, Address tokens, Address labels, Address lse, Address logps, Address coef, float tau,
         float second_tau, Address second_bits, int64_t bitmap_stride, int second_bit, int hidden_set, int weight_set,
         Address row_weight, Address dz_hidden, Address hidden_tokens, int num_threads) {
        return fastdpo::routed_grad({grad_args(tile, tokens, labels, lse, logps, coef, 0, 0), tau, second_tau,
                                     ptr<const uint8_t>(second_bits), bitmap_stride, second_bit, hidden_set,
                                     weight_set, ptr<float>(row_weight), ptr<float>(dz_hidden),
                                     ptr<int32_t>(hidden_tokens)},
                                    num_threads);
      },
      py::arg("tile"), py::kw_only(), py::arg("tokens"), py::arg("labels"), py::arg("lse"), py::arg("logps"),
      py::arg("coef"), py::arg("tau"), py::arg("second_tau"), py::arg("second_bits"), py::arg("bitmap_stride"),
      py::arg("second_bit"), py::arg("hidden_set"), py::arg("weight_set"), py::arg("row_weight"),
      py::arg("dz_hidden"), py::arg("hidden_tokens"), py::arg("num_threads"), nogil);

  m.def(
      "count_pairs",
      [](Address bitmap, int64_t bitmap_stride, Address coef, int64_t num_tokens, int64_t num_blocks, Address counts,
         int num_threads) {
        fastdpo::count_pairs(ptr<const uint8_t>(bitmap), bitmap_stride, ptr<const float>(coef), num_tokens, num_blocks,
                             ptr<int64_t>(counts), num_threads);
      },
      nogil);

  m.def(
      "fill_pairs",
      [](Address bitmap, int64_t bitmap_stride, Address coef, int64_t first_token, int64_t num_tokens,
         int64_t first_block, int64_t num_blocks, Address offsets, Address tokens, int num_threads) {
        fastdpo::fill_pairs(ptr<const uint8_t>(bitmap), bitmap_stride, ptr<const float>(coef), first_token, num_tokens,
                            first_block, num_blocks, ptr<const int64_t>(offsets), ptr<int32_t>(tokens), num_threads);
      },
      nogil);

  m.def(
      "gather_rows",
      [](Address dst, int64_t dst_stride, Address src, int dtype, int64_t src_stride, Address tokens, Address rows,
         int64_t num_rows, int64_t num_cols, int num_threads) {
        fastdpo::gather_rows(ptr<float>(dst), dst_stride, ptr<const void>(src), static_cast<DType>(dtype), src_stride,
                             ptr<const int32_t>(tokens), ptr<const int64_t>(rows), num_rows, num_cols, num_threads);
      },
      nogil);

  m.def(
      "scatter_add_rows",
      [](Address dst, int64_t dst_stride, Address src, int64_t src_stride, Address tokens, Address rows,
         int64_t num_rows, int64_t num_cols, int num_threads) {
        fastdpo::scatter_add_rows(ptr<float>(dst), dst_stride, ptr<const float>(src), src_stride,
                                  ptr<const int32_t>(tokens), ptr<const int64_t>(rows), num_rows, num_cols,
                                  num_threads);
      },
      nogil);

  m.def("logits_splits", &fastdpo::logits_splits);
  m.attr("PARTIAL_FLOATS") = fastdpo::kPartialFloats;
  def_logits_forward(m, "host_logits_forward", &fastdpo::host_logits_forward);
  def_logits_backward(m, "host_logits_backward", &fastdpo::host_logits_backward);
#ifdef FASTDPO_HAVE_CUDA
  def_logits_forward(m, "cuda_logits_forward", &launch_logits_forward);
  def_logits_backward(m, "cuda_logits_backward", &launch_logits_backward);
  m.def("cuda_error_text", &fastdpo::cuda_error_text);
  m.def("cuda_runtime_version", &fastdpo::cuda_runtime_version);
  m.def("cuda_driver_version", &fastdpo::cuda_driver_version);
#endif

  py::dict preference_losses, divergences;
  for (const auto& entry : fastdpo::kPreferenceLosses) preference_losses[entry.name] = static_cast<int>(entry.loss);
  for (const auto& entry : fastdpo::kDivergences) divergences[entry.name] = static_cast<int>(entry.divergence);
  py::list preference_options;
  for (const auto& entry : fastdpo::kPreferenceOptionFields) preference_options.append(entry.name);
  m.attr("PREFERENCE_LOSSES") = preference_losses;    // name -> value of `losses_used`
  m.attr("DIVERGENCES") = divergences;                // name -> value of `divergence`
  m.attr("PREFERENCE_OPTIONS") = preference_options;  // the order of `options`

  m.attr("PAIR_SUMS_BYTES") = sizeof(fastdpo::PairSums);
  py::class_<PyPreferenceBatch>(m, "PreferenceBatch")
      .def(py::init(&make_batch<Pair, Pair, Pair, Pair, Pair, Address, bool, Address, int64_t, int64_t, int64_t, int64_t,
                                bool, bool, bool, double, double, std::vector<int>, std::vector<double>, int,
                                std::vector<double>>));

  m.def(
      "host_preference_forward",
      [](const PyPreferenceBatch& batch, Address sums, Address finished, Address loss, Address losses,
         const Pair& rewards, const Pair& logps, Address partials) {
        if (batch.is_double) {
          fastdpo::host_preference_forward(
              batch.as_double, preference_results<double>(sums, finished, loss, losses, rewards, logps, partials));
        } else {
          fastdpo::host_preference_forward(
              batch.as_float, preference_results<float>(sums, finished, loss, losses, rewards, logps, partials));
        }
      },
      nogil);
  m.def(
      "host_preference_backward",
      [](const PyPreferenceBatch& batch, Address partials, Address sums, Address dloss, Address dlosses,
         const Pair& dlogps, const Pair& dtokens, const Pair& dref) {
        if (batch.is_double) {
          fastdpo::host_preference_backward(
              batch.as_double, preference_upstream<double>(partials, sums, dloss, dlosses, dlogps, dtokens, dref));
        } else {
          fastdpo::host_preference_backward(
              batch.as_float, preference_upstream<float>(partials, sums, dloss, dlosses, dlogps, dtokens, dref));
        }
      },
      nogil);
#ifdef FASTDPO_HAVE_CUDA
  m.def(
      "cuda_preference_forward",
      [](const PyPreferenceBatch& batch, Address sums, Address finished, Address loss, Address losses,
         const Pair& rewards, const Pair& logps, Address partials, int device, Address stream) {
        return fastdpo::launch_preference_forward(
            batch.as_float, preference_results<float>(sums, finished, loss, losses, rewards, logps, partials), device,
            ptr<void>(stream));
      },
      nogil);
  m.def(
      "cuda_preference_backward",
      [](const PyPreferenceBatch& batch, Address partials, Address sums, Address dloss, Address dlosses,
         const Pair& dlogps, const Pair& dtokens, const Pair& dref, int device, Address stream) {
        return fastdpo::launch_preference_backward(
            batch.as_float, preference_upstream<float>(partials, sums, dloss, dlosses, dlogps, dtokens, dref), device,
            ptr<void>(stream));
      },
      nogil);
#endif
}
