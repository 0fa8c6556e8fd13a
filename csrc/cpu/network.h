// A whole network on packed weights: what the runner's operators share.
//
// Parameters come as one list in network order, three tensors per convolution: packed weights,
// bias, gamma; empty where there is none. An up-sampling takes three places too.
#pragma once

#include <vector>

#include "../common.h"
#include "direct/conv.h"
#include "launch.h"

namespace fastphi {

struct Plan {
  i64 image_channels;
  Shape channels, enc_layers;
  i64 mid_layers;
  Shape dec_layers;  // empty where the decoder is not needed

  i64 blocks() const { return static_cast<i64>(enc_layers.size()); }
};

template <class T>
struct Conv {
  const T *packed, *bias, *gamma;
};

inline i64 parameters_expected(const Plan& plan) {
  i64 convs = plan.mid_layers;
  for (i64 n : plan.enc_layers) convs += n;
  for (i64 n : plan.dec_layers) convs += n + 1;
  return 3 * convs;
}

// The image's size and the number of parameters, checked.
inline void check_plan(const Tensor& x, const Plan& plan, const std::vector<Tensor>& packed) {
  check_tensor(x, "x", 4);
  check_not_empty(x, "x");
  const i64 multiple = i64{1} << plan.blocks();
  STD_TORCH_CHECK(
      static_cast<i64>(plan.channels.size()) == plan.blocks() + 1,
      "channels: expected one entry per encoder block and one for the middle block, got ",
      text(plan.channels));
  STD_TORCH_CHECK(x.sizes()[2] % multiple == 0 && x.sizes()[3] % multiple == 0,
                  "x: height and width must be multiples of ", multiple, ", got shape ",
                  text(shape_of(x)));
  STD_TORCH_CHECK(static_cast<i64>(packed.size()) == parameters_expected(plan), "packed: expected ",
                  parameters_expected(plan), " tensors, got ", packed.size());
}

// Plan and parameters as they come from Python, checked.
inline void check_network(const Tensor& x, const Plan& plan, const std::vector<Tensor>& packed) {
  check_plan(x, plan, packed);
  for (const Tensor& t : packed) check_tensor(t, "packed", 1, &x);
}

// Channels of the first `blocks` blocks together: columns of their means.
inline i64 block_columns(const Plan& plan, i64 blocks) {
  const i64 depth = plan.blocks();
  STD_TORCH_CHECK(0 <= blocks && blocks <= 2 * depth, "blocks: expected 0 (the image) to ",
                  2 * depth, ", got ", blocks);
  i64 columns = 0;
  for (i64 b = 0; b < blocks; ++b) columns += plan.channels[b <= depth ? b : 2 * depth - b];
  return columns;
}

template <class T>
std::vector<Conv<T>> convs_of(const std::vector<Tensor>& packed) {
  auto get = [&](size_t i) { return packed[i].numel() ? data<T>(packed[i]) : nullptr; };
  std::vector<Conv<T>> convs;
  for (size_t i = 0; i < packed.size(); i += 3) convs.push_back({get(i), get(i + 1), get(i + 2)});
  return convs;
}

// Images worked on together: enough to share among the threads, few enough to stay near the caches.
// No result depends on it.
inline i64 images_at_once(i64 pixels) {
  return std::max<i64>(1, 16384 * static_cast<i64>(torch::stable::get_num_threads()) / pixels);
}

// NCHW -> NHWC of image `from`, and back
template <class T>
void image_to_nhwc(const T* image, i64 c, i64 pixels, T* out) {
  for (i64 k = 0; k < c; ++k)
    for (i64 x = 0; x < pixels; ++x) out[x * c + k] = image[k * pixels + x];
}

template <class T>
void image_to_nchw(const T* image, i64 c, i64 pixels, T* out) {
  for (i64 k = 0; k < c; ++k)
    for (i64 x = 0; x < pixels; ++x) out[k * pixels + x] = image[x * c + k];
}

}  // namespace fastphi
