// A weight that has to be unpacked times one block of rows, on the matrix unit.
//
//   unpack    s2 s3 s4 … s17 s0 s1 | s2 …   steps run through a ring in the nearest cache, two ahead of
//   multiply  s0 s1 s2 …         s17 | s0 …   their product, over the borders of pairs
//
// A pair's sums stay in tiles from its first step to its last.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>

#include "multiply.h"
#include "pending.h"
#include "stream.h"

namespace tokenmill {

template <class Steps>
class RingTask {
 public:
  RingTask(const Call& call, const Operand<bf16>& operand, int64_t first, int64_t last)
      : operand_(operand), first_(first), rows_(static_cast<int>(last - first)), stream_(call.weight), pending_(call) {
    ring_ = scratch<bf16>(kPanel, kRing * kStepElements);
    sums_ = scratch<float>(kAccumulator, 2 * kBlock * kPair);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t steps = stream_.steps();
    stream_.seek(begin, 0);
    left_ = (end - begin) * steps;
    for (int64_t i = 0; i < kLead; ++i) make();
    set_rows(rows_);
    int64_t used = 0;
    for (int64_t pair = begin; pair < end; ++pair, used += steps) {
      float* sums = sums_ + pair % 2 * kBlock * kPair;
      const int share = static_cast<int>(divide_up(pending_.left(), steps));
      const auto weight = [&](int64_t k) { return ring_ + (used + k) % kRing * kStepElements; };
      amx_product(operand_.inputs(first_, 0), weight, steps, rows_, sums, true, [&](int64_t) {
        make();
        pending_.finish_rows(share);
      });
      pending_.push(pair, first_, rows_, sums);
    }
  }

 private:
  static constexpr int64_t kRing = 4;  // steps: 8 KiB
  static constexpr int64_t kLead = 2;  // of them, that are ready when a product starts

  TM_INLINE void make() {
    if (left_ == 0) return;
    stream_.ask();
    stream_.next(ring_ + made_ * kStepElements);
    tile_fence(ring_);
    made_ = (made_ + 1) % kRing;
    --left_;
  }

  const Operand<bf16>& operand_;
  const int64_t first_;
  const int rows_;
  Stream<Steps> stream_;
  Pending pending_;
  bf16* ring_;
  float* sums_;
  int64_t made_ = 0;  // where the next step goes
  int64_t left_ = 0;  // steps to make
};

}  // namespace tokenmill

#endif
