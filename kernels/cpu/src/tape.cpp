// A whole step's kernels in one call: the list of operations is made once, the step brings sizes and addresses.
//
//   tape   op op op op …          made at load: what to run, on which weights, from which buffer into which
//   step   tokens, tables, buffers   this step's
//
// It runs the very functions that are called one by one otherwise, so the results are the same bits.
#include <chrono>

#include "api.h"
#include "attention.h"
#include "mixture.h"
#include "packed.h"
#include "recurrent.h"
#include "rope.h"
#include "threads.h"
#include "tiled.h"

namespace tokenmill {
namespace {

constexpr int kBuffers = 8;

enum Kind : int32_t {
  kRows,       // output = rows `ids` of a packed weight
  kGather,     // output = rows `ids` of a plain table
  kPick,       // output = rows `logits_index` of input
  kLinear,     // output = input W^T (+ residual)
  kRmsNorm,
  kLayerNorm,
  kRopeStore,  // output = queries; keys and values go to the cache
  kAttend,
  kActivate,   // output = act(input), element by element
  kScaleAdd,   // output = scale * input (+ residual)
  kJoin,       // output = [input | residual], row by row
  kGate,       // output = act(gate) * up of rows [gate | up]
  kGateAdd,    // output = input * sigmoid(other) (+ residual)
  kNormWhole,  // output = [q | k | v] with norms over q and over k
  kMixture,    // output = experts of input, chosen by the router logits `other` (+ residual)
  kConv,       // output = convolution of input; `second` is the layer's state
  kRecur,      // output = what the states bring for input under the gates `other`; `second` is the state
  kGatedNorm,  // output = norm of input under the last columns of `other`
  kGateMul,    // output = input * sigmoid(other)
  kNormAdd,    // output = (residual + norm of input) * scale; norms are over `left` elements each
  kActMul,     // output = act(input) * columns `left` and after of other, whose rows have `middle`
};

// tape.py fills in the same structure. `job` is the operation's own: a Packed, a Rope, an Attention, a Mixture, one of
// recurrent.h, or a weight.
struct Op {
  int32_t kind;
  int32_t input;     // buffers by number; -1: none
  int32_t residual;  // kJoin: the right part
  int32_t other;
  int32_t output;
  int32_t picked;    // runs on the picked rows, not on all tokens
  int32_t activation;
  int32_t input_tiled;  // kLinear: where rows are many, input lies as tiled.h says
  int32_t tiled;        // kLinear, kRmsNorm, kAttend: the same of output
  int32_t wide;         // kLinear: output is float32 in any case
  float eps;
  float factor;      // norms: what is added to the weight; kScaleAdd: the scale
  float scale;       // kNormAdd
  int64_t size;      // elements of a row of output
  int64_t left;      // kJoin: elements of a row of input; kNormWhole: of q; kGatedNorm: of other
  int64_t middle;    // kNormWhole: elements of k
  const void* job;
  const void* second;  // kLayerNorm: the bias; kNormWhole: the weight of k; kMixture: the Routing
};

struct Step {
  int64_t tokens;
  int64_t sequences;
  int64_t table_width;
  int64_t picked;
  const int64_t* ids;
  const int64_t* positions;
  const int64_t* slots;
  const int64_t* logits_index;
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* query_start;
  const int64_t* lines;  // whose states the sequences continue
  const int64_t* picked_positions;  // the picked rows as sequences of one query each, where some layers run on them
  const int32_t* picked_table;
  const int32_t* picked_lens;
  const int32_t* picked_start;
  void* buffers[kBuffers];
  int32_t type;
};

template <class T>
void scale_add(const T* x, const T* residual, T* out, int64_t count, float scale) {
  parallel_ranges(count, 16384, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += kLanes) {
      F value = load_up_to(x + i, last - i) * splat(scale);
      if (residual) value = value + load_up_to(residual + i, last - i);
      store_up_to(out + i, value, last - i);
    }
  });
}

void join(const char* left, const char* right, char* out, int64_t rows, int64_t left_bytes, int64_t bytes) {
  for (int64_t r = 0; r < rows; ++r, out += bytes) {
    std::memcpy(out, left + r * left_bytes, static_cast<size_t>(left_bytes));
    std::memcpy(out + left_bytes, right + r * (bytes - left_bytes), static_cast<size_t>(bytes - left_bytes));
  }
}

}  // namespace
}  // namespace tokenmill

TM_API void tm_rows(const tokenmill::Packed*, const int64_t*, int64_t, void*, int);
TM_API void tm_gather_rows(const char*, const int64_t*, char*, int64_t, int64_t);
TM_API void tm_linear(const tokenmill::Packed*, const void*, int, int, int64_t, const void*, void*, int, int);
TM_API void tm_rms_norm(const void*, const void*, const void*, void*, void*, int64_t, int64_t, float, float, int,
                        int);
TM_API void tm_norm_add(const void*, const void*, const void*, void*, int64_t, int64_t, float, float, float, int);
TM_API void tm_act_mul(const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int, int);
TM_API void tm_layer_norm(const void*, const void*, const void*, void*, int64_t, int64_t, float, int);
TM_API void tm_norm_whole(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, float,
                          float, int);
TM_API void tm_rope_store(const tokenmill::Rope*);
TM_API void tm_attention(const tokenmill::Attention*);
TM_API void tm_activation_mul(const void*, void*, int64_t, int64_t, int, int);
TM_API void tm_activate(const void*, void*, int64_t, int, int);
TM_API void tm_gate_add(const void*, const void*, const void*, void*, int64_t, int64_t, int);
TM_API void tm_route(const tokenmill::Routing*, const float*, const int64_t*, int64_t, int32_t*, float*);
TM_API void tm_mixture(const tokenmill::Mixture*, const void*, int, int64_t, const int32_t*, const float*, int64_t,
                       const void*, void*);
TM_API void tm_causal_conv(const tokenmill::Conv*, const tokenmill::Sequences*, const void*, void*, void*, int);
TM_API void tm_recur(const tokenmill::Recurrence*, const tokenmill::Sequences*, const void*, const float*, float*,
                     void*, int);
TM_API void tm_gated_norm(const tokenmill::GatedNorm*, const void*, const void*, void*, int64_t, int64_t, int64_t, int);
TM_API void tm_gate_mul(const void*, const void*, void*, int64_t, int);

namespace tokenmill {
namespace {

void rope(const Op& op, const Step& step, const void* in, void* out) {
  Rope job = *static_cast<const Rope*>(op.job);
  job.qkv = in;
  job.query = out;
  job.positions = op.picked ? step.picked_positions : step.positions;
  job.slots = step.slots;
  job.tokens = op.picked ? step.picked : step.tokens;
  tm_rope_store(&job);
}

void attend(const Op& op, const Step& step, const void* in, void* out, bool tiled) {
  Attention job = *static_cast<const Attention*>(op.job);
  job.query = in;
  job.out = out;
  job.block_table = op.picked ? step.picked_table : step.block_table;
  job.seq_lens = op.picked ? step.picked_lens : step.seq_lens;
  job.query_start = op.picked ? step.picked_start : step.query_start;
  job.sequences = op.picked ? step.picked : step.sequences;
  job.table_width = step.table_width;
  job.tiled = tiled;
  tm_attention(&job);
}

void mix(const Op& op, const Step& step, const void* in, const void* logits, const void* residual, void* out) {
  const Routing& routing = *static_cast<const Routing*>(op.second);
  const int64_t count = step.tokens * routing.top;
  int32_t* ids = scratch<int32_t>(kChoice, 2 * count);
  float* weights = reinterpret_cast<float*>(ids + count);
  tm_route(&routing, static_cast<const float*>(logits), step.slots, step.tokens, ids, weights);
  tm_mixture(static_cast<const Mixture*>(op.job), in, step.type, step.tokens, ids, weights, routing.top, residual, out);
}

void run(const Op& op, const Step& step) {
  const int64_t rows = op.picked ? step.picked : step.tokens;
  const int element = step.type == kTypeBf16 ? 2 : 4;
  const void* in = op.input < 0 ? nullptr : step.buffers[op.input];
  const void* residual = op.residual < 0 ? nullptr : step.buffers[op.residual];
  const void* other = op.other < 0 ? nullptr : step.buffers[op.other];
  void* out = step.buffers[op.output];
  const Sequences sequences{step.lines, step.seq_lens, step.query_start, step.sequences};
  const bool tiles = step.type == kTypeBf16 && tiles_rows(rows), tiled = tiles && op.tiled;
  switch (op.kind) {
    case kRows:
      return tm_rows(static_cast<const Packed*>(op.job), step.ids, rows, out, step.type);
    case kGather:
      return tm_gather_rows(static_cast<const char*>(op.job), step.ids, static_cast<char*>(out), rows, op.size * element);
    case kPick:
      return tm_gather_rows(static_cast<const char*>(in), step.logits_index, static_cast<char*>(out), rows,
                            op.size * element);
    case kLinear:
      return tm_linear(static_cast<const Packed*>(op.job), in, step.type, tiles && op.input_tiled, rows, residual, out,
                       op.wide ? kTypeF32 : step.type, tiled);
    case kRmsNorm:
      return tm_rms_norm(in, nullptr, op.job, nullptr, out, rows, op.size, op.eps, op.factor, step.type, tiled);
    case kLayerNorm:
      return tm_layer_norm(in, op.job, op.second, out, rows, op.size, op.eps, step.type);
    case kNormWhole:
      return tm_norm_whole(in, op.job, op.second, out, rows, op.size, op.left, op.middle, op.eps, op.factor, step.type);
    case kRopeStore:
      return rope(op, step, in, out);
    case kAttend:
      return attend(op, step, in, out, tiled);
    case kActivate:
      return tm_activate(in, out, rows * op.size, op.activation, step.type);
    case kJoin:
      return join(static_cast<const char*>(in), static_cast<const char*>(residual), static_cast<char*>(out), rows,
                  op.left * element, op.size * element);
    case kGate:
      return tm_activation_mul(in, out, rows, op.size, op.activation, step.type);
    case kGateAdd:
      return tm_gate_add(in, other, residual, out, rows, op.size, step.type);
    case kMixture:
      return mix(op, step, in, other, residual, out);
    case kConv:
      return tm_causal_conv(static_cast<const Conv*>(op.job), &sequences, in, const_cast<void*>(op.second), out, step.type);
    case kRecur:
      return tm_recur(static_cast<const Recurrence*>(op.job), &sequences, in, static_cast<const float*>(other),
                      static_cast<float*>(const_cast<void*>(op.second)), out, step.type);
    case kGatedNorm:
      return tm_gated_norm(static_cast<const GatedNorm*>(op.job), in, other, out, rows, op.size, op.left, step.type);
    case kGateMul:
      return tm_gate_mul(in, other, out, rows * op.size, step.type);
    case kNormAdd:
      return tm_norm_add(in, op.job, residual, out, rows * (op.size / op.left), op.left, op.eps, op.factor, op.scale,
                         step.type);
    case kActMul:
      return tm_act_mul(in, other, out, rows, op.size, op.left, op.middle, op.activation, step.type);
    case kScaleAdd:
      return with_type(step.type, [&](auto t) {
        using T = decltype(t);
        scale_add(static_cast<const T*>(in), static_cast<const T*>(residual), static_cast<T*>(out), rows * op.size,
                  op.factor);
      });
  }
}

}  // namespace
}  // namespace tokenmill

// Runs a step's operations in order; `spent` [count], where given, gets the nanoseconds of each added.
TM_API void tm_run_tape(const tokenmill::Op* ops, int64_t count, const tokenmill::Step* step, int64_t* spent) {
  using Clock = std::chrono::steady_clock;
  for (int64_t i = 0; i < count; ++i) {
    if (spent == nullptr) {
      tokenmill::run(ops[i], *step);
      continue;
    }
    const auto start = Clock::now();
    tokenmill::run(ops[i], *step);
    spent[i] += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
  }
}
