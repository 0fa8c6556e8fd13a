// Every operator of fastphi. Activations are NHWC and dense, (N, H, W, C), with one scalar per
// image beside them: the true activation is s * r. float32 and float64. What each computes: the
// file of its name in cpu/, or in cuda/ for those that the GPU has too (cuda/operators.cpp).
#include "cpu/isa/choice.h"
#include "operators.h"

#ifndef FASTPHI_BUILD_FLAGS
#define FASTPHI_BUILD_FLAGS "unknown"
#endif

STABLE_TORCH_LIBRARY(fastphi, m) {
  m.def(
      "fused_layer_fwd(Tensor r, Tensor s, Tensor? r2, Tensor? s2, Tensor weight, Tensor? bias, "
      "Tensor? "
      "gamma, "
      "float eps, bool relu) -> (Tensor r_out, Tensor s_out, Tensor z, Tensor mean, Tensor std)");
  m.def(
      "fused_layer_bwd(Tensor d_r_out, Tensor d_s_out, Tensor r, Tensor s, Tensor? r2, Tensor? s2, "
      "Tensor weight, Tensor? gamma, Tensor z, Tensor s_out, Tensor mean, Tensor std, bool relu, "
      "bool need_input, bool need_weight) -> (Tensor d_r, Tensor d_s, Tensor d_r2, Tensor d_s2, "
      "Tensor d_weight, Tensor d_bias, Tensor d_gamma)");
  m.def("upsample_fwd(Tensor r, Tensor weight) -> Tensor");
  m.def(
      "upsample_bwd(Tensor d_out, Tensor r, Tensor weight, bool need_input, bool need_weight) -> "
      "(Tensor d_r, Tensor d_weight)");
  m.def("avg_pool_fwd(Tensor r) -> Tensor");
  m.def("avg_pool_bwd(Tensor d_out) -> Tensor");
  m.def("spatial_mean_fwd(Tensor r) -> Tensor");
  m.def("spatial_mean_bwd(Tensor d_mean, int height, int width) -> Tensor");
  // A whole network with gradients, parameters in torch's layout (fastphi/engine/cpu/training.py).
  m.def(
      "unet_train_size(Tensor x, int[] channels, int[] enc_layers, int mid_layers, int[] "
      "dec_layers, "
      "Tensor[] parameters) -> int");
  m.def(
      "unet_train_fwd(Tensor x, int[] channels, int[] enc_layers, int mid_layers, int[] "
      "dec_layers, "
      "float eps, Tensor[] parameters, Tensor(a!) kept) -> Tensor");
  m.def(
      "unet_train_bwd(Tensor d_image, Tensor kept, int[] channels, int[] enc_layers, int "
      "mid_layers, "
      "int[] dec_layers, Tensor[] parameters, bool need_image, Tensor(a!) gradients) -> Tensor");
  m.def(
      "noise_normal(int seed, Tensor sample, int stream, Tensor draw, int channels, int height, "
      "int width) "
      "-> "
      "Tensor");

  // The runner's (fastphi/engine/cpu/runner.py): a whole network in a call, on packed weights,
  // without autograd.
  m.def("pack_conv_weights(Tensor weight, int own, bool transposed) -> Tensor");
  m.def("pack_upsample_weights(Tensor weight) -> Tensor");
  m.def("in_large_pages(Tensor x) -> Tensor");
  m.def("move_to_large_pages(Tensor[] tensors) -> ()");
  m.def("weights_checksum(Tensor[] parameters) -> int");
  m.def("weights_content(Tensor[] parameters, Tensor(a!) sums) -> ()");
  m.def("largest_magnitude(Tensor x) -> float");
  m.def(
      "unet_fwd(Tensor x, int[] channels, int[] enc_layers, int mid_layers, int[] dec_layers, "
      "float eps, "
      "Tensor[] packed, int blocks) -> (Tensor image, Tensor means)");
  m.def(
      "unet_fwd_bf16(Tensor x, int[] channels, int[] enc_layers, int mid_layers, int[] dec_layers, "
      "float eps, Tensor[] packed, int blocks) -> (Tensor image, Tensor means)");
  m.def(
      "match_steps(Tensor(a!) x, Tensor(b!) m, Tensor(c!) v, Tensor(d!) losses, Tensor(e!) "
      "updates, "
      "Tensor(f!) active, Tensor target, Tensor weight, int[] channels, int[] enc_layers, int "
      "mid_layers, "
      "float eps, Tensor[] packed, Tensor[] packed_t, float lr, float tolerance, int start, int "
      "steps) -> int");
  m.def(
      "match_steps_bf16(Tensor(a!) x, Tensor(b!) m, Tensor(c!) v, Tensor(d!) losses, Tensor(e!) "
      "updates, "
      "Tensor(f!) active, Tensor target, Tensor weight, int[] channels, int[] enc_layers, int "
      "mid_layers, "
      "float eps, Tensor[] packed, Tensor[] packed_t, float lr, float tolerance, int start, int "
      "steps) -> int");
  m.def("build_info() -> str");

  // The GPU engine's, into buffers that are there: nothing is allocated, no data is read on the
  // host. The CPU has them too, to the same bits, so that the engine can be rehearsed there.
  m.def(
      "combine_moments(Tensor partials, float eps, Tensor(a!) s, Tensor(b!) mean, Tensor(c!) std) "
      "-> ()");
  m.def(
      "combine_means(Tensor[] sums, Tensor(a!)[] s, int[] pixels, Tensor(b!)[] means, Tensor? "
      "partials, float eps, Tensor(c!)? mean, Tensor(d!)? std) -> ()");
  m.def(
      "noisy_image(Tensor images, Tensor? rows, Tensor sigma, int seed, Tensor sample, int stream, "
      "Tensor draw, Tensor(a!) out) -> ()");
  m.def("image_to_nhwc(Tensor image, Tensor(a!) out) -> ()");
  m.def("image_to_nchw(Tensor image, Tensor(a!) out) -> ()");
  m.def(
      "match_loss(Tensor phi, Tensor target, Tensor weight, Tensor s, int pixels, Tensor settings, "
      "Tensor(a!) losses, Tensor(b!) updates, Tensor(c!) active, Tensor(d!) converged, Tensor(e!) "
      "d_r, Tensor(f!) d_s) -> ()");
  m.def(
      "match_adam(Tensor gradient, Tensor active, Tensor updates, Tensor settings, Tensor(a!) x, "
      "Tensor(b!) m, Tensor(c!) v, Tensor(d!) image) -> ()");
  m.def("match_remaining(Tensor active, Tensor(a!) remaining) -> ()");
  m.def("cuda_build_info() -> str");
  m.def("new_stream(int device) -> int");
}

namespace fastphi {
namespace {

// JSON: what was compiled and what runs.
std::string build_info() {
  return "{\"isa\": \"" + isa_in_use() + "\", \"isas compiled\": \"" + isas_compiled() +
         "\", \"compiler\": \"" __VERSION__ "\", \"torch target\": \"" +
         std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff) +
         "\", \"flags\": \"" FASTPHI_BUILD_FLAGS "\"}";
}

}  // namespace
}  // namespace fastphi

STABLE_TORCH_LIBRARY_IMPL(fastphi, CPU, m) {
  using namespace fastphi;
  m.impl("fused_layer_fwd", TORCH_BOX(&fused_layer_fwd));
  m.impl("fused_layer_bwd", TORCH_BOX(&fused_layer_bwd));
  m.impl("upsample_fwd", TORCH_BOX(&upsample_fwd));
  m.impl("upsample_bwd", TORCH_BOX(&upsample_bwd));
  m.impl("avg_pool_fwd", TORCH_BOX(&avg_pool_fwd));
  m.impl("avg_pool_bwd", TORCH_BOX(&avg_pool_bwd));
  m.impl("spatial_mean_fwd", TORCH_BOX(&spatial_mean_fwd));
  m.impl("spatial_mean_bwd", TORCH_BOX(&spatial_mean_bwd));
  m.impl("unet_train_size", TORCH_BOX(&unet_train_size));
  m.impl("unet_train_fwd", TORCH_BOX(&unet_train_fwd));
  m.impl("unet_train_bwd", TORCH_BOX(&unet_train_bwd));
  m.impl("pack_conv_weights", TORCH_BOX(&pack_conv_weights));
  m.impl("pack_upsample_weights", TORCH_BOX(&pack_upsample_weights));
  m.impl("in_large_pages", TORCH_BOX(&in_large_pages));
  m.impl("move_to_large_pages", TORCH_BOX(&move_to_large_pages));
  m.impl("weights_checksum", TORCH_BOX(&weights_checksum));
  m.impl("weights_content", TORCH_BOX(&weights_content));
  m.impl("largest_magnitude", TORCH_BOX(&largest_magnitude));
  m.impl("unet_fwd", TORCH_BOX(&unet_fwd));
  m.impl("unet_fwd_bf16", TORCH_BOX(&unet_fwd_bf16));
  m.impl("match_steps", TORCH_BOX(&match_steps));
  m.impl("match_steps_bf16", TORCH_BOX(&match_steps_bf16));
  m.impl("noise_normal", TORCH_BOX(&noise_normal));
  m.impl("combine_moments", TORCH_BOX(&combine_moments));
  m.impl("combine_means", TORCH_BOX(&combine_means));
  m.impl("noisy_image", TORCH_BOX(&noisy_image));
  m.impl("image_to_nhwc", TORCH_BOX(&image_to_nhwc));
  m.impl("image_to_nchw", TORCH_BOX(&image_to_nchw));
  m.impl("match_loss", TORCH_BOX(&match_loss));
  m.impl("match_adam", TORCH_BOX(&match_adam));
  m.impl("match_remaining", TORCH_BOX(&match_remaining));
}

STABLE_TORCH_LIBRARY_IMPL(fastphi, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fastphi::build_info));
}
