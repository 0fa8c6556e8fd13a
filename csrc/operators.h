// Every operator of the CPU engine, as ops.cpp registers it: checks and allocation, then a
// launcher.
#pragma once

#include <string>
#include <tuple>

#include "common.h"

namespace fastphi {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_layer_fwd(
    Tensor r, Tensor s, OptionalTensor r2, OptionalTensor s2, Tensor weight, OptionalTensor bias,
    OptionalTensor gamma, double eps, bool relu);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fused_layer_bwd(
    Tensor d_r_out, Tensor d_s_out, Tensor r, Tensor s, OptionalTensor r2, OptionalTensor s2,
    Tensor weight, OptionalTensor gamma, Tensor z, Tensor s_out, Tensor mean, Tensor std, bool relu,
    bool need_input, bool need_weight);
Tensor upsample_fwd(Tensor r, Tensor weight);
std::tuple<Tensor, Tensor> upsample_bwd(Tensor d_out, Tensor r, Tensor weight, bool need_input,
                                        bool need_weight);
Tensor avg_pool_fwd(Tensor r);
Tensor avg_pool_bwd(Tensor d_out);
Tensor spatial_mean_fwd(Tensor r);
Tensor spatial_mean_bwd(Tensor d_mean, int64_t height, int64_t width);
std::tuple<Tensor, Tensor> unet_fwd(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                                    Shape dec_layers, double eps, std::vector<Tensor> packed,
                                    int64_t blocks);
std::tuple<Tensor, Tensor> unet_fwd_bf16(Tensor x, Shape channels, Shape enc_layers,
                                         int64_t mid_layers, Shape dec_layers, double eps,
                                         std::vector<Tensor> packed, int64_t blocks);
int64_t unet_train_size(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                        Shape dec_layers, std::vector<Tensor> parameters);
Tensor unet_train_fwd(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                      Shape dec_layers, double eps, std::vector<Tensor> parameters, Tensor kept);
Tensor unet_train_bwd(Tensor d_image, Tensor kept, Shape channels, Shape enc_layers,
                      int64_t mid_layers, Shape dec_layers, std::vector<Tensor> parameters,
                      bool need_image, Tensor gradients);
int64_t match_steps(Tensor x, Tensor m, Tensor v, Tensor losses, Tensor updates, Tensor active,
                    Tensor target, Tensor weight, Shape channels, Shape enc_layers,
                    int64_t mid_layers, double eps, std::vector<Tensor> packed,
                    std::vector<Tensor> packed_t, double lr, double tolerance, int64_t start,
                    int64_t steps);
int64_t match_steps_bf16(Tensor x, Tensor m, Tensor v, Tensor losses, Tensor updates, Tensor active,
                         Tensor target, Tensor weight, Shape channels, Shape enc_layers,
                         int64_t mid_layers, double eps, std::vector<Tensor> packed,
                         std::vector<Tensor> packed_t, double lr, double tolerance, int64_t start,
                         int64_t steps);
Tensor pack_conv_weights(Tensor weight, int64_t own, bool transposed);
Tensor pack_upsample_weights(Tensor weight);
Tensor in_large_pages(Tensor x);
void move_to_large_pages(std::vector<Tensor> tensors);
int64_t weights_checksum(std::vector<Tensor> parameters);
void weights_content(std::vector<Tensor> parameters, Tensor sums);
double largest_magnitude(Tensor x);
Tensor noise_normal(int64_t seed, Tensor sample, int64_t stream, Tensor draw, int64_t channels,
                    int64_t height, int64_t width);
void combine_moments(Tensor partials, double eps, Tensor s, Tensor mean, Tensor std);
void combine_means(std::vector<Tensor> sums, std::vector<Tensor> s, Shape pixels,
                   std::vector<Tensor> means, OptionalTensor partials, double eps,
                   OptionalTensor mean, OptionalTensor std);
void noisy_image(Tensor images, OptionalTensor rows, Tensor sigma, int64_t seed, Tensor sample,
                 int64_t stream, Tensor draw, Tensor out);
void image_to_nhwc(Tensor image, Tensor out);
void image_to_nchw(Tensor image, Tensor out);
void match_loss(Tensor phi, Tensor target, Tensor weight, Tensor s, int64_t pixels, Tensor settings,
                Tensor losses, Tensor updates, Tensor active, Tensor converged, Tensor d_r,
                Tensor d_s);
void match_adam(Tensor gradient, Tensor active, Tensor updates, Tensor settings, Tensor x, Tensor m,
                Tensor v, Tensor image);
void match_remaining(Tensor active, Tensor remaining);

}  // namespace fastphi
