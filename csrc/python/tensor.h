// Tensors as Python shows them: attributes and methods by name, so that no header of torch's is needed and
// any version of torch will do. Nothing here computes.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>

#include "../rnnfast.h"
#include "dlpack.h"

namespace rnnfast::python {

namespace py = pybind11;

enum class Number { float32, float64, bfloat16, other };

constexpr int most_axes = 4;

struct Shape {
  int axes = 0;
  std::array<Index, most_axes> size{};

  Shape() = default;
  Shape(std::initializer_list<Index> sizes) {
    for (const Index next : sizes) add(next);
  }
  void add(Index next) { size[axes++] = next; }

  bool operator==(const Shape& other) const {
    return axes == other.axes && std::equal(size.begin(), size.begin() + axes, other.size.begin());
  }
};

// The elements of a CPU tensor. It owns nothing.
struct Array {
  void* data = nullptr;
  Number number = Number::other;
  Shape shape;
  bool dense = true;  // row-major, without gaps

  // Not for empty tensors, nor for lazy zeros, which are not there to be read.
  bool has_elements() const {
    return data && std::find(shape.size.begin(), shape.size.begin() + shape.axes, 0) ==
                       shape.size.begin() + shape.axes;
  }
};

// An array, and the tensor that keeps it alive; no object: absent.
struct Tensor {
  py::object object;
  Array array;

  explicit operator bool() const { return bool(object); }
};

// Nothing if data_ptr() would not lead to the elements of a CPU tensor of at most four axes. An error that
// reading a tensor raises, as of one without memory, means the same.
std::optional<Array> read(PyObject* tensor);
// The same where it must be one.
Tensor known(py::object tensor);

// Whether it is a torch.Tensor or a Parameter, and of no other type derived from them.
bool has_plain_type(PyObject* tensor);
// Whether its elements are to be negated when they are read.
bool is_lazily_negated(PyObject* tensor);
bool requires_grad(PyObject* tensor);

// In the place of a tensor that is not dense, a copy that is.
void make_dense(Tensor& tensor);
// As tensor.transpose(0, 1).
Tensor transposed(const Tensor& tensor);
// As like.new_empty(shape, dtype=number), like.new_zeros(shape), tensor.to(number).
Tensor new_empty(const Tensor& like, Number number, const Shape& shape);
Tensor new_zeros(const Tensor& like, const Shape& shape);
Tensor converted(const Tensor& tensor, Number number);

// What several tensors are to be: of one dtype and on one device, which are objects of torch's and stay the
// caller's.
class Kind {
 public:
  Kind(PyObject* dtype, PyObject* device);

  // Whether it has a plain type and this shape, a tuple of ints, and data_ptr() leads to its very elements. A
  // RuntimeError means that it does not; other errors are thrown.
  bool has(PyObject* tensor, PyObject* shape);

 private:
  bool has_view(PyObject* tensor, PyObject* shape);
  bool has_attributes(PyObject* tensor, PyObject* shape);
  bool is_on_device(PyObject* tensor);

  PyObject *dtype_, *device_;
  std::optional<dlpack::Number> number_;  // the dtype, where tensors are read through DLPack
  std::optional<dlpack::Place> place_;    // the device, once a tensor was found there
};

int thread_count();  // torch.get_num_threads()

// Whether tensors are read through DLPack's exchange API where torch has it; as it was before. For tests.
bool use_exchange(bool wanted);

}  // namespace rnnfast::python
