// Threads of a pass on cores of their own: thread i on the i-th core that the process may use, one to a physical core.
//
// Two threads that wait for one another and land on one core cost a time slice at every barrier. Off unless asked for:
// two processes that both pin take the same cores, and what the system could have spread they share.
#pragma once

#include <atomic>
#include <cstdio>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace pinning {

inline std::atomic<bool> wanted{false};

#if defined(__linux__)

inline std::atomic<int> passes{0};

// The first core of those that share a physical one with `core`; `core` itself where the system does not say.
inline int first_sibling(int core) {
  char name[96];
  snprintf(name, sizeof name, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", core);
  int first = core;
  if (FILE *file = fopen(name, "r")) {
    if (fscanf(file, "%d", &first) != 1) first = core;
    fclose(file);
  }
  return first;
}

// The cores of a mask, those of different physical cores only.
inline std::vector<int> physical(const cpu_set_t &mask) {
  std::vector<int> cores, seen;
  for (int core = 0; core < CPU_SETSIZE; core++) {
    if (!CPU_ISSET(core, &mask)) continue;
    const int first = first_sibling(core);
    bool known = false;
    for (int other : seen) known |= other == first;
    if (!known) cores.push_back(core), seen.push_back(first);
  }
  return cores;
}

// The places of one pass, made by the calling thread before its parallel region; `enter` is called by each thread in
// it, `leave` behind it. Nothing is pinned while another pass runs in this process, nor where threads outnumber cores.
class Places {
 public:
  explicit Places(int threads) : alone_(passes.fetch_add(1) == 0) {
    if (sched_getaffinity(0, sizeof mask_, &mask_)) return;
    usable_ = true;
    if (!wanted || !alone_ || threads < 2) return;
    static thread_local cpu_set_t known; // reading the topology takes longer than a pass of a small model
    static thread_local std::vector<int> cores;
    if (cores.empty() || !CPU_EQUAL(&known, &mask_)) cores = physical(mask_), known = mask_;
    if (threads <= int(cores.size())) cores_ = cores.data();
  }
  ~Places() { passes.fetch_sub(1); }
  Places(const Places &) = delete;
  Places &operator=(const Places &) = delete;

  void enter(int thread) const {
    const int core = cores_ ? cores_[thread] : -1;
    if (!usable_ || core == held()) return;
    if (core >= 0) set(core);
    else sched_setaffinity(0, sizeof mask_, &mask_);
    if (thread) held() = core; // the pool's threads stay where they are until another place is wanted
  }
  // The calling thread does other work between passes, with all cores.
  void leave() const {
    if (cores_) sched_setaffinity(0, sizeof mask_, &mask_);
  }

 private:
  // The core that the calling thread is kept on from pass to pass, or -1.
  static int &held() {
    static thread_local int core = -1;
    return core;
  }
  static void set(int core) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    sched_setaffinity(0, sizeof one, &one);
  }

  cpu_set_t mask_;
  const int *cores_ = nullptr;
  const bool alone_;
  bool usable_ = false;
};

#else

struct Places {
  explicit Places(int) {}
  void enter(int) const {}
  void leave() const {}
};

#endif

} // namespace pinning
