// Twins of kernels/recurrent.py. A state's columns don't know of each other: threads share heads and blocks of columns.
#include "recurrent.h"

#include <algorithm>

#include "api.h"
#include "threads.h"
#include "vmath.h"

namespace tokenmill {
namespace {

constexpr int64_t kChannels = 256;  // of a convolution, that a task takes
constexpr int64_t kColumns = 64;    // of a state, that are gone through together: with 128 keys the nearest cache holds them
constexpr int64_t kGroup = 8;       // tokens that are made ready for a head at once
constexpr int64_t kMaxTaps = 8;
constexpr int64_t kWork = 16384;    // elements for which a task is worth its handing over
constexpr float kNormEps = 1e-6f;

struct Span {
  int64_t first;
  int64_t last;
  bool fresh;  // the sequence begins here
};

Span span(const Sequences& rows, int64_t r) {
  const int64_t first = rows.query_start[r], last = rows.query_start[r + 1];
  return {first, last, rows.seq_lens[r] == last - first};
}

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// Channels c to c + size of one sequence's tokens. What was convolved last is read where it lies: in the state, in x, or
// where the products of two inputs were put.
template <class T>
void convolve(const Conv& job, const Sequences& rows, int64_t r, int64_t c, int64_t size, const T* x, T* state,
              T* out) {
  const Span tokens = span(rows, r);
  if (tokens.first == tokens.last) return;
  const int64_t channels = job.channels, kept = job.taps - 1;
  T* products = scratch<T>(kRows, (job.taps + 1) * kChannels);
  T* zeros = products + job.taps * kChannels;
  std::memset(zeros, 0, kChannels * sizeof(T));
  T* own = state + rows.lines[r] * kept * channels + c;
  const T* past[kMaxTaps];
  for (int64_t k = 0; k < kept; ++k) past[k] = tokens.fresh ? zeros : own + k * channels;
  for (int64_t t = tokens.first; t < tokens.last; ++t) {
    const T* row = x + t * job.width + c;
    const T* now = row;
    if (job.gated) {
      T* product = products + t % job.taps * kChannels;
      for_lanes(size, [&](int64_t i, int64_t n) {
        store_up_to(product + i, load_up_to(row + i, n) * load_up_to(row + 2 * channels + i, n), n);
      });
      now = product;
    }
    for_lanes(size, [&](int64_t i, int64_t n) {
      F sum = job.bias ? load_up_to(job.bias + c + i, n) : F{};
      const float* weight = job.weight + c + i;
      for (int64_t k = 0; k < kept; ++k, weight += channels) {
        sum = fma(load_up_to(past[k] + i, n), load_up_to(weight, n), sum);
      }
      sum = activate<T>(fma(load_up_to(now + i, n), load_up_to(weight, n), sum), job.activation);
      if (job.gated) sum = sum * load_up_to(row + channels + i, n);
      store_up_to(out + t * channels + c + i, sum, n);
    });
    for (int64_t k = 0; k + 1 < kept; ++k) past[k] = past[k + 1];
    past[kept - 1] = now;
  }
  // A row of the state never goes to a later one: none is overwritten before it was read.
  for (int64_t k = 0; k < kept; ++k) std::memmove(own + k * channels, past[k], static_cast<size_t>(size) * sizeof(T));
}

template <class T>
float widen(const T* from, int64_t size, float* to) {
  F squares = {};
  for_lanes(size, [&](int64_t i, int64_t n) {
    const F x = load_up_to(from + i, n);
    squares = fma(x, x, squares);
    store_up_to(to + i, x, n);
  });
  return reduce_add(squares);
}

void scale(float* x, int64_t size, float factor) {
  for_lanes(size, [&](int64_t i, int64_t n) { store_up_to(x + i, load_up_to(x + i, n) * splat(factor), n); });
}

float dot(const float* a, const float* b, int64_t size) {
  F sum = {};
  for_lanes(size, [&](int64_t i, int64_t n) { sum = fma(load_up_to(a + i, n), load_up_to(b + i, n), sum); });
  return reduce_add(sum);
}

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// What a token brings to one head.
struct Token {
  float decay;
  float share;  // of the value that is taken in
  float both;   // query * key
};

template <class T>
Token prepare(const Recurrence& job, const T* row, const float* gate, int64_t h, float* query, float* key) {
  const int64_t size = job.key_size, group = h / (job.heads / job.key_heads);
  const float queries = widen(row + group * size, size, query);
  const float keys = widen(row + (job.key_heads + group) * size, size, key);
  const float step = std::max(softplus(gate[job.gates() - job.heads + h] + job.step_bias[h]), job.least);
  float share = step;
  if (job.delta) {
    scale(query, size, 1.0f / std::sqrt((queries + kNormEps) * static_cast<float>(size)));
    scale(key, size, 1.0f / std::sqrt(keys + kNormEps));
    share = job.strength / (1.0f + std::exp(-gate[h]));
  }
  return {std::exp(job.rate[h] * step), share, dot(query, key, size)};
}

// V vectors of a state's columns from `first` on; `n`: how many of their lanes exist, where the only one isn't whole.
template <int V>
TM_INLINE F column(const float* first, int v, int64_t n) {
  return V == 1 ? load_up_to(first, n) : load(first + v * kLanes);
}

template <int V>
TM_INLINE void put_column(float* first, int v, int64_t n, F x) {
  V == 1 ? store_up_to(first, x, n) : store(first + v * kLanes, x);
}

// One token: reads V vectors of all rows twice and writes them once. Its output comes from what they were and what is
// added.
template <class T, int V>
void take(const Recurrence& job, float* state, int64_t stride, int64_t n, const Token& token, const float* query,
          const float* key, const T* value, float skip, T* out) {
  const int64_t size = job.key_size;
  F held[V] = {}, seen[V] = {}, taken[V];
  for (int64_t i = 0; i < size; ++i) {
    const F k = splat(key[i]), q = splat(query[i]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const F s = column<V>(state + i * stride, v, n);
      held[v] = fma(k, s, held[v]);
      seen[v] = fma(q, s, seen[v]);
    }
  }
  const F decay = splat(token.decay), share = splat(token.share);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const F x = load_up_to(value + v * kLanes, V == 1 ? n : kLanes);
    taken[v] = job.delta ? share * (x - decay * held[v]) : share * x;
    F read = fma(decay, seen[v], splat(token.both) * taken[v]);
    if (job.skip) read = fma(splat(skip), x, read);
    store_up_to(out + v * kLanes, read, V == 1 ? n : kLanes);
  }
  for (int64_t i = 0; i < size; ++i) {
    const F k = splat(key[i]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      put_column<V>(state + i * stride, v, n, fma(k, taken[v], decay * column<V>(state + i * stride, v, n)));
    }
  }
}

// Calls body(V, e, n) for each block of columns: V vectors from e on, of which n lanes exist.
template <class Body>
void for_columns(int64_t values, const Body& body) {
  int64_t e = 0;
  for (; e + kColumns <= values; e += kColumns) body(Vectors<kColumns / kLanes>{}, e, kColumns);
  for (; e < values; e += kLanes) body(Vectors<1>{}, e, std::min<int64_t>(kLanes, values - e));
}

// One head over a sequence's tokens. Many work on a copy in which the rows of a block of columns lie side by side, so
// that the nearest cache holds it; a group of them is made ready at once for all blocks.
template <class T>
void recur_head(const Recurrence& job, const Sequences& rows, int64_t r, int64_t h, const T* x, const float* gates,
                float* state, T* out) {
  const Span tokens = span(rows, r);
  if (tokens.first == tokens.last) return;
  const int64_t keys = job.key_size, values = job.value_size, width = job.width(), outputs = job.heads * values;
  const int64_t pitch = keys + kLanes, room = (values + kLanes) * keys;
  const bool apart = tokens.fresh || tokens.last - tokens.first > 1;
  float* own = state + (rows.lines[r] * job.heads + h) * keys * values;
  float* copy = scratch<float>(kPanel, (apart ? room : 0) + 2 * kGroup * pitch);
  float *query = copy + (apart ? room : 0), *key = query + kGroup * pitch;
  const auto exchange = [&](bool back) {
    for_columns(values, [&](auto count, int64_t e, int64_t n) {
      constexpr int V = decltype(count)::value;
      for (int64_t i = 0; i < keys; ++i) {
        float *far = own + i * values + e, *near = copy + e * keys + i * V * kLanes;
        for (int v = 0; v < V; ++v) {
          if (back) {
            put_column<V>(far, v, n, column<V>(near, v, n));
          } else {
            put_column<V>(near, v, n, tokens.fresh ? F{} : column<V>(far, v, n));
          }
        }
      }
    });
  };
  if (apart) exchange(false);
  for (int64_t first = tokens.first; first < tokens.last; first += kGroup) {
    const int64_t last = std::min(first + kGroup, tokens.last);
    Token ready[kGroup];
    for (int64_t t = first; t < last; ++t) {
      const int64_t g = t - first;
      ready[g] = prepare(job, x + t * width, gates + t * job.gates(), h, query + g * pitch, key + g * pitch);
    }
    for_columns(values, [&](auto count, int64_t e, int64_t n) {
      constexpr int V = decltype(count)::value;
      const int64_t at = h * values + e;
      for (int64_t t = first; t < last; ++t) {
        const int64_t g = t - first;
        take<T, V>(job, apart ? copy + e * keys : own + e, apart ? V * kLanes : values, n, ready[g], query + g * pitch,
                   key + g * pitch, x + t * width + width - outputs + at, job.skip ? job.skip[h] : 0.0f,
                   out + t * outputs + at);
      }
    });
  }
  if (apart) exchange(true);
}

template <class T>
void norm_row(const GatedNorm& job, const T* x, const T* gate, int64_t width, T* out) {
  float* wide = scratch<float>(kRows, job.size + kLanes);
  for (int64_t p = 0; p < width; p += job.size) {
    const float* weight = job.weight + p % job.weights;
    F squares = {};
    for_lanes(job.size, [&](int64_t i, int64_t n) {
      F value = load_up_to(x + p + i, n);
      if (job.gate_first) value = value * activate<T>(load_up_to(gate + p + i, n), kSilu);
      squares = fma(value, value, squares);
      store_up_to(wide + i, value, n);
    });
    const F inverse = splat(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(job.size) + job.eps));
    for_lanes(job.size, [&](int64_t i, int64_t n) {
      F value = load_up_to(wide + i, n) * inverse * load_up_to(weight + i, n);
      if (!job.gate_first) value = value * activate<T>(load_up_to(gate + p + i, n), kSilu);
      store_up_to(out + p + i, value, n);
    });
  }
}

}  // namespace
}  // namespace tokenmill

// out [T, C] of x [T, job.width]; `state` [L, K - 1, C] holds what came before and is written anew.
TM_API void tm_causal_conv(const tokenmill::Conv* job, const tokenmill::Sequences* rows, const void* x, void* state,
                           void* out, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t blocks = (job->channels + kChannels - 1) / kChannels;
    const int64_t tokens = rows->query_start[rows->count] - rows->query_start[0];
    const int64_t grain = std::max<int64_t>(1, kWork * rows->count / (kChannels * std::max<int64_t>(1, tokens)));
    parallel_ranges(rows->count * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece % blocks * kChannels, last = std::min(first + kChannels, job->channels);
        convolve(*job, *rows, piece / blocks, first, last - first, static_cast<const T*>(x), static_cast<T*>(state),
                 static_cast<T*>(out));
      }
    });
  });
}

// out [T, H * E] of x [T, job.width()] under gates [T, job.gates()]; `state` [L, H, D, E] goes on.
TM_API void tm_recur(const tokenmill::Recurrence* job, const tokenmill::Sequences* rows, const void* x,
                     const float* gates, float* state, void* out, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_for(rows->count * job->heads, [&](int64_t piece) {
      recur_head(*job, *rows, piece / job->heads, piece % job->heads, static_cast<const T*>(x), gates, state,
                 static_cast<T*>(out));
    });
  });
}

// out [rows, width] = the norm of x under the last `width` of each gate row's `gate_width` elements.
TM_API void tm_gated_norm(const tokenmill::GatedNorm* job, const void* x, const void* gate, void* out, int64_t rows,
                          int64_t width, int64_t gate_width, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const T* gates = static_cast<const T*>(gate) + gate_width - width;
    parallel_ranges(rows, std::max<int64_t>(1, kWork / (width + 1)), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        norm_row(*job, static_cast<const T*>(x) + r * width, gates + r * gate_width, width,
                 static_cast<T*>(out) + r * width);
      }
    });
  });
}

// out [count] = x * sigmoid(gate).
TM_API void tm_gate_mul(const void* x, const void* gate, void* out, int64_t count, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(count, kWork, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i += kLanes) {
        const F share = sigmoid_for<T>(load_up_to(static_cast<const T*>(gate) + i, last - i));
        store_up_to(static_cast<T*>(out) + i, load_up_to(static_cast<const T*>(x) + i, last - i) * share, last - i);
      }
    });
  });
}
