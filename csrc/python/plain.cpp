#include "plain.h"

#include <exception>

#include "tensor.h"

namespace rnnfast::python {
namespace {

// As a tuple that nobody else changes: reading a tensor may let other threads run, and a list may change.
py::object tuple_of(PyObject* sequence) {
  PyObject* tuple = PySequence_Tuple(sequence);
  return tuple ? py::reinterpret_steal<py::object>(tuple) : throw py::error_already_set();
}

bool are_plain(PyObject* tensors, PyObject* shapes, Kind kind) {
  const py::object given = tuple_of(tensors), expected = tuple_of(shapes);
  const Py_ssize_t count = PyTuple_GET_SIZE(given.ptr());
  if (count != PyTuple_GET_SIZE(expected.ptr())) throw py::value_error("tensors and shapes differ in number");
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* tensor = PyTuple_GET_ITEM(given.ptr(), i);
    if (tensor != Py_None && !kind.has(tensor, PyTuple_GET_ITEM(expected.ptr(), i))) return false;
  }
  return true;
}

// (tensors, shapes, dtype, device). Python calls it without pybind11 in between, whose dispatch takes as long as
// reading ten tensors.
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) noexcept {
  try {
    if (count != 4) throw py::value_error("the number of arguments is wrong");
    return PyBool_FromLong(are_plain(arguments[0], arguments[1], {arguments[2], arguments[3]}));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace

void bind_plain(py::module_& module) {
  static PyMethodDef methods[] = {
      {"are_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
       "Whether each of the tensors is None, or a plain one of its shape, of this dtype and on this device."},
      {}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace rnnfast::python
