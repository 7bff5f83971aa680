// The words Python has for what the contract has enumerators for.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "../rnnfast.h"

namespace rnnfast::python {

inline Cell cell_named(std::string_view name) {
  return name == "lstm"   ? Cell::lstm
         : name == "tanh" ? Cell::rnn_tanh
         : name == "relu" ? Cell::rnn_relu
                          : throw std::invalid_argument("unknown cell " + std::string(name));
}

// What is kept of every step of an LSTM beside h.
enum class Keep { nothing, cells, all };

inline Keep keep_named(std::string_view name) {
  return name == "nothing" ? Keep::nothing
         : name == "cells" ? Keep::cells
         : name == "all"   ? Keep::all
                           : throw std::invalid_argument("unknown keep " + std::string(name));
}

}  // namespace rnnfast::python
