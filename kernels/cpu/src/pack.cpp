// Weights into the packed layout (packed.h), and single rows back out of it.
#include <algorithm>
#include <vector>

#include "api.h"
#include "coded.h"
#include "threads.h"

namespace tokenmill {
namespace {

// One pair of a bfloat16 weight [out, in]: 4 bytes, two inputs of one output, at a time.
void pack_bf16(const Packed& w, const bf16* weight, int64_t pair, bf16* to) {
  for (int c = 0; c < kPair; ++c) {
    int64_t row = w.row_of(pair, c);
    for (int64_t step = 0; step < w.steps(); ++step) {
      bf16 inputs[kStep] = {};
      int64_t left = w.in - step * kStep;
      if (row >= 0) std::memcpy(inputs, weight + row * w.in + step * kStep, (left < kStep ? left : kStep) * 2);
      bf16* tile = to + step * kStepElements + place_in_step(0, c);
      for (int line = 0; line < 16; ++line) std::memcpy(tile + line * 32, inputs + 2 * line, 4);
    }
  }
}

// Steps to coded steps.
class CodeTable {
 public:
  explicit CodeTable(const Packed& w) {
    std::memset(code_, kNone, sizeof code_);
    for (int i = 0; i < 16; ++i) code_[w.upper[i]] = static_cast<uint8_t>(i);
  }

  void encode(const bf16* step, uint32_t number, uint8_t* to, std::vector<Exception>& exceptions) const {
    std::memset(to, 0, kCodedStepBytes);
    for (int i = 0; i < kStepElements; ++i) {
      const CodedPlace at(i % 128);
      uint8_t* group = to + i / 128 * 192;
      const uint8_t code = code_[step[i].bits >> 8];
      if (code == kNone) {
        exceptions.push_back({number, static_cast<uint16_t>(i), step[i].bits});
      } else {
        group[at.byte] |= static_cast<uint8_t>(code << at.shift);
      }
      group[64 + at.lower] = static_cast<uint8_t>(step[i].bits);
    }
  }

 private:
  static constexpr uint8_t kNone = 255;
  uint8_t code_[256];
};

void pack_f32(const Packed& w, const float* weight, int64_t pair, float* to) {
  for (int c = 0; c < kPair; ++c) {
    int64_t row = w.row_of(pair, c);
    for (int64_t k = 0; k < w.in; ++k) to[k * kPair + c] = row < 0 ? 0.0f : weight[row * w.in + k];
  }
}

// scale * q + minimum of one input of packed column c.
float quantized_value(const Packed& w, const uint8_t* pair, int64_t k, int c) {
  const uint8_t* group = pair + k / w.group * w.group_bytes();
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group);
  const int64_t inside = k % w.group;
  const uint8_t* step = group + w.scale_bytes() + inside / w.depth() * w.step_bytes();
  const int place = place_in_step(static_cast<int>(inside % w.depth()), c, w.depth());
  int q;
  if (w.format == kInt4) {
    int line = place / 32;
    q = (step[line / 2 * 32 + place % 32] >> (line % 2 * 4) & 15) - w.zero_point;
  } else {
    q = static_cast<int8_t>(step[place]);
  }
  float value = half_to_float(scales[c]) * static_cast<float>(q);
  if (w.minima) value += half_to_float(scales[kPair + c]);
  return value * w.unit;
}

float coded_value(const Packed& w, const uint8_t* pair, int64_t k, int c) {
  bf16 step[kStepElements];
  CodedSteps steps(w);
  steps.seek((pair - w.data) / kCodedStepBytes + k / kStep);
  steps.unpack(pair, k / kStep, step);
  return to_float(step[place_in_step(static_cast<int>(k % kStep), c)]);
}

float packed_value(const Packed& w, const uint8_t* pair, int64_t k, int c) {
  if (w.format == kF32) return reinterpret_cast<const float*>(pair)[k * kPair + c];
  if (w.quantized()) return quantized_value(w, pair, k, c);
  if (w.format == kCoded) return coded_value(w, pair, k, c);
  const bf16* step = reinterpret_cast<const bf16*>(pair) + k / kStep * kStepElements;
  return to_float(step[place_in_step(static_cast<int>(k % kStep), c)]);
}

// A row of a bfloat16 weight as it was.
void copy_row(const Packed& w, const uint8_t* pair, int c, bf16* row) {
  const bf16* place = reinterpret_cast<const bf16*>(pair) + place_in_step(0, c);
  for (int64_t k = 0; k + 1 < w.in; k += 2) {
    std::memcpy(row + k, place + k / kStep * kStepElements + k % kStep / 2 * 32, 4);
  }
  const int64_t last = w.in - 1;
  if (last % 2 == 0) row[last] = place[last / kStep * kStepElements + last % kStep / 2 * 32];
}

template <class T>
void unpack_row(const Packed& w, const uint8_t* pair, int c, T* row) {
  for (int64_t k = 0; k < w.in; k += kLanes) {
    int n = static_cast<int>(w.in - k < kLanes ? w.in - k : kLanes);
    float values[kLanes] = {};
    for (int j = 0; j < n; ++j) values[j] = packed_value(w, pair, k + j, c);
    store_up_to(row + k, load(values), n);
  }
}

}  // namespace
}  // namespace tokenmill

// The upper bytes that a coded weight's table holds: zeros and the commonest exponents with either sign, by a sample.
TM_API void tm_code_table(tokenmill::Packed* packed, const tokenmill::bf16* weight) {
  using namespace tokenmill;
  int64_t counts[128] = {};
  const int64_t count = packed->in * packed->out, stride = std::max<int64_t>(1, count / (1 << 18)) | 1;
  for (int64_t i = 0; i < count; i += stride) ++counts[weight[i].bits >> 8 & 127];
  for (int i = 0; i < 8; ++i) {
    const int64_t best = std::max_element(counts, counts + 128) - counts;
    counts[best] = -1;
    packed->upper[i] = static_cast<uint8_t>(best);
    packed->upper[i + 8] = static_cast<uint8_t>(best | 128);
  }
}

// Packs `weight` [out, in] bfloat16 into `to`, and what its table lacks into `exceptions` [room]. Their number, or -1
// where they are more.
TM_API int64_t tm_pack_coded(const tokenmill::Packed* packed, const void* weight, void* to,
                             tokenmill::Exception* exceptions, int64_t room) {
  using namespace tokenmill;
  const Packed& w = *packed;
  const CodeTable table(w);
  std::vector<std::vector<Exception>> found(static_cast<size_t>(w.pairs()));
  parallel_for(w.pairs(), [&](int64_t pair) {
    bf16* plain = scratch<bf16>(kPanel, w.steps() * kStepElements);
    pack_bf16(w, static_cast<const bf16*>(weight), pair, plain);
    uint8_t* place = static_cast<uint8_t*>(to) + pair * w.pair_bytes();
    for (int64_t step = 0; step < w.steps(); ++step) {
      table.encode(plain + step * kStepElements, static_cast<uint32_t>(pair * w.steps() + step),
                   place + step * kCodedStepBytes, found[static_cast<size_t>(pair)]);
    }
  });
  int64_t count = 0;
  for (const std::vector<Exception>& some : found) {
    if (count + static_cast<int64_t>(some.size()) >= room) return -1;
    std::copy(some.begin(), some.end(), exceptions + count);
    count += static_cast<int64_t>(some.size());
  }
  exceptions[count] = {UINT32_MAX, 0, 0};
  return count;
}

TM_API int64_t tm_packed_bytes(const tokenmill::Packed* weight) { return weight->pairs() * weight->pair_bytes(); }

TM_API int64_t tm_pairs(const tokenmill::Packed* weight) { return weight->pairs(); }

// Packs `weight` [out, in], bfloat16 or float32 as the format says, into `to`.
TM_API void tm_pack(const tokenmill::Packed* packed, const void* weight, void* to) {
  using namespace tokenmill;
  parallel_for(packed->pairs(), [&](int64_t pair) {
    uint8_t* place = static_cast<uint8_t*>(to) + pair * packed->pair_bytes();
    if (packed->format == kF32) {
      pack_f32(*packed, static_cast<const float*>(weight), pair, reinterpret_cast<float*>(place));
    } else {
      pack_bf16(*packed, static_cast<const bf16*>(weight), pair, reinterpret_cast<bf16*>(place));
    }
  });
}

// Puts values [out] float32 in packed order, [pairs * 32], zero where no row is.
TM_API void tm_pack_columns(const tokenmill::Packed* packed, const float* values, float* to) {
  using namespace tokenmill;
  for (int64_t pair = 0; pair < packed->pairs(); ++pair) {
    for (int c = 0; c < kPair; ++c) {
      int64_t row = packed->row_of(pair, c);
      to[pair * kPair + c] = row < 0 ? 0.0f : values[row];
    }
  }
}

// to [count, in] = rows `ids` [count] of the weight, dequantized.
TM_API void tm_rows(const tokenmill::Packed* packed, const int64_t* ids, int64_t count, void* to, int type) {
  using namespace tokenmill;
  parallel_for(count, [&](int64_t i) {
    int64_t column = packed->column_of(ids[i]);
    const uint8_t* pair = packed->pair(column / kPair);
    int c = static_cast<int>(column % kPair);
    if (packed->format == kBf16 && type == kTypeBf16) {
      copy_row(*packed, pair, c, static_cast<bf16*>(to) + i * packed->in);
      return;
    }
    with_type(type, [&](auto element) {
      unpack_row(*packed, pair, c, static_cast<decltype(element)*>(to) + i * packed->in);
    });
  });
}
