// Rows of floats of any type, and functions of floats that the compiler vectorises. Everything is in an unnamed
// namespace, so that the linker cannot merge code compiled for different instruction sets.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/float16.h"
#include "cpu/instruction_sets.h"

namespace pg_kernels {

namespace {

template <class T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size_t(count > 0 ? count : 1) * sizeof(T)) != 0) std::abort();
  return static_cast<T*>(memory);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline float round_to_even(float value) { return (value + 12582912.0f) - 12582912.0f; }  // for |value| below 2^22

inline float exp_approx(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float n = round_to_even(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  return from_bits(to_bits(p) + (uint32_t(int32_t(n)) << 23));
}

inline float tanh_approx(float x) {
  const float magnitude = x < 0 ? -x : x, e = exp_approx(2.0f * magnitude);
  const float z = x * x;
  // Near 0 use the series: the difference of exponentials would cancel.
  const float series = x * (1.0f + z * (-0.3333333333f + z * (0.1333333333f - z * 0.05396825397f)));
  const float far = 1.0f - 2.0f / (e + 1.0f);
  return magnitude < 0.1f ? series : x < 0 ? -far : far;
}

// GELU with tanh: 0.5 · x · (1 + tanh(u)) = x / (1 + exp(−2u)).
inline float gelu_tanh(float x) {
  const float u = 0.797884561f * (x + 0.044715f * (x * x * x));
  if (u < -40.0f) return x * 0.0f;  // the quotient would stop falling at 1e-38 · x: exp_approx clamps its argument
  return x / (1.0f + exp_approx(-2.0f * u));
}

// Returns GELU as x · s with s = 1 / (1 + exp(−2u)), and its derivative s + x · s · (1 − s) · 2u'.
inline float gelu_tanh_and_slope(float x, float* slope) {
  const float square = x * x;
  const float z =
      square > 100.0f ? 100.0f : square;  // clamp: beyond it the slope is 0 or 1 in fp32, and x² could overflow
  const float u = 0.797884561f * (x + 0.044715f * (z * x));
  const float e = exp_approx(-2.0f * u), s = 1.0f / (1.0f + e);
  *slope = s + x * s * (e * s) * (1.595769122f + 0.214064f * z);
  return x * (u < -40.0f ? 0.0f : s);
}

inline void load_floats(Float type, const void* x, int64_t offset, int64_t size, float* out) {
  switch (type) {
    case Float::kFloat32:
      std::memcpy(out, static_cast<const float*>(x) + offset, size_t(size) * sizeof(float));
      break;
    case Float::kFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
      for (int64_t i = 0; i < size; ++i) out[i] = float16_to_float(from[i]);
      break;
    }
    case Float::kBFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(x) + offset;
      for (int64_t i = 0; i < size; ++i) out[i] = bfloat16_to_float(from[i]);
      break;
    }
  }
}

inline void store_floats(Float type, const float* values, int64_t size, void* y, int64_t offset) {
  switch (type) {
    case Float::kFloat32:
      std::memcpy(static_cast<float*>(y) + offset, values, size_t(size) * sizeof(float));
      break;
    case Float::kFloat16: {
      uint16_t* to = static_cast<uint16_t*>(y) + offset;
      for (int64_t i = 0; i < size; ++i) to[i] = float_to_float16(values[i]);
      break;
    }
    case Float::kBFloat16: {
      uint16_t* to = static_cast<uint16_t*>(y) + offset;
      for (int64_t i = 0; i < size; ++i) to[i] = float_to_bfloat16(values[i]);
      break;
    }
  }
}

}  // namespace

}  // namespace pg_kernels
