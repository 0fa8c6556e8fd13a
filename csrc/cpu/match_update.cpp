// The guidance step around the network: loss, seed of the gradient and stop per image; Adam on the
// pixels; how many images are left. ../match.h
#include "../match.h"

#include "../arguments.h"
#include "../operators.h"
#include "launch.h"

namespace fastphi {

void match_loss(Tensor phi, Tensor target, Tensor weight, Tensor s, int64_t pixels, Tensor settings,
                Tensor losses, Tensor updates, Tensor active, Tensor converged, Tensor d_r,
                Tensor d_s) {
  const MatchLoss a = check_match_loss(Device::CPU, phi, target, weight, s, pixels, settings,
                                       losses, updates, active, converged, d_r, d_s);
  for (i64 i = 0; i < a.n; ++i) {
    if (!a.active[i]) continue;
    LossSums lanes[LOSS_LANES];
    for (int l = 0; l < LOSS_LANES; ++l) lanes[l] = loss_lane(a, i, l);
    for (int half = LOSS_LANES / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
    judge(a, i, lanes[0]);
  }
}

void match_adam(Tensor gradient, Tensor active, Tensor updates, Tensor settings, Tensor x, Tensor m,
                Tensor v, Tensor image) {
  const MatchAdam a =
      check_match_adam(Device::CPU, gradient, active, updates, settings, x, m, v, image);
  parallel(a.n, 20 * a.channels * a.pixels, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      if (!a.active[i]) continue;
      const AdamStep adam = adam_step(a.settings[LR], a.updates[i]);
      for (int pixel = 0; pixel < a.pixels; ++pixel)
        dtype_of(image) == Dtype::BFLOAT16 ? adam_pixel<Bf16>(a, i, pixel, adam)
                                           : adam_pixel<float>(a, i, pixel, adam);
    }
  });
}

void match_remaining(Tensor active, Tensor remaining) {
  check_match_remaining(Device::CPU, active, remaining);
  const int32_t* flags = data<int32_t>(active);
  int32_t left = 0;
  for (i64 i = 0; i < active.numel(); ++i) left += flags[i] != 0;
  *mutable_data<int32_t>(remaining) = left;
}

}  // namespace fastphi
