// Spatial mean per channel: (n, pixels, channels) -> (n, channels), float32 or bfloat16, in
// float32. Two steps without atomics: blocks sum runs of pixels, combine_means adds the runs' sums.
// The order hangs on pixels and channels only.
//
// A thread sums 16 bytes of channels (one element where the channels are no multiple of that) over
// every LANES-th pixel of its run; lanes are then added in halves. Bound: memory, each element
// once: 8x8x512 bfloat16, 66 kB per image, 15 ns on an H200 (4.3 TB/s). Measured distance to that
// bound: not yet run on a GPU. (The engine's own means come out of the layers, not from here.)
#include "launch.h"
#include "pixels.cuh"

namespace fastphi {
namespace {

constexpr int THREADS = 256, STEPS = 16;  // pixels that a lane adds

// Threads side by side in a pixel and pixels side by side; fixed by the number of channels alone,
// so that alignment, which may change the width of loads, changes no order: a lane adds the same
// pixels.
__host__ __device__ inline int pixel_lanes(int channels) {
  int lanes = THREADS;
  while (lanes > 1 && lanes * channels > THREADS * 8) lanes /= 2;
  return lanes;
}

template <int VECTOR, class T>
__device__ __forceinline__ void add(const T* r, float* sum) {
  if constexpr (VECTOR == 1) {
    sum[0] += to_float(*r);
  } else {
    Run<T, VECTOR> run;
    run.load(r);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum[j] += to_float(run.x[j]);
  }
}

template <int VECTOR, class T>
__global__ void __launch_bounds__(THREADS)
    spatial_mean_fwd_kernel(int pixels, int channels, int slots,
                            const T* __restrict__ r,     // (n, pixels, channels)
                            float* __restrict__ sums) {  // (n, slots, channels)
  extern __shared__ float shared[];                      // (lanes, width)
  const int lanes = pixel_lanes(channels), width = THREADS / lanes * VECTOR;
  const int lane = threadIdx.x / (THREADS / lanes), at = threadIdx.x % (THREADS / lanes) * VECTOR;
  const int slot = blockIdx.x % slots, first = slot * lanes * STEPS;
  const i64 image = blockIdx.x / slots;
  for (int base = 0; base < channels; base += width) {
    const int c = base + at;
    float sum[VECTOR] = {};
    if (c < channels)
      for (int step = 0; step < STEPS; ++step) {
        const int pixel = first + step * lanes + lane;
        if (pixel < pixels) add<VECTOR>(r + (image * pixels + pixel) * channels + c, sum);
      }
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) shared[lane * width + at + j] = sum[j];
    for (int half = lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half)
#pragma unroll
        for (int j = 0; j < VECTOR; ++j)
          shared[lane * width + at + j] += shared[(lane + half) * width + at + j];
    }
    if (lane == 0 && c < channels)
#pragma unroll
      for (int j = 0; j < VECTOR; ++j)
        sums[(image * slots + slot) * channels + c + j] = shared[at + j];
    __syncthreads();
  }
}

template <class T>
void launch(i64 n, int pixels, int channels, const T* r, float* sums, cudaStream_t stream) {
  constexpr int VECTOR = 16 / sizeof(T);
  const int slots = spatial_mean_slots(pixels, channels);
  const bool whole = channels % VECTOR == 0 && reinterpret_cast<uintptr_t>(r) % 16 == 0;
  const auto kernel = whole ? spatial_mean_fwd_kernel<VECTOR, T> : spatial_mean_fwd_kernel<1, T>;
  const size_t bytes = THREADS * (whole ? VECTOR : 1) * sizeof(float);
  kernel<<<static_cast<unsigned>(n * slots), THREADS, bytes, stream>>>(pixels, channels, slots, r,
                                                                       sums);
}

}  // namespace

int spatial_mean_slots(int pixels, int channels) {
  return static_cast<int>(ceil_div(pixels, pixel_lanes(channels) * STEPS));
}

cudaError_t launch_spatial_mean_fwd(i64 n, int pixels, int channels, const void* r, Dtype dtype,
                                    float* sums, void* means, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  if (dtype == Dtype::BFLOAT16)
    launch(n, pixels, channels, static_cast<const Bf16*>(r), sums, stream);
  else
    launch(n, pixels, channels, static_cast<const float*>(r), sums, stream);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  Means a{n, 1};
  a.sums[0] = sums, a.slots[0] = spatial_mean_slots(pixels, channels), a.channels[0] = channels;
  a.pixels[0] = static_cast<float>(pixels);
  a.means[0] = static_cast<float*>(means);  // of `dtype`
  return launch_combine_means(a, dtype, stream);
}

}  // namespace fastphi
