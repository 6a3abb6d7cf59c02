// One layer of block weights in a process of its own, for processors that only an emulator runs (test_kernels_built.py)
//
// Reads whole numbers (code, outputs, inputs, rows), packed weights and rows of float32 from the first file, and writes the
// sums to the second.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../src/selfdraft/models/runner/kernels/linear.h"

int main(int, char **names) {
  FILE *in = fopen(names[1], "rb"), *out = fopen(names[2], "wb");
  word head[4];
  if (!in || !out || fread(head, 8, 4, in) != 4) return 1;
  Layer layer{Instr{}};
  layer.code = head[0], layer.outputs = head[1], layer.inputs = head[2];
  const word rows = head[3], groups = ceiling(layer.outputs, LANES), bytes = groups * group_bytes<float>(layer.code, layer.inputs);
  void *weights = aligned_alloc(64, bytes + AHEAD);
  std::vector<float> x(rows * layer.inputs), y(rows * layer.outputs);
  if (fread(weights, 1, bytes, in) != size_t(bytes) || fread(x.data(), 4, x.size(), in) != x.size()) return 1;
  layer.weights = (const char *)weights;
  Stage stage{nullptr, nullptr, chunk_of(rows, MOST_BLOCKS)};
  const word chunks = ceiling(rows, stage.chunk);
  std::vector<char> room(chunks * stage.chunk * staged_blocks(layer.inputs));
  stage.blocks = room.data();
  stage_rows<float>(stage, (const char *)x.data(), layer.inputs * 4, rows, layer.inputs, false, true, 0,
                    chunks * ceiling(layer.inputs, UNIT));
  products<float>(layer, stage, (char *)y.data(), layer.outputs * 4, rows, 0, groups);
  fwrite(y.data(), 4, y.size(), out);
  return fclose(out);
}
