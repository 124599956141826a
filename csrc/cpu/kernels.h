// Scores of additive attention, and the softmax and context of any, for one instruction set: included once for each,
// inside its namespace. Letters as in the mathematics of ARCHITECTURE.md: E = exp(2q), F = exp(2k), x = 1 + E F,
// r = 1/x, tanh(q + k) = 1 - 2r; p are the softmax weights.

constexpr float kNoFloat = -__builtin_inff();
template <class T>
constexpr T kHidden = T(kNoFloat);  // the score of a slot that may not be attended

template <class T>
inline int64_t length_of(const Problem<T>& p, int64_t b) {
  return p.lengths ? p.lengths[b] : p.keys;
}

// The problem as batch row b has it.
template <class T>
inline Problem<T> of_row(const Problem<T>& p, int64_t b) {
  Problem<T> result = p;
  result.v = p.heads[b % p.head_count];
  return result;
}

inline bool visible(const Mask& mask, int64_t b, int64_t i, int64_t j) {
  return !mask.data || mask.data[b * mask.batch + i * mask.query + j * mask.key];
}

// ---------------------------------------------------------------------------------------------- exponentials

// out = exp(2 row), zero-padded. Returns the row's limit: max |x|, or infinity if it is not finite
// throughout.
template <class T>
inline T exponential_row(const Rows& rows, int64_t b, int64_t t, int64_t n, int64_t padded, T* out) {
  const T* row = out;
  if (rows.type == kTypeOf<T> && rows.element == 1 && n == padded) {
    row = reinterpret_cast<const T*>(row_address(rows, b, t));
  } else {
    load_row(rows, b, t, n, padded, out);
  }
  Magnitude<T> limit;
  for (int64_t k = 0; k < padded; k += kLanes<T>) {
    const Vec<T> x = load(row + k);
    limit.add(x);
    store<T>(out + k, exp<T>(2 * x));
  }
  for (int64_t k = n; k < padded; ++k) out[k] = 0;
  return limit.value();
}

template <class T>
void exponentials(const Exponentials<T>& e, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / e.rows, t = row % e.rows;
    T* out = e.output + row * e.output_row;
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
  if (!(p.v.limit <= Limits<T>::max_weight)) return Range::kFar;
  if (query_limit + key_limit <= p.v.plain_limit) return Range::kPlain;
  if (query_limit <= Limits<T>::max_argument && key_limit <= Limits<T>::max_argument) return Range::kCapped;
  return Range::kFar;
}

template <class T>
inline T largest(const T* x, int64_t n) {
  T result = 0;
  for (int64_t k = 0; k < n; ++k) result = x[k] > result ? x[k] : result;
  return result;
}

// F of keys [j0, j0 + nj), rows of padded features: its own where it is of T, else a copy.
template <class T>
inline const T* exponential_tile(const Problem<T>& p, int64_t b, int64_t j0, int64_t nj, T* copy) {
  if (p.exp_key.type == kTypeOf<T>) return reinterpret_cast<const T*>(row_address(p.exp_key, b, j0));
  load_row(p.exp_key, b, j0, nj * p.padded, nj * p.padded, copy);
  return copy;
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

// A block of pairs, small enough that its sums stand in the first-level cache while the features go by.
constexpr int kBlockQueries = 8;
template <class T>
constexpr int kBlockKeys = kLanes<T> > 8 ? kLanes<T> : 8;

// The sum of w r over four vectors of features: with y = c x, 1/y is w r in units of unit max |w|, so that it takes
// additions and products alone, and one division: (1/y0 + 1/y1) + (1/y2 + 1/y3) = ((y0 + y1) y2 y3 + (y2 + y3) y0 y1) /
// (y0 y1 y2 y3).
template <class T>
inline Vec<T> folded_sum(const T* ce, const Vec<T> (&f)[4], const Vec<T> (&c)[4]) {
  constexpr int W = kLanes<T>;
  const Vec<T> y0 = load(ce) * f[0] + c[0], y1 = load(ce + W) * f[1] + c[1];
  const Vec<T> y2 = load(ce + 2 * W) * f[2] + c[2], y3 = load(ce + 3 * W) * f[3] + c[3];
  const Vec<T> y01 = y0 * y1, y23 = y2 * y3;
  return quotient<T>((y0 + y1) * y23 + (y2 + y3) * y01, y01 * y23);
}
template <class T>
inline Vec<T> folded_sum(const T* ce, const Vec<T> (&f)[2], const Vec<T> (&c)[2]) {
  const Vec<T> y0 = load(ce) * f[0] + c[0], y1 = load(ce + kLanes<T>) * f[1] + c[1];
  return quotient<T>(y0 + y1, y0 * y1);
}
template <class V, class Stored, int N>
inline void load_some(const Stored* p, V (&x)[N]) {
  UNROLL for (int n = 0; n < N; ++n) x[n] = load(p + n * int(sizeof(V) / sizeof(x[0][0])));
}

// Adds w_d r_ijd of N vectors of features from d on to sum[i][j]. F may be of a half type.
template <class T, int N, class Stored>
inline void folded_features(const Problem<T>& p, const T* ce, int64_t ni, const Stored* f, int64_t nj, int64_t d,
                            Vec<T>* sum) {
  // In variables of their own: a store to sum could change what p refers to, for all the compiler knows.
  const int64_t padded = p.padded, row = row_of(padded);
  Vec<T> c[N], fj[N];
  load_some(p.v.offset + d, c);
  for (int64_t j = 0; j < nj; ++j) {
    load_some(f + j * padded + d, fj);
    for (int64_t i = 0; i < ni; ++i) sum[i * kBlockKeys<T> + j] += folded_sum<T>(ce + i * row + d, fj, c);
  }
}

// All features.
template <class T, class Stored>
inline void folded_block(const Problem<T>& p, const T* ce, int64_t ni, const Stored* f, int64_t nj, Vec<T>* sum) {
  constexpr int W = kLanes<T>;
  const int64_t padded = p.padded;
  int64_t d = 0;
  for (; d + 4 * W <= padded; d += 4 * W) folded_features<T, 4>(p, ce, ni, f, nj, d, sum);
  for (; d < padded; d += 2 * W) folded_features<T, 2>(p, ce, ni, f, nj, d, sum);
}

// Where there are 32 registers: the same of two keys and as many queries as fill a vector with sums, which stay in
// registers. Lane 2 i + j of the result is that of query i and key j.
template <class T, int N, int I>
inline void folded_pair_features(const T* offset, const T* ce, int64_t row, const T* const (&f)[2], int64_t d,
                                 Vec<T> (&sum)[2 * I]) {
  Vec<T> c[N], fj[N];
  load_some(offset + d, c);
  UNROLL for (int j = 0; j < 2; ++j) {
    load_some(f[j] + d, fj);
    UNROLL for (int i = 0; i < I; ++i) sum[2 * i + j] += folded_sum<T>(ce + i * row + d, fj, c);
  }
}
template <class T>
inline Vec<T> folded_pairs(const Problem<T>& p, const T* ce, const T* const (&f)[2]) {
  constexpr int W = kLanes<T>;
  const int64_t padded = p.padded, row = row_of(padded);
  Vec<T> sum[W];
  UNROLL for (int k = 0; k < W; ++k) sum[k] = Vec<T>{};
  int64_t d = 0;
  for (; d + 4 * W <= padded; d += 4 * W) folded_pair_features<T, 4, W / 2>(p.v.offset, ce, row, f, d, sum);
  for (; d < padded; d += 2 * W) folded_pair_features<T, 2, W / 2>(p.v.offset, ce, row, f, d, sum);
  return lane_sums<T>(sum);
}

// The same with the cap, two features to a division.
template <class T>
inline void capped_block(const Problem<T>& p, const T* e, int64_t ni, const T* f, int64_t nj, Vec<T>* sum) {
  constexpr int W = kLanes<T>;
  for (int64_t d = 0; d < p.padded; d += 2 * W) {
    const Vec<T> w0 = load(p.v.weight + d), w1 = load(p.v.weight + d + W);
    for (int64_t j = 0; j < nj; ++j) {
      const Vec<T> f0 = load(f + j * p.padded + d), f1 = load(f + j * p.padded + d + W);
      for (int64_t i = 0; i < ni; ++i) {
        const T* ei = e + i * row_of(p.padded) + d;
        const Vec<T> x0 = one_plus<T, true>(load(ei), f0), x1 = one_plus<T, true>(load(ei + W), f1);
        sum[i * kBlockKeys<T> + j] += quotient<T>(w0 * x1 + w1 * x0, x0 * x1);
      }
    }
  }
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

// Queries [i0, i0 + ni) and keys [j0, j0 + nj) of batch row b.
struct Slots {
  int64_t b, i0, ni, j0, nj;
};

// A tile of them with their exponentials.
template <class T>
struct Tile : Slots {
  const T* e;  // (ni, row_of(padded))
  const T* f;  // (nj, padded)
  Range range;
  T* folded;  // scratch like e, for Range::kPlain: c E
  T* row;     // scratch for Range::kFar: a query and a key as they are, and in backward a sum
};

// What sums of w r are times, for scores: in two steps, as their product may be too small for a number.
template <class T>
struct Size {
  T unit, limit;
  Vec<T> of(Vec<T> sums) const { return sums * unit * limit; }
};

// The scores of a block by sums in registers: kLanes / 2 queries and any number of keys.
template <class T>
inline void pair_scores(const Problem<T>& p, const T* ce, const T* f, int64_t nj, Size<T> size, T* out,
                        int64_t out_row) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < nj; j += 2) {
    alignas(kVectorBytes) T lanes[W];  // an odd key is taken twice: rows of out have room for whole blocks
    store<T>(lanes, size.of(folded_pairs(p, ce, {f + j * p.padded, f + (j + (j + 1 < nj)) * p.padded})));
    UNROLL for (int l = 0; l < W; ++l) out[l / 2 * out_row + j + l % 2] = lanes[l];
  }
}

// The scores of a block by sums in memory: as many queries and keys as it may have, or fewer.
template <class T, bool Capped>
inline void block_scores(const Problem<T>& p, const T* e, int64_t ni, const T* f, int64_t nj, Size<T> size, T* out,
                         int64_t out_row) {
  constexpr int W = kLanes<T>, J = kBlockKeys<T>;
  Vec<T> sum[kBlockQueries * J];
  for (int64_t k = 0; k < ni * J; ++k) sum[k] = Vec<T>{};
  if constexpr (Capped) {
    capped_block(p, e, ni, f, nj, sum);
  } else {
    folded_block(p, e, ni, f, nj, sum);
  }
  for (int64_t k = 0; k < ni; ++k)
    for (int64_t l = 0; l < J; l += W) store<T>(out + k * out_row + l, size.of(lane_sums<T>(sum + k * J + l)));
}

template <class T>
inline Size<T> folded_size(const Problem<T>& p) {
  return {Folding<T>::unit, p.v.limit};
}

// The scores of one query, key by key: a step waits for memory, which is fastest in the order of its addresses.
template <class T, class Stored>
inline void row_scores(const Problem<T>& p, const T* ce, const Stored* f, int64_t nj, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < nj; j += W) {
    Vec<T> sum[W];
    for (int k = 0; k < W; ++k) sum[k] = Vec<T>{};
    for (int64_t k = 0; k < W && j + k < nj; ++k) {
      const Stored* row = f + (j + k) * p.padded;
      fetch_ahead(row + kRowsAhead * p.padded, p.padded * int64_t(sizeof(Stored)));
      folded_block(p, ce, 1, row, 1, sum + k);
    }
    store<T>(out + j, folded_size(p).of(lane_sums<T>(sum)));
  }
}

// Block by block. Rows of out have room for whole blocks; what lies beyond nj is not a score.
template <class T, bool Capped>
inline void near_scores(const Problem<T>& p, const Tile<T>& t, T* out, int64_t out_row) {
  constexpr bool in_registers = kRegisters > 16 && !Capped;
  constexpr int J = kBlockKeys<T>, I = in_registers ? kLanes<T> / 2 : kBlockQueries;
  if (!Capped && t.ni == 1) return row_scores(p, t.folded, t.f, t.nj, out);
  const int64_t row = row_of(p.padded);
  const T* e = Capped ? t.e : t.folded;
  const Size<T> size = Capped ? Size<T>{T(1), T(1)} : folded_size(p);
  for (int64_t j = 0; j < t.nj; j += J) {
    const int64_t nj = t.nj - j < J ? t.nj - j : J;
    for (int64_t i = 0; i < t.ni; i += I) {
      const int64_t ni = t.ni - i < I ? t.ni - i : I;
      T* at = out + i * out_row + j;
      if constexpr (in_registers)
        if (ni == I) {
          pair_scores(p, e + i * row, t.f + j * p.padded, nj, size, at, out_row);
          continue;
        }
      block_scores<T, Capped>(p, e + i * row, ni, t.f + j * p.padded, nj, size, at, out_row);
    }
  }
}

template <class T>
inline void fold(const Problem<T>& p, const Tile<T>& t) {
  for (int64_t i = 0; i < t.ni; ++i)
    for (int64_t d = 0; d < p.padded; d += kLanes<T>) {
      const int64_t at = i * row_of(p.padded) + d;
      store<T>(t.folded + at, load(t.e + at) * load(p.v.fold + d));
    }
}

template <class T>
inline void far_scores(const Problem<T>& p, const Tile<T>& t, T* out, int64_t out_row) {
  T *q = t.row, *k = t.row + p.padded;
  for (int64_t j = 0; j < t.nj; ++j) {
    load_row(p.key, t.b, t.j0 + j, p.features, p.padded, k);
    for (int64_t i = 0; i < t.ni; ++i) {
      load_row(p.query, t.b, t.i0 + i, p.features, p.padded, q);
      Vec<T> sum = {};
      for (int64_t d = 0; d < p.padded; d += kLanes<T>) sum += load(p.v.weight + d) * far_r(q + d, k + d);
      T total = 0;
      for (int lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
      out[i * out_row + j] = total;
    }
  }
}

template <class T>
inline void hide(const Problem<T>& p, const Slots& t, T* out, int64_t out_row) {
  if (!p.mask.data) return;
  for (int64_t i = 0; i < t.ni; ++i)
    for (int64_t j = 0; j < t.nj; ++j)
      if (!visible(p.mask, t.b, t.i0 + i, t.j0 + j)) out[i * out_row + j] = kHidden<T>;
}

// out[i][j] = scale * (v . tanh(q_i + k_j) - sum v), minus infinity where the mask hides the slot.
template <class T>
inline void score_tile(const Problem<T>& p, const Tile<T>& t, T* out, int64_t out_row) {
  switch (t.range) {
    case Range::kPlain:
      fold(p, t);
      near_scores<T, false>(p, t, out, out_row);
      break;
    case Range::kCapped:
      near_scores<T, true>(p, t, out, out_row);
      break;
    case Range::kFar:
      far_scores(p, t, out, out_row);
      break;
  }
  hide(p, t, out, out_row);
}

template <class T>
void scores(const Scores<T>& s, int64_t task, T* scratch) {
  const auto [b, i0, ni] = query_block(s.problem, task);
  const Problem<T> p = of_row(s.problem, b);
  const int64_t length = length_of(p, b);
  T *e = scratch, *folded = e + kQueryBlock * row_of(p.padded), *tile = folded + kQueryBlock * row_of(p.padded);
  T *limit = tile + kQueryBlock * kKeyTile, *row = limit + kQueryBlock;
  for (int64_t i = 0; i < ni; ++i)
    limit[i] = exponential_row(p.query, b, i0 + i, p.features, p.padded, e + i * row_of(p.padded));
  const T query_limit = largest(limit, ni);
  for (int64_t j0 = 0; j0 < p.keys; j0 += kKeyTile) {
    const int64_t width = p.keys - j0 < kKeyTile ? p.keys - j0 : kKeyTile;
    const int64_t nj = length - j0 < width ? (length > j0 ? length - j0 : 0) : width;
    const int64_t at = b * p.keys + j0;
    const Range range = range_of(p, query_limit, largest(p.key_limit + at, nj));
    const T* f = exponential_tile<T>(p, b, j0, nj, nullptr);
    if (nj) score_tile(p, {{b, i0, ni, j0, nj}, e, f, range, folded, row}, tile, kKeyTile);
    for (int64_t i = 0; i < ni; ++i) {
      for (int64_t j = 0; j < nj; ++j)
        if (tile[i * kKeyTile + j] != kHidden<T>) tile[i * kKeyTile + j] += p.v.constant;
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
struct RowTile {
  const T* data;
  int64_t row;
  bool finite;  // known only where the mask differs between queries
};

// Rows of n numbers of keys [j0, j0 + nj) as padded rows of T: the tensor's own where they are that, else a copy.
// Hidden rows are 0.
template <class T>
inline RowTile<T> row_tile(const Problem<T>& p, const Rows& rows, int64_t n, int64_t padded, int64_t b, int64_t j0,
                           int64_t nj, T* scratch) {
  const bool whole = rows.element == 1 && n == padded && rows.type == kTypeOf<T>;
  if (whole && !p.mask.data) return {reinterpret_cast<const T*>(row_address(rows, b, j0)), rows.row, true};
  bool finite = true;
  for (int64_t j = 0; j < nj; ++j) {
    T* row = scratch + j * row_of(padded);
    if (p.mask.query == 0 && !visible(p.mask, b, 0, j0 + j)) {
      for (int64_t h = 0; h < padded; ++h) row[h] = 0;
      continue;
    }
    load_row(rows, b, j0 + j, n, padded, row);
    if (p.mask.query != 0) finite &= magnitude(row, padded) <= Limits<T>::largest;
  }
  return {scratch, row_of(padded), finite};
}

// Whether one query takes rows of a half type from where they lie, without a copy.
template <class T>
inline bool lies_ready(const Problem<T>& p, const Rows& rows, int64_t n, int64_t padded) {
  return sizeof(T) == 4 && is_half_type(rows.type) && rows.element == 1 && n == padded && !p.mask.data;
}

template <class T>
inline RowTile<T> value_tile(const Problem<T>& p, int64_t b, int64_t j0, int64_t nj, T* scratch) {
  return row_tile(p, p.value, p.values, p.padded_values, b, j0, nj, scratch);
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

// Whether padded rows are finite throughout; asked only where a mask may hide a slot.
template <class T>
inline bool finite_rows(const Problem<T>& p, const T* rows, int64_t row, int64_t count, int64_t n) {
  bool finite = true;
  if (p.mask.data)
    for (int64_t i = 0; i < count; ++i) finite &= magnitude(rows + i * row, n) <= Limits<T>::largest;
  return finite;
}

// A product of weights or their gradients with rows. A NaN may stand in a slot that one query may attend and another
// may not, where the factor is 0: then slot by slot.
template <class T>
inline void add_rows(const Product<T>& x, int64_t rows, int64_t columns, bool finite) {
  if (finite) return product<T>(x, 0, rows, columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < x.depth; ++k) {
      const T factor = x.a[i * x.a_row + k * x.a_column];
      if (factor == 0) continue;
      for (int64_t h = 0; h < columns; h += kLanes<T>)
        add_to<T>(x.c + i * x.c_row + h, factor * load(x.b + k * x.b_row + h));
    }
}

// Adds the weighted values of keys [j0, j0 + nj) to the context of one query, where they lie ready; else false.
template <class T>
inline bool add_ready_values(const Problem<T>& p, int64_t b, int64_t j0, int64_t nj, const T* weights, T* context) {
  if constexpr (sizeof(T) == 4)
    if (lies_ready(p, p.value, p.values, p.padded_values)) {
      with_half_type(p.value.type, row_address(p.value, b, j0),
                     [&](const auto* h) { product_row(context, weights, 1, h, p.value.row, nj, p.padded_values); });
      return true;
    }
  return false;
}

// p from scores and their log-sum-exp: at most 1, and 0 in hidden slots also where the row's sum is NaN.
template <class T>
inline Vec<T> weights_of(Vec<T> score, T log_sum_exp) {
  const Vec<T> x = score - log_sum_exp;
  return score == Vec<T>{} + kHidden<T> ? Vec<T>{} : exp<T>(x > Vec<T>{} ? Vec<T>{} : x);
}

// The weights of one query from its scores, which are those of round_up(length, kKeyTile) slots.
template <class T>
inline void store_weights(const Forward<T>& f, int64_t b, int64_t i, int64_t length, T log_sum_exp, T* scores) {
  const Problem<T>& p = f.problem;
  const T shift = log_sum_exp == kHidden<T> ? -kHidden<T> : log_sum_exp;
  for (int64_t j = 0; j < length; j += kLanes<T>) store<T>(scores + j, weights_of<T>(load(scores + j), shift));
  for (int64_t j = length; j < p.keys; ++j) scores[j] = 0;
  if (f.wide) __builtin_memcpy(f.wide + (b * p.queries + i) * p.keys, scores, size_t(p.keys) * sizeof(T));
  if (!f.weights.data) return;
  if (p.keep_threshold) drop(p, b, i, 0, length, scores);
  store_row(f.weights, b, i, p.keys, scores);
}

// Where a task has laid out its scratch memory: as much as problem.h says that it needs. Compared only where a
// sanitizer watches the ends of that.
template <class T>
inline void laid_out([[maybe_unused]] const T* begin, [[maybe_unused]] const T* end, [[maybe_unused]] int64_t size) {
#if defined(__SANITIZE_ADDRESS__)
  if (end - begin != size) __builtin_trap();
#endif
}

// Scratch of a forward task: what the attention of its queries needs beside its score.
template <class T>
struct ForwardScratch {
  ForwardScratch(const Problem<T>& p, T* memory)
      : query(memory),
        folded(query + kQueryBlock * row_of(p.padded)),
        context(folded + kQueryBlock * row_of(p.padded)),
        tile(context + kQueryBlock * row_of(p.padded_values)),
        values(tile + kQueryBlock * kKeyTile),
        keys(values + kKeyTile * row_of(p.padded_values)),
        maximum(keys + (copies_keys(p) ? kKeyTile * row_of(p.padded) : 0)),
        sum(maximum + kQueryBlock),
        limit(sum + kQueryBlock),
        row(limit + kQueryBlock),
        scores(row + 2 * p.padded) {}

  T *query, *folded;  // (kQueryBlock, row_of(padded))
  T *context, *tile;  // (kQueryBlock, row_of(padded_values)), (kQueryBlock, kKeyTile)
  T *values, *keys;   // (kKeyTile, row_of(...))
  T *maximum, *sum, *limit, *row;
  T* scores;  // (kQueryBlock, round_up(Tk)), only with weights
};

// The attention of a block of queries. score(j0, nj) puts the scores of a tile of keys into m.tile, and then value(j0,
// nj) gives the tile's values.
template <class T, class Score, class Value>
inline void attend(const Forward<T>& f, const QueryBlock& block, const ForwardScratch<T>& m, const Score& score,
                   const Value& value) {
  const Problem<T>& p = f.problem;
  const auto [b, i0, ni] = block;
  const int64_t length = length_of(p, b), context_row = row_of(p.padded_values), all_keys = round_up(p.keys, kKeyTile);
  const bool keeps_scores = f.weights.data || f.wide;
  laid_out<T>(m.query, m.scores + (keeps_scores ? kQueryBlock * all_keys : 0), forward_scratch(p, keeps_scores));
  for (int64_t i = 0; i < ni; ++i) m.maximum[i] = kHidden<T>, m.sum[i] = 0;
  for (int64_t k = 0; k < ni * context_row; ++k) m.context[k] = 0;
  for (int64_t j0 = 0; j0 < length; j0 += kKeyTile) {
    const int64_t nj = length - j0 < kKeyTile ? length - j0 : kKeyTile, padded_keys = round_up(nj, kLanes<T>);
    score(j0, nj);
    for (int64_t i = 0; i < ni; ++i) {
      T* s = m.tile + i * kKeyTile;
      for (int64_t j = nj; j < padded_keys; ++j) s[j] = kHidden<T>;
      if (keeps_scores) __builtin_memcpy(m.scores + i * all_keys + j0, s, size_t(padded_keys) * sizeof(T));
      softmax_step(s, padded_keys, m.maximum[i], m.sum[i], m.context + i * context_row, p.padded_values);
      if (p.keep_threshold) drop(p, b, i0 + i, j0, nj, s);
    }
    if (ni == 1 && add_ready_values(p, b, j0, nj, m.tile, m.context)) continue;
    const RowTile<T> tile = value(j0, nj);
    add_rows<T>({m.context, context_row, m.tile, kKeyTile, 1, tile.data, tile.row, nj}, ni, p.padded_values,
                tile.finite);
  }
  for (int64_t i = 0; i < ni; ++i) {
    T* c = m.context + i * context_row;
    const bool empty = m.sum[i] == 0;
    for (int64_t h = 0; h < p.values; ++h) c[h] = empty ? T(0) : c[h] / m.sum[i];
    store_row(f.context, b, i0 + i, p.values, c);
    const T log_sum_exp = empty ? kHidden<T> : m.maximum[i] + T(__builtin_log(m.sum[i]));
    f.log_sum_exp[b * p.queries + i0 + i] = log_sum_exp;
    if (keeps_scores) store_weights(f, b, i0 + i, length, log_sum_exp, m.scores + i * all_keys);
  }
}

template <class T>
void forward(const Forward<T>& f, int64_t task, T* scratch) {
  const QueryBlock block = query_block(f.problem, task);
  const auto [b, i0, ni] = block;
  const Problem<T> p = of_row(f.problem, b);
  const ForwardScratch<T> m(p, scratch);
  for (int64_t i = 0; i < ni; ++i)
    m.limit[i] = exponential_row(p.query, b, i0 + i, p.features, p.padded, m.query + i * row_of(p.padded));
  const T query_limit = largest(m.limit, ni);
  const auto score = [&, b = b, i0 = i0, ni = ni](int64_t j0, int64_t nj) {
    const Range range = range_of(p, query_limit, largest(p.key_limit + b * p.keys + j0, nj));
    Tile<T> t{{b, i0, ni, j0, nj}, m.query, nullptr, range, m.folded, m.row};
    if constexpr (sizeof(T) == 4)
      if (ni == 1 && range == Range::kPlain && copies_keys(p)) {
        fold(p, t);
        with_half_type(p.exp_key.type, row_address(p.exp_key, b, j0),
                       [&](const auto* f) { row_scores(p, m.folded, f, nj, m.tile); });
        return hide(p, t, m.tile, kKeyTile);
      }
    t.f = exponential_tile(p, b, j0, nj, m.keys);
    score_tile(p, t, m.tile, kKeyTile);
  };
  attend(f, block, m, score, [&, b = b](int64_t j0, int64_t nj) { return value_tile(p, b, j0, nj, m.values); });
}
