// The guidance step around the network (../match.h): loss, seed of the gradient and stop per image;
// Adam on the pixels; how many images are left. Images that have stopped are left out.
//
// match_loss: a block per image, a thread per lane: 12 bytes per channel. match_adam: a thread per
// pixel: 30 bytes per value in bfloat16, 0.37 MB per 3x64x64 image, 0.09 us on an H200 (4.3 TB/s).
// match_remaining: one block. Bound by the latency of a launch, but for Adam in large batches.
// Measured distance: not yet run on a GPU.
#include "../match.h"

#include "launch.h"

namespace fastphi {
namespace {

constexpr int THREADS = 128;

__global__ void __launch_bounds__(LOSS_LANES) match_loss_kernel(const MatchLoss a) {
  __shared__ LossSums lanes[LOSS_LANES];
  const i64 i = blockIdx.x;
  const int lane = threadIdx.x;
  if (!a.active[i]) return;  // all threads of the block
  lanes[lane] = loss_lane(a, i, lane);
#pragma unroll
  for (int half = LOSS_LANES / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane] = lanes[lane] + lanes[lane + half];
  }
  if (lane == 0) judge(a, i, lanes[0]);
}

template <class Out>
__global__ void __launch_bounds__(THREADS) match_adam_kernel(const MatchAdam a) {
  const int pixel = blockIdx.x * THREADS + threadIdx.x;
  if (pixel >= a.pixels) return;
  for (i64 i = blockIdx.y; i < a.n; i += gridDim.y)
    if (a.active[i]) adam_pixel<Out>(a, i, pixel, adam_step(a.settings[LR], a.updates[i]));
}

__global__ void __launch_bounds__(THREADS)
    match_remaining_kernel(i64 n, const int32_t* __restrict__ active,  // (n)
                           int32_t* __restrict__ remaining) {          // (1)
  __shared__ int32_t lanes[THREADS];
  const int lane = threadIdx.x;
  int32_t left = 0;
  for (i64 i = lane; i < n; i += THREADS) left += active[i] != 0;
  lanes[lane] = left;
#pragma unroll
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) lanes[lane] += lanes[lane + half];
  }
  if (lane == 0) *remaining = lanes[0];
}

}  // namespace

cudaError_t launch_match_loss(const MatchLoss& a, cudaStream_t stream) {
  if (a.n == 0) return cudaSuccess;
  match_loss_kernel<<<static_cast<unsigned>(a.n), LOSS_LANES, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_match_adam(const MatchAdam& a, Dtype image, cudaStream_t stream) {
  if (a.n == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.pixels, THREADS)),
                  static_cast<unsigned>(a.n < MAX_GRID_Y ? a.n : MAX_GRID_Y));
  const auto kernel = image == Dtype::BFLOAT16 ? match_adam_kernel<Bf16> : match_adam_kernel<float>;
  kernel<<<grid, THREADS, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_match_remaining(i64 n, const int32_t* active, int32_t* remaining,
                                   cudaStream_t stream) {
  match_remaining_kernel<<<1, THREADS, 0, stream>>>(n, active, remaining);
  return cudaGetLastError();
}

}  // namespace fastphi
