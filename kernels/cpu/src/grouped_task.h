// Quantized weights times float32 rows: integers are multiplied group by group, and each group's sums meet its scale.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "multiply.h"
#include "stream.h"
#include "threads.h"
#include "unpack.h"

namespace tokenmill {

// sums [rows][32] += scale * part + minimum * the row's sum over the group.
void fold_group(const Packed& w, const uint8_t* group, const float* part, const float* group_sums, int rows,
                float* sums) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group);
  const F unit = splat(w.unit), left = load_half(scales) * unit, right = load_half(scales + 16) * unit;
  if (!w.minima) {
    for (int r = 0; r < rows; ++r, part += kPair, sums += kPair) {
      store(sums, fma(load(part), left, load(sums)));
      store(sums + 16, fma(load(part + 16), right, load(sums + 16)));
    }
    return;
  }
  const F low = load_half(scales + 32) * unit, high = load_half(scales + 48) * unit;
  for (int r = 0; r < rows; ++r, part += kPair, sums += kPair) {
    const F whole = splat(group_sums[r]);
    store(sums, fma(low, whole, fma(load(part), left, load(sums))));
    store(sums + 16, fma(high, whole, fma(load(part + 16), right, load(sums + 16))));
  }
}

// A quantized pair times float32 rows: group by group, unpack, multiply, fold.
template <class T>
class GroupedTask {
 public:
  GroupedTask(const Call& call, const Operand<T>& operand, int64_t pair, int64_t first, int64_t last)
      : call_(call), w_(call.weight), operand_(operand), pair_(pair), first_(first), last_(last), unpacker_(w_) {
    const int64_t room = divide_up(last - first, kBlock) * kBlock * kPair;
    unpacked_ = scratch<bf16>(kPanel, kUnpackedSteps * kStepElements);
    sums_ = scratch<float>(kAccumulator, 2 * room);
    parts_ = sums_ + room;
    std::memset(sums_, 0, static_cast<size_t>(room) * 4);
  }

  void run() {
    const int64_t groups = w_.groups();
    const uint8_t* group = w_.pair(pair_);
    for (int64_t g = 0; g < groups; ++g, group += w_.group_bytes()) {
      ask_ahead(group, w_.group_bytes());
      add_group(group, g);
    }
    for (int64_t r = first_; r < last_; r += kBlock) finish(call_, pair_, r, block_rows(r), sums_at(r));
  }

 private:
  int block_rows(int64_t r) const { return static_cast<int>(last_ - r < kBlock ? last_ - r : kBlock); }
  float* sums_at(int64_t r) const { return sums_ + (r - first_) * kPair; }

  void add_group(const uint8_t* group, int64_t g) {
    const int64_t steps = divide_up(w_.group, kStep);
    for (int64_t step = 0; step < steps; step += kUnpackedSteps) {
      const int64_t length = steps - step < kUnpackedSteps ? steps - step : kUnpackedSteps;
      unpacker_.unpack(group + w_.scale_bytes() + step * w_.step_bytes(), length, g, unpacked_);
      const int64_t input = (g * w_.group / kStep + step) * kStep;
      for (int64_t r = first_; r < last_; r += kBlock) {
        const int rows = block_rows(r);
        if (rows != shaped_) set_rows(shaped_ = rows);
        float* part = steps > kUnpackedSteps ? parts_ + (r - first_) * kPair : parts_;
        multiply(operand_.inputs(r, input), unpacked_, length, rows, part, step == 0, [](int64_t) {});
        if (step + length < steps) continue;
        const float* group_sums = w_.minima ? operand_.group_sums + g * call_.rows + r : nullptr;
        fold_group(w_, group, part, group_sums, rows, sums_at(r));
      }
    }
  }

  const Call& call_;
  const Packed& w_;
  const Operand<T>& operand_;
  const int64_t pair_, first_, last_;
  const Unpacker unpacker_;
  int shaped_ = 0;
  bf16* unpacked_;
  float* sums_;
  float* parts_;
};

}  // namespace tokenmill
