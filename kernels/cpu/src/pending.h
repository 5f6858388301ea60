// A product's epilogue, put off until there is something to hide it behind.
#pragma once

#include "epilogue.h"
#include "operand.h"

namespace tokenmill {

// A block of rows whose sums stand, but whose epilogue is still to come: it runs between the products of the block
// after it, which leave its sums alone.
class Pending {
 public:
  explicit Pending(const Call& call) : call_(call), scaled_(call.weight.row_wide()) {}
  ~Pending() { finish_rows(left_); }

  // The next block, whose sums are [rows][32], is multiplied; what was pending is finished.
  void push(int64_t pair, int64_t first, int rows, float* sums) {
    finish_rows(left_);
    pair_ = pair;
    row_ = first;
    left_ = rows;
    from_ = sums;
  }

  int left() const { return left_; }

  TM_INLINE void finish_rows(int rows) {
    if (left_ == 0) return;
    if (rows > left_) rows = left_;
    if (scaled_) scale_sums(call_.weight, pair_, rows, from_);
    finish(call_, pair_, row_, rows, from_);
    row_ += rows;
    from_ += rows * kPair;
    left_ -= rows;
  }

 private:
  const Call& call_;
  const bool scaled_;
  int64_t pair_ = 0;
  int64_t row_ = 0;
  int left_ = 0;
  float* from_ = nullptr;
};

}  // namespace tokenmill
