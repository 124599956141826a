// Compiles the kernels for the instruction set that the including file names. The target is set for the whole
// file, below the standard headers, and the kernels call no template of the standard library: a function that
// the linker shares between files must not come out of this one with instructions that the machine may lack.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "attnext needs GCC 12 or later, or Clang"
#endif

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/problem.h"

// Vectors are passed between functions of this file alone, so that their calling convention concerns nobody.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__) && ATTNEXT_VECTOR_BYTES > 16
#define ATTNEXT_TARGETED 1
#if defined(__clang__)
#if ATTNEXT_VECTOR_BYTES == 64
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#endif
#elif ATTNEXT_VECTOR_BYTES == 64
#pragma GCC target("arch=x86-64-v4")
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#endif

namespace attnext::cpu {
namespace ATTNEXT_ISA {
namespace {
constexpr int kVectorBytes = ATTNEXT_VECTOR_BYTES, kRegisters = ATTNEXT_REGISTERS;

// clang-format off: each builds on those above it
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/gradients.h"
#include "cpu/dot.h"
#include "cpu/step.h"
#include "cpu/activations.h"
#include "cpu/panels.h"
#include "cpu/recurrent.h"
// clang-format on

template <class T>
constexpr Kernels<T> kernels() {
  return {exponentials<T>,
          forward<T>,
          scores<T>,
          backward<T>,
          delta<T>,
          finish_query<T>,
          dot_forward<T>,
          dot_backward<T>,
          dot_queries<T>,
          step<T>,
          step_backward<T>,
          query_scores<T>,
          query_backward<T>,
          dot_query_backward<T>,
          recurrent_kernels<T, Unit::kGru>(),
          recurrent_kernels<T, Unit::kLstm>(),
          kPanelVectors * kLanes<T>,
          pack_dense<T>,
          dense<T>};
}

bool supported() {
#if defined(ATTNEXT_TARGETED)
  return __builtin_cpu_supports(ATTNEXT_ISA_NAME);
#else
  return ATTNEXT_VECTOR_BYTES == 16;
#endif
}

// Twelve independent sums hide the latency of a multiply-add on every processor so far.
int64_t multiply_adds(int64_t rounds) {
  constexpr int N = 12;
  Vec<float> sum[N];
  for (int n = 0; n < N; ++n) sum[n] = Vec<float>{} + float(n);  // different, or the compiler would make one of them
  for (int64_t k = 0; k < rounds; ++k)
    for (int n = 0; n < N; ++n) sum[n] = sum[n] * 0.5f + 0.25f;
  volatile float kept = 0;
  for (int n = 0; n < N; ++n) kept = kept + sum[n][0];
  return rounds * N * kLanes<float>;
}
}  // namespace
}  // namespace ATTNEXT_ISA

extern const InstructionSet ATTNEXT_ISA_SYMBOL = {ATTNEXT_ISA_NAME, ATTNEXT_ISA::supported, ATTNEXT_ISA::multiply_adds,
                                                  ATTNEXT_ISA::kernels<float>(), ATTNEXT_ISA::kernels<double>()};
}  // namespace attnext::cpu

#if defined(__clang__) && defined(ATTNEXT_TARGETED)
#pragma clang attribute pop
#endif
