// Backward: ds of each pair, then the gradients of the inputs from it. Sums that several programs share are kept apart
// and added in a fixed order: the same inputs give the same bits.
#pragma once

#include "forward.cuh"
#include "platform.cuh"
#include "prepare.cuh"
#include "problem.cuh"
#include "products.cuh"
#include "scores.cuh"

namespace attnext::cuda {

template <class T>
struct Backward {
  Rows<T> value, grad_context, grad_weights;  // data is null where there is none; for scores grad_weights is theirs
  const T *context, *weights;                 // as forward wrote them
  const float* log_sum_exp;
  bool from_scores;
  float* delta;                   // (B, Tq)
  float *ds, *probabilities;      // (B, slab, key_rows), the latter after dropout
  float* ds_sums;                 // (B, slab / kQueryBlock, key tiles, warps of a block)
  const float* exp_query_by_row;  // (B, query_rows, pairs, 2): E
  float* query_parts;             // (key_splits, B, Tq, pairs, 2)
  float* key_parts;               // (row_splits, B, Tk, pairs, 2)
  float* weight_parts;            // (row_splits key_splits, B, pairs, 2)
  float* value_grad;              // (B, Tk, H)
  int first, rows, slab;          // the slab of queries [first, first + rows)
  int rows_each, keys_each, row_splits, key_splits;
  bool add;  // to what earlier slabs left in key_parts and value_grad
};

// delta = dC . C + dA . A of a row, a warp each; a weight of 0 hides what its gradient holds.
template <class T>
__global__ void row_sums(const __grid_constant__ Problem<T> p, const __grid_constant__ Backward<T> g) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= int64_t(p.batch) * p.queries) return;
  const int64_t b = row / p.queries, i = row % p.queries;
  float total = 0;
  if (g.grad_context.data)
    for (int h = lane; h < p.values; h += kWarp) {
      const float c = to_float(g.context[row * p.values + h]);
      if (c != 0) total = fmaf(c, to_float(g.grad_context.at(b, i)[h * g.grad_context.column]), total);
    }
  if (g.grad_weights.data)
    for (int j = lane; j < p.keys; j += kWarp) {
      const float a = to_float(g.weights[row * p.keys + j]);
      if (a != 0) total = fmaf(a, to_float(g.grad_weights.at(b, i)[j * g.grad_weights.column]), total);
    }
  total = warp_sum(total);
  if (lane == 0) g.delta[row] = total;
}

union PairStage {
  Stage scores;
  ProductStage products;
};

// Writes ds and weights of the pairs of a tile from their scores and dC_i . h_j, and returns the sum of ds. `local` is
// the warp's first query in the slab.
template <class T, int kQ, int kK>
__device__ __forceinline__ float write_gradients(const float (&s)[kQ][kK], float (&dp)[kQ][kK], const Problem<T>& p,
                                                 const Backward<T>& g, int64_t b, int local, int j0) {
  float sum = 0;
  const int stop = p.slots.length(b, p.keys);  // read again: kept from above, it is a register too many on 12.0
#pragma unroll
  for (int q = 0; q < kQ; ++q) {
    const int i = g.first + local + q;
    const bool in_slab = local + q < g.rows;
    const int64_t row = b * p.queries + i;
    const float lse = !in_slab || g.from_scores ? 0.0f : g.log_sum_exp[row];
    const float delta = !in_slab || g.from_scores ? 0.0f : g.delta[row];
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const int j = j0 + key_of(threadIdx.x % kWarp, k);
      const bool seen = in_slab && j < stop && p.slots.shows(b, i, j);
      float ds = 0, weight = 0;
      if (seen && g.from_scores) {
        ds = to_float(g.grad_weights.at(b, i)[j * g.grad_weights.column]);
      } else if (seen && lse != -INFINITY) {
        const float below = s[q][k] - lse, factor = kept(p.dropout, row, j);
        const float probability = expf(below > 0 ? 0.0f : below);  // a NaN stays one
        if (g.grad_weights.data) dp[q][k] += to_float(g.grad_weights.at(b, i)[j * g.grad_weights.column]);
        if (probability != 0) ds = probability * fmaf(factor, dp[q][k], -delta);
        weight = probability * factor;
      }
      sum += ds;
      if (local + q < g.slab) {
        const int64_t at = (b * g.slab + local + q) * p.key_rows + j;
        g.ds[at] = ds;
        if (!g.from_scores) g.probabilities[at] = weight;
      }
    }
  }
  return sum;
}

// ds and, for the values, the weights after dropout, of 16 queries and 128 keys. Tiles beyond a row's length are not
// written, but for their sums.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    score_gradients(const __grid_constant__ Problem<T> p, const __grid_constant__ Backward<T> g) {
  constexpr int kQ = kQueryBlock / kWarpsPerBlock, kK = kKeyBlock / kWarp;
  ATTNEXT_SHARED(PairStage, stage);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int key_tiles = p.key_rows / kKeyBlock, query_tiles = (g.rows + kQueryBlock - 1) / kQueryBlock;
  const int j0 = int(blockIdx.x % key_tiles) * kKeyBlock, of_queries = blockIdx.x / key_tiles;
  const int local = of_queries % query_tiles * kQueryBlock, block_i0 = g.first + local;
  const int64_t b = of_queries / query_tiles;
  float sum = 0;
  if (j0 < p.slots.length(b, p.keys)) {
    float s[kQ][kK], dp[kQ][kK];
    if (!g.from_scores) block_scores(s, stage->scores, p, p.weights.of_row(b), b, block_i0, j0);
    if (g.grad_context.data)
      block_products(dp, stage->products, g.grad_context, g.value, p.queries, p.keys, p.values, b, block_i0, j0);
    else
#pragma unroll
      for (int q = 0; q < kQ; ++q)
#pragma unroll
        for (int k = 0; k < kK; ++k) dp[q][k] = 0;
    sum = write_gradients(s, dp, p, g, b, local + warp * kQ, j0);
  }
  sum = warp_sum(sum);
  const int64_t tile = (b * (g.slab / kQueryBlock) + local / kQueryBlock) * key_tiles + j0 / kKeyBlock;
  if (lane == 0) g.ds_sums[tile * kWarpsPerBlock + warp] = sum;
}

constexpr int kGradientKeys = 8;  // of a thread, for two features

// The largest limit of rows [first, end), by one warp.
__device__ __forceinline__ float largest(const float* limits, int first, int end) {
  float limit = 0;
  for (int t = first + threadIdx.x % kWarp; t < end; t += kWarp) limit = fmaxf(limit, limits[t]);
  return warp_max(limit);
}

// What a thread has of two features: the tile's keys, and its sums.
struct Gradients {
  float2 key[kGradientKeys];     // F, or the keys themselves where they are too large
  float2 sum[kGradientKeys];     // of ds r (1 - r)
  float2 weight[kGradientKeys];  // of ds r

  // Adds a query and returns its own sums over the keys.
  template <bool kNear>
  __device__ __forceinline__ float2 add(float2 e, const float (&ds)[kGradientKeys]) {
    float2 of_query = make_float2(0, 0);
#pragma unroll
    for (int k = 0; k < kGradientKeys; ++k) {
      const float2 slot = twice(ds[k]);
      float2 r;
      if constexpr (kNear) {
        const float2 x = fma2(e, key[k], twice(1.0f));
        const float inverse = reciprocal(x.x * x.y);
        r = make_float2(inverse * x.y, inverse * x.x);
      } else {  // only where ds is not 0: a hidden slot may hold a NaN
        r.x = ds[k] == 0 ? 0.0f : reciprocal(expf(2 * (e.x + key[k].x)) + 1);
        r.y = ds[k] == 0 ? 0.0f : reciprocal(expf(2 * (e.y + key[k].y)) + 1);
      }
      const float2 slope = fma2(make_float2(-r.x, -r.y), r, r);
      sum[k] = fma2(slot, slope, sum[k]);
      weight[k] = fma2(slot, r, weight[k]);
      of_query = fma2(slot, slope, of_query);
    }
    return of_query;
  }
};

// Takes query after query of a slab's part for a tile of keys. `part` is the queries' sums, which are added to.
template <bool kNear, class T>
__device__ __forceinline__ void add_queries(Gradients& sums, const Problem<T>& p, const Backward<T>& g, int64_t b,
                                            int pair, int local, int count, int j0, float2* __restrict__ part) {
  const float* __restrict__ ds = g.ds + (b * g.slab + local) * p.key_rows + j0;
  const float2* e =
      reinterpret_cast<const float2*>(g.exp_query_by_row) + (b * p.query_rows + g.first + local) * p.pairs + pair;
  for (int n = 0; n < count; ++n) {
    float slots[kGradientKeys];
#pragma unroll
    for (int k = 0; k < kGradientKeys; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(ds + k);
      slots[k] = four.x, slots[k + 1] = four.y, slots[k + 2] = four.z, slots[k + 3] = four.w;
    }
    float2 query;
    if constexpr (kNear) {
      query = *e;
    } else {
      const T* row = p.query.at(b, g.first + local + n);
      query.x = pair < p.features ? to_float(row[pair * p.query.column]) : 0.0f;
      query.y = pair + p.pairs < p.features ? to_float(row[(pair + p.pairs) * p.query.column]) : 0.0f;
    }
    const float2 before = *part, of_query = sums.add<kNear>(query, slots);
    *part = make_float2(before.x + of_query.x, before.y + of_query.y);
    ds += p.key_rows, e += p.pairs, part += p.pairs;
  }
}

// The sums of two features over some keys and queries of a batch row: a warp's share of the gradients of query, key and
// score weight. No lane waits for another, so those beyond the features leave.
template <class T>
__device__ __forceinline__ void pair_gradients(const Problem<T>& p, const Backward<T>& g, int64_t b, int split,
                                               int pair) {
  const int row_split = split / g.key_splits, key_split = split % g.key_splits;
  const int local = row_split * g.rows_each, count = max(0, min(g.rows - local, g.rows_each));
  const int first_key = key_split * g.keys_each, end = min(first_key + g.keys_each, p.keys);
  const int stop = min(end, p.slots.length(b, p.keys));
  const float limit = largest(p.query_limit + b * p.query_rows, g.first + local, g.first + local + count) +
                      largest(p.key_limit + b * p.key_rows, first_key, stop);
  if (pair >= p.pairs) return;
  float2* query_part = reinterpret_cast<float2*>(g.query_parts) +
                       ((int64_t(key_split) * p.batch + b) * p.queries + g.first + local) * p.pairs + pair;
  float2* key_part =
      reinterpret_cast<float2*>(g.key_parts) + ((int64_t(row_split) * p.batch + b) * p.keys) * p.pairs + pair;
  for (int n = 0; n < count; ++n) query_part[int64_t(n) * p.pairs] = make_float2(0, 0);
  Gradients sums = {};
  for (int j0 = first_key; j0 < end; j0 += kGradientKeys) {
#pragma unroll
    for (int k = 0; k < kGradientKeys; ++k) {
      sums.sum[k] = make_float2(0, 0), sums.key[k] = make_float2(0, 0);
      const int j = j0 + k;
      if (j >= stop) continue;
      const T* row = p.key.at(b, j);
      if (pair < p.features) sums.key[k].x = to_float(row[pair * p.key.column]);
      if (pair + p.pairs < p.features) sums.key[k].y = to_float(row[(pair + p.pairs) * p.key.column]);
    }
    if (j0 < stop && limit <= kPlain) {
#pragma unroll
      for (int k = 0; k < kGradientKeys; ++k) {
        const bool hidden = j0 + k >= stop || p.key_limit[b * p.key_rows + j0 + k] < 0;
        sums.key[k].x = hidden ? 0.0f : expf(2 * sums.key[k].x);
        sums.key[k].y = hidden ? 0.0f : expf(2 * sums.key[k].y);
      }
      add_queries<true>(sums, p, g, b, pair, local, count, j0, query_part);
    } else if (j0 < stop) {
      add_queries<false>(sums, p, g, b, pair, local, count, j0, query_part);
    }
#pragma unroll
    for (int k = 0; k < kGradientKeys; ++k) {
      if (j0 + k >= end) break;
      float2& out = key_part[int64_t(j0 + k) * p.pairs];
      out = g.add ? make_float2(out.x + sums.sum[k].x, out.y + sums.sum[k].y) : sums.sum[k];
    }
  }
  float2 total = make_float2(0, 0);
#pragma unroll
  for (int k = 0; k < kGradientKeys; ++k) total.x += sums.weight[k].x, total.y += sums.weight[k].y;
  reinterpret_cast<float2*>(g.weight_parts)[(int64_t(split) * p.batch + b) * p.pairs + pair] = total;
}

constexpr int kValueColumns = 4 * kWarp;  // of a warp, for kGradientKeys keys

// Adds `count` rows from the first on in the columns of a warp from h0 on: the n-th times the n-th of `weights` rows,
// whose next kGradientKeys numbers are those of the sums.
template <class T>
__device__ __forceinline__ void add_rows(float (&sum)[kGradientKeys][4], const float* weights, int weights_row,
                                         const Rows<T>& rows, int64_t b, int first, int count, int h0, int columns) {
  const int lane = threadIdx.x % kWarp;
  for (int n = 0; n < count; ++n, weights += weights_row) {
    const T* row = rows.at(b, first + n);
    float numbers[4], slots[kGradientKeys];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int h = h0 + c * kWarp + lane;
      numbers[c] = h < columns ? to_float(row[h * rows.column]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kGradientKeys; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(weights + k);
      slots[k] = four.x, slots[k + 1] = four.y, slots[k + 2] = four.z, slots[k + 3] = four.w;
    }
#pragma unroll
    for (int k = 0; k < kGradientKeys; ++k)
#pragma unroll
      for (int c = 0; c < 4; ++c)  // 0 hides a NaN that came in for a row which attends nothing
        if (slots[k] != 0) sum[k][c] = fmaf(slots[k], numbers[c], sum[k][c]);
  }
}

// The gradient of kGradientKeys values from j0 on in the columns of a warp from h0 on.
template <class T>
__device__ __forceinline__ void value_gradients(const Problem<T>& p, const Backward<T>& g, int64_t b, int j0, int h0) {
  const int lane = threadIdx.x % kWarp;
  float sum[kGradientKeys][4] = {};
  const int rows = j0 < p.slots.length(b, p.keys) ? g.rows : 0;
  add_rows(sum, g.probabilities + b * g.slab * p.key_rows + j0, p.key_rows, g.grad_context, b, g.first, rows, h0,
           p.values);
#pragma unroll
  for (int k = 0; k < kGradientKeys; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = j0 + k, h = h0 + c * kWarp + lane;
      if (j >= p.keys || h >= p.values) continue;
      float& out = g.value_grad[(b * p.keys + j) * p.values + h];
      out = g.add ? out + sum[k][c] : sum[k][c];
    }
}

// Blocks of four warps, each with 32 pairs of features of a split or, behind these, with a tile of the values'
// gradient.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    input_gradients(const __grid_constant__ Problem<T> p, const __grid_constant__ Backward<T> g) {
  const int lane = threadIdx.x % kWarp;
  const int pair_tiles = (p.pairs + kWarp - 1) / kWarp, splits = g.row_splits * g.key_splits;
  const int key_tiles = (p.keys + kGradientKeys - 1) / kGradientKeys;
  const int value_tiles = g.grad_context.data ? (p.values + kValueColumns - 1) / kValueColumns : 0;
  const int each = splits * pair_tiles + key_tiles * value_tiles;
  const int64_t program = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (program >= int64_t(each) * p.batch) return;
  const int64_t b = program / each;
  const int n = int(program % each);
  if (n < splits * pair_tiles) {
    pair_gradients(p, g, b, n / pair_tiles, n % pair_tiles * kWarp + lane);
  } else {
    const int m = n - splits * pair_tiles;
    // The warps of a block have the same columns of dC.
    value_gradients(p, g, b, m % key_tiles * kGradientKeys, m / key_tiles * kValueColumns);
  }
}

// out (rows, D) = 4 scale v times the sum of parts (splits, rows, pairs, 2), in their order; `each` rows are of one row
// of the batch.
template <class T>
__global__ void sum_parts(const float* parts, Weights weights, T* out, int splits, int64_t rows, int each,
                          int features) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= rows * features) return;
  const int d = int(at % features), pairs = weights.pairs;
  const float* part = parts + at / features * 2 * pairs + (d < pairs ? 2 * d : 2 * (d - pairs) + 1);
  float total = 0;
  for (int n = 0; n < splits; ++n, part += rows * 2 * pairs) total += *part;
  if (weights.heads > 1) weights = weights.of_row(at / features / each);
  out[at] = from_float<T>(-2 * weights.times()[d] * total);
}

constexpr int kWeightThreads = 256;  // for 32 features: a warp has every eighth row of the parts

// The gradient of a score weight (heads, D), scale (sum ds - 2 sum ds r), from sums (sum_rows, each) of ds and parts
// (rows, pairs, 2) of ds r; row n of either is of head n % heads. A block has
// 32 features of a head.
template <class T>
__global__ void weight_gradient(const float* sums, int64_t sum_rows, int64_t each, const float* parts, int64_t rows,
                                double scale, T* out, int features, int pairs) {
  ATTNEXT_SHARED(float, shared);
  constexpr int kWarps = kWeightThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, d = blockIdx.y * kWarp + lane;
  const int head = blockIdx.x, heads = gridDim.x;
  float total = 0;
  for (int64_t n = head + int64_t(warp) * heads; n < sum_rows; n += int64_t(kWarps) * heads)
    for (int64_t m = lane; m < each; m += kWarp) total += sums[n * each + m];
  total = block_reduce<false>(total, shared);
  float of_r = 0;
  if (d < features) {
    const float* part = parts + (d < pairs ? 2 * d : 2 * (d - pairs) + 1);
#pragma unroll 4
    for (int64_t n = head + int64_t(warp) * heads; n < rows; n += int64_t(kWarps) * heads) of_r += part[n * 2 * pairs];
  }
  shared[threadIdx.x] = of_r;
  __syncthreads();
  if (warp > 0 || d >= features) return;
  for (int n = 1; n < kWarps; ++n) of_r += shared[n * kWarp + lane];
  out[int64_t(head) * features + d] = from_float<T>(float(scale * (double(total) - 2 * double(of_r))));
}

}  // namespace attnext::cuda
