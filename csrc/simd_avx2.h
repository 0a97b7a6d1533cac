// Vectors of eight lanes for AVX2 with FMA and BMI.

constexpr int kLanes = 8;
constexpr int kSumRegisters = 12;  // the number of the 16 vector registers that hold sums
using U32 = __m256i;
using F32 = __m256;

inline U32 splat(uint32_t value) { return _mm256_set1_epi32(static_cast<int>(value)); }
inline U32 smaller(U32 a, U32 b) { return _mm256_min_epu32(a, b); }
inline U32 larger(U32 a, U32 b) { return _mm256_max_epu32(a, b); }
inline U32 both(U32 a, U32 b) { return _mm256_and_si256(a, b); }
inline uint32_t lanes_of(U32 all_ones) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(all_ones))); }
// The comparison is signed. Keys give the same result, because none has its upper bit set.
inline uint32_t is_greater(U32 a, U32 b) { return lanes_of(_mm256_cmpgt_epi32(a, b)); }
inline uint32_t is_equal(U32 a, U32 b) { return lanes_of(_mm256_cmpeq_epi32(a, b)); }
inline uint32_t largest_lane(U32 a) {
  __m128i most = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(most));
}

inline U32 load_bits(const float* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline U32 load_bits(const Bf16* from) {
  return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16);
}

inline U32 load_words(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
// The words' upper halves, the lower ones zero.
inline U32 load_upper_halves(const void* from) {
  U32 zeros = _mm256_setzero_si256();
  __asm__ volatile("" : "+x"(zeros));  // made anew, which costs nothing: a product needs all registers for its sums
  return _mm256_blend_epi16(zeros, load_words(from), 0xaa);
}
inline void store_words(void* to, U32 a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
// The lanes whose bit is set, for each mask of lanes. Each lane is a byte.
struct ChosenLanes {
  uint64_t of_mask[256] = {};
  constexpr ChosenLanes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 7; lane >= 0; --lane)
        if ((mask >> lane & 1) != 0) of_mask[mask] = of_mask[mask] << 8 | static_cast<uint64_t>(lane);
  }
};
constexpr ChosenLanes kChosenLanes;
// Stores the lanes whose bit is set one after the other. The rest of a whole vector gets arbitrary values.
inline void store_chosen(void* to, U32 a, uint32_t mask) {
  const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kChosenLanes.of_mask[mask]));
  store_words(to, _mm256_permutevar8x32_epi32(a, _mm256_cvtepu8_epi32(lanes)));
}
inline U32 lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline U32 plus(U32 a, U32 b) { return _mm256_add_epi32(a, b); }
inline U32 either(U32 a, U32 b) { return _mm256_or_si256(a, b); }
inline U32 up_16(U32 a) { return _mm256_slli_epi32(a, 16); }
inline U32 up_23(U32 a) { return _mm256_slli_epi32(a, 23); }
inline U32 down_16(U32 a) { return _mm256_srli_epi32(a, 16); }
inline U32 down_24(U32 a) { return _mm256_srli_epi32(a, 24); }
inline U32 minus(U32 a, U32 b) { return _mm256_sub_epi32(a, b); }
// The lower halves of the products.
inline U32 times(U32 a, U32 b) { return _mm256_mullo_epi32(a, b); }
inline U32 differing(U32 a, U32 b) { return _mm256_xor_si256(a, b); }
inline U32 down_13(U32 a) { return _mm256_srli_epi32(a, 13); }
inline U32 last_lane(U32 a) { return _mm256_permutevar8x32_epi32(a, _mm256_set1_epi32(7)); }
inline uint32_t sum_of_lanes(U32 a) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1))));
}
// Each lane plus all lanes before it.
inline U32 sums_so_far(U32 a) {
  a = plus(a, _mm256_slli_si256(a, 4));
  a = plus(a, _mm256_slli_si256(a, 8));
  const U32 lower = _mm256_permute2x128_si256(a, a, 0x08);  // the lower half in place of the upper one, which is zero
  return plus(a, _mm256_shuffle_epi32(lower, 0xff));
}
// `then` in the lanes where a < b, else `otherwise`. Signed, as is_greater.
inline U32 where_less(U32 a, U32 b, U32 then, U32 otherwise) {
  return _mm256_blendv_epi8(otherwise, then, _mm256_cmpgt_epi32(b, a));
}

inline F32 zero() { return _mm256_setzero_ps(); }
inline F32 as_float(U32 bits) { return _mm256_castsi256_ps(bits); }
// A vector that the compiler must have in a register.
inline F32 in_register(F32 a) {
  __asm__("" : "+x"(a));
  return a;
}
inline F32 broadcast(float value) { return _mm256_set1_ps(value); }
inline U32 as_bits(F32 a) { return _mm256_castps_si256(a); }
// To the nearest integer, ties to even.
inline U32 to_integer(F32 a) { return _mm256_cvtps_epi32(a); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 subtract(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 multiply(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 divide(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 square_root(F32 a) { return _mm256_sqrt_ps(a); }
// Clamps to the bounds. NaN stays NaN, because minimum and maximum give the second operand if one is NaN.
inline F32 clamp(F32 a, float low, float high) {
  return _mm256_min_ps(broadcast(high), _mm256_max_ps(broadcast(low), a));
}
inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline U32 where_nan(F32 a, U32 nan, U32 otherwise) {
  return _mm256_blendv_epi8(otherwise, nan, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
inline float sum_lanes(F32 a) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
// The lanes of both in turn, a's first: those of the lower halves, and those of the upper halves.
inline F32 first_pairs(F32 a, F32 b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
inline F32 last_pairs(F32 a, F32 b) {
  return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}

// The lanes whose bit is set, else 0.
inline F32 chosen(uint32_t mask, F32 a) {
  const U32 bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_and_ps(a, as_float(_mm256_cmpeq_epi32(both(splat(mask), bits), bits)));
}
inline uint32_t is_above_zero_or_nan(F32 a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, zero(), _CMP_NLE_UQ))); }
// NaN stays NaN, because the maximum gives the second operand if one is NaN.
inline F32 rectified(F32 a) { return _mm256_max_ps(zero(), a); }
// Stores the upper half of each lane.
inline void store_uppers(Bf16* to, U32 a) {
  const U32 packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(down_16(a), down_16(a)), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

// A word in the lower half of each of four lanes of 64 bits.
constexpr int kWords = 4;
using Words = __m256i;
inline Words words(uint32_t value) { return _mm256_set1_epi64x(value); }
// The lower halves of the integers from `first` on, and their upper halves.
inline Words lower_words(uint64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first)), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Words upper_words(Words a) { return _mm256_srli_epi64(a, 32); }
// The whole product. Its lower half is the word.
inline Words product_of_words(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words differences(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
// Whether the halves of words are at least `least`, which is below 2^16. A lane's bits are of both halves of its word in
// `first`, then of those in `second`. The lanes' bits follow each other from bit 0 on, and with `third` and `fourth` from
// bit 32 on.
inline uint64_t halves_at_least(uint32_t least, Words first, Words second, Words third, Words fourth) {
  const __m256i bound = _mm256_set1_epi16(static_cast<short>(least));
  const __m256i low = _mm256_blend_epi32(first, _mm256_slli_epi64(second, 32), 0xaa);
  const __m256i high = _mm256_blend_epi32(third, _mm256_slli_epi64(fourth, 32), 0xaa);
  const __m256i all = _mm256_packs_epi16(_mm256_cmpeq_epi16(_mm256_max_epu16(low, bound), low),
                                         _mm256_cmpeq_epi16(_mm256_max_epu16(high, bound), high));
  const uint64_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(all, 0xd8)));
  return (bits & 0xffff) | bits >> 16 << 32;
}

// Lane j of vector i becomes lane i of vector j.
inline void transpose(U32 (&a)[kLanes]) {
  U32 pairs[kLanes], fours[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4)  // vector i + j gets, in its half h, lane 4 h + j of four vectors
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x20);
    a[4 + j] = _mm256_permute2x128_si256(fours[j], fours[4 + j], 0x31);
  }
}
