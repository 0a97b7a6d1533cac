// Products with a selection that a team of threads shares out. The backward passes of all layers use them, and the forward
// pass of a linear map with what is not zero.
//
// This header is for the drivers (linear.cpp, lstm.cpp and others), which are compiled alike. The unit of a level must not include
// it (kernels.h says why).
#pragma once

#include "drivers.h"
#include "team.h"

namespace meprop {

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels);
template <>
inline const TypedKernels<float>& typed(const Kernels& kernels) {
  return kernels.f32;
}
template <>
inline const TypedKernels<Bf16>& typed(const Kernels& kernels) {
  return kernels.bf16;
}

inline float rounded(double value, float*) { return static_cast<float>(value); }
inline Bf16 rounded(double value, Bf16*) { return rounded_to_bf16(static_cast<float>(value)); }
inline float widened(float value) { return value; }
inline float widened(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// The score of a column. Scores are ordered by preference: the larger sum comes first, then the lower index.
struct Scored {
  uint64_t key;
  int32_t index;
  bool operator<(const Scored& other) const { return key != other.key ? key > other.key : index < other.index; }
};

inline uint64_t order_key(double magnitude) {
  if (magnitude != magnitude) return UINT64_MAX;
  uint64_t key;  // the bits of non-negative numbers have the order of the numbers
  std::memcpy(&key, &magnitude, sizeof key);
  return key;
}

inline bool is_zero(float value) { return value == 0; }
inline bool is_zero(Bf16 value) { return (value.bits & 0x7fff) == 0; }

// The k columns with the largest magnitudes, by ascending index. Among equal ones the lower index is taken. NaN is the
// largest.
inline void choose_largest(const double* magnitudes, int64_t columns, int64_t k, Scored* scores, int32_t* indices) {
  for (int32_t o = 0; o < columns; ++o) scores[o] = {order_key(magnitudes[o]), o};
  std::nth_element(scores, scores + k - 1, scores + columns);
  for (int64_t j = 0; j < k; ++j) indices[j] = scores[j].index;
  std::sort(indices, indices + k);
}

// The selected outputs of each row and their values, in the form of Terms.
template <class T>
struct ByRow {
  int64_t rows;
  Terms<T> terms;  // terms.rows are outputs

  int64_t first(int64_t row) const { return terms.starts != nullptr ? terms.starts[row] : row * terms.per_row; }
};

// A selection by output instead of by row. For each output it has the rows that selected it, ascending, and their
// values. It is made by a counting sort, in which each thread counts and later places its part of the rows.
template <class T>
class Transposed {
 public:
  // `entries` is the number of entries of the selection, or 0 if the object is not used.
  Transposed(int64_t outputs, int64_t entries, int threads)
      : outputs_(outputs),
        starts_(kStarts, outputs + 1),
        places_(kPlaces, threads * outputs),
        source_rows_(kSourceRows, entries),
        values_(kSourceValues, entries) {}

  explicit operator bool() const { return starts_ && places_ && source_rows_ && values_; }

  // The first step. Every thread calls it after its part of the rows is selected.
  void count(Team team, const ByRow<T>& from) {
    int64_t* counts = places_.get() + team.id * outputs_;
    std::memset(counts, 0, sizeof(int64_t) * static_cast<size_t>(outputs_));
    const Range rows = team.row_part(from.rows);
    const int32_t* outputs = from.terms.rows;
    const int64_t end = from.first(rows.end);
    for (int64_t i = from.first(rows.begin); i < end; ++i) ++counts[outputs[i]];
  }

  // The second step. One thread calls it after all have counted. It turns each count into the place of the first entry.
  void allot(Team team) {
    int64_t place = 0;
    for (int64_t output = 0; output < outputs_; ++output) {
      starts_.get()[output] = place;
      for (int thread = 0; thread < team.size; ++thread) {
        int64_t& here = places_.get()[thread * outputs_ + output];
        const int64_t count = here;
        here = place;
        place += count;
      }
    }
    starts_.get()[outputs_] = place;
  }

  // The third step. Every thread calls it after the places are allotted. The terms are complete after it and a wait.
  // `row_places` has the place of each row in the source, or is null if that is the row itself.
  void fill(Team team, const ByRow<T>& from, const int32_t* row_places) {
    int64_t* places = places_.get() + team.id * outputs_;
    const Range rows = team.row_part(from.rows);
    const int32_t* outputs = from.terms.rows;
    const T* coefficients = from.terms.coefficients;
    int32_t* source_rows = source_rows_.get();
    T* values = values_.get();
    int64_t i = from.first(rows.begin);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int32_t place = row_places != nullptr ? row_places[row] : static_cast<int32_t>(row);
      for (const int64_t end = from.first(row + 1); i < end; ++i) {
        const int64_t to = places[outputs[i]]++;
        source_rows[to] = place;
        values[to] = coefficients[i];
      }
    }
  }

  Terms<T> terms() const { return {starts_.get(), 0, source_rows_.get(), values_.get()}; }

 private:
  int64_t outputs_;
  Scratch<int64_t> starts_, places_;
  Scratch<int32_t> source_rows_;
  Scratch<T> values_;
};

// The right-hand side of a product. It is `width` columns of some rows of a matrix.
template <class T>
struct Source {
  Matrix<T> matrix;
  const int32_t* row_numbers;  // null for the first `rows`
  int64_t rows, width;
  bool transposed = false;  // whether its rows are the first columns of the matrix. They are always copied
};

// The largest size of a source's copy. It is half of a core's L2, less what else is there.
constexpr int64_t kPackedBytes = 128 << 10;
// The rows of the output that are computed for one panel before the next. They are few enough to be written as streams.
constexpr int64_t kRowBlock = 16;

// A source is worth copying if its rows are used so often on average.
constexpr int64_t kUsesWorthPacking = 3;
// The same for a weight of which only the used rows are copied. With fewer than kUsesWorthPacking uses of all rows this is
// done only if the rows that the entries read in place, each use counted, exceed the caches, and if a panel of the copy
// stays in a core's L2 (bytes).
constexpr int64_t kUsesWorthPackingUsed = 2;
constexpr int64_t kCacheBytes = 32 << 20, kLargestPanelBytes = 1 << 20;
// A copy of a transposed matrix has half a panel if a panel is larger than this, so that it stays in L2 (bytes).
constexpr int64_t kWidePanelBytes = 256 << 10;

// Covers [0, width) with pieces of whole panels and at most `step` columns, and calls piece(first, columns) for each.
// If panels do not divide the width, the last piece begins earlier to end at `width`. It computes some columns once
// more.
// requires: width >= panel; step a multiple of panel.
template <class Piece>
void for_pieces(int64_t width, int64_t panel, int64_t step, Piece piece) {
  for (int64_t column = 0; column < width;) {
    const int64_t rest = (width - column + panel - 1) / panel * panel;
    const int64_t columns = std::min({step, rest, width / panel * panel});
    piece(std::min(column, width - columns), columns);
    column += columns;
  }
}

// How a source is read. It is read in place, or from copies of some columns at a time.
template <class S>
class Packing {
 public:
  // With `whole` a copy has all columns, and no column is computed twice.
  template <class T>
  Packing(const ProductKernels<S, T>& kernels, Source<S> source, bool worth_it, bool whole = false)
      : pack_(kernels.pack), pack_transposed_(kernels.pack_transposed), source_(source), panel_(kernels.panel_width) {
    const int64_t panels = std::max<int64_t>(1, (source.width + panel_ - 1) / panel_);
    const int64_t panel_bytes = std::max<int64_t>(1, source.rows * panel_ * static_cast<int64_t>(sizeof(S)));
    const int64_t at_once = whole ? panels : kPackedBytes / panel_bytes;
    const bool overlaps = source.width % panel_ != 0;
    in_place_ = !source.transposed && source.row_numbers == nullptr && source.width >= panel_ &&
                (at_once >= panels || !worth_it) && !(whole && overlaps);
    // A narrow source's copy has at least as many bytes a row as that of a panel of T.
    const int64_t least = static_cast<int64_t>(sizeof(T) / sizeof(S));
    columns_ = in_place_ ? source.width : std::min(std::max(at_once, least), panels) * panel_;
    if (source.transposed && panel_bytes > kWidePanelBytes) columns_ = panel_ / 2;
  }

  // The number of elements of scratch for each thread.
  int64_t size() const { return in_place_ ? 0 : source_.rows * columns_; }

  // The number of columns of a copy, or of the source.
  int64_t columns() const { return columns_; }

  // Computes a product [rows, width]. Each thread computes a part of all (copy, row) pairs. Calls product(source,
  // source_ld, row begin, row end, first column, columns) for a block of rows and up to `step` columns. `source` points
  // to the first column.
  template <class Product>
  void multiply(Team team, S* packed, int64_t rows, int64_t step, Product product) const {
    multiply(team, packed, rows, step, kRowBlock, product, [](int64_t, int64_t, int64_t, int64_t) {});
  }

  // Blocks have `row_block` rows. Calls done(row begin, row end, first column, columns) when a block has all columns of a
  // copy.
  template <class Product, class Done>
  void multiply(Team team, S* packed, int64_t rows, int64_t step, int64_t row_block, Product product, Done done) const {
    if (rows == 0) return;
    auto [begin, end] = team.part((source_.width + columns_ - 1) / columns_ * rows);
    while (begin < end) {
      const int64_t first = begin / rows * columns_, row_begin = begin % rows;
      const int64_t row_end = std::min(rows, row_begin + (end - begin));
      const int64_t width = std::min(columns_, source_.width - first);
      if (source_.transposed)
        pack_transposed_(source_.matrix.data + first * source_.matrix.ld, source_.matrix.ld, source_.rows, width, packed,
                         columns_);
      else if (!in_place_)
        pack_(source_.matrix.data + first, source_.matrix.ld, source_.row_numbers, source_.rows, width, packed,
              columns_);
      for (int64_t row = row_begin; row < row_end; row += row_block) {
        const int64_t block_end = std::min(row + row_block, row_end);
        if (in_place_)
          for_pieces(width, panel_, step, [&](int64_t column, int64_t columns) {
            product(source_.matrix.data + column, source_.matrix.ld, row, block_end, column, columns);
          });
        else
          for (int64_t column = 0; column < width; column += step)
            product(packed + column, columns_, row, block_end, first + column, std::min(step, width - column));
        done(row, block_end, first, width);
      }
      begin += row_end - row_begin;
    }
  }

 private:
  decltype(ProductKernels<S, S>::pack) pack_;
  decltype(ProductKernels<S, S>::pack_transposed) pack_transposed_;
  Source<S> source_;
  int64_t panel_, columns_;
  bool in_place_;
};

}  // namespace meprop
