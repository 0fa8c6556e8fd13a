// Launchers of the bfloat16 engine. Shapes as in bf16/kernels.h; nothing here depends on the batch
// or the threads but who does what when.
#pragma once

#include "kernels.h"
#include "../launch.h"

namespace fastphi {

inline i64 bf16_blocks(i64 channels) { return (channels + BF16_BLOCK - 1) / BF16_BLOCK; }

// An activation of n images.
struct Bf16Hidden {
  bf16* r;
  float* s;  // (N,)
  Bf16Plane plane;
  i64 c;

  i64 blocks() const { return bf16_blocks(c); }
  i64 size() const { return blocks() * plane.block * BF16_BLOCK; }  // of an image
  Bf16Hidden from(i64 image) const { return {r + image * size(), s + image, plane, c}; }
};

// Zeros round n images, which the kernels read and do not write.
void bf16_clear_borders(i64 n, const Bf16Hidden& x);

// Statistics of z, where a gradient will want them: (N,) each.
struct Bf16Moments {
  float *mean = nullptr, *std = nullptr;
};

// job.plane, cout and pointers set; s_out (N,), means (N, cout) of r_out or null.
void launch_bf16_layer(Bf16Layer job, double eps, float* s_out, float* means,
                       Bf16Moments moments = {});
void launch_bf16_grad_input(const Bf16GradInput& job);
// d_s (N,) = sum h r
void launch_bf16_dgrad(Bf16Dgrad job, float* d_s);
void launch_bf16_image(const Bf16Image& job);
void launch_bf16_upsample(Bf16Upsample job);

// (N, C, H, W), or (N, H, W, C) with `pixels`, -> (2, N, H + 2, W + 2, C), zeros round each:
// rounded, and what rounding took
void launch_bf16_border_image(i64 n, i64 c, i64 h, i64 w, const float* x, bool pixels, bf16* out);
void launch_bf16_pool(i64 n, const Bf16Hidden& x, const Bf16Hidden& out);

}  // namespace fastphi
