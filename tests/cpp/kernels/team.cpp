// A team of threads: every task runs once, and sees all that the phase before has written.
#include "common/team.h"

#include <chrono>
#include <thread>

#include "check.h"

namespace dalle {
namespace {

// `threads` members, the last of which come late, add up what the phase before them left.
void test_team_of(Checks& checks, int threads, int64_t phases, int64_t tasks) {
  std::vector<std::vector<int64_t>> runs(phases, std::vector<int64_t>(tasks));
  std::vector<std::vector<int64_t>> sums = runs;
  Team team(phases);
  const auto work = [&](int number) {
    std::this_thread::sleep_for(std::chrono::microseconds(number * 50));
    Member member(team);
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t some = phase % 3 == 2 ? 1 : tasks;  // a phase may be one task, or none
      member.run(phase % 7 == 6 ? 0 : some, [&](int64_t task) {
        ++runs[phase][task];
        int64_t sum = 1;
        for (int64_t t = 0; phase > 0 && t < tasks; ++t) sum += sums[phase - 1][t];
        sums[phase][task] = sum % 1000003;
      });
    }
  };
  std::vector<std::thread> others;
  for (int number = 1; number < threads; ++number) others.emplace_back(work, number);
  work(0);
  for (std::thread& other : others) other.join();
  ++checks.cases;
  for (int64_t phase = 0; phase < phases; ++phase) {
    int64_t sum = 1;
    for (int64_t t = 0; phase > 0 && t < tasks; ++t) sum += sums[phase - 1][t];
    const int64_t some = phase % 7 == 6 ? 0 : phase % 3 == 2 ? 1 : tasks;
    for (int64_t task = 0; task < tasks; ++task) {
      const bool ran = task < some;
      if (runs[phase][task] != ran || (ran && sums[phase][task] != sum % 1000003)) {
        checks.fail("team", phase * tasks + task, static_cast<double>(sums[phase][task]),
                    static_cast<double>(sum % 1000003));
      }
    }
  }
}

}  // namespace

void test_team(Checks& checks) {
  for (const int threads : {1, 2, 3, 8}) {
    test_team_of(checks, threads, 60, 5);
    test_team_of(checks, threads, 20, 64);
  }
}

}  // namespace dalle
