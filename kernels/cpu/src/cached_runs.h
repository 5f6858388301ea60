// Runs of a tiled cache's tokens (cache_layout.h) as attention's tiles come by them.
#pragma once

#include "attention.h"
#include "cache_layout.h"

namespace tokenmill {

// The cache's rows at which runs of tokens [start, end) begin, `most` at the most; returns how many there are.
inline int locate_runs(const RowBlock& block, int64_t start, int64_t end, int most, int64_t* places) {
  const Attention& p = block.problem;
  const int32_t* table = p.block_table + block.sequence * p.table_width;
  int count = 0;
  for (; count < most && start < end; ++count, start += kCacheStep) {
    places[count] = (table[start / p.block_size] * p.kv_heads + block.kv_head) * p.block_size + start % p.block_size;
  }
  return count;
}

// A copy of a run's values, zero from token `left` on: what lies there is somebody else's, or nothing.
inline const bf16* without_strangers(const bf16* values, int left, int64_t size, bf16* copy) {
  const int64_t whole = left / 2 * 2 * size;
  std::memcpy(copy, values, static_cast<size_t>(whole) * 2);
  std::memset(copy + whole, 0, static_cast<size_t>(kCacheStep * size - whole) * 2);
  if (left % 2) {
    for (int64_t e = whole; e < whole + 2 * size; e += 2) copy[e] = values[e];
  }
  return copy;
}

// Asks for a run of keys or values.
TM_INLINE void ask_for_run(const bf16* run, int64_t size) {
  for (int64_t i = 0; i < kCacheStep * size; i += 32) __builtin_prefetch(run + i, 0, 3);
}

}  // namespace tokenmill
