// What a layer leaves per tile, combined per image: partial statistics to the scalar of the
// deferred norm, s = 1/(std + eps), and sums over pixels to channel means, s sum / pixels. The
// order of the sums, and so the bits: ../statistics.h. (Inside the network the next layer merges
// the statistics itself: triton_kernels/scalars.py.)
//
// combine_moments: one block per image, a thread per lane: 12 bytes per tile (384 B per image for
// 64x64x64 in tiles of 128 pixels). combine_means: a block takes 32 channels of an image in one
// block of the network, 8 threads per channel: 4 bytes per tile and channel; where the last scalar
// is still in parts, each merges them for itself. Both read less than a microsecond's worth at any
// batch: bound by the latency of a launch. Measured distance: not yet run on a GPU.
#include "launch.h"
#include "../statistics.h"

namespace fastphi {
namespace {

constexpr int WARP = 32, CHANNELS = 32;

__device__ __forceinline__ Moments shuffle_down(const Moments& m, int lanes) {
  constexpr unsigned ALL = 0xffffffff;
  return {__shfl_down_sync(ALL, m.count, lanes), __shfl_down_sync(ALL, m.mean, lanes),
          __shfl_down_sync(ALL, m.m2, lanes)};
}

// By the first STATS_LANES threads of a block, called by all of them: in thread 0 the moments of
// an image whose parts these are, (slots, 3).
__device__ Moments merged(const float* __restrict__ partials, int slots, int lane) {
  __shared__ Moments lanes[STATS_LANES];
  Moments m = {0, 0, 0};
  if (lane < STATS_LANES) lanes[lane] = m = merge_lane(partials, slots, lane);
#pragma unroll
  for (int half = STATS_LANES / 2; half >= WARP; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane] = m = merge(m, lanes[lane + half]);
  }
  if (lane < WARP)
#pragma unroll
    for (int half = WARP / 2; half > 0; half /= 2) m = merge(m, shuffle_down(m, half));
  return m;
}

__global__ void __launch_bounds__(STATS_LANES)
    combine_moments_kernel(int slots, const float* __restrict__ partials,        // (n, slots, 3)
                           float eps, float* __restrict__ s,                     // (n)
                           float* __restrict__ mean, float* __restrict__ std) {  // (n)
  const i64 i = blockIdx.x;
  const Moments m = merged(partials + i * slots * 3, slots, threadIdx.x);
  if (threadIdx.x == 0) s[i] = inverse_std(m, eps), mean[i] = m.mean, std[i] = spread(m);
}

template <class Out>
__global__ void __launch_bounds__(CHANNELS* MEANS_LANES) combine_means_kernel(const Means a) {
  __shared__ float lanes[MEANS_LANES][CHANNELS];
  __shared__ float scale;
  const i64 i = blockIdx.x;
  const int b = blockIdx.z, slots = a.slots[b], channels = a.channels[b];
  const int lane = threadIdx.y, c = blockIdx.y * CHANNELS + threadIdx.x;
  const int thread = lane * CHANNELS + threadIdx.x;
  if (static_cast<int>(blockIdx.y) * CHANNELS >= channels) return;  // all threads of the block
  if (a.partials && b == a.blocks - 1) {
    const Moments m = merged(a.partials + i * a.parts * 3, a.parts, thread);
    if (thread == 0) {
      scale = inverse_std(m, a.eps);
      if (blockIdx.y == 0) {
        a.s[b][i] = scale;
        if (a.mean) a.mean[i] = m.mean, a.std[i] = spread(m);
      }
    }
  } else if (thread == 0) {
    scale = a.s[b] ? a.s[b][i] : 1.0f;
  }
  const bool there = c < channels;
  lanes[lane][threadIdx.x] =
      there ? sum_lane(a.sums[b] + i * slots * channels + c, slots, channels, lane) : 0.0f;
#pragma unroll
  for (int half = MEANS_LANES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane][threadIdx.x] += lanes[lane + half][threadIdx.x];
  }
  if (lane == 0 && there)
    put(scaled_mean(lanes[0][threadIdx.x], a.pixels[b], scale),
        reinterpret_cast<Out*>(a.means[b]) + i * channels + c);
}

}  // namespace

cudaError_t launch_combine_moments(i64 n, int slots, const float* partials, float eps, float* s,
                                   float* mean, float* std, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  combine_moments_kernel<<<static_cast<unsigned>(n), STATS_LANES, 0, stream>>>(slots, partials, eps,
                                                                               s, mean, std);
  return cudaGetLastError();
}

cudaError_t launch_combine_means(const Means& a, Dtype to, cudaStream_t stream) {
  if (a.n == 0) return cudaSuccess;
  int most = 0;
  for (int b = 0; b < a.blocks; ++b) most = a.channels[b] > most ? a.channels[b] : most;
  const dim3 grid(static_cast<unsigned>(a.n), static_cast<unsigned>(ceil_div(most, CHANNELS)),
                  static_cast<unsigned>(a.blocks));
  const dim3 block(CHANNELS, MEANS_LANES);
  const auto kernel =
      to == Dtype::BFLOAT16 ? combine_means_kernel<Bf16> : combine_means_kernel<float>;
  kernel<<<grid, block, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace fastphi
