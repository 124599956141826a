// A block, each of its threads a fiber that runs until it waits for others: barriers, the primitives of a warp and
// asynchronous copies.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <type_traits>

#include "fibers.h"

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr int kMaxCopies = 128;          // cp.async of a thread that are on their way
constexpr size_t kSharedLimit = 232448;  // dynamic shared memory of a block: 227 KiB, on the GPUs that have most
constexpr size_t kRedZone = 4096;        // on each side of shared memory
constexpr size_t kGuard = 4096;          // below each stack
constexpr size_t kStackBytes = 256 << 10;

// A primitive called at a line. As a default argument, here() is the line that calls the function with the default.
struct Place {
  const char* file;
  int line;
  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
struct Call {
  const char* primitive;
  Place place;
  unsigned mask;  // 0: of the block, not of a warp
};
inline bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }
inline bool same(const Call& a, const Call& b) {
  return a.place.line == b.place.line && a.mask == b.mask && same(a.primitive, b.primitive) &&
         same(a.place.file, b.place.file);
}
inline std::string text_of(const Call& call) {
  const char* slash = std::strrchr(call.place.file, '/');
  std::string text = call.primitive + std::string(" at ") + (slash ? slash + 1 : call.place.file);
  text += ":" + std::to_string(call.place.line);
  char mask[32] = "";
  if (call.mask) std::snprintf(mask, sizeof mask, " with mask 0x%08x", call.mask);
  return text + mask;
}

struct Copy {  // cp.async
  void* to;
  const void* from;
  size_t bytes, zeros;
  int group;
};

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kLeft };
struct Thread : Fiber {
  uint3 index;
  int lane, warp;
  State state;
  Call call;  // what it waits in
  Copy copies[kMaxCopies];
  int copy_count, groups;
};

// Lanes that wait for each other: those that named the same mask.
struct Meeting {
  unsigned arrived;
  Call call;
};
struct Warp {
  unsigned lanes, left;  // those that the block has, and of these those whose thread has left the kernel
  Meeting meetings[kWarpSize];
  int meeting_count;
  uint8_t turn[kWarpSize];  // of __syncwarp, by the lowest lane of the mask
  // What the lanes bring to a meeting, and what they take from it.
  uint64_t value[kWarpSize][2], result[kWarpSize][2];
  int source[kWarpSize];
};

// Keys of TSan's order. Those that are new with each block order the block's threads and no other block's. There are
// two of each, in turn: a thread that is already at the next barrier must not appear to be ordered with this one.
struct BlockKeys {
  char barrier[2], warp[kMaxWarps][kWarpSize][2];
};

struct Simulator {
  std::mutex mutex;  // launches of several threads come one after the other
  Fiber home;        // of the thread that launches
  Thread threads[kMaxThreads];
  Thread* running;
  Warp warps[kMaxWarps];
  char* stacks = nullptr;
  char* shared = nullptr;
  size_t shared_bytes;
  const char* kernel;
  const std::function<void()>* body;
  dim3 grid, block;
  uint3 block_index;
  int size, left;            // threads of a block, and how many have left the kernel
  Call barrier;              // the one at which threads wait
  int waiting, votes, turn;  // of the barrier
  int outcome[2];            // votes of the barrier of each turn
  BlockKeys* keys;
  TsanFibers tsan_fibers;
  char begin, end, fence;  // keys
};
inline Simulator& simulator() {
  static Simulator instance;
  return instance;
}

__attribute__((noreturn, format(printf, 1, 2), no_sanitize("thread"))) inline void fail(const char* format, ...) {
  const Simulator& s = simulator();
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "cuda_on_cpu: %s block (%u, %u, %u): %s\n", s.kernel, s.block_index.x, s.block_index.y,
               s.block_index.z, text);
  std::fflush(stderr);
  std::abort();
}
inline std::string text_of(const Thread& thread) {
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
  return text;
}

CUDA_ON_CPU_UNWATCHED inline void wait(State state, const Call& call) {
  Simulator& s = simulator();
  Thread& me = *s.running;
  me.state = state;
  me.call = call;
  switch_fibers(me, s.home);
}

// A barrier of the block. Returns how many threads voted. It waits for all threads and at one line only: GPUs go on
// without threads that have left the kernel, and past different lines, but CUDA does not promise it.
CUDA_ON_CPU_UNWATCHED inline int barrier(const char* primitive, bool vote, Place place) {
  Simulator& s = simulator();
  const Call call = {primitive, place, 0};
  if (s.waiting > 0 && !same(s.barrier, call))
    fail("threads meet at different barriers, %s and %s", text_of(s.barrier).c_str(), text_of(call).c_str());
  const int turn = s.turn;
  release(&s.keys->barrier[turn]);
  s.barrier = call;
  s.votes += vote;
  if (++s.waiting == s.size) {
    s.outcome[turn] = s.votes;
    s.waiting = s.votes = 0;
    s.turn = 1 - turn;
    for (int i = 0; i < s.size; ++i) s.threads[i].state = State::kReady;
  } else {
    wait(State::kAtBarrier, call);
  }
  acquire(&s.keys->barrier[turn]);
  return s.outcome[turn];
}

// Lanes of a warp that name each other meet. The last to arrive runs finish(warp, mask) for all of them, since lanes
// that come back may be at their next meeting before the others have looked at what was brought to this one.
template <class Finish>
CUDA_ON_CPU_UNWATCHED void meet(const char* primitive, unsigned mask, Place place, Finish finish) {
  Simulator& s = simulator();
  Thread& me = *s.running;
  Warp& warp = s.warps[me.warp];
  const unsigned mine = 1u << me.lane;
  const Call call = {primitive, place, mask};
  if (!(mask & mine))
    fail("%s (lane %d) is not in the mask of its %s", text_of(me).c_str(), me.lane, text_of(call).c_str());
  const unsigned lanes = mask & warp.lanes;
  if (lanes & warp.left)
    fail("%s names lanes that have left the kernel: 0x%08x", text_of(call).c_str(), lanes & warp.left);
  int at = 0;
  while (at < warp.meeting_count && (warp.meetings[at].call.mask & warp.lanes) != lanes) ++at;
  if (at == warp.meeting_count) warp.meetings[warp.meeting_count++] = {0, call};
  Meeting& meeting = warp.meetings[at];
  if (!same(meeting.call.primitive, primitive))
    fail("lanes of warp %d meet in different primitives, %s and %s", me.warp, text_of(meeting.call).c_str(),
         text_of(call).c_str());
  meeting.arrived |= mine;
  if (meeting.arrived != lanes) return wait(State::kInWarp, call);
  warp.meetings[at] = warp.meetings[--warp.meeting_count];
  finish(warp, lanes);
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (lanes >> lane & 1) s.threads[me.warp * kWarpSize + lane].state = State::kReady;
}

// Each lane takes the value of its lane `source`.
template <class T>
CUDA_ON_CPU_UNWATCHED T shuffle(const char* primitive, unsigned mask, T value, int source, Place place) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>, "a shuffle moves at most 16 bytes");
  Simulator& s = simulator();
  Warp& warp = s.warps[s.running->warp];
  const int lane = s.running->lane;
  __builtin_memcpy(warp.value[lane], &value, sizeof(T));
  warp.source[lane] = source;
  meet(primitive, mask, place, [&](Warp& w, unsigned lanes) CUDA_ON_CPU_UNWATCHED {
    for (int to = 0; to < kWarpSize; ++to) {
      if (!(lanes >> to & 1)) continue;
      const int from = w.source[to];
      if (!(lanes >> from & 1))
        fail("lane %d of warp %d reads lane %d, which is not in it: %s", to, s.running->warp, from,
             text_of(Call{primitive, place, mask}).c_str());
      w.result[to][0] = w.value[from][0], w.result[to][1] = w.value[from][1];
    }
  });
  __builtin_memcpy(&value, warp.result[lane], sizeof(T));
  return value;
}

// Bits of the lanes whose predicate holds.
CUDA_ON_CPU_UNWATCHED inline unsigned ballot(const char* primitive, unsigned mask, bool predicate, Place place) {
  Simulator& s = simulator();
  Warp& warp = s.warps[s.running->warp];
  const int lane = s.running->lane;
  warp.value[lane][0] = predicate;
  meet(primitive, mask, place, [](Warp& w, unsigned lanes) CUDA_ON_CPU_UNWATCHED {
    uint64_t bits = 0;
    for (int from = 0; from < kWarpSize; ++from)
      if (lanes >> from & 1) bits |= w.value[from][0] << from;
    for (int to = 0; to < kWarpSize; ++to) w.result[to][0] = bits;
  });
  return unsigned(warp.result[lane][0]);
}

// The only one of the warp's primitives that orders memory.
CUDA_ON_CPU_UNWATCHED inline void sync_warp(unsigned mask, Place place) {
  Simulator& s = simulator();
  const int number = s.running->warp, lowest = mask ? __builtin_ctz(mask) : 0;
  char* key = &s.keys->warp[number][lowest][s.warps[number].turn[lowest]];
  release(key);
  meet("__syncwarp", mask, place, [lowest](Warp& warp, unsigned) CUDA_ON_CPU_UNWATCHED { warp.turn[lowest] ^= 1; });
  acquire(key);
}

CUDA_ON_CPU_UNWATCHED inline void fence() {
  release(&simulator().fence);
  acquire(&simulator().fence);
}

// Until the wait, the destination is NaN.
CUDA_ON_CPU_UNWATCHED inline void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  Thread& me = *simulator().running;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || addresses % bytes != 0 || zeros > bytes)
    fail("%s copies %zu bytes, %zu of them zeros, from %p to %p: cp.async takes 4, 8 or 16, aligned to their number",
         text_of(me).c_str(), bytes, zeros, from, to);
  if (me.copy_count == kMaxCopies) fail("%s has more than %d cp.async on their way", text_of(me).c_str(), kMaxCopies);
  std::memset(to, 0xff, bytes);
  me.copies[me.copy_count++] = {to, from, bytes, zeros, me.groups};
}
CUDA_ON_CPU_UNWATCHED inline void commit_copies() { ++simulator().running->groups; }
CUDA_ON_CPU_UNWATCHED inline void wait_for_copies(int groups_left) {
  Thread& me = *simulator().running;
  int kept = 0;
  for (int i = 0; i < me.copy_count; ++i) {
    const Copy copy = me.copies[i];
    if (copy.group >= me.groups - groups_left) {
      me.copies[kept++] = copy;
      continue;
    }
    std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
    std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
  }
  me.copy_count = kept;
}

}  // namespace cuda_on_cpu
