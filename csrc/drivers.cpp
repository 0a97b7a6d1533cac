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

// Work below which waking another thread costs more than it saves: entries looked at, multiply-adds.
constexpr int64_t kEntriesPerThread = 1 << 13;
constexpr int64_t kProductsPerThread = 1 << 16;

// What scratch is for. Each use has a block of its own.
enum Use { kCandidates, kMagnitudes, kScores, kValues, kIndices, kStarts, kPlaces, kSourceRows, kSourceValues, kPanels, kUses };

// The blocks of one calling thread. They are kept from call to call: memory that is fresh from the system costs a page
// fault per 4 KB, which is more than the work of a small layer.
class Blocks {
 public:
  ~Blocks() {
    for (Block& block : blocks_) std::free(block.data);
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

int team_size(int threads, int64_t work, int64_t work_per_thread) {
  return static_cast<int>(std::clamp<int64_t>(work / work_per_thread, 1, threads));
}

// Calls part(thread, begin, end) with equal parts of [0, count), each a multiple of `grain` long but the last.
template <class Part>
void share(int threads, int64_t count, int64_t grain, Part part) {
  const int64_t grains = (count + grain - 1) / grain;
  threads = static_cast<int>(std::clamp<int64_t>(grains, 1, threads));
  if (threads == 1 || forked) return part(0, int64_t{0}, count);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = grains * id / team * grain, end = std::min(count, grains * (id + 1) / team * grain);
    if (begin < end) part(id, begin, end);
  }
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
// values. A counting sort; every thread counts and then places a part of the rows.
template <class T>
class Transposed {
 public:
  Transposed(int64_t rows, int64_t outputs, int64_t k, int threads)
      : rows_(rows),
        outputs_(outputs),
        k_(k),
        threads_(team_size(threads, rows * k, kEntriesPerThread)),
        starts_(kStarts, outputs + 1),
        places_(kPlaces, threads_ * outputs),
        source_rows_(kSourceRows, rows * k),
        values_(kSourceValues, rows * k) {}

  explicit operator bool() const { return starts_ && places_ && source_rows_ && values_; }

  void fill(const T* values, const int32_t* indices) {
    // A thread that gets no rows writes no counts, so all are cleared first.
    std::memset(places_.get(), 0, sizeof(int64_t) * static_cast<size_t>(threads_ * outputs_));
    share(threads_, rows_, 1, [&](int thread, int64_t begin, int64_t end) {
      int64_t* counts = places_.get() + thread * outputs_;
      for (int64_t i = begin * k_; i < end * k_; ++i) ++counts[indices[i]];
    });
    int64_t place = 0;
    for (int64_t output = 0; output < outputs_; ++output) {
      starts_.get()[output] = place;
      for (int thread = 0; thread < threads_; ++thread) {
        int64_t& here = places_.get()[thread * outputs_ + output];
        const int64_t count = here;
        here = place;
        place += count;
      }
    }
    starts_.get()[outputs_] = place;
    share(threads_, rows_, 1, [&](int thread, int64_t begin, int64_t end) {
      int64_t* places = places_.get() + thread * outputs_;
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = row * k_; i < (row + 1) * k_; ++i) {
          const int64_t to = places[indices[i]]++;
          source_rows_.get()[to] = static_cast<int32_t>(row);
          values_.get()[to] = values[i];
        }
      }
    });
  }

  Terms<T> terms() const { return {starts_.get(), 0, source_rows_.get(), values_.get()}; }

 private:
  int64_t rows_, outputs_, k_;
  int threads_;
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

// Computes out [rows, width], panel after panel, each thread a share of all (panel, row) pairs: packs the panel's
// columns of `source` and calls product(panel, row begin, row end, width, out at the panel's first column).
// `source_rows` names the rows to pack, or is null for the first `source_count`. `work` counts multiply-adds.
template <class T, class Product>
Status by_panels(const TypedKernels<T>& kernels, Matrix<T> source, const int32_t* source_rows, int64_t source_count,
                 int64_t rows, int64_t width, T* out, int64_t work, int threads, Product product) {
  if (rows == 0 || width == 0) return Status::kOk;
  const int64_t panel_width = kernels.panel_width, panels = (width + panel_width - 1) / panel_width;
  threads = team_size(threads, work, kProductsPerThread);
  const int64_t panel_size = source_count * panel_width;
  const Scratch<T> scratch(kPanels, threads * panel_size);
  if (!scratch) return Status::kNoMemory;
  prefer_large_pages(out, static_cast<size_t>(rows * width) * sizeof(T));
  share(threads, panels * rows, 1, [&](int thread, int64_t begin, int64_t end) {
    T* panel = scratch.get() + thread * panel_size;
    while (begin < end) {
      const int64_t column = begin / rows * panel_width, row = begin % rows;
      const int64_t row_end = std::min(rows, row + (end - begin));
      const int64_t columns = std::min(panel_width, width - column);
      kernels.pack_panel(source.data + column, source.ld, source_rows, source_count, columns, panel);
      product(panel, row, row_end, columns, out + column);
      begin += row_end - row;
    }
  });
  return Status::kOk;
}

template <class T>
Status rows_products(const TypedKernels<T>& kernels, const LinearBackward<T>& call) {
  const int64_t work = call.rows * call.k * call.inputs;
  if (call.grad_input != nullptr) {
    const Terms<T> terms = {nullptr, call.k, call.indices, call.values};
    const Status status =
        by_panels(kernels, call.weight, nullptr, call.outputs, call.rows, call.inputs, call.grad_input, work,
                  call.threads, [&](const T* panel, int64_t begin, int64_t end, int64_t width, T* out) {
                    kernels.gather_product(panel, terms, begin, end, width, out, call.inputs);
                  });
    if (status != Status::kOk) return status;
  }
  if (call.grad_weight != nullptr) {
    Transposed<T> transposed(call.rows, call.outputs, call.k, call.threads);
    if (!transposed) return Status::kNoMemory;
    transposed.fill(call.values, call.indices);
    const Terms<T> terms = transposed.terms();
    return by_panels(kernels, call.x, nullptr, call.rows, call.outputs, call.inputs, call.grad_weight, work,
                     call.threads, [&](const T* panel, int64_t begin, int64_t end, int64_t width, T* out) {
                       kernels.gather_product(panel, terms, begin, end, width, out, call.inputs);
                     });
  }
  return Status::kOk;
}

// Moves the first k rows of out [outputs, width] to their places, and clears all others. From the last to the first, so
// that no row is overwritten before it has moved: indices ascend, so a row's place is never before it.
template <class T>
void spread_rows(const int32_t* indices, int64_t k, int64_t outputs, int64_t width, T* out, int threads) {
  share(threads, width, 64, [&](int, int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>(end - begin) * sizeof(T);
    int64_t next = outputs;
    for (int64_t j = k - 1; j >= 0; --j) {
      const int64_t place = indices[j];
      for (int64_t o = place + 1; o < next; ++o) std::memset(out + o * width + begin, 0, bytes);
      if (place != j) std::memcpy(out + place * width + begin, out + j * width + begin, bytes);
      next = place;
    }
    for (int64_t o = 0; o < next; ++o) std::memset(out + o * width + begin, 0, bytes);
  });
}

template <class T>
Status columns_products(const TypedKernels<T>& kernels, const LinearBackward<T>& call) {
  const int64_t work = call.rows * call.k * call.inputs;
  if (call.grad_input != nullptr) {
    const Status status =
        by_panels(kernels, call.weight, call.indices, call.k, call.rows, call.inputs, call.grad_input, work,
                  call.threads, [&](const T* panel, int64_t begin, int64_t end, int64_t width, T* out) {
                    kernels.dense_product(panel, call.k, call.values, call.k, 1, begin, end, width, out, call.inputs);
                  });
    if (status != Status::kOk) return status;
  }
  if (call.grad_weight != nullptr) {
    const Status status =
        by_panels(kernels, call.x, nullptr, call.rows, call.k, call.inputs, call.grad_weight, work, call.threads,
                  [&](const T* panel, int64_t begin, int64_t end, int64_t width, T* out) {
                    kernels.dense_product(panel, call.rows, call.values, 1, call.k, begin, end, width, out, call.inputs);
                  });
    if (status != Status::kOk) return status;
    if (!call.weight_rows_only)
      spread_rows(call.indices, call.k, call.outputs, call.inputs, call.grad_weight, call.threads);
  }
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
  threads = team_size(threads, rows * outputs, kEntriesPerThread);
  const int64_t words = 2 * (outputs + kScratchPad);
  const Scratch<uint32_t> scratch(kCandidates, threads * words);
  if (!scratch) return Status::kNoMemory;
  share(threads, rows, 1, [&](int thread, int64_t begin, int64_t end) {
    typed<T>(kernels).topk_rows(grad.data, grad.ld, begin, end, outputs, k, values, indices,
                                scratch.get() + thread * words);
  });
  return Status::kOk;
}

template <class T>
Status topk_columns(const Kernels& kernels, Matrix<T> grad, int64_t rows, int64_t outputs, int64_t k, T* values,
                    int32_t* indices, int threads) {
  if (!valid_selection(grad, rows, outputs, k, threads)) return Status::kBadSize;
  threads = team_size(threads, rows * outputs, kEntriesPerThread);
  const Scratch<double> magnitudes(kMagnitudes, outputs);
  const Scratch<Scored> scored(kScores, outputs);
  if (!magnitudes || !scored) return Status::kNoMemory;
  share(threads, outputs, 64, [&](int, int64_t begin, int64_t end) {
    typed<T>(kernels).column_sums(grad.data, grad.ld, rows, begin, end, nullptr, magnitudes.get());
  });
  for (int32_t o = 0; o < outputs; ++o) scored.get()[o] = {order_key(magnitudes.get()[o]), o};
  std::nth_element(scored.get(), scored.get() + k - 1, scored.get() + outputs);
  for (int64_t j = 0; j < k; ++j) indices[j] = scored.get()[j].index;
  std::sort(indices, indices + k);
  share(threads, rows, 1, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t j = 0; j < k; ++j) values[row * k + j] = grad.data[row * grad.ld + indices[j]];
  });
  return Status::kOk;
}

template <class T>
Status linear_backward(const Kernels& kernels, LinearBackward<T> call) {
  const int64_t index_rows = call.scope == Scope::kRows ? call.rows : 1;
  int64_t work = 0;
  if (!valid_selection(call.grad, call.rows, call.outputs, call.k, call.threads) ||
      !fits<T>(call.outputs, call.inputs, call.weight.ld) || !fits<T>(call.rows, call.inputs, call.x.ld) ||
      !fits<int64_t>(call.rows, call.k, 0) || __builtin_mul_overflow(call.rows * call.k, call.inputs, &work))
    return Status::kBadSize;

  const bool keep_selection = call.indices != nullptr;
  const Scratch<T> values(kValues, keep_selection ? 0 : call.rows * call.k);
  const Scratch<int32_t> indices(kIndices, keep_selection ? 0 : index_rows * call.k);
  if (!values || !indices) return Status::kNoMemory;
  if (!keep_selection) call.values = values.get(), call.indices = indices.get();
  if (call.select) {
    const Status status = (call.scope == Scope::kRows ? topk_rows<T> : topk_columns<T>)(
        kernels, call.grad, call.rows, call.outputs, call.k, call.values, call.indices, call.threads);
    if (status != Status::kOk) return status;
  } else if (!valid_indices(call.indices, index_rows, call.k, call.outputs)) {
    return Status::kBadIndex;
  }
  if (call.grad_bias != nullptr)
    share(team_size(call.threads, call.rows * call.outputs, kEntriesPerThread), call.outputs, 64,
          [&](int, int64_t begin, int64_t end) {
            typed<T>(kernels).column_sums(call.grad.data, call.grad.ld, call.rows, begin, end, call.grad_bias, nullptr);
          });
  return call.scope == Scope::kRows ? rows_products(typed<T>(kernels), call) : columns_products(typed<T>(kernels), call);
}

#define MEPROP_INSTANTIATE(T)                                                                                       \
  template Status topk_rows(const Kernels&, Matrix<T>, int64_t, int64_t, int64_t, T*, int32_t*, int);               \
  template Status topk_columns(const Kernels&, Matrix<T>, int64_t, int64_t, int64_t, T*, int32_t*, int);            \
  template Status linear_backward(const Kernels&, LinearBackward<T>);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)

}  // namespace meprop
