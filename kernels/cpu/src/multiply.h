// One block of rows times some steps of a pair, by what this processor has.
#pragma once

#include "amx.h"
#include "operand.h"
#include "packed.h"
#include "product.h"

namespace tokenmill {

#if defined(__AMX_BF16__)
constexpr bool kMatrixUnit = true;
#else
constexpr bool kMatrixUnit = false;
#endif

// Whether the matrix unit multiplies T rows with W weights.
template <class T, class W>
constexpr bool kAmx = kMatrixUnit && sizeof(T) == 2 && sizeof(W) == 2;

TM_INLINE void set_rows(int rows) {
#if defined(__AMX_BF16__)
  configure_tiles(rows);
#else
  (void)rows;
#endif
}

#if defined(__AVX512BF16__)
constexpr bool kDirect = true;  // bfloat16 x is multiplied as it is

template <class Between>
TM_INLINE void multiply(const Inputs<bf16>& x, const bf16* weight, int64_t steps, int rows, float* sums, bool fresh,
                        const Between& between) {
#if defined(__AMX_BF16__)
  tile_fence(weight);
  amx_product(x, [weight](int64_t k) { return weight + k * kStepElements; }, steps, rows, sums, fresh, between);
#else
  vector_product(x.at, x.row, weight, steps, rows, sums, fresh, between);
#endif
}
#else
constexpr bool kDirect = false;
#endif

template <class W, class Between>
TM_INLINE void multiply(const Inputs<float>& x, const W* weight, int64_t length, int rows, float* sums, bool fresh,
                        const Between& between) {
  if constexpr (sizeof(W) == 2) {
    vector_product(x.at, x.row, weight, length, rows, sums, fresh, between);
  } else {
    vector_product(x.at, x.row, weight, length, rows, sums, fresh);
  }
}

}  // namespace tokenmill
