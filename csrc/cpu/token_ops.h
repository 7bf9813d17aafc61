// What a decoder computes besides matrix products, for a few tokens. These calls are so short that the overhead of
// several PyTorch calls would dominate.
#pragma once

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace pg_kernels {

// y = total / sqrt(mean(total²) + eps) · (offset + weight) with total = x + residual, rounded to its type first.
struct RmsNorm {
  int64_t rows, columns;
  Float type, weight_type;
  const void* x;         // [rows, columns], as every tensor but weight and rstd
  const void* residual;  // or null
  const void* weight;    // [columns]
  void* y;
  void* total;  // null without residual
  float* rstd;  // [rows]: 1 / sqrt(mean(total²) + eps)
  float eps, offset;
};

// y = gelu(gate) · up with the tanh form of GELU. With `grad`, the gradient of y, also the gradients of gate and up.
struct Geglu {
  int64_t count;  // elements of each tensor
  Float type;
  const void* gate;
  const void* up;
  const void* grad;  // null in the forward pass
  void* y;           // may be null in the backward pass; grad_gate and grad_up are null in the forward pass
  void* grad_gate;
  void* grad_up;
};

// A tensor [B, H, S, D] whose rows are contiguous; strides in elements.
struct Heads {
  void* data;
  int64_t count;  // H
  int64_t strides[3];
};

// Rotates q and k by the angles position · theta^(−2i/D), and writes k and v into caches [B, H, capacity, D] at
// cache_positions.
struct Rotary {
  int64_t batch, length, dim;
  Float type, cache_type;
  Heads q, k, v, q_out, k_cache, v_cache;
  const int64_t* positions;        // [B, S]
  const int64_t* cache_positions;  // [B, S]
  const float* frequencies;        // [D / 2]: theta^(−2i/D)
};

// Attention of a few queries. The visibility of keys is the contract of prefix_lm_attention.
struct Attention {
  int64_t batch, queries, keys, dim;
  Float type;
  Heads q, k, v, out;
  const int64_t* prefix_ends;  // [B]: the key after the prefix
  const int64_t* starts;       // [B]: the first key
  const int64_t* ends;         // [B]: the key after the last
  const int64_t* q_starts;     // [B]: position of the first query
  bool causal;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

}  // namespace pg_kernels
