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
  const double most = call.most_nonzeros * static_cast<double>(call.rows * call.inputs);
  const Scratch<int64_t> starts_scratch(kEntryStarts, call.rows + 1);
  int64_t* const starts = starts_scratch.get();
  if (starts == nullptr) return Status::kNoMemory;
  starts[0] = 0;
  run_team(team_size(call.threads, call.rows * call.inputs, 0), [&](Team team) {
    const Range own = team.part(call.rows);
    int64_t count = 0;
    for (int64_t row = own.begin; row < own.end; ++row) {
      const bool is_enough = static_cast<double>(count) > most;  // then it does not matter how many more there are
      count += starts[row + 1] = is_enough ? 0 : of.count_keys(row_of_x(row), call.inputs, kZeroKey).above;
    }
  });
  for (int64_t row = 0; row < call.rows; ++row) starts[row + 1] += starts[row];
  const int64_t nonzeros = starts[call.rows];
  *call.is_written = static_cast<double>(nonzeros) <= most;
  if (!*call.is_written) return Status::kOk;

  int64_t work = 0;
  if (__builtin_mul_overflow(nonzeros, call.outputs, &work)) return Status::kBadSize;
  const int threads = team_size(call.threads, call.outputs * call.inputs, work);
  const Packing<T> weight(of, {call.weight, nullptr, call.inputs, call.outputs, call.by_output}, true);
  const int64_t row_size = call.inputs + kScratchPad;
  const Scratch<T> packed(kPacked, threads * weight.size()), row_values(kValues, threads * row_size);
  const Scratch<int32_t> row_indices(kIndices, threads * row_size), indices(kEntryIndices, nonzeros);
  const Scratch<uint32_t> candidates(kCandidates, threads * 2 * row_size);
  const Scratch<T> values(kEntryValues, nonzeros);
  const Scratch<float> bias(kBases, call.bias != nullptr ? call.outputs : 0);
  if (!packed || !row_values || !row_indices || !indices || !candidates || !values || !bias) return Status::kNoMemory;
  for (int64_t o = 0; o < call.outputs && call.bias != nullptr; ++o) bias.get()[o] = widened(call.bias[o]);
  prefer_large_pages(call.out, static_cast<size_t>(call.rows * call.outputs) * sizeof(T));
  const Terms<T> terms = {starts, 0, indices.get(), values.get()};
  run_team(threads, [&](Team team) {
    // Somebody may write to x meanwhile. Then a row has another number of entries than was counted, and the result is
    // some number, as torch's is. So a row's entries are written where all have room, and as many are taken as were
    // counted. Those of no entry have a valid index.
    T* own_values = row_values.get() + team.id * row_size;
    int32_t* own_indices = row_indices.get() + team.id * row_size;
    std::fill_n(own_values, row_size, T{});
    std::fill_n(own_indices, row_size, 0);
    const Range own = team.part(call.rows);
    for (int64_t row = own.begin; row < own.end; ++row) {
      of.largest_entries(row_of_x(row), call.inputs, kZeroKey, 0, own_values, own_indices,
                         candidates.get() + team.id * 2 * row_size);
      const int64_t count = starts[row + 1] - starts[row];
      std::copy_n(own_values, count, values.get() + starts[row]);
      std::copy_n(own_indices, count, indices.get() + starts[row]);
    }
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
