// Passes over rows of logits beside the drawing: log-probabilities, penalties, grammar masks.
#include "api.h"
#include "select.h"
#include "threads.h"
#include "vmath.h"

namespace tokenmill {
namespace {

constexpr int64_t kSegment = 16384;

template <class T>
float log_sum_exp(const T* row, int64_t size) {
  const float maximum = row_maximum(row, size);
  if (maximum == -INFINITY) return maximum;
  return maximum + static_cast<float>(std::log(exponential_sum(row, size, maximum)));
}

template <class T>
void row_logprobs(const T* row, int64_t size, int64_t chosen, int64_t top, float* picked, int64_t* ids, float* values) {
  const float normalizer = log_sum_exp(row, size);
  *picked = to_float(row[chosen]) - normalizer;
  if (top == 0) return;
  uint64_t* keys = scratch<uint64_t>(kPanel, size);
  int64_t count = collect(row, size, bound_of_best(row, size, top), keys);
  std::partial_sort(keys, keys + top, keys + count, std::greater<uint64_t>());
  for (int64_t i = 0; i < top; ++i) {
    ids[i] = key_id(keys[i]);
    values[i] = key_value(keys[i]) - normalizer;
  }
}

// Lanes of a bool array that hold, as a comparison's result.
TM_INLINE I flags(const uint8_t* at, int64_t left) {
  I wide = left >= kLanes ? load(reinterpret_cast<const int8_t*>(at))
                          : load_first(reinterpret_cast<const int8_t*>(at), static_cast<int>(left));
  return wide != splat(0);
}

void penalize(float* logits, const int32_t* counts, const uint8_t* prompt_seen, int64_t size, float repetition,
              float presence, float frequency) {
  const F factor = splat(repetition), zero = splat(0.0f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t left = size - i;
    const I count = left >= kLanes ? load(counts + i) : load_first(counts + i, static_cast<int>(left));
    const I generated = count > splat(0);
    F x = load_up_to(logits + i, left);
    F repeated = select(x > zero, x / factor, x * factor);
    x = select(generated | flags(prompt_seen + i, left), repeated, x);
    x = x - splat(frequency) * to_float(count) - select(generated, splat(presence), zero);
    store_up_to(logits + i, x, left);
  }
}

void mask_row(float* logits, const uint32_t* bits, int64_t size) {
  for (int64_t i = 0; i < size; i += 32) {
    const uint32_t word = bits[i / 32];
    if (word == 0xFFFFFFFFu) continue;
    for (int64_t j = i; j < size && j < i + 32; ++j) {
      if (!(word >> (j - i) & 1)) logits[j] = -INFINITY;
    }
  }
}

}  // namespace
}  // namespace tokenmill

// Log-softmax of logits [rows, vocabulary] at chosen [rows]; ids and values [rows, top] of the best.
TM_API void tm_token_logprobs(const void* logits, int type, int64_t rows, int64_t vocabulary, const int64_t* chosen,
                              int64_t top, float* picked, int64_t* ids, float* values) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(rows, [&](int64_t r) {
      row_logprobs(static_cast<const T*>(logits) + r * vocabulary, vocabulary, chosen[r], top, picked + r,
                   ids + r * top, values + r * top);
    });
  });
}

// Row i of logits [rows, vocabulary] by line slots[i] of counts and prompt_seen; a negative slot: none.
TM_API void tm_penalties(float* logits, int64_t rows, int64_t vocabulary, const int64_t* slots,
                         const int32_t* counts, const uint8_t* prompt_seen, const float* repetition,
                         const float* presence, const float* frequency) {
  using namespace tokenmill;
  const int64_t segments = divide_up(vocabulary, kSegment);
  parallel_for(rows * segments, [&](int64_t task) {
    const int64_t row = task / segments, first = task % segments * kSegment;
    if (slots[row] < 0) return;
    const int64_t line = slots[row] * vocabulary + first;
    const int64_t size = vocabulary - first < kSegment ? vocabulary - first : kSegment;
    penalize(logits + row * vocabulary + first, counts + line, prompt_seen + line, size, repetition[row],
             presence[row], frequency[row]);
  });
}

// -inf at logits[rows[i], t] where bit t of bitmask [count, words] is 0.
TM_API void tm_bitmask(float* logits, int64_t vocabulary, const int64_t* rows, int64_t count, const uint32_t* bitmask,
                       int64_t words) {
  using namespace tokenmill;
  parallel_for(count, [&](int64_t i) { mask_row(logits + rows[i] * vocabulary, bitmask + i * words, vocabulary); });
}
