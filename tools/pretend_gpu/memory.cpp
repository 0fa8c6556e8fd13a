// Memory of libcudart.so.13: the host's, in blocks that are known to be a device's or pinned.
// Copies and memsets are done; what leaves its block, or is pageable in a capture, is refused.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

using namespace pretend;

namespace {

constexpr size_t MOST = size_t{9} << 30;  // of the host's memory

size_t rounded(size_t bytes) { return (bytes + 511) / 512 * 512; }

// "copy d2d", "copy pinned2d", "copy d2pageable", ...
std::string way(const void* to, const void* from) {
  const auto side = [](const void* p) {
    return device_block(p) ? "d" : is_pinned(p) ? "pinned" : "pageable";
  };
  return std::string("copy ") + side(from) + "2" + side(to);
}

int copy(void* to, const void* from, size_t bytes, Stream* stream) {
  if (!within(to, bytes) || !within(from, bytes)) {
    complain("a copy of " + std::to_string(bytes) + " bytes leaves its memory");
    return INVALID_VALUE;
  }
  Node node;
  node.kind = way(to, from), node.name = std::to_string(bytes);
  const bool pageable = node.kind.find("pageable") != std::string::npos;
  if (stream && stream->capture != Capture::NONE && pageable) {
    stream->capture = Capture::BROKEN;
    complain("a copy of pageable memory in a capture");
    return NOT_PERMITTED_IN_CAPTURE;
  }
  node.run = [=, what = node.kind](Stream& in) {
    access(in, from, bytes, false, what);
    access(in, to, bytes, true, what);
    std::memmove(to, from, bytes);
  };
  count("bytes " + node.kind, static_cast<long>(bytes));
  const int error = put(stream, std::move(node));
  if (!error && pageable && stream) merge(host_clock(), stream->known);  // the host waits for those
  return error;
}

int set(void* to, int value, size_t bytes, Stream* stream) {
  if (!within(to, bytes)) {
    complain("a memset of " + std::to_string(bytes) + " bytes leaves its memory");
    return INVALID_VALUE;
  }
  Node node;
  node.kind = "memset", node.name = std::to_string(bytes);
  node.run = [=](Stream& in) {
    access(in, to, bytes, true, "memset");
    std::memset(to, value, bytes);
  };
  return put(stream, std::move(node));
}

}  // namespace

API cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (const int error = forbidden_in_captures("cudaMalloc")) return done(error);
  State& all = state();
  Guard guard(all.lock);
  if (all.used + bytes > MOST) return done(OUT_OF_MEMORY);
  *p = std::aligned_alloc(512, rounded(bytes));
  if (!*p) return done(OUT_OF_MEMORY);
  std::memset(*p, 0, bytes);
  all.memory[reinterpret_cast<uintptr_t>(*p)] = {bytes, current_device};
  all.used += bytes, all.peak = std::max(all.peak, all.used);
  ++all.counts["malloc"];
  return cudaSuccess;
}
API cudaError_t cudaFree(void* p) {
  if (!p) return cudaSuccess;
  if (const int error = forbidden_in_captures("cudaFree")) return done(error);
  State& all = state();
  Guard guard(all.lock);
  const auto found = all.memory.find(reinterpret_cast<uintptr_t>(p));
  if (found == all.memory.end()) return done(INVALID_VALUE);
  wait_for_all();
  forget(p, found->second.size);
  all.used -= found->second.size;
  all.memory.erase(found);
  std::free(p);
  ++all.counts["free"];
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) {
  return cudaMalloc(p, bytes);
}
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
  if (const int error = forbidden_in_captures("cudaHostAlloc")) return done(error);
  *p = std::aligned_alloc(512, rounded(bytes));
  Guard guard(state().lock);
  state().pinned[reinterpret_cast<uintptr_t>(*p)] = bytes;
  ++state().counts["host alloc"];
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
API cudaError_t cudaFreeHost(void* p) {
  Guard guard(state().lock);
  state().pinned.erase(reinterpret_cast<uintptr_t>(p));
  std::free(p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  Guard guard(state().lock);
  state().pinned[reinterpret_cast<uintptr_t>(p)] = bytes;
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
  Guard guard(state().lock);
  state().pinned.erase(reinterpret_cast<uintptr_t>(p));
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = size_t{80} << 30, *free = *total - state().used;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  std::memset(a, 0, sizeof *a);
  const Block* block = device_block(p);
  a->type = block          ? cudaMemoryTypeDevice
            : is_pinned(p) ? cudaMemoryTypeHost
                           : cudaMemoryTypeUnregistered;
  a->device = block ? block->device : current_device;
  void* at = const_cast<void*>(p);
  a->devicePointer = a->type == cudaMemoryTypeUnregistered ? nullptr : at;
  a->hostPointer = a->type == cudaMemoryTypeHost ? at : nullptr;
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                cudaStream_t stream) {
  return done(copy(to, from, bytes, stream_of(stream)));
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (const int error = forbidden_in_captures("cudaMemcpy")) return done(error);
  count("synchronous copy");
  Stream* stream = stream_of(nullptr);
  const int error = copy(to, from, bytes, stream);
  merge(host_clock(), stream->known);
  return done(error);
}
API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                    cudaStream_t stream) {
  return done(copy(to, from, bytes, stream_of(stream)));
}
API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                  size_t width, size_t height, cudaMemcpyKind,
                                  cudaStream_t stream) {
  for (size_t i = 0; i < height; ++i)
    if (const int error =
            copy(static_cast<char*>(to) + i * to_pitch,
                 static_cast<const char*>(from) + i * from_pitch, width, stream_of(stream)))
      return done(error);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  *p = const_cast<void*>(symbol);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return done(set(to, value, bytes, stream_of(stream)));
}
API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return done(set(to, value, bytes, stream_of(nullptr)));
}

// --- pools and memory of other processes, of which torch asks
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  static int one;
  *pool = reinterpret_cast<cudaMemPool_t>(&one);
  return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<uint64_t*>(value) = 0;
  return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return cudaSuccess;
}
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
API cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) { return done(NOT_SUPPORTED); }
API cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) {
  return done(NOT_SUPPORTED);
}
API cudaError_t cudaIpcCloseMemHandle(void*) { return done(NOT_SUPPORTED); }
API cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) {
  return done(NOT_SUPPORTED);
}
API cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) {
  return done(NOT_SUPPORTED);
}
