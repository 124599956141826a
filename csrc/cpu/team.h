// Threads that go through the steps of a recurrence together.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "cpu/problem.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace attnext::cpu {

// Steps one after the other, each of so many parts that any thread may do. A thread takes those it had at the step
// before, whose numbers are in its cache, then those that nobody has begun: no thread that comes late, or never, is
// waited for. What is waited for has been begun. The work must not throw.
class Chain {
 public:
  Chain(int64_t steps, int64_t parts) : steps_(steps), parts_(parts), next_(new Place[size_t(parts)]) {}

  // The share of one thread of `members`: calls work(step, part).
  template <class Work>
  void run(int64_t member, int64_t members, const Work& work) {
    const int64_t first = parts_ * member / members, own = parts_ * (member + 1) / members - first;
    for (int64_t step = done_.load(std::memory_order_acquire) / parts_; step < steps_; ++step) {
      for (int64_t k = 0; k < parts_; ++k) {
        const int64_t part = (k < own ? there_and_back(step, k, first, first + own) : first + k) % parts_;
        int64_t expected = step;
        if (next_[part].step.load(std::memory_order_relaxed) != step) continue;
        // What the steps before have written is seen by way of done_.
        if (!next_[part].step.compare_exchange_strong(expected, step + 1, std::memory_order_relaxed)) continue;
        work(step, part);
        done_.fetch_add(1, std::memory_order_acq_rel);
      }
      wait((step + 1) * parts_);
    }
  }

 private:
  struct alignas(64) Place {
    std::atomic<int64_t> step{0};  // the first that nobody has begun
  };

  void wait(int64_t count) const {
    for (int64_t round = 0; done_.load(std::memory_order_acquire) < count; ++round) {
      if (round < kRounds) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

  static constexpr int64_t kRounds = 2000;  // some 0.1 ms: longer, and the other may wait for this one's processor
  const int64_t steps_, parts_;
  const std::unique_ptr<Place[]> next_;
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace attnext::cpu
