// How the keys and values of a block lie in the paged cache.
//
//   plain   k [S][D]                       v [S][E]                      as the tensors' shapes say
//   tiled   k [S / 32][2][D / 2][16][2]    v [S / 2][E][2]               as products take a pair of columns
//
// Tiled, a group of 16 keys and a run of tokens' values are operands of the matrix unit, or of vectors of 16 columns,
// as they lie there, so that attention moves no key and no value before it multiplies. Whole blocks are copied alike in
// either.
//
// Of 32 tokens a group takes the first or the last 16. For the matrix unit it takes every other four, 0-3 8-11 16-19
// 24-27 and the rest: two rows of scores narrowed to 16 bits and joined, which vector units do by lanes of 128 bits,
// are then in the tokens' order.
#pragma once

#include "api.h"
#include "packed.h"

namespace tokenmill {

constexpr int kCacheStep = 32;  // tokens of a block that lie together: two groups of keys

inline bool tiled_cache(int type, int64_t key_size, int64_t value_size, int64_t block_size) {
  return type == kTypeBf16 && key_size % kStep == 0 && value_size % 16 == 0 && block_size % kCacheStep == 0;
}

#if defined(__AMX_BF16__)
constexpr int64_t kRunOfGroup = 4;  // tokens of a group that follow each other

// The tokens, counted from a run's first, whose keys are the columns of its group `group`.
TM_INLINE I tokens_of_group(int group) { return lane_index() + (lane_index() & splat(12)) + splat(4 * group); }
#else
constexpr int64_t kRunOfGroup = 16;
#endif

// Puts the key of a block's token `place` where it belongs; `block` is the block's keys of one head.
TM_INLINE void store_tiled_key(bf16* block, int64_t place, const bf16* key, int64_t size) {
  const int64_t token = place % kCacheStep, run = token / kRunOfGroup;
  const int64_t group = run % 2, column = run / 2 * kRunOfGroup + token % kRunOfGroup;
  bf16* to = block + (place - token + group * 16) * size + column * 2;
  for (int64_t d = 0; d < size; d += 2) std::memcpy(to + d * 16, key + d, 4);
}

// The same for a value. Only the token's own halves of the lines are written: its neighbour may be at work on the
// others.
TM_INLINE void store_tiled_value(bf16* block, int64_t place, const bf16* value, int64_t size) {
  bf16* to = block + place / 2 * 2 * size;
#if defined(__AVX512BW__)
  const __mmask32 own = place % 2 ? 0xAAAAAAAAu : 0x55555555u;
  for (int64_t e = 0; e < size; e += 16) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + e)));
    if (place % 2) wide = _mm512_slli_epi32(wide, 16);
    _mm512_mask_storeu_epi16(to + e * 2, own, wide);
  }
#else
  for (int64_t e = 0; e < size; ++e) to[e * 2 + place % 2] = value[e];
#endif
}

}  // namespace tokenmill
