// Weights that are multiplied as they lie: bfloat16 or float32.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "multiply.h"
#include "pending.h"
#include "threads.h"

namespace tokenmill {

constexpr int64_t kPanelBytes = 1 << 20;  // of x: what stays in a core's own cache beside the weight

// Pairs of a plain weight times rows [first, last). Several blocks of rows take a pair piece by piece, each piece short
// enough to stay in the nearest cache beside the rows that come by; their sums wait in memory meanwhile. Where the rows
// are too long for a core's own cache, a group of pairs takes them chunk by chunk.
template <class T, class W>
class PlainTask {
 public:
  PlainTask(const Call& call, const Operand<T>& operand, int64_t first, int64_t last)
      : w_(call.weight), operand_(operand), first_(first), last_(last), pending_(call) {
    length_ = sizeof(W) == 2 ? w_.steps() : w_.in;
    blocks_ = divide_up(last - first, kBlock);
    chunk_ = kAmx<T, W> && (last - first) * length_ * kStep * 2 > kPanelBytes ? kChunk : length_;
    const int64_t pieces = kAmx<T, W> && blocks_ > 1 ? divide_up(chunk_, kPiece) : 1;
    piece_ = divide_up(chunk_, pieces);
    group_ = chunk_ < length_ ? divide_up(kGroupRows, blocks_ * kBlock) : 1;
    sums_ = scratch<float>(kAccumulator, group_ * std::max<int64_t>(blocks_, 2) * kBlock * kPair);
  }

  void run(int64_t begin, int64_t end) {
    for (; begin < end; begin += group_) {
      const int64_t stop = std::min(begin + group_, end);
      for (int64_t k = 0; k < length_; k += chunk_) {
        for (int64_t pair = begin; pair < stop; ++pair) {
          run_chunk(pair, k, std::min(k + chunk_, length_), sums_ + (pair - begin) * blocks_ * kBlock * kPair);
        }
      }
    }
  }

 private:
  static constexpr int64_t kPiece = 9;            // steps: 18 KiB, and as much of a block of rows
  static constexpr int64_t kChunk = 63;           // steps: 1 MiB of 256 rows
  static constexpr int64_t kGroupRows = 1 << 15;  // rows of all of a group's pairs: 4 MiB of sums

  TM_INLINE void run_chunk(int64_t pair, int64_t first, int64_t last, float* sums) {
    const W* weight = reinterpret_cast<const W*>(w_.pair(pair));
    // One block of rows: what comes 2 KiB later; vectors ask by themselves. Several: between them they bring in the
    // next pair.
    const bool near = blocks_ == 1;
    const int64_t from = first * (sizeof(W) == 2 ? kStepElements * 2 : kPair * 4);
    Ahead ahead{reinterpret_cast<const char*>(weight) + from + (near ? 2048 : w_.pair_bytes()),
                near && !kAmx<T, W> ? 0 : divide_up(kStepElements * 2, blocks_ * 64) * 64};
    turn_ ^= 1;
    for (int64_t k = first; k < last; k += piece_) {
      const int64_t length = std::min(piece_, last - k);
      for (int64_t block = 0; block < blocks_; ++block) {
        multiply_block(pair, weight, k, length, block, sums + (blocks_ > 1 ? block : turn_) * kBlock * kPair, ahead);
      }
    }
  }

  TM_INLINE void multiply_block(int64_t pair, const W* weight, int64_t k, int64_t length, int64_t block, float* sums,
                                Ahead& ahead) {
    const int64_t r = first_ + block * kBlock;
    const int rows = static_cast<int>(std::min<int64_t>(last_ - r, kBlock));
    if (rows != shaped_) set_rows(shaped_ = rows);
    const int share = static_cast<int>(divide_up(pending_.left(), length));
    const int64_t width = kPair * (sizeof(W) == 2 ? kStep : 1), inputs = sizeof(W) == 2 ? kStep : 1;
    multiply(operand_.inputs(r, k * inputs), weight + k * width, length, rows, sums, k == 0, [&](int64_t step) {
      ahead(step);
      pending_.finish_rows(share);
    });
    ahead.from += length * ahead.bytes;
    if (k + length == length_) pending_.push(pair, r, rows, sums);
  }

  const Packed& w_;
  const Operand<T>& operand_;
  const int64_t first_, last_;
  Pending pending_;
  int64_t length_;  // steps, or inputs of a float32 weight
  int64_t blocks_;
  int64_t chunk_;   // of them, that a pair takes at a time
  int64_t piece_;
  int64_t group_;   // pairs whose sums wait for the next chunk
  float* sums_;
  int turn_ = 0;
  int shaped_ = 0;
};

}  // namespace tokenmill
