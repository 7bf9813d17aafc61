// What is compiled for every instruction set, and the choice between them.
#pragma once

#include <cstdint>

namespace pg_kernels {

enum class Float : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Int8Linear;
struct QuantizeInt8;
struct RmsNorm;
struct Geglu;
struct Rotary;
struct Attention;

struct InstructionSet {
  const char* name;
  void (*int8_linear)(const Int8Linear&);
  void (*quantize_int8)(const QuantizeInt8&);
  void (*rms_norm)(const RmsNorm&);
  void (*geglu)(const Geglu&);
  void (*rotary)(const Rotary&);
  void (*attention)(const Attention&);
};

// Null where the compiler could not make it.
const InstructionSet* avx512_vnni();
const InstructionSet* avx_vnni();
const InstructionSet* avx2();
const InstructionSet* neon();
const InstructionSet* scalar();

// The best instruction set of this CPU, or the one that the environment variable PG_KERNELS_ISA names. Throws
// std::invalid_argument when it names none that this CPU has.
const InstructionSet& instruction_set();

// The names of all that this CPU has, the best first, as many as fit; gives their number.
int instruction_sets(const InstructionSet** found, int capacity);

}  // namespace pg_kernels
