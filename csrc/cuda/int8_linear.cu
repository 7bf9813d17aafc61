// The choice of the product's kernel, and the kernels around it.
#include "cuda/fragments.h"

namespace pg_kernels::cuda {

namespace {

constexpr int kThreads = 256;

// Returns the byte of half a chunk that holds a column: columns 2t, 2t + 8, 2t + 1 and 2t + 9 lie together.
__device__ int offset_in_half(int column) { return column % 8 / 2 * 4 + column % 2 * 2 + column / 8; }

// One block quantises one row of x.
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const void* x, Float type, int k, int8_t* q, float* scale) {
  const int64_t row = blockIdx.x;
  const int padded = (k + kChunk - 1) / kChunk * kChunk;
  float absmax = 0.0f;
  bool finite = true;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const float value = fabsf(load_float(x, row * k + i, type));
    finite = finite && value < INFINITY;  // false for NaN
    absmax = fmaxf(absmax, value);
  }
  absmax = ptx::warp_max(absmax);
  float* warp_absmax = reinterpret_cast<float*>(ptx::shared());
  if (threadIdx.x % 32 == 0) warp_absmax[threadIdx.x / 32] = absmax;
  const bool bad = ptx::block_any(!finite);
  for (int i = 0; i < kThreads / 32; ++i) absmax = fmaxf(absmax, warp_absmax[i]);
  const float step = ptx::divide(absmax, 127.0f);
  if (threadIdx.x == 0) scale[row] = bad ? NAN : step;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    float level = 0.0f;
    if (i < k && step > 0.0f && !bad) level = rintf(ptx::divide(load_float(x, row * k + i, type), step));
    q[row * padded + i / 16 * 16 + offset_in_half(i % 16)] = int8_t(fminf(fmaxf(level, -127.0f), 127.0f));
  }
}

// One block dequantises the row at one index.
__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(const uint8_t* data, const float* scale, const int64_t* indices, int64_t n, int k, int group,
                           void* out, Float type) {
  const int64_t row = indices[blockIdx.x];
  const bool valid = row >= 0 && row < n;
  const int chunks = (k + kChunk - 1) / kChunk, groups = (k + group - 1) / group;
  const int in_tile = int(row % kTileRows);
  const uint8_t* tile = data + row / kTileRows * chunks * kChunkBytes + in_tile / 8 * 8;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    float value = NAN;
    if (valid) {
      const int byte = offset_in_half(i % 16), lane = in_tile % 8 * 4 + byte / 4;
      const uint8_t q = tile[i / kChunk * kChunkBytes + lane * 16 + i % kChunk / 16 * 4 + byte % 4];
      value = ptx::multiply(float(int8_t(q)), scale[row * groups + i / group]);
    }
    store_float(out, int64_t(blockIdx.x) * k + i, type, value);
  }
}

// One warp dequantises one chunk of one tile.
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* data, const float* scale, int64_t n, int k, int group, void* out, Float type) {
  const int lane = threadIdx.x % 32, chunk = blockIdx.y * (kThreads / 32) + threadIdx.x / 32;
  const int64_t tile = blockIdx.x;
  const int chunks = (k + kChunk - 1) / kChunk, groups = (k + group - 1) / group;
  if (chunk >= chunks) return;
  const uint4 w = ptx::load16(data + (tile * chunks + chunk) * kChunkBytes + lane * 16);
  const uint32_t words[] = {w.x, w.y, w.z, w.w};
  for (int half = 0; half < 2; ++half) {  // of the rows
    const int64_t row = tile * kTileRows + half * 8 + lane / 4;
    if (row >= n) continue;
    for (int i = 0; i < 8; ++i) {
      const int byte = i % 2 * 2 + i / 2 % 2;  // so that neighbours in the row follow each other
      const int column = chunk * kChunk + i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
      const float q = float(int8_t(words[half * 2 + i / 4] >> byte * 8));
      if (column < k) store_float(out, row * k + column, type, ptx::multiply(q, scale[row * groups + column / group]));
    }
  }
}

// One block adds the splits' sums, in their order, of one token and kThreads rows of the weights.
template <class Type, bool kGrouped>
__global__ void __launch_bounds__(kThreads) reduce_split_k_kernel(const Product p) {
  using Sum = typename Accumulator<Type, kGrouped>::Sum;
  const int64_t token = blockIdx.x, rows = rows_before(p, p.count);
  int64_t row = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (row >= rows) return;
  Sum sum = 0;
  for (int s = 0; s < p.num_splits; ++s)
    sum += reinterpret_cast<const Sum*>(p.partial)[(s * int64_t(p.m) + token) * rows + row];
  int which = 0;
  while (row >= p.weights[which].n) row -= p.weights[which++].n;
  const Weight& weight = p.weights[which];
  const float y = Epilogue<Type, kGrouped>(p, weight, int(row))(float(sum), row_scale_of<Type>(p, token));
  store_float(weight.y, token * weight.n + row, p.y_type, y);
}

constexpr int kFewRows = 16;

// Hopper's kernel has larger tiles, which need enough rows of x, and takes one scale for each row of a weight.
bool uses_sm90(const Product& p, int device) {
  return p.m > 64 && p.group >= p.k && ptx::compute_capability(device) == 90;
}

void reduce_split_k(const Product& p, cudaStream_t stream) {
  dispatch_type(p, [&](auto type, auto grouped) {
    const dim3 blocks(p.m, unsigned((rows_before(p, p.count) + kThreads - 1) / kThreads));
    ptx::launch(reduce_split_k_kernel<decltype(type), decltype(grouped)::value>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace

int num_splits(const Product& p, int device) {
  if (p.m <= kFewRows || p.geglu) return 1;
  const bool sm90 = uses_sm90(p, device);
  const int tokens = sm90 ? tile_tokens_sm90(p) : tile_tokens(p), rows = sm90 ? 256 : 128;
  const int blocks = (p.m + tokens - 1) / tokens * blocks_of(p, rows);
  const int per_multiprocessor = sm90 ? 1 : blocks_per_multiprocessor(tokens, p.int8_activations, p.group < p.k);
  int splits = ptx::multiprocessors(device) * per_multiprocessor / (blocks > 0 ? blocks : 1);
  // A block needs at least four lines of x (128 bytes of a row each) to be worth its start.
  const int lines = (p.int8_activations ? p.k : 2 * p.k) / 128;
  if (splits > lines / 4) splits = lines / 4;
  return splits < 1 ? 1 : splits > 16 ? 16 : splits;
}

void int8_linear(const Product& p, int device, uintptr_t stream) {
  const ptx::OnDevice guard(device);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (p.m <= kFewRows) {
    few_rows(p, on);
  } else {
    uses_sm90(p, device) ? many_rows_sm90(p, on) : many_rows(p, on);
    if (p.num_splits > 1) reduce_split_k(p, on);
  }
}

void quantize_rows(const void* x, Float type, int64_t m, int k, int8_t* q, float* scale, int device, uintptr_t stream) {
  const ptx::OnDevice guard(device);
  ptx::launch(quantize_rows_kernel, dim3(unsigned(m)), kThreads, kThreads / 32 * 4,
              reinterpret_cast<cudaStream_t>(stream), x, type, k, q, scale);
}

void dequantize(const uint8_t* data, const float* scale, int64_t n, int k, int group, void* out, Float type, int device,
                uintptr_t stream) {
  const ptx::OnDevice guard(device);
  const int chunks = (k + kChunk - 1) / kChunk;
  // Tiles go along the grid's x: its y and z hold at most 65,535 blocks.
  const dim3 blocks(unsigned((n + kTileRows - 1) / kTileRows), (chunks + kThreads / 32 - 1) / (kThreads / 32));
  ptx::launch(dequantize_kernel, blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream), data, scale, n, k, group,
              out, type);
}

void dequantize_rows(const uint8_t* data, const float* scale, const int64_t* indices, int64_t count, int64_t n, int k,
                     int group, void* out, Float type, int device, uintptr_t stream) {
  const ptx::OnDevice guard(device);
  ptx::launch(dequantize_rows_kernel, dim3(unsigned(count)), kThreads, 0, reinterpret_cast<cudaStream_t>(stream), data,
              scale, indices, n, k, group, out, type);
}

}  // namespace pg_kernels::cuda
