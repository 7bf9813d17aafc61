// The ops of token_ops.h in plain loops. The compiler vectorises them for the instruction set of the including file.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/float_rows.h"
#include "cpu/parallel.h"
#include "cpu/token_ops.h"

namespace pg_kernels {

namespace {

constexpr int64_t kLanes = 16;  // partial sums of a reduction: the same order of additions with every instruction set
constexpr int64_t kChunk = 1024;
constexpr int64_t kMaxDim = 256;

inline float sum_of(const float* lanes) {
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

inline float dot(const float* a, const float* b, int64_t size) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (int64_t lane = 0; i + lane < size; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  return sum_of(lanes);
}

inline void rms_norm_row(void* context, int64_t row) {
  const RmsNorm& a = *static_cast<const RmsNorm*>(context);
  alignas(64) float x[kChunk], other[kChunk];
  float lanes[kLanes] = {};
  for (int64_t start = 0; start < a.columns; start += kChunk) {
    const int64_t size = min_of(kChunk, a.columns - start), offset = row * a.columns + start;
    load_floats(a.type, a.x, offset, size, x);
    if (a.residual != nullptr) {
      load_floats(a.type, a.residual, offset, size, other);
      for (int64_t i = 0; i < size; ++i) x[i] += other[i];
      store_floats(a.type, x, size, a.total, offset);
      load_floats(a.type, a.total, offset, size, x);
    }
    for (int64_t i = size; i % kLanes != 0; ++i) x[i] = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
    }
  }
  const float rstd = 1.0f / std::sqrt(sum_of(lanes) / float(a.columns) + a.eps);
  a.rstd[row] = rstd;
  for (int64_t start = 0; start < a.columns; start += kChunk) {
    const int64_t size = min_of(kChunk, a.columns - start), offset = row * a.columns + start;
    load_floats(a.type, a.residual == nullptr ? a.x : a.total, offset, size, x);
    load_floats(a.weight_type, a.weight, start, size, other);
    for (int64_t i = 0; i < size; ++i) x[i] = x[i] * rstd * (a.offset + other[i]);
    store_floats(a.type, x, size, a.y, offset);
  }
}

inline void run_rms_norm(const RmsNorm& a) {
  RmsNorm copy = a;
  if (a.rows * a.columns < 1 << 15) {
    for (int64_t row = 0; row < a.rows; ++row) rms_norm_row(&copy, row);
  } else {
    parallel_for(a.rows, rms_norm_row, &copy);
  }
}

inline void geglu_chunk(void* context, int64_t chunk) {
  const Geglu& a = *static_cast<const Geglu*>(context);
  alignas(64) float gate[kChunk], up[kChunk], grad[kChunk], gelu[kChunk];
  const int64_t start = chunk * kChunk, size = min_of(kChunk, a.count - start);
  load_floats(a.type, a.gate, start, size, gate);
  load_floats(a.type, a.up, start, size, up);
  if (a.grad == nullptr) {
    for (int64_t i = 0; i < size; ++i) gelu[i] = gelu_tanh(gate[i]);
  } else {
    load_floats(a.type, a.grad, start, size, grad);
    for (int64_t i = 0; i < size; ++i) gelu[i] = gelu_tanh_and_slope(gate[i], &gate[i]);
    for (int64_t i = 0; i < size; ++i) gate[i] *= grad[i] * up[i];
    store_floats(a.type, gate, size, a.grad_gate, start);
    for (int64_t i = 0; i < size; ++i) grad[i] *= gelu[i];
    store_floats(a.type, grad, size, a.grad_up, start);
  }
  if (a.y != nullptr) {
    for (int64_t i = 0; i < size; ++i) gelu[i] *= up[i];
    store_floats(a.type, gelu, size, a.y, start);
  }
}

inline void run_geglu(const Geglu& a) {
  Geglu copy = a;
  const int64_t chunks = (a.count + kChunk - 1) / kChunk;
  if (a.count < 1 << 15) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) geglu_chunk(&copy, chunk);
  } else {
    parallel_for(chunks, geglu_chunk, &copy);
  }
}

inline int64_t offset_of(const Heads& heads, int64_t batch, int64_t head, int64_t token) {
  return batch * heads.strides[0] + head * heads.strides[1] + token * heads.strides[2];
}

inline void rotary_token(void* context, int64_t token) {
  const Rotary& a = *static_cast<const Rotary*>(context);
  const int64_t batch = token / a.length, step = token % a.length, half = a.dim / 2;
  const float position = float(a.positions[token]);
  float cosine[kMaxDim / 2], sine[kMaxDim / 2], x[kMaxDim], y[kMaxDim];
  for (int64_t i = 0; i < half; ++i) {
    const float angle = position * a.frequencies[i];
    cosine[i] = std::cos(angle), sine[i] = std::sin(angle);
  }
  const auto rotate = [&](const Heads& from, const Heads& to, int64_t to_token, Float to_type) {
    for (int64_t head = 0; head < from.count; ++head) {
      load_floats(a.type, from.data, offset_of(from, batch, head, step), a.dim, x);
      for (int64_t i = 0; i < half; ++i) {
        y[i] = x[i] * cosine[i] - x[i + half] * sine[i];
        y[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
      }
      // Round to the type of x first: a cache in another type then holds what the separate ops would give it.
      store_floats(a.type, y, a.dim, x, 0);
      load_floats(a.type, x, 0, a.dim, y);
      store_floats(to_type, y, a.dim, to.data, offset_of(to, batch, head, to_token));
    }
  };
  rotate(a.q, a.q_out, step, a.type);
  rotate(a.k, a.k_cache, a.cache_positions[token], a.cache_type);
  for (int64_t head = 0; head < a.v.count; ++head) {
    load_floats(a.type, a.v.data, offset_of(a.v, batch, head, step), a.dim, x);
    store_floats(a.cache_type, x, a.dim, a.v_cache.data, offset_of(a.v_cache, batch, head, a.cache_positions[token]));
  }
}

inline void run_rotary(const Rotary& a) {
  Rotary copy = a;
  for (int64_t token = 0; token < a.batch * a.length; ++token) rotary_token(&copy, token);
}

struct AttentionShare {
  const Attention& a;
  int64_t shares;  // shares into which the query heads of one KV head are split
};

// Returns whether a query at `position` sees a key, for keys in [starts, ends).
inline bool sees(const Attention& a, int64_t batch, int64_t position, int64_t key) {
  if (key < a.prefix_ends[batch]) return true;
  return (!a.causal || key <= position) && (a.window == 0 || position - key < a.window);
}

// Computes one share of the query heads of one KV head of one example.
inline void attention_share(void* context, int64_t index) {
  const AttentionShare& all = *static_cast<const AttentionShare*>(context);
  const Attention& a = all.a;
  const int64_t share = index % all.shares, kv_head = index / all.shares % a.k.count;
  const int64_t batch = index / all.shares / a.k.count, group = a.q.count / a.k.count;
  const int64_t first = kv_head * group + group * share / all.shares;
  const int64_t heads = kv_head * group + group * (share + 1) / all.shares - first, rows = heads * a.queries;
  const int64_t start = a.starts[batch], keys = a.ends[batch] > start ? a.ends[batch] - start : 0;
  const Buffer<float> q(allocate<float>(rows * a.dim)), scores(allocate<float>(rows * keys));
  const Buffer<float> out(allocate<float>(rows * a.dim));
  std::memset(out.get(), 0, size_t(rows * a.dim) * sizeof(float));
  alignas(64) float row_of[kMaxDim];
  for (int64_t row = 0; row < rows; ++row) {
    load_floats(a.type, a.q.data, offset_of(a.q, batch, first + row / a.queries, row % a.queries), a.dim,
                &q[row * a.dim]);
  }
  for (int64_t key = 0; key < keys; ++key) {
    load_floats(a.type, a.k.data, offset_of(a.k, batch, kv_head, start + key), a.dim, row_of);
    for (int64_t row = 0; row < rows; ++row) {
      if (!sees(a, batch, a.q_starts[batch] + row % a.queries, start + key)) continue;
      float& score = scores[row * keys + key];
      score = dot(&q[row * a.dim], row_of, a.dim) * a.scale;
      if (a.softcap != 0) score = a.softcap * tanh_approx(score / a.softcap);
    }
  }
  // Softmax over the visible keys, kUnseen for the others. A row with +infinity or NaN, or with −infinity only, becomes
  // NaN.
  constexpr float kUnseen = -1, kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < rows; ++row) {
    float* weights = scores.get() + row * keys;
    const int64_t position = a.q_starts[batch] + row % a.queries;
    float maximum = -kInfinity, total = 0;
    for (int64_t key = 0; key < keys; ++key) {
      if (sees(a, batch, position, start + key) && weights[key] > maximum) maximum = weights[key];
    }
    for (int64_t key = 0; key < keys; ++key) {
      if (!sees(a, batch, position, start + key)) {
        weights[key] = kUnseen;
        continue;
      }
      const bool nothing = weights[key] == -kInfinity && maximum > -kInfinity;
      weights[key] = nothing ? 0 : exp_approx(weights[key] - maximum);
      total += weights[key];
    }
    const float inverse = 1 / total;
    for (int64_t key = 0; key < keys; ++key) weights[key] = weights[key] == kUnseen ? kUnseen : weights[key] * inverse;
  }
  for (int64_t key = 0; key < keys; ++key) {
    bool needed = false;
    for (int64_t row = 0; row < rows; ++row) needed = needed || scores[row * keys + key] != kUnseen;
    if (!needed) continue;  // no row sees the key: its value may be uninitialised memory
    load_floats(a.type, a.v.data, offset_of(a.v, batch, kv_head, start + key), a.dim, row_of);
    for (int64_t row = 0; row < rows; ++row) {
      const float weight = scores[row * keys + key];
      float* __restrict to = out.get() + row * a.dim;
      if (weight == kUnseen) continue;
      for (int64_t i = 0; i < a.dim; ++i) to[i] += weight * row_of[i];
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t offset = offset_of(a.out, batch, first + row / a.queries, row % a.queries);
    store_floats(a.type, &out[row * a.dim], a.dim, a.out.data, offset);
  }
}

inline void run_attention(const Attention& a) {
  const int64_t group = a.q.count / a.k.count, heads = a.batch * a.k.count;
  int64_t shares = 1;
  while (heads * shares < thread_count() && 2 * shares <= group) shares *= 2;
  AttentionShare all{a, shares};
  if (a.queries * a.q.count * a.keys * a.dim * a.batch < 1 << 16) {
    for (int64_t i = 0; i < heads * shares; ++i) attention_share(&all, i);
  } else {
    parallel_for(heads * shares, attention_share, &all);
  }
}

}  // namespace

}  // namespace pg_kernels
