// libcuda.so.1: what torch and Triton call of the driver. Modules load and launches are checked,
// counted and dropped; tensor maps are checked as cuTensorMapEncodeTiled documents them.
#include <cstdio>
#include <cstring>

#include "state.h"

using namespace pretend;

namespace {

struct Function {
  std::string name;
  std::map<int, int> attributes;
};

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(0x1000 + device); }
int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 0x1000;
}

}  // namespace

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* n) {
  *n = device_count();
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  std::snprintf(name, length, "%s", device_name());
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  std::memset(uuid, 7 + device, sizeof *uuid);
  return CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
  *bytes = size_t{80} << 30;
  return CUDA_SUCCESS;
}
// Of an H100; the runtime asks for the same ones by the same numbers.
API int pretend_attribute(int which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z:
      return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X:
      return 2147483647;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z:
      return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return 232448;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      return 233472;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
      return 65536;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      return 2048;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
      return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
      return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      return 5120;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return 50 << 20;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
      return 1;
    default:
      return 0;
  }
}
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = pretend_attribute(which);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(current_device);
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
  if (context) current_device = device_of(context);
  return CUDA_SUCCESS;
}
static thread_local std::vector<int> pushed;
API CUresult cuCtxPushCurrent_v2(CUcontext context) {
  pushed.push_back(current_device);
  return cuCtxSetCurrent(context);
}
API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (context) *context = context_of(current_device);
  if (!pushed.empty()) current_device = pushed.back(), pushed.pop_back();
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuCtxSynchronize() {
  count("synchronize");
  wait_for_all();
  return static_cast<CUresult>(forbidden_in_captures("cuCtxSynchronize", true));
}
API CUresult cuGetErrorString(CUresult error, const char** text) {
  static thread_local char said[64];
  std::snprintf(said, sizeof said, "pretended error %d", static_cast<int>(error));
  *text = said;
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult error, const char** text) {
  return cuGetErrorString(error, text);
}

// --- modules and launches
API CUresult cuModuleLoadData(CUmodule* module, const void*) {
  static int loaded;
  *module = reinterpret_cast<CUmodule>(&loaded);
  count("module load");
  return static_cast<CUresult>(forbidden_in_captures("cuModuleLoadData"));
}
API CUresult cuModuleLoadDataEx(CUmodule* m, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(m, image);
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(new Function{name, {}});
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  auto& attributes = reinterpret_cast<Function*>(function)->attributes;
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
           : attributes.count(which)                        ? attributes[which]
                                                            : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > 232448)
    return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Function*>(function)->attributes[which] = value;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  auto* function = reinterpret_cast<Function*>(f);
  Node node;
  node.kind = "kernel", node.name = "triton:" + function->name;
  node.grid[0] = c->gridDimX, node.grid[1] = c->gridDimY, node.grid[2] = c->gridDimZ;
  node.block[0] = c->blockDimX, node.block[1] = c->blockDimY, node.block[2] = c->blockDimZ;
  node.shared = c->sharedMemBytes;
  const int allowed = function->attributes[CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES];
  if (node.shared > 49152 && static_cast<unsigned>(allowed) < node.shared) {
    complain(node.name + " has not asked for its shared memory");
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (check_launch(node)) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(put(stream_of(c->hStream), std::move(node)));
}
API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                            unsigned by, unsigned bz, unsigned shared, CUstream stream, void** p,
                            void** extra) {
  CUlaunchConfig c = {};
  c.gridDimX = gx, c.gridDimY = gy, c.gridDimZ = gz;
  c.blockDimX = bx, c.blockDimY = by, c.blockDimZ = bz;
  c.sharedMemBytes = shared, c.hStream = stream;
  return cuLaunchKernelEx(&c, f, p, extra);
}
API CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 1;
  return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  *n = 1;
  return CUDA_SUCCESS;
}

// --- tensor maps and pointers
API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                    void* address, const cuuint64_t* dims,
                                    const cuuint64_t* strides, const cuuint32_t* box,
                                    const cuuint32_t* steps, CUtensorMapInterleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill) {
  static const int BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const unsigned SPANS[] = {0, 32, 64, 128};
  const unsigned item = BYTES[type];
  const char* wrong = nullptr;
  const auto expect = [&](bool good, const char* what) {
    if (!good && !wrong) wrong = what;
  };
  expect(reinterpret_cast<uintptr_t>(map) % 64 == 0, "the map lies on no boundary of 64 bytes");
  expect(reinterpret_cast<uintptr_t>(address) % 16 == 0, "the address is no multiple of 16");
  expect(1 <= rank && rank <= 5, "a rank of 1 to 5");
  for (unsigned i = 0; i < rank && !wrong; ++i) {
    expect(dims[i] && dims[i] <= cuuint64_t{1} << 32, "dimensions of 1 to 2^32");
    expect(box[i] && box[i] <= 256, "boxes of 1 to 256");
    expect(steps[i] && steps[i] <= 8, "element strides of 1 to 8");
    if (i + 1 < rank)
      expect(strides[i] % 16 == 0 && strides[i] < cuuint64_t{1} << 40, "strides of 16 bytes");
  }
  if (!wrong) {
    expect(box[0] * item % 16 == 0, "inner boxes of a multiple of 16 bytes");
    if (1 <= swizzle && swizzle <= 3)
      expect(box[0] * item <= SPANS[swizzle], "boxes of the swizzle");
    const cuuint64_t end = rank > 1 ? strides[rank - 2] * dims[rank - 1] : dims[0] * item;
    expect(device_block(address), "an address of device memory");
    expect(within(address, end), "a tensor that ends in its memory");
  }
  count("tensor map");
  if (wrong) {
    complain(std::string("cuTensorMapEncodeTiled: expected ") + wrong);
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr p) {
  const auto* at = reinterpret_cast<const void*>(p);
  const bool device = device_block(at), pinned = is_pinned(at);
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER || which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) {
    if (!device && !pinned) return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
      *static_cast<CUdeviceptr*>(out) = p;
    else
      *static_cast<unsigned*>(out) = device ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    return CUDA_SUCCESS;
  }
  *static_cast<unsigned*>(out) = 0;
  return CUDA_SUCCESS;
}
API CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr p) {
  Guard guard(state().lock);
  auto it = state().memory.upper_bound(p);
  if (it == state().memory.begin()) return CUDA_ERROR_NOT_FOUND;
  --it;
  if (start) *start = it->first;
  if (bytes) *bytes = it->second.size;
  return CUDA_SUCCESS;
}
