// Which engine, and which instance of a recurrence's kernel, a plan names: from its numbers to template arguments.
// launch.h launches them.
#pragma once

#include <iterator>

#include "local.h"
#include "recurrence.h"
#include "resident.h"

namespace rnnfast::cuda {

// What the planner takes for the numbers of engines, against the engines.
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

// body(kernel) for the shape of a plan's blocks.
template <class Step, int number = 0, class Body>
void with_resident_kernel(const Plan& plan, Body&& body) {
  constexpr int clustered = number - resident_shape_count;
  if constexpr (clustered < 0) {
    constexpr ResidentShape shape = resident_shapes(Step::sums, number);
    if (plan.method == Method::resident && plan.shape == number)
      return body(recur_resident<Step, Shape<shape.rows, shape.steps, shape.columns>, ThroughL2>);
    with_resident_kernel<Step, number + 1>(plan, body);
  } else if constexpr (clustered < resident_cluster_shape_count(Step::pass, Step::gates)) {
    constexpr ResidentShape shape = resident_cluster_shapes(Step::sums, clustered);
    if (plan.method == Method::resident_cluster && plan.shape == clustered)
      return body(recur_resident<Step, Shape<shape.rows, shape.steps, shape.columns>, ThroughCluster>);
    with_resident_kernel<Step, number + 1>(plan, body);
  } else {
    throw std::logic_error(describe(plan) + ": no kernel for this plan");
  }
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

}  // namespace rnnfast::cuda
