// A whole network, or its first blocks, in one call and without autograd: images (N, C, H, W) to
// images, or to the spatial means of the blocks. Nothing is kept or written that the way forward
// does not need: a layer writes its r_out, or its pool and its means alone. Per 3x64x64 image of
// the default network 8.23 GFLOP to the image, 1.98 GFLOP to the middle block.
#include "../operators.h"
#include "network.h"
#include "winograd/conv.h"

namespace fastphi {

namespace {

template <class T>
struct Hidden {
  T *r, *s;
  i64 h, w, c;
};

// Memory of a pass, kept from call to call: fresh pages would cost as much as a layer.
template <class T>
struct Workspace {
  Buffer<T> work[2], scales[2], mean, std, means;
  std::vector<Buffer<T>> skips, skip_scales;

  void reserve(const Plan& plan, i64 n, i64 h, i64 w) {
    i64 largest = plan.image_channels * h * w, widest = 0;
    if (static_cast<i64>(skips.size()) < plan.blocks())
      skips.resize(plan.blocks()), skip_scales.resize(plan.blocks());
    for (i64 b = 0; b <= plan.blocks(); ++b) {
      const i64 size = plan.channels[b] * (h >> b) * (w >> b);
      largest = std::max(largest, size);
      widest = std::max(widest, plan.channels[b]);
      if (b < plan.blocks()) skips[b].reserve(n * size), skip_scales[b].reserve(n);
    }
    for (int i = 0; i < 2; ++i) work[i].reserve(n * largest), scales[i].reserve(n);
    mean.reserve(n), std.reserve(n), means.reserve(n * widest);
  }

  i64 size() const {
    i64 size = work[0].size() + work[1].size();
    for (const Buffer<T>& skip : skips) size += skip.size();
    return size;
  }
};

template <class T>
class Forward {
 public:
  Forward(const Plan& plan, const std::vector<Conv<T>>& convs, T eps, Workspace<T>& space)
      : plan_(plan), convs_(convs), eps_(eps), space_(space) {}

  // images: n of (C, H, W). means (n, stride), from the column of the block on, for `blocks`
  // blocks; or out.
  void run(const T* images, i64 n, i64 h, i64 w, i64 blocks, T* means, i64 stride, T* out) {
    n_ = n, next_ = 0;
    Hidden<T> x{space_.work[0], space_.scales[0], h, w, plan_.image_channels};
    for (i64 i = 0; i < n; ++i)
      image_to_nhwc(images + i * x.c * h * w, x.c, h * w, x.r + i * x.c * h * w);
    std::fill_n(x.s, n, T(1));
    i64 done = 0;
    auto finished = [&](const Hidden<T>& y) {
      if (!blocks) return false;
      for (i64 i = 0; i < n; ++i)
        for (i64 c = 0; c < y.c; ++c) means[i * stride + c] = y.s[i] * space_.means[i * y.c + c];
      means += y.c;
      return ++done == blocks;
    };
    for (i64 b = 0; b < plan_.blocks(); ++b) {
      for (i64 i = 0; i < plan_.enc_layers[b] - 1; ++i)
        x = layer(x, other(x, plan_.channels[b]), {});
      const bool ends = done + 1 == blocks;
      const Hidden<T> skip{space_.skips[b], space_.skip_scales[b], x.h, x.w, plan_.channels[b]};
      T* const pool = ends ? nullptr : other(x, skip.c).r;
      x = layer(x, skip, {.pool = pool, .means = blocks > 0, .only = plan_.dec_layers.empty()});
      if (finished(x)) return;
      x = {pool, x.s, x.h / 2, x.w / 2, x.c};
    }
    for (i64 i = 0; i < plan_.mid_layers; ++i) {
      const bool last = i == plan_.mid_layers - 1;
      x = layer(x, other(x, plan_.channels.back()),
                {.means = last && blocks > 0, .only = last && plan_.dec_layers.empty()});
    }
    if (finished(x)) return;
    for (i64 b = plan_.blocks() - 1; b >= 0; --b) {
      x = upsample(x, plan_.channels[b]);
      const Hidden<T> skip{space_.skips[b], space_.skip_scales[b], x.h, x.w, x.c};
      for (i64 i = 0; i < plan_.dec_layers[b]; ++i) {
        const bool last = i == plan_.dec_layers[b] - 1, image = b == 0 && last;
        x = layer(x, other(x, image ? plan_.image_channels : x.c),
                  {.skip = i ? nullptr : &skip,
                   .relu = !image,
                   .means = last && b > 0 && blocks > 0,
                   .only = last && done + 1 == blocks});
      }
      if (b > 0 && finished(x)) return;
    }
    for (i64 i = 0; i < n; ++i)
      image_to_nchw(x.r + i * x.c * h * w, x.c, h * w, out + i * x.c * h * w);
  }

 private:
  struct Options {
    const Hidden<T>* skip = nullptr;
    bool relu = true;
    T* pool = nullptr;
    bool means = false;
    bool only = false;  // nobody reads the output itself: pool and means are all that is wanted
  };

  // The working buffers take turns.
  Hidden<T> other(const Hidden<T>& x, i64 c) {
    return {space_.work[x.r == space_.work[0].get()], space_.scales[x.s == space_.scales[0].get()],
            x.h, x.w, c};
  }

  Hidden<T> layer(const Hidden<T>& x, Hidden<T> to, const Options& options) {
    const Conv<T>& conv = convs_[next_++];
    const Hidden<T>* skip = options.skip;
    ConvJob<T> job{};
    job.n = n_, job.h = x.h, job.w = x.w, job.cout = to.c;
    job.sources = skip ? 2 : 1;
    job.source[0] = {x.r, x.s, nullptr, x.c};
    if (skip) job.source[1] = {skip->r, skip->s, nullptr, skip->c};
    const i64 cin = x.c + (skip ? skip->c : 0);
    job.fresh = conv.fresh, job.at = {cin * 9, 9, 1, 0};
    job.bias = conv.bias, job.gamma = conv.gamma, job.relu = options.relu;
    job.r_out = options.only && winograd_serves<T>(x.c) ? nullptr : to.r;
    job.pool = options.pool;
    launch_layer_fwd<T>(job, conv.packed, eps_, space_.mean,
                        conv.gamma ? space_.std.get() : nullptr, to.s,
                        options.means ? space_.means.get() : nullptr);
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

  const Plan& plan_;
  const std::vector<Conv<T>>& convs_;
  const T eps_;
  Workspace<T>& space_;
  i64 n_ = 0;
  size_t next_ = 0;
};

}  // namespace

std::tuple<Tensor, Tensor> unet_fwd(Tensor x, Shape channels, Shape enc_layers, int64_t mid_layers,
                                    Shape dec_layers, double eps, std::vector<Tensor> packed,
                                    int64_t blocks) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, dec_layers};
  const std::vector<bool> fresh = check_network(x, plan, packed);
  const i64 columns = block_columns(plan, blocks);
  const i64 n = x.sizes()[0], h = x.sizes()[2], w = x.sizes()[3],
            size = plan.image_channels * h * w;
  Tensor out = new_tensor(x, blocks ? Shape{0} : shape_of(x)), means = new_tensor(x, {n, columns});
  dispatch(x, [&](auto t) {
    using T = decltype(t);
    const auto convs = convs_of<T>(packed, fresh);
    const i64 chunk = std::min(n, images_at_once(h * w));
    thread_local Workspace<T> space;
    space.reserve(plan, chunk, h, w);
    Forward<T> forward(plan, convs, static_cast<T>(eps), space);
    for (i64 i = 0; i < n; i += chunk)
      forward.run(data<T>(x) + i * size, std::min(chunk, n - i), h, w, blocks,
                  mutable_data<T>(means) + i * columns, columns,
                  blocks ? nullptr : mutable_data<T>(out) + i * size);
    if (space.size() > MOST_KEPT) space = Workspace<T>{};
  });
  return {out, means};
}

}  // namespace fastphi
