// Layout and dtype of images in one pass: (n, C, H, W) <-> (n, H, W, C), uint8 (levels of 255),
// float32 or bfloat16 to float32 or bfloat16.
//
// A thread takes 8 neighbouring pixels with all their channels, where C is 1 or 3 and H W a
// multiple of 8: 16-byte words on both sides. Whatever else is there, one thread per element, in
// the order of the output. Bound: memory, each byte once: float32 to bfloat16, 3x64x64: 74 kB per
// image, 17 ns on an H200 (4.3 TB/s). Measured distance to that bound: not yet run on a GPU.
#include "launch.h"
#include "pixels.cuh"

namespace fastphi {
namespace {

constexpr int THREADS = 128;

template <bool TO_NHWC, int C, class In, class Out>
__global__ void __launch_bounds__(THREADS)
    image_layout_kernel(i64 n, int pixels, const In* __restrict__ image, Out* __restrict__ out) {
  const int pixel = (blockIdx.x * THREADS + threadIdx.x) * GROUP;
  if (pixel >= pixels) return;
  for (i64 i = blockIdx.y; i < n; i += gridDim.y) {
    const i64 at = i * C * pixels;
    Pixels<C> x;
    if (TO_NHWC) {
      x.load_planar(image + at, pixel, pixels);
      x.store_packed(out + at, pixel, pixels);
    } else {
      x.load_packed(image + at, pixel, pixels);
      x.store_planar(out + at, pixel, pixels);
    }
  }
}

template <bool TO_NHWC, class In, class Out>
__global__ void __launch_bounds__(THREADS)
    image_layout_any_kernel(i64 n, int channels, int pixels, const In* __restrict__ image,
                            Out* __restrict__ out) {
  const unsigned e = blockIdx.x * THREADS + threadIdx.x;  // of the output
  const unsigned size = static_cast<unsigned>(channels) * pixels;
  if (e >= size) return;
  const int inner = TO_NHWC ? channels : pixels, outer = e / inner, rest = e - outer * inner;
  const int from = TO_NHWC ? planar_place(outer, rest, channels, pixels)
                           : packed_place(rest, outer, channels, pixels);
  for (i64 i = blockIdx.y; i < n; i += gridDim.y)
    put(to_float(image[i * size + from]), out + i * size + e);
}

template <bool TO_NHWC, class In, class Out>
void launch(i64 n, int channels, int pixels, const In* image, Out* out, cudaStream_t stream) {
  const bool vector = whole_groups(pixels, image, out) && (channels == 1 || channels == 3);
  const i64 units = vector ? pixels / GROUP : static_cast<i64>(channels) * pixels;
  const dim3 grid(static_cast<unsigned>(ceil_div(units, THREADS)),
                  static_cast<unsigned>(n < MAX_GRID_Y ? n : MAX_GRID_Y));
  if (vector) {
    const auto kernel = channels == 1 ? image_layout_kernel<TO_NHWC, 1, In, Out>
                                      : image_layout_kernel<TO_NHWC, 3, In, Out>;
    kernel<<<grid, THREADS, 0, stream>>>(n, pixels, image, out);
  } else {
    image_layout_any_kernel<TO_NHWC><<<grid, THREADS, 0, stream>>>(n, channels, pixels, image, out);
  }
}

template <bool TO_NHWC>
cudaError_t convert(i64 n, int channels, int pixels, const void* image, Dtype in, void* out,
                    Dtype to, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  with_output(to, [&](auto type) {
    auto* o = static_cast<decltype(type)*>(out);
    if (in == Dtype::UINT8)
      launch<TO_NHWC>(n, channels, pixels, static_cast<const uint8_t*>(image), o, stream);
    else if (in == Dtype::BFLOAT16)
      launch<TO_NHWC>(n, channels, pixels, static_cast<const Bf16*>(image), o, stream);
    else
      launch<TO_NHWC>(n, channels, pixels, static_cast<const float*>(image), o, stream);
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_image_to_nhwc(i64 n, int channels, int pixels, const void* image, Dtype in,
                                 void* out, Dtype to, cudaStream_t stream) {
  return convert<true>(n, channels, pixels, image, in, out, to, stream);
}

cudaError_t launch_image_to_nchw(i64 n, int channels, int pixels, const void* image, Dtype in,
                                 void* out, Dtype to, cudaStream_t stream) {
  return convert<false>(n, channels, pixels, image, in, out, to, stream);
}

}  // namespace fastphi
