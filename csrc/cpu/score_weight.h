// The score weight v of additive attention, as the kernels take it.
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
    constexpr T unit = T(sizeof(T) == 4 ? 0x1p-31 : 0x1p-255);
    const T least = limit / T(padded) * std::numeric_limits<T>::epsilon() / 8;
    T smallest = limit;
    for (int64_t d = 0; d < padded; ++d) {
      const T w = weight[d];
      const bool counts = std::abs(w) > least;
      if (counts) smallest = std::min(smallest, std::abs(w));
      fold[d] = counts ? unit * (limit / w) : T(0);
      offset[d] = counts ? fold[d] : 1 / unit;
    }
    const T bits = T(sizeof(T) == 4 ? 61.5 : 509.);
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

}  // namespace attnext::cpu
