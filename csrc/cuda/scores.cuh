// Scores of a tile of pairs: kQ queries of a warp, kK keys of each lane. Letters as in ARCHITECTURE.md.
#pragma once

#include "platform.cuh"
#include "problem.cuh"

namespace attnext::cuda {

// The key of a lane's k-th: two neighbours of 64 at a time, so that a vector load serves both.
__device__ __forceinline__ int key_of(int lane, int k) { return k / 2 * 2 * kWarp + 2 * lane + k % 2; }

// Adds w0 r0 + w1 r1 of two features, folded: 1 / y0 + 1 / y1 by one reciprocal.
template <int kQ, int kK>
__device__ __forceinline__ void add_pair(float (&s)[kQ][kK], const float2 (&e)[kQ], const float2 (&f)[kK], float2 c) {
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const float2 y = fma2(e[q], f[k], c);
      s[q][k] = fmaf(y.x + y.y, reciprocal(y.x * y.y), s[q][k]);
    }
}

template <int kQ, int kK>
__device__ __forceinline__ void unfold(float (&s)[kQ][kK], const Weights& weights) {
  const float limit = weights.limits()[0];
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k)
      // In this order, as kUnit limit may be below the smallest number; and rounded before anything is added to it.
      s[q][k] = __fmul_rn(__fmul_rn(s[q][k], kUnit), limit);
}

// The same for inputs of any size: exp of the sum itself saturates on both sides. i0 is the first query, j0 the tile's
// first key.
template <class T, int kQ, int kK>
__device__ __forceinline__ void far_scores(float (&s)[kQ][kK], const Problem<T>& p, const Weights& weights, int64_t b,
                                           int i0, int j0) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) s[q][k] = 0;
#pragma unroll 1
  for (int d = 0; d < p.features; ++d) {
    float x[kQ], y[kK];
#pragma unroll
    for (int q = 0; q < kQ; ++q) x[q] = i0 + q < p.queries ? to_float(p.query.at(b, i0 + q)[d * p.query.column]) : 0.0f;
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const int j = j0 + key_of(lane, k);
      y[k] = j < p.keys ? to_float(p.key.at(b, j)[d * p.key.column]) : 0.0f;
    }
    const float times = weights.times()[d];
#pragma unroll
    for (int q = 0; q < kQ; ++q)
#pragma unroll
      for (int k = 0; k < kK; ++k) s[q][k] = fmaf(times, reciprocal(expf(2 * (x[q] + y[k])) + 1), s[q][k]);
  }
}

// Whether folding is safe for kQ queries and the block of keys that j0 is in: one answer for the warp, and the same in
// forward, a step and backward, as their scores have to round alike.
template <class T, int kQ>
__device__ bool is_near(const Problem<T>& p, const Weights& weights, int64_t b, int i0, int j0) {
  float q_limit = 0, k_limit = 0;
#pragma unroll
  for (int q = 0; q < kQ; ++q) q_limit = fmaxf(q_limit, p.query_limit[b * p.query_rows + i0 + q]);
  const float* limits = p.key_limit + b * p.key_rows + j0 / kKeyBlock * kKeyBlock;
#pragma unroll
  for (int n = 0; n < kKeyBlock / kWarp; ++n) k_limit = fmaxf(k_limit, limits[n * kWarp + threadIdx.x % kWarp]);
  return q_limit + warp_max(k_limit) <= weights.limits()[1];
}

// A block's part of E, F and the offset, a few pairs at a time, two of them in turn.
struct Stage {
  float2 keys[2][kPairChunk][kKeyBlock];
  float2 queries[2][kPairChunk][kQueryBlock];
  float2 offset[2][kPairChunk];
};

// Starts the copy of kPairChunk pairs from p0 on.
template <class T>
__device__ void copy_pairs(Stage& stage, int half, const Problem<T>& p, const Weights& weights, int64_t b, int i0,
                           int j0, int p0) {
  const float2* keys = reinterpret_cast<const float2*>(p.exp_key) + (b * p.pairs + p0) * p.key_rows + j0;
  const float2* queries = reinterpret_cast<const float2*>(p.exp_query) + (b * p.pairs + p0) * p.query_rows + i0;
  const float2* offset = reinterpret_cast<const float2*>(weights.offset()) + p0;
  // 16 bytes each, two numbers of a row.
  constexpr int kKeyCopies = kPairChunk * kKeyBlock / 2, kQueryCopies = kPairChunk * kQueryBlock / 2;
  static_assert(kKeyCopies % kThreads == 0 && kQueryCopies + kPairChunk / 2 <= kThreads);
  const int thread = threadIdx.x;
#pragma unroll
  for (int n = 0; n < kKeyCopies / kThreads; ++n) {
    const int at = n * kThreads + thread, pair = at / (kKeyBlock / 2), j = at % (kKeyBlock / 2) * 2;
    __pipeline_memcpy_async(&stage.keys[half][pair][j], keys + int64_t(pair) * p.key_rows + j, 16);
  }
  if (thread < kQueryCopies) {
    const int pair = thread / (kQueryBlock / 2), i = thread % (kQueryBlock / 2) * 2;
    __pipeline_memcpy_async(&stage.queries[half][pair][i], queries + int64_t(pair) * p.query_rows + i, 16);
  } else if (thread < kQueryCopies + kPairChunk / 2) {
    const int pair = (thread - kQueryCopies) * 2;
    __pipeline_memcpy_async(&stage.offset[half][pair], offset + pair, 16);
  }
  __pipeline_commit();
}

// Scores of kQ queries from i0 + warp kQ on and the block's kKeyBlock keys from j0 on, w r summed: scale * (v . tanh -
// sum v). All threads of the block call it.
template <class T, int kQ, int kK>
__device__ __forceinline__ void block_scores(float (&s)[kQ][kK], Stage& stage, const Problem<T>& p,
                                             const Weights& weights, int64_t b, int i0, int j0) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) s[q][k] = 0;
  copy_pairs(stage, 0, p, weights, b, i0, j0, 0);
  for (int p0 = 0, half = 0; p0 < p.pairs; p0 += kPairChunk, half ^= 1) {
    if (p0 + kPairChunk < p.pairs) {
      copy_pairs(stage, half ^ 1, p, weights, b, i0, j0, p0 + kPairChunk);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kPairChunk; ++n) {
      float2 e[kQ], f[kK];
#pragma unroll
      for (int q = 0; q < kQ; q += 2) {
        const float4 v = *reinterpret_cast<const float4*>(&stage.queries[half][n][warp * kQ + q]);
        e[q] = make_float2(v.x, v.y), e[q + 1] = make_float2(v.z, v.w);
      }
#pragma unroll
      for (int k = 0; k < kK; k += 2) {
        const float4 v = *reinterpret_cast<const float4*>(&stage.keys[half][n][key_of(lane, k)]);
        f[k] = make_float2(v.x, v.y), f[k + 1] = make_float2(v.z, v.w);
      }
      add_pair(s, e, f, stage.offset[half][n]);
    }
    __syncthreads();
  }
  if (is_near<T, kQ>(p, weights, b, i0 + warp * kQ, j0))
    unfold(s, weights);
  else
    far_scores(s, p, weights, b, i0 + warp * kQ, j0);
}

// The same for one warp alone, which reads each byte of F once, from memory to registers.
template <class T, int kQ, int kK>
__device__ __forceinline__ void warp_scores(float (&s)[kQ][kK], const Problem<T>& p, const Weights& weights, int64_t b,
                                            int i0, int j0) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) s[q][k] = 0;
  if (!is_near<T, kQ>(p, weights, b, i0, j0)) return far_scores(s, p, weights, b, i0, j0);
  const float2* keys = reinterpret_cast<const float2*>(p.exp_key) + b * p.pairs * p.key_rows + j0;
  const float2* queries = reinterpret_cast<const float2*>(p.exp_query) + b * p.pairs * p.query_rows + i0;
  const float2* offset = reinterpret_cast<const float2*>(weights.offset());
#pragma unroll 4
  for (int n = 0; n < p.pairs; ++n) {
    float2 e[kQ], f[kK];
#pragma unroll
    for (int k = 0; k < kK; k += 2) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(keys + int64_t(n) * p.key_rows + key_of(lane, k)));
      f[k] = make_float2(v.x, v.y), f[k + 1] = make_float2(v.z, v.w);
    }
#pragma unroll
    for (int q = 0; q < kQ; ++q) e[q] = __ldg(queries + int64_t(n) * p.query_rows + q);
    add_pair(s, e, f, __ldg(offset + n));
  }
  unfold(s, weights);
}

__device__ __forceinline__ uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The factor of the weight of key j in a row, counted over batch and queries: the hash of reference.dropout_keep.
__device__ __forceinline__ float kept(const Dropout& dropout, uint64_t row, int j) {
  if (!dropout.seed) return 1.0f;
  const uint64_t seed = uint64_t(*dropout.seed);
  const uint32_t row_hash = mix((mix(uint32_t(row) ^ uint32_t(seed)) + uint32_t(row >> 32)) ^ uint32_t(seed >> 32));
  return mix(row_hash ^ mix(uint32_t(j))) >= dropout.threshold ? dropout.gain : 0.0f;
}

}  // namespace attnext::cuda
