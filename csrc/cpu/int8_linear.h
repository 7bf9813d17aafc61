// The int8 GEMM: what a call says, and how weights lie in memory.
#pragma once

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace pg_kernels {

// Packed weights are w + 128, unsigned, as the x86 instructions want one operand: [panels][steps][columns][4], where a
// panel is 64 rows of the weight (columns of the product; the last panel has 16, 32 or 48 when that is enough) and a
// step is 4 of its columns. Every group of columns begins at a step: groups of 1 or 2 are padded. Scales are
// [panels][groups][columns].
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

// From and to int8 [n, k] and scales [n, groups].
void pack_int8(const Int8Layout&, const int8_t* q, const float* scale, uint8_t* packed, float* packed_scale);
void unpack_int8(const Int8Layout&, const uint8_t* packed, const float* packed_scale, int8_t* q, float* scale);

// Some rows as fp32 [count, k]; indices in [0, n).
void dequantize_rows(const Int8Layout&, const uint8_t* packed, const float* packed_scale, const int64_t* indices,
                     int64_t count, float* out);

struct Int8Weight {
  Int8Layout layout;
  const uint8_t* data;
  const float* scale;
  const float* bias;  // [n] or null
  void* y;            // [m, n]
};

// The largest products of every row instead of all of them: the best first, of equals the one further to the left; NaN
// counts as the largest.
struct TopK {
  int64_t k;
  float softcap;     // 0: none; else y = softcap · tanh(y / softcap)
  float* values;     // [m, k]
  int64_t* indices;  // [m, k]: rows of the weight
  float* log_sums;   // [m], or null: log Σ exp(y) over all of a row
};

// y = x · weightᵀ + bias for each of some weights with the same number of columns. x and y are contiguous.
struct Int8Linear {
  int64_t m, k;
  Float type;             // of x and y
  const void* x;          // [m, k]
  bool int8_activations;  // quantise each row of x to 8 bits first; else to 16 bits per 512 columns
  bool geglu;             // of two weights with as many rows: the first one's y = gelu(x · firstᵀ) · (x · secondᵀ)
  const TopK* top;        // of a single weight, whose y is not written then; or null
  const Int8Weight* weights;
  int64_t count;
};

// weight ≈ q · scale: the largest magnitude of a group becomes ±127, everything else the nearest level.
struct QuantizeInt8 {
  Int8Layout layout;
  Float type;
  const void* weight;  // [n, k], finite
  int8_t* q;           // [n, k]
  float* scale;        // [n, groups]
};

}  // namespace pg_kernels
