// The inner products of a recurrence step, as one warp computes them: sums (rows x columns) += W (rows x k)
// v (k x columns), where rows are rows of weights and columns are batch rows.
//
// Weights come in tiles of tile_rows x step, packed so that what a lane needs lies in `planes` blocks of
// 16 bytes and a warp reads 512 bytes in a row. Since we pack them ourselves, the order of k within a step
// is ours to choose: a lane takes 16 bytes of v in a row, straight from where v lies.
//
// `row_tiles` tiles of rows go side by side, so that v is read once for all of them.
// Fma is for any device and for exact float32 and float64; Mma for tensor cores (sm_80 and newer).
#pragma once

#include "exchange.h"

namespace rnnfast::cuda {

// A step is 8 lanes wide: a lane has 16 bytes of v, and adds up its part of 4 x 8 sums; the 8 lanes add theirs at the
// end. Four times 8 lanes have four rows each.
template <class Real_>
struct Fma {
  using Real = Real_;
  using State = StateOf<Real>;
  static constexpr int chunk = 16 / sizeof(Real);  // numbers in 16 bytes
  static constexpr int lane_rows = 4, lanes = 8;   // that share the terms of a row
  static constexpr int tile_rows = 16, tile_columns = 8, step = lanes * chunk;
  static constexpr int planes = lane_rows;
  static constexpr int column_tiles = 1;    // side by side
  static constexpr int resident_tiles = 2;  // of weights, in registers
  static constexpr int row_tiles = 1;  // side by side: a lane has several rows already
  static constexpr int inputs_ahead = 1;    // tiles whose inputs are loaded together
  // The 16-bit formats have tensor cores wherever they have machine code of their own.
  static constexpr bool is_built = sizeof(Real) > 2 || lacks_tensor_cores;

  struct Sums {
    State sum[lane_rows * tile_columns];
  };

  // Where this lane's numbers of v come from.
  struct Columns {
    const Real* from[tile_columns];
  };

  struct Inputs {
    uint4 v[tile_columns];
  };

  // vector_of(n): where the vector of the tile's column n begins.
  template <class VectorOf>
  static RNNFAST_DEVICE Columns columns(int lane, VectorOf&& vector_of) {
    const Real* own = vector_of(lane % tile_columns);
    Columns columns;
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n) columns.from[n] = from_lane(own, n) + first(lane);
    return columns;
  }

  // Number of this lane within a step; a step that begins at k is there for the lane if k + first < terms.
  static RNNFAST_DEVICE int first(int lane) { return lane % lanes * chunk; }

  // Numbers `begin` + `further`, of which the compiler knows the latter; those of `zeros` where there are none.
  template <class From>
  static RNNFAST_DEVICE Inputs load(const Columns& columns, int begin, int further, bool is_there,
                                    const Real* zeros) {
    Inputs inputs;
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n)
      inputs.v[n] = From::read(
          reinterpret_cast<const uint4*>((is_there ? columns.from[n] + begin : zeros) + further));
    return inputs;
  }

  static RNNFAST_DEVICE void look(const Inputs& inputs, Arrivals<Real>& arrivals) {
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n) arrivals.add(inputs.v[n]);
  }

  static RNNFAST_DEVICE void multiply(const uint4 (&weights)[planes], const Inputs& inputs, Sums& sums) {
    RNNFAST_UNROLL
    for (int n = 0; n < tile_columns; ++n) {
      const Numbers v = numbers(inputs.v[n]);
      RNNFAST_UNROLL
      for (int r = 0; r < lane_rows; ++r) {
        const Numbers w = numbers(weights[r]);
        State& sum = sums.sum[r * tile_columns + n];
        RNNFAST_UNROLL
        for (int k = 0; k < chunk; ++k) sum = std::fma(widen(w.of[k]), widen(v.of[k]), sum);
      }
    }
  }

  // Writes sum (r, n) of the tile to out[n * stride + r].
  static RNNFAST_DEVICE void store(Sums& sums, State* out, int stride, int lane) {
    fold<lane_rows * tile_columns / 2, lanes / 2>(sums.sum, lane);
    constexpr int kept = lane_rows * tile_columns / lanes;
    const int at = lane % lanes * kept, row = lane / lanes * lane_rows + at / tile_columns;
    RNNFAST_UNROLL
    for (int n = 0; n < kept; ++n) store_shared(out + (at % tile_columns + n) * stride + row, sums.sum[n]);
  }

  // One plane of one lane's part of a tile, which is one of its rows; weight(r, k) is a number of the tile.
  template <class Weight>
  static RNNFAST_DEVICE uint4 pack(int plane, int lane, Weight&& weight) {
    Numbers row;
    RNNFAST_UNROLL
    for (int k = 0; k < chunk; ++k) row.of[k] = weight(lane / lanes * lane_rows + plane, first(lane) + k);
    uint4 packed;
    memcpy(&packed, &row, sizeof(packed));
    return packed;
  }

 private:
  struct Numbers {
    Real of[chunk];
  };
  static RNNFAST_DEVICE Numbers numbers(const uint4& packed) {
    Numbers numbers;
    memcpy(&numbers, &packed, sizeof(numbers));
    return numbers;
  }

  // A lane hands half of its sums to a partner and keeps the other half, until all lanes of a row are served.
  template <int half, int partner>
  static RNNFAST_DEVICE void fold(State (&sum)[lane_rows * tile_columns], int lane) {
    const bool upper = lane & partner;
    RNNFAST_UNROLL
    for (int n = 0; n < half; ++n) {
      const State kept = upper ? sum[n + half] : sum[n];
      sum[n] = kept + exchange_lanes(upper ? sum[n] : sum[n + half], partner);
    }
    if constexpr (partner > 1) fold<half / 2, partner / 2>(sum, lane);
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

  // Two for a step's two instructions, which then need not wait for each other; where there are many tiles to multiply,
  // one saves registers.
  template <int chains>
  struct SumsOf {
    float sum[chains][4];
    RNNFAST_DEVICE float of(int n) const { return chains == 1 ? sum[0][n] : sum[0][n] + sum[chains - 1][n]; }
  };
  using Sums = SumsOf<2>;

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

  // A number as the instruction takes it: `multiply` wants inputs that are, or makes them so.
  static RNNFAST_DEVICE Real taken(Real number) {
    if constexpr (sizeof(Real) == 4) return number_of_bits<Real>(to_tf32(number));
    return number;
  }

  template <bool are_taken = false, int chains>
  static RNNFAST_DEVICE void multiply(const uint4 (&weights)[planes], const Inputs& inputs, SumsOf<chains>& sums) {
    Inputs v = inputs;
    if constexpr (sizeof(Real) == 4 && !are_taken) v = {rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w)};
    cuda::multiply<Real>(sums.sum[0], weights[0], v.x, v.y);
    cuda::multiply<Real>(sums.sum[chains - 1], weights[1], v.z, v.w);
  }

  static RNNFAST_DEVICE void store(const Sums& sums, float* out, int stride, int lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    RNNFAST_UNROLL
    for (int n = 0; n < 4; ++n)
      store_shared(out + (column + n % 2) * stride + row + n / 2 * 8, sums.of(n));
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
