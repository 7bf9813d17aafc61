// What the product's kernels share: activations' types, int8 weights as tensor cores' operands, and what becomes of
// sums.
#pragma once

#include "cuda/int8_linear.h"
#include "cuda/ptx.h"

namespace pg_kernels::cuda {

// Each type of x: its bytes, its sums, and how a chunk of 16 rows (16 bytes a lane) is multiplied by 32 columns of 8 of
// its rows (`b`, as load_matrices gives them).
struct BFloat16 {
  static constexpr int kBytes = 2;
  using Sum = float;

  // Of w = 128 s + low with s the sign bit, w = (128 + low) − (128 + 128 s), both exact.
  static __device__ uint32_t pair(uint32_t bytes) {
    return ptx::subtract_bf16(ptx::and_or(bytes, 0x007F007Fu, 0x43004300u),
                              ptx::and_or(bytes, 0x00800080u, 0x43004300u));
  }
  static __device__ uint32_t even(uint32_t bytes) { return pair(bytes); }
  static __device__ uint32_t odd(uint32_t bytes) { return pair(bytes >> 8); }
  static __device__ void multiply(Sum (&d)[4], const uint32_t (&a)[8], const uint32_t* b) {
    ptx::mma_bf16(d, {a[0], a[1], a[2], a[3]}, b[0], b[1]);
    ptx::mma_bf16(d, {a[4], a[5], a[6], a[7]}, b[2], b[3]);
  }
};

struct Float16 {
  static constexpr int kBytes = 2;
  using Sum = float;

  // 1024 + (w + 128) is a byte below 0x64; taking 1152 off is exact.
  static __device__ uint32_t even(uint32_t bytes) {
    return ptx::subtract_f16(ptx::permute(bytes ^ 0x80808080u, 0x64646464u, 0x4240), 0x64806480u);
  }
  static __device__ uint32_t odd(uint32_t bytes) {
    return ptx::subtract_f16(ptx::permute(bytes ^ 0x80808080u, 0x64646464u, 0x4341), 0x64806480u);
  }
  static __device__ void multiply(Sum (&d)[4], const uint32_t (&a)[8], const uint32_t* b) {
    ptx::mma_f16(d, {a[0], a[1], a[2], a[3]}, b[0], b[1]);
    ptx::mma_f16(d, {a[4], a[5], a[6], a[7]}, b[2], b[3]);
  }
};

// Quantised rows, whose columns quantize_rows has put into the weights' order.
struct Int8 {
  static constexpr int kBytes = 1;
  using Sum = int32_t;

  static __device__ void multiply(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    ptx::mma_s8(d, a, b[0], b[1]);
  }
};

// Words of b that a chunk takes.
template <class Type>
constexpr int kWords = 2 * Type::kBytes;

// The first operand: of floats, two matrices of 16 columns.
template <class Type>
struct Operand {
  uint32_t words[8];
  Operand() = default;
  __device__ explicit Operand(uint4 w)
      : words{Type::even(w.x), Type::even(w.z), Type::odd(w.x), Type::odd(w.z),
              Type::even(w.y), Type::even(w.w), Type::odd(w.y), Type::odd(w.w)} {}
};
template <>
struct Operand<Int8> {
  uint32_t words[4];
  Operand() = default;
  __device__ explicit Operand(uint4 w) : words{w.x, w.z, w.y, w.w} {}
};

// Sums of a group of columns become floats when it ends; where a row has one scale, they stay as they are to the end.
template <class Type, bool kGrouped>
struct Accumulator {
  using Sum = typename Type::Sum;
  Sum sums[4] = {};
  __device__ void add(const Operand<Type>& a, const uint32_t* b, const float (&)[2]) {
    Type::multiply(sums, a.words, b);
  }
};
template <class Type>
struct Accumulator<Type, true> {
  using Sum = float;
  Sum sums[4] = {};
  __device__ void add(const Operand<Type>& a, const uint32_t* b, const float (&scale)[2]) {
    typename Type::Sum part[4] = {};
    Type::multiply(part, a.words, b);
    for (int i = 0; i < 4; ++i) sums[i] += float(part[i]) * scale[i / 2];
  }
};

// The scales of a lane's two rows for a chunk; 1 where they come at the end.
template <bool kGrouped>
__device__ inline void load_scales(const Product& p, const Weight& weight, int row, int chunk, float (&scale)[2]) {
  if (!kGrouped) return;
  const int groups = (p.k + p.group - 1) / p.group, group = chunk * kChunk / p.group;
  for (int i = 0; i < 2; ++i) {
    const int here = row + 8 * i;
    scale[i] = here < weight.n ? __ldg(weight.scale + int64_t(here) * groups + group) : 0.0f;
  }
}

__device__ inline float load_float(const void* from, int64_t i, Float type) {
  if (type == Float::kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return type == Float::kFloat16 ? ptx::from_f16(bits) : ptx::from_bf16(bits);
}

__device__ inline void store_float(void* to, int64_t i, Float type, float value) {
  if (type == Float::kFloat32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = type == Float::kFloat16 ? ptx::to_f16(value) : ptx::to_bf16(value);
  }
}

// x · sigmoid(2 u) with u = √(2/π) (x + 0.044715 x³) is gelu with tanh.
__device__ inline float gelu(float x) { return x / (1.0f + expf(-x * (1.5957691216f + 0.07135481283f * x * x))); }

// A finished number: the sum of a row of the weight and a row of x.
template <bool kGrouped>
__device__ inline float finished(const Product& p, const Weight& weight, int row, int64_t token, float sum) {
  // One factor at a time: their product could underflow.
  if (!kGrouped) sum = ptx::multiply(sum, weight.scale[row]);
  if (p.int8_activations) sum = ptx::multiply(sum, p.row_scale[token]);
  return weight.bias == nullptr ? sum : sum + load_float(weight.bias, row, p.bias_type);
}

// Which weight a block of `rows` rows belongs to, and its first row.
struct Place {
  int weight;
  int row;
};
__device__ inline Place place_of(const Product& p, int block, int rows) {
  const int products = p.geglu ? 1 : p.count;
  for (int i = 0; i < products; ++i) {
    const int blocks = (p.weights[i].n + rows - 1) / rows;
    if (block < blocks || i == products - 1) return {i, block * rows};
    block -= blocks;
  }
  return {0, 0};
}

inline int blocks_of(const Product& p, int rows) {
  int blocks = 0;
  for (int i = 0; i < (p.geglu ? 1 : p.count); ++i) blocks += (p.weights[i].n + rows - 1) / rows;
  return blocks;
}

__host__ __device__ inline int chunks_of(const Product& p) { return (p.k + kChunk - 1) / kChunk; }

// Where a tile's chunks begin for this lane; beyond the last tile, the last one again.
__device__ inline const uint8_t* tile_of(const Weight& weight, int row, int chunks, int lane) {
  const int last = (weight.n - 1) / kTileRows, tile = row / kTileRows;
  return weight.data + int64_t(tile < last ? tile : last) * chunks * kChunkBytes + lane * 16;
}

// By the type of activations and the kind of scales.
template <class Launch>
void with_type(const Product& p, const Launch& launch) {
  const bool grouped = p.group < p.k;
  const auto with_groups = [&](auto type) {
    grouped ? launch(type, std::true_type{}) : launch(type, std::false_type{});
  };
  if (p.int8_activations) {
    with_groups(Int8{});
  } else if (p.x_type == Float::kFloat16) {
    with_groups(Float16{});
  } else {
    with_groups(BFloat16{});
  }
}

// One number of the product, or the bits of this block's part of its sum where the columns are split.
__device__ inline void store_result(const Product& p, int which, int row, int64_t token, uint32_t bits) {
  const Weight& weight = p.weights[which];
  if (row >= weight.n || token >= p.m) return;
  if (p.splits == 1) {
    store_float(weight.y, token * weight.n + row, p.y_type, ptx::as_float(bits));
  } else {
    int64_t rows = 0, before = 0;
    for (int i = 0; i < p.count; ++i) {
      if (i == which) before = rows;
      rows += p.weights[i].n;
    }
    p.parts[(int64_t(blockIdx.z) * p.m + token) * rows + before + row] = bits;
  }
}

// Up to 16 rows of x; more; more on Hopper, where all columns of a row of the weight share a scale.
void few_rows(const Product&, cudaStream_t);
void many_rows(const Product&, cudaStream_t);
void many_rows_sm90(const Product&, cudaStream_t);

}  // namespace pg_kernels::cuda
