// What a decoder does besides matrix products, for a few tokens: calls so short that PyTorch's own cost of several
// would be most.
#pragma once

#include <cstdint>

#include "cpu/instruction_sets.h"

namespace pg_kernels {

// y = total / sqrt(mean(total²) + eps) · (offset + weight), total = x + residual, rounded as it is stored.
struct RmsNorm {
  int64_t rows, columns;
  Float type, weight_type;
  const void* x;         // [rows, columns], as all of them but the weight
  const void* residual;  // or null
  const void* weight;    // [columns]
  void* y;
  void* total;  // null without residual
  float* rstd;  // [rows]: 1 / sqrt(mean(total²) + eps)
  float eps, offset;
};

// y = gelu(gate) · up, GELU in its tanh form; with `grad`, what it gives to gate and up.
struct Geglu {
  int64_t count;  // of all of them
  Float type;
  const void* gate;
  const void* up;
  const void* grad;  // null in the forward pass
  void* y;           // null in the backward pass where it is not wanted, as the others in the forward pass
  void* grad_gate;
  void* grad_up;
};

// A tensor [B, H, S, D] whose rows are contiguous; strides in elements.
struct Heads {
  void* data;
  int64_t count;  // H
  int64_t strides[3];
};

// Turns q and k by position · theta^(−2i/D), and puts k and v into caches [B, H, capacity, D] at cache_positions.
struct Rotary {
  int64_t batch, length, dim;
  Float type, cache_type;
  Heads q, k, v, q_out, k_cache, v_cache;
  const int64_t* positions;  // [B, S], as cache_positions
  const int64_t* cache_positions;
  const float* frequencies;  // [D / 2]
};

// A few queries against keys and values that are seen or not by themselves; the contract is prefix_lm_attention's.
struct Attention {
  int64_t batch, queries, keys, dim;
  Float type;
  Heads q, k, v, out;
  const int64_t*
      prefix_ends;  // [B], as the others: where the prefix ends, keys begin and end, and the first query stands
  const int64_t* starts;
  const int64_t* ends;
  const int64_t* q_starts;
  bool causal;
  float scale, softcap;  // 0: no softcap
  int64_t window;        // 0: none
};

}  // namespace pg_kernels
