// Replaces csrc/cuda/ptx_sm90.h. Products read shared memory as late as the kernel allows: when it waits for them.
// Copies also run when their barrier is waited for, or at once (see ptx.h); they report to the barrier only when it is
// waited for.
#pragma once

#include <map>

#include "cuda/ptx.h"

#define __grid_constant__
#define PG_KERNELS_SM90

namespace pg_kernels::ptx {

struct TensorMap {
  const unsigned char* from;
  int64_t rows, row_bytes;
  int box_rows, box_bytes;
  bool swizzled;
};
inline TensorMap describe(const void* from, int64_t rows, int64_t row_bytes, int box_rows, int box_bytes,
                          bool swizzled) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || row_bytes % 16 != 0 || box_bytes % 16 != 0) {
    throw std::runtime_error("emulator: a tensor map wants multiples of 16 bytes");
  }
  if (box_rows < 1 || box_rows > 256 || box_bytes < 1 || box_bytes > (swizzled ? 128 : 256 * 8)) {
    throw std::runtime_error("emulator: a tensor map's boxes are not empty, and not as large");
  }
  constexpr int64_t kMax = int64_t(1) << 32;
  if (rows < 1 || rows > kMax || row_bytes < 1 || row_bytes / 8 > kMax || row_bytes >= int64_t(1) << 40) {
    throw std::runtime_error("emulator: a tensor map's matrix is not empty, and not as large");
  }
  return {static_cast<const unsigned char*>(from), rows, row_bytes, box_rows, box_bytes, swizzled};
}

struct Barrier {
  int arrivals, pending, bytes = 0, phase = 0;
  std::vector<std::function<int()>> copies;  // each returns how many bytes it wrote
};
struct WarpProducts {
  std::vector<std::function<void()>> now;
  std::vector<std::vector<std::function<void()>>> committed;
};
// State of a block. It is reset when a block initialises its first barrier again.
inline std::map<uint32_t, Barrier> barriers;
inline std::map<int, WarpProducts> products;
inline int threads_waiting = 0;
inline int64_t threads_turn = 0;

inline void barrier_init(uint32_t barrier, int arrivals) {
  at(barrier, 8);
  if (barriers.count(barrier) != 0) {
    barriers.clear();
    products.clear();
  }
  barriers[barrier] = {arrivals, arrivals};
}
inline void barriers_are_ready() {}
inline Barrier& barrier_at(uint32_t barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) throw std::runtime_error("a barrier is not initialised");
  return found->second;
}
inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  Barrier& here = barrier_at(barrier);
  if (here.pending == 0) throw std::runtime_error("a barrier has more arrivals than it expects");
  --here.pending;
  here.bytes += bytes;
  ++block->progress;
}
inline void barrier_arrive(uint32_t barrier) {
  barrier_arrive_expecting(barrier, 0);
  yield_warp();
}
inline void barrier_wait(uint32_t barrier, int parity) {
  Barrier& here = barrier_at(barrier);
  while (here.phase % 2 == parity) {
    if (here.pending == 0) {
      for (const auto& copy : here.copies) here.bytes -= copy();
      here.copies.clear();
      if (here.bytes == 0) {
        here.pending = here.arrivals;
        ++here.phase;
        ++block->progress;
        continue;
      }
    }
    pause();
  }
}
inline uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
inline void copy_box(uint32_t to, const TensorMap& map, int byte, int row, uint32_t barrier, uint64_t = 0) {
  if (to % (map.swizzled ? 1024 : 128) != 0 || byte % 16 != 0) throw std::runtime_error("a box is misaligned");
  const auto make = [=] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int b = 0; b < map.box_bytes; b += 16) {
        const uint32_t address = to + r * map.box_bytes + b;
        unsigned char* here = at(map.swizzled ? swizzle128(address) : address, 16);
        if (row + r < map.rows && byte + b < map.row_bytes) {
          std::memcpy(here, map.from + (row + r) * map.row_bytes + byte + b, 16);
        } else {
          std::memset(here, 0, 16);
        }
      }
    }
  };
  if (copies_at_once()) make();
  barrier_at(barrier).copies.push_back([=] {
    if (!copies_at_once()) make();
    return map.box_rows * map.box_bytes;
  });
}
inline void sync_threads(int threads) {
  const int64_t turn = threads_turn;
  ++block->progress;
  if (++threads_waiting == threads) {
    threads_waiting = 0;
    ++threads_turn;
  }
  while (threads_turn == turn) pause();
}
template <int kRegisters>
void release_registers() {}
template <int kRegisters>
void acquire_registers() {}

inline void products_begin() {}
inline WarpProducts& products_of_warp() { return products[block->current / 32]; }
inline void products_commit() {
  int lane = block->current % 32;
  warp_together<int>(lane, [](int*(&)[32]) {
    WarpProducts& mine = products_of_warp();
    mine.committed.push_back(std::move(mine.now));
    mine.now.clear();
  });
}
template <int kPending>
void products_wait() {
  int lane = block->current % 32;
  warp_together<int>(lane, [](int*(&)[32]) {
    WarpProducts& mine = products_of_warp();
    while (int(mine.committed.size()) > kPending) {
      for (const auto& product : mine.committed.front()) product();
      mine.committed.erase(mine.committed.begin());
    }
  });
}

// Computes a warp's 16 rows of wgmma. `b` is the second operand's descriptor as the PTX manual defines it.
template <class Element, class Sum, size_t kSums>
void wgmma(Sum (&d)[kSums], const uint32_t* a, uint64_t b, float (*value)(Element)) {
  constexpr int kPack = 4 / sizeof(Element), kHalf = 4 * kPack, kTokens = int(kSums) * 2;
  if (b >> 62 != 1 || (b >> 32 & 0x3FFF) != 1024 / 16) throw std::runtime_error("an unknown layout");
  struct Given {
    Sum* d;
    uint32_t a[4];
  } given{d, {a[0], a[1], a[2], a[3]}};
  warp_together<Given>(given, [=](Given*(&lanes)[32]) {
    std::vector<Given> all;
    for (const Given* lane : lanes) all.push_back(*lane);
    products_of_warp().now.push_back([=] {
      std::vector<float> rows(16 * 2 * kHalf), columns(kTokens * 2 * kHalf);
      for (int lane = 0; lane < 32; ++lane) {
        for (int word = 0; word < 4; ++word) {
          for (int i = 0; i < kPack; ++i) {
            Element e;
            std::memcpy(&e, reinterpret_cast<const char*>(&all[lane].a[word]) + i * sizeof(Element), sizeof(Element));
            const int row = lane / 4 + word % 2 * 8, column = word / 2 * kHalf + lane % 4 * kPack + i;
            rows[row * 2 * kHalf + column] = value(e);
          }
        }
      }
      const uint32_t start = uint32_t(b & 0x3FFF) << 4;
      for (int token = 0; token < kTokens; ++token) {
        for (int i = 0; i < 2 * kHalf; ++i) {
          Element e;
          const uint32_t address = start + token / 8 * 1024 + token % 8 * 128 + i * sizeof(Element);
          std::memcpy(&e, at(swizzle128(address), sizeof(Element)), sizeof(Element));
          columns[token * 2 * kHalf + i] = value(e);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int j = 0; j < int(kSums); ++j) {
          const float* row = &rows[(lane / 4 + j % 4 / 2 * 8) * 2 * kHalf];
          const float* column = &columns[(j / 4 * 8 + lane % 4 * 2 + j % 2) * 2 * kHalf];
          Sum sum = all[lane].d[j];
          for (int k = 0; k < 2 * kHalf; ++k) sum += Sum(row[k] * column[k]);
          all[lane].d[j] = sum;
        }
      }
    });
  });
}
template <size_t kSums>
void wgmma_bf16(float (&d)[kSums], const uint32_t* a, uint64_t b) {
  wgmma<uint16_t>(d, a, b, from_bf16);
}
template <size_t kSums>
void wgmma_f16(float (&d)[kSums], const uint32_t* a, uint64_t b) {
  wgmma<uint16_t>(d, a, b, from_f16);
}
template <size_t kSums>
void wgmma_s8(int32_t (&d)[kSums], const uint32_t* a, uint64_t b) {
  wgmma<int8_t>(d, a, b, from_s8);
}

}  // namespace pg_kernels::ptx
