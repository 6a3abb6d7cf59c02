// Runs a tape: a stock decoder's forward pass as a flat list of instructions (tape.py) in one call, on CPU threads.
//
// Every number of a row is computed in an order that depends on that row alone: dot products run through the inner
// dimension in order, each output in its own accumulator; sums of a row and attention go by the row's own places.
// So a row has the same bits whatever rows stand beside it, and with any number of threads.
//
// No headers of torch are used: the file compiles in seconds and does not depend on torch's version.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#include <sched.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef int64_t word;
typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

// ---------------------------------------------------------------------------------------------------------------
// Numbers

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
  u32x16 bits;
  memcpy(&bits, &v, 64);
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, odd = (bits >> 16) | 0x40;
  u32x16 is_nan = (u32x16)((bits & 0x7fffffff) > 0x7f800000);
  h16 h = __builtin_convertvector((odd & is_nan) | (rounded & ~is_nan), h16);
  memcpy(p, &h, 32);
}
template <class T> inline v16 load_part(const T *p, word count) {
  T part[16] = {};
  memcpy(part, p, count * sizeof(T));
  return load16(part);
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
inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }
inline float tanh_(float x) {
  float z = std::fabs(x);
  float big = 1.0f - 2.0f / (exp_(2.0f * z) + 1.0f);
  float s = z * z;
  float small = z + z * s * ((((-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f) * s
    + 1.33314422036e-1f) * s - 3.33332819422e-1f);
  return std::copysign(z < 0.625f ? small : big, x);
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

// ---------------------------------------------------------------------------------------------------------------
// Dot products: R rows of weights times M rows of activations, each pair in its own accumulator

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

// ---------------------------------------------------------------------------------------------------------------
// The tape, as tape.py writes it: all fields are 64-bit words

enum Type : word { F32, BF16, I64 };
enum Place : word { FIXED, ARENA, SCRATCH, SLOT };

struct Arg {
  word place, base, row; // where it lies; offset in bytes; bytes from row to row
  word step[4];          // elements from one index to the next
  word type;
};

struct Instr {
  word code, d[4];
  Arg out, a, b, c;
  word more[8];
  double number[2];
};

struct Step {
  word kind, first, count, answers; // answers: runs over the rows asked for instead of all rows
};
enum Kind : word { GLUE, LINEAR, ATTEND };

struct Pass {
  word rows, answers, threads, layers;
  char *arena, *scratch;
  word scratch_bytes; // of one thread
  char **slots;
  const word *slot, *place, *seen, *extra, *position; // per row
  const word *extras;                                 // places behind `seen`, of rows that see no mere chain
  char **keys, **values;                              // per layer
  const word *strides;                                // per layer: elements from slot to slot and head to head, K and V
  word ahead; // bit 0 for one row, bit 1 for two: the weights to come are fetched by hand (fetching.py)
};

// How far a step is. Whoever comes takes the next part; a step is over when its parts are done, not when all threads
// have been there: one that the machine has put aside holds nobody up, and finds its steps done.
struct alignas(64) Progress {
  std::atomic<word> next{0}, done{0};

  template <class Part> void run(word parts, const Part &part) {
    for (word mine; next.load(std::memory_order_relaxed) < parts
                    && (mine = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      part(mine);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < parts; spins++) {
      if (spins > 4096) sched_yield();
#if defined(__x86_64__)
      else __builtin_ia32_pause();
#endif
    }
  }
};

constexpr word PART = 32768, PARTS = 8;

inline char *at(const Pass &pass, const Arg &arg, word row, int thread) {
  switch (arg.place) {
  case FIXED: return (char *)arg.base;
  case ARENA: return pass.arena + (arg.base >> 32) * std::max(pass.rows, pass.answers) + (arg.base & 0xffffffff)
                     + row * arg.row;
  case SCRATCH: return pass.scratch + thread * pass.scratch_bytes + arg.base;
  default: return pass.slots[arg.base >> 32] + (arg.base & 0xffffffff) + row * arg.row;
  }
}

// Part `mine` of `count` things in `parts` equal parts of multiples of `unit`.
inline void share(word count, word unit, word mine, word parts, word &from, word &to) {
  word units = (count + unit - 1) / unit;
  from = std::min(count, units * mine / parts * unit);
  to = std::min(count, units * (mine + 1) / parts * unit);
}

// Into how many parts to cut work of `cost` bytes read: enough to go round, none so small that taking it costs more.
inline word cut(word cost, word most, word threads) {
  if (threads == 1) return 1;
  word parts = std::min({cost / PART, most, PARTS * threads});
  if (parts > threads) parts = parts / threads * threads; // or one thread waits for the last part of another
  return std::max<word>(1, parts);
}

// ---------------------------------------------------------------------------------------------------------------
// Linear layers

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

// ---------------------------------------------------------------------------------------------------------------
// Attention: every row sees the first `seen` places of its slot and then its own list of places, in this order

template <class T> void remember(const Pass &pass, const Instr &op, word row, word from, word to) {
  word layer = op.more[0];
  const word *strides = pass.strides + 4 * layer;
  const T *k = (const T *)at(pass, op.b, row, 0), *v = (const T *)at(pass, op.c, row, 0);
  for (word h = from; h < to; h++) {
    word slot = pass.slot[row], place = pass.place[row], wide = op.more[4], deep = op.more[5];
    memcpy((T *)pass.keys[layer] + slot * strides[0] + h * strides[1] + place * wide, k + h * op.b.step[1],
           wide * sizeof(T));
    memcpy((T *)pass.values[layer] + slot * strides[2] + h * strides[3] + place * deep, v + h * op.c.step[1],
           deep * sizeof(T));
  }
}

// Scores of `shared` query heads against places first .. length, 16 at a time; `scores` [shared, stride].
template <class T>
void score(const T *keys, word wide, const T *q, word q_step, word shared, const word *extras, word seen, word first,
           word length, float scale, float cap, float *scores, word stride) {
  for (word g = first & ~word(15); g < length; g += 16) {
    const T *k[16];
    if (g + 16 <= seen)
      for (int i = 0; i < 16; i++) k[i] = keys + (g + i) * wide;
    else
      for (int i = 0; i < 16; i++) {
        word j = std::min(g + i, length - 1);
        k[i] = keys + (j < seen ? j : extras[j - seen]) * wide;
      }
    for (word s = 0; s < shared; s++) {
      const T *x = q + s * q_step;
      v16 acc[16] = {};
      dots<T, 16, 1, 0>(k, &x, wide, acc, nullptr);
      float *to = scores + s * stride + g;
      store16(totals(acc) * scale, to);
      if (cap > 0.0f)
        for (int i = 0; i < 16; i++) to[i] = cap * tanh_(to[i] / cap);
      for (word j = g; j < first; j++) scores[s * stride + j] = -INFINITY;
      for (word j = std::max(g, length); j < g + 16; j++) scores[s * stride + j] = -INFINITY;
    }
  }
}

// Scores to weights that sum to one over the places, and the sink if there is one.
inline void soften(float *scores, word first, word length, const float *sink) {
  word from = first & ~word(15), to = (length + 15) & ~word(15);
  float most = sink ? *sink : -INFINITY, lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = scores[from + i];
  for (word j = from + 16; j < to; j += 16)
    for (int i = 0; i < 16; i++) lanes[i] = std::max(lanes[i], scores[j + i]);
  for (int i = 0; i < 16; i++) most = std::max(most, lanes[i]);
  v16 sums = {};
  for (word j = from; j < to; j += 16) {
    float *part = scores + j;
    for (int i = 0; i < 16; i++) part[i] = part[i] == -INFINITY ? 0.0f : exp_(part[i] - most);
    sums += load16(part);
  }
  float scale = 1.0f / (total(sums) + (sink ? exp_(*sink - most) : 0.0f));
  for (word j = from; j < to; j++) scores[j] *= scale;
}

// sum[s][d] += weights of place j times its values.
template <class T, int Q, int D>
inline __attribute__((always_inline)) void mix_one(const T *v, const float *weights, word stride, v16 (&sum)[Q][D]) {
  v16 part[D];
#pragma GCC unroll 4
  for (int d = 0; d < D; d++) part[d] = load16(v + 16 * d);
#pragma GCC unroll 4
  for (int s = 0; s < Q; s++)
#pragma GCC unroll 4
    for (int d = 0; d < D; d++) sum[s][d] += weights[s * stride] * part[d];
}

// Q query heads times D * 16 numbers of the values, summed over the places; where sums are few, those of even and odd
// places apart and then together, so that one need not wait for the last.
template <class T, int Q, int D>
void mix(const T *values, word deep, const float *weights, word stride, const word *extras, word seen, word first,
         word length, T *out, word out_step) {
  constexpr bool APART = Q * D < 8;
  v16 even[Q][D] = {}, odd[Q][D] = {};
  word j = first;
  const word chain = std::min(seen, length);
  if (APART) {
    if (j & 1 && j < chain) mix_one<T, Q, D>(values + j * deep, weights + j, stride, odd), j++;
    for (; j + 2 <= chain; j += 2) {
      mix_one<T, Q, D>(values + j * deep, weights + j, stride, even);
      mix_one<T, Q, D>(values + (j + 1) * deep, weights + j + 1, stride, odd);
    }
    for (; j < length; j++)
      mix_one<T, Q, D>(values + (j < seen ? j : extras[j - seen]) * deep, weights + j, stride, j & 1 ? odd : even);
  } else {
    for (; j < chain; j++) mix_one<T, Q, D>(values + j * deep, weights + j, stride, even);
    for (; j < length; j++) mix_one<T, Q, D>(values + extras[j - seen] * deep, weights + j, stride, even);
  }
  for (int s = 0; s < Q; s++)
    for (int d = 0; d < D; d++) store16(APART ? even[s][d] + odd[s][d] : even[s][d], out + s * out_step + 16 * d);
}

template <class T, int D>
void mix(word together, const T *values, word deep, const float *weights, word stride, const word *extras, word seen,
         word first, word length, T *out) {
  auto go = together == 4 ? mix<T, 4, D> : together == 3 ? mix<T, 3, D> : together == 2 ? mix<T, 2, D> : mix<T, 1, D>;
  go(values, deep, weights, stride, extras, seen, first, length, out, deep);
}

// The same for what is left when neither heads nor width come in fours.
template <class T>
void mix_rest(const T *values, word deep, word count, const float *weights, const word *extras, word seen, word first,
              word length, T *out) {
  v16 sum = {};
  for (word j = first; j < length; j++)
    sum += weights[j] * load_part(values + (j < seen ? j : extras[j - seen]) * deep, count);
  for (word i = 0; i < count; i++) narrow(sum[i], out[i]);
}

template <class T> void attend(const Pass &pass, const Instr &op, word row, word head, std::vector<float> &scores) {
  word layer = op.more[0], window = op.more[1], heads = op.more[2], keyed = op.more[3];
  word wide = op.more[4], deep = op.more[5], shared = heads / keyed;
  const word *strides = pass.strides + 4 * layer;
  const T *keys = (const T *)pass.keys[layer] + pass.slot[row] * strides[0] + head * strides[1];
  const T *values = (const T *)pass.values[layer] + pass.slot[row] * strides[2] + head * strides[3];
  word length = pass.position[row] + 1, seen = pass.seen[row];
  word first = window ? std::max<word>(0, length - window) : 0;
  word stride = (length + 15) / 16 * 16;
  scores.resize(std::max<size_t>(scores.size(), shared * stride));
  const word *extras = pass.extras + pass.extra[row];
  const T *q = (const T *)at(pass, op.a, row, 0) + head * shared * op.a.step[1];
  score<T>(keys, wide, q, op.a.step[1], shared, extras, seen, first, length, float(op.number[0]), float(op.number[1]),
           scores.data(), stride);
  const float *sinks = (const float *)op.more[6];
  for (word s = 0; s < shared; s++)
    soften(scores.data() + s * stride, first, length, sinks ? sinks + head * shared + s : nullptr);
  T *out = (T *)at(pass, op.out, row, 0) + head * shared * deep;
  for (word s = 0; s < shared; s += 4) {
    word together = std::min<word>(4, shared - s), d = 0;
    const float *weights = scores.data() + s * stride;
    T *to = out + s * deep;
    for (; d + 64 <= deep; d += 64)
      mix<T, 4>(together, values + d, deep, weights, stride, extras, seen, first, length, to + d);
    for (; d + 32 <= deep; d += 32)
      mix<T, 2>(together, values + d, deep, weights, stride, extras, seen, first, length, to + d);
    for (; d + 16 <= deep; d += 16)
      mix<T, 1>(together, values + d, deep, weights, stride, extras, seen, first, length, to + d);
    for (word i = 0; i < together && d < deep; i++)
      mix_rest(values + d, deep, deep - d, weights + i * stride, extras, seen, first, length, to + i * deep + d);
  }
}

template <class T> void attention(const Pass &pass, const Instr &op, Progress *progress) {
  word keyed = op.more[3], units = pass.rows * keyed, from, to;
  const bool alone = pass.rows == 1; // then a head needs nothing but what it remembers itself
  word parts = cut(pass.rows * PART / 8, pass.rows, pass.threads);
  if (!alone)
    progress[0].run(parts, [&](word mine) {
      share(pass.rows, 1, mine, parts, from, to);
      for (word row = from; row < to; row++) remember<T>(pass, op, row, 0, keyed);
    });
  static thread_local std::vector<float> scores;
  word longest = *std::max_element(pass.position, pass.position + pass.rows) + 1;
  parts = cut(units * longest * (op.more[4] + op.more[5]) * word(sizeof(T)), units, pass.threads);
  progress[1].run(parts, [&](word mine) {
    share(units, 1, mine, parts, from, to);
    if (alone) remember<T>(pass, op, 0, from, to);
    for (word unit = from; unit < to; unit++) attend<T>(pass, op, unit % pass.rows, unit / pass.rows, scores);
  });
}

// ---------------------------------------------------------------------------------------------------------------
// What stands between the heavy steps: row by row, in float32, rounded to the type of the result

enum Code : word {
  COPY, NEG, EXP, RSQRT, SQRT, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU, COS, SIN, ABS, SQUARE, RECIPROCAL,
  ADD = 32, SUB, MUL, DIV, POW, MAXIMUM, MINIMUM,
  SUM = 64, MEAN, AMAX,
  LAYER_NORM = 80, RMS_NORM, EMBED, PICK, GATED
};

constexpr word RUN = 512;

// `count` numbers as floats: where they lie already if they can be used so, else copied into `room`.
inline const float *fetch(const char *p, word type, word step, word count, float *room) {
  if (type == F32) {
    const float *x = (const float *)p;
    if (step == 1) return x;
    if (step == 0) std::fill(room, room + count, *x);
    else for (word i = 0; i < count; i++) room[i] = x[i * step];
  } else if (type == BF16) {
    const bf16 *x = (const bf16 *)p;
    if (step == 0) std::fill(room, room + count, widen(*x));
    else {
      word i = 0;
      if (step == 1)
        for (; i + 16 <= count; i += 16) store16(load16(x + i), room + i);
      for (; i < count; i++) room[i] = widen(x[i * step]);
    }
  } else {
    const word *x = (const word *)p;
    for (word i = 0; i < count; i++) room[i] = float(x[i * step]);
  }
  return room;
}

inline void put(const float *from, char *p, word type, word step, word count) {
  if (type == F32) {
    float *y = (float *)p;
    if (step == 1) { if (y != from) memcpy(y, from, count * 4); }
    else for (word i = 0; i < count; i++) y[i * step] = from[i];
  } else if (type == I64) {
    for (word i = 0; i < count; i++) ((word *)p)[i * step] = word(from[i]);
  } else {
    bf16 *y = (bf16 *)p;
    word i = 0;
    if (step == 1)
      for (; i + 16 <= count; i += 16) store16(load16(from + i), y + i);
    for (; i < count; i++) narrow(from[i], y[i * step]);
  }
}

#define EACH(expression) for (word i = 0; i < count; i++) y[i] = expression; break
void unary(word code, const float *__restrict x, float *__restrict y, word count) {
  switch (code) {
  case COPY: EACH(x[i]);
  case NEG: EACH(-x[i]);
  case EXP: EACH(exp_(x[i]));
  case RSQRT: EACH(1.0f / std::sqrt(x[i]));
  case SQRT: EACH(std::sqrt(x[i]));
  case TANH: EACH(tanh_(x[i]));
  case SIGMOID: EACH(sigmoid_(x[i]));
  case SILU: EACH(x[i] * sigmoid_(x[i]));
  case GELU: EACH(0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f)));
  case GELU_TANH: EACH(0.5f * x[i] * (1.0f + tanh_(0.79788456080286536f * (x[i] + 0.044715f * x[i] * x[i] * x[i]))));
  case RELU: EACH(x[i] > 0.0f ? x[i] : 0.0f);
  case COS: EACH(std::cos(x[i]));
  case SIN: EACH(std::sin(x[i]));
  case ABS: EACH(std::fabs(x[i]));
  case SQUARE: EACH(x[i] * x[i]);
  case RECIPROCAL: EACH(1.0f / x[i]);
  }
}
void binary(word code, const float *__restrict a, const float *__restrict b, float *__restrict y, word count) {
  switch (code) {
  case ADD: EACH(a[i] + b[i]);
  case SUB: EACH(a[i] - b[i]);
  case MUL: EACH(a[i] * b[i]);
  case DIV: EACH(a[i] / b[i]);
  case POW: EACH(std::pow(a[i], b[i]));
  case MAXIMUM: EACH(std::max(a[i], b[i]));
  case MINIMUM: EACH(std::min(a[i], b[i]));
  }
}
#undef EACH

inline word bytes(word type) { return type == F32 ? 4 : type == BF16 ? 2 : 8; }

// Numbers that lie in order, or one number for all of them.
struct Source {
  const char *p;
  bool single, narrow;
  v16 same;
  Source(const char *p, const Arg &arg) : p(p), single(!arg.step[3]), narrow(arg.type == BF16), same{} {
    const float first = narrow ? widen(*(const bf16 *)p) : *(const float *)p;
    if (single)
      for (int i = 0; i < 16; i++) same[i] = first;
  }
  inline v16 at(word i) const {
    return single ? same : narrow ? load16((const bf16 *)p + i) : load16((const float *)p + i);
  }
};

template <class F> inline word direct(const Instr &op, char *to, const Source &a, const Source &b, const F &f) {
  const word count = op.d[3] & ~word(15);
  for (word i = 0; i < count; i += 16) {
    const v16 said = f(a.at(i), b.at(i));
    if (op.out.type == BF16) store16(said, (bf16 *)to + i);
    else store16(said, (float *)to + i);
  }
  return count;
}

// The commonest operations without a detour over other memory; returns how many of the numbers are done.
inline word directly(const Instr &op, char *to, const char *left, const char *right) {
  const auto plain = [](const Arg &arg) { return arg.type != I64 && (arg.step[3] == 0 || arg.step[3] == 1); };
  const bool two = op.code >= ADD;
  if (op.d[3] < 16 || !plain(op.out) || !op.out.step[3] || !plain(op.a) || (two && !plain(op.b))) return 0;
  const Source a(left, op.a), b(two ? right : left, two ? op.b : op.a);
  switch (op.code) {
  case COPY: return direct(op, to, a, a, [](v16 x, v16) { return x; });
  case NEG: return direct(op, to, a, a, [](v16 x, v16) { return -x; });
  case SQUARE: return direct(op, to, a, a, [](v16 x, v16) { return x * x; });
  case ADD: return direct(op, to, a, b, [](v16 x, v16 y) { return x + y; });
  case SUB: return direct(op, to, a, b, [](v16 x, v16 y) { return x - y; });
  case MUL: return direct(op, to, a, b, [](v16 x, v16 y) { return x * y; });
  }
  return 0;
}

// One operation on up to four dimensions, number by number.
void pointwise(const Instr &op, char *out, const char *a, const char *b) {
  float x[RUN], y[RUN], z[RUN];
  word size_out = bytes(op.out.type), size_a = bytes(op.a.type), size_b = bytes(op.b.type);
  bool two = op.code >= ADD;
  for (word i = 0; i < op.d[0]; i++)
    for (word j = 0; j < op.d[1]; j++)
      for (word k = 0; k < op.d[2]; k++) {
        char *to = out + (i * op.out.step[0] + j * op.out.step[1] + k * op.out.step[2]) * size_out;
        const char *left = a + (i * op.a.step[0] + j * op.a.step[1] + k * op.a.step[2]) * size_a;
        const char *right = b + (i * op.b.step[0] + j * op.b.step[1] + k * op.b.step[2]) * size_b;
        for (word at = directly(op, to, left, right); at < op.d[3]; at += RUN) {
          word count = std::min(RUN, op.d[3] - at);
          const float *first = fetch(left + at * op.a.step[3] * size_a, op.a.type, op.a.step[3], count, x);
          if (two) {
            const float *second = fetch(right + at * op.b.step[3] * size_b, op.b.type, op.b.step[3], count, y);
            binary(op.code, first, second, z, count);
          } else unary(op.code, first, z, count);
          put(z, to + at * op.out.step[3] * size_out, op.out.type, op.out.step[3], count);
        }
      }
}

// Sum, mean or largest of the innermost dimension.
void reduce(const Instr &op, char *out, const char *a) {
  word size_out = bytes(op.out.type), size_a = bytes(op.a.type);
  for (word i = 0; i < op.d[0]; i++)
    for (word j = 0; j < op.d[1]; j++)
      for (word k = 0; k < op.d[2]; k++) {
        const char *from = a + (i * op.a.step[0] + j * op.a.step[1] + k * op.a.step[2]) * size_a;
        float room[RUN], most = -INFINITY;
        v16 sums = {};
        for (word at = 0; at < op.d[3]; at += RUN) {
          word count = std::min(RUN, op.d[3] - at);
          const float *x = fetch(from + at * op.a.step[3] * size_a, op.a.type, op.a.step[3], count, room);
          if (op.code == AMAX) for (word n = 0; n < count; n++) most = std::max(most, x[n]);
          else {
            word n = 0;
            for (; n + 16 <= count; n += 16) sums += load16(x + n);
            if (n < count) sums += load_part(x + n, count - n);
          }
        }
        float said = op.code == AMAX ? most : op.code == MEAN ? total(sums) / float(op.d[3]) : total(sums);
        put(&said, out + (i * op.out.step[0] + j * op.out.step[1] + k * op.out.step[2]) * size_out, op.out.type, 1, 1);
      }
}

// Layer norm (b: weight, c: bias) and RMS norm (b: weight) of the innermost dimension; number[0] is epsilon.
void norm(const Instr &op, char *out, const char *a, const char *b, const char *c) {
  word wide = op.d[3], size_out = bytes(op.out.type), size_a = bytes(op.a.type);
  static thread_local std::vector<float> xs, ws, bs;
  xs.resize(wide), ws.resize(wide), bs.resize(wide);
  const float *w = b ? fetch(b, op.b.type, 1, wide, ws.data()) : nullptr;
  const float *shift = c ? fetch(c, op.c.type, 1, wide, bs.data()) : nullptr;
  for (word i = 0; i < op.d[0]; i++)
    for (word j = 0; j < op.d[1]; j++)
      for (word k = 0; k < op.d[2]; k++) {
        const char *from = a + (i * op.a.step[0] + j * op.a.step[1] + k * op.a.step[2]) * size_a;
        char *to = out + (i * op.out.step[0] + j * op.out.step[1] + k * op.out.step[2]) * size_out;
        const float *x = fetch(from, op.a.type, op.a.step[3], wide, xs.data());
        float mean = 0.0f;
        if (op.code == LAYER_NORM) {
          v16 sums = {};
          word n = 0;
          for (; n + 16 <= wide; n += 16) sums += load16(x + n);
          if (n < wide) sums += load_part(x + n, wide - n);
          mean = total(sums) / float(wide);
        }
        v16 squares = {};
        for (word n = 0; n < wide; n += 16) {
          v16 part = wide - n >= 16 ? load16(x + n) : load_part(x + n, wide - n);
          part -= mean;
          for (word i = wide - n; i < 16; i++) part[i] = 0.0f;
          squares += part * part;
        }
        float scale = 1.0f / std::sqrt(total(squares) / float(wide) + float(op.number[0]));
        float *y = xs.data();
        for (word n = 0; n < wide; n++)
          y[n] = (x[n] - mean) * scale * (w ? w[n] : 1.0f) + (shift ? shift[n] : 0.0f);
        put(y, to, op.out.type, op.out.step[3], wide);
      }
}

// out = a, and on rows whose gate is open + up(down(b)); more = {down [rank, wide], up [deep, rank], wide, rank, gate}.
template <class T> void gated(const Pass &pass, const Instr &op, word row, char *out, const char *a, const char *b) {
  const word wide = op.more[2], rank = op.more[3], deep = op.d[3];
  if (!((const word *)pass.slots[op.more[4]])[row]) {
    memcpy(out, a, deep * sizeof(T));
    return;
  }
  static thread_local std::vector<T> middle, more;
  middle.resize(rank), more.resize(deep);
  products<T, 16, 1, 0>((const T *)op.more[0], b, 0, (char *)middle.data(), 0, nullptr, wide, 0, rank, 1);
  products<T, 16, 1, 0>((const T *)op.more[1], (const char *)middle.data(), 0, (char *)more.data(), 0, nullptr, rank, 0,
                        deep, 1);
  for (word i = 0; i < deep; i++) narrow(widen(((const T *)a)[i]) + widen(more[i]), ((T *)out)[i]);
}

// A row of a table: more = {table, bytes of a row, rows}. What is not in it becomes NaN, which nobody takes for an answer.
void embed(const Instr &op, char *out, word id) {
  if (0 <= id && id < op.more[2]) memcpy(out, (const char *)op.more[0] + id * op.more[1], op.more[1]);
  else memset(out, 0xff, op.more[1]);
}

void glue(const Pass &pass, const Instr &op, word row, int thread) {
  char *out = at(pass, op.out, row, thread);
  const char *a = at(pass, op.a, row, thread), *b = at(pass, op.b, row, thread), *c = at(pass, op.c, row, thread);
  switch (op.code) {
  case LAYER_NORM:
  case RMS_NORM: return norm(op, out, a, b, c);
  case SUM:
  case MEAN:
  case AMAX: return reduce(op, out, a);
  case EMBED: return embed(op, out, *(const word *)a);
  case PICK: memcpy(out, at(pass, op.a, *(const word *)b, 0), op.more[1]); return;
  case GATED: return op.a.type == BF16 ? gated<bf16>(pass, op, row, out, a, b) : gated<float>(pass, op, row, out, a, b);
  default: pointwise(op, out, a, b);
  }
}

} // namespace

extern "C" {

word selfdraft_sizes(word which) { return which == 0 ? sizeof(Instr) : which == 1 ? sizeof(Step) : sizeof(Pass); }

void selfdraft_run(const Step *steps, word count, const Instr *instrs, const Pass *given) {
  const Pass &pass = *given;
  std::vector<Progress> progress(2 * count); // an attention has two stages
#pragma omp parallel num_threads(pass.threads)
  {
    const int thread = omp_get_thread_num();
    for (word s = 0; s < count; s++) {
      const Step &step = steps[s];
      const Instr *ops = instrs + step.first;
      const word rows = step.answers ? pass.answers : pass.rows;
      Progress *mine = &progress[2 * s];
      if (!rows) continue;
      if (step.kind == LINEAR) linears(pass, ops, step.count, rows, *mine);
      else if (step.kind == ATTEND) {
        if (ops->a.type == BF16) attention<bf16>(pass, *ops, mine);
        else attention<float>(pass, *ops, mine);
      } else {
        const word parts = cut(rows * step.count * PART / 16, rows, pass.threads);
        mine->run(parts, [&](word part) {
          word from, to;
          share(rows, 1, part, parts, from, to);
          for (word row = from; row < to; row++)
            for (word i = 0; i < step.count; i++) glue(pass, ops[i], row, thread);
        });
      }
    }
  }
}
// Moves the rows base + order[i] of a slot to base + i, in all layers; `order` goes up. shapes: heads, widths of K and V.
void selfdraft_keep(const Pass *given, const word *shapes, word size, word slot, word base, const word *order,
                    word count) {
  for (word layer = 0; layer < given->layers; layer++) {
    const word *shape = shapes + 3 * layer, *strides = given->strides + 4 * layer;
    for (int part = 0; part < 2; part++)
      for (word head = 0; head < shape[0]; head++) {
        const word row = shape[1 + part] * size;
        char *strip = (part ? given->values : given->keys)[layer]
                      + (slot * strides[2 * part] + head * strides[2 * part + 1]) * size + base * row;
        for (word i = 0; i < count; i++)
          if (order[i] != i) memcpy(strip + i * row, strip + order[i] * row, row);
      }
  }
}
}
