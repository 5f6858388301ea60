// Attention tiles on the matrix unit, bfloat16 and a tiled cache (cache_layout.h): 128 keys against 32 rows.
//
//   scores [32 rows][128 keys]  =  queries x keys       both as they lie in memory
//   weights                     =  2^(score - maximum)  a row at a time, in bfloat16
//   values [32 rows][E + 1]    +=  weights x (values, ones)
//
// Scores are kept in units of log 2, so that a weight is one power of two. A row's maximum moves only once it has
// grown by more than `kSlack`: a weight may be as large as 2^kSlack, and sums are seldom scaled.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>

#include "amx.h"
#include "attention.h"
#include "cached_runs.h"
#include "power_bits.h"
#include "threads.h"

namespace tokenmill {

// An operand whose product with weights is their sum, in its first column.
struct alignas(64) OnesTile {
  uint16_t bits[kTileElements] = {};
  constexpr OnesTile() {
    for (int line = 0; line < 16; ++line) bits[line * 32] = bits[line * 32 + 1] = 0x3F80;
  }
};
constexpr OnesTile kOnes;

// Loads a tile; what comes `by`, read once for a while, leaves the nearest cache to what is used again. A macro, since
// the intrinsics take the tile's number as a word.
#define TM_LOAD_TILE(by, tile, from, stride)   \
  do {                                         \
    if (by) {                                  \
      _tile_stream_loadd(tile, from, stride);  \
    } else {                                   \
      _tile_loadd(tile, from, stride);         \
    }                                          \
  } while (0)

class AmxTiles {
 public:
  static constexpr int kTile = 128;
  static constexpr int kRows = 2 * kQueryRows;  // that are computed together
  static constexpr float kUnit = kLog2E;        // what a natural logarithm is in the state's units
  static F weight(F difference) { return power_of_two(difference); }

  explicit AmxTiles(const RowBlock& block)
      : block_(block),
        sight_(block),
        key_size_(block.problem.key_size),
        value_size_(block.problem.value_size),
        height_(static_cast<int>(block.rows() < kQueryRows ? block.rows() : kQueryRows)),
        alone_(block.rows() <= kQueryRows),
        factor_(block.problem.softcap > 0 ? kLog2E : block.problem.scale * kLog2E) {
    const int64_t rows = block.rows(), lines = height_ < kQueryRows ? rows : divide_up(rows, kRows) * kRows;
    queries_ = scratch<bf16>(kPanel, lines * key_size_ + kCacheStep * value_size_);
    tail_ = queries_ + lines * key_size_;
    const bf16* queries = static_cast<const bf16*>(block.problem.query);
    Rows at(block);
    for (int64_t r = 0; r < rows; ++r, at.next()) {
      std::memcpy(queries_ + r * key_size_, queries + at.vector() * key_size_, static_cast<size_t>(key_size_) * 2);
    }
    std::memset(queries_ + rows * key_size_, 0, static_cast<size_t>((lines - rows) * key_size_) * 2);
    configure_tiles(height_ < kQueryRows ? height_ : kRows);
  }
  ~AmxTiles() { _tile_release(); }

  // Keys [start, start + kTile) of `block`, of which those before `end` exist, are read after the next tile: they
  // are asked for at its end, since a block's rows are too short for the processor to see a stream.
  void expect(const RowBlock& block, int64_t start, int64_t end) {
    if (!alone_) return;
    int64_t place[kSteps];
    const int count = locate_runs(block, start, end, kSteps, place);
    const bf16* keys = static_cast<const bf16*>(block.problem.k_cache);
    const bf16* values = static_cast<const bf16*>(block.problem.v_cache);
    for (int step = 0; step < kSteps; ++step) {
      awaited_[step] = step < count ? keys + place[step] * key_size_ : nullptr;
      if (step >= count) continue;
      __builtin_prefetch(awaited_[step], 0, 2);  // where the pages lie is found out early
      __builtin_prefetch(values + place[step] * value_size_, 0, 2);
    }
  }

  // Brings in keys [start, start + kTile), of which those before `end` exist for this block.
  void load_tile(int64_t start, int64_t end) {
    start_ = start;
    count_ = static_cast<int>(end < start + kTile ? end - start : kTile);
    int64_t place[kSteps];
    steps_ = locate_runs(block_, start, end, kSteps, place);
    const bf16* keys = static_cast<const bf16*>(block_.problem.k_cache);
    const bf16* values = static_cast<const bf16*>(block_.problem.v_cache);
    for (int step = 0; step < steps_; ++step) {
      keys_[step] = keys + place[step] * key_size_;
      values_[step] = values + place[step] * value_size_;
    }
    if (const int left = count_ % kCacheStep) {
      values_[steps_ - 1] = without_strangers(values_[steps_ - 1], left, value_size_, tail_);
    }
  }

  // Adds the tile to the states of the block's rows from `first` on, kRows of them.
  void attend(int64_t first, float* states) {
    const int rows = static_cast<int>(std::min<int64_t>(block_.rows() - first, kRows));
    if (rows > kQueryRows) {
      attend_rows<true>(first, rows, states);
    } else {
      attend_rows<false>(first, rows, states);
    }
  }

 private:
  static constexpr float kSlack = 8;
  static constexpr int kSteps = kTile / kCacheStep;

  // `Two`: rows of a second state follow those of the first.
  template <bool Two>
  void attend_rows(int64_t first, int rows, float* states) {
    const State upper{states + first / kQueryRows * State::floats(value_size_), State::row_width(value_size_)};
    const State lower{upper.memory + State::floats(value_size_), upper.width};
    for (int step = 0; step < steps_; ++step) score<Two>(first, step);
    if (!seen_whole(first, rows)) finish_scores(first, rows);
    settle(upper, 0, std::min(rows, kQueryRows));
    if (Two) settle(lower, kQueryRows, rows - kQueryRows);
    for (int row = 0; row < rows; ++row) weigh(row);
    const int shown = Two ? kRows : height_;
    if (rows < shown) std::memset(weights_[rows], 0, static_cast<size_t>(shown - rows) * sizeof weights_[0]);
    add_values<Two>(upper, lower);
  }

  // Raw scores of one run of keys.
  template <bool Two>
  void score(int64_t first, int step) {
    const int64_t line = key_size_ * 2;
    const bf16* upper = queries_ + first * key_size_;
    const bf16* lower = upper + kQueryRows * key_size_;
    const bf16* left = keys_[step];
    const bf16* right = left + 16 * key_size_;
    float* to = scores_[0] + step * kCacheStep;
    tile_fence(upper);
    tile_fence(left);
    if (alone_) ask_for_run(values_[step], value_size_);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < key_size_; d += kStep) {
      _tile_loadd(4, upper + d, line);
      TM_LOAD_TILE(Two, 6, left + d * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      TM_LOAD_TILE(Two, 7, right + d * 16, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (Two) {
        _tile_loadd(5, lower + d, line);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, to, kTile * 4);
    _tile_stored(1, to + 16, kTile * 4);
    if (Two) {
      _tile_stored(2, to + kQueryRows * kTile, kTile * 4);
      _tile_stored(3, to + kQueryRows * kTile + 16, kTile * 4);
    }
    tile_fence(to);
  }

  // Whether rows [first, first + rows) of the block see all of the tile, their scores being final as they are.
  bool seen_whole(int64_t first, int rows) const {
    return start_ + steps_ * kCacheStep - 1 <= sight_.newest[first] && start_ >= sight_.oldest[first + rows - 1] &&
           block_.problem.softcap <= 0;
  }

  // Softcap, and the mask of what a row doesn't see, in place.
  void finish_scores(int64_t first, int rows) {
    const Attention& p = block_.problem;
    for (int r = 0; r < rows; ++r) {
      const I newest = splat(sight_.newest[first + r]), oldest = splat(sight_.oldest[first + r]);
      for (int i = 0; i < 2 * steps_; ++i) {
        float* scores = scores_[r] + i * kLanes;
        F score = load(scores);
        if (p.softcap > 0) score = capped(score * splat(p.scale), p.softcap);
        const I token = tokens_of_group(i % 2) + splat(static_cast<int32_t>(start_ + i / 2 * kCacheStep));
        store(scores, select((token <= newest) & (token >= oldest), score, splat(kMinusInfinity)));
      }
    }
  }

  // The largest scores of rows [from, from + 16), of which `rows` exist. All 16 take a step before any takes the next:
  // what the matrix unit stored last is not there at once.
  F largest_scores(int from, int rows) const {
    F best[kQueryRows];
    for (int r = 0; r < kQueryRows; ++r) best[r] = splat(kMinusInfinity);
    if (rows == kQueryRows) {
      for (int i = 0; i < 2 * steps_; ++i) {
#pragma GCC unroll 16
        for (int r = 0; r < kQueryRows; ++r) best[r] = max(load(scores_[from + r] + i * kLanes), best[r]);
      }
    } else {
      for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < 2 * steps_; ++i) best[r] = max(load(scores_[from + r] + i * kLanes), best[r]);
      }
    }
    return row_maxima(best);
  }

  // A state's maxima for the scores of its rows, [from, from + rows): its sums are scaled where one moves.
  void settle(const State& state, int from, int rows) {
    const F before = load(state.maxima()), largest = largest_scores(from, rows) * splat(factor_);
    const I moves = (largest > before + splat(kSlack));
    const F maxima = select(moves, largest, before);
    store(state.maxima(), maxima);
    store(zeros_ + from, splat(kPowerOfZero) - finite_maximum(maxima) * splat(kFractions));
    uint32_t moved = mask_bits(moves & (before > splat(kMinusInfinity)));
    if (!moved) return;
    alignas(64) float factors[kLanes];
    store(factors, weight(before - maxima));
    for (; moved; moved &= moved - 1) {
      const int slot = __builtin_ctz(moved);
      state.scale_row(slot, factors[slot]);
    }
  }

  // One row's weights, 2^(score - maximum).
  TM_INLINE void weigh(int row) {
    const F factor = splat(factor_ * kFractions), zero = splat(zeros_[row]);
    bf16* weights = weights_[row];
    const float* scores = scores_[row];
    const auto run = [&](int step) {
      const F low = load(scores + step * kCacheStep), high = load(scores + step * kCacheStep + kLanes);
      const __m512i both = bfloat16_powers(fma(low, factor, zero), fma(high, factor, zero));
      std::memcpy(weights + step * kCacheStep, &both, sizeof both);
    };
    if (steps_ == kSteps) {
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step) run(step);
    } else {
      for (int step = 0; step < steps_; ++step) run(step);
    }
  }

  // The states' rows += weights x the tile's values and ones, two tiles of columns at a time.
  // Meanwhile the keys that are awaited are asked for.
  template <bool Two>
  void add_values(const State& upper, const State& lower) const {
    const int64_t line = upper.width * 4, tiles = value_size_ / 16;
    tile_fence(weights_);
    tile_fence(values_);
    tile_fence(upper.memory);
    tile_fence(lower.memory);
    for (int64_t e = 0; e <= tiles; e += 2) {
      const bool pair = e < tiles;  // the ones come last, alone or beside the last values
      float* at = upper.row(0) + e * 16;
      float* below = lower.row(0) + e * 16;
      _tile_loadd(0, at, line);
      if (pair) _tile_loadd(1, at + 16, line);
      if (Two) {
        _tile_loadd(2, below, line);
        if (pair) _tile_loadd(3, below + 16, line);
      }
      for (int step = 0; step < steps_; ++step) {
        if (e == 0 && awaited_[step]) ask_for_run(awaited_[step], key_size_);
        _tile_loadd(4, weights_[0] + step * kCacheStep, kTile * 2);
        if (Two) _tile_loadd(5, weights_[kQueryRows] + step * kCacheStep, kTile * 2);
        if (pair) {
          TM_LOAD_TILE(Two, 6, values_[step] + e * 32, value_size_ * 4);
        } else {
          _tile_loadd(6, kOnes.bits, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        if (Two) _tile_dpbf16ps(2, 5, 6);
        if (pair) {
          if (e + 1 < tiles) {
            TM_LOAD_TILE(Two, 7, values_[step] + (e + 1) * 32, value_size_ * 4);
          } else {
            _tile_loadd(7, kOnes.bits, 64);
          }
          _tile_dpbf16ps(1, 4, 7);
          if (Two) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, at, line);
      if (pair) _tile_stored(1, at + 16, line);
      if (Two) {
        _tile_stored(2, below, line);
        if (pair) _tile_stored(3, below + 16, line);
      }
    }
    tile_fence(upper.memory);
    tile_fence(lower.memory);
  }

  const RowBlock& block_;
  const Sight sight_;
  const int64_t key_size_;
  const int64_t value_size_;
  const int height_;     // rows of the matrix unit's tiles
  const bool alone_;     // whether a tile is read once: it comes from memory then
  const float factor_;   // from stored scores to the state's units
  bf16* queries_;
  bf16* tail_;
  const bf16* keys_[kSteps] = {};
  const bf16* values_[kSteps] = {};
  const bf16* awaited_[kSteps] = {};
  int64_t start_ = 0;
  int count_ = 0;  // keys of the tile that exist
  int steps_ = 0;  // runs of keys
  alignas(64) float zeros_[kRows];
  alignas(64) float scores_[kRows][kTile];
  alignas(64) bf16 weights_[kRows][kTile];
};

}  // namespace tokenmill

#endif
