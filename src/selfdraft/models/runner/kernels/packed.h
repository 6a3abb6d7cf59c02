#pragma once
// Packed weights: a matrix in the order in which products read it, and rows of activations in the order they meet it
//
// Outputs come in groups, one or two vectors wide, all inputs of a group after each other: a thread reads one stream of
// memory. Every (row, output) has one accumulator that runs through the inputs in order, so its bits depend
// neither on how many rows go together nor on how many groups do (docs/decisions/011-packed-weights.md).

#include "numbers.h"

// BF16_PAIRS is set where one instruction for two inputs of bfloat16 is quick (kernel_build.py); else weights are widened.
#if defined(BF16_PAIRS) && !defined(__AVX512BF16__)
#undef BF16_PAIRS
#endif

namespace {

constexpr word LANES = 16;
constexpr word VECTORS = 2; // of a group of floats: so there are sums enough that none waits for the one before it
constexpr word UNIT = 64; // inputs of block weights that lie together; the last unit is filled up with zeros

inline word ceiling(word count, word unit) { return (count + unit - 1) / unit; }

// Floats. bfloat16: two inputs of an output beside each other, as one instruction takes them. float32: one.

template <class T> struct Pack;
template <> struct Pack<float> {
  static constexpr word inputs = 1;
  typedef float staged; // what a row of activations is held as
};
template <> struct Pack<bf16> {
  static constexpr word inputs = 2;
#if defined(BF16_PAIRS)
  typedef bf16 staged;
#else
  typedef float staged;
#endif
};
template <class T> inline word steps_of(word K) { return ceiling(K, Pack<T>::inputs); }
// bytes of one group of outputs
template <class T> inline word float_group(word K) { return steps_of<T>(K) * VECTORS * 64; }
// outputs of one group; `code` is 0 for floats and else that of a format
inline word width_of(word code) { return code ? LANES : VECTORS * LANES; }

// Block weights: what `models/packed/formats.py` calls a format, by its code.

template <int CODE> struct Format;
template <int BITS, int BLOCK, class SCALE, bool MIN> struct FormatOf {
  static constexpr int bits = BITS, block = BLOCK, blocks = UNIT / BLOCK;
  static constexpr bool min = MIN, wide = sizeof(SCALE) == 4;
  static constexpr word scales = blocks * LANES * word(sizeof(SCALE)); // bytes in front of the codes, once or twice
  static constexpr word front = MIN ? 2 * scales : scales;
  static constexpr word unit = front + UNIT * LANES * BITS / 8; // bytes
};
typedef uint16_t half;
template <> struct Format<1> : FormatOf<4, 32, half, false> {};
template <> struct Format<2> : FormatOf<4, 32, half, true> {};
template <> struct Format<3> : FormatOf<4, 32, float, true> {};
template <> struct Format<4> : FormatOf<8, 32, half, false> {};
template <> struct Format<5> : FormatOf<8, 32, float, false> {};
template <> struct Format<6> : FormatOf<8, 32, float, true> {};
template <> struct Format<7> : FormatOf<8, 16, float, false> {};

inline float widen_half(half h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, part = h & 0x3ff;
  float f;
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000 | part << 13 : (exponent + 112) << 23 | part << 13);
  if (!exponent) {
    f = float(part) * 5.9604644775390625e-8f; // 2^-24
    return sign ? -f : f;
  }
  memcpy(&f, &bits, 4);
  return f;
#endif
}
template <bool WIDE> inline v16 load_scales(const char *p) {
  if (WIDE) return load16((const float *)p);
#if defined(__AVX512F__)
  return (v16)_mm512_cvtph_ps(_mm256_load_si256((const __m256i *)p));
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm_load_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_load_si128((const __m128i *)p + 1))};
#else
  v16 v;
  for (int i = 0; i < LANES; i++) v[i] = widen_half(((const half *)p)[i]);
  return v;
#endif
}

// One row out of packed weights, as an embedding is: numbers first .. of output `id`.

template <class T> void unpack_floats(const char *table, word K, word id, T *out) {
  constexpr word pair = Pack<T>::inputs, wide = VECTORS * LANES;
  const T *from = (const T *)(table + id / wide * float_group<T>(K)) + id % wide * pair;
  for (word k = 0; k < K; k++) out[k] = from[k / pair * wide * pair + k % pair];
}

template <int CODE, class T> void unpack_blocks(const char *table, word K, word id, T *out) {
  typedef Format<CODE> F;
  const word lane = id % LANES;
  const char *group = table + id / LANES * ceiling(K, UNIT) * F::unit;
  for (word k = 0; k < K; k++) {
    const char *unit = group + k / UNIT * F::unit;
    const word at = k % UNIT, scale = at / F::block * LANES + lane;
    const uint8_t *codes = (const uint8_t *)unit + F::front;
    const auto number = [&](const char *p) {
      return F::wide ? ((const float *)p)[scale] : widen_half(((const half *)p)[scale]);
    };
    int code;
    if (F::bits == 8) code = codes[at / 4 * 64 + lane * 4 + at % 4] - (F::min ? 0 : 128);
    else code = (codes[at / 8 * 64 + lane * 4 + at % 4] >> (at & 4) & 15) - (F::min ? 0 : 8);
    narrow(F::min ? std::fma(number(unit), float(code), number(unit + F::scales)) : number(unit) * float(code), out[k]);
  }
}

// Calls `go` with the number of a format as a constant.
template <class Go> inline void with_format(word code, const Go &go) {
  switch (code) {
  case 1: return go(std::integral_constant<int, 1>());
  case 2: return go(std::integral_constant<int, 2>());
  case 3: return go(std::integral_constant<int, 3>());
  case 4: return go(std::integral_constant<int, 4>());
  case 5: return go(std::integral_constant<int, 5>());
  case 6: return go(std::integral_constant<int, 6>());
  case 7: return go(std::integral_constant<int, 7>());
  }
}

template <class T> inline void unpack(word code, const char *table, word K, word id, T *out) {
  if (!code) unpack_floats<T>(table, K, id, out);
  else with_format(code, [&](auto is) { unpack_blocks<decltype(is)::value, T>(table, K, id, out); });
}

// Bytes of one group of outputs in a format, or of floats.
template <class T> inline word group_bytes(word code, word K) {
  word bytes = float_group<T>(K);
  with_format(code, [&](auto is) { bytes = ceiling(K, UNIT) * Format<decltype(is)::value>::unit; });
  return bytes;
}

// Floats [N, K], any steps between them, to packed floats; outputs and inputs behind the last one are zeros.
template <class T> void pack_floats(const T *from, word N, word K, word n_step, word k_step, char *to, word group) {
  constexpr word pair = Pack<T>::inputs, wide = VECTORS * LANES;
  T *out = (T *)(to + group * float_group<T>(K));
  const word real = std::min(wide, N - group * wide), whole = steps_of<T>(K) * pair;
  for (word lane = 0; lane < wide; lane++) {
    const T *row = from + (group * wide + lane) * n_step;
    for (word k = 0; k < whole; k++) {
      T &place = out[k / pair * wide * pair + lane * pair + k % pair];
      if (lane < real && k < K) place = row[k * k_step];
      else narrow(0.0f, place);
    }
  }
}

} // namespace
