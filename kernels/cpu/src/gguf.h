// GGUF's quantized blocks, as the format's specification lays them out: a group at a time, integers unchanged.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed.h"

namespace tokenmill {

enum Block { kQ4_0 = 16, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kMxfp4 };
constexpr int kGroups = 32;  // a source that is no block: quantize.cpp's Groups

// weight = scale * integer + minimum, for each input of the group.
struct Group {
  float scale;
  float minimum;
  int8_t* integers;
};

inline float half_at(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  return half_to_float(half);
}

// 32 nibbles in 16 bytes (low ones first), a fifth bit of each in `high`.
inline void read_nibbles(const uint8_t* bytes, uint32_t high, int zero_point, int8_t* to) {
  for (int i = 0; i < 16; ++i) {
    to[i] = static_cast<int8_t>((bytes[i] & 15) + (high >> i & 1) * 16 - zero_point);
    to[i + 16] = static_cast<int8_t>((bytes[i] >> 4) + (high >> (i + 16) & 1) * 16 - zero_point);
  }
}

inline void read_q4(const uint8_t* block, bool minimum, Group& group) {
  group.scale = half_at(block);
  group.minimum = minimum ? half_at(block + 2) : 0.0f;
  read_nibbles(block + (minimum ? 4 : 2), 0, minimum ? 0 : 8, group.integers);
}

inline void read_q5(const uint8_t* block, bool minimum, Group& group) {
  group.scale = half_at(block);
  group.minimum = minimum ? half_at(block + 2) : 0.0f;
  const uint8_t* bits = block + (minimum ? 4 : 2);
  uint32_t high;
  std::memcpy(&high, bits, 4);
  read_nibbles(bits + 4, high, minimum ? 0 : 16, group.integers);
}

inline void read_q8(const uint8_t* block, Group& group) {
  group.scale = half_at(block);
  std::memcpy(group.integers, block + 2, 32);
}

// Super-blocks of 256 in 8 groups of 32: d and dmin (half), 6-bit scales and minima in 12 bytes, a fifth bit of
// each weight where `five`, nibbles (a group and the next share 32 bytes).
inline void read_q45_k(const uint8_t* block, int index, bool five, Group& group) {
  const uint8_t* six = block + 4;
  int scale, minimum;
  if (index < 4) {
    scale = six[index] & 63;
    minimum = six[index + 4] & 63;
  } else {
    scale = (six[index + 4] & 15) | (six[index - 4] >> 6) << 4;
    minimum = (six[index + 4] >> 4) | (six[index] >> 6) << 4;
  }
  group.scale = half_at(block) * static_cast<float>(scale);
  group.minimum = -half_at(block + 2) * static_cast<float>(minimum);
  const uint8_t* high = block + 16;
  const uint8_t* nibbles = block + (five ? 48 : 16) + index / 2 * 32;
  for (int i = 0; i < 32; ++i) {
    int q = nibbles[i] >> (index % 2 * 4) & 15;
    if (five) q |= (high[i] >> index & 1) << 4;
    group.integers[i] = static_cast<int8_t>(q);
  }
}

// Super-blocks of 256 in 16 groups of 16: low nibbles [128], high bit pairs [64], scales int8 [16], d (half).
inline void read_q6_k(const uint8_t* block, int index, Group& group) {
  const int8_t* scales = reinterpret_cast<const int8_t*>(block + 192);
  group.scale = half_at(block + 208) * static_cast<float>(scales[index]);
  group.minimum = 0;
  const int quarter = index / 2 % 4;  // of the half super-block that the group lies in
  const int at = index % 2 * 16;
  const uint8_t* low = block + index / 8 * 64 + quarter % 2 * 32 + at;
  const uint8_t* high = block + 128 + index / 8 * 32 + at;
  for (int i = 0; i < 16; ++i) {
    const int q = (low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> (quarter * 2) & 3) << 4;
    group.integers[i] = static_cast<int8_t>(q - 32);
  }
}

// A power of two and 32 nibbles that are 4-bit floats; the integers of kFloat4 are these nibbles, twice their values.
inline void read_mxfp4(const uint8_t* block, Group& group) {
  group.scale = std::ldexp(1.0f, block[0] - 128);
  group.minimum = 0;
  read_nibbles(block + 1, 0, 0, group.integers);
}

// The group that begins with element `first` of blocks that lie one after the other, row after row.
inline void read_block_group(int kind, const uint8_t* blocks, int64_t first, Group& group) {
  const int64_t block = first / 32, super = first / 256;
  const int index = static_cast<int>(first % 256);
  switch (kind) {
    case kQ4_0:
      return read_q4(blocks + block * 18, false, group);
    case kQ4_1:
      return read_q4(blocks + block * 20, true, group);
    case kQ5_0:
      return read_q5(blocks + block * 22, false, group);
    case kQ5_1:
      return read_q5(blocks + block * 24, true, group);
    case kQ8_0:
      return read_q8(blocks + block * 34, group);
    case kQ4_K:
      return read_q45_k(blocks + super * 144, index / 32, false, group);
    case kQ5_K:
      return read_q45_k(blocks + super * 176, index / 32, true, group);
    case kMxfp4:
      return read_mxfp4(blocks + block * 17, group);
    default:
      return read_q6_k(blocks + super * 210, index / 16, group);
  }
}

}  // namespace tokenmill
