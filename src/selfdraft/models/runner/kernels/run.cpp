// Runs a tape: a stock decoder's forward pass as a flat list of instructions (tape.py) in one call, on CPU threads.
//
// Every number of a row is computed in an order that depends on that row alone: dot products run through the inner
// dimension in order, each output in its own accumulator; sums of a row and attention go by the row's own places.
// So a row has the same bits whatever rows stand beside it, and with any number of threads.
//
// No headers of torch are used: the file compiles in seconds and does not depend on torch's version.

#include <vector>

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

// A product and a sum are rounded once. GCC does it unasked; a flag would make clang deaf to headers that forbid it.
#if defined(__clang__)
#pragma clang fp contract(fast)
#endif

#include "attention.h"
#include "draw.h"
#include "glue.h"
#include "likeliest.h"
#include "linear.h"
#include "link.h"
#include "pinning.h"
#include "quantise.h"

extern "C" {

// What tape.py and runner.py count with, too.
word selfdraft_sizes(word which) {
  const word sizes[] = {sizeof(Instr), sizeof(Step), sizeof(Pass), UNIT, UNIT / BLOCK * STAGED, MOST};
  return sizes[which];
}

const char *selfdraft_instructions() {
#if defined(BF16_PAIRS)
  return "AVX-512 VNNI BF16";
#elif defined(__AVX512VNNI__)
  return "AVX-512 VNNI";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVXVNNI__)
  return "AVX2 VNNI";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_FEATURE_DOTPROD)
  return "NEON with dot product";
#else
  return "generic";
#endif
}

void selfdraft_run(const Step *steps, word count, const Instr *instrs, const Pass *given) {
  const Pass &pass = *given;
  std::vector<Progress> progress(3 * count); // a step has at most three stages
  const pinning::Places places(int(pass.threads));
  static thread_local std::vector<float> room;
  size_t wanted = 0;
  for (word s = 0; s < count; s++)
    if (steps[s].kind == ATTEND) wanted = std::max<size_t>(wanted, partial_size(pass, instrs[steps[s].first]));
  if (room.size() < wanted) room.resize(wanted);
  float *const partial = room.data();
#pragma omp parallel num_threads(pass.threads)
  {
    const int thread = omp_get_thread_num();
    places.enter(thread);
    for (word s = 0; s < count; s++) {
      const Step &step = steps[s];
      const Instr *ops = instrs + step.first;
      const word rows = step.answers ? pass.answers : pass.rows;
      Progress *mine = &progress[3 * s];
      if (!rows) continue;
      if (step.kind == LINEAR) {
        if (ops->a.type == BF16) linears<bf16>(pass, ops, step.count, rows, thread, mine);
        else linears<float>(pass, ops, step.count, rows, thread, mine);
      }
      else if (step.kind == ATTEND) {
        if (ops->a.type == BF16) (pass.coded ? attention<bf16, KvCoded> : attention<bf16, KvPlain<bf16>>)(pass, *ops, mine, partial);
        else (pass.coded ? attention<float, KvCoded> : attention<float, KvPlain<float>>)(pass, *ops, mine, partial);
      } else {
        word cost = 0;
        for (word i = 0; i < step.count; i++) cost += glue_cost(ops[i]);
        const word parts = cut(rows * cost, rows, pass.threads);
        mine->run(parts, [&](word part) {
          word from, to;
          share(rows, 1, part, parts, from, to);
          for (word row = from; row < to; row++)
            for (word i = 0; i < step.count; i++) glue(pass, ops[i], row, thread);
        });
      }
    }
  }
  places.leave();
}
// Packs floats [N, K] of a type, steps in elements, into memory that `selfdraft_packed_bytes` says the size of.
void selfdraft_pack(word type, const void *from, word N, word K, word n_step, word k_step, void *to, word threads) {
  const word groups = ceiling(N, width_of(0));
#pragma omp parallel for num_threads(threads)
  for (word g = 0; g < groups; g++) {
    if (type == BF16) pack_floats<bf16>((const bf16 *)from, N, K, n_step, k_step, (char *)to, g);
    else pack_floats<float>((const float *)from, N, K, n_step, k_step, (char *)to, g);
  }
}
word selfdraft_packed_bytes(word type, word code, word N, word K) {
  return ceiling(N, width_of(code)) * (type == BF16 ? group_bytes<bf16>(code, K) : group_bytes<float>(code, K));
}
// Pages of a mapped file leave memory until they are read again.
void selfdraft_forget(char *from, word bytes) {
#if defined(__linux__)
  const word page = sysconf(_SC_PAGESIZE), first = ceiling(word(from), page) * page, last = word(from + bytes) / page * page;
  if (first < last) madvise((void *)first, last - first, MADV_DONTNEED);
#endif
}

// How threads are placed from the next pass on, in the whole process: 1 pinned to cores of their own, 0 as the system
// likes.
void selfdraft_pin(word on) { pinning::wanted = on != 0; }

// Ids of a row of scores among which is the one that its noise lifts to the top, and how many they are: `best` is the
// largest score, `key` that of the noise. Only `most` of them are written down.
word selfdraft_contenders(const float *scores, word count, uint64_t key, float best, word *found, word most) {
  return draw::contenders(scores, count, key, best, found, most);
}

// The `most` likeliest tokens of rows [count, vocab], each `step` bytes behind the one before: values and ids
// [count, most]. A row that holds NaN has -1 as its first id.
void selfdraft_likeliest(word type, const char *rows, word count, word vocab, word step, word most, double *values,
                         word *ids) {
  for (word row = 0; row < count; row++, rows += step, values += most, ids += most) {
    if (type == BF16) likeliest::of_row((const int16_t *)rows, vocab, most, values, ids);
    else likeliest::of_row((const int32_t *)rows, vocab, most, values, ids);
  }
}

// What a token adds to what the output layer is given: `state` [wide], floats. `row`: its embedding.
void selfdraft_link_state(word type, const void *row, word wide, word link, const void *down, const void *up, word rank,
                          float epsilon, float *state) {
  const auto go = [&](auto *from, auto *kind) {
    typedef std::remove_pointer_t<decltype(kind)> L;
    masks::link_state(from, wide, (const L *)down, (const L *)up, rank, epsilon, state);
  };
  const auto with = [&](auto *kind) { type == BF16 ? go((const bf16 *)row, kind) : go((const float *)row, kind); };
  link == BF16 ? with((bf16 *)nullptr) : with((float *)nullptr);
}

// The dot products of `state` with rows `ids` of a table [*, wide].
void selfdraft_picked(word type, const void *table, word wide, const word *ids, word count, const float *state,
                      float *said) {
  if (type == BF16) masks::picked((const bf16 *)table, wide, ids, count, state, said);
  else masks::picked((const float *)table, wide, ids, count, state, said);
}

// Blocks of 32 weights as codes of 4 bits, a byte each, with scales and minima, in half precision if `halves`.
void selfdraft_four(const float *weights, word blocks, word halves, uint8_t *codes, float *scales, float *mins) {
  quantise::four(weights, blocks, halves != 0, codes, scales, mins);
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
