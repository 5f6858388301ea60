// Quantized weights times bfloat16 rows on the matrix unit: unpacked to bfloat16 piece by piece, beside the products.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "multiply.h"
#include "single_row.h"
#include "threads.h"
#include "unpack.h"

namespace tokenmill {

constexpr int64_t kLongPiece = 64;  // steps unpacked at a time where many rows come by

#if defined(__AMX_BF16__)
// What a product does meanwhile: the next piece's steps are unpacked, each beside one of its own.
template <class Steps>
struct UnpackNext {
  const Steps& steps;
  const uint8_t* pair;
  int64_t first, last;
  int64_t step_bytes;
  bf16* to;

  TM_INLINE void operator()(int64_t k) const {
    const int64_t step = first + k;
    if (step >= last) return;
    for (int64_t i = 0; i < step_bytes; i += 64) __builtin_prefetch(pair + step * step_bytes + kAhead + i, 0, 2);
    steps.unpack(pair, step, to + k * kStepElements);
  }
};

// A quantized pair times bfloat16 rows: piece by piece, each unpacked while the one before is multiplied with all
// rows. A piece of one block of rows stays in the nearest cache; of many rows it is long, since each piece loads and
// stores their sums.
template <class Steps>
class UnpackedTask {
 public:
  UnpackedTask(const Call& call, const Operand<bf16>& operand, int64_t pair, int64_t first, int64_t last)
      : call_(call), w_(call.weight), operand_(operand), pair_(pair), first_(first), last_(last), unpacker_(w_) {
    steps_ = w_.padded_in() / kStep;
    piece_ = std::min(last - first > kBlock ? kLongPiece : kUnpackedSteps, steps_);
    unpacked_ = scratch<bf16>(kPanel, 2 * piece_ * kStepElements);
    sums_ = scratch<float>(kAccumulator, divide_up(last - first, kBlock) * kBlock * kPair);
  }

  void run() {
    const UnpackNext<Steps> head = unpack_from(0, 0);
    for (int64_t k = 0; k < piece_; ++k) head(k);
    int turn = 0;
    for (int64_t step = 0; step < steps_; step += piece_, turn ^= 1) {
      multiply_piece(step, buffer(turn), unpack_from(step + piece_, turn ^ 1));
    }
    for (int64_t r = first_; r < last_; r += kBlock) {
      if (w_.row_wide()) scale_sums(w_, pair_, block_rows(r), sums_at(r));
      finish(call_, pair_, r, block_rows(r), sums_at(r));
    }
  }

 private:
  int block_rows(int64_t r) const { return static_cast<int>(last_ - r < kBlock ? last_ - r : kBlock); }
  float* sums_at(int64_t r) const { return sums_ + (r - first_) * kPair; }
  bf16* buffer(int turn) const { return unpacked_ + turn * piece_ * kStepElements; }

  UnpackNext<Steps> unpack_from(int64_t step, int turn) const {
    return {unpacker_, w_.pair(pair_), step, std::min(step + piece_, steps_), w_.pair_bytes() / steps_, buffer(turn)};
  }

  void multiply_piece(int64_t step, const bf16* weight, const UnpackNext<Steps>& next) {
    const int64_t length = std::min(piece_, steps_ - step);
    for (int64_t r = first_; r < last_; r += kBlock) {
      const int rows = block_rows(r);
      if (rows != shaped_) set_rows(shaped_ = rows);
      const Inputs<bf16> x = operand_.inputs(r, step * kStep);
      if (r == first_) {
        multiply(x, weight, length, rows, sums_at(r), step == 0, next);
      } else {
        multiply(x, weight, length, rows, sums_at(r), step == 0, [](int64_t) {});
      }
    }
  }

  const Call& call_;
  const Packed& w_;
  const Operand<bf16>& operand_;
  const int64_t pair_, first_, last_;
  const Steps unpacker_;
  int64_t steps_;
  int64_t piece_;
  int shaped_ = 0;
  bf16* unpacked_;
  float* sums_;
};

// The pairs [begin, end) of a weight with one scale a row times one row.
void single_row_task(const Call& call, const Operand<bf16>& operand, int64_t begin, int64_t end, int64_t row) {
  const Packed& w = call.weight;
  const ByteSteps steps(w);
  const int64_t inputs = w.padded_in(), count = inputs / kStep;
  float* x = scratch<float>(kPanel, inputs);
  for (int64_t k = 0; k < inputs; k += kLanes) store(x + k, load(operand.x + row * operand.layout.width + k));
  alignas(64) float sums[kPair];
  for (int64_t pair = begin; pair < end; ++pair) {
    single_row(steps, w.pair(pair), count, w.pair_bytes() / count, kAhead, x, sums);
    scale_sums(w, pair, 1, sums);
    finish(call, pair, row, 1, sums);
  }
}

// The pairs [begin, end) of a quantized weight times rows [first, last).
void unpacked_task(const Call& call, const Operand<bf16>& operand, int64_t begin, int64_t end, int64_t first,
                   int64_t last) {
  if (call.weight.row_wide() && last - first == 1) return single_row_task(call, operand, begin, end, first);
  for (int64_t pair = begin; pair < end; ++pair) {
    if (call.weight.row_wide()) {
      UnpackedTask<ByteSteps>(call, operand, pair, first, last).run();
    } else if (call.weight.format == kInt4) {
      UnpackedTask<ValueSteps<kInt4>>(call, operand, pair, first, last).run();
    } else {
      UnpackedTask<ValueSteps<kInt8>>(call, operand, pair, first, last).run();
    }
  }
}
#endif

}  // namespace tokenmill
