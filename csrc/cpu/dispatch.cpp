// The choice between the instruction sets.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/instruction_sets.h"

namespace pg_kernels {

namespace {

constexpr int kMaxSets = 5;

// Lists the instruction sets of this CPU, the best first. __builtin_cpu_supports also checks that the operating system
// saves the wide registers.
int find(const InstructionSet** found) {
  int count = 0;
  const auto add = [&](const InstructionSet* set, bool supported) {
    if (set != nullptr && supported) found[count++] = set;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2");
  add(avx512_vnni(), has_avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#if (defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12)
  add(avx_vnni(), has_avx2 && __builtin_cpu_supports("avxvnni"));
#endif
  add(avx2(), has_avx2);
#endif
  add(neon(), true);
  add(scalar(), true);
  return count;
}

}  // namespace

int instruction_sets(const InstructionSet** found, int capacity) {
  const InstructionSet* all[kMaxSets];
  const int count = find(all);
  for (int i = 0; i < count && i < capacity; ++i) found[i] = all[i];
  return count;
}

const InstructionSet& instruction_set() {
  const InstructionSet* all[kMaxSets];
  const int count = find(all);
  const char* requested = std::getenv("PG_KERNELS_ISA");
  if (requested == nullptr || *requested == '\0') return *all[0];
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (std::string(requested) == all[i]->name) return *all[i];
    known += (known.empty() ? "" : ", ") + std::string(all[i]->name);
  }
  throw std::invalid_argument("PG_KERNELS_ISA is '" + std::string(requested) + "'; this CPU has: " + known);
}

}  // namespace pg_kernels
