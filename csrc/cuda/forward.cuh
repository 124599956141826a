// Forward: scores, online softmax and context in one launch; steps split over the keys, and their combination.
#pragma once

#include "platform.cuh"
#include "prepare.cuh"
#include "problem.cuh"
#include "scores.cuh"

namespace attnext::cuda {

// Where the results go. Sums that are not the last stand in `part`, in float32.
template <class T>
struct Forward {
  Rows<T> value;               // columns are neighbours
  bool aligned;                // rows of values start at multiples of four numbers, and are as many
  T* context;                  // (B, Tq, H)
  float* part;                 // (splits, B, Tq, H)
  float* log_sum_exp;          // (B, Tq)
  float* raw;                  // (B, Tq, Tk) scores for the weights, or null
  T* weights;                  // (B, Tq, Tk), or null
  T* scores;                   // (B, Tq, Tk), or null: then nothing else is wanted
  float *part_max, *part_sum;  // (splits, B, Tq)
  int splits, keys_each;       // a multiple of the tile
};

// What a warp knows of its rows' softmax so far.
template <int kQ>
struct Softmax {
  float top[kQ], total[kQ];

  __device__ Softmax() {
#pragma unroll
    for (int q = 0; q < kQ; ++q) top[q] = -INFINITY, total[q] = 0;
  }

  // Turns scores into exp(s - top) and returns by how much what was summed before shrinks.
  template <int kK>
  __device__ __forceinline__ void add(float (&s)[kQ][kK], float (&shrink)[kQ]) {
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      float high = s[q][0];
#pragma unroll
      for (int k = 1; k < kK; ++k) high = fmaxf(high, s[q][k]);
      high = fmaxf(top[q], warp_max(high));
      const float shift = high == -INFINITY ? 0.0f : high;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kK; ++k) sum += s[q][k] = expf(s[q][k] - shift);
      shrink[q] = expf(top[q] - shift);
      total[q] = total[q] * shrink[q] + warp_sum(sum);
      top[q] = high;
    }
  }

  __device__ __forceinline__ float log_sum_exp(int q) const {
    // A NaN stays one.
    return total[q] == 0 ? -INFINITY : total[q] > 0 ? top[q] + logf(total[q]) : total[q];
  }
};

// Hides what may not be attended, and writes scores where they are wanted, with what all have in common.
template <class T, int kQ, int kK>
__device__ __forceinline__ void hide_and_write(float (&s)[kQ][kK], const Problem<T>& p, const Forward<T>& out,
                                               float constant, int64_t b, int i0, int j0, int stop) {
#pragma unroll
  for (int q = 0; q < kQ; ++q)
#pragma unroll
    for (int k = 0; k < kK; ++k) {
      const int i = i0 + q, j = j0 + key_of(threadIdx.x % kWarp, k);
      const bool inside = i < p.queries && j < p.keys;
      const bool seen = inside && j < stop && p.slots.shows(b, i, j);
      s[q][k] = seen ? s[q][k] + constant : -INFINITY;
      if (!inside) continue;
      const int64_t at = (b * p.queries + i) * p.keys + j;
      if (out.raw) out.raw[at] = s[q][k];
      if (out.scores) out.scores[at] = from_float<T>(s[q][k]);
    }
}

constexpr int kColumns = 8;  // of the values, a lane at a time

// The c-th column of a lane: four neighbours, or apart by a warp.
template <bool kAligned>
__device__ __forceinline__ int column_of(int lane, int c) {
  return kAligned ? c / 4 * 4 * kWarp + 4 * lane + c % 4 : c * kWarp + lane;
}

template <bool kAligned, class T>
__device__ __forceinline__ void load_columns(const T* row, int h0, int values, float (&v)[kColumns]) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kAligned) {
#pragma unroll
    for (int c = 0; c < kColumns; c += 4) {
      const int h = h0 + column_of<true>(lane, c);
      float four[4] = {0, 0, 0, 0};
      if (h < values) load4(row + h, four);
#pragma unroll
      for (int n = 0; n < 4; ++n) v[c + n] = four[n];
    }
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int h = h0 + column_of<false>(lane, c);
      v[c] = h < values ? to_float(row[h]) : 0.0f;
    }
  }
}

// Adds p h of `count` keys from j0 on to what stands in `part` for the rows of a warp, shrunk; with `last` the sum over
// the softmax' total goes to the context. p stands in shared memory, kQ numbers a key.
template <bool kAligned, bool kMasked, class T, int kQ>
__device__ void add_values(const float* probabilities, const Problem<T>& p, const Forward<T>& out,
                           const Softmax<kQ>& softmax, const float (&shrink)[kQ], int64_t b, int split, int i0, int j0,
                           int count, bool first, bool last) {
  const int lane = threadIdx.x % kWarp;
  for (int h0 = 0; h0 < p.values; h0 += kColumns * kWarp) {
    float sum[kQ][kColumns] = {};
    const T* row = out.value.at(b, j0);
#pragma unroll 2
    for (int n = 0; n < count; ++n, row += out.value.row) {
      float v[kColumns];
      load_columns<kAligned>(row, h0, p.values, v);
#pragma unroll
      for (int q = 0; q < kQ; ++q) {
        const float weight = probabilities[n * kQ + q];
        if (kMasked && weight == 0) continue;  // it hides a NaN
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[q][c] = fmaf(weight, v[c], sum[q][c]);
      }
    }
#pragma unroll
    for (int q = 0; q < kQ; ++q) {
      if (i0 + q >= p.queries) break;
      const int64_t in_all = (b * p.queries + i0 + q) * p.values;
      float* part = out.part + int64_t(split) * p.batch * p.queries * p.values + in_all;
      const float gain = softmax.total[q] == 0 ? 0.0f : reciprocal(softmax.total[q]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int h = h0 + column_of<kAligned>(lane, c);
        if (h >= p.values) continue;
        const float total = first ? sum[q][c] : fmaf(part[h], shrink[q], sum[q][c]);
        if (last && out.splits == 1)
          out.context[in_all + h] = from_float<T>(total * gain);
        else
          part[h] = total;
      }
    }
  }
}

// Softmax and context of a tile of scores. `probabilities` is the warp's own shared memory, kQ numbers for each key.
template <class T, int kQ, int kK>
__device__ __forceinline__ void attend_tile(float (&s)[kQ][kK], Softmax<kQ>& softmax, float* probabilities,
                                            const Problem<T>& p, const Forward<T>& out, int64_t b, int split, int i0,
                                            int j0, int stop, bool first, bool last) {
  const int lane = threadIdx.x % kWarp;
  float shrink[kQ];
  softmax.add(s, shrink);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    const int j = j0 + key_of(lane, k);
#pragma unroll
    for (int q = 0; q < kQ; ++q)
      probabilities[key_of(lane, k) * kQ + q] = s[q][k] * kept(p.dropout, b * p.queries + i0 + q, j);
  }
  __syncwarp();
  const int count = min(kK * kWarp, stop - j0);
  if (p.slots.mask)
    out.aligned ? add_values<true, true>(probabilities, p, out, softmax, shrink, b, split, i0, j0, count, first, last)
                : add_values<false, true>(probabilities, p, out, softmax, shrink, b, split, i0, j0, count, first, last);
  else
    out.aligned
        ? add_values<true, false>(probabilities, p, out, softmax, shrink, b, split, i0, j0, count, first, last)
        : add_values<false, false>(probabilities, p, out, softmax, shrink, b, split, i0, j0, count, first, last);
  __syncwarp();
}

// The weights of a row from its raw scores, by one warp; 0 from `stop` on.
template <class T>
__device__ void write_weights(const Problem<T>& p, const float* raw, T* weights, int64_t row, int stop, float lse) {
  for (int j = threadIdx.x % kWarp; j < p.keys; j += kWarp) {
    const float s = j < stop ? raw[row * p.keys + j] : -INFINITY;
    float weight = 0;
    if (s != -INFINITY) {
      const float below = s - lse;
      weight = expf(below > 0 ? 0.0f : below) * kept(p.dropout, row, j);  // a NaN stays one
    }
    weights[row * p.keys + j] = from_float<T>(weight);
  }
}

// What a warp leaves behind when it is through with its keys [first_key, end).
template <class T, int kQ>
__device__ void finish(const Softmax<kQ>& softmax, const Problem<T>& p, const Forward<T>& out, int64_t b, int split,
                       int i0, int first_key, int stop, int end) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int q = 0; q < kQ; ++q) {
    const int i = i0 + q;
    if (i >= p.queries) return;
    const int64_t row = b * p.queries + i;
    if (out.scores) {
      for (int j = max(first_key, stop) + lane; j < end; j += kWarp)  // beyond the last tile too
        out.scores[row * p.keys + j] = from_float<T>(-INFINITY);
      continue;
    }
    if (stop <= first_key)  // nothing was added
      for (int h = lane; h < p.values; h += kWarp) {
        if (out.splits == 1)
          out.context[row * p.values + h] = from_float<T>(0.0f);
        else
          out.part[(int64_t(split) * p.batch * p.queries + row) * p.values + h] = 0;
      }
    if (out.splits > 1) {
      const int64_t at = int64_t(split) * p.batch * p.queries + row;
      if (lane == 0) out.part_max[at] = softmax.top[q], out.part_sum[at] = softmax.total[q];
      continue;
    }
    const float lse = softmax.log_sum_exp(q);
    if (lane == 0) out.log_sum_exp[row] = lse;
    __syncwarp();  // raw scores were written by other lanes
    if (out.weights) write_weights(p, out.raw, out.weights, row, stop, lse);
  }
}

constexpr int kForwardShared = int(sizeof(Stage)) + kQueryBlock * kKeyBlock * int(sizeof(float));

// A block for 16 queries, 4 a warp, over the keys of its split: tiles of 128, whose F all warps share.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward(const __grid_constant__ Problem<T> p, const __grid_constant__ Forward<T> out) {
  constexpr int kQ = kQueryBlock / kWarpsPerBlock, kK = kKeyBlock / kWarp;
  ATTNEXT_SHARED(Stage, stage);
  const int warp = threadIdx.x / kWarp, tiles = (p.queries + kQueryBlock - 1) / kQueryBlock;
  const int64_t b = blockIdx.x / tiles;
  const int block_i0 = int(blockIdx.x % tiles) * kQueryBlock, i0 = block_i0 + warp * kQ, split = blockIdx.y;
  float* probabilities = reinterpret_cast<float*>(stage + 1) + warp * kQ * kKeyBlock;
  const int first_key = split * out.keys_each, end = min(first_key + out.keys_each, p.keys);
  const int stop = min(end, p.slots.length(b, p.keys));
  const Weights weights = p.weights.of_row(b);
  Softmax<kQ> softmax;
  for (int j0 = first_key; j0 < stop; j0 += kKeyBlock) {
    float s[kQ][kK];
    block_scores(s, *stage, p, weights, b, block_i0, j0);
    hide_and_write(s, p, out, out.scores ? weights.limits()[2] : 0.0f, b, i0, j0, stop);
    if (!out.scores)
      attend_tile(s, softmax, probabilities, p, out, b, split, i0, j0, stop, j0 == first_key, j0 + kKeyBlock >= stop);
  }
  finish(softmax, p, out, b, split, i0, first_key, stop, end);
}

constexpr int kStepKeys = 2;  // of a lane, so that few keys keep many warps busy
constexpr int kStepTile = kStepKeys * kWarp;
template <int kQ>
constexpr int kStepShared = kWarpsPerBlock * kQ * kStepTile * int(sizeof(float));

// A warp for up to kQ queries over the keys of its split.
template <class T, int kQ>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    step(const __grid_constant__ Problem<T> p, const __grid_constant__ Forward<T> out) {
  ATTNEXT_SHARED(float, shared);
  const int warp = threadIdx.x / kWarp;
  const int64_t program = int64_t(blockIdx.x) * kWarpsPerBlock + warp, b = program / out.splits;
  const int split = int(program % out.splits);
  if (b >= p.batch) return;
  float* probabilities = shared + warp * kQ * kStepTile;
  const int first_key = split * out.keys_each, end = min(first_key + out.keys_each, p.keys);
  const int stop = min(end, p.slots.length(b, p.keys));
  const Weights weights = p.weights.of_row(b);
  Softmax<kQ> softmax;
  for (int j0 = first_key; j0 < stop; j0 += kStepTile) {
    float s[kQ][kStepKeys];
    warp_scores(s, p, weights, b, 0, j0);
    hide_and_write(s, p, out, out.scores ? weights.limits()[2] : 0.0f, b, 0, j0, stop);
    if (!out.scores)
      attend_tile(s, softmax, probabilities, p, out, b, split, 0, j0, stop, j0 == first_key, j0 + kStepTile >= stop);
  }
  finish(softmax, p, out, b, split, 0, first_key, stop, end);
}

// Context, log-sum-exp and weights of a row from its splits, in their order; a block for kThreads columns of a row. In
// shared memory the splits' factors stand behind what the reductions need.
template <class T>
__global__ void combine(const __grid_constant__ Problem<T> p, const __grid_constant__ Forward<T> out) {
  ATTNEXT_SHARED(float, shared);
  float* factors = shared + kWarpsPerBlock;
  const int64_t row = blockIdx.x, rows = int64_t(p.batch) * p.queries;
  Softmax<1> all;
  for (int n = threadIdx.x; n < out.splits; n += kThreads) all.top[0] = fmaxf(all.top[0], out.part_max[n * rows + row]);
  all.top[0] = block_reduce<true>(all.top[0], shared);
  const float shift = all.top[0] == -INFINITY ? 0.0f : all.top[0];
  for (int n = threadIdx.x; n < out.splits; n += kThreads) {
    factors[n] = expf(out.part_max[n * rows + row] - shift);
    all.total[0] = fmaf(out.part_sum[n * rows + row], factors[n], all.total[0]);
  }
  all.total[0] = block_reduce<false>(all.total[0], shared);  // and the factors are there for all
  const float gain = all.total[0] == 0 ? 0.0f : reciprocal(all.total[0]);
  const int h = blockIdx.y * kThreads + threadIdx.x;
  if (h < p.values) {
    float sum = 0;
#pragma unroll 8
    for (int n = 0; n < out.splits; ++n) sum = fmaf(out.part[(n * rows + row) * p.values + h], factors[n], sum);
    out.context[row * p.values + h] = from_float<T>(sum * gain);
  }
  if (blockIdx.y > 0) return;
  const float lse = all.log_sum_exp(0);
  if (threadIdx.x == 0) out.log_sum_exp[row] = lse;
  if (out.weights && threadIdx.x < kWarp)
    write_weights(p, out.raw, out.weights, row, p.slots.length(row / p.queries, p.keys), lse);
}

}  // namespace attnext::cuda
