// What Python sees of the CUDA kernels, on a GPU or on the emulator: plans, and calls that take a plan and
// addresses. Whoever calls has allocated and checked everything.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "blas.h"
#include "kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace rnnfast::cuda {
using Address = std::uintptr_t;  // of device memory; 0 means absent

inline Format format_of(const std::string& wanted) {
  for (const Format format :
       {Format::float32, Format::tf32, Format::float64, Format::float16, Format::bfloat16})
    if (wanted == name(format)) return format;
  throw std::invalid_argument("unknown number format " + wanted);
}

inline Method method_of(const std::string& wanted) {
  for (const Method method : {Method::local, Method::cluster, Method::grid, Method::resident, Method::resident_cluster,
                              Method::steps, Method::gemm})
    if (wanted == name(method)) return method;
  throw std::invalid_argument("the method is '" + wanted + "', but should be local, cluster, grid, resident, "
                              "resident_cluster, steps or gemm");
}

inline Cell cell_of(const std::string& name) {
  if (name == "lstm") return Cell::lstm;
  if (name == "tanh") return Cell::rnn_tanh;
  if (name == "relu") return Cell::rnn_relu;
  throw std::invalid_argument("unknown cell " + name);
}

inline void require(Status status) {
  if (status != Status::ok) throw std::invalid_argument(message(status));
}

inline Work work_of(bool backward, const std::string& cell, const std::string& format, Index T, Index B, Index H,
                    Index k1, Index k2, int directions) {
  const Work work{backward ? Pass::backward : Pass::forward, format_of(format),
                  {cell_of(cell), T, B, H, k1, k2}, directions};
  require(check(work.shape));
  if (T < 1 || B < 1 || directions < 1 || directions > 2)
    throw std::invalid_argument("T and B must be at least 1, and there are one or two directions");
  return work;
}

inline Plan plan(const Device& device, bool backward, const std::string& cell, const std::string& format, Index T,
          Index B, Index H, Index k1, Index k2, int directions, const std::string& method) {
  const Work work = work_of(backward, cell, format, T, B, H, k1, k2, directions);
  return method.empty() ? plan_recurrence(device, work) : plan_recurrence(device, work, method_of(method));
}

inline std::vector<Plan> plans(const Device& device, bool backward, const std::string& cell,
                               const std::string& format, Index T, Index B, Index H, Index k1, Index k2,
                               int directions, const std::string& method) {
  return all_plans(device, work_of(backward, cell, format, T, B, H, k1, k2, directions), method_of(method));
}

inline py::dict as_dict(const Plan& plan) {
  const Tiling& tiling = plan.tiling;
  const Residency weights = residency(plan);
  const Counts& counts = plan.counts;
  return py::dict(
      "method"_a = name(plan.method), "format"_a = name(plan.work.format),
      "tensor_cores"_a = plan.engine.tensor_cores,
      "directions"_a = plan.work.directions, "blocks"_a = plan.blocks, "groups"_a = plan.groups,
      "columns"_a = tiling.columns,
      "group_columns"_a = tiling.group_columns, "pass_columns"_a = tiling.pass_columns,
      "tile_rows"_a = plan.engine.tile_rows, "tile_columns"_a = plan.engine.tile_columns,
      "tile_terms"_a = plan.engine.step, "row_tiles"_a = plan.engine.row_tiles,
      "bundles"_a = tiling.bundles, "k_steps"_a = tiling.k_steps,
      "register_steps"_a = tiling.register_steps, "shared_tiles"_a = tiling.shared_tiles,
      "block_rows"_a = block_rows(plan), "register_weight_bytes"_a = weights.registers,
      "shared_weight_bytes"_a = weights.shared, "streamed_weight_bytes"_a = weights.streamed,
      "weights_bytes"_a = plan.weights_bytes,
      "shared_bytes"_a = plan.shared.bytes, "partial_buffers"_a = tiling.partial_buffers,
      "scratch_bytes"_a = plan.scratch_bytes,
      "counts"_a = py::dict("items"_a = counts.items, "trips"_a = counts.trips, "tiles"_a = counts.tiles,
                            "input_bytes"_a = counts.input_bytes, "traffic_bytes"_a = counts.traffic_bytes,
                            "streamed_bytes"_a = counts.streamed_bytes,
                            "partial_bytes"_a = counts.partial_bytes, "cells"_a = counts.cells,
                            "pushes"_a = counts.pushes, "occupied"_a = counts.occupied,
                            "handed_bytes"_a = counts.handed_bytes, "memory"_a = counts.memory,
                            "peers"_a = counts.peers, "blocks"_a = counts.blocks,
                            "backward"_a = counts.backward, "rounded"_a = counts.rounded, "turns"_a = counts.turns),
      "cycles"_a = plan.cycles, "reason"_a = plan.reason);
}

template <class Real>
Real* at(Address address) {
  return reinterpret_cast<Real*>(address);
}

// One direction's arrays, in the order of the contract.
using Arrays = std::vector<Address>;

inline void expect(const Plan& plan, Pass pass, std::size_t real_bytes, const std::vector<Arrays>& layers,
            std::size_t arrays) {
  if (plan.work.pass != pass || plan.engine.real_bytes != int(real_bytes))
    throw std::invalid_argument("the plan is for another pass or number format");
  if (layers.size() != std::size_t(plan.work.directions))
    throw std::invalid_argument("the plan is for another number of directions");
  for (const Arrays& layer : layers)
    if (layer.size() != arrays) throw std::invalid_argument("an address is missing or too many");
}

// The pass's arrays of one direction.
template <class Real>
typename Kernels<Real>::Forward forward_of(const Plan& plan, bool reverse, const Arrays& a) {
  using State = StateOf<Real>;
  const typename Kernels<Real>::Forward arrays{
      reverse,        at<Real>(a[0]),  at<Real>(a[1]),  at<Real>(a[2]),  at<State>(a[3]),
      at<Real>(a[4]), at<Real>(a[5]),  at<State>(a[6]), at<State>(a[7]), at<Real>(a[8])};
  require(check(plan.work.shape, arrays));
  return arrays;
}

template <class Real>
typename Kernels<Real>::Backward backward_of(const Plan& plan, bool reverse, const Arrays& a) {
  using State = StateOf<Real>;
  const typename Kernels<Real>::Backward arrays{
      reverse,        at<Real>(a[0]),  at<Real>(a[1]), at<State>(a[2]), at<State>(a[3]),
      at<Real>(a[4]), at<State>(a[5]), at<Real>(a[6]), at<State>(a[7]), at<Real>(a[8]),
      at<Real>(a[9]), at<Real>(a[10]), at<State>(a[11])};
  require(check(plan.work.shape, arrays));
  return arrays;
}

template <class Real>
void forward(const Plan& plan, const std::vector<bool>& reverse, const std::vector<Arrays>& layers,
             Address scratch, int device, Address stream) {
  expect(plan, Pass::forward, sizeof(Real), layers, 9);
  typename Kernels<Real>::Forward arrays[2]{};
  for (std::size_t n = 0; n < layers.size(); ++n) arrays[n] = forward_of<Real>(plan, reverse.at(n), layers[n]);
  Kernels<Real>::forward(plan, arrays, at<void>(scratch), device, at<void>(stream));
}

template <class Real>
void backward(const Plan& plan, const std::vector<bool>& reverse, const std::vector<Arrays>& layers,
              Address scratch, int device, Address stream) {
  expect(plan, Pass::backward, sizeof(Real), layers, 12);
  typename Kernels<Real>::Backward arrays[2]{};
  for (std::size_t n = 0; n < layers.size(); ++n) arrays[n] = backward_of<Real>(plan, reverse.at(n), layers[n]);
  Kernels<Real>::backward(plan, arrays, at<void>(scratch), device, at<void>(stream));
}

// The cells of a recurrence by the method gemm, for one step after the other.
class Cells {
 public:
  Cells(const Plan& plan, LaunchCells launch) : steps_(plan.work.shape.T), launch_(std::move(launch)) {}

  void step(int p) {
    if (p < 0 || p >= steps_) throw std::invalid_argument("there is no such step");
    launch_(p);
  }

 private:
  Index steps_;
  LaunchCells launch_;
};

inline void expect_cells(const Plan& plan, Pass pass, std::size_t real_bytes, const Arrays& arrays,
                         std::size_t count) {
  expect(plan, pass, real_bytes, std::vector<Arrays>(std::size_t(plan.work.directions), arrays), count);
  if (plan.method != Method::gemm) throw std::invalid_argument("the plan is for another method");
}

template <class Real>
Cells forward_cells(const Plan& plan, bool reverse, const Arrays& arrays, Address sums, int device,
                    Address stream) {
  expect_cells(plan, Pass::forward, sizeof(Real), arrays, 9);
  return {plan, Kernels<Real>::forward_cells(plan, forward_of<Real>(plan, reverse, arrays), at<StateOf<Real>>(sums),
                                             device, at<void>(stream))};
}

template <class Real>
Cells backward_cells(const Plan& plan, bool reverse, const Arrays& arrays, Address sums, int device,
                     Address stream) {
  expect_cells(plan, Pass::backward, sizeof(Real), arrays, 12);
  return {plan, Kernels<Real>::backward_cells(plan, backward_of<Real>(plan, reverse, arrays),
                                              at<StateOf<Real>>(sums), device, at<void>(stream))};
}

// All steps of a recurrence by the method gemm, `sums` in between; `handle` is torch's cuBLAS handle for the stream.
template <class Real>
void forward_by_products(const Plan& plan, bool reverse, const Arrays& arrays, Address sums, int device, Address stream,
                         Address handle) {
  expect_cells(plan, Pass::forward, sizeof(Real), arrays, 9);
  const auto layer = forward_of<Real>(plan, reverse, arrays);
  StateOf<Real>* const to = at<StateOf<Real>>(sums);
  run_by_products(plan, reverse, layer.w_hh, layer.y, layer.h0, to, at<void>(handle),
                  Kernels<Real>::forward_cells(plan, layer, to, device, at<void>(stream)));
}

template <class Real>
void backward_by_products(const Plan& plan, bool reverse, const Arrays& arrays, Address sums, int device,
                          Address stream, Address handle) {
  expect_cells(plan, Pass::backward, sizeof(Real), arrays, 12);
  const auto layer = backward_of<Real>(plan, reverse, arrays);
  StateOf<Real>* const to = at<StateOf<Real>>(sums);
  run_by_products<Real>(plan, reverse, layer.w_hh, layer.da, nullptr, to, at<void>(handle),
                        Kernels<Real>::backward_cells(plan, layer, to, device, at<void>(stream)));
}

template <class Real>
void bind_format(py::module_& module, const std::string& name) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def(("forward_" + name).c_str(), &forward<Real>, released);
  module.def(("backward_" + name).c_str(), &backward<Real>, released);
  module.def(("forward_cells_" + name).c_str(), &forward_cells<Real>);
  module.def(("backward_cells_" + name).c_str(), &backward_cells<Real>);
  module.def(("forward_by_products_" + name).c_str(), &forward_by_products<Real>, released);
  module.def(("backward_by_products_" + name).c_str(), &backward_by_products<Real>, released);
}

inline void bind(py::module_& module) {
  // Local to the module: the emulator's and the GPU's live in one process when tests run.
  py::class_<Device>(module, "Device", py::module_local())
      .def(py::init([](int capability, int multiprocessors, int shared_bytes, int largest_cluster,
                       bool cooperative) {
             return Device{capability, multiprocessors, shared_bytes, largest_cluster, cooperative};
           }),
           "capability"_a, "multiprocessors"_a, "shared_bytes"_a, "largest_cluster"_a, "cooperative"_a)
      .def_readonly("capability", &Device::capability)
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_bytes", &Device::shared_bytes)
      .def_readonly("largest_cluster", &Device::largest_cluster)
      .def_readonly("cooperative", &Device::cooperative);
  py::class_<Plan>(module, "Plan", py::module_local())
      .def_readonly("scratch_bytes", &Plan::scratch_bytes)
      .def_readonly("cycles", &Plan::cycles)
      .def_property_readonly("method", [](const Plan& plan) { return name(plan.method); })
      .def("as_dict", &as_dict);
  py::class_<Cells>(module, "Cells", py::module_local())
      .def("__call__", &Cells::step, py::call_guard<py::gil_scoped_release>());
  module.def("plan", &plan, "device"_a, "backward"_a, "cell"_a, "format"_a, "T"_a, "B"_a, "H"_a, "k1"_a,
             "k2"_a, "directions"_a = 1, "method"_a = "");
  module.def("plans", &plans, "device"_a, "backward"_a, "cell"_a, "format"_a, "T"_a, "B"_a, "H"_a, "k1"_a,
             "k2"_a, "directions"_a, "method"_a);
  module.def("device_properties", &device_properties);
  module.def("has_products", [] { return loaded_gemm() != nullptr; });
  bind_format<float>(module, "float32");
  bind_format<double>(module, "float64");
  bind_format<Float16>(module, "float16");
  bind_format<BFloat16>(module, "bfloat16");
}

}  // namespace rnnfast::cuda
