// Launcher of the Winograd convolution: which blocks of tiles the threads work on, and in what
// memory. An output element's arithmetic is that of its tile and panel, so none of the choices
// made here changes a bit of it.
#include "conv.h"

#include <atomic>
#include <vector>

#include "../launch.h"

namespace fastphi {

namespace {

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }

// Kept from call to call, one each per thread: fresh memory would cost as much as a small layer.
enum Scratch { POINTS, PRODUCTS, BORDER, WEIGHTS, SCRATCHES };

float* scratch(Scratch which, i64 size) {
  thread_local Buffer<float> buffers[SCRATCHES];
  buffers[which].reserve(size);
  return buffers[which];
}

// Strips [first, last) of all images, cut into `count` blocks.
struct Blocks {
  i64 strips, count;
  i64 first(i64 block) const { return block * strips / count; }
};

class Launch {
 public:
  explicit Launch(const ConvJob<float>& job)
      : job_(job), strips_(job.h, job.w), depth_(winograd_depth(job.sources, job.source)) {
    total_ = job.n * strips_.per_image;
  }

  void run() const {
    if (job_.fresh) return together();
    const i64 threads = torch::stable::get_num_threads();
    // A block's transformed input takes a quarter of the core's cache, weights and products the
    // rest; or, so that many weights are read for many tiles, all of it.
    const i64 fits = std::max<i64>(1, cache_size() / (deep() ? 1 : 4) / (WINO_POINTS * 4 * depth_));
    const i64 tiles = strips_.before(total_), at_once = fits * threads;
    // Of few tiles, products take less time than all the weights: 256 -> 256 @16 is 18 % faster
    // with 64 tiles apart, 512 -> 512 @8 24 % slower with 16.
    constexpr i64 ENOUGH = 48;
    if (tiles < (deep() ? ENOUGH * threads : at_once) &&
        WINO_POINTS * 4 * depth_ * job_.cout > cache_size() / 2)
      return together();
    const i64 turns =
        deep() ? std::max<i64>(1, (tiles + at_once / 2) / at_once) : divide_up(tiles, at_once);
    apart({total_, std::clamp<i64>(turns * threads, 1, total_)});
  }

 private:
  i64 tiles(i64 first, i64 last) const { return strips_.before(last) - strips_.before(first); }
  // One line more: the points of a tile must not fall into one set of the cache.
  i64 pitch(i64 tiles) const { return tiles * depth_ + 16; }
  i64 points_size(i64 tiles) const { return WINO_POINTS * pitch(tiles) + 16; }
  i64 products_size(i64 tiles) const {
    return WINO_POINTS * tiles * 2 * kernels<float>().lanes * std::min(group(), job_.panels);
  }
  // Panels that share a pass over the points. Where a panel's weights are small beside the cache,
  // one keeps the products small; else the transformed input, which several panels then read at
  // once.
  bool deep() const { return WINO_POINTS * 4 * 32 * depth_ > cache_size() / 2; }
  i64 group() const { return deep() ? job_.panels : 1; }

  void output(i64 first, i64 last, i64 begin, i64 end, i64 tiles, const float* v, float* m) const {
    float* const packed =
        job_.fresh ? scratch(WEIGHTS, WINO_POINTS * FRESH * 2 * kernels<float>().lanes) : nullptr;
    winograd_kernels().output(
        job_, {first, last, begin, end, group(), tiles, pitch(tiles), depth_, v, m, packed});
  }

  void input(i64 first, i64 last, float* v, i64 pitch) const {
    winograd_kernels().input(job_, first, last, v, pitch, depth_, scratch(BORDER, 2 * depth_ + 32));
  }

  // Each thread block after block from input to output: those of its own part of the images, which
  // it worked on in the layer before, then what others have not come to. So a thread that the
  // machine holds up does not hold up the others.
  void apart(const Blocks& blocks) const {
    const i64 parts = std::min<i64>(blocks.count, torch::stable::get_num_threads());
    std::vector<std::atomic<i64>> next(parts);
    const auto start = [&](i64 part) { return part * blocks.count / parts; };
    for (i64 part = 0; part < parts; ++part) next[part] = start(part);
    parallel(parts, i64{1} << 20, [&](i64 own, i64) {
      for (i64 k = 0; k < parts; ++k) {
        const i64 part = (own + k) % parts;
        for (i64 block; (block = next[part]++) < start(part + 1);)
          through(blocks.first(block), blocks.first(block + 1));
      }
    });
  }

  void through(i64 first, i64 last) const {
    const i64 count = tiles(first, last);
    float* const v = scratch(POINTS, points_size(count));
    float* const m = scratch(PRODUCTS, products_size(count));
    input(first, last, v, pitch(count));
    output(first, last, 0, job_.panels, count, v, m);
  }

  // Few tiles and many weights: the threads share the transformed input and each streams the
  // weights of its own panels only. With more tiles, what another core has written is slower to
  // read than twice the weights, which are fetched ahead.
  void together() const {
    const i64 count = tiles(0, total_);
    float* const v = scratch(POINTS, points_size(count));
    parallel(total_, i64{1} << 20, [&](i64 begin, i64 end) {
      input(begin, end, v + tiles(0, begin) * depth_, pitch(count));
    });
    parallel(job_.panels, i64{1} << 20, [&](i64 begin, i64 end) {
      float* m = scratch(PRODUCTS, products_size(count));
      output(0, total_, begin, end, count, v, m);
    });
  }

  const ConvJob<float>& job_;
  const Strips strips_;
  i64 depth_, total_;
};

}  // namespace

void run_winograd(const ConvJob<float>& job) { Launch(job).run(); }

i64 winograd_depth(int sources, const Source<float>* source) {
  const i64 lanes = kernels<float>().lanes;
  i64 before = 0, depth = 0;
  for (int s = 0; s < sources; ++s) {
    depth = before + divide_up(source[s].channels, lanes) * lanes;
    before += source[s].channels;
  }
  return divide_up(depth, lanes) * lanes;
}

void pack_winograd(const float* weight, i64 outputs, i64 channels, WeightStrides at,
                   float* packed) {
  const i64 panels = divide_up(outputs, 2 * kernels<float>().lanes);
  parallel(panels, 512 * channels, [&](i64 begin, i64 end) {
    winograd_kernels().pack(weight, outputs, channels, at, begin, end, packed);
  });
}

bool winograd_fresh(i64 n, i64 h, i64 w, i64 cin, i64 cout) {
  constexpr i64 TILES = 64, NUMBERS = i64{1} << 14;
  const Strips strips(h, w);
  return n * strips.before(strips.per_image) <= TILES && cin * cout >= NUMBERS;
}

i64 winograd_packed_size(i64 outputs, i64 channels) {
  const i64 lanes = kernels<float>().lanes;
  return WINO_POINTS * divide_up(outputs, lanes) * lanes * channels;
}

void pack_winograd_transposed(const float* weight, i64 cout, i64 cin, int sources,
                              Source<float>* source, float* packed) {
  for (i64 s = 0, c0 = 0; s < sources; c0 += source[s++].channels) {
    pack_winograd(weight, source[s].channels, cout, {9, cin * 9, -1, c0 * 9 + 8}, packed);
    source[s].packed = packed;
    packed += winograd_packed_size(source[s].channels, cout);
  }
}

}  // namespace fastphi
