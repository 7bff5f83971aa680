// One thread's part of a layer forward: chunk by chunk, the projection of a chunk of steps, then the recurrence over
// them.
//
// A thread projects exactly the rows, or the hidden units, whose recurrence it computes, so the only hand-over between
// threads is h, once a step, and there is none where threads own batch rows. Or one thread computes the recurrence, and
// the others project the next chunk for it.
//
// A projected h takes one product more a step, of what the cells give, and one hand-over more.
#pragma once

#include "forward_cells.h"
#include "gemm.h"
#include "steps.h"
#include "sums.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// Input and Hidden are how the weights are laid out.
template <class Storage, class CellLayer, class Input, class Hidden>
class ForwardPart {
 public:
  using Element = ElementOf<Storage>;
  using Real = RealOf<Storage>;

  // `sums` is the chunks' of all threads; `dense_sums` this thread's, where the plan has any.
  ForwardPart(Team& team, const Plan& plan, const LayerForward<Storage>& layer, const CellLayer& cell_layer,
              const Input& w_ih, const Hidden& w_hh, const Input& w_hr, Real* sums, Real* dense_sums)
      : team_(team), plan_(plan), layer_(layer), shape_(layer.shape), cell_layer_(cell_layer),
        w_ih_(w_ih), w_hh_(w_hh), w_hr_(w_hr), dense_{w_ih.columns, layer.shape.H, dense_sums},
        part_(part_of(team, plan, layer, w_hh.columns.unit_vectors())),
        chunk_sums_(Sums::of(w_hh.columns, team, plan, layer.shape, part_.rows, sums)), next_sums_(chunk_sums_) {
    if (shares(Split::steps)) next_sums_.first += Sums::size(w_hh.columns, chunk_sums_.rows);
  }

  void run() {
    const bool recurs = !shares(Split::steps) || team_.rank == 0;
    Range chunk = chunk_from(0);
    project_share(chunk, 1 / double(team_.size), chunk_sums_);
    while (chunk.size() > 0) {
      if (shares(Split::steps)) team_.barrier();  // everybody's part of the chunk is there
      const Range next = chunk_from(chunk.end);
      if (recurs) recur(chunk);
      project_share(next, plan_.own_share, next_sums_);
      std::swap(chunk_sums_, next_sums_);
      chunk = next;
    }
    if (recurs) keep_last_states();
  }

 private:
  using Sums = ChunkSums<Element>;
  static constexpr Index width = Vec<Real>::width;
  static constexpr Index gates = CellLayer::gates;

  bool shares(Split split) const { return plan_.split == split; }

  // This thread's rows at time t, and at step p.
  Range rows_at(Index t) const { return overlap({0, shape_.rows_at(t)}, part_.rows); }
  Range rows_of(Index p) const { return rows_at(shape_.time(p)); }
  Index count_rows(Range steps) const {
    Index rows = 0;
    for (Index p = steps.begin; p < steps.end; ++p) rows += rows_of(p).size();
    return rows;
  }

  Range chunk_from(Index begin) const {
    if (begin == shape_.T) return {begin, begin};
    return {begin, begin + steps_within(chunk_sums_.rows, shape_.T - begin,
                                        [&](Index n) { return rows_of(begin + n).size(); })};
  }

  // The projection of steps, whose rows are those from m on of their chunk.
  void project(Range steps, Index m, const Sums& chunk) {
    const Columns<Element>& columns = w_ih_.columns;
    for_each_block(steps, [&](Index p) { return rows_of(p); }, [&](Index count, const GroupRow* rows) {
      const Element* in[row_block];
      for (Index r = 0; r < count; ++r)
        in[r] = as_elements(layer_.x + (shape_.first_row(shape_.time(rows[r].group)) + rows[r].row) * shape_.I);
      const Range vectors = plan_.dense ? Range{0, columns.unit_vectors()} : part_.unit_vectors;
      for_each_piece(columns, vectors, false, [&](const Piece& piece) {
        Real* to[row_block];
        for (Index r = 0; r < count; ++r) to[r] = plan_.dense ? dense_.row(piece, r) : chunk.row(piece, m + r);
        w_ih_.multiply(count, piece, in, {to, width, false});
      });
      if (plan_.dense)
        for (Index r = 0; r < count; ++r) dense_.spread(r, w_hh_.columns, chunk, m + r);
      m += count;
    });
  }

  // This thread's part of the projection of a chunk; where threads share its steps, the first does so much of it.
  void project_share(Range chunk, double first_share, const Sums& to) {
    if (!shares(Split::steps)) return project(chunk, 0, to);
    const Index first = team_.size > 1 ? Index(first_share * double(chunk.size())) : chunk.size();
    Range own{chunk.begin, chunk.begin + first};
    if (team_.rank > 0) {
      const Range others = share(chunk.size() - first, team_.rank - 1, team_.size - 1);
      own = {own.end + others.begin, own.end + others.end};
    }
    project(own, count_rows({chunk.begin, own.begin}), to);
  }

  void recur(Range chunk) {
    Index m = 0;
    for (Index p = chunk.begin; p < chunk.end; ++p) {
      step(p, m);
      m += rows_of(p).size();
    }
  }

  // The recurrence of step p, whose rows are those from m on of the chunk.
  void step(Index p, Index m) {
    const bool projected = shape_.projection > 0, meets = shares(Split::units);
    const Index t = shape_.time(p), t_prev = shape_.before(t);
    const Index carried = std::min(shape_.rows_at(t_prev), shape_.rows_at(t));
    const auto cells = cell_layer_.cells(t, carried);
    const Index P = shape_.h_size();
    const Storage* previous = carried > 0 ? layer_.y + shape_.first_row(t_prev) * P : nullptr;
    const Range rows = rows_at(t);
    const Index blocks = ceil_div(rows.size(), row_block);
    for (Index block = 0; block < blocks; ++block) {
      const Range own = share(rows.size(), block, blocks);
      const Index first = rows.begin + own.begin;
      const Element* a[row_block];
      for (Index r = 0; r < own.size(); ++r)
        a[r] = as_elements((first + r < carried ? previous : layer_.h0) + (first + r) * P);
      if (meets) request_rows(own.size(), a, elements_in<Element>(P));
      for_each_piece(w_hh_.columns, part_.unit_vectors, p % 2 == 1, [&](const Piece& piece) {
        Real* to[row_block];
        for (Index r = 0; r < own.size(); ++r) to[r] = chunk_sums_.row(piece, m + own.begin + r);
        multiply_and_finish(piece, first, own.size(), a, to, cells);
      });
    }
    if (projected) {
      if (meets) team_.barrier();
      project_h(t, rows);
    }
    if (meets && (p + 1 < shape_.T || projected)) team_.barrier();
  }

  // Adds the recurrence's part to the sums of some rows, the first of which is batch row `first`, and applies the cells.
  template <class Cells>
  RNNFAST_INLINE void multiply_and_finish(const Piece& piece, Index first, Index rows, const Element* const* a,
                                          Real* const* to, const Cells& cells) {
    const Columns<Element>& columns = w_hh_.columns;
    const Index H = columns.units;
    const auto for_each_cell = [&](auto&& visit) RNNFAST_LAMBDA {
      for (Index v = 0; v < piece.vectors; v += gates) {
        const Index unit = columns.unit_vector(piece.panel, piece.first + v) * width;
        for (Index r = 0; r < rows; ++r) visit(r, v, unit);
      }
    };
    for_each_cell([&](Index r, Index, Index unit) RNNFAST_LAMBDA { cells.prefetch(first + r, unit); });
    w_hh_.multiply(rows, piece, a, {to, width, true});
    for_each_cell([&](Index r, Index v, Index unit) RNNFAST_LAMBDA {
      const Real* sum = to[r] + v * width;
      if (H - unit >= width)
        cells(first + r, unit, width, sum);
      else
        cells(first + r, unit, H - unit, sum);
    });
  }

  // h of time t from what the cells gave: this thread's rows, or its share of the columns.
  void project_h(Index t, Range rows) {
    const Index H = shape_.H, P = shape_.projection;
    const Index vectors = w_hr_.columns.unit_vectors();
    const Storage* from = cell_layer_.projected(t) + rows.begin * H;
    Storage* h = layer_.y + (shape_.first_row(t) + rows.begin) * P;
    multiply_rows<Element>(
        rows.size(), [&](Index r) { return from + r * H; }, w_hr_,
        shares(Split::units) ? team_.share(vectors) : Range{0, vectors}, [&](Index r) { return h + r * P; });
  }

  // Each sequence's last states, as far as this thread made them; a projected h is there for everybody.
  void keep_last_states() {
    const Index H = shape_.H, P = shape_.h_size();
    const Range units{part_.unit_vectors.begin * width, std::min(part_.unit_vectors.end * width, H)};
    const Range of_h = shape_.projection > 0 ? (shares(Split::units) ? team_.share(P) : Range{0, P}) : units;
    for (Index t = 0; t < shape_.T; ++t) {
      const Range ended = overlap({shape_.rows_at(shape_.after(t)), shape_.rows_at(t)}, part_.rows);
      for (Index b = ended.begin; b < ended.end; ++b) {
        const Index row = shape_.first_row(t) + b;
        if (layer_.h_n) std::copy_n(layer_.y + row * P + of_h.begin, of_h.size(), layer_.h_n + b * P + of_h.begin);
        if (layer_.c)
          std::copy_n(layer_.c + row * H + units.begin, units.size(), layer_.c_n + b * H + units.begin);
      }
    }
  }

  Team& team_;
  const Plan& plan_;
  const LayerForward<Storage>& layer_;
  const LayerShape& shape_;
  const CellLayer cell_layer_;
  const Input w_ih_;
  const Hidden w_hh_;
  const Input w_hr_;
  const DenseSums<Element> dense_;
  const Part part_;
  Sums chunk_sums_, next_sums_;  // of the chunk in work, and of the one that others may already project
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
