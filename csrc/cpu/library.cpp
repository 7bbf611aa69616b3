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
bool load_bf16_product(const char* path) {
#if !defined(_WIN32)
  if (void* library = dlopen(path, RTLD_NOW)) {
    mkl_bf16 = reinterpret_cast<MklBf16>(dlsym(library, "cblas_gemm_bf16bf16f32"));
  }
#endif
  return mkl_bf16 != nullptr;
}

void bf16_product(const Bf16ProductArgs& a) {
  if (!mkl_bf16) throw std::runtime_error("bf16_product: no library with the product was found");
  if (a.n == 0 || a.m == 0 || (a.k == 0 && a.add)) return;
  if (a.k == 0) {
    for (int64_t i = 0; i < a.n; ++i) std::fill_n(a.out + i * a.out_stride, a.m, 0.0f);
    return;
  }
  mkl_bf16(kByRows, a.a_turned ? kTransposed : kPlain, a.b_turned ? kPlain : kTransposed, static_cast<int>(a.n),
           static_cast<int>(a.m), static_cast<int>(a.k), 1.0f, a.a, static_cast<int>(a.a_stride), a.b,
           static_cast<int>(a.b_stride), a.add ? 1.0f : 0.0f, a.out, static_cast<int>(a.out_stride));
}

}  // namespace fastdpo
