// The weights of a network in bfloat16, as fastphi/engine/cpu/bf16.py packs them: in network order,
// three tensors per convolution (packed weights; bias and gamma in float32, padded to whole
// panels).
#pragma once

#include "launch.h"
#include "../network.h"

namespace fastphi {

struct Bf16Weights {
  const bf16* packed;
  const float *bias, *gamma;
};

inline const void* bf16_parameter(const Tensor& t, ScalarType type, i64 size, bool may_lack,
                                  const std::string& name) {
  if (may_lack && t.numel() == 0) return nullptr;
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == size && t.is_contiguous() &&
                      t.device().type() == torch::headeronly::DeviceType::CPU,
                  "packed: expected a dense ", torch::headeronly::toString(type), " tensor of ",
                  size, " numbers as ", name, ", got ",
                  torch::headeronly::toString(t.scalar_type()), " of shape ", text(shape_of(t)));
  check_storage(t, "packed");
  return t.const_data_ptr();
}

// Checked against the plan. x: (N, C, H, W) float32
inline std::vector<Bf16Weights> bf16_weights(const Tensor& x, const Plan& plan,
                                             const std::vector<Tensor>& packed) {
  check_plan(x, plan, packed);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32, got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(plan.image_channels <= BF16_IMAGE_CHANNELS, "x: expected at most ",
                  BF16_IMAGE_CHANNELS, " channels, got ", plan.image_channels);
  STD_TORCH_CHECK(bf16_kernels(), "unet_fwd_bf16: no bfloat16 kernels serve this processor");
  std::vector<Bf16Weights> all;
  auto take = [&](i64 size, i64 outputs, bool up = false) {
    const size_t i = 3 * all.size();
    const std::string at = "[" + std::to_string(i) + " + ";
    const i64 padded = bf16_blocks(outputs) * BF16_BLOCK;
    const void* weights = bf16_parameter(packed[i], ScalarType::BFloat16, size, false, at + "0]");
    auto vector = [&](int k, bool may_lack) {
      return static_cast<const float*>(bf16_parameter(packed[i + k], ScalarType::Float, padded,
                                                      may_lack, at + std::to_string(k) + "]"));
    };
    all.push_back({static_cast<const bf16*>(weights), vector(1, up), vector(2, true)});
  };
  auto layers = [&](i64 count, i64 cin_blocks, i64 c) {
    for (i64 k = 0; k < count; ++k, cin_blocks = bf16_blocks(c))
      take(bf16_blocks(c) * cin_blocks * 9 * BF16_PAIRED, c);
  };
  const i64 depth = plan.blocks();
  take(bf16_blocks(plan.channels[0]) * 3 * bf16_first_blocks(plan.image_channels) * BF16_PAIRED,
       plan.channels[0]);
  layers(plan.enc_layers[0] - 1, bf16_blocks(plan.channels[0]), plan.channels[0]);
  for (i64 b = 1; b <= depth; ++b)
    layers(b < depth ? plan.enc_layers[b] : plan.mid_layers, bf16_blocks(plan.channels[b - 1]),
           plan.channels[b]);
  if (plan.dec_layers.empty()) return all;
  for (i64 b = depth - 1; b >= 0; --b) {
    const i64 c = plan.channels[b], blocks = bf16_blocks(c);
    take(4 * blocks * bf16_blocks(plan.channels[b + 1]) * BF16_PAIRED, c, true);
    layers(plan.dec_layers[b] - (b == 0), 2 * blocks, c);
    if (b == 0) take(blocks * 9 * BF16_PAIRED / 2, plan.image_channels);
  }
  return all;
}

}  // namespace fastphi
