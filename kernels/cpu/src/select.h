// Finding the best of a row of logits without sorting it.
//
// A candidate is one 64-bit key, ordered(value) << 32 | ~id: falling keys are falling values, equal values by
// rising id. A row is first narrowed by a bound that at least k values reach (the k-th largest of the maxima of
// disjoint groups), which leaves little more than k candidates; only those are ordered.
#pragma once

#include <algorithm>
#include <functional>

#include "packed.h"
#include "threads.h"
#include "vmath.h"

namespace tokenmill {

inline uint64_t candidate_key(float value, int32_t id) {
  uint32_t bits;
  value += 0.0f;  // -0 and 0 are equal
  std::memcpy(&bits, &value, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(id));
}

inline float key_value(uint64_t key) {
  uint32_t bits = static_cast<uint32_t>(key >> 32);
  bits = bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int32_t key_id(uint64_t key) { return static_cast<int32_t>(0xFFFFFFFFu - static_cast<uint32_t>(key)); }

// Lanes past `left` read as -inf.
template <class T>
TM_INLINE F load_logits(const T* at, int64_t left) {
  if (left >= kLanes) return load(at);
  return select(lane_index() < splat(static_cast<int32_t>(left)), load_first(at, static_cast<int>(left)),
                splat(-INFINITY));
}

template <class T>
float row_maximum(const T* row, int64_t size) {
  F best = splat(-INFINITY);
  for (int64_t i = 0; i < size; i += kLanes) best = max(load_logits(row + i, size - i), best);
  return reduce_max(best);
}

// Sum of exp(value - maximum) over a row, in pieces of fixed size so that float32 sums stay short.
template <class T>
double exponential_sum(const T* row, int64_t size, float maximum) {
  double total = 0;
  for (int64_t start = 0; start < size; start += 4096) {
    F sum = {};
    const int64_t end = std::min(size, start + 4096);
    for (int64_t i = start; i < end; i += kLanes) sum = sum + exp(load_logits(row + i, end - i) - splat(maximum));
    total += reduce_add(sum);
  }
  return total;
}

// A value that at least k of the row's reach; -inf where groups would be too few to tell.
template <class T>
float bound_of_best(const T* row, int64_t size, int64_t k) {
  const int64_t groups = divide_up(std::max<int64_t>(8 * k, 512), kLanes) * kLanes;
  if (2 * groups > size) return -INFINITY;
  float* maxima = scratch<float>(kPartial, groups);
  const int64_t run = divide_up(divide_up(size, kLanes), groups / kLanes);  // vectors that share 16 groups
  for (int64_t g = 0; g < groups / kLanes; ++g) {
    F best = splat(-INFINITY);
    const int64_t last = std::min(size, (g + 1) * run * kLanes);
    for (int64_t i = g * run * kLanes; i < last; i += kLanes) best = max(load_logits(row + i, size - i), best);
    store(maxima + g * kLanes, best);
  }
  std::nth_element(maxima, maxima + k - 1, maxima + groups, std::greater<float>());
  return maxima[k - 1];
}

// Keys of all values at or above `bound`, by rising id; returns how many.
template <class T>
int64_t collect(const T* row, int64_t size, float bound, uint64_t* keys) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += kLanes) {
    F value = load_logits(row + i, size - i);
    uint32_t hits = mask_bits(value >= splat(bound));
    if (size - i < kLanes) hits &= (1u << (size - i)) - 1;
    if (hits == 0) continue;
    float lane[kLanes];
    store(lane, value);
    for (; hits != 0; hits &= hits - 1) {
      const int bit = __builtin_ctz(hits);
      keys[count++] = candidate_key(lane[bit], static_cast<int32_t>(i + bit));
    }
  }
  return count;
}

// The k best keys to the front, in no order; returns how many there are.
inline int64_t keep_best(uint64_t* keys, int64_t count, int64_t k) {
  if (count <= k) return count;
  std::nth_element(keys, keys + k, keys + count, std::greater<uint64_t>());
  return k;
}

}  // namespace tokenmill
