// Scratch memory, kept by each thread from call to call: the pages of fresh memory cost more than they are used for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnext::cpu {

// What is taken from a Scratch is uninitialised, lies on a cache line, and lives as long as the Scratch does. Those of
// one thread end in the reverse order of their beginning, as local variables do.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(take_bytes(size_t(n) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);

  size_t chunk_, used_;  // where the thread's memory was filled up to
};

// For tests: whether what is taken, and new tensors, are filled with NaN, so that a number which is read before it is
// written shows.
bool poisoned();
void set_poison(bool on);

}  // namespace attnext::cpu
