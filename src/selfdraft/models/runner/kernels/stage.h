#pragma once
// Staging: rows of activations as products take them, in units of 64 inputs: all rows of a chunk, then the next unit
//
// Floats: the 64 numbers of each row. Block weights: rows are rounded to 8 bits in blocks of 32 with a scale each, and
// for each block there is what stands below.

#include "packed.h"

namespace {

constexpr word BLOCK = 32;

// Bytes for one row of a chunk and one block: codes, scale d, -128 s, -8 s, d s and -128 times the sum of the first
// half, s being the sum of the codes. One kind after the other, each for all rows of the chunk.
constexpr word SUMS = 5, STAGED = BLOCK + 4 * SUMS;

template <class T> inline word staged_floats(word K) { // bytes of a row
  return ceiling(K, UNIT) * UNIT * word(sizeof(typename Pack<T>::staged));
}
inline word staged_blocks(word K) { return ceiling(K, UNIT) * (UNIT / BLOCK) * STAGED; }

// A unit of one row, of which `count` numbers are real.
template <class T> inline void stage_floats(const T *x, word count, char *to) {
  typedef typename Pack<T>::staged S;
  S *out = (S *)to;
  if (count < UNIT) memset(to, 0, UNIT * sizeof(S));
  if constexpr (sizeof(S) == sizeof(T)) memcpy(out, x, std::min(count, UNIT) * sizeof(T));
  else
    for (word k = 0; k < std::min(count, UNIT); k += LANES)
      store16(count - k >= LANES ? load16(x + k) : load_part(x + k, count - k), out + k);
}

struct Rounded {
  int8_t codes[BLOCK];
  float scale;
  int32_t first, second; // sums of the codes of either half
};

// A block of at most 32 numbers, the rest of it zeros. Not a number where one of them is not finite.
template <class T> inline Rounded round_block(const T *x, word count) {
  Rounded said;
  v16 low, high;
  if (count >= BLOCK) low = load16(x), high = load16(x + LANES);
  else {
    T part[BLOCK] = {};
    memcpy(part, x, count * sizeof(T));
    low = load16(part), high = load16(part + LANES);
  }
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  const __m512i most = _mm512_max_epi32(_mm512_and_si512((__m512i)low, mask), _mm512_and_si512((__m512i)high, mask));
  const uint32_t bits = uint32_t(_mm512_reduce_max_epi32(most));
#else
  typedef int32_t i32x16 __attribute__((vector_size(64)));
  i32x16 a, b;
  memcpy(&a, &low, 64), memcpy(&b, &high, 64);
  a &= 0x7fffffff, b &= 0x7fffffff;
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits = std::max(bits, uint32_t(std::max(a[i], b[i])));
#endif
  float largest;
  memcpy(&largest, &bits, 4);
  const float scale = largest / 127.0f;
  const bool none = !(scale >= 1.1754943508222875e-38f), broken = bits >= 0x7f800000;
  said.scale = broken ? NAN : none ? 0.0f : scale;
  const float inverse = none || broken ? 0.0f : 1.0f / scale;
#if defined(__AVX512F__)
  const __m512i l = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)low, _mm512_set1_ps(inverse)));
  const __m512i h = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)high, _mm512_set1_ps(inverse)));
  const __mmask16 keep = broken ? 0 : 0xffff; // infinity times zero is no number
  _mm_storeu_si128((__m128i *)said.codes, _mm512_cvtepi32_epi8(_mm512_maskz_mov_epi32(keep, l)));
  _mm_storeu_si128((__m128i *)(said.codes + LANES), _mm512_cvtepi32_epi8(_mm512_maskz_mov_epi32(keep, h)));
  said.first = _mm512_reduce_add_epi32(_mm512_maskz_mov_epi32(keep, l));
  said.second = _mm512_reduce_add_epi32(_mm512_maskz_mov_epi32(keep, h));
#else
  said.first = said.second = 0;
  for (int i = 0; i < LANES; i++) {
    said.codes[i] = broken ? 0 : int8_t(std::nearbyint(low[i] * inverse));
    said.codes[LANES + i] = broken ? 0 : int8_t(std::nearbyint(high[i] * inverse));
    said.first += said.codes[i], said.second += said.codes[LANES + i];
  }
#endif
  return said;
}

// The same unit rounded, as row `r` of a chunk of `R`.
template <class T> inline void stage_blocks(const T *x, word count, word r, word R, char *out) {
  for (word k = 0; k < UNIT; k += BLOCK, out += R * STAGED) {
    const Rounded block = round_block(x + std::min(k, count), std::max<word>(0, std::min(BLOCK, count - k)));
    memcpy(out + r * BLOCK, block.codes, BLOCK);
    const int32_t sum = block.first + block.second;
    const int32_t sums[3] = {-128 * sum, -8 * sum, -128 * block.first};
    const float both = block.scale * float(sum);
    char *numbers = out + R * BLOCK;
    memcpy(numbers + r * 4, &block.scale, 4);
    memcpy(numbers + (R + r) * 4, sums, 4);
    memcpy(numbers + (2 * R + r) * 4, sums + 1, 4);
    memcpy(numbers + (3 * R + r) * 4, &both, 4);
    memcpy(numbers + (4 * R + r) * 4, sums + 2, 4);
  }
}

} // namespace
