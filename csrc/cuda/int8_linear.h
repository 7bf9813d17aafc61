// The int8 GEMM on CUDA: what a call says, and how weights lie in memory. Addresses are the device's.
#pragma once

#include <cstdint>

namespace pg_kernels::cuda {

// Packed weights are the registers of mma.sync's and wgmma's first operand: [tiles][chunks][32 lanes][16 bytes], where
// a tile is 16 rows of the weight and a chunk 32 of its columns; both are padded with zeros. Lane l holds rows l / 4
// and l / 4 + 8; of each, bytes (2t, 2t + 8, 2t + 1, 2t + 9) of the chunk's first half and of its second, with t = l %
// 4: byte order (0, 2) and (1, 3) is how two int8 become two 16-bit floats in the fewest instructions.
constexpr int kTileRows = 16;
constexpr int kChunk = 32;
constexpr int kChunkBytes = kTileRows * kChunk;

enum class Float : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Weight {
  const uint8_t* data;
  const float* scale;  // [n, groups]
  const void* bias;    // [n] or null
  void* y;             // [m, n]
  int n;
};

constexpr int kMostWeights = 4;

// y = x · weightᵀ + bias for each of some weights with the same number of columns.
struct Product {
  Weight weights[kMostWeights];
  int count;
  bool geglu;              // of two weights with as many rows: the first one's y = gelu(x · firstᵀ) · (x · secondᵀ)
  const void* x;           // [m, k], contiguous and at a multiple of 16 bytes; k a multiple of 8
  bool int8_activations;   // x is what quantize_rows makes of it
  const float* row_scale;  // [m]: and these are its scales
  int m, k;
  int group;  // columns of the weight that share a scale: k or more, or a multiple of 32
  Float x_type, bias_type, y_type;
  int splits;       // blocks share the columns between them: more than one needs room for as many sums
  uint32_t* parts;  // [splits, m, rows of all weights], fp32 or, of quantised rows without groups, int32
};

// How many blocks should share the columns on a device: what to give as `splits`.
int splits_for(const Product&, int device);

// x is kFloat16 or kBFloat16, or quantised. Launches on the stream of a device.
void int8_linear(const Product&, int device, uintptr_t stream);

// Rows of x [m, k] as int8 [m, k padded to 32], in the order that the product wants, and their fp32 scales [m]: NaN for
// a row with a number that is not finite.
void quantize_rows(const void* x, Float type, int64_t m, int k, int8_t* q, float* scale, int device, uintptr_t stream);

// All rows as floats [n, k].
void dequantize(const uint8_t* data, const float* scale, int64_t n, int k, int group, void* out, Float type, int device,
                uintptr_t stream);

// Some rows, by int64 indices, as floats [count, k]; NaN for an index outside [0, n).
void dequantize_rows(const uint8_t* data, const float* scale, const int64_t* indices, int64_t count, int64_t n, int k,
                     int group, void* out, Float type, int device, uintptr_t stream);

}  // namespace pg_kernels::cuda
