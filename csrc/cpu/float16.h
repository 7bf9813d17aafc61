// Conversions of fp16 and bf16 from and to fp32, portable. They round to nearest even and keep infinities and NaNs.
// Everything is in an unnamed namespace, so that the linker cannot merge code compiled for different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace pg_kernels {

namespace {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t half) { return from_bits(uint32_t(half) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // a NaN stays a NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return from_bits(sign | to_bits(float(mantissa) * 0x1p-24f));
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_float16(float value) {
  const uint32_t bits = to_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and above
  if (magnitude < 0x38800000) {
    // Below 2^-14 fp16 numbers are 2^-24 apart, as fp32 numbers near 0.5 are: adding 0.5 makes the FPU round to them.
    return sign | uint16_t(to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f));
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

}  // namespace

}  // namespace pg_kernels
