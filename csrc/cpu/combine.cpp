// What a layer of the GPU engine leaves per tile, combined per image: partial statistics to the
// scalar of the deferred norm, s = 1/(std + eps), and sums over pixels to channel means, s sum /
// pixels. The order of the sums: ../statistics.h
#include "../arguments.h"
#include "../operators.h"
#include "../statistics.h"
#include "launch.h"

namespace fastphi {

namespace {

// mean, std: (N,) or null
void launch_combine_stats(const Tensor& partials, double eps, float* s, float* mean, float* std) {
  const int slots = static_cast<int>(partials.sizes()[1]);
  const float* from = data<float>(partials);
  parallel(partials.sizes()[0], 8 * slots, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      Moments lanes[STATS_LANES];
      for (int l = 0; l < STATS_LANES; ++l) lanes[l] = merge_lane(from + i * slots * 3, slots, l);
      for (int half = STATS_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] = merge(lanes[l], lanes[l + half]);
      s[i] = inverse_std(lanes[0], static_cast<float>(eps));
      if (mean) mean[i] = lanes[0].mean, std[i] = spread(lanes[0]);
    }
  });
}

}  // namespace

void combine_stats(Tensor partials, double eps, Tensor s) {
  check_combine_stats(Device::CPU, partials, s);
  launch_combine_stats(partials, eps, mutable_data<float>(s), nullptr, nullptr);
}

void combine_moments(Tensor partials, double eps, Tensor s, Tensor mean, Tensor std) {
  check_combine_moments(Device::CPU, partials, s, mean, std);
  launch_combine_stats(partials, eps, mutable_data<float>(s), mutable_data<float>(mean),
                       mutable_data<float>(std));
}

void combine_means(Tensor sums, Tensor s, int64_t pixels, Tensor means) {
  check_combine_means(Device::CPU, sums, s, pixels, means);
  const int slots = static_cast<int>(sums.sizes()[1]), c = static_cast<int>(sums.sizes()[2]);
  const float *from = data<float>(sums), *scalars = data<float>(s);
  float* to = mutable_data<float>(means);
  parallel(sums.sizes()[0] * c, slots, [&](i64 begin, i64 end) {
    for (i64 u = begin; u < end; ++u) {
      const float* channel = from + u / c * slots * c + u % c;
      float lanes[MEANS_LANES];
      for (int l = 0; l < MEANS_LANES; ++l) lanes[l] = sum_lane(channel, slots, c, l);
      for (int half = MEANS_LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      to[u] = scaled_mean(lanes[0], static_cast<float>(pixels), scalars[u / c]);
    }
  });
}

}  // namespace fastphi
