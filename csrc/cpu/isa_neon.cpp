// NEON with the dot product instruction (Armv8.2 and later, all Apple silicon). It adds 16 products of signed bytes to
// 4 sums.
#include "cpu/instruction_sets.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include "cpu/int8_gemm.h"
#include "cpu/token_ops_impl.h"

namespace pg_kernels {

namespace {

struct Neon {
  using Element = int8_t;
  using Sum = int32x4x4_t;
  using Weights = int8x16x4_t;
  using Activations = int8x16_t;
  static constexpr bool kBytes = true, kSigned = true;
  static constexpr int kRows = 4;
  static constexpr int vectors(int) { return 1; }

  static Sum zero() {
    const int32x4_t none = vdupq_n_s32(0);
    return {{none, none, none, none}};
  }
  static Weights load(const uint8_t* w) {
    const uint8x16_t flip = vdupq_n_u8(128);  // w + 128 back to w
    return {{vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), flip)), vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16), flip)),
             vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 32), flip)),
             vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 48), flip))}};
  }
  static Activations broadcast(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  static Sum multiply_add(Sum sum, const Weights& w, Activations x) {
    return {{vdotq_s32(sum.val[0], w.val[0], x), vdotq_s32(sum.val[1], w.val[1], x), vdotq_s32(sum.val[2], w.val[2], x),
             vdotq_s32(sum.val[3], w.val[3], x)}};
  }
  static void store(const Sum& sum, int32_t* out) {
    for (int i = 0; i < 4; ++i) vst1q_s32(out + 4 * i, sum.val[i]);
  }
};

}  // namespace

const InstructionSet* neon() {
  static const InstructionSet set{"neon",     run_int8_linear<Neon>, run_quantize_int8, run_rms_norm, run_geglu,
                                  run_rotary, run_attention};
  return &set;
}

}  // namespace pg_kernels
#else
const pg_kernels::InstructionSet* pg_kernels::neon() { return nullptr; }
#endif
