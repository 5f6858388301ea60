// A product's epilogue, put off until there is something to hide it behind.
#pragma once

#include "epilogue.h"
#include "packed.h"

namespace tokenmill {

constexpr int kBlock = 32;  // rows that share one pass over a pair

// A block of rows whose sums stand, but whose epilogue is still to come: it runs between the products of the block
// after it. Two blocks' sums take turns.
class Pending {
 public:
  explicit Pending(const Call& call) : call_(call) {}
  ~Pending() { finish_rows(left_); }

  // Where the next block's sums go.
  float* sums() { return memory_[turn_]; }

  // The next block is multiplied; what was pending is finished.
  void push(int64_t pair, int64_t first, int rows) {
    finish_rows(left_);
    pair_ = pair;
    row_ = first;
    left_ = rows;
    from_ = memory_[turn_];
    turn_ ^= 1;
  }

  int left() const { return left_; }

  TM_INLINE void finish_rows(int rows) {
    if (left_ == 0) return;
    if (rows > left_) rows = left_;
    finish(call_, pair_, row_, rows, from_);
    row_ += rows;
    from_ += rows * kPair;
    left_ -= rows;
  }

 private:
  const Call& call_;
  int64_t pair_ = 0;
  int64_t row_ = 0;
  int left_ = 0;
  int turn_ = 0;
  const float* from_ = nullptr;
  alignas(64) float memory_[2][kBlock * kPair];
};

}  // namespace tokenmill
