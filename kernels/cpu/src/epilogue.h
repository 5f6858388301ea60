// What follows a product: bias, gate, residual, one rounding.
#pragma once

#include "api.h"
#include "packed.h"
#include "vmath.h"

namespace tokenmill {

struct Call {
  const Packed& weight;
  int64_t rows;
  const void* residual;  // of y's type, or null
  void* y;               // [rows, weight.width()]
  int y_type;
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

// One vector of results to y, with the residual; `left` columns exist from `at` on.
template <class Y>
TM_INLINE void put(const Call& call, F value, int64_t at, int64_t left) {
  Y* to = static_cast<Y*>(call.y) + at;
  const Y* residual = static_cast<const Y*>(call.residual);
  if (left >= kLanes) {
    if (residual) value = value + load(residual + at);
    store(to, value);
  } else if (left > 0) {
    if (residual) value = value + load_first(residual + at, static_cast<int>(left));
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
  int64_t at = first * width + column;
  for (int r = 0; r < rows; ++r, sums += kPair, at += width) {
    F low = load(sums) + bias[0], high = load(sums + 16) + bias[1];
    if (Gated) {
      put<Y>(call, activate<Y>(low, w.activation) * high, at, left);
    } else {
      put<Y>(call, low, at, left);
      put<Y>(call, high, at + 16, left - 16);
    }
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
