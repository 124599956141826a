// What both passes of a decoder have: its inputs, the phases of a step, its matrices as they are read, its layers.
//
// Rows are hypotheses, N of them: Q for each of the B sentences of the memory. Tensors of all steps have the steps
// first, (T, N, ...). A step is a sequence of phases, each of which the threads share (team.h): products with packed
// matrices, attention, and layers of units.
#pragma once

#include <functional>
#include <vector>

#include "cpu/recurrence.h"
#include "cpu/step_attention.h"
#include "cpu/team.h"
#include "ops.h"

namespace attnext::cpu {

// The matrices of a decoder, as parameters have them.
struct Matrices {
  const Tensors &w_hidden, &w_below;  // (G S, S): of each layer, and of each but the lowest
  const Optional& w_outer;            // (G S, X): of what enters the lowest layer beside the inputs
  const Optional& w_query;            // (D, S); without, the query is the state
  const Optional& w_readout;          // (R, S + H)
  const Optional& w_output;           // (V, R), or (V, S) without an output vector: of symbols to choose from
  bool after, feeds;  // whether a step attends with its own state; whether its output vector enters the next
};

// How each step chooses the next one's input: the most likely of V symbols from number `first` on. A row that has
// chosen `end`, where that is not negative, has it from then on; when all have, the steps that are left are not made.
struct Choosing {
  const Optional &gates, &feeds;  // (V, G S), (V, R): what each symbol adds as an input
  const Optional& bias;           // (V,), of the logits
  const Optional& previous;       // (N,): of the first step
  int64_t first, end;
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
  const Choosing& choosing;
  bool projected;  // the values are what they add to the lowest layer's gates and to the output vector, and themselves
};

// One phase of a step: so many blocks or tasks.
struct Phase {
  int64_t count;
  std::function<void(int64_t t, int64_t part, int64_t begin, int64_t end)> work;
};

constexpr int64_t kMostParts = 64;
// Multiply-adds of a step that pay for one more thread: it has several phases, after each of which they meet.
constexpr int64_t kDecoderStepPerThread = 1 << 18;

// The threads that are worth it for steps of so many multiply-adds, and the parts of a phase.
struct Team {
  explicit Team(int64_t work)
      : threads(std::clamp<int64_t>(work / kDecoderStepPerThread, 1, torch::stable::get_num_threads())),
        parts(threads == 1 ? 1 : std::min(kPartsPerThread * threads, kMostParts)) {}

  // Goes through the phases of so many steps, in this order; t is 0, 1, ..., or backward. Does nothing once `open` is
  // 0.
  void go(int64_t steps, bool backward, const std::vector<Phase>& phases,
          const std::atomic<int64_t>* open = nullptr) const {
    const int64_t each = int64_t(phases.size());
    Chain chain(steps * each, parts);
    const auto work = [&](int64_t number, int64_t part) {
      const Phase& phase = phases[size_t(number % each)];
      const int64_t t = backward ? steps - 1 - number / each : number / each;
      const int64_t begin = phase.count * part / parts, end = phase.count * (part + 1) / parts;
      if (open && open->load(std::memory_order_relaxed) == 0) return;
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
    if (m.w_query) check_shape(*m.w_query, "w_query", {m.w_query->size(0), size}), query = matrix(*m.w_query, 0, size);
    if (m.w_output) {
      check_shape(*m.w_output, "w_output", {m.w_output->size(0), readout ? readout : size});
      output = matrix(*m.w_output, 0, readout ? readout : size);
    }
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
  Dense<T> context{}, feed{}, query{}, of_hidden{}, of_context{}, output{};

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
    for (Dense<T>* m : {&context, &feed, &query, &of_hidden, &of_context, &output}) one(*m);
  }

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
                   matrices.readout * (size + values) +
                   (x.choosing.previous ? matrices.output.depth * matrices.output.columns : 0));
  }

  // Rows of a step, so many numbers apart.
  struct Of {
    T* data;
    int64_t row;
  };
  // Those of a contiguous (T, N, row).
  Of of_step(T* all, int64_t row, int64_t t) const { return {all + t * rows * row, row}; }

  DenseProduct<T> product(const Of& from, const Of& to, bool adds) const {
    return {nullptr, from.data, from.row, rows, to.data, to.row, adds, nullptr, false, nullptr};
  }
  // A phase that multiplies with a matrix: at(t) says what, and where it goes.
  Phase product_phase(const Dense<T>& m, std::function<DenseProduct<T>(int64_t t)> at) const {
    return {matrices.blocks(m), [&m, at = std::move(at)](int64_t t, int64_t, int64_t begin, int64_t end) {
              DenseProduct<T> x = at(t);
              x.matrix = &m;
              kernels_of<T>().dense(x, t, begin, end);
            }};
  }
  // A phase of the units of a layer.
  Phase unit_phase(int64_t layer, void (*step)(const Recurrence<T>&, int64_t t, int64_t begin, int64_t end)) const {
    return {matrices.unit_blocks(), [this, layer, step](int64_t t, int64_t, int64_t begin, int64_t end) {
              step(of[size_t(layer)], t, begin, end);
            }};
  }

  // The states of a layer after step t, -1 for the first.
  Of state(int64_t layer, int64_t t) const {
    const size_t l = size_t(layer);
    return t < 0 ? Of{const_cast<T*>(of[l].hidden), size} : Of{outputs[l] + t * rows * output_rows[l], output_rows[l]};
  }
  // Columns of projected values before the values themselves.
  static int64_t added_by_values(const DecoderInputs& x) {
    return x.gates.size(2) + (x.matrices.w_readout ? x.matrices.w_readout->size(0) : 0);
  }
  // The context and the output vector that enter step t.
  Of context_fed(int64_t t) const {
    if (!x.matrices.after) return of_step(contexts, values, t);
    return t ? of_step(contexts, values, t - 1) : Of{const_cast<T*>(first_context), values};
  }
  Of vector_fed(int64_t t) const {
    return t ? of_step(feeds, matrices.readout, t - 1) : Of{const_cast<T*>(first_feed), matrices.readout};
  }
  // The step whose state is the query of step t.
  int64_t asking(int64_t t) const { return x.matrices.after ? t : t - 1; }
  std::vector<const T*> masks() {
    std::vector<const T*> found;
    for (const Tensor& mask : x.masks) found.push_back(data(mask));
    return found;
  }

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

}  // namespace attnext::cpu
