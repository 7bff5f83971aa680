// The functions a build for one instruction set offers, and the choice among the builds at run time.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "../rnnfast.h"
#include "plan.h"

namespace rnnfast::cpu {

enum class Function { exp, sigmoid, tanh };

template <class Storage>
struct LayerKernels {
  void (*forward)(const LayerForward<Storage>& layer);
  void (*backward)(const LayerBackward<Storage>& layer);
  // What forward() and backward() are planned for.
  Engine (*engine)();
  // Runs the products' instruction on independent registers; returns how many floating-point operations
  // those were.
  double (*fma_loop)(Index iterations);
};

template <class Real>
struct KernelsFor : LayerKernels<Real> {
  void (*evaluate)(Function function, Index count, const Real* x, Real* y);
  // Adds up an array: reads it once, as fast as loads go.
  Real (*sum)(Index count, const Real* x);
};

struct Kernels {
  const char* name;
  KernelsFor<float> f32;
  KernelsFor<double> f64;
  LayerKernels<BFloat16> bf16;

  template <class Storage>
  const auto& of() const {
    if constexpr (std::is_same_v<Storage, BFloat16>)
      return bf16;
    else if constexpr (std::is_same_v<Storage, float>)
      return f32;
    else
      return f64;
  }
};

// The builds this processor can run, slowest first; "baseline" is always there.
std::vector<std::string> available_isas();
std::vector<std::string> built_isas();

// The build in use: the best available, or the one RNNFAST_ISA names. Throws std::invalid_argument where
// that is unknown or cannot run here.
const Kernels& kernels();

// Puts another build in use, for the whole process; throws as kernels() does.
void use_isa(const std::string& name);

}  // namespace rnnfast::cpu
