#include "layer.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "../check.h"
#include "../cpu/kernels.h"
#include "frozen.h"
#include "names.h"
#include "offsets.h"
#include "tensor.h"

namespace rnnfast::python {
namespace {

struct Layer {
  LayerShape shape{};
  std::vector<Index> offsets;  // the shape's, if packed
  Keep keep = Keep::nothing;
  std::uint64_t frozen = 0;  // as in LayerForward
  bool halve_w_hh = false;
  bool wants_h_n = true;
  Tensor x;
  Tensor h0, c0;  // absent: zeros; an RNN has no c0
  Shape state_shape;
  Tensor w_ih, w_hh, b_ih, b_hh;  // biases may be absent
  Tensor w_hr;                    // of a projected LSTM alone

  bool is_lstm() const { return shape.cell == Cell::lstm; }
  Number number() const { return x.array.number; }
  // Of what belongs to the cell.
  Number cell_number() const {
    return number() == Number::bfloat16 ? Number::float32 : number();
  }
};

std::array<Tensor*, 8> tensors_of(Layer& layer) {
  return {&layer.x, &layer.h0, &layer.c0, &layer.w_ih, &layer.w_hh, &layer.b_ih, &layer.b_hh, &layer.w_hr};
}

struct Results {
  Tensor y, h_n, c_n, c, gates, m;  // absent: not there, or not kept
};

Results allocate(const Layer& layer) {
  const auto& [cell, T, B, I, H, reverse, threads, offsets, projection] = layer.shape;
  const Index N = layer.shape.rows();
  const Tensor& like = layer.x;
  Shape y_shape = layer.x.array.shape, cell_shape = layer.state_shape;
  y_shape.size[y_shape.axes - 1] = layer.shape.h_size();
  cell_shape.size[cell_shape.axes - 1] = H;
  Results results;
  results.y = new_empty(like, layer.number(), y_shape);
  if (layer.wants_h_n) results.h_n = new_empty(like, layer.number(), layer.state_shape);
  if (layer.is_lstm()) {
    results.c_n = new_empty(like, layer.cell_number(), cell_shape);
    if (projection > 0 && layer.keep != Keep::nothing)
      results.m = new_empty(like, layer.number(), offsets ? Shape{N, H} : Shape{T, B, H});
    if (layer.keep != Keep::nothing) results.c = new_empty(like, layer.cell_number(), offsets ? Shape{N, H} : Shape{T, B, H});
    if (layer.keep == Keep::all)
      results.gates = new_empty(like, layer.cell_number(), offsets ? Shape{N, 4, H} : Shape{T, B, 4, H});
  }
  return results;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class Storage>
void compute(const Layer& layer, const Results& results) {
  using Real = RealOf<Storage>;
  const auto storage = [](const Tensor& tensor) { return static_cast<Storage*>(tensor.array.data); };
  const auto real = [](const Tensor& tensor) { return static_cast<Real*>(tensor.array.data); };
  std::unique_ptr<void, Free> zeros;  // in the place of either state
  if (!layer.h0) {
    const auto count = static_cast<std::size_t>(layer.shape.B * layer.shape.H);
    zeros.reset(std::calloc(count, sizeof(Real)));
    if (!zeros) throw std::bad_alloc();
  }
  const LayerForward<Storage> call{
      layer.shape,
      storage(layer.x), storage(layer.w_ih), storage(layer.w_hh), storage(layer.b_ih), storage(layer.b_hh),
      layer.h0 ? storage(layer.h0) : static_cast<Storage*>(zeros.get()),
      layer.c0 || !layer.is_lstm() ? real(layer.c0) : static_cast<Real*>(zeros.get()),
      storage(results.y), storage(results.h_n), real(results.c_n), real(results.c), real(results.gates),
      storage(layer.w_hr), storage(results.m), layer.frozen, layer.halve_w_hh};
  if (const Status status = check(call); status != Status::ok)
    throw std::invalid_argument(message(status));
  const py::gil_scoped_release released;
  cpu::kernels().of<Storage>().forward(call);
}

Results run(Layer& layer) {
  layer.shape.threads = thread_count();
  for (Tensor* tensor : tensors_of(layer)) make_dense(*tensor);
  layer.frozen = frozen_name(layer.w_ih.array.data, layer.w_hh.array.data, layer.w_hr.array.data);
  Results results = allocate(layer);
  switch (layer.number()) {
    case Number::float32: compute<float>(layer, results); break;
    case Number::float64: compute<double>(layer, results); break;
    case Number::bfloat16: compute<BFloat16>(layer, results); break;
    case Number::other: throw std::invalid_argument("x has a dtype without kernels");
  }
  return results;
}

// The arguments of the short way

// What the arguments describe, which is how the axes of x and of states are read.
enum class Way { layer, packed, sequence, step };

bool is_layer(Way way) { return way == Way::layer || way == Way::packed; }

// Sizes and the states' shape as x has them; false if x has too few or too many axes.
bool take_axes(Way way, Index H, Layer& layer) {
  const Shape& x = layer.x.array.shape;
  if (way == Way::packed) {
    if (x.axes != 2 || layer.shape.rows() != x.size[0]) return false;
    layer.shape.I = x.size[1];
    layer.shape.H = H;
    layer.state_shape = {layer.shape.B, H};
    return true;
  }
  const int batched = way == Way::step ? 2 : 3;
  const bool has_batch = x.axes == batched;
  if (!has_batch && (way == Way::layer || x.axes != batched - 1)) return false;
  layer.shape.T = way == Way::step ? 1 : x.size[0];
  layer.shape.B = has_batch ? x.size[batched - 2] : 1;
  layer.shape.I = x.size[x.axes - 1];
  layer.shape.H = H;
  if (way == Way::sequence) layer.state_shape.add(1);
  if (has_batch) layer.state_shape.add(layer.shape.B);
  layer.state_shape.add(H);
  return true;
}

// A tensor if it is a plain one; nothing if it is something else.
Tensor plain(py::object object) {
  if (!has_plain_type(object.ptr())) return {};
  const std::optional<Array> array = read(object.ptr());
  if (!array || !array->has_elements() || is_lazily_negated(object.ptr())) return {};
  return {std::move(object), *array};
}

// The items of a tuple or list, exactly of these types, so that taking them runs no code; false if it is something
// else. They are taken before one of them is read, since that may let other threads run, and a list may change.
template <std::size_t most>
bool take_items(PyObject* object, std::size_t count, std::array<py::object, most>& items) {
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
  if (PySequence_Fast_GET_SIZE(object) != static_cast<Py_ssize_t>(count)) return false;
  for (std::size_t i = 0; i < count; ++i)
    items[i] = py::reinterpret_borrow<py::object>(PySequence_Fast_ITEMS(object)[i]);
  return true;
}

bool take_states(PyObject* states, Layer& layer) {
  std::array<py::object, 2> items;
  if (!take_items(states, layer.is_lstm() ? 2 : 1, items)) return false;
  layer.h0 = plain(std::move(items[0]));
  if (layer.is_lstm()) layer.c0 = plain(std::move(items[1]));
  return layer.h0 && (layer.c0 || !layer.is_lstm());
}

bool take_weights(PyObject* weights, bool has_biases, Layer& layer) {
  std::array<py::object, 4> items;
  if (!take_items(weights, has_biases ? 4 : 2, items)) return false;
  layer.w_ih = plain(std::move(items[0]));
  layer.w_hh = plain(std::move(items[1]));
  if (!layer.w_ih || !layer.w_hh) return false;
  const auto take_bias = [](py::object& item, Tensor& bias) {
    return item.is_none() || (bias = plain(std::move(item)));
  };
  return !has_biases || (take_bias(items[2], layer.b_ih) && take_bias(items[3], layer.b_hh));
}

// Fills in sizes and x; false unless x, states and weights are as `way` has them and fit one another.
bool take_input(Way way, PyObject* x, bool batch_first, Layer& layer) {
  if (!(layer.x = plain(py::reinterpret_borrow<py::object>(x))) || layer.number() == Number::other) return false;
  if (batch_first && layer.x.array.shape.axes == 3) layer.x = transposed(layer.x);
  const Index H = layer.w_hh.array.shape.size[1], rows = gate_count(layer.shape.cell) * H;
  if (!take_axes(way, H, layer)) return false;
  const Number number = layer.number(), c0_number = is_layer(way) ? layer.cell_number() : number;
  const auto fits = [](const Tensor& tensor, Number number, const Shape& shape) {
    return !tensor || (tensor.array.number == number && tensor.array.shape == shape);
  };
  return fits(layer.w_ih, number, {rows, layer.shape.I}) && fits(layer.w_hh, number, {rows, H}) &&
         fits(layer.b_ih, number, {rows}) && fits(layer.b_hh, number, {rows}) &&
         fits(layer.h0, number, layer.state_shape) && fits(layer.c0, c0_number, layer.state_shape);
}

bool needs_grad(Layer& layer) {
  for (const Tensor* tensor : tensors_of(layer))
    if (*tensor && requires_grad(tensor->object.ptr())) return true;
  return false;
}

// What Python sees

py::object object_of(const Tensor& tensor) { return tensor ? tensor.object : py::none(); }

template <class... Tensors>
py::tuple tuple_of(const Tensors&... tensors) {
  return py::make_tuple(object_of(tensors)...);
}

std::string_view text(PyObject* object) {
  Py_ssize_t size = 0;
  const char* begin = PyUnicode_AsUTF8AndSize(object, &size);
  if (!begin) throw py::error_already_set();
  return {begin, static_cast<std::size_t>(size)};
}

bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

// Python calls these without pybind11 in between, whose dispatch takes as long as reading all tensors; so
// errors are translated here.
template <class Body>
PyObject* translated(Body&& body) noexcept {
  try {
    return body().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

void expect_count(Py_ssize_t count, Py_ssize_t expected) {
  if (count != expected) throw std::invalid_argument("the number of arguments is wrong");
}

std::array<Index, 4> sizes_of(PyObject* tuple) {
  return py::handle(tuple).cast<std::array<Index, 4>>();
}

// Of the address of batch_sizes, or of 0 where nothing is packed.
void take_offsets(PyObject* address, Index T, Layer& layer) {
  layer.offsets = offsets_of(py::handle(address).cast<std::uintptr_t>(), T);
  if (layer.offsets.empty()) return;
  layer.shape.T = T;
  layer.shape.B = layer.offsets[1];
  layer.shape.offsets = layer.offsets.data();
}

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> py::object {
    expect_count(count, 14);
    const auto tensor = [&](int index) -> Tensor {
      if (arguments[index] == Py_None) return {};
      return known(py::reinterpret_borrow<py::object>(arguments[index]));
    };
    Layer layer;
    const auto [T, B, I, H] = sizes_of(arguments[1]);
    layer.shape = {cell_named(text(arguments[0])), T, B, I, H, is_true(arguments[2]), 1};
    take_offsets(arguments[12], T, layer);
    layer.keep = keep_named(text(arguments[3]));
    layer.x = tensor(4);
    layer.h0 = tensor(5), layer.c0 = tensor(6);
    layer.w_ih = tensor(7), layer.w_hh = tensor(8), layer.b_ih = tensor(9), layer.b_hh = tensor(10);
    layer.halve_w_hh = is_true(arguments[11]);
    layer.w_hr = tensor(13);
    if (layer.w_hr) layer.shape.projection = layer.w_hr.array.shape.size[0];
    layer.state_shape = layer.h0.array.shape;
    const Results results = run(layer);
    if (layer.w_hr) return tuple_of(results.y, results.h_n, results.c_n, results.c, results.gates, results.m);
    return tuple_of(results.y, results.h_n, results.c_n, results.c, results.gates);
  });
}

// What the short way gives: None, where the call has to go the general way; y, h_n, c_n and c; or, where a
// gradient may be asked for, None, the sizes, h0 and c0.
py::object results_of(Way way, bool batch_first, bool recording, Layer& layer) {
  if (layer.c0) layer.c0 = converted(layer.c0, layer.cell_number());
  if (recording && needs_grad(layer)) {
    if (!layer.h0) {
      layer.h0 = new_zeros(layer.x, layer.state_shape);
      if (layer.is_lstm()) layer.c0 = converted(layer.h0, layer.cell_number());
    }
    const auto& [cell, T, B, I, H, reverse, threads, offsets, projection] = layer.shape;
    return py::make_tuple(py::none(), py::make_tuple(T, B, I, H), layer.h0.object, object_of(layer.c0));
  }
  Results results = run(layer);
  if (!is_layer(way) && results.c_n) results.c_n = converted(results.c_n, layer.number());
  if (batch_first && results.y.array.shape.axes == 3) results.y = transposed(results.y);
  return tuple_of(results.y, results.h_n, results.c_n, results.c);
}

// (cell, x, states, weights, reverse, keep, halve_w_hh, recording, address of batch_sizes or 0, their count)
PyObject* run_layer(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> py::object {
    expect_count(count, 10);
    Layer layer;
    layer.shape.cell = cell_named(text(arguments[0]));
    take_offsets(arguments[8], py::handle(arguments[9]).cast<Index>(), layer);
    const Way way = layer.shape.offsets ? Way::packed : Way::layer;
    layer.shape.reverse = is_true(arguments[4]);
    layer.keep = keep_named(text(arguments[5]));
    layer.halve_w_hh = is_true(arguments[6]);
    const bool fits = take_states(arguments[2], layer) && take_weights(arguments[3], true, layer) &&
                      take_input(way, arguments[1], false, layer);
    return fits ? results_of(way, false, is_true(arguments[7]), layer) : py::none();
  });
}

// (cell, x, states or None, weights, bias, batch_first, halve_w_hh, recording)
PyObject* run_sequence(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> py::object {
    expect_count(count, 8);
    Layer layer;
    layer.shape.cell = cell_named(text(arguments[0]));
    layer.halve_w_hh = is_true(arguments[6]);
    const bool bias = is_true(arguments[4]), batch_first = is_true(arguments[5]);
    const bool fits = (arguments[2] == Py_None || take_states(arguments[2], layer)) &&
                      take_weights(arguments[3], bias, layer) && bias == bool(layer.b_ih) &&
                      bias == bool(layer.b_hh) && take_input(Way::sequence, arguments[1], batch_first, layer);
    return fits ? results_of(Way::sequence, batch_first, is_true(arguments[7]), layer) : py::none();
  });
}

// (cell, x, states or None, weights, halve_w_hh, recording)
PyObject* run_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> py::object {
    expect_count(count, 6);
    Layer layer;
    layer.shape.cell = cell_named(text(arguments[0]));
    layer.halve_w_hh = is_true(arguments[4]);
    layer.wants_h_n = false;
    const bool fits = (arguments[2] == Py_None || take_states(arguments[2], layer)) &&
                      take_weights(arguments[3], true, layer) && bool(layer.b_ih) == bool(layer.b_hh) &&
                      take_input(Way::step, arguments[1], false, layer);
    return fits ? results_of(Way::step, false, is_true(arguments[5]), layer) : py::none();
  });
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

}  // namespace

void bind_layer(py::module_& module) {
  static PyMethodDef methods[] = {
      method<forward>("forward"), method<run_layer>("run_layer"), method<run_sequence>("run_sequence"),
      method<run_step>("run_step"), {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("use_exchange", &use_exchange);
}

}  // namespace rnnfast::python
