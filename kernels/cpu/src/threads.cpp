#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

namespace tokenmill {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr uint64_t kClosed = 0xFFFFFFFFu;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The indices of a range that nobody has claimed yet begin at the lower half of `next`; the upper half is the job's
// generation. A claim is a compare-and-swap of the whole word, so a worker that read an old job can never take an index
// of a new one: the word was closed before the job changed.
struct alignas(64) Range {
  std::atomic<uint64_t> next{kClosed};
  std::atomic<int64_t> end{0};

  uint64_t generation() const { return next.load(std::memory_order_seq_cst) >> 32; }
  void close(uint64_t generation) { next.store(generation << 32 | kClosed, std::memory_order_seq_cst); }
  void open(uint64_t generation, int64_t begin) {
    next.store(generation << 32 | static_cast<uint64_t>(begin), std::memory_order_seq_cst);
  }
};

constexpr int kMaxRanges = 64;

// The first range is opened last: it tells that there is a job.
struct Pool {
  Range ranges[kMaxRanges];
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<Body> body{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<int> used{1};  // of the ranges
  std::atomic<int> sleeping{0};
  std::atomic<int> wanted{1};
  int started = 1;
  std::mutex caller;
  std::mutex bed;
  std::condition_variable wake;
};

// Never destroyed: workers may still spin while the process exits.
Pool* pool = new Pool;

// Runs what can be claimed of a range.
void work_on(Range& range) {
  for (;;) {
    uint64_t at = range.next.load(std::memory_order_acquire);
    uint64_t index = at & kClosed;
    int64_t end = range.end.load(std::memory_order_acquire);
    Body body = pool->body.load(std::memory_order_acquire);
    const void* context = pool->context.load(std::memory_order_acquire);
    if (static_cast<int64_t>(index) >= end || index == kClosed) return;
    if (!range.next.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel)) continue;
    body(context, static_cast<int64_t>(index));
    pool->done.fetch_add(1, std::memory_order_acq_rel);
  }
}

// Thread `number` begins with its own range.
void work(int number) {
  const int used = pool->used.load(std::memory_order_acquire);
  for (int i = 0; i < used; ++i) work_on(pool->ranges[(number + i) % used]);
}

// Spins until the job's generation is no longer `seen`, or sleeps until it is told so.
void await_job(uint64_t seen) {
  auto changed = [seen] { return pool->ranges[0].generation() != seen; };
  auto until = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (changed()) return;
      pause();
    }
  } while (Clock::now() < until);
  std::unique_lock<std::mutex> lock(pool->bed);
  pool->sleeping.fetch_add(1, std::memory_order_seq_cst);
  pool->wake.wait(lock, changed);
  pool->sleeping.fetch_sub(1, std::memory_order_seq_cst);
}

void worker(int number) {
  uint64_t seen = 0;
  for (;;) {
    await_job(seen);
    seen = pool->ranges[0].generation();
    if (number < pool->wanted.load(std::memory_order_relaxed)) work(number);
  }
}

void start_workers() {
  int wanted = pool->wanted.load(std::memory_order_relaxed);
  for (; pool->started < wanted; ++pool->started) std::thread(worker, pool->started).detach();
}

// A forked child has none of its parent's threads: it begins with a pool of its own.
void reset_in_child() {
  int wanted = pool->wanted.load();
  pool = new Pool;
  pool->wanted = wanted;
}

const int registered = pthread_atfork(nullptr, nullptr, reset_in_child);

struct Scratch {
  void* memory[kScratchSlots] = {};
  int64_t bytes[kScratchSlots] = {};
  ~Scratch() {
    for (void* each : memory) std::free(each);
  }
};

// Changes the job: `count` indices over the first `used` ranges.
void open_job(int64_t count, int used, Body body, const void* context) {
  const uint64_t last = pool->ranges[0].generation(), generation = (last + 1) & kClosed;
  const int before = pool->used.load(std::memory_order_relaxed);
  for (int i = 0; i < std::max(before, used); ++i) pool->ranges[i].close(last);
  pool->body.store(body, std::memory_order_release);
  pool->context.store(context, std::memory_order_release);
  pool->used.store(used, std::memory_order_release);
  pool->done.store(0, std::memory_order_relaxed);
  for (int i = used - 1; i >= 0; --i) {
    pool->ranges[i].end.store(count * (i + 1) / used, std::memory_order_release);
    pool->ranges[i].open(generation, count * i / used);
  }
}

}  // namespace

void run_parallel(int64_t count, Claims claims, Body body, const void* context) {
  std::unique_lock<std::mutex> only(pool->caller, std::try_to_lock);
  const int threads = thread_count();
  if (count <= 1 || threads <= 1 || !only.owns_lock()) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  start_workers();
  open_job(count, claims == Claims::kOwnFirst ? std::min(threads, kMaxRanges) : 1, body, context);
  if (pool->sleeping.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(pool->bed);
    pool->wake.notify_all();
  }
  work(0);
  for (int spins = 0; pool->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 20000) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

int thread_count() { return pool->wanted.load(std::memory_order_relaxed); }

void* scratch(int slot, int64_t bytes) {
  thread_local Scratch own;
  if (own.bytes[slot] < bytes) {
    std::free(own.memory[slot]);
    own.bytes[slot] = (bytes + 4095) / 4096 * 4096;
    own.memory[slot] = std::aligned_alloc(64, static_cast<size_t>(own.bytes[slot]));
    if (own.memory[slot] == nullptr) std::abort();
  }
  return own.memory[slot];
}

}  // namespace tokenmill

extern "C" {

__attribute__((visibility("default"))) void tm_set_threads(int count) {
  tokenmill::pool->wanted.store(count < 1 ? 1 : count, std::memory_order_relaxed);
}

__attribute__((visibility("default"))) int tm_threads() { return tokenmill::thread_count(); }
}
