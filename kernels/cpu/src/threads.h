// One pool of threads that stays warm across a step: workers spin for a moment, then sleep.
//
//   caller:  close ── write job ── open ──▶ claim, run, claim, run … ──▶ wait until every index is done
//   worker:  spin on the job ─────────────▶ claim, run, claim, run … ──▶ spin again, sleep after kSpin
//
// Indices are claimed one at a time, so a core that is taken away for a while delays only what it holds. They are
// claimed in order by everyone, or each thread has a range of its own and helps others once that is done: then a thread
// comes back to the same rows in every pass over them, and finds what it wrote in its own cache.
// The caller claims like any worker and never waits for one to arrive: with no worker alive (after a fork, on
// a busy machine) it does everything itself. Which thread computes an index never changes its result.
#pragma once

#include <cstdint>

namespace tokenmill {

using Body = void (*)(const void* context, int64_t index);

enum class Claims { kInOrder, kOwnFirst };

void run_parallel(int64_t count, Claims claims, Body body, const void* context);
int thread_count();

// Memory of this thread's own, 64-byte aligned, valid until the thread asks for the same slot again.
void* scratch(int slot, int64_t bytes);

enum ScratchSlot { kPanel, kAccumulator, kRows, kPartial, kExperts, kChoice, kScratchSlots };

template <class T>
T* scratch(ScratchSlot slot, int64_t count) {
  return static_cast<T*>(scratch(static_cast<int>(slot), count * static_cast<int64_t>(sizeof(T))));
}

// Calls body(i) for every i in 0 .. count - 1, spread over the pool.
template <class Lambda>
void parallel_for(int64_t count, const Lambda& body, Claims claims = Claims::kInOrder) {
  const auto call = [](const void* context, int64_t index) { (*static_cast<const Lambda*>(context))(index); };
  run_parallel(count, claims, call, &body);
}

// Rows are many for these threads, as in prefill, where each takes its own. Fewer, and reading all weights in each
// thread costs more.
inline bool many(int64_t rows) { return rows >= 192 * thread_count(); }

// How many of `rows` rows a piece of work takes: a thread's share of many, else `few`.
inline int64_t rows_a_piece(int64_t rows, int64_t few) {
  constexpr int64_t kRound = 32;
  const int64_t share = (rows + thread_count() - 1) / thread_count();
  return many(rows) ? (share + kRound - 1) / kRound * kRound : few;
}

// Calls body(first, last) over consecutive pieces of 0 .. count - 1 of `grain` each, a thread's own first.
template <class Lambda>
void parallel_ranges(int64_t count, int64_t grain, const Lambda& body) {
  const auto run = [&](int64_t piece) {
    int64_t first = piece * grain;
    body(first, first + grain < count ? first + grain : count);
  };
  parallel_for((count + grain - 1) / grain, run, Claims::kOwnFirst);
}

}  // namespace tokenmill
