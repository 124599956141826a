// Attention of the queries of a step, by any of the scores that have a kernel for one.
#pragma once

#include "cpu/step_setup.h"

namespace attnext::cpu {

enum class Score : int64_t { kAdditive, kDot, kPast };  // as SCORES in attnext/recurrent/_operators.py counts them

// What is attended, by which score.
struct Attended {
  const Tensor& key;
  const Optional &value, &score_weight, &exp_key, &key_limit, &lengths, &mask, &filters, &projection;
  const Optional &past, &cumulative;  // (N, Tk): before the first step, of what is seen
  const Optional& seeds;              // (T): of dropout
  double scale, dropout_p;
  int64_t score, rule;
};

// Rows of T for N hypotheses, so many of each sentence.
template <class T>
Rows rows_at(const T* data, int64_t row, int64_t queries) {
  return {const_cast<T*>(data), queries * row, row, 1, kTypeOf<T>};
}

// The tensor's numbers, which must be contiguous.
template <class T>
T* numbers(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(dtype_of(x) == arithmetic_dtype<T>() && x.is_contiguous(), "attnext: ", name,
                  " must be contiguous, in the dtype of the others");
  return static_cast<T*>(x.data_ptr());
}

// Attention of the queries of a step.
template <class T>
class StepAttention {
 public:
  StepAttention(const Attended& x, const Tensor& query, bool backward) : x_(x) {
    const Score score = Score(x.score);
    if (score == Score::kDot) {
      problem_ = &dot_.emplace(query, x.key, x.value, x.lengths, x.mask, x.scale).problem;
    } else if (score == Score::kAdditive) {
      STD_TORCH_CHECK(x.value && x.score_weight, "attnext: an additive score needs value and score_weight");
      problem_ = &additive_
                      .emplace(query, x.key, &*x.value, *x.score_weight, x.exp_key, x.key_limit, x.lengths, x.mask,
                               x.scale, /*makes_exponentials=*/!backward)
                      .problem;
    } else {
      STD_TORCH_CHECK(score == Score::kPast && x.value && x.score_weight && x.filters && (x.past || x.cumulative),
                      "attnext: this score needs value, score_weight, filters and a past");
      STD_TORCH_CHECK(Rule(x.rule) == Rule::kSoftmax || Rule(x.rule) == Rule::kSigmoid,
                      "attnext: the rule of a decoder must be softmax or sigmoid");
      static const Optional none;
      // In their place something of the size that such a query's have: a step takes them from where they lie.
      slots_ = empty(by_query(query, x.key.size(1)), arithmetic_dtype<T>());
      const Optional &first = slots_, &second = x.past && x.cumulative ? slots_ : none;
      inputs_.emplace(StepInputs{x.key, *x.value, *x.score_weight, x.filters, x.projection, first, second, none, none,
                                 x.lengths, x.mask, none, none, x.scale, 0., x.rule});
      past_.emplace(query, *inputs_);
      if (backward) past_->transpose(*inputs_);
      problem_ = &past_->step.problem;
    }
    STD_TORCH_CHECK(!x.mask || x.mask->dim() == 2, "attnext: the mask of a decoder must have 2 dimensions");
    set_dropout();
    for (int64_t k = 0; k < (past_ ? past_->step.channels : 0); ++k) sees_cumulative_[k] = k == (x.past ? 1 : 0);
  }

  const Problem<T>& problem() const { return *problem_; }
  int64_t rows() const { return problem_->batch * problem_->queries; }
  // Tasks of a step, forward and backward.
  int64_t tasks() const {
    return past_ ? rows() : problem_->batch * ((problem_->queries + kQueryBlock - 1) / kQueryBlock);
  }
  int64_t backward_tasks() const { return past_ ? std::clamp<int64_t>(problem_->batch, 1, kBackwardTasks) : rows(); }
  int64_t scratch() const { return past_ ? step_scratch(past_->step) : forward_scratch(*problem_, true); }
  int64_t backward_scratch() const {
    if (past_) return step_backward_scratch(past_->step);
    Step<T> step{};
    step.problem = *problem_;
    return query_backward_scratch(step);
  }
  int64_t work() const {
    return past_ ? past_->work() : rows() * problem_->keys * (problem_->padded + problem_->padded_values);
  }

  // Where the results of all steps lie.
  T *context = nullptr, *weights = nullptr, *wide = nullptr, *cumulative = nullptr, *log_sum_exp = nullptr;
  // (N, Tk), before the first step.
  const T *first_past = nullptr, *first_cumulative = nullptr;

  void run(int64_t t, const T* query, int64_t query_row, int64_t begin, int64_t end, T* memory) const {
    const int64_t n = rows(), slots = n * problem_->keys;
    const Rows to = rows_at(context + t * n * problem_->values, problem_->values, problem_->queries);
    if (past_) {
      const StepForward<T> f{step_at(t, query, query_row), to, wide + t * slots};
      for (int64_t task = begin; task < end; ++task) {
        kernels_of<T>().step(f, task, memory);
        if (cumulative) add_up(t, task);
      }
      return;
    }
    const Forward<T> f{problem_at(t, query, query_row), to,
                       weights ? rows_at(weights + t * slots, problem_->keys, problem_->queries) : Rows{},
                       wide ? wide + t * slots : nullptr, log_sum_exp};
    const auto kernel = dot_ ? kernels_of<T>().dot_forward : kernels_of<T>().forward;
    for (int64_t task = begin; task < end; ++task) kernel(f, task, memory);
  }

  // What comes in for contexts and weights, where the gradients of queries and scores go, and those of a past.
  struct Gradients {
    const T *context, *weights;        // of all steps; weights may be null
    T *query, *ds, *kept;              // of all steps; kept may be null
    T* key;                            // a sum; of a past alone
    T *coming, *of_past[2];            // (N, Tk): for the weights of the step at work, by what it saw; of a past alone
    T* sum_cumulative;                 // (N, Tk): what the sums after a step got
    T *weight, *filters, *projection;  // of a step, by task
    T *sum_weight, *sum_filters, *sum_projection;  // of all steps
  };

  void run_backward(const Gradients& x, int64_t t, const T* query, int64_t query_row, int64_t begin, int64_t end,
                    T* memory) const {
    const Problem<T>& p = *problem_;
    const int64_t n = rows(), slots = n * p.keys;
    StepBackward<T> g{};
    g.weights = wide + t * slots;
    g.grad_context = rows_at(x.context + t * n * p.values, p.values, p.queries);
    g.grad_query = rows_at(x.query + t * n * p.features, p.features, p.queries);
    g.kept = x.kept ? x.kept + t * slots : nullptr;
    if (past_) return run_past_backward(g, x, t, query, query_row, begin, end, memory);
    g.step.problem = problem_at(t, query, query_row), g.drops_weights = true;
    if (x.weights) g.grad_weights = rows_at(x.weights + t * slots, p.keys, p.queries);
    g.ds = x.ds + t * slots;
    const auto kernel = dot_ ? kernels_of<T>().dot_query_backward : kernels_of<T>().query_backward;
    for (int64_t task = begin; task < end; ++task) kernel(g, task, memory);
  }

  const Step<T>* step() const { return past_ ? &past_->step : nullptr; }
  bool sees_cumulative(int64_t channel) const { return sees_cumulative_[channel]; }

 private:
  void set_dropout() {
    if (x_.dropout_p == 0.) return;
    STD_TORCH_CHECK(x_.dropout_p > 0. && x_.dropout_p <= 1. && x_.seeds && x_.seeds->is_cpu() &&
                        x_.seeds->scalar_type() == ScalarType::Long && x_.seeds->is_contiguous(),
                    "attnext: dropout of a decoder needs seeds, contiguous int64 on the CPU");
    seeds_ = static_cast<const int64_t*>(x_.seeds->data_ptr());
    Problem<T>& p = *problem_;
    p.keep_threshold = uint64_t(x_.dropout_p * 0x1p32);
    p.keep_scale = x_.dropout_p < 1. ? T(1. / (1. - x_.dropout_p)) : T(0);
  }

  Problem<T> problem_at(int64_t t, const T* query, int64_t query_row) const {
    Problem<T> p = *problem_;
    p.query = rows_at(query, query_row, p.queries);
    if (seeds_) p.seed = uint64_t(seeds_[t]);
    return p;
  }

  Step<T> step_at(int64_t t, const T* query, int64_t query_row) const {
    Step<T> s = past_->step;
    s.problem = problem_at(t, query, query_row);
    const int64_t keys = s.problem.keys, slots = rows() * keys;
    for (int64_t c = 0; c < s.channels; ++c) {
      const T* before = sees_cumulative_[c] ? (t ? cumulative + (t - 1) * slots : first_cumulative)
                                            : (t ? wide + (t - 1) * slots : first_past);
      s.past[c] = rows_at(before, keys, s.problem.queries);
    }
    return s;
  }

  // The sum of the weights of all steps up to this one.
  void add_up(int64_t t, int64_t row) const {
    const int64_t keys = problem_->keys, slots = rows() * keys, at = t * slots + row * keys;
    const T* before = t ? cumulative + at - slots : first_cumulative + row * keys;
    for (int64_t j = 0; j < keys; ++j) cumulative[at + j] = before[j] + wide[at + j];
  }

  // Tasks are a few rows each; what comes in for their weights is made of what came in for later steps.
  void run_past_backward(StepBackward<T>& g, const Gradients& x, int64_t t, const T* query, int64_t query_row,
                         int64_t begin, int64_t end, T* memory) const {
    g.step = step_at(t, query, query_row);
    const Step<T>& s = g.step;
    const Problem<T>& p = s.problem;
    const int64_t keys = p.keys, places = s.channels * s.width * s.padded_filters;
    const int64_t projection = s.projection ? s.filter_count * p.padded : 0;
    g.tasks = backward_tasks(), g.adds = true;
    g.grad_key = {x.key, keys * p.features, p.features, 1, kTypeOf<T>};
    g.grad_weights = rows_at(x.coming, keys, p.queries);
    for (int64_t c = 0; c < s.channels; ++c) g.grad_past[c] = rows_at(x.of_past[c], keys, p.queries);
    g.grad_weight = x.weight, g.grad_filters = x.filters, g.grad_projection = x.projection;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b0 = task * p.batch / g.tasks, b1 = (task + 1) * p.batch / g.tasks;
      for (int64_t k = b0 * p.queries * keys; k < b1 * p.queries * keys; ++k) {
        T sum = x.weights ? x.weights[t * rows() * keys + k] : T(0);
        for (int64_t c = 0; c < s.channels; ++c) {
          if (sees_cumulative_[c]) x.sum_cumulative[k] += x.of_past[c][k];
          sum += sees_cumulative_[c] ? x.sum_cumulative[k] : x.of_past[c][k];
        }
        x.coming[k] = sum;
      }
      kernels_of<T>().step_backward(g, task, memory);
      add(x.weight, x.sum_weight, task, p.padded), add(x.filters, x.sum_filters, task, places);
      add(x.projection, x.sum_projection, task, projection);
    }
  }

  static void add(const T* x, T* sum, int64_t task, int64_t n) {
    for (int64_t k = task * n; k < (task + 1) * n; ++k) sum[k] += x[k];
  }

  const Attended& x_;
  std::optional<AdditiveSetup<T>> additive_;
  std::optional<DotSetup<T>> dot_;
  Optional slots_;
  std::optional<StepInputs> inputs_;
  std::optional<StepSetup<T>> past_;
  Problem<T>* problem_ = nullptr;
  const int64_t* seeds_ = nullptr;
  bool sees_cumulative_[2] = {};
};

}  // namespace attnext::cpu
