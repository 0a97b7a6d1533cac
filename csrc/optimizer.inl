// Optimizers' updates of one row of a parameter, for any level. Included inside a level's namespace, after lstm.inl.
//
// Every level rounds alike: no multiply-add is fused here, as torch's own optimizers do not rely on one either.

inline F32 load_some(const Bf16* from, int64_t count) {
  if (count >= kLanes) return as_float(load_bits(from));
  Bf16 all[kLanes] = {};
  __builtin_memcpy(all, from, static_cast<size_t>(count) * sizeof(Bf16));
  return as_float(load_bits(all));
}

inline void store_uppers_of_some(Bf16* to, U32 bits, int64_t count) {
  if (count >= kLanes) return store_uppers(to, bits);
  Bf16 all[kLanes];
  store_uppers(all, bits);
  __builtin_memcpy(to, all, static_cast<size_t>(count) * sizeof(Bf16));
}

// Stores `count` entries of a state. Those of bfloat16 are rounded with random numbers below 2^16. A NaN stays one. Beyond
// the largest number of bfloat16 entries are rounded down, as up is infinity.
inline void keep_some(float* to, F32 a, U32, int64_t count) { store_some(to, a, count); }
inline void keep_some(Bf16* to, F32 a, U32 random, int64_t count) {
  const U32 magnitude = both(as_bits(a), splat(0x7fffffffu));
  const U32 up = where_less(magnitude, splat(0x7f7f0000u), random, splat(0));
  store_uppers_of_some(to, where_nan(a, splat(0x7fc00000u), plus(as_bits(a), up)), count);
}

// The random numbers for the first and the second state of an entry.
inline U32 for_first(U32 random) { return both(random, splat(0xffffu)); }
inline U32 for_second(U32 random) { return down_16(random); }

// Random words for the entries from `first` on: numbers that are mixed with both words of a key. It is the last mixing of
// MurmurHash3 (Appleby), with the second word added in the middle. Philox would take longer than the rest of a step.
inline U32 mixed(int64_t first, uint64_t key) {
  const auto folded = [](U32 a) { return differing(a, down_16(a)); };
  const U32 entries = plus(splat(static_cast<uint32_t>(first)), lane_numbers());
  U32 a = folded(differing(entries, splat(static_cast<uint32_t>(key))));
  a = plus(times(a, splat(0x85ebca6bu)), splat(static_cast<uint32_t>(key >> 32)));
  a = times(differing(a, down_13(a)), splat(0xc2b2ae35u));
  return folded(a);
}

// The same for states of bfloat16. Those of float need no random numbers.
template <class S>
inline U32 random_words(const Rounding& rounding, int64_t at) {
  return sizeof(S) == sizeof(Bf16) ? mixed(rounding.place + at, rounding.key) : splat(0);
}

// Calls update(g, w, place, count), which returns the new w, for each vector of the row. The copy, if there is one, gets
// it rounded to the nearest. Whole vectors have a constant count, so that nothing is asked for each of them.
template <class Update>
inline void update_row(int64_t width, float l2, const float* grad, float* weight, Bf16* copy, Update update) {
  const F32 decay = broadcast(l2);
  const auto update_some = [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    F32 w = load_some(weight + at, count);
    F32 g = load_or_zero(grad, at, count);
    if (l2 != 0) g = add(g, multiply(decay, w));
    w = update(g, w, at, count);
    store_some(weight + at, w, count);
    if (copy != nullptr) store_uppers_of_some(copy + at, rounded_to_bf16(w), count);
  };
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) update_some(at, kLanes);
  if (at < width) update_some(at, width - at);
}

template <class S>
inline void sgd_row(const SgdStep& step, const Rounding& rounding, int64_t width, const float* grad, float* weight,
                    Bf16* copy, S* buffer) {
  const F32 lr = broadcast(step.lr), momentum = broadcast(step.momentum);
  const F32 keep = broadcast(step.keep), fresh = broadcast(step.add);
  const auto update = [=](F32 g, F32 w, int64_t at, int64_t count) __attribute__((always_inline)) {
    if (buffer != nullptr) {
      const F32 sum = add(multiply(keep, load_some(buffer + at, count)), multiply(fresh, g));
      keep_some(buffer + at, sum, for_first(random_words<S>(rounding, at)), count);
      g = step.nesterov ? add(g, multiply(momentum, sum)) : sum;
    }
    return subtract(w, multiply(lr, g));
  };
  update_row(width, step.l2, grad, weight, copy, update);
}

template <class S>
inline void adam_row(const AdamStep& step, const Rounding& rounding, int64_t width, const float* grad, float* weight,
                     Bf16* copy, S* first, S* second) {
  const F32 shrink = broadcast(step.shrink), size = broadcast(step.step_size);
  const F32 keep_first = broadcast(step.keep_first), new_first = broadcast(step.first);
  const F32 keep_second = broadcast(step.keep_second), new_second = broadcast(step.second);
  const F32 root_scale = broadcast(step.root_scale), eps = broadcast(step.eps);
  const auto update = [=](F32 g, F32 w, int64_t at, int64_t count) __attribute__((always_inline)) {
    const U32 random = random_words<S>(rounding, at);
    const F32 mean = add(multiply(keep_first, load_some(first + at, count)), multiply(new_first, g));
    const F32 square = add(multiply(keep_second, load_some(second + at, count)), multiply(multiply(new_second, g), g));
    keep_some(first + at, mean, for_first(random), count);
    keep_some(second + at, square, for_second(random), count);
    const F32 root = add(multiply(root_scale, square_root(square)), eps);
    return subtract(multiply(shrink, w), multiply(size, divide(mean, root)));
  };
  update_row(width, step.l2, grad, weight, copy, update);
}

template <class S>
inline void adagrad_row(const AdagradStep& step, const Rounding& rounding, int64_t width, const float* grad,
                        float* weight, Bf16* copy, S* sum) {
  const F32 lr = broadcast(step.lr), eps = broadcast(step.eps);
  const auto update = [=](F32 g, F32 w, int64_t at, int64_t count) __attribute__((always_inline)) {
    const F32 squares = add(load_some(sum + at, count), multiply(g, g));
    keep_some(sum + at, squares, for_first(random_words<S>(rounding, at)), count);
    return subtract(w, multiply(lr, divide(g, add(square_root(squares), eps))));
  };
  update_row(width, step.l2, grad, weight, copy, update);
}
