// The matrix unit of Intel processors (AMX-BF16): 8 tile registers of 16 rows x 64 bytes.
//
// A product of R <= 32 rows with one pair of packed columns uses
//   0 1   sums of rows 0..15  for columns 0..15, 16..31       4  rows 0..15 of x
//   2 3   sums of rows 16..31, the same                       5  rows 16..31 of x        6 7  the weight's tiles
// TDPBF16PS adds the 16 pairs of K in order into each float32 sum and keeps rows apart, so a row's result does
// not depend on how many rows share the tile.
#pragma once

#if defined(__AMX_BF16__)

#include <immintrin.h>

#include "operand.h"

namespace tokenmill {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What was stored is in memory before the tiles are loaded: gcc's intrinsics name the address only, so it may put
// off, or drop, stores that nothing else reads.
TM_INLINE void tile_fence(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

inline void load_config(const TileConfig& config) {
  tile_fence(&config);
  _tile_loadconfig(&config);
}

// Shapes the tiles for `rows` (1 .. 32) rows of x; tile registers are zero afterwards.
inline void configure_tiles(int rows) {
  TileConfig config;
  int first = rows < 16 ? rows : 16;
  int second = rows > 16 ? rows - 16 : first;
  const int height[8] = {first, first, second, second, first, second, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.column_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(height[i]);
  }
  load_config(config);
}

// sums [rows][32] += (or =, when `fresh`) x [rows][steps * 32] times a pair's steps, each where weight(step) says. The
// tiles must be configured for `rows`. `between(k)` runs beside step k: vector instructions cost next to nothing in the
// shadow of the matrix unit. More than 16 rows come by (TILELOADDT1): the nearest cache can't hold them beside weights.
template <class Weight, class Between>
TM_INLINE void amx_product(const Inputs<bf16>& x, const Weight& weight, int64_t steps, int rows, float* sums,
                           bool fresh, const Between& between) {
  constexpr int kLine = kPair * 4;
  tile_fence(x.at);
  tile_fence(sums);
  const int64_t row_bytes = x.row * 2, next = x.step;
  const bf16* upper = x.at;
  float* lower = sums + 16 * kPair;
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kLine);
    _tile_loadd(1, sums + 16, kLine);
    if (rows > 16) {
      _tile_loadd(2, lower, kLine);
      _tile_loadd(3, lower + 16, kLine);
    }
  }
  if (rows <= 16) {
    for (int64_t k = 0; k < steps; ++k, upper += next) {
      _tile_loadd(4, upper, row_bytes);
      _tile_loadd(6, weight(k), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weight(k) + kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
      between(k);
    }
  } else {
    const bf16* below = upper + 16 * x.row;
    for (int64_t k = 0; k < steps; ++k, upper += next, below += next) {
      between(k);
      _tile_stream_loadd(4, upper, row_bytes);
      _tile_loadd(6, weight(k), 64);
      _tile_stream_loadd(5, below, row_bytes);
      _tile_loadd(7, weight(k) + kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, lower, kLine);
    _tile_stored(3, lower + 16, kLine);
  }
  _tile_stored(0, sums, kLine);
  _tile_stored(1, sums + 16, kLine);
}

}  // namespace tokenmill

#endif
