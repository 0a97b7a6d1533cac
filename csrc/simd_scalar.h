// One-lane vectors: the literal twin of every vector variant, and the only level off x86.

constexpr int kLanes = 1;
using U32 = uint32_t;
using F32 = float;

inline U32 splat(uint32_t value) { return value; }
inline U32 counting_from(uint32_t first) { return first; }
inline U32 smaller(U32 a, U32 b) { return a < b ? a : b; }
inline U32 larger(U32 a, U32 b) { return a > b ? a : b; }
inline U32 both(U32 a, U32 b) { return a & b; }
inline uint32_t is_greater(U32 a, U32 b) { return a > b; }
inline uint32_t is_equal(U32 a, U32 b) { return a == b; }
inline uint32_t largest_lane(U32 a) { return a; }

inline U32 load(const uint32_t* from) { return *from; }
inline void store(uint32_t* to, U32 a) { *to = a; }
inline U32 load_bits(const float* from) {
  U32 bits;
  __builtin_memcpy(&bits, from, sizeof bits);
  return bits;
}
inline U32 load_bits(const Bf16* from) { return static_cast<U32>(from->bits) << 16; }

inline F32 zero() { return 0; }
inline F32 as_float(U32 bits) {
  F32 value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline F32 add(F32 a, F32 b) { return a + b; }
inline float sum_lanes(F32 a) { return a; }

// Writes the lanes that `mask` names side by side, and returns how many; up to kLanes words may be overwritten.
inline int64_t compress(uint32_t* to, uint32_t mask, U32 a) {
  *to = a;
  return mask;
}
