// Products of rows with one pair of packed columns, for every instruction set but AMX (amx.h).
//
//   chunk    a few steps of the pair, short enough to stay in the nearest cache, then
//   block    up to kTogether rows: one load of the weight serves them all; their sums stay in registers for
//   fold     64 inputs, and then join the total in memory, which keeps rounding small.
//
// K runs in order, and neither how rows are grouped nor how columns are changes a row's own operations.
#pragma once

#include <type_traits>

#include "packed.h"

namespace tokenmill {

constexpr int kTogether = kNative == 16 ? 11 : 6;
constexpr int kFold = 64;                 // inputs
constexpr int64_t kFoldSteps = kFold / kStep;
constexpr int64_t kNearSteps = 2;         // of a chunk in bfloat16: 4 KiB
constexpr int64_t kNearInputs = 128;      // of a chunk in float32: 16 KiB

// Tiles of 16 columns whose sums `R` rows keep in registers at once.
template <int R>
constexpr int kTilesAtOnce = kNative == 16 || R <= 3 ? 2 : 1;

struct Nothing {
  TM_INLINE void operator()(int64_t) const {}
};

// work(constant) with the constant of `rows`, Least .. Most.
template <int Most = kTogether, int Least = 1, class Work>
TM_INLINE void with_rows(int rows, const Work& work) {
  if constexpr (Most > Least) {
    if (rows < Most) return with_rows<Most - 1, Least>(rows, work);
  }
  work(std::integral_constant<int, Most>{});
}

// What no block is lower than where there are more rows than `Most`.
template <int Most = kTogether>
constexpr int kLeastOfSeveral = (Most + 1) / 2;

// work(first, constant rows) for blocks of nearly equal height, `Most` at most.
template <int Most = kTogether, int Least = 1, class Work>
TM_INLINE void in_row_blocks(int rows, const Work& work) {
  const int blocks = (rows + Most - 1) / Most;
  for (int b = 0; b < blocks; ++b) {
    const int first = rows * b / blocks;
    with_rows<Most, Least>(rows * (b + 1) / blocks - first, [&](auto height) { work(first, height); });
  }
}


// Lines of 16 columns with two inputs each, 16 to a step; distances in elements.
template <class T>
struct Lines {
  const T* first;
  int64_t line;
  int64_t tile;
  int64_t step;
};

// As they lie in a packed weight.
template <class T>
TM_INLINE Lines<T> packed_lines(const T* weight) {
  return {weight, kPair, kTileElements, kStepElements};
}

// What runs beside a pair's first block of rows: `work(k)` with step k, and for every line the one that comes `kSoon`
// bytes later is asked for, evenly, since a core has few buffers for what is under way.
template <int kLinesAStep, class Work>
struct Beside {
  static constexpr int kBytes = kStepElements * 2 / kLinesAStep;
  const bf16* weight;
  int64_t first;  // step
  const Work& work;

  TM_INLINE void operator()(int64_t n) const {
    constexpr int64_t kSoon = 8192;
    const char* from = reinterpret_cast<const char*>(weight + first * kStepElements) + n * kBytes + kSoon;
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    if (n % kLinesAStep == 0) work(first + n / kLinesAStep);
  }
};

// A weight in the nearest cache has nothing to ask for.
template <int kLinesAStep>
struct Beside<kLinesAStep, Nothing> : Nothing {
  Beside(const bf16*, int64_t, Nothing) {}
};

// One of the two inputs of a line, as float32.
template <int kOdd>
TM_INLINE F half_line(const bf16* line) {
  const U both = load_bits<NativeU>(line);
  return bits_of<NativeF>(kOdd ? both & splat(0xFFFF0000u) : both << 16);
}

// part [R][tiles] += x * line, for one of the line's inputs.
template <int kOdd, int R, int kTiles>
TM_INLINE void add_half_line(const float* x, int64_t stride, const bf16* line, int64_t tile, F (&part)[R][kTiles]) {
  F weight[kTiles];
  for (int t = 0; t < kTiles; ++t) weight[t] = half_line<kOdd>(line + t * tile);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const F input = splat(x[r * stride + kOdd]);
    for (int t = 0; t < kTiles; ++t) part[r][t] = fma(weight[t], input, part[r][t]);
  }
}

template <int R, int kTiles>
TM_INLINE void fold(const F (&part)[R][kTiles], float* sums, int64_t width) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) {
      float* to = sums + r * width + t * kLanes;
      store(to, load(to) + part[r][t]);
    }
  }
}

// sums [R][kTiles * 16], `width` apart, += x [R] times `steps` steps of lines; `between(n)` runs beside line n.
template <int R, int kTiles, class Between>
TM_INLINE void dot_tiles(const float* x, int64_t stride, const Lines<bf16>& lines, int64_t steps, float* sums,
                         int64_t width, const Between& between) {
  for (int64_t start = 0; start < steps; start += kFoldSteps) {
    const int64_t end = start + kFoldSteps < steps ? start + kFoldSteps : steps;
    F part[R][kTiles] = {};
    for (int64_t k = start; k < end; ++k) {
      const bf16* line = lines.first + k * lines.step;
      const float* at = x + k * kStep;
      for (int i = 0; i < 16; ++i, line += lines.line, at += 2) {
        between(k * 16 + i);
        add_half_line<0>(at, stride, line, lines.tile, part);
        add_half_line<1>(at, stride, line, lines.tile, part);
      }
    }
    fold(part, sums, width);
  }
}

#if defined(__AVX512BF16__)
// The same for bfloat16 x: both inputs of a line at once, and nothing to fold.
template <int R, int kTiles, class Between>
TM_INLINE void dot_tiles(const bf16* x, int64_t stride, const Lines<bf16>& lines, int64_t steps, float* sums,
                         int64_t width, const Between& between) {
  __m512 total[R][kTiles];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) total[r][t] = _mm512_loadu_ps(sums + r * width + t * kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const bf16* line = lines.first + k * lines.step;
    const bf16* at = x + k * kStep;
    for (int i = 0; i < 16; ++i, line += lines.line, at += 2) {
      between(k * 16 + i);
      __m512bh weight[kTiles];
      for (int t = 0; t < kTiles; ++t) weight[t] = (__m512bh)_mm512_loadu_si512(line + t * lines.tile);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int32_t both;
        std::memcpy(&both, at + r * stride, 4);
        const auto pair = (__m512bh)_mm512_set1_epi32(both);
        for (int t = 0; t < kTiles; ++t) total[r][t] = _mm512_dpbf16_ps(total[r][t], weight[t], pair);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) _mm512_storeu_ps(sums + r * width + t * kLanes, total[r][t]);
  }
}
#endif

// The same for both tiles of a pair, whatever the registers hold at once.
template <int R, class X, class Between>
inline void dot_pair(const X* x, int64_t stride, const Lines<bf16>& lines, int64_t steps, float* sums, int64_t width,
                     const Between& between) {
  if constexpr (kTilesAtOnce<R> == 2) {
    dot_tiles<R, 2>(x, stride, lines, steps, sums, width, between);
  } else {
    const Lines<bf16> right{lines.first + lines.tile, lines.line, lines.tile, lines.step};
    dot_tiles<R, 1>(x, stride, lines, steps, sums, width, between);
    dot_tiles<R, 1>(x, stride, right, steps, sums + kLanes, width, Nothing{});
  }
}

// sums [R][kTiles * 16] += x [R] times inputs of a float32 weight [in][32]; `between(k)` runs beside input k.
template <int R, int kTiles, class Between>
TM_INLINE void dot_inputs(const float* x, int64_t stride, const float* weight, int64_t in, float* sums,
                          const Between& between) {
  for (int64_t start = 0; start < in; start += kFold) {
    const int64_t end = start + kFold < in ? start + kFold : in;
    F part[R][kTiles] = {};
    for (int64_t k = start; k < end; ++k) {
      between(k);
      F column[kTiles];
      for (int t = 0; t < kTiles; ++t) column[t] = load(weight + k * kPair + t * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const F input = splat(x[r * stride + k]);
        for (int t = 0; t < kTiles; ++t) part[r][t] = fma(column[t], input, part[r][t]);
      }
    }
    fold(part, sums, kPair);
  }
}

// The same for both tiles, for any number of rows of which no block is lower than `Least`.
template <int Least, class Between>
inline void dot_inputs(const float* x, int64_t stride, const float* weight, int64_t in, int rows, float* sums,
                       const Between& between) {
  in_row_blocks<kTogether, Least>(rows, [&](int first, auto height) {
    constexpr int R = decltype(height)::value;
    constexpr int kTiles = kTilesAtOnce<R>;
    const float* inputs = x + first * stride;
    float* to = sums + first * kPair;
    if (first == 0) {
      dot_inputs<R, kTiles>(inputs, stride, weight, in, to, between);
    } else {
      dot_inputs<R, kTiles>(inputs, stride, weight, in, to, Nothing{});
    }
    if (kTiles == 1) dot_inputs<R, 1>(inputs, stride, weight + kLanes, in, to + kLanes, Nothing{});
  });
}

// A step of a packed weight as a float32 weight [32][32].
inline void widen_step(const bf16* step, float* to) {
  for (int tile = 0; tile < 2; ++tile) {
    for (int line = 0; line < 16; ++line, step += kPair) {
      float* at = to + 2 * line * kPair + tile * kLanes;
      store(at, half_line<0>(step));
      store(at + kPair, half_line<1>(step));
    }
  }
}

// sums [rows][32] += (or =, when `fresh`) x times `in` inputs of a float32 weight [in][32].
inline void vector_product(const float* x, int64_t stride, const float* weight, int64_t in, int rows, float* sums,
                           bool fresh) {
  if (fresh) std::memset(sums, 0, static_cast<size_t>(rows) * kPair * 4);
  const int64_t chunk = rows > kTogether ? kNearInputs : in;
  for (int64_t k = 0; k < in; k += chunk) {
    const int64_t part = in - k < chunk ? in - k : chunk;
    dot_inputs<1>(x + k, stride, weight + k * kPair, part, rows, sums, Nothing{});
  }
}

// The same for `steps` steps of a weight in bfloat16. Where several blocks of rows want them, the inputs of a fold are
// widened once for all. `between(k)` runs once beside each step.
template <class Between>
inline void vector_product(const float* x, int64_t stride, const bf16* weight, int64_t steps, int rows, float* sums,
                           bool fresh, const Between& between) {
  if (fresh) std::memset(sums, 0, static_cast<size_t>(rows) * kPair * 4);
  if (rows <= kTogether) {
    return with_rows(rows, [&](auto height) {
      dot_pair<decltype(height)::value>(x, stride, packed_lines(weight), steps, sums, kPair,
                                        Beside<16, Between>{weight, 0, between});
    });
  }
  alignas(64) float wide[kFold * kPair];
  for (int64_t k = 0; k < steps; k += kFoldSteps) {
    const int64_t count = steps - k < kFoldSteps ? steps - k : kFoldSteps;
    for (int64_t i = 0; i < count; ++i) widen_step(weight + (k + i) * kStepElements, wide + i * kStep * kPair);
    dot_inputs<kLeastOfSeveral<>>(x + k * kStep, stride, wide, count * kStep, rows, sums,
                                  Beside<kStep, Between>{weight, k, between});
  }
}

#if defined(__AVX512BF16__)
// The same for bfloat16 x.
template <class Between>
inline void vector_product(const bf16* x, int64_t stride, const bf16* weight, int64_t steps, int rows, float* sums,
                           bool fresh, const Between& between) {
  if (fresh) std::memset(sums, 0, static_cast<size_t>(rows) * kPair * 4);
  const int64_t chunk = rows > kTogether ? kNearSteps : steps;
  for (int64_t k = 0; k < steps; k += chunk) {
    const Lines<bf16> lines = packed_lines(weight + k * kStepElements);
    const int64_t count = steps - k < chunk ? steps - k : chunk;
    in_row_blocks(rows, [&](int first, auto height) {
      constexpr int R = decltype(height)::value;
      const bf16* inputs = x + first * stride + k * kStep;
      float* to = sums + first * kPair;
      if (first == 0) {
        dot_pair<R>(inputs, stride, lines, count, to, kPair, Beside<16, Between>{weight, k, between});
      } else {
        dot_pair<R>(inputs, stride, lines, count, to, kPair, Nothing{});
      }
    });
  }
}
#endif

}  // namespace tokenmill
