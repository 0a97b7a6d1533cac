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
// The words' upper halves, the lower ones zero.
inline U32 load_upper_halves(const void* from) { return both(load_words(from), splat(0xffff0000u)); }
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
// The lower halves of the products.
inline U32 times(U32 a, U32 b) { return a * b; }
inline U32 differing(U32 a, U32 b) { return a ^ b; }
inline U32 down_13(U32 a) { return a >> 13; }
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
// The lanes of both in turn, a's first: those of the lower halves, and those of the upper halves.
inline F32 first_pairs(F32 a, F32) { return a; }
inline F32 last_pairs(F32, F32 b) { return b; }

// The lane if its bit is set, else 0.
inline F32 chosen(uint32_t mask, F32 a) { return mask != 0 ? a : 0; }
inline uint32_t is_above_zero_or_nan(F32 a) { return !(a <= 0); }
// NaN stays NaN.
inline F32 rectified(F32 a) { return a < 0 ? 0 : a; }
// Stores the upper half of each lane.
inline void store_uppers(Bf16* to, U32 a) { to->bits = static_cast<uint16_t>(a >> 16); }

// A word in the lower half of a lane of 64 bits.
constexpr int kWords = 1;
using Words = uint64_t;
inline Words words(uint32_t value) { return value; }
// The lower halves of the integers from `first` on, and their upper halves.
inline Words lower_words(uint64_t first) { return first; }
inline Words upper_words(Words a) { return a >> 32; }
// The whole product. Its lower half is the word.
inline Words product_of_words(Words a, Words b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
inline Words differences(Words a, Words b, Words c) { return a ^ b ^ c; }
// Whether the halves of words are at least `least`, which is below 2^16. A lane's bits are of both halves of its word in
// `first`, then of those in `second`. The lanes' bits follow each other from bit 0 on, and with `third` and `fourth` from
// bit 32 on.
inline uint64_t halves_at_least(uint32_t least, Words first, Words second, Words third, Words fourth) {
  const Words all[] = {first, second, third, fourth};
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) {
    bits |= uint64_t{(all[i] & 0xffff) >= least} << (i / 2 * 32 + i % 2 * 2);
    bits |= uint64_t{(all[i] >> 16 & 0xffff) >= least} << (i / 2 * 32 + i % 2 * 2 + 1);
  }
  return bits;
}

// Lane j of vector i becomes lane i of vector j.
inline void transpose(U32 (&)[kLanes]) {}
