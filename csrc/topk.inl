// Exact top-k of rows, for any level. Included inside a level's namespace, after its vector type.
//
// Magnitudes are compared as integers: for non-negative floats, the order of the bits is the order of the values. Per
// row: (1) one pass finds the mean magnitude; (2) one pass collects the candidates, those above a
// guess of the k-th largest; (3) bisection on the bits of the few candidates finds the exact cut; (4) what is above
// the cut is written out. The guess only decides how many candidates there are, never the result.

// Magnitude of an entry as an ordered integer. All NaN become one key, just above infinity's.
inline U32 magnitude_key(U32 bits) { return smaller(both(bits, splat(0x7fffffffu)), splat(kNanKey)); }

// The key of one entry.
inline uint32_t entry_key(uint32_t bits) {
  bits &= 0x7fffffffu;
  return bits < kNanKey ? bits : kNanKey;
}
inline uint32_t entry_bits(const float* entry) {
  uint32_t bits;
  __builtin_memcpy(&bits, entry, sizeof bits);
  return bits;
}
inline uint32_t entry_bits(const Bf16* entry) { return static_cast<uint32_t>(entry->bits) << 16; }

template <class T>
inline float mean_magnitude(const T* row, int64_t width) {
  F32 total[2] = {zero(), zero()};  // two, as an addition takes several cycles
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes)
    for (int j = 0; j < 2; ++j) total[j] = add(total[j], as_float(magnitude_key(load_bits(row + i + j * kLanes))));
  float rest = 0;
  for (; i < width; ++i) {
    const uint32_t key = entry_key(entry_bits(row + i));
    float magnitude;
    __builtin_memcpy(&magnitude, &key, sizeof magnitude);
    rest += magnitude;
  }
  return (sum_lanes(add(total[0], total[1])) + rest) / static_cast<float>(width);
}

struct Candidates {
  uint32_t* keys;
  uint32_t* indices;
  int64_t count;
};

// The entries whose key is `least` or more, by ascending index. No branch depends on which they are: none could be
// foreseen.
template <class T>
inline void collect(const T* row, int64_t width, uint32_t least, Candidates& found) {
  uint32_t* const keys = found.keys;
  uint32_t* const indices = found.indices;
  int64_t count = 0, i = 0;
  if (least > 0) {
    const U32 below = splat(least - 1), step = splat(kLanes);
    U32 at = lane_numbers();
    for (; i + kLanes <= width; i += kLanes, at = plus(at, step)) {
      const uint32_t mask = is_greater(magnitude_key(load_bits(row + i)), below);
      store_chosen(indices + count, at, mask);
      count += __builtin_popcount(mask);
    }
  }
  for (; i < width; ++i) {
    indices[count] = static_cast<uint32_t>(i);
    count += entry_key(entry_bits(row + i)) >= least;
  }
  for (i = 0; i < count; ++i) keys[i] = entry_bits(row + indices[i]);
  store_words(keys + count, splat(0));  // so that whole vectors of keys can be read
  for (i = 0; i < count; i += kLanes) store_words(keys + i, magnitude_key(load_words(keys + i)));
  found.count = count;
}

inline uint32_t largest_key(const Candidates& from) {
  U32 most = splat(0);
  for (int64_t i = 0; i < from.count; i += kLanes) most = larger(most, load_words(from.keys + i));
  return largest_lane(most);
}

inline int64_t count_above(const Candidates& from, U32 key) {
  int64_t count = 0;
  for (int64_t i = 0; i < from.count; i += kLanes) count += __builtin_popcount(is_greater(load_words(from.keys + i), key));
  return count;
}

// Keep every candidate above `key`, and of those equal to it the first `ties`.
struct Cut {
  uint32_t key;
  int64_t ties;
};

// requires: at least k candidates, none below `least`.
inline Cut find_cut(const Candidates& from, int64_t k, uint32_t least) {
  // Invariant: k or more candidates are `low` or more; fewer than k are above `high`, namely `above`.
  uint32_t low = least, high = largest_key(from);
  int64_t above = 0;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    const int64_t count = count_above(from, splat(middle));
    if (count == k) return {middle, 0};
    const bool more = count > k;  // as likely as not: assigned without a branch
    low = more ? middle + 1 : low;
    high = more ? high : middle;
    above = more ? above : count;
  }
  return {low, k - above};
}

// The chosen candidates' indices take the place of the first k candidates', none before it has been read.
inline void write_indices(const Candidates& from, Cut cut, int64_t k, int32_t* indices) {
  const U32 key = splat(cut.key);
  int64_t written = 0, ties = cut.ties;
  for (int64_t i = 0; written < k; i += kLanes) {
    const U32 keys = load_words(from.keys + i);
    uint32_t mask = is_greater(keys, key);
    for (uint32_t equal = is_equal(keys, key); equal != 0 && ties > 0; equal &= equal - 1, --ties) mask |= equal & -equal;
    store_chosen(from.indices + written, load_words(from.indices + i), mask);
    written += __builtin_popcount(mask);
  }
  __builtin_memcpy(indices, from.indices, static_cast<size_t>(k) * sizeof(int32_t));
}

// The key to start from: `ratio` times the row's mean magnitude, or 0 where that says nothing (zeros, NaN, infinity).
inline uint32_t guess_key(float ratio, float mean) {
  const float guess = ratio * mean;
  if (!(guess > 0) || guess > 3e38f) return 0;
  uint32_t key;
  __builtin_memcpy(&key, &guess, sizeof key);
  return key;
}

template <class T>
void topk_rows(const T* grad, int64_t grad_ld, int64_t row_begin, int64_t row_end, int64_t width, int64_t k, T* values,
               int32_t* indices, uint32_t* scratch) {
  Candidates found{scratch, scratch + width + kScratchPad, 0};
  // Of the k-th largest magnitude to the mean. Rows of one gradient resemble each other, so each row's serves the next;
  // the first has to do with a little less than a normal distribution's.
  float ratio = 0.7f * __builtin_sqrtf(2 * __builtin_logf(static_cast<float>(width) / static_cast<float>(k)));
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* from = grad + row * grad_ld;
    const float mean = mean_magnitude(from, width);
    uint32_t least = guess_key(ratio, mean);
    collect(from, width, least, found);
    if (found.count < k) collect(from, width, least = guess_key(ratio / 2, mean), found);
    if (found.count < k) collect(from, width, least = 0, found);

    const Cut cut = find_cut(found, k, least);
    int32_t* row_indices = indices + row * k;
    write_indices(found, cut, k, row_indices);
    T* row_values = values + row * k;
    for (int64_t j = 0; j < k; ++j) row_values[j] = from[row_indices[j]];

    float kth;
    __builtin_memcpy(&kth, &cut.key, sizeof kth);
    ratio = mean > 0 ? kGuessMargin * kth / mean : 0;
  }
}
