#pragma once
// Linear layers: rows are staged in chunks, and every thread takes groups of outputs through all chunks

#include <vector>

#include "products.h"
#include "tape.h"

namespace {

// The fields of a linear instruction: its code is 0 for floats and else that of a format.
struct Layer {
  const char *weights, *bias;
  word outputs, inputs, code;
  explicit Layer(const Instr &op)
      : weights((const char *)op.more[0]), bias((const char *)op.more[1]), outputs(op.more[2]), inputs(op.more[3]),
        code(op.code) {}
};

// Rows of a chunk: all alike, and a number for which there is a kernel.
inline word chunk_of(word rows, word most) {
  const word even = ceiling(rows, ceiling(rows, most));
  for (word size : {1, 2, 3, 4, 6, 8, 10, 12})
    if (even <= size) return std::min(size, most);
  return most;
}

template <int R> using Rows = std::integral_constant<int, R>;
template <class Go> inline void with_rows(word rows, const Go &go) {
  switch (rows) {
  case 1: return go(Rows<1>());
  case 2: return go(Rows<2>());
  case 3: return go(Rows<3>());
  case 4: return go(Rows<4>());
#if defined(__AVX2__)
  case 6: return go(Rows<6>());
  case 8: return go(Rows<8>());
  case 10: return go(Rows<10>());
  case 12: return go(Rows<12>());
#endif
#if defined(BF16_PAIRS)
  case 14: return go(Rows<14>());
#endif
  }
}

// Where rows stand ready: floats of all chunks, and behind them the rounded ones.
struct Stage {
  char *floats, *blocks;
  word chunk;
};

// Puts the sums of one group of outputs where they belong.
template <class T> INLINED void finish(v16 acc, const Layer &layer, word n, char *Y) {
  const word wide = std::min(LANES, layer.outputs - n);
  const T *bias = (const T *)layer.bias;
  if (wide == LANES) {
    if (bias) acc += load16(bias + n);
    store16(acc, (T *)Y + n);
  } else {
    if (bias) acc += load_part(bias + n, wide);
    T said[LANES];
    store16(acc, said);
    memcpy((T *)Y + n, said, wide * sizeof(T));
  }
}

// The same as a call: products of blocks are many functions, and each with it inside would take a compiler longer.
template <class T> __attribute__((noinline)) void finish_called(const v16 &acc, const Layer &layer, word n, char *Y) {
  finish<T>(acc, layer, n, Y);
}

// What walk `chunk` of `chunks` through a group fetches. A single one fetches what it will read itself, a little later; of
// several only the first has to wait for memory, so all of them fetch the next group together: memory is never idle.
inline Fetch ahead_of(const char *group, word bytes, word chunk, word chunks, bool first) {
  const word step = 64 * VECTORS;
  if (chunks == 1 || (first && !chunk)) return {group + AHEAD, step};
  const word walks = chunks - first, walk = chunk - first; // nobody has fetched the first group
  return {group + bytes + bytes / walks * walk, step / walks};
}

// Groups from .. to of a layer of floats, for all rows.
template <class T, int R>
void float_products(const Layer &layer, const Stage &stage, char *Y, word y_row, word rows, word from, word to) {
  const word bytes = float_group<T>(layer.inputs), row = staged_floats<T>(layer.inputs);
  const word chunks = ceiling(rows, R);
  for (word g = from; g < to; g++)
    for (word first = 0; first < rows; first += R) {
      v16 acc[VECTORS][R];
      const char *const group = layer.weights + g * bytes;
      float_group_sums<T, R>(group, stage.floats + first * row, layer.inputs,
                             ahead_of(group, bytes, first / R, chunks, g == from), acc);
      for (word v = 0; v < VECTORS && (g * VECTORS + v) * LANES < layer.outputs; v++)
        for (word r = 0; r < std::min<word>(R, rows - first); r++)
          finish<T>(acc[v][r], layer, (g * VECTORS + v) * LANES, Y + (first + r) * y_row);
    }
}

// Groups from .. to of a layer of block weights, for all rows.
template <class T, int CODE, int R>
void block_products(const Layer &layer, const Stage &stage, char *Y, word y_row, word rows, word from, word to) {
  const word bytes = ceiling(layer.inputs, UNIT) * Format<CODE>::unit, row = staged_blocks(layer.inputs);
  for (word g = from; g < to; g++)
    for (word first = 0; first < rows; first += R) {
      v16 acc[R] = {};
      block_group<CODE, R>(layer.weights + g * bytes, stage.blocks + first * row, layer.inputs, acc);
      for (word r = 0; r < std::min<word>(R, rows - first); r++)
        finish_called<T>(acc[r], layer, g * LANES, Y + (first + r) * y_row);
    }
}

template <class T>
void products(const Layer &layer, const Stage &stage, char *Y, word y_row, word rows, word from, word to) {
  with_rows(stage.chunk, [&](auto chunk) {
    constexpr int R = decltype(chunk)::value;
    if (!layer.code) float_products<T, R>(layer, stage, Y, y_row, rows, from, to);
    else if constexpr (R <= MOST_BLOCKS)
      with_format(layer.code, [&](auto is) {
        block_products<T, decltype(is)::value, R>(layer, stage, Y, y_row, rows, from, to);
      });
  });
}

// Units from .. to of all rows, counted through the chunks; what no row stands for is zeros.
template <class T>
void stage_rows(const Stage &stage, const char *X, word x_row, word rows, word K, bool floats, bool blocks, word from,
                word to) {
  typedef typename Pack<T>::staged S;
  static const T nothing[UNIT] = {};
  const word units = ceiling(K, UNIT), R = stage.chunk;
  for (word at = from; at < to; at++) {
    const word chunk = at / units, first = at % units * UNIT;
    for (word r = 0; r < R; r++) {
      const word row = chunk * R + r;
      const bool real = row < rows;
      const T *x = real ? (const T *)(X + row * x_row) + first : nothing;
      char *unit = stage.floats + chunk * R * staged_floats<T>(K) + (first * R + r * UNIT) * sizeof(S);
      if (floats) stage_floats<T>(x, K - first, unit);
      if (blocks)
        stage_blocks<T>(x, K - first, r, R, stage.blocks + chunk * R * staged_blocks(K) + first / BLOCK * R * STAGED);
    }
  }
}

// A single row of floats lies as it has to already.
template <class T> inline bool lies(word rows, word K) {
  return rows == 1 && sizeof(typename Pack<T>::staged) == sizeof(T) && K % Pack<T>::inputs == 0;
}

inline word groups_of(const Instr &op) { return ceiling(op.more[2], width_of(op.code)); }

// Layers of one step read the same rows; their outputs are shared out as if they were one.
template <class T> void linears(const Pass &pass, const Instr *ops, word count, word rows, int thread, Progress *progress) {
  const word K = ops[0].more[3], units = ceiling(K, UNIT);
  const char *X = at(pass, ops[0].a, 0, 0);
  word all = 0, cost = 0;
  bool floats = false, blocks = false;
  for (word i = 0; i < count; i++) {
    all += groups_of(ops[i]);
    cost += groups_of(ops[i]) * group_bytes<T>(ops[i].code, K);
    (ops[i].code ? blocks : floats) = true;
  }
  Stage stage{nullptr, nullptr, chunk_of(rows, blocks ? MOST_BLOCKS : MOST)};
  const word chunks = ceiling(rows, stage.chunk);
  const bool alone = rows <= 2; // then it is quicker to stage for oneself than to meet
  char *room = pass.stage + (alone ? 0 : pass.threads * 2) * pass.stage_bytes;
  if (alone) room += thread * 2 * pass.stage_bytes;
  stage.floats = lies<T>(rows, K) ? (char *)X : room;
  stage.blocks = room + (floats ? chunks * stage.chunk * staged_floats<T>(K) : 0);
  floats = floats && stage.floats == room;
  const auto ready = [&](word from, word to) {
    stage_rows<T>(stage, X, ops[0].a.row, rows, K, floats, blocks, from, to);
  };
  if (!alone) {
    const word parts = cut(rows * K * 64, chunks * units, pass.threads);
    progress[0].run(parts, [&](word mine) {
      word from, to;
      share(chunks * units, 1, mine, parts, from, to);
      ready(from, to);
    });
  }
  bool waiting = alone && (floats || blocks);
  const word parts = cut(cost * ceiling(rows, 4), all, pass.threads, 2); // long streams are read faster than short ones
  progress[1].run(parts, [&](word mine) {
    if (waiting) ready(0, units);
    waiting = false;
    word from, to;
    share(all, 1, mine, parts, from, to);
    for (word i = 0; i < count; i++) {
      const word groups = groups_of(ops[i]), first = std::max<word>(0, from), last = std::min(groups, to);
      if (first < last)
        products<T>(Layer(ops[i]), stage, at(pass, ops[i].out, 0, 0), ops[i].out.row, rows, first, last);
      from -= groups, to -= groups;
    }
  });
}

// y = the product of one row with packed floats.
template <class T> void product_of_row(const char *weights, const T *x, word K, word N, T *y) {
  static thread_local std::vector<typename Pack<T>::staged> room;
  Layer layer{Instr{}};
  layer.weights = weights, layer.outputs = N, layer.inputs = K;
  Stage stage{(char *)x, nullptr, 1};
  if (!lies<T>(1, K)) {
    room.resize(ceiling(K, UNIT) * UNIT);
    stage.floats = (char *)room.data();
    for (word k = 0; k < K; k += UNIT) stage_floats<T>(x + k, K - k, (char *)(room.data() + k));
  }
  const word groups = ceiling(N, width_of(0));
  word first = 0;
#if !defined(OWN_FLOATS)
  const word bytes = float_group<T>(K);
  for (; first + BESIDE <= groups; first += BESIDE) {
    v16 acc[BESIDE][VECTORS][1];
    float_groups_of_row<T>(weights + first * bytes, bytes, stage.floats, K, acc);
    for (word g = 0; g < BESIDE; g++)
      for (word v = 0; v < VECTORS; v++)
        if (const word n = ((first + g) * VECTORS + v) * LANES; n < N) finish<T>(acc[g][v][0], layer, n, (char *)y);
  }
#endif
  float_products<T, 1>(layer, stage, (char *)y, 0, 1, first, groups);
}

} // namespace
