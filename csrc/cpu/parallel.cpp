#include "cpu/parallel.h"

#include <dlfcn.h>

#include <initializer_list>

namespace pg_kernels {

namespace {

// PyTorch's stable C interface (torch 2.10 and later), looked up at run time: linking to PyTorch would tie a build to
// one version of it.
using Range = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Range, void* context);
using NumThreads = int32_t (*)(uint32_t* count);

struct Torch {
  ParallelFor parallel_for = nullptr;
  NumThreads num_threads = nullptr;

  Torch() {
    for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib", "@rpath/libtorch_cpu.dylib"}) {
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
        parallel_for = reinterpret_cast<ParallelFor>(dlsym(library, "torch_parallel_for"));
        num_threads = reinterpret_cast<NumThreads>(dlsym(library, "torch_get_num_threads"));
        return;
      }
    }
  }

  bool found() const { return parallel_for != nullptr && num_threads != nullptr; }
};

const Torch& torch() {
  static const Torch found;  // looked up at the first call: PyTorch is loaded by then
  return found;
}

struct Each {
  void (*work)(void*, int64_t);
  void* context;
};

void each(int64_t begin, int64_t end, void* context) {
  const Each& all = *static_cast<const Each*>(context);
  for (int64_t i = begin; i < end; ++i) all.work(all.context, i);
}

}  // namespace

int64_t thread_count() {
  uint32_t count = 1;
  if (!torch().found() || torch().num_threads(&count) != 0 || count < 1) return 1;
  return count;
}

void parallel_for(int64_t count, void (*work)(void* context, int64_t i), void* context) {
  Each all{work, context};
  if (count > 1 && torch().found()) {
    torch().parallel_for(0, count, 1, each, &all);
  } else {
    each(0, count, &all);
  }
}

}  // namespace pg_kernels
