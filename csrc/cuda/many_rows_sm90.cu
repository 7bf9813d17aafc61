// The product for many rows of x on Hopper. One warp has the copy engine (TMA) fetch tiles of x and of the weights. Two
// warpgroups convert the weights into the first operand of their products, which stays in registers.
#include "cuda/fragments.h"
#include "cuda/ptx_sm90.h"

namespace pg_kernels::cuda {

namespace {

constexpr int kGroups = 2, kThreads = (kGroups + 1) * 128;
constexpr int kLine = 128;  // bytes of a row of x at once
constexpr int kTiles = 2;   // tiles of 64 rows of a warpgroup: two of one weight, or one of each with geglu
constexpr int kShared = 220 * 1024;

#ifdef PG_KERNELS_SM90

template <class Type, class Sum, int kSums>
__device__ void multiply(Sum (&sums)[kSums], const uint32_t* a, uint64_t b) {
  if constexpr (std::is_same_v<Type, BFloat16>) ptx::wgmma_bf16(sums, a, b);
  if constexpr (std::is_same_v<Type, Float16>) ptx::wgmma_f16(sums, a, b);
  if constexpr (std::is_same_v<Type, Int8>) ptx::wgmma_s8(sums, a, b);
}

// Returns wgmma's descriptor of rows of 128 bytes in shared memory, swizzled by the copy engine. The address may be a
// multiple of 32 bytes into the row.
__device__ uint64_t matrix_at(uint32_t address) {
  constexpr uint64_t kEightRows = 8 * kLine / 16, kSwizzle128 = 1;
  return kSwizzle128 << 62 | kEightRows << 32 | uint64_t(1) << 16 | (address & 0x3FFFF) >> 4;
}

#endif

// One stage of the pipeline in shared memory: a line of x of every token, and the matching chunks of the weights.
template <class Type, int kTokens>
struct Stage {
  static constexpr int kChunks = kLine / (kChunk * Type::kBytes);  // of a line
  static constexpr int kTileBytes = kChunks * kChunkBytes;         // of 16 rows of weights
  static constexpr int kWeightTiles =
      kGroups * kTiles * 4;  // with geglu the tiles of weights[0], then those of weights[1]
  static constexpr int kBytes = kTokens * kLine + kWeightTiles * kTileBytes;
  static constexpr int kCount = kShared / kBytes;
};

struct Maps {
  ptx::TensorMap x, weights[kMaxWeights];
};

// One block computes kTokens rows of x times kRows rows of a weight (of each weight with geglu), over one split of k.
template <class Type, int kTokens, bool kGeglu>
__global__ void __launch_bounds__(kThreads, 1)
    many_rows_sm90_kernel(const Product p, const __grid_constant__ Maps maps) {
#ifdef PG_KERNELS_SM90
  using S = Stage<Type, kTokens>;
  using Sum = typename Type::Sum;
  constexpr int kRows = kGroups * 64 * (kGeglu ? 1 : kTiles);
  const int thread = threadIdx.x, group = thread / 128, lane = thread % 32, warp = thread / 32 % 4;
  const BlockOrigin origin = block_origin(p, blockIdx.y, kRows);
  const int64_t first_token = int64_t(blockIdx.x) * kTokens;
  const int chunks = chunks_of(p), lines = (chunks + S::kChunks - 1) / S::kChunks;
  const int begin = lines * int(blockIdx.z) / p.num_splits, end = lines * int(blockIdx.z + 1) / p.num_splits;

  unsigned char* stages = ptx::shared();
  const uint32_t barriers = ptx::shared_address(stages) + S::kCount * S::kBytes;
  const auto full = [&](int stage) { return barriers + stage * 16; };
  const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
  if (thread == 0) {
    for (int i = 0; i < S::kCount; ++i) {
      ptx::barrier_init(full(i), 1);
      ptx::barrier_init(empty(i), kGroups * 4);
    }
    ptx::barriers_are_ready();
  }
  __syncthreads();

  if (group == kGroups) {
    ptx::release_registers<24>();
    if (thread == kGroups * 128) {
      const uint64_t policy = ptx::evict_first();
      for (int line = begin; line < end; ++line) {
        const int turn = line - begin, stage = turn % S::kCount;
        ptx::barrier_wait(empty(stage), turn / S::kCount % 2 ^ 1);
        ptx::barrier_arrive_expecting(full(stage), S::kBytes);
        uint32_t to = ptx::shared_address(stages + stage * S::kBytes);
        ptx::copy_box(to, maps.x, line * kLine, int(first_token), full(stage));
        to += kTokens * kLine;
        for (int i = 0; i < (kGeglu ? 2 : 1); ++i) {
          ptx::copy_box(to + i * kRows / kTileRows * S::kTileBytes, maps.weights[kGeglu ? i : origin.weight],
                        line * S::kTileBytes, origin.row / kTileRows, full(stage), policy);
        }
      }
    }
  } else {
    ptx::acquire_registers<240>();
    Sum sums[kTiles][kTokens / 2] = {};
    // The products of one chunk run while the next chunk's operands are converted. Int8 operands need no conversion: a
    // whole line is multiplied at once, and the other warpgroup's products hide its loads.
    constexpr int kTogether = Type::kBytes == 1 ? S::kChunks : 1;
    Operand<Type> operands[S::kChunks][kTiles];
    for (int line = begin; line < end; ++line) {
      const int turn = line - begin, stage = turn % S::kCount;
      const unsigned char* here = stages + stage * S::kBytes;
      ptx::barrier_wait(full(stage), turn / S::kCount % 2);
#pragma unroll
      for (int first = 0; first < S::kChunks; first += kTogether) {
#pragma unroll
        for (int c = first; c < first + kTogether; ++c) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const int tile = (kGeglu ? i * kGroups + group : group * kTiles + i) * 4 + warp;
            const unsigned char* from = here + kTokens * kLine + tile * S::kTileBytes + c * kChunkBytes + lane * 16;
            operands[c][i] = Operand<Type>(*reinterpret_cast<const uint4*>(from));
          }
        }
        ptx::products_begin();
#pragma unroll
        for (int part = first * Type::kBytes; part < (first + kTogether) * Type::kBytes;
             ++part) {  // 32 bytes of a row of x
          const uint64_t b = matrix_at(ptx::shared_address(here) + part * 32);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            multiply<Type>(sums[i], operands[part / Type::kBytes][i].words + part % Type::kBytes * 4, b);
          }
        }
        ptx::products_commit();
        ptx::products_wait<kTogether == S::kChunks ? 0 : 1>();
        if (first == 0 && turn > 0) {  // the products have read the previous stage
          __syncwarp();
          if (lane == 0) ptx::barrier_arrive(empty((turn - 1) % S::kCount));
        }
      }
    }
    ptx::products_wait<0>();

    // Pass the results through shared memory, so that neighbouring threads write neighbouring columns of y.
    ptx::sync_threads(kGroups * 128);
    uint32_t* results = reinterpret_cast<uint32_t*>(stages);
    stage_results<Type, false, kGeglu, kRows, kTokens / 8>(
        p, origin, first_token, 0, results,
        [&](int i) { return origin.row + (kGeglu ? group : group * kTiles + i) * 64 + warp * kTileRows; },
        [&](int i, int j, int e) { return sums[i][j * 4 + e]; });
    ptx::sync_threads(kGroups * 128);
    store_results<kTokens, kRows, kGroups * 128>(p, origin, first_token, results, thread);
  }
#endif
}

template <class Type, int kTokens, bool kGeglu>
void launch(const Product& p, cudaStream_t stream) {
  using S = Stage<Type, kTokens>;
  constexpr int kRows = kGroups * 64 * (kGeglu ? 1 : kTiles);
  constexpr int kResults = kTokens * kStride<kRows> * 4, kAll = S::kCount * (S::kBytes + 16);
  static_assert(kResults <= kAll && kAll <= 227 * 1024);
  const int chunks = chunks_of(p);
  Maps maps{};
  maps.x = ptx::describe(p.x, p.m, Type::kBytes == 1 ? chunks * kChunk : p.k * Type::kBytes, kTokens, kLine, true);
  for (int i = 0; i < p.count; ++i) {
    const int tiles = (p.weights[i].n + kTileRows - 1) / kTileRows;
    maps.weights[i] =
        ptx::describe(p.weights[i].data, tiles, int64_t(chunks) * kChunkBytes, kRows / kTileRows, S::kTileBytes, false);
  }
  ptx::launch(many_rows_sm90_kernel<Type, kTokens, kGeglu>,
              dim3((p.m + kTokens - 1) / kTokens, blocks_of(p, kRows), p.num_splits), kThreads, kAll, stream, p, maps);
}

}  // namespace

void many_rows_sm90(const Product& p, cudaStream_t stream) {
  const auto with_tokens = [&](auto type) {
    using Type = decltype(type);
    if (tile_tokens_sm90(p) == 144) {
      p.geglu ? launch<Type, 144, true>(p, stream) : launch<Type, 144, false>(p, stream);
    } else {
      p.geglu ? launch<Type, 128, true>(p, stream) : launch<Type, 128, false>(p, stream);
    }
  };
  if (p.int8_activations) {
    with_tokens(Int8{});
  } else if (p.x_type == Float::kFloat16) {
    with_tokens(Float16{});
  } else {
    with_tokens(BFloat16{});
  }
}

}  // namespace pg_kernels::cuda
