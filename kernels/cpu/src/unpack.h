// Quantized steps to bfloat16 tiles: as integers, exact, or as the weight's values, rounded to bfloat16.
#pragma once

#include "packed.h"

namespace tokenmill {

constexpr int64_t kUnpackedSteps = 8;  // of a quantized weight at a time

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
      const float exact = static_cast<float>(weight.nibble(i % 16));
      uint32_t bits;
      std::memcpy(&bits, &exact, 4);
      nibble_[i].bits = static_cast<uint16_t>(bits >> 16);
    }
  }

  // `steps` consecutive steps of group `g`.
  TM_INLINE void unpack(const uint8_t* from, int64_t steps, int64_t g, bf16* to) const {
    if (weight_.group < kStep) {
      unpack_half_step(from, static_cast<int>(g % 2), to);
    } else if (weight_.nibbles()) {
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
    if (weight_.format == kFloat4) {
      for (int64_t i = 0; i < bytes; ++i) {
        bf16* place = to + i / 32 * 64 + i % 32;
        place[0] = nibble_[from[i] & 15];
        place[32] = nibble_[from[i] >> 4];
      }
      return;
    }
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
  void unpack_half_step(const uint8_t* from, int half, bf16* to) const {
    constexpr int kHalf = kTileElements / 2;
    std::memset(to, 0, kStepElements * sizeof(bf16));
    for (int tile = 0; tile < 2; ++tile) {
      bf16* there = to + tile * kTileElements + half * kHalf;
      if (weight_.nibbles()) {
        unpack_nibbles(from + tile * kHalf / 2, kHalf / 2, there);
      } else {
        unpack_bytes(from + tile * kHalf, kHalf, there);
      }
    }
  }

  const Packed& weight_;
  alignas(64) bf16 nibble_[32];  // the sixteen values, twice
};

#if defined(__AMX_BF16__)
// A step at a time to what it stands for: bfloat16 of unit * (scale * q + minimum). Groups are powers of two.
template <Format kFormat>
class ValueSteps {
 public:
  explicit ValueSteps(const Packed& weight)
      : minima_(weight.minima),
        steps_shift_(weight.group < kStep ? -1 : __builtin_ctz(static_cast<unsigned>(weight.group / kStep))),
        scale_bytes_(weight.scale_bytes()),
        step_bytes_(weight.step_bytes()),
        group_bytes_(weight.group_bytes()),
        unit_(_mm512_set1_ps(weight.unit)) {
    alignas(64) float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(weight.nibble(i));
    nibble_ = _mm512_load_ps(values);
  }

  void seek(int64_t) {}

  TM_INLINE void unpack(const uint8_t* pair, int64_t step, bf16* to) const {
    if (steps_shift_ >= 0) {
      const uint8_t* group = pair + (step >> steps_shift_) * group_bytes_;
      const int64_t inside = step & ((int64_t{1} << steps_shift_) - 1);
      return tiles<16>(group, group + scale_bytes_ + inside * step_bytes_, to);
    }
    for (int half = 0; half < 2; ++half) {
      const uint8_t* group = pair + (2 * step + half) * group_bytes_;
      tiles<8>(group, group + scale_bytes_, to + half * 8 * 32);
    }
  }

 private:
  // Of a tile's outputs 0..7 and 8..15, each twice: once for each of the two inputs of a line.
  struct Scales {
    __m512 scale[2], minimum[2];
  };

  TM_INLINE Scales scales_of(const uint8_t* group, int tile) const {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(group) + tile * 16;
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 scale = _mm512_mul_ps((__m512)load_half(halves).part[0], unit_);
    __m512 minimum = _mm512_setzero_ps();
    if (minima_) minimum = _mm512_mul_ps((__m512)load_half(halves + kPair).part[0], unit_);
    return {{_mm512_permutexvar_ps(low, scale), _mm512_permutexvar_ps(high, scale)},
            {_mm512_permutexvar_ps(low, minimum), _mm512_permutexvar_ps(high, minimum)}};
  }

  // `kLines` lines of both tiles.
  template <int kLines>
  TM_INLINE void tiles(const uint8_t* group, const uint8_t* from, bf16* to) const {
    for (int tile = 0; tile < 2; ++tile, to += kTileElements) {
      const Scales s = scales_of(group, tile);
      if (kFormat == kInt4) {
#pragma GCC unroll 8
        for (int line = 0; line < kLines; line += 2, from += 32) two_lines_of_nibbles(from, s, to + line * 32);
      } else {
#pragma GCC unroll 8
        for (int line = 0; line < kLines; ++line, from += 32) line_of_bytes(from, s, to + line * 32);
      }
    }
  }

  // Each byte holds one place of two neighbouring lines; the permutation looks at the lowest four bits only.
  TM_INLINE void two_lines_of_nibbles(const uint8_t* from, const Scales& s, bf16* to) const {
    __m512 first[2], second[2];
    for (int h = 0; h < 2; ++h) {
      const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * h)));
      first[h] = _mm512_fmadd_ps(_mm512_permutexvar_ps(both, nibble_), s.scale[h], s.minimum[h]);
      second[h] = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), nibble_), s.scale[h], s.minimum[h]);
    }
    put_line(first, to);
    put_line(second, to + 32);
  }

  TM_INLINE static void line_of_bytes(const uint8_t* from, const Scales& s, bf16* to) {
    __m512 values[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 q = (__m512)to_float(load(reinterpret_cast<const int8_t*>(from) + 16 * h)).part[0];
      values[h] = _mm512_fmadd_ps(q, s.scale[h], s.minimum[h]);
    }
    put_line(values, to);
  }

  TM_INLINE static void put_line(const __m512 (&values)[2], bf16* line) {
    _mm512_storeu_si512(line, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]));
  }

  // Of the weight, computed once: these take divisions.
  const bool minima_;
  const int steps_shift_;  // steps of a group, as a power of two; below zero: a group is half a step
  const int64_t scale_bytes_, step_bytes_, group_bytes_;
  const __m512 unit_;
  __m512 nibble_;
};

// A step at a time as integers, of a weight of 8 bits with one scale a row.
class ByteSteps {
 public:
  explicit ByteSteps(const Packed& weight) : w_(weight) {}

  void seek(int64_t) {}

  TM_INLINE void unpack(const uint8_t* pair, int64_t step, bf16* to) const {
    unpack_bytes(pair + w_.scale_bytes() + step * kStepElements, kStepElements, to);
  }

  // line(tile, number, integers) for each line of a step, as float32: outputs 0..7 and 8..15.
  template <class Line>
  TM_INLINE void each_line(const uint8_t* pair, int64_t step, const Line& line) const {
    const int8_t* from = reinterpret_cast<const int8_t*>(pair + w_.scale_bytes() + step * kStepElements);
    for (int tile = 0; tile < 2; ++tile) {
#pragma GCC unroll 8
      for (int number = 0; number < 16; ++number, from += 32) {
        line(tile, number, {(__m512)to_float(load(from)).part[0], (__m512)to_float(load(from + 16)).part[0]});
      }
    }
  }

 private:
  const Packed& w_;
};
#endif

}  // namespace tokenmill
