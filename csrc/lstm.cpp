#include "walk.h"

namespace meprop {
namespace {

// Rows whose sums of one block of gates are formed at once: few enough that these stay in L1.
constexpr int64_t kRowsAtOnce = 48;
// A weight that at least so many rows (a step, for the recurrent one) are multiplied with is worth copying in their order.
constexpr int64_t kRowsWorthPacking = 4;

// Brings `columns` of a matrix's rows, which lie far apart, into the cache while a product is formed.
void prefetch(const float* matrix, int64_t rows, int64_t columns, int64_t ld) {
  for (; rows > 0; --rows, matrix += ld) {
    __builtin_prefetch(matrix, 1);
    __builtin_prefetch(matrix + columns - 1, 1);
  }
}

// The product of rows of a matrix with one block of a weight's units, four gates each: [rows, 4 * block].
template <class W>
class BlockProduct {
 public:
  // packed: null to read the weight in place, which is for few rows; else scratch for its copy [depth, 4 * block].
  BlockProduct(const Kernels& kernels, Matrix<W> weight, int64_t units, int64_t unit, int64_t depth, W* packed)
      : kernels_(lstm_products<W>(kernels)),
        weight_{weight.data + unit * weight.ld, weight.ld},
        units_(units),
        count_(std::min<int64_t>(kernels.lstm.block, units - unit)),
        depth_(depth),
        packed_(packed) {}

  void pack() const {
    if (packed_ != nullptr) kernels_.pack_block(weight_.data, weight_.ld, units_, count_, depth_, packed_);
  }

  void multiply(Matrix<float> rows, int64_t count, float* sums) const {
    const int64_t width = kernels_.panel_width;
    if (packed_ != nullptr)
      return kernels_.dense_product(packed_, width, depth_, rows.data, rows.ld, 1, {}, 0, count, width, sums, width);
    for (int64_t row = 0; row < count; ++row)
      kernels_.dot_block(weight_.data, weight_.ld, units_, count_, rows.data + row * rows.ld, depth_,
                         sums + row * width);
  }

 private:
  const LstmProducts<W>& kernels_;
  Matrix<W> weight_;
  int64_t units_, count_, depth_;
  W* packed_;
};

}  // namespace

template <class W>
Status lstm_forward(const Kernels& kernels, LstmForward<W> call) {
  const TrimAtEnd trim;
  const int64_t units = call.units;
  if (!valid(call.sequences, units, call.threads) || call.inputs < 0 ||
      !fits<W>(4 * units, units, call.weight_hh.ld) || !fits<W>(4 * units, call.inputs, call.weight_ih.ld))
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
  const Scratch<W> packed(kPacked, packs ? blocks_of_units * units * width : 0);
  const Scratch<W> packed_inputs(kPackedInputs, packs_inputs ? threads * call.inputs * width : 0);
  const Scratch<float> all_sums(kSums, threads * kRowsAtOnce * width);
  if (!packed || !packed_inputs || !all_sums) return Status::kNoMemory;

  run_team(threads, [&](Team team) {
    const Range own = team.part(blocks_of_units);
    float* sums = all_sums.get() + team.id * kRowsAtOnce * width;
    const auto recurrent = [&](int64_t block) {
      return BlockProduct<W>(kernels, call.weight_hh, units, block * lstm.block, units,
                             packs ? packed.get() + block * units * width : nullptr);
    };
    for (int64_t block = own.begin; block < own.end; ++block) {
      const int64_t unit = block * lstm.block, count = std::min<int64_t>(lstm.block, units - unit);
      recurrent(block).pack();
      const BlockProduct<W> product(kernels, call.weight_ih, units, unit, call.inputs,
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
        const BlockProduct<W> product = recurrent(block);
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

template Status lstm_forward(const Kernels&, LstmForward<float>);
template Status lstm_forward(const Kernels&, LstmForward<Bf16>);

}  // namespace meprop
