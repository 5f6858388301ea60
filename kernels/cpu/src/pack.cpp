// Weights into the packed layout (packed.h), and single rows back out of it.
#include <algorithm>
#include <vector>

#include "api.h"
#include "coded.h"
#include "threads.h"

namespace tokenmill {
namespace {

// One pair of a bfloat16 weight [out, in]: 4 bytes, two inputs of one output, at a time. `padding` stands where the
// weight has no value: it meets zeros of x, or makes columns that nobody reads.
void pack_bf16(const Packed& w, const bf16* weight, int64_t pair, bf16 padding, bf16* to) {
  for (int c = 0; c < kPair; ++c) {
    int64_t row = w.row_of(pair, c);
    for (int64_t step = 0; step < w.steps(); ++step) {
      bf16 inputs[kStep];
      std::fill(inputs, inputs + kStep, padding);
      int64_t left = w.in - step * kStep;
      if (row >= 0) std::memcpy(inputs, weight + row * w.in + step * kStep, (left < kStep ? left : kStep) * 2);
      bf16* tile = to + step * kStepElements + place_in_step(0, c);
      for (int line = 0; line < 16; ++line) std::memcpy(tile + line * 32, inputs + 2 * line, 4);
    }
  }
}

// The table of upper bytes: the commonest exponents of a sample, with either sign.
void choose_table(Packed& w, const bf16* weight) {
  constexpr int64_t kSample = 1 << 18;
  int64_t counts[128] = {};
  const int64_t size = w.in * w.out, stride = size / kSample | 1;
  for (int64_t i = 0; i < size; i += stride) ++counts[weight[i].bits >> 8 & 127];
  for (int i = 0; i < 8; ++i) {
    const int64_t best = std::max_element(counts, counts + 128) - counts;
    counts[best] = -1;
    w.upper[i] = static_cast<uint8_t>(best);
    w.upper[i + 8] = static_cast<uint8_t>(best | 128);
  }
}

void pack_f32(const Packed& w, const float* weight, int64_t pair, float* to) {
  for (int64_t from = 0; from < w.in; from += kStep) {  // a step stays in the nearest cache while its columns come
    const int64_t end = std::min<int64_t>(from + kStep, w.in);
    for (int c = 0; c < kPair; ++c) {
      const int64_t row = w.row_of(pair, c);
      for (int64_t k = from; k < end; ++k) to[k * kPair + c] = row < 0 ? 0.0f : weight[row * w.in + k];
    }
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
  if (w.nibbles()) {
    int line = place / 32;
    q = w.nibble(step[line / 2 * 32 + place % 32] >> (line % 2 * 4) & 15);
  } else {
    q = static_cast<int8_t>(step[place]);
  }
  float value = half_to_float(scales[c]) * static_cast<float>(q);
  if (w.minima) value += half_to_float(scales[kPair + c]);
  return value * w.unit;
}

struct Two {
  bf16 inputs[2];
};

// A row from pick(step, place) of each two inputs.
template <class Pick>
void collect_row(const Packed& w, int c, bf16* row, const Pick& pick) {
  for (int64_t k = 0; k < w.in; k += 2) {
    const Two two = pick(k / kStep, place_in_step(static_cast<int>(k % kStep), c));
    std::memcpy(row + k, &two, k + 1 < w.in ? 4 : 2);
  }
}

void copy_plain_row(const Packed& w, const uint8_t* pair, int c, bf16* row) {
  collect_row(w, c, row, [&](int64_t step, int place) {
    Two two;
    std::memcpy(&two, reinterpret_cast<const bf16*>(pair) + step * kStepElements + place, sizeof two);
    return two;
  });
}

void copy_coded_row(const Packed& w, const uint8_t* pair, int c, bf16* row) {
  collect_row(w, c, row, [&](int64_t step, int place) {
    const uint8_t* lines = pair + step * kCodedStepBytes + place / kFourLines * kFourLinesBytes;
    const CodedPlace at(place % kFourLines), next(place % kFourLines + 1);
    return Two{{{coded_value(lines, at, w.upper)}, {coded_value(lines, next, w.upper)}}};
  });
  const int64_t first = (pair - w.data) / kCodedStepBytes;
  for (const Exception* e = exceptions_from(w, first); e->step < first + w.steps(); ++e) {
    const int line = e->place / 32, column = line / 16 * 16 + e->place % 32 / 2;
    const int64_t k = (e->step - first) * kStep + line % 16 * 2 + e->place % 2;
    if (column == c && k < w.in) row[k].bits = e->value;
  }
}

// A row of a bfloat16 weight as it was.
void copy_row(const Packed& w, const uint8_t* pair, int c, bf16* row) {
  if (w.format == kCoded) {
    copy_coded_row(w, pair, c, row);
  } else {
    copy_plain_row(w, pair, c, row);
  }
}

template <class T>
void unpack_row(const Packed& w, const uint8_t* pair, int c, T* row) {
  if (w.exact()) {
    bf16* exact = scratch<bf16>(kPanel, w.in);
    copy_row(w, pair, c, exact);
    for (int64_t k = 0; k < w.in; k += kLanes) store_up_to(row + k, load_up_to(exact + k, w.in - k), w.in - k);
    return;
  }
  for (int64_t k = 0; k < w.in; k += kLanes) {
    int n = static_cast<int>(w.in - k < kLanes ? w.in - k : kLanes);
    float values[kLanes] = {};
    for (int j = 0; j < n; ++j) {
      values[j] = w.quantized() ? quantized_value(w, pair, k + j, c)
                                : reinterpret_cast<const float*>(pair)[(k + j) * kPair + c];
    }
    store_up_to(row + k, load(values), n);
  }
}

}  // namespace
}  // namespace tokenmill

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
      pack_bf16(*packed, static_cast<const bf16*>(weight), pair, bf16{}, reinterpret_cast<bf16*>(place));
    }
  });
}

// Packs `weight` [out, in] bfloat16 into `to`, coded: chooses the table, and writes what it lacks to `exceptions`
// [room]. Their number, or -1 where there are more, and the weight had better stay as it is.
TM_API int64_t tm_pack_coded(tokenmill::Packed* packed, const void* weight, void* to, tokenmill::Exception* exceptions,
                             int64_t room) {
  using namespace tokenmill;
  Packed& w = *packed;
  choose_table(w, static_cast<const bf16*>(weight));
  const CodeTable table(w);
  const bf16 padding{static_cast<uint16_t>(w.upper[0] << 8)};  // a value that the table holds
  std::vector<std::vector<Exception>> found(static_cast<size_t>(w.pairs()));
  parallel_for(w.pairs(), [&](int64_t pair) {
    bf16* plain = scratch<bf16>(kPanel, w.steps() * kStepElements);
    pack_bf16(w, static_cast<const bf16*>(weight), pair, padding, plain);
    uint8_t* coded = static_cast<uint8_t*>(to) + pair * w.pair_bytes();
    for (int64_t step = 0; step < w.steps(); ++step, plain += kStepElements, coded += kCodedStepBytes) {
      table.encode(plain, static_cast<uint32_t>(pair * w.steps() + step), coded, found[static_cast<size_t>(pair)]);
    }
  });
  Exception* end = exceptions;
  for (const std::vector<Exception>& some : found) {
    if (exceptions + room - end <= static_cast<int64_t>(some.size())) return -1;
    end = std::copy(some.begin(), some.end(), end);
  }
  *end = {UINT32_MAX, 0, 0};
  return end - exceptions;
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
    if (packed->exact() && type == kTypeBf16) {
      copy_row(*packed, pair, c, static_cast<bf16*>(to) + i * packed->in);
      return;
    }
    with_type(type, [&](auto element) {
      unpack_row(*packed, pair, c, static_cast<decltype(element)*>(to) + i * packed->in);
    });
  });
}
