// From a plan and addresses to launches: the same code on a GPU and on the emulator.
#pragma once

#include "cells.h"
#include "instances.h"
#include "kernels.h"
#include "pack.h"

namespace rnnfast::cuda {

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
  args.from_memory = comes_from_memory(plan.work);
  args.initial_rows = plan.work.pass == Pass::forward ? int(args.shape.B) : 0;
  const bool in_shared = has_vectors(plan);
  args.apart = in_shared || plan.apart;
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
  args.paired = is_resident(plan.method) && Step::sums == 4;
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
  if (is_resident(plan.method)) {
    shape.resident = plan.method == Method::resident;
    shape.cluster = shape.resident ? 1 : plan.blocks;
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
