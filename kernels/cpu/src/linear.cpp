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
#include "part.h"
#include "unpacked.h"

namespace tokenmill {
namespace {

constexpr int64_t kMaxPanelRows = 512;

template <class T>
void run_task(const Call& call, const Operand<T>& operand, const Part& part) {
  const Packed& w = call.weight;
  if (w.quantized()) {
    multiply_quantized(call, operand, part);
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

// Borders of the runs of pairs that a thread takes at once: long ones first, though none longer than `most`, so that
// the weight streams from memory, then ever shorter ones, so that all threads end together.
std::vector<int64_t> split_pairs(int64_t pairs, int64_t most) {
  std::vector<int64_t> borders{0};
  while (borders.back() < pairs) {
    const int64_t left = pairs - borders.back();
    borders.push_back(borders.back() + std::min(divide_up(left, 2 * thread_count()), most));
  }
  return borders;
}

// How many of `rows` rows, `row_bytes` each, a thread works on at a time: `least` at least, if there are as many.
int64_t panel_rows(int64_t rows, int64_t row_bytes, int64_t least) {
  const int64_t fit = std::min(std::max<int64_t>(kPanelBytes / row_bytes, least), kMaxPanelRows);
  return divide_up(divide_up(rows, divide_up(rows, fit)), kBlock) * kBlock;
}

// work(call, part) for all pairs and rows, spread over the threads.
template <class Work>
void spread(const Call& call, int64_t row_bytes, int64_t least, const Work& work) {
  const int64_t pairs = call.weight.pairs(), panel = panel_rows(call.rows, row_bytes, least);
  const int64_t piece = rows_a_piece(call.rows, panel), pieces = divide_up(call.rows, piece);
  const std::vector<int64_t> runs = many(call.rows) ? std::vector<int64_t>{0, pairs} : split_pairs(pairs, pairs);
  const int64_t count = static_cast<int64_t>(runs.size()) - 1;
  const auto task_of = [&](int64_t task) {
    const int64_t run = task % count, last = std::min((task / count + 1) * piece, call.rows);
    for (int64_t first = task / count * piece; first < last; first += panel) {
      work(call, Part{runs[run], runs[run + 1], first, std::min(first + panel, last)});
    }
  };
  parallel_for(pieces * count, task_of, many(call.rows) ? Claims::kOwnFirst : Claims::kInOrder);
}

// Weights of one shape and format, each for its rows: [starts[i], starts[i + 1]) meet weights[i].
struct Groups {
  const Packed* const* weights;
  const int64_t* starts;
  int64_t count;
  const int32_t* from;  // where in x the rows lie (operand.h)
  const Call& call;     // of all rows, with the first weight
};

// The same over groups: all their pairs are one sequence, of which threads take runs.
template <class Work>
void spread(const Groups& groups, int64_t row_bytes, int64_t least, const Work& work) {
  struct Panel {
    Call call;
    int64_t first, last;
  };
  std::vector<Panel> panels;
  const int64_t pairs = groups.call.weight.pairs();
  for (int64_t i = 0; i < groups.count; ++i) {
    const int64_t end = groups.starts[i + 1], rows = end - groups.starts[i];
    const int64_t panel = rows ? panel_rows(rows, row_bytes, least) : 1;
    const Call& all = groups.call;
    const Call call{*groups.weights[i], all.rows, false, nullptr, all.y, all.y_type, all.layout};
    for (int64_t first = groups.starts[i]; first < end; first += panel) {
      panels.push_back({call, first, std::min(first + panel, end)});
    }
  }
  const int64_t total = static_cast<int64_t>(panels.size()) * pairs;
  const std::vector<int64_t> runs = split_pairs(total, divide_up(total, 8 * thread_count()));
  parallel_for(static_cast<int64_t>(runs.size()) - 1, [&](int64_t task) {
    for (int64_t at = runs[task], end = runs[task + 1]; at < end;) {
      const Panel& panel = panels[static_cast<size_t>(at / pairs)];
      const int64_t begin = at % pairs, count = std::min(pairs - begin, end - at);
      work(panel.call, Part{begin, begin + count, panel.first, panel.last});
      at += count;
    }
  });
}

const Call& call_of(const Call& call) { return call; }
const Call& call_of(const Groups& groups) { return groups.call; }
const int32_t* rows_of(const Call&) { return nullptr; }
const int32_t* rows_of(const Groups& groups) { return groups.from; }

template <class T, class X, class Job>
void run(const Job& job, const X* x) {
  const Call& whole = call_of(job);
  const Operand<T> operand = prepare<T>(x, whole.x_tiled, rows_of(job), whole.weight, whole.rows);
  const int64_t least = kAmx<T, bf16> ? 256 : 128;  // PieceTask copes with more than fits
  spread(job, operand.layout.width * static_cast<int64_t>(sizeof(T)), least,
         [&](const Call& call, const Part& part) { run_task(call, operand, part); });
}

// A quantized weight times bfloat16 rows where there is no matrix unit.
template <class Job>
void run_integers(const Job& job, const bf16* x) {
  const Call& whole = call_of(job);
  const IntegerRows operand = integer_rows(x, rows_of(job), whole.weight, whole.rows);
  spread(job, operand.stride * 2, 128,
         [&](const Call& call, const Part& part) { multiply_integers(call, operand, part); });
}

// A product or a group of them, as x's type and the weight's format want it.
template <class Job>
void run_job(const Job& job, const void* x, int x_type) {
  const Packed& weight = call_of(job).weight;
  if (x_type == kTypeF32) return run<float>(job, static_cast<const float*>(x));
  const bf16* rows = static_cast<const bf16*>(x);
  if (weight.quantized() && !kMatrixUnit) return run_integers(job, rows);
  if constexpr (kDirect) {
    using Direct = std::conditional_t<kDirect, bf16, float>;
    if (weight.format != kF32) return run<Direct>(job, rows);
  }
  run<float>(job, rows);
}

}  // namespace
}  // namespace tokenmill

// y [rows, width] = epilogue(x [rows, in] W^T) + residual, where y and residual have type `y_type`. Tiled x or y
// (tiled.h) are bfloat16, their widths whole tiles.
TM_API void tm_linear(const tokenmill::Packed* weight, const void* x, int x_type, int x_tiled, int64_t rows,
                      const void* residual, void* y, int y_type, int y_tiled) {
  using namespace tokenmill;
  if (rows == 0 || weight->width() == 0) return;
  run_job(Call{*weight, rows, x_tiled != 0, residual, y, y_type, {weight->width(), y_tiled != 0}}, x, x_type);
}

// Rows [starts[i], starts[i + 1]) of y from weights[i], for each i below `count`; y's row r is made of x's row
// from[r], or r without `from`. The weights have one shape, and bfloat16 values or quantized ones throughout.
TM_API void tm_grouped_linear(const tokenmill::Packed* const* weights, const int64_t* starts, int64_t count,
                              const void* x, int x_type, const int32_t* from, void* y, int y_type) {
  using namespace tokenmill;
  if (count == 0 || starts[count] == 0 || weights[0]->width() == 0) return;
  const Call call{*weights[0], starts[count], false, nullptr, y, y_type, {weights[0]->width(), false}};
  run_job(Groups{weights, starts, count, from, call}, x, x_type);
}
