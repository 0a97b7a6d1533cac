#include "entries.h"
#include "selected.h"
#include "walk.h"

namespace meprop {
namespace {

// Sequences are shared out in blocks, at most so many, and the bias's gradient is summed in each block first.
constexpr int64_t kSequenceBlocks = 64;

// The entries of the gates' gradients [n, 4H] of each time step, one row after the other. They are written in the order
// of the walk back. It goes through the rows from the last to the first, or in reverse from the first to the last.
class EntriesOfSteps {
 public:
  // chosen: null if the object is not used.
  EntriesOfSteps(const Kernels& kernels, const StepEntries* chosen, int64_t units, const Walk& walk, int threads)
      : chosen_(chosen),
        walk_(walk),
        outputs_(4 * units),
        blocks_(used() && chosen->each_gate ? 4 : 1),
        width_(outputs_ / blocks_),
        capacity_(used() ? walk.rows() * outputs_ : 0),
        pass_(kernels, used() ? chosen->keep : Keep::kEnergy, walk.batch(), used() ? width_ : 0, shares(),
              used() ? threads : 0),
        block_starts_(kEntryStarts, blocks_ * (walk.batch() + 1)),
        states_(kEntryStates, blocks_ * walk.batch()),
        groups_(kEntryGroups, walk.batch() * groups_of(width_)),
        starts_(kRowStarts, walk.rows() + 1),
        shared_(kEntryShared, shares() ? walk.steps() * outputs_ : 0),
        block_values_(kEntryValues, blocks_ > 1 ? walk.batch() * outputs_ : 0),
        block_indices_(kEntryIndices, blocks_ > 1 ? walk.batch() * outputs_ : 0) {
    if (starts_) starts_.get()[walk.reverse() ? 0 : walk.rows()] = walk.reverse() ? 0 : capacity_;
  }

  explicit operator bool() const {
    return pass_ && block_starts_ && states_ && groups_ && starts_ && shared_ && block_values_ && block_indices_;
  }

  bool shares() const { return used() && chosen_->exact_sum; }
  // The most entries that there can be.
  int64_t capacity() const { return capacity_; }
  const int64_t* starts() const { return starts_.get(); }
  // What the rows of a time step share [4H]. Null if they share nothing.
  const float* shared(int64_t time) const { return shares() ? shared_.get() + time * outputs_ : nullptr; }

  // Every thread, when the gates' gradients are there. All entries of the step are written when it returns. Returns
  // whether the step keeps everything.
  bool choose(Team team, int64_t step, const float* gates, float* values, int32_t* indices) {
    const int64_t time = walk_.time(step), rows = walk_.size(step), first = walk_.offset(step);
    bool dense = rows == 1 && shares();  // what is missing of one row is its mean
    if (!dense) {
      plan(team, time, rows, gates);
      dense = static_cast<double>(before(rows)) / static_cast<double>(rows * outputs_) > chosen_->ceiling;
    }
    const int64_t count = dense ? rows * outputs_ : before(rows);
    const int64_t begin = walk_.reverse() ? starts_.get()[first] : starts_.get()[first + rows] - count;
    const Range own = team.row_part(rows);
    for (int64_t row = std::max<int64_t>(own.begin, 1); row < own.end; ++row)
      starts_.get()[first + row] = begin + (dense ? row * outputs_ : before(row));
    float* of_step = shares() ? shared_.get() + time * outputs_ : nullptr;
    if (dense)
      keep_all(own, gates, values + begin, indices + begin);
    else
      write(team, own, values + begin, indices + begin, of_step);
    if (team.id == 0) {
      chosen_->kept[time] = count;
      starts_.get()[walk_.reverse() ? first + rows : first] = walk_.reverse() ? begin + count : begin;
      if (dense && of_step != nullptr) std::fill_n(of_step, outputs_, 0.0f);
    }
    team.wait();
    return dense;
  }

 private:
  bool used() const { return chosen_ != nullptr; }
  int64_t* starts_of(int64_t block) const { return block_starts_.get() + block * (walk_.batch() + 1); }

  // The number of entries in the rows before one, when they are planned.
  int64_t before(int64_t row) const {
    int64_t count = 0;
    for (int64_t block = 0; block < blocks_; ++block) count += starts_of(block)[row];
    return count;
  }

  void plan(Team team, int64_t time, int64_t rows, const float* gates) {
    const StepEntries& chosen = *chosen_;
    for (int64_t block = 0; team.id == 0 && block < blocks_; ++block)
      all_[block] = {chosen.keep,
                     rows,
                     width_,
                     {gates + block * width_, outputs_},
                     std::min(chosen.k, width_) * rows,
                     chosen.share,
                     chosen.key + static_cast<uint64_t>(time),
                     starts_of(block),
                     states_.get() + block * walk_.batch(),
                     groups_.get(),
                     0,
                     0,
                     team.size};
    team.wait();
    for (int64_t block = 0; block < blocks_; ++block) pass_.plan(team, &all_[block]);
  }

  // Blocks are written one after the other first, and then side by side.
  void write(Team team, Range rows, float* values, int32_t* indices, float* left_out) const {
    if (blocks_ == 1) return pass_.write(team, all_[0], values, indices, left_out);
    int64_t first[4] = {};  // the place of each block
    for (int64_t block = 0; block < blocks_; ++block) {
      if (block > 0) first[block] = first[block - 1] + starts_of(block - 1)[all_[0].rows];
      pass_.write(team, all_[block], block_values_.get() + first[block], block_indices_.get() + first[block],
                  left_out != nullptr ? left_out + block * width_ : nullptr);
      team.wait();
    }
    int64_t to = before(rows.begin);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t block = 0; block < blocks_; ++block)
        for (int64_t i = starts_of(block)[row]; i < starts_of(block)[row + 1]; ++i, ++to) {
          values[to] = block_values_.get()[first[block] + i];
          indices[to] = block_indices_.get()[first[block] + i] + static_cast<int32_t>(block * width_);
        }
  }

  void keep_all(Range rows, const float* gates, float* values, int32_t* indices) const {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      std::memcpy(values + row * outputs_, gates + row * outputs_, static_cast<size_t>(outputs_) * sizeof(float));
      for (int64_t o = 0; o < outputs_; ++o) indices[row * outputs_ + o] = static_cast<int32_t>(o);
    }
  }

  const StepEntries* chosen_;
  const Walk& walk_;
  int64_t outputs_, blocks_, width_, capacity_;
  EntriesPass<float> pass_;
  Entries<float> all_[4] = {};  // of the blocks of the present step
  Scratch<int64_t> block_starts_;
  Scratch<int32_t> states_;
  Scratch<uint32_t> groups_;  // of the one block from which is drawn
  Scratch<int64_t> starts_;
  Scratch<float> shared_, block_values_;
  Scratch<int32_t> block_indices_;
};

// The walk back through time: from the gradients of outputs and last states to a selection of the gates' gradients
// [N, 4H], their sums, and the gradients of the initial state.
template <class W>
class WalkBack {
 public:
  WalkBack(const Kernels& kernels, const LstmBackward<W>& call, const Walk& walk, int threads)
      : kernels_(kernels),
        products_(lstm_products<W>(kernels)),
        call_(call),
        walk_(walk),
        units_(call.units),
        kept_(call.entries != nullptr ? 0 : 4 * call.k),
        block_((walk.batch() + kSequenceBlocks - 1) / kSequenceBlocks),
        panel_(products_.panel_width),
        in_place_(units_ >= panel_),
        candidates_(kCandidates, call.entries != nullptr ? 0 : threads * candidate_words()),
        entries_(kernels, call.entries, call.units, walk, threads),
        values_(kValues, walk.rows() * kept_ + entries_.capacity()),
        indices_(kIndices, walk.rows() * kept_ + entries_.capacity()),
        gate_gradients_(kGateGradients, walk.batch() * 4 * units_),
        grad_output_(kGradOutput, walk.batch() * units_),
        grad_cells_(kGradCells, walk.batch() * units_),
        padded_(kPadded, in_place_ || call.entries != nullptr ? 0 : 4 * units_ * panel_),
        packs_(call.entries != nullptr && (entries_.shares() || !in_place_)),
        packed_(kPacked, packs_ ? (units_ + products_.gather_width - 1) / products_.gather_width *
                                      products_.gather_width * 4 * units_
                                : 0),
        all_outputs_(kAllOutputs, entries_.shares() ? 4 * units_ : 0),
        bases_(kBases, threads * products_.gather_width),
        sums_(kBias, (walk.batch() / block_ + 1) * 4 * units_),
        magnitudes_(kMagnitudes, 4 * units_),
        scores_(kScores, units_) {}

  explicit operator bool() const {
    return candidates_ && entries_ && values_ && indices_ && gate_gradients_ && grad_output_ && grad_cells_ &&
           padded_ && packed_ && all_outputs_ && bases_ && sums_ && magnitudes_ && scores_;
  }

  // What is selected, when all have run.
  ByRow<float> selection() const {
    const int64_t* starts = call_.entries != nullptr ? entries_.starts() : nullptr;
    return {walk_.rows(), {starts, kept_, indices_.get(), values_.get()}};
  }
  // What the rows of a time step share in addition [4H]. Null if they share nothing.
  const float* shared(int64_t time) const { return entries_.shared(time); }

  // Every thread. With Scope::kRows sequences do not meet, so that each thread walks through its own alone.
  void run(Team team) {
    const Range own = team.part(walk_.batch(), block_), gates = team.part(4 * units_);
    if (!in_place_ && !packs_)
      products_.pack(call_.weight_hh.data + gates.begin * call_.weight_hh.ld, call_.weight_hh.ld, nullptr, gates.size(),
                     units_, padded_.get() + gates.begin * panel_, panel_);
    if (packs_) pack(gates);
    if (entries_.shares())
      for (int64_t o = gates.begin; o < gates.end; ++o) all_outputs_.get()[o] = static_cast<int32_t>(o);
    const int64_t count = own.size() * units_;
    copy_or_clear(at_row(call_.grad_last_h, own.begin, units_), count, grad_output(own.begin));
    copy_or_clear(at_row(call_.grad_last_c, own.begin, units_), count, grad_cells(own.begin));
    if (call_.grad_bias != nullptr)
      for (int64_t row = own.begin; row < own.end; row += block_) std::fill_n(block_sums(row), 4 * units_, 0.0f);
    team.wait();
    for (int64_t step = walk_.steps() - 1; step >= 0; --step) {
      const Range rows = {std::min(own.begin, walk_.size(step)), std::min(own.end, walk_.size(step))};
      differentiate(step, rows);
      if (call_.entries != nullptr) {
        team.wait();
        const bool dense = entries_.choose(team, step, gate_gradients(0), values_.get(), indices_.get());
        carry_entries(team, step, dense);
        team.wait();
        continue;
      }
      if (call_.scope == Scope::kRows) {
        select_of_rows(team, step, rows);
      } else {
        team.wait();
        select_of_step(team, step, rows);
      }
      carry(step, rows);
    }
    if (call_.grad_h0 != nullptr) copy_or_clear(grad_output(own.begin), count, call_.grad_h0 + own.begin * units_);
    if (call_.grad_c0 != nullptr) copy_or_clear(grad_cells(own.begin), count, call_.grad_c0 + own.begin * units_);
  }

  // Every thread, when all have run.
  void write_bias(Team team) const {
    const Range columns = team.part(4 * units_, 16);
    for (int64_t c = columns.begin; c < columns.end; ++c) {
      double total = 0;
      for (int64_t row = 0; row < walk_.batch(); row += block_) total += block_sums(row)[c];
      call_.grad_bias[c] = static_cast<float>(total);
    }
  }

 private:
  // Copies some rows of the recurrent weight for carry_entries.
  void pack(Range rows) {
    const Matrix<W> weight = call_.weight_hh;
    const int64_t wide = products_.gather_width;
    for (int64_t column = 0; column < units_; column += wide)
      products_.pack(weight.data + rows.begin * weight.ld + column, weight.ld, nullptr, rows.size(),
                     std::min(wide, units_ - column), packed_.get() + column * 4 * units_ + rows.begin * wide, wide);
  }

  void differentiate(int64_t step, Range rows) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const int64_t place = walk_.offset(step) + row;
      kernels_.lstm.step_gradient(units_, call_.gates + place * 4 * units_, call_.c + walk_.state(step, row) * units_,
                                  call_.c + walk_.earlier(step, row) * units_,
                                  at_row(call_.grad_output, place, units_), grad_output(row), grad_cells(row),
                                  gate_gradients(row), call_.grad_bias != nullptr ? block_sums(row) : nullptr);
    }
  }

  // Each gate of each row is a row of its own.
  void select_of_rows(Team team, int64_t step, Range rows) {
    if (rows.size() == 0) return;
    const int64_t first = (walk_.offset(step) + rows.begin) * kept_;
    kernels_.f32.topk_rows(gate_gradients(rows.begin), units_, 0, 4 * rows.size(), units_, call_.k,
                           values_.get() + first, indices_.get() + first,
                           candidates_.get() + team.id * candidate_words());
    int32_t* indices = indices_.get() + first;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t j = 0; j < call_.k; ++j) *indices++ += static_cast<int32_t>(gate * units_);
  }

  // Each gate's columns with the largest sums of magnitudes over all rows of the step.
  void select_of_step(Team team, int64_t step, Range rows) {
    const Range columns = team.part(4 * units_, 64);
    int32_t* chosen = indices_.get() + walk_.offset(step) * kept_;  // the first row's
    if (columns.size() > 0) {
      std::fill_n(magnitudes_.get() + columns.begin, columns.size(), 0.0);
      kernels_.f32.add_columns(gate_gradients(0) + columns.begin, 4 * units_, walk_.size(step), columns.size(), nullptr,
                               magnitudes_.get() + columns.begin);
    }
    team.wait();
    if (team.id == 0)
      for (int64_t gate = 0; gate < 4; ++gate) {
        int32_t* of_gate = chosen + gate * call_.k;
        choose_largest(magnitudes_.get() + gate * units_, units_, call_.k, scores_.get(), of_gate);
        for (int64_t j = 0; j < call_.k; ++j) of_gate[j] += static_cast<int32_t>(gate * units_);
      }
    team.wait();
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (row > 0) std::memcpy(chosen + row * kept_, chosen, static_cast<size_t>(kept_) * sizeof(int32_t));
      float* values = values_.get() + (walk_.offset(step) + row) * kept_;
      for (int64_t j = 0; j < kept_; ++j) values[j] = gate_gradients(row)[chosen[j]];
    }
  }

  // The earlier output's gradient, from the selection.
  void carry(int64_t step, Range rows) {
    const int64_t first = walk_.offset(step) * kept_;
    const Terms<float> terms = {nullptr, kept_, indices_.get() + first, values_.get() + first};
    if (in_place_)
      for_pieces(units_, panel_, products_.gather_width, [&](int64_t column, int64_t columns) {
        products_.gather_product(call_.weight_hh.data + column, call_.weight_hh.ld, terms, {}, rows.begin, rows.end,
                                 columns, grad_output(0) + column, units_);
      });
    else
      products_.gather_product(padded_.get(), panel_, terms, {}, rows.begin, rows.end, units_, grad_output(0), units_);
  }

  // The same from the entries of all rows, and from what these share. Each thread computes some columns. So it reads a
  // part of the weight, which stays in its cache from one row to the next.
  void carry_entries(Team team, int64_t step, bool dense) {
    const int64_t wide = products_.gather_width;
    if (packs_) {
      const Range own = team.part((units_ + wide - 1) / wide);
      for (int64_t piece = own.begin; piece < own.end; ++piece)
        carry_columns(team, step, dense, {packed_.get() + piece * wide * 4 * units_, wide}, piece * wide,
                      std::min(wide, units_ - piece * wide));
      return;
    }
    const int64_t panels = units_ / panel_, begin = panels * team.id / team.size * panel_;
    const int64_t end = team.id + 1 == team.size ? units_ : panels * (team.id + 1) / team.size * panel_;
    for_pieces(end - begin, panel_, wide, [&](int64_t at, int64_t columns) {
      carry_columns(team, step, dense, {call_.weight_hh.data + begin + at, call_.weight_hh.ld}, begin + at, columns);
    });
  }

  // Some columns of it, of which `weight` has the first in front.
  void carry_columns(Team team, int64_t step, bool dense, Matrix<W> weight, int64_t column, int64_t columns) {
    const int64_t rows = walk_.size(step), outputs = 4 * units_;
    float* out = grad_output(0) + column;
    if (dense && rows > 1) {
      for (int64_t at = 0; at < columns; at += panel_)
        products_.dense_product(weight.data + at, weight.ld, outputs, gate_gradients(0), outputs, 1, {}, 0, rows,
                                std::min(panel_, columns - at), out + at, units_);
      return;
    }
    Base<float> base = {};
    if (entries_.shares() && !dense) {
      float* sums = bases_.get() + team.id * products_.gather_width;
      const Terms<float> all = {nullptr, outputs, all_outputs_.get(), entries_.shared(walk_.time(step))};
      products_.gather_product(weight.data, weight.ld, all, {}, 0, 1, columns, sums, columns);
      base.row = sums;
    }
    const Terms<float> terms = {entries_.starts() + walk_.offset(step), 0, indices_.get(), values_.get()};
    products_.gather_product(weight.data, weight.ld, terms, base, 0, rows, columns, out, units_);
  }

  float* grad_output(int64_t row) const { return grad_output_.get() + row * units_; }
  float* grad_cells(int64_t row) const { return grad_cells_.get() + row * units_; }
  float* gate_gradients(int64_t row) const { return gate_gradients_.get() + row * 4 * units_; }
  float* block_sums(int64_t row) const { return sums_.get() + row / block_ * 4 * units_; }
  int64_t candidate_words() const { return 2 * (units_ + kScratchPad); }

  const Kernels& kernels_;
  const LstmProducts<W>& products_;
  const LstmBackward<W>& call_;
  const Walk& walk_;
  int64_t units_, kept_, block_, panel_;
  bool in_place_;
  Scratch<uint32_t> candidates_;
  EntriesOfSteps entries_;
  Scratch<float> values_;
  Scratch<int32_t> indices_;
  Scratch<float> gate_gradients_, grad_output_, grad_cells_;
  Scratch<W> padded_;
  bool packs_;  // whether each step reads all columns of the recurrent weight, from a copy [H / wide, 4H, wide]
  Scratch<W> packed_;
  Scratch<int32_t> all_outputs_;
  Scratch<float> bases_, sums_;
  Scratch<double> magnitudes_;
  Scratch<Scored> scores_;
};

// In how many rows each unit is selected, in any of its gates, with what is not zero. Each thread counts a part of the
// rows.
class UnitHits {
 public:
  UnitHits(int64_t units, int threads)
      : units_(units), hits_(kHits, threads * units), last_rows_(kLastRows, threads * units) {}

  explicit operator bool() const { return hits_ && last_rows_; }

  // First: every thread, when all rows are selected.
  void count(Team team, const ByRow<float>& from) {
    int32_t* hits = hits_.get() + team.id * units_;
    int32_t* last_rows = last_rows_.get() + team.id * units_;
    std::fill_n(hits, units_, 0);
    std::fill_n(last_rows, units_, -1);
    const Range own = team.row_part(from.rows);
    for (int64_t row = own.begin; row < own.end; ++row) {
      int64_t first = 0;  // the first output of the gate
      for (int64_t i = from.first(row); i < from.first(row + 1); ++i) {
        while (from.terms.rows[i] >= first + units_) first += units_;
        const int64_t unit = from.terms.rows[i] - first;
        if (from.terms.coefficients[i] == 0 || last_rows[unit] == row) continue;
        last_rows[unit] = static_cast<int32_t>(row);
        ++hits[unit];
      }
    }
  }

  // Second: every thread, when all have counted.
  void add_to(Team team, int64_t* total) const {
    const Range own = team.part(units_);
    for (int64_t unit = own.begin; unit < own.end; ++unit)
      for (int thread = 0; thread < team.size; ++thread) total[unit] += hits_.get()[thread * units_ + unit];
  }

 private:
  int64_t units_;
  Scratch<int32_t> hits_, last_rows_;
};

// The density above which entries are multiplied as a whole matrix, where both ways take as long with AVX2.
constexpr double kDenseDensity = 0.5;

// The products of the selections of all time steps: S W_ih, S^T x, and S^T h with the earlier outputs h. What the rows of
// each time step share is a matrix [T, 4H]. Its product with W_ih is [T, I], and each row gets that of its time step. The
// others are with the sums of the inputs and of the earlier outputs of each time step.
template <class W>
class StepProducts {
 public:
  StepProducts(const Kernels& kernels, const LstmBackward<W>& call, const Walk& walk, const WalkBack<W>& back,
               int threads)
      : kernels_(kernels.f32),
        products_(lstm_products<W>(kernels)),
        call_(call),
        walk_(walk),
        selection_(back.selection()),
        shared_(back.shared(0)),
        rows_(walk.rows()),
        outputs_(4 * call.units),
        dense_(is_dense()),
        needs_weight_(call.grad_weight_ih != nullptr || call.grad_weight_hh != nullptr),
        adds_(shared_ != nullptr && !dense_),
        earlier_(kEarlier, rows_),
        weight_(products_, {call.weight_ih, nullptr, outputs_, call.inputs}, entries() >= kUsesWorthPacking * outputs_),
        x_(kernels_, {call.x, nullptr, rows_, call.inputs}, true),
        h_(kernels_, {{call.h, call.units}, earlier_.get(), rows_, call.units}, true),
        packed_size_(std::max(call.grad_weight_ih != nullptr ? x_.size() : 0,
                              call.grad_weight_hh != nullptr ? h_.size() : 0)),
        packed_(kPacked, threads * packed_size_),
        packed_weights_(kPackedInputs, call.grad_x != nullptr ? threads * weight_.size() : 0),
        whole_(kDense, dense_ ? rows_ * outputs_ : 0),
        transposed_(outputs_, needs_weight_ && !dense_ ? entries() : 0, threads),
        times_(kRowSteps, adds_ ? rows_ : 0),
        of_inputs_(kStepInputs, adds_ && call.grad_x != nullptr ? walk.steps() * call.inputs : 0),
        x_sums_(kSharedInputs, adds_ && call.grad_weight_ih != nullptr ? walk.steps() * padded(call.inputs) : 0),
        h_sums_(kStepOutputs, adds_ && call.grad_weight_hh != nullptr ? walk.steps() * padded(call.units) : 0),
        sums_(kSharedSums, adds_ ? threads * std::max(call.inputs, call.units) : 0) {}

  explicit operator bool() const {
    return earlier_ && packed_ && packed_weights_ && whole_ && transposed_ && times_ && of_inputs_ && x_sums_ &&
           h_sums_ && sums_;
  }

  // Every thread.
  void run(Team team) {
    const Range steps = team.part(walk_.steps());
    for (int64_t step = steps.begin; step < steps.end; ++step)
      for (int64_t row = 0; row < walk_.size(step); ++row) {
        earlier_.get()[walk_.offset(step) + row] = static_cast<int32_t>(walk_.earlier(step, row));
        if (adds_) times_.get()[walk_.offset(step) + row] = static_cast<int32_t>(walk_.time(step));
      }
    if (dense_) return multiply_whole(team);
    if (adds_) multiply_shared(team, steps);
    if (needs_weight_) transposed_.count(team, selection_);
    team.wait();
    if (needs_weight_ && team.id == 0) transposed_.allot(team);
    if (call_.grad_x != nullptr) multiply_weight(team);
    if (!needs_weight_) return;
    team.wait();
    transposed_.fill(team, selection_, nullptr);
    team.wait();
    if (call_.grad_weight_ih != nullptr) multiply_source(team, x_, x_sums_.get(), call_.inputs, call_.grad_weight_ih);
    if (call_.grad_weight_hh != nullptr) multiply_source(team, h_, h_sums_.get(), call_.units, call_.grad_weight_hh);
  }

 private:
  int64_t entries() const { return selection_.first(rows_) - selection_.first(0); }
  int64_t padded(int64_t width) const {
    return (width + kernels_.panel_width - 1) / kernels_.panel_width * kernels_.panel_width;
  }
  float* packed(Team team) const { return packed_.get() + team.id * packed_size_; }
  W* packed_weight(Team team) const { return packed_weights_.get() + team.id * weight_.size(); }
  bool is_dense() const {
    const int64_t shared = shared_ != nullptr ? walk_.steps() * outputs_ : 0;
    return call_.entries != nullptr && static_cast<double>(entries() + shared) >
                                           kDenseDensity * static_cast<double>(rows_) * static_cast<double>(outputs_);
  }

  // A product with a matrix of coefficients, of which rows and terms are so far apart.
  template <class S>
  static auto dense(const ProductKernels<S, float>& kernels, const float* coefficients, int64_t row_stride,
                    int64_t depth, int64_t depth_stride, float* out, int64_t out_ld) {
    return [=, &kernels](const S* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column,
                         int64_t columns) {
      kernels.dense_product(source, source_ld, depth, coefficients, row_stride, depth_stride, {}, begin, end,
                            columns, out + column, out_ld);
    };
  }

  // All products with the selection and what is shared as one matrix [N, 4H].
  void multiply_whole(Team team) {
    const Range own = team.part(rows_);
    float* whole = whole_.get();
    std::fill_n(whole + own.begin * outputs_, own.size() * outputs_, 0.0f);
    for (int64_t row = own.begin; row < own.end; ++row)
      for (int64_t i = selection_.first(row); i < selection_.first(row + 1); ++i)
        whole[row * outputs_ + selection_.terms.rows[i]] = selection_.terms.coefficients[i];
    for (int64_t step = 0; shared_ != nullptr && step < walk_.steps(); ++step) {
      const float* added = shared_ + walk_.time(step) * outputs_;
      const int64_t first = walk_.offset(step), end = std::min(first + walk_.size(step), own.end);
      for (int64_t row = std::max(first, own.begin); row < end; ++row)
        for (int64_t o = 0; o < outputs_; ++o) whole[row * outputs_ + o] += added[o];
    }
    team.wait();
    const int64_t panel = kernels_.panel_width;
    if (call_.grad_x != nullptr)
      weight_.multiply(team, packed_weight(team), rows_, panel,
                       dense(products_, whole, outputs_, outputs_, 1, call_.grad_x, call_.inputs));
    if (call_.grad_weight_ih != nullptr)
      x_.multiply(team, packed(team), outputs_, panel,
                  dense(kernels_, whole, 1, rows_, outputs_, call_.grad_weight_ih, call_.inputs));
    if (call_.grad_weight_hh != nullptr)
      h_.multiply(team, packed(team), outputs_, panel,
                  dense(kernels_, whole, 1, rows_, outputs_, call_.grad_weight_hh, call_.units));
  }

  // What the time steps share, times the weight, and the sums of the steps' inputs and earlier outputs.
  void multiply_shared(Team team, Range steps) {
    if (call_.grad_x != nullptr)
      weight_.multiply(team, packed_weight(team), walk_.steps(), kernels_.panel_width,
                       dense(products_, shared_, outputs_, outputs_, 1, of_inputs_.get(), call_.inputs));
    double* sums = sums_.get() + team.id * std::max(call_.inputs, call_.units);
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      const int64_t size = walk_.size(step), first = walk_.offset(step), time = walk_.time(step);
      if (call_.grad_weight_ih != nullptr) {
        std::fill_n(sums, call_.inputs, 0.0);
        kernels_.add_columns(call_.x.data + first * call_.x.ld, call_.x.ld, size, call_.inputs, sums, nullptr);
        round(sums, call_.inputs, x_sums_.get() + time * padded(call_.inputs));
      }
      if (call_.grad_weight_hh != nullptr) {
        const int64_t units = call_.units, going_on = std::min(size, walk_.size(step - 1));
        std::fill_n(sums, units, 0.0);
        if (going_on > 0)
          kernels_.add_columns(call_.h + walk_.earlier(step, 0) * units, units, going_on, units, sums, nullptr);
        kernels_.add_columns(call_.h + going_on * units, units, size - going_on, units, sums, nullptr);
        round(sums, units, h_sums_.get() + time * padded(units));
      }
    }
  }

  void round(const double* sums, int64_t width, float* to) const {
    std::fill_n(to, padded(width), 0.0f);
    for (int64_t c = 0; c < width; ++c) to[c] = static_cast<float>(sums[c]);
  }

  void multiply_weight(Team team) const {
    weight_.multiply(team, packed_weight(team), rows_, products_.gather_width,
                     [&](const W* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column,
                         int64_t columns) {
                       for (int64_t row = begin, next; row < end; row = next) {  // rows of one time step at once
                         next = end;
                         Base<float> base = {};
                         if (adds_) {
                           for (next = row + 1; next < end && times_.get()[next] == times_.get()[row];) ++next;
                           base.row = of_inputs_.get() + times_.get()[row] * call_.inputs + column;
                         }
                         products_.gather_product(source, source_ld, selection_.terms, base, row, next, columns,
                                                  call_.grad_x + column, call_.inputs);
                       }
                     });
  }

  // The transposed selection times a source [N, width]. What is shared, times the sums [T, width] of each time step's
  // rows, comes first.
  void multiply_source(Team team, const Packing<float>& source_of, const float* sums, int64_t width, float* out) const {
    const Terms<float> by_output = transposed_.terms();
    source_of.multiply(
        team, packed(team), outputs_, kernels_.gather_width,
        [&](const float* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column, int64_t columns) {
          if (!adds_)
            return kernels_.gather_product(source, source_ld, by_output, {}, begin, end, columns, out + column, width);
          const int64_t panel = kernels_.panel_width;
          for (int64_t at = column; at < column + columns; at += panel)
            kernels_.dense_product(sums + at, padded(width), walk_.steps(), shared_, 1, outputs_, {}, begin, end,
                                   std::min(panel, column + columns - at), out + at, width);
          for (int64_t row = begin; row < end; ++row)
            kernels_.gather_product(source, source_ld, by_output, {out + row * width + column, nullptr}, row, row + 1,
                                    columns, out + column, width);
        });
  }

  const TypedKernels<float>& kernels_;
  const LstmProducts<W>& products_;
  const LstmBackward<W>& call_;
  const Walk& walk_;
  const ByRow<float> selection_;
  const float* shared_;
  int64_t rows_, outputs_;
  bool dense_, needs_weight_, adds_;
  Scratch<int32_t> earlier_;
  Packing<W> weight_;
  Packing<float> x_, h_;
  int64_t packed_size_;
  Scratch<float> packed_;
  Scratch<W> packed_weights_;
  Scratch<float> whole_;
  Transposed<float> transposed_;
  Scratch<int32_t> times_;  // of each row
  Scratch<float> of_inputs_, x_sums_, h_sums_;
  Scratch<double> sums_;
};

template <class W>
bool valid(const LstmBackward<W>& call) {
  if (!valid(call.sequences, call.units, call.threads) || call.inputs < 0) return false;
  if (call.entries == nullptr) {
    if (call.k < 1 || call.k > call.units) return false;
  } else if (call.entries->k < 0 || call.entries->keep < Keep::kLargest || call.entries->keep > Keep::kDrawn) {
    return false;
  }
  const int64_t rows = call.sequences.rows, outputs = 4 * call.units;
  return fits<W>(outputs, call.inputs, call.weight_ih.ld) && fits<W>(outputs, call.units, call.weight_hh.ld) &&
         fits<float>(rows, call.inputs, call.x.ld) && fits<double>(rows, outputs, 0) &&
         fits<float>(call.sequences.steps, std::max(call.inputs, call.units) + kScratchPad, 0);
}

}  // namespace

template <class W>
Status lstm_backward(const Kernels& kernels, LstmBackward<W> call) {
  const TrimAtEnd trim;
  const int64_t units = call.units;
  if (!valid(call)) return Status::kBadSize;
  const Walk walk(call.sequences);
  if (!walk) return Status::kNoMemory;
  const int64_t rows = walk.rows();
  // Of entries of all gates few are kept, but how many is not known before.
  int64_t work = 0;
  const int64_t kept = call.entries != nullptr ? units / 8 + 1 : 4 * call.k;
  if (__builtin_mul_overflow(rows * kept, call.inputs + units, &work)) return Status::kBadSize;
  if (call.inputs == 0) call.grad_x = call.grad_weight_ih = nullptr;
  const auto wish = [](float* data, int64_t count) {
    if (data != nullptr) prefer_large_pages(data, static_cast<size_t>(count) * sizeof(float));
  };
  wish(call.grad_x, rows * call.inputs);
  wish(call.grad_weight_ih, 4 * units * call.inputs);
  wish(call.grad_weight_hh, 4 * units * units);

  const int threads = team_size(call.threads, rows * 4 * units, work);
  WalkBack<W> back(kernels, call, walk, threads);
  UnitHits hits(call.hits != nullptr ? units : 0, threads);
  if (!back || !hits) return Status::kNoMemory;
  run_team(threads, [&](Team team) {
    back.run(team);
    team.wait();
    if (call.hits != nullptr) {
      hits.count(team, back.selection());
      team.wait();
      hits.add_to(team, call.hits);
    }
    if (call.grad_bias != nullptr) back.write_bias(team);
  });

  StepProducts<W> products(kernels, call, walk, back, threads);
  if (!products) return Status::kNoMemory;
  run_team(threads, [&](Team team) { products.run(team); });
  return Status::kOk;
}

template Status lstm_backward(const Kernels&, LstmBackward<float>);
template Status lstm_backward(const Kernels&, LstmBackward<Bf16>);

}  // namespace meprop
