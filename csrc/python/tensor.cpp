#include "tensor.h"

#include <pybind11/gil_safe_call_once.h>

#include <stdexcept>
#include <utility>

namespace rnnfast::python {
namespace {

// What is looked up once: objects of torch, and names as Python wants them for a fast search.
struct Torch {
  PyObject *tensor_type, *parameter_type;
  std::array<PyObject*, 3> numbers;  // dtypes, by Number
  PyObject* float16;
  PyObject* get_num_threads;
  const dlpack::ExchangeApi* exchange;

  PyObject *contiguous, *data_ptr, *device, *dtype, *is_contiguous, *is_cpu, *is_neg, *new_empty,
      *new_zeros, *requires_grad, *shape, *to, *transpose;
  PyObject *zero, *one;
  PyObject* dtype_keyword;  // ("dtype",)

  PyObject* dtype_of(Number number) const { return numbers[static_cast<std::size_t>(number)]; }
};

const dlpack::ExchangeApi* exchange_of(py::handle tensor_type) {
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return nullptr;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::capsule_name)) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
  return api->major == dlpack::major_version && api->view_of_object ? api : nullptr;
}

Torch look_up() {
  const py::module_ torch = py::module_::import("torch");
  const auto own = [](py::object object) { return object.release().ptr(); };
  const auto name = [](const char* text) {
    PyObject* interned = PyUnicode_InternFromString(text);
    return interned ? interned : throw py::error_already_set();
  };
  const py::object tensor_type = torch.attr("Tensor");
  return {own(tensor_type),
          own(torch.attr("nn").attr("Parameter")),
          {own(torch.attr("float32")), own(torch.attr("float64")), own(torch.attr("bfloat16"))},
          own(torch.attr("float16")),
          own(torch.attr("get_num_threads")),
          exchange_of(tensor_type),
          name("contiguous"),
          name("data_ptr"),
          name("device"),
          name("dtype"),
          name("is_contiguous"),
          name("is_cpu"),
          name("is_neg"),
          name("new_empty"),
          name("new_zeros"),
          name("requires_grad"),
          name("shape"),
          name("to"),
          name("transpose"),
          own(py::int_(0)),
          own(py::int_(1)),
          own(py::make_tuple("dtype"))};
}

const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> known;
  return known.call_once_and_store_result(look_up).get_stored();
}

bool exchange_wanted = true;

py::object owned(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object attribute(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }

py::object call(PyObject* object, PyObject* method) {
  return owned(PyObject_VectorcallMethod(method, &object, 1, nullptr));
}

bool is_true(const py::object& object) { return object.ptr() == Py_True; }

Number number_of(dlpack::Number number) {
  if (number == dlpack::Number{dlpack::floating, 32, 1}) return Number::float32;
  if (number == dlpack::Number{dlpack::floating, 64, 1}) return Number::float64;
  if (number == dlpack::Number{dlpack::bfloat, 16, 1}) return Number::bfloat16;
  return Number::other;
}

// Both readers give false for what is no array, with or without a Python error.
bool read_by_exchange(PyObject* tensor, Array& array) {
  dlpack::Tensor view;
  if (torch().exchange->view_of_object(tensor, &view) != 0) return false;
  if (view.place.type != dlpack::cpu || view.axes > most_axes) return false;
  array.data = view.data ? static_cast<char*>(view.data) + view.byte_offset : nullptr;
  array.number = number_of(view.number);
  array.shape.axes = view.axes;
  Index stride = 1;
  for (int axis = view.axes - 1; axis >= 0; --axis) {
    const Index size = view.sizes[axis];
    array.shape.size[axis] = size;
    if (size != 1 && view.strides && view.strides[axis] != stride) array.dense = false;
    stride *= size;
  }
  return true;
}

bool read_by_attributes(PyObject* tensor, Array& array) {
  const Torch& known = torch();
  if (!is_true(attribute(tensor, known.is_cpu))) return false;
  const py::object shape = attribute(tensor, known.shape);
  if (PyTuple_GET_SIZE(shape.ptr()) > most_axes) return false;
  for (Py_ssize_t axis = 0; axis < PyTuple_GET_SIZE(shape.ptr()); ++axis)
    array.shape.add(PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis)));
  const py::object dtype = attribute(tensor, known.dtype);
  for (std::size_t i = 0; i < known.numbers.size(); ++i)
    if (dtype.ptr() == known.numbers[i]) array.number = static_cast<Number>(i);
  array.data = PyLong_AsVoidPtr(call(tensor, known.data_ptr).ptr());
  array.dense = is_true(call(tensor, known.is_contiguous));
  return !PyErr_Occurred();
}

// The dtype as DLPack has it, if kernels have it at all.
std::optional<dlpack::Number> number_of(PyObject* dtype) {
  const Torch& known = torch();
  if (dtype == known.dtype_of(Number::float32)) return dlpack::Number{dlpack::floating, 32, 1};
  if (dtype == known.dtype_of(Number::float64)) return dlpack::Number{dlpack::floating, 64, 1};
  if (dtype == known.dtype_of(Number::bfloat16)) return dlpack::Number{dlpack::bfloat, 16, 1};
  if (dtype == known.float16) return dlpack::Number{dlpack::floating, 16, 1};
  return std::nullopt;
}

bool equal(PyObject* left, PyObject* right) {
  const int answer = PyObject_RichCompareBool(left, right, Py_EQ);
  return answer < 0 ? throw py::error_already_set() : answer != 0;
}

bool equal(PyObject* shape, const dlpack::Tensor& view) {
  if (!PyTuple_Check(shape) || PyTuple_GET_SIZE(shape) != view.axes) return false;
  for (int axis = 0; axis < view.axes; ++axis) {
    PyObject* size = PyTuple_GET_ITEM(shape, axis);
    int overflow;  // gives -1, which is no tensor's size
    if (!PyLong_Check(size) || PyLong_AsLongLongAndOverflow(size, &overflow) != view.sizes[axis]) return false;
  }
  return true;
}

Tensor with_shape(PyObject* like, PyObject* method, PyObject* dtype, const Shape& shape) {
  PyObject* arguments[most_axes + 2] = {like};
  py::object sizes[most_axes];
  std::size_t count = 1;
  for (int axis = 0; axis < shape.axes; ++axis) {
    sizes[axis] = owned(PyLong_FromLongLong(shape.size[axis]));
    arguments[count++] = sizes[axis].ptr();
  }
  arguments[count] = dtype;
  return known(owned(PyObject_VectorcallMethod(method, arguments, count,
                                               dtype ? torch().dtype_keyword : nullptr)));
}

}  // namespace

std::optional<Array> read(PyObject* tensor) {
  Array array;
  try {
    const bool exchange = exchange_wanted && torch().exchange;
    if (exchange ? read_by_exchange(tensor, array) : read_by_attributes(tensor, array)) return array;
  } catch (const py::error_already_set&) {
  }
  PyErr_Clear();
  return std::nullopt;
}

Tensor known(py::object tensor) {
  const std::optional<Array> array = read(tensor.ptr());
  if (!array) throw std::runtime_error("a tensor is not an array in the CPU's memory");
  return {std::move(tensor), *array};
}

bool has_plain_type(PyObject* tensor) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == torch().tensor_type || type == torch().parameter_type;
}

bool is_lazily_negated(PyObject* tensor) { return is_true(call(tensor, torch().is_neg)); }

bool requires_grad(PyObject* tensor) { return is_true(attribute(tensor, torch().requires_grad)); }

Kind::Kind(PyObject* dtype, PyObject* device) : dtype_(dtype), device_(device) {
  if (exchange_wanted && torch().exchange) number_ = number_of(dtype);
}

bool Kind::has(PyObject* tensor, PyObject* shape) {
  if (!has_plain_type(tensor)) return false;
  try {
    return (number_ ? has_view(tensor, shape) : has_attributes(tensor, shape)) && !is_lazily_negated(tensor);
  } catch (const py::error_already_set& error) {  // as of a sparse tensor, which has no storage
    if (error.matches(PyExc_RuntimeError) || error.matches(PyExc_BufferError)) return false;
    throw;
  }
}

bool Kind::has_view(PyObject* tensor, PyObject* shape) {
  dlpack::Tensor view;
  if (torch().exchange->view_of_object(tensor, &view) != 0) throw py::error_already_set();
  if (!view.data || !(view.number == *number_) || !equal(shape, view)) return false;
  if (place_ && view.place == *place_) return true;
  if (!is_on_device(tensor)) return false;
  // Of other devices DLPack may not tell one from another.
  if (view.place.type == dlpack::cpu || view.place.type == dlpack::cuda) place_ = view.place;
  return true;
}

bool Kind::has_attributes(PyObject* tensor, PyObject* shape) {
  const Torch& known = torch();
  return attribute(tensor, known.dtype).ptr() == dtype_ && PyTuple_Check(shape) &&
         equal(attribute(tensor, known.shape).ptr(), shape) && is_on_device(tensor) &&
         !equal(call(tensor, known.data_ptr).ptr(), known.zero);
}

bool Kind::is_on_device(PyObject* tensor) { return equal(attribute(tensor, torch().device).ptr(), device_); }

void make_dense(Tensor& tensor) {
  if (tensor && !tensor.array.dense) tensor = known(call(tensor.object.ptr(), torch().contiguous));
}

Tensor transposed(const Tensor& tensor) {
  PyObject* arguments[] = {tensor.object.ptr(), torch().zero, torch().one};
  return known(owned(PyObject_VectorcallMethod(torch().transpose, arguments, 3, nullptr)));
}

Tensor new_empty(const Tensor& like, Number number, const Shape& shape) {
  PyObject* dtype = number == like.array.number ? nullptr : torch().dtype_of(number);
  return with_shape(like.object.ptr(), torch().new_empty, dtype, shape);
}

Tensor new_zeros(const Tensor& like, const Shape& shape) {
  return with_shape(like.object.ptr(), torch().new_zeros, nullptr, shape);
}

Tensor converted(const Tensor& tensor, Number number) {
  if (tensor.array.number == number) return tensor;
  PyObject* arguments[] = {tensor.object.ptr(), torch().dtype_of(number)};
  return known(owned(PyObject_VectorcallMethod(torch().to, arguments, 2, nullptr)));
}

int thread_count() {
  const py::object count = owned(PyObject_CallNoArgs(torch().get_num_threads));
  return static_cast<int>(PyLong_AsLong(count.ptr()));
}

bool use_exchange(bool wanted) { return std::exchange(exchange_wanted, wanted); }

}  // namespace rnnfast::python
