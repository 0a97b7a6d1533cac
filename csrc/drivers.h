// Whole operations. Each one checks its arguments, allocates scratch, shares out the work among threads, and calls the
// kernels of one level.
//
// In a process that was forked from one with OpenMP threads, everything runs on the calling thread. The other threads
// do not exist there.
//
// Shapes: grad [N, O] (rows, outputs), weight [O, I] (outputs, inputs), x [N, I]. Inputs have leading dimensions.
// Outputs are contiguous. Every result is the same for every number of threads. There is one exception: denormal sums
// differ with torch.set_flush_denormal, which affects only the calling thread.
#pragma once

#include "kernels.h"

namespace meprop {

// Rounds to the nearest bfloat16, ties to even. NaN stays NaN. It is for the drivers. The unit of a level has its own
// function (kernels.h).
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

// Exact top-k of each row of grad [rows, outputs], as in TypedKernels::topk_rows. Writes values and indices [rows, k].
template <class T>
Status topk_rows(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                 int32_t* indices, int threads);

// The k columns of grad [rows, outputs] with the largest sums of magnitudes, by ascending index. Sums are formed in
// float64, row after row. Among equal sums the lower index is taken. NaN is the largest. Writes values [rows, k] and
// indices [k].
template <class T>
Status topk_columns(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                    int32_t* indices, int threads);

// The sums of magnitudes of the columns, scores [outputs], by which topk_columns chooses.
template <class T>
Status column_scores(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, double* scores, int threads);

// Which entries of a whole output gradient are kept, whatever row they are in.
//
// The upper half of a key (kernels.h) is a magnitude in bfloat16, rounded towards zero. Thresholds are such magnitudes,
// but for that of kDrawn.
// Entries of one upper half count as the middle between it and the next one, or as bounds that hold for all of them.
// Random numbers are those of Philox 4x32-10 (Salmon et al., SC 2011) for `key` and the number of the row.
enum class Keep {
  kLargest,  // exactly `count` entries. Among equal magnitudes the lower row, then the lower column is taken. NaN is the
             // largest
  kEnergy,   // the largest ones, which hold at least `share` of the sum of squares
  kNoise,    // drawn ones, under the largest threshold that adds variance of at most `share` of the sum of squares, and
             // that keeps about `count` entries or more
  kDrawn     // exactly `count` drawn ones, or all that are not zero if these are fewer
};

// The number of groups (kernels.h) of a row.
inline int64_t groups_of(int64_t width) { return (width + kGroup - 1) / kGroup; }

template <class T>
struct Entries {
  Keep keep;
  int64_t rows, outputs;
  Matrix<T> grad;
  int64_t count;
  double share;
  uint64_t key;
  // What plan_entries writes and write_entries reads.
  int64_t* starts;  // [rows + 1], the place of each row's first entry
  int32_t* states;  // [rows], how many entries equal to the cut a row keeps, or where its systematic sampling starts
  uint32_t* groups;  // [rows, groups of kGroup outputs], the sums of probabilities. Not for kLargest and kEnergy
  uint32_t cut;
  float threshold;
  int threads;
};

// Finds the cut, the threshold, and how many entries each row keeps.
template <class T>
Status plan_entries(const Kernels& kernels, Entries<T>* entries);

// Writes the values and the indices of the entries, one row after the other. If `left_out` [outputs] is not null, it
// gets the mean over the rows of what is not kept: of the gradient less the written values. Summed in float64.
template <class T>
Status write_entries(const Kernels& kernels, const Entries<T>& entries, T* values, int32_t* indices, T* left_out);

enum class Scope { kRows, kColumns };

// Takes the gradient of a weight [outputs, inputs] as it is computed, by parts of rows. Each part is taken once, by any
// thread.
class GradientTaker {
 public:
  virtual ~GradientTaker() = default;
  virtual void take(int64_t row, int64_t column, int64_t width, const float* grad) const = 0;
};

// The backward pass of a linear map whose output gradient is replaced by a selection of entries of each row or of
// columns.
template <class T>
struct LinearBackward {
  Scope scope;
  int64_t rows, outputs, inputs;
  Matrix<T> grad;  // read for grad_bias, and for the selection if `select` is true
  // Whether to make the selection. It is exact top-k within each of `blocks` equal blocks of the outputs. It is written
  // to values and indices where those are not null. If `select` is false, values and indices hold the selection.
  bool select;
  int64_t k, blocks;      // K = k * blocks entries of each row, or K columns. A given selection has 1 block
  const int64_t* starts;  // [rows + 1], or null. Row r of a given selection has the entries starts[r] to starts[r + 1]
  int64_t entries;        // the number of all entries, with starts
  T* values;              // [rows, K], or [entries] with starts
  int32_t* indices;       // [rows, K] or [K], or [entries] with starts
  const T* shared;        // [outputs], or null. A given selection adds it to every row
  Matrix<T> weight;       // read for grad_input
  Matrix<T> x;            // read for grad_weight
  // What is null is not computed.
  T* grad_input;   // [rows, inputs]
  T* grad_weight;  // [outputs, inputs], or [K, inputs] with weight_rows_only, which needs a selection of columns
  T* grad_bias;    // [outputs], from the whole grad, not from the selection
  int64_t* hits;   // [outputs]. Adds the number of rows whose selected entry of an output is not zero. NaN is not zero
  bool weight_rows_only;  // not with a shared part
  int threads;
  // Takes the weight's gradient instead of grad_weight, or null. It is for float32 and a selection of entries by row.
  const GradientTaker* taker = nullptr;

  bool needs_weight() const { return grad_weight != nullptr || taker != nullptr; }
  int64_t kept() const { return k * blocks; }
  int64_t selected() const { return starts != nullptr ? entries : rows * kept(); }
};

template <class T>
Status linear_backward(const Kernels& kernels, LinearBackward<T> call);

// The forward pass of a linear map, out [rows, outputs] = x W^T + bias. Entries of x that are zero are left out of the
// sums. NaN is not zero. Sums are formed in float32, by ascending input.
template <class T>
struct LinearForward {
  int64_t rows, outputs, inputs;
  Matrix<T> x;
  Matrix<T> weight;
  bool by_output;  // whether the weight is in memory as W [outputs, inputs], else as its transpose [inputs, outputs]
  const T* bias;  // [outputs], or null
  T* out;
  double most_nonzeros;  // the share of entries that are not zero above which nothing is written
  bool* is_written;      // gets whether something is
  int threads;
};

template <class T>
Status linear_forward(const Kernels& kernels, const LinearForward<T>& call);

// plan_entries, write_entries and linear_backward in one. `call` says what is to be read and written beside the entries:
// inputs, weight, x and the gradients. `kept` gets the number of entries. If this is more than the share `ceiling` of
// all, nothing else is done. With `exact_sum` all rows share the mean of what is left out.
template <class T>
Status entries_backward(const Kernels& kernels, Entries<T> entries, bool exact_sum, double ceiling,
                        LinearBackward<T> call, int64_t* kept);

// The norms [maps] of the maps of grad [maps, positions]. Squares are summed in float64.
template <class T>
Status map_norms(const Kernels& kernels, const T* grad, int64_t maps, int64_t positions, float* norms, int threads);

// A convolution of images in one group. One spatial dimension is two, of which the first has size 1. `output` holds the
// sizes of the output.
struct Convolution {
  int64_t images, inputs, outputs;
  int64_t size[2], output[2], kernel[2], stride[2], padding[2], dilation[2];
};

// The backward pass of a convolution of which some maps of the output gradient [N, O, *T] are kept, each times a factor.
// A map is what one image and one output channel have. Entries that are zero cost nothing. Products are summed in
// float32.
template <class T>
struct MapsBackward {
  Convolution of;
  const T* grad;            // [N, O, *T], contiguous
  int64_t maps;             // the number of kept ones
  const int64_t* starts;    // [N + 1]. Image n has the maps from starts[n] to starts[n + 1]
  const int32_t* channels;  // [maps], ascending in each image
  const float* factors;     // [maps]
  bool exact_sum;           // whether each image gets in addition the mean over the images of what is left out
  bool channels_last;       // whether x and grad_input are [N, *S, I], else [N, I, *S]. Both are contiguous
  const T* weight;          // [O, I, *K], contiguous. Read for grad_input
  const T* x;               // read for grad_weight
  // What is null is not computed.
  T* grad_input;
  T* grad_weight;  // [O, I, *K]
  int threads;
};

template <class T>
Status maps_backward(const Kernels& kernels, const MapsBackward<T>& call);

// Sequences of a batch in time-major order, packed as torch.nn.utils.rnn does. The sizes[0] rows of time step 0 come
// first, then the sizes[1] <= sizes[0] rows of time step 1, and so on. Row b of each time step belongs to sequence b.
// An LSTM walks over the time steps from the first to the last. In `reverse` it walks from the last to the first.
struct Sequences {
  int64_t rows;  // the sum of sizes
  int64_t steps;
  const int64_t* sizes;
  bool reverse;
};

// One layer of an LSTM in one direction. B = sizes[0] is the number of sequences, N the sum of sizes, I the number of
// inputs, and H the number of units. Everything is contiguous except x and the weights. `h` and `c` are outputs and
// cell states [B + N, H]. They begin with the initial ones [B, H]. The weights are of W.
template <class W>
struct LstmForward {
  Sequences sequences;
  int64_t units, inputs;
  Matrix<W> weight_ih;  // [4H, I]
  Matrix<W> weight_hh;  // [4H, H]
  Matrix<float> x;      // [N, I]
  const float* bias;    // [4H], or null
  bool from_zeros;      // whether the initial states are zeros, which saves a product with them
  float* h;             // the first [B, H] are read
  float* c;             // the same
  float* gates;         // [N, 4H], the gates' activations
  float* last_h;        // [B, H], of each sequence at its last step
  float* last_c;        // [B, H]
  int threads;
};

template <class W>
Status lstm_forward(const Kernels& kernels, LstmForward<W> call);

// Entries of the gates' gradients [n, 4H] of each time step, as in Entries.
struct StepEntries {
  bool each_gate;  // whether they are chosen in each gate [n, H], else in all gates together
  Keep keep;
  int64_t k;  // entries of a row, which make up `count`
  double share;
  uint64_t key;    // that of time step t is key + t
  bool exact_sum;  // whether all rows of a time step share the mean of what is left out. One row alone keeps everything
  double ceiling;  // the density above which a time step keeps everything
  int64_t* kept;   // [T], gets the number of entries that each time step keeps
};

// The backward pass of such a layer through time. At each time step a selection replaces the gates' gradients before
// the activation. It is k entries of each gate of each row, or k units of each gate of all rows of the time step, or
// entries of all rows. The cells' own gradients are exact. The pass reads what LstmForward wrote.
template <class W>
struct LstmBackward {
  Sequences sequences;
  const StepEntries* entries;  // or null. Then scope and k say what is selected
  Scope scope;
  int64_t units, inputs, k;
  Matrix<W> weight_ih;  // [4H, I]
  Matrix<W> weight_hh;  // [4H, H]
  Matrix<float> x;      // [N, I]
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
  // Adds the number of rows in which the selection of some gate has an entry of the unit that is not zero. What all rows
  // share does not count.
  int64_t* hits;  // [H], or null
  int threads;
};

template <class W>
Status lstm_backward(const Kernels& kernels, LstmBackward<W> call);

// TypedKernels::drop and drop_gradient on so many entries, which are adjacent. `bits` has a word for each block of
// kBitBlock.
template <class T>
Status drop(const Kernels& kernels, const Dropout& of, int64_t entries, const T* x, T* y, uint64_t* bits, int threads);
template <class T>
Status drop_gradient(const Kernels& kernels, const Dropout& of, int64_t entries, const T* grad, const T* x,
                     const uint64_t* bits, T* grad_x, int threads);

// One step of an optimizer on a parameter [rows, width] whose gradient has `count` rows. The other rows of the gradient
// are zero. All tensors are float32 and contiguous, but the states of an optimizer may be bfloat16.
struct SparseRows {
  int64_t rows, width, count;
  const int64_t* indices;  // [count], ascending. Null if all rows have a gradient, whose steps have no `keep` of rows
  const float* grad;       // [count, width]
  float* weight;
  Bf16* copy;      // of the weights, which each row that moves is also written to; or null
  bool every_row;  // whether the other rows move too, with a gradient of zeros
  int threads;
  // The gradient is the weight gradient of this backward pass of a linear map, which is never written; or null. It has
  // `count` rows, those of `indices`, and no other row moves.
  const LinearBackward<float>* product;
};

// Each `keep` [rows] below may be null. It then stands for what one step keeps of a row's state: momentum, beta1 or
// beta2. It has another value for a row that has missed steps. `key` is that of Rounding, for states of bfloat16.
template <class S>
struct Sgd {
  S* buffer;  // null without momentum
  const float* keep;
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
  uint64_t key;
};
template <class S>
struct Adam {
  S* first;
  S* second;
  const float* keep_first;
  const float* keep_second;
  const float* shrink;  // [rows], or null for 1 - lr * weight_decay. The factor of decoupled weight decay
  double step;          // the number of this step, from 1
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // whether weight decay is decoupled, as in AdamW
  uint64_t key;
};
template <class S>
struct Adagrad {
  S* sum;
  double lr, eps, weight_decay;
  uint64_t key;
};

template <class S>
Status sgd_rows(const Kernels& kernels, const SparseRows& call, const Sgd<S>& options);
template <class S>
Status adam_rows(const Kernels& kernels, const SparseRows& call, const Adam<S>& options);
template <class S>
Status adagrad_rows(const Kernels& kernels, const SparseRows& call, const Adagrad<S>& options);

// Whether indices ascend and lie within [0, rows).
bool ascending(const int64_t* indices, int64_t count, int64_t rows);

}  // namespace meprop
