// The native kernels: what each one promises, and the table through which everything reaches them.
//
// A level is one instruction set. Each level's unit (level_*.cpp) compiles the same algorithms (topk.inl) on its own
// vector type (simd_*.h) inside its own namespace, and exports one `Kernels` table. The table is the whole list of
// variants: the binding dispatches through it, and tests and benchmarks enumerate it.
//
// Conventions: sizes and leading dimensions are in elements; matrices are row-major, a row's elements are adjacent, and
// rows may overlap or repeat (any leading dimension) where they are only read. The caller has checked what is said
// under "requires"; kernels do not check again. No kernel allocates, throws, or keeps state between calls.
#pragma once

#include <cstdint>

namespace meprop {

// bfloat16 as it lies in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// Elements that any kernel may read or write beyond a scratch array's stated length.
constexpr int64_t kScratchPad = 64;

// Exact top-k of rows [row_begin, row_end) of grad [rows, width].
//
// Writes per row the k entries of largest magnitude, by ascending index: their values, unchanged, and their indices.
// Of equal magnitudes the lower index is taken; every NaN counts as larger than infinity and as equal to every other.
// requires: 1 <= k <= width < 2^31; scratch of 2 * (width + kScratchPad) words for the calling thread alone.
template <class T>
using TopkRows = void (*)(const T* grad, int64_t grad_ld, int64_t row_begin, int64_t row_end, int64_t width, int64_t k,
                          T* values, int32_t* indices, uint32_t* scratch);

struct Kernels {
  const char* level;
  TopkRows<float> topk_rows_f32;
  TopkRows<Bf16> topk_rows_bf16;
};

extern const Kernels kScalar;
#ifdef MEPROP_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace meprop
