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

// To the nearest bfloat16, ties to even; NaN stays one. For the drivers: a level's unit has its own (kernels.h).
inline Bf16 rounded_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

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

// What topk_columns chooses by: the sums of magnitudes of the columns, scores [outputs].
template <class T>
Status column_scores(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, double* scores, int threads);

enum class Scope { kRows, kColumns };

// The backward pass of a linear map whose output gradient is replaced by a selection: of entries of each row, or of
// columns.
template <class T>
struct LinearBackward {
  Scope scope;
  int64_t rows, outputs, inputs;
  Matrix<T> grad;  // read for the selection, where `select`, and for grad_bias
  // Whether to make the selection, into values and indices where those are not null; otherwise they hold it. It is made
  // by exact top-k within each of so many equal blocks of the outputs.
  bool select;
  int64_t k, blocks;      // of each row K = k * blocks entries, or K columns; blocks is 1 of a given selection
  const int64_t* starts;  // [rows + 1], or null. Of given rows: row r has the entries from starts[r] to starts[r + 1]
  int64_t entries;        // how many there are with starts
  T* values;              // [rows, K], or, with starts, [entries]
  int32_t* indices;       // [rows, K] or [K], or, with starts, [entries]
  const T* shared;        // [outputs], or null: what a given selection adds to every row, of all outputs
  Matrix<T> weight;       // read for grad_input
  Matrix<T> x;            // read for grad_weight
  // What is null is not computed.
  T* grad_input;   // [rows, inputs]
  T* grad_weight;  // [outputs, inputs], or, of a selection of columns, [K, inputs] where weight_rows_only
  T* grad_bias;    // [outputs], from the whole of grad, not from the selection
  int64_t* hits;   // [outputs]: gets added in how many rows an output is selected with what is not zero (NaN is not)
  bool weight_rows_only;  // not with a shared part
  int threads;

  int64_t kept() const { return k * blocks; }
  int64_t selected() const { return starts != nullptr ? entries : rows * kept(); }
};

template <class T>
Status linear_backward(const Kernels& kernels, LinearBackward<T> call);

// Sequences of a batch in time-major order, packed as torch.nn.utils.rnn does: first the `sizes[0]` rows of time step 0,
// then the sizes[1] <= sizes[0] rows of time step 1, and so on; row b of every time step belongs to sequence b. An LSTM
// walks over the time steps from the first to the last, or, in `reverse`, from the last to the first.
struct Sequences {
  int64_t rows;  // the sum of sizes
  int64_t steps;
  const int64_t* sizes;
  bool reverse;
};

// One layer of an LSTM in one direction. Shapes: B = sizes[0] sequences, N the sum of sizes, I inputs, H units; all
// contiguous but x and the weights. `h` and `c`, outputs and cell states [B + N, H], begin with the initial ones [B, H].
struct LstmForward {
  Sequences sequences;
  int64_t units, inputs;
  Matrix<float> weight_ih;  // [4H, I]
  Matrix<float> weight_hh;  // [4H, H]
  Matrix<float> x;          // [N, I]
  const float* bias;        // [4H], or null
  bool from_zeros;          // whether the initial states are zeros: saves a product with them
  float* h;                 // the first [B, H] are read
  float* c;                 // the same
  float* gates;             // [N, 4H]: the gates' activations
  float* last_h;            // [B, H]: of each sequence, at its last step
  float* last_c;            // [B, H]
  int threads;
};

Status lstm_forward(const Kernels& kernels, LstmForward call);

// Its backward pass through time, in which of each gate's gradient (before the activation) a selection of k entries
// stands for the whole: at each time step, of each row, or of the time step's rows together. The cells' own gradients
// are exact. Reads what LstmForward wrote.
struct LstmBackward {
  Sequences sequences;
  Scope scope;
  int64_t units, inputs, k;
  Matrix<float> weight_ih;   // [4H, I]
  Matrix<float> weight_hh;   // [4H, H]
  Matrix<float> x;           // [N, I]
  const float* h;
  const float* c;
  const float* gates;
  // Null stands for zeros.
  const float* grad_output;  // [N, H]
  const float* grad_last_h;  // [B, H]
  const float* grad_last_c;  // [B, H]
  // What is null is not computed.
  float* grad_x;          // [N, I]
  float* grad_weight_ih;  // [4H, I]
  float* grad_weight_hh;  // [4H, H]
  float* grad_bias;       // [4H], from the whole gradients, not from the selections
  float* grad_h0;         // [B, H]
  float* grad_c0;         // [B, H]
  // Null, or what is added: in how many rows a selection has an entry of the unit, in any gate, that is not zero.
  int64_t* hits;  // [H]
  int threads;
};

Status lstm_backward(const Kernels& kernels, LstmBackward call);

// One step of an optimizer on a parameter [rows, width] whose gradient has `count` rows; the others are zero. All float32
// and contiguous.
struct SparseRows {
  int64_t rows, width, count;
  const int64_t* indices;  // [count], ascending
  const float* grad;       // [count, width]
  float* weight;
  Bf16* bf16_copy;     // [rows, width], or null: gets what becomes of the weights, as bfloat16
  bool every_row;   // whether the other rows move too, with a gradient of zeros
  float* row_step;  // [rows], or null: the step until which a row's state is up to date; what it missed is made up first
  double step;      // the number of this step, from 1
  int threads;
};

struct Sgd {
  float* buffer;  // or null, without momentum
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};
struct Adam {
  float* first;
  float* second;
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // weight decay as AdamW's
};
struct Adagrad {
  float* sum;
  double lr, eps, weight_decay;
};

Status sgd_rows(const Kernels& kernels, const SparseRows& call, const Sgd& options);
Status adam_rows(const Kernels& kernels, const SparseRows& call, const Adam& options);
Status adagrad_rows(const Kernels& kernels, const SparseRows& call, const Adagrad& options);

// Whether indices ascend, within [0, rows).
bool ascending(const int64_t* indices, int64_t count, int64_t rows);

// Whether `bf16_copy` has what becomes of `weight` as bfloat16, at about `samples` entries of all `size`, evenly spread.
bool copy_agrees(const float* weight, const Bf16* bf16_copy, int64_t size, int64_t samples);

}  // namespace meprop
