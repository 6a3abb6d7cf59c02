#pragma once
// Dot products: R rows of weights times M rows of activations, each pair in its own accumulator

#include "numbers.h"

namespace {

template <class T> struct Lanes {
  static constexpr word step = 16;
  typedef v16 part;
  static inline part whole(const T *p) { return load16(p); }
  static inline part rest(const T *p, word count) { return load_part(p, count); }
  static inline v16 add(v16 acc, part w, part x) { return acc + w * x; }
};

#if defined(__AVX512BF16__)
template <> struct Lanes<bf16> {
  static constexpr word step = 32;
  typedef __m512bh part;
  static inline part whole(const bf16 *p) { return (part)_mm512_loadu_si512(p); }
  static inline part rest(const bf16 *p, word count) {
    return (part)_mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, p);
  }
  static inline v16 add(v16 acc, part w, part x) { return (v16)_mm512_dpbf16_ps((__m512)acc, w, x); }
};
#endif

// acc[m * R + r] += w[r] . x[m] over `size` numbers; meanwhile `F` rows of weights to come are fetched.
template <class T, int R, int M, int F>
inline __attribute__((always_inline)) void dots(const T *const *w, const T *const *x, word size, v16 *acc,
                                                const T *const *next) {
  typedef Lanes<T> L;
  word k = 0;
  for (; k + L::step <= size; k += L::step) {
    typename L::part part[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) part[r] = L::whole(w[r] + k);
#pragma GCC unroll 16
    for (int f = 0; f < F; f++) __builtin_prefetch(next[f] + k);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      typename L::part row = L::whole(x[m] + k);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[m * R + r] = L::add(acc[m * R + r], part[r], row);
    }
  }
  if (k < size)
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
        acc[m * R + r] = L::add(acc[m * R + r], L::rest(w[r] + k, size - k), L::rest(x[m] + k, size - k));
}

} // namespace
