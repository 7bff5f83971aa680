// How blocks whose registers hold all weights (resident.h) hand vectors on: through L2 to any blocks, or through shared
// memory to the other blocks of a cluster. Either way a number says itself that it has arrived (exchange.h).
//
// Both have, for the group's column n in step p:
//   begin, end   before the first step and after the last one; all threads
//   source       whence a lane gets the vectors of a column: the first one, then next(p, ...) that after step p
//   read         16 bytes of it, which may not have arrived
//   empty        16 bytes of it that have been read
//   target       where a cell's numbers of the next step's vector go: put them, step after step
//   pass_on      what the threads of a warp have put; all lanes, whose cells of a column have the same `sends`
#pragma once

#include "arguments.h"
#include "engine.h"

namespace rnnfast::cuda {

// Each step has a place of its own in the output, or memory like it, so nothing is ever emptied.
template <class Step, int columns, int units>
struct ThroughL2 {
  using Real = typename Step::Real;
  static constexpr bool is_far = true;      // vectors, so that whatever is read meanwhile comes before them
  static constexpr bool are_taken = false;  // numbers, as an instruction takes them: engine.h. Here they are outputs

  const Arguments<Step>& args;
  const Step step;
  const int group;
  Real *const exchange, *const initial;  // (rows, stride), (initial rows, stride)
  const Real* const zeros;
  const Index stride, on;  // from a row to the next one, from a step to the next one

  RNNFAST_DEVICE ThroughL2(const Arguments<Step>& arguments, const Step& of)
      : args(arguments),
        step(of),
        group(block_index().y),
        exchange(computed_once(args.exchange[block_index().z])),
        initial(args.initial[block_index().z]),
        zeros(computed_once(initial + Index(args.initial_rows) * args.tiling.exchange_stride)),
        stride(args.tiling.exchange_stride),
        on(computed_once(step.rows_on() * stride)) {}

  RNNFAST_DEVICE void begin() const {}
  RNNFAST_DEVICE void end() const {}

  // Whose column does not exist gets the group's last one, and nobody wants its sums.
  struct Source {
    typename Step::Column column;
    Index initial, at;  // of the vector that comes in, and of the one that step p sends
  };
  RNNFAST_DEVICE Source source(int p, int n, const typename Step::Column& column) const {
    const int index = group * columns + n, last = args.tiling.columns - 1;
    return {column, (index < last ? index : last) * stride, step.row(p, column) * stride};
  }
  RNNFAST_DEVICE const Real* first(const Source& of) const {
    return step.is_initial(args.begin) ? initial + of.initial : zeros;
  }
  RNNFAST_DEVICE const Real* next(int p, Source& of) const {
    const Real* vector = exchange + of.at;
    of.at += on;
    return p + 1 < args.end && step.arrives(p + 1, of.column) ? vector : zeros;
  }

  RNNFAST_DEVICE static uint4 read(const Real* from) { return FromGlobal::read(reinterpret_cast<const uint4*>(from)); }
  RNNFAST_DEVICE void empty(const Real*) const {}

  struct Target {
    Index at;
  };
  RNNFAST_DEVICE Target target(int p, int, const typename Step::Column& column) const {
    return {step.row(p, column) * stride};
  }
  RNNFAST_DEVICE void put(int, const Target& target, int unit, const typename Step::Outputs& outputs) const {
    Real* out = exchange + target.at;
    step.for_each_sent(unit, outputs, [&](int k, Real value) {
      publish(InGlobal{}, reinterpret_cast<BitsOf<Real>*>(out + k), never_absent(value));
    });
  }
  RNNFAST_DEVICE void pass_on(int, Target& target, bool) const {
    target.at += on;
  }
};

// Every block has the vectors of two steps in turn. Whoever reads numbers empties their places at once, before the
// barrier of its block's step. No peer is further than that: it begins its next step only with what this block computes
// after the barrier.
//
// A warp collects what its cells have put, and sends it 16 bytes at a time to all blocks, its own too. So vectors, and
// the parts of gates in them, are whole 16 bytes.
template <class Step, int columns, int units>
struct ThroughCluster {
  using Real = typename Step::Real;
  using Tile = Mma<Real, 1>;
  static constexpr bool is_far = false, are_taken = true;
  static constexpr int chunk = 16 / sizeof(Real);        // numbers in 16 bytes
  static constexpr int lanes = units < 32 ? units : 32;  // side by side, whose cells are in the same column
  static constexpr int chunks = lanes / chunk;
  static_assert(units % lanes == 0 && lanes % chunk == 0, "a warp's units of a column are whole chunks");

  const Arguments<Step>& args;
  const Step step;
  const int group, block, thread, stride;
  Real* const vectors;    // (slots, columns, stride)
  Real* const zeros;      // as many as a lane looks for
  Real* const collected;  // (sent, 32) of this thread's warp

  RNNFAST_DEVICE ThroughCluster(const Arguments<Step>& arguments, const Step& of)
      : args(arguments),
        step(of),
        group(block_index().y),
        block(block_index().x),
        thread(thread_index()),
        stride(args.tiling.stride),
        vectors(reinterpret_cast<Real*>(shared_memory_once() + args.shared.vectors)),
        zeros(vectors + resident_slots * columns * stride),
        collected(zeros + args.tiling.zeros + thread / 32 * (Step::sent * 32)) {}

  RNNFAST_DEVICE Real* vector(int p, int n) const { return vectors + (p % resident_slots * columns + n) * stride; }

  // All places empty, and what comes in at the first step.
  RNNFAST_DEVICE void begin() const {
    const int terms = step.terms(), numbers = resident_slots * columns * stride;
    for (int at = thread; at < numbers + args.tiling.zeros; at += block_threads) {
      const int n = at / stride, k = at % stride, index = group * columns + n;
      BitsOf<Real> bits = at < numbers ? BitsOf<Real>(~BitsOf<Real>(0)) : BitsOf<Real>(0);
      if (n < columns && index < args.tiling.columns && k < terms && step.is_initial(0))
        bits = never_absent(Tile::taken(step.initial(index, k)));
      publish(InShared{}, reinterpret_cast<BitsOf<Real>*>(vectors + at), bits);
    }
    sync_cluster();
  }
  // No block's memory goes away while a peer writes to it.
  RNNFAST_DEVICE void end() const { sync_cluster(); }

  struct Source {
    typename Step::Column column;
    int n;  // of the group, or -1
  };
  RNNFAST_DEVICE Source source(int, int n, const typename Step::Column& column) const {
    return {column, group * columns + n < args.tiling.columns ? n : -1};
  }
  RNNFAST_DEVICE const Real* first(const Source& of) const {
    return step.is_initial(args.begin) && of.n >= 0 ? vector(args.begin, of.n) : zeros;
  }
  RNNFAST_DEVICE const Real* next(int p, const Source& of) const {
    return of.n >= 0 && p + 1 < args.end && step.arrives(p + 1, of.column) ? vector(p + 1, of.n) : zeros;
  }

  RNNFAST_DEVICE static uint4 read(const Real* from) { return FromShared::read(reinterpret_cast<const uint4*>(from)); }

  RNNFAST_DEVICE void empty(const Real* from) const {
    if (from < zeros)
      publish(InShared{}, reinterpret_cast<uint4*>(const_cast<Real*>(from)), uint4{~0u, ~0u, ~0u, ~0u});
  }

  struct Target {
    int n;  // column of the group
  };
  RNNFAST_DEVICE Target target(int, int n, const typename Step::Column&) const { return {n}; }
  RNNFAST_DEVICE void put(int, const Target&, int unit, const typename Step::Outputs& outputs) const {
    Real* own = collected + thread % 32;
    step.for_each_sent(unit, outputs, [&](int, Real value) {
      publish(InShared{}, reinterpret_cast<BitsOf<Real>*>(own), never_absent(Tile::taken(value)));
      own += 32;
    });
  }

  RNNFAST_DEVICE void pass_on(int p, const Target& target, bool sends) const {
    sync_warp();
    // A lane has a chunk of the warp's units of a column, and every so many-th pair of a number and a peer.
    const int lane = thread % lanes, k = lane % chunks * chunk, first = block * units + thread % units - lane + k;
    if (sends && p + 1 < args.end && first < int(args.shape.H)) {
      const Real* from = collected + thread % 32 - lane + k;
      Real* to = vector(p + 1, target.n) + first;
      RNNFAST_ROLL
      for (int at = lane / chunks; at < Step::sent * args.blocks; at += lanes / chunks) {
        const int number = at % Step::sent, ahead = block + at / Step::sent;
        publish_to_peer(ahead < args.blocks ? ahead : ahead - args.blocks,
                        reinterpret_cast<uint4*>(to + number * int(args.shape.H)), read(from + number * 32));
      }
    }
    sync_warp();  // before the next cells are put
  }
};

}  // namespace rnnfast::cuda
