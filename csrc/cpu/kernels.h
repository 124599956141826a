// Additive attention for one instruction set: included once for each, inside its namespace. Letters as in the
// mathematics of ARCHITECTURE.md: E = exp(2q), F = exp(2k), x = 1 + E F, r = 1/x, tanh(q + k) = 1 - 2r; p are
// the softmax weights.

constexpr float kNoFloat = -__builtin_inff();
template <class T>
constexpr T kHidden = T(kNoFloat);  // the score of a slot that may not be attended

template <class T>
inline int64_t length_of(const Problem<T>& p, int64_t b) {
  return p.lengths ? p.lengths[b] : p.keys;
}

inline bool visible(const Mask& mask, int64_t b, int64_t i, int64_t j) {
  return !mask.data || mask.data[b * mask.batch + i * mask.query + j * mask.key];
}

// ---------------------------------------------------------------------------------------------- exponentials

// out = exp(2 row), zero-padded. Returns the row's limit: max |x|, or infinity if it is not finite
// throughout.
template <class T>
inline T exponential_row(const Rows& rows, int64_t b, int64_t t, int64_t n, int64_t padded, T* out) {
  load_row(rows, b, t, n, padded, out);
  const T limit = magnitude(out, padded);
  for (int64_t k = 0; k < padded; k += kLanes<T>) store<T>(out + k, exp<T>(2 * load(out + k)));
  for (int64_t k = n; k < padded; ++k) out[k] = 0;
  return limit;
}

template <class T>
void exponentials(const Exponentials<T>& e, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / e.rows, t = row % e.rows;
    T* out = e.output + row * e.padded;
    if ((e.lengths && t >= e.lengths[b]) || !visible(e.mask, b, 0, t)) {
      for (int64_t k = 0; k < e.padded; ++k) out[k] = 0;
      e.limit[row] = 0;
    } else {
      e.limit[row] = exponential_row(e.input, b, t, e.features, e.padded, out);
    }
  }
}

// How a tile's r is computed, decided from the largest |q|, |k| and |v| in it.
enum class Range { kPlain, kCapped, kFar };

template <class T>
inline Range range_of(const Problem<T>& p, T query_limit, T key_limit) {
  if (!(p.weight_limit <= Limits<T>::max_weight)) return Range::kFar;
  if (query_limit + key_limit <= Limits<T>::plain) return Range::kPlain;
  if (query_limit <= Limits<T>::max_argument && key_limit <= Limits<T>::max_argument) return Range::kCapped;
  return Range::kFar;
}

template <class T>
inline T largest(const T* x, int64_t n) {
  T result = 0;
  for (int64_t k = 0; k < n; ++k) result = x[k] > result ? x[k] : result;
  return result;
}

// x = 1 + E F. Above the cap r is 0 to the last place, and the cap keeps the product of a pair finite.
template <class T, bool Capped>
inline Vec<T> one_plus(Vec<T> e, Vec<T> f) {
  const Vec<T> x = e * f + T(1);
  if constexpr (!Capped) return x;
  const Vec<T> cap = Vec<T>{} + Limits<T>::cap;
  return x < cap ? x : cap;
}

// r of features that are too large for E F: exp of the sum itself, which saturates on both sides.
template <class T>
inline Vec<T> far_r(const T* q, const T* k) {
  return T(1) / (exp<T>(2 * (load(q) + load(k))) + T(1));
}

// ---------------------------------------------------------------------------------------------------- scores

// sum_d w_d r_ijd for I x J pairs, with one division for four features, or for two at the end and with the
// cap.
template <class T, int I, int J, bool Capped>
inline Vec<T> score_pairs(const T* const* e, const T* const* f, const T* w, int64_t padded) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[I * J] = {};
  int64_t d = 0;
  if constexpr (!Capped) {
    for (; d + 4 * W <= padded; d += 4 * W) {
      const Vec<T> w0 = load(w + d), w1 = load(w + d + W), w2 = load(w + d + 2 * W), w3 = load(w + d + 3 * W);
      for (int j = 0; j < J; ++j) {
        const T* fj = f[j] + d;
        const Vec<T> f0 = load(fj), f1 = load(fj + W), f2 = load(fj + 2 * W), f3 = load(fj + 3 * W);
        for (int i = 0; i < I; ++i) {
          const T* ei = e[i] + d;
          const Vec<T> x0 = one_plus<T, false>(load(ei), f0), x1 = one_plus<T, false>(load(ei + W), f1);
          const Vec<T> x2 = one_plus<T, false>(load(ei + 2 * W), f2), x3 = one_plus<T, false>(load(ei + 3 * W), f3);
          const Vec<T> x01 = x0 * x1, x23 = x2 * x3;
          const Vec<T> n01 = w0 * x1 + w1 * x0, n23 = w2 * x3 + w3 * x2;
          sum[i * J + j] += (n01 * x23 + n23 * x01) / (x01 * x23);
        }
      }
    }
  }
  for (; d < padded; d += 2 * W) {
    const Vec<T> w0 = load(w + d), w1 = load(w + d + W);
    for (int j = 0; j < J; ++j) {
      const Vec<T> f0 = load(f[j] + d), f1 = load(f[j] + d + W);
      for (int i = 0; i < I; ++i) {
        const Vec<T> x0 = one_plus<T, Capped>(load(e[i] + d), f0), x1 = one_plus<T, Capped>(load(e[i] + d + W), f1);
        sum[i * J + j] += (w0 * x1 + w1 * x0) / (x0 * x1);
      }
    }
  }
  return lane_sums<T>(sum);
}

// The queries [i0, i0 + ni) of batch row b, which a forward task serves.
struct QueryBlock {
  int64_t b, i0, ni;
};

template <class T>
inline QueryBlock query_block(const Problem<T>& p, int64_t task) {
  const int64_t blocks = (p.queries + kQueryBlock - 1) / kQueryBlock, i0 = task % blocks * kQueryBlock;
  return {task / blocks, i0, p.queries - i0 < kQueryBlock ? p.queries - i0 : kQueryBlock};
}

// A tile of queries [i0, i0 + ni) and keys [j0, j0 + nj) of batch row b, with their exponentials.
template <class T>
struct Tile {
  int64_t b, i0, ni, j0, nj;
  const T* e;  // (ni, padded)
  const T* f;  // (nj, padded)
  Range range;
  T* row;  // scratch for Range::kFar: a query and a key as they are, and in backward a sum
};

template <class T, bool Capped>
inline void near_scores(const Problem<T>& p, const Tile<T>& t, T* out, int64_t out_row) {
  constexpr int W = kLanes<T>, I = kTileRows<T>;
  const int64_t whole = t.ni / I * I;
  tiles_of_rows<T, I, W / I>(t.e, p.padded, 0, whole, t.f, p.padded, t.nj, out, out_row, [&](const T** e, const T** f) {
    return score_pairs<T, I, W / I, Capped>(e, f, p.weight, p.padded);
  });
  tiles_of_rows<T, 1, W>(t.e, p.padded, whole, t.ni, t.f, p.padded, t.nj, out, out_row, [&](const T** e, const T** f) {
    return score_pairs<T, 1, W, Capped>(e, f, p.weight, p.padded);
  });
}

template <class T>
inline void far_scores(const Problem<T>& p, const Tile<T>& t, T* out, int64_t out_row) {
  T *q = t.row, *k = t.row + p.padded;
  for (int64_t j = 0; j < t.nj; ++j) {
    load_row(p.key, t.b, t.j0 + j, p.features, p.padded, k);
    for (int64_t i = 0; i < t.ni; ++i) {
      load_row(p.query, t.b, t.i0 + i, p.features, p.padded, q);
      Vec<T> sum = {};
      for (int64_t d = 0; d < p.padded; d += kLanes<T>) sum += load(p.weight + d) * far_r(q + d, k + d);
      T total = 0;
      for (int lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
      out[i * out_row + j] = total;
    }
  }
}

// out[i][j] = scale * (v . tanh(q_i + k_j) - sum v), minus infinity where the mask hides the slot.
template <class T>
inline void score_tile(const Problem<T>& p, const Tile<T>& t, T* out, int64_t out_row) {
  switch (t.range) {
    case Range::kPlain:
      near_scores<T, false>(p, t, out, out_row);
      break;
    case Range::kCapped:
      near_scores<T, true>(p, t, out, out_row);
      break;
    case Range::kFar:
      far_scores(p, t, out, out_row);
      break;
  }
  if (!p.mask.data) return;
  for (int64_t i = 0; i < t.ni; ++i)
    for (int64_t j = 0; j < t.nj; ++j)
      if (!visible(p.mask, t.b, t.i0 + i, t.j0 + j)) out[i * out_row + j] = kHidden<T>;
}

template <class T>
void scores(const Scores<T>& s, int64_t task, T* scratch) {
  const Problem<T>& p = s.problem;
  const auto [b, i0, ni] = query_block(p, task);
  const int64_t length = length_of(p, b);
  T *e = scratch, *tile = e + kQueryBlock * p.padded, *limit = tile + kQueryBlock * kKeyTile;
  for (int64_t i = 0; i < ni; ++i)
    limit[i] = exponential_row(p.query, b, i0 + i, p.features, p.padded, e + i * p.padded);
  const T query_limit = largest(limit, ni);
  for (int64_t j0 = 0; j0 < p.keys; j0 += kKeyTile) {
    const int64_t width = p.keys - j0 < kKeyTile ? p.keys - j0 : kKeyTile;
    const int64_t nj = length - j0 < width ? (length > j0 ? length - j0 : 0) : width;
    const int64_t at = b * p.keys + j0;
    const Range range = range_of(p, query_limit, largest(p.key_limit + at, nj));
    if (nj)
      score_tile(p, {b, i0, ni, j0, nj, e, p.exp_key + at * p.padded, range, limit + kQueryBlock}, tile, kKeyTile);
    for (int64_t i = 0; i < ni; ++i) {
      for (int64_t j = 0; j < nj; ++j) tile[i * kKeyTile + j] += s.constant;
      for (int64_t j = nj; j < width; ++j) tile[i * kKeyTile + j] = kHidden<T>;
      Rows out = s.scores;
      out.data = static_cast<char*>(out.data) + j0 * bytes(out.type);
      store_row(out, b, i0 + i, width, tile + i * kKeyTile);
    }
  }
}

// --------------------------------------------------------------------------------------------------- forward

inline uint32_t mix(uint32_t x) {  // the hash of reference.dropout_keep
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Multiplies the weights of keys [j0, j0 + n) of query i by 0 or 1 / (1 - dropout).
template <class T>
inline void drop(const Problem<T>& p, int64_t b, int64_t i, int64_t j0, int64_t n, T* weights) {
  const uint64_t row = uint64_t(b * p.queries + i);
  const uint32_t row_hash = mix((mix(uint32_t(row) ^ uint32_t(p.seed)) + uint32_t(row >> 32)) ^ uint32_t(p.seed >> 32));
  for (int64_t j = 0; j < n; ++j)
    weights[j] *= mix(row_hash ^ mix(uint32_t(j0 + j))) >= p.keep_threshold ? p.keep_scale : T(0);
}

template <class T>
struct ValueTile {
  const T* data;
  int64_t row;
  bool finite;  // known only where the mask differs between queries
};

template <class T>
constexpr Type kTypeOf = sizeof(T) == 4 ? Type::kFloat : Type::kDouble;

// Values of keys [j0, j0 + nj) as padded rows of T: the tensor's own where they are that, else a copy. Hidden
// rows are 0.
template <class T>
inline ValueTile<T> value_tile(const Problem<T>& p, int64_t b, int64_t j0, int64_t nj, T* scratch) {
  const bool whole = p.value.element == 1 && p.values == p.padded_values && p.value.type == kTypeOf<T>;
  if (whole && !p.mask.data) return {reinterpret_cast<const T*>(row_address(p.value, b, j0)), p.value.row, true};
  bool finite = true;
  for (int64_t j = 0; j < nj; ++j) {
    T* row = scratch + j * p.padded_values;
    if (p.mask.query == 0 && !visible(p.mask, b, 0, j0 + j)) {
      for (int64_t h = 0; h < p.padded_values; ++h) row[h] = 0;
      continue;
    }
    load_row(p.value, b, j0 + j, p.values, p.padded_values, row);
    if (p.mask.query != 0) finite &= magnitude(row, p.padded_values) <= Limits<T>::largest;
  }
  return {scratch, p.padded_values, finite};
}

// One step of the online softmax: scores become exp(score - maximum), the row's sum and context follow a new
// maximum.
template <class T>
inline void softmax_step(T* scores, int64_t padded_keys, T& maximum, T& sum, T* context, int64_t size) {
  constexpr int W = kLanes<T>;
  Vec<T> high = Vec<T>{} + kHidden<T>;
  for (int64_t j = 0; j < padded_keys; j += W) {
    const Vec<T> x = load(scores + j);
    high = x > high ? x : high;
  }
  T top = maximum;
  for (int lane = 0; lane < W; ++lane) top = high[lane] > top ? high[lane] : top;
  const T shift = top == kHidden<T> ? T(0) : top;  // nothing to attend yet: exp(-inf - 0) = 0
  Vec<T> total = {};
  for (int64_t j = 0; j < padded_keys; j += W) {
    const Vec<T> weight = exp<T>(load(scores + j) - shift);
    store<T>(scores + j, weight);
    total += weight;
  }
  const T rescale = T(__builtin_exp(maximum - shift));
  maximum = top;
  sum *= rescale;
  for (int lane = 0; lane < W; ++lane) sum += total[lane];
  if (rescale != 1)
    for (int64_t h = 0; h < size; ++h) context[h] *= rescale;
}

// context += weights value. A NaN may stand in a slot that one query may attend and another may not: then
// slot by slot.
template <class T>
inline void add_values(const Problem<T>& p, const T* weights, int64_t ni, int64_t nj, const ValueTile<T>& value,
                       T* context) {
  if (value.finite) {
    product<T>({context, p.padded_values, weights, kKeyTile, 1, value.data, value.row, nj}, 0, ni, p.padded_values);
    return;
  }
  for (int64_t i = 0; i < ni; ++i)
    for (int64_t j = 0; j < nj; ++j) {
      const T weight = weights[i * kKeyTile + j];
      if (weight == 0) continue;
      for (int64_t h = 0; h < p.values; ++h) context[i * p.padded_values + h] += weight * value.data[j * value.row + h];
    }
}

// The weights of one query from its scores, which are those of round_up(length, kKeyTile) slots.
template <class T>
inline void store_weights(const Forward<T>& f, int64_t b, int64_t i, int64_t length, T log_sum_exp, T* scores) {
  const Problem<T>& p = f.problem;
  const T shift = log_sum_exp == kHidden<T> ? -kHidden<T> : log_sum_exp;
  for (int64_t j = 0; j < length; j += kLanes<T>) store<T>(scores + j, exp<T>(load(scores + j) - shift));
  for (int64_t j = length; j < p.keys; ++j) scores[j] = 0;
  if (p.keep_threshold) drop(p, b, i, 0, length, scores);
  store_row(f.weights, b, i, p.keys, scores);
}

template <class T>
void forward(const Forward<T>& f, int64_t task, T* scratch) {
  const Problem<T>& p = f.problem;
  const auto [b, i0, ni] = query_block(p, task);
  const int64_t length = length_of(p, b);
  T* e = scratch;
  T* context = e + kQueryBlock * p.padded;
  T* tile = context + kQueryBlock * p.padded_values;
  T* values = tile + kQueryBlock * kKeyTile;
  T* maximum = values + kKeyTile * p.padded_values;
  T *sum = maximum + kQueryBlock, *limit = sum + kQueryBlock, *row = limit + kQueryBlock;
  T* all_scores = row + 2 * p.padded;  // (kQueryBlock, round_up(Tk)), only with weights
  const int64_t all_keys = round_up(p.keys, kKeyTile);
  for (int64_t i = 0; i < ni; ++i) {
    limit[i] = exponential_row(p.query, b, i0 + i, p.features, p.padded, e + i * p.padded);
    maximum[i] = kHidden<T>;
    sum[i] = 0;
  }
  for (int64_t k = 0; k < ni * p.padded_values; ++k) context[k] = 0;
  const T query_limit = largest(limit, ni);
  for (int64_t j0 = 0; j0 < length; j0 += kKeyTile) {
    const int64_t nj = length - j0 < kKeyTile ? length - j0 : kKeyTile, at = b * p.keys + j0;
    const int64_t padded_keys = round_up(nj, kLanes<T>);
    const Range range = range_of(p, query_limit, largest(p.key_limit + at, nj));
    score_tile(p, {b, i0, ni, j0, nj, e, p.exp_key + at * p.padded, range, row}, tile, kKeyTile);
    for (int64_t i = 0; i < ni; ++i) {
      T* s = tile + i * kKeyTile;
      for (int64_t j = nj; j < padded_keys; ++j) s[j] = kHidden<T>;
      if (f.weights.data) __builtin_memcpy(all_scores + i * all_keys + j0, s, size_t(padded_keys) * sizeof(T));
      softmax_step(s, padded_keys, maximum[i], sum[i], context + i * p.padded_values, p.padded_values);
      if (p.keep_threshold) drop(p, b, i0 + i, j0, nj, s);
    }
    add_values(p, tile, ni, nj, value_tile(p, b, j0, nj, values), context);
  }
  for (int64_t i = 0; i < ni; ++i) {
    T* c = context + i * p.padded_values;
    const bool empty = sum[i] == 0;
    for (int64_t h = 0; h < p.values; ++h) c[h] = empty ? T(0) : c[h] / sum[i];
    store_row(f.context, b, i0 + i, p.values, c);
    const T log_sum_exp = empty ? kHidden<T> : maximum[i] + T(__builtin_log(sum[i]));
    f.log_sum_exp[b * p.queries + i0 + i] = log_sum_exp;
    if (f.weights.data) store_weights(f, b, i0 + i, length, log_sum_exp, all_scores + i * all_keys);
  }
}
