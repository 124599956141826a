// From tensors to the kernels' addresses, scratch memory and parallel tasks. Shapes and dtypes have been checked in
// Python; what would read or write outside a tensor is checked again here, as compiled graphs come straight to this
// place.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/instruction_set.h"
#include "cpu/problem.h"
#include "cpu/scratch.h"

namespace attnext::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Backward tasks of one call: a constant, so that results don't depend on the number of threads.
constexpr int64_t kBackwardTasks = 32;
// Score elements below which a second thread costs more than it gives.
constexpr int64_t kElementsPerThread = 1 << 16;

// The dtype as torch numbers it: Tensor::scalar_type() translates it by a dozen calls, and is for errors and rare
// cases.
inline int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

inline const int32_t kFloatDtype = aoti_torch_dtype_float32(), kDoubleDtype = aoti_torch_dtype_float64();
inline const int32_t kHalfDtype = aoti_torch_dtype_float16(), kBFloat16Dtype = aoti_torch_dtype_bfloat16();

inline Type type_of(const Tensor& x) {
  const int32_t dtype = dtype_of(x);
  if (dtype == kFloatDtype) return Type::kFloat;
  if (dtype == kDoubleDtype) return Type::kDouble;
  if (dtype == kHalfDtype) return Type::kHalf;
  STD_TORCH_CHECK(dtype == kBFloat16Dtype, "attnext: unsupported dtype");
  return Type::kBFloat16;
}

// Calls f with a number of the type that is stored.
template <class F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kFloat:
      return f(float());
    case Type::kDouble:
      return f(double());
    case Type::kHalf:
      return f(torch::headeronly::Half());
    case Type::kBFloat16:
      return f(torch::headeronly::BFloat16());
  }
}

template <class Stored>
Stored rounded(double x) {
  if constexpr (sizeof(Stored) == 8) return x;
  return Stored(float(x));
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
inline Shape by_query(const Tensor& query, int64_t n) {
  return query.dim() == 2 ? Shape{query.size(0), n} : Shape{query.size(0), query.size(1), n};
}

// A new contiguous tensor, without the way through the dispatcher, which costs more than a small step.
inline Tensor empty(const Shape& shape, int32_t dtype) {
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
inline Rows rows_of(const Tensor& x) {
  const bool single = x.dim() == 2;
  return {x.data_ptr(), x.stride(0), single ? 0 : x.stride(1), x.stride(single ? 1 : 2), type_of(x)};
}

inline Rows rows_of(const Optional& x) { return x ? rows_of(*x) : Rows{}; }

inline void check_shape(const Tensor& x, const char* name, const Shape& shape) {
  STD_TORCH_CHECK(x.is_cpu(), "attnext: ", name, " is not on the CPU");
  STD_TORCH_CHECK(x.dim() == shape.rank, "attnext: ", name, " has ", x.dim(), " dimensions, needs ", shape.rank);
  for (int64_t k = 0; k < shape.rank; ++k)
    STD_TORCH_CHECK(x.size(k) == shape.sizes[k], "attnext: ", name, " has size ", x.size(k), " in dimension ", k,
                    ", needs ", shape.sizes[k]);
}

inline void check_rank(const Tensor& x, const char* name, int64_t rank) {
  STD_TORCH_CHECK(x.dim() == rank, "attnext: ", name, " has ", x.dim(), " dimensions, needs ", rank);
}

inline void check_dtype(const Tensor& x, const Tensor& query) {
  STD_TORCH_CHECK(dtype_of(x) == dtype_of(query), "attnext: the inputs differ in dtype");
}

// Keys and values may be held in a half type beside queries of float32.
inline void check_memory(const Tensor& x, const char* name, const Tensor& query) {
  const int32_t dtype = dtype_of(x), wanted = dtype_of(query);
  const bool held = wanted == kFloatDtype && (dtype == kHalfDtype || dtype == kBFloat16Dtype);
  STD_TORCH_CHECK(dtype == wanted || held, "attnext: ", name, " has neither the query's dtype nor a half type");
}

inline Mask mask_of(const Optional& mask, int64_t batch, int64_t queries, int64_t keys) {
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

inline const int64_t* lengths_of(const Optional& lengths, int64_t batch, int64_t keys, Optional& keep) {
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

}  // namespace attnext::cpu
