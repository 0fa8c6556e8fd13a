// Winograd convolution F(4x4, 3x3), float32. Shapes as in kernels.h; job.winograd is the pack.
#pragma once

#include "../kernels.h"

namespace fastphi {

void run_winograd(const ConvJob<float>& job);

// Numbers that a tile's transformed input takes per point: its channels, and what the last vector
// of a source writes beyond them.
i64 winograd_depth(const ConvJob<float>& job);

// d_weight (cout, channels of all sources, 3, 3) of the convolution of job's sources (job.n, h, w,
// cout, sources, source[..].r, scale and channels are read), given dz (N, H, W, cout).
void run_winograd_weight(const ConvJob<float>& job, const float* dz, float* d_weight);

// G g G^T for all outputs and channels, in the order of use: 36 * outputs (whole vectors) *
// channels numbers.
void pack_winograd(const float* weight, i64 outputs, i64 channels, WeightStrides at, float* packed);

// Which convolutions it serves, by the channels that a product sums over: with very few the
// transforms cost more than they save.
template <class T>
constexpr bool winograd_serves(i64 channels) {
  return sizeof(T) == sizeof(float) && channels >= 16;
}

}  // namespace fastphi
