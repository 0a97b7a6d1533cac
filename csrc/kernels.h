// The native kernels: what each one promises, and the table through which everything reaches them.
//
// A level is one instruction set. Each level's unit (level_*.cpp) compiles the same algorithms (topk.inl, products.inl)
// on its own vector type (simd_*.h) inside its own namespace, and exports one `Kernels` table. The table is the whole
// list of variants: the binding dispatches through it, and tests and benchmarks enumerate it.
//
// Conventions: sizes and leading dimensions are in elements; matrices are row-major, a row's elements are adjacent, and
// rows may overlap or repeat (any leading dimension) where they are only read. The caller has checked what is said
// under "requires"; kernels do not check again. No kernel allocates, throws, or keeps state between calls. This header
// holds no inline functions: shared by two levels, one would be kept, with the wrong instructions for the other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meprop {

// bfloat16 as it lies in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// Words that a kernel may write beyond the used part of its scratch.
constexpr int64_t kScratchPad = 64;

// A sparse matrix by rows: row r is the terms from starts[r] to starts[r + 1], or, where starts is null, from
// r * per_row to (r + 1) * per_row; each is a coefficient and the row of the source that it multiplies.
template <class T>
struct Terms {
  const int64_t* starts;
  int64_t per_row;
  const int32_t* rows;
  const T* coefficients;
};

// What the sums of output row r begin with: `row`, times factors[r], or as it is where factors is null. Null: zeros.
template <class T>
struct Base {
  const float* row;
  const T* factors;
};

template <class T>
struct TypedKernels {
  // Exact top-k of rows [row_begin, row_end) of grad [rows, width].
  //
  // Writes per row the k entries of largest magnitude, by ascending index: their values, unchanged, and their indices.
  // Of equal magnitudes the lower index is taken; every NaN counts as larger than infinity and as equal to every other.
  // requires: 1 <= k <= width < 2^31; scratch of 2 * (width + kScratchPad) words for the calling thread alone.
  void (*topk_rows)(const T* grad, int64_t grad_ld, int64_t row_begin, int64_t row_end, int64_t width, int64_t k,
                    T* values, int32_t* indices, uint32_t* scratch);

  // Adds grad [rows, columns] to `sums` [columns], and its magnitudes to `magnitudes`, row after row. Either may be null.
  void (*add_columns)(const T* grad, int64_t grad_ld, int64_t rows, int64_t columns, double* sums, double* magnitudes);

  // Adds the rows of source [rows, columns], each times its factor, to `sums` [columns], row after row.
  void (*add_scaled_rows)(const T* source, int64_t source_ld, const T* factors, int64_t rows, int64_t columns,
                          double* sums);

  // How many columns dense_product and gather_product compute at once, in elements: the second is a multiple of the
  // first.
  int panel_width;
  int gather_width;

  // Copies `width` columns of the named rows of a source (of its first `count` rows, where rows is null) to `packed`
  // [count, packed_ld], zero beyond `width`.
  // requires: 1 <= width <= packed_ld, a multiple of panel_width.
  void (*pack)(const T* source, int64_t source_ld, const int32_t* rows, int64_t count, int64_t width, T* packed,
               int64_t packed_ld);

  // out[r, :width] = base of r + sum over the terms of row r of coefficient * source[term's row, :width], for r in
  // [row_begin, row_end). Summed in float32 in the order of the terms, then rounded to T.
  // requires: 1 <= width <= gather_width; readable elements in each row of the source: width, rounded up to panel_width.
  void (*gather_product)(const T* source, int64_t source_ld, const Terms<T>& terms, Base<T> base, int64_t row_begin,
                         int64_t row_end, int64_t width, T* out, int64_t out_ld);

  // out[r, :width] = base of r + sum over d < depth of coefficients[r * row_stride + d * depth_stride] *
  // source[d, :width], for r in [row_begin, row_end). Summed in float32 by ascending d, then rounded to T.
  // requires: 1 <= width <= panel_width <= readable elements in each row of the source.
  void (*dense_product)(const T* source, int64_t source_ld, int64_t depth, const T* coefficients, int64_t row_stride,
                        int64_t depth_stride, Base<T> base, int64_t row_begin, int64_t row_end, int64_t width, T* out,
                        int64_t out_ld);
};

// The cells of an LSTM. Its units are computed in blocks of `block`; a unit has four gates, in torch's order: input,
// forget, cell, output. `units` below is the number of units of a block that are there: 1 <= units <= block.
struct LstmKernels {
  // In a block, the gates' sums lie one gate after the other: 4 * block floats, which is TypedKernels<float>::panel_width.
  int block;

  // Copies the block of units that begins at `weight` ([4 * gate_stride rows, depth]: a unit's gates are gate_stride rows
  // apart) to packed [depth, 4 * block]: what dense_product takes as its source. Zero for units that are not there.
  void (*pack)(const float* weight, int64_t weight_ld, int64_t gate_stride, int64_t units, int64_t depth, float* packed);

  // The same product for one row, straight from the weight: sums[gate * block + unit] = weight row * x [depth].
  void (*dot)(const float* weight, int64_t weight_ld, int64_t gate_stride, int64_t units, const float* x, int64_t depth,
              float* sums);

  // Puts sums [rows, 4 * block] where their gates are, in rows 4 * gate_stride apart, a unit's gates gate_stride apart;
  // `bias` (null: zeros), gates as far apart, is added.
  void (*spread)(const float* sums, const float* bias, int64_t rows, int64_t units, int64_t gate_stride, float* gates);

  // One step of a block's cells for some rows. `gates` holds the input's part of the gates, laid out as by `spread`, and
  // gets the gates' activations; `sums` [rows, 4 * block] is their recurrent part. From them and the earlier cell state
  // the new state and the output; rows of all three are gate_stride apart. Null `sums` stand for zeros.
  void (*step)(const float* sums, int64_t rows, int64_t units, int64_t gate_stride, float* gates, const float* earlier,
               float* cells, float* output);

  // The gradient of one step of one row's cells, all `units` (any number) of them: of the gates before their
  // activations, gate_gradients [4, units], and, in place, of the cell state: from that of this step's to that of the
  // earlier one. grad_output (null: zeros) and grad_carried are summed to the output's gradient. The gates' gradients
  // are also added to gate_sums [4, units], where that is not null.
  void (*step_gradient)(int64_t units, const float* gates, const float* cells, const float* earlier,
                        const float* grad_output, const float* grad_carried, float* grad_cells, float* gate_gradients,
                        float* gate_sums);
};

// What an optimizer does to one row of a parameter, whose gradient is g (zeros, where the gradient is null): first
// g += l2 * w. Where `bf16_copy` is not null, it gets the new weights rounded to bfloat16.
struct SgdStep {
  float l2, lr, momentum;
  float keep, add;  // buffer = keep * buffer + add * g
  bool nesterov;    // w -= lr * (g + momentum * buffer), instead of lr * buffer
};
struct AdamStep {
  float l2;
  float shrink;             // w *= shrink
  float keep_first, first;  // exp_avg = keep_first * exp_avg + first * g
  float keep_second, second;
  float step_size, root_scale, eps;  // w -= step_size * exp_avg / (root_scale * sqrt(exp_avg_sq) + eps)
};
struct AdagradStep {
  float l2, lr, eps;  // sum += g * g; w -= lr * g / (sqrt(sum) + eps)
};

struct OptimizerKernels {
  void (*sgd)(const SgdStep& step, int64_t width, const float* grad, float* weight, float* buffer, Bf16* bf16_copy);
  void (*adam)(const AdamStep& step, int64_t width, const float* grad, float* weight, float* first, float* second,
               Bf16* bf16_copy);
  void (*adagrad)(const AdagradStep& step, int64_t width, const float* grad, float* weight, float* sum, Bf16* bf16_copy);
};

struct Kernels {
  const char* level;
  TypedKernels<float> f32;
  TypedKernels<Bf16> bf16;
  LstmKernels lstm;
  OptimizerKernels optimizer;
};

extern const Kernels kScalar;
#ifdef MEPROP_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace meprop
