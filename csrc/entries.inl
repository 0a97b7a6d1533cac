// Entries that are kept of a whole matrix, for any level: the largest ones, or drawn ones. Included inside a level's
// namespace, after topk.inl.
//
// The driver (entries.cpp) counts the entries by their keys and finds a cut. It then asks how many entries each row
// keeps, and last for these entries. Each kernel reads one row.

constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);

// Calls body(bits, valid) for each vector of the row. The last vector is filled up with zeros, which are not valid.
template <class T, class Body>
inline void for_vectors(const T* row, int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(load_bits(row + i), kAllLanes);
  if (i == width) return;
  T rest[kLanes] = {};
  __builtin_memcpy(rest, row + i, static_cast<size_t>(width - i) * sizeof(T));
  body(load_bits(rest), (1u << (width - i)) - 1);
}

template <class T>
void widen_range(const T* row, int64_t width, KeyRange* range) {
  U32 before_least = splat(range->least - 1), most = splat(range->most);
  for_vectors(row, width, [&](U32 bits, uint32_t) {
    const U32 keys = magnitude_key(bits);
    before_least = smaller(before_least, minus(keys, splat(1)));  // that of 0 is the largest number
    most = larger(most, keys);
  });
  range->least = ~largest_lane(minus(splat(~0u), before_least)) + 1;
  range->most = largest_lane(most);
}

template <class T>
void count_upper_halves(const T* row, int64_t width, uint32_t first, int64_t table, uint32_t* counts) {
  const U32 before = splat(first - 1);
  uint32_t places[kLanes];
  // Neighbours are counted in two tables, because adding to a count has to wait for the last addition to it.
  for_vectors(row, width, [&](U32 bits, uint32_t valid) {
    const U32 halves = down_16(magnitude_key(bits));
    store_words(places, where_less(before, halves, minus(halves, before), splat(0)));
    if (valid == kAllLanes)
      for (int lane = 0; lane < kLanes; ++lane) ++counts[places[lane] + (lane & 1) * table];
    else
      for (; valid != 0; valid &= valid - 1) ++counts[places[__builtin_ctz(valid)]];
  });
}

template <class T>
void count_lower_halves(const T* row, int64_t width, uint32_t upper, uint32_t* counts) {
  uint32_t keys[kLanes];
  for_vectors(row, width, [&](U32 bits, uint32_t valid) {
    const U32 all = magnitude_key(bits);
    uint32_t wanted = is_equal(down_16(all), splat(upper)) & valid;
    if (wanted == 0) return;
    store_words(keys, all);
    for (; wanted != 0; wanted &= wanted - 1) ++counts[keys[__builtin_ctz(wanted)] & 0xffffu];
  });
}

template <class T>
KeyCounts count_keys(const T* row, int64_t width, uint32_t cut) {
  KeyCounts counts = {0, 0};
  const U32 key = splat(cut);
  for_vectors(row, width, [&](U32 bits, uint32_t valid) {
    const U32 keys = magnitude_key(bits);
    counts.above += __builtin_popcount(is_greater(keys, key));
    counts.equal += __builtin_popcount(is_equal(keys, key) & valid);
  });
  return counts;
}

// Writes the entries whose indices are in scratch.
template <class T, class Value>
inline void write_entries(const T* row, const uint32_t* chosen, int64_t count, T* values, int32_t* indices, Value value) {
  __builtin_memcpy(indices, chosen, static_cast<size_t>(count) * sizeof(int32_t));
  for (int64_t i = 0; i < count; ++i) values[i] = value(row[chosen[i]]);
}

template <class T>
void largest_entries(const T* row, int64_t width, uint32_t cut, int64_t ties, T* values, int32_t* indices,
                     uint32_t* scratch) {
  const U32 key = splat(cut), step = splat(kLanes);
  U32 at = lane_numbers();
  int64_t count = 0;
  for_vectors(row, width, [&](U32 bits, uint32_t valid) {
    const U32 keys = magnitude_key(bits);
    uint32_t mask = is_greater(keys, key);
    if (ties > 0)
      for (uint32_t equal = is_equal(keys, key) & valid; equal != 0 && ties > 0; equal &= equal - 1, --ties)
        mask |= equal & -equal;
    store_chosen(scratch + count, at, mask);
    count += __builtin_popcount(mask);
    at = plus(at, step);
  });
  write_entries(row, scratch, count, values, indices, [](T value) { return value; });
}

// The probability of each entry, in units of 2^-24.
inline U32 probabilities(U32 bits, const Probability& of) {
  const U32 keys = magnitude_key(bits);
  return where_less(keys, splat(of.cut), to_integer(multiply(as_float(keys), broadcast(of.scale))), splat(1u << 24));
}

template <class T>
uint64_t sum_probabilities(const T* row, int64_t width, Probability of) {
  constexpr int64_t kEntries = 128 * kLanes;  // no lane overflows with so many vectors
  uint64_t total = 0;
  for (int64_t begin = 0; begin < width; begin += kEntries) {
    U32 sums = splat(0);
    for_vectors(row + begin, width - begin < kEntries ? width - begin : kEntries,
                [&](U32 bits, uint32_t) { sums = plus(sums, probabilities(bits, of)); });
    uint32_t lanes[kLanes];
    store_words(lanes, sums);
    for (const uint32_t lane : lanes) total += lane;
  }
  return total;
}

inline float with_sign_of(float magnitude, float of) { return __builtin_copysignf(magnitude, of); }
inline Bf16 with_sign_of(Bf16 magnitude, Bf16 of) {
  return {static_cast<uint16_t>(magnitude.bits | (of.bits & 0x8000u))};
}

template <class T>
void drawn_entries(const T* row, int64_t width, Probability of, T threshold, uint32_t start, T* values, int32_t* indices,
                   uint32_t* scratch) {
  const U32 step = splat(kLanes);
  U32 at = lane_numbers(), before = splat(start);
  int64_t count = 0;
  for_vectors(row, width, [&](U32 bits, uint32_t) {
    const U32 own = probabilities(bits, of), to = plus(before, sums_so_far(own)), from = minus(to, own);
    const uint32_t mask = ~is_equal(down_24(to), down_24(from)) & kAllLanes;
    store_chosen(scratch + count, at, mask);
    count += __builtin_popcount(mask);
    at = plus(at, step);
    before = last_lane(to);
  });
  write_entries(row, scratch, count, values, indices, [&](T value) {
    return entry_key(entry_bits(&value)) < of.cut ? with_sign_of(threshold, value) : value;
  });
}
