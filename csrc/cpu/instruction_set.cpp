#include "cpu/instruction_set.h"

#include <atomic>
#include <stdexcept>

namespace attnext::cpu {
namespace {

const InstructionSet* const kAll[] = {&kV4, &kV3, &kPortable};

const InstructionSet* best() {
  for (const InstructionSet* set : kAll)
    if (set->supported()) return set;
  return &kPortable;
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : kAll)
    if (set->supported()) names.emplace_back(set->name);
  return names;
}

void set_instruction_set(const std::string& name) {
  std::string known;
  for (const InstructionSet* set : kAll) {
    if (!set->supported()) continue;
    if (name == set->name) {
      current().store(set, std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("instruction set must be one that this machine has (" + known + "), got " + name);
}

int64_t multiply_adds(int64_t rounds) { return instruction_set().multiply_adds(rounds); }

}  // namespace attnext::cpu
