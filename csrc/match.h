// Algorithm 2 (the guidance step), what of it lies outside of the network, one text for the CPU and
// the GPU: per image i
//   L_i = sum_c weight_c (phi_ic - target_ic)^2,    stop where L_i <= tolerance L_i(first),
// the seed of the gradient, and Adam on the pixels. phi = s mean(r): with d_phi = dL/dphi the seed
// is d_r = s d_phi / pixels (the same for every pixel) and d_s = sum_c d_phi_c mean(r)_c.
//
// An image counts its own updates, so images may have begun at different times. Sums over channels
// are of double, in LOSS_LANES lanes that are merged in halves: the same bits in every batch, on
// the CPU and on the GPU (compiled without contraction, as noise.h).
#pragma once

#include "pixel.h"

namespace fastphi {

constexpr int LOSS_LANES = 128;

// settings: lr, tolerance (0: never stop), max_iter; on the device, so that a captured graph serves
// every call.
enum Setting { LR, TOLERANCE, MAX_ITER, SETTINGS };

struct MatchLoss {
  i64 n, rows;  // images; rows of `losses`
  int channels;
  float pixels;
  const float *phi, *target;  // (n, channels)
  const float* weight;        // (channels)
  const float* s;             // (n)
  const double* settings;     // (SETTINGS)
  float* losses;              // (rows, n), row t: before update t
  i64* updates;               // (n): made, and after this call the one that is being made
  int32_t* active;            // (n)
  int32_t* converged;         // (n)
  float* d_r;                 // (n, channels)
  float* d_s;                 // (n)
};

struct LossSums {
  double loss, d_s;
};

FASTPHI_INLINE LossSums operator+(const LossSums& a, const LossSums& b) {
  return {a.loss + b.loss, a.d_s + b.d_s};
}

// One lane's share of the channels of image i; writes their d_r.
FASTPHI_INLINE LossSums loss_lane(const MatchLoss& a, i64 i, int lane) {
  LossSums sums = {0, 0};
  const float s = a.s[i];
  for (int c = lane; c < a.channels; c += LOSS_LANES) {
    const i64 at = i * a.channels + c;
    const double weight = a.weight[c], difference = static_cast<double>(a.phi[at]) - a.target[at];
    const float d_phi = static_cast<float>(2 * weight * difference);
    sums = sums +
           LossSums{weight * difference * difference, static_cast<double>(d_phi) * (a.phi[at] / s)};
    a.d_r[at] = s * d_phi / a.pixels;
  }
  return sums;
}

// Notes the loss of image i, which is active, and whether it goes on.
FASTPHI_INLINE void judge(const MatchLoss& a, i64 i, const LossSums& sums) {
  const i64 t = a.updates[i];
  const float loss = static_cast<float>(sums.loss);
  const double tolerance = a.settings[TOLERANCE];
  if (0 <= t && t < a.rows) a.losses[t * a.n + i] = loss;
  const bool stop = tolerance > 0 && static_cast<double>(loss) <= tolerance * a.losses[i];
  const bool going_on = !stop && t < static_cast<i64>(a.settings[MAX_ITER]);
  a.d_s[i] = static_cast<float>(sums.d_s);
  a.converged[i] = stop;
  a.active[i] = going_on;
  if (going_on) a.updates[i] = t + 1;
}

// base^n by repeated squaring: the same bits wherever doubles are IEEE's.
FASTPHI_INLINE double power(double base, i64 n) {
  double result = 1;
  for (; n > 0; n >>= 1, base *= base)
    if (n & 1) result *= base;
  return result;
}

struct MatchAdam {
  i64 n;
  int channels, pixels;
  const float* gradient;  // (n, C, H, W), as x, m, v
  const int32_t* active;  // (n)
  const i64* updates;     // (n): number of this update, from 1
  const double* settings;
  float *x, *m, *v;
  void* image;  // (n, H, W, C) float32 or bfloat16: x as the network reads it
};

struct AdamStep {
  float step, root;
};

// Of update t: lr/(1 - 0.9^t), sqrt(1 - 0.999^t).
FASTPHI_INLINE AdamStep adam_step(double lr, i64 t) {
  return {static_cast<float>(lr / (1 - power(0.9, t))),
          static_cast<float>(sqrt(1 - power(0.999, t)))};
}

// One pixel of image i, all its channels.
template <class Out>
FASTPHI_INLINE void adam_pixel(const MatchAdam& a, i64 i, int pixel, const AdamStep& adam) {
  constexpr float B1 = 1 - 0.9, B2 = 0.999, B2C = 1 - 0.999, EPS = 1e-8;
  const i64 image = i * a.channels * a.pixels;
  Out* out = static_cast<Out*>(a.image) + image;
  for (int c = 0; c < a.channels; ++c) {
    const i64 at = image + planar_place(pixel, c, a.channels, a.pixels);
    const float g = a.gradient[at];
    const float m = a.m[at] + B1 * (g - a.m[at]);
    const float v = B2 * a.v[at] + B2C * g * g;
    const float x = a.x[at] - adam.step * (m / (sqrtf(v) / adam.root + EPS));
    a.m[at] = m, a.v[at] = v, a.x[at] = x;
    put(x, out + packed_place(pixel, c, a.channels, a.pixels));
  }
}

}  // namespace fastphi
