// Packing, unpacking and dequantising int8 weights.
#include <algorithm>
#include <cstring>

#include "cpu/int8_linear.h"
#include "cpu/parallel.h"

namespace pg_kernels {

namespace {

struct Packing {
  const Int8Layout& layout;
  const int8_t* q;
  const float* scale;
  uint8_t* packed;
  float* packed_scale;
};

struct Rows {
  const Int8Layout& layout;
  const uint8_t* packed;
  const float* packed_scale;
  const int64_t* indices;
  float* out;
};

struct Unpacking {
  const Int8Layout& layout;
  const uint8_t* packed;
  const float* packed_scale;
  int8_t* q;
  float* scale;
};

// Calls each(first column, number of columns, step) for every step of a row.
template <class Each>
void for_steps(const Int8Layout& layout, const Each& each) {
  for (int64_t group = 0; group < layout.groups(); ++group) {
    const int64_t end = std::min(layout.k, (group + 1) * layout.group);
    int64_t step = group * layout.group_steps();
    for (int64_t k = group * layout.group; k < end; k += 4) each(k, std::min<int64_t>(4, end - k), step++);
  }
}

void pack_panel(void* context, int64_t panel) {
  const Packing& a = *static_cast<const Packing*>(context);
  const Int8Layout& layout = a.layout;
  const int64_t width = layout.width(panel), first = panel * kPanel, groups = layout.groups();
  const int64_t rows = std::min(width, layout.n - first);
  uint8_t* data = a.packed + layout.panel_data(panel);
  float* scale = a.packed_scale + layout.panel_scale(panel);
  std::memset(data, 128, width * layout.steps() * 4);
  std::fill(scale, scale + width * groups, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* q = a.q + (first + row) * layout.k;
    for_steps(layout, [&](int64_t k, int64_t size, int64_t step) {
      for (int64_t i = 0; i < size; ++i) data[(step * width + row) * 4 + i] = uint8_t(q[k + i] + 128);
    });
    for (int64_t g = 0; g < groups; ++g) scale[g * width + row] = a.scale[(first + row) * groups + g];
  }
}

void unpack_panel(void* context, int64_t panel) {
  const Unpacking& a = *static_cast<const Unpacking*>(context);
  const Int8Layout& layout = a.layout;
  const int64_t width = layout.width(panel), first = panel * kPanel, groups = layout.groups();
  const int64_t rows = std::min(width, layout.n - first);
  const uint8_t* data = a.packed + layout.panel_data(panel);
  const float* scale = a.packed_scale + layout.panel_scale(panel);
  for (int64_t row = 0; row < rows; ++row) {
    int8_t* q = a.q + (first + row) * layout.k;
    for_steps(layout, [&](int64_t k, int64_t size, int64_t step) {
      for (int64_t i = 0; i < size; ++i) q[k + i] = int8_t(data[(step * width + row) * 4 + i] - 128);
    });
    for (int64_t g = 0; g < groups; ++g) a.scale[(first + row) * groups + g] = scale[g * width + row];
  }
}

void dequantize_row(void* context, int64_t i) {
  const Rows& a = *static_cast<const Rows*>(context);
  const Int8Layout& layout = a.layout;
  const int64_t panel = a.indices[i] / kPanel, row = a.indices[i] % kPanel, width = layout.width(panel);
  const uint8_t* data = a.packed + layout.panel_data(panel);
  const float* scale = a.packed_scale + layout.panel_scale(panel);
  float* out = a.out + i * layout.k;
  for_steps(layout, [&](int64_t k, int64_t size, int64_t step) {
    const float group_scale = scale[k / layout.group * width + row];
    for (int64_t j = 0; j < size; ++j) out[k + j] = float(data[(step * width + row) * 4 + j] - 128) * group_scale;
  });
}

}  // namespace

void pack_int8(const Int8Layout& layout, const int8_t* q, const float* scale, uint8_t* packed, float* packed_scale) {
  Packing packing{layout, q, scale, packed, packed_scale};
  parallel_for(layout.panels(), pack_panel, &packing);
}

void unpack_int8(const Int8Layout& layout, const uint8_t* packed, const float* packed_scale, int8_t* q, float* scale) {
  Unpacking unpacking{layout, packed, packed_scale, q, scale};
  parallel_for(layout.panels(), unpack_panel, &unpacking);
}

void dequantize_rows(const Int8Layout& layout, const uint8_t* packed, const float* packed_scale, const int64_t* indices,
                     int64_t count, float* out) {
  Rows rows{layout, packed, packed_scale, indices, out};
  if (count * layout.k < 1 << 15) {
    for (int64_t i = 0; i < count; ++i) dequantize_row(&rows, i);
  } else {
    parallel_for(count, dequantize_row, &rows);
  }
}

}  // namespace pg_kernels
