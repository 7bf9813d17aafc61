// AVX-VNNI: the instruction of AVX-512 VNNI with half the width and half the registers.
#include "cpu/instruction_sets.h"

#if defined(__AVXVNNI__)
#include <immintrin.h>

#include "cpu/int8_gemm.h"
#include "cpu/token_ops_impl.h"

namespace pg_kernels {

namespace {

struct Pair {
  __m256i low, high;
};

struct AvxVnni {
  using Element = int8_t;
  using Sum = Pair;
  using Weights = Pair;
  using Activations = __m256i;
  static constexpr bool kBytes = true, kSigned = false;
  static constexpr int kRows = 4;
  static constexpr int vectors(int rows) { return rows <= 2 ? 2 : 1; }

  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Weights load(const uint8_t* w) {
    const __m256i* at = reinterpret_cast<const __m256i*>(w);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static Activations broadcast(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static Sum multiply_add(Sum sum, Weights w, Activations x) {
    return {_mm256_dpbusd_avx_epi32(sum.low, w.low, x), _mm256_dpbusd_avx_epi32(sum.high, w.high, x)};
  }
  static void store(Sum sum, int32_t* out) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), sum.low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + 8), sum.high);
  }
};

}  // namespace

const InstructionSet* avx_vnni() {
  static const InstructionSet set{
      "avx_vnni", run_int8_linear<AvxVnni>, run_quantize_int8, run_rms_norm, run_geglu, run_rotary, run_attention};
  return &set;
}

}  // namespace pg_kernels
#else
const pg_kernels::InstructionSet* pg_kernels::avx_vnni() { return nullptr; }
#endif
