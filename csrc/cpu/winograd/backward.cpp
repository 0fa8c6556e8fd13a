// Launcher of the way back through a layer: per part, some tiles, dz is transformed once, for the
// gradient of the input and for that of the weights. Into which parts the tiles are cut, and what
// is summed in which order, depends on the sizes alone; what the threads share does not change a
// bit.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../direct/conv.h"
#include "../launch.h"
#include "conv.h"

namespace fastphi {

namespace {

i64 divide_up(i64 a, i64 b) { return (a + b - 1) / b; }

enum Slot {
  INPUT = 2,
  OUTPUT,
  PRODUCTS,
  BORDER,
  SCRATCH,
  BACK,
  WEIGHTS
};  // of a thread's kept buffers

class Backward {
 public:
  explicit Backward(const WinogradBackward& job)
      : job_(job), grad_(*job.grad), strips_(job.h, job.w) {
    const auto& k = kernels<float>();
    input_.n = weight_.n = job.n, input_.h = weight_.h = job.h, input_.w = weight_.w = job.w;
    input_.cout = weight_.cout = job.cout;
    input_.sources = 1, input_.source[0] = {job.z, nullptr, nullptr, job.cout};
    input_.grad = &grad_;
    weight_.sources = job.sources, weight_.d_weight = job.d_weight;
    weight_.panels = divide_up(job.cout, 2 * k.lanes);
    for (int s = 0; s < job.sources; ++s) {
      weight_.source[s] = job.source[s];
      weight_.cin += job.source[s].channels;
    }
    blocks_ = divide_up(weight_.cin, k.max_block);
    total_ = job.n * strips_.per_image;
    u_depth_ = apart_in_cache(winograd_depth(job.sources, job.source));
    v_depth_ = apart_in_cache(winograd_depth(1, input_.source));
  }

  // A vector more where the tiles of a point would fall into a few sets of the cache.
  static i64 apart_in_cache(i64 depth) {
    return depth % 256 ? depth : depth + kernels<float>().lanes;
  }

  void run() {
    if (job_.need_input) make_outputs();
    if (job_.need_weight) with_weights();
    for (int s = 0; job_.need_input && s < job_.sources; ++s) {
      const ConvJob<float>& out = output_[s];
      if (!job_.need_weight) run_winograd(out);
      if (out.dots) sum_units<float>(out.dots, job_.n, strips_.per_image * out.panels, job_.d_s[s]);
    }
  }

 private:
  static constexpr i64 SLICE = 64;                // tiles of a slice, at least
  static constexpr i64 ALONE = 32, SHARED = 128;  // tiles of a part, at most

  // --- the convolutions that make the gradients of the sources ---

  void make_outputs() {
    for (int s = 0; s < job_.sources; ++s) {
      const Source<float>& source = job_.source[s];
      ConvJob<float>& out = output_[s];
      out = input_;
      out.cout = source.channels, out.panels = divide_up(out.cout, 2 * kernels<float>().lanes);
      out.winograd = source.packed, out.r_out = job_.d_r[s];
      if (job_.fresh) {
        const i64 c0 = s ? job_.source[0].channels : 0;
        out.winograd = job_.fresh, out.fresh = true;
        out.at = {9, weight_.cin * 9, -1, c0 * 9 + 8};
      }
      if (!job_.input_scaled) continue;
      out.out_scale = source.scale, out.dot_with = source.r, out.dot_raw = source.raw;
      out.gamma = source.raw ? source.gamma : nullptr;
      dots_[s].reserve(total_ * out.panels);
      out.dots = dots_[s];
    }
  }

  // Panels [begin, end) of a source's gradient, of the tiles that v holds; as Launch in conv.cpp.
  void output(int s, i64 first, i64 last, i64 begin, i64 end, i64 group, const WeightPart& part) {
    KeptBuffer<float, BACK> m(WINO_POINTS * part.tiles * 2 * kernels<float>().lanes * group);
    const i64 fresh = job_.fresh ? WINO_POINTS * FRESH * 2 * kernels<float>().lanes : 0;
    KeptBuffer<float, WEIGHTS> packed(fresh);
    winograd_kernels().output(output_[s], {first, last, begin, end, group, part.tiles, part.v_pitch,
                                           part.v_depth, part.v, m, packed});
  }

  // --- with the weights ---

  void with_weights() {
    Buffer<float> bias, gain;
    if (job_.d_bias || job_.d_gamma) {
      bias.reserve(total_ * job_.cout), gain.reserve(total_ * job_.cout);
      grad_.bias = bias, grad_.gain = gain;
    }
    // Slices, each a thread's own from the first transform to the last product, where the products
    // are few and the tiles many: what another core has just written is slow to read.
    constexpr i64 MEMORY = i64{1} << 24, MOST = 16;  // bytes of products, slices
    const i64 slices = std::min({MOST, MEMORY / (WINO_POINTS * 4 * weight_.cin * job_.cout),
                                 strips_.before(total_) / SLICE, total_});
    if (slices > 1)
      apart(slices);
    else
      together();
    if (job_.d_bias) sum_rows<float>(bias, total_, job_.cout, job_.d_bias);
    if (job_.d_gamma) sum_rows<float>(gain, total_, job_.cout, job_.d_gamma);
  }

  i64 tiles(i64 first, i64 last) const { return strips_.before(last) - strips_.before(first); }
  // One line more: the points of a tile must not fall into one set of the cache.
  static i64 pitch(i64 tiles, i64 depth) { return tiles * depth + 16; }
  static i64 size(i64 tiles, i64 depth) { return WINO_POINTS * pitch(tiles, depth) + 16; }

  void set_tiles(WeightPart& part, i64 tiles) const {
    part.tiles = tiles;
    part.u_depth = u_depth_, part.u_pitch = pitch(tiles, u_depth_);
    part.v_depth = v_depth_, part.v_pitch = pitch(tiles, v_depth_);
  }

  // Units of at most 4 blocks and 4 panels, 900 kB of products; less where there are not `wanted`
  // such.
  WeightPart grouped(i64 wanted) const {
    WeightPart part{};
    part.blocks = std::min<i64>(blocks_, 4), part.panels = std::min<i64>(weight_.panels, 4);
    while (units(part) < wanted && part.blocks * part.panels > 1) {
      i64& larger = part.panels >= part.blocks ? part.panels : part.blocks;
      larger = divide_up(larger, 2);
    }
    return part;
  }
  i64 units(const WeightPart& part) const {
    return divide_up(blocks_, part.blocks) * divide_up(weight_.panels, part.panels);
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

  // Strips [first + begin, first + end) of the part that starts with `first`: dz, and the input.
  void transform(const WeightPart& part, i64 first, i64 begin, i64 end) const {
    KeptBuffer<float, BORDER> border(2 * v_depth_ + 32);
    winograd_kernels().input(input_, first + begin, first + end,
                             part.v + tiles(first, first + begin) * v_depth_, part.v_pitch,
                             v_depth_, border);
  }
  void spread(const WeightPart& part, i64 first, i64 begin, i64 end) const {
    winograd_kernels().spread(weight_, first + begin, first + end,
                              part.u + tiles(first, first + begin) * u_depth_, part.u_pitch,
                              u_depth_);
  }

  // Where a panel's weights are many beside the cache, all panels share a pass over the points.
  i64 group(int s) const {
    const bool deep = WINO_POINTS * 4 * 32 * v_depth_ > cache_size() / 2;
    return deep ? output_[s].panels : 1;
  }

  void apart(i64 slices) {
    const WeightPart whole = grouped(4);
    const i64 count = units(whole), size_of_unit = unit_size(whole);
    KeptBuffer<float, PRODUCTS> m(slices * count * size_of_unit);
    float* const products = m;
    std::atomic<i64> next = 0;
    parallel(std::min<i64>(slices, torch::stable::get_num_threads()), i64{1} << 20, [&](i64, i64) {
      KeptBuffer<float, INPUT> u(size(ALONE, u_depth_));
      KeptBuffer<float, OUTPUT> v(size(ALONE, v_depth_));
      WeightPart part = whole;
      part.u = u, part.v = v;
      for (i64 slice; (slice = next++) < slices;) {
        const i64 begin = slice * total_ / slices, end = (slice + 1) * total_ / slices;
        for (i64 first = begin, last; first < end; first = last) {
          last = part_end(first, end, ALONE);
          set_tiles(part, tiles(first, last));
          part.add = first > begin;
          transform(part, first, 0, last - first);
          if (job_.need_input)
            for (int s = 0; s < job_.sources; ++s)
              output(s, first, last, 0, output_[s].panels, group(s), part);
          spread(part, first, 0, last - first);  // output has just read the same pixels
          for (i64 unit = 0; unit < count; ++unit)
            winograd_kernels().weights(weight_, part, unit,
                                       products + (slice * count + unit) * size_of_unit);
        }
      }
    });
    parallel(count, i64{1} << 20, [&](i64 begin, i64 end) {
      for (i64 unit = begin; unit < end; ++unit)
        winograd_kernels().taps(weight_, whole, unit, products + unit * size_of_unit, slices,
                                count * size_of_unit);
    });
  }

  // The threads share the transformed tiles; each takes groups of panels and units of its own.
  void together() {
    const i64 threads = torch::stable::get_num_threads();
    WeightPart part = grouped(2 * threads);
    const i64 most = std::min(SHARED, strips_.before(total_)), count = units(part),
              size_of_unit = unit_size(part);
    const bool several = part_end(0, total_, most) < total_;
    KeptBuffer<float, INPUT> u(size(most, u_depth_));
    KeptBuffer<float, OUTPUT> v(size(most, v_depth_));
    KeptBuffer<float, PRODUCTS> m(several ? count * size_of_unit : 0);
    part.u = u, part.v = v;
    float* const products = m;
    struct Group {
      int source;
      i64 begin, end;
    };
    std::vector<Group> groups;
    for (int s = 0; job_.need_input && s < job_.sources; ++s) {
      const i64 panels = output_[s].panels,
                pieces = std::min(panels, divide_up(threads, job_.sources));
      for (i64 i = 0; i < pieces; ++i)
        groups.push_back({s, i * panels / pieces, (i + 1) * panels / pieces});
    }
    const i64 before = static_cast<i64>(groups.size());
    for (i64 first = 0, last; first < total_; first = last) {
      last = part_end(first, total_, most);
      set_tiles(part, tiles(first, last));
      part.add = first > 0;
      parallel(last - first, i64{1} << 20, [&](i64 begin, i64 end) {
        transform(part, first, begin, end);
        spread(part, first, begin, end);
      });
      std::atomic<i64> next = 0;
      parallel(std::min<i64>(before + count, threads), i64{1} << 20, [&](i64, i64) {
        KeptBuffer<float, SCRATCH> scratch(several ? 0 : size_of_unit);
        for (i64 item; (item = next++) < before + count;) {
          if (item < before) {
            const Group& g = groups[item];
            output(g.source, first, last, g.begin, g.end, g.end - g.begin, part);
            continue;
          }
          const i64 unit = item - before;
          float* const mine = several ? products + unit * size_of_unit : scratch.get();
          winograd_kernels().weights(weight_, part, unit, mine);
          if (last == total_) winograd_kernels().taps(weight_, part, unit, mine, 1, 0);
        }
      });
    }
  }

  const WinogradBackward& job_;
  GradInput<float> grad_;
  const Strips strips_;
  ConvJob<float> input_{}, output_[2]{};  // of dz; to the gradients of the sources
  WinogradWeightJob weight_{};
  Buffer<float> dots_[2];
  i64 u_depth_, v_depth_, blocks_, total_;
};

}  // namespace

void run_winograd_backward(const WinogradBackward& job) { Backward(job).run(); }

}  // namespace fastphi
