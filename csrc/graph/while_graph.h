// A captured graph that the device runs again and again by itself, until a flag says enough: a
// WHILE node (CUDA 12.4) round a copy of it. No torch header: addresses come as numbers, so one
// build serves every torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastphi {

class WhileGraph {
 public:
  // body: a cudaGraph_t without events, allocations or conditions that cannot be in a WHILE body;
  // it is copied. remaining: int32 on the device, 0 when there is nothing left to do; the body
  // writes it. The device of both must be current.
  WhileGraph(uintptr_t body, uintptr_t remaining);
  ~WhileGraph();
  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;

  // Queues the loop on a cudaStream_t; the body runs once at least.
  void launch(uintptr_t stream) const;

 private:
  void build(uintptr_t body, uintptr_t remaining);
  void destroy();

  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// 13000 for CUDA 13.0; 0 without a driver.
int driver_version();

}  // namespace fastphi
