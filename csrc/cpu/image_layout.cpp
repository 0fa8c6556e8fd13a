// Layout and dtype of images in one pass: (N, C, H, W) <-> (N, H, W, C), uint8 (levels of 255),
// float32 or bfloat16 to float32 or bfloat16. ../pixel.h
#include "../arguments.h"
#include "../operators.h"
#include "launch.h"

namespace fastphi {
namespace {

using Place = int (*)(int, int, int, int);

template <Place FROM, Place TO, class In, class Out>
void launch_image_layout(i64 n, int channels, int pixels, const In* image, Out* out) {
  const i64 size = static_cast<i64>(channels) * pixels;
  parallel(n * pixels, channels, [&](i64 begin, i64 end) {
    for (i64 u = begin; u < end; ++u) {
      const i64 at = u / pixels * size;
      const int pixel = static_cast<int>(u % pixels);
      for (int c = 0; c < channels; ++c)
        put(to_float(image[at + FROM(pixel, c, channels, pixels)]),
            out + at + TO(pixel, c, channels, pixels));
    }
  });
}

template <Place FROM, Place TO>
void convert(i64 n, i64 channels, i64 pixels, const Tensor& image, const Tensor& out) {
  const int c = static_cast<int>(channels), p = static_cast<int>(pixels);
  const auto from = [&](const auto* in) {
    if (dtype_of(out) == Dtype::BFLOAT16)
      launch_image_layout<FROM, TO>(n, c, p, in, mutable_data<Bf16>(out));
    else
      launch_image_layout<FROM, TO>(n, c, p, in, mutable_data<float>(out));
  };
  if (dtype_of(image) == Dtype::UINT8)
    from(data<uint8_t>(image));
  else if (dtype_of(image) == Dtype::BFLOAT16)
    from(data<Bf16>(image));
  else
    from(data<float>(image));
}

}  // namespace

void image_to_nhwc(Tensor image, Tensor out) {
  check_image_layout(Device::CPU, image, out, {0, 2, 3, 1});
  const Shape s = shape_of(image);
  convert<planar_place, packed_place>(s[0], s[1], s[2] * s[3], image, out);
}

void image_to_nchw(Tensor image, Tensor out) {
  check_image_layout(Device::CPU, image, out, {0, 3, 1, 2});
  const Shape s = shape_of(image);
  convert<packed_place, planar_place>(s[0], s[3], s[1] * s[2], image, out);
}

}  // namespace fastphi
