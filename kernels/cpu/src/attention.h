// Attention over the paged cache: the pieces that every instruction set shares.
//
// The query heads of one KV head are packed as rows, row = token * (heads / kv_heads) + head, so each KV block
// is read once for all of them. A row's arithmetic is fixed by token positions alone:
//
//   keys  0 ......... 255 | 256 ....... 511 | 512 ...        parts: softmax sums of their own, merged in order
//         tile tile tile     tile tile                       tiles: the running maximum moves once a tile
//
// A tile or part that a row doesn't see leaves its state untouched to the bit, so neither the other rows of a
// block, nor the chunking of the prompt, nor the batch can show in a result.
#pragma once

#include <cmath>

#include "api.h"
#include "vmath.h"

namespace tokenmill {

constexpr int64_t kPart = 1024;   // tokens
constexpr int kQueryRows = 16;    // rows of one state
constexpr int kBlockRows = 32;    // rows that share one pass over the keys
constexpr float kMinusInfinity = -INFINITY;

struct Attention {
  const void* query;    // [T, heads, key_size]
  const void* k_cache;  // [B, kv_heads, block_size, key_size]
  const void* v_cache;  // [B, kv_heads, block_size, value_size]
  void* out;            // [T, heads, value_size]
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* query_start;
  const float* sinks;   // [heads] or null
  int64_t sequences;
  int64_t table_width;
  int64_t heads;
  int64_t kv_heads;
  int64_t block_size;
  int64_t key_size;
  int64_t value_size;
  int64_t window;       // 0: none
  float scale;
  float softcap;        // 0: none
  int32_t type;         // of query, caches and out
  int32_t tiled;        // how out lies, as rows of heads * value_size (tiled.h)

  int64_t group() const { return heads / kv_heads; }

  // Rows of the caches (as [B * kv_heads * block_size, size]) that hold tokens [start, end) of a sequence.
  void locate(int64_t sequence, int64_t kv_head, int64_t start, int64_t end, int64_t* rows) const {
    const int32_t* block = block_table + sequence * table_width + start / block_size;
    for (int64_t offset = start % block_size; start < end; ++block, offset = 0) {
      const int64_t first = (*block * kv_heads + kv_head) * block_size;
      for (; offset < block_size && start < end; ++offset, ++start) *rows++ = first + offset;
    }
  }
};

// Rows [first, last) of one sequence and KV head.
struct RowBlock {
  const Attention& problem;
  int64_t sequence;
  int64_t kv_head;
  int64_t first;
  int64_t last;

  int64_t rows() const { return last - first; }
  int64_t query_token(int64_t row) const { return problem.query_start[sequence] + row / problem.group(); }

  // The position that a row stands at, which is the last key it sees.
  int64_t position(int64_t row) const {
    return problem.seq_lens[sequence] - problem.query_start[sequence + 1] + query_token(row);
  }
  int64_t first_key(int64_t row) const {
    int64_t start = problem.window > 0 ? position(row) - problem.window + 1 : 0;
    return start > 0 ? start : 0;
  }
};

// The rows of a block one after the other, without a division for each.
class Rows {
 public:
  explicit Rows(const RowBlock& block)
      : group_(block.problem.group()),
        heads_(block.problem.heads),
        position_(block.position(block.first)),
        token_(block.query_token(block.first)),
        head_(block.kv_head * group_),
        member_(block.first % group_) {}

  void next() {
    if (++member_ < group_) return;
    member_ = 0;
    ++token_;
    ++position_;
  }
  int64_t position() const { return position_; }
  int64_t token() const { return token_; }
  int64_t head() const { return head_ + member_; }
  int64_t vector() const { return token_ * heads_ + head(); }  // of [T, heads]

 private:
  const int64_t group_, heads_;
  int64_t position_, token_;
  const int64_t head_;
  int64_t member_;
};

// The keys that each row of a block sees, [oldest, newest]; rows past the last one repeat it, up to a whole state.
struct Sight {
  alignas(64) int32_t newest[kBlockRows];
  alignas(64) int32_t oldest[kBlockRows];

  explicit Sight(const RowBlock& block) {
    const int64_t rows = block.rows(), window = block.problem.window;
    Rows at(block);
    for (int64_t r = 0; r < rows; ++r, at.next()) {
      newest[r] = static_cast<int32_t>(at.position());
      oldest[r] = window > 0 && at.position() >= window ? static_cast<int32_t>(at.position() - window + 1) : 0;
    }
    for (int64_t r = rows; r % kQueryRows != 0; ++r) {
      newest[r] = newest[rows - 1];
      oldest[r] = oldest[rows - 1];
    }
  }
};

// The softmax sums of 16 rows: maxima [16], then for each row its weighted values and, in the column after them,
// the sum of its weights. Maxima are in the units of whoever made the tiles (`kUnit` to a natural logarithm;
// `weight` turns differences to factors).
struct State {
  float* memory;
  int64_t width;

  static int64_t sum_column(int64_t value_size) { return (value_size + kLanes - 1) / kLanes * kLanes; }
  static int64_t row_width(int64_t value_size) { return sum_column(value_size) + kLanes; }
  static int64_t floats(int64_t value_size) { return kQueryRows * (1 + row_width(value_size)); }

  float* maxima() const { return memory; }
  float* row(int64_t slot) const { return memory + kQueryRows + slot * width; }
  float& sum(int64_t slot) const { return row(slot)[width - kLanes]; }

  void reset() const {
    std::memset(memory, 0, static_cast<size_t>(kQueryRows * (1 + width)) * 4);
    store(maxima(), splat(kMinusInfinity));
  }

  void scale_row(int64_t slot, float factor) const {
    float* values = row(slot);
    for (int64_t i = 0; i < width; i += kLanes) store(values + i, load(values + i) * splat(factor));
  }
};

// The maximum to subtract: any finite number serves a row that has seen nothing yet.
TM_INLINE F finite_maximum(F maximum) {
  return select(maximum == splat(kMinusInfinity), splat(0.0f), maximum);
}

TM_INLINE F capped(F score, float softcap) {
  return softcap > 0 ? splat(softcap) * tanh(score / splat(softcap)) : score;
}

}  // namespace tokenmill
