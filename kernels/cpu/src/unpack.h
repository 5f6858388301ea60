// Quantized steps to bfloat16 tiles: integers only, exact; scales are applied to the sums (linear.cpp).
#pragma once

#include "packed.h"

namespace tokenmill {

// The bfloat16 of integers up to 8 bits: their float32 has zeros below.
TM_INLINE void store_exact(bf16* to, F a) {
  U u = bits_of<NativeU>(a) >> 16;
  TM_EACH {
    NativeU16 half = __builtin_convertvector(u.part[p], NativeU16);
    std::memcpy(to + p * kNative, &half, sizeof half);
  }
}

TM_INLINE void unpack_bytes(const uint8_t* from, int64_t count, bf16* to) {
  const int8_t* q = reinterpret_cast<const int8_t*>(from);
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
#if defined(__AVX512BF16__)
    F low = to_float(load(q + i)), high = to_float(load(q + i + kLanes));
    auto both = _mm512_cvtne2ps_pbh((__m512)high.part[0], (__m512)low.part[0]);
    std::memcpy(to + i, &both, sizeof both);
#else
    store_exact(to + i, to_float(load(q + i)));
    store_exact(to + i + kLanes, to_float(load(q + i + kLanes)));
#endif
  }
}

// From a weight's packed integers to bfloat16 steps [2][16][16][2].
class Unpacker {
 public:
  explicit Unpacker(const Packed& weight) : weight_(weight) {
    for (int i = 0; i < 32; ++i) {
      const float exact = static_cast<float>(i % 16 - weight.zero_point);
      uint32_t bits;
      std::memcpy(&bits, &exact, 4);
      nibble_[i].bits = static_cast<uint16_t>(bits >> 16);
    }
  }

  // `steps` consecutive steps of group `g`.
  TM_INLINE void unpack(const uint8_t* from, int64_t steps, int64_t g, bf16* to) const {
    if (weight_.group < kStep) {
      unpack_half_step(from, static_cast<int>(g % 2), to);
    } else if (weight_.format == kInt4) {
      unpack_nibbles(from, steps * weight_.step_bytes(), to);
    } else {
      unpack_bytes(from, steps * weight_.step_bytes(), to);
    }
  }

 private:
  // Each byte holds one place of two neighbouring lines of 32 elements.
  TM_INLINE void unpack_nibbles(const uint8_t* from, int64_t bytes, bf16* to) const {
#if defined(__AVX512BW__)
    const __m512i table = _mm512_load_si512(nibble_);
    const __m512i low = _mm512_set1_epi16(15);
    for (int64_t i = 0; i < bytes; i += 32) {
      __m512i pair = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
      _mm512_storeu_si512(to + 2 * i, _mm512_permutexvar_epi16(_mm512_and_si512(pair, low), table));
      _mm512_storeu_si512(to + 2 * i + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(pair, 4), table));
    }
#else
    const I zero = splat(weight_.zero_point), nibble = splat(15);
    for (int64_t i = 0; i < bytes; i += 32) {
      for (int half = 0; half < 32; half += kLanes) {
        I pair = load(reinterpret_cast<const int8_t*>(from) + i + half);
        store_exact(to + 2 * i + half, to_float((pair & nibble) - zero));
        store_exact(to + 2 * i + 32 + half, to_float(((pair >> 4) & nibble) - zero));
      }
    }
#endif
  }

  // One group of 16 inputs: lines 8 * half and on of a whole step whose other lines are zero.
  static void unpack_half_step(const uint8_t* from, int half, bf16* to) {
    constexpr int kHalf = kTileElements / 2;
    std::memset(to, 0, kStepElements * sizeof(bf16));
    for (int tile = 0; tile < 2; ++tile) {
      unpack_bytes(from + tile * kHalf, kHalf, to + tile * kTileElements + half * kHalf);
    }
  }

  const Packed& weight_;
  alignas(64) bf16 nibble_[32];  // the sixteen values, twice
};

}  // namespace tokenmill
