// The passes between matrix products: norms, rotary embedding with the KV store, gated activations, embedding.
#include "api.h"
#include "cache_layout.h"
#include "rope.h"
#include "threads.h"
#include "tiled.h"
#include "vmath.h"

namespace tokenmill {
namespace {

// Rows a task takes, so that handing it over costs little beside it.
int64_t grain(int64_t row_elements) {
  const int64_t rows = 16384 / (row_elements + 1);
  return rows < 1 ? 1 : rows;
}

// `read(i, n)`: elements i and after, n of which exist.
template <class Read>
float inverse_rms(int64_t size, float eps, const Read& read) {
  F sum[2] = {};  // apart, so that they don't wait for each other
  for_lanes(size, [&](int64_t i, int64_t n) {
    const F x = read(i, n);
    F& mine = sum[i / kLanes % 2];
    mine = fma(x, x, mine);
  });
  return 1.0f / std::sqrt(reduce_add(sum[0] + sum[1]) / static_cast<float>(size) + eps);
}

// Row `row` of normed = x * inverse * (offset + weight), over `size` elements.
template <class T, class W, class X>
void scale_row(const X* x, const W* weight, float inverse, float offset, int64_t size, T* normed, int64_t row = 0,
               bool tiled = false) {
  const Layout layout{size, tiled};
  for_lanes(size, [&](int64_t i, int64_t n) {
    const F factor = splat(offset) + load_up_to(weight + i, n);
    store_up_to(normed + layout.at(row, i), load_up_to(x + i, n) * splat(inverse) * factor, n);
  });
}

template <class T>
void norm_rows(const T* x, const T* residual, const T* weight, T* sum, T* normed, int64_t rows, int64_t size,
               float eps, float offset, bool tiled) {
  parallel_ranges(rows, rows_a_piece(rows, grain(size)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* row = x + r * size;
      if (residual) {
        T* total = sum + r * size;
        for_lanes(size, [&](int64_t i, int64_t n) {
          store_up_to(total + i, load_up_to(residual + r * size + i, n) + load_up_to(row + i, n), n);
        });
        row = total;
      }
      const float inverse = inverse_rms(size, eps, [&](int64_t i, int64_t n) { return load_up_to(row + i, n); });
      scale_row(row, weight, inverse, offset, size, normed, r, tiled);
    }
  });
}

// out = (residual + the norm of x, rounded to T) * scale.
template <class T>
void norm_add_rows(const T* x, const T* weight, const T* residual, T* out, int64_t rows, int64_t size, float eps,
                   float offset, float scale) {
  parallel_ranges(rows, rows_a_piece(rows, grain(size)), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * size;
      const float inverse = inverse_rms(size, eps, [&](int64_t i, int64_t n) { return load_up_to(x + at + i, n); });
      scale_row(x + at, weight, inverse, offset, size, out + at);
      for_lanes(size, [&](int64_t i, int64_t n) {
        const F sum = load_up_to(residual + at + i, n) + load_up_to(out + at + i, n);
        store_up_to(out + at + i, sum * splat(scale), n);
      });
    }
  });
}

template <class T>
void layer_norm_rows(const T* x, const T* weight, const T* bias, T* normed, int64_t rows, int64_t size, float eps) {
  parallel_ranges(rows, grain(size), [&](int64_t first, int64_t last) {
    float* centred = scratch<float>(kRows, size + kLanes);
    for (int64_t r = first; r < last; ++r) {
      F sum = {};
      for (int64_t i = 0; i < size; i += kLanes) sum = sum + load_up_to(x + r * size + i, size - i);
      const F mean = splat(reduce_add(sum) / static_cast<float>(size));
      for (int64_t i = 0; i < size; i += kLanes) {
        store_up_to(centred + i, load_up_to(x + r * size + i, size - i) - mean, size - i);
      }
      const F inverse = splat(inverse_rms(size, eps, [&](int64_t i, int64_t n) { return load_up_to(centred + i, n); }));
      for (int64_t i = 0; i < size; i += kLanes) {
        F value = load_up_to(centred + i, size - i) * inverse * load_up_to(weight + i, size - i);
        if (bias) value = value + load_up_to(bias + i, size - i);
        store_up_to(normed + r * size + i, value, size - i);
      }
    }
  });
}

void rotate_halves(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    F a = load_up_to(x + i, n), b = load_up_to(x + half + i, n);
    F c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
    store_up_to(x + i, fma(a, c, -(b * s)), n);
    store_up_to(x + half + i, fma(b, c, a * s), n);
  }
}

void rotate_neighbours(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

// One head whose halves are whole vectors: no copy in between. The operations of `rotate_halves`.
template <class T>
void turn_whole(const T* from, const float* cos, const float* sin, int64_t half, int64_t size, T* to) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const F a = load(from + i), b = load(from + half + i), c = load(cos + i), s = load(sin + i);
    store(to + i, fma(a, c, -(b * s)));
    store(to + half + i, fma(b, c, a * s));
  }
  if (size > 2 * half) std::memcpy(to + 2 * half, from + 2 * half, static_cast<size_t>(size - 2 * half) * sizeof(T));
}

// One head: widen, norm, turn, round once.
template <class T>
void turn_head(const Rope& job, int64_t token, const T* from, const void* norm, T* to) {
  const int64_t angle = (job.positions ? job.positions[token] : token) * job.half;
  const float *cos = job.cos + angle, *sin = job.sin + angle;
  if (!norm && !job.interleaved && job.half % kLanes == 0) return turn_whole(from, cos, sin, job.half, job.size, to);
  float* x = scratch<float>(kRows, job.size + kLanes);
  for_lanes(job.size, [&](int64_t i, int64_t n) { store(x + i, load_up_to(from + i, n)); });
  if (norm) {
    const float inverse = inverse_rms(job.size, job.eps, [&](int64_t i, int64_t n) { return load_up_to(x + i, n); });
    scale_row(x, static_cast<const T*>(norm), inverse, job.offset, job.size, x);
  }
  if (job.interleaved) {
    rotate_neighbours(x, cos, sin, job.half);
  } else {
    rotate_halves(x, cos, sin, job.half);
  }
  for_lanes(job.size, [&](int64_t i, int64_t n) { store_up_to(to + i, load_up_to(x + i, n), n); });
}

// Puts a token's key and value of one head into the paged cache.
template <class T>
struct Store {
  void* k_cache;
  void* v_cache;
  int64_t kv_heads;
  int64_t block_size;
  int64_t size;
  int64_t value_size;

  void operator()(int64_t slot, int64_t head, const T* key, const T* value) const {
    const int64_t block = (slot / block_size * kv_heads + head) * block_size, place = slot % block_size;
    T* keys = static_cast<T*>(k_cache) + block * size;
    T* values = static_cast<T*>(v_cache) + block * value_size;
    if constexpr (sizeof(T) == 2) {
      if (tiled_cache(kTypeBf16, size, value_size, block_size)) {
        store_tiled_key(keys, place, key, size);
        store_tiled_value(values, place, value, value_size);
        return;
      }
    }
    std::memcpy(keys + place * size, key, static_cast<size_t>(size) * sizeof(T));
    std::memcpy(values + place * value_size, value, static_cast<size_t>(value_size) * sizeof(T));
  }
};

template <class T>
const T* norm_value(const T* value, int64_t size, float eps, T* normed) {
  const F scale = splat(inverse_rms(size, eps, [&](int64_t i, int64_t n) { return load_up_to(value + i, n); }));
  for_lanes(size, [&](int64_t i, int64_t n) { store_up_to(normed + i, load_up_to(value + i, n) * scale, n); });
  return normed;
}

template <class T>
void rope_token(const Rope& job, int64_t token) {
  const T* row = static_cast<const T*>(job.qkv) + token * job.width();
  T* query = static_cast<T*>(job.query) + token * job.heads * job.size;
  for (int64_t h = 0; h < job.heads; ++h) {
    turn_head(job, token, row + h * job.size, job.q_norm, query + h * job.size);
  }
  if (job.kv_heads == 0) return;
  const int64_t slot = job.slots[token];
  if (slot < 0) return;
  const T* key = row + job.heads * job.size;
  const T* value = key + job.kv_heads * job.size;
  const Store<T> store{job.k_cache, job.v_cache, job.kv_heads, job.block_size, job.size, job.value_size};
  T* turned = scratch<T>(kPartial, job.size + job.value_size + 2 * kLanes);
  T* normed = turned + job.size + kLanes;
  for (int64_t g = 0; g < job.kv_heads; ++g) {
    turn_head(job, token, key + g * job.size, job.k_norm, turned);
    const T* own = value + g * job.value_size;
    if (job.value_norm) own = norm_value(own, job.value_size, job.eps, normed);
    store(slot, g, turned, own);
  }
}

template <class T>
void gate_rows(const T* gate_up, T* out, int64_t rows, int64_t width, int activation) {
  parallel_ranges(rows, grain(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const T* gate = gate_up + r * 2 * width;
      for (int64_t i = 0; i < width; i += kLanes) {
        const F x = load_up_to(gate + i, width - i), up = load_up_to(gate + width + i, width - i);
        store_up_to(out + r * width + i, gated<T>(x, up, activation), width - i);
      }
    }
  });
}

}  // namespace
}  // namespace tokenmill

// normed [rows, size] = RMS norm of x, or of residual + x, which is then also written to `sum`. `tiled`: tiled.h.
TM_API void tm_rms_norm(const void* x, const void* residual, const void* weight, void* sum, void* normed,
                        int64_t rows, int64_t size, float eps, float offset, int type, int tiled) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    norm_rows(static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const T*>(weight),
              static_cast<T*>(sum), static_cast<T*>(normed), rows, size, eps, offset, tiled != 0);
  });
}

// out [rows, size] = (residual + RMS norm of x) * scale.
TM_API void tm_norm_add(const void* x, const void* weight, const void* residual, void* out, int64_t rows, int64_t size,
                        float eps, float offset, float scale, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    norm_add_rows(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(residual),
                  static_cast<T*>(out), rows, size, eps, offset, scale);
  });
}

// normed [rows, size] = layer norm of x; `bias` may be null.
TM_API void tm_layer_norm(const void* x, const void* weight, const void* bias, void* normed, int64_t rows,
                          int64_t size, float eps, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    layer_norm_rows(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                    static_cast<T*>(normed), rows, size, eps);
  });
}

// Rows [q | k | v] of `width` with an RMS norm over the first `query` elements, another over the `key` ones after them.
TM_API void tm_norm_whole(const void* x, const void* q_weight, const void* k_weight, void* out, int64_t rows,
                          int64_t width, int64_t query, int64_t key, float eps, float offset, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto norm = [&](const T* from, const void* weight, int64_t size, T* to) {
      const float inverse = inverse_rms(size, eps, [&](int64_t i, int64_t n) { return load_up_to(from + i, n); });
      scale_row(from, static_cast<const T*>(weight), inverse, offset, size, to);
    };
    parallel_ranges(rows, grain(width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T* from = static_cast<const T*>(x) + r * width;
        T* to = static_cast<T*>(out) + r * width;
        norm(from, q_weight, query, to);
        norm(from + query, k_weight, key, to + query);
        std::memcpy(to + query + key, from + query + key, static_cast<size_t>(width - query - key) * sizeof(T));
      }
    });
  });
}

TM_API void tm_rope_store(const tokenmill::Rope* job) {
  using namespace tokenmill;
  parallel_ranges(job->tokens, rows_a_piece(job->tokens, grain(job->width())), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      with_type(job->type, [&](auto element) { rope_token<decltype(element)>(*job, t); });
    }
  });
}

// Keys [tokens, kv_heads, size] and values [tokens, kv_heads, value_size] to the cache's `slots`; negative: nowhere.
TM_API void tm_store_kv(const void* key, const void* value, const int64_t* slots, void* k_cache, void* v_cache,
                        int64_t tokens, int64_t kv_heads, int64_t block_size, int64_t size, int64_t value_size,
                        int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    const Store<T> store{k_cache, v_cache, kv_heads, block_size, size, value_size};
    parallel_ranges(tokens, grain(kv_heads * (size + value_size)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        if (slots[t] < 0) continue;
        for (int64_t g = 0; g < kv_heads; ++g) {
          const int64_t at = t * kv_heads + g;
          store(slots[t], g, static_cast<const T*>(key) + at * size, static_cast<const T*>(value) + at * value_size);
        }
      }
    });
  });
}

// out [rows, width] = act(gate) * up over gate_up [rows, 2 * width].
TM_API void tm_activation_mul(const void* gate_up, void* out, int64_t rows, int64_t width, int activation, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    gate_rows(static_cast<const T*>(gate_up), static_cast<T*>(out), rows, width, activation);
  });
}

// out [rows, width] = act(x) * columns `start` and after of other [rows, other_width].
TM_API void tm_act_mul(const void* x, const void* other, void* out, int64_t rows, int64_t width, int64_t start,
                       int64_t other_width, int activation, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(rows, grain(width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const T* row = static_cast<const T*>(x) + r * width;
        const T* factors = static_cast<const T*>(other) + r * other_width + start;
        for (int64_t i = 0; i < width; i += kLanes) {
          const F value = activate<T>(load_up_to(row + i, width - i), activation);
          store_up_to(static_cast<T*>(out) + r * width + i, value * load_up_to(factors + i, width - i), width - i);
        }
      }
    });
  });
}

// out [rows, width] = x * sigmoid(gate [rows]), plus residual, where given.
TM_API void tm_gate_add(const void* x, const void* gate, const void* residual, void* out, int64_t rows, int64_t width,
                        int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(rows, grain(width), [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const F share = sigmoid(splat(to_float(static_cast<const T*>(gate)[r])));
        for (int64_t i = r * width; i < (r + 1) * width; i += kLanes) {
          const int64_t left = (r + 1) * width - i;
          F value = load_up_to(static_cast<const T*>(x) + i, left) * share;
          if (residual) value = value + load_up_to(static_cast<const T*>(residual) + i, left);
          store_up_to(static_cast<T*>(out) + i, value, left);
        }
      }
    });
  });
}

// out [count] = act(x [count]).
TM_API void tm_activate(const void* x, void* out, int64_t count, int activation, int type) {
  using namespace tokenmill;
  with_type(type, [&](auto element) {
    using T = decltype(element);
    parallel_ranges(count, grain(1), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i += kLanes) {
        F value = load_up_to(static_cast<const T*>(x) + i, last - i);
        store_up_to(static_cast<T*>(out) + i, activate<T>(value, activation), last - i);
      }
    });
  });
}

// out [count, row_bytes] = rows `ids` of table, whole bytes.
TM_API void tm_gather_rows(const char* table, const int64_t* ids, char* out, int64_t count, int64_t row_bytes) {
  using namespace tokenmill;
  parallel_ranges(count, grain(row_bytes / 4), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) std::memcpy(out + i * row_bytes, table + ids[i] * row_bytes, row_bytes);
  });
}
