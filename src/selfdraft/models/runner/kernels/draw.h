// Which tokens of a sampled row can be the one that its noise lifts to the top: what core/one_row.py says, in one walk.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-trapping-math") // else a choice between two floats is a branch, and its loop not one of vectors
#endif

namespace draw {

constexpr int64_t BLOCK = 256;
constexpr float REACH = 42.0f;  // how far one token's noise can lie above another's
constexpr float SLACK = 1.01f;  // more than rounding takes from a bound
constexpr uint64_t BITS = (uint64_t(1) << 53) - 1;

// SplitMix64's finaliser (Steele, Lea, Flood 2014).
inline uint64_t mixed(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// At least 2^x and less than 1.07 times that: what lies behind the point of x is taken as the fraction itself.
inline float power_above(float x) {
  const int32_t bits = int32_t(((x > -126.0f ? x : -126.0f) + 127.0f) * 8388608.0f);
  float found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// With 1 - u in units of 2^-53, the ratio (1 - u) / exp(score - best) of a token that reaches a floor is at most
// exp(best - floor); and any token's own sum of score and noise is a floor, so its ratio bounds the others'.
inline float bound_of(float ratio, double left) { return float(ratio * SLACK * (-std::log1p(-left) / left)); }

inline int64_t contenders(const float *scores, int64_t count, uint64_t key, float best, int64_t *found, int64_t most) {
  float bound = INFINITY;
  int64_t size = 0;
  uint64_t left[BLOCK];
  int32_t high[BLOCK];
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int n = int(count - start < BLOCK ? count - start : BLOCK);
    const float *const row = scores + start;
    int any = 0;
    // one kind of number a loop, so that each of them is one of vectors
    for (int i = 0; i < BLOCK; i++) left[i] = (mixed(mixed(uint64_t(start + i) ^ key)) >> 11) ^ BITS;
    for (int i = 0; i < BLOCK; i++) high[i] = int32_t(left[i] >> 22);
    for (int i = 0; i < n; i++)
      any |= float(high[i]) * 4194304.0f <= bound * power_above((row[i] - best) * 1.442695f);
    for (int i = 0; any && i < n; i++) {
      const float score = row[i], units = float(int64_t(left[i])) + 0.5f;
      if (!(score >= best - REACH)) continue;
      const float ratio = units / std::exp(score - best);
      if (!(ratio <= bound)) continue;
      if (size < most) found[size] = start + i;
      size++;
      bound = std::fmin(bound, bound_of(ratio, double(units) * 0x1p-53));
    }
  }
  return size;
}

} // namespace draw

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
