// y = epilogue(x W^T): one kernel for every number of rows.
//
// A task is a run of pairs of packed columns (32 outputs each) times a panel of rows: threads share the columns where
// rows are few, the rows where they are many. For each pair K runs in order, so a row's result is the same bits alone
// and in any batch:
//
//   plain weights            as they lie (PieceTask)
//   coded, quantized         with bfloat16 x on the matrix unit: unpacked to what they stand for in bfloat16, step by
//                            step beside the products of those before, and multiplied as plain weights are, to the
//                            same bits (RingTask, PieceTask). Elsewhere quantized ones in integers (integers.h)
//   quantized, x float32     group by group: the integers are multiplied, and the group's sums meet its scale:
//                            sum += scale[group] * (x . q) + minimum[group] * sum(x over the group)
//
// A row-wide scale (8 bits) meets the whole sum in either case.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "api.h"
#include "coded.h"
#include "fold_task.h"
#include "grouped_task.h"
#include "integers.h"
#include "piece_task.h"
#include "ring_task.h"
#include "single_row.h"
#include "unpack.h"

namespace tokenmill {
namespace {

constexpr int64_t kMaxPanelRows = 512;

// The pairs [begin, end) times rows [first, last).
struct Part {
  int64_t begin, end, first, last;
};

template <class T, class Source>
void by_pieces(const Call& call, const Operand<T>& operand, const Part& part) {
  PieceTask<T, Source>(call, operand, part.first, part.last).run(part.begin, part.end);
}

template <class Steps, class T>
void unpacked(const Call& call, const Operand<T>& operand, const Part& part) {
#if defined(__AMX_BF16__)
  if constexpr (kAmx<T, bf16>) {
    if (part.last - part.first <= kBlock) {
      RingTask<Steps>(call, operand, part.first, part.last).run(part.begin, part.end);
    } else {
      by_pieces<T, Unpacked<Steps>>(call, operand, part);
    }
  } else
#endif
  {
    FoldTask<T, Steps>(call, operand, part.first, part.last).run(part.begin, part.end);
  }
}

#if defined(__AMX_BF16__)
void quantized(const Call& call, const Operand<bf16>& operand, const Part& part) {
  if (call.weight.format == kInt4) return unpacked<ValueSteps<kInt4>>(call, operand, part);
  if (!call.weight.row_wide()) return unpacked<ValueSteps<kInt8>>(call, operand, part);
  if (part.last - part.first > 1) return unpacked<ByteSteps>(call, operand, part);
  single_row_task(call, operand, part.begin, part.end, part.first);
}
#else
void quantized(const Call&, const Operand<bf16>&, const Part&) {}  // without a matrix unit in integers
#endif

void quantized(const Call& call, const Operand<float>& operand, const Part& part) {
  for (int64_t pair = part.begin; pair < part.end; ++pair) {
    GroupedTask<float>(call, operand, pair, part.first, part.last).run();
  }
}

template <class T>
void run_task(const Call& call, const Operand<T>& operand, const Part& part) {
  const Packed& w = call.weight;
  if (w.quantized()) {
    quantized(call, operand, part);
  } else if (w.format == kCoded) {
    unpacked<CodedSteps>(call, operand, part);
  } else if (w.format == kBf16) {
    by_pieces<T, InPlace<bf16>>(call, operand, part);
  } else if constexpr (sizeof(T) == 4) {
    by_pieces<T, InPlace<float>>(call, operand, part);
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
  const auto task_of = [&](int64_t task) {
    const int64_t run = task % count, last = std::min((task / count + 1) * piece, call.rows);
    for (int64_t first = task / count * piece; first < last; first += panel) {
      work(runs[run], runs[run + 1], first, std::min(first + panel, last));
    }
  };
  parallel_for(pieces * count, task_of, many(call.rows) ? Claims::kOwnFirst : Claims::kInOrder);
}

template <class T, class X>
void run(const Call& call, const X* x) {
  const Operand<T> operand = prepare<T>(x, call.x_tiled, call.weight, call.rows);
  const int64_t least = kAmx<T, bf16> ? 256 : 128;  // PieceTask copes with more than fits
  spread(call, operand.layout.width * static_cast<int64_t>(sizeof(T)), least,
         [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
           run_task(call, operand, {begin, end, first, last});
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
