#include "frozen.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <vector>

#include "../cpu/frozen.h"
#include "tensor.h"

namespace rnnfast::python {
namespace {

constexpr std::size_t most_matrices = 3;  // w_ih, w_hh, w_hr
using Addresses = std::array<const void*, most_matrices>;

// torch's count of writes; -1 for tensors of inference mode, which have none.
long version_of(const py::object& tensor) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const auto count = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  const long version = count ? PyLong_AsLong(count.ptr()) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  return version;
}

struct Matrix {
  py::object tensor;  // shares memory and version counter with the weight
  long version;
};

// The weights of one layer in one direction.
struct Layer {
  std::vector<Matrix> matrices;
  cpu::Name name;

  Addresses addresses() const {
    Addresses all{};
    for (std::size_t n = 0; n < matrices.size(); ++n) all[n] = known(matrices[n].tensor).array.data;
    return all;
  }
  bool is_untouched() const {
    for (const Matrix& matrix : matrices)
      if (version_of(matrix.tensor) != matrix.version) return false;
    return true;
  }
};

// All that are frozen, some more than once, as modules may share weights; under Python's lock. Never destroyed: what
// holds layers may outlive it when the process ends.
using Register = std::multimap<Addresses, const Layer*>;
Register& all_frozen() {
  static auto& layers = *new Register;
  return layers;
}

// Layers that are frozen for as long as this lives.
class Frozen {
 public:
  // Of every layer w_ih, w_hh and, if h is projected, w_hr: dense tensors on the CPU.
  explicit Frozen(const std::vector<std::vector<py::object>>& weights) {
    std::vector<Addresses> addresses;
    for (const auto& matrices : weights) {
      if (matrices.size() < 2 || matrices.size() > most_matrices)
        throw std::invalid_argument("a layer has two matrices or three");
      Layer layer{};
      for (const py::object& matrix : matrices) {
        const py::object alias = matrix.attr("detach")();
        layer.matrices.push_back({alias, version_of(alias)});
      }
      addresses.push_back(layer.addresses());
      layers_.push_back(std::move(layer));
    }
    for (std::size_t n = 0; n < layers_.size(); ++n) {
      layers_[n].name = cpu::freeze();
      places_.push_back(all_frozen().emplace(addresses[n], &layers_[n]));
    }
  }
  ~Frozen() {
    for (const auto& place : places_) all_frozen().erase(place);
    for (const Layer& layer : layers_) cpu::thaw(layer.name);
  }
  Frozen(const Frozen&) = delete;
  Frozen& operator=(const Frozen&) = delete;

 private:
  std::vector<Layer> layers_;
  std::vector<Register::iterator> places_;
};

}  // namespace

std::uint64_t frozen_name(const void* w_ih, const void* w_hh, const void* w_hr) {
  if (all_frozen().empty()) return 0;
  const auto [begin, end] = all_frozen().equal_range({w_ih, w_hh, w_hr});
  for (auto place = begin; place != end; ++place)
    if (place->second->is_untouched()) return place->second->name;
  return 0;
}

void bind_frozen(py::module_& module) {
  module.def("is_frozen", [](const py::args& matrices) {
    if (matrices.size() > most_matrices) throw std::invalid_argument("a layer has two matrices or three");
    Addresses at{};
    for (std::size_t n = 0; n < matrices.size(); ++n) at[n] = known(matrices[n]).array.data;
    return frozen_name(at[0], at[1], at[2]) != 0;
  });
  py::class_<Frozen>(module, "Frozen").def(py::init<const std::vector<std::vector<py::object>>&>());
}

}  // namespace rnnfast::python
