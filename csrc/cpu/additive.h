// A problem of additive attention: its score weight v as the kernels take it, and exponentials of the keys.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/setup.h"

namespace attnext::cpu {

// Row h of the score weight, v itself where it has one dimension, as padded rows of T.
template <class T>
struct ScoreWeightRows {
  ScoreWeightRows(Scratch& scratch, const Tensor& score_weight, int64_t head, double scale, int64_t padded)
      : weight(scratch.take<T>(padded)),
        gain(scratch.take<T>(padded)),
        fold(scratch.take<T>(padded)),
        offset(scratch.take<T>(padded)) {
    read(score_weight, head);
    std::fill(weight + score_weight.size(-1), weight + padded, T(0));
    double total = 0;
    for (int64_t d = 0; d < padded; ++d) {
      const double v = scale * double(weight[d]);
      total += v;
      const T w = T(-2 * v);
      weight[d] = std::isfinite(w) ? w : std::numeric_limits<T>::quiet_NaN();  // not the score of a hidden slot
      gain[d] = T(4 * v);
      size += std::abs(weight[d]);
      if (!(std::abs(weight[d]) <= limit) && !std::isnan(limit)) limit = std::abs(weight[d]);  // a NaN stays
    }
    constant = T(total);
    fold_features(padded);
  }

  // Weights that together could not move the sum by its rounding become a constant of 1 / unit, which is 0 beside it.
  void fold_features(int64_t padded) {
    constexpr T unit = Folding<T>::unit, bits = Folding<T>::bits;
    const T least = limit / T(padded) * std::numeric_limits<T>::epsilon() / 8;
    T smallest = limit;
    for (int64_t d = 0; d < padded; ++d) {
      const T w = weight[d];
      const bool counts = std::abs(w) > least;
      if (counts) smallest = std::min(smallest, std::abs(w));
      fold[d] = counts ? unit * (limit / w) : T(0);
      offset[d] = counts ? fold[d] : 1 / unit;
    }
    plain_limit = limit > 0 ? (bits - std::log2(limit / smallest)) * T(0.34657) : bits * T(0.34657);
  }

  void read(const Tensor& x, int64_t head) {
    with_type(type_of(x), [&](auto stored) {
      const int64_t n = x.size(-1), stride = x.stride(-1);
      const auto* data = static_cast<const decltype(stored)*>(x.data_ptr()) + (x.dim() == 2 ? head * x.stride(0) : 0);
      for (int64_t d = 0; d < n; ++d) weight[d] = T(data[d * stride]);
    });
  }

  ScoreWeight<T> addresses() const { return {weight, gain, fold, offset, limit, size, constant, plain_limit}; }

  T *weight, *gain, *fold, *offset;
  T limit = 0, size = 0, constant, plain_limit;
};

template <class T>
void take_score_weight(Setup<T>& setup, const Tensor& score_weight, const Tensor& query, double scale) {
  Problem<T>& problem = setup.problem;
  const bool one = score_weight.dim() == 1;
  const int64_t count = one ? 1 : score_weight.size(0);
  check_shape(score_weight, "score_weight", one ? Shape{problem.features} : Shape{count, problem.features});
  check_dtype(score_weight, query);
  STD_TORCH_CHECK(count > 0 && problem.batch % count == 0, "attnext: score_weight has ", count,
                  " rows, of which the batch, ", problem.batch, ", must be a multiple");
  ScoreWeight<T>* heads = setup.scratch.template take<ScoreWeight<T>>(count);
  for (int64_t h = 0; h < count; ++h)
    heads[h] = ScoreWeightRows<T>(setup.scratch, score_weight, h, scale, problem.padded).addresses();
  problem.heads = heads, problem.head_count = count;
}

template <class T>
void exponentials(const Rows& input, int64_t batch, int64_t rows, int64_t features, int64_t padded,
                  const int64_t* lengths, const Mask& mask, T* output, int64_t output_row, T* limit) {
  const Exponentials<T> e{input, batch, rows, features, padded, lengths, mask, output, output_row, limit};
  const auto& kernels = kernels_of<T>();
  parallel(batch * rows, batch * rows * padded,
           [&](int64_t begin, int64_t end) { kernels.exponentials(e, begin, end); });
}

// The problem with its score weight and with F.
template <class T>
struct AdditiveSetup : Setup<T> {
  AdditiveSetup(const Tensor& query, const Tensor& key, const Tensor* value, const Tensor& score_weight,
                const Optional& exp_key, const Optional& key_limit, const Optional& lengths, const Optional& mask,
                double scale, bool makes_exponentials = true)
      : Setup<T>(query, key, value, lengths, mask, scale, kFeatureBlock) {
    take_score_weight<T>(*this, score_weight, query, scale);
    if (exp_key && key_limit) {
      take_exponentials(*exp_key, *key_limit);
    } else if (makes_exponentials) {
      make_exponentials();
    }
  }

  // F as it was prepared.
  void take_exponentials(const Tensor& exp_key, const Tensor& key_limit) {
    check_shape(exp_key, "exp_key", {problem.batch, problem.keys, problem.padded});
    check_shape(key_limit, "key_limit", {problem.batch, problem.keys});
    const int32_t dtype = arithmetic_dtype<T>(), held = dtype_of(exp_key);
    const bool known = held == dtype || (sizeof(T) == 4 && (held == kHalfDtype || held == kBFloat16Dtype));
    STD_TORCH_CHECK(exp_key.is_contiguous() && key_limit.is_contiguous() && known && dtype_of(key_limit) == dtype,
                    "attnext: the prepared keys are not as prepare made them");
    problem.exp_key = rows_of(exp_key);
    problem.key_limit = static_cast<const T*>(key_limit.data_ptr());
  }

  void make_exponentials() {
    const int64_t rows = problem.batch * problem.keys, padded = problem.padded;
    T* made_keys = scratch.template take<T>(rows * padded);
    T* made_limit = scratch.template take<T>(rows);
    const Mask by_key = problem.mask.query == 0 ? problem.mask : Mask{};
    exponentials<T>(problem.key, problem.batch, problem.keys, problem.features, padded, problem.lengths, by_key,
                    made_keys, padded, made_limit);
    problem.exp_key = {made_keys, problem.keys * padded, padded, 1, kTypeOf<T>}, problem.key_limit = made_limit;
  }

  using Setup<T>::problem;
  using Setup<T>::scratch;
};

}  // namespace attnext::cpu
