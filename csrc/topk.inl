// Exact top-k of rows, for any level. Included inside a level's namespace, after its vector type.
//
// Magnitudes are compared as integers: for non-negative floats, the order of the bits is the order of the values. Per
// row: (1) one pass finds the largest key and the mean magnitude; (2) one pass collects the candidates, those above a
// guess of the k-th largest; (3) bisection on the bits of the few candidates finds the exact cut; (4) what is above
// the cut is written out. The guess only decides how many candidates there are, never the result.

// Magnitude of an entry as an ordered integer. All NaN become one key, just above infinity's.
inline U32 magnitude_key(U32 bits) { return smaller(both(bits, splat(0x7fffffffu)), splat(kNanKey)); }

// Calls visit(first index, keys, mask of the lanes that exist) over one row.
template <class T, class Visit>
inline void for_each_key(const T* row, int64_t width, Visit visit) {
  constexpr uint32_t kAll = (1u << kLanes) - 1;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) visit(i, magnitude_key(load_bits(row + i)), kAll);
  if (i == width) return;
  T tail[kLanes] = {};
  for (int64_t j = i; j < width; ++j) tail[j - i] = row[j];
  visit(i, magnitude_key(load_bits(tail)), (1u << (width - i)) - 1);
}

struct RowScale {
  uint32_t largest_key;
  float mean;
};

template <class T>
inline RowScale row_scale(const T* row, int64_t width) {
  U32 most = splat(0);
  F32 total = zero();
  for_each_key(row, width, [&](int64_t, U32 keys, uint32_t) {
    most = larger(most, keys);
    total = add(total, as_float(keys));
  });
  return {largest_lane(most), sum_lanes(total) / static_cast<float>(width)};
}

struct Candidates {
  uint32_t* keys;
  uint32_t* indices;
  int64_t count;
};

// The entries whose key is `least` or more, by ascending index.
template <class T>
inline void collect(const T* row, int64_t width, uint32_t least, Candidates& found) {
  const U32 below = splat(least - 1);
  int64_t count = 0;
  auto keep = [&](int64_t first, U32 keys, uint32_t mask) {
    compress(found.keys + count, mask, keys);
    count += compress(found.indices + count, mask, counting_from(static_cast<uint32_t>(first)));
  };
  if (least == 0)
    for_each_key(row, width, keep);
  else
    for_each_key(row, width, [&](int64_t first, U32 keys, uint32_t mask) {
      keep(first, keys, mask & is_greater(keys, below));
    });
  store_words(found.keys + count, splat(0));  // so that whole vectors of keys can be read
  found.count = count;
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

// requires: at least k candidates, none above `largest_key`.
inline Cut find_cut(const Candidates& from, int64_t k, uint32_t least, uint32_t largest_key) {
  // Invariant: k or more candidates are `low` or more; fewer than k are above `high`, namely `above`.
  uint32_t low = least, high = largest_key;
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

inline void write_indices(const Candidates& from, Cut cut, int64_t k, int32_t* indices) {
  const U32 key = splat(cut.key);
  int64_t written = 0, ties = cut.ties;
  for (int64_t i = 0; written < k; i += kLanes) {
    const U32 keys = load_words(from.keys + i);
    uint32_t mask = is_greater(keys, key);
    for (uint32_t equal = is_equal(keys, key); equal != 0 && ties > 0; equal &= equal - 1, --ties) mask |= equal & -equal;
    uint32_t kept[kLanes];
    const int64_t count = compress(kept, mask, load_words(from.indices + i));
    for (int64_t j = 0; j < count; ++j) indices[written + j] = static_cast<int32_t>(kept[j]);
    written += count;
  }
}

// The key to start from: `ratio` times the row's mean magnitude, or 0 where that says nothing (zeros, NaN, infinity).
inline uint32_t guess_key(float ratio, RowScale scale) {
  const float guess = ratio * scale.mean;
  if (!(guess > 0) || guess > 3e38f) return 0;
  uint32_t key;
  __builtin_memcpy(&key, &guess, sizeof key);
  return key;
}

template <class T>
void topk_rows(const T* grad, int64_t grad_ld, int64_t row_begin, int64_t row_end, int64_t width, int64_t k, T* values,
               int32_t* indices, uint32_t* scratch) {
  Candidates found{scratch, scratch + width + kScratchPad, 0};
  float ratio = 0;  // of the k-th largest magnitude to the mean: rows of one gradient resemble each other
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* from = grad + row * grad_ld;
    const RowScale scale = row_scale(from, width);
    uint32_t least = guess_key(ratio, scale);
    if (least > scale.largest_key) least = 0;
    collect(from, width, least, found);
    if (found.count < k) collect(from, width, least = guess_key(ratio / 2, scale), found);
    if (found.count < k) collect(from, width, least = 0, found);

    const Cut cut = find_cut(found, k, least, scale.largest_key);
    int32_t* row_indices = indices + row * k;
    write_indices(found, cut, k, row_indices);
    T* row_values = values + row * k;
    for (int64_t j = 0; j < k; ++j) row_values[j] = from[row_indices[j]];

    float kth;
    __builtin_memcpy(&kth, &cut.key, sizeof kth);
    ratio = scale.mean > 0 ? kGuessMargin * kth / scale.mean : 0;
  }
}
