// Attention tiles by vector instructions over a plain cache: float32, and bfloat16 of sizes that aren't tiled. Keys and
// values of a tile are widened to float32 once, then each row takes its dot products with all of them.
#pragma once

#include "attention.h"
#include "threads.h"

namespace tokenmill {

template <class T>
class VectorTiles {
 public:
  static constexpr int kTile = 32;
  static constexpr int kRows = kQueryRows;
  static constexpr float kUnit = 1;  // what a natural logarithm is in the state's units
  static F weight(F difference) { return exp(difference); }

  explicit VectorTiles(const RowBlock& block)
      : block_(block),
        sight_(block),
        keys_width_(padded(block.problem.key_size)),
        values_width_(padded(block.problem.value_size)) {
    const int64_t rows = block.rows();
    queries_ = scratch<float>(kPanel, rows * keys_width_ + kTile * (keys_width_ + values_width_ + kLanes));
    keys_ = queries_ + rows * keys_width_;
    values_ = keys_ + kTile * keys_width_;
    const T* queries = static_cast<const T*>(block.problem.query);
    const int64_t size = block.problem.key_size;
    Rows at(block);
    for (int64_t r = 0; r < rows; ++r, at.next()) {
      widen(queries + at.vector() * size, size, queries_ + r * keys_width_, keys_width_);
    }
  }

  // What is read after the next tile: these tiles take long enough for the processor's own prefetching.
  void expect(const RowBlock&, int64_t, int64_t) {}

  // Brings in keys [start, start + kTile), of which those before `end` exist for this block.
  void load_tile(int64_t start, int64_t end) {
    const Attention& p = block_.problem;
    int64_t place[kTile];
    start_ = start;
    p.locate(block_.sequence, block_.kv_head, start, end < start + kTile ? end : start + kTile, place);
    for (int64_t i = 0; i < kTile; ++i) {
      float* key = keys_ + i * keys_width_;
      float* value = values_ + i * values_width_;
      if (start + i < end) {
        widen(static_cast<const T*>(p.k_cache) + place[i] * p.key_size, p.key_size, key, keys_width_);
        widen(static_cast<const T*>(p.v_cache) + place[i] * p.value_size, p.value_size, value, values_width_);
      } else {
        std::memset(key, 0, static_cast<size_t>(keys_width_) * 4);
        std::memset(value, 0, static_cast<size_t>(values_width_) * 4);
      }
    }
  }

  // Adds the tile to the states of the block's rows from `first` on, kRows of them.
  void attend(int64_t first, float* states) {
    const int64_t size = block_.problem.value_size;
    const State state{states + first / kQueryRows * State::floats(size), State::row_width(size)};
    const int64_t last = first + kQueryRows < block_.rows() ? first + kQueryRows : block_.rows();
    for (int64_t r = first; r < last; ++r) attend_row(r, r - first, state);
  }

 private:
  static int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

  static void widen(const T* from, int64_t size, float* to, int64_t width) {
    for (int64_t i = 0; i < width; i += kLanes) store(to + i, load_up_to(from + i, size - i));
  }

  F scores(int64_t row, int part) const {
    const float* query = queries_ + row * keys_width_;
    alignas(64) float score[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const float* key = keys_ + (part * kLanes + i) * keys_width_;
      F sum = {};
      for (int64_t d = 0; d < keys_width_; d += kLanes) sum = fma(load(query + d), load(key + d), sum);
      score[i] = reduce_add(sum);
    }
    const Attention& p = block_.problem;
    F value = capped(load(score) * splat(p.scale), p.softcap);
    I token = lane_index() + splat(static_cast<int32_t>(start_ + part * kLanes));
    I seen = (token <= splat(sight_.newest[row])) &
             (token >= splat(sight_.oldest[row]));
    return select(seen, value, splat(kMinusInfinity));
  }

  void attend_row(int64_t row, int64_t slot, const State& state) const {
    F score[2] = {scores(row, 0), scores(row, 1)};
    const float before = state.maxima()[slot];
    const float maximum = reduce_max(max(splat(before), max(score[0], score[1])));
    const F finite = finite_maximum(splat(maximum));
    alignas(64) float weights[kTile], correction[kLanes];
    F part[2] = {weight(score[0] - finite), weight(score[1] - finite)};
    store(weights, part[0]);
    store(weights + kLanes, part[1]);
    store(correction, weight(splat(before) - finite));
    state.maxima()[slot] = maximum;
    state.sum(slot) = state.sum(slot) * correction[0] + reduce_add(part[0] + part[1]);
    float* out = state.row(slot);
    for (int64_t e = 0; e < values_width_; e += kLanes) {
      F sum = load(out + e) * splat(correction[0]);
      for (int i = 0; i < kTile; ++i) sum = fma(splat(weights[i]), load(values_ + i * values_width_ + e), sum);
      store(out + e, sum);
    }
  }

  const RowBlock& block_;
  const Sight sight_;
  const int64_t keys_width_;
  const int64_t values_width_;
  float* queries_;
  float* keys_;
  float* values_;
  int64_t start_ = 0;
};

}  // namespace tokenmill
