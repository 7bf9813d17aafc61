#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/instruction_sets.h"

namespace pg_kernels {

namespace {

constexpr int kMost = 5;

// The compiler's check covers the operating system's part too: whether it saves the wide registers.
int find(const InstructionSet** found) {
  int count = 0;
  const auto add = [&](const InstructionSet* set, bool there) {
    if (set != nullptr && there) found[count++] = set;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool with_avx2 = __builtin_cpu_supports("avx2");
  add(avx512_vnni(), with_avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#if (defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12)
  add(avx_vnni(), with_avx2 && __builtin_cpu_supports("avxvnni"));
#endif
  add(avx2(), with_avx2);
#endif
  add(neon(), true);
  add(scalar(), true);
  return count;
}

}  // namespace

int instruction_sets(const InstructionSet** found, int capacity) {
  const InstructionSet* all[kMost];
  const int count = find(all);
  for (int i = 0; i < count && i < capacity; ++i) found[i] = all[i];
  return count;
}

const InstructionSet& instruction_set() {
  const InstructionSet* all[kMost];
  const int count = find(all);
  const char* wanted = std::getenv("PG_KERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return *all[0];
  std::string known;
  for (int i = 0; i < count; ++i) {
    if (std::string(wanted) == all[i]->name) return *all[i];
    known += (known.empty() ? "" : ", ") + std::string(all[i]->name);
  }
  throw std::invalid_argument("PG_KERNELS_ISA is '" + std::string(wanted) + "'; this CPU has: " + known);
}

}  // namespace pg_kernels
