// The link of mask tokens (models/adapters.py): what a token adds to the logits of others that may come behind it.

#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"

namespace masks {

// sums[i] += factor * row[i]
template <class T> inline void add(const T *row, int64_t count, float factor, float *sums) {
  const v16 all = same(factor);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store16(fma16(load16(row + i), all, load16(sums + i)), sums + i);
  for (; i < count; i++) sums[i] += factor * widen(row[i]);
}

template <class T> inline float dot(const T *row, const float *x, int64_t count) {
  v16 sums[2] = {};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    for (int part = 0; part < 2; part++)
      sums[part] = fma16(load16(row + i + 16 * part), load16(x + i + 16 * part), sums[part]);
  float sum = total(sums[0] + sums[1]);
  for (; i < count; i++) sum += widen(row[i]) * x[i];
  return sum;
}

// state [wide] = rms_norm(row) @ down [wide, rank] @ up [rank, wide]
template <class T, class L>
void link_state(const T *row, int64_t wide, const L *down, const L *up, int64_t rank, float epsilon, float *state) {
  static thread_local std::vector<float> room;
  room.assign(rank, 0.0f);
  float squares = 0.0f;
  for (int64_t i = 0; i < wide; i++) squares += widen(row[i]) * widen(row[i]);
  const float scale = 1.0f / std::sqrt(squares / float(wide) + epsilon);
  for (int64_t i = 0; i < wide; i++) add(down + i * rank, rank, widen(row[i]) * scale, room.data());
  std::fill(state, state + wide, 0.0f);
  for (int64_t r = 0; r < rank; r++) add(up + r * wide, wide, room[r], state);
}

// said[i] = table[ids[i]] . state, the table [*, wide] lying row after row
template <class T>
void picked(const T *table, int64_t wide, const int64_t *ids, int64_t count, const float *state, float *said) {
  for (int64_t i = 0; i < count; i++) // the rows lie anywhere in memory: all are on their way before the first is read
    for (int64_t k = 0; k < wide; k += 64 / int64_t(sizeof(T))) __builtin_prefetch(table + ids[i] * wide + k);
  for (int64_t i = 0; i < count; i++) said[i] = dot(table + ids[i] * wide, state, wide);
}

} // namespace masks
