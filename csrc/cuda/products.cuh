// Products of rows with rows in tiles of pairs: x_i . y_j for kQ queries of a warp and kK keys of each lane.
#pragma once

#include "platform.cuh"
#include "problem.cuh"
#include "scores.cuh"

namespace attnext::cuda {

constexpr int kProductChunk = 16;  // columns that a block holds at a time

// A block's part of the rows of keys and of queries, columns first. Rows are two numbers longer, so that the threads of
// a warp, which come with the columns of two rows, store to different banks.
struct ProductStage {
  float keys[kProductChunk][kKeyBlock + 2];
  float queries[kProductChunk][kQueryBlock + 2];
};

// The same pairs as block_scores'; the columns of `of_keys` are neighbours. All threads of the block call it.
template <class T, int kQ, int kK>
__device__ __forceinline__ void block_products(float (&product)[kQ][kK], ProductStage& stage, const Rows<T>& of_queries,
                                               const Rows<T>& of_keys, int queries, int keys, int columns, int64_t b,
                                               int i0, int j0) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) product[q][k] = 0;
  for (int h0 = 0; h0 < columns; h0 += kProductChunk) {
#pragma unroll 8
    for (int n = threadIdx.x; n < kKeyBlock * kProductChunk; n += kThreads) {
      const int j = n / kProductChunk, c = n % kProductChunk;
      const bool inside = j0 + j < keys && h0 + c < columns;
      stage.keys[c][j] = inside ? to_float(of_keys.at(b, j0 + j)[h0 + c]) : 0.0f;
    }
    for (int n = threadIdx.x; n < kQueryBlock * kProductChunk; n += blockDim.x) {
      const int i = n / kProductChunk, c = n % kProductChunk;
      const bool inside = i0 + i < queries && h0 + c < columns;
      stage.queries[c][i] = inside ? to_float(of_queries.at(b, i0 + i)[(h0 + c) * of_queries.column]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kProductChunk; ++c) {
      float y[kK], x[kQ];
#pragma unroll
      for (int k = 0; k < kK; k += 2) {
        const float2 two = load2(&stage.keys[c][key_of(lane, k)]);
        y[k] = two.x, y[k + 1] = two.y;
      }
#pragma unroll
      for (int q = 0; q < kQ; ++q) x[q] = stage.queries[c][warp * kQ + q];
#pragma unroll
      for (int q = 0; q < kQ; ++q)
#pragma unroll
        for (int k = 0; k < kK; ++k) product[q][k] = fmaf(x[q], y[k], product[q][k]);
    }
    __syncthreads();
  }
}

}  // namespace attnext::cuda
