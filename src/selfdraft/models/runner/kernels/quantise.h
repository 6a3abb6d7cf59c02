// Float weights as codes of 4 bits with a scale and a minimum for each block: what packed/quantise.py says, in one walk.
//
// Every operation is rounded by itself and sums have one order, so that the codes are those of the plain twin.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// else a product and a sum would be rounded once
#if defined(__clang__)
#pragma float_control(push)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

namespace quantise {

constexpr int BLOCK = 32, LANES = 8, LINES = BLOCK / LANES, TOP = 15;
constexpr double SHARES[] = {1.0, 0.88}; // parts of a block's range from which the search starts
constexpr int REFINED = 2; // how often least squares are asked from each start

typedef float v8 __attribute__((vector_size(32)));

// The nearest number of half precision, of two the even one.
inline float half(float x) {
#if defined(__F16C__)
  return _cvtsh_ss(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits & 0x80000000u, size = bits & 0x7fffffffu;
  float near;
  memcpy(&near, &size, 4);
  if (size < 0x38800000u) { // below 2^-14 numbers are 2^-24 apart, as floats are from 0.5 on
    near = (near + 0.5f) - 0.5f;
  } else {
    const uint32_t rounded = (size + 0xfffu + (size >> 13 & 1)) & ~0x1fffu;
    memcpy(&near, &rounded, 4);
    if (near > 65504.0f) near = std::numeric_limits<float>::infinity();
  }
  return sign ? -near : near;
#endif
}

// Eight running sums, then their sum in pairs.
inline float sum(const v8 *x) {
  v8 s = x[0];
  for (int i = 1; i < LINES; i++) s = s + x[i];
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

struct Best {
  float error = std::numeric_limits<float>::infinity(), scale = 0, min = 0;
  v8 codes[LINES] = {};
};

// Codes for a scale and a minimum, kept if their squared error is less than the least so far.
inline void tried(const v8 *x, float scale, float min, v8 *codes, Best &best) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  const v8 zero = {}, top = zero + float(TOP), magic = zero + 12582912.0f; // 1.5 x 2^23: no place behind the point
  v8 errors[LINES];
  for (int i = 0; i < LINES; i++) {
    v8 code = (x[i] - min) * inverse;
    code = code < zero ? zero : code;
    code = code > top ? top : code;
    codes[i] = (code + magic) - magic;
    const v8 error = (codes[i] * scale + min) - x[i];
    errors[i] = error * error;
  }
  const float error = sum(errors);
  if (!(error < best.error)) return;
  best.error = error, best.scale = scale, best.min = min;
  memcpy(best.codes, codes, sizeof best.codes);
}

// Scale and minimum with the smallest squared error for these codes; as they are where all codes are equal.
inline void fitted(const v8 *x, const v8 *codes, float middle, float &scale, float &min) {
  v8 squares[LINES], products[LINES];
  for (int i = 0; i < LINES; i++) squares[i] = codes[i] * codes[i], products[i] = codes[i] * x[i];
  const float mean = sum(codes) / BLOCK, spread = sum(squares) - (BLOCK * mean) * mean;
  if (!(spread > 0)) return;
  scale = (sum(products) - (BLOCK * mean) * middle) / spread;
  min = middle - scale * mean;
}

// Blocks of 32 weights each -> codes [32 a block], scales and minima; these in half precision if `halves`.
inline void four(const float *weights, int64_t blocks, bool halves, uint8_t *codes, float *scales, float *mins) {
  for (int64_t block = 0; block < blocks; block++) {
    v8 x[LINES], made[LINES];
    memcpy(x, weights + block * BLOCK, sizeof x);
    v8 lows = x[0], highs = x[0];
    for (int i = 1; i < LINES; i++) lows = x[i] < lows ? x[i] : lows, highs = x[i] > highs ? x[i] : highs;
    float low = lows[0], high = highs[0];
    for (int i = 1; i < LANES; i++) low = std::min(low, lows[i]), high = std::max(high, highs[i]);
    const float middle = sum(x) / BLOCK;
    Best best;
    best.min = low;
    for (const double share : SHARES) {
      float scale = (high - low) * float(share / TOP), min = low + (high - low) * float((1 - share) / 2);
      for (int left = REFINED; left >= 0; left--) {
        if (halves) scale = half(scale), min = half(min);
        tried(x, scale, min, made, best);
        if (left) fitted(x, made, middle, scale, min);
      }
    }
    float found[BLOCK];
    memcpy(found, best.codes, sizeof found);
    for (int i = 0; i < BLOCK; i++) codes[block * BLOCK + i] = uint8_t(int32_t(found[i]));
    scales[block] = best.scale, mins[block] = best.min;
  }
}

} // namespace quantise

#if defined(__clang__)
#pragma float_control(pop)
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
