// The tasks of a loop are cut into one range per thread; who has emptied its own takes from the
// others'. A range is one word, (loop number, next task, end), so that a thread that comes from an
// older loop cannot take from a newer one by mistake.
#include "pool.h"

#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define HERD_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define HERD_PAUSE() asm volatile("yield")
#else
#define HERD_PAUSE()
#endif

namespace herd {
namespace {

constexpr int kMaxThreads = 256;
constexpr long kMaxTasks = 1 << 20;  // 20 bits each for next and end leave 24 for the loop number
// How long an idle worker watches for the next loop before it sleeps: longer than Python takes
// between two calls of a step, shorter than anything a person or a battery would notice.
constexpr auto kWatch = std::chrono::microseconds(60);

// A machine that others use too takes a worker's processor away in the middle of a task, and the
// caller waits for milliseconds. A loop that ends with such a wait makes the caller work alone for
// a while, twice as long if that follows soon on another.
constexpr auto kStall = std::chrono::microseconds(200);
constexpr auto kLeastAlone = std::chrono::milliseconds(2);
constexpr auto kMostAlone = std::chrono::milliseconds(64);
typedef std::chrono::steady_clock Clock;

struct alignas(64) Range {
  std::atomic<uint64_t> word{0};
};
uint64_t make_word(uint64_t loop, uint64_t next, uint64_t end) {
  return (loop << 40) | (next << 20) | end;
}

struct Scratch {
  void* memory = nullptr;
  long num_bytes = 0;
  ~Scratch() { free(memory); }
};
thread_local Scratch scratches[kNumScratches];

struct State {
  std::mutex callers;  // held by the thread whose loop is running
  pid_t pid = getpid();
  std::atomic<int> num_threads{1};
  int num_started = 0;
  Clock::time_point alone_until{};
  Clock::duration penalty = kLeastAlone;  // how long to work alone after the next stall

  // The running loop. Written only between loops, by the caller.
  Task task = nullptr;
  void* context = nullptr;
  std::atomic<int> num_ranges{1};
  Range ranges[kMaxThreads];
  alignas(64) std::atomic<uint64_t> loop{0};
  alignas(64) std::atomic<long> num_left{0};

  alignas(64) std::atomic<int> num_asleep{0};
  std::mutex sleepers;
  std::condition_variable wake;
};

State* state = new State;  // never destroyed: workers outlive static destructors
thread_local bool in_loop = false;

// Next task of a range in loop number `loop`, or -1.
long take(Range& range, uint64_t loop) {
  uint64_t word = range.word.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t next = (word >> 20) & 0xfffff, end = word & 0xfffff;
    if ((word >> 40) != (loop & 0xffffff) || next >= end) return -1;
    if (range.word.compare_exchange_weak(word, make_word(loop & 0xffffff, next + 1, end),
                                         std::memory_order_acq_rel))
      return (long)next;
  }
}

void work(int worker, uint64_t loop) {
  const int num_ranges = state->num_ranges.load(std::memory_order_relaxed);
  for (int i = 0; i < num_ranges; i++) {
    Range& range = state->ranges[(worker + i) % num_ranges];
    for (long task = take(range, loop); task >= 0; task = take(range, loop)) {
      // Until this task is done the loop cannot end, so these stay.
      state->task(state->context, task);
      state->num_left.fetch_sub(1, std::memory_order_acq_rel);
    }
  }
}

void serve(int worker) {
  in_loop = true;
  uint64_t seen = 0;
  for (;;) {
    uint64_t loop = state->loop.load(std::memory_order_acquire);
    if (loop == seen) {
      const auto until = std::chrono::steady_clock::now() + kWatch;
      int spins = 0;
      while ((loop = state->loop.load(std::memory_order_acquire)) == seen) {
        HERD_PAUSE();
        if ((++spins & 63) == 0 && std::chrono::steady_clock::now() > until) {
          std::unique_lock<std::mutex> lock(state->sleepers);
          state->num_asleep.fetch_add(1, std::memory_order_seq_cst);
          state->wake.wait(lock, [&] {
            return state->loop.load(std::memory_order_seq_cst) != seen;
          });
          state->num_asleep.fetch_sub(1, std::memory_order_seq_cst);
          spins = 0;
        }
      }
    }
    seen = loop;
    if (worker < state->num_threads.load(std::memory_order_relaxed)) work(worker, loop);
  }
}

}  // namespace

void set_num_threads(int num_threads) {
  std::lock_guard<std::mutex> lock(state->callers);
  if (num_threads < 1) num_threads = 1;
  if (num_threads > kMaxThreads) num_threads = kMaxThreads;
  for (; state->num_started < num_threads - 1; state->num_started++)
    std::thread(serve, state->num_started + 1).detach();
  state->num_threads.store(num_threads);
}

int num_threads() { return state->num_threads.load(); }

void run(Task task, void* context, long num_tasks) {
  const int num_threads = state->num_threads.load(std::memory_order_relaxed);
  const bool alone = num_threads == 1 || num_tasks == 1 || num_tasks >= kMaxTasks;
  // A fork leaves the child without the workers.
  if (in_loop || alone || state->pid != getpid() || !state->callers.try_lock()) {
    for (long i = 0; i < num_tasks; i++) task(context, i);
    return;
  }
  in_loop = true;
  const auto started = Clock::now();
  if (started < state->alone_until) {
    for (long i = 0; i < num_tasks; i++) task(context, i);
    in_loop = false;
    state->callers.unlock();
    return;
  }
  const uint64_t loop = state->loop.load(std::memory_order_relaxed) + 1;
  state->task = task;
  state->context = context;
  state->num_ranges = num_threads;
  state->num_left.store(num_tasks, std::memory_order_relaxed);
  for (int i = 0; i < num_threads; i++) {
    const uint64_t start = num_tasks * i / num_threads, end = num_tasks * (i + 1) / num_threads;
    state->ranges[i].word.store(make_word(loop & 0xffffff, start, end), std::memory_order_release);
  }
  state->loop.store(loop, std::memory_order_seq_cst);
  if (state->num_asleep.load(std::memory_order_seq_cst) > 0) {
    { std::lock_guard<std::mutex> lock(state->sleepers); }
    state->wake.notify_all();
  }
  work(0, loop);
  if (state->num_left.load(std::memory_order_acquire) > 0) {
    const auto waiting = Clock::now();
    for (int spins = 0; state->num_left.load(std::memory_order_acquire) > 0; spins++) {
      HERD_PAUSE();
      if ((spins & 1023) == 1023) std::this_thread::yield();
    }
    const auto now = Clock::now();
    const auto waited = now - waiting;
    // Long loops have long tasks, and so an honest wait for the last of them.
    if (waited > kStall && waited > (waiting - started) / 2) {
      if (now - state->alone_until > kMostAlone) state->penalty = kLeastAlone;
      state->alone_until = now + state->penalty;
      if (state->penalty < kMostAlone) state->penalty *= 2;
    }
  }
  in_loop = false;
  state->callers.unlock();
}

void* scratch(int slot, long num_bytes) {
  Scratch& own = scratches[slot];
  if (own.num_bytes < num_bytes) {
    free(own.memory);
    num_bytes = (num_bytes + 4095) / 4096 * 4096;
    own.memory = aligned_alloc(64, (size_t)num_bytes);
    own.num_bytes = own.memory ? num_bytes : 0;
  }
  return own.memory;
}

void free_scratch() {
  for (Scratch& own : scratches) {
    free(own.memory);
    own.memory = nullptr;
    own.num_bytes = 0;
  }
}

}  // namespace herd
