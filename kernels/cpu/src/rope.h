// One pass of RoPE with the KV store: what elementwise.cpp's tm_rope_store takes.
#pragma once

#include <cstdint>

namespace tokenmill {

struct Rope {
  const void* qkv;           // [tokens, (heads + kv_heads) * size + kv_heads * value_size]
  const float* cos;          // [any, half]
  const float* sin;
  const int64_t* positions;  // rows of cos and sin, or null: row t for token t
  const int64_t* slots;      // negative: nothing is stored
  void* k_cache;
  void* v_cache;
  void* query;               // [tokens, heads, size]
  const void* q_norm;        // [size] or null
  const void* k_norm;
  int64_t tokens;
  int64_t heads;
  int64_t kv_heads;          // 0: rows hold queries alone
  int64_t size;
  int64_t value_size;
  int64_t half;              // pairs that turn
  int64_t block_size;
  float eps;
  float offset;
  int32_t interleaved;
  int32_t value_norm;        // each value head gets an RMS norm without a weight
  int32_t type;

  int64_t width() const { return (heads + kv_heads) * size + kv_heads * value_size; }
};

}  // namespace tokenmill
