// Layers that carry a state: a causal convolution, a recurrence over matrices, and the norm behind it.
//
//   x [T, width] ─▶ convolution ─▶ [q | k | v] ─▶ recurrence ─▶ gated norm
//                   past [L, K - 1, C]             state [L, H, D, E] float32
//
// Tokens of a sequence are taken one after the other, so that its bits don't depend on how they come.
#pragma once

#include <cstdint>

namespace tokenmill {

// What recurrent.py fills in.
struct Conv {
  const float* weight;  // [K, C]
  const float* bias;    // [C], or null
  int64_t channels;
  int64_t taps;
  int64_t width;  // elements of a row of x
  int32_t activation;
  int32_t gated;  // rows are [a | b | c]: b * conv(a * c)
};

struct Recurrence {
  const float* rate;       // [H]
  const float* step_bias;  // [H]
  const float* skip;       // [H], or null
  int64_t key_heads;
  int64_t heads;
  int64_t key_size;
  int64_t value_size;
  float strength;
  float least;
  int32_t delta;

  int64_t width() const { return 2 * key_heads * key_size + heads * value_size; }
  int64_t gates() const { return delta ? 2 * heads : heads; }
};

struct GatedNorm {
  const float* weight;
  int64_t weights;  // how many there are: of one part, or of a whole row
  int64_t size;
  float eps;
  int32_t gate_first;
};

// Whose tokens a step's are.
struct Sequences {
  const int64_t* lines;
  const int32_t* seq_lens;
  const int32_t* query_start;
  int64_t count;
};

}  // namespace tokenmill
