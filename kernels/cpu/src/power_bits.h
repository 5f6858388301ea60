// Powers of two in bfloat16, made of bits: 32 at once in half of the instructions that 16 take by polynomial.
//
//   x in units of 1/128:   127 * 128 + x   rounded to an integer   =   0 eeeeeeee fffffff
//
// has the exponent of 2^x where bfloat16 has it, and x's fraction f where 128 (2^(f / 128) - 1) should stand. That
// is up to 11 less, as a table says for two neighbouring fractions at a time.
#pragma once

#if defined(__AVX512VBMI__)

#include "vec.h"

namespace tokenmill {

struct alignas(64) Mantissas {
  uint8_t less[64] = {};
  constexpr Mantissas() {
    double power = 1.0027112750502025;  // 2^(1/256): the middle of the first two fractions
    for (int i = 0; i < 64; ++i, power *= 1.0108892860517004) {  // 2^(1/64)
      less[i] = static_cast<uint8_t>(2 * i + 0.5 - 128 * (power - 1) + 0.5);
    }
  }
};
constexpr Mantissas kMantissas;

constexpr float kFractions = 128;
constexpr float kPowerOfZero = 127 * kFractions;

// 2^((x - kPowerOfZero) / 128) to 0.8%, exactly 1 at kPowerOfZero and 0 from 0 down, as from NaN: lanes 0-3 of low,
// 0-3 of high, 4-7 of low and so on. x is less than 2^16.
TM_INLINE __m512i bfloat16_powers(F low, F high) {
  const __m512i bits = _mm512_packus_epi32(_mm512_cvtps_epi32((__m512)low.part[0]),
                                           _mm512_cvtps_epi32((__m512)high.part[0]));
  const __m512i less = _mm512_maskz_permutexvar_epi8(0x5555555555555555u, _mm512_srli_epi16(bits, 1),
                                                     _mm512_load_si512(kMantissas.less));
  return _mm512_sub_epi16(bits, less);
}

}  // namespace tokenmill

#endif
