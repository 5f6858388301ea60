// x as the products read it: of their element type, padded with zeros to whole steps.
#pragma once

#include <type_traits>

#include "packed.h"
#include "threads.h"
#include "tiled.h"

namespace tokenmill {

constexpr int kBlock = kTileRows;  // rows that share one pass over a pair

// A block of rows from some step on.
template <class T>
struct Inputs {
  const T* at;
  int64_t row;   // elements between rows
  int64_t step;  // elements between steps, kStep unless tiled
};

template <class T>
struct Operand {
  const T* x;
  Layout layout;
  const float* group_sums;  // [groups][rows], each in order over its inputs, where float32 x meets minima

  // Rows from `row` on, the first of a block, from input `input` on, the first of a step where x is tiled.
  Inputs<T> inputs(int64_t row, int64_t input) const {
    return {x + layout.at(row, input), layout.row_step(), layout.tiled ? kBlock * kStep : kStep};
  }
};

template <class X>
void sum_groups(const X* row, const Packed& w, int64_t rows, float* sums) {
  for (int64_t g = 0; g < w.groups(); ++g) {
    F sum = {};
    for (int64_t k = g * w.group; k < (g + 1) * w.group && k < w.in; k += kLanes) {
      sum = sum + load_up_to(row + k, w.in - k);
    }
    sums[g * rows] = reduce_add(sum);
  }
}

template <class T, class X>
void copy_row(const X* row, int64_t in, int64_t padded, T* to) {
  for (int64_t k = 0; k < padded; k += kLanes) {
    const F value = k < in ? load_up_to(row + k, in - k) : F{};
    store_up_to(to + k, value, padded - k);
  }
}

// Which row of x is the operand's row r: `from[r]`, or r itself where there is no `from`.
inline int64_t row_from(const int32_t* from, int64_t r) { return from ? from[r] : r; }

// x itself where it serves as it is, else a copy in the calling thread's own scratch. Tiled x always does.
template <class T, class X>
Operand<T> prepare(const X* x, bool tiled, const int32_t* from, const Packed& w, int64_t rows) {
  const int64_t padded = w.padded_in(), groups = w.minima && sizeof(T) == 4 ? w.groups() : 0;
  const bool copy = !std::is_same_v<T, X> || padded != w.in || from;
  const int64_t copied = copy ? divide_up(rows * padded * static_cast<int64_t>(sizeof(T)), 64) * 64 : 0;
  uint8_t* memory = copied + groups > 0 ? scratch<uint8_t>(kRows, copied + rows * groups * 4) : nullptr;
  T* to = reinterpret_cast<T*>(memory);
  float* sums = reinterpret_cast<float*>(memory + copied);
  if (memory) {
    parallel_ranges(rows, 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const X* row = x + row_from(from, r) * w.in;
        if (copy) copy_row(row, w.in, padded, to + r * padded);
        if (groups > 0) sum_groups(row, w, rows, sums + r);
      }
    });
  }
  if constexpr (std::is_same_v<T, X>) {
    if (!copy) return {x, {w.in, tiled}, sums};
  }
  return {to, {padded, false}, sums};
}

}  // namespace tokenmill
