#pragma once
// What stands between the heavy steps: row by row, in float32, rounded to the type of the result

#include <vector>

#include "linear.h"

namespace {

enum Code : word {
  COPY, NEG, EXP, RSQRT, SQRT, TANH, SIGMOID, SILU, GELU, GELU_TANH, RELU, COS, SIN, ABS, SQUARE, RECIPROCAL,
  CUBE,
  ADD = 32, SUB, MUL, DIV, POW, MAXIMUM, MINIMUM,
  SUM = 64, MEAN, AMAX,
  LAYER_NORM = 80, RMS_NORM, EMBED, PICK, GATED, GLU, ROTARY
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
  case CUBE: EACH(x[i] * x[i] * x[i]);
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
    if (single) same = ::same(first);
  }
  INLINED v16 at(word i) const {
    return single ? same : narrow ? load16((const bf16 *)p + i) : load16((const float *)p + i);
  }
  // the first `count` of them
  v16 some(word i, word count) const {
    if (single) return same;
    return narrow ? load_part((const bf16 *)p + i, count) : load_part((const float *)p + i, count);
  }
  static INLINED void store(v16 v, char *to, word type, word i) {
    if (type == BF16) store16(v, (bf16 *)to + i);
    else store16(v, (float *)to + i);
  }
  static void store_some(v16 v, char *to, word type, word i, word count) {
    if (type == BF16) store_part(v, (bf16 *)to + i, count);
    else store_part(v, (float *)to + i, count);
  }
};

// Numbers that lie in order, all operands and the result being of type T.
template <class T> struct Line {
  const T *p;
  Line(const char *p, const Arg &) : p((const T *)p) {}
  INLINED v16 at(word i) const { return load16(p + i); }
  INLINED v16 some(word i, word count) const { return load_part(p + i, count); }
  static INLINED void store(v16 v, char *to, word, word i) { store16(v, (T *)to + i); }
  static INLINED void store_some(v16 v, char *to, word, word i, word count) { store_part(v, (T *)to + i, count); }
};

// Calls `go` with a null pointer to what reads the first `count` operands and writes the result.
template <class Go> inline void with_operands(const Instr &op, int count, const Go &go) {
  const Arg *const all[] = {&op.a, &op.b, &op.c};
  bool alike = op.out.step[3] == 1;
  for (int i = 0; i < count; i++) alike = alike && all[i]->type == op.out.type && all[i]->step[3] == 1;
  if (!alike) go((Source *)nullptr);
  else if (op.out.type == BF16) go((Line<bf16> *)nullptr);
  else go((Line<float> *)nullptr);
}

template <class F> inline word direct(const Instr &op, char *to, const Source &a, const Source &b, const F &f) {
  const word count = op.d[3] & ~word(15);
  for (word i = 0; i < count; i += 16) {
    Source::store(f(a.at(i), b.at(i)), to, op.out.type, i);
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
  case COPY: return direct(op, to, a, a, [](v16 x, v16) ALWAYS { return x; });
  case NEG: return direct(op, to, a, a, [](v16 x, v16) ALWAYS { return -x; });
  case SQUARE: return direct(op, to, a, a, [](v16 x, v16) ALWAYS { return x * x; });
  case ADD: return direct(op, to, a, b, [](v16 x, v16 y) ALWAYS { return x + y; });
  case SUB: return direct(op, to, a, b, [](v16 x, v16 y) ALWAYS { return x - y; });
  case MUL: return direct(op, to, a, b, [](v16 x, v16 y) ALWAYS { return x * y; });
  }
  return 0;
}

// `each` with the places of out, a, b and c for all dimensions but the innermost; operands that there are not stay null.
template <class F> inline void outer(const Instr &op, char *out, const char *a, const char *b, const char *c, const F &each) {
  const auto moved = [](const Arg &arg, word i, word j, word k) {
    return (i * arg.step[0] + j * arg.step[1] + k * arg.step[2]) * bytes(arg.type);
  };
  for (word i = 0; i < op.d[0]; i++)
    for (word j = 0; j < op.d[1]; j++)
      for (word k = 0; k < op.d[2]; k++)
        each(out + moved(op.out, i, j, k), a + moved(op.a, i, j, k), b ? b + moved(op.b, i, j, k) : nullptr,
             c ? c + moved(op.c, i, j, k) : nullptr);
}

// One operation on up to four dimensions, number by number.
void pointwise(const Instr &op, char *out, const char *a, const char *b) {
  float x[RUN], y[RUN], z[RUN];
  const bool two = op.code >= ADD;
  outer(op, out, a, two ? b : nullptr, nullptr, [&](char *to, const char *left, const char *right, const char *) {
    for (word at = directly(op, to, left, right); at < op.d[3]; at += RUN) {
      const word count = std::min(RUN, op.d[3] - at);
      const float *first = fetch(left + at * op.a.step[3] * bytes(op.a.type), op.a.type, op.a.step[3], count, x);
      if (two) {
        const float *second = fetch(right + at * op.b.step[3] * bytes(op.b.type), op.b.type, op.b.step[3], count, y);
        binary(op.code, first, second, z, count);
      } else unary(op.code, first, z, count);
      put(z, to + at * op.out.step[3] * bytes(op.out.type), op.out.type, op.out.step[3], count);
    }
  });
}

// `whole(first)` for every 16 numbers of `wide`, and `rest(first, count)` for what is left.
template <class F, class G> INLINED void by16(word wide, const F &whole, const G &rest) {
  word i = 0;
  for (; i + 16 <= wide; i += 16) whole(i);
  if (i < wide) rest(i, wide - i);
}

// sums + the numbers, sixteen at a time
inline v16 summed(const float *x, word count, v16 sums) {
  by16(count, [&](word n) ALWAYS { sums += load16(x + n); }, [&](word n, word rest) { sums += load_part(x + n, rest); });
  return sums;
}

// Sum, mean or largest of the innermost dimension.
void reduce(const Instr &op, char *out, const char *a) {
  outer(op, out, a, nullptr, nullptr, [&](char *to, const char *from, const char *, const char *) {
    float room[RUN], most = -INFINITY;
    v16 sums = {};
    for (word at = 0; at < op.d[3]; at += RUN) {
      const word count = std::min(RUN, op.d[3] - at);
      const float *x = fetch(from + at * op.a.step[3] * bytes(op.a.type), op.a.type, op.a.step[3], count, room);
      if (op.code == AMAX) for (word n = 0; n < count; n++) most = std::max(most, x[n]);
      else sums = summed(x, count, sums);
    }
    const float said = op.code == AMAX ? most : op.code == MEAN ? total(sums) / float(op.d[3]) : total(sums);
    put(&said, to, op.out.type, 1, 1);
  });
}

// Layer norm (b: weight, c: bias, both in order) of the innermost dimension; number[0] is epsilon.
void norm(const Instr &op, char *out, const char *a, const char *b, const char *c) {
  const word wide = op.d[3];
  static thread_local std::vector<float> xs, ws, bs;
  xs.resize(wide), ws.resize(wide), bs.resize(wide);
  const float *w = b ? fetch(b, op.b.type, 1, wide, ws.data()) : nullptr;
  const float *shift = c ? fetch(c, op.c.type, 1, wide, bs.data()) : nullptr;
  outer(op, out, a, nullptr, nullptr, [&](char *to, const char *from, const char *, const char *) {
    const float *x = fetch(from, op.a.type, op.a.step[3], wide, xs.data());
    const float mean = total(summed(x, wide, v16{})) / float(wide);
    v16 squares = {};
    const auto add = [&](v16 part) ALWAYS { squares += part * part; };
    by16(wide, [&](word n) ALWAYS { add(load16(x + n) - mean); },
         [&](word n, word count) {
           v16 part = load_part(x + n, count) - mean;
           for (word i = count; i < 16; i++) part[i] = 0.0f;
           add(part);
         });
    const float scale = 1.0f / std::sqrt(total(squares) / float(wide) + float(op.number[0]));
    float *y = xs.data();
    for (word n = 0; n < wide; n++)
      y[n] = (x[n] - mean) * scale * (w ? w[n] : 1.0f) + (shift ? shift[n] : 0.0f);
    put(y, to, op.out.type, op.out.step[3], wide);
  });
}

// What follows is several small operations in one pass over memory (fuse.py). Operands lie in order, or are one number
// for all (Source). more[0]: what stood between the operations is rounded to bfloat16.

// RMS norm of the innermost dimension, times a weight (b) if there is one; number[0] is epsilon.
void rms_norm(const Instr &op, char *out, const char *a, const char *b) {
  const word wide = op.d[3], type = op.out.type;
  const bool rounding = op.more[0];
  with_operands(op, b ? 2 : 1, [&](auto *kind) {
    typedef std::remove_pointer_t<decltype(kind)> K;
    outer(op, out, a, b, nullptr, [&](char *to, const char *from, const char *weights, const char *) {
      const K x(from, op.a), w(weights ? weights : from, weights ? op.b : op.a);
      v16 squares = {};
      const auto add = [&](v16 part) ALWAYS { squares += part * part; };
      by16(wide, [&](word i) ALWAYS { add(x.at(i)); }, [&](word i, word count) { add(x.some(i, count)); });
      const float scale = 1.0f / std::sqrt(total(squares) / float(wide) + float(op.number[0]));
      const auto scaled = [&](v16 part) ALWAYS { return rounding ? rounded16(part * scale) : part * scale; };
      by16(wide,
           [&](word i) ALWAYS { K::store(weights ? scaled(x.at(i)) * w.at(i) : scaled(x.at(i)), to, type, i); },
           [&](word i, word count) {
             const v16 y = scaled(x.some(i, count));
             K::store_some(weights ? y * w.some(i, count) : y, to, type, i, count);
           });
    });
  });
}

template <class F> void activated(const Instr &op, char *out, const char *a, const char *b, const F &activation) {
  const word type = op.out.type;
  const bool rounding = op.more[0];
  with_operands(op, 2, [&](auto *kind) {
    typedef std::remove_pointer_t<decltype(kind)> K;
    outer(op, out, a, b, nullptr, [&](char *to, const char *left, const char *right, const char *) {
      const K x(left, op.a), y(right, op.b);
      const auto gate = [&](v16 part) ALWAYS { return rounding ? rounded16(activation(part)) : activation(part); };
      by16(op.d[3], [&](word i) ALWAYS { K::store(gate(x.at(i)) * y.at(i), to, type, i); },
           [&](word i, word count) { K::store_some(gate(x.some(i, count)) * y.some(i, count), to, type, i, count); });
    });
  });
}

// activation(a) * b, the gated linear unit; more[1] is the code of the activation.
void glu(const Instr &op, char *out, const char *a, const char *b) {
  switch (op.more[1]) {
  case SILU: return activated(op, out, a, b, [](v16 x) ALWAYS { return silu16(x); });
  case GELU: return activated(op, out, a, b, [](v16 x) ALWAYS { return gelu16(x); });
  case GELU_TANH: return activated(op, out, a, b, [](v16 x) ALWAYS { return gelu_tanh16(x); });
  }
}

// x * cos + y * sin
INLINED v16 turn(v16 x, v16 cosine, v16 y, v16 sine, bool rounding) {
  return rounding ? rounded16(x * cosine) + rounded16(y * sine) : x * cosine + y * sine;
}

// The halves of a head turn against one another.
template <class K> INLINED void turn_halves(const Instr &op, char *to, const K &x, const K &cosine, const K &sine) {
  const word half = op.d[3] / 2, type = op.out.type;
  const bool rounding = op.more[0];
  by16(half,
       [&](word i) ALWAYS {
         const v16 low = x.at(i), high = x.at(half + i);
         K::store(turn(low, cosine.at(i), -high, sine.at(i), rounding), to, type, i);
         K::store(turn(high, cosine.at(half + i), low, sine.at(half + i), rounding), to, type, half + i);
       },
       [&](word i, word count) {
         const auto some = [&](const K &from, word first) { return from.some(first + i, count); };
         const v16 low = some(x, 0), high = some(x, half);
         const v16 first = turn(low, some(cosine, 0), -high, some(sine, 0), rounding);
         const v16 second = turn(high, some(cosine, half), low, some(sine, half), rounding);
         K::store_some(first, to, type, i, count);
         K::store_some(second, to, type, half + i, count);
       });
}

// Every number of a head turns against its neighbour.
inline void turn_pairs(const Instr &op, char *to, const Source &x, const Source &cosine, const Source &sine) {
  for (word i = 0; i < op.d[3]; i += 16) {
    const word count = std::min<word>(16, op.d[3] - i);
    const v16 straight = x.some(i, count);
    v16 turned;
    for (int n = 0; n < 16; n += 2) turned[n] = -straight[n + 1], turned[n + 1] = straight[n];
    const v16 said = turn(straight, cosine.some(i, count), turned, sine.some(i, count), op.more[0]);
    Source::store_some(said, to, op.out.type, i, count);
  }
}

// Rotary embedding of every head a by cosines b and sines c: its two halves turn against one another, or with more[1]
// every number and its neighbour.
void rotary(const Instr &op, char *out, const char *a, const char *b, const char *c) {
  const bool pairs = op.more[1];
  if (pairs)
    return outer(op, out, a, b, c, [&](char *to, const char *from, const char *cosines, const char *sines) {
      turn_pairs(op, to, Source(from, op.a), Source(cosines, op.b), Source(sines, op.c));
    });
  with_operands(op, 3, [&](auto *kind) {
    typedef std::remove_pointer_t<decltype(kind)> K;
    outer(op, out, a, b, c, [&](char *to, const char *from, const char *cosines, const char *sines) {
      turn_halves(op, to, K(from, op.a), K(cosines, op.b), K(sines, op.c));
    });
  });
}

// out = a, and on rows whose gate is open + up(down(b)); more = {down [rank, wide], up [deep, rank], wide, rank, gate},
// both packed.
template <class T> void gated(const Pass &pass, const Instr &op, word row, char *out, const char *a, const char *b) {
  const word wide = op.more[2], rank = op.more[3], deep = op.d[3];
  if (!((const word *)pass.slots[op.more[4]])[row]) {
    memcpy(out, a, deep * sizeof(T));
    return;
  }
  static thread_local std::vector<T> middle, more;
  middle.resize(rank), more.resize(deep);
  product_of_row<T>((const char *)op.more[0], (const T *)b, wide, rank, middle.data());
  product_of_row<T>((const char *)op.more[1], middle.data(), rank, deep, more.data());
  for (word i = 0; i < deep; i++) narrow(widen(((const T *)a)[i]) + widen(more[i]), ((T *)out)[i]);
}

// A row of a table: more = {table, numbers of a row, rows, format}; format -1: row after row, else packed. What is not in
// it becomes NaN, which nobody takes for an answer.
template <class T> void embed(const Instr &op, char *out, word id) {
  const word wide = op.more[1];
  if (id < 0 || id >= op.more[2]) memset(out, 0xff, wide * sizeof(T));
  else if (op.more[3] < 0) memcpy(out, (const T *)op.more[0] + id * wide, wide * sizeof(T));
  else unpack<T>(op.more[3], (const char *)op.more[0], wide, id, (T *)out);
}

// What an instruction costs a row, in bytes that could be read from memory meanwhile: 0.44 ns for a number of a norm and
// of a sum, 1.6 of a gate, where two threads read 25 bytes in 1 ns (AVX2; docs/log.md, "Vectors of 16").
inline word glue_cost(const Instr &op) {
  const word numbers = op.d[0] * op.d[1] * op.d[2] * op.d[3];
  return PART / 64 + numbers * (op.code == GLU ? 40 : 12);
}

void glue(const Pass &pass, const Instr &op, word row, int thread) {
  char *out = at(pass, op.out, row, thread);
  const char *a = at(pass, op.a, row, thread), *b = at(pass, op.b, row, thread), *c = at(pass, op.c, row, thread);
  switch (op.code) {
  case LAYER_NORM: return norm(op, out, a, b, c);
  case RMS_NORM: return rms_norm(op, out, a, b);
  case GLU: return glu(op, out, a, b);
  case ROTARY: return rotary(op, out, a, b, c);
  case SUM:
  case MEAN:
  case AMAX: return reduce(op, out, a);
  case EMBED:
    return op.out.type == BF16 ? embed<bf16>(op, out, *(const word *)a) : embed<float>(op, out, *(const word *)a);
  case PICK: memcpy(out, at(pass, op.a, *(const word *)b, 0), op.more[1]); return;
  case GATED: return op.a.type == BF16 ? gated<bf16>(pass, op, row, out, a, b) : gated<float>(pass, op, row, out, a, b);
  default: pointwise(op, out, a, b);
  }
}

} // namespace
