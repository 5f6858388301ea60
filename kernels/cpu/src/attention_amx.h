// Attention tiles on the matrix unit, bfloat16: 128 keys against 16 rows at a time.
//
//   scores^T [128 keys][16 rows]  =  keys (as they lie in the cache) x queries^T (VNNI, made once a block)
//   softmax down the columns: a lane is a row, so maxima and sums need no step across lanes
//   weights [16 rows][128 keys]   =  transposed, in bfloat16
//   values [16 rows][e + 1]      +=  weights x (values, ones): pairs of tokens interleaved, made once a tile
//
// Scores are kept in units of log 2, so that a weight is one power of two.
#pragma once

#if defined(__AMX_BF16__)

#include "amx.h"
#include "attention.h"
#include "threads.h"

namespace tokenmill {

// to[column][row] = from[row][column] for 16 x 16 words of 32 bits.
inline void transpose_words(const __m512i (&from)[16], uint32_t* to, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xDD);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * stride, _mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD));
  }
}

// 2^x for x <= 0 to 3e-6, more than bfloat16 weights need; 2^0 is exactly 1 and 2^-inf exactly 0.
TM_INLINE F power_of_two(F x) {
  constexpr float q[] = {6.930448426e-01f, 2.412802159e-01f, 5.224245821e-02f, 1.342669152e-02f};
  constexpr int kFloor = 0x09;
  F r = {{(NativeF)_mm512_reduce_ps((__m512)x.part[0], kFloor)}};
  F p = fma(r, polynomial(r, q), splat(1.0f));
  return {{(NativeF)_mm512_scalef_ps((__m512)p.part[0], (__m512)x.part[0])}};
}

class AmxTiles {
 public:
  static constexpr int kTile = 128;
  static constexpr float kUnit = kLog2E;  // what a natural logarithm is in the state's units
  static F weight(F difference) { return power_of_two(difference); }

  explicit AmxTiles(const RowBlock& block)
      : block_(block),
        sight_(block),
        key_steps_(divide_up(block.problem.key_size, kStep)),
        value_tiles_(block.problem.value_size / 16 + 1),
        in_place_(block.problem.block_size % 16 == 0 && block.problem.key_size % kStep == 0),
        factor_(block.problem.softcap > 0 ? kLog2E : block.problem.scale * kLog2E) {
    const int64_t tiles = divide_up(block.rows(), kQueryRows);
    const int64_t width = key_steps_ * kStep;
    queries_ = scratch<bf16>(kPanel, tiles * kQueryRows * width + kTile * (width + value_tiles_ * 16));
    keys_ = queries_ + tiles * kQueryRows * width;
    values_ = keys_ + kTile * width;
    std::memset(queries_, 0, static_cast<size_t>(tiles * kQueryRows * width) * 2);
    for (int64_t r = 0; r < block.rows(); ++r) place_query(r);
    for (int line = 0; line < kTile / 2; ++line) place_ones(value_line(line) + (value_tiles_ - 1) * kTileElements);
    configure_tiles(32);
  }
  ~AmxTiles() { _tile_release(); }

  // Keys [start, start + kTile) of `block`, of which those before `end` exist, are read after the next tile: they
  // are asked for while that is computed, since a block's rows are too short for the processor to see a stream.
  void expect(const RowBlock& block, int64_t start, int64_t end) {
    awaited_ = static_cast<int>(end < start + kTile ? end - start : kTile);
    if (awaited_ > 0) block.problem.locate(block.sequence, block.kv_head, start, start + awaited_, awaited_rows_);
  }

  // Brings in keys [start, start + kTile), of which those before `end` exist for this block.
  void load_tile(int64_t start, int64_t end) {
    const Attention& p = block_.problem;
    start_ = start;
    count_ = static_cast<int>(end < start + kTile ? end - start : kTile);
    groups_ = (count_ + 15) / 16;
    p.locate(block_.sequence, block_.kv_head, start, start + count_, place_);
    for (int group = 0; group < groups_; ++group) load_keys(group);
    for (int pair = 0; pair < (groups_ + 1) / 2 * 16; ++pair) {
      ask(p.v_cache, p.value_size, 2 * pair, 2);
      load_values(pair);
    }
  }

  // Adds the tile to the state of the block's rows from `first` on, 16 of them.
  void attend(int64_t first, const State& state) const {
    alignas(64) float scores[kTile * 16];
    alignas(64) bf16 weights[kQueryRows * kTile];
    score(first / kQueryRows, scores);
    const F before = load(state.maxima());
    const F maximum = max(before, finish_scores(first, scores) * splat(factor_));
    const F finite = finite_maximum(maximum);
    const F shrink = weight(before - finite);
    weigh_keys(finite, scores, weights);
    store(state.maxima(), maximum);
    if (mask_bits(shrink != splat(1.0f)) != 0) {
      alignas(64) float factors[kQueryRows];
      store(factors, shrink);
      for (int r = 0; r < kQueryRows; ++r) state.scale_row(r, factors[r]);
    }
    add_values(weights, state);
  }

 protected:
  // Asks for `count` of the awaited rows of a cache, from `first` on.
  TM_INLINE void ask(const void* cache, int64_t size, int first, int count) const {
    for (int i = first; i < first + count && i < awaited_; ++i) {
      const char* row = static_cast<const char*>(cache) + awaited_rows_[i] * size * 2;
      for (int64_t byte = 0; byte < size * 2; byte += 64) __builtin_prefetch(row + byte, 0, 2);
    }
  }

  void place_query(int64_t row) {
    const bf16* query = block_.query<bf16>(block_.first + row);
    bf16* tile = queries_ + row / kQueryRows * kQueryRows * key_steps_ * kStep + row % kQueryRows * 2;
    const int64_t size = block_.problem.key_size;
    for (int64_t d = 0; d + 1 < size; d += 2) std::memcpy(tile + d / 2 * 32, query + d, 4);
    if (size % 2) tile[size / 2 * 32] = query[size - 1];
  }

  // Line `pair` % 16 of [pair / 16][value tiles][16][16][2], in its first value tile.
  bf16* value_line(int pair) const {
    return values_ + pair / 16 * value_tiles_ * kTileElements + pair % 16 * 32;
  }

  // The last value tile is a column of ones: what the weights add up to.
  static void place_ones(bf16* line) {
    std::memset(line, 0, 64);
    line[0].bits = line[1].bits = 0x3F80;
  }

  void load_keys(int group) {
    const Attention& p = block_.problem;
    const bf16* cache = static_cast<const bf16*>(p.k_cache);
    if (in_place_) {
      key_rows_[group] = cache + place_[group * 16] * p.key_size;
      key_stride_ = p.key_size * 2;
      return;
    }
    const int64_t width = key_steps_ * kStep;
    bf16* copy = keys_ + group * 16 * width;
    std::memset(copy, 0, static_cast<size_t>(16 * width) * 2);
    for (int i = group * 16; i < group * 16 + 16 && i < count_; ++i) {
      std::memcpy(copy + i % 16 * width, cache + place_[i] * p.key_size, static_cast<size_t>(p.key_size) * 2);
    }
    key_rows_[group] = copy;
    key_stride_ = width * 2;
  }

  // Tokens 2 * pair and the next, interleaved; zero where there is none.
  void load_values(int pair) {
    const int64_t size = block_.problem.value_size;
    const bf16* cache = static_cast<const bf16*>(block_.problem.v_cache);
    const bf16* even = 2 * pair < count_ ? cache + place_[2 * pair] * size : nullptr;
    const bf16* odd = 2 * pair + 1 < count_ ? cache + place_[2 * pair + 1] * size : nullptr;
    bf16* line = value_line(pair);
    for (int64_t e = 0; e + 1 < value_tiles_; ++e) {
      __m512i both = even ? widened(even + e * 16) : _mm512_setzero_si512();
      if (odd) both = _mm512_or_si512(both, _mm512_slli_epi32(widened(odd + e * 16), 16));
      _mm512_store_si512(line + e * kTileElements, both);
    }
  }

  static __m512i widened(const bf16* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  // Raw scores^T of one tile of rows, four groups of keys at a time.
  void score(int64_t tile, float* scores) const {
    const bf16* query = queries_ + tile * kQueryRows * key_steps_ * kStep;
    for (int group = 0; group < groups_; group += 4) {
      const bf16* const* keys = key_rows_ + group;
      if (tile == 0) ask(block_.problem.k_cache, block_.problem.key_size, group * 16, 64);
      tile_fence(query);
      tile_fence(keys_);
      const int some = groups_ - group;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < key_steps_; ++step) {
        _tile_loadd(6, query + step * kTileElements, 64);
        _tile_loadd(4, keys[0] + step * kStep, key_stride_);
        _tile_dpbf16ps(0, 4, 6);
        if (some > 1) {
          _tile_loadd(5, keys[1] + step * kStep, key_stride_);
          _tile_dpbf16ps(1, 5, 6);
        }
        if (some > 2) {
          _tile_loadd(4, keys[2] + step * kStep, key_stride_);
          _tile_dpbf16ps(2, 4, 6);
        }
        if (some > 3) {
          _tile_loadd(5, keys[3] + step * kStep, key_stride_);
          _tile_dpbf16ps(3, 5, 6);
        }
      }
      _tile_stored(0, scores + group * 256, 64);
      _tile_stored(1, scores + group * 256 + 256, 64);
      if (some > 2) {
        _tile_stored(2, scores + group * 256 + 512, 64);
        _tile_stored(3, scores + group * 256 + 768, 64);
      }
    }
  }

  // Softcap and mask, in place where either is needed; returns the largest score of each row.
  F finish_scores(int64_t first, float* scores) const {
    const bool whole = count_ == kTile && start_ + kTile - 1 <= sight_.newest[first] &&
                       start_ >= sight_.oldest[first + kQueryRows - 1];
    if (!whole) return mask_scores(first, scores);
    const Attention& p = block_.problem;
    F best[4];  // apart, so that they don't wait for each other
    for (F& each : best) each = splat(kMinusInfinity);
    for (int i = 0; i < kTile; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        F score = load(scores + (i + j) * 16);
        if (p.softcap > 0) {
          score = capped(score * splat(p.scale), p.softcap);
          store(scores + (i + j) * 16, score);
        }
        best[j] = max(score, best[j]);
      }
    }
    return max(max(best[0], best[1]), max(best[2], best[3]));
  }

  F mask_scores(int64_t first, float* scores) const {
    const Attention& p = block_.problem;
    const I newest = load(sight_.newest + first), oldest = load(sight_.oldest + first);
    F best = splat(kMinusInfinity);
    for (int i = 0; i < (groups_ + 1) / 2 * 32; ++i) {
      F score = load(scores + i * 16);
      if (p.softcap > 0) score = capped(score * splat(p.scale), p.softcap);
      const I token = splat(static_cast<int32_t>(start_ + i));
      score = select((token <= newest) & (token >= oldest), score, splat(kMinusInfinity));
      store(scores + i * 16, score);
      best = max(score, best);
    }
    return best;
  }

  // 2^(score - maximum) as bfloat16 [4][16 rows][32 keys].
  void weigh_keys(F maximum, const float* scores, bf16* weights) const {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i interleave = _mm512_load_si512(order);
    const F factor = splat(factor_);
    for (int part = 0; part < (groups_ + 1) / 2; ++part) {
      __m512i pairs[16];
      for (int i = 0; i < 16; ++i) {
        const float* at = scores + (part * 32 + 2 * i) * 16;
        F even = weight(fma(load(at), factor, -maximum)), odd = weight(fma(load(at + 16), factor, -maximum));
        auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd.part[0], (__m512)even.part[0]);
        pairs[i] = _mm512_permutexvar_epi16(interleave, both);
      }
      transpose_words(pairs, reinterpret_cast<uint32_t*>(weights + part * kTileElements), 16);
    }
  }

  // The state's rows += weights x the tile's values and ones, two tiles of columns at a time.
  void add_values(const bf16* weights, const State& state) const {
    const int64_t line = state.width * 4, next = value_tiles_ * kTileElements;
    const int parts = (groups_ + 1) / 2;
    tile_fence(weights);
    tile_fence(values_);
    tile_fence(state.memory);
    for (int64_t e = 0; e < value_tiles_; e += 2) {
      const bool second = e + 1 < value_tiles_;
      float* at = state.row(0) + e * 16;
      const bf16* value = values_ + e * kTileElements;
      _tile_loadd(0, at, line);
      if (second) _tile_loadd(1, at + 16, line);
      for (int part = 0; part < parts; ++part) {
        _tile_loadd(4, weights + part * kTileElements, 64);
        _tile_loadd(6, value + part * next, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (second) {
          _tile_loadd(7, value + part * next + kTileElements, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
      }
      _tile_stored(0, at, line);
      if (second) _tile_stored(1, at + 16, line);
    }
  }

  const RowBlock& block_;
  const Sight sight_;
  const int64_t key_steps_;
  const int64_t value_tiles_;
  const bool in_place_;  // keys can be read as tiles from the cache itself
  const float factor_;   // from stored scores to the state's units
  bf16* queries_;
  bf16* keys_;
  bf16* values_;
  const bf16* key_rows_[kTile / 16] = {};
  int64_t key_stride_ = 64;
  int64_t place_[kTile];
  int64_t awaited_rows_[kTile];
  int awaited_ = 0;
  int64_t start_ = 0;
  int count_ = 0;   // keys of the tile that exist
  int groups_ = 0;  // of 16 keys
};

}  // namespace tokenmill

#endif
