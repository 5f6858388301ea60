// Attention tiles by vector instructions over a tiled cache (cache_layout.h): 128 keys against 16 rows.
//
//   scores [rows][128 keys]  =  queries x keys     a run of 32 keys is a pair of columns (product.h) as it lies there
//   weights                  =  e^(score - maximum), in place of the scores
//   values [rows][E]        +=  weights x values   a run's values are 16 lines, 16 columns at a time
#pragma once

#include <algorithm>

#include "attention.h"
#include "cached_runs.h"
#include "product.h"
#include "threads.h"

namespace tokenmill {

class TiledVectorTiles {
 public:
  static constexpr int kTile = 128;
  static constexpr int kRows = kQueryRows;
  static constexpr float kUnit = 1;  // what a natural logarithm is in the state's units
  static F weight(F difference) { return exp(difference); }

  explicit TiledVectorTiles(const RowBlock& block)
      : block_(block),
        sight_(block),
        key_size_(block.problem.key_size),
        value_size_(block.problem.value_size),
        alone_(block.rows() <= kRows) {
    const int64_t rows = block.rows();
    queries_ = scratch<float>(kPanel, rows * key_size_ + kRows * kTile + kCacheStep * value_size_ / 2);
    scores_ = queries_ + rows * key_size_;
    tail_ = reinterpret_cast<bf16*>(scores_ + kRows * kTile);
    const bf16* queries = static_cast<const bf16*>(block.problem.query);
    Rows at(block);
    for (int64_t r = 0; r < rows; ++r, at.next()) {
      const bf16* query = queries + at.vector() * key_size_;
      for (int64_t d = 0; d < key_size_; d += kLanes) store(queries_ + r * key_size_ + d, load(query + d));
    }
  }

  // Keys [start, start + kTile) of `block`, of which those before `end` exist, are read after the next tile: they
  // are asked for beside it, since a block's rows are too short for the processor to see a stream.
  void expect(const RowBlock& block, int64_t start, int64_t end) {
    if (!alone_) return;
    int64_t place[kSteps];
    const int count = locate_runs(block, start, end, kSteps, place);
    const bf16* keys = static_cast<const bf16*>(block.problem.k_cache);
    for (int step = 0; step < kSteps; ++step) awaited_[step] = step < count ? keys + place[step] * key_size_ : nullptr;
  }

  // Brings in keys [start, start + kTile), of which those before `end` exist for this block.
  void load_tile(int64_t start, int64_t end) {
    start_ = start;
    int64_t place[kSteps];
    steps_ = locate_runs(block_, start, end, kSteps, place);
    const bf16* keys = static_cast<const bf16*>(block_.problem.k_cache);
    const bf16* values = static_cast<const bf16*>(block_.problem.v_cache);
    for (int step = 0; step < steps_; ++step) {
      keys_[step] = keys + place[step] * key_size_;
      values_[step] = values + place[step] * value_size_;
    }
    const int count = static_cast<int>(end < start + kTile ? end - start : kTile);
    if (const int left = count % kCacheStep) {
      values_[steps_ - 1] = without_strangers(values_[steps_ - 1], left, value_size_, tail_);
    }
  }

  // Adds the tile to the states of the block's rows from `first` on, kRows of them.
  void attend(int64_t first, float* states) {
    const State state{states + first / kRows * State::floats(value_size_), State::row_width(value_size_)};
    const int rows = static_cast<int>(std::min<int64_t>(block_.rows() - first, kRows));
    // Of the last row on: no row sees more runs. Those that one row doesn't see have no weight for it.
    const int64_t newest = sight_.newest[first + rows - 1];
    const int steps = static_cast<int>(std::min<int64_t>(steps_, (newest - start_) / kCacheStep + 1));
    score(first, rows, steps);
    for (int r = 0; r < rows; ++r) weigh(first + r, r, steps, state);
    add_values(rows, steps, state);
  }

 private:
  static constexpr int kSteps = kTile / kCacheStep;

  // Memory to ask for beside a product, `lines` with each of its own: a core has few buffers for what is under way.
  struct Asking {
    const bf16* from;
    int64_t lines;

    TM_INLINE void operator()(int64_t n) const {
      for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(from + (n * lines + i) * 32, 0, 2);
    }
  };

  // Raw scores of the tile's first `steps` runs.
  void score(int64_t first, int rows, int steps) const {
    std::memset(scores_, 0, static_cast<size_t>(rows) * kTile * 4);
    for (int step = 0; step < steps; ++step) {
      const Lines<bf16> keys{keys_[step], kPair, 16 * key_size_, 16 * kPair};
      const Asking asking{values_[step], alone_ ? divide_up(2 * value_size_, key_size_) : 0};
      in_row_blocks(rows, [&](int r, auto height) {
        dot_pair<decltype(height)::value>(queries_ + (first + r) * key_size_, key_size_, keys, key_size_ / kStep,
                                          scores_ + r * kTile + step * kCacheStep, kTile, asking);
      });
    }
  }

  // A row's scores, scaled, capped and masked, as they end up.
  TM_INLINE F finished(int64_t row, const float* scores, int64_t token) const {
    const Attention& p = block_.problem;
    const F value = capped(load(scores) * splat(p.scale), p.softcap);
    const int32_t newest = sight_.newest[row], oldest = sight_.oldest[row];
    if (token + kLanes - 1 <= newest && token >= oldest) return value;
    const I index = lane_index() + splat(static_cast<int32_t>(token));
    return select((index <= splat(newest)) & (index >= splat(oldest)), value, splat(kMinusInfinity));
  }

  // One row's weights in place of its scores; its state is scaled to the new maximum.
  void weigh(int64_t row, int slot, int steps, const State& state) const {
    float* scores = scores_ + slot * kTile;
    const int64_t count = steps * kCacheStep;
    F largest = splat(kMinusInfinity);
    for (int64_t i = 0; i < count; i += kLanes) {
      const F value = finished(row, scores + i, start_ + i);
      store(scores + i, value);
      largest = max(largest, value);
    }
    const float before = state.maxima()[slot];
    const float maximum = reduce_max(max(splat(before), largest));
    const F finite = finite_maximum(splat(maximum));
    F sum = {};
    for (int64_t i = 0; i < count; i += kLanes) {
      const F power = weight(load(scores + i) - finite);
      store(scores + i, power);
      sum = sum + power;
    }
    if (maximum != before) {
      alignas(64) float correction[kLanes];
      store(correction, weight(splat(before) - finite));
      state.scale_row(slot, correction[0]);
      state.maxima()[slot] = maximum;
    }
    state.sum(slot) += reduce_add(sum);
  }

  // The state's rows += weights x values, two tiles of columns at a time. Meanwhile the keys that are awaited are
  // asked for.
  void add_values(int rows, int steps, const State& state) const {
    const int64_t lines = divide_up(key_size_, divide_up(value_size_, kPair) * 16);
    for (int64_t e = 0; e < value_size_; e += kPair) {
      for (int step = 0; step < steps; ++step) {
        const Lines<bf16> values{values_[step] + 2 * e, 2 * value_size_, kPair, 0};
        const Asking asking{awaited_[step] + e / kPair * 16 * lines * 32, awaited_[step] ? lines : 0};
        in_row_blocks(rows, [&](int r, auto height) {
          constexpr int R = decltype(height)::value;
          const float* weights = scores_ + r * kTile + step * kCacheStep;
          if (e + kLanes < value_size_) {
            dot_pair<R>(weights, kTile, values, 1, state.row(r) + e, state.width, asking);
          } else {
            dot_tiles<R, 1>(weights, kTile, values, 1, state.row(r) + e, state.width, asking);
          }
        });
      }
    }
  }

  const RowBlock& block_;
  const Sight sight_;
  const int64_t key_size_;
  const int64_t value_size_;
  const bool alone_;  // whether a tile is read once: it comes from memory then
  float* queries_;
  float* scores_;
  bf16* tail_;
  const bf16* keys_[kSteps] = {};
  const bf16* values_[kSteps] = {};
  const bf16* awaited_[kSteps] = {};
  int64_t start_ = 0;
  int steps_ = 0;  // runs of keys
};

}  // namespace tokenmill
