// y = epilogue(x W^T): one kernel for every number of rows.
//
// A task is a run of pairs of packed columns (32 outputs each) times a panel of rows: threads share the columns where
// rows are few, the rows where they are many. For each pair K runs in order, so a row's result is the same bits alone
// and in any batch:
//
//   plain weights            in one go
//   quantized, x bfloat16    by the matrix unit: piece by piece, each unpacked to what it stands for in bfloat16 and
//                            then multiplied as a plain weight is, to the same bits; else in integers (integers.h)
//   quantized, x float32     group by group: the integers are multiplied, and the group's sums meet its scale:
//                            sum += scale[group] * (x . q) + minimum[group] * sum(x over the group)
//
// A row-wide scale (8 bits) meets the whole sum in either case.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "amx.h"
#include "api.h"
#include "epilogue.h"
#include "integers.h"
#include "operand.h"
#include "packed.h"
#include "pending.h"
#include "product.h"
#include "single_row.h"
#include "threads.h"
#include "unpack.h"

namespace tokenmill {
namespace {

constexpr int64_t kPanelBytes = 1 << 20;  // of x: what stays in a core's own cache beside the weight
constexpr int64_t kMaxPanelRows = 512;
constexpr int64_t kChunk = 8;             // steps of a quantized weight unpacked at a time
constexpr int64_t kLongChunk = 64;        // the same where many rows come by
constexpr int64_t kAhead = 2048;          // bytes of it that are asked for in advance

#if defined(__AMX_BF16__)
constexpr bool kMatrixUnit = true;
#else
constexpr bool kMatrixUnit = false;
#endif

// Whether the matrix unit multiplies T rows with W weights.
template <class T, class W>
constexpr bool kAmx = kMatrixUnit && sizeof(T) == 2 && sizeof(W) == 2;

TM_INLINE void set_rows(int rows) {
#if defined(__AMX_BF16__)
  configure_tiles(rows);
#else
  (void)rows;
#endif
}

#if defined(__AVX512BF16__)
constexpr bool kDirect = true;  // bfloat16 x is multiplied as it is

template <class Between>
TM_INLINE void multiply(const Inputs<bf16>& x, const bf16* weight, int64_t steps, int rows, float* sums, bool fresh,
                        const Between& between) {
#if defined(__AMX_BF16__)
  amx_product(x, weight, steps, rows, sums, fresh, between);
#else
  vector_product(x.at, x.row, weight, steps, rows, sums, fresh, between);
#endif
}
#else
constexpr bool kDirect = false;
#endif

template <class W, class Between>
TM_INLINE void multiply(const Inputs<float>& x, const W* weight, int64_t length, int rows, float* sums, bool fresh,
                        const Between& between) {
  if constexpr (sizeof(W) == 2) {
    vector_product(x.at, x.row, weight, length, rows, sums, fresh, between);
  } else {
    vector_product(x.at, x.row, weight, length, rows, sums, fresh);
  }
}

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
    chunk_ = kAmx<T, W> && (last - first) * length_ * kStep * 2 > kTooLong ? kChunk : length_;
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
  static constexpr int64_t kPiece = 9;               // steps: 18 KiB, and as much of a block of rows
  static constexpr int64_t kChunk = 63;              // steps: 1 MiB of 256 rows
  static constexpr int64_t kTooLong = kPanelBytes;
  static constexpr int64_t kGroupRows = 1 << 15;     // of a pair each, 4 MiB of sums

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

// sums [rows][32] += scale * part + minimum * the row's sum over the group.
void fold_group(const Packed& w, const uint8_t* group, const float* part, const float* group_sums, int rows,
                float* sums) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group);
  const F unit = splat(w.unit), left = load_half(scales) * unit, right = load_half(scales + 16) * unit;
  if (!w.minima) {
    for (int r = 0; r < rows; ++r, part += kPair, sums += kPair) {
      store(sums, fma(load(part), left, load(sums)));
      store(sums + 16, fma(load(part + 16), right, load(sums + 16)));
    }
    return;
  }
  const F low = load_half(scales + 32) * unit, high = load_half(scales + 48) * unit;
  for (int r = 0; r < rows; ++r, part += kPair, sums += kPair) {
    const F whole = splat(group_sums[r]);
    store(sums, fma(low, whole, fma(load(part), left, load(sums))));
    store(sums + 16, fma(high, whole, fma(load(part + 16), right, load(sums + 16))));
  }
}

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
    piece_ = std::min(last - first > kBlock ? kLongChunk : kChunk, steps_);
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

// A quantized pair times float32 rows: group by group, unpack, multiply, fold.
template <class T>
class QuantizedTask {
 public:
  QuantizedTask(const Call& call, const Operand<T>& operand, int64_t pair, int64_t first, int64_t last)
      : call_(call), w_(call.weight), operand_(operand), pair_(pair), first_(first), last_(last), unpacker_(w_) {
    const int64_t room = divide_up(last - first, kBlock) * kBlock * kPair;
    unpacked_ = scratch<bf16>(kPanel, kChunk * kStepElements);
    sums_ = scratch<float>(kAccumulator, 2 * room);
    parts_ = sums_ + room;
    std::memset(sums_, 0, static_cast<size_t>(room) * 4);
  }

  void run() {
    const int64_t groups = w_.groups();
    const uint8_t* group = w_.pair(pair_);
    for (int64_t g = 0; g < groups; ++g, group += w_.group_bytes()) {
      for (int64_t i = 0; i < w_.group_bytes(); i += 64) __builtin_prefetch(group + kAhead + i, 0, 2);
      add_group(group, g);
    }
    for (int64_t r = first_; r < last_; r += kBlock) finish(call_, pair_, r, block_rows(r), sums_at(r));
  }

 private:
  int block_rows(int64_t r) const { return static_cast<int>(last_ - r < kBlock ? last_ - r : kBlock); }
  float* sums_at(int64_t r) const { return sums_ + (r - first_) * kPair; }

  void add_group(const uint8_t* group, int64_t g) {
    const int64_t steps = divide_up(w_.group, kStep);
    for (int64_t step = 0; step < steps; step += kChunk) {
      const int64_t length = steps - step < kChunk ? steps - step : kChunk;
      unpacker_.unpack(group + w_.scale_bytes() + step * w_.step_bytes(), length, g, unpacked_);
      const int64_t input = (g * w_.group / kStep + step) * kStep;
      for (int64_t r = first_; r < last_; r += kBlock) {
        const int rows = block_rows(r);
        if (rows != shaped_) set_rows(shaped_ = rows);
        float* part = steps > kChunk ? parts_ + (r - first_) * kPair : parts_;
        multiply(operand_.inputs(r, input), unpacked_, length, rows, part, step == 0, [](int64_t) {});
        if (step + length < steps) continue;
        const float* group_sums = w_.minima ? operand_.group_sums + g * call_.rows + r : nullptr;
        fold_group(w_, group, part, group_sums, rows, sums_at(r));
      }
    }
  }

  const Call& call_;
  const Packed& w_;
  const Operand<T>& operand_;
  const int64_t pair_, first_, last_;
  const Unpacker unpacker_;
  int shaped_ = 0;
  bf16* unpacked_;
  float* sums_;
  float* parts_;
};

// Rows [first, last) of the pairs [begin, end).
template <class T>
void run_task(const Call& call, const Operand<T>& operand, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const Packed& w = call.weight;
  if (w.quantized()) {
    if constexpr (sizeof(T) == 4) {
      for (int64_t pair = begin; pair < end; ++pair) QuantizedTask<T>(call, operand, pair, first, last).run();
    }
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 2) unpacked_task(call, operand, begin, end, first, last);
#endif
  } else {
    if (w.format != kF32) {
      PlainTask<T, bf16>(call, operand, first, last).run(begin, end);
    } else if constexpr (sizeof(T) == 4) {
      PlainTask<T, float>(call, operand, first, last).run(begin, end);
    }
  }
#if defined(__AMX_BF16__)
  _tile_release();
#endif
}

// Borders of the runs of pairs that a thread takes at once: long ones first, so that the weight streams from
// memory, then ever shorter ones, so that all threads end together.
std::vector<int64_t> split_pairs(int64_t pairs) {
  std::vector<int64_t> borders{0};
  while (borders.back() < pairs) {
    const int64_t left = pairs - borders.back();
    borders.push_back(borders.back() + divide_up(left, 2 * thread_count()));
  }
  return borders;
}

// work(begin, end, first, last) for all pairs and rows, spread over the threads: rows of x take `row_bytes` each, and
// `least` of them come together however long they are.
template <class Work>
void spread(const Call& call, int64_t row_bytes, int64_t least, const Work& work) {
  const int64_t pairs = call.weight.pairs();
  const int64_t fit = std::min(std::max<int64_t>(kPanelBytes / row_bytes, least), kMaxPanelRows);
  const int64_t panel = divide_up(divide_up(call.rows, divide_up(call.rows, fit)), kBlock) * kBlock;
  const int64_t piece = rows_a_piece(call.rows, panel), pieces = divide_up(call.rows, piece);
  const std::vector<int64_t> runs = many(call.rows) ? std::vector<int64_t>{0, pairs} : split_pairs(pairs);
  const int64_t count = static_cast<int64_t>(runs.size()) - 1;
  parallel_for(pieces * count, [&](int64_t task) {
    const int64_t run = task % count, last = std::min((task / count + 1) * piece, call.rows);
    for (int64_t first = task / count * piece; first < last; first += panel) {
      work(runs[run], runs[run + 1], first, std::min(first + panel, last));
    }
  });
}

template <class T, class X>
void run(const Call& call, const X* x) {
  const Operand<T> operand = prepare<T>(x, call.x_tiled, call.weight, call.rows);
  const int64_t least = kAmx<T, bf16> && !call.weight.quantized() ? 256 : 128;  // PlainTask copes with more than fits
  spread(call, operand.layout.width * static_cast<int64_t>(sizeof(T)), least,
         [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
           run_task(call, operand, begin, end, first, last);
         });
}

// A quantized weight times bfloat16 rows where there is no matrix unit.
void run_integers(const Call& call, const bf16* x) {
  const IntegerRows operand = integer_rows(x, call.weight, call.rows);
  spread(call, operand.stride * 2, 128, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    IntegerTask task(call, operand, first, last);
    for (int64_t pair = begin; pair < end; ++pair) task.run(pair);
  });
}

}  // namespace
}  // namespace tokenmill

// y [rows, width] = epilogue(x [rows, in] W^T) + residual, where y and residual have type `y_type`. Tiled x or y
// (tiled.h) are bfloat16, their widths whole tiles.
TM_API void tm_linear(const tokenmill::Packed* weight, const void* x, int x_type, int x_tiled, int64_t rows,
                      const void* residual, void* y, int y_type, int y_tiled) {
  using namespace tokenmill;
  if (rows == 0 || weight->width() == 0) return;
  const Call call{*weight, rows, x_tiled != 0, residual, y, y_type, {weight->width(), y_tiled != 0}};
  if (x_type == kTypeF32) {
    run<float>(call, static_cast<const float*>(x));
    return;
  }
  if (weight->quantized() && !kMatrixUnit) return run_integers(call, static_cast<const bf16*>(x));
  if constexpr (kDirect) {
    using Direct = std::conditional_t<kDirect, bf16, float>;
    if (weight->format != kF32) return run<Direct>(call, static_cast<const bf16*>(x));
  }
  run<float>(call, static_cast<const bf16*>(x));
}
