// A step of additive attention that sees its past, for one instruction set; included after kernels.h and gradients.h.
// The sums q + k_j + L f_j of a few keys lie in the cache, made by two products: filters over past weights, then L.
// exp is taken of the sum itself, which saturates on both sides, so that every finite input has one way.

// 2^x for |x| <= 1/2, to less than an ulp; in float the best polynomial of degree 5 (Remez).
template <class T>
inline Vec<T> power_of_two(Vec<T> x) {
  if constexpr (sizeof(T) == 8) return exp_series<T, 0>(x * T(0x1.62e42fefa39efp-1));
  Vec<T> result = x * T(0x1.5c08e2p-10) + T(0x1.3d0c52p-7);
  result = result * x + T(0x1.c6b6e6p-5);
  result = result * x + T(0x1.ebf918p-3);
  result = result * x + T(0x1.62e428p-1);
  return result * x + T(0x1.000002p0);
}

// x = 1 + exp(2 s), up to the cap of a pair of features; NaN for NaN.
template <class T>
inline Vec<T> one_plus_exp(Vec<T> s) {
  using L = Limits<T>;
  using Bits = typename VecOf<T>::bits;
  constexpr T high = sizeof(T) == 4 ? T(60) : T(500), low = sizeof(T) == 4 ? T(-125) : T(-1020);
  Vec<T> t = s * T(2.8853900817779268);  // 2 / ln 2
  t = at_least<T>(Vec<T>{} + low, at_most<T>(Vec<T>{} + high, t));
  const Vec<T> shifted = t + L::magic, rest = t - (shifted - L::magic);
  return (Vec<T>)((Bits)power_of_two<T>(rest) + ((Bits)shifted << L::mantissa)) + T(1);
}

// What a task keeps for query i of row b.
template <class T>
struct StepQuery {
  StepQuery(const Step<T>& s, int64_t b, int64_t i, T*& memory) : b(b), i(i) {
    const Problem<T>& p = s.problem;
    last = length_of(p, b);
    if (s.window) {
      const int64_t* window = s.window + 2 * (b * p.queries + i);
      first = window[0] < 0 ? 0 : window[0] < last ? window[0] : last;
      last = window[1] < first ? first : window[1] < last ? window[1] : last;
    }
    query = memory, memory += p.padded;
    for (int64_t c = 0; c < s.channels; ++c) past[c] = memory, memory += past_row(s);
  }

  int64_t b, i, first = 0, last;  // the keys it may attend are in [first, last)
  T* query;                       // (padded)
  T* past[2];                     // past_row: with the reach of the filters before the first key
};

// Scratch of a tile of keys.
template <class T>
struct StepTile {
  StepTile(const Step<T>& s, T*& memory)
      : sums(memory),
        features(sums + kStepKeys * row_of(s.problem.padded)),
        values(features + kStepKeys * s.padded_filters) {
    memory = values + kKeyTile * row_of(s.problem.padded_values);
  }
  T* sums;      // (kStepKeys, row_of(padded)); in backward, then their gradients
  T* features;  // (kStepKeys, padded_filters)
  T* values;    // (kKeyTile, row_of(padded_values))
};

// Fills in the query and its past, which is 0 in hidden slots and beyond the ends.
template <class T>
inline void load_query(const Step<T>& s, const StepQuery<T>& q) {
  const Problem<T>& p = s.problem;
  load_row(p.query, q.b, q.i, p.features, p.padded, q.query);
  const int64_t length = length_of(p, q.b), reach = s.width / 2;
  for (int64_t c = 0; c < s.channels; ++c) {
    T* past = q.past[c];
    zero(past, reach);
    load_row(s.past[c], q.b, q.i, length, past_row(s) - reach, past + reach);
    for (int64_t j = 0; j < length && p.mask.data; ++j)
      if (!visible(p.mask, q.b, 0, j)) past[reach + j] = 0;
  }
}

// Where the rows [j0, j1) of a tensor lie, one after another as numbers of n features; null where they don't.
struct Stretch {
  const char *at = nullptr, *end = nullptr;
};
inline Stretch stretch(const Rows& rows, int64_t b, int64_t j0, int64_t j1, int64_t n) {
  if (rows.element != 1 || rows.row != n || j1 <= j0) return {};
  return {row_address(rows, b, j0), row_address(rows, b, j1)};
}

// What a step reads soon, at the tile of keys [j0, j1): the keys of the next one, and values of this tile's keys.
// Values wait until all keys have their scores, so that only those come which the cache holds until then.
template <class T>
inline Ahead soon(const Step<T>& s, const StepQuery<T>& q, int64_t j0, int64_t j1, int64_t of_row) {
  const Problem<T>& p = s.problem;
  const int64_t end = j1 + kStepKeys < q.last ? j1 + kStepKeys : q.last;
  const bool fits = (j1 - q.first) * p.values * bytes(p.value.type) <= kAheadBytes;
  const Stretch keys = stretch(p.key, q.b, j1, end, p.features);
  const Stretch values = of_row < p.batch && fits ? stretch(p.value, of_row, j0, j1, p.values) : Stretch{};
  return {keys.at, keys.end, values.at, values.end};
}

// sums[j] = q + k_j + L f_j of keys [j0, j0 + nj). A masked key counts as 0: its score is hidden later.
template <class T>
inline void sum_tile(const Step<T>& s, const StepTile<T>& m, const StepQuery<T>& q, int64_t j0, int64_t nj,
                     Ahead& ahead) {
  constexpr int W = kLanes<T>;
  const Problem<T>& p = s.problem;
  const int64_t row = row_of(p.padded), padded = p.padded;
  const bool whole = p.key.type == kTypeOf<T> && p.key.element == 1 && p.features == padded;
  for (int64_t j = 0; j < nj; ++j) {
    T* sum = m.sums + j * row;
    if (!visible(p.mask, q.b, q.i, j0 + j)) {
      for (int64_t d = 0; d < padded; d += W) store<T>(sum + d, load(q.query + d));
      continue;
    }
    if (!whole) load_row(p.key, q.b, j0 + j, p.features, padded, sum);
    const T* key = whole ? reinterpret_cast<const T*>(row_address(p.key, q.b, j0 + j)) : sum;
    for (int64_t d = 0; d < padded; d += W) store<T>(sum + d, load(key + d) + load(q.query + d));
  }
  if (s.channels == 0) return;
  T* features = s.projection ? m.features : m.sums;
  const int64_t features_row = s.projection ? s.padded_filters : row;
  if (s.projection) zero(features, nj * s.padded_filters);
  for (int64_t c = 0; c < s.channels; ++c)
    product<T>({features, features_row, q.past[c] + j0, 1, 1, s.filters + c * s.width * s.padded_filters,
                s.padded_filters, s.width, &ahead},
               0, nj, s.padded_filters);
  if (s.projection)
    product<T>({m.sums, row, features, s.padded_filters, 1, s.projection, padded, s.filter_count, &ahead}, 0, nj,
               padded);
}

// w0 r0 + w1 r1 of a pair of vectors of features, by one division where weights are not too large for that.
template <class T, bool Paired>
inline Vec<T> weighted_r(Vec<T> w0, Vec<T> w1, Vec<T> x0, Vec<T> x1) {
  if constexpr (Paired) return quotient<T>(w0 * x1 + w1 * x0, x0 * x1);
  return w0 / x0 + w1 / x1;
}

// Scores less their constant; out has room for whole vectors.
template <class T, bool Paired>
inline void scores_of_sums(const Problem<T>& p, const T* sums, int64_t nj, T* out) {
  constexpr int W = kLanes<T>;
  const int64_t padded = p.padded, row = row_of(padded);
  const T* weight = p.v.weight;
  for (int64_t j = 0; j < nj; j += W) {
    Vec<T> sum[W];
    for (int k = 0; k < W; ++k) sum[k] = Vec<T>{};
    for (int64_t k = 0; k < W && j + k < nj; ++k) {
      const T* x = sums + (j + k) * row;
      Vec<T> total = {};
      for (int64_t d = 0; d < padded; d += 2 * W)
        total += weighted_r<T, Paired>(load(weight + d), load(weight + d + W), one_plus_exp<T>(load(x + d)),
                                       one_plus_exp<T>(load(x + d + W)));
      sum[k] = total;
    }
    store<T>(out + j, lane_sums<T>(sum));
  }
}

template <class T>
inline void step_scores(const Step<T>& s, const StepTile<T>& m, const StepQuery<T>& q, T* scores) {
  const Problem<T>& p = s.problem;
  for (int64_t j0 = q.first; j0 < q.last; j0 += kStepKeys) {
    const int64_t nj = q.last - j0 < kStepKeys ? q.last - j0 : kStepKeys;
    Ahead ahead = soon(s, q, j0, j0 + nj, q.b);
    sum_tile(s, m, q, j0, nj, ahead);
    if (p.v.limit <= Limits<T>::max_weight) {
      scores_of_sums<T, true>(p, m.sums, nj, scores + j0);
    } else {
      scores_of_sums<T, false>(p, m.sums, nj, scores + j0);
    }
  }
  for (int64_t j = q.first; j < q.last && p.mask.data; ++j)
    if (!visible(p.mask, q.b, q.i, j)) scores[j] = kHidden<T>;
}

// ---------------------------------------------------------------------------------------------------- rules

// What forward attention multiplies y by: the last weights of a key and of the one before it, which are not visible
// where the key is hidden. A key is reached where the gradient, which divides by that, fits the type.
template <class T>
struct Mixture {
  Mixture(const Step<T>& s, const StepQuery<T>& q, T* scratch) : before(scratch), mask(s.problem.mask), b(q.b) {
    load_row(s.previous, q.b, q.i, length_of(s.problem, q.b), slots_row(s.problem), before);
    for (int64_t j = 0; j < q.last && mask.data; ++j)
      if (!visible(mask, b, 0, j)) before[j] = 0;
    if (s.transition.data) load_row(s.transition, q.b, q.i, 1, 1, &move), stay = 1 - move;
  }

  T moved(int64_t j) const { return j > 0 ? before[j - 1] : T(0); }
  T operator()(int64_t j) const { return stay * before[j] + move * moved(j); }
  bool reaches(int64_t j) const { return visible(mask, b, 0, j) && !((*this)(j) <= least); }

  static constexpr T least = T(sizeof(T) == 4 ? 0x1p-103 : 0x1p-970);  // the smallest normal number over epsilon
  T* before;
  T stay = 1, move = 1;
  const Mask& mask;
  int64_t b;
};

// x[j] / sum x, or 0 where all are; a 0 stays one beside NaN, as of a hidden slot.
template <class T>
inline void normalise(T* x, int64_t first, int64_t last) {
  T total = 0;
  for (int64_t j = first; j < last; ++j) total += x[j];
  for (int64_t j = first; j < last; ++j) x[j] = x[j] == 0 || total == 0 ? T(0) : x[j] / total;
}

// The largest of the scores, 0 where there is none.
template <class T>
inline T top_score(const T* x, int64_t first, int64_t last) {
  T top = kHidden<T>;
  for (int64_t j = first; j < last; ++j) top = x[j] > top ? x[j] : top;
  return top == kHidden<T> ? T(0) : top;
}

// x = exp(x - shift) of the slots from first up to a whole vector beyond last.
template <class T>
inline void exponentiate(T* x, int64_t first, int64_t last, T shift) {
  for (int64_t j = first; j < last; j += kLanes<T>) store<T>(x + j, exp<T>(load(x + j) - shift));
}

template <class T>
inline void softmax_rule(T* x, int64_t first, int64_t last) {
  exponentiate(x, first, last, top_score(x, first, last));
  normalise(x, first, last);
}

// sigmoid(s) / sum sigmoid(s). Where all scores are far below 0 their sigmoids would vanish: exp(s - top) / (1 +
// exp(s)).
template <class T>
inline void sigmoid_rule(T* x, int64_t first, int64_t last, T constant, T* scratch) {
  for (int64_t j = first; j < last; ++j) {
    if (x[j] != kHidden<T>) x[j] += constant;
    scratch[j] = -__builtin_fabs(x[j]);
  }
  const T top = top_score(x, first, last), shift = top < 0 ? top : T(0);
  for (int64_t j = first; j < last; ++j) x[j] = x[j] > 0 ? T(0) : x[j] - shift;
  exponentiate(x, first, last, T(0));
  exponentiate(scratch, first, last, T(0));
  for (int64_t j = first; j < last; ++j) x[j] /= 1 + scratch[j];
  normalise(x, first, last);
}

// Stays where it is, in the visible slots, where no key is reached.
template <class T>
inline void forward_rule(const Step<T>& s, const StepQuery<T>& q, T* x, T* scratch) {
  const Mixture<T> mix(s, q, scratch);
  bool any = false;
  for (int64_t j = q.first; j < q.last; ++j) {
    const bool reached = mix.reaches(j);
    any |= reached;
    if (!reached) x[j] = kHidden<T>;
  }
  if (!any) {
    for (int64_t j = q.first; j < q.last; ++j) x[j] = mix.before[j];
    return;
  }
  exponentiate(x, q.first, q.last, top_score(x, q.first, q.last));
  for (int64_t j = q.first; j < q.last; ++j) x[j] = x[j] == 0 ? T(0) : x[j] * mix(j);
  normalise(x, q.first, q.last);
}

// Scores of the slots [first, last) become weights, and the others 0.
template <class T>
inline void apply_rule(const Step<T>& s, const StepQuery<T>& q, T* x, T* scratch) {
  for (int64_t j = q.last; j < q.last + kLanes<T>; ++j) x[j] = kHidden<T>, scratch[j] = 0;
  switch (s.rule) {
    case Rule::kSoftmax:
      softmax_rule(x, q.first, q.last);
      break;
    case Rule::kSigmoid:
      sigmoid_rule(x, q.first, q.last, s.problem.v.constant, scratch);
      break;
    case Rule::kForward:
      forward_rule(s, q, x, scratch);
      break;
  }
  zero(x, q.first < s.problem.keys ? q.first : s.problem.keys);
  for (int64_t j = q.last > q.first ? q.last : q.first; j < s.problem.keys; ++j) x[j] = 0;
}

// --------------------------------------------------------------------------------------------------- forward

template <class T>
void step(const StepForward<T>& f, int64_t task, T* memory) {
  const T* all = memory;
  const Step<T>& s = f.step;
  const Problem<T>& p = s.problem;
  const StepTile<T> m(s, memory);
  const StepQuery<T> q(s, task / p.queries, task % p.queries, memory);
  load_query(s, q);
  T *x = memory, *scratch = x + slots_row(p), *context = scratch + slots_row(p);
  laid_out<T>(all, context + row_of(p.padded_values), step_scratch(s));
  step_scores(s, m, q, x);
  apply_rule(s, q, x, scratch);
  if (p.keys > 0) __builtin_memcpy(f.weights + task * p.keys, x, size_t(p.keys) * sizeof(T));
  if (p.keep_threshold && q.first < q.last) drop(p, q.b, q.i, q.first, q.last - q.first, x + q.first);
  zero(context, p.padded_values);
  for (int64_t j0 = q.first; j0 < q.last; j0 += kKeyTile) {
    const int64_t nj = q.last - j0 < kKeyTile ? q.last - j0 : kKeyTile;
    if (add_ready_values(p, q.b, j0, nj, x + j0, context)) continue;
    const RowTile<T> value = value_tile(p, q.b, j0, nj, m.values);
    product_row(context, x + j0, 1, value.data, value.row, nj, p.padded_values);
  }
  store_row(f.context, q.b, q.i, p.values, context);
}

// -------------------------------------------------------------------------------------------------- backward

// What a backward task keeps for one query; its scratch is the same at each call.
template <class T>
struct StepGradients : StepQuery<T> {
  StepGradients(const Step<T>& s, int64_t b, int64_t i, T* scratch) : StepGradients(s, b, i, &scratch) {}

  T *grad_query, *grad_context, *ds, *kept, *dp;
  T* grad_past[2];  // as past

 private:
  StepGradients(const Step<T>& s, int64_t b, int64_t i, T** memory) : StepQuery<T>(s, b, i, *memory) {
    const Problem<T>& p = s.problem;
    const T* begin = this->query;
    for (int64_t c = 0; c < s.channels; ++c) grad_past[c] = *memory, *memory += past_row(s);
    grad_query = *memory, grad_context = grad_query + p.padded;
    ds = grad_context + row_of(p.padded_values), kept = ds + slots_row(p), dp = kept + slots_row(p);
    laid_out<T>(begin, dp + slots_row(p), step_query_scratch(s));
  }
};

// dp_j = keep_j dC . h_j + dA_j, and in kept what the values' gradient takes of dC. A row that attends nothing has no
// part in any gradient.
template <class T>
inline void weight_gradients(const StepBackward<T>& g, const StepTile<T>& m, const StepGradients<T>& q,
                             const T* weights) {
  const Problem<T>& p = g.step.problem;
  const int64_t n = q.last - q.first;
  zero(q.grad_context, p.padded_values);
  bool empty = true;
  for (int64_t j = q.first; j < q.last; ++j) empty &= weights[j] == 0;
  zero(q.kept, slots_row(p)), zero(q.dp, slots_row(p));
  if (n <= 0 || (empty && g.step.rule != Rule::kForward)) return;
  if (g.grad_context.data) load_row(g.grad_context, q.b, q.i, p.values, p.padded_values, q.grad_context);
  for (int64_t j = q.first; j < q.last; ++j) q.kept[j] = 1;
  if (p.keep_threshold) drop(p, q.b, q.i, q.first, n, q.kept + q.first);
  for (int64_t j0 = q.first; j0 < q.last && g.grad_context.data; j0 += kKeyTile) {
    const int64_t nj = q.last - j0 < kKeyTile ? q.last - j0 : kKeyTile;
    const RowTile<T> value = value_tile(p, q.b, j0, nj, m.values);
    row_dots(q.grad_context, value.data, value.row, nj, p.padded_values, q.dp + j0);
  }
  if (g.grad_weights.data) load_row(g.grad_weights, q.b, q.i, p.keys, p.keys, q.ds);
  for (int64_t j = q.first; j < q.last; ++j) {
    if (g.grad_weights.data && g.drops_weights) q.dp[j] += q.ds[j];
    q.dp[j] = q.kept[j] == 0 ? T(0) : q.kept[j] * q.dp[j];
    if (g.grad_weights.data && !g.drops_weights) q.dp[j] += q.ds[j];
    q.kept[j] *= weights[j];
  }
}

// Of forward attention: what the last weights and the transition get, of ds and (where the reader stayed) of dp.
template <class T>
inline void mixture_gradients(const StepBackward<T>& g, const StepGradients<T>& q, T* scratch, T* grad) {
  const Step<T>& s = g.step;
  const Mixture<T> mix(s, q, scratch);
  zero(grad, slots_row(s.problem));
  T move = 0;
  bool any = false;
  for (int64_t j = q.first; j < q.last; ++j) {
    if (!mix.reaches(j)) continue;
    any = true;
    const T of_mix = q.ds[j] / mix(j);
    grad[j] += mix.stay * of_mix;
    if (j > 0) grad[j - 1] += mix.move * of_mix;
    move += of_mix * (mix.moved(j) - mix.before[j]);
  }
  for (int64_t j = q.first; j < q.last; ++j) {
    if (!any) grad[j] = visible(s.problem.mask, q.b, 0, j) ? q.dp[j] : T(0), q.ds[j] = 0;
  }
  for (int64_t j = 0; j < q.last && s.problem.mask.data; ++j)
    if (!visible(s.problem.mask, q.b, 0, j)) grad[j] = 0;
  store_row(g.grad_previous, q.b, q.i, s.problem.keys, grad);
  if (s.transition.data) store_row(g.grad_transition, q.b, q.i, 1, &move);
}

// ds of a query, of the sigmoid less its factor 1 - sigmoid(s), which comes with the score.
template <class T>
inline void score_row_gradients(const StepBackward<T>& g, const StepTile<T>& m, const StepGradients<T>& q, T* scratch) {
  const Problem<T>& p = g.step.problem;
  const int64_t at = (q.b * p.queries + q.i) * p.keys;
  const T* weights = g.weights + at;
  weight_gradients(g, m, q, weights);
  T delta = 0;
  for (int64_t j = q.first; j < q.last; ++j) delta += weights[j] == 0 ? T(0) : weights[j] * q.dp[j];
  zero(q.ds, slots_row(p));
  for (int64_t j = q.first; j < q.last; ++j) q.ds[j] = weights[j] == 0 ? T(0) : weights[j] * (q.dp[j] - delta);
  if (g.step.rule == Rule::kForward) mixture_gradients(g, q, scratch, scratch + slots_row(p));
  if (g.kept) __builtin_memcpy(g.kept + at, q.kept, size_t(p.keys) * sizeof(T));
}

// ds of the keys of a tile, of the sigmoid with its factor 1 - sigmoid(s). Where it is 0 the sums may be a hidden
// key's: they become 0 too.
template <class T>
inline void slot_gradients(const Step<T>& s, T* sums, int64_t nj, const T* ds, T* slots, T& ds_sum) {
  const Problem<T>& p = s.problem;
  alignas(kVectorBytes) T score[kLanes<T>];
  for (int64_t j = 0; j < nj; ++j) {
    T* x = sums + j * row_of(p.padded);
    slots[j] = ds[j];
    if (ds[j] == 0) {
      zero(x, p.padded);
    } else if (s.rule == Rule::kSigmoid) {
      scores_of_sums<T, false>(p, x, 1, score);
      slots[j] /= 1 + T(__builtin_exp(score[0] + p.v.constant));
    }
    ds_sum += slots[j];
  }
}

// From the sums of a tile their gradients u = 4 scale v ds r (1 - r), in their place, and added to the query's; ds r is
// added to the score weight's.
template <class T>
inline void gradients_of_sums(const Step<T>& s, T* sums, int64_t nj, const T* ds, T* grad_query, T* grad_weight,
                              T& ds_sum) {
  constexpr int W = kLanes<T>;
  const int64_t padded = s.problem.padded, row = row_of(padded);
  const T* gain = s.problem.v.gain;
  T slots[kStepKeys];
  slot_gradients(s, sums, nj, ds, slots, ds_sum);
  for (int64_t d = 0; d < padded; d += 2 * W) {
    const Vec<T> gain0 = load(gain + d), gain1 = load(gain + d + W);
    Vec<T> query0 = {}, query1 = {}, weight0 = {}, weight1 = {};
    for (int64_t j = 0; j < nj; ++j) {
      T* x = sums + j * row + d;
      const Vec<T> x0 = one_plus_exp<T>(load(x)), x1 = one_plus_exp<T>(load(x + W));
      const Vec<T> inverse = reciprocal<T>(x0 * x1), r0 = inverse * x1, r1 = inverse * x0;
      const Vec<T> t0 = slots[j] * r0, t1 = slots[j] * r1;
      const Vec<T> u0 = (t0 - t0 * r0) * gain0, u1 = (t1 - t1 * r1) * gain1;
      store<T>(x, u0);
      store<T>(x + W, u1);
      query0 += u0, query1 += u1;
      weight0 += t0, weight1 += t1;
    }
    add_to<T>(grad_query + d, query0);
    add_to<T>(grad_query + d + W, query1);
    add_to<T>(grad_weight + d, weight0);
    add_to<T>(grad_weight + d + W, weight1);
  }
}

// Scratch of a backward tile, and the sums of a task.
template <class T>
struct StepSums {
  T *grad_features, *spread, *grad_key, *grad_value;
  T *weight, *filters, *projection;
};

// What a tile gives to the past weights: its features' gradients times the filters, each place of those on the weight
// that it was laid on. A few places take a product each; many take one for all, whose rows are then added in steps.
template <class T>
inline void past_gradients(const Step<T>& s, const StepSums<T>& sums, const StepGradients<T>& q, const T* of_features,
                           int64_t row, int64_t j0, int64_t nj, Ahead& ahead) {
  constexpr int W = kLanes<T>;
  const int64_t padded_width = s.padded_width;
  for (int64_t c = 0; c < s.channels; ++c) {
    T* grad = q.grad_past[c] + j0;
    const T* filters = s.filters + c * s.width * s.padded_filters;
    for (int64_t o = 0; o < s.width && s.width <= kFewPlaces; ++o) {
      row_dots(filters + o * s.padded_filters, of_features, row, nj, s.padded_filters, sums.spread);
      for (int64_t j = 0; j < nj; ++j) grad[j + o] += sums.spread[j];
    }
    if (s.width <= kFewPlaces) continue;
    zero(sums.spread, nj * padded_width);
    product<T>({sums.spread, padded_width, of_features, row, 1, s.filters_by_count + c * s.filter_count * padded_width,
                padded_width, s.filter_count, &ahead},
               0, nj, padded_width);
    for (int64_t j = 0; j < nj; ++j) {
      T* row_spread = sums.spread + j * padded_width;
      for (int64_t o = s.width; o < padded_width; ++o) row_spread[o] = 0;  // of 0 filters, NaN beside NaN
      for (int64_t o = 0; o < padded_width; o += W) add_to<T>(grad + j + o, load(row_spread + o));
    }
  }
}

// From the gradients of a tile's sums: those of L, the filters and the past.
template <class T>
inline void feature_gradients(const Step<T>& s, const StepTile<T>& m, const StepSums<T>& sums,
                              const StepGradients<T>& q, int64_t j0, int64_t nj, Ahead& ahead) {
  const Problem<T>& p = s.problem;
  const int64_t sums_row = row_of(p.padded), filters = s.padded_filters;
  const T* of_features = m.sums;
  int64_t row = sums_row;
  if (s.projection) {
    of_features = sums.grad_features, row = filters;
    zero(sums.grad_features, nj * filters);
    product<T>({sums.grad_features, filters, m.sums, sums_row, 1, s.projection_by_feature, filters, p.padded, &ahead},
               0, nj, filters);
    product<T>({sums.projection, p.padded, m.features, 1, filters, m.sums, sums_row, nj, &ahead}, 0, s.filter_count,
               p.padded);
  }
  for (int64_t c = 0; c < s.channels; ++c)
    product<T>({sums.filters + c * s.width * filters, filters, q.past[c] + j0, 1, 1, of_features, row, nj, &ahead}, 0,
               s.width, filters);
  past_gradients(s, sums, q, of_features, row, j0, nj, ahead);
}

// What the query gets from keys [lo, hi) of a tile, and gives to its other sums; what the keys get is left in m.sums,
// and added to grad_key, which may be null.
template <class T>
inline void backward_step_tile(const StepBackward<T>& g, const StepTile<T>& m, const StepSums<T>& sums,
                               const StepGradients<T>& q, int64_t lo, int64_t hi, T* grad_key, T& ds_sum) {
  const Step<T>& s = g.step;
  const Problem<T>& p = s.problem;
  const int64_t row = row_of(p.padded), nj = hi - lo;
  Ahead ahead = soon(s, q, lo, hi, q.b + 1);  // of which the values are first
  sum_tile(s, m, q, lo, nj, ahead);
  gradients_of_sums(s, m.sums, nj, q.ds + lo, q.grad_query, sums.weight, ds_sum);
  if (s.channels > 0) feature_gradients(s, m, sums, q, lo, nj, ahead);
  for (int64_t j = 0; j < nj && grad_key; ++j)
    for (int64_t d = 0; d < p.padded; d += kLanes<T>) add_to<T>(grad_key + j * row + d, load(m.sums + j * row + d));
}

// Gradients of the values of row b: sum_i kept_ij dC_i.
template <class T>
inline void step_value_gradients(const StepBackward<T>& g, const StepSums<T>& sums, int64_t b, T* memory) {
  constexpr int W = kLanes<T>;
  const Problem<T>& p = g.step.problem;
  T* grad = sums.grad_value;
  for (int64_t j = 0; j < p.keys; ++j) {
    for (int64_t i = 0; i < p.queries; ++i) {
      const StepGradients<T> q(g.step, b, i, memory + i * step_query_scratch(g.step));
      const T kept = g.grad_context.data ? q.kept[j] : T(0);  // 0 times what came in may be NaN
      for (int64_t h = 0; h < p.padded_values; h += W) {
        const Vec<T> part = kept == 0 ? Vec<T>{} : kept * load(q.grad_context + h);
        store<T>(grad + h, i == 0 ? part : load(grad + h) + part);
      }
    }
    if (p.queries == 0) zero(grad, p.padded_values);
    store_row(g.grad_value, b, j, p.values, grad);
  }
}

template <class T>
inline void store_step_gradients(const StepBackward<T>& g, const StepGradients<T>& q) {
  const Step<T>& s = g.step;
  const Problem<T>& p = s.problem;
  const int64_t length = length_of(p, q.b), reach = s.width / 2;
  store_row(g.grad_query, q.b, q.i, p.features, q.grad_query);
  for (int64_t c = 0; c < s.channels; ++c) {
    T* grad = q.grad_past[c] + reach;
    for (int64_t j = 0; j < p.keys; ++j)
      if (j >= length || !visible(p.mask, q.b, 0, j)) grad[j] = 0;
    store_row(g.grad_past[c], q.b, q.i, p.keys, grad);
  }
}

// Keys [j0, j1) of row b: what each query gives to them and gets. What a single one gives is not copied.
template <class T>
inline void key_tile_gradients(const StepBackward<T>& g, const StepTile<T>& m, const StepSums<T>& sums, int64_t b,
                               int64_t j0, int64_t j1, T* memory, T& ds_sum) {
  const Problem<T>& p = g.step.problem;
  const int64_t row = row_of(p.padded);
  const bool single = p.queries == 1;
  int64_t begin = j0, end = j0;  // the keys that some query may attend
  zero(sums.grad_key, (j1 - j0) * row);
  for (int64_t i = 0; i < p.queries; ++i) {
    const StepGradients<T> q(g.step, b, i, memory + i * step_query_scratch(g.step));
    const int64_t lo = q.first > j0 ? q.first : j0, hi = q.last < j1 ? q.last : j1;
    if (lo >= hi) continue;
    begin = single ? lo : j0, end = single ? hi : j1;
    backward_step_tile(g, m, sums, q, lo, hi, single ? nullptr : sums.grad_key + (lo - j0) * row, ds_sum);
  }
  const T* grad_key = single ? m.sums : sums.grad_key;
  for (int64_t j = j0; j < j1; ++j) {
    const bool inside = j >= begin && j < end;
    if (!inside && g.adds) continue;
    put_row(g.adds, g.grad_key, b, j, p.features, inside ? grad_key + (j - begin) * row : sums.grad_key);
  }
}

// Row b: its queries' ds first, then tile by tile of its keys what each of them gives and gets.
template <class T>
inline void backward_step_row(const StepBackward<T>& g, const StepTile<T>& m, const StepSums<T>& sums, int64_t b,
                              T* memory, T& ds_sum) {
  const Step<T>& s = g.step;
  const Problem<T>& p = s.problem;
  const int64_t by_query = step_query_scratch(s);
  for (int64_t i = 0; i < p.queries; ++i) {
    const StepGradients<T> q(s, b, i, memory + i * by_query);
    load_query(s, q);
    zero(q.grad_query, p.padded);
    for (int64_t c = 0; c < s.channels; ++c) zero(q.grad_past[c], past_row(s));
    score_row_gradients(g, m, q, memory + p.queries * by_query);
  }
  if (g.grad_value.data) step_value_gradients(g, sums, b, memory);
  for (int64_t j0 = 0; j0 < p.keys; j0 += kStepKeys)
    key_tile_gradients(g, m, sums, b, j0, p.keys - j0 < kStepKeys ? p.keys : j0 + kStepKeys, memory, ds_sum);
  for (int64_t i = 0; i < p.queries; ++i) store_step_gradients(g, StepGradients<T>(s, b, i, memory + i * by_query));
}

template <class T>
void step_backward(const StepBackward<T>& g, int64_t task, T* memory) {
  const T* all = memory;
  const Step<T>& s = g.step;
  const Problem<T>& p = s.problem;
  const int64_t filters = s.channels * s.width * s.padded_filters;
  const int64_t projection = s.projection ? s.filter_count * p.padded : 0;
  const StepTile<T> m(s, memory);
  StepSums<T> sums;
  sums.grad_features = memory;
  sums.spread = sums.grad_features + kStepKeys * s.padded_filters;
  sums.grad_key = sums.spread + kStepKeys * spread_row(s);
  sums.grad_value = sums.grad_key + kStepKeys * row_of(p.padded);
  memory = sums.grad_value + kKeyTile * row_of(p.padded_values);
  laid_out<T>(all, memory + p.queries * step_query_scratch(s) + 2 * slots_row(p), step_backward_scratch(s));
  sums.weight = g.grad_weight + task * p.padded;
  sums.filters = g.grad_filters + task * filters, sums.projection = g.grad_projection + task * projection;
  zero(sums.weight, p.padded), zero(sums.filters, filters), zero(sums.projection, projection);
  T ds_sum = 0;
  const int64_t begin = task * p.batch / g.tasks, end = (task + 1) * p.batch / g.tasks;
  for (int64_t b = begin; b < end; ++b) backward_step_row(g, m, sums, b, memory, ds_sum);
  for (int64_t d = 0; d < p.padded; ++d) sums.weight[d] = ds_sum - 2 * sums.weight[d];
}

// ------------------------------------------------------------------------------------- of one query alone

// Scores of keys that nothing was made of ahead: for one query exp of the sum costs less than those of all keys.
template <class T>
void query_scores(const Scores<T>& f, int64_t task, T* memory) {
  Step<T> s{};
  s.problem = of_row(f.problem, task / f.problem.queries);
  const Problem<T>& p = s.problem;
  const StepTile<T> m(s, memory);
  const StepQuery<T> q(s, task / p.queries, task % p.queries, memory);
  T* x = memory;
  load_query(s, q);
  step_scores(s, m, q, x);
  for (int64_t j = 0; j < q.last; ++j)
    if (x[j] != kHidden<T>) x[j] += p.v.constant;
  for (int64_t j = q.last; j < p.keys; ++j) x[j] = kHidden<T>;
  store_row(f.scores, q.b, q.i, p.keys, x);
}

// What a step of attention without a past hands to the keys of all steps: ds, and what the values take, into g.
template <class T>
inline StepGradients<T> begin_query(const StepBackward<T>& g, const StepTile<T>& m, int64_t task, T* memory) {
  const Problem<T>& p = g.step.problem;
  const StepGradients<T> q(g.step, task / p.queries, task % p.queries, memory);
  load_query(g.step, q);
  zero(q.grad_query, p.padded);
  score_row_gradients(g, m, q, q.dp + slots_row(p));
  __builtin_memcpy(g.ds + task * p.keys, q.ds, size_t(p.keys) * sizeof(T));
  return q;
}

// Adds sum_j ds r (1 - r) of four keys to the query's, from E and F.
template <class T, int J>
inline void near_query_gradients(int64_t padded, const T* e, const T* f, const T* ds, T* grad_query) {
  constexpr int W = kLanes<T>;
  for (int64_t d = 0; d < padded; d += 2 * W) {
    const Vec<T> e0 = load(e + d), e1 = load(e + d + W);
    Vec<T> sum0 = load(grad_query + d), sum1 = load(grad_query + d + W);
    UNROLL for (int j = 0; j < J; ++j) {
      const Vec<T> x0 = one_plus<T, true>(e0, load(f + j * padded + d));
      const Vec<T> x1 = one_plus<T, true>(e1, load(f + j * padded + d + W));
      const Vec<T> inverse = reciprocal<T>(x0 * x1), r0 = inverse * x1, r1 = inverse * x0;
      const Vec<T> t0 = ds[j] * r0, t1 = ds[j] * r1;
      sum0 += t0 - t0 * r0, sum1 += t1 - t1 * r1;
    }
    store<T>(grad_query + d, sum0);
    store<T>(grad_query + d + W, sum1);
  }
}

template <class T>
void query_backward(const StepBackward<T>& all, int64_t task, T* memory) {
  StepBackward<T> g = all;
  Problem<T>& p = g.step.problem;
  p = of_row(p, task / p.queries);
  const StepTile<T> m(g.step, memory);
  T *e = memory, *unused = e + p.padded, *keys = unused + p.padded;
  const StepGradients<T> q = begin_query(g, m, task, keys + kKeyTile * row_of(p.padded));
  const int64_t at = q.b * p.keys;
  const bool prepared = p.exp_key.data != nullptr;
  const T limit = prepared ? exponential_row(p.query, q.b, q.i, p.features, p.padded, e) : T(0);
  if (prepared && range_of(p, limit, largest(p.key_limit + at, q.last)) != Range::kFar) {
    for (int64_t j0 = 0; j0 < q.last; j0 += kKeyTile) {
      const int64_t nj = q.last - j0 < kKeyTile ? q.last - j0 : kKeyTile;
      const T *f = exponential_tile(p, q.b, j0, nj, keys), *ds = q.ds + j0;
      int64_t j = 0;
      for (; j + 4 <= nj; j += 4) near_query_gradients<T, 4>(p.padded, e, f + j * p.padded, ds + j, q.grad_query);
      for (; j < nj; ++j) near_query_gradients<T, 1>(p.padded, e, f + j * p.padded, ds + j, q.grad_query);
    }
    for (int64_t d = 0; d < p.padded; ++d) q.grad_query[d] *= p.v.gain[d];
  } else {
    T ds_sum = 0;
    for (int64_t j0 = 0; j0 < q.last; j0 += kStepKeys) {
      const int64_t nj = q.last - j0 < kStepKeys ? q.last - j0 : kStepKeys;
      Ahead none;
      sum_tile(g.step, m, q, j0, nj, none);
      gradients_of_sums(g.step, m.sums, nj, q.ds + j0, q.grad_query, unused, ds_sum);
    }
  }
  store_row(g.grad_query, q.b, q.i, p.features, q.grad_query);
}

template <class T>
void dot_query_backward(const StepBackward<T>& g, int64_t task, T* memory) {
  const Problem<T>& p = g.step.problem;
  const StepTile<T> m(g.step, memory);
  T* keys = memory;
  const StepGradients<T> q = begin_query(g, m, task, keys + kKeyTile * row_of(p.padded));
  for (int64_t j0 = 0; j0 < q.last; j0 += kKeyTile) {
    const int64_t nj = q.last - j0 < kKeyTile ? q.last - j0 : kKeyTile;
    const RowTile<T> key = key_tile(p, q.b, j0, nj, keys);
    add_rows<T>({q.grad_query, 0, q.ds + j0, 0, 1, key.data, key.row, nj}, 1, p.padded, key.finite);
  }
  for (int64_t d = 0; d < p.padded; ++d) q.grad_query[d] *= p.scale;
  store_row(g.grad_query, q.b, q.i, p.features, q.grad_query);
}
