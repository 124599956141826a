// CUDA device code as C++ that runs on the CPU: included before a kernel's file, which g++ then compiles. Each CUDA
// thread is a fiber, so that barriers, shuffles and shared memory behave as on a GPU, and the sanitizers see bounds and
// races. Of the CUDA toolkit only headers are used. A mistake that the simulator finds is printed as one line,
//   cuda_on_cpu: KERNEL block (x, y, z): ...
// and ends the process by abort(). CUDA_ON_CPU_ORDER=forward|backward|random:SEED is the order of threads and blocks;
// with CUDA_ON_CPU_TRACE each launch is said in a line.
//
// Not seen: what nvcc makes of the code, the accuracy of approximate functions, inline assembly, weak memory order.
#pragma once

#if defined(__CUDACC__) || !defined(__GNUC__) || !defined(__x86_64__) || !defined(__linux__)
#error "cuda_on_cpu.h is for g++ on x86-64 Linux"
#endif

#include "intrinsics.h"
#include "launch.h"

#define ATTNEXT_CUDA_ON_CPU 1

// A kernel's name with commas in it stands in parentheses.
#define ATTNEXT_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cuda_on_cpu::launch((grid), (block), (shared_bytes), (stream), #kernel, (kernel), ##__VA_ARGS__)

#define ATTNEXT_SHARED(T, name) T* name = static_cast<T*>(cuda_on_cpu::shared_memory())

// The toolkit's headers define the other qualifiers.
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// Without this, the toolkit's headers would make a variable of a block one of each thread.
#undef __shared__
#define __shared__ static_assert(false, "shared memory has to come from ATTNEXT_SHARED");
