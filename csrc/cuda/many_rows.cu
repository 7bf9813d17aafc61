// More rows of x than a tensor core takes at once: tiles of x wait in shared memory, weights come into registers.
#include "cuda/fragments.h"

namespace pg_kernels::cuda {

namespace {

constexpr int kWarpsOfRows = 4, kWarpsOfTokens = 2, kThreads = kWarpsOfRows * kWarpsOfTokens * 32;
constexpr int kStages = 4;
constexpr int kLine = 128;  // bytes of a row of x at once
constexpr int kTiles = 2;   // of a warp: two of one weight, or one of each with geglu

// Segments of 16 bytes change places within a line, so that 8 rows of a matrix lie in different banks.
__device__ int swizzled(int token, int segment) { return token * kLine + ((segment ^ (token % 8)) * 16); }

template <class Type, int kTokens, bool kGeglu, bool kGrouped>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kTokens, Type::kBytes == 1, kGrouped))
    many_rows_kernel(const Product p) {
  constexpr int kChunks = kLine / (kChunk * Type::kBytes);  // of a line
  constexpr int kTokenTiles = kTokens / kWarpsOfTokens / 8;
  constexpr int kRows = kWarpsOfRows * kTileRows * (kGeglu ? 1 : kTiles);
  using Sums = Accumulator<Type, kGrouped>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % kWarpsOfRows, warp_token = warp / kWarpsOfRows * (kTokens / kWarpsOfTokens);
  const Place place = place_of(p, blockIdx.y, kRows);
  const int64_t first_token = int64_t(blockIdx.x) * kTokens;
  const int chunks = chunks_of(p), lines = (chunks + kChunks - 1) / kChunks;
  const int begin = lines * int(blockIdx.z) / p.splits, end = lines * int(blockIdx.z + 1) / p.splits;
  const int64_t width = Type::kBytes == 1 ? chunks * kChunk : p.k * Type::kBytes;

  const auto weight_of = [&](int tile) -> const Weight& { return p.weights[kGeglu ? tile : place.weight]; };
  const auto row_of = [&](int tile) { return place.row + (kGeglu ? warp_row : warp_row * kTiles + tile) * kTileRows; };
  const uint8_t* tiles[kTiles];
  Scales<kGrouped> scales[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    tiles[i] = tile_of(weight_of(i), row_of(i), chunks, lane);
    scales[i].find(p, weight_of(i), row_of(i) + lane / 4);
  }

  unsigned char* stages = ptx::shared();
  const auto copy_line = [&](int line) {
    if (line < end) {
      unsigned char* stage = stages + line % kStages * kTokens * kLine;
#pragma unroll
      for (int i = threadIdx.x; i < kTokens * (kLine / 16); i += kThreads) {
        const int token = i / (kLine / 16), segment = i % (kLine / 16);
        const int64_t from = int64_t(line) * kLine + segment * 16;
        const bool there = first_token + token < p.m && from < width;
        const uint8_t* x = static_cast<const uint8_t*>(p.x);
        ptx::copy_async(ptx::shared_address(stage + swizzled(token, segment)),
                        there ? x + (first_token + token) * width + from : x, there);
      }
    }
    ptx::copies_commit();
  };
  uint4 next[kTiles][kChunks];
  const auto load_weights = [&](int line) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int chunk = line * kChunks + c;
        next[i][c] = chunk < chunks ? ptx::load16(tiles[i] + int64_t(chunk) * kChunkBytes) : uint4{};
      }
    }
  };

  Sums sums[kTiles][kTokenTiles];
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_line(begin + i);
  load_weights(begin);
  for (int line = begin; line < end; ++line) {
    ptx::copies_wait<kStages - 2>();
    __syncthreads();  // this line is there for all, and nobody reads the one that the next copy overwrites
    copy_line(line + kStages - 1);
    uint4 now[kTiles][kChunks];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) now[i][c] = next[i][c];
    }
    load_weights(line + 1);
    const unsigned char* stage = stages + line % kStages * kTokens * kLine;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 64 bytes of a row are four matrices
      constexpr int kChunksOfHalf = kChunks / 2;
#pragma unroll
      for (int c = 0; c < kChunksOfHalf; ++c) {
        const int chunk_of_line = half * kChunksOfHalf + c, chunk = line * kChunks + chunk_of_line;
        float scale[kTiles][2] = {};
        if (chunk < chunks) {
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            scales[i].load(p, chunk, scale[i]);
          }
        }
        const Operand<Type> operands[kTiles] = {Operand<Type>(now[0][chunk_of_line]),
                                                Operand<Type>(now[1][chunk_of_line])};
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          uint32_t x[4];
          const int token = warp_token + j * 8 + lane % 8;
          ptx::load_matrices(ptx::shared_address(stage + swizzled(token, half * 4 + lane / 8)), x);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) sums[i][j].add(operands[i], x + c * kWords<Type>, scale[i]);
        }
      }
    }
  }

  // Through shared memory, so that neighbouring threads write neighbouring rows of the weight.
  ptx::copies_wait<0>();
  __syncthreads();
  uint32_t* results = reinterpret_cast<uint32_t*>(stages);
  put_results<Type, kGrouped, kGeglu, kRows, kTokenTiles>(p, place, first_token, warp_token, results, row_of,
                                                          [&](int i, int j, int e) { return sums[i][j].sums[e]; });
  __syncthreads();
  store_results<kTokens, kRows, kThreads>(p, place, first_token, results, threadIdx.x);
}

template <class Type, int kTokens, bool kGeglu, bool kGrouped>
void launch(const Product& p, cudaStream_t stream) {
  constexpr int kRows = kWarpsOfRows * kTileRows * (kGeglu ? 1 : kTiles);
  constexpr int kCopies = kStages * kTokens * kLine, kResults = kTokens * kStride<kRows> * 4;
  // Blocks that share a weight run side by side, and find it in the L2 cache.
  ptx::launch(many_rows_kernel<Type, kTokens, kGeglu, kGrouped>,
              dim3((p.m + kTokens - 1) / kTokens, blocks_of(p, kRows), p.splits), kThreads,
              kCopies > kResults ? kCopies : kResults, stream, p);
}

}  // namespace

void many_rows(const Product& p, cudaStream_t stream) {
  with_type(p, [&](auto type, auto grouped) {
    using Type = decltype(type);
    constexpr bool kGrouped = decltype(grouped)::value;
    if (tile_tokens(p) == 128) {
      p.geglu ? launch<Type, 128, true, false>(p, stream) : launch<Type, 128, false, false>(p, stream);
    } else {
      p.geglu ? launch<Type, 64, true, kGrouped>(p, stream) : launch<Type, 64, false, kGrouped>(p, stream);
    }
  });
}

}  // namespace pg_kernels::cuda
