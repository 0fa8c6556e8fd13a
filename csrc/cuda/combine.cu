// What a layer leaves per tile, combined per image: partial statistics to the scalar of the
// deferred norm, s = 1/(std + eps), and sums over pixels to channel means, s sum / pixels. The
// order of the sums, and so the bits: ../statistics.h.
//
// combine_stats: one block per image, a thread per lane: 12 bytes per tile (384 B per image for
// 64x64x64 in tiles of 128 pixels). combine_means: a block takes 32 channels of an image, 8 threads
// per channel: 4 bytes per tile and channel. Both read less than a microsecond's worth at any
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

__global__ void __launch_bounds__(STATS_LANES)
    combine_stats_kernel(int slots, const float* __restrict__ partials,        // (n, slots, 3)
                         float eps, float* __restrict__ s,                     // (n)
                         float* __restrict__ mean, float* __restrict__ std) {  // (n) or null
  __shared__ Moments lanes[STATS_LANES];
  const i64 i = blockIdx.x;
  const int lane = threadIdx.x;
  Moments m = merge_lane(partials + i * slots * 3, slots, lane);
  lanes[lane] = m;
#pragma unroll
  for (int half = STATS_LANES / 2; half >= WARP; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane] = m = merge(m, lanes[lane + half]);
  }
  if (lane >= WARP) return;
#pragma unroll
  for (int half = WARP / 2; half > 0; half /= 2) m = merge(m, shuffle_down(m, half));
  if (lane == 0) {
    s[i] = inverse_std(m, eps);
    if (mean) mean[i] = m.mean, std[i] = spread(m);
  }
}

template <class Out>
__global__ void __launch_bounds__(CHANNELS* MEANS_LANES)
    combine_means_kernel(int slots, int channels,
                         const float* __restrict__ sums,           // (n, slots, channels)
                         const float* __restrict__ s,              // (n) or null
                         float pixels, Out* __restrict__ means) {  // (n, channels)
  __shared__ float lanes[MEANS_LANES][CHANNELS];
  const i64 i = blockIdx.x;
  const int lane = threadIdx.y, c = blockIdx.y * CHANNELS + threadIdx.x;
  const bool there = c < channels;
  lanes[lane][threadIdx.x] =
      there ? sum_lane(sums + i * slots * channels + c, slots, channels, lane) : 0.0f;
#pragma unroll
  for (int half = MEANS_LANES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane][threadIdx.x] += lanes[lane + half][threadIdx.x];
  }
  if (lane == 0 && there)
    put(scaled_mean(lanes[0][threadIdx.x], pixels, s ? s[i] : 1.0f), means + i * channels + c);
}

}  // namespace

cudaError_t launch_combine_stats(i64 n, int slots, const float* partials, float eps, float* s,
                                 float* mean, float* std, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  combine_stats_kernel<<<static_cast<unsigned>(n), STATS_LANES, 0, stream>>>(slots, partials, eps,
                                                                             s, mean, std);
  return cudaGetLastError();
}

cudaError_t launch_combine_means(i64 n, int slots, int channels, const float* sums, const float* s,
                                 float pixels, void* means, Dtype to, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(n), static_cast<unsigned>(ceil_div(channels, CHANNELS)));
  const dim3 block(CHANNELS, MEANS_LANES);
  if (to == Dtype::BFLOAT16)
    combine_means_kernel<<<grid, block, 0, stream>>>(slots, channels, sums, s, pixels,
                                                     static_cast<Bf16*>(means));
  else
    combine_means_kernel<<<grid, block, 0, stream>>>(slots, channels, sums, s, pixels,
                                                     static_cast<float*>(means));
  return cudaGetLastError();
}

}  // namespace fastphi
