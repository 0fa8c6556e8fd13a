// Partial statistics and sums, and the order in which they are merged: lane l takes the partial
// results l, l + LANES, l + 2 LANES, ... one after another, then lanes are merged in halves (l with
// l + LANES/2, and so on). The order hangs on the number of partial results of one image only, so
// an image's result has the same bits in every batch, on every run, on the CPU and on the GPU
// (compiled without contraction, as noise.h).
#pragma once

#include <cmath>

#include "portable.h"

namespace fastphi {

constexpr int STATS_LANES = 128;  // a thread block; 64x64 images in tiles of 128 pixels have 32
constexpr int MEANS_LANES = 8;    // a thread block is 32 channels times these

// Of `count` values: their mean and the sum of their squared deviations from it.
struct Moments {
  float count, mean, m2;
};

// Of both sets of values. Nothing is lost where the mean is large against the spread, as it would
// be by sums of squares.
FASTPHI_INLINE Moments merge(const Moments& a, const Moments& b) {
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  const float count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// The std over all values, biased, and the scalar of the deferred norm: 1/(std + eps).
FASTPHI_INLINE float spread(const Moments& all) { return sqrtf(all.m2 / all.count); }
FASTPHI_INLINE float inverse_std(const Moments& all, float eps) {
  return 1.0f / (spread(all) + eps);
}

// s * sum / pixels; the sum is divided first, as s may be very small or large.
FASTPHI_INLINE float scaled_mean(float sum, float pixels, float s) { return s * (sum / pixels); }

// One lane's share of the partial results of one image: (slots, 3) of count, mean, m2.
FASTPHI_INLINE Moments merge_lane(const float* partials, int slots, int lane) {
  Moments m = {0, 0, 0};
  for (int t = lane; t < slots; t += STATS_LANES)
    m = merge(m, {partials[3 * t], partials[3 * t + 1], partials[3 * t + 2]});
  return m;
}

// One lane's share of the sums of one channel of one image: (slots, channels), at a channel.
FASTPHI_INLINE float sum_lane(const float* sums, int slots, int channels, int lane) {
  float sum = 0;
  for (int t = lane; t < slots; t += MEANS_LANES) sum += sums[static_cast<i64>(t) * channels];
  return sum;
}

// The sums of several blocks of the network, and where their means go: the arguments of one launch.
constexpr int MEANS_BLOCKS = 16;

struct Means {
  i64 n = 0;
  int blocks = 0;
  const float* sums[MEANS_BLOCKS] = {};  // (n, slots, channels)
  float* s[MEANS_BLOCKS] = {};           // (n) or null for 1
  int slots[MEANS_BLOCKS] = {}, channels[MEANS_BLOCKS] = {};
  float pixels[MEANS_BLOCKS] = {};
  float* means[MEANS_BLOCKS] = {};  // (n, channels)
  // What the s of the last block is merged from, (n, parts, 3), or null: it is there.
  const float* partials = nullptr;
  int parts = 0;
  float eps = 0;
  float *mean = nullptr, *std = nullptr;  // (n) or null, written with s
};

}  // namespace fastphi
