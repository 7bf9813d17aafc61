// Compares every instruction set of this machine with the portable one, bit for bit.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/int8_linear.h"

using namespace pg_kernels;

namespace {

std::vector<float> multiply(const InstructionSet& set, int64_t m, const Int8Layout& layout, bool int8_activations) {
  std::mt19937 random(17);
  std::vector<int8_t> q(layout.n * layout.k);
  for (auto& level : q) level = int8_t(int(random() % 256) - 128);
  std::vector<float> scale(layout.n * layout.groups()), x(m * layout.k), bias(layout.n), y(m * layout.n);
  for (auto* values : {&scale, &x, &bias}) {
    for (float& value : *values) value = (float(random() % 20001) - 10000.0f) * 1e-3f;
  }
  std::vector<uint8_t> data(layout.padded_n() * layout.steps() * 4);
  std::vector<float> packed_scale(layout.padded_n() * layout.groups());
  pack_int8(layout, q.data(), scale.data(), data.data(), packed_scale.data());
  const Int8Weight weight{layout, data.data(), packed_scale.data(), bias.data(), y.data()};
  set.int8_linear(Int8Linear{m, layout.k, Float::kFloat32, x.data(), int8_activations, false, nullptr, &weight, 1});
  return y;
}

}  // namespace

int main() {
  const InstructionSet* sets[8];
  const int count = instruction_sets(sets, 8);
  int compared = 0, different = 0;
  for (int i = 0; i + 1 < count; ++i) {
    for (const Int8Layout layout : {Int8Layout{1, 1, 1}, Int8Layout{17, 70, 32}, Int8Layout{64, 588, 588},
                                    Int8Layout{100, 1152, 128}, Int8Layout{65, 30, 1}, Int8Layout{16, 16384, 16384}}) {
      for (const int64_t m : {1, 2, 3, 5, 9}) {
        for (const bool int8_activations : {false, true}) {
          const auto ours = multiply(*sets[i], m, layout, int8_activations);
          const auto portable = multiply(*sets[count - 1], m, layout, int8_activations);
          ++compared;
          different += std::memcmp(ours.data(), portable.data(), ours.size() * sizeof(float)) != 0;
        }
      }
    }
    std::printf("%s: %d products, %d unlike %s\n", sets[i]->name, compared, different, sets[count - 1]->name);
  }
  return different != 0;
}
