// The gradients of a step that sees its past, tile by tile of the keys: what ds of a query's slots give to the query,
// the keys, the score weight, and by the features to L, the filters and the past.
#pragma once

#include "platform.cuh"
#include "problem.cuh"
#include "step_backward.cuh"
#include "step_tile.cuh"

namespace attnext::cuda {

// Where a block adds what a query's slots of a tile give.
struct Parts {
  float *query, *past, *score_weight, *projection, *filters;
  int64_t past_row;
  int past_first;  // the key that a row of past begins with

  template <class T>
  __device__ Parts(const Step<T>& s, const StepBackward<T>& g, int64_t b, int i, int split)
      : past_row(g.past_row), past_first(split * g.keys_each - s.width / 2) {
    const Problem<T>& p = s.problem;
    const int64_t row = (split * int64_t(p.batch) + b) * p.queries + i;
    query = g.query_parts + row * p.features, past = g.past_parts + row * s.channels * past_row;
    score_weight = g.model_parts + blockIdx.x * g.model_row;
    projection = score_weight + p.features;
    filters = projection + (s.projection ? int64_t(s.filter_count) * p.features : 0);
  }
};

// A block's shared memory.
struct GradientStage {
  Parts* parts;    // for which no thread has registers
  float* slots;    // ds of the tile's keys
  float* warps;    // (2, warps, kTileColumns): what query and score weight get of each warp's keys
  float* sums;     // the gradients of the tile's sums, (kTileColumns, kKeyRow), or of its features
  TileStage tile;  // these two are not there without filters

  static constexpr int kParts = (sizeof(Parts) + 15) / 16 * 4, kWarps = 2 * kWarpsPerBlock * kTileColumns;
  static constexpr int kAlways = kParts + kTileKeys + kWarps, kSums = kTileColumns * kKeyRow;

  template <class T>
  __host__ static int numbers(const Step<T>& s) {
    return kAlways + (s.channels == 0 ? 0 : kSums + TileStage::numbers(s));
  }
  template <class T>
  __device__ GradientStage(float* shared, const Step<T>& s)
      : parts(reinterpret_cast<Parts*>(shared)),
        slots(shared + kParts),
        warps(slots + kTileKeys),
        sums(warps + kWarps),
        tile(sums + kSums, s) {}
};

__device__ __forceinline__ void fill_zero(float* x, int64_t count) {
  for (int64_t n = threadIdx.x; n < count; n += blockDim.x) x[n] = 0;
}

// Adds u to the gradient of the keys; the last query's rounds it.
template <class T>
__device__ __forceinline__ void add_to_keys(Columns u, const Step<T>& s, const StepBackward<T>& g, const Tile& at,
                                            int d0) {
  const Problem<T>& p = s.problem;
  const int d = d0 + int(threadIdx.x % kWarp), first = at.first_of_warp();
  const int64_t offset = (at.b * p.keys + first) * p.features + d;
  const auto for_each = [&](auto* to, const auto& work) {
#pragma unroll
    for (int k = 0; k < kWarpKeys; ++k, to += p.features)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (first + k < p.keys && d + n * kWarp < p.features) work(to[n * kWarp], u[k][n]);
  };
  if (at.i > 0) for_each(g.key_sums + offset, [](const float& before, float& x) { x += before; });
  if (at.i + 1 < p.queries)
    for_each(g.key_sums + offset, [](float& sum, float x) { sum = x; });
  else
    for_each(g.key + offset, [](T& out, float x) { out = from_float<T>(x); });
}

// u = 4 scale v ds r (1 - r) of a tile's keys, from their sums, and in the stage what query and score weight get of the
// warp's keys.
template <class T>
__device__ __forceinline__ void sum_gradients(Columns& u, const GradientStage& m, const Step<T>& s, int d0) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float gain[2], ds[kWarpKeys], of_query[2] = {0, 0}, of_weight[2] = {0, 0};
  load_floats(m.slots + warp * kWarpKeys, ds);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int d = d0 + n * kWarp + lane;
    gain[n] = d < s.problem.features ? 4 * s.problem.scale * to_float(s.score_weight[d]) : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kWarpKeys; ++k) {
    const float2 both = two_r(u[k][0], u[k][1]);
    const float r[2] = {both.x, both.y};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      u[k][n] = ds[k] == 0 ? 0.0f : ds[k] * gain[n] * fmaf(-r[n], r[n], r[n]);  // 0 hides a NaN
      of_weight[n] = ds[k] == 0 ? of_weight[n] : fmaf(ds[k], fmaf(-2.0f, r[n], 1.0f), of_weight[n]);
      of_query[n] += u[k][n];
    }
  }
  __syncthreads();  // the stage has been read
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    m.warps[warp * kTileColumns + n * kWarp + lane] = of_query[n];
    m.warps[(kWarpsPerBlock + warp) * kTileColumns + n * kWarp + lane] = of_weight[n];
  }
}

// Adds the warps' sums to those of the block: half the threads have the query, the others the score weight.
template <class T>
__device__ __forceinline__ void add_warps(const GradientStage& m, const Step<T>& s, int d0) {
  static_assert(kThreads == 2 * kTileColumns);
  const int half = threadIdx.x / kTileColumns, column = threadIdx.x % kTileColumns;
  if (d0 + column >= s.problem.features) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarpsPerBlock; ++warp)
    total += m.warps[(half * kWarpsPerBlock + warp) * kTileColumns + column];
  (half == 0 ? m.parts->query : m.parts->score_weight)[d0 + column] += half == 0 ? total : s.problem.scale * total;
}

// Over the tile's keys, x (rows, keys) times y: eight rows of a warp from `row` on, and two columns of a lane.
template <class Column>
__device__ __forceinline__ void multiply_rows(Columns& sum, const float* x, int row, const Column& column) {
#pragma unroll 1
  for (int k = 0; k < kTileKeys; k += 4) {
    float y[2][4];
    column(k, y);
#pragma unroll
    for (int n = 0; n < kWarpKeys; ++n) {
      float of_row[4];
      load_floats(x + (row + n) * kKeyRow + k, of_row);
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[n][c] = fmaf(of_row[e], y[c][e], sum[n][c]);
    }
  }
}

// Adds f u to the gradient of L, of the filters from f0 on and the features from d0 on.
template <class T>
__device__ void add_to_projection(const GradientStage& m, const Step<T>& s, int f0, int d0) {
  const int lane = threadIdx.x % kWarp, features = s.problem.features;
  for (int row = int(threadIdx.x / kWarp) * kWarpKeys; row < m.tile.filters; row += kTileKeys) {
    Columns sum = {};
    multiply_rows(sum, m.tile.features, row, [&](int k, float (&y)[2][4]) {
      for (int c = 0; c < 2; ++c) load_floats(m.sums + (c * kWarp + lane) * kKeyRow + k, y[c]);
    });
    float* to = m.parts->projection + int64_t(f0 + row) * features + d0 + lane;
#pragma unroll
    for (int n = 0; n < kWarpKeys; ++n, to += features)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (f0 + row + n < s.filter_count && d0 + c * kWarp + lane < features) to[c * kWarp] += sum[n][c];
  }
}

// Adds what the past weights get of the places that are laid out, o0 and on of channel c: the features' gradients times
// the filters, each place of which goes to the weight that it was laid on.
__device__ __forceinline__ void add_to_past(const GradientStage& m, int c, int first, int places, int filters) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Columns spread = {};
  add_outer<kStageRow, 1>(spread, m.sums, m.tile.stage, places, filters);
  __syncthreads();  // the filters have been read
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int k = 0; k < kWarpKeys; ++k) {
      const int place = n * kWarp + lane;
      if (place < places) m.tile.stage[(warp * kWarpKeys + k) * kStageRow + place] = spread[k][n];
    }
  __syncthreads();
  const int at = threadIdx.x;
  if (at >= kTileKeys + places - 1) return;
  float total = 0;
  for (int k = max(0, at - places + 1); k <= min(at, kTileKeys - 1); ++k) total += m.tile.stage[k * kStageRow + at - k];
  m.parts->past[c * m.parts->past_row + (first - m.parts->past_first) + at] += total;
}

// From the gradients of the tile's features by filters from f0 on, in m.sums: those of the filters and the past.
template <class T>
__device__ void add_to_filters(const GradientStage& m, const Step<T>& s, const Tile& at, int f0) {
  const int lane = threadIdx.x % kWarp, filters = min(m.tile.filters, s.filter_count - f0);
  for (int c = 0; c < s.channels; ++c)
    for (int o0 = 0; o0 < s.width; o0 += kPlaces) {
      const int places = stage_places(m.tile, s, at, f0, c, o0);
      for (int row = int(threadIdx.x / kWarp) * kWarpKeys; row < filters; row += kTileKeys) {
        Columns sum = {};
        multiply_rows(sum, m.sums, row, [&](int k, float (&y)[2][4]) {
          for (int n = 0; n < 2; ++n)
            for (int e = 0; e < 4; ++e) y[n][e] = m.tile.window[k + e + n * kWarp + lane];
        });
        float* to = m.parts->filters + (int64_t(f0 + row) * s.channels + c) * s.width + o0 + lane;
#pragma unroll
        for (int n = 0; n < kWarpKeys; ++n, to += s.channels * int64_t(s.width))
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (row + n < filters && o0 + e * kWarp + lane < s.width) to[e * kWarp] += sum[n][e];
      }
      add_to_past(m, c, at.j0 + o0 - s.width / 2, places, filters);
    }
}

// What a query's slots of a tile give to the gradients: one of the groups of filters gets its own, with the first of
// them all others.
template <class T>
__device__ void group_gradients(const GradientStage& m, const Step<T>& s, const StepBackward<T>& g, const Tile& at,
                                int group) {
  const int f0 = group * m.tile.filters;
  const unsigned visible = visible_keys(s, at);
  Columns of_features = {};
  for (int d0 = 0; d0 < s.problem.features; d0 += kTileColumns) {
    Columns u = past_sums(m.tile, s, at, d0, group);
    u.add(load_sums(s, at, visible, d0));
    sum_gradients(u, m, s, d0);
    if (group == 0) add_to_keys(u, s, g, at, d0);
    if (s.channels > 0) u.store(m.sums, kTileColumns);
    __syncthreads();
    if (group == 0) add_warps(m, s, d0);
    if (s.channels == 0) continue;
    if (s.projection) {
      add_outer<1, kStageRow>(of_features, m.sums, m.tile.stage, m.tile.filters, kTileColumns);
      add_to_projection(m, s, f0, d0);
      if (d0 + kTileColumns < s.problem.features) continue;
      __syncthreads();  // u has been read
      of_features.store(m.sums, m.tile.filters);
    }
    add_to_filters(m, s, at, s.projection ? f0 : d0);
  }
}

template <class T>
__device__ void tile_gradients(const GradientStage& m, const Step<T>& s, const StepBackward<T>& g, const Tile& at,
                               int split) {
  const Problem<T>& p = s.problem;
  const int j = at.j0 + int(threadIdx.x);
  const float ds = threadIdx.x < kTileKeys && j < p.keys ? g.ds[(at.b * p.queries + at.i) * p.keys + j] : 0.0f;
  __syncthreads();  // what was there has been read
  if (threadIdx.x == 0) *m.parts = Parts(s, g, at.b, at.i, split);
  if (threadIdx.x < kTileKeys) m.slots[threadIdx.x] = ds;
  if (!__syncthreads_or(ds != 0)) {
    const Columns nothing = {};
    for (int d0 = 0; d0 < p.features; d0 += kTileColumns) add_to_keys(nothing, s, g, at, d0);
    return;
  }
  const int groups = s.projection ? m.tile.groups(s) : 1;
  for (int group = 0; group < groups; ++group) group_gradients(m, s, g, at, group);
}

constexpr int kGradientBlocks = 3;  // fit a multiprocessor: with four, the compiler would spill

// The gradient of the keys, and parts of the others but the values'. A block takes tile after tile of its keys in its
// rows, and each query of a tile.
template <class T>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    step_input_gradients(const __grid_constant__ Step<T> s, const __grid_constant__ StepBackward<T> g) {
  ATTNEXT_SHARED(float, shared);
  const Problem<T>& p = s.problem;
  const GradientStage stage(shared, s);
  const int split = int(blockIdx.x % g.splits), first_row = int(blockIdx.x / g.splits) * g.rows_each;
  const int end_row = min(first_row + g.rows_each, p.batch);
  const int first_key = split * g.keys_each, end = min(first_key + g.keys_each, p.keys);
  fill_zero(g.model_parts + blockIdx.x * g.model_row, g.model_row);
  for (int64_t b = first_row; b < end_row; ++b) {
    const Parts parts(s, g, b, 0, split);
    fill_zero(parts.query, int64_t(p.queries) * p.features);
    fill_zero(parts.past, int64_t(p.queries) * s.channels * g.past_row);
  }
  __syncthreads();
  for (int64_t b = first_row; b < end_row; ++b)
    for (int j0 = first_key; j0 < end; j0 += kTileKeys)
      for (int i = 0; i < p.queries; ++i) tile_gradients(stage, s, g, Tile{b, i, j0}, split);
}

}  // namespace attnext::cuda
