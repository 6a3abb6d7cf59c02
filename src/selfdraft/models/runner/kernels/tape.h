#pragma once
// The tape, as tape.py writes it: all fields are 64-bit words

#include <atomic>
#include <sched.h>

#include "numbers.h"

namespace {

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
  char *stage;      // rows as products take them: twice stage_bytes for each thread and then for each row of all chunks
  word stage_bytes; // of one row
  word coded; // keys and values lie in the cache as codes of 8 bits
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

// Into how many parts to cut work of `cost` bytes read, which consists of `most` things: enough to go round, none so small
// that taking it costs more, about `each` for a thread, and equal ones where that can be.
inline word cut(word cost, word most, word threads, word each = PARTS) {
  if (threads == 1) return 1;
  word parts = std::min({cost / PART, most, each * threads});
  if (parts <= threads) return std::max<word>(1, parts);
  parts = parts / threads * threads; // or one thread waits for the last part of another
  for (word equal = parts; 2 * equal >= parts && equal >= threads; equal -= threads)
    if (most % equal == 0) return equal;
  return parts;
}

} // namespace
