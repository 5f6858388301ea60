// What follows a product: bias, gate, residual, one rounding.
#pragma once

#include "api.h"
#include "packed.h"
#include "tiled.h"
#include "vmath.h"

namespace tokenmill {

struct Call {
  const Packed& weight;
  int64_t rows;
  bool x_tiled;
  const void* residual;  // of y's type, or null; plain
  void* y;               // [rows, weight.width()]
  int y_type;
  Layout layout;         // of y
};

// sums [rows][32] *= the scales of a pair's rows.
inline void scale_sums(const Packed& w, int64_t pair, int rows, float* sums) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(w.pair(pair));
  const F unit = splat(w.unit), left = load_half(scales) * unit, right = load_half(scales + 16) * unit;
  for (int r = 0; r < rows; ++r, sums += kPair) {
    store(sums, load(sums) * left);
    store(sums + 16, load(sums + 16) * right);
  }
}

// One vector of results to y, with the residual, if any; `left` columns exist from there on.
template <class Y>
TM_INLINE void put(F value, const Y* residual, Y* to, int64_t left) {
  if (left >= kLanes) {
    if (residual) value = value + load(residual);
    store(to, value);
  } else if (left > 0) {
    if (residual) value = value + load_first(residual, static_cast<int>(left));
    store_first(to, value, static_cast<int>(left));
  }
}

// Where the sums [rows][32] of one pair and a block of rows go.
struct Target {
  const float* sums;
  const float* bias;      // [32], or null
  const void* residual;   // from the block's first row on, or null
  void* y;                // the same
  int64_t left;           // y's columns from here on
};

inline Target target(const Call& call, int64_t pair, int64_t first, const float* sums) {
  const Packed& w = call.weight;
  const int64_t width = w.width(), column = pair * (w.gated() ? 16 : kPair), size = call.y_type == kTypeBf16 ? 2 : 4;
  const float* bias = w.bias ? w.bias + pair * kPair : nullptr;
  const char* residual = static_cast<const char*>(call.residual);
  if (residual) residual += (first * width + column) * size;
  return {sums, bias, residual, static_cast<char*>(call.y) + call.layout.at(first, column) * size, width - column};
}

// The block's rows [row, row + count).
template <class Y, bool Gated>
void finish_rows(const Call& call, const Target& target, int row, int count) {
  const int64_t width = call.layout.width, step = call.layout.row_step(), left = target.left;
  const F low_bias = target.bias ? load(target.bias) : F{}, high_bias = target.bias ? load(target.bias + 16) : F{};
  const Y* residual = target.residual ? static_cast<const Y*>(target.residual) + row * width : nullptr;
  const float* sums = target.sums + row * kPair;
  Y* to = static_cast<Y*>(target.y) + row * step;
  for (const float* end = sums + count * kPair; sums < end; sums += kPair, to += step) {
    const F low = load(sums) + low_bias, high = load(sums + 16) + high_bias;
    if (Gated) {
      put(gated<Y>(low, high, call.weight.activation), residual, to, left);
    } else {
      put(low, residual, to, left);
      put(high, residual ? residual + 16 : nullptr, to + 16, left - 16);
    }
    if (residual) residual += width;
  }
}

using FinishRows = void (*)(const Call&, const Target&, int, int);

inline FinishRows finish_rows_of(const Call& call) {
  if (call.y_type == kTypeBf16) return call.weight.gated() ? finish_rows<bf16, true> : finish_rows<bf16, false>;
  return call.weight.gated() ? finish_rows<float, true> : finish_rows<float, false>;
}

// y's rows [first, first + rows) of one pair's columns from their sums [rows][32].
inline void finish(const Call& call, int64_t pair, int64_t first, int rows, const float* sums) {
  finish_rows_of(call)(call, target(call, pair, first, sums), 0, rows);
}

}  // namespace tokenmill
