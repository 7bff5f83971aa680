// The number formats of the CUDA kernels. The 16-bit ones are storage alone: arithmetic is done in State.
#pragma once

#include <cstdint>

namespace rnnfast::cuda {

struct Float16 {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

namespace detail {
template <class Real>
struct State {
  using type = float;
};
template <>
struct State<double> {
  using type = double;
};
}  // namespace detail

// What sums and cell states are kept in.
template <class Real>
using StateOf = typename detail::State<Real>::type;

}  // namespace rnnfast::cuda
