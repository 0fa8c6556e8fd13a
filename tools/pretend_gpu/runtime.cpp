// libcudart.so.13: kernels, launches, devices, errors. Memory: memory.cpp; streams, events,
// captures and graphs: graphs.cpp.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "runtime.h"

using namespace pretend;

API int pretend_attribute(int which);

// --- kernels, as nvcc's stubs register and launch them
API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
  Guard guard(state().lock);
  state().kernels[stub] = name;
}

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t launch(const void* stub, const Configuration& c) {
  Node node;
  node.kind = "kernel", node.name = "?";
  {
    Guard guard(state().lock);
    const auto found = state().kernels.find(stub);
    if (found != state().kernels.end()) node.name = found->second;
  }
  node.grid[0] = c.grid.x, node.grid[1] = c.grid.y, node.grid[2] = c.grid.z;
  node.block[0] = c.block.x, node.block[1] = c.block.y, node.block[2] = c.block.z;
  node.shared = static_cast<unsigned>(c.shared);
  if (const int error = check_launch(node)) return done(error);
  return done(put(stream_of(c.stream), std::move(node)));
}

}  // namespace

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                         cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared,
                                 cudaStream_t stream) {
  return launch(stub, {grid, block, shared, stream});
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**,
                                   size_t shared, cudaStream_t stream) {
  return launch(kernel, {grid, block, shared, stream});
}
API cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void**,
                                            size_t shared, cudaStream_t stream) {
  return launch(stub, {grid, block, shared, stream});
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* stub, void**) {
  return launch(stub, {c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream});
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  Node node;
  node.kind = "host function";
  node.run = [=](Stream&) { call(data); };
  return done(put(stream_of(stream), std::move(node)));
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  std::memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 64, a->binaryVersion = a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute which, int value) {
  const bool much = which == cudaFuncAttributeMaxDynamicSharedMemorySize && value > 232448;
  return done(much ? INVALID_VALUE : OK);
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int,
                                                                       size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}

// --- devices
API cudaError_t cudaGetDeviceCount(int* n) {
  *n = device_count();
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return done(INVALID_DEVICE);
  current_device = device;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = pretend_attribute(static_cast<int>(which));
  return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  std::memset(p, 0, sizeof *p);
  std::snprintf(p->name, sizeof p->name, "%s", device_name());
  p->totalGlobalMem = size_t{80} << 30, p->l2CacheSize = 50 << 20;
  p->major = 9, p->minor = 0, p->multiProcessorCount = 132, p->warpSize = 32;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->unifiedAddressing = p->concurrentKernels = 1, p->textureAlignment = 512;
  std::memset(&p->uuid, 7 + device, sizeof p->uuid);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, length, "0000:%02d:00.0", device);
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  if (low) *low = 0;
  if (high) *high = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
  count("synchronize");
  const int error = forbidden_in_captures("cudaDeviceSynchronize", true);
  if (!error) wait_for_all();
  return done(error);
}
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** call, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* found) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *call = nullptr;
  for (const char* tail : {"", "_v2"})
    if (driver && !*call) *call = dlsym(driver, (std::string(name) + tail).c_str());
  if (found) *found = *call ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// --- errors
API cudaError_t cudaGetLastError() {
  const auto error = static_cast<cudaError_t>(state().last_error);
  state().last_error = OK;
  return error;
}
API cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(state().last_error); }
API const char* cudaGetErrorString(cudaError_t error) {
  switch (static_cast<int>(error)) {
    case OK:
      return "no error";
    case INVALID_VALUE:
      return "invalid argument";
    case OUT_OF_MEMORY:
      return "out of memory";
    case INVALID_CONFIGURATION:
      return "invalid configuration argument";
    case INVALID_DEVICE:
      return "invalid device ordinal";
    case INVALID_HANDLE:
      return "invalid resource handle";
    case NOT_PERMITTED_IN_CAPTURE:
      return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED:
      return "operation failed due to a previous error during capture";
    default:
      return "pretended error";
  }
}
API const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
