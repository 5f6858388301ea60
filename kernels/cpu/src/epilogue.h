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

template <class Y, bool Gated>
void finish_rows(const Call& call, int64_t pair, int64_t first, int rows, const float* sums) {
  const Packed& w = call.weight;
  const int64_t width = w.width(), column = pair * (Gated ? 16 : kPair), left = width - column;
  F bias[2] = {};
  if (w.bias) {
    bias[0] = load(w.bias + pair * kPair);
    bias[1] = load(w.bias + pair * kPair + 16);
  }
  const Y* residual = call.residual ? static_cast<const Y*>(call.residual) + first * width + column : nullptr;
  Y* to = static_cast<Y*>(call.y) + call.layout.at(first, column);
  for (int r = 0; r < rows; ++r, sums += kPair, to += call.layout.row_step()) {
    F low = load(sums) + bias[0], high = load(sums + 16) + bias[1];
    if (Gated) {
      put(activate<Y>(low, w.activation) * high, residual, to, left);
    } else {
      put(low, residual, to, left);
      put(high, residual ? residual + 16 : nullptr, to + 16, left - 16);
    }
    if (residual) residual += width;
  }
}

// y's rows [first, first + rows) of one pair's columns from their sums [rows][32].
inline void finish(const Call& call, int64_t pair, int64_t first, int rows, const float* sums) {
  with_type(call.y_type, [&](auto y) {
    using Y = decltype(y);
    if (call.weight.gated()) {
      finish_rows<Y, true>(call, pair, first, rows, sums);
    } else {
      finish_rows<Y, false>(call, pair, first, rows, sums);
    }
  });
}

}  // namespace tokenmill
