// One row of bfloat16 inputs times a pair of 8-bit integers by vector instructions: where a single row is all there is,
// as in decode of one sequence, integers needn't become tiles in memory first. (Values of 4 bits, which have to be
// rounded as well, gain nothing so.)
//
// The sums are the matrix unit's to the bit, so that a row's result doesn't depend on its company: of 32 inputs it
// adds the products of even and of odd ones apart, each from zero and in order, and then both to the total,
// without subnormal numbers.
#pragma once

#if defined(__AMX_BF16__)

#include "epilogue.h"
#include "operand.h"
#include "stream.h"
#include "unpack.h"

namespace tokenmill {

// Subnormal numbers are zero while this lives, as they always are for the matrix unit.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};

// Sums of one tile's 16 outputs: lanes are (output, even or odd input).
struct TileSums {
  __m512 lanes[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};

  // `weights`: a line's outputs 0..7 and 8..15, two inputs each; `x`: those two inputs.
  TM_INLINE void add(const __m512 (&weights)[2], const float* x) {
    double both;
    std::memcpy(&both, x, sizeof both);
    const __m512 inputs = _mm512_castpd_ps(_mm512_set1_pd(both));
    lanes[0] = _mm512_fmadd_ps(weights[0], inputs, lanes[0]);
    lanes[1] = _mm512_fmadd_ps(weights[1], inputs, lanes[1]);
  }

  TM_INLINE __m512 total() const {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(lanes[0], even, lanes[1]),
                         _mm512_permutex2var_ps(lanes[0], odd, lanes[1]));
  }
};

// sums [32] = x [steps * 32], as float32, times a pair.
template <class Steps>
TM_INLINE void single_row(const Steps& steps, const uint8_t* pair, int64_t count, int64_t step_bytes, const float* x,
                          float* sums) {
  const FlushSubnormals flush;
  __m512 totals[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t step = 0; step < count; ++step, x += kStep) {
    ask_ahead(pair + step * step_bytes, step_bytes);
    TileSums tiles[2];
    steps.each_line(pair, step, [&](int tile, int line, const __m512(&weights)[2]) {
      tiles[tile].add(weights, x + 2 * line);
    });
    totals[0] = _mm512_add_ps(totals[0], tiles[0].total());
    totals[1] = _mm512_add_ps(totals[1], tiles[1].total());
  }
  _mm512_storeu_ps(sums, totals[0]);
  _mm512_storeu_ps(sums + 16, totals[1]);
}

// The pairs [begin, end) of a weight with one scale a row times one row.
void single_row_task(const Call& call, const Operand<bf16>& operand, int64_t begin, int64_t end, int64_t row) {
  const Packed& w = call.weight;
  const ByteSteps steps(w);
  const int64_t inputs = w.padded_in(), count = inputs / kStep;
  float* x = scratch<float>(kPanel, inputs);
  for (int64_t k = 0; k < inputs; k += kLanes) store(x + k, load(operand.x + row * operand.layout.width + k));
  alignas(64) float sums[kPair];
  for (int64_t pair = begin; pair < end; ++pair) {
    single_row(steps, w.pair(pair), count, w.pair_bytes() / count, x, sums);
    scale_sums(w, pair, 1, sums);
    finish(call, pair, row, 1, sums);
  }
}

}  // namespace tokenmill

#endif
