// A product's epilogue, put off until there is something to hide it behind.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "operand.h"

namespace tokenmill {

// A block of rows whose sums stand, but whose epilogue is still to come: it runs between the products of the block
// after it, which leave its sums alone.
class Pending {
 public:
  explicit Pending(const Call& call) : call_(call), finish_(finish_rows_of(call)), scaled_(call.weight.row_wide()) {}
  ~Pending() { finish_rows(left()); }

  // The next block, whose sums are [rows][32], is multiplied; what was pending is finished.
  void push(int64_t pair, int64_t first, int rows, float* sums) {
    finish_rows(left());
    target_ = target(call_, pair, first, sums);
    pair_ = pair;
    sums_ = sums;
    rows_ = rows;
    done_ = 0;
  }

  int left() const { return rows_ - done_; }

  TM_INLINE void finish_rows(int rows) {
    rows = std::min(rows, left());
    if (rows == 0) return;
    if (scaled_) scale_sums(call_.weight, pair_, rows, sums_ + done_ * kPair);
    finish_(call_, target_, done_, rows);
    done_ += rows;
  }

 private:
  const Call& call_;
  const FinishRows finish_;
  const bool scaled_;
  Target target_{};
  int64_t pair_ = 0;
  float* sums_ = nullptr;
  int rows_ = 0;
  int done_ = 0;
};

}  // namespace tokenmill
