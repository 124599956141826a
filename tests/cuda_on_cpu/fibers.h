// Fibers: a stack for each CUDA thread and the switch between stacks, which the sanitizers are told of.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// The simulator's own state is shared by all fibers and must not look like a race to TSan. Not inlined, since the body
// would then be watched together with the function that it is inlined into.
#define CUDA_ON_CPU_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

namespace cuda_on_cpu {

constexpr int kMaxThreads = 1024;  // of a block

// What TSan believes to be ordered: everything before a release, by those who acquire the same key afterwards.
inline void release(void* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(key);
#else
  (void)key;
#endif
}
inline void acquire(void* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(key);
#else
  (void)key;
#endif
}

inline void poison(void* start, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(start, bytes);
#else
  (void)start, (void)bytes;
#endif
}
inline void unpoison(void* start, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(start, bytes);
#else
  (void)start, (void)bytes;
#endif
}

inline char* map_memory(size_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) std::abort();
  return static_cast<char*>(start);
}

// TSan forgets who touched mapped memory when it is mapped anew: what one block did with a stack or with shared memory
// is no race with the block that has it next.
inline void forget_accesses(void* start, size_t bytes) {
#if defined(__SANITIZE_THREAD__)
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (mmap(start, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) std::abort();
#else
  (void)start, (void)bytes;
#endif
}

struct Fiber {
  void* stack_pointer = nullptr;  // while another fiber runs
  const void* stack = nullptr;    // its lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;        // TSan's
};

// Pushes what the x86-64 ABI has a function keep, leaves the stack pointer in *from and continues on the stack `to`.
__attribute__((naked, noinline, no_sanitize("thread", "address"))) inline void swap_stacks(void** /*from*/,
                                                                                           void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}

// The next switch to the fiber calls `entry`, which must not return.
CUDA_ON_CPU_UNWATCHED inline void start(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
  forget_accesses(stack, bytes);
  unpoison(stack, bytes);  // frames that were left by a switch
  constexpr int saved = 6;
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + bytes);
  *--top = nullptr;  // the return address of entry, which puts the stack where the ABI wants it
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < saved; ++i) *--top = nullptr;
  fiber.stack_pointer = top, fiber.stack = stack, fiber.stack_bytes = bytes, fiber.fake_stack = nullptr;
}

// TSan's fibers, which take half a millisecond to make. All that a fiber ever did is in order to TSan, and its barriers
// pass that on, so that each thread of a launch needs one of its own. The next launch, which comes after this one in
// any case, gets the same fibers again.
class TsanFibers {
 public:
  CUDA_ON_CPU_UNWATCHED void begin_launch() { used_ = 0; }
  CUDA_ON_CPU_UNWATCHED void* next() {
#if defined(__SANITIZE_THREAD__)
    void*& fiber = fibers_[used_ % kMaxThreads];
    if (used_++ >= kMaxThreads) {
      __tsan_destroy_fiber(fiber);
      fiber = nullptr;
    }
    if (!fiber) fiber = __tsan_create_fiber(0);
    return fiber;
#else
    return nullptr;
#endif
  }

 private:
  uint64_t used_ = 0;
  void* fibers_[kMaxThreads] = {};
};

// `last`: nobody will switch back. A switch orders nothing for TSan: CUDA threads run at the same time.
CUDA_ON_CPU_UNWATCHED inline void switch_fibers(Fiber& from, Fiber& to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)last;
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The first thing that a fiber does. Only here does ASan tell where the stack of the first fiber is.
CUDA_ON_CPU_UNWATCHED inline void entered_from(Fiber& home) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home.stack, &home.stack_bytes);
#else
  (void)home;
#endif
}

// Makes a fiber of the thread that calls this.
CUDA_ON_CPU_UNWATCHED inline void adopt_thread(Fiber& home) {
  home = {};
#if defined(__SANITIZE_THREAD__)
  home.tsan = __tsan_get_current_fiber();
#endif
}

}  // namespace cuda_on_cpu
