#pragma once
// Scores and weighted sums of attention for processors with AVX2: vectors of eight, and as many sums as 16 registers hold
//
// The operations on each number are those of attention.h, in the same order.

#include "kv_rows.h"

namespace {

#if defined(OWN_ATTENTION)

// Eights of sums that M query rows have in registers at once: two for each line, and as many lines as fit.
template <int M> constexpr int eights = M == 1 ? 8 : M <= 3 ? 4 : 2;

// acc[m][v] += number c of row m times eight numbers of line c, for `count` lines that are `step` floats apart; the next
// sixteen numbers of a line lie `far` behind.
template <int M, int V>
INLINED void add_lines(const float *const *x, const float *lines, word count, word step,
                                                     word far, __m256 (&acc)[M][V]) {
  for (word c = 0; c < count; c++, lines += step) {
    __m256 part[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) part[v] = _mm256_loadu_ps(lines + v / 2 * far + v % 2 * 8);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const __m256 row = _mm256_broadcast_ss(x[m] + c);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[m][v] = _mm256_fmadd_ps(part[v], row, acc[m][v]);
    }
  }
}

// out[m * stride ..] = scores of M query rows against `count` packed blocks of keys.
template <class T, int M>
void score(const float *const *q, const float *blocks, word count, word cols, const float *scales, float scale,
           float *const *out) {
  const auto some = [&](word g, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    __m256 acc[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[m][v] = _mm256_setzero_ps();
    add_lines<M, V>(q, blocks + g * cols * 16, cols, 16, cols * 16, acc);
    const __m256 factor = _mm256_set1_ps(scale);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        __m256 said = _mm256_mul_ps(acc[m][v], factor);
        if (scales) said = _mm256_mul_ps(said, _mm256_loadu_ps(scales + 16 * g + 8 * v));
        _mm256_storeu_ps(out[m] + 16 * g + 8 * v, said);
      }
  };
  constexpr int most = eights<M>;
  word g = 0;
  for (; g + most / 2 <= count; g += most / 2) some(g, std::integral_constant<int, most>());
  for (; g < count; g++) some(g, std::integral_constant<int, 2>());
}

// sums[m] += weights[m] times the packed lines of values; `lanes` floats in a line.
template <class T, int M>
void mix(const float *const *weights, const float *lines, word count, word lanes, float *const *sums) {
  const auto some = [&](word d, auto vectors) {
    constexpr int V = decltype(vectors)::value;
    __m256 acc[M][V];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[m][v] = _mm256_loadu_ps(sums[m] + d + 8 * v);
    add_lines<M, V>(weights, lines + d, count, lanes, 16, acc);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) _mm256_storeu_ps(sums[m] + d + 8 * v, acc[m][v]);
  };
  constexpr int most = eights<M>;
  word d = 0;
  for (; d + 8 * most <= lanes; d += 8 * most) some(d, std::integral_constant<int, most>());
  for (; d < lanes; d += 16) some(d, std::integral_constant<int, 2>());
}

#endif

} // namespace
