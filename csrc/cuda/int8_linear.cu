// Dispatch, and the kernels around the product.
#include "cuda/fragments.h"

namespace pg_kernels::cuda {

namespace {

constexpr int kThreads = 256;

// The byte of a chunk's half where a column goes: columns 2t, 2t + 8, 2t + 1, 2t + 9 lie together.
__device__ int place_in_half(int column) { return column % 8 / 2 * 4 + column % 2 * 2 + column / 8; }

__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const void* x, Float type, int k, int8_t* q, float* scale) {
  const int64_t row = blockIdx.x;
  const int padded = (k + kChunk - 1) / kChunk * kChunk;
  float highest = 0.0f;
  bool finite = true;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    const float value = fabsf(load_float(x, row * k + i, type));
    finite = finite && value < INFINITY;  // false for NaN
    highest = fmaxf(highest, value);
  }
  highest = ptx::highest_of_warp(highest);
  float* highest_of = reinterpret_cast<float*>(ptx::shared());
  if (threadIdx.x % 32 == 0) highest_of[threadIdx.x / 32] = highest;
  const bool bad = ptx::any_of_block(!finite);
  for (int i = 0; i < kThreads / 32; ++i) highest = fmaxf(highest, highest_of[i]);
  const float step = ptx::divide(highest, 127.0f);
  if (threadIdx.x == 0) scale[row] = bad ? NAN : step;
  for (int i = threadIdx.x; i < padded; i += kThreads) {
    float level = 0.0f;
    if (i < k && step > 0.0f && !bad) level = rintf(ptx::divide(load_float(x, row * k + i, type), step));
    q[row * padded + i / 16 * 16 + place_in_half(i % 16)] = int8_t(fminf(fmaxf(level, -127.0f), 127.0f));
  }
}

__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(const uint8_t* data, const float* scale, const int64_t* indices, int64_t n, int k, int group,
                           void* out, Float type) {
  const int64_t row = indices[blockIdx.x];
  const bool there = row >= 0 && row < n;
  const int chunks = (k + kChunk - 1) / kChunk, groups = (k + group - 1) / group;
  const int in_tile = int(row % kTileRows);
  const uint8_t* tile = data + row / kTileRows * chunks * kChunkBytes + in_tile / 8 * 8;
  for (int i = threadIdx.x; i < k; i += kThreads) {
    float value = NAN;
    if (there) {
      const int byte = place_in_half(i % 16), lane = in_tile % 8 * 4 + byte / 4;
      const uint8_t q = tile[i / kChunk * kChunkBytes + lane * 16 + i % kChunk / 16 * 4 + byte % 4];
      value = ptx::multiply(float(int8_t(q)), scale[row * groups + i / group]);
    }
    store_float(out, int64_t(blockIdx.x) * k + i, type, value);
  }
}

// A chunk for each warp.
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
      const int byte = i % 2 * 2 + i / 2 % 2;  // neighbours in the row, one after the other
      const int column = chunk * kChunk + i / 4 * 16 + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
      const float q = float(int8_t(words[half * 2 + i / 4] >> byte * 8));
      if (column < k) store_float(out, row * k + column, type, ptx::multiply(q, scale[row * groups + column / group]));
    }
  }
}

// The parts' sums, in their order, of a token and kThreads rows of the weights.
template <class Type, bool kGrouped>
__global__ void __launch_bounds__(kThreads) add_parts_kernel(const Product p) {
  using Sum = typename Accumulator<Type, kGrouped>::Sum;
  const int64_t token = blockIdx.x, rows = rows_before(p, p.count);
  int64_t row = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (row >= rows) return;
  Sum sum = 0;
  for (int s = 0; s < p.splits; ++s)
    sum += reinterpret_cast<const Sum*>(p.parts)[(s * int64_t(p.m) + token) * rows + row];
  int which = 0;
  while (row >= p.weights[which].n) row -= p.weights[which++].n;
  const Weight& weight = p.weights[which];
  const float y = Finish<Type, kGrouped>(p, weight, int(row))(float(sum), row_scale_of<Type>(p, token));
  store_float(weight.y, token * weight.n + row, p.y_type, y);
}

constexpr int kFewRows = 16;

// Hopper's kernel needs enough rows to be worth its larger tiles, and one scale for each row of a weight.
bool takes_sm90(const Product& p, int device) {
  return p.m > 64 && p.group >= p.k && ptx::compute_capability(device) == 90;
}

void add_parts(const Product& p, cudaStream_t stream) {
  with_type(p, [&](auto type, auto grouped) {
    const dim3 blocks(p.m, unsigned((rows_before(p, p.count) + kThreads - 1) / kThreads));
    ptx::launch(add_parts_kernel<decltype(type), decltype(grouped)::value>, blocks, kThreads, 0, stream, p);
  });
}

}  // namespace

int splits_for(const Product& p, int device) {
  if (p.m <= kFewRows || p.geglu) return 1;
  const bool sm90 = takes_sm90(p, device);
  const int tokens = sm90 ? tile_tokens_sm90(p) : tile_tokens(p), rows = sm90 ? 256 : 128;
  const int blocks = (p.m + tokens - 1) / tokens * blocks_of(p, rows);
  const int at_once = sm90 ? 1 : blocks_at_once(tokens, p.int8_activations, p.group < p.k);
  int splits = ptx::multiprocessors(device) * at_once / (blocks > 0 ? blocks : 1);
  // Of lines of x a block needs some to be worth its start.
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
    takes_sm90(p, device) ? many_rows_sm90(p, on) : many_rows(p, on);
    if (p.splits > 1) add_parts(p, on);
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
  // Tiles in x: y and z have no more than 65,535 blocks.
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
