// What the operators of recurrent layers and of decoders have in common.
#pragma once

#include "cpu/tensors.h"

namespace attnext::cpu {

constexpr int64_t kPartsPerThread = 4;

template <class T>
T* zeros(Scratch& scratch, int64_t n) {
  T* x = scratch.take<T>(n);
  std::fill(x, x + n, T(0));
  return x;
}

// (B, S) into padded rows.
template <class T>
void copy_rows(const Recurrence<T>& r, const T* from, T* to) {
  for (int64_t b = 0; b < r.batch; ++b)
    std::copy(from + b * r.size, from + (b + 1) * r.size, to + b * row_of(r.padded));
}

// Sums of the two biases by gate, each of which may be null, but for a gated unit's candidate: the state's, and then
// the input's.
template <class T>
T* biases(Scratch& scratch, const T* of_input, const T* of_hidden, int64_t gates, int64_t size, int64_t padded) {
  T* sums = zeros<T>(scratch, 4 * padded);
  for (const bool input : {false, true})
    for (int64_t g = 0; (input ? of_input : of_hidden) && g < gates; ++g)
      for (int64_t k = 0; k < size; ++k)
        sums[(g + (gates == 3 && g == 2 && input)) * padded + k] += (input ? of_input : of_hidden)[g * size + k];
  return sums;
}

}  // namespace attnext::cpu
