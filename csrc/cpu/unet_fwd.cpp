// A whole network, or its first blocks, in one call and without autograd: images (N, C, H, W) to
// images, or to the spatial means of the blocks. Nothing is kept that the way forward does not
// need: each layer writes its r_out alone, the pool and the means read it while it is warm. Per
// 3x64x64 image of the default network 8.23 GFLOP to the image, 1.98 GFLOP to the middle block.
#include "../operators.h"
#include "network.h"

namespace fastphi {

namespace {

template <class T>
struct Hidden {
  T *r, *s;
  i64 h, w, c;
};

template <class T>
class Forward {
 public:
  Forward(const Plan& plan, const std::vector<Conv<T>>& convs, T eps, i64 n, i64 h, i64 w)
      : plan_(plan),
        convs_(convs),
        eps_(eps),
        n_(n),
        skips_(plan.blocks()),
        skip_scales_(plan.blocks()) {
    i64 largest = plan.image_channels * h * w;
    for (i64 b = 0; b <= plan.blocks(); ++b) {
      const i64 size = plan.channels[b] * (h >> b) * (w >> b);
      largest = std::max(largest, size);
      if (b < plan.blocks()) skips_[b].reserve(n * size), skip_scales_[b].reserve(n);
    }
    for (int i = 0; i < 2; ++i) work_[i].reserve(n * largest), scales_[i].reserve(n);
    mean_.reserve(n), std_.reserve(n);
  }

  // images: n of (C, H, W). means (n, stride), from the column of the block on, for `blocks`
  // blocks; or out.
  void run(const T* images, i64 n, i64 h, i64 w, i64 blocks, T* means, i64 stride, T* out) {
    n_ = n, next_ = 0;
    Hidden<T> x{work_[0], scales_[0], h, w, plan_.image_channels};
    for (i64 i = 0; i < n; ++i)
      image_to_nhwc(images + i * x.c * h * w, x.c, h * w, x.r + i * x.c * h * w);
    std::fill_n(x.s, n, T(1));
    i64 done = 0;
    auto finished = [&](const Hidden<T>& y) {
      if (!blocks) return false;
      write_mean(y, means, stride);
      means += y.c;
      return ++done == blocks;
    };
    for (i64 b = 0; b < plan_.blocks(); ++b) {
      for (i64 i = 0; i < plan_.enc_layers[b]; ++i) {
        const bool last = i == plan_.enc_layers[b] - 1;
        Hidden<T> to{skips_[b], skip_scales_[b], x.h, x.w, plan_.channels[b]};
        x = layer(x, nullptr, last ? to : other(x, plan_.channels[b]), true);
      }
      if (finished(x)) return;
      const Hidden<T> pooled{work_[0], x.s, x.h / 2, x.w / 2, x.c};
      launch_avg_pool_fwd(n, x.h, x.w, x.c, x.r, pooled.r);
      x = pooled;
    }
    for (i64 i = 0; i < plan_.mid_layers; ++i)
      x = layer(x, nullptr, other(x, plan_.channels.back()), true);
    if (finished(x)) return;
    for (i64 b = plan_.blocks() - 1; b >= 0; --b) {
      x = upsample(x, plan_.channels[b]);
      const Hidden<T> skip{skips_[b], skip_scales_[b], x.h, x.w, x.c};
      for (i64 i = 0; i < plan_.dec_layers[b]; ++i) {
        const bool image = b == 0 && i == plan_.dec_layers[b] - 1;
        x = layer(x, i ? nullptr : &skip, other(x, image ? plan_.image_channels : x.c), !image);
      }
      if (b > 0 && finished(x)) return;
    }
    for (i64 i = 0; i < n; ++i)
      image_to_nchw(x.r + i * x.c * h * w, x.c, h * w, out + i * x.c * h * w);
  }

 private:
  // The working buffers take turns.
  Hidden<T> other(const Hidden<T>& x, i64 c) {
    const int i = x.r == work_[0].get();
    return {work_[i], scales_[x.s == scales_[0].get()], x.h, x.w, c};
  }

  Hidden<T> layer(const Hidden<T>& x, const Hidden<T>* skip, Hidden<T> to, bool relu) {
    const Conv<T>& conv = convs_[next_++];
    ConvJob<T> job{};
    job.n = n_, job.h = x.h, job.w = x.w, job.cout = to.c;
    job.sources = skip ? 2 : 1;
    job.source[0] = {x.r, x.s, conv.packed, x.c};
    if (skip) job.source[1] = {skip->r, skip->s, conv.packed2, skip->c};
    job.bias = conv.bias, job.gamma = conv.gamma, job.relu = relu, job.r_out = to.r;
    launch_layer_fwd<T>(job, eps_, mean_, conv.gamma ? std_.get() : nullptr, to.s);
    if (!conv.gamma) std::fill_n(to.s, n_, T(1));
    return to;
  }

  Hidden<T> upsample(const Hidden<T>& x, i64 cout) {
    const Conv<T>& conv = convs_[next_++];
    Hidden<T> to = other(x, cout);
    to.h *= 2, to.w *= 2;
    launch_upsample_fwd<T>({n_, x.h, x.w, x.c, cout, 0, x.r, conv.packed, to.r});
    if (!conv.bias) {
      std::copy_n(x.s, n_, to.s);
      return to;
    }
    // A bias does not commute with the scalar: the deferral ends here.
    const i64 pixels = to.h * to.w;
    parallel(n_ * pixels, cout, [&](i64 begin, i64 end) {
      for (i64 p = begin; p < end; ++p)
        for (i64 c = 0; c < cout; ++c)
          to.r[p * cout + c] = x.s[p / pixels] * to.r[p * cout + c] + conv.bias[c];
    });
    std::fill_n(to.s, n_, T(1));
    return to;
  }

  void write_mean(const Hidden<T>& x, T* means, i64 stride) {
    Buffer<T> mean(n_ * x.c);
    launch_spatial_mean_fwd<T>(n_, x.h, x.w, x.c, x.r, mean);
    for (i64 i = 0; i < n_; ++i)
      for (i64 c = 0; c < x.c; ++c) means[i * stride + c] = x.s[i] * mean[i * x.c + c];
  }

  const Plan& plan_;
  const std::vector<Conv<T>>& convs_;
  const T eps_;
  i64 n_;
  size_t next_ = 0;
  Buffer<T> work_[2], scales_[2], mean_, std_;
  std::vector<Buffer<T>> skips_, skip_scales_;
};

}  // namespace

std::tuple<Tensor, Tensor> unet_fwd(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                                    Shape dec_layers, double eps, std::vector<Tensor> packed,
                                    int64_t blocks) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, dec_layers};
  check_network(x, plan, packed);
  const i64 depth = plan.blocks();
  STD_TORCH_CHECK(0 <= blocks && blocks <= 2 * depth, "blocks: expected 0 (the image) to ",
                  2 * depth, ", got ", blocks);
  i64 columns = 0;
  for (i64 b = 0; b < blocks; ++b) columns += channels[b <= depth ? b : 2 * depth - b];
  const i64 n = x.sizes()[0], h = x.sizes()[2], w = x.sizes()[3],
            size = plan.image_channels * h * w;
  Tensor out = new_tensor(x, blocks ? Shape{0} : shape_of(x)), means = new_tensor(x, {n, columns});
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const auto convs = convs_of<T>(packed);
    const i64 chunk = std::min(n, images_at_once(h * w));
    Forward<T> forward(plan, convs, static_cast<T>(eps), chunk, h, w);
    for (i64 i = 0; i < n; i += chunk)
      forward.run(data<T>(x) + i * size, std::min(chunk, n - i), h, w, blocks,
                  mutable_data<T>(means) + i * columns, columns,
                  blocks ? nullptr : mutable_data<T>(out) + i * size);
  });
  return {out, means};
}

}  // namespace fastphi
