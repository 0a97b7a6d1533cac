// Entries of a whole matrix, chosen by a team of threads that is running already.
//
// This header is for the drivers (entries.cpp, lstm_backward.cpp), which are compiled alike. The unit of a level must not
// include it (kernels.h says why).
#pragma once

#include "drivers.h"
#include "team.h"

namespace meprop {

// Chooses the entries of one matrix after the other, and owns the scratch for it. The teams have at most `threads`
// threads, and the matrices at most `rows` rows. All have `outputs` columns.
template <class T>
class EntriesPass {
 public:
  // `sums` is how many sums over the rows write is asked for: 0, 1 for what is left out, or 2.
  EntriesPass(const TypedKernels<T>& kernels, int64_t rows, int64_t outputs, int sums, int threads);

  explicit operator bool() const { return tables_ && parts_ && samples_ && ranges_ && candidates_ && sums_; }

  // Every thread, with the same entries. Does what plan_entries does. All threads are done when it returns.
  void plan(Team team, Entries<T>* entries);

  // Every thread, with the same planned entries. Does what write_entries does. If `column_sums` [outputs] is not null, it
  // gets the sums over the rows of the gradient, and left_out is not null either. The entries of team.row_part are written
  // when it returns. All others, and the sums, are so after a wait.
  void write(Team team, const Entries<T>& entries, T* values, int32_t* indices, T* left_out,
             T* column_sums = nullptr) const;

 private:
  // The key of the entry that is the `count`-th largest by half a key, and how many entries of this half are kept.
  struct Place {
    int64_t half, rest;
  };

  static Place place_of(const uint32_t* counts, int64_t halves, int64_t count);
  void find_largest(Team team, Entries<T>* all);
  void find_range(Team team, const Entries<T>& all);
  void begin_table_with(uint32_t first);
  void leave_out_small_ones(const Entries<T>& all);
  void count_upper_halves(Team team, Entries<T>* all);
  template <class Count>
  void count(Team team, const Entries<T>& all, int64_t size, Count count);
  void read_distribution(Entries<T>* all);
  void count_rows(Team team, Entries<T>* all);
  float first_threshold(Team team, const Entries<T>& all) const;
  DrawSums sum_rows(Team team, const Entries<T>& all, DrawSums* sums) const;
  void draw_rows(Team team, Entries<T>* all);
  void write_row(const Entries<T>& all, int64_t row, T* values, int32_t* indices, uint32_t* scratch) const;
  void add_up(const Entries<T>& all, Range rows, const T* values, const int32_t* indices, double* left_out,
              double* columns) const;
  void write_sums(Team team, int64_t rows, const double* sums, double parts, T* out) const;

  const TypedKernels<T>& kernels_;
  int64_t outputs_;
  Scratch<uint32_t> tables_;
  Scratch<DrawSums> parts_;
  Scratch<T> samples_;
  Scratch<KeyRange> ranges_;
  Scratch<uint32_t> candidates_;
  int64_t blocks_;
  Scratch<double> sums_;
  uint32_t first_ = 1, most_ = 0;
  int64_t table_ = 0;
  Place place_ = {0, 0};
  int64_t ties_ = 0;
};

}  // namespace meprop
