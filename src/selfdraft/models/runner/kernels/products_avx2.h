#pragma once
// Products for processors with AVX2: vectors of eight outputs, and few enough of them at a time for 16 registers
//
// Rows of a chunk go one after the other, or a few together, through weights that stay in registers or close by. What
// is exact (sums of whole numbers) is added in the order that is quick here; what is rounded, as everywhere.

#include "stage.h"

namespace {

// ---- Floats

#if defined(OWN_FLOATS)

// Weights of one input for the outputs from `v` eights on; bfloat16 has two inputs beside each other.
template <int I> inline __m256 float_weights(const float *w, int v) { return _mm256_load_ps(w + v * 8); }
template <int I> inline __m256 float_weights(const bf16 *w, int v) {
  const __m256i both = _mm256_load_si256((const __m256i *)w + v);
  if (I == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000))));
}

// The fewer of rows and weights wait in registers while the others come one by one: there are 16, and a sum that does not
// find one goes through memory at every input.
template <class T, int I, int V, int M>
INLINED void float_input(const T *w, const float *x, __m256 (&acc)[M][V]) {
  if constexpr (V < M) {
    __m256 part[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) part[v] = float_weights<I>(w, v);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const __m256 row = _mm256_broadcast_ss(x + m * UNIT + I);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[m][v] = _mm256_fmadd_ps(part[v], row, acc[m][v]);
    }
  } else {
    __m256 row[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) row[m] = _mm256_broadcast_ss(x + m * UNIT + I);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const __m256 part = float_weights<I>(w, v);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) acc[m][v] = _mm256_fmadd_ps(part, row[m], acc[m][v]);
    }
  }
}

// `steps` of a unit for M rows and V eights of outputs of a group; `kept` holds the sums between units. LINES of 64 bytes
// are fetched in each step, from `ahead` on.
template <class T, int V, int M, int LINES>
INLINED void float_unit(const char *w, const float *x, word steps, float *kept, const char *ahead, word pace) {
  constexpr word pair = Pack<T>::inputs, wide = VECTORS * LANES;
  __m256 acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[m][v] = _mm256_load_ps(kept + m * wide + v * 8);
  for (const char *end = w + steps * VECTORS * 64; w < end; w += VECTORS * 64, x += pair, ahead += pace) {
    for (int line = 0; line < LINES; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
    float_input<T, 0>((const T *)w, x, acc);
    if constexpr (pair == 2) float_input<T, 1>((const T *)w, x, acc);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) _mm256_store_ps(kept + m * wide + v * 8, acc[m][v]);
}

template <class T, int R, int LINES>
INLINED void float_units(const char *w, const char *x, word K, const Fetch &fetch, v16 (&said)[VECTORS][R]) {
  constexpr word pair = Pack<T>::inputs, wide = VECTORS * LANES;
  constexpr int M = R <= 6 ? R : R / 2, V = R <= 3 ? 4 : 2; // M * V sums and M rows or V weights are in registers
  static_assert(R % M == 0, "rows of a chunk go through in equal parts");
  constexpr word walks = R / M * (4 / V); // through a unit; all of them fetch, or memory would be idle in some
  alignas(64) float kept[R * wide] = {};
  const float *rows = (const float *)x;
  const char *ahead = fetch.from;
  const word pace = LINES == 2 ? 64 * VECTORS : fetch.pace / walks;
  for (word first = 0; first < K; first += UNIT, rows += R * UNIT) {
    const word steps = ceiling(std::min(UNIT, K - first), pair);
    for (int m = 0; m < R; m += M)
      for (int v = 0; v < 4; v += V, ahead += steps * fetch.pace / walks)
        float_unit<T, V, M, LINES>(w + v * 32, rows + m * UNIT, steps, kept + m * wide + v * 8, ahead, pace);
    w += steps * VECTORS * 64;
  }
  for (int v = 0; v < VECTORS; v++)
    for (int r = 0; r < R; r++) said[v][r] = load16(kept + r * wide + v * LANES);
}

template <class T, int R>
__attribute__((noinline)) void float_group_sums(const char *w, const char *x, word K, const Fetch &fetch,
                                                v16 (&said)[VECTORS][R]) {
  if (R <= 3 && fetch.pace == 64 * VECTORS) float_units<T, R, 2>(w, x, K, fetch, said);
  else float_units<T, R, 1>(w, x, K, fetch, said);
}

#endif

// ---- Blocks

#if defined(OWN_BLOCKS)

inline __m256i spread_whole(const char *p) { return _mm256_set1_epi32(four(p)); }
inline __m256 spread(const char *p) { return _mm256_broadcast_ss((const float *)p); }

template <bool WIDE> inline __m256 eight_scales(const char *p, int half) {
  if (WIDE) return _mm256_load_ps((const float *)p + half * 8);
  return _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p + half));
}

// A part of a block is what eight registers hold of it for eight outputs: four inputs of an output in a lane, all as
// unsigned bytes. Without an instruction that adds four products of bytes in 32 bits, they are halves of bytes, 0 to
// 15, of which eight products of two fit into 16 bits, whatever the row is: 8 * 2 * 15 * 127 < 2^15.
template <class F> struct Part {
#if defined(__AVXVNNI__)
  static constexpr bool split = false; // whether low and high halves of codes lie apart
#else
  static constexpr bool split = F::bits == 8;
#endif
  static constexpr int words = split ? 4 : F::block / 4; // of a row, of four inputs each
  static constexpr int count = F::block / 4 / words;     // in a block
  static constexpr int bytes = words * 64 * F::bits / 8; // of codes
  __m256i codes[split ? 2 * words : words];

  // `from` is where the codes of the part begin, for the outputs wanted.
  INLINED void load(const char *from) {
    const __m256i mask = _mm256_set1_epi8(15);
    constexpr int second = split ? words : 1, step = F::bits == 4 ? 2 : 1;
#pragma GCC unroll 8
    for (int i = 0; i < words / step; i++) {
      const __m256i both = _mm256_load_si256((const __m256i *)(from + i * 64));
      if constexpr (split || F::bits == 4) {
        codes[i * step] = _mm256_and_si256(both, mask);
        codes[i * step + second] = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
      } else codes[i] = both;
    }
  }
  // sums + the products with the words of a row
  INLINED __m256i add(__m256i sums, const char *row) const {
#if defined(__AVXVNNI__)
#pragma GCC unroll 8
    for (int i = 0; i < words; i++) sums = _mm256_dpbusd_avx_epi32(sums, codes[i], spread_whole(row + 4 * i));
#else
    __m256i low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 8
    for (int i = 0; i < words; i++) {
      const __m256i said = spread_whole(row + 4 * i), part = _mm256_maddubs_epi16(codes[i], said);
      low = i ? _mm256_add_epi16(low, part) : part;
      if constexpr (split) {
        const __m256i more = _mm256_maddubs_epi16(codes[words + i], said);
        high = i ? _mm256_add_epi16(high, more) : more;
      }
    }
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
    if constexpr (split) sums = _mm256_add_epi32(sums, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
#endif
    return sums;
  }
};

// What makes up for the unsigned codes of row `r`: the numbers of stage.h times the sum of the row's codes.
template <class F, int R> INLINED __m256i start_of(const char *numbers, int r, int first) {
  if (F::min) return _mm256_setzero_si256();
  if (F::bits == 4) return spread_whole(numbers + (2 * R + r) * 4);
  const char *whole = numbers + (R + r) * 4, *half = numbers + (4 * R + r) * 4;
  if (F::block == BLOCK) return spread_whole(whole);
  return first ? _mm256_sub_epi32(spread_whole(whole), spread_whole(half)) : spread_whole(half);
}

// Block `b` of a unit for the outputs of one half of a group.
template <class F, int R>
INLINED void half_block(const char *w, const char *x, int b, int half, __m256 (&acc)[R]) {
  typedef Part<F> P;
  const char *rows = x + b * F::block / BLOCK * R * STAGED, *numbers = rows + R * BLOCK;
  const char *codes = w + F::front + b * F::block * LANES * F::bits / 8 + half * 32;
  const char *front = w + b * (F::scales / F::blocks);
  const int first = b * F::block % BLOCK;
  const __m256 scale = eight_scales<F::wide>(front, half);
  const __m256 min = F::min ? eight_scales<F::wide>(front + F::scales, half) : scale;
  __m256i kept[R];
  P part;
  for (int p = 0; p < P::count; p++) {
    part.load(codes + p * P::bytes);
    const auto one = [&](int r) ALWAYS {
      const __m256i begun = p ? kept[r] : start_of<F, R>(numbers, r, first);
      const __m256i sums = part.add(begun, rows + r * BLOCK + first + p * P::words * 4);
      if (p + 1 < P::count) {
        kept[r] = sums;
        return;
      }
      const __m256 said = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), spread(numbers + r * 4));
      acc[r] = _mm256_fmadd_ps(said, scale, acc[r]);
      if (F::min) acc[r] = _mm256_fmadd_ps(min, spread(numbers + (3 * R + r) * 4), acc[r]);
    };
    if constexpr (R <= 2) {
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) one(r);
    } else
#pragma GCC unroll 1
      for (int r = 0; r < R; r++) one(r);
  }
}

template <int CODE, int R> __attribute__((noinline)) void block_group(const char *w, const char *x, word K, v16 (&acc)[R]) {
  typedef Format<CODE> F;
  const word units = ceiling(K, UNIT);
  __m256 sums[2][R];
  for (int r = 0; r < R; r++) sums[0][r] = sums[1][r] = _mm256_setzero_ps();
  for (word u = 0; u < units; u++, w += F::unit, x += UNIT / BLOCK * R * STAGED) {
    for (word line = 0; line < F::unit; line += 64) __builtin_prefetch(w + line + AHEAD, 0, 2);
#pragma GCC unroll 4
    for (int b = 0; b < F::blocks; b++) {
      half_block<F, R>(w, x, b, 0, sums[0]);
      half_block<F, R>(w, x, b, 1, sums[1]);
    }
  }
  for (int r = 0; r < R; r++) memcpy(&acc[r], &sums[0][r], 32), memcpy((char *)&acc[r] + 32, &sums[1][r], 32);
}

#endif

} // namespace
