// Algorithm 2, some iterations in one call: per image i, Adam on the pixels of
//   L_i(x) = sum_c weight_c (phi_c(x) - target_ic)^2,  phi = spatial mean of the middle block,
// stopping once L_i <= tolerance * L_i(first). Forward keeps z of every layer, and its pool,
// backward is that of csrc/README.md down to the image; weights get no gradient. Images that have
// stopped take no further part, and no image's result depends on the others. Per 3x64x64 image of
// the default network and iteration: 3.95 GFLOP.
#include "../operators.h"
#include "match_loop.h"
#include "network.h"
#include "winograd/conv.h"

namespace fastphi {

namespace {

template <class T>
struct LayerState {
  i64 h, w, cin, cout;
  bool to_pool;  // the next layer reads its pooled output
  bool raw;      // r is not kept: the next layer makes it of z
  Buffer<T> z, r, s, mean, std, pool;

  const T* output() const { return to_pool ? pool : raw ? z : r; }
};

// Memory of an iteration, kept from call to call: fresh pages would cost as much as a layer each.
template <class T>
struct EncoderSpace {
  std::vector<LayerState<T>> layers;
  Buffer<T> image, ones, d_r, d_r_next, dz, d_s, coefficient, mean;

  void reserve(const Plan& plan, i64 n, i64 h, i64 w) {
    size_t k = 0;
    i64 cin = plan.image_channels, largest = cin * h * w;
    layers.resize(parameters_expected(plan) / 3);
    for (i64 b = 0; b <= plan.blocks(); ++b) {
      const i64 count = b < plan.blocks() ? plan.enc_layers[b] : plan.mid_layers;
      for (i64 i = 0; i < count; ++i, ++k, cin = plan.channels[b]) {
        LayerState<T>& l = layers[k];
        l.h = h >> b, l.w = w >> b, l.cin = cin, l.cout = plan.channels[b];
        l.to_pool = b < plan.blocks() && i == count - 1;
        const i64 size = n * l.h * l.w * l.cout;
        // the layer that follows, if not through a pool, has as many outputs
        l.raw = i < count - 1 && winograd_serves<T>(l.cout);
        l.z.reserve(size), l.s.reserve(n), l.mean.reserve(n), l.std.reserve(n);
        if (!l.raw) l.r.reserve(size);
        if (l.to_pool) l.pool.reserve(size / 4);
        largest = std::max(largest, l.h * l.w * l.cout);
      }
    }
    image.reserve(n * plan.image_channels * h * w), ones.reserve(n);
    std::fill_n(ones.get(), n, T(1));
    d_r.reserve(n * largest), d_r_next.reserve(n * largest), dz.reserve(n * largest);
    d_s.reserve(n), coefficient.reserve(n);
    mean.reserve(n * plan.channels.back());
  }

  i64 size() const {
    i64 size = d_r.size() + d_r_next.size() + dz.size();
    for (const LayerState<T>& l : layers) size += l.z.size() + l.r.size() + l.pool.size();
    return size;
  }
};

template <class T>
class Encoder {
 public:
  Encoder(const Plan& plan, const std::vector<Conv<T>>& convs,
          const std::vector<Conv<T>>& transposed, T eps, i64 h, i64 w, EncoderSpace<T>& space)
      : plan_(plan),
        convs_(convs),
        transposed_(transposed),
        eps_(eps),
        h_(h),
        w_(w),
        layers_(space.layers),
        image_(space.image),
        ones_(space.ones),
        d_r_(space.d_r),
        d_r_next_(space.d_r_next),
        dz_(space.dz),
        d_s_(space.d_s),
        coefficient_(space.coefficient),
        mean_(space.mean) {}

  T* image(i64 i) {
    return image_ + i * plan_.image_channels * h_ * w_;
  }  // (H, W, C), to fill or to read

  // phi (n, C) of the images
  void forward(i64 n, T* phi) {
    const T *r = image_, *s = ones_;
    for (size_t k = 0; k < layers_.size(); ++k) {
      LayerState<T>& l = layers_[k];
      ConvJob<T> job{};
      job.n = n, job.h = l.h, job.w = l.w, job.cout = l.cout, job.sources = 1;
      job.source[0] = {r, s, nullptr, l.cin};
      if (k > 0 && layers_[k - 1].raw)
        job.source[0].raw = true, job.source[0].gamma = convs_[k - 1].gamma;
      job.fresh = convs_[k].fresh, job.at = {l.cin * 9, 9, 1, 0};
      job.bias = convs_[k].bias, job.gamma = convs_[k].gamma, job.relu = true;
      job.z = l.z, job.pool = l.to_pool ? l.pool.get() : nullptr;
      const bool last = k + 1 == layers_.size(), only = last || l.to_pool;
      job.r_out = l.raw || (only && winograd_serves<T>(l.cin)) ? nullptr : l.r.get();
      launch_layer_fwd<T>(job, convs_[k].packed, eps_, l.mean, job.gamma ? l.std.get() : nullptr,
                          l.s, last ? mean_.get() : nullptr);
      if (!job.gamma) std::fill_n(l.s.get(), n, T(1));
      r = l.output(), s = l.s;
    }
    const LayerState<T>& last = layers_.back();
    for (i64 i = 0; i < n * last.cout; ++i) phi[i] = s[i / last.cout] * mean_[i];
  }

  // From d_phi (n, C) to the images' gradients, which take the place of the images.
  void backward(i64 n, const T* d_phi) {
    LayerState<T>& last = layers_.back();
    const i64 c = last.cout, pixels = last.h * last.w;
    for (i64 i = 0; i < n; ++i) {
      double d_s = 0;
      for (i64 k = 0; k < c; ++k) {
        d_s += static_cast<double>(d_phi[i * c + k]) * mean_[i * c + k];
        d_r_[i * c + k] = last.s[i] * d_phi[i * c + k] / static_cast<T>(pixels);
      }
      d_s_[i] = static_cast<T>(d_s);
    }
    for (size_t k = layers_.size(); k-- > 0;) backward_layer(n, k);
  }

 private:
  // d_r_ of the layer's output (of its pool, or of its means' sum) to that of its input
  void backward_layer(i64 n, size_t k) {
    LayerState<T>& l = layers_[k];
    GradInput<T> grad{d_r_, Spread::PIXEL, convs_[k].gamma, l.mean, nullptr};
    if (k + 1 == layers_.size())
      grad.spread = Spread::IMAGE;
    else if (l.to_pool)
      grad.spread = Spread::POOL;
    if (grad.gamma) {
      norm_coefficients<T>(n, l.h * l.w * l.cout, d_s_, l.s, l.std, coefficient_);
      grad.coefficient = coefficient_;
    }
    DgradJob<T> job{};
    job.n = n, job.h = l.h, job.w = l.w, job.cout = l.cout, job.c = l.cin;
    job.packed = transposed_[k].packed;
    if (winograd_serves<T>(l.cout)) {
      job.input = l.z, job.grad = &grad;
    } else {
      launch_grad_input<T>(n, l.h, l.w, l.cout, l.z, grad, dz_);
      job.input = dz_;
    }
    if (k > 0) {
      const LayerState<T>& below = layers_[k - 1];
      job.r = below.output(), job.scale = below.s, job.d_s = d_s_;
      job.raw = below.raw, job.gamma = convs_[k - 1].gamma;
    }
    job.d_r = k > 0 ? d_r_next_ : image_;
    launch_layer_dgrad<T>(job);
    std::swap(d_r_, d_r_next_);
  }

  const Plan& plan_;
  const std::vector<Conv<T>>&convs_, &transposed_;
  const T eps_;
  const i64 h_, w_;
  std::vector<LayerState<T>>& layers_;
  Buffer<T>&image_, &ones_, &d_r_, &d_r_next_, &dz_, &d_s_, &coefficient_, &mean_;
};

}  // namespace

int64_t match_steps(Tensor x, Tensor m, Tensor v, Tensor losses, Tensor updates, Tensor active,
                    Tensor target, Tensor weight, Shape channels, Shape enc_layers,
                    int64_t mid_layers, double eps, std::vector<Tensor> packed,
                    std::vector<Tensor> packed_t, double lr, double tolerance, int64_t start,
                    int64_t steps) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, {}};
  const std::vector<bool> fresh = check_network(x, plan, packed);
  check_network(x, plan, packed_t, true);
  const MatchTensors tensors{x, m, v, losses, updates, active, target, weight};
  tensors.check(channels.back(), start, steps);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto convs = convs_of<T>(packed, fresh), transposed = convs_of<T>(packed_t);
    const i64 h = x.sizes()[2], w = x.sizes()[3];
    const i64 chunk = std::min(x.sizes()[0], images_at_once(h * w));
    thread_local EncoderSpace<T> space;
    space.reserve(plan, chunk, h, w);
    Encoder<T> encoder(plan, convs, transposed, static_cast<T>(eps), h, w, space);
    const i64 next = Match<T>(tensors, tolerance).run(start, steps, chunk, encoder, Adam{lr});
    if (space.size() > MOST_KEPT) space = EncoderSpace<T>{};
    return next;
  });
}

}  // namespace fastphi
