// The backward pass for one instruction set; included after kernels.h. r is recomputed, never stored. v
// enters at the end of each sum: tanh' = 4 r (1 - r), so with u = ds r (1 - r): dq = 4 v sum_j u, dk = 4 v
// sum_i u, dv = sum ds (1 - 2r).

template <class T>
inline void zero(T* x, int64_t n) {
  for (int64_t k = 0; k < n; ++k) x[k] = 0;
}

// sum over keys of a (row of a) * (row of b), where b is not 0: a weight of 0 hides what its gradient holds.
template <class T>
inline T row_dot(Rows a, Rows b, int64_t batch, int64_t t, int64_t n) {
  T x[kKeyTile], y[kKeyTile], sum = 0;
  for (int64_t k = 0; k < n; k += kKeyTile) {
    const int64_t width = n - k < kKeyTile ? n - k : kKeyTile;
    load_row(a, batch, t, width, width, x);
    load_row(b, batch, t, width, width, y);
    for (int64_t j = 0; j < width; ++j) sum += y[j] == 0 ? T(0) : x[j] * y[j];
    a.data = static_cast<char*>(a.data) + kKeyTile * a.element * bytes(a.type);
    b.data = static_cast<char*>(b.data) + kKeyTile * b.element * bytes(b.type);
  }
  return sum;
}

// delta_i = sum_j p dp = dC . C + sum_j dA A, which needs no pass over the keys but that of dA. A row that attends
// nothing has no part in any gradient, whatever comes in: a NaN would reach the values' as 0 * NaN.
template <class T>
void delta(const Backward<T>& g, const Rows& context, const Rows& grad_context, const Rows& weights, T* padded_grad,
           T* delta, int64_t begin, int64_t end) {
  const Problem<T>& p = g.problem;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.queries, i = row % p.queries;
    T* grad = padded_grad + row * row_of(p.padded_values);
    delta[row] = 0;
    zero(grad, p.padded_values);
    if (g.log_sum_exp[row] == kHidden<T>) continue;
    if (grad_context.data) {
      load_row(grad_context, b, i, p.values, p.padded_values, grad);
      delta[row] = row_dot<T>(grad_context, context, b, i, p.values);
    }
    if (g.grad_weights.data) delta[row] += row_dot<T>(g.grad_weights, weights, b, i, p.keys);
  }
}

// Queries whose r are kept between the score and the gradients, with a vector of keys: 16 KiB at 256 features.
constexpr int kKeptQueries = kVectorBytes > 32 ? 1 : 2;

// r of two vectors of features, to kept; adds w r to a sum.
template <class T, bool Capped>
inline void keep_pair(const Vec<T> (&e)[2], const T* f, const Vec<T> (&w)[2], T* kept, Vec<T>& sum) {
  constexpr int W = kLanes<T>;
  const Vec<T> x0 = one_plus<T, Capped>(e[0], load(f)), x1 = one_plus<T, Capped>(e[1], load(f + W));
  const Vec<T> inverse = reciprocal<T>(x0 * x1), r0 = inverse * x1, r1 = inverse * x0;
  store<T>(kept, r0);
  store<T>(kept + W, r1);
  sum = (sum + w[0] * r0) + w[1] * r1;
}

// Scores of a query and a whole vector of keys, of which 32 registers hold all sums; their r to kept, as below.
template <class T, bool Capped>
inline void keep_line(const Problem<T>& p, const Tile<T>& t, T* scores, T* kept) {
  constexpr int W = kLanes<T>;
  const int64_t padded = p.padded;
  const T *weight = p.v.weight, *query = t.e, *key = t.f;
  Vec<T> sum[W];
  UNROLL for (int j = 0; j < W; ++j) sum[j] = Vec<T>{};
  for (int64_t d = 0; d < padded; d += 2 * W, kept += 2 * W * W) {
    Vec<T> e[2], w[2];
    load_some(query + d, e), load_some(weight + d, w);
    UNROLL for (int j = 0; j < W; ++j) keep_pair<T, Capped>(e, key + j * padded + d, w, kept + 2 * W * j, sum[j]);
  }
  store<T>(scores, lane_sums<T>(sum));
}

// Scores of I queries and up to a vector of keys; their r, two vectors of features at a time, to kept.
template <class T, int I, bool Capped>
inline void keep_r(const Problem<T>& p, const Tile<T>& t, T* scores, T* kept) {
  constexpr int W = kLanes<T>;
  // In variables of their own: a store to kept could change what a reference refers to, for all the compiler knows.
  const int64_t padded = p.padded, row = row_of(padded), nj = t.nj;
  const T* weight = p.v.weight;
  if constexpr (I == 1 && kRegisters > 16)
    if (nj == W) return keep_line<T, Capped>(p, t, scores, kept);
  Vec<T> sum[I * W];
  for (int k = 0; k < I * W; ++k) sum[k] = Vec<T>{};
  for (int64_t d = 0; d < padded; d += 2 * W) {
    Vec<T> w[2], e[I][2];
    load_some(weight + d, w);
    for (int i = 0; i < I; ++i) load_some(t.e + i * row + d, e[i]);
    const T* f = t.f + d;
    for (int64_t j = 0; j < nj; ++j, f += padded)
      for (int i = 0; i < I; ++i, kept += 2 * W) keep_pair<T, Capped>(e[i], f, w, kept, sum[i * W + j]);
  }
  for (int i = 0; i < I; ++i) store<T>(scores + i * kGradKeyTile, lane_sums<T>(sum + i * W));
}

// From the r of keep_r: sums of u and of t = ds r.
template <class T, int I>
inline void kept_gradients(const Tile<T>& t, int64_t padded, const T* kept, const T* ds, T* grad_query, T* grad_key,
                           T* grad_weight) {
  constexpr int W = kLanes<T>;
  const int64_t row = row_of(padded), nj = t.nj;
  for (int64_t d = 0; d < padded; d += 2 * W) {
    Vec<T> query0[I] = {}, query1[I] = {}, weight0 = {}, weight1 = {};
    T* key = grad_key + d;
    for (int64_t j = 0; j < nj; ++j, key += row) {
      Vec<T> key0 = load(key), key1 = load(key + W);
      for (int i = 0; i < I; ++i, kept += 2 * W) {
        const Vec<T> r0 = load(kept), r1 = load(kept + W);
        const Vec<T> t0 = ds[i * kGradKeyTile + j] * r0, t1 = ds[i * kGradKeyTile + j] * r1;
        const Vec<T> u0 = t0 - t0 * r0, u1 = t1 - t1 * r1;
        query0[i] += u0, query1[i] += u1;
        key0 += u0, key1 += u1;
        weight0 += t0, weight1 += t1;
      }
      store<T>(key, key0);
      store<T>(key + W, key1);
    }
    for (int i = 0; i < I; ++i) {
      add_to<T>(grad_query + i * row + d, query0[i]);
      add_to<T>(grad_query + i * row + d + W, query1[i]);
    }
    add_to<T>(grad_weight + d, weight0);
    add_to<T>(grad_weight + d + W, weight1);
  }
}

// The same where ds is known before r is: no scores, and nothing to keep. One key at a time; the division for the next
// query is under way while this one's sums are made, and its row is there also after the last.
template <class T, bool Capped>
inline void near_gradients(const Tile<T>& t, int64_t padded, const T* ds, T* grad_query, T* grad_key, T* grad_weight) {
  constexpr int W = kLanes<T>;
  const int64_t row = row_of(padded), ni = t.ni, nj = t.nj;
  for (int64_t d = 0; d < padded; d += 2 * W) {
    Vec<T> sum0 = {}, sum1 = {};
    for (int64_t j = 0; j < nj; ++j) {
      const Vec<T> f0 = load(t.f + j * padded + d), f1 = load(t.f + j * padded + d + W);
      Vec<T> key0 = {}, key1 = {}, weight0 = {}, weight1 = {};
      const T *e = t.e + d, *ds_ij = ds + j;
      T* query = grad_query + d;
      Vec<T> x0 = one_plus<T, Capped>(load(e), f0), x1 = one_plus<T, Capped>(load(e + W), f1);
      Vec<T> inverse = reciprocal<T>(x0 * x1);
      for (int64_t i = 0; i < ni; ++i, query += row, ds_ij += kGradKeyTile) {
        e += row;
        const Vec<T> next0 = one_plus<T, Capped>(load(e), f0), next1 = one_plus<T, Capped>(load(e + W), f1);
        const Vec<T> next_inverse = reciprocal<T>(next0 * next1);
        const Vec<T> r0 = inverse * x1, r1 = inverse * x0;
        const Vec<T> t0 = *ds_ij * r0, t1 = *ds_ij * r1;
        const Vec<T> u0 = t0 - t0 * r0, u1 = t1 - t1 * r1;
        add_to<T>(query, u0);
        add_to<T>(query + W, u1);
        key0 += u0, key1 += u1;
        weight0 += t0, weight1 += t1;
        x0 = next0, x1 = next1, inverse = next_inverse;
      }
      add_to<T>(grad_key + j * row + d, key0);
      add_to<T>(grad_key + j * row + d + W, key1);
      sum0 += weight0, sum1 += weight1;
    }
    add_to<T>(grad_weight + d, sum0);
    add_to<T>(grad_weight + d + W, sum1);
  }
}

// Slot by slot, and only where ds is not 0: a hidden slot may hold a NaN.
template <class T>
inline void far_gradients(const Problem<T>& p, const Tile<T>& t, const T* ds, T* grad_query, T* grad_key,
                          T* grad_weight) {
  T *q = t.row, *k = t.row + p.padded, *sums = t.row + 2 * p.padded;
  for (int64_t j = 0; j < t.nj; ++j) {
    load_row(p.key, t.b, t.j0 + j, p.features, p.padded, k);
    zero(sums, p.padded);
    for (int64_t i = 0; i < t.ni; ++i) {
      const T slot = ds[i * kGradKeyTile + j];
      if (slot == 0) continue;
      load_row(p.query, t.b, t.i0 + i, p.features, p.padded, q);
      for (int64_t d = 0; d < p.padded; d += kLanes<T>) {
        const Vec<T> r = far_r(q + d, k + d), part = slot * r, u = part - part * r;
        add_to<T>(grad_query + i * row_of(p.padded) + d, u);
        add_to<T>(grad_key + j * row_of(p.padded) + d, u);
        add_to<T>(sums + d, part);
      }
    }
    for (int64_t d = 0; d < p.padded; ++d) grad_weight[d] += sums[d];
  }
}

template <class T>
struct BackwardTiles {  // what a task keeps for one tile of keys
  T *grad_key, *grad_value, *values, *scores, *ds, *weights, *grads, *kept;
};

// From the scores of a tile, and dC . h in tiles.grads: ds, and in tiles.weights what multiplies the incoming gradient
// in grad_value. Keys up to a whole vector are written, with ds = 0 beyond nj.
template <class T>
inline void score_gradients(const Backward<T>& g, const Slots& t, const BackwardTiles<T>& tiles) {
  const Problem<T>& p = g.problem;
  constexpr int64_t row = kGradKeyTile;
  const int64_t width = round_up(t.nj, kLanes<T>);
  for (int64_t i = 0; i < t.ni; ++i) {
    T *s = tiles.scores + i * row, *ds = tiles.ds + i * row, *weights = tiles.weights + i * row,
      *grad = tiles.grads + i * row;
    if (g.grad_weights.data) {
      Rows incoming = g.grad_weights;
      incoming.data = static_cast<char*>(incoming.data) + t.j0 * incoming.element * bytes(incoming.type);
      load_row(incoming, t.b, t.i0 + i, t.nj, t.nj, g.from_scores ? grad : ds);
      if (!g.from_scores)
        for (int64_t j = 0; j < t.nj; ++j) grad[j] += ds[j];
    }
    for (int64_t j = t.nj; j < width; ++j) ds[j] = 0;
    if (g.from_scores) {
      for (int64_t j = 0; j < t.nj; ++j) ds[j] = s[j] == kHidden<T> ? T(0) : grad[j];
      continue;
    }
    const int64_t at = t.b * p.queries + t.i0 + i;
    const T shift = g.log_sum_exp[at] == kHidden<T> ? -kHidden<T> : g.log_sum_exp[at], delta = g.delta[at];
    for (int64_t j = t.nj; j < width; ++j) s[j] = kHidden<T>;
    for (int64_t j = 0; j < width; j += kLanes<T>) store<T>(s + j, weights_of<T>(load(s + j), shift));
    for (int64_t j = 0; j < t.nj; ++j) weights[j] = 1;
    if (p.keep_threshold) drop(p, t.b, t.i0 + i, t.j0, t.nj, weights);
    for (int64_t j = 0; j < t.nj; ++j) {
      ds[j] = s[j] == 0 ? T(0) : s[j] * (weights[j] * grad[j] - delta);
      weights[j] *= s[j];
    }
  }
}

// Whether scores are taken as in the forward pass, whose log-sum-exp is at hand, or on the way to r.
template <class T>
inline bool scores_by_tile(const Problem<T>& p) {
  return !(p.v.size <= kSmallWeights);
}

template <class T, int I, bool Capped>
inline void near_block(const Backward<T>& g, const Tile<T>& t, const BackwardTiles<T>& tiles, T* grad_query,
                       T* grad_weight) {
  const Problem<T>& p = g.problem;
  keep_r<T, I, Capped>(p, t, scores_by_tile(p) ? tiles.ds : tiles.scores, tiles.kept);  // ds comes next
  hide(p, t, tiles.scores, kGradKeyTile);
  score_gradients(g, t, tiles);
  kept_gradients<T, I>(t, p.padded, tiles.kept, tiles.ds, grad_query, tiles.grad_key, grad_weight);
}

// Block by block of the tile, so that r stays in the first-level cache.
template <class T, bool Capped>
inline void near_tile(const Backward<T>& g, const Tile<T>& t, const BackwardTiles<T>& tiles, T* grad_query,
                      T* grad_weight) {
  constexpr int I = kKeptQueries, J = kLanes<T>;
  const int64_t padded = g.problem.padded, row = row_of(padded);
  if (g.from_scores) return near_gradients<T, Capped>(t, padded, tiles.ds, grad_query, tiles.grad_key, grad_weight);
  if (scores_by_tile(g.problem)) score_tile(g.problem, t, tiles.scores, kGradKeyTile);
  for (int64_t j = 0; j < t.nj; j += J)
    for (int64_t i = 0; i < t.ni; i += I) {
      const int64_t ni = t.ni - i < I ? t.ni - i : I, nj = t.nj - j < J ? t.nj - j : J;
      const int64_t at = i * kGradKeyTile + j;
      const Tile<T> block{{t.b, t.i0 + i, ni, t.j0 + j, nj}, t.e + i * row, t.f + j * padded, t.range, t.folded, t.row};
      BackwardTiles<T> parts = tiles;
      parts.grad_key += j * row;
      parts.scores += at, parts.ds += at, parts.weights += at, parts.grads += at;
      if (ni == I) {
        near_block<T, I, Capped>(g, block, parts, grad_query + i * row, grad_weight);
      } else {
        near_block<T, 1, Capped>(g, block, parts, grad_query + i * row, grad_weight);
      }
    }
}

// Adds what the queries [i0, i0 + ni) give to a tile of keys, and takes what they get from it.
template <class T>
inline void backward_tile(const Backward<T>& g, const Tile<T>& t, const RowTile<T>& value,
                          const BackwardTiles<T>& tiles, T* grad_query, T* grad_weight, T& ds_sum) {
  const Problem<T>& p = g.problem;
  const int64_t values_row = row_of(p.padded_values), query = t.b * p.queries + t.i0;
  if (g.from_scores) {
    zero(tiles.scores, t.ni * kGradKeyTile);
    hide(p, t, tiles.scores, kGradKeyTile);
    score_gradients(g, t, tiles);
  } else if (g.grad_context) {
    product_transposed<T>(g.grad_context + query * values_row, values_row, t.ni, value.data, value.row, t.nj,
                          p.padded_values, tiles.grads, kGradKeyTile);
  } else {
    zero(tiles.grads, t.ni * kGradKeyTile);
  }
  switch (t.range) {
    case Range::kPlain:
      near_tile<T, false>(g, t, tiles, grad_query, grad_weight);
      break;
    case Range::kCapped:
      near_tile<T, true>(g, t, tiles, grad_query, grad_weight);
      break;
    case Range::kFar:
      if (!g.from_scores) {
        score_tile(p, t, tiles.scores, kGradKeyTile);
        score_gradients(g, t, tiles);
      }
      far_gradients(p, t, tiles.ds, grad_query, tiles.grad_key, grad_weight);
      break;
  }
  const int64_t width = round_up(t.nj, kLanes<T>);
  Vec<T> sum = {};
  for (int64_t i = 0; i < t.ni; ++i)
    for (int64_t j = 0; j < width; j += kLanes<T>) sum += load(tiles.ds + i * kGradKeyTile + j);
  for (int lane = 0; lane < kLanes<T>; ++lane) ds_sum += sum[lane];
  if (g.grad_context)
    add_rows<T>({tiles.grad_value, values_row, tiles.weights, 1, kGradKeyTile, g.grad_context + query * values_row,
                 values_row, t.ni},
                t.nj, p.padded_values,
                finite_rows(p, g.grad_context + query * values_row, values_row, t.ni, p.padded_values));
}

template <class T>
void backward(const Backward<T>& all, int64_t task, T* scratch) {
  Backward<T> g = all;
  g.problem = of_row(all.problem, task / g.splits);
  const Problem<T>& p = g.problem;
  const int64_t b = task / g.splits, split = task % g.splits, k0 = split * g.split_keys;
  const int64_t k1 = k0 + g.split_keys < p.keys ? k0 + g.split_keys : p.keys;
  const int64_t length = length_of(p, b), visible_end = length < k1 ? length : k1;
  constexpr int64_t tile = kGradQueries * kGradKeyTile;
  const int64_t features_row = row_of(p.padded), values_row = row_of(p.padded_values);
  BackwardTiles<T> tiles;
  tiles.grad_key = scratch;
  tiles.grad_value = tiles.grad_key + kGradKeyTile * features_row;
  tiles.values = tiles.grad_value + kGradKeyTile * values_row;
  T* folded = tiles.values + kGradKeyTile * values_row;
  tiles.scores = folded + kGradQueries * features_row;
  tiles.ds = tiles.scores + tile, tiles.weights = tiles.ds + tile, tiles.grads = tiles.weights + tile;
  tiles.kept = tiles.grads + tile;
  T* row = tiles.kept + kKept * p.padded;  // 3 padded
  // Summed tile by tile first: one long sum of like terms would lose a bit with every doubling of its length.
  T* tile_weight = row + 3 * p.padded;
  T* keys = tile_weight + p.padded;
  laid_out<T>(scratch, keys + (copies_keys(p) ? kGradKeyTile * features_row : 0), backward_scratch(p));
  T* grad_query = g.grad_query + (split * p.batch + b) * p.queries * features_row;
  T* grad_weight = g.grad_weight + task * p.padded;
  zero(grad_query, p.queries * features_row);
  zero(grad_weight, p.padded);
  T ds_sum = 0;
  for (int64_t j0 = k0; j0 < visible_end; j0 += kGradKeyTile) {
    const int64_t nj = visible_end - j0 < kGradKeyTile ? visible_end - j0 : kGradKeyTile, at = b * p.keys + j0;
    zero(tile_weight, p.padded);
    zero(tiles.grad_key, nj * features_row);
    zero(tiles.grad_value, nj * values_row);
    const RowTile<T> value = g.from_scores ? RowTile<T>{} : value_tile(p, b, j0, nj, tiles.values);
    const T key_limit = largest(p.key_limit + at, nj), *f = exponential_tile(p, b, j0, nj, keys);
    for (int64_t i0 = 0; i0 < p.queries; i0 += kGradQueries) {
      const int64_t ni = p.queries - i0 < kGradQueries ? p.queries - i0 : kGradQueries, query = b * p.queries + i0;
      const Range range = range_of(p, largest(g.query_limit + query, ni), key_limit);
      const Tile<T> t{{b, i0, ni, j0, nj}, g.query + query * features_row, f, range, folded, row};
      backward_tile(g, t, value, tiles, grad_query + i0 * features_row, tile_weight, ds_sum);
    }
    for (int64_t d = 0; d < p.padded; ++d) grad_weight[d] += tile_weight[d];
    for (int64_t j = 0; j < nj; ++j) {
      T* grad = tiles.grad_key + j * features_row;
      for (int64_t d = 0; d < p.features; ++d) grad[d] *= p.v.gain[d];
      store_row(g.grad_key, b, j0 + j, p.features, grad);
      if (!g.from_scores) store_row(g.grad_value, b, j0 + j, p.values, tiles.grad_value + j * values_row);
    }
  }
  zero(row, 2 * p.padded);
  zero(tiles.grad_value, p.padded_values);
  for (int64_t j = visible_end > k0 ? visible_end : k0; j < k1; ++j) {
    store_row(g.grad_key, b, j, p.features, row);
    if (!g.from_scores) store_row(g.grad_value, b, j, p.values, tiles.grad_value);
  }
  for (int64_t d = 0; d < p.padded; ++d) grad_weight[d] = ds_sum - 2 * grad_weight[d];
}

// Adds the splits of grad_query rows [begin, end) in their order and multiplies the gain in.
template <class T>
void finish_query(const Backward<T>& g, const Rows& grad_query, T* scratch, int64_t begin, int64_t end) {
  const Problem<T>& p = g.problem;
  for (int64_t row = begin; row < end; ++row) {
    const T* gain = p.heads[row / p.queries % p.head_count].gain;
    zero(scratch, p.padded);
    for (int64_t s = 0; s < g.splits; ++s) {
      const T* part = g.grad_query + (s * p.batch * p.queries + row) * row_of(p.padded);
      for (int64_t d = 0; d < p.padded; ++d) scratch[d] += part[d];
    }
    for (int64_t d = 0; d < p.padded; ++d) scratch[d] *= gain[d];
    store_row(grad_query, row / p.queries, row % p.queries, p.features, scratch);
  }
}
