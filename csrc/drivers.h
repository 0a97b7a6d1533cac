// Whole operations: arguments checked, scratch allocated, work shared out among threads, one level's kernels called.
//
// In a process that was forked from one with OpenMP threads, everything runs on the calling thread: the others are not
// there any more.
//
// Shapes: grad [N, O] (rows, outputs), weight [O, I] (outputs, inputs), x [N, I]. Inputs have leading dimensions,
// outputs are contiguous. Every result is the same for every number of threads (but with torch.set_flush_denormal, which
// concerns the calling thread alone, denormal sums are not).
#pragma once

#include "kernels.h"

namespace meprop {

enum class Status { kOk, kBadSize, kBadIndex, kNoMemory };

// A matrix that is only read.
template <class T>
struct Matrix {
  const T* data;
  int64_t ld;
};

// Exact top-k of every row of grad [rows, outputs], as TypedKernels::topk_rows: values and indices [rows, k].
template <class T>
Status topk_rows(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                 int32_t* indices, int threads);

// The k columns of grad [rows, outputs] with the largest sums of magnitudes (formed in float64, row after row), by
// ascending index; of equal sums the lower index, NaN the largest. values [rows, k], indices [k].
template <class T>
Status topk_columns(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                    int32_t* indices, int threads);

enum class Scope { kRows, kColumns };

// The backward pass of a linear map whose output gradient is replaced by a selection of k entries of each row, or of k
// columns.
template <class T>
struct LinearBackward {
  Scope scope;
  int64_t rows, outputs, inputs, k;
  Matrix<T> grad;  // read for the selection, where `select`, and for grad_bias
  // Whether to make the selection, into values and indices where those are not null; otherwise they hold it.
  bool select;
  T* values;         // [rows, k]
  int32_t* indices;  // [rows, k] or [k]
  Matrix<T> weight;  // read for grad_input
  Matrix<T> x;       // read for grad_weight
  // What is null is not computed.
  T* grad_input;        // [rows, inputs]
  T* grad_weight;       // [outputs, inputs], or, of a selection of columns, [k, inputs] where weight_rows_only
  T* grad_bias;         // [outputs], from the whole of grad, not from the selection
  bool weight_rows_only;
  int threads;
};

template <class T>
Status linear_backward(const Kernels& kernels, LinearBackward<T> call);

}  // namespace meprop
