// The product for up to 16 rows of x, which waits for the weights to come from memory. Each warp streams chunks of the
// weights straight into registers, several ahead. The warps of a block share the sum over k.
#include "cuda/fragments.h"

namespace pg_kernels::cuda {

namespace {

constexpr int kWarps = 16;

// One block computes kTokens tiles of 8 rows of x times kTiles tiles of 16 rows of each weight.
template <class Type, int kTokens, int kTiles, bool kGeglu, bool kGrouped>
__global__ void __launch_bounds__(kWarps * 32, kTokens == 1 ? 2 : 1) few_rows_kernel(const Product p) {
  using Sums = Accumulator<Type, kGrouped>;
  constexpr int kStreams = kTiles * (kGeglu ? 2 : 1);
  // With 8 rows of x a block has 32 KB of weights in flight, and a multiprocessor holds two blocks: one streams while
  // the other starts or adds up, which with 2,048 columns takes as long as streaming its chunks. With 16 rows the
  // registers hold one block, with 48 KB in flight.
  constexpr int kAhead = kTokens == 1 ? 4 / kStreams : 3;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row_in_tile = lane / 4, quad = lane % 4;
  const BlockOrigin origin = block_origin(p, blockIdx.x, kTiles * kTileRows);
  const int chunks = chunks_of(p);

  // Stream s is a tile of one weight. With geglu the streams of the second weight follow those of the first.
  const auto weight_of = [&](int s) -> const Weight& { return p.weights[kGeglu ? s / kTiles : origin.weight]; };
  const auto row_of = [&](int s) { return origin.row + s % kTiles * kTileRows; };
  const uint8_t* streams[kStreams];
  Scales<kGrouped> scales[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    streams[s] = tile_of(weight_of(s), row_of(s), chunks, lane) + warp * kChunkBytes;
    scales[s].find(p, weight_of(s), row_of(s) + row_in_tile);
  }

  // Instructions must not take longer than loading the weights: every load is at a constant distance from a pointer,
  // and one comparison tells whether it is in range. Words of x, 16 bytes of a row apart, end with the row.
  constexpr int kBytes = kChunk * Type::kBytes;
  const uint64_t policy = ptx::evict_first();
  int chunks_left = chunks - warp, bytes_left[kTokens];
  const uint8_t* rows[kTokens];
  for (int i = 0; i < kTokens; ++i) {
    const int token = i * 8 + row_in_tile, width = Type::kBytes == 1 ? chunks * kChunk : p.k * Type::kBytes;
    rows[i] = static_cast<const uint8_t*>(p.x) + int64_t(token) * width + warp * kBytes + quad * 4;
    bytes_left[i] = token < p.m ? width - warp * kBytes : 0;
  }
  uint4 weights[kAhead][kStreams] = {};
  uint32_t x[kAhead][kTokens][kWords<Type>];
  const auto load = [&](int stage, int ahead) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
      // Past the last chunk x is zero: the weights may keep their old values.
      if (chunks_left > ahead) weights[stage][s] = ptx::load_streaming(streams[s] + ahead * kChunkBytes, policy);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int w = 0; w < kWords<Type>; ++w) {
        const int byte = ahead * kBytes + w * 16;
        x[stage][i][w] = bytes_left[i] > byte ? ptx::load4(rows[i] + byte) : 0u;
      }
    }
  };

  Sums sums[kStreams][kTokens];
  constexpr int kTurn = kAhead * kWarps;
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) load(stage, stage * kWarps);
  for (int first = warp; first < chunks; first += kTurn) {
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
#pragma unroll
      for (int s = 0; s < kStreams; ++s) {
        float scale[2] = {};
        const int chunk = first + stage * kWarps;
        if (chunk < chunks) scales[s].load(p, chunk, scale);
        const Operand<Type> operand(weights[stage][s]);
#pragma unroll
        for (int i = 0; i < kTokens; ++i) sums[s][i].add(operand, x[stage][i], scale);
      }
      load(stage, kTurn + stage * kWarps);
    }
    chunks_left -= kTurn;
    for (int s = 0; s < kStreams; ++s) streams[s] += kTurn * kChunkBytes;
    for (int i = 0; i < kTokens; ++i) {
      rows[i] += kTurn * kBytes;
      bytes_left[i] -= kTurn * kBytes;
    }
  }

  // Add the warps' sums in a fixed order: every run gives the same bits.
  using Sum = typename Sums::Sum;
  Sum* partial = reinterpret_cast<Sum*>(ptx::shared());  // [warps][streams][tokens][4][lanes]
  constexpr int kPartialSize = kStreams * kTokens * 4 * 32;
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        partial[warp * kPartialSize + ((s * kTokens + i) * 4 + j) * 32 + lane] = sums[s][i].sums[j];
      }
    }
  }
  __syncthreads();
  const auto total = [&](int s, int row, int token) {
    const int at = ((s * kTokens + token / 8) * 4 + row / 8 * 2 + token % 2) * 32 + row % 8 * 4 + token % 8 / 2;
    Sum sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[w * kPartialSize + at];
    return float(sum);
  };
  for (int i = threadIdx.x; i < kTiles * kTileRows * kTokens * 8; i += kWarps * 32) {
    const int block_row = i % (kTiles * kTileRows), token = i / (kTiles * kTileRows);
    const int tile = block_row / kTileRows, row = origin.row + block_row;
    const Weight& weight = weight_of(0);
    if (row >= weight.n || token >= p.m) continue;
    const float row_scale = row_scale_of<Type>(p, token);
    float y = Epilogue<Type, kGrouped>(p, weight, row)(total(tile, block_row % kTileRows, token), row_scale);
    if (kGeglu) {
      const float up = total(kTiles + tile, block_row % kTileRows, token);
      y = gelu(y) * Epilogue<Type, kGrouped>(p, p.weights[1], row)(up, row_scale);
    }
    store_float(weight.y, int64_t(token) * weight.n + row, p.y_type, y);
  }
}

template <class Type, int kTokens, int kTiles, bool kGeglu, bool kGrouped>
void launch(const Product& p, cudaStream_t stream) {
  const int shared = kWarps * kTiles * (kGeglu ? 2 : 1) * kTokens * 4 * 32 * 4;
  ptx::launch(few_rows_kernel<Type, kTokens, kTiles, kGeglu, kGrouped>, dim3(blocks_of(p, kTiles * kTileRows)),
              kWarps * 32, shared, stream, p);
}

}  // namespace

void few_rows(const Product& p, cudaStream_t stream) {
  dispatch_type(p, [&](auto type, auto grouped) {
    using Type = decltype(type);
    constexpr bool kGrouped = decltype(grouped)::value;
    // Every block reads x from the L2 cache again: with more rows of x a block takes more rows of a weight.
    if (p.m <= 8) {
      p.geglu ? launch<Type, 1, 1, true, kGrouped>(p, stream) : launch<Type, 1, 1, false, kGrouped>(p, stream);
    } else {
      p.geglu ? launch<Type, 2, 1, true, kGrouped>(p, stream) : launch<Type, 2, 2, false, kGrouped>(p, stream);
    }
  });
}

}  // namespace pg_kernels::cuda
