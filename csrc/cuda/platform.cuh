// What the kernels take from their compiler: nvcc, or g++ with the test harness that runs them on the CPU, which
// defines ATTNEXT_CUDA_ON_CPU and the same names (tests/cuda_on_cpu).
#pragma once

#if !defined(ATTNEXT_CUDA_ON_CPU)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#define ATTNEXT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define ATTNEXT_SHARED(T, name)                                 \
  extern __shared__ __align__(16) unsigned char shared_bytes[]; \
  T* name = reinterpret_cast<T*>(shared_bytes)
#endif

#include <cstdint>

namespace attnext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 1/x to an ulp, 0 for what is beyond 2^126: the hardware's own estimate.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(ATTNEXT_CUDA_ON_CPU)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 2^x to two ulps, 0 for what is below 2^-126: the hardware's own estimate.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(ATTNEXT_CUDA_ON_CPU)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The smaller of the two; a NaN stays one.
__device__ __forceinline__ float at_most(float x, float limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
  return y;
#else
  return x > limit ? limit : x;
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Four numbers from an address that is a multiple of their size.
__device__ __forceinline__ void load4(const float* x, float (&out)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(x);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}

template <class T>
__device__ __forceinline__ void load4(const T* x, float (&out)[4]) {
  static_assert(sizeof(T) == 2);
  union {
    uint2 bits;
    T numbers[4];
  } v{*reinterpret_cast<const uint2*>(x)};
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = to_float(v.numbers[k]);
}

// 16 bytes of numbers from or to an address that is a multiple of 16, or one number.
__device__ __forceinline__ void load_part(const float* x, float (&out)[4]) { load4(x, out); }

template <class T>
__device__ __forceinline__ void load_part(const T* x, float (&out)[8]) {
  static_assert(sizeof(T) == 2);
  union {
    uint4 bits;
    T numbers[8];
  } v{*reinterpret_cast<const uint4*>(x)};
#pragma unroll
  for (int k = 0; k < 8; ++k) out[k] = to_float(v.numbers[k]);
}

template <class T>
__device__ __forceinline__ void load_part(const T* x, float (&out)[1]) {
  out[0] = to_float(*x);
}

__device__ __forceinline__ void store_part(float* x, const float (&v)[4]) {
  *reinterpret_cast<float4*>(x) = make_float4(v[0], v[1], v[2], v[3]);
}

template <class T>
__device__ __forceinline__ void store_part(T* x, const float (&v)[8]) {
  static_assert(sizeof(T) == 2);
  union {
    T numbers[8];
    uint4 bits;
  } all{};
#pragma unroll
  for (int k = 0; k < 8; ++k) all.numbers[k] = from_float<T>(v[k]);
  *reinterpret_cast<uint4*>(x) = all.bits;
}

template <class T>
__device__ __forceinline__ void store_part(T* x, const float (&v)[1]) {
  *x = from_float<T>(v[0]);
}

// Two at a time: one instruction on 10.0 and 10.3 (on 12.0 it would be two).
__device__ __forceinline__ float2 fma2(float2 x, float2 y, float2 z) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200 && __CUDACC_VER_MAJOR__ >= 13
  return __ffma2_rn(x, y, z);
#else
  return make_float2(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
#endif
}

__device__ __forceinline__ float2 twice(float x) { return make_float2(x, x); }

__device__ __forceinline__ float2 load2(const float* x) { return *reinterpret_cast<const float2*>(x); }

// Neighbours in shared memory: one, or as many as an address that is a multiple of their size lets be a vector.
template <int kNumbers>
__device__ __forceinline__ void load_floats(const float* from, float (&out)[kNumbers]) {
  if constexpr (kNumbers == 1) {
    out[0] = *from;
  } else if constexpr (kNumbers == 2) {
    const float2 two = load2(from);
    out[0] = two.x, out[1] = two.y;
  } else {
#pragma unroll
    for (int c = 0; c < kNumbers; c += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + c);
      out[c] = four.x, out[c + 1] = four.y, out[c + 2] = four.z, out[c + 3] = four.w;
    }
  }
}

template <int kNumbers>
__device__ __forceinline__ void store_floats(float* to, const float (&x)[kNumbers]) {
  if constexpr (kNumbers == 1) {
    *to = x[0];
  } else {
#pragma unroll
    for (int c = 0; c < kNumbers; c += 4)
      *reinterpret_cast<float4*>(to + c) = make_float4(x[c], x[c + 1], x[c + 2], x[c + 3]);
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Adds up with the lanes on the other side: each keeps one half of x and gives the other, until one number is left.
template <int kHalf, int kCount>
__device__ __forceinline__ void halve(float (&x)[kCount]) {
  if constexpr (kHalf > 0) {
    const bool upper = threadIdx.x & kHalf;
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      const float give = upper ? x[n] : x[n + kHalf];
      x[n] = (upper ? x[n + kHalf] : x[n]) + __shfl_xor_sync(kAllLanes, give, kHalf);
    }
    halve<kHalf / 2>(x);
  }
}

// Sums over a warp of kCount numbers, a power of two up to 32: a lane returns that of number lane % kCount.
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&x)[kCount]) {
  halve<kCount / 2>(x);
#pragma unroll
  for (int step = kCount; step < kWarp; step *= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
  return x[0];
}

}  // namespace attnext::cuda
