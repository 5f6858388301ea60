// A mixture of experts: which of them a token goes to, their products, and the weighted sum.
//
//   choices             t0: e3 e1     t1: e1 e0          best first
//   rows by expert      e0: t1 | e1: t0 t1 | e3: t0
//   up, down            each one product over all these rows, an expert's weights read once (linear.cpp)
//   out                 residual + weight * row, for a token's rows best first
//
// A row's result and a token's order of summing are its own, so a token is the same bits in any company.
#include "mixture.h"

#include <algorithm>

#include "api.h"
#include "threads.h"
#include "vmath.h"

TM_API void tm_grouped_linear(const tokenmill::Packed* const*, const int64_t*, int64_t, const void*, int,
                              const int32_t*, void*, int);

namespace tokenmill {
namespace {

constexpr int64_t kMostExperts = 1024;
constexpr int64_t kRowsAtOnce = 8192;  // of all experts: what bounds the memory that a long prompt takes

// -------------------------------------------------------------------- choosing

// The best of worth[0 .. n) that isn't taken; equal ones by rising index. There is one.
int64_t best_of(const float* worth, const bool* taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (!taken[i] && (best < 0 || worth[i] > worth[best])) best = i;
  }
  return best;
}

// A group's two best together.
float worth_of_group(const float* worth, int64_t size) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < size; ++i) {
    if (worth[i] > first) {
      second = first;
      first = worth[i];
    } else if (worth[i] > second) {
      second = worth[i];
    }
  }
  return size > 1 ? first + second : first;
}

// Marks as taken all experts outside of the best groups.
void close_groups(const Routing& routing, const float* worth, bool* taken) {
  const int64_t size = routing.experts / routing.groups;
  float worths[kMostExperts];
  bool open[kMostExperts] = {};
  for (int64_t g = 0; g < routing.groups; ++g) worths[g] = worth_of_group(worth + g * size, size);
  for (int64_t rank = 0; rank < routing.top_groups; ++rank) open[best_of(worths, open, routing.groups)] = true;
  for (int64_t i = 0; i < routing.experts; ++i) taken[i] = !open[i / size];
}

void score(const Routing& routing, const float* logits, float* scores) {
  const int64_t n = routing.experts;
  const float highest = *std::max_element(logits, logits + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = routing.sigmoid ? 1 / (1 + std::exp(-logits[i])) : std::exp(logits[i] - highest);
    sum += scores[i];
  }
  if (routing.sigmoid) return;
  for (int64_t i = 0; i < n; ++i) scores[i] /= sum;
}

void choose(const Routing& routing, const float* logits, int32_t* ids, float* weights) {
  float scores[kMostExperts], biased[kMostExperts];
  bool taken[kMostExperts] = {};
  score(routing, logits, scores);
  // Without a bias the logits' own order, in which no two are equal that weren't.
  const float* worth = routing.groups == 1 ? logits : scores;
  if (routing.bias) {
    for (int64_t i = 0; i < routing.experts; ++i) biased[i] = scores[i] + routing.bias[i];
    worth = biased;
  }
  if (routing.groups > 1) close_groups(routing, worth, taken);
  float sum = 0;
  for (int64_t rank = 0; rank < routing.top; ++rank) {
    const int64_t best = best_of(worth, taken, routing.experts);
    taken[best] = true;
    ids[rank] = static_cast<int32_t>(best);
    sum += weights[rank] = scores[best];
  }
  for (int64_t rank = 0; rank < routing.top; ++rank) {
    weights[rank] = (routing.renormalize ? weights[rank] / sum : weights[rank]) * routing.scale;
    if (routing.gains) weights[rank] *= routing.gains[ids[rank]];
  }
}

// -------------------------------------------------------------------- mixing

// The rows of some tokens, sorted by expert.
struct Sorted {
  const Packed** ups;    // of the experts that have rows
  const Packed** downs;
  int64_t* starts;       // where their rows begin, and where the last one's end
  int64_t count;         // of them
  int32_t* tokens;       // of each row
  int32_t* places;       // [tokens][top]: which row, or -1
};

// Words of 8 bytes that sort_rows writes, in whole cache lines.
int64_t sorted_words(const Mixture& mixture, int64_t rows) { return divide_up(3 * mixture.experts + 1 + rows, 8) * 8; }

Sorted sort_rows(const Mixture& mixture, const int32_t* ids, int64_t rows, int64_t top, int64_t* memory) {
  const int64_t n = mixture.experts;
  Sorted sorted{};
  sorted.ups = reinterpret_cast<const Packed**>(memory);
  sorted.downs = sorted.ups + n;
  sorted.starts = memory + 2 * n;
  sorted.tokens = reinterpret_cast<int32_t*>(memory + 3 * n + 1);
  sorted.places = sorted.tokens + rows;
  int64_t next[kMostExperts] = {};  // the row that an expert's next token gets
  for (int64_t i = 0; i < rows; ++i) {
    if (ids[i] >= 0) ++next[ids[i]];
  }
  int64_t total = 0;
  for (int64_t expert = 0; expert < n; ++expert) {
    const int64_t count = next[expert];
    next[expert] = total;
    if (count == 0) continue;
    sorted.ups[sorted.count] = mixture.ups[expert];
    sorted.downs[sorted.count] = mixture.downs[expert];
    sorted.starts[sorted.count++] = total;
    total += count;
  }
  sorted.starts[sorted.count] = total;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = ids[i] < 0 ? -1 : next[ids[i]]++;
    sorted.places[i] = static_cast<int32_t>(row);
    if (row >= 0) sorted.tokens[row] = static_cast<int32_t>(i / top);
  }
  return sorted;
}

// out [tokens][width] = residual + the sum of each token's rows times their weights.
template <class T>
void add_up(const T* rows, const int32_t* places, const float* weights, int64_t tokens, int64_t top, int64_t width,
            const T* residual, T* out) {
  constexpr int64_t kColumns = 512;
  const int64_t pieces = divide_up(width, kColumns);
  parallel_ranges(tokens * pieces, 4, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t token = at / pieces, from = at % pieces * kColumns, to = std::min(from + kColumns, width);
      for (int64_t c = from; c < to; c += kLanes) {
        const int64_t left = to - c;
        F sum = residual ? load_up_to(residual + token * width + c, left) : F{};
        for (int64_t i = token * top; i < (token + 1) * top; ++i) {
          if (places[i] < 0) continue;
          sum = fma(splat(weights[i]), load_up_to(rows + places[i] * width + c, left), sum);
        }
        store_up_to(out + token * width + c, sum, left);
      }
    }
  });
}

template <class T>
void mix(const Mixture& mixture, const T* x, int type, int64_t tokens, const int32_t* ids, const float* weights,
         int64_t top, const T* residual, T* out) {
  const int64_t inner = mixture.ups[0]->width(), width = mixture.downs[0]->width();
  const int64_t rows = tokens * top, words = sorted_words(mixture, rows), bytes = rows * (inner + width) * sizeof(T);
  int64_t* memory = scratch<int64_t>(kExperts, words + divide_up(bytes, 8));
  const Sorted sorted = sort_rows(mixture, ids, rows, top, memory);
  T* hidden = reinterpret_cast<T*>(memory + words);
  T* results = hidden + rows * inner;
  tm_grouped_linear(sorted.ups, sorted.starts, sorted.count, x, type, sorted.tokens, hidden, type);
  tm_grouped_linear(sorted.downs, sorted.starts, sorted.count, hidden, type, nullptr, results, type);
  add_up(results, sorted.places, weights, tokens, top, width, residual, out);
}

}  // namespace
}  // namespace tokenmill

// ids [tokens, top] and weights of each token from its router logits [tokens, experts]; a token whose slot is negative
// gets -1 and 0. `slots` may be null.
TM_API void tm_route(const tokenmill::Routing* routing, const float* logits, const int64_t* slots, int64_t tokens,
                     int32_t* ids, float* weights) {
  using namespace tokenmill;
  const int64_t top = routing->top;
  parallel_ranges(tokens, 16, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      if (slots && slots[t] < 0) {
        std::fill_n(ids + t * top, top, -1);
        std::fill_n(weights + t * top, top, 0.0f);
      } else {
        choose(*routing, logits + t * routing->experts, ids + t * top, weights + t * top);
      }
    }
  });
}

// out [tokens, width] = residual + sum over a token's experts of weight * down(up(x)); x, residual and out of `type`.
// `residual` may be null.
TM_API void tm_mixture(const tokenmill::Mixture* mixture, const void* x, int type, int64_t tokens, const int32_t* ids,
                       const float* weights, int64_t top, const void* residual, void* out) {
  using namespace tokenmill;
  const int64_t in = mixture->ups[0]->in, width = mixture->downs[0]->width();
  const int64_t most = std::max<int64_t>(kRowsAtOnce / top, 1);
  with_type(type, [&](auto t) {
    using T = decltype(t);
    for (int64_t first = 0; first < tokens; first += most) {
      const T* added = residual ? static_cast<const T*>(residual) + first * width : nullptr;
      mix(*mixture, static_cast<const T*>(x) + first * in, type, std::min(most, tokens - first), ids + first * top,
          weights + first * top, top, added, static_cast<T*>(out) + first * width);
    }
  });
}
