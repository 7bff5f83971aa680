// The products of the method gemm, by the cuBLAS that torch has loaded and with torch's handle: a step's product and
// cells are so short that a call of Python's for each would take longer than they do.
//
// Nothing is linked: the one function is looked up in the process, and torch.mm does its work where it is not found.
// The emulator has its own, and is included first.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

#if !defined(RNNFAST_EMULATOR)

#include <dlfcn.h>

namespace rnnfast::cuda {

using GemmEx = int (*)(void* handle, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                       const void* a, int a_type, int lda, const void* b, int b_type, int ldb, const void* beta,
                       void* c, int c_type, int ldc, int compute, int algorithm);

inline GemmEx loaded_gemm() {
  static const GemmEx found = []() -> GemmEx {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"})
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD))
        return reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
    return nullptr;
  }();
  return found;
}

}  // namespace rnnfast::cuda

#endif

namespace rnnfast::cuda {

// Constants of cublasGemmEx, which are part of cuBLAS's binary interface.
struct BlasTypes {
  int number, sum, compute;
};
constexpr BlasTypes blas_types(Format format) {
  constexpr int float32 = 0, float64 = 1, float16 = 2, bfloat16 = 14;           // cudaDataType
  constexpr int compute_32 = 68, compute_64 = 70, compute_tf32 = 77;            // cublasComputeType_t
  switch (format) {
    case Format::float32: return {float32, float32, compute_32};
    case Format::tf32: return {float32, float32, compute_tf32};
    case Format::float64: return {float64, float64, compute_64};
    case Format::float16: return {float16, float32, compute_32};
    case Format::bfloat16: break;
  }
  return {bfloat16, float32, compute_32};
}

// All steps of a recurrence. `weights`: w_hh (G*H, H). `vectors`: the (T, B, terms) that steps leave behind and the next
// ones multiply, in time's order; `first`: what comes in at the first step, null where nothing does. `sums`: (B, rows),
// at the end those of the product that follows the last step, going back. `handle`: torch's, for the stream.
template <class Real>
void run_by_products(const Plan& plan, bool reverse, const Real* weights, const Real* vectors, const Real* first,
                     StateOf<Real>* sums, void* handle, const LaunchCells& cells) {
  using State = StateOf<Real>;
  const RecurrenceShape& shape = plan.work.shape;
  const bool forward = plan.work.pass == Pass::forward;
  const int B = int(shape.B), H = int(shape.H), all = int(gate_count(shape.cell)) * H, T = int(shape.T);
  const int rows = forward ? all : H, terms = forward ? H : all;
  const BlasTypes types = blas_types(plan.work.format);
  const State one = 1, none = 0;
  // Its matrices are column by column: sums^T = weights vectors^T, of which ours is the transpose already.
  const auto multiply = [&](const Real* from) {
    constexpr int as_is = 0, transposed = 1, default_algorithm = -1;
    const int status = loaded_gemm()(handle, forward ? transposed : as_is, as_is, rows, B, terms, &one, weights,
                                     types.number, H, from, types.number, terms, &none, sums, types.sum, rows,
                                     types.compute, default_algorithm);
    if (status != 0)
      throw std::runtime_error(describe(plan) + ": cublasGemmEx failed with status " + std::to_string(status));
  };
  const auto vector = [&](int p) { return vectors + Index(forward == reverse ? T - 1 - p : p) * B * terms; };
  if (first) multiply(first);
  cells(0);
  for (int p = 1; p < T; ++p) {
    multiply(vector(p - 1));
    cells(p);
  }
  if (!forward) multiply(vector(T - 1));
}

}  // namespace rnnfast::cuda
