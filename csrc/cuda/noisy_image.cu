// Noisy images in the engine's layout: out[i] = clean[rows[i]] + sigma[i] z_i, (n, H, W, C), of
// uint8 (m, H, W, C) or float32 (m, C, H, W); decoding, noise, sum, layout and rounding in one
// pass.
//
// A thread takes 8 neighbouring pixels with all their channels: 2 C blocks of the generator (four
// elements along a row of one channel each), one run of 8 C bytes in, one of 16 C bytes (bfloat16)
// out. C = 1 and 3 and H W a multiple of 8 have this kernel; whatever else is there, one thread per
// block of the generator and single elements.
//
// Bytes per value: 1 (uint8) or 4 in, 2 or 4 out: 3 at best, 0.7 ps on an H200 (4.3 TB/s).
// Arithmetic per value, as compiled for sm_90a: 73 instructions, of which 60 are the noise (Philox:
// 5 products 32x32->64 and 5 three-input xors; half a Box-Muller transform), 2.2 ps at 132 SMs *
// 128 lanes * 1.98 GHz. So it is bound by the arithmetic of the noise: 27 ns for an image of
// 3x64x64, about 1 % of the network that reads it. Measured distance to that bound: not yet run on
// a GPU.
#include "launch.h"
#include "pixels.cuh"

namespace fastphi {
namespace {

constexpr int THREADS = 128;

template <int C>
__device__ __forceinline__ void load_clean(const uint8_t* image, int pixel, int pixels,
                                           Pixels<C>* to) {
  to->load_packed(image, pixel, pixels);
}

template <int C>
__device__ __forceinline__ void load_clean(const float* image, int pixel, int pixels,
                                           Pixels<C>* to) {
  to->load_planar(image, pixel, pixels);
}

template <int C, class In, class Out>
__global__ void __launch_bounds__(THREADS) noisy_image_kernel(NoisyImages a) {
  const int pixel = (blockIdx.x * THREADS + threadIdx.x) * GROUP;
  if (pixel >= a.pixels) return;
  const i64 size = static_cast<i64>(C) * a.pixels;
  for (i64 i = blockIdx.y; i < a.n; i += gridDim.y) {
    const i64 row = row_of(a, i);
    const float sigma = a.sigma[i];
    Pixels<C> x;
    load_clean(static_cast<const In*>(a.images) + (row < 0 ? 0 : row) * size, pixel, a.pixels, &x);
    if (sigma != 0.0f) {
      const NoiseKey key = noise_key(a, i);
#pragma unroll
      for (int c = 0; c < C; ++c)
#pragma unroll
        for (int four = 0; four < GROUP / 4; ++four) {
          float z[4];
          four_normals(key, static_cast<uint32_t>(c * a.pixels + pixel) / 4 + four, z);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            x.v[c][4 * four + j] = noisy(x.v[c][4 * four + j], sigma, z[j]);
        }
    }
    if (row < 0)  // cannot be an error here: it would have to be waited for
      for (int c = 0; c < C; ++c)
        for (int j = 0; j < GROUP; ++j) x.v[c][j] = bits<float>(uint32_t{0x7fc00000});
    x.store_packed(static_cast<Out*>(a.out) + i * size, pixel, a.pixels);
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(THREADS) noisy_image_any_kernel(NoisyImages a) {
  const int block = blockIdx.x * THREADS + threadIdx.x;
  if (4 * static_cast<i64>(block) >= a.channels * a.pixels) return;
  for (i64 i = blockIdx.y; i < a.n; i += gridDim.y) noisy_four<In, Out>(a, i, block);
}

template <class In, class Out>
void launch(const NoisyImages& a, cudaStream_t stream) {
  const bool groups = whole_groups(a.pixels, a.images, a.out);
  const bool vector = groups && (a.channels == 1 || a.channels == 3);
  const i64 units =
      vector ? a.pixels / GROUP : ceil_div(static_cast<i64>(a.channels) * a.pixels, 4);
  const dim3 grid(static_cast<unsigned>(ceil_div(units, THREADS)),
                  static_cast<unsigned>(a.n < MAX_GRID_Y ? a.n : MAX_GRID_Y));
  const auto kernel = !vector           ? noisy_image_any_kernel<In, Out>
                      : a.channels == 1 ? noisy_image_kernel<1, In, Out>
                                        : noisy_image_kernel<3, In, Out>;
  kernel<<<grid, THREADS, 0, stream>>>(a);
}

}  // namespace

cudaError_t launch_noisy_image(const NoisyImages& a, Dtype in, Dtype out, cudaStream_t stream) {
  if (a.n == 0) return cudaSuccess;
  with_output(out, [&](auto to) {
    using Out = decltype(to);
    in == Dtype::UINT8 ? launch<uint8_t, Out>(a, stream) : launch<float, Out>(a, stream);
  });
  return cudaGetLastError();
}

}  // namespace fastphi
