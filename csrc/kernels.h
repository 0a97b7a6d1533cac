// The contracts of the native kernels, and the table of a level's kernels.
//
// A level is one instruction set. Each level has a unit (level_*.cpp), which compiles the same algorithms (topk.inl,
// products.inl) on its own vector type (simd_*.h) inside its own namespace, and exports one `Kernels` table. The tables
// are the whole list of variants. The binding dispatches through them. Tests and benchmarks enumerate them.
//
// Conventions: sizes and leading dimensions are in elements. Matrices are row-major, and a row's elements are adjacent.
// Rows that are only read may overlap or repeat (any leading dimension). The caller has checked what is said under
// "requires", and kernels do not check it again. No kernel allocates, throws, or keeps state between calls. This header
// has no inline functions. If two levels shared one, the linker would keep only one of them, with the wrong
// instructions for the other level.
#pragma once

#include <cstddef>
#include <cstdint>

namespace meprop {

// A bfloat16 in memory, which is the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// Words that a kernel may write beyond the used part of its scratch.
constexpr int64_t kScratchPad = 64;

// The rows of patches are padded to a multiple of so many floats.
constexpr int64_t kPatchPad = 32;

// A sparse matrix by rows. Row r has the terms from starts[r] to starts[r + 1]. If starts is null, it has those from
// r * per_row to (r + 1) * per_row. A term is a coefficient and the row of the source that it multiplies.
template <class T>
struct Terms {
  const int64_t* starts;
  int64_t per_row;
  const int32_t* rows;
  const T* coefficients;
};

// The first value of the sums of output row r. It is row * factors[r], or `row` if factors is null, or zeros if `row`
// is null.
template <class T>
struct Base {
  const float* row;
  const T* factors;
};

// The key of an entry is its magnitude as the bits of a float32. All NaN have one key, which is infinity's plus one.
constexpr uint32_t kNanKey = 0x7f800001u;

// The least key above 0, or 0 if there is none, and the largest key.
struct KeyRange {
  uint32_t least, most;
};
struct KeyCounts {
  int64_t above, equal;
};

// With which probability an entry is drawn: 1 if its key is at least `cut`, else its magnitude times scale * 2^-24,
// rounded to a multiple of 2^-24.
struct Probability {
  uint32_t cut;
  float scale;
};

// What a Probability makes of some entries. Squares are of magnitudes times its scale.
struct DrawSums {
  uint64_t probabilities;  // in units of 2^-24
  int64_t certain;         // the number of entries of probability 1, from the cut on
  double squares_below;    // the sum over the entries below the cut
  double squares;          // the sum over all finite entries
};

// A row is summed and drawn from in groups of so many neighbours. The last group may have fewer.
constexpr int kGroup = 16;

enum class Activation { kIdentity, kRelu, kGelu, kGeluTanh, kTanh };

// An activation, and dropout of its results. Random numbers are those of Philox 4x32-10 (Salmon et al., SC 2011) for
// `key`. An entry has 16 random bits of its own. It is dropped if these are below `dropped` < 2^16, else it is
// multiplied by `scale`. A block of kBitBlock entries has as many eighths of counters. Entry i of block b has those of
// counter 8 b + i % 32 / 4: half i % 2 of word i / 32 * 2 + i % 4 / 2, the lower half first.
struct Dropout {
  Activation activation;
  uint64_t key;
  uint32_t dropped;
  float scale;
};
constexpr int kBitBlock = 64;

// Products with a source of S, whose coefficients and results are of T.
template <class S, class T>
struct ProductKernels {
  // The numbers of columns that dense_product and gather_product compute at once. The second is a multiple of the
  // first.
  int panel_width;
  int gather_width;

  // Copies `width` columns of the named rows of a source to `packed` [count, packed_ld]. If `rows` is null, it copies
  // the first `count` rows. Columns beyond `width` are zero.
  // requires: 1 <= width <= packed_ld, a multiple of panel_width.
  void (*pack)(const S* source, int64_t source_ld, const int32_t* rows, int64_t count, int64_t width, S* packed,
               int64_t packed_ld);

  // Copies `width` rows of a source to the columns of `packed` [count, packed_ld], `count` entries of each. Columns beyond
  // `width` are zero.
  // requires: 1 <= width <= packed_ld, a multiple of half of panel_width.
  void (*pack_transposed)(const S* source, int64_t source_ld, int64_t count, int64_t width, S* packed, int64_t packed_ld);

  // out[r, :width] = base of r + sum over the terms of row r of coefficient * source[term's row, :width], for r in
  // [row_begin, row_end). The sum is formed in float32 in the order of the terms, then rounded to T.
  // requires: 1 <= width <= gather_width; each row of the source has readable elements up to `width`, rounded up to
  // panel_width, or up to half a panel if `width` is not more than that.
  void (*gather_product)(const S* source, int64_t source_ld, const Terms<T>& terms, Base<T> base, int64_t row_begin,
                         int64_t row_end, int64_t width, T* out, int64_t out_ld);

  // out[r, :width] = base of r + sum over d < depth of coefficients[r * row_stride + d * depth_stride] *
  // source[d, :width], for r in [row_begin, row_end). The sum is formed in float32 by ascending d, then rounded to T.
  // requires: 1 <= width <= panel_width <= readable elements in each row of the source.
  void (*dense_product)(const S* source, int64_t source_ld, int64_t depth, const T* coefficients, int64_t row_stride,
                        int64_t depth_stride, Base<T> base, int64_t row_begin, int64_t row_end, int64_t width, T* out,
                        int64_t out_ld);
};

template <class T>
struct TypedKernels : ProductKernels<T, T> {
  // Exact top-k of rows [row_begin, row_end) of grad [rows, width].
  //
  // Writes the values and the indices of the k entries of largest magnitude of each row, by ascending index. The values
  // are unchanged. Among equal magnitudes the lower index is taken. Every NaN counts as larger than infinity and as
  // equal to every other NaN.
  // requires: 1 <= k <= width < 2^31; scratch of 2 * (width + kScratchPad) words for the calling thread alone.
  void (*topk_rows)(const T* grad, int64_t grad_ld, int64_t row_begin, int64_t row_end, int64_t width, int64_t k,
                    T* values, int32_t* indices, uint32_t* scratch);

  // The following seven read one row of `width` entries.
  //
  // Widens a range so that it has the row's keys.
  void (*widen_range)(const T* row, int64_t width, KeyRange* range);
  // Counts the entries by the upper halves of their keys, from `first` on. `counts` holds two tables of so many places,
  // and each entry is counted in one of them. The second place is for `first`, the third for the next, and so on.
  // requires: first >= 1.
  void (*count_upper_halves)(const T* row, int64_t width, uint32_t first, int64_t table, uint32_t* counts);
  // Writes the keys that are at least `least`, in the order of the entries, and returns how many there are. They may be
  // followed by up to kScratchPad words that mean nothing.
  int64_t (*keys_from)(const T* row, int64_t width, uint32_t least, uint32_t* keys);
  // The numbers of entries whose key is above the cut and equal to it.
  KeyCounts (*count_keys)(const T* row, int64_t width, uint32_t cut);
  // Writes the values and the indices of the entries above the cut and of the first `ties` equal to it, by ascending
  // index.
  // requires: scratch of 2 * (width + kScratchPad) words.
  void (*largest_entries)(const T* row, int64_t width, uint32_t cut, int64_t ties, T* values, int32_t* indices,
                          uint32_t* scratch);
  // Adds what becomes of the row to `sums`, and returns its sum of probabilities. Writes that of each group to `groups`,
  // unless it is null.
  uint64_t (*sum_row)(const T* row, int64_t width, Probability of, uint32_t* groups, DrawSums* sums);
  // Systematic sampling: writes the entries at which the sum of the probabilities so far, begun with start * 2^-24,
  // reaches the next integer. These are floor(start * 2^-24 + sum of all) entries. An entry below the cut is written as
  // `threshold` with its sign. `groups` has what sum_row wrote.
  // requires: start < 2^24; scratch of 4 * (width + kScratchPad) words.
  void (*drawn_entries)(const T* row, int64_t width, Probability of, T threshold, uint32_t start,
                        const uint32_t* groups, T* values, int32_t* indices, uint32_t* scratch);

  // Adds grad [rows, columns] to `sums` [columns], and its magnitudes to `magnitudes`, row after row. Either may be
  // null.
  void (*add_columns)(const T* grad, int64_t grad_ld, int64_t rows, int64_t columns, double* sums, double* magnitudes);

  // Adds the rows of source [rows, columns], each times its factor, to `sums` [columns], row after row.
  void (*add_scaled_rows)(const T* source, int64_t source_ld, const T* factors, int64_t rows, int64_t columns,
                          double* sums);

  // The sum of the squares of so many entries. It is the same at every level.
  double (*sum_squares)(const T* from, int64_t size);
  // Adds so many entries, each times the factor, to `sums`.
  void (*add_scaled)(const T* from, float factor, int64_t size, double* sums);

  // y = activation(x) * scale where an entry is kept, else * 0, for the entries from `begin` to `end`. So what is not
  // finite stays so. Writes a bit for each entry: whether it is kept, and with ReLU also whether x is above 0 or NaN.
  // Bits beyond `end` are 0.
  // requires: `begin` is a multiple of kBitBlock.
  void (*drop)(const Dropout& of, const T* x, int64_t begin, int64_t end, T* y, uint64_t* bits);
  // The gradient: grad * scale * derivative at x where the bit is set, else * 0. With ReLU it is grad * scale where the
  // bit is set, else 0. `x` is not read with ReLU and without an activation.
  // requires: `begin` is a multiple of kBitBlock.
  void (*drop_gradient)(const Dropout& of, const T* grad, const T* x, const uint64_t* bits, int64_t begin, int64_t end,
                        T* grad_x);
};

// Places of an image that get or give a patch. A place is an offset from the image's begin. Place i has the terms from
// starts[i] to starts[i + 1]. A term is a coefficient and the row of a source that it multiplies.
struct Patches {
  int64_t count;
  const int32_t* places;
  const int32_t* starts;
  const int32_t* rows;
  const float* coefficients;
};

// Convolutions of which some maps of the output gradient are kept. An image is in memory as [*S, I], so that a row of a
// patch is `width` adjacent floats.
struct MapKernels {
  // sums[:width] += sum over t < count of coefficients[t] * source[places[t] + :width], in the order of the terms. Writes
  // sums up to `width`, rounded up to kPatchPad.
  // requires: readable elements behind each place up to `width`, rounded up to kPatchPad.
  void (*gather_patches)(const float* source, const int32_t* places, const float* coefficients, int64_t count,
                         int64_t width, float* sums);
  // out[place, :width] += sum over the place's terms of coefficient * source[term's row, :width], place after place.
  void (*add_patches)(const float* source, int64_t source_ld, const Patches& patches, int64_t width, float* out);
};

// The cells of an LSTM. Units are computed in blocks of `block`. A unit has four gates, in torch's order: input,
// forget, cell, output. `units` below is the number of units that a block has, 1 <= units <= block.
struct LstmKernels {
  // In a block the gates' sums lie one gate after the other. They are 4 * block floats.
  int block;

  // Copies sums [rows, 4 * block] to `gates`, where rows are 4 * gate_stride apart and a unit's gates are gate_stride
  // apart. Adds `bias`, whose gates are gate_stride apart as well. A null `bias` stands for zeros.
  void (*spread)(const float* sums, const float* bias, int64_t rows, int64_t units, int64_t gate_stride, float* gates);

  // One step of a block's cells for some rows. `gates` holds the input's part of the gates in the layout of `spread`.
  // It gets the gates' activations. `sums` [rows, 4 * block] is the recurrent part of the gates. Null `sums` stand for
  // zeros. Gates and earlier cell state give the new cell state and the output. The rows of `earlier`, `cells` and
  // `output` are gate_stride apart.
  void (*step)(const float* sums, int64_t rows, int64_t units, int64_t gate_stride, float* gates, const float* earlier,
               float* cells, float* output);

  // The gradients of one step of one row's cells, for any number of `units`. Writes gate_gradients [4, units], which
  // are those of the gates before their activations. Turns grad_cells in place from the gradient of this step's cell
  // state into that of the earlier one. The output's gradient is grad_output (zeros if null) plus grad_carried. The
  // gates' gradients are also added to gate_sums [4, units], if that is not null.
  void (*step_gradient)(int64_t units, const float* gates, const float* cells, const float* earlier,
                        const float* grad_output, const float* grad_carried, float* grad_cells, float* gate_gradients,
                        float* gate_sums);
};

// Products with an LSTM's weights of W. Their panel_width is 4 * LstmKernels::block.
template <class W>
struct LstmProducts : ProductKernels<W, float> {
  // Copies the block of units that begins at `weight` [4 * gate_stride rows, depth] to packed [depth, 4 * block]. A
  // unit's gates are gate_stride rows apart. The copy is a source for dense_product. It is zero for units beyond
  // `units`.
  void (*pack_block)(const W* weight, int64_t weight_ld, int64_t gate_stride, int64_t units, int64_t depth, W* packed);

  // The same product for one row, straight from the weight. sums[gate * block + unit] is a weight row times x [depth].
  void (*dot_block)(const W* weight, int64_t weight_ld, int64_t gate_stride, int64_t units, const float* x,
                    int64_t depth, float* sums);
};

// What an optimizer does to one row w of a parameter. The gradient is g, or zeros if it is null. First g += l2 * w.
struct SgdStep {
  float l2, lr, momentum;
  float keep, add;  // buffer = keep * buffer + add * g
  bool nesterov;    // whether w -= lr * (g + momentum * buffer), else w -= lr * buffer
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

// How a state of bfloat16 is rounded: up with the probability that keeps the mean. The step itself goes on from what is
// rounded. Entry i of the parameter, i modulo 2^32, has the random word that mixed(i, key) in optimizer.inl makes. The
// lower half of the word is added to the bits of the first state, the upper half to those of the second. Then the lower
// halves of the sums are cut off.
struct Rounding {
  uint64_t key;
  int64_t place;  // of the row's first entry among those of the parameter
};

// `S` is the type of the states. Those of float are not rounded, and `rounding` is not read. `copy` gets the new weights,
// rounded to the nearest, or is null.
template <class S>
struct OptimizerKernels {
  void (*sgd)(const SgdStep& step, const Rounding& rounding, int64_t width, const float* grad, float* weight,
              Bf16* copy, S* buffer);
  void (*adam)(const AdamStep& step, const Rounding& rounding, int64_t width, const float* grad, float* weight,
               Bf16* copy, S* first, S* second);
  void (*adagrad)(const AdagradStep& step, const Rounding& rounding, int64_t width, const float* grad, float* weight,
                  Bf16* copy, S* sum);
};

struct Kernels {
  const char* level;
  TypedKernels<float> f32;
  TypedKernels<Bf16> bf16;
  MapKernels maps;
  LstmKernels lstm;
  LstmProducts<float> lstm_f32;
  LstmProducts<Bf16> lstm_bf16;
  OptimizerKernels<float> optimizer;
  OptimizerKernels<Bf16> narrow_optimizer;
};

extern const Kernels kScalar;
#ifdef MEPROP_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace meprop
