// A step that sees its past, forward: the scores of tiles of keys, then each query's weights and context.
#pragma once

#include "platform.cuh"
#include "prepare.cuh"
#include "problem.cuh"
#include "scores.cuh"
#include "step_tile.cuh"

namespace attnext::cuda {

// Adds what the features d0 + n kWarp + lane give to the scores of the warp's keys: w r, and the constant scale sum v.
template <class T>
__device__ __forceinline__ void add_scores(float (&score)[kWarpKeys], float& constant, const Step<T>& s,
                                           const Columns& sum, int d0) {
  float v[2];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int d = d0 + n * kWarp + int(threadIdx.x % kWarp);
    v[n] = d < s.problem.features ? s.problem.scale * to_float(s.score_weight[d]) : 0.0f;
    v[n] = fabsf(v[n]) < INFINITY ? v[n] : NAN;  // an infinite one would make the score of a hidden slot
    constant += v[n];
  }
#pragma unroll
  for (int k = 0; k < kWarpKeys; ++k) {
    const float2 r = two_r(sum[k][0], sum[k][1]);
    score[k] = fmaf(-2 * v[0], r.x, fmaf(-2 * v[1], r.y, score[k]));
  }
}

// Scores (B, Tq, Tk) of the keys that a query may attend, minus infinity where the mask hides one. A block for a tile
// of a query's keys; the queries of a tile are neighbours, and find its keys in the cache.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    step_scores(const __grid_constant__ Step<T> s, float* scores) {
  ATTNEXT_SHARED(float, shared);
  const Problem<T>& p = s.problem;
  const TileStage stage(shared, s);
  const int lane = threadIdx.x % kWarp, tiles = (p.keys + kTileKeys - 1) / kTileKeys;
  const unsigned tile = blockIdx.x / p.queries;
  const Tile at = {tile / tiles, int(blockIdx.x % p.queries), int(tile % tiles) * kTileKeys};
  const Span span = span_of(s, at.b, at.i);
  if (at.j0 >= span.last || at.j0 + kTileKeys <= span.first) return;
  const unsigned visible = visible_keys(s, at);
  float score[kWarpKeys] = {}, constant = 0;
  for (int d0 = 0; d0 < p.features; d0 += kTileColumns) {
    Columns sum = load_sums(s, at, visible, d0);  // on its way meanwhile
    sum.add(past_sums(stage, s, at, d0, 0));
    add_scores(score, constant, s, sum, d0);
  }
#pragma unroll
  for (int k = 0; k < kWarpKeys; ++k) score[k] += constant;
  const float total = warp_sums<kWarpKeys>(score);
  const int j = at.first_of_warp() + lane;
  if (lane < kWarpKeys && span.holds(j))
    scores[(at.b * p.queries + at.i) * p.keys + j] = visible >> lane & 1 ? total : -INFINITY;
}

// What forward attention multiplies y by: the last weights of a key and of the one before it, which are 0 where they
// are hidden. A key is reached where the gradient, which divides by that, fits a float.
struct Mixture {
  static constexpr float kLeast = 0x1p-103f;  // the smallest normal number over epsilon
  const float* previous;
  int64_t column;
  const Slots& slots;
  int64_t b;
  int length;
  float stay = 1, move = 1;

  template <class T>
  __device__ Mixture(const Step<T>& s, int64_t b, int i)
      : previous(s.previous.at(b, i)),
        column(s.previous.column),
        slots(s.problem.slots),
        b(b),
        length(slots.length(b, s.problem.keys)) {
    if (s.transition.data) move = *s.transition.at(b, i), stay = 1 - move;
  }
  __device__ bool visible(int j) const { return j >= 0 && j < length && slots.shows(b, 0, j); }
  __device__ float before(int j) const { return visible(j) ? previous[j * column] : 0.0f; }
  __device__ float of(int j) const { return fmaf(stay, before(j), move * before(j - 1)); }
  __device__ bool reaches(int j) const { return visible(j) && !(of(j) <= kLeast); }
};

// Whether a query reaches any key by forward attention; one answer for the block.
__device__ __forceinline__ bool reaches_any(const Mixture& mix, const Span& span) {
  bool any = false;
  for (int j = span.first + int(threadIdx.x); j < span.last; j += blockDim.x) any |= mix.reaches(j);
  return __syncthreads_or(any);
}

// The weights of a query, from its scores.
template <class T>
struct Weighting {
  const Step<T>& s;
  int64_t b;
  int i;
  Span span;
  const float* scores;
  float shift, total;
  bool stays;  // forward attention that reaches no key

  // By the whole block.
  __device__ Weighting(const Step<T>& s, const float* all, int64_t b, int i, float* shared)
      : s(s), b(b), i(i), span(span_of(s, b, i)), scores(all + (b * s.problem.queries + i) * s.problem.keys) {
    stays = s.rule == Rule::kForward && !reaches_any(Mixture(s, b, i), span);
    float top = -INFINITY;
    for (int j = span.first + int(threadIdx.x); j < span.last; j += blockDim.x)
      if (s.rule != Rule::kForward || Mixture(s, b, i).reaches(j)) top = fmaxf(top, scores[j]);
    top = block_reduce<true>(top, shared);
    shift = top == -INFINITY ? 0.0f : s.rule == Rule::kSigmoid ? fminf(top, 0.0f) : top;
    float sum = 0;
    for (int j = span.first + int(threadIdx.x); j < span.last; j += blockDim.x) sum += unscaled(j);
    total = stays ? 1.0f : block_reduce<false>(sum, shared);
  }

  __device__ float unscaled(int j) const {
    const float score = scores[j];
    if (score == -INFINITY) return 0;
    if (s.rule == Rule::kSoftmax) return expf(score - shift);
    // Where all scores are far below 0 their sigmoids would vanish: exp(s - shift) / (1 + exp(s)).
    if (s.rule == Rule::kSigmoid) return expf(fminf(score, 0.0f) - shift) / (1 + expf(-fabsf(score)));
    const Mixture mix(s, b, i);
    return stays ? mix.before(j) : mix.reaches(j) ? expf(score - shift) * mix.of(j) : 0.0f;
  }
  // Divided, so that the only key has a weight of 1 and its score no gradient.
  __device__ float operator()(int j) const {
    const float x = span.holds(j) ? unscaled(j) : 0.0f;
    return x == 0 ? 0.0f : x / total;
  }
};

constexpr int kContextThreads = 256;
constexpr int kContextBlocks = 4;  // of a multiprocessor: left alone, the compiler spills a few to fit one more
constexpr int kContextColumns = 2 * kWarp;  // of a block, two a lane; its warps share the keys
constexpr int kContextShared = kContextThreads / kWarp * (1 + kContextColumns) * int(sizeof(float));
static_assert(kContextThreads / kWarp * kContextColumns >= kContextThreads);

// Adds the warp's share of `count` keys from j0 on, times their kept weights in shared memory; 0 hides a NaN.
template <class T>
__device__ __forceinline__ void add_context(float (&sum)[2], const Step<T>& s, const float* weights, int64_t b, int j0,
                                            int count, int h0) {
  constexpr int kWarps = kContextThreads / kWarp;
  const int h = h0 + int(threadIdx.x % kWarp), first = threadIdx.x / kWarp;
  const bool inside[2] = {h < s.problem.values, h + kWarp < s.problem.values};
  const T* row = s.value.at(b, j0 + first) + h * s.value.column;
#pragma unroll 4
  for (int n = first; n < count; n += kWarps, row += kWarps * s.value.row) {
    const float weight = weights[n];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float value = weight != 0 && inside[c] ? to_float(row[c * kWarp * s.value.column]) : 0.0f;
      sum[c] = fmaf(weight, value, sum[c]);
    }
  }
}

// Weights (B, Tq, Tk) and context (B, Tq, H) from scores: a block for kContextColumns columns of a query, the first of
// which writes the weights too.
template <class T>
__global__ void __launch_bounds__(kContextThreads, kContextBlocks)
    step_context(const __grid_constant__ Step<T> s, const float* scores, float* weights, T* context) {
  ATTNEXT_SHARED(float, shared);
  constexpr int kWarps = kContextThreads / kWarp;
  const Problem<T>& p = s.problem;
  const int64_t row = blockIdx.x, b = row / p.queries;
  const int i = int(row % p.queries), h0 = blockIdx.y * kContextColumns, lane = threadIdx.x % kWarp;
  const Weighting<T> weighting(s, scores, b, i, shared);
  float* tile = shared + kWarps;
  if (blockIdx.y == 0)
    for (int j = threadIdx.x; j < p.keys; j += blockDim.x) weights[row * p.keys + j] = weighting(j);
  float sum[2] = {0, 0};
  for (int j0 = weighting.span.first; j0 < weighting.span.last; j0 += kContextThreads) {
    const int j = j0 + int(threadIdx.x);
    __syncthreads();
    tile[threadIdx.x] = weighting(j) * kept(p.dropout, row, j);
    __syncthreads();
    add_context(sum, s, tile, b, j0, min(kContextThreads, weighting.span.last - j0), h0);
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < 2; ++c) tile[threadIdx.x / kWarp * kContextColumns + c * kWarp + lane] = sum[c];
  __syncthreads();
  const int h = h0 + int(threadIdx.x);
  if (threadIdx.x >= kContextColumns || h >= p.values) return;
  float total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += tile[warp * kContextColumns + threadIdx.x];
  context[row * p.values + h] = from_float<T>(total);
}

}  // namespace attnext::cuda
