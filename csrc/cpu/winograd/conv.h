// Winograd convolution F(4x4, 3x3), float32. Shapes as in kernels.h; job.winograd is the pack.
#pragma once

#include "../kernels.h"

namespace fastphi {

void run_winograd(const ConvJob<float>& job);

// Numbers that a tile's transformed input takes per point: its channels, and what the last vector
// of a source writes beyond them.
i64 winograd_depth(int sources, const Source<float>* source);

// Float32 layers whose way back is Winograd's: one of its two products sums over enough.
template <class T>
constexpr bool winograd_serves_backward(i64 cin, i64 cout) {
  return sizeof(T) == sizeof(float) && (cin >= 16 || cout >= 16);
}

// The whole way back through a layer, in one pass over its tiles (backward.cpp).
struct WinogradBackward {
  i64 n, h, w, cout;
  const float* z;  // (N, H, W, cout); read even where grad says that it does not count
  const GradInput<float>* grad;  // dz, and where its sums go
  int sources;
  Source<float> source[2];  // the layer's input, as in its forward; packed: the transposed pack of
                            // that source's channels
  const float* fresh;       // the layer's weights in torch's layout, or null where they are packed
  bool need_input, need_weight;
  bool input_scaled;  // d_r = scale h and d_s = sum h r; else d_r = h alone
  float *d_r[2], *d_s[2];
  float* d_weight;          // (cout, channels of all sources, 3, 3)
  float *d_bias, *d_gamma;  // (cout,) or null; with d_weight alone
};

void run_winograd_backward(const WinogradBackward& job);

// G g G^T for all outputs and channels, in the order of use: 36 * outputs (whole vectors) *
// channels numbers.
void pack_winograd(const float* weight, i64 outputs, i64 channels, WeightStrides at, float* packed);

// Whether so few tiles share the weights of a layer that, where these are used once, packing them
// costs more than transforming them where they are used.
bool winograd_fresh(i64 n, i64 h, i64 w, i64 cin, i64 cout);

// Numbers of such a pack.
i64 winograd_packed_size(i64 outputs, i64 channels);

// For the gradients of the sources of a layer, weight (cout, cin, 3, 3): the rotated kernels, one
// pack after the other; sets source[..].packed.
void pack_winograd_transposed(const float* weight, i64 cout, i64 cin, int sources,
                              Source<float>* source, float* packed);

// Which convolutions it serves, by the channels that a product sums over: with very few the
// transforms cost more than they save.
template <class T>
constexpr bool winograd_serves(i64 channels) {
  return sizeof(T) == sizeof(float) && channels >= 16;
}

}  // namespace fastphi
