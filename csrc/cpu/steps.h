// The rows of several steps as one matrix, as the products over all steps of a backward pass take them.
#pragma once

#include "../truncation.h"
#include "team.h"

namespace rnnfast::cpu::RNNFAST_ISA {

// An array of some steps p: of all, or of those in work, whose places the next ones take.
template <class Element>
struct StepRing {
  Element* rows;
  Index steps, step_size;

  Element* at(Index p) const { return rows + p % steps * step_size; }
};

// What the weights were multiplied with at the steps p in `steps`: row k is batch row k % B of step
// steps.begin + k / B.
template <class Storage>
struct StepInputs {
  const LayerBackward<Storage>& layer;
  const Truncation& truncation;
  Range steps;

  Index rows() const { return steps.size() * layer.shape.B; }
  Index step(Index k) const { return steps.begin + k / layer.shape.B; }
  Index batch_row(Index k) const { return k % layer.shape.B; }
  // Where row k stands among the rows of all steps.
  Index input_row(Index k) const { return truncation.time(step(k)) * layer.shape.B + batch_row(k); }

  const Storage* x(Index k) const { return layer.x + input_row(k) * layer.shape.I; }
  const Storage* h_prev(Index k) const {
    const Index p = step(k), B = layer.shape.B, H = layer.shape.H;
    return p == 0 ? layer.h0 + batch_row(k) * H
                  : layer.y + (truncation.time(p - 1) * B + batch_row(k)) * H;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
