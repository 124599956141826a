// The CPU operators of a decoder: recurrent layers that attend a memory at every step.
#include "cpu/decoder.h"

#include <cmath>
#include <optional>

namespace attnext::cpu {
namespace {

// ------------------------------------------------------------------------------------------------------ forward

// Where the forward pass has its results; gates and inner states of each layer come last.
enum Result {
  kOutput,
  kContexts,
  kWeights,
  kWide,
  kLastHidden,
  kLastCell,
  kCumulative,
  kQueries,
  kSymbols,
  kScores,
  kResults
};

template <class T>
class ForwardPass {
 public:
  ForwardPass(const DecoderInputs& x, bool need_weights, bool keep)
      : x_(x), d_(x, false), attention_(x.attended, d_.first_query(), false), keep_(keep), top_(d_.layers - 1) {
    const int64_t T_ = d_.steps, N = d_.rows, S = d_.size, keys = d_.keys;
    const bool past = attention_.step() != nullptr;
    result({T_, N, S}), result({T_, N, d_.values_row});
    result(need_weights && !past ? Shape{T_, N, keys} : Shape{0});
    result(keep || past ? Shape{T_, N, keys} : Shape{0});
    result({d_.layers, N, S}), result(x.cell ? Shape{d_.layers, N, S} : Shape{0});
    result(x.attended.cumulative ? Shape{T_, N, keys} : Shape{0});
    result(x.matrices.w_query ? Shape{T_, N, d_.query_size} : Shape{0});
    results_.push_back(empty(chooses() ? Shape{T_, N} : Shape{0}, aoti_torch_dtype_int64()));
    result(chooses() ? Shape{T_, N} : Shape{0});
    for (int64_t l = 0; l < d_.layers; ++l) make_layer(l);
    if (chooses()) take_choices();
    d_.contexts = attention_.context = at(kContexts);
    attention_.log_sum_exp = d_.scratch.template take<T>(N);
    attention_.weights = at(kWeights), attention_.wide = at(kWide), attention_.cumulative = at(kCumulative);
    if (x.attended.past) attention_.first_past = d_.data(*x.attended.past);
    if (x.attended.cumulative) attention_.first_cumulative = d_.data(*x.attended.cumulative);
    if (x.b_query) b_query_ = d_.data(*x.b_query);
    masks_ = d_.masks(), below_ = d_.scratch.template take<T>(masks_.empty() ? 1 : N * S);
  }

  Tensors run() {
    const Team team(d_.work() + attention_.work());
    memories_ = d_.scratch.template take<T>(team.parts * attention_.scratch());
    if (chooses()) take_inputs();
    if (!x_.matrices.after) attend();
    feed();
    for (int64_t l = 0; l < d_.layers; ++l) layer(l);
    if (x_.matrices.after) attend();
    if (d_.matrices.readout) read_out();
    if (chooses()) choose();
    team.go(d_.steps, false, phases_, chooses() ? &open_ : nullptr);
    return results_;
  }

 private:
  using Of = typename Decoder<T>::Of;

  bool chooses() const { return x_.choosing.previous.has_value(); }
  void result(const Shape& shape) { results_.push_back(empty(shape, arithmetic_dtype<T>())); }
  // The numbers of a result, null of one that is not asked for.
  T* at(int64_t k) const {
    const Tensor& x = results_[size_t(k)];
    return x.numel() ? static_cast<T*>(x.data_ptr()) : nullptr;
  }

  void make_layer(int64_t l) {
    const int64_t N = d_.rows, S = d_.size;
    Recurrence<T>& r = d_.of[size_t(l)];
    result(l ? Shape{d_.steps, N, d_.matrices.gates * S} : Shape{0});  // those of the lowest layer are the caller's
    r.gates = l ? at(int64_t(results_.size()) - 1) : numbers<T>(x_.gates, "gates");
    result(keep_ ? Shape{d_.steps * N, 2 * S} : Shape{0});
    r.inner = at(int64_t(results_.size()) - 1);
    if (l == top_) {
      r.output = at(kOutput);
    } else if (keep_) {
      r.output = r.inner + S, r.output_row = 2 * S;
    } else {
      r.output = d_.scratch.template take<T>(d_.steps * N * S);
    }
    d_.outputs.push_back(r.output), d_.output_rows.push_back(r.output_row);
    r.last_hidden = at(kLastHidden) + l * N * S;
    const int64_t row = row_of(r.padded);
    r.states = zeros<T>(d_.scratch, 2 * N * row);
    for (int64_t k = 0; k < 2; ++k) copy_rows(r, r.hidden, r.states + k * N * row);
    if (!x_.cell) return;
    r.last_cell = at(kLastCell) + l * N * S;
    r.cells = zeros<T>(d_.scratch, N * row);
    copy_rows(r, r.cell, r.cells);
  }

  void take_choices() {
    const Choosing& c = x_.choosing;
    const int64_t V = d_.matrices.output.columns, R = d_.matrices.readout;
    STD_TORCH_CHECK(x_.matrices.w_output && c.gates && (R == 0) == !c.feeds && c.first >= 0 && c.first < V,
                    "attnext: to choose symbols needs what they add, the first ones, and one to choose at least");
    check_shape(*c.gates, "table of gates", {V, d_.matrices.gates * d_.size});
    if (c.feeds) check_shape(*c.feeds, "table of output vectors", {V, R}), table_feeds_ = d_.data(*c.feeds);
    if (c.bias) check_shape(*c.bias, "b_output", {V}), b_output_ = d_.data(*c.bias);
    check_shape(*c.previous, "previous", {d_.rows});
    STD_TORCH_CHECK(c.previous->scalar_type() == ScalarType::Long && c.previous->is_contiguous(),
                    "attnext: previous must be contiguous int64");
    previous_ = static_cast<const int64_t*>(c.previous->data_ptr());
    for (int64_t b = 0; b < d_.rows; ++b)
      STD_TORCH_CHECK(previous_[b] >= 0 && previous_[b] < V, "attnext: previous must be numbers of symbols");
    table_gates_ = d_.data(*c.gates), logits_ = d_.scratch.template take<T>(d_.rows * V);
    symbols_ = static_cast<int64_t*>(results_[kSymbols].data_ptr());
    open_ = d_.rows;
    if (c.end < 0) return;
    // What a row has after its end, and of steps that are not made.
    std::fill_n(symbols_, results_[kSymbols].numel(), c.end);
    for (int64_t k : {kScores, kWeights, kWide})
      if (T* to = at(k)) std::fill_n(to, results_[size_t(k)].numel(), T(0));
  }

  // What the symbols of the step before add.
  void take_inputs() {
    phases_.push_back({d_.rows, [this](int64_t t, int64_t, int64_t begin, int64_t end) {
                         const int64_t* symbols = t ? symbols_ + (t - 1) * d_.rows : previous_;
                         const int64_t n = d_.matrices.gates * d_.size, R = d_.matrices.readout;
                         for (int64_t b = begin; b < end; ++b) {
                           std::copy_n(table_gates_ + symbols[b] * n, n, gates(0, t).data + b * n);
                           if (R) std::copy_n(table_feeds_ + symbols[b] * R, R, vector(t).data + b * R);
                         }
                       }});
  }

  void choose() {
    phases_.push_back(d_.product_phase(d_.matrices.output, [this](int64_t t) {
      const Of from = d_.matrices.readout ? vector(t) : d_.state(top_, t);
      DenseProduct<T> p = d_.product(from, {logits_, d_.matrices.output.columns}, false);
      p.bias = b_output_;
      return p;
    }));
    phases_.push_back({d_.rows, [this](int64_t t, int64_t, int64_t begin, int64_t end) {
                         for (int64_t b = begin; b < end; ++b) choose_symbol(t * d_.rows + b, b);
                       }});
  }

  // The first of the largest logits, and its log-probability among those that may be chosen.
  void choose_symbol(int64_t at_row, int64_t b) {
    const int64_t V = d_.matrices.output.columns, last = x_.choosing.end;
    if (last >= 0 && at_row >= d_.rows && symbols_[at_row - d_.rows] == last) return;
    const T* logits = logits_ + b * V;
    int64_t best = x_.choosing.first;
    for (int64_t k = best + 1; k < V; ++k)
      if (logits[k] > logits[best]) best = k;
    double sum = 0;
    for (int64_t k = x_.choosing.first; k < V; ++k) sum += std::exp(double(logits[k]) - double(logits[best]));
    symbols_[at_row] = best, at(kScores)[at_row] = T(-std::log(sum));
    if (best == last) open_.fetch_sub(1, std::memory_order_relaxed);
  }

  Of query(int64_t t) const {
    return x_.matrices.w_query ? d_.of_step(at(kQueries), d_.query_size, t) : d_.state(top_, d_.asking(t));
  }
  Of gates(int64_t l, int64_t t) const { return d_.of_step(d_.of[size_t(l)].gates, d_.matrices.gates * d_.size, t); }
  Of vector(int64_t t) const { return d_.of_step(d_.feeds, d_.matrices.readout, t); }

  void attend() {
    if (x_.matrices.w_query)
      phases_.push_back(d_.product_phase(d_.matrices.query, [this](int64_t t) {
        DenseProduct<T> p = d_.product(d_.state(top_, d_.asking(t)), query(t), false);
        p.bias = b_query_;
        return p;
      }));
    phases_.push_back({attention_.tasks(), [this](int64_t t, int64_t part, int64_t begin, int64_t end) {
                         const Of from = query(t);
                         T* memory = memories_ + part * attention_.scratch();
                         attention_.run(t, from.data, from.row, begin, end, memory);
                       }});
  }

  // What enters the lowest layer beside the inputs.
  void feed() {
    if (x_.projected) {
      add_values(0, [this](int64_t t) { return gates(0, t); });
    } else if (d_.matrices.takes_context) {
      phases_.push_back(d_.product_phase(
          d_.matrices.context, [this](int64_t t) { return d_.product(d_.context_fed(t), gates(0, t), true); }));
    }
    if (d_.matrices.takes_vector)
      phases_.push_back(d_.product_phase(
          d_.matrices.feed, [this](int64_t t) { return d_.product(d_.vector_fed(t), gates(0, t), true); }));
  }

  // Of projected values: adds the columns of the contexts from `first` on to rows.
  void add_values(int64_t first, std::function<Of(int64_t t)> rows) {
    phases_.push_back({d_.rows, [this, first, rows](int64_t t, int64_t, int64_t begin, int64_t end) {
                         const Of to = rows(t);
                         for (int64_t b = begin; b < end; ++b) {
                           const T* from = d_.contexts + (t * d_.rows + b) * d_.values_row + first;
                           for (int64_t k = 0; k < to.row; ++k) to.data[b * to.row + k] += from[k];
                         }
                       }});
  }

  void layer(int64_t l) {
    if (l > 0 && !masks_.empty())
      phases_.push_back({d_.rows, [this, l](int64_t t, int64_t, int64_t begin, int64_t end) {
                           const Of from = d_.state(l - 1, t);
                           const T* mask = masks_[size_t(l - 1)] + t * d_.rows * d_.size;
                           for (int64_t b = begin; b < end; ++b)
                             for (int64_t k = 0; k < d_.size; ++k)
                               below_[b * d_.size + k] = from.data[b * from.row + k] * mask[b * d_.size + k];
                         }});
    if (l > 0)
      phases_.push_back(d_.product_phase(d_.matrices.below[size_t(l - 1)], [this, l](int64_t t) {
        return d_.product(masks_.empty() ? d_.state(l - 1, t) : Of{below_, d_.size}, gates(l, t), false);
      }));
    phases_.push_back(d_.unit_phase(l, d_.matrices.unit.step));
  }

  // The output vector: tanh of what the inputs add, state and context.
  void read_out() {
    if (x_.projected) add_values(d_.matrices.gates * d_.size, [this](int64_t t) { return vector(t); });
    phases_.push_back(d_.product_phase(d_.matrices.of_hidden, [this](int64_t t) {
      DenseProduct<T> p = d_.product(d_.state(top_, t), vector(t), true);
      p.tanh = x_.projected;
      return p;
    }));
    if (x_.projected) return;
    phases_.push_back(d_.product_phase(d_.matrices.of_context, [this](int64_t t) {
      DenseProduct<T> p = d_.product(d_.of_step(d_.contexts, d_.values, t), vector(t), true);
      p.tanh = true;
      return p;
    }));
  }

  const DecoderInputs& x_;
  Decoder<T> d_;
  StepAttention<T> attention_;
  const bool keep_;
  const int64_t top_;
  Tensors results_;
  std::vector<Phase> phases_;
  std::vector<const T*> masks_;
  const T *b_query_ = nullptr, *b_output_ = nullptr, *table_gates_ = nullptr, *table_feeds_ = nullptr;
  const int64_t* previous_ = nullptr;
  int64_t* symbols_ = nullptr;
  std::atomic<int64_t> open_{0};  // rows that have not ended
  T *below_ = nullptr, *memories_ = nullptr, *logits_ = nullptr;
};

// ----------------------------------------------------------------------------------------------------- backward

// What comes in for the results, and what the forward pass has kept.
struct Incoming {
  const Optional &output, &contexts, &weights, &hidden, &cell, &feeds;
};

// A copy that is added to, or zeros.
template <class T>
Tensor copy_or_zeros(const Optional& x, const Shape& shape) {
  Tensor result = empty(shape, arithmetic_dtype<T>());
  if (result.numel() == 0) return result;
  if (x) {
    check_shape(*x, "an incoming gradient", shape);
    const Tensor from = torch::stable::contiguous(*x);
    std::memcpy(result.data_ptr(), numbers<T>(from, "an incoming gradient"), size_t(result.numel()) * sizeof(T));
  } else {
    std::memset(result.data_ptr(), 0, size_t(result.numel()) * sizeof(T));
  }
  return result;
}

// Where the backward pass has its results; of each layer the gradients of gates and the states before come after them,
// then those of a score that sees its past.
enum Gradient {
  kOfContexts,
  kOfFeeds,
  kOfQueries,
  kOfScores,
  kTaken,
  kOfHidden,
  kOfCell,
  kOfContext,
  kOfFeed,
  kOfBiases,
  kGradients
};

template <class T>
class BackwardPass {
 public:
  BackwardPass(const DecoderInputs& x, const Incoming& incoming, const Tensors& kept)
      : x_(x),
        d_(x, true),
        attention_(x.attended, d_.first_query(), true),
        kept_(kept),
        top_(d_.layers - 1),
        of_top_(copy_or_zeros<T>(incoming.output, {d_.steps, d_.rows, d_.size})) {
    take_kept();
    make_results(incoming);
    for (int64_t l = 0; l < d_.layers; ++l) make_layer(l, incoming);
    first_extra_ = zeros<T>(d_.scratch, d_.rows * d_.size);
    masks_ = d_.masks();
    if (attention_.step()) make_sums();
  }

  Tensors run() {
    const Team team(2 * d_.work() + 3 * attention_.work());
    memories_ = d_.scratch.template take<T>(team.parts * attention_.backward_scratch());
    if (d_.matrices.readout) read_out();
    if (x_.matrices.after) attend();
    for (int64_t l = top_; l >= 0; --l) layer(l);
    feed();
    if (!x_.matrices.after) attend();
    team.go(d_.steps, true, phases_);
    finish(team);
    return results_;
  }

 private:
  using Of = typename Decoder<T>::Of;

  // ------------------------------------------------------------------------------------------ before the steps

  void take_kept() {
    const int64_t T_ = d_.steps, N = d_.rows, S = d_.size;
    STD_TORCH_CHECK(int64_t(kept_.size()) == kResults + 2 * d_.layers, "attnext: not what the forward pass returned");
    const auto kept = [&](int64_t k, const char* name, const Shape& shape) {
      check_shape(kept_[size_t(k)], name, shape);
      return numbers<T>(kept_[size_t(k)], name);
    };
    output_ = kept(kOutput, "output", {T_, N, S});
    attention_.wide = kept(kWide, "wide", {T_, N, d_.keys});
    if (x_.matrices.w_query) queries_ = kept(kQueries, "queries", {T_, N, d_.query_size});
    if (x_.attended.past) attention_.first_past = d_.data(*x_.attended.past);
    if (x_.attended.cumulative) {
      attention_.first_cumulative = d_.data(*x_.attended.cumulative);
      attention_.cumulative = kept(kCumulative, "cumulative", {T_, N, d_.keys});
    }
    for (int64_t l = 0; l < d_.layers; ++l) {
      Recurrence<T>& r = d_.of[size_t(l)];
      r.gates = kept(kResults + 2 * l, "gates", {T_, N, d_.matrices.gates * S});
      r.inner = kept(kResults + 2 * l + 1, "inner", {T_ * N, 2 * S});
      d_.outputs.push_back(l == top_ ? output_ : r.inner + S);
      d_.output_rows.push_back(l == top_ ? S : 2 * S);
    }
  }

  void result(const Shape& shape) { results_.push_back(empty(shape, arithmetic_dtype<T>())); }
  T* at(int64_t k) const { return static_cast<T*>(results_[size_t(k)].data_ptr()); }

  void make_results(const Incoming& incoming) {
    const int64_t T_ = d_.steps, N = d_.rows, S = d_.size, L = d_.layers, R = d_.matrices.readout;
    const bool past = attention_.step() != nullptr;
    results_.push_back(copy_or_zeros<T>(incoming.contexts, {T_, N, d_.values}));
    results_.push_back(copy_or_zeros<T>(R ? incoming.feeds : std::nullopt, R ? Shape{T_, N, R} : Shape{0}));
    result({T_, N, d_.query_size}), result(past ? Shape{0} : Shape{T_, N, d_.keys});
    result(past && x_.attended.dropout_p == 0. ? Shape{0} : Shape{T_, N, d_.keys});
    result({L, N, S}), result(x_.cell ? Shape{L, N, S} : Shape{0});
    result(x_.context ? Shape{N, d_.values} : Shape{0}), result(x_.feed ? Shape{N, R} : Shape{0});
    results_.push_back(copy_or_zeros<T>({}, {L, 4 * S}));
    grads_.context = at(kOfContexts), grads_.query = at(kOfQueries);
    if (incoming.weights) {
      check_shape(*incoming.weights, "grad_weights", {T_, N, d_.keys});
      grads_.weights = d_.data(*incoming.weights);
    }
    if (!past) grads_.ds = at(kOfScores);
    if (results_[kTaken].numel()) grads_.kept = at(kTaken);
  }

  void make_layer(int64_t l, const Incoming& incoming) {
    const int64_t N = d_.rows, S = d_.size, L = d_.layers;
    Recurrence<T>& r = d_.of[size_t(l)];
    r.output_row = S;
    output_grads_.push_back(l == top_ ? static_cast<T*>(of_top_.data_ptr())
                                      : d_.scratch.template take<T>(d_.steps * N * S));
    r.grad_output = output_grads_.back();
    if (incoming.hidden) {
      check_shape(*incoming.hidden, "grad_hidden", {L, N, S});
      r.grad_last_hidden = d_.data(*incoming.hidden) + l * N * S;
    }
    if (incoming.cell) {
      check_shape(*incoming.cell, "grad_cell", {L, N, S});
      r.grad_last_cell = d_.data(*incoming.cell) + l * N * S;
    }
    result({d_.steps * N, 4 * S}), result({d_.steps * N, S});
    r.grad_gates = at(kGradients + 2 * l), r.previous = at(kGradients + 2 * l + 1);
    r.grad_bias = at(kOfBiases) + l * 4 * S;
    r.grad_hidden = at(kOfHidden) + l * N * S;
    if (x_.cell) r.grad_cell = at(kOfCell) + l * N * S;
    r.carried = zeros<T>(d_.scratch, N * row_of(r.padded));
  }

  // What a score that sees its past adds up over the steps.
  void make_sums() {
    const Step<T>& s = *attention_.step();
    const Problem<T>& p = attention_.problem();
    const int64_t slots = d_.rows * d_.keys, tasks = attention_.backward_tasks();
    const int64_t places = s.channels * s.width * s.padded_filters;
    const int64_t projection = s.projection ? s.filter_count * p.padded : 0;
    results_.push_back(copy_or_zeros<T>({}, {d_.batch, d_.keys, p.features}));
    grads_.key = static_cast<T*>(results_.back().data_ptr());
    grads_.coming = zeros<T>(d_.scratch, slots), grads_.sum_cumulative = zeros<T>(d_.scratch, slots);
    for (T*& one : grads_.of_past) one = zeros<T>(d_.scratch, slots);
    grads_.weight = d_.scratch.template take<T>(tasks * p.padded);
    grads_.filters = d_.scratch.template take<T>(tasks * places);
    grads_.projection = d_.scratch.template take<T>(tasks * projection);
    grads_.sum_weight = zeros<T>(d_.scratch, tasks * p.padded);
    grads_.sum_filters = zeros<T>(d_.scratch, tasks * places);
    grads_.sum_projection = zeros<T>(d_.scratch, tasks * projection);
  }

  // -------------------------------------------------------------------------------------- the phases of a step

  // The gradient of the topmost state after step t, -1 for the first.
  Of of_state(int64_t t) const {
    return t < 0 ? Of{first_extra_, d_.size} : d_.of_step(output_grads_.back(), d_.size, t);
  }
  Of of_context(int64_t t) const { return d_.of_step(at(kOfContexts), d_.values, t); }
  Of of_vector(int64_t t) const { return d_.of_step(at(kOfFeeds), d_.matrices.readout, t); }
  // Of what inputs add to the gates of a layer.
  Of of_gates(int64_t l, int64_t t) const {
    const int64_t S = d_.size;
    return {d_.of[size_t(l)].grad_gates + t * d_.rows * 4 * S + (4 - d_.matrices.gates) * S, 4 * S};
  }

  void read_out() {
    phases_.push_back({d_.rows, [this](int64_t t, int64_t, int64_t begin, int64_t end) {
                         const int64_t R = d_.matrices.readout;
                         const T* vector = d_.feeds + t * d_.rows * R;
                         const Of grad = of_vector(t);
                         for (int64_t k = begin * R; k < end * R; ++k) grad.data[k] *= T(1) - vector[k] * vector[k];
                       }});
    phases_.push_back(d_.product_phase(d_.matrices.of_hidden,
                                       [this](int64_t t) { return d_.product(of_vector(t), of_state(t), true); }));
    phases_.push_back(d_.product_phase(d_.matrices.of_context,
                                       [this](int64_t t) { return d_.product(of_vector(t), of_context(t), true); }));
  }

  void attend() {
    phases_.push_back({attention_.backward_tasks(), [this](int64_t t, int64_t part, int64_t begin, int64_t end) {
                         const Of from =
                             queries_ ? d_.of_step(queries_, d_.query_size, t) : d_.state(top_, d_.asking(t));
                         T* memory = memories_ + part * attention_.backward_scratch();
                         attention_.run_backward(grads_, t, from.data, from.row, begin, end, memory);
                       }});
    const auto of_query = [this](int64_t t) { return d_.of_step(at(kOfQueries), d_.query_size, t); };
    if (queries_) {
      phases_.push_back(d_.product_phase(d_.matrices.query, [this, of_query](int64_t t) {
        return d_.product(of_query(t), of_state(d_.asking(t)), true);
      }));
      return;
    }
    phases_.push_back({d_.rows, [this, of_query](int64_t t, int64_t, int64_t begin, int64_t end) {
                         const Of from = of_query(t), to = of_state(d_.asking(t));
                         for (int64_t k = begin * d_.size; k < end * d_.size; ++k) to.data[k] += from.data[k];
                       }});
  }

  void layer(int64_t l) {
    phases_.push_back(d_.unit_phase(l, d_.matrices.unit.step_backward));
    if (l == 0) return;
    phases_.push_back(d_.product_phase(d_.matrices.below[size_t(l - 1)], [this, l](int64_t t) {
      const int64_t first = t * d_.rows * d_.size;
      DenseProduct<T> p = d_.product(of_gates(l, t), {output_grads_[size_t(l - 1)] + first, d_.size}, false);
      if (!masks_.empty()) p.factor = masks_[size_t(l - 1)] + first;
      return p;
    }));
  }

  void feed() {
    if (d_.matrices.takes_context)
      phases_.push_back(d_.product_phase(d_.matrices.context, [this](int64_t t) {
        if (!x_.matrices.after) return d_.product(of_gates(0, t), of_context(t), true);
        return d_.product(of_gates(0, t), t ? of_context(t - 1) : Of{at(kOfContext), d_.values}, t > 0);
      }));
    if (d_.matrices.takes_vector)
      phases_.push_back(d_.product_phase(d_.matrices.feed, [this](int64_t t) {
        return d_.product(of_gates(0, t), t ? of_vector(t - 1) : Of{at(kOfFeed), d_.matrices.readout}, t > 0);
      }));
  }

  // ------------------------------------------------------------------------------------------- after the steps

  void finish(const Team& team) {
    std::vector<Phase> first;
    for (int64_t l = 0; l < d_.layers; ++l)
      first.push_back({d_.matrices.unit_blocks(), [this, l](int64_t, int64_t, int64_t begin, int64_t end) {
                         d_.matrices.unit.step_backward(d_.of[size_t(l)], -1, begin, end);
                       }});
    team.go(1, false, first);
    const int64_t numbers = d_.rows * d_.size;
    T* of_first = at(kOfHidden) + top_ * numbers;
    for (int64_t k = 0; k < numbers; ++k) of_first[k] += first_extra_[k];
    if (attention_.step()) finish_sums();
  }

  void finish_sums() {
    const Attended& x = x_.attended;
    const int32_t dtype = arithmetic_dtype<T>();
    const int64_t slots = d_.rows * d_.keys;
    StepBackward<T> sums{};
    sums.tasks = attention_.backward_tasks(), sums.grad_weight = grads_.sum_weight;
    sums.grad_filters = grads_.sum_filters, sums.grad_projection = grads_.sum_projection;
    Tensor weight = empty(Shape(*x.score_weight), dtype), filters = empty(Shape(*x.filters), dtype);
    Tensor projection = empty(x.projection ? Shape(*x.projection) : Shape{0}, dtype);
    write_sums(*attention_.step(), sums, weight, filters, projection);
    Tensor of_past = empty(x.past ? Shape{d_.rows, d_.keys} : Shape{0}, dtype);
    Tensor of_cumulative = empty(x.cumulative ? Shape{d_.rows, d_.keys} : Shape{0}, dtype);
    for (int64_t c = 0; c < attention_.step()->channels; ++c) {
      const bool cumulative = attention_.sees_cumulative(c);
      T* to = static_cast<T*>((cumulative ? of_cumulative : of_past).data_ptr());
      for (int64_t k = 0; k < slots; ++k) to[k] = grads_.of_past[c][k] + (cumulative ? grads_.sum_cumulative[k] : T(0));
    }
    for (const Tensor& one : {weight, filters, projection, of_past, of_cumulative}) results_.push_back(one);
  }

  const DecoderInputs& x_;
  Decoder<T> d_;
  StepAttention<T> attention_;
  const Tensors& kept_;
  const int64_t top_;
  const Tensor of_top_;
  Tensors results_;
  std::vector<Phase> phases_;
  std::vector<const T*> masks_;
  std::vector<T*> output_grads_;
  typename StepAttention<T>::Gradients grads_{};
  T *output_ = nullptr, *queries_ = nullptr, *memories_ = nullptr;
  T* first_extra_ = nullptr;  // what the first query gives to the first state
};

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
                          Optional seeds, Optional packed, Optional w_output, Optional b_output, Optional table_gates,
                          Optional table_feeds, Optional previous, int64_t first_choice, int64_t end_choice,
                          double scale, double dropout_p, int64_t score, int64_t rule, bool after, bool feeds_vector,
                          bool projected, bool need_weights, bool keep) {
  const Matrices matrices{w_hidden, w_below, w_outer, w_query, w_readout, w_output, after, feeds_vector};
  const Attended attended{key,        value, score_weight, exp_key, key_limit, lengths,   mask,  filters,
                          projection, past,  cumulative,   seeds,   scale,     dropout_p, score, rule};
  const Choosing choosing{table_gates, table_feeds, b_output, previous, first_choice, end_choice};
  const DecoderInputs x{gates, feeds,   b_input, b_hidden, masks,  b_query,  matrices, hidden,
                        cell,  context, feed,    attended, packed, choosing, projected};
  check_decoder(x);
  return is_double(gates) ? ForwardPass<double>(x, need_weights, keep).run()
                          : ForwardPass<float>(x, need_weights, keep).run();
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
  static const Optional none;
  const Matrices matrices{w_hidden, w_below, w_outer, w_query, w_readout, none, after, feeds_vector};
  const Attended attended{key,        value, score_weight, exp_key, key_limit, lengths,   mask,  filters,
                          projection, past,  cumulative,   seeds,   scale,     dropout_p, score, rule};
  const Choosing choosing{none, none, none, none, 0, -1};
  const DecoderInputs x{gates, feeds,   b_input, b_hidden, masks, b_query,  matrices, hidden,
                        cell,  context, feed,    attended, none,  choosing, false};
  const Incoming incoming{grad_output, grad_contexts, grad_weights, grad_hidden, grad_cell, grad_feeds};
  check_decoder(x);
  return is_double(gates) ? BackwardPass<double>(x, incoming, kept).run()
                          : BackwardPass<float>(x, incoming, kept).run();
}

Tensor attentive_decoder_pack(Tensors w_hidden, Tensors w_below, Optional w_outer, Optional w_query, Optional w_readout,
                              Optional w_output, int64_t values, bool lstm, bool after, bool feeds_vector) {
  STD_TORCH_CHECK(!w_hidden.empty() && w_hidden[0].dim() == 2, "attnext: w_hidden must have a matrix a layer");
  const Matrices matrices{w_hidden, w_below, w_outer, w_query, w_readout, w_output, after, feeds_vector};
  return is_double(w_hidden[0]) ? pack_as<double>(matrices, values, lstm) : pack_as<float>(matrices, values, lstm);
}

}  // namespace attnext::cpu
