// What the product's kernels share: the types of x, int8 weights as operands of tensor cores, accumulators and
// epilogues.
#pragma once

#include "cuda/int8_linear.h"
#include "cuda/ptx.h"

namespace pg_kernels::cuda {

// The types of x: bytes of an element, type of the sums, and how a chunk of 16 rows of the weight (16 bytes a lane) is
// multiplied by 32 columns of 8 rows of x (`b`, as load_matrices loads them).
struct BFloat16 {
  static constexpr int kBytes = 2;
  using Sum = float;

  // The byte of w has the sign bit s and seven low bits: w = low − 128 s = (128 + low) − (128 + 128 s), all exact in
  // bf16.
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

  // The float16 with the bytes 0x64 and w + 128 is 1024 + (w + 128). Subtracting 1152 is exact.
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

__host__ __device__ inline int min_of(int a, int b) { return a < b ? a : b; }

// Words of b for one chunk.
template <class Type>
constexpr int kWords = 2 * Type::kBytes;

// The first operand of the product for one chunk: for floats, two matrices of 16 columns.
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

// Sums of one tile. With groups each chunk's sums are scaled and added in fp32; with one scale per row they stay as
// they are until the epilogue.
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

// The scales of a lane's two rows. Empty with one scale per row, which the epilogue applies.
template <bool kGrouped>
struct Scales {
  __device__ void find(const Product&, const Weight&, int) {}
  __device__ void load(const Product&, int, float (&)[2]) const {}
};
template <>
struct Scales<true> {
  const float* rows[2];
  __device__ void find(const Product& p, const Weight& weight, int row) {
    const int groups = (p.k + p.group - 1) / p.group;
    for (int i = 0; i < 2; ++i) rows[i] = weight.scale + int64_t(min_of(row + 8 * i, weight.n - 1)) * groups;
  }
  __device__ void load(const Product& p, int chunk, float (&scale)[2]) const {
    const int group = unsigned(chunk) / unsigned(p.group / kChunk);
    for (int i = 0; i < 2; ++i) scale[i] = __ldg(rows[i] + group);
  }
};

__device__ inline float load_float(const void* from, int64_t i, Float type) {
  if (type == Float::kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return type == Float::kFloat16 ? ptx::from_f16(bits) : ptx::from_bf16(bits);
}

__device__ inline uint16_t to_16_bits(Float type, float value) {
  return type == Float::kFloat16 ? ptx::to_f16(value) : ptx::to_bf16(value);
}

__device__ inline void store_float(void* to, int64_t i, Float type, float value) {
  if (type == Float::kFloat32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] = to_16_bits(type, value);
  }
}

// Stores four floats, given as the bits of fp32, at i, a multiple of four.
__device__ inline void store_four(void* to, int64_t i, Float type, uint4 bits) {
  if (type == Float::kFloat32) {
    static_cast<uint4*>(to)[i / 4] = bits;
  } else {
    const auto pair = [&](uint32_t low, uint32_t high) {
      return to_16_bits(type, ptx::as_float(low)) | uint32_t(to_16_bits(type, ptx::as_float(high))) << 16;
    };
    static_cast<uint64_t*>(to)[i / 4] = pair(bits.x, bits.y) | uint64_t(pair(bits.z, bits.w)) << 32;
  }
}

// GELU with tanh: x · sigmoid(2 u) with u = √(2/π) (x + 0.044715 x³).
__device__ inline float gelu(float x) {
  return ptx::divide_approx(x, 1.0f + expf(-x * (1.5957691216f + 0.07135481283f * x * x)));
}

// Turns the sums of one row of the weight into outputs. Rows past the end use the last row; they are never stored.
template <class Type, bool kGrouped>
struct Epilogue {
  float scale, bias;
  Epilogue() = default;
  __device__ Epilogue(const Product& p, const Weight& weight, int row) {
    row = min_of(row, weight.n - 1);
    scale = kGrouped ? 1.0f : __ldg(weight.scale + row);
    bias = weight.bias == nullptr ? 0.0f : load_float(weight.bias, row, p.bias_type);
  }
  // Multiply by one factor at a time: the product of the factors could underflow.
  __device__ float operator()(float sum, float row_scale) const {
    if (!kGrouped) sum = ptx::multiply(sum, scale);
    if (Type::kBytes == 1) sum = ptx::multiply(sum, row_scale);
    return sum + bias;
  }
};

template <class Type>
__device__ inline float row_scale_of(const Product& p, int64_t token) {
  return Type::kBytes == 1 ? __ldg(p.row_scale + (token < p.m ? token : p.m - 1)) : 1.0f;
}

// The weight that a block works on, and the block's first row of it.
struct BlockOrigin {
  int weight;
  int row;
};
__device__ inline BlockOrigin block_origin(const Product& p, int block, int rows) {
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

// Returns where a tile's chunks begin for this lane. Tiles past the last one are clamped to it.
__device__ inline const uint8_t* tile_of(const Weight& weight, int row, int chunks, int lane) {
  const int last = (weight.n - 1) / kTileRows, tile = row / kTileRows;
  return weight.data + int64_t(tile < last ? tile : last) * chunks * kChunkBytes + lane * 16;
}

// Calls launch(type of x, whether the weights have groups).
template <class Launch>
void dispatch_type(const Product& p, const Launch& launch) {
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

// Returns the number of rows of all weights before weight `which`.
__host__ __device__ inline int64_t rows_before(const Product& p, int which) {
  int64_t rows = 0;
  for (int i = 0; i < kMaxWeights; ++i) rows += i < which ? p.weights[i].n : 0;
  return rows;
}

// Distance in words between the results of two tokens in shared memory. The four words of padding put what lanes write
// at once into different banks, and keep groups of four results aligned.
template <int kRows>
constexpr int kStride = kRows + 4;

// Writes a warp's results to shared memory, or the bits of its sums if blocks share the sum over k. A warp has two
// tiles of rows, which begin at row_of(0) and row_of(1) (with geglu one of each weight), and kTokenTiles tiles of
// tokens. Its sums are sum(tile of rows, tile of tokens, element).
template <class Type, bool kGrouped, bool kGeglu, int kRows, int kTokenTiles, class RowOf, class SumOf>
__device__ inline void stage_results(const Product& p, const BlockOrigin& origin, int64_t first_token, int warp_token,
                                     uint32_t* results, const RowOf& row_of, const SumOf& sum) {
  const int lane = threadIdx.x % 32;
  Epilogue<Type, kGrouped> epilogue[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      epilogue[i][half] = {p, p.weights[kGeglu ? i : origin.weight], row_of(i) + half * 8 + lane / 4};
    }
  }
#pragma unroll
  for (int j = 0; j < kTokenTiles * 2; ++j) {
    const int token = warp_token + j / 2 * 8 + lane % 4 * 2 + j % 2;
    const float row_scale = row_scale_of<Type>(p, first_token + token);
#pragma unroll
    for (int i = 0; i < (kGeglu ? 1 : 2); ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& result = results[token * kStride<kRows> + row_of(i) - origin.row + half * 8 + lane / 4];
        const int element = half * 2 + j % 2;
        if (p.num_splits > 1) {
          result = ptx::as_bits(sum(i, j / 2, element));
        } else {
          float y = epilogue[i][half](float(sum(i, j / 2, element)), row_scale);
          if (kGeglu) y = gelu(y) * epilogue[1][half](float(sum(1, j / 2, element)), row_scale);
          result = ptx::as_bits(y);
        }
      }
    }
  }
}

// Stores the results from shared memory to y, or this block's sums to p.partial. Neighbouring threads write
// neighbouring columns of y, each of them four columns if they are aligned.
template <int kTokens, int kRows, int kThreads>
__device__ inline void store_results(const Product& p, const BlockOrigin& origin, int64_t first_token,
                                     const uint32_t* results, int thread) {
  const Weight& weight = p.weights[origin.weight];
  const bool split = p.num_splits > 1;
  const int64_t stride = split ? rows_before(p, p.count) : weight.n;
  void* const to = split ? p.partial + int64_t(blockIdx.z) * p.m * stride + rows_before(p, origin.weight) : weight.y;
  const Float type = split ? Float::kFloat32 : p.y_type;
  const auto store = [&](auto count) {
    constexpr int kCount = decltype(count)::value, kAcross = kRows / kCount;
    const int row = thread % kAcross * kCount;
    if (origin.row + row >= weight.n) return;
    for (int token = thread / kAcross; token < kTokens && first_token + token < p.m; token += kThreads / kAcross) {
      const uint32_t* from = results + token * kStride<kRows> + row;
      const int64_t at = (first_token + token) * stride + origin.row + row;
      if constexpr (kCount == 4) {
        store_four(to, at, type, *reinterpret_cast<const uint4*>(from));
      } else {
        store_float(to, at, type, ptx::as_float(*from));
      }
    }
  };
  const bool aligned = weight.n % 4 == 0 && stride % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0;
  aligned ? store(std::integral_constant<int, 4>{}) : store(std::integral_constant<int, 1>{});
}

// Returns the tokens of a tile of many_rows. The larger tile reads and converts the weights half as often. It is not
// taken if it computes many more tokens than there are, nor with groups, for which the registers do not suffice.
inline int tile_tokens(const Product& p) {
  const bool wide = (p.m + 63) / 64 * 64 * 20 >= (p.m + 127) / 128 * 128 * 17;
  return wide && p.group >= p.k ? 128 : 64;
}
// Returns how many blocks of many_rows a multiprocessor's registers hold.
constexpr int blocks_per_multiprocessor(int tokens, bool int8_activations, bool grouped) {
  return tokens == 64 && !int8_activations && !grouped ? 2 : 1;
}
// Returns the tokens of a tile of many_rows_sm90.
inline int tile_tokens_sm90(const Product& p) { return (p.m + 143) / 144 * 144 < (p.m + 127) / 128 * 128 ? 144 : 128; }

// The product for up to 16 rows of x, for more, and for more on Hopper with one scale for each row of the weight.
void few_rows(const Product&, cudaStream_t);
void many_rows(const Product&, cudaStream_t);
void many_rows_sm90(const Product&, cudaStream_t);

}  // namespace pg_kernels::cuda
