// Attention tiles for blocks of at most 4 rows (decode of one token, few heads to a KV head). The same arithmetic
// as attention_amx.h, to the bit, in another layout: lanes are keys, so none is spent on rows that don't exist.
//
//   scores^T [128 keys][4 rows]  ▶  scores [4 rows][128 keys]  ▶  weights, which need no transposition any more
#pragma once

#if defined(__AMX_BF16__)

#include "attention_amx.h"

namespace tokenmill {

class NarrowAmxTiles : public AmxTiles {
 public:
  static constexpr int kRows = 4;

  explicit NarrowAmxTiles(const RowBlock& block) : AmxTiles(block) { configure(); }

  // Adds the tile to the state of the block's rows (`first` is 0: there is only one state).
  void attend(int64_t, const State& state) const {
    alignas(64) float scores[kRows][kTile];
    alignas(64) bf16 weights[kTile / 32][kRows][32] = {};
    for (int group = 0; group < groups_; ++group) score_group(group, scores);
    for (int r = 0; r < block_.rows(); ++r) {
      const float before = state.maxima()[r];
      const F maximum = max(splat(before), splat(finish_row(r, scores[r])) * splat(factor_));
      const F finite = finite_maximum(maximum);
      alignas(64) float shrink[kLanes], newest[kLanes];
      store(shrink, weight(splat(before) - finite));
      store(newest, maximum);
      state.maxima()[r] = newest[0];
      if (shrink[0] != 1.0f) state.scale_row(r, shrink[0]);
      for (int part = 0; part < (groups_ + 1) / 2; ++part) {
        const F low = weigh(scores[r] + part * 32, finite), high = weigh(scores[r] + part * 32 + 16, finite);
        auto both = _mm512_cvtne2ps_pbh((__m512)high.part[0], (__m512)low.part[0]);
        std::memcpy(weights[part][r], &both, sizeof both);
      }
    }
    add_rows(weights[0][0], state);
  }

 private:
  // 0 1: scores of 16 keys; 2 3: rows of the state; 4 5: keys, then values; 6: queries; 7: weights.
  static void configure() {
    TileConfig config;
    const uint8_t rows[8] = {16, 16, kRows, kRows, 16, 16, 16, kRows};
    const uint16_t bytes[8] = {kRows * 4, kRows * 4, 64, 64, 64, 64, kRows * 4, 64};
    std::memcpy(config.rows, rows, sizeof rows);
    std::memcpy(config.column_bytes, bytes, sizeof bytes);
    load_config(config);
  }

  // Raw scores of 16 keys, a row of lanes for each query.
  void score_group(int group, float (&scores)[kRows][kTile]) const {
    alignas(64) float raw[16 * kRows];
    ask(block_.problem.k_cache, block_.problem.key_size, group * 16, 16);
    tile_fence(queries_);
    tile_fence(key_rows_[group]);
    _tile_zero(0);
    for (int64_t step = 0; step < key_steps_; ++step) {
      _tile_loadd(6, queries_ + step * kTileElements, 64);
      _tile_loadd(4, key_rows_[group] + step * kStep, key_stride_);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, raw, kRows * 4);
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
    const __m512 a = _mm512_load_ps(raw), b = _mm512_load_ps(raw + 16);
    const __m512 c = _mm512_load_ps(raw + 32), d = _mm512_load_ps(raw + 48);
    const __m512 left01 = _mm512_permutex2var_ps(a, first, b), right01 = _mm512_permutex2var_ps(c, first, d);
    const __m512 left23 = _mm512_permutex2var_ps(a, second, b), right23 = _mm512_permutex2var_ps(c, second, d);
    _mm512_store_ps(scores[0] + group * 16, _mm512_shuffle_f32x4(left01, right01, 0x44));
    _mm512_store_ps(scores[1] + group * 16, _mm512_shuffle_f32x4(left01, right01, 0xEE));
    _mm512_store_ps(scores[2] + group * 16, _mm512_shuffle_f32x4(left23, right23, 0x44));
    _mm512_store_ps(scores[3] + group * 16, _mm512_shuffle_f32x4(left23, right23, 0xEE));
  }

  // Softcap and mask of one row, in place; returns its largest score.
  float finish_row(int row, float* scores) const {
    const Attention& p = block_.problem;
    const I newest = splat(sight_.newest[row]), oldest = splat(sight_.oldest[row]);
    const bool whole = count_ == kTile && start_ + kTile - 1 <= sight_.newest[row] && start_ >= sight_.oldest[row];
    F best = splat(kMinusInfinity);
    for (int i = 0; i < (groups_ + 1) / 2 * 32; i += kLanes) {
      F score = i < groups_ * 16 ? load(scores + i) : splat(kMinusInfinity);
      if (p.softcap > 0) score = capped(score * splat(p.scale), p.softcap);
      if (!whole) {
        const I token = lane_index() + splat(static_cast<int32_t>(start_ + i));
        score = select((token <= newest) & (token >= oldest), score, splat(kMinusInfinity));
      }
      store(scores + i, score);
      best = max(score, best);
    }
    return reduce_max(best);
  }

  F weigh(const float* scores, F maximum) const { return weight(fma(load(scores), splat(factor_), -maximum)); }

  void add_rows(const bf16* weights, const State& state) const {
    const int64_t line = state.width * 4, next = value_tiles_ * kTileElements;
    const int parts = (groups_ + 1) / 2;
    tile_fence(weights);
    tile_fence(values_);
    tile_fence(state.memory);
    for (int64_t e = 0; e < value_tiles_; ++e) {
      float* at = state.row(0) + e * 16;
      _tile_loadd(2, at, line);
      for (int part = 0; part < parts; ++part) {
        _tile_loadd(7, weights + part * kRows * 32, 64);
        _tile_loadd(5, values_ + e * kTileElements + part * next, 64);
        _tile_dpbf16ps(2, 7, 5);
      }
      _tile_stored(2, at, line);
    }
  }
};

}  // namespace tokenmill

#endif
