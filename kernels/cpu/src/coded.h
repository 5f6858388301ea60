// bfloat16 weights in twelve bits a value, nothing lost.
//
// The upper byte of a bfloat16 (the sign and seven bits of the exponent) takes few values in a weight. A nibble names
// one of a table of 16, eight exponents with either sign; the lower byte stays as it is. Values whose upper byte isn't
// in the table, a few in ten thousand, stand in a list beside the weight.
//
//   coded      [pairs][steps][8 groups of 4 lines]{ nibbles [64], lower bytes of 2 lines [64], of 2 more [64] }
//
// Two lines of 32 values lie so that the bytes of 16-byte quarter q of either array are those of values 8q .. 8q + 7 of
// the first line, then of the second: what interleaving bytes by quarters turns into both lines. The low nibbles belong
// to the first two lines, the high ones to the others.
#pragma once

#include <algorithm>

#include "packed.h"

namespace tokenmill {

// Where value `i` (0 .. 127) of four lines lies in their 192 bytes.
struct CodedPlace {
  int byte;   // of its nibble
  int shift;  // of that in the byte
  int lower;  // byte, after the nibbles

  explicit CodedPlace(int i) {
    const int line = i / 32, value = i % 32;
    byte = value / 8 * 16 + line % 2 * 8 + value % 8;
    shift = line / 2 * 4;
    lower = line / 2 * 64 + byte;
  }
};

// A coded weight's steps as bfloat16, in order from wherever `seek` went.
class CodedSteps {
 public:
  explicit CodedSteps(const Packed& weight) : w_(weight) {
    std::memcpy(upper_, weight.upper, sizeof upper_);
#if defined(__AVX512BW__)
    table_ = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper_)));
#endif
  }

  // To step `number` of the whole weight.
  void seek(int64_t number) {
    number_ = static_cast<uint32_t>(number);
    next_ = std::lower_bound(w_.exceptions, w_.exceptions + w_.exception_count, number_,
                             [](const Exception& e, uint32_t step) { return e.step < step; });
  }

  // The step that comes next, which is `step` of the pair, to `to` [2][16][16][2].
  TM_INLINE void unpack(const uint8_t* pair, int64_t step, bf16* to) {
    const uint8_t* from = pair + step * kCodedStepBytes;
    for (int group = 0; group < 8; ++group) four_lines(from + group * 192, to + group * 128);
    for (; next_->step == number_; ++next_) to[next_->place].bits = next_->value;
    ++number_;
  }

 private:
#if defined(__AVX512BW__)
  TM_INLINE void four_lines(const uint8_t* from, bf16* to) const {
    const __m512i nibbles = _mm512_loadu_si512(from), low = _mm512_set1_epi8(15);
    const __m512i codes[2] = {_mm512_and_si512(nibbles, low), _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), low)};
    for (int half = 0; half < 2; ++half) {
      const __m512i lower = _mm512_loadu_si512(from + 64 + half * 64);
      const __m512i upper = _mm512_shuffle_epi8(table_, codes[half]);
      _mm512_storeu_si512(to + half * 64, _mm512_unpacklo_epi8(lower, upper));
      _mm512_storeu_si512(to + half * 64 + 32, _mm512_unpackhi_epi8(lower, upper));
    }
  }

  __m512i table_;
#else
  void four_lines(const uint8_t* from, bf16* to) const {
    for (int i = 0; i < 128; ++i) {
      const CodedPlace at(i);
      const int code = from[at.byte] >> at.shift & 15;
      to[i].bits = static_cast<uint16_t>(upper_[code] << 8 | from[64 + at.lower]);
    }
  }
#endif

  const Packed& w_;
  const Exception* next_ = nullptr;
  uint32_t number_ = 0;
  uint8_t upper_[16];
};

}  // namespace tokenmill
