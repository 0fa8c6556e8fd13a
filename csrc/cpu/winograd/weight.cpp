// Launcher of the Winograd gradient of weights: into which parts the tiles are cut, and what the
// threads share. What is summed in which order depends on the sizes alone.
#include <algorithm>
#include <atomic>

#include "../launch.h"
#include "conv.h"

namespace fastphi {

namespace {

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }

enum Slot { INPUT = 2, OUTPUT, PRODUCTS, BORDER, SCRATCH };  // of a thread's kept buffers

class WeightLaunch {
 public:
  WeightLaunch(const ConvJob<float>& input, const float* dz, float* d_weight)
      : input_(input), strips_(input.h, input.w), depth_(winograd_depth(input)) {
    const auto& k = kernels<float>();
    job_.n = input.n, job_.h = input.h, job_.w = input.w, job_.cout = input.cout;
    for (int s = 0; s < input.sources; ++s) job_.cin += input.source[s].channels;
    job_.panels = divide_up(job_.cout, 2 * k.lanes);
    job_.scale = input.sources == 1 ? input.source[0].scale : nullptr;
    job_.dz = dz, job_.d_weight = d_weight;
    lanes_ = divide_up(job_.cout, k.lanes) * k.lanes;
    blocks_ = divide_up(job_.cin, k.max_block);
    total_ = job_.n * strips_.per_image;
  }

  // Slices, each a thread's own from the first transform to the last product, where the products
  // are few and the tiles many: what another core has just written is slow to read.
  void run() const {
    constexpr i64 MEMORY = i64{1} << 24, MOST = 16;  // bytes of products, slices
    const i64 most = std::min({MOST, MEMORY / (WINO_POINTS * 4 * job_.cin * job_.cout),
                               strips_.before(total_) / SLICE, total_});
    if (most > 1)
      apart(most);
    else
      together();
  }

 private:
  static constexpr i64 SLICE = 64;                // tiles of a slice, at least
  static constexpr i64 ALONE = 64, SHARED = 128;  // tiles of a part, at most

  i64 tiles(i64 first, i64 last) const { return strips_.before(last) - strips_.before(first); }
  // One line more: the points of a tile must not fall into one set of the cache.
  i64 v_pitch(i64 tiles) const { return tiles * depth_ + 16; }
  i64 d_pitch(i64 tiles) const { return tiles * lanes_ + 16; }
  i64 v_size(i64 tiles) const { return WINO_POINTS * v_pitch(tiles) + 16; }
  i64 d_size(i64 tiles) const { return WINO_POINTS * d_pitch(tiles) + 16; }

  // Units of at most 4 blocks and 4 panels, 900 kB of products; less where there are not `wanted`
  // such.
  WeightPart grouped(i64 wanted) const {
    WeightPart part{};
    part.depth = depth_;
    part.blocks = std::min<i64>(blocks_, 4), part.panels = std::min<i64>(job_.panels, 4);
    while (units(part) < wanted && part.blocks * part.panels > 1) {
      i64& larger = part.panels >= part.blocks ? part.panels : part.blocks;
      larger = divide_up(larger, 2);
    }
    return part;
  }
  i64 units(const WeightPart& part) const {
    return divide_up(blocks_, part.blocks) * divide_up(job_.panels, part.panels);
  }
  i64 unit_size(const WeightPart& part) const {
    return WINO_POINTS * part.blocks * part.panels * kernels<float>().unit_size;
  }

  // The strips from `first` on that make the next part.
  i64 part_end(i64 first, i64 end, i64 most) const {
    i64 last = first + 1;
    while (last < end && tiles(first, last + 1) <= most) ++last;
    return last;
  }

  // Strips [first + begin, first + end) of the part that starts with `first`.
  void transform(const WeightPart& part, i64 first, i64 begin, i64 end) const {
    KeptBuffer<float, BORDER> border(2 * depth_ + 32);
    const i64 at = tiles(first, first + begin);
    winograd_kernels().input(input_, first + begin, first + end, part.v + at * depth_, part.v_pitch,
                             depth_, border);
    winograd_kernels().spread(job_, first + begin, first + end, at, part);
  }

  void set_tiles(WeightPart& part, i64 tiles) const {
    part.tiles = tiles, part.v_pitch = v_pitch(tiles), part.d_pitch = d_pitch(tiles);
  }

  void apart(i64 slices) const {
    const WeightPart whole = grouped(4);
    const i64 count = units(whole), size = unit_size(whole);
    KeptBuffer<float, PRODUCTS> m(slices * count * size);
    float* const products = m;
    std::atomic<i64> next = 0;
    parallel(std::min<i64>(slices, torch::stable::get_num_threads()), i64{1} << 20, [&](i64, i64) {
      KeptBuffer<float, INPUT> v(v_size(ALONE));
      KeptBuffer<float, OUTPUT> d(d_size(ALONE));
      WeightPart part = whole;
      part.v = v, part.d = d;
      for (i64 slice; (slice = next++) < slices;) {
        const i64 begin = slice * total_ / slices, end = (slice + 1) * total_ / slices;
        for (i64 first = begin, last; first < end; first = last) {
          last = part_end(first, end, ALONE);
          set_tiles(part, tiles(first, last));
          part.add = first > begin;
          transform(part, first, 0, last - first);
          for (i64 unit = 0; unit < count; ++unit)
            winograd_kernels().weights(job_, part, unit, products + (slice * count + unit) * size);
        }
      }
    });
    parallel(count, i64{1} << 20, [&](i64 begin, i64 end) {
      for (i64 unit = begin; unit < end; ++unit)
        winograd_kernels().taps(job_, whole, unit, products + unit * size, slices, count * size);
    });
  }

  // The threads share the transformed tiles; each has units of its own.
  void together() const {
    WeightPart part = grouped(2 * torch::stable::get_num_threads());
    const i64 most = std::min(SHARED, strips_.before(total_)), count = units(part),
              size = unit_size(part);
    const bool several = part_end(0, total_, most) < total_;
    KeptBuffer<float, INPUT> v(v_size(most));
    KeptBuffer<float, OUTPUT> d(d_size(most));
    KeptBuffer<float, PRODUCTS> m(several ? count * size : 0);
    part.v = v, part.d = d;
    float* const products = m;
    for (i64 first = 0, last; first < total_; first = last) {
      last = part_end(first, total_, most);
      set_tiles(part, tiles(first, last));
      part.add = first > 0;
      parallel(last - first, i64{1} << 20,
               [&](i64 begin, i64 end) { transform(part, first, begin, end); });
      parallel(count, i64{1} << 20, [&](i64 begin, i64 end) {
        KeptBuffer<float, SCRATCH> scratch(several ? 0 : size);
        for (i64 unit = begin; unit < end; ++unit) {
          float* const mine = several ? products + unit * size : scratch.get();
          winograd_kernels().weights(job_, part, unit, mine);
          if (last == total_) winograd_kernels().taps(job_, part, unit, mine, 1, 0);
        }
      });
    }
  }

  const ConvJob<float>& input_;
  const Strips strips_;
  WinogradWeightJob job_{};
  i64 depth_, lanes_, blocks_, total_;
};

}  // namespace

void run_winograd_weight(const ConvJob<float>& input, const float* dz, float* d_weight) {
  WeightLaunch(input, dz, d_weight).run();
}

}  // namespace fastphi
