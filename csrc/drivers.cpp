#include "drivers.h"

#include <omp.h>
#include <pthread.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace meprop {
namespace {

constexpr int64_t kMaxOutputs = INT32_MAX - kScratchPad;

// Work that is worth a thread: entries looked at, multiply-adds.
constexpr int64_t kEntriesPerThread = 1 << 13;
constexpr int64_t kProductsPerThread = 1 << 16;

// What scratch is for. Each use has a block of its own.
enum Use { kCandidates, kMagnitudes, kScores, kValues, kIndices, kBias, kStarts, kPlaces, kSourceRows, kSourceValues, kPacked, kUses };

constexpr int64_t kLargestKept = 4 << 20;

// The blocks of one calling thread. They are kept from call to call: memory that is fresh from the system costs a page
// fault per 4 KB, which is more than the work of a small layer.
class Blocks {
 public:
  ~Blocks() {
    for (Block& block : blocks_) std::free(block.data);
  }

  // Gives back what is too large to keep, where page faults are little beside the work.
  void trim() {
    for (Block& block : blocks_) {
      if (block.bytes <= kLargestKept) continue;
      std::free(block.data);
      block = {};
    }
  }

  // `bytes` of uninitialised memory on a cache-line boundary, or null. Gives back what the same use had before.
  void* take(Use use, int64_t bytes) {
    Block& block = blocks_[use];
    if (bytes > block.bytes || block.data == nullptr) {
      std::free(block.data);
      const int64_t rounded = (bytes / 64 + 1) * 64;
      block.data = std::aligned_alloc(64, static_cast<size_t>(rounded));
      block.bytes = block.data != nullptr ? rounded : 0;
    }
    return block.data;
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  Block blocks_[kUses];
};

thread_local Blocks blocks;

// `count` uninitialised elements for one use, until the same use is asked for again; null where there is no memory.
template <class T>
class Scratch {
 public:
  Scratch(Use use, int64_t count) {
    int64_t bytes = 0;
    if (__builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes) || bytes > INT64_MAX - 64) return;
    data_ = static_cast<T*>(blocks.take(use, bytes));
  }
  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

template <class T>
const TypedKernels<T>& typed(const Kernels& kernels);
template <>
const TypedKernels<float>& typed(const Kernels& kernels) {
  return kernels.f32;
}
template <>
const TypedKernels<Bf16>& typed(const Kernels& kernels) {
  return kernels.bf16;
}

// Whether a matrix of these sizes can be addressed: its last element's offset in bytes fits.
template <class T>
bool fits(int64_t rows, int64_t columns, int64_t ld) {
  int64_t elements = 0, bytes = 0;
  return rows >= 0 && columns >= 0 && ld >= 0 && !__builtin_mul_overflow(rows, std::max(ld, columns), &elements) &&
         !__builtin_mul_overflow(elements, static_cast<int64_t>(sizeof(T)), &bytes);
}

template <class T>
bool valid_selection(Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, int threads) {
  return outputs <= kMaxOutputs && rows <= INT32_MAX && 1 <= k && k <= outputs && threads >= 1 &&
         fits<T>(rows, outputs, grad.ld);
}

bool forked = false;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Range {
  int64_t begin, end;
};

// Rows are shared out in blocks, at most so many; what is summed over rows is summed in each block first, then over the
// blocks, so that the sums do not depend on the number of threads.
constexpr int64_t kRowBlocks = 32, kLeastRowsPerBlock = 8;

int64_t rows_per_block(int64_t rows) { return std::max(kLeastRowsPerBlock, (rows + kRowBlocks - 1) / kRowBlocks); }

// The threads that run one operation, as one of them sees it. OpenMP may give fewer than were asked for.
struct Team {
  int id, size;

  // This thread's equal part of [0, count), in multiples of `grain`.
  Range part(int64_t count, int64_t grain = 1) const {
    const int64_t grains = (count + grain - 1) / grain;
    return {grains * id / size * grain, std::min(count, grains * (id + 1) / size * grain)};
  }

  // This thread's part of the rows, in whole blocks.
  Range row_part(int64_t rows) const { return part(rows, rows_per_block(rows)); }

  // Returns when all threads of the team have come here.
  void wait() const {
    if (size > 1) {
#pragma omp barrier
    }
  }
};

// How many threads are worth waking for so many entries to look at and multiply-adds to do.
int team_size(int threads, int64_t entries, int64_t products) {
  if (forked) return 1;
  return static_cast<int>(std::clamp<int64_t>(entries / kEntriesPerThread + products / kProductsPerThread, 1, threads));
}

template <class Body>
void run_team(int threads, Body body) {
  if (threads == 1) return body(Team{0, 1});
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads()});
}

// A column of the selection's scores, in the order of preference: the larger sum, then the lower index.
struct Scored {
  uint64_t key;
  int32_t index;
  bool operator<(const Scored& other) const { return key != other.key ? key > other.key : index < other.index; }
};

uint64_t order_key(double magnitude) {
  if (magnitude != magnitude) return UINT64_MAX;
  uint64_t key;  // of non-negative numbers, the bits are ordered as the numbers
  std::memcpy(&key, &magnitude, sizeof key);
  return key;
}

// The selection [rows, k] by output instead of by row: for each output the rows that selected it, ascending, and their
// values. A counting sort, in which each thread counts and later places its part of the rows.
template <class T>
class Transposed {
 public:
  Transposed(int64_t rows, int64_t outputs, int64_t k, int threads)
      : rows_(rows),
        outputs_(outputs),
        k_(k),
        starts_(kStarts, outputs + 1),
        places_(kPlaces, threads * outputs),
        source_rows_(kSourceRows, rows * k),
        values_(kSourceValues, rows * k) {}

  explicit operator bool() const { return starts_ && places_ && source_rows_ && values_; }

  // First: every thread, when its part of the rows is selected.
  void count(Team team, const int32_t* indices) {
    int64_t* counts = places_.get() + team.id * outputs_;
    std::memset(counts, 0, sizeof(int64_t) * static_cast<size_t>(outputs_));
    const Range rows = team.row_part(rows_);
    for (int64_t i = rows.begin * k_; i < rows.end * k_; ++i) ++counts[indices[i]];
  }

  // Second: one thread, when all have counted. Turns each count into the place of the first entry.
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

  // Third: every thread, when the places are allotted. After it, and a wait, the terms are there.
  void fill(Team team, const T* values, const int32_t* indices) {
    int64_t* places = places_.get() + team.id * outputs_;
    const Range rows = team.row_part(rows_);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t i = row * k_; i < (row + 1) * k_; ++i) {
        const int64_t to = places[indices[i]]++;
        source_rows_.get()[to] = static_cast<int32_t>(row);
        values_.get()[to] = values[i];
      }
    }
  }

  Terms<T> terms() const { return {starts_.get(), 0, source_rows_.get(), values_.get()}; }

 private:
  int64_t rows_, outputs_, k_;
  Scratch<int64_t> starts_, places_;
  Scratch<int32_t> source_rows_;
  Scratch<T> values_;
};

// Large outputs are mostly fresh from the system, at a page fault per 4 KB; larger pages make that per 2 MB.
void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr size_t kLarge = size_t{2} << 20;
  const size_t begin = (reinterpret_cast<size_t>(data) + kLarge - 1) / kLarge * kLarge;
  const size_t end = (reinterpret_cast<size_t>(data) + bytes) / kLarge * kLarge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failure is no error
#endif
}

// A product's right-hand side: some rows of a matrix, `width` columns of them.
template <class T>
struct Source {
  Matrix<T> matrix;
  const int32_t* row_numbers;  // null: the first `rows`
  int64_t rows, width;
};

// What a source's copy should take at most: half of a core's L2, less what else is there.
constexpr int64_t kPackedBytes = 128 << 10;
// Rows of the output that are computed for one panel before the next: few enough to be written as streams.
constexpr int64_t kRowBlock = 16;

// How a source is read: in place, or from copies of so many columns at a time.
template <class T>
class Packing {
 public:
  Packing(const TypedKernels<T>& kernels, Source<T> source, bool worth_it)
      : kernels_(kernels), source_(source), panel_(kernels.panel_width) {
    const int64_t panels = (source.width + panel_ - 1) / panel_;
    const int64_t at_once = kPackedBytes / std::max<int64_t>(1, source.rows * panel_ * static_cast<int64_t>(sizeof(T)));
    in_place_ = source.row_numbers == nullptr && (at_once >= panels || !worth_it);
    columns_ = in_place_ ? std::max<int64_t>(1, panels) * panel_ : std::clamp<int64_t>(at_once, 1, std::max<int64_t>(1, panels)) * panel_;
  }

  // Elements of scratch for each thread.
  int64_t size() const { return source_.rows * (in_place_ ? panel_ : columns_); }

  // Computes out [rows, width], each thread a part of all (copy, row) pairs. Calls product(source, source_ld, row begin,
  // row end, width, out) for a block of rows and up to `step` columns, source and out being at the first of them.
  template <class Product>
  void multiply(Team team, T* packed, int64_t rows, int64_t step, T* out, Product product) const {
    if (rows == 0) return;
    const int64_t whole = in_place_ ? source_.width / panel_ * panel_ : 0;  // columns that are read in place
    auto [begin, end] = team.part((source_.width + columns_ - 1) / columns_ * rows);
    while (begin < end) {
      const int64_t first = begin / rows * columns_, row_begin = begin % rows;
      const int64_t row_end = std::min(rows, row_begin + (end - begin));
      const int64_t last = std::min(first + columns_, source_.width), copied = std::max(first, whole);
      const int64_t packed_ld = in_place_ ? panel_ : columns_;
      if (copied < last)
        kernels_.pack(source_.matrix.data + copied, source_.matrix.ld, source_.row_numbers, source_.rows, last - copied,
                      packed, packed_ld);
      for (int64_t row = row_begin; row < row_end; row += kRowBlock) {
        const int64_t block_end = std::min(row + kRowBlock, row_end);
        for (int64_t column = first; column < whole; column += step)
          product(source_.matrix.data + column, source_.matrix.ld, row, block_end, std::min(step, whole - column),
                  out + column);
        for (int64_t column = copied; column < last; column += step)
          product(packed + (column - copied), packed_ld, row, block_end, std::min(step, last - column), out + column);
      }
      begin += row_end - row_begin;
    }
  }

 private:
  const TypedKernels<T>& kernels_;
  Source<T> source_;
  int64_t panel_, columns_;
  bool in_place_;
};

// Moves the first k rows of out [outputs, width] to their places, and clears all others; each thread some columns. From
// the last to the first, so that no row is overwritten before it has moved: its place is never before it.
template <class T>
void spread_rows(Team team, const int32_t* indices, int64_t k, int64_t outputs, int64_t width, T* out) {
  const Range columns = team.part(width, 64);
  if (columns.begin >= columns.end) return;
  const size_t bytes = static_cast<size_t>(columns.end - columns.begin) * sizeof(T);
  out += columns.begin;
  int64_t next = outputs;
  for (int64_t j = k - 1; j >= 0; --j) {
    const int64_t place = indices[j];
    for (int64_t o = place + 1; o < next; ++o) std::memset(out + o * width, 0, bytes);
    if (place != j) std::memcpy(out + place * width, out + j * width, bytes);
    next = place;
  }
  for (int64_t o = 0; o < next; ++o) std::memset(out + o * width, 0, bytes);
}

float rounded(double value, float*) { return static_cast<float>(value); }
Bf16 rounded(double value, Bf16*) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return {static_cast<uint16_t>(narrow != narrow ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

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

  // Every thread: its part of the rows, in chunks that are still in the cache when they are summed.
  void read(Team team, bool select, int64_t k, T* values, int32_t* indices) {
    const Range part = team.row_part(rows_);
    if (wants_sums_)
      for (int64_t row = part.begin; row < part.end; row += block_) std::fill_n(block_sums(row), outputs_, 0.0);
    const int64_t chunk = std::max<int64_t>(8, kPackedBytes / (outputs_ * static_cast<int64_t>(sizeof(T))));
    for (int64_t begin = part.begin; begin < part.end; begin += chunk) {
      const int64_t end = std::min(begin + chunk, part.end);
      if (select)
        kernels_.topk_rows(grad_.data, grad_.ld, begin, end, outputs_, k, values, indices,
                           candidates_.get() + team.id * candidate_words());
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

  // One thread, when all have read.
  void choose(int64_t k, int32_t* indices) {
    Scored* scores = scores_.get();
    for (int32_t o = 0; o < outputs_; ++o) scores[o] = {order_key(magnitudes_.get()[o]), o};
    std::nth_element(scores, scores + k - 1, scores + outputs_);
    for (int64_t j = 0; j < k; ++j) indices[j] = scores[j].index;
    std::sort(indices, indices + k);
  }

  // Every thread, when the columns are chosen: the values [rows, k] of its rows.
  void gather(Team team, int64_t k, const int32_t* indices, T* values) const {
    const Range part = team.part(rows_);
    for (int64_t row = part.begin; row < part.end; ++row)
      for (int64_t j = 0; j < k; ++j) values[row * k + j] = grad_.data[row * grad_.ld + indices[j]];
  }

 private:
  const TypedKernels<T>& kernels_;
  Matrix<T> grad_;
  int64_t rows_, outputs_;
  bool wants_sums_;
  Scratch<double> sums_, magnitudes_;
  Scratch<Scored> scores_;
};

// A source whose rows are used so often, on average, is worth copying.
constexpr int64_t kUsesWorthPacking = 3;

template <class T>
Status rows_backward(const TypedKernels<T>& kernels, const LinearBackward<T>& call, int threads) {
  const bool needs_input = call.grad_input != nullptr, needs_weight = call.grad_weight != nullptr;
  const bool needs_bias = call.grad_bias != nullptr;
  const int64_t terms = call.rows * call.k;
  const Packing<T> weight(kernels, {call.weight, nullptr, call.outputs, call.inputs},
                          terms >= kUsesWorthPacking * call.outputs);
  const Packing<T> x(kernels, {call.x, nullptr, call.rows, call.inputs}, call.k >= kUsesWorthPacking);
  const int64_t packed_size = std::max(needs_input ? weight.size() : 0, needs_weight ? x.size() : 0);
  const Scratch<T> packed(kPacked, threads * packed_size);
  RowsPass<T> pass(kernels, call.grad, call.rows, call.outputs, needs_bias, threads);
  Transposed<T> transposed(call.rows, call.outputs, needs_weight ? call.k : 0, threads);
  if (!packed || !pass || !transposed) return Status::kNoMemory;

  const Terms<T> by_row = {nullptr, call.k, call.indices, call.values}, by_output = transposed.terms();
  const auto gather = [&](const Terms<T>& from) {
    return [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t width, T* out) {
      kernels.gather_product(source, source_ld, from, begin, end, width, out, call.inputs);
    };
  };
  run_team(threads, [&](Team team) {
    T* own = packed.get() + team.id * packed_size;
    if (call.select || needs_bias) pass.read(team, call.select, call.k, call.values, call.indices);
    if (needs_weight) transposed.count(team, call.indices);
    team.wait();
    if (needs_bias) pass.write_sums(team, call.grad_bias);
    if (needs_weight && team.id == 0) transposed.allot(team);
    if (needs_input) weight.multiply(team, own, call.rows, kernels.gather_width, call.grad_input, gather(by_row));
    if (!needs_weight) return;
    team.wait();
    transposed.fill(team, call.values, call.indices);
    team.wait();
    x.multiply(team, own, call.outputs, kernels.gather_width, call.grad_weight, gather(by_output));
  });
  return Status::kOk;
}

template <class T>
Status columns_backward(const TypedKernels<T>& kernels, const LinearBackward<T>& call, int threads) {
  const bool needs_input = call.grad_input != nullptr, needs_weight = call.grad_weight != nullptr;
  const bool needs_bias = call.grad_bias != nullptr;
  const Packing<T> weight(kernels, {call.weight, call.indices, call.k, call.inputs}, true);
  const Packing<T> x(kernels, {call.x, nullptr, call.rows, call.inputs}, true);
  const int64_t packed_size = std::max(needs_input ? weight.size() : 0, needs_weight ? x.size() : 0);
  const Scratch<T> packed(kPacked, threads * packed_size);
  ColumnsPass<T> pass(kernels, call.grad, call.rows, call.outputs, needs_bias);
  if (!packed || !pass) return Status::kNoMemory;

  run_team(threads, [&](Team team) {
    T* own = packed.get() + team.id * packed_size;
    if (call.select || needs_bias) pass.read(team, call.select, call.grad_bias);
    if (call.select) {
      team.wait();
      if (team.id == 0) pass.choose(call.k, call.indices);
      team.wait();
      pass.gather(team, call.k, call.indices, call.values);
      team.wait();
    }
    if (needs_input)
      weight.multiply(team, own, call.rows, kernels.panel_width, call.grad_input,
                      [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t width, T* out) {
                        kernels.dense_product(source, source_ld, call.k, call.values, call.k, 1, begin, end, width, out,
                                              call.inputs);
                      });
    if (!needs_weight) return;
    x.multiply(team, own, call.k, kernels.panel_width, call.grad_weight,
               [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t width, T* out) {
                 kernels.dense_product(source, source_ld, call.rows, call.values, 1, call.k, begin, end, width, out,
                                       call.inputs);
               });
    if (call.weight_rows_only) return;
    team.wait();
    spread_rows(team, call.indices, call.k, call.outputs, call.inputs, call.grad_weight);
  });
  return Status::kOk;
}

// Whether the indices of each row are within the outputs and ascend.
bool valid_indices(const int32_t* indices, int64_t rows, int64_t k, int64_t outputs) {
  bool valid = true;
  for (int64_t row = 0; row < rows; ++row, indices += k) {
    valid &= indices[0] >= 0 && indices[k - 1] < outputs;
    for (int64_t j = 1; j < k; ++j) valid &= indices[j - 1] < indices[j];
  }
  return valid;
}

}  // namespace

template <class T>
Status topk_rows(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                 int32_t* indices, int threads) {
  if (!valid_selection(grad, rows, outputs, k, threads)) return Status::kBadSize;
  threads = team_size(threads, rows * outputs, 0);
  RowsPass<T> pass(typed<T>(kernels), grad, rows, outputs, false, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.read(team, true, k, values, indices); });
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
    if (team.id == 0) pass.choose(k, indices);
    team.wait();
    pass.gather(team, k, indices, values);
  });
  return Status::kOk;
}

template <class T>
Status linear_backward(const Kernels& kernels, LinearBackward<T> call) {
  int64_t work = 0;
  if (!valid_selection(call.grad, call.rows, call.outputs, call.k, call.threads) ||
      !fits<T>(call.outputs, call.inputs, call.weight.ld) || !fits<T>(call.rows, call.inputs, call.x.ld) ||
      !fits<int64_t>(call.rows, call.k, 0) || __builtin_mul_overflow(call.rows * call.k, call.inputs, &work))
    return Status::kBadSize;

  const int64_t index_rows = call.scope == Scope::kRows ? call.rows : 1;
  const bool keep_selection = call.indices != nullptr;
  const Scratch<T> values(kValues, keep_selection ? 0 : call.rows * call.k);
  const Scratch<int32_t> indices(kIndices, keep_selection ? 0 : index_rows * call.k);
  if (!values || !indices) return Status::kNoMemory;
  if (!keep_selection) call.values = values.get(), call.indices = indices.get();
  if (!call.select && !valid_indices(call.indices, index_rows, call.k, call.outputs)) return Status::kBadIndex;

  if (call.inputs == 0) call.grad_input = call.grad_weight = nullptr;
  const size_t row_bytes = static_cast<size_t>(call.inputs) * sizeof(T);
  const int64_t weight_rows = call.weight_rows_only ? call.k : call.outputs;
  if (call.grad_input != nullptr) prefer_large_pages(call.grad_input, static_cast<size_t>(call.rows) * row_bytes);
  if (call.grad_weight != nullptr) prefer_large_pages(call.grad_weight, static_cast<size_t>(weight_rows) * row_bytes);
  const int threads = team_size(call.threads, call.rows * call.outputs, work);
  const Status status =
      (call.scope == Scope::kRows ? rows_backward<T> : columns_backward<T>)(typed<T>(kernels), call, threads);
  blocks.trim();
  return status;
}

#define MEPROP_INSTANTIATE(T)                                                                                       \
  template Status topk_rows(const Kernels&, Matrix<T>, int64_t, int64_t, int64_t, T*, int32_t*, int);               \
  template Status topk_columns(const Kernels&, Matrix<T>, int64_t, int64_t, int64_t, T*, int32_t*, int);            \
  template Status linear_backward(const Kernels&, LinearBackward<T>);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)

}  // namespace meprop
