// AVX2: its product of bytes saturates, so weights are widened to 16 bits. 16-bit activations then need no limbs.
#include "cpu/instruction_sets.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "cpu/int8_gemm.h"
#include "cpu/token_ops_impl.h"

namespace pg_kernels {

namespace {

struct Four {
  __m256i of[4];
};

struct Avx2 {
  using Element = int16_t;
  using Sum = Four;      // 4 columns each, with two sums a column: of its even and of its odd pairs
  using Weights = Four;  // 4 columns each
  using Activations = __m256i;
  static constexpr bool kBytes = false, kSigned = false;
  static constexpr int kRows = 2;
  static constexpr int vectors(int) { return 1; }

  static Sum zero() {
    const __m256i none = _mm256_setzero_si256();
    return {{none, none, none, none}};
  }
  static Weights load(const uint8_t* w) {
    const __m128i* at = reinterpret_cast<const __m128i*>(w);
    return {{_mm256_cvtepu8_epi16(_mm_loadu_si128(at)), _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 1)),
             _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 2)), _mm256_cvtepu8_epi16(_mm_loadu_si128(at + 3))}};
  }
  static Activations broadcast(const int16_t* x) {
    int64_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  static Sum multiply_add(Sum sum, const Weights& w, Activations x) {
    return {{_mm256_add_epi32(sum.of[0], _mm256_madd_epi16(w.of[0], x)),
             _mm256_add_epi32(sum.of[1], _mm256_madd_epi16(w.of[1], x)),
             _mm256_add_epi32(sum.of[2], _mm256_madd_epi16(w.of[2], x)),
             _mm256_add_epi32(sum.of[3], _mm256_madd_epi16(w.of[3], x))}};
  }
  static void store(const Sum& sum, int32_t* out) {
    // hadd adds neighbours within each half: the columns come out as 0 1 4 5 | 2 3 6 7.
    const __m256i first = _mm256_hadd_epi32(sum.of[0], sum.of[1]), second = _mm256_hadd_epi32(sum.of[2], sum.of[3]);
    __m256i* at = reinterpret_cast<__m256i*>(out);
    _mm256_store_si256(at, _mm256_permute4x64_epi64(first, 0xd8));
    _mm256_store_si256(at + 1, _mm256_permute4x64_epi64(second, 0xd8));
  }
};

}  // namespace

const InstructionSet* avx2() {
  static const InstructionSet set{"avx2",     run_int8_linear<Avx2>, run_quantize_int8, run_rms_norm, run_geglu,
                                  run_rotary, run_attention};
  return &set;
}

}  // namespace pg_kernels
#else
const pg_kernels::InstructionSet* pg_kernels::avx2() { return nullptr; }
#endif
