// Products of a few rows with one pair of packed columns, for every instruction set but AMX (amx.h).
//
// A row's sums stay in two vectors (32 columns) over K in order; rows are taken four at a time so that one load
// of the weight serves them all. How rows are grouped never changes a row's own operations.
#pragma once

#include "packed.h"

namespace tokenmill {

constexpr int kFold = 64;  // float32 inputs summed before they join the total, which keeps rounding small

#if defined(__AVX512BF16__)
// sums [R][32] += x [R] times one pair's steps, both bfloat16.
template <int R>
inline void dot_rows(const bf16* x, int64_t stride, const bf16* weight, int64_t steps, float* sums) {
  __m512 total[R][2];
  for (int r = 0; r < R; ++r) {
    total[r][0] = _mm512_loadu_ps(sums + r * kPair);
    total[r][1] = _mm512_loadu_ps(sums + r * kPair + 16);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const bf16* tile = weight + k * kStepElements;
    for (int line = 0; line < 16; ++line) {
      auto left = (__m512bh)_mm512_loadu_si512(tile + line * 32);
      auto right = (__m512bh)_mm512_loadu_si512(tile + kTileElements + line * 32);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t both;
        std::memcpy(&both, x + r * stride + k * kStep + line * 2, 4);
        auto pair = (__m512bh)_mm512_set1_epi32(both);
        total[r][0] = _mm512_dpbf16_ps(total[r][0], left, pair);
        total[r][1] = _mm512_dpbf16_ps(total[r][1], right, pair);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * kPair, total[r][0]);
    _mm512_storeu_ps(sums + r * kPair + 16, total[r][1]);
  }
}
#endif

// The two inputs of a line of K pairs, as float32.
TM_INLINE void split_line(const bf16* line, F& even, F& odd) {
  U both;
  std::memcpy(&both, line, sizeof both);
  even = bits_of<NativeF>(both << 16);
  odd = bits_of<NativeF>(both & splat(0xFFFF0000u));
}

// The same for float32 x and a weight in bfloat16 tiles.
template <int R>
inline void dot_rows(const float* x, int64_t stride, const bf16* weight, int64_t steps, float* sums) {
  for (int64_t k = 0; k < steps; ++k) {
    F part[R][2] = {};
    const bf16* tile = weight + k * kStepElements;
    for (int line = 0; line < 16; ++line) {
      F even[2], odd[2];
      split_line(tile + line * 32, even[0], odd[0]);
      split_line(tile + kTileElements + line * 32, even[1], odd[1]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const float* at = x + r * stride + k * kStep + line * 2;
        for (int t = 0; t < 2; ++t) {
          part[r][t] = fma(odd[t], splat(at[1]), fma(even[t], splat(at[0]), part[r][t]));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      store(sums + r * kPair, load(sums + r * kPair) + part[r][0]);
      store(sums + r * kPair + 16, load(sums + r * kPair + 16) + part[r][1]);
    }
  }
}

// The same for a float32 weight [in][32].
template <int R>
inline void dot_rows(const float* x, int64_t stride, const float* weight, int64_t in, float* sums) {
  for (int64_t start = 0; start < in; start += kFold) {
    int64_t end = start + kFold < in ? start + kFold : in;
    F part[R][2] = {};
    for (int64_t k = start; k < end; ++k) {
      F left = load(weight + k * kPair), right = load(weight + k * kPair + 16);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        F input = splat(x[r * stride + k]);
        part[r][0] = fma(left, input, part[r][0]);
        part[r][1] = fma(right, input, part[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) {
      store(sums + r * kPair, load(sums + r * kPair) + part[r][0]);
      store(sums + r * kPair + 16, load(sums + r * kPair + 16) + part[r][1]);
    }
  }
}

// Any number of rows; `length` counts steps, or inputs for a float32 weight.
template <class X, class W>
inline void vector_product(const X* x, int64_t stride, const W* weight, int64_t length, int rows, float* sums,
                           bool fresh) {
  if (fresh) std::memset(sums, 0, static_cast<size_t>(rows) * kPair * 4);
  int r = 0;
  for (; r + 4 <= rows; r += 4) dot_rows<4>(x + r * stride, stride, weight, length, sums + r * kPair);
  if (r + 2 <= rows) {
    dot_rows<2>(x + r * stride, stride, weight, length, sums + r * kPair);
    r += 2;
  }
  if (r < rows) dot_rows<1>(x + r * stride, stride, weight, length, sums + r * kPair);
}

}  // namespace tokenmill
