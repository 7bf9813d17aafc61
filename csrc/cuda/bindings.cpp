// pg_kernels._cuda. Tensors are addresses of contiguous memory on a device; the Python side has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/int8_linear.h"

namespace py = pybind11;
using namespace pg_kernels::cuda;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

int num_splits_of(int m, int k, int group, bool int8_activations, bool geglu, const std::vector<int>& sizes,
                  int device) {
  Product p{};
  p.m = m;
  p.k = k;
  p.group = group;
  p.int8_activations = int8_activations;
  p.geglu = geglu;
  for (int n : sizes) p.weights[p.count++].n = n;
  return num_splits(p, device);
}

void int8_linear_of(Address x, Address row_scale, int m, int k, int group, int x_type, int bias_type, int y_type,
                    const std::vector<std::tuple<int, Address, Address, Address, Address>>& weights,
                    bool int8_activations, bool geglu, int num_splits, Address partial, int device, Address stream) {
  if (weights.empty() || weights.size() > kMaxWeights) throw std::invalid_argument("weights: expected 1 to 4");
  py::gil_scoped_release release;
  Product p{};
  for (const auto& [n, data, scale, bias, y] : weights) {
    p.weights[p.count++] = {pointer<const uint8_t>(data), pointer<const float>(scale), pointer<const void>(bias),
                            pointer<void>(y), n};
  }
  p.x = pointer<const void>(x);
  p.row_scale = pointer<const float>(row_scale);
  p.int8_activations = int8_activations;
  p.geglu = geglu;
  p.m = m;
  p.k = k;
  p.group = group;
  p.num_splits = num_splits;
  p.partial = pointer<uint32_t>(partial);
  p.x_type = Float(x_type);
  p.bias_type = Float(bias_type);
  p.y_type = Float(y_type);
  int8_linear(p, device, stream);
}

void quantize_rows_of(Address x, int type, int64_t m, int k, Address q, Address scale, int device, Address stream) {
  py::gil_scoped_release release;
  quantize_rows(pointer<const void>(x), Float(type), m, k, pointer<int8_t>(q), pointer<float>(scale), device, stream);
}

void dequantize_of(Address data, Address scale, int64_t n, int k, int group, Address out, int type, int device,
                   Address stream) {
  py::gil_scoped_release release;
  dequantize(pointer<const uint8_t>(data), pointer<const float>(scale), n, k, group, pointer<void>(out), Float(type),
             device, stream);
}

void dequantize_rows_of(Address data, Address scale, Address indices, int64_t count, int64_t n, int k, int group,
                        Address out, int type, int device, Address stream) {
  py::gil_scoped_release release;
  dequantize_rows(pointer<const uint8_t>(data), pointer<const float>(scale), pointer<const int64_t>(indices), count, n,
                  k, group, pointer<void>(out), Float(type), device, stream);
}

}  // namespace

PYBIND11_MODULE(PG_KERNELS_CUDA_MODULE, module) {
  module.def("int8_linear", &int8_linear_of, py::kw_only(), py::arg("x"), py::arg("row_scale"), py::arg("m"),
             py::arg("k"), py::arg("group"), py::arg("x_type"), py::arg("bias_type"), py::arg("y_type"),
             py::arg("weights"), py::arg("int8_activations"), py::arg("geglu"), py::arg("num_splits"),
             py::arg("partial"), py::arg("device"), py::arg("stream"),
             "Each weight is N and the addresses of packed data, scales, bias (or 0) and output.");
  module.def("num_splits", &num_splits_of, py::kw_only(), py::arg("m"), py::arg("k"), py::arg("group"),
             py::arg("int8_activations"), py::arg("geglu"), py::arg("sizes"), py::arg("device"));
  module.def("quantize_rows", &quantize_rows_of, py::kw_only(), py::arg("x"), py::arg("type"), py::arg("m"),
             py::arg("k"), py::arg("q"), py::arg("scale"), py::arg("device"), py::arg("stream"));
  module.def("dequantize", &dequantize_of, py::kw_only(), py::arg("data"), py::arg("scale"), py::arg("n"), py::arg("k"),
             py::arg("group"), py::arg("out"), py::arg("type"), py::arg("device"), py::arg("stream"));
  module.def("dequantize_rows", &dequantize_rows_of, py::kw_only(), py::arg("data"), py::arg("scale"),
             py::arg("indices"), py::arg("count"), py::arg("n"), py::arg("k"), py::arg("group"), py::arg("out"),
             py::arg("type"), py::arg("device"), py::arg("stream"));
}
