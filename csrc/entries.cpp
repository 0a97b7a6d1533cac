#include "entries.h"

#include <cmath>

#include "selected.h"

namespace meprop {
namespace {

constexpr uint64_t kOne = uint64_t{1} << 24;  // the probability 1
constexpr int64_t kLowerHalves = int64_t{1} << 16, kMostUppers = 0x7f90;
constexpr int64_t kTable = std::max(2 * kMostUppers, kLowerHalves);  // counts of a thread
constexpr float kLeastThreshold = 0x1p-100f;
constexpr int64_t kFinite = 0x7f80;  // the upper halves below are of finite magnitudes

// Philox 4x32-10: the four random words of a counter.
struct Words {
  uint32_t word[4];
};
Words philox(uint64_t key, uint64_t counter) {
  Words c = {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t a = uint64_t{0xd2511f53u} * c.word[0], b = uint64_t{0xcd9e8d57u} * c.word[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(a)}};
  }
  return c;
}

// A random number below 2^24 for each row.
uint64_t uniform(uint64_t key, int64_t row) {
  return philox(key, static_cast<uint64_t>(row) >> 2).word[row & 3] >> 8;
}

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The least magnitude of an upper half.
double edge(int64_t upper) { return upper < kFinite ? of_bits(static_cast<uint32_t>(upper) << 16) : 0x1p128; }

// The largest threshold that is not above a positive value.
uint32_t threshold_below(double value) {
  const float largest = of_bits(static_cast<uint32_t>(kFinite - 1) << 16);
  if (!(value < largest)) return bits_of(largest);
  const float nearest = static_cast<float>(value);
  return (bits_of(nearest) - (nearest > value)) & 0xffff0000u;
}

// How the magnitudes are distributed.
struct Distribution {
  const uint32_t* counts;  // by upper halves, from that of `first` on
  int64_t first, end;      // the upper halves of finite entries that are not zero are in [first, end)
  int64_t entries;         // that are not zero
  double width;            // of an upper half: the magnitudes are between its edge and this part of the way to the next

  double bound(int64_t upper) const { return edge(upper) + width * (edge(upper + 1) - edge(upper)); }
  // The middle is at most this part of a magnitude away from it.
  double error() const { return width / 256; }
  double middle(int64_t upper) const { return edge(upper) + width / 2 * (edge(upper + 1) - edge(upper)); }

  // Calls body(upper half, number of entries) for each upper half that has entries, ascending, until it returns true.
  template <class Body>
  void ascend(Body body) const {
    for (int64_t upper = first; upper < end; ++upper)
      if (counts[upper - first] != 0 && body(upper, counts[upper - first])) return;
  }
};

// The largest threshold that is not above limit(sum, squares, others). These are the sums of the magnitudes below the
// threshold and of their squares, and the number of the other entries. The limit falls as the threshold rises.
template <class Limit>
uint32_t largest_threshold(const Distribution& of, Limit limit) {
  double sum = 0, squares = 0, last = 0, most = HUGE_VAL;
  int64_t others = of.entries;
  of.ascend([&](int64_t upper, int64_t count) {
    if (sum > 0) most = limit(sum, squares, others);
    if (most < edge(upper)) return true;
    const double magnitude = of.middle(upper);
    sum += static_cast<double>(count) * magnitude;
    squares += static_cast<double>(count) * magnitude * magnitude;
    others -= count;
    last = edge(upper);
    return false;
  });
  if (sum == 0) return 0;
  if (most >= last) most = limit(sum, squares, others);
  return threshold_below(std::max(most, last));
}

// The limit of `count` entries on average.
double limit_of_count(double count, double sum, int64_t others) {
  return count > static_cast<double>(others) ? sum / (count - static_cast<double>(others)) : HUGE_VAL;
}

uint32_t threshold_for_noise(const Distribution& of, double noise, int64_t count) {
  double squares = 0;
  of.ascend([&](int64_t upper, int64_t entries) {
    squares += static_cast<double>(entries) * of.middle(upper) * of.middle(upper);
    return false;
  });
  const double error = of.error(), budget = noise * squares * (1 - 2 * error);
  return largest_threshold(of, [&](double sum, double below, int64_t others) {
    return std::min((budget + below) / (sum * (1 + error)), limit_of_count(static_cast<double>(count), sum, others));
  });
}

// The largest key that is left out. The entries above it hold at least so much of the sum of squares.
uint32_t cut_for_energy(const Distribution& of, double share) {
  double left_out = 0, kept = 0;
  of.ascend([&](int64_t upper, int64_t entries) {
    left_out += static_cast<double>(entries) * of.bound(upper) * of.bound(upper);
    return false;
  });
  for (int64_t upper = of.end - 1; upper >= of.first; --upper) {
    const double entries = of.counts[upper - of.first];
    if (entries == 0) continue;
    kept += entries * edge(upper) * edge(upper);
    left_out -= entries * of.bound(upper) * of.bound(upper);
    if (kept >= share * (kept + std::max(left_out, 0.0))) return (static_cast<uint32_t>(upper) << 16) - 1;
  }
  return 0;
}

template <class T>
const T* row_of(const Entries<T>& of, int64_t row) {
  return of.grad.data + row * of.grad.ld;
}

// Without a threshold only what is certain is kept.
template <class T>
Probability probability(const Entries<T>& of) {
  return {of.cut, of.threshold > 0 ? static_cast<float>(kOne) / of.threshold : 0};
}

template <class T>
bool draws(const Entries<T>& of) {
  return of.keep == Keep::kNoise || of.keep == Keep::kDrawn;
}

// A threshold whose inverse might overflow keeps every entry that is not zero.
template <class T>
void set_threshold(Entries<T>* all, float threshold) {
  const bool draws = threshold > kLeastThreshold;
  all->threshold = draws ? threshold : 0;
  all->cut = draws ? bits_of(threshold) : 1;
}

// Chooses where the rows' sampling starts so that they draw `count` entries together. The rows' numbers are drawn by
// systematic sampling too, each of them the integer below or above its mean.
template <class T>
void share_out(const Entries<T>& all) {
  int64_t total = 0;
  for (int64_t row = 0; row < all.rows; ++row) total += all.starts[row + 1];
  const int64_t one = kOne, excess = std::clamp(total - all.count * one, -one, one);  // by rounding
  const int64_t start = static_cast<int64_t>(uniform(all.key, all.rows)) * (one - std::abs(excess)) / one;
  int64_t before = start + std::max<int64_t>(-excess, 0);
  for (int64_t row = 0; row < all.rows; ++row) {
    const int64_t sum = all.starts[row + 1], to = before + sum;
    const int64_t least = sum % one;  // with a start from one - least on, one entry more is drawn
    const bool more = (to >> 24) - (before >> 24) > sum >> 24;
    const int64_t range = more ? least : one - least;
    all.states[row] = static_cast<int32_t>((more ? one - least : 0) + all.states[row] * range / one);
    before = to;
  }
}

template <class T>
bool valid(const Entries<T>& of) {
  return of.outputs >= 1 && of.outputs <= INT32_MAX - kScratchPad && of.rows <= INT32_MAX && of.threads >= 1 &&
         fits<T>(of.rows, of.outputs, of.grad.ld) && fits<double>(of.rows, of.outputs, 0) && of.count >= 0 &&
         of.count <= of.rows * of.outputs;
}

}  // namespace

template <class T>
EntriesPass<T>::EntriesPass(const TypedKernels<T>& kernels, int64_t rows, int64_t outputs, bool left_out, int threads)
    : kernels_(kernels),
      outputs_(outputs),
      tables_(kKeyCounts, threads * kTable),
      parts_(kParts, 2 * threads),
      ranges_(kKeyRanges, threads),
      candidates_(kCandidates, threads * (outputs + kScratchPad)),
      sums_(kLeftOut, left_out ? (std::min(rows / kLeastRowsPerBlock, kRowBlocks) + 1) * outputs : 0) {}

template <class T>
void EntriesPass<T>::plan(Team team, Entries<T>* all) {
  find_range(team, *all);
  count(team, *all, 2 * table_, [&](const T* row, uint32_t* counts) {
    kernels_.count_upper_halves(row, outputs_, first_, table_, counts);
  });
  if (team.id == 0) {
    all->starts[0] = 0;
    ties_ = 0;
    read_distribution(all);
  }
  team.wait();
  if (all->keep == Keep::kLargest) {
    count(team, *all, kLowerHalves, [&](const T* row, uint32_t* counts) {
      kernels_.count_lower_halves(row, outputs_, static_cast<uint32_t>(place_.half), counts);
    });
    if (team.id == 0) {
      const Place lower = place_of(tables_.get(), kLowerHalves, place_.rest);
      all->cut = static_cast<uint32_t>(place_.half << 16 | lower.half);
      ties_ = lower.rest;
    }
    team.wait();
  }
  if (all->keep == Keep::kDrawn) lower_threshold(team, all);
  if (draws(*all))
    sum_rows(team, all);
  else
    count_rows(team, all);
  team.wait();
}

template <class T>
typename EntriesPass<T>::Place EntriesPass<T>::place_of(const uint32_t* counts, int64_t halves, int64_t count) {
  int64_t half = halves - 1;
  for (; half > 0 && counts[half] < count; --half) count -= counts[half];
  return {half, count};
}

// Which upper halves there are: the tables have places for these only.
template <class T>
void EntriesPass<T>::find_range(Team team, const Entries<T>& all) {
  KeyRange own = {0, 0};
  const Range rows = team.part(all.rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) kernels_.widen_range(row_of(all, row), outputs_, &own);
  ranges_.get()[team.id] = own;
  team.wait();
  if (team.id == 0) {
    for (int thread = 1; thread < team.size; ++thread) {
      own.least = std::min(own.least - 1, ranges_.get()[thread].least - 1) + 1;  // that of 0 is the largest number
      own.most = std::max(own.most, ranges_.get()[thread].most);
    }
    first_ = std::max(own.least >> 16, 1u);
    table_ = std::max<int64_t>((own.most >> 16) - int64_t{first_} + 2, 2);
  }
  team.wait();
}

// Counts all rows in the first table, which has so many places.
template <class T>
template <class Count>
void EntriesPass<T>::count(Team team, const Entries<T>& all, int64_t size, Count count) {
  uint32_t* own = tables_.get() + team.id * kTable;
  std::memset(own, 0, static_cast<size_t>(size) * sizeof(uint32_t));
  const Range rows = team.part(all.rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) count(row_of(all, row), own);
  team.wait();
  const Range part = team.part(size, 16);
  for (int thread = 1; thread < team.size; ++thread)
    for (int64_t i = part.begin; i < part.end; ++i) tables_.get()[i] += tables_.get()[thread * kTable + i];
  team.wait();
}

template <class T>
void EntriesPass<T>::read_distribution(Entries<T>* all) {
  uint32_t* counts = tables_.get();
  for (int64_t place = 0; place < table_; ++place) counts[place] += counts[table_ + place];
  if (all->keep == Keep::kLargest) {
    place_ = place_of(counts, table_, all->count);
    place_.half += place_.half > 0 ? first_ - 1 : 0;
    return;
  }
  const int64_t end = first_ + table_ - 1;
  Distribution of = {counts + 1, first_, std::min(end, kFinite), 0, sizeof(T) == sizeof(Bf16) ? 0.0 : 1.0};
  for (int64_t place = 1; place < table_; ++place) of.entries += counts[place];
  if (all->keep == Keep::kEnergy) {
    all->cut = cut_for_energy(of, all->share);
    return;
  }
  uint32_t threshold = 0;
  if (all->keep == Keep::kNoise) {
    threshold = threshold_for_noise(of, all->share, all->count);
  } else if (all->count < of.entries) {  // one that keeps too few on average, from where it can only fall
    const double upper = 1 + of.error();
    threshold = largest_threshold(of, [&](double sum, double, int64_t others) {
      return limit_of_count(static_cast<double>(all->count), sum * upper, others);
    });
    threshold = std::min(threshold + 0x10000u, static_cast<uint32_t>(kFinite - 1) << 16);
  }
  set_threshold(all, of_bits(threshold));
}

// Lowers the threshold until the probabilities add up to `count`: an entry that comes to be kept for certain leaves the
// others more. Every pass is with fewer entries below the threshold, or the last.
template <class T>
void EntriesPass<T>::lower_threshold(Team team, Entries<T>* all) {
  int64_t* sums = parts_.get();
  int64_t kept = -1;
  for (bool again = all->threshold > 0; again;) {
    const Probability of = probability(*all);
    int64_t certain = 0, sum = 0;
    const Range rows = team.part(all->rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      certain += kernels_.count_keys(row_of(*all, row), outputs_, of.cut - 1).above;
      sum += static_cast<int64_t>(kernels_.sum_probabilities(row_of(*all, row), outputs_, of));
    }
    sums[2 * team.id] = certain, sums[2 * team.id + 1] = sum;
    team.wait();
    certain = sum = 0;  // of all threads, added up by each of them
    for (int thread = 0; thread < team.size; ++thread) certain += sums[2 * thread], sum += sums[2 * thread + 1];
    const double below = static_cast<double>(sum - certain * kOne) / static_cast<double>(kOne);
    again = certain != kept && certain < all->count && below > 0;
    kept = certain;
    const double threshold = all->threshold * below / static_cast<double>(all->count - certain);
    team.wait();
    if (again && team.id == 0) set_threshold(all, static_cast<float>(threshold));
    team.wait();
  }
}

// How many of the largest entries each row keeps.
template <class T>
void EntriesPass<T>::count_rows(Team team, Entries<T>* all) {
  const Range rows = team.part(all->rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const KeyCounts counts = kernels_.count_keys(row_of(*all, row), outputs_, all->cut);
    all->starts[row + 1] = counts.above;
    all->states[row] = static_cast<int32_t>(counts.equal);
  }
  team.wait();
  if (team.id != 0) return;
  for (int64_t row = 0; row < all->rows; ++row) {
    const int64_t equal = std::min<int64_t>(all->states[row], ties_);
    ties_ -= equal;
    all->states[row] = static_cast<int32_t>(equal);
    all->starts[row + 1] += equal + all->starts[row];
  }
}

// How many entries of each row are drawn, and where its sampling starts.
template <class T>
void EntriesPass<T>::sum_rows(Team team, Entries<T>* all) const {
  const Range rows = team.part(all->rows);
  const Probability of = probability(*all);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    all->starts[row + 1] = static_cast<int64_t>(kernels_.sum_probabilities(row_of(*all, row), outputs_, of));
    all->states[row] = static_cast<int32_t>(uniform(all->key, row));
  }
  team.wait();
  if (team.id != 0) return;
  if (all->keep == Keep::kDrawn && all->threshold > 0) share_out(*all);
  for (int64_t row = 0; row < all->rows; ++row)
    all->starts[row + 1] = all->starts[row] + ((all->starts[row + 1] + all->states[row]) >> 24);
}

template <class T>
void EntriesPass<T>::write_row(const Entries<T>& all, int64_t row, T* values, int32_t* indices, uint32_t* scratch) const {
  T* to = values + all.starts[row];
  int32_t* at = indices + all.starts[row];
  if (draws(all))
    kernels_.drawn_entries(row_of(all, row), outputs_, probability(all), rounded(all.threshold, values),
                           static_cast<uint32_t>(all.states[row]), to, at, scratch);
  else
    kernels_.largest_entries(row_of(all, row), outputs_, all.cut, all.states[row], to, at, scratch);
}

// The sums over some rows of what they do not keep.
template <class T>
void EntriesPass<T>::add_left_out(const Entries<T>& all, Range rows, const T* values, const int32_t* indices,
                                  double* sums) const {
  std::fill_n(sums, outputs_, 0.0);
  kernels_.add_columns(row_of(all, rows.begin), all.grad.ld, rows.size(), outputs_, sums, nullptr);
  for (int64_t i = all.starts[rows.begin]; i < all.starts[rows.end]; ++i) sums[indices[i]] -= widened(values[i]);
}

template <class T>
void EntriesPass<T>::write(Team team, const Entries<T>& all, T* values, int32_t* indices, T* left_out) const {
  const int64_t block = rows_per_block(all.rows);
  uint32_t* scratch = candidates_.get() + team.id * (outputs_ + kScratchPad);
  const Range part = team.row_part(all.rows);
  for (int64_t begin = part.begin; begin < part.end; begin += block) {
    const Range rows = {begin, std::min(begin + block, part.end)};
    for (int64_t row = rows.begin; row < rows.end; ++row)
      if (all.starts[row] < all.starts[row + 1]) write_row(all, row, values, indices, scratch);
    if (left_out != nullptr) add_left_out(all, rows, values, indices, sums_.get() + begin / block * outputs_);
  }
  if (left_out == nullptr) return;
  team.wait();
  const Range columns = team.part(outputs_, 16);
  for (int64_t c = columns.begin; c < columns.end; ++c) {  // of all blocks: the same for every number of threads
    double sum = 0;
    for (int64_t begin = 0; begin < all.rows; begin += block) sum += sums_.get()[begin / block * outputs_ + c];
    left_out[c] = rounded(sum / static_cast<double>(std::max<int64_t>(all.rows, 1)), left_out);
  }
}

template <class T>
Status plan_entries(const Kernels& kernels, Entries<T>* entries) {
  const TrimAtEnd trim;
  if (!valid(*entries)) return Status::kBadSize;
  const int threads = team_size(entries->threads, entries->rows * entries->outputs, 0);
  EntriesPass<T> pass(typed<T>(kernels), entries->rows, entries->outputs, false, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.plan(team, entries); });
  return Status::kOk;
}

template <class T>
Status write_entries(const Kernels& kernels, const Entries<T>& entries, T* values, int32_t* indices, T* left_out) {
  const TrimAtEnd trim;
  if (!valid(entries)) return Status::kBadSize;
  const int threads = team_size(entries.threads, entries.rows * entries.outputs, 0);
  const EntriesPass<T> pass(typed<T>(kernels), entries.rows, entries.outputs, left_out != nullptr, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.write(team, entries, values, indices, left_out); });
  return Status::kOk;
}

#define MEPROP_INSTANTIATE(T)                                       \
  template class EntriesPass<T>;                                    \
  template Status plan_entries(const Kernels&, Entries<T>*);        \
  template Status write_entries(const Kernels&, const Entries<T>&, T*, int32_t*, T*);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)

}  // namespace meprop
