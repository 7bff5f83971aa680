// The gates of an LSTM layer computed again, for a backward pass whose forward pass has not kept them.
//
// Every h is known by then, so nothing is sequential: the rows of many steps go through both products at
// once. Bound by the FMA units; a third more arithmetic in training, for 4H numbers a step and row that need
// not be kept. Sums are taken as the forward pass takes them (forward_part.h), so the gates are the same bits.
#pragma once

#include "forward.h"
#include "steps.h"

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Storage>
class GateRecompute {
 public:
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;

  explicit GateRecompute(const LayerBackward<Storage>& layer)
      : layer_(layer),
        needed_(layer.shape.cell == Cell::lstm && !layer.gates),
        pack_(needed_ && plan_forward(layer.shape, engine<Element>()).pack) {}

  // Whether there are no gates.
  bool needed() const { return needed_; }

  // A thread's scratch, in numbers.
  static constexpr Index buffer_count = row_block * panel_width<Element>;

  // Its arrays in the workspace (Workspace::with).
  template <class Take>
  void lay_out(Take&& take) {
    take(packed_ih_, ih_count());
    take(packed_hh_, hh_count());
    take(bias_, bias_count());
  }
  void prepare() {
    if (needed_) add_biases(bias_count(), layer_.b_ih, layer_.b_hh, bias_);
  }

  // Packs this thread's share of the weights. Everybody's is needed by run().
  void pack_share(Team& team) const {
    if (!pack_) return;
    const Columns<Element> columns = this->columns();
    const Range panels = team.share(columns.panels());
    pack_columns(columns, panels, layer_.shape.I, layer_.w_ih, packed_ih_);
    pack_columns(columns, panels, h_size(), layer_.w_hh, packed_hh_);
  }

  // This thread's part of the gates of some rows of all steps.
  void run(Team& team, const StepInputs<Storage>& inputs, const RowRing<Real>& gates, Real* buffer) const {
    const Index I = layer_.shape.I;
    if (pack_)
      return multiply(team, inputs, Packed<Element>{columns(), I, packed_ih_},
                      Packed<Element>{columns(), h_size(), packed_hh_}, gates, buffer);
    multiply(team, inputs, UnpackedColumns<Element>{columns(), I, layer_.w_ih},
             UnpackedColumns<Element>{columns(), h_size(), layer_.w_hh}, gates, buffer);
  }

 private:
  Columns<Element> columns() const { return {layer_.shape.H, 4}; }
  Index h_size() const { return layer_.shape.h_size(); }
  Index ih_count() const { return pack_ ? Packed<Element>::size(columns(), layer_.shape.I) : 0; }
  Index hh_count() const { return pack_ ? Packed<Element>::size(columns(), h_size()) : 0; }
  Index bias_count() const { return needed_ ? columns().count() : 0; }

  template <class Right>
  void multiply(Team& team, const StepInputs<Storage>& inputs, const Right& w_ih, const Right& w_hh,
                const RowRing<Real>& gates, Real* buffer) const {
    constexpr Index width = Vec<Real>::width;
    const Index H = layer_.shape.H;
    const Index rows = inputs.rows.size();
    // Threads share the longer side.
    const bool by_rows = rows >= row_block * team.size || rows >= columns().count();
    const Range part = by_rows ? team.share(rows) : Range{0, rows};
    const Range all_vectors{0, columns().unit_vectors()};
    const Range vectors = by_rows ? all_vectors : team.share(all_vectors.end);

    const Index blocks = ceil_div(part.size(), row_block);
    for (Index block = 0; block < blocks; ++block) {
      const Range own = share(part.size(), block, blocks);
      const Element *x[row_block], *h[row_block];
      Real *sums[row_block], *row[row_block];
      for (Index r = 0; r < own.size(); ++r) {
        const Index k = part.begin + own.begin + r;
        x[r] = as_elements(inputs.x(k));
        h[r] = as_elements(inputs.h_prev(k));
        sums[r] = buffer + r * panel_width<Element>;
        row[r] = gates.at(inputs.rows.begin + k);
      }
      for_each_piece(columns(), vectors, false, [&](const Piece& piece) {
        w_ih.multiply(own.size(), piece, x, {sums, width, false});
        w_hh.multiply(own.size(), piece, h, {sums, width, true});
        const Index unit = piece.panel * width;
        for (Index r = 0; r < own.size(); ++r)
          finish(sums[r], unit, std::min(width, H - unit), row[r] + unit);
      });
    }
  }

  // The gates of one vector of units, from the sums of their products.
  RNNFAST_INLINE void finish(const Real* sums, Index unit, Index lanes, Real* to) const {
    using V = Vec<Real>;
    const Index H = layer_.shape.H;
    const auto preactivation = [&](Index gate) RNNFAST_LAMBDA {
      return V::load(sums + gate * V::width) + V::load(bias_ + gate * H + unit, lanes);
    };
    LstmGates<V> gate{preactivation(0), preactivation(1), preactivation(2), preactivation(3)};
    lstm_gates(gate);
    gate.i.store(to, lanes);
    gate.f.store(to + H, lanes);
    gate.g.store(to + 2 * H, lanes);
    gate.o.store(to + 3 * H, lanes);
  }

  const LayerBackward<Storage>& layer_;
  const bool needed_, pack_;
  Element *packed_ih_ = nullptr, *packed_hh_ = nullptr;
  Real* bias_ = nullptr;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
