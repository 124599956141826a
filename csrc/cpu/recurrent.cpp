// The CPU operators of a layer of recurrent units.
#include <unistd.h>

#include <array>
#include <tuple>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/recurrence.h"
#include "cpu/team.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

// Multiply-adds of a step that pay for one more thread: it takes a microsecond to meet.
constexpr int64_t kStepPerThread = 1 << 16;
constexpr int64_t kPieces = 8;  // of a product

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

// The parameters of one direction; without biases they are zeros. A reverse direction may not be there at all.
struct Direction {
  const Tensor &w_input, &w_hidden;
  const Optional &b_input, &b_hidden;
};
struct ReverseDirection {
  const Optional &w_input, &w_hidden, &b_input, &b_hidden;
};

// A layer as its operators are given it.
struct LayerInputs {
  const Tensor& x;
  const Tensor& hidden;
  const Optional& cell;
  const Tensor& batch_sizes;
  const Direction& forward;
  const ReverseDirection& reverse;
  bool half;  // factors of products over all steps are rounded to bfloat16

  int64_t directions() const { return reverse.w_hidden ? 2 : 1; }
  Direction of(int64_t d) const {
    return d ? Direction{*reverse.w_input, *reverse.w_hidden, reverse.b_input, reverse.b_hidden} : forward;
  }
};

void check_layer(const LayerInputs& x) {
  check_rank(x.hidden, "hidden", 3);
  check_rank(x.x, "x", 2);
  STD_TORCH_CHECK(type_of(x.x) == Type::kFloat || type_of(x.x) == Type::kDouble,
                  "attnext: a recurrent layer takes float32 or float64");
  STD_TORCH_CHECK(!x.half || type_of(x.x) == Type::kFloat, "attnext: bfloat16 products are for float32");
  STD_TORCH_CHECK(x.reverse.w_input.has_value() == x.reverse.w_hidden.has_value(),
                  "attnext: half of a reverse direction");
  const int64_t D = x.directions(), batch = x.hidden.size(1), size = x.hidden.size(2), rows = (x.cell ? 4 : 3) * size;
  check_shape(x.hidden, "hidden", {D, batch, size});
  STD_TORCH_CHECK(size > 0, "attnext: hidden has no units");
  if (x.cell) check_shape(*x.cell, "cell", {D, batch, size});
  for (int64_t d = 0; d < D; ++d) {
    const Direction one = x.of(d);
    check_shape(one.w_input, "w_input", {rows, x.x.size(1)});
    check_shape(one.w_hidden, "w_hidden", {rows, size});
    if (one.b_input) check_shape(*one.b_input, "b_input", {rows});
    if (one.b_hidden) check_shape(*one.b_hidden, "b_hidden", {rows});
  }
  check_rank(x.batch_sizes, "batch_sizes", 1);
  STD_TORCH_CHECK(x.batch_sizes.is_cpu() && x.batch_sizes.scalar_type() == ScalarType::Long &&
                      x.batch_sizes.is_contiguous() && x.batch_sizes.numel() > 0,
                  "attnext: batch_sizes must be contiguous int64 on the CPU, one at least");
}

// A matrix of numbers in memory, rows and columns any distance apart.
struct View {
  template <class T>
  View(T* data, int64_t rows, int64_t columns, int64_t row)
      : View{reinterpret_cast<char*>(data), rows, columns, row, 1, arithmetic_dtype<T>(), sizeof(T)} {}
  View(char* data, int64_t rows, int64_t columns, int64_t row, int64_t column, int32_t dtype, int64_t bytes)
      : data(data), rows(rows), columns(columns), row(row), column(column), dtype(dtype), bytes(bytes) {}
  View() : View(nullptr, 0, 0, 0, 0, kFloatDtype, 0) {}

  View transposed() const { return {data, columns, rows, column, row, dtype, bytes}; }
  View some_rows(int64_t from, int64_t count) const { return part(from * row, count, columns); }
  View some_columns(int64_t from, int64_t count) const { return part(from * column, rows, count); }
  Tensor tensor() const {
    const std::array<int64_t, 2> sizes{rows, columns}, strides{row, column};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(data, 2, sizes.data(), strides.data(), 0, dtype,
                                                                     aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
  double& at(int64_t i, int64_t j) const { return *reinterpret_cast<double*>(data + (i * row + j * column) * bytes); }

  char* data;
  int64_t rows, columns, row, column;
  int32_t dtype;
  int64_t bytes;  // of a number

 private:
  View part(int64_t from, int64_t some_rows, int64_t some_columns) const {
    return {data + from * bytes, some_rows, some_columns, row, column, dtype, bytes};
  }
};

// out = a b, or out += a b, by the library that torch's products go to.
void multiply_whole(const View& out, const View& a, const View& b, bool adds) {
  const Tensor to = out.tensor(), x = a.tensor(), y = b.tensor();
  STABLE_TORCH_ERROR_CODE_CHECK(adds ? aoti_torch_cpu_addmm_out(to.get(), to.get(), x.get(), y.get(), 1., 1.)
                                     : aoti_torch_cpu_mm_out(to.get(), x.get(), y.get()));
}

// That library's sums of doubles depend on its number of threads: so in pieces, each by one.
void multiply_doubles(const View& out, const View& a, const View& b, bool adds) {
  if (out.rows * out.columns == 1) {
    double sum = adds ? out.at(0, 0) : 0.;
    for (int64_t k = 0; k < a.columns; ++k) sum += a.at(0, k) * b.at(k, 0);
    out.at(0, 0) = sum;
    return;
  }
  const bool by_rows = out.rows > out.columns;
  const int64_t size = by_rows ? out.rows : out.columns, pieces = std::min(kPieces, size);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t from = size * k / pieces, count = size * (k + 1) / pieces - from;
      multiply_whole(by_rows ? out.some_rows(from, count) : out.some_columns(from, count),
                     by_rows ? a.some_rows(from, count) : a, by_rows ? b : b.some_columns(from, count), adds);
    }
  });
}

// Of factors in bfloat16, by the processor's instructions for it, which round the product too; out is of float32.
void multiply_bfloat16(const View& out, const View& a, const View& b, bool adds) {
  const Tensor product = empty({out.rows, out.columns}, kBFloat16Dtype), x = a.tensor(), y = b.tensor();
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(product.get(), x.get(), y.get()));
  const auto* from = static_cast<const torch::headeronly::BFloat16*>(product.data_ptr());
  auto* to = reinterpret_cast<float*>(out.data);
  parallel(out.rows, out.rows * out.columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < out.columns; ++k)
        to[i * out.row + k] = (adds ? to[i * out.row + k] : 0.f) + float(from[i * out.columns + k]);
  });
}

void multiply(const View& out, const View& a, const View& b, bool adds) {
  const auto with = a.dtype == kBFloat16Dtype ? multiply_bfloat16
                    : a.dtype == kFloatDtype  ? multiply_whole
                                              : multiply_doubles;
  with(out, a, b, adds);
}

// A factor of products, in memory of its own where it was rounded.
struct Factor {
  View numbers;
  Optional held;
};

Factor factor_of(const View& x, bool half) {
  if (!half) return {x, std::nullopt};
  const Tensor rounded = torch::stable::to(x.tensor(), ScalarType::BFloat16);
  auto* data = static_cast<char*>(rounded.data_ptr());
  return {{data, x.rows, x.columns, rounded.stride(0), rounded.stride(1), kBFloat16Dtype, 2}, rounded};
}

// The rows [row, row + rows) of a stretch of steps in one direction.
struct Stretch {
  int64_t row, rows;
};

template <class T>
class Layer {
 public:
  explicit Layer(const LayerInputs& inputs)
      : directions(inputs.directions()),
        batch(inputs.hidden.size(1)),
        size(inputs.hidden.size(2)),
        features(inputs.x.size(1)),
        kernels(inputs.cell ? kernels_of<T>().lstm : kernels_of<T>().gru),
        gates(inputs.cell ? 4 : 3),
        steps(inputs.batch_sizes.numel()),
        half(inputs.half) {
    const int64_t* sizes = static_cast<const int64_t*>(inputs.batch_sizes.data_ptr());
    for (int64_t t = 0, last = batch; t < steps; last = sizes[t++]) {
      STD_TORCH_CHECK(sizes[t] > 0 && sizes[t] <= last && (t > 0 || sizes[0] == batch),
                      "attnext: batch_sizes must start with the batch's and not grow");
      offsets_.push_back(rows);
      rows += sizes[t];
    }
    check_shape(inputs.x, "x", {rows, features});
    x = factor_of({data(inputs.x), rows, features, features}, half);
    const T* hidden = data(inputs.hidden);
    const T* cell = inputs.cell ? data(*inputs.cell) : nullptr;
    for (int64_t d = 0; d < directions; ++d) {
      const Direction one = inputs.of(d);
      Recurrence<T>& r = of[d];
      r.batch = batch, r.size = size, r.steps = r.after = steps, r.reverse = d == 1;
      r.padded = round_up(size, std::max(kernels.block, kernels.grad_block));
      r.sizes = sizes, r.offsets = offsets_.data();
      r.weight = data(one.w_hidden);
      w_input[d] = factor_of({data(one.w_input), gates * size, features, features}, half);
      r.bias = biases<T>(scratch, one.b_input ? data(*one.b_input) : nullptr,
                         one.b_hidden ? data(*one.b_hidden) : nullptr, gates, size, r.padded);
      r.hidden = hidden + d * batch * size;
      if (cell) r.cell = cell + d * batch * size;
      r.output_row = directions * size;
    }
  }

  // The numbers of a tensor, in one piece.
  T* data(const Tensor& tensor) {
    STD_TORCH_CHECK(dtype_of(tensor) == arithmetic_dtype<T>(), "attnext: the inputs differ in dtype");
    held_.push_back(torch::stable::contiguous(tensor));
    return static_cast<T*>(held_.back().data_ptr());
  }

  void pack(int64_t block, int64_t lines, void (*kernel)(const Recurrence<T>&, int64_t, int64_t)) {
    block_ = block, blocks_ = (size + block - 1) / block, bytes_ = blocks_ * block * lines * int64_t(sizeof(T));
    for (int64_t d = 0; d < directions; ++d) of[d].packed = scratch.take<T>(blocks_ * block * lines);
    parallel(directions * blocks_, directions * blocks_ * block * lines, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) kernel(of[k / blocks_], k % blocks_, k % blocks_ + 1);
    });
  }

  // Goes through so many steps: step(r, number, begin, end) does blocks of units of one.
  template <class Step>
  void walk(int64_t count, const Step& step) const {
    const int64_t work = directions * batch * gates * size * size;
    const int64_t threads =
        std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), work / kStepPerThread));
    // Each direction to threads of its own, where their caches hold its matrix; or all on one, and then on the other.
    const bool apart = directions * bytes_ / threads <= own_cache();
    const int64_t each = apart ? (threads + directions - 1) / directions : threads;
    const int64_t parts = std::min(blocks_, threads == 1 ? 1 : kPartsPerThread * each);
    Chain chains[2] = {{count, parts}, {count, parts}};
    const auto go = [&](int64_t begin, int64_t end) {
      for (int64_t member = begin; member < end; ++member)
        for (int64_t k = 0; k < directions; ++k) {
          const int64_t d = apart ? (member + k) % directions : k;
          chains[d].run(apart ? member / directions % each : member, each, [&, d](int64_t number, int64_t part) {
            step(of[d], number, blocks_ * part / parts, blocks_ * (part + 1) / parts);
          });
        }
    };
    if (threads == 1) {
      go(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, go);
    }
  }

  // The steps in stretches of so many rows that a product is worth its call, and stays in the caches.
  int64_t stretch_steps() const { return std::max<int64_t>(1, kStretchRows / std::max<int64_t>(batch, 1)); }
  int64_t stretch_rows() const { return std::min(stretch_steps() * batch, rows); }
  Stretch stretch(int64_t d, int64_t begin, int64_t end) const {
    const Recurrence<T>& r = of[d];
    const int64_t first = r.reverse ? end - 1 : begin, last = r.reverse ? begin : end - 1;
    return {r.row_at(first), r.row_at(last) + r.rows_at(last) - r.row_at(first)};
  }

  const int64_t directions, batch, size, features;
  const RecurrentKernels<T>& kernels;
  const int64_t gates, steps;
  const bool half;
  int64_t rows = 0;
  Factor x{};           // (rows, features)
  Factor w_input[2]{};  // (G S, features)
  Recurrence<T> of[2]{};
  Scratch scratch;

 private:
  static constexpr int64_t kStretchRows = 512;

  int64_t block_ = 0, blocks_ = 0, bytes_ = 0;
  std::vector<int64_t> offsets_;
  std::vector<Tensor> held_;
};

template <class T>
LayerResults forward_as(const LayerInputs& inputs, bool keep) {
  Layer<T> layer(inputs);
  const int32_t dtype = arithmetic_dtype<T>();
  const int64_t D = layer.directions, B = layer.batch, S = layer.size, N = layer.rows, G = layer.gates;
  Tensor output = empty({N, D * S}, dtype), last_hidden = empty({D, B, S}, dtype);
  Tensor last_cell = empty(inputs.cell ? Shape{D, B, S} : Shape{0}, dtype);
  // Apart, as what is freed in pieces of up to 32 MiB is soon used again.
  Tensor gates[] = {empty(keep ? Shape{N, G * S} : Shape{0}, dtype),
                    empty(keep && D == 2 ? Shape{N, G * S} : Shape{0}, dtype)};
  Tensor inner = empty(keep ? Shape{D, N, 2 * S} : Shape{0}, dtype);
  const int64_t stretch = layer.stretch_steps();
  for (int64_t d = 0; d < D; ++d) {
    Recurrence<T>& r = layer.of[d];
    const int64_t row = row_of(r.padded);
    r.gates =
        keep ? static_cast<T*>(gates[d].data_ptr()) : layer.scratch.template take<T>(layer.stretch_rows() * G * S);
    r.output = static_cast<T*>(output.data_ptr()) + d * S;
    r.last_hidden = static_cast<T*>(last_hidden.data_ptr()) + d * B * S;
    if (keep) r.inner = static_cast<T*>(inner.data_ptr()) + d * N * 2 * S;
    r.states = zeros<T>(layer.scratch, 2 * B * row);
    for (int64_t k = 0; k < 2; ++k) copy_rows(r, r.hidden, r.states + k * B * row);
    if (!inputs.cell) continue;
    r.last_cell = static_cast<T*>(last_cell.data_ptr()) + d * B * S;
    r.cells = zeros<T>(layer.scratch, B * row);
    copy_rows(r, r.cell, r.cells);
  }
  layer.pack(layer.kernels.block, S * G, layer.kernels.pack);
  for (int64_t begin = 0; begin < layer.steps; begin += stretch) {
    const int64_t end = std::min(begin + stretch, layer.steps);
    for (int64_t d = 0; d < D; ++d) {
      Recurrence<T>& r = layer.of[d];
      const Stretch at = layer.stretch(d, begin, end);
      r.gates_base = keep ? 0 : at.row;
      multiply({r.gates + (at.row - r.gates_base) * G * S, at.rows, G * S, G * S},
               layer.x.numbers.some_rows(at.row, at.rows), layer.w_input[d].numbers.transposed(), false);
    }
    layer.walk(end - begin, [&](const Recurrence<T>& r, int64_t number, int64_t from, int64_t to) {
      layer.kernels.step(r, begin + number, from, to);
    });
  }
  return {output, last_hidden, last_cell, gates[0], gates[1], inner};
}

// What comes in for the results of a layer, and which gradients are asked for: a bit each, of x and then the
// parameters.
struct LayerGradients {
  const Optional &output, &hidden, &cell;
  int64_t wanted;
  bool wants(int64_t k) const { return wanted >> k & 1; }
  bool wants(int64_t direction, int64_t k) const { return wants(1 + 4 * direction + k); }
};

// The gradients of the parameters of one direction.
template <class T>
struct OfDirection {
  OfDirection(const Layer<T>& layer, const LayerGradients& grad, int64_t d, bool there)
      : w_input(made(there && grad.wants(d, 0), {layer.gates * layer.size, layer.features})),
        w_hidden(made(there && grad.wants(d, 1), {layer.gates * layer.size, layer.size})),
        b_input(made(there && grad.wants(d, 2), {layer.gates * layer.size})),
        b_hidden(made(there && grad.wants(d, 3), {layer.gates * layer.size})) {}

  static Tensor made(bool wanted, const Shape& shape) {
    return empty(wanted ? shape : Shape{0}, arithmetic_dtype<T>());
  }

  // Adds the products of a stretch with the gradients of its gates (rows, 4 S). Of a gated unit the state's candidate
  // comes first, and is the matrix' last.
  void add(const Layer<T>& layer, int64_t d, const Stretch& at, const View& grad_gates, bool adds) const {
    const int64_t S = layer.size, G = layer.gates;
    const auto gates = [&](int64_t from, int64_t to) {
      return grad_gates.some_columns(from * S, (to - from) * S).transposed();
    };
    if (w_input.numel())
      multiply({static_cast<T*>(w_input.data_ptr()), G * S, layer.features, layer.features}, gates(4 - G, 4),
               layer.x.numbers.some_rows(at.row, at.rows), adds);
    if (!w_hidden.numel()) return;
    T* out = static_cast<T*>(w_hidden.data_ptr());
    const Factor previous = factor_of({layer.of[d].previous, at.rows, S, S}, layer.half);
    if (G == 4) return multiply({out, 4 * S, S, S}, gates(0, 4), previous.numbers, adds);
    multiply({out, 2 * S, S, S}, gates(1, 3), previous.numbers, adds);
    multiply({out + 2 * S * S, S, S, S}, gates(0, 1), previous.numbers, adds);
  }

  void finish(const Layer<T>& layer, const T* sums) const {
    const int64_t S = layer.size, gated = layer.gates == 3;
    if (b_input.numel()) std::copy(sums + gated * S, sums + 4 * S, static_cast<T*>(b_input.data_ptr()));
    if (!b_hidden.numel()) return;
    T* out = static_cast<T*>(b_hidden.data_ptr());
    std::copy(sums + gated * S, sums + (gated ? 3 : 4) * S, out);
    if (gated) std::copy(sums, sums + S, out + 2 * S);
  }

  Tensor w_input, w_hidden, b_input, b_hidden;
};

template <class T>
LayerBackward backward_as(const LayerGradients& grad, const LayerInputs& inputs, const Tensor& gates,
                          const Tensor& reverse_gates, const Tensor& inner) {
  Layer<T> layer(inputs);
  const int32_t dtype = arithmetic_dtype<T>();
  const int64_t D = layer.directions, B = layer.batch, S = layer.size, N = layer.rows, F = layer.features;
  check_shape(gates, "gates", {N, layer.gates * S});
  if (D == 2) check_shape(reverse_gates, "reverse_gates", {N, layer.gates * S});
  check_shape(inner, "inner", {D, N, 2 * S});
  if (grad.output) check_shape(*grad.output, "grad_output", {N, D * S});
  if (grad.hidden) check_shape(*grad.hidden, "grad_hidden", {D, B, S});
  if (grad.cell) check_shape(*grad.cell, "grad_cell", {D, B, S});
  Tensor grad_hidden = empty({D, B, S}, dtype), grad_cell = empty(inputs.cell ? Shape{D, B, S} : Shape{0}, dtype);
  Tensor grad_x = empty(grad.wants(0) ? Shape{N, F} : Shape{0}, dtype);
  if (grad.wants(0) && D == 2) std::memset(grad_x.data_ptr(), 0, size_t(N * F) * sizeof(T));
  const OfDirection<T> sums[] = {{layer, grad, 0, true}, {layer, grad, 1, D == 2}};
  const int64_t stretch = layer.stretch_steps();
  T* kept = layer.data(inner);
  const T* of_output = grad.output ? layer.data(*grad.output) : nullptr;
  const T* of_hidden = grad.hidden ? layer.data(*grad.hidden) : nullptr;
  const T* of_cell = grad.cell ? layer.data(*grad.cell) : nullptr;
  T* buffers[2][2];
  for (int64_t d = 0; d < D; ++d) {
    Recurrence<T>& r = layer.of[d];
    r.gates = layer.data(d ? reverse_gates : gates);
    r.inner = kept + d * N * 2 * S;
    if (of_output) r.grad_output = of_output + d * S;
    if (of_hidden) r.grad_last_hidden = of_hidden + d * B * S;
    if (of_cell) r.grad_last_cell = of_cell + d * B * S;
    for (T*& buffer : buffers[d]) buffer = layer.scratch.template take<T>(layer.stretch_rows() * 4 * S);
    r.previous = layer.scratch.template take<T>(layer.stretch_rows() * S);
    r.grad_bias = zeros<T>(layer.scratch, 4 * S);
    r.grad_hidden = static_cast<T*>(grad_hidden.data_ptr()) + d * B * S;
    if (inputs.cell) r.grad_cell = static_cast<T*>(grad_cell.data_ptr()) + d * B * S;
    r.carried = zeros<T>(layer.scratch, B * row_of(r.padded));
  }
  layer.pack(layer.kernels.grad_block, S * layer.gates, layer.kernels.pack_backward);
  for (int64_t end = layer.steps, k = 0; end > 0; end -= stretch, ++k) {
    const int64_t begin = std::max<int64_t>(end - stretch, 0);
    for (int64_t d = 0; d < D; ++d) {
      Recurrence<T>& r = layer.of[d];
      r.grad_gates_after = r.grad_gates, r.grad_base_after = r.grad_base, r.after = end;
      r.grad_gates = buffers[d][k % 2], r.grad_base = layer.stretch(d, begin, end).row;
    }
    layer.walk(end - begin + (begin == 0), [&](const Recurrence<T>& r, int64_t number, int64_t from, int64_t to) {
      layer.kernels.step_backward(r, end - 1 - number, from, to);
    });
    for (int64_t d = 0; d < D; ++d) {
      const Stretch at = layer.stretch(d, begin, end);
      const Factor of_gates = factor_of({layer.of[d].grad_gates, at.rows, 4 * S, 4 * S}, layer.half);
      sums[d].add(layer, d, at, of_gates.numbers, k > 0);
      if (grad.wants(0))
        multiply({static_cast<T*>(grad_x.data_ptr()) + at.row * F, at.rows, F, F},
                 of_gates.numbers.some_columns((4 - layer.gates) * S, layer.gates * S), layer.w_input[d].numbers,
                 D == 2);
    }
  }
  for (int64_t d = 0; d < D; ++d) sums[d].finish(layer, layer.of[d].grad_bias);
  return {grad_x,           grad_hidden,     grad_cell,        sums[0].w_input, sums[0].w_hidden, sums[0].b_input,
          sums[0].b_hidden, sums[1].w_input, sums[1].w_hidden, sums[1].b_input, sums[1].b_hidden};
}

}  // namespace

LayerResults recurrent_layer(Tensor x, Tensor hidden, Optional cell, Tensor batch_sizes, Tensor w_input,
                             Tensor w_hidden, Optional b_input, Optional b_hidden, Optional reverse_w_input,
                             Optional reverse_w_hidden, Optional reverse_b_input, Optional reverse_b_hidden, bool half,
                             bool keep) {
  const Direction one{w_input, w_hidden, b_input, b_hidden};
  const ReverseDirection other{reverse_w_input, reverse_w_hidden, reverse_b_input, reverse_b_hidden};
  const LayerInputs inputs{x, hidden, cell, batch_sizes, one, other, half};
  check_layer(inputs);
  return dtype_of(x) == kDoubleDtype ? forward_as<double>(inputs, keep) : forward_as<float>(inputs, keep);
}

LayerBackward recurrent_layer_backward(Optional grad_output, Optional grad_hidden, Optional grad_cell, Tensor x,
                                       Tensor hidden, Optional cell, Tensor batch_sizes, Tensor w_input,
                                       Tensor w_hidden, Optional b_input, Optional b_hidden, Optional reverse_w_input,
                                       Optional reverse_w_hidden, Optional reverse_b_input, Optional reverse_b_hidden,
                                       bool half, Tensor gates, Tensor reverse_gates, Tensor inner, int64_t wanted) {
  const Direction one{w_input, w_hidden, b_input, b_hidden};
  const ReverseDirection other{reverse_w_input, reverse_w_hidden, reverse_b_input, reverse_b_hidden};
  const LayerInputs inputs{x, hidden, cell, batch_sizes, one, other, half};
  const LayerGradients grad{grad_output, grad_hidden, grad_cell, wanted};
  check_layer(inputs);
  return dtype_of(x) == kDoubleDtype ? backward_as<double>(grad, inputs, gates, reverse_gates, inner)
                                     : backward_as<float>(grad, inputs, gates, reverse_gates, inner);
}

}  // namespace attnext::cpu
