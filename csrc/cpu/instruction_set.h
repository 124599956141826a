// Which instruction set's kernels run: the best that the machine has, or one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "cpu/problem.h"

namespace attnext::cpu {

const InstructionSet& instruction_set();
// Names of those that this machine can run, best first.
std::vector<std::string> instruction_sets();
// Throws std::invalid_argument for one that is unknown or that this machine lacks.
void set_instruction_set(const std::string& name);
// The multiply-adds done in so many rounds of nothing else: what the kernels are measured against.
int64_t multiply_adds(int64_t rounds);

template <class T>
const Kernels<T>& kernels_of();
template <>
inline const Kernels<float>& kernels_of() {
  return instruction_set().of_float;
}
template <>
inline const Kernels<double>& kernels_of() {
  return instruction_set().of_double;
}

}  // namespace attnext::cpu
