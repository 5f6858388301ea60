// Quantized weights times rows of 16-bit integers, for every instruction set but AMX: pairs of products are added up
// exactly in 32 bits, twice as many at a time as in float32.
//
//   x of 32 inputs  =  scale(x) * integers    the scale is a power of two, such that bfloat16 numbers from a 128th of
//                                             the largest on are exact
//   sums  +=  scale(x) * scale(weight) * (integers . (q - zero_point))  +  minimum * scale(x) * sum(integers)
//
// The integers' sums are exact in any order and the groups follow each other, so a row's result is the same bits in any
// company.
#pragma once

#include <algorithm>
#include <type_traits>

#include "epilogue.h"
#include "operand.h"
#include "packed.h"
#include "product.h"
#include "threads.h"

namespace tokenmill {

using NativeS16 = int16_t __attribute__((vector_size(kNative * 4)));
using S16 = Lanes<NativeS16>;  // 32 lanes: a line of 16 columns with two inputs each

// sums + the products of both inputs.
TM_INLINE I add_pairs(S16 a, S16 b, I sums) {
#if defined(__AVX512VNNI__)
  sums.part[0] = (NativeI)_mm512_dpwssd_epi32((__m512i)sums.part[0], (__m512i)a.part[0], (__m512i)b.part[0]);
#elif defined(__AVX512BW__)
  sums.part[0] += (NativeI)_mm512_madd_epi16((__m512i)a.part[0], (__m512i)b.part[0]);
#elif defined(__AVX2__)
  TM_EACH sums.part[p] += (NativeI)_mm256_madd_epi16((__m256i)a.part[p], (__m256i)b.part[p]);
#else
  TM_EACH {
    const NativeI x = (NativeI)a.part[p], y = (NativeI)b.part[p];
    sums.part[p] += (x >> 16) * (y >> 16) + (x << 16 >> 16) * (y << 16 >> 16);
  }
#endif
  return sums;
}

// 32 bytes, widened with or without their sign.
template <class Byte>
TM_INLINE S16 widen_bytes(const Byte* from) {
  S16 r;
  constexpr int kBytes = 2 * kNative;
#if defined(__AVX512BW__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  r.part[0] = (NativeS16)(std::is_signed_v<Byte> ? _mm512_cvtepi8_epi16(bytes)
                                                 : _mm512_cvtepu8_epi16(bytes));
#elif defined(__AVX2__)
  TM_EACH {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p * kBytes));
    r.part[p] = (NativeS16)(std::is_signed_v<Byte> ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes));
  }
#else
  TM_EACH {
    Byte __attribute__((vector_size(kBytes))) bytes;
    std::memcpy(&bytes, from + p * kBytes, kBytes);
    r.part[p] = __builtin_convertvector(bytes, NativeS16);
  }
#endif
  return r;
}

// Where the lines of a tile lie, and how one is read.
struct ByteLines {
  static constexpr int kTwo = 64;  // bytes of two neighbouring lines
  template <int kOdd>
  TM_INLINE static S16 read(const uint8_t* two) {
    return widen_bytes(reinterpret_cast<const int8_t*>(two) + 32 * kOdd);
  }
};

struct NibbleLines {
  static constexpr int kTwo = 32;
  template <int kOdd>
  TM_INLINE static S16 read(const uint8_t* two) {
    S16 line = widen_bytes(two);
    TM_EACH line.part[p] = kOdd ? line.part[p] >> 4 : line.part[p] & 15;
    return line;
  }
};

struct FloatLines {
  static constexpr int kTwo = 32;
  template <int kOdd>
  TM_INLINE static S16 read(const uint8_t* two) {
    S16 line;
#if defined(__AVX512BW__)
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kFloats4)));
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two));
    const __m256i bits = _mm256_and_si256(kOdd ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
    line.part[0] = (NativeS16)_mm512_cvtepi8_epi16(_mm256_shuffle_epi8(table, bits));
#elif defined(__AVX2__)
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kFloats4));
    TM_EACH {
      const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(two + 16 * p));
      const __m128i bits = _mm_and_si128(kOdd ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
      line.part[p] = (NativeS16)_mm256_cvtepi8_epi16(_mm_shuffle_epi8(table, bits));
    }
#else
    int8_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = kFloats4[two[i] >> (4 * kOdd) & 15];
    line = widen_bytes(values);
#endif
    return line;
  }
};

// What the others read, written once for several blocks of rows.
struct WideLines {
  static constexpr int kTwo = 128;
  template <int kOdd>
  TM_INLINE static S16 read(const uint8_t* two) {
    return load_bits<NativeS16>(two + 64 * kOdd);
  }
  template <class Source>
  static void write(const uint8_t* from, int64_t bytes, uint8_t* to) {
    for (int64_t i = 0; i < bytes; i += Source::kTwo, to += kTwo) {
      const S16 even = Source::template read<0>(from + i), odd = Source::template read<1>(from + i);
      TM_EACH std::memcpy(to + p * sizeof(NativeS16), &even.part[p], sizeof(NativeS16));
      TM_EACH std::memcpy(to + 64 + p * sizeof(NativeS16), &odd.part[p], sizeof(NativeS16));
    }
  }
};

// Rows of x in bfloat16 as integers.
struct IntegerRows {
  // Of 32 inputs: what their sums are multiplied by, what a minimum is, and where a sum begins for the zero point.
  struct Step {
    float scale;
    float total;
    int32_t zero;
  };
  const int16_t* x;   // [rows][stride]
  int64_t stride;
  const Step* steps;  // [rows][count]
  int64_t count;
};

// 32 inputs, of which those from n on are taken as zero. A row with infinity or NaN comes out as NaN.
TM_INLINE IntegerRows::Step quantize_step(const bf16* from, int64_t n, const Packed& w, int16_t* to) {
  F value[2] = {n > 0 ? load_up_to(from, n) : F{}, n > kLanes ? load_up_to(from + kLanes, n - kLanes) : F{}};
  const F size = max(bits_of<NativeF>(bits_of<NativeU>(value[0]) & splat(0x7FFFFFFFu)),
                     bits_of<NativeF>(bits_of<NativeU>(value[1]) & splat(0x7FFFFFFFu)));
  const F finite = value[0] - value[0] + (value[1] - value[1]);  // zeros, or NaN
  const float largest = reduce_max(size), wrong = reduce_add(finite);
  uint32_t bits;
  std::memcpy(&bits, &largest, 4);
  // 2^-14 of the largest's power of two, itself a normal number and the inverse of one.
  const uint32_t exponent = std::min(std::max(bits >> 23, 15u), 254u) - 14;
  float scale, inverse;
  const uint32_t scale_bits = exponent << 23, inverse_bits = (254 - exponent) << 23;
  std::memcpy(&scale, &scale_bits, 4);
  std::memcpy(&inverse, &inverse_bits, 4);
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  I total = {};
  for (int half = 0; half < 2; ++half) {
    const I rounded = bits_of<NativeI>(fma(value[half], splat(inverse), shift)) - bits_of<NativeI>(shift);
    total = total + rounded;
    alignas(64) int32_t lanes[kLanes];
    std::memcpy(lanes, &rounded, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) to[half * kLanes + i] = static_cast<int16_t>(lanes[i]);
  }
  const float sum = reduce_add(to_float(total));  // exact: less than 2^20
  const float factor = (w.row_wide() ? scale : scale * w.unit) + wrong;
  return {factor, factor * sum, -w.zero_point * static_cast<int32_t>(sum)};
}

inline IntegerRows integer_rows(const bf16* x, const int32_t* from, const Packed& w, int64_t rows) {
  using Step = IntegerRows::Step;
  const int64_t padded = w.padded_in(), count = padded / kStep;
  const int64_t bytes = divide_up(rows * padded * 2, 64) * 64;
  uint8_t* memory = scratch<uint8_t>(kRows, bytes + rows * count * static_cast<int64_t>(sizeof(Step)));
  int16_t* to = reinterpret_cast<int16_t*>(memory);
  Step* steps = reinterpret_cast<Step*>(memory + bytes);
  parallel_ranges(rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const bf16* row = x + row_from(from, r) * w.in;
      for (int64_t k = 0; k < count; ++k) {
        steps[r * count + k] = quantize_step(row + k * kStep, w.in - k * kStep, w, to + r * padded + k * kStep);
      }
    }
  });
  return {to, padded, steps, count};
}

// How a weight's integers come: in units of 32 inputs, or of 16 where a group has no more. Computed once, since it takes
// divisions, and what stores may reach is loaded again after each.
struct UnitShape {
  const int64_t depth;  // inputs
  const int64_t scale_bytes, step_bytes, group_bytes;
  const int64_t count;     // units of a pair
  const int64_t in_group;  // of a group
  const bool scaled, minima;

  explicit UnitShape(const Packed& w)
      : depth(w.depth()),
        scale_bytes(w.scale_bytes()),
        step_bytes(w.step_bytes()),
        group_bytes(w.group_bytes()),
        count(w.padded_in() / depth),
        in_group(divide_up(w.group, depth)),
        scaled(!w.row_wide()),
        minima(w.minima) {}
};

// A pair's units one after the other.
struct Units {
  const UnitShape& shape;
  const uint8_t* group;
  int64_t index = 0;   // of the unit in the pair
  int64_t inside = 0;  // and in its group

  Units(const UnitShape& of, const uint8_t* pair) : shape(of), group(pair) {}

  const uint8_t* integers() const { return group + shape.scale_bytes + inside * shape.step_bytes; }
  const uint16_t* scales() const { return reinterpret_cast<const uint16_t*>(group); }
  int64_t input() const { return index * shape.depth; }
  TM_INLINE void next() {
    ++index;
    if (++inside < shape.in_group) return;
    inside = 0;
    group += shape.group_bytes;
  }
};

constexpr int kIntegersTogether = kNative == 16 ? 11 : 4;  // rows

// part [R][tiles] += x * line, for one of two neighbouring lines.
template <class Source, int kOdd, int R, int kTiles>
TM_INLINE void add_line(const int16_t* x, int64_t stride, const uint8_t* two, int64_t tile_bytes,
                        I (&part)[R][kTiles]) {
  S16 line[kTiles];
  for (int t = 0; t < kTiles; ++t) line[t] = Source::template read<kOdd>(two + t * tile_bytes);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    int32_t both;
    std::memcpy(&both, x + r * stride + 2 * kOdd, 4);
    const S16 input = bits_of<NativeS16>(splat(both));
    for (int t = 0; t < kTiles; ++t) part[r][t] = add_pairs(line[t], input, part[r][t]);
  }
}

// sums [R][32] += one unit's products, from its tile `tile` on; `from` holds its integers as `Source` reads them.
template <int R, int kTiles, class Source>
TM_INLINE void add_unit(const IntegerRows& rows, int64_t first, const Units& unit, const uint8_t* from, int tile,
                        float* sums) {
  const int64_t depth = unit.shape.depth, tile_bytes = depth / 4 * Source::kTwo, count = rows.count;
  const bool scaled = unit.shape.scaled, minima = unit.shape.minima;
  const int16_t* x = rows.x + first * rows.stride + unit.input();
  const IntegerRows::Step* step = rows.steps + first * count + unit.input() / kStep;
  I part[R][kTiles];
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < kTiles; ++t) part[r][t] = splat(step[r * count].zero);
  }
  from += tile * tile_bytes;
  for (int64_t k = 0; k < depth; k += 4, from += Source::kTwo) {
    add_line<Source, 0>(x + k, rows.stride, from, tile_bytes, part);
    add_line<Source, 1>(x + k, rows.stride, from, tile_bytes, part);
  }
  for (int t = 0; t < kTiles; ++t) {
    const uint16_t* scales = unit.scales() + (tile + t) * kLanes;
    const F scale = scaled ? load_half(scales) : splat(1.0f);
    const F minimum = minima ? load_half(scales + kPair) : F{};
    float* to = sums + (tile + t) * kLanes;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r, to += kPair) {
      const IntegerRows::Step& s = step[r * count];
      F sum = fma(to_float(part[r][t]) * splat(s.scale), scale, load(to));
      if (minima) sum = fma(minimum, splat(s.total), sum);
      store(to, sum);
    }
  }
}

// Pairs of a quantized weight times rows [first, last).
class IntegerTask {
 public:
  IntegerTask(const Call& call, const IntegerRows& operand, int64_t first, int64_t last)
      : call_(call),
        w_(call.weight),
        shape_(call.weight),
        operand_(operand),
        first_(first),
        rows_(static_cast<int>(last - first)) {
    sums_ = scratch<float>(kAccumulator, rows_ * kPair);
    if (rows_ > kIntegersTogether) wide_ = scratch<uint8_t>(kPanel, kNear * kStepElements * 2);
  }

  void run(int64_t pair) {
    std::memset(sums_, 0, static_cast<size_t>(rows_) * kPair * 4);
    Units unit(shape_, w_.pair(pair));
    while (unit.index < shape_.count) {
      if (wide_) {
        several_blocks(unit, std::min(kNear, shape_.count - unit.index));
      } else if (w_.format == kFloat4) {
        one_block<FloatLines>(unit);
      } else if (w_.format == kInt4) {
        one_block<NibbleLines>(unit);
      } else {
        one_block<ByteLines>(unit);
      }
    }
    if (w_.row_wide()) scale_sums(w_, pair, rows_, sums_);
    finish(call_, pair, first_, rows_, sums_);
  }

 private:
  static constexpr int64_t kNear = 8;       // units that are widened at a time: 16 KiB
  static constexpr int64_t kSoon = 4096;    // bytes that are asked for in advance

  template <class Source>
  void one_block(Units& unit) {
    with_rows<kIntegersTogether>(rows_, [&](auto height) {
      ask(unit);
      add<decltype(height)::value, Source>(0, unit, unit.integers());
    });
    unit.next();
  }

  // The next `count` units, for all blocks of rows.
  void several_blocks(Units& unit, int64_t count) {
    const Units start = unit;
    const int64_t bytes = shape_.depth * kPair * 2;
    for (int64_t i = 0; i < count; ++i, unit.next()) widen(unit.integers(), wide_ + i * bytes);
    in_row_blocks<kIntegersTogether, kLeastOfSeveral<kIntegersTogether>>(rows_, [&](int first, auto height) {
      Units at = start;
      for (int64_t i = 0; i < count; ++i, at.next()) {
        if (first == 0) ask(at);
        add<decltype(height)::value, WideLines>(first, at, wide_ + i * bytes);
      }
    });
  }

  void ask(const Units& unit) const {
    const uint8_t* from = unit.integers() + kSoon;
    for (int64_t i = 0; i < shape_.step_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

  void widen(const uint8_t* from, uint8_t* to) const {
    if (w_.format == kFloat4) {
      WideLines::write<FloatLines>(from, shape_.step_bytes, to);
    } else if (w_.format == kInt4) {
      WideLines::write<NibbleLines>(from, shape_.step_bytes, to);
    } else {
      WideLines::write<ByteLines>(from, shape_.step_bytes, to);
    }
  }

  template <int R, class Source>
  void add(int first, const Units& unit, const uint8_t* from) const {
    float* sums = sums_ + first * kPair;
    if constexpr (kNative == 16 || R == 1) {
      add_unit<R, 2, Source>(operand_, first_ + first, unit, from, 0, sums);
    } else {
      add_unit<R, 1, Source>(operand_, first_ + first, unit, from, 0, sums);
      add_unit<R, 1, Source>(operand_, first_ + first, unit, from, 1, sums);
    }
  }

  const Call& call_;
  const Packed& w_;
  const UnitShape shape_;
  const IntegerRows& operand_;
  const int64_t first_;
  const int rows_;
  float* sums_;
  uint8_t* wide_ = nullptr;
};

}  // namespace tokenmill
