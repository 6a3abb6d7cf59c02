#pragma once
// How keys and values lie in the cache, and how they are packed for sums: whole blocks of places at once

#include <vector>

#include "numbers.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define OWN_ATTENTION // products of attention are in attention_avx2.h
#endif

namespace {

// Numbers ready for products: as floats, or two bfloat16 numbers side by side where the processor multiplies those.
template <class T> struct KvUnits {
  static constexpr word per = 1;
  typedef v16 part;
  static INLINED part load(const float *p) { return load16(p); }
  static INLINED v16 add(v16 acc, part line, const float *x) { return acc + line * *x; }
  static INLINED void weights(v16 from, float *to) { store16(from, to); }
};
#if defined(__AVX512BF16__)
template <> struct KvUnits<bf16> {
  static constexpr word per = 2;
  typedef __m512bh part;
  static inline part load(const float *p) { return (part)_mm512_loadu_ps(p); }
  static inline v16 add(v16 acc, part line, const float *x) {
    return (v16)_mm512_dpbf16_ps((__m512)acc, line, (part)_mm512_set1_ps(*x));
  }
  static inline void weights(v16 from, float *to) {
    const __m256bh both = _mm512_cvtneps_pbh((__m512)from);
    memcpy(to, &both, 32);
  }
};
#endif

// Numbers as they are.
template <class T> struct KvPlain {
  static constexpr word size = sizeof(T);
  static constexpr bool scaled = false;
  static word bytes(word wide) { return wide * size; }
  static void write(const T *from, word wide, char *to) { memcpy(to, from, wide * size); }
  static float scale(const char *, word) { return 1.0f; }

  // Whether numbers lie in the cache as products want them.
  template <class A> static bool direct(word wide) {
    return KvUnits<A>::per == 2 ? wide % 2 == 0 : size == sizeof(float);
  }
  template <class A> static void units(const char *from, word wide, float *to) {
    const T *x = (const T *)from;
    if (KvUnits<A>::per == 2) {
      if (wide & 1) to[wide / 2] = 0.0f;
      memcpy(to, x, wide * size);
    } else
      for (word i = 0; i < wide; i++) to[i] = widen(x[i]);
  }
  // A line of values of as many places as go into one number, padded with zeros to a multiple of 16.
  template <class A> static inline void line(const char *const *from, word deep, float *to) {
    word i = 0;
    if (KvUnits<A>::per == 1) {
      const T *x = (const T *)from[0];
      for (; i + 16 <= deep; i += 16) store16(load16(x + i), to + i);
      if (i < deep) store16(load_part(x + i, deep - i), to + i);
      return;
    }
#if defined(__AVX512BF16__)
    const bf16 *x = (const bf16 *)from[0], *y = (const bf16 *)from[KvUnits<A>::per - 1];
    for (; i + 32 <= deep; i += 32) { // in the order that is quickest; `order` puts the sums right
      const __m512i a = _mm512_loadu_si512(x + i), b = _mm512_loadu_si512(y + i);
      _mm512_storeu_si512(to + i, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(to + i + 16, _mm512_unpackhi_epi16(a, b));
    }
    for (; i < ((deep + 15) & ~word(15)); i++) {
      const uint32_t both = i < deep ? uint32_t(x[i].bits) | uint32_t(y[i].bits) << 16 : 0;
      memcpy(to + i, &both, 4);
    }
#endif
  }
  // Sums of lines, in the order of the numbers.
  template <class A> static void order(float *sums, word deep) {
    if (KvUnits<A>::per == 1) return;
    for (word i = 0; i + 32 <= deep; i += 32) {
      float mixed[32];
      memcpy(mixed, sums + i, sizeof mixed);
      for (int j = 0; j < 32; j++) sums[i + j] = mixed[(j & 4) * 4 + (j >> 3) * 4 + (j & 3)];
    }
  }
};

// Codes of 8 bits, and behind them (on a multiple of 4 bytes) the float that they are multiplied by: kv_codes.py.
struct KvCoded {
  static constexpr word size = 1;
  static constexpr bool scaled = true;
  static constexpr float SMALLEST = 1e-30f;
  static word bytes(word wide) { return (wide + 3) / 4 * 4 + 4; }
  static float scale(const char *from, word wide) {
    float said;
    memcpy(&said, from + (wide + 3) / 4 * 4, 4);
    return said;
  }

  template <class T> static void write(const T *from, word wide, char *to) {
    float most = 0.0f;
    bool finite = true;
    for (word i = 0; i < wide; i++) {
      const float x = std::fabs(widen(from[i]));
      finite = finite && x < INFINITY;
      most = std::max(most, x);
    }
    const bool coded = finite && most >= SMALLEST;
    const float factor = coded ? 127.0f / most : 0.0f, scale = !finite ? NAN : coded ? most / 127.0f : 0.0f;
    int8_t *codes = (int8_t *)to;
    for (word i = 0; i < wide; i++) codes[i] = coded ? int8_t(std::nearbyint(widen(from[i]) * factor)) : 0;
    for (word i = wide; i < (wide + 3) / 4 * 4; i++) codes[i] = 0;
    memcpy(to + (wide + 3) / 4 * 4, &scale, 4);
  }

  template <class A> static bool direct(word) { return false; }
  static INLINED v16 load(const int8_t *codes) {
#if defined(__AVX512F__)
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#elif defined(__AVX2__)
    const auto eight = [](const int8_t *codes) ALWAYS {
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
    };
    return {eight(codes), eight(codes + 8)};
#else
    v16 out;
    for (int i = 0; i < 16; i++) out[i] = float(codes[i]);
    return out;
#endif
  }
  static inline v16 load_some(const int8_t *codes, word count) {
    int8_t part[16] = {};
    memcpy(part, codes, std::min<word>(count, 16));
    return load(part);
  }
  template <class A> static void units(const char *from, word wide, float *to) {
    const int8_t *codes = (const int8_t *)from;
    word i = 0;
    if (KvUnits<A>::per == 1) {
      for (; i < wide; i++) to[i] = float(codes[i]);
      return;
    }
#if defined(__AVX512BF16__)
    for (; i + 32 <= wide; i += 32) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(codes + i + 16), (__m512)load(codes + i));
      memcpy(to + i / 2, &both, 64);
    }
    for (; i < wide; i += 2) {
      bf16 one, other = {0};
      narrow(float(codes[i]), one);
      if (i + 1 < wide) narrow(float(codes[i + 1]), other);
      const uint32_t both = uint32_t(one.bits) | uint32_t(other.bits) << 16;
      memcpy(to + i / 2, &both, 4);
    }
#endif
  }
  template <class A> static inline void line(const char *const *from, word deep, float *to) {
    const int8_t *x = (const int8_t *)from[0], *y = (const int8_t *)from[KvUnits<A>::per - 1];
    for (word i = 0; i < deep; i += 16) {
      const bool full = i + 16 <= deep;
      const v16 a = full ? load(x + i) : load_some(x + i, deep - i);
      if (KvUnits<A>::per == 1) {
        store16(a, to + i);
        continue;
      }
      // the floats of codes end in sixteen zeros: their upper halves are the bfloat16 numbers
      const v16 b = full ? load(y + i) : load_some(y + i, deep - i);
      const u32x16 both = ((u32x16)a >> 16) | (u32x16)b;
      stored(both, to + i);
    }
  }
  template <class A> static void order(float *, word) {}
};

// Sixteen rows of `cols` floats, `row(i)` being where they begin, to [cols][16].
template <class Row> INLINED void turn(const Row &row, word cols, float *to) {
  word c = 0;
#if defined(__AVX512F__)
  auto four = [&](int i) { return _mm_loadu_si128((const __m128i *)(row(i) + 4 * c)); };
  for (; c + 4 <= cols; c += 4) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      x[i] = _mm512_castsi128_si512(four(i));
      x[i] = _mm512_inserti32x4(x[i], four(i + 4), 1);
      x[i] = _mm512_inserti32x4(x[i], four(i + 8), 2);
      x[i] = _mm512_inserti32x4(x[i], four(i + 12), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i d = _mm512_unpackhi_epi32(x[0], x[1]), e = _mm512_unpackhi_epi32(x[2], x[3]);
    float *line = to + 16 * c;
    _mm512_storeu_si512(line, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(line + 16, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(line + 32, _mm512_unpacklo_epi64(d, e));
    _mm512_storeu_si512(line + 48, _mm512_unpackhi_epi64(d, e));
  }
#elif defined(__AVX2__)
  for (; c + 8 <= cols; c += 8)
    for (int first = 0; first < 16; first += 8) {
      __m256 x[8], y[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_ps((const float *)row(first + i) + c);
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44), x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44), x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
      }
      float *line = to + 16 * c + first;
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(line + 16 * i, _mm256_permute2f128_ps(x[i], x[i + 4], 0x20));
        _mm256_storeu_ps(line + 16 * (i + 4), _mm256_permute2f128_ps(x[i], x[i + 4], 0x31));
      }
    }
#endif
  for (; c < cols; c++)
    for (int i = 0; i < 16; i++) memcpy(to + 16 * c + i, row(i) + 4 * c, 4);
}
// The same of rows that lie behind one another; the commonest lengths are known to the compiler.
inline void turn_straight(const char *rows, word cols, float *to) {
  if (cols == 32) turn([=](int i) { return rows + i * 128; }, 32, to);
  else if (cols == 64) turn([=](int i) { return rows + i * 256; }, 64, to);
  else turn([=](int i) { return rows + i * 4 * cols; }, cols, to);
}

} // namespace
