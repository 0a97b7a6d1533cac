// Sequences as an LSTM walks over them.
//
// This header is for the drivers (lstm.cpp, lstm_backward.cpp), which are compiled alike. The unit of a level must not
// include it (kernels.h says why).
#pragma once

#include <type_traits>

#include "drivers.h"
#include "team.h"

namespace meprop {

// The products with weights of W.
template <class W>
const LstmProducts<W>& lstm_products(const Kernels& kernels) {
  if constexpr (std::is_same_v<W, float>) return kernels.lstm_f32;
  else return kernels.lstm_bf16;
}

// Steps are counted in the order of the walk.
class Walk {
 public:
  explicit Walk(Sequences sequences) : sequences_(sequences), offsets_(kOffsets, sequences.steps + 1) {
    if (!offsets_) return;
    int64_t offset = 0;
    for (int64_t t = 0; t < sequences.steps; offset += sequences.sizes[t++]) offsets_.get()[t] = offset;
    offsets_.get()[sequences.steps] = offset;
  }

  explicit operator bool() const { return bool{offsets_}; }
  int64_t steps() const { return sequences_.steps; }
  int64_t rows() const { return offsets_.get()[sequences_.steps]; }
  int64_t batch() const { return sequences_.sizes[0]; }

  // The time step that is a step of the walk.
  int64_t time(int64_t step) const { return sequences_.reverse ? sequences_.steps - 1 - step : step; }
  bool reverse() const { return sequences_.reverse; }

  // The first row of a step, and how many sequences have one; none before the first step and after the last.
  int64_t offset(int64_t step) const { return offsets_.get()[time(step)]; }
  int64_t size(int64_t step) const { return step < 0 || step >= steps() ? 0 : sequences_.sizes[time(step)]; }

  // Where h and c have the state of row `row` of a step, and where the one before it: that of the step before, or, of
  // sequences that begin with this step, the initial one.
  int64_t state(int64_t step, int64_t row) const { return batch() + offset(step) + row; }
  int64_t earlier(int64_t step, int64_t row) const { return row < size(step - 1) ? state(step - 1, row) : row; }

 private:
  Sequences sequences_;
  Scratch<int64_t> offsets_;
};

inline bool valid(const Sequences& sequences, int64_t units, int threads) {
  if (sequences.steps < 1 || sequences.steps > sequences.rows || units < 1 || units > (INT32_MAX - kScratchPad) / 4 || threads < 1) return false;
  int64_t rows = 0;
  for (int64_t t = 0; t < sequences.steps; ++t) {
    if (sequences.sizes[t] < 1 || (t > 0 && sequences.sizes[t] > sequences.sizes[t - 1])) return false;
    rows += sequences.sizes[t];
    if (rows > INT32_MAX - sequences.sizes[0]) return false;
  }
  return rows == sequences.rows && fits<float>(rows + sequences.sizes[0], 4 * units, 0);
}

inline void copy_or_clear(const float* from, int64_t count, float* to) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  if (from != nullptr) std::memcpy(to, from, bytes);
  else std::memset(to, 0, bytes);
}

inline const float* at_row(const float* matrix, int64_t row, int64_t width) {
  return matrix != nullptr ? matrix + row * width : nullptr;
}

}  // namespace meprop
