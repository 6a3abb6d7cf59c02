// The likeliest tokens of rows of logits, of equals the lowest id first.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "numbers.h"

namespace likeliest {

constexpr int64_t BLOCK = 64; // logits of which only the largest is looked at first

// Whole numbers in the order of the logits: bits with those of negative numbers turned round. -0 is 0.
inline int16_t key_of(int16_t bits) {
  const int16_t key = int16_t(bits ^ (bits >> 15 & 0x7fff));
  return int16_t(key + (key == -1));
}
inline int32_t key_of(int32_t bits) {
  const int32_t key = bits ^ (bits >> 31 & 0x7fffffff);
  return key + (key == -1);
}
inline bool is_nan(int16_t bits) { return (bits & 0x7fff) > 0x7f80; }
inline bool is_nan(int32_t bits) { return (bits & 0x7fffffff) > 0x7f800000; }
inline double number(int16_t bits) { return widen(bf16{uint16_t(bits)}); }
inline double number(int32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

template <class K> struct Found {
  K key;
  int64_t id;
  bool operator<(const Found &other) const { return key > other.key || (key == other.key && id < other.id); }
};

// The `most` likeliest of one row, at most as many as it has; the first id is -1 where a logit is NaN.
template <class K> void of_row(const K *row, int64_t count, int64_t most, double *values, int64_t *ids) {
  static thread_local std::vector<K> tops, order;
  static thread_local std::vector<Found<K>> found;
  const int64_t whole = count / BLOCK, blocks = (count + BLOCK - 1) / BLOCK;
  tops.resize(blocks);
  int broken = 0;
  for (int64_t block = 0; block < blocks; block++) {
    const K *const from = row + block * BLOCK;
    K top = key_of(from[0]);
    const auto look = [&](int64_t size) ALWAYS {
      for (int64_t i = 0; i < size; i++) top = std::max(top, key_of(from[i])), broken |= is_nan(from[i]);
    };
    block < whole ? look(BLOCK) : look(count - whole * BLOCK); // a loop of a known length is one of vectors
    tops[block] = top;
  }
  // as many blocks as tokens are wanted have one that reaches this, so no token below it is wanted
  K floor = std::numeric_limits<K>::min();
  if (most < blocks) {
    order = tops;
    std::nth_element(order.begin(), order.begin() + (most - 1), order.end(), std::greater<K>());
    floor = order[most - 1];
  }
  found.clear();
  for (int64_t block = 0; block < blocks; block++)
    if (tops[block] >= floor)
      for (int64_t id = block * BLOCK; id < std::min(count, (block + 1) * BLOCK); id++)
        if (const K key = key_of(row[id]); key >= floor) found.push_back({key, id});
  std::partial_sort(found.begin(), found.begin() + most, found.end());
  for (int64_t i = 0; i < most; i++) ids[i] = found[i].id, values[i] = number(row[found[i].id]);
  if (broken) ids[0] = -1;
}

} // namespace likeliest
