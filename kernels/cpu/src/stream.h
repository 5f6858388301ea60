// A weight's steps one after the other, as what multiplies them wants them.
//
//   InPlace<W>       where they lie, bfloat16 or float32
//   Unpacked<Steps>  put together in a buffer: coded bfloat16 (coded.h), quantized values or integers (unpack.h)
#pragma once

#include "packed.h"
#include "threads.h"

namespace tokenmill {

// While `bytes` at `from` are worked on: as many are asked for into the core's own cache, and of those that were before
// into the nearest.
TM_INLINE void ask_ahead(const uint8_t* from, int64_t bytes) {
  constexpr int64_t kFar = 6144, kNear = 1536;
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(from + kFar + i, 0, 2);
    __builtin_prefetch(from + kNear + i, 0, 3);
  }
}

// Steps that have to be put together first, in the order of memory: on from a pair's last step comes the next pair.
template <class Steps>
class Stream {
 public:
  explicit Stream(const Packed& weight)
      : w_(weight), steps_(weight), count_(weight.padded_in() / kStep), step_bytes_(weight.pair_bytes() / count_) {
    to(0, 0);
  }

  TM_INLINE void seek(int64_t pair, int64_t step) {
    if (w_.pair(pair) != pair_ || step != step_) to(pair, step);
  }

  TM_INLINE void next(bf16* step) {
    steps_.unpack(pair_, step_, step);
    advance();
  }

  // The next step part by part, asking for as much.
  TM_INLINE void next_part(int part, bf16* step) {
    const int64_t bytes = step_bytes_ / Steps::kParts;
    ask_ahead(pair_ + step_ * step_bytes_ + part * bytes, bytes);
    steps_.unpack_part(pair_, step_, part, step);
    if (part + 1 == Steps::kParts) advance();
  }

  TM_INLINE void ask() const { ask_ahead(pair_ + step_ * step_bytes_, step_bytes_); }

  int64_t steps() const { return count_; }

 private:
  TM_INLINE void advance() {
    if (++step_ < count_) return;
    step_ = 0;
    pair_ += w_.pair_bytes();
  }

  void to(int64_t pair, int64_t step) {
    pair_ = w_.pair(pair);
    step_ = step;
    steps_.seek(pair * count_ + step);
  }

  const Packed& w_;
  Steps steps_;
  const int64_t count_;
  const int64_t step_bytes_;
  const uint8_t* pair_;
  int64_t step_;
};

// Sources of pieces for PieceTask. `at` is where the piece that was filled last begins.
template <class W>
class InPlace {
 public:
  using Weight = W;
  static constexpr bool kUnpacks = false;

  InPlace(const Packed& weight, int64_t) : w_(weight) {}

  TM_INLINE const W* at(int64_t pair, int64_t step) const {
    return reinterpret_cast<const W*>(w_.pair(pair)) + step * kPair * (sizeof(W) == 2 ? kStep : 1);
  }
  TM_INLINE void seek(int64_t, int64_t) {}
  TM_INLINE void fill(int64_t) {}

 private:
  const Packed& w_;
};

template <class Steps>
class Unpacked {
 public:
  using Weight = bf16;
  static constexpr bool kUnpacks = true;

  Unpacked(const Packed& weight, int64_t piece)
      : stream_(weight), buffer_(scratch<bf16>(kPanel, piece * kStepElements)) {}

  TM_INLINE const bf16* at(int64_t, int64_t) const { return buffer_; }
  TM_INLINE void seek(int64_t pair, int64_t step) { stream_.seek(pair, step); }
  TM_INLINE void fill(int64_t place) { stream_.next(buffer_ + place * kStepElements); }

 private:
  Stream<Steps> stream_;
  bf16* buffer_;
};

}  // namespace tokenmill
