// AVX-512 VNNI: one instruction multiplies 64 unsigned by 64 signed bytes and adds groups of four products to 16 sums.
#include "cpu/instruction_sets.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#include "cpu/int8_gemm.h"
#include "cpu/token_ops_impl.h"

namespace pg_kernels {

namespace {

struct Avx512Vnni {
  using Element = int8_t;
  using Sum = __m512i;
  using Weights = __m512i;
  using Activations = __m512i;
  static constexpr bool kBytes = true, kSigned = false;
  static constexpr int kRows = 6;
  static constexpr int vectors(int) { return 4; }

  static Sum zero() { return _mm512_setzero_si512(); }
  static Weights load(const uint8_t* w) { return _mm512_loadu_si512(w); }
  static Activations broadcast(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static Sum multiply_add(Sum sum, Weights w, Activations x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static void store(Sum sum, int32_t* out) { _mm512_store_si512(out, sum); }
};

}  // namespace

const InstructionSet* avx512_vnni() {
  static const InstructionSet set{
      "avx512_vnni", run_int8_linear<Avx512Vnni>, run_quantize_int8, run_rms_norm, run_geglu, run_rotary,
      run_attention};
  return &set;
}

}  // namespace pg_kernels
#else
const pg_kernels::InstructionSet* pg_kernels::avx512_vnni() { return nullptr; }
#endif
