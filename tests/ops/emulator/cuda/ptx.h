// Replaces csrc/cuda/ptx.h on a machine without a GPU. Kernels compile as C++, and every thread of a block is a
// coroutine. An instruction of a whole warp runs when the last lane arrives.
//
// Copies run in one of two ways. Late: when the kernel waits for them, which finds reads that come too early. At once,
// with the last warp running as far ahead of the others as it can, which finds memory that is released too early.
//
// Shared memory begins as NaN. These are errors: a block whose threads all wait, and an address that the hardware would
// refuse.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
template <class T>
T __ldg(const T* from) {
  return *from;
}

namespace pg_kernels::ptx {

struct Copy {
  void* to;
  const void* from;
  bool valid;  // else zeros are written
};

struct Warp {
  void* given[32];
  int arrived = 0;
  int64_t turn = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<Copy> copies;                  // not committed
  std::vector<std::vector<Copy>> committed;  // not waited for
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  std::function<void()> body;
  ucontext_t scheduler;
  int current = 0, arrived = 0;
  bool any = false, answer = false, yields = false;
  int64_t turn = 0, progress = 0;
  std::string error;
};
inline Block* block = nullptr;
inline int device = 0;
// A device is a number: 80 is an A100, 90 an H100; 180 and 190 are the same GPUs with copies that run at once.
inline bool copies_at_once() { return device >= 100; }
inline int compute_capability(int device) { return device % 100; }
constexpr int kStack = 128 * 1024;

}  // namespace pg_kernels::ptx

inline dim3 threadIdx, blockIdx, gridDim;

namespace pg_kernels::ptx {

inline void pause() {
  Thread& self = block->threads[block->current];
  swapcontext(&self.context, &block->scheduler);
}
// Called after an event that others may wait for: lets them run before this warp goes on.
inline void yield_warp() {
  block->yields = true;
  if (copies_at_once()) pause();
}

// Runs an instruction of a whole warp: `all` receives what each lane passed as `given`.
template <class T>
void warp_together(T& given, const std::function<void(T* (&)[32])>& all) {
  Warp& warp = block->warps[block->current / 32];
  warp.given[block->current % 32] = &given;
  const int64_t turn = warp.turn;
  ++block->progress;
  if (++warp.arrived == 32) {
    T* of_lanes[32];
    for (int i = 0; i < 32; ++i) of_lanes[i] = static_cast<T*>(warp.given[i]);
    all(of_lanes);
    warp.arrived = 0;
    ++warp.turn;
  }
  while (warp.turn == turn) pause();
}

inline bool block_any(bool here) {
  const int64_t turn = block->turn;
  ++block->progress;
  block->any = block->any || here;
  if (++block->arrived == int(block->threads.size())) {
    block->answer = block->any;
    block->any = false;
    block->arrived = 0;
    ++block->turn;
  }
  while (block->turn == turn) pause();
  return block->answer;
}

inline unsigned char* shared() { return block->shared; }
inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const unsigned char*>(pointer) - block->shared);
}
inline unsigned char* at(uint32_t address, size_t size) {
  const size_t room = block->memory.size() - (block->shared - block->memory.data());
  if (address % size != 0 || address + size > room)
    throw std::runtime_error("shared memory: beyond its end or misaligned");
  return block->shared + address;
}

template <class T>
T load(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) throw std::runtime_error("a load is misaligned");
  return *static_cast<const T*>(from);
}
inline uint64_t evict_first() { return 0; }
inline uint4 load_streaming(const void* from, uint64_t) { return load<uint4>(from); }
inline uint4 load16(const void* from) { return load<uint4>(from); }
inline uint32_t load4(const void* from) { return load<uint32_t>(from); }

inline void make(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}
inline void copy_async(uint32_t to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) throw std::runtime_error("a copy is misaligned");
  const Copy copy{at(to, 16), from, valid};
  if (copies_at_once()) {
    make(copy);
  } else {
    block->threads[block->current].copies.push_back(copy);
  }
}
inline void copies_commit() {
  Thread& self = block->threads[block->current];
  self.committed.push_back(std::move(self.copies));
  self.copies.clear();
}
template <int kPending>
void copies_wait() {
  auto& groups = block->threads[block->current].committed;
  while (int(groups.size()) > kPending) {
    for (const Copy& copy : groups.front()) make(copy);
    groups.erase(groups.begin());
  }
}

inline void load_matrices(uint32_t address, uint32_t (&to)[4]) {
  struct Given {
    uint32_t address, *to;
  } given{address, to};
  warp_together<Given>(given, [](Given*(&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&lanes[lane]->to[matrix], at(lanes[matrix * 8 + lane / 4]->address, 16) + lane % 4 * 4, 4);
      }
    }
  });
}

// The product of mma.sync's fragments as the PTX manual defines them. A word holds kPack elements.
template <class Element, class Sum>
void mma(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*value)(Element)) {
  constexpr int kPack = 4 / sizeof(Element), kHalf = 4 * kPack;  // kHalf: columns of half the matrix
  struct Given {
    Sum* d;
    const uint32_t* a;
    uint32_t b[2];
  } given{d, a, {b0, b1}};
  warp_together<Given>(given, [value](Given*(&lanes)[32]) {
    const auto element = [value](uint32_t word, int i) {
      Element e;
      std::memcpy(&e, reinterpret_cast<const char*>(&word) + i * sizeof(Element), sizeof(Element));
      return value(e);
    };
    static float a[16][2 * kHalf], b[8][2 * kHalf];
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kPack; ++i) {
          const int column = half * kHalf + lane % 4 * kPack + i;
          for (int low = 0; low < 2; ++low) a[lane / 4 + 8 * low][column] = element(lanes[lane]->a[half * 2 + low], i);
          b[lane / 4][column] = element(lanes[lane]->b[half], i);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
        Sum sum = lanes[lane]->d[i];
        for (int k = 0; k < 2 * kHalf; ++k) sum += Sum(row[k] * column[k]);
        lanes[lane]->d[i] = sum;
      }
    }
  });
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float from_f16(uint16_t x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return float(y);
}
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_f16(float x) {
  const _Float16 y = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
inline float from_s8(int8_t x) { return x; }

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<uint16_t>(d, a, b0, b1, from_bf16);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<uint16_t>(d, a, b0, b1, from_f16);
}
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<int8_t>(d, a, b0, b1, from_s8);
}

template <float (*from)(uint16_t), uint16_t (*to)(float)>
uint32_t subtract(uint32_t a, uint32_t b) {
  const uint32_t low = to(from(uint16_t(a)) - from(uint16_t(b))), high = to(from(a >> 16) - from(b >> 16));
  return low | high << 16;
}
inline uint32_t subtract_bf16(uint32_t a, uint32_t b) { return subtract<from_bf16, to_bf16>(a, b); }
inline uint32_t subtract_f16(uint32_t a, uint32_t b) { return subtract<from_f16, to_f16>(a, b); }
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return y;
}
inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline uint32_t as_bits(int32_t x) { return uint32_t(x); }
inline float divide(float a, float b) { return a / b; }
inline float divide_approx(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return a * b; }

inline float warp_max(float x) {
  warp_together<float>(x, [](float*(&lanes)[32]) {
    float maximum = *lanes[0];
    for (float* lane : lanes) maximum = std::fmax(maximum, *lane);
    for (float* lane : lanes) *lane = maximum;
  });
  return x;
}

struct OnDevice {
  explicit OnDevice(int which) { device = which; }
};
inline int multiprocessors(int) { return 8; }

inline void run_thread() {
  Block& here = *block;
  try {
    here.body();
  } catch (const std::exception& error) {
    if (here.error.empty()) here.error = error.what();
  }
  Thread& self = here.threads[here.current];
  self.done = true;
  ++here.progress;
  swapcontext(&self.context, &here.scheduler);
}

// Runs the threads of a warp until each waits or is done. Returns how many are not done.
inline int run_warp(int warp) {
  int left;
  int64_t before;
  do {
    before = block->progress;
    block->yields = false;
    left = 0;
    for (int i = 0; i < 32; ++i) {
      block->current = warp * 32 + (copies_at_once() ? 31 - i : i);
      Thread& thread = block->threads[block->current];
      if (thread.done) continue;
      threadIdx = dim3(block->current);
      swapcontext(&block->scheduler, &thread.context);
      left += !thread.done;
    }
  } while (copies_at_once() && !block->yields && block->progress > before);
  return left;
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), dim3 blocks, int threads, int shared_bytes, cudaStream_t,
            Arguments... arguments) {
  const int max_shared = (compute_capability(device) == 90 ? 227 : 163) * 1024;
  if (shared_bytes > max_shared) throw std::runtime_error("emulator: a block has no such shared memory");
  Block here;
  here.threads.resize(threads);
  here.warps.resize(threads / 32);
  here.memory.resize(shared_bytes + 1024);
  here.shared = here.memory.data() + (1024 - reinterpret_cast<uintptr_t>(here.memory.data()) % 1024) % 1024;
  here.memory.resize(here.shared - here.memory.data() + shared_bytes);
  here.body = [&] { kernel(arguments...); };
  for (Thread& thread : here.threads) thread.stack.reset(new char[kStack]);  // left uninitialised: zeroing takes long
  gridDim = blocks;
  block = &here;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = dim3(x, y, z);
        std::fill(here.memory.begin(), here.memory.end(), 0xFF);
        for (Thread& thread : here.threads) {
          thread.done = false;
          thread.copies.clear();
          thread.committed.clear();
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.get();
          thread.context.uc_stack.ss_size = kStack;
          thread.context.uc_link = nullptr;
          makecontext(&thread.context, run_thread, 0);
        }
        for (int left = threads; left > 0 && here.error.empty();) {
          const int64_t before = here.progress;
          left = 0;
          for (int i = 0; i < threads / 32; ++i) left += run_warp(copies_at_once() ? threads / 32 - 1 - i : i);
          if (left > 0 && here.progress == before) here.error = "all threads wait";
        }
        if (!here.error.empty()) {
          block = nullptr;
          throw std::runtime_error("emulator: " + here.error);
        }
      }
    }
  }
  block = nullptr;
}

}  // namespace pg_kernels::ptx

inline void __syncthreads() { pg_kernels::ptx::block_any(false); }
inline void __syncwarp() { pg_kernels::ptx::warp_max(0.0f); }
