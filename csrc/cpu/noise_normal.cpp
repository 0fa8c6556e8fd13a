// Counter-based standard normal noise, (N, C, H, W): ../noise.h, one image per (sample, draw).
#include "../arguments.h"
#include "../noise.h"
#include "../operators.h"
#include "launch.h"

namespace fastphi {

Tensor noise_normal(int64_t seed, Tensor sample, int64_t stream, Tensor draw, int64_t channels,
                    int64_t height, int64_t width) {
  check_noise_normal(Device::CPU, sample, stream, draw, channels, height, width);
  check_words(sample, "sample"), check_words(draw, "draw");
  const i64 n = sample.numel(), size = channels * height * width, blocks = (size + 3) / 4;
  Tensor out = torch::stable::empty({n, channels, height, width}, ScalarType::Float);
  float* to = mutable_data<float>(out);
  const int64_t *samples = data<int64_t>(sample), *draws = data<int64_t>(draw);
  parallel(n * blocks, 100, [&](i64 begin, i64 end) {
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 i = unit / blocks, block = unit % blocks;
      float z[4];
      four_normals({static_cast<uint64_t>(seed), static_cast<uint32_t>(draws[i]),
                    static_cast<uint32_t>(stream), static_cast<uint32_t>(samples[i])},
                   static_cast<uint32_t>(block), z);
      std::memcpy(to + i * size + 4 * block, z, std::min<i64>(4, size - 4 * block) * sizeof(float));
    }
  });
  return out;
}

}  // namespace fastphi
