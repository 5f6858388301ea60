// bfloat16 weights in twelve bits a value, nothing lost.
//
// The upper byte of a bfloat16 (the sign and seven bits of the exponent) takes few values in a weight. A nibble names
// one of a table of 16, eight exponents with either sign; the lower byte stays as it is. Values whose upper byte isn't
// in the table, some in ten thousand, stand in a list beside the weight.
//
//   coded      [pairs][steps][8 groups of 4 lines]{ nibbles [64], lower bytes of 2 lines [64], of 2 more [64] }
//
// Bytes of two lines lie as interleaving them by quarters of 16 makes lines of 32 values: quarter q holds those of
// values 8q .. 8q + 7 of the first line, then of the second. The low nibbles belong to the first two lines of a group.
#pragma once

#include <algorithm>
#include <vector>

#include "packed.h"

namespace tokenmill {

constexpr int kFourLines = 128;        // values of a group
constexpr int kFourLinesBytes = 192;   // of a group

// Where value `i` of four lines lies in their bytes.
struct CodedPlace {
  int byte;   // of its nibble
  int shift;  // of that in the byte
  int lower;  // its lower byte

  explicit CodedPlace(int i) {
    const int line = i / 32, value = i % 32;
    byte = value / 8 * 16 + line % 2 * 8 + value % 8;
    shift = line / 2 * 4;
    lower = 64 + line / 2 * 64 + byte;
  }
};

TM_INLINE uint16_t coded_value(const uint8_t* lines, const CodedPlace& at, const uint8_t* upper) {
  return static_cast<uint16_t>(upper[lines[at.byte] >> at.shift & 15] << 8 | lines[at.lower]);
}

// The first of a coded weight's exceptions in step `step` of the whole weight, or after it.
inline const Exception* exceptions_from(const Packed& w, int64_t step) {
  return std::lower_bound(w.exceptions, w.exceptions + w.exception_count, static_cast<uint32_t>(step),
                          [](const Exception& e, uint32_t s) { return e.step < s; });
}

#if defined(__AVX2__)
TM_INLINE __m256i load_half_line(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
TM_INLINE void store_half_line(void* to, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
#endif

// A weight's steps to coded ones.
class CodeTable {
 public:
  explicit CodeTable(const Packed& w) : upper_(w.upper) {
    std::memset(code_, kNone, sizeof code_);
    for (int i = 0; i < 16; ++i) code_[w.upper[i]] = static_cast<uint8_t>(i);
  }

  // A step [2][16][16][2], number `number` of the whole weight, to `to`; what the table lacks is added to `exceptions`.
  void encode(const bf16* step, uint32_t number, uint8_t* to, std::vector<Exception>& exceptions) const {
    for (int i = 0; i < kStepElements; i += kFourLines, to += kFourLinesBytes) {
      if (four_lines(step + i, to)) continue;
      for (int place = i; place < i + kFourLines; ++place) {
        if (code_[step[place].bits >> 8] != kNone) continue;
        exceptions.push_back({number, static_cast<uint16_t>(place), step[place].bits});
      }
    }
  }

 private:
  static constexpr uint8_t kNone = 128;  // its low bits stand for any code

  // Whether the table holds all of them.
#if defined(__AVX512VBMI__)
  bool four_lines(const bf16* from, uint8_t* to) const {
    const __m512i byte = _mm512_set1_epi16(255), seven = _mm512_set1_epi8(127);
    const __m512i first = _mm512_loadu_si512(code_), second = _mm512_loadu_si512(code_ + 64);
    __m512i codes[2];
    __mmask64 missing = 0;
    for (int half = 0; half < 2; ++half, from += 64) {
      const __m512i left = _mm512_loadu_si512(from), right = _mm512_loadu_si512(from + 32);
      const __m512i lower = _mm512_packus_epi16(_mm512_and_si512(left, byte), _mm512_and_si512(right, byte));
      const __m512i upper = _mm512_packus_epi16(_mm512_srli_epi16(left, 8), _mm512_srli_epi16(right, 8));
      const __m512i code = _mm512_permutex2var_epi8(first, _mm512_and_si512(upper, seven), second);
      missing |= _mm512_movepi8_mask(code);
      const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(upper, 4), _mm512_set1_epi8(8));
      codes[half] = _mm512_and_si512(_mm512_or_si512(code, sign), _mm512_set1_epi8(15));
      _mm512_storeu_si512(to + 64 + half * 64, lower);
    }
    _mm512_storeu_si512(to, _mm512_or_si512(codes[0], _mm512_slli_epi16(codes[1], 4)));
    return missing == 0;
  }
#elif defined(__AVX2__)
  bool four_lines(const bf16* from, uint8_t* to) const {
    const __m256i byte = _mm256_set1_epi16(255), seven = _mm256_set1_epi8(127);
    __m256i all = _mm256_set1_epi8(-1);
    for (int part = 0; part < 2; ++part, from += 16, to += 32) {
      __m256i codes[2];
      for (int half = 0; half < 2; ++half) {
        const __m256i left = load_half_line(from + half * 64), right = load_half_line(from + half * 64 + 32);
        const __m256i lower = _mm256_packus_epi16(_mm256_and_si256(left, byte), _mm256_and_si256(right, byte));
        const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(left, 8), _mm256_srli_epi16(right, 8));
        const __m256i exponent = _mm256_and_si256(upper, seven);
        __m256i code = _mm256_and_si256(_mm256_srli_epi16(upper, 4), _mm256_set1_epi8(8)), found = {};
        for (int i = 0; i < 8; ++i) {
          const __m256i same = _mm256_cmpeq_epi8(exponent, _mm256_set1_epi8(static_cast<char>(upper_[i])));
          found = _mm256_or_si256(found, same);
          code = _mm256_or_si256(code, _mm256_and_si256(same, _mm256_set1_epi8(static_cast<char>(i))));
        }
        all = _mm256_and_si256(all, found);
        codes[half] = code;
        store_half_line(to + 64 + half * 64, lower);
      }
      store_half_line(to, _mm256_or_si256(codes[0], _mm256_slli_epi16(codes[1], 4)));
    }
    return _mm256_movemask_epi8(all) == -1;
  }
#else
  bool four_lines(const bf16* from, uint8_t* to) const {
    bool all = true;
    std::memset(to, 0, 64);
    for (int i = 0; i < kFourLines; ++i) {
      const CodedPlace at(i);
      const uint8_t code = code_[from[i].bits >> 8];
      all &= code != kNone;
      to[at.byte] |= static_cast<uint8_t>((code & 15) << at.shift);
      to[at.lower] = static_cast<uint8_t>(from[i].bits);
    }
    return all;
  }
#endif

  const uint8_t* upper_;  // of a code; those of the lower eight have no sign
  uint8_t code_[256];     // of an upper byte
};

// A coded weight's steps as bfloat16, in order from wherever `seek` went.
class CodedSteps {
 public:
  explicit CodedSteps(const Packed& weight) : w_(weight) {
    std::memcpy(upper_, weight.upper, sizeof upper_);
#if defined(__AVX512BW__)
    table_ = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper_)));
#elif defined(__AVX2__)
    table_ = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper_)));
#endif
  }

  // To step `number` of the whole weight.
  void seek(int64_t number) {
    number_ = static_cast<uint32_t>(number);
    next_ = exceptions_from(w_, number);
  }

  static constexpr int kParts = kStepElements / kFourLines;

  // The step that comes next, which is `step` of the pair, to `to` [2][16][16][2].
  TM_INLINE void unpack(const uint8_t* pair, int64_t step, bf16* to) {
    for (int part = 0; part < kParts; ++part) unpack_part(pair, step, part, to);
  }

  // The same, part by part.
  TM_INLINE void unpack_part(const uint8_t* pair, int64_t step, int part, bf16* to) {
    four_lines(pair + step * kCodedStepBytes + part * kFourLinesBytes, to + part * kFourLines);
    if (part + 1 < kParts) return;
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
#elif defined(__AVX2__)
  TM_INLINE void four_lines(const uint8_t* from, bf16* to) const {
    const __m256i low = _mm256_set1_epi8(15);
    for (int part = 0; part < 2; ++part, from += 32, to += 16) {
      const __m256i nibbles = load_half_line(from);
      const __m256i codes[2] = {_mm256_and_si256(nibbles, low),
                                _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low)};
      for (int half = 0; half < 2; ++half) {
        const __m256i lower = load_half_line(from + 64 + half * 64);
        const __m256i upper = _mm256_shuffle_epi8(table_, codes[half]);
        store_half_line(to + half * 64, _mm256_unpacklo_epi8(lower, upper));
        store_half_line(to + half * 64 + 32, _mm256_unpackhi_epi8(lower, upper));
      }
    }
  }

  __m256i table_;
#else
  void four_lines(const uint8_t* from, bf16* to) const {
    for (int i = 0; i < kFourLines; ++i) to[i].bits = coded_value(from, CodedPlace(i), upper_);
  }
#endif

  const Packed& w_;
  const Exception* next_ = nullptr;
  uint32_t number_ = 0;
  uint8_t upper_[16];
};

}  // namespace tokenmill
