// What a layer of the GPU engine leaves per tile, combined per image: partial statistics to the
// scalar of the deferred norm, s = 1/(std + eps), and sums over pixels to channel means, s sum /
// pixels. The order of the sums: ../statistics.h
#include "../arguments.h"
#include "../operators.h"
#include "../statistics.h"
#include "launch.h"

namespace fastphi {

namespace {

Moments merged(const float* partials, int slots, i64 image) {
  Moments lanes[STATS_LANES];
  for (int l = 0; l < STATS_LANES; ++l)
    lanes[l] = merge_lane(partials + image * slots * 3, slots, l);
  for (int half = STATS_LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = merge(lanes[l], lanes[l + half]);
  return lanes[0];
}

void means_of(const Means& a, int b, i64 image, float s) {
  const int slots = a.slots[b], channels = a.channels[b];
  for (int c = 0; c < channels; ++c) {
    float lanes[MEANS_LANES];
    for (int l = 0; l < MEANS_LANES; ++l)
      lanes[l] = sum_lane(a.sums[b] + image * slots * channels + c, slots, channels, l);
    for (int half = MEANS_LANES / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    a.means[b][image * channels + c] = scaled_mean(lanes[0], a.pixels[b], s);
  }
}

}  // namespace

void combine_moments(Tensor partials, double eps, Tensor s, Tensor mean, Tensor std) {
  check_combine_moments(Device::CPU, partials, s, mean, std);
  const int slots = static_cast<int>(partials.sizes()[1]);
  const float* from = data<float>(partials);
  float *to = mutable_data<float>(s), *to_mean = mutable_data<float>(mean),
        *to_std = mutable_data<float>(std);
  parallel(partials.sizes()[0], 8 * slots, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const Moments all = merged(from, slots, i);
      to[i] = inverse_std(all, static_cast<float>(eps));
      to_mean[i] = all.mean, to_std[i] = spread(all);
    }
  });
}

void combine_means(std::vector<Tensor> sums, std::vector<Tensor> s, Shape pixels,
                   std::vector<Tensor> means, OptionalTensor partials, double eps,
                   OptionalTensor mean, OptionalTensor std) {
  const auto all =
      check_combine_means(Device::CPU, sums, s, pixels, means, partials, eps, mean, std);
  for (const Means& a : all)
    parallel(a.n, 1 << 12, [&](i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i)
        for (int b = 0; b < a.blocks; ++b) {
          if (a.partials && b == a.blocks - 1) {
            const Moments m = merged(a.partials, a.parts, i);
            a.s[b][i] = inverse_std(m, a.eps);
            if (a.mean) a.mean[i] = m.mean, a.std[i] = spread(m);
          }
          means_of(a, b, i, a.s[b][i]);
        }
    });
}

}  // namespace fastphi
