// From a plan and addresses to launches: the same code on a GPU and on the emulator.
#pragma once

#include <iterator>
#include <utility>

#include "cells.h"
#include "kernels.h"
#include "local.h"
#include "pack.h"
#include "recurrence.h"
#include "resident.h"

namespace rnnfast::cuda {

template <class Engine>
constexpr bool is_engine(const EngineTraits& traits) {
  return traits.tile_rows == Engine::tile_rows && traits.tile_columns == Engine::tile_columns &&
         traits.step == Engine::step && traits.tile_bytes == Engine::planes * 512 &&
         traits.column_tiles == Engine::column_tiles &&
         traits.resident_tiles == Engine::resident_tiles &&
         traits.inputs_ahead == Engine::inputs_ahead && traits.row_tiles == Engine::row_tiles &&
         traits.real_bytes == int(sizeof(typename Engine::Real)) &&
         traits.state_bytes == int(sizeof(typename Engine::State));
}
template <Pass pass, int gates>
constexpr bool engines_match() {
  constexpr int rows = rows_side_by_side(pass, gates);
  return is_engine<Fma<double>>(engine_traits(Format::float64, true, pass, gates)) &&
         is_engine<Fma<float>>(engine_traits(Format::float32, true, pass, gates)) &&
         is_engine<Mma<float, rows>>(engine_traits(Format::tf32, true, pass, gates)) &&
         is_engine<Mma<Float16, rows>>(engine_traits(Format::float16, true, pass, gates)) &&
         is_engine<Mma<BFloat16, rows>>(engine_traits(Format::bfloat16, true, pass, gates)) &&
         is_engine<Fma<Float16>>(engine_traits(Format::float16, false, pass, gates)) &&
         is_engine<Fma<BFloat16>>(engine_traits(Format::bfloat16, false, pass, gates));
}
static_assert(engines_match<Pass::forward, 1>() && engines_match<Pass::forward, 4>() &&
              engines_match<Pass::backward, 1>() && engines_match<Pass::backward, 4>());

// "recurrence forward (local) of LSTM, T 5, B 3, H 4": what an error names.
inline std::string describe(const Plan& plan) {
  const RecurrenceShape& shape = plan.work.shape;
  return std::string("rnnfast: CUDA recurrence ") +
         (plan.work.pass == Pass::forward ? "forward" : "backward") + " (" +
         name(plan.method) + ") of " + (shape.cell == Cell::lstm ? "LSTM" : "RNN") + ", T " +
         std::to_string(shape.T) + ", B " + std::to_string(shape.B) + ", H " + std::to_string(shape.H);
}

// What steps leave behind, which can be what goes round.
template <class Real>
Real* output(const RecurrenceForward<Real, StateOf<Real>>& layer) {
  return layer.y;
}
template <class Real>
Real* output(const RecurrenceBackward<Real, StateOf<Real>>& layer) {
  return layer.da;
}

template <class Step>
Arguments<Step> arguments_of(const Plan& plan, const typename Step::Layer* layers, char* memory) {
  using Real = typename Step::Real;
  const Scratch scratch = scratch_layout(plan);
  Arguments<Step> args{};
  args.shape = plan.work.shape;
  args.tiling = plan.tiling;
  args.shared = plan.shared;
  args.blocks = plan.blocks;
  args.may_be_early = plan.method != Method::steps;
  args.apart = plan.apart;
  args.initial_rows = plan.work.pass == Pass::forward ? int(args.shape.B) : 0;
  const bool in_shared = plan.method == Method::local || plan.method == Method::cluster;
  for (int direction = 0; direction < plan.work.directions; ++direction) {
    args.layers[direction] = layers[direction];
    args.weights[direction] = reinterpret_cast<uint4*>(memory + scratch.weights[direction]);
    if constexpr (std::is_same<typename Step::Layer, RecurrenceBackward<Real, typename Step::State>>::value) {
      using State = typename Step::State;
      args.carries[direction] = {reinterpret_cast<State*>(memory + scratch.carry[direction]),
                                 reinterpret_cast<State*>(memory + scratch.starts[direction])};
    }
    if (in_shared) continue;
    args.initial[direction] = reinterpret_cast<Real*>(memory + scratch.initial[direction]);
    args.exchange[direction] =
        plan.apart ? reinterpret_cast<Real*>(memory + scratch.exchange[direction]) : output(layers[direction]);
  }
  return args;
}

// The exchange in global memory: absent numbers, where somebody waits for them, and zeros past the last term.
template <class Real>
void empty(const Plan& plan, Real* exchange, Stream stream) {
  if (!exchange) return;
  const std::size_t rows = scratch_layout(plan).exchange_rows, pitch = plan.tiling.exchange_stride * sizeof(Real);
  const Index gates = gate_count(plan.work.shape.cell);
  const Index terms = (plan.work.pass == Pass::forward ? 1 : gates) * plan.work.shape.H;
  if (plan.method != Method::steps) fill(exchange, absent_byte, pitch, rows, pitch, stream);
  const std::size_t padding = pitch - std::size_t(terms) * sizeof(Real);
  if (padding > 0) fill(exchange + terms, 0, padding, rows, pitch, stream);
}

template <class Real>
constexpr Format tensor_core_format() {
  return std::is_same<Real, BFloat16>::value  ? Format::bfloat16
         : std::is_same<Real, Float16>::value ? Format::float16
         : std::is_same<Real, float>::value   ? Format::tf32
                                              : Format::float64;
}

// body(engine, problem): the types for a plan's number of units and columns.
template <class Step, int number = 0, class Body>
void with_local_types(const Plan& plan, Body&& body) {
  using Real = typename Step::Real;
  constexpr int sizes = int(std::size(local_units)), kinds = int(std::size(local_columns));
  if constexpr (number < sizes * kinds) {
    constexpr int units = local_units[number / kinds], columns = local_columns[number % kinds];
    constexpr int terms = Step::sums == 1 ? units * Step::gates : units;
    if constexpr (is_local(tensor_core_format<Real>(), columns, units, Step::sums, terms)) {
      using Problem = LocalProblem<Real, units, Step::sums, terms>;
      using Engine = std::conditional_t<columns == 8, LocalMma<Problem>, LocalFma<Problem, columns == 8 ? 1 : columns>>;
      if (plan.local_units == units && plan.tiling.group_columns == columns)
        return body(Engine{}, Problem{});
    }
    with_local_types<Step, number + 1>(plan, body);
  } else {
    throw std::logic_error(describe(plan) + ": no kernel for this plan");
  }
}

template <class Step>
void run_locally(const Plan& plan, const typename Step::Layer* layers, int steps, void* scratch, Stream stream) {
  Arguments<Step> args = arguments_of<Step>(plan, layers, static_cast<char*>(scratch));
  args.end = steps;
  with_local_types<Step>(plan, [&](auto engine, auto problem) {
    using Engine = decltype(engine);
    constexpr int packed = Engine::pack_warps * Engine::packs * 32;
    const int directions = plan.work.directions, pack_blocks = (packed + block_threads - 1) / block_threads;
    launch(describe(plan) + ", packing", pack_locally<Engine, Step>,
           {{pack_blocks, 1, directions}, block_threads, 1, 0, false}, stream, args);
    launch(describe(plan), recur_locally<Engine, decltype(problem), Step>,
           {{1, plan.groups, directions}, Engine::warps * 32, 1, std::size_t(plan.shared.bytes), false}, stream, args);
  });
}

// body(kernel) for the shape of a plan's blocks.
template <class Step, int number = 0, class Body>
void with_resident_kernel(const Plan& plan, Body&& body) {
  if constexpr (number < resident_shape_count) {
    constexpr ResidentShape shape = resident_shapes(Step::sums, number);
    if (plan.shape == number) return body(recur_resident<Step, Shape<shape.rows, shape.steps, shape.columns>>);
    with_resident_kernel<Step, number + 1>(plan, body);
  } else {
    throw std::logic_error(describe(plan) + ": no kernel for this plan");
  }
}

template <class Engine>
constexpr bool is_on_tensor_cores = false;
template <class Real, int rows>
constexpr bool is_on_tensor_cores<Mma<Real, rows>> = true;

// The kernel for so many columns at once.
template <class Engine, class From, class Step>
auto recurrence_kernel(const Tiling& tiling) {
  return tiling.pass_columns <= Engine::tile_columns ? recur<Engine, From, Step, 1>
                                                     : recur<Engine, From, Step, Engine::column_tiles>;
}

// All launches of one recurrence; `steps` is how many steps it has.
template <class Engine, class Step>
void run(const Plan& plan, const typename Step::Layer* layers, int steps, void* scratch, Stream stream) {
  if (plan.method == Method::local) return run_locally<Step>(plan, layers, steps, scratch, stream);
  const std::string what = describe(plan);
  Arguments<Step> args = arguments_of<Step>(plan, layers, static_cast<char*>(scratch));
  const int directions = plan.work.directions;

  const Index packed = Index(plan.weights_bytes / sizeof(uint4));
  const Index initial = args.initial[0] ? initial_numbers(args) : 0;
  const int pack_blocks = int(((packed > initial ? packed : initial) + block_threads - 1) / block_threads);
  args.paired = plan.method == Method::resident && Step::sums == 4;
  launch(what + ", packing", pack<Engine, Step>, {{pack_blocks, 1, directions}, block_threads, 1, 0, false},
         stream, args, packed);

  for (int direction = 0; direction < directions; ++direction)
    empty(plan, args.exchange[direction], stream);
  LaunchShape shape{{plan.blocks, plan.groups, directions}, block_threads, 1, std::size_t(plan.shared.bytes), false};
  if (plan.method == Method::steps) {
    for (args.begin = 0; args.begin < steps; ++args.begin) {
      args.end = args.begin + 1;
      launch(what, recurrence_kernel<Engine, FromGlobal, Step>(plan.tiling), shape, stream, args);
    }
    return;
  }
  args.end = steps;
  if (plan.method == Method::resident) {
    shape.resident = true;
    if constexpr (is_on_tensor_cores<Engine>)
      with_resident_kernel<Step>(plan, [&](auto kernel) { launch(what, kernel, shape, stream, args); });
  } else if (plan.method == Method::grid) {
    shape.resident = true;
    launch(what, recurrence_kernel<Engine, FromGlobal, Step>(plan.tiling), shape, stream, args);
  } else {
    shape.cluster = plan.blocks;
    launch(what, recurrence_kernel<Engine, FromShared, Step>(plan.tiling), shape, stream, args);
  }
}

// body(engine, gates): the types for a plan; gates as std::integral_constant.
template <class Real, Pass pass, class Body>
void with_types(const Plan& plan, Body&& body) {
  const auto with_engine = [&](auto gates) {
    constexpr int rows = rows_side_by_side(pass, gates.value);
    if constexpr (std::is_same<Real, double>::value) {
      body(Fma<double>{}, gates);
    } else {
      if (plan.engine.tensor_cores) return body(Mma<Real, rows>{}, gates);
      body(Fma<Real>{}, gates);
    }
  };
  if (plan.work.shape.cell == Cell::lstm) return with_engine(std::integral_constant<int, 4>{});
  with_engine(std::integral_constant<int, 1>{});
}

template <class Real>
void Kernels<Real>::forward(const Plan& plan, const Forward* layers, void* scratch, int device,
                            void* stream) {
  const DeviceScope scope(device);
  with_types<Real, Pass::forward>(plan, [&](auto engine, auto gates) {
    run<decltype(engine), cuda::Forward<Real, gates.value>>(plan, layers, int(plan.work.shape.T), scratch,
                                                            static_cast<Stream>(stream));
  });
}

template <class Real>
void Kernels<Real>::backward(const Plan& plan, const Backward* layers, void* scratch, int device,
                             void* stream) {
  const DeviceScope scope(device);
  const RecurrenceShape& shape = plan.work.shape;
  with_types<Real, Pass::backward>(plan, [&](auto engine, auto gates) {
    using Step = cuda::Backward<Real, gates.value>;
    run<decltype(engine), Step>(plan, layers, int(shape.k2) + 1, scratch, static_cast<Stream>(stream));
    const Arguments<Step> args = arguments_of<Step>(plan, layers, static_cast<char*>(scratch));
    const int blocks = int((shape.B * shape.H + block_threads - 1) / block_threads);
    launch(describe(plan) + ", initial state", add_starts<Real, gates.value>,
           {{blocks, 1, plan.work.directions}, block_threads, 1, 0, false}, static_cast<Stream>(stream), args);
  });
}

// What a step needs is made once: a step is over so soon that the host would be behind.
template <class Step>
LaunchCells cells_of(const Plan& plan, CellsArguments<Step> args, int device, void* stream) {
  const std::string what = describe(plan) + ", cells";
  const LaunchShape shape{{plan.blocks, 1, 1}, block_threads, 1, 0, false};
  return [=](int p) mutable {
    const DeviceScope scope(device);
    args.p = p;
    launch(what, cells<Step>, shape, static_cast<Stream>(stream), args);
  };
}

template <class Real>
LaunchCells Kernels<Real>::forward_cells(const Plan& plan, const Forward& layer, const StateOf<Real>* sums,
                                         int device, void* stream) {
  const RecurrenceShape& shape = plan.work.shape;
  if (shape.cell == Cell::lstm)
    return cells_of<cuda::Forward<Real, 4>>(plan, {shape, layer, {}, sums, 0}, device, stream);
  return cells_of<cuda::Forward<Real, 1>>(plan, {shape, layer, {}, sums, 0}, device, stream);
}

template <class Real>
LaunchCells Kernels<Real>::backward_cells(const Plan& plan, const Backward& layer, const StateOf<Real>* sums,
                                          int device, void* stream) {
  const RecurrenceShape& shape = plan.work.shape;
  if (shape.cell == Cell::lstm)
    return cells_of<cuda::Backward<Real, 4>>(plan, {shape, layer, {layer.dc0, nullptr}, sums, 0}, device, stream);
  return cells_of<cuda::Backward<Real, 1>>(plan, {shape, layer, {}, sums, 0}, device, stream);
}

}  // namespace rnnfast::cuda
