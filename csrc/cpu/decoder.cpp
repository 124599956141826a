// The CPU operators of a decoder: recurrent layers that attend a memory at every step.
//
// Rows are hypotheses, N of them: Q for each of the B sentences of the memory. Tensors of all steps have the steps
// first, (T, N, ...). A step is a sequence of phases, each of which the threads share (team.h): products with packed
// matrices, attention, and layers of units.
#include <functional>
#include <optional>
#include <vector>

#include "cpu/recurrence.h"
#include "cpu/step_setup.h"
#include "cpu/team.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

enum class Score : int64_t { kAdditive, kDot, kPast };  // as SCORES in attnext/recurrent/_decoder.py counts them

// The matrices of a decoder, as parameters have them.
struct Matrices {
  const Tensors &w_hidden, &w_below;  // (G S, S): of each layer, and of each but the lowest
  const Optional& w_outer;            // (G S, X): of what enters the lowest layer beside the inputs
  const Optional& w_query;            // (D, S); without, the query is the state
  const Optional& w_readout;          // (R, S + H)
  bool after, feeds;  // whether a step attends with its own state; whether its output vector enters the next
};

// What is attended, by which score.
struct Attended {
  const Tensor& key;
  const Optional &value, &score_weight, &exp_key, &key_limit, &lengths, &mask, &filters, &projection;
  const Optional &past, &cumulative;  // (N, Tk): before the first step, of what is seen
  const Optional& seeds;              // (T): of dropout
  double scale, dropout_p;
  int64_t score, rule;
};

struct DecoderInputs {
  const Tensor& gates;                        // (T, N, G S)
  const Optional& feeds;                      // (T, N, R)
  const Tensors &b_input, &b_hidden, &masks;  // of each layer; (T, N, S) of each but the lowest, or none
  const Optional& b_query;
  const Matrices& matrices;
  const Tensor& hidden;  // (L, N, S)
  const Optional &cell, &context, &feed;
  const Attended& attended;
  const Optional& packed;
  bool projected;  // the values are what they add to the lowest layer's gates and to the output vector, and themselves
};

template <class T>
constexpr Type kType = sizeof(T) == 4 ? Type::kFloat : Type::kDouble;

// Rows of T for N hypotheses, so many of each sentence.
template <class T>
Rows rows_at(const T* data, int64_t row, int64_t queries) {
  return {const_cast<T*>(data), queries * row, row, 1, kType<T>};
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
    g.grad_key = {x.key, keys * p.features, p.features, 1, kType<T>};
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

// One phase of a step: so many blocks or tasks.
struct Phase {
  int64_t count;
  std::function<void(int64_t t, int64_t part, int64_t begin, int64_t end)> work;
};

constexpr int64_t kMostParts = 64;

// The threads that are worth it for steps of so many multiply-adds, and the parts of a phase.
struct Team {
  explicit Team(int64_t work)
      : threads(std::clamp<int64_t>(work / kStepPerThread, 1, torch::stable::get_num_threads())),
        parts(threads == 1 ? 1 : std::min(kPartsPerThread * threads, kMostParts)) {}

  // Goes through the phases of so many steps, in this order; t is 0, 1, ..., or backward.
  void go(int64_t steps, bool backward, const std::vector<Phase>& phases) const {
    const int64_t each = int64_t(phases.size());
    Chain chain(steps * each, parts);
    const auto work = [&](int64_t number, int64_t part) {
      const Phase& phase = phases[size_t(number % each)];
      const int64_t t = backward ? steps - 1 - number / each : number / each;
      const int64_t begin = phase.count * part / parts, end = phase.count * (part + 1) / parts;
      if (begin < end) phase.work(t, part, begin, end);
    };
    if (threads == 1) return chain.run(0, 1, work);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t member = begin; member < end; ++member) chain.run(member, threads, work);
    });
  }

  int64_t threads, parts;
};

// The matrices as a pass reads them, one after the other in one piece of memory.
template <class T>
class Packed {
 public:
  Packed(const Matrices& m, int64_t values, bool lstm, bool backward)
      : unit(lstm ? kernels_of<T>().lstm : kernels_of<T>().gru), backward_(backward) {
    layers = int64_t(m.w_hidden.size()), size = m.w_hidden[0].size(1), gates = lstm ? 4 : 3;
    values_ = values;
    readout = m.w_readout ? m.w_readout->size(0) : 0;
    const int64_t outer = m.w_outer ? m.w_outer->size(1) : 0;
    takes_vector = m.feeds, takes_context = !(m.after && m.feeds);
    STD_TORCH_CHECK(readout > 0 || !takes_vector, "attnext: there is no output vector to enter the next step");
    STD_TORCH_CHECK(outer == (takes_context ? values : 0) + (takes_vector ? readout : 0), "attnext: w_outer has ",
                    outer, " columns, needs those of what enters the lowest layer");
    for (const Tensor& x : m.w_hidden) {
      check_shape(x, "w_hidden", {gates * size, size});
      held_.push_back(torch::stable::contiguous(x));
      Recurrence<T> r{};
      r.size = size, r.weight = numbers<T>(held_.back(), "w_hidden");
      hidden_.push_back(r);
    }
    STD_TORCH_CHECK(int64_t(m.w_below.size()) == layers - 1, "attnext: w_below must have a matrix a layer above");
    for (const Tensor& x : m.w_below) {
      check_shape(x, "w_below", {gates * size, size});
      below.push_back(matrix(x, 0, size));
    }
    if (takes_context)
      check_shape(*m.w_outer, "w_outer", {gates * size, outer}), context = matrix(*m.w_outer, 0, values);
    if (takes_vector) {
      check_shape(*m.w_outer, "w_outer", {gates * size, outer});
      feed = matrix(*m.w_outer, outer - readout, readout);
    }
    if (readout) {
      check_shape(*m.w_readout, "w_readout", {readout, size + values});
      of_hidden = matrix(*m.w_readout, 0, size), of_context = matrix(*m.w_readout, size, values);
    }
    if (m.w_query) query = matrix(*m.w_query, 0, size);
  }

  int64_t numel() {
    int64_t total = 0;
    each([&](Recurrence<T>&, int64_t n) { total += n; }, [&](Dense<T>&, int64_t n) { total += n; });
    return total;
  }

  // Lies in memory from `at` on; packs unless that was done.
  void place(T* at, bool done) {
    std::vector<std::function<void()>> tasks;
    const auto& k = kernels_of<T>();
    each(
        [&](Recurrence<T>& r, int64_t n) {
          r.packed = at, at += n;
          for (int64_t b = 0; b < unit_blocks() && !done; ++b)
            tasks.push_back([&, b] { (backward_ ? unit.pack_backward : unit.pack)(r, b, b + 1); });
        },
        [&](Dense<T>& m, int64_t n) {
          m.packed = at, at += n;
          for (int64_t b = 0; b < blocks(m) && !done; ++b) tasks.push_back([&, b] { k.pack_dense(m, b, b + 1); });
        });
    parallel(int64_t(tasks.size()), done ? 0 : numel(), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) tasks[size_t(task)]();
    });
  }

  static int64_t blocks(const Dense<T>& m) {
    return (m.columns + kernels_of<T>().dense_block - 1) / kernels_of<T>().dense_block;
  }
  int64_t unit_block() const { return backward_ ? unit.grad_block : unit.block; }
  int64_t unit_blocks() const { return (size + unit_block() - 1) / unit_block(); }
  const T* hidden(int64_t layer) const { return hidden_[size_t(layer)].packed; }
  const T* hidden_weight(int64_t layer) const { return hidden_[size_t(layer)].weight; }

  const RecurrentKernels<T>& unit;
  int64_t layers, size, gates, readout;
  bool takes_context, takes_vector;
  std::vector<Dense<T>> below;
  Dense<T> context{}, feed{}, query{}, of_hidden{}, of_context{};

 private:
  // Columns of a parameter, out = a W^T forward and a W backward.
  Dense<T> matrix(const Tensor& x, int64_t first, int64_t count) const {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && dtype_of(x) == arithmetic_dtype<T>() && first + count <= x.size(1),
                    "attnext: a matrix of the decoder has another size or dtype");
    const T* data = static_cast<const T*>(x.data_ptr()) + first * x.stride(1);
    if (backward_) return {data, x.size(0), count, x.stride(0), x.stride(1), nullptr};
    return {data, count, x.size(0), x.stride(1), x.stride(0), nullptr};
  }

  template <class OfUnits, class OfDense>
  void each(const OfUnits& of_units, const OfDense& of_dense) {
    for (Recurrence<T>& r : hidden_) of_units(r, unit_blocks() * unit_block() * size * gates);
    const auto one = [&](Dense<T>& m) {
      if (m.data) of_dense(m, blocks(m) * kernels_of<T>().dense_block * m.depth);
    };
    for (Dense<T>& m : below) one(m);
    for (Dense<T>* m : {&context, &feed, &query, &of_hidden, &of_context}) one(*m);
  }

  int64_t values_;
  bool backward_;
  std::vector<Recurrence<T>> hidden_;
  Tensors held_;
};

// What both passes have: sizes, matrices, the layers' units.
template <class T>
class Decoder {
 public:
  Decoder(const DecoderInputs& x, bool backward)
      : x(x),
        steps(x.gates.size(0)),
        rows(x.gates.size(1)),
        keys(x.attended.key.size(1)),
        values_row(x.attended.value ? x.attended.value->size(2) : x.attended.key.size(2)),
        values(x.projected ? values_row - added_by_values(x) : values_row),
        batch(x.attended.key.size(0)),
        matrices(x.matrices, values, x.cell.has_value(), backward),
        layers(matrices.layers),
        size(matrices.size),
        sizes_(size_t(steps), rows) {
    const int64_t G = matrices.gates;
    STD_TORCH_CHECK(!x.projected || (values > 0 && !x.matrices.after && !backward),
                    "attnext: projected values are for steps that attend first, without gradients");
    STD_TORCH_CHECK(steps > 0 && batch > 0 && rows % batch == 0, "attnext: the decoder has no step, or no row");
    check_shape(x.gates, "gates", {steps, rows, G * size});
    check_shape(x.hidden, "hidden", {layers, rows, size});
    if (x.cell) check_shape(*x.cell, "cell", {layers, rows, size});
    STD_TORCH_CHECK(x.feeds.has_value() == (matrices.readout > 0) && x.feed.has_value() == matrices.takes_vector,
                    "attnext: the matrix of the output vector needs what inputs add to it, and a first vector");
    if (x.feed) check_shape(*x.feed, "feed", {rows, matrices.readout});
    if (x.feeds) {
      check_shape(*x.feeds, "feeds", {steps, rows, matrices.readout});
      feeds = numbers<T>(*x.feeds, "feeds");
    }
    STD_TORCH_CHECK(x.context.has_value() == (x.matrices.after && matrices.takes_context),
                    "attnext: a first context is what a decoder needs that attends after its step");
    if (x.context) check_shape(*x.context, "context", {rows, values});
    STD_TORCH_CHECK(x.masks.empty() || int64_t(x.masks.size()) == layers - 1, "attnext: masks are of all layers above");
    for (const Tensor& mask : x.masks) check_shape(mask, "masks", {steps, rows, size});
    query_size = x.matrices.w_query ? x.matrices.w_query->size(0) : size;
    if (x.b_query) check_shape(*x.b_query, "b_query", {query_size});
    for (int64_t t = 0; t <= steps; ++t) offsets_.push_back(t * rows);
    make_layers();
    if (x.packed) {
      STD_TORCH_CHECK(x.packed->numel() == matrices.numel(), "attnext: packed is of other matrices");
      matrices.place(numbers<T>(*x.packed, "packed"), true);
    } else {
      matrices.place(scratch.template take<T>(matrices.numel()), false);
    }
    for (int64_t l = 0; l < layers; ++l) of[size_t(l)].packed = const_cast<T*>(matrices.hidden(l));
  }

  // A query of the first step, for the sizes.
  Tensor first_query() {
    const int64_t queries = rows / batch;
    return queries == 1 ? empty({batch, query_size}, arithmetic_dtype<T>())
                        : empty({batch, queries, query_size}, arithmetic_dtype<T>());
  }

  // Multiply-adds of a step's products.
  int64_t work() const {
    const int64_t outer = x.matrices.w_outer ? x.matrices.w_outer->size(1) : 0;
    return rows * (matrices.gates * size * (size * (2 * layers - 1) + outer) + query_size * size +
                   matrices.readout * (size + values));
  }

  Phase product(const Dense<T>& m, std::function<DenseProduct<T>(int64_t t)> at) const {
    return {matrices.blocks(m), [&m, at = std::move(at)](int64_t t, int64_t, int64_t begin, int64_t end) {
              DenseProduct<T> x = at(t);
              x.matrix = &m;
              kernels_of<T>().dense(x, t, begin, end);
            }};
  }

  // The state of a layer after step t, -1 for the first; rows of `hidden_row` numbers.
  struct State {
    const T* data;
    int64_t row;
  };
  State state(int64_t layer, int64_t t) const {
    const Recurrence<T>& r = of[size_t(layer)];
    return t < 0 ? State{r.hidden, size}
                 : State{outputs[size_t(layer)] + t * rows * output_rows[size_t(layer)], output_rows[size_t(layer)]};
  }
  // Columns of projected values before the values themselves.
  static int64_t added_by_values(const DecoderInputs& x) {
    return x.gates.size(2) + (x.matrices.w_readout ? x.matrices.w_readout->size(0) : 0);
  }
  const T* context_fed(int64_t t) const {  // what enters step t
    if (!x.matrices.after) return contexts + t * rows * values;
    return t ? contexts + (t - 1) * rows * values : first_context;
  }
  const T* feed_before(int64_t t) const { return t ? feeds + (t - 1) * rows * matrices.readout : first_feed; }

  const DecoderInputs& x;
  const int64_t steps, rows, keys, values_row, values, batch;
  Scratch scratch;
  Packed<T> matrices;
  const int64_t layers, size;
  int64_t query_size;
  std::vector<Recurrence<T>> of;
  std::vector<T*> outputs;
  std::vector<int64_t> output_rows;
  T *contexts = nullptr, *feeds = nullptr;
  const T *first_context = nullptr, *first_feed = nullptr;

  // The numbers of an input in one piece.
  const T* data(const Tensor& x) {
    held_.push_back(torch::stable::contiguous(x));
    return numbers<T>(held_.back(), "an input");
  }

 private:
  void make_layers() {
    const T* hidden = data(x.hidden);
    const T* cell = x.cell ? data(*x.cell) : nullptr;
    if (x.context) first_context = data(*x.context);
    if (x.feed) first_feed = data(*x.feed);
    STD_TORCH_CHECK((x.b_input.empty() || int64_t(x.b_input.size()) == layers) && x.b_input.size() == x.b_hidden.size(),
                    "attnext: biases are of all layers, or of none");
    for (int64_t l = 0; l < layers; ++l) {
      Recurrence<T> r{};
      r.batch = rows, r.size = size, r.steps = r.after = steps;
      r.padded = round_up(size, std::max(matrices.unit.block, matrices.unit.grad_block));
      r.sizes = sizes_.data(), r.offsets = offsets_.data();
      r.weight = matrices.hidden_weight(l);
      const T *input = nullptr, *recurrent = nullptr;
      if (!x.b_input.empty()) {
        check_shape(x.b_input[size_t(l)], "b_input", {matrices.gates * size});
        check_shape(x.b_hidden[size_t(l)], "b_hidden", {matrices.gates * size});
        input = data(x.b_input[size_t(l)]), recurrent = data(x.b_hidden[size_t(l)]);
      }
      r.bias = biases<T>(scratch, input, recurrent, matrices.gates, size, r.padded);
      r.hidden = hidden + l * rows * size;
      if (cell) r.cell = cell + l * rows * size;
      r.output_row = size;
      of.push_back(r);
    }
  }

  std::vector<int64_t> sizes_, offsets_;
  Tensors held_;
};

// ------------------------------------------------------------------------------------------------------ forward

template <class T>
Tensors forward_as(const DecoderInputs& x, bool need_weights, bool keep) {
  Decoder<T> d(x, false);
  const int32_t dtype = arithmetic_dtype<T>();
  const int64_t N = d.rows, S = d.size, steps = d.steps, L = d.layers, H = d.values, top = L - 1;
  const int64_t G = d.matrices.gates, D = d.query_size, R = d.matrices.readout, V = d.values_row;
  StepAttention<T> attention(x.attended, d.first_query(), false);
  const bool past = attention.step() != nullptr;
  Tensor output = empty({steps, N, S}, dtype), contexts = empty({steps, N, V}, dtype);
  Tensor last_hidden = empty({L, N, S}, dtype), last_cell = empty(x.cell ? Shape{L, N, S} : Shape{0}, dtype);
  Tensor wide = empty(keep || past ? Shape{steps, N, d.keys} : Shape{0}, dtype);
  Tensor weights = empty(need_weights && !past ? Shape{steps, N, d.keys} : Shape{0}, dtype);
  Tensor cumulative = empty(x.attended.cumulative ? Shape{steps, N, d.keys} : Shape{0}, dtype);
  Tensor queries = empty(x.matrices.w_query ? Shape{steps, N, D} : Shape{0}, dtype);
  Tensors results{output, contexts, weights, wide, last_hidden, last_cell, cumulative, queries};
  d.contexts = static_cast<T*>(contexts.data_ptr());
  for (int64_t l = 0; l < L; ++l) {
    Recurrence<T>& r = d.of[size_t(l)];
    Tensor gates = l ? empty({steps, N, G * S}, dtype) : x.gates;
    Tensor inner = empty(keep ? Shape{steps * N, 2 * S} : Shape{0}, dtype);
    r.gates = numbers<T>(gates, "gates");
    if (keep) r.inner = static_cast<T*>(inner.data_ptr());
    if (l == top) {
      r.output = static_cast<T*>(output.data_ptr());
    } else if (keep) {
      r.output = r.inner + S, r.output_row = 2 * S;
    } else {
      r.output = d.scratch.template take<T>(steps * N * S);
    }
    d.outputs.push_back(r.output), d.output_rows.push_back(r.output_row);
    r.last_hidden = static_cast<T*>(last_hidden.data_ptr()) + l * N * S;
    const int64_t row = row_of(r.padded);
    r.states = zeros<T>(d.scratch, 2 * N * row);
    for (int64_t k = 0; k < 2; ++k) copy_rows(r, r.hidden, r.states + k * N * row);
    if (x.cell) {
      r.last_cell = static_cast<T*>(last_cell.data_ptr()) + l * N * S;
      r.cells = zeros<T>(d.scratch, N * row);
      copy_rows(r, r.cell, r.cells);
    }
    results.push_back(gates), results.push_back(inner);
  }
  T* query = static_cast<T*>(queries.data_ptr());
  attention.context = d.contexts, attention.log_sum_exp = d.scratch.template take<T>(N);
  if (weights.numel()) attention.weights = static_cast<T*>(weights.data_ptr());
  if (wide.numel()) attention.wide = static_cast<T*>(wide.data_ptr());
  if (cumulative.numel()) attention.cumulative = static_cast<T*>(cumulative.data_ptr());
  if (x.attended.past) attention.first_past = d.data(*x.attended.past);
  if (x.attended.cumulative) attention.first_cumulative = d.data(*x.attended.cumulative);

  const Team team(d.work() + attention.work());
  const T* b_query = x.b_query ? d.data(*x.b_query) : nullptr;
  T* memories = d.scratch.template take<T>(team.parts * attention.scratch());
  std::vector<Phase> attend;
  const int64_t ahead = x.matrices.after ? 0 : 1;  // the query of step t is the state of t - ahead
  if (x.matrices.w_query)
    attend.push_back(d.product(d.matrices.query, [&](int64_t t) {
      const auto from = d.state(top, t - ahead);
      return DenseProduct<T>{nullptr, from.data, from.row, N, query + t * N * D, D, false, b_query, false, nullptr};
    }));
  attend.push_back({attention.tasks(), [&](int64_t t, int64_t part, int64_t begin, int64_t end) {
                      const auto from = x.matrices.w_query ? typename Decoder<T>::State{query + t * N * D, D}
                                                           : d.state(top, t - ahead);
                      attention.run(t, from.data, from.row, begin, end, memories + part * attention.scratch());
                    }});
  std::vector<Phase> phases;
  if (!x.matrices.after) phases = attend;
  const auto into = [&](int64_t l, int64_t t) { return d.of[size_t(l)].gates + t * N * G * S; };
  // Of projected values, what the contexts have from column `first` on is added to rows of n numbers.
  const auto add_values = [&](int64_t first, int64_t n, std::function<T*(int64_t t)> to) {
    phases.push_back({N, [=, &d](int64_t t, int64_t, int64_t begin, int64_t end) {
                        const T* from = d.contexts + t * N * V + first;
                        for (int64_t b = begin; b < end; ++b)
                          for (int64_t k = 0; k < n; ++k) to(t)[b * n + k] += from[b * V + k];
                      }});
  };
  if (x.projected) {
    add_values(0, G * S, [&](int64_t t) { return into(0, t); });
  } else if (d.matrices.takes_context)
    phases.push_back(d.product(d.matrices.context, [&](int64_t t) {
      return DenseProduct<T>{nullptr, d.context_fed(t), H, N, into(0, t), G * S, true, nullptr, false, nullptr};
    }));
  if (d.matrices.takes_vector)
    phases.push_back(d.product(d.matrices.feed, [&](int64_t t) {
      return DenseProduct<T>{nullptr, d.feed_before(t), R, N, into(0, t), G * S, true, nullptr, false, nullptr};
    }));
  std::vector<const T*> masks;
  for (const Tensor& mask : x.masks) masks.push_back(d.data(mask));
  T* below = d.scratch.template take<T>(x.masks.empty() ? 1 : N * S);
  for (int64_t l = 0; l < L; ++l) {
    if (l > 0 && !masks.empty())
      phases.push_back({N, [&, l](int64_t t, int64_t, int64_t begin, int64_t end) {
                          const auto from = d.state(l - 1, t);
                          const T* mask = masks[size_t(l - 1)] + t * N * S;
                          for (int64_t b = begin; b < end; ++b)
                            for (int64_t k = 0; k < S; ++k)
                              below[b * S + k] = from.data[b * from.row + k] * mask[b * S + k];
                        }});
    if (l > 0)
      phases.push_back(d.product(d.matrices.below[size_t(l - 1)], [&, l](int64_t t) {
        const auto from = masks.empty() ? d.state(l - 1, t) : typename Decoder<T>::State{below, S};
        return DenseProduct<T>{nullptr, from.data, from.row, N, into(l, t), G * S, false, nullptr, false, nullptr};
      }));
    phases.push_back({d.matrices.unit_blocks(), [&, l](int64_t t, int64_t, int64_t begin, int64_t end) {
                        d.matrices.unit.step(d.of[size_t(l)], t, begin, end);
                      }});
  }
  if (x.matrices.after) phases.insert(phases.end(), attend.begin(), attend.end());
  if (R) {
    const auto out = [&](int64_t t) { return d.feeds + t * N * R; };
    if (x.projected) add_values(G * S, R, out);
    phases.push_back(d.product(d.matrices.of_hidden, [&, out](int64_t t) {
      const auto from = d.state(top, t);
      return DenseProduct<T>{nullptr, from.data, from.row, N, out(t), R, true, nullptr, x.projected, nullptr};
    }));
    if (!x.projected)
      phases.push_back(d.product(d.matrices.of_context, [&, out](int64_t t) {
        return DenseProduct<T>{nullptr, d.contexts + t * N * H, H, N, out(t), R, true, nullptr, true, nullptr};
      }));
  }
  team.go(steps, false, phases);
  return results;
}

// ----------------------------------------------------------------------------------------------------- backward

// What comes in for the results, and what the forward pass has kept.
struct Incoming {
  const Optional &output, &contexts, &weights, &hidden, &cell, &feeds;
};
struct Kept {
  const Tensors& results;  // as the forward pass has returned them, gates and inner of each layer last
  const Tensor& operator[](size_t k) const { return results[k]; }
  const Tensor& gates(int64_t layer) const { return results[size_t(8 + 2 * layer)]; }
  const Tensor& inner(int64_t layer) const { return results[size_t(9 + 2 * layer)]; }
};

template <class T>
Tensor copy_or_zeros(const Optional& x, const Shape& shape) {
  Tensor result = empty(shape, arithmetic_dtype<T>());
  if (x) {
    check_shape(*x, "an incoming gradient", shape);
    const Tensor from = torch::stable::contiguous(*x);
    std::memcpy(result.data_ptr(), numbers<T>(from, "an incoming gradient"), size_t(result.numel()) * sizeof(T));
  } else {
    std::memset(result.data_ptr(), 0, size_t(result.numel()) * sizeof(T));
  }
  return result;
}

template <class T>
Tensors backward_as(const DecoderInputs& x, const Incoming& incoming, const Kept& kept) {
  Decoder<T> d(x, true);
  const int32_t dtype = arithmetic_dtype<T>();
  const int64_t N = d.rows, S = d.size, steps = d.steps, L = d.layers, H = d.values, top = L - 1;
  const int64_t G = d.matrices.gates, D = d.query_size, R = d.matrices.readout, Tk = d.keys;
  const bool projects = x.matrices.w_query.has_value();
  STD_TORCH_CHECK(int64_t(kept.results.size()) == 8 + 2 * L, "attnext: not what the forward pass returned");
  check_shape(kept[0], "output", {steps, N, S}), check_shape(kept[1], "contexts", {steps, N, H});
  check_shape(kept[3], "wide", {steps, N, Tk});
  StepAttention<T> attention(x.attended, d.first_query(), true);
  const Step<T>* const seen = attention.step();
  const Problem<T>& p = attention.problem();
  attention.wide = numbers<T>(kept[3], "wide");
  if (x.attended.past) attention.first_past = d.data(*x.attended.past);
  if (x.attended.cumulative) {
    check_shape(kept[6], "cumulative", {steps, N, Tk});
    attention.first_cumulative = d.data(*x.attended.cumulative),
    attention.cumulative = numbers<T>(kept[6], "cumulative");
  }
  if (projects) check_shape(kept[7], "queries", {steps, N, D});
  const T* queries = projects ? numbers<T>(kept[7], "queries") : nullptr;

  // The gradients of all steps.
  Tensor of_top = copy_or_zeros<T>(incoming.output, {steps, N, S});
  Tensor of_context = copy_or_zeros<T>(incoming.contexts, {steps, N, H});
  Tensor of_feed = R ? copy_or_zeros<T>(incoming.feeds, {steps, N, R}) : empty({0}, dtype);
  Tensor of_query = empty({steps, N, D}, dtype), ds = empty(seen ? Shape{0} : Shape{steps, N, Tk}, dtype);
  Tensor taken = empty(!seen || x.attended.dropout_p > 0. ? Shape{steps, N, Tk} : Shape{0}, dtype);
  Tensor grad_hidden = empty({L, N, S}, dtype), grad_cell = empty(x.cell ? Shape{L, N, S} : Shape{0}, dtype);
  Tensor grad_first_context = empty(x.context ? Shape{N, H} : Shape{0}, dtype);
  Tensor grad_first_feed = empty(x.feed ? Shape{N, R} : Shape{0}, dtype), grad_bias = empty({L, 4 * S}, dtype);
  std::memset(grad_bias.data_ptr(), 0, size_t(L * 4 * S) * sizeof(T));
  Tensors results{of_context,         of_feed,         of_query, ds, taken, grad_hidden, grad_cell,
                  grad_first_context, grad_first_feed, grad_bias};
  T *top_grad = static_cast<T*>(of_top.data_ptr()), *context_grad = static_cast<T*>(of_context.data_ptr());
  T *feed_grad = static_cast<T*>(of_feed.data_ptr()), *query_grad = static_cast<T*>(of_query.data_ptr());
  std::vector<T*> output_grads(size_t(L), top_grad);
  Tensors of_layers;
  for (int64_t l = 0; l < L; ++l) {
    Recurrence<T>& r = d.of[size_t(l)];
    check_shape(kept.gates(l), "gates", {steps, N, G * S}), check_shape(kept.inner(l), "inner", {steps * N, 2 * S});
    r.gates = numbers<T>(kept.gates(l), "gates"), r.inner = numbers<T>(kept.inner(l), "inner");
    r.output_row = S;
    if (l < top) output_grads[size_t(l)] = d.scratch.template take<T>(steps * N * S);
    r.grad_output = output_grads[size_t(l)];
    if (incoming.hidden)
      check_shape(*incoming.hidden, "grad_hidden", {L, N, S}),
          r.grad_last_hidden = d.data(*incoming.hidden) + l * N * S;
    if (incoming.cell)
      check_shape(*incoming.cell, "grad_cell", {L, N, S}), r.grad_last_cell = d.data(*incoming.cell) + l * N * S;
    of_layers.push_back(empty({steps * N, 4 * S}, dtype));
    r.grad_gates = static_cast<T*>(of_layers.back().data_ptr());
    of_layers.push_back(empty({steps * N, S}, dtype));
    r.previous = static_cast<T*>(of_layers.back().data_ptr());
    r.grad_bias = static_cast<T*>(grad_bias.data_ptr()) + l * 4 * S;
    r.grad_hidden = static_cast<T*>(grad_hidden.data_ptr()) + l * N * S;
    if (x.cell) r.grad_cell = static_cast<T*>(grad_cell.data_ptr()) + l * N * S;
    r.carried = zeros<T>(d.scratch, N * row_of(r.padded));
    d.outputs.push_back(l == top ? numbers<T>(kept[0], "output") : r.inner + S);
    d.output_rows.push_back(l == top ? S : 2 * S);
  }
  results.insert(results.end(), of_layers.begin(), of_layers.end());

  const Team team(2 * d.work() + 3 * attention.work());
  T* memories = d.scratch.template take<T>(team.parts * attention.backward_scratch());
  typename StepAttention<T>::Gradients g{};
  g.context = context_grad, g.query = query_grad;
  if (incoming.weights)
    check_shape(*incoming.weights, "grad_weights", {steps, N, Tk}), g.weights = d.data(*incoming.weights);
  if (!seen) g.ds = static_cast<T*>(ds.data_ptr());
  if (taken.numel()) g.kept = static_cast<T*>(taken.data_ptr());
  Tensor of_key = empty({0}, dtype);
  const int64_t tasks = attention.backward_tasks();
  StepBackward<T> sums{};
  if (seen) {
    of_key = copy_or_zeros<T>({}, {d.batch, Tk, p.features});
    g.key = static_cast<T*>(of_key.data_ptr());
    const int64_t places = seen->channels * seen->width * seen->padded_filters;
    const int64_t projection = seen->projection ? seen->filter_count * p.padded : 0;
    g.coming = zeros<T>(d.scratch, N * Tk), g.sum_cumulative = zeros<T>(d.scratch, N * Tk);
    for (T*& one : g.of_past) one = zeros<T>(d.scratch, N * Tk);
    g.weight = d.scratch.template take<T>(tasks * p.padded), g.sum_weight = zeros<T>(d.scratch, tasks * p.padded);
    g.filters = d.scratch.template take<T>(tasks * places), g.sum_filters = zeros<T>(d.scratch, tasks * places);
    g.projection = d.scratch.template take<T>(tasks * projection);
    g.sum_projection = zeros<T>(d.scratch, tasks * projection);
    sums.tasks = tasks, sums.grad_weight = g.sum_weight, sums.grad_filters = g.sum_filters;
    sums.grad_projection = g.sum_projection;
  }

  // What goes from a step's query to the state it was made of; before the first step to the first state.
  T* first_extra = zeros<T>(d.scratch, N * S);
  const int64_t ahead = x.matrices.after ? 0 : 1;
  const auto state_grad = [&](int64_t t) { return t < 0 ? first_extra : top_grad + t * N * S; };
  std::vector<Phase> attend;
  attend.push_back(
      {tasks, [&](int64_t t, int64_t part, int64_t begin, int64_t end) {
         const auto from = projects ? typename Decoder<T>::State{queries + t * N * D, D} : d.state(top, t - ahead);
         attention.run_backward(g, t, from.data, from.row, begin, end, memories + part * attention.backward_scratch());
       }});
  if (projects) {
    attend.push_back(d.product(d.matrices.query, [&](int64_t t) {
      return DenseProduct<T>{nullptr, query_grad + t * N * D, D, N, state_grad(t - ahead), S, true, nullptr, false,
                             nullptr};
    }));
  } else {
    attend.push_back({N, [&](int64_t t, int64_t, int64_t begin, int64_t end) {
                        const T* from = query_grad + t * N * S;
                        T* to = state_grad(t - ahead);
                        for (int64_t k = begin * S; k < end * S; ++k) to[k] += from[k];
                      }});
  }
  std::vector<Phase> phases;
  if (R) {
    const T* feeds = d.feeds;
    phases.push_back({N, [=](int64_t t, int64_t, int64_t begin, int64_t end) {
                        for (int64_t k = (t * N + begin) * R; k < (t * N + end) * R; ++k)
                          feed_grad[k] *= T(1) - feeds[k] * feeds[k];
                      }});
    const auto from = [=](int64_t t) { return feed_grad + t * N * R; };
    phases.push_back(d.product(d.matrices.of_hidden, [=](int64_t t) {
      return DenseProduct<T>{nullptr, from(t), R, N, top_grad + t * N * S, S, true, nullptr, false, nullptr};
    }));
    phases.push_back(d.product(d.matrices.of_context, [=](int64_t t) {
      return DenseProduct<T>{nullptr, from(t), R, N, context_grad + t * N * H, H, true, nullptr, false, nullptr};
    }));
  }
  if (x.matrices.after) phases.insert(phases.end(), attend.begin(), attend.end());
  const auto gates = [&](int64_t l, int64_t t) { return d.of[size_t(l)].grad_gates + t * N * 4 * S + (4 - G) * S; };
  std::vector<const T*> masks;
  for (const Tensor& mask : x.masks) masks.push_back(d.data(mask));
  for (int64_t l = top; l >= 0; --l) {
    phases.push_back({d.matrices.unit_blocks(), [&, l](int64_t t, int64_t, int64_t begin, int64_t end) {
                        d.matrices.unit.step_backward(d.of[size_t(l)], t, begin, end);
                      }});
    if (l == 0) break;
    phases.push_back(d.product(d.matrices.below[size_t(l - 1)], [&, l](int64_t t) {
      const T* factor = masks.empty() ? nullptr : masks[size_t(l - 1)] + t * N * S;
      return DenseProduct<T>{nullptr, gates(l, t), 4 * S,   N,     output_grads[size_t(l - 1)] + t * N * S,
                             S,       false,       nullptr, false, factor};
    }));
  }
  if (d.matrices.takes_context) {
    T* first = static_cast<T*>(grad_first_context.data_ptr());
    phases.push_back(d.product(d.matrices.context, [&, first](int64_t t) {
      const bool of_first = x.matrices.after && t == 0;
      T* to = of_first ? first : context_grad + (t - (x.matrices.after ? 1 : 0)) * N * H;
      return DenseProduct<T>{nullptr, gates(0, t), 4 * S, N, to, H, !of_first, nullptr, false, nullptr};
    }));
  }
  if (d.matrices.takes_vector) {
    T* first = static_cast<T*>(grad_first_feed.data_ptr());
    phases.push_back(d.product(d.matrices.feed, [&, first](int64_t t) {
      T* to = t ? feed_grad + (t - 1) * N * R : first;
      return DenseProduct<T>{nullptr, gates(0, t), 4 * S, N, to, R, t > 0, nullptr, false, nullptr};
    }));
  }
  if (!x.matrices.after) phases.insert(phases.end(), attend.begin(), attend.end());
  team.go(steps, true, phases);

  std::vector<Phase> first;
  for (int64_t l = 0; l < L; ++l)
    first.push_back({d.matrices.unit_blocks(), [&, l](int64_t, int64_t, int64_t begin, int64_t end) {
                       d.matrices.unit.step_backward(d.of[size_t(l)], -1, begin, end);
                     }});
  team.go(1, false, first);
  T* of_first = static_cast<T*>(grad_hidden.data_ptr()) + top * N * S;
  for (int64_t k = 0; k < N * S; ++k) of_first[k] += first_extra[k];

  results.push_back(of_key);
  if (!seen) return results;
  Tensor of_weight = empty(Shape(*x.attended.score_weight), dtype),
         of_filters = empty(Shape(*x.attended.filters), dtype);
  Tensor of_projection = empty(x.attended.projection ? Shape(*x.attended.projection) : Shape{0}, dtype);
  write_sums(*seen, sums, of_weight, of_filters, of_projection);
  Tensor of_past = empty(x.attended.past ? Shape{N, Tk} : Shape{0}, dtype);
  Tensor of_cumulative = empty(x.attended.cumulative ? Shape{N, Tk} : Shape{0}, dtype);
  for (int64_t c = 0; c < seen->channels; ++c) {
    const bool cumulative = attention.sees_cumulative(c);
    T* to = static_cast<T*>((cumulative ? of_cumulative : of_past).data_ptr());
    for (int64_t k = 0; k < N * Tk; ++k) to[k] = g.of_past[c][k] + (cumulative ? g.sum_cumulative[k] : T(0));
  }
  for (const Tensor& one : {of_weight, of_filters, of_projection, of_past, of_cumulative}) results.push_back(one);
  return results;
}

template <class T>
Tensor pack_as(const Matrices& m, int64_t values, bool lstm) {
  Packed<T> packed(m, values, lstm, false);
  Tensor result = empty({packed.numel()}, arithmetic_dtype<T>());
  packed.place(static_cast<T*>(result.data_ptr()), false);
  return result;
}

// Before anything is read, what the sizes are taken from.
void check_decoder(const DecoderInputs& x) {
  STD_TORCH_CHECK(type_of(x.gates) == Type::kFloat || type_of(x.gates) == Type::kDouble,
                  "attnext: a decoder takes float32 or float64");
  check_rank(x.gates, "gates", 3), check_rank(x.attended.key, "key", 3);
  if (x.attended.value) check_rank(*x.attended.value, "value", 3);
  if (x.feeds) check_rank(*x.feeds, "feeds", 3);
  STD_TORCH_CHECK(!x.matrices.w_hidden.empty(), "attnext: w_hidden must have a matrix a layer");
  check_rank(x.matrices.w_hidden[0], "w_hidden", 2);
  if (x.matrices.w_outer) check_rank(*x.matrices.w_outer, "w_outer", 2);
  if (x.matrices.w_query) check_rank(*x.matrices.w_query, "w_query", 2);
  if (x.matrices.w_readout) check_rank(*x.matrices.w_readout, "w_readout", 2);
  STD_TORCH_CHECK(x.attended.score >= 0 && x.attended.score <= int64_t(Score::kPast), "attnext: there is no score ",
                  x.attended.score);
  const int64_t slots = x.attended.key.size(1), rows = x.gates.size(1);
  if (x.attended.past) check_shape(*x.attended.past, "past", {rows, slots});
  if (x.attended.cumulative) check_shape(*x.attended.cumulative, "cumulative", {rows, slots});
  if (x.attended.seeds) check_shape(*x.attended.seeds, "seeds", {x.gates.size(0)});
}

}  // namespace

Tensors attentive_decoder(Tensor gates, Optional feeds, Tensors w_hidden, Tensors w_below, Tensors b_input,
                          Tensors b_hidden, Tensors masks, Optional w_outer, Optional w_query, Optional b_query,
                          Optional w_readout, Tensor hidden, Optional cell, Optional context, Optional feed, Tensor key,
                          Optional value, Optional score_weight, Optional exp_key, Optional key_limit, Optional lengths,
                          Optional mask, Optional filters, Optional projection, Optional past, Optional cumulative,
                          Optional seeds, Optional packed, double scale, double dropout_p, int64_t score, int64_t rule,
                          bool after, bool feeds_vector, bool projected, bool need_weights, bool keep) {
  const Matrices matrices{w_hidden, w_below, w_outer, w_query, w_readout, after, feeds_vector};
  const Attended attended{key,        value, score_weight, exp_key, key_limit, lengths,   mask,  filters,
                          projection, past,  cumulative,   seeds,   scale,     dropout_p, score, rule};
  const DecoderInputs x{gates,  feeds, b_input, b_hidden, masks,    b_query, matrices,
                        hidden, cell,  context, feed,     attended, packed,  projected};
  check_decoder(x);
  return is_double(gates) ? forward_as<double>(x, need_weights, keep) : forward_as<float>(x, need_weights, keep);
}

Tensors attentive_decoder_backward(Optional grad_output, Optional grad_contexts, Optional grad_weights,
                                   Optional grad_hidden, Optional grad_cell, Optional grad_feeds, Tensors kept,
                                   Tensor gates, Optional feeds, Tensors w_hidden, Tensors w_below, Tensors b_input,
                                   Tensors b_hidden, Tensors masks, Optional w_outer, Optional w_query,
                                   Optional b_query, Optional w_readout, Tensor hidden, Optional cell, Optional context,
                                   Optional feed, Tensor key, Optional value, Optional score_weight, Optional exp_key,
                                   Optional key_limit, Optional lengths, Optional mask, Optional filters,
                                   Optional projection, Optional past, Optional cumulative, Optional seeds,
                                   double scale, double dropout_p, int64_t score, int64_t rule, bool after,
                                   bool feeds_vector) {
  const Matrices matrices{w_hidden, w_below, w_outer, w_query, w_readout, after, feeds_vector};
  const Attended attended{key,        value, score_weight, exp_key, key_limit, lengths,   mask,  filters,
                          projection, past,  cumulative,   seeds,   scale,     dropout_p, score, rule};
  static const Optional none;
  const DecoderInputs x{gates,  feeds, b_input, b_hidden, masks,    b_query, matrices,
                        hidden, cell,  context, feed,     attended, none,    false};
  const Incoming incoming{grad_output, grad_contexts, grad_weights, grad_hidden, grad_cell, grad_feeds};
  check_decoder(x);
  return is_double(gates) ? backward_as<double>(x, incoming, {kept}) : backward_as<float>(x, incoming, {kept});
}

Tensor attentive_decoder_pack(Tensors w_hidden, Tensors w_below, Optional w_outer, Optional w_query, Optional w_readout,
                              int64_t values, bool lstm, bool after, bool feeds_vector) {
  STD_TORCH_CHECK(!w_hidden.empty() && w_hidden[0].dim() == 2, "attnext: w_hidden must have a matrix a layer");
  const Matrices matrices{w_hidden, w_below, w_outer, w_query, w_readout, after, feeds_vector};
  return is_double(w_hidden[0]) ? pack_as<double>(matrices, values, lstm) : pack_as<float>(matrices, values, lstm);
}

}  // namespace attnext::cpu
