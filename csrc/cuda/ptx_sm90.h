// Hopper's instructions: products of warpgroups (wgmma), and asynchronous copies that report to a barrier (TMA).
#pragma once

#include <cuda.h>

#include "cuda/ptx.h"

namespace pg_kernels::ptx {

// A matrix in device memory from which boxes are copied, with zeros past its ends. All sizes are multiples of 16 bytes.
// A box is at most 256 · 8 bytes wide; a swizzled box is 128 bytes wide.
using TensorMap = CUtensorMap;

inline TensorMap describe(const void* from, int64_t rows, int64_t row_bytes, int box_rows, int box_bytes,
                          bool swizzled) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("CUDA: the driver has no tensor maps");
    return reinterpret_cast<Encode>(found);
  }();
  TensorMap map;
  const cuuint64_t sizes[] = {cuuint64_t(row_bytes / 8), cuuint64_t(rows)}, strides[] = {cuuint64_t(row_bytes)};
  const cuuint32_t boxes[] = {cuuint32_t(box_bytes / 8), cuuint32_t(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 2, const_cast<void*>(from), sizes, strides, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("CUDA: the copy engine takes no " + std::to_string(rows) + " rows of " +
                             std::to_string(row_bytes) + " bytes in boxes of " + std::to_string(box_rows) + " by " +
                             std::to_string(box_bytes) + " (error " + std::to_string(int(result)) + ")");
  }
  return map;
}

#define PG_REGISTERS_64                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define PG_REGISTERS_72                                                              \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71}"
#define PG_OPERANDS_64(c)                                                                                           \
  c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7]), c(d[8]), c(d[9]), c(d[10]), c(d[11]),     \
      c(d[12]), c(d[13]), c(d[14]), c(d[15]), c(d[16]), c(d[17]), c(d[18]), c(d[19]), c(d[20]), c(d[21]), c(d[22]), \
      c(d[23]), c(d[24]), c(d[25]), c(d[26]), c(d[27]), c(d[28]), c(d[29]), c(d[30]), c(d[31]), c(d[32]), c(d[33]), \
      c(d[34]), c(d[35]), c(d[36]), c(d[37]), c(d[38]), c(d[39]), c(d[40]), c(d[41]), c(d[42]), c(d[43]), c(d[44]), \
      c(d[45]), c(d[46]), c(d[47]), c(d[48]), c(d[49]), c(d[50]), c(d[51]), c(d[52]), c(d[53]), c(d[54]), c(d[55]), \
      c(d[56]), c(d[57]), c(d[58]), c(d[59]), c(d[60]), c(d[61]), c(d[62]), c(d[63])
#define PG_OPERANDS_72(c)                                                                                           \
  c(d[0]), c(d[1]), c(d[2]), c(d[3]), c(d[4]), c(d[5]), c(d[6]), c(d[7]), c(d[8]), c(d[9]), c(d[10]), c(d[11]),     \
      c(d[12]), c(d[13]), c(d[14]), c(d[15]), c(d[16]), c(d[17]), c(d[18]), c(d[19]), c(d[20]), c(d[21]), c(d[22]), \
      c(d[23]), c(d[24]), c(d[25]), c(d[26]), c(d[27]), c(d[28]), c(d[29]), c(d[30]), c(d[31]), c(d[32]), c(d[33]), \
      c(d[34]), c(d[35]), c(d[36]), c(d[37]), c(d[38]), c(d[39]), c(d[40]), c(d[41]), c(d[42]), c(d[43]), c(d[44]), \
      c(d[45]), c(d[46]), c(d[47]), c(d[48]), c(d[49]), c(d[50]), c(d[51]), c(d[52]), c(d[53]), c(d[54]), c(d[55]), \
      c(d[56]), c(d[57]), c(d[58]), c(d[59]), c(d[60]), c(d[61]), c(d[62]), c(d[63]), c(d[64]), c(d[65]), c(d[66]), \
      c(d[67]), c(d[68]), c(d[69]), c(d[70]), c(d[71])
#define PG_FLOATS(x) "+f"(x)
#define PG_INTEGERS(x) "+r"(x)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Hopper's instructions are available in this pass of the compiler.
#define PG_KERNELS_SM90

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the barriers that this thread initialised visible to the copy engine.
__device__ inline void barriers_are_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended. A new barrier is in phase 0.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n .reg .pred done;\nAGAIN:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra "
      "AGAIN;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Copies the box that begins at a row and at a byte of it, a multiple of 16.
__device__ inline void copy_box(uint32_t to, const TensorMap& map, int byte, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(&map), "r"(byte / 8), "r"(row), "r"(barrier)
      : "memory");
}
__device__ inline void copy_box(uint32_t to, const TensorMap& map, int byte, int row, uint32_t barrier,
                                uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(byte / 8), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}
// Waits until this many threads, a multiple of 32, have called it.
__device__ inline void sync_threads(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
template <int kRegisters>
__device__ inline void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Orders writes to a product's registers before the product.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d += a · bᵀ with a [64, 32 bytes] in registers and b [2 · sums, 32 bytes] in shared memory.
#define PG_WGMMA(name, sum, registers, operands, sums, first, instruction, options)               \
  __device__ inline void name(sum(&d)[sums], const uint32_t* a, uint64_t b) {                     \
    asm volatile("wgmma.mma_async.sync.aligned." instruction " " registers ", " first options ";" \
                 : operands                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                           \
  }
#define PG_FIRST_64 "{%64, %65, %66, %67}, %68, "
#define PG_FIRST_72 "{%72, %73, %74, %75}, %76, "
PG_WGMMA(wgmma_bf16, float, PG_REGISTERS_64, PG_OPERANDS_64(PG_FLOATS), 64, PG_FIRST_64, "m64n128k16.f32.bf16.bf16",
         "1, 1, 1, 0")
PG_WGMMA(wgmma_bf16, float, PG_REGISTERS_72, PG_OPERANDS_72(PG_FLOATS), 72, PG_FIRST_72, "m64n144k16.f32.bf16.bf16",
         "1, 1, 1, 0")
PG_WGMMA(wgmma_f16, float, PG_REGISTERS_64, PG_OPERANDS_64(PG_FLOATS), 64, PG_FIRST_64, "m64n128k16.f32.f16.f16",
         "1, 1, 1, 0")
PG_WGMMA(wgmma_f16, float, PG_REGISTERS_72, PG_OPERANDS_72(PG_FLOATS), 72, PG_FIRST_72, "m64n144k16.f32.f16.f16",
         "1, 1, 1, 0")
PG_WGMMA(wgmma_s8, int32_t, PG_REGISTERS_64, PG_OPERANDS_64(PG_INTEGERS), 64, PG_FIRST_64, "m64n128k32.s32.s8.s8", "1")
PG_WGMMA(wgmma_s8, int32_t, PG_REGISTERS_72, PG_OPERANDS_72(PG_INTEGERS), 72, PG_FIRST_72, "m64n144k32.s32.s8.s8", "1")

#endif

}  // namespace pg_kernels::ptx
