#pragma once
// Attention: every row sees the first `seen` places of its slot and then its own list of places, in this order

#include <vector>

#include "dots.h"
#include "tape.h"

namespace {

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

} // namespace
