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
  for_vectors(row, width, [&](U32 bits, uint32_t) {
    const U32 halves = down_16(magnitude_key(bits));
    uint32_t counted = is_greater(halves, before);
    if (counted == 0) return;
    store_words(places, minus(halves, before));
    if (counted == kAllLanes)
      for (int lane = 0; lane < kLanes; ++lane) ++counts[places[lane] + (lane & 1) * table];
    else
      for (; counted != 0; counted &= counted - 1) ++counts[places[__builtin_ctz(counted)]];
  });
}

template <class T>
int64_t keys_from(const T* row, int64_t width, uint32_t least, uint32_t* keys) {
  const U32 bound = splat(least);
  int64_t count = 0;
  for_vectors(row, width, [&](U32 bits, uint32_t valid) {
    const U32 all = magnitude_key(bits);
    const uint32_t mask = ~is_greater(bound, all) & valid;
    store_chosen(keys + count, all, mask);
    count += __builtin_popcount(mask);
  });
  return count;
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

// Entries of a row that are kept, in scratch of 2 * (width + kScratchPad) words. No branch depends on which they are.
class Kept {
 public:
  Kept(uint32_t* scratch, int64_t width) : indices_(scratch), bits_(scratch + width + kScratchPad) {}

  void add(U32 at, U32 bits, uint32_t mask) {
    store_chosen(indices_ + count_, at, mask);
    store_chosen(bits_ + count_, bits, mask);
    count_ += __builtin_popcount(mask);
  }

  void write(float* values, int32_t* indices) const {
    __builtin_memcpy(values, bits_, static_cast<size_t>(count_) * sizeof(uint32_t));
    __builtin_memcpy(indices, indices_, static_cast<size_t>(count_) * sizeof(uint32_t));
  }
  void write(Bf16* values, int32_t* indices) const {
    for (int64_t i = 0; i < count_; ++i) values[i].bits = static_cast<uint16_t>(bits_[i] >> 16);
    __builtin_memcpy(indices, indices_, static_cast<size_t>(count_) * sizeof(uint32_t));
  }

 private:
  uint32_t* indices_;
  uint32_t* bits_;
  int64_t count_ = 0;
};

template <class T>
void largest_entries(const T* row, int64_t width, uint32_t cut, int64_t ties, T* values, int32_t* indices,
                     uint32_t* scratch) {
  const U32 key = splat(cut), step = splat(kLanes);
  U32 at = lane_numbers();
  Kept kept(scratch, width);
  for_vectors(row, width, [&](U32 bits, uint32_t valid) {
    const U32 keys = magnitude_key(bits);
    uint32_t mask = is_greater(keys, key);
    if (ties > 0)
      for (uint32_t equal = is_equal(keys, key) & valid; equal != 0 && ties > 0; equal &= equal - 1, --ties)
        mask |= equal & -equal;
    kept.add(at, bits, mask);
    at = plus(at, step);
  });
  kept.write(values, indices);
}

// Calls body(entries) for each group of the row. The last group is filled up with zeros.
template <class T, class Body>
inline void for_groups(const T* row, int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kGroup <= width; i += kGroup) body(row + i);
  if (i == width) return;
  T rest[kGroup] = {};
  __builtin_memcpy(rest, row + i, static_cast<size_t>(width - i) * sizeof(T));
  body(static_cast<const T*>(rest));
}

// Sums of floats are formed for each place in a group, and then of the two halves of the places, of their two halves, and
// so on. Every level does it in this order.
constexpr int kVectors = kGroup / kLanes;
inline double sum_places(F32 (&places)[kVectors]) {
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) places[i] = add(places[i], places[i + half]);
  return static_cast<double>(sum_lanes(places[0]));
}

template <class T>
uint64_t sum_row(const T* row, int64_t width, Probability of, uint32_t* groups, DrawSums* sums) {
  const U32 cut = splat(of.cut), infinity = splat(0x7f800000u), none = splat(0);
  const F32 scale = broadcast(of.scale);
  F32 squares[kVectors], squares_below[kVectors];
  for (int i = 0; i < kVectors; ++i) squares[i] = squares_below[i] = zero();
  U32 certain = none;
  uint64_t total = 0;
  for_groups(row, width, [&](const T* group) {
    U32 probabilities = none;
    for (int i = 0; i < kVectors; ++i) {
      const U32 keys = magnitude_key(load_bits(group + i * kLanes));
      const F32 scaled = multiply(as_float(keys), scale);
      const U32 square = as_bits(multiply(scaled, scaled));
      squares[i] = add(squares[i], as_float(where_less(keys, infinity, square, none)));
      squares_below[i] = add(squares_below[i], as_float(where_less(keys, cut, square, none)));
      certain = plus(certain, where_less(keys, cut, none, splat(1)));
      probabilities = plus(probabilities, where_less(keys, cut, to_integer(scaled), splat(1u << 24)));
    }
    const uint32_t sum = sum_of_lanes(probabilities);
    total += sum;
    if (groups != nullptr) *groups++ = sum;
  });
  sums->probabilities += total;
  sums->certain += sum_of_lanes(certain);
  sums->squares_below += sum_places(squares_below);
  sums->squares += sum_places(squares);
  return total;
}

// The lanes at which a sum reaches the next integer. It is `from` before the lane, and `to` with it.
inline uint32_t reaches_integer(U32 from, U32 to) { return ~is_equal(down_24(to), down_24(from)) & kAllLanes; }

// Writes the numbers of the groups from which an entry is drawn, and the sums before them. Returns how many there are.
inline int64_t drawn_groups(const uint32_t* groups, int64_t count, uint32_t start, uint32_t* numbers, uint32_t* sums) {
  U32 before = splat(start), at = lane_numbers();
  int64_t drawn = 0;
  for_vectors(reinterpret_cast<const float*>(groups), count, [&](U32 own, uint32_t) {
    const U32 to = plus(before, sums_so_far(own)), from = minus(to, own);
    const uint32_t mask = reaches_integer(from, to);
    store_chosen(numbers + drawn, at, mask);
    store_chosen(sums + drawn, from, mask);
    drawn += __builtin_popcount(mask);
    at = plus(at, splat(kLanes));
    before = last_lane(to);
  });
  return drawn;
}

template <class T>
void drawn_entries(const T* row, int64_t width, Probability of, T threshold, uint32_t start, const uint32_t* groups,
                   T* values, int32_t* indices, uint32_t* scratch) {
  const U32 cut = splat(of.cut), sign = splat(0x80000000u), drawn = splat(entry_bits(&threshold));
  const F32 scale = broadcast(of.scale);
  Kept kept(scratch, width);
  uint32_t* numbers = scratch + 2 * (width + kScratchPad);
  uint32_t* sums = numbers + width + kScratchPad;
  const int64_t count = drawn_groups(groups, (width + kGroup - 1) / kGroup, start, numbers, sums);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t begin = int64_t{numbers[i]} * kGroup;
    U32 before = splat(sums[i]), at = plus(splat(static_cast<uint32_t>(begin)), lane_numbers());
    for_groups(row + begin, width - begin < kGroup ? width - begin : kGroup, [&](const T* group) {
      for (int j = 0; j < kVectors; ++j) {
        const U32 bits = load_bits(group + j * kLanes), keys = magnitude_key(bits);
        const U32 own = where_less(keys, cut, to_integer(multiply(as_float(keys), scale)), splat(1u << 24));
        const U32 to = plus(before, sums_so_far(own));
        kept.add(at, where_less(keys, cut, either(drawn, both(bits, sign)), bits), reaches_integer(minus(to, own), to));
        at = plus(at, splat(kLanes));
        before = last_lane(to);
      }
    });
  }
  kept.write(values, indices);
}
