// The int8 GEMM for an instruction set, a struct Isa that the including file defines. Everything is in an unnamed
// namespace, so that the linker cannot merge code compiled for different instruction sets.
//
// Activations have 8 or 16 bits. Where the instruction multiplies bytes, a 16-bit activation is two limbs of 8 bits,
// 256 · high + low, each a row of the product. A segment is a range of columns with one activation scale and one weight
// scale; its integer sum is exact. Weights are stored with 128 added, so 128 · Σ activations is subtracted. The sums of
// segments are added in fp32, in one order and without fusing: every instruction set gives the same bits, whatever the
// batch and the number of threads.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/float_rows.h"
#include "cpu/int8_linear.h"
#include "cpu/parallel.h"

namespace pg_kernels {

namespace {

constexpr int64_t kBlock =
    512;  // columns that share a scale of 16-bit activations: their sum with 8-bit weights is below 2^31
constexpr int64_t kMaxSegment = 2048;  // most columns of a segment: its 64 rows of weights stay in the L2 cache
constexpr int64_t kMaxRows = 384;      // rows of x at a time: their sums for a panel stay in the L2 cache
constexpr uint32_t kInfinity = 0x7f800000;
constexpr float kMaxLevel16 = 32639.0f;  // 256 · 127 + 127
constexpr int64_t kPrefetch = 4096;      // bytes to prefetch ahead

// A sum of exponentials: Σ exp(y) = exp(maximum) · sum.
struct LogSum {
  float maximum, sum;
};

inline LogSum log_sum(const float* y, int64_t size) {
  LogSum all{y[0], 0};
  for (int64_t i = 1; i < size; ++i) all.maximum = y[i] > all.maximum || y[i] != y[i] ? y[i] : all.maximum;
  if (all.maximum == -std::numeric_limits<float>::infinity()) return all;
  if ((to_bits(all.maximum) & 0x7fffffff) >= 0x7f800000) {  // NaN or +infinity: the sum is NaN
    all.sum = std::numeric_limits<float>::quiet_NaN();
    return all;
  }
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] += exp_approx(y[i + lane] - all.maximum);
  }
  for (int64_t lane = 0; i + lane < size; ++lane) lanes[lane] += exp_approx(y[i + lane] - all.maximum);
  for (float lane : lanes) all.sum += lane;
  return all;
}

inline LogSum add(const LogSum& a, const LogSum& b) {
  const float maximum = a.maximum > b.maximum ? a.maximum : b.maximum;
  return {maximum, a.sum * exp_approx(a.maximum - maximum) + b.sum * exp_approx(b.maximum - maximum)};
}

// A range of columns of x and of the weight, and the steps (4 columns each) that it takes in the packed layout.
struct Segment {
  int64_t column, size;
  int64_t step, steps;
  int64_t group;
};

// Returns the bits of the largest |x|. As integers, bits order magnitudes as numbers do, with NaN last.
inline uint32_t max_magnitude(const float* x, int64_t size) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = to_bits(x[i]) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Rounds x / scale to levels in [-127, 127] and returns their sum.
template <class Level>
int32_t round_to_8(const float* x, float scale, int64_t size, Level* levels) {
  if (!(scale > 0 &&
        scale <= std::numeric_limits<float>::max())) {  // x is all zeros, or not finite: then the scale is NaN
    std::memset(levels, 0, size_t(size) * sizeof(Level));
    return 0;
  }
  int32_t sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    float level = round_to_even(x[i] / scale);
    level = level < -127.0f ? -127.0f : level;
    level = level > 127.0f ? 127.0f : level;
    levels[i] = Level(int32_t(level));
    sum += int32_t(level);
  }
  return sum;
}

// Returns whether value a at index i ranks before value b at index j: larger first, NaN largest, then the lower index.
inline bool ranks_before(float a, int64_t i, float b, int64_t j) {
  if (a != a || b != b) return a != a && (b == b || i < j);
  return a > b || (a == b && i < j);
}

// Multiplies kRows rows of activations by kVectors · 16 rows of the weight over 4 · steps columns. Writes the sums row
// after row.
template <class Isa, int kRows, int kVectors>
__attribute__((noinline)) void multiply(const uint8_t* weights, int64_t stride, const uint8_t* ahead,
                                        int64_t ahead_stride, const typename Isa::Element* activations, int64_t steps,
                                        int32_t* sums) {
  typename Isa::Sum sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[row][v] = Isa::zero();
  }
  for (int64_t step = 0; step < steps; ++step) {
    typename Isa::Weights w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      w[v] = Isa::load(weights + 64 * v);
      __builtin_prefetch(ahead + 64 * v, 0, 2);  // into the L2 cache
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const typename Isa::Activations x = Isa::broadcast(activations + 4 * row);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[row][v] = Isa::multiply_add(sum[row][v], w[v], x);
    }
    weights += stride;
    ahead += ahead_stride;
    activations += 4 * kRows;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Isa::store(sum[row][v], sums + 16 * (row * kVectors + v));
  }
}

template <class Isa>
class Gemm {
 public:
  explicit Gemm(const Int8Linear& a)
      : a_(a),
        limbs_(Isa::kBytes && !a.int8_activations ? 2 : 1),
        tile_(Isa::kRows / limbs_),
        layout_(a.weights[0].layout),
        steps_(layout_.steps()) {
    const int64_t longest = a.int8_activations ? kMaxSegment : kBlock;
    segments_.reset(allocate<Segment>(layout_.groups() * ((layout_.group + longest - 1) / longest)));
    for (int64_t group = 0; group < layout_.groups(); ++group) {
      const int64_t end = min_of(layout_.k, (group + 1) * layout_.group);
      int64_t step = group * layout_.group_steps();
      for (int64_t column = group * layout_.group; column < end;) {
        const int64_t size = min_of(longest, end - column);
        segments_[num_segments_++] = {column, size, step, (size + 3) / 4, group};
        step += (size + 3) / 4;
        column += size;
      }
    }
    const int64_t rows = min_of(kMaxRows, (a.m + tile_ - 1) / tile_ * tile_);
    activations_.reset(allocate<Element>(rows * limbs_ * steps_ * 4));
    corrections_.reset(allocate<int32_t>(rows * num_segments_));
    scales_.reset(allocate<float>(rows * num_segments_));
    has_levels_.reset(allocate<bool>(rows));
    for (int64_t i = 0; i < (a.geglu ? 1 : a.count); ++i) num_panels_ += a.weights[i].layout.panels();
    if (a.top == nullptr) return;
    const int64_t top_size = thread_count() * rows * a.top->k;
    top_values_.reset(allocate<float>(top_size));
    top_indices_.reset(allocate<int64_t>(top_size));
    if (a.top->log_sums != nullptr) log_sums_.reset(allocate<LogSum>(num_panels_ * rows));
  }

  void run() {
    const int64_t threads = thread_count();
    for (first_row_ = 0; first_row_ < a_.m; first_row_ += kMaxRows) {
      rows_ = min_of(kMaxRows, a_.m - first_row_);
      if (rows_ * a_.k < 1 << 16) {
        for (int64_t tile = 0; tile * tile_ < rows_; ++tile) quantize_tile(this, tile);
      } else {
        parallel_for((rows_ + tile_ - 1) / tile_, quantize_tile, this);
      }
      // Threads take the next panel when they are free. With fixed shares all would wait for a thread that is delayed.
      next_ = 0;
      const bool small = rows_ * a_.k * num_panels_ < 1 << 14;
      const int64_t lists = small ? 1 : min_of(threads, num_panels_);
      parallel_for(lists, process_panels, this);
      if (a_.top != nullptr) merge_top(lists);
    }
  }

 private:
  using Element = typename Isa::Element;

  Element* tile_activations(int64_t tile) const { return activations_.get() + tile * tile_ * limbs_ * steps_ * 4; }

  // Offset of a tile's segment in corrections_ and scales_, [tiles][segments][tile_].
  int64_t tile_offset(int64_t tile, int64_t segment) const { return (tile * num_segments_ + segment) * tile_; }

  static void quantize_tile(void* self, int64_t tile) {
    Gemm& gemm = *static_cast<Gemm*>(self);
    const int64_t rows = min_of(gemm.tile_, gemm.rows_ - tile * gemm.tile_);
    for (int64_t row = 0; row < rows; ++row) gemm.quantize(tile, row, rows);
  }

  void quantize(int64_t tile, int64_t row, int64_t rows) {
    const int64_t index = tile * tile_ + row, offset = (first_row_ + index) * a_.k;
    alignas(64) float x[kMaxSegment];
    alignas(64) int16_t levels[kMaxSegment];
    float row_scale = 0;
    if (a_.int8_activations) {
      uint32_t largest = 0;
      for (int64_t start = 0; start < a_.k; start += kMaxSegment) {
        const int64_t size = min_of(kMaxSegment, a_.k - start);
        load_floats(a_.type, a_.x, offset + start, size, x);
        const uint32_t one = max_magnitude(x, size);
        largest = one > largest ? one : largest;
      }
      row_scale = largest < kInfinity ? from_bits(largest) / 127.0f : std::numeric_limits<float>::quiet_NaN();
    }
    bool has_levels = true;
    int64_t block = -1, begin = 0, end = 0;  // the steps that `levels` holds
    float scale = row_scale, inverse = 0;
    for (int64_t s = 0; s < num_segments_; ++s) {
      const Segment& segment = segments_[s];
      if (!a_.int8_activations && segment.column / kBlock != block) {
        block = segment.column / kBlock;
        const int64_t size = min_of(kBlock, a_.k - block * kBlock);
        load_floats(a_.type, a_.x, offset + block * kBlock, size, x);
        has_levels = choose_scale_16(max_magnitude(x, size), &scale, &inverse) && has_levels;
      }
      if ((segment.step + segment.steps - begin) * 4 > kMaxSegment) {
        write_levels(tile, rows, row, levels, begin, end);
        begin = segment.step;
      }
      end = segment.step + segment.steps;
      int16_t* const own = levels + (segment.step - begin) * 4;
      int32_t sum;
      if (a_.int8_activations) {
        load_floats(a_.type, a_.x, offset + segment.column, segment.size, x);
        sum = round_to_8(x, row_scale, segment.size, own);
      } else {
        sum = round_to_16(x + segment.column % kBlock, inverse, segment.size, own);
      }
      for (int64_t i = segment.size; i < segment.steps * 4; ++i) own[i] = 0;
      corrections_[tile_offset(tile, s) + row] = Isa::kSigned ? 0 : 128 * sum;
      scales_[tile_offset(tile, s) + row] = scale;
    }
    write_levels(tile, rows, row, levels, begin, end);
    has_levels_[index] = has_levels;
  }

  // Rounds x · inverse to 16-bit levels and returns their sum.
  static int32_t round_to_16(const float* x, float inverse, int64_t size, int16_t* levels) {
    if (inverse == 0) {  // x is all zeros, or has no 16-bit levels
      std::memset(levels, 0, size_t(size) * sizeof(int16_t));
      return 0;
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t level = int32_t(round_to_even(x[i] * inverse));
      levels[i] = int16_t(level);
      sum += level;
    }
    return sum;
  }

  // Chooses a power of two as the scale, so that scaling is exact, which puts the largest magnitude into
  // (kMaxLevel16 / 2, kMaxLevel16]. Returns false if there is none: for NaN and infinity, and for numbers so small that
  // the inverse of the scale exceeds fp32.
  static bool choose_scale_16(uint32_t largest, float* scale, float* inverse) {
    *scale = 1.0f, *inverse = 0.0f;
    if (largest == 0) return true;
    int32_t exponent = int32_t(largest >> 23) - 14;  // biased exponent of the scale: largest / scale is in [2^14, 2^15)
    if (exponent < 20 || largest >= kInfinity) return false;
    if (from_bits((largest & 0x7fffff) | (127 + 14) << 23) > kMaxLevel16) ++exponent;
    *scale = from_bits(uint32_t(exponent) << 23);
    *inverse = from_bits(uint32_t(254 - exponent) << 23);
    return true;
  }

  // Writes levels in the order in which the product reads them: step by step, row by row within a step. Many steps at a
  // time, because a processor stalls when wide writes are read back in pieces right away.
  void write_levels(int64_t tile, int64_t rows, int64_t row, const int16_t* levels, int64_t begin, int64_t end) const {
    const int64_t steps = end - begin;
    Element* const out = tile_activations(tile) + begin * 4 * rows * limbs_;
    if constexpr (Isa::kBytes) {
      alignas(64) int8_t high[kMaxSegment], low[kMaxSegment];
      if (limbs_ == 1) {
        for (int64_t i = 0; i < steps * 4; ++i) low[i] = int8_t(levels[i]);
        for (int64_t i = 0; i < steps; ++i) std::memcpy(out + (i * rows + row) * 4, low + 4 * i, 4);
        return;
      }
      for (int64_t i = 0; i < steps * 4; ++i) {
        low[i] = int8_t(levels[i] & 0xff);
        high[i] = int8_t((levels[i] - low[i]) >> 8);
      }
      for (int64_t i = 0; i < steps; ++i) {
        std::memcpy(out + (i * rows + row) * 8, high + 4 * i, 4);
        std::memcpy(out + (i * rows + row) * 8 + 4, low + 4 * i, 4);
      }
    } else {
      for (int64_t i = 0; i < steps; ++i) std::memcpy(out + (i * rows + row) * 4, levels + 4 * i, 8);
    }
  }

  static void process_panels(void* self, int64_t list) {
    Gemm& gemm = *static_cast<Gemm*>(self);
    Buffer<float> sums(allocate<float>(gemm.rows_ * kPanel * (gemm.a_.geglu ? 2 : 1)));
    if (gemm.a_.top != nullptr) gemm.clear_top(list);
    for (Panel panel = gemm.next_panel(); panel.weight != nullptr;) {
      const Panel next = gemm.next_panel();
      if (gemm.a_.geglu) {
        gemm.geglu_panel(panel, next, sums.get());
      } else {
        gemm.multiply_panel(panel, next.data(), sums.get());
      }
      if (gemm.a_.top != nullptr) {
        gemm.top_of_panel(panel, sums.get(), list);
      } else {
        gemm.store_panel(panel, sums.get());
      }
      panel = next;
    }
  }

  struct Panel {
    const Int8Weight* weight;  // null after the last panel
    int64_t index;

    const uint8_t* data() const {
      return weight == nullptr ? nullptr : weight->data + weight->layout.panel_data(index);
    }
  };

  Panel next_panel() {
    int64_t index = next_++;
    if (index >= num_panels_) return {nullptr, 0};
    const Int8Weight* weight = a_.weights;
    for (; index >= weight->layout.panels(); ++weight) index -= weight->layout.panels();
    return {weight, index};
  }

  void geglu_panel(const Panel& panel, const Panel& next, float* gate) const {
    const Panel up_panel{&a_.weights[1], panel.index};
    float* up = gate + rows_ * kPanel;
    multiply_panel(panel, up_panel.data(), gate);
    multiply_panel(up_panel, next.data(), up);
    for (int64_t i = 0; i < rows_ * kPanel; ++i) gate[i] = gelu_tanh(gate[i]) * up[i];
  }

  void store_panel(const Panel& panel, const float* sums) const {
    const int64_t n = panel.weight->layout.n, first = panel.index * kPanel, size = min_of(kPanel, n - first);
    for (int64_t row = 0; row < rows_; ++row) {
      store_floats(a_.type, sums + row * kPanel, size, panel.weight->y, (first_row_ + row) * n + first);
    }
  }

  // Offset of a row's list of the top k. Every thread keeps its own lists.
  int64_t top_offset(int64_t list, int64_t row) const { return (list * rows_ + row) * a_.top->k; }

  void clear_top(int64_t list) const {
    for (int64_t i = top_offset(list, 0); i < top_offset(list + 1, 0); ++i) {
      top_values_[i] = -std::numeric_limits<float>::infinity();
      top_indices_[i] = std::numeric_limits<int64_t>::max();
    }
  }

  void insert_top(int64_t list, int64_t row, float value, int64_t index) const {
    float* values = &top_values_[top_offset(list, row)];
    int64_t* indices = &top_indices_[top_offset(list, row)];
    int64_t place = a_.top->k - 1;
    if (!ranks_before(value, index, values[place], indices[place])) return;
    for (; place > 0 && ranks_before(value, index, values[place - 1], indices[place - 1]); --place) {
      values[place] = values[place - 1];
      indices[place] = indices[place - 1];
    }
    values[place] = value;
    indices[place] = index;
  }

  void top_of_panel(const Panel& panel, float* sums, int64_t list) const {
    const int64_t first = panel.index * kPanel, size = min_of(kPanel, panel.weight->layout.n - first);
    for (int64_t row = 0; row < rows_; ++row) {
      float* y = sums + row * kPanel;
      if (a_.top->softcap != 0) {
        for (int64_t i = 0; i < size; ++i) y[i] = a_.top->softcap * tanh_approx(y[i] / a_.top->softcap);
      }
      if (a_.top->log_sums != nullptr) log_sums_[panel.index * rows_ + row] = log_sum(y, size);
      for (int64_t i = 0; i < size; ++i) insert_top(list, row, y[i], first + i);
    }
  }

  // Merges the threads' lists: the result does not depend on their order. The panels' sums are added in panel order.
  void merge_top(int64_t lists) const {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t list = 1; list < lists; ++list) {
        const int64_t from = top_offset(list, row);
        for (int64_t i = from; i < from + a_.top->k; ++i) insert_top(0, row, top_values_[i], top_indices_[i]);
      }
      const int64_t to = (first_row_ + row) * a_.top->k;
      std::memcpy(a_.top->values + to, &top_values_[top_offset(0, row)], size_t(a_.top->k) * sizeof(float));
      std::memcpy(a_.top->indices + to, &top_indices_[top_offset(0, row)], size_t(a_.top->k) * sizeof(int64_t));
      if (a_.top->log_sums == nullptr) continue;
      LogSum all = log_sums_[row];
      for (int64_t panel = 1; panel < num_panels_; ++panel) all = add(all, log_sums_[panel * rows_ + row]);
      a_.top->log_sums[first_row_ + row] = all.maximum + std::log(all.sum);
    }
  }

  // Computes a panel's product with its bias: sums [rows][kPanel]. `next` is the data of the next panel, to prefetch.
  void multiply_panel(const Panel& panel, const uint8_t* next, float* sums) const {
    const Int8Weight& weight = *panel.weight;
    const int64_t width = weight.layout.width(panel.index), tiles = (rows_ + tile_ - 1) / tile_;
    const uint8_t* data = panel.data();
    const float* scales = weight.scale + weight.layout.panel_scale(panel.index);
    std::memset(sums, 0, size_t(rows_ * kPanel) * sizeof(float));
    for (int64_t s = 0; s < num_segments_; ++s) {
      const Segment& segment = segments_[s];
      const uint8_t* weights = data + segment.step * width * 4;
      const int64_t bytes = segment.steps * width * 4, share = (4 * width + tiles - 1) / tiles;
      // A single tile waits for memory: prefetch a little ahead of it. Several tiles share the prefetch of the next
      // segment, so that loads and arithmetic overlap.
      const uint8_t* ahead = s + 1 < num_segments_ || next == nullptr ? weights + bytes : next;
      if (tiles == 1) ahead = weights + kPrefetch;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t rows = min_of(tile_, rows_ - tile * tile_);
        const Tile one{weights,
                       ahead + tile * segment.steps * share,
                       share,
                       tile_activations(tile) + segment.step * 4 * rows * limbs_,
                       corrections_.get() + tile_offset(tile, s),
                       scales_.get() + tile_offset(tile, s),
                       scales + segment.group * width,
                       sums + tile * tile_ * kPanel,
                       width,
                       segment.steps};
        multiply_tile<Isa::kRows>(one, rows * limbs_);
      }
    }
    for (int64_t row = 0; row < rows_; ++row) {
      if (!has_levels_[row]) multiply_floats(row, data, scales, width, sums + row * kPanel);
    }
    if (weight.bias == nullptr) return;
    const int64_t first = panel.index * kPanel, size = min_of(kPanel, weight.layout.n - first);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < size; ++i) sums[row * kPanel + i] += weight.bias[first + i];
    }
  }

  struct Tile {
    const uint8_t* weights;
    const uint8_t* ahead;
    int64_t ahead_stride;
    const Element* activations;
    const int32_t* corrections;
    const float* scales;
    const float* weight_scales;
    float* sums;
    int64_t width, steps;
  };

  template <int kRows>
  void multiply_tile(const Tile& tile, int64_t rows) const {
    if (rows < kRows) {
      if constexpr (kRows > 1) multiply_tile<kRows - 1>(tile, rows);
    } else {
      multiply_columns<kRows, Isa::vectors(kRows)>(tile, 0);
    }
  }

  // Adds a segment's scaled sums to out. Arithmetic is modulo 2^32: only the final sum of a segment is below 2^31.
  template <int kColumns, int kLimbs>
  static void add_segment(const int32_t* __restrict sums, int32_t correction, float scale,
                          const float* __restrict weight_scales, float* __restrict out) {
    for (int i = 0; i < kColumns; ++i) {
      uint32_t sum = uint32_t(sums[i]) - uint32_t(correction);
      if (kLimbs == 2) sum = (uint32_t(sums[i]) << 8) + uint32_t(sums[i + kColumns]) - uint32_t(correction);
      out[i] += float(int32_t(sum)) * scale * weight_scales[i];
    }
  }

  template <int kRows, int kVectors>
  void multiply_columns(const Tile& tile, int64_t column) const {
    alignas(64) int32_t sums[kRows * kVectors * 16];
    constexpr int kColumns = 16 * kVectors;
    for (; tile.width - column >= kColumns; column += kColumns) {
      multiply<Isa, kRows, kVectors>(tile.weights + 4 * column, 4 * tile.width, tile.ahead + 4 * column,
                                     tile.ahead_stride, tile.activations, tile.steps, sums);
      const float* weight_scales = tile.weight_scales + column;
      float* out = tile.sums + column;
      if (Isa::kBytes && limbs_ == 2) {
        for (int row = 0; row < kRows / 2; ++row) {
          add_segment<kColumns, 2>(sums + 2 * row * kColumns, tile.corrections[row], tile.scales[row], weight_scales,
                                   out + row * kPanel);
        }
      } else {
        for (int row = 0; row < kRows; ++row) {
          add_segment<kColumns, 1>(sums + row * kColumns, tile.corrections[row], tile.scales[row], weight_scales,
                                   out + row * kPanel);
        }
      }
    }
    if constexpr (kVectors > 1) {
      if (column < tile.width) multiply_columns<kRows, kVectors / 2>(tile, column);
    }
  }

  // Multiplies a row of x that has no levels in fp32.
  void multiply_floats(int64_t row, const uint8_t* data, const float* scales, int64_t width, float* sums) const {
    for (int64_t i = 0; i < width; ++i) sums[i] = 0;
    float x[kMaxSegment];
    for (int64_t s = 0; s < num_segments_; ++s) {
      const Segment& segment = segments_[s];
      load_floats(a_.type, a_.x, (first_row_ + row) * a_.k + segment.column, segment.size, x);
      for (int64_t i = 0; i < width; ++i) {
        float sum = 0;
        for (int64_t k = 0; k < segment.size; ++k) {
          const uint8_t stored = data[((segment.step + k / 4) * width + i) * 4 + k % 4];
          sum += x[k] * float(int(stored) - 128);
        }
        sums[i] += sum * scales[segment.group * width + i];
      }
    }
  }

  const Int8Linear& a_;
  const int64_t limbs_, tile_;
  const Int8Layout layout_;
  const int64_t steps_;
  int64_t num_segments_ = 0, num_panels_ = 0, first_row_ = 0, rows_ = 0;
  Buffer<Segment> segments_;
  Buffer<Element> activations_;
  Buffer<int32_t> corrections_;
  Buffer<float> scales_;
  Buffer<bool> has_levels_;
  Buffer<float> top_values_;
  Buffer<int64_t> top_indices_;
  Buffer<LogSum> log_sums_;
  std::atomic<int64_t> next_{0};
};

inline void quantize_row(void* context, int64_t row) {
  const QuantizeInt8& a = *static_cast<const QuantizeInt8*>(context);
  alignas(64) float x[kMaxSegment];
  for (int64_t group = 0; group < a.layout.groups(); ++group) {
    const int64_t first = group * a.layout.group, end = min_of(a.layout.k, first + a.layout.group);
    uint32_t largest = 0;
    for (int64_t start = first; start < end; start += kMaxSegment) {
      const int64_t size = min_of(kMaxSegment, end - start);
      load_floats(a.type, a.weight, row * a.layout.k + start, size, x);
      const uint32_t one = max_magnitude(x, size);
      largest = one > largest ? one : largest;
    }
    const float scale = from_bits(largest) / 127.0f;
    a.scale[row * a.layout.groups() + group] = scale;
    for (int64_t start = first; start < end; start += kMaxSegment) {
      const int64_t size = min_of(kMaxSegment, end - start);
      load_floats(a.type, a.weight, row * a.layout.k + start, size, x);
      round_to_8(x, scale, size, a.q + row * a.layout.k + start);
    }
  }
}

inline void run_quantize_int8(const QuantizeInt8& a) {
  QuantizeInt8 copy = a;
  parallel_for(a.layout.n, quantize_row, &copy);
}

template <class Isa>
void run_int8_linear(const Int8Linear& a) {
  if (a.m > 0 && a.count > 0) Gemm<Isa>(a).run();
}

}  // namespace

}  // namespace pg_kernels
