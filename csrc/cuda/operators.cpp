// The operators of the GPU: checks (../arguments.h, the CPU's), device, stream, allocation where
// there is any, and registration under the schemas of ../ops.cpp.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include "../arguments.h"
#include "launch.h"

#ifndef FASTPHI_BUILD_FLAGS
#define FASTPHI_BUILD_FLAGS "unknown"
#endif

namespace fastphi {
namespace {

// f(stream) on the device and in the stream that torch has current there. The device is set back on
// return.
template <class F>
void on_device_of(const Tensor& t, const char* op, const F& f) {
  const int32_t index = t.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  const cudaError_t error = f(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

Tensor noise_normal_cuda(int64_t seed, Tensor sample, int64_t stream, Tensor draw, int64_t channels,
                         int64_t height, int64_t width) {
  check_noise_normal(Device::CUDA, sample, stream, draw, channels, height, width);
  const i64 n = sample.numel();
  Tensor out = torch::stable::new_empty(sample, {n, channels, height, width}, ScalarType::Float);
  on_device_of(sample, "noise_normal", [&](cudaStream_t on) {
    return launch_noise_normal(n, channels * height * width, static_cast<uint64_t>(seed),
                               data<int64_t>(sample), static_cast<uint32_t>(stream),
                               data<int64_t>(draw), mutable_data<float>(out), on);
  });
  return out;
}

void noisy_image_cuda(Tensor images, OptionalTensor rows, Tensor sigma, int64_t seed, Tensor sample,
                      int64_t stream, Tensor draw, Tensor out) {
  const NoisyImages a =
      check_noisy_image(Device::CUDA, images, rows, sigma, seed, sample, stream, draw, out);
  on_device_of(images, "noisy_image", [&](cudaStream_t on) {
    return launch_noisy_image(a, dtype_of(images), dtype_of(out), on);
  });
}

void image_to_nhwc_cuda(Tensor image, Tensor out) {
  check_image_layout(Device::CUDA, image, out, {0, 2, 3, 1});
  const Shape s = shape_of(image);
  on_device_of(image, "image_to_nhwc", [&](cudaStream_t on) {
    return launch_image_to_nhwc(s[0], static_cast<int>(s[1]), static_cast<int>(s[2] * s[3]),
                                image.const_data_ptr(), dtype_of(image), out.mutable_data_ptr(),
                                dtype_of(out), on);
  });
}

void image_to_nchw_cuda(Tensor image, Tensor out) {
  check_image_layout(Device::CUDA, image, out, {0, 3, 1, 2});
  const Shape s = shape_of(image);
  on_device_of(image, "image_to_nchw", [&](cudaStream_t on) {
    return launch_image_to_nchw(s[0], static_cast<int>(s[3]), static_cast<int>(s[1] * s[2]),
                                image.const_data_ptr(), dtype_of(image), out.mutable_data_ptr(),
                                dtype_of(out), on);
  });
}

void combine_moments_cuda(Tensor partials, double eps, Tensor s, Tensor mean, Tensor std) {
  check_combine_moments(Device::CUDA, partials, s, mean, std);
  on_device_of(partials, "combine_moments", [&](cudaStream_t on) {
    return launch_combine_moments(partials.sizes()[0], static_cast<int>(partials.sizes()[1]),
                                  data<float>(partials), static_cast<float>(eps),
                                  mutable_data<float>(s), mutable_data<float>(mean),
                                  mutable_data<float>(std), on);
  });
}

void combine_means_cuda(std::vector<Tensor> sums, std::vector<Tensor> s, Shape pixels,
                        std::vector<Tensor> means, OptionalTensor partials, double eps,
                        OptionalTensor mean, OptionalTensor std) {
  const auto all =
      check_combine_means(Device::CUDA, sums, s, pixels, means, partials, eps, mean, std);
  on_device_of(sums[0], "combine_means", [&](cudaStream_t on) {
    for (const Means& a : all)
      if (const cudaError_t error = launch_combine_means(a, Dtype::FLOAT32, on);
          error != cudaSuccess)
        return error;
    return cudaSuccess;
  });
}

Tensor spatial_mean_fwd_cuda(Tensor r) {
  check(r, "r", Device::CUDA, r, {ScalarType::Float, ScalarType::BFloat16}, {ANY, ANY, ANY, ANY});
  const Shape s = shape_of(r);
  STD_TORCH_CHECK(s[1] <= MAX_IMAGE / s[2], "r: expected at most 2^30 pixels, got shape ", text(s));
  const int pixels = static_cast<int>(s[1] * s[2]), channels = static_cast<int>(s[3]);
  Tensor out = new_tensor(r, {s[0], s[3]});
  Tensor sums = torch::stable::new_empty(r, {s[0], spatial_mean_slots(pixels, channels), s[3]},
                                         ScalarType::Float);
  on_device_of(r, "spatial_mean_fwd", [&](cudaStream_t on) {
    return launch_spatial_mean_fwd(s[0], pixels, channels, r.const_data_ptr(), dtype_of(r),
                                   mutable_data<float>(sums), out.mutable_data_ptr(), on);
  });
  return out;
}

void weights_content_cuda(std::vector<Tensor> parameters, Tensor sums) {
  const auto all = check_weights_content(Device::CUDA, parameters, sums);
  i64* to = mutable_data<i64>(sums);
  on_device_of(sums, "weights_content", [&](cudaStream_t on) {
    for (const ContentParts& parts : all) {
      if (const cudaError_t error = launch_weights_content(parts, to, on); error != cudaSuccess)
        return error;
      to += parts.n * CONTENT_LANES;
    }
    return cudaSuccess;
  });
}

void match_loss_cuda(Tensor phi, Tensor target, Tensor weight, Tensor s, int64_t pixels,
                     Tensor settings, Tensor losses, Tensor updates, Tensor active,
                     Tensor converged, Tensor d_r, Tensor d_s) {
  const MatchLoss a = check_match_loss(Device::CUDA, phi, target, weight, s, pixels, settings,
                                       losses, updates, active, converged, d_r, d_s);
  on_device_of(phi, "match_loss", [&](cudaStream_t on) { return launch_match_loss(a, on); });
}

void match_adam_cuda(Tensor gradient, Tensor active, Tensor updates, Tensor settings, Tensor x,
                     Tensor m, Tensor v, Tensor image) {
  const MatchAdam a =
      check_match_adam(Device::CUDA, gradient, active, updates, settings, x, m, v, image);
  on_device_of(x, "match_adam",
               [&](cudaStream_t on) { return launch_match_adam(a, dtype_of(image), on); });
}

void match_remaining_cuda(Tensor active, Tensor remaining) {
  check_match_remaining(Device::CUDA, active, remaining);
  on_device_of(active, "match_remaining", [&](cudaStream_t on) {
    return launch_match_remaining(active.numel(), data<int32_t>(active),
                                  mutable_data<int32_t>(remaining), on);
  });
}

// A stream that nobody else has and that does not wait for the legacy one; kept for good.
int64_t new_stream(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaStream_t stream = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  STD_TORCH_CHECK(error == cudaSuccess, "new_stream: ", cudaGetErrorString(error));
  return reinterpret_cast<int64_t>(stream);
}

// JSON: what was compiled. What runs is the driver's choice.
std::string cuda_build_info() {
  return "{\"CUDA\": \"" + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10) + "\", \"flags\": \"" FASTPHI_BUILD_FLAGS "\"}";
}

}  // namespace
}  // namespace fastphi

STABLE_TORCH_LIBRARY_IMPL(fastphi, CUDA, m) {
  using namespace fastphi;
  m.impl("noise_normal", TORCH_BOX(&noise_normal_cuda));
  m.impl("noisy_image", TORCH_BOX(&noisy_image_cuda));
  m.impl("image_to_nhwc", TORCH_BOX(&image_to_nhwc_cuda));
  m.impl("image_to_nchw", TORCH_BOX(&image_to_nchw_cuda));
  m.impl("combine_moments", TORCH_BOX(&combine_moments_cuda));
  m.impl("combine_means", TORCH_BOX(&combine_means_cuda));
  m.impl("spatial_mean_fwd", TORCH_BOX(&spatial_mean_fwd_cuda));
  m.impl("weights_content", TORCH_BOX(&weights_content_cuda));
  m.impl("match_loss", TORCH_BOX(&match_loss_cuda));
  m.impl("match_adam", TORCH_BOX(&match_adam_cuda));
  m.impl("match_remaining", TORCH_BOX(&match_remaining_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastphi, CompositeExplicitAutograd, m) {
  m.impl("cuda_build_info", TORCH_BOX(&fastphi::cuda_build_info));
  m.impl("new_stream", TORCH_BOX(&fastphi::new_stream));
}
