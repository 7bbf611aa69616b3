// The only source that knows Python. Every function takes one struct of structs.h, field by field by keyword
// (arguments.h), which it keeps alive. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "call.h"
#include "cpu/folds.h"
#include "cpu/parallel.h"
#include "shared/logits_row.h"
#include "shared/preference_batch.h"
#include "shared/routing.h"

#ifdef FASTDPO_HAVE_CUDA
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace fastdpo;

namespace {

template <class Args, class Call>
void def(py::module_& m, const char* name, Call call) {
  m.def(name, [name, call](const py::kwargs& given) {
    Arguments in(name, given);
    return run<Args>(in, call);
  });
}

// Of either type, as the keyword `is_double` says.
template <template <class> class Args, class Call>
void def_of_types(py::module_& m, const char* name, Call call) {
  m.def(name, [name, call](const py::kwargs& given) {
    Arguments in(name, given);
    bool is_double = false;
    in.numbers("is_double", is_double);
    is_double ? run<Args<double>>(in, call) : run<Args<float>>(in, call);
  });
}

template <class Entries>
py::dict names(const Entries& entries) {
  py::dict found;
  for (const auto& entry : entries) found[entry.name] = static_cast<int>(entry.id);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastdpo's native kernels; csrc/structs.h says what each field means";

  Torch::get();  // here, where no other thread can wait for it with the GIL in its hands

  m.attr("BLOCK") = kBlock;
  m.attr("BLOCKS_TOGETHER") = kTogether;
  m.attr("ONE") = kOne;
  m.attr("ROW_STATS") = py::cast(std::vector<std::string>(std::begin(kRowStatsNames), std::end(kRowStatsNames)));
  m.attr("ROW_STATS_SIZE") = kRowStatsSize;
  m.attr("NO_ROW_STATS") = std::vector<double>(std::begin(kNoRowStats), std::end(kNoRowStats));
  m.attr("PARTIAL_FLOATS") = kPartialFloats;
  m.attr("LEFT_OUT") = kLeftOut;
  m.attr("BLOCK_DIVERGENCE_SIZE") = kBlockDivergenceSize;
  m.attr("MAX_TERMS") = kMaxTerms;
  m.attr("PAIR_SUMS_BYTES") = sizeof(PairSums);
  m.attr("PAIR_PARTIALS") = kPartials;
  m.attr("PREFERENCE_LOSSES") = names(kPreferenceLosses);
  m.attr("DIVERGENCES") = names(kDivergences);
  py::list options;
  for (const auto& field : kPreferenceOptionFields) options.append(field.name);
  m.attr("PREFERENCE_OPTIONS") = options;

  m.def("isa", [] { return cpu_kernels().isa; });
  m.def("supported_isas", &supported_isas);
  m.def("use_isa", &use_isa);
  m.def("parallel_backend", &parallel_backend);
  m.def("pieces_of_last_loop", &pieces_of_last_loop);
  m.def("logits_splits", &logits_splits);
  m.def("load_bf16_product", &load_bf16_product);

  def<FoldArgs>(m, "fold", &fold);
  def<SumBlocksArgs>(m, "sum_blocks", &sum_blocks);
  def<FinishArgs>(m, "finish", &finish);
  def<RouteArgs>(m, "route", &route);
  def<GradArgs>(m, "grad", &grad);
  def<RoutedGradArgs>(m, "routed_grad", &routed_grad);
  def<CountPairsArgs>(m, "count_pairs", &count_pairs);
  def<FillPairsArgs>(m, "fill_pairs", &fill_pairs);
  def<MemoryArgs>(m, "use_huge_pages", &use_huge_pages);
  def<Bf16ProductArgs>(m, "bf16_product", &bf16_product);
  def<ProductsArgs>(m, "products", &products);
  def<AddToTokensArgs>(m, "add_to_tokens", &add_to_tokens);
  def<AddToColumnsArgs>(m, "add_to_columns", &add_to_columns);
  def<DivergenceFoldArgs>(m, "divergence_fold", &divergence_fold);
  def<DivergenceGradArgs>(m, "divergence_grad", &divergence_grad);
  def<RoutedDivergenceGradArgs>(m, "routed_divergence_grad", &routed_divergence_grad);
  def_of_types<PreferenceForwardArgs>(m, "host_preference_forward",
                                      [](const auto& a) { host_preference_forward(a.batch, a.out); });
  def_of_types<PreferenceBackwardArgs>(m, "host_preference_backward",
                                       [](const auto& a) { host_preference_backward(a.batch, a.up); });

#ifdef FASTDPO_HAVE_CUDA
  def_cuda_kernels(m);
#endif
}
