// CUDA kernels as C++ on the threads of the CPU, for tools/gpu_static_threads.py: a thread each,
// blocks one after another, __syncthreads and shuffles as barriers. Checks who computes what, the
// tree of a reduction, alignment of words and bounds (under a sanitizer); says nothing of a GPU's
// arithmetic or speed.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__
#define cudaGetLastError() cudaSuccess
#define LAUNCH(kernel, grid, block, ...) \
  emulate(grid, block, [=](auto... arguments) { kernel(arguments...); }, __VA_ARGS__)

inline thread_local dim3 threadIdx, blockIdx;
inline thread_local int thread_number;
inline dim3 blockDim, gridDim;
inline float shared_memory[12288];  // what a block has without asking for more
inline float exchanged[1024];
inline std::unique_ptr<std::barrier<>> whole_block;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;

inline void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "cuda_threads: %s\n", what);
  std::abort();
}

inline void __syncthreads() { whole_block->arrive_and_wait(); }

inline float __shfl_down_sync(unsigned, float value, int lanes) {
  std::barrier<>& warp = *warps[thread_number / 32];
  exchanged[thread_number] = value;
  warp.arrive_and_wait();
  const float found = thread_number % 32 + lanes < 32 ? exchanged[thread_number + lanes] : value;
  warp.arrive_and_wait();
  return found;
}

template <class T>
T __ldg(const T* memory) {
  expect(reinterpret_cast<uintptr_t>(memory) % sizeof(T) == 0, "a load that is not aligned");
  return *memory;
}

template <class T>
void store(void* memory, T word) {
  expect(reinterpret_cast<uintptr_t>(memory) % sizeof(T) == 0, "a store that is not aligned");
  *static_cast<T*>(memory) = word;
}

template <class Kernel, class... Arguments>
void emulate(dim3 grid, dim3 block, const Kernel& kernel, Arguments... arguments) {
  expect(grid.x > 0 && grid.y > 0 && grid.y <= 65535 && grid.z > 0 && grid.z <= 65535,
         "a grid that CUDA refuses");
  gridDim = grid, blockDim = block;
  const int threads = static_cast<int>(block.x * block.y);
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    for (float& value : shared_memory) value = NAN;
    whole_block = std::make_unique<std::barrier<>>(threads);
    warps.clear();
    for (int w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::jthread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back([=] {
        thread_number = t;
        threadIdx = dim3(t % block.x, t / block.x);
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        kernel(arguments...);
        warps[t / 32]->arrive_and_drop();  // who has returned is not waited for
        whole_block->arrive_and_drop();
      });
  }
}
