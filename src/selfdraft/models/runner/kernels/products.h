#pragma once
// Products of packed weights with a chunk of staged rows; the two innermost loops of a pass
//
// As written here they suit AVX-512, and say for all processors what is computed; those that have less have files of
// their own, with the same operations on each number.

#include "stage.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#if !defined(__AVX512F__)
#define OWN_FLOATS
#endif
#if !defined(__AVX512VNNI__)
#define OWN_BLOCKS
#endif
#include "products_avx2.h"
#endif

namespace {

// ---- Floats

#if !defined(OWN_FLOATS)

#if defined(BF16_PAIRS)
template <int R> INLINED void float_step(const bf16 *w, const bf16 *x, v16 (&acc)[VECTORS][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    int32_t row;
    memcpy(&row, x + r * UNIT, 4);
    const __m512bh pair = (__m512bh)_mm512_set1_epi32(row);
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++)
      acc[v][r] = (v16)_mm512_dpbf16_ps((__m512)acc[v][r], (__m512bh)_mm512_load_si512(w + v * 32), pair);
  }
}
#endif

// One step of inputs, all numbers float32 or made so.
template <class T, int R>
INLINED void float_step(const T *w, const float *x, v16 (&acc)[VECTORS][R]) {
  constexpr int inputs = Pack<T>::inputs;
  v16 part[inputs][VECTORS];
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; v++)
    if constexpr (inputs == 2) {
      const u32x16 both = loaded<u32x16>(w + v * 32);
      part[0][v] = (v16)(both << 16), part[inputs - 1][v] = (v16)(both & 0xffff0000u);
    } else part[0][v] = load16((const float *)w + v * 16);
#pragma GCC unroll 2
  for (int i = 0; i < inputs; i++)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const v16 row = same(x[r * UNIT + i]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) acc[v][r] = fma16(part[i][v], row, acc[v][r]);
    }
}

static_assert(VECTORS == 2, "two lines of a group are fetched for a step of inputs");

template <class T, int R>
__attribute__((noinline)) void float_group_sums(const char *w, const char *x, word K, const Fetch &fetch,
                                                v16 (&said)[VECTORS][R]) {
  constexpr word pair = Pack<T>::inputs;
  const char *ahead = fetch.from;
  const typename Pack<T>::staged *rows = (const typename Pack<T>::staged *)x;
  v16 acc[VECTORS][R] = {};
  for (word first = 0; first < K; first += UNIT, rows += (R - 1) * UNIT)
    for (const auto end = rows + ceiling(std::min(UNIT, K - first), pair) * pair; rows < end;
         rows += pair, w += 64 * VECTORS) {
      __builtin_prefetch(ahead, 0, 2);
      if (fetch.pace == 64 * VECTORS) __builtin_prefetch(ahead + 64, 0, 2);
      ahead += fetch.pace;
      float_step((const T *)w, rows, acc);
    }
  for (int v = 0; v < VECTORS; v++)
    for (int r = 0; r < R; r++) said[v][r] = acc[v][r];
}

// Sums of one row with so many groups at once: a single group has too few of them, each waits for the one before it.
constexpr word BESIDE = 4;

template <class T>
__attribute__((noinline)) void float_groups_of_row(const char *w, word bytes, const char *x, word K,
                                                   v16 (&said)[BESIDE][VECTORS][1]) {
  constexpr word pair = Pack<T>::inputs;
  const typename Pack<T>::staged *row = (const typename Pack<T>::staged *)x;
  v16 acc[BESIDE][VECTORS][1] = {};
  for (const auto end = row + ceiling(K, pair) * pair; row < end; row += pair, w += 64 * VECTORS)
#pragma GCC unroll 4
    for (word g = 0; g < BESIDE; g++) float_step((const T *)(w + g * bytes), row, acc[g]);
  for (word g = 0; g < BESIDE; g++)
    for (int v = 0; v < VECTORS; v++) said[g][v][0] = acc[g][v][0];
}

#endif

// ---- Blocks

#if !defined(OWN_BLOCKS)

// Whether products of bytes take weights as signed numbers: codes of 8 bits then have their top bits turned, which takes
// 128 from them.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool SIGNED = true;
#else
constexpr bool SIGNED = false;
#endif

// sums += four products of a weight's byte and a signed one in each lane
#if !defined(__AVX512VNNI__) && !defined(__ARM_FEATURE_DOTPROD)
__attribute__((noinline)) // in loops that are written out it would take a compiler minutes
#endif
inline i32x16 dot(i32x16 sums, i32x16 w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__ARM_FEATURE_DOTPROD)
  int8x16_t part[4];
  int32x4_t sum[4];
  memcpy(part, &w, 64), memcpy(sum, &sums, 64);
  const int8x16_t row = vreinterpretq_s8_s32(vdupq_n_s32(x));
  for (int i = 0; i < 4; i++) sum[i] = vdotq_s32(sum[i], part[i], row);
  memcpy(&sums, sum, 64);
  return sums;
#else
  uint8_t bytes[64];
  int8_t row[4];
  memcpy(bytes, &w, 64), memcpy(row, &x, 4);
  for (int o = 0; o < LANES; o++)
    for (int i = 0; i < 4; i++) sums[o] += int(bytes[4 * o + i]) * row[i];
  return sums;
#endif
}

inline float number(const char *p) {
  float v;
  memcpy(&v, p, 4);
  return v;
}

// sums[r] of one block of weights, its codes at `w`, with the rows of a chunk; `first` is its first input in the block
// of activations at `x`.
template <class F, int R>
INLINED void block_sums(const char *w, const char *x, int first, i32x16 (&sums)[R]) {
  if constexpr (F::bits == 8)
#pragma GCC unroll 8
    for (int v = 0; v < F::block / 4; v++) {
      const i32x16 codes = SIGNED ? loaded<i32x16>(w + v * 64) ^ int32_t(0x80808080) : loaded<i32x16>(w + v * 64);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const int32_t row = four(x + r * BLOCK + first + 4 * v);
        sums[r] = dot(sums[r], codes, row);
      }
    }
  else
#pragma GCC unroll 4
    for (int v = 0; v < F::block / 8; v++) {
      const i32x16 both = loaded<i32x16>(w + v * 64), low = both & 0x0f0f0f0f, high = both >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r] = dot(sums[r], low, four(x + r * BLOCK + first + 8 * v));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sums[r] = dot(sums[r], high, four(x + r * BLOCK + first + 8 * v + 4));
    }
}

template <int CODE, int R> __attribute__((noinline)) void block_group(const char *w, const char *x, word K, v16 (&acc)[R]) {
  typedef Format<CODE> F;
  const word units = ceiling(K, UNIT);
  for (word u = 0; u < units; u++, w += F::unit, x += UNIT / BLOCK * R * STAGED) {
    for (word line = 0; line < F::unit; line += 64) __builtin_prefetch(w + line + AHEAD, 0, 2);
#pragma GCC unroll 4
    for (int b = 0; b < F::blocks; b++) {
      const char *rows = x + b * F::block / BLOCK * R * STAGED, *numbers = rows + R * BLOCK;
      const int first = b * F::block % BLOCK;
      i32x16 sums[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        int32_t start = 0;
        if (F::bits == 4 && !F::min) start = four(numbers + (2 * R + r) * 4);
        else if (F::bits == 8 && F::min && SIGNED) start = -four(numbers + (R + r) * 4);
        else if (!F::min && !SIGNED) {
          if (F::block == BLOCK) start = four(numbers + (R + r) * 4);
          else start = first ? four(numbers + (R + r) * 4) - four(numbers + (4 * R + r) * 4)
                             : four(numbers + (4 * R + r) * 4);
        }
        sums[r] = i32x16{} + start;
      }
      block_sums<F, R>(w + F::front + b * F::block * LANES * F::bits / 8, rows, first, sums);
      const v16 scale = load_scales<F::wide>(w + b * (F::scales / F::blocks));
      v16 min = {};
      if (F::min) min = load_scales<F::wide>(w + F::scales + b * (F::scales / F::blocks));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        acc[r] = fma16(floats(sums[r]) * number(numbers + r * 4), scale, acc[r]);
        if (F::min) acc[r] = fma16(min, same(number(numbers + (3 * R + r) * 4)), acc[r]);
      }
    }
  }
}

#endif

} // namespace
