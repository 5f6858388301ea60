// Quantized weights into the packed layout: from plain weights (rounded here) and from GGUF blocks (kept as they
// are: every source gives integers, a scale and a minimum for each group, and only their order changes).
#include <algorithm>
#include <cmath>

#include "api.h"
#include "gguf.h"
#include "packed.h"
#include "threads.h"

namespace tokenmill {
namespace {

// Round to nearest even; too large becomes infinite.
uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits >= 0x477FF000u) return sign | 0x7C00u;
  if (bits < 0x38800000u) {  // subnormal: multiples of 2^-24
    return sign | static_cast<uint16_t>(std::lrint(std::fabs(value) * 16777216.0f));
  }
  bits += 0xFFFu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

int rounded(float value, int low, int high) {
  return std::min(high, std::max(low, static_cast<int>(std::lrint(value))));
}

// Plain weights: 8 bits about zero, 4 bits between the group's extremes.
void round_group(const Packed& w, const float* values, Group& group) {
  float low = 0, high = 0;
  for (int64_t k = 0; k < w.group; ++k) {
    low = std::min(low, values[k]);
    high = std::max(high, values[k]);
  }
  const float exact = w.format == kInt4 ? (high - low) / 15 : std::max(high, -low) / 127;
  group.scale = half_to_float(float_to_half(exact / w.unit)) * w.unit;
  group.minimum = w.minima ? half_to_float(float_to_half(low / w.unit)) * w.unit : 0.0f;
  const float inverse = group.scale > 0 ? 1 / group.scale : 0.0f;
  for (int64_t k = 0; k < w.group; ++k) {
    const float steps = (values[k] - group.minimum) * inverse;
    group.integers[k] = static_cast<int8_t>(w.format == kInt4 ? rounded(steps, 0, 15) : rounded(steps, -127, 127));
  }
}

template <class T>
void read_plain(const Packed& w, const T* weight, int64_t row, int64_t g, float* values) {
  for (int64_t i = 0; i < w.group; ++i) {
    const int64_t k = g * w.group + i;
    values[i] = k < w.in ? to_float(weight[row * w.in + k]) : 0.0f;
  }
}

// Puts one group of packed column c in place.
void write_group(const Packed& w, const Group& group, int c, uint8_t* to) {
  uint16_t* scales = reinterpret_cast<uint16_t*>(to);
  scales[c] = float_to_half(group.scale / w.unit);
  if (w.minima) scales[kPair + c] = float_to_half(group.minimum / w.unit);
  const int depth = w.depth();
  for (int64_t k = 0; k < w.group; ++k) {
    uint8_t* step = to + w.scale_bytes() + k / depth * w.step_bytes();
    const int place = place_in_step(static_cast<int>(k % depth), c, depth);
    if (w.format == kInt4) {
      const int nibble = group.integers[k] + w.zero_point, line = place / 32;
      step[line / 2 * 32 + place % 32] |= static_cast<uint8_t>(nibble << (line % 2 * 4));
    } else {
      step[place] = static_cast<uint8_t>(group.integers[k]);
    }
  }
}

void pack_pair(const Packed& w, int source, const void* weight, int64_t pair, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(w.pair_bytes()));
  int8_t* integers = scratch<int8_t>(kPanel, w.group);
  float* values = scratch<float>(kAccumulator, w.group);
  for (int c = 0; c < kPair; ++c) {
    const int64_t row = w.row_of(pair, c);
    for (int64_t g = 0; row >= 0 && g < w.groups(); ++g) {
      Group group{0, 0, integers};
      if (source >= kQ4_0) {
        read_block_group(source, static_cast<const uint8_t*>(weight), row * w.in + g * w.group, group);
      } else {
        if (source == kTypeBf16) {
          read_plain(w, static_cast<const bf16*>(weight), row, g, values);
        } else {
          read_plain(w, static_cast<const float*>(weight), row, g, values);
        }
        round_group(w, values, group);
      }
      write_group(w, group, c, to + g * w.group_bytes());
    }
    if (row >= 0 || w.format != kInt4) continue;
    Group empty{0, 0, integers};  // rows that don't exist hold zeros, whatever nibble stands for zero
    std::memset(integers, 0, static_cast<size_t>(w.group));
    for (int64_t g = 0; g < w.groups(); ++g) write_group(w, empty, c, to + g * w.group_bytes());
  }
}

}  // namespace
}  // namespace tokenmill

// Packs `weight` [out, in]: plain of a type of api.h, or whole GGUF blocks of a kind of gguf.h.
TM_API void tm_pack_quantized(const tokenmill::Packed* packed, int source, const void* weight, uint8_t* to) {
  using namespace tokenmill;
  parallel_for(packed->pairs(),
               [&](int64_t pair) { pack_pair(*packed, source, weight, pair, to + pair * packed->pair_bytes()); });
}
