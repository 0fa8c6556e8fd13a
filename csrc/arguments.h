// The checks of the operators that run on the CPU and on the GPU: made here once, called by both.
// An operator hands on the device that it serves; every tensor must be there.
#pragma once

#include "common.h"
#include "content.h"
#include "match.h"
#include "pixel.h"
#include "statistics.h"

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
  check_storage(t, name);
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

// partials (N, T, 3); s, mean, std (N,)
inline void check_combine_moments(Device device, const Tensor& partials, const Tensor& s,
                                  const Tensor& mean, const Tensor& std) {
  const i64 n = size_of(partials, 0);
  check(partials, "partials", device, partials, {ScalarType::Float}, {n, ANY, 3});
  check(s, "s", device, partials, {ScalarType::Float}, {n});
  check(mean, "mean", device, partials, {ScalarType::Float}, {n});
  check(std, "std", device, partials, {ScalarType::Float}, {n});
}

// Of each block: sums (N, T, C), s (N,), means (N, C); of the last one partials (N, T, 3), and
// mean, std (N,), where they are given. In launches of at most MEANS_BLOCKS.
inline std::vector<Means> check_combine_means(Device device, const std::vector<Tensor>& sums,
                                              const std::vector<Tensor>& s, const Shape& pixels,
                                              const std::vector<Tensor>& means,
                                              const OptionalTensor& partials, double eps,
                                              const OptionalTensor& mean,
                                              const OptionalTensor& std) {
  const size_t count = sums.size();
  STD_TORCH_CHECK(count > 0 && s.size() == count && pixels.size() == count && means.size() == count,
                  "sums, s, pixels, means: expected as many of each, at least one, got ", count,
                  ", ", s.size(), ", ", pixels.size(), " and ", means.size());
  const Tensor& first = sums[0];
  const i64 n = size_of(first, 0);
  std::vector<Means> all;
  for (size_t b = 0; b < count; ++b) {
    check(sums[b], "sums", device, first, {ScalarType::Float}, {n, ANY, ANY});
    check(s[b], "s", device, first, {ScalarType::Float}, {n});
    check(means[b], "means", device, first, {ScalarType::Float}, {n, size_of(sums[b], 2)});
    STD_TORCH_CHECK(pixels[b] > 0, "pixels: expected a positive number, got ", pixels[b]);
    if (b % MEANS_BLOCKS == 0) all.push_back({n});
    Means& a = all.back();
    a.sums[a.blocks] = data<float>(sums[b]);
    a.s[a.blocks] = mutable_data<float>(s[b]);
    a.slots[a.blocks] = static_cast<int>(sums[b].sizes()[1]);
    a.channels[a.blocks] = static_cast<int>(sums[b].sizes()[2]);
    a.pixels[a.blocks] = static_cast<float>(pixels[b]);
    a.means[a.blocks++] = mutable_data<float>(means[b]);
  }
  STD_TORCH_CHECK(mean.has_value() == std.has_value() && (partials || !mean),
                  "mean, std: expected both or none, and none without partials");
  if (partials) {
    check(*partials, "partials", device, first, {ScalarType::Float}, {n, ANY, 3});
    Means& a = all.back();
    a.partials = data<float>(*partials);
    a.parts = static_cast<int>(partials->sizes()[1]);
    a.eps = static_cast<float>(eps);
    if (mean) {
      check(*mean, "mean", device, first, {ScalarType::Float}, {n});
      check(*std, "std", device, first, {ScalarType::Float}, {n});
      a.mean = mutable_data<float>(*mean), a.std = mutable_data<float>(*std);
    }
  }
  return all;
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
  check(sample, "sample", device, sample, {ScalarType::Long}, {n});
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

// The arguments of match_loss as the kernels take them: phi, target, d_r (N, C), weight (C,),
// settings (3,), losses (T, N), all else (N,).
inline MatchLoss check_match_loss(Device device, const Tensor& phi, const Tensor& target,
                                  const Tensor& weight, const Tensor& s, int64_t pixels,
                                  const Tensor& settings, const Tensor& losses,
                                  const Tensor& updates, const Tensor& active,
                                  const Tensor& converged, const Tensor& d_r, const Tensor& d_s) {
  const i64 n = size_of(phi, 0), c = size_of(phi, 1);
  const auto expect = [&](const Tensor& t, const char* name, ScalarType dtype, const Shape& shape) {
    check(t, name, device, phi, {dtype}, shape);
  };
  expect(phi, "phi", ScalarType::Float, {n, ANY});
  expect(target, "target", ScalarType::Float, {n, c});
  expect(weight, "weight", ScalarType::Float, {c});
  expect(s, "s", ScalarType::Float, {n});
  STD_TORCH_CHECK(pixels > 0, "pixels: expected a positive number, got ", pixels);
  expect(settings, "settings", ScalarType::Double, {SETTINGS});
  expect(losses, "losses", ScalarType::Float, {ANY, n});
  expect(updates, "updates", ScalarType::Long, {n});
  expect(active, "active", ScalarType::Int, {n});
  expect(converged, "converged", ScalarType::Int, {n});
  expect(d_r, "d_r", ScalarType::Float, {n, c});
  expect(d_s, "d_s", ScalarType::Float, {n, 1});
  if (device == Device::CPU) check_words(updates, "updates");
  return {n,
          losses.sizes()[0],
          static_cast<int>(c),
          static_cast<float>(pixels),
          data<float>(phi),
          data<float>(target),
          data<float>(weight),
          data<float>(s),
          data<double>(settings),
          mutable_data<float>(losses),
          mutable_data<i64>(updates),
          mutable_data<int32_t>(active),
          mutable_data<int32_t>(converged),
          mutable_data<float>(d_r),
          mutable_data<float>(d_s)};
}

// gradient, x, m, v (N, C, H, W), active, updates (N,), settings (3,), image (N, H, W, C)
inline MatchAdam check_match_adam(Device device, const Tensor& gradient, const Tensor& active,
                                  const Tensor& updates, const Tensor& settings, const Tensor& x,
                                  const Tensor& m, const Tensor& v, const Tensor& image) {
  const i64 n = size_of(x, 0);
  check(x, "x", device, x, {ScalarType::Float}, {n, ANY, ANY, ANY});
  const Shape shape = shape_of(x);
  check_image_size(shape[1], shape[2], shape[3]);
  for (const auto& [t, name] : {std::pair{&gradient, "gradient"}, {&m, "m"}, {&v, "v"}})
    check(*t, name, device, x, {ScalarType::Float}, shape);
  check(active, "active", device, x, {ScalarType::Int}, {n});
  check(updates, "updates", device, x, {ScalarType::Long}, {n});
  check(settings, "settings", device, x, {ScalarType::Double}, {SETTINGS});
  check(image, "image", device, x, {ScalarType::Float, ScalarType::BFloat16},
        {n, shape[2], shape[3], shape[1]});
  return {n,
          static_cast<int>(shape[1]),
          static_cast<int>(shape[2] * shape[3]),
          data<float>(gradient),
          data<int32_t>(active),
          data<i64>(updates),
          data<double>(settings),
          mutable_data<float>(x),
          mutable_data<float>(m),
          mutable_data<float>(v),
          image.mutable_data_ptr()};
}

// The parts of weights_content's launches, CONTENT_PARTS at a time; sums (P, CONTENT_LANES).
inline std::vector<ContentParts> check_weights_content(Device device,
                                                       const std::vector<Tensor>& parameters,
                                                       const Tensor& sums) {
  const i64 count = static_cast<i64>(parameters.size());
  check(sums, "sums", device, sums, {ScalarType::Long}, {count, CONTENT_LANES});
  std::vector<ContentParts> all;
  for (i64 i = 0; i < count; ++i) {
    const Tensor& p = parameters[i];
    const std::string name = "parameters[" + std::to_string(i) + "]";
    STD_TORCH_CHECK(p.device().type() == device && p.device().index() == sums.device().index(),
                    name, ": expected a tensor on the device of sums");
    STD_TORCH_CHECK(p.is_contiguous() && p.element_size() % 2 == 0, name,
                    ": expected a contiguous tensor of 2, 4 or 8 bytes a number");
    check_storage(p, name.c_str());
    if (i % CONTENT_PARTS == 0) all.push_back({});
    ContentParts& parts = all.back();
    parts.at[parts.n] = p.const_data_ptr();
    parts.bytes[parts.n++] = p.numel() * static_cast<i64>(p.element_size());
  }
  return all;
}

// active (N,), remaining (1,)
inline void check_match_remaining(Device device, const Tensor& active, const Tensor& remaining) {
  check(active, "active", device, active, {ScalarType::Int}, {active.numel()});
  check(remaining, "remaining", device, active, {ScalarType::Int}, {1});
}

}  // namespace fastphi
