// The extension module: integers and addresses in, the GIL released, exceptions out. No arithmetic and no
// array types; whoever calls has allocated and checked everything (python/rnnfast/ops.py). Only a layer's
// forward pass takes tensors (python/layer.h), and the question whether they are plain ones (python/plain.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "cpu/frozen.h"
#include "cpu/kernels.h"
#include "cpu/packs.h"
#include "cpu/peaks.h"
#include "cpu/plan.h"
#include "cpu/team.h"
#include "python/frozen.h"
#include "python/layer.h"
#include "python/names.h"
#include "python/offsets.h"
#include "python/plain.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#include <omp.h>

namespace py = pybind11;
using namespace py::literals;

namespace rnnfast {
namespace {

using Address = std::uintptr_t;  // of a buffer; 0 means absent

template <class Real>
Real* at(Address address) {
  return reinterpret_cast<Real*>(address);
}

void require(Status status) {
  if (status != Status::ok) throw std::invalid_argument(message(status));
}

// Plain numbers, not an object that holds them: making one costs as much as the whole call of a small layer.
template <class Storage>
void layer_backward(std::string_view cell, Index T, Index B, Index I, Index H, bool reverse, int threads,
                    Index k1, Index k2, Address dy, Address dh_n, Address dc_n, Address dc, Address x,
                    Address w_ih, Address w_hh, Address h0, Address c0, Address y, Address c,
                    Address gates, Address dx, Address dw_ih, Address dw_hh, Address db, Address dh0,
                    Address dc0, Address da, Address da_windows, Address da_sums, Address b_ih,
                    Address b_hh, Address batch_sizes, Index projection, Address w_hr, Address m,
                    Address dw_hr) {
  using Real = RealOf<Storage>;
  const std::vector<Index> offsets = python::offsets_of(batch_sizes, T);
  const LayerBackward<Storage> layer{
      {python::cell_named(cell), T, B, I, H, reverse, threads, offsets.empty() ? nullptr : offsets.data(), projection},
      k1,              k2,              at<Storage>(dy),    at<Storage>(dh_n),  at<Real>(dc_n),
      at<Real>(dc),    at<Storage>(x),     at<Storage>(w_ih),  at<Storage>(w_hh),  at<Storage>(h0),
      at<Real>(c0),    at<Storage>(y),     at<Real>(c),     at<Real>(gates), at<Storage>(dx),
      at<Storage>(dw_ih), at<Storage>(dw_hh), at<Storage>(db),    at<Storage>(dh0),   at<Real>(dc0),
      at<Storage>(da),    at<Storage>(da_windows), at<Real>(da_sums), at<Storage>(b_ih), at<Storage>(b_hh),
      at<Storage>(w_hr), at<Storage>(m), at<Storage>(dw_hr)};
  require(check(layer));
  cpu::kernels().of<Storage>().backward(layer);
}

template <class Real>
void evaluate(const std::string& function, Index count, Address x, Address y) {
  const auto which = function == "exp"       ? cpu::Function::exp
                     : function == "sigmoid" ? cpu::Function::sigmoid
                     : function == "tanh"    ? cpu::Function::tanh
                                             : throw std::invalid_argument("unknown function " + function);
  cpu::kernels().of<Real>().evaluate(which, count, at<Real>(x), at<Real>(y));
}

// The file the OpenMP functions in use come from: with torch loaded, torch's.
std::string openmp_library() {
#if defined(__unix__) || defined(__APPLE__)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) && info.dli_fname)
    return info.dli_fname;
#endif
  return "unknown";
}

py::dict build_info() {
  return py::dict(
      "version"_a = RNNFAST_VERSION, "compiler"_a = RNNFAST_COMPILER,
      "isas_built"_a = cpu::built_isas(), "isas_available"_a = cpu::available_isas(),
      "isa"_a = cpu::kernels().name, "openmp"_a = openmp_library());
}

py::dict described(const cpu::Plan& plan) {
  const char* split = plan.split == cpu::Split::rows    ? "rows"
                      : plan.split == cpu::Split::units ? "units"
                                                        : "steps";
  return py::dict("threads"_a = plan.threads, "split"_a = split,
                  "pack"_a = plan.pack, "dense"_a = plan.dense, "chunk"_a = plan.chunk, "own_share"_a = plan.own_share,
                  "cycles"_a = plan.cycles);
}

py::dict plan_recurrence(Index steps, Index rows, Index units, Index gates, Index terms,
                         Index product_terms, Index vector_width, Index real_bytes, Index tile_rows,
                         Index row_block, Index l1_bytes, Index l2_bytes, int threads, bool products_first) {
  return described(cpu::plan_recurrence(
      {steps, rows, units, gates, terms, product_terms, nullptr, 1, products_first},
      {vector_width, real_bytes, tile_rows, row_block, l1_bytes, l2_bytes}, threads));
}

// The plan of a layer forward on this machine, and the tile of the kernels that carry it out.
template <class Real>
py::dict plan_forward(Index gates, Index T, Index B, Index I, Index H, int threads, Address batch_sizes,
                      Index projection, bool frozen) {
  const std::vector<Index> offsets = python::offsets_of(batch_sizes, T);
  const LayerShape shape{gates == 4 ? Cell::lstm : Cell::rnn_tanh, T, B, I, H, false, threads,
                         offsets.empty() ? nullptr : offsets.data(), projection};
  require(check(shape));
  const cpu::Engine engine = cpu::kernels().of<Real>().engine();
  py::dict plan = described(cpu::plan_forward(shape, engine, frozen));
  plan["tile_rows"] = engine.tile_rows;
  plan["vector_width"] = engine.vector_width;
  return plan;
}

// Sizes of a core's L1 and L2 cache, and of the L3 cache.
std::vector<Index> cache_bytes() {
  return {cpu::l1_cache_bytes(), cpu::l2_cache_bytes(), cpu::l3_cache_bytes()};
}

py::dict pool_state() {
  const cpu::PoolState state = cpu::pool_state();
  const cpu::FrozenState frozen = cpu::frozen_state();
  return py::dict("packs"_a = state.packs, "bytes"_a = state.bytes, "frozen_packs"_a = frozen.packs,
                  "frozen_bytes"_a = frozen.bytes, "reused"_a = state.reused,
                  "packed"_a = state.packed, "most_packs"_a = cpu::most_pool_packs,
                  "most_bytes"_a = cpu::most_pool_bytes);
}

template <class Storage>
void bind_layers(py::module_& module, const std::string& suffix) {
  const auto released = py::call_guard<py::gil_scoped_release>();
  module.def(("layer_backward_" + suffix).c_str(), &layer_backward<Storage>, released);
  module.def(("plan_forward_" + suffix).c_str(), &plan_forward<Storage>, "gates"_a, "T"_a, "B"_a, "I"_a, "H"_a,
             "threads"_a, "batch_sizes"_a = 0, "projection"_a = 0, "frozen"_a = false);
  module.def(("fma_peak_" + suffix).c_str(), &cpu::fma_peak<Storage>, released);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The native core of rnnfast; use rnnfast's Python modules instead.";
  python::bind_frozen(module);
  python::bind_layer(module);
  python::bind_plain(module);
  bind_layers<float>(module, "float32");
  bind_layers<double>(module, "float64");
  bind_layers<BFloat16>(module, "bfloat16");
  module.def("evaluate_float32", &evaluate<float>, py::call_guard<py::gil_scoped_release>());
  module.def("evaluate_float64", &evaluate<double>, py::call_guard<py::gil_scoped_release>());
  module.def("read_bandwidth", &cpu::read_bandwidth, py::call_guard<py::gil_scoped_release>());
  module.def("plan_recurrence", &plan_recurrence, "steps"_a, "rows"_a, "units"_a, "gates"_a, "terms"_a,
             "product_terms"_a, "vector_width"_a, "real_bytes"_a, "tile_rows"_a, "row_block"_a, "l1_bytes"_a, "l2_bytes"_a,
             "threads"_a, "products_first"_a);
  module.def("cache_bytes", &cache_bytes);
  module.def("hash_bytes", [](Address from, std::size_t bytes, bool portably) {
    return (portably ? cpu::hash_bytes_portably : cpu::hash_bytes)(at<void>(from), bytes);
  });
  module.def("pool_state", &pool_state);
  module.def("empty_pool", &cpu::empty_pool);
  module.def("use_isa", &cpu::use_isa);
  module.def("build_info", &build_info);
}

}  // namespace rnnfast
