// Launchers of the convolution engine. Pointers are to dense arrays; shapes as in kernels.h.
#pragma once

#include "kernels.h"

namespace fastphi {

// Packed weights: [panel][k][lanes of the panel], zeros beyond `outputs`. A panel is two vectors of
// outputs (the last one or two), k runs over what the register tile sums in its order.
template <class T>
i64 packed_size(i64 outputs, i64 k);

// 3x3 weights (cout, cin, 3, 3), input channels [c0, c1); k = (ky, kx, input channel).
// transposed: those of the gradient, outputs c0..c1, k = (ky, kx, cout) of the rotated kernel.
template <class T>
void pack_conv(const T* weight, i64 cout, i64 cin, i64 c0, i64 c1, bool transposed, T* packed);

// Transposed 2x2 weights (cin, cout, 2, 2). Forward: four packs (one per tap) with k = cin;
// transposed: outputs cin, k = (i, j, cout).
template <class T>
void pack_upsample(const T* weight, i64 cin, i64 cout, bool transposed, T* packed);

// job.z, r_out as wanted; with mean, std, s_out (N,) given the statistics of z too (s_out = 1/(std
// + eps)).
template <class T>
void launch_layer_fwd(ConvJob<T> job, T eps, T* mean, T* std, T* s_out);

// d_r (N, H, W, C) = scale * h and d_s (N,) = sum h * r, where h = convT(dz): packed is the
// transposed pack.
template <class T>
void launch_layer_dgrad(i64 n, i64 h, i64 w, i64 cout, i64 c, const T* dz, const T* packed,
                        const T* r, const T* scale, T* d_r, T* d_s);

// out (N, H, W, C) = convT(dz) alone: the gradient of a first layer's image.
template <class T>
void launch_conv_transposed(i64 n, i64 h, i64 w, i64 cout, i64 c, const T* dz, const T* packed,
                            T* out);

// (N,): dz += coefficient * (z - mean), the gradient through s_out: -d_s_out s_out^2 / (count *
// std), 0 at std 0.
template <class T>
void norm_coefficients(i64 n, i64 count, const T* d_s_out, const T* s_out, const T* std,
                       T* coefficient);

// dz, and d_bias, d_gamma (C,) where not null. job.d_bias and job.d_gamma are set here.
template <class T>
void launch_layer_grad(LayerGradJob<T> job, T* d_bias, T* d_gamma);

// d_weight in torch's layout: (cout, stride_in, 3, 3) at input channels [c0, c0 + cin), or for 4
// taps (cin, cout, 2, 2). job.d may be (.., cout) of any channel count: it is padded here where it
// must be.
template <class T>
void launch_weight_grad(WeightGradJob<T> job, i64 stride_in, i64 c0, T* d_weight);

template <class T>
void launch_upsample_fwd(UpsampleJob<T> job);
template <class T>
void launch_upsample_bwd(UpsampleJob<T> job);

// (N, H, W, C) -> (N, H/2, W/2, C) and back
template <class T>
void launch_avg_pool_fwd(i64 n, i64 h, i64 w, i64 c, const T* r, T* out);
template <class T>
void launch_avg_pool_bwd(i64 n, i64 h, i64 w, i64 c, const T* d_out, T* d_r);

// (N, H, W, C) -> (N, C)
template <class T>
void launch_spatial_mean_fwd(i64 n, i64 h, i64 w, i64 c, const T* r, T* out);

}  // namespace fastphi
