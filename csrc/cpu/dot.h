// Attention by dot products for one instruction set; included after kernels.h and gradients.h, whose softmax and sums
// it shares. Keys that are the values are one tile, which the second product finds in the cache.

// Query (b, i) times the scale, zero-padded: the keys are taken as they are.
template <class T>
inline void scaled_query(const Problem<T>& p, int64_t b, int64_t i, T* out) {
  load_row(p.query, b, i, p.features, p.padded, out);
  for (int64_t d = 0; d < p.padded; ++d) out[d] *= p.scale;
}

template <class T>
void dot_queries(const Problem<T>& p, int64_t begin, int64_t end, T* scaled) {
  for (int64_t row = begin; row < end; ++row)
    scaled_query(p, row / p.queries, row % p.queries, scaled + row * row_of(p.padded));
}

template <class T>
inline RowTile<T> key_tile(const Problem<T>& p, int64_t b, int64_t j0, int64_t nj, T* scratch) {
  return row_tile(p, p.key, p.features, p.padded, b, j0, nj, scratch);
}

// Scores of scaled queries, minus infinity where the mask hides the slot.
template <class T>
inline void dot_scores(const Problem<T>& p, const Slots& t, const T* query, const RowTile<T>& key, T* out,
                       int64_t out_row) {
  product_transposed<T>(query, row_of(p.padded), t.ni, key.data, key.row, t.nj, p.padded, out, out_row);
  hide(p, t, out, out_row);
}

template <class T>
void dot_forward(const Forward<T>& f, int64_t task, T* scratch) {
  const Problem<T>& p = f.problem;
  const QueryBlock block = query_block(p, task);
  const auto [b, i0, ni] = block;
  const ForwardScratch<T> m(p, scratch);
  for (int64_t i = 0; i < ni; ++i) scaled_query(p, b, i0 + i, m.query + i * row_of(p.padded));
  RowTile<T> key{};
  const auto score = [&, b = b, i0 = i0, ni = ni](int64_t j0, int64_t nj) {
    if constexpr (sizeof(T) == 4)
      if (ni == 1 && lies_ready(p, p.key, p.features, p.padded))
        return with_half_type(p.key.type, row_address(p.key, b, j0),
                              [&](const auto* k) { row_dots(m.query, k, p.key.row, nj, p.padded, m.tile); });
    key = key_tile(p, b, j0, nj, p.shared ? m.values : m.keys);
    dot_scores(p, {b, i0, ni, j0, nj}, m.query, key, m.tile, kKeyTile);
  };
  const auto value = [&, b = b](int64_t j0, int64_t nj) { return p.shared ? key : value_tile(p, b, j0, nj, m.values); };
  attend(f, block, m, score, value);
}

// Adds what a tile of slots gives to the gradients of its queries, keys and values.
template <class T>
inline void dot_backward_tile(const Backward<T>& g, const Slots& t, const RowTile<T>& key, const RowTile<T>& value,
                              const BackwardTiles<T>& tiles, T* grad_query) {
  const Problem<T>& p = g.problem;
  const int64_t row = row_of(p.padded), values_row = row_of(p.padded_values), at = t.b * p.queries + t.i0;
  const T *query = g.query + at * row, *grad_context = g.grad_context ? g.grad_context + at * values_row : nullptr;
  if (grad_context) {
    product_transposed<T>(grad_context, values_row, t.ni, value.data, value.row, t.nj, p.padded_values, tiles.grads,
                          kGradKeyTile);
  } else {
    zero(tiles.grads, t.ni * kGradKeyTile);
  }
  dot_scores(p, t, query, key, tiles.scores, kGradKeyTile);
  score_gradients(g, t, tiles);
  // A query, too, or what comes in for it, may be NaN, and then only to what it attends.
  const bool finite = finite_rows(p, query, row, t.ni, p.padded);
  add_rows<T>({grad_query, row, tiles.ds, kGradKeyTile, 1, key.data, key.row, t.nj}, t.ni, p.padded, key.finite);
  add_rows<T>({tiles.grad_key, row, tiles.ds, 1, kGradKeyTile, query, row, t.ni}, t.nj, p.padded, finite);
  if (!grad_context) return;
  const bool incoming_finite = finite_rows(p, grad_context, values_row, t.ni, p.padded_values);
  add_rows<T>({tiles.grad_value, values_row, tiles.weights, 1, kGradKeyTile, grad_context, values_row, t.ni}, t.nj,
              p.padded_values, incoming_finite);
}

template <class T>
void dot_backward(const Backward<T>& g, int64_t task, T* scratch) {
  const Problem<T>& p = g.problem;
  const int64_t b = task / g.splits, split = task % g.splits, k0 = split * g.split_keys;
  const int64_t k1 = k0 + g.split_keys < p.keys ? k0 + g.split_keys : p.keys, length = length_of(p, b);
  const int64_t end = length < k1 ? length : k1, row = row_of(p.padded), values_row = row_of(p.padded_values);
  constexpr int64_t tile = kGradQueries * kGradKeyTile;
  BackwardTiles<T> tiles{};
  tiles.scores = scratch, tiles.ds = scratch + tile, tiles.weights = tiles.ds + tile,
  tiles.grads = tiles.weights + tile;
  T* keys = tiles.grads + tile;
  tiles.grad_key = keys + kGradKeyTile * row;
  tiles.values = p.shared ? keys : tiles.grad_key + kGradKeyTile * row;
  tiles.grad_value = p.shared ? tiles.grad_key : tiles.values + kGradKeyTile * values_row;
  T* grad_query = g.grad_query + (split * p.batch + b) * p.queries * row;
  zero(grad_query, p.queries * row);
  for (int64_t j0 = k0; j0 < k1; j0 += kGradKeyTile) {
    const int64_t width = k1 - j0 < kGradKeyTile ? k1 - j0 : kGradKeyTile;
    const int64_t nj = end - j0 < width ? (end > j0 ? end - j0 : 0) : width;
    zero(tiles.grad_key, width * row);
    if (!p.shared) zero(tiles.grad_value, width * values_row);
    const RowTile<T> key = key_tile(p, b, j0, nj, keys);
    const RowTile<T> value = p.shared ? key : value_tile(p, b, j0, nj, tiles.values);
    for (int64_t i0 = 0; i0 < p.queries && nj; i0 += kGradQueries) {
      const int64_t ni = p.queries - i0 < kGradQueries ? p.queries - i0 : kGradQueries;
      dot_backward_tile(g, {b, i0, ni, j0, nj}, key, value, tiles, grad_query + i0 * row);
    }
    for (int64_t j = 0; j < width; ++j) {
      store_row(g.grad_key, b, j0 + j, p.features, tiles.grad_key + j * row);
      if (!p.shared) store_row(g.grad_value, b, j0 + j, p.values, tiles.grad_value + j * values_row);
    }
  }
}
