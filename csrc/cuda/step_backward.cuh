// The gradients of a step that sees its past: ds of each slot and the values' gradient, from which step_gradients.cuh
// makes the others. Sums that several blocks share are kept apart, and a last launch adds them in a fixed order.
#pragma once

#include "platform.cuh"
#include "prepare.cuh"
#include "problem.cuh"
#include "scores.cuh"
#include "step.cuh"

namespace attnext::cuda {

template <class T>
struct StepBackward {
  Rows<T> grad_context;  // data is null where there is none
  Rows<float> grad_weights;
  const float *weights, *scores;  // (B, Tq, Tk); scores of the sigmoid alone
  float *dp, *kept, *ds;          // (B, Tq, Tk): of the weights; what a value gets of dC; of the scores
  T *query, *key, *value, *score_weight, *filters, *projection;  // the gradients
  float *past[2], *previous, *transition;
  float* key_sums;     // (B, Tk, D): of the queries before the last
  float* query_parts;  // (splits, B, Tq, D)
  float* past_parts;   // (splits, B, Tq, channels, past_row)
  float* model_parts;  // (programs, model_row): of v (D), L (filter_count, D) and filters
  // A program has rows_each rows of the batch, and of these keys_each keys, a multiple of a tile.
  int splits, keys_each, rows_each, programs;
  int64_t past_row, model_row;
};

constexpr int kValueKeys = 4;  // of a warp

// dp = keep dC . h + dA, and what the values get of dC, of a query and a warp's keys from `first` on.
template <class T>
__device__ __forceinline__ void slot_gradients(const Step<T>& s, const StepBackward<T>& g, int64_t b, int i,
                                               int first) {
  const Problem<T>& p = s.problem;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = b * p.queries + i;
  const Span span = span_of(s, b, i);
  float keep[kValueKeys], sum[kValueKeys] = {};
#pragma unroll
  for (int k = 0; k < kValueKeys; ++k) {
    const bool seen = span.holds(first + k) && p.slots.shows(b, 0, first + k);
    keep[k] = seen ? kept(p.dropout, row, first + k) : 0.0f;
  }
  if (g.grad_context.data) {
    const T* grad = g.grad_context.at(b, i) + lane * g.grad_context.column;
    const T* value = s.value.at(b, first) + lane * s.value.column;
#pragma unroll 2
    for (int h = lane; h < p.values; h += kWarp) {
      const float of_context = to_float(*grad);
#pragma unroll
      for (int k = 0; k < kValueKeys; ++k)
        sum[k] = fmaf(of_context, keep[k] != 0 ? to_float(value[k * s.value.row]) : 0.0f, sum[k]);
      grad += kWarp * g.grad_context.column, value += kWarp * s.value.column;
    }
  }
  const float dot = warp_sums<kValueKeys>(sum);
  const int j = first + lane;
  if (lane >= kValueKeys || j >= p.keys) return;
  float factor = 0;
#pragma unroll
  for (int k = 0; k < kValueKeys; ++k) factor = lane == k ? keep[k] : factor;
  const bool seen = span.holds(j) && p.slots.shows(b, 0, j);
  const float incoming = seen && g.grad_weights.data ? g.grad_weights.at(b, i)[j * g.grad_weights.column] : 0.0f;
  g.dp[row * p.keys + j] = (factor == 0 ? 0.0f : factor * dot) + incoming;
  g.kept[row * p.keys + j] = factor == 0 ? 0.0f : factor * g.weights[row * p.keys + j];
}

// dp of all queries and the gradient of the values; a warp for kValueKeys keys.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    step_value_gradients(const __grid_constant__ Step<T> s, const __grid_constant__ StepBackward<T> g) {
  const Problem<T>& p = s.problem;
  const int tiles = (p.keys + kValueKeys - 1) / kValueKeys;
  const int64_t program = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp, b = program / tiles;
  const int first = int(program % tiles) * kValueKeys;
  if (b >= p.batch) return;
  for (int i = 0; i < p.queries; ++i) slot_gradients(s, g, b, i, first);
  __syncwarp();  // what was kept was written by other lanes
  for (int h = threadIdx.x % kWarp; h < p.values; h += kWarp) {
    float sum[kValueKeys] = {};
    for (int i = 0; i < p.queries && g.grad_context.data; ++i) {
      const float grad = to_float(g.grad_context.at(b, i)[h * g.grad_context.column]);
      const float* weights = g.kept + (b * p.queries + i) * p.keys + first;
#pragma unroll
      for (int k = 0; k < kValueKeys; ++k) {
        const float weight = first + k < p.keys ? weights[k] : 0.0f;
        if (weight != 0) sum[k] = fmaf(weight, grad, sum[k]);  // 0 hides a NaN
      }
    }
#pragma unroll
    for (int k = 0; k < kValueKeys; ++k)
      if (first + k < p.keys) g.value[(b * p.keys + first + k) * p.values + h] = from_float<T>(sum[k]);
  }
}

// ds of a query's slots; of forward attention, of its last weights and transition too. delta comes from w and dp
// themselves: where one key has all the weight, ds is 0 to rounding.
template <class T>
struct ScoreGradients {
  const Step<T>& s;
  const StepBackward<T>& g;
  const int64_t b, row;
  const int i;
  const Span span;
  float delta;

  __device__ ScoreGradients(const Step<T>& s, const StepBackward<T>& g, int64_t row, float* shared)
      : s(s),
        g(g),
        b(row / s.problem.queries),
        row(row * s.problem.keys),
        i(int(row % s.problem.queries)),
        span(span_of(s, b, i)) {
    float sum = 0;
    for (int j = span.first + int(threadIdx.x); j < span.last; j += blockDim.x)
      if (weight(j) != 0) sum = fmaf(weight(j), g.dp[this->row + j], sum);  // 0 hides a NaN
    delta = block_reduce<false>(sum, shared);
  }

  __device__ float weight(int j) const { return g.weights[row + j]; }
  __device__ float operator()(int j) const {
    if (!span.holds(j) || weight(j) == 0) return 0;
    const float ds = weight(j) * (g.dp[row + j] - delta);
    return s.rule == Rule::kSigmoid ? ds / (1 + expf(g.scores[row + j])) : ds;
  }
  // Of the factor that forward attention multiplies y by.
  __device__ float of_mix(const Mixture& mix, int j) const {
    return span.holds(j) && mix.reaches(j) ? (*this)(j) / mix.of(j) : 0.0f;
  }
};

// Of the last weights and the transition. A reader that stayed passes on what comes in, in the visible slots.
template <class T>
__device__ void mixture_gradients(const ScoreGradients<T>& ds, const Mixture& mix, bool any, float* shared) {
  const Step<T>& s = ds.s;
  float of_move = 0;
  for (int j = threadIdx.x; j < s.problem.keys; j += blockDim.x) {
    float sum = 0;
    if (any && mix.visible(j)) {
      const float of_this = ds.of_mix(mix, j);
      sum = fmaf(mix.stay, of_this, mix.move * ds.of_mix(mix, j + 1));
      of_move = fmaf(of_this, mix.before(j - 1) - mix.before(j), of_move);
    } else if (mix.visible(j) && ds.span.holds(j)) {
      sum = ds.g.dp[ds.row + j];
    }
    ds.g.previous[ds.row + j] = sum;
  }
  if (!s.transition.data) return;
  of_move = block_reduce<false>(of_move, shared);
  if (threadIdx.x == 0) ds.g.transition[ds.b * s.problem.queries + ds.i] = of_move;
}

// A block for each query.
template <class T>
__global__ void __launch_bounds__(kThreads)
    step_score_gradients(const __grid_constant__ Step<T> s, const __grid_constant__ StepBackward<T> g) {
  ATTNEXT_SHARED(float, shared);
  const ScoreGradients<T> ds(s, g, blockIdx.x, shared);
  bool any = true;
  if (s.rule == Rule::kForward) {
    const Mixture mix(s, ds.b, ds.i);
    any = reaches_any(mix, ds.span);
    mixture_gradients(ds, mix, any, shared);
  }
  for (int j = threadIdx.x; j < s.problem.keys; j += blockDim.x) g.ds[ds.row + j] = any ? ds(j) : 0.0f;
}

// A number of a gradient: its parts, and where their sum goes. They are counted over the gradients of the queries, the
// score weight, L (features last), the filters, and each past.
template <class T>
struct Total {
  const float* part;
  int64_t step;
  int count;
  T* rounded = nullptr;
  float* wide = nullptr;

  __device__ Total(const Step<T>& s, const StepBackward<T>& g, int64_t n) : step(g.model_row), count(g.programs) {
    const Problem<T>& p = s.problem;
    const int64_t rows = int64_t(p.batch) * p.queries, features = p.features;
    if (n < rows * features) {
      part = g.query_parts + n, step = rows * features, count = g.splits, rounded = g.query + n;
      return;
    }
    n -= rows * features, part = g.model_parts + n;
    if (n < g.model_row) {
      const int64_t of_projection = s.projection ? s.filter_count * features : 0, m = n - features;
      if (m < 0)
        rounded = g.score_weight + n;
      else if (m < of_projection)
        rounded = g.projection + m % features * s.filter_count + m / features;
      else
        rounded = g.filters + (m - of_projection);
      return;
    }
    take_past(s, g, n - g.model_row, rows);
  }

  // The splits of the keys from which filters reach a past weight; none where it is hidden.
  __device__ void take_past(const Step<T>& s, const StepBackward<T>& g, int64_t n, int64_t rows) {
    const int keys = s.problem.keys, j = int(n % keys), reach = s.width / 2;
    const int64_t row = n / keys % rows, c = n / keys / rows, b = row / s.problem.queries;
    const int first = max(0, j - reach) / g.keys_each;
    const int last = int(min(int64_t(g.splits - 1), (int64_t(j) + reach) / g.keys_each));
    const bool seen = j < s.problem.slots.length(b, keys) && s.problem.slots.shows(b, 0, j);
    step = rows * s.channels * g.past_row - g.keys_each, count = seen ? last - first + 1 : 0;
    part = g.past_parts + (row * s.channels + c) * g.past_row + j + reach + first * step;
    wide = g.past[c] + row * keys + j;
  }
};

constexpr int kTotalThreads = 256;  // for 32 numbers: a warp has every eighth of their parts

template <class T>
__global__ void __launch_bounds__(kTotalThreads)
    step_totals(const __grid_constant__ Step<T> s, const __grid_constant__ StepBackward<T> g, int64_t numbers) {
  ATTNEXT_SHARED(float, shared);
  constexpr int kWarps = kTotalThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t number = int64_t(blockIdx.x) * kWarp + lane;
  const Total<T> total(s, g, min(number, numbers - 1));
  float sum = 0;
#pragma unroll 4
  for (int n = warp; n < total.count; n += kWarps) sum += total.part[n * total.step];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || number >= numbers) return;
  for (int n = 1; n < kWarps; ++n) sum += shared[n * kWarp + lane];
  if (total.wide)
    *total.wide = sum;
  else
    *total.rounded = from_float<T>(sum);
}

}  // namespace attnext::cuda
