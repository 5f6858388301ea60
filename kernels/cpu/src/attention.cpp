// Spreads attention over the pool: one task for each block of rows, and for each part of a long context where
// a sequence has only one block (decode), whose states are then merged in order. Merging at once or later
// gives the same bits.
#include "attention.h"

#include <algorithm>
#include <vector>

#include "attention_amx.h"
#include "attention_tiled.h"
#include "attention_vector.h"
#include "threads.h"
#include "tiled.h"

namespace tokenmill {
namespace {

struct Task {
  RowBlock block;
  int64_t part;    // the one part to do, or -1 for all of them
  int64_t states;  // place of a single part's states among the split ones

  int64_t first_part() const { return part >= 0 ? part : block.first_key(block.first) / kPart; }
};

struct Merge {
  RowBlock block;
  int64_t states;  // place of the first part's states, the others follow
  int64_t parts;
};

int64_t state_count(const RowBlock& block) { return (block.rows() + kQueryRows - 1) / kQueryRows; }

int64_t block_floats(const RowBlock& block) {
  return state_count(block) * State::floats(block.problem.value_size);
}

State state_of(float* states, int64_t index, int64_t value_size) {
  return {states + index * State::floats(value_size), State::row_width(value_size)};
}

// The parts [first, last) that hold keys which the block's rows see.
void parts_of(const RowBlock& block, int64_t& first, int64_t& last) {
  first = block.first_key(block.first) / kPart;
  last = block.position(block.last - 1) / kPart + 1;
}

// The end of the keys that a block sees.
int64_t end_of(const RowBlock& block) { return block.position(block.last - 1) + 1; }

// Where the first tile of a part begins that the block sees anything of.
template <class Tiles>
int64_t start_of(const RowBlock& block, int64_t part) {
  const int64_t start = part * kPart, oldest = block.first_key(block.first);
  return oldest > start ? start + (oldest - start) / Tiles::kTile * Tiles::kTile : start;
}

// `next`, if any, is what the thread does after the task: its first tile is asked for during this part's last.
template <class Tiles>
void attend_part(Tiles& tiles, const Task& task, int64_t part, float* states, const Task* next) {
  const RowBlock& block = task.block;
  const int64_t size = block.problem.value_size;
  for (int64_t s = 0; s < state_count(block); ++s) state_of(states, s, size).reset();
  const int64_t end = end_of(block), stop = std::min(end, (part + 1) * kPart);
  for (int64_t start = start_of<Tiles>(block, part); start < stop; start += Tiles::kTile) {
    const int64_t after = start + Tiles::kTile;
    if (after < (task.part < 0 ? end : stop)) {
      tiles.expect(block, after, end);
    } else if (next) {
      tiles.expect(next->block, start_of<Tiles>(next->block, next->first_part()), end_of(next->block));
    }
    tiles.load_tile(start, end);
    for (int64_t r = 0; r < block.rows(); r += Tiles::kRows) {
      const int64_t last = std::min(r + Tiles::kRows, block.rows());
      if (start <= block.position(block.first + last - 1)) tiles.attend(r, states);
    }
  }
}

// total = total and part together; what has seen nothing changes nothing.
template <class Tiles>
void merge(const State& total, const State& part) {
  alignas(64) float keep[kQueryRows], take[kQueryRows];
  F mine = load(total.maxima()), other = load(part.maxima());
  F maximum = max(mine, other), finite = finite_maximum(maximum);
  store(keep, Tiles::weight(mine - finite));
  store(take, Tiles::weight(other - finite));
  store(total.maxima(), maximum);
  for (int r = 0; r < kQueryRows; ++r) {
    float* to = total.row(r);
    for (int64_t i = 0; i < total.width; i += kLanes) {
      store(to + i, fma(load(to + i), splat(keep[r]), load(part.row(r) + i) * splat(take[r])));
    }
  }
}

template <class Tiles, class T>
void write_out(const RowBlock& block, float* states) {
  const Attention& p = block.problem;
  const int64_t size = p.value_size;
  const Layout layout{p.heads * size, p.tiled != 0};
  Rows at(block);
  for (int64_t r = 0; r < block.rows(); ++r, at.next()) {
    const int64_t slot = r % kQueryRows;
    const State state = state_of(states, r / kQueryRows, size);
    float sum = state.sum(slot), factor = 1.0f;
    if (p.sinks) {
      F maximum = splat(state.maxima()[slot]), sink = splat(p.sinks[at.head()] * Tiles::kUnit);
      F both = max(maximum, sink);
      alignas(64) float scaled[2][kLanes];
      store(scaled[0], Tiles::weight(maximum - both));
      store(scaled[1], Tiles::weight(sink - both));
      factor = scaled[0][0];
      sum = sum * factor + scaled[1][0];
    }
    const F weight = splat(factor / sum);
    T* out = static_cast<T*>(p.out);
    for (int64_t e = 0; e < size; e += kLanes) {
      T* to = out + layout.at(at.token(), at.head() * size + e);
      store_up_to(to, load(state.row(slot) + e) * weight, size - e);
    }
  }
}

template <class Tiles, class T>
void run_task(const Task& task, float* split, const Task* next) {
  const RowBlock& block = task.block;
  Tiles tiles(block);
  if (task.part >= 0) {
    attend_part(tiles, task, task.part, split + task.states, next);
    return;
  }
  const int64_t size = block.problem.value_size;
  float* total = scratch<float>(kAccumulator, 2 * block_floats(block));
  float* fresh = total + block_floats(block);
  int64_t part, last;
  parts_of(block, part, last);
  attend_part(tiles, task, part, total, next);
  while (++part < last) {
    attend_part(tiles, task, part, fresh, next);
    for (int64_t s = 0; s < state_count(block); ++s) merge<Tiles>(state_of(total, s, size), state_of(fresh, s, size));
  }
  write_out<Tiles, T>(block, total);
}

template <class Tiles, class T>
void run_merge(const Merge& job, float* split) {
  const int64_t size = job.block.problem.value_size, floats = block_floats(job.block);
  float* total = scratch<float>(kAccumulator, floats);
  for (int64_t s = 0; s < state_count(job.block); ++s) {
    const State state = state_of(total, s, size);
    state.reset();
    for (int64_t part = 0; part < job.parts; ++part) {
      merge<Tiles>(state, state_of(split + job.states + part * floats, s, size));
    }
  }
  write_out<Tiles, T>(job.block, total);
}

// One block of rows for every KV head as tasks, cut into parts where `rows`, all that its sequence has, are few.
// The heads of a part follow each other: they lie side by side in the cache.
void plan_rows(const RowBlock& block, int64_t rows, std::vector<Task>& tasks, std::vector<Merge>& merges,
               int64_t& floats) {
  const int64_t heads = block.problem.kv_heads, size = block_floats(block);
  int64_t begin, end;
  parts_of(block, begin, end);
  const bool cut = rows <= 2 * kBlockRows && end - begin > 1;
  auto for_head = [&block](int64_t g) { return RowBlock{block.problem, block.sequence, g, block.first, block.last}; };
  for (int64_t part = begin; part < (cut ? end : begin + 1); ++part) {
    for (int64_t g = 0; g < heads; ++g) {
      tasks.push_back({for_head(g), cut ? part : -1, floats + (g * (end - begin) + part - begin) * size});
    }
  }
  if (!cut) return;
  for (int64_t g = 0; g < heads; ++g, floats += (end - begin) * size) {
    merges.push_back({for_head(g), floats, end - begin});
  }
}

// The step's blocks as tasks; `merges` get the blocks that were cut, whose states take `floats` in all.
void plan(const Attention& problem, std::vector<Task>& tasks, std::vector<Merge>& merges, int64_t& floats) {
  for (int64_t s = 0; s < problem.sequences; ++s) {
    const int64_t rows = (problem.query_start[s + 1] - problem.query_start[s]) * problem.group();
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      const int64_t last = first + kBlockRows < rows ? first + kBlockRows : rows;
      plan_rows({problem, s, 0, first, last}, rows, tasks, merges, floats);
    }
  }
}

template <class Tiles, class T>
void run(const Attention& problem) {
  std::vector<Task> tasks;
  std::vector<Merge> merges;
  int64_t floats = 0;
  plan(problem, tasks, merges, floats);
  float* split = scratch<float>(kPartial, floats + 1);
  // The KV heads of a block lie side by side: where there is work for everyone, one thread reads them all.
  const int64_t count = static_cast<int64_t>(tasks.size());
  const int64_t grain = count >= 8 * thread_count() * problem.kv_heads ? problem.kv_heads : 1;
  parallel_ranges(count, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      run_task<Tiles, T>(tasks[i], split, i + 1 < last ? &tasks[i + 1] : nullptr);
    }
  });
  parallel_for(static_cast<int64_t>(merges.size()), [&](int64_t i) { run_merge<Tiles, T>(merges[i], split); });
}

}  // namespace
}  // namespace tokenmill

TM_API void tm_attention(const tokenmill::Attention* problem) {
  using namespace tokenmill;
  if (problem->type == kTypeF32) return run<VectorTiles<float>, float>(*problem);
  if (tiled_cache(problem->type, problem->key_size, problem->value_size, problem->block_size)) {
#if defined(__AMX_BF16__)
    return run<AmxTiles, bf16>(*problem);
#else
    return run<TiledVectorTiles, bf16>(*problem);
#endif
  }
  run<VectorTiles<bf16>, bf16>(*problem);
}
