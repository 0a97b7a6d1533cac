#include "drivers.h"

#include <omp.h>

#include <cstdlib>

namespace meprop {
namespace {

// Below this many entries per thread, waking another thread costs more than it saves.
constexpr int64_t kEntriesPerThread = 8192;
constexpr int64_t kMaxWidth = INT32_MAX - kScratchPad;


// Uninitialised memory on cache-line boundaries; null where there is none.
class Scratch {
 public:
  explicit Scratch(int64_t words) : words_(static_cast<uint32_t*>(std::aligned_alloc(64, (words * 4 + 63) / 64 * 64))) {}
  ~Scratch() { std::free(words_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  uint32_t* words() const { return words_; }

 private:
  uint32_t* words_;
};

template <class T>
TopkRows<T> topk_kernel(const Kernels& kernels);
template <>
TopkRows<float> topk_kernel<float>(const Kernels& kernels) {
  return kernels.topk_rows_f32;
}
template <>
TopkRows<Bf16> topk_kernel<Bf16>(const Kernels& kernels) {
  return kernels.topk_rows_bf16;
}

}  // namespace

template <class T>
Status topk_rows(const Kernels& kernels, const T* grad, int64_t grad_ld, int64_t rows, int64_t width, int64_t k, T* values,
                 int32_t* indices, int threads) {
  if (rows < 0 || width < 1 || width > kMaxWidth || k < 1 || k > width || grad_ld < 0 || threads < 1) return Status::kBadSize;
  if (rows == 0) return Status::kOk;
  int64_t last = 0;  // the last entry's offset must fit
  if (__builtin_mul_overflow(rows, grad_ld > width ? grad_ld : width, &last)) return Status::kBadSize;

  const int64_t useful = (rows * width + kEntriesPerThread - 1) / kEntriesPerThread;
  if (threads > useful) threads = static_cast<int>(useful);
  if (threads > rows) threads = static_cast<int>(rows);
  const int64_t words_per_thread = 2 * (width + kScratchPad);
  const Scratch scratch(threads * words_per_thread);
  if (scratch.words() == nullptr) return Status::kNoMemory;

  const TopkRows<T> kernel = topk_kernel<T>(kernels);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
    kernel(grad, grad_ld, rows * id / team, rows * (id + 1) / team, width, k, values, indices,
           scratch.words() + id * words_per_thread);
  }
  return Status::kOk;
}

template Status topk_rows(const Kernels&, const float*, int64_t, int64_t, int64_t, int64_t, float*, int32_t*, int);
template Status topk_rows(const Kernels&, const Bf16*, int64_t, int64_t, int64_t, int64_t, Bf16*, int32_t*, int);

}  // namespace meprop
