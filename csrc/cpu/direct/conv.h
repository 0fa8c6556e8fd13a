// Launchers of the convolution engine. Pointers are to dense arrays; shapes as in kernels.h.
#pragma once

#include "../kernels.h"

namespace fastphi {

// Packed weights of the direct kernel: [panel][k][lanes of the panel], zeros beyond `outputs`. A
// panel is two vectors of outputs (the last one or two), k runs over what the register tile sums in
// its order.
template <class T>
i64 packed_size(i64 outputs, i64 k);

// 3x3 weights as the algorithm that serves them wants them (winograd/conv.h): for a layer, whose
// input has c1 + c2 channels of two sources (c2 = 0: of one), and for the gradient of some input
// channels, whose c1 is the layer's cout.
template <class T>
i64 conv_packed_size(i64 outputs, i64 c1, i64 c2);

// weight (cout, c1 + c2, 3, 3)
template <class T>
void pack_conv(const T* weight, i64 cout, i64 c1, i64 c2, T* packed);

// weight (cout, cin, 3, 3): the rotated kernel, outputs c0..c1
template <class T>
void pack_conv_transposed(const T* weight, i64 cout, i64 cin, i64 c0, i64 c1, T* packed);

// Transposed 2x2 weights (cin, cout, 2, 2). Forward: four packs (one per tap) with k = cin;
// transposed: outputs cin, k = (i, j, cout).
template <class T>
void pack_upsample(const T* weight, i64 cin, i64 cout, bool transposed, T* packed);

// A layer on weights from pack_conv: job.z, r_out, pool as wanted; with mean, std, s_out (N,) given
// the statistics of z too (s_out = 1/(std + eps)); means (N, cout) of r_out, or null. Only a
// Winograd convolution can do without r_out (job.sources, source[..].channels are set).
template <class T>
void launch_layer_fwd(ConvJob<T> job, const T* packed, T eps, T* mean, T* std, T* s_out, T* means);

// d_r (N, H, W, C) = scale * h and d_s (N,) = sum h * r, where h = convT(dz): packed is the
// transposed pack. scale, r, d_s null: d_r = h alone, the gradient of a first layer's image. raw: r
// is z, of which it is ReLU(gamma z); Winograd's alone.
template <class T>
struct DgradJob {
  i64 n, h, w, cout, c;
  const T* input;            // dz (N, H, W, cout); with grad: z
  const GradInput<T>* grad;  // or null; Winograd's alone
  const T* packed;
  const T *r, *scale;  // (N, H, W, C), (N,)
  T *d_r, *d_s;
  bool raw;
  const T* gamma;
};

template <class T>
void launch_layer_dgrad(const DgradJob<T>& job);

// (N,): dz += coefficient * (z - mean), the gradient through s_out: -d_s_out s_out^2 / (count *
// std), 0 at std 0.
template <class T>
void norm_coefficients(i64 n, i64 count, const T* d_s_out, const T* s_out, const T* std,
                       T* coefficient);

// dz, and d_bias, d_gamma (C,) where not null. job.d_bias and job.d_gamma are set here.
template <class T>
void launch_layer_grad(LayerGradJob<T> job, T* d_bias, T* d_gamma);

// Sums (rows, c) partials over rows in double, in order.
template <class T>
void sum_rows(const T* partial, i64 rows, i64 c, T* out);

// out (n,): sums of each image's units, in double and in order.
template <class T>
void sum_units(const T* partial, i64 n, i64 units, T* out);

// dz (N, H, W, C) of a layer inside a network, for kernels that cannot read a GradInput.
template <class T>
void launch_grad_input(i64 n, i64 h, i64 w, i64 c, const T* z, const GradInput<T>& grad, T* dz);

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
