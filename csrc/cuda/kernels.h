// What bindings call: one recurrence, forward or backward, of one or two directions, as a plan says.
//
// `scratch` is plan.scratch_bytes of device memory, aligned to 256 bytes, that nobody else uses before the
// call's work on `stream` is done. Nothing here waits for the device. An error is a std::runtime_error that
// names the kernel and its problem.
#pragma once

#include <functional>

#include "plan.h"
#include "real.h"

namespace rnnfast::cuda {

using LaunchCells = std::function<void(int p)>;

template <class Real>
struct Kernels {
  using Forward = RecurrenceForward<Real, StateOf<Real>>;
  using Backward = RecurrenceBackward<Real, StateOf<Real>>;

  static void forward(const Plan& plan, const Forward* layers, void* scratch, int device, void* stream);
  static void backward(const Plan& plan, const Backward* layers, void* scratch, int device, void* stream);

  // The cells of one direction by the method gemm, to be launched for each step with the sums of its product
  // there, as in cells.h. Backward without truncation, and dc waits in layer.dc0 for the next step.
  static LaunchCells forward_cells(const Plan& plan, const Forward& layer, const StateOf<Real>* sums, int device,
                                   void* stream);
  static LaunchCells backward_cells(const Plan& plan, const Backward& layer, const StateOf<Real>* sums, int device,
                                    void* stream);
};

Device device_properties(int index);

}  // namespace rnnfast::cuda
