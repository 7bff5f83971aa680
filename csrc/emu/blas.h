// What the method gemm takes from cuBLAS (cuda/blas.h), on the processor: plain loops, for sizes of tests.
#pragma once

#include "platform.h"

namespace rnnfast::emu {

template <class Number, class Sum>
void multiply_columns(bool transpose_a, int m, int n, int k, const Number* a, int lda, const Number* b, int ldb, Sum* c,
                      int ldc) {
  for (int column = 0; column < n; ++column) {
    for (int row = 0; row < m; ++row) {
      Sum sum = 0;
      for (int i = 0; i < k; ++i) {
        const Number& factor = transpose_a ? a[std::ptrdiff_t(row) * lda + i] : a[std::ptrdiff_t(i) * lda + row];
        sum += cuda::widen(factor) * cuda::widen(b[std::ptrdiff_t(column) * ldb + i]);
      }
      c[std::ptrdiff_t(column) * ldc + row] = sum;
    }
  }
}

// As cublasGemmEx with alpha 1, beta 0 and b as it is; other calls than the kernels' are refused with 7, as cuBLAS does.
inline int gemm_ex(void*, int transpose_a, int transpose_b, int m, int n, int k, const void*, const void* a, int a_type,
                   int lda, const void* b, int b_type, int ldb, const void*, void* c, int c_type, int ldc, int, int) {
  constexpr int float32 = 0, float64 = 1, float16 = 2, bfloat16 = 14, refused = 7;
  const auto run = [&](auto number, auto sum) {
    using Number = decltype(number);
    multiply_columns(transpose_a == 1, m, n, k, static_cast<const Number*>(a), lda, static_cast<const Number*>(b), ldb,
                     static_cast<decltype(sum)*>(c), ldc);
    return 0;
  };
  if (transpose_b != 0 || a_type != b_type) return refused;
  if (a_type == float64 && c_type == float64) return run(double{}, double{});
  if (c_type != float32) return refused;
  if (a_type == float32) return run(float{}, float{});
  if (a_type == float16) return run(cuda::Float16{}, float{});
  return a_type == bfloat16 ? run(cuda::BFloat16{}, float{}) : refused;
}

}  // namespace rnnfast::emu

namespace rnnfast::cuda {

using GemmEx = decltype(&emu::gemm_ex);
inline GemmEx loaded_gemm() { return emu::gemm_ex; }

}  // namespace rnnfast::cuda
