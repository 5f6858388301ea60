// From logits to token ids: Gumbel-max with noise that is a hash of (seed, position, token id).
//
// Greedy rows and rows without filters are one pass, cut in segments so that a single row uses all threads.
// A filtered row is narrowed to candidates (select.h), and only those are weighed and drawn from.
#include <vector>

#include "api.h"
#include "packed.h"
#include "select.h"
#include "threads.h"

namespace tokenmill {
namespace {

constexpr int64_t kSegment = 16384;
constexpr float kGreedyBelow = 1e-5f;

struct Sampling {
  const void* logits;  // [rows, vocabulary]
  const float* temperature;
  const float* min_p;
  const int64_t* top_k;
  const float* top_p;
  const int64_t* seeds;
  const int64_t* positions;
  int64_t* chosen;     // [rows]
  uint8_t* flags;      // [rows]: 1 where a row has a NaN, or no finite largest logit
  int64_t rows;
  int64_t vocabulary;
  int32_t type;

  bool greedy(int64_t row) const { return temperature[row] < kGreedyBelow; }
  bool filtered(int64_t row) const {
    return !greedy(row) && (min_p[row] > 0 || top_k[row] > 0 || top_p[row] < 1);
  }
};

struct Best {
  float value;
  int64_t id;
  bool nan = false;  // one was seen
};

TM_INLINE U mix32(U x) {
  x = x ^ (x >> 16);
  x = x * splat(0x7FEB352Du);
  x = x ^ (x >> 15);
  x = x * splat(0x846CA68Bu);
  return x ^ (x >> 16);
}

// splitmix64 of a row's seed and position (kernels/reference.py, noise_keys).
uint64_t noise_key(int64_t seed, int64_t position) {
  uint64_t z = static_cast<uint64_t>(seed) + (static_cast<uint64_t>(position) + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

TM_INLINE U hash_tokens(uint64_t key, I tokens) {
  const U low = splat(static_cast<uint32_t>(key)), high = splat(static_cast<uint32_t>(key >> 32));
  return mix32(mix32(bits_of<NativeU>(tokens) ^ low) + high);
}

TM_INLINE F gumbel(U hashed) {
  const I upper = bits_of<NativeI>(hashed) < splat(0);
  const U part = select(upper, splat(0xFFFFFFFFu) - hashed, hashed);
  const F v = (to_float(bits_of<NativeI>(part)) + splat(0.5f)) * splat(2.3283064365386963e-10f);
  const F exponential = select(upper, -log(v), -log1p(-v));
  return -log(exponential);
}

// The running best of each lane; ids rise, so only a strictly larger value replaces it.
struct LaneBest {
  F value = splat(-INFINITY);
  I id = splat(INT32_MAX);
  I nan = splat(0);

  TM_INLINE void watch(F logit) { nan = nan | (logit != logit); }

  TM_INLINE void offer(F candidate, I ids) {
    I better = candidate > value;
    value = select(better, candidate, value);
    id = select(better, ids, id);
  }

  Best result() const {
    float values[kLanes];
    int32_t ids[kLanes];
    store(values, value);
    std::memcpy(ids, &id, sizeof ids);
    Best best{values[0], ids[0], mask_bits(nan) != 0};
    for (int i = 1; i < kLanes; ++i) {
      if (values[i] < best.value || (values[i] == best.value && ids[i] >= best.id)) continue;
      best.value = values[i];
      best.id = ids[i];
    }
    return best;
  }
};

// Lanes whose noise may lift them to `best`. Noise reaches a gap g only where the hash, as a fraction v, is at most
// exp(-g) (since -log(1 - v) >= v); that power is taken from above by filling a float's bits, and `room` covers
// the rounding of `scaled`.
TM_INLINE I may_win(U hashed, F scaled, F best, F room) {
  const F gap = (scaled - best) + fma(max(scaled, -scaled), room, room);
  const F power = max(splat(-126.0f), min(splat(30.0f), gap * splat(kLog2E)));
  const F filled = fma(power, splat(8388608.0f), splat(127.0f * 8388608.0f));
  const F limit = bits_of<NativeF>(to_int(filled));
  const F v = to_float(bits_of<NativeI>(hashed >> 1)) * splat(4.656612873077393e-10f);
  return v <= limit;
}

// Gumbel-max over part of a row; the noise is worked out only for tokens that may win.
template <class T>
Best drawn_best(const Sampling& job, int64_t row, int64_t first, int64_t last) {
  const T* logits = static_cast<const T*>(job.logits) + row * job.vocabulary;
  const uint64_t key = noise_key(job.seeds[row], job.positions[row]);
  const F temperature = splat(job.temperature[row]), inverse = splat(1.0f / job.temperature[row]);
  const F room = splat(1e-6f);
  LaneBest best;
  F highest = splat(-INFINITY);
  for (int64_t i = first; i < last; i += kLanes) {
    const I ids = lane_index() + splat(static_cast<int32_t>(i));
    const F logit = load_logits(logits + i, last - i);
    best.watch(logit);
    const U hashed = hash_tokens(key, ids);
    if (mask_bits(may_win(hashed, logit * inverse, highest, room)) == 0) continue;
    best.offer(logit / temperature + gumbel(hashed), ids);
    highest = splat(reduce_max(best.value));
  }
  return best.result();
}

template <class T>
Best segment_best(const Sampling& job, int64_t row, int64_t first, int64_t last) {
  const T* logits = static_cast<const T*>(job.logits) + row * job.vocabulary;
  if (!job.greedy(row)) return drawn_best<T>(job, row, first, last);
  LaneBest best;
  for (int64_t i = first; i < last; i += kLanes) {
    const F logit = load_logits(logits + i, last - i);
    best.watch(logit);
    best.offer(logit, lane_index() + splat(static_cast<int32_t>(i)));
  }
  return best.result();
}

// The shortest prefix of the ordered candidates whose probability reaches top_p, moved to the front; returns
// its length. Probabilities are float32 and their running sum is rounded to it, as in the reference.
class Nucleus {
 public:
  Nucleus(uint64_t* keys, int64_t count, float maximum, double total, float top_p)
      : keys_(keys), count_(count), maximum_(maximum), total_(static_cast<float>(total)), top_p_(top_p) {}

  int64_t cut() {
    int64_t low = 0, high = count_;
    double before = 0;
    while (high - low > 512) {
      const int64_t middle = low + (high - low) / 8;
      std::nth_element(keys_ + low, keys_ + middle, keys_ + high, std::greater<uint64_t>());
      double mass = before;
      for (int64_t i = low; i < middle; ++i) mass += probability(keys_[i]);
      if (mass >= top_p_ + kMargin) {
        high = middle;
      } else if (mass < top_p_ - kMargin) {
        low = middle;
        before = mass;
      } else {
        break;  // too close to tell by sums in another order
      }
    }
    std::sort(keys_ + low, keys_ + high, std::greater<uint64_t>());
    for (int64_t i = low; i < high; ++i) {
      const float own = probability(keys_[i]);
      before += own;
      if (i > 0 && static_cast<float>(before) - own >= top_p_) return i;
    }
    return high;
  }

 private:
  static constexpr double kMargin = 1e-6;

  float probability(uint64_t key) const {
    float lane[kLanes];
    store(lane, exp(splat(key_value(key) - maximum_)));
    return lane[0] / total_;
  }

  uint64_t* keys_;
  int64_t count_;
  float maximum_;
  float total_;
  float top_p_;
};

// Candidates of a filtered row at the front of `keys`; `scaled` [vocabulary] is overwritten, `best` is shown all logits.
template <class T>
int64_t candidates(const Sampling& job, int64_t row, float* scaled, uint64_t* keys, LaneBest& best) {
  const int64_t size = job.vocabulary;
  const T* logits = static_cast<const T*>(job.logits) + row * size;
  const F temperature = splat(job.temperature[row]);
  for (int64_t i = 0; i < size; i += kLanes) {
    const F logit = load_logits(logits + i, size - i);
    best.watch(logit);
    store_up_to(scaled + i, logit / temperature, size - i);
  }
  const float maximum = row_maximum(scaled, size), top_p = job.top_p[row];
  const int64_t top_k = job.top_k[row];
  float bound = maximum + std::log(job.min_p[row]);
  const bool limited = top_k > 0 && top_k < size;
  if (limited) bound = std::max(bound, bound_of_best(scaled, size, top_k));
  double total = 0;
  if (!limited && top_p < 0.9999f && !(job.min_p[row] > 0)) {
    // What lies this far below the maximum weighs less than a third of what the nucleus leaves out.
    total = exponential_sum(scaled, size, maximum);
    bound = std::max(bound, maximum - std::log(static_cast<float>(size) / (1.0f - top_p)) - 1.0f);
  }
  int64_t count = collect(scaled, size, bound, keys);
  if (limited) count = keep_best(keys, count, top_k);
  if (!(top_p < 1)) return count;
  if (total == 0) {
    for (int64_t i = 0; i < count; ++i) scaled[i] = key_value(keys[i]);
    total = exponential_sum(scaled, count, maximum);
  }
  return Nucleus(keys, count, maximum, total, top_p).cut();
}

template <class T>
Best filtered_best(const Sampling& job, int64_t row) {
  float* scaled = scratch<float>(kAccumulator, job.vocabulary + kLanes);
  uint64_t* keys = scratch<uint64_t>(kPanel, job.vocabulary + kLanes);
  LaneBest best;
  const int64_t count = candidates<T>(job, row, scaled, keys, best);
  std::sort(keys, keys + count, [](uint64_t a, uint64_t b) { return key_id(a) < key_id(b); });
  const uint64_t key = noise_key(job.seeds[row], job.positions[row]);
  for (int64_t i = 0; i < count; i += kLanes) {
    float values[kLanes];
    int32_t ids[kLanes] = {};
    for (int j = 0; j < kLanes; ++j) {
      values[j] = i + j < count ? key_value(keys[i + j]) : -INFINITY;
      if (i + j < count) ids[j] = key_id(keys[i + j]);
    }
    best.offer(load(values) + gumbel(hash_tokens(key, load(ids))), load(ids));
  }
  return best.result();
}

}  // namespace

template <class T>
void sample_rows(const Sampling& job) {
  struct Piece {
    int64_t row, first, last;
  };
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < job.rows; ++row) {
    const int64_t step = job.filtered(row) ? job.vocabulary : kSegment;
    for (int64_t i = 0; i < job.vocabulary; i += step) pieces.push_back({row, i, std::min(i + step, job.vocabulary)});
  }
  std::vector<Best> found(pieces.size());
  parallel_for(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    const Piece& piece = pieces[i];
    found[i] = job.filtered(piece.row) ? filtered_best<T>(job, piece.row)
                                       : segment_best<T>(job, piece.row, piece.first, piece.last);
  });
  std::vector<float> best(job.rows, -INFINITY);
  std::fill(job.chosen, job.chosen + job.rows, 0);
  std::fill(job.flags, job.flags + job.rows, 0);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t row = pieces[i].row;
    if (found[i].nan) job.flags[row] = 1;
    if (found[i].value > best[row]) {
      best[row] = found[i].value;
      job.chosen[row] = found[i].id;
    }
  }
  for (int64_t row = 0; row < job.rows; ++row) {
    if (!std::isfinite(best[row])) job.flags[row] = 1;
  }
}

}  // namespace tokenmill

TM_API void tm_sample(const tokenmill::Sampling* job) {
  using namespace tokenmill;
  with_type(job->type, [&](auto element) { sample_rows<decltype(element)>(*job); });
}

// noise [rows, count] float32 of tokens [count], for tests of the hash and its tails.
TM_API void tm_gumbel(const int64_t* seeds, const int64_t* positions, int64_t rows, const int64_t* tokens,
                      int64_t count, float* noise) {
  using namespace tokenmill;
  parallel_for(rows, [&](int64_t row) {
    for (int64_t i = 0; i < count; i += kLanes) {
      int32_t ids[kLanes] = {};
      for (int j = 0; j < kLanes && i + j < count; ++j) ids[j] = static_cast<int32_t>(tokens[i + j]);
      store_up_to(noise + row * count + i, gumbel(hash_tokens(noise_key(seeds[row], positions[row]), load(ids))), count - i);
    }
  });
}
