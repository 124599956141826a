// The launch: one block after the other, each with fresh shared memory.
#pragma once

#include <driver_types.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>

#include "block.h"

namespace cuda_on_cpu {

// Where a thread begins and ends.
CUDA_ON_CPU_UNWATCHED inline void run_thread() {
  Simulator& s = simulator();
  Thread& me = *s.running;
  entered_from(s.home);
  acquire(&s.begin);
  (*s.body)();
  if (me.copy_count) fail("%s leaves with %d cp.async that it has not waited for", text_of(me).c_str(), me.copy_count);
  Warp& warp = s.warps[me.warp];
  for (int i = 0; i < warp.meeting_count; ++i)
    if (warp.meetings[i].call.mask >> me.lane & 1)
      fail("%s names lanes that have left the kernel: 0x%08x", text_of(warp.meetings[i].call).c_str(), 1u << me.lane);
  warp.left |= 1u << me.lane;
  release(&s.end);
  me.state = State::kLeft;
  ++s.left;
  switch_fibers(me, s.home, true);
  std::abort();
}

[[noreturn]] CUDA_ON_CPU_UNWATCHED inline void report_deadlock() {
  const Simulator& s = simulator();
  std::string text = "deadlock: " + std::to_string(s.left) + " threads have left the kernel";
  for (int i = 0; i < s.size; ++i) {
    const Thread& first = s.threads[i];
    if (first.state == State::kLeft) continue;
    int count = 0;
    bool told = false;
    for (int j = 0; j < s.size; ++j) {
      if (s.threads[j].state == State::kLeft || !same(s.threads[j].call, first.call)) continue;
      told = told || j < i;
      ++count;
    }
    if (!told) text += ", " + std::to_string(count) + " wait in " + text_of(first.call);
  }
  fail("%s", text.c_str());
}

CUDA_ON_CPU_UNWATCHED inline void start_threads() {
  Simulator& s = simulator();
  const unsigned bx = s.block.x, by = s.block.y;
  for (int i = 0; i < s.size; ++i) {
    Thread& thread = s.threads[i];
    start(thread, s.stacks + size_t(i) * (kGuard + kStackBytes) + kGuard, kStackBytes, run_thread);
    thread.tsan = s.tsan_fibers.next();
    thread.index = {unsigned(i) % bx, unsigned(i) / bx % by, unsigned(i) / (bx * by)};
    thread.lane = i % kWarpSize, thread.warp = i / kWarpSize;
    thread.state = State::kReady;
    thread.copy_count = thread.groups = 0;
  }
  for (int i = 0; i < s.size; i += kWarpSize) {
    Warp& warp = s.warps[i / kWarpSize];
    warp.lanes = s.size - i >= kWarpSize ? ~0u : (1u << (s.size - i)) - 1;
    warp.left = 0, warp.meeting_count = 0;
    std::memset(warp.turn, 0, sizeof warp.turn);
  }
}

// On a GPU a block finds what the last one left there. NaN shows better that a thread reads what nobody wrote.
CUDA_ON_CPU_UNWATCHED inline void renew_shared_memory() {
  Simulator& s = simulator();
  forget_accesses(s.shared, kSharedLimit);
  unpoison(s.shared, s.shared_bytes);
  std::memset(s.shared, 0xff, s.shared_bytes);
  poison(s.shared + s.shared_bytes, kSharedLimit + kRedZone - s.shared_bytes);
}

CUDA_ON_CPU_UNWATCHED inline void run_block(const int* order) {
  Simulator& s = simulator();
  s.left = s.waiting = s.votes = s.turn = 0;
  s.keys = new BlockKeys;
  renew_shared_memory();
  start_threads();
  release(&s.begin);
  while (s.left < s.size) {
    bool progress = false;
    for (int i = 0; i < s.size; ++i) {
      Thread& thread = s.threads[order[i]];
      if (thread.state != State::kReady) continue;
      progress = true;
      s.running = &thread;
      switch_fibers(s.home, thread);
    }
    if (!progress) report_deadlock();
  }
  delete s.keys;
}

// The order in which threads, and blocks, get their turn: CUDA_ON_CPU_ORDER, forward, backward or random:SEED.
class Order {
 public:
  Order() {
    const char* text = std::getenv("CUDA_ON_CPU_ORDER");
    const std::string order = text && *text ? text : "forward";
    backward_ = order == "backward";
    random_ = order.rfind("random:", 0) == 0;
    if (random_) state_ = std::strtoull(order.c_str() + 7, nullptr, 10);
    if (!random_ && !backward_ && order != "forward")
      fail("CUDA_ON_CPU_ORDER is %s, not forward, backward or random:SEED", order.c_str());
  }
  // Numbers from 0 to count - 1 as first + i * step modulo count: a block order that takes no memory.
  void arrange_blocks(uint64_t count) {
    count_ = count;
    first_ = backward_ ? count - 1 : random_ ? next() % count : 0;
    step_ = backward_ ? count - 1 : 1;
    while (random_ && std::gcd(step_ = 1 + next() % count, count) != 1) {
    }
  }
  uint64_t block(uint64_t i) const { return uint64_t((first_ + (unsigned __int128)(i)*step_) % count_); }
  const int* threads(int size) {
    for (int i = 0; i < size; ++i) threads_[i] = backward_ ? size - 1 - i : i;
    for (int i = size - 1; random_ && i > 0; --i) std::swap(threads_[i], threads_[next() % unsigned(i + 1)]);
    return threads_;
  }

 private:
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  bool backward_, random_;
  uint64_t state_ = 0, count_ = 1, first_ = 0, step_ = 1;
  int threads_[kMaxThreads];
};

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (!threads || block.x > 1024 || block.y > 1024 || block.z > 64 || threads > kMaxThreads)
    fail("bad launch configuration: a block of (%u, %u, %u) threads", block.x, block.y, block.z);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("bad launch configuration: a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  if (shared_bytes > kSharedLimit)
    fail("too much shared memory: %zu bytes, a block has at most %zu", shared_bytes, kSharedLimit);
}

inline void map_stacks_and_shared_memory() {
  Simulator& s = simulator();
  if (s.stacks) return;
  s.stacks = map_memory(kMaxThreads * (kGuard + kStackBytes));
  for (int i = 0; i < kMaxThreads; ++i) mprotect(s.stacks + size_t(i) * (kGuard + kStackBytes), kGuard, PROT_NONE);
  s.shared = map_memory(kSharedLimit + 2 * kRedZone) + kRedZone;
  poison(s.shared - kRedZone, kRedZone);
}

CUDA_ON_CPU_UNWATCHED inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const char* kernel,
                                           const std::function<void()>& body) {
  Simulator& s = simulator();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.kernel = kernel, s.body = &body;
  s.grid = grid, s.block = block, s.block_index = {0, 0, 0};
  check_launch(grid, block, shared_bytes);
  if (std::getenv("CUDA_ON_CPU_TRACE")) std::fprintf(stderr, "launch: %s\n", kernel);
  s.size = int(block.x * block.y * block.z);
  s.shared_bytes = shared_bytes;
  map_stacks_and_shared_memory();
  adopt_thread(s.home);
  s.tsan_fibers.begin_launch();
  Order order;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  order.arrange_blocks(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = order.block(i);
    s.block_index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y), unsigned(number / grid.x / grid.y)};
    run_block(order.threads(s.size));
  }
  acquire(&s.end);
}

// The arguments become the kernel's parameters once, as on a GPU; each thread has its copies.
template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, const std::string& name,
            void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  const std::string bare = name.front() == '(' ? name.substr(1, name.size() - 2) : name;
  run_grid(grid, block, shared_bytes, bare.c_str(), [&] { std::apply(kernel, parameters); });
}

}  // namespace cuda_on_cpu
