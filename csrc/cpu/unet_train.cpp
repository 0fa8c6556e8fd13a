// A whole network for training, float32: forward to the image, keeping what the way back needs, and
// the way back, to the gradients of all parameters and of the image. Between them lies one tensor,
// `kept`: the image, and of each layer z (r is made of it where it is read), its mean, std and s,
// its pool; r only where a kernel cannot make it. Per 3x64x64 image of the default network 8.2
// GFLOP forward, 16.5 back (a quarter of it multiplied: Winograd), 15.9 MB kept. The steps of the
// way back are derived in csrc/README.md. Error against float64, as the layers' (winograd/kernel.h,
// winograd/weight.h).
#include "../operators.h"
#include "network.h"
#include "winograd/conv.h"

namespace fastphi {

namespace {

constexpr int IMAGE = -1;

enum Slot { PACKED, OUTPUT };  // of a thread's kept buffers

// A convolution, and where its input comes from; or an up-sampling.
struct Node {
  bool up;
  i64 h, w, c1, c2, cout;         // h, w: of its input
  int from, skip;                 // nodes, or IMAGE; skip: IMAGE for none
  bool from_pool, pool, r, relu;  // reads the pool of `from`; makes a pool, r; has a ReLU
  i64 z_at, r_at, pool_at, s_at;  // in kept; s, then mean, then std

  i64 pixels() const { return up ? 4 * h * w : h * w; }  // of the output
};

// The network as nodes, in order, and the memory that they keep for n images.
struct Nodes {
  std::vector<Node> all;
  i64 image_at = 0, size = 0, largest = 0;  // largest: of an output, per image

  Nodes(const Plan& plan, i64 n, i64 h, i64 w) {
    auto take = [&](i64 numbers) {
      const i64 at = size;
      size += (numbers + 15) / 16 * 16;
      return at;
    };
    image_at = take(n * plan.image_channels * h * w);
    std::vector<int> skips;
    int last = IMAGE;
    i64 b = 0, layer = 0;  // of the way down, then of the way up
    const auto layers = [&] { return b < plan.blocks() ? plan.enc_layers[b] : plan.mid_layers; };
    bool down = true;
    each_conv(plan, [&](i64 c1, i64 c2, i64 cout, bool up) {
      Node node{};
      node.up = up, node.c1 = c1, node.c2 = c2, node.cout = cout;
      node.from = last, node.skip = IMAGE;
      if (up) down = false, --b, layer = 0;
      node.h = h >> (up ? b + 1 : b), node.w = w >> (up ? b + 1 : b);
      if (down) {
        node.from_pool = b > 0 && layer == 0;
        if (++layer == layers()) {
          node.pool = b < plan.blocks(), node.r = b == plan.blocks();
          if (node.pool) skips.push_back(static_cast<int>(all.size()));
          if (b < plan.blocks()) ++b, layer = 0;
        }
      } else if (!up) {
        if (c2) node.skip = skips.back(), skips.pop_back();
        node.r = ++layer == plan.dec_layers[b] && b > 0;
      }
      all.push_back(node);
      last = static_cast<int>(all.size()) - 1;
    });
    for (Node& node : all) {
      const bool image = &node == &all.back();
      const i64 numbers = n * node.pixels() * node.cout;
      node.relu = !image && !node.up;
      node.r = node.r || node.up || (node.pool && !winograd_serves<float>(node.c1));
      if (!image && !node.up) node.z_at = take(numbers);
      if (node.r) node.r_at = take(numbers);
      if (node.pool) node.pool_at = take(numbers / 4);
      if (!node.up) node.s_at = take(3 * n);
      largest = std::max({largest, node.pixels() * node.cout, node.h * node.w * node.c1});
    }
  }
};

// What both ways need.
class Network {
 public:
  Network(const Plan& plan, const std::vector<Conv<float>>& convs, i64 n, i64 h, i64 w, float* kept)
      : nodes_(plan, n, h, w), convs_(convs), n_(n), kept_(kept), ones_(n) {
    std::fill_n(ones_.get(), n, 1.0f);
  }

 protected:
  const Node& node(int k) const { return nodes_.all[k]; }
  int count() const { return static_cast<int>(nodes_.all.size()); }

  float* s(int k) const {
    if (k == IMAGE) return ones_;
    return node(k).up ? s(node(k).from) : kept_ + node(k).s_at;
  }
  float* mean(int k) const { return s(k) + n_; }
  float* std(int k) const { return s(k) + 2 * n_; }

  // An output as the next layer reads it.
  Source<float> output(int k, bool pooled, i64 channels) const {
    if (k == IMAGE) return {kept_ + nodes_.image_at, ones_, nullptr, channels, false, nullptr};
    const Node& from = node(k);
    if (pooled || from.r)
      return {kept_ + (pooled ? from.pool_at : from.r_at), s(k), nullptr, channels, false, nullptr};
    return {kept_ + from.z_at, s(k), nullptr, channels, true, convs_[k].gamma};
  }

  // Sets the sources of a job for node k.
  template <class Job>
  void read(Job& job, int k) const {
    const Node& to = node(k);
    job.n = n_, job.h = to.h, job.w = to.w, job.cout = to.cout;
    job.sources = to.c2 ? 2 : 1;
    job.source[0] = output(to.from, to.from_pool, to.c1);
    if (to.c2) job.source[1] = output(to.skip, false, to.c2);
  }

  const Nodes nodes_;
  const std::vector<Conv<float>>& convs_;  // packed: the weights in torch's layout
  const i64 n_;
  float* const kept_;
  const Buffer<float> ones_;
};

class Forward : Network {
 public:
  using Network::Network;

  void run(const float* x, i64 channels, float eps, float* image) const {
    const i64 size = channels * node(0).h * node(0).w, pixels = size / channels;
    parallel(n_, size, [&](i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i)
        image_to_nhwc(x + i * size, channels, pixels, kept_ + nodes_.image_at + i * size);
    });
    const KeptBuffer<float, OUTPUT> buffer(n_ * size);
    float* const out = buffer;
    for (int k = 0; k < count(); ++k) node(k).up ? upsample(k) : layer(k, eps, out);
    parallel(n_, size, [&](i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i)
        image_to_nchw(out + i * size, channels, pixels, image + i * size);
    });
  }

 private:
  void layer(int k, float eps, float* image) const {
    const Node& to = node(k);
    const Conv<float>& conv = convs_[k];
    const bool last = k == count() - 1;
    ConvJob<float> job{};
    read(job, k);
    job.bias = conv.bias, job.gamma = conv.gamma, job.relu = to.relu;
    job.z = last ? nullptr : kept_ + to.z_at;
    job.r_out = last ? image : to.r ? kept_ + to.r_at : nullptr;
    job.pool = to.pool ? kept_ + to.pool_at : nullptr;
    const i64 cin = to.c1 + to.c2;
    job.fresh = winograd_serves<float>(cin) && winograd_fresh(n_, to.h, to.w, cin, to.cout);
    job.at = {cin * 9, 9, 1, 0};
    KeptBuffer<float, PACKED> packed(job.fresh ? 0
                                               : conv_packed_size<float>(to.cout, to.c1, to.c2));
    if (!job.fresh) pack_conv<float>(conv.packed, to.cout, to.c1, to.c2, packed);
    launch_layer_fwd<float>(job, job.fresh ? conv.packed : packed.get(), eps, mean(k),
                            conv.gamma ? std(k) : nullptr, s(k), nullptr);
    if (!conv.gamma) std::fill_n(s(k), n_, 1.0f);
  }

  void upsample(int k) const {
    const Node& to = node(k);
    KeptBuffer<float, PACKED> packed(4 * packed_size<float>(to.cout, to.c1));
    pack_upsample<float>(convs_[k].packed, to.c1, to.cout, false, packed);
    launch_upsample_fwd<float>({n_, to.h, to.w, to.c1, to.cout, 0, output(to.from, false, to.c1).r,
                                packed, kept_ + to.r_at});
  }
};

// Memory of a way back, kept from call to call: fresh pages would cost as much as a layer each.
struct BackwardSpace {
  Buffer<float> d[2], coefficient, d_s[2];
  std::vector<Buffer<float>> skips, d_s_skips;  // of the nodes that have a pool

  i64 size() const {
    i64 size = d[0].size() + d[1].size();
    for (const Buffer<float>& skip : skips) size += skip.size();
    return size;
  }
};

class Backward : Network {
 public:
  using Network::Network;

  // d_image, d_x: (N, C, H, W); d_x null: not wanted. gradients: of weights, biases and gammas one
  // after the other, or null.
  void run(const float* d_image, i64 channels, float* d_x, float* gradients, BackwardSpace& space) {
    const i64 size = channels * node(0).h * node(0).w, pixels = size / channels;
    space.skips.resize(count()), space.d_s_skips.resize(count());
    for (int i = 0; i < 2; ++i) space.d[i].reserve(n_ * nodes_.largest), space.d_s[i].reserve(n_);
    space.coefficient.reserve(n_);
    parallel(n_, size, [&](i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i)
        image_to_nhwc(d_image + i * size, channels, pixels, space.d[0] + i * size);
    });
    std::vector<float*> at(count());  // a node's gradients
    for (int k = 0; k < count(); ++k) {
      at[k] = gradients;
      if (gradients) gradients += sizes(k, 0) + sizes(k, 1) + sizes(k, 2);
    }
    for (int k = count() - 1; k >= 0; --k) {
      if (node(k).up)
        upsample(k, at[k], space);
      else
        layer(k, at[k], k > 0 || d_x, space);
    }
    if (!d_x) return;
    parallel(n_, size, [&](i64 begin, i64 end) {
      for (i64 i = begin; i < end; ++i)
        image_to_nchw(space.d[0] + i * size, channels, pixels, d_x + i * size);
    });
  }

 private:
  // Numbers of a node's weight, bias and gamma.
  i64 sizes(int k, int which) const {
    const Node& to = node(k);
    if (which == 0) return to.cout * (to.c1 + to.c2) * (to.up ? 4 : 9);
    return (which == 1 ? convs_[k].bias : convs_[k].gamma) ? to.cout : 0;
  }

  // From space.d[0], the gradient of its output (of its pool, where it has one), to that of its
  // input, in the same place. The scalars' likewise.
  void layer(int k, float* gradients, bool need_input, BackwardSpace& space) const {
    const Node& to = node(k);
    const Conv<float>& conv = convs_[k];
    float* const d = space.d[0];
    float* const d_s = space.d_s[0];
    GradInput<float> grad{d, Spread::PIXEL, conv.gamma, mean(k), nullptr};
    grad.relu = to.relu;
    if (to.pool) {
      grad.spread = Spread::PIXEL_AND_POOL, grad.d = space.skips[k], grad.d_pool = d;
      for (i64 i = 0; i < n_; ++i) d_s[i] += space.d_s_skips[k][i];
    }
    if (conv.gamma) {
      norm_coefficients<float>(n_, to.pixels() * to.cout, d_s, s(k), std(k), space.coefficient);
      grad.coefficient = space.coefficient;
    }
    WinogradBackward job{};
    read(job, k);
    job.z = k == count() - 1 ? d : kept_ + to.z_at, job.grad = &grad;
    job.need_input = need_input, job.need_weight = gradients != nullptr;
    job.input_scaled = k > 0;
    if (gradients) {
      job.d_weight = gradients;
      gradients += sizes(k, 0);
      job.d_bias = conv.bias ? gradients : nullptr;
      job.d_gamma = conv.gamma ? gradients + sizes(k, 1) : nullptr;
    }
    const i64 cin = to.c1 + to.c2;
    if (winograd_fresh(n_, to.h, to.w, cin, to.cout)) job.fresh = conv.packed;
    const bool pack = need_input && !job.fresh;
    KeptBuffer<float, PACKED> packed(
        pack ? winograd_packed_size(to.c1, to.cout) + winograd_packed_size(to.c2, to.cout) : 0);
    if (pack) pack_winograd_transposed(conv.packed, to.cout, cin, job.sources, job.source, packed);
    if (need_input) {
      job.d_r[0] = space.d[1], job.d_s[0] = space.d_s[1];
      if (to.c2) {
        space.skips[to.skip].reserve(n_ * to.pixels() * to.c2);
        space.d_s_skips[to.skip].reserve(n_);
        job.d_r[1] = space.skips[to.skip], job.d_s[1] = space.d_s_skips[to.skip];
      }
    }
    run_winograd_backward(job);
    std::swap(space.d[0], space.d[1]), std::swap(space.d_s[0], space.d_s[1]);
  }

  // No bias: the scalar passes.
  void upsample(int k, float* gradients, BackwardSpace& space) const {
    const Node& to = node(k);
    if (gradients) {
      WeightGradJob<float> job{};
      job.n = n_, job.h = to.h, job.w = to.w, job.cin = to.c1, job.cout = to.cout, job.taps = 4;
      job.r = output(to.from, false, to.c1).r, job.d = space.d[0];
      launch_weight_grad(job, 0, 0, gradients);
    }
    KeptBuffer<float, PACKED> packed(packed_size<float>(to.c1, 4 * to.cout));
    pack_upsample<float>(convs_[k].packed, to.c1, to.cout, true, packed);
    launch_upsample_bwd<float>({n_, to.h, to.w, to.c1, to.cout, 0, space.d[0], packed, space.d[1]});
    std::swap(space.d[0], space.d[1]);
  }
};

// Sizes and parameters as they come from Python, checked. parameters: weight, bias, gamma of each
// convolution, in torch's layout; empty for none.
void check_parameters(const Tensor& x, const Plan& plan, const std::vector<Tensor>& parameters) {
  check_plan(x, plan, parameters);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32, got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(!plan.dec_layers.empty(), "dec_layers: expected an entry per decoder block");
  size_t at = 0;
  auto expect = [&](const Shape& shape, bool may_lack) {
    const std::string name = "parameters[" + std::to_string(at) + "]";
    const Tensor& t = parameters[at++];
    if (may_lack && t.numel() == 0) return;
    check_shape(t, name.c_str(), shape, &x);
  };
  each_conv(plan, [&](i64 c1, i64 c2, i64 cout, bool up) {
    expect(up ? Shape{c1, cout, 2, 2} : Shape{cout, c1 + c2, 3, 3}, false);
    STD_TORCH_CHECK(!up || parameters[at].numel() == 0, "parameters[", at,
                    "]: expected no bias of an up-sampling");
    expect({cout}, true), expect({cout}, true);
  });
  for (const i64 c : plan.channels)
    STD_TORCH_CHECK(winograd_serves<float>(c), "channels: expected 16 and more, got ",
                    text(plan.channels));
}

}  // namespace

int64_t unet_train_size(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                        Shape dec_layers, std::vector<Tensor> parameters) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, dec_layers};
  check_parameters(x, plan, parameters);
  return Nodes(plan, x.sizes()[0], x.sizes()[2], x.sizes()[3]).size;
}

Tensor unet_train_fwd(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                      Shape dec_layers, double eps, std::vector<Tensor> parameters, Tensor kept) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, dec_layers};
  check_parameters(x, plan, parameters);
  const i64 n = x.sizes()[0], h = x.sizes()[2], w = x.sizes()[3];
  check_shape(kept, "kept", {Nodes(plan, n, h, w).size}, &x);
  Tensor image = new_tensor(x, shape_of(x));
  const auto convs = convs_of<float>(parameters);
  Forward(plan, convs, n, h, w, mutable_data<float>(kept))
      .run(data<float>(x), plan.image_channels, static_cast<float>(eps),
           mutable_data<float>(image));
  return image;
}

Tensor unet_train_bwd(Tensor d_image, Tensor kept, Shape channels, Shape enc_layers,
                      int64_t mid_layers, Shape dec_layers, std::vector<Tensor> parameters,
                      bool need_image, Tensor gradients) {
  const Plan plan{d_image.dim() > 1 ? d_image.sizes()[1] : 0, channels, enc_layers, mid_layers,
                  dec_layers};
  check_parameters(d_image, plan, parameters);
  const i64 n = d_image.sizes()[0], h = d_image.sizes()[2], w = d_image.sizes()[3];
  check_shape(kept, "kept", {Nodes(plan, n, h, w).size}, &d_image);
  i64 numbers = 0;
  for (const Tensor& p : parameters) numbers += p.numel();
  const bool wanted = gradients.numel() > 0;
  check_shape(gradients, "gradients", {wanted ? numbers : 0}, &d_image);
  Tensor d_x = new_tensor(d_image, need_image ? shape_of(d_image) : Shape{0});
  thread_local BackwardSpace space;
  const auto convs = convs_of<float>(parameters);
  // nothing is written to what is kept
  Backward(plan, convs, n, h, w, const_cast<float*>(data<float>(kept)))
      .run(data<float>(d_image), plan.image_channels,
           need_image ? mutable_data<float>(d_x) : nullptr,
           wanted ? mutable_data<float>(gradients) : nullptr, space);
  if (space.size() > MOST_KEPT) space = BackwardSpace{};
  return d_x;
}

}  // namespace fastphi
