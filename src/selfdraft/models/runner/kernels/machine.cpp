// What decides how quick a pass is beside the kernels themselves: how long a cache line travels from core to core, and
// how many bytes a second come from memory. On a virtual machine both change within minutes, when the cores are moved.
//
// Every thread here is pinned to a core of its own, and ended before a function returns.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace {

typedef int64_t word;
typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr word STOP = -1;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Whether the calling thread runs on this core alone from now on.
bool pin(int core) {
#if defined(__linux__)
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  return pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0;
#else
  (void)core;
  return false;
#endif
}

struct alignas(128) Line {
  std::atomic<word> turn{0};
};

// Where all threads of a pass wait for one another.
class Gate {
 public:
  explicit Gate(int threads) : threads_(threads) {}
  void pass() {
    const word round = round_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_ = 0;
      round_.fetch_add(1);
    } else
      while (round_.load() == round) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<word> round_{0};
};

void share(word bytes, int thread, int threads, word &from, word &to) {
  const word lines = bytes / 4096;
  from = lines * thread / threads * 4096;
  to = lines * (thread + 1) / threads * 4096;
}

uint64_t sum(const char *from, word bytes) {
  u64x8 a = {}, b = {}, c = {}, d = {}, v[4];
  for (word i = 0; i + 256 <= bytes; i += 256) {
    memcpy(v, from + i, 256);
    a += v[0], b += v[1], c += v[2], d += v[3];
  }
  a += b + c + d;
  uint64_t all = 0;
  for (int i = 0; i < 8; i++) all += a[i];
  return all;
}

template <class Work> void on_cores(const int *cores, int threads, const Work &work) {
  std::vector<std::thread> running;
  for (int t = 0; t < threads; t++) running.emplace_back([&, t] { work(t, pin(cores[t])); });
  for (auto &thread : running) thread.join();
}

} // namespace

extern "C" {

// Nanoseconds that a cache line takes from one core to the other: the least of batches of `rounds` round trips, tried
// for so many seconds. 0 where a thread cannot be pinned.
double selfdraft_ping(int one, int other, word rounds, double seconds) {
  Line line;
  std::atomic<int> ready{0}, failed{0};
  double best = 1e9;
  const int cores[2] = {one, other};
  on_cores(cores, 2, [&](int thread, bool pinned) {
    if (!pinned) failed = 1;
    ready.fetch_add(1);
    while (ready.load() < 2) std::this_thread::yield();
    if (failed) return;
    if (thread) {
      for (word wanted = 1;; wanted += 2) {
        word seen;
        while ((seen = line.turn.load(std::memory_order_acquire)) != wanted)
          if (seen == STOP) return;
        line.turn.store(wanted + 1, std::memory_order_release);
      }
    }
    const double end = now() + seconds;
    word turn = 0;
    for (double began = now(); began < end;) {
      for (word i = 0; i < rounds; i++, turn += 2) {
        line.turn.store(turn + 1, std::memory_order_release);
        while (line.turn.load(std::memory_order_acquire) != turn + 2) {
        }
      }
      const double ended = now();
      best = std::min(best, (ended - began) / double(2 * rounds));
      began = ended;
    }
    line.turn.store(STOP, std::memory_order_release);
  });
  return failed ? 0 : 1e9 * best;
}

// Write to every page, by as many threads as there are cores: what was never written is not read from memory.
void selfdraft_fill(char *memory, word bytes, const int *cores, int threads) {
  on_cores(cores, threads, [&](int thread, bool) {
    word from, to;
    share(bytes, thread, threads, from, to);
    memset(memory + from, 1 + thread, size_t(to - from));
  });
}

// Bytes a second that the threads read together: the quickest pass over all of it within so many seconds, of at least
// two. 0 where a thread cannot be pinned.
double selfdraft_read(const char *memory, word bytes, const int *cores, int threads, double seconds) {
  Gate gate(threads);
  std::atomic<int> failed{0};
  std::atomic<bool> on{true};
  std::atomic<uint64_t> sums{0};
  double best = 1e9;
  on_cores(cores, threads, [&](int thread, bool pinned) {
    if (!pinned) failed = 1;
    word from, to;
    share(bytes, thread, threads, from, to);
    const double end = now() + seconds;
    for (int count = 0;; count++) {
      gate.pass();
      if (failed || !on) return;
      const double began = now();
      sums.fetch_add(sum(memory + from, to - from));
      gate.pass();
      if (thread) continue;
      const double ended = now();
      best = std::min(best, ended - began);
      if (count && ended > end) on = false;
    }
  });
  return failed || !sums ? 0 : double(bytes) / best;
}
}
