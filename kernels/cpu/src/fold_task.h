// A coded weight times rows, by vectors.
//
//   for each pair
//     for each piece of K         a fold where rows are one block: the next one is unpacked between its products;
//                                 else as much as stays in the nearest cache, unpacked once for all rows
//       for each block of rows    whose sums wait in memory between pieces
//
// Sums are folded as over a plain weight, to the same bits.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "multiply.h"
#include "stream.h"
#include "threads.h"

namespace tokenmill {

// Steps of a stream, one after the other into a buffer, part by part.
template <class Steps>
class Filling {
 public:
  Filling(Stream<Steps>& stream, bf16* to, int64_t steps) : stream_(stream), to_(to), parts_(steps * Steps::kParts) {}

  TM_INLINE void some() {
    if (part_ == parts_) return;
    stream_.next_part(static_cast<int>(part_ % Steps::kParts), to_ + part_ / Steps::kParts * kStepElements);
    ++part_;
  }
  void rest() {
    while (part_ < parts_) some();
  }

 private:
  Stream<Steps>& stream_;
  bf16* to_;
  const int64_t parts_;
  int64_t part_ = 0;
};

// A step's parts between as many lines.
template <int kLinesAStep, class Steps>
struct Beside<kLinesAStep, Filling<Steps>*> {
  Filling<Steps>* filling;

  Beside(const bf16*, int64_t, Filling<Steps>* next) : filling(next) {}
  TM_INLINE void operator()(int64_t n) const {
    if (n % (kLinesAStep / Steps::kParts) == 0) filling->some();
  }
};

template <class T, class Steps>
class FoldTask {
 public:
  FoldTask(const Call& call, const Operand<T>& operand, int64_t first, int64_t last)
      : call_(call),
        operand_(operand),
        first_(first),
        last_(last),
        piece_(last - first <= kBlock ? kFoldSteps : kNear),
        stream_(call.weight) {
    buffers_ = scratch<bf16>(kPanel, 2 * piece_ * kStepElements);
    sums_ = scratch<float>(kAccumulator, divide_up(last - first, kBlock) * kBlock * kPair);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t steps = stream_.steps();
    stream_.seek(begin, 0);
    Filling<Steps>(stream_, buffer(), length_at(0)).rest();
    for (int64_t pair = begin; pair < end; ++pair) {
      for (int64_t step = 0; step < steps; step += piece_) {
        const int64_t length = length_at(step), next = step + length < steps ? step + length : 0;
        const bool ends = next == 0 && pair + 1 == end;
        add_piece(step, length, ends ? 0 : length_at(next));
      }
      for (int64_t r = first_; r < last_; r += kBlock) finish(call_, pair, r, rows_at(r), sums_at(r));
    }
  }

 private:
  static constexpr int64_t kNear = 8;  // steps: 16 KiB

  int64_t length_at(int64_t step) const { return std::min(piece_, stream_.steps() - step); }
  bf16* buffer() const { return buffers_ + turn_ * piece_ * kStepElements; }
  int rows_at(int64_t r) const { return static_cast<int>(std::min<int64_t>(last_ - r, kBlock)); }
  float* sums_at(int64_t r) const { return sums_ + (r - first_) * kPair; }

  // A piece; `coming` steps of the next one are made ready.
  TM_INLINE void add_piece(int64_t step, int64_t length, int64_t coming) {
    const bf16* weight = buffer();
    turn_ ^= 1;
    Filling<Steps> next(stream_, buffer(), coming);
    for (int64_t r = first_; r < last_; r += kBlock) {
      const Inputs<T> x = operand_.inputs(r, step * kStep);
      multiply(x, weight, length, rows_at(r), sums_at(r), step == 0, &next);
    }
    next.rest();
  }

  const Call& call_;
  const Operand<T>& operand_;
  const int64_t first_, last_;
  const int64_t piece_;
  Stream<Steps> stream_;
  bf16* buffers_;
  float* sums_;
  int turn_ = 0;
};

}  // namespace tokenmill
