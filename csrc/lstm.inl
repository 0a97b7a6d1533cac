// The cells of an LSTM, for any level. Included inside a level's namespace, after products.inl.

constexpr int kBlock = kLanes;  // units of a block: its four gates are the four lines of a panel
static_assert(kPanelLines == 4, "a panel holds the four gates of a block");

// `count` entries, the others zero; and back.
template <class T>
inline F32 load_some(const T* from, int64_t count) {
  if (count >= kLanes) return as_float(load_bits(from));
  T all[kLanes] = {};
  __builtin_memcpy(all, from, static_cast<size_t>(count) * sizeof(T));
  return as_float(load_bits(all));
}
inline void store_some(float* to, F32 a, int64_t count) {
  if (count >= kLanes) return store_words(to, as_bits(a));
  float all[kLanes];
  store_words(all, as_bits(a));
  __builtin_memcpy(to, all, static_cast<size_t>(count) * sizeof(float));
}
inline F32 load_or_zero(const float* from, int64_t at, int64_t count) {
  return from != nullptr ? load_some(from + at, count) : zero();
}

// e^x = power * (1 + more), to a few units in the last place. x = n ln 2 + r with a whole n and |r| <= ln 2 / 2; then
// power = 2^n, and more = e^r - 1 by its Taylor series.
struct Exponential {
  F32 power, more;
};
inline Exponential exponential(F32 x) {
  const F32 whole = broadcast(0x1.8p23f);  // adding it rounds, and leaves n in the low bits
  const F32 clamped = clamp(x, -87, 88);
  const F32 shifted = multiply_add(clamped, broadcast(1.44269504f), whole);
  const F32 n = subtract(shifted, whole);
  F32 r = multiply_add(n, broadcast(-0x1.62ep-1f), clamped);  // ln 2 in two parts: n times the first is exact
  r = multiply_add(n, broadcast(-0x1.0bfbe8p-15f), r);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f};
  F32 series = broadcast(1.0f / 5040);
  for (const float coefficient : kTaylor) series = multiply_add(series, r, broadcast(coefficient));
  const F32 power = as_float(plus(up_23(as_bits(shifted)), as_bits(broadcast(1))));  // n into the exponent of 1
  return {power, multiply(series, r)};  // r is NaN where x is
}
// e^x - 1, to a few units in the last place, near 0 too.
inline F32 exp_less_one(F32 x) {
  const Exponential e = exponential(x);
  return multiply_add(e.power, e.more, subtract(e.power, broadcast(1)));
}
inline F32 sigmoid(F32 x) { return divide(broadcast(1), add(exp_less_one(subtract(zero(), x)), broadcast(2))); }
inline F32 hyperbolic_tangent(F32 x) {
  const F32 e = exp_less_one(add(x, x));
  return divide(e, add(e, broadcast(2)));
}

// Four entries, as bits.
using FourWords = uint32_t __attribute__((vector_size(16), aligned(4), may_alias));
using FourHalves = uint16_t __attribute__((vector_size(8), aligned(2), may_alias));
inline FourWords* four_of(float* entries) { return reinterpret_cast<FourWords*>(entries); }
inline FourHalves* four_of(Bf16* entries) { return reinterpret_cast<FourHalves*>(entries); }
inline const FourWords* four_of(const float* entries) { return reinterpret_cast<const FourWords*>(entries); }
inline const FourHalves* four_of(const Bf16* entries) { return reinterpret_cast<const FourHalves*>(entries); }

template <class W>
void pack_block(const W* weight, int64_t weight_ld, int64_t gate_stride, int64_t units, int64_t depth, W* packed) {
  constexpr int64_t kColumns = 4 * kBlock;
  constexpr int64_t kDepth = 16;  // of the weight's rows at a time, so that what is written stays in L1
  const auto row_of = [=](int64_t column) {
    return weight + (column / kBlock * gate_stride + column % kBlock) * weight_ld;
  };
  for (int64_t first = 0; first < depth; first += kDepth) {
    const int64_t end = first + kDepth < depth ? first + kDepth : depth;
    for (int64_t column = 0; column < kColumns; column += 4) {
      W* to = packed + column;
      int64_t d = first;
      if (column % kBlock + 4 <= units && kBlock >= 4) {  // four units of a gate
        const W* row = row_of(column);
        for (int i = 0; i < 4; ++i) __builtin_prefetch(row + i * weight_ld + 4 * kDepth + first);
        for (; d + 4 <= end; d += 4) {  // four by four, transposed
          const auto load = [=](int64_t i) { return *four_of(row + i * weight_ld + d); };
          const auto r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
          const auto low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
          const auto low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
          const auto high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
          const auto high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
          const auto store = [=](int64_t i, auto four) { *four_of(to + (d + i) * kColumns) = four; };
          store(0, __builtin_shufflevector(low01, low23, 0, 1, 4, 5));
          store(1, __builtin_shufflevector(low01, low23, 2, 3, 6, 7));
          store(2, __builtin_shufflevector(high01, high23, 0, 1, 4, 5));
          store(3, __builtin_shufflevector(high01, high23, 2, 3, 6, 7));
        }
      }
      for (; d < end; ++d)
        for (int64_t i = 0; i < 4; ++i)
          to[d * kColumns + i] = (column + i) % kBlock < units ? row_of(column + i)[d] : W{};
    }
  }
}

template <class W>
void dot_block(const W* weight, int64_t weight_ld, int64_t gate_stride, int64_t units, const float* x, int64_t depth,
               float* sums) {
  for (int64_t unit = 0; unit < units; ++unit) {
    F32 totals[4] = {zero(), zero(), zero(), zero()};
    const W* row = weight + unit * weight_ld;
    for (int64_t d = 0; d < depth; d += kLanes) {
      const F32 factor = load_some(x + d, depth - d);
      for (int gate = 0; gate < 4; ++gate) {
        const W* from = row + gate * gate_stride * weight_ld + d;
        totals[gate] = multiply_add(factor, load_some(from, depth - d), totals[gate]);
      }
    }
    for (int gate = 0; gate < 4; ++gate) sums[gate * kBlock + unit] = sum_lanes(totals[gate]);
  }
}

inline void spread_gates(const float* sums, const float* bias, int64_t rows, int64_t units, int64_t gate_stride,
                         float* gates) {
  for (int gate = 0; gate < 4; ++gate) {
    const F32 added = load_or_zero(bias, gate * gate_stride, units);
    for (int64_t row = 0; row < rows; ++row) {
      const F32 sum = as_float(load_words(sums + (4 * row + gate) * kBlock));
      store_some(gates + (4 * row + gate) * gate_stride, add(sum, added), units);
    }
  }
}

// To be written soon. A block's units mostly lie in two cache lines.
inline void prefetch_units(const float* from, int64_t units) {
  __builtin_prefetch(from, 1);
  __builtin_prefetch(from + units - 1, 1);
}

inline void step_cells(const float* sums, int64_t rows, int64_t units, int64_t gate_stride, float* gates,
                       const float* earlier, float* cells, float* output) {
  constexpr int kAhead = 3;  // rows: stores wait for their lines one after the other
  for (int64_t row = 0; row < rows; ++row, gates += 4 * gate_stride, cells += gate_stride, output += gate_stride) {
    F32 gate[4];
    if (row + kAhead < rows) {
      for (int i = 0; i < 4; ++i) prefetch_units(gates + (4 * kAhead + i) * gate_stride, units);
      prefetch_units(cells + kAhead * gate_stride, units);
      prefetch_units(output + kAhead * gate_stride, units);
    }
    for (int i = 0; i < 4; ++i) {
      gate[i] = load_some(gates + i * gate_stride, units);
      if (sums != nullptr) gate[i] = add(gate[i], as_float(load_words(sums + (4 * row + i) * kBlock)));
      gate[i] = i == 2 ? hyperbolic_tangent(gate[i]) : sigmoid(gate[i]);
      store_some(gates + i * gate_stride, gate[i], units);
    }
    const F32 before = load_some(earlier + row * gate_stride, units);
    const F32 cell = multiply_add(gate[1], before, multiply(gate[0], gate[2]));
    store_some(cells, cell, units);
    store_some(output, multiply(gate[3], hyperbolic_tangent(cell)), units);
  }
}

// The derivatives of activations, from their results: of a sigmoid s (1 - s), of a hyperbolic tangent 1 - t^2.
inline F32 sigmoid_slope(F32 s) { return multiply(s, subtract(broadcast(1), s)); }
inline F32 tangent_slope(F32 t) { return multiply(add(broadcast(1), t), subtract(broadcast(1), t)); }

inline void step_cells_gradient(int64_t units, const float* gates, const float* cells, const float* earlier,
                                const float* grad_output, const float* grad_carried, float* grad_cells,
                                float* gate_gradients, float* gate_sums) {
  for (int64_t at = 0; at < units; at += kLanes) {
    const int64_t count = units - at;
    // The next row's: it comes from far, and a row is too short for the processor to see that it will be read.
    for (int i = 4; i < 8; ++i) __builtin_prefetch(gates + i * units + at);
    __builtin_prefetch(cells + units + at);
    if (grad_output != nullptr) __builtin_prefetch(grad_output + units + at);
    const F32 in = load_some(gates + at, count), forget = load_some(gates + units + at, count);
    const F32 candidate = load_some(gates + 2 * units + at, count), out = load_some(gates + 3 * units + at, count);
    const F32 tangent = hyperbolic_tangent(load_some(cells + at, count));
    const F32 grad = add(load_or_zero(grad_output, at, count), load_some(grad_carried + at, count));
    const F32 grad_cell =
        multiply_add(multiply(grad, out), tangent_slope(tangent), load_some(grad_cells + at, count));
    const F32 of_gates[4] = {
        multiply(multiply(grad_cell, candidate), sigmoid_slope(in)),
        multiply(multiply(grad_cell, load_some(earlier + at, count)), sigmoid_slope(forget)),
        multiply(multiply(grad_cell, in), tangent_slope(candidate)),
        multiply(multiply(grad, tangent), sigmoid_slope(out)),
    };
    for (int i = 0; i < 4; ++i) {
      store_some(gate_gradients + i * units + at, of_gates[i], count);
      if (gate_sums == nullptr) continue;
      float* sums = gate_sums + i * units + at;
      store_some(sums, add(load_some(sums, count), of_gates[i]), count);
    }
    store_some(grad_cells + at, multiply(grad_cell, forget), count);
  }
}
