// Threads that go through the phases of one piece of work together. No torch here.
//
// A phase is a number of tasks; whoever is free takes the next one, and nobody begins the next
// phase before all of them are done. A thread that finds nobody else does everything itself, so it
// does not matter how many come, or when: nothing waits for a thread that has not taken a task.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace dalle {

class Team {
 public:
  explicit Team(int64_t phases) : turns_(static_cast<size_t>(phases)) {}

 private:
  friend class Member;
  struct Turn {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  std::vector<Turn> turns_;
};

// One thread of a team. All members call `run` equally often, with equal arguments.
class Member {
 public:
  explicit Member(Team& team) : team_(team) {}

  // Runs body(task) for the tasks of the next phase that fall to this thread; returns when all are
  // done, and what they wrote can be read.
  template <typename Body>
  void run(int64_t tasks, const Body& body) {
    Team::Turn& turn = team_.turns_[phase_++];
    int64_t mine = 0;
    for (int64_t task; (task = turn.next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++mine) {
      body(task);
    }
    if (mine > 0) turn.done.fetch_add(mine, std::memory_order_acq_rel);
    for (int waits = 0; turn.done.load(std::memory_order_acquire) < tasks; ++waits) {
      if (waits < kWaits) {
        pause();
      } else {
        std::this_thread::yield();  // more threads than cores: another one needs this core
      }
    }
  }

 private:
  static constexpr int kWaits = 2000;  // some 20 to 80 us

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Team& team_;
  size_t phase_ = 0;
};

}  // namespace dalle
