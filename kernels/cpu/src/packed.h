// How a weight [out, in] lies in memory once it is packed, and the map between its rows and packed columns.
//
// Columns (outputs) come in pairs of tiles, 32 to a pair; K (inputs) in steps of 32. One step of one pair in
// bfloat16, 2 KiB, is what the matrix unit takes as two operands (VNNI order):
//
//   tile 0: 16 lines of K pairs, each  [o0 k0 | o0 k1 | o1 k0 | o1 k1 | … | o15 k0 | o15 k1]
//   tile 1: the same for outputs 16 .. 31
//
//   bfloat16   [pairs][steps][2][16][16][2]
//   coded      [pairs][steps] of 1.5 KiB, the same values in twelve bits (coded.h)
//   float32    [pairs][in][32]
//   quantized  [pairs][groups]{ scales [32] half, (minima [32] half), steps of the group: integers }
//
// A quantized weight is unit * (scale * q + minimum), the integers q exact in bfloat16: 8 bits as bytes in the
// order above; 4 bits as one byte for the same place of two neighbouring lines (low nibble: the even line), q what the
// nibble is less a zero point, or twice the 4-bit float (e2m1) that it is. A group of 16 inputs is half a step: 8 lines
// in each tile.
// With an activation the weight holds gate rows then up rows, and a pair is (16 gates, their 16 ups), so that
// act(gate) * up is formed where the pair is finished. Rows and inputs that don't exist are zero (coded: any value).
#pragma once

#include <cstdint>

#include "vec.h"

namespace tokenmill {

enum Format { kBf16 = 0, kF32 = 1, kInt8 = 2, kInt4 = 3, kCoded = 4, kFloat4 = 5 };

// Twice the 4-bit floats (e2m1) by their bits.
constexpr int8_t kFloats4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

constexpr int kStep = 32;                    // inputs a step
constexpr int kPair = 32;                    // packed columns a pair
constexpr int kTileElements = 16 * kStep;    // of one tile
constexpr int kStepElements = 2 * kTileElements;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A value of a coded weight that the table of upper bytes doesn't hold (coded.h).
struct Exception {
  uint32_t step;   // of the whole weight: pair * steps() + step
  uint16_t place;  // among the step's elements
  uint16_t value;
};

constexpr int64_t kCodedStepBytes = kStepElements / 2 * 3;

// One packed weight; linear.py fills in the same structure.
struct Packed {
  const uint8_t* data;
  const float* bias;   // [pairs * 32] in packed order, or null
  int64_t in;
  int64_t out;         // rows of the weight, gate and up counted both
  int32_t format;
  int32_t group;       // inputs that share a scale, 16 or a multiple of kStep; quantized formats only
  int32_t zero_point;  // kInt4: what is taken off the stored nibble
  int32_t minima;      // whether a group has minima beside its scales
  int32_t activation;  // not kNone: gate rows and up rows
  float unit;          // a power of two that scales and minima are multiplied by
  const Exception* exceptions;  // of a coded weight, in order; one more has a step beyond all
  int64_t exception_count;
  uint8_t upper[16];   // the bytes that a coded weight's nibbles stand for

  bool gated() const { return activation != 0; }
  int64_t width() const { return gated() ? out / 2 : out; }  // of the result
  int64_t pairs() const { return gated() ? divide_up(out / 2, 16) : divide_up(out, kPair); }
  int64_t steps() const { return divide_up(in, kStep); }
  int64_t groups() const { return divide_up(in, group); }
  bool nibbles() const { return format == kInt4 || format == kFloat4; }
  bool quantized() const { return format == kInt8 || nibbles(); }
  bool exact() const { return format == kBf16 || format == kCoded; }  // bfloat16 values, none lost
  bool row_wide() const { return quantized() && groups() == 1 && !minima; }  // one scale a row
  int depth() const { return group < kStep ? group : kStep; }  // inputs of a quantized step
  int64_t step_bytes() const { return kPair * depth() / (nibbles() ? 2 : 1); }
  int64_t scale_bytes() const { return (minima ? 2 : 1) * kPair * 2; }
  int64_t group_bytes() const { return scale_bytes() + group / depth() * step_bytes(); }

  int64_t pair_bytes() const {
    if (format == kBf16) return steps() * kStepElements * 2;
    if (format == kF32) return in * kPair * 4;
    if (format == kCoded) return steps() * kCodedStepBytes;
    return groups() * group_bytes();
  }
  const uint8_t* pair(int64_t index) const { return data + index * pair_bytes(); }
  int64_t padded_in() const {
    if (format == kF32) return in;
    return divide_up(quantized() ? groups() * group : in, kStep) * kStep;
  }

  // The integer that a nibble stands for.
  int nibble(int bits) const { return format == kFloat4 ? kFloats4[bits] : bits - zero_point; }

  // The weight's row behind packed column `column` of pair `index`, or -1.
  int64_t row_of(int64_t index, int column) const {
    if (!gated()) {
      int64_t row = index * kPair + column;
      return row < out ? row : -1;
    }
    int64_t unit = index * 16 + column % 16;
    if (unit >= out / 2) return -1;
    return column < 16 ? unit : out / 2 + unit;
  }

  // Where a row of the weight went: pair * kPair + column.
  int64_t column_of(int64_t row) const {
    if (!gated()) return row;
    int64_t unit = row % (out / 2);
    return unit / 16 * kPair + unit % 16 + (row >= out / 2 ? 16 : 0);
  }
};

// Place of input k (0 .. depth - 1 of its step) of packed column c (0 .. 31) among a step's elements.
inline int place_in_step(int k, int c, int depth = kStep) {
  return c / 16 * (16 * depth) + k / 2 * 32 + c % 16 * 2 + k % 2;
}

// Memory to ask for while a product runs: `bytes` more with each of its steps.
struct Ahead {
  const char* from;
  int64_t bytes;

  TM_INLINE void operator()(int64_t step) const {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + step * bytes + i, 0, 2);
  }
};

inline float half_to_float(uint16_t half) {
#if defined(__F16C__) || defined(__AVX512F__)
  return _cvtsh_ss(half);
#else
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  float scaled;
  std::memcpy(&scaled, &magnitude, 4);
  scaled *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias; subnormal halves come out right
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  if ((half & 0x7C00u) == 0x7C00u) bits |= 0x7F800000u;
  bits |= sign;
  std::memcpy(&scaled, &bits, 4);
  return scaled;
#endif
}

TM_INLINE F load_half(const uint16_t* from) {
#if defined(__AVX512F__)
  return {{(NativeF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))}};
#elif defined(__F16C__)
  F r;
  TM_EACH {
    r.part[p] = (NativeF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * kNative)));
  }
  return r;
#else
  float wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = half_to_float(from[i]);
  return load(wide);
#endif
}

}  // namespace tokenmill
