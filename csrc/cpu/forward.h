// A layer forward: the projection of a chunk of steps, then the recurrence over them, chunk by chunk.
//
// A chunk is as many steps as make a full block of rows for the projection; its pre-activations are then
// still in cache when the recurrence reads them. A thread projects exactly the rows, or the hidden units,
// whose recurrence it computes, so the only hand-over between threads is h, once a step, and there is
// none where threads own batch rows.
#pragma once

#include "../dispatch.h"
#include "gemm.h"
#include "plan.h"
#include "unpacked.h"
#include "vmath.h"
#include "workspace.h"

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Real>
Engine engine() {
  return {Vec<Real>::width, sizeof(Real), tile_rows, l1_cache_bytes(), l2_cache_bytes()};
}

// What a thread owns of a recurrence.
struct Part {
  Range rows;          // batch rows
  Range unit_vectors;  // vectors of hidden units
};

inline Part part_of(const Team& team, const Plan& plan, Index rows, Index unit_vectors) {
  if (plan.split == Split::rows) return {team.share(rows), {0, unit_vectors}};
  return {{0, rows}, team.share(unit_vectors)};
}

// Adds up the biases; absent ones are zero.
template <class Real>
void add_biases(Index count, const Real* b_ih, const Real* b_hh, Real* sum) {
  for (Index n = 0; n < count; ++n) sum[n] = (b_ih ? b_ih[n] : Real(0)) + (b_hh ? b_hh[n] : Real(0));
}

// Where a step's cells stand: row (t, b) and, in processing order, the step before it.
struct Step {
  Index p, t, t_prev;
  Index in_chunk;  // the chunk's first step is 0
};

// The line that holds the end of a vector; the line of its beginning came with the vector before it.
template <int write, class Real>
RNNFAST_INLINE void prefetch_vector(const Real* from) {
  __builtin_prefetch(from + Vec<Real>::width - 1, write);
}

template <class Real>
struct LstmForward {
  static constexpr Index gates = 4;
  const LayerForward<Real>& layer;
  const Real* bias;
  Real* chunk_gates;  // (chunk, B, 4, H) where the layer does not keep its gates

  // Where the projection puts the pre-activations, and the recurrence finds them.
  Real* preactivations(Step at, Index b) const {
    const Index B = layer.shape.B;
    const Index row = layer.gates ? at.t * B + b : at.in_chunk * B + b;
    return (layer.gates ? layer.gates : chunk_gates) + row * 4 * layer.shape.H;
  }

  // Asks for what a vector of hidden units of row b will read, and write.
  RNNFAST_INLINE void prefetch(Step at, Index b, Index unit) const {
    const Index H = layer.shape.H;
    const Real* row = preactivations(at, b) + unit;
    for (Index gate = 0; gate < gates; ++gate) prefetch_vector<1>(row + gate * H);
    if (layer.c) prefetch_vector<1>(layer.c + (at.t * layer.shape.B + b) * H + unit);
    prefetch_vector<1>(layer.y + (at.t * layer.shape.B + b) * H + unit);
  }

  // Finishes one vector of hidden units of row b; sums[gate] is h[t-1] W_hh^T.
  RNNFAST_INLINE void operator()(Step at, Index b, Index unit, Index lanes, const Real* sums) const {
    using V = Vec<Real>;
    const Index H = layer.shape.H, B = layer.shape.B;
    Real* row = preactivations(at, b) + unit;
    const auto preactivation = [&](Index gate) {
      return V::load(row + gate * H, lanes) + V::load(sums + gate * V::width) +
             V::load(bias + gate * H + unit, lanes);
    };
    LstmGates<V> gate{preactivation(0), preactivation(1), preactivation(2), preactivation(3)};
    const Real* c_prev = at.p == 0 ? layer.c0 + b * H
                         : layer.c ? layer.c + (at.t_prev * B + b) * H
                                   : layer.c_n + b * H;
    V c, h;
    lstm_forward(gate, V::load(c_prev + unit, lanes), c, h);
    if (layer.gates) {
      gate.i.store(row, lanes);
      gate.f.store(row + H, lanes);
      gate.g.store(row + 2 * H, lanes);
      gate.o.store(row + 3 * H, lanes);
    }
    if (layer.c) c.store(layer.c + (at.t * B + b) * H + unit, lanes);
    if (!layer.c || at.p == layer.shape.T - 1) c.store(layer.c_n + b * H + unit, lanes);
    h.store(layer.y + (at.t * B + b) * H + unit, lanes);
    if (at.p == layer.shape.T - 1) h.store(layer.h_n + b * H + unit, lanes);
  }
};

template <class Real, class Nonlinearity>
struct RnnForward {
  static constexpr Index gates = 1;
  const LayerForward<Real>& layer;
  const Real* bias;

  // h takes the place of its pre-activation in y.
  Real* preactivations(Step at, Index b) const {
    return layer.y + (at.t * layer.shape.B + b) * layer.shape.H;
  }

  RNNFAST_INLINE void prefetch(Step at, Index b, Index unit) const {
    prefetch_vector<1>(preactivations(at, b) + unit);
  }

  RNNFAST_INLINE void operator()(Step at, Index b, Index unit, Index lanes, const Real* sums) const {
    using V = Vec<Real>;
    Real* row = preactivations(at, b) + unit;
    const V h = Nonlinearity::forward(V::load(row, lanes) + V::load(sums) +
                                      V::load(bias + unit, lanes));
    h.store(row, lanes);
    if (at.p == layer.shape.T - 1) h.store(layer.h_n + b * layer.shape.H + unit, lanes);
  }
};

// One thread's part of the whole layer; Right is how the weights are laid out.
template <class Real, class CellStep, class Right>
void forward_part(Team& team, const Plan& plan, const LayerForward<Real>& layer,
                  const CellStep& cell, const Right& w_ih,
                  const Right& w_hh, Index chunk, Real* buffer) {
  constexpr Index width = Vec<Real>::width;
  const Index T = layer.shape.T, B = layer.shape.B, I = layer.shape.I, H = layer.shape.H;
  const Columns<Real>& columns = w_hh.columns;
  const Part part = part_of(team, plan, B, columns.unit_vectors());
  const Index rows = part.rows.size();
  const Index blocks = ceil_div(rows, row_block);
  for (Index begin = 0; begin < T; begin += chunk) {
    const Index end = std::min(begin + chunk, T);
    const auto step = [&](Index p) {
      return layer.shape.reverse ? Step{p, T - 1 - p, T - p, p - begin}
                                 : Step{p, p, p - 1, p - begin};
    };
    const auto input = [&](Index m) {
      return layer.x + (step(begin + m / rows).t * B + part.rows.begin + m % rows) * I;
    };
    const auto preactivations = [&](Index m) {
      return cell.preactivations(step(begin + m / rows), part.rows.begin + m % rows);
    };
    multiply_rows<Real>(rows * (end - begin), input, w_ih, part.unit_vectors, preactivations);

    for (Index p = begin; p < end; ++p) {
      const Step at = step(p);
      const Real* previous = p == 0 ? layer.h0 : layer.y + at.t_prev * B * H;
      for (Index block = 0; block < blocks; ++block) {
        const Range own = share(rows, block, blocks);
        const Index first = part.rows.begin + own.begin;
        const Real* a[row_block];
        Real* sums[row_block];
        for (Index r = 0; r < own.size(); ++r) {
          a[r] = previous + (first + r) * H;
          sums[r] = buffer + r * panel_width<Real>;
        }
        for_each_piece(columns, part.unit_vectors, [&](Piece piece) {
          const auto for_each_cell = [&](auto&& visit) RNNFAST_LAMBDA {
            for (Index r = 0; r < own.size(); ++r)
              for (Index v = 0; v < piece.vectors; v += CellStep::gates)
                visit(r, v, columns.unit_vector(piece.panel, piece.first + v) * width);
          };
          for_each_cell([&](Index r, Index, Index unit) RNNFAST_LAMBDA { cell.prefetch(at, first + r, unit); });
          w_hh.multiply(own.size(), piece, a, {sums, width, false});
          for_each_cell([&](Index r, Index v, Index unit) RNNFAST_LAMBDA {
            cell(at, first + r, unit, std::min(width, H - unit), sums[r] + v * width);
          });
        });
      }
      if (plan.split == Split::units && p + 1 < T) team.barrier();
    }
  }
}

template <class Real, class MakeCell>
void run_forward(const LayerForward<Real>& layer, Index gates, MakeCell&& make_cell) {
  const LayerShape& shape = layer.shape;
  const Columns<Real> columns{shape.H, gates};
  const bool pack = shape.T * shape.B >= packing_pays;
  const Plan plan = plan_recurrence({shape.T, shape.B, shape.H, gates, shape.H, shape.I},
                                    engine<Real>(), shape.threads);
  const Index rows = plan.split == Split::rows ? ceil_div(shape.B, plan.threads) : shape.B;
  const Index chunk = std::clamp<Index>(row_block / rows, 1, shape.T);
  const Index ih_count = pack ? columns.panels() * shape.I * panel_width<Real> : 0;
  const Index hh_count = pack ? columns.panels() * shape.H * panel_width<Real> : 0;
  const Index buffer_count = row_block * panel_width<Real>;
  const Index chunk_count = gates == 4 && !layer.gates ? chunk * shape.B * columns.count() : 0;

  const auto bytes = [](Index count) { return Workspace::bytes_for<Real>(count); };
  Workspace& workspace =
      Workspace::with_room(bytes(ih_count) + bytes(hh_count) + bytes(columns.count()) +
                           bytes(chunk_count) + bytes(buffer_count * plan.threads));
  Real* packed_ih = workspace.take<Real>(ih_count);
  Real* packed_hh = workspace.take<Real>(hh_count);
  Real* bias = workspace.take<Real>(columns.count());
  Real* chunk_gates = workspace.take<Real>(chunk_count);
  Real* buffers = workspace.take<Real>(buffer_count * plan.threads);
  add_biases(columns.count(), layer.b_ih, layer.b_hh, bias);

  auto body = [&](Team& team) {
    const auto part = [&](const auto& w_ih, const auto& w_hh) {
      forward_part(team, plan, layer, make_cell(bias, chunk_gates), w_ih, w_hh, chunk,
                   buffers + team.rank * buffer_count);
    };
    if (!pack) {
      using Right = UnpackedColumns<Real>;
      return part(Right{columns, shape.I, layer.w_ih}, Right{columns, shape.H, layer.w_hh});
    }
    const Range panels = team.share(columns.panels());
    pack_columns(columns, panels, shape.I, layer.w_ih, packed_ih);
    pack_columns(columns, panels, shape.H, layer.w_hh, packed_hh);
    team.barrier();
    using Right = Packed<Real>;
    part(Right{columns, shape.I, packed_ih}, Right{columns, shape.H, packed_hh});
  };
  run_team(plan.threads, body);
  workspace.release();
}

template <class Real>
void layer_forward(const LayerForward<Real>& layer) {
  if (layer.shape.T == 0 || layer.shape.B == 0) return;
  if (layer.shape.cell == Cell::lstm) {
    run_forward(layer, 4, [&](const Real* bias, Real* chunk_gates) {
      return LstmForward<Real>{layer, bias, chunk_gates};
    });
    return;
  }
  with_rnn_cell(layer.shape.cell, [&](auto cell) {
    run_forward(layer, 1, [&](const Real* bias, Real*) {
      return RnnForward<Real, decltype(cell)>{layer, bias};
    });
  });
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
