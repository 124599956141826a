// The exponentials and the folded weight, made ahead of everything of size Tq Tk.
#pragma once

#include "platform.cuh"
#include "problem.cuh"

namespace attnext::cuda {

constexpr int kFoldThreads = 256;

template <bool MAX>
__device__ float block_reduce(float x, float* shared) {
  x = MAX ? warp_max(x) : warp_sum(x);
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) shared[warp] = x;
  __syncthreads();
  x = shared[0];
  for (int n = 1; n < warps; ++n) x = MAX ? fmaxf(x, shared[n]) : x + shared[n];
  __syncthreads();
  return x;
}

// Score weights (heads, D), a block for each, folded: see Weights.
template <class T>
__global__ void fold_weight(const T* weight, int64_t row, int64_t column, int features, int pairs, double scale,
                            float* out) {
  ATTNEXT_SHARED(float, shared);
  weight += blockIdx.x * row;
  float* limits = out + blockIdx.x * Weights::numbers(pairs);
  float *times = limits + 4, *fold = times + 2 * pairs, *offset = fold + 2 * pairs;
  float limit = 0, sum = 0, too_large = 0;
  for (int d = threadIdx.x; d < 2 * pairs; d += blockDim.x) {
    const double v = d < features ? scale * double(to_float(weight[d * column])) : 0.0;
    const float w = float(-2 * v);
    times[d] = fabsf(w) < INFINITY ? w : NAN;  // an infinite one would make the score of a hidden slot
    sum += float(v);
    if (fabsf(w) <= kMaxWeight)
      limit = fmaxf(limit, fabsf(w));
    else
      too_large = 1;  // a NaN too
  }
  limit = block_reduce<true>(limit, shared);
  sum = block_reduce<false>(sum, shared);
  too_large = block_reduce<true>(too_large, shared);
  const float least = limit * (0x1p-26f / float(features));
  float smallest = limit;
  for (int d = threadIdx.x; d < 2 * pairs; d += blockDim.x) {
    const float w = times[d];  // written by this thread
    const bool counts = fabsf(w) > least && fabsf(w) <= kMaxWeight;
    if (counts) smallest = fminf(smallest, fabsf(w));
    const int at = d < pairs ? 2 * d : 2 * (d - pairs) + 1;
    fold[at] = counts ? kUnit * (limit / w) : 0.0f;
    offset[at] = counts ? fold[at] : 1 / kUnit;
  }
  smallest = -block_reduce<true>(-smallest, shared);
  if (threadIdx.x == 0) {
    const float spread = limit > 0 ? log2f(limit / smallest) : 0.0f;
    limits[0] = limit;
    limits[1] = too_large > 0 ? -1.0f : (kFoldBits - spread) * 0.34657f;  // half of ln 2
    limits[2] = sum;
  }
}

constexpr int kTransposed = 32;  // rows and pairs of a tile that goes through shared memory
constexpr int kRowStride = kTransposed + 1;
constexpr int kExponentialThreads = 256;
constexpr int kExponentialShared = kTransposed * kRowStride * int(sizeof(float2));

// exp(2x) of rows (B, T, D), times c where there are weights, to `out` (B, pairs, padded, 2), with 0 in hidden rows and
// in the padding; exp(2x) alone to `by_row` (B, padded, pairs, 2) where asked for; and the rows' limits.
template <class T>
__global__ void exponentials(Rows<T> x, Slots slots, int rows, int features, int pairs, int padded, Weights weights,
                             float* out, float* by_row, float* limits) {
  ATTNEXT_SHARED(float2, tile);
  const int tiles = (padded + kTransposed - 1) / kTransposed;
  const int64_t b = blockIdx.x / tiles;
  const int first = int(blockIdx.x % tiles) * kTransposed;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kRowsEach = kTransposed / (kExponentialThreads / kWarp);
  const int length = min(rows, slots.length(b, rows));
  const float* fold = weights.data ? weights.of_row(b).fold() : nullptr;
  float size[kRowsEach] = {};
  for (int p0 = 0; p0 < pairs; p0 += kTransposed) {
    const int p = p0 + lane;
#pragma unroll
    for (int n = 0; n < kRowsEach; ++n) {
      const int r = warp * kRowsEach + n, t = first + r;
      float2 e = make_float2(0, 0);
      if (t < length && slots.shows(b, 0, t)) {
        const T* row = x.at(b, t);
        float2 v = make_float2(0, 0);
        if (p < features) v.x = to_float(row[p * x.column]);
        if (p < pairs && p + pairs < features) v.y = to_float(row[(p + pairs) * x.column]);
        const bool finite = fabsf(v.x) < INFINITY && fabsf(v.y) < INFINITY;
        size[n] = finite ? fmaxf(size[n], fmaxf(fabsf(v.x), fabsf(v.y))) : INFINITY;
        if (p < features) e.x = expf(2 * v.x);
        if (p < pairs && p + pairs < features) e.y = expf(2 * v.y);
      }
      if (by_row && p < pairs && t < padded) reinterpret_cast<float2*>(by_row)[(b * padded + t) * pairs + p] = e;
      if (fold && p < pairs) e.x *= fold[2 * p], e.y *= fold[2 * p + 1];
      tile[lane * kRowStride + r] = e;
    }
    __syncthreads();
    const int t = first + lane;
#pragma unroll
    for (int n = 0; n < kRowsEach; ++n) {
      const int q = p0 + warp * kRowsEach + n;
      if (out && q < pairs && t < padded)
        reinterpret_cast<float2*>(out)[(b * pairs + q) * padded + t] = tile[(q - p0) * kRowStride + lane];
    }
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < kRowsEach; ++n) {
    const int t = first + warp * kRowsEach + n;
    const float limit = warp_max(size[n]);
    const bool shown = t < length && slots.shows(b, 0, t);
    if (lane == 0 && t < padded) limits[b * padded + t] = shown ? limit : -1.0f;
  }
}

}  // namespace attnext::cuda
