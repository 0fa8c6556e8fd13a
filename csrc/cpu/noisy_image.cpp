// Noisy images in the engine's layout: out[i] = clean[rows[i]] + sigma[i] z_i, (N, H, W, C), of
// uint8 (M, H, W, C) or float32 (M, C, H, W), z the counter noise of fastphi/noise.py. ../pixel.h
#include "../arguments.h"
#include "../operators.h"
#include "launch.h"

namespace fastphi {
namespace {

template <class In, class Out>
void launch_noisy_image(const NoisyImages& a) {
  const i64 blocks = (static_cast<i64>(a.channels) * a.pixels + 3) / 4;
  parallel(a.n * blocks, 100, [&](i64 begin, i64 end) {
    for (i64 unit = begin; unit < end; ++unit)
      noisy_four<In, Out>(a, unit / blocks, static_cast<int>(unit % blocks));
  });
}

}  // namespace

void noisy_image(Tensor images, OptionalTensor rows, Tensor sigma, int64_t seed, Tensor sample,
                 int64_t stream, Tensor draw, Tensor out) {
  const NoisyImages a =
      check_noisy_image(Device::CPU, images, rows, sigma, seed, sample, stream, draw, out);
  check_words(sample, "sample"), check_words(draw, "draw");
  for (i64 i = 0; i < a.n; ++i)
    STD_TORCH_CHECK(row_of(a, i) >= 0, "rows: expected numbers in [0, ", a.available, "), got ",
                    a.rows ? a.rows[i] : i);
  const bool bytes = dtype_of(images) == Dtype::UINT8, half = dtype_of(out) == Dtype::BFLOAT16;
  if (bytes)
    half ? launch_noisy_image<uint8_t, Bf16>(a) : launch_noisy_image<uint8_t, float>(a);
  else
    half ? launch_noisy_image<float, Bf16>(a) : launch_noisy_image<float, float>(a);
}

}  // namespace fastphi
