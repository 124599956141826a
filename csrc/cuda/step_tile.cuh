// A tile of keys of a step that sees its past: the features f_jc of past weights and the sums q + k_j + L f_j, made in
// shared memory and registers. A warp has eight of the keys, a lane two columns: of filters, or of features.
#pragma once

#include "platform.cuh"
#include "problem.cuh"

namespace attnext::cuda {

// What makes weights of scores, as RULES in ops.py counts them.
enum class Rule : int { kSoftmax, kSigmoid, kForward };

// The sum inside the tanh is q + k_j + L f_j; without filters there is no f, and without a projection L is 1.
template <class T>
struct Step {
  Problem<T> problem;  // its mask is the same for all queries
  Rows<T> value;
  Rule rule;
  const T* score_weight;  // (D,)
  int channels, width;    // of the filters; no channel is no filter
  int filter_count;       // without a projection D
  const T* filters;       // (filter_count, channels, width)
  const T* projection;    // (D, filter_count), or null
  Rows<float> past[2], previous, transition;
  const int64_t* window;  // (B, Tq, 2), or null
};

constexpr int kTileKeys = 32;
constexpr int kWarpKeys = kTileKeys / kWarpsPerBlock;
constexpr int kTileColumns = 2 * kWarp;    // filters, features or places that a tile's products have at a time
constexpr int kPlaces = kTileColumns;      // of a filter, at a time
constexpr int kStageRow = kPlaces + 1;     // of the stage: odd, so that lanes apart by a row have different banks
constexpr int kKeyRow = kTileKeys + 4;     // a multiple of four for vectors, whose rows begin in different banks
constexpr int kPlaceUnit = 8;              // places come together by so many
constexpr int kMaxFilters = kTileColumns;  // whose features a block keeps; of more it makes them again where needed
static_assert(kPlaces == kTileColumns && kWarpKeys == 8 && kPlaceUnit + kWarpKeys == 16);

// The keys that query i may attend: of a window inside the length.
struct Span {
  int first, last;
  __device__ bool holds(int j) const { return first <= j && j < last; }
};

template <class T>
__device__ Span span_of(const Step<T>& s, int64_t b, int i) {
  const Problem<T>& p = s.problem;
  const int64_t length = p.slots.length(b, p.keys);
  if (!s.window) return {0, int(length)};
  const int64_t* window = s.window + 2 * (b * p.queries + i);
  const int64_t first = max(int64_t(0), min(window[0], length));
  return {int(first), int(max(first, min(window[1], length)))};
}

// A query's slots of a tile of keys.
struct Tile {
  int64_t b;
  int i, j0;
  __device__ int first_of_warp() const { return j0 + int(threadIdx.x / kWarp) * kWarpKeys; }
};

// A block's shared memory.
struct TileStage {
  int filters;      // that come together: kWarp or kMaxFilters
  float* window;    // past weights around the tile's keys
  float* stage;     // (filters, kStageRow): places of filters, or columns of L
  float* features;  // (filters, kKeyRow)

  static constexpr int kWindow = kTileKeys + kPlaces;

  template <class T>
  __host__ __device__ static int filters_of(const Step<T>& s) {
    return s.filter_count <= kWarp ? kWarp : kMaxFilters;
  }
  // Of a step without filters nothing.
  template <class T>
  __host__ static int numbers(const Step<T>& s) {
    return s.channels == 0 ? 0 : kWindow + filters_of(s) * (kStageRow + (s.projection ? kKeyRow : 0));
  }
  // Groups of filters that come together.
  template <class T>
  __device__ static int groups(const Step<T>& s) {
    return (s.filter_count + kMaxFilters - 1) / kMaxFilters;
  }

  template <class T>
  __device__ TileStage(float* shared, const Step<T>& s)
      : filters(filters_of(s)), window(shared), stage(window + kWindow), features(stage + filters * kStageRow) {}
};
static_assert(TileStage::kWindow % 4 == 0 && kWarp * kStageRow % 4 == 0);

// A thread's numbers of its warp's keys, in two columns: n kWarp + lane.
struct Columns {
  float of_key[kWarpKeys][2];

  __device__ __forceinline__ float* operator[](int k) { return of_key[k]; }
  __device__ __forceinline__ const float* operator[](int k) const { return of_key[k]; }

  __device__ __forceinline__ void add(const Columns& x) {
#pragma unroll
    for (int k = 0; k < kWarpKeys; ++k) of_key[k][0] += x[k][0], of_key[k][1] += x[k][1];
  }

  // Writes each column as a row of keys.
  __device__ __forceinline__ void store(float* to, int columns) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (n * kWarp >= columns) break;
      float column[kWarpKeys];
#pragma unroll
      for (int k = 0; k < kWarpKeys; ++k) column[k] = of_key[k][n];
      store_floats(to + (n * kWarp + lane) * kKeyRow + warp * kWarpKeys, column);
    }
  }
};

// A number, or 0 in place of one that isn't there: loaded from where one is, so that no load waits for a branch.
template <class T>
__device__ __forceinline__ float load_if(bool there, const T* from, const T* otherwise) {
  const float x = to_float(*(there ? from : otherwise));
  return there ? x : 0.0f;
}

// Lays out up to kPlaces places of a channel, from o0 on: the past weights that they see from the tile's keys, 0 in
// hidden slots and beyond the ends, and the filters from f0 on, 0 beyond the last. Returns how many, in whole units.
template <class T>
__device__ int stage_places(const TileStage& m, const Step<T>& s, const Tile& at, int f0, int c, int o0) {
  const Problem<T>& p = s.problem;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int places = min(kPlaces, (s.width - o0 + kPlaceUnit - 1) / kPlaceUnit * kPlaceUnit);
  __syncthreads();  // what was there has been read
  static_assert(kTileKeys + kPlaces <= kThreads);
  const int n = threadIdx.x, j = at.j0 + o0 - s.width / 2 + n;
  if (n < kTileKeys + places) {
    const bool seen = j >= 0 && j < p.slots.length(at.b, p.keys) && p.slots.shows(at.b, 0, j);
    m.window[n] = seen ? s.past[c].at(at.b, at.i)[j * s.past[c].column] : 0.0f;
  }
#pragma unroll 4
  for (int f = warp; f < m.filters; f += kWarpsPerBlock) {
    const T* filter = s.filters + (int64_t(f0 + f) * s.channels + c) * s.width + o0;
#pragma unroll
    for (int o = lane; o < kPlaces; o += kWarp)
      if (o < places)
        m.stage[f * kStageRow + o] = load_if(f0 + f < s.filter_count && o0 + o < s.width, filter + o, s.filters);
  }
  __syncthreads();
  return places;
}

// Features of the tile's keys by the filters f0 + n kWarp + lane.
template <class T>
__device__ __forceinline__ Columns tile_features(const TileStage& m, const Step<T>& s, const Tile& at, int f0) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Columns sum = {};
  for (int c = 0; c < s.channels; ++c)
    for (int o0 = 0; o0 < s.width; o0 += kPlaces) {
      const int places = stage_places(m, s, at, f0, c, o0);
#pragma unroll 1
      for (int o = 0; o < places; o += kPlaceUnit) {
        float seen[kWarpKeys + kPlaceUnit];
        load_floats(m.window + warp * kWarpKeys + o, seen);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n * kWarp >= m.filters) break;
          const float* filter = m.stage + (n * kWarp + lane) * kStageRow + o;
#pragma unroll
          for (int d = 0; d < kPlaceUnit; ++d)
#pragma unroll
            for (int k = 0; k < kWarpKeys; ++k) sum[k][n] = fmaf(filter[d], seen[k + d], sum[k][n]);
        }
      }
    }
  return sum;
}

// Lays out the part of L of features from d0 and filters from f0 on, with 0 beyond.
template <class T>
__device__ void stage_projection(const TileStage& m, const Step<T>& s, int d0, int f0) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __syncthreads();
#pragma unroll 4
  for (int d = warp; d < kTileColumns; d += kWarpsPerBlock)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (n * kWarp >= m.filters) break;
      const int f = n * kWarp + lane;
      m.stage[f * kStageRow + d] = load_if(d0 + d < s.problem.features && f0 + f < s.filter_count,
                                           s.projection + (int64_t(d0 + d) * s.filter_count + f0 + f), s.projection);
    }
  __syncthreads();
}

// Adds, over `count` rows of keys, each number of a key times that of a column: x[n][key] y[n kRow + column kColumn].
template <int kRow, int kColumn>
__device__ __forceinline__ void add_outer(Columns& sum, const float* x, const float* y, int columns, int count) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 4
  for (int n = 0; n < count; ++n) {
    float of_keys[kWarpKeys];
    load_floats(x + n * kKeyRow + warp * kWarpKeys, of_keys);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (m * kWarp >= columns) break;
      const float of_column = y[n * kRow + (m * kWarp + lane) * kColumn];
#pragma unroll
      for (int k = 0; k < kWarpKeys; ++k) sum[k][m] = fmaf(of_keys[k], of_column, sum[k][m]);
    }
  }
}

// L f of the tile's keys and the features d0 + n kWarp + lane, by the whole block, from d0 = 0 on. Of several groups of
// filters, `last` is the one that is left in shared memory.
template <class T>
__device__ __forceinline__ Columns past_sums(const TileStage& m, const Step<T>& s, const Tile& at, int d0, int last) {
  Columns sum = {};
  const int groups = s.channels == 0 ? 0 : s.projection ? m.groups(s) : 1;
  for (int n = 0, group = last; n < groups; ++n) {
    group = group + 1 < groups ? group + 1 : 0;
    const int f0 = s.projection ? group * m.filters : d0;
    if (!s.projection || d0 == 0 || groups > 1) {
      const Columns features = tile_features(m, s, at, f0);
      if (!s.projection) return features;
      features.store(m.features, m.filters);
    }
    stage_projection(m, s, d0, f0);
    add_outer<kStageRow, 1>(sum, m.features, m.stage, kTileColumns, min(m.filters, s.filter_count - f0));
  }
  return sum;
}

// Which of its keys a warp may read: bit k for the k-th.
template <class T>
__device__ unsigned visible_keys(const Step<T>& s, const Tile& at) {
  const Problem<T>& p = s.problem;
  const int length = p.slots.length(at.b, p.keys), first = at.first_of_warp();
  unsigned visible = 0;
#pragma unroll
  for (int k = 0; k < kWarpKeys; ++k)
    if (first + k < length && p.slots.shows(at.b, 0, first + k)) visible |= 1u << k;
  return visible;
}

// q + k of a warp's keys, 0 for the key where it is hidden.
template <class T>
__device__ __forceinline__ Columns load_sums(const Step<T>& s, const Tile& at, unsigned visible, int d0) {
  const Problem<T>& p = s.problem;
  const int d = d0 + int(threadIdx.x % kWarp);
  const bool inside[2] = {d < p.features, d + kWarp < p.features};
  const int64_t column = p.key.column;
  Columns sum;
  const T* key = p.key.at(at.b, at.first_of_warp()) + d * column;
#pragma unroll
  for (int k = 0; k < kWarpKeys; ++k, key += p.key.row)
#pragma unroll
    for (int n = 0; n < 2; ++n) sum[k][n] = inside[n] && visible >> k & 1 ? to_float(key[n * kWarp * column]) : 0.0f;
  const T* query = p.query.at(at.b, at.i) + d * p.query.column;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float of_query = inside[n] ? to_float(query[n * kWarp * p.query.column]) : 0.0f;
#pragma unroll
    for (int k = 0; k < kWarpKeys; ++k) sum[k][n] += of_query;
  }
  return sum;
}

// r = 1 / (1 + exp(2 s)) of two sums, by one reciprocal: exp of the sum itself saturates on both sides, up to a cap
// whose square is finite.
__device__ __forceinline__ float2 two_r(float s0, float s1) {
  constexpr float kTwiceLog2E = 2.885390081777927f, kCap = 60;
  const float x0 = 1 + power_of_two(at_most(kTwiceLog2E * s0, kCap));
  const float x1 = 1 + power_of_two(at_most(kTwiceLog2E * s1, kCap));
  const float inverse = reciprocal(x0 * x1);
  return make_float2(inverse * x1, inverse * x0);
}

}  // namespace attnext::cuda
