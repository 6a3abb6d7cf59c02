#pragma once
// Linear layers

#include "dots.h"
#include "tape.h"

namespace {

constexpr word CHUNK = 64;     // rows that go through a block of weights together
constexpr word INNER = 32768;  // bytes of weights that stay close while they do

// Sums of R outputs for M rows, narrowed and put where they belong; only `wide` outputs and `tall` rows are real.
template <class T, int R, int M>
inline void finish(const v16 *acc, const v16 &shift, char *Y, word y_row, word n, word wide, word tall) {
  T said[16];
  store16(totals(acc) + shift, said);
  if (wide == R && tall == M) {
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) memcpy((T *)(Y + i * y_row) + n, said + i * R, R * sizeof(T));
  } else
    for (word i = 0; i < tall; i++) memcpy((T *)(Y + i * y_row) + n, said + i * R, wide * sizeof(T));
}

// Outputs from .. to of at most CHUNK rows. F rows of the next weights are fetched with every group of rows.
template <class T, int R, int M, int F>
void products(const T *W, const char *X, word x_row, char *Y, word y_row, const T *bias, word K, word from, word to,
              word rows) {
  const word groups = (rows + M - 1) / M, inner = groups == 1 ? K : INNER / word(sizeof(T)) / R;
  v16 left[CHUNK / M + 1][16];
  for (word n = from; n < to; n += R) {
    const T *w[R], *next[R];
    const word wide = std::min<word>(R, to - n);
    for (int r = 0; r < R; r++) {
      w[r] = W + std::min(n + r, to - 1) * K;
      next[r] = W + std::min(n + R + r, to - 1) * K;
    }
    v16 shift = {};
    if (bias)
      for (int i = 0; i < M; i++)
        for (word r = 0; r < wide; r++) shift[i * R + r] = widen(bias[n + r]);
    for (word k = 0; k < K; k += inner) {
      const word size = std::min(inner, K - k);
      for (word g = 0; g < groups; g++) {
        const T *x[M];
        for (int i = 0; i < M; i++) x[i] = (const T *)(X + std::min(g * M + i, rows - 1) * x_row) + k;
        v16 acc[16] = {};
        if (k)
          for (int i = 0; i < 16; i++) acc[i] = left[g][i];
        if (g * F < R) dots<T, R, M, F>(w, x, size, acc, next + g * F);
        else dots<T, R, M, 0>(w, x, size, acc, next);
        if (k + inner < K)
          for (int i = 0; i < 16; i++) left[g][i] = acc[i];
        else finish<T, R, M>(acc, shift, Y + g * M * y_row, y_row, n, wide, std::min<word>(M, rows - g * M));
      }
      for (int r = 0; r < R; r++) w[r] += size, next[r] += size;
    }
  }
}

template <class T> void linear(const Pass &pass, const Instr &op, word rows, word from, word to) {
  const T *W = (const T *)op.more[0], *bias = (const T *)op.more[1];
  const char *X = at(pass, op.a, 0, 0);
  char *Y = at(pass, op.out, 0, 0);
  for (word r = 0; r < rows; r += CHUNK) {
    word count = std::min(CHUNK, rows - r);
    // measured (docs/decisions/006-runner.md): which shape of block keeps up with memory, and then with the sums
    auto go = count == 1 ? (pass.ahead & 1 ? products<T, 16, 1, 16> : products<T, 16, 1, 0>)
      : count == 2 ? (pass.ahead & 2 ? products<T, 8, 2, 8> : products<T, 8, 2, 0>)
      : count > 8 ? products<T, 8, 2, 2> : count > 4 && op.more[3] > 1024 ? products<T, 4, 4, 2> : products<T, 4, 4, 4>;
    go(W, X + r * op.a.row, op.a.row, Y + r * op.out.row, op.out.row, bias, op.more[3], from, to, count);
  }
}

// Rounded weights (rounding.py): lines of 128 codes; part p of a line are its codes p * step .. as Lanes<T> takes weights.

constexpr word LINE = 128;

template <class T, int BITS> struct Codes {
  static inline v16 part(const uint8_t *line, int p) {
#if defined(__AVX512F__)
    if (BITS == 8)
      return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(line + 16 * p))));
    __m512i four = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(line + 32 * (p & 1))));
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (v16)_mm512_permutexvar_ps(_mm512_srli_epi32(four, 4 * (p >> 1)), levels);
#else
    v16 out;
    if (BITS == 8)
      for (int i = 0; i < 16; i++) out[i] = float(((const int8_t *)line)[16 * p + i]);
    else
      for (int i = 0; i < 16; i++) {
        int lane = 16 * (p & 1) + i, pair = line[2 * lane + (p >> 2)];
        out[i] = float(((p & 2 ? pair >> 4 : pair) & 15) - 8);
      }
    return out;
#endif
  }
};

#if defined(__AVX512BF16__)
template <int BITS> struct Codes<bf16, BITS> {
  static inline __m512bh part(const uint8_t *line, int p) {
    if (BITS == 8) {
      __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(line + 32 * p)));
      __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(line + 32 * p + 16)));
      return _mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
    }
    // the bits of -8 to 7 in bfloat16, twice: a lookup reads five bits, of which four are the code
    const __m512i levels = _mm512_set_epi16(
      0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40,
      -0x3f20, -0x3f00, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80,
      -0x3f60, -0x3f40, -0x3f20, -0x3f00);
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(line), 4 * p), levels);
  }
};
#endif

// acc[m * R + r] += line of weights r . 128 numbers of x[m] from place `first` on.
template <class T, int BITS, int R, int M>
inline __attribute__((always_inline)) void line_dots(const uint8_t *const *w, const float *const *scales,
                                                     const T *const *x, word first, word line, v16 *acc) {
  typedef Lanes<T> L;
  constexpr int groups = BITS == 4 ? 2 : 1, parts = LINE / L::step / groups;
#pragma GCC unroll 2
  for (int g = 0; g < groups; g++) {
    typename L::part part[R][parts];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int p = 0; p < parts; p++) part[r][p] = Codes<T, BITS>::part(w[r] + line * (16 * BITS), g * parts + p);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      v16 sum[R] = {};
#pragma GCC unroll 8
      for (int p = 0; p < parts; p++) {
        typename L::part row = L::whole(x[m] + first + (g * parts + p) * L::step);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) sum[r] = L::add(sum[r], part[r][p], row);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) acc[m * R + r] += sum[r] * scales[r][line * groups + g];
    }
  }
}

template <class T, int BITS, int R, int M>
void rounded_products(const Instr &op, const char *X, char *Y, word from, word to, word rows) {
  constexpr int groups = BITS == 4 ? 2 : 1, bytes = 16 * BITS;
  const uint8_t *W = (const uint8_t *)op.more[0];
  const float *S = (const float *)op.more[4];
  const T *bias = (const T *)op.more[1];
  const word K = op.more[3], whole = K / LINE, lines = (K + LINE - 1) / LINE, left = K - whole * LINE;
  T tails[CHUNK * LINE]; // what the last line meets, filled up: behind a row stands another, which may hold anything
  for (word m = 0; left && m < rows; m++) {
    memset(tails + m * LINE, 0, LINE * sizeof(T));
    memcpy(tails + m * LINE, (const T *)(X + m * op.a.row) + whole * LINE, left * sizeof(T));
  }
  for (word n = from; n < to; n += R) {
    const uint8_t *w[R], *next[R];
    const float *scales[R];
    const word wide = std::min<word>(R, to - n);
    for (int r = 0; r < R; r++) {
      w[r] = W + std::min(n + r, to - 1) * lines * bytes;
      next[r] = W + std::min(n + R + r, to - 1) * lines * bytes;
      scales[r] = S + std::min(n + r, to - 1) * lines * groups;
    }
    v16 shift = {};
    if (bias)
      for (int i = 0; i < M; i++)
        for (word r = 0; r < wide; r++) shift[i * R + r] = widen(bias[n + r]);
    for (word g = 0; g < rows; g += M) {
      const T *x[M], *tail[M];
      for (int i = 0; i < M; i++) {
        x[i] = (const T *)(X + std::min(g + i, rows - 1) * op.a.row);
        tail[i] = tails + std::min(g + i, rows - 1) * LINE;
      }
      v16 acc[16] = {};
      for (word line = 0; line < whole; line++) {
        if (!g)
#pragma GCC unroll 16
          for (int r = 0; r < R; r++)
            for (int b = 0; b < bytes; b += 64) __builtin_prefetch(next[r] + line * bytes + b);
        line_dots<T, BITS, R, M>(w, scales, x, line * LINE, line, acc);
      }
      if (left) line_dots<T, BITS, R, M>(w, scales, tail, 0, whole, acc);
      finish<T, R, M>(acc, shift, Y + g * op.out.row, op.out.row, n, wide, std::min<word>(M, rows - g));
    }
  }
}

template <class T, int BITS> void rounded(const Pass &pass, const Instr &op, word rows, word from, word to) {
  const char *X = at(pass, op.a, 0, 0);
  char *Y = at(pass, op.out, 0, 0);
  // measured: one row at a time the weights come too slowly, from four on the sums are as fast as they get
  constexpr int four = BITS == 4 ? 4 : 2;
  auto go = rows == 1 ? rounded_products<T, BITS, 4, 1> : rows == 2 ? rounded_products<T, BITS, 4, 2>
    : rows <= 4 ? rounded_products<T, BITS, four, 4> : rounded_products<T, BITS, 2, 8>;
  for (word r = 0; r < rows; r += CHUNK)
    go(op, X + r * op.a.row, Y + r * op.out.row, from, to, std::min(CHUNK, rows - r));
}

template <class T> void any_linear(const Pass &pass, const Instr &op, word rows, word from, word to) {
  if (op.code == 4) rounded<T, 4>(pass, op, rows, from, to);
  else if (op.code == 8) rounded<T, 8>(pass, op, rows, from, to);
  else linear<T>(pass, op, rows, from, to);
}

inline word padded(const Instr &op) { return (op.more[2] + 15) / 16 * 16; }

// Layers of one step read the same rows; their outputs are shared out as if they were one.
void linears(const Pass &pass, const Instr *ops, word count, word rows, Progress &progress) {
  word all = 0;
  for (word i = 0; i < count; i++) all += padded(ops[i]);
  word cost = all * ops[0].more[3] * (ops[0].a.type == BF16 ? 2 : 4) * ((rows + 3) / 4);
  word parts = cut(cost, all / 16, pass.threads);
  progress.run(parts, [&](word mine) {
    word from, to;
    share(all, 16, mine, parts, from, to);
    for (word i = 0; i < count; i++) {
      word first = std::max<word>(0, from), last = std::min(ops[i].more[2], to);
      if (first < last) {
        if (ops[i].a.type == BF16) any_linear<bf16>(pass, ops[i], rows, first, last);
        else any_linear<float>(pass, ops[i], rows, first, last);
      }
      from -= padded(ops[i]);
      to -= padded(ops[i]);
    }
  });
}

} // namespace
