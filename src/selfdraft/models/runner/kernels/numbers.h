#pragma once
// Numbers: the types that are computed in, sixteen lanes at a time, and functions of one number

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace {

typedef int64_t word;

struct bf16 {
  uint16_t bits;
};

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float widen(float x) { return x; }

inline void narrow(float f, bf16 &to) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
inline void narrow(float f, float &to) { to = f; }

INLINED v16 load16(const float *p) { return loaded<v16>(p); }
INLINED v16 load16(const bf16 *p) {
#if defined(__AVX512F__)
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
  const auto eight = [](const bf16 *p) ALWAYS {
    return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
  };
  return {eight(p), eight(p + 8)};
#else
  float wide[16];
  for (int i = 0; i < 16; i++) wide[i] = widen(p[i]);
  return load16(wide);
#endif
}

// The bits of bfloat16 numbers, in the lower halves: rounded to the nearest, to the even one of two
INLINED u32x16 rounded_bits(v16 v) {
  const u32x16 bits = (u32x16)v, high = bits >> 16;
  const u32x16 is_nan = (u32x16)((i32x16)(bits & 0x7fffffffu) > 0x7f800000);
  return chosen(is_nan, high | 0x40u, (bits + ((high & 1u) + 0x7fffu)) >> 16);
}
// The same as floats
INLINED v16 rounded16(v16 v) { return (v16)(rounded_bits(v) << 16); }

INLINED void store16(v16 v, float *p) { stored(v, p); }
INLINED void store16(v16 v, bf16 *p) {
  const u32x16 bits = rounded_bits(v);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
  // packing takes from the two halves of vectors in turn
  const __m256i both = _mm256_packus_epi32((__m256i)bits.low, (__m256i)bits.high);
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8));
#else
  for (int i = 0; i < 16; i++) p[i].bits = uint16_t(bits[i]);
#endif
}
template <class T> __attribute__((noinline)) v16 load_part(const T *p, word count) {
  T part[16] = {};
  memcpy(part, p, count * sizeof(T));
  return load16(part);
}

template <class T> __attribute__((noinline)) void store_part(v16 v, T *p, word count) {
  T part[16];
  store16(v, part);
  memcpy(p, part, count * sizeof(T));
}

// a * b + c, rounded once
#if defined(__x86_64__) && !defined(__FMA__)
inline __attribute__((noinline)) v16 fma16(v16 a, v16 b, v16 c) { // sixteen calls
#else
INLINED v16 fma16(v16 a, v16 b, v16 c) {
#endif
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
#else
  for (int i = 0; i < 16; i++) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

// e^x to about one unit in the last place; the polynomial is the usual one of Cephes.
inline float exp_(float x) {
  x = std::min(std::max(x, -103.97f), 88.72f);
  float n = std::floor(x * 1.44269504088896341f + 0.5f);
  x -= n * 0.693359375f;
  x -= n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.0f;
  // two factors, so that results below the smallest normal number stay right
  int32_t half = int32_t(n) / 2, rest = int32_t(n) - half;
  int32_t bits = (half + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  y *= scale;
  bits = (rest + 127) << 23;
  memcpy(&scale, &bits, 4);
  return y * scale;
}
// The same for 16 lanes
INLINED v16 exp16(v16 x) {
#if defined(__AVX512F__)
  x = (v16)_mm512_max_ps((__m512)same(-103.97f), _mm512_min_ps((__m512)same(88.72f), (__m512)x)); // NaN stays
#else
  x = chosen((u32x16)(x > 88.72f), same(88.72f), chosen((u32x16)(x < -103.97f), same(-103.97f), x));
#endif
  const v16 shifted = x * 1.44269504088896341f + 12582912.0f; // the nearest whole number is in its lowest bits
  const v16 n = shifted - 12582912.0f;
  const i32x16 whole = (i32x16)shifted - (i32x16)same(12582912.0f), half = whole >> 1;
  x -= n * 0.693359375f;
  x -= n * -2.12194440e-4f;
  v16 y = x * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.0f;
  return y * (v16)((half + 127) << 23) * (v16)((whole - half + 127) << 23);
}
inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }
inline float tanh_(float x) {
  float z = std::fabs(x);
  float big = 1.0f - 2.0f / (exp_(2.0f * z) + 1.0f);
  float s = z * z;
  float small = z + z * s * ((((-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s
    + 1.33314422036e-1f) * s - 3.33332819422e-1f);
  return std::copysign(z < 0.625f ? small : big, x);
}

INLINED v16 silu16(v16 x) { return x * (1.0f / (1.0f + exp16(-x))); }
INLINED v16 tanh16(v16 x) {
  const u32x16 sign = (u32x16)x & 0x80000000u;
  const v16 z = (v16)((u32x16)x & 0x7fffffffu), s = z * z;
  const v16 big = 1.0f - 2.0f / (exp16(2.0f * z) + 1.0f);
  const v16 small = z + z * s * ((((-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s
    + 1.33314422036e-1f) * s - 3.33332819422e-1f);
  return (v16)((u32x16)chosen((u32x16)(z < 0.625f), small, big) | sign);
}
INLINED v16 gelu16(v16 x) {
  for (int i = 0; i < 16; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
  return x;
}
INLINED v16 gelu_tanh16(v16 x) {
  return 0.5f * x * (1.0f + tanh16(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// Sum of 16 lanes in a fixed order.
INLINED float total(v16 v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 low = _mm512_castps512_ps256((__m512)v);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1));
#else
  const __m256 low = v.low, high = v.high;
#endif
  const __m256 eight = _mm256_add_ps(low, high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float a[16];
  memcpy(a, &v, 64);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
#endif
}

} // namespace
