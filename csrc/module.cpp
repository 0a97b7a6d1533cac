// The Python module meprop._C: raw addresses and sizes in, status out. No torch, limited API only.
//
// src/meprop/ops is its one caller, and checks shapes, strides and dtypes; what can still be wrong here raises.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>

#include "drivers.h"

namespace meprop {
namespace {

enum DtypeCode { kFloat32 = 0, kBfloat16 = 1 };
enum ScopeCode { kRowsScope = 0, kColumnsScope = 1 };

struct Level {
  const Kernels* kernels;
  bool supported;
};

// Every level of this build, slowest first.
const Level* levels(int* count) {
#ifdef MEPROP_X86
  static const Level all[] = {
      {&kScalar, true},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")},
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

// Reads so many integers, then so many floats; on failure sets a Python exception.
bool read_numbers(PyObject* const* args, Py_ssize_t given, Py_ssize_t integers, Py_ssize_t floats, int64_t* a, double* f) {
  if (given != integers + floats) {
    PyErr_Format(PyExc_TypeError, "expected %zd integers and %zd floats, got %zd arguments", integers, floats, given);
    return false;
  }
  if (!read_integers(args, integers, integers, a)) return false;
  for (Py_ssize_t i = 0; i < floats; ++i) {
    f[i] = PyFloat_AsDouble(args[integers + i]);
    if (f[i] == -1 && PyErr_Occurred() != nullptr) return false;
  }
  return true;
}

PyObject* finish(Status status) {
  switch (status) {
    case Status::kOk:
      Py_RETURN_NONE;
    case Status::kNoMemory:
      return PyErr_NoMemory();
    case Status::kBadIndex:
      PyErr_SetString(PyExc_IndexError, "the indices of a selection must ascend, and lie within the output features, and its starts go from 0 "
                      "to the number of its entries without descending");
      return nullptr;
    case Status::kBadSize:
      break;
  }
  PyErr_SetString(PyExc_ValueError, "a size, leading dimension, k or number of threads is out of range");
  return nullptr;
}

template <class T>
T* address(int64_t value) {
  return reinterpret_cast<T*>(value);
}

int thread_count(int64_t value) { return value > 0 && value <= INT32_MAX ? static_cast<int>(value) : 0; }

// The scope with which the arguments of an operation begin, and the others.
Scope scope_of(const int64_t** a) { return *(*a)++ == kRowsScope ? Scope::kRows : Scope::kColumns; }

template <class T>
Status topk(const int64_t* a) {
  const Scope scope = scope_of(&a);
  return (scope == Scope::kRows ? topk_rows<T> : topk_columns<T>)(*active, {address<const T>(a[0]), a[1]}, a[2], a[3],
                                                                  a[4], address<T>(a[5]), address<int32_t>(a[6]),
                                                                  thread_count(a[7]));
}

template <class T>
Status scores(const int64_t* a) {
  scope_of(&a);  // it is that of columns
  return column_scores<T>(*active, {address<const T>(a[0]), a[1]}, a[2], a[3], address<double>(a[4]), thread_count(a[5]));
}

template <class T>
Status backward(const int64_t* a) {
  LinearBackward<T> call;
  call.scope = scope_of(&a);
  call.k = a[0], call.blocks = a[1], call.select = a[2] != 0;
  call.values = address<T>(a[3]), call.indices = address<int32_t>(a[4]);
  call.starts = address<const int64_t>(a[5]), call.entries = a[6];
  call.shared = address<const T>(a[7]);
  call.rows = a[8], call.outputs = a[9];
  call.grad = {address<const T>(a[10]), a[11]};
  call.inputs = a[12];
  call.weight = {address<const T>(a[13]), a[14]};
  call.x = {address<const T>(a[15]), a[16]};
  call.grad_input = address<T>(a[17]), call.grad_weight = address<T>(a[18]), call.grad_bias = address<T>(a[19]);
  call.weight_rows_only = a[20] != 0;
  call.hits = address<int64_t>(a[21]);
  call.threads = thread_count(a[22]);
  return linear_backward(*active, call);
}

// Runs what takes a dtype and `count` further integers. `scoped` is whether the first of these is a scope.
PyObject* run(PyObject* const* args, Py_ssize_t given, Py_ssize_t count, bool scoped, Status (*run_f32)(const int64_t*),
              Status (*run_bf16)(const int64_t*)) {
  int64_t a[28];
  if (!read_integers(args, given, count + 1, a)) return nullptr;
  if ((a[0] != kFloat32 && a[0] != kBfloat16) || (scoped && a[1] != kRowsScope && a[1] != kColumnsScope)) {
    PyErr_SetString(PyExc_ValueError, "unknown dtype or scope code");
    return nullptr;
  }
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? run_f32 : run_bf16)(a + 1);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

PyObject* py_topk(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run(args, given, 9, true, topk<float>, topk<Bf16>);
}

PyObject* py_column_scores(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run(args, given, 7, true, scores<float>, scores<Bf16>);
}

PyObject* py_linear_backward(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run(args, given, 24, true, backward<float>, backward<Bf16>);
}

template <class T>
Status forward(const int64_t* a, double most_nonzeros, bool* is_written) {
  LinearForward<T> call;
  call.rows = a[0], call.outputs = a[1], call.inputs = a[2];
  call.x = {address<const T>(a[3]), a[4]};
  call.weight = {address<const T>(a[5]), a[6]};
  call.by_output = a[7] != 0;
  call.bias = address<const T>(a[8]), call.out = address<T>(a[9]);
  call.most_nonzeros = most_nonzeros, call.is_written = is_written;
  call.threads = thread_count(a[10]);
  return linear_forward(*active, call);
}

PyObject* py_linear_forward(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[12];
  bool is_written = false;
  double most_nonzeros;
  if (!read_numbers(args, given, 12, 1, a, &most_nonzeros)) return nullptr;
  if (a[0] != kFloat32 && a[0] != kBfloat16) {
    PyErr_SetString(PyExc_ValueError, "unknown dtype code");
    return nullptr;
  }
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? forward<float> : forward<Bf16>)(a + 1, most_nonzeros, &is_written);
  Py_END_ALLOW_THREADS;
  return status == Status::kOk ? PyBool_FromLong(is_written) : finish(status);
}

template <class T>
Entries<T> entries_of(const int64_t* a) {
  Entries<T> all;
  all.keep = static_cast<Keep>(a[0]);
  all.rows = a[1], all.outputs = a[2];
  all.grad = {address<const T>(a[3]), a[4]};
  all.count = a[5];
  all.key = static_cast<uint64_t>(a[6]);
  all.starts = address<int64_t>(a[7]), all.states = address<int32_t>(a[8]), all.groups = address<uint32_t>(a[9]);
  all.threads = thread_count(a[10]);
  return all;
}
constexpr Py_ssize_t kEntriesIntegers = 11;

bool valid_codes(const int64_t* a) {
  if ((a[0] == kFloat32 || a[0] == kBfloat16) && a[1] >= 0 && a[1] <= static_cast<int64_t>(Keep::kDrawn)) return true;
  PyErr_SetString(PyExc_ValueError, "unknown code of a dtype or of what is kept");
  return false;
}

template <class T>
Status plan(const int64_t* a, double share, int64_t* entries, uint32_t* cut, float* threshold) {
  Entries<T> all = entries_of<T>(a);
  all.share = share;
  const Status status = plan_entries(*active, &all);
  if (status == Status::kOk) *entries = all.starts[all.rows], *cut = all.cut, *threshold = all.threshold;
  return status;
}

PyObject* py_plan_entries(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[1 + kEntriesIntegers], entries = 0;
  double share;
  if (!read_numbers(args, given, 1 + kEntriesIntegers, 1, a, &share) || !valid_codes(a)) return nullptr;
  uint32_t cut = 0;
  float threshold = 0;
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? plan<float> : plan<Bf16>)(a + 1, share, &entries, &cut, &threshold);
  Py_END_ALLOW_THREADS;
  if (status != Status::kOk) return finish(status);
  return Py_BuildValue("(LId)", static_cast<long long>(entries), cut, static_cast<double>(threshold));
}

template <class T>
Status write(const int64_t* a, double threshold) {
  Entries<T> all = entries_of<T>(a);
  all.threshold = static_cast<float>(threshold);
  const int64_t* rest = a + kEntriesIntegers;
  all.cut = static_cast<uint32_t>(rest[0]);
  return write_entries(*active, all, address<T>(rest[1]), address<int32_t>(rest[2]), address<T>(rest[3]));
}

PyObject* py_write_entries(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[1 + kEntriesIntegers + 4];
  double threshold;
  if (!read_numbers(args, given, 1 + kEntriesIntegers + 4, 1, a, &threshold) || !valid_codes(a)) return nullptr;
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? write<float> : write<Bf16>)(a + 1, threshold);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

template <class T>
Status backward_with_entries(const int64_t* a, double share, double ceiling) {
  Entries<T> entries = {};
  entries.keep = static_cast<Keep>(a[0]);
  entries.count = a[1], entries.share = share, entries.key = static_cast<uint64_t>(a[2]);
  entries.rows = a[4], entries.outputs = a[5];
  entries.grad = {address<const T>(a[6]), a[7]};
  entries.threads = thread_count(a[17]);
  LinearBackward<T> call = {};
  call.inputs = a[8];
  call.weight = {address<const T>(a[9]), a[10]};
  call.x = {address<const T>(a[11]), a[12]};
  call.grad_input = address<T>(a[13]), call.grad_weight = address<T>(a[14]), call.grad_bias = address<T>(a[15]);
  return entries_backward(*active, entries, a[3] != 0, ceiling, call, address<int64_t>(a[16]));
}

PyObject* py_entries_backward(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[19];
  double f[2];
  if (!read_numbers(args, given, 19, 2, a, f) || !valid_codes(a)) return nullptr;
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? backward_with_entries<float> : backward_with_entries<Bf16>)(a + 1, f[0], f[1]);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

// The arguments of an activation with dropout.
constexpr Py_ssize_t kDropoutIntegers = 10;
bool read_dropout(PyObject* const* args, Py_ssize_t given, int64_t* a, Dropout* of) {
  double scale;
  if (!read_numbers(args, given, kDropoutIntegers, 1, a, &scale)) return false;
  if ((a[0] != kFloat32 && a[0] != kBfloat16) || a[1] < 0 || a[1] > static_cast<int64_t>(Activation::kTanh)) {
    PyErr_SetString(PyExc_ValueError, "unknown code of a dtype or of an activation");
    return false;
  }
  *of = {static_cast<Activation>(a[1]), static_cast<uint64_t>(a[2]), static_cast<uint32_t>(a[3]),
         static_cast<float>(scale)};
  return true;
}

template <class T>
Status dropped(const Dropout& of, const int64_t* a) {
  return drop(*active, of, a[0], address<const T>(a[1]), address<T>(a[2]), address<uint64_t>(a[4]), thread_count(a[5]));
}

template <class T>
Status dropped_gradient(const Dropout& of, const int64_t* a) {
  return drop_gradient(*active, of, a[0], address<const T>(a[3]), address<const T>(a[1]), address<const uint64_t>(a[4]),
                       address<T>(a[2]), thread_count(a[5]));
}

PyObject* run_dropout(PyObject* const* args, Py_ssize_t given, Status (*of_f32)(const Dropout&, const int64_t*),
                      Status (*of_bf16)(const Dropout&, const int64_t*)) {
  int64_t a[kDropoutIntegers];
  Dropout of;
  if (!read_dropout(args, given, a, &of)) return nullptr;
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? of_f32 : of_bf16)(of, a + 4);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

PyObject* py_drop(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run_dropout(args, given, dropped<float>, dropped<Bf16>);
}

PyObject* py_drop_gradient(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run_dropout(args, given, dropped_gradient<float>, dropped_gradient<Bf16>);
}

template <class T>
Status norms(const int64_t* a) {
  return map_norms<T>(*active, address<const T>(a[0]), a[1], a[2], address<float>(a[3]), thread_count(a[4]));
}

template <class T>
Status maps(const int64_t* a) {
  MapsBackward<T> call;
  Convolution& of = call.of;
  of.images = a[0], of.inputs = a[1], of.outputs = a[2];
  for (int d = 0; d < 2; ++d)
    of.size[d] = a[3 + d], of.output[d] = a[5 + d], of.kernel[d] = a[7 + d], of.stride[d] = a[9 + d],
    of.padding[d] = a[11 + d], of.dilation[d] = a[13 + d];
  call.grad = address<const T>(a[15]);
  call.maps = a[16];
  call.starts = address<const int64_t>(a[17]), call.channels = address<const int32_t>(a[18]);
  call.factors = address<const float>(a[19]);
  call.exact_sum = a[20] != 0, call.channels_last = a[21] != 0;
  call.weight = address<const T>(a[22]), call.x = address<const T>(a[23]);
  call.grad_input = address<T>(a[24]), call.grad_weight = address<T>(a[25]);
  call.threads = thread_count(a[26]);
  return maps_backward(*active, call);
}

PyObject* py_map_norms(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run(args, given, 5, false, norms<float>, norms<Bf16>);
}

PyObject* py_maps_backward(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run(args, given, 27, false, maps<float>, maps<Bf16>);
}

Sequences sequences(const int64_t* a) { return {a[0], a[1], address<const int64_t>(a[2]), a[3] != 0}; }

template <class W>
Status forward_of_lstm(const int64_t* a) {
  LstmForward<W> call;
  call.sequences = sequences(a);
  call.units = a[4], call.inputs = a[5];
  call.weight_ih = {address<const W>(a[6]), a[7]};
  call.weight_hh = {address<const W>(a[8]), a[9]};
  call.x = {address<const float>(a[10]), a[11]};
  call.bias = address<const float>(a[12]);
  call.from_zeros = a[13] != 0;
  call.h = address<float>(a[14]), call.c = address<float>(a[15]), call.gates = address<float>(a[16]);
  call.last_h = address<float>(a[17]), call.last_c = address<float>(a[18]);
  call.threads = thread_count(a[19]);
  return lstm_forward(*active, call);
}

PyObject* py_lstm_forward(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return run(args, given, 20, false, forward_of_lstm<float>, forward_of_lstm<Bf16>);
}

template <class W>
Status backward_of_lstm(const int64_t* a, const double* f) {
  LstmBackward<W> call;
  call.sequences = sequences(a);
  call.scope = a[4] == kRowsScope ? Scope::kRows : Scope::kColumns;
  call.units = a[5], call.inputs = a[6], call.k = a[7];
  call.weight_ih = {address<const W>(a[8]), a[9]};
  call.weight_hh = {address<const W>(a[10]), a[11]};
  call.x = {address<const float>(a[12]), a[13]};
  call.h = address<const float>(a[14]), call.c = address<const float>(a[15]);
  call.gates = address<const float>(a[16]);
  call.grad_output = address<const float>(a[17]);
  call.grad_last_h = address<const float>(a[18]), call.grad_last_c = address<const float>(a[19]);
  call.grad_x = address<float>(a[20]);
  call.grad_weight_ih = address<float>(a[21]), call.grad_weight_hh = address<float>(a[22]);
  call.grad_bias = address<float>(a[23]);
  call.grad_h0 = address<float>(a[24]), call.grad_c0 = address<float>(a[25]);
  call.hits = address<int64_t>(a[26]);
  call.threads = thread_count(a[27]);
  const StepEntries entries = {a[28] != 0, static_cast<Keep>(a[29]), a[7], f[0], static_cast<uint64_t>(a[30]),
                               a[31] != 0, f[1],                     address<int64_t>(a[32])};
  call.entries = entries.kept != nullptr ? &entries : nullptr;
  return lstm_backward(*active, call);
}

PyObject* py_lstm_backward(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[34];
  double f[2];
  if (!read_numbers(args, given, 34, 2, a, f)) return nullptr;
  if ((a[0] != kFloat32 && a[0] != kBfloat16) || (a[5] != kRowsScope && a[5] != kColumnsScope)) {
    PyErr_SetString(PyExc_ValueError, "unknown dtype or scope code");
    return nullptr;
  }
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = (a[0] == kFloat32 ? backward_of_lstm<float> : backward_of_lstm<Bf16>)(a + 1, f);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

// The arguments of an optimizer's step: those of all, then its own, `integers` in all, and `count` floats. A selection and
// an input [examples, width] follow `threads`. The product of both is the gradient if x is not null.
constexpr Py_ssize_t kRowsIntegers = 18;
struct Step {
  SparseRows rows;
  LinearBackward<float> product;
};
bool read_step(PyObject* const* args, Py_ssize_t given, Py_ssize_t integers, Py_ssize_t count, int64_t* a, double* f,
               Step* step) {
  if (!read_numbers(args, given, integers, count, a, f)) return false;
  LinearBackward<float>& product = step->product;
  product = {};
  product.scope = Scope::kRows, product.select = false, product.blocks = 1;
  product.k = a[9];
  product.values = address<float>(a[10]), product.indices = address<int32_t>(a[11]);
  product.starts = address<const int64_t>(a[12]), product.entries = a[13];
  product.shared = address<const float>(a[14]);
  product.rows = a[15];
  product.x = {address<const float>(a[16]), a[17]};
  step->rows = {a[0],
                a[1],
                a[2],
                address<const int64_t>(a[3]),
                address<const float>(a[4]),
                address<float>(a[5]),
                address<Bf16>(a[6]),
                a[7] != 0,
                thread_count(a[8]),
                product.x.data != nullptr ? &product : nullptr};
  return true;
}

template <template <class> class Options, class S>
PyObject* run_step(Status (*update)(const Kernels&, const SparseRows&, const Options<S>&), const Step& step,
                   const Options<S>& options) {
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = update(*active, step.rows, options);
  Py_END_ALLOW_THREADS;
  return finish(status);
}

// The options of a step from its own integers, of which the last is `key`, and its floats.
template <class S>
Sgd<S> sgd_options(const int64_t* own, const double* f) {
  return {address<S>(own[0]), address<const float>(own[1]), f[0], f[1], f[2], f[3], own[2] != 0,
          static_cast<uint64_t>(own[3])};
}
template <class S>
Adam<S> adam_options(const int64_t* own, const double* f) {
  return {address<S>(own[0]), address<S>(own[1]), address<const float>(own[2]), address<const float>(own[3]),
          address<const float>(own[4]), f[0], f[1], f[2], f[3], f[4], f[5], own[5] != 0, static_cast<uint64_t>(own[6])};
}
template <class S>
Adagrad<S> adagrad_options(const int64_t* own, const double* f) {
  return {address<S>(own[0]), f[0], f[1], f[2], static_cast<uint64_t>(own[1])};
}

// `key` is -1 for states of float32, and those of bfloat16 are rounded with it otherwise.
PyObject* py_sgd_rows(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[kRowsIntegers + 4];
  double f[4];
  Step call;
  if (!read_step(args, given, kRowsIntegers + 4, 4, a, f, &call)) return nullptr;
  const int64_t* own = a + kRowsIntegers;
  if (own[3] < 0) return run_step<Sgd, float>(sgd_rows, call, sgd_options<float>(own, f));
  return run_step<Sgd, Bf16>(sgd_rows, call, sgd_options<Bf16>(own, f));
}

PyObject* py_adam_rows(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[kRowsIntegers + 7];
  double f[6];
  Step call;
  if (!read_step(args, given, kRowsIntegers + 7, 6, a, f, &call)) return nullptr;
  const int64_t* own = a + kRowsIntegers;
  if (own[6] < 0) return run_step<Adam, float>(adam_rows, call, adam_options<float>(own, f));
  return run_step<Adam, Bf16>(adam_rows, call, adam_options<Bf16>(own, f));
}

PyObject* py_adagrad_rows(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[kRowsIntegers + 2];
  double f[3];
  Step call;
  if (!read_step(args, given, kRowsIntegers + 2, 3, a, f, &call)) return nullptr;
  const int64_t* own = a + kRowsIntegers;
  if (own[1] < 0) return run_step<Adagrad, float>(adagrad_rows, call, adagrad_options<float>(own, f));
  return run_step<Adagrad, Bf16>(adagrad_rows, call, adagrad_options<Bf16>(own, f));
}

PyObject* py_ascending(PyObject*, PyObject* const* args, Py_ssize_t given) {
  int64_t a[3];
  if (!read_integers(args, given, 3, a)) return nullptr;
  return PyBool_FromLong(ascending(address<const int64_t>(a[0]), a[1], a[2]));
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

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
PyCFunction as_method(FastCall function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }

PyMethodDef methods[] = {
    {"levels", py_levels, METH_NOARGS, "levels() -> names of the instruction-set levels that run here, slowest first"},
    {"level", py_level, METH_NOARGS, "level() -> the level in use"},
    {"use_level", py_use_level, METH_O, "use_level(name): serve later calls with that level"},
    {"topk", as_method(py_topk), METH_FASTCALL,
     "topk(dtype, scope, grad, grad_ld, rows, outputs, k, values, indices, threads)"},
    {"plan_entries", as_method(py_plan_entries), METH_FASTCALL,
     "plan_entries(dtype, keep, rows, outputs, grad, grad_ld, count, key, starts, states, groups, threads, share) -> the number of "
     "entries, the cut, the threshold"},
    {"write_entries", as_method(py_write_entries), METH_FASTCALL,
     "write_entries(dtype, keep, rows, outputs, grad, grad_ld, count, key, starts, states, groups, threads, cut, values, indices, "
     "left_out, threshold)"},
    {"column_scores", as_method(py_column_scores), METH_FASTCALL,
     "column_scores(dtype, scope, grad, grad_ld, rows, outputs, scores, threads)"},
    {"linear_forward", as_method(py_linear_forward), METH_FASTCALL,
     "linear_forward(dtype, rows, outputs, inputs, x, x_ld, weight, weight_ld, by_output, bias, out, threads, "
     "most_nonzeros) -> whether the output is written"},
    {"linear_backward", as_method(py_linear_backward), METH_FASTCALL,
     "linear_backward(dtype, scope, k, blocks, select, values, indices, starts, entries, shared, rows, outputs, grad, "
     "grad_ld, inputs, weight, weight_ld, x, x_ld, grad_input, grad_weight, grad_bias, weight_rows_only, hits, threads)"},
    {"entries_backward", as_method(py_entries_backward), METH_FASTCALL,
     "entries_backward(dtype, keep, count, key, exact_sum, rows, outputs, grad, grad_ld, inputs, weight, weight_ld, x, x_ld, "
     "grad_input, grad_weight, grad_bias, kept, threads, share, ceiling)"},
    {"drop", as_method(py_drop), METH_FASTCALL,
     "drop(dtype, activation, key, dropped, entries, x, y, 0, bits, threads, scale)"},
    {"drop_gradient", as_method(py_drop_gradient), METH_FASTCALL,
     "drop_gradient(dtype, activation, key, dropped, entries, x, grad_x, grad, bits, threads, scale)"},
    {"map_norms", as_method(py_map_norms), METH_FASTCALL, "map_norms(dtype, grad, maps, positions, norms, threads)"},
    {"maps_backward", as_method(py_maps_backward), METH_FASTCALL,
     "maps_backward(dtype, images, inputs, outputs, size, output, kernel, stride, padding, dilation (two of each), grad, "
     "maps, starts, channels, factors, exact_sum, channels_last, weight, x, grad_input, grad_weight, threads)"},
    {"lstm_forward", as_method(py_lstm_forward), METH_FASTCALL,
     "lstm_forward(dtype, rows, steps, sizes, reverse, units, inputs, weight_ih, weight_ih_ld, weight_hh, weight_hh_ld, x, x_ld, bias, "
     "from_zeros, h, c, gates, last_h, last_c, threads), the weights of the dtype, all else float32"},
    {"lstm_backward", as_method(py_lstm_backward), METH_FASTCALL,
     "lstm_backward(dtype, rows, steps, sizes, reverse, scope, units, inputs, k, weight_ih, weight_ih_ld, weight_hh, weight_hh_ld, x, "
     "x_ld, h, c, gates, grad_output, grad_last_h, grad_last_c, grad_x, grad_weight_ih, grad_weight_hh, grad_bias, "
     "grad_h0, grad_c0, hits, threads, each_gate, keep, key, exact_sum, kept, share, ceiling), the weights of the dtype, all "
     "else float32 but hits and kept; "
     "entries of all rows if kept is not 0"},
    {"sgd_rows", as_method(py_sgd_rows), METH_FASTCALL,
     "sgd_rows(rows, width, count, indices, grad, weight, copy, every_row, threads, k, values, indices, starts, entries, "
     "shared, examples, x, x_ld, buffer, keep, nesterov, key, lr, momentum, "
     "dampening, weight_decay)"},
    {"adam_rows", as_method(py_adam_rows), METH_FASTCALL,
     "adam_rows(rows, width, count, indices, grad, weight, copy, every_row, threads, k, values, indices, starts, entries, "
     "shared, examples, x, x_ld, exp_avg, exp_avg_sq, keep_first, "
     "keep_second, shrink, decoupled, key, step, lr, beta1, beta2, eps, weight_decay)"},
    {"adagrad_rows", as_method(py_adagrad_rows), METH_FASTCALL,
     "adagrad_rows(rows, width, count, indices, grad, weight, copy, every_row, threads, k, values, indices, starts, entries, "
     "shared, examples, x, x_ld, sum, key, lr, eps, weight_decay)"},
    {"ascending", as_method(py_ascending), METH_FASTCALL, "ascending(indices, count, rows) -> whether they are, int64"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of meprop; see csrc/kernels.h.", -1, methods,
                      nullptr,               nullptr, nullptr,                                        nullptr};

}  // namespace
}  // namespace meprop

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&meprop::module); }
