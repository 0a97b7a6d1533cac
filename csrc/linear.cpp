#include "drivers.h"
#include "selected.h"
#include "team.h"

#include <type_traits>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace meprop {
namespace {

constexpr int64_t kMaxOutputs = INT32_MAX - kScratchPad;

template <class T>
bool valid_selection(Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, int threads) {
  return outputs <= kMaxOutputs && rows <= INT32_MAX && 1 <= k && k <= outputs && threads >= 1 &&
         fits<T>(rows, outputs, grad.ld);
}

// What all rows share adds a matrix of rank one to each product: shared W to every row of the input's gradient, and to row
// o of the weight's shared[o] times the sum of the inputs. Summed in float64.
template <class T>
class SharedBases {
 public:
  SharedBases(const TypedKernels<T>& kernels, const LinearBackward<T>& call)
      : kernels_(kernels),
        call_(call),
        of_input_(kBases, has_input() ? call.inputs : 0),
        of_weight_(kWeightBase, has_weight() ? call.inputs : 0),
        sums_(kSharedSums, call.shared != nullptr ? call.inputs : 0) {}

  explicit operator bool() const { return of_input_ && of_weight_ && sums_; }

  // Every thread: its columns of both. Before the products, and a wait.
  void read(Team team) const {
    const Range columns = team.part(call_.inputs, 64);
    if (call_.shared == nullptr || columns.size() <= 0) return;
    double* sums = sums_.get() + columns.begin;
    if (has_input()) {
      std::fill_n(sums, columns.size(), 0.0);
      kernels_.add_scaled_rows(call_.weight.data + columns.begin, call_.weight.ld, call_.shared, call_.outputs,
                               columns.size(), sums);
      round(columns, of_input_.get());
    }
    if (has_weight()) {
      std::fill_n(sums, columns.size(), 0.0);
      kernels_.add_columns(call_.x.data + columns.begin, call_.x.ld, call_.rows, columns.size(), sums, nullptr);
      round(columns, of_weight_.get());
    }
  }

  // From a column on; null without a shared part. `factors` holds what is shared of each row of the product.
  Base<T> of_input(int64_t column) const { return {has_input() ? of_input_.get() + column : nullptr, nullptr}; }
  Base<T> of_weight(int64_t column, const T* factors) const {
    return {has_weight() ? of_weight_.get() + column : nullptr, factors};
  }

 private:
  bool has_input() const { return call_.shared != nullptr && call_.grad_input != nullptr; }
  bool has_weight() const { return call_.shared != nullptr && call_.needs_weight(); }
  void round(Range columns, float* to) const {
    for (int64_t c = columns.begin; c < columns.end; ++c) to[c] = static_cast<float>(sums_.get()[c]);
  }

  const TypedKernels<T>& kernels_;
  const LinearBackward<T>& call_;
  Scratch<float> of_input_, of_weight_;
  Scratch<double> sums_;
};

// Moves the first rows of the weight's gradient, those of the selected columns, to their places, and fills all others
// with what is shared, or zeros; each thread some columns. From the last to the first, so that no row is overwritten before
// it has moved: its place is never before it.
template <class T>
void spread_rows(Team team, const LinearBackward<T>& call, const SharedBases<T>& bases) {
  const int64_t width = call.inputs;
  const Range columns = team.part(width, 64);
  if (columns.size() <= 0) return;
  const size_t bytes = static_cast<size_t>(columns.size()) * sizeof(T);
  const float* base = bases.of_weight(columns.begin, nullptr).row;
  T* out = call.grad_weight + columns.begin;
  const auto fill = [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      T* row = out + o * width;
      if (base == nullptr) {
        std::memset(row, 0, bytes);
        continue;
      }
      const float factor = widened(call.shared[o]);
      for (int64_t c = 0; c < columns.size(); ++c) row[c] = rounded(factor * base[c], row);
    }
  };
  int64_t next = call.outputs;
  for (int64_t j = call.kept() - 1; j >= 0; --j) {
    const int64_t place = call.indices[j];
    fill(place + 1, next);
    if (place != j) std::memcpy(out + place * width, out + j * width, bytes);
    next = place;
  }
  fill(0, next);
}

// In how many rows each output is selected with what is not zero. Each thread counts a part of the rows.
template <class T>
class Hits {
 public:
  Hits(const LinearBackward<T>& call, int threads)
      : total_(call.hits), outputs_(call.outputs), counts_(kHits, total_ != nullptr ? threads * outputs_ : 0) {}

  explicit operator bool() const { return bool{counts_}; }

  // First: every thread, when its part of the rows is selected.
  void count(Team team, const ByRow<T>& from) const {
    if (total_ == nullptr) return;
    int32_t* counts = counts_.get() + team.id * outputs_;
    std::fill_n(counts, outputs_, 0);
    const Range rows = team.row_part(from.rows);
    const int64_t end = from.first(rows.end);
    for (int64_t i = from.first(rows.begin); i < end; ++i) counts[from.terms.rows[i]] += !is_zero(from.terms.coefficients[i]);
  }

  // Second: every thread, when all have counted.
  void add_up(Team team) const {
    if (total_ == nullptr) return;
    const Range own = team.part(outputs_);
    for (int64_t output = own.begin; output < own.end; ++output)
      for (int thread = 0; thread < team.size; ++thread) total_[output] += counts_.get()[thread * outputs_ + output];
  }

 private:
  int64_t* total_;
  int64_t outputs_;
  Scratch<int32_t> counts_;
};

// One pass over the output gradient for exact top-k of its rows, and for the sums of its columns, the bias's gradient.
template <class T>
class RowsPass {
 public:
  RowsPass(const TypedKernels<T>& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, bool sums, int threads)
      : kernels_(kernels),
        grad_(grad),
        rows_(rows),
        outputs_(outputs),
        block_(rows_per_block(rows)),
        wants_sums_(sums),
        candidates_(kCandidates, threads * candidate_words()),
        sums_(kBias, sums ? (rows / block_ + 1) * outputs : 0) {}

  explicit operator bool() const { return candidates_ && sums_; }

  // Every thread: its part of the rows, in chunks that are still in the cache when they are summed. Top-k is within each of
  // so many blocks of the outputs; k of 0: none.
  void read(Team team, int64_t k, int64_t blocks, T* values, int32_t* indices) {
    const Range part = team.row_part(rows_);
    if (wants_sums_)
      for (int64_t row = part.begin; row < part.end; row += block_) std::fill_n(block_sums(row), outputs_, 0.0);
    const int64_t chunk = std::max<int64_t>(8, kPackedBytes / (outputs_ * static_cast<int64_t>(sizeof(T))));
    for (int64_t begin = part.begin; begin < part.end; begin += chunk) {
      const int64_t end = std::min(begin + chunk, part.end);
      if (k > 0) select(team, begin, end, k, blocks, values, indices);
      if (wants_sums_) sum(begin, end);
    }
  }

  // Every thread, when all have read: its columns of the sums.
  void write_sums(Team team, T* out) const {
    const Range columns = team.part(outputs_, 16);
    double* totals = block_sums(0);
    if (rows_ == 0) std::fill_n(totals, outputs_, 0.0);
    for (int64_t row = block_; row < rows_; row += block_)
      for (int64_t c = columns.begin; c < columns.end; ++c) totals[c] += block_sums(row)[c];
    for (int64_t c = columns.begin; c < columns.end; ++c) out[c] = rounded(totals[c], out);
  }

 private:
  // A block of a row is a row of its own.
  void select(Team team, int64_t begin, int64_t end, int64_t k, int64_t blocks, T* values, int32_t* indices) {
    uint32_t* candidates = candidates_.get() + team.id * candidate_words();
    const int64_t width = outputs_ / blocks, kept = k * blocks;
    if (blocks == 1)
      return kernels_.topk_rows(grad_.data, grad_.ld, begin, end, width, k, values, indices, candidates);
    if (grad_.ld == outputs_)
      kernels_.topk_rows(grad_.data, width, begin * blocks, end * blocks, width, k, values, indices, candidates);
    else
      for (int64_t row = begin; row < end; ++row)
        kernels_.topk_rows(grad_.data + row * grad_.ld, width, 0, blocks, width, k, values + row * kept,
                           indices + row * kept, candidates);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = 1; block < blocks; ++block)
        for (int64_t j = 0; j < k; ++j) indices[row * kept + block * k + j] += static_cast<int32_t>(block * width);
  }

  void sum(int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t block_end = std::min(end, (begin / block_ + 1) * block_);
      kernels_.add_columns(grad_.data + begin * grad_.ld, grad_.ld, block_end - begin, outputs_, block_sums(begin),
                           nullptr);
      begin = block_end;
    }
  }

  double* block_sums(int64_t row) const { return sums_.get() + row / block_ * outputs_; }

  // Words of scratch that topk_rows needs for each thread.
  int64_t candidate_words() const { return 2 * (outputs_ + kScratchPad); }

  const TypedKernels<T>& kernels_;
  Matrix<T> grad_;
  int64_t rows_, outputs_, block_;
  bool wants_sums_;
  Scratch<uint32_t> candidates_;
  Scratch<double> sums_;
};

// The same for the columns with the largest sums of magnitudes.
template <class T>
class ColumnsPass {
 public:
  ColumnsPass(const TypedKernels<T>& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, bool sums)
      : kernels_(kernels),
        grad_(grad),
        rows_(rows),
        outputs_(outputs),
        wants_sums_(sums),
        sums_(kBias, sums ? outputs : 0),
        magnitudes_(kMagnitudes, outputs),
        scores_(kScores, outputs) {}

  explicit operator bool() const { return sums_ && magnitudes_ && scores_; }

  // Every thread: its columns, summed and, where wanted, written.
  void read(Team team, bool select, T* sums_out) {
    const Range columns = team.part(outputs_, 64);
    const int64_t begin = columns.begin, count = columns.end - columns.begin;
    if (count <= 0) return;
    double* sums = wants_sums_ ? sums_.get() + begin : nullptr;
    double* magnitudes = select ? magnitudes_.get() + begin : nullptr;
    if (wants_sums_) std::fill_n(sums, count, 0.0);
    if (select) std::fill_n(magnitudes, count, 0.0);
    kernels_.add_columns(grad_.data + begin, grad_.ld, rows_, count, sums, magnitudes);
    if (wants_sums_)
      for (int64_t c = 0; c < count; ++c) sums_out[begin + c] = rounded(sums[c], sums_out);
  }

  // One thread, when all have read: k of each of so many blocks of the columns.
  void choose(int64_t k, int64_t blocks, int32_t* indices) {
    const int64_t width = outputs_ / blocks;
    for (int64_t block = 0; block < blocks; ++block, indices += k) {
      choose_largest(magnitudes_.get() + block * width, width, k, scores_.get(), indices);
      for (int64_t j = 0; j < k; ++j) indices[j] += static_cast<int32_t>(block * width);
    }
  }

  // Every thread, when the columns are chosen: the values [rows, kept] of its rows.
  void gather(Team team, int64_t kept, const int32_t* indices, T* values) const {
    const Range part = team.part(rows_);
    for (int64_t row = part.begin; row < part.end; ++row)
      for (int64_t j = 0; j < kept; ++j) values[row * kept + j] = grad_.data[row * grad_.ld + indices[j]];
  }

 private:
  const TypedKernels<T>& kernels_;
  Matrix<T> grad_;
  int64_t rows_, outputs_;
  bool wants_sums_;
  Scratch<double> sums_, magnitudes_;
  Scratch<Scored> scores_;
};

// Which rows of a product's source are copied: those that are used, if enough others are not, and if a copy is used often
// enough. Else all of them.
class UsedRows {
 public:
  // `mark` writes 1 for each row that is used, else 0. It is called if it `may_pay`. Copies are worth it from `worth`
  // uses a row on average.
  template <class Mark>
  UsedRows(Use numbers, Use places, int64_t rows, int64_t uses, int64_t worth, bool may_pay, Mark mark)
      : numbers_(numbers, may_pay ? rows : 0), places_(places, may_pay ? rows : 0), rows_(rows) {
    if (!may_pay || !*this) return;
    mark(places_.get());
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      numbers_.get()[count] = static_cast<int32_t>(row);
      const int32_t used = std::exchange(places_.get()[row], static_cast<int32_t>(count));
      count += used;
    }
    if (count > rows / 8 * 7 || uses < worth * count) return;
    some_ = true;
    rows_ = count;
  }

  explicit operator bool() const { return numbers_ && places_; }

  bool some() const { return some_; }
  int64_t rows() const { return rows_; }
  // Null if no row is left out.
  const int32_t* numbers() const { return some_ ? numbers_.get() : nullptr; }
  const int32_t* places() const { return some_ ? places_.get() : nullptr; }

 private:
  Scratch<int32_t> numbers_, places_;
  int64_t rows_;
  bool some_ = false;
};

// Where the weight's gradient goes: to memory, or to a tile in the cache, from which it is taken.
template <class T>
class Tiles {
 public:
  // A tile has so many columns.
  Tiles(const LinearBackward<T>& call, int64_t columns, int threads)
      : call_(call), columns_(columns), tiles_(kTiles, call.taker != nullptr ? threads * kRows * columns : 0) {}

  explicit operator bool() const { return bool{tiles_}; }

  // The rows of a tile are few, so that it stays in L1.
  int64_t rows() const { return call_.taker != nullptr ? kRows : kRowBlock; }
  // Where row r of a column is, less r * ld(), in the tile whose first row is `begin`.
  T* place(Team team, int64_t begin, int64_t column) const {
    return call_.taker != nullptr ? tile(team) - begin * columns_ + column % columns_ : call_.grad_weight + column;
  }
  int64_t ld() const { return call_.taker != nullptr ? columns_ : call_.inputs; }

  // The columns of these rows are computed.
  void done(Team team, int64_t begin, int64_t end, int64_t first, int64_t columns) const {
    if constexpr (std::is_same_v<T, float>)
      for (int64_t row = begin; row < end && call_.taker != nullptr; ++row)
        call_.taker->take(row, first, columns, tile(team) + (row - begin) * columns_);
  }

 private:
  static constexpr int64_t kRows = 4;

  T* tile(Team team) const { return tiles_.get() + team.id * kRows * columns_; }

  const LinearBackward<T>& call_;
  int64_t columns_;
  Scratch<T> tiles_;
};

template <class T>
Status rows_backward(const TypedKernels<T>& kernels, const LinearBackward<T>& call, int threads) {
  const bool needs_input = call.grad_input != nullptr, needs_weight = call.needs_weight();
  const bool needs_bias = call.grad_bias != nullptr;
  const int64_t selected = call.selected();
  const auto bytes_of = [&](int64_t rows) { return rows * call.inputs * static_cast<int64_t>(sizeof(T)); };
  const bool packs_weight = selected >= kUsesWorthPacking * call.outputs;
  const int64_t most_used = std::min(call.outputs, selected / kUsesWorthPackingUsed);
  const bool reads_memory = bytes_of(selected) > kCacheBytes &&
                            most_used * kernels.panel_width * static_cast<int64_t>(sizeof(T)) <= kLargestPanelBytes;
  const bool may_pay = call.inputs > kernels.gather_width && bytes_of(call.outputs) > kPackedBytes &&
                       (packs_weight || reads_memory);
  const UsedRows of_weight(kUsedOutputs, kOutputPlaces, call.outputs, selected, kUsesWorthPackingUsed,
                           needs_input && !call.select && may_pay, [&](int32_t* used) {
                             std::fill_n(used, call.outputs, 0);
                             for (int64_t i = 0; i < selected; ++i) used[call.indices[i]] = 1;
                           });
  // A taker's parts are of all columns, for which a copy is made in any case if panels do not divide them.
  const UsedRows of_x(kUsedInputs, kInputPlaces, call.rows, selected, call.taker != nullptr ? 1 : kUsesWorthPacking,
                      needs_weight && call.starts != nullptr, [&](int32_t* used) {
                        for (int64_t row = 0; row < call.rows; ++row) used[row] = call.starts[row + 1] > call.starts[row];
                      });
  if (!of_weight || !of_x) return Status::kNoMemory;
  const Packing<T> weight(kernels, {call.weight, of_weight.numbers(), of_weight.rows(), call.inputs}, packs_weight);
  const Packing<T> x(kernels, {call.x, of_x.numbers(), of_x.rows(), call.inputs},
                     selected >= kUsesWorthPacking * of_x.rows(), call.taker != nullptr);
  const int64_t packed_size = std::max(needs_input ? weight.size() : 0, needs_weight ? x.size() : 0);
  const Scratch<T> packed(kPacked, threads * packed_size);
  // Of each entry's row of the weight among the copied ones.
  const Scratch<int32_t> entry_places(kEntryPlaces, of_weight.some() ? selected : 0);
  RowsPass<T> pass(kernels, call.grad, call.rows, call.outputs, needs_bias, threads);
  Transposed<T> transposed(call.outputs, needs_weight ? selected : 0, threads);
  const SharedBases<T> bases(kernels, call);
  const Hits<T> hits(call, threads);
  const Tiles<T> tiles(call, x.columns(), threads);
  if (!packed || !entry_places || !pass || !transposed || !bases || !hits || !tiles) return Status::kNoMemory;

  const ByRow<T> selection = {call.rows, {call.starts, call.kept(), call.indices, call.values}};
  Terms<T> by_row = selection.terms;
  if (of_weight.some()) by_row.rows = entry_places.get();
  const Terms<T> by_output = transposed.terms();
  run_team(threads, [&](Team team) {
    T* own = packed.get() + team.id * packed_size;
    if (call.select || needs_bias) pass.read(team, call.select ? call.k : 0, call.blocks, call.values, call.indices);
    if (needs_weight) transposed.count(team, selection);
    hits.count(team, selection);
    if (of_weight.some()) {
      const Range part = team.part(selected, 16);
      for (int64_t i = part.begin; i < part.end; ++i) entry_places.get()[i] = of_weight.places()[call.indices[i]];
    }
    bases.read(team);
    team.wait();
    if (needs_bias) pass.write_sums(team, call.grad_bias);
    hits.add_up(team);
    if (needs_weight && team.id == 0) transposed.allot(team);
    if (needs_input)
      weight.multiply(team, own, call.rows, kernels.gather_width,
                      [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column, int64_t columns) {
                        kernels.gather_product(source, source_ld, by_row, bases.of_input(column), begin, end, columns,
                                               call.grad_input + column, call.inputs);
                      });
    if (!needs_weight) return;
    team.wait();
    transposed.fill(team, selection, of_x.places());
    team.wait();
    x.multiply(
        team, own, call.outputs, kernels.gather_width, tiles.rows(),
        [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column, int64_t columns) {
          kernels.gather_product(source, source_ld, by_output, bases.of_weight(column, call.shared), begin, end, columns,
                                 tiles.place(team, begin, column), tiles.ld());
        },
        [&](int64_t begin, int64_t end, int64_t first, int64_t columns) { tiles.done(team, begin, end, first, columns); });
  });
  return Status::kOk;
}

// Adds in how many rows each of the kept columns has what is not zero; each thread some columns.
template <class T>
void count_columns(Team team, const LinearBackward<T>& call) {
  const int64_t kept = call.kept();
  const Range own = team.part(kept);
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t j = own.begin; j < own.end; ++j) call.hits[call.indices[j]] += !is_zero(call.values[row * kept + j]);
}

template <class T>
Status columns_backward(const TypedKernels<T>& kernels, const LinearBackward<T>& call, int threads) {
  const bool needs_input = call.grad_input != nullptr, needs_weight = call.grad_weight != nullptr;
  const bool needs_bias = call.grad_bias != nullptr;
  const int64_t kept = call.kept();
  const Packing<T> weight(kernels, {call.weight, call.indices, kept, call.inputs}, true);
  const Packing<T> x(kernels, {call.x, nullptr, call.rows, call.inputs}, true);
  const int64_t packed_size = std::max(needs_input ? weight.size() : 0, needs_weight ? x.size() : 0);
  const Scratch<T> packed(kPacked, threads * packed_size);
  const Scratch<T> factors(kFactors, call.shared != nullptr ? kept : 0);  // what is shared of each kept column
  ColumnsPass<T> pass(kernels, call.grad, call.rows, call.outputs, needs_bias);
  const SharedBases<T> bases(kernels, call);
  if (!packed || !factors || !pass || !bases) return Status::kNoMemory;
  if (call.shared != nullptr)
    for (int64_t j = 0; j < kept; ++j) factors.get()[j] = call.shared[call.indices[j]];

  run_team(threads, [&](Team team) {
    T* own = packed.get() + team.id * packed_size;
    if (call.select || needs_bias) pass.read(team, call.select, call.grad_bias);
    if (call.select) {
      team.wait();
      if (team.id == 0) pass.choose(call.k, call.blocks, call.indices);
      team.wait();
      pass.gather(team, kept, call.indices, call.values);
      team.wait();
    }
    if (call.hits != nullptr) count_columns(team, call);
    if (call.shared != nullptr) {
      bases.read(team);
      team.wait();
    }
    if (needs_input)
      weight.multiply(team, own, call.rows, kernels.panel_width,
                      [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column, int64_t columns) {
                        kernels.dense_product(source, source_ld, kept, call.values, kept, 1, bases.of_input(column),
                                              begin, end, columns, call.grad_input + column, call.inputs);
                      });
    if (!needs_weight) return;
    x.multiply(team, own, kept, kernels.panel_width,
               [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column, int64_t columns) {
                 kernels.dense_product(source, source_ld, call.rows, call.values, 1, kept,
                                       bases.of_weight(column, factors.get()), begin, end, columns,
                                       call.grad_weight + column, call.inputs);
               });
    if (call.weight_rows_only) return;
    team.wait();
    spread_rows(team, call, bases);
  });
  return Status::kOk;
}

// Whether a given selection's starts and indices are what they must be: those of each row ascend, within the outputs.
template <class T>
bool valid_indices(const LinearBackward<T>& call) {
  const int64_t rows = call.scope == Scope::kRows ? call.rows : 1;
  if (call.starts != nullptr) {
    if (call.starts[0] != 0 || call.starts[rows] != call.entries) return false;
    bool valid = true;
    for (int64_t row = 0; row < rows; ++row) valid &= call.starts[row] <= call.starts[row + 1];
    if (!valid) return false;
  }
  const ByRow<T> selection = {rows, {call.starts, call.k, call.indices, call.values}};
  bool valid = true;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = selection.first(row), end = selection.first(row + 1);
    if (begin == end) continue;
    valid &= call.indices[begin] >= 0 && call.indices[end - 1] < call.outputs;
    for (int64_t i = begin + 1; i < end; ++i) valid &= call.indices[i - 1] < call.indices[i];
  }
  return valid;
}

// Whether it says how many entries are selected in one of the ways that there are.
template <class T>
bool valid_count(const LinearBackward<T>& call) {
  if (call.weight_rows_only && (call.scope == Scope::kRows || call.shared != nullptr)) return false;
  if (call.taker != nullptr && (call.scope != Scope::kRows || !std::is_same_v<T, float>)) return false;
  if (call.select)
    return call.blocks >= 1 && call.outputs % call.blocks == 0 && 1 <= call.k && call.k <= call.outputs / call.blocks &&
           call.starts == nullptr && call.shared == nullptr;
  if (call.blocks != 1 || call.k < 0 || call.k > call.outputs) return false;
  return call.starts == nullptr || (call.scope == Scope::kRows && fits<int64_t>(1, call.entries, 0));
}

}  // namespace

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr size_t kLarge = size_t{2} << 20;
  const size_t begin = (reinterpret_cast<size_t>(data) + kLarge - 1) / kLarge * kLarge;
  const size_t end = (reinterpret_cast<size_t>(data) + bytes) / kLarge * kLarge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failure is no error
#endif
}

template <class T>
Status topk_rows(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                 int32_t* indices, int threads) {
  if (!valid_selection(grad, rows, outputs, k, threads)) return Status::kBadSize;
  threads = team_size(threads, rows * outputs, 0);
  RowsPass<T> pass(typed<T>(kernels), grad, rows, outputs, false, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.read(team, k, 1, values, indices); });
  return Status::kOk;
}

template <class T>
Status topk_columns(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                    int32_t* indices, int threads) {
  if (!valid_selection(grad, rows, outputs, k, threads)) return Status::kBadSize;
  ColumnsPass<T> pass(typed<T>(kernels), grad, rows, outputs, false);
  if (!pass) return Status::kNoMemory;
  run_team(team_size(threads, rows * outputs, 0), [&](Team team) {
    pass.read(team, true, nullptr);
    team.wait();
    if (team.id == 0) pass.choose(k, 1, indices);
    team.wait();
    pass.gather(team, k, indices, values);
  });
  return Status::kOk;
}

template <class T>
Status column_scores(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, double* scores, int threads) {
  if (!valid_selection(grad, rows, outputs, 1, threads)) return Status::kBadSize;
  std::fill_n(scores, outputs, 0.0);
  run_team(team_size(threads, rows * outputs, 0), [&](Team team) {
    const Range columns = team.part(outputs, 64);
    if (columns.size() <= 0) return;
    typed<T>(kernels).add_columns(grad.data + columns.begin, grad.ld, rows, columns.size(), nullptr,
                                  scores + columns.begin);
  });
  return Status::kOk;
}

template <class T>
Status linear_backward(const Kernels& kernels, LinearBackward<T> call) {
  const TrimAtEnd trim;
  int64_t work = 0;
  if (!valid_selection(call.grad, call.rows, call.outputs, 1, call.threads) || !valid_count(call) ||
      !fits<T>(call.outputs, call.inputs, call.weight.ld) || !fits<T>(call.rows, call.inputs, call.x.ld) ||
      !fits<int64_t>(call.rows, call.kept(), 0) || __builtin_mul_overflow(call.selected(), call.inputs, &work))
    return Status::kBadSize;

  const bool own_selection = call.select && call.indices == nullptr;
  const Scratch<T> values(kValues, own_selection ? call.rows * call.kept() : 0);
  const Scratch<int32_t> indices(kIndices, own_selection ? (call.scope == Scope::kRows ? call.rows : 1) * call.kept() : 0);
  if (!values || !indices) return Status::kNoMemory;
  if (own_selection) call.values = values.get(), call.indices = indices.get();
  if (!call.select && !valid_indices(call)) return Status::kBadIndex;

  if (call.inputs == 0) call.grad_input = call.grad_weight = nullptr, call.taker = nullptr;
  const size_t row_bytes = static_cast<size_t>(call.inputs) * sizeof(T);
  const int64_t weight_rows = call.weight_rows_only ? call.kept() : call.outputs;
  if (call.grad_input != nullptr) prefer_large_pages(call.grad_input, static_cast<size_t>(call.rows) * row_bytes);
  if (call.grad_weight != nullptr) prefer_large_pages(call.grad_weight, static_cast<size_t>(weight_rows) * row_bytes);
  const int threads = team_size(call.threads, call.rows * call.outputs, work);
  return (call.scope == Scope::kRows ? rows_backward<T> : columns_backward<T>)(typed<T>(kernels), call, threads);
}

#define MEPROP_INSTANTIATE(T)                                                                                       \
  template Status topk_rows(const Kernels&, Matrix<T>, int64_t, int64_t, int64_t, T*, int32_t*, int);               \
  template Status topk_columns(const Kernels&, Matrix<T>, int64_t, int64_t, int64_t, T*, int32_t*, int);            \
  template Status column_scores(const Kernels&, Matrix<T>, int64_t, int64_t, double*, int);                         \
  template Status linear_backward(const Kernels&, LinearBackward<T>);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)

}  // namespace meprop
