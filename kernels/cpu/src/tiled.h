// How the rows that pass between a tape's operations lie in memory.
//
//   plain   [rows][width]
//   tiled   [rows / 32][width / 32][32 rows][32]   operands of the matrix unit as they lie there
//
// Tiled, what a product reads is one stream, whatever the width, where plain rows of several KiB lie pages apart. How
// much that is worth is measured in bench/NOTES.md.
#pragma once

#include <cstdint>

namespace tokenmill {

constexpr int kTileRows = 32;
constexpr int kTileColumns = 32;

// Elements from the first of a matrix to one in row `row`; `column` in its tile goes on from there.
struct Layout {
  int64_t width;
  bool tiled;

  int64_t at(int64_t row, int64_t column) const {
    if (!tiled) return row * width + column;
    const int64_t tile = row / kTileRows * (width / kTileColumns) + column / kTileColumns;
    return (tile * kTileRows + row % kTileRows) * kTileColumns + column % kTileColumns;
  }
  // From a row to the next one of its block of 32.
  int64_t row_step() const { return tiled ? kTileColumns : width; }
};

// Whether rows that only products read lie tiled: `rows` of them, two bytes an element.
inline bool tiles_rows(int64_t rows) {
#if defined(__AMX_BF16__)
  return rows > kTileRows / 2;  // the matrix unit's one operand holds fewer, and they stay in the nearest cache
#else
  (void)rows;
  return false;
#endif
}

}  // namespace tokenmill
