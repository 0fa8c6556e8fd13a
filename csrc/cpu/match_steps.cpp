// Algorithm 2, some iterations in one call: per image i, Adam on the pixels of
//   L_i(x) = sum_c weight_c (phi_c(x) - target_ic)^2,  phi = spatial mean of the middle block,
// stopping once L_i <= tolerance * L_i(first). Forward keeps z and r of every layer, backward is
// that of csrc/README.md down to the image; weights get no gradient. Images that have stopped take
// no further part, and no image's result depends on the others. Per 3x64x64 image of the default
// network and iteration: 3.95 GFLOP.
#include <cmath>
#include <limits>

#include "../operators.h"
#include "network.h"
#include "winograd.h"

namespace fastphi {

namespace {

struct Adam {
  double lr, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
};

template <class T>
struct LayerState {
  i64 h, w, cin, cout;
  bool to_pool;  // the next layer reads its pooled output
  Buffer<T> z, r, s, mean, std, pool;

  const T* output() const { return to_pool ? pool : r; }
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
        l.z.reserve(size), l.r.reserve(size), l.s.reserve(n), l.mean.reserve(n), l.std.reserve(n);
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
      job.bias = convs_[k].bias, job.gamma = convs_[k].gamma, job.relu = true;
      job.z = l.z, job.pool = l.to_pool ? l.pool.get() : nullptr;
      const bool last = k + 1 == layers_.size(), only = last || l.to_pool;
      job.r_out = only && winograd_serves<T>(l.cin) ? nullptr : l.r.get();
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

// As torch.optim.Adam: x -= lr/(1 - b1^t) * m / (sqrt(v)/sqrt(1 - b2^t) + eps), t = 1 for the
// first. x, m, v: (C, pixels); gradient: (pixels, C).
template <class T>
void adam_step(const Adam& adam, i64 t, i64 c, i64 pixels, const T* gradient, T* x, T* m, T* v) {
  const T step = static_cast<T>(adam.lr / (1 - std::pow(adam.beta1, t)));
  const T root = static_cast<T>(std::sqrt(1 - std::pow(adam.beta2, t)));
  const T b1 = static_cast<T>(1 - adam.beta1), b2 = static_cast<T>(adam.beta2),
          b2c = static_cast<T>(1 - adam.beta2);
  const T eps = static_cast<T>(adam.eps);
  for (i64 k = 0; k < c; ++k)
    for (i64 p = 0; p < pixels; ++p) {
      const i64 i = k * pixels + p;
      const T g = gradient[p * c + k];
      m[i] += b1 * (g - m[i]);
      v[i] = b2 * v[i] + b2c * g * g;
      x[i] -= step * (m[i] / (std::sqrt(v[i]) / root + eps));
    }
}

// The state of Algorithm 2 on a batch.
template <class T>
struct Match {
  i64 n, image_channels, pixels, c;
  T *x, *m, *v;     // (N, C, H, W)
  T* losses;        // (max_iter + 1, N)
  i64* updates;     // (N,)
  bool* active;     // (N,)
  const T* target;  // (N, c)
  const T* weight;  // (c,)
  double tolerance;
  i64 max_iter;

  i64 size() const { return image_channels * pixels; }

  // L_i(x) into row t and the image's further part in it; phi becomes d_phi. phi: (c,)
  void judge(i64 t, i64 i, T* phi) {
    double loss = 0;
    for (i64 k = 0; k < c; ++k) {
      const double d = static_cast<double>(phi[k]) - target[i * c + k];
      loss += weight[k] * d * d;
      phi[k] = static_cast<T>(2 * weight[k] * d);
    }
    losses[t * n + i] = static_cast<T>(loss);
    const bool stop = tolerance > 0 && losses[t * n + i] <= tolerance * losses[i];
    active[i] = !stop && t < max_iter;
  }

  // Iteration t of the k images `which`, all of them active.
  void step(i64 t, const i64* which, i64 k, Encoder<T>& encoder, const Adam& adam, T* phi) {
    for (i64 j = 0; j < k; ++j)
      image_to_nhwc(x + which[j] * size(), image_channels, pixels, encoder.image(j));
    encoder.forward(k, phi);
    bool any = false;
    for (i64 j = 0; j < k; ++j) {
      judge(t, which[j], phi + j * c);
      any = any || active[which[j]];
    }
    if (!any) return;
    encoder.backward(k, phi);
    parallel(k, 20 * size(), [&](i64 begin, i64 end) {
      for (i64 j = begin; j < end; ++j) {
        const i64 i = which[j], at = i * size();
        if (!active[i]) continue;
        adam_step(adam, t + 1, image_channels, pixels, encoder.image(j), x + at, m + at, v + at);
        updates[i] = t + 1;
      }
    });
  }
};

}  // namespace

void match_steps(Tensor x, Tensor m, Tensor v, Tensor losses, Tensor updates, Tensor active,
                 Tensor target, Tensor weight, Shape channels, Shape enc_layers, int64_t mid_layers,
                 double eps, std::vector<Tensor> packed, std::vector<Tensor> packed_t, double lr,
                 double tolerance, int64_t start, int64_t steps) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, {}};
  check_network(x, plan, packed);
  check_network(x, plan, packed_t);
  const i64 n = x.sizes()[0], h = x.sizes()[2], w = x.sizes()[3], c = channels.back();
  check_shape(m, "m", shape_of(x), &x);
  check_shape(v, "v", shape_of(x), &x);
  check_tensor(losses, "losses", 2, &x);
  const i64 max_iter = losses.sizes()[0] - 1;
  check_shape(losses, "losses", {max_iter + 1, n}, &x);
  check_shape(target, "target", {n, c}, &x);
  check_shape(weight, "weight", {c}, &x);
  STD_TORCH_CHECK(updates.scalar_type() == ScalarType::Long && shape_of(updates) == Shape{n},
                  "updates: expected int64 (", n, ",)");
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Bool && shape_of(active) == Shape{n},
                  "active: expected bool (", n, ",)");
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const auto convs = convs_of<T>(packed), transposed = convs_of<T>(packed_t);
    const i64 chunk = std::min(n, images_at_once(h * w));
    thread_local EncoderSpace<T> space;
    space.reserve(plan, chunk, h, w);
    Encoder<T> encoder(plan, convs, transposed, static_cast<T>(eps), h, w, space);
    Buffer<T> phi(chunk * c);
    Match<T> match{n,
                   plan.image_channels,
                   h * w,
                   c,
                   mutable_data<T>(x),
                   mutable_data<T>(m),
                   mutable_data<T>(v),
                   mutable_data<T>(losses),
                   mutable_data<i64>(updates),
                   mutable_data<bool>(active),
                   data<T>(target),
                   data<T>(weight),
                   tolerance,
                   max_iter};
    for (i64 t = start; t < std::min(start + steps, max_iter + 1); ++t) {
      std::vector<i64> left;
      for (i64 i = 0; i < n; ++i)
        if (match.active[i]) left.push_back(i);
      const i64 count = static_cast<i64>(left.size());
      for (i64 i = 0; i < count; i += chunk)
        match.step(t, left.data() + i, std::min(chunk, count - i), encoder, Adam{lr}, phi);
    }
    if (space.size() > MOST_KEPT) space = EncoderSpace<T>{};
  });
}

}  // namespace fastphi
