// The Python module meprop._C: raw addresses and sizes in, status out. No torch, limited API only.
//
// ops/native.py is its one caller, and checks shapes, strides and dtypes; what can still be wrong here raises.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#include "drivers.h"

namespace meprop {
namespace {

enum Dtype { kFloat32 = 0, kBfloat16 = 1 };

struct Level {
  const Kernels* kernels;
  bool supported;
};

// Every level of this build, slowest first.
const Level* levels(int* count) {
#ifdef MEPROP_X86
  static const Level all[] = {
      {&kScalar, true},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
      {&kAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
  };
#else
  static const Level all[] = {{&kScalar, true}};
#endif
  *count = sizeof all / sizeof *all;
  return all;
}

const Kernels* best_level() {
  int count;
  const Level* all = levels(&count);
  while (count > 1 && !all[count - 1].supported) --count;
  return all[count - 1].kernels;
}

const Kernels* active = best_level();

// Reads exactly `count` integers; on failure sets a Python exception.
bool read_integers(PyObject* const* args, Py_ssize_t given, Py_ssize_t count, int64_t* to) {
  if (given != count) {
    PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd arguments", count, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    to[i] = PyLong_AsLongLong(args[i]);
    if (to[i] == -1 && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

PyObject* finish(Status status) {
  switch (status) {
    case Status::kOk:
      Py_RETURN_NONE;
    case Status::kNoMemory:
      return PyErr_NoMemory();
    case Status::kBadSize:
      break;
  }
  PyErr_SetString(PyExc_ValueError, "sizes, leading dimension, k or thread count out of range");
  return nullptr;
}

template <class T>
Status call_topk_rows(const int64_t* a) {
  return topk_rows(*active, reinterpret_cast<const T*>(a[1]), a[2], a[3], a[4], a[5], reinterpret_cast<T*>(a[6]),
                   reinterpret_cast<int32_t*>(a[7]), static_cast<int>(a[8]));
}

PyObject* py_topk_rows(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[9];
  if (!read_integers(args, given, 9, a)) return nullptr;
  if (a[0] != kFloat32 && a[0] != kBfloat16) {
    PyErr_SetString(PyExc_ValueError, "unknown dtype code");
    return nullptr;
  }
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = a[0] == kFloat32 ? call_topk_rows<float>(a) : call_topk_rows<Bf16>(a);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

PyObject* py_levels(PyObject*, PyObject*) {
  int count;
  const Level* all = levels(&count);
  PyObject* names = PyList_New(0);
  for (int i = 0; names != nullptr && i < count; ++i) {
    if (!all[i].supported) continue;
    PyObject* name = PyUnicode_FromString(all[i].kernels->level);
    if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* py_level(PyObject*, PyObject*) { return PyUnicode_FromString(active->level); }

PyObject* py_use_level(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (wanted == nullptr) return nullptr;
  int count;
  const Level* all = levels(&count);
  for (int i = 0; i < count; ++i) {
    if (!all[i].supported || std::strcmp(all[i].kernels->level, wanted) != 0) continue;
    active = all[i].kernels;
    Py_RETURN_NONE;
  }
  PyErr_Format(PyExc_ValueError, "no instruction-set level '%s' here", wanted);
  return nullptr;
}

PyMethodDef methods[] = {
    {"levels", py_levels, METH_NOARGS, "levels() -> names of the instruction-set levels that run here, slowest first"},
    {"level", py_level, METH_NOARGS, "level() -> the level in use"},
    {"use_level", py_use_level, METH_O, "use_level(name): serve later calls with that level"},
    {"topk_rows", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(py_topk_rows)), METH_FASTCALL,
     "topk_rows(dtype, grad, grad_ld, rows, width, k, values, indices, threads)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of meprop; see csrc/kernels.h.", -1, methods,
                      nullptr,               nullptr, nullptr,                                        nullptr};

}  // namespace
}  // namespace meprop

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&meprop::module); }
