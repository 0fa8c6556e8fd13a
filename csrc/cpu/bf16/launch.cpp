// Launchers of the bfloat16 engine: who computes which units, and partial results merged in a fixed
// order.
#include "launch.h"

#include <cmath>

namespace fastphi {

namespace {

constexpr i64 HEAVY = i64{1} << 20;  // a unit of any kind is worth a thread

// To the nearest bfloat16, ties to even; NaN stays NaN.
bf16 rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<bf16>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}

float widened(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The mean first, then the deviations from it, in the order of the units: sum z^2 - (sum z)^2/n
// cancels.
void merge_statistics(const Bf16Layer& job, double eps, float* s_out, Bf16Moments moments) {
  const i64 units = job.panels * bf16_units(job.plane);
  parallel(job.n, 32 * units, [&](i64 begin, i64 end) {
    for (i64 n = begin; n < end; ++n) {
      const float *first = job.stats + 3 * n * units, *last = first + 3 * units;
      double count = 0, sum = 0, m2 = 0;
      for (const float* u = first; u < last; u += 3)
        count += u[0], sum += static_cast<double>(u[0]) * u[1];
      const double mean = sum / count;
      for (const float* u = first; u < last; u += 3) {
        const double delta = u[1] - mean;
        m2 += u[2] + u[0] * delta * delta;
      }
      const double std = std::sqrt(m2 / count);
      s_out[n] = static_cast<float>(1 / (std + eps));
      if (moments.mean)
        moments.mean[n] = static_cast<float>(mean), moments.std[n] = static_cast<float>(std);
    }
  });
}

// means (N, cout) of the units' sums, added in double and in order.
void merge_sums(const Bf16Layer& job, float* means) {
  const i64 units = bf16_units(job.plane), row = job.panels * BF16_BLOCK;
  parallel(job.n * job.cout, units, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const float* sums = job.sums + i / job.cout * units * row + i % job.cout;
      double sum = 0;
      for (i64 unit = 0; unit < units; ++unit) sum += sums[unit * row];
      means[i] = static_cast<float>(sum / static_cast<double>(job.plane.h * job.plane.w));
    }
  });
}

// A thread goes through all weights with as many images as half of its cache holds, or units of
// one. Threads share the weights' panels where these are the larger part and the images fit into
// the cache of each, else the units.
void run_layer(Bf16Layer job) {
  const i64 each = bf16_units(job.plane), units = job.n * each;
  i64 blocks = 0;
  for (int s = 0; s < job.sources; ++s) blocks += job.source[s].blocks;
  const i64 weights = blocks * 9 * BF16_PAIRED * job.panels;
  const i64 input = blocks * job.plane.block * BF16_BLOCK;
  const i64 room = cache_size() / 2 / static_cast<i64>(sizeof(bf16));
  job.span = std::max<i64>(8, room / std::max<i64>(1, input) * each);
  const auto& kernels = *bf16_kernels();
  if (weights > job.n * input && job.n * input <= room &&
      job.panels % torch::stable::get_num_threads() == 0)
    parallel(job.panels, HEAVY,
             [&](i64 begin, i64 end) { kernels.layer(job, begin, end, 0, units); });
  else
    parallel(units, HEAVY,
             [&](i64 begin, i64 end) { kernels.layer(job, 0, job.panels, begin, end); });
}

}  // namespace

void bf16_clear_borders(i64 n, const Bf16Hidden& x) {
  const Bf16Plane& p = x.plane;
  auto zero = [&](bf16* block, i64 first, i64 count) {
    std::memset(block + first * BF16_BLOCK, 0, count * BF16_BLOCK * sizeof(bf16));
  };
  parallel(n * x.blocks(), 4 * p.pitch, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      bf16* block = x.r + i * p.block * BF16_BLOCK;
      zero(block, 0, p.pitch + p.fold), zero(block, (p.rows + 1) * p.pitch, p.pitch + p.fold);
    }
  });
}

void launch_bf16_layer(Bf16Layer job, double eps, float* s_out, float* means, Bf16Moments moments) {
  job.panels = bf16_blocks(job.cout);
  const i64 units = job.n * bf16_units(job.plane) * job.panels;
  thread_local Buffer<float> stats, sums;
  job.stats = job.sums = nullptr;
  if (job.gamma) stats.reserve(3 * units), job.stats = stats;
  if (means) sums.reserve(BF16_BLOCK * units), job.sums = sums;
  if (job.r_out) bf16_clear_borders(job.n, {job.r_out, nullptr, job.plane, job.cout});
  run_layer(job);
  if (job.gamma)
    merge_statistics(job, eps, s_out, moments);
  else
    std::fill_n(s_out, job.n, 1.0f);
  if (means) merge_sums(job, means);
}

void launch_bf16_grad_input(const Bf16GradInput& job) {
  bf16_clear_borders(job.n, {job.dz, nullptr, job.plane, job.blocks * BF16_BLOCK});
  parallel(job.n * job.blocks, 64 * job.plane.positions,
           [&](i64 begin, i64 end) { bf16_kernels()->grad_input(job, begin, end); });
}

void launch_bf16_dgrad(Bf16Dgrad job, float* d_s) {
  const i64 units = bf16_units(job.plane);
  thread_local Buffer<float> dots;
  dots.reserve(job.n * job.panels * units);
  job.dots = dots;
  parallel(job.n * units, HEAVY,
           [&](i64 begin, i64 end) { bf16_kernels()->dgrad(job, begin, end); });
  for (i64 n = 0; n < job.n; ++n) {
    double sum = 0;
    for (i64 u = n * job.panels * units; u < (n + 1) * job.panels * units; ++u) sum += dots[u];
    d_s[n] = static_cast<float>(sum);
  }
}

void launch_bf16_image(const Bf16Image& job) {
  parallel(job.n * bf16_units(job.plane), HEAVY,
           [&](i64 begin, i64 end) { bf16_kernels()->image(job, begin, end); });
}

void launch_bf16_upsample(Bf16Upsample job) {
  const i64 units = job.n * job.panels * 4 * bf16_units(job.plane);
  bf16_clear_borders(job.n, {job.out, nullptr, job.to, job.panels * BF16_BLOCK});
  parallel(units, HEAVY, [&](i64 begin, i64 end) { bf16_kernels()->upsample(job, begin, end); });
}

void launch_bf16_border_image(i64 n, i64 c, i64 h, i64 w, const float* x, bool pixels, bf16* out) {
  const i64 row = (w + 2) * c, pixel = pixels ? c : 1, channel = pixels ? 1 : h * w;
  constexpr i64 CHUNK = 64;  // apart from the strided stores, arithmetic is vectors'
  const i64 part = n * (h + 2) * row;
  parallel(n * (h + 2), 4 * row, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const i64 y = i % (h + 2) - 1;
      bf16 *high = out + i * row, *rest = high + part;
      std::fill_n(high, row, bf16{0}), std::fill_n(rest, row, bf16{0});
      if (y < 0 || y == h) continue;
      const float* from = x + i / (h + 2) * c * h * w + y * w * pixel;
      for (i64 k = 0; k < c; ++k)
        for (i64 start = 0; start < w; start += CHUNK) {
          bf16 top[CHUNK], left[CHUNK];
          const i64 count = std::min(CHUNK, w - start);
          for (i64 p = 0; p < count; ++p) {
            const float value = from[(start + p) * pixel + k * channel];
            top[p] = rounded(value), left[p] = rounded(value - widened(top[p]));
          }
          for (i64 p = 0; p < count; ++p) {
            const i64 at = (start + p + 1) * c + k;
            high[at] = top[p], rest[at] = left[p];
          }
        }
    }
  });
}

void launch_bf16_pool(i64 n, const Bf16Hidden& x, const Bf16Hidden& out) {
  bf16_clear_borders(n, out);
  const Bf16Pool job{n, x.blocks(), x.plane, out.plane, x.r, out.r};
  parallel(n * job.blocks, 64 * x.plane.positions,
           [&](i64 begin, i64 end) { bf16_kernels()->pool(job, begin, end); });
}

}  // namespace fastphi
