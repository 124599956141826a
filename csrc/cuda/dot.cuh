// Attention by dot products. A step reads each number of its keys once, also where they are the values: the block's
// threads share the features, and a thread copies the parts of the next keys that it will need itself to shared memory.
#pragma once

#include "forward.cuh"
#include "platform.cuh"
#include "problem.cuh"
#include "products.cuh"
#include "scores.cuh"

namespace attnext::cuda {

constexpr int kDotQueries = 8;  // of a step at most
// Keys of a step that come together. The sums of all pairs fill a warp, or a quarter.
template <int kQ>
constexpr int kDotKeys = kQ == 1 ? 8 : 4;
template <int kQ>
constexpr int kDotSums = kQ * kDotKeys<kQ>;

// A thread's part of a row at a time: 16 bytes, or a number.
template <bool kAligned, class T>
constexpr int kPart = kAligned ? 16 / int(sizeof(T)) : 1;

// The shared memory of a step.
struct DotTile {
  bool aligned;   // rows begin at multiples of 16 bytes, and are as long
  int keys;       // at a time, in two stages in turn
  int row;        // numbers of a stage for each key: its features and, where they are others, its values
  int values_at;  // where in these the values begin
  int totals;     // numbers for each query: its sums over the keys
};

// A block's shared memory, in this order; what is the warp's own is the same in all warps.
template <class T, int kQ>
struct DotBlock {
  float* totals;   // (Tq, tile.totals)
  T* stage;        // (2, keys, row)
  float* partial;  // (2, warps, kDotSums)
  float* slots;    // a warp's own: of each pair, queries first
  float* factors;  // a warp's own: of each query

  static constexpr int kSums = kDotSums<kQ>;

  __device__ DotBlock(float* shared, const DotTile& tile, int queries) : totals(shared) {
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    stage = reinterpret_cast<T*>(totals + queries * tile.totals);
    partial = reinterpret_cast<float*>(stage + 2 * tile.keys * tile.row);
    slots = partial + (2 * warps + warp) * kSums;
    factors = partial + 3 * warps * kSums + warp * kQ;
  }

  // What stands behind the stages.
  static constexpr int bytes_of_sums(int warps) { return warps * (3 * kSums + kQ) * int(sizeof(float)); }

  // Leaves the sums of the block's threads in `partial`, for all. Two of it in turn: who is already at the next tile
  // does not write to what others still read.
  __device__ __forceinline__ void add(float (&sum)[kSums], int turn) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const float mine = warp_sums(sum);
    if (lane < kSums) partial[(turn * warps + warp) * kSums + lane] = mine;
    __syncthreads();
  }
  __device__ __forceinline__ float sum_of(int n, int turn) const {
    const int warps = blockDim.x / kWarp;
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) total += partial[(turn * warps + warp) * kSums + n];
    return total;
  }
};

// Starts the copy of this thread's parts of a row.
template <bool kAligned, class T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int columns) {
  constexpr int kNumbers = kPart<kAligned, T>;
#pragma unroll 4
  for (int d = threadIdx.x * kNumbers; d < columns; d += blockDim.x * kNumbers) {
    if constexpr (kNumbers * sizeof(T) >= 4)
      __pipeline_memcpy_async(to + d, from + d, kNumbers * sizeof(T));
    else
      to[d] = from[d];
  }
}

// The same of `count` keys from j0 on.
template <bool kAligned, class T>
__device__ void copy_keys(T* to, const Problem<T>& p, const Rows<T>& value, const DotTile& tile, int64_t b, int j0,
                          int count) {
  for (int n = 0; n < count; ++n, to += tile.row) {
    copy_row<kAligned>(to, p.key.at(b, j0 + n), p.features);
    if (tile.values_at > 0) copy_row<kAligned>(to + tile.values_at, value.at(b, j0 + n), p.values);
  }
  __pipeline_commit();
}

// This thread's parts of the keys' rows at column d; 0 beyond `count`.
template <class T, int kKeys, int kNumbers>
__device__ void load_parts(const T* stage, int row, int count, int d, float (&out)[kKeys][kNumbers]) {
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    if (n < count) {
      load_part(stage + n * row + d, out[n]);
    } else {
#pragma unroll
      for (int c = 0; c < kNumbers; ++c) out[n][c] = 0;
    }
  }
}

// Adds this thread's parts of the products of kQ rows of x with kKeys of the stage to kQ kKeys sums from `first` on.
template <bool kAligned, int kQ, int kKeys, int kSums, class T>
__device__ void add_products(float (&sum)[kSums], int first, const T* stage, int row, int count, const Rows<T>& x,
                             int64_t b, int queries, int columns) {
  constexpr int kNumbers = kPart<kAligned, T>;
  for (int d = threadIdx.x * kNumbers; d < columns; d += blockDim.x * kNumbers) {
    float y[kKeys][kNumbers];
    load_parts(stage, row, count, d, y);
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      if (q >= queries) continue;
      float of_query[kNumbers];
      load_part(x.at(b, q) + d, of_query);
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int c = 0; c < kNumbers; ++c)
          sum[first + q * kKeys + n] = fmaf(of_query[c], y[n][c], sum[first + q * kKeys + n]);
    }
  }
}

// The softmax of a lane's query, lane % kDotSums / kKeys, so far; a lane has a key of each tile, lane % kKeys. Returns
// exp(s - top), and in `shrink` by how much what was summed before shrinks.
template <int kKeys>
__device__ __forceinline__ float add_scores(Softmax<1>& softmax, float s, float& shrink) {
  float high = s;
#pragma unroll
  for (int step = 1; step < kKeys; step *= 2) high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, step));
  high = fmaxf(softmax.top[0], high);
  const float shift = high == -INFINITY ? 0.0f : high, e = expf(s - shift);
  float sum = e;
#pragma unroll
  for (int step = 1; step < kKeys; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  shrink = expf(softmax.top[0] - shift);
  softmax.total[0] = softmax.total[0] * shrink + sum;
  softmax.top[0] = high;
  return e;
}

// Adds a tile's values, times the slots, to the totals, shrunk by the factors: this thread's columns.
template <bool kAligned, class T, int kQ>
__device__ void add_tile(const DotBlock<T, kQ>& block, const T* values, const Problem<T>& p, const DotTile& tile,
                         int count) {
  constexpr int kNumbers = kPart<kAligned, T>, kKeys = kDotKeys<kQ>;
  for (int h = threadIdx.x * kNumbers; h < p.values; h += blockDim.x * kNumbers) {
    float v[kKeys][kNumbers];
    load_parts(values, tile.row, count, h, v);
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      if (q >= p.queries) continue;
      float* total = block.totals + q * tile.totals + h;
      const float shrink = block.factors[q];
      float sum[kNumbers], weights[kKeys];
      load_floats(total, sum);
      load_floats(block.slots + q * kKeys, weights);
#pragma unroll
      for (int c = 0; c < kNumbers; ++c) sum[c] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        if (weights[n] == 0 && p.slots.mask) continue;  // it hides a NaN
#pragma unroll
        for (int c = 0; c < kNumbers; ++c) sum[c] = fmaf(weights[n], v[n][c], sum[c]);
      }
      store_floats(total, sum);
    }
  }
}

// Scores, softmax and sums of the keys [first_key, stop), by a block.
template <bool kAligned, class T, int kQ>
__device__ void walk(const DotBlock<T, kQ>& block, Softmax<1>& softmax, const Problem<T>& p, const Forward<T>& out,
                     const DotTile& tile, int64_t b, int first_key, int stop) {
  constexpr int kKeys = kDotKeys<kQ>, kSums = kDotSums<kQ>;
  const int lane = threadIdx.x % kWarp, q = lane % kSums / kKeys, n = lane % kKeys;
  copy_keys<kAligned>(block.stage, p, out.value, tile, b, first_key, min(tile.keys, stop - first_key));
  for (int j0 = first_key, turn = 0; j0 < stop; j0 += tile.keys, turn ^= 1) {
    const int next = j0 + tile.keys, count = min(tile.keys, stop - j0);
    if (next < stop)
      copy_keys<kAligned>(block.stage + (turn ^ 1) * tile.keys * tile.row, p, out.value, tile, b, next,
                          min(tile.keys, stop - next));
    else
      __pipeline_commit();  // of nothing
    __pipeline_wait_prior(1);
    const T* rows = block.stage + turn * tile.keys * tile.row;
    float sum[kSums] = {};
    add_products<kAligned, kQ, kKeys>(sum, 0, rows, tile.row, count, p.query, b, p.queries, p.features);
    block.add(sum, turn);
    const int j = j0 + n;
    const bool inside = q < p.queries && n < count;
    const float s = inside && p.slots.shows(b, q, j) ? p.scale * block.sum_of(lane % kSums, turn) : -INFINITY;
    if (out.raw && inside && threadIdx.x < kSums) out.raw[(b * p.queries + q) * p.keys + j] = s;
    float shrink;
    const float e = add_scores<kKeys>(softmax, s, shrink);
    __syncwarp();  // the slots of the tile before have been read
    if (lane < kSums) {
      block.slots[lane] = e * kept(p.dropout, b * p.queries + q, j);
      if (n == 0) block.factors[q] = shrink;
    }
    __syncwarp();
    add_tile<kAligned>(block, rows + tile.values_at, p, tile, count);
  }
}

// Context or its part, and what is known of the softmax, by the whole block.
template <class T, int kQ>
__device__ void leave(const DotBlock<T, kQ>& block, const Softmax<1>& softmax, const Problem<T>& p,
                      const Forward<T>& out, const DotTile& tile, int64_t b, int split, int stop) {
  constexpr int kKeys = kDotKeys<kQ>, kSums = kDotSums<kQ>;
  const int lane = threadIdx.x % kWarp, q = lane % kSums / kKeys;
  const int64_t rows = int64_t(p.batch) * p.queries, first_row = b * p.queries;
  const bool first = threadIdx.x < kSums && lane % kKeys == 0 && q < p.queries;
  const float lse = softmax.log_sum_exp(0);
  if (first && out.splits > 1) {
    out.part_max[split * rows + first_row + q] = softmax.top[0];
    out.part_sum[split * rows + first_row + q] = softmax.total[0];
  } else if (first) {
    out.log_sum_exp[first_row + q] = lse;
  }
  __syncwarp();
  if (lane < kSums && lane % kKeys == 0) {
    const float gain = softmax.total[0] == 0 ? 0.0f : reciprocal(softmax.total[0]);
    block.factors[q] = out.splits > 1 ? 1.0f : gain;
    block.slots[q] = lse;
  }
  __syncwarp();
  for (int i = 0; i < p.queries; ++i)
    for (int h = threadIdx.x; h < p.values; h += blockDim.x) {
      const float total = block.totals[i * tile.totals + h] * block.factors[i];
      if (out.splits > 1)
        out.part[(split * rows + first_row + i) * p.values + h] = total;
      else
        out.context[(first_row + i) * p.values + h] = from_float<T>(total);
    }
  if (!out.weights || out.splits > 1) return;
  for (int i = threadIdx.x / kWarp; i < p.queries; i += blockDim.x / kWarp)
    write_weights(p, out.raw, out.weights, first_row + i, stop, block.slots[i]);
}

// A block for up to kQ queries, whose rows are contiguous, over the keys of its split.
template <class T, int kQ>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dot_step(const __grid_constant__ Problem<T> p, const __grid_constant__ Forward<T> out,
             const __grid_constant__ DotTile tile) {
  ATTNEXT_SHARED(float, shared);
  const int64_t b = blockIdx.x / out.splits;
  const int split = int(blockIdx.x % out.splits);
  const int first_key = split * out.keys_each, end = min(first_key + out.keys_each, p.keys);
  const int stop = min(end, p.slots.length(b, p.keys));
  const DotBlock<T, kQ> block(shared, tile, p.queries);
  for (int n = threadIdx.x; n < p.queries * tile.totals; n += blockDim.x) block.totals[n] = 0;
  __syncthreads();
  Softmax<1> softmax;
  if (first_key < stop && tile.aligned) walk<true>(block, softmax, p, out, tile, b, first_key, stop);
  if (first_key < stop && !tile.aligned) walk<false>(block, softmax, p, out, tile, b, first_key, stop);
  __syncthreads();  // the totals, and the raw scores, are there for all
  leave(block, softmax, p, out, tile, b, split, stop);
}

template <int kQ, int kK>
__device__ __forceinline__ void scale_all(float (&s)[kQ][kK], float scale) {
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) s[q][k] *= scale;
}

constexpr int kDotForwardShared = int(sizeof(ProductStage)) + kQueryBlock * kKeyBlock * int(sizeof(float));

// Many queries, as `forward` has them: a block for 16, 4 a warp, over the keys of its split in tiles of 128.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dot_forward(const __grid_constant__ Problem<T> p, const __grid_constant__ Forward<T> out) {
  constexpr int kQ = kQueryBlock / kWarpsPerBlock, kK = kKeyBlock / kWarp;
  ATTNEXT_SHARED(ProductStage, stage);
  const int warp = threadIdx.x / kWarp, tiles = (p.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t b = blockIdx.x / tiles;
  const int block_i0 = int(blockIdx.x % tiles) * kQueryBlock, i0 = block_i0 + warp * kQ, split = blockIdx.y;
  float* probabilities = reinterpret_cast<float*>(stage + 1) + warp * kQ * kKeyBlock;
  const int first_key = split * out.keys_each, end = min(first_key + out.keys_each, p.keys);
  const int stop = min(end, p.slots.length(b, p.keys));
  Softmax<kQ> softmax;
  for (int j0 = first_key; j0 < stop; j0 += kKeyBlock) {
    float s[kQ][kK];
    block_products(s, *stage, p.query, p.key, p.queries, p.keys, p.features, b, block_i0, j0);
    scale_all(s, p.scale);
    hide_and_write(s, p, out, 0.0f, b, i0, j0, stop);
    attend_tile(s, softmax, probabilities, p, out, b, split, i0, j0, stop, j0 == first_key, j0 + kKeyBlock >= stop);
  }
  finish(softmax, p, out, b, split, i0, first_key, stop, end);
}

}  // namespace attnext::cuda
