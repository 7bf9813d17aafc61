// Work on PyTorch's own threads: a pool beside its own would fight it for the cores.
#pragma once

#include <cstdint>

namespace pg_kernels {

// How many threads torch.set_num_threads allows; 1 in a process without PyTorch.
int64_t thread_count();

// Calls work(context, i) once for every i in [0, count), from several threads at once.
void parallel_for(int64_t count, void (*work)(void* context, int64_t i), void* context);

}  // namespace pg_kernels
