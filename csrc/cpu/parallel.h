// Runs work on PyTorch's thread pool. A second pool would compete with it for the cores.
#pragma once

#include <cstdint>

namespace pg_kernels {

// Returns the number of threads set by torch.set_num_threads; 1 in a process without PyTorch.
int64_t thread_count();

// Calls work(context, i) once for every i in [0, count), on several threads.
void parallel_for(int64_t count, void (*work)(void* context, int64_t i), void* context);

}  // namespace pg_kernels
