#include "drivers.h"
#include "selected.h"
#include "team.h"

namespace meprop {

constexpr uint32_t kZeroKey = 0;  // the key of zeros (kernels.h). All others are above

template <class T>
Status linear_forward(const Kernels& kernels, const LinearForward<T>& call) {
  const TrimAtEnd trim;
  if (call.rows > INT32_MAX || call.inputs > INT32_MAX - kScratchPad || !fits<T>(call.rows, call.inputs, call.x.ld) ||
      !fits<T>(call.outputs, call.inputs, call.weight.ld) || !fits<T>(call.rows, call.outputs, 0) || call.threads < 1)
    return Status::kBadSize;
  const TypedKernels<T>& of = typed<T>(kernels);
  const auto row_of_x = [&](int64_t row) { return call.x.data + row * call.x.ld; };
  const Scratch<int64_t> starts_scratch(kEntryStarts, call.rows + 1);
  int64_t* const starts = starts_scratch.get();
  if (starts == nullptr) return Status::kNoMemory;
  run_team(team_size(call.threads, call.rows * call.inputs, 0), [&](Team team) {
    const Range own = team.part(call.rows);
    for (int64_t row = own.begin; row < own.end; ++row)
      starts[row + 1] = of.count_keys(row_of_x(row), call.inputs, kZeroKey).above;
  });
  starts[0] = 0;
  for (int64_t row = 0; row < call.rows; ++row) starts[row + 1] += starts[row];
  const int64_t nonzeros = *call.nonzeros = starts[call.rows];
  if (static_cast<double>(nonzeros) > call.ceiling * static_cast<double>(call.rows * call.inputs)) return Status::kOk;

  int64_t work = 0;
  if (__builtin_mul_overflow(nonzeros, call.outputs, &work)) return Status::kBadSize;
  const int threads = team_size(call.threads, call.outputs * call.inputs, work);
  const Packing<T> weight(of, {call.weight, nullptr, call.inputs, call.outputs, call.transposed}, true);
  const int64_t scratch_size = 2 * (call.inputs + kScratchPad);
  const Scratch<T> packed(kPacked, threads * weight.size());
  const Scratch<T> values(kEntryValues, nonzeros);
  const Scratch<int32_t> indices(kEntryIndices, nonzeros);
  const Scratch<uint32_t> candidates(kCandidates, threads * scratch_size);
  const Scratch<float> bias(kBases, call.bias != nullptr ? call.outputs : 0);
  if (!packed || !values || !indices || !candidates || !bias) return Status::kNoMemory;
  for (int64_t o = 0; o < call.outputs && call.bias != nullptr; ++o) bias.get()[o] = widened(call.bias[o]);
  prefer_large_pages(call.out, static_cast<size_t>(call.rows * call.outputs) * sizeof(T));
  const Terms<T> terms = {starts, 0, indices.get(), values.get()};
  run_team(threads, [&](Team team) {
    const Range own = team.part(call.rows);
    for (int64_t row = own.begin; row < own.end; ++row)
      of.largest_entries(row_of_x(row), call.inputs, kZeroKey, 0, values.get() + starts[row],
                         indices.get() + starts[row], candidates.get() + team.id * scratch_size);
    team.wait();
    weight.multiply(team, packed.get() + team.id * weight.size(), call.rows, of.gather_width,
                    [&](const T* source, int64_t source_ld, int64_t begin, int64_t end, int64_t column, int64_t columns) {
                      const Base<T> base = {call.bias != nullptr ? bias.get() + column : nullptr, nullptr};
                      of.gather_product(source, source_ld, terms, base, begin, end, columns, call.out + column,
                                        call.outputs);
                    });
  });
  return Status::kOk;
}

template Status linear_forward(const Kernels&, const LinearForward<float>&);
template Status linear_forward(const Kernels&, const LinearForward<Bf16>&);

}  // namespace meprop
