// The int8 GEMM on CUDA: its arguments, and the layout of packed weights. All pointers are device pointers.
#pragma once

#include <cstdint>

namespace pg_kernels::cuda {

// Packed weights are the registers of mma.sync's and wgmma's first operand: [tiles][chunks][32 lanes][16 bytes]. A tile
// is 16 rows of the weight and a chunk 32 of its columns; both are padded with zeros. Lane l holds rows l / 4 and
// l / 4 + 8. Of each row it holds bytes (2t, 2t + 8, 2t + 1, 2t + 9) of the chunk's first half and of its second half,
// with t = l % 4. In the byte order (0, 2), (1, 3) two int8 become two 16-bit floats in the fewest instructions.
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

constexpr int kMaxWeights = 4;

// y = x · weightᵀ + bias for each of `count` weights with k columns.
struct Product {
  Weight weights[kMaxWeights];
  int count;
  bool geglu;              // of two weights [n, k]: weights[0].y = gelu(x · weights[0]ᵀ) · (x · weights[1]ᵀ)
  const void* x;           // [m, k], contiguous, aligned to 16 bytes; k is a multiple of 8
  bool int8_activations;   // x is the output of quantize_rows
  const float* row_scale;  // [m]: the scales of x with int8_activations
  int m, k;
  int group;  // columns of the weight that share a scale: k or more, or a multiple of 32
  Float x_type, bias_type, y_type;
  int num_splits;     // blocks that share the sum over k; with more than one `partial` holds their sums
  uint32_t* partial;  // [num_splits, m, rows of all weights]: fp32; int32 for int8 activations without groups
};

// Returns how many blocks should share the sum over k on a device: the value for Product::num_splits.
int num_splits(const Product&, int device);

// Launches on a stream of a device. x is kFloat16 or kBFloat16, or quantised.
void int8_linear(const Product&, int device, uintptr_t stream);

// Quantises the rows of x [m, k] to int8 [m, k padded to 32], columns in the weights' order, with fp32 scales [m]. The
// scale of a row with NaN or infinity is NaN.
void quantize_rows(const void* x, Float type, int64_t m, int k, int8_t* q, float* scale, int device, uintptr_t stream);

// Writes the weight as floats [n, k].
void dequantize(const uint8_t* data, const float* scale, int64_t n, int k, int group, void* out, Float type, int device,
                uintptr_t stream);

// Writes the rows at some indices as floats [count, k]: NaN for an index outside [0, n).
void dequantize_rows(const uint8_t* data, const float* scale, const int64_t* indices, int64_t count, int64_t n, int k,
                     int group, void* out, Float type, int device, uintptr_t stream);

}  // namespace pg_kernels::cuda
