// The CPU operators of a layer of recurrent units.
#include <unistd.h>

#include <array>
#include <tuple>
#include <vector>

#include "cpu/tensors.h"
#include "cpu/team.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

// Multiply-adds of a step that pay for one more thread: it takes a microsecond to meet.
constexpr int64_t kStepPerThread = 1 << 16;
constexpr int64_t kPartsPerThread = 4;

// What a core's own cache holds of a matrix, beside what else it reads.
int64_t own_cache() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) return int64_t(size) * 5 / 8;
#endif
    return int64_t(1) << 19;
  }();
  return bytes;
}

// A layer as its operators are given it; what is optional is there for both directions or for none.
struct LayerInputs {
  const Tensor& weight;
  const Optional &bias, &reverse_weight, &reverse_bias;
  const Tensor& hidden;
  const Optional& cell;
  const Tensor& batch_sizes;
};

void check_layer(const LayerInputs& x) {
  check_rank(x.hidden, "hidden", 3);
  const int64_t directions = x.reverse_weight ? 2 : 1, batch = x.hidden.size(1), size = x.hidden.size(2);
  const int64_t rows = (x.cell ? 4 : 3) * size;
  check_shape(x.hidden, "hidden", {directions, batch, size});
  STD_TORCH_CHECK(size > 0, "attnext: hidden has no units");
  if (x.cell) check_shape(*x.cell, "cell", {directions, batch, size});
  check_shape(x.weight, "weight", {rows, size});
  if (x.reverse_weight) check_shape(*x.reverse_weight, "reverse_weight", {rows, size});
  STD_TORCH_CHECK(x.bias.has_value() == x.reverse_bias.has_value() || !x.reverse_weight,
                  "attnext: one direction has a bias, the other none");
  if (x.bias) check_shape(*x.bias, "bias", {rows});
  if (x.reverse_bias) check_shape(*x.reverse_bias, "reverse_bias", {rows});
  check_rank(x.batch_sizes, "batch_sizes", 1);
  STD_TORCH_CHECK(x.batch_sizes.is_cpu() && x.batch_sizes.scalar_type() == ScalarType::Long &&
                      x.batch_sizes.is_contiguous() && x.batch_sizes.numel() > 0,
                  "attnext: batch_sizes must be contiguous int64 on the CPU, one at least");
}

template <class T>
class Layer {
 public:
  explicit Layer(const LayerInputs& x)
      : directions(x.reverse_weight ? 2 : 1), batch(x.hidden.size(1)), size(x.hidden.size(2)),
        kernels(x.cell ? kernels_of<T>().lstm : kernels_of<T>().gru), gates(x.cell ? 4 : 3), steps(x.batch_sizes.numel()) {
    const int64_t* sizes = static_cast<const int64_t*>(x.batch_sizes.data_ptr());
    for (int64_t t = 0, last = batch; t < steps; last = sizes[t++]) {
      STD_TORCH_CHECK(sizes[t] > 0 && sizes[t] <= last && (t > 0 || sizes[0] == batch),
                      "attnext: batch_sizes must start with the batch's and not grow");
      offsets_.push_back(rows);
      rows += sizes[t];
    }
    for (int64_t d = 0; d < directions; ++d) {
      Recurrence<T>& r = of[d];
      r.batch = batch, r.size = size, r.steps = steps, r.reverse = d == 1;
      r.padded = round_up(size, std::max(kernels.block, kernels.grad_block));
      r.sizes = sizes, r.offsets = offsets_.data();
      r.weight = data(d ? *x.reverse_weight : x.weight);
      if (const Optional& bias = d ? x.reverse_bias : x.bias) r.bias = data(*bias);
      r.hidden = data(x.hidden) + d * batch * size;
      if (x.cell) r.cell = data(*x.cell) + d * batch * size;
      r.output_row = directions * size;
    }
  }

  // The numbers of a tensor, in one piece.
  T* data(const Tensor& x) {
    STD_TORCH_CHECK(dtype_of(x) == arithmetic_dtype<T>(), "attnext: the inputs differ in dtype");
    held_.push_back(torch::stable::contiguous(x));
    return static_cast<T*>(held_.back().data_ptr());
  }

  // Packs the matrices by blocks of so many columns, then goes through the steps.
  template <class Step>
  void run(int64_t block, int64_t per_block, void (*pack)(const Recurrence<T>&, int64_t, int64_t), int64_t count,
           const Step& step) {
    const int64_t blocks = (size + block - 1) / block;
    for (int64_t d = 0; d < directions; ++d) of[d].packed = scratch.take<T>(blocks * per_block);
    parallel(directions * blocks, directions * blocks * per_block, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) pack(of[k / blocks], k % blocks, k % blocks + 1);
    });
    const int64_t threads = std::max<int64_t>(
        1, std::min<int64_t>(torch::stable::get_num_threads(), directions * batch * gates * size * size / kStepPerThread));
    // Each direction to threads of its own, where their caches hold its matrix; or all on one, and then on the other.
    const bool apart = directions * blocks * per_block * int64_t(sizeof(T)) / threads <= own_cache();
    const int64_t each = apart ? (threads + directions - 1) / directions : threads;
    const int64_t parts = std::min(blocks, threads == 1 ? 1 : kPartsPerThread * each);
    Chain chains[2] = {{count, parts}, {count, parts}};
    const auto go = [&](int64_t begin, int64_t end) {
      for (int64_t member = begin; member < end; ++member)
        for (int64_t k = 0; k < directions; ++k) {
          const int64_t d = apart ? (member + k) % directions : k;
          chains[d].run(apart ? member / directions % each : member, each, [&, d](int64_t s, int64_t part) {
            step(of[d], s, blocks * part / parts, blocks * (part + 1) / parts);
          });
        }
    };
    if (threads == 1) {
      go(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, go);
    }
  }

  const int64_t directions, batch, size;
  const RecurrentKernels<T>& kernels;
  const int64_t gates, steps;
  int64_t rows = 0;
  Recurrence<T> of[2] = {};
  Scratch scratch;

 private:
  std::vector<int64_t> offsets_;
  std::vector<Tensor> held_;
};

template <class T>
T* zeros(Scratch& scratch, int64_t n) {
  T* x = scratch.take<T>(n);
  std::fill(x, x + n, T(0));
  return x;
}

// (B, S) into padded rows.
template <class T>
void copy_rows(const Recurrence<T>& r, const T* from, T* to) {
  for (int64_t b = 0; b < r.batch; ++b) std::copy(from + b * r.size, from + (b + 1) * r.size, to + b * row_of(r.padded));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_as(const Tensor& gates, const Optional& reverse_gates,
                                                      const LayerInputs& x, bool keep) {
  Layer<T> layer(x);
  const int32_t dtype = arithmetic_dtype<T>();
  const int64_t D = layer.directions, B = layer.batch, S = layer.size, N = layer.rows;
  check_shape(gates, "gates", {N, layer.gates * S});
  STD_TORCH_CHECK(reverse_gates.has_value() == (D == 2), "attnext: gates of one direction, a matrix of the other");
  if (reverse_gates) check_shape(*reverse_gates, "reverse_gates", {N, layer.gates * S});
  Tensor output = empty({N, D * S}, dtype), last_hidden = empty({D, B, S}, dtype);
  Tensor last_cell = empty(x.cell ? Shape{D, B, S} : Shape{0}, dtype);
  Tensor kept = empty(keep ? Shape{D, N, (x.cell ? 5 : 4) * S} : Shape{0}, dtype);
  for (int64_t d = 0; d < D; ++d) {
    Recurrence<T>& r = layer.of[d];
    const int64_t row = row_of(r.padded);
    r.gates = layer.data(d ? *reverse_gates : gates);
    r.output = static_cast<T*>(output.data_ptr()) + d * S;
    r.last_hidden = static_cast<T*>(last_hidden.data_ptr()) + d * B * S;
    if (keep) r.kept = static_cast<T*>(kept.data_ptr()) + d * N * 4 * S;
    r.states = zeros<T>(layer.scratch, 2 * B * row);
    for (int64_t k = 0; k < 2; ++k) copy_rows(r, r.hidden, r.states + k * B * row);
    if (!x.cell) continue;
    if (keep) r.kept = static_cast<T*>(kept.data_ptr()) + d * N * 5 * S;
    r.last_cell = static_cast<T*>(last_cell.data_ptr()) + d * B * S;
    r.cells = zeros<T>(layer.scratch, B * row);
    copy_rows(r, r.cell, r.cells);
  }
  const auto& k = layer.kernels;
  layer.run(k.block, (S + 1) * layer.gates * k.block, k.pack, layer.steps,
            [&](const Recurrence<T>& r, int64_t step, int64_t begin, int64_t end) { k.step(r, step, begin, end); });
  return {output, last_hidden, last_cell, kept};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_as(const Optional& grad_output, const Optional& grad_hidden,
                                                               const Optional& grad_cell, const LayerInputs& x,
                                                               const Tensor& output, const Tensor& kept) {
  Layer<T> layer(x);
  const int32_t dtype = arithmetic_dtype<T>();
  const int64_t D = layer.directions, B = layer.batch, S = layer.size, N = layer.rows, kept_row = (x.cell ? 5 : 4) * S;
  check_shape(output, "output", {N, D * S});
  check_shape(kept, "kept", {D, N, kept_row});
  if (grad_output) check_shape(*grad_output, "grad_output", {N, D * S});
  if (grad_hidden) check_shape(*grad_hidden, "grad_hidden", {D, B, S});
  if (grad_cell) check_shape(*grad_cell, "grad_cell", {D, B, S});
  Tensor grad_gates = empty({D, N, 4 * S}, dtype), previous = empty({D, N, S}, dtype), grad_bias = empty({D, 4 * S}, dtype);
  Tensor grad_first = empty({D, B, S}, dtype), grad_first_cell = empty(x.cell ? Shape{D, B, S} : Shape{0}, dtype);
  for (int64_t d = 0; d < D; ++d) {
    Recurrence<T>& r = layer.of[d];
    r.output = layer.data(output) + d * S;
    r.kept = layer.data(kept) + d * N * kept_row;
    if (grad_output) r.grad_output = layer.data(*grad_output) + d * S;
    if (grad_hidden) r.grad_last_hidden = layer.data(*grad_hidden) + d * B * S;
    if (grad_cell) r.grad_last_cell = layer.data(*grad_cell) + d * B * S;
    r.grad_gates = static_cast<T*>(grad_gates.data_ptr()) + d * N * 4 * S;
    r.previous = static_cast<T*>(previous.data_ptr()) + d * N * S;
    r.grad_bias = static_cast<T*>(grad_bias.data_ptr()) + d * 4 * S;
    std::fill(r.grad_bias, r.grad_bias + 4 * S, T(0));
    r.grad_hidden = static_cast<T*>(grad_first.data_ptr()) + d * B * S;
    if (x.cell) r.grad_cell = static_cast<T*>(grad_first_cell.data_ptr()) + d * B * S;
    r.carried = zeros<T>(layer.scratch, B * row_of(r.padded));
  }
  const auto& k = layer.kernels;
  layer.run(k.grad_block, S * layer.gates * k.grad_block, k.pack_backward, layer.steps + 1,
            [&](const Recurrence<T>& r, int64_t done, int64_t begin, int64_t end) {
              k.step_backward(r, layer.steps - 1 - done, begin, end);
            });
  return {grad_gates, previous, grad_bias, grad_first, grad_first_cell};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> recurrent_layer(Tensor gates, Optional reverse_gates, Tensor weight,
                                                           Optional bias, Optional reverse_weight, Optional reverse_bias,
                                                           Tensor hidden, Optional cell, Tensor batch_sizes, bool keep) {
  const LayerInputs x{weight, bias, reverse_weight, reverse_bias, hidden, cell, batch_sizes};
  check_rank(gates, "gates", 2);
  check_layer(x);
  return dtype_of(gates) == kDoubleDtype ? forward_as<double>(gates, reverse_gates, x, keep)
                                         : forward_as<float>(gates, reverse_gates, x, keep);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_layer_backward(
    Optional grad_output, Optional grad_hidden, Optional grad_cell, Tensor weight, Optional bias, Optional reverse_weight,
    Optional reverse_bias, Tensor hidden, Optional cell, Tensor batch_sizes, Tensor output, Tensor kept) {
  const LayerInputs x{weight, bias, reverse_weight, reverse_bias, hidden, cell, batch_sizes};
  check_layer(x);
  return dtype_of(output) == kDoubleDtype
             ? backward_as<double>(grad_output, grad_hidden, grad_cell, x, output, kept)
             : backward_as<float>(grad_output, grad_hidden, grad_cell, x, output, kept);
}

}  // namespace attnext::cpu
