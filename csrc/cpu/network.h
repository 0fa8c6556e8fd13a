// A whole network on packed weights: what the runner's operators share.
//
// Parameters come as one list in network order, three tensors per convolution: packed weights,
// bias, gamma; empty where there is none. An up-sampling takes three places too.
#pragma once

#include <vector>

#include "../common.h"
#include "direct/conv.h"
#include "launch.h"
#include "winograd/conv.h"

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
  bool fresh;  // packed is not: the weights as they lie in torch's layout
};

// f(cin of the first source, cin of the second or 0, cout, upsampling) for each convolution, in
// network order
template <class F>
void each_conv(const Plan& plan, const F& f) {
  i64 cin = plan.image_channels;
  for (i64 b = 0; b <= plan.blocks(); ++b)
    for (i64 k = b < plan.blocks() ? plan.enc_layers[b] : plan.mid_layers; k > 0; --k) {
      f(cin, i64{0}, plan.channels[b], false);
      cin = plan.channels[b];
    }
  if (plan.dec_layers.empty()) return;
  for (i64 b = plan.blocks() - 1; b >= 0; --b) {
    const i64 c = plan.channels[b], layers = plan.dec_layers[b];
    f(plan.channels[b + 1], i64{0}, c, true);
    for (i64 k = 0; k < layers; ++k)
      f(c, k ? 0 : c, b == 0 && k == layers - 1 ? plan.image_channels : c, false);
  }
}

inline i64 parameters_expected(const Plan& plan) {
  i64 count = 0;
  each_conv(plan, [&](i64, i64, i64, bool) { count += 3; });
  return count;
}

// The sizes that make a plan, the image's size and the number of parameters, checked.
inline void check_plan(const Tensor& x, const Plan& plan, const std::vector<Tensor>& packed) {
  check_tensor(x, "x", 4);
  check_not_empty(x, "x");
  STD_TORCH_CHECK(0 < plan.blocks() && plan.blocks() < 31,
                  "enc_layers: expected an entry per encoder block, got ", text(plan.enc_layers));
  STD_TORCH_CHECK(
      static_cast<i64>(plan.channels.size()) == plan.blocks() + 1,
      "channels: expected one entry per encoder block and one for the middle block, got ",
      text(plan.channels));
  STD_TORCH_CHECK(plan.dec_layers.empty() || plan.dec_layers.size() == plan.enc_layers.size(),
                  "dec_layers: expected an entry per decoder block or none, got ",
                  text(plan.dec_layers));
  auto positive = [](const Shape& sizes, const char* name) {
    for (const i64 size : sizes)
      STD_TORCH_CHECK(0 < size && size < i64{1} << 20, name, ": expected sizes of 1 to 2^20, got ",
                      text(sizes));
  };
  positive(plan.channels, "channels"), positive(plan.enc_layers, "enc_layers");
  positive({plan.mid_layers}, "mid_layers"), positive(plan.dec_layers, "dec_layers");
  const i64 multiple = i64{1} << plan.blocks();
  STD_TORCH_CHECK(x.sizes()[2] % multiple == 0 && x.sizes()[3] % multiple == 0,
                  "x: height and width must be multiples of ", multiple, ", got shape ",
                  text(shape_of(x)));
  STD_TORCH_CHECK(static_cast<i64>(packed.size()) == parameters_expected(plan), "packed: expected ",
                  parameters_expected(plan), " tensors, got ", packed.size());
}

// Plan and parameters as they come from Python, checked: each packed tensor has the length that the
// kernels read. transposed: weights packed for the gradient; else those of a Winograd convolution
// may be as in torch's layout, which their length tells. Returns which are.
inline std::vector<bool> check_network(const Tensor& x, const Plan& plan,
                                       const std::vector<Tensor>& packed, bool transposed = false) {
  check_plan(x, plan, packed);
  std::vector<bool> fresh;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    size_t at = 0;
    auto expect = [&](i64 size, bool may_lack) {
      const std::string name = "packed[" + std::to_string(at) + "]";
      const Tensor& t = packed[at++];
      check_tensor(t, name.c_str(), 1, &x);
      STD_TORCH_CHECK(t.numel() == size || (may_lack && t.numel() == 0), name, ": expected ", size,
                      " numbers", may_lack ? " or none" : "", ", got ", t.numel());
    };
    each_conv(plan, [&](i64 own, i64 rest, i64 cout, bool up) {
      const i64 plain = 9 * cout * (own + rest);
      fresh.push_back(!up && !transposed && winograd_serves<T>(own + rest) &&
                      packed[at].numel() == plain);
      expect(fresh.back() ? plain
             : up         ? 4 * packed_size<T>(cout, own)
             : transposed ? conv_packed_size<T>(own + rest, cout, 0)
                          : conv_packed_size<T>(cout, own, rest),
             false);
      expect(cout, true), expect(cout, true);
    });
  });
  return fresh;
}

// Channels of the first `blocks` blocks together: columns of their means.
inline i64 block_columns(const Plan& plan, i64 blocks) {
  const i64 depth = plan.blocks();
  STD_TORCH_CHECK(0 <= blocks && blocks <= 2 * depth, "blocks: expected 0 (the image) to ",
                  2 * depth, ", got ", blocks);
  STD_TORCH_CHECK((0 < blocks && blocks <= depth + 1) || !plan.dec_layers.empty(),
                  "dec_layers: expected an entry per decoder block, which blocks = ", blocks,
                  " (0: the image) needs; got none");
  i64 columns = 0;
  for (i64 b = 0; b < blocks; ++b) columns += plan.channels[b <= depth ? b : 2 * depth - b];
  return columns;
}

template <class T>
std::vector<Conv<T>> convs_of(const std::vector<Tensor>& packed,
                              const std::vector<bool>& fresh = {}) {
  auto get = [&](size_t i) { return packed[i].numel() ? data<T>(packed[i]) : nullptr; };
  std::vector<Conv<T>> convs;
  for (size_t i = 0; i < packed.size(); i += 3)
    convs.push_back({get(i), get(i + 1), get(i + 2), !fresh.empty() && fresh[i / 3]});
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
