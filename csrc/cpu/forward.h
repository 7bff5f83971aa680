// A layer forward: the projection of a chunk of steps, then the recurrence over them, chunk by chunk.
//
// A chunk is as many steps as make a full block of rows for the projection; its pre-activations are then
// still in cache when the recurrence reads them. A thread projects exactly the rows, or the hidden units,
// whose recurrence it computes, so the only hand-over between threads is h, once a step, and there is
// none where threads own batch rows. Packed weights are kept for the next call (packs.h).
#pragma once

#include "../dispatch.h"
#include "fingerprint.h"
#include "gemm.h"
#include "packs.h"
#include "plan.h"
#include "unpacked.h"
#include "vmath.h"
#include "workspace.h"

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Element>
Engine engine() {
  return {Vec<Element>::width, sizeof(Element),   tile_rows,        row_block,
          l1_cache_bytes(),    l2_cache_bytes(), terms_in<Element>};
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
template <class Storage>
void add_biases(Index count, const Storage* b_ih, const Storage* b_hh, RealOf<Storage>* sum) {
  using Real = RealOf<Storage>;
  for (Index n = 0; n < count; ++n)
    sum[n] = (b_ih ? load(b_ih + n) : Real(0)) + (b_hh ? load(b_hh + n) : Real(0));
}

// Where a step stands: t, and in processing order p; the chunk's first step has in_chunk 0.
struct Step {
  Index p, t, t_prev;
  Index in_chunk;
};

// The line that holds the end of a vector; the line of its beginning came with the vector before it.
template <class Storage>
RNNFAST_INLINE void prefetch_vector(const Storage* from) {
  __builtin_prefetch(from + Vec<RealOf<Storage>>::width - 1, 1);
}

// The cells of one step: `operator()` finishes one vector of hidden units of row b, where sums[gate] is
// h[t-1] W_hh^T; `prefetch` asks for the lines that it will use.
template <class Storage>
struct LstmCells {
  using Real = RealOf<Storage>;
  Index H;
  const Real* bias;
  Real* preactivations;  // (B, 4, H); the gates take their place if they are kept
  bool keep_gates;
  const Real* c_prev;  // (B, H)
  Real* c;             // (B, H)
  Storage* h;          // (B, H)

  RNNFAST_INLINE void prefetch(Index b, Index unit) const {
    const Real* row = preactivations + b * 4 * H + unit;
    for (Index gate = 0; gate < 4; ++gate) prefetch_vector(row + gate * H);
    prefetch_vector(c + b * H + unit);
    prefetch_vector(h + b * H + unit);
  }

  RNNFAST_INLINE void operator()(Index b, Index unit, Index lanes, const Real* sums) const {
    using V = Vec<Real>;
    Real* row = preactivations + b * 4 * H + unit;
    const auto preactivation = [&](Index gate) RNNFAST_LAMBDA {
      return V::load(row + gate * H, lanes) + V::load(sums + gate * V::width) +
             V::load(bias + gate * H + unit, lanes);
    };
    LstmGates<V> gate{preactivation(0), preactivation(1), preactivation(2), preactivation(3)};
    V c_new, h_new;
    lstm_forward(gate, V::load(c_prev + b * H + unit, lanes), c_new, h_new);
    if (keep_gates) {
      gate.i.store(row, lanes);
      gate.f.store(row + H, lanes);
      gate.g.store(row + 2 * H, lanes);
      gate.o.store(row + 3 * H, lanes);
    }
    c_new.store(c + b * H + unit, lanes);
    store(h_new, h + b * H + unit, lanes);
  }
};

template <class Storage, class Nonlinearity>
struct RnnCells {
  using Real = RealOf<Storage>;
  Index H;
  const Real* bias;
  const Real* preactivations;  // (B, H); may be where h goes
  Storage* h;                  // (B, H)

  RNNFAST_INLINE void prefetch(Index b, Index unit) const { prefetch_vector(h + b * H + unit); }

  RNNFAST_INLINE void operator()(Index b, Index unit, Index lanes, const Real* sums) const {
    using V = Vec<Real>;
    const Index at = b * H + unit;
    const V a = V::load(preactivations + at, lanes) + V::load(sums) + V::load(bias + unit, lanes);
    store(Nonlinearity::forward(a), h + at, lanes);
  }
};

// The layer as its recurrence sees it: where pre-activations are (the projection puts them there), and the
// cells of a step.
template <class Storage>
struct LstmForward {
  using Real = RealOf<Storage>;
  static constexpr Index gates = 4;
  const LayerForward<Storage>& layer;
  const Real* bias;
  Real* chunk_gates;  // (chunk, B, 4, H) where the layer does not keep its gates

  static bool needs_chunk(const LayerForward<Storage>& layer) { return !layer.gates; }
  Real* preactivations(Step at) const {
    const Index step = 4 * layer.shape.B * layer.shape.H;
    return layer.gates ? layer.gates + at.t * step : chunk_gates + at.in_chunk * step;
  }
  LstmCells<Storage> cells(Step at) const {
    const Index step = layer.shape.B * layer.shape.H;
    const Real* c_prev = at.p == 0 ? layer.c0 : layer.c ? layer.c + at.t_prev * step : layer.c_n;
    Real* c = layer.c ? layer.c + at.t * step : layer.c_n;
    return {layer.shape.H, bias, preactivations(at), layer.gates != nullptr, c_prev, c, layer.y + at.t * step};
  }
};

template <class Storage, class Nonlinearity>
struct RnnForward {
  using Real = RealOf<Storage>;
  static constexpr Index gates = 1;
  const LayerForward<Storage>& layer;
  const Real* bias;
  Real* chunk;  // (chunk, B, H) where y cannot hold them

  static bool needs_chunk(const LayerForward<Storage>&) { return !std::is_same_v<Storage, Real>; }
  Real* preactivations(Step at) const {
    const Index step = layer.shape.B * layer.shape.H;
    if constexpr (std::is_same_v<Storage, Real>)
      return layer.y + at.t * step;
    else
      return chunk + at.in_chunk * step;
  }
  RnnCells<Storage, Nonlinearity> cells(Step at) const {
    return {layer.shape.H, bias, preactivations(at), layer.y + at.t * layer.shape.B * layer.shape.H};
  }
};

// One thread's part of the whole layer; Right is how the weights are laid out.
template <class Storage, class CellLayer, class Right>
void forward_part(Team& team, const Plan& plan, const LayerForward<Storage>& layer,
                  const CellLayer& cell_layer, const Right& w_ih, const Right& w_hh,
                  RealOf<Storage>* buffer) {
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;
  constexpr Index width = Vec<Real>::width;
  constexpr Index gates = CellLayer::gates;
  const Index T = layer.shape.T, B = layer.shape.B, I = layer.shape.I, H = layer.shape.H;
  const Columns<Element>& columns = w_hh.columns;
  const Part part = part_of(team, plan, B, columns.unit_vectors());
  const Index rows = part.rows.size();
  const Index blocks = ceil_div(rows, row_block);
  for (Index begin = 0; begin < T; begin += plan.chunk) {
    const Index end = std::min(begin + plan.chunk, T);
    const auto step = [&](Index p) {
      return layer.shape.reverse ? Step{p, T - 1 - p, T - p, p - begin}
                                 : Step{p, p, p - 1, p - begin};
    };
    const auto input = [&](Index m) {
      return layer.x + (step(begin + m / rows).t * B + part.rows.begin + m % rows) * I;
    };
    const auto preactivations = [&](Index m) {
      return cell_layer.preactivations(step(begin + m / rows)) +
             (part.rows.begin + m % rows) * gates * H;
    };
    multiply_rows<Element>(rows * (end - begin), input, w_ih, part.unit_vectors, preactivations);

    for (Index p = begin; p < end; ++p) {
      const Step at = step(p);
      const auto cells = cell_layer.cells(at);
      const Storage* previous = p == 0 ? layer.h0 : layer.y + at.t_prev * B * H;
      for (Index block = 0; block < blocks; ++block) {
        const Range own = share(rows, block, blocks);
        const Index first = part.rows.begin + own.begin;
        const Element* a[row_block];
        Real* sums[row_block];
        for (Index r = 0; r < own.size(); ++r) {
          a[r] = as_elements(previous + (first + r) * H);
          sums[r] = buffer + r * panel_width<Element>;
        }
        for_each_piece(columns, part.unit_vectors, p % 2 == 1, [&](Piece piece) {
          const auto for_each_cell = [&](auto&& visit) RNNFAST_LAMBDA {
            for (Index v = 0; v < piece.vectors; v += gates) {
              const Index unit = columns.unit_vector(piece.panel, piece.first + v) * width;
              for (Index r = 0; r < own.size(); ++r) visit(r, v, unit);
            }
          };
          for_each_cell([&](Index r, Index, Index unit)
                            RNNFAST_LAMBDA { cells.prefetch(first + r, unit); });
          w_hh.multiply(own.size(), piece, a, {sums, width, false});
          for_each_cell([&](Index r, Index v, Index unit) RNNFAST_LAMBDA {
            const Real* sum = sums[r] + v * width;
            if (H - unit >= width)
              cells(first + r, unit, width, sum);
            else
              cells(first + r, unit, H - unit, sum);
          });
        });
      }
      if (plan.split == Split::units && p + 1 < T) team.barrier();
    }
  }
  // The last step's states, as far as this thread made them.
  const Index last = layer.shape.reverse ? 0 : T - 1;
  const Index unit = part.unit_vectors.begin * width;
  const Index units = std::min(part.unit_vectors.end * width, H) - unit;
  for (Index b = part.rows.begin; b < part.rows.end; ++b) {
    const Index from = (last * B + b) * H + unit, to = b * H + unit;
    std::copy_n(layer.y + from, units, layer.h_n + to);
    if (layer.c) std::copy_n(layer.c + from, units, layer.c_n + to);
  }
}

template <class CellLayer, class Storage>
void run_forward(const LayerForward<Storage>& layer) {
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;
  constexpr Index gates = CellLayer::gates;
  const LayerShape& shape = layer.shape;
  const Columns<Element> columns{shape.H, gates};
  const Plan plan = plan_forward(shape, engine<Element>());
  const Index ih_count = plan.pack ? Packed<Element>::size(columns, shape.I) : 0;
  const Index hh_count = plan.pack ? Packed<Element>::size(columns, shape.H) : 0;
  const Index buffer_count = row_block * panel_width<Element>;
  const Index chunk_count =
      CellLayer::needs_chunk(layer) ? plan.chunk * shape.B * columns.count() : 0;

  const auto bytes = [](Index count) { return Workspace::bytes_for<Real>(count); };
  const auto element_bytes = [](Index count) { return Workspace::bytes_for<Element>(count); };
  const std::size_t packed_bytes = element_bytes(ih_count) + element_bytes(hh_count);
  Pack pack({layer.w_ih, layer.w_hh, shape.I, shape.H, gates, Vec<Element>::width, sizeof(Storage)},
            packed_bytes, hash_bytes);
  const std::size_t own_bytes = pack.memory() ? 0 : packed_bytes;
  Workspace& workspace =
      Workspace::with_room(own_bytes + bytes(columns.count()) + bytes(chunk_count) +
                           bytes(buffer_count * plan.threads));
  auto* own = workspace.take<std::byte>(static_cast<Index>(own_bytes));
  std::byte* packed = pack.memory() ? pack.memory() : own;
  auto* packed_ih = reinterpret_cast<Element*>(packed);
  auto* packed_hh = reinterpret_cast<Element*>(packed + element_bytes(ih_count));
  Real* bias = workspace.take<Real>(columns.count());
  Real* chunk_preactivations = workspace.take<Real>(chunk_count);
  Real* buffers = workspace.take<Real>(buffer_count * plan.threads);
  add_biases(columns.count(), layer.b_ih, layer.b_hh, bias);

  auto body = [&](Team& team) {
    const auto part = [&](const auto& w_ih, const auto& w_hh) {
      forward_part(team, plan, layer, CellLayer{layer, bias, chunk_preactivations}, w_ih, w_hh,
                   buffers + team.rank * buffer_count);
    };
    if (!plan.pack) {
      using Right = UnpackedColumns<Element>;
      return part(Right{columns, shape.I, layer.w_ih}, Right{columns, shape.H, layer.w_hh});
    }
    pack.refresh(team, [&] {
      const Range panels = team.share(columns.panels());
      pack_columns(columns, panels, shape.I, layer.w_ih, packed_ih);
      pack_columns(columns, panels, shape.H, layer.w_hh, packed_hh);
    });
    using Right = Packed<Element>;
    part(Right{columns, shape.I, packed_ih}, Right{columns, shape.H, packed_hh});
  };
  run_team(plan.threads, body);
  pack.settle();
  workspace.release();
}

template <class Storage>
void layer_forward(const LayerForward<Storage>& layer) {
  if (layer.shape.T == 0 || layer.shape.B == 0) return;
  if (layer.shape.cell == Cell::lstm) return run_forward<LstmForward<Storage>>(layer);
  with_rnn_cell(layer.shape.cell,
                [&](auto cell) { run_forward<RnnForward<Storage, decltype(cell)>>(layer); });
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
