// The gradients of attention by dot products. A step reads its keys once and writes each of their gradients once; with
// more queries, ds and p of a slab of them stand between two launches, as in backward.cuh.
#pragma once

#include "backward.cuh"
#include "dot.cuh"

namespace attnext::cuda {

// Where the gradients go.
template <class T>
struct DotGradients {
  bool shared;                   // the keys are the values
  T *key, *value;                // (B, Tk, D) and (B, Tk, H)
  float *key_sums, *value_sums;  // the same, of the slabs before
  float* query_parts;            // (query_splits, B, Tq, D)
  int query_splits, keys_each;
  bool last;  // slab
};

// ds times the scale, and the weight after dropout, of query i and key j, from their score and dC . h.
template <class T>
__device__ __forceinline__ float2 slope_and_weight(const Problem<T>& p, const Backward<T>& g, int64_t b, int i, int j,
                                                   float s, float dp) {
  const int64_t row = b * p.queries + i;
  const float lse = g.log_sum_exp[row];
  if (lse == -INFINITY || !p.slots.shows(b, i, j)) return make_float2(0, 0);
  const float below = s - lse, factor = kept(p.dropout, row, j);
  const float probability = expf(below > 0 ? 0.0f : below);  // a NaN stays one
  if (g.grad_weights.data) dp += to_float(g.grad_weights.at(b, i)[j * g.grad_weights.column]);
  const float ds = probability == 0 ? 0.0f : probability * fmaf(factor, dp, -g.delta[row]);
  return make_float2(p.scale * ds, probability * factor);
}

// Adds x of kQ queries at column d, times their slots with the keys, to the keys' sums. 0 hides a NaN.
template <int kQ, int kKeys, class T, int kNumbers>
__device__ void add_queries_of(float (&sum)[kKeys][kNumbers], const float* slots, const Rows<T>& x, int64_t b,
                               int queries, int d) {
#pragma unroll
  for (int q = 0; q < kQ; ++q) {
    if (q >= queries) continue;
    float of_query[kNumbers], of_keys[kKeys];
    load_part(x.at(b, q) + d, of_query);
    load_floats(slots + q * kKeys, of_keys);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      if (of_keys[n] == 0) continue;
#pragma unroll
      for (int c = 0; c < kNumbers; ++c) sum[n][c] = fmaf(of_keys[n], of_query[c], sum[n][c]);
    }
  }
}

// Writes the rows of `count` keys at column d.
template <class T, int kKeys, int kNumbers>
__device__ void store_parts(T* out, int row, int count, int d, const float (&sum)[kKeys][kNumbers]) {
#pragma unroll
  for (int n = 0; n < kKeys; ++n)
    if (n < count) store_part(out + int64_t(n) * row + d, sum[n]);
}

// A tile's part of the gradients, in this thread's columns: the queries' to the totals, the keys' and values' to
// memory. Slots: ds of all pairs, and the weights behind them.
template <bool kAligned, int kKeys, class T, int kQ>
__device__ void tile_gradients(const DotBlock<T, kQ>& block, const T* rows, const Problem<T>& p, const Backward<T>& g,
                               const DotGradients<T>& to, const DotTile& tile, int64_t b, int j0, int count) {
  constexpr int kNumbers = kPart<kAligned, T>;
  const float* weights = block.slots + kQ * kKeys;
  for (int d = threadIdx.x * kNumbers; d < p.features; d += blockDim.x * kNumbers) {
    float y[kKeys][kNumbers], sum[kKeys][kNumbers] = {};
    load_parts(rows, tile.row, count, d, y);
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      if (q >= p.queries) continue;
      float* total = block.totals + q * tile.totals + d;
      float of_query[kNumbers], slopes[kKeys];
      load_floats(total, of_query);
      load_floats(block.slots + q * kKeys, slopes);
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        if (slopes[n] == 0) continue;  // it hides a NaN
#pragma unroll
        for (int c = 0; c < kNumbers; ++c) of_query[c] = fmaf(slopes[n], y[n][c], of_query[c]);
      }
      store_floats(total, of_query);
    }
    add_queries_of<kQ>(sum, block.slots, p.query, b, p.queries, d);
    if (to.shared && g.grad_context.data) add_queries_of<kQ>(sum, weights, g.grad_context, b, p.queries, d);
    store_parts(to.key + (b * p.keys + j0) * p.features, p.features, count, d, sum);
  }
  if (to.shared) return;
  for (int h = threadIdx.x * kNumbers; h < p.values; h += blockDim.x * kNumbers) {
    float sum[kKeys][kNumbers] = {};
    if (g.grad_context.data) add_queries_of<kQ>(sum, weights, g.grad_context, b, p.queries, h);
    store_parts(to.value + (b * p.keys + j0) * p.values, p.values, count, h, sum);
  }
}

// The gradients of the keys [first_key, stop), by a block. Half the keys of a step at a time, so that the sums of both
// products are as many: a score is then added up as it was in forward.
template <bool kAligned, class T, int kQ>
__device__ void walk_back(const DotBlock<T, kQ>& block, const Problem<T>& p, const Backward<T>& g,
                          const DotGradients<T>& to, const DotTile& tile, int64_t b, int first_key, int stop) {
  constexpr int kKeys = kDotKeys<kQ> / 2, kPairs = kQ * kKeys;
  const int lane = threadIdx.x % kWarp, q = lane % kPairs / kKeys, n = lane % kKeys;
  copy_keys<kAligned>(block.stage, p, g.value, tile, b, first_key, min(tile.keys, stop - first_key));
  for (int j0 = first_key, turn = 0; j0 < stop; j0 += tile.keys, turn ^= 1) {
    const int next = j0 + tile.keys, count = min(tile.keys, stop - j0);
    if (next < stop)
      copy_keys<kAligned>(block.stage + (turn ^ 1) * tile.keys * tile.row, p, g.value, tile, b, next,
                          min(tile.keys, stop - next));
    else
      __pipeline_commit();  // of nothing
    __pipeline_wait_prior(1);
    const T* rows = block.stage + turn * tile.keys * tile.row;
    float sum[2 * kPairs] = {};
    add_products<kAligned, kQ, kKeys>(sum, 0, rows, tile.row, count, p.query, b, p.queries, p.features);
    if (g.grad_context.data)
      add_products<kAligned, kQ, kKeys>(sum, kPairs, rows + tile.values_at, tile.row, count, g.grad_context, b,
                                        p.queries, p.values);
    block.add(sum, turn);
    float2 pair = make_float2(0, 0);
    if (q < p.queries && n < count)
      pair = slope_and_weight(p, g, b, q, j0 + n, p.scale * block.sum_of(lane % kPairs, turn),
                              block.sum_of(kPairs + lane % kPairs, turn));
    __syncwarp();  // the slots of the tile before have been read
    if (lane < kPairs) block.slots[lane] = pair.x, block.slots[kPairs + lane] = pair.y;
    __syncwarp();
    tile_gradients<kAligned, kKeys>(block, rows, p, g, to, tile, b, j0, count);
  }
}

// A block for up to kQ queries over the keys of its split.
template <class T, int kQ>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dot_step_gradients(const __grid_constant__ Problem<T> p, const __grid_constant__ Backward<T> g,
                       const __grid_constant__ DotGradients<T> to, const __grid_constant__ DotTile tile) {
  ATTNEXT_SHARED(float, shared);
  const int64_t b = blockIdx.x / to.query_splits;
  const int split = int(blockIdx.x % to.query_splits);
  const int first_key = split * to.keys_each, end = min(first_key + to.keys_each, p.keys);
  const int stop = min(end, p.slots.length(b, p.keys)), hidden = max(first_key, stop);
  const DotBlock<T, kQ> block(shared, tile, p.queries);
  for (int n = threadIdx.x; n < p.queries * tile.totals; n += blockDim.x) block.totals[n] = 0;
  __syncthreads();
  if (first_key < stop && tile.aligned) walk_back<true>(block, p, g, to, tile, b, first_key, stop);
  if (first_key < stop && !tile.aligned) walk_back<false>(block, p, g, to, tile, b, first_key, stop);
  __syncthreads();
  for (int i = 0; i < p.queries; ++i)
    for (int d = threadIdx.x; d < p.features; d += blockDim.x)
      to.query_parts[((int64_t(split) * p.batch + b) * p.queries + i) * p.features + d] =
          block.totals[i * tile.totals + d];
  for (int64_t n = threadIdx.x; n < int64_t(end - hidden) * p.features; n += blockDim.x)
    to.key[(b * p.keys + hidden) * p.features + n] = from_float<T>(0.0f);
  if (to.shared) return;
  for (int64_t n = threadIdx.x; n < int64_t(end - hidden) * p.values; n += blockDim.x)
    to.value[(b * p.keys + hidden) * p.values + n] = from_float<T>(0.0f);
}

// ds and the weights after dropout of 16 queries and 128 keys, as score_gradients has them.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dot_score_gradients(const __grid_constant__ Problem<T> p, const __grid_constant__ Backward<T> g) {
  constexpr int kQ = kQueryBlock / kWarpsPerBlock, kK = kKeyBlock / kWarp;
  ATTNEXT_SHARED(ProductStage, stage);
  const int key_tiles = p.key_rows / kKeyBlock, query_tiles = (g.rows + kQueryBlock - 1) / kQueryBlock;
  const int j0 = int(blockIdx.x % key_tiles) * kKeyBlock, of_queries = blockIdx.x / key_tiles;
  const int local = of_queries % query_tiles * kQueryBlock, i0 = g.first + local;
  const int64_t b = of_queries / query_tiles;
  if (j0 >= p.slots.length(b, p.keys)) return;
  float s[kQ][kK], dp[kQ][kK];
  block_products(s, *stage, p.query, p.key, p.queries, p.keys, p.features, b, i0, j0);
  scale_all(s, p.scale);
  block_products(dp, *stage, g.grad_context, g.value, p.queries, p.keys, g.grad_context.data ? p.values : 0, b, i0, j0);
  write_gradients(s, dp, p, g, b, local + int(threadIdx.x / kWarp) * kQ, j0);
}

// Adds the slab's part of the gradient of kGradientKeys keys, or values, from j0 on in the columns of a warp.
template <class T>
__device__ void write_rows(const float (&sum)[kGradientKeys][4], const Problem<T>& p, const Backward<T>& g, bool last,
                           T* out, float* sums, int64_t b, int j0, int h0, int columns) {
#pragma unroll
  for (int k = 0; k < kGradientKeys; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = j0 + k, h = h0 + c * kWarp + int(threadIdx.x % kWarp);
      if (j >= p.keys || h >= columns) continue;
      const int64_t at = (b * p.keys + j) * columns + h;
      const float total = g.add ? sums[at] + sum[k][c] : sum[k][c];
      if (last)
        out[at] = from_float<T>(total);
      else
        sums[at] = total;
    }
}

// The gradient of kGradientKeys keys, as values too where they are.
template <class T>
__device__ void key_gradients(const Problem<T>& p, const Backward<T>& g, const DotGradients<T>& to, int64_t b, int j0,
                              int h0) {
  float sum[kGradientKeys][4] = {};
  const int rows = j0 < p.slots.length(b, p.keys) ? g.rows : 0;
  const int64_t at = b * g.slab * p.key_rows + j0;
  add_rows(sum, g.ds + at, p.key_rows, p.query, b, g.first, rows, h0, p.features);
  scale_all(sum, p.scale);
  if (to.shared && g.grad_context.data)
    add_rows(sum, g.probabilities + at, p.key_rows, g.grad_context, b, g.first, rows, h0, p.features);
  write_rows(sum, p, g, to.last, to.key, to.key_sums, b, j0, h0, p.features);
}

// A split's part of the gradient of kGradientKeys queries of the slab, from `local` on.
template <class T>
__device__ void query_gradients(const Problem<T>& p, const Backward<T>& g, const DotGradients<T>& to, int64_t b,
                                int split, int local, int h0) {
  const int lane = threadIdx.x % kWarp;
  const int first = split * to.keys_each;
  const int stop = min(min(first + to.keys_each, p.keys), p.slots.length(b, p.keys));
  const float* ds = g.ds + (b * g.slab + local) * p.key_rows;
  float sum[kGradientKeys][4] = {};
#pragma unroll 2
  for (int j = first; j < stop; ++j) {
    const T* row = p.key.at(b, j);
    float numbers[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = h0 + c * kWarp + lane;
      numbers[c] = h < p.features ? to_float(row[h]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kGradientKeys; ++k) {
      const float slope = ds[int64_t(k) * p.key_rows + j];
#pragma unroll
      for (int c = 0; c < 4; ++c)  // 0 hides a NaN
        if (slope != 0) sum[k][c] = fmaf(slope, numbers[c], sum[k][c]);
    }
  }
#pragma unroll
  for (int k = 0; k < kGradientKeys; ++k) {
    if (local + k >= g.rows) break;
    const int64_t row = (int64_t(split) * p.batch + b) * p.queries + g.first + local + k;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = h0 + c * kWarp + lane;
      if (h < p.features) to.query_parts[row * p.features + h] = p.scale * sum[k][c];
    }
  }
}

// Programs of a warp, of a batch row, each for a tile of the gradient of queries, keys or values.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dot_input_gradients(const __grid_constant__ Problem<T> p, const __grid_constant__ Backward<T> g,
                        const __grid_constant__ DotGradients<T> to) {
  const int feature_tiles = (p.features + kValueColumns - 1) / kValueColumns;
  const int value_tiles = to.shared ? 0 : (p.values + kValueColumns - 1) / kValueColumns;
  const int key_tiles = (p.keys + kGradientKeys - 1) / kGradientKeys;
  const int query_tiles = (g.rows + kGradientKeys - 1) / kGradientKeys * to.query_splits;
  const int each = (query_tiles + key_tiles) * feature_tiles + key_tiles * value_tiles;
  const int64_t program = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (program >= int64_t(each) * p.batch) return;
  const int64_t b = program / each;
  int n = int(program % each);
  if (n < query_tiles * feature_tiles) {
    const int m = n % query_tiles;
    return query_gradients(p, g, to, b, m % to.query_splits, m / to.query_splits * kGradientKeys,
                           n / query_tiles * kValueColumns);
  }
  n -= query_tiles * feature_tiles;
  const int j0 = n % key_tiles * kGradientKeys, tile = n / key_tiles;
  if (tile < feature_tiles) return key_gradients(p, g, to, b, j0, tile * kValueColumns);
  const int h0 = (tile - feature_tiles) * kValueColumns;
  float sum[kGradientKeys][4] = {};
  const int rows = j0 < p.slots.length(b, p.keys) && g.grad_context.data ? g.rows : 0;
  add_rows(sum, g.probabilities + b * g.slab * p.key_rows + j0, p.key_rows, g.grad_context, b, g.first, rows, h0,
           p.values);
  write_rows(sum, p, g, to.last, to.value, to.value_sums, b, j0, h0, p.values);
}

// out (n) = the sum of parts (splits, n), in their order.
template <class T>
__global__ void add_parts(const float* parts, T* out, int splits, int64_t n) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n) return;
  float total = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) total += parts[split * n + at];
  out[at] = from_float<T>(total);
}

}  // namespace attnext::cuda
