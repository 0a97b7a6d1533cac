// Vectors of one lane. They are the literal twin of every vector variant, and the only level off x86.

constexpr int kLanes = 1;
constexpr int kSumRegisters = 8;  // the number of vectors of sums that a product keeps at once
using U32 = uint32_t;
using F32 = float;

inline U32 splat(uint32_t value) { return value; }
inline U32 smaller(U32 a, U32 b) { return a < b ? a : b; }
inline U32 larger(U32 a, U32 b) { return a > b ? a : b; }
inline U32 both(U32 a, U32 b) { return a & b; }
inline uint32_t is_greater(U32 a, U32 b) { return a > b; }
inline uint32_t is_equal(U32 a, U32 b) { return a == b; }
inline uint32_t largest_lane(U32 a) { return a; }

inline U32 load_bits(const float* from) {
  U32 bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return bits;
}
inline U32 load_bits(const Bf16* from) { return static_cast<U32>(from->bits) << 16; }

inline U32 load_words(const void* from) {
  U32 words;
  __builtin_memcpy(&words, from, sizeof words);
  return words;
}
inline void store_words(void* to, U32 a) { __builtin_memcpy(to, &a, sizeof a); }
// Stores the lanes whose bit is set one after the other. The rest of a whole vector gets arbitrary values.
inline void store_chosen(void* to, U32 a, uint32_t) { store_words(to, a); }
inline U32 lane_numbers() { return 0; }
inline U32 plus(U32 a, U32 b) { return a + b; }
inline U32 either(U32 a, U32 b) { return a | b; }
inline U32 up_16(U32 a) { return a << 16; }
inline U32 up_23(U32 a) { return a << 23; }
inline U32 down_16(U32 a) { return a >> 16; }
inline U32 down_24(U32 a) { return a >> 24; }
inline U32 minus(U32 a, U32 b) { return a - b; }
inline U32 last_lane(U32 a) { return a; }
inline uint32_t sum_of_lanes(U32 a) { return a; }
// Each lane plus all lanes before it.
inline U32 sums_so_far(U32 a) { return a; }
// `then` where a < b, else `otherwise`.
inline U32 where_less(U32 a, U32 b, U32 then, U32 otherwise) { return a < b ? then : otherwise; }

inline F32 zero() { return 0; }
inline F32 in_register(F32 a) { return a; }
inline F32 broadcast(float value) { return value; }
inline F32 as_float(U32 bits) {
  F32 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline U32 as_bits(F32 a) { return load_words(&a); }
// To the nearest integer, ties to even. What no integer can express becomes 0.
inline U32 to_integer(F32 a) { return a < 2147483648.0f ? static_cast<U32>(__builtin_lrintf(a)) : 0; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 subtract(F32 a, F32 b) { return a - b; }
inline F32 multiply(F32 a, F32 b) { return a * b; }
inline F32 divide(F32 a, F32 b) { return a / b; }
inline F32 square_root(F32 a) { return __builtin_sqrtf(a); }
// Clamps to the bounds. NaN stays NaN.
inline F32 clamp(F32 a, float low, float high) { return a < low ? low : a > high ? high : a; }
inline F32 multiply_add(F32 a, F32 b, F32 c) { return a * b + c; }
inline U32 where_nan(F32 a, U32 nan, U32 otherwise) { return a != a ? nan : otherwise; }
inline float sum_lanes(F32 a) { return a; }
