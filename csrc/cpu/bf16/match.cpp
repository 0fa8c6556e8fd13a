// match_steps in bfloat16: images, losses, Adam and phi in float32; forward keeps z and r of every
// layer in bfloat16, and so is every gradient between layers.
#include "../../operators.h"
#include "network.h"
#include "../direct/conv.h"
#include "../match_loop.h"

namespace fastphi {

namespace {

struct LayerState {
  Bf16Plane plane;
  i64 cin, cout;
  bool to_pool;  // the next layer reads its pooled output
  Buffer<bf16> z, r, pool;
  Buffer<float> s, mean, std;

  bf16* output() const { return to_pool ? pool : r; }
};

// Memory of an iteration, kept from call to call: fresh pages would cost as much as a layer each.
struct Space {
  std::vector<LayerState> layers;
  Buffer<bf16> d_r, d_r_next, dz, bordered;
  Buffer<float> image, ones, d_image, d_s, coefficient, mean, zeros;

  void reserve(const Plan& plan, i64 n, i64 h, i64 w) {
    size_t k = 0;
    i64 cin = plan.image_channels, largest = 0;
    layers.resize(parameters_expected(plan) / 3);
    for (i64 b = 0; b <= plan.blocks(); ++b) {
      const bool mid = b == plan.blocks();
      const i64 count = mid ? plan.mid_layers : plan.enc_layers[b], c = plan.channels[b];
      for (i64 i = 0; i < count; ++i, ++k, cin = c) {
        LayerState& l = layers[k];
        l.plane = bf16_plane(h >> b, w >> b), l.cin = cin, l.cout = c;
        l.to_pool = !mid && i == count - 1;
        const i64 size = n * Bf16Hidden{nullptr, nullptr, l.plane, c}.size() + BF16_SLACK;
        l.z.reserve(size), l.r.reserve(size), l.s.reserve(n), l.mean.reserve(n), l.std.reserve(n);
        if (l.to_pool) {
          const Bf16Plane below = bf16_plane(h >> (b + 1), w >> (b + 1));
          l.pool.reserve(n * Bf16Hidden{nullptr, nullptr, below, c}.size() + BF16_SLACK);
        }
        largest = std::max(largest, size);
      }
    }
    const i64 c = plan.image_channels;
    image.reserve(n * c * h * w), bordered.reserve(2 * n * c * (h + 2) * (w + 2));
    ones.reserve(n), std::fill_n(ones.get(), n, 1.0f);
    zeros.reserve(c), std::fill_n(zeros.get(), c, 0.0f);
    d_r.reserve(largest), d_r_next.reserve(largest), dz.reserve(largest);
    d_image.reserve(n * bf16_blocks(plan.channels.back()) * BF16_BLOCK);
    d_s.reserve(n), coefficient.reserve(n), mean.reserve(n * plan.channels.back());
  }

  i64 size() const {
    i64 size = d_r.size() + d_r_next.size() + dz.size();
    for (const LayerState& l : layers) size += l.z.size() + l.r.size() + l.pool.size();
    return size / 2;
  }
};

class Encoder {
 public:
  Encoder(const Plan& plan, const std::vector<Bf16Weights>& weights,
          const std::vector<const bf16*>& transposed, double eps, i64 h, i64 w, Space& space)
      : plan_(plan),
        weights_(weights),
        transposed_(transposed),
        eps_(eps),
        h_(h),
        w_(w),
        space_(space) {}

  float* image(i64 i) { return space_.image + i * plan_.image_channels * h_ * w_; }

  // phi (n, C) of the images
  void forward(i64 n, float* phi) {
    launch_bf16_border_image(n, plan_.image_channels, h_, w_, space_.image, true, space_.bordered);
    const LayerState* below = nullptr;
    for (size_t k = 0; k < space_.layers.size(); ++k) {
      const LayerState& l = space_.layers[k];
      const bool last = k + 1 == space_.layers.size();
      Bf16Layer job{};
      job.n = n, job.cout = l.cout, job.plane = l.plane;
      job.packed = weights_[k].packed, job.bias = weights_[k].bias, job.gamma = weights_[k].gamma;
      if (below) {
        job.sources = 1;
        job.source[0] = {below->output(), below->s, bf16_blocks(l.cin)};
      } else {
        job.image = space_.bordered, job.image_channels = l.cin, job.n_images = n;
      }
      job.z = l.z, job.r_out = last ? nullptr : l.r.get();
      launch_bf16_layer(job, eps_, l.s, last ? space_.mean.get() : nullptr, {l.mean, l.std});
      if (!job.gamma) std::fill_n(l.mean.get(), n, 0.0f);
      if (l.to_pool)
        launch_bf16_pool(n, {l.r, nullptr, l.plane, l.cout},
                         {l.pool, nullptr, pooled(l.plane), l.cout});
      below = &l;
    }
    for (i64 i = 0; i < n * below->cout; ++i) phi[i] = below->s[i / below->cout] * space_.mean[i];
  }

  // From d_phi (n, C) to the images' gradients, which take the place of the images.
  void backward(i64 n, const float* d_phi) {
    const LayerState& last = space_.layers.back();
    const i64 c = last.cout, row = bf16_blocks(c) * BF16_BLOCK;
    std::fill_n(space_.d_image.get(), n * row, 0.0f);
    for (i64 i = 0; i < n; ++i) {
      double d_s = 0;
      for (i64 k = 0; k < c; ++k) {
        d_s += static_cast<double>(d_phi[i * c + k]) * space_.mean[i * c + k];
        space_.d_image[i * row + k] =
            last.s[i] * d_phi[i * c + k] / static_cast<float>(last.plane.h * last.plane.w);
      }
      space_.d_s[i] = static_cast<float>(d_s);
    }
    for (size_t k = space_.layers.size(); k-- > 0;) backward_layer(n, k);
  }

 private:
  static Bf16Plane pooled(const Bf16Plane& p) { return bf16_plane(p.h / 2, p.w / 2); }

  // d_r of the layer's output (of its pool, or of its means' sum) to that of its input
  void backward_layer(i64 n, size_t k) {
    const LayerState& l = space_.layers[k];
    const bool last = k + 1 == space_.layers.size();
    const float* gamma = weights_[k].gamma;
    if (gamma)
      norm_coefficients<float>(n, l.plane.h * l.plane.w * l.cout, space_.d_s, l.s, l.std,
                               space_.coefficient);
    launch_bf16_grad_input({n, bf16_blocks(l.cout), l.plane, l.to_pool ? pooled(l.plane) : l.plane,
                            last        ? Spread::IMAGE
                            : l.to_pool ? Spread::POOL
                                        : Spread::PIXEL,
                            last ? nullptr : space_.d_r.get(), space_.d_image, l.z, gamma, l.mean,
                            gamma ? space_.coefficient.get() : nullptr, space_.dz});
    const Bf16Source dz{space_.dz, k ? space_.layers[k - 1].s.get() : space_.ones.get(),
                        bf16_blocks(l.cout)};
    if (k == 0)
      return launch_bf16_image(
          {n, l.cin, l.plane, dz, transposed_[k], space_.zeros, space_.image, l.cin, 1});
    launch_bf16_dgrad({n, bf16_blocks(l.cin), l.plane, dz, transposed_[k],
                       space_.layers[k - 1].output(), space_.d_r_next, nullptr},
                      space_.d_s);
    std::swap(space_.d_r, space_.d_r_next);
  }

  const Plan& plan_;
  const std::vector<Bf16Weights>& weights_;
  const std::vector<const bf16*>& transposed_;
  const double eps_;
  const i64 h_, w_;
  Space& space_;
};

// Of each convolution the weights of its gradient, the first layer's as those of a last one.
std::vector<const bf16*> rotated(const Plan& plan, const std::vector<Tensor>& packed) {
  std::vector<const bf16*> all;
  i64 cin = 0;
  for (i64 b = 0; b <= plan.blocks(); ++b) {
    const i64 layers = b < plan.blocks() ? plan.enc_layers[b] : plan.mid_layers;
    const i64 c = bf16_blocks(plan.channels[b]);
    for (i64 i = 0; i < layers; ++i, cin = c) {
      const i64 size = (cin ? cin * BF16_PAIRED : BF16_PAIRED / 2) * c * 9;
      const size_t at = all.size();
      STD_TORCH_CHECK(at < packed.size(), "packed_t: expected a tensor per convolution, got ",
                      packed.size());
      all.push_back(
          static_cast<const bf16*>(bf16_parameter(packed[at], ScalarType::BFloat16, size, false,
                                                  "[" + std::to_string(at) + "] of packed_t")));
    }
  }
  return all;
}

}  // namespace

int64_t match_steps_bf16(Tensor x, Tensor m, Tensor v, Tensor losses, Tensor updates, Tensor active,
                         Tensor target, Tensor weight, Shape channels, Shape enc_layers,
                         int64_t mid_layers, double eps, std::vector<Tensor> packed,
                         std::vector<Tensor> packed_t, double lr, double tolerance, int64_t start,
                         int64_t steps) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, {}};
  const auto weights = bf16_weights(x, plan, packed);
  const auto transposed = rotated(plan, packed_t);
  const MatchTensors tensors{x, m, v, losses, updates, active, target, weight};
  tensors.check(channels.back(), start, steps);
  const i64 h = x.sizes()[2], w = x.sizes()[3];
  const i64 chunk = std::min(x.sizes()[0], images_at_once(h * w));
  thread_local Space space;
  space.reserve(plan, chunk, h, w);
  Encoder encoder(plan, weights, transposed, eps, h, w, space);
  const i64 next = Match<float>(tensors, tolerance).run(start, steps, chunk, encoder, Adam{lr});
  if (space.size() > MOST_KEPT) space = Space{};
  return next;
}

}  // namespace fastphi
