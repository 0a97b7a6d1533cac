// Whole operations: arguments checked, scratch allocated, rows shared out among threads, one level's kernels called.
#pragma once

#include "kernels.h"

namespace meprop {

enum class Status { kOk, kBadSize, kNoMemory };

// Exact top-k of every row: TopkRows (kernels.h) over grad [rows, width], values and indices [rows, k].
template <class T>
Status topk_rows(const Kernels& kernels, const T* grad, int64_t grad_ld, int64_t rows, int64_t width, int64_t k, T* values,
                 int32_t* indices, int threads);

}  // namespace meprop
