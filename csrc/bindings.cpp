// pg_kernels._C. Tensors are addresses of contiguous memory; the Python side has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/int8_linear.h"
#include "cpu/token_ops.h"

namespace py = pybind11;
using pg_kernels::Int8Layout;
using pg_kernels::Int8Linear;
using pg_kernels::Int8Weight;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

pg_kernels::Float type_of(int type) { return static_cast<pg_kernels::Float>(type); }

// k, softcap, and the addresses of values, indices and log_sums (or 0).
using TopKArguments = std::tuple<int64_t, float, Address, Address, Address>;

void int8_linear(Address x, int64_t m, int64_t k, int64_t group, int type,
                 const std::vector<std::tuple<int64_t, Address, Address, Address, Address>>& weights,
                 bool int8_activations, bool geglu, const std::optional<TopKArguments>& top_arguments) {
  const pg_kernels::InstructionSet& set = pg_kernels::instruction_set();
  py::gil_scoped_release release;
  std::vector<Int8Weight> all;
  for (const auto& [n, data, scale, bias, y] : weights) {
    all.push_back({Int8Layout{n, k, group}, pointer<const uint8_t>(data), pointer<const float>(scale),
                   pointer<const float>(bias), pointer<void>(y)});
  }
  pg_kernels::TopK top{};
  if (top_arguments.has_value()) {
    const auto& [count, softcap, values, indices, log_sums] = *top_arguments;
    top = {count, softcap, pointer<float>(values), pointer<int64_t>(indices), pointer<float>(log_sums)};
  }
  set.int8_linear(Int8Linear{m, k, type_of(type), pointer<const void>(x), int8_activations, geglu,
                             top_arguments.has_value() ? &top : nullptr, all.data(), int64_t(all.size())});
}

void quantize_int8(int64_t n, int64_t k, int64_t group, int type, Address weight, Address q, Address scale) {
  const pg_kernels::InstructionSet& set = pg_kernels::instruction_set();
  py::gil_scoped_release release;
  set.quantize_int8(pg_kernels::QuantizeInt8{Int8Layout{n, k, group}, type_of(type), pointer<const void>(weight),
                                             pointer<int8_t>(q), pointer<float>(scale)});
}

void pack_int8(int64_t n, int64_t k, int64_t group, Address q, Address scale, Address packed, Address packed_scale) {
  py::gil_scoped_release release;
  pg_kernels::pack_int8(Int8Layout{n, k, group}, pointer<const int8_t>(q), pointer<const float>(scale),
                        pointer<uint8_t>(packed), pointer<float>(packed_scale));
}

void unpack_int8(int64_t n, int64_t k, int64_t group, Address packed, Address packed_scale, Address q, Address scale) {
  py::gil_scoped_release release;
  pg_kernels::unpack_int8(Int8Layout{n, k, group}, pointer<const uint8_t>(packed), pointer<const float>(packed_scale),
                          pointer<int8_t>(q), pointer<float>(scale));
}

void dequantize_rows(int64_t n, int64_t k, int64_t group, Address packed, Address packed_scale, Address indices,
                     int64_t count, Address out) {
  py::gil_scoped_release release;
  pg_kernels::dequantize_rows(Int8Layout{n, k, group}, pointer<const uint8_t>(packed),
                              pointer<const float>(packed_scale), pointer<const int64_t>(indices), count,
                              pointer<float>(out));
}

void rms_norm(Address x, Address residual, Address weight, Address y, Address total, Address rstd, int64_t rows,
              int64_t columns, int type, int weight_type, float eps, float offset) {
  const pg_kernels::InstructionSet& set = pg_kernels::instruction_set();
  py::gil_scoped_release release;
  set.rms_norm(pg_kernels::RmsNorm{rows, columns, type_of(type), type_of(weight_type), pointer<const void>(x),
                                   pointer<const void>(residual), pointer<const void>(weight), pointer<void>(y),
                                   pointer<void>(total), pointer<float>(rstd), eps, offset});
}

void geglu(Address gate, Address up, Address grad, Address y, Address grad_gate, Address grad_up, int64_t count,
           int type) {
  const pg_kernels::InstructionSet& set = pg_kernels::instruction_set();
  py::gil_scoped_release release;
  set.geglu(pg_kernels::Geglu{count, type_of(type), pointer<const void>(gate), pointer<const void>(up),
                              pointer<const void>(grad), pointer<void>(y), pointer<void>(grad_gate),
                              pointer<void>(grad_up)});
}

// A tensor [B, H, S, D]: address, H and the first three strides.
using HeadsArguments = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;

pg_kernels::Heads heads(const HeadsArguments& from) {
  const auto& [data, count, batch_stride, head_stride, token_stride] = from;
  return {pointer<void>(data), count, {batch_stride, head_stride, token_stride}};
}

void rotary(const HeadsArguments& q, const HeadsArguments& k, const HeadsArguments& v, const HeadsArguments& q_out,
            const HeadsArguments& k_cache, const HeadsArguments& v_cache, Address positions, Address cache_positions,
            Address frequencies, int64_t batch, int64_t length, int64_t dim, int type, int cache_type) {
  const pg_kernels::InstructionSet& set = pg_kernels::instruction_set();
  py::gil_scoped_release release;
  set.rotary(pg_kernels::Rotary{batch, length, dim, type_of(type), type_of(cache_type), heads(q), heads(k), heads(v),
                                heads(q_out), heads(k_cache), heads(v_cache), pointer<const int64_t>(positions),
                                pointer<const int64_t>(cache_positions), pointer<const float>(frequencies)});
}

void attention(const HeadsArguments& q, const HeadsArguments& k, const HeadsArguments& v, const HeadsArguments& out,
               const std::vector<int64_t>& prefix_ends, const std::vector<int64_t>& starts,
               const std::vector<int64_t>& ends, const std::vector<int64_t>& q_starts, int64_t queries, int64_t keys,
               int64_t dim, int type, bool causal, float scale, float softcap, int64_t window) {
  const pg_kernels::InstructionSet& set = pg_kernels::instruction_set();
  py::gil_scoped_release release;
  set.attention(pg_kernels::Attention{int64_t(starts.size()), queries, keys, dim, type_of(type), heads(q), heads(k),
                                      heads(v), heads(out), prefix_ends.data(), starts.data(), ends.data(),
                                      q_starts.data(), causal, scale, softcap, window});
}

std::vector<std::string> instruction_sets() {
  const pg_kernels::InstructionSet* found[8];
  const int count = pg_kernels::instruction_sets(found, 8);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(found[i]->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("int8_linear", &int8_linear, py::kw_only(), py::arg("x"), py::arg("m"), py::arg("k"), py::arg("group"),
             py::arg("type"), py::arg("weights"), py::arg("int8_activations"), py::arg("geglu"), py::arg("top"),
             "Each weight is N and the addresses of packed data, packed scales, bias (or 0) and output.");
  module.def("pack_int8", &pack_int8, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("group"), py::arg("q"),
             py::arg("scale"), py::arg("packed"), py::arg("packed_scale"));
  module.def("quantize_int8", &quantize_int8, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("group"),
             py::arg("type"), py::arg("weight"), py::arg("q"), py::arg("scale"));
  module.def("unpack_int8", &unpack_int8, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("group"),
             py::arg("packed"), py::arg("packed_scale"), py::arg("q"), py::arg("scale"));
  module.def("dequantize_rows", &dequantize_rows, py::kw_only(), py::arg("n"), py::arg("k"), py::arg("group"),
             py::arg("packed"), py::arg("packed_scale"), py::arg("indices"), py::arg("count"), py::arg("out"));
  module.def("rms_norm", &rms_norm, py::kw_only(), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("y"),
             py::arg("total"), py::arg("rstd"), py::arg("rows"), py::arg("columns"), py::arg("type"),
             py::arg("weight_type"), py::arg("eps"), py::arg("offset"));
  module.def("geglu", &geglu, py::kw_only(), py::arg("gate"), py::arg("up"), py::arg("grad") = 0, py::arg("y") = 0,
             py::arg("grad_gate") = 0, py::arg("grad_up") = 0, py::arg("count"), py::arg("type"));
  module.def("rotary", &rotary, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("q_out"),
             py::arg("k_cache"), py::arg("v_cache"), py::arg("positions"), py::arg("cache_positions"),
             py::arg("frequencies"), py::arg("batch"), py::arg("length"), py::arg("dim"), py::arg("type"),
             py::arg("cache_type"));
  module.def("attention", &attention, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
             py::arg("prefix_ends"), py::arg("starts"), py::arg("ends"), py::arg("q_starts"), py::arg("queries"),
             py::arg("keys"), py::arg("dim"), py::arg("type"), py::arg("causal"), py::arg("scale"), py::arg("softcap"),
             py::arg("window"));
  module.def(
      "instruction_set", [] { return pg_kernels::instruction_set().name; },
      "Return the name of the instruction set in use; ValueError if PG_KERNELS_ISA names one that this CPU lacks.");
  module.def("instruction_sets", &instruction_sets,
             "Return the names of the instruction sets of this CPU, the best first.");
}
