#include "drivers.h"
#include "selected.h"
#include "team.h"

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
Bf16 rounded(double value, Bf16*) { return rounded_to_bf16(static_cast<float>(value)); }

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
    choose_largest(magnitudes_.get(), outputs_, k, scores_.get(), indices);
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
