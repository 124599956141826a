// Threads that go through the steps of a chain together, in parts of which some are slow and one thread comes late.
// Prints how many parts are done twice or not at all, or before all of the step before, or "each part once, in turn" if
// none is. What a step has done is plain memory, for ThreadSanitizer to see whether the next one may read it.
#include "cpu/team.h"

#include <chrono>
#include <cstdio>
#include <vector>

int main() {
  constexpr int64_t kSteps = 40, kParts = 5, kThreads = 3;
  attnext::cpu::Chain chain(kSteps, kParts);
  int64_t done[kSteps][kParts] = {};
  std::atomic<int64_t> wrong{0};
  const auto pause = [](int64_t microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); };
  const auto work = [&](int64_t step, int64_t part) {
    for (int64_t other = 0; step > 0 && other < kParts; ++other) wrong += done[step - 1][other] != 1;
    if (part == step % kParts) pause(500);
    ++done[step][part];
  };
  std::vector<std::thread> threads;
  for (int64_t member = 0; member < kThreads; ++member)
    threads.emplace_back([&, member] {
      if (member == 0) pause(5000);
      chain.run(member, kThreads, work);
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& step : done)
    for (const auto& part : step) wrong += part != 1;
  if (wrong) std::printf("%lld parts out of turn\n", static_cast<long long>(wrong.load()));
  if (!wrong) std::puts("each part once, in turn");
  return wrong ? 1 : 0;
}
