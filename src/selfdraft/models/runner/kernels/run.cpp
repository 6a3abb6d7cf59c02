// Runs a tape: a stock decoder's forward pass as a flat list of instructions (tape.py) in one call, on CPU threads.
//
// Every number of a row is computed in an order that depends on that row alone: dot products run through the inner
// dimension in order, each output in its own accumulator; sums of a row and attention go by the row's own places.
// So a row has the same bits whatever rows stand beside it, and with any number of threads.
//
// No headers of torch are used: the file compiles in seconds and does not depend on torch's version.

#include <vector>

#include <omp.h>

#include "attention.h"
#include "glue.h"
#include "linear.h"

extern "C" {

word selfdraft_sizes(word which) { return which == 0 ? sizeof(Instr) : which == 1 ? sizeof(Step) : sizeof(Pass); }

void selfdraft_run(const Step *steps, word count, const Instr *instrs, const Pass *given) {
  const Pass &pass = *given;
  std::vector<Progress> progress(3 * count); // an attention has three stages
  static thread_local std::vector<float> room;
  size_t wanted = 0;
  for (word s = 0; s < count; s++)
    if (steps[s].kind == ATTEND) wanted = std::max<size_t>(wanted, partial_size(pass, instrs[steps[s].first]));
  if (room.size() < wanted) room.resize(wanted);
  float *const partial = room.data();
#pragma omp parallel num_threads(pass.threads)
  {
    const int thread = omp_get_thread_num();
    for (word s = 0; s < count; s++) {
      const Step &step = steps[s];
      const Instr *ops = instrs + step.first;
      const word rows = step.answers ? pass.answers : pass.rows;
      Progress *mine = &progress[3 * s];
      if (!rows) continue;
      if (step.kind == LINEAR) linears(pass, ops, step.count, rows, *mine);
      else if (step.kind == ATTEND) {
        if (ops->a.type == BF16) (pass.coded ? attention<bf16, KvCoded> : attention<bf16, KvPlain<bf16>>)(pass, *ops, mine, partial);
        else (pass.coded ? attention<float, KvCoded> : attention<float, KvPlain<float>>)(pass, *ops, mine, partial);
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
