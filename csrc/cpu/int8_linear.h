// The int8 GEMM on CPUs: its arguments, and the layout of packed weights.
#pragma once

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace pg_kernels {

// Packed weights are w + 128, unsigned, because the x86 instructions take one unsigned operand. The layout is
// [panels][steps][width][4]: a panel is `width` rows of the weight, 64 of them (16, 32 or 48 in the last panel if they
// suffice), and a step is 4 of its columns. Every group of columns begins at a step: groups of 1 or 2 are padded.
// Scales are [panels][groups][width].
constexpr int64_t kPanel = 64;

struct Int8Layout {
  int64_t n, k;
  int64_t group;  // columns of the weight that share a scale; the last group may be shorter

  int64_t groups() const { return (k + group - 1) / group; }
  int64_t group_steps() const { return (group + 3) / 4; }
  int64_t steps() const { return (groups() - 1) * group_steps() + (k - (groups() - 1) * group + 3) / 4; }
  int64_t padded_n() const { return (n + 15) / 16 * 16; }
  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t width(int64_t panel) const {
    const int64_t left = padded_n() - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }
  int64_t panel_data(int64_t panel) const { return panel * kPanel * steps() * 4; }
  int64_t panel_scale(int64_t panel) const { return panel * kPanel * groups(); }
};

// Packs int8 [n, k] and scales [n, groups], and unpacks them.
void pack_int8(const Int8Layout&, const int8_t* q, const float* scale, uint8_t* packed, float* packed_scale);
void unpack_int8(const Int8Layout&, const uint8_t* packed, const float* packed_scale, int8_t* q, float* scale);

// Writes the rows at some indices, which must lie in [0, n), as fp32 [count, k].
void dequantize_rows(const Int8Layout&, const uint8_t* packed, const float* packed_scale, const int64_t* indices,
                     int64_t count, float* out);

struct Int8Weight {
  Int8Layout layout;
  const uint8_t* data;
  const float* scale;
  const float* bias;  // [n] or null
  void* y;            // [m, n]
};

// The k largest products of every row of x, the largest first. Of equal ones the lower index comes first; NaN counts as
// the largest.
struct TopK {
  int64_t k;
  float softcap;     // y becomes softcap · tanh(y / softcap); 0 for none
  float* values;     // [m, k]
  int64_t* indices;  // [m, k]: rows of the weight
  float* log_sums;   // [m]: log Σ exp(y) over all products of a row; or null
};

// y = x · weightᵀ + bias for each of `count` weights with k columns. x and y are contiguous.
struct Int8Linear {
  int64_t m, k;
  Float type;             // of x and y
  const void* x;          // [m, k]
  bool int8_activations;  // round each row of x to 8 bits; else to 16 bits, with a scale per 512 columns
  bool geglu;             // of two weights [n, k]: weights[0].y = gelu(x · weights[0]ᵀ) · (x · weights[1]ᵀ)
  const TopK* top;        // null, or the top k of a single weight, whose y is not written
  const Int8Weight* weights;
  int64_t count;
};

// weight ≈ q · scale. The largest magnitude of a group becomes ±127, every other number the nearest level.
struct QuantizeInt8 {
  Int8Layout layout;
  Float type;
  const void* weight;  // [n, k], finite
  int8_t* q;           // [n, k]
  float* scale;        // [n, groups]
};

}  // namespace pg_kernels
