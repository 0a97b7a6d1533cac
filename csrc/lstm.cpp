#include "drivers.h"
#include "selected.h"
#include "team.h"

namespace meprop {
namespace {

// Rows whose sums of one block of gates are formed at once: few enough that these stay in L1.
constexpr int64_t kRowsAtOnce = 48;
// A weight that at least so many rows (a step, for the recurrent one) are multiplied with is worth copying in their order.
constexpr int64_t kRowsWorthPacking = 4;
// Sequences are shared out in blocks, at most so many, and the bias's gradient is summed in each block first.
constexpr int64_t kSequenceBlocks = 64;

// Sequences as an LSTM walks over them: steps are counted in the order of the walk.
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

  // The first row of a step, and how many sequences have one; none before the first step and after the last.
  int64_t offset(int64_t step) const { return offsets_.get()[time(step)]; }
  int64_t size(int64_t step) const { return step < 0 || step >= steps() ? 0 : sequences_.sizes[time(step)]; }

  // Where h and c have the state of row `row` of a step, and where the one before it: that of the step before, or, of
  // sequences that begin with this step, the initial one.
  int64_t state(int64_t step, int64_t row) const { return batch() + offset(step) + row; }
  int64_t earlier(int64_t step, int64_t row) const { return row < size(step - 1) ? state(step - 1, row) : row; }

 private:
  int64_t time(int64_t step) const { return sequences_.reverse ? sequences_.steps - 1 - step : step; }

  Sequences sequences_;
  Scratch<int64_t> offsets_;
};

bool valid(const Sequences& sequences, int64_t units, int threads) {
  if (sequences.steps < 1 || units < 1 || units > (INT32_MAX - kScratchPad) / 4 || threads < 1) return false;
  int64_t rows = 0;
  for (int64_t t = 0; t < sequences.steps; ++t) {
    if (sequences.sizes[t] < 1 || (t > 0 && sequences.sizes[t] > sequences.sizes[t - 1])) return false;
    rows += sequences.sizes[t];
    if (rows > INT32_MAX - sequences.sizes[0]) return false;
  }
  return rows == sequences.rows && fits<float>(rows + sequences.sizes[0], 4 * units, 0);
}

void copy_or_clear(const float* from, int64_t count, float* to) {
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  if (from != nullptr) std::memcpy(to, from, bytes);
  else std::memset(to, 0, bytes);
}

// Brings `columns` of a matrix's rows, which lie far apart, into the cache while a product is formed.
void prefetch(const float* matrix, int64_t rows, int64_t columns, int64_t ld) {
  for (; rows > 0; --rows, matrix += ld) {
    __builtin_prefetch(matrix, 1);
    __builtin_prefetch(matrix + columns - 1, 1);
  }
}

const float* at_row(const float* matrix, int64_t row, int64_t width) {
  return matrix != nullptr ? matrix + row * width : nullptr;
}

// The product of rows of a matrix with one block of a weight's units, four gates each: [rows, 4 * block].
class BlockProduct {
 public:
  // packed: null to read the weight in place, which is for few rows; else scratch for its copy [depth, 4 * block].
  BlockProduct(const Kernels& kernels, Matrix<float> weight, int64_t units, int64_t unit, int64_t depth, float* packed)
      : kernels_(kernels),
        weight_{weight.data + unit * weight.ld, weight.ld},
        units_(units),
        count_(std::min<int64_t>(kernels.lstm.block, units - unit)),
        depth_(depth),
        packed_(packed) {}

  void pack() const {
    if (packed_ != nullptr) kernels_.lstm.pack(weight_.data, weight_.ld, units_, count_, depth_, packed_);
  }

  void multiply(Matrix<float> rows, int64_t count, float* sums) const {
    const int64_t width = 4 * kernels_.lstm.block;
    if (packed_ != nullptr)
      return kernels_.f32.dense_product(packed_, width, depth_, rows.data, rows.ld, 1, {}, 0, count, width, sums, width);
    for (int64_t row = 0; row < count; ++row)
      kernels_.lstm.dot(weight_.data, weight_.ld, units_, count_, rows.data + row * rows.ld, depth_, sums + row * width);
  }

 private:
  const Kernels& kernels_;
  Matrix<float> weight_;
  int64_t units_, count_, depth_;
  float* packed_;
};

}  // namespace

Status lstm_forward(const Kernels& kernels, LstmForward call) {
  const TrimAtEnd trim;
  const int64_t units = call.units;
  if (!valid(call.sequences, units, call.threads) || call.inputs < 0 ||
      !fits<float>(4 * units, units, call.weight_hh.ld) || !fits<float>(4 * units, call.inputs, call.weight_ih.ld))
    return Status::kBadSize;
  const Walk walk(call.sequences);
  if (!walk) return Status::kNoMemory;
  int64_t work = 0;
  if (!fits<float>(walk.rows(), call.inputs, call.x.ld) ||
      __builtin_mul_overflow(walk.rows() * 4 * units, call.inputs + units, &work))
    return Status::kBadSize;
  prefer_large_pages(call.gates, static_cast<size_t>(walk.rows() * 4 * units) * sizeof(float));

  const LstmKernels& lstm = kernels.lstm;
  const int64_t width = 4 * lstm.block, blocks_of_units = (units + lstm.block - 1) / lstm.block;
  const bool packs = walk.rows() >= kRowsWorthPacking * walk.steps(), packs_inputs = walk.rows() >= kRowsWorthPacking;
  const int threads = team_size(call.threads, 0, work);
  const Scratch<float> packed(kPacked, packs ? blocks_of_units * units * width : 0);
  const Scratch<float> packed_inputs(kPackedInputs, packs_inputs ? threads * call.inputs * width : 0);
  const Scratch<float> all_sums(kSums, threads * kRowsAtOnce * width);
  if (!packed || !packed_inputs || !all_sums) return Status::kNoMemory;

  run_team(threads, [&](Team team) {
    const Range own = team.part(blocks_of_units);
    float* sums = all_sums.get() + team.id * kRowsAtOnce * width;
    const auto recurrent = [&](int64_t block) {
      return BlockProduct(kernels, call.weight_hh, units, block * lstm.block, units,
                          packs ? packed.get() + block * units * width : nullptr);
    };
    for (int64_t block = own.begin; block < own.end; ++block) {
      const int64_t unit = block * lstm.block, count = std::min<int64_t>(lstm.block, units - unit);
      recurrent(block).pack();
      const BlockProduct product(kernels, call.weight_ih, units, unit, call.inputs,
                                 packs_inputs ? packed_inputs.get() + team.id * call.inputs * width : nullptr);
      product.pack();
      for (int64_t row = 0; row < walk.rows(); row += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, walk.rows() - row);
        product.multiply({call.x.data + row * call.x.ld, call.x.ld}, rows, sums);
        lstm.spread(sums, call.bias != nullptr ? call.bias + unit : nullptr, rows, count, units,
                    call.gates + row * 4 * units + unit);
      }
    }
    for (int64_t step = 0; step < walk.steps(); ++step) {
      for (int64_t block = own.begin; block < own.end; ++block) {
        const int64_t unit = block * lstm.block, count = std::min<int64_t>(lstm.block, units - unit);
        const BlockProduct product = recurrent(block);
        for (int64_t row = 0, end; row < walk.size(step); row = end) {
          const bool begins = row >= walk.size(step - 1);
          end = std::min(row + kRowsAtOnce, walk.size(step));
          if (!begins) end = std::min(end, walk.size(step - 1));
          const int64_t rows = end - row, earlier = walk.earlier(step, row) * units;
          float* gates = call.gates + (walk.offset(step) + row) * 4 * units + unit;
          float* h = call.h + walk.state(step, row) * units + unit;
          float* c = call.c + walk.state(step, row) * units + unit;
          prefetch(gates, 4 * rows, count, units);
          prefetch(h, rows, count, units);
          prefetch(c, rows, count, units);
          const bool zeros = begins && call.from_zeros;
          if (!zeros) product.multiply({call.h + earlier, units}, rows, sums);
          lstm.step(zeros ? nullptr : sums, rows, count, units, gates, call.c + earlier + unit, c, h);
        }
      }
      team.wait();
    }
    for (int64_t step = 0; step < walk.steps(); ++step) {  // those whose last step this is
      const Range ending = team.part(std::max<int64_t>(0, walk.size(step) - walk.size(step + 1)));
      const int64_t row = walk.size(step + 1) + ending.begin, from = walk.state(step, row) * units;
      copy_or_clear(call.h + from, ending.size() * units, call.last_h + row * units);
      copy_or_clear(call.c + from, ending.size() * units, call.last_c + row * units);
    }
  });
  return Status::kOk;
}

namespace {

// The walk back through time: from the gradients of outputs and last states to a selection [N, 4k] of the gates'
// gradients, their sums, and the gradients of the initial state.
class WalkBack {
 public:
  WalkBack(const Kernels& kernels, const LstmBackward& call, const Walk& walk, int threads)
      : kernels_(kernels),
        call_(call),
        walk_(walk),
        units_(call.units),
        kept_(4 * call.k),
        block_((walk.batch() + kSequenceBlocks - 1) / kSequenceBlocks),
        panel_(kernels.f32.panel_width),
        in_place_(units_ >= panel_),
        values_(kValues, walk.rows() * kept_),
        indices_(kIndices, walk.rows() * kept_),
        gate_gradients_(kGateGradients, walk.batch() * 4 * units_),
        grad_output_(kGradOutput, walk.batch() * units_),
        grad_cells_(kGradCells, walk.batch() * units_),
        padded_(kPadded, in_place_ ? 0 : 4 * units_ * panel_),
        candidates_(kCandidates, threads * candidate_words()),
        sums_(kBias, (walk.batch() / block_ + 1) * 4 * units_),
        magnitudes_(kMagnitudes, 4 * units_),
        scores_(kScores, units_) {}

  explicit operator bool() const {
    return values_ && indices_ && gate_gradients_ && grad_output_ && grad_cells_ && padded_ && candidates_ && sums_ &&
           magnitudes_ && scores_;
  }

  int64_t kept() const { return kept_; }
  const float* values() const { return values_.get(); }
  const int32_t* indices() const { return indices_.get(); }

  // Every thread. With Scope::kRows sequences do not meet, so that each thread walks through its own alone.
  void run(Team team) {
    const Range own = team.part(walk_.batch(), block_), gates = team.part(4 * units_);
    if (!in_place_)
      kernels_.f32.pack(call_.weight_hh.data + gates.begin * call_.weight_hh.ld, call_.weight_hh.ld, nullptr,
                        gates.size(), units_, padded_.get() + gates.begin * panel_, panel_);
    const int64_t count = own.size() * units_;
    copy_or_clear(at_row(call_.grad_last_h, own.begin, units_), count, grad_output(own.begin));
    copy_or_clear(at_row(call_.grad_last_c, own.begin, units_), count, grad_cells(own.begin));
    if (call_.grad_bias != nullptr)
      for (int64_t row = own.begin; row < own.end; row += block_) std::fill_n(block_sums(row), 4 * units_, 0.0f);
    team.wait();
    for (int64_t step = walk_.steps() - 1; step >= 0; --step) {
      const Range rows = {std::min(own.begin, walk_.size(step)), std::min(own.end, walk_.size(step))};
      differentiate(step, rows);
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
      for_pieces(units_, panel_, kernels_.f32.gather_width, [&](int64_t column, int64_t columns) {
        kernels_.f32.gather_product(call_.weight_hh.data + column, call_.weight_hh.ld, terms, {}, rows.begin, rows.end,
                                    columns, grad_output(0) + column, units_);
      });
    else
      kernels_.f32.gather_product(padded_.get(), panel_, terms, {}, rows.begin, rows.end, units_, grad_output(0), units_);
  }

  float* grad_output(int64_t row) const { return grad_output_.get() + row * units_; }
  float* grad_cells(int64_t row) const { return grad_cells_.get() + row * units_; }
  float* gate_gradients(int64_t row) const { return gate_gradients_.get() + row * 4 * units_; }
  float* block_sums(int64_t row) const { return sums_.get() + row / block_ * 4 * units_; }
  int64_t candidate_words() const { return 2 * (units_ + kScratchPad); }

  const Kernels& kernels_;
  const LstmBackward& call_;
  const Walk& walk_;
  int64_t units_, kept_, block_, panel_;
  bool in_place_;
  Scratch<float> values_;
  Scratch<int32_t> indices_;
  Scratch<float> gate_gradients_, grad_output_, grad_cells_, padded_;
  Scratch<uint32_t> candidates_;
  Scratch<float> sums_;
  Scratch<double> magnitudes_;
  Scratch<Scored> scores_;
};

// In how many rows each unit is selected, in any of its gates, with what is not zero. Each thread counts a part of the rows.
class UnitHits {
 public:
  UnitHits(int64_t units, int64_t k, int threads)
      : units_(units), k_(k), hits_(kHits, threads * units), last_rows_(kLastRows, threads * units) {}

  explicit operator bool() const { return hits_ && last_rows_; }

  // First: every thread, when its part of the rows is selected.
  void count(Team team, int64_t rows, const float* values, const int32_t* indices) {
    int32_t* hits = hits_.get() + team.id * units_;
    int32_t* last_rows = last_rows_.get() + team.id * units_;
    std::fill_n(hits, units_, 0);
    std::fill_n(last_rows, units_, -1);
    const Range own = team.row_part(rows);
    for (int64_t row = own.begin; row < own.end; ++row)
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t i = (4 * row + gate) * k_; i < (4 * row + gate + 1) * k_; ++i) {
          const int64_t unit = indices[i] - gate * units_;
          if (values[i] == 0 || last_rows[unit] == row) continue;
          last_rows[unit] = static_cast<int32_t>(row);
          ++hits[unit];
        }
  }

  // Second: every thread, when all have counted.
  void add_to(Team team, int64_t* total) const {
    const Range own = team.part(units_);
    for (int64_t unit = own.begin; unit < own.end; ++unit)
      for (int thread = 0; thread < team.size; ++thread) total[unit] += hits_.get()[thread * units_ + unit];
  }

 private:
  int64_t units_, k_;
  Scratch<int32_t> hits_, last_rows_;
};

}  // namespace

Status lstm_backward(const Kernels& kernels, LstmBackward call) {
  const TrimAtEnd trim;
  const int64_t units = call.units;
  int64_t work = 0;
  if (!valid(call.sequences, units, call.threads) || call.k < 1 || call.k > units || call.inputs < 0)
    return Status::kBadSize;
  const Walk walk(call.sequences);
  if (!walk) return Status::kNoMemory;
  const int64_t rows = walk.rows();
  if (!fits<float>(4 * units, call.inputs, call.weight_ih.ld) || !fits<float>(4 * units, units, call.weight_hh.ld) ||
      !fits<float>(rows, call.inputs, call.x.ld) ||
      __builtin_mul_overflow(rows * 4 * call.k, call.inputs + units, &work))
    return Status::kBadSize;
  if (call.inputs == 0) call.grad_x = call.grad_weight_ih = nullptr;
  const auto wish = [](float* data, int64_t count) {
    if (data != nullptr) prefer_large_pages(data, static_cast<size_t>(count) * sizeof(float));
  };
  wish(call.grad_x, rows * call.inputs);
  wish(call.grad_weight_ih, 4 * units * call.inputs);
  wish(call.grad_weight_hh, 4 * units * units);

  const int threads = team_size(call.threads, rows * 4 * units, work);
  const bool needs_weight = call.grad_weight_ih != nullptr || call.grad_weight_hh != nullptr;
  WalkBack back(kernels, call, walk, threads);
  if (!back) return Status::kNoMemory;
  const int64_t kept = back.kept(), outputs = 4 * units;
  const Scratch<int32_t> earlier(kEarlier, rows);
  const Packing<float> weight(kernels.f32, {call.weight_ih, nullptr, outputs, call.inputs},
                              rows * kept >= kUsesWorthPacking * outputs);
  const Packing<float> x(kernels.f32, {call.x, nullptr, rows, call.inputs}, true);
  const Packing<float> h(kernels.f32, {{call.h, units}, earlier.get(), rows, units}, true);
  const int64_t packed_size = std::max({call.grad_x != nullptr ? weight.size() : 0,
                                        call.grad_weight_ih != nullptr ? x.size() : 0,
                                        call.grad_weight_hh != nullptr ? h.size() : 0});
  const Scratch<float> packed(kPacked, threads * packed_size);
  Transposed<float> transposed(outputs, needs_weight ? rows * kept : 0, threads);
  UnitHits hits(call.hits != nullptr ? units : 0, call.k, threads);
  if (!earlier || !packed || !transposed || !hits) return Status::kNoMemory;

  const ByRow<float> selection = {rows, {nullptr, kept, back.indices(), back.values()}};
  const Terms<float> by_output = transposed.terms();
  const auto gather = [&](const Terms<float>& from, float* out, int64_t out_ld) {
    return [&kernels, from, out, out_ld](const float* source, int64_t source_ld, int64_t begin, int64_t end,
                                         int64_t column, int64_t columns) {
      kernels.f32.gather_product(source, source_ld, from, {}, begin, end, columns, out + column, out_ld);
    };
  };
  const int64_t step_width = kernels.f32.gather_width;
  run_team(threads, [&](Team team) {
    float* own = packed.get() + team.id * packed_size;
    back.run(team);
    team.wait();
    if (call.hits != nullptr) {
      hits.count(team, rows, back.values(), back.indices());
      team.wait();
      hits.add_to(team, call.hits);
    }
    if (call.grad_bias != nullptr) back.write_bias(team);
    if (call.grad_x != nullptr)
      weight.multiply(team, own, rows, step_width, gather(selection.terms, call.grad_x, call.inputs));
    if (!needs_weight) return;
    transposed.count(team, selection);
    const Range steps = team.part(walk.steps());
    for (int64_t step = steps.begin; step < steps.end; ++step)
      for (int64_t row = 0; row < walk.size(step); ++row)
        earlier.get()[walk.offset(step) + row] = static_cast<int32_t>(walk.earlier(step, row));
    team.wait();
    if (team.id == 0) transposed.allot(team);
    team.wait();
    transposed.fill(team, selection, nullptr);
    team.wait();
    if (call.grad_weight_ih != nullptr)
      x.multiply(team, own, outputs, step_width, gather(by_output, call.grad_weight_ih, call.inputs));
    if (call.grad_weight_hh != nullptr)
      h.multiply(team, own, outputs, step_width, gather(by_output, call.grad_weight_hh, units));
  });
  return Status::kOk;
}

}  // namespace meprop
