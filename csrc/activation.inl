// Activations with dropout, for any level. Included inside a level's namespace, after lstm.inl.

inline void store_line(float* to, F32 a) { store_words(to, as_bits(a)); }
inline void store_line(Bf16* to, F32 a) { store_uppers(to, rounded_to_bf16(a)); }

// The random bits of a block of kBitBlock entries: whether each one is kept.
inline uint64_t draw(const Dropout& of, uint64_t block) {
  const Words m0 = words(0xd2511f53u), m1 = words(0xcd9e8d57u);
  uint64_t kept = 0;
  for (int lane = 0; lane < kBitBlock / 8; lane += kWords) {
    Words c0 = lower_words(block * (kBitBlock / 8) + static_cast<uint64_t>(lane));
    Words c1 = upper_words(c0), c2 = words(0), c3 = words(0);
    uint32_t k0 = static_cast<uint32_t>(of.key), k1 = static_cast<uint32_t>(of.key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
      const Words a = product_of_words(m0, c0), b = product_of_words(m1, c2);  // reads lower halves only
      c0 = differences(upper_words(b), c1, words(k0));
      c2 = differences(upper_words(a), c3, words(k1));
      c1 = b, c3 = a;
    }
    kept |= halves_at_least(of.dropped, c0, c1, c2, c3) << (4 * lane);
  }
  return kept;
}

inline F32 power_of_e(F32 x) {
  const Exponential e = exponential(x);
  return multiply_add(e.power, e.more, e.power);
}

// The standard normal distribution: how much of it is below x, and e^(-x^2 / 2). By formula 7.1.26 of Abramowitz and
// Stegun, whose error is below 1e-7.
struct Normal {
  F32 below, bell;
};
inline Normal normal(F32 x) {
  const F32 half = broadcast(0.5f), one = broadcast(1);
  const U32 sign = both(as_bits(x), splat(0x80000000u));
  const F32 size = as_float(both(as_bits(x), splat(0x7fffffffu)));
  const F32 t = divide(one, multiply_add(size, broadcast(0.3275911f * 0.70710678f), one));
  constexpr float kSeries[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  F32 series = broadcast(1.061405429f);
  for (const float coefficient : kSeries) series = multiply_add(series, t, broadcast(coefficient));
  const F32 bell = power_of_e(multiply(multiply(x, x), broadcast(-0.5f)));
  const F32 inside = subtract(half, multiply(multiply(series, t), multiply(half, bell)));  // from 0 to |x|
  return {add(half, as_float(either(as_bits(inside), sign))), bell};
}

// gelu_tanh(x) = x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kTwiceRoot = 1.59576912f, kCubed = 1.59576912f * 0.044715f;

template <Activation kKind>
inline F32 activated(F32 x) {
  if (kKind == Activation::kRelu) return rectified(x);
  if (kKind == Activation::kTanh) return hyperbolic_tangent(x);
  if (kKind == Activation::kGelu) return multiply(x, normal(x).below);
  if (kKind == Activation::kGeluTanh) {
    const F32 rate = multiply_add(multiply(x, x), broadcast(kCubed), broadcast(kTwiceRoot));
    return multiply(x, sigmoid(multiply(x, rate)));
  }
  return x;
}

// The derivatives. That of ReLU is in the bits.
template <Activation kKind>
inline F32 slope(F32 x) {
  if (kKind == Activation::kTanh) return tangent_slope(hyperbolic_tangent(x));
  if (kKind == Activation::kGelu) {
    const Normal of_x = normal(x);
    return multiply_add(multiply(x, broadcast(0.39894228f)), of_x.bell, of_x.below);
  }
  const F32 square = clamp(multiply(x, x), 0, 1e4f);  // beyond it the rate would outgrow `rest`, which is never 0
  const F32 u = multiply(x, multiply_add(square, broadcast(kCubed), broadcast(kTwiceRoot)));
  const F32 of_u = power_of_e(subtract(zero(), u));
  const F32 s = divide(broadcast(1), add(broadcast(1), of_u)), rest = multiply(of_u, s);  // 1 - s would be less exact
  const F32 rate = multiply_add(square, broadcast(3 * kCubed), broadcast(kTwiceRoot));
  return multiply_add(multiply(x, multiply(s, rest)), rate, s);
}

inline uint32_t lanes_at(uint64_t bits, int at) { return static_cast<uint32_t>(bits >> at) & ((1u << kLanes) - 1); }

template <Activation kKind, class T>
inline uint64_t drop_block(uint64_t kept, F32 scale, const T* x, T* y) {
  uint64_t passed = 0;
  for (int at = 0; at < kBitBlock; at += kLanes) {
    const F32 a = as_float(load_bits(x + at));
    store_line(y + at, multiply(activated<kKind>(a), chosen(lanes_at(kept, at), scale)));
    if (kKind == Activation::kRelu) passed |= static_cast<uint64_t>(is_above_zero_or_nan(a)) << at;
  }
  return kKind == Activation::kRelu ? kept & passed : kept;
}

template <Activation kKind, class T>
inline void drop_block_gradient(uint64_t bits, F32 scale, const T* grad, const T* x, T* grad_x) {
  for (int at = 0; at < kBitBlock; at += kLanes) {
    const F32 g = as_float(load_bits(grad + at));
    F32 result;
    if (kKind == Activation::kRelu) {
      result = chosen(lanes_at(bits, at), multiply(g, scale));
    } else {
      result = multiply(g, chosen(lanes_at(bits, at), scale));
      if (kKind != Activation::kIdentity) result = multiply(result, slope<kKind>(as_float(load_bits(x + at))));
    }
    store_line(grad_x + at, result);
  }
}

// A block of which only some entries are in memory: the rest are zeros.
template <class T>
struct Padded {
  T all[kBitBlock] = {};
  Padded() = default;
  Padded(const T* from, int64_t count) {
    if (from != nullptr) __builtin_memcpy(all, from, static_cast<size_t>(count) * sizeof(T));
  }
};

template <Activation kKind, class T>
inline void drop_kind(const Dropout& of, const T* x, int64_t begin, int64_t end, T* y, uint64_t* bits) {
  const F32 scale = broadcast(of.scale);
  int64_t at = begin;
  for (; at + kBitBlock <= end; at += kBitBlock) {
    const int64_t block = at / kBitBlock;
    bits[block] = drop_block<kKind>(draw(of, static_cast<uint64_t>(block)), scale, x + at, y + at);
  }
  if (at == end) return;
  const Padded<T> rest(x + at, end - at);
  Padded<T> result;
  const uint64_t kept = draw(of, static_cast<uint64_t>(at / kBitBlock)) & ((uint64_t{1} << (end - at)) - 1);
  bits[at / kBitBlock] = drop_block<kKind>(kept, scale, rest.all, result.all);
  __builtin_memcpy(y + at, result.all, static_cast<size_t>(end - at) * sizeof(T));
}

template <Activation kKind, class T>
inline void drop_kind_gradient(const Dropout& of, const T* grad, const T* x, const uint64_t* bits, int64_t begin,
                               int64_t end, T* grad_x) {
  const F32 scale = broadcast(of.scale);
  int64_t at = begin;
  for (; at + kBitBlock <= end; at += kBitBlock) {
    const T* of_block = x != nullptr ? x + at : nullptr;
    drop_block_gradient<kKind>(bits[at / kBitBlock], scale, grad + at, of_block, grad_x + at);
  }
  if (at == end) return;
  const Padded<T> rest(grad + at, end - at), rest_of_x(x != nullptr ? x + at : nullptr, end - at);
  Padded<T> result;
  drop_block_gradient<kKind>(bits[at / kBitBlock], scale, rest.all, rest_of_x.all, result.all);
  __builtin_memcpy(grad_x + at, result.all, static_cast<size_t>(end - at) * sizeof(T));
}

template <class T>
inline void drop(const Dropout& of, const T* x, int64_t begin, int64_t end, T* y, uint64_t* bits) {
  switch (of.activation) {
    case Activation::kIdentity: return drop_kind<Activation::kIdentity>(of, x, begin, end, y, bits);
    case Activation::kRelu: return drop_kind<Activation::kRelu>(of, x, begin, end, y, bits);
    case Activation::kGelu: return drop_kind<Activation::kGelu>(of, x, begin, end, y, bits);
    case Activation::kGeluTanh: return drop_kind<Activation::kGeluTanh>(of, x, begin, end, y, bits);
    case Activation::kTanh: return drop_kind<Activation::kTanh>(of, x, begin, end, y, bits);
  }
}

template <class T>
inline void drop_gradient(const Dropout& of, const T* grad, const T* x, const uint64_t* bits, int64_t begin, int64_t end,
                          T* grad_x) {
  switch (of.activation) {
    case Activation::kIdentity:
      return drop_kind_gradient<Activation::kIdentity>(of, grad, x, bits, begin, end, grad_x);
    case Activation::kRelu: return drop_kind_gradient<Activation::kRelu>(of, grad, x, bits, begin, end, grad_x);
    case Activation::kGelu: return drop_kind_gradient<Activation::kGelu>(of, grad, x, bits, begin, end, grad_x);
    case Activation::kGeluTanh: return drop_kind_gradient<Activation::kGeluTanh>(of, grad, x, bits, begin, end, grad_x);
    case Activation::kTanh: return drop_kind_gradient<Activation::kTanh>(of, grad, x, bits, begin, end, grad_x);
  }
}
