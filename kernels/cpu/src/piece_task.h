// Pairs of a weight times several blocks of rows, or one where the weight is multiplied as it lies.
//
//   for each group of pairs         one pair, unless rows are too long for a core's own cache
//     for each chunk of K           all of it, or as much as keeps the rows in that cache
//       for each pair of the group
//         for each piece of K       short enough to stay in the nearest cache beside the rows that come by
//           for each block of rows  whose sums wait in memory between pieces
//
// A weight that has to be unpacked shares one buffer between all pieces: the last block of rows is multiplied with a
// step, and the next piece's step takes its place.
#pragma once

#include <algorithm>

#include "multiply.h"
#include "pending.h"
#include "stream.h"

namespace tokenmill {

constexpr int64_t kPanelBytes = 1 << 20;  // of x: what stays in a core's own cache beside the weight

template <class T, class Source>
class PieceTask {
  using W = typename Source::Weight;
  static constexpr bool kMatrix = kAmx<T, W>;

 public:
  PieceTask(const Call& call, const Operand<T>& operand, int64_t first, int64_t last)
      : w_(call.weight),
        operand_(operand),
        first_(first),
        last_(last),
        blocks_(divide_up(last - first, kBlock)),
        length_(sizeof(W) == 2 ? w_.padded_in() / kStep : w_.in),
        chunk_(kMatrix && (last - first) * length_ * kStep * 2 > kPanelBytes ? kChunk : length_),
        piece_(divide_up(chunk_, kMatrix && blocks_ > 1 ? divide_up(chunk_, kPiece) : 1)),
        group_(chunk_ < length_ ? divide_up(kGroupRows, blocks_ * kBlock) : 1),
        source_(w_, piece_),
        pending_(call) {
    sums_ = scratch<float>(kAccumulator, group_ * std::max<int64_t>(blocks_, 2) * kBlock * kPair);
  }

  void run(int64_t begin, int64_t end) {
    end_ = end;
    Place place{begin, 0, begin, 0};
    source_.seek(begin, 0);
    for (int64_t i = 0; i < steps_at(place); ++i) source_.fill(i);
    while (place.group < end) {
      const Place next = after(place);
      if (place.step == place.chunk) start_chunk(place);
      const int64_t coming = Source::kUnpacks && next.group < end ? steps_at(next) : 0;
      if (coming) source_.seek(next.pair, next.step);
      for (int64_t block = 0; block < blocks_; ++block) {
        multiply_block(place, block, block + 1 == blocks_ ? coming : 0);
      }
      place = next;
    }
  }

 private:
  static constexpr int64_t kPiece = 18;           // steps: 36 KiB; the rows don't stay there
  static constexpr int64_t kChunk = 63;           // steps: 1 MiB of 256 rows
  static constexpr int64_t kGroupRows = 1 << 15;  // rows of all of a group's pairs: 4 MiB of sums

  struct Place {
    int64_t group, chunk;  // where they begin
    int64_t pair, step;
  };

  Place after(Place place) const {
    place.step += piece_;
    if (place.step < std::min(place.chunk + chunk_, length_)) return place;
    place.step = place.chunk;
    if (++place.pair < std::min(place.group + group_, end_)) return place;
    place.pair = place.group;
    place.step = place.chunk += chunk_;
    if (place.chunk < length_) return place;
    place.pair = place.group += group_;
    place.step = place.chunk = 0;
    return place;
  }

  int64_t steps_at(const Place& place) const {
    return std::min(piece_, std::min(place.chunk + chunk_, length_) - place.step);
  }

  // One block of rows: what comes 2 KiB later; vectors ask by themselves. Several: between them they bring in the next
  // pair.
  void start_chunk(const Place& place) {
    const int64_t pair_bytes = w_.pair_bytes(), step_bytes = pair_bytes / length_;
    const bool near = blocks_ == 1;
    const char* from = reinterpret_cast<const char*>(w_.pair(place.pair)) + place.chunk * step_bytes;
    ahead_ = {from + (near ? 2048 : pair_bytes), near && !kMatrix ? 0 : divide_up(step_bytes, blocks_ * 64) * 64};
    turn_ ^= 1;
  }

  TM_INLINE void multiply_block(const Place& place, int64_t block, int64_t coming) {
    const int64_t r = first_ + block * kBlock, length = steps_at(place);
    const int rows = static_cast<int>(std::min<int64_t>(last_ - r, kBlock));
    if (rows != shaped_) set_rows(shaped_ = rows);
    float* sums = sums_ + ((place.pair - place.group) * blocks_ + (blocks_ > 1 ? block : turn_)) * kBlock * kPair;
    const int share = static_cast<int>(divide_up(pending_.left(), length));
    const int64_t input = place.step * (sizeof(W) == 2 ? kStep : 1);
    int64_t filled = 0;
    multiply(operand_.inputs(r, input), source_.at(place.pair, place.step), length, rows, sums, place.step == 0,
             [&](int64_t step) {
               ahead_(step);
               if (kMatrix && filled < std::min(step, coming)) source_.fill(filled++);
               pending_.finish_rows(share);
             });
    while (filled < coming) source_.fill(filled++);
    ahead_.from += length * ahead_.bytes;
    if (place.step + length == length_) pending_.push(place.pair, r, rows, sums);
  }

  const Packed& w_;
  const Operand<T>& operand_;
  const int64_t first_, last_;
  const int64_t blocks_;
  const int64_t length_;  // steps, or inputs of a float32 weight
  const int64_t chunk_;   // of them, that a pair takes at a time
  const int64_t piece_;
  const int64_t group_;   // pairs whose sums wait for the next chunk
  Source source_;
  Pending pending_;
  Ahead ahead_{};
  float* sums_;
  int64_t end_ = 0;
  int turn_ = 0;
  int shaped_ = 0;
};

}  // namespace tokenmill
