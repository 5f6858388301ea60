// Quantized weights into the packed layout: from plain weights (rounded here), from GGUF blocks and from groups as other
// checkpoints pack them (kept as they are: these sources give integers, a scale and a minimum for each group, and only
// their order changes).
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

// The group's values in whole vectors, zero beyond the weight's end.
template <class T>
void read_plain(const Packed& w, const T* weight, int64_t row, int64_t g, float* values) {
  const T* from = weight + row * w.in + g * w.group;
  const int64_t there = w.in - g * w.group;
  for (int64_t i = 0; i < w.group; i += kLanes) store(values + i, i < there ? load_up_to(from + i, there - i) : F{});
}

// Plain weights: 8 bits about zero, 4 bits between the group's extremes.
void round_group(const Packed& w, const float* values, Group& group) {
  F lowest = {}, highest = {};
  for (int64_t k = 0; k < w.group; k += kLanes) {
    lowest = min(lowest, load(values + k));
    highest = max(highest, load(values + k));
  }
  const float low = -reduce_max(-lowest), high = reduce_max(highest);
  const float exact = w.format == kInt4 ? (high - low) / 15 : std::max(high, -low) / 127;
  group.scale = half_to_float(float_to_half(exact / w.unit)) * w.unit;
  group.minimum = w.minima ? half_to_float(float_to_half(low / w.unit)) * w.unit : 0.0f;
  const F inverse = splat(group.scale > 0 ? 1 / group.scale : 0.0f), minimum = splat(group.minimum);
  const F least = splat(w.format == kInt4 ? 0.0f : -127.0f), most = splat(w.format == kInt4 ? 15.0f : 127.0f);
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  for (int64_t k = 0; k < w.group; k += kLanes) {
    const F steps = max(least, min(most, (load(values + k) - minimum) * inverse));
    const I whole = bits_of<NativeI>(steps + shift) - bits_of<NativeI>(shift);
    TM_EACH {
      int8_t __attribute__((vector_size(kNative))) bytes = __builtin_convertvector(whole.part[p], decltype(bytes));
      std::memcpy(group.integers + k + p * kNative, &bytes, kNative);
    }
  }
}

// A weight [out][in] in groups of inputs; codes of 4 bits lie two in a byte, the earlier input low.
struct Groups {
  const uint8_t* codes;
  const float* scales;   // [out][groups]
  const float* minima;   // the same, or null
};

void read_codes(const Packed& w, const Groups& from, int64_t row, int64_t g, Group& group) {
  const int64_t at = row * w.groups() + g;
  group.scale = from.scales[at];
  group.minimum = from.minima ? from.minima[at] : 0.0f;
  const int64_t first = row * w.in + g * w.group, there = std::min<int64_t>(w.group, w.in - g * w.group);
  if (!w.nibbles()) {
    std::memcpy(group.integers, from.codes + first, static_cast<size_t>(there));
  } else {
    const uint8_t* two = from.codes + first / 2;
    for (int64_t i = 0; i < there; ++i) {
      group.integers[i] = static_cast<int8_t>((two[i / 2] >> (i % 2 * 4) & 15) - w.zero_point);
    }
  }
  std::memset(group.integers + there, 0, static_cast<size_t>(w.group - there));
}

// Integers [32 columns][group] into a group's steps: two of a column at a time, which stay side by side.
void write_integers(const Packed& w, const int8_t* integers, uint8_t* to) {
  const int depth = w.depth(), lines = depth / 2;
  const uint8_t zero = static_cast<uint8_t>(w.zero_point);
  for (int64_t k = 0; k < w.group; k += depth, to += w.step_bytes()) {
    for (int line = 0; line < 2 * lines; ++line) {
      const int8_t* from = integers + line / lines * 16 * w.group + k + line % lines * 2;
      uint8_t bytes[32];
      for (int c = 0; c < 16; ++c) std::memcpy(bytes + 2 * c, from + c * w.group, 2);
      if (w.format == kInt8) {
        std::memcpy(to + line * 32, bytes, 32);
        continue;
      }
      uint8_t* both = to + line / 2 * 32;
      for (int i = 0; i < 32; ++i) {
        const uint8_t nibble = static_cast<uint8_t>(bytes[i] + zero);
        both[i] = static_cast<uint8_t>(line % 2 ? both[i] | nibble << 4 : nibble);
      }
    }
  }
}

// A column's group; one that doesn't exist has a scale of zero.
void read_group(const Packed& w, int source, const void* weight, int64_t row, int64_t g, Group& group) {
  if (row < 0) {
    std::memset(group.integers, 0, static_cast<size_t>(w.group));
  } else if (source == kGroups) {
    read_codes(w, *static_cast<const Groups*>(weight), row, g, group);
  } else if (source >= kQ4_0) {
    read_block_group(source, static_cast<const uint8_t*>(weight), row * w.in + g * w.group, group);
  } else {
    float* values = scratch<float>(kAccumulator, w.group);
    with_type(source, [&](auto element) {
      read_plain(w, static_cast<const decltype(element)*>(weight), row, g, values);
    });
    round_group(w, values, group);
  }
}

void pack_pair(const Packed& w, int source, const void* weight, int64_t pair, uint8_t* to) {
  int8_t* integers = scratch<int8_t>(kPanel, kPair * w.group);
  for (int64_t g = 0; g < w.groups(); ++g, to += w.group_bytes()) {
    uint16_t* scales = reinterpret_cast<uint16_t*>(to);
    for (int c = 0; c < kPair; ++c) {
      Group group{0, 0, integers + c * w.group};
      read_group(w, source, weight, w.row_of(pair, c), g, group);
      scales[c] = float_to_half(group.scale / w.unit);
      if (w.minima) scales[kPair + c] = float_to_half(group.minimum / w.unit);
    }
    write_integers(w, integers, to + w.scale_bytes());
  }
}

}  // namespace
}  // namespace tokenmill

// Packs `weight` [out, in]: plain of a type of api.h, whole GGUF blocks of a kind of gguf.h, or a `Groups`.
TM_API void tm_pack_quantized(const tokenmill::Packed* packed, int source, const void* weight, uint8_t* to) {
  using namespace tokenmill;
  parallel_for(packed->pairs(),
               [&](int64_t pair) { pack_pair(*packed, source, weight, pair, to + pair * packed->pair_bytes()); });
}
