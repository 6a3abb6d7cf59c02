#pragma once
// Staging: rows of activations as products take them, in units of 64 inputs: all rows of a chunk, then the next unit
//
// Floats: the 64 numbers of each row. Block weights: rows are rounded to 8 bits in blocks of 32 with a scale each, and
// for each block there is what stands below.

#include "packed.h"

namespace {

constexpr word BLOCK = 32;

// Rows that go through a group of weights together, at most: what there are registers for.
#if defined(BF16_PAIRS)
constexpr word MOST = 14, MOST_BLOCKS = 12; // floats, and block weights
#elif defined(__AVX2__)
constexpr word MOST = 12, MOST_BLOCKS = 12;
#else
constexpr word MOST = 4, MOST_BLOCKS = 4;
#endif
constexpr word AHEAD = 16384; // bytes of weights that are fetched ahead; measured (docs/decisions/011)

// What a walk through a group of weights fetches: bytes from `from` on, `pace` of them for each step of inputs.
struct Fetch {
  const char *from;
  word pace;
};

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
#elif defined(__AVX2__)
  __m256i part[4] = {(__m256i)low.low, (__m256i)low.high, (__m256i)high.low, (__m256i)high.high};
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) most = _mm256_max_epi32(most, _mm256_and_si256(part[i], _mm256_set1_epi32(0x7fffffff)));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  const uint32_t bits = uint32_t(_mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1))));
#else
  const i32x16 a = (i32x16)low & 0x7fffffff, b = (i32x16)high & 0x7fffffff;
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
#elif defined(__AVX2__)
  const __m256 factor = _mm256_set1_ps(inverse);
  const __m256i keep = _mm256_set1_epi32(broken ? 0 : -1); // infinity times zero is no number
  for (int i = 0; i < 4; i++)
    part[i] = _mm256_and_si256(keep, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(part[i]), factor)));
  const auto sum = [](__m256i eight) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  };
  said.first = sum(_mm256_add_epi32(part[0], part[1])), said.second = sum(_mm256_add_epi32(part[2], part[3]));
  // both steps take from the two halves of vectors in turn; the last one puts fours of codes back in order
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i *)said.codes, _mm256_permutevar8x32_epi32(bytes, order));
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

// Four codes of a staged row, or a whole number that goes with them.
inline int32_t four(const char *p) {
  int32_t v;
  memcpy(&v, p, 4);
  return v;
}

} // namespace
