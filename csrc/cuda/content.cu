// Sums of the bits of tensors, by which a runner sees what torch's version counter does not: each
// 32-bit word times an odd number of its place, in 64-bit whole numbers, so that any change of one
// word changes the sum and no order of adding does.
//
// Lane l of a tensor adds the words l, l + CONTENT_LANES, ...; no shared memory, no atomics. Bound:
// memory, each byte once: the 13.4 M float32 of the default network, 54 MB, 13 us on an H200 (4.3
// TB/s). Measured distance to that bound: not yet run on a GPU.
#include "launch.h"

namespace fastphi {
namespace {

constexpr int THREADS = 128;

__global__ void __launch_bounds__(THREADS)
    weights_content_kernel(const __grid_constant__ ContentParts parts,
                           i64* __restrict__ sums) {  // (parts.n, CONTENT_LANES)
  const int lane = blockIdx.x * THREADS + threadIdx.x;
  const i64 part = blockIdx.y;
  sums[part * CONTENT_LANES + lane] =
      static_cast<i64>(content_of_lane(parts.at[part], parts.bytes[part], lane));
}

}  // namespace

cudaError_t launch_weights_content(const ContentParts& parts, i64* sums, cudaStream_t stream) {
  if (parts.n == 0) return cudaSuccess;
  const dim3 grid(CONTENT_LANES / THREADS, static_cast<unsigned>(parts.n));
  weights_content_kernel<<<grid, THREADS, 0, stream>>>(parts, sums);
  return cudaGetLastError();
}

}  // namespace fastphi
