#pragma once
// Attention: every row sees the first `seen` places of its slot and then its own list of places, in this order
//
// A row's places are taken in blocks of 16 and stretches of STRETCH of its own list. Rows of one slot that see the same whole
// blocks go through them together: their keys and values are packed once for all. What a stretch gives (its largest score,
// the sum of its weights, the weighted sum of its values) is joined to what the stretches before it gave, in order, by one
// thread or by several. So every number is computed by the row's own list alone.

#include <vector>

#include "attention_avx2.h"
#include "tape.h"

namespace {

constexpr word STRETCH = 256; // places whose weights are relative to one largest score
constexpr word PACKED_PLACES = 64;  // of them, that many are packed at a time: they stay close to the processor
constexpr word ROWS_TOGETHER = 16;  // rows that go through packed places together
constexpr int QUERY_TILE = 6;     // query rows whose sums are in registers at once
#if defined(__AVX512F__)
constexpr int VALUE_TILE = 4; // vectors of sums for each of them
#else
constexpr int VALUE_TILE = 1;
#endif

template <class T, class S> void remember(const Pass &pass, const Instr &op, word row, word from, word to) {
  const word layer = op.more[0], wide = op.more[4], deep = op.more[5], slot = pass.slot[row], place = pass.place[row];
  const word *strides = pass.strides + 4 * layer;
  const T *k = (const T *)at(pass, op.b, row, 0), *v = (const T *)at(pass, op.c, row, 0);
  for (word h = from; h < to; h++) {
    char *key = pass.keys[layer] + (slot * strides[0] + h * strides[1]) * S::size + place * S::bytes(wide);
    char *value = pass.values[layer] + (slot * strides[2] + h * strides[3]) * S::size + place * S::bytes(deep);
    S::write(k + h * op.b.step[1], wide, key);
    S::write(v + h * op.c.step[1], deep, value);
  }
}

#if !defined(OWN_ATTENTION)

// out[m * stride ..] = scores of M query rows against `count` packed blocks of keys.
template <class T, int M>
void score(const float *const *q, const float *blocks, word count, word cols, const float *scales, float scale,
           float *const *out) {
  typedef KvUnits<T> P;
  constexpr int G = VALUE_TILE;
  auto some = [&](word g, auto together) {
    constexpr int many = decltype(together)::value;
    v16 acc[M][many] = {};
    const float *block = blocks + g * cols * 16;
    for (word c = 0; c < cols; c++) {
      typename P::part part[many];
#pragma GCC unroll 4
      for (int i = 0; i < many; i++) part[i] = P::load(block + (i * cols + c) * 16);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int i = 0; i < many; i++) acc[m][i] = P::add(acc[m][i], part[i], q[m] + c);
    }
    for (int m = 0; m < M; m++)
      for (int i = 0; i < many; i++) {
        v16 said = acc[m][i] * scale;
        if (scales) said *= load16(scales + 16 * (g + i));
        store16(said, out[m] + 16 * (g + i));
      }
  };
  word g = 0;
  for (; g + G <= count; g += G) some(g, std::integral_constant<int, G>());
  for (; G > 2 && g + 2 <= count; g += 2) some(g, std::integral_constant<int, 2>());
  for (; g < count; g++) some(g, std::integral_constant<int, 1>());
}

// sums[m] += weights[m] times the packed lines of values; `lanes` floats in a line.
template <class T, int M>
void mix(const float *const *weights, const float *lines, word count, word lanes, float *const *sums) {
  typedef KvUnits<T> P;
  auto some = [&](word d, auto together) {
    constexpr int many = decltype(together)::value;
    v16 acc[M][many];
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int i = 0; i < many; i++) acc[m][i] = load16(sums[m] + d + 16 * i);
    for (word l = 0; l < count; l++) {
      typename P::part part[many];
#pragma GCC unroll 4
      for (int i = 0; i < many; i++) part[i] = P::load(lines + l * lanes + d + 16 * i);
#pragma GCC unroll 6
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int i = 0; i < many; i++) acc[m][i] = P::add(acc[m][i], part[i], weights[m] + l);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
      for (int i = 0; i < many; i++) store16(acc[m][i], sums[m] + d + 16 * i);
  };
  word d = 0;
  for (; d + 16 * VALUE_TILE <= lanes; d += 16 * VALUE_TILE) some(d, std::integral_constant<int, VALUE_TILE>());
  for (; d < lanes; d += 16) some(d, std::integral_constant<int, 1>());
}

#endif

// Calls `go` with how many query rows (as a constant) and which is the first, until all are done.
template <class Go> inline void in_tiles(word first, word count, const Go &go) {
  const word tiles = (count + QUERY_TILE - 1) / QUERY_TILE, each = tiles ? (count + tiles - 1) / tiles : 0;
  for (word q = first, left = count; left > 0;) {
    const word now = std::min(each, left);
    switch (now) {
    case 1: go(q, std::integral_constant<int, 1>()); break;
    case 2: go(q, std::integral_constant<int, 2>()); break;
    case 3: go(q, std::integral_constant<int, 3>()); break;
    case 4: go(q, std::integral_constant<int, 4>()); break;
    case 5: go(q, std::integral_constant<int, 5>()); break;
    default: go(q, std::integral_constant<int, 6>());
    }
    q += now, left -= now;
  }
}

// What stretches have given for one query row: `lanes` sums, the largest score, the sum of the weights.
struct Given {
  float *sums;
  word lanes;
  float &most() const { return sums[lanes]; }
  float &weight() const { return sums[lanes + 1]; }

  void join(const Given &next) const {
    const float top = std::max(most(), next.most());
    const float mine = exp_(most() - top), other = exp_(next.most() - top);
    for (word i = 0; i < lanes; i += 16)
      store16(load16(sums + i) * mine + load16(next.sums + i) * other, sums + i);
    weight() = weight() * mine + next.weight() * other;
    most() = top;
  }
};

// The attention of one layer for the rows of a pass, S being how keys and values lie in the cache.
template <class T, class S> struct Attention {
  typedef KvUnits<T> P;
  const Pass &pass;
  const Instr &op;
  const word layer, window, heads, keyed, wide, deep, shared, cols, lanes, width;

  Attention(const Pass &pass, const Instr &op)
      : pass(pass), op(op), layer(op.more[0]), window(op.more[1]), heads(op.more[2]), keyed(op.more[3]),
        wide(op.more[4]), deep(op.more[5]), shared(heads / keyed), cols((wide + P::per - 1) / P::per),
        lanes((deep + 15) & ~word(15)), width(lanes + 16) {}

  word length(word row) const { return pass.position[row] + 1; }
  word first(word row) const { return window ? std::max<word>(0, length(row) - window) : 0; }
  // So many first places stand in whole blocks in which a place is where it is in every row's list.
  word whole(word row) const { return std::min(pass.seen[row], length(row)) & ~word(15); }
  word stretches() const {
    return (*std::max_element(pass.position, pass.position + pass.rows) + STRETCH) / STRETCH;
  }

  // Memory of one thread.
  struct Room {
    std::vector<v16> all;
    float *queries, *scores, *states, *block, *lines, *own, *scales, *wider;
    word stride;
  };
  Room &room() const {
    static thread_local Room room;
    const word many = ROWS_TOGETHER * shared, per = P::per;
    room.stride = STRETCH + 16; // not a power of two: the rows of a tile would share few sets of the cache
    const word sizes[] = {many * cols, many * room.stride, 2 * many * width, PACKED_PLACES * cols, PACKED_PLACES / per * lanes,
                          16 * std::max(cols, lanes), 2 * STRETCH, 16 * (std::max(cols, lanes) + 16)};
    float **parts[] = {&room.queries, &room.scores, &room.states, &room.block,
                       &room.lines,   &room.own,    &room.scales, &room.wider};
    word total = 0;
    for (word size : sizes) total += (size + 15) / 16;
    if (word(room.all.size()) < total) room.all.resize(total);
    float *next = (float *)room.all.data();
    for (int i = 0; i < 8; i++) *parts[i] = next, next += (sizes[i] + 15) / 16 * 16;
    return room;
  }

  // Rows first_row .. first_row + rows of one slot, one key head.
  struct Unit {
    word row, rows, head;
    const char *keys, *values;
  };
  Unit unit(word row, word rows, word head) const {
    const word *strides = pass.strides + 4 * layer, slot = pass.slot[row];
    return {row, rows, head, pass.keys[layer] + (slot * strides[0] + head * strides[1]) * S::size,
            pass.values[layer] + (slot * strides[2] + head * strides[3]) * S::size};
  }

  void take_queries(const Unit &unit, Room &room) const {
    for (word i = 0; i < unit.rows; i++) {
      const T *q = (const T *)at(pass, op.a, unit.row + i, 0) + unit.head * shared * op.a.step[1];
      for (word s = 0; s < shared; s++)
        KvPlain<T>::template units<T>((const char *)(q + s * op.a.step[1]), wide,
                                    room.queries + (i * shared + s) * cols);
    }
  }

  // A block [cols][16] of 16 places; a place that is none has keys of zero.
  void pack_keys(const char *const *from, Room &room, float *block, float *scales) const {
    const char *ready[16];
    for (int i = 0; i < 16; i++) {
      ready[i] = from[i] ? from[i] : nothing();
      if (S::scaled) scales[i] = S::scale(ready[i], wide);
      if (S::template direct<T>(wide)) continue;
      S::template units<T>(ready[i], wide, room.wider + i * cols);
      ready[i] = (const char *)(room.wider + i * cols);
    }
    turn([&](int i) { return ready[i]; }, cols, block);
  }
  // Lines [16 / per][lanes] of 16 places; a place that is none has values of zero.
  void pack_values(const char *const *from, float *lines) const {
    const char *ready[16];
    for (int i = 0; i < 16; i++) ready[i] = from[i] ? from[i] : nothing();
    for (word i = 0; i < 16; i += P::per) S::template line<T>(ready + i, deep, lines + i / P::per * lanes);
  }
  static const char *nothing() {
    static const std::vector<char> zeros(S::bytes(1 << 16), 0);
    return zeros.data();
  }
  // The same of `count` places that lie behind one another.
  void pack_straight_keys(const char *from, word count, Room &room, float *scales) const {
    for (word g = 0; g < count; g += 16, from += 16 * S::bytes(wide)) {
      const char *rows = from;
      if (S::scaled)
        for (int i = 0; i < 16; i++) scales[g + i] = S::scale(from + i * S::bytes(wide), wide);
      if (!S::template direct<T>(wide)) {
        for (int i = 0; i < 16; i++) S::template units<T>(from + i * S::bytes(wide), wide, room.wider + i * cols);
        rows = (const char *)room.wider;
      }
      turn_straight(rows, cols, room.block + g * cols);
    }
  }
  void pack_straight_values(const char *from, word count, float *lines) const {
    const word bytes = S::bytes(deep), step = P::per * bytes;
    auto all = [&](word deep, word lanes) {
      for (word i = 0; i < count; i += P::per, from += step, lines += lanes) {
        const char *both[2] = {from, from + bytes};
        S::template line<T>(both, deep, lines);
      }
    };
    if (deep == 64) all(64, 64);
    else if (deep == 128) all(128, 128);
    else all(deep, lanes);
  }

  // Where the places g .. g + 16 of a row's list are.
  void own_places(word row, word g, const char *strip, word bytes, const char **to) const {
    const word *extras = pass.extras + pass.extra[row];
    for (word j = g; j < g + 16; j++)
      to[j - g] = j >= length(row) ? nullptr : strip + (j < pass.seen[row] ? j : extras[j - pass.seen[row]]) * bytes;
  }

  struct Range {
    word from, to;
  };
  // Whole blocks of a row between two places.
  Range blocks(word row, word from, word to) const {
    if (from >= length(row)) return {from, from};
    return {std::max(from, first(row) & ~word(15)), std::min(to, whole(row))};
  }
  // Calls `go` with query rows that go through the same whole blocks together.
  template <class Go> void together(const Unit &unit, word from, word to, const Go &go) const {
    const word tall = std::max<word>(1, QUERY_TILE / shared);
    for (word i = 0; i < unit.rows; i += tall) {
      const word count = std::min(tall, unit.rows - i);
      bool all = true;
      for (word r = i; r < i + count; r++) {
        const Range range = blocks(unit.row + r, from, to);
        all = all && range.from == from && range.to == to;
      }
      if (all) go(i * shared, count * shared, Range{from, to});
      else
        for (word r = i; r < i + count; r++) {
          const Range range = blocks(unit.row + r, from, to);
          if (range.from < range.to) go(r * shared, shared, range);
        }
    }
  }

  void scores(word query, word count, const float *packed, word number, const float *scales, word place,
              Room &room) const {
    in_tiles(query, count, [&](word q, auto size) {
      constexpr int M = decltype(size)::value;
      const float *from[M];
      float *to[M];
      for (int m = 0; m < M; m++) {
        from[m] = room.queries + (q + m) * cols;
        to[m] = room.scores + (q + m) * room.stride + place;
      }
      score<T, M>(from, packed, number, cols, S::scaled ? scales : nullptr, float(op.number[0]), to);
    });
  }
  void mixed(word query, word count, const float *lines, word number, word place, float *states, Room &room) const {
    in_tiles(query, count, [&](word q, auto size) {
      constexpr int M = decltype(size)::value;
      const float *from[M];
      float *to[M];
      for (int m = 0; m < M; m++) {
        from[m] = room.scores + (q + m) * room.stride + place / P::per;
        to[m] = states + (q + m) * width;
      }
      mix<T, M>(from, lines, number / P::per, lanes, to);
    });
  }

  // Scores between two blocks to weights, relative to the largest, ready for `mix`.
  void soften(word row, float *scores, Range range, word begin, const float *scales, const Unit &unit,
              const Given &given) const {
    const float cap = float(op.number[1]);
    const word from = range.from - begin, to = range.to - begin;
    if (cap > 0.0f)
      for (word j = from; j < to; j++) scores[j] = cap * tanh_(scores[j] / cap);
    for (word j = from; j < first(row) - begin; j++) scores[j] = -INFINITY;
    for (word j = length(row) - begin; j < to; j++) scores[j] = -INFINITY;
    v16 tops = load16(scores + from);
    for (word j = from + 16; j < to; j += 16) {
      const v16 next = load16(scores + j);
      tops = chosen((u32x16)(tops < next), next, tops);
    }
    float most = -INFINITY;
    for (int i = 0; i < 16; i++) most = std::max(most, tops[i]);
    v16 sums = {};
    for (word j = from; j < to; j += 16) {
      const v16 given = load16(scores + j);
      v16 weights = chosen((u32x16)(given != -INFINITY), exp16(given - most), v16{});
      sums += weights;
      if (S::scaled) {
        if (begin + j < whole(row)) weights *= load16(scales + j);
        else {
          const char *places[16];
          own_places(row, begin + j, unit.values, S::bytes(deep), places);
          for (int i = 0; i < 16; i++) weights[i] *= places[i] ? S::scale(places[i], deep) : 0.0f;
        }
      }
      P::weights(weights, scores + j / P::per);
    }
    given.most() = most, given.weight() = total(sums);
  }

  // What one stretch gives for the rows of a unit, in `states` [query rows, width].
  void stretch(const Unit &unit, word number, Room &room, float *states) const {
    const word begin = number * STRETCH, end = begin + STRETCH;
    word low = end, high = begin;
    for (word i = 0; i < unit.rows; i++) {
      const Range range = blocks(unit.row + i, begin, end);
      if (range.from < range.to) low = std::min(low, range.from), high = std::max(high, range.to);
    }
    const char *places[16];
    float scales[PACKED_PLACES];
    low = begin + (low - begin) / PACKED_PLACES * PACKED_PLACES;
    for (word p = low; p < high; p += PACKED_PLACES) {
      const word to = std::min(p + PACKED_PLACES, high);
      pack_straight_keys(unit.keys + p * S::bytes(wide), to - p, room, scales);
      together(unit, p, to, [&](word q, word count, Range range) {
        scores(q, count, room.block + (range.from - p) * cols, (range.to - range.from) / 16, scales + range.from - p,
               range.from - begin, room);
      });
    }
    if (S::scaled)
      for (word j = low; j < high; j++) room.scales[j - begin] = S::scale(unit.values + j * S::bytes(deep), deep);
    for (word i = 0; i < unit.rows; i++) finish_scores(unit, i, begin, room, states);
    for (word p = low; p < high; p += PACKED_PLACES) {
      const word to = std::min(p + PACKED_PLACES, high);
      pack_straight_values(unit.values + p * S::bytes(deep), to - p, room.lines);
      together(unit, p, to, [&](word q, word count, Range range) {
        mixed(q, count, room.lines + (range.from - p) / P::per * lanes, range.to - range.from, range.from - begin,
              states, room);
      });
    }
    for (word i = 0; i < unit.rows; i++)
      for (Range own = own_blocks(unit.row + i, begin, end); own.from < own.to; own.from += 16) {
        own_places(unit.row + i, own.from, unit.values, S::bytes(deep), places);
        pack_values(places, room.own);
        mixed(i * shared, shared, room.own, 16, own.from - begin, states, room);
      }
  }
  // Blocks that a row sees by its own list: behind its whole blocks.
  Range own_blocks(word row, word begin, word end) const {
    return {std::max({begin, first(row) & ~word(15), whole(row)}), std::min(end, (length(row) + 15) & ~word(15))};
  }
  // The scores of a row's own blocks, and then its weights.
  void finish_scores(const Unit &unit, word i, word begin, Room &room, float *states) const {
    const word row = unit.row + i;
    if (!takes(row, begin / STRETCH)) return;
    const char *places[16];
    float scales[16];
    const Range own = own_blocks(row, begin, begin + STRETCH);
    for (word g = own.from; g < own.to; g += 16) {
      own_places(row, g, unit.keys, S::bytes(wide), places);
      pack_keys(places, room, room.own, scales);
      scores_of(i, room.own, scales, g - begin, room);
    }
    const Range all = {std::max(begin, first(row) & ~word(15)),
                       std::min(begin + STRETCH, (length(row) + 15) & ~word(15))};
    for (word q = i * shared; q < (i + 1) * shared; q++) {
      const Given given = {states + q * width, lanes};
      std::fill(given.sums, given.sums + lanes, 0.0f);
      soften(row, room.scores + q * room.stride, all, begin, room.scales, unit, given);
    }
  }
  void scores_of(word i, const float *block, const float *scales, word place, Room &room) const {
    scores(i * shared, shared, block, 1, scales, place, room);
  }

  // Whether a row sees something of a stretch.
  bool takes(word row, word number) const {
    return number * STRETCH < length(row) && (number + 1) * STRETCH > first(row);
  }

  // The answer of one query row: its sums by the sum of its weights, that of the sink among them.
  void answer(word row, word head, const Given &given) const {
    const float *sinks = (const float *)op.more[6];
    float mine = 1.0f, weight = given.weight();
    if (sinks) {
      const float top = std::max(given.most(), sinks[head]);
      mine = exp_(given.most() - top);
      weight = weight * mine + exp_(sinks[head] - top);
    }
    const float scale = mine / weight;
    S::template order<T>(given.sums, deep);
    T *out = (T *)at(pass, op.out, row, 0) + head * deep;
    for (word i = 0; i < deep; i++) narrow(given.sums[i] * scale, out[i]);
  }

  // All stretches of a unit, one after the other.
  void attend(const Unit &unit) const {
    Room &mine = room();
    float *states = mine.states, *next = mine.states + ROWS_TOGETHER * shared * width;
    take_queries(unit, mine);
    word from = stretches(), to = 0;
    for (word i = 0; i < unit.rows; i++) {
      from = std::min(from, first(unit.row + i) / STRETCH);
      to = std::max(to, (length(unit.row + i) - 1) / STRETCH);
    }
    for (word number = from; number <= to; number++) {
      float *here = number == from ? states : next;
      stretch(unit, number, mine, here);
      for (word q = 0; here == next && q < unit.rows * shared; q++) {
        const word row = unit.row + q / shared;
        if (!takes(row, number)) continue;
        if (number == first(row) / STRETCH) memcpy(states + q * width, next + q * width, width * sizeof(float));
        else Given{states + q * width, lanes}.join({next + q * width, lanes});
      }
    }
    for (word q = 0; q < unit.rows * shared; q++)
      answer(unit.row + q / shared, unit.head * shared + q % shared, {states + q * width, lanes});
  }

  // The same with the stretches shared out: what each gives goes to `partial` [rows, heads, stretches, width].
  void attend_stretch(const Unit &unit, word number, word all, float *partial) const {
    bool any = false;
    for (word i = 0; i < unit.rows; i++) any = any || takes(unit.row + i, number);
    if (!any) return;
    Room &mine = room();
    take_queries(unit, mine);
    stretch(unit, number, mine, mine.states);
    for (word q = 0; q < unit.rows * shared; q++) {
      const word row = unit.row + q / shared, head = unit.head * shared + q % shared;
      if (takes(row, number))
        memcpy(partial + ((row * heads + head) * all + number) * width, mine.states + q * width, width * sizeof(float));
    }
  }
  void join_stretches(word row, word head, word all, float *partial) const {
    float *parts = partial + (row * heads + head) * all * width;
    const word from = first(row) / STRETCH;
    for (word number = from + 1; takes(row, number); number++)
      Given{parts + from * width, lanes}.join({parts + number * width, lanes});
    answer(row, head, {parts + from * width, lanes});
  }
};

// Rows that go through packed places together. Half of them where so few heads are not shared out evenly: packing twice
// takes less than a thread that waits.
inline word rows_together(const Pass &pass, word keyed) {
  const bool even = keyed % pass.threads == 0 || (pass.rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER * keyed >= 4 * pass.threads;
  return even || pass.rows < 6 ? ROWS_TOGETHER : std::min(ROWS_TOGETHER, (pass.rows + 1) / 2);
}

// Where groups of rows begin: of one slot, and few enough; and their end.
inline const std::vector<word> &groups(const Pass &pass, word keyed) {
  static thread_local std::vector<word> starts;
  const word most = rows_together(pass, keyed);
  starts.clear();
  for (word row = 0; row < pass.rows; row++)
    if (!row || pass.slot[row] != pass.slot[row - 1] || row - starts.back() == most) starts.push_back(row);
  starts.push_back(pass.rows);
  return starts;
}

// Whether stretches are shared out among the threads: where rows and heads alone would not go round.
inline bool splits(const Pass &pass, const Instr &op, word stretches) {
  return pass.threads > 1 && stretches > 1 && word(groups(pass, op.more[3]).size() - 1) * op.more[3] < 4 * pass.threads;
}

// Floats that all threads together need for what the stretches of an attention give.
inline word partial_size(const Pass &pass, const Instr &op) {
  const word stretches = (*std::max_element(pass.position, pass.position + pass.rows) + STRETCH) / STRETCH;
  return splits(pass, op, stretches) ? pass.rows * op.more[2] * stretches * ((op.more[5] + 15) / 16 * 16 + 16) : 0;
}

template <class T, class S> void attention(const Pass &pass, const Instr &op, Progress *progress, float *partial) {
  const Attention<T, S> whole(pass, op);
  const word keyed = whole.keyed;
  word from, to;
  const bool alone = pass.rows == 1; // then a head needs nothing but what it remembers itself
  word parts = cut(pass.rows * PART / 8, pass.rows, pass.threads);
  if (!alone)
    progress[0].run(parts, [&](word mine) {
      share(pass.rows, 1, mine, parts, from, to);
      for (word row = from; row < to; row++) remember<T, S>(pass, op, row, 0, keyed);
    });
  const word longest = *std::max_element(pass.position, pass.position + pass.rows) + 1;
  const word cost = pass.rows * keyed * longest * (S::bytes(whole.wide) + S::bytes(whole.deep));
  const std::vector<word> &starts = groups(pass, keyed);
  const word count = word(starts.size()) - 1, stretches = whole.stretches();
  auto unit = [&](word group, word head) {
    return whole.unit(starts[group], starts[group + 1] - starts[group], head);
  };
  if (!splits(pass, op, stretches)) {
    parts = cut(cost, count * keyed, pass.threads);
    progress[1].run(parts, [&](word mine) {
      share(count * keyed, 1, mine, parts, from, to);
      for (word i = from; i < to; i++) {
        if (alone) remember<T, S>(pass, op, 0, i, i + 1);
        whole.attend(unit(i / keyed, i % keyed));
      }
    });
    return;
  }
  const word units = count * keyed * stretches;
  parts = cut(cost, units, pass.threads);
  progress[1].run(parts, [&](word mine) {
    share(units, 1, mine, parts, from, to);
    for (word i = from; i < to; i++) {
      const word number = i % stretches, head = i / stretches % keyed;
      if (alone && number == stretches - 1) remember<T, S>(pass, op, 0, head, head + 1);
      whole.attend_stretch(unit(i / stretches / keyed, head), number, stretches, partial);
    }
  });
  parts = cut(pass.rows * whole.heads * stretches * whole.width * word(sizeof(float)), pass.rows * keyed, pass.threads);
  progress[2].run(parts, [&](word mine) {
    share(pass.rows * whole.heads, 1, mine, parts, from, to);
    for (word i = from; i < to; i++) whole.join_stretches(i / whole.heads, i % whole.heads, stretches, partial);
  });
}

} // namespace
