// unet_fwd in bfloat16: the same network, float32 images in and out. A level's layers run over a
// few images at a time, as many as stay in the cores' caches; the next level begins when all are
// done, since its weights are read once for all of them.
#include "../../operators.h"
#include "network.h"

namespace fastphi {

namespace {

// Memory of a pass, kept from call to call: fresh pages would cost as much as a layer.
struct Workspace {
  Buffer<float> means;
  Buffer<bf16> image, work[2];
  Buffer<float> work_s[2];
  // of each level: the encoder's output, its pool or the middle block's or decoder's output
  std::vector<Buffer<bf16>> skip, level;
  std::vector<Buffer<float>> skip_s, level_s;

  i64 size() const {
    i64 size = work[0].size() + work[1].size();
    for (const auto& b : skip) size += b.size();
    for (const auto& b : level) size += b.size();
    return size / 2;
  }
};

class Forward {
 public:
  Forward(const Plan& plan, const std::vector<Bf16Weights>& weights, double eps, Workspace& space,
          i64 n, i64 h, i64 w)
      : plan_(plan), weights_(weights), eps_(eps), space_(space), n_(n), h_(h), w_(w) {
    const size_t levels = plan.blocks() + 1;
    if (space.skip.size() < levels)
      space.skip.resize(levels), space.skip_s.resize(levels), space.level.resize(levels),
          space.level_s.resize(levels);
  }

  // x (N, C, H, W). means (N, stride) for the first `blocks` blocks; or out (N, C, H, W)
  void run(const float* x, i64 blocks, float* means, i64 stride, float* out) {
    const i64 c = plan_.image_channels;
    space_.image.reserve(2 * n_ * c * (h_ + 2) * (w_ + 2));
    launch_bf16_border_image(n_, c, h_, w_, x, false, space_.image);
    means_ = blocks ? means : nullptr, stride_ = stride, left_ = blocks;
    for (i64 b = 0; b <= plan_.blocks(); ++b)
      if (encoder(b)) return;
    for (i64 b = plan_.blocks() - 1; b >= 0; --b)
      if (decoder(b, out)) return;
  }

 private:
  struct Options {
    const Bf16Hidden* skip = nullptr;
    float* means = nullptr;
    bool only = false;  // the means are all that is wanted
  };

  // c channels at level b's resolution, in memory for n images
  Bf16Hidden hidden(Buffer<bf16>& r, Buffer<float>& s, i64 n, i64 b, i64 c) {
    Bf16Hidden x{nullptr, nullptr, bf16_plane(h_ >> b, w_ >> b), c};
    r.reserve(n * x.size() + BF16_SLACK), s.reserve(n);
    x.r = r, x.s = s;
    return x;
  }
  Bf16Hidden skip(i64 b) {
    return hidden(space_.skip[b], space_.skip_s[b], n_, b, plan_.channels[b]);
  }

  // The working buffers take turns.
  Bf16Hidden other(const bf16* taken, i64 n, i64 b) {
    const int i = taken && taken == space_.work[0].get();
    return hidden(space_.work[i], space_.work_s[i], n, b, plan_.channels[b]);
  }

  // Images of level b to work on together: their activations stay in the cores' caches, unless the
  // weights are the larger part.
  i64 together(i64 b, bool last) const {
    const i64 c = plan_.channels[b];
    const Bf16Hidden x{nullptr, nullptr, bf16_plane(h_ >> b, w_ >> b), c};
    const i64 fit = cache_size() / (3 * 2 * x.size());
    return last ? n_ : std::min(n_, torch::stable::get_num_threads() * std::max<i64>(1, fit));
  }

  // Level b of the encoder, or the middle block; whether that was all.
  bool encoder(i64 b) {
    const bool mid = b == plan_.blocks(), ends = left_ == 1;
    const i64 layers = mid ? plan_.mid_layers : plan_.enc_layers[b], step = together(b, mid);
    const size_t first = next_;
    Bf16Hidden input{}, pooled{};
    if (b) input = hidden(space_.level[b - 1], space_.skip_s[b - 1], n_, b, plan_.channels[b - 1]);
    const Bf16Hidden whole = skip(b);
    if (!mid && !ends)
      pooled = hidden(space_.level[b], space_.skip_s[b], n_, b + 1, plan_.channels[b]);
    for (i64 i = 0; i < n_; i += step) {
      const i64 n = std::min(step, n_ - i);
      next_ = first;
      Bf16Hidden x = b ? input.from(i) : Bf16Hidden{};
      for (i64 k = 0; k < layers; ++k) {
        const bool last = k + 1 == layers;
        const Bf16Hidden to = last ? whole.from(i) : other(x.r, n, b);
        Options options;
        if (last && left_) options = {.means = block_means(n, to.c), .only = ends};
        layer(x, i, n, to, options);
        x = to;
      }
      if (left_) take_means(i, n, x);
      if (pooled.r) launch_bf16_pool(n, x, pooled.from(i));
    }
    return block_done(whole.c);
  }

  // Level b of the decoder; whether that was all.
  bool decoder(i64 b, float* out) {
    const bool image = b == 0, ends = left_ == 1;
    const Bf16Hidden input =
        b + 1 == plan_.blocks()
            ? skip(b + 1)
            : hidden(space_.level[b + 1], space_.level_s[b + 1], n_, b + 1, plan_.channels[b + 1]);
    const Bf16Hidden beside = skip(b);
    Bf16Hidden whole{};
    if (!image) whole = hidden(space_.level[b], space_.level_s[b], n_, b, plan_.channels[b]);
    const size_t first = next_;
    const i64 step = together(b, false), layers = plan_.dec_layers[b] - image;
    for (i64 i = 0; i < n_; i += step) {
      const i64 n = std::min(step, n_ - i);
      next_ = first;
      Bf16Hidden x = upsample(input.from(i), n, other(nullptr, n, b));
      for (i64 k = 0; k < layers; ++k) {
        const bool last = k + 1 == layers && !image;
        const Bf16Hidden to = last ? whole.from(i) : other(x.r, n, b);
        const Bf16Hidden second = beside.from(i);
        Options options{.skip = k ? nullptr : &second};
        if (last && left_) options.means = block_means(n, to.c), options.only = ends;
        layer(x, i, n, to, options);
        x = to;
      }
      if (image) to_image(x, n, out + i * plan_.image_channels * h_ * w_);
      if (left_) take_means(i, n, x);
    }
    return block_done(whole.c);
  }

  float* block_means(i64 n, i64 c) {
    space_.means.reserve(n * c);
    return space_.means;
  }

  void take_means(i64 first, i64 n, const Bf16Hidden& y) {
    for (i64 i = 0; i < n; ++i)
      for (i64 c = 0; c < y.c; ++c)
        means_[(first + i) * stride_ + c] = y.s[i] * space_.means[i * y.c + c];
  }

  bool block_done(i64 c) {
    if (!left_) return false;
    means_ += c;
    return --left_ == 0;
  }

  void layer(const Bf16Hidden& x, i64 image, i64 n, const Bf16Hidden& to, const Options& options) {
    const Bf16Weights& weights = weights_[next_++];
    Bf16Layer job{};
    job.n = n, job.cout = to.c, job.plane = to.plane;
    job.bias = weights.bias, job.gamma = weights.gamma;
    job.r_out = options.only ? nullptr : to.r;
    job.packed = weights.packed;
    if (x.r) {
      job.sources = options.skip ? 2 : 1;
      job.source[0] = {x.r, x.s, x.blocks()};
      if (options.skip) job.source[1] = {options.skip->r, options.skip->s, options.skip->blocks()};
    } else {
      job.image_channels = plan_.image_channels, job.n_images = n_;
      job.image = space_.image + image * job.image_channels * (h_ + 2) * (w_ + 2);
    }
    launch_bf16_layer(job, eps_, to.s, options.means);
  }

  Bf16Hidden upsample(const Bf16Hidden& x, i64 n, const Bf16Hidden& to) {
    const Bf16Weights& weights = weights_[next_++];
    launch_bf16_upsample({n,
                          to.blocks(),
                          x.plane,
                          to.plane,
                          {x.r, x.s, x.blocks()},
                          weights.packed,
                          weights.bias,
                          to.r});
    // A bias does not commute with the scalar: the deferral ends there.
    for (i64 i = 0; i < n; ++i) to.s[i] = weights.bias ? 1.0f : x.s[i];
    return to;
  }

  void to_image(const Bf16Hidden& x, i64 n, float* out) {
    const Bf16Weights& weights = weights_[next_++];
    launch_bf16_image({n,
                       plan_.image_channels,
                       x.plane,
                       {x.r, x.s, x.blocks()},
                       weights.packed,
                       weights.bias,
                       out,
                       1,
                       h_ * w_});
  }

  const Plan& plan_;
  const std::vector<Bf16Weights>& weights_;
  const double eps_;
  Workspace& space_;
  const i64 n_, h_, w_;
  size_t next_ = 0;
  float* means_ = nullptr;
  i64 stride_ = 0, left_ = 0;
};

}  // namespace

std::tuple<Tensor, Tensor> unet_fwd_bf16(Tensor x, Shape channels, Shape enc_layers,
                                         int64_t mid_layers, Shape dec_layers, double eps,
                                         std::vector<Tensor> packed, int64_t blocks) {
  const Plan plan{x.dim() > 1 ? x.sizes()[1] : 0, channels, enc_layers, mid_layers, dec_layers};
  const auto weights = bf16_weights(x, plan, packed);
  const i64 columns = block_columns(plan, blocks);
  const i64 n = x.sizes()[0], h = x.sizes()[2], w = x.sizes()[3];
  const i64 size = plan.image_channels * h * w;
  Tensor out = new_tensor(x, blocks ? Shape{0} : shape_of(x)), means = new_tensor(x, {n, columns});
  const i64 chunk = std::min(n, 4 * images_at_once(h * w));
  thread_local Workspace space;
  for (i64 i = 0; i < n; i += chunk)
    Forward(plan, weights, eps, space, std::min(chunk, n - i), h, w)
        .run(data<float>(x) + i * size, blocks, mutable_data<float>(means) + i * columns, columns,
             blocks ? nullptr : mutable_data<float>(out) + i * size);
  if (space.size() > MOST_KEPT) space = Workspace{};
  return {out, means};
}

}  // namespace fastphi
