// The portable instruction set: C++ that the compiler may vectorise.
#include "cpu/int8_gemm.h"
#include "cpu/token_ops_impl.h"

namespace pg_kernels {

namespace {

struct Scalar {
  using Element = int16_t;
  struct Sum {
    uint32_t of[16];
  };
  struct Weights {
    const uint8_t* at;
  };
  struct Activations {
    int32_t of[4];
  };
  static constexpr bool kBytes = false, kSigned = false;
  static constexpr int kRows = 1;
  static constexpr int vectors(int) { return 1; }

  static Sum zero() { return {}; }
  static Weights load(const uint8_t* w) { return {w}; }
  static Activations broadcast(const int16_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
  static Sum multiply_add(Sum sum, Weights w, const Activations& x) {
    for (int i = 0; i < 16; ++i) {
      // Modulo 2^32: with the 128 that is added to the weights a segment's sum may overflow.
      for (int k = 0; k < 4; ++k) sum.of[i] += uint32_t(x.of[k] * int32_t(w.at[4 * i + k]));
    }
    return sum;
  }
  static void store(const Sum& sum, int32_t* out) { std::memcpy(out, sum.of, sizeof sum.of); }
};

}  // namespace

const InstructionSet* scalar() {
  static const InstructionSet set{
      "scalar", run_int8_linear<Scalar>, run_quantize_int8, run_rms_norm, run_geglu, run_rotary, run_attention};
  return &set;
}

}  // namespace pg_kernels
