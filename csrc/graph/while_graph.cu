#include "while_graph.h"

#include <stdexcept>
#include <string>

namespace fastphi {
namespace {

__global__ void go_on_kernel(cudaGraphConditionalHandle handle, const int32_t* remaining) {
  cudaGraphSetConditional(handle, *remaining != 0);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call of anyone else does not find it
  throw std::runtime_error(std::string("while_graph: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

WhileGraph::WhileGraph(uintptr_t body, uintptr_t remaining) {
  try {
    build(body, remaining);
  } catch (...) {
    destroy();
    throw;
  }
}

WhileGraph::~WhileGraph() { destroy(); }

void WhileGraph::destroy() {
  if (exec_) cudaGraphExecDestroy(exec_);
  if (graph_) cudaGraphDestroy(graph_);
  exec_ = nullptr, graph_ = nullptr;
}

void WhileGraph::build(uintptr_t body, uintptr_t remaining) {
  check(cudaGraphCreate(&graph_, 0), "cudaGraphCreate");
  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, graph_, 1, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  cudaGraphNodeParams loop = {};
  loop.type = cudaGraphNodeTypeConditional;
  loop.conditional.handle = handle;
  loop.conditional.type = cudaGraphCondTypeWhile;
  loop.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&node, graph_, nullptr, nullptr, 0, &loop), "cudaGraphAddNode");
#else
  check(cudaGraphAddNode(&node, graph_, nullptr, 0, &loop), "cudaGraphAddNode");
#endif
  const cudaGraph_t inside = loop.conditional.phGraph_out[0];
  check(cudaGraphAddChildGraphNode(&node, inside, nullptr, 0, reinterpret_cast<cudaGraph_t>(body)),
        "cudaGraphAddChildGraphNode");
  const int32_t* flag = reinterpret_cast<const int32_t*>(remaining);
  void* arguments[] = {&handle, &flag};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(go_on_kernel);
  kernel.gridDim = kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  cudaGraphNode_t last;
  check(cudaGraphAddKernelNode(&last, inside, &node, 1, &kernel), "cudaGraphAddKernelNode");
  check(cudaGraphInstantiate(&exec_, graph_, 0), "cudaGraphInstantiate");
}

void WhileGraph::launch(uintptr_t stream) const {
  check(cudaGraphLaunch(exec_, reinterpret_cast<cudaStream_t>(stream)), "cudaGraphLaunch");
}

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0, cudaGetLastError();
  return version;
}

}  // namespace fastphi
