// Vectors of sixteen lanes for AVX-512 F, BW, DQ and VL.

constexpr int kLanes = 16;
constexpr int kSumRegisters = 24;  // the number of the 32 vector registers that hold sums
using U32 = __m512i;
using F32 = __m512;

inline U32 splat(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }
inline U32 smaller(U32 a, U32 b) { return _mm512_min_epu32(a, b); }
inline U32 larger(U32 a, U32 b) { return _mm512_max_epu32(a, b); }
inline U32 both(U32 a, U32 b) { return _mm512_and_si512(a, b); }
inline uint32_t is_greater(U32 a, U32 b) { return _mm512_cmpgt_epu32_mask(a, b); }
inline uint32_t is_equal(U32 a, U32 b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline uint32_t largest_lane(U32 a) { return _mm512_reduce_max_epu32(a); }

inline U32 load_bits(const float* from) { return _mm512_loadu_si512(from); }
inline U32 load_bits(const Bf16* from) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
}

inline U32 load_words(const void* from) { return _mm512_loadu_si512(from); }
// The words' upper halves, the lower ones zero.
inline U32 load_upper_halves(const void* from) { return both(load_words(from), splat(0xffff0000u)); }
inline void store_words(void* to, U32 a) { _mm512_storeu_si512(to, a); }
// Stores the lanes whose bit is set one after the other. The rest of a whole vector gets arbitrary values.
inline void store_chosen(void* to, U32 a, uint32_t mask) {
  store_words(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), a));
}
inline U32 lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline U32 plus(U32 a, U32 b) { return _mm512_add_epi32(a, b); }
inline U32 either(U32 a, U32 b) { return _mm512_or_si512(a, b); }
inline U32 up_16(U32 a) { return _mm512_slli_epi32(a, 16); }
inline U32 up_23(U32 a) { return _mm512_slli_epi32(a, 23); }
inline U32 down_16(U32 a) { return _mm512_srli_epi32(a, 16); }
inline U32 down_24(U32 a) { return _mm512_srli_epi32(a, 24); }
inline U32 minus(U32 a, U32 b) { return _mm512_sub_epi32(a, b); }
// The lower halves of the products.
inline U32 times(U32 a, U32 b) { return _mm512_mullo_epi32(a, b); }
inline U32 differing(U32 a, U32 b) { return _mm512_xor_si512(a, b); }
inline U32 down_13(U32 a) { return _mm512_srli_epi32(a, 13); }
inline U32 last_lane(U32 a) { return _mm512_permutexvar_epi32(_mm512_set1_epi32(15), a); }
inline uint32_t sum_of_lanes(U32 a) { return static_cast<uint32_t>(_mm512_reduce_add_epi32(a)); }
// Each lane plus all lanes before it.
inline U32 sums_so_far(U32 a) {
  const U32 none = _mm512_setzero_si512();
  a = plus(a, _mm512_alignr_epi32(a, none, 15));
  a = plus(a, _mm512_alignr_epi32(a, none, 14));
  a = plus(a, _mm512_alignr_epi32(a, none, 12));
  return plus(a, _mm512_alignr_epi32(a, none, 8));
}
// `then` in the lanes where a < b, else `otherwise`.
inline U32 where_less(U32 a, U32 b, U32 then, U32 otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmplt_epu32_mask(a, b), then);
}

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 as_float(U32 bits) { return _mm512_castsi512_ps(bits); }
// A vector that the compiler must have in a register.
inline F32 in_register(F32 a) {
  __asm__("" : "+v"(a));
  return a;
}
inline F32 broadcast(float value) { return _mm512_set1_ps(value); }
inline U32 as_bits(F32 a) { return _mm512_castps_si512(a); }
// To the nearest integer, ties to even.
inline U32 to_integer(F32 a) { return _mm512_cvtps_epi32(a); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 subtract(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 multiply(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 divide(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 square_root(F32 a) { return _mm512_sqrt_ps(a); }
// Clamps to the bounds. NaN stays NaN, because minimum and maximum give the second operand if one is NaN.
inline F32 clamp(F32 a, float low, float high) {
  return _mm512_min_ps(broadcast(high), _mm512_max_ps(broadcast(low), a));
}
inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline U32 where_nan(F32 a, U32 nan, U32 otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
}
inline float sum_lanes(F32 a) { return _mm512_reduce_add_ps(a); }
// The lanes of both in turn, a's first: those of the lower halves, and those of the upper halves.
inline F32 first_pairs(F32 a, F32 b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), b);
}
inline F32 last_pairs(F32 a, F32 b) {
  return _mm512_permutex2var_ps(a, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31), b);
}

// The lanes whose bit is set, else 0.
inline F32 chosen(uint32_t mask, F32 a) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), a); }
inline uint32_t is_above_zero_or_nan(F32 a) { return _mm512_cmp_ps_mask(a, zero(), _CMP_NLE_UQ); }
// NaN stays NaN, because the maximum gives the second operand if one is NaN.
inline F32 rectified(F32 a) { return _mm512_max_ps(zero(), a); }
// Stores the upper half of each lane.
inline void store_uppers(Bf16* to, U32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(down_16(a)));
}

// A word in the lower half of each of eight lanes of 64 bits.
constexpr int kWords = 8;
using Words = __m512i;
inline Words words(uint32_t value) { return _mm512_set1_epi64(value); }
// The lower halves of the integers from `first` on, and their upper halves.
inline Words lower_words(uint64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Words upper_words(Words a) { return _mm512_srli_epi64(a, 32); }
// The whole product. Its lower half is the word.
inline Words product_of_words(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words differences(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Whether the halves of words are at least `least`, which is below 2^16. A lane's bits are of both halves of its word in
// `first`, then of those in `second`. The lanes' bits follow each other from bit 0 on, and with `third` and `fourth` from
// bit 32 on.
inline uint64_t halves_at_least(uint32_t least, Words first, Words second, Words third, Words fourth) {
  const __m512i bound = _mm512_set1_epi16(static_cast<short>(least));
  const __m512i low = _mm512_mask_mov_epi32(first, 0xaaaa, _mm512_slli_epi64(second, 32));
  const __m512i high = _mm512_mask_mov_epi32(third, 0xaaaa, _mm512_slli_epi64(fourth, 32));
  return _mm512_cmpge_epu16_mask(low, bound) | static_cast<uint64_t>(_mm512_cmpge_epu16_mask(high, bound)) << 32;
}

// Lane j of vector i becomes lane i of vector j.
inline void transpose(U32 (&a)[kLanes]) {
  U32 pairs[kLanes], fours[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4)  // vector i + j gets, in its quarter q, lane 4 q + j of four vectors
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    const U32 even_first = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const U32 odd_first = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const U32 even_last = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const U32 odd_last = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    a[j] = _mm512_shuffle_i32x4(even_first, even_last, 0x88);
    a[4 + j] = _mm512_shuffle_i32x4(odd_first, odd_last, 0x88);
    a[8 + j] = _mm512_shuffle_i32x4(even_first, even_last, 0xdd);
    a[12 + j] = _mm512_shuffle_i32x4(odd_first, odd_last, 0xdd);
  }
}
