#include "cpu/scratch.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace attnext::cpu {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kLeast = size_t(1) << 20;  // bytes of a first chunk
constexpr size_t kKept = size_t(1) << 26;   // a thread keeps no more than this
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kApart = true;  // each piece in memory of its own, so that its ends are watched
#else
constexpr bool kApart = false;
#endif

std::atomic<bool> poison{false};

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(kLine)); }
};

struct Chunk {
  explicit Chunk(size_t bytes) : data(::operator new(bytes, std::align_val_t(kLine))), size(bytes) {}
  std::unique_ptr<void, Free> data;
  size_t size;
};

// Chunks of a thread, filled one after the other: up to `used` bytes of chunk number `chunk`.
struct Memory {
  std::vector<Chunk> chunks;
  size_t chunk = 0, used = 0, depth = 0;
};
thread_local Memory memory;

}  // namespace

Scratch::Scratch() : chunk_(memory.chunk), used_(memory.used) { ++memory.depth; }

Scratch::~Scratch() {
  memory.chunk = chunk_, memory.used = used_;
  size_t total = 0;
  for (const Chunk& chunk : memory.chunks) total += chunk.size;
  if (--memory.depth > 0 || (memory.chunks.size() < 2 && total <= kKept && !kApart)) return;
  // One chunk that would have held it all serves the next call.
  memory.chunks.clear();
  if (total <= kKept && !kApart) {
    try {
      memory.chunks.emplace_back(total);
    } catch (const std::bad_alloc&) {  // then the next call asks for it
    }
  }
}

void* Scratch::take_bytes(size_t bytes) {
  Memory& m = memory;
  bytes = std::max(kLine, (bytes + kLine - 1) / kLine * kLine);
  if (m.chunks.empty() || kApart || m.used + bytes > m.chunks[m.chunk].size) {
    m.chunk = m.chunks.empty() ? 0 : m.chunk + 1;
    m.used = 0;
    // Chunks beyond this one are not in use: they are too small, or the thread would have taken from them.
    m.chunks.erase(m.chunks.begin() + std::ptrdiff_t(std::min(m.chunk, m.chunks.size())), m.chunks.end());
    m.chunks.emplace_back(kApart ? bytes : std::max(bytes, kLeast));
  }
  void* result = static_cast<char*>(m.chunks[m.chunk].data.get()) + m.used;
  m.used += bytes;
  if (poisoned()) std::memset(result, 0xff, bytes);
  return result;
}

bool poisoned() { return poison.load(std::memory_order_relaxed); }

void set_poison(bool on) { poison.store(on, std::memory_order_relaxed); }

}  // namespace attnext::cpu
