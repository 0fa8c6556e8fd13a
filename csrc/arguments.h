// The checks of the operators that run on the CPU and on the GPU: made here once, called by both.
// An operator hands on the device that it serves; every tensor must be there.
#pragma once

#include "common.h"
#include "pixel.h"

namespace fastphi {

using Device = torch::headeronly::DeviceType;

constexpr i64 ANY = -1;                  // fits any size but 0 in `fits`
constexpr i64 MAX_IMAGE = i64{1} << 30;  // elements: places in an image are 32 bit

inline std::string text(const std::vector<ScalarType>& dtypes) {
  std::string out;
  for (size_t i = 0; i < dtypes.size(); ++i)
    out += (i ? i + 1 < dtypes.size() ? ", " : " or " : "") +
           std::string(torch::headeronly::toString(dtypes[i]));
  return out;
}

// A dense tensor of one of these dtypes and this shape, where `first` is: on `device` for the
// first. Sizes may be 0 only where the expected size says so.
inline void check(const Tensor& t, const char* name, Device device, const Tensor& first,
                  const std::vector<ScalarType>& dtypes, const Shape& shape) {
  STD_TORCH_CHECK(t.device().type() == device && t.device().index() == first.device().index(), name,
                  device == Device::CPU ? ": expected a CPU tensor" : ": expected a CUDA tensor",
                  " on the device of the other arguments");
  bool fits = false;
  for (const ScalarType dtype : dtypes) fits |= t.scalar_type() == dtype;
  STD_TORCH_CHECK(fits, name, ": expected ", text(dtypes), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  const Shape got = shape_of(t);
  fits = got.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i)
    fits = shape[i] == ANY ? got[i] > 0 : got[i] == shape[i];
  STD_TORCH_CHECK(fits, name, ": expected shape ", text(shape), " (-1: any size but 0), got ",
                  text(got));
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor; call .contiguous()");
}

inline i64 size_of(const Tensor& t, int64_t dim) { return t.dim() > dim ? t.sizes()[dim] : 0; }

inline Dtype dtype_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Byte    ? Dtype::UINT8
         : dtype == ScalarType::Float ? Dtype::FLOAT32
                                      : Dtype::BFLOAT16;
}

inline void check_word(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < int64_t{1} << 32, name,
                  ": expected a number in [0, 2^32), ", "got ", value);
}

// On the CPU alone: a GPU's data cannot be looked at without waiting for it.
inline void check_words(const Tensor& t, const char* name) {
  const int64_t* values = data<int64_t>(t);
  for (i64 i = 0; i < t.numel(); ++i) check_word(values[i], name);
}

inline void check_image_size(i64 channels, i64 height, i64 width) {
  STD_TORCH_CHECK(channels > 0 && height > 0 && width > 0,
                  "channels, height, width: expected positive sizes, got ", channels, ", ", height,
                  ", ", width);
  STD_TORCH_CHECK(channels <= MAX_IMAGE / height / width,
                  "channels, height, width: expected at most 2^30 elements, got ", channels, " x ",
                  height, " x ", width);
}

// partials (N, T, 3), s (N,)
inline void check_combine_stats(Device device, const Tensor& partials, const Tensor& s) {
  const i64 n = size_of(partials, 0);
  check(partials, "partials", device, partials, {ScalarType::Float}, {n, ANY, 3});
  check(s, "s", device, partials, {ScalarType::Float}, {n});
}

// sums (N, T, C), s (N,), means (N, C)
inline void check_combine_means(Device device, const Tensor& sums, const Tensor& s, int64_t pixels,
                                const Tensor& means) {
  const i64 n = size_of(sums, 0);
  check(sums, "sums", device, sums, {ScalarType::Float}, {n, ANY, ANY});
  check(s, "s", device, sums, {ScalarType::Float}, {n});
  check(means, "means", device, sums, {ScalarType::Float}, {n, size_of(sums, 2)});
  STD_TORCH_CHECK(pixels > 0, "pixels: expected a positive number, got ", pixels);
}

// image (N, A, B, D) -> out, whose sizes are the image's in the order `axes`
inline void check_image_layout(Device device, const Tensor& image, const Tensor& out,
                               const Shape& axes) {
  const i64 n = size_of(image, 0);
  check(image, "image", device, image, {ScalarType::Byte, ScalarType::Float, ScalarType::BFloat16},
        {n, ANY, ANY, ANY});
  Shape shape;
  for (const i64 axis : axes) shape.push_back(image.sizes()[axis]);
  check_image_size(shape[1], shape[2], shape[3]);
  check(out, "out", device, image, {ScalarType::Float, ScalarType::BFloat16}, shape);
}

inline void check_noise_normal(Device device, const Tensor& sample, int64_t stream,
                               const Tensor& draw, int64_t channels, int64_t height,
                               int64_t width) {
  for (const auto& [t, name] : {std::pair{&sample, "sample"}, std::pair{&draw, "draw"}})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->dim() == 1 && t->is_contiguous(),
                    name, ": expected a contiguous int64 tensor (N,), got shape ",
                    text(shape_of(*t)));
  const i64 n = sample.numel();
  STD_TORCH_CHECK(draw.numel() == n, "draw: expected ", n, " numbers like sample, got ",
                  draw.numel());
  check(draw, "draw", device, sample, {ScalarType::Long}, {n});
  check_word(stream, "stream");
  check_image_size(channels, height, width);
}

// The arguments of noisy_image as the kernels take them.
inline NoisyImages check_noisy_image(Device device, const Tensor& images,
                                     const OptionalTensor& rows, const Tensor& sigma, int64_t seed,
                                     const Tensor& sample, int64_t stream, const Tensor& draw,
                                     const Tensor& out) {
  check(images, "images", device, images, {ScalarType::Byte, ScalarType::Float},
        {size_of(images, 0), ANY, ANY, ANY});
  const Shape s = shape_of(images);
  const bool packed = images.scalar_type() == ScalarType::Byte;
  const i64 c = s[packed ? 3 : 1], h = s[packed ? 1 : 2], w = s[packed ? 2 : 3];
  const i64 n = rows ? rows->numel() : s[0];
  check_image_size(c, h, w);
  if (rows) check(*rows, "rows", device, images, {ScalarType::Long}, {n});
  check(sigma, "sigma", device, images, {ScalarType::Float}, {n});
  check(sample, "sample", device, images, {ScalarType::Long}, {n});
  check(draw, "draw", device, images, {ScalarType::Long}, {n});
  check_word(stream, "stream");
  check(out, "out", device, images, {ScalarType::Float, ScalarType::BFloat16}, {n, h, w, c});
  return {n,
          s[0],
          static_cast<int>(c),
          static_cast<int>(h * w),
          images.const_data_ptr(),
          rows ? data<int64_t>(*rows) : nullptr,
          data<float>(sigma),
          static_cast<uint64_t>(seed),
          static_cast<uint32_t>(stream),
          data<int64_t>(sample),
          data<int64_t>(draw),
          out.mutable_data_ptr()};
}

}  // namespace fastphi
