// Entries of a whole matrix, chosen by a team of threads that is running already.
//
// This header is for the drivers (entries.cpp, lstm_backward.cpp), which are compiled alike. The unit of a level must not
// include it (kernels.h says why).
#pragma once

#include "drivers.h"
#include "team.h"

namespace meprop {

// Chooses the entries of one matrix after the other, in the same way, and owns the scratch for it. The teams have at most
// `threads` threads, and the matrices at most `rows` rows. All have `outputs` columns.
template <class T>
class EntriesPass {
 public:
  // `sums` is how many sums over the rows write is asked for: 0, 1 for what is left out, or 2.
  EntriesPass(const Kernels& kernels, Keep keep, int64_t rows, int64_t outputs, int sums, int threads);

  explicit operator bool() const { return tables_ && keys_ && found_ && parts_ && samples_ && candidates_ && sums_; }

  // Every thread, with the same entries. Does what plan_entries does. All threads are done when it returns.
  void plan(Team team, Entries<T>* entries);

  // Every thread, with the same planned entries. Does what write_entries does. If `column_sums` [outputs] is not null, it
  // gets the sums over the rows of the gradient, and left_out is not null either. The entries of team.row_part are written
  // when it returns. All others, and the sums, are so after a wait.
  void write(Team team, const Entries<T>& entries, T* values, int32_t* indices, T* left_out,
             T* column_sums = nullptr) const;

 private:
  // The entries above the key are kept, and the first `ties` of those that are equal to it.
  struct Cut {
    uint32_t key;
    int64_t ties;
  };
  // What a thread has collected.
  struct Found {
    int64_t keys;
    KeyRange range;
  };

  static const float* as_floats(const uint32_t* keys) { return reinterpret_cast<const float*>(keys); }
  int64_t scratch_words() const { return 4 * (outputs_ + kScratchPad); }
  uint32_t* keys_of(Team team, int64_t rows) const {
    return keys_.get() + team.part(rows).begin * outputs_ + team.id * kScratchPad;
  }

  void find_largest(Team team, Entries<T>* all);
  uint32_t least_of_sample(const Entries<T>& all);
  Found collect_keys(Team team, const Entries<T>& all, uint32_t least);
  Cut find_cut(Team team, const uint32_t* keys, int64_t size, KeyRange range, int64_t wanted,
               int bits_left_out);
  template <class Count>
  uint32_t* count(Team team, int64_t size, Count count);
  void find_energy(Team team, Entries<T>* all);
  KeyRange find_range(Team team, const Entries<T>& all);
  template <class Count>
  void keep_rows(Team team, Entries<T>* all, Cut cut, Count count);
  float first_threshold(Team team, const Entries<T>& all) const;
  DrawSums sum_rows(Team team, const Entries<T>& all, DrawSums* sums) const;
  void draw_rows(Team team, Entries<T>* all);
  void write_row(const Entries<T>& all, int64_t row, T* values, int32_t* indices, uint32_t* scratch) const;
  void add_up(const Entries<T>& all, Range rows, const T* values, const int32_t* indices, double* left_out,
              double* columns) const;
  void write_sums(Team team, int64_t rows, const double* sums, double parts, T* out) const;

  const TypedKernels<T>& kernels_;
  const TypedKernels<float>& of_keys_;  // a key is the bits of a float32
  int64_t outputs_;
  Scratch<uint32_t> tables_;
  Scratch<uint32_t> keys_;
  Scratch<Found> found_;
  Scratch<DrawSums> parts_;
  Scratch<T> samples_;
  Scratch<uint32_t> candidates_;
  int64_t blocks_;
  Scratch<double> sums_;
  uint32_t least_ = 0;
};

}  // namespace meprop
