// The ops that are compiled for every instruction set, and the choice between the sets.
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

// Each returns null if the compiler does not support the instruction set.
const InstructionSet* avx512_vnni();
const InstructionSet* avx_vnni();
const InstructionSet* avx2();
const InstructionSet* neon();
const InstructionSet* scalar();

// Returns the best instruction set of this CPU, or the one named by the environment variable PG_KERNELS_ISA. Throws
// std::invalid_argument if this CPU does not have the one named.
const InstructionSet& instruction_set();

// Lists up to `capacity` instruction sets of this CPU, the best first. Returns how many this CPU has.
int instruction_sets(const InstructionSet** found, int capacity);

}  // namespace pg_kernels
