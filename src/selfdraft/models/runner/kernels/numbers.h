#pragma once
// Numbers: the types that are computed in, sixteen lanes at a time, and functions of one number

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace {

typedef int64_t word;
typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

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

inline v16 load16(const float *p) {
  v16 v;
  memcpy(&v, p, 64);
  return v;
}
inline v16 load16(const bf16 *p) {
#if defined(__AVX512F__)
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
  __m256i part[2];
  for (int i = 0; i < 2; i++)
    part[i] = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p + i)), 16);
  v16 v;
  memcpy(&v, part, 64);
  return v;
#else
  h16 h;
  memcpy(&h, p, 32);
  u32x16 w = __builtin_convertvector(h, u32x16) << 16;
  v16 v;
  memcpy(&v, &w, 64);
  return v;
#endif
}
inline void store16(v16 v, float *p) { memcpy(p, &v, 64); }
inline void store16(v16 v, bf16 *p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i part[2];
  memcpy(part, &v, 64);
  const __m256i one = _mm256_set1_epi32(1), up = _mm256_set1_epi32(0x7fff), sign = _mm256_set1_epi32(0x7fffffff);
  for (int i = 0; i < 2; i++) {
    const __m256i high = _mm256_srli_epi32(part[i], 16), even = _mm256_add_epi32(up, _mm256_and_si256(high, one));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(part[i], even), 16);
    const __m256i odd = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_cmpgt_epi32(_mm256_and_si256(part[i], sign), _mm256_set1_epi32(0x7f800000));
    part[i] = _mm256_blendv_epi8(rounded, odd, is_nan);
  }
  // packing takes from the two halves of vectors in turn
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(part[0], part[1]), 0xd8));
#else
  u32x16 bits;
  memcpy(&bits, &v, 64);
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, odd = (bits >> 16) | 0x40;
  u32x16 is_nan = (u32x16)((bits & 0x7fffffff) > 0x7f800000);
  h16 h = __builtin_convertvector((odd & is_nan) | (rounded & ~is_nan), h16);
  memcpy(p, &h, 32);
#endif
}
template <class T> inline v16 load_part(const T *p, word count) {
  T part[16] = {};
  memcpy(part, p, count * sizeof(T));
  return load16(part);
}

template <class T> inline void store_part(v16 v, T *p, word count) {
  T part[16];
  store16(v, part);
  memcpy(p, part, count * sizeof(T));
}

// Rounded to bfloat16, as floats
inline v16 rounded16(v16 v) {
  bf16 part[16];
  store16(v, part);
  return load16(part);
}

inline v16 same(float x) { return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// a * b + c, rounded once
#if defined(__x86_64__) && !defined(__FMA__)
__attribute__((noinline)) // sixteen calls
#endif
inline v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
  for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  memcpy(&c, z, 64);
  return c;
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
inline v16 exp16(v16 x) {
  const u32x16 above = (u32x16)(x > 88.72f), below = (u32x16)(x < -103.97f);
  x = (v16)(((u32x16)x & ~(above | below)) | ((u32x16)same(88.72f) & above) | ((u32x16)same(-103.97f) & below));
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

inline v16 silu16(v16 x) { return x * (1.0f / (1.0f + exp16(-x))); }
inline v16 tanh16(v16 x) {
  const u32x16 sign = (u32x16)x & 0x80000000u;
  const v16 z = (v16)((u32x16)x & 0x7fffffffu), s = z * z;
  const v16 big = 1.0f - 2.0f / (exp16(2.0f * z) + 1.0f);
  const v16 small = z + z * s * ((((-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s
    + 1.33314422036e-1f) * s - 3.33332819422e-1f);
  const u32x16 low = (u32x16)(z < 0.625f);
  return (v16)(((u32x16)small & low) | ((u32x16)big & ~low) | sign);
}
inline v16 gelu16(v16 x) {
  for (int i = 0; i < 16; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
  return x;
}
inline v16 gelu_tanh16(v16 x) {
  return 0.5f * x * (1.0f + tanh16(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// Sum of 16 lanes in a fixed order.
inline float total(v16 v) {
  float a[16];
  memcpy(a, &v, 64);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}

// Lane i of the answer is the sum of the lanes of acc[i], in an order that is the same for every i.
inline v16 totals(const v16 *acc) {
#if defined(__AVX512F__)
  __m512 b[8], c[4], d[2];
  for (int i = 0; i < 8; i++) {
    __m512 x = (__m512)acc[2 * i], y = (__m512)acc[2 * i + 1];
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  for (int i = 0; i < 4; i++) {
    __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  for (int i = 0; i < 2; i++)
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  return (v16)_mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
#else
  v16 out;
  for (int i = 0; i < 16; i++) out[i] = total(acc[i]);
  return out;
#endif
}

} // namespace
