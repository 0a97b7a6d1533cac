#include "entries.h"

#include <cmath>

#include "selected.h"

namespace meprop {
namespace {

constexpr uint64_t kOne = uint64_t{1} << 24;  // the probability 1
constexpr int64_t kTable = 2 * 0x7f90;  // counts of a thread
constexpr int kPlaceBits = 13;  // a table in which a key is looked for has at most 2^13 places, which fit into L1
static_assert((1 << kPlaceBits) <= kTable);
constexpr int kSampleBits = 16;  // so many of its lower bits are left out where a sample says what a cut may be
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

// More than it takes to double the least threshold up to the largest.
constexpr int64_t kMostSteps = 256;
// Below a threshold where the probabilities vanish, nothing is certain from this part of it on.
constexpr double kLeastStep = 0x1p-24;

float of_upper(int64_t upper) { return of_bits(static_cast<uint32_t>(upper) << 16); }
int64_t upper_of(float value) { return bits_of(value) >> 16; }

// Smaller thresholds might have no inverse.
constexpr int64_t kLeastUpper = (127 - 100) << 7;
const float kLargestThreshold = of_upper(kFinite - 1);

// The least magnitude of an upper half.
double edge(int64_t upper) { return upper < kFinite ? of_bits(static_cast<uint32_t>(upper) << 16) : 0x1p128; }

// How the magnitudes are distributed.
struct Distribution {
  const uint32_t* counts;  // by upper halves, from that of `first` on
  int64_t first, end;      // the upper halves of finite entries that are not zero are in [first, end)
  double width;            // of an upper half: the magnitudes are between its edge and this part of the way to the next

  double bound(int64_t upper) const { return edge(upper) + width * (edge(upper + 1) - edge(upper)); }
};

// The largest key that is left out. The entries above it hold at least so much of the sum of squares.
uint32_t cut_for_energy(const Distribution& of, double share) {
  double left_out = 0, kept = 0;
  for (int64_t upper = of.first; upper < of.end; ++upper)
    left_out += static_cast<double>(of.counts[upper - of.first]) * of.bound(upper) * of.bound(upper);
  for (int64_t upper = of.end - 1; upper >= of.first; --upper) {
    const double entries = of.counts[upper - of.first];
    if (entries == 0) continue;
    kept += entries * edge(upper) * edge(upper);
    left_out -= entries * of.bound(upper) * of.bound(upper);
    if (kept >= share * (kept + std::max(left_out, 0.0))) return (static_cast<uint32_t>(upper) << 16) - 1;
  }
  return 0;
}

// The search for the largest threshold that a budget of noise and a least number of entries allow. Thresholds are
// magnitudes in bfloat16, which the class counts by their upper halves.
//
// The noise and the number of certain entries are known for the thresholds that were tried. The next one is that of
// Newton's method. The noise is a convex function of the threshold, so that the steps come closer from above.
class ThresholdSearch {
 public:
  // `noise` times the sum of squares is the budget. So many entries have to be kept on average.
  ThresholdSearch(double noise, double count) : noise_(noise), count_(count) {}

  // The threshold to try after this one, or this one if it is found. It is found if it uses up one of the limits but for
  // kSlack of it, or if no larger one is allowed. 0: no threshold is allowed. A threshold so large that squares vanish is
  // not allowed.
  float next(float threshold, const DrawSums& sums) {
    const double one = kOne, certain = static_cast<double>(sums.certain);
    const double below = (static_cast<double>(sums.probabilities) - certain * one) / one;  // of the probabilities
    const double added = below - sums.squares_below / (one * one), budget = noise_ * (sums.squares / (one * one));
    const bool allowed = budget > 0 && added <= budget && certain + below >= count_;
    (allowed ? allowed_ : forbidden_) = upper_of(threshold);
    if (allowed && (added >= budget * (1 - kSlack) || certain + below <= count_ * (1 + kSlack))) return threshold;
    if (forbidden_ - allowed_ <= 1) return allowed_ < kLeastUpper ? 0 : of_upper(allowed_);
    const int64_t upper = guess(threshold, certain, below, added, budget);
    return of_upper(std::clamp(upper, allowed_ + 1, forbidden_ - 1));
  }

 private:
  // Where the tangent meets the middle of what is accepted, or the middle of what is left to search.
  int64_t guess(double threshold, double certain, double below, double added, double budget) {
    if (++steps_ > kNewtonSteps || !(budget > 0)) return (allowed_ + forbidden_) / 2;
    const double middle = 1 - kSlack / 2, least = count_ / middle - certain;
    const double by_noise = below > 0 ? threshold * (1 + (budget * middle - added) / below) : HUGE_VAL;
    const double by_count = least > 0 ? threshold * std::max(below / least, kLeastStep) : HUGE_VAL;
    const double found = std::min({by_noise, by_count, kLargestStep * threshold});
    return found < kLargestThreshold ? upper_of(static_cast<float>(std::max(found, 0.0))) : kFinite - 1;
  }

  static constexpr double kSlack = 1.0 / 32;
  static constexpr int kNewtonSteps = 8;
  static constexpr double kLargestStep = 1 << 16;  // squares vanish below a much larger threshold

  double noise_, count_;
  int64_t allowed_ = kLeastUpper - 1, forbidden_ = kFinite;
  int steps_ = 0;
};

// The threshold to try after this one, for which the probabilities shall add up to `count`. The last one had so many
// certain entries. If fewer than `count`, this threshold is not too small but by rounding. It is found then if no entry
// has become certain or uncertain, or if `count` entries are certain. From above, the steps come closer.
float next_for_count(float threshold, const DrawSums& sums, double count, int64_t last_certain) {
  const double one = kOne, certain = static_cast<double>(sums.certain);
  const double below = (static_cast<double>(sums.probabilities) - certain * one) / one;
  const bool not_too_small = last_certain >= 0 && static_cast<double>(last_certain) < count;
  if (not_too_small && (sums.certain == last_certain || certain >= count)) return threshold;
  if (certain == count && below == 0) return threshold;
  if (certain >= count) return std::min(2 * threshold, kLargestThreshold);
  if (below == 0) return static_cast<float>(threshold * kLeastStep);
  const double found = threshold * (below / (count - certain));
  return static_cast<float>(std::min<double>(found, kLargestThreshold));
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

// Without a threshold every entry that is not zero is kept.
template <class T>
void set_threshold(Entries<T>* all, float threshold) {
  const bool draws = upper_of(threshold) >= kLeastUpper;
  all->threshold = draws ? threshold : 0;
  all->cut = draws ? bits_of(threshold) : 1;
}

// Groups of a matrix, from everywhere in it, one after the other. A matrix of few groups is copied whole.
constexpr int64_t kSampled = 256;  // groups, at most twice as many
constexpr int64_t kMostSampled = 2 * kSampled * kGroup;
template <class T>
struct Sample {
  T* entries;  // [kMostSampled]
  int64_t size = 0;   // of all groups, with the zeros that fill them up
  double share = 0;   // of the matrix's entries
  uint32_t most = 0;  // the largest key of a finite entry

  Sample(const Entries<T>& from, T* to) : entries(to) {
    const int64_t in_row = groups_of(from.outputs), all = from.rows * in_row, step = all / kSampled | 1;
    int64_t read = 0;
    for (int64_t group = 0; group < all; group += step, size += kGroup) {
      const int64_t begin = group % in_row * kGroup, count = std::min<int64_t>(kGroup, from.outputs - begin);
      const T* source = from.grad.data + group / in_row * from.grad.ld + begin;
      for (int64_t i = 0; i < kGroup; ++i) entries[size + i] = i < count ? source[i] : T{};
      read += count;
    }
    share = static_cast<double>(read) / static_cast<double>(std::max<int64_t>(from.rows * from.outputs, 1));
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t key = bits_of(widened(entries[i])) & 0x7fffffffu;
      if (key < static_cast<uint32_t>(kFinite) << 16) most = std::max(most, key);
    }
  }
};

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
EntriesPass<T>::EntriesPass(const Kernels& kernels, Keep keep, int64_t rows, int64_t outputs, int sums, int threads)
    : kernels_(typed<T>(kernels)),
      of_keys_(kernels.f32),
      outputs_(outputs),
      tables_(kKeyCounts, threads * kTable),
      keys_(kKeys, keep == Keep::kLargest ? std::max(rows * outputs, kMostSampled) + threads * kScratchPad : 0),
      found_(kFound, threads),
      parts_(kParts, 2 * (kRowBlocks + 1)),
      samples_(kSamples, threads * kMostSampled),
      candidates_(kCandidates, threads * scratch_words()),
      blocks_(std::min(rows / kLeastRowsPerBlock, kRowBlocks) + 1),
      sums_(kLeftOut, sums * blocks_ * outputs) {}

template <class T>
void EntriesPass<T>::plan(Team team, Entries<T>* all) {
  if (team.id == 0) all->starts[0] = 0;
  if (all->keep == Keep::kLargest)
    find_largest(team, all);
  else if (all->keep == Keep::kEnergy)
    find_energy(team, all);
  else
    draw_rows(team, all);
  team.wait();
}

// Looks for the cut among the keys that are not below what a sample says of it.
template <class T>
void EntriesPass<T>::find_largest(Team team, Entries<T>* all) {
  if (team.id == 0) least_ = least_of_sample(*all);
  team.wait();
  Found found = collect_keys(team, *all, least_);
  if (found.keys < all->count) {  // the sample is misleading
    team.wait();
    found = collect_keys(team, *all, 0);
  }
  const uint32_t* keys = keys_of(team, all->rows);
  const int64_t own = found_.get()[team.id].keys;
  const Cut cut = find_cut(team, keys, own, found.range, all->count, 0);
  keep_rows(team, all, cut, [&](int64_t row) {
    const int64_t of_row = all->starts[row + 1];
    keys += of_row;
    return of_keys_.count_keys(as_floats(keys - of_row), of_row, cut.key);
  });
}

// A key that the `count`-th largest one is hardly below. A sample has it, with some entries to spare.
template <class T>
uint32_t EntriesPass<T>::least_of_sample(const Entries<T>& all) {
  const Sample<T> sample(all, samples_.get());
  uint32_t* keys = keys_.get();
  kernels_.keys_from(sample.entries, sample.size, 0, keys);
  KeyRange range = {0, 0};
  of_keys_.widen_range(as_floats(keys), sample.size, &range);
  const double wanted = static_cast<double>(all.count) * sample.share;
  const int64_t count = static_cast<int64_t>(wanted + (sample.share < 1 ? wanted / 4 + 4 * std::sqrt(wanted) + 8 : 0));
  if (count >= sample.size) return 0;
  return find_cut(Team{0, 1}, keys, sample.size, {0, range.most}, count, kSampleBits).key;
}

// Collects the keys that are at least `least`, row after row. Until the cut is known, all.starts[row + 1] is their number
// in the row.
template <class T>
typename EntriesPass<T>::Found EntriesPass<T>::collect_keys(Team team, const Entries<T>& all, uint32_t least) {
  const Range rows = team.part(all.rows);
  uint32_t* keys = keys_of(team, all.rows);
  Found own = {0, {least, least}};
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t of_row = kernels_.keys_from(row_of(all, row), outputs_, least, keys + own.keys);
    of_keys_.widen_range(as_floats(keys + own.keys), of_row, &own.range);
    own.keys += of_row;
    all.starts[row + 1] = of_row;
  }
  found_.get()[team.id] = own;
  team.wait();
  Found found = {0, {least, least}};
  for (int thread = 0; thread < team.size; ++thread) {
    found.keys += found_.get()[thread].keys;
    found.range.most = std::max(found.range.most, found_.get()[thread].range.most);
  }
  return found;
}

// The `wanted` largest of all threads' keys are those above the cut and so many of those equal to it. Keys outside the
// range are not looked at. If `bits_left_out` is above 0, the key found is at most the cut. It differs from it in so many
// of the lower bits only.
template <class T>
typename EntriesPass<T>::Cut EntriesPass<T>::find_cut(Team team, const uint32_t* keys, int64_t size, KeyRange range,
                                                      int64_t wanted, int bits_left_out) {
  uint32_t least = range.least;
  int bits = range.most > least ? 32 - __builtin_clz(range.most - least) : 0;
  while (bits > bits_left_out) {
    const int shift = std::max(bits - kPlaceBits, 0);
    const uint32_t places = 1u << (bits - shift);
    const uint32_t* counts = count(team, places, [&](uint32_t* own) {
      for (int64_t i = 0; i < size; ++i) {
        const uint32_t place = (keys[i] - least) >> shift;
        if (place < places) ++own[place];
      }
    });
    uint32_t place = places - 1;
    for (; place > 0 && counts[place] < wanted; --place) wanted -= counts[place];
    team.wait();
    least += place << shift;
    bits = shift;
  }
  return {least, wanted};
}

// Counts in a table of so many places for each thread, and adds up the tables. The sums are valid until the next call,
// which has to come after a wait.
template <class T>
template <class Count>
uint32_t* EntriesPass<T>::count(Team team, int64_t size, Count count) {
  uint32_t* own = tables_.get() + team.id * kTable;
  std::memset(own, 0, static_cast<size_t>(size) * sizeof(uint32_t));
  count(own);
  team.wait();
  const Range part = team.part(size, 16);
  for (int thread = 1; thread < team.size; ++thread)
    for (int64_t i = part.begin; i < part.end; ++i) tables_.get()[i] += tables_.get()[thread * kTable + i];
  team.wait();
  return tables_.get();
}

// Counts the entries by the upper halves of their keys, for which the tables have places from the least one on.
template <class T>
void EntriesPass<T>::find_energy(Team team, Entries<T>* all) {
  const KeyRange range = find_range(team, *all);
  const uint32_t first = std::max(range.least >> 16, 1u);
  const int64_t table = std::max<int64_t>((range.most >> 16) - int64_t{first} + 2, 2);
  uint32_t* counts = count(team, 2 * table, [&](uint32_t* own) {
    const Range rows = team.part(all->rows);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      kernels_.count_upper_halves(row_of(*all, row), outputs_, first, table, own);
  });
  if (team.id == 0) {
    for (int64_t place = 0; place < table; ++place) counts[place] += counts[table + place];
    const int64_t end = std::min<int64_t>(first + table - 1, kFinite);
    all->cut = cut_for_energy({counts + 1, first, end, sizeof(T) == sizeof(Bf16) ? 0.0 : 1.0}, all->share);
  }
  team.wait();
  keep_rows(team, all, {all->cut, 0}, [&](int64_t row) {
    return kernels_.count_keys(row_of(*all, row), outputs_, all->cut);
  });
}

template <class T>
KeyRange EntriesPass<T>::find_range(Team team, const Entries<T>& all) {
  KeyRange range = {0, 0};
  const Range rows = team.part(all.rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) kernels_.widen_range(row_of(all, row), outputs_, &range);
  found_.get()[team.id].range = range;
  team.wait();
  for (int thread = 0; thread < team.size; ++thread) {
    const KeyRange& other = found_.get()[thread].range;
    range.least = std::min(range.least - 1, other.least - 1) + 1;  // that of 0 is the largest number
    range.most = std::max(range.most, other.most);
  }
  return range;
}

// What a cut makes of the rows. `count` returns how many keys of a row are above it and equal to it.
template <class T>
template <class Count>
void EntriesPass<T>::keep_rows(Team team, Entries<T>* all, Cut cut, Count count) {
  const Range rows = team.part(all->rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const KeyCounts counts = count(row);
    all->starts[row + 1] = counts.above;
    all->states[row] = static_cast<int32_t>(counts.equal);
  }
  team.wait();
  if (team.id != 0) return;
  all->cut = cut.key;
  for (int64_t row = 0; row < all->rows; ++row) {
    const int64_t equal = std::min<int64_t>(all->states[row], cut.ties);
    cut.ties -= equal;
    all->states[row] = static_cast<int32_t>(equal);
    all->starts[row + 1] += equal + all->starts[row];
  }
}

// The threshold that is right for a sample. 0 if the sample has only zeros and what is not finite.
template <class T>
float EntriesPass<T>::first_threshold(Team team, const Entries<T>& all) const {
  const Sample<T> sample(all, samples_.get() + team.id * kMostSampled);
  if (sample.most == 0) return 0;
  const double noise = all.keep == Keep::kNoise ? all.share : HUGE_VAL;
  ThresholdSearch search(noise, static_cast<double>(all.count) * sample.share);
  const float most = of_upper(std::max<int64_t>(sample.most >> 16, kLeastUpper));
  for (float threshold = most;;) {
    DrawSums sums = {};
    const Probability of = {bits_of(threshold), static_cast<float>(kOne) / threshold};
    kernels_.sum_row(sample.entries, sample.size, of, nullptr, &sums);
    const float next = search.next(threshold, sums);
    if (next == 0) return most;
    if (next == threshold) return threshold;
    threshold = next;
  }
}

// Sums up all rows for the threshold. The sums are formed in blocks of rows and then over the blocks. So they do not
// depend on the number of threads. `sums` is for the blocks.
template <class T>
DrawSums EntriesPass<T>::sum_rows(Team team, const Entries<T>& all, DrawSums* sums) const {
  const int64_t block = rows_per_block(all.rows), groups = groups_of(outputs_);
  const Range rows = team.row_part(all.rows);
  const Probability of = probability(all);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    DrawSums* of_block = sums + row / block;
    if (row % block == 0) *of_block = {};
    all.starts[row + 1] =
        static_cast<int64_t>(kernels_.sum_row(row_of(all, row), outputs_, of, all.groups + row * groups, of_block));
  }
  team.wait();
  DrawSums total = {};
  for (int64_t row = 0; row < all.rows; row += block, ++sums) {
    total.probabilities += sums->probabilities;
    total.certain += sums->certain;
    total.squares_below += sums->squares_below;
    total.squares += sums->squares;
  }
  return total;
}

// Finds the threshold, how many entries of each row are drawn, and where its sampling starts.
template <class T>
void EntriesPass<T>::draw_rows(Team team, Entries<T>* all) {
  ThresholdSearch search(all->share, static_cast<double>(all->count));
  Entries<T> own = *all;  // every thread goes the same way
  set_threshold(&own, first_threshold(team, *all));
  if (own.threshold == 0) {
    const uint32_t most = find_range(team, *all).most;
    if (most > 0) set_threshold(&own, of_upper(std::clamp<int64_t>(most >> 16, kLeastUpper, kFinite - 1)));
  }
  int64_t certain = -1;
  // A thread may sum up the next time while another one reads the last sums. So there are two places for them.
  for (int64_t time = 0;; ++time) {
    const DrawSums sums = sum_rows(team, own, parts_.get() + time % 2 * (kRowBlocks + 1));
    if (own.threshold == 0) break;
    const float next = own.keep == Keep::kNoise
                           ? search.next(own.threshold, sums)
                           : next_for_count(own.threshold, sums, static_cast<double>(own.count), certain);
    if (next == own.threshold || time == kMostSteps) break;
    certain = sums.probabilities > static_cast<uint64_t>(sums.certain) * kOne ? sums.certain : -1;
    set_threshold(&own, next);
  }
  const Range rows = team.row_part(all->rows);
  for (int64_t row = rows.begin; row < rows.end; ++row) all->states[row] = static_cast<int32_t>(uniform(all->key, row));
  team.wait();
  if (team.id != 0) return;
  all->threshold = own.threshold, all->cut = own.cut;
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
                           static_cast<uint32_t>(all.states[row]), all.groups + row * groups_of(outputs_), to, at, scratch);
  else
    kernels_.largest_entries(row_of(all, row), outputs_, all.cut, all.states[row], to, at, scratch);
}

// The sums over some rows of the gradient, and of what they do not keep. `columns` may be null.
template <class T>
void EntriesPass<T>::add_up(const Entries<T>& all, Range rows, const T* values, const int32_t* indices, double* left_out,
                            double* columns) const {
  std::fill_n(left_out, outputs_, 0.0);
  kernels_.add_columns(row_of(all, rows.begin), all.grad.ld, rows.size(), outputs_, left_out, nullptr);
  if (columns != nullptr) std::copy_n(left_out, outputs_, columns);
  for (int64_t i = all.starts[rows.begin]; i < all.starts[rows.end]; ++i) left_out[indices[i]] -= widened(values[i]);
}

// Adds up the sums of all blocks of rows, and divides by `parts`. The order is the same for every number of threads.
template <class T>
void EntriesPass<T>::write_sums(Team team, int64_t rows, const double* sums, double parts, T* out) const {
  const int64_t block = rows_per_block(rows);
  const Range columns = team.part(outputs_, 16);
  for (int64_t c = columns.begin; c < columns.end; ++c) {
    double sum = 0;
    for (int64_t begin = 0; begin < rows; begin += block) sum += sums[begin / block * outputs_ + c];
    out[c] = rounded(sum / parts, out);
  }
}

template <class T>
void EntriesPass<T>::write(Team team, const Entries<T>& all, T* values, int32_t* indices, T* left_out,
                           T* column_sums) const {
  const int64_t block = rows_per_block(all.rows);
  uint32_t* scratch = candidates_.get() + team.id * scratch_words();
  double* of_columns = column_sums != nullptr ? sums_.get() + blocks_ * outputs_ : nullptr;
  const Range part = team.row_part(all.rows);
  for (int64_t begin = part.begin; begin < part.end; begin += block) {
    const Range rows = {begin, std::min(begin + block, part.end)};
    for (int64_t row = rows.begin; row < rows.end; ++row)
      if (all.starts[row] < all.starts[row + 1]) write_row(all, row, values, indices, scratch);
    const int64_t at = begin / block * outputs_;
    if (left_out != nullptr)
      add_up(all, rows, values, indices, sums_.get() + at, of_columns != nullptr ? of_columns + at : nullptr);
  }
  if (left_out == nullptr) return;
  team.wait();
  write_sums(team, all.rows, sums_.get(), static_cast<double>(std::max<int64_t>(all.rows, 1)), left_out);
  if (column_sums != nullptr) write_sums(team, all.rows, of_columns, 1, column_sums);
}

template <class T>
Status plan_entries(const Kernels& kernels, Entries<T>* entries) {
  const TrimAtEnd trim;
  if (!valid(*entries)) return Status::kBadSize;
  const int threads = team_size(entries->threads, entries->rows * entries->outputs, 0);
  EntriesPass<T> pass(kernels, entries->keep, entries->rows, entries->outputs, 0, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.plan(team, entries); });
  return Status::kOk;
}

template <class T>
Status write_entries(const Kernels& kernels, const Entries<T>& entries, T* values, int32_t* indices, T* left_out) {
  const TrimAtEnd trim;
  if (!valid(entries)) return Status::kBadSize;
  const int threads = team_size(entries.threads, entries.rows * entries.outputs, 0);
  const EntriesPass<T> pass(kernels, entries.keep, entries.rows, entries.outputs, left_out != nullptr, threads);
  if (!pass) return Status::kNoMemory;
  run_team(threads, [&](Team team) { pass.write(team, entries, values, indices, left_out); });
  return Status::kOk;
}

template <class T>
Status entries_backward(const Kernels& kernels, Entries<T> entries, bool exact_sum, double ceiling,
                        LinearBackward<T> call, int64_t* kept) {
  const TrimAtEnd trim;
  *kept = 0;
  if (!valid(entries)) return Status::kBadSize;
  const int64_t rows = entries.rows, outputs = entries.outputs, all = rows * outputs;
  const int threads = team_size(entries.threads, all, 0);
  const Scratch<int64_t> starts(kEntryStarts, rows + 1);
  const Scratch<int32_t> states(kEntryStates, rows);
  const Scratch<uint32_t> groups(kEntryGroups, draws(entries) ? rows * groups_of(outputs) : 0);
  const Scratch<T> shared(kEntryShared, exact_sum ? outputs : 0);
  EntriesPass<T> pass(kernels, entries.keep, rows, outputs, exact_sum ? 2 : 0, threads);
  if (!starts || !states || !groups || !shared || !pass) return Status::kNoMemory;
  entries.starts = starts.get(), entries.states = states.get(), entries.groups = groups.get();
  run_team(threads, [&](Team team) { pass.plan(team, &entries); });
  *kept = entries.starts[rows];
  if (static_cast<double>(*kept) / static_cast<double>(std::max<int64_t>(all, 1)) > ceiling) return Status::kOk;

  const Scratch<T> values(kEntryValues, *kept);
  const Scratch<int32_t> indices(kEntryIndices, *kept);
  if (!values || !indices) return Status::kNoMemory;
  T* left_out = exact_sum ? shared.get() : nullptr;
  T* column_sums = exact_sum ? call.grad_bias : nullptr;
  run_team(threads, [&](Team team) { pass.write(team, entries, values.get(), indices.get(), left_out, column_sums); });
  call.scope = Scope::kRows, call.select = false, call.k = 0, call.blocks = 1;
  call.rows = rows, call.outputs = outputs, call.grad = entries.grad;
  call.starts = entries.starts, call.entries = *kept, call.values = values.get(), call.indices = indices.get();
  call.shared = left_out;
  call.hits = nullptr, call.weight_rows_only = false, call.threads = entries.threads;
  if (column_sums != nullptr) call.grad_bias = nullptr;  // it is written
  return linear_backward(kernels, call);
}

#define MEPROP_INSTANTIATE(T)                                       \
  template class EntriesPass<T>;                                    \
  template Status plan_entries(const Kernels&, Entries<T>*);        \
  template Status write_entries(const Kernels&, const Entries<T>&, T*, int32_t*, T*); \
  template Status entries_backward(const Kernels&, Entries<T>, bool, double, LinearBackward<T>, int64_t*);
MEPROP_INSTANTIATE(float)
MEPROP_INSTANTIATE(Bf16)

}  // namespace meprop
