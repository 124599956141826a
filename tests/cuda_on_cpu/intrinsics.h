// The names of CUDA C++ that kernels use, in terms of the simulator. Approximate functions are accurate here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "block.h"

namespace cuda_on_cpu {

CUDA_ON_CPU_UNWATCHED inline uint3 thread_index() { return simulator().running->index; }
CUDA_ON_CPU_UNWATCHED inline uint3 block_index() { return simulator().block_index; }
CUDA_ON_CPU_UNWATCHED inline dim3 block_size() { return simulator().block; }
CUDA_ON_CPU_UNWATCHED inline dim3 grid_size() { return simulator().grid; }
CUDA_ON_CPU_UNWATCHED inline void* shared_memory() { return simulator().shared; }
CUDA_ON_CPU_UNWATCHED inline int lane() { return simulator().running->lane; }

inline void check_width(int width, const char* primitive) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)))
    fail("%s with width %d, which is not a power of two up to 32", primitive, width);
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// Relaxed, as on a GPU: an atomic orders no other access.
template <class T, class Update>
T update_atomically(T* address, Update update) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits before = __atomic_load_n(bits, __ATOMIC_RELAXED), after;
  do {
    after = bits_as<Bits>(T(update(bits_as<T>(before))));
  } while (!__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return bits_as<T>(before);
}

// An argument that is converted to the type of another, as in a function that is no template.
template <class T>
using Same = std::common_type_t<T>;

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())
#define gridDim (cuda_on_cpu::grid_size())
constexpr int warpSize = cuda_on_cpu::kWarpSize;

inline void __syncthreads(cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::barrier(__func__, false, place);
}
inline int __syncthreads_or(int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  return cuda_on_cpu::barrier(__func__, predicate, place) > 0;
}
inline int __syncthreads_and(int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  return cuda_on_cpu::barrier(__func__, !predicate, place) == 0;
}
inline int __syncthreads_count(int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  return cuda_on_cpu::barrier(__func__, predicate, place);
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::sync_warp(mask, place);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::check_width(width, __func__);
  const int first = cuda_on_cpu::lane() / width * width;
  return cuda_on_cpu::shuffle(__func__, mask, value, first + (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize,
                  cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::check_width(width, __func__);
  const int lane = cuda_on_cpu::lane(), source = lane ^ (lanes & (warpSize - 1));
  return cuda_on_cpu::shuffle(__func__, mask, value, source / width > lane / width ? lane : source, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::check_width(width, __func__);
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(__func__, mask, value, unsigned(lane % width) < delta ? lane : lane - int(delta), place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  cuda_on_cpu::check_width(width, __func__);
  const int lane = cuda_on_cpu::lane();
  const bool inside = delta < unsigned(width - lane % width);
  return cuda_on_cpu::shuffle(__func__, mask, value, inside ? lane + int(delta) : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  return cuda_on_cpu::ballot(__func__, mask, predicate, place);
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  return cuda_on_cpu::ballot(__func__, mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::here()) {
  return cuda_on_cpu::ballot(__func__, mask, !predicate, place) == 0;
}

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }

template <class T>
T atomicAdd(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old + value; });
}
template <class T>
T atomicSub(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old - value; });
}
template <class T>
T atomicMin(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicAnd(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old | value; });
}
template <class T>
T atomicXor(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* address, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, cuda_on_cpu::Same<T> expected, cuda_on_cpu::Same<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return cuda_on_cpu::update_atomically(address, [&](unsigned old) { return old >= last ? 0 : old + 1; });
}

// Cache hints.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, cuda_on_cpu::Same<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, cuda_on_cpu::Same<T> value) {
  *address = value;
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  cuda_on_cpu::copy_async(to, from, bytes, zeros);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t groups_left) { cuda_on_cpu::wait_for_copies(int(groups_left)); }

using std::max;
using std::min;

// C linkage and noexcept, as the C library's headers have them where they declare the same name.
extern "C" {
inline float rsqrtf(float x) noexcept { return 1.f / sqrtf(x); }
inline float __expf(float x) noexcept { return expf(x); }
inline float __exp10f(float x) noexcept { return powf(10.f, x); }
inline float __logf(float x) noexcept { return logf(x); }
inline float __log2f(float x) noexcept { return log2f(x); }
inline float __log10f(float x) noexcept { return log10f(x); }
inline float __powf(float x, float y) noexcept { return powf(x, y); }
inline float __sinf(float x) noexcept { return sinf(x); }
inline float __cosf(float x) noexcept { return cosf(x); }
inline float __tanhf(float x) noexcept { return tanhf(x); }
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }

inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits_as<double>(x); }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
