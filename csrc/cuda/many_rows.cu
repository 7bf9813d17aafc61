// The product for more than 16 rows of x: tiles of x go through shared memory, weights straight into registers.
#include "cuda/fragments.h"

namespace pg_kernels::cuda {

namespace {

constexpr int kWarpsOfRows = 4, kWarpsOfTokens = 2, kThreads = kWarpsOfRows * kWarpsOfTokens * 32;
constexpr int kStages = 4;
constexpr int kLine = 128;  // bytes of a row of x at once
constexpr int kTiles = 2;   // tiles of weights of a warp: two of one weight, or one of each with geglu

// Permutes the segments of 16 bytes within a line, so that 8 rows of a matrix lie in different banks.
__device__ uint32_t swizzled(int token, int segment) { return token * kLine + ((segment ^ (token % 8)) * 16); }

// One block computes kTokens rows of x times kRows rows of a weight (of each weight with geglu), over one split of k.
template <class Type, int kTokens, bool kGeglu, bool kGrouped>
__global__ void __launch_bounds__(kThreads, blocks_per_multiprocessor(kTokens, Type::kBytes == 1, kGrouped))
    many_rows_kernel(const Product p) {
  constexpr int kChunks = kLine / (kChunk * Type::kBytes);  // of a line
  constexpr int kTokenTiles = kTokens / kWarpsOfTokens / 8;
  constexpr int kRows = kWarpsOfRows * kTileRows * (kGeglu ? 1 : kTiles);
  using Sums = Accumulator<Type, kGrouped>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % kWarpsOfRows, warp_token = warp / kWarpsOfRows * (kTokens / kWarpsOfTokens);
  const BlockOrigin origin = block_origin(p, blockIdx.y, kRows);
  const int64_t first_token = int64_t(blockIdx.x) * kTokens;
  const int chunks = chunks_of(p), lines = (chunks + kChunks - 1) / kChunks;
  const int begin = lines * int(blockIdx.z) / p.num_splits, end = lines * int(blockIdx.z + 1) / p.num_splits;
  const int width = Type::kBytes == 1 ? chunks * kChunk : p.k * Type::kBytes;

  const auto weight_of = [&](int tile) -> const Weight& { return p.weights[kGeglu ? tile : origin.weight]; };
  const auto row_of = [&](int tile) { return origin.row + (kGeglu ? warp_row : warp_row * kTiles + tile) * kTileRows; };
  const uint8_t* tiles[kTiles];
  Scales<kGrouped> scales[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    tiles[i] = tile_of(weight_of(i), row_of(i), chunks, lane) + int64_t(begin) * kChunks * kChunkBytes;
    scales[i].find(p, weight_of(i), row_of(i) + lane / 4);
  }

  // Addresses are at constant distances from pointers that advance once a line. Computing each address took more
  // instructions than the rest of the loop.
  constexpr int kSegments = kLine / 16, kTogether = kThreads / kSegments;  // tokens that the block copies at once
  const int block_token = threadIdx.x / kSegments, segment = threadIdx.x % kSegments;
  const uint8_t* from =
      static_cast<const uint8_t*>(p.x) + (first_token + block_token) * width + int64_t(begin) * kLine + segment * 16;
  const int64_t tokens_left = p.m - first_token - block_token, step = int64_t(kTogether) * width;
  int bytes_left = min_of(width, end * kLine) - begin * kLine - segment * 16;
  int chunks_left = min_of(chunks, end * kChunks) - begin * kChunks;
  const uint32_t stages = ptx::shared_address(ptx::shared()), to = stages + swizzled(block_token, segment);
  const auto copy_line = [&](int line, int ahead) {
#pragma unroll
    for (int i = 0; i < kTokens / kTogether; ++i) {
      ptx::copy_async(to + unsigned(line + ahead) % kStages * (kTokens * kLine) + i * kTogether * kLine,
                      from + i * step + ahead * kLine, bytes_left > ahead * kLine && tokens_left > i * kTogether);
    }
    ptx::copies_commit();
  };
  // Past the last chunk x is zero, or nothing is multiplied: the weights may keep their old values.
  uint4 weights[kTiles][kChunks] = {};
  const auto load_weights = [&](int i, int c, int ahead) {
    const int chunk = ahead * kChunks + c;
    if (chunks_left > chunk) weights[i][c] = ptx::load16(tiles[i] + chunk * kChunkBytes);
  };

  Sums sums[kTiles][kTokenTiles];
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_line(begin, i);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_weights(i, c, 0);
  }
  for (int line = begin; line < end; ++line) {
    ptx::copies_wait<kStages - 2>();
    __syncthreads();  // this line is visible to all warps, and none reads the line that the next copy overwrites
    copy_line(line, kStages - 1);
    const uint32_t stage = stages + unsigned(line) % kStages * (kTokens * kLine);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 64 bytes of a row: four matrices
      constexpr int kChunksOfHalf = kChunks / 2;
      const uint32_t matrices = stage + swizzled(warp_token + lane % 8, half * 4 + lane / 8);
#pragma unroll
      for (int c = 0; c < kChunksOfHalf; ++c) {
        const int chunk_of_line = half * kChunksOfHalf + c;
        float scale[kTiles][2] = {};
        Operand<Type> operands[kTiles];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (chunks_left > chunk_of_line) scales[i].load(p, line * kChunks + chunk_of_line, scale[i]);
          operands[i] = Operand<Type>(weights[i][chunk_of_line]);
          load_weights(i, chunk_of_line, 1);
        }
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          uint32_t x[4];
          ptx::load_matrices(matrices + j * 8 * kLine, x);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) sums[i][j].add(operands[i], x + c * kWords<Type>, scale[i]);
        }
      }
    }
    from += kLine;
    bytes_left -= kLine;
    chunks_left -= kChunks;
    for (int i = 0; i < kTiles; ++i) tiles[i] += kChunks * kChunkBytes;
  }

  // Pass the results through shared memory, so that neighbouring threads write neighbouring columns of y.
  ptx::copies_wait<0>();
  __syncthreads();
  uint32_t* results = reinterpret_cast<uint32_t*>(ptx::shared());
  stage_results<Type, kGrouped, kGeglu, kRows, kTokenTiles>(p, origin, first_token, warp_token, results, row_of,
                                                            [&](int i, int j, int e) { return sums[i][j].sums[e]; });
  __syncthreads();
  store_results<kTokens, kRows, kThreads>(p, origin, first_token, results, threadIdx.x);
}

template <class Type, int kTokens, bool kGeglu, bool kGrouped>
void launch(const Product& p, cudaStream_t stream) {
  constexpr int kRows = kWarpsOfRows * kTileRows * (kGeglu ? 1 : kTiles);
  constexpr int kCopies = kStages * kTokens * kLine, kResults = kTokens * kStride<kRows> * 4;
  // Blocks that share a weight run side by side, so that it stays in the L2 cache.
  ptx::launch(many_rows_kernel<Type, kTokens, kGeglu, kGrouped>,
              dim3((p.m + kTokens - 1) / kTokens, blocks_of(p, kRows), p.num_splits), kThreads,
              kCopies > kResults ? kCopies : kResults, stream, p);
}

}  // namespace

void many_rows(const Product& p, cudaStream_t stream) {
  dispatch_type(p, [&](auto type, auto grouped) {
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
