// The CPU operators: from tensors to problems, scratch memory and parallel tasks. Shapes and dtypes have been
// checked in Python; what would read or write outside a tensor is checked again here, as compiled graphs come
// straight to this place.
#include "cpu/additive.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/instruction_set.h"
#include "cpu/scratch.h"
#include "ops.h"

namespace attnext::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Backward tasks of one call: a constant, so that results don't depend on the number of threads.
constexpr int64_t kBackwardTasks = 32;
// Score elements below which a second thread costs more than it gives.
constexpr int64_t kElementsPerThread = 1 << 16;

// The dtype as torch numbers it: Tensor::scalar_type() translates it by a dozen calls, and is for errors and rare
// cases.
int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

const int32_t kFloatDtype = aoti_torch_dtype_float32(), kDoubleDtype = aoti_torch_dtype_float64();
const int32_t kHalfDtype = aoti_torch_dtype_float16(), kBFloat16Dtype = aoti_torch_dtype_bfloat16();

Type type_of(const Tensor& x) {
  const int32_t dtype = dtype_of(x);
  if (dtype == kFloatDtype) return Type::kFloat;
  if (dtype == kDoubleDtype) return Type::kDouble;
  if (dtype == kHalfDtype) return Type::kHalf;
  STD_TORCH_CHECK(dtype == kBFloat16Dtype, "attnext: unsupported dtype");
  return Type::kBFloat16;
}

// Up to three sizes.
struct Shape {
  Shape(std::initializer_list<int64_t> list) : rank(int64_t(list.size())) {
    std::copy(list.begin(), list.end(), sizes.begin());
  }
  explicit Shape(const Tensor& x) : rank(x.dim()) {
    for (int64_t k = 0; k < rank; ++k) sizes[k] = x.size(k);
  }
  std::array<int64_t, 3> sizes{};
  int64_t rank;
};

// That of a result: (B, Tq, n), or (B, n) for a query of (B, D).
Shape by_query(const Tensor& query, int64_t n) {
  return query.dim() == 2 ? Shape{query.size(0), n} : Shape{query.size(0), query.size(1), n};
}

// A new contiguous tensor, without the way through the dispatcher, which costs more than a small step.
Tensor empty(const Shape& shape, int32_t dtype) {
  std::array<int64_t, 3> strides;
  int64_t numbers = 1;
  for (int64_t k = shape.rank; k-- > 0; numbers *= std::max<int64_t>(shape.sizes[k], 1)) strides[k] = numbers;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.rank, shape.sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  if (poisoned() && result.numel() > 0) std::memset(result.data_ptr(), 0xff, result.numel() * result.element_size());
  return result;
}

template <class T>
int32_t arithmetic_dtype() {
  return sizeof(T) == 4 ? kFloatDtype : kDoubleDtype;
}

// A tensor of (B, n) is one row for each batch row.
Rows rows_of(const Tensor& x) {
  const bool single = x.dim() == 2;
  return {x.data_ptr(), x.stride(0), single ? 0 : x.stride(1), x.stride(single ? 1 : 2), type_of(x)};
}

Rows rows_of(const Optional& x) { return x ? rows_of(*x) : Rows{}; }

void check_shape(const Tensor& x, const char* name, const Shape& shape) {
  STD_TORCH_CHECK(x.is_cpu(), "attnext: ", name, " is not on the CPU");
  STD_TORCH_CHECK(x.dim() == shape.rank, "attnext: ", name, " has ", x.dim(), " dimensions, needs ", shape.rank);
  for (int64_t k = 0; k < shape.rank; ++k)
    STD_TORCH_CHECK(x.size(k) == shape.sizes[k], "attnext: ", name, " has size ", x.size(k), " in dimension ", k,
                    ", needs ", shape.sizes[k]);
}

void check_rank(const Tensor& x, const char* name, int64_t rank) {
  STD_TORCH_CHECK(x.dim() == rank, "attnext: ", name, " has ", x.dim(), " dimensions, needs ", rank);
}

// The size of rows of exponentials. Before anything is read: the inputs fit together.
int64_t padded_features(const Tensor& query, const Tensor& key, const Tensor* value, const Tensor& score_weight) {
  check_rank(key, "key", 3);
  const int64_t batch = key.size(0), keys = key.size(1), features = key.size(2);
  STD_TORCH_CHECK(query.dim() == 2 || query.dim() == 3, "attnext: query has ", query.dim(),
                  " dimensions, needs 2 or 3");
  STD_TORCH_CHECK(query.size(0) == batch, "attnext: query has batch size ", query.size(0), ", key ", batch);
  check_shape(query, "query", by_query(query, features));
  check_shape(key, "key", {batch, keys, features});
  check_shape(score_weight, "score_weight", {features});
  const int32_t dtype = dtype_of(query);
  bool same = dtype_of(key) == dtype && dtype_of(score_weight) == dtype;
  if (value) {
    check_rank(*value, "value", 3);
    check_shape(*value, "value", {batch, keys, value->size(2)});
    same &= dtype_of(*value) == dtype;
  }
  STD_TORCH_CHECK(same, "attnext: the inputs differ in dtype");
  return round_up(features, kFeatureBlock);
}

// The padded constants that stand for the score weight.
template <class T>
struct Weights {
  Weights(Scratch& scratch, const Tensor& score_weight, double scale, int64_t padded)
      : times(scratch.take<T>(padded)),
        gain(scratch.take<T>(padded)),
        fold(scratch.take<T>(padded)),
        offset(scratch.take<T>(padded)) {
    read(score_weight);
    std::fill(times + score_weight.size(0), times + padded, T(0));
    double total = 0;
    for (int64_t d = 0; d < padded; ++d) {
      const double v = scale * double(times[d]);
      total += v;
      const T w = T(-2 * v);
      times[d] = std::isfinite(w) ? w : std::numeric_limits<T>::quiet_NaN();  // not the score of a hidden slot
      gain[d] = T(4 * v);
      size += std::abs(times[d]);
      if (!(std::abs(times[d]) <= limit) && !std::isnan(limit)) limit = std::abs(times[d]);  // a NaN stays
    }
    sum = T(total);
    fold_features(padded);
  }

  // Weights that together could not move the sum by its rounding become a constant of 1 / unit, which is 0 beside it.
  void fold_features(int64_t padded) {
    constexpr T unit = T(sizeof(T) == 4 ? 0x1p-31 : 0x1p-255);
    const T least = limit / T(padded) * std::numeric_limits<T>::epsilon() / 8;
    T smallest = limit;
    for (int64_t d = 0; d < padded; ++d) {
      const T w = times[d];
      const bool counts = std::abs(w) > least;
      if (counts) smallest = std::min(smallest, std::abs(w));
      fold[d] = counts ? unit * (limit / w) : T(0);
      offset[d] = counts ? fold[d] : 1 / unit;
    }
    const T bits = T(sizeof(T) == 4 ? 61.5 : 509.);
    plain_limit = limit > 0 ? (bits - std::log2(limit / smallest)) * T(0.34657) : bits * T(0.34657);
  }

  void read(const Tensor& x) {
    const Type type = type_of(x);
    if (type == Type::kFloat) return read_as<float>(x);
    if (type == Type::kDouble) return read_as<double>(x);
    if (type == Type::kHalf) return read_as<torch::headeronly::Half>(x);
    read_as<torch::headeronly::BFloat16>(x);
  }

  template <class Stored>
  void read_as(const Tensor& x) {
    const int64_t n = x.size(0), stride = x.stride(0);
    const Stored* data = static_cast<const Stored*>(x.data_ptr());
    for (int64_t d = 0; d < n; ++d) times[d] = T(data[d * stride]);
  }

  T *times, *gain;   // w = -2 scale v, 4 scale v
  T *fold, *offset;  // as in Problem
  T sum;             // scale * sum v
  T limit = 0;       // max |w|
  T size = 0;        // sum |w|
  T plain_limit;
};

Mask mask_of(const Optional& mask, int64_t batch, int64_t queries, int64_t keys) {
  if (!mask) return {};
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "attnext: mask must be bool");
  const bool* data = static_cast<const bool*>(mask->data_ptr());
  if (mask->dim() == 2) {
    check_shape(*mask, "mask", {batch, keys});
    return {data, mask->stride(0), 0, mask->stride(1)};
  }
  check_shape(*mask, "mask", {batch, queries, keys});
  return {data, mask->stride(0), mask->stride(1), mask->stride(2)};
}

const int64_t* lengths_of(const Optional& lengths, int64_t batch, int64_t keys, Optional& keep) {
  if (!lengths) return nullptr;
  STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "attnext: lengths must be int64");
  check_shape(*lengths, "lengths", {batch});
  keep = torch::stable::contiguous(*lengths);
  const int64_t* data = static_cast<const int64_t*>(keep->data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    STD_TORCH_CHECK(data[b] >= 0 && data[b] <= keys, "attnext: lengths must lie between 0 and the number of keys, ",
                    keys, ", got ", data[b]);
  return data;
}

// Runs work(begin, end) over [0, tasks) on torch's threads, on one where the elements are few. Each thread takes the
// next few tasks when it is done with the last: rows differ in length, and cores in what else they have to do.
template <class Work>
void parallel(int64_t tasks, int64_t elements, const Work& work) {
  const int64_t threads = std::min(
      {int64_t(torch::stable::get_num_threads()), tasks, (elements + kElementsPerThread - 1) / kElementsPerThread});
  if (threads < 2) {
    if (tasks > 0) work(0, tasks);
    return;
  }
  const int64_t few = std::max<int64_t>(1, tasks / (16 * threads));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(few); begin < tasks; begin = next.fetch_add(few))
      work(begin, std::min(begin + few, tasks));
  });
}

template <class T>
void exponentials(const Rows& input, int64_t batch, int64_t rows, int64_t features, int64_t padded,
                  const int64_t* lengths, const Mask& mask, T* output, int64_t output_row, T* limit) {
  const Exponentials<T> e{input, batch, rows, features, padded, lengths, mask, output, output_row, limit};
  const auto& kernels = kernels_of<T>();
  parallel(batch * rows, batch * rows * padded,
           [&](int64_t begin, int64_t end) { kernels.exponentials(e, begin, end); });
}

// What forward, backward and scores have in common: the sizes, the score weight, F and who may attend what.
template <class T>
struct Setup {
  Setup(const Tensor& query, const Tensor& key, const Tensor* value, const Tensor& score_weight,
        const Optional& exp_key, const Optional& key_limit, const Optional& lengths, const Optional& mask, double scale)
      : padded(padded_features(query, key, value, score_weight)), weights(scratch, score_weight, scale, padded) {
    const int64_t batch = key.size(0), queries = query.dim() == 2 ? 1 : query.size(1), keys = key.size(1),
                  features = key.size(2);
    problem.batch = batch, problem.queries = queries, problem.keys = keys;
    problem.features = features, problem.padded = padded;
    problem.values = value ? value->size(2) : 0;
    problem.padded_values = round_up(problem.values, kValueBlock);
    problem.query = rows_of(query), problem.key = rows_of(key);
    if (value) problem.value = rows_of(*value);
    problem.weight = weights.times, problem.weight_limit = weights.limit;
    problem.fold = weights.fold, problem.offset = weights.offset, problem.plain_limit = weights.plain_limit;
    problem.lengths = lengths_of(lengths, batch, keys, contiguous_lengths);
    problem.mask = mask_of(mask, batch, queries, keys);
    problem.keep_scale = 1, problem.keep_threshold = 0, problem.seed = 0;
    take_exponentials(exp_key, key_limit);
  }

  // F as it was prepared, or made now.
  void take_exponentials(const Optional& exp_key, const Optional& key_limit) {
    const int64_t rows = problem.batch * problem.keys;
    if (exp_key && key_limit) {
      check_shape(*exp_key, "exp_key", {problem.batch, problem.keys, padded});
      check_shape(*key_limit, "key_limit", {problem.batch, problem.keys});
      const int32_t dtype = arithmetic_dtype<T>();
      STD_TORCH_CHECK(exp_key->is_contiguous() && key_limit->is_contiguous() && dtype_of(*exp_key) == dtype &&
                          dtype_of(*key_limit) == dtype,
                      "attnext: the prepared keys are not as prepare made them");
      problem.exp_key = static_cast<const T*>(exp_key->data_ptr());
      problem.key_limit = static_cast<const T*>(key_limit->data_ptr());
      return;
    }
    T *made_keys = scratch.take<T>(rows * padded), *made_limit = scratch.take<T>(rows);
    const Mask by_key = problem.mask.query == 0 ? problem.mask : Mask{};
    exponentials<T>(problem.key, problem.batch, problem.keys, problem.features, padded, problem.lengths, by_key,
                    made_keys, padded, made_limit);
    problem.exp_key = made_keys, problem.key_limit = made_limit;
  }

  void set_dropout(double dropout_p, const Optional& seed) {
    STD_TORCH_CHECK(dropout_p >= 0. && dropout_p <= 1., "attnext: dropout_p must be between 0 and 1, got ", dropout_p);
    if (dropout_p == 0.) return;
    STD_TORCH_CHECK(seed && seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                    "attnext: dropout needs a seed, one int64 on the CPU");
    problem.seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
    problem.keep_threshold = uint64_t(dropout_p * 0x1p32);
    problem.keep_scale = dropout_p < 1. ? T(1. / (1. - dropout_p)) : T(0);
  }

  int64_t query_tasks() const { return problem.batch * ((problem.queries + kQueryBlock - 1) / kQueryBlock); }
  int64_t elements() const { return problem.batch * problem.queries * problem.keys * (padded + problem.padded_values); }

  Scratch scratch;
  int64_t padded;
  Weights<T> weights;
  Problem<T> problem{};
  Optional contiguous_lengths;
};

template <class T>
std::tuple<Tensor, Tensor> prepare_as(const Tensor& key, const Optional& lengths, const Optional& mask) {
  check_rank(key, "key", 3);
  const int64_t batch = key.size(0), keys = key.size(1), features = key.size(2),
                padded = round_up(features, kFeatureBlock);
  Tensor exp_key = empty({batch, keys, padded}, arithmetic_dtype<T>());
  Tensor limit = empty({batch, keys}, arithmetic_dtype<T>());
  Optional kept;
  STD_TORCH_CHECK(!mask || mask->dim() == 2, "attnext: mask must have 2 dimensions");
  exponentials<T>(rows_of(key), batch, keys, features, padded, lengths_of(lengths, batch, keys, kept),
                  mask_of(mask, batch, 1, keys), static_cast<T*>(exp_key.data_ptr()), padded,
                  static_cast<T*>(limit.data_ptr()));
  return {exp_key, limit};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> attention_as(const Tensor& query, const Tensor& key, const Tensor& value,
                                                const Tensor& score_weight, const Optional& exp_key,
                                                const Optional& key_limit, const Optional& lengths,
                                                const Optional& mask, const Optional& seed, double scale,
                                                double dropout_p, bool need_weights) {
  Setup<T> setup(query, key, &value, score_weight, exp_key, key_limit, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  const Problem<T>& p = setup.problem;
  const int32_t dtype = dtype_of(query);
  Tensor context = empty(by_query(query, p.values), dtype);
  Tensor weights = empty(need_weights ? by_query(query, p.keys) : Shape{0}, dtype);
  Tensor log_sum_exp = empty({p.batch, p.queries}, arithmetic_dtype<T>());
  const Forward<T> f{p, rows_of(context), need_weights ? rows_of(weights) : Rows{},
                     static_cast<T*>(log_sum_exp.data_ptr())};
  const auto& kernels = kernels_of<T>();
  parallel(setup.query_tasks(), setup.elements(), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* memory = scratch.take<T>(forward_scratch(p, need_weights));
    for (int64_t task = begin; task < end; ++task) kernels.forward(f, task, memory);
  });
  return {context, weights, log_sum_exp};
}

template <class T>
Tensor scores_as(const Tensor& query, const Tensor& key, const Tensor& score_weight, const Optional& lengths,
                 const Optional& mask, double scale) {
  Setup<T> setup(query, key, nullptr, score_weight, {}, {}, lengths, mask, scale);
  const Problem<T>& p = setup.problem;
  Tensor result = empty(by_query(query, p.keys), dtype_of(query));
  const Scores<T> s{p, setup.weights.sum, rows_of(result)};
  const auto& kernels = kernels_of<T>();
  parallel(setup.query_tasks(), setup.elements(), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    T* memory = scratch.take<T>(forward_scratch(p, false));
    for (int64_t task = begin; task < end; ++task) kernels.scores(s, task, memory);
  });
  return result;
}

// The backward pass of both: of attention where there is a context, of scores otherwise.
template <class T>
struct Gradients {
  Gradients(Setup<T>& setup, const Tensor& query, const Tensor& key, const Tensor* value, const Tensor& score_weight,
            double scale)
      : setup(setup),
        exp_query(
            setup.scratch.template take<T>((setup.problem.batch * setup.problem.queries + 1) * row_of(setup.padded))),
        query_limit(setup.scratch.template take<T>(setup.problem.batch * setup.problem.queries)),
        grad_query(empty(Shape(query), dtype_of(query))),
        grad_key(empty(Shape(key), dtype_of(key))),
        grad_value(empty(Shape(value ? *value : key), dtype_of(query))),
        grad_weight(empty(Shape(score_weight), dtype_of(score_weight))) {
    const Problem<T>& p = setup.problem;
    g.problem = p;
    // Few batch rows are split by keys, each part with its own sums for the queries, as long as those stay small beside
    // the gradients themselves.
    const int64_t batch = std::max<int64_t>(p.batch, 1), queries = std::max<int64_t>(p.queries, 1);
    const int64_t wanted = std::min((kBackwardTasks + batch - 1) / batch, 4 * (queries + p.keys) / queries);
    const int64_t tiles = std::max<int64_t>(1, (p.keys + kGradKeyTile - 1) / kGradKeyTile);
    const int64_t tiles_each = (tiles + wanted - 1) / wanted;
    g.split_keys = tiles_each * kGradKeyTile;
    g.splits = (tiles + tiles_each - 1) / tiles_each;
    g.scale = T(scale);
    g.gain = setup.weights.gain;
    g.scores_by_tile = !(setup.weights.size <= kSmallWeights);
    exponentials<T>(p.query, p.batch, p.queries, p.features, p.padded, nullptr, {}, exp_query, row_of(p.padded),
                    query_limit);
    g.exp_query = exp_query, g.query_limit = query_limit;
    g.grad_key = rows_of(grad_key);
    if (value) g.grad_value = rows_of(grad_value);
  }

  void run() {
    const Problem<T>& p = g.problem;
    const auto& kernels = kernels_of<T>();
    const int64_t tasks = p.batch * g.splits, rows = p.batch * p.queries;
    g.grad_query = setup.scratch.template take<T>(g.splits * rows * row_of(p.padded));
    g.grad_weight = setup.scratch.template take<T>(tasks * p.padded);
    parallel(tasks, 3 * setup.elements(), [&](int64_t begin, int64_t end) {
      Scratch scratch;
      T* memory = scratch.take<T>(backward_scratch(p));
      for (int64_t task = begin; task < end; ++task) kernels.backward(g, task, memory);
    });
    const Rows out = rows_of(grad_query);
    parallel(rows, rows * p.padded * g.splits, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      kernels.finish_query(g, out, scratch.take<T>(p.padded), begin, end);
    });
    finish_weight(tasks);
  }

  void finish_weight(int64_t tasks) {
    const Problem<T>& p = g.problem;
    for (int64_t d = 0; d < p.features; ++d) {
      double sum = 0;
      for (int64_t task = 0; task < tasks; ++task) sum += double(g.grad_weight[task * p.padded + d]);
      sum *= double(g.scale);
      void* data = grad_weight.data_ptr();
      switch (grad_weight.scalar_type()) {
        case ScalarType::Float:
          static_cast<float*>(data)[d] = float(sum);
          break;
        case ScalarType::Double:
          static_cast<double*>(data)[d] = sum;
          break;
        case ScalarType::Half:
          static_cast<torch::headeronly::Half*>(data)[d] = float(sum);
          break;
        default:
          static_cast<torch::headeronly::BFloat16*>(data)[d] = float(sum);
          break;
      }
    }
  }

  Setup<T>& setup;
  Backward<T> g{};
  T *exp_query, *query_limit;
  Tensor grad_query, grad_key, grad_value, grad_weight;
};

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_as(
    const Optional& grad_context, const Optional& grad_weights, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& score_weight, const Optional& exp_key, const Optional& key_limit,
    const Optional& lengths, const Optional& mask, const Optional& seed, double scale, double dropout_p,
    const Tensor& context, const Tensor& weights, const Tensor& log_sum_exp) {
  Setup<T> setup(query, key, &value, score_weight, exp_key, key_limit, lengths, mask, scale);
  setup.set_dropout(dropout_p, seed);
  const Problem<T>& p = setup.problem;
  check_shape(context, "context", by_query(query, p.values));
  check_shape(log_sum_exp, "log_sum_exp", {p.batch, p.queries});
  STD_TORCH_CHECK(dtype_of(log_sum_exp) == arithmetic_dtype<T>() && log_sum_exp.is_contiguous(),
                  "attnext: log_sum_exp is not as the forward pass made it");
  if (grad_context) check_shape(*grad_context, "grad_context", by_query(query, p.values));
  if (grad_weights) {
    check_shape(*grad_weights, "grad_weights", by_query(query, p.keys));
    check_shape(weights, "weights", by_query(query, p.keys));
  }
  Gradients<T> gradients(setup, query, key, &value, score_weight, scale);
  const int64_t rows = p.batch * p.queries;
  T *padded_grad = setup.scratch.template take<T>(rows * row_of(p.padded_values)),
    *delta = setup.scratch.template take<T>(rows);
  gradients.g.from_scores = false;
  gradients.g.grad_weights = rows_of(grad_weights);
  gradients.g.grad_context = padded_grad;
  gradients.g.log_sum_exp = static_cast<const T*>(log_sum_exp.data_ptr());
  gradients.g.delta = delta;
  const auto& kernels = kernels_of<T>();
  parallel(rows, rows * p.padded_values, [&](int64_t begin, int64_t end) {
    kernels.delta(gradients.g, rows_of(context), rows_of(grad_context), grad_weights ? rows_of(weights) : Rows{},
                  padded_grad, delta, begin, end);
  });
  gradients.run();
  return {gradients.grad_query, gradients.grad_key, gradients.grad_value, gradients.grad_weight};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> scores_backward_as(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                      const Tensor& score_weight, const Optional& lengths,
                                                      const Optional& mask, double scale) {
  Setup<T> setup(query, key, nullptr, score_weight, {}, {}, lengths, mask, scale);
  check_shape(grad, "grad", by_query(query, setup.problem.keys));
  Gradients<T> gradients(setup, query, key, nullptr, score_weight, scale);
  gradients.g.from_scores = true;
  gradients.g.grad_weights = rows_of(grad);
  gradients.run();
  return {gradients.grad_query, gradients.grad_key, gradients.grad_weight};
}

bool is_double(const Tensor& x) { return dtype_of(x) == kDoubleDtype; }

}  // namespace

std::tuple<Tensor, Tensor> additive_prepare(Tensor key, Optional lengths, Optional mask) {
  return is_double(key) ? prepare_as<double>(key, lengths, mask) : prepare_as<float>(key, lengths, mask);
}

std::tuple<Tensor, Tensor, Tensor> additive_attention(Tensor query, Tensor key, Tensor value, Tensor score_weight,
                                                      Optional exp_key, Optional key_limit, Optional lengths,
                                                      Optional mask, Optional seed, double scale, double dropout_p,
                                                      bool need_weights) {
  const auto run = is_double(query) ? attention_as<double> : attention_as<float>;
  return run(query, key, value, score_weight, exp_key, key_limit, lengths, mask, seed, scale, dropout_p, need_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    Optional grad_context, Optional grad_weights, Tensor query, Tensor key, Tensor value, Tensor score_weight,
    Optional exp_key, Optional key_limit, Optional lengths, Optional mask, Optional seed, double scale,
    double dropout_p, Tensor context, Tensor weights, Tensor log_sum_exp) {
  const auto run = is_double(query) ? attention_backward_as<double> : attention_backward_as<float>;
  return run(grad_context, grad_weights, query, key, value, score_weight, exp_key, key_limit, lengths, mask, seed,
             scale, dropout_p, context, weights, log_sum_exp);
}

Tensor additive_scores(Tensor query, Tensor key, Tensor score_weight, Optional lengths, Optional mask, double scale) {
  const auto run = is_double(query) ? scores_as<double> : scores_as<float>;
  return run(query, key, score_weight, lengths, mask, scale);
}

std::tuple<Tensor, Tensor, Tensor> additive_scores_backward(Tensor grad, Tensor query, Tensor key, Tensor score_weight,
                                                            Optional lengths, Optional mask, double scale) {
  const auto run = is_double(query) ? scores_backward_as<double> : scores_backward_as<float>;
  return run(grad, query, key, score_weight, lengths, mask, scale);
}

}  // namespace attnext::cpu
