// What torch's own libraries can do and torch does not offer.
#include <algorithm>
#include <stdexcept>

#include "cpu/folds.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace fastdpo {

namespace {

// MKL's cblas_gemm_bf16bf16f32: c = alpha * a @ b + beta * c, of bf16 a and b, with sums and results of fp32.
using MklBf16 = void (*)(int layout, int a_turned, int b_turned, int n, int m, int k, float alpha, const void* a,
                         int a_stride, const void* b, int b_stride, float beta, float* c, int c_stride);
constexpr int kByRows = 101, kPlain = 111, kTransposed = 112;  // of cblas.h

MklBf16 mkl_bf16 = nullptr;

}  // namespace

// Finds it in the library at that path, which stays loaded.
bool load_bf16_product(const std::string& path) {
#if !defined(_WIN32)
  if (void* library = dlopen(path.c_str(), RTLD_NOW)) {
    mkl_bf16 = reinterpret_cast<MklBf16>(dlsym(library, "cblas_gemm_bf16bf16f32"));
  }
#endif
  return mkl_bf16 != nullptr;
}

void require_bf16_product() {
  if (!mkl_bf16) throw std::runtime_error("no library with a product of bf16 was found");
}

void bf16_gemm(Bf16Rows a, Bf16Rows b, Bf16Sums out, int64_t n, int64_t m, int64_t k) {
  if (n == 0 || m == 0 || (k == 0 && out.add)) return;
  if (k == 0) {
    for (int64_t i = 0; i < n; ++i) std::fill_n(out.data + i * out.stride, m, 0.0f);
    return;
  }
  const auto step = [](int64_t stride, int64_t cols) { return static_cast<int>(std::max(stride, cols)); };  // of one row
  mkl_bf16(kByRows, a.turned ? kTransposed : kPlain, b.turned ? kPlain : kTransposed, static_cast<int>(n),
           static_cast<int>(m), static_cast<int>(k), 1.0f, a.data, step(a.stride, a.turned ? n : k), b.data,
           step(b.stride, b.turned ? m : k), out.add ? 1.0f : 0.0f, out.data, step(out.stride, m));
}

void bf16_product(const Bf16ProductArgs& a) {
  require_bf16_product();
  bf16_gemm(a.a, a.b, a.out, a.n, a.m, a.k);
}

}  // namespace fastdpo
