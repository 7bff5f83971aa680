// The inner products of a recurrence step, as one warp computes them: sums (rows x columns) += W (rows x k)
// v (k x columns), where rows are rows of weights and columns are batch rows.
//
// Weights come in tiles of tile_rows x step, packed so that what a lane needs lies in `planes` blocks of
// 16 bytes and a warp reads 512 bytes in a row. Since we pack them ourselves, the order of k within a step
// is ours to choose: a lane of Mma takes 16 bytes of v in a row, straight from where v lies.
//
// `row_tiles` tiles of rows go side by side, so that v is read once for all of them.
// Fma is for any device and for exact float32 and float64; Mma for tensor cores (sm_80 and newer).
#pragma once

#include "exchange.h"

namespace rnnfast::cuda {

// One lane has one k of a step, and adds up its own part of 4 x 8 sums; the lanes add theirs at the end.
template <class Real_, int rows_>
struct Fma {
  using Real = Real_;
  using State = StateOf<Real>;
  static constexpr int tile_rows = 4, tile_columns = 8, step = 32;
  static constexpr int planes = sizeof(State) / 4;
  static constexpr int column_tiles = 1;  // side by side
  static constexpr int resident_tiles = sizeof(State) == 4 ? 8 : 4;  // of weights, in registers
  static constexpr int row_tiles = sizeof(State) == 4 ? rows_ : 1;  // side by side
  static constexpr int inputs_ahead = sizeof(State) == 4 ? 4 : 1;  // tiles whose inputs are loaded together
  // The 16-bit formats have tensor cores wherever they have machine code of their own.
  static constexpr bool is_built = sizeof(Real) > 2 || lacks_tensor_cores;

  struct Sums {
    State sum[tile_rows * tile_columns];
  };

  // Where this lane's numbers of v come from.
  struct Columns {
    const Real* from[tile_columns];
  };

  struct Inputs {
    Real v[tile_columns];
  };

  // vector_of(n): where the vector of the tile's column n begins.
  template <class VectorOf>
  static RNNFAST_DEVICE Columns columns(int lane, VectorOf&& vector_of) {
    const Real* own = vector_of(lane % tile_columns);
    Columns columns;
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n) {
      columns.from[n] = from_lane(own, n) + lane;
    }
    return columns;
  }

  // Number of this lane within a step; a step that begins at k is there for the lane if k + first < terms.
  static RNNFAST_DEVICE int first(int lane) { return lane; }

  // Numbers `begin` + `further`, of which the compiler knows the latter; those of `zeros` where there are none.
  template <class From>
  static RNNFAST_DEVICE Inputs load(const Columns& columns, int begin, int further, bool is_there,
                                    const Real* zeros) {
    Inputs inputs;
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n)
      inputs.v[n] = From::read((is_there ? columns.from[n] + begin : zeros) + further);
    return inputs;
  }

  static RNNFAST_DEVICE void look(const Inputs& inputs, Arrivals<Real>& arrivals) {
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n) arrivals.add(inputs.v[n]);
  }

  static RNNFAST_DEVICE void multiply(const uint4 (&weights)[planes], const Inputs& inputs, Sums& sums) {
    State w[tile_rows];
    static_assert(sizeof(w) == sizeof(weights), "a lane's weights are one k of all rows");
    memcpy(w, weights, sizeof(w));
    RNNFAST_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      RNNFAST_UNROLL
      for (int n = 0; n < tile_columns; ++n) {
        State& sum = sums.sum[r * tile_columns + n];
        sum = std::fma(w[r], widen(inputs.v[n]), sum);
      }
    }
  }

  // Writes sum (r, n) of the tile to out[n * stride + r].
  static RNNFAST_DEVICE void store(Sums& sums, State* out, int stride, int lane) {
    fold<16>(sums.sum, lane);
    store_shared(out + lane % tile_columns * stride + lane / tile_columns, sums.sum[0]);
  }

  // One plane of one lane's part of a tile; weight(r, k) is a number of the tile.
  template <class Weight>
  static RNNFAST_DEVICE uint4 pack(int plane, int lane, Weight&& weight) {
    constexpr int rows = tile_rows / planes;
    State w[rows];
    RNNFAST_UNROLL
    for (int r = 0; r < rows; ++r) w[r] = widen(weight(plane * rows + r, lane));
    uint4 packed;
    memcpy(&packed, w, sizeof(packed));
    return packed;
  }

 private:
  // A lane hands half of its sums to a partner and keeps the other half, until it has one sum, its own.
  template <int half>
  static RNNFAST_DEVICE void fold(State (&sum)[tile_rows * tile_columns], int lane) {
    const bool upper = lane & half;
    RNNFAST_UNROLL
    for (int n = 0; n < half; ++n) {
      const State kept = upper ? sum[n + half] : sum[n];
      sum[n] = kept + exchange_lanes(upper ? sum[n] : sum[n + half], half);
    }
    if constexpr (half > 1) fold<half / 2>(sum, lane);
  }
};

// Tensor cores, through the warp's m16n8k16 (16-bit formats) or m16n8k8 (TF32, where Real is float). A step
// is two of them: the lane with k-index j in its group of four takes 16 bytes of v, numbers 16 j / sizeof.
template <class Real_, int rows_>
struct Mma {
  using Real = Real_;
  using State = float;
  static constexpr int chunk = 16 / sizeof(Real);  // numbers in 16 bytes
  static constexpr int tile_rows = 16, tile_columns = 8, step = 4 * chunk;
  static constexpr int planes = 2;
  static constexpr int column_tiles = 2;
  static constexpr int resident_tiles = 8;
  static constexpr int row_tiles = rows_;
  static constexpr int inputs_ahead = 8;  // tiles whose inputs are loaded together
  static constexpr bool is_built = has_tensor_cores;

  // One for each of a step's two instructions, which then need not wait for each other.
  struct Sums {
    float sum[2][4];
  };

  struct Columns {
    const Real* from;
  };

  using Inputs = uint4;

  template <class VectorOf>
  static RNNFAST_DEVICE Columns columns(int lane, VectorOf&& vector_of) {
    return {vector_of(lane / 4) + first(lane)};
  }

  static RNNFAST_DEVICE int first(int lane) { return lane % 4 * chunk; }

  template <class From>
  static RNNFAST_DEVICE Inputs load(const Columns& columns, int begin, int further, bool is_there,
                                    const Real* zeros) {
    return From::read(reinterpret_cast<const uint4*>((is_there ? columns.from + begin : zeros) + further));
  }

  static RNNFAST_DEVICE void look(const Inputs& inputs, Arrivals<Real>& arrivals) { arrivals.add(inputs); }

  static RNNFAST_DEVICE void multiply(const uint4 (&weights)[planes], const Inputs& inputs, Sums& sums) {
    Inputs v = inputs;
    if constexpr (sizeof(Real) == 4) v = {rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w)};
    cuda::multiply<Real>(sums.sum[0], weights[0], v.x, v.y);
    cuda::multiply<Real>(sums.sum[1], weights[1], v.z, v.w);
  }

  static RNNFAST_DEVICE void store(const Sums& sums, float* out, int stride, int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    RNNFAST_UNROLL
    for (int n = 0; n < 4; ++n)
      store_shared(out + (column + n % 2) * stride + row + n / 2 * 8, sums.sum[0][n] + sums.sum[1][n]);
  }

  template <class Weight>
  static RNNFAST_DEVICE uint4 pack(int plane, int lane, Weight&& weight) {
    constexpr int pair = 4 / sizeof(Real);  // numbers in a register
    const int row = lane / 4, k = lane % 4 * chunk + plane * 2 * pair;
    const auto numbers = [&](int r, int first) {
      if constexpr (sizeof(Real) == 4) {
        return to_tf32(weight(r, first));
      } else {
        return std::uint32_t(weight(r, first).bits) | std::uint32_t(weight(r, first + 1).bits) << 16;
      }
    };
    return {numbers(row, k), numbers(row + 8, k), numbers(row, k + pair), numbers(row + 8, k + pair)};
  }

 private:
  static RNNFAST_DEVICE std::uint32_t rounded(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return to_tf32(value);
  }
};

}  // namespace rnnfast::cuda
